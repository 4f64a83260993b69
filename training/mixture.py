# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Several data sets as one, by weight, and the order in which samples are trained on.

Both depend on seed and epoch alone, so that a run that goes on from a checkpoint sees what an uninterrupted one sees.
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
    """Several `LlavaVideoDataset`s. In each epoch one of n samples and weight w gives `round(w * n)` of them: whole
    passes, and for the rest a random choice without repetition that is another one in each epoch.

    Args:
        datasets: with the same processor.
        weights: of each.
        seed: of the choice.

    Raises:
        ValueError: if there are not as many weights as data sets, or a weight leaves a data set without any sample.
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
        # In shared memory: workers that live on over epochs must see it change.
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
        """(which data set, which of its samples) stands at a position in this epoch."""
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
        of_each = [dataset.lengths(num_workers) for dataset in self.datasets]
        return [of_each[number][index] for number, index in map(self.locate, range(len(self)))]

    def check(self) -> None:
        """See `LlavaVideoDataset.check`."""
        for dataset in self.datasets:
            dataset.check()

    def _rest(self, number: int) -> list[int]:
        """The samples of a data set that this epoch adds to whole passes."""
        epoch = int(self._epoch)
        if self._rests is None or self._rests[0] != epoch:
            rests = []
            for which, (dataset, count) in enumerate(zip(self.datasets, self._counts, strict=True)):
                order = np.random.default_rng([self.seed, epoch, which]).permutation(len(dataset))
                rests.append(order[: count % len(dataset)].tolist())
            self._rests = (epoch, rests)
        return self._rests[1][number]


class EpochSampler(Sampler):
    """A random order for each epoch that depends on seed and epoch alone.

    Args:
        dataset: told of each epoch, if it has `set_epoch`.
        seed: of the order.
        group_size: samples of about the same length come together, in groups of so many; needs `dataset.lengths()`.
        num_workers: processes that find out the lengths.
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
    """Sets the epoch of samplers, for as long as they are in use. accelerate does not reach them on several ranks behind
    the batches that a resumed run skips."""

    def __init__(self) -> None:
        self._samplers: weakref.WeakSet[EpochSampler] = weakref.WeakSet()

    def add(self, sampler: EpochSampler) -> None:
        """Takes on a sampler, to be in the same epoch from now on."""
        self._samplers.add(sampler)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for sampler in self._samplers:
            sampler.set_epoch(int(state.epoch))
