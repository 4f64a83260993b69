"""The structure of the package: folders import downwards only, no circles, files that can be read in one sitting."""

import ast
import re
from pathlib import Path

import pytest
from modules import IMPORTS, LAYERS, MODULES, PACKAGE, ROOT, name_of
from packaging.version import Version

MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 600, 80, 10
# Functions whose length or parameters a signature of transformers forces.
FORCED = {
    ("modeling/modeling_llava_next_ar.py", "forward"),
    ("modeling/video_language_model.py", "forward"),
    ("processing/video_processing_llava_next_ar.py", "_preprocess"),
    ("processing/processing_llava_next_ar.py", "__init__"),
}


def layer_of(path: Path) -> int:
    (layer,) = [number for number, layer in enumerate(LAYERS) if path.relative_to(ROOT).parts[0] in layer]
    return layer


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_lead_downwards(path):
    """Folders side by side do not import each other."""
    own_folder = path.relative_to(ROOT).parts[0]
    wrong = [
        f"{name_of(path)}:{line} imports {name_of(found)}"
        for line, found in IMPORTS[path]
        if found.relative_to(ROOT).parts[0] != own_folder and layer_of(found) >= layer_of(path)
    ]
    assert wrong == []


def test_no_circle_of_imports():
    finished: set[Path] = set()

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        assert path not in way, " -> ".join(map(name_of, (*way[way.index(path) :], path)))
        if path not in finished:
            for _, found in IMPORTS[path]:
                visit(found, (*way, path))
            finished.add(path)

    for module in MODULES:
        visit(module, ())
    assert finished == set(MODULES)


def test_nothing_imports_the_experiments_but_scripts():
    experiments = ROOT / "experiments"
    importers = {
        name_of(path).partition("/")[0]
        for path, found in IMPORTS.items()
        if any(f.is_relative_to(experiments) for _, f in found)
    }
    assert importers <= {"experiments", "scripts"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_can_be_read_in_one_sitting(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    too_large = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (name_of(path), node.name) in FORCED:
            continue
        parameters = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        length = lines_of_code(node, text)
        if length > MAX_FUNCTION_LINES or parameters > MAX_PARAMETERS + 1:  # self is none of them
            too_large.append(f"{node.name}: {length} lines of code, {parameters} parameters")
    assert too_large == []


def lines_of_code(function: ast.FunctionDef, text: str) -> int:
    """Lines of a function, signature included, without docstring, comments and blank lines."""
    lines = set(range(function.lineno, function.end_lineno + 1))
    docstring = function.body[0]
    if isinstance(docstring, ast.Expr) and isinstance(getattr(docstring, "value", None), ast.Constant):
        lines -= set(range(docstring.lineno, docstring.end_lineno + 1))
    return sum(not re.fullmatch(r"\s*(#.*)?", text.splitlines()[number - 1]) for number in lines)


SCRIPTS = [
    path for path in sorted((ROOT / "scripts").glob("*.py")) if path.name != "command.py"
]  # it dispatches to all sub-commands


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_is_a_docstring_and_one_call(path):
    """Scripts contain no logic: it can be imported from the package."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    assert lines_of_code_of_module(path) <= 20
    assert not [
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.For, ast.While))
    ]


def lines_of_code_of_module(path: Path) -> int:
    text = path.read_text()
    docstring = ast.parse(text).body[0]
    lines = text.splitlines()[docstring.end_lineno :]
    return sum(bool(line.strip()) for line in lines)


def test_no_init_file():
    """With one at the root, pytest imports each class twice or fails to collect, depending on the checkout's name."""
    folders = [ROOT, ROOT / "tests", *{path.parent for path in MODULES}]
    own = {"evaluation/lmms_eval_plugin/__init__.py"}  # a distribution of its own
    found = {
        name_of(path) for folder in folders for path in folder.glob("**/__init__.py") if ".venv" not in path.parts
    }
    assert {name for name in found if not name.startswith(".")} <= own
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_every_folder_of_modules_is_installed():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in MODULES}
    plugins = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("*/pyproject.toml")}
    folders = {folder for folder in folders if not any(folder == p or folder.startswith(f"{p}/") for p in plugins)}
    assert set(listed) == {PACKAGE, *(f"{PACKAGE}.{folder.replace('/', '.')}" for folder in folders)}


def test_the_version_is_one():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    Version(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])
