"""Checkpoints whose configuration names custom classes, which the installed package lacks."""

import json
import os
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..hub.hub_code import AUTO_MAP
from ..hub.hub_folder import check_source

_FILES_WITH_CLASSES = ("config.json", "processor_config.json", "adapter_config.json")


def find_file(source: str, name: str, revision: str | None = None) -> str | None:
    """The path of a file of a checkpoint, downloaded if need be; None if the checkpoint has no such file.

    Args:
        source: folder or Hub id.
        revision: of the Hub id.

    Raises:
        OSError: if the Hub does not answer, and the cache holds neither the file nor a note of its absence.
        ValueError: if the source is neither a folder nor of the form of a Hub id.
    """
    check_source(source)
    if os.path.isdir(source):
        path = os.path.join(source, name)
        return path if os.path.isfile(path) else None
    try:
        return hf_hub_download(source, name, revision=revision)
    except LocalEntryNotFoundError as error:
        cached = try_to_load_from_cache(source, name, revision=revision)
        if cached is not None:  # a path, or the mark of a file that the Hub lacks
            return cached if isinstance(cached, str) else None
        raise OSError(
            f"{source} is not a folder here, and the Hub cannot be asked for its {name} now: {error}"
        ) from error
    except EntryNotFoundError:
        return None


def own_classes(source: str, revision: str | None = None) -> list[str]:
    """Returns the classes in a checkpoint's `auto_map`s that are not of this package, such as `my_head.MyModel`.

    For an adapter, those of its base are included.

    Raises:
        OSError: if the Hub does not answer, and none of a checkpoint's configurations is in the cache.
        ValueError: if a configuration is not valid JSON.
    """
    found: dict[str, None] = {}
    num_found, unknown = 0, None
    for name in _FILES_WITH_CLASSES:
        try:
            path = find_file(source, name, revision)
        except OSError as error:  # without network a model in the cache lacks optional files only
            unknown, path = error, None
        num_found += path is not None
        values = _read_json(path) if path is not None else {}
        classes = values.get("auto_map") or {}
        for reference in classes.values() if isinstance(classes, dict) else ():
            for class_name in reference if isinstance(reference, (list, tuple)) else [reference]:
                if isinstance(class_name, str) and class_name.rpartition("--")[2] not in AUTO_MAP.values():
                    found[class_name] = None
        base = values.get("base_model_name_or_path") if name == "adapter_config.json" else None
        if base and os.path.abspath(base) != os.path.abspath(source):
            found |= dict.fromkeys(own_classes(base))
    if unknown is not None and not num_found:
        raise unknown
    return list(found)


def check_own_code(source: str, trust_remote_code: bool, revision: str | None = None) -> None:
    """Raises ValueError if a checkpoint has classes of its own that would be ignored without `trust_remote_code`.

    Raises:
        OSError: as `find_file`.
    """
    if trust_remote_code:
        return
    classes = own_classes(source, revision)
    if classes:
        raise ValueError(
            f"{source} has code of its own ({', '.join(classes)}), which the installed package would run without: read it, "
            "and pass --trust_remote_code"
        )


def _read_json(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        try:
            values = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
    return values if isinstance(values, dict) else {}
