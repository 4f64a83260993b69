# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""The parts of the predictor: a transformer whose patches attend over the frames that they may see.

Shape letters: F frames of all clips together, P patches of a frame, E predictor width, K frames visible to a frame.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .frame_masks import FrameLevelMaskGenerator


def sinusoids(values: torch.Tensor, wavelengths: torch.Tensor) -> torch.Tensor:
    """`[...]` -> `[..., 2 * len(wavelengths)]`."""
    angles = values[..., None] * (2 * math.pi / wavelengths)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def resample_states(states: torch.Tensor, grid: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """`[h * w, E]` on one grid -> `[h' * w', E]` on another."""
    if grid == target:
        return states
    states = states.T.unflatten(1, grid)[None]
    return nn.functional.interpolate(states, size=list(target), mode="bilinear")[0].flatten(1).T


def stack_padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """`[P_i, E]` tensors -> `[F, P, E]`, shorter ones padded with zeros at the end.

    `pad_sequence` would do, but writes row by row into one tensor: its backward pass copies the gradient of the whole as
    often as there are rows, at a cost quadratic in the number of frames.
    """
    longest = max(map(len, rows))
    return torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])


class ZeroInitializedLinear(nn.Linear):
    """A linear layer that starts at zero; the model's weight initialisation knows it by its class."""

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

    `forward` takes the states of all frames `x` `[F, P, E]`, for each frame the frames that it may see `visible` `[F, K]`
    (its own among them; shorter lists are filled up) and `key_mask` `[F, 1, 1, K * P]`, True where such a patch counts, or
    None where all do. It returns the new states `[F, P, E]`.
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


class PredictorMemory:
    """Runs the blocks frame by frame. What is kept is what a later frame may see, and not more: of each block its inputs at
    the last `window_size - 1` frames, and at all slow ones where these stay visible. Blocks of any kind will do.
    """

    def __init__(self, num_layers: int, window_size: int) -> None:
        self.window_size = window_size
        self.num_frames = 0
        self._frames: list[int] = []  # numbers of the frames that are kept
        self._types: list[int] | None = None
        self._inputs: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]  # by block and frame `[P, E]`

    def run(self, blocks: Sequence[nn.Module], x: torch.Tensor, frame_type: int | None) -> torch.Tensor:
        """The next frame's `[P, E]` through all blocks; `frame_type` slow (0) or fast (1) if slow frames stay visible."""
        self._frames.append(self.num_frames)
        if frame_type is not None:
            self._types = [*(self._types or []), frame_type]
        for block, inputs in zip(blocks, self._inputs, strict=True):
            inputs.append(x)
            x = self._run_block(block, inputs)
        self.num_frames += 1
        frames = torch.tensor(self._frames)
        kept = FrameLevelMaskGenerator.may_see(self.num_frames, frames, self.window_size, self._types).tolist()
        if not all(kept):
            lists = (self._frames, *self._inputs, *([] if self._types is None else [self._types]))
            for values in lists:
                values[:] = [value for value, keeps in zip(values, kept, strict=True) if keeps]
        return x

    @staticmethod
    def _run_block(block: nn.Module, frames: list[torch.Tensor]) -> torch.Tensor:
        """The last of the frames, which sees them all. The others are run along, and what they become is not used."""
        states = stack_padded(frames)
        counts = torch.tensor([len(frame) for frame in frames], device=states.device)
        exists = torch.arange(states.shape[1], device=states.device) < counts[:, None]  # [K, P]
        everyone = torch.arange(len(frames), device=states.device).expand(len(frames), -1)
        key_mask = None if bool(exists.all()) else exists.flatten().expand(len(frames), 1, 1, -1)
        return block(states, everyone, key_mask)[-1, : len(frames[-1])]
