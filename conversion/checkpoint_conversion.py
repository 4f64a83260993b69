"""Conversion of checkpoints between LLaVA-OneVision, the original LLaVA-NeXT project and this package; see convert.py.

All names and shapes of the stored tensors are read from the headers of the files and compared with those of the model,
built on the meta device, before anything is written. Then the tensors are copied one at a time, so that a checkpoint may
be larger than memory. The output folder appears when it is complete.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
)

from ..configuration.configuration_llava_next_ar import LlavaNextARConfig
from ..hub.model_card import PIPELINE_TAG
from ..modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from ..processing.llava_conversation import IMAGE_TOKEN, VIDEO_TOKEN
from ..processing.processing_llava_next_ar import LlavaNextARProcessor, layout_options
from .original_checkpoint import ORIGINAL_KEYS, is_original_config, settings_from_original_config
from .streamed_safetensors import (
    CheckpointError,
    PlannedTensor,
    StoredTensor,
    TensorReader,
    listed,
    read_index,
    write_shards,
)

Format = Literal["llava_next_ar", "llava_onevision"]
HEAD = "autoregressive_module."
EMBEDDINGS, LM_HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
NEWLINE, FASTER = "model.image_newline", "model.faster_token"

# Key names of all versions on disk -> names of the model in memory; the first match counts.
_ONEVISION_KEYS = (
    (r"^(?:language_model\.)?lm_head\.", "lm_head."),
    (r"^(?:language_model\.model|model\.language_model|language_model)\.", "model.language_model."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"^(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^(?:model\.)?image_newline$", NEWLINE),
)
# Names in memory -> on disk, as transformers writes them for LLaVA-OneVision. This package writes the names in memory.
_ONEVISION_KEYS_ON_DISK = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(?=vision_tower\.|multi_modal_projector\.|image_newline$)", ""),
)
# Buffers that older versions stored. All versions compute them.
_COMPUTED = re.compile(r"\.(position_ids|rotary_emb\.inv_freq)$")
_TEXT_FILES = ("*.json", "*.txt", "*.jinja", "*.model")


@dataclass
class Conversion:
    """Result of a conversion.

    Attributes:
        output: the folder.
        config: as written.
        num_tensors, num_bytes: as written.
        notes: settings that the source leaves open, and tensors that were left out.
    """

    output: Path
    config: PreTrainedConfig
    num_tensors: int = 0
    num_bytes: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Options of `convert_checkpoint`."""

    to: Format = "llava_next_ar"
    """Format of the output."""
    dtype: str | torch.dtype | None = None
    """Type of all floating-point tensors; as stored if None."""
    pool_mode: str | None = None
    """`average | max | bilinear`; short for `config_overrides={"mm_spatial_pool_mode": ...}`."""
    config_overrides: Mapping[str, Any] | None = None
    """Keys of the source's `config.json`, with the values to read instead."""
    vision_config: Mapping[str, Any] | None = None
    """Whole vision tower of an original checkpoint; see `settings_from_original_config`."""
    autoregressive_config: Mapping[str, Any] | None = None
    """Keys of the new head."""
    tokenizer: str | os.PathLike | None = None
    """Folder or Hub id, if not the source."""
    image_token_id: int | None = None
    """Id of the placeholder; the tokenizer's if None."""
    video_token_id: int | None = None
    num_frames: int | None = None
    """Frames of a video, for an original checkpoint."""
    base_model: str | None = None
    """Hub id for the model card, if the source is a folder."""
    revision: str | None = None
    """Branch, tag or commit of the Hub id."""
    max_shard_size: int = 5 * 10**9
    """Bytes of a shard."""
    progress: bool = True
    """Show a progress bar."""


