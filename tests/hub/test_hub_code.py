"""The exporter, which writes the folders of modules as the one flat folder that transformers loads."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from elsewhere import run_elsewhere
from tiny import tiny_model
from tiny_processor import tiny_processor
from transformers.dynamic_module_utils import get_relative_import_files

from llava_next_ar.hub import hub_code
from llava_next_ar.hub.hub_code import AUTO_MAP, code_files, write_code
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration

ROOT = Path(hub_code.__file__).resolve().parents[1]
TRAVELLING = ("configuration", "hub", "modeling", "processing")
IMPORT = re.compile(r"^(\s*from )\S+( import .*)$")
# Users read the code that travels before they load a checkpoint: the limits keep it short.
MAX_FILES, MAX_LINES = 30, 10_400
PARTS = ("model", "processor", "config", "video_processor")


def part(name: str):
    model = tiny_model()
    processor = tiny_processor(model.config)
    parts = (model, processor, model.config, processor.video_processor)
    return dict(zip(PARTS, parts, strict=True))[name]


def source_of(name: str) -> Path:
    (path,) = [path for folder in TRAVELLING for path in (ROOT / folder).glob(name)]
    return path


# -- The set of files


def test_what_travels_is_what_the_classes_need():
    """All modules of the three folders of the model, the two modules of hub/ that they import, and none of the trainer."""
    names = {path.name for folder in TRAVELLING[:1] + TRAVELLING[2:] for path in (ROOT / folder).glob("*.py")}
    assert code_files().keys() == {*names, "hub_code.py", "pushed_model.py"}


def test_little_travels():
    texts = [content.decode() for content in code_files().values()]
    assert len(texts) <= MAX_FILES
    assert sum(len(text.splitlines()) for text in texts) <= MAX_LINES
    third_party = {
        name.split(".")[0]
        for text in texts
        for node in ast.walk(ast.parse(text))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
        )
        if name
    }
    assert not third_party & {"trl", "datasets", "accelerate", "peft", "yaml"}


@pytest.mark.parametrize("name", PARTS)
def test_each_class_saved_alone_carries_all_files(name, tmp_path):
    part(name).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.py")} == code_files()


def test_only_the_main_process_writes_code(tmp_path):
    tiny_model().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.py"))


# -- The text of the files


@pytest.mark.parametrize("name", code_files())
def test_nothing_changes_but_where_own_imports_lead(name):
    before, after = source_of(name).read_text().splitlines(), code_files()[name].decode().splitlines()
    if name == "hub_code.py":
        block = after[len(before) :]
        assert block[2].startswith("if False:") and len(block) == 3 + len(set(AUTO_MAP.values()))
        after = after[: len(before)]
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        if old != new:
            assert IMPORT.sub(r"\1\2", old) == IMPORT.sub(r"\1\2", new)
            assert re.match(r"\s*from \.\w+ import ", new)


def test_transformers_and_python_see_the_same_imports_of_files_that_are_there(tmp_path):
    """transformers reads imports as text, those in docstrings too."""
    write_code(tmp_path)
    for path in tmp_path.glob("*.py"):
        text = path.read_text()
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.level]
        parsed = {node.module for node in nodes}
        read = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, re.MULTILINE))
        assert parsed == read == set(hub_code.modules_imported_by(text))
        assert all((tmp_path / f"{module}.py").is_file() for module in parsed)


@pytest.mark.parametrize("entry", sorted({reference.partition(".")[0] for reference in AUTO_MAP.values()}))
def test_transformers_fetches_every_file_with_any_class(entry, tmp_path):
    write_code(tmp_path)
    found = {Path(file).name for file in get_relative_import_files(tmp_path / f"{entry}.py")}
    assert found | {f"{entry}.py"} == code_files().keys()


def test_the_flat_form_of_the_flat_form_is_itself(tmp_path):
    write_code(tmp_path / "first")
    code = """
        import importlib, json, sys
        sys.path.insert(0, sys.argv[1])
        import types
        package = types.ModuleType("flat"); package.__path__ = [sys.argv[1]]
        sys.modules["flat"] = package
        hub_code = importlib.import_module("flat.hub_code")
        from pathlib import Path
        hub_code.write_code(Path(sys.argv[2]))
        print(json.dumps(hub_code._IS_FLAT))
    """
    assert run_elsewhere(code, tmp_path / "first", tmp_path / "second", cwd=tmp_path) is True
    again = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert again == code_files()


# -- Classes of users


HEAD = """
import torch
{helper}
from {package}.autoregressive_reconstruction import AutoregressiveReconstructionModule
from {package}.modeling_llava_next_ar import LlavaNextARForConditionalGeneration


class OwnHead(AutoregressiveReconstructionModule):
    def patch_loss(self, predictions, targets):
        return FACTOR * super().patch_loss(predictions, targets)


class OwnModel(LlavaNextARForConditionalGeneration):
    head_class = OwnHead
"""
ABSOLUTE = "llava_next_ar.modeling"


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    """Write a user's package, and return a function that imports a module of it."""
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    folder = tmp_path / "src" / "own_package"
    folder.mkdir(parents=True)
    (folder / "own_helper.py").write_text("FACTOR = 3.0\n")

    def write(text: str, name: str = "own_model"):
        (folder / f"{name}.py").write_text(text)
        for module in [name for name in sys.modules if name.startswith("own_package")]:
            del sys.modules[module]
        return __import__(f"own_package.{name}", fromlist=["OwnModel"])

    yield write
    for module in [name for name in sys.modules if name.startswith("own_package")]:
        del sys.modules[module]


