"""Read the reference ("golden") data; the README beside the data documents each file.

The folder is the one named by LLAVA_NEXT_AR_GOLDEN, by default tests/golden. Cases are discovered from the manifests:
names, sizes and numbers are not in the tests, so any folder of the same format serves.
"""

import json
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(os.environ.get("LLAVA_NEXT_AR_GOLDEN", Path(__file__).parent / "golden"))
MEDIA_PLACEHOLDER = -200  # IMAGE_TOKEN_INDEX of the original code


@dataclass(frozen=True)
class GoldenCase:
    """Case of a manifest; `case["key"]` reads its manifest entry.

    Attributes:
        group: name of the manifest, then the group of the case, if it has one: `layout_video/slowfast`.
        name: unique within the group.
        folder: of the files of the case.
        stem: tensors of the case are in `<stem>.safetensors`.
    """

    group: str
    name: str
    folder: Path = field(repr=False)
    stem: str = field(repr=False)
    entry: dict[str, Any] = field(repr=False, compare=False)

    def __getitem__(self, key: str) -> Any:
        return self.entry[key]

    def __contains__(self, key: str) -> bool:
        return key in self.entry

    def get(self, key: str, default: Any = None) -> Any:
        return self.entry.get(key, default)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a copy of a tensor of the case, so that tests do not share it."""
        return _tensors(self.folder / f"{self.stem}.safetensors")[name].clone()


@cache
def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


@cache
def golden_cases(manifest: str) -> tuple[GoldenCase, ...]:
    """Return all cases of a manifest, named by its path in the folder without `.json`: `pooling`, `e2e_grid/manifest`.

    Raises:
        FileNotFoundError: without the data; reference tests must not vanish with their data.
    """
    path = FOLDER / f"{manifest}.json"
    if not path.exists():
        raise FileNotFoundError(f"no reference data at {path}; set LLAVA_NEXT_AR_GOLDEN to their folder")
    content = json.loads(path.read_text())
    top = manifest.removesuffix("/manifest")
    stem = "io" if path.name == "manifest.json" else path.stem
    cases = []
    for key, entries in content.items():
        if not key.endswith("cases"):
            continue
        for entry in entries:
            # `pyav_cases` is a group of its own, just as `"group": "video"` inside a case is
            subgroup = entry.get("group") or key.removesuffix("cases").rstrip("_")
            group = f"{top}/{subgroup}" if subgroup else top
            cases.append(GoldenCase(group, entry.get("id") or entry["name"], path.parent, stem, entry))
    if not cases:
        raise ValueError(f"{path} has no cases")
    return tuple(cases)


def all_golden_cases() -> list[GoldenCase]:
    """Return the cases of every manifest in the folder."""
    manifests = sorted(FOLDER.glob("*.json")) + sorted(FOLDER.glob("*/manifest.json"))
    return [case for path in manifests for case in golden_cases(str(path.relative_to(FOLDER).with_suffix("")))]


def parametrize_golden(manifest: str, *groups: str):
    """Return `pytest.mark.parametrize("case", ...)` over the cases of a manifest, or over some of its groups."""
    wanted = [case for case in golden_cases(manifest) if not groups or case.group.partition("/")[2] in groups]
    return pytest.mark.parametrize("case", wanted, ids=[f"{case.group}/{case.name}" for case in wanted])


def pillow_tolerance() -> float:
    """Tolerance for pixels resized by Pillow: 0 with the release of the reference, else two grey levels of 255.

    Pillow 13 and Pillow 12 round some values of a resize differently, in both of its passes.
    """
    reference = json.loads((FOLDER / "preprocess.json").read_text())["pillow"]
    return 0.0 if reference.split(".")[0] == PIL.__version__.split(".")[0] else 2 * 2 / 255 + 1e-6
