"""Film strips: a column for each frame of a video, with rows of pictures; used by the other modules of this folder.

A strip is drawn in inches from its upper left corner, and wraps after `COLUMNS` frames: the size of text does not depend on the
number of frames. Colour-blind readers can tell colours apart: scales differ in lightness, and categories have the palette of
Okabe and Ito (https://jfly.uni-koeln.de/color/).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.patches import Rectangle

COLUMNS = 8
BLUE, SKY, ORANGE, VERMILION, PURPLE = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#CC79A7"
GRAY, LIGHT, INK = "#767676", "#D9D9D9", "#222222"
# Pixels of an inch: in a file, and on a page, where a file is shown smaller and so stays sharp on a fine screen.
FILE_DPI, PAGE_DPI = 130, 112
# Inches. All pictures are as wide, but strips of few frames narrower.
WIDTH = 9.4
_LABEL_WIDTH, _GAP, _MARGIN, _WIDEST_CELL = 1.0, 0.06, 0.1, 1.7
_TEXT_HEIGHT, _BLOCK_GAP, _BARS_HEIGHT, _LEGEND_HEIGHT = 0.17, 0.14, 0.68, 0.3
# A title or the label of a scale needs as much, however few frames there are.
_LEAST_WIDTH = 7.6


class NotThereError(ValueError):
    """A checkpoint or a video lacks the data of a picture; the text names them."""


@dataclass(frozen=True, kw_only=True)
class StripRow:
    """One line of a strip.

    Attributes:
        name: text at its left.
        pictures: for each frame `[h, w, 3]` colours in 0 to 1, or None for an empty cell.
        captions: text below each picture; None reserves no line for them.
    """

    name: str
    pictures: Sequence[np.ndarray | None]
    captions: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class ColourBar:
    """A scale of numbers.

    Attributes:
        scale: mapping from numbers to colours.
        label: quantity and unit of the numbers.
        extend: `neither | min | max | both`, where numbers beyond the scale's ends have the colour of the end.
        ticks: numbers to write, and their text; chosen by matplotlib if None.
    """

    scale: ScalarMappable
    label: str
    extend: str = "neither"
    ticks: dict[float, str] | None = None


def unnormalise(frames: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Pixels of the model's input `[T, 3, H, W]` -> `[T, H, W, 3]` in 0 to 1."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (frames.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def colour_scale(colours: str | Colormap, norm: Normalize) -> ScalarMappable:
    """Scale of colours: a map of matplotlib, and the spread of numbers over it."""
    return ScalarMappable(norm, matplotlib.colormaps[colours] if isinstance(colours, str) else colours)


def patch_colours(frame: np.ndarray, values: np.ndarray, scale: ScalarMappable) -> np.ndarray:
    """Colours of numbers `[h, w]`, enlarged to the size of their frame `[H, W, 3]`: `[H, W, 3]`.

    The frame is not blended in, so that each colour is one of the colour bar. It is drawn in a row of its own above.
    """
    rows, columns = (
        ((np.arange(size) + 0.5) * count / size).astype(int)
        for size, count in zip(frame.shape[:2], values.shape, strict=True)
    )
    return scale.to_rgba(values)[rows][:, columns, :3]


def save_figure(figure: Figure, path: Path) -> int:
    """Writes a PNG file; returns its width on a page, in pixels."""
    # Without the version that matplotlib adds, equal results give equal files.
    figure.savefig(path, dpi=FILE_DPI, metadata={"Software": None})
    return round(figure.get_size_inches()[0] * PAGE_DPI)


def shorten(name: str, length: int = 24) -> str:
    """Replaces the middle of a long name by dots; a wide character, such as a Chinese one, counts as two."""
    widths = _widths(name)
    if sum(widths) <= length:
        return name
    half = (length - 3) // 2
    start = int((np.cumsum(widths) <= half).sum())
    end = int((np.cumsum(widths[::-1]) <= half).sum())
    return f"{name[:start]}...{name[len(name) - end :]}"


def shorten_text(text: str, length: int) -> str:
    """The first words of a text that have room, with dots for the others; `shorten` for a single long word."""
    words = text.split()
    if sum(_widths(" ".join(words))) <= length:
        return " ".join(words)
    ends = np.cumsum([sum(_widths(word)) + 1 for word in words]) - 1
    kept = int((ends <= length - 4).sum())
    return " ".join([*words[:kept], "..."]) if kept else shorten(words[0], length)


def _widths(text: str) -> list[int]:
    return [2 if east_asian_width(character) in "FW" else 1 for character in text]


def _families(text: str) -> tuple[list[str], set[int]]:
    """Fonts for a text, the usual one first, and the characters that none of matplotlib's fonts has."""
    usual = FontProperties()
    families = [usual.get_name()]
    missing = {ord(character) for character in text if not character.isspace()} - _characters(findfont(usual))
    # "Last Resort" has a box for every character.
    files = {font.name: font.fname for font in fontManager.ttflist if not font.name.startswith("Last Resort")}
    while missing:
        most = max(files, key=lambda family: len(missing & _characters(files[family])))
        found = missing & _characters(files[most])
        if not found:
            break
        families.append(most)
        missing = missing - found
    return families, missing


@cache
def _characters(file: str) -> frozenset[int]:
    try:
        font = get_font(file)
    except (OSError, RuntimeError):  # matplotlib remembers fonts that are gone, or cannot read this one
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()


def legible(text: str) -> str:
    """The text, or a reference to the page if matplotlib's fonts lack a character: on the page the browser's fonts are used."""
    return "(see the page)" if _families(text)[1] else text


