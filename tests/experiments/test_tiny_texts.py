"""Texts of the tiny checkpoint's vocabulary, and the launch files."""

from pathlib import Path

import yaml

from llava_next_ar.experiments.demo.tiny_checkpoint import texts_of

ACCELERATE = Path(__file__).resolve().parents[2] / "scripts" / "accelerate"


def test_texts_of_every_form_of_an_entry():
    entries = [
        {"video": "a.mp4"},
        {"video": "a.mp4", "conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]},
        {
            "messages": [{"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}],
            "system": "five",
        },
        {"messages": [{"role": "user", "content": [{"type": "video", "path": "a"}, {"type": "text", "text": "six"}]}]},
        {"video": "a.mp4", "conversations": None, "choices": ["seven"]},
    ]
    assert sorted(texts_of(entries)) == sorted(["one", "two", "three", "four", "five", "six", "seven"])


def test_launch_files_start_as_many_processes_as_there_are_gpus():
    for path in ACCELERATE.glob("*.yaml"):
        settings = yaml.safe_load(path.read_text())
        assert settings["num_processes"] == (2 if path.stem == "cpu" else "gpu"), path.name
