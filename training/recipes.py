"""Recipes of a training: YAML files and command lines -> typed, validated arguments.

Values come from the defaults of the dataclasses, then from the recipe, then from the command line. A recipe is a
mapping, or the prototype's list (`- type: trainer`). Unknown keys raise an error that names the nearest known key.
"""

import argparse
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from transformers import HfArgumentParser, LlavaOnevisionConfig, TrainingArguments

from ..configuration.configuration_llava_next_ar import LlavaNextARAutoregressiveConfig, LlavaNextARConfig
from ..configuration.key_names import nearest_name
from ..configuration.transformers_compat import ACTIVATION_CHECKPOINTING
from ..processing.frame_sampling import SAMPLING_POLICIES, SHORT_CLIPS
from ..processing.video_decoding import VideoBackend
from .guards import RECOMMENDED_SHARE, BadStepPolicy

TRAINABLE = ("full", "projector_and_head", "head", "lora")
TRAINER_TYPE = "autoregressive_trainer"


@dataclass
class ModelArguments:
    """Model and trained parts."""

    model: str | None = field(default=None, metadata={"help": "Checkpoint to start from: a folder or a Hub id."})
    processor: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the processor; by default that of the model."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that the checkpoint carries instead of the installed package."}
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "Precision of frozen weights; bfloat16 with bf16, else float32. What trains is in float32."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    trainable: str = field(default="full", metadata={"help": "full | projector_and_head | head | lora."})
    freeze_vision_tower: bool = field(
        default=True,
        metadata={"help": "False trains the tower too; the head then keeps a frozen copy as its teacher."},
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the reconstruction head; by default that of the model."}
    )
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=128, metadata={"help": "Scale of the adapters: lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Linear layers with adapters; by default all of the language model."}
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "QLoRA: keep the language model's frozen layers in 4 bits (NF4). Needs CUDA and bitsandbytes."
        },
    )
    merge_lora: bool = field(
        default=False, metadata={"help": "Save the merged model at the end instead of the adapter."}
    )


