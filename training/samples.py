# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Chat messages -> samples: tokens, labels and pixels, or their number of tokens alone.

`SampleReader` is what data sets of both kinds, with and without an index, read their entries with.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from ..processing.frame_sampling import SampledFrames
from ..processing.video_frames import VideoFrames, open_image, video_length
from ..processing.video_inputs import load_images
from .bad_samples import BadSampleError
from .entries import MediaFolders, entry_to_messages, media_names

SAMPLE_NAME = "sample_name"  # of a sample: a short text by which a person finds it


class SampleReader:
    """Entries -> samples.

    Args:
        processor: a `LlavaNextARProcessor`, or one with the same `apply_chat_template`.
        video_root, image_root, allow_outside_root: where media lie; see `MediaFolders`.
        max_length: tokens that a sample may have.
        truncate: cut a sample that is longer at its end instead of refusing it. Visual tokens and the last target are
            never cut off: those are errors still.
        processor_kwargs: options for every call of the processor, such as `{"num_frames": 8}`.

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
    ) -> None:
        self.processor = processor
        self.folders = MediaFolders(
            Path(video_root), Path(video_root if image_root is None else image_root), allow_outside_root
        )
        self.max_length = max_length
        self.truncate = truncate
        self.processor_kwargs = dict(processor_kwargs or {})
        # A template that marks no answers would fail at every sample; say it once, before any is read.
        self._call_processor([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])

    def messages(self, entry: Any) -> list[dict[str, Any]]:
        """Chat messages with the places of their media. Raises ValueError or OSError for an entry that is malformed."""
        return entry_to_messages(entry, self.folders)

    def sample(self, entry: Any) -> dict[str, torch.Tensor]:
        """`input_ids` `[S]`, `labels` `[S]` and what the processor returns for media. Decodes them.

        Raises:
            Exception: of whatever kind a decoder raises on a damaged file; ValueError for all that is known to happen.
        """
        return self.fit(self.encode(entry))

    def encode(self, entry: Any) -> dict[str, torch.Tensor]:
        """As `sample`, of any length."""
        messages = self.messages(entry)
        inputs = self._call_processor([_with_media(message, _open_media) for message in messages])
        input_ids, is_target = inputs["input_ids"][0], inputs["assistant_masks"][0].bool()
        labels = torch.where(is_target, input_ids, -100)
        if any(message["role"] == "assistant" for message in messages) and not is_target.any():
            raise ValueError("the chat template marked no token of the answer")
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
        """The sample within `max_length`. Raises ValueError if it is too long, or what must not be cut off would be."""
        if self.max_length is None or len(sample["input_ids"]) <= self.max_length:
            return sample
        self._check_cut(sample["input_ids"], sample["labels"])
        cut = {name: sample[name][: self.max_length] for name in ("input_ids", "labels")}
        return {**sample, **cut}

    def length(self, entry: Any) -> int:
        """How many tokens `sample` would give, from the headers of videos and without their pixels.

        The processor itself counts, given frames of one pixel in place of the real ones; images are replaced by empty
        ones of their size. Exact where a file's header says the truth about its number of frames and their rate.

        Raises:
            Exception: as `sample`, for what can be seen without decoding.
        """
        messages = [_with_media(message, self._stand_in) for message in self.messages(entry)]
        videos_kwargs = {**self.processor_kwargs.get("videos_kwargs", {}), "do_resize": False}
        inputs = self._call_processor(messages, videos_kwargs=videos_kwargs)
        length = len(inputs["input_ids"][0])
        return length if self.max_length is None or not self.truncate else min(length, self.max_length)

    # -----------------------------------------------------------------------------------------------------------------

    def _call_processor(self, messages: list[dict[str, Any]], **more: Any) -> Any:
        return self.processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={**self.processor_kwargs, **more},
        )

    def _check_cut(self, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        """Refuses a sample that is too long, or whose visual tokens or targets would all be cut off."""
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

    def _stand_in(self, media: Any, kind: str) -> Any:
        """What gives as many tokens as `media`, at no cost."""
        if kind == "image":
            return Image.new("RGB", _upright_size(media))
        if isinstance(media, str) and media.lower().endswith(".npy"):
            media = np.load(media, mmap_mode="r", allow_pickle=False)
        if isinstance(media, (np.ndarray, torch.Tensor)):
            return torch.zeros(len(media), 3, 2, 2, dtype=torch.uint8)
        video_processor = self.processor.video_processor
        options = {k: v for k, v in self.processor_kwargs.items() if k in video_processor.valid_kwargs.__annotations__}
        sampling = video_processor.sampling_for(**{**options, **self.processor_kwargs.get("videos_kwargs", {})})
        total, fps = video_length(media)
        sampled = SampledFrames(np.arange(total)) if sampling is None else sampling.select(total, fps)
        return VideoFrames(
            frames=torch.zeros(len(sampled.indices), 3, 1, 1, dtype=torch.uint8),
            timestamps=torch.from_numpy(sampled.indices / fps),
            indices=torch.from_numpy(sampled.indices),
            frame_types=sampled.frame_types,
            fps=fps,
            duration=total / fps,
            total_frames=total,
            source=str(media)[:200],
        )


def read_sample(reader: SampleReader, method: str, entry: Any, *, source: str, index: int) -> Any:
    """`reader.<method>(entry)`, with every failure named.

    Args:
        entry: or a function without arguments that returns it, where getting it may fail too.

    Raises:
        BadSampleError: if it fails, whatever the failure, but for a missing package and memory that runs out.
    """
    try:
        entry = entry() if callable(entry) else entry
        result = getattr(reader, method)(entry)
    except (ImportError, MemoryError):
        raise  # not the sample's fault
    except Exception as error:  # decoders raise anything on a damaged file: struct.error, EOFError, SyntaxError, ...
        raise BadSampleError(
            f"{_name_of(source, index, entry)}: {error}",
            index=index,
            sample_id=_id_of(entry),
            files=media_names(entry),
            source=source,
            cause=f"{type(error).__name__}: {error}",
        ) from error
    return {**result, SAMPLE_NAME: _name_of(source, index, entry)} if method == "sample" else result


def _id_of(entry: Any) -> Any:
    return entry.get("id") if isinstance(entry, dict) else None


def _name_of(source: str, index: int, entry: Any) -> str:
    """How a person finds a sample: its index, its `id` if it has one, the data set and its media."""
    sample_id, files = _id_of(entry), media_names(entry)
    named = f" (id {sample_id!r})" if sample_id is not None else ""
    return f"sample {index}{named} of {source}" + (f" [{', '.join(files)}]" if files else "")


def _with_media(message: dict[str, Any], replace: Callable[[Any, str], Any]) -> dict[str, Any]:
    """The message with the media among its parts replaced."""
    if isinstance(message["content"], str):
        return message
    parts = [
        part if part["type"] == "text" else {**part, part["type"]: replace(part[part["type"]], part["type"])}
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _open_media(media: Any, kind: str) -> Any:
    """Opens what the processor does not take: frames saved by numpy, and the bytes of an image file."""
    if kind == "video" and isinstance(media, str) and media.lower().endswith(".npy"):
        return np.load(media, mmap_mode="r", allow_pickle=False)  # reads what is sampled, whatever the header claims
    return open_image(io.BytesIO(media)) if kind == "image" and isinstance(media, bytes) else media


def _upright_size(media: Any) -> tuple[int, int]:
    """(width, height) as transformers sees the image, that is, turned the way the camera was held."""
    if isinstance(media, Image.Image):
        image = media
    elif isinstance(media, str) and ("://" in media or media.startswith("data:")):
        image = load_images(media)
    else:
        image = open_image(io.BytesIO(media) if isinstance(media, bytes) else media)
    is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size[::-1] if is_turned else image.size
