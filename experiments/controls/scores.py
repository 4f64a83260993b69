"""Scores of clips: pixels, frozen features, geometry, and models with a head. Higher means less expected.

Shape letters: N clips, T frames, P patches, Dv features.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ...modeling.frame_surprise import SURPRISE_FLOOR, VideoSurprise
from ...training.collator import LlavaVideoCollator
from ..study.data import END, PAD, VIDEO
from ..study.features import FeatureBank
from .signals import geometric_signals

PLACES = ("mean", "max", "event")
"""Mean and maximum over all frames of a clip are event-agnostic; `event` is the frame of the event (oracle)."""


def pixel_scores(frames: np.ndarray) -> dict[str, np.ndarray]:
    """Frame difference of a clip by frame, `[T]`, NaN at the first: raw, and over the variance of the frame.

    Args:
        frames: `[T, H, W, 3]` uint8.
    """
    pixels = frames.astype(np.float64) / 255
    raw = np.square(np.diff(pixels, axis=0)).mean(axis=(1, 2, 3))
    floor = SURPRISE_FLOOR * pixels[1:].var(axis=(1, 2)).mean(-1)
    return _from_second({"pixel difference": raw, "pixel difference, normalized": raw / (raw + floor)})


def feature_scores(features: np.ndarray) -> dict[str, np.ndarray]:
    """Feature difference and `SIGNALS` of a clip by frame, `[T]`; NaN where not defined.

    The raw difference is the prediction error of a head that copies, as one does before training. The normalized one is the
    `model.surprise` of such a head.

    Args:
        features: `[T, P, Dv]` of frozen patches.
    """
    raw = np.square(np.diff(features.astype(np.float64), axis=0)).mean(axis=(1, 2))
    floor = SURPRISE_FLOOR * features[1:].astype(np.float64).var(axis=2).mean(-1)
    scores = _from_second({"feature difference": raw, "feature difference, normalized": raw / (raw + floor)})
    return scores | geometric_signals(features.reshape(len(features), -1))


def _from_second(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.append(np.nan, values) for name, values in scores.items()}


@torch.inference_mode()
def model_scores(model: Any, features: torch.Tensor, statistics: tuple, seconds: float) -> list[dict[str, np.ndarray]]:
    """Prediction error and `model.surprise` of each clip by frame, `[T]`, NaN at the first.

    Args:
        model: of the study.
        features: `[N, T, 1 + P, Dv]` of the tower, before they are standardized.
        statistics: mean and deviation by which the model's features were standardized.
        seconds: from one frame to the next.
    """
    num_clips, num_frames = features.shape[:2]
    model.model.vision_tower = FeatureBank(features.flatten(0, 1).numpy(), *statistics)
    layout = model.config.frame_token_layout
    ids = torch.tensor([VIDEO] * layout.num_tokens(num_frames) + [END])
    samples = [
        {
            "input_ids": ids,
            "labels": torch.full_like(ids, -100),
            "pixel_values_videos": (clip * num_frames + torch.arange(num_frames)).float().view(1, -1, 1, 1, 1),
            "video_frame_mask": torch.ones(1, num_frames, dtype=torch.bool),
            "video_timestamps": torch.arange(num_frames)[None] * seconds,
            "video_layout": layout.as_tensor()[None],
        }
        for clip in range(num_clips)
    ]
    batch = LlavaVideoCollator(PAD)(samples)
    surprises = model.surprise(**{name: value for name, value in batch.items() if name != "labels"})
    return [_scores_of_surprise(surprise) for surprise in surprises]


def _scores_of_surprise(surprise: VideoSurprise) -> dict[str, np.ndarray]:
    errors = np.array([float(frame.mean()) for frame in surprise.errors])
    return _from_second({"prediction error": errors, "surprise": surprise.frames.double().numpy()})


def clip_values(scores: Mapping[str, np.ndarray], event_frame: int) -> dict[str, dict[str, float]]:
    """By score and `PLACES` one number for a clip; NaN at an event frame for which a score is not defined."""
    return {
        name: {"mean": float(np.nanmean(values)), "max": float(np.nanmax(values)), "event": float(values[event_frame])}
        for name, values in scores.items()
    }


def untrained(model: Any, seed: int) -> Any:
    """The model with random weights in the last layer of its head, which starts at zero and copies the last frame."""
    generator = torch.Generator().manual_seed(seed)
    head = model.autoregressive_module
    layers = [module for module in head.modules() if isinstance(module, nn.Linear) and not module.weight.any()]
    if not layers:
        raise ValueError("the head has no layer at zero, expected a model without training")
    for layer in layers:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
    return model
