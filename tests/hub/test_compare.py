"""Comparison of the code of a checkpoint with that of a release (`llava-next-ar compare`)."""

import sys
from pathlib import Path

import pytest

from llava_next_ar.hub import compare
from llava_next_ar.hub.hub_code import code_files, write_code
from llava_next_ar.scripts import command


@pytest.fixture
def folder(tmp_path) -> Path:
    write_code(tmp_path / "saved")
    return tmp_path / "saved"


def outcome(capsys, *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(argument) for argument in arguments])
    return stopped.value.code, "".join(capsys.readouterr())


def test_a_fresh_save_is_exactly_this_release(folder, capsys):
    code, text = outcome(capsys, folder)
    assert code == 0
    assert (
        text.strip()
        == f"{len(code_files())} modules: exactly the code of llava-next-ar {compare.version(compare.DISTRIBUTION)}"
    )


def test_every_kind_of_difference_is_named(folder, capsys):
    with open(folder / "frame_masks.py", "a") as file:
        file.write("import os  # what a stranger added\n")
    (folder / "loss_functions.py").unlink()
    (folder / "my_head.py").write_text("x = 1\n")
    code, text = outcome(capsys, folder, "--diff")
    assert code == 1
    for line in ("different  frame_masks.py", "missing    loss_functions.py", "added      my_head.py"):
        assert line in text.splitlines()
    assert "+import os  # what a stranger added" in text


def test_one_changed_byte_is_a_difference(folder, capsys):
    path = folder / "hub_code.py"
    path.write_bytes(path.read_bytes().replace(b"Apache", b"apache", 1))
    assert outcome(capsys, folder)[0] == 1


def test_the_code_of_an_earlier_release_is_recognized(folder, monkeypatch, capsys):
    earlier = {name: content + b"# 0.0.1\n" for name, content in code_files().items()}
    releases = {**compare.recorded_releases(), "0.0.1": compare._hashes(earlier)}
    monkeypatch.setattr(compare, "recorded_releases", lambda: releases)
    for name, content in earlier.items():
        (folder / name).write_bytes(content)
    code, text = outcome(capsys, folder)
    assert (code, text.split()[-1]) == (0, "0.0.1")


def test_the_first_release_is_recorded():
    first = compare.recorded_releases()["0.1.0"]
    assert len(first) == 39 and {"hub_code.py", "hub_files.py", "training_llava_next_ar.py"} <= first.keys()


@pytest.mark.parametrize("name", ["./none", "none/of/these", "/no/such/folder", "no such folder"])
def test_a_folder_that_does_not_exist_is_named(name, tmp_path, monkeypatch, capsys):
    """The error of the Hub's client, "Repo id must be ...", is about something else."""
    monkeypatch.chdir(tmp_path)
    assert outcome(capsys, name) == (2, f"pytest: no such folder: {name}\n".replace("pytest", Path(sys.argv[0]).name))


def test_a_file_is_not_a_folder(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    code, text = outcome(capsys, path)
    assert code == 2 and f"{path} is a file, expected a folder or a Hub id" in text


COMMANDS_ON_FOLDERS = {
    "ask": ("{folder}", "What?"),
    "check": ("--model", "{folder}", "--train_data", "train.json", "--output_dir", "out"),
    "consolidate": ("{folder}", "out"),
    "convert": ("{folder}", "out"),
    "evaluate": ("--model", "{folder}", "--data", "test.json"),
    "merge": ("{folder}", "out"),
    "push": ("{folder}", "ann/model", "--dry-run"),
    "visualize": ("--model", "{folder}", "--video", "clip.mp4", "--output", "out"),
}


@pytest.mark.parametrize("name", COMMANDS_ON_FOLDERS)
def test_commands_name_a_folder_that_does_not_exist(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for file in ("train.json", "test.json"):
        (tmp_path / file).write_text(
            '[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]'
        )
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        command.main([name, *(word.format(folder="runs/none/model") for word in COMMANDS_ON_FOLDERS[name])])
    text = "".join(capsys.readouterr()) + str(ended.value.code)
    assert "no such folder: runs/none/model" in text and "Repo id" not in text


def test_a_folder_without_code_is_an_error(tmp_path, capsys):
    code, text = outcome(capsys, tmp_path)
    assert code == 2 and f"{tmp_path} holds no code" in text
