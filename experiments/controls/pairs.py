"""Harmless changes of the possible clips of a library's pairs: an event that must not be called impossible.

| change | pixels |
|---|---|
| `light` | all pixels brighter or darker by a quarter, from the event frame on |
| `floor` | pixels that equal those of most frames (needs a still camera), redder or bluer from the event frame on |
| `light throughout`, `floor throughout` | the same in the whole clip |
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..sources.clips import ClipLibrary, ClipPair, SourceClip

IMPOSSIBLE = "impossible"
LIGHT_CHANGES = ("light", "light throughout")
CHANGES = (*LIGHT_CHANGES, "floor", "floor throughout")
LIGHTS = (0.75, 1.25)  # factors of all pixels
FLOORS = ((1.25, 1.0, 0.75), (0.75, 1.0, 1.25))  # factors of red, green and blue
STILL = 8  # levels of 255 by which a pixel may differ from its median over time


def changed_frames(frames: np.ndarray, change: str, first: int, direction: int) -> np.ndarray:
    """A clip with a harmless change: `[T, H, W, 3]` uint8.

    Args:
        frames: `[T, H, W, 3]` uint8.
        change: one of `CHANGES`.
        first: frame from which it is seen, unless the change is `throughout`.
        direction: 0 or 1, which of the two factors.
    """
    kind, _, throughout = change.partition(" ")
    factors = np.full(3, LIGHTS[direction]) if kind == "light" else np.array(FLOORS[direction])
    is_changed = np.ones(frames.shape[:3], dtype=bool)
    if kind == "floor":
        is_changed = (np.abs(frames - np.median(frames, axis=0)) <= STILL).all(-1)
    is_changed[: 0 if throughout else first] = False
    return np.where(is_changed[..., None], np.rint(frames * factors).clip(0, 255).astype(np.uint8), frames)


class _WithChanges(Sequence):
    """Recordings of a library, and changed clips, drawn at each access."""

    def __init__(self, library: ClipLibrary, changed: Sequence[tuple[int, str, int, int]]) -> None:
        self._library, self._changed = library, changed

    def __len__(self) -> int:
        return len(self._library.recordings) + len(self._changed)

    def __getitem__(self, number: int) -> np.ndarray:
        if number < len(self._library.recordings):
            return self._library.recordings[number]
        clip, *change = self._changed[number - len(self._library.recordings)]
        return changed_frames(self._library.frames(clip), *change)


def with_harmless_pairs(library: ClipLibrary, changes: Sequence[str] = CHANGES) -> ClipLibrary:
    """The library with a further pair for each impossible one and each change: the possible clip and its changed copy."""
    changed: list[tuple[int, str, int, int]] = []
    clips, pairs = list(library.clips), {split: list(own) for split, own in library.pairs.items()}
    for split, own in library.pairs.items():
        for number, pair in enumerate(pair for pair in own if pair.impossible):
            for change in changes:
                name = f"{library.clips[pair.possible].name} {change}"
                recording = len(library.recordings) + len(changed)
                changed.append((pair.possible, change, pair.event_frame, number % 2))
                clips.append(SourceClip(name=name, split=split, group=change, recording=recording))
                new = ClipPair(
                    possible=pair.possible,
                    changed=len(clips) - 1,
                    event=change,
                    event_frame=pair.event_frame,
                    impossible=False,
                )
                pairs[split].append(new)
    return replace(library, recordings=_WithChanges(library, changed), clips=clips, pairs=pairs)
