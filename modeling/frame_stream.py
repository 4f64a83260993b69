# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""A video read frame by frame, with the language model's cache: what came before a frame is not read again.

What comes out equals what the model makes of the whole video at once, since nothing in it looks ahead. Memory: each frame adds
its own tokens to the cache; what the head keeps does not grow (but for slow frames that stay visible to it). Time: the layers
run on the tokens of the frame alone, but these attend to all before them, so that a frame takes longer the later it comes.

Shape letters: T frames, P patches of the vision tower, P' patches of a frame on the grid of its target, Dv vision features.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from ..configuration.frame_token_layout import FrameType
from ..configuration.transformers_compat import CACHE_ARGUMENT
from .autoregressive_reconstruction import seconds_since
from .frame_predictor import resample_states
from .video_language_model import warn_beyond_positions


@dataclass
class FramePrediction:
    """What was predicted of one frame from the frames before it.

    Attributes:
        frame_index: its number in the video.
        frame_type: how it is pooled as a target.
        seconds: its time, since the first frame.
        prediction, copy: `[P', Dv]` float32, normalised as targets are: the prediction, and the frame before.
        grid: `(h, w)`, with `h * w = P'`.
        target: `[P', Dv]` float32, the frame itself; None as long as it has not been seen.
    """

    frame_index: int
    frame_type: FrameType
    seconds: float
    prediction: torch.Tensor
    copy: torch.Tensor
    grid: tuple[int, int]
    target: torch.Tensor | None = None


@dataclass
class _Frame:
    """What the next frame is predicted from."""

    hidden_states: torch.Tensor  # [h * w, hidden_size]
    layout_type: FrameType
    frame_type: int | None
    time: torch.Tensor  # as it was given
    seconds: torch.Tensor  # since the first frame
    teacher_features: torch.Tensor  # [P, Dv]


