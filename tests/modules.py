"""The modules of the package, in the layers that their folders form, and what each imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llava_next_ar"
# From the bottom up; a folder may import from itself and from the rows below its own.
LAYERS = (
    {"hub"},
    {"configuration"},
    {"modeling", "processing"},
    {"training"},
    {"evaluation"},
    {"pictures", "conversion"},
    {"serving"},
    {"experiments"},
    {"scripts"},
)
MODULES = sorted(
    path for layer in LAYERS for folder in layer if (ROOT / folder).is_dir() for path in (ROOT / folder).rglob("*.py")
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(path: Path, tree: ast.AST) -> Iterator[tuple[int, Path]]:
    """Line and file of every module of this package that a file imports, in whatever form."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == PACKAGE]
            base = ROOT
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if node.level else ROOT
            parts = (node.module or "").split(".")
            if not node.level and parts.pop(0) != PACKAGE:
                continue
            names = [[*filter(None, parts), alias.name] for alias in node.names]
        for parts in names:
            for length in (len(parts), len(parts) - 1):
                found = base.joinpath(*parts[:length]).with_suffix(".py") if length else base
                if found.is_file():
                    yield node.lineno, found
                    break
            else:
                raise AssertionError(f"{name_of(path)}:{node.lineno} imports {'.'.join(parts)}, which is not there")


IMPORTS = {path: list(imported_modules(path, ast.parse(path.read_text()))) for path in MODULES}
