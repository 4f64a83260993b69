"""Reads the reference ("golden") data; the README beside the data says what each file holds.

The folder is the one named by LLAVA_NEXT_AR_GOLDEN, by default tests/golden. Cases are discovered from the manifests:
nothing here or in the tests knows their names, sizes or number, so any folder of the same format will do.
"""

import json
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_next_ar.frame_token_layout import FrameTokenLayout

FOLDER = Path(os.environ.get("LLAVA_NEXT_AR_GOLDEN", Path(__file__).parent / "golden"))
MEDIA_PLACEHOLDER = -200  # IMAGE_TOKEN_INDEX of the original code


@dataclass(frozen=True)
class GoldenCase:
    """One case of a manifest; `case["key"]` reads its manifest entry.

    Attributes:
        group: the manifest's name, then the case's own group if it has one: `layout_video/slowfast`.
        name: unique within the group.
        folder: where the case's files are.
        stem: the tensors of the case lie in `<stem>.safetensors`.
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
        """A tensor of the case's file. A copy: a test that writes into it must not disturb another."""
        return _tensors(self.folder / f"{self.stem}.safetensors")[name].clone()


@cache
def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


@cache
def golden_cases(manifest: str) -> tuple[GoldenCase, ...]:
    """All cases of a manifest, named by its path in the folder without `.json`: `pooling`, `e2e_grid/manifest`.

    Raises:
        FileNotFoundError: if the data is not there; reference tests must not vanish with their data.
    """
    path = FOLDER / f"{manifest}.json"
    if not path.exists():
        raise FileNotFoundError(f"no reference data at {path}; set LLAVA_NEXT_AR_GOLDEN to the folder that holds it")
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
        raise ValueError(f"{path} holds no cases")
    return tuple(cases)


def all_golden_cases() -> list[GoldenCase]:
    """The cases of every manifest in the folder."""
    manifests = sorted(FOLDER.glob("*.json")) + sorted(FOLDER.glob("*/manifest.json"))
    return [case for path in manifests for case in golden_cases(str(path.relative_to(FOLDER).with_suffix("")))]


def parametrize_golden(manifest: str, *groups: str):
    """`pytest.mark.parametrize("case", ...)` over the cases of a manifest, or over some of its groups."""
    wanted = [case for case in golden_cases(manifest) if not groups or case.group.partition("/")[2] in groups]
    return pytest.mark.parametrize("case", wanted, ids=[f"{case.group}/{case.name}" for case in wanted])


def layout_from_original_config(config: dict[str, Any], patches_per_side: int, path: str) -> FrameTokenLayout:
    """The layout that the original project's configuration describes; missing keys take the original's defaults.

    Args:
        config: attributes of a LLaVA-NeXT configuration (`config.json` of an original checkpoint).
        patches_per_side: side of the vision tower's patch grid.
        path: `snapshot` is the published code as it stands, which pools by 2 whatever the configuration says and has
            no slow and fast frames; `encode_multimodals` the code behind LLaVA-Video, which follows the configuration.

    Raises:
        ValueError: if the original cannot run this configuration or does not know a value.
    """
    merge_type = config.get("mm_patch_merge_type", "flat")
    newline_position = config.get("mm_newline_position", "one_token")
    pool_stride = config.get("mm_spatial_pool_stride", 2) if path == "encode_multimodals" else 2
    add_faster_video = config.get("add_faster_video", False)
    if merge_type == "flat":
        newline_position = "no_token"
    elif not merge_type.startswith("spatial"):
        raise ValueError(f"mm_patch_merge_type must be 'flat' or begin with 'spatial', got {merge_type!r}")
    elif newline_position == "one_token" and "unpad" not in merge_type:
        newline_position = "no_token"  # `grid` and `frame` do not look at `unpad`
    if add_faster_video and newline_position == "grid" and (path == "snapshot" or pool_stride == 1):
        raise ValueError(f"add_faster_video=True cannot run on {path!r} with mm_spatial_pool_stride={pool_stride}")
    return FrameTokenLayout(
        patches_height=patches_per_side,
        patches_width=patches_per_side,
        pool_stride=pool_stride,
        pool_mode=config.get("mm_spatial_pool_mode", "bilinear"),
        newline_position=newline_position,
        add_faster_video=add_faster_video,
        faster_token_stride=config.get("faster_token_stride", 10),
    )
