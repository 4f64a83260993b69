# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Predictions of the head and their metrics, beside the baseline of copying the last frame.

Shape letters: M predicted frames (all but the first of each clip), T frames of one clip, P patches, Dv features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

SURPRISE_FLOOR = 0.1


class ShortRepr:
    """A dataclass whose repr shows shapes in the place of tensors, and lists as their length and distinct entries."""

    def __repr__(self) -> str:
        values = (f"{field.name}={_short(getattr(self, field.name))}" for field in fields(self))
        return f"{type(self).__name__}({', '.join(values)})"


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(list(value.shape))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list):
        return f"{len(value)} x {' or '.join(sorted(set(map(_short, value))))}"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


@dataclass(repr=False)
class NextFramePrediction(ShortRepr):
    """Next-frame predictions for one video. Entry i belongs to frame `frame_index[i]`.

    Attributes:
        frame_index: `[M]` int64.
        predictions, targets, copies: for each predicted frame `[P, Dv]` float32: predicted, true, and the frame before.
        grids: `(h, w)` of each predicted frame.
        frame_metrics: name -> `[M]` float32: `mse`, `copy_mse`, `cosine`, `temporal_consistency`.
        metrics: their means over frames, and `skill = 1 - mse / copy_mse` (horizon 1): 0 is as good as copying the last
            frame. NaN for a static clip, in which `copy_mse` is 0.
        video_index: number of the video in the batch.
    """

    frame_index: torch.Tensor
    predictions: list[torch.Tensor]
    targets: list[torch.Tensor]
    copies: list[torch.Tensor]
    grids: list[tuple[int, int]]
    frame_metrics: dict[str, torch.Tensor]
    metrics: dict[str, float]
    video_index: int = 0

    def plot(self, ax: Any = None) -> Any:
        """Draws the error of each frame beside that of copying the frame before, into axes of matplotlib, and returns these.

        Raises:
            ImportError: if no axes are given and matplotlib is not installed.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
            ax = pyplot.subplots(figsize=(8, 3), layout="constrained")[1]
        frames = self.frame_index.cpu().numpy()
        for name, label in (("copy_mse", "copying the last frame"), ("mse", "prediction")):
            ax.plot(frames, self.frame_metrics[name].cpu().numpy(), marker=".", label=label)
        ax.set(xlabel="frame", ylabel="mean squared error", ylim=(0, None), title=f"skill {self.metrics['skill']:.3f}")
        ax.legend()
        return ax


@dataclass
class Reconstruction(ModelOutput):
    """Next-frame predictions for a batch of clips. Frames of different grids are padded to the largest.

    Args:
        loss_per_video (`torch.FloatTensor` of shape `(num_videos,)`): unweighted loss of each clip with two frames or
            more: mean over patches, then over predicted frames.
        video_index (`torch.LongTensor` of shape `(num_videos,)`): numbers of the clips in the batch.
        predictions, targets, copies (`torch.FloatTensor` of shape `(M, P, Dv)`): predicted and true features of each
            predicted frame, and the copy-last-frame baseline, all normalised as the targets are.
        patch_mask (`torch.BoolTensor` of shape `(M, P)`): True at patches that exist.
        frame_video, frame_index (`torch.LongTensor` of shape `(M,)`): the clip, and the frame in it, that is predicted.
        candidates (`tuple` of `torch.FloatTensor`): for each predicted frame, all frames of its clip on its grid
            `(T, P, Dv)`; views of few tensors.
        grids (`torch.LongTensor` of shape `(M, 2)`): grid of each predicted frame.
    """

    loss_per_video: torch.FloatTensor | None = None
    video_index: torch.LongTensor | None = None
    predictions: torch.FloatTensor | None = None
    targets: torch.FloatTensor | None = None
    copies: torch.FloatTensor | None = None
    patch_mask: torch.BoolTensor | None = None
    frame_video: torch.LongTensor | None = None
    frame_index: torch.LongTensor | None = None
    candidates: tuple[torch.FloatTensor, ...] | None = None
    grids: torch.LongTensor | None = None

    @torch.no_grad()
    def frame_metrics(self) -> dict[str, torch.Tensor]:
        """Metrics of each predicted frame, each `[M]` float32.

        `mse`, `copy_mse`, `cosine` (mean over patches), `temporal_consistency` (1.0 where the true next frame is nearer to
        the prediction than every other frame of the clip; equally near is not nearer).
        """
        mask = self.patch_mask
        count = mask.sum(1)
        mse, copy_mse = (
            ((features.float() - self.targets.float()).square().mean(-1) * mask).sum(1) / count
            for features in (self.predictions, self.copies)
        )
        cosine = nn.functional.cosine_similarity(self.predictions.float(), self.targets.float(), dim=-1)
        consistency = torch.zeros_like(mse)
        for m, (frame, frames) in enumerate(zip(self.frame_index.tolist(), self.candidates, strict=True)):
            prediction = self.predictions[m, : frames.shape[1]].float()
            distance = (frames.float() - prediction).square().flatten(1).sum(1)  # [T]
            distractors = distance.clone()
            distractors[frame] = math.inf
            consistency[m] = distance[frame] < distractors.min()
        return {
            "mse": mse,
            "copy_mse": copy_mse,
            "cosine": (cosine * mask).sum(1) / count,
            "temporal_consistency": consistency,
        }

    @torch.no_grad()
    def patch_errors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error of the prediction and of the copy baseline, mean over features: two `[M, P]`, 0 at padding."""
        return tuple(
            (features.float() - self.targets.float()).square().mean(-1) * self.patch_mask
            for features in (self.predictions, self.copies)
        )

    @torch.no_grad()
    def per_video(self) -> list[NextFramePrediction]:
        """Predictions of each video of two frames or more, without padding and with the metrics."""
        frame_metrics = self.frame_metrics()
        predictions = []
        for video in self.video_index.tolist():
            frames = (self.frame_video == video).nonzero().squeeze(1)
            video_metrics = {name: values[frames] for name, values in frame_metrics.items()}
            sizes = self.patch_mask[frames].sum(1).tolist()
            predictions.append(
                NextFramePrediction(
                    frame_index=self.frame_index[frames],
                    predictions=_unpadded(self.predictions[frames], sizes),
                    targets=_unpadded(self.targets[frames], sizes),
                    copies=_unpadded(self.copies[frames], sizes),
                    grids=[(height, width) for height, width in self.grids[frames].tolist()],
                    frame_metrics=video_metrics,
                    metrics=summarize_frame_metrics(video_metrics),
                    video_index=video,
                )
            )
        return predictions


