"""The console command `llava-next-ar`: one sub-command a task, whose module is imported only when it runs."""

import argparse
import importlib.metadata
import pkgutil
import sys
from pathlib import Path

LAUNCH_FILES = {path.stem: path for path in sorted(Path(__file__).parent.glob("accelerate/*.yaml"))}
COMMANDS = {
    "ask": ("evaluation.ask:main", "ask a question about videos or images"),
    "check": ("training.run:main", "report what a training would do, without training (train --check)"),
    "train": ("training.run:main", "fine-tune a checkpoint; with --launch ddp on several devices"),
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


def launch(command: str, argv: list[str]) -> None:
    """Run a sub-command under `accelerate launch`, with a launch file of the package or of the user."""
    parser = argparse.ArgumentParser(prog=sys.argv[0], allow_abbrev=False)
    parser.add_argument("--launch", required=True)
    parser.add_argument("--num_processes", "--num-processes", action="append", default=[])
    options, rest = parser.parse_known_args(argv)
    file = LAUNCH_FILES.get(options.launch, Path(options.launch))
    if not file.is_file():
        parser.error(f"--launch is {options.launch!r}, expected a file or one of {', '.join(LAUNCH_FILES)}")
    sys.argv[1:] = ["--config_file", str(file), *(f"--num_processes={number}" for number in options.num_processes)]
    sys.argv += ["-m", f"llava_next_ar.scripts.{command}", *rest]
    pkgutil.resolve_name("accelerate.commands.launch:main")()


def main(argv: list[str] | None = None) -> None:
    """Run one sub-command with the arguments that follow it."""
    parser = argparse.ArgumentParser("llava-next-ar", epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--version", action="version", version=importlib.metadata.version("llava-next-ar"))
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the command; --help lists them")
    command, rest = vars(parser.parse_args(argv)).values()
    sys.argv[0] = f"{parser.prog} {command}"  # the name in its usage and messages
    words = {word.partition("=")[0] for word in rest}
    if command in ("train", "evaluate") and "--launch" in words and not words & {"-h", "--help"}:
        return launch(command, rest)
    target = "serving.space.push:main" if command == "push" and "--space" in words else COMMANDS[command][0]
    try:
        run = pkgutil.resolve_name(f"llava_next_ar.{target}")
    except ModuleNotFoundError as error:
        sys.exit(f"{sys.argv[0]}: {error}; it comes with pip install 'llava-next-ar[all]'")
    run(["--check", *rest] if command == "check" else rest)


if __name__ == "__main__":
    main()
