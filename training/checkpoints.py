# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that survive a kill at any moment, and training that resumes from them exactly.

`ResumableTrainer` is a Trainer whose checkpoints appear all at once: everything is written into the folder `_unfinished`,
flushed to the disk, and renamed to `checkpoint-N`, which is atomic. A search for the last checkpoint finds a complete one, also
by `transformers.trainer_utils.get_last_checkpoint`. Later damage remains possible: a copy that broke off, or a checkpoint that
a plain Trainer left half-written. So a checkpoint also lists its files and their sizes, and `last_complete_checkpoint` passes
over one that lacks any.
"""

import contextlib
import copy
import gc
import json
import math
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import nested_gather
from transformers.utils import logging

from ..hub.pushed_model import stale_files
from .collator import first_batches_unread
from .termination import StopOnSigterm

logger = logging.get_logger(__name__)

_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
UNFINISHED = "_unfinished"  # Trainer's own uploads leave out what starts with an underscore
FILE_LIST = "checkpoint_files.json"  # {name of the file: bytes}
TRAINER_STATE = "trainer_state.json"
RUN_FILE = "run.json"  # {"run": identifier of the run that was started last in a folder}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = re.compile(r"(pytorch_model|model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


class ResumeError(ValueError):
    """A checkpoint from which a run cannot go on."""


# ------------------------------------------------------------------------------------------------- what is on the disk


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Returns the newest complete checkpoint of the last run in a folder, or None; warns about newer ones passed over.

    A checkpoint that records no run, as those of a plain Trainer, counts as one of the last run.
    """
    run = _read_json(Path(output_dir, RUN_FILE)).get("run")
    for folder in reversed(list_checkpoints(Path(output_dir))):
        problem = checkpoint_problem(folder)
        recorded = _read_json(folder / "progress_0.json").get("run")
        if problem is None and run is not None and recorded is not None and recorded != run:
            logger.warning(f"{folder} belongs to another run; looking for an older checkpoint")
        elif problem is None:
            return str(folder)
        else:
            logger.warning(f"{folder} is incomplete ({problem}); looking for an older checkpoint")
    return None


def resume_problem(folder: str | os.PathLike) -> str | None:
    """Returns the reason why training cannot go on from a checkpoint, complete or not; None if there is none."""
    problem = checkpoint_problem(folder)
    if problem is not None:
        return problem
    names = {path.name for path in Path(folder).iterdir()}
    if any(name.startswith("global_step") for name in names):
        return None  # DeepSpeed keeps all states in a folder
    missing = [
        state for state in ("optimizer", "scheduler") if not any(re.search(rf"\b{state}", name) for name in names)
    ]
    if not missing:
        return None
    return (
        f"it holds the model without the state of the {' and '.join(missing)} (save_only_model), so that the learning rate "
        "and the moments of the optimizer would start again. Start a new run from its weights instead: pass it as the model"
    )


