# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Preemption and Ctrl-C: a checkpoint at the end of the step, then a stop of all ranks.

torch's launcher (`torchrun`, `accelerate launch`) passes a signal on to its ranks and kills them 30 seconds later. So the first
rank of a machine stops the launcher while the checkpoint is being saved, see `hold_launcher`. A step that takes longer than 30
seconds needs `TORCH_ELASTIC_SHUTDOWN_TIMEOUT` in the environment of the launcher.
"""

import os
import signal
import subprocess
import threading
import time
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # of the launcher, in seconds; torch 2.10 and newer
_SAME_KEY_PRESS = 1.0  # seconds; a launcher passes Ctrl-C on to a process that the terminal has sent it to already


class StopOnSigterm(TrainerCallback):
    """Callback that saves a checkpoint and stops after SIGTERM or Ctrl-C, at the end of the step, on all ranks alike.

    A second Ctrl-C raises KeyboardInterrupt at once. A further SIGTERM has no effect, since launchers repeat it while a
    checkpoint is being written. An evaluation in progress is finished first. The previous handlers are restored when training
    ends; in a `ResumableTrainer` after an exception too, in any other Trainer by `restore`. Ctrl-C stays ignored where it was
    ignored before (`nohup`, `&` in a script).

    Works with any Trainer. An `AutoregressiveTrainer` exchanges the requests of the ranks together with the gradient norm;
    with any other one, this callback needs a collective of its own in each step.

    Transformers' own `enable_jit_checkpoint` saves in the middle of a step, after changes of random states and losses,
    and on each rank separately.

    Attributes:
        stopped: signal that stopped the training before its end, 0 without one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)  # the first wins where ranks differ

    def __init__(self) -> None:
        self.stopped = 0
        self._requested: dict[int, float] = {}  # signal -> time of its arrival
        self._agreed: list[float] | None = None
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()
        self._reports = False
        self._launcher: subprocess.Popen | None = None

    @property
    def requests(self) -> list[float]:
        """For each of `SIGNALS`, 1.0 if this process has received it."""
        return [float(signum in self._requested) for signum in self.SIGNALS]

    def agree(self, requests: list[float]) -> None:
        """Takes the sum of `requests` over all ranks for the step that is about to end."""
        self._agreed = requests

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped, self._agreed = 0, None
        self._requested.clear()
        self._process = os.getpid()
        self._reports = state.is_local_process_zero
        # Still installed where a plain Trainer broke off, or starts again with smaller batches. Only the main thread may.
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        for signum in self.SIGNALS:
            if signum != signal.SIGINT or signal.getsignal(signum) is not signal.SIG_IGN:
                self._previous[signum] = signal.signal(signum, self._request)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Puts back the handlers from before training, if they are not back already, and lets the launcher go on."""
        for signum, handler in self._previous.items():
            # None: it was not set from Python, and cannot be set again from here.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        if self._launcher is not None:
            self._launcher.communicate()
            self._launcher = None

    def _request(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a forked worker of a DataLoader gets the terminal's signal too, and is ended by its trainer
        now = time.monotonic()
        if signum == signal.SIGINT:
            if now - self._requested.get(signum, now) > _SAME_KEY_PRESS:
                self.restore()
                raise KeyboardInterrupt
            if signum not in self._requested and self._reports:
                # A signal may arrive while a stream is being written to, which no second write may enter.
                os.write(2, b"\nCtrl-C: saving a checkpoint after this step; press it again to stop at once\n")
        self._requested.setdefault(signum, now)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        requests, self._agreed = self._agreed, None
        if requests is None:
            requests = self.requests
            if args.world_size > 1:
                everywhere = torch.tensor(requests, device=args.device)
                torch.distributed.all_reduce(everywhere)
                requests = everywhere.tolist()
        signum = next((signum for signum, number in zip(self.SIGNALS, requests, strict=True) if number > 0), None)
        if signum is not None and not control.should_training_stop:
            if state.is_world_process_zero:
                logger.warning(f"{signum.name}: saving a checkpoint after step {state.global_step} and stopping")
            if signum == signal.SIGTERM:  # here all ranks are alive, and need no launcher to end each other
                self._launcher = hold_launcher()
            self.stopped = int(signum)
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # a launcher may kill the process before its end

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:
            control.should_save = control.should_evaluate = False  # the step is saved already


def hold_launcher() -> subprocess.Popen | None:
    """Stops torch's launcher (SIGSTOP), if it started this process and would kill it before a checkpoint is saved.

    Does nothing to a launcher with a `TORCH_ELASTIC_SHUTDOWN_TIMEOUT`.

    Returns:
        process that continues the launcher when its standard input ends, by a close or by the death of this process; None
        without a launcher to stop, and on all ranks of a machine but the first.
    """
    is_first_rank = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") == "0"
    if not is_first_rank or SHUTDOWN_TIMEOUT in os.environ or not hasattr(signal, "SIGSTOP"):
        return None
    launcher = os.getppid()
    continuing = subprocess.Popen(
        ["sh", "-c", 'read -r _; kill -CONT "$0"', str(launcher)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that it survives a signal to the group of this process
    )
    os.kill(launcher, signal.SIGSTOP)
    return continuing
