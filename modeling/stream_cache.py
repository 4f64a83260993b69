# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Cache of a long video in a fixed number of tokens: the prompt, the first frames, and the recent or the most surprising ones.

The prompt and the first frames are kept as attention sinks (StreamingLLM, arXiv 2309.17453). Selection by surprise follows
Cambrian-S (arXiv 2511.04670). Whole frames are evicted. The keys and values of a kept frame depend on the frames that it
attended to, also on evicted ones.

Positions are contiguous, as in StreamingLLM: a kept token stands where it would if the evicted frames had not been there.
So positions stay below `max_tokens`, also after days of video; positions that grow would leave the trained range, and predict
worse (docs/study.md). A frame that moved is rotated from the keys that the language model wrote, by the difference of two
integers. Rotating keys again that were rotated before would add a rounding error with each eviction: after 2,000 in bfloat16,
the error is as large as the keys.
"""

import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

KeepRule = Literal["recent", "surprise"]


@dataclass
class _CachedFrame:
    index: int  # in the video
    num_tokens: int
    written_at: int  # position of its first token when its keys were computed
    surprise: float = 0.0


class _Rotation:
    """Rotary embedding of differences in position; float32, with angles from float64.

    Args:
        frequencies: `[R]` radians per position; `2 * R` is the number of rotated features of a key.
    """

    def __init__(self, frequencies: torch.Tensor) -> None:
        self._frequencies = frequencies.double().cpu()
        self._device = frequencies.device
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None

    def set_shifts(self, shifts: list[int], num_tokens: list[int]) -> None:
        """Sets the differences in position of consecutive parts of the sequence, and the number of tokens of each."""
        self._angles = None
        if any(shifts):
            angles = torch.tensor(shifts, dtype=torch.float64)[:, None] * self._frequencies
            self._angles = tuple(
                values.float().to(self._device).repeat_interleave(torch.tensor(num_tokens, device=self._device), dim=0)
                for values in (angles.cos(), angles.sin())
            )

    def __call__(self, keys: torch.Tensor) -> torch.Tensor:
        """Rotates the keys `[B, heads, L, D]` of the parts that were set; later keys stay as they are."""
        if self._angles is None:
            return keys
        cos, sin = (values.to(keys.device) for values in self._angles)
        num_tokens, width = cos.shape
        left, right = keys[:, :, :num_tokens, : 2 * width].float().split(width, dim=-1)
        rotated = keys.clone()
        rotated[:, :, :num_tokens, :width] = (left * cos - right * sin).to(keys.dtype)
        rotated[:, :, :num_tokens, width : 2 * width] = (right * cos + left * sin).to(keys.dtype)
        return rotated


class _RotatedLayer(DynamicLayer):
    """Stores keys as they were written, and returns them rotated."""

    def __init__(self, rotation: _Rotation) -> None:
        super().__init__()
        self._rotation = rotation

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(*args, **kwargs)
        return self._rotation(keys), values

    def keep(self, tokens: torch.Tensor) -> None:
        """Drops all tokens but those at the given indices."""
        tokens = tokens.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(2, tokens), self.values.index_select(2, tokens)


class StreamCache(Cache):
    """Keys and values of one stream, at most `max_tokens` of each layer.

    Frames are evicted in this order, until the next one fits: those that `keep` ranks lowest, recent frames (the oldest first),
    first frames (the last one first).

    Args:
        language_model: a decoder with rotary positions and full attention in all layers.
        max_tokens: tokens of the prompt and of all kept frames.
        keep: "recent" ranks frames by time, "surprise" by surprise.
        num_first_frames: frames at the beginning that are kept.
        num_recent_frames: newest frames that are kept whatever their surprise, the one that is read included.

    Raises:
        ValueError: if an argument is out of range, or keys of this language model cannot be moved to other positions.
    """

    def __init__(
        self,
        language_model: Any,
        max_tokens: int,
        keep: KeepRule = "recent",
        num_first_frames: int = 1,
        num_recent_frames: int = 4,
    ) -> None:
        limits = {"max_tokens": (max_tokens, 1), "num_first_frames": (num_first_frames, 0)}
        for name, (value, minimum) in {**limits, "num_recent_frames": (num_recent_frames, 1)}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
        if keep not in get_args(KeepRule):
            raise ValueError(f"keep must be one of {', '.join(get_args(KeepRule))}, got {keep!r}")
        self._rotation = _Rotation(_rotary_frequencies(language_model, max_tokens))
        super().__init__(
            layers=[_RotatedLayer(self._rotation) for _ in DynamicCache(config=language_model.config).layers]
        )
        self._max_tokens, self._keep = max_tokens, keep
        self._num_first_frames, self._num_recent_frames = num_first_frames, num_recent_frames
        self._num_prompt_tokens: int | None = None
        self._frames: list[_CachedFrame] = []

    @property
    def frames(self) -> list[int]:
        """Indices of the kept frames, in the order of time."""
        return [frame.index for frame in self._frames]

    def set_surprise(self, surprise: float) -> None:
        """Sets the surprise of the newest frame."""
        self._frames[-1].surprise = surprise

    def make_room(self, index: int, num_tokens: int) -> None:
        """Evicts frames until the next one fits; the language model must read its `num_tokens` tokens then."""
        if self._num_prompt_tokens is None:
            self._num_prompt_tokens = int(self.get_seq_length())
        lengths = [frame.num_tokens for frame in self._frames]
        ranks = [self._rank(frame, index) for frame in self._frames]
        evicted: set[int] = set()
        for number in sorted(range(len(ranks)), key=ranks.__getitem__):
            if self._num_prompt_tokens + sum(lengths) + num_tokens <= self._max_tokens:
                break
            evicted.add(number)
            lengths[number] = 0
        if evicted:
            parts = torch.arange(self.get_seq_length()).split(
                [self._num_prompt_tokens, *(frame.num_tokens for frame in self._frames)]
            )
            kept = torch.cat([part for number, part in enumerate(parts, -1) if number not in evicted])
            for layer in self.layers:
                layer.keep(kept)
            self._frames = [frame for number, frame in enumerate(self._frames) if number not in evicted]
        shifts, position = [0], self._num_prompt_tokens
        for frame in self._frames:
            shifts.append(position - frame.written_at)
            position += frame.num_tokens
        self._rotation.set_shifts(shifts, [self._num_prompt_tokens, *(frame.num_tokens for frame in self._frames)])
        self._frames.append(_CachedFrame(index, num_tokens, written_at=position))

    def _rank(self, frame: _CachedFrame, next_index: int) -> tuple[int, float]:
        """Sorting key of a frame; the frame with the lowest one is evicted first."""
        if frame.index < self._num_first_frames:
            return 2, -frame.index
        if self._keep == "recent" or frame.index > next_index - self._num_recent_frames:
            return 1, frame.index
        return 0, frame.surprise

    def to_dynamic(self, config: Any) -> DynamicCache:
        """Copies the kept tokens, at their present positions, into a cache that `generate` takes."""
        cache = DynamicCache(config=config)
        for number, layer in enumerate(self.layers):
            if layer.get_seq_length():
                cache.update(self._rotation(layer.keys), layer.values, number)
        return cache


def _rotary_frequencies(language_model: Any, max_tokens: int) -> torch.Tensor:
    """Frequencies `[R]` of the rotary embedding, checked at the last position against the one that the model applies.

    Raises:
        ValueError: if the model has no such embedding, one that changes with the length of the sequence, or layers whose
            caches hold anything else than all keys and values.
    """
    name = language_model.config.model_type
    layers = {type(layer) for layer in DynamicCache(config=language_model.config).layers}
    if layers != {DynamicLayer}:
        classes = ", ".join(sorted(layer.__name__ for layer in layers))
        raise ValueError(f"max_tokens needs full attention in each layer, but the caches of {name} are {classes}")
    rotary_emb = getattr(language_model, "rotary_emb", None)
    frequencies = getattr(rotary_emb, "inv_freq", None)
    apply = getattr(sys.modules[type(language_model).__module__], "apply_rotary_pos_emb", None)
    if frequencies is None or apply is None:
        raise ValueError(f"max_tokens needs a language model with one rotary embedding, and {name} has none")
    keys, rotation = torch.linspace(-1, 1, 2 * len(frequencies), device=frequencies.device), _Rotation(frequencies)
    keys = keys.expand(1, 1, 1, -1)
    written, expected = (
        apply(keys.clone(), keys.clone(), *rotary_emb(keys, torch.tensor([[position]], device=keys.device)))[1]
        for position in (max_tokens, 0)
    )
    rotation.set_shifts([-max_tokens], [1])
    error = float((rotation(written) - expected).abs().max())
    if not error < 0.1:  # float32 angles of the model: 0.0009 at position 32767, 0.022 at 1000003
        rope_type = getattr(rotary_emb, "rope_type", "default")
        raise ValueError(
            f"keys of {name} (rope_type {rope_type!r}) cannot be moved to other positions within max_tokens={max_tokens}: the "
            f"rotation differs by {error:.2g}"
        )
    return frequencies
