"""`llava-next-ar push`, the model card and the trainer's pushes, in this process and against a local Hub."""

import json
import re
import shutil
import sys
from concurrent.futures import Future
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from card_metadata import check_card
from hub_server import HubServer, use_hub
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from test_hub_card import RESULTS
from tiny import tiny_model
from tiny_processor import tiny_processor
from training_runs import make_samples
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments
from video_clips import write_clip

from llava_next_ar.hub import model_card as hub_card
from llava_next_ar.hub import push as push_to_hub
from llava_next_ar.hub.hub_folder import read_hub_folder
from llava_next_ar.hub.pushed_model import commit_files, hub_id, stale_files
from llava_next_ar.training import run as train
from llava_next_ar.training.trainer import AutoregressiveTrainer, LlavaVideoCollator

TOKEN = "hf_ann"
SLOW = pytest.mark.slow
CONFIGS = Path(push_to_hub.__file__).parents[1] / "scripts" / "configs"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub for the client of this process, with ann's token and without waits between attempts."""
    with HubServer(check_card=check_card) as server:
        server.add_user("ann", TOKEN)
        server.add_user("bob", "hf_bob")
        server.add_user("ann", "hf_reader", can_write=False)
        use_hub(monkeypatch, server, tmp_path / "cache", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model with its processor, beside files of a training."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    model = tiny_model()
    model.save_pretrained(folder)
    tiny_processor(model.config, num_frames=4).save_pretrained(folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json", "training_args.bin", ".env"):
        (folder / name).write_text("secret")
    for name in ("runs/one/events.out.tfevents.1", "checkpoint-5/model.safetensors", "data/clip.mp4", "notes.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def push(*arguments: object) -> huggingface_hub.CommitInfo | None:
    return push_to_hub.main([str(argument) for argument in arguments])


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_what_would_happen_and_sends_nothing(hub, folder, capsys):
    assert push(folder, "ann/model", "--dry-run") is None
    printed = capsys.readouterr().out
    uploaded = set(re.findall(r"^upload +[\d,]+  (.*)$", printed, re.MULTILINE))
    assert uploaded == {path.name for path in folder.glob("*.py")} - {"notes.py"} | {
        *("config.json", "generation_config.json", "model.safetensors", "processor_config.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    left_out = dict(re.findall(r"^left out +(\S+) \((.*)\)$", printed, re.MULTILINE))
    assert left_out == {
        **dict.fromkeys(("optimizer.pt", "scheduler.pt", "rng_state_0.pth"), "state of the training"),
        **dict.fromkeys(("trainer_state.json", "training_args.bin"), "state of the training"),
        "runs/": "1 file: a log",
        "checkpoint-5/": "1 file: an earlier checkpoint",
        "data/": "1 file: not on the list of what a model needs",
        ".env": "not on the list of what a model needs",
        "notes.py": "not a module of the model's code",
    }
    assert not hub.repositories
    assert {request.method for request in hub.log} == {"GET"}
    # The push does what the dry run lists.
    push(folder, "ann/model", "--license", "apache-2.0")
    assert set(hub.repo("ann/model").files()) == uploaded | {".gitattributes"}


def test_a_folder_that_is_left_out_takes_one_line():
    names = {f"checkpoint-10/{number}": "an earlier checkpoint" for number in range(220)}
    names |= {"runs/a/b.log": "a log", "runs/c.bin": "a pickle", "x.log": "a log"}
    lines = push_to_hub.describe({}, [], names).splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines[:-1]] == [
        "checkpoint-10/ (220 files: an earlier checkpoint)",
        "runs/ (1 file: a log; 1 file: a pickle)",
        "x.log (a log)",
    ]


@pytest.mark.parametrize("offline", [True, False])
def test_a_dry_run_without_a_hub_lists_the_local_files(folder, offline, monkeypatch, capsys):
    """Offline mode, and a host that does not answer: the local files are listed in both."""
    if not offline:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    push(folder, "ann/model", "--dry-run")
    printed = capsys.readouterr().out
    assert re.search(r"^upload +[\d,]+  model.safetensors$", printed, re.MULTILINE)
    assert "cannot be reached" in printed and "only the local files are listed" in printed
    assert "dry run: nothing was sent" in printed
    monkeypatch.setenv("HF_TOKEN", "hf_some")
    with pytest.raises(SystemExit, match="the Hub at http://127.0.0.1:9 cannot be reached"):
        push(folder, "ann/model")


def test_a_film_strip_is_pushed_and_shown(hub, folder, tmp_path):
    picture = tmp_path / "of a clip.png"
    Image.new("RGB", (4, 4)).save(picture)
    push(folder, "ann/model", "--film", picture)
    files = hub.repo("ann/model").files()
    assert files["film.png"] == picture.read_bytes()
    assert "](film.png)" in files["README.md"].decode()
    (folder / "film.png").write_bytes(picture.read_bytes())
    assert "](film.png)" in str(hub_card.build_card(folder, "ann/model"))
    with pytest.raises(SystemExit, match="expected a PNG file"):
        push(folder, "ann/model", "--film", folder / "config.json")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", "model.safetensors (the weights, or shards with model.safetensors.index.json)"),
        ("processor_config.json", "processor_config.json (the processor;"),
        ("frame_masks.py", "frame_masks.py (imported by "),
        ("modeling_llava_next_ar.py", "modeling_llava_next_ar.py (imported by "),
        ("config.json", "config.json (the model's configuration)"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_sent(hub, folder, missing, message):
    (folder / missing).unlink()
    with pytest.raises(SystemExit) as caught:
        push(folder, "ann/model")
    assert str(caught.value).partition(": ")[2].startswith(f"{folder} is not complete; it lacks ")
    assert message in str(caught.value)
    assert not hub.log


def test_damaged_and_ambiguous_weights_are_refused(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        read_hub_folder(folder)
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="90KB")
    shard = sorted(read_hub_folder(folder).files.keys() - {"model.safetensors.index.json"})
    shard = next(name for name in shard if name.startswith("model-"))
    (folder / shard).rename(folder / "moved")
    with pytest.raises(ValueError, match=rf"{shard} \(named by model.safetensors.index.json\)"):
        read_hub_folder(folder)
    (folder / "moved").rename(folder / shard)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="holds model.safetensors and shards"):
        read_hub_folder(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a model and an adapter: delete adapter_config.json or"):
        read_hub_folder(folder)


@pytest.mark.parametrize("sizes", [("50GB", "90KB"), ("90KB", "50GB"), ("40KB", "90KB")])
def test_a_save_over_an_older_one_leaves_no_weights_of_it(tmp_path, sizes):
    """transformers leaves `model.safetensors` beside new shards, and loads it."""
    for seed, size in enumerate(sizes):
        model = tiny_model(seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=size)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    weights = {path.name for path in tmp_path.glob("model*.safetensors*")}
    index = tmp_path / "model.safetensors.index.json"
    expected = (
        {index.name, *json.loads(index.read_text())["weight_map"].values()}
        if index.exists()
        else {"model.safetensors"}
    )
    assert weights == expected and (size == "50GB") == (len(weights) == 1)


def test_a_save_beside_an_adapter_says_which_of_the_two_loads(tmp_path, caplog):
    (tmp_path / "adapter_config.json").write_text("{}")
    tiny_model().save_pretrained(tmp_path)
    assert f"{tmp_path} holds an adapter too, which from_pretrained loads instead" in caplog.text
    assert (tmp_path / "adapter_config.json").is_file()  # it may be an adapter of this model


def test_stale_files():
    shards = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    others = ["README.md", "config.json", "model.fp16.safetensors", "last-checkpoint/model.safetensors", "a.py"]
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    old = ["model.safetensors", "pytorch_model.bin", "model-00001-of-00003.safetensors", *adapter, *others]
    gone = ["adapter_config.json", "adapter_model.safetensors", "model-00001-of-00003.safetensors"]
    assert stale_files(old, [*shards, "config.json"]) == [*gone, "model.safetensors", "pytorch_model.bin"]
    assert stale_files([*shards, "config.json"], ["model.safetensors"]) == sorted(shards)
    assert stale_files([*shards, *others], adapter) == sorted([*shards, "config.json"])
    assert stale_files(old, ["README.md", "config.json", "tokenizer.json"]) == []


# ---- the push -------------------------------------------------------------------------------------------------------


def test_a_push_over_an_older_one_replaces_its_weights_in_one_commit(hub, folder, capsys):
    push(folder, "ann/model", "--private", "--license", "apache-2.0", "--message", "first")
    tiny_model(seed=1).save_pretrained(folder, max_shard_size="90KB")
    commit = push(folder, "ann/model", "--license", "apache-2.0", "--message", "second")
    assert "delete" in capsys.readouterr().out
    repository = hub.repo("ann/model")
    assert repository.private
    assert repository.titles() == [
        f"Model card: pin {commit.oid[:8]}",
        "second",
        repository.titles()[2],
        "first",
        "initial commit",
    ]
    first, second = (repository.history(repository.resolve(commit.oid))[index].files for index in (2, 0))
    assert "model.safetensors" in first and "model.safetensors" not in second
    assert "model.safetensors.index.json" in second
    loaded = AutoModelForImageTextToText.from_pretrained("ann/model", trust_remote_code=True)
    assert all(torch.equal(loaded.state_dict()[n], value) for n, value in tiny_model(seed=1).state_dict().items())


def test_branches_and_pull_requests(hub, folder):
    push(folder, "ann/model", "--license", "apache-2.0")
    main = hub.repo("ann/model").resolve("main")
    tiny_model(seed=1).save_pretrained(folder)
    push(folder, "ann/model", "--branch", "experiment", "--license", "apache-2.0")
    commit = push(folder, "ann/model", "--pull-request", "--license", "apache-2.0")
    repository = hub.repo("ann/model")
    assert repository.resolve("main") == main and commit.pr_revision == "refs/pr/1"
    for revision in ("experiment", "refs/pr/1"):
        assert repository.files(revision)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    loaded = AutoProcessor.from_pretrained("ann/model", trust_remote_code=True, revision="refs/pr/1")
    assert loaded.video_processor.num_frames == 4


def test_server_errors_are_waited_for(hub, folder):
    hub.fail("POST .*/commit/", status=503, times=2)
    hub.fail("POST .*/preupload/", status=500)
    hub.fail("PUT /lfs/", status=500)
    hub.drop("PUT /lfs/")
    push(folder, "ann/model", "--license", "apache-2.0", "--message", "done")
    repository = hub.repo("ann/model")
    assert repository.titles()[1:] == ["done", "initial commit"]
    assert repository.files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert [request.status for request in hub.requests("POST .*/commit/")][:3] == [503, 503, 200]
    assert {request.status for request in hub.requests("PUT /lfs/")} == {500, 0, 200}


@pytest.mark.parametrize(
    "where",
    [
        *("PUT /lfs/", "POST .*/commit/"),
        *(pytest.param(name, marks=SLOW) for name in ("POST .*/preupload/", "POST .*/lfs/objects/batch")),
    ],
)
def test_a_push_that_fails_leaves_the_repository_as_it_was(hub, folder, where):
    push(folder, "ann/model", "--license", "apache-2.0")
    before = hub.repo("ann/model").resolve("main")
    tiny_model(seed=1).save_pretrained(folder, max_shard_size="90KB")
    hub.fail(where, status=500, times=1000)
    with pytest.raises(SystemExit, match="^[^:]+: .*500"):
        push(folder, "ann/model", "--license", "apache-2.0")
    assert hub.repo("ann/model").resolve("main") == before
    assert 1 < len([request for request in hub.requests(where) if request.status == 500]) < 40
    hub.heal()
    push(folder, "ann/model", "--license", "apache-2.0", "--message", "again")
    assert hub.repo("ann/model").titles()[1] == "again"
    assert "model.safetensors" not in hub.repo("ann/model").files()


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, monkeypatch):
    HfApi().create_repo("model")
    send, answers = huggingface_hub._commit_api.hf_raise_for_status, [503]

    def lose_the_answer(response, endpoint_name=None):
        if endpoint_name == "commit" and answers:
            response.status_code = answers.pop()
        send(response, endpoint_name)

    monkeypatch.setattr("huggingface_hub._commit_api.hf_raise_for_status", lose_the_answer)
    commit = commit_files("ann/model", {"config.json": b"{}"}, commit_message="once")
    assert hub.repo("ann/model").titles() == ["once", "initial commit"]
    assert commit.oid == hub.repo("ann/model").resolve("main").oid


def test_somebody_elses_commit_in_between_is_not_overwritten(hub, monkeypatch):
    """The list of stale files is computed again, on top of the new commit."""
    HfApi().create_repo("model")
    find, others = HfApi.model_info, ["model-00001-of-00002.safetensors"]

    def then_push(api, *arguments, **options):
        info = find(api, *arguments, **options)
        if others:
            api.upload_file(path_or_fileobj=b"old", path_in_repo=others.pop(), repo_id="ann/model")
        return info

    monkeypatch.setattr(HfApi, "model_info", then_push)
    commit_files("ann/model", {"model.safetensors": b"new"}, commit_message="ours")
    assert set(hub.repo("ann/model").files()) == {".gitattributes", "model.safetensors"}
    assert [request.status for request in hub.requests("POST .*/commit/")] == [200, 412, 200]


def test_refusals_say_what_is_wrong(hub, folder, monkeypatch):
    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            push(folder, *arguments)
        assert str(caught.value).startswith(f"{Path(sys.argv[0]).name}: ")
        return str(caught.value)

    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "no_token"))
    for token, message in ((None, "no token: run `hf auth login`"), ("hf_wrong", "Invalid credentials")):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        assert message in refused("ann/model")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "don't have the rights" in refused("ann/model")
    assert not hub.repositories
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(folder, "ann/model", "--license", "apache-2.0")
    before = hub.repo("ann/model").resolve("main")
    assert "is public: make it private" in refused("ann/model", "--private")
    assert "none.json, which is not a file" in refused("ann/model", "--results", "none.json")
    assert '"license" must be one of the known licenses, got Apache 2' in refused("ann/model", "--license", "Apache 2")
    assert "no such folder" in str(pytest.raises(SystemExit, push, folder / "none", "ann/model").value)
    assert "repo_id" in refused("ann/mo--del")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    assert "403" in refused("ann/model")
    assert hub.repo("ann/model").resolve("main") == before


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoProcessor])
def test_what_cannot_be_loaded_is_named(hub, folder, monkeypatch, auto_class):
    push(folder, "ann/private", "--private", "--license", "apache-2.0")
    for repo_id, options, message in (
        ("ann/none", {}, "ann/none is not a local folder and is not a valid model identifier"),
        ("ann/private", {"revision": "gone"}, "gone is not a valid git identifier"),
        ("ann/private", {"token": "hf_bob"}, "ann/private is not a local folder and is not a valid model identifier"),
        ("ann/private", {"token": False}, "ann/private is not a local folder and is not a valid model identifier"),
    ):
        with pytest.raises(OSError, match=message):
            auto_class.from_pretrained(repo_id, trust_remote_code=True, **options)


