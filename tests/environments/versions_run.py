"""Run the core tests with the oldest, the pinned and the newest supported releases, each in a fresh environment.

    python tests/environments/versions_run.py    # all environments, then the exchange of checkpoints
    python tests/environments/versions_run.py --list
    python tests/environments/versions_run.py --only oldest --only newest
    python tests/environments/versions_run.py --torch-pip-args "--index-url https://download.pytorch.org/whl/cpu"

An environment is a line of ENVIRONMENTS: a Python and the releases that are asked for by name; all others are the newest
that pyproject.toml allows. Into it go torch and then a wheel of this checkout with its extras `train` and `dev`, so that a
range of pyproject.toml that cannot be resolved shows too. CORE_TESTS exercise loading, saving, the processor, training and
generation; what a test needs beyond the oldest release is the reason of its skip, and printed.

A model saved in the first environment (the oldest) is then loaded in each other, and the other way round, with the installed
class and with the code that came with it: logits and predicted frames must be equal, between releases of torch to 1e-5.

A Python or a release that cannot be had here is reported as "not run" with the reason. Exit code: 0 if something ran and
nothing failed. With CUDA builds of torch an environment takes 5 GB and more; there are two at a time, the first and one other.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from own_environment import SECONDS_TO_RUN
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
CORE_TESTS = (
    "tests/configuration/test_configuration.py",
    "tests/modeling/test_modeling.py",
    "tests/processing/test_processing.py",
    "tests/processing/test_video_frames.py::test_pixels_of_the_original_preprocessing",  # exact with the newest Pillow
    "tests/modeling/test_generation.py",
    "tests/training/test_training.py",
    "tests/hub/test_remote_code.py",
)
# Packages of the result; the others follow from these.
SHOWN = ("torch", "transformers", "huggingface_hub", "peft", "accelerate", "numpy")
TOLERANCE = 1e-5  # two releases of torch need not add in the same order


@dataclass(frozen=True)
class Environment:
    """A Python (`major.minor`) and the requirements that are fixed; torch may be among them."""

    name: str
    python: str
    pins: tuple[str, ...] = ()


OLDEST = (
    "transformers==5.19.0",
    "huggingface_hub==1.31.0",
    "peft==0.18.0",
    "accelerate==1.3.0",
    "datasets==3.0.0",
    "safetensors==0.8.0",
    "numpy==1.26.0",
    "pyarrow<26",  # 26 needs NumPy 2 and does not say so to pip
    "pillow==10.1.0",
    "av==17.0.0",
)
ENVIRONMENTS = (
    Environment("oldest", "3.10", ("torch==2.6.0", *OLDEST)),
    Environment("oldest transformers", "3.11", ("torch==2.13.0", *OLDEST)),
    Environment("transformers 5.20", "3.11", ("torch==2.13.0", "transformers==5.20.*")),
    Environment("transformers 5.21", "3.11", ("torch==2.13.0", "transformers==5.21.*")),
    Environment("transformers 5.22", "3.11", ("torch==2.13.0", "transformers==5.22.*")),
    Environment("pinned", "3.11", ("-c", "constraints.txt")),
    Environment("newest transformers", "3.11", ("torch==2.13.0",)),
    Environment("python 3.12", "3.12"),
    Environment("newest", "3.13"),
)


@dataclass
class Result:
    """Result of one environment; `not_run` is the cause if nothing ran."""

    environment: Environment
    versions: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    not_run: str | None = None
    python: Path | None = None
    skip_reasons: set[str] = field(default_factory=set)

    @property
    def ok(self) -> bool:
        return self.not_run is None and self.passed > 0 and self.failed == 0


class CannotBeHad(Exception):
    """No such Python or no such release on this machine."""


class ExchangeFailed(Exception):
    """A checkpoint of one environment is not the same in another."""


# -- Pythons


def find_python(wanted: str) -> str:
    """An interpreter of the version `major.minor`: on PATH, among pyenv's, or among uv's.

    Raises:
        CannotBeHad: if there is none.
    """
    candidates = [shutil.which(f"python{wanted}"), sys.executable]
    pyenv = os.environ.get("PYENV_ROOT") or (_output("pyenv", "root") if shutil.which("pyenv") else None)
    if pyenv:
        candidates += sorted((Path(pyenv) / "versions").glob(f"{wanted}.*/bin/python"), reverse=True)
    if shutil.which("uv"):
        candidates.append(_output("uv", "python", "find", "--no-python-downloads", wanted))
    for candidate in filter(None, candidates):
        # pyenv's shims are on PATH for versions that are not active, and fail when they are run.
        if _output(str(candidate), "-c", "import sys; print('%d.%d' % sys.version_info[:2])") == wanted:
            return str(candidate)
    raise CannotBeHad(f"no Python {wanted} on this machine")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# -- One environment


def build_wheel(folder: Path) -> Path:
    """A wheel of a copy of the checkout, so that no build folder is left in it."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "tests", "build", "dist", "*.egg-info"))
    _run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder / "wheels", source, log=folder / "log"
    )
    (wheel,) = (folder / "wheels").glob("*.whl")
    return wheel


