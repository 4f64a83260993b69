# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Several frames ahead: what was predicted of a frame is fed back through the language model, and the next is predicted.

The head predicts pooled and normalised features, the language model reads unpooled ones as the tower makes them. So what is
fed back is the last frame with the predicted change added, in the scale of that frame: a head that predicts no change imagines
the last frame again, exactly as the language model read it.

Shape letters: K imagined frames, P patches of the vision tower, P' patches of a frame on the grid of its target, Dv vision
features.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..configuration.frame_token_layout import FrameTokenLayout, FrameType
from ..configuration.key_names import refuse_unknown
from .frame_predictor import stack_padded
from .frame_stream import FramePrediction, FrameStream, as_times
from .reconstruction_metrics import Reconstruction, ShortRepr, straight_line
from .video_language_model import video_lengths

LAYER_NORM_EPS = 1e-5  # of the targets' normalisation
INPUTS = (
    "input_ids",
    "attention_mask",
    "pixel_values_videos",
    "video_frame_mask",
    "video_frame_types",
    "video_timestamps",
    "video_layout",
    "labels",  # of a collator's batch; not read
)


@dataclass(repr=False)
class ImaginedFrames(ShortRepr):
    """Frames of one video that the model has not seen. All lists have K entries; features are normalised as targets are.

    All tensors are on the device of the features.

    Attributes:
        frame_index: `[K]` int64, their numbers in the video.
        seconds: `[K]` float32, their times since the first frame.
        grids: `(h, w)` of each frame, with `h * w = P'`.
        predictions: `[P', Dv]` float32 of each.
        copies: `[P', Dv]` float32, the last frame that was seen, on the grid of each.
        extrapolations: `[P', Dv]` float32, the last two frames that were seen, continued in a straight line to the time of
            each; the copy where only one was seen.
        targets: `[P', Dv]` float32, the true frames; None unless they were held back.
        candidates: `[T, P', Dv]` float32, all frames of the video on the grid of each; None unless frames were held back.
    """

    frame_index: torch.Tensor
    seconds: torch.Tensor
    grids: list[tuple[int, int]]
    predictions: list[torch.Tensor]
    copies: list[torch.Tensor]
    extrapolations: list[torch.Tensor]
    targets: list[torch.Tensor] | None = None
    candidates: list[torch.Tensor] | None = None

    def frame_metrics(self) -> dict[str, torch.Tensor]:
        """Metrics of each frame, each `[K]` float32: those of `Reconstruction`, and `linear_mse` of the extrapolation.

        Raises:
            ValueError: if no frames were held back to compare with.
        """
        if self.targets is None:
            raise ValueError("there is nothing to compare with: imagine with hold_back=True")
        counts = torch.tensor([len(target) for target in self.targets], device=self.targets[0].device)
        metrics = Reconstruction(
            predictions=stack_padded(self.predictions),
            targets=stack_padded(self.targets),
            copies=stack_padded(self.copies),
            patch_mask=torch.arange(int(counts.max()), device=counts.device) < counts[:, None],
            frame_index=self.frame_index,
            candidates=tuple(self.candidates),
        ).frame_metrics()
        errors = [
            (line - target).square().mean() for line, target in zip(self.extrapolations, self.targets, strict=True)
        ]
        return {**metrics, "linear_mse": torch.stack(errors)}


@torch.no_grad()
def imagine_videos(model: Any, num_frames: int, hold_back: bool, inputs: dict[str, Any]) -> list[ImaginedFrames]:
    """What the model's `imagine` returns; see there."""
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"num_frames must be an integer of at least 1, got {num_frames!r}")
    head = model.autoregressive_module
    if head is not None and not head.is_own_teacher(model.model.vision_tower):
        raise ValueError(
            "the vision tower was trained, or has adapters: what the head predicts are features of its frozen teacher, which "
            "the language model cannot read"
        )
    inputs = {name: value for name, value in inputs.items() if value is not None}
    ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values_videos")
    num_prompts, num_videos = (0 if some is None else len(some) for some in (ids, pixels))
    if not num_prompts or num_videos != num_prompts or "pixel_values" in inputs:
        images = " with images" if "pixel_values" in inputs else ""
        raise ValueError(
            f"imagine needs prompts of text and one video each, got {num_prompts} prompts (input_ids){images} and "
            f"{num_videos} videos (pixel_values_videos)"
        )
    refuse_unknown(inputs, INPUTS, "imagine")
    if "video_layout" in inputs:
        for row in inputs["video_layout"].unique(dim=0).cpu():
            model.config.frame_token_layout.check_same(FrameTokenLayout.from_tensor(row))
    times, types = inputs.get("video_timestamps"), inputs.get("video_frame_types")
    rollouts = []
    for video, length in enumerate(video_lengths(pixels, inputs.get("video_frame_mask"))):
        least = num_frames + 1 if hold_back else 1
        if length < least:
            raise ValueError(f"video {video} has {length} frames; to imagine {num_frames} it needs at least {least}")
        own_types = None if types is None else types[video, :length].tolist()
        is_video = ids[video] == model.config.video_token_id
        num_tokens = model.config.frame_token_layout.num_tokens(length, own_types)
        if int(is_video.sum()) != num_tokens:
            raise ValueError(
                f"prompt {video} holds {int(is_video.sum())} video placeholders, but its one video takes {num_tokens} tokens"
            )
        is_text = inputs["attention_mask"][video].bool() if "attention_mask" in inputs else torch.ones_like(is_video)
        prompt = ids[video][is_text & (is_video.cumsum(0) == 0)]
        rollouts.append(
            _imagine(
                model,
                prompt,
                pixels[video, :length],
                torch.arange(length).float() if times is None else times[video, :length],
                own_types,
                num_frames,
                hold_back,
            )
        )
    return rollouts


