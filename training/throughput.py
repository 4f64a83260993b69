# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Throughput of training between two log entries: samples, tokens, waiting for data, memory, use of the device.

Counts are computed on the device of each batch and read for a log entry, so that no step waits for them. The clock runs
from the request for a step's data to the end of its optimizer step, without evaluations and saves. Over ranks, counts
are summed, and the time is that of the slowest rank.
"""

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

try:
    import resource
except ImportError:  # Windows has none
    resource = None

# Dense matrix products in bfloat16 or float16 with float32 sums, FLOP/s, by the maker's data sheets; the first match counts.
PEAK_FLOPS = {
    r"\bB200": 2.25e15,
    r"\bH200|\bGH200|\bH100(?!.*(PCIe|NVL))": 9.89e14,
    r"\bH100.*NVL": 8.35e14,
    r"\bH100.*PCIe": 7.56e14,
    r"\bMI300X": 1.307e15,
    r"\bA100|\bA800": 3.12e14,
    r"\bL40S": 3.62e14,
    r"\bA40\b": 1.497e14,
    r"\bA10G?\b": 1.25e14,
    r"\bL4\b": 1.21e14,
    r"RTX 4090": 1.652e14,
    r"\bV100": 1.25e14,
    r"\bT4\b": 6.5e13,
}
# Keys of a log entry. The values are measured, so they differ between runs.
ENTRIES = (
    *("samples_per_second", "tokens_per_second", "visual_tokens_per_second", "text_tokens_per_second"),
    *("data_wait_share", "peak_memory_gib", "model_flops_utilization"),
)
_GIB = 1024**3


def peak_flops(device_name: str) -> float | None:
    """Returns the peak FLOP/s of a device in 16 bits, or None if unknown."""
    return next((flops for pattern, flops in PEAK_FLOPS.items() if re.search(pattern, device_name)), None)


class StepFlops:
    """Floating-point operations that a training step of this model needs, by its counts.

    A product of an `[m, k]` and a `[k, n]` matrix has `2 m k n`. Counted are the linear layers and the attention of the
    language model, the tower and the projector, the linear layers of the head, and the vocabulary projection of the targets;
    with the backward pass where a part has one. Attention counts in full, masked or not, as in PaLM's model FLOP
    utilisation. Activations that are recomputed do not count.

    Args:
        model: with `config` and the parts of `LlavaNextARForConditionalGeneration`, wrapped by PEFT or not.
        has_head: the reconstruction head is trained.

    Raises:
        AttributeError: if the model has other parts.
    """

    def __init__(self, model: nn.Module, has_head: bool) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config, parts = base.config, base.model
        text, vision = config.text_config, config.vision_config
        layout = config.frame_token_layout
        patches = layout.patches_height * layout.patches_width
        language_model, tower, projector = parts.language_model, parts.vision_tower, parts.multi_modal_projector
        # Gradients pass through a part if it or a part before it is trained.
        passes_tower = _is_trained(tower)
        passes_projector = passes_tower or _is_trained(projector)
        passes_text = passes_projector or _is_trained(language_model) or _is_trained(base.get_input_embeddings())
        self.per_token = _linear_flops(language_model, passes_text)
        width = text.num_attention_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
        # Scores and weighted values are products with two inputs, each of which has a gradient.
        self.per_square = 4 * width * text.num_hidden_layers * (3 if passes_text else 1)
        tower_attention = 4 * vision.hidden_size * vision.num_hidden_layers * patches**2
        self.per_frame = patches * (_linear_flops(tower, passes_tower) + _linear_flops(projector, passes_projector))
        self.per_frame += tower_attention * (3 if passes_tower else 1)
        if has_head:
            height, width = layout.frame_grid()
            self.per_frame += height * width * _linear_flops(base.autoregressive_module, True)
            if passes_tower:  # the teacher is a copy of the tower, or the tower without its adapters
                self.per_frame += patches * _linear_flops(tower, False, with_weights=False) + tower_attention
        vocabulary = base.get_output_embeddings().weight
        self.per_target = 2 * text.vocab_size * text.hidden_size * (1 + passes_text + vocabulary.requires_grad)

    def __call__(self, counts: Mapping[str, float]) -> float:
        """FLOP of a step, or of several, by the sums of `count_batch`."""
        flops = self.per_token * (counts["text_tokens"] + counts["visual_tokens"])
        flops += self.per_square * counts["squares"] + self.per_target * counts["targets"]
        return flops + self.per_frame * counts["frames"]


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _linear_flops(module: nn.Module, is_passed: bool, with_weights: bool = True) -> int:
    """FLOP per row of the linear layers of a module: forward, gradient of the input, gradient of the weight."""
    flops = 0
    for name, part in module.named_modules():
        # A frozen copy of the tower does not count as a layer of the head, nor a module that PEFT has replaced by a copy.
        if isinstance(part, nn.Linear) and not {"teacher", "original_module"} & set(name.split(".")):
            # By its attributes: weights may be packed in 4 bits, or sharded.
            products = 1 + is_passed + (with_weights and part.weight.requires_grad)
            flops += 2 * part.in_features * part.out_features * products
    return flops


COUNTS = ("samples", "text_tokens", "visual_tokens", "squares", "targets", "frames")


def count_batch(batch: Mapping[str, Any], num_samples: int, visual_token_ids: Sequence[int]) -> torch.Tensor:
    """Returns the counts of a batch in the order of `COUNTS`, float64 (float32 on MPS), on the device of its tokens.

    Args:
        batch: of a collator; padding is where `attention_mask` is 0. A packed batch has `position_ids` instead.
        num_samples: of the batch.
        visual_token_ids: placeholders of images and videos.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
    positions = batch.get("position_ids")
    positions = mask.cumsum(-1) - 1 if positions is None else positions
    visual = (
        torch.isin(ids, torch.tensor(visual_token_ids, dtype=ids.dtype, device=ids.device)).logical_and(mask).sum()
    )
    frames: Any = 0
    if batch.get("video_frame_mask") is not None:
        frames = batch["video_frame_mask"].sum()
    elif batch.get("pixel_values_videos") is not None:
        frames = batch["pixel_values_videos"].shape[:2].numel()
    if batch.get("pixel_values") is not None:
        frames = frames + batch["pixel_values"].shape[: batch["pixel_values"].dim() - 3].numel()
    targets = (batch["labels"][..., 1:] != -100).sum() if "labels" in batch else 0
    # The sum of 2 i + 1 over the positions i of a sample is its length squared.
    values = (num_samples, mask.sum() - visual, visual, ((2 * positions + 1) * mask).sum(), targets, frames)
    dtype = torch.float32 if ids.device.type == "mps" else torch.float64
    return torch.stack([torch.as_tensor(value, device=ids.device).to(dtype) for value in values])


