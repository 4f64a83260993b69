"""A self-contained HTML page, and plots of training and evaluation."""

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

_GRAY, _LIGHT, _BLUE, _GREEN, _ORANGE = "#888888", "#cccccc", "#2563a8", "#4d9078", "#d2691e"


# -- Figures


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
    ax.set_xticks(range(len(names)), names, fontsize=9, rotation=0 if len(names) < 8 else 30, parse_math=False)
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
        by_horizon: summaries with `by_gap`, by how many frames ahead they are, in words.
    """
    figure = Figure(figsize=(11, 3), layout="constrained")
    skill_ax, consistency_ax = figure.subplots(1, 2)
    first = next(iter(by_horizon.values()))
    places = sorted({entry["gap"] for summary in by_horizon.values() for entry in summary["by_gap"]})
    for (horizon, summary), colour in zip(by_horizon.items(), (_BLUE, _GREEN, _ORANGE, _GRAY) * 9, strict=False):
        for ax, name in ((skill_ax, "skill"), (consistency_ax, "temporal_consistency")):
            some = [entry for entry in summary["by_gap"] if entry[name] is not None]
            x, y = [places.index(entry["gap"]) for entry in some], [entry[name] for entry in some]
            bounds = [entry[f"{name}_interval"] or [entry[name]] * 2 for entry in some]
            error = [[max(v - low, 0) for v, (low, _) in zip(y, bounds, strict=True)],
                     [max(high - v, 0) for v, (_, high) in zip(y, bounds, strict=True)]]  # fmt: skip
            ax.errorbar(x, y, yerr=error, color=colour, marker="o", markersize=4, linewidth=1.2, elinewidth=0.8,
                        capsize=2, label=f"frames ahead: {horizon}")  # fmt: skip
            for entry, place, value in zip(some, x, y, strict=True):
                ax.annotate(f"n={entry['num_frames']}", (place, value), xytext=(5, 4), textcoords="offset points",
                            fontsize=7, color=_GRAY)  # fmt: skip
        some = summary["by_gap"]
        consistency_ax.plot([places.index(entry["gap"]) for entry in some],
                            [entry["temporal_consistency_chance"] for entry in some], color=_GRAY, linestyle="--",
                            marker="_", linewidth=1, label="blind guess" if summary is first else None)  # fmt: skip
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


def horizon_figure(by_horizon: dict[str, Any]) -> Figure:
    """Mean error of the predictions over how many frames ahead they are, beside the two ways that need no model.

    Args:
        by_horizon: of the `rollout` in the `reconstruction` of an evaluation.
    """
    figure = Figure(figsize=(5.5, 3), layout="constrained")
    ax = figure.subplots()
    for name, label, colour in (
        ("mse", "predicted", _BLUE),
        ("copy_mse", "copying the last frame", _GRAY),
        ("linear_mse", "straight line through the last two", _ORANGE),
    ):
        ax.plot(list(by_horizon), [summary[name] for summary in by_horizon.values()], color=colour, marker="o",
                markersize=4, linewidth=1.2, linestyle="-" if name == "mse" else "--", label=label)  # fmt: skip
    ax.set_yscale("log")  # a straight line is soon many times as far off
    ax.set_xlabel("frames ahead", fontsize=8)
    ax.set_title("mean squared error", fontsize=10)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)
    return figure


# -- The page


_STYLE = """\
:root{color-scheme:light dark;--paper:#fff;--ink:#1f2328;--pale:#59636e;--line:#d9dee3;--shade:#f4f5f7;--link:#0969da}
@media(prefers-color-scheme:dark){:root{--paper:#15191e;--ink:#e6e9ed;--pale:#9aa4af;--line:#343b44;--shade:#1f252c;--link:#6cb6ff}}
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:var(--ink);background:var(--paper)}
h1,h2,li,p{overflow-wrap:anywhere}a{color:var(--link)}h2{margin-top:1.8em}h3{margin:1.6em 0 .3em}
h2+p,h3+p{margin-top:.3em}
figure,.wide{margin:.6em 0;overflow-x:auto}
img{max-width:max(100%,40rem);height:auto;display:block;border-radius:4px;background:#fff}
figcaption,.note{color:var(--pale)}
table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid var(--line)}
td:first-child,th:first-child{text-align:left}
.facts td{text-align:left;vertical-align:top;overflow-wrap:anywhere}
.facts td:first-child{white-space:nowrap;color:var(--pale)}
pre{background:var(--shade);padding:.8em;overflow-x:auto;font-size:13px}
"""


class Report:
    """Sections of text, tables, code and pictures, in the order in which they are added.

    The page is one file that asks for no other, follows the reader's choice of light or dark, and fits narrow screens:
    what is too wide for them scrolls by itself.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str, level: int = 2, anchor: str | None = None) -> None:
        """`anchor` is what `contents` links to."""
        place = "" if anchor is None else f' id="{html.escape(anchor)}"'
        self._parts.append(f"<h{level}{place}>{html.escape(text)}</h{level}>")

    def contents(self, anchors: dict[str, str]) -> None:
        """Links to headings by their anchors, with their text."""
        links = (f'<li><a href="#{html.escape(anchor)}">{html.escape(text)}</a>' for anchor, text in anchors.items())
        self._parts.append(f"<ul>{''.join(links)}</ul>")

    def text(self, text: str, note: bool = False) -> None:
        """A paragraph; words between backticks are set as code."""
        marked = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))
        self._parts.append(f"<p{' class=note' if note else ''}>{marked}</p>")

    def code(self, text: str) -> None:
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """The first row is the header."""
        head, *body = rows
        lines = [_table_row(head, "th"), *(_table_row(row, "td") for row in body)]
        self._parts.append(f'<div class="wide"><table>{"".join(lines)}</table></div>')

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        """Names and what they are, in a table without a header."""
        lines = "".join(_table_row(row, "td") for row in rows)
        self._parts.append(f'<div class="wide"><table class="facts">{lines}</table></div>')

    def picture(self, path: Path, width: int | None = None, alt: str | None = None) -> None:
        """A PNG file. `width` in pixels of the page; `alt` says what it shows to those who cannot see it."""
        self._picture(path.read_bytes(), path.stem if alt is None else alt, width)

    def figure(self, figure: Figure, alt: str, width: int | None = None) -> None:
        """A figure that is not in a file."""
        buffer = io.BytesIO()
        # Without the date and version that matplotlib adds, equal results give equal pages.
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        self._picture(buffer.getvalue(), alt, width)

    def _picture(self, png: bytes, alt: str, width: int | None) -> None:
        data = base64.b64encode(png).decode("ascii")
        size = f' style="width:{width}px"' if width else ""
        self._parts.append(f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(alt)}"{size}></figure>')

    def write(self, path: Path) -> None:
        body = "\n".join(self._parts)
        title = html.escape(self.title)
        path.write_text(
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            # Without it, browsers ask the server for an icon.
            f'<link rel="icon" href="data:,"><title>{title}</title><style>{_STYLE}</style>'
            f"</head><body><h1>{title}</h1>\n{body}\n</body></html>\n",
            encoding="utf-8",
        )


def _table_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
