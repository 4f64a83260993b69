"""Measure a checkpoint on a LLaVA-JSON data set: answers to questions, and predictions of the next frame.

    python scripts/evaluate.py --model outputs/run --data clips/test.json --output results.json
    python scripts/evaluate.py --model user/checkpoint --data clips/test.json --trust-remote-code --dtype bfloat16

    # a tiny model on one CPU, in seconds (scripts/demo.py makes model and data)
    python scripts/evaluate.py --model demo_output/model --data demo_output/clips/test.json --max-samples 16

Question answering: of every entry the last answer is asked for, given all turns before it. `exact` is the share of
greedily generated answers that equal the reference (upper and lower case, outer spaces and a final period do not
count). `likelihood`, for entries with `choices`, is the share of questions where the model gives the right choice the
highest probability, the token that ends its turn included. Both are reported for each `question_type` beside `chance`
(one over the number of choices) and `best_guess` (always giving the most frequent answer, or the choice at the place
that is most often right).

Next-frame prediction, over the distinct videos, each counted once: `mse` and `copy_mse` (of copying the last frame),
`skill = 1 - mse / copy_mse`, `cosine`, and `temporal_consistency` (how often the true next frame is the nearest of
its clip to the prediction). Intervals are 95% bootstrap intervals; questions about the same video are drawn together.

The JSON output holds the results, every answer, all settings and the versions that they were made with.
"""

import argparse
import json
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.cache_utils import DynamicCache

