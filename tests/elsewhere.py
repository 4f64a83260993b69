"""Code run as strangers run it: in a fresh process in which this package and what is optional are not installed."""

import json
import textwrap
from pathlib import Path

import processes

# Runs before the code under test: this package and what is optional look as if they were not installed.
WITHOUT_PACKAGE = """
import sys

HIDDEN = {"llava_next_ar", "peft", "datasets", "matplotlib", "accelerate", "cv2", "torchvision"}

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
import torch
torch.set_num_threads(1)
"""


def run_elsewhere(code: str, *arguments: object, cwd: Path) -> dict:
    """Run code in a fresh process that lacks this package; it prints one line of JSON last."""
    program = WITHOUT_PACKAGE + textwrap.dedent(code)
    printed = processes.run_python("-c", program, *arguments, cwd=cwd, timeout=300)
    return json.loads(printed.strip().splitlines()[-1])