def summarize_frame_metrics(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means over frames, and `skill = 1 - mse / copy_mse` of the means.

    `skill` is NaN for clips without any change (`copy_mse` 0), which have no baseline to improve on.
    """
    means = {name: values.double().mean().item() for name, values in metrics.items()}
    means["skill"] = 1 - means["mse"] / means["copy_mse"] if means["copy_mse"] > 0 else math.nan
    return means


def check_floor(floor: float) -> None:
    """Raises ValueError unless a floor is a positive, finite number."""
    if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 < floor < math.inf:
        raise ValueError(f"floor must be a positive share of the features' variance, got {floor!r}")


def surprise_terms(
    prediction: torch.Tensor, target: torch.Tensor, copy: torch.Tensor, floor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Terms of the surprise of a frame (see `frame_surprise`), from `[P, Dv]` each: error `[P]` of the prediction, error `[P]`
    of the copy, and the scalar `floor * variance`."""
    error, copy_error = ((features.float() - target.float()).square().mean(-1) for features in (prediction, copy))
    return error, copy_error, floor * target.float().var(-1, correction=0).mean()


def straight_line(frames: torch.Tensor, times: Sequence[float], time: float) -> torch.Tensor:
    """Baseline of constant motion: the last two frames, continued in a straight line to another time.

    Args:
        frames: `[T, P, Dv]`.
        times: T numbers, in any unit. Not a tensor: each number of one would be a transfer from its device.
        time: in the same unit.

    Returns:
        `[P, Dv]`; the last frame if T is 1, or the last two have the same time.
    """
    gap = times[-1] - times[-2] if len(frames) > 1 else 0
    # Numbers of Python, in which differences of nanoseconds are exact.
    return frames[-1] + (frames[-1] - frames[-2]) * ((time - times[-1]) / gap) if gap > 0 else frames[-1]


def _unpadded(values: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    return [row[:size] for row, size in zip(values, sizes, strict=True)]