# ---- the card -------------------------------------------------------------------------------------------------------


def write_recipe(folder: Path, **more: object) -> None:
    recipe = {
        "model": "llava-hf/base",
        "learning_rate": 1e-5,
        "autoregressive_config.num_hist": 2,
        "hub_token": "hf_x",
    }
    (folder / "train_config.yaml").write_text(yaml.safe_dump({**recipe, "video_root": "/home/ann", **more}))


def test_the_card_says_what_the_folder_does(hub, folder):
    write_recipe(folder)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    commit = push(folder, "ann/model", "--license", "apache-2.0", "--dataset", "ann/clips")
    card = ModelCard(hub.repo("ann/model").files()["README.md"].decode())
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": "llava-hf/base",
        "base_model_relation": "finetune",
        "datasets": ["ann/clips"],
        "tags": ["custom_code", "llava", "next-frame-prediction", "video", "vision-language"],
        "model-index": [
            {
                "name": "model",
                "results": [
                    {
                        "task": {"type": "image-text-to-text"},
                        "dataset": {"name": "clips/test.json", "type": "ann/clips"},
                        "metrics": [
                            {"type": "accuracy", "value": 0.75, "name": "Exact match"},
                            {"type": "mse", "value": 0.5, "name": "Next frame, mse"},
                            {"type": "copy_mse", "value": 1.0, "name": "Next frame, copy mse"},
                            {"type": "skill", "value": 0.5, "name": "Next frame, skill"},
                            {"type": "cosine", "value": 0.9, "name": "Next frame, cosine"},
                            {"type": "temporal_consistency", "value": 0.3, "name": "Next frame, temporal consistency"},
                        ],
                    }
                ],
            }
        ],
    }
    card.validate()
    assert f'checkpoint, revision = "ann/model", "{commit.oid}"\n' in card.text and "0.750 [0.50, 1.00]" in card.text
    assert "learning_rate: 1.0e-05\n" in card.text and "num_hist: 2" in card.text
    assert "hf_x" not in card.text and "/home/ann" not in card.text  # neither user nor path
    # The commit that the card pins holds all files but this version of the card.
    pinned, last = (hub.repo("ann/model").resolve(revision).files for revision in (commit.oid, "main"))
    assert {name for name in last if last[name] != pinned[name]} == {"README.md"}


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_the_code_of_a_card_runs_as_it_stands(hub, folder, tmp_path, monkeypatch, capsys, kind):
    push(folder, "ann/model", "--license", "apache-2.0")
    if kind == "adapter":
        folder = save_adapter("ann/model", tmp_path / "adapter")
        push(folder, "ann/adapter")
    content = hub.repo(f"ann/{kind}").files()["README.md"].decode()
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4", 12)
    block, with_pipeline = re.findall(r"^```python\n(.*?)^```", content, re.MULTILINE | re.DOTALL)
    capsys.readouterr()
    namespace: dict = {}
    exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert re.search(r"^-?\d\.\d+$", printed, re.MULTILINE)
    exec(compile(with_pipeline, "README.md", "exec"), namespace)
    answer = capsys.readouterr().out.rstrip("\n")
    assert answer and printed.startswith(answer)  # both are greedy
    data = ModelCard(content).data
    assert data.license == "apache-2.0"  # the license of the base
    if kind == "adapter":
        assert (data.base_model, data.base_model_relation, data.library_name) == ("ann/model", "adapter", "peft")
        assert f'pinned = {{"revision": "{hub.repo("ann/model").resolve("main").oid}", ' in block
        assert re.search(r'^pip install .*"peft>=', content, re.MULTILINE)


