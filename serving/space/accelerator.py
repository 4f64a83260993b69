"""ZeroGPU of Hugging Face Spaces: a GPU that is lent for the length of a call. Elsewhere functions run as they are.

On ZeroGPU a decorated function runs in a forked process: arguments and results are pickled, other changes are lost.
See https://huggingface.co/docs/hub/spaces-zerogpu.
"""

import os
from collections.abc import Callable
from typing import TypeVar

try:
    import spaces  # the program of a Space imports it first of all: it replaces parts of torch
except ImportError:
    spaces = None

Function = TypeVar("Function", bound=Callable)

SECONDS_OF_A_CALL = 60
IS_ZERO_GPU = spaces is not None and os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "true")


def on_gpu(function: Function) -> Function:
    """The function with a GPU on ZeroGPU, for up to `SECONDS_OF_A_CALL`; the function itself elsewhere."""
    return function if spaces is None else spaces.GPU(duration=SECONDS_OF_A_CALL)(function)
