# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Training data: entries -> samples, by index.

    sources.py         files and data sets -> entries
    entries.py         entry -> chat messages
    control_tokens.py  control tokens in texts
    samples.py         chat messages -> sample
    sample_lengths.py  chat messages -> tokens of a sample, without decoding
    bad_samples.py     errors and ledger of bad samples
    mixture.py         several data sets by weight, and the order of samples
    stream.py          data sets without an index
    collator.py        samples -> batches

The processor decodes videos in a DataLoader worker, when the sample is requested. Nothing is decoded ahead of time or left out
silently: a bad sample is an error that names it, or a line in a ledger.
"""

import os
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from .bad_samples import BadSample, BadSampleError, BadSampleLedger
from .entries import has_answer
from .mixture import LlavaVideoMixture
from .samples import SampleReader, read_sample
from .sources import ArrowEntries, DataSource, open_entries, parse_sources
from .stream import LlavaVideoStream, UnreadSample

_LENGTHS_AT_A_TIME = 16  # samples of a worker between two updates of the progress bar


class LlavaVideoDataset(Dataset):
    """Samples for training.

        {"conversations": [{"from": "human", "value": "<video>\\nWhat happens?"}, {"from": "gpt", "value": "Rain."}],
         "video": "x.mp4"}

    `video` and `image` hold a path or a list of paths, in the order of the placeholders. Chat messages under
    `messages` are accepted as well, their media among the content parts or under `video` and `image`. A video without a
    conversation is a sample for reconstruction alone. A `.npy` file is a video of frames saved by numpy, as is a folder
    of images. `system` is the text of a system prompt, `id` is used in errors, and notes such as `question_type`
    (`entries.ANNOTATION_KEYS`) change nothing. Any other key with a value is an error.

    A sample is a dict of tensors: `input_ids` `[S]`, `labels` `[S]` (-100 except in assistant turns, the token that
    ends the turn included), and the processor's outputs for its media; beside them, `sample_name`, a text.

    Args:
        data: path of a `.json`, `.jsonl` or `.parquet` file, of a folder written by `datasets`' `save_to_disk`, or id of
            a data set on the Hub; a `DataSource` for more options; a `datasets.Dataset`; or the entries themselves.
        processor: a `LlavaNextARProcessor`, or one with the same `apply_chat_template`.
        video_root: folder that paths are relative to; by default that of the file, or the working folder for a list.
        image_root: the same for images; by default `video_root`.
        allow_outside_root: accept URLs, and paths that leave the folder (`..`, absolute paths, symbolic links).
            Otherwise they are errors, so that a data set from elsewhere cannot read other files.
        max_length: tokens that a sample may have.
        truncate: cut a longer sample at its end instead of raising an error. Visual tokens and the last target are never cut
            off: such samples remain errors.
        processor_kwargs: options for every call of the processor, such as `{"num_frames": 8}`.
        ignored_keys: further keys of entries (and of their turns and content parts) that may be left out.
        bad_samples: a ledger; training then leaves bad samples out, and `dataset[i]` is a `BadSample`, which
            `LlavaVideoCollator` drops. Without a ledger a bad sample is an error.

    Raises:
        ValueError: if the file holds no list of entries, or the processor's chat template marks no assistant turns.
        BadSampleError: by `dataset[i]`, for a sample that cannot be used.
        TooManyBadSamplesError: by `dataset[i]`, above the bounds of the ledger.
    """

    def __init__(
        self,
        data: "str | os.PathLike | DataSource | Sequence[dict[str, Any]]",
        processor: Any,
        *,
        video_root: str | os.PathLike | None = None,
        image_root: str | os.PathLike | None = None,
        allow_outside_root: bool = False,
        max_length: int | None = None,
        truncate: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        ignored_keys: Collection[str] = (),
        bad_samples: BadSampleLedger | None = None,
    ) -> None:
        self.name, default_root = "the list of samples", os.getcwd()
        if isinstance(data, (str, os.PathLike)) or hasattr(data, "default_root"):
            source = data if hasattr(data, "default_root") else DataSource.parse(os.fspath(data))
            self.name, default_root = source.label, source.default_root
            video_root, image_root = source.video_root or video_root, source.image_root or image_root
            data = open_entries(source)
        elif hasattr(data, "with_format"):
            self.name, data = "the data set", ArrowEntries(data)
        if not len(data):
            raise ValueError(f"{self.name} is empty")
        self.entries = data
        self.processor = processor
        self.reader = SampleReader(
            processor,
            video_root=default_root if video_root is None else video_root,
            image_root=image_root,
            allow_outside_root=allow_outside_root,
            max_length=max_length,
            truncate=truncate,
            processor_kwargs=processor_kwargs,
            ignored_keys=ignored_keys,
        )
        self.bad_samples = bad_samples
        if bad_samples is not None:
            bad_samples.expect(len(data))
        self._lengths: list[int] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor] | BadSample:
        try:
            return self._read("sample", index)
        except BadSampleError as error:
            if self.bad_samples is None:
                raise
            return self.bad_samples.add(error)

    def messages(self, index: int) -> list[dict[str, Any]]:
        """Returns the entry as chat messages with the full paths of its media; decodes nothing.

        Raises:
            BadSampleError: if it is malformed, or a file is missing or outside of its folder.
        """
        return self._read("messages", index)

    def check(self) -> None:
        """Validates all entries without decoding media, so that a typo does not surface after hours.

        Raises:
            BadSampleError: for the first entry that is malformed or whose file is missing. With a ledger it is recorded
                instead.
        """
        for index in range(len(self)):
            try:
                self.messages(index)
            except BadSampleError as error:
                if self.bad_samples is None:
                    raise
                self.bad_samples.add(error)

    def lengths(self, num_workers: int = 0) -> list[int]:
        """Returns the number of tokens of each sample, from texts and headers of media; computed once, with a progress bar.

        Exact where a header gives the true number of frames and rate. With a ledger, 1 for a sample that shows to be
        bad without decoding. Used for batches of samples of similar length.

        Args:
            num_workers: processes that read headers.

        Raises:
            BadSampleError: for the first sample that shows to be bad without decoding, unless there is a ledger.
        """
        if self._lengths is None:
            loader = DataLoader(
                _Lengths(self), batch_size=_LENGTHS_AT_A_TIME, num_workers=num_workers, collate_fn=list
            )
            lengths = []
            with logging.tqdm(total=len(self), desc=f"lengths of {self.name}") as progress:
                for part in loader:
                    lengths += part
                    progress.update(len(part))
            self._lengths = lengths
        return self._lengths

    def _read(self, method: str, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}, which has {len(self)}")
        return read_sample(self.reader, method, lambda: self.entries[index], source=self.name, index=index)


class _Lengths(Dataset):
    """Data set of the numbers of tokens of another data set's samples."""

    def __init__(self, dataset: LlavaVideoDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> int:
        try:
            return self.dataset._read("length", index)
        except BadSampleError:
            if self.dataset.bad_samples is None:
                raise
            return 1  # training meets it again, and records it


def any_answers(samples: Sequence[UnreadSample]) -> bool:
    """Returns True if any of these samples has an answer or is malformed; decodes nothing."""
    for sample in samples:
        try:
            messages = read_sample(sample.reader, "messages", sample.entry, source=sample.source, index=sample.index)
        except BadSampleError:
            return True
        if has_answer(messages):
            return True
    return False


def load_training_data(
    data: Any,
    processor: Any,
    *,
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    seed: int = 0,
    bad_samples: BadSampleLedger | None = None,
    **options: Any,
) -> LlavaVideoDataset | LlavaVideoMixture | LlavaVideoStream:
    """Opens one source or several with weights as a data set for a Trainer.

    Args:
        data: an argument of `DataSource.parse`, or a list of such.
        streaming: read the sources one entry after the other; see `LlavaVideoStream`.
        shuffle_buffer: see `LlavaVideoStream`.
        seed: of the order of a mixture or a stream.
        bad_samples: see `LlavaVideoDataset`.
        options: further arguments of `LlavaVideoDataset`.

    Raises:
        ValueError: for contradictory or unknown options; see `DataSource`.
    """
    sources = parse_sources(data)
    options = {**options, "bad_samples": bad_samples}
    if streaming:
        return LlavaVideoStream(sources, processor, shuffle_buffer=shuffle_buffer, seed=seed, **options)
    parts = [LlavaVideoDataset(source, processor, **options) for source in sources]
    if len(sources) == 1 and sources[0].weight == 1:
        return parts[0]
    return LlavaVideoMixture(parts, [source.weight for source in sources], seed=seed)