@dataclass
class DataArguments:
    """Data. An option of the video processor that is not set keeps the value of the checkpoint."""

    train_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "One source or several: a .json, .jsonl or .parquet file, a save_to_disk folder or a Hub id; or a "
            "mapping with path and any of weight, name, split, revision, video_root, image_root."
        },
    )
    eval_data: list[str] | None = field(default=None, metadata={"help": "The same, for evaluation."})
    streaming: bool = field(
        default=False, metadata={"help": "Read train_data one entry after the other, without end; needs max_steps."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Entries of a streamed source among which the next one is drawn."}
    )
    video_root: str | None = field(default=None, metadata={"help": "Folder of the videos; that of the data if unset."})
    image_root: str | None = field(default=None, metadata={"help": "Folder of the images; video_root if unset."})
    allow_outside_root: bool = field(default=False, metadata={"help": "Accept paths outside of the folder, and URLs."})
    ignored_keys: list[str] | None = field(
        default=None,
        metadata={"help": "Keys of an entry that are not read and may be left out; any other is an error."},
    )
    reconstruction_only: bool = field(
        default=False, metadata={"help": "Accept data without answers: only the reconstruction is trained."}
    )
    check_data: bool = field(default=True, metadata={"help": "Validate all entries before training starts."})
    check: bool = field(
        default=False, metadata={"help": "Report on the recipe and a sample of the data without training."}
    )
    check_samples: int = field(
        default=200, metadata={"help": "Samples that check reads: their texts and the headers of their media."}
    )
    check_decoded: int = field(default=8, metadata={"help": "Samples among these whose media check decodes."})
    num_processes: int | None = field(
        default=None, metadata={"help": "With check: assumed number of processes; by default those that run."}
    )
    on_bad_sample: str = field(
        default="raise",
        metadata={"help": "raise | skip: stop, or leave the sample out and list it in bad_samples.jsonl."},
    )
    max_bad_samples: int | None = field(
        default=1000, metadata={"help": "With skip: upper bound on the number of bad samples."}
    )
    max_bad_share: float | None = field(
        default=0.05, metadata={"help": "With skip: upper bound as a share of all samples, 0 to 1. Not for streams."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens that a sample may have."})
    truncate: bool = field(default=False, metadata={"help": "Cut longer samples (never visual tokens)."})
    packing: bool = field(
        default=False,
        metadata={"help": "Concatenate the samples of a batch without padding; they do not attend to each other."},
    )
    sampling: str | None = field(
        default=None,
        metadata={
            "help": f"Policy that chooses frames: {' | '.join(SAMPLING_POLICIES)}. uniform_time and fps_time use the times of "
            "frames, for videos whose frame rate varies; codec uses their coded bytes."
        },
    )
    num_frames: int | None = field(default=None, metadata={"help": "Frames of a video."})
    fps: float | None = field(default=None, metadata={"help": "Frames per second, instead of num_frames."})
    max_frames: int | None = field(
        default=None, metadata={"help": "Limit on the frames that fps or sample_rate give."}
    )
    sample_rate: int | None = field(default=None, metadata={"help": "Stride between sampled frames."})
    short_clip: str | None = field(
        default=None,
        metadata={
            "help": f"{' | '.join(SHORT_CLIPS)}: a clip with fewer frames than requested gives all its frames, or is an error. "
            "By default all, but an error with the policy num_frames."
        },
    )
    video_backend: str | None = field(
        default=None, metadata={"help": f"{' | '.join(get_args(VideoBackend))}: library that decodes."}
    )
    resize_backend: str | None = field(default=None, metadata={"help": "torch | pil."})
    allow_partial: bool | None = field(default=None, metadata={"help": "Use the readable frames of a damaged video."})
    add_time_instruction: bool | None = field(
        default=None, metadata={"help": "Write the frame times into the prompt."}
    )


@dataclass
class GuardArguments:
    """Reaction to bad steps, signals and an output folder in use."""

    bad_step_action: str = field(
        default=BadStepPolicy.action,
        metadata={"help": "stop | skip: reaction to a step whose loss or gradient is not finite, or explodes."},
    )
    max_skipped_steps: int = field(
        default=BadStepPolicy.max_skipped_steps, metadata={"help": "Upper bound on skipped steps of the run."}
    )
    max_consecutive_skips: int = field(
        default=BadStepPolicy.max_consecutive_skips, metadata={"help": "Upper bound on skipped steps in a row."}
    )
    explosion_factor: float | None = field(
        default=BadStepPolicy.explosion_factor,
        metadata={"help": "A gradient norm above this factor times the usual norm makes a step bad."},
    )
    explosion_window: int = field(
        default=BadStepPolicy.explosion_window,
        metadata={"help": "Number of steps whose median norm is the usual norm."},
    )
    recommended_share: list[float] = field(
        default_factory=lambda: list(RECOMMENDED_SHARE),
        metadata={
            "help": "Lowest and highest share of the reconstruction in the loss without a warning; 0 1: never warn."
        },
    )
    save_on_sigterm: bool = field(
        default=True,
        metadata={
            "help": "On SIGTERM and on the first Ctrl-C, save a checkpoint after the step and end with status 143 or 130."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Replace the run that output_dir holds; its checkpoints are deleted at the start."},
    )

    def bad_step_policy(self) -> BadStepPolicy:
        return BadStepPolicy(
            action=self.bad_step_action,
            max_skipped_steps=self.max_skipped_steps,
            max_consecutive_skips=self.max_consecutive_skips,
            explosion_factor=self.explosion_factor,
            explosion_window=self.explosion_window,
        )


ARGUMENT_CLASSES = (ModelArguments, DataArguments, GuardArguments, TrainingArguments)
PLAIN_KEYS = {f.name for one_class in ARGUMENT_CLASSES for f in fields(one_class) if f.init}
HEAD_KEYS = {f.name for f in fields(LlavaNextARAutoregressiveConfig)} & set(
    LlavaNextARAutoregressiveConfig.__annotations__
)
CONFIG_KEYS = {f.name for f in fields(LlavaNextARConfig)} - {f.name for f in fields(LlavaOnevisionConfig)}
CONFIG_KEYS -= {"autoregressive_config"}
SECTIONS = {"autoregressive_config": HEAD_KEYS, "model_config": CONFIG_KEYS}
_TRUE_BY_DEFAULT = {f.name for one_class in ARGUMENT_CLASSES for f in fields(one_class) if f.default is True}


def flatten_recipe(document: Any, source: str) -> dict[str, Any]:
    """Returns the keys and values of a recipe in either form: `{"learning_rate": ..., "autoregressive_config.num_hist": ...}`.

    Raises:
        ValueError: on an unknown or ambiguous key (naming the nearest), or a document of neither form.
    """
    if isinstance(document, list):  # the prototype's form
        if len(document) != 1 or not isinstance(document[0], dict) or document[0].get("type") != "trainer":
            raise ValueError(f"{source}: a list must hold one entry of the form `- type: trainer` with `config:`")
        unknown = document[0].keys() - {"type", "config"}
        if unknown:
            raise ValueError(f"{source}: unknown key {min(unknown)!r} beside 'type' and 'config'")
        document = dict(document[0].get("config") or {})
        trainer_type = document.pop("trainer_type", TRAINER_TYPE)
        if trainer_type != TRAINER_TYPE:
            raise ValueError(f"{source}: trainer_type is {trainer_type!r}, expected {TRAINER_TYPE!r}")
    if not isinstance(document, dict):
        raise ValueError(f"{source} must hold keys and values, got {type(document).__name__}")
    flat: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        if key in flat:
            raise ValueError(f"{source}: {key} is given twice")
        flat[key] = value

    for key, value in document.items():
        key = str(key).replace("-", "_")
        if key not in SECTIONS:
            add(resolve_key(key, source), value)
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{source}: {key} must hold keys and values, got {value!r}")
        for name, inner in value.items():
            if key == "model_config" and name == "autoregressive_config":
                for head_name, head_value in (inner or {}).items():
                    add(resolve_key(f"autoregressive_config.{head_name}", source), head_value)
            else:
                add(resolve_key(f"{key}.{name}", source), inner)
    return flat


def resolve_key(key: str, source: str) -> str:
    """Returns the full name of a key that may be given without its section.

    Raises:
        ValueError: for an unknown key, or one of two sections.
    """
    key = key.removeprefix("model_config.") if key.startswith("model_config.autoregressive_config.") else key
    if key.startswith("activation_checkpointing"):  # also its `_kwargs`
        key = key.replace("activation_checkpointing", ACTIVATION_CHECKPOINTING)
    section, _, name = key.rpartition(".")
    if section in SECTIONS and name in SECTIONS[section]:
        return key
    if not section:
        full = [name] if name in PLAIN_KEYS else [f"{s}.{name}" for s, names in SECTIONS.items() if name in names]
        if len(full) == 1:
            return full[0]
        if full:
            raise ValueError(f"{source}: {name} stands for {' or for '.join(full)}; give the full name")
    known = {f"{s}.{n}": n for s, names in SECTIONS.items() for n in names} | {n: n for n in PLAIN_KEYS}
    if section in SECTIONS:
        known = {full: n for full, n in known.items() if full.startswith(f"{section}.")}
    leaf = nearest_name(name, known.values())
    nearest = next(full for full in known if known[full] == leaf)
    raise ValueError(f"{source}: unknown key {key!r}; did you mean {nearest!r}?")


def recipe_path(name: str) -> Path:
    """Returns the file of a recipe.

    Args:
        name: a path, or the name of a recipe of the package, such as `lora`.

    Raises:
        FileNotFoundError: if neither exists, with the names of the package's recipes.
    """
    folder = Path(__file__).resolve().parents[1] / "scripts" / "configs"
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise FileNotFoundError(f"config is {name!r}, expected a file or one of {names}")


def _read_yaml(text: Any, source: str) -> Any:
    """Returns the value of a YAML text or open file.

    Raises:
        ValueError: with the source, and line and column of the fault, if it is not valid YAML.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error


def read_command_line(argv: list[str]) -> dict[str, Any]:
    """Returns the YAML values of `--key value`, `--key=value`, `--flag` and `--key a b`."""
    document: dict[str, list[str]] = {}
    values: list[str] | None = None
    for token in argv:
        if token.startswith("--"):
            key, has_value, value = token[2:].partition("=")
            key = key.replace("-", "_")
            if key.removeprefix("no_") in _TRUE_BY_DEFAULT and key.startswith("no_") and not has_value:
                key, has_value, value = key.removeprefix("no_"), "=", "false"
            if key in document:
                raise ValueError(f"--{key} is given twice")
            values = document[key] = [value] if has_value else []
        elif values is None:
            raise ValueError(f"expected --key before {token!r}")
        else:
            values.append(token)
    parsed = {key: [_read_yaml(value, f"--{key}") for value in values] for key, values in document.items()}
    return {key: True if not values else values[0] if len(values) == 1 else values for key, values in parsed.items()}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with an unwrapped description and the default of each option."""


def make_parser(description: str | None = None) -> HfArgumentParser:
    """Returns a parser with one option for each key; a key that is true by default has `--no_<key>` too."""
    parser = HfArgumentParser(
        ARGUMENT_CLASSES,
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    for action in parser._actions:
        if isinstance(action, argparse._StoreFalseAction):  # HfArgumentParser gives it the help of the key
            action.help, action.default = f"Set {action.dest} to false.", argparse.SUPPRESS
    return parser


def _check_ranges(data_args: DataArguments, training_args: TrainingArguments) -> None:
    at_least_one = {"check_samples": data_args.check_samples, "num_processes": data_args.num_processes or 1}
    names = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    at_least_one |= {name: getattr(training_args, name) for name in names}
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in (
        ("dataloader_num_workers", training_args.dataloader_num_workers),
        ("check_decoded", data_args.check_decoded),
    ):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if training_args.max_steps <= 0 and not training_args.num_train_epochs > 0:
        raise ValueError(f"num_train_epochs must be above 0 without max_steps, got {training_args.num_train_epochs}")
    if data_args.num_processes is not None and not data_args.check:
        raise ValueError("num_processes is for --check; a launcher takes it to start so many: accelerate launch")


def parse_arguments(
    argv: list[str],
) -> tuple[
    ModelArguments, DataArguments, GuardArguments, TrainingArguments, dict[str, dict[str, Any]], dict[str, Any]
]:
    """Returns the four groups of arguments, the configuration's sections, and all values as given.

    Raises:
        ValueError: on an unknown or missing key, or a value that does not fit.
        FileNotFoundError: as `recipe_path`.
    """
    given = read_command_line(argv)
    values: dict[str, Any] = {}
    config_files = given.pop("config", [])
    for path in config_files if isinstance(config_files, list) else [config_files]:
        with open(recipe_path(str(path)), encoding="utf-8") as file:
            document = _read_yaml(file, str(path)) or {}
        values.update(flatten_recipe(document, str(path)))
    values.update(flatten_recipe(given, "the command line"))
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    words = []
    if "use_cpu" not in values and not torch.accelerator.is_available():
        words += ["--use_cpu", "true"]  # else TrainingArguments rejects the recipes' bf16, which a CPU has too
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section:
            sections[section][name] = value
        elif value is not None:  # null stands for the default
            # As on a command line: the parser gives each value the type of its field (1e-5 is text to YAML).
            texts = value if isinstance(value, list) else [value]
            if value is False and key.endswith("_strategy"):
                texts = ["no"]  # which YAML reads as false
            words += [f"--{key}", *(json.dumps(t) if isinstance(t, (dict, bool)) else str(t) for t in texts)]
    try:
        model_args, data_args, guard_args, training_args = make_parser().parse_args_into_dataclasses(words)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    for name, value in (("model", model_args.model), ("train_data", data_args.train_data)):
        if value is None:
            raise ValueError(f"--{name} is missing: give it in the recipe or on the command line")
    if data_args.on_bad_sample not in ("raise", "skip"):
        raise ValueError(f"on_bad_sample is {data_args.on_bad_sample!r}, expected raise or skip")
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError("streaming: true needs max_steps, as a stream has no end")
    if data_args.streaming and training_args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "train_sampling_strategy: group_by_length needs the lengths of all samples, which a stream lacks"
        )
    _check_ranges(data_args, training_args)
    if model_args.trainable not in TRAINABLE:
        raise ValueError(f"trainable is {model_args.trainable!r}, expected one of {', '.join(TRAINABLE)}")
    guard_args.bad_step_policy()  # validates its values
    if guard_args.save_on_sigterm and training_args.enable_jit_checkpoint:
        raise ValueError(
            "enable_jit_checkpoint would save in the middle of a step; save_on_sigterm does it at the end of one: "
            "leave out the former or set the latter to false"
        )
    return model_args, data_args, guard_args, training_args, sections, values
