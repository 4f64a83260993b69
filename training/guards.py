# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Monitors of a training: non-finite or exploding steps, and the share of the reconstruction in the loss."""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .bad_samples import is_bad_sample
from .collator import read_samples
from .samples import SAMPLE_NAME

SAMPLE_NAMES = "sample_names"  # of a batch
BAD_STEPS = "bad_steps.jsonl"
# The recommendation of the user's guide. On the synthetic clips of the study larger shares give a higher accuracy on questions
# about motion: experiments/study/results/weights.md.
RECOMMENDED_SHARE = (0.05, 0.15)
_MAX_NAMES = 20  # in a message; the ledger lists all
_MIN_NORMS = 20  # gradient norms before one can count as an explosion


class BadStepError(RuntimeError):
    """A bad optimizer step; the weights are those before it (under DeepSpeed, after it).

    Attributes:
        step: the number that the step would have had.
        batches: of all ranks, as in the ledger: `[{"rank", "batch", "loss", "samples"}]`.
    """

    def __init__(self, message: str, *, step: int, batches: Sequence[dict[str, Any]]) -> None:
        super().__init__(message)
        self.step = step
        self.batches = list(batches)


@dataclass(frozen=True)
class BadStepPolicy:
    """Reaction to an optimizer step whose gradient is not finite or, on demand, unusually large.

    With float16 an infinite gradient is part of the search for the loss scale. There the loss is examined instead.

    A skipped step changes neither weights, optimizer nor logged losses, bit for bit. It counts as a step, also in the
    schedule of the learning rate.

    Attributes:
        action: `stop` (raise `BadStepError`) or `skip`. Either way `bad_steps.jsonl` in the `output_dir` records the step, with
            the losses and the names of the samples of each batch.
        max_skipped_steps: bound for the whole run; the next bad step stops it.
        max_consecutive_skips: bound for steps in a row; the next bad step stops the run, since weights that are not finite do
            not recover.
        explosion_factor: a gradient norm above this factor times the median of the last `explosion_window` good steps makes a
            step bad, from 20 good steps on. None: only non-finite steps are bad.
        explosion_window: number of good steps of the median.

    Raises:
        ValueError: on an unknown action or a number out of range.
    """

    action: str = "stop"
    max_skipped_steps: int = 10
    max_consecutive_skips: int = 3
    explosion_factor: float | None = None
    explosion_window: int = 100

    def __post_init__(self) -> None:
        if self.action not in ("stop", "skip"):
            raise ValueError(f"action must be 'stop' or 'skip', got {self.action!r}")
        for name in ("max_skipped_steps", "max_consecutive_skips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; 'stop' skips none")
        if self.explosion_factor is not None and self.explosion_factor <= 1:
            raise ValueError(f"explosion_factor must be over 1, got {self.explosion_factor}")
        if self.explosion_window < _MIN_NORMS:
            raise ValueError(f"explosion_window must be at least {_MIN_NORMS}, got {self.explosion_window}")