def test_a_card_that_somebody_wrote_is_kept(hub, folder, capsys):
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    push(folder, "ann/model")
    assert hub.repo("ann/model").files()["README.md"] == (folder / "README.md").read_bytes()
    (folder / "README.md").unlink()
    push(folder, "ann/model", "--message", "again")
    assert hub.repo("ann/model").files()["README.md"] == b"---\nlicense: mit\n---\nMine.\n"
    assert "README.md (the Hub's was written by hand; --overwrite-card replaces it)" in capsys.readouterr().out
    push(folder, "ann/model", "--overwrite-card", "--license", "apache-2.0", "--language", "en", "de")
    card = ModelCard(hub.repo("ann/model").files()["README.md"].decode())
    assert hub_card.GENERATED in card.text and card.data.language == ["en", "de"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: apache", '"license" must be one of'),
        ("pipeline_tag: video-chat", '"pipeline_tag" must be one of'),
        ("base_model: /home/ann/base", '"base_model" with value "/home/ann/base" is not valid'),
        ("base_model_relation: child", '"base_model_relation" must be one of'),
        ("tags: 3", '"tags" must be a string or a list of strings'),
        ("language: english", '"language" must be an ISO 639 code'),
        ("model-index:\n- name: x\n  results: good", "model-index[0].results"),
        ("model-index:\n- name: x\n  results: [{task: {type: x}, metrics: []}]", "dataset.type"),
    ],
)
def test_the_local_hub_knows_the_rules_for_cards(hub, metadata, message):
    """The check of cards in the other tests rejects wrong metadata."""
    HfApi().create_repo("model")
    with pytest.raises(ValueError, match=re.escape(message)):
        commit_files("ann/model", {"README.md": f"---\n{metadata}\n---\n".encode()}, commit_message="bad")
    assert hub.repo("ann/model").titles() == ["initial commit"]


