"""Python processes that know a local Hub and nothing else: own caches, own token, own working directory."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent

# Runs before the program: makes the package look as if it were not installed.
_HIDE_PACKAGE = """
import importlib.abc, sys

class Hiding(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llava_next_ar":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hiding())
"""


@dataclass(frozen=True)
class Finished:
    result: Any
    """What the program printed last, as JSON."""
    stderr: str


def run_with_hub(
    program: str,
    *arguments: Any,
    endpoint: str,
    home: Path,
    token: str | None = None,
    offline: bool = False,
    hide_package: bool = False,
) -> Finished:
    """Runs a program in a fresh process; its `arguments` are there as a list, and it prints one line of JSON last.

    Args:
        home: `HF_HOME` and working directory.
    """
    home.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    start = "import json, sys, torch\ntorch.set_num_threads(1)\narguments = json.loads(sys.argv[1])\n"
    code = (_HIDE_PACKAGE if hide_package else "") + start + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return Finished(json.loads(done.stdout.strip().splitlines()[-1]), done.stderr)
