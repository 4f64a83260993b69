"""All that the numbers of an evaluation depend on: settings, model, data and versions.

All of it goes into the output, and records of an interrupted run are only continued where all of it is the same.
"""

import argparse
import hashlib
import json
import math
import platform
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import transformers
from accelerate import PartialState
from huggingface_hub import ResolvedRevision
from transformers.utils import find_adapter_config_file, resolve_revision

from ..hub.command_line import CommandParser
from ..hub.hub_folder import check_source, sha256_of, weights_sha256
from ..processing.frame_sampling import SAMPLING_POLICIES, SHORT_CLIPS
from ..processing.video_decoding import VideoBackend

# Options of the video processor that are words.
VIDEO_CHOICES = {
    "sampling": tuple(SAMPLING_POLICIES),
    "short_clip": SHORT_CLIPS,
    "video_backend": get_args(VideoBackend),
}
FRAME_ORDERS = ("natural", "shuffled", "reversed")
# Settings that change no number.
_WITHOUT_EFFECT = ("num_workers", "max_bad_samples")


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """Reading of videos, where not as the checkpoint's processor: options of `LlavaNextARVideoProcessor`."""

    sampling: str | None = None
    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    sample_rate: int | None = None
    short_clip: str | None = None
    video_backend: str | None = None

    def __post_init__(self) -> None:
        for name, known in VIDEO_CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        for name in ("num_frames", "fps", "max_frames", "sample_rate"):
            value, least = getattr(self, name), "above 0" if name == "fps" else "at least 1"
            if value is not None and not (value > 0 if name == "fps" else value >= 1):
                raise ValueError(f"{name} is {value}, expected {least}")

    def video_options(self) -> dict[str, Any]:
        """Options that are set."""
        values = {field.name: getattr(self, field.name) for field in fields(VideoOptions)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(VideoOptions):
    """All that the results depend on; written into the output."""

    model: str
    data: str
    revision: str | None = None
    """Of a model on the Hub. In the output it is the commit that was loaded."""
    base_revision: str | None = None
    """The same of the base of a model that is an adapter."""
    video_root: str | None = None
    allow_outside_root: bool = False
    ignored_keys: str | None = None
    """Keys of an entry that are not read and may be left out, separated by commas; any other is an error."""
    trust_remote_code: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    cpu_threads: int = 1
    """Threads of each process on a CPU. A sum's last digits depend on them, and launchers set them as they like."""
    batch_size: int = 8
    num_workers: int = 0
    max_samples: int | None = None
    max_bad_samples: int = 0
    """Number of unreadable entries that are left out and named in the output; one more is an error."""
    max_new_tokens: int = 16
    frame_order: str = "natural"
    """`shuffled` and `reversed` show each video's frames in another order, at the same times: a question that is still
    answered needs no time."""
    generation: bool = True
    likelihood: bool = True
    reconstruction: bool = True
    horizons: int = 1
    """Number of frames ahead that are predicted. Above 1, that many last frames of each video are held back."""
    bootstrap_samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "max_new_tokens", "max_samples", "cpu_threads", "horizons"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        for name in ("num_workers", "max_bad_samples", "bootstrap_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.reconstruction and 1 < self.horizons and (self.num_frames or math.inf) <= self.horizons:
            raise ValueError(
                f"horizons is {self.horizons}, expected fewer than the {self.num_frames} frames of num_frames"
            )
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype is {self.dtype!r}, expected one such as float32 or bfloat16")
        if self.frame_order not in FRAME_ORDERS:
            raise ValueError(f"frame_order is {self.frame_order!r}, expected one of {', '.join(FRAME_ORDERS)}")


# -- The command line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None, and those of options that switch something off: theirs is the value of what they switch."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.default is None or isinstance(action, argparse._StoreFalseAction)
        return action.help if has_none else super()._get_help_string(action)


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """One option for each of `VideoOptions`."""
    group = parser.add_argument_group("videos", "How they are read, if other than the checkpoint's processor does.")
    helps = {
        "sampling": "policy that chooses frames: by default that of the options given here, or else the processor's",
        "num_frames": "frames of a video",
        "fps": "frames per second, instead of their number",
        "max_frames": "limit on the frames that fps or sample rate give",
        "sample_rate": "every how many frames one is taken",
        "short_clip": "a clip with fewer frames than are asked for gives all it has, or is an error; by default all, but "
        "an error with the policy num_frames",
        "video_backend": "library that decodes",
    }
    types = {"num_frames": int, "fps": float, "max_frames": int, "sample_rate": int}
    for name, text in helps.items():
        group.add_argument(
            f"--{name.replace('_', '-')}", type=types.get(name, str), choices=VIDEO_CHOICES.get(name), help=text
        )


def make_parser(description: str) -> argparse.ArgumentParser:
    """One option for each setting, and `output`, `resume` and `no_report`."""
    defaults = EvaluationSettings(model="", data="")
    parser = CommandParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--base-revision", help="the same of the base of a model that is an adapter")
    parser.add_argument("--data", required=True, help="LLaVA JSON or JSON lines")
    parser.add_argument("--output", type=Path, help="JSON file to write, with an HTML report beside it")
    parser.add_argument("--no-report", action="store_true", help="write no HTML report")
    parser.add_argument("--resume", action="store_true", help="go on where a run with the same output was interrupted")
    parser.add_argument("--video-root", help="folder of the videos; that of the data if not given")
    parser.add_argument("--allow-outside-root", action="store_true", help="accept paths outside of it, and URLs")
    parser.add_argument("--ignored-keys", help="keys of an entry that may be left out, separated by commas")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that the checkpoint carries",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, ...; of several processes each takes a device of that kind",
    )
    parser.add_argument("--dtype", default=defaults.dtype, help="float32, bfloat16 or float16")
    parser.add_argument(
        "--cpu-threads", type=int, default=defaults.cpu_threads, help="of each process, if the device is a CPU"
    )
    parser.add_argument(
        "--batch-size", type=int, default=defaults.batch_size, help="questions; last digits depend on it"
    )
    parser.add_argument("--num-workers", type=int, default=defaults.num_workers, help="processes that decode videos")
    parser.add_argument("--max-samples", type=int, help="only the first so many entries")
    parser.add_argument(
        "--max-bad-samples",
        type=int,
        default=defaults.max_bad_samples,
        help="leave out, and name in the output, up to so many entries that cannot be read",
    )
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, help="tokens of an answer")
    add_video_options(parser)
    parser.add_argument(
        "--frame-order", choices=FRAME_ORDERS, default=defaults.frame_order, help="a control: what needs no time"
    )
    parser.add_argument(
        "--horizons", type=int, default=defaults.horizons, help="frames ahead, by feeding predictions back"
    )
    parser.add_argument("--bootstrap-samples", type=int, default=defaults.bootstrap_samples, help="0: no intervals")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the bootstrap and of shuffled frames")
    for name in ("generation", "likelihood", "reconstruction"):
        parser.add_argument(
            f"--no-{name}",
            dest=name,
            action="store_false",
            help=f"do not measure {name}, which is measured by default",
        )
    return parser