class StepGuard:
    """Judges each optimizer step before it is made. All ranks must pass the same numbers, to reach the same verdict."""

    def __init__(self, policy: BadStepPolicy, output_dir: str) -> None:
        self.policy = policy
        self.skipped = 0
        self._in_a_row = 0
        self._norms: deque[float] = deque(maxlen=policy.explosion_window)
        self._ledger = Path(output_dir) / BAD_STEPS
        self._names: list[list[str | None] | None] = []  # of each batch
        self._losses: list[torch.Tensor] = []

    def begin(self, batches: Sequence[dict[str, Any]]) -> list[int]:
        """Begins a step: removes the names of the samples from its batches, since they are not inputs of the model.

        Returns:
            number of samples of each batch.
        """
        self._names = [batch.pop(SAMPLE_NAMES, None) for batch in batches]
        self._losses = []
        return [
            len(batch["input_ids"]) if names is None else len(names)
            for batch, names in zip(batches, self._names, strict=True)
        ]

    def add(self, loss: torch.Tensor) -> None:
        """Adds the loss of one batch, which stays on the device unless the step is bad."""
        self._losses.append(loss.detach())

    @property
    def loss(self) -> torch.Tensor:
        """Sum over the batches of this rank so far, scalar."""
        return torch.stack(self._losses).sum() if self._losses else torch.zeros(())

    def judge(self, norm: float, loss: float | None = None) -> str | None:
        """Returns the fault of a step, or None. `loss` is judged instead of the norm where that may be infinite."""
        problem = None
        if not math.isfinite(norm if loss is None else loss):
            problem = f"the gradient norm is {norm}" if loss is None else f"the loss is {loss}"
        elif self.policy.explosion_factor is not None and len(self._norms) >= _MIN_NORMS and math.isfinite(norm):
            usual = statistics.median(self._norms)
            if norm > self.policy.explosion_factor * usual:
                problem = (
                    f"the gradient norm is {norm:.4g}, {norm / max(usual, 1e-30):.4g} times the usual {usual:.4g} "
                    f"(explosion_factor={self.policy.explosion_factor:g})"
                )
        if problem is None:
            self._in_a_row = 0
            if math.isfinite(norm):
                self._norms.append(norm)
        return problem

    def act(self, problem: str, *, step: int, norm: float, rank: int, world_size: int) -> str:
        """Records a bad step in the ledger and returns a warning; every rank must call it.

        Raises:
            BadStepError: if the policy is to stop, or its bounds are reached.
        """
        batches = [
            {"rank": rank, "batch": index, "loss": _number(loss), "samples": names}
            for index, (loss, names) in enumerate(zip(torch.stack(self._losses).tolist(), self._names, strict=True))
        ]
        if world_size > 1:
            of_ranks: list[Any] = [None] * world_size
            torch.distributed.all_gather_object(of_ranks, batches)
            batches = [batch for rows in of_ranks for batch in rows]
        policy = self.policy
        if policy.action == "skip":
            self.skipped += 1
            self._in_a_row += 1
        too_many = None
        if self.skipped > policy.max_skipped_steps:
            too_many = f"{policy.max_skipped_steps} steps were skipped before (max_skipped_steps)"
        elif self._in_a_row > policy.max_consecutive_skips:
            too_many = f"the {policy.max_consecutive_skips} steps before were skipped, too (max_consecutive_skips)"
        stops = policy.action == "stop" or too_many is not None
        if rank == 0:
            line = {
                "step": step,
                "problem": problem,
                "grad_norm": _number(norm),
                "action": "stop" if stops else "skip",
            }
            self._ledger.parent.mkdir(parents=True, exist_ok=True)
            with open(self._ledger, "a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "batches": batches}) + "\n")
        text = f"step {step}: {problem}. {_describe(batches)} All are in {self._ledger}."
        if stops:
            hint = f"{too_many}." if too_many else "Bad steps can also be skipped (BadStepPolicy)."
            raise BadStepError(f"{text} {hint}", step=step, batches=batches)
        return f"{text} The step is skipped ({self.skipped} so far)."

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "norms": list(self._norms)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        self._norms = deque(state["norms"], maxlen=self.policy.explosion_window)


class NamingCollator:
    """Wrapper of a collator that adds the names of the samples to its batch.

    The name of a sample is its value under `sample_name`, or None. Bad samples, which the collator leaves out, have none.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        samples = read_samples(samples)
        return {
            **self.collator(samples),
            SAMPLE_NAMES: [_name(sample) for sample in samples if not is_bad_sample(sample)],
        }


class ShareWatch:
    """Warns once when the reconstruction's share of the loss stays outside of the recommended range.

    Args:
        window: log entries; the share is that of their losses together.
        recommended: lowest and highest share without a report; (0, 1) reports nothing.

    Raises:
        ValueError: if `recommended` is not a range within 0 and 1.
    """

    def __init__(self, window: int = 20, recommended: Sequence[float] = RECOMMENDED_SHARE) -> None:
        if len(recommended) != 2 or not 0 <= recommended[0] < recommended[1] <= 1:
            raise ValueError(f"recommended_share is {list(recommended)}, expected two rising numbers from 0 to 1")
        self.recommended = tuple(recommended)
        self._entries: deque[tuple[float, float]] = deque(maxlen=window)
        self._has_warned = False

    def add(self, main_loss: float, total_loss: float) -> str | None:
        """Adds the losses of a log entry; returns a warning, or None."""
        self._entries.append((main_loss, total_loss))
        if self._has_warned or len(self._entries) < self._entries.maxlen:
            return None
        main, total = (sum(values) for values in zip(*self._entries, strict=True))
        if not main > 0 or not math.isfinite(total):
            return None  # videos without text only: without a proportion to keep
        low, high = self.recommended
        share = 1 - main / total
        if low <= share <= high:
            return None
        self._has_warned = True
        observed = (
            f"the reconstruction loss was {share:.1%} of the total loss over the last {len(self._entries)} log entries; "
            f"{low:.0%} to {high:.0%} are recommended"
        )
        if share <= 0:
            return f"{observed}. Is loss_weight 0, or has no video two frames?"
        goal = (low + high) / 2
        factor = goal / (1 - goal) * (1 - share) / share
        way = "raise" if factor > 1 else "lower"
        return f"{observed}: {way} loss_weight, to {factor:.2g} times what it is, for a share of {goal:.0%}"


def _name(sample: Any) -> str | None:
    return sample.get(SAMPLE_NAME) if isinstance(sample, Mapping) else None


def _number(value: float) -> float | str:
    """A number, or a text for one that JSON lacks, such as nan."""
    return value if math.isfinite(value) else str(value)


def _describe(batches: Sequence[dict[str, Any]]) -> str:
    """Lists the batches whose loss is not finite, or all if there are none."""
    blamed = [batch for batch in batches if isinstance(batch["loss"], str)] or batches
    texts = []
    for batch in blamed:
        names = [str(name) for name in batch["samples"] or () if name is not None]
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        listed = ", ".join(names[:_MAX_NAMES]) + more if names else "samples without a sample_name"
        loss = batch["loss"] if isinstance(batch["loss"], str) else f"{batch['loss']:.4g}"
        texts.append(f"batch {batch['batch']} of rank {batch['rank']} (loss {loss}): {listed}.")
    more = f" {len(texts) - _MAX_NAMES} batches more." if len(texts) > _MAX_NAMES else ""
    return " ".join(texts[:_MAX_NAMES]) + more
