"""Console command `llava-next-ar`: one sub-command for each task. Its module is imported only when it runs."""

import argparse
import importlib.metadata
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_next_ar.hub.command_line import CommandParser, program_name, stop

TRAINING = "training.run:main"
LAUNCH_FILES = {path.stem: path for path in sorted(Path(__file__).parent.glob("accelerate/*.yaml"))}
COMMANDS = {
    "ask": ("evaluation.ask:main", "ask a question about videos or images"),
    "check": (TRAINING, "report what a training would do, without training (train --check)"),
    "train": (TRAINING, "fine-tune a checkpoint; with --launch ddp on several devices"),
    "merge": ("training.merge:main", "merge an adapter into its base"),
    "evaluate": ("evaluation.evaluate:main", "measure a checkpoint on a data set; --launch as for train"),
    "visualize": ("pictures.visualize:main", "draw predictions, surprise and attention of a video"),
    "app": ("serving.space.app:main", "try a checkpoint in the browser"),
    "convert": ("conversion.convert:main", "convert LLaVA-OneVision and original LLaVA-NeXT checkpoints"),
    "consolidate": ("conversion.consolidate:main", "join the shards of a distributed checkpoint"),
    "push": ("hub.push:main", "push a checkpoint to the Hub; --dry-run lists the files"),
    "demo": ("experiments.demo.demo:main", "train and evaluate a tiny model on generated clips"),
    "benchmark": ("experiments.benchmarks.benchmark:main", "measure speed and memory"),
    "compare": ("hub.compare:main", "compare the code of a checkpoint with that of a release"),
}
EPILOG = "commands:\n" + "\n".join(f"  {name:<12} {text}" for name, (_, text) in COMMANDS.items())
INTERRUPTED = 128 + signal.SIGINT


def _end_at_once(*_: object) -> None:
    """End on Ctrl-C while modules load: an exception would come out of the middle of an import, with a traceback."""
    os.write(sys.stderr.fileno(), f"\n{program_name()}: interrupted\n".encode())
    os._exit(INTERRUPTED)


def _load(target: str) -> Callable[..., Any]:
    before = signal.signal(signal.SIGINT, _end_at_once)
    try:
        return pkgutil.resolve_name(target)
    except ModuleNotFoundError as error:
        stop(f"{error}; it comes with pip install 'llava-next-ar[all]'")
    finally:
        signal.signal(signal.SIGINT, before)


def run(target: str, argv: Sequence[str] | None = None) -> None:
    """Run a program of the package, with one line and no traceback on bad input, a missing file or Ctrl-C.

    Args:
        target: module and function, such as `evaluation.ask:main`.
        argv: options; by default those of the process.

    Raises:
        SystemExit: with 2 on bad input (`hub.command_line`), 130 on Ctrl-C, or the program's own status.
    """
    program = _load(f"llava_next_ar.{target}")
    try:
        program(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print(f"\n{program_name()}: interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, ImportError) as error:
        if target == TRAINING:
            raise  # it reports bad input itself; any other error of a run of days keeps its traceback
        stop(error)
    except SystemExit as end:
        if isinstance(end.code, str):  # `sys.exit(message)` has the status 1
            stop(end.code.removeprefix(f"{program_name()}: "))
        raise


def launch(command: str, argv: list[str]) -> None:
    """Run a sub-command under `accelerate launch`, with a launch file of the package or of the user."""
    parser = CommandParser()
    parser.add_argument("--launch", required=True)
    parser.add_argument("--num-processes", action="append", default=[])
    options, rest = parser.parse_known_args(argv)
    file = LAUNCH_FILES.get(options.launch, Path(options.launch))
    if not file.is_file():
        stop(f"--launch is {options.launch!r}, expected a file or one of {', '.join(LAUNCH_FILES)}")
    sys.argv[1:] = ["--config_file", str(file), *(f"--num_processes={number}" for number in options.num_processes)]
    sys.argv += ["-m", f"llava_next_ar.scripts.{command}", *rest]
    launcher = _load("accelerate.commands.launch:main")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launcher()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except (subprocess.CalledProcessError, ChildFailedError) as error:  # the processes have written their messages
        is_single = isinstance(error, subprocess.CalledProcessError)
        status = error.returncode if is_single else error.get_first_failure()[1].exitcode
        sys.exit(status if status >= 0 else 128 - status)


def main(argv: list[str] | None = None) -> None:
    """Run one sub-command with the arguments that follow it."""
    parser = CommandParser("llava-next-ar", epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--version", action="version", version=importlib.metadata.version("llava-next-ar"))
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the command; --help lists them")
    command, rest = vars(parser.parse_args(argv)).values()
    sys.argv[0] = f"{parser.prog} {command}"  # the name in its usage and messages
    words = {word.partition("=")[0] for word in rest}
    if command in ("train", "evaluate") and "--launch" in words and not words & {"-h", "--help"}:
        return launch(command, rest)
    target = "serving.space.push:main" if command == "push" and "--space" in words else COMMANDS[command][0]
    run(target, ["--check", *rest] if command == "check" else rest)


if __name__ == "__main__":
    main()
