# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Parts of the predictor: a transformer with frame-level attention.

Shape letters: F frames of all clips together, P patches of a frame, E predictor width, K frames visible to a frame.
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration.frame_token_layout import DeviceTensors, FrameTokenLayout, FrameType
from .frame_masks import FrameLevelMaskGenerator


def sinusoids(values: torch.Tensor, wavelengths: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of `[...]` at each wavelength: `[..., 2 * len(wavelengths)]`."""
    angles = values[..., None] * (2 * math.pi / wavelengths)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def resample_states(states: torch.Tensor, grid: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """Resamples `[M, h * w, E]` on one grid to `[M, h' * w', E]` on another."""
    if grid == target:
        return states
    states = states.transpose(1, 2).unflatten(2, grid)
    return nn.functional.interpolate(states, size=list(target), mode="bilinear").flatten(2).transpose(1, 2)


def stack_padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stacks `[P_i, E]` tensors to `[F, P, E]`, shorter ones padded with zeros at the end.

    `pad_sequence` writes row by row into one tensor: its backward pass copies the whole gradient once for each row, at a cost
    quadratic in the number of frames.
    """
    longest = max(map(len, rows))
    return torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])


def in_order(groups: Sequence[torch.Tensor], order: torch.Tensor) -> torch.Tensor:
    """Concatenates `[M_i, P_i, ...]` or `[M_i]` tensors of groups of frames, padded with zeros, in the given order."""
    if len(groups) == 1:
        return groups[0]
    if groups[0].ndim > 1:
        longest = max(group.shape[1] for group in groups)
        groups = [nn.functional.pad(group, (0, 0, 0, longest - group.shape[1])) for group in groups]
    return torch.cat(list(groups)).index_select(0, order)


class ZeroInitializedLinear(nn.Linear):
    """A linear layer that starts at zero; the weight initialisation of the model selects it by its class."""

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        init.zeros_(self.bias)


