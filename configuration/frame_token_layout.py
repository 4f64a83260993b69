# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Which token of the sequence is which patch of which frame.

`FrameTokenLayout` is the single place that knows how a video becomes tokens. Three parties ask it and therefore cannot
disagree: the processor (how many placeholders to write), the model (how to assemble projected features) and the
reconstruction head (which hidden state belongs to which patch of which frame). The layouts are those of LLaVA-NeXT
(https://github.com/LLaVA-VL/LLaVA-NeXT, `llava/model/llava_arch.py`).

Shape letters: T frames, P = patches_height * patches_width patches of the vision tower in row-major order, D features,
h x w the grid of a pooled frame, L tokens of one video.
"""

import math
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import nn

PoolMode = Literal["average", "max", "bilinear"]
NewlinePosition = Literal["one_token", "grid", "frame", "no_token"]


class FrameType(IntEnum):
    """Slow frames keep the resolution of `pool_stride`; fast frames are pooled twice as coarsely."""

    SLOW = 0
    FAST = 1


class TokenKind(IntEnum):
    """What a token of a video stands for."""

    PATCH = 0
    NEWLINE = 1
    FASTER = 2


def pooled_grid(grid: tuple[int, int], stride: int, mode: PoolMode) -> tuple[int, int]:
    """Grid (h, w) after pooling: average and max floor, bilinear ceils, as in LLaVA-NeXT's `get_2dPool`."""
    height, width = grid
    if mode == "bilinear":
        return math.ceil(height / stride), math.ceil(width / stride)
    return height // stride, width // stride


def pool_patches(features: torch.Tensor, grid: tuple[int, int], stride: int, mode: PoolMode) -> torch.Tensor:
    """Pools row-major patch features over space, as LLaVA-NeXT's `get_2dPool` does.

    Args:
        features: `[T, P, D]` with `P = grid[0] * grid[1]`.
        grid: `(height, width)` of the patches.
        stride: pooling stride in patches; 1 returns `features` itself.
        mode: `average | max` (window = stride, no padding, the remainder is dropped) or `bilinear` (no antialias).

    Returns:
        `[T, h * w, D]`.

    Raises:
        ValueError: if `P` is not the size of the grid, the mode is unknown, or nothing would be left.
    """
    num_frames, num_patches, dim = features.shape
    height, width = grid
    if num_patches != height * width:
        raise ValueError(
            f"features hold {num_patches} patches a frame, but the grid {height}x{width} has {height * width}"
        )
    if mode not in get_args(PoolMode):
        raise ValueError(f"pool mode {mode!r} is not one of {', '.join(get_args(PoolMode))}")
    if stride < 1:
        raise ValueError(f"pool stride must be at least 1, got {stride}")
    if stride == 1:
        return features
    target = pooled_grid(grid, stride, mode)
    if 0 in target:
        raise ValueError(f"pooling a {height}x{width} grid by stride {stride} ({mode}) leaves no patch")
    features = features.reshape(num_frames, height, width, dim).permute(0, 3, 1, 2).contiguous()  # [T, D, H, W]
    if mode == "average":
        features = nn.functional.avg_pool2d(features, stride)
    elif mode == "max":
        features = nn.functional.max_pool2d(features, stride)
    else:
        features = nn.functional.interpolate(features, size=list(target), mode="bilinear")
    return features.permute(0, 2, 3, 1).reshape(num_frames, target[0] * target[1], dim)


@lru_cache(maxsize=16)
def _unpooling(grid: tuple[int, int], stride: int, mode: PoolMode) -> torch.Tensor:
    """`[P, h * w]` float32: gives the value of a pooled patch to the patches that it stands for, and pooling gives it back."""
    with torch.inference_mode(False), torch.device("cpu"):  # as in `_video_tokens`
        target = pooled_grid(grid, stride, mode)
        owners = []  # of the rows and of the columns
        for side, pooled in zip(grid, target, strict=True):
            places = torch.arange(side)
            # Windows are as large as the stride, and the remainder, which pooling drops, goes with the last of them.
            window = (places // stride).clamp(max=pooled - 1)
            owners.append(places * pooled // side if mode == "bilinear" else window)
        owner = (owners[0][:, None] * target[1] + owners[1]).flatten()  # [P]
        spread = nn.functional.one_hot(owner, target[0] * target[1]).double()
        if mode == "bilinear":
            # Where the stride does not divide the grid, it reads across owners: the least change that makes up for that.
            pooling = pool_patches(torch.eye(len(owner)).double()[None], grid, stride, mode)[0]  # [h * w, P]
            missing = torch.eye(len(pooling)) - pooling @ spread
            if missing.abs().max() > 1e-6:
                spread += torch.linalg.pinv(pooling) @ missing
        return spread.float()


@dataclass(frozen=True, eq=False)
class VideoTokens:
    """The tokens of one video, in sequence order. Built by `FrameTokenLayout.video`.

    Attributes:
        kind: `[L]` int64, a `TokenKind` each.
        frame: `[L]` int64, the frame a token belongs to; -1 for the one newline that closes a whole video.
        row, column: `[L]` int64, place in the frame's pooled grid; -1 where the token is no patch (a row's newline
            keeps its row).
        frame_types: a `FrameType` for each frame.
        frame_grids: pooled `(h, w)` of each frame.
    """

    kind: torch.Tensor
    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    frame_types: tuple[FrameType, ...]
    frame_grids: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return self.kind.shape[0]

    def __repr__(self) -> str:
        return f"VideoTokens(num_tokens={len(self)}, num_frames={len(self.frame_types)})"

    @property
    def patch_offsets(self) -> torch.Tensor:
        """`[num_patches]` int64: offsets of the patch tokens in the video, by frame, row and column."""
        return (self.kind == TokenKind.PATCH).nonzero().squeeze(1)

    def token_of(self, frame: int, row: int, column: int) -> int:
        """Offset in the video of one patch; the inverse of `(frame, row, column)[offset]`.

        Raises:
            IndexError: if the frame or its grid has no such patch.
        """
        if not 0 <= frame < len(self.frame_grids):
            raise IndexError(f"frame {frame} is not one of the {len(self.frame_grids)} frames")
        height, width = self.frame_grids[frame]
        if not (0 <= row < height and 0 <= column < width):
            raise IndexError(f"patch ({row}, {column}) is outside the {height}x{width} grid of frame {frame}")
        matches = (self.frame == frame) & (self.row == row) & (self.column == column)
        return int(matches.nonzero().item())


@dataclass(frozen=True, kw_only=True)
class FrameTokenLayout:
    """How the frames of a video are laid out as tokens. Frozen, hashable, validated at construction.

    Args:
        patches_height, patches_width: patch grid of the vision tower.
        pool_stride: spatial pooling of a (slow) frame.
        pool_mode: `average | max | bilinear`.
        newline_position: where the learned `image_newline` goes: `one_token` once at the end of the video, `grid`
            after every row, `frame` after every frame, `no_token` nowhere.
        add_faster_video: slow and fast frames (SlowFast of LLaVA-Video). Fast frames are pooled by twice the stride
            and every frame is closed by the learned `faster_token`. As in LLaVA-NeXT it takes effect with `grid` only.
        faster_token_stride: frame t is slow if `t % faster_token_stride == 0`, unless types are given explicitly.

    Raises:
        ValueError: naming the value and what is allowed.
    """

    patches_height: int
    patches_width: int
    pool_stride: int = 2
    pool_mode: PoolMode = "bilinear"
    newline_position: NewlinePosition = "one_token"
    add_faster_video: bool = False
    faster_token_stride: int = 10

    def __post_init__(self) -> None:
        for name in ("patches_height", "patches_width", "pool_stride", "faster_token_stride"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise ValueError(f"{name} must be an integer of at least 1 (and below 2^31), got {value!r}")
        if not isinstance(self.add_faster_video, bool):
            raise ValueError(f"add_faster_video must be True or False, got {self.add_faster_video!r}")
        for name, allowed in (("pool_mode", get_args(PoolMode)), ("newline_position", get_args(NewlinePosition))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for frame_type in FrameType:
            if (frame_type is FrameType.SLOW or self.is_slow_fast) and 0 in self.frame_grid(frame_type):
                raise ValueError(
                    f"pool_stride={self.pool_stride} ({self.pool_mode}) leaves no patch of a "
                    f"{frame_type.name.lower()} frame with {self.patches_height}x{self.patches_width} patches"
                )

    @classmethod
    def for_vision_config(cls, vision_config: Any, **keys: Any) -> "FrameTokenLayout":
        """The layout over the patch grid of a vision tower (`image_size`, `patch_size`); `keys` as in the class."""
        side = vision_config.image_size // vision_config.patch_size
        return cls(patches_height=side, patches_width=side, **keys)

    @property
    def is_slow_fast(self) -> bool:
        """Whether frames differ in resolution: as in LLaVA-NeXT, `add_faster_video` is ignored outside of `grid`."""
        return self.add_faster_video and self.newline_position == "grid"

    def frame_types(
        self, num_frames: int, explicit: "torch.Tensor | list[int] | None" = None, *, first_frame: int = 0
    ) -> tuple[FrameType, ...]:
        """The type of each frame; `explicit` (slow 0, fast 1) wins over `faster_token_stride`.

        Without slow and fast frames in the layout every frame is pooled alike, whatever `explicit` says. Frames that
        continue a video are counted from `first_frame`.

        Raises:
            ValueError: if there is no frame, or `explicit` has another length or an unknown value.
        """
        if num_frames < 1:
            raise ValueError(f"a video needs at least one frame, got {num_frames}")
        if explicit is not None:
            explicit = [int(frame_type) for frame_type in explicit]
            if len(explicit) != num_frames:
                raise ValueError(f"{len(explicit)} frame types were given for {num_frames} frames")
            if set(explicit) - set(FrameType):
                raise ValueError(f"frame types must be 0 (slow) or 1 (fast), got {explicit}")
        if not self.is_slow_fast:
            return (FrameType.SLOW,) * num_frames
        if explicit is not None:
            return tuple(FrameType(frame_type) for frame_type in explicit)
        return tuple(
            FrameType.SLOW if frame % self.faster_token_stride == 0 else FrameType.FAST
            for frame in range(first_frame, first_frame + num_frames)
        )

    def _stride(self, frame_type: FrameType) -> int:
        return self.pool_stride * (2 if frame_type is FrameType.FAST else 1)

    def frame_grid(self, frame_type: FrameType = FrameType.SLOW) -> tuple[int, int]:
        """Pooled grid (h, w) of a frame."""
        return pooled_grid((self.patches_height, self.patches_width), self._stride(frame_type), self.pool_mode)

    def video(self, num_frames: int, frame_types: "torch.Tensor | list[int] | None" = None) -> VideoTokens:
        """The token map of a video of `num_frames` frames."""
        return _video_tokens(self, self.frame_types(num_frames, frame_types))

    def num_tokens(self, num_frames: int, frame_types: "torch.Tensor | list[int] | None" = None) -> int:
        """Tokens a video takes in the sequence, known before any model runs."""
        return len(self.video(num_frames, frame_types))

    def tokens_per_frame(self, frame_type: FrameType = FrameType.SLOW) -> int:
        """Tokens that one more frame of this type costs, its newline and faster tokens included."""
        height, width = self.frame_grid(frame_type)
        newlines = {"grid": height, "frame": 1}.get(self.newline_position, 0)
        return height * width + newlines + int(self.is_slow_fast)

    def pool(self, features: torch.Tensor, frame_type: FrameType = FrameType.SLOW) -> torch.Tensor:
        """Pools `[T, P, D]` as frames of this type are pooled, to `[T, h * w, D]`."""
        return pool_patches(
            features, (self.patches_height, self.patches_width), self._stride(frame_type), self.pool_mode
        )

    def unpool(self, pooled: torch.Tensor, frame_type: FrameType = FrameType.SLOW) -> torch.Tensor:
        """Spreads `[h * w, D]` over all patches, to `[P, D]`.

        Added to the features of a frame, it adds `pooled` to what `pool` makes of them: in all modes, and also where the
        stride does not divide the grid.
        """
        stride = self._stride(frame_type)
        if stride == 1:
            return pooled
        matrix = _unpooling((self.patches_height, self.patches_width), stride, self.pool_mode)
        return matrix.to(pooled) @ pooled

    def pool_frames(
        self, features: torch.Tensor, frame_types: "tuple[FrameType, ...] | list[int]"
    ) -> list[torch.Tensor]:
        """Pools each frame of `[T, P, D]` by its own type: a list of T tensors `[h * w, D]`.

        Raises:
            ValueError: if there is not one type for each frame.
        """
        frame_types = [FrameType(int(frame_type)) for frame_type in frame_types]
        if len(frame_types) != features.shape[0]:
            raise ValueError(f"{len(frame_types)} frame types were given for {features.shape[0]} frames")
        pooled: list[torch.Tensor] = [features[0]] * len(frame_types)
        for frame_type in set(frame_types):
            members = [frame for frame, other in enumerate(frame_types) if other is frame_type]
            # The common case, all frames alike, must not copy the features.
            selected = features if len(members) == len(frame_types) else features[members]
            for frame, value in zip(members, self.pool(selected, frame_type), strict=True):
                pooled[frame] = value
        return pooled

    def assemble(
        self,
        features: torch.Tensor,
        image_newline: torch.Tensor | None = None,
        faster_token: torch.Tensor | None = None,
        frame_types: "torch.Tensor | list[int] | None" = None,
    ) -> torch.Tensor:
        """Puts the projected features of one video in sequence order.

        Args:
            features: `[T, P, D]`, unpooled, after the projector.
            image_newline, faster_token: learned `[D]` vectors, needed where the layout uses them.
            frame_types: explicit types (slow 0, fast 1) of the frames.

        Returns:
            `[L, D]` with `L = num_tokens(T, frame_types)`.

        Raises:
            ValueError: if the layout needs a learned token that is not given.
        """
        tokens = self.video(features.shape[0], frame_types)
        out = features.new_empty(len(tokens), features.shape[-1])
        kind = tokens.kind.to(features.device)
        out[kind == TokenKind.PATCH] = torch.cat(self.pool_frames(features, tokens.frame_types))
        for token_kind, name, vector in (
            (TokenKind.NEWLINE, "image_newline", image_newline),
            (TokenKind.FASTER, "faster_token", faster_token),
        ):
            if (tokens.kind == token_kind).any():
                if vector is None:
                    raise ValueError(
                        f"newline_position={self.newline_position!r}, add_faster_video={self.add_faster_video} needs "
                        f"`{name}`, which is missing"
                    )
                out[kind == token_kind] = vector.to(out)
        return out

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FrameTokenLayout":
        """The inverse of `to_dict`.

        Raises:
            ValueError: on an unknown key.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown layout keys {sorted(unknown)}; known: {[field.name for field in fields(cls)]}")
        return cls(**values)

    def as_tensor(self) -> torch.Tensor:
        """`[7]` int64: the layout as numbers, so that it can travel with a batch from processor to model."""
        values = self.to_dict()
        values["pool_mode"] = get_args(PoolMode).index(self.pool_mode)
        values["newline_position"] = get_args(NewlinePosition).index(self.newline_position)
        return torch.tensor([int(value) for value in values.values()])

    @classmethod
    def from_tensor(cls, values: torch.Tensor) -> "FrameTokenLayout":
        """The inverse of `as_tensor`."""
        named = dict(zip([field.name for field in fields(cls)], values.tolist(), strict=True))
        named["pool_mode"] = get_args(PoolMode)[named["pool_mode"]]
        named["newline_position"] = get_args(NewlinePosition)[named["newline_position"]]
        named["add_faster_video"] = bool(named["add_faster_video"])
        return cls(**named)

    def check_same(self, other: "FrameTokenLayout", mine: str = "the model", theirs: str = "the processor") -> None:
        """Refuses another layout.

        Raises:
            ValueError: naming every key that differs and both values.
        """
        other_values = other.to_dict()
        different = [
            f"{name}: {value!r} in {mine}, {other_values[name]!r} in {theirs}"
            for name, value in self.to_dict().items()
            if value != other_values[name]
        ]
        if different:
            raise ValueError(f"{mine} and {theirs} lay out video tokens differently ({'; '.join(different)})")


@lru_cache(maxsize=128)  # about 1 MB each for a long video
def _video_tokens(layout: FrameTokenLayout, frame_types: tuple[FrameType, ...]) -> VideoTokens:
    # The cache outlives the caller's context: tensors made in inference mode could not be used in training later,
    # those made while a model is built on the meta device would hold no values.
    with torch.inference_mode(False), torch.device("cpu"):
        return _build_video_tokens(layout, frame_types)


def _build_video_tokens(layout: FrameTokenLayout, frame_types: tuple[FrameType, ...]) -> VideoTokens:
    entries: list[torch.Tensor] = []  # [tokens of a frame, 4]: kind, frame, row, column
    frame_grids = []
    for frame, frame_type in enumerate(frame_types):
        height, width = layout.frame_grid(frame_type)
        frame_grids.append((height, width))
        rows = torch.arange(height)[:, None].expand(height, width)
        columns = torch.arange(width)[None, :].expand(height, width)
        kinds = torch.full((height, width), int(TokenKind.PATCH))
        if layout.newline_position == "grid":
            rows = torch.arange(height)[:, None].expand(height, width + 1)
            columns = nn.functional.pad(columns, (0, 1), value=-1)
            kinds = nn.functional.pad(kinds, (0, 1), value=int(TokenKind.NEWLINE))
        frame_entry = torch.stack(
            [kinds.flatten(), torch.full_like(kinds, frame).flatten(), rows.flatten(), columns.flatten()], dim=1
        )
        closing = []
        if layout.newline_position == "frame":
            closing.append([int(TokenKind.NEWLINE), frame, -1, -1])
        if layout.is_slow_fast:
            closing.append([int(TokenKind.FASTER), frame, -1, -1])
        entries.append(torch.cat([frame_entry, torch.tensor(closing, dtype=torch.long).reshape(-1, 4)]))
    if layout.newline_position == "one_token":
        entries.append(torch.tensor([[int(TokenKind.NEWLINE), -1, -1, -1]]))
    kind, frame, row, column = torch.cat(entries).unbind(dim=1)
    return VideoTokens(
        kind=kind.contiguous(),
        frame=frame.contiguous(),
        row=row.contiguous(),
        column=column.contiguous(),
        frame_types=frame_types,
        frame_grids=tuple(frame_grids),
    )


def split_video_positions(video_token_mask: torch.Tensor, num_tokens: list[int]) -> list[torch.Tensor]:
    """Where each video of a batch sits in the flattened sequences.

    Args:
        video_token_mask: `[B, S]` bool, True at video placeholders.
        num_tokens: tokens of each video, in the order in which the videos stand in the batch.

    Returns:
        For each video the int64 positions `[L]` of its tokens in the flattened `[B * S]` batch.

    Raises:
        ValueError: if the placeholders are not as many as the videos' tokens.
    """
    positions = video_token_mask.flatten().nonzero().squeeze(1)
    if positions.shape[0] != sum(num_tokens):
        raise ValueError(
            f"the sequences hold {positions.shape[0]} video placeholders, but the {len(num_tokens)} videos take "
            f"{sum(num_tokens)} tokens ({', '.join(map(str, num_tokens))}); truncation is the usual cause"
        )
    return list(positions.split(num_tokens))
