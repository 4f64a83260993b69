"""Trainings in which one sample makes one step non-finite; in this process or, by training_runs.py, on two ranks."""

import copy
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny import make_sample, tiny_model
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from llava_next_ar.training import throughput
from llava_next_ar.training.trainer import (
    AutoregressiveTrainer,
    BadStepError,
    BadStepPolicy,
    LlavaVideoCollator,
    StopOnSigterm,
)


def named_samples(config: Any, number: int, bad: int | None = None) -> list[dict[str, Any]]:
    """Samples of unequal length, every other one with a video; the pixels of one overflow float32."""
    samples = []
    for index in range(number):
        with_video = index % 2 == 1
        sample = make_sample(config, [2 + index % 3] if with_video else [], seed=index, text=4 + index)
        made = {"input_ids": sample["input_ids"], "labels": sample["labels"], "sample_name": f"clip {index}"}
        if with_video:
            video = sample["videos"][0][None].clone()
            made["pixel_values_videos"] = torch.full_like(video, 3e38) if index == bad else video
            made["video_frame_mask"] = torch.ones(video.shape[:2], dtype=torch.bool)
            made["video_timestamps"] = sample["times"][0][None]
        samples.append(made)
    return samples


def losses_logged(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log entries of training steps, without measured times."""
    return [
        {name: value for name, value in entry.items() if name not in throughput.ENTRIES}
        for entry in log_history
        if "loss" in entry
    ]


@dataclass(frozen=True)
class Unread:
    """Sample that records when it is read."""

    index: int
    sample: dict[str, Any]
    read: list[int]

    def read_sample(self) -> dict[str, Any]:
        self.read.append(self.index)
        return self.sample


class Stream(IterableDataset):
    """Samples in their order. `read`: those that this process has read."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.samples = samples
        self.read: list[int] = []

    def __iter__(self) -> Iterator[Unread]:
        return iter([Unread(index, sample, self.read) for index, sample in enumerate(self.samples)])


def train(
    samples: list[dict[str, Any]] | Stream,
    steps: int,
    bad_steps: BadStepPolicy | None = None,
    trainer_class: type[AutoregressiveTrainer] = AutoregressiveTrainer,
    folder: str | None = None,
    resume: bool = False,
    dropout: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    """Weights, state of the optimizer, log and ledger of a training in the order of the samples."""
    model = tiny_model(head={"loss_weight": 0.5})
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    with tempfile.TemporaryDirectory() as temporary:
        folder = temporary if folder is None else folder
        defaults = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_strategy": "no"}
        defaults |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none"}
        defaults |= {"use_cpu": True, "disable_tqdm": True, "train_sampling_strategy": "sequential"}
        defaults |= {"ddp_find_unused_parameters": False, "max_steps": steps}
        data = copy.deepcopy(samples)
        trainer = trainer_class(
            model,
            TrainingArguments(folder, **{**defaults, **options}),
            data,
            data_collator=LlavaVideoCollator(0),
            bad_steps=bad_steps,
            callbacks=[StopOnSigterm()],
        )
        error = None
        try:
            trainer.train(resume_from_checkpoint=resume)
        except BadStepError as caught:
            error = {"message": str(caught), "step": caught.step, "batches": caught.batches}
        trainer.accelerator.wait_for_everyone()
        ledger = Path(folder) / "bad_steps.jsonl"
        return {
            "weights": model.state_dict(),
            "optimizer": trainer.optimizer.state_dict()["state"],
            "log": losses_logged(trainer.state.log_history),
            "result": trainer.state.log_history[-1],
            "measured": [
                {name: entry[name] for name in throughput.ENTRIES if name in entry}
                for entry in trainer.state.log_history
                if "loss" in entry
            ],
            "ledger": [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else [],
            "error": error,
            "processes": trainer.accelerator.num_processes,
            "steps": trainer.state.global_step,
            "checkpoints": sorted(path.name for path in Path(folder).glob("checkpoint-*")),
            "read": data.read if isinstance(data, Stream) else None,
        }


class Terminated(AutoregressiveTrainer):
    """The second rank alone gets the signal, in the middle of the last step but one."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == self.args.max_steps - 2 and self.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(*args, **kwargs)


class Disagreeing(AutoregressiveTrainer):
    """The second rank alone has a non-finite gradient norm, in the second step."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        clip = self.accelerator.clip_grad_norm_

        def clip_grad_norm(*args: Any, **kwargs: Any) -> torch.Tensor:
            is_bad = self.state.global_step == 1 and self.args.process_index == 1
            return clip(*args, **kwargs) * (float("nan") if is_bad else 1)

        self.accelerator.clip_grad_norm_ = clip_grad_norm


def count_reductions(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], int]:
    """A training, and the number of tensors that Python reduced over the ranks."""
    calls, reduce = [], torch.distributed.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return reduce(*args, **kwargs)

    torch.distributed.all_reduce = counted
    try:
        return train(*args, **kwargs), len(calls)
    finally:
        torch.distributed.all_reduce = reduce


def whole_and_in_parts(
    samples: list[dict[str, Any]] | Stream, steps: int, folder: Path, **options: Any
) -> dict[str, dict[str, Any]]:
    """A run, a run that is stopped before its last step, and its continuation."""
    options = {"dropout": 0.1, "logging_steps": steps, **options}
    return {
        "whole": train(samples, steps, **options),
        "terminated": train(samples, steps, trainer_class=Terminated, folder=str(folder), **options),
        "resumed": train(samples, steps, folder=str(folder), resume=True, **options),
    }


def run_on_ranks(folder: Path) -> dict[str, Any]:
    """On two ranks, in steps of 2 x 2 of twelve samples: the second step spoiled by the second rank's last batch; runs
    that are stopped and resumed, in a random order in the second epoch."""
    config = tiny_model().config
    spoiled, good = named_samples(config, 12, bad=7), named_samples(config, 12)
    return {
        "skip": train(spoiled, 3, BadStepPolicy("skip")),
        "disagree": train(good, 3, BadStepPolicy("skip"), Disagreeing),
        "reductions": count_reductions(good, 3, logging_steps=3),
        "absent": train(good[:4] + good[8:], 2),
        "stop": train(spoiled, 3),
        "whole run": train(good, 3),
        "in order": whole_and_in_parts(good, 3, folder / "in_order"),
        "at random": whole_and_in_parts(good, 6, folder / "random", train_sampling_strategy="random"),
        "stream": whole_and_in_parts(Stream(good), 3, folder / "stream"),
    }
