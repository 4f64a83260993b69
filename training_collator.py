# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Samples of `LlavaVideoDataset` or `LlavaVideoStream` -> padded batches.

Shape letters: B samples, S tokens, N videos and M images of all samples together, T frames of the longest video.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .bad_samples import is_bad_sample


class LlavaVideoCollator:
    """Samples of `LlavaVideoDataset` -> a batch, with or without videos and images in each.

    Text is padded to `[B, S]`. Videos of all samples are stacked, shorter ones padded with zeros at the end:
    `pixel_values_videos` `[N, T, 3, H, W]`, `video_frame_mask`, `video_timestamps` and `video_frame_types` `[N, T]`,
    `video_layout` `[N, 7]`. Images are stacked over their patches: `pixel_values` `[M, P, 3, H, W]`, `image_sizes`
    `[M, 2]`, `batch_num_images` with the number of images of each sample that has any.

    Samples of a stream are read here. A `BadSample` is left out; where none is left, the batch is one token of padding
    without a label, from which nothing is learned.

    Args:
        processor: with a tokenizer, whose padding token is used; or a tokenizer; or the id of the padding token.
        padding_side: of the text, `right | left`.
        label_pad: label of padding.
        pad_to_multiple_of: round S up.

    Raises:
        ValueError: if there is no padding token, or samples cannot share a batch (frames of different size, slow and
            fast frames in some only).
    """

    def __init__(
        self,
        processor: Any,
        *,
        padding_side: str = "right",
        label_pad: int = -100,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        tokenizer = getattr(processor, "tokenizer", processor)
        self.pad_token_id = tokenizer if isinstance(tokenizer, int) else tokenizer.pad_token_id
        if self.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
        self.padding_side = padding_side
        self.label_pad = label_pad
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, samples: Sequence[Any]) -> dict[str, torch.Tensor]:
        samples = [sample.read_sample() if hasattr(sample, "read_sample") else sample for sample in samples]
        samples = [sample for sample in samples if not is_bad_sample(sample)] or [self._nothing()]
        length = max(len(sample["input_ids"]) for sample in samples)
        if self.pad_to_multiple_of is not None:
            length = math.ceil(length / self.pad_to_multiple_of) * self.pad_to_multiple_of
        # input_ids first: accelerate reads the batch size off the first tensor.
        batch = {
            "input_ids": self._pad_text([sample["input_ids"] for sample in samples], length, self.pad_token_id),
            "attention_mask": self._pad_text([torch.ones_like(s["input_ids"]) for s in samples], length, 0),
            "labels": self._pad_text([sample["labels"] for sample in samples], length, self.label_pad),
        }
        with_video = [sample for sample in samples if "pixel_values_videos" in sample]
        for name in (
            "pixel_values_videos",
            "video_frame_mask",
            "video_timestamps",
            "video_frame_types",
            "video_layout",
        ):
            values = _of_all(name, with_video)
            if values:
                batch[name] = torch.cat(values) if name == "video_layout" else _cat_padded(name, values)
        with_images = [sample for sample in samples if "pixel_values" in sample]
        for name in ("pixel_values", "image_sizes", "batch_num_images"):
            values = _of_all(name, with_images)
            if values:
                batch[name] = _cat_padded(name, values) if name == "pixel_values" else torch.cat(values)
        return batch

    def _nothing(self) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([self.pad_token_id]), "labels": torch.tensor([-100])}

    def _pad_text(self, rows: list[torch.Tensor], length: int, value: int) -> torch.Tensor:
        padded = []
        for row in rows:
            missing = length - len(row)
            amount = (missing, 0) if self.padding_side == "left" else (0, missing)
            padded.append(nn.functional.pad(row, amount, value=value))
        return torch.stack(padded)


def _of_all(name: str, samples: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    values = [sample[name] for sample in samples if name in sample]
    if values and len(values) < len(samples):
        raise ValueError(f"{len(values)} of {len(samples)} samples have {name}; either all or none must")
    return values


def _cat_padded(name: str, values: list[torch.Tensor]) -> torch.Tensor:
    """`[n_i, t_i, ...]` -> `[sum n_i, max t_i, ...]`, padded with zeros (False) at the end of the second dimension."""
    rests = {tuple(value.shape[2:]) for value in values}
    if len(rests) > 1:
        raise ValueError(f"{name} of one batch must agree in [3, H, W], got {sorted(rests)}")
    longest = max(value.shape[1] for value in values)
    out = values[0].new_zeros(sum(map(len, values)), longest, *rests.pop())
    for rows, value in zip(out.split([len(value) for value in values]), values, strict=True):
        rows[:, : value.shape[1]] = value
    return out