# ---- adapters -------------------------------------------------------------------------------------------------------


def save_adapter(base: str | Path, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["autoregressive_module"])
    get_peft_model(model, lora).save_pretrained(folder)
    AutoProcessor.from_pretrained(base, trust_remote_code=True).save_pretrained(folder)
    return folder


def test_an_adapter_of_a_local_folder_needs_to_be_told_its_base(hub, folder, tmp_path):
    adapter = save_adapter(folder, tmp_path / "adapter")
    with pytest.raises(SystemExit, match=f"base is a folder of this computer: {folder}"):
        push(adapter, "ann/adapter")
    assert not hub.repositories
    push(folder, "ann/model", "--license", "apache-2.0")
    with pytest.raises(SystemExit, match="ann/model is the base of the adapter"):
        push(adapter, "ann/model", "--base-model", "ann/model")
    push(adapter, "ann/adapter", "--base-model", "ann/model")
    config = json.loads(hub.repo("ann/adapter").files()["adapter_config.json"])
    assert config["base_model_name_or_path"] == "ann/model"
    assert "config.json" not in hub.repo("ann/adapter").files()
    loaded = AutoModelForImageTextToText.from_pretrained("ann/adapter", trust_remote_code=True)
    assert any("lora_A" in name for name in loaded.state_dict())


