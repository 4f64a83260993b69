"""The wheel contains the folders of modules alone; metadata, extras and annotations are consistent."""

import ast
import importlib.metadata
import json
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import yaml
from demo_folder import make_demo_folder
from hub_server import HubServer
from modules import IMPORTS, MODULES, ROOT, name_of
from packaging.requirements import Requirement
from tiny import tiny_model
from tiny_processor import tiny_processor

# The extra that a script needs, with all that it imports; None: the package alone.
EXTRA_OF_SCRIPT = {
    "benchmark.py": "benchmark",
    "benchmark_gpu.py": "benchmark",
    "command.py": None,  # imports each program when it runs
    "compare.py": None,
    "consolidate.py": None,
    "convert.py": None,
    "demo.py": "demo",
    "evaluate.py": "eval",
    "merge.py": "train",
    "inference_uses.py": "demo",
    "push_to_hub.py": "train",
    "study.py": "study",
    "surprise_controls.py": "study",
    "synthetic_clips.py": "demo",
    "temporal_benchmark.py": "demo",
    "tiny_checkpoint.py": "demo",
    "train.py": "train",
    "visualize.py": "eval",
}
DATA = {
    "py.typed",
    "model_card.md",
    "hub/releases.json",
    *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("scripts/*/*.yaml")),
    *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("serving/space/examples/*.mp4")),
}
TRAVELLING = {"configuration", "modeling", "processing"}
LIBRARY = {*TRAVELLING, "hub", "training"}
IMPORT_NAMES = {"pyyaml": "yaml", "pillow": "PIL", "opencv-python-headless": "cv2"}


