"""Questions of a LLaVA-JSON data set, and the parsing of generated answers."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..processing.frame_sampling import choose_policy
from ..training.collator import LlavaVideoCollator
from ..training.data import LlavaVideoDataset
from .settings import EvaluationSettings


@dataclass(frozen=True, kw_only=True)
class Question:
    """One entry of the data set as a question."""

    index: int
    id: str
    question_type: str
    messages: list[dict[str, Any]]
    """Everything before the answer."""
    answer: str
    choices: tuple[str, ...] = ()
    media: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    """Those of its media that are videos; one that is sampled by options of its own is named with them."""
    moment: tuple[float, float] | None = None
    """Times of the first and last frame that show the answer, in seconds since the first frame; None for all frames."""
    first_videos: tuple[int, ...] = ()
    """Indices of its videos that no earlier question has; predictions of these are measured with this question."""
    problem: str | None = None
    """Reason for which the entry cannot be used."""


# -- Entries -> questions


def read_questions(
    dataset: LlavaVideoDataset, max_samples: int | None = None, *, max_bad_samples: int = 0
) -> list[Question]:
    """The entries of a data set as questions; decodes nothing.

    Args:
        max_bad_samples: so many entries may be bad; they come back with their `problem`.

    Raises:
        ValueError: for the first bad entry beyond that: malformed, its file missing, without an answer, or with an answer
            that is not among its choices.
    """
    questions: list[Question] = []
    num_bad = 0
    seen: set[str] = set()
    for index, entry in enumerate(dataset.entries[:max_samples]):
        try:
            question = _read_question(dataset, index, seen)
        except ValueError as error:
            num_bad += 1
            if num_bad > max_bad_samples:
                raise
            entry = entry if isinstance(entry, dict) else {}
            question = Question(
                index=index,
                id=str(entry.get("id", index)),
                question_type=str(entry.get("question_type", "all")),
                messages=[],
                answer="",
                problem=str(error),
            )
        seen.update(question.videos)
        questions.append(question)
    return questions


def _read_question(dataset: LlavaVideoDataset, index: int, seen: set[str]) -> Question:
    messages, entry = dataset.messages(index), dataset.entries[index]
    name = f"entry {entry.get('id', index)} of {dataset.name}"
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{name} does not end with an answer (a turn from 'gpt')")
    content = messages[-1]["content"]
    answer = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    choices = entry.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{name}: choices must be a list of strings, got {choices!r}")
    if choices and answer not in choices:
        raise ValueError(f"{name}: the answer {answer!r} is not among {choices}")
    parts = [part for message in messages for part in media_parts(message)]
    videos = [_clip_name(part) for part in parts if part["type"] == "video"]
    return Question(
        index=index,
        id=str(entry.get("id", index)),
        question_type=str(entry.get("question_type", "all")),
        messages=messages[:-1],
        answer=answer,
        choices=tuple(choices),
        media=tuple(part[part["type"]] for part in parts),
        videos=tuple(videos),
        first_videos=tuple(n for n, video in enumerate(videos) if video not in {*seen, *videos[:n]}),
        moment=tuple(entry["moment"]) if entry.get("moment") else None,
    )


def _clip_name(part: dict[str, Any]) -> str:
    """A video and its sampling options, if it has any: the same file sampled otherwise shows other frames."""
    options = ", ".join(f"{name}={part[name]!r}" for name in sorted(part.keys() - {"type", "video"}))
    return f"{part['video']} ({options})" if options else part["video"]


def check_answers_fit(questions: Sequence[Question], processor: Any, max_new_tokens: int) -> None:
    """Raise for reference answers that are longer than a generated one; of a choice, its letter suffices (`parse_choice`).

    Raises:
        ValueError: naming the first question whose answer takes more tokens than that, and the length of the longest one.
    """
    asked = [question for question in questions if question.problem is None and not question.choices]
    # Outer spaces and a final period do not count (`normalise_answer`), and the end of the turn may be cut off.
    texts = [question.answer.strip().rstrip(".").strip() for question in asked]
    lengths = (
        [len(tokens) for tokens in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    )
    for question, length in zip(asked, lengths, strict=True):
        if length > max_new_tokens:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}, but the answer of question {question.id} takes {length} tokens, so "
                f"that no generated text could equal it: give {max(lengths)} (for the longest answer), or do not generate"
            )


def media_groups(questions: Sequence[Question]) -> list[int]:
    """Group of each question: the same number for questions that share an image or video, directly or through others."""
    owner: dict[str, int] = {}
    groups = list(range(len(questions)))
    for number, question in enumerate(questions):
        shared = {groups[owner[medium]] for medium in question.media if medium in owner}
        if len(shared) == 1:
            groups[number] = min(shared)
        elif shared:
            groups = [min(shared) if group in {*shared, number} else group for group in groups]
        owner.update(dict.fromkeys(question.media, number))
    return groups


def media_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [] if isinstance(content, str) else [part for part in content if part["type"] != "text"]


# -- Questions -> batches


class Prompts(Dataset):
    """Questions as model inputs. Videos are decoded when an item is taken: in a DataLoader worker, if there is one.

    An item is a sample for `PromptCollator`, or a string that says why there is none.
    """

    def __init__(self, questions: Sequence[Question], processor: Any, settings: EvaluationSettings) -> None:
        self.questions = questions
        self.processor = processor
        self.frame_order = settings.frame_order
        self.seed = settings.seed
        self.processor_kwargs = sampling_options(processor, **settings.video_options())

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor] | str:
        question = self.questions[index]
        if question.problem is not None:
            return question.problem
        try:
            sample = prompt_sample(self.processor, question.messages, **self.processor_kwargs)
        except (ValueError, OSError) as error:
            return f"question {question.id}: {error}"
        if "pixel_values_videos" in sample:
            lengths = sample["video_frame_mask"].sum(1).tolist()
            for video, length in enumerate(lengths):
                order = frame_order(length, self.frame_order, f"{self.seed} {question.id} {video}")
                sample["pixel_values_videos"][video, :length] = sample["pixel_values_videos"][video, order]
        return sample


def sampling_options(processor: Any, **given: Any) -> dict[str, Any]:
    """Options for a call of the processor: those that are given and not None, and the policy that they imply.

    Raises:
        ValueError: if the processor rejects the sampling.
    """
    options = {name: value for name, value in given.items() if value is not None}
    if options:
        options["sampling"] = choose_policy(processor.video_processor.sampling, options)
        processor.video_processor.sampling_for(**options)
    return options


def prompt_sample(processor: Any, messages: list[dict[str, Any]], **options: Any) -> dict[str, torch.Tensor]:
    """A conversation up to its next answer as a sample for `LlavaVideoCollator`. `options` are the processor's."""
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )
    sample = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    sample.pop("attention_mask")
    sample["input_ids"] = sample["input_ids"][0]
    sample["labels"] = torch.full_like(sample["input_ids"], -100)  # the collator pads them beside the text
    return sample


