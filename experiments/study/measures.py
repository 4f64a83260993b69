"""Answers, prediction errors and surprise of a model of the study, as plain numbers."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from ...evaluation.measures import linear_errors
from ...modeling.frame_surprise import VideoSurprise
from ...training.collator import LlavaVideoCollator
from ..sources.clips import ClipPair
from .data import StudyData, StudyQuestion, StudySamples

BATCH_SIZE = 32


def _batches(model: Any, samples: StudySamples) -> Iterator[dict[str, torch.Tensor]]:
    collator = LlavaVideoCollator(samples.data.vocabulary.special.pad)
    for batch in DataLoader(samples, batch_size=BATCH_SIZE, collate_fn=collator):
        yield {name: value.to(model.device) for name, value in batch.items() if name != "labels"}


@torch.inference_mode()
def measure_answers(
    model: Any, data: StudyData, questions: Sequence[StudyQuestion], *, shuffled: bool = False
) -> list[bool]:
    """For each question True if the right choice is the most probable one."""
    samples = StudySamples(data, questions, model.config.frame_token_layout, answered=False, shuffled=shuffled)
    right: list[bool] = []
    for batch in _batches(model, samples):
        logits = model(**batch, skip_reconstruction=True).logits
        lasts = batch["attention_mask"].sum(1) - 1
        for row, last in zip(logits, lasts, strict=True):
            question = questions[len(right)]
            scores = row[last, list(question.choices)]
            right.append(int(scores.argmax()) == question.answer)
    return right


@torch.inference_mode()
def measure_frames(model: Any, data: StudyData, clips: Sequence[int]) -> dict[str, float]:
    """Next-frame predictions, means over all predicted frames of the clips.

    `mse`, `copy_mse` (of copying the last frame), `linear_mse` (of continuing the last two in a straight line), `skill` and
    `linear_skill` (1 - mse / copy_mse of either), `cosine`, and `temporal_consistency`.
    """
    sums: dict[str, float] = defaultdict(float)
    count = 0
    for batch in _batches(model, _videos(model, data, clips)):
        reconstruction = model(**batch, return_reconstruction=True, logits_to_keep=1).reconstruction
        metrics = reconstruction.frame_metrics()
        metrics["linear_mse"] = linear_errors(reconstruction, batch["video_timestamps"])
        for name, values in metrics.items():
            sums[name] += values.double().sum().item()
        count += len(metrics["mse"])
    means = {name: total / count for name, total in sums.items()}
    skills = {"skill": means["mse"], "linear_skill": means["linear_mse"]}
    return means | {name: 1 - mse / means["copy_mse"] for name, mse in skills.items()}


def _videos(model: Any, data: StudyData, clips: Sequence[int]) -> StudySamples:
    return StudySamples(data, [StudyQuestion(clip=clip) for clip in clips], model.config.frame_token_layout)


# Scores of a clip: a quantity, and the frames or patches over which it is taken.
WHAT = ("surprise", "error", "difference")
WHERE = ("at_event", "frame", "patch")
SCORES = tuple(f"{what}_{where}" for what in WHAT for where in WHERE)


@torch.inference_mode()
def measure_pairs(model: Any, data: StudyData, pairs: Sequence[ClipPair]) -> dict[str, list[float]]:
    """For each score and each pair: 1.0 where the clip with the event scores higher, 0.5 if as high, else 0.0."""
    clips = [clip for pair in pairs for clip in (pair.possible, pair.changed)]
    surprises = [one for batch in _batches(model, _videos(model, data, clips)) for one in model.surprise(**batch)]
    results: dict[str, list[float]] = {name: [] for name in SCORES}
    for pair, possible, changed in zip(pairs, surprises[::2], surprises[1::2], strict=True):
        scores = [clip_scores(one, pair.event_frame) for one in (possible, changed)]
        for name in SCORES:
            low, high = (some[name] for some in scores)
            results[name].append(0.5 + 0.5 * ((high > low) - (high < low)))
    return results


def clip_scores(surprise: VideoSurprise, event: int) -> dict[str, float]:
    """One number for each of `SCORES`.

    | score | |
    |---|---|
    | `surprise` | error of the prediction, relative to that of copying (frame_surprise.py) |
    | `error` | error of the prediction |
    | `difference` | baseline without a model: the difference of a frame from the one before |

    `at_event` is the mean over the patches of the frame `event`, the first that differs between the clips of a pair: both clips
    then have the same prediction. `frame` and `patch` are event-agnostic: the greatest value of all frames, or of all patches,
    from that frame on (before it the two clips are equal).
    """
    (first,) = (surprise.frame_index == event).nonzero().flatten().tolist()
    of_frames = {
        "surprise": surprise.frames[first:].tolist(),
        "error": [float(frame.mean()) for frame in surprise.errors[first:]],
        "difference": [float(frame.mean()) for frame in surprise.copy_errors[first:]],
    }
    of_patches = {"surprise": surprise.patches, "error": surprise.errors, "difference": surprise.copy_errors}
    scores = {}
    for what in WHAT:
        scores[f"{what}_at_event"] = of_frames[what][0]
        scores[f"{what}_frame"] = max(of_frames[what])
        scores[f"{what}_patch"] = max(float(frame.max()) for frame in of_patches[what][first:])
    return scores
