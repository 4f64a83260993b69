# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Rollouts: each predicted frame is fed back through the language model, and the next one is predicted from it.

The head predicts pooled and normalised features, the language model reads unpooled features of the tower. So the input that
is fed back is the last frame plus the predicted change, in the scale of that frame: a head that predicts no change imagines the
last frame again, exactly as the language model read it.

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
    """Imagined frames of one video. All lists have K entries; features are normalised as targets are.

    All tensors are on the device of the features.

    Attributes:
        frame_index: `[K]` int64, their numbers in the video.
        seconds: `[K]` float32, their times since the first frame.
        grids: `(h, w)` of each frame, with `h * w = P'`.
        predictions: `[P', Dv]` float32 of each.
        copies: `[P', Dv]` float32, the last frame that was read, on the grid of each.
        extrapolations: `[P', Dv]` float32, the last two frames that were read, continued in a straight line to the time of
            each; the copy where only one was read.
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
    """Implements the model's `imagine`; see there."""
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
    num_prompts, num_videos = (0 if tensor is None else len(tensor) for tensor in (ids, pixels))
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
        min_frames = num_frames + 1 if hold_back else 1
        if length < min_frames:
            raise ValueError(
                f"video {video} has {length} frames; to imagine {num_frames} it needs at least {min_frames}"
            )
        video_types = None if types is None else types[video, :length].tolist()
        is_video = ids[video] == model.config.video_token_id
        num_tokens = model.config.frame_token_layout.num_tokens(length, video_types)
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
                video_types,
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
    """Reads the frames of one video, then the imagined ones."""
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
    last_frame, predictions = seen[-1:].float(), []  # in bfloat16, small changes would be rounded away
    for number, time in enumerate(times):
        frame_type = None if frame_types is None else frame_types[number]
        predictions.append(stream.predict(time, frame_type))
        last_frame = last_frame + _change(head, last_frame, predictions[-1])
        stream.read(last_frame.to(seen.dtype), last_frame, time[None], None if frame_type is None else [frame_type])

    on_grid = {
        frame_type: head.targets(features, frame_type) for frame_type in {frame.frame_type for frame in predictions}
    }
    clips = [on_grid[frame.frame_type] for frame in predictions]  # [T, P', Dv] on the grid of each imagined frame
    index = range(num_seen, num_seen + num_frames)
    return ImaginedFrames(
        frame_index=torch.tensor(index, device=features.device),
        seconds=torch.tensor([frame.seconds for frame in predictions], dtype=torch.float32, device=features.device),
        grids=[frame.grid for frame in predictions],
        predictions=[frame.prediction for frame in predictions],
        copies=[clip[num_seen - 1] for clip in clips],
        extrapolations=[
            straight_line(clip[:num_seen], seen_times.tolist(), time)
            for clip, time in zip(clips, times.tolist(), strict=True)
        ],
        targets=[clip[frame] for clip, frame in zip(clips, index, strict=True)] if hold_back else None,
        candidates=clips if hold_back else None,
    )


def _times_after(times: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Times of the next frames, as far apart as the last two; one second apart after a single frame.

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
    """The predicted change of a frame `[1, P, Dv]`, in the scale of that frame and on all its patches: `[P, Dv]`."""
    layout = head.target_layout
    change = prediction.prediction - prediction.copy
    if head.config.target_norm:
        pooled = layout.pool(features, prediction.frame_type)[0]
        change = change * (pooled.var(-1, correction=0, keepdim=True) + LAYER_NORM_EPS).sqrt()
    return layout.unpool(change, prediction.frame_type)
