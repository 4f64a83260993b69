"""Pictures of the token layout of each frame, and of the frames that the head attends to."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ..configuration.frame_token_layout import FrameType, TokenKind, VideoTokens
from ..modeling.frame_masks import FrameLevelMaskGenerator
from .strip import (
    GRAY,
    LIGHT,
    ORANGE,
    PURPLE,
    SKY,
    WIDTH,
    StripRow,
    frame_strip,
    legend_of,
    time_labels,
    write_title,
)

_COLOURS = {TokenKind.PATCH: SKY, TokenKind.NEWLINE: ORANGE, TokenKind.FASTER: PURPLE}
_NAMES = {TokenKind.PATCH: "patch of a frame", TokenKind.NEWLINE: "newline token", TokenKind.FASTER: "faster token"}
# Pixels: a drawn frame, tokens beside it, the space between, lines between patches.
_SIDE, _BAND, _GAP, _LINE = 336, 34, 5, 4


def layout_numbers(tokens: VideoTokens, first_position: int) -> dict[str, Any]:
    """Positions in the prompt of the tokens of each frame.

    Args:
        tokens: token map of a video.
        first_position: position of the video's first token in the prompt.

    Returns:
        `num_tokens`, `first` and `last` position, `closing_newline` (the position of a newline that belongs to no frame, or
        None) and `frames`, for each: `frame`, `type`, `grid`, `first` and `last` position, and the numbers of its `patches`,
        `newlines` and `faster` tokens.
    """
    frames = []
    for frame, (kind, grid) in enumerate(zip(tokens.frame_types, tokens.frame_grids, strict=True)):
        own = (tokens.frame == frame).nonzero().squeeze(1)
        counts = tokens.kind[own].bincount(minlength=len(TokenKind)).tolist()
        frames.append(
            {
                "frame": frame,
                "type": FrameType(int(kind)).name.lower(),
                "grid": list(grid),
                "first": first_position + int(own[0]),
                "last": first_position + int(own[-1]),
                "patches": counts[TokenKind.PATCH],
                "newlines": counts[TokenKind.NEWLINE],
                "faster": counts[TokenKind.FASTER],
            }
        )
    closing = (tokens.frame == -1).nonzero().squeeze(1).tolist()
    return {
        "num_tokens": len(tokens),
        "first": first_position,
        "last": first_position + len(tokens) - 1,
        "closing_newline": first_position + closing[0] if closing else None,
        "frames": frames,
    }


def _cut_into_tokens(frame: np.ndarray, layout: dict[str, Any], has_bands: bool) -> np.ndarray:
    """Frame cut into its patch tokens; its other tokens are bars right of their row, or below the frame."""
    size = (_SIDE, round(_SIDE * frame.shape[1] / frame.shape[0]))
    rows, columns = (np.arange(side) * count // side for side, count in zip(size, frame.shape[:2], strict=True))
    picture = frame[rows][:, columns]
    line = to_rgb(_COLOURS[TokenKind.PATCH])
    edges = [
        np.linspace(0, side, count + 1).round().astype(int) for side, count in zip(size, layout["grid"], strict=True)
    ]
    for edge in edges[0][1:-1]:
        picture[edge - _LINE // 2 : edge + _LINE // 2] = line
    for edge in edges[1][1:-1]:
        picture[:, edge - _LINE // 2 : edge + _LINE // 2] = line
    if not has_bands:
        return picture
    whole = np.ones((size[0] + _GAP + _BAND, size[1] + _GAP + _BAND, 3), dtype=picture.dtype)
    whole[: size[0], : size[1]] = picture
    closing = [_COLOURS[TokenKind.FASTER]] * layout["faster"]
    if layout["newlines"] > 1:  # one for each row; of a single row the newline closes the frame
        for top, bottom in zip(edges[0][:-1], edges[0][1:], strict=True):
            whole[top + _LINE : bottom - _LINE, size[1] + _GAP :] = to_rgb(_COLOURS[TokenKind.NEWLINE])
    else:
        closing = [_COLOURS[TokenKind.NEWLINE]] * layout["newlines"] + closing
    for place, colour in enumerate(closing):
        left = place * (2 * _BAND + _GAP)
        whole[size[0] + _GAP :, left : left + 2 * _BAND] = to_rgb(colour)
    return whole


def layout_figure(frames: np.ndarray, seconds: Sequence[float], layout: dict[str, Any], title: str) -> Figure:
    """Each frame cut into its tokens, with their positions in the prompt.

    Args:
        frames: `[T, H, W, 3]` in 0 to 1.
        seconds: time of each frame.
        layout: of `layout_numbers`.
        title: of the whole.
    """
    parts, closing = layout["frames"], layout["closing_newline"]
    has_bands = any(own["newlines"] or own["faster"] for own in parts)
    has_types = len({own["type"] for own in parts}) > 1
    headings = [
        f"{label}, {own['type']}" if has_types else label
        for label, own in zip(time_labels(seconds), parts, strict=True)
    ]
    row = StripRow(
        name="patch tokens\nand positions",
        pictures=[_cut_into_tokens(frame, own, has_bands) for frame, own in zip(frames, parts, strict=True)],
        captions=[f"{own['first']} to {own['last']}" for own in parts],
    )
    legend = [(_COLOURS[TokenKind.PATCH], "lines cut a frame into its patch tokens")]
    if closing is not None:
        legend.append((_COLOURS[TokenKind.NEWLINE], f"one newline token closes the video, at position {closing}"))
    elif any(own["newlines"] for own in parts):
        legend.append((_COLOURS[TokenKind.NEWLINE], _NAMES[TokenKind.NEWLINE]))
    if any(own["faster"] for own in parts):
        legend.append((_COLOURS[TokenKind.FASTER], f"{_NAMES[TokenKind.FASTER]}, closes a frame"))
    return frame_strip([row], headings, title=title, legend=legend)


def sequence_figure(layout: dict[str, Any], tokens: VideoTokens, length: int, title: str) -> Figure:
    """The prompt as the language model reads it, coloured by kind of token and numbered by frame.

    Args:
        layout: of `layout_numbers`.
        tokens: its token map.
        length: of the prompt.
        title: of the whole.
    """
    figure = Figure(figsize=(WIDTH, 1.15), facecolor="white")
    ax = figure.add_axes((0.02, 0.36, 0.965, 0.3))
    write_title(figure, title)
    colours = np.empty((1, length, 3))
    colours[:] = to_rgb(LIGHT)
    for own in layout["frames"]:
        shade = 1 if own["frame"] % 2 == 0 else 0.75  # neighbours must not run together
        colours[0, own["first"] : own["last"] + 1] = shade * np.array(to_rgb(_COLOURS[TokenKind.PATCH]))
        if (own["last"] - own["first"] + 1) / length > 0.02:
            center = (own["first"] + own["last"]) / 2
            ax.text(center, 0.48, own["frame"], fontsize=8, ha="center", va="center")
    entries = [(LIGHT, "text"), (SKY, _NAMES[TokenKind.PATCH])]
    for kind in (TokenKind.NEWLINE, TokenKind.FASTER):
        places = (tokens.kind == kind).nonzero().squeeze(1).numpy()
        if len(places):
            colours[0, layout["first"] + places] = to_rgb(_COLOURS[kind])
            entries.append((_COLOURS[kind], _NAMES[kind]))
    ax.imshow(colours, aspect="auto", extent=(-0.5, length - 0.5, 0, 1), interpolation_stage="rgba")
    ax.set(yticks=[])
    ax.tick_params(labelsize=8, length=2)
    ax.set_xlabel("position in the prompt", fontsize=8.5, labelpad=2)
    figure.legend(**legend_of(entries), loc="center right", bbox_to_anchor=(0.985, 0.86))
    for spine in ax.spines.values():
        spine.set_color(GRAY)
    return figure


def head_visibility(head: Any, num_frames: int, frame_types: Sequence[int] | None) -> torch.Tensor:
    """Frames (columns) that the head attends to when it predicts from a frame (row) the next one: `[T, T]` bool.

    Args:
        head: a head's configuration.
        num_frames: T.
        frame_types: slow (0) or fast (1), where frames differ.
    """
    return FrameLevelMaskGenerator.frame_visibility(
        num_frames,
        head.num_hist,
        frame_types if head.use_fast_slow_frames else None,
        causal=head.use_frame_causal_mask,
    )


def mask_figure(head: Any, num_frames: int, frame_types: Sequence[int] | None) -> tuple[torch.Tensor, Figure]:
    """`head_visibility` and its picture by frame: all patches of a frame attend to the same frames."""
    visibility = head_visibility(head, num_frames, frame_types)
    figure = FrameLevelMaskGenerator.visualize_mask(
        visibility,
        f"frames that the head attends to (num_hist = {head.num_hist})",
        num_patches_per_frame=1,
        frame_types=frame_types if head.use_fast_slow_frames else None,
    )
    return visibility, figure
