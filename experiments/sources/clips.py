"""Clips with questions and pairs of clips, whatever draws or records them.

A source of video (`vizdoom_clips.py`, `metaworld_clips.py`, `drawn_clips.py`) gives a `ClipLibrary`: recordings of equal
length, clips that play them forwards or backwards, questions with choices, and pairs of clips that are equal before an event.
Libraries of one frame size are joined with `join`.

    library = open_library(VizdoomSettings(), Path("outputs/sources"))
    for pair in library.pairs["test"]:
        possible, changed = library.frames(pair.possible), library.frames(pair.changed)    # [T, H, W, 3] uint8
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import ConcatDataset

SPLITS = ("val", "test", "train")


@dataclass(frozen=True, kw_only=True)
class ClipQuestion:
    """A question about one clip with the choices of its answer."""

    question_type: str
    text: str
    choices: tuple[str, ...]
    answer: str

    def __post_init__(self) -> None:
        if self.answer not in self.choices:
            raise ValueError(f"answer is {self.answer!r}, expected one of {self.choices}")


@dataclass(frozen=True, kw_only=True)
class SourceClip:
    """A recording as it is played, with its questions."""

    name: str
    """Unique in its source."""
    split: str
    group: str
    """Name of the map, camera or level. Groups of the splits are disjoint where a source holds them out."""
    recording: int
    """Index of the recording."""
    backwards: bool = False
    pair: str = ""
    """Name that both clips of a pair share."""
    questions: tuple[ClipQuestion, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClipPair:
    """Violation of expectation: two clips, given by index, that are equal before `event_frame`."""

    possible: int
    changed: int
    """The clip in which the event happens."""
    event: str
    event_frame: int
    """Index of the first shown frame that differs."""
    impossible: bool = True
    """False for a harmless change of the appearance, such as that of the light."""


@dataclass(frozen=True, kw_only=True)
class ClipLibrary:
    """All clips of a source, with their questions and pairs."""

    recordings: Any
    """Sequence of `[T, H, W, 3]` uint8 arrays: an array on disk, a list, or frames that are drawn when they are read."""
    clips: Sequence[SourceClip]
    questions: Mapping[str, Sequence[tuple[int, ClipQuestion]]]
    """By split: the index of a clip and a question about it, in an order that mixes types and answers."""
    pairs: Mapping[str, Sequence[ClipPair]]
    """By split; training has none."""
    num_source_frames: int
    """Of each recording before frames are left out."""
    frame_step: int = 1
    """Every so many frames of a recording one is shown: with 3, frames 0, 3, 6..."""
    frame_seconds: float
    """Time from one shown frame to the next."""
    fingerprint: str
    """Of all settings that the clips depend on."""

    @property
    def num_frames(self) -> int:
        """Number of shown frames of each clip (T)."""
        return len(range(0, self.num_source_frames, self.frame_step))

    def frame_order(self, clip: int, *, shuffled: bool = False) -> np.ndarray:
        """Indices `[T]` of the recording's frames in the order in which the clip shows them.

        Args:
            shuffled: in a random order that both clips of a pair share. The drawn order covers frames that are not shown, so
                that a few clips keep their order by chance.
        """
        own = self.clips[clip]
        if shuffled:
            rng = np.random.default_rng(list(f"shuffled {own.pair or own.name}".encode()))
            drawn = rng.permutation(self.num_source_frames) // self.frame_step
            return drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        order = np.arange(self.num_frames)
        return order[::-1].copy() if own.backwards else order

    def recording_frames(self, recording: int) -> np.ndarray:
        """`[T, H, W, 3]` uint8 of a recording, forwards."""
        return np.asarray(self.recordings[recording])

    def frames(self, clip: int) -> np.ndarray:
        """`[T, H, W, 3]` uint8."""
        return self.recording_frames(self.clips[clip].recording)[self.frame_order(clip)]

    def of_split(self, split: str) -> list[int]:
        """Indices of the clips of a split.

        Raises:
            ValueError: for an unknown split.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
        return [number for number, clip in enumerate(self.clips) if clip.split == split]


