"""Programs that tests start: the only place where a test starts a process.

A program that does not end in time fails the test with the Python stacks of all its processes, and all of them are ended.
A launcher that is killed alone leaves its ranks behind and does not show where they wait.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from signal import SIGABRT
from typing import Any

import psutil
import torch

# A process that has this variable and is aborted writes the stack of each of its threads to its standard error. It needs
# no interpreter lock for it, so that a process that hangs with the lock held writes them too.
FAULTHANDLER = {"PYTHONFAULTHANDLER": "1"}
_MAX_SHOWN = 20_000  # characters
_SECONDS_TO_END = 5.0


class TimedOutError(AssertionError):
    """A program that did not end in time; the message holds its output and, last of all, the stacks of its processes.

    Attributes:
        stdout: output up to then.
    """

    def __init__(self, message: str, stdout: str) -> None:
        super().__init__(message)
        self.stdout = stdout


class Program:
    """A process that writes to files, so that it never waits for a reader; as a context manager, ended when left.

    Args:
        command: program and arguments; converted to strings.
        cwd, env: as for `subprocess.Popen`.
        merge: one file for both outputs, which `stdout` then shows.
        pass_fds: descriptors that stay open.
    """

    def __init__(
        self,
        command: Sequence[object],
        *,
        cwd: Any = None,
        env: Mapping[str, str] | None = None,
        merge: bool = False,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.command = [str(part) for part in command]
        self._stdout = tempfile.TemporaryFile()
        self._stderr = None if merge else tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self.command,
            cwd=cwd,
            env={**(os.environ if env is None else env), **FAULTHANDLER},
            stdin=subprocess.DEVNULL,
            stdout=self._stdout,
            stderr=subprocess.STDOUT if merge else self._stderr,
            pass_fds=pass_fds,
        )

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._stdout.close()
        if self._stderr is not None:
            self._stderr.close()

    @property
    def stdout(self) -> str:
        return _read(self._stdout)

    @property
    def stderr(self) -> str:
        return "" if self._stderr is None else _read(self._stderr)

    def finish(self, timeout: float, status: int | None = 0) -> subprocess.CompletedProcess:
        """Wait for the end.

        Args:
            timeout: seconds.
            status: expected exit status; None accepts any.

        Raises:
            TimedOutError: if it takes longer.
            AssertionError: on another exit status.
        """
        try:
            returncode = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            stdout = self.stdout
            abort([psutil.Process(self.process.pid)])
            self.process.wait()
            raise TimedOutError(f"did not end in {timeout:g} s: {self._describe()}", stdout) from None
        if status is not None and returncode != status:
            raise AssertionError(f"ended with status {returncode}, expected {status}: {self._describe()}")
        return subprocess.CompletedProcess(self.command, returncode, self.stdout, self.stderr)

    def end(self, timeout: float = 0) -> None:
        """End the process and its descendants, unless they have ended by themselves within `timeout` seconds."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            _kill(_with_descendants([psutil.Process(self.process.pid)]))
            self.process.wait()

    def _describe(self) -> str:
        # The handler ends each stack with the names of all extension modules, in one line.
        lines = [line for line in f"{self.stdout}\n{self.stderr}".splitlines() if "Extension modules:" not in line]
        return f"{' '.join(self.command)[:2000]}\n" + "\n".join(lines)[-_MAX_SHOWN:]


def run(
    command: Sequence[object], *, timeout: float = 240, status: int | None = 0, **options: Any
) -> subprocess.CompletedProcess:
    """Run a program to its end; see `Program` for the options and `Program.finish` for what is raised."""
    with Program(command, **options) as program:
        return program.finish(timeout, status)


def run_python(*arguments: object, **options: Any) -> str:
    """Run Python with these arguments and returns its standard output; see `run`."""
    return run([sys.executable, *arguments], **options).stdout


def spawn(function: Callable[..., None], args: tuple, nprocs: int, timeout: float = 240) -> None:
    """`torch.multiprocessing.spawn` with a time-out; the stacks are in the captured standard error.

    Raises:
        TimedOutError: if a process takes longer.
        torch.multiprocessing.ProcessRaisedException: as `spawn`.
    """
    context = torch.multiprocessing.spawn(function, args=args, nprocs=nprocs, join=False)
    end = time.monotonic() + timeout
    while not context.join(timeout=max(end - time.monotonic(), 0.01)):
        if time.monotonic() > end:
            abort([psutil.Process(process.pid) for process in context.processes if process.is_alive()])
            raise TimedOutError(f"{function.__name__} did not end in {timeout:g} s; the stacks are above", "")


def abort(processes: Sequence[psutil.Process]) -> None:
    """Make processes and all their descendants write their stacks, one after the other, and ends them."""
    every = _with_descendants(processes)
    for process in processes:
        _send(process, "suspend")  # a launcher ends all ranks as soon as one of them is gone
    for process in every:
        _send(process, "send_signal", SIGABRT)
        _send(process, "resume")
        _wait(process)
    _kill(every)


def _with_descendants(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Descendants first."""
    found = []
    for process in processes:
        try:
            found += [*process.children(recursive=True), process]
        except psutil.NoSuchProcess:
            continue
    return found


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        _send(process, "kill")
    for process in processes:
        _wait(process)


def _wait(process: psutil.Process) -> None:
    """Wait until a process has ended; not until its parent has noticed, which may be stopped."""
    end = time.monotonic() + _SECONDS_TO_END
    while time.monotonic() < end:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.02)


def _send(process: psutil.Process, method: str, *args: Any) -> None:
    try:
        getattr(process, method)(*args)
    except psutil.NoSuchProcess:
        return


def _read(file: Any) -> str:
    # Not with seek: the process writes at the position that it shares with this descriptor.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
