"""Every test run gets caches of its own, no network, one thread and fixed seeds.

The variables are set before the first import of a Hugging Face library, which reads them once. Scripts that a test
starts as a subprocess inherit them.
"""

import atexit
import os
import random
import shutil
import tempfile

_CACHE = tempfile.mkdtemp(prefix="llava_next_ar_tests_")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

for _variable in ("HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "TRANSFORMERS_CACHE", "HF_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(_variable, None)
os.environ.update(
    HF_HOME=os.path.join(_CACHE, "huggingface"),
    HF_MODULES_CACHE=os.path.join(_CACHE, "modules"),
    HF_DATASETS_CACHE=os.path.join(_CACHE, "datasets"),
    MPLCONFIGDIR=os.path.join(_CACHE, "matplotlib"),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    PYTHONFAULTHANDLER="1",  # see processes.py
    OMP_NUM_THREADS="1",  # the models are tiny: more threads only get in each other's way
)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

pytest_plugins = ["golden_report", "hub_report", "upstream_report"]

torch.set_num_threads(1)
# the same examples in every run, and no deadline: a busy machine is not a bug
settings.register_profile("llava_next_ar", deadline=None, derandomize=True)
settings.load_profile("llava_next_ar")


@pytest.fixture(autouse=True)
def fixed_seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
