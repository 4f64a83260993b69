# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""`AutoregressiveSFTTrainer`: TRL's `SFTTrainer` with both losses.

`SFTTrainer` alone trains the language model and not the head: it computes its loss from the hidden states, without the
loss of the model. Here losses and logs are those of `AutoregressiveTrainer`; `peft_config`, activation offloading and
the model card are TRL's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .collator import LlavaVideoCollator
from .trainer import AutoregressiveTrainer

try:
    import datasets
    from trl import SFTTrainer
except ImportError:  # reported when a trainer is made
    datasets, SFTTrainer = None, object


class AutoregressiveSFTTrainer(AutoregressiveTrainer, SFTTrainer):
    """An `AutoregressiveTrainer` that is a TRL `SFTTrainer` too.

    Args:
        model: the model; with `peft_config`, TRL puts the adapters on it. Name the head (`autoregressive_module`) and the
            projector in its `modules_to_save`.
        args: `SFTConfig`. Its options that prepare data (`max_length`, `packing`, `assistant_only_loss`) have no effect: the
            data set returns prepared samples. Changed in place, so that TRL does not process them again.
        train_dataset: usually a `LlavaVideoDataset`; any data set with a length and such samples.
        eval_dataset: as `train_dataset`.
        data_collator: by default a `LlavaVideoCollator` of the processor.
        kwargs: further arguments of `AutoregressiveTrainer` and `SFTTrainer`.

    Raises:
        ImportError: if TRL or datasets is not installed.
        ValueError: as `AutoregressiveTrainer`, and if `args` is not an `SFTConfig` or selects another loss.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        train_dataset: Any,
        *,
        eval_dataset: Any = None,
        data_collator: Callable[[list], dict] | None = None,
        **kwargs: Any,
    ) -> None:
        if datasets is None:
            raise ImportError("AutoregressiveSFTTrainer needs TRL: pip install trl")
        if not hasattr(args, "dataset_kwargs"):
            raise ValueError(f"args must be a trl.SFTConfig, got {type(args).__name__}")
        if args.loss_type != "nll":
            raise ValueError(f"loss_type={args.loss_type!r} would replace main_loss, which the model computes")
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        args.remove_unused_columns = False
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # the model touches every parameter in every batch
        if kwargs.get("processing_class") is None:
            kwargs["processing_class"] = train_dataset.processor
        if data_collator is None:
            data_collator = LlavaVideoCollator(kwargs["processing_class"])
        super().__init__(
            model,
            args,
            _as_hf_dataset(train_dataset),
            eval_dataset=None if eval_dataset is None else _as_hf_dataset(eval_dataset),
            data_collator=partial(_collate, data_collator),
            **kwargs,
        )
        # Only TRL's checks need data sets of `datasets`. Training uses the given ones, with their names, lengths and epochs.
        self.train_dataset, self.eval_dataset, self.data_collator = train_dataset, eval_dataset, data_collator


def _as_hf_dataset(samples: Any) -> Any:
    """Wraps samples as a `datasets.Dataset` of indices, the type that TRL requires; items are read on access."""
    indices = datasets.Dataset.from_dict({"index": list(range(len(samples)))})
    return indices.with_transform(partial(_read, samples))


def _read(samples: Any, rows: dict[str, list[int]]) -> dict[str, list[Any]]:
    return {"sample": [samples[index] for index in rows["index"]]}


def _collate(collator: Callable[[list], dict], rows: list[dict[str, Any]]) -> dict[str, Any]:
    return collator([row["sample"] for row in rows])