def build(model_class):
    torch.manual_seed(0)
    return model_class(tiny_model().config).eval()


@pytest.mark.parametrize("registered", [False, True])
def test_a_class_of_a_users_own_package_travels_with_its_helper(own_package, tmp_path, registered):
    """`register_for_auto_class` is the documented way, and must not enable transformers' own copy of files."""
    text = HEAD.format(helper="from .own_helper import FACTOR", package=ABSOLUTE)
    model_class = own_package(text).OwnModel
    if registered:
        model_class.register_for_auto_class("AutoModelForImageTextToText")
    model = build(model_class)
    model.save_pretrained(tmp_path / "saved")
    saved = {path.name for path in (tmp_path / "saved").glob("*.py")}
    assert saved == {*code_files(), "own_model.py", "own_helper.py"}
    assert "from .modeling_llava_next_ar import" in (tmp_path / "saved" / "own_model.py").read_text()
    code = """
        import json, sys
        from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
        for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            model = auto_class.from_pretrained(sys.argv[1], trust_remote_code=True)
            assert type(model).__name__ == "OwnModel"
        model.save_pretrained(sys.argv[2])
        print(json.dumps(sum(p.double().sum().item() for p in model.parameters())))
    """
    total = run_elsewhere(code, tmp_path / "saved", tmp_path / "again", cwd=tmp_path)
    assert total == sum(parameter.double().sum().item() for parameter in model.parameters())
    for path in (tmp_path / "saved").glob("*.py"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_class_beside_a_checkpoint_may_import_either_way(tmp_path):
    """Without the package only the relative form loads; both are saved alike."""
    code = """
        import json, sys
        from pathlib import Path
        from transformers.dynamic_module_utils import get_class_from_dynamic_module
        model_class = get_class_from_dynamic_module("own_model.OwnModel", sys.argv[1])
        model = model_class(model_class.config_class.from_pretrained(sys.argv[1]))
        model.save_pretrained(sys.argv[2])
        print(json.dumps(sorted(path.name for path in Path(sys.argv[2]).glob("*.py"))))
    """
    tiny_model().config.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "own_model.py").write_text(HEAD.format(helper="FACTOR = 3.0", package=""))
    names = run_elsewhere(code, tmp_path / "base", tmp_path / "saved", cwd=tmp_path)
    assert names == sorted([*code_files(), "own_model.py"])


@pytest.mark.parametrize(
    "statement",
    [
        "import llava_next_ar.modeling.frame_masks",
        "from llava_next_ar.modeling import frame_masks",
        "from llava_next_ar import modeling",
        "from . import own_helper",
        "from .missing import name",
    ],
)
def test_imports_without_a_flat_form_are_named_before_anything_is_written(own_package, tmp_path, statement):
    text = HEAD.format(helper=f"FACTOR = 3.0\ndef later():\n    {statement}", package=ABSOLUTE)
    model = build(own_package(text).OwnModel)
    with pytest.raises(ValueError, match="own_model.py, line 5: .*import names from a module") as caught:
        model.save_pretrained(tmp_path / "saved")
    assert statement in str(caught.value)
    assert not (tmp_path / "saved").exists()


def test_two_files_of_one_name_are_an_error(own_package, tmp_path):
    text = HEAD.format(helper="FACTOR = 3.0", package=ABSOLUTE)
    model = build(own_package(text, name="frame_masks").OwnModel)
    with pytest.raises(
        ValueError, match=r"frame_masks\.py and .*frame_masks\.py would both be saved as frame_masks\.py"
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_class_without_a_file_is_an_error(tmp_path):
    model_class = type("Unsaved", (LlavaNextARForConditionalGeneration,), {"__module__": "__main__"})
    with pytest.raises(ValueError, match="Unsaved is defined in __main__, whose code cannot be saved"):
        build(model_class).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_failed_save_leaves_the_classes_as_they_were(tmp_path, monkeypatch):
    model = tiny_model()
    before = type(model)._auto_class, type(model.config)._auto_class
    monkeypatch.setattr(type(model.generation_config), "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "saved")
    assert (type(model)._auto_class, type(model.config)._auto_class) == before
    assert type(model).is_remote_code()


# -- Older checkpoints


def test_an_adapter_of_an_older_checkpoint_gets_its_code_by_transformers_own_copying(tmp_path):
    """Classes of a release before `save_code`: flat files, and a block that imports all of them."""
    from llava_next_ar.training.hub_trainer import HubTrainer

    copied = []

    class Base:
        _auto_class = "AutoModelForImageTextToText"

    class Adapted:
        def get_base_model(self):
            return Base()

    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "ann/model"}))
    trainer = HubTrainer.__new__(HubTrainer)
    trainer.model = Adapted()
    module = sys.modules[HubTrainer.__module__]
    original, module.custom_object_save = module.custom_object_save, lambda base, folder: copied.append(folder)
    try:
        trainer._complete_adapter(tmp_path / "adapter_config.json")
    finally:
        module.custom_object_save = original
    assert copied == [tmp_path]


def test_saving_over_a_folder_of_an_older_release_leaves_files_of_the_user(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    (tmp_path / "frame_masks.py").write_text("old\n")
    tiny_model().save_pretrained(tmp_path)
    assert (tmp_path / "mine.py").read_text() == "x = 1\n"
    assert (tmp_path / "frame_masks.py").read_bytes() == code_files()["frame_masks.py"]
    shutil.rmtree(tmp_path)
