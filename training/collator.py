# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Samples of `LlavaVideoDataset` or `LlavaVideoStream` -> padded batches.

Shape letters: B samples, S tokens, N videos and M images of all samples together, T frames of the longest video.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .bad_samples import is_bad_sample

_WITHOUT_FRAMES = ("video_layout", "video_pixel_norm")  # one row for each video


def read_samples(samples: Sequence[Any]) -> list[Any]:
    """Decodes the media of samples of a stream, which come as `UnreadSample`; other samples are returned unchanged."""
    return [sample.read_sample() if hasattr(sample, "read_sample") else sample for sample in samples]


class SkippingCollator:
    """Wrapper of a collator that leaves the first batches of a stream unread, for one pass over a DataLoader.

    Only `UnreadSample`s stay unread, since other samples are decoded already. The placeholder of a batch is never used.

    Args:
        collator: makes the batches that follow.
        num_batches: number over all workers.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]], num_batches: int) -> None:
        self.collator = collator
        self.num_batches = num_batches
        self._num_made = 0  # in this process

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        worker = get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # Workers take turns. After the end of one worker the batches of the others come earlier than computed here. Then some
        # batches are read in vain, and none is missing.
        position = self._num_made * num_workers + worker_id
        self._num_made += 1
        if position < self.num_batches and all(hasattr(sample, "read_sample") for sample in samples):
            return {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
        return self.collator(samples)


@contextlib.contextmanager
def first_batches_unread(loader: Any, num_batches: int) -> Iterator[None]:
    """Context in which a pass over a stream's DataLoader, prepared by accelerate, leaves its first batches unread.

    With `in_order=False` the first batches are unknown, so all are read.
    """
    is_stream = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
    if not (num_batches and is_stream and loader.in_order):
        yield
        return
    loader = loader.base_dataloader
    collator = loader.collate_fn
    loader.collate_fn = SkippingCollator(collator, num_batches)
    try:
        yield
    finally:
        loader.collate_fn = collator


class LlavaVideoCollator:
    """Samples of `LlavaVideoDataset` -> a batch, with or without videos and images in each.

    Text is padded to `[B, S]`, or packed. Videos of all samples are stacked, shorter ones padded with zeros at the end:
    `pixel_values_videos` `[N, T, 3, H, W]`, `video_frame_mask`, `video_timestamps` and `video_frame_types` `[N, T]`,
    `video_layout` `[N, 7]`, `video_pixel_norm` `[N, 2, 3]`. Times become int64 nanoseconds: DeepSpeed and FSDP cast every
    floating input to 16 bits, where 60 s and 60.1 s are the same. Images are stacked over their patches: `pixel_values`
    `[M, P, 3, H, W]`, `image_sizes` `[M, 2]`, `batch_num_images` with the number of images of each sample that has any.

    Samples of a stream are decoded here. Each `BadSample` is left out. A batch of `BadSample`s alone becomes one token of
    padding without a label, which gives no gradient.

    Args:
        processor: with a tokenizer, whose padding token is used; or a tokenizer; or the id of the padding token.
        padding_side: of the text, `right | left`.
        label_pad: label of padding.
        pad_to_multiple_of: round S up.
        packing: concatenate the samples of a batch in a single row `[1, S]`, without padding. `position_ids` restart at each
            sample and take the place of `attention_mask`. From them transformers' attention back ends derive that samples do
            not attend to each other (flash and flex attention without a mask in memory, `sdpa` and `eager` with one of S x S).
            Losses and gradients are those of the padded batch.

    Raises:
        ValueError: without a padding token; for packing with padding on the left; for samples that cannot share a batch
            (frames of different size, slow and fast frames in some samples only).
    """

    def __init__(
        self,
        processor: Any,
        *,
        padding_side: str = "right",
        label_pad: int = -100,
        pad_to_multiple_of: int | None = None,
        packing: bool = False,
    ) -> None:
        tokenizer = getattr(processor, "tokenizer", processor)
        self.pad_token_id = tokenizer if isinstance(tokenizer, int) else tokenizer.pad_token_id
        if self.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
        if packing and padding_side == "left":
            raise ValueError("packing=True leaves nothing to pad on the left, got padding_side='left'")
        self.packing = packing
        self.padding_side = padding_side
        self.label_pad = label_pad
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, samples: Sequence[Any]) -> dict[str, torch.Tensor]:
        samples = [sample for sample in read_samples(samples) if not is_bad_sample(sample)] or [self._padding_sample()]
        batch = self._packed_text(samples) if self.packing else self._padded_text(samples)
        with_video = [sample for sample in samples if "pixel_values_videos" in sample]
        for name in (
            "pixel_values_videos",
            "video_frame_mask",
            "video_timestamps",
            "video_frame_types",
            "video_layout",
            "video_pixel_norm",
        ):
            values = _values_of(name, with_video)
            if name == "video_timestamps":
                values = [_to_nanoseconds(times) for times in values]
            if values:
                batch[name] = torch.cat(values) if name in _WITHOUT_FRAMES else _cat_padded(name, values)
        with_images = [sample for sample in samples if "pixel_values" in sample]
        for name in ("pixel_values", "image_sizes", "batch_num_images"):
            values = _values_of(name, with_images)
            if values:
                batch[name] = _cat_padded(name, values) if name == "pixel_values" else torch.cat(values)
        return batch

    def _padding_sample(self) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([self.pad_token_id]), "labels": torch.tensor([-100])}

    def _padded_text(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        length = self._rounded_up(max(len(sample["input_ids"]) for sample in samples))
        # input_ids first: accelerate reads the batch size off the first tensor.
        return {
            "input_ids": self._pad_text([sample["input_ids"] for sample in samples], length, self.pad_token_id),
            "attention_mask": self._pad_text([torch.ones_like(s["input_ids"]) for s in samples], length, 0),
            "labels": self._pad_text([sample["labels"] for sample in samples], length, self.label_pad),
        }

    def _packed_text(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        input_ids = torch.cat([sample["input_ids"] for sample in samples])
        positions = [torch.arange(len(sample["input_ids"])) for sample in samples]
        missing = self._rounded_up(len(input_ids)) - len(input_ids)
        # The last token of a sample predicts nothing: the next token belongs to another sample.
        labels = [nn.functional.pad(sample["labels"][1:], (1, 0), value=self.label_pad) for sample in samples]
        return {
            "input_ids": nn.functional.pad(input_ids, (0, missing), value=self.pad_token_id)[None],
            "labels": nn.functional.pad(torch.cat(labels), (0, missing), value=self.label_pad)[None],
            "position_ids": torch.cat([*positions, torch.arange(missing)])[None],  # padding is a sample of its own
        }

    def _rounded_up(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return math.ceil(length / multiple) * multiple

    def _pad_text(self, rows: list[torch.Tensor], length: int, value: int) -> torch.Tensor:
        padded = []
        for row in rows:
            missing = length - len(row)
            amount = (missing, 0) if self.padding_side == "left" else (0, missing)
            padded.append(nn.functional.pad(row, amount, value=value))
        return torch.stack(padded)


def _to_nanoseconds(times: torch.Tensor) -> torch.Tensor:
    return (times.double() * 1e9).round().long() if times.is_floating_point() else times


def _values_of(name: str, samples: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    values = [sample[name] for sample in samples if name in sample]
    if values and len(values) < len(samples):
        raise ValueError(f"{len(values)} of {len(samples)} samples have {name}; either all or none must")
    return values


def _cat_padded(name: str, values: list[torch.Tensor]) -> torch.Tensor:
    """`[n_i, t_i, ...]` -> `[sum n_i, max t_i, ...]`, padded with zeros (False) at the end of the second dimension."""
    rests = {tuple(value.shape[2:]) for value in values}
    if len(rests) > 1:
        raise ValueError(f"{name} of one batch must agree in [3, H, W], got {sorted(rests)}")
    if len(values) == 1:
        return values[0]
    out = _empty((sum(map(len, values)), max(value.shape[1] for value in values), *rests.pop()), values[0])
    for rows, value in zip(out.split([len(value) for value in values]), values, strict=True):
        rows[:, : value.shape[1]] = value
        rows[:, value.shape[1] :] = 0
    return out


def _empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor; in a DataLoader worker in shared memory, which spares a copy on its way to the trainer."""
    if get_worker_info() is None or not math.prod(shape):
        return like.new_empty(shape)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * like.itemsize)  # as torch's own default_collate
    return like.new_empty(0).set_(storage, 0, shape)
