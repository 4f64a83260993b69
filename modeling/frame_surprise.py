# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""How surprising each frame of a video is, and each patch of it: how far the head's prediction missed, against copying.

    surprise = error / (copy_error + floor * variance)

with mean squared errors over features. Copying the last frame misses by as much as the picture changed, so that motion which
is foreseen gives little, however fast it is. The floor, a share of the variance of the features, keeps patches in which nothing
changes from being surprising by their noise: 1 is the error of copying plus the floor. Copying itself has
`copy_error / (copy_error + floor * variance)`, which is below 1, and far below where little moves.

Kin: surprise as the error of latent prediction in V-JEPA (arXiv 2502.11831) and Cambrian-S (arXiv 2511.04670), there without
a baseline.

Shape letters: T frames, M predicted frames, h x w patches of a frame on the grid of its target.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .autoregressive_reconstruction import seconds_since
from .frame_stream import FrameStream
from .reconstruction_metrics import Reconstruction, ShortRepr

SURPRISE_FLOOR = 0.1


@dataclass(repr=False)
class VideoSurprise(ShortRepr):
    """Surprise of each frame that could be predicted: all of a video but the first.

    Attributes:
        frame_index: `[M]` int64, which frames these are.
        seconds: `[M]` float32, their times since the first frame.
        frames: `[M]` float32, the surprise of each frame: its mean error over its mean copy error (and floor).
        patches: for each frame `[h, w]` float32, the surprise of each patch.
        errors, copy_errors: for each frame `[h, w]` float32: squared error of the prediction and of copying the frame
            before, mean over features.
        floors: `[M]` float32, the squared error that is added to the copy error of each frame, of its patches too.
        video_index: which video of the batch this is; 0 in a stream.
    """

    frame_index: torch.Tensor
    seconds: torch.Tensor
    frames: torch.Tensor
    patches: list[torch.Tensor]
    errors: list[torch.Tensor]
    copy_errors: list[torch.Tensor]
    floors: torch.Tensor
    video_index: int = 0


def check_floor(floor: float) -> None:
    """Raises ValueError unless a floor is a positive, finite number."""
    if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 < floor < math.inf:
        raise ValueError(f"floor must be a positive share of the features' variance, got {floor!r}")


@torch.no_grad()
def measure_surprise(
    frame_index: Sequence[int],
    seconds: Sequence[float],
    predictions: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    copies: Sequence[torch.Tensor],
    grids: Sequence[tuple[int, int]],
    floor: float = SURPRISE_FLOOR,
    video_index: int = 0,
) -> VideoSurprise:
    """Compares what was predicted of M frames with what came; all arguments have M entries.

    Args:
        frame_index, seconds: number of each frame, and its time since the first of the video.
        predictions, targets, copies: `[h * w, Dv]` of each frame: predicted, true, and the frame before.
        grids: `(h, w)` of each frame.
        floor: see the module.
        video_index: which video of the batch this is.

    Raises:
        ValueError: if the floor is not a positive number.
    """
    check_floor(floor)
    errors, copy_errors, patches, frames, floors = [], [], [], [], []
    for prediction, target, copy, grid in zip(predictions, targets, copies, grids, strict=True):
        error, copy_error = ((other.float() - target.float()).square().mean(-1) for other in (prediction, copy))
        least = floor * target.float().var(-1, correction=0).mean()
        frames.append(error.mean() / (copy_error.mean() + least))
        patches.append((error / (copy_error + least)).unflatten(0, grid))
        errors.append(error.unflatten(0, grid))
        copy_errors.append(copy_error.unflatten(0, grid))
        floors.append(least)
    return VideoSurprise(
        frame_index=torch.tensor(frame_index, dtype=torch.long),
        seconds=torch.tensor(seconds, dtype=torch.float32),
        frames=torch.stack(frames).cpu() if frames else torch.zeros(0),
        patches=patches,
        errors=errors,
        copy_errors=copy_errors,
        floors=torch.stack(floors).cpu() if floors else torch.zeros(0),
        video_index=video_index,
    )


@torch.no_grad()
def surprise_of_videos(
    reconstruction: Reconstruction, timestamps: torch.Tensor | None, floor: float = SURPRISE_FLOOR
) -> list[VideoSurprise]:
    """Surprise of each video with two frames or more (see its `video_index`), in the order of the batch.

    Args:
        reconstruction: predictions of a whole batch.
        timestamps: `[N, T]` seconds or integers of nanoseconds of all its videos; one second apart if None.
        floor: see the module.
    """
    surprises = []
    for own in reconstruction.per_video():
        video = own.video_index
        frames = own.frame_index.cpu()
        seconds = frames.float()
        if timestamps is not None:
            seconds = seconds_since(timestamps[video, 0], timestamps[video]).cpu()[frames]
        surprises.append(
            measure_surprise(
                frames.tolist(), seconds.tolist(), own.predictions, own.targets, own.copies, own.grids, floor, video
            )
        )
    return surprises


class SurpriseStream:
    """Surprise of a video that is still going on: each frame is read once, and what came before it is in the cache.

    Equal to `surprise` of the whole video after the same text. Memory grows by the same amount with every frame, the
    tokens of that frame in the language model's cache; the time of a frame grows with what came before (`FrameStream`).

    Args:
        model: a `LlavaNextARForConditionalGeneration` with its head, in eval mode.
        prompt_ids: `[S]` or `[1, S]`, the text before the video; without one the video comes first.
        floor: see the module.

    Raises:
        ValueError: as `FrameStream`, or if the floor is not a positive number.
    """

    def __init__(self, model: Any, prompt_ids: torch.Tensor | None = None, *, floor: float = SURPRISE_FLOOR) -> None:
        check_floor(floor)
        self._floor = floor
        self._stream = FrameStream(model, prompt_ids)

    @property
    def num_frames(self) -> int:
        """Frames that were read so far."""
        return self._stream.num_frames

    def read(
        self,
        pixel_values: torch.Tensor,
        times: torch.Tensor | Sequence[float],
        frame_types: Sequence[int] | None = None,
    ) -> VideoSurprise:
        """The next frames, one or several, and how surprising they are; of the first frame of all nothing is said.

        Args:
            pixel_values: `[T, 3, H, W]`, as the video processor prepares them.
            times: `[T]` seconds, or a tensor of integers of nanoseconds; all calls in the same unit.
            frame_types: `[T]` slow (0) or fast (1), where the video processor chose them.

        Raises:
            ValueError: as `FrameStream.encode` and `FrameStream.read`.
        """
        read = self._stream.read(*self._stream.encode(pixel_values), times, frame_types)
        return measure_surprise(
            [frame.frame_index for frame in read],
            [frame.seconds for frame in read],
            [frame.prediction for frame in read],
            [frame.target for frame in read],
            [frame.copy for frame in read],
            [frame.grid for frame in read],
            self._floor,
        )
