# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Prediction frame by frame, with the earlier frames in the language model's cache.

The predictions equal those for the whole video at once, since no part of the model looks ahead. Each frame adds its tokens to
the cache, and takes longer the more tokens it attends to. With `max_tokens` both are bounded (`StreamCache`), and the
predictions are approximations once a frame is evicted. The head keeps `num_hist - 1` frames and all visible slow frames.

Shape letters: T frames, P patches of the vision tower, P' patches of a frame on the grid of its target, Dv vision features.
"""

import copy
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
from .reconstruction_metrics import SURPRISE_FLOOR, check_floor, surprise_terms
from .stream_cache import KeepRule, StreamCache
from .video_language_model import warn_beyond_positions


@dataclass
class FramePrediction:
    """Prediction of one frame from the frames before it.

    Attributes:
        frame_index: number of the frame in the video.
        frame_type: pooling of the frame as a target.
        seconds: time of the frame since the first one.
        prediction, copy: `[P', Dv]` float32, normalised as targets are: the prediction, and the frame before.
        grid: `(h, w)`, with `h * w = P'`.
        target: `[P', Dv]` float32, the frame itself; None until it is read.
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
    """State of the last frame, from which the next one is predicted."""

    hidden_states: torch.Tensor  # [h * w, hidden_size]
    layout_type: FrameType
    frame_type: int | None
    time: torch.Tensor  # in the unit of the caller
    seconds: torch.Tensor  # since the first frame
    teacher_features: torch.Tensor  # [P, Dv]


def as_times(times: torch.Tensor | np.ndarray | Sequence[float] | float) -> torch.Tensor:
    """Moves times to the CPU; numbers of Python, also integers, become float64 seconds.

    Raises:
        ValueError: if an element is not a number.
    """
    if isinstance(times, np.ndarray):
        times = torch.from_numpy(times)
    if isinstance(times, torch.Tensor):
        return times.cpu()
    numbers = times if isinstance(times, Sequence) else [times]
    if any(isinstance(number, bool) or not isinstance(number, Real) for number in numbers):
        raise ValueError(f"times must be a tensor, an array, or seconds as numbers, got {times!r}")
    return torch.tensor(times, dtype=torch.float64)


