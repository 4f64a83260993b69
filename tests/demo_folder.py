"""A small version of the demo's folder: real clips with questions, and a tiny checkpoint with their vocabulary."""

import json
from pathlib import Path

import torch

from llava_next_ar.evaluation.measures import load_checkpoint
from llava_next_ar.experiments.demo.tiny_checkpoint import build_tiny_checkpoint, texts_of
from llava_next_ar.experiments.temporal.synthetic_clips import write_dataset

NUM_FRAMES = 8


def make_demo_folder(folder: Path) -> Path:
    """`clips/` with questions of different length and one to four choices of one or two words, and `base/`."""
    types = ("next", "bounce", "color")
    entries = write_dataset(
        folder / "clips", num_train=0, num_test=4, size=48, num_frames=8, question_types=types, progress=False
    )["test"]
    build_tiny_checkpoint(folder / "base", texts_of(entries), num_frames=NUM_FRAMES)
    return folder


def make_changed_checkpoint(folder: Path) -> None:
    """Write `changed/` from `base/`: a checkpoint whose answers and predictions differ from question to question."""
    model, processor = load_checkpoint(str(folder / "base"))
    # With tied random embeddings a model repeats the last word, and the head starts at zero.
    torch.manual_seed(0)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / 3)
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.02)
    model.save_pretrained(folder / "changed")
    processor.save_pretrained(folder / "changed")


def entries_of(folder: Path) -> list[dict]:
    return json.loads((folder / "clips" / "test.json").read_text())
