"""Tables of the controls, with 95% bootstrap intervals over pairs, from their raw numbers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..study.tables import bootstrap_of_mean
from .pairs import IMPOSSIBLE

_PLACES = {
    "mean": "mean over frames (event-agnostic)",
    "max": "greatest frame (event-agnostic)",
    "event": "event frame (oracle)",
}
Scores = Mapping[str, Sequence[Mapping[str, Any]]]
"""By name of a row its scores by place: one, or one for each seed."""


def rows_of(numbers: Mapping[str, Any]) -> Scores:
    """Scores in the order of the tables; those of several seeds in one row."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for name, places in numbers["scores"].items():
        score, _, origin = name.partition(" | ")
        row = {"untrained": f"{score}, head without training", "random tower": f"{score}, random tower"}.get(
            origin, score
        )
        rows.setdefault(row, []).append(places)
    first = [name for name in rows if name in ("prediction error", "surprise")]
    return {name: rows[name] for name in (*first, *(name for name in rows if name not in first))}


def shares(places: Sequence[Mapping[str, Any]], place: str, kind: str, change: str) -> np.ndarray | None:
    """For each pair 0 to 1, the mean over seeds; None where the score is not defined."""
    if any(place not in own or change not in own[place][kind] for own in places):
        return None
    most = 1 if kind == "alarms" else 2
    return np.mean([[int(digit) / most for digit in own[place][kind][change]] for own in places], axis=0)


def _cell(values: np.ndarray | None) -> str:
    if values is None or not len(values):
        return "-"
    low, high = bootstrap_of_mean(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def separation_rows(numbers: Mapping[str, Any]) -> list[list[str]]:
    """Share of pairs in which the impossible clip scores higher than the possible one."""
    rows = [["score", *_PLACES.values()]]
    for name, places in rows_of(numbers).items():
        rows.append([name, *(_cell(shares(places, place, "wins", IMPOSSIBLE)) for place in _PLACES)])
    return rows


def change_rows(numbers: Mapping[str, Any], place: str, kind: str) -> list[list[str]]:
    """Share of pairs by score and harmless change: harmless above possible (`wins`), impossible above harmless (`over`)."""
    rows = [["score", *numbers["changes"]]]
    for name, places in rows_of(numbers).items():
        cells = [shares(places, place, kind, change) for change in numbers["changes"]]
        if any(cell is not None for cell in cells):
            rows.append([name, *map(_cell, cells)])
    return rows


def alarm_rows(numbers: Mapping[str, Any], place: str) -> list[list[str]]:
    """Share of clips above the threshold of each score."""
    kinds = ["possible", IMPOSSIBLE, *numbers["changes"]]
    rows = [["score", *kinds]]
    for name, places in rows_of(numbers).items():
        cells = [shares(places, place, "alarms", kind) for kind in kinds]
        if any(cell is not None for cell in cells):
            rows.append([name, *map(_cell, cells)])
    return rows


def gain_rows(numbers: Mapping[str, Any]) -> list[list[str]]:
    """Prediction error and surprise, less the best score that learns nothing, by place; paired."""
    rows = [["score", *_PLACES.values()]]
    all_rows = rows_of(numbers)
    learned = {name: all_rows[name] for name in ("prediction error", "surprise") if name in all_rows}
    for name, places in learned.items():
        cells = []
        for place in _PLACES:
            free = {
                other: values
                for other, own in all_rows.items()
                if other not in learned and (values := shares(own, place, "wins", IMPOSSIBLE)) is not None
            }
            if not free or place not in places[0]:
                cells.append("-")
                continue
            best = max(free, key=lambda other: free[other].mean())
            difference = shares(places, place, "wins", IMPOSSIBLE) - free[best]
            low, high = bootstrap_of_mean(difference)
            cells.append(f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}] over {best}")
        rows.append([name, *cells])
    return rows


def event_rows(numbers: Mapping[str, Any], place: str) -> list[list[str]]:
    """The separation by event."""
    events = sorted(set(numbers["events"]))
    rows = [["score", *events]]
    for name, places in rows_of(numbers).items():
        values = shares(places, place, "wins", IMPOSSIBLE)
        if values is not None:
            means = [values[[own == event for own in numbers["events"]]].mean() for event in events]
            rows.append([name, *(f"{mean:.2f}" for mean in means)])
    return rows


def format_tables(numbers: Mapping[str, Any]) -> str:
    """Markdown of all tables of a source."""
    seeds, pairs = numbers["seeds"], len(numbers["events"])
    models = f"variant `{numbers['variant']}`, seeds {', '.join(map(str, seeds))}" if seeds else "none"
    parts = [
        f"## Pairs: {numbers['source']}",
        f"{pairs} pairs; models: {models}.",
        "Share of pairs in which the impossible clip scores higher than the possible one (0.5: no separation):",
        _markdown(separation_rows(numbers)),
    ]
    if seeds:
        parts += [
            "The learned scores, less the best of the others, chosen on these very pairs:",
            _markdown(gain_rows(numbers)),
        ]
    for place, name in _PLACES.items():
        parts += [f"By event, {name}:", _markdown(event_rows(numbers, place))]
    for place, name in _PLACES.items():
        parts += [
            f"Share of pairs in which a harmless change makes the clip score higher (0.5: the "
            f"change does not count), {name}:",
            _markdown(change_rows(numbers, place, "wins")),
            f"Share of pairs in which the impossible clip scores higher than the possible one with a harmless change, {name}:",
            _markdown(change_rows(numbers, place, "over")),
        ]
    for place, name in _PLACES.items():
        parts += [
            f"Share of clips called impossible, {name}. The threshold is the 95% quantile of "
            f"{numbers['num_reference']} possible clips of the development split:",
            _markdown(alarm_rows(numbers, place)),
        ]
    return "\n\n".join(parts) + "\n"


def write_tables(results: Path) -> str:
    """Writes `controls.md` beside the raw numbers; returns the text.

    Raises:
        FileNotFoundError: if the folder holds no raw numbers.
    """
    paths = sorted(results.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"{results} holds no raw numbers of controls: `run` makes them")
    text = "\n".join(
        ["# Controls for violation of expectation\n", *(format_tables(json.loads(p.read_text())) for p in paths)]
    )
    (results / "controls.md").write_text(text, encoding="utf-8")
    return text
