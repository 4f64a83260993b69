# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Chat messages -> samples: tokens, labels and pixels, or tokens and labels alone.

Data sets with and without an index read their entries by a `SampleReader`.
"""

import io
import os
import traceback
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..processing.media_sources import open_image
from .bad_samples import BadSampleError
from .control_tokens import ControlTokenEscape
from .entries import MediaFolders, entry_to_messages, has_answer, media_names
from .sample_lengths import SampleText, encode_text

# Errors of a program, not of a file, unless a library that reads files raises them.
_PROGRAMMING_ERRORS = (
    *(AttributeError, NameError, TypeError, LookupError, AssertionError, NotImplementedError, ZeroDivisionError),
)
_MEDIA_LIBRARIES = ("PIL", "av", "decord", "numpy")
SAMPLE_NAME = "sample_name"  # key of a short text that identifies a sample in messages


class SampleReader:
    """Entries -> samples.

    Args:
        processor: a `LlavaNextARProcessor`, or one with the same `apply_chat_template`.
        video_root, image_root, allow_outside_root: see `MediaFolders`.
        max_length: tokens that a sample may have.
        truncate: cut a longer sample at its end instead of raising an error. Visual tokens and the last target are never cut
            off: such samples remain errors.
        processor_kwargs: options for every call of the processor, such as `{"num_frames": 8}`.
        ignored_keys: keys of entries that may be left out; see `entry_to_messages`.

    Raises:
        ValueError: if the processor's chat template marks no assistant turns.
    """

    def __init__(
        self,
        processor: Any,
        *,
        video_root: str | os.PathLike,
        image_root: str | os.PathLike | None = None,
        allow_outside_root: bool = False,
        max_length: int | None = None,
        truncate: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        ignored_keys: Collection[str] = (),
    ) -> None:
        self.processor = processor
        self.ignored_keys = tuple(ignored_keys)
        self.folders = MediaFolders(
            Path(video_root), Path(video_root if image_root is None else image_root), allow_outside_root
        )
        self.max_length = max_length
        self.truncate = truncate
        self.processor_kwargs = dict(processor_kwargs or {})
        self._control_tokens = ControlTokenEscape(processor)
        # A template that marks no answers would fail at every sample: raises before the first is read.
        self._call(processor, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])

    def messages(self, entry: Any) -> list[dict[str, Any]]:
        """Returns chat messages with the paths of their media. Raises ValueError or OSError for a malformed entry."""
        return entry_to_messages(entry, self.folders, self.ignored_keys)

    def sample(self, entry: Any) -> dict[str, torch.Tensor]:
        """Returns `input_ids` `[S]`, `labels` `[S]` and the processor's outputs for media, which are decoded.

        Raises:
            Exception: of any type that a decoder raises on a damaged file; ValueError for all expected faults.
        """
        return self.fit(self.encode(entry))

    def encode(self, entry: Any) -> dict[str, torch.Tensor]:
        """As `sample`, of any length."""
        messages, processor = self._control_tokens.mark(self.messages(entry))
        inputs = self._call(processor, [_with_media(message, _open_media) for message in messages])
        input_ids, is_target = inputs["input_ids"][0], inputs["assistant_masks"][0].bool()
        if processor is not self.processor:
            input_ids, is_target = self._control_tokens.restore(input_ids, is_target)
        labels = _labels(messages, input_ids, is_target)
        media = {
            name: value
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor) and name not in ("input_ids", "attention_mask", "assistant_masks")
        }
        for name, value in media.items():
            # A sum is not finite if one of its terms is not, and costs one pass over the pixels.
            if value.is_floating_point() and not value.sum().isfinite() and not value.isfinite().all():
                raise ValueError(f"{name} holds values that are not finite")
        return {"input_ids": input_ids, "labels": labels, **media}

    def fit(self, sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cuts the sample to `max_length`. Raises ValueError without `truncate`, or if tokens are lost that must stay."""
        if self.max_length is None or len(sample["input_ids"]) <= self.max_length:
            return sample
        self._check_cut(sample["input_ids"], sample["labels"])
        cut = {name: sample[name][: self.max_length] for name in ("input_ids", "labels")}
        return {**sample, **cut}

    def length(self, entry: Any) -> int:
        """Returns the number of tokens of `sample`, from the headers of its media.

        Exact where a file's header gives the true number of frames and rate.

        Raises:
            Exception: as `sample`, for faults that show without decoding.
        """
        length = len(self._encoded_text(self.messages(entry)).input_ids)
        return length if self.max_length is None or not self.truncate else min(length, self.max_length)

    def text(self, entry: Any) -> tuple[SampleText, torch.Tensor]:
        """Returns the tokens of `encode` and its labels `[S]`, from the headers of its media; see `length`."""
        messages = self.messages(entry)
        text = self._encoded_text(messages, with_targets=True)
        return text, _labels(messages, text.input_ids, text.is_target)

    # -----------------------------------------------------------------------------------------------------------------

    def _encoded_text(self, messages: list[dict[str, Any]], with_targets: bool = False) -> SampleText:
        messages, processor = self._control_tokens.mark(messages)
        text = encode_text(processor, messages, self.processor_kwargs, with_targets)
        if processor is self.processor:
            return text
        is_target = torch.zeros(len(text.input_ids), dtype=torch.bool) if text.is_target is None else text.is_target
        input_ids, is_target = self._control_tokens.restore(text.input_ids, is_target)
        return replace(text, input_ids=input_ids, is_target=is_target)

    def _call(self, processor: Any, messages: list[dict[str, Any]]) -> Any:
        return processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs=dict(self.processor_kwargs),
        )

    def _check_cut(self, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        """Raises ValueError for a sample that is too long, or that would lose visual tokens or all targets."""
        excess = len(input_ids) - self.max_length
        too_long = f"it has {len(input_ids)} tokens, {excess} more than max_length={self.max_length}"
        is_visual = (input_ids == self.processor.video_token_id) | (input_ids == self.processor.image_token_id)
        num_cut = int(is_visual[self.max_length :].sum())
        if num_cut:
            raise ValueError(
                f"{too_long}, and {num_cut} of its {int(is_visual.sum())} visual tokens lie beyond; they are never "
                "cut off. Sample fewer frames or raise max_length"
            )
        if not self.truncate:
            raise ValueError(f"{too_long}; truncate=True cuts the end off")
        targets = (labels != -100).nonzero().flatten()
        if len(targets) and targets[0] >= self.max_length:
            raise ValueError(
                f"{too_long}, and all its {len(targets)} targets lie beyond; the first one is "
                f"{int(targets[0]) + 1 - self.max_length} too far"
            )


def read_sample(reader: SampleReader, method: str, entry: Any, *, source: str, index: int) -> Any:
    """Returns `reader.<method>(entry)`; errors name the sample.

    Args:
        entry: the entry, or a function without arguments that returns it.

    Raises:
        BadSampleError: if the entry cannot be read.
        ImportError, MemoryError: unchanged, since the sample does not cause them.
        AttributeError, TypeError, KeyError, ...: unchanged, unless a library that reads media raises them.
    """
    try:
        entry = entry() if callable(entry) else entry
        result = getattr(reader, method)(entry)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on a damaged file: struct.error, EOFError, SyntaxError, ...
        if isinstance(error, _PROGRAMMING_ERRORS) and not _is_of_media_library(error):
            raise
        raise BadSampleError(
            f"{_name_of(source, index, entry)}: {error}",
            index=index,
            sample_id=_id_of(entry),
            files=media_names(entry),
            source=source,
            cause=f"{type(error).__name__}: {error}",
        ) from error
    return {**result, SAMPLE_NAME: _name_of(source, index, entry)} if method == "sample" else result


def _labels(messages: list[dict[str, Any]], input_ids: torch.Tensor, is_target: torch.Tensor) -> torch.Tensor:
    if has_answer(messages) and not is_target.any():
        raise ValueError("the chat template marked no token of the answer")
    return torch.where(is_target, input_ids, -100)


def _is_of_media_library(error: BaseException) -> bool:
    """True for an error of a library that reads media, or of code that it calls."""
    package = __name__.partition(".")[0]
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        library = frame.f_globals.get("__name__", "").partition(".")[0]
        if library in (*_MEDIA_LIBRARIES, package):
            return library != package
    return False


def _id_of(entry: Any) -> Any:
    return entry.get("id") if isinstance(entry, dict) else None


def _name_of(source: str, index: int, entry: Any) -> str:
    """Name of a sample in messages: its index, its `id` if it has one, the data set and its media."""
    sample_id, files = _id_of(entry), media_names(entry)
    named = f" (id {sample_id!r})" if sample_id is not None else ""
    return f"sample {index}{named} of {source}" + (f" [{', '.join(files)}]" if files else "")


def _with_media(message: dict[str, Any], replace: Callable[[Any, str], Any]) -> dict[str, Any]:
    """Returns the message with `replace(media, type)` in the place of its media."""
    if isinstance(message["content"], str):
        return message
    parts = [
        part if part["type"] == "text" else {**part, part["type"]: replace(part[part["type"]], part["type"])}
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _open_media(media: Any, kind: str) -> Any:
    """Opens media that the processor does not take: frames saved by numpy, and the bytes of an image file."""
    if kind == "video" and isinstance(media, str) and media.lower().endswith(".npy"):
        return np.load(media, mmap_mode="r", allow_pickle=False)  # reads the sampled frames alone
    return open_image(io.BytesIO(media)) if kind == "image" and isinstance(media, bytes) else media