def convert_checkpoint(
    source: str | os.PathLike, output: str | os.PathLike, options: ConversionOptions | None = None, **keys: Any
) -> Conversion:
    """Convert a checkpoint to a complete folder: weights, configuration, processor, code and model card.

    From LLaVA-OneVision (transformers) or the original LLaVA-NeXT project (`llava_qwen`) to this package; from this
    package back to LLaVA-OneVision, without the head, if the rest is a LLaVA-OneVision model. The head is new: its
    weights are not in the folder but initialised when the model is loaded. Peak memory is at most that of the largest
    file read.

    Args:
        source: folder or Hub id with safetensors. Pickles are never read.
        output: new folder; must not exist, or be empty.
        options: see `ConversionOptions`.
        keys: fields of `options`, which win over those of `options`.

    Raises:
        CheckpointError: if the tensors are not those of the model, with the missing, unexpected and wrongly shaped ones,
            or a file is damaged or a pickle.
        ValueError: on a setting that the target cannot express, with its key.
        FileExistsError: if `output` is not empty.
        FileNotFoundError: if the source has no `config.json`.
    """
    options = replace(options or ConversionOptions(), **keys)
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already and is not an empty folder")
    folder, hub_id = _fetch(source, options.revision)
    overrides = dict(options.config_overrides or {})
    if options.pool_mode is not None:
        overrides["mm_spatial_pool_mode"] = options.pool_mode
    values = {**_read_config(folder), **overrides}
    kind = "original" if is_original_config(values) else values.get("model_type")
    if (kind, options.to) not in {
        ("llava_onevision", "llava_next_ar"),
        ("original", "llava_next_ar"),
        ("llava_next_ar", "llava_onevision"),
    }:
        raise ValueError(f"cannot convert a {kind!r} checkpoint to {options.to!r}")

    if kind != "original":  # where overrides are keys of the original
        LlavaNextARConfig.check_keywords(overrides)
    notes: list[str] = []
    config, processor_options = _target_config(kind, values, options, notes)
    tokenizer_source = options.tokenizer
    if tokenizer_source is not None and Path(tokenizer_source).exists():
        tokenizer_source = Path(tokenizer_source)
    processor = None
    if options.to == "llava_next_ar":
        processor = _processor(folder, tokenizer_source, config, processor_options)
        _choose_placeholders(config, processor, options.image_token_id, options.video_token_id, notes)
    ours, theirs = LlavaNextARForConditionalGeneration, LlavaOnevisionForConditionalGeneration
    model_class = ours if options.to == "llava_next_ar" else theirs
    stored = read_index(folder)
    if options.to == "llava_onevision" and any(name.startswith(HEAD) for name in stored):
        notes.append(f"the head ({HEAD}*) was left out: LLaVA-OneVision has no place for it")
    plan = plan_tensors(stored, config, model_class, ORIGINAL_KEYS if kind == "original" else (), notes)
    plan = _cast(plan, config, options.dtype)
    config.architectures = [model_class.__name__]

    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, plan, options.max_shard_size, options.progress)
        _write_generation_config(folder, partial, config)
        if processor is not None:
            processor.save_pretrained(partial)
        elif options.to == "llava_onevision":
            _export_processor(folder, partial, notes)
        if options.to == "llava_next_ar":
            if config.enable_autoregressive:
                notes.append(f"the head ({HEAD}*) is new: it is initialised when the model is loaded")
            if processor is None:
                notes.append("the source has no tokenizer, so no processor was written; give one with --tokenizer")
            card = _model_card(hub_id or options.base_model, kind, notes)
            (partial / "README.md").write_text(card, encoding="utf-8")
        config.save_pretrained(partial)  # last: a folder without it is not a model
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Conversion(output, config, len(plan), sum(tensor.num_bytes for tensor in plan), notes)


def _target_config(
    kind: str, values: dict[str, Any], options: ConversionOptions, notes: list[str]
) -> tuple[Any, dict[str, Any] | None]:
    """Return the configuration of the output and, for an original checkpoint, options of its processor; extend the notes."""
    if kind == "original":
        settings = settings_from_original_config(
            values,
            vision_config=options.vision_config,
            autoregressive_config=options.autoregressive_config,
            num_frames=options.num_frames,
        )
        notes += settings.notes
        return settings.config, settings.processor
    if options.to == "llava_next_ar":
        head = dict(options.autoregressive_config or {})
        return LlavaNextARConfig.from_dict(values, autoregressive_config=head), None
    return onevision_config(LlavaNextARConfig.from_dict(values)), None


