# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Lines of a training on the terminal: one for each log entry, with the remaining time."""

import datetime
import time
from collections.abc import Mapping
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback


def show_progress(trainer: Trainer) -> None:
    """Replaces the dictionaries that a Trainer prints, with its progress bar or without, by lines."""
    for callback, lines in ((ProgressCallback, ProgressBarWithLines), (PrinterCallback, ProgressLines)):
        if trainer.pop_callback(callback) is not None:
            trainer.add_callback(lines())


class ProgressLines(PrinterCallback):
    """Prints a line for each log entry, on the first process alone."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start, self._first_step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        line = self._line(state, logs or {})
        if line is not None and state.is_world_process_zero:
            print(line, flush=True)

    def _line(self, state: Any, logs: Mapping[str, Any]) -> str | None:
        """Returns the line of a log entry of training steps or of an evaluation, None for another entry."""
        if "loss" in logs:
            seconds, done = time.monotonic() - self._start, state.global_step - self._first_step
            left = seconds / max(done, 1) * (state.max_steps - state.global_step)
            return describe_step(state.global_step, state.max_steps, seconds, left, logs)
        evaluated = {
            name: f"{value:.4g}" for name, value in logs.items() if name.startswith("eval") and _is_result(name)
        }
        if not evaluated:
            return None
        return f"evaluation at step {state.global_step}: " + ", ".join(f"{name} {v}" for name, v in evaluated.items())


class ProgressBarWithLines(ProgressCallback):
    """The progress bar, with the same lines above it."""

    def __init__(self) -> None:
        super().__init__()
        self._lines = ProgressLines()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._lines.on_train_begin(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        line = self._lines._line(state, logs or {})
        if line is not None and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line)


def describe_step(step: int, max_steps: int, seconds: float, seconds_left: float, logs: Mapping[str, float]) -> str:
    """Returns the line of a log entry of training steps; entries that are missing are left out."""
    width = len(str(max_steps))
    parts = [f"step {step:>{width}}/{max_steps}", f"{_clock(seconds)}, {_clock(seconds_left)} left"]
    loss = f"loss {logs['loss']:.4g}"
    if "autoregressive_loss" in logs:
        loss += f" (text {logs['main_loss']:.4g}, frames {logs['autoregressive_loss']:.4g}"
        share = logs.get("autoregressive_share")
        loss += ")" if share is None else f", {share:.0%} of the total)"
    parts.append(loss)
    for name, text in (
        ("skill", "skill {:+.3f}"),
        ("learning_rate", "rate {:.2g}"),
        ("grad_norm", "norm {:.3g}"),
        ("skipped_steps", "{} steps skipped"),
        ("samples_per_second", "{:.3g} samples/s"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("data_wait_share", "{:.0%} waiting for data"),
        ("peak_memory_gib", "{:.1f} GiB"),
        ("model_flops_utilization", "{:.0%} MFU"),
    ):
        if name in logs:
            parts.append(text.format(logs[name]))
    return "   ".join(parts)


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _is_result(name: str) -> bool:
    return not name.endswith(("_runtime", "_per_second", "_preparation_time"))
