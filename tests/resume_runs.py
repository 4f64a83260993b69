"""Training runs that are killed and resumed; each is a fork of one process that has imported everything.

    python tests/resume_runs.py folder 20 --cases full lora --seed 0

A run counts its events: each file or folder that it opens for writing, makes, renames, flushes or removes, each file of
tensors, and each batch. It is killed with SIGKILL right before a given one, or in the middle of a file of tensors. What
came out is written to results.json.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from guard_runs import losses_logged
from tiny import tiny_model
from tiny_processor import tiny_processor
from torch.utils.data import IterableDataset
from training_runs import make_samples
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from llava_next_ar.training.trainer import (
    AutoregressiveTrainer,
    LlavaVideoCollator,
    StopOnSigterm,
    last_complete_checkpoint,
)

# The vision tower frozen and trained, adapters on tower and language model, a stream that is read more than once.
CASES = ("full", "tower", "lora", "stream")
STEPS = 7
FRAMES = ([2], [], [4, 3], [5])


class Stream(IterableDataset):
    """All samples in an order that depends on the pass."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples, self.epoch = samples, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(self.epoch))
        return iter([self.samples[index] for index in order])


def make_trainer(folder: Path, case: str, **options: Any) -> AutoregressiveTrainer:
    torch.manual_seed(0)
    model = tiny_model(head={"loss_weight": 0.5}, freeze_tower=case != "tower")
    processor = tiny_processor(model.config, num_frames=5)
    samples = make_samples(model.config, FRAMES)
    if case == "lora":
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], modules_to_save=["autoregressive_module"]
            ),
        )
    for module in model.modules():  # so that the random state matters
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    model.train()
    defaults = {
        "max_steps": STEPS,
        "logging_steps": 3,
        "save_steps": 2,
        "save_total_limit": 2,
        "save_strategy": "steps",
    }
    defaults |= {"learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    defaults |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    defaults |= {"accelerator_config": {"dispatch_batches": False}}  # which would cut a stream's batches into rows
    return AutoregressiveTrainer(
        model,
        TrainingArguments(str(folder), **{**defaults, **options}),
        Stream(samples) if case == "stream" else samples,
        eval_dataset=samples,
        data_collator=LlavaVideoCollator(0),
        processing_class=processor,
        head_learning_rate=5e-2,
        callbacks=[StopOnSigterm()],
    )


def run(folder: Path, case: str, save_model: bool = True) -> list[dict[str, Any]]:
    """Start the command: continue from the latest checkpoint, save the model, return the log."""
    trainer = make_trainer(folder, case)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    if save_model:
        trainer.save_model()
    return losses_logged(trainer.state.log_history)


# --------------------------------------------------------------------------------------------------------------- kills


class Events:
    """Counter of the file operations below a folder that kills this process at a given event."""

    def __init__(self, folder: Path, kill_at: int | None) -> None:
        self.folder, self.kill_at = str(folder), kill_at
        self.names: list[str] = []

    def happened(self, name: str, torn: Path | None = None) -> None:
        if len(self.names) == self.kill_at:
            if torn is not None:
                os.truncate(torn, torn.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)

    def watch(self) -> None:
        """Install the hooks; they stay until the process ends."""
        sys.addaudithook(self._audit)
        for module, name in ((torch, "save"), (safetensors.torch, "serialize_file")):
            setattr(module, name, self._tearing(getattr(module, name), name))
        fsync, step = os.fsync, AutoregressiveTrainer.training_step

        def counted_fsync(descriptor: int) -> None:
            self.happened("fsync")
            fsync(descriptor)

        def counted_step(*args: Any, **kwargs: Any) -> Any:
            self.happened("batch")
            return step(*args, **kwargs)

        os.fsync, AutoregressiveTrainer.training_step = counted_fsync, counted_step

    def _audit(self, event: str, args: tuple) -> None:
        if event == "open":
            path, mode, flags = args
            is_ours = isinstance(mode, str) and set(mode) & set("wax+")
        else:
            path, is_ours = args[0] if args else None, event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        # shutil.rmtree works with names relative to a folder, so that not all paths are whole.
        if (
            is_ours
            and isinstance(path, (str, os.PathLike))
            and (str(path).startswith(self.folder) or event in ("os.remove", "os.rmdir"))
        ):
            self.happened(f"{event} {str(path).removeprefix(self.folder)}")

    def _tearing(self, function: Callable, name: str) -> Callable:
        def torn(first: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            result = function(first, path, *args, **kwargs)
            if isinstance(path, (str, os.PathLike)):
                self.happened(f"{name} {str(path).removeprefix(self.folder)}", torn=Path(path))
            return result

        return torn


def fork(work: Callable[[], None], log: Path, kill_after: float | None = None) -> int:
    """Run it in a fork and returns its exit status as `Popen.returncode`."""
    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start(
    folder: Path, case: str, kill_at: int | None = None, kill_after: float | None = None
) -> tuple[int, list[str] | None]:
    """One start in a fork: its exit status and, if it came to its end, its events."""
    result = folder.with_suffix(".json")

    def work() -> None:
        events = Events(folder, kill_at)
        events.watch()
        log = run(folder, case)
        events.kill_at = None
        result.write_text(json.dumps({"log": log, "events": events.names}))

    status = fork(work, folder.with_suffix(".log"), kill_after)
    if status == 0:
        return status, json.loads(result.read_text())["events"]
    return status, None


def outcome(folder: Path, case: str) -> dict[str, Any]:
    """Values that must not depend on kills: each logged number, and the final weights."""
    weights = folder / ("adapter_model.safetensors" if case == "lora" else "model.safetensors")
    return {
        "log": json.loads(folder.with_suffix(".json").read_text())["log"],
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
        "files": sorted(path.name for path in folder.iterdir()),
    }


def survive(folder: Path, case: str, kills: list[int | float]) -> dict[str, Any]:
    """Start the same command until it ends. A kill is the number of an event or, as a float, a time in seconds."""
    killed, left, starts = 0, [], 0
    for kill in [*kills, None]:
        starts += 1
        status, events = start(
            folder,
            case,
            kill_at=kill if isinstance(kill, int) else None,
            kill_after=kill if isinstance(kill, float) else None,
        )
        if status == 0:
            break
        if status != -signal.SIGKILL:
            raise RuntimeError(
                f"{case}, {kills}: exit status {status}\n{folder.with_suffix('.log').read_text()[-4000:]}"
            )
        killed += 1
        last = last_complete_checkpoint(folder)
        # Whoever looks for checkpoints by their names alone must find the same one.
        assert last == (get_last_checkpoint(folder) if folder.is_dir() else None), last
        left.append(last and Path(last).name)
    return {"case": case, "kills": kills, "killed": killed, "resumed_from": left, **outcome(folder, case)}


def choose(events: list[str], seconds: float, chance: random.Random) -> int | float:
    """A kill: mostly at an event, of any kind with the same chance (most of all are copies of code); some at any time."""
    if chance.random() < 0.2:
        return chance.uniform(0.0, seconds)
    kinds = [name.split()[0] + (" checkpoint" if "checkpoint-" in name else "") for name in events]
    kind = chance.choice(sorted(set(kinds)))
    return chance.choice([index for index, other in enumerate(kinds) if other == kind])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("number", type=int, help="of kills in all")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(args.seed)
    whole, events, seconds = {}, {}, {}
    for case in args.cases:
        begun = time.monotonic()
        status, events[case] = start(args.folder / case, case)
        seconds[case] = time.monotonic() - begun
        assert status == 0, (args.folder / f"{case}.log").read_text()[-4000:]
        whole[case] = outcome(args.folder / case, case)
    runs: list[dict[str, Any]] = []
    total = 0
    while total < args.number:
        case = args.cases[len(runs) % len(args.cases)]
        kills: list[int | float] = []
        for _ in range(chance.choice((1, 1, 2))):
            kills.append(choose(events[case], seconds[case], chance))
        runs.append(survive(args.folder / f"{case}-{len(runs)}", case, kills))
        total += runs[-1]["killed"]
        print(f"{total} kills, {case}: {kills}, resumed from {runs[-1]['resumed_from']}", flush=True)
    (args.folder / "results.json").write_text(
        json.dumps({"whole": whole, "runs": runs, "events": events, "seconds": seconds})
    )


if __name__ == "__main__":
    main()