def test_an_adapter_whose_base_others_cannot_find_is_refused(hub, tmp_path, monkeypatch):
    """Also a folder that has the form of an id: the owner of that id could run code wherever the adapter is loaded."""

    def commit(base: str) -> None:
        config = json.dumps({"base_model_name_or_path": base}).encode()
        commit_files("ann/adapter", {"adapter_config.json": config}, commit_message="adapter")

    HfApi().create_repo("adapter")
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for base in ("ann/none", "outputs/run", str(tmp_path / "outputs" / "run"), "/gone/away"):
        with pytest.raises(ValueError, match=f"the adapter's base '{base}' is not on the Hub"):
            commit(base)
    with pytest.raises(ValueError, match="ann/adapter is the base of the adapter, which would replace it"):
        commit("ann/adapter")
    assert hub.repo("ann/adapter").titles() == ["initial commit"]
    HfApi().create_repo("base")
    commit("ann/base")
    assert hub.repo("ann/adapter").titles() == ["adapter", "initial commit"]


def test_hub_ids(tmp_path, monkeypatch):
    snapshot = "/cache/hub/models--llava-hf--llava-onevision/snapshots/" + "a" * 40
    assert hub_id(snapshot) == hub_id(snapshot + "/") == "llava-hf/llava-onevision"
    assert hub_id("llava-hf/llava-onevision") == "llava-hf/llava-onevision"
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert [hub_id(name) for name in ("outputs/run", str(tmp_path), "/gone/away", "a/b/c", "", None)] == [None] * 6