def mixed_questions(clips: Sequence[SourceClip]) -> dict[str, list[tuple[int, ClipQuestion]]]:
    """All questions of the clips by split, in a fixed random order."""
    questions: dict[str, list[tuple[int, ClipQuestion]]] = {split: [] for split in SPLITS}
    for number, clip in enumerate(clips):
        questions[clip.split] += [(number, question) for question in clip.questions]
    return {
        split: [own[place] for place in np.random.default_rng(len(own)).permutation(len(own))]
        for split, own in questions.items()
    }


class LibraryBuilder:
    """Collects recordings, clips and pairs while a simulator runs."""

    def __init__(self) -> None:
        self.recordings: list[np.ndarray] = []
        self.clips: list[SourceClip] = []
        self.pairs: dict[str, list[ClipPair]] = {split: [] for split in SPLITS}

    def add_clip(
        self,
        frames: np.ndarray,
        *,
        name: str,
        split: str,
        group: str,
        pair: str = "",
        questions: Sequence[ClipQuestion] = (),
        backwards_questions: Sequence[ClipQuestion] = (),
    ) -> int:
        """Add a recording and its clip, and a second clip that plays it backwards if that one has questions.

        Returns:
            the index of the forward clip.
        """
        common = {"split": split, "group": group, "pair": pair, "recording": len(self.recordings)}
        self.recordings.append(np.ascontiguousarray(frames, dtype=np.uint8))
        self.clips.append(SourceClip(name=name, questions=tuple(questions), **common))
        number = len(self.clips) - 1
        if backwards_questions:
            self.clips.append(
                SourceClip(name=f"{name}_backwards", backwards=True, questions=tuple(backwards_questions), **common)
            )
        return number

    def add_pair(
        self,
        possible: np.ndarray,
        changed: np.ndarray,
        *,
        name: str,
        split: str,
        group: str,
        event: str,
        impossible: bool = True,
    ) -> None:
        """Add two clips that are equal up to the event, which is the first frame that differs.

        Raises:
            ValueError: if the clips are equal, or differ in the first frame already.
        """
        differs = (possible != changed).any(axis=(1, 2, 3))
        if differs[0] or not differs.any():
            raise ValueError(
                f"clips of the pair {name!r} differ in frames {np.flatnonzero(differs).tolist()}, expected one or more, but "
                "not the first"
            )
        common = {"split": split, "group": group, "pair": name}
        numbers = [
            self.add_clip(frames, name=f"{name}_{label}", **common)
            for label, frames in (("possible", possible), (event, changed))
        ]
        self.pairs[split].append(
            ClipPair(
                possible=numbers[0],
                changed=numbers[1],
                event=event,
                event_frame=int(differs.argmax()),
                impossible=impossible,
            )
        )


class SourceSettings(Protocol):
    """Frozen dataclass of all that the clips of a source depend on."""

    name: str
    num_frames: int
    frame_seconds: float

    def record(self) -> LibraryBuilder:
        """Run the simulator."""


def fingerprint_of(settings: Any) -> str:
    """Twelve hexadecimal digits of the settings, not of the code that draws or records the clips."""
    return hashlib.sha256(json.dumps(asdict(settings)).encode()).hexdigest()[:12]


def open_library(settings: SourceSettings, cache: Path) -> ClipLibrary:
    """The clips of a simulator, recorded into a folder of `cache` unless they lie there.

    Raises:
        ImportError: if the clips are not there and the simulator is not installed; names the extra that installs it.
    """
    folder = cache / f"{settings.name}-{fingerprint_of(settings)}"
    if not (folder / "clips.json").exists():
        _write(settings.record(), folder)
    content = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
    clips = [_clip_from_json(entry) for entry in content["clips"]]
    return ClipLibrary(
        recordings=np.load(folder / "frames.npy", mmap_mode="r"),
        clips=clips,
        questions=mixed_questions(clips),
        pairs={split: [ClipPair(**entry) for entry in entries] for split, entries in content["pairs"].items()},
        num_source_frames=settings.num_frames,
        frame_seconds=settings.frame_seconds,
        fingerprint=folder.name,
    )