def run(*command: object, cwd: Path) -> str:
    return processes.run(command, cwd=cwd, timeout=600).stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """Source distribution and wheel; `build` makes the wheel from the former, so the former is complete."""
    # from a copy of the checkout, so that no build folder is left in it
    source = tmp_path_factory.mktemp("some other name") / "checkout"
    outputs = ("build", "dist", "*.egg-info", "__pycache__", "demo_output", "outputs", "runs")
    ignored = shutil.ignore_patterns(".*", *outputs)
    shutil.copytree(ROOT, source, ignore=ignored)
    output = source.parent / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, ".", cwd=source)
    (archive,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def wheel(distributions) -> Path:
    return distributions[1]


def test_wheel_holds_exactly_the_modules_and_their_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    content = {name for name in names if ".dist-info/" not in name}
    assert content == {f"llava_next_ar/{name}" for name in (*map(name_of, MODULES), *DATA)}


def test_source_distribution_holds_code_licence_and_page(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {*map(name_of, MODULES), *DATA, "pyproject.toml", "README.md", "LICENSE"}


def test_wheel_carries_the_licence(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert archive.read(name) == (ROOT / "LICENSE").read_bytes()
    (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    assert "License-Expression: Apache-2.0" in archive.read(name).decode()


def test_installed_wheel_finds_its_modules_from_any_folder(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # -I ignores the working folder; site-packages still hold the editable install, which must not win over the path
    code = f"import sys; sys.path.insert(0, {str(target)!r})\n"
    code += "import llava_next_ar.configuration.frame_token_layout as module; print(module.__file__)"
    path = run(sys.executable, "-I", "-c", code, cwd=elsewhere).strip()
    assert Path(path) == target / "llava_next_ar" / "configuration" / "frame_token_layout.py"


@pytest.mark.slow
def test_installed_wheel_loads_a_checkpoint(wheel, tmp_path):
    """Fresh environment with the wheel and the other packages of the current one."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_processor(model.config).save_pretrained(tmp_path / "checkpoint")
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (torch_file,) = [file for file in importlib.metadata.files("torch") if str(file) == "torch/__init__.py"]
    dependencies = torch_file.locate().parents[1]
    code = f"""
import importlib, sys
sys.path.append({str(dependencies)!r})  # behind the wheel, and without the editable install's finder
for name in {sorted(dotted_names(None))}:
    module = importlib.import_module(f"llava_next_ar.{{name}}")
    assert "site-packages" in module.__file__ and {str(tmp_path / "venv")!r} in module.__file__, module.__file__
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor
model, info = LlavaNextARForConditionalGeneration.from_pretrained("checkpoint", output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
LlavaNextARProcessor.from_pretrained("checkpoint").check_layout(model.config)
print(sum(parameter.double().sum().item() for parameter in model.parameters()))
"""
    found = float(run(python, "-c", code, cwd=tmp_path).splitlines()[-1])
    assert found == sum(parameter.double().sum().item() for parameter in model.parameters())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Folder of programs of a fresh environment with the wheel and, behind it, the other packages of the current one."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    programs = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    run(programs / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    (torch_file,) = [file for file in importlib.metadata.files("torch") if str(file) == "torch/__init__.py"]
    site = run(programs / "python", "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip()
    # A path file in a folder that a path file names is not read: the editable install's finder stays out.
    (Path(site) / "dependencies.pth").write_text(f"{torch_file.locate().parents[1]}\n")
    where = run(programs / "python", "-c", "import llava_next_ar.scripts.train as m; print(m.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(Path(site).resolve()) or Path(where.strip()).is_relative_to(site)
    return programs


def test_every_command_has_help_from_the_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"""
import contextlib, importlib.util, io, sys
sys.path.insert(0, {str(tmp_path / "site")!r})
from llava_next_ar.scripts import command
assert command.__file__.startswith({str(tmp_path)!r}), command.__file__
for name, (module, _) in command.COMMANDS.items():
    if importlib.util.find_spec(f"llava_next_ar.{{module.split(':')[0]}}") is None:
        continue
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:
        command.main([name, "--help"])
    assert f"usage: llava-next-ar {{name}}" in printed.getvalue(), (name, printed.getvalue())
print("all have help")
"""
    assert run(sys.executable, "-I", "-c", code, cwd=tmp_path).strip().endswith("all have help")


@pytest.mark.slow
def test_everything_is_done_from_the_wheel_alone(installed, tmp_path, monkeypatch):
    """Ask, train, evaluate, visualize, convert and push, by the console command, in a folder without the checkout."""
    make_demo_folder(tmp_path)
    program, data = installed / "llava-next-ar", "clips/test.json"
    entry = json.loads((tmp_path / data).read_text())[0]
    clip, cpu = f"clips/{entry['video']}", ("--device", "cpu")

    def command(*words: object) -> str:
        return run(program, *words, cwd=tmp_path)

    assert command("--version").strip() == importlib.metadata.version("llava-next-ar")
    train = ("--config", "demo", "--model", "base", "--train_data", data, "--output_dir", "run", "--max_steps", 2)
    assert "memory per device" in command("check", *train)
    assert "x 2 processes" in command("train", "--launch", "cpu", *train, "--per_device_train_batch_size", 1)
    assert "frame  seconds  surprise" in command("ask", "run", clip, "What color?", *cpu, "--surprise")
    command("evaluate", "--model", "run", "--data", data, *cpu, "--output", "run/results.json")
    command("visualize", "--model", "run", "--video", clip, *cpu, "--output", "pictures")
    film = tmp_path / "pictures" / Path(clip).stem / "film.png"
    assert film.is_file() and (tmp_path / "run" / "results.html").is_file()
    command("convert", "run", "exported", "--to", "llava_onevision")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"] == "llava_onevision"
    assert "exactly the code of llava-next-ar" in command("compare", "run")
    assert "cannot be reached" in command("push", "run", "ann/model", "--dry-run")
    with HubServer() as hub:
        hub.add_user("ann", "hf_ann")
        online = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_ann", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        for name, value in online.items():
            monkeypatch.setenv(name, value)
        printed = command("push", "run", "ann/model", "--license", "apache-2.0", "--film", film)
        assert "pushed: " in printed
        files = hub.repo("ann/model").files()
        card = files["README.md"].decode()
        assert {"model.safetensors", "film.png", "modeling_llava_next_ar.py"} <= files.keys()
        assert "| question type |" in card and "](film.png)" in card
        answer = run(program, "ask", "ann/model", clip, "What color?", *cpu, "--trust-remote-code", cwd=tmp_path)
        assert answer == command("ask", "run", clip, "What color?", *cpu)


def test_the_citation_names_this_version():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_editable_install_is_this_checkout(tmp_path):
    code = "import llava_next_ar.configuration.frame_token_layout as module; print(module.__file__)"
    path = run(sys.executable, "-c", code, cwd=tmp_path).strip()
    assert Path(path) == ROOT / "configuration" / "frame_token_layout.py"


def test_every_direct_dependency_is_pinned():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for name, extra in project["optional-dependencies"].items():
        wanted += extra if name != "sources" else []  # which fixes its versions itself
    names = {normalised(re.match(r"[A-Za-z0-9._-]+", line).group()) for line in wanted} - {project["name"]}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalised(line.split("==")[0]) for line in pins if "==" in line}
    assert names - pinned == set()


def test_all_extra_names_every_other_extra():
    """Except `sources`, whose simulators fix versions of their own and serve the study alone."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (line,) = project["optional-dependencies"]["all"]
    named = set(re.fullmatch(r"llava-next-ar\[(.*)\]", line).group(1).split(","))
    assert named == set(project["optional-dependencies"]) - {"all", "sources"}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- what is promised to type checkers ------------------------------------------------------------------------


def unannotated(body: list[ast.stmt], prefix: str = "", in_class: bool = False) -> Iterator[str]:
    """Public functions and methods of a module or class with a parameter or a result that has no annotation."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from unannotated(node.body, f"{prefix}{node.name}.", in_class=True)
        if not isinstance(node, ast.FunctionDef) or (node.name.startswith("_") and not node.name.endswith("__")):
            continue
        is_static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
        positional = [*node.args.posonlyargs, *node.args.args][int(in_class and not is_static) :]
        parameters = [*positional, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        missing = [parameter.arg for parameter in parameters if parameter is not None and parameter.annotation is None]
        missing += ["return"] if node.returns is None else []
        if missing:
            yield f"{prefix}{node.name}: {', '.join(missing)}"


@pytest.mark.parametrize(
    "module", [path for path in MODULES if name_of(path).partition("/")[0] in LIBRARY], ids=name_of
)
def test_public_signatures_are_annotated(module):
    assert list(unannotated(ast.parse(module.read_text()).body)) == []


def test_the_search_for_annotations_finds_what_lacks_them():
    code = "def f(a: int, *b) -> int: ...\nclass C:\n    def g(self): ...\n    def _h(self, a): ..."
    assert list(unannotated(ast.parse(code).body)) == ["f: b", "C.g: return"]


# --- what the extras promise ----------------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    """Top-level packages that a file requires, without the standard library and the package itself left out."""
    names, tree = set(), ast.parse(path.read_text())
    optional = {node for tried in ast.walk(tree) if isinstance(tried, ast.Try) for node in ast.walk(tried)}
    for node in set(ast.walk(tree)) - optional:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"llava_next_ar"}


def import_names(requirements: list[str]) -> set[str]:
    names = {normalised(Requirement(line).name) for line in requirements}
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


def covered_by(extra: str | None) -> set[str]:
    """Importable packages after an installation with an extra."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted, extras = list(project["dependencies"]), [extra] if extra else []
    while extras:
        lines = project["optional-dependencies"][extras.pop()]
        own = [line for line in lines if Requirement(line).name == project["name"]]
        extras += [name for line in own for name in Requirement(line).extras]
        wanted += [line for line in lines if line not in own]
    always = [line for line in importlib.metadata.requires("transformers") if "extra ==" not in line]
    return import_names([*wanted, *always])


def closure(path: Path) -> set[Path]:
    """A module and all modules of this package that it imports, directly or not."""
    found, waiting = set(), [path]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [other for _, other in IMPORTS[path]]
    return found


def dotted_names(extra: str | None) -> list[str]:
    """Modules that an extra covers, with all that they import."""
    covered = [path for path in MODULES if set().union(*map(imported, closure(path))) <= covered_by(extra)]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in covered]


def test_the_package_alone_covers_what_models_and_processors_need():
    assert {name.partition(".")[0] for name in dotted_names(None)} >= {"configuration", "modeling", "processing"}
    needed = [imported(path) for path in MODULES if name_of(path).partition("/")[0] in TRAVELLING]
    assert set().union(*needed) - covered_by(None) == set()


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_the_extra_of_a_script_covers_what_it_imports(path):
    assert path.name in EXTRA_OF_SCRIPT, "list the extra of a new script above"
    program = re.search(r'run\("([\w.]+):main"\)', path.read_text())
    modules = closure(path) | (closure(ROOT.joinpath(*program[1].split(".")).with_suffix(".py")) if program else set())
    assert program or path.name == "command.py"
    needed = set().union(*map(imported, modules))
    assert needed - covered_by(EXTRA_OF_SCRIPT[path.name]) == set()


def test_the_demo_can_train():
    assert covered_by("demo") >= covered_by("train")  # it starts scripts/train.py
