"""Answers of a checkpoint that reads some frames, or some visual tokens, of each video.

Every way of choosing has the same budget. Each rests on one of these scores:

| score | value |
|---|---|
| surprise | error of the head's prediction over that of copying the frame before (frame_surprise.py) |
| error | error of the prediction alone |
| change | frames: error of copying alone; tokens: Efficient Video Sampling (EVS), 1 - cosine of the embeddings |
| pixels | mean squared difference of the pixels |
| codec | bytes that the codec spent on the frame, for its picture type (`coding_costs`); all tokens of a frame have its cost |
| random | drawn for each video, the same in each run |
| uniform | even steps; for tokens, whole frames at even steps |

The first frame has no frame before it, and comes before all others in each of them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.cache_utils import DynamicCache

from ...evaluation.measures import answer_tokens, choice_log_likelihoods, measure_batch, prompt_positions
from ...evaluation.questions import PromptCollator, Prompts, Question
from ...evaluation.settings import EvaluationSettings
from ...modeling.autoregressive_reconstruction import seconds_since
from ...modeling.frame_surprise import VideoSurprise
from .selection import (
    SAME_TIME,
    change_scores,
    codec_scores,
    even_scores,
    first_frame_first,
    keep_frames,
    keep_tokens,
    keep_with_newlines,
    pixel_changes,
    prune_prompts,
    select_key_frames,
    spread_key_frames,
    uniform_frames,
)

FRAME_SCORES = ("surprise", "error", "change", "pixels", "codec")
FREE_SCORES = ("pixels", "codec")
"""Frame scores that need neither a vision tower nor a language model."""
FRAME_RULES = {"top": select_key_frames, "spread": spread_key_frames}
TOKEN_SCORES = ("surprise", "error", "change", "pixels", "codec", "random", "uniform")


@dataclass
class Condition:
    """Answers with one way of choosing at one budget."""

    way: str
    """`all` if everything was shown."""
    budget: float | None
    """Number of frames, or share of the tokens."""
    right: list[int] = field(default_factory=list)
    """For each question, 1 if the most probable choice was the right one."""
    frames: list[list[int]] = field(default_factory=list)
    """For each question the frames that were shown, where frames are chosen."""
    hits: list[int | None] = field(default_factory=list)
    """For each question, 1 if one of the frames shows its moment, None if it has none."""


class _Conditions(dict):
    """By way and budget; made at first use."""

    def __missing__(self, key: tuple[str, float | None]) -> Condition:
        self[key] = Condition(*key)
        return self[key]


def _batches(
    questions: Sequence[Question], processor: Any, settings: EvaluationSettings, description: str, progress: bool
) -> Iterator[tuple[list[Question], list[dict[str, torch.Tensor]]]]:
    """Batches of questions with their samples, decoded in workers, with a progress bar.

    Raises:
        ValueError: for a sample that cannot be read.
    """
    loader = DataLoader(
        Prompts(questions, processor, settings),
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        collate_fn=list,
    )
    with tqdm(total=len(questions), desc=description, unit="question", disable=not progress) as bar:
        for number, samples in enumerate(loader):
            some = list(questions[number * settings.batch_size :][: len(samples)])
            problems = [sample for sample in samples if isinstance(sample, str)]
            if problems:
                raise ValueError(problems[0])
            yield some, samples
            bar.update(len(some))


def _on_device(batch: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    return {name: value.to(model.device) for name, value in batch.items() if name != "labels"}


def surprise_of_batch(model: Any, batch: dict[str, torch.Tensor]) -> list[VideoSurprise]:
    """`model.surprise` of each video of a batch of prompts with one video each.

    Raises:
        ValueError: if a prompt holds no video of two frames or more, or more than one video.
    """
    surprises = model.surprise(**batch, position_ids=prompt_positions(batch["attention_mask"]))
    if not len(surprises) == len(batch["video_frame_mask"]) == len(batch["input_ids"]):
        raise ValueError(
            f"{len(batch['input_ids'])} prompts hold {len(batch['video_frame_mask'])} videos, {len(surprises)} of them of two "
            "frames or more, expected one such video in each"
        )
    return surprises


# -- Key frames


def frame_scores(surprise: VideoSurprise, pixel_values: torch.Tensor, codec: list[float]) -> dict[str, list[float]]:
    """One number for each frame by the name of a score, 0 for the first frame.

    Args:
        surprise: of the video.
        pixel_values: `[T, 3, H, W]`.
        codec: `codec_scores` of the video.
    """
    scores = {
        "surprise": surprise.frames.tolist(),
        "error": [float(errors.mean()) for errors in surprise.errors],
        "change": [float(errors.mean()) for errors in surprise.copy_errors],
        "pixels": pixel_changes(pixel_values).flatten().tolist(),
    }
    return {name: [0.0, *own] for name, own in scores.items()} | {"codec": codec}


def choose_frames(scores: dict[str, list[float]], num_kept: int, key: str) -> dict[str, list[int]]:
    """Frames that each rule keeps, by its name, for given `FRAME_SCORES`; `key` is the seed of the random frames."""
    num_frames = len(next(iter(scores.values())))
    drawn = _random(f"{key} {num_kept}").permutation(np.arange(1, num_frames))[: num_kept - 1]
    chosen = {"uniform": uniform_frames(num_frames, num_kept), "random": sorted([0, *drawn.tolist()])}
    for name in scores:
        for rule, choose in FRAME_RULES.items():
            chosen[f"{name} {rule}"] = choose(scores[name], num_kept)
    return chosen


def key_of(question: Question, settings: EvaluationSettings) -> str:
    """Seed of a question's video, independent of its folder."""
    return f"{settings.seed} {Path(question.media[0]).name}"