def command_line(settings: EvaluationSettings, output: Path | None = None) -> str:
    """The command that repeats an evaluation, every setting spelled out: defaults may move."""
    words = ["llava-next-ar", "evaluate"]
    for field in fields(settings):
        value, name = getattr(settings, field.name), field.name.replace("_", "-")
        if isinstance(value, bool):
            words += [] if value == field.default else [f"--{name}" if value else f"--no-{name}"]
        elif value is not None:
            words += [f"--{name}", str(value)]
    words += [] if output is None else ["--output", str(output)]
    return shlex.join(words)


# -- Versions and fingerprints

# Folders whose code the numbers of an evaluation depend on.
_MEASURED_WITH = ("hub", "configuration", "modeling", "processing", "training", "evaluation")


def versions() -> dict[str, str]:
    """Versions of all that the numbers may depend on; packages that are not installed are left out."""
    others = {}
    for name in ("tokenizers", "pillow", "av", "decord"):
        with suppress(PackageNotFoundError):
            others[name] = version(name)
    # The same version may be a changed checkout: what makes the numbers is the package's modules and the evaluation.
    root = Path(__file__).parents[1]
    modules = [path for folder in _MEASURED_WITH for path in sorted((root / folder).glob("*.py"))]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": version("accelerate"),
        "numpy": np.__version__,
        **others,
        "llava_next_ar": version("llava-next-ar"),
        "code_sha256": sha256_of(modules),
    }


