"""Clips of the temporal benchmark (experiments/temporal), drawn when they are read instead of recorded."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..temporal.benchmark import BenchmarkClip, entries_of, make_clips, render_clip
from .clips import ClipLibrary, ClipPair, ClipQuestion, SourceClip, fingerprint_of


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Clips of the temporal benchmark that the study uses."""

    question_types: tuple[str, ...] = ("direction", "camera", "color")
    """Those of the benchmark that a model of this size begins to learn in minutes, and `color`, which needs no time."""
    num_train: int = 480
    """Clips of each kind, a multiple of 4."""
    num_watched: int = 160
    """Training clips without a question. They are possible ones of the kind of the pairs: events that a model must find
    surprising later must not occur in training."""
    num_val: int = 20
    num_test: int = 80
    num_val_pairs: int = 100
    """Pairs of a possible and an impossible clip, a multiple of 2."""
    num_test_pairs: int = 400
    levels: tuple[str, ...] = ("easy",)
    num_frames: int = 14
    frame_step: int = 3
    """Every so many frames one is shown: with 3, frames 0, 3, 6..."""
    image_size: int = 56
    fps: float = 4.0
    tower_layers: int = 6
    seed: int = 0

    @property
    def shown_frames(self) -> range:
        """Indices of the shown frames of each clip."""
        return range(0, self.num_frames, self.frame_step)


class _Drawings(Sequence):
    """Frames of the clips, drawn at each access."""

    def __init__(self, clips: Sequence[BenchmarkClip], settings: DataSettings) -> None:
        self._clips, self._settings = clips, settings

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, number: int) -> np.ndarray:
        return render_clip(self._clips[number], self._settings.image_size, self._settings.shown_frames)


def drawn_library(settings: DataSettings) -> ClipLibrary:
    """The drawn clips with their questions and pairs; takes about a second."""
    numbers = {"val": settings.num_val, "test": settings.num_test, "train": settings.num_train}
    num_pairs = {"val": settings.num_val_pairs, "test": settings.num_test_pairs, "train": settings.num_watched}
    options = {"seed": settings.seed, "num_frames": settings.num_frames, "levels": settings.levels}
    drawn: list[BenchmarkClip] = []
    splits: list[str] = []
    entries, pairs = {}, {}
    for split, number in numbers.items():
        clips = make_clips(number, split=split, question_types=settings.question_types, **options)
        entries[split] = entries_of(clips, question_types=settings.question_types)
        pairs[split] = make_clips(2 * num_pairs[split], split=split, question_types=["possible"], **options)
        clips += pairs[split][::2] if split == "train" else pairs[split]
        # Kinds are mixed, so that the first clips represent all.
        drawn += sorted(clips, key=lambda clip: clip.name[-4:])
        splits += [split] * len(clips)
    places = {clip.name: place for place, clip in enumerate(drawn)}
    return ClipLibrary(
        recordings=_Drawings(drawn, settings),
        clips=[
            SourceClip(name=clip.name, split=split, group=clip.level, recording=number, pair=clip.pair or "")
            for number, (clip, split) in enumerate(zip(drawn, splits, strict=True))
        ],
        questions={
            split: [(places[_clip_name(entry)], _question(entry)) for entry in own] for split, own in entries.items()
        },
        pairs={
            split: [_pair(one, other, places, settings) for one, other in zip(clips[::2], clips[1::2], strict=True)]
            for split, clips in pairs.items()
            if split != "train"
        },
        num_source_frames=settings.num_frames,
        frame_step=settings.frame_step,
        frame_seconds=settings.frame_step / settings.fps,
        fingerprint=fingerprint_of(settings),
    )


def _clip_name(entry: dict) -> str:
    return entry["video"].removeprefix("videos/").removesuffix(".mp4")


def _question(entry: dict) -> ClipQuestion:
    return ClipQuestion(
        question_type=entry["question_type"],
        text=entry["conversations"][0]["value"].removeprefix("<video>\n"),
        choices=tuple(entry["choices"]),
        answer=entry["conversations"][1]["value"],
    )


def _pair(one: BenchmarkClip, other: BenchmarkClip, places: dict[str, int], settings: DataSettings) -> ClipPair:
    return ClipPair(
        possible=places[one.name],
        changed=places[other.name],
        event=one.draft.notes["event"],
        event_frame=-(-one.draft.notes["event_frame"] // settings.frame_step),
    )
