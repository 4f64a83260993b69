"""`llava-next-ar push --endpoint`: the files of an Inference Endpoint beside a checkpoint."""

import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from packaging.requirements import Requirement
from test_push_to_hub import folder, hub, push, saved  # noqa: F401

from llava_next_ar.hub import compare
from llava_next_ar.hub.push import add_endpoint
from llava_next_ar.hub.push_targets import ENDPOINT_FILES, SERVING, endpoint_files, requirements

HANDLER = (SERVING / "endpoint" / "handler.py").read_bytes()


def listed(printed: str, word: str) -> list[str]:
    return re.findall(rf"^{word} +[\d,]*  (\S+)", printed, re.MULTILINE)


def test_the_files_are_listed_then_pushed_and_stay(hub, folder, capsys):  # noqa: F811
    push(folder, "ann/model", "--endpoint", "--dry-run")
    assert {*ENDPOINT_FILES} <= {*listed(capsys.readouterr().out, "upload")}
    assert not hub.repositories
    push(folder, "ann/model", "--endpoint")
    files = hub.repo("ann/model").files()
    assert files["handler.py"] == HANDLER and len(hub.repo("ann/model").titles()) == 3  # initial, push, card
    capsys.readouterr()
    push(folder, "ann/model")
    printed = capsys.readouterr().out
    assert not {*ENDPOINT_FILES} & {*listed(printed, "upload"), *listed(printed, "delete")}
    assert printed.count("stays on the Hub, of an earlier push with --endpoint") == 2
    assert {*ENDPOINT_FILES} <= hub.repo("ann/model").files().keys()


def test_a_push_with_the_option_renews_the_files(hub, folder):  # noqa: F811
    push(folder, "ann/model", "--endpoint")
    old = HANDLER + b"# of an older release\n"
    HfApi().upload_file(path_or_fileobj=old, path_in_repo="handler.py", repo_id="ann/model")
    push(folder, "ann/model", "--endpoint")
    assert hub.repo("ann/model").files()["handler.py"] == HANDLER


@pytest.mark.parametrize("name", ENDPOINT_FILES)
@pytest.mark.parametrize("where", ["folder", "Hub"])
def test_a_file_of_the_owner_is_kept(hub, folder, name, where):  # noqa: F811
    own = b"# my own\n"
    push(folder, "ann/model")
    if where == "folder":
        (folder / name).write_bytes(own)
    else:
        HfApi().upload_file(path_or_fileobj=own, path_in_repo=name, repo_id="ann/model")
    before = hub.repo("ann/model").files()
    with pytest.raises(
        SystemExit, match=f"{folder if where == 'folder' else 'the repository'} holds {name}, not written by"
    ):
        push(folder, "ann/model", "--endpoint")
    assert hub.repo("ann/model").files() == before
    push(folder, "ann/model")
    assert hub.repo("ann/model").files().get(name) == (None if where == "folder" else own)


def test_a_downloaded_folder_is_pushed_again(hub, folder, capsys):  # noqa: F811
    """It holds the files of the endpoint, which only `--endpoint` pushes."""
    for name, content in endpoint_files().items():
        (folder / name).write_bytes(content)
    push(folder, "ann/model")
    assert capsys.readouterr().out.count("of an Inference Endpoint; --endpoint pushes it") == 2
    push(folder, "ann/model", "--endpoint")
    printed = capsys.readouterr().out
    assert not {*ENDPOINT_FILES} & {*listed(printed, "left out")}


def test_requirements_are_the_minimum_versions_of_the_package():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = {str(Requirement(line)) for line in project["dependencies"]}
    assert {*requirements()} == wanted
    peft = next(line for line in project["optional-dependencies"]["train"] if line.startswith("peft"))
    text = endpoint_files("peft")["requirements.txt"].decode()
    assert {line for line in text.splitlines() if not line.startswith("#")} == {*wanted, peft}


def test_an_adapter_needs_peft(tmp_path):
    for files in ({"adapter_config.json": b"{}"}, {"config.json": b"{}"}):
        pushed: dict = dict(files)
        add_endpoint(tmp_path, pushed, {}, {}, True)
        assert ("\npeft>=" in pushed["requirements.txt"].decode()) == ("adapter_config.json" in files)


def test_the_auditor_recognizes_the_handler(folder, capsys):  # noqa: F811
    (folder / "notes.py").unlink()
    for content, status in ((HANDLER, 0), (HANDLER + b"import os\n", 1)):
        (folder / "handler.py").write_bytes(content)
        with pytest.raises(SystemExit) as ended:
            compare.main([str(folder)])
        assert ended.value.code == status
    assert "different  handler.py" in capsys.readouterr().out