def _random(key: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))


def shows_moment(question: Question, times: torch.Tensor, frames: Sequence[int]) -> int | None:
    """1 if one of the frames lies in the question's moment, else 0; None if it has none.

    Args:
        times: `[T]` of the whole video, as the processor gives them.
    """
    if question.moment is None:
        return None
    first, last = question.moment
    seconds = seconds_since(times[0], times)[list(frames)]
    return int(((seconds >= first - SAME_TIME) & (seconds <= last + SAME_TIME)).any())


def right_answers(
    model: Any,
    processor: Any,
    settings: EvaluationSettings,
    samples: Sequence[dict[str, torch.Tensor]],
    questions: Sequence[Question],
) -> list[int]:
    """For each sample, 1 if the most likely choice is the answer to its question, else 0."""
    batch, _ = PromptCollator(processor)(samples)
    return [int(record["likelihood"]) for record in measure_batch(model, processor, batch, questions, settings)]


def measure_key_frames(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    settings: EvaluationSettings,
    num_kept: Sequence[int],
    *,
    progress: bool = True,
) -> list[Condition]:
    """Answers from few frames of each video, for each way of choosing them.

    Args:
        questions: with choices, about one video each.
        settings: batch size, frames of the dense sampling, and the like.
        num_kept: budgets in frames.

    Returns:
        `all`, then every way at every budget.
    """
    collate = PromptCollator(processor)
    conditions = _Conditions()
    answer = partial(right_answers, model, processor, settings)
    for some, samples in _batches(questions, processor, settings, "key frames", progress):
        batch, _ = collate(samples)
        surprises = surprise_of_batch(model, _on_device(batch, model))
        codec = [_codec_of(question, sample) for question, sample in zip(some, samples, strict=True)]
        scores = [
            frame_scores(own, sample["pixel_values_videos"][0], costs)
            for own, sample, costs in zip(surprises, samples, codec, strict=True)
        ]
        conditions["all", None].right += answer(samples, some)
        for number in num_kept:
            chosen = [choose_frames(own, number, key_of(q, settings)) for own, q in zip(scores, some, strict=True)]
            for way in chosen[0]:
                frames = [own[way] for own in chosen]
                layout, token = model.config.frame_token_layout, model.config.video_token_id
                kept = [keep_frames(sample, own, layout, token) for sample, own in zip(samples, frames, strict=True)]
                conditions[way, number].right += answer(kept, some)
                conditions[way, number].frames += frames
                conditions[way, number].hits += [
                    shows_moment(q, sample["video_timestamps"][0], own)
                    for q, sample, own in zip(some, samples, frames, strict=True)
                ]
    return list(conditions.values())