def write_title(figure: Figure, title: str) -> None:
    """Writes a title into the upper left corner, as plain text: a dollar sign does not begin a formula."""
    width, height = figure.get_size_inches()
    place, families = (0.1 / width, 1 - 0.18 / height), _families(title)[0]
    figure.text(*place, title, fontsize=10.5, va="center", color=INK, family=families, parse_math=False)


def time_labels(seconds: Sequence[float]) -> list[str]:
    return [f"{time:.2f} s" for time in seconds]


def frame_strip(
    rows: Sequence[StripRow],
    headings: Sequence[str],
    *,
    title: str,
    bars: Sequence[ColourBar] = (),
    legend: Sequence[tuple[str, str]] = (),
) -> Figure:
    """Draws rows of pictures below each other, a column for each heading.

    Args:
        rows: each with one picture for each heading.
        headings: text above each column, such as the time of a frame.
        title: of the whole.
        bars: colour scales, below the pictures.
        legend: colours and their meaning, below the pictures.

    Raises:
        ValueError: if no row has a picture, or the number of pictures of a row is not that of the headings.
    """
    for row in rows:
        if len(row.pictures) != len(headings) or len(row.captions or headings) != len(headings):
            raise ValueError(
                f"row {row.name!r} does not have one picture (and caption) for each of {len(headings)} frames"
            )
    shapes = [picture.shape for row in rows for picture in row.pictures if picture is not None]
    if not shapes:
        raise ValueError("no row has a picture to draw")
    aspect = shapes[0][0] / shapes[0][1]
    columns = min(COLUMNS, len(headings))
    cell = min((WIDTH - _LABEL_WIDTH - _MARGIN) / columns - _GAP, _WIDEST_CELL)
    row_heights = [cell * aspect + _GAP + (_TEXT_HEIGHT if row.captions else 0) for row in rows]
    block_height = _TEXT_HEIGHT + 0.04 + sum(row_heights)
    num_blocks = math.ceil(len(headings) / columns)
    width = max(_LABEL_WIDTH + columns * (cell + _GAP) + _MARGIN, _LEAST_WIDTH)
    top = 0.42
    below = top + num_blocks * block_height + (num_blocks - 1) * _BLOCK_GAP
    height = below + (_BARS_HEIGHT if bars else 0) + (_LEGEND_HEIGHT if legend else 0) + 0.08
    figure, ax = _inches(width, height)
    write_title(figure, title)
    for number, heading in enumerate(headings):
        block, column = divmod(number, columns)
        x = _LABEL_WIDTH + column * (cell + _GAP)
        y = top + block * (block_height + _BLOCK_GAP)
        ax.text(x + cell / 2, y + _TEXT_HEIGHT / 2, heading, fontsize=8.5, ha="center", va="center", color=INK)
        y += _TEXT_HEIGHT + 0.04
        for row, row_height in zip(rows, row_heights, strict=True):
            if column == 0:
                place = (_LABEL_WIDTH - 0.1, y + cell * aspect / 2)
                ax.text(*place, row.name, fontsize=9, ha="right", va="center", color=INK)
            _draw_cell(ax, row.pictures[number], x, y, cell, cell * aspect)
            if row.captions:
                place = (x + cell / 2, y + cell * aspect + 0.03)
                ax.text(*place, row.captions[number], fontsize=8, ha="center", va="top", color=INK)
            y += row_height
    if bars:
        _draw_bars(figure, bars, width, height, below)
    if legend:
        place = (_LABEL_WIDTH, below + (_BARS_HEIGHT if bars else 0) + 0.1)
        ax.legend(**legend_of(legend), loc="upper left", bbox_to_anchor=place, bbox_transform=ax.transData)
    return figure


def _inches(width: float, height: float):
    """Figure with axes that fill it, in inches from the upper left corner."""
    figure = Figure(figsize=(width, height), facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    return figure, ax


def _draw_cell(ax, picture: np.ndarray | None, x: float, y: float, width: float, height: float) -> None:
    if picture is None:
        ax.add_patch(Rectangle((x, y), width, height, facecolor="#F2F2F2", edgecolor=LIGHT, linewidth=0.6, hatch="//"))
        return
    ax.imshow(picture, extent=(x, x + width, y + height, y), aspect="auto", interpolation_stage="rgba")
    # Every image sets the limits of its axes.
    _reset(ax)


def _reset(ax) -> None:
    width, height = ax.figure.get_size_inches()
    ax.set(xlim=(0, width), ylim=(height, 0))


def _draw_bars(figure: Figure, bars: Sequence[ColourBar], width: float, height: float, y: float) -> None:
    share = (width - _LABEL_WIDTH - _MARGIN) / len(bars)
    for number, bar in enumerate(bars):
        x, length = _LABEL_WIDTH + number * share, min(share - 0.3, 4.2)
        axes = figure.add_axes((x / width, 1 - (y + 0.42) / height, length / width, 0.12 / height))
        drawn = figure.colorbar(bar.scale, cax=axes, orientation="horizontal", extend=bar.extend)
        axes.set_title(bar.label, fontsize=8.5, loc="left", pad=4, color=INK)
        drawn.ax.tick_params(labelsize=8, length=2, pad=2)
        drawn.ax.minorticks_off()
        if bar.ticks is not None:
            drawn.set_ticks(list(bar.ticks), labels=list(bar.ticks.values()))


def legend_of(entries: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Options of matplotlib's `legend` for colours and their meaning, in one line without a frame."""
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor="none", label=text) for colour, text in entries]
    return {
        "handles": handles, "ncols": len(handles), "frameon": False, "fontsize": 8.5, "borderpad": 0, "borderaxespad": 0,
        "handlelength": 1, "handleheight": 1, "handletextpad": 0.5, "columnspacing": 1.4,
    }  # fmt: skip
