"""Plots of surprise: by time, and by patch; used by `llava-next-ar visualize` and `demo`.

Surprise is the error of a prediction over that of copying the frame before and a floor (frame_surprise.py): 1 is the error of
copying plus the floor. Copying itself lies below that, far below where little moves, and so it is copying's own surprise that
marks and colours compare with, not 1.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch

from ..modeling.frame_surprise import VideoSurprise, measure_surprise
from .strip import (
    BLUE,
    GRAY,
    INK,
    VERMILION,
    WIDTH,
    ColourBar,
    StripRow,
    colour_scale,
    frame_strip,
    patch_colours,
    time_labels,
    write_title,
)

MAX_THUMBNAILS = 11
# Purple for better than copying and orange for worse.
_COLOURS = LinearSegmentedColormap.from_list(
    "surprise", [matplotlib.colormaps["PuOr_r"](place) for place in (0.22, 0.36, 0.5, 0.75, 1.0)]
)


def surprise_of(prediction: Any, seconds: torch.Tensor) -> VideoSurprise:
    """Surprise of a video as `model.surprise` gives it, from predictions that are there already.

    Args:
        prediction: a `NextFramePrediction`.
        seconds: `[T]` times of all frames.
    """
    since_first = (seconds - seconds[0]).cpu()[prediction.frame_index.cpu()]
    return measure_surprise(
        prediction.frame_index.tolist(),
        since_first.tolist(),
        prediction.predictions,
        prediction.targets,
        prediction.copies,
        prediction.grids,
    )


def shown_frames(surprise: Any, most: int = MAX_THUMBNAILS) -> list[int]:
    """Entries of a surprise to show as thumbnails: of `most` stretches of equal length, the most surprising of each."""
    stretches = np.array_split(np.arange(len(surprise.frames)), min(most, len(surprise.frames)))
    return [int(stretch[surprise.frames.numpy()[stretch].argmax()]) for stretch in stretches]


def over_copying(errors: torch.Tensor, copy_errors: torch.Tensor, floor: torch.Tensor) -> np.ndarray:
    """Errors over those of copying, the floor added to both: 1 is exactly as wrong as copying, and near 1 is also what is wrong
    by less than the floor."""
    return ((errors.cpu() + floor) / (copy_errors.cpu() + floor)).numpy()


def frames_over_copying(surprise: Any) -> np.ndarray:
    """`[M]`, `over_copying` of each frame."""
    return over_copying(*map(_means, (surprise.errors, surprise.copy_errors)), surprise.floors)


def copying_surprise(surprise: Any) -> list[float]:
    """Surprise of each frame if the frame before it were the prediction; below 1 by the floor alone."""
    copy_errors = _means(surprise.copy_errors)
    return (copy_errors / (copy_errors + surprise.floors)).tolist()


def _means(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([own.float().mean() for own in maps]).cpu()


def surprise_timeline(frames: np.ndarray, seconds: Sequence[float], surprise: Any, title: str) -> Figure:
    """Surprise over time below thumbnails, beside that of copying, and the two errors that it is made of.

    Marked are frames that were predicted worse than by copying. The dotted line is the error of copying plus the floor.

    Args:
        frames: `[T, H, W, 3]` in 0 to 1.
        seconds: time of each frame.
        surprise: a `VideoSurprise` of them.
        title: of the whole.
    """
    figure = Figure(figsize=(WIDTH, 5), facecolor="white")
    grid = {"left": 0.075, "right": 0.985, "bottom": 0.1, "top": 0.68, "hspace": 0.28, "height_ratios": (1.5, 1)}
    surprise_ax, error_ax = figure.subplots(2, 1, sharex=True, gridspec_kw=grid)
    write_title(figure, title)
    index = surprise.frame_index.tolist()
    times, values = [seconds[frame] for frame in index], surprise.frames.tolist()
    surprise_ax.axhline(1, color=INK, linewidth=0.8, linestyle=":", zorder=1)
    surprise_ax.plot(times, values, "o-", color=BLUE, markersize=5, linewidth=1.4, label="prediction", zorder=3)
    copying = copying_surprise(surprise)
    surprise_ax.plot(times, copying, "s--", color=GRAY, markersize=3.5, linewidth=1.2, label="copying", zorder=3.5)
    is_worse = frames_over_copying(surprise) > 1
    label = "prediction, worse than copying"
    marked = np.array([times, values])[:, is_worse]
    surprise_ax.plot(*marked, "D", color=VERMILION, markersize=5.5, label=label, zorder=4)
    surprise_ax.set_ylim(0, max(1.25, 1.15 * max(values)))
    surprise_ax.set_ylabel("surprise", fontsize=9)
    for errors, colour, style, label in (
        (surprise.errors, BLUE, "o-", "prediction"),
        (surprise.copy_errors, GRAY, "s--", "copying"),
    ):
        means = [float(error.mean()) for error in errors]
        error_ax.plot(times, means, style, color=colour, markersize=3.5, linewidth=1.2, label=label)
    highest = max(float(error.mean()) for errors in (surprise.errors, surprise.copy_errors) for error in errors)
    error_ax.set_ylim(0, max(1.15 * highest, 1e-6))
    error_ax.set_ylabel("squared error", fontsize=9)
    error_ax.set_xlabel("seconds", fontsize=9, labelpad=2)
    legend = {"fontsize": 8, "frameon": False, "borderpad": 0, "borderaxespad": 0.2, "columnspacing": 1.2}
    error_ax.legend(**legend, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    surprise_ax.legend(
        **legend, ncols=3, loc="upper right", bbox_to_anchor=(0.985, 0.98), bbox_transform=figure.transFigure
    )
    margin = 0.02 * max(seconds[-1] - seconds[0], 1e-3)
    error_ax.set_xlim(seconds[0] - margin, seconds[-1] + margin)
    for ax in (surprise_ax, error_ax):
        ax.tick_params(labelsize=8, length=2)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#EEEEEE", linewidth=0.8)
        ax.set_axisbelow(True)
    colours = [VERMILION if worse else BLUE for worse in is_worse]
    _draw_thumbnails(figure, surprise_ax, frames, surprise, times, values, colours)
    return figure


def _draw_thumbnails(
    figure: Figure, ax: Any, frames: np.ndarray, surprise: Any, times: list, values: list, colours: list[str]
) -> None:
    """A row above the axes, each thumbnail tied to its point, in its colour."""
    shown = shown_frames(surprise)
    left, right = 0.075, 0.985
    space = (right - left) / max(len(shown), 4)
    width = 0.92 * space
    figure_width, figure_height = figure.get_size_inches()
    height = width * figure_width / figure_height * frames.shape[1] / frames.shape[2]
    if height > 0.17:
        width, height = width * 0.17 / height, 0.17
    # As close to their times as the neighbours allow: evenly spread would do for even times only.
    low, high = ax.get_xlim()
    wanted = [left + (times[entry] - low) / (high - low) * (right - left) for entry in shown]
    centers = _spread(wanted, 1.04 * width, left + width / 2, right - width / 2)
    for entry, center in zip(shown, centers, strict=True):
        box = figure.add_axes((center - width / 2, 0.72, width, height))
        box.imshow(frames[int(surprise.frame_index[entry])], aspect="auto")
        box.set(xticks=[], yticks=[])
        for spine in box.spines.values():
            spine.set(color=colours[entry], linewidth=1.6)
        box.set_title(f"{values[entry]:.2f}", fontsize=8, pad=2, color=INK)
        tie = ConnectionPatch(
            (0.5, 0), (times[entry], values[entry]), "axes fraction", "data", axesA=box, axesB=ax,
            color=colours[entry], linewidth=0.6, alpha=0.5,
        )  # fmt: skip
        figure.add_artist(tie)


def _spread(wanted: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Sorted places moved as far as needed to lie `distance` apart between `low` and `high`, if there is room."""
    places = np.clip(wanted, low, high)
    for number in range(1, len(places)):
        places[number] = max(places[number], places[number - 1] + distance)
    places[-1] = min(places[-1], high)
    for number in range(len(places) - 2, -1, -1):
        places[number] = min(places[number], places[number + 1] - distance)
    return places.tolist()