from llava_next_ar.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from llava_next_ar.processing_llava_next_ar import LlavaNextARProcessor
from llava_next_ar.reconstruction_metrics import summarize_frame_metrics
from llava_next_ar.training_collator import LlavaVideoCollator
from llava_next_ar.training_data import LlavaVideoDataset


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Everything that the results depend on; written into the output."""

    model: str
    data: str
    video_root: str | None = None
    allow_outside_root: bool = False
    trust_remote_code: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 8
    num_workers: int = 0
    max_samples: int | None = None
    max_new_tokens: int = 16
    num_frames: int | None = None
    generation: bool = True
    likelihood: bool = True
    reconstruction: bool = True
    bootstrap_samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "max_samples", "num_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype is {self.dtype!r}, expected one such as float32 or bfloat16")


# -- Checkpoint and data


def load_checkpoint(
    model: str, *, trust_remote_code: bool = False, device: str = "cpu", dtype: str = "float32"
) -> tuple[Any, Any]:
    """Model, in eval mode, and processor. With `trust_remote_code`, the checkpoint's code runs, else the package's."""
    options = {"dtype": getattr(torch, dtype)}
    if trust_remote_code:
        loaded = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=True, **options)
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    else:
        loaded = LlavaNextARForConditionalGeneration.from_pretrained(model, **options)
        processor = LlavaNextARProcessor.from_pretrained(model)
    return loaded.to(device).eval(), processor


@dataclass(frozen=True, kw_only=True)
class Question:
    """One entry of the data set, as it is asked."""

    index: int
    id: str
    question_type: str
    messages: list[dict[str, Any]]
    """Everything before the answer."""
    answer: str
    choices: tuple[str, ...] = ()
    media: tuple[str, ...] = ()


def read_questions(dataset: LlavaVideoDataset, max_samples: int | None = None) -> list[Question]:
    """The entries of a data set as questions; decodes nothing.

    Raises:
        BadSampleError: for an entry that is malformed or whose file is missing.
        ValueError: if an entry has no answer, or its answer is not among its choices.
    """
    questions = []
    for index, entry in enumerate(dataset.entries[:max_samples]):
        messages = dataset.messages(index)
        name = str(entry.get("id", index))
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"entry {name} of {dataset.name} does not end with an answer (a turn from 'gpt')")
        content = messages[-1]["content"]
        answer = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        choices = tuple(entry.get("choices") or ())
        if choices and answer not in choices:
            raise ValueError(f"entry {name} of {dataset.name}: the answer {answer!r} is not among {list(choices)}")
        parts = [p for m in messages if not isinstance(m["content"], str) for p in m["content"] if p["type"] != "text"]
        questions.append(
            Question(
                index=index,
                id=name,
                question_type=str(entry.get("question_type", "all")),
                messages=messages[:-1],
                answer=answer,
                choices=choices,
                media=tuple(part[part["type"]] for part in parts),
            )
        )
    return questions


class _Prompts(Dataset):
    """Questions as model inputs. Videos are decoded when an item is taken: in a DataLoader worker, if there is one."""

    def __init__(self, questions: Sequence[Question], processor: Any, processor_kwargs: dict[str, Any]) -> None:
        self.questions = questions
        self.processor = processor
        self.processor_kwargs = processor_kwargs

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        question = self.questions[index]
        try:
            inputs = self.processor.apply_chat_template(
                question.messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=dict(self.processor_kwargs),
            )
        except (ValueError, OSError) as error:
            raise ValueError(f"question {question.id}: {error}") from error
        sample = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        sample.pop("attention_mask")
        sample["input_ids"] = sample["input_ids"][0]
        sample["labels"] = torch.full_like(sample["input_ids"], -100)  # the collator pads them beside the text
        return sample


def answer_tokens(processor: Any, messages: list[dict[str, Any]], answer: str) -> list[int]:
    """What the model would have to say to give this answer: its tokens, and those that end the turn."""
    options = {"tokenize": False}
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, **options)
    spoken = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    whole = processor.apply_chat_template(spoken, **options)
    if not whole.startswith(prompt):
        raise ValueError("the chat template writes a prompt that is not the beginning of the answered conversation")
    return processor.tokenizer(whole[len(prompt) :].rstrip(), add_special_tokens=False)["input_ids"]


def normalise_answer(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


# -- Measuring


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def choice_log_likelihoods(
    model: Any,
    cache: DynamicCache,
    last_logits: torch.Tensor,
    attention_mask: torch.Tensor,
    choices: Sequence[Sequence[Sequence[int]]],
) -> list[list[float]]:
    """Log-probability of each choice as a whole, given prompts that were read already.

    Args:
        cache: of the prompts, padded on the left; used up.
        last_logits: `[B, V]` at the last token of each prompt.
        attention_mask: `[B, S]` of the prompts.
        choices: for each prompt its choices as tokens.

    Returns:
        for each prompt one number per choice.
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
        position_ids = _positions(mask)[:, -(tokens.shape[1] - 1) :]
        rest = model(
            input_ids=tokens[:, :-1],
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        logits = torch.cat([logits, rest], dim=1)
    scores = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    scores = (scores * exists).sum(1).tolist()
    ends = np.cumsum([len(some) for some in choices])
    return [scores[end - len(some) : end] for some, end in zip(choices, ends, strict=True)]


@dataclass
class _Records:
    """What is kept of each question, and of each distinct set of videos."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    videos: dict[tuple[str, ...], dict[str, list[float]]] = field(default_factory=dict)


@torch.inference_mode()
def _measure_batch(
    model: Any,
    processor: Any,
    batch: dict[str, torch.Tensor],
    questions: Sequence[Question],
    settings: EvaluationSettings,
    records: _Records,
) -> None:
    batch = {name: value.to(settings.device) for name, value in batch.items() if name != "labels"}
    new_records = [
        {"id": q.id, "question_type": q.question_type, "answer": q.answer, "choices": list(q.choices)}
        for q in questions
    ]
    if settings.generation:
        generated = model.generate(**batch, max_new_tokens=settings.max_new_tokens, do_sample=False, num_beams=1)
        texts = processor.tokenizer.batch_decode(
            generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for record, text in zip(new_records, texts, strict=True):
            record["generated"] = text.strip()
            record["exact"] = normalise_answer(text) == normalise_answer(record["answer"])
    choices = [[answer_tokens(processor, q.messages, choice) for choice in q.choices] for q in questions]
    wants_choices = settings.likelihood and any(choices)
    new_videos = {q.media for q in questions} - records.videos.keys() - {()}
    wants_frames = settings.reconstruction and model.autoregressive_module is not None
    wants_frames &= bool(new_videos) and "pixel_values_videos" in batch
    if wants_choices or wants_frames:
        cache = DynamicCache(config=model.config.get_text_config()) if wants_choices else None
        outputs = model(
            **batch,
            position_ids=_positions(batch["attention_mask"]),
            past_key_values=cache,
            use_cache=wants_choices,
            return_reconstruction=wants_frames,
            skip_reconstruction=not wants_frames,
            logits_to_keep=1,
        )
    if wants_choices:
        scores = choice_log_likelihoods(
            model, outputs.past_key_values, outputs.logits[:, -1], batch["attention_mask"], choices
        )
        for record, question, own in zip(new_records, questions, scores, strict=True):
            if own:
                record["log_likelihoods"] = own
                record["likelihood"] = question.choices[int(np.argmax(own))] == question.answer
    if wants_frames and outputs.reconstruction is not None:
        _keep_frames(outputs.reconstruction, questions, records)
    records.answers += new_records


def _keep_frames(reconstruction: Any, questions: Sequence[Question], records: _Records) -> None:
    """Metrics of the predicted frames, filed under the videos that they belong to; the first prompt of each counts."""
    num_videos = [sum(part["type"] == "video" for m in q.messages for part in _parts(m)) for q in questions]
    owner = np.repeat(np.arange(len(questions)), num_videos)
    metrics = {name: values.tolist() for name, values in reconstruction.frame_metrics().items()}
    lengths = Counter(reconstruction.frame_video.tolist())
    filed: dict[tuple[str, ...], int] = {}
    for frame, video in enumerate(reconstruction.frame_video.tolist()):
        question = int(owner[video])
        media = questions[question].media
        if media in records.videos and media not in filed:
            continue
        if filed.setdefault(media, question) != question:
            continue
        kept = records.videos.setdefault(media, defaultdict(list))
        for name, values in metrics.items():
            kept[name].append(values[frame])
        # Nearest to a copy is always the frame before, so copying is no baseline here; a blind guess is one.
        kept["temporal_consistency_chance"].append(1 / (lengths[video] + 1))


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [] if isinstance(message["content"], str) else message["content"]


def evaluate(
    settings: EvaluationSettings, model: Any = None, processor: Any = None, *, progress: bool = True
) -> dict[str, Any]:
    """Evaluates a checkpoint.

    Args:
        model, processor: instead of those that `settings.model` names.
        progress: show a progress bar on stderr.

    Returns:
        `settings`, `versions`, `question_answering` (`all`, and `by_type`), `reconstruction` (None without head or
        videos), `seconds`, and `answers`, one record for each question.
    """
    start = time.perf_counter()
    torch.manual_seed(settings.seed)
    if model is None or processor is None:
        model, processor = load_checkpoint(
            settings.model,
            trust_remote_code=settings.trust_remote_code,
            device=settings.device,
            dtype=settings.dtype,
        )
    dataset = LlavaVideoDataset(
        settings.data, processor, video_root=settings.video_root, allow_outside_root=settings.allow_outside_root
    )
    questions = read_questions(dataset, settings.max_samples)
    processor_kwargs = {} if settings.num_frames is None else {"num_frames": settings.num_frames}
    loader = DataLoader(
        _Prompts(questions, processor, processor_kwargs),
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        collate_fn=LlavaVideoCollator(processor, padding_side="left"),
    )
    records = _Records()
    with tqdm(total=len(questions), desc="evaluating", unit="question", disable=not progress) as bar:
        for batch in loader:
            own = questions[len(records.answers) : len(records.answers) + len(batch["input_ids"])]
            _measure_batch(model, processor, batch, own, settings, records)
            bar.update(len(own))
    return {
        "settings": asdict(settings),
        "versions": versions(),
        "question_answering": summarize_answers(records.answers, [q.media for q in questions], settings),
        "reconstruction": summarize_frames(list(records.videos.values()), settings),
        "seconds": round(time.perf_counter() - start, 2),
        "answers": records.answers,
    }


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


# -- Summaries


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


def summarize_answers(
    answers: Sequence[dict[str, Any]], clips: Sequence[Any], settings: EvaluationSettings
) -> dict[str, Any]:
    """Accuracy, over all and for each type, beside what guessing is worth. `clips[i]` is what question i is about."""
    by_type = defaultdict(list)
    for number, answer in enumerate(answers):
        by_type[answer["question_type"]].append(number)

    def summarize(numbers: list[int]) -> dict[str, Any]:
        some = [answers[number] for number in numbers]
        summary: dict[str, Any] = {"num_questions": len(some)}
        with_choices = [answer for answer in some if answer["choices"]]
        if len(with_choices) == len(some):
            places = Counter(answer["choices"].index(answer["answer"]) for answer in some)
            summary["chance"] = float(np.mean([1 / len(answer["choices"]) for answer in some]))
        else:
            places = Counter(normalise_answer(answer["answer"]) for answer in some)
        summary["best_guess"] = max(places.values()) / len(some)
        for name in ("exact", "likelihood"):
            pairs = [(float(answers[n][name]), clips[n]) for n in numbers if name in answers[n]]
            if pairs:
                summary[name] = float(np.mean([hit for hit, _ in pairs]))
                summary[f"{name}_interval"] = _accuracy_interval(pairs, settings)
        return summary

    return {
        "all": summarize(list(range(len(answers)))),
        "by_type": {name: summarize(by_type[name]) for name in sorted(by_type)},
    }


def _accuracy_interval(pairs: Sequence[tuple[float, Any]], settings: EvaluationSettings) -> list[float] | None:
    sums: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for hit, clip in pairs:
        sums[clip][0] += hit
        sums[clip][1] += 1
    table = np.array(list(sums.values()))  # [clips, 2]: right answers, questions
    return bootstrap_interval(table, lambda indices: np.divide(*table[indices].sum(0)), settings)


def summarize_frames(videos: Sequence[dict[str, list[float]]], settings: EvaluationSettings) -> dict[str, Any] | None:
    """Means over all predicted frames; None if there are none."""
    if not videos:
        return None
    frames = {name: torch.tensor([value for video in videos for value in video[name]]) for name in videos[0]}
    summary: dict[str, Any] = {"num_videos": len(videos), "num_frames": len(frames["mse"]), "horizon": 1}
    summary.update(summarize_frame_metrics(frames))
    table = np.array([[sum(video["mse"]), sum(video["copy_mse"])] for video in videos])

    def skill(indices: np.ndarray) -> float:
        mse, copy_mse = table[indices].sum(0)
        return 1 - mse / copy_mse if copy_mse > 0 else np.nan

    if table[:, 1].sum() > 0:
        summary["skill_interval"] = bootstrap_interval(table, skill, settings)
    return summary


def format_results(results: dict[str, Any]) -> str:
    """The results as a table for people."""

    def with_interval(summary: dict[str, Any], name: str) -> str:
        if name not in summary:
            return "-"
        interval = summary.get(f"{name}_interval")
        return f"{summary[name]:.3f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")

    answering = results["question_answering"]
    rows = [("question type", "questions", "exact", "likelihood", "chance", "best guess")]
    types = answering["by_type"] if len(answering["by_type"]) > 1 else {}
    for name, summary in [*types.items(), ("all", answering["all"])]:
        rows.append(
            (
                name,
                str(summary["num_questions"]),
                with_interval(summary, "exact"),
                with_interval(summary, "likelihood"),
                f"{summary['chance']:.3f}" if "chance" in summary else "-",
                f"{summary['best_guess']:.3f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    frames = results["reconstruction"]
    if frames is None:
        return "\n".join([*lines, "", "next frame: not measured (no head, or no video with two frames)"])
    lines += [
        "",
        f"next frame, {frames['num_frames']} predictions in {frames['num_videos']} videos",
        f"  mse {frames['mse']:.4f}   copying the last frame {frames['copy_mse']:.4f}   "
        f"skill {with_interval(frames, 'skill')}   (0 = copying)",
        f"  cosine {frames['cosine']:.3f}   temporal consistency {frames['temporal_consistency']:.3f} "
        f"(blind guess {frames['temporal_consistency_chance']:.3f})",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    defaults = EvaluationSettings(model="", data="")
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub id")
    parser.add_argument("--data", required=True, help="LLaVA JSON or JSON lines")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--video-root", help="folder of the videos; that of the data if not given")
    parser.add_argument("--allow-outside-root", action="store_true", help="accept paths outside of it, and URLs")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that the checkpoint carries")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=defaults.dtype, help="float32, bfloat16 or float16")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--num-workers", type=int, default=defaults.num_workers, help="processes that decode videos")
    parser.add_argument("--max-samples", type=int, help="only the first so many entries")
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens)
    parser.add_argument(
        "--num-frames", type=int, help="frames of a video, if other than the checkpoint's processor says"
    )
    parser.add_argument("--bootstrap-samples", type=int, default=defaults.bootstrap_samples, help="0: no intervals")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    for name in ("generation", "likelihood", "reconstruction"):
        parser.add_argument(f"--no-{name}", dest=name, action="store_false", help=f"do not measure {name}")
    options = vars(parser.parse_args(argv))
    output = options.pop("output")
    try:
        settings = EvaluationSettings(**options)
        results = evaluate(settings)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(format_results(results))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
