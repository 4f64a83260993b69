"""Pictures and a self-contained HTML page about what a model predicted; used by scripts/demo.py and scripts/evaluate.py.

Features are shown as colours: their first three principal components as red, green and blue. One basis serves all
rows of a picture, so that equal features have equal colours and a prediction can be compared with the truth by eye.
"""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

_GRAY, _LIGHT, _BLUE, _GREEN, _ORANGE = "#888888", "#cccccc", "#2563a8", "#4d9078", "#d2691e"


# -- Features as colours


def pca_colours(features: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`[P_i, D]` arrays -> `[P_i, 3]` in 0 to 1, on the first three principal components of all of them together."""
    stacked = np.concatenate(features).astype(np.float64)
    mean = stacked.mean(0)
    _, _, basis = np.linalg.svd(stacked - mean, full_matrices=False)
    projected = (stacked - mean) @ basis[:3].T
    low, high = np.percentile(projected, [1, 99], axis=0)
    colours = np.clip((projected - low) / np.maximum(high - low, 1e-9), 0, 1)
    return np.split(colours, np.cumsum([len(some) for some in features])[:-1])


def unnormalise(frames: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """`[T, 3, H, W]` as the model takes it -> `[T, H, W, 3]` in 0 to 1."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (frames.float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


# -- Figures


def prediction_figure(frames: np.ndarray, prediction: Any, timestamps: Sequence[float], title: str) -> Figure:
    """One column for each sampled frame: the frame, its true and predicted features, where the prediction is wrong.

    Args:
        frames: `[T, H, W, 3]` in 0 to 1.
        prediction: a `NextFramePrediction` of this clip.
        timestamps: seconds of each frame.
    """
    num_frames = len(frames)
    targets, predictions, copies = (
        [patches.float().numpy() for patches in some]
        for some in (prediction.targets, prediction.predictions, prediction.copies)
    )
    # The first frame is never predicted; the copy baseline of the second one holds its features.
    colours = pca_colours([copies[0], *targets, *predictions])
    true_colours, predicted_colours = colours[: len(targets) + 1], colours[len(targets) + 1 :]
    errors, copy_errors = (
        [((a - b) ** 2).mean(-1) for a, b in zip(some, targets, strict=True)] for some in (predictions, copies)
    )
    largest = max(float(np.max(some)) for some in (*errors, *copy_errors))
    rows = ("frame", "true\nfeatures", "predicted\nfeatures", "error", "error of\ncopying")
    figure = Figure(figsize=(1.25 * num_frames + 1.2, 1.3 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), num_frames, squeeze=False)
    figure.suptitle(title, fontsize=11)
    error_picture = None
    for t in range(num_frames):
        axes[0, t].imshow(frames[t])
        axes[0, t].set_title(f"{timestamps[t]:.2f} s", fontsize=8)
        grid = prediction.grids[max(t - 1, 0)]
        axes[1, t].imshow(true_colours[t].reshape(*grid, 3), interpolation="nearest")
        if t == 0:
            for row in range(2, len(rows)):
                axes[row, 0].set_facecolor("#eeeeee")
                axes[row, 0].set_box_aspect(1)
            continue
        axes[2, t].imshow(predicted_colours[t - 1].reshape(*grid, 3), interpolation="nearest")
        for row, some in ((3, errors), (4, copy_errors)):
            error_picture = axes[row, t].imshow(
                some[t - 1].reshape(grid), cmap="magma", vmin=0, vmax=largest, interpolation="nearest"
            )
            axes[row, t].set_xlabel(f"{some[t - 1].mean():.2f}", fontsize=8, labelpad=2)
    for row, name in enumerate(rows):
        axes[row, 0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    if error_picture is not None:
        bar = figure.colorbar(error_picture, ax=axes[3:, :], fraction=0.02, pad=0.01)
        bar.set_label("squared error", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    return figure


def _smooth(values: Sequence[float], window: int) -> np.ndarray:
    padded = np.pad(np.asarray(values, dtype=float), (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.ones(window) / window, mode="valid")


def loss_figure(log_history: Sequence[dict[str, float]], loss_weight: float) -> Figure:
    """Main, autoregressive and total loss, and the skill, over the optimizer steps that a Trainer logged."""
    logs = [entry for entry in log_history if "main_loss" in entry]
    if not logs:
        raise ValueError("the log history holds no main_loss: it is not one of AutoregressiveTrainer")
    steps = [entry["step"] for entry in logs]
    panels = (
        ("main_loss", "main loss (answers)"),
        ("autoregressive_loss", "autoregressive loss (next frame)"),
        ("total_loss", f"total = main + {loss_weight:g} x autoregressive"),
        ("skill", "skill on the training batches"),
    )
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    window = max(1, len(logs) // 20)
    for ax, (name, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        values = [entry.get(name, np.nan) for entry in logs]
        ax.plot(steps, values, color=_BLUE, alpha=0.3, linewidth=0.8)
        ax.plot(steps, _smooth(values, window), color=_BLUE, linewidth=1.6)
        if name == "skill":
            ax.axhline(0, color=_GRAY, linewidth=1, linestyle="--")
            ax.annotate("copying the last frame", (1, 0), xycoords=("axes fraction", "data"), fontsize=7,
                        ha="right", va="bottom", color=_GRAY)  # fmt: skip
        else:
            ax.set_ylim(bottom=0)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("step", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _accuracy_bars(series: Sequence[tuple[str, str, dict[str, Any], str]], label: str) -> Figure:
    """Groups of bars over question types, with intervals, and the chance level as a line across each group.

    Args:
        series: label, colour, `by_type` of an evaluation, and which of its accuracies.
        label: of the vertical axis.
    """
    names = list(series[-1][2])
    figure = Figure(figsize=(min(1.3 * len(names) + 2.2, 16), 2.8), layout="constrained")
    ax = figure.subplots()
    width = 0.8 / len(series)
    for place, name in enumerate(names):
        for number, (_, colour, by_type, key) in enumerate(series):
            summary = by_type.get(name)
            if summary is None or key not in summary:
                continue
            value, interval = summary[key], summary.get(f"{key}_interval")
            error = None if not interval else [[max(value - interval[0], 0)], [max(interval[1] - value, 0)]]
            x = place + (number - (len(series) - 1) / 2) * width
            ax.bar(x, value, 0.9 * width, color=colour, yerr=error, error_kw={"linewidth": 0.8, "ecolor": "#333333"})
            top = value if error is None else value + error[1][0]
            ax.annotate(f"{value:.2f}", (x, top + 0.01), ha="center", va="bottom", fontsize=8 if width > 0.3 else 6.5)
        if "chance" in series[-1][2][name]:
            ax.hlines(series[-1][2][name]["chance"], place - 0.42, place + 0.42, color=_ORANGE, linewidth=1.8)
    ax.set_xticks(range(len(names)), names, fontsize=9, rotation=0 if len(names) < 8 else 30)
    ax.set_ylim(0, 1.12)
    ax.set_ylabel(label, fontsize=8)
    ax.tick_params(axis="y", labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour, label=name) for name, colour, _, _ in series]
    handles.append(Line2D([], [], color=_ORANGE, linewidth=1.8, label="chance"))
    ax.legend(handles=handles, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def accuracy_figure(before: dict[str, Any], after: dict[str, Any]) -> Figure:
    """Accuracy of each question type before and after training, beside chance; `by_type` of two evaluations."""
    series = [("before", _LIGHT, before, "exact"), ("after", _BLUE, after, "exact")]
    return _accuracy_bars(series, "exact match, held-out clips")


def answers_figure(by_type: dict[str, Any]) -> Figure:
    """Each kind of accuracy that one evaluation measured, by question type, beside chance."""
    kinds = (
        ("exact match", _LIGHT, "exact"),
        ("choice, generated", _BLUE, "choice"),
        ("choice, likelihood", _GREEN, "likelihood"),
    )
    measured = {key for summary in by_type.values() for key in summary}
    series = [(label, colour, by_type, key) for label, colour, key in kinds if key in measured]
    return _accuracy_bars(series, "share of right answers")


def gap_figure(by_horizon: dict[str, Any]) -> Figure:
    """Skill and temporal consistency over the seconds to the predicted frame, a line for each horizon.

    Args:
        by_horizon: of the `reconstruction` of an evaluation.
    """
    figure = Figure(figsize=(11, 3), layout="constrained")
    skill_ax, consistency_ax = figure.subplots(1, 2)
    places = sorted({entry["gap"] for summary in by_horizon.values() for entry in summary["by_gap"]})
    for (horizon, summary), colour in zip(by_horizon.items(), (_BLUE, _GREEN, _ORANGE, _GRAY) * 9, strict=False):
        for ax, name in ((skill_ax, "skill"), (consistency_ax, "temporal_consistency")):
            some = [entry for entry in summary["by_gap"] if entry[name] is not None]
            x, y = [places.index(entry["gap"]) for entry in some], [entry[name] for entry in some]
            bounds = [entry[f"{name}_interval"] or [entry[name]] * 2 for entry in some]
            error = [[max(v - low, 0) for v, (low, _) in zip(y, bounds, strict=True)],
                     [max(high - v, 0) for v, (_, high) in zip(y, bounds, strict=True)]]  # fmt: skip
            frames = "frame" if horizon == "1" else "frames"
            ax.errorbar(x, y, yerr=error, color=colour, marker="o", markersize=4, linewidth=1.2, elinewidth=0.8,
                        capsize=2, label=f"{horizon} {frames} ahead")  # fmt: skip
            for entry, place, value in zip(some, x, y, strict=True):
                ax.annotate(f"n={entry['num_frames']}", (place, value), xytext=(5, 4), textcoords="offset points",
                            fontsize=7, color=_GRAY)  # fmt: skip
        some = summary["by_gap"]
        consistency_ax.plot([places.index(entry["gap"]) for entry in some],
                            [entry["temporal_consistency_chance"] for entry in some], color=_GRAY, linestyle="--",
                            marker="_", linewidth=1, label="blind guess" if horizon == "1" else None)  # fmt: skip
    skill_ax.axhline(0, color=_GRAY, linewidth=1, linestyle="--", label="copying the last frame")
    skill_ax.set_title("skill", fontsize=10)
    consistency_ax.set_title("temporal consistency", fontsize=10)
    consistency_ax.set_ylim(0, 1.05)
    for ax in (skill_ax, consistency_ax):
        ax.set_xticks(range(len(places)), [f"{place:g}" for place in places])
        ax.set_xlabel("seconds from the last seen to the predicted frame (bins around powers of two)", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.margins(x=0.12)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, frameon=False)
    return figure


def surprise_figure(prediction: Any, timestamps: Sequence[float], title: str) -> Figure:
    """Error of each predicted frame relative to that of copying the last one."""
    metrics = prediction.frame_metrics
    figure = Figure(figsize=(6, 2.3), layout="constrained")
    ax = figure.subplots()
    times = [timestamps[t] for t in prediction.frame_index.tolist()]
    ax.plot(times, metrics["mse"].tolist(), marker="o", markersize=4, color=_BLUE, label="prediction")
    ax.plot(times, metrics["copy_mse"].tolist(), marker="o", markersize=4, color=_GRAY, label="copying the last frame")
    ax.set(ylim=(0, None))
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("seconds", fontsize=8)
    ax.set_ylabel("mse", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)
    return figure


# -- The page


def _picture(png: bytes, alt: str, width: int | None = None) -> str:
    data = base64.b64encode(png).decode("ascii")
    size = f' style="width:{width}px"' if width else ""
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}"{size}>'


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}"
    "img{max-width:100%;margin:.5em 0}table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;"
    "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
    "pre{background:#f5f5f5;padding:.8em;overflow-x:auto;font-size:13px}h2{margin-top:1.8em}"
    ".note{color:#555}"
)


class Report:
    """Sections of text, tables, code and pictures, in the order in which they are added."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, note: bool = False) -> None:
        self._parts.append(f"<p{' class=note' if note else ''}>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """The first row is the header."""
        head, *body = ("".join(f"<{{0}}>{html.escape(cell)}</{{0}}>" for cell in row) for row in rows)
        lines = [head.replace("{0}", "th"), *(line.replace("{0}", "td") for line in body)]
        self._parts.append("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")

    def picture(self, path: Path, width: int | None = None) -> None:
        self._parts.append(_picture(path.read_bytes(), path.stem, width))

    def figure(self, figure: Figure, alt: str, width: int | None = None) -> None:
        """A figure that is not in a file; `alt` says what it shows to those who cannot see it."""
        buffer = io.BytesIO()
        # Without the date and version that matplotlib adds, equal results give equal pages.
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        self._parts.append(_picture(buffer.getvalue(), alt, width))

    def write(self, path: Path) -> None:
        body = "\n".join(self._parts)
        title = html.escape(self.title)
        path.write_text(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
            f"</head><body><h1>{title}</h1>\n{body}\n</body></html>\n",
            encoding="utf-8",
        )
