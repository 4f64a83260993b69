"""Seconds that the servers of docs/serve.md take from their command to their first reply, on one checkpoint.

    python tests/environments/start_times.py CHECKPOINT --runs 3

Each round starts every server once, so that the load of a busy machine falls on all of them. vllm_run.py adds vLLM's.
"""

import argparse
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from processes import Program  # noqa: E402

_SECONDS_TO_START = 1200
_PYTHON = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
_HANDLER = """
import sys
from llava_next_ar.serving.endpoint.handler import EndpointHandler
EndpointHandler(sys.argv[1])
"""


def free_port() -> int:
    """A port of this computer on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def wait_for(url: str, program: Program) -> None:
    """Wait until a server replies.

    Raises:
        RuntimeError: if it ends, or does not reply within 20 minutes; with the end of its output.
    """
    end = time.monotonic() + _SECONDS_TO_START
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if program.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{program.stdout[-5000:]}") from None
            time.sleep(0.2)


def start_transformers_serve(checkpoint: Path) -> None:
    command = (sys.executable, "-m", "transformers.cli.transformers", "serve", checkpoint, "--trust-remote-code")
    _start_server(checkpoint, *command, "--device", "cpu", "--host", "127.0.0.1", path="/health")


def start_app(checkpoint: Path) -> None:
    command = (sys.executable, "-m", "llava_next_ar.scripts.command", "app", "--model", checkpoint)
    _start_server(checkpoint, *command, "--device", "cpu")


def start_handler(checkpoint: Path) -> None:
    _start_python(_HANDLER, checkpoint)


def start_generate(checkpoint: Path) -> None:
    _start_python(_PYTHON, checkpoint)


def _start_server(checkpoint: Path, *command: object, path: str = "") -> None:
    port = free_port()
    with Program((*command, "--port", port), env=_environ(checkpoint), merge=True) as program:
        wait_for(f"http://127.0.0.1:{port}{path}", program)


def _start_python(code: str, checkpoint: Path) -> None:
    with Program((sys.executable, "-c", code, checkpoint), env=_environ(checkpoint), merge=True) as program:
        program.finish(_SECONDS_TO_START)


def _environ(checkpoint: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(checkpoint.parent / "huggingface")}


STARTERS: dict[str, Callable[[Path], None]] = {
    "transformers serve": start_transformers_serve,
    "endpoint handler": start_handler,
    "app": start_app,
    "generate": start_generate,
}


def measure(checkpoint: Path, starters: Mapping[str, Callable[[Path], None]], runs: int) -> dict[str, list[float]]:
    """Seconds of each run for each name of `starters`, sorted."""
    seconds: dict[str, list[float]] = {name: [] for name in starters}
    for _ in tqdm(range(runs), desc="starts", unit="round", disable=None):
        for name, start in starters.items():
            begin = time.monotonic()
            start(checkpoint)
            seconds[name].append(time.monotonic() - begin)
    return {name: sorted(found) for name, found in seconds.items()}


def table(seconds: Mapping[str, list[float]]) -> list[str]:
    """Lines in Markdown: median, and all runs."""
    lines = ["| started | median, seconds | runs, seconds |", "|---|---|---|"]
    for name, found in seconds.items():
        lines.append(f"| {name} | {found[len(found) // 2]:.0f} | {', '.join(f'{one:.0f}' for one in found)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--runs", type=int, default=3, help="rounds (default: 3); an odd number has a median")
    options = parser.parse_args()
    print("\n".join(table(measure(options.checkpoint.resolve(), STARTERS, options.runs))))


if __name__ == "__main__":
    main()
