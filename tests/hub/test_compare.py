"""Comparing the code of a checkpoint with that of a release: the auditor's command."""

from pathlib import Path

import pytest

from llava_next_ar.hub import compare
from llava_next_ar.hub.hub_code import code_files, write_code


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


def test_the_code_of_an_earlier_release_is_told_from_a_changed_one(folder, monkeypatch, capsys):
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


def test_a_folder_without_code_is_an_error(tmp_path, capsys):
    code, text = outcome(capsys, tmp_path)
    assert code == 2 and f"{tmp_path} holds no code" in text