def frame_order(num_frames: int, kind: str, key: str) -> list[int]:
    """Index of the frame shown at each place. `shuffled` is the same for the same `key`, and never the natural order."""
    natural = list(range(num_frames))
    if kind == "natural" or num_frames < 2:
        return natural
    if kind == "reversed":
        return natural[::-1]
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
    order = natural
    while order == natural:
        order = rng.permutation(num_frames).tolist()
    return order


class PromptCollator:
    """Items of `Prompts` -> the batch of those that can be asked (None if there is none), and the problem of each."""

    def __init__(self, processor: Any) -> None:
        self.collate = LlavaVideoCollator(processor, padding_side="left")

    def __call__(
        self, items: Sequence[dict[str, torch.Tensor] | str]
    ) -> tuple[dict[str, torch.Tensor] | None, list[str | None]]:
        samples = [item for item in items if not isinstance(item, str)]
        return self.collate(samples) if samples else None, [item if isinstance(item, str) else None for item in items]


# -- Generated texts


def normalise_answer(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


def parse_choice(text: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that a generated text names, or None. The first rule that applies decides:

    1. The text is one of the choices (as `exact` compares).
    2. The text is a letter, or begins with one as a label: `B`, `(b)`, `B.`, `B) up`, `Answer: B`, `The answer is B.`
       The letter is the choice's own label where all choices have one (`A. up`), else its place (A is the first).
    3. Exactly one choice, without its own label, occurs in the text as a word or words. A choice that is part of another
       one that occurs does not count: in `dark red`, `red` is not named.
    """
    said = normalise_answer(text)
    exact = [number for number, choice in enumerate(choices) if normalise_answer(choice) == said]
    if exact:
        return exact[0]
    labelled = [re.fullmatch(r"\(?([a-z])[.):]\s*(.+)", normalise_answer(choice)) for choice in choices]
    letters = [chr(ord("a") + number) for number in range(min(len(choices), 26))]
    names = [normalise_answer(choice) for choice in choices]
    if choices and all(labelled):
        letters, names = [match[1] for match in labelled], [match[2] for match in labelled]
    letter = re.match(r"(?:(?:the |my )?(?:correct )?answer(?: is|:| is:)\s*)?\(?([a-z])(?:[.):]|$)", said)
    if letter and letter[1] in letters:
        return letters.index(letter[1])
    named = [number for number, name in enumerate(names) if _occurs(name, said)]
    named = [n for n in named if not any(names[n] != names[m] and _occurs(names[n], names[m]) for m in named)]
    return named[0] if len(named) == 1 else None


def _occurs(name: str, text: str) -> bool:
    return bool(name) and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None