def checkpoint_problem(folder: str | os.PathLike) -> str | None:
    """Returns the reason why a checkpoint is incomplete; None if it is complete.

    A checkpoint of a plain Trainer has no list of its files. There the state of the trainer, which is written last, stands for
    all of them.
    """
    folder = Path(folder)
    try:
        state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
        files = json.loads((folder / FILE_LIST).read_text(encoding="utf-8")) if (folder / FILE_LIST).exists() else {}
    except OSError:
        return f"it has no {TRAINER_STATE}"
    except ValueError:
        return f"its {TRAINER_STATE} or {FILE_LIST} is cut off"
    if "global_step" not in state:
        return f"its {TRAINER_STATE} has no global_step"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a file, empty if it is missing or cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def replace_model(new: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Moves a saved model, with all that was saved beside it, over the one in `folder`.

    The old weights are deleted first, and the file that makes the new ones loadable comes last. So a kill leaves the old model,
    the new one, or none; never the weights of one with the configuration or the shards of the other. Where a model replaces an
    adapter, or an adapter a model, no file stays that would be loaded instead.

    Raises:
        ValueError: if an adapter is to replace its own base; it then stays in `new`.
    """
    new, folder = Path(new), Path(folder)
    names = [path.relative_to(new) for path in _files(new)]
    _check_own_base(new, folder)
    _flush(new)
    if any(_is_entry(name.name) for name in names):  # FSDP may save shards in checkpoints only
        existing = [path.name for path in folder.iterdir() if path.is_file()]
        stale = stale_files(existing, [name.as_posix() for name in names])
        for name in sorted({*stale, *filter(_WEIGHTS.fullmatch, existing)}):
            (folder / name).unlink()
    for name in sorted(names, key=lambda name: (_is_entry(name.name), str(name))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, folder / name)
    _flush_one(folder)
    shutil.rmtree(new)


def _check_own_base(adapter: Path, folder: Path) -> None:
    """Raises ValueError if `folder` is the base of a saved adapter, whose weights would be replaced by it."""
    config = adapter / "adapter_config.json"
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") if config.is_file() else None
    if base and os.path.isdir(base) and Path(base).resolve() == folder.resolve():
        raise ValueError(f"{folder} is the base of the adapter, which would replace its weights: save it elsewhere")


def _is_entry(name: str) -> bool:
    """True for the file where loading starts: the only file of the weights, or the index of their shards."""
    match = _WEIGHTS.fullmatch(name)
    return match is not None and match[2] is None


def holds_weights(folder: Path) -> bool:
    """Returns whether a folder holds a model or an adapter that could be loaded."""
    return folder.is_dir() and any(_is_entry(path.name) for path in folder.iterdir())


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the folders `checkpoint-N`, complete or not, in the order of N: times of files change when they are copied."""
    found = [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(_CHECKPOINT.fullmatch(checkpoint.name)[1])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(folder: Path) -> None:
    """Waits until all files of a folder are on the disk: a kill would lose nothing, but a power loss would."""
    for path in (*folder.rglob("*"), folder):
        _flush_one(path)


def _flush_one(path: Path) -> None:
    if os.name != "posix":
        return  # Windows opens no folder, and a file only for writing
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(staged: Path, final: Path) -> None:
    """Gives a staged checkpoint its final name."""
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in _files(staged)}
    (staged / FILE_LIST).write_text(json.dumps(sizes, indent=0), encoding="utf-8")
    _flush(staged)
    if final.exists():  # of an earlier run, or half-written by another program
        os.replace(final, staged.with_name(f"{final.name}-replaced"))
    os.replace(staged, final)
    _flush_one(final.parent)


def _rotate(final: Path, limit: int | None, best: str | None, run: str) -> None:
    """Deletes complete checkpoints that are older than `final`, the oldest first, until `limit` are left.

    Checkpoints that are newer, incomplete or of other runs do not count, so that they push out none of this run.
    """
    if limit is None or limit <= 0:
        return
    older = [path for path in list_checkpoints(final.parent) if _step(path) < _step(final)]
    older = [path for path in older if checkpoint_problem(path) is None]
    older = [path for path in older if _read_json(path / "progress_0.json").get("run", run) == run]
    surplus = len(older) + 1 - limit
    for path in [path for path in older if best is None or path != Path(best)][: max(surplus, 0)]:
        # Renamed first: a half-deleted checkpoint must not have the name of a complete one.
        removed = final.parent / UNFINISHED / f"{path.name}-removed"
        removed.parent.mkdir(exist_ok=True)
        os.replace(path, removed)
        shutil.rmtree(removed)


@contextlib.contextmanager
def release_process_group() -> Iterator[None]:
    """Context in which the default process group can be destroyed without a hang.

    Each DistributedDataParallel of this process holds the group too. Otherwise the last of them frees it with the interpreter's
    lock held, and the group's destructor waits for gloo's threads. One of these may wait for that lock to free the tensors of
    the last collective. Then both wait forever (https://github.com/pytorch/pytorch/issues/56297).
    """
    gc.collect()  # wrappers that only a cycle keeps alive
    for wrapper in [found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)]:
        for name in ("process_group", "logger", "reducer"):
            vars(wrapper).pop(name, None)
    backends = []
    if torch.distributed.is_initialized() and _TORCH < (2, 8):
        group = torch.distributed.group.WORLD
        backends = [group._get_backend(device) for device in group._device_types]
        del group
    yield
    del backends  # before torch 2.8 only these wait for the threads without the interpreter's lock


# ------------------------------------------------------------------------------------------------------------- trainer