def install(environment: Environment, folder: Path, wheel: Path, torch_pip_args: Sequence[str]) -> Path:
    """A virtual environment in `folder`; returns its interpreter.

    Raises:
        CannotBeHad: if Python or a release cannot be had, with pip's own words.
    """
    python = find_python(environment.python)
    log = folder / "install.log"
    try:
        _run(python, "-m", "venv", folder / "venv", log=log)
        python = _python_of(folder)
        pip = (python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check")
        constraints = [argument for argument in environment.pins if not argument.startswith("torch==")]
        torch = next((pin for pin in environment.pins if pin.startswith("torch==")), "torch")
        # First and alone: left to the resolver, another build of it may be chosen.
        _run(*pip, *torch_pip_args, torch, *_constraint_files(constraints), log=log)
        # Chosen versions stay, also if other requirements prefer later ones.
        installed = f"torch=={version_of(python, 'torch')}"
        _run(*pip, f"{wheel}[train,dev]", installed, *constraints, log=log)
    except subprocess.CalledProcessError:
        errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("ERROR")]
        raise CannotBeHad(errors[-1] if errors else log.read_text(errors="replace")[-300:]) from None
    return python


def _constraint_files(pins: Sequence[str]) -> list[str]:
    return [part for flag, name in zip(pins, pins[1:], strict=False) if flag == "-c" for part in (flag, name)]


def _python_of(folder: Path) -> Path:
    return folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def version_of(python: Path, package: str) -> str:
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    return _output(str(python), "-c", code, package) or "-"


def run_tests(python: Path, folder: Path, result: Result) -> None:
    """Fill in the result; the output of pytest goes to `tests.log` in the folder."""
    report = folder / "report.xml"
    command = (python, "-m", "pytest", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}")
    try:
        _run(*command, *CORE_TESTS, log=folder / "tests.log")
    except subprocess.CalledProcessError as error:
        if error.returncode != 1:  # not even collected, or ended by a signal
            result.failed += 1
    if not report.exists():
        return
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            result.failed += 1
        elif "skipped" in kinds:
            result.skipped += 1
            result.skip_reasons.add(case.find("skipped").get("message", ""))
        else:
            result.passed += 1


def _run(*command: object, log: Path) -> None:
    # Neither caches, packages nor the settings of the process that called belong to the fresh environment.
    unset = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTEST_ADDOPTS")
    environ = {name: value for name, value in os.environ.items() if name not in unset}
    environ.update(OMP_NUM_THREADS="1", PYTHONNOUSERSITE="1", PYTHONDONTWRITEBYTECODE="1")
    with open(log, "a") as file:
        words = [str(part) for part in command]
        subprocess.run(words, cwd=ROOT, env=environ, stdout=file, stderr=file, check=True, timeout=SECONDS_TO_RUN)


# -- Exchange of checkpoints


def save_checkpoint(folder: Path) -> None:
    """Run inside an environment: a tiny model that no longer predicts the copy, its inputs and its outputs."""
    import torch
    from safetensors.torch import save_file

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import tiny_model, video_batch
    from tiny_processor import tiny_processor

    model = tiny_model()
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.1)
    processor = tiny_processor(model.config, num_frames=4)
    inputs = video_batch(model.config, [[3], [5, 2]])
    del inputs["labels"]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in inputs.items()}, folder / "inputs.safetensors")
    save_file(_outputs(model, inputs), folder / "outputs.safetensors")


def load_checkpoint(folder: Path) -> None:
    """Run inside another environment: prints, as JSON, how far its outputs are from those that were saved."""
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
    from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor

    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    differences = {}
    for way, model_class, processor_class, trust in (
        ("installed", LlavaNextARForConditionalGeneration, LlavaNextARProcessor, {}),
        ("remote code", AutoModelForImageTextToText, AutoProcessor, {"trust_remote_code": True}),
    ):
        processor = processor_class.from_pretrained(folder, **trust)
        model = model_class.from_pretrained(folder, **trust).eval()
        processor.check_layout(model.config)
        found = _outputs(model, inputs)
        differences[way] = max((found[name] - expected[name]).abs().max().item() for name in expected)
    print(json.dumps(differences))


def _outputs(model, inputs: dict) -> dict:
    import torch

    with torch.no_grad():
        output = model(**inputs, return_reconstruction=True)
    return {"logits": output.logits.contiguous(), "predictions": output.reconstruction.predictions.contiguous()}


