"""Pairs of clips for the controls: a possible clip, and the same clip with an impossible or a harmless event.

`PairedClips` is the interface; `DrawnPairs` fills it with the drawn clips of the temporal benchmark. Any library of clips fits
whose pairs have these attributes and whose clips are equal before the event.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ..study.data import DataSettings
from ..temporal.benchmark import BenchmarkClip, make_clips, render_clip

HARMLESS = ("light", "floor", "light throughout", "floor throughout")
IMPOSSIBLE = "impossible"
LIGHTS = (0.75, 1.25)  # factors of all pixels
FLOORS = ((1.25, 1.0, 0.75), (0.75, 1.0, 1.25))  # factors of red, green and blue where no shape is


class Pair(Protocol):
    """Two clips, given by index, that are equal before `event_frame`, the index of a frame that is shown.

    A change of the whole clip (`... throughout`) has the event frame of the impossible clip.
    """

    possible: int
    changed: int
    event: str
    event_frame: int
    impossible: bool


class PairedClips(Protocol):
    """A source of pairs, of the splits `val` (for thresholds) and `test`."""

    pairs: Mapping[str, Sequence[Pair]]
    frame_seconds: float

    def frames(self, clip: int) -> np.ndarray:
        """`[T, H, W, 3]` uint8, as many frames for each clip."""


@dataclass(frozen=True, kw_only=True)
class DrawnPair:
    """See `Pair`."""

    possible: int
    changed: int
    event: str
    event_frame: int
    impossible: bool


class DrawnPairs:
    """Pairs of the temporal benchmark as the study shows them, and harmless changes of each possible clip.

    | event | change |
    |---|---|
    | `light` | all pixels brighter or darker by a quarter, from the event frame on |
    | `floor` | all that is not a shape redder or bluer, from the event frame on |
    | `light throughout`, `floor throughout` | the same in the whole clip |

    Args:
        settings: of the study's data: numbers of pairs, frames and their size.
    """

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings
        self.frame_seconds = settings.frame_step / settings.fps
        self.pairs: dict[str, list[DrawnPair]] = {}
        self._clips: list[tuple[BenchmarkClip, str, int]] = []  # clip, change, event frame
        numbers = {"val": settings.num_val_pairs, "test": settings.num_test_pairs}
        options = {"seed": settings.seed, "num_frames": settings.num_frames, "levels": settings.levels}
        for split, number in numbers.items():
            clips = make_clips(2 * number, split=split, question_types=["possible"], **options)
            self.pairs[split] = []
            for possible, impossible in zip(clips[::2], clips[1::2], strict=True):
                notes = possible.draft.notes
                event_frame = -(-notes["event_frame"] // settings.frame_step)
                first = self._add(possible, "", event_frame)
                common = {"possible": first, "event_frame": event_frame}
                changed = self._add(impossible, "", event_frame)
                self.pairs[split].append(
                    DrawnPair(changed=changed, event=notes["event"], impossible=True, **common)
                )
                for change in HARMLESS:
                    changed = self._add(possible, change, event_frame)
                    self.pairs[split].append(DrawnPair(changed=changed, event=change, impossible=False, **common))

    def _add(self, clip: BenchmarkClip, change: str, event_frame: int) -> int:
        self._clips.append((clip, change, event_frame))
        return len(self._clips) - 1

    def frames(self, clip: int) -> np.ndarray:
        """`[T, H, W, 3]` uint8."""
        drawn, change, event_frame = self._clips[clip]
        frames = self._render(drawn)
        kind, _, throughout = change.partition(" ")
        if not change:
            return frames
        first = 0 if throughout else event_frame
        place = int(drawn.name[-4:]) // 2 % 2  # either direction equally often
        factors = np.full(3, LIGHTS[place]) if kind == "light" else np.array(FLOORS[place])
        is_changed = np.ones(frames.shape[:3], dtype=bool)
        if kind == "floor":
            empty = replace(drawn.draft, scenes=tuple(replace(scene, bodies=()) for scene in drawn.draft.scenes))
            is_changed = (frames == self._render(replace(drawn, draft=empty))).all(-1)
        is_changed[:first] = False
        tinted = np.rint(frames * factors).clip(0, 255).astype(np.uint8)
        return np.where(is_changed[..., None], tinted, frames)

    def _render(self, clip: BenchmarkClip) -> np.ndarray:
        return render_clip(clip, self.settings.image_size, self.settings.shown_frames)
