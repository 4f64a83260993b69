"""Run the tests of DeepSpeed (tests/training/test_deepspeed.py) on the CPU, in an environment of its own.

    python tests/environments/deepspeed_run.py                              # what `make test-deepspeed` runs
    python tests/environments/deepspeed_run.py --folder outputs/deepspeed   # keep the environment for the next time
    python tests/environments/deepspeed_run.py -- -x -k resumes             # what follows `--` goes to pytest

DeepSpeed is not a dependency of this project. Here its release `DEEPSPEED` is installed from the package index into a
virtual environment that sees the packages of this one. The tests train a tiny model with scripts/train.py on one and on two
processes (gloo). DeepSpeed compiles a small extension for the communication of CPU processes on the first start, which takes
a minute or two and needs a C++ compiler; it is kept in the folder too.

Compared are: losses, gradient norms and weights of ZeRO-2 and ZeRO-3 with a plain run and with DDP, in float32; a run that
resumes with one that was not interrupted; adapters; weights that scripts/consolidate.py joins with those that were trained.
The launch files of scripts/accelerate run as they stand, in bfloat16, but for the number of processes.

Exit status: that of pytest, or 1 if the environment cannot be made.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from own_environment import install, make_environment

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = "deepspeed==0.19.8"
TESTS = "tests/training/test_deepspeed.py"


def prepare(folder: Path) -> Path:
    """Make the environment, unless the folder holds it already; returns its interpreter."""
    log, done = folder / "environment.log", folder / DEEPSPEED
    environment = folder / "environment"
    if done.exists():
        return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    python = make_environment(environment, log)
    install(python, "-c", ROOT / "constraints.txt", DEEPSPEED, log=log)
    done.touch()
    return python


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], usage="%(prog)s [--folder FOLDER] [-- PYTEST_ARGUMENTS]"
    )
    parser.add_argument("--folder", type=Path, help="keep the environment in this folder; else a temporary one")
    parser.add_argument("pytest_arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="deepspeed_") as temporary:
        folder = Path(temporary if options.folder is None else options.folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            python = prepare(folder)
        except subprocess.SubprocessError as error:
            text = (folder / "environment.log").read_text(errors="replace")
            print(f"{error}\n{text[-3000:]}", file=sys.stderr)
            return 1
        command = [str(python), "-m", "pytest", TESTS, "-m", "slow or not slow", *options.pytest_arguments]
        # No GPU: two processes would share it, and numbers are compared that depend on the device.
        environ = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "CUDA_VISIBLE_DEVICES": ""}
        environ["PATH"] = os.pathsep.join((str(python.parent), os.environ.get("PATH", "")))  # ninja lies there
        return subprocess.run(command, cwd=ROOT, env=environ).returncode


if __name__ == "__main__":
    sys.exit(main())
