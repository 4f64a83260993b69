# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Folders of saved models and adapters: files that belong into a Hub repository; missing and damaged files."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from .hub_code import modules_imported_by
from .pushed_model import MODEL_CONFIGS, MODEL_WEIGHTS, hub_id

# Not all `*.bin` files: a Trainer saves its settings as one.
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
# Phrases of the cards that transformers and peft generate.
_LIBRARY_PHRASES = (
    "[More Information Needed]",
    "has been generated automatically",
    "has been automatically generated",
)

# Files that are pushed beside weights and code. All other files are left out.
_CONFIGS = {
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
    *("README.md", "film.png", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE"),
}
_LEFT_OUT = (
    (r"checkpoint-\d+/.*", "an earlier checkpoint"),
    (r"(runs|logs|wandb)/.*|.*\.log|.*tfevents.*", "a log"),
    (r"optimizer.*|scheduler.*|scaler.*|rng_state.*|trainer_state\.json|training_args\.bin", "state of the training"),
    (
        r"progress_\d+\.json|checkpoint_files\.json|global_step.*|pytorch_model_fsdp.*|latest|zero_to_fp32\.py",
        "state of the training",
    ),
    (r".*\.(bin|pt|pth|ckpt|pkl|pickle)", "a pickle, which can run code when it is loaded"),
    (r"handler\.py|requirements\.txt", "of an Inference Endpoint; --endpoint pushes it"),
    (r".*\.py", "not a module of the model's code"),
    (r".*\.safetensors(\.index\.json)?", "not a part of the weights that are loaded"),
)


def check_source(source: str | os.PathLike) -> None:
    """Validate the source of a checkpoint, a folder or a Hub id, before the Hub is asked.

    Raises:
        ValueError: if it is a file, or neither an existing folder nor of the form of a Hub id.
    """
    if os.path.isfile(source):
        raise ValueError(f"{source} is a file, expected a folder or a Hub id")
    if not os.path.isdir(source) and hub_id(os.fspath(source)) is None:
        raise ValueError(f"no such folder: {source}")


@dataclass(frozen=True)
class HubFolder:
    """Files of a folder that belong on the Hub, and all others; made by `read_hub_folder`."""

    kind: Literal["model", "adapter"]
    files: dict[str, Path]
    """Files to push: path in the repository -> file."""
    left_out: dict[str, str]
    """Other files: path in the folder -> reason."""


def read_hub_folder(folder: str | os.PathLike) -> HubFolder:
    """Sort the files of a saved model or adapter into those of its repository and all others.

    Raises:
        ValueError: if the folder is not a complete checkpoint; the message names all missing or damaged files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder" if folder.exists() else f"no such folder: {folder}")
    kind = "adapter" if (folder / "adapter_config.json").is_file() else "model"
    config = _read_json(folder / "config.json")
    if kind == "adapter" and any(MODEL_WEIGHTS.fullmatch(path.name) for path in folder.iterdir()):
        raise ValueError(f"{folder} holds a model and an adapter: delete adapter_config.json or the model's weights")
    needed = _needed_weights(folder, kind)
    if kind == "adapter" or config.get("model_type") == "llava_next_ar":
        needed["processor_config.json"] = "the processor; save it with processor.save_pretrained"
        if kind == "model" and "auto_map" not in config:
            needed["auto_map in config.json"] = "the classes that load it; save the model with this package"
    for source in ("config.json", "processor_config.json"):
        needed.update(_needed_code(folder, source))
    problems = [f"{name} ({why})" for name, why in needed.items() if not (folder / name).is_file()]
    if problems:
        raise ValueError(f"{folder} is not complete; it lacks {', '.join(problems)}")
    _check_weights(folder, [name for name in needed if name.endswith(".safetensors")])

    wanted = _CONFIGS | needed.keys()
    if kind == "adapter":
        wanted -= MODEL_CONFIGS
    files, left_out = {}, {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in wanted or re.fullmatch(r"additional_chat_templates/[\w-]+\.jinja", name):
            files[name] = path
        else:
            reasons = (why for pattern, why in _LEFT_OUT if re.fullmatch(pattern, name))
            left_out[name] = next(reasons, "not on the list of what a model needs")
    return HubFolder(kind, files, left_out)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _needed_weights(folder: Path, kind: str) -> dict[str, str]:
    """Files of the weights that would be loaded, each with its description."""
    if kind == "adapter":
        return {"adapter_config.json": "of the adapter", "adapter_model.safetensors": "the adapter's weights"}
    needed = {"config.json": "the model's configuration"}
    single, index = "model.safetensors", "model.safetensors.index.json"
    shards = sorted(set(_read_json(folder / index).get("weight_map", {}).values()))
    if (folder / single).is_file() and any((folder / name).is_file() for name in shards):
        raise ValueError(
            f"{folder} holds {single} and shards: delete those of the older save ({single} is what loads)"
        )
    if (folder / single).is_file() or not (folder / index).is_file():
        return needed | {single: f"the weights, or shards with {index}"}
    return needed | {index: "of the shards"} | {name: f"named by {index}" for name in shards}


def _needed_code(folder: Path, source: str) -> dict[str, str]:
    """Modules of a configuration's `auto_map`, and the siblings that they import, each with its importer."""
    found: dict[str, str] = {}
    classes = _read_json(folder / source).get("auto_map", {}).values()
    waiting = [(name.split(".")[0] + ".py", source) for name in classes]
    while waiting:
        name, importer = waiting.pop()
        if name not in found:
            found[name] = f"imported by {importer}"
            code = (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else ""
            waiting += [(f"{module}.py", name) for module in modules_imported_by(code)]
    return found


def _check_weights(folder: Path, names: list[str]) -> None:
    """Raise ValueError if a file of weights is cut off or not a safetensors file."""
    for name in names:
        try:
            with safe_open(folder / name, framework="numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from error


def weights_sha256(folder: str | Path) -> str | None:
    """Hash of all files of weights in a folder; None without a folder or without weights."""
    files = sorted(path for pattern in _WEIGHT_FILES for path in Path(folder).glob(pattern))
    return sha256_of(files) if files else None


def sha256_of(files: Sequence[Path]) -> str:
    """SHA-256 of the concatenated files, in hexadecimal."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def is_library_card(text: str) -> bool:
    """Return True if a library generated a README.md, which may then be replaced."""
    return any(phrase in text for phrase in _LIBRARY_PHRASES)


def portable_adapter_config(config: Mapping[str, Any], base_model: str | None = None) -> dict[str, Any]:
    """Content of an `adapter_config.json` whose base is a Hub id.

    Args:
        base_model: the id, if the configuration names a local folder.

    Raises:
        ValueError: if neither the configuration nor `base_model` is a Hub id.
    """
    named = base_model or config.get("base_model_name_or_path")
    found = hub_id(named)
    if found is None:
        where = f"a folder of this computer: {named}" if named else "nothing"
        raise ValueError(
            f"the adapter's base is {where}. Others load it by its Hub id: push the base first, and give its id as "
            "base_model (--base-model)"
        )
    # `auto_mapping` names the module of the class on this computer; AutoModel does not need it.
    return {**config, "base_model_name_or_path": found, "auto_mapping": None}
