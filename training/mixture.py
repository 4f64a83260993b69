# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Mixtures of data sets by weight, and the order of samples.

Both depend on seed and epoch alone, so that a resumed run sees the samples of an uninterrupted one.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices


class LlavaVideoMixture(Dataset):
    """Several `LlavaVideoDataset`s as one.

    In each epoch a data set of n samples and weight w contributes `round(w * n)` samples: whole passes, and for the rest a
    random choice without repetition, which differs between epochs.

    Args:
        datasets: with the same processor.
        weights: one for each data set.
        seed: of the random choice.

    Raises:
        ValueError: if the numbers of weights and data sets differ, or a weight leaves a data set without samples.
    """

    def __init__(self, datasets: Sequence[Any], weights: Sequence[float], *, seed: int = 0) -> None:
        if not datasets or len(datasets) != len(weights):
            raise ValueError(f"{len(datasets)} data sets were given with {len(weights)} weights")
        self.datasets = list(datasets)
        self.processor = datasets[0].processor
        self.seed = seed
        self._counts = [round(weight * len(dataset)) for dataset, weight in zip(datasets, weights, strict=True)]
        for dataset, weight, count in zip(datasets, weights, self._counts, strict=True):
            if count < 1:
                raise ValueError(f"weight {weight} leaves none of the {len(dataset)} samples of {dataset.name}")
        # In shared memory: workers that persist over epochs must see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._rests: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Chooses the samples of an epoch. `AutoregressiveTrainer` calls it; a plain Trainer does on one process."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return sum(self._counts)

    def __getitem__(self, position: int) -> Any:
        number, index = self.locate(position)
        return self.datasets[number][index]

    def locate(self, position: int) -> tuple[int, int]:
        """Returns (number of the data set, index of its sample) at a position in this epoch."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of a mixture of {len(self)} samples")
        number = 0
        while position >= self._counts[number]:
            position -= self._counts[number]
            number += 1
        num_samples = len(self.datasets[number])
        num_whole = self._counts[number] // num_samples * num_samples
        return number, position % num_samples if position < num_whole else self._rest(number)[position - num_whole]

    def lengths(self, num_workers: int = 0) -> list[int]:
        """Tokens of the sample at each position in this epoch; see `LlavaVideoDataset.lengths`."""
        lengths = [dataset.lengths(num_workers) for dataset in self.datasets]
        return [lengths[number][index] for number, index in map(self.locate, range(len(self)))]

    def check(self) -> None:
        """See `LlavaVideoDataset.check`."""
        for dataset in self.datasets:
            dataset.check()

    def _rest(self, number: int) -> list[int]:
        """The samples of a data set that this epoch adds to whole passes."""
        epoch = int(self._epoch)
        if self._rests is None or self._rests[0] != epoch:
            rests = []
            for part, (dataset, count) in enumerate(zip(self.datasets, self._counts, strict=True)):
                order = np.random.default_rng([self.seed, epoch, part]).permutation(len(dataset))
                rests.append(order[: count % len(dataset)].tolist())
            self._rests = (epoch, rests)
        return self._rests[1][number]


class EpochSampler(Sampler):
    """A random order for each epoch that depends on seed and epoch alone.

    Args:
        dataset: its `set_epoch`, if it has one, is called at each epoch.
        seed: of the order.
        group_size: size of groups of samples of similar length; needs `dataset.lengths()`. None: no groups.
        num_workers: processes that compute the lengths.
    """

    def __init__(self, dataset: Any, *, seed: int = 0, group_size: int | None = None, num_workers: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.group_size = group_size
        self.num_workers = num_workers
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.group_size is None:
            return iter(torch.randperm(len(self), generator=generator).tolist())
        lengths = self.dataset.lengths(self.num_workers)
        return iter(get_length_grouped_indices(lengths, self.group_size, generator=generator))


class FollowEpoch(TrainerCallback):
    """Sets the epoch of samplers while they are in use.

    On several ranks accelerate does not reach them behind the batches that a resumed run skips.
    """

    def __init__(self) -> None:
        self._samplers: weakref.WeakSet[EpochSampler] = weakref.WeakSet()

    def add(self, sampler: EpochSampler) -> None:
        """Registers a sampler."""
        self._samplers.add(sampler)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for sampler in self._samplers:
            sampler.set_epoch(int(state.epoch))
