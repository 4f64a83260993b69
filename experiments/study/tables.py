"""Tables with intervals, and plots, from the runs of the study.

Each number is a mean over seeds with its 95% t interval. A variant is compared with the first one of its experiment seed by
seed. Equal seeds have the same first weights and the same order of samples, so that the interval of the differences is
narrower than those of the means. Pairs of possible and impossible clips are resampled instead (bootstrap): there, the choice
of the pairs is the greater uncertainty.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..sources.metaworld_clips import APPEARANCES
from ..temporal.questions import QUESTION_TYPES, unordered_ceiling
from .ceilings import ORDERED_VIEWS, UNORDERED_VIEWS
from .data import SimulatedSettings
from .runs import read_run
from .variants import EXPERIMENTS, Experiment, RunSettings, Variant

# 97.5% quantile of Student's t for 1, 2... degrees of freedom
T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
BOOTSTRAP_SAMPLES = 10_000
CEILINGS = "simulated_ceilings.json"
"""File of the linear ceilings in the folder of the runs."""
# The main score of a clip, chosen on the development split, and its baseline without a model. Both know the frame of the event
# (oracle); `AGNOSTIC_SCORE` does not.
SURPRISE_SCORE, CHEAP_SCORE = "error_at_event", "difference_at_event"
AGNOSTIC_SCORE = "error_frame"

Ceilings = Mapping[str, Mapping[str, Any]]
"""By question type: the accuracy of each linear probe."""
Runs = Mapping[str, Sequence[dict[str, Any]]]
"""By name of the variant its runs, of the seeds that all variants have."""


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of a run


def accuracy(run: dict[str, Any], question_type: str | None = None, answers: str = "answers") -> float:
    """Share of right answers, of all questions or those of a type."""
    digits = run[answers]
    return _share("".join(digits.values()) if question_type is None else digits[question_type])


def _share(digits: str) -> float:
    return digits.count("1") / len(digits)


def pair_accuracy(run: dict[str, Any], score: str, event: str | None = None) -> float:
    """Share of pairs, of all or those of an event, in which the impossible clip scores higher; a tie counts half."""
    return float(pair_wins(run, score, event).mean())


def pair_wins(run: dict[str, Any], score: str, event: str | None = None) -> np.ndarray:
    """For each pair 1, 0.5 or 0; without `event` for all pairs in which something impossible happens."""
    by_event = run["pairs"][score]
    impossible = "".join(digits for name, digits in by_event.items() if name not in APPEARANCES)
    digits = impossible if event is None else by_event[event]
    return np.array([int(digit) / 2 for digit in digits])


MEASURES: Mapping[str, Callable[[dict[str, Any]], float]] = {
    "accuracy": accuracy,
    "accuracy, frames shuffled": lambda run: accuracy(run, answers="answers_shuffled"),
    "mse": lambda run: run["frames"]["mse"],
    "skill": lambda run: run["frames"]["skill"],
    "skill of a straight line": lambda run: run["frames"]["linear_skill"],
    "temporal consistency": lambda run: run["frames"]["temporal_consistency"],
    "impossible clip worse predicted, at the event": lambda run: pair_accuracy(run, SURPRISE_SCORE),
    "impossible clip worse predicted, moment unknown": lambda run: pair_accuracy(run, AGNOSTIC_SCORE),
}


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of some seeds, and half the width of its 95% t interval (NaN for one seed)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    return mean, T_QUANTILES[len(values) - 2] * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def bootstrap_of_mean(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of a mean over redrawn values."""
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(values), size=(BOOTSTRAP_SAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def _cell(values: Sequence[float], signed: bool = False) -> str:
    mean, half = mean_interval(values)
    text = f"{mean:+.3f}" if signed else f"{mean:.3f}"
    return text if math.isnan(half) else f"{text} ± {half:.3f}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def read_experiment(experiment: Experiment, common: RunSettings, results: Path) -> Runs:
    """The runs of the seeds that all variants have; a variant without any run is left out."""
    found = {
        variant.name: {
            seed: run
            for seed in range(experiment.num_seeds)
            if (run := read_run(results, variant, common, seed)) is not None
        }
        for variant in experiment.variants
    }
    found = {name: runs for name, runs in found.items() if runs}
    seeds = set.intersection(*map(set, found.values())) if found else set()
    return {name: [runs[seed] for seed in sorted(seeds)] for name, runs in found.items() if seeds}


def format_table(experiment: Experiment, runs: Runs, ceilings: Ceilings = MappingProxyType({})) -> str:
    """Markdown: all measures of all variants, their differences from the first one, and accuracy by question type.

    Args:
        ceilings: of the question types that the temporal benchmark does not have.
    """
    variants = [variant for variant in experiment.variants if variant.name in runs]
    num_seeds = len(runs[variants[0].name])
    missing = [variant.name for variant in experiment.variants if variant.name not in runs]
    complete = not missing and num_seeds == experiment.num_seeds
    lines = [f"### {experiment.title}", "", f"{num_seeds} of {experiment.num_seeds} seeds each."]
    lines += [] if complete else ["This table was interrupted: some runs are missing."]
    lines += [f"Not run: {', '.join(missing)}."] if missing else []
    header = [
        "",
        *(variant.title for variant in variants),
        *(f"{variant.title}, less {variants[0].title}" for variant in variants[1:]),
    ]
    rows = [[name, *_row(variants, runs, measure)] for name, measure in MEASURES.items()]
    lines += ["", *markdown([header, *rows]), "", "Accuracy by question type:", ""]
    types = question_types(runs, variants)
    probed = not set(types) <= set(QUESTION_TYPES)
    header[1:1] = ["best without order", *(f"{view}, linear" for view in ORDERED_VIEWS if probed)]
    rows = [
        [
            name if answers == "answers" else f"{name}, shuffled",
            f"{unordered_ceiling_of(name, ceilings):.2f}",
            *(f"{ceilings[name][view]:.2f}" for view in ORDERED_VIEWS if probed),
            *_row(variants, runs, lambda run, name=name, answers=answers: accuracy(run, name, answers)),
        ]
        for name in types
        for answers in ("answers", "answers_shuffled")
    ]
    return "\n".join([*lines, *markdown([header, *rows]), "", *_pair_lines(variants, runs)])


def question_types(runs: Runs, variants: Sequence[Variant]) -> list[str]:
    """Those of the runs, in a fixed order."""
    known = [*QUESTION_TYPES, *SimulatedSettings().question_types]
    return sorted(runs[variants[0].name][0]["answers"], key=known.index)


def read_ceilings(results: Path) -> Ceilings:
    """Accuracies of the linear probes by question type; empty if they were not measured."""
    path = results / CEILINGS
    if not path.exists():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["question_types"]
    return {entry["question_type"]: entry for entry in entries}


def unordered_ceiling_of(question_type: str, ceilings: Ceilings) -> float:
    """The best accuracy without the order of the shown frames: by construction, or of the linear probes."""
    if question_type not in ceilings:  # `next` exists in both
        return unordered_ceiling(question_type, len(RunSettings().data.shown_frames))[0]
    return max(ceilings[question_type][view] for view in UNORDERED_VIEWS)


def ceilings_table(ceilings: Ceilings) -> str:
    """Markdown: the accuracy of each probe by question type."""
    views = (*UNORDERED_VIEWS, *ORDERED_VIEWS)
    rows = [["question type", "training clips", "test clips", "chance", *views]]
    rows += [
        [
            name,
            str(own["num_train"]),
            str(own["num_test"]),
            f"{own['chance']:.2f}",
            *(f"{own[view]:.3f}" for view in views),
        ]
        for name, own in ceilings.items()
    ]
    return "\n".join(["### Linear ceilings, clips of simulators", "", *markdown(rows)])


def _row(variants: Sequence[Variant], runs: Runs, measure: Callable[[dict[str, Any]], float]) -> list[str]:
    values = [[measure(run) for run in runs[variant.name]] for variant in variants]
    differences = [np.subtract(some, values[0]).tolist() for some in values[1:]]
    return [*map(_cell, values), *(_cell(some, signed=True) for some in differences)]


def _pair_lines(variants: Sequence[Variant], runs: Runs) -> list[str]:
    """Share of pairs whose impossible clip scores higher, for each score, with intervals over pairs."""
    scores = list(runs[variants[0].name][0]["pairs"])
    header = ["score of a clip", *(variant.title for variant in variants)]
    rows = []
    for score in scores:
        cells = []
        for variant in variants:
            wins = np.mean([pair_wins(run, score) for run in runs[variant.name]], axis=0)
            low, high = bootstrap_of_mean(wins)
            cells.append(f"{wins.mean():.3f} [{low:.2f}, {high:.2f}]")
        rows.append([score, *cells])
    for where in ("at_event", "frame"):
        # By variant, since a layout may pool the features; without a model, and so the same for all seeds.
        baselines = {
            f"difference_{where}": {
                variant.name: pair_wins(runs[variant.name][0], f"difference_{where}") for variant in variants
            }
        }
        if variants[0].settings(RunSettings()).head.get("loss_weight") == 0:
            # A head that nothing has trained copies, so that its surprise is the frame difference, normalized.
            untrained = pair_wins(runs[variants[0].name][0], f"surprise_{where}")
            baselines[f"normalized difference_{where}"] = {variant.name: untrained for variant in variants}
        for name, baseline in baselines.items():
            for score in (f"error_{where}", f"surprise_{where}"):
                ahead = []
                for variant in variants:
                    without = baseline[variant.name]
                    difference = np.mean([pair_wins(run, score) - without for run in runs[variant.name]], axis=0)
                    low, high = bootstrap_of_mean(difference)
                    ahead.append(f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
                rows.append([f"{score}, less {name}", *ahead])
    return [
        "Pairs in which the impossible clip scores higher (intervals over pairs):",
        "",
        *markdown([header, *rows]),
        "",
        f"The same by event, for {SURPRISE_SCORE} (and first for {CHEAP_SCORE}, which no model has a part in):",
        "",
        *markdown([["event", CHEAP_SCORE, *(variant.title for variant in variants)], *_event_rows(variants, runs)]),
    ]


def _event_rows(variants: Sequence[Variant], runs: Runs) -> list[list[str]]:
    columns = [(variants[0], CHEAP_SCORE), *((variant, SURPRISE_SCORE) for variant in variants)]
    return [
        [
            event,
            *(
                f"{np.mean([pair_accuracy(run, score, event) for run in runs[variant.name]]):.3f}"
                for variant, score in columns
            ),
        ]
        for event in runs[variants[0].name][0]["pairs"][CHEAP_SCORE]
    ]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is the header."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]


def write_tables(names: Sequence[str], common: RunSettings, results: Path) -> str:
    """Write `<experiment>.md` and plots into the folder of the runs, for each experiment that has any; returns the text."""
    texts, ceilings = [], read_ceilings(results)
    if ceilings:
        texts.append(ceilings_table(ceilings))
        (results / CEILINGS).with_suffix(".md").write_text(texts[-1] + "\n", encoding="utf-8")
    for name in names:
        experiment = EXPERIMENTS[name]
        runs = read_experiment(experiment, common, results)
        if not runs:
            texts.append(f"### {experiment.title}\n\nNot run.")
            continue
        texts.append(format_table(experiment, runs, ceilings))
        (results / f"{name}.md").write_text(texts[-1] + "\n", encoding="utf-8")
        variants = [variant for variant in experiment.variants if variant.name in runs]
        figures = {
            "curves": curves_figure(variants, runs),
            "types": types_figure(variants, runs, ceilings),
            "type_curves": type_curves_figure(variants, runs, ceilings),
        }
        for kind, figure in figures.items():
            figure.savefig(results / f"{name}_{kind}.png", dpi=80, metadata={"Software": None})
    return "\n\n".join(texts)


# ---------------------------------------------------------------------------------------------------------------------
# Plots


def curves_figure(variants: Sequence[Variant], runs: Runs) -> Figure:
    """Accuracy, skill and pairs on the development split over training; thin lines are single seeds."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    measures = {
        "accuracy": lambda point: point["accuracy"],
        "skill": lambda point: point["skill"],
        "impossible clip worse predicted": lambda point: point["pairs"][SURPRISE_SCORE],
    }
    for axes, (name, measure) in zip(figure.subplots(1, len(measures)), measures.items(), strict=True):
        _draw_curves(axes, variants, runs, measure)
        axes.set(xlabel="step", title=name)
    axes.legend(fontsize="small")
    return figure


def _draw_curves(
    axes: Axes, variants: Sequence[Variant], runs: Runs, measure: Callable[[dict[str, Any]], float]
) -> None:
    """The measure of each point of the curves; thin lines are single seeds."""
    for number, variant in enumerate(variants):
        steps = [point["step"] for point in runs[variant.name][0]["curve"]]
        values = np.array([[measure(point) for point in run["curve"]] for run in runs[variant.name]])
        axes.plot(steps, values.T, color=f"C{number}", linewidth=0.6, alpha=0.5)
        axes.plot(steps, values.mean(0), color=f"C{number}", linewidth=2, label=variant.title)


def type_curves_figure(variants: Sequence[Variant], runs: Runs, ceilings: Ceilings = MappingProxyType({})) -> Figure:
    """Accuracy of each question type on the development split over training; dashed: the best accuracy without order."""
    types = question_types(runs, variants)
    figure = Figure(figsize=(3 * len(types), 2.8), layout="constrained")
    for axes, question_type in zip(figure.subplots(1, len(types), squeeze=False)[0], types, strict=True):
        _draw_curves(axes, variants, runs, lambda point, name=question_type: _share(point["answers"][name]))
        axes.axhline(unordered_ceiling_of(question_type, ceilings), color="black", linewidth=1, linestyle="--")
        axes.set(xlabel="step", title=question_type, ylim=(0, 1.02))
    axes.legend(fontsize="small")
    return figure


def types_figure(variants: Sequence[Variant], runs: Runs, ceilings: Ceilings = MappingProxyType({})) -> Figure:
    """Accuracy by question type, with 95% intervals over seeds; the marks are the best accuracy without order."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots()
    types = question_types(runs, variants)
    places, width = np.arange(len(types)), 0.8 / len(variants)
    for number, variant in enumerate(variants):
        stats = [mean_interval([accuracy(run, name) for run in runs[variant.name]]) for name in types]
        means, halves = zip(*stats, strict=True)
        left = places + (number - (len(variants) - 1) / 2) * width
        axes.bar(left, means, width, yerr=np.nan_to_num(halves), color=f"C{number}", label=variant.title)
    axes.scatter(
        places, [unordered_ceiling_of(name, ceilings) for name in types], marker="_", s=400, color="black", zorder=3
    )
    axes.set(xticks=places, xticklabels=types, ylabel="accuracy", ylim=(0, 1))
    axes.legend(fontsize="small")
    return figure
