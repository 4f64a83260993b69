"""Results of an evaluation as JSON, and as tables for people."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .metrics import is_right

# Rows of the tables of wrong answers and of bad samples in a report; the JSON file holds all.
MAX_ROWS = 50


def write_results(results: dict[str, Any], path: Path) -> None:
    """JSON, with one line for each entry of a list of records."""
    parts = []
    for name, value in results.items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join("  " + json.dumps(record) for record in value) + "\n ]"
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        parts.append(f" {json.dumps(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


# -- Tables


def _number(summary: dict[str, Any], name: str) -> str:
    """A number with three digits and, where there is one, its interval."""
    if summary.get(name) is None:
        return "-"
    interval = summary.get(f"{name}_interval")
    return f"{summary[name]:.3f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def answer_rows(answering: dict[str, Any]) -> list[list[str]]:
    rows = [["question type", "questions", "exact", "choice", "likelihood", "chance", "best guess", "unparsable"]]
    types = answering["by_type"] if len(answering["by_type"]) > 1 else {}
    for name, summary in [*types.items(), ("all", answering["all"])]:
        numbers = [_number(summary, key) for key in ("exact", "choice", "likelihood", "chance", "best_guess")]
        rows.append([name, str(summary["num_questions"]), *numbers, str(summary.get("num_unparsable", "-"))])
    return rows


def by_frames_ahead(frames: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every next frame, given all true ones before it, and by horizon the frames that were held back."""
    rollout = frames["rollout"] or {"by_horizon": {}}
    return {
        "1, every frame": frames,
        **{f"{ahead}, held back": summary for ahead, summary in rollout["by_horizon"].items()},
    }


def frame_rows(frames: dict[str, Any]) -> list[list[str]]:
    """For each of `by_frames_ahead` all predictions, then each bin of time gaps."""
    names = ("mse", "copy_mse", "linear_mse", "skill", "cosine", "temporal_consistency", "temporal_consistency_chance")
    heads = ("mse", "copying", "straight line", "skill", "cosine", "temporal consistency", "blind guess")
    rows = [["frames ahead", "seconds", "predictions", "videos", *heads]]
    for horizon, summary in by_frames_ahead(frames).items():
        bins = [(f"{entry['from']:.3g} to {entry['to']:.3g}", entry) for entry in summary["by_gap"]]
        for gap, entry in [("all", summary), *bins]:
            counts = [str(entry["num_frames"]), str(entry["num_videos"])]
            rows.append([horizon, gap, *counts, *(_number(entry, name) for name in names)])
    return rows


def wrong_answers(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers that are wrong by the generated text, or without it by the likelihood."""
    kinds = [next((n for n in ("choice", "exact", "likelihood") if n in answer), None) for answer in answers]
    return [answer for answer, kind in zip(answers, kinds, strict=True) if kind and not is_right(answer, kind)]


def _as_text(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]  # fmt: skip


def remarks(results: dict[str, Any], *, problems: bool = True) -> list[str]:
    """Remarks to read before any number; without `problems`, they hold no path of this computer."""
    notes = []
    if results["settings"]["frame_order"] != "natural":
        notes.append(f"a control: the frames of each video were shown in {results['settings']['frame_order']} order")
    if results["num_bad_samples"]:
        first = f"; the first: {results['bad_samples'][0]['problem']}" if problems else ""
        notes.append(f"{results['num_bad_samples']} entries could not be read and are in no number{first}")
    if results.get("unmeasured_videos"):
        notes.append(
            f"the frames of {len(results['unmeasured_videos'])} videos are in no number: another medium of the first question "
            "about each could not be read"
        )
    rollout = (results["reconstruction"] or {}).get("rollout") or {"left_out": {}}
    for reason, number in rollout["left_out"].items():
        ahead = results["settings"]["horizons"]
        notes.append(
            f"{number} of {rollout['num_videos']} videos are in no number of the frames held back, {ahead} of each: {reason}"
        )
    return notes


def format_results(results: dict[str, Any], *, problems: bool = True) -> str:
    """The results as tables for people, with the remarks."""
    lines = _as_text(answer_rows(results["question_answering"])) + [""]
    frames = results["reconstruction"]
    if frames is None:
        lines.append("next frame: not measured (no head, or no video with two frames)")
    else:
        lines.append(
            f"predicted frames, {frames['num_frames']} in {frames['num_videos']} videos (skill 0 = copying the last frame)"
        )
        lines += _as_text(frame_rows(frames))
    return "\n".join([*(f"NOTE: {remark}" for remark in remarks(results, problems=problems)), *lines])