def exchange(giver: Result, taker: Result, folder: Path) -> str:
    """Save in the environment of one, loads in that of the other; returns a line for the report.

    Raises:
        ExchangeFailed: if either step fails or the outputs differ.
    """
    way = f"saved by {giver.environment.name!r}, loaded by {taker.environment.name!r}"
    script, checkpoint, log = Path(__file__).resolve(), folder / "checkpoint", folder / "exchange.log"
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.mkdir()
    try:
        _run(giver.python, script, "--save", checkpoint, log=log)
        _run(taker.python, script, "--load", checkpoint, log=log)
    except subprocess.CalledProcessError:
        raise ExchangeFailed(f"{way}: {_last_lines(log)}") from None
    differences = json.loads(log.read_text().strip().splitlines()[-1])
    line = f"{way}: outputs differ by " + ", ".join(f"{value:.1e} ({name})" for name, value in differences.items())
    same_torch = giver.versions["torch"] == taker.versions["torch"]
    if not all(value <= (0 if same_torch else TOLERANCE) for value in differences.values()):
        raise ExchangeFailed(line)
    return line


def _last_lines(log: Path, count: int = 3) -> str:
    return " / ".join(log.read_text(errors="replace").strip().splitlines()[-count:])


# -- All environments


def run_environments(
    environments: Sequence[Environment], folder: Path, torch_pip_args: Sequence[str]
) -> tuple[list[Result], list[str], list[str]]:
    """Results, and what the exchanges gave: lines that are right and lines that are not."""
    wheel = build_wheel(folder)
    results, right, wrong = [], [], []
    first = None
    progress = tqdm(environments, unit="environment", disable=None)
    for environment in progress:
        home = folder / environment.name.replace(" ", "_")
        home.mkdir()
        result = Result(environment)
        results.append(result)
        start = time.monotonic()
        try:
            progress.set_description(f"{environment.name}: installing")
            result.python = install(environment, home, wheel, torch_pip_args)
            result.versions = {package: version_of(result.python, package) for package in SHOWN}
            progress.set_description(f"{environment.name}: testing")
            run_tests(result.python, home, result)
            if first is not None:
                progress.set_description(f"{environment.name}: exchanging checkpoints")
                for giver, taker in ((first, result), (result, first)):
                    try:
                        right.append(exchange(giver, taker, home))
                    except ExchangeFailed as error:
                        wrong.append(str(error))
        except CannotBeHad as reason:
            result.not_run = str(reason)
        result.seconds = time.monotonic() - start
        if result.not_run is None and first is None:
            first = result
        else:
            shutil.rmtree(home / "venv", ignore_errors=True)
        progress.write("  ".join(_row(result)))  # at once: all environments together take an hour and more
    return results, right, wrong


def _row(result: Result) -> list[str]:
    row = [result.environment.name, result.environment.python]
    if result.not_run is not None:
        return [*row, f"not run: {result.not_run}"]
    numbers = (result.passed, result.failed, result.skipped, round(result.seconds))
    return [*row, *(result.versions[package] for package in SHOWN), *map(str, numbers)]


def report(results: Sequence[Result], right: Sequence[str], wrong: Sequence[str]) -> str:
    """The table, the reasons of skips, and the exchanges."""
    head = ("environment", "python", *SHOWN, "passed", "failed", "skipped", "seconds")
    rows = [head, *map(_row, results)]
    full = [row for row in rows if len(row) == len(head)]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    widths[0] = max(len(row[0]) for row in rows)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    for result in results:
        lines += [f"skipped in {result.environment.name!r}: {reason}" for reason in sorted(result.skip_reasons)]
    return "\n".join([*lines, *right, *(f"WRONG: {line}" for line in wrong)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the environments and stop")
    parser.add_argument("--only", action="append", metavar="NAME", help="run this environment (may be repeated)")
    parser.add_argument("--torch-pip-args", default="", help="passed to pip when it installs torch")
    parser.add_argument("--logs", type=Path, help="folder (new or empty) for environments and logs; a temporary one")
    # Code that the script runs inside an environment.
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.save or options.load:
        save_checkpoint(options.save) if options.save else load_checkpoint(options.load)
        return 0
    if options.list:
        for environment in ENVIRONMENTS:
            print(f"{environment.name:<22}python {environment.python}  {' '.join(environment.pins)}")
        return 0
    names = [environment.name for environment in ENVIRONMENTS]
    unknown = set(options.only or ()) - set(names)
    if unknown:
        parser.error(f"no environment {sorted(unknown)}; there are {names}")
    chosen = [environment for environment in ENVIRONMENTS if not options.only or environment.name in options.only]
    with tempfile.TemporaryDirectory(prefix="versions_") as temporary:
        folder = Path(temporary) if options.logs is None else options.logs
        folder.mkdir(parents=True, exist_ok=True)
        results, right, wrong = run_environments(chosen, folder, shlex.split(options.torch_pip_args))
        print(report(results, right, wrong))
        for result in results:
            if result.failed:
                home = folder / result.environment.name.replace(" ", "_")
                print(f"\n{result.environment.name}:\n{_last_lines(home / 'tests.log', 40).replace(' / ', chr(10))}")
    ran = [result for result in results if result.not_run is None]
    return 0 if ran and all(result.ok for result in ran) and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
