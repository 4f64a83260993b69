"""The app as a Space: its files, the push to a local Hub, and the pushed folder in a process without this package."""

import contextlib
import io
import os
import re
import sys
import time
from pathlib import Path

import processes
import pytest
import yaml
from card_metadata import check_card
from demo_folder import make_changed_checkpoint, make_demo_folder
from gradio_client import Client, handle_file
from hub_server import HubServer, use_hub
from huggingface_hub import HfApi, constants
from packaging.requirements import Requirement

from llava_next_ar.evaluation.measures import load_checkpoint
from llava_next_ar.scripts import command
from llava_next_ar.serving.space import push
from llava_next_ar.serving.space.app import EXAMPLES

QUESTION = "What is the color of the shape?"
# Runs a Space as the Hub does, after removing the finders of an editable install.
RUN = """
import importlib.util, runpy, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in f"{f}{getattr(f, '__module__', '')}".lower()]
sys.path_hooks = [hook for hook in sys.path_hooks if "editable" not in f"{hook}".lower()]
sys.path_importer_cache.clear()
sys.path = [entry for entry in sys.path if entry and "editable" not in entry]
assert importlib.util.find_spec("llava_next_ar") is None, importlib.util.find_spec("llava_next_ar")
sys.path.insert(0, "")  # the folder of app.py
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = make_demo_folder(tmp_path_factory.mktemp("space"))
    make_changed_checkpoint(folder)
    return folder / "changed"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer(check_card=check_card) as server:
        server.add_user("ann", "hf_ann")
        use_hub(monkeypatch, server, tmp_path / "cache", "hf_ann")
        yield server


def run(*words: object) -> None:
    """`llava-next-ar push`, as the console command runs it."""
    before = sys.argv[0]
    try:
        command.main(["push", *map(str, words)])
    finally:
        sys.argv[0] = before


def exit_of(*words: object) -> str:
    """The one line of an error, with the exit status 2."""
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(io.StringIO()) as stderr:
        run(*words)
    assert stopped.value.code == 2
    return stderr.getvalue()


def front_matter(readme: bytes) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", readme.decode(), re.DOTALL)[1])


def make_model(hub: HubServer, private: bool = False) -> str:
    """A repository of the name of a model; returns its newest commit."""
    api = HfApi(endpoint=hub.endpoint, token="hf_ann")
    api.create_repo("ann/model", private=private)
    return api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="ann/model").oid


def test_a_push_makes_a_space_for_a_model_of_the_hub(hub, capsys):
    commit = make_model(hub)
    run("ann/model", "--space", "ann/app", "--dry-run")
    printed = capsys.readouterr().out
    listed = set(re.findall(r"^upload +[\d,]+  (.*)$", printed, re.MULTILINE))
    assert "dry run: nothing was sent" in printed and ("space", "ann/app") not in hub.repositories
    run("ann/model", "--space", "ann/app", "--private")
    space = hub.repo("ann/app", "space")
    files = space.files()
    assert set(files) == listed | {".gitattributes"}
    assert space.private and space.sdk == "gradio" and space.hardware is None
    assert space.variables == {"MODEL": "ann/model", "REVISION": commit}
    facts = front_matter(files["README.md"])
    assert (facts["sdk"], facts["app_file"], facts["models"]) == ("gradio", "app.py", ["ann/model"])
    assert facts["suggested_hardware"] == "zero-a10g" and facts["python_version"] == "3.10.13"
    assert re.fullmatch(r"6\.\d+\.\d+", facts["sdk_version"]) and len(facts["short_description"]) <= 60
    lines = [line for line in files["requirements.txt"].decode().splitlines() if not line.startswith("#")]
    names = {Requirement(line).name for line in lines}
    assert names >= {"torch", "transformers", "av", "accelerate", "matplotlib", "peft", "pillow"}
    assert not names & {"gradio", "llava-next-ar", "trl", "pytest"}
    program = files["app.py"].decode()
    assert program.index("import spaces") < program.index("llava_next_ar")
    assert {name for name in files if name.endswith(".mp4")} == {
        f"llava_next_ar/serving/space/examples/{clip.name}" for clip in EXAMPLES.glob("*.mp4")
    }
    folders = {name.split("/")[1] for name in files if name.startswith("llava_next_ar/") and name.count("/") > 1}
    assert not folders & {"experiments", "scripts", "conversion", "tests"}


def test_a_second_push_replaces_its_own_files_and_keeps_others(hub, capsys):
    make_model(hub)
    run("ann/model", "--space", "ann/app")
    api = HfApi(endpoint=hub.endpoint, token="hf_ann")
    where = {"repo_id": "ann/app", "repo_type": "space"}
    for name, text in (
        ("llava_next_ar/modeling/gone.py", "old = 1"),
        ("notes.txt", "mine"),
        ("README.md", "---\nsdk: gradio\n---\nBy hand."),
    ):
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo=name, **where)
    capsys.readouterr()
    run("ann/model", "--space", "ann/app", "--revision", "main", "--trust-remote-code")
    printed = capsys.readouterr().out
    assert "gone.py (of an older push)" in printed and "README.md (the Space's was written by hand)" in printed
    space = hub.repo("ann/app", "space")
    assert "llava_next_ar/modeling/gone.py" not in space.files() and space.files()["notes.txt"] == b"mine"
    assert b"By hand." in space.files()["README.md"]
    assert space.variables == {"MODEL": "ann/model", "REVISION": "main", "TRUST_REMOTE_CODE": "1"}


def test_the_readme_of_a_new_space_is_replaced(hub):
    """Spaces made on the Hub's page have one, and one that a person wrote stays."""
    make_model(hub)
    api = HfApi(endpoint=hub.endpoint, token="hf_ann")
    api.create_repo("ann/app", repo_type="space", space_sdk="gradio")
    text = "---\ntitle: App\nsdk: gradio\n---\n\nCheck out the configuration reference at https://x/spaces-config-reference\n"
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="ann/app", repo_type="space")
    run("ann/model", "--space", "ann/app", "--hardware", "t4-small")
    assert front_matter(hub.repo("ann/app", "space").files()["README.md"])["models"] == ["ann/model"]


