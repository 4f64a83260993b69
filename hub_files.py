# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Which files of a folder belong into a Hub repository, which old ones have to go, and the one commit that does both.

`model.push_to_hub`, `AutoregressiveTrainer` and `scripts/push_to_hub.py` all end in `commit_files`. The rule that it is
for: transformers loads `model.safetensors` before any shards, and an adapter before any model. So a push that leaves the
weights of an older one beside its own is a push that nobody ever loads.
"""

import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

logger = logging.get_logger(__name__)

MODEL_TAGS = ("custom_code", "llava", "next-frame-prediction", "video", "vision-language")

_SHARD = r"-\d{5}-of-\d{5}"
_MODEL_WEIGHTS = re.compile(rf"(model|pytorch_model)({_SHARD})?\.(safetensors|bin)(\.index\.json)?")
_ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"}
# Of a model, and beside an adapter in the way: transformers would take a downloaded folder for the base itself.
_MODEL_CONFIGS = {"config.json", "generation_config.json"}

# In the cards that transformers and peft write where there is none.
_LIBRARY_PHRASES = (
    "[More Information Needed]",
    "has been generated automatically",
    "has been automatically generated",
)

# What goes up beside weights and code. Everything else stays, whatever it is.
_CONFIGS = {
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
    *("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE"),
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
    (r".*\.py", "no module of the model's code"),
    (r".*\.safetensors(\.index\.json)?", "no part of the weights that are loaded"),
)
_RETRIED = (412, 429, 500, 502, 503, 504)  # 412: somebody else's commit came first


@dataclass(frozen=True)
class HubFolder:
    """What a folder holds for the Hub; made by `read_hub_folder`."""

    kind: Literal["model", "adapter"]
    files: dict[str, Path]
    """What goes up: path in the repository -> file."""
    left_out: dict[str, str]
    """What does not: path in the folder -> why."""


# ---- the folder -----------------------------------------------------------------------------------------------------


def read_hub_folder(folder: str | os.PathLike) -> HubFolder:
    """Sorts the files of a saved model or adapter into those of its repository and the rest.

    Raises:
        ValueError: if the folder is no complete checkpoint, naming everything that is missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    kind = "adapter" if (folder / "adapter_config.json").is_file() else "model"
    config = _read_json(folder / "config.json")
    if kind == "adapter" and any(_MODEL_WEIGHTS.fullmatch(path.name) for path in folder.iterdir()):
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
        wanted -= _MODEL_CONFIGS
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
        raise ValueError(f"{path} is no JSON: {error}") from error