def surprise_maps(frames: np.ndarray, seconds: Sequence[float], surprise: Any, title: str) -> Figure:
    """Error of each patch over that of copying (`over_copying`), below the frames: orange is more, purple less.

    The scale is logarithmic and the same on both sides of 1: half and twice as wrong as copying are equally strong.
    """
    patches = [over_copying(*own) for own in zip(surprise.errors, surprise.copy_errors, surprise.floors, strict=True)]
    away = np.abs(np.log2(np.concatenate([some.ravel() for some in patches])))
    reach = int(np.clip(np.ceil(np.percentile(away, 98)), 1, 3))
    scale = colour_scale(_COLOURS, LogNorm(2.0**-reach, 2.0**reach))
    pictures = [patch_colours(frame, some, scale) for frame, some in zip(frames[1:], patches, strict=True)]
    captions = ["", *(f"{value:.2f}" for value in frames_over_copying(surprise))]
    powers = range(-reach, reach + 1)
    ticks = {2.0**power: f"1/{2**-power}" if power < 0 else str(2**power) for power in powers}
    bar = ColourBar(
        scale=scale,
        label="error of a patch over that of copying, the floor added to both: 1 is as wrong (below: of the frame)",
        extend="both",
        ticks=ticks,
    )
    rows = [
        StripRow(name="frame", pictures=list(frames)),
        StripRow(name="wrong, over\ncopying", pictures=[None, *pictures], captions=captions),
    ]
    return frame_strip(rows, time_labels(seconds), title=title, bars=[bar])
