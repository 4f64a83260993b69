"""Streams in a bounded cache: departure from the unbounded stream, and answers to a question at the end.

Budgets are frames: the cache holds the prompt and the tokens of so many frames. Ways at each budget:

    stream recent     first and recent frames, kept in the cache of the stream
    stream surprise   first, newest and most surprising frames, kept in the cache of the stream
    uniform           frames at even steps, read without the others
    recent            the last frames, read without the others

The last two need all frames at the time of the question. Kept tokens of a stream were computed with the evicted frames. An
ablation of `stream recent`, `stream growing`, has no contiguous positions: kept keys are not rotated, and positions grow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...configuration.transformers_compat import CACHE_ARGUMENT
from ...evaluation.measures import answer_tokens, choice_log_likelihoods
from ...evaluation.questions import Question
from ...evaluation.settings import EvaluationSettings
from ...modeling.frame_surprise import SurpriseStream, VideoSurprise
from .measures import Condition, _batches, right_answers, shows_moment
from .selection import keep_frames, uniform_frames
from .tables import Answers, _text, accuracy_rows, as_markdown, hit_rows, knowledge_rows, mean_over_clips

STREAM_RULES = ("recent", "surprise")
_NOTE = """\
A bounded stream reads each frame once and keeps a cache of so many frames. Frames at even steps (`uniform`) and the last frames
(`recent`) are read again without the others, for which all frames must be stored. Differences of surprise are relative to its
mean."""


class GrowingPositions(SurpriseStream):
    """Ablation: kept keys stay at their first positions, and the positions of new tokens grow without end."""

    _num_read = 0

    def _run_language_model(self, embeddings: torch.Tensor) -> torch.Tensor:
        self._cache._rotation.set_shifts([], [])
        positions = torch.arange(self._num_read, self._num_read + len(embeddings), device=embeddings.device)
        self._num_read += len(embeddings)
        output = self._model.model.language_model(
            inputs_embeds=embeddings[None],
            position_ids=positions[None],
            use_cache=True,
            **{CACHE_ARGUMENT: self._cache},
        )
        return output.last_hidden_state[0]


@dataclass
class StreamCondition(Condition):
    """Answers of one way at one budget, and for streams the departure from the unbounded stream."""

    difference: list[float] = field(default_factory=list)
    """For each video, mean absolute difference of the surprise of a frame over the mean surprise."""
    correlation: list[float | None] = field(default_factory=list)
    """For each video, correlation of the surprise over frames; None if one of them is constant."""
    error: list[float] = field(default_factory=list)
    """For each video, mean prediction error over that of the unbounded stream."""


def split_prompt(input_ids: torch.Tensor, video_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The text before and the text after the only video of a prompt `[S]`."""
    (positions,) = (input_ids == video_token_id).nonzero(as_tuple=True)
    return input_ids[: int(positions[0])], input_ids[int(positions[-1]) + 1 :]


def read_stream(
    model: Any, sample: dict[str, torch.Tensor], num_kept: int | None, keep: str = "recent"
) -> tuple[SurpriseStream, VideoSurprise]:
    """Reads the video of a sample as a stream in a cache of `num_kept` frames, or of all if None; `keep` may be `growing`."""
    prompt, _ = split_prompt(sample["input_ids"], model.config.video_token_id)
    options = {}
    if num_kept is not None:
        size = model.config.frame_token_layout.tokens_per_frame()
        options = {"max_tokens": len(prompt) + num_kept * size, "keep": "recent" if keep == "growing" else keep}
    stream = (GrowingPositions if keep == "growing" else SurpriseStream)(model, prompt, **options)
    types = sample["video_frame_types"][0].tolist() if "video_frame_types" in sample else None
    return stream, stream.read(sample["pixel_values_videos"][0], sample["video_timestamps"][0], types)


def add_departure(condition: StreamCondition, bounded: VideoSurprise, unbounded: VideoSurprise) -> None:
    """Appends the differences of one video."""
    values, reference = bounded.frames.numpy(), unbounded.frames.numpy()
    condition.difference.append(float(np.abs(values - reference).mean() / reference.mean()))
    is_constant = min(values.std(), reference.std()) < 1e-9
    condition.correlation.append(None if is_constant else float(np.corrcoef(values, reference)[0, 1]))
    errors = [
        float(torch.stack([patches.mean() for patches in video.errors]).mean()) for video in (bounded, unbounded)
    ]
    condition.error.append(errors[0] / errors[1])