class FrameAttention(nn.Module):
    """Self-attention of patches over the visible frames. Linear in the number of frames for a fixed window."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, visible: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        """`x` `[F, P, E]`, `visible` `[F, K]` frame indices, `key_mask` `[F, 1, 1, K * P]` (True = may attend)."""
        num_frames, num_patches, dim = x.shape
        qkv = self.qkv(x).view(num_frames, num_patches, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [F, heads, P, E / heads] each
        if visible.shape[1] > 1:
            # [F, K, heads, P, d] -> [F, heads, K * P, d]
            key, value = (states[visible].transpose(1, 2).flatten(2, 3) for states in (key, value))
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=key_mask)
        return self.out(attended.transpose(1, 2).reshape(num_frames, num_patches, dim))


class FramePredictorBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block.

    `forward` takes the states of all frames `x` `[F, P, E]`, the frames visible to each `visible` `[F, K]` (its own among
    them; shorter lists are filled up) and `key_mask` `[F, 1, 1, K * P]`, True at patches to attend to, or None for all. It
    returns the new states `[F, P, E]`.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = FrameAttention(dim, num_heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor, visible: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), visible, key_mask)
        return x + self.mlp(self.mlp_norm(x))


@dataclass(frozen=True)
class FrameGroup:
    """`count` predicted frames, pooled as `frame_type`: from frames on the grid `source` to frames on the grid `target`."""

    frame_type: FrameType
    source: tuple[int, int]
    target: tuple[int, int]
    count: int


@dataclass(frozen=True, eq=False)
class PredictionPlan:
    """Index arrays that assign predicted frames to source frames, for a batch of clips.

    Shape letters as in the module, of all clips together; P the most patches of a source frame, P' of a predicted one; M
    predicted frames; N clips of two frames or more, with R predicted frames at most.

    Attributes:
        num_frames: F.
        num_patches: P.
        is_ragged: source frames differ in their number of patches.
        is_masked: not every patch of `visible` may be attended to.
        has_lone_frames: a clip has one frame.
        groups: the M frames by grids.
        num_predicted: of each clip with two frames or more.
        videos: for each of the M frames its clip, and its type as a target.
        times: `[F]` first frame of each frame's clip, `[F]` and `[F]` the frames at both ends of its gap, `[F]` bool, True for
            the frame of a clip of one.
        attention: `[F, K]` visible frames, `[F, 1, 1, K * P]` bool mask of their patches, `[patches]` the slot of each patch
            in `[F * P]`.
        sources: the source frames of each group.
        frames: `[M]` index of each frame in the groups, `[M, P']` bool its patches, `[M]` its clip, `[M]` its number in it,
            `[M, 2]` its grid, `[M]` its slot in `[N * R]`, `[N]` the clips, `[N]` number of predicted frames of each.
    """

    num_frames: int
    num_patches: int
    is_ragged: bool
    is_masked: bool
    has_lone_frames: bool
    groups: tuple[FrameGroup, ...]
    num_predicted: tuple[int, ...]
    videos: tuple[tuple[int, FrameType], ...]
    times: DeviceTensors
    attention: DeviceTensors
    sources: DeviceTensors
    frames: DeviceTensors


@lru_cache(maxsize=16)
def plan_predictions(
    read_grids: tuple[tuple[int, int], ...],
    num_frames: tuple[int, ...],
    frame_types: tuple[tuple[int, ...] | None, ...],
    layout: FrameTokenLayout,
    window_size: int,
    uses_types: bool,
    is_causal: bool,
) -> PredictionPlan:
    """Plans the predictions of a batch of clips; the plan is cached.

    Args:
        read_grids: `(h, w)` of each frame as the language model reads it.
        num_frames: of each clip.
        frame_types: of each clip slow (0) or fast (1) for each frame, or None.
        layout: of the predicted frames.
        window_size, uses_types, is_causal: `num_hist`, `use_fast_slow_frames`, `use_frame_causal_mask` of the head.
    """
    first = np.cumsum((0, *num_frames))[:-1]
    number = np.concatenate([np.arange(length) for length in num_frames])  # of each frame in its clip
    first_of_frame, clip_of_frame = np.repeat(first, num_frames), np.repeat(np.arange(len(num_frames)), num_frames)
    length_of_frame = np.repeat(num_frames, num_frames)
    frames = np.arange(len(number))
    # The frame after the last has no time; its gap is taken to be the last one.
    gap_from = np.where((number == length_of_frame - 1) & (number > 0), frames - 1, frames)
    gap_to = np.minimum(gap_from + 1, first_of_frame + length_of_frame - 1)

    counts = np.array([height * width for height, width in read_grids])
    num_patches = int(counts.max())
    exists = np.arange(num_patches) < counts[:, None]  # [F, P]
    visible, valid = _visible_frames(num_frames, frame_types if uses_types else None, window_size, is_causal)
    key_mask = valid[:, :, None] & exists[visible]  # [F, K, P]

    target_types = [
        target_type
        for length, types in zip(num_frames, frame_types, strict=True)
        for target_type in layout.frame_types(length, types)
    ]
    predicted = frames[number > 0]
    indices: dict[tuple[tuple[int, int], FrameType], list[int]] = {}  # of each group
    for index, frame in enumerate(predicted):
        indices.setdefault((read_grids[frame - 1], target_types[frame]), []).append(index)
    groups = tuple(
        FrameGroup(target_type, source, layout.frame_grid(target_type), len(group))
        for (source, target_type), group in indices.items()
    )
    in_groups = np.argsort(np.concatenate([*indices.values(), np.empty(0)]), kind="stable")
    grids = tuple(layout.frame_grid(target_types[frame]) for frame in predicted)
    target_counts = np.array([height * width for height, width in grids], dtype=np.int64)
    clip, num_predicted = clip_of_frame[predicted], tuple(length - 1 for length in num_frames if length > 1)
    row = np.repeat(np.arange(len(num_predicted)), num_predicted)
    return PredictionPlan(
        num_frames=len(number),
        num_patches=num_patches,
        is_ragged=len(set(counts.tolist())) > 1,
        is_masked=not key_mask.all(),
        has_lone_frames=1 in num_frames,
        groups=groups,
        num_predicted=num_predicted,
        videos=tuple(zip(clip.tolist(), (target_types[frame] for frame in predicted), strict=True)),
        times=DeviceTensors((first_of_frame, gap_from, gap_to, length_of_frame == 1)),
        attention=DeviceTensors((visible, key_mask.reshape(len(number), 1, 1, -1), np.flatnonzero(exists))),
        sources=DeviceTensors(tuple(predicted[group] - 1 for group in indices.values())),
        frames=DeviceTensors(
            (
                in_groups,
                np.arange(target_counts.max(initial=0)) < target_counts[:, None],
                clip,
                number[predicted],
                np.array(grids, dtype=np.int64).reshape(-1, 2),
                row * max(num_predicted, default=0) + number[predicted] - 1,
                np.flatnonzero(np.array(num_frames) > 1),
                np.array(num_predicted, dtype=np.int64),
            )
        ),
    )


def _visible_frames(
    num_frames: Sequence[int], frame_types: Sequence[Sequence[int] | None] | None, window_size: int, is_causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Visible frames over the whole batch: `[F, K]` indices and validity; frames attend to their own clip alone."""
    frame_types = [None] * len(num_frames) if frame_types is None else frame_types
    with torch.inference_mode(False), torch.device("cpu"):
        per_clip = [
            FrameLevelMaskGenerator.visible_frames(
                FrameLevelMaskGenerator.frame_visibility(length, window_size, types, causal=is_causal)
            )
            for length, types in zip(num_frames, frame_types, strict=True)
        ]
    width = max(visible.shape[1] for visible, _ in per_clip)
    indices, validity, first = [], [], 0
    for visible, valid in per_clip:
        missing = (0, width - visible.shape[1])
        padded = np.pad(visible.numpy(), ((0, 0), missing), constant_values=-1)
        indices.append(np.where(padded < 0, np.arange(len(visible))[:, None], padded) + first)
        validity.append(np.pad(valid.numpy(), ((0, 0), missing)))
        first += len(visible)
    return np.concatenate(indices), np.concatenate(validity)


