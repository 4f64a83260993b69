"""Accuracies and errors with intervals, from the records of an evaluation."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..modeling.reconstruction_metrics import summarize_frame_metrics
from .questions import normalise_answer
from .settings import EvaluationSettings

# Keys of `next_frame_records` that identify a frame.
_PLACES = ("video", "frame", "gap")

# -- Intervals


def bootstrap_interval(
    groups: Sequence[Any], statistic: Callable[[np.ndarray], float], settings: EvaluationSettings
) -> list[float] | None:
    """95% percentile interval of a statistic over redrawn groups (their indices); None for fewer than two groups."""
    if len(groups) < 2 or settings.bootstrap_samples < 1:
        return None
    rng = np.random.default_rng(settings.seed)
    drawn = rng.integers(len(groups), size=(settings.bootstrap_samples, len(groups)))
    values = np.array([statistic(indices) for indices in drawn])
    return [round(float(bound), 4) for bound in np.nanpercentile(values, [2.5, 97.5])]


def interval_of_mean(table: Sequence[Sequence[float]], settings: EvaluationSettings) -> list[float] | None:
    """Bootstrap interval of the mean over members of groups. `table` holds the sum and the number of members of each group."""
    table = np.array(table)
    return bootstrap_interval(table, lambda indices: np.divide(*table[indices].sum(0)), settings)


# -- Answers


def summarize_answers(
    answers: Sequence[dict[str, Any]], groups: Sequence[int], settings: EvaluationSettings
) -> dict[str, Any]:
    """Accuracy, over all and for each type, beside the chance level and the best guess. Questions with the same
    `groups[i]` (see `media_groups`) are drawn together for the intervals.

    `choice` is the accuracy of the choices that generated texts name; a text that names none is wrong, and counted
    under `num_unparsable`.
    """
    by_type = defaultdict(list)
    for number, answer in enumerate(answers):
        by_type[answer["question_type"]].append(number)
    return {
        "all": _summarize_answers(answers, groups, settings),
        "by_type": {
            name: _summarize_answers([answers[n] for n in numbers], [groups[n] for n in numbers], settings)
            for name, numbers in sorted(by_type.items())
        },
    }


def _summarize_answers(
    answers: Sequence[dict[str, Any]], groups: Sequence[int], settings: EvaluationSettings
) -> dict[str, Any]:
    summary: dict[str, Any] = {"num_questions": len(answers)}
    if not answers:
        return summary
    if all(answer["choices"] for answer in answers):
        places = Counter(answer["choices"].index(answer["answer"]) for answer in answers)
        summary["chance"] = float(np.mean([1 / len(answer["choices"]) for answer in answers]))
    else:
        places = Counter(normalise_answer(answer["answer"]) for answer in answers)
    summary["best_guess"] = max(places.values()) / len(answers)
    for name in ("exact", "choice", "likelihood"):
        pairs = [
            (is_right(answer, name), group) for answer, group in zip(answers, groups, strict=True) if name in answer
        ]
        if not pairs:
            continue
        summary[name] = float(np.mean([hit for hit, _ in pairs]))
        sums: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])  # right answers, questions
        for hit, group in pairs:
            sums[group][0] += hit
            sums[group][1] += 1
        summary[f"{name}_interval"] = interval_of_mean(list(sums.values()), settings)
    if "choice" in summary:
        summary["num_unparsable"] = sum(answer.get("choice", "") is None for answer in answers)
    return summary


def is_right(answer: dict[str, Any], name: str) -> bool:
    """Return True if a record is right by `exact`, `choice` or `likelihood`."""
    return answer["choice"] == answer["answer"] if name == "choice" else answer[name]


# -- Predicted frames


def gap_bin(seconds: float) -> float:
    """The power of two that is nearest to a gap on a logarithmic scale, 0.0 for a frame that repeats the last one.

    The bin of 0.25 s holds all from 0.177 to 0.354 s. Gaps are mostly round numbers, and these lie in the middle of
    their bins: how a time was rounded decides nothing.
    """
    return 2.0 ** round(math.log2(seconds)) if seconds > 0 else 0.0


def summarize_frames(records: Sequence[dict[str, Any]], settings: EvaluationSettings) -> dict[str, Any] | None:
    """Means over all predicted frames, and over those further ahead; None if there are none.

    Args:
        records: of the questions in which frames were predicted, with `next_frame`, `rollout` and `no_rollout`.

    Returns:
        the numbers of every next frame, given all true ones before it, with `by_gap`, a list over bins, and `rollout`:
        None, or under `by_horizon` the same numbers of the frames that were held back, for all horizons of the same
        videos and from the same last frame, `num_videos` and, under `left_out`, how many of these why not.
    """
    clips = [record["next_frame"] for record in records if "next_frame" in record]
    if not clips:
        return None
    return {
        **_summarize_frames(clips, settings),
        "by_gap": _by_gap(clips, settings),
        "rollout": _rollout(records, settings),
    }


def _rollout(records: Sequence[dict[str, Any]], settings: EvaluationSettings) -> dict[str, Any] | None:
    rollouts = [record["rollout"] for record in records if "rollout" in record]
    left_out = Counter(reason for record in records for reason in record.get("no_rollout", ()))
    if not rollouts and not left_out:
        return None
    by_horizon = {}
    for horizon in rollouts[0] if rollouts else ():
        own = [rollout[horizon] for rollout in rollouts]
        by_horizon[horizon] = {**_summarize_frames(own, settings), "by_gap": _by_gap(own, settings)}
    return {"num_videos": len(rollouts) + left_out.total(), "left_out": dict(left_out), "by_horizon": by_horizon}


def _by_gap(clips: Sequence[dict[str, list[float]]], settings: EvaluationSettings) -> list[dict[str, Any]]:
    bins: dict[float, list[dict[str, list[float]]]] = defaultdict(list)
    for clip in clips:
        places = [gap_bin(gap) for gap in clip["gap"]]
        for place in sorted(set(places)):
            members = [number for number, other in enumerate(places) if other == place]
            bins[place].append({name: [values[m] for m in members] for name, values in clip.items()})
    return [
        {
            "gap": place,
            "from": round(place / math.sqrt(2), 4),
            "to": round(place * math.sqrt(2), 4),
            **_summarize_frames(bins[place], settings),
        }
        for place in sorted(bins)
    ]


def _summarize_frames(clips: Sequence[dict[str, list[float]]], settings: EvaluationSettings) -> dict[str, Any]:
    names = [name for name in clips[0] if name not in _PLACES]
    frames = {name: torch.tensor([value for clip in clips for value in clip[name]]) for name in names}
    num_videos = sum(len(set(clip["video"])) for clip in clips)
    summary: dict[str, Any] = {"num_videos": num_videos, "num_frames": len(frames["mse"])}
    summary.update(summarize_frame_metrics(frames))
    sums = np.array([[sum(clip["mse"]), sum(clip["copy_mse"])] for clip in clips])

    def skill(indices: np.ndarray) -> float:
        mse, copy_mse = sums[indices].sum(0)
        return 1 - mse / copy_mse if copy_mse > 0 else np.nan

    if summary["copy_mse"] == 0:
        summary["skill"] = summary["skill_interval"] = None  # nothing changes, so that the baseline has no error
    else:
        summary["skill_interval"] = bootstrap_interval(sums, skill, settings)
    consistent = [[sum(clip["temporal_consistency"]), len(clip["temporal_consistency"])] for clip in clips]
    summary["temporal_consistency_interval"] = interval_of_mean(consistent, settings)
    return summary
