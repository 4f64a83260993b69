# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Complete saves and pushes: code beside each part of a model, without files of an older save that would be loaded instead.

`travels_with_code` wraps the saves of the configuration, the model and the processors. Each push ends in `commit_files`.
transformers loads `model.safetensors` before any shards, and an adapter before any model. Weights of an older push are
therefore deleted: beside them, the new weights would never be loaded.
"""

import functools
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from .hub_code import MODEL_AUTO_CLASSES, class_reference, code_files, modules_imported_by, write_code

logger = logging.get_logger(__name__)

Saved = TypeVar("Saved", bound=type)

MODEL_TAGS = ("custom_code", "llava", "next-frame-prediction", "video", "vision-language")

_SHARD = r"-\d{5}-of-\d{5}"
MODEL_WEIGHTS = re.compile(rf"(model|pytorch_model)({_SHARD})?\.(safetensors|bin)(\.index\.json)?")
_ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"}
# Files of a model. Beside an adapter, transformers would load the downloaded folder as the base model.
MODEL_CONFIGS = {"config.json", "generation_config.json"}
_CODE = "hub_code.py"
_RETRIED = (412, 429, 500, 502, 503, 504)  # 412: another commit came first


# ---- code ------------------------------------------------------------------------------------------------------------

_hiding = threading.RLock()


def travels_with_code(saved_class: Saved) -> Saved:
    """Class decorator that adds all code and the full `auto_map` to each save and push of the class and its subclasses.

    The class has a method `check()`. It raises ValueError for an object that could not be loaded again; nothing is written
    then. The decorator adds a method `save_code(folder)`, for saves without `save_pretrained`, such as those of an adapter.

    The module of the class, and of each subclass, becomes an attribute of its package, as after an import. transformers
    executes the file of a remote class without this step. `dill` then pickles the module by its content: `datasets.map` with
    several processes fails, and the hash of a function with a processor differs in each run.
    """
    save, timestamps = saved_class.save_pretrained, saved_class._get_files_timestamps

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        # Hidden: the object is saved as a part of another one, which has written the code.
        is_part = type(self)._auto_class is None
        if is_part or not kwargs.get("is_main_process", True):
            return save(self, save_directory, *args, **kwargs)
        self.check()
        parts = _parts_with_code(self)
        for part in parts:
            auto_map = getattr(part, "config", part).auto_map
            auto_class = type(part)._auto_class
            names = MODEL_AUTO_CLASSES if auto_class in MODEL_AUTO_CLASSES else (auto_class,)
            auto_map.update(dict.fromkeys(names, class_reference(type(part))))
        save_code(self, save_directory)
        with _hidden_auto_classes({type(part) for part in parts}):
            return save(self, save_directory, *args, **kwargs)

    def save_code(self: Any, folder: str | os.PathLike) -> None:
        """Write the code of the class, with the file of a subclass; see `hub_code.code_files`."""
        write_code(Path(folder), *(type(part) for part in _parts_with_code(self)))

    def _get_files_timestamps(self: Any, working_dir: str | os.PathLike) -> dict[str, float]:
        # transformers reads these before a save and pushes newer files. Code that existed before the save is pushed too.
        code = code_files(*(type(part) for part in _parts_with_code(self)))
        return {name: time for name, time in timestamps(self, working_dir).items() if name not in code}

    def __init_subclass__(cls: type, **kwargs: Any) -> None:
        super(saved_class, cls).__init_subclass__(**kwargs)
        _set_on_package(cls)

    saved_class.save_pretrained, saved_class.save_code = save_pretrained, save_code
    saved_class._get_files_timestamps = _get_files_timestamps
    saved_class.__init_subclass__ = classmethod(__init_subclass__)
    _set_on_package(saved_class)
    return saved_class


def _set_on_package(saved_class: type) -> None:
    package, _, name = saved_class.__module__.rpartition(".")
    if package in sys.modules and saved_class.__module__ in sys.modules:
        setattr(sys.modules[package], name, sys.modules[saved_class.__module__])


def _parts_with_code(saved: Any) -> list[Any]:
    """The object and its parts with code: a model's configuration, a processor's video processor."""
    return [saved, *(part for part in vars(saved).values() if hasattr(type(part), "save_code"))]


@contextmanager
def _hidden_auto_classes(classes: Iterable[type]) -> Iterator[None]:
    """Keep transformers from copying the code: its own copy supports flat files only.

    At all other times `_auto_class` is set, since it marks a loaded class as remote code.
    """
    with _hiding:
        before = {saved_class: saved_class._auto_class for saved_class in classes}
        for saved_class in before:
            saved_class._auto_class = None
        try:
            yield
        finally:
            for saved_class, auto_class in before.items():
                saved_class._auto_class = auto_class


# ---- files to delete -------------------------------------------------------------------------------------------------


def stale_files(existing: Iterable[str], uploaded: Iterable[str]) -> list[str]:
    """Files of a repository that would be loaded instead of the uploaded ones, or break their loading.

    The list is empty if no weights are uploaded.
    """
    uploaded = set(uploaded)
    has_adapter = bool(uploaded & _ADAPTER_FILES)
    if not has_adapter and not any(map(MODEL_WEIGHTS.fullmatch, uploaded)):
        return []
    in_the_way = _ADAPTER_FILES | (MODEL_CONFIGS if has_adapter else set())
    return sorted(name for name in set(existing) - uploaded if MODEL_WEIGHTS.fullmatch(name) or name in in_the_way)


def _weight_stats(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Name of each file of weights -> inode, time and size, which a new write changes."""
    paths = {path.name: path.stat() for path in folder.glob("*") if MODEL_WEIGHTS.fullmatch(path.name)}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in paths.items()}