class PredictorMemory:
    """Runs the blocks frame by frame. Keeps the inputs that a later frame attends to: those of each block at the last
    `window_size - 1` frames, and at all slow ones where these stay visible. Blocks may be of any class.
    """

    def __init__(self, num_layers: int, window_size: int) -> None:
        self.window_size = window_size
        self.num_frames = 0
        self._frames: list[int] = []  # numbers of the frames that are kept
        self._types: list[int] | None = None
        self._inputs: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]  # by block and frame `[P, E]`

    def run(self, blocks: Sequence[nn.Module], x: torch.Tensor, frame_type: int | None) -> torch.Tensor:
        """Runs the next frame `[P, E]` through all blocks; `frame_type` slow (0) or fast (1) if slow frames stay visible."""
        self._frames.append(self.num_frames)
        if frame_type is not None:
            self._types = [*(self._types or []), frame_type]
        for block, inputs in zip(blocks, self._inputs, strict=True):
            inputs.append(x)
            x = self._run_block(block, inputs)
        self.num_frames += 1
        frames = torch.tensor(self._frames)
        self._drop(FrameLevelMaskGenerator.is_visible(self.num_frames, frames, self.window_size, self._types).tolist())
        return x

    def keep_only(self, frames: Container[int]) -> None:
        """Drops the slow frames that are outside of the window and not among `frames`."""
        oldest = self.num_frames - self.window_size + 1
        self._drop([frame >= oldest or frame in frames for frame in self._frames])

    def _drop(self, kept: Sequence[bool]) -> None:
        if not all(kept):
            lists = (self._frames, *self._inputs, *([] if self._types is None else [self._types]))
            for values in lists:
                values[:] = [value for value, keeps in zip(values, kept, strict=True) if keeps]

    @staticmethod
    def _run_block(block: nn.Module, frames: list[torch.Tensor]) -> torch.Tensor:
        """Output for the last frame, which attends to all. The outputs for the others are discarded."""
        states = stack_padded(frames)
        counts = torch.tensor([len(frame) for frame in frames], device=states.device)
        exists = torch.arange(states.shape[1], device=states.device) < counts[:, None]  # [K, P]
        visible = torch.arange(len(frames), device=states.device).expand(len(frames), -1)
        key_mask = None if bool(exists.all()) else exists.flatten().expand(len(frames), 1, 1, -1)
        return block(states, visible, key_mask)[-1, : len(frames[-1])]
