"""Checkpoints of release 0.1.0 load and resume here, and those saved here load and resume there.

`tests/releases/0.1.0.tar.xz` holds the modules of that release, whose folder was flat.
"""

import json
import os
import sys
import tarfile
from pathlib import Path

import processes
import pytest
import torch
from tiny import tiny_model, video_batch
from tiny_processor import tiny_processor

TESTS = Path(__file__).resolve().parents[1]
WAYS = [("0.1.0", "this"), ("this", "0.1.0")]


class Releases:
    """Run `release_programs.py` with one of the two releases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with tarfile.open(TESTS / "releases" / "0.1.0.tar.xz") as archive:
            archive.extractall(folder / "0.1.0" / "llava_next_ar", filter="data")
        config = tiny_model().config
        config.save_pretrained(folder / "source")
        tiny_processor(config, num_frames=4).save_pretrained(folder / "source")
        batch = video_batch(config, [[3], [5]])
        torch.save({name: value for name, value in batch.items() if name != "labels"}, folder / "batch.pt")
        torch.save([video_batch(config, [[frames]]) for frames in (2, 3, 4, 5)], folder / "samples.pt")

    def run(self, release: str, name: str, *arguments: object) -> object:
        result = self.folder / "result.json"
        path = {"PYTHONPATH": str(self.folder / release)} if release != "this" else {}
        modules = {"HF_MODULES_CACHE": str(self.folder / f"modules {release}")}
        command = [sys.executable, TESTS / "release_programs.py", name, json.dumps(arguments, default=str), result]
        processes.run(command, env={**os.environ, **path, **modules}, cwd=self.folder, timeout=300)
        return json.loads(result.read_text())


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    return Releases(tmp_path_factory.mktemp("releases"))


@pytest.mark.parametrize(("giver", "taker"), WAYS)
def test_what_one_release_saved_the_other_loads_with_equal_outputs(releases, giver, taker):
    folder = releases.folder / f"saved by {giver}"
    expected = releases.run(giver, "save", releases.folder / "source", folder, releases.folder / "batch.pt")
    for found in releases.run(taker, "load", folder, releases.folder / "batch.pt"):
        assert found.pop("class") == "LlavaNextARForConditionalGeneration"
        assert found == expected


@pytest.mark.parametrize(("giver", "taker"), WAYS)
def test_what_one_release_began_to_train_the_other_finishes(releases, giver, taker):
    folder, output = releases.folder / f"trained by {giver}", releases.folder / f"run of {giver}"
    releases.run("this", "save", releases.folder / "source", folder, releases.folder / "batch.pt")
    samples = releases.folder / "samples.pt"
    whole = releases.run(giver, "train", folder, samples, output, None)
    rest = releases.run(taker, "train", folder, samples, output, output / "checkpoint-2")
    assert len(whole) == 4
    assert rest[-2:] == whole[-2:]