@contextmanager
def _replacing_weights(folder: Path) -> Iterator[None]:
    """Delete the model weights of an older save that the weights written in this context replace.

    Shards saved over a `model.safetensors` would leave that file, which transformers loads first. An adapter stays: a local
    folder may hold a model and its adapter.
    """
    before = _weight_stats(folder)
    yield
    after = _weight_stats(folder)
    written = [name for name in after if before.get(name) != after[name]]
    if written and (folder / "adapter_config.json").is_file():
        logger.warning(
            f"{folder} holds an adapter too, which from_pretrained loads instead of the model saved now: delete "
            "adapter_config.json, or save to another folder"
        )
    for name in stale_files(after, written):
        logger.info(f"deleting {folder / name}, which this save replaces")
        (folder / name).unlink()


class PushableModel:
    """Mixin of a `PreTrainedModel` whose saves and pushes delete the weights that they replace."""

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """As in transformers, and delete the weights of an older save that these replace."""
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
        """As in transformers, and delete the replaced weights of an older push in the same commit."""
        times = {path: path.stat().st_mtime for path in Path(working_dir).iterdir() if path.is_file()}
        files = {path.name: path for path, time in times.items() if time > files_timestamps.get(path.name, -math.inf)}
        return commit_files(repo_id, files, commit_message=commit_message or "Upload model", **kwargs)


def hub_id(name_or_path: str | None) -> str | None:
    """Hub id of a model, also of its folder in the Hub's cache; None for any other folder."""
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
    """Upload files and delete the files that they replace, in a single commit.

    Args:
        files: path in the repository -> file or content.
        revision: the branch, which is made if it does not exist; main if None.
        create_pr: open a pull request instead.
        replaced_folder: a folder of the repository; its other files are deleted.
        num_tries: attempts at the commit, 1, 2, 4, ... seconds apart, while the server answers with an error of its own. A
            pull request is tried once, since the first attempt may have opened it without an answer.

    Raises:
        ValueError: if an adapter is to replace its own base, or its base is not on the Hub.
        huggingface_hub.errors.HfHubHTTPError: if the Hub rejects the commit.
    """
    if "adapter_config.json" in files:
        _check_base(HfApi(token=token), repo_id, files["adapter_config.json"])
    api = HfApi(token=token)
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)

    def commit() -> CommitInfo:
        repository = api.model_info(repo_id, revision=revision)
        existing = [sibling.rfilename for sibling in repository.siblings]
        stale = set(replaced_files(api, repository, files))
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
            parent_commit=repository.sha,  # a commit made since is neither overwritten nor left beside
        )

    for attempt in range(1, num_tries + 1):
        try:
            # From the start: if only the answer was lost, no change is left to commit.
            return commit()
        except HfHubHTTPError as error:
            # The client retries all requests before the commit.
            is_commit = "/commit/" in str(error.response.url)
            if create_pr or not is_commit or error.response.status_code not in _RETRIED or attempt == num_tries:
                raise
            logger.warning(f"the commit to {repo_id} failed, trying it again: {error}")
            time.sleep(2 ** (attempt - 1))
    raise ValueError(f"num_tries is {num_tries}, expected at least 1")


def replaced_files(api: HfApi, repository: ModelInfo, files: Iterable[str]) -> list[str]:
    """Files that a push of `files` deletes: weights that would be loaded instead, and code that no longer travels."""
    existing = [sibling.rfilename for sibling in repository.siblings]
    return sorted({*stale_files(existing, files), *_stale_code(api, repository, files)})


def _stale_code(api: HfApi, repository: ModelInfo, files: Iterable[str]) -> list[str]:
    """Modules of an older push of this package that no longer travel, without files of the repository's owner."""
    existing = {sibling.rfilename for sibling in repository.siblings}
    if _CODE not in files or not {name for name in existing - {*files} if name.endswith(".py")}:
        return []
    found, waiting = set(), [_CODE]
    while waiting:
        name = waiting.pop()
        if name in existing and name not in found:
            found.add(name)
            path = api.hf_hub_download(repository.id, name, revision=repository.sha)
            waiting += [f"{module}.py" for module in modules_imported_by(Path(path).read_text(encoding="utf-8"))]
    return sorted(found - {*files})


def _file(file: str | os.PathLike | bytes) -> str | bytes:
    return file if isinstance(file, bytes) else os.fspath(file)


def _check_base(api: HfApi, repo_id: str, adapter_config: str | os.PathLike | bytes) -> None:
    content = adapter_config if isinstance(adapter_config, bytes) else Path(adapter_config).read_bytes()
    base = json.loads(content).get("base_model_name_or_path")
    if base == repo_id:
        raise ValueError(f"{repo_id} is the base of the adapter, which would replace it: push to another repository")
    if base is not None and (hub_id(base) != base or not api.repo_exists(base)):
        # A relative path has the form of an id. The owner of that id could run code wherever the adapter is loaded.
        raise ValueError(f"the adapter's base {base!r} is not on the Hub, or this token cannot read it")
