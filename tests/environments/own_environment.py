"""Environments for what this project's own lacks: a virtual environment that sees the packages of this one."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

# What hangs is ended: a download of gigabytes takes far less.
SECONDS_TO_RUN = 2 * 3600


def make_environment(folder: Path, log: Path) -> Path:
    """Make a virtual environment that sees the packages of this one; returns its interpreter."""
    run(sys.executable, "-m", "venv", folder, log=log)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    # A line of code, since the .pth files there (the editable install of this package) are to be read as well.
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    Path(site, "this_environment.pth").write_text(line)
    return python


def install(python: Path, *arguments: object, log: Path) -> None:
    """Run `pip install` in an environment."""
    run(python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *arguments, log=log)


def run(*command: object, log: Path) -> None:
    """Run a command in the folder of its log.

    Raises:
        subprocess.CalledProcessError: if it ends with another status than 0.
        subprocess.TimeoutExpired: if it does not end within two hours.
    """
    # Neither caches nor the settings of the process that called belong to the environment.
    unset = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "HF_TOKEN")
    environ = {name: value for name, value in os.environ.items() if name not in unset}
    environ.update(OMP_NUM_THREADS="1", HF_HOME=str(log.parent / "huggingface"), HF_HUB_OFFLINE="1")
    with open(log, "a") as file:
        subprocess.run(
            [str(part) for part in command],
            cwd=log.parent,
            env=environ,
            stdout=file,
            stderr=file,
            check=True,
            timeout=SECONDS_TO_RUN,
        )