# -- Configuration


def onevision_config(config: LlavaNextARConfig) -> LlavaOnevisionConfig:
    """Return the configuration of the same model without the head.

    Raises:
        ValueError: with each key that LLaVA-OneVision lacks, if its value changes the model.
    """
    shared = {known.name for known in fields(LlavaOnevisionConfig)}
    own = {known.name: known.default for known in fields(LlavaNextARConfig) if known.name not in shared}
    head = ("enable_autoregressive", "autoregressive_config")
    defaults = {name: value for name, value in own.items() if name not in head}
    if not config.add_faster_video:
        defaults.pop("faster_token_stride")  # has no effect
    other = [
        f"{name}={getattr(config, name)!r} (must be {value!r})"
        for name, value in defaults.items()
        if getattr(config, name) != value
    ]
    if other:
        raise ValueError(
            f"LLaVA-OneVision cannot express this model: {', '.join(other)}. If the difference does not matter to "
            "you, override the key (--set KEY=VALUE)"
        )
    values = {name: value for name, value in config.to_dict().items() if name not in {*own, "auto_map", "model_type"}}
    return LlavaOnevisionConfig.from_dict(values)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no config.json")
    return json.loads(path.read_text())


def _fetch(source: str | os.PathLike, revision: str | None) -> tuple[Path, str | None]:
    """Return a local folder, and the Hub id of a download."""
    if Path(source).is_dir():
        return Path(source), None
    try:
        validate_repo_id(str(source))
    except HFValidationError as error:
        raise FileNotFoundError(f"no such folder: {source}") from error
    patterns = ["*.safetensors", *_TEXT_FILES]
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns)), str(source)
    except OSError as error:
        raise OSError(f"{source} is not a folder here, and cannot be read from the Hub: {error}") from error


def _choose_placeholders(
    config: LlavaNextARConfig,
    processor: LlavaNextARProcessor | None,
    image_token_id: int | None,
    video_token_id: int | None,
    notes: list[str],
) -> None:
    """Set both placeholder ids; they must be rows of the embeddings."""
    vocab_size = config.text_config.vocab_size
    for name, given, from_end in (("image_token_id", image_token_id, 2), ("video_token_id", video_token_id, 1)):
        if given is not None:
            setattr(config, name, given)
        elif processor is None and getattr(config, name) >= vocab_size:
            setattr(config, name, vocab_size - from_end)
            notes.append(f"{name} is {getattr(config, name)}, at the end of the vocabulary, without a tokenizer")
        if not 0 <= getattr(config, name) < vocab_size:
            raise ValueError(f"{name}={getattr(config, name)} is not a row of the {vocab_size} embeddings")
    if processor is not None:
        processor.check_layout(config)


# -- Tensors


