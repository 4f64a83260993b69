# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Code that travels with a checkpoint: the folders of this package, written as the one flat folder that transformers loads.

transformers loads remote code from one folder and follows relative imports of siblings alone. Each save therefore writes the
modules under their base names. Only the imports of this package change in their text: from `..configuration.frame_token_layout`
to `.frame_token_layout`.

The modules that travel are those that the classes of `AUTO_MAP` and the saved class import, directly or not. In the flat form
this module ends with a block of imports that never runs. transformers reads imports as text, and so fetches all files together
with any one of them. A class that was loaded from a checkpoint has the flat form already; its files are copied.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

MODEL_AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
AUTO_MAP = {
    "AutoConfig": "configuration_llava_next_ar.LlavaNextARConfig",
    **dict.fromkeys(MODEL_AUTO_CLASSES, "modeling_llava_next_ar.LlavaNextARForConditionalGeneration"),
    "AutoProcessor": "processing_llava_next_ar.LlavaNextARProcessor",
    "AutoVideoProcessor": "video_processing_llava_next_ar.LlavaNextARVideoProcessor",
}

_PACKAGE = "llava_next_ar"
_THIS_FILE = Path(__file__).resolve()
_IS_FLAT = (_THIS_FILE.parent / "configuration_llava_next_ar.py").is_file()
_ROOT = _THIS_FILE.parent if _IS_FLAT else _THIS_FILE.parent.parent
_BLOCK = """

if False:  # never runs: transformers reads imports as text, and fetches these and all that they import
"""


def class_reference(saved_class: type) -> str:
    """Name of a class in an `auto_map`: `module.Class`."""
    saved_class = _class_with_code(saved_class)
    return f"{saved_class.__module__.rpartition('.')[2]}.{saved_class.__name__}"


def code_files(*saved_classes: type) -> dict[str, bytes]:
    """Flat form of all modules that travel with a save.

    Args:
        saved_classes: classes of this package, or subclasses in other files. Such a file imports this package relatively or
            as `llava_next_ar`, and its siblings relatively.

    Returns:
        File name -> content, sorted by name.

    Raises:
        ValueError: if a class has no file, two files have one name, or a file imports this package in a form that has no
            flat equivalent; the message names file, line and cure.
    """
    # A class of `AUTO_MAP` may come from another copy of this package, such as that of a checkpoint: this copy is saved.
    waiting = [_THIS_FILE, *(_file_of(c) for c in saved_classes if class_reference(c) not in AUTO_MAP.values())]
    for module in sorted({reference.partition(".")[0] for reference in AUTO_MAP.values()}):
        waiting += [path for path in (_ROOT / f"{module}.py", *_ROOT.glob(f"*/{module}.py")) if path.is_file()]
    paths: dict[str, Path] = {}
    contents: dict[str, bytes] = {}
    while waiting:
        path = waiting.pop()
        if paths.setdefault(path.name, path) != path:
            if paths[path.name].read_bytes() == path.read_bytes():
                continue  # the cache of remote code holds one copy for each entry of an `auto_map`
            raise ValueError(f"{path} and {paths[path.name]} would both be saved as {path.name}: rename one of them")
        if path.name not in contents:
            contents[path.name], imported = _flattened(path)
            waiting += imported
    if not _IS_FLAT:
        contents[_THIS_FILE.name] += _block().encode()
    return dict(sorted(contents.items()))


def write_code(folder: Path, *saved_classes: type) -> None:
    """Write `code_files` into a folder, which is made if it does not exist; nothing is written if `code_files` raises."""
    files = code_files(*saved_classes)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        target = folder / name
        if not target.is_file() or target.read_bytes() != content:
            target.write_bytes(content)


def modules_imported_by(text: str) -> list[str]:
    """Base names of the siblings that a module of the flat form imports, as transformers finds them."""
    return re.findall(r"^\s*from\s+\.(\w+)\s+import", text, flags=re.MULTILINE)


def _class_with_code(saved_class: type) -> type:
    """The class; for a class that FSDP2 made, its original."""
    return next(base for base in saved_class.__mro__ if not base.__module__.startswith("torch."))


def _file_of(saved_class: type) -> Path:
    found = _class_with_code(saved_class)
    file = getattr(sys.modules.get(found.__module__), "__file__", None)
    if found.__module__ == "__main__" or file is None:
        raise ValueError(
            f"{found.__name__} is defined in {found.__module__}, whose code cannot be saved: put it into a file of its own "
            "and import it from there"
        )
    return Path(file).resolve()


def _flattened(path: Path) -> tuple[bytes, list[Path]]:
    """Flat form of a module, and the files of this package that the module imports."""
    content = path.read_bytes()
    lines, imported = content.split(b"\n"), []
    for node, module in _own_imports(path, content):
        target = _imported_file(path, node, module)
        imported.append(target)
        line = lines[node.lineno - 1]
        flat = re.sub(
            rb"\bfrom(\s+)\S+(\s+)import\b", rb"from\1." + target.stem.encode() + rb"\2import", line, count=1
        )
        lines[node.lineno - 1] = flat
    return b"\n".join(lines), imported


def _own_imports(path: Path, content: bytes) -> Iterator[tuple[ast.ImportFrom, str]]:
    """Import statements of modules that travel, each with the module's name after the leading dots or the package's name."""
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == _PACKAGE:
                    raise _no_flat_form(path, node.lineno, f"import {alias.name}")
        elif isinstance(node, ast.ImportFrom):
            package, _, module = (node.module or "").partition(".")
            if node.level:
                yield node, node.module or ""
            elif package == _PACKAGE:
                yield node, module


def _imported_file(path: Path, node: ast.ImportFrom, module: str) -> Path:
    folder = _ROOT if node.level == 0 else path.parents[node.level - 1]
    parts = module.split(".")
    if node.level == 0 and _IS_FLAT:  # a class beside a checkpoint, which imports the installed package
        parts = parts[-1:]
    target = folder.joinpath(*parts).with_suffix(".py") if module else None
    if target is None or not target.is_file():
        shown = f"from {'.' * node.level}{node.module or ''} import {node.names[0].name}"
        raise _no_flat_form(path, node.lineno, shown)
    return target


def _no_flat_form(path: Path, line: int, statement: str) -> ValueError:
    return ValueError(
        f"{path}, line {line}: `{statement}` cannot be saved with a checkpoint, whose code is one flat folder: import names "
        f"from a module, as in `from {_PACKAGE}.modeling.frame_masks import FrameLevelMaskGenerator`"
    )


def _block() -> str:
    references: Iterable[str] = dict.fromkeys(AUTO_MAP.values())
    imports = ("    from .{} import {}  # noqa: F401\n".format(*reference.split(".")) for reference in references)
    return _BLOCK + "".join(imports)
