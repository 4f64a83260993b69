"""The code in README.md and model_card.md runs as it stands; only checkpoints and clips are tiny stand-ins.

model_card.md is a template: its code is that of the card of a checkpoint.

A Python block whose first line is the comment `# some/path.py` is that file.
"""

import re
import shlex
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, code_blocks, read
from tiny import tiny_model, tiny_onevision
from tiny_processor import tiny_processor

from llava_next_ar.experiments.temporal.synthetic_clips import write_dataset


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that looks like the one after `make demo`, and stand-ins for what the documents take from the Hub."""
    folder = tmp_path_factory.mktemp("docs")
    write_dataset(folder / "demo_output" / "clips", num_train=16, num_test=16, size=48, num_frames=8, progress=False)
    model = tiny_model()
    processor = tiny_processor(model.config, num_frames=4)
    for name in ("demo_output/model", "user/llava-next-ar"):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    base = folder / "llava-hf" / "llava-onevision-qwen2-0.5b-ov-hf"
    tiny_onevision().save_pretrained(base)
    processor.tokenizer.save_pretrained(base)
    (folder / "clip.mp4").write_bytes((folder / "demo_output/clips/videos/test_00000.mp4").read_bytes())
    return folder


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_run_in_order(document, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    namespace: dict = {"__name__": "__main__"}
    blocks = code_blocks(document, "python", workplace / "user" / "llava-next-ar")
    assert blocks
    for number, block in enumerate(blocks):
        if named := re.match(r"# (\S+\.py)\n", block):
            Path(named[1]).write_text(block)
            continue
        exec(compile(block, f"{document}, block {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "skill" in printed or re.search(r"-?\d\.\d+", printed)
    if document == "README.md":
        assert "MyModel MyHead" in printed


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_name_files_and_targets_that_exist(document):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for block in code_blocks(document, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert set(words[1:]) <= set(targets), line
            for word in words:
                if word.startswith("scripts/"):
                    assert (ROOT / word).exists(), f"{word} in: {line}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_of_the_repository_exist(document):
    text = re.sub(r"^```.*?^```", "", read(document), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`([\w/]+\.(?:py|md|yaml))`", text):
        assert (ROOT / name).is_file(), f"{document} names {name}"