def _imagine(
    model: Any,
    prompt_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    times: torch.Tensor,
    frame_types: list[int] | None,
    num_frames: int,
    hold_back: bool,
) -> ImaginedFrames:
    """One video: its frames are read, then those that were imagined."""
    times = as_times(times)
    num_seen = len(times) - (num_frames if hold_back else 0)
    seen_times, times = times[:num_seen], times[num_seen:] if hold_back else _times_after(times, num_frames)
    seen_types = None
    if frame_types is not None:
        seen_types = frame_types[:num_seen]
        # The last ones of a clip are fast.
        frame_types = frame_types[num_seen:] if hold_back else [FrameType.FAST] * num_frames
    head, stream = model.autoregressive_module, FrameStream(model, prompt_ids)
    features, _ = stream.encode(pixel_values)
    seen = features[:num_seen]
    stream.read(seen, seen, seen_times, seen_types)
    last, predictions = seen[-1:].float(), []  # in bfloat16, small changes would be lost on the way
    for number, time in enumerate(times):
        own_type = None if frame_types is None else frame_types[number]
        predictions.append(stream.predict(time, own_type))
        last = last + _change(head, last, predictions[-1])
        stream.read(last.to(seen.dtype), last, time[None], None if own_type is None else [own_type])

    kinds = [one.frame_type for one in predictions]
    on_grid = {kind: head.targets(features, kind) for kind in set(kinds)}
    index = range(num_seen, num_seen + num_frames)
    return ImaginedFrames(
        frame_index=torch.tensor(index, device=features.device),
        seconds=torch.tensor([one.seconds for one in predictions], dtype=torch.float32, device=features.device),
        grids=[one.grid for one in predictions],
        predictions=[one.prediction for one in predictions],
        copies=[on_grid[kind][num_seen - 1] for kind in kinds],
        extrapolations=[
            straight_line(on_grid[kind][:num_seen], seen_times.tolist(), time)
            for kind, time in zip(kinds, times.tolist(), strict=True)
        ],
        targets=[on_grid[kind][frame] for kind, frame in zip(kinds, index, strict=True)] if hold_back else None,
        candidates=[on_grid[kind] for kind in kinds] if hold_back else None,
    )


def _times_after(times: torch.Tensor, num_frames: int) -> torch.Tensor:
    """As far apart as the last two; one second, as the head takes it, where there is one alone.

    Raises:
        ValueError: if the last two do not increase.
    """
    gap = 1 if times.is_floating_point() else 10**9
    if len(times) > 1:
        gap = times[-1] - times[-2]
        if not gap > 0:
            raise ValueError(
                f"the last two frames have the times {times[-2:].tolist()}: frames can go on only after times that increase"
            )
    return times[-1] + gap * torch.arange(1, num_frames + 1)


def _change(head: Any, features: torch.Tensor, prediction: FramePrediction) -> torch.Tensor:
    """A predicted change in the scale of the frame `[1, P, Dv]` that it starts from, on all of its patches: `[P, Dv]`."""
    layout = head.target_layout
    change = prediction.prediction - prediction.copy
    if head.config.target_norm:
        pooled = layout.pool(features, prediction.frame_type)[0]
        change = change * (pooled.var(-1, correction=0, keepdim=True) + LAYER_NORM_EPS).sqrt()
    return layout.unpool(change, prediction.frame_type)