class FrameStream:
    """Reads the frames of one video, and predicts each before it is read. Without gradient.

    Args:
        model: a `LlavaNextARForConditionalGeneration` with its head, in eval mode.
        prompt_ids: `[S]` or `[1, S]`, the text before the video; without one the video comes first.
        floor: of the surprise; see `frame_surprise`.
        max_tokens: size of the cache in tokens of prompt and frames; None keeps all frames.
        keep: frames that stay in a full cache: "recent" or "surprise" (see `StreamCache`).
        cache_options: `num_first_frames` and `num_recent_frames` of `StreamCache`.

    Raises:
        ValueError: if the model has no head, or one that looks ahead, the prompt holds images or videos, the floor is not a
            positive number, `max_tokens` is less than the prompt and one frame, or as `StreamCache`.
    """

    def __init__(
        self,
        model: Any,
        prompt_ids: torch.Tensor | None = None,
        *,
        floor: float = SURPRISE_FLOOR,
        max_tokens: int | None = None,
        keep: KeepRule = "recent",
        **cache_options: int,
    ) -> None:
        check_floor(floor)
        if model.autoregressive_module is None:
            raise ValueError("this model was built with enable_autoregressive=False and has no head to predict with")
        self.num_frames = 0
        self._model, self._head, self._layout = model, model.autoregressive_module, model.config.frame_token_layout
        self._memory = self._head.open_memory()
        self._floor, self._keep = floor, keep
        self._first_time: torch.Tensor | None = None
        self._last: _Frame | None = None
        self._next: FramePrediction | None = None
        prompt_ids = torch.tensor([]) if prompt_ids is None else prompt_ids.reshape(-1).to(model.device)
        self._cache = self._open_cache(len(prompt_ids), max_tokens, cache_options)
        if len(prompt_ids):
            self._read_prompt(prompt_ids)

    def _open_cache(
        self, num_prompt_tokens: int, max_tokens: int | None, options: dict[str, int]
    ) -> DynamicCache | StreamCache:
        if max_tokens is None:
            if self._keep != "recent" or options:
                given = {"keep": self._keep, **options}
                raise ValueError(f"{given} choose frames to keep, which needs max_tokens")
            return DynamicCache(config=self._model.config.get_text_config())
        cache = StreamCache(self._model.model.language_model, max_tokens, self._keep, **options)
        num_frame_tokens = self._layout.tokens_per_frame()
        if max_tokens < num_prompt_tokens + num_frame_tokens:
            raise ValueError(
                f"max_tokens={max_tokens} is less than the {num_prompt_tokens} tokens of the prompt and the "
                f"{num_frame_tokens} of one frame"
            )
        warn_beyond_positions(self._model.config, 0, max_tokens)
        return cache

    @property
    def kept_frames(self) -> list[int]:
        """Indices of the frames in the cache, in the order of time."""
        return self._cache.frames if isinstance(self._cache, StreamCache) else list(range(self.num_frames))

    @torch.no_grad()
    def _read_prompt(self, prompt_ids: torch.Tensor) -> None:
        self._check_text(prompt_ids, "prompt_ids")
        self._run_language_model(self._model.get_input_embeddings()(prompt_ids))

    def _check_text(self, token_ids: torch.Tensor, name: str) -> None:
        config = self._model.config
        for media, token in (("image", config.image_token_id), ("video", config.video_token_id)):
            if (token_ids == token).any():
                raise ValueError(f"{name} holds {media} tokens, but a stream takes text alone beside its one video")

    def _run_language_model(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Reads the next tokens `[L, hidden_size]`; returns their last hidden states, of the same shape."""
        if not isinstance(self._cache, StreamCache):  # else at construction
            num_read = int(self._cache.get_seq_length())
            warn_beyond_positions(self._model.config, num_read, num_read + len(embeddings))
        cache = {CACHE_ARGUMENT: self._cache}
        output = self._model.model.language_model(inputs_embeds=embeddings[None], use_cache=True, **cache)
        return output.last_hidden_state[0]

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes frames `[T, 3, H, W]`: inputs of the projector and targets of the head, `[T, P, Dv]` each.

        Raises:
            ValueError: if T is 0, or the frames have another number of dimensions.
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
        """Reads the next frames, and returns the prediction of each; the first frame of a video has none.

        Frames that are given together go through the language model together: faster, and with the same result. With
        `max_tokens` they go one by one.

        Args:
            features, teacher_features: `[T, P, Dv]`, as `encode` returns them.
            times: `[T]` seconds, or a tensor of integers of nanoseconds; all calls in the same unit.
            frame_types: `[T]` slow (0) or fast (1), where the video processor chose them.

        Raises:
            ValueError: if T is 0, times or types are not as many as the frames, times are not finite, decrease or are in
                another unit than those before, or the first frame has another time or type than `predict` was called with. The
                stream is unchanged then.
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
                expected, given = (
                    f"{time} s as a {frame_type.name.lower()} frame" for time, frame_type in (expected, given)
                )
                raise ValueError(f"the next frame was predicted for {expected}, but is given for {given}")
        predictions = []
        step = 1 if isinstance(self._cache, StreamCache) else num_frames
        for first in range(0, num_frames, step):
            hidden_states = self._hidden_states(features[first : first + step], types[first : first + step])
            self._first_time = times[0] if self._first_time is None else self._first_time
            for number, states in enumerate(hidden_states, first):
                frame_type = None if known_types is None else int(known_types[number])
                if self._last is not None:
                    prediction = self._next or self.predict(times[number], frame_type)
                    (prediction.target,) = self._head.targets(teacher_features[number, None], prediction.frame_type)
                    predictions.append(prediction)
                    if self._keep == "surprise":
                        self._cache.set_surprise(self._surprise(prediction))
                self._last = _Frame(
                    states, types[number], frame_type, times[number], seconds[number], teacher_features[number]
                )
                self._next = None
                self.num_frames += 1
        return predictions

    def _hidden_states(self, features: torch.Tensor, types: Sequence[FrameType]) -> tuple[torch.Tensor, ...]:
        """Reads the next frames `[T, P, Dv]`; returns the last hidden states `[h * w, hidden_size]` of each."""
        tokens, model = self._layout.video(len(features), types), self._model.model
        embeddings = self._layout.assemble(
            model.multi_modal_projector(features), model.image_newline, model.faster_token, types
        )
        is_of_a_frame = tokens.frame >= 0  # all but the newline that may close the whole video
        embeddings = embeddings[is_of_a_frame.to(embeddings.device)]
        if isinstance(self._cache, StreamCache):
            self._cache.make_room(self.num_frames, len(embeddings))
            self._memory.keep_only(self._cache.frames)
        hidden_states = self._run_language_model(embeddings)
        hidden_states = hidden_states[tokens.patch_offsets.to(hidden_states.device)]
        return hidden_states.split([height * width for height, width in tokens.frame_grids])

    def _surprise(self, frame: FramePrediction) -> float:
        error, copy_error, floor_error = surprise_terms(frame.prediction, frame.target, frame.copy, self._floor)
        return float(error.mean() / (copy_error.mean() + floor_error))

    @torch.no_grad()
    def generate_inputs(self, input_ids: torch.Tensor) -> dict[str, Any]:
        """Inputs of `generate` for a question about the frames in the cache: `model.generate(**inputs, max_new_tokens=64)`.

        The inputs hold a copy of the cache, so that the stream may go on. `generate` returns the question and the answer; it
        takes a cache for one answer without beams.

        Args:
            input_ids: `[S]` or `[1, S]`, the text after the video, up to the begin of the answer.

        Raises:
            ValueError: if the text is empty or holds images or videos, or no frame was read.
        """
        input_ids = input_ids.reshape(1, -1).to(self._model.device)
        if not input_ids.numel() or not self.num_frames:
            raise ValueError(
                f"a question needs text and frames, got {input_ids.numel()} tokens and {self.num_frames} frames"
            )
        self._check_text(input_ids, "input_ids")
        text_config, num_left = self._model.config.get_text_config(), int(self._cache.get_seq_length())
        if isinstance(self._cache, StreamCache):
            cache = self._cache.to_dynamic(text_config)
        else:
            cache = copy.deepcopy(self._cache)
        if int(self._layout.video(1).frame[-1]) < 0:  # the newline that closes the whole video
            newline = self._model.model.image_newline[None, None]
            self._model.model.language_model(inputs_embeds=newline, use_cache=True, **{CACHE_ARGUMENT: cache})
            num_left += 1
        attention_mask = input_ids.new_ones(1, num_left + input_ids.shape[1])
        return {"input_ids": input_ids, "attention_mask": attention_mask, CACHE_ARGUMENT: cache}

    @torch.no_grad()
    def predict(self, time: torch.Tensor | float, frame_type: int | None = None) -> FramePrediction:
        """Predicts the frame that comes next; `read` must then be given a frame of that time and type.

        Args:
            time: a scalar, as in `read`.
            frame_type: as in `read`; with slow and fast tokens, None stands for the type by number.

        Raises:
            ValueError: if no frame was read yet, the next one is predicted already, or `read` would reject the time.
        """
        last = self._last
        if last is None:
            raise ValueError("no frame was read yet, so that the next one cannot be predicted")
        if self._next is not None:
            raise ValueError(f"frame {self.num_frames} is predicted already; read it before the next one")
        if frame_type is None and self._layout.is_slow_fast:
            (frame_type,) = self._layout.frame_types(1, first_frame=self.num_frames)
        head, frame, device = self._head, self._layout.video(1, [last.layout_type]), last.hidden_states.device
        times = as_times(time)
        if times.numel() != 1:
            raise ValueError(f"one frame is predicted at a time, got the times {times.tolist()}")
        (seconds,) = self._seconds(times.reshape(1))
        target_type, gap = self._target_type(frame_type), (seconds - last.seconds).to(device)
        states = head.step(last.hidden_states, frame, last.seconds.to(device), gap, last.frame_type, self._memory)
        grid = head.target_layout.frame_grid(target_type)
        (states,) = resample_states(states[None], frame.frame_grids[0], grid)
        (baseline,) = head.targets(last.teacher_features[None], target_type)
        prediction = head.predict(states, baseline)
        self._next = FramePrediction(self.num_frames, target_type, float(seconds), prediction, baseline, grid)
        return self._next

    def _target_type(self, frame_type: int | None) -> FrameType:
        """Type by which the next frame is pooled as a target; `frame_type` as in the head's `forward`."""
        explicit = None if frame_type is None else [frame_type]
        return self._head.target_layout.frame_types(1, explicit, first_frame=self.num_frames)[0]

    def _seconds(self, times: torch.Tensor) -> torch.Tensor:
        """Validates times `[T]` of the next frames, and converts them to float32 seconds since the first one."""
        first = times[0] if self._first_time is None else self._first_time
        if times.is_floating_point() != first.is_floating_point():
            given, before = (
                f"{values.dtype} ({'seconds' if values.is_floating_point() else 'nanoseconds'})"
                for values in (times, first)
            )
            raise ValueError(f"times of one video must have one unit: got {times.tolist()} as {given} after {before}")
        if not times.isfinite().all():
            raise ValueError(f"times must be finite, got {times.tolist()}")
        seconds = seconds_since(first, times)
        # Compared in float32: the same time may have been given in another precision.
        before = [] if self._last is None else [float(self._last.seconds)]
        for earlier, later in itertools.pairwise([*before, *seconds.tolist()]):
            if later < earlier:
                raise ValueError(f"times must not decrease, but {later} comes after {earlier} (since the first)")
        return seconds
