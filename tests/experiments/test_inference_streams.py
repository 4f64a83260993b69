"""Bounded streams of scripts/inference_uses.py: departure from the unbounded stream, answers, and tables."""

import json

import pytest
import torch
from demo_folder import NUM_FRAMES, make_demo_folder

from llava_next_ar.evaluation.measures import load_checkpoint
from llava_next_ar.experiments.inference import uses as inference_uses
from llava_next_ar.experiments.inference.streams import StreamCondition, add_departure, departure_rows, split_prompt
from llava_next_ar.modeling.frame_surprise import VideoSurprise


def surprise_of(values: list[float], error: float) -> VideoSurprise:
    frames = torch.tensor(values)
    patches = [torch.full((1, 2), error)] * len(values)
    return VideoSurprise(torch.arange(1, len(values) + 1), frames, frames, patches, patches, patches, frames)


def test_departures_from_fixed_numbers():
    condition = StreamCondition("stream growing", 2)
    add_departure(condition, surprise_of([1.0, 2.0, 3.0], 0.6), surprise_of([1.0, 3.0, 5.0], 0.4))
    add_departure(condition, surprise_of([1.0, 2.0], 0.4), surprise_of([1.0, 1.0], 0.4))
    assert condition.difference == pytest.approx([1 / 3, 0.5])
    assert condition.correlation == [pytest.approx(1.0), None] and condition.error == pytest.approx([1.5, 1.0])
    results = {
        "settings": {"model": "m", "data": "d.json", "bootstrap_samples": 200},
        "questions": [{"video": "a.mp4"}, {"video": "b.mp4"}],
        "conditions": [vars(StreamCondition("all", None)), vars(condition)],
    }
    head, row = departure_rows(results)
    assert row[:2] == ["recent, growing positions", "2"] and len(row) == len(head)
    assert row[2].startswith("0.417 [0.333, 0.500") and row[3].startswith("1.000") and row[4].startswith("1.250")


def test_a_prompt_is_split_at_its_video():
    before, after = split_prompt(torch.tensor([5, 6, 9, 9, 9, 7]), 9)
    assert before.tolist() == [5, 6] and after.tolist() == [7]


def test_the_command_measures_streams(tmp_path):
    folder = make_demo_folder(tmp_path / "made")
    model, _ = load_checkpoint(str(folder / "base"))
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.2)  # or each prediction is a copy
    model.save_pretrained(folder / "base")
    results = tmp_path / "results"
    options = [
        "--model",
        str(folder / "base"),
        "--data",
        str(folder / "clips" / "test.json"),
        "--results",
        str(results),
    ]
    budgets = ["--num-kept", "2", str(NUM_FRAMES)]
    inference_uses.main(["streams", *options, *budgets, "--max-samples", "4", "--device", "cpu"])
    numbers = json.loads((results / "streams_test.json").read_text())
    conditions = {(c["way"], c["budget"]): c for c in numbers["conditions"]}
    for (way, budget), condition in conditions.items():
        if budget == NUM_FRAMES and way != "stream growing":  # all frames are in the cache
            assert condition["right"] == conditions["all", None]["right"], way
        if way.startswith("stream"):
            assert (max(condition["difference"]) < 1e-4) == (budget == NUM_FRAMES), way
    assert conditions["stream recent", 2]["frames"] == [[0, NUM_FRAMES - 1]] * 4
    assert conditions["recent", 2]["frames"] == [[NUM_FRAMES - 2, NUM_FRAMES - 1]] * 4
    assert conditions["uniform", 2]["frames"] == [[0, NUM_FRAMES - 1]] * 4
    assert conditions["stream growing", 2]["difference"] != conditions["stream recent", 2]["difference"]
    text = (results / "streams_test.md").read_text()
    assert "| stream, surprise |" in text and "| recent, growing positions | 2 |" in text
