"""The runner of programs: time-outs show the stacks of all processes and leave none behind."""

import ast
import sys
import time
from pathlib import Path

import processes
import psutil
import pytest

TESTS = Path(__file__).resolve().parent
# Two processes, the second in a session of its own, as torch's launcher starts ranks. One waits with the interpreter lock
# held, where no signal handler written in Python would run.
LAUNCHER = """
import ctypes, subprocess, sys, time
def the_first_rank_waits():
    ctypes.PyDLL(None).sleep(600)
def the_second_rank_waits():
    time.sleep(600)
def the_launcher_waits(ranks):
    for rank in ranks:
        rank.wait()
if len(sys.argv) > 1:
    sys.stdout.write("rank " + sys.argv[1] + chr(10))  # in one piece: the other rank writes at the same time
    sys.stdout.flush()
    (the_first_rank_waits, the_second_rank_waits)[int(sys.argv[1])]()
the_launcher_waits([
    subprocess.Popen([sys.executable, "-c", open(__file__).read(), str(rank)], start_new_session=True) for rank in (0, 1)
])
"""


def is_alive(pid: int) -> bool:
    """Processes that have ended without being waited for do not count."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_program_that_hangs_shows_the_stacks_of_all_its_processes_and_leaves_none(tmp_path):
    (tmp_path / "launcher.py").write_text(
        LAUNCHER.replace("open(__file__)", f"open({str(tmp_path / 'launcher.py')!r})")
    )
    with processes.Program([sys.executable, tmp_path / "launcher.py"]) as program:
        end = time.monotonic() + 30
        while program.stdout.count("\n") < 2 and time.monotonic() < end:
            time.sleep(0.05)
        started = [program.process.pid, *(p.pid for p in psutil.Process(program.process.pid).children())]
        with pytest.raises(processes.TimedOutError, match="did not end in 0.1 s") as caught:
            program.finish(timeout=0.1)
    message = str(caught.value)
    for name in ("the_first_rank_waits", "the_second_rank_waits", "the_launcher_waits"):
        assert f"in {name}" in message
    assert "Extension modules" not in message and sorted(caught.value.stdout.split()[1::2]) == ["0", "1"]
    assert len(started) == 3 and not any(map(is_alive, started))


def test_a_program_that_is_left_is_ended_with_its_children():
    code = "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    with processes.Program([sys.executable, "-c", f"{code}print('started', flush=True)\ntime.sleep(600)"]) as program:
        while "started" not in program.stdout:
            time.sleep(0.02)
        (child,) = psutil.Process(program.process.pid).children()
    assert program.process.returncode and not is_alive(child.pid)


def test_output_and_status_are_returned_or_shown():
    done = processes.run(
        [sys.executable, "-c", "import sys; print('a'); print('b', file=sys.stderr); sys.exit(3)"], status=3
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "a\n", "b\n")
    assert processes.run([sys.executable, "-c", "import sys; sys.exit(4)"], status=None).returncode == 4
    with pytest.raises(AssertionError, match="(?s)ended with status 5, expected 0: .*\nthe cause"):
        processes.run_python("-c", "import sys; print('the cause', file=sys.stderr); sys.exit(5)")
    many = processes.run_python("-c", "print('x' * 300_000)")  # more than a pipe holds
    assert len(many) == 300_001


def _wait(rank: int) -> None:
    time.sleep(600 * rank)


@pytest.mark.slow
def test_spawned_processes_that_hang_are_ended_and_shown(capfd):
    with pytest.raises(processes.TimedOutError, match="_wait did not end in 8 s"):
        processes.spawn(_wait, (), nprocs=2, timeout=8)
    assert "in _wait" in capfd.readouterr().err


def test_no_test_starts_a_process_by_another_way():
    """tests/environments holds programs that are started by hand and install packages for minutes."""
    allowed = {"processes.py": {"Popen", "spawn"}, "resume_runs.py": {"fork"}}
    starters = {"run", "Popen", "call", "check_call", "check_output", "spawn", "start_processes", "fork", "system"}
    modules = {"subprocess", "os", "multiprocessing", "mp"}
    found = {}
    for path in sorted(TESTS.rglob("*.py")):
        if path.parent.name == "environments":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in starters
            ):
                continue
            owner = node.func.value
            owner = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", None)
            if owner in modules and node.func.attr not in allowed.get(path.name, ()):
                found[f"{path.relative_to(TESTS)}:{node.lineno}"] = f"{owner}.{node.func.attr}"
    assert not found