@torch.inference_mode()
def answer_stream(model: Any, processor: Any, stream: SurpriseStream, sample: dict, question: Question) -> int:
    """1 if the most probable choice is right, given the frames in the cache of the stream."""
    _, text = split_prompt(sample["input_ids"], model.config.video_token_id)
    inputs = stream.generate_inputs(text)
    logits = model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
    choices = [[answer_tokens(processor, question.messages, choice) for choice in question.choices]]
    (scores,) = choice_log_likelihoods(model, inputs[CACHE_ARGUMENT], logits, inputs["attention_mask"], choices)
    return int(question.choices[int(np.argmax(scores))] == question.answer)


def measure_streams(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    settings: EvaluationSettings,
    num_kept: Sequence[int],
    *,
    progress: bool = True,
) -> list[StreamCondition]:
    """Answers and surprise of each way at each budget.

    Args:
        questions: with choices, about one video each.
        settings: batch size, number of frames of a video, and the like.
        num_kept: budgets in frames.

    Returns:
        `all`, then each way at each budget; `stream growing` has no answers.
    """
    conditions = {("all", None): StreamCondition("all", None)}
    layout, token = model.config.frame_token_layout, model.config.video_token_id
    answer = partial(right_answers, model, processor, settings)
    for asked, samples in _batches(questions, processor, settings, "streams", progress):
        conditions["all", None].right += answer(samples, asked)
        unbounded = [read_stream(model, sample, None)[1] for sample in samples]
        for number in num_kept:
            for rule in (*STREAM_RULES, "growing"):
                way = f"stream {rule}"
                condition = conditions.setdefault((way, number), StreamCondition(way, number))
                for sample, question, reference in zip(samples, asked, unbounded, strict=True):
                    stream, surprise = read_stream(model, sample, number, rule)
                    add_departure(condition, surprise, reference)
                    if rule != "growing":
                        condition.right.append(answer_stream(model, processor, stream, sample, question))
                        _add_frames(condition, question, sample, stream.kept_frames)
            for way in ("uniform", "recent"):
                condition, kept = conditions.setdefault((way, number), StreamCondition(way, number)), []
                for sample, question in zip(samples, asked, strict=True):
                    length = sample["pixel_values_videos"].shape[1]
                    last = list(range(max(0, length - number), length))
                    frames = uniform_frames(length, min(number, length)) if way == "uniform" else last
                    kept.append(keep_frames(sample, frames, layout, token))
                    _add_frames(condition, question, sample, frames)
                condition.right += answer(kept, asked)
    return list(conditions.values())


def _add_frames(condition: Condition, question: Question, sample: dict[str, torch.Tensor], frames: list[int]) -> None:
    condition.frames.append(frames)
    condition.hits.append(shows_moment(question, sample["video_timestamps"][0], frames))


def departure_rows(results: dict[str, Any]) -> list[list[str]]:
    """Departure of each bounded stream from the unbounded one: means over videos, with intervals."""
    settings = EvaluationSettings(**results["settings"])
    videos = [question["video"] for question in results["questions"]]
    rows = [["kept", "frames", "difference of surprise", "correlation", "prediction error, of the unbounded"]]
    for condition in results["conditions"]:
        if condition["difference"]:
            pairs = [(r, video) for r, video in zip(condition["correlation"], videos, strict=True) if r is not None]
            values = [(condition["difference"], videos), tuple(zip(*pairs, strict=True)), (condition["error"], videos)]
            cells = [_text(mean_over_clips(*value, settings)) if value else "-" for value in values]
            way = condition["way"].removeprefix("stream ").replace("growing", "recent, growing positions")
            rows.append([way, str(condition["budget"]), *cells])
    return rows


def write_stream_tables(results: dict[str, Any], path: Path) -> None:
    """Writes the tables of one results file as Markdown."""
    answered = [condition for condition in results["conditions"] if condition["right"]]
    answers = Answers({**results, "conditions": answered}, "key_frames")
    tables = [knowledge_rows(answers), accuracy_rows(answers), *([hit_rows(answers)] if answers.has_moments else [])]
    parts = [
        "# Bounded streams",
        f"`{results['command']}`",
        *map(as_markdown, [*tables, departure_rows(results)]),
        _NOTE,
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
