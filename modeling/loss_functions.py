# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""The two losses of a micro-batch, which add up over micro-batches and ranks.

Shape letters: B samples, S tokens, n supervised positions of the batch, N videos of the batch.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

# Logits that exist at a time: 256 MB in float32, 441 positions of Qwen2's vocabulary.
LOGITS_AT_A_TIME = 2**26


def summed_cross_entropy(lm_head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Projects `[n, hidden_size]` to the vocabulary and returns the sum of the losses of the targets `[n]`.

    The logits of long answers, 150 thousand for each token, would be the largest tensor of a training step. On a GPU with
    Liger's fused kernel (https://github.com/linkedin/Liger-Kernel), they are computed in pieces and overwritten with their
    gradients. Elsewhere `LOGITS_AT_A_TIME` exist at a time, and the backward pass computes them again.
    """

    def chunk_loss(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = lm_head(hidden_states).float()
        return nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="sum")

    is_gathered = _is_gathered_at_each_call(lm_head)
    num_positions = max(1, LOGITS_AT_A_TIME // _num_logits(lm_head))
    if len(targets) and not is_gathered and _is_plain_linear_on(lm_head, hidden_states.device):
        fused = fused_cross_entropy(hidden_states.device.type)
        if fused is not None:
            return fused(lm_head.weight, hidden_states, targets)
    if len(targets) <= num_positions or is_gathered:
        return chunk_loss(hidden_states, targets)
    chunks = zip(hidden_states.split(num_positions), targets.split(num_positions), strict=True)
    return torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def _num_logits(lm_head: nn.Module) -> int:
    """The size of the vocabulary; PEFT's wrapper for trainable tokens does not pass the attribute on."""
    while not hasattr(lm_head, "out_features"):
        lm_head = lm_head.original_module
    return lm_head.out_features


@lru_cache
def fused_cross_entropy(device_type: str) -> nn.Module | None:
    """Liger's kernel, `(weight, hidden_states, targets) -> sum`, or None if it is not available."""
    if device_type != "cuda":
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)


def _is_plain_linear_on(module: nn.Module, device: torch.device) -> bool:
    """True if the module's weight may be used without a call: it has no adapter, and no hook that moves its input."""
    return type(module) is nn.Linear and not hasattr(module, "_hf_hook") and module.weight.device == device


def _is_gathered_at_each_call(module: nn.Module) -> bool:
    """True if the ranks exchange this module's weights at each call, and so must call it equally often.

    ZeRO-3 does so for every module, FSDP2 for modules that are sharded by themselves.
    """
    return isinstance(module, FSDPModule) or any(hasattr(weight, "ds_id") for weight in module.parameters())


def zero_through(*tensors: torch.Tensor) -> torch.Tensor:
    """Computes a zero that passes a zero gradient to tensors; finite for any values (`x.sum() * 0` is not)."""
    return sum(tensor.flatten()[:0].sum() for tensor in tensors)


@torch.compiler.disable  # numbers of the host, not of the graph
def shares_of_videos(
    labels: torch.Tensor, packed_position_ids: torch.Tensor | None, first_token: np.ndarray
) -> np.ndarray:
    """`[N]` float32: labels of the sample that each video belongs to, divided by the videos of that sample.

    Args:
        labels: `[B, S]`, on the CPU.
        packed_position_ids: `[B, S]` where several samples share a row, on the CPU.
        first_token: `[N]`, position of the first token of each video in the flattened batch.
    """
    # [B * S]: sample of each token. A row is one sample, unless several are packed in it.
    starts = np.zeros(labels.shape, dtype=bool)
    starts[:, 0] = True
    if packed_position_ids is not None:
        starts[:, 1:] |= np.diff(packed_position_ids.expand(labels.shape).numpy()) != 1
    sample_of_token = starts.ravel().cumsum() - 1
    is_target = labels.numpy() != -100
    is_target[:, 0] = False
    samples = sample_of_token[first_token]
    items_in_sample = np.bincount(sample_of_token[is_target.ravel()], minlength=sample_of_token[-1] + 1)
    return (items_in_sample[samples] / np.bincount(samples, minlength=1)[samples]).astype(np.float32)


def reduce_video_losses(
    losses: torch.Tensor,
    shares: torch.Tensor | None,
    num_items_in_batch: int | torch.Tensor | None,
    num_videos_in_batch: int | torch.Tensor | None,
) -> torch.Tensor:
    """Reduces the losses of videos to the unweighted reconstruction loss of a micro-batch.

    Args:
        losses: `[N]`, of each video with two frames or more.
        shares: `[N]` of `shares_of_videos`; None without labels.
        num_items_in_batch, num_videos_in_batch: see `LlavaNextARForConditionalGeneration.forward`, which documents the three
            ways of counting.
    """
    if num_videos_in_batch is not None:
        return losses.sum() / _count_on(num_videos_in_batch, losses.device)
    if num_items_in_batch is None or shares is None:
        return losses.mean()
    # In a step without any label no sample has a share: zero, not 0 / 0.
    count = _count_on(num_items_in_batch, losses.device)
    return (losses * shares).sum() / (count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))


def _count_on(count: int | torch.Tensor, device: torch.device) -> int | torch.Tensor:
    return count.to(device) if isinstance(count, torch.Tensor) else count