def _needed_weights(folder: Path, kind: str) -> dict[str, str]:
    """Files of the weights that would be loaded, and what each is."""
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
    """Modules that a configuration's `auto_map` names, and all that they import relatively."""
    found: dict[str, str] = {}
    classes = _read_json(folder / source).get("auto_map", {}).values()
    waiting = [(name.split(".")[0] + ".py", source) for name in classes]
    while waiting:
        name, importer = waiting.pop()
        if name not in found:
            found[name] = f"imported by {importer}"
            code = (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else ""
            waiting += [
                (f"{module}.py", name) for module in re.findall(r"^\s*from \.(\w+) import", code, re.MULTILINE)
            ]
    return found


def _check_weights(folder: Path, names: list[str]) -> None:
    """Raises if a file of weights is cut off or something else than its name says."""
    for name in names:
        try:
            with safe_open(folder / name, framework="numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from error


def is_library_card(text: str) -> bool:
    """Whether a README.md was written by a library for want of another, so that nothing is lost with it."""
    return any(phrase in text for phrase in _LIBRARY_PHRASES)


# ---- what must go ---------------------------------------------------------------------------------------------------


def stale_files(existing: Iterable[str], uploaded: Iterable[str]) -> list[str]:
    """Of the files of a repository, those that would be loaded in the place of the uploaded ones, or confuse their loading.

    Nothing, if no weights are uploaded.
    """
    uploaded = set(uploaded)
    has_adapter = bool(uploaded & _ADAPTER_FILES)
    if not has_adapter and not any(map(_MODEL_WEIGHTS.fullmatch, uploaded)):
        return []
    in_the_way = _ADAPTER_FILES | (_MODEL_CONFIGS if has_adapter else set())
    return sorted(name for name in set(existing) - uploaded if _MODEL_WEIGHTS.fullmatch(name) or name in in_the_way)


def _weight_stats(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Name of each file of weights -> what changes when it is written again."""
    paths = {path.name: path.stat() for path in folder.glob("*") if _MODEL_WEIGHTS.fullmatch(path.name)}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in paths.items()}


@contextmanager
def _replacing_weights(folder: Path) -> Iterator[None]:
    """Deletes the model weights of an older save that those written in this context replace.

    Shards saved over a `model.safetensors` would leave that file behind, and it is the one that loads. An adapter stays:
    a local folder may hold a model and its adapter.
    """
    before = _weight_stats(folder)
    yield
    if (folder / "adapter_config.json").is_file():
        logger.warning(
            f"{folder} holds an adapter too, and from_pretrained loads that instead of the model saved now: delete "
            "adapter_config.json, or save to another folder"
        )
    after = _weight_stats(folder)
    for name in stale_files(after, [name for name in after if before.get(name) != after[name]]):
        logger.info(f"deleting {folder / name}, which this save replaces")
        (folder / name).unlink()


class PushableModel:
    """For a `PreTrainedModel`: saving and pushing leave no weights behind that would be loaded instead."""

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """As in transformers, but deletes the weights of an older save that these replace."""
        with _replacing_weights(Path(save_directory)) if is_main_process else nullcontext():
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def _upload_modified_files(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        files_timestamps: Mapping[str, float],
        commit_message: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """As in transformers, but the same commit deletes the weights of an older push that these replace."""
        times = {path: path.stat().st_mtime for path in Path(working_dir).iterdir() if path.is_file()}
        files = {path.name: path for path, time in times.items() if time > files_timestamps.get(path.name, -math.inf)}
        return commit_files(repo_id, files, commit_message=commit_message or "Upload model", **kwargs)


# ---- an adapter's base ----------------------------------------------------------------------------------------------


def hub_id(name_or_path: str | None) -> str | None:
    """The Hub id that a model was loaded by, also if by its folder in the Hub's cache; None for any other folder."""
    if not name_or_path:
        return None
    cached = re.search(r"(?:^|[/\\])models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$", name_or_path)
    if cached:
        return cached[1].replace("--", "/")
    if os.path.exists(name_or_path):
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path


def portable_adapter_config(config: Mapping[str, Any], base_model: str | None = None) -> dict[str, Any]:
    """An `adapter_config.json` whose base is a Hub id, by which others can load it.

    Args:
        base_model: the id, if the configuration names a local folder.

    Raises:
        ValueError: if there is no id, or `base_model` is none.
    """
    named = base_model or config.get("base_model_name_or_path")
    found = hub_id(named)
    if found is None:
        where = f"a folder of this computer: {named}" if named else "nothing"
        raise ValueError(
            f"the adapter's base is {where}. Others load it by its Hub id: push the base first, and give its id as "
            "base_model"
        )
    # `auto_mapping` names the module that the class had on this computer; AutoModel does not need it.
    return {**config, "base_model_name_or_path": found, "auto_mapping": None}


# ---- the commit -----------------------------------------------------------------------------------------------------


def commit_files(
    repo_id: str,
    files: Mapping[str, str | os.PathLike | bytes],
    *,
    commit_message: str,
    commit_description: str | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    replaced_folder: str | None = None,
    num_tries: int = 5,
) -> CommitInfo:
    """Uploads files and deletes what they replace, in a single commit: it is there as a whole, or not at all.

    Args:
        files: path in the repository -> file or content.
        revision: the branch, which is made if it does not exist; main if None.
        create_pr: open a pull request instead.
        replaced_folder: a folder of the repository of which nothing else is to stay.
        num_tries: how often the commit is tried, a second apart, then two, four and so on, while the server answers
            with an error of its own. A pull request is tried once: the first may have been opened without an answer.

    Raises:
        ValueError: if an adapter is to replace its own base, or its base is not on the Hub.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses.
    """
    if "adapter_config.json" in files:
        _check_base(HfApi(token=token), repo_id, files["adapter_config.json"])
    api = HfApi(token=token)
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)

    def commit() -> CommitInfo:
        repository = api.model_info(repo_id, revision=revision)
        existing = [sibling.rfilename for sibling in repository.siblings]
        stale = set(stale_files(existing, files))
        if replaced_folder is not None:
            stale |= {name for name in existing if name.startswith(f"{replaced_folder}/") and name not in files}
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=_file(file)) for name, file in files.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in sorted(stale)),
            ],
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=repository.sha,  # so that nothing that came since is overwritten, or left beside
        )

    for attempt in range(1, num_tries + 1):
        try:
            # Again from the start: if only the answer was lost, nothing is left to commit.
            return commit()
        except HfHubHTTPError as error:
            # Everything before the commit itself was tried several times by the client.
            is_commit = "/commit/" in str(error.response.url)
            if create_pr or not is_commit or error.response.status_code not in _RETRIED or attempt == num_tries:
                raise
            logger.warning(f"the commit to {repo_id} failed, trying it again: {error}")
            time.sleep(2 ** (attempt - 1))
    raise ValueError(f"num_tries is {num_tries}, expected at least 1")


def _file(file: str | os.PathLike | bytes) -> str | bytes:
    return file if isinstance(file, bytes) else os.fspath(file)


def _check_base(api: HfApi, repo_id: str, adapter_config: str | os.PathLike | bytes) -> None:
    content = adapter_config if isinstance(adapter_config, bytes) else Path(adapter_config).read_bytes()
    base = json.loads(content).get("base_model_name_or_path")
    if base == repo_id:
        raise ValueError(f"{repo_id} is the base of the adapter, which would replace it: push to another repository")
    if base is not None and (hub_id(base) != base or not api.repo_exists(base)):
        # A relative path looks like an id. Who owns that name on the Hub would run code wherever the adapter is loaded.
        raise ValueError(f"the adapter's base {base!r} is not on the Hub, or not to be seen with this token")
