# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Number and order of the tokens of an image, for processor and model.

An image is encoded whole (the base view) and, at any resolution, in tiles besides: the image is fitted into the best of
`grid_pinpoints`, padded and cut. The patches of the tiles are put back together into one grid, the padding is cut off, the
grid is shrunk to a limit, and each row is closed by the learned `image_newline`.

transformers and the original LLaVA-NeXT project round the padding differently, which can move the cut by a row of
patches: see `unpadded_grid`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from transformers.image_processing_utils import select_best_resolution

UnpadRounding = Literal["round", "truncate"]
MAX_SIDE = 2**16  # pixels of an image that is made of tiles
_MERGE_FLAGS = ("unpad", "nobase", "maxpool2x2")


@dataclass(frozen=True, kw_only=True)
class ImageTokenLayout:
    """Mapping from the patches of an image to tokens. Frozen, validated at construction. All sizes are (height, width).

    Args:
        patches_height, patches_width: patch grid of the vision tower.
        tile_size: side of the tower's input in pixels.
        grid_pinpoints: the resolutions that an image may be fitted into.
        aspect_ratio: `anyres` for as many tokens as the tiles have patches, `anyres_max_N` for at most about those of
            N tiles; `pad` and `square` for images of one view, where five views mean 2x2 tiles.
        merge_type: LLaVA-NeXT's `mm_patch_merge_type`: `flat` for one view after another, or `spatial` for one grid,
            followed by `_unpad` (cut the padding, newlines), `_nobase` (no base view), `_maxpool2x2` (pool the grid).
        unpad_rounding: see `unpadded_grid`.

    Raises:
        ValueError: naming the value, under its name in a configuration, and the allowed ones.
    """

    patches_height: int
    patches_width: int
    tile_size: int
    grid_pinpoints: Sequence[Sequence[int]] = ()
    aspect_ratio: str = "anyres_max_9"
    merge_type: str = "spatial_unpad"
    unpad_rounding: UnpadRounding = "round"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"anyres(_max_[1-9]\d{0,5})?|pad|square", str(self.aspect_ratio)):
            raise ValueError(
                f"vision_aspect_ratio must be anyres, anyres_max_N, pad or square, got {self.aspect_ratio!r}"
            )
        order, *flags = str(self.merge_type).split("_")
        if self.merge_type != "flat" and (order != "spatial" or set(flags) - set(_MERGE_FLAGS)):
            raise ValueError(
                f"mm_patch_merge_type must be flat or spatial, with _{', _'.join(_MERGE_FLAGS)}, got "
                f"{self.merge_type!r}"
            )
        if not isinstance(self.grid_pinpoints, (list, tuple)):
            raise ValueError(f"image_grid_pinpoints must be a list of sizes, got {self.grid_pinpoints!r}")
        for size in self.grid_pinpoints:
            if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(_is_side(side) for side in size)):
                raise ValueError(
                    f"image_grid_pinpoints must hold pairs (height, width) of 1 to {MAX_SIDE} pixels, got {size!r}"
                )
        if self.unpad_rounding not in get_args(UnpadRounding):
            raise ValueError(
                f"unpad_rounding must be one of {', '.join(get_args(UnpadRounding))}, got {self.unpad_rounding!r}"
            )

    @property
    def is_anyres(self) -> bool:
        """True if the number of tiles depends on the size of the image."""
        return self.aspect_ratio.startswith("anyres")

    @property
    def num_base_tokens(self) -> int:
        """Tokens of an image of one view, as with several images in a prompt."""
        return self.patches_height * self.patches_width + ("unpad" in self.merge_type)

    def tiles(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tiles of an image of this size.

        Raises:
            ValueError: if the image would be fitted into less than one tile.
        """
        if not self.is_anyres:
            return 2, 2
        height, width = select_best_resolution(list(image_size), self.grid_pinpoints)
        if min(height, width) < self.tile_size:
            raise ValueError(
                f"image_grid_pinpoints holds {[height, width]}, which is less than one tile of {self.tile_size} pixels "
                "(image_size in the model; size, height and width, in the image processor)"
            )
        return height // self.tile_size, width // self.tile_size

    def num_tokens(self, image_size: Sequence[int]) -> int:
        """Number of tokens of a tiled image in the sequence."""
        rows, columns = self.tiles(image_size)
        base = self.patches_height * self.patches_width
        if self.merge_type == "flat":
            return (1 + rows * columns) * base
        height, width = self._shown_grid(image_size)
        if self._has_row_newlines:
            width += 1
        return height * width + (0 if "nobase" in self.merge_type else base)

    @property
    def _has_row_newlines(self) -> bool:
        return "unpad" in self.merge_type and "maxpool2x2" not in self.merge_type

    def _merged_grid(self, image_size: Sequence[int]) -> tuple[int, int]:
        rows, columns = self.tiles(image_size)
        return rows * self.patches_height, columns * self.patches_width

    def _shown_grid(self, image_size: Sequence[int]) -> tuple[int, int]:
        """The grid of all tiles together, as the language model reads it."""
        height, width = self._merged_grid(image_size)
        if "maxpool2x2" in self.merge_type:
            return height // 2, width // 2
        if "unpad" not in self.merge_type:
            return height, width
        height, width = unpadded_grid((height, width), image_size, self.unpad_rounding)
        if self.aspect_ratio.startswith("anyres_max_"):
            max_tiles = int(self.aspect_ratio.removeprefix("anyres_max_"))
            excess = math.sqrt(height * width / (max_tiles * self.patches_height**2))
            if excess > 1.1:
                height, width = int(height // excess), int(width // excess)
        return height, width

    def assemble(
        self, features: torch.Tensor, image_size: Sequence[int], image_newline: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Puts the projected features of one image in sequence order.

        Args:
            features: `[C, P, D]`, the base view first, then the tiles row by row; C is 1 for an image of one view.
            image_size: of the image before it was fitted and padded.
            image_newline: learned `[D]` vector, needed with `unpad`.

        Returns:
            `[L, D]`, with `L = num_tokens(image_size)`, or `num_base_tokens` for one view.

        Raises:
            ValueError: if the views are not those of an image of this size, or `image_newline` is missing.
        """
        if features.shape[1] != self.patches_height * self.patches_width:
            raise ValueError(
                f"a view has {features.shape[1]} features, but {self.patches_height}x{self.patches_width} patches"
            )
        if "unpad" in self.merge_type and image_newline is None:
            raise ValueError(f"merge_type={self.merge_type!r} needs `image_newline`, which is missing")
        if self.merge_type == "flat":
            return features.flatten(0, 1)
        if len(features) == 1:
            (base,) = features
            return torch.cat([base, image_newline[None].to(base)]) if "unpad" in self.merge_type else base

        rows, columns = self.tiles(image_size)
        if rows * columns != len(features) - 1:
            raise ValueError(
                f"an image of {tuple(image_size)} has {rows}x{columns} tiles, got features of {len(features) - 1}"
            )
        tiles = features[1:].unflatten(0, (rows, columns)).unflatten(2, (self.patches_height, self.patches_width))
        merged = tiles.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)  # [R, C, h, w, D] -> [D, R*h, C*w]
        if "maxpool2x2" in self.merge_type:
            merged = nn.functional.max_pool2d(merged, 2)
        elif "unpad" in self.merge_type:
            merged = self._cut_and_shrink(merged, image_size)
            newlines = image_newline[:, None, None].expand(*merged.shape[:2], 1).to(merged)
            merged = torch.cat([merged, newlines], dim=2)
        tokens = merged.flatten(1).transpose(0, 1)
        return tokens if "nobase" in self.merge_type else torch.cat([features[0], tokens])

    def _cut_and_shrink(self, merged: torch.Tensor, image_size: Sequence[int]) -> torch.Tensor:
        """Cuts the padding off `[D, H, W]`, and resizes to the grid `[D, h, w]` of the language model."""
        height, width = unpadded_grid(merged.shape[1:], image_size, self.unpad_rounding)
        top, left = (merged.shape[1] - height) // 2, (merged.shape[2] - width) // 2
        merged = merged[:, top : top + height, left : left + width]
        shown = self._shown_grid(image_size)
        if shown != (height, width):
            merged = nn.functional.interpolate(merged[None], shown, mode="bilinear")[0]
        return merged


def unpadded_grid(grid: Sequence[int], image_size: Sequence[int], rounding: UnpadRounding) -> tuple[int, int]:
    """Size of the part of a padded grid that shows the image; equally much is cut on both sides.

    The scaled side of the image is often an integer but for a rounding error: 47 * (12 / 188) is 3 or 2.9999999999999996,
    depending on the order of operations. transformers rounds to 7 digits before it truncates (`round`), the original project
    does not (`truncate`). Weights need the rounding that they were trained with.

    Args:
        grid: (h, w) in patches, padding included.
        image_size: (height, width) of the image in pixels.
        rounding: `round` or `truncate`.
    """
    height, width = grid
    image_height, image_width = image_size
    digits = 7 if rounding == "round" else None

    def truncated(value: float) -> int:
        return int(value if digits is None else round(value, digits))

    if image_width / image_height > width / height:
        padding = (height - truncated(image_height * (width / image_width))) // 2
        return height - 2 * padding, width
    padding = (width - truncated(image_width * (height / image_height))) // 2
    return height, width - 2 * padding


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIDE
