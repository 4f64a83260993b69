"""Answers and predictions of a checkpoint for a batch of questions, as plain records; used by `llava-next-ar evaluate`."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.cache_utils import DynamicCache

from ..modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from ..modeling.reconstruction_metrics import straight_line
from ..processing.processing_llava_next_ar import LlavaNextARProcessor
from ..training.own_code import check_own_code
from .questions import Question, media_parts, normalise_answer, parse_choice
from .settings import EvaluationSettings, base_of_adapter


def load_checkpoint(
    model: str,
    *,
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    base_revision: str | None = None,
) -> tuple[Any, Any]:
    """Model, in eval mode, and processor. With `trust_remote_code`, the checkpoint's code runs, else the package's.

    `revision` is that of `model`; if this is an adapter, `base_revision` is that of its base.

    Raises:
        ValueError: if the checkpoint has code of its own and `trust_remote_code` is off.
    """
    check_own_code(model, trust_remote_code, revision)
    model_class, processor_class = LlavaNextARForConditionalGeneration, LlavaNextARProcessor
    trust = {}
    if trust_remote_code:
        model_class, processor_class, trust = AutoModelForImageTextToText, AutoProcessor, {"trust_remote_code": True}
    own = {"revision": revision or "main"}
    # Of an adapter, transformers takes `revision` for that of the base.
    is_adapter = base_of_adapter(model, revision) is not None
    pinned = {"revision": base_revision or "main", "adapter_kwargs": own} if is_adapter else own
    loaded = model_class.from_pretrained(model, dtype=getattr(torch, dtype), **pinned, **trust)
    processor = processor_class.from_pretrained(model, **own, **trust)
    return loaded.to(device).eval(), processor


def answer_tokens(processor: Any, messages: list[dict[str, Any]], answer: str) -> list[int]:
    """Tokens of an answer as the model would generate it, with those that end the turn."""
    options = {"tokenize": False}
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, **options)
    spoken = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    whole = processor.apply_chat_template(spoken, **options)
    if not whole.startswith(prompt):
        raise ValueError("the chat template writes a prompt that is not the beginning of the answered conversation")
    return processor.tokenizer(whole[len(prompt) :].rstrip(), add_special_tokens=False)["input_ids"]


def prompt_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids `[B, S]` of prompts that are padded on the left."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def choice_log_likelihoods(
    model: Any,
    cache: DynamicCache,
    last_logits: torch.Tensor,
    attention_mask: torch.Tensor,
    choices: Sequence[Sequence[Sequence[int]]],
    next_positions: torch.Tensor | None = None,
) -> list[list[float]]:
    """The log-probabilities of `score_choices` alone."""
    scores = score_choices(model, cache, last_logits, attention_mask, choices, next_positions)
    return [[log_likelihood for log_likelihood, _ in own] for own in scores]


def score_choices(
    model: Any,
    cache: DynamicCache,
    last_logits: torch.Tensor,
    attention_mask: torch.Tensor,
    choices: Sequence[Sequence[Sequence[int]]],
    next_positions: torch.Tensor | None = None,
) -> list[list[tuple[float, bool]]]:
    """Log-probability of each choice as a whole, given prompts that were read already.

    Args:
        cache: of the prompts, padded on the left; used up.
        last_logits: `[B, V]` at the last token of each prompt.
        attention_mask: `[B, S]` of the prompts.
        choices: for each prompt its choices as tokens.
        next_positions: `[B]`, positions that the choices begin at, if tokens of the prompts were left out; by default the
            prompts' lengths.

    Returns:
        for each prompt a pair for each choice: the number, and True if greedy decoding gives this choice.
    """
    device = last_logits.device
    rows = torch.tensor([row for row, some in enumerate(choices) for _ in some], device=device)  # [R] one per choice
    flat = [torch.tensor(tokens) for some in choices for tokens in some]
    if not flat:
        return [[] for _ in choices]
    tokens = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True, padding_value=-1).to(device)  # [R, A]
    exists = tokens >= 0
    tokens = tokens.clamp(min=0)
    logits = last_logits[rows][:, None]
    if tokens.shape[1] > 1:
        cache.batch_select_indices(rows)
        mask = torch.cat([attention_mask[rows], exists[:, :-1].to(attention_mask.dtype)], dim=1)
        first = attention_mask.sum(1) if next_positions is None else next_positions
        position_ids = first[rows, None] + torch.arange(tokens.shape[1] - 1, device=device)
        rest = model(
            input_ids=tokens[:, :-1],
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        logits = torch.cat([logits, rest], dim=1)
    log_probs = logits.float().log_softmax(-1)
    scores = log_probs.gather(-1, tokens[..., None])[..., 0]
    is_greedy = ((log_probs.argmax(-1) == tokens) | ~exists).all(1).tolist()
    pairs = list(zip((scores * exists).sum(1).tolist(), is_greedy, strict=True))
    ends = np.cumsum([len(some) for some in choices])
    return [pairs[end - len(some) : end] for some, end in zip(choices, ends, strict=True)]


@dataclass(frozen=True, kw_only=True)
class ReadPrompts:
    """A batch of prompts after one forward pass over them.

    Attributes:
        last_logits: `[B, V]` at the last token of each prompt.
        cache: of the prompts alone, if it was asked for.
        reconstruction: of their videos, if it was asked for and there is one.
        generated: `[B, A]`, the tokens of the answers, if there are to be any.
    """

    last_logits: torch.Tensor
    cache: DynamicCache | None
    reconstruction: Any
    generated: torch.Tensor | None = None


def read_prompts(
    model: Any, batch: dict[str, torch.Tensor], *, max_new_tokens: int, wants_cache: bool, wants_frames: bool
) -> ReadPrompts:
    """Read prompts once for all measurements: greedy answers continue from the pass that is kept.

    Args:
        batch: model inputs, padded on the left.
        max_new_tokens: of an answer; 0 for no answers.
        wants_cache, wants_frames: True for likelihoods, and for the reconstruction.
    """
    kept: list[ReadPrompts] = []

    def keep(outputs: Any) -> None:
        if not kept:
            # A copy: tokens that are generated afterwards go into the cache that the pass returned.
            own = copy.deepcopy(outputs.past_key_values) if wants_cache else None
            kept.append(
                ReadPrompts(last_logits=outputs.logits[:, -1], cache=own, reconstruction=outputs.reconstruction)
            )

    options = {"return_reconstruction": wants_frames, "skip_reconstruction": not wants_frames}
    cache = DynamicCache(config=model.config.get_text_config()) if wants_cache or max_new_tokens else None
    if not max_new_tokens:
        positions = prompt_positions(batch["attention_mask"])
        use = {"past_key_values": cache, "use_cache": wants_cache, "logits_to_keep": 1}
        keep(model(**batch, position_ids=positions, **use, **options))
        return kept[0]
    hook = model.register_forward_hook(lambda module, args, outputs: keep(outputs))
    try:
        generated = model.generate(
            **batch,
            **options,
            past_key_values=cache,
            cache_implementation=None,  # a checkpoint may name one, which would contradict this one
            use_cache=True,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
    finally:
        hook.remove()
    return replace(kept[0], generated=generated[:, batch["input_ids"].shape[1] :])


@torch.inference_mode()
def measure_batch(
    model: Any,
    processor: Any,
    batch: dict[str, torch.Tensor],
    questions: Sequence[Question],
    settings: EvaluationSettings,
) -> list[dict[str, Any]]:
    """Records of the questions of one batch, of JSON types alone.

    Each has `id`, `question_type`, `answer`, `choices` and, where measured, `generated` and `exact`, for questions with
    choices `choice` (the one that the generated text names, or None), `log_likelihoods` and `likelihood`, and for the first
    question about a video `next_frame` (see `next_frame_records`) and the keys of `rollout_records`.
    """
    batch = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    choices = [[answer_tokens(processor, q.messages, choice) for choice in q.choices] for q in questions]
    wants_choices = settings.likelihood and any(choices)
    wants_frames = settings.reconstruction and model.autoregressive_module is not None
    wants_frames &= any(q.first_videos for q in questions) and "pixel_values_videos" in batch
    records = [
        {"id": q.id, "question_type": q.question_type, "answer": q.answer, "choices": list(q.choices)}
        for q in questions
    ]
    if not (settings.generation or wants_choices or wants_frames):
        return records
    prompts = read_prompts(
        model,
        batch,
        max_new_tokens=settings.max_new_tokens if settings.generation else 0,
        wants_cache=bool(wants_choices),
        wants_frames=bool(wants_frames),
    )
    if prompts.generated is not None:
        texts = processor.tokenizer.batch_decode(
            prompts.generated, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for record, question, text in zip(records, questions, texts, strict=True):
            record["generated"] = text.strip()
            record["exact"] = normalise_answer(text) == normalise_answer(question.answer)
            if question.choices:
                place = parse_choice(text, question.choices)
                record["choice"] = None if place is None else question.choices[place]
    if wants_choices:
        scores = choice_log_likelihoods(model, prompts.cache, prompts.last_logits, batch["attention_mask"], choices)
        for record, question, own in zip(records, questions, scores, strict=True):
            if own:
                record["log_likelihoods"] = own
                record["likelihood"] = question.choices[int(np.argmax(own))] == question.answer
    if prompts.reconstruction is not None:
        frames = next_frame_records(prompts.reconstruction, batch["video_timestamps"], questions)
        for record, own in zip(records, frames, strict=True):
            if own:
                record["next_frame"] = own
    if wants_frames:
        for row, own in rollout_records(model, batch, questions, settings.horizons).items():
            records[row].update(own)
    return records


def _owners(questions: Sequence[Question]) -> list[tuple[int, int]]:
    """For each video of a batch the index of its question, and its index among the question's videos."""
    num_videos = [sum(p["type"] == "video" for m in q.messages for p in media_parts(m)) for q in questions]
    return [(question, video) for question, number in enumerate(num_videos) for video in range(number)]


def next_frame_records(
    reconstruction: Any, timestamps: torch.Tensor, questions: Sequence[Question]
) -> list[dict[str, list[float]]]:
    """For each question, one entry of each list for every predicted frame of its `first_videos`; empty without any.

    Args:
        reconstruction: predictions one frame ahead, for the videos of the batch.
        timestamps: `[N, T]` nanoseconds of the frames of the batch's videos, as the collator gives them.

    Returns:
        `video` (which of the question's), `frame` (that is predicted), `gap` (seconds since the last frame that was seen)
        and the metrics.
    """
    owners, times = _owners(questions), timestamps.tolist()
    of_batch, frames = torch.stack([reconstruction.frame_video, reconstruction.frame_index]).tolist()
    metrics = _lists({**reconstruction.frame_metrics(), "linear_mse": linear_errors(reconstruction, timestamps)})
    records: list[dict[str, list[float]]] = [{} for _ in questions]
    for place, (video, frame) in enumerate(zip(of_batch, frames, strict=True)):
        question, number = owners[video]
        if number not in questions[question].first_videos:
            continue
        values = {
            "video": number,
            "frame": frame,
            "gap": round((times[video][frame] - times[video][frame - 1]) / 1e9, 6),
            **{name: own[place] for name, own in metrics.items()},
            # Nearest to a copy is always the frame before, so a blind guess is the baseline here, not copying.
            "temporal_consistency_chance": 1 / (of_batch.count(video) + 1),
        }
        for name, value in values.items():
            records[question].setdefault(name, []).append(value)
    return records