# ---- the trainer ----------------------------------------------------------------------------------------------------


def make_trainer(output: Path, steps: int = 2, adapter_of: str | None = None, **arguments: object):
    model = tiny_model()
    processor = tiny_processor(model.config, num_frames=4)
    if adapter_of is not None:
        from peft import LoraConfig, get_peft_model

        model = AutoModelForImageTextToText.from_pretrained(adapter_of, trust_remote_code=True)
        lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["autoregressive_module"])
        model = get_peft_model(model, lora)
    args = TrainingArguments(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        push_to_hub=True,
        hub_token=TOKEN,
        **arguments,
    )
    return AutoregressiveTrainer(
        model,
        args,
        train_dataset=make_samples(tiny_model().config),
        data_collator=LlavaVideoCollator(0),
        processing_class=processor,
    )


def pushed_names(hub: HubServer, repo_id: str) -> set[str]:
    return {name for name in hub.repo(repo_id).files() if not name.endswith(".py")} - {".gitattributes"}


MODEL_NAMES = {
    *("config.json", "generation_config.json", "model.safetensors", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}


def test_the_trainer_pushes_the_model_and_nothing_else(hub, tmp_path):
    trainer = make_trainer(tmp_path / "run", save_strategy="no")
    trainer.train()
    tiny_model(seed=5).push_to_hub("run", max_shard_size="90KB")  # an older push
    commit = trainer.push_to_hub()
    assert pushed_names(hub, "ann/run") == MODEL_NAMES | {"README.md"}
    assert hub.repo("ann/run").titles()[0] == "End of training"
    assert commit.oid == hub.repo("ann/run").resolve("main").oid
    card = ModelCard(hub.repo("ann/run").files()["README.md"].decode())
    assert {"custom_code", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "image-text-to-text"
    loaded = AutoModelForImageTextToText.from_pretrained("ann/run", trust_remote_code=True)
    state = trainer.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    # transformers pickles the token into the folder, and pushes it.
    assert trainer.args.hub_token == TOKEN
    assert not any(TOKEN.encode() in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "strategy", ["checkpoint", pytest.param("every_save", marks=SLOW), pytest.param("all_checkpoints", marks=SLOW)]
)
def test_pushes_during_the_training(hub, tmp_path, strategy):
    trainer = make_trainer(
        *(tmp_path / "run", 4),
        **{"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1},
        **{"hub_strategy": strategy, "hub_always_push": True},
    )
    trainer.train()
    trainer._finish_current_push()
    repository = hub.repo("ann/run")
    assert {"Training in progress, step 2", "Training in progress, step 4"} <= set(repository.titles())
    folder = {"every_save": None, "checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-4"}[strategy]
    names = pushed_names(hub, "ann/run")
    assert {name for name in names if "/" not in name} - {"README.md"} == MODEL_NAMES
    nested = {name.split("/")[0] for name in repository.files() if "/" in name}
    assert nested == {None: set(), "checkpoint-4": {"checkpoint-2", "checkpoint-4"}}.get(folder, {folder})
    if folder is not None:  # sufficient to resume from
        assert {f"{folder}/{name}" for name in ("optimizer.pt", "trainer_state.json", "model.safetensors")} <= names
        assert json.loads(repository.files()[f"{folder}/trainer_state.json"])["global_step"] == 4
    assert not any(TOKEN.encode() in content for content in repository.files().values())
    loaded = AutoModelForImageTextToText.from_pretrained("ann/run", trust_remote_code=True)
    state = trainer.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_a_failed_push_during_the_training_is_told_and_does_not_stop_it(hub, tmp_path, caplog):
    hub.fail("POST .*/preupload/", status=403, times=1000)
    trainer = make_trainer(tmp_path / "run", save_strategy="steps", save_steps=1, hub_strategy="every_save")
    trainer.train()
    trainer._finish_current_push()
    assert trainer.state.global_step == 2
    assert "a push during the training failed" in caplog.text and "403" in caplog.text


def test_a_failed_push_is_told_before_the_next_begins_and_does_not_stop_it(hub, tmp_path, caplog, monkeypatch):
    begun = []

    def commit(repo_id, files, *, commit_message, **options):
        begun.append((commit_message, "a push during the training failed: no space" in caplog.text))
        if len(begun) == 1:
            raise OSError("no space")

    def run_at_once(api, function, *arguments, **options):
        future = Future()
        try:
            future.set_result(function(*arguments, **options))
        except OSError as error:
            future.set_exception(error)
        return future

    monkeypatch.setattr("llava_next_ar.training.hub_trainer.commit_files", commit)
    monkeypatch.setattr(HfApi, "run_as_future", run_at_once)
    make_trainer(tmp_path / "run", save_strategy="steps", save_steps=1, hub_strategy="every_save").train()
    assert begun == [("Training in progress, step 1", False), ("Training in progress, step 2", True)]
    assert not list((tmp_path / "run").glob("_pushing_*"))


def test_an_adapter_of_a_local_base_names_its_whole_path(hub, folder, tmp_path, monkeypatch):
    """The adapter loads from any folder, and does not name the module of the class in this process."""
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path / "lora", adapter_of="run")
    trainer.save_model(_internal_call=True)  # without a push, which looks up the base
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["auto_mapping"]) == (str(folder), None)
    monkeypatch.chdir(tmp_path / "lora")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "lora", trust_remote_code=True)
    assert any("lora_A" in name for name in loaded.state_dict())


