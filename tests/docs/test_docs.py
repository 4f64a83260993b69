"""The code in README.md, docs/ and model_card.md runs as it stands; only checkpoints and clips are tiny stand-ins.

model_card.md is a template: its code is that of the card of a checkpoint.

A Python block whose first line is the comment `# some/path.py` is that file. Commands are parsed by the parsers of the
programs; a few are run.
"""

import argparse
import contextlib
import json
import pkgutil
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from documents import DOCUMENTS, PAGES, ROOT, code_blocks, commands, read
from PIL import Image
from tiny import tiny_model, tiny_onevision
from tiny_processor import tiny_processor

from llava_next_ar.experiments.temporal.synthetic_clips import write_dataset
from llava_next_ar.scripts import command
from llava_next_ar.serving.space import push as space_push
from llava_next_ar.training.data import LlavaVideoDataset
from llava_next_ar.training.recipes import flatten_recipe, parse_arguments

# Programs of others, whose options are not checked.
OTHER_PROGRAMS = {"accelerate", "pip", "hf", "lmms-eval", "source", "git", "python", "curl", "transformers", "vllm"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder that looks like the one after `make demo`, and stand-ins for what the documents take from the Hub."""
    folder = tmp_path_factory.mktemp("docs")
    write_dataset(folder / "demo_output" / "clips", num_train=16, num_test=16, size=48, num_frames=8, progress=False)
    model = tiny_model()
    processor = tiny_processor(model.config, num_frames=4)
    for name in ("demo_output/model", "demo_output/base", "user/llava-next-ar"):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    base = folder / "llava-hf" / "llava-onevision-qwen2-0.5b-ov-hf"
    tiny_onevision().save_pretrained(base)
    processor.tokenizer.save_pretrained(base)
    clips = sorted((folder / "demo_output/clips/videos").glob("train_*.mp4"))
    shutil.copy(clips[0], folder / "clip.mp4")
    (folder / "my-videos").mkdir()
    for name, clip in zip(("one", "two", "three", "four", "five"), clips, strict=False):
        shutil.copy(clip, folder / "my-videos" / f"{name}.mp4")
    (folder / "my-videos" / "train.json").write_text(code_blocks("docs/fine-tune.md", "json")[0])
    return folder


@pytest.fixture
def workplace(made, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WITH_PYTHON = [document for document in DOCUMENTS if code_blocks(document, "python")]


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_blocks_run_in_order(document, workplace, capsys):
    for line in commands(document):  # what a block reads that a command before it wrote
        if line.startswith("llava-next-ar convert demo_output/model"):
            command.main(shlex.split(line)[1:])
    namespace: dict = {"__name__": "__main__"}
    for number, block in enumerate(code_blocks(document, "python", workplace / "user" / "llava-next-ar")):
        if named := re.match(r"# (\S+\.py)\n", block):
            Path(named[1]).write_text(block)
            continue
        exec(compile(block, f"{document}, block {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert re.search(r"\d", printed) or "MyModel" in printed
    if document == "docs/extend.md":
        assert "MyModel MyHead" in printed


def test_the_notebook_runs_and_holds_its_outputs(workplace, capsys):
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    namespace: dict = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"notebook, cell {number}", "exec"), namespace)
        outputs = [output for output in cell["outputs"] if output["output_type"] == "stream"]
        texts = "".join(text for output in outputs for text in output["text"]), capsys.readouterr().out
        assert all(texts), number
        # the same words as in the outputs: numbers and answers are those of the stand-ins
        recorded, printed = (set(re.findall("[A-Za-z_]{4,}", text)) for text in texts)
        assert recorded - printed <= {"down", "blue"}, number
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])


@pytest.mark.parametrize("page", [page for page in PAGES if code_blocks(page, "json")])
def test_entries_of_a_data_set_are_read(page, workplace):
    processor = tiny_processor(tiny_model().config, num_frames=4)
    for number, block in enumerate(code_blocks(page, "json")):
        entries = json.loads(block)
        for name in set(re.findall(r'"([\w-]+\.mp4)"', block)):
            shutil.copy("clip.mp4", name)
        for name in set(re.findall(r'"([\w-]+\.jpg)"', block)):
            Image.new("RGB", (32, 32)).save(name)
        Path(f"{number}.json").write_text(block)
        dataset = LlavaVideoDataset(f"{number}.json", processor)
        assert len(dataset) == len(entries)
        dataset.check()
        for entry, sample in zip(entries, dataset, strict=True):
            has_answer = "conversations" in entry or "messages" in entry
            assert bool((sample["labels"] != -100).any()) == has_answer


@pytest.mark.parametrize("page", [page for page in PAGES if code_blocks(page, "yaml")])
def test_recipes_have_keys_that_exist(page):
    for block in code_blocks(page, "yaml"):
        assert flatten_recipe(yaml.safe_load(block), page)


# --- commands --------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """A program has read its command line."""


def parse(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line of a sub-command, by its own parser, without running it."""
    if name in ("train", "check"):
        parse_arguments(words)
        return
    if name == "push" and "--space" in words:
        space_push.make_parser().parse_args(words)
        return
    parse_program(f"llava_next_ar.{command.COMMANDS[name][0]}", words, monkeypatch)


def parse_program(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse_args = argparse.ArgumentParser.parse_args

    def only_parse(self, args=None, namespace=None):
        raise Parsed(parse_args(self, args, namespace))

    with monkeypatch.context() as patch, contextlib.suppress(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        pkgutil.resolve_name(name)(words)
        raise AssertionError(f"{name} did not parse {words}")


def split_launch(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words that a launched program gets."""
    seen: list[argparse.Namespace] = []
    with monkeypatch.context() as patch:
        patch.setattr("accelerate.commands.launch.launch_command", seen.append)
        command.main([name, *words])
        sys.argv[1:] = []
    return seen[0].training_script_args


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_have_options_and_files_that_exist(document, monkeypatch):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    extras = re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    monkeypatch.setattr(sys, "argv", ["llava-next-ar"])
    for line in commands(document):
        program, *words = shlex.split(line, comments=True)
        if "llava_next_ar.scripts.train" in words:  # accelerate launch or torchrun
            program, words = "llava-next-ar", ["train", *words[words.index("llava_next_ar.scripts.train") + 1 :]]
        if program == "llava-next-ar":
            name, *words = words
            assert name in command.COMMANDS, line
            if name == "merge" and not (ROOT / "training" / "merge.py").is_file():
                continue
            if "--launch" in words:
                words = split_launch(name, words, monkeypatch)
            parse(name, words, monkeypatch)
        elif program == "python" and words[0].startswith("scripts/"):
            (target,) = re.findall(r'run\("([\w.]+:main)"\)', (ROOT / words[0]).read_text())
            parse_program(f"llava_next_ar.{target}", words[1:], monkeypatch)
        elif program == "make":
            assert {word for word in words if "=" not in word} <= set(targets), line
        else:
            assert program in OTHER_PROGRAMS, line
            for extra in re.findall(r"\[([\w,]+)\]", line if program == "pip" else ""):
                assert set(extra.split(",")) <= set(extras), line
        for word in words:
            if word.startswith("scripts/"):
                assert (ROOT / word).exists(), f"{word} in: {line}"


def test_the_first_command_of_the_readme_answers(workplace, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llava-next-ar"])
    (line,) = [line for line in commands("README.md") if line.startswith("llava-next-ar ask")]
    command.main(shlex.split(line)[1:])
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert ["frame", "seconds", "surprise", "copying"] in rows and [row[0] for row in rows[-3:]] == ["1", "2", "3"]


@pytest.mark.slow
def test_the_example_leads_from_five_files_to_an_answer(workplace, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llava-next-ar"])
    lines = [line for line in commands("docs/fine-tune.md") if line.startswith("llava-next-ar")][:3]
    assert [line.split()[1] for line in lines] == ["check", "train", "ask"]
    with pytest.raises(SystemExit) as ended:
        command.main(shlex.split(lines[0])[1:])
    assert not ended.value.code
    report = capsys.readouterr().out
    assert "5 read, of which" in report and "memory per device" in report
    command.main(shlex.split(lines[1])[1:])
    assert "autoregressive_module.change.weight" in (
        Path("outputs/run/model.safetensors").read_bytes()[:100_000]
    ).decode(errors="replace")
    capsys.readouterr()
    command.main(shlex.split(lines[2])[1:])
    assert "surprise" in capsys.readouterr().out


# --- names and links -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_and_links_exist(document):
    text = re.sub(r"^ *```.*?^ *```", "", read(document), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`([\w/]+/[\w/.-]+\.(?:py|md|yaml|json))`", text):
        if not name.startswith(("my-", "outputs/", "pictures/index", "demo_output/")):
            assert (ROOT / name).is_file(), f"{document} names {name}"
    folder = (ROOT / document).parent
    for link in re.findall(r"\]\(([^)]+)\)", text):
        target, _, anchor = link.partition("#")
        if "://" in link or "{" in link or document == "model_card.md":
            continue
        path = folder / target if target else ROOT / document
        assert path.exists(), f"{document} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link


def test_every_page_is_linked_from_the_readme():
    text = read("README.md")
    assert len(text.splitlines()) <= 150
    assert [page for page in PAGES if page.startswith("docs/") and f"({page})" not in text] == []
