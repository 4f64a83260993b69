"""Pushes and loads through a real client and a local Hub; each process has its own caches."""

import functools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from card_metadata import check_card
from hub_programs import ROWS, Finished, measure, run_program
from hub_server import HubServer
from tiny import tiny_model
from tiny_processor import tiny_processor
from video_clips import write_clip

from llava_next_ar.hub.hub_code import AUTO_MAP, code_files

TOKEN = "hf_ann"
COLUMNS = ("main", "pinned revision", "offline", "without this package")


class World:
    """A Hub, the pushed models, and the results of each kind of process that loads them, computed at the first use."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        self.clip = str(write_clip(folder / "clip.mp4", 24))
        self.expected: dict[str, Any] = {}
        for name in ("push_models", "push_adapters"):
            self.expected |= self.run(name, self.clip, home=name).result

    def run(self, name: str, *arguments: Any, home: str, **options: Any) -> Finished:
        return run_program(
            name, *arguments, endpoint=self.hub.endpoint, home=self.folder / home, token=TOKEN, **options
        )

    @functools.cache  # noqa: B019
    def loaded(self, column: str) -> Finished:
        if column == "offline":
            self.loaded("main")  # fills the cache
            num_requests = len(self.hub.log)
            finished = self.run("load_back", self.clip, None, home="main", offline=True)
            assert len(self.hub.log) == num_requests
            return finished
        pins = {row: versions["first"]["commit"] for row, versions in self.expected.items()}
        pins["base"] = self.expected["model"]["last"]["commit"]
        pins = pins if column == "pinned revision" else None
        return self.run("load_back", self.clip, pins, home=column, hide_package=column == "without this package")


@pytest.fixture(scope="module")
def hub():
    with HubServer(check_card=check_card) as server:
        server.add_user("ann", TOKEN)
        yield server


@pytest.fixture(scope="module")
def world(hub, tmp_path_factory):
    return World(hub, tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS)
def test_what_was_pushed_loads_back_with_equal_logits(world, hub_cell, row, column):
    logits, mse = world.loaded(column).result[row]
    hub_cell(row, column, f"equal ({len(logits) * len(logits[0])} logits)")
    versions = {version: found["measured"] for version, found in world.expected[row].items()}
    assert versions["first"] != versions["last"]
    assert [logits, mse] == versions["first" if column == "pinned revision" else "last"]


def test_every_auto_class_and_option_loads_the_same_model(world):
    found = world.run("load_every_way", world.clip, home="every way").result
    expected = world.expected["model"]["last"]["measured"]
    for way in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        assert found[way] == expected, way
    assert found["device_map=cpu"] == expected and found["device_map=auto"] == expected
    dtype, logits, mse = found["bfloat16"]
    assert dtype == "torch.bfloat16"
    assert torch.tensor(logits).allclose(torch.tensor(expected[0]), atol=0.05) and logits != expected[0]
    assert mse == pytest.approx(expected[1], rel=0.05)
    assert found["AutoConfig"] == AUTO_MAP  # class names without a repository: a new save is complete by itself
    assert found["AutoVideoProcessor"] == 4
    (answer,) = found["pipeline"]
    assert answer["generated_text"] == found["generated"]


def test_loading_says_nothing_but_that_code_came(world):
    """With a pinned revision, transformers does not print that note either."""
    expected = r"\[transformers\] A new version of the following files was downloaded.*|- \w+\.py|\. Make sure to.*"
    lines = [line for line in world.loaded("main").stderr.splitlines() if not re.fullmatch(expected, line)]
    assert lines == []
    assert world.loaded("pinned revision").stderr == ""
    assert world.loaded("offline").stderr == ""


def test_pushes_leave_no_stale_weights_and_name_the_base_by_its_id(world):
    names = {row: set(world.hub.repo(f"ann/{row}").files()) for row in ROWS}
    assert "model.safetensors" in names["model"] and "model.safetensors" in names["merged"]
    assert "model.safetensors" not in names["sharded-model"]
    shards = {name for name in names["sharded-model"] if name.endswith(".safetensors")}
    index = json.loads(world.hub.repo("ann/sharded-model").files()["model.safetensors.index.json"])
    assert shards == set(index["weight_map"].values()) and len(shards) > 1  # without those of the first version
    assert {name for name in names["adapter"] if name.endswith(".safetensors")} == {"adapter_model.safetensors"}
    config = json.loads(world.hub.repo("ann/adapter").files()["adapter_config.json"])
    assert config["base_model_name_or_path"] == "ann/model"
    modules = set(code_files())
    assert all(modules <= found for found in names.values())
    assert world.hub.repo("ann/model").private
    # The second host, which serves the weights, receives no token.
    assert not any(request.user for request in world.hub.requests("/cdn/"))


@pytest.mark.slow
def test_hf_upload_of_a_saved_folder(world):
    folder = world.folder / "by hand"
    model = tiny_model(seed=3)
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.1)
    processor = tiny_processor(model.config, num_frames=4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    environment["HF_ENDPOINT"] = world.hub.endpoint
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", "ann/uploaded", str(folder), "."]
    processes.run(command, env=environment, timeout=300)
    found = world.run("load_one", world.clip, "ann/uploaded", home="uploaded", hide_package=True).result
    assert found == measure(world.clip, model, processor)


@pytest.mark.slow
def test_a_dataset_of_the_hub_trains(world):
    folder = world.folder / "clips"
    folder.mkdir()
    write_clip(folder / "a.mp4", 8, width=64, height=48)
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    entries = [{"video": "a.mp4", "conversations": turns}] * 3
    (folder / "train.json").write_text(json.dumps(entries))
    found = world.run("train_on_a_dataset", str(folder), "run", home="dataset").result
    assert found["entries"] == entries
    assert found["log"]["autoregressive_loss"] > 0 and found["log"]["main_loss"] > 0
    assert world.hub.repo("ann/clips", "dataset").private


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_loading(world, bits):
    pytest.importorskip("bitsandbytes")
    assert world.run("load_quantized", world.clip, bits, home=f"{bits} bits").result < 1