class ResumableTrainer(Trainer):
    """A Trainer that may be killed at any moment and resumes exactly.

    As in Trainer, with these differences.

    - A checkpoint is complete or absent. `resume_from_checkpoint=True` takes the last complete one; a path to an incomplete one
      is an error.
    - `save_total_limit` counts complete checkpoints only, and goes by their step, not by the time of their files.
    - A checkpoint also keeps the sums since the last log entry, so that the entries after a resume are those of an
      uninterrupted run; and the position in a stream that was read more than once.
    - Batches of a stream that were trained on before are not read again: see `first_batches_unread`.
    - `save_model` replaces the model in a folder without mixing the two, see `replace_model`.
    - A resumed run that lacks only its last save takes no further step.
    - A checkpoint records its run. A run that is not resumed gets a new identifier, so that checkpoints of an earlier run
      in the same folder are neither resumed from nor deleted.
    - A checkpoint without optimizer or scheduler, or of steps with another number of samples, is an error.

    With `ignore_data_skip`, as in Trainer, the data starts again at the beginning of an epoch: resuming is then not exact.

    All processes of a run must see the same `output_dir`, or each node its own with `save_on_each_node`.
    """

    _is_staging = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; restores the signal handlers, also after an error.

        Raises:
            ResumeError: without a complete checkpoint to resume from; if it lacks the state of the optimizer or the
                scheduler; if its steps had another number of samples.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ResumeError(f"{self.args.output_dir} holds no complete checkpoint to resume from")
        if resume_from_checkpoint:
            problem = resume_problem(resume_from_checkpoint)
            if problem is not None:
                raise ResumeError(f"cannot resume from {resume_from_checkpoint}: {problem}")
        try:
            return super().train(resume_from_checkpoint or None, *args, **kwargs)
        finally:
            self.is_in_train = False  # Trainer leaves it where training broke off
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, StopOnSigterm):
                    callback.restore()

    # ---- saving -----------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._is_staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        final = run / f"checkpoint-{self.state.global_step}"
        staged = run / UNFINISHED / final.name
        if self.args.should_save:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_staging = False
        if not self.args.save_only_model:
            progress = {"run": self._run, **self._step_size(), **self._progress()}
            (staged / f"progress_{self.args.process_index}.json").write_text(json.dumps(progress), encoding="utf-8")
        if self.state.best_global_step:
            best = run / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        self.accelerator.wait_for_everyone()  # all have written
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE))  # names the best checkpoint where it will be
            _publish(staged, final)
            _rotate(final, self.args.save_total_limit, self.state.best_model_checkpoint, self._run)
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()  # all may rely on it
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; after a kill the folder holds the old model, the new one, or none that loads."""
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self._is_staging:
            return super().save_model(str(folder), _internal_call=True)
        staged = folder / UNFINISHED
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # else the first rank may call this alone
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
            if (folder / "README.md").is_file():  # the new card depends on the old one
                staged.mkdir()
                shutil.copy(folder / "README.md", staged)
        if is_sharded:
            self.accelerator.wait_for_everyone()
        super().save_model(str(staged), _internal_call=True)
        if is_sharded:
            self.accelerator.wait_for_everyone()
        if self.args.should_save and staged.is_dir():
            replace_model(staged, folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def end(self) -> None:
        """As in Trainer. The trainer and its wrapped model cannot be used afterwards."""
        with release_process_group():
            super().end()

    # ---- resuming ---------------------------------------------------------------------------------------------------

    def _progress(self) -> dict[str, Any]:
        """State of this process that an exact resume needs beside Trainer's own; JSON."""
        return {
            "tr_loss": self._tr_loss.item(),
            "last_logged_step": self._globalstep_last_logged,
            "epoch": self._epoch,
            "batches": self._batches,
        }

    def _restore_progress(self, progress: dict[str, Any]) -> None:
        self._tr_loss.fill_(progress["tr_loss"])
        self._globalstep_last_logged = progress["last_logged_step"]
        # The `train_loss` at the end covers the steps of this call alone.
        self._total_loss_scalar = -nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()

    def _read_progress(self, checkpoint: str | None) -> dict[str, Any] | None:
        path = Path(checkpoint or "", f"progress_{self.args.process_index}.json")
        if checkpoint is None or not path.is_file():
            return None  # a checkpoint of a plain Trainer
        progress = json.loads(path.read_text(encoding="utf-8"))
        if progress["world_size"] != self.args.world_size:
            if self.is_world_process_zero():
                logger.warning(
                    f"{checkpoint} was saved by {progress['world_size']} processes and is resumed by "
                    f"{self.args.world_size}: the first log entry is of the steps from here on, and random states are not "
                    "restored"
                )
            return None
        return progress

    def _step_size(self) -> dict[str, int]:
        """Factors of the number of samples of an optimizer step."""
        return {
            "batch_size": self._train_batch_size,
            "accumulation": self.args.gradient_accumulation_steps,
            "world_size": self.args.world_size,
        }

    def _check_step_size(self, checkpoint: str) -> None:
        """Raises ResumeError if the steps before a checkpoint had another number of samples than those to come.

        The position in the data and the learning rate are counted in steps: part of the samples would come again or never.
        """
        saved, now = _read_json(Path(checkpoint, "progress_0.json")), self._step_size()
        if not now.keys() <= saved.keys():
            return  # a checkpoint of a plain Trainer, or an older one
        before, after = (math.prod(size[name] for name in now) for size in (saved, now))
        if before == after:
            return
        texts = (
            f"{size['batch_size']} per device x {size['accumulation']} accumulated x {size['world_size']} processes"
            for size in (saved, now)
        )
        per_micro_step = now["batch_size"] * now["world_size"]
        hint = "Choose the batch size so that a step has as many samples"
        if before % per_micro_step == 0:
            hint = f"Set gradient_accumulation_steps to {before // per_micro_step}"
        raise ResumeError(
            f"cannot resume from {checkpoint}: its steps had {before} samples ({next(texts)}), these would have {after} "
            f"({next(texts)}), so that the position in the data and the learning rate would be others. {hint}, or start a "
            "new run from its weights: pass it as the model"
        )

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        if resume_from_checkpoint is not None:
            self._check_step_size(resume_from_checkpoint)
        self._begin_run(resume_from_checkpoint)
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        # Trainer treats a stream without a length as endless, and would skip more batches than it has.
        progress = self._read_progress(resume_from_checkpoint)
        if progress is not None and num_train_epochs == sys.maxsize:
            epochs, batches = progress["epoch"], 0 if self.args.ignore_data_skip else progress["batches"]
        return epochs, batches

    def _begin_run(self, checkpoint: str | None) -> None:
        """Identifies the run that begins, also with smaller batches after one that ran out of memory."""
        recorded = None if checkpoint is None else _read_json(Path(checkpoint, "progress_0.json")).get("run")
        self._run = recorded or uuid.uuid4().hex
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RUN_FILE).write_text(json.dumps({"run": self._run}), encoding="utf-8")

    def _run_epoch(
        self, *, epoch: int, epochs_trained: int, resume_from_checkpoint: str | None, **kwargs: Any
    ) -> None:
        self._epoch, self._batches = epoch, 0
        if epoch == epochs_trained:
            if not self.args.ignore_data_skip:
                self._batches = kwargs["steps_trained_in_current_epoch"]
            progress = self._read_progress(resume_from_checkpoint)
            if progress is not None:
                self._restore_progress(progress)
            if self.state.global_step >= self.state.max_steps:
                self.control.should_training_stop = True  # the run was killed after the last checkpoint
                return
        # Trainer iterates once more over the trained batches of a stream. (A dispatched batch is made of several.)
        unread = self._batches if self.accelerator.dispatch_batches is False else 0
        with first_batches_unread(kwargs["train_dataloader"], unread):
            super()._run_epoch(
                epoch=epoch, epochs_trained=epochs_trained, resume_from_checkpoint=resume_from_checkpoint, **kwargs
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches += len(batches)
        return batches, num_items

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in Trainer, for models whose weights have other names in files than in memory.

        Trainer matches the names in the file with those in memory, and warns about the others. A LLaVA-OneVision model is saved
        under older names. It would resume with its initial weights and the last optimizer state.
        """
        model = self.model if model is None else model
        if not isinstance(model, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # In float32, which holds every 16-bit weight exactly: not all have the same precision.
        loaded, report = type(model).from_pretrained(
            resume_from_checkpoint,
            config=copy.deepcopy(model.config),
            dtype=torch.float32,
            output_loading_info=True,
        )
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise ResumeError(
                f"cannot resume from {resume_from_checkpoint}: it lacks {len(missing)} weights, the first is {missing[0]}"
            )
        model.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        if not isinstance(self.model, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)
