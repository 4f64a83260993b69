# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""The two losses of a micro-batch, so that they add up over micro-batches and ranks, at no more memory than they need.

Shape letters: B samples, S tokens, n supervised positions of the batch, N videos of the batch.
"""

from functools import lru_cache

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from .reconstruction_metrics import Reconstruction

# Logits that exist at a time: 256 MB in float32, 441 positions of Qwen2's vocabulary.
LOGITS_AT_A_TIME = 2**26


def summed_cross_entropy(lm_head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Projects `[n, hidden_size]` to the vocabulary and returns the sum of the losses of the targets `[n]`.

    Long answers, of 150 thousand logits for each token, would be the largest tensor of a training step. Where Liger's fused
    kernel (https://github.com/linkedin/Liger-Kernel) is installed and the device is a GPU, it makes them in pieces and
    overwrites them with their gradients; elsewhere `LOGITS_AT_A_TIME` exist at a time and are made again in the backward pass.
    """

    def of_chunk(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = lm_head(hidden_states).float()
        return nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="sum")

    is_gathered = _is_gathered_at_each_call(lm_head)
    num_positions = max(1, LOGITS_AT_A_TIME // _num_logits(lm_head))
    if len(targets) and not is_gathered and _is_plain_linear_on(lm_head, hidden_states.device):
        fused = fused_cross_entropy(hidden_states.device.type)
        if fused is not None:
            return fused(lm_head.weight, hidden_states, targets)
    if len(targets) <= num_positions or is_gathered:
        return of_chunk(hidden_states, targets)
    chunks = zip(hidden_states.split(num_positions), targets.split(num_positions), strict=True)
    return torch.stack([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def _num_logits(lm_head: nn.Module) -> int:
    """The size of the vocabulary; PEFT's wrapper for trainable tokens does not pass the attribute on."""
    while not hasattr(lm_head, "out_features"):
        lm_head = lm_head.original_module
    return lm_head.out_features


@lru_cache
def fused_cross_entropy(device_type: str) -> nn.Module | None:
    """Liger's kernel, `(weight, hidden_states, targets) -> sum`, or None where it cannot run."""
    if device_type != "cuda":
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)


def _is_plain_linear_on(module: nn.Module, device: torch.device) -> bool:
    """Whether the module's weight may be used without calling it: no adapter, and nothing that moves its input."""
    return type(module) is nn.Linear and not hasattr(module, "_hf_hook") and module.weight.device == device


def _is_gathered_at_each_call(module: nn.Module) -> bool:
    """Whether the ranks exchange this module's weights whenever it runs, and so must run it equally often.

    ZeRO-3 does so for every module, FSDP2 for those that are sharded by themselves.
    """
    return isinstance(module, FSDPModule) or any(hasattr(weight, "ds_id") for weight in module.parameters())


def reduce_video_losses(
    reconstruction: Reconstruction,
    first_token: torch.Tensor,
    labels: torch.Tensor | None,
    packed_position_ids: torch.Tensor | None,
    num_items_in_batch: int | torch.Tensor | None,
    num_videos_in_batch: int | torch.Tensor | None,
) -> torch.Tensor:
    """The unweighted reconstruction loss of a micro-batch.

    Args:
        reconstruction: with the loss of each video.
        first_token: `[N]` int64, where in the flattened batch each video begins.
        labels: `[B, S]`.
        packed_position_ids: `[B, S]` where several samples share a row.
        num_items_in_batch, num_videos_in_batch: see `LlavaNextARForConditionalGeneration.forward`, which tells the three
            ways of counting.
    """
    losses = reconstruction.loss_per_video
    if num_videos_in_batch is not None:
        count = num_videos_in_batch
        return losses.sum() / (count.to(losses.device) if isinstance(count, torch.Tensor) else count)
    if num_items_in_batch is None or labels is None:
        return losses.mean()
    # [B * S]: which sample a token belongs to. A row is one, unless several are packed in it.
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 0] = True
    if packed_position_ids is not None:
        starts[:, 1:] |= packed_position_ids.diff() != 1
    sample_of_token = starts.flatten().cumsum(0) - 1
    num_samples = int(sample_of_token[-1]) + 1
    is_target = nn.functional.pad(labels[:, 1:] != -100, (1, 0)).flatten()
    items_in_sample = torch.bincount(sample_of_token[is_target], minlength=num_samples)
    samples = sample_of_token[first_token.to(labels.device)[reconstruction.video_index.to(labels.device)]]
    videos_in_sample = torch.bincount(samples, minlength=num_samples)
    shares = (items_in_sample[samples] / videos_in_sample[samples]).to(losses.device)
    # In a step without any label no sample has a share: zero, not 0 / 0.
    return (losses * shares).sum() / max(int(num_items_in_batch), 1)