def _clip_from_json(entry: dict[str, Any]) -> SourceClip:
    questions = tuple(
        ClipQuestion(**{**question, "choices": tuple(question["choices"])}) for question in entry["questions"]
    )
    return SourceClip(**{**entry, "questions": questions})


def _write(built: LibraryBuilder, folder: Path) -> None:
    """Write frames first and `clips.json` last: a folder that holds `clips.json` is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"frames.{os.getpid()}.unfinished"
    with unfinished.open("wb") as file:
        np.save(file, np.stack(built.recordings))
    unfinished.replace(folder / "frames.npy")
    content = {
        "clips": [asdict(clip) for clip in built.clips],
        "pairs": {split: [asdict(pair) for pair in pairs] for split, pairs in built.pairs.items()},
    }
    unfinished = folder / f"clips.{os.getpid()}.unfinished"
    unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")
    unfinished.replace(folder / "clips.json")


def join(libraries: Sequence[ClipLibrary]) -> ClipLibrary:
    """One library of all clips of several sources, numbered through.

    Raises:
        ValueError: if their clips have different numbers of frames or times between frames.
    """
    shapes = {(library.num_source_frames, library.frame_step, library.frame_seconds) for library in libraries}
    if len(shapes) != 1:
        raise ValueError(f"libraries have (frames, step, seconds) {sorted(shapes)}, expected the same for all")
    ((num_source_frames, frame_step, frame_seconds),) = shapes
    clips: list[SourceClip] = []
    pairs: dict[str, list[ClipPair]] = {split: [] for split in SPLITS}
    num_recordings = 0
    for library in libraries:
        first = len(clips)
        clips += [replace(clip, recording=clip.recording + num_recordings) for clip in library.clips]
        for split, own in library.pairs.items():
            pairs[split] += [
                replace(pair, possible=pair.possible + first, changed=pair.changed + first) for pair in own
            ]
        num_recordings += len(library.recordings)
    return ClipLibrary(
        recordings=ConcatDataset([library.recordings for library in libraries]),
        clips=clips,
        questions=mixed_questions(clips),
        pairs=pairs,
        num_source_frames=num_source_frames,
        frame_step=frame_step,
        frame_seconds=frame_seconds,
        fingerprint="+".join(library.fingerprint for library in libraries),
    )


def contact_sheet(library: ClipLibrary, rows: Sequence[tuple[str, int]], size: int = 56) -> Image.Image:
    """A picture with one row for each clip: its label, then its frames.

    Args:
        rows: label and index of each clip.
        size: side of a frame in pixels.
    """
    margin = 110
    sheet = Image.new("RGB", (margin + library.num_frames * (size + 2), len(rows) * (size + 2)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for row, (label, clip) in enumerate(rows):
        top = row * (size + 2)
        pen.text((4, top + size // 3), label, fill="black", font=font)
        for column, frame in enumerate(library.frames(clip)):
            sheet.paste(Image.fromarray(frame).resize((size, size)), (margin + column * (size + 2), top))
    return sheet


def sheet_rows(library: ClipLibrary) -> list[tuple[str, int]]:
    """The first test clip of each question type with its answer, and the first clip of each event."""
    rows: dict[str, tuple[str, int]] = {}
    for clip, question in library.questions["test"]:
        rows.setdefault(question.question_type, (f"{question.question_type}: {question.answer}", clip))
    for pair in library.pairs["test"]:
        name = pair.event if pair.impossible else f"{pair.event} (harmless)"
        rows.setdefault(f"event {pair.event}", (name, pair.changed))
    return list(rows.values())
