"""Compact tables of the experiments on recorded clips, as docs/study.md shows them."""

from collections.abc import Sequence

import numpy as np

from ..sources.metaworld_clips import APPEARANCES, MOTIONS
from .tables import (
    MEASURES,
    ORDERED_VIEWS,
    Ceilings,
    Runs,
    accuracy,
    bootstrap_of_mean,
    markdown,
    mean_interval,
    pair_wins,
    question_types,
    unordered_ceiling_of,
)
from .variants import Experiment

NUM_DIGITS = 2


def _cell(values: Sequence[float], sign: str = "") -> str:
    mean, half = mean_interval(values)
    text = f"{mean:{sign}.{NUM_DIGITS}f}"
    return text if np.isnan(half) else f"{text} ± {half:.{NUM_DIGITS}f}"


def accuracy_summary(experiment: Experiment, runs: Runs, ceilings: Ceilings) -> str:
    """Markdown: accuracy by question type beside its ceilings, and the paired difference of the last and the first variant."""
    variants = [variant for variant in experiment.variants if variant.name in runs]
    first, last = runs[variants[0].name], runs[variants[-1].name]
    header = ["", "best without order", *(f"{view}, linear" for view in ORDERED_VIEWS)]
    header += [variant.title for variant in variants]
    header += [f"{variants[-1].title}, frames shuffled"]
    header += [f"{variants[-1].title}, less {variants[0].title}"] if len(variants) > 1 else []
    rows = [header]
    for name in question_types(runs, variants):
        own = [[accuracy(run, name) for run in runs[variant.name]] for variant in variants]
        shuffled = [accuracy(run, name, "answers_shuffled") for run in last]
        bounds = [unordered_ceiling_of(name, ceilings), *(ceilings[name][view] for view in ORDERED_VIEWS)]
        rows.append(
            [
                name,
                *(f"{bound:.{NUM_DIGITS}f}" for bound in bounds),
                *map(_cell, own),
                _cell(shuffled),
                _cell(np.subtract(own[-1], own[0]).tolist(), "+"),
            ]
        )
    for name in ("accuracy", "skill", "temporal consistency"):
        own = [[MEASURES[name](run) for run in runs[variant.name]] for variant in variants]
        difference = np.subtract([MEASURES[name](run) for run in last], [MEASURES[name](run) for run in first])
        shuffled = _cell([MEASURES["accuracy, frames shuffled"](run) for run in last]) if name == "accuracy" else ""
        rows.append(["all types" if name == "accuracy" else name, *[""] * 3, *map(_cell, own), shuffled,
                     _cell(difference.tolist(), "+")])  # fmt: skip
    return "\n".join(markdown([row[: len(header)] for row in rows]))


def event_summary(experiment: Experiment, runs: Runs) -> str:
    """Markdown: share of pairs in which the clip with the event scores higher, by event, for the last variant.

    Event frame known (oracle) and event-agnostic, with 95% intervals over pairs for all impossible events, those with a sudden
    change and those without.
    """
    last = [variant for variant in experiment.variants if variant.name in runs][-1]
    events = list(runs[last.name][0]["pairs"]["error_frame"])
    impossible = [name for name in events if name not in APPEARANCES]
    groups = {
        "impossible, with a sudden change": [name for name in impossible if name not in MOTIONS],
        "impossible, without a sudden change": [name for name in impossible if name in MOTIONS],
        "harmless change of the appearance": [name for name in events if name in APPEARANCES],
    }
    scores = [f"{what}_{where}" for where in ("at_event", "frame") for what in ("difference", "error", "surprise")]
    rows = [["pairs", "number", *(score.replace("_", " ") for score in scores)]]
    for title, names in groups.items():
        for label, own in [(title, names), *((f"- {name}", [name]) for name in names)]:
            if not own:
                continue
            wins = {
                score: np.concatenate(
                    [np.mean([pair_wins(run, score, name) for run in runs[last.name]], axis=0) for name in own]
                )
                for score in scores
            }
            rows.append([label, str(len(wins[scores[0]])), *(_share(own, label == title) for own in wins.values())])
    return "\n".join(markdown(rows))


def _share(wins: np.ndarray, with_interval: bool) -> str:
    text = f"{wins.mean():.{NUM_DIGITS}f}"
    if not with_interval:
        return text
    low, high = bootstrap_of_mean(wins)
    return f"{text} [{low:.{NUM_DIGITS}f}, {high:.{NUM_DIGITS}f}]"
