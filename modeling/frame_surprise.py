# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Surprise of frames and patches: error of the head's prediction relative to copying the last frame.

    surprise = error / (copy_error + floor * variance)

with mean squared errors over features. The error of copying grows with the change between two frames, so that foreseen motion
gives a low surprise, however fast it is. The floor is a share of the variance of the features: noise in static regions does not
count as surprise. 1 is the error of copying plus the floor. Copying itself has `copy_error / (copy_error + floor * variance)`,
which is below 1, and far below where little moves.

Related work: surprise as the error of latent prediction in V-JEPA (arXiv 2502.11831) and Cambrian-S (arXiv 2511.04670), there
without a baseline.

Shape letters: T frames, M predicted frames, h x w patches of a frame on the grid of its target.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .autoregressive_reconstruction import seconds_since
from .frame_stream import FrameStream
from .reconstruction_metrics import SURPRISE_FLOOR, Reconstruction, ShortRepr, check_floor, surprise_terms


@dataclass(repr=False)
class VideoSurprise(ShortRepr):
    """Surprise of all frames of a video but the first.

    Attributes:
        frame_index: `[M]` int64, the numbers of the frames.
        seconds: `[M]` float32, their times since the first frame.
        frames: `[M]` float32, the surprise of each frame: its mean error over its mean copy error (and floor).
        patches: for each frame `[h, w]` float32, the surprise of each patch.
        errors, copy_errors: for each frame `[h, w]` float32: squared error of the prediction and of copying the frame
            before, mean over features.
        floors: `[M]` float32, the squared error that is added to the copy error of each frame, of its patches too.
        video_index: number of the video in the batch; 0 in a stream.
    """

    frame_index: torch.Tensor
    seconds: torch.Tensor
    frames: torch.Tensor
    patches: list[torch.Tensor]
    errors: list[torch.Tensor]
    copy_errors: list[torch.Tensor]
    floors: torch.Tensor
    video_index: int = 0


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
    """Measures the surprise of M frames from their predictions; all sequences have M entries.

    Args:
        frame_index, seconds: number of each frame, and its time since the first of the video.
        predictions, targets, copies: `[h * w, Dv]` of each frame: predicted, true, and the frame before.
        grids: `(h, w)` of each frame.
        floor: see the module.
        video_index: number of the video in the batch.

    Raises:
        ValueError: if the floor is not a positive number.
    """
    check_floor(floor)
    errors, copy_errors, patches, frames, floors = [], [], [], [], []
    for prediction, target, copy, grid in zip(predictions, targets, copies, grids, strict=True):
        error, copy_error, floor_error = surprise_terms(prediction, target, copy, floor)
        frames.append(error.mean() / (copy_error.mean() + floor_error))
        patches.append((error / (copy_error + floor_error)).unflatten(0, grid))
        errors.append(error.unflatten(0, grid))
        copy_errors.append(copy_error.unflatten(0, grid))
        floors.append(floor_error)
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
    for result in reconstruction.per_video():
        video = result.video_index
        frames = result.frame_index.cpu()
        seconds = frames.float()
        if timestamps is not None:
            seconds = seconds_since(timestamps[video, 0], timestamps[video]).cpu()[frames]
        surprises.append(
            measure_surprise(
                frames.tolist(),
                seconds.tolist(),
                result.predictions,
                result.targets,
                result.copies,
                result.grids,
                floor,
                video,
            )
        )
    return surprises


class SurpriseStream(FrameStream):
    """Surprise of a video frame by frame, with the earlier frames in the language model's cache.

    Without `max_tokens` equal to `surprise` of the whole video after the same text. Arguments and errors are those of
    `FrameStream`.
    """

    def read(
        self,
        pixel_values: torch.Tensor,
        times: torch.Tensor | Sequence[float],
        frame_types: Sequence[int] | None = None,
    ) -> VideoSurprise:
        """Reads one or more frames, and returns their surprise; the first frame of the video has none.

        Args:
            pixel_values: `[T, 3, H, W]`, as the video processor prepares them.
            times: `[T]` seconds, or a tensor of integers of nanoseconds; all calls in the same unit.
            frame_types: `[T]` slow (0) or fast (1), where the video processor chose them.

        Raises:
            ValueError: as `FrameStream.encode` and `FrameStream.read`.
        """
        frames = super().read(*self.encode(pixel_values), times, frame_types)
        return measure_surprise(
            [frame.frame_index for frame in frames],
            [frame.seconds for frame in frames],
            [frame.prediction for frame in frames],
            [frame.target for frame in frames],
            [frame.copy for frame in frames],
            [frame.grid for frame in frames],
            self._floor,
        )