def check_device(device: str) -> None:
    """Raises ValueError unless there is a device of that name."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # the latter two where torch was built without it
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device is {device!r}, expected one that is there, such as cpu: {reason}") from error


def device_of_process(device: str, processes: PartialState) -> str | torch.device:
    """Device of a process: the one that is given, or for several processes one each of that kind.

    Raises:
        ValueError: if the launcher gave this process another kind.
    """
    if processes.num_processes == 1:
        return device
    wanted, given = torch.device(device), processes.device
    if wanted.index is not None or wanted.type != given.type:
        raise ValueError(f"device is {device!r}, but the launcher gave this process {given}: give {given.type!r}")
    return given


def hardware(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()})"


def resolved_revision(model: str, revision: str | None) -> str | None:
    """The commit that a revision of a model on the Hub is now; None for a folder.

    Raises:
        ValueError: for a revision of a folder, or if `model` is neither a folder nor of the form of a Hub id.
    """
    check_source(model)
    if Path(model).exists():
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but {model} is a folder, which has none")
        return None
    resolved = resolve_revision(model, revision)
    return resolved.resolved if isinstance(resolved, ResolvedRevision) else resolved


def base_of_adapter(model: str, revision: str | None) -> str | None:
    """Folder or Hub id of the model that transformers puts an adapter on; None for anything else than an adapter.

    Raises:
        ValueError: if the adapter names no base.
    """
    path = find_adapter_config_file(model, revision=revision)
    if path is None or (Path(model) / "config.json").exists():  # a whole model with an adapter inside is its own base
        return None
    base = json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"base_model_name_or_path in {path} is {base!r}, expected a folder or a Hub id")
    return base


def resolved_revisions(model: str, revision: str | None, base_revision: str | None) -> tuple[str | None, str | None]:
    """The commits of a model and, if it is an adapter, of its base; see `resolved_revision`.

    Raises:
        ValueError: for a revision of a folder, or of the base of a model that is not an adapter.
    """
    revision = resolved_revision(model, revision)
    base = base_of_adapter(model, revision)
    if base is not None:
        return revision, resolved_revision(base, base_revision)
    if base_revision is not None:
        raise ValueError(f"base_revision is {base_revision!r}, but {model} is not an adapter, and has no base")
    return revision, None


def model_identity(
    name: str, model: Any, revision: str | None, base_revision: str | None = None
) -> dict[str, str | None]:
    """Identity of a model and of an adapter's base: the commit of what is on the Hub, a hash of the weight
    files of what is in a folder."""
    base = base_of_adapter(name, revision)
    return {
        "id": name,
        "revision": revision,
        "weights_sha256": weights_sha256(name),
        "base": base,
        "base_revision": None if base is None else resolved_revision(base, base_revision),
        "base_weights_sha256": None if base is None else weights_sha256(base),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
    }


def entries_sha256(entries: Sequence[Any]) -> str:
    """Hash of the content of the entries of a data set, for any file or format."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps(entry, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def first_difference(mine: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first key, with both values, in which two provenances (dicts of dicts) differ in more than convenience."""
    for part in mine:
        for name in {**mine[part], **other.get(part, {})}:
            values = [some.get(part, {}).get(name) for some in (mine, other)]
            if values[0] != values[1] and not (part == "settings" and name in _WITHOUT_EFFECT):
                key = name if part == "settings" else f"{part} {name}"
                return f"{key} is {values[0]!r} here, but {values[1]!r} there"
    return None
