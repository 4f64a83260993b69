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
