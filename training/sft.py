# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""`AutoregressiveSFTTrainer`: TRL's `SFTTrainer` with both losses.

`SFTTrainer` alone trains the language model exactly, and the head not at all: it computes its loss from the hidden states by
itself and never asks the model for one. Here the losses and what is logged are those of `AutoregressiveTrainer`; the rest,
such as `peft_config`, activation offloading and the model card, is TRL's.
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
except ImportError:  # said when a trainer is made: this file travels with checkpoints that need none
    datasets, SFTTrainer = None, object


class AutoregressiveSFTTrainer(AutoregressiveTrainer, SFTTrainer):
    """An `AutoregressiveTrainer` that is a TRL `SFTTrainer` too.

    Args:
        model: the model; with `peft_config`, TRL puts the adapters on it. Name the head (`autoregressive_module`) and the
            projector in its `modules_to_save`.
        args: `SFTConfig`. What prepares data there (`max_length`, `packing`, `assistant_only_loss`) has no effect: the
            samples come ready from the data set. Changed in place so that TRL leaves them as they are.
        train_dataset: usually a `LlavaVideoDataset`; anything with a length whose items are such samples.
        eval_dataset: the same.
        data_collator: of such samples; by default a `LlavaVideoCollator` of the processor.
        kwargs: further arguments of `AutoregressiveTrainer` and `SFTTrainer`.

    Raises:
        ImportError: if TRL or datasets is not installed.
        ValueError: as `AutoregressiveTrainer`, and if `args` is no `SFTConfig` or asks for another loss.
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
        # Only TRL's own checks ask for data sets of `datasets`: names, lengths and epochs are those of the real ones.
        self.train_dataset, self.eval_dataset, self.data_collator = train_dataset, eval_dataset, data_collator


def _as_hf_dataset(samples: Any) -> Any:
    """TRL takes no data sets but those of `datasets`: one of indices, whose items are read when they are asked for."""
    indices = datasets.Dataset.from_dict({"index": list(range(len(samples)))})
    return indices.with_transform(partial(_read, samples))


def _read(samples: Any, rows: dict[str, list[int]]) -> dict[str, list[Any]]:
    return {"sample": [samples[index] for index in rows["index"]]}


def _collate(collator: Callable[[list], dict], rows: list[dict[str, Any]]) -> dict[str, Any]:
    return collator([row["sample"] for row in rows])