def test_a_space_of_another_program_is_not_overwritten(hub):
    make_model(hub)
    api = HfApi(endpoint=hub.endpoint, token="hf_ann")
    api.create_repo("ann/app", repo_type="space", space_sdk="gradio")
    api.upload_file(path_or_fileobj=b"import x", path_in_repo="app.py", repo_id="ann/app", repo_type="space")
    assert "the Space ann/app holds app.py, not written by an earlier push" in exit_of(
        "ann/model", "--space", "ann/app"
    )
    assert hub.repo("ann/app", "space").files()["app.py"] == b"import x"
    assert "exists and is public" in exit_of("ann/model", "--space", "ann/app", "--private")


def test_errors_name_what_is_wrong(hub, capsys, monkeypatch):
    assert "the model ann/model is not on the Hub" in exit_of("ann/model", "--space", "ann/app")
    for words, message in (
        (("ann/model", "--space", "app"), "--space is 'app', expected user/name"),
        (("model", "--space", "ann/app"), "the model is 'model', expected user/name"),
        (("ann/model", "--space", "ann/app", "--branch", "x"), "unrecognized arguments: --branch x"),
        (("a", "b", "c", "--space", "ann/app"), "expected a model on the Hub, or a folder and a name"),
    ):
        assert message in exit_of(*words)
    make_model(hub, private=True)
    run("ann/model", "--space", "ann/app")
    assert "ann/model is private: set the secret HF_TOKEN" in capsys.readouterr().out
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in exit_of("ann/model", "--space", "ann/app")
    run("ann/model", "--space", "ann/app", "--dry-run")
    assert "only the local files are listed" in capsys.readouterr().out


def test_help_of_the_command_is_that_of_the_target(capsys):
    for words, expected in ((("--space", "x", "--help"), "user/name of the Space"), (("--help",), "--space user/app")):
        with pytest.raises(SystemExit) as stopped:
            run(*words)
        assert stopped.value.code == 0 and expected in capsys.readouterr().out


def test_a_pushed_space_runs_with_public_packages_alone(hub, model_folder, tmp_path, monkeypatch):
    """A folder goes to the Hub as a model, then its Space; its files run where this package cannot be imported."""
    run(model_folder, "ann/model", "--space", "ann/app", "--license", "apache-2.0")
    space = hub.repo("ann/app", "space")
    assert space.variables["REVISION"] in hub.repo("ann/model").commits
    home = tmp_path / "space"
    for name, content in space.files().items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)
    # The variables of the Space, and no cache of this process.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "TRANSFORMERS"))
    }
    environment |= space.variables | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    environment |= {
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with processes.Program([sys.executable, "-c", RUN], cwd=home, env=environment) as program:
        address = None
        for _ in range(2400):
            found = re.search(r"Running on local URL:\s+(\S+)", program.stdout)
            if found or program.process.poll() is not None:
                address = found and found[1]
                break
            time.sleep(0.1)
        assert address, program.stdout + program.stderr
        client = Client(address, verbose=False)
        clip = handle_file(str(EXAMPLES / "bounce.mp4"))
        answer = client.predict({"text": QUESTION, "files": [clip]}, max_new_tokens=4, api_name="/chat")
        numbers = client.predict(clip, api_name="/surprise")
    model, processor = load_checkpoint(str(model_folder))
    content = [{"type": "video", "path": str(EXAMPLES / "bounce.mp4")}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer == processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    (surprise,) = model.surprise(**inputs)
    assert [own["surprise"] for own in numbers["frames"]] == pytest.approx(surprise.frames.tolist(), rel=1e-4)


def test_the_modules_of_a_space_are_all_that_they_import():
    """Nothing that the pushed modules import is left out, whatever form the import has."""
    files = push.space_files("ann/app", "ann/model")
    pushed = {name for name in files if name.endswith(".py")}
    for name in pushed - {"app.py"}:
        for line in Path(files[name]).read_text(encoding="utf-8").splitlines():
            found = re.match(r"\s*from (\.+)([\w.]*) import (\w+)", line)
            if found:
                base = Path(name).parents[len(found[1]) - 1].joinpath(*filter(None, found[2].split(".")))
                assert {f"{base.as_posix()}.py", f"{base.as_posix()}/{found[3]}.py"} & pushed, (name, line)
