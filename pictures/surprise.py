"""Plots of surprise: by time, and by patch; used by `llava-next-ar visualize`, `demo` and `app`.

Surprise is the error of a prediction over that of copying the frame before and a floor (frame_surprise.py): 1 is the error of
copying plus the floor. The surprise of copying itself is below 1, and far below 1 where little moves. Marks and colours
therefore compare a prediction with copying, not with 1.
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
# A frame is marked as worse than copying if its error is larger by this share: less is rounding.
WORSE_BY = 0.01
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
    """Entries to show as thumbnails: the most surprising frame of each of `most` stretches of equal length."""
    stretches = np.array_split(np.arange(len(surprise.frames)), min(most, len(surprise.frames)))
    return [int(stretch[surprise.frames.numpy()[stretch].argmax()]) for stretch in stretches]


def over_copying(errors: torch.Tensor, copy_errors: torch.Tensor, floor: torch.Tensor) -> np.ndarray:
    """Ratio of errors to those of copying, with the floor added to both: 1 for the error of copying, near 1 where both errors
    are far below the floor."""
    return ((errors.cpu() + floor) / (copy_errors.cpu() + floor)).numpy()


def frames_over_copying(surprise: Any) -> np.ndarray:
    """`[M]`, `over_copying` of each frame."""
    return over_copying(*map(_means, (surprise.errors, surprise.copy_errors)), surprise.floors)


def is_worse(surprise: Any) -> np.ndarray:
    """`[M]` bool, frames whose error exceeds that of copying by more than `WORSE_BY`."""
    return frames_over_copying(surprise) > 1 + WORSE_BY


def copying_surprise(surprise: Any) -> list[float]:
    """Surprise of each frame with the frame before it as the prediction; less than 1 because of the floor."""
    copy_errors = _means(surprise.copy_errors)
    return (copy_errors / (copy_errors + surprise.floors)).tolist()


def _means(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([own.float().mean() for own in maps]).cpu()


def surprise_timeline(frames: np.ndarray, seconds: Sequence[float], surprise: Any, title: str) -> Figure:
    """Surprise over time below thumbnails, beside that of copying, and the two errors that it is made of.

    Frames that were predicted worse than by copying (`is_worse`) are marked. A dotted line at 1, the error of copying plus the
    floor, is drawn where the axis reaches it.

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
    surprise_ax.plot(times, values, "o-", color=BLUE, markersize=5, linewidth=1.4, label="prediction", zorder=3)
    copying = copying_surprise(surprise)
    surprise_ax.plot(times, copying, "s--", color=GRAY, markersize=3.5, linewidth=1.2, label="copying", zorder=3.5)
    worse = is_worse(surprise)
    label = f"worse than copying by over {WORSE_BY:.0%}"
    marked = np.array([times, values])[:, worse]
    surprise_ax.plot(*marked, "D", color=VERMILION, markersize=5.5, label=label, zorder=4)
    highest = max(*values, *copying)
    if highest > 0.5:
        highest = max(highest, 1)
        label = "1 = error of copying + floor"
        surprise_ax.axhline(1, color=INK, linewidth=0.8, linestyle=":", zorder=1, label=label)
    surprise_ax.set_ylim(*_limits(highest))
    surprise_ax.set_ylabel("surprise", fontsize=9)
    for errors, colour, style, label in (
        (surprise.errors, BLUE, "o-", "prediction"),
        (surprise.copy_errors, GRAY, "s--", "copying"),
    ):
        means = [float(error.mean()) for error in errors]
        error_ax.plot(times, means, style, color=colour, markersize=3.5, linewidth=1.2, label=label)
    highest = max(float(error.mean()) for errors in (surprise.errors, surprise.copy_errors) for error in errors)
    error_ax.set_ylim(*_limits(highest))
    error_ax.set_ylabel("squared error", fontsize=9)
    error_ax.set_xlabel("seconds", fontsize=9, labelpad=2)
    legend = {"fontsize": 8, "frameon": False, "borderpad": 0, "borderaxespad": 0.2, "columnspacing": 1.2}
    error_ax.legend(**legend, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    surprise_ax.legend(
        **legend, ncols=4, loc="upper right", bbox_to_anchor=(0.985, 0.98), bbox_transform=figure.transFigure
    )
    margin = 0.02 * max(seconds[-1] - seconds[0], 1e-3)
    error_ax.set_xlim(seconds[0] - margin, seconds[-1] + margin)
    for ax in (surprise_ax, error_ax):
        ax.tick_params(labelsize=8, length=2)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#EEEEEE", linewidth=0.8)
        ax.set_axisbelow(True)
    colours = [VERMILION if own else BLUE for own in worse]
    _draw_thumbnails(figure, surprise_ax, frames, surprise, times, values, colours)
    return figure


def _limits(highest: float) -> tuple[float, float]:
    """Ends of an axis of numbers from 0 to `highest`, with room for the marks of both."""
    highest = max(highest, 1e-6)
    return -0.06 * highest, 1.12 * highest


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
    # As close to their times as the neighbours allow: frames may be unevenly spaced in time.
    low, high = ax.get_xlim()
    wanted = [left + (times[entry] - low) / (high - low) * (right - left) for entry in shown]
    centers = spread(wanted, 1.04 * width, left + width / 2, right - width / 2)
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


def spread(wanted: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Sorted places, moved as little as needed to lie `distance` apart between `low` and `high`, if there is room."""
    places = np.clip(wanted, low, high)
    for number in range(1, len(places)):
        places[number] = max(places[number], places[number - 1] + distance)
    places[-1] = min(places[-1], high)
    for number in range(len(places) - 2, -1, -1):
        places[number] = min(places[number], places[number + 1] - distance)
    return places.tolist()


def map_rows(frames: np.ndarray, surprise: Any) -> tuple[list[StripRow], ColourBar]:
    """Ratio of the error of each patch to that of copying (`over_copying`): orange is more than 1, purple less.

    The scale is logarithmic: half and twice the error of copying are equally far from the neutral colour.

    Args:
        frames: `[T, H, W, 3]` in 0 to 1.
        surprise: a `VideoSurprise` of them.
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
        label="error / error of copying, of a patch, floor added to both; 1 = as copying (numbers: frames)",
        extend="both",
        ticks=ticks,
    )
    return [StripRow(name="error / error\nof copying", pictures=[None, *pictures], captions=captions)], bar


def surprise_maps(frames: np.ndarray, seconds: Sequence[float], surprise: Any, title: str) -> Figure:
    """Frames above `map_rows`; `title` of the whole."""
    rows, bar = map_rows(frames, surprise)
    rows = [StripRow(name="frame", pictures=list(frames)), *rows]
    return frame_strip(rows, time_labels(seconds), title=title, bars=[bar])
