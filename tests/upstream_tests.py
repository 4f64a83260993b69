"""Import transformers' own test files under the name they have in their repository, `tests`.

What the source distribution leaves out is replaced by stand-ins without a single test in them, so that the rest runs;
test_transformers_common.py says at the end of the run what is missing.
"""

import importlib
import importlib.util
import os
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import transformers.testing_utils
from PIL import Image
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from video_clips import picture, write_clip

_MEDIA = tempfile.TemporaryDirectory(prefix="llava_next_ar_upstream_media_")

# Keys of every configuration, with values other than the defaults, where transformers' own list is not to be had.
COMMON_CONFIG_KEYS = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["Model"],
    "id2label": {0: "a"},
    "label2id": {"a": 0},
    "problem_type": "regression",
}


def local_media(url: str) -> str:
    """A synthetic file in the place of one that transformers' tests take from the Hub; sound has none."""
    name = url.rsplit("/", 1)[-1]
    path = Path(_MEDIA.name) / name
    if path.suffix == ".mp4":
        # The tests expect the tiny one to have 11 frames, 3 of which come a tenth of a second apart.
        num_frames, fps = (11, 30) if "tiny" in name else (20, 10)
        return str(path if path.exists() else write_clip(path, num_frames, fps=fps, width=320, height=240))
    if path.suffix in (".png", ".jpg"):
        Image.fromarray(picture(7)).save(path)
        return str(path)
    return url


def _stand_in(name: str, **members: object) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module


def load(folder: Path) -> dict[str, types.ModuleType]:
    """The modules `modeling`, `configuration`, `processing`, `video_processing` of `folder/tests`, imported once."""
    package = types.ModuleType("tests")
    package.__path__ = [os.fspath(folder / "tests")]
    sys.modules["tests"] = package
    for name, members in (
        ("tests.generation.test_utils", {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})}),
        ("tests.exporters.test_export", {"ExportTesterMixin": type("ExportTesterMixin", (), {})}),
        ("tests.utils.test_configuration_utils", {"config_common_kwargs": COMMON_CONFIG_KEYS}),
    ):
        if not (folder / name.replace(".", "/")).with_suffix(".py").is_file():
            _stand_in(name.rpartition(".")[0])
            _stand_in(name, **members)
    _stand_in("fetch_hub_objects_for_ci", url_to_local_path=local_media)
    path = list(sys.path)
    # Videos are decoded with decord or PyAV here, so tests of videos need no torchcodec. What transformers marks as slow
    # is slow here anyway.
    with mock.patch.multiple(transformers.testing_utils, is_torchcodec_available=lambda: True, _run_slow_tests=True):
        modules = {
            name: importlib.import_module(f"tests.test_{name}_common")
            for name in ("modeling", "configuration", "processing", "video_processing")
        }
    sys.path[:] = path  # the files add folders that are not there
    # Without torchvision, transformers' top level holds a stand-in that raises.
    modules["video_processing"].AutoVideoProcessor = AutoVideoProcessor
    return modules