def linear_errors(reconstruction: Any, timestamps: torch.Tensor) -> torch.Tensor:
    """`[M]`: squared error of continuing the last two frames in a straight line, or of copying where there is one alone."""
    times, errors = timestamps.tolist(), []
    predicted = torch.stack([reconstruction.frame_video, reconstruction.frame_index], dim=1).tolist()
    for (video, frame), frames in zip(predicted, reconstruction.candidates, strict=True):
        line = straight_line(frames[:frame], times[video][:frame], times[video][frame])
        errors.append((line - frames[frame]).square().mean())
    return torch.stack(errors)


def _lists(metrics: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """The numbers of tensors of one shape and type, in one transfer from their device."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


def rollout_records(
    model: Any, batch: dict[str, torch.Tensor], questions: Sequence[Question], num_frames: int
) -> dict[int, dict[str, Any]]:
    """Rollouts of the videos of a batch, for the records of the first questions about them.

    `rollout`: by horizon (`"1"` and on, all from the same last frame), the lists of `next_frame_records`. Where a prompt
    is more than text and one video, or this is too short, `no_rollout` instead: the reason for each video.
    """
    if num_frames < 2:
        return {}
    owners, lengths = _owners(questions), batch["video_frame_mask"].sum(1).tolist()
    media = [[part["type"] for message in q.messages for part in media_parts(message)] for q in questions]
    records: dict[int, dict[str, Any]] = {}
    for video, (row, number) in enumerate(owners):
        if number not in questions[row].first_videos:
            continue
        if media[row] != ["video"] or lengths[video] <= num_frames:
            reason = "too short" if media[row] == ["video"] else "not alone in the prompt"
            records.setdefault(row, {"no_rollout": []})["no_rollout"].append(reason)
            continue
        text, length = batch["attention_mask"][row].bool(), lengths[video]
        inputs = {name: value[video, None] for name, value in batch.items() if "video" in name}
        inputs["input_ids"] = batch["input_ids"][row, None, text]
        (own,) = model.imagine(num_frames, hold_back=True, **inputs)
        metrics, frames = _lists(own.frame_metrics()), own.frame_index.tolist()
        times = batch["video_timestamps"][video].tolist()
        rollout = {
            str(ahead): {
                "video": [0],
                "frame": [frames[ahead - 1]],
                "gap": [round((times[length - num_frames + ahead - 1] - times[length - num_frames - 1]) / 1e9, 6)],
                **{name: [values[ahead - 1]] for name, values in metrics.items()},
                "temporal_consistency_chance": [1 / length],
            }
            for ahead in range(1, num_frames + 1)
        }
        records[row] = {"rollout": rollout}
    return records
