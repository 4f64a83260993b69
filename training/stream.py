# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Training data without an index: streams of entries.

Every rank and worker iterates over the same entries in the same order, which is cheap, as entries are text and paths.
Each worker takes its share of them, and accelerate distributes batches over ranks. These batches hold `UnreadSample`s.
The collator decodes their videos, in the worker of the rank that trains on them.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .bad_samples import BadSample, BadSampleError, BadSampleLedger
from .samples import SampleReader, read_sample
from .sources import parse_sources, stream_entries


@dataclass(frozen=True, eq=False)
class UnreadSample:
    """An entry of a stream, before its media are decoded.

    Attributes:
        source, index: name of the data set, and position in it.
        entry: an entry for `SampleReader`, or a function that returns it.
    """

    source: str
    index: int
    entry: Any
    reader: SampleReader
    bad_samples: BadSampleLedger | None

    def read_sample(self) -> dict[str, torch.Tensor] | BadSample:
        """Returns the sample, as `LlavaVideoDataset` does.

        Raises:
            BadSampleError: for a bad sample without a ledger.
        """
        try:
            return read_sample(self.reader, "sample", self.entry, source=self.source, index=self.index)
        except BadSampleError as error:
            if self.bad_samples is None:
                raise
            return self.bad_samples.add(error)


class LlavaVideoStream(IterableDataset):
    """Samples from one source or several, without an index: for data sets that are too large to open, or on the Hub.

    Iterating yields `UnreadSample`s, which `LlavaVideoCollator` decodes. Their order depends on seed and epoch alone
    (and on the number of DataLoader workers, which take turns), so that a resumed run sees the samples of an
    uninterrupted one. A Trainer needs `max_steps`. `AutoregressiveTrainer` keeps batches whole on their way to the
    ranks; a plain Trainer needs `accelerator_config={"dispatch_batches": False}`.

    Args:
        data: an argument of `DataSource.parse`, or a list of such. The next entry comes from a source with a probability
            proportional to its weight.
        processor, video_root, image_root, allow_outside_root, max_length, truncate, processor_kwargs, ignored_keys,
            bad_samples: as for `LlavaVideoDataset`. The ledger needs `max_samples`.
        shuffle_buffer: entries of a source among which the next one is drawn; 1 keeps their order.
        seed: of the order.
        repeat: restart a source at its end, in another order, without an end. False yields every entry once.

    Raises:
        ValueError: for unknown or contradictory options, and while iterating for a source without entries.
    """

    def __init__(
        self,
        data: Any,
        processor: Any,
        *,
        video_root: str | os.PathLike | None = None,
        image_root: str | os.PathLike | None = None,
        bad_samples: BadSampleLedger | None = None,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        repeat: bool = True,
        **options: Any,
    ) -> None:
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1, got {shuffle_buffer}")
        if bad_samples is not None and bad_samples.max_samples is None:
            raise ValueError("a stream has no number of entries, so its ledger of bad samples needs max_samples")
        self.processor = processor
        self.sources = parse_sources(data)
        self._entries = [stream_entries(source) for source in self.sources]
        self._readers = []
        for source in self.sources:
            root = source.video_root or video_root
            self._readers.append(
                SampleReader(
                    processor,
                    video_root=source.default_root if root is None else root,
                    image_root=source.image_root or image_root,
                    **options,
                )
            )
        self.bad_samples = bad_samples
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.repeat = repeat
        # In shared memory: workers that persist over epochs must see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which changes the order."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[UnreadSample]:
        worker = get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for position, sample in enumerate(self._all()):
            if position % num_workers == worker_id:
                yield sample

    def _all(self) -> Iterator[UnreadSample]:
        """Iterates over the samples of all workers."""
        generator = np.random.default_rng([self.seed, int(self._epoch)])
        running = {number: self._of_source(number) for number in range(len(self.sources))}
        while running:
            weights = np.array([self.sources[number].weight for number in running])
            number = list(running)[generator.choice(len(running), p=weights / weights.sum())]
            try:
                yield next(running[number])
            except StopIteration:
                del running[number]

    def _of_source(self, number: int) -> Iterator[UnreadSample]:
        source, epoch, passes = self.sources[number], int(self._epoch), 0
        while True:
            generator = np.random.default_rng([self.seed, epoch, number, passes])
            is_empty = True
            for index, entry in _shuffled(self._numbered(number), self.shuffle_buffer, generator):
                is_empty = False
                yield UnreadSample(source.label, index, entry, self._readers[number], self.bad_samples)
            if is_empty:
                raise ValueError(f"{source.label} is empty")
            if not self.repeat:
                return
            passes += 1

    def _numbered(self, number: int) -> Iterator[tuple[int, Any]]:
        entries = self._entries[number]
        if isinstance(
            entries, Sequence
        ):  # read later: an unreadable entry is one bad sample, not the end of the stream
            return ((index, functools.partial(entries.__getitem__, index)) for index in range(len(entries)))
        return enumerate(entries)


def _shuffled(items: Iterator[Any], buffer_size: int, generator: np.random.Generator) -> Iterator[Any]:
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        drawn = int(generator.integers(buffer_size))
        yield buffer[drawn]
        buffer[drawn] = item
    yield from (buffer[i] for i in generator.permutation(len(buffer)))