def _codec_of(question: Question, sample: dict[str, torch.Tensor]) -> list[float]:
    times = sample["video_timestamps"][0]
    return codec_scores(question.media[0], seconds_since(times[0], times).tolist())


# -- Tokens


def token_scores(
    surprise: VideoSurprise,
    features: torch.Tensor,
    tokens: Any,
    key: str,
    *,
    pixel_values: torch.Tensor,
    codec: Sequence[float],
) -> dict[str, list[torch.Tensor]]:
    """Scores `[h, w]` of the tokens of each frame but the first by the name of a score; `uniform` depends on the budget.

    Args:
        surprise, features, tokens: of one video; features `[L, D]` as the language model gets them.
        key: seed of the random tokens.
        pixel_values: `[T, 3, H, W]`.
        codec: `[T]`, `codec_scores` of the video.
    """
    rng, grids, device = _random(key), tokens.frame_grids[1:], features.device
    pairs = [pixel_values[frame : frame + 2] for frame in range(len(grids))]
    return {
        "surprise": surprise.patches,
        "error": surprise.errors,
        "change": change_scores(features, tokens),
        "pixels": [pixel_changes(pair, grid)[0].to(device) for pair, grid in zip(pairs, grids, strict=True)],
        "codec": [torch.full(grid, cost, device=device) for cost, grid in zip(codec[1:], grids, strict=True)],
        "random": [torch.from_numpy(rng.random(grid)).to(device) for grid in grids],
    }


@torch.inference_mode()
def measure_tokens(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    settings: EvaluationSettings,
    shares: Sequence[float],
    *,
    progress: bool = True,
) -> list[Condition]:
    """Answers from a share of the tokens of each video, for each way of choosing them.

    Args:
        questions: with choices, about one video each.
        shares: budgets, as shares of the patch tokens.

    Returns:
        `all`, then every way at every budget.
    """
    collate = PromptCollator(processor)
    conditions = _Conditions()
    for some, samples in _batches(questions, processor, settings, "tokens", progress):
        batch, _ = collate(samples)
        batch = _on_device(batch, model)
        surprises = surprise_of_batch(model, batch)
        video = model.model.get_video_features(
            **{name: value for name, value in batch.items() if "video" in name}, return_dict=True
        )
        maps = model.model.video_tokens(video)
        choices = [[answer_tokens(processor, q.messages, choice) for choice in q.choices] for q in some]
        scores = [
            token_scores(
                own,
                features,
                tokens,
                key_of(q, settings),
                pixel_values=sample["pixel_values_videos"][0],
                codec=_codec_of(q, sample),
            )
            for own, features, tokens, q, sample in zip(
                surprises, video.pooler_output, maps, some, samples, strict=True
            )
        ]
        answer = partial(_answer_pruned, model, batch, video, choices, some)
        everything = [torch.ones(len(t.patch_offsets), dtype=torch.bool) for t in maps]
        conditions["all", None].right += answer(everything)
        for share in shares:
            for way in TOKEN_SCORES:
                ranked = [
                    first_frame_first(even_scores(t, share) if way == "uniform" else own[way], t)
                    for own, t in zip(scores, maps, strict=True)
                ]
                conditions[way, share].right += answer([keep_tokens(own, share) for own in ranked])
    return list(conditions.values())


def _answer_pruned(
    model: Any,
    batch: dict[str, torch.Tensor],
    video: Any,
    choices: Sequence[Sequence[Sequence[int]]],
    questions: Sequence[Question],
    keep: Sequence[torch.Tensor],
) -> list[int]:
    """1 where the most probable choice is right, given the patches `[P]` of each video that are to be kept."""
    kept = [keep_with_newlines(own, tokens) for own, tokens in zip(keep, model.model.video_tokens(video), strict=True)]
    pruned = prune_prompts(model, batch, video.pooler_output, kept)
    cache = DynamicCache(config=model.config.get_text_config())
    logits = model(**pruned.inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    mask = pruned.inputs["attention_mask"]
    scores = choice_log_likelihoods(model, cache, logits, mask, choices, pruned.next_positions)
    return [int(q.choices[int(np.argmax(own))] == q.answer) for q, own in zip(questions, scores, strict=True)]