def as_times(times: torch.Tensor | np.ndarray | Sequence[float] | float) -> torch.Tensor:
    """Times on the CPU: a tensor or an array as it is, numbers of Python as float64 seconds, also where they are integers.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(times, np.ndarray):
        times = torch.from_numpy(times)
    if isinstance(times, torch.Tensor):
        return times.cpu()
    numbers = times if isinstance(times, Sequence) else [times]
    if any(isinstance(one, bool) or not isinstance(one, Real) for one in numbers):
        raise ValueError(f"times must be a tensor, an array, or seconds as numbers, got {times!r}")
    return torch.tensor(times, dtype=torch.float64)


class FrameStream:
    """Reads the frames of one video, and predicts each before it is read. Without gradient.

    Args:
        model: a `LlavaNextARForConditionalGeneration` with its head, in eval mode.
        prompt_ids: `[S]` or `[1, S]`, the text before the video; without one the video comes first.

    Raises:
        ValueError: if the model has no head, or one that looks ahead, or the prompt holds images or videos.
    """

    def __init__(self, model: Any, prompt_ids: torch.Tensor | None = None) -> None:
        if model.autoregressive_module is None:
            raise ValueError("this model was built with enable_autoregressive=False and has no head to predict with")
        self.num_frames = 0
        self._model, self._head, self._layout = model, model.autoregressive_module, model.config.frame_token_layout
        self._memory = self._head.open_memory()
        self._cache = DynamicCache(config=model.config.get_text_config())
        self._first_time: torch.Tensor | None = None
        self._last: _Frame | None = None
        self._next: FramePrediction | None = None
        if prompt_ids is not None and prompt_ids.numel():
            self._read_prompt(prompt_ids.reshape(-1).to(model.device))

    @torch.no_grad()
    def _read_prompt(self, prompt_ids: torch.Tensor) -> None:
        config = self._model.config
        for kind, token in (("image", config.image_token_id), ("video", config.video_token_id)):
            if (prompt_ids == token).any():
                raise ValueError(f"prompt_ids holds {kind} tokens, but a stream takes text alone before its one video")
        self._run_language_model(self._model.get_input_embeddings()(prompt_ids))

    def _run_language_model(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The next tokens `[L, hidden_size]` -> their last hidden states, of the same shape."""
        num_read = int(self._cache.get_seq_length())
        warn_beyond_positions(self._model.config, num_read, num_read + len(embeddings))
        cache = {CACHE_ARGUMENT: self._cache}
        output = self._model.model.language_model(inputs_embeds=embeddings[None], use_cache=True, **cache)
        return output.last_hidden_state[0]

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames `[T, 3, H, W]` -> what the projector reads of them, and what is to be predicted: `[T, P, Dv]` twice.

        Raises:
            ValueError: if there is no frame, or the frames have another number of dimensions.
        """
        if pixel_values.ndim != 4 or not len(pixel_values):
            raise ValueError(f"frames must be [T, 3, H, W], at least one, got the shape {list(pixel_values.shape)}")
        tower = self._model.model.vision_tower
        pixel_values = pixel_values.to(self._model.device)
        features = self._head.run_tower(tower, pixel_values)
        return features, self._head.teacher_features(tower, pixel_values, features)

    @torch.no_grad()
    def read(
        self,
        features: torch.Tensor,
        teacher_features: torch.Tensor,
        times: torch.Tensor | Sequence[float],
        frame_types: Sequence[int] | None = None,
    ) -> list[FramePrediction]:
        """Reads the next frames. Each is predicted from those before it; of the first of a video nothing is said.

        Frames that are given together go through the language model together: faster, and with the same result.

        Args:
            features, teacher_features: `[T, P, Dv]`, as `encode` returns them.
            times: `[T]` seconds, or a tensor of integers of nanoseconds; all calls in the same unit.
            frame_types: `[T]` slow (0) or fast (1), where the video processor chose them.

        Raises:
            ValueError: if there is no frame, times or types are not as many as the frames, times are not finite, decrease
                or are in another unit than those before, or the first frame has another time or type than the one that
                `predict` was asked for. Nothing was read then.
        """
        if features.ndim != 3 or not len(features):
            raise ValueError(
                f"features must be [T, P, Dv] of at least one frame, got the shape {list(features.shape)}"
            )
        if len(teacher_features) != len(features):
            raise ValueError(f"{len(features)} frames need as many teacher_features, got {len(teacher_features)}")
        num_frames, times = len(features), as_times(times)
        if times.shape != (num_frames,):
            raise ValueError(f"{num_frames} frames need as many times, got times of the shape {list(times.shape)}")
        seconds = self._seconds(times)
        types = self._layout.frame_types(num_frames, frame_types, first_frame=self.num_frames)
        known_types = types if self._layout.is_slow_fast else frame_types  # as in the head's `forward`
        if self._next is not None:
            expected = (self._next.seconds, self._next.frame_type)
            given = (float(seconds[0]), self._target_type(None if known_types is None else known_types[0]))
            if given != expected:
                expected, given = (f"{time} s as a {kind.name.lower()} frame" for time, kind in (expected, given))
                raise ValueError(f"the next frame was predicted for {expected}, but is given for {given}")
        tokens = self._layout.video(num_frames, types)
        model = self._model.model
        embeddings = self._layout.assemble(
            model.multi_modal_projector(features), model.image_newline, model.faster_token, types
        )
        is_of_a_frame = tokens.frame >= 0  # all but the newline that may close the whole video
        hidden_states = self._run_language_model(embeddings[is_of_a_frame.to(embeddings.device)])
        hidden_states = hidden_states[tokens.patch_offsets.to(hidden_states.device)]
        hidden_states = hidden_states.split([height * width for height, width in tokens.frame_grids])
        if self._first_time is None:
            self._first_time = times[0]
        predictions = []
        for number, time in enumerate(times):
            frame_type = None if known_types is None else int(known_types[number])
            if self._last is not None:
                prediction = self._next or self.predict(time, frame_type)
                (prediction.target,) = self._head.targets(teacher_features[number, None], prediction.frame_type)
                predictions.append(prediction)
            self._last = _Frame(
                hidden_states[number], types[number], frame_type, time, seconds[number], teacher_features[number]
            )
            self._next = None
            self.num_frames += 1
        return predictions

    @torch.no_grad()
    def predict(self, time: torch.Tensor | float, frame_type: int | None = None) -> FramePrediction:
        """Predicts the frame that comes next; `read` must then be given a frame of that time and type.

        Args:
            time: a scalar, as in `read`.
            frame_type: as in `read`; in a layout with slow and fast tokens, None counts on.

        Raises:
            ValueError: if no frame was read yet, the next one is predicted already, or the time is none that `read` takes.
        """
        last = self._last
        if last is None:
            raise ValueError("no frame was read yet, so that there is none to predict the next one from")
        if self._next is not None:
            raise ValueError(f"frame {self.num_frames} is predicted already; read it before the next one")
        if frame_type is None and self._layout.is_slow_fast:
            (frame_type,) = self._layout.frame_types(1, first_frame=self.num_frames)
        head, frame, device = self._head, self._layout.video(1, [last.layout_type]), last.hidden_states.device
        times = as_times(time)
        if times.numel() != 1:
            raise ValueError(f"one frame is predicted at a time, got the times {times.tolist()}")
        (seconds,) = self._seconds(times.reshape(1))
        kind, gap = self._target_type(frame_type), (seconds - last.seconds).to(device)
        states = head.step(last.hidden_states, frame, last.seconds.to(device), gap, last.frame_type, self._memory)
        grid = head.target_layout.frame_grid(kind)
        (states,) = resample_states(states[None], frame.frame_grids[0], grid)
        (copy,) = head.targets(last.teacher_features[None], kind)
        prediction = head.predict(states, copy)
        self._next = FramePrediction(self.num_frames, kind, float(seconds), prediction, copy, grid)
        return self._next

    def _target_type(self, frame_type: int | None) -> FrameType:
        """How the next frame is pooled as a target; `frame_type` as the head's `forward` takes it."""
        explicit = None if frame_type is None else [frame_type]
        return self._head.target_layout.frame_types(1, explicit, first_frame=self.num_frames)[0]

    def _seconds(self, times: torch.Tensor) -> torch.Tensor:
        """Times `[T]` of the next frames as float32 seconds since the first one, if they can be such times."""
        first = times[0] if self._first_time is None else self._first_time
        if times.is_floating_point() != first.is_floating_point():
            given, before = (
                f"{some.dtype} ({'seconds' if some.is_floating_point() else 'nanoseconds'})" for some in (times, first)
            )
            raise ValueError(f"times of one video must have one unit: got {times.tolist()} as {given} after {before}")
        if not times.isfinite().all():
            raise ValueError(f"times must be finite, got {times.tolist()}")
        seconds = seconds_since(first, times)
        # As they are used: the same time may have been given in another precision.
        known = [] if self._last is None else [float(self._last.seconds)]
        for earlier, later in itertools.pairwise([*known, *seconds.tolist()]):
            if later < earlier:
                raise ValueError(f"times must not decrease, but {later} comes after {earlier} (since the first)")
        return seconds
