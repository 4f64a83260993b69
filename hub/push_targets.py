# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Files that a push adds to a checkpoint, for services that run it.

An Inference Endpoint runs `handler.py` of a model repository and installs its `requirements.txt` first. Files of services lie
in the folder `serving/`. They are read from there as data: this folder imports none of them.
"""

import importlib.metadata
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo
from packaging.requirements import Requirement

DISTRIBUTION = "llava-next-ar"
SERVING = Path(__file__).resolve().parent.parent / "serving"
ENDPOINT_FILES = ("handler.py", "requirements.txt")
ENDPOINT_MARK = (
    "llava-next-ar push --endpoint"  # in each file of a push; files without it belong to the repository's owner
)


def version_ranges() -> dict[str, str]:
    """Name of each package that this one requires, for an extra too, -> the range of its versions, such as `>=1.26`."""
    ranges: dict[str, str] = {}
    for one in map(Requirement, importlib.metadata.requires(DISTRIBUTION) or ()):
        ranges[one.name] = ranges.get(one.name) or str(one.specifier)  # an extra may repeat a package without a range
    return ranges


def requirements(*extra_packages: str) -> list[str]:
    """Lines of a requirements.txt: the hard requirements of this package, with their minimum versions.

    Args:
        extra_packages: packages that this package requires for an extra only, such as peft.
    """
    found = map(Requirement, importlib.metadata.requires(DISTRIBUTION) or ())
    ranges = version_ranges()
    hard = [str(one) for one in found if "extra" not in str(one.marker or "")]
    return hard + [f"{name}{ranges[name]}" for name in extra_packages]


def endpoint_files(*extra_packages: str) -> dict[str, bytes]:
    """Name -> content of the files of an Inference Endpoint; see `requirements` for the argument."""
    lines = [f"# Requirements of handler.py, written by {ENDPOINT_MARK}", *requirements(*extra_packages)]
    handler = (SERVING / "endpoint" / "handler.py").read_bytes()
    return {"handler.py": handler, "requirements.txt": ("\n".join(lines) + "\n").encode()}


def read_endpoint_files(api: HfApi, repository: ModelInfo | None) -> dict[str, str]:
    """Name -> text of the files of a repository that have the names of `ENDPOINT_FILES`."""
    existing = {sibling.rfilename for sibling in (repository.siblings if repository else None) or ()}
    found = {}
    for name in sorted(existing & {*ENDPOINT_FILES}):
        path = api.hf_hub_download(repository.id, name, revision=repository.sha)
        found[name] = Path(path).read_text(encoding="utf-8", errors="replace")
    return found