def plan_tensors(
    stored: Mapping[str, StoredTensor],
    config: PreTrainedConfig,
    model_class: type,
    own_keys: tuple[tuple[str, str], ...] = (),
    notes: list[str] | None = None,
) -> list[PlannedTensor]:
    """Plan the conversion: the stored tensor of each tensor of the model, in the order of the source.

    Args:
        stored: tensors on disk.
        config, model_class: of the output.
        own_keys: the source's (pattern, replacement) table; LLaVA-OneVision's if empty.
        notes: extended by the tensors that are left out or filled in.

    Raises:
        CheckpointError: with all tensors that are missing, unexpected, wrongly shaped or duplicate.
    """
    notes = [] if notes is None else notes
    expected = _expected_shapes(config, model_class)
    sources: dict[str, StoredTensor] = {}
    unexpected, twice = [], []
    for name, tensor in stored.items():
        target = _rename(name, own_keys or _ONEVISION_KEYS)
        if target.startswith(HEAD) or _COMPUTED.search(target):
            continue
        if target not in expected:  # towers with this level in memory
            target = target.replace("model.vision_tower.", "model.vision_tower.vision_model.", 1)
        if target in sources:
            twice.append(f"{name} and {sources[target].name}")
        elif target in expected or target == LM_HEAD and config.tie_word_embeddings:
            sources[target] = tensor
        elif target == FASTER:
            notes.append(f"{name} was left out: the model has no slow and fast frames")
        else:
            unexpected.append(name)
    _drop_tied_head(sources, config)
    missing = [name for name in expected if name not in sources]
    if NEWLINE in missing and not _uses_newline(config):
        missing.remove(NEWLINE)
        notes.append(f"{NEWLINE} is filled with zeros: the layout has no newlines, and the source has no such tensor")
    misshapen = [
        f"{tensor.name} is {list(tensor.shape)}, expected {list(expected[name])}"
        for name, tensor in sources.items()
        if tensor.shape != expected[name]
    ]
    problems = [
        f"{what} ({len(names)}): {listed(names)}"
        for what, names in (
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            ("wrongly shaped tensors", misshapen),
            ("duplicate tensors", twice),
        )
        if names
    ]
    if problems:
        hint = ""
        if FASTER in missing:
            hint = "; to convert it as a model without slow and fast frames: --set add_faster_video=false"
        elif any(name.startswith("model.vision_tower.") for name in missing):
            hint = "; the checkpoint must contain the vision tower of its configuration"
        raise CheckpointError("the checkpoint does not fit the model: " + "; ".join(problems) + hint)
    on_disk = _ONEVISION_KEYS_ON_DISK if model_class is LlavaOnevisionForConditionalGeneration else ()
    plan = [
        PlannedTensor(_rename(name, on_disk), tensor.shape, tensor.dtype, tensor) for name, tensor in sources.items()
    ]
    if NEWLINE not in sources:
        plan.append(PlannedTensor(_rename(NEWLINE, on_disk), expected[NEWLINE], plan[0].dtype, None))
    return plan


def _expected_shapes(config: PreTrainedConfig, model_class: type) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.startswith(HEAD)}
    if config.tie_word_embeddings:
        shapes.pop(LM_HEAD)
    return shapes


def _drop_tied_head(sources: dict[str, StoredTensor], config: PreTrainedConfig) -> None:
    if not config.tie_word_embeddings or LM_HEAD not in sources:
        return
    head = sources.pop(LM_HEAD)
    with TensorReader() as reader:
        if EMBEDDINGS in sources and not reader.same(head, sources[EMBEDDINGS]):
            raise CheckpointError(
                f"tie_word_embeddings is set, but {head.name} differs from {sources[EMBEDDINGS].name}: one of the two "
                "would be lost (--set tie_word_embeddings=false keeps both)"
            )


def _uses_newline(config: PreTrainedConfig) -> bool:
    if not isinstance(config, LlavaNextARConfig):
        return True
    return "unpad" in config.mm_patch_merge_type or config.mm_newline_position != "no_token"


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        renamed, found = re.subn(pattern, replacement, name, count=1)
        if found:
            return renamed
    return name


def _cast(plan: list[PlannedTensor], config: PreTrainedConfig, dtype: str | torch.dtype | None) -> list[PlannedTensor]:
    """Return the plan in the chosen type, and write it into the configuration; the most frequent type if types are kept."""
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise ValueError(f"dtype must be a floating-point type such as bfloat16, got {dtype!r}")
    sizes: Counter = Counter()
    cast = []
    for tensor in plan:
        own = wanted if wanted is not None and tensor.dtype.is_floating_point else tensor.dtype
        cast.append(PlannedTensor(tensor.name, tensor.shape, own, tensor.source))
        sizes[own] += tensor.num_bytes
    prevailing = sizes.most_common(1)[0][0]
    for part in (config, config.text_config, config.vision_config):
        if part is config or part.dtype is not None:
            part.dtype = prevailing
    return cast


def _write_weights(folder: Path, plan: list[PlannedTensor], max_shard_size: int, progress: bool) -> None:
    with tqdm(total=sum(t.num_bytes for t in plan), unit="B", unit_scale=True, disable=not progress) as bar:
        write_shards(folder, plan, max_shard_size, lambda tensor: bar.update(tensor.num_bytes))


