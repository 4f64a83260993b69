# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Mapping between the tokens of a sequence and the patches of video frames.

`FrameTokenLayout` alone defines the tokens of a video. Three parts use it: the processor for the number of placeholders, the
model to assemble projected features, and the reconstruction head to find the hidden states of the patches of each frame. The
layouts are those of LLaVA-NeXT (https://github.com/LLaVA-VL/LLaVA-NeXT, `llava/model/llava_arch.py`).

Shape letters: T frames, P = patches_height * patches_width patches of the vision tower in row-major order, D features,
h x w the grid of a pooled frame, L tokens of one video.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

PoolMode = Literal["average", "max", "bilinear"]
NewlinePosition = Literal["one_token", "grid", "frame", "no_token"]


class FrameType(IntEnum):
    """Slow frames keep the resolution of `pool_stride`; fast frames are pooled twice as coarsely."""

    SLOW = 0
    FAST = 1


class TokenKind(IntEnum):
    """Content of a token of a video."""

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
    """Right inverse of pooling, `[P, h * w]` float32: copies the value of a pooled patch to the patches of its window."""
    with torch.inference_mode(False), torch.device("cpu"):  # as in `_video_tokens`
        target = pooled_grid(grid, stride, mode)
        owners = []  # of the rows and of the columns
        for side, pooled in zip(grid, target, strict=True):
            positions = torch.arange(side)
            # Windows are as large as the stride. Pooling drops the remainder, which goes with the last window.
            window = (positions // stride).clamp(max=pooled - 1)
            owners.append(positions * pooled // side if mode == "bilinear" else window)
        owner = (owners[0][:, None] * target[1] + owners[1]).flatten()  # [P]
        spread = nn.functional.one_hot(owner, target[0] * target[1]).double()
        if mode == "bilinear":
            # Where the stride does not divide the grid, interpolation reads across windows; the correction of least norm.
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
        row, column: `[L]` int64, position in the frame's pooled grid; -1 where the token is not a patch (the newline of a
            row keeps its row).
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


@torch.compiler.disable  # numbers of the host, not of the graph
def tensor_on(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies an array to a device as a tensor. The host does not wait for the device."""
    with torch.inference_mode(False), torch.device("cpu"):  # usable in training and while a model is built, too
        tensor = torch.from_numpy(array)
        # Only from pinned memory does a copy wait for its turn on the device instead of on the host.
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(eq=False)
class DeviceTensors:
    """Constant arrays with one copy per device, which later training steps reuse."""

    arrays: tuple[np.ndarray, ...]
    _copies: dict[torch.device, tuple[torch.Tensor, ...]] = field(default_factory=dict, repr=False)

    @torch.compiler.disable
    def on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The arrays as tensors on a device, not to be written to."""
        if device not in self._copies:
            copies = tuple(tensor_on(array, device) for array in self.arrays)
            if any(type(copy) is not torch.Tensor for copy in copies):  # of a tracer, which holds no values
                return copies
            self._copies[device] = copies
        return self._copies[device]


@dataclass(frozen=True, eq=False)
class VideoBatch:
    """The tokens of all videos of a batch, concatenated. Built by `FrameTokenLayout.batch`.

    Shape letters: N videos, F frames, L tokens and n patch tokens of all videos together.

    Attributes:
        layout: of all videos.
        videos: the token map of each.
        num_frames, num_tokens: of each.
        frame_types: of each of the F frames.
        frame_grids: pooled `(h, w)` of each of the F frames.
        num_newlines, num_faster: how many of the L tokens are newlines and faster tokens.
        is_in_order: all patches come first, then all newlines, then all faster tokens.
        frames: index arrays over frames: numbers of the slow frames, numbers of the fast ones.
        tokens: index arrays over tokens: `[L]` index of each token in [patches of slow frames, patches of fast frames,
            newlines, faster tokens]; `[n]` indices of the patch tokens; `[N]` the first token of each video.
        places: `[n]` the frame of each patch token; `[n, 2]` float32 its position in the frame, from 0 to 1.
    """

    layout: "FrameTokenLayout"
    videos: tuple[VideoTokens, ...]
    num_frames: tuple[int, ...]
    num_tokens: tuple[int, ...]
    frame_types: tuple[FrameType, ...]
    frame_grids: tuple[tuple[int, int], ...]
    num_newlines: int
    num_faster: int
    is_in_order: bool
    frames: DeviceTensors
    tokens: DeviceTensors
    places: DeviceTensors

    def __len__(self) -> int:
        return len(self.videos)

    def __repr__(self) -> str:
        return f"VideoBatch(num_tokens={self.num_tokens}, num_frames={self.num_frames})"

    def assemble(
        self,
        features: torch.Tensor,
        image_newline: torch.Tensor | None = None,
        faster_token: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Puts the projected features of all videos in sequence order.

        Args:
            features: `[F, P, D]`, unpooled, after the projector.
            image_newline, faster_token: learned `[D]` vectors, needed where the layout uses them.

        Returns:
            `[L, D]`.

        Raises:
            ValueError: if the layout needs a learned token that is not given, or the frames are not F.
        """
        if len(features) != len(self.frame_types):
            raise ValueError(f"{len(self.frame_types)} frame types were given for {len(features)} frames")
        parts = []
        for frame_type, members in zip(FrameType, self.frames.on(features.device), strict=True):
            if len(members):
                # The common case, all frames alike, must not copy the features.
                selected = features if len(members) == len(features) else features.index_select(0, members)
                parts.append(self.layout.pool(selected, frame_type).flatten(0, 1))
        for count, name, vector in (
            (self.num_newlines, "image_newline", image_newline),
            (self.num_faster, "faster_token", faster_token),
        ):
            if not count:
                continue
            if vector is None:
                raise ValueError(
                    f"newline_position={self.layout.newline_position!r}, "
                    f"add_faster_video={self.layout.add_faster_video} needs `{name}`, which is missing"
                )
            parts.append(vector.to(features).expand(count, -1))
        if self.is_in_order:
            return torch.cat(parts)
        # A permutation: every row is read once, so that the gradient is a copy in any order.
        return torch.cat(parts).index_select(0, self.tokens.on(features.device)[0])


@dataclass(frozen=True, kw_only=True)
class FrameTokenLayout:
    """Number, order and pooling of the tokens of a video. Frozen, hashable, validated at construction.

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
        ValueError: naming the value and the allowed ones.
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
        """True if frames differ in resolution: as in LLaVA-NeXT, `add_faster_video` is ignored outside of `grid`."""
        return self.add_faster_video and self.newline_position == "grid"

    def frame_types(
        self, num_frames: int, explicit: "torch.Tensor | list[int] | None" = None, *, first_frame: int = 0
    ) -> tuple[FrameType, ...]:
        """The type of each frame; `explicit` (slow 0, fast 1) wins over `faster_token_stride`.

        Without slow and fast frames in the layout every frame is pooled alike, with any `explicit`. Frames that
        continue a video are counted from `first_frame`.

        Raises:
            ValueError: if `num_frames` is below 1, or `explicit` has another length or an unknown value.
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

        Added to the features of a frame, it adds `pooled` to their pooled features: in all modes, and also where the
        stride does not divide the grid.
        """
        stride = self._stride(frame_type)
        if stride == 1:
            return pooled
        matrix = _unpooling((self.patches_height, self.patches_width), stride, self.pool_mode)
        return matrix.to(pooled) @ pooled

    @torch.compiler.disable
    def batch(
        self, num_frames: Sequence[int], frame_types: "Sequence[Sequence[int] | torch.Tensor | None] | None" = None
    ) -> VideoBatch:
        """The token map of videos of these numbers of frames, with explicit types (slow 0, fast 1) of each or None.

        Raises:
            ValueError: as `frame_types`.
        """
        explicit = [None] * len(num_frames) if frame_types is None else frame_types
        types = (self.frame_types(count, given) for count, given in zip(num_frames, explicit, strict=True))
        return _video_batch(self, tuple(types))

    def assemble(
        self,
        features: torch.Tensor,
        image_newline: torch.Tensor | None = None,
        faster_token: torch.Tensor | None = None,
        frame_types: "torch.Tensor | list[int] | None" = None,
    ) -> torch.Tensor:
        """Puts the projected features of one video in sequence order: `[T, P, D]` to `[L, D]`.

        `frame_types` are the explicit types (slow 0, fast 1) of the frames; else see `VideoBatch.assemble`.
        """
        return self.batch([len(features)], [frame_types]).assemble(features, image_newline, faster_token)

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
        """Compares with another layout.

        Raises:
            ValueError: if a key differs, naming each such key and both values.
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
    blocks = {frame_type: _frame_tokens(layout, frame_type) for frame_type in set(frame_types)}
    entries = np.concatenate([blocks[frame_type] for frame_type in frame_types])
    frame = np.repeat(np.arange(len(frame_types)), [len(blocks[frame_type]) for frame_type in frame_types])
    if layout.newline_position == "one_token":
        entries = np.concatenate([entries, [[TokenKind.NEWLINE, -1, -1]]])
        frame = np.append(frame, -1)
    # The cache outlives the caller's context: tensors made in inference mode could not be used in training later,
    # those made while a model is built on the meta device would hold no values.
    with torch.inference_mode(False), torch.device("cpu"):
        kind, row, column = (torch.from_numpy(np.ascontiguousarray(values)) for values in entries.T)
        return VideoTokens(
            kind=kind,
            frame=torch.from_numpy(frame),
            row=row,
            column=column,
            frame_types=frame_types,
            frame_grids=tuple(layout.frame_grid(frame_type) for frame_type in frame_types),
        )


def _frame_tokens(layout: FrameTokenLayout, frame_type: FrameType) -> np.ndarray:
    """`[tokens of a frame, 3]` int64: kind, row, column."""
    height, width = layout.frame_grid(frame_type)
    row, column = np.indices((height, width))
    tokens = np.stack([np.full((height, width), TokenKind.PATCH), row, column], axis=-1)
    if layout.newline_position == "grid":
        newlines = np.stack([np.full(height, TokenKind.NEWLINE), np.arange(height), np.full(height, -1)], axis=-1)
        tokens = np.concatenate([tokens, newlines[:, None]], axis=1)
    closing = [TokenKind.NEWLINE] * (layout.newline_position == "frame") + [TokenKind.FASTER] * layout.is_slow_fast
    closing = np.array([[kind, -1, -1] for kind in closing], dtype=np.int64).reshape(-1, 3)
    return np.concatenate([tokens.reshape(-1, 3), closing])


@lru_cache(maxsize=16)  # about 4 MB each for 8 videos of 32 frames, on the host and on the device
def _video_batch(layout: FrameTokenLayout, frame_types: tuple[tuple[FrameType, ...], ...]) -> VideoBatch:
    videos = tuple(_video_tokens(layout, types) for types in frame_types)
    num_frames, num_tokens = tuple(map(len, frame_types)), tuple(map(len, videos))
    all_types = tuple(frame_type for types in frame_types for frame_type in types)
    first_frame = np.cumsum((0, *num_frames))[:-1]
    kind, frame, row, column = (
        np.concatenate([getattr(video, name).numpy() for video in videos])
        for name in ("kind", "frame", "row", "column")
    )
    frame = np.where(frame < 0, -1, frame + np.repeat(first_frame, num_tokens))
    is_fast = np.array(all_types) == FrameType.FAST
    # Parts that `assemble` concatenates: slow patches, fast patches, newlines, faster tokens.
    is_patch = kind == TokenKind.PATCH
    part = np.select([is_patch & ~is_fast[frame], is_patch, kind == TokenKind.NEWLINE], [0, 1, 2], 3)
    source = np.empty_like(part)
    source[np.argsort(part, kind="stable")] = np.arange(len(part))
    patches = np.flatnonzero(is_patch)
    grids = np.array([layout.frame_grid(frame_type) for frame_type in all_types], dtype=np.float32)
    center = (np.stack([row[patches], column[patches]], axis=1) + np.float32(0.5)).astype(np.float32)
    return VideoBatch(
        layout=layout,
        videos=videos,
        num_frames=num_frames,
        num_tokens=num_tokens,
        frame_types=all_types,
        frame_grids=tuple(grid for video in videos for grid in video.frame_grids),
        num_newlines=int((part == 2).sum()),
        num_faster=int((part == 3).sum()),
        is_in_order=bool((np.diff(part) >= 0).all()),
        frames=DeviceTensors((np.flatnonzero(~is_fast), np.flatnonzero(is_fast))),
        tokens=DeviceTensors((source, patches, np.cumsum((0, *num_tokens))[:-1])),
        places=DeviceTensors((frame[patches], center / grids[frame[patches]])),
    )


def split_video_positions(video_token_mask: torch.Tensor, num_tokens: list[int]) -> list[torch.Tensor]:
    """Positions of each video of a batch in the flattened sequences.

    Args:
        video_token_mask: `[B, S]` bool, True at video placeholders.
        num_tokens: tokens of each video, in the order in which the videos stand in the batch.

    Returns:
        For each video the int64 positions `[L]` of its tokens in the flattened `[B * S]` batch.

    Raises:
        ValueError: if the placeholders are not as many as the videos' tokens.
    """
    positions = video_token_mask.flatten().nonzero().squeeze(1)
    check_num_placeholders(len(positions), num_tokens)
    return list(positions.split(num_tokens))


def check_num_placeholders(num_placeholders: int, num_tokens: Sequence[int]) -> None:
    """Raises ValueError unless there are as many video placeholders as tokens `num_tokens` of all videos."""
    if num_placeholders != sum(num_tokens):
        raise ValueError(
            f"the sequences hold {num_placeholders} video placeholders, but the {len(num_tokens)} videos take "
            f"{sum(num_tokens)} tokens ({', '.join(map(str, num_tokens))}); truncation is the usual cause"
        )