def test_the_trainer_pushes_a_complete_adapter(hub, folder, tmp_path, caplog):
    """During the training too: PEFT's card names the base by its folder, and the Hub rejects such a push."""
    push(folder, "ann/base", "--license", "apache-2.0")
    snapshot = huggingface_hub.snapshot_download("ann/base")
    trainer = make_trainer(tmp_path / "lora", adapter_of=snapshot, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer._finish_current_push()
    assert "a push during the training failed" not in caplog.text
    assert "Training in progress, step 1" in hub.repo("ann/lora").titles()
    assert ModelCard(hub.repo("ann/lora").files()["README.md"].decode()).data.base_model == "ann/base"
    checkpoint = read_hub_folder(tmp_path / "lora" / "checkpoint-2")
    assert {"modeling_llava_next_ar.py", "configuration_llava_next_ar.py"} <= checkpoint.files.keys()
    trainer.push_to_hub(blocking=False).result()
    names = MODEL_NAMES - {"config.json", "generation_config.json", "model.safetensors"}
    assert pushed_names(hub, "ann/lora") == names | {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(hub.repo("ann/lora").files()["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["auto_mapping"]) == ("ann/base", None)
    card = ModelCard(hub.repo("ann/lora").files()["README.md"].decode())
    assert card.data.base_model == "ann/base" and card.data.library_name == "peft"
    assert not any(str(tmp_path).encode() in content for content in hub.repo("ann/lora").files().values())
    loaded = AutoModelForImageTextToText.from_pretrained("ann/lora", trust_remote_code=True)
    state = {
        name.replace(".default", ""): value for name, value in trainer.model.base_model.model.state_dict().items()
    }
    trained = [name for name in loaded.state_dict() if "lora_" in name or "modules_to_save" in name]
    assert trained
    assert all(torch.equal(loaded.state_dict()[name], state[name.replace(".default", "")]) for name in trained)


def test_train_writes_a_card_that_every_push_keeps(hub, folder, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_clip(tmp_path / "data" / "a.mp4", 6, width=64, height=48)
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    (tmp_path / "data" / "train.json").write_text(json.dumps([{"conversations": turns, "video": "a.mp4"}] * 2))
    push(folder, "ann/base", "--license", "apache-2.0")
    train.main(
        [
            *("--config", str(CONFIGS / "lora.yaml"), "--model", "ann/base", "--lora_r", "2", "--max_steps", "1"),
            *("--train_data", str(tmp_path / "data" / "train.json"), "--output_dir", str(tmp_path / "lora")),
            *("--use_cpu", "true", "--dataloader_num_workers", "0", "--push_to_hub", "true"),
            *("--hub_model_id", "ann/tuned", "--hub_token", TOKEN),
        ]
    )
    card = ModelCard(hub.repo("ann/tuned").files()["README.md"].decode())
    assert card.content == (tmp_path / "lora" / "README.md").read_text()
    assert hub_card.GENERATED in card.text and "learning_rate: 0.0001" in card.text and "lora_r: 2" in card.text
    assert (card.data.base_model, card.data.base_model_relation) == ("ann/base", "adapter")
    assert str(tmp_path) not in card.text
    assert not any(TOKEN.encode() in path.read_bytes() for path in (tmp_path / "lora").rglob("*") if path.is_file())