# -- Everything but the weights


def _processor(
    folder: Path,
    tokenizer: str | os.PathLike | None,
    config: LlavaNextARConfig,
    options: dict[str, Any] | None,
) -> LlavaNextARProcessor | None:
    """Return the source's processor if it is LLaVA-OneVision's, else one from its tokenizer, or None.

    An original checkpoint (with `options`) has no placeholder ids: those of the tokenizer are used.
    """
    if options is None and tokenizer is None:
        if (folder / "processor_config.json").exists():
            return LlavaNextARProcessor.from_pretrained(folder, **layout_options(config))
    if tokenizer is None:
        if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
            return None
        tokenizer = folder
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    for kind, default in (("image", IMAGE_TOKEN), ("video", VIDEO_TOKEN)) if options is not None else ():
        token = getattr(loaded, f"{kind}_token", None) or default
        if token in loaded.get_vocab():  # for_config adds missing ones
            setattr(config, f"{kind}_token_id", loaded.convert_tokens_to_ids(token))
    return LlavaNextARProcessor.for_config(config, loaded, **(options or {}))


def _write_generation_config(folder: Path, output: Path, config: PreTrainedConfig) -> None:
    if (folder / "generation_config.json").exists():
        GenerationConfig.from_pretrained(folder).save_pretrained(output)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(output)


# Options of LlavaOnevisionVideoProcessor; sampling options are those of this package.
_VIDEO_OPTIONS = (
    *("do_resize", "size", "resample", "default_to_square", "do_center_crop", "crop_size", "do_rescale"),
    *("rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)


def _export_processor(folder: Path, output: Path, notes: list[str]) -> None:
    """Rewrite the files of the processor as LlavaOnevisionProcessor's, whose classes need torchvision."""
    if not (folder / "processor_config.json").exists():
        notes.append("the source has no processor, so none was written")
        return
    for path in sorted(folder.glob("*")):
        if path.name.startswith(("tokenizer", "chat_template", "vocab", "merges", "special_tokens", "added_tokens")):
            shutil.copy(path, output)
    values = json.loads((folder / "processor_config.json").read_text())
    if values.pop("add_time_instruction", False):
        notes.append("LlavaOnevisionProcessor writes no time instruction (add_time_instruction was on)")
    for name in ("auto_map", "frame_token_layout", "mm_patch_merge_type", "unpad_rounding"):
        values.pop(name, None)
    values["processor_class"] = "LlavaOnevisionProcessor"
    values["image_processor"].pop("auto_map", None)
    video = values["video_processor"]
    values["video_processor"] = {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        **{name: video[name] for name in _VIDEO_OPTIONS if name in video},
    }
    _write_json(output / "processor_config.json", values)
    if (output / "tokenizer_config.json").exists():
        settings = json.loads((output / "tokenizer_config.json").read_text())
        settings.pop("auto_map", None)
        _write_json(output / "tokenizer_config.json", {**settings, "processor_class": "LlavaOnevisionProcessor"})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_card(base_model: str | None, kind: str, notes: list[str]) -> str:
    front = ["library_name: transformers", f"pipeline_tag: {PIPELINE_TAG}"]
    front.append("tags: [llava-next-ar, video, custom_code]")
    if base_model is not None:
        front.append(f"base_model: {base_model}")
    origin = {"original": "the LLaVA-NeXT project's format", "llava_onevision": "LLaVA-OneVision's format"}[kind]
    lines = ["---", *front, "---", "", "# LLaVA-NeXT-AR", ""]
    lines += [f"Converted from {origin}{f', `{base_model}`' if base_model else ''}.", ""]
    lines += ["```python", "from transformers import AutoModelForImageTextToText, AutoProcessor", ""]
    lines += ["model = AutoModelForImageTextToText.from_pretrained(folder_or_id, trust_remote_code=True)"]
    lines += ["processor = AutoProcessor.from_pretrained(folder_or_id, trust_remote_code=True)", "```", ""]
    lines += ["Notes of the conversion:", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)
