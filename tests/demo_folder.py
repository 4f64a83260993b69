"""A folder like that of scripts/demo.py, smaller: real clips with questions, and a tiny checkpoint that knows the words."""

import json
from pathlib import Path

from synthetic_clips import write_dataset
from tiny_checkpoint import build_tiny_checkpoint, texts_of

NUM_FRAMES = 8


def make_demo_folder(folder: Path) -> Path:
    """`clips/` with questions of different length and one to four choices of one or two words, and `base/`."""
    types = ("next", "bounce", "color")
    entries = write_dataset(
        folder / "clips", num_train=0, num_test=4, size=48, num_frames=8, question_types=types, progress=False
    )["test"]
    build_tiny_checkpoint(folder / "base", texts_of(entries), num_frames=NUM_FRAMES)
    return folder


def entries_of(folder: Path) -> list[dict]:
    return json.loads((folder / "clips" / "test.json").read_text())