class TimedIterator:
    """An iterator that sums the seconds for which its caller waits."""

    def __init__(self, iterator: Iterator) -> None:
        self.iterator, self.seconds = iterator, 0.0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        try:
            return next(self.iterator)
        finally:
            self.seconds += time.perf_counter() - start


class ThroughputMeter:
    """Sums times and counts of the steps of a window.

    Args:
        flops: FLOP of a step by its counts, or None for a model without such a count.
        peak: FLOP/s of the device, or None if unknown.
    """

    def __init__(self, flops: StepFlops | None, peak: float | None) -> None:
        self.flops, self.peak = flops, peak
        self._clear()

    def _clear(self) -> None:
        self._counts: torch.Tensor | None = None
        self._waited, self._seconds, self._begun = 0.0, 0.0, None

    def begin_step(self) -> None:
        self._begun = time.perf_counter()

    def add_data(self, counts: Sequence[torch.Tensor], waited: float) -> None:
        """Adds the counts of the batches of the step, and the seconds of waiting for them."""
        self._waited += waited
        for row in counts:
            self._counts = row if self._counts is None else self._counts + row

    def end_step(self) -> None:
        """Stops the clock of the step, if it runs."""
        if self._begun is not None:
            self._seconds += time.perf_counter() - self._begun
            self._begun = None

    def pop(self, accelerator: Any) -> dict[str, float]:
        """Returns the entries of the log and starts a new window; every rank must call it.

        Returns:
            `samples_per_second`, `tokens_per_second`, `visual_tokens_per_second`, `text_tokens_per_second`, of all ranks
            together; `data_wait_share` of the time, for the rank that waits longest; `peak_memory_gib` so far, of the device
            or, without one, of the process, for the rank with the most, if known; `model_flops_utilization`, if the peak of
            the device is known. Empty if no step was timed.
        """
        device = accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        counts = torch.zeros(len(COUNTS)) if self._counts is None else self._counts
        times = torch.tensor([self._seconds, self._waited, peak_memory(device)], dtype=dtype, device=device)
        row = torch.cat([counts.to(device=device, dtype=dtype), times])
        self._clear()
        rows = accelerator.gather(row[None])  # [ranks, counts and times]
        seconds, waited, memory = rows[:, len(COUNTS) :].max(0).values.tolist()
        if seconds <= 0:
            return {}
        sums = dict(zip(COUNTS, rows[:, : len(COUNTS)].sum(0).tolist(), strict=True))
        entries = {
            "samples_per_second": sums["samples"] / seconds,
            "tokens_per_second": (sums["text_tokens"] + sums["visual_tokens"]) / seconds,
            "visual_tokens_per_second": sums["visual_tokens"] / seconds,
            "text_tokens_per_second": sums["text_tokens"] / seconds,
            "data_wait_share": waited / seconds,
        }
        if memory > 0:
            entries["peak_memory_gib"] = memory / _GIB
        if self.flops is not None and self.peak is not None:
            entries["model_flops_utilization"] = self.flops(sums) / (seconds * self.peak * len(rows))
        return entries


def peak_memory(device: torch.device) -> int:
    """Returns the peak in bytes of the device's allocator, without a device that of the process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "xpu":
        return torch.xpu.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
