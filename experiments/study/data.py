"""Clips and questions of the study as samples for the package's collator; frames are given by their numbers.

Clips are those of the temporal benchmark (temporal_benchmark.py), drawn by seed and rendered without a video file in
between. Words are tokens, and so is every choice as a whole: the model's answer is one token and the end of its turn.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...configuration.frame_token_layout import FrameTokenLayout
from ..temporal.benchmark import BenchmarkClip, entries_of, frame_order, make_clips, render_clip

PAD, VIDEO, IMAGE, END = range(4)  # ids of the tokens that are no words


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which clips there are."""

    question_types: tuple[str, ...] = ("direction", "camera", "color")
    """Those of the benchmark that a model of this size begins to learn in minutes, and `color`, which needs no time."""
    num_train: int = 480
    """Clips of each kind, a multiple of 4."""
    num_watched: int = 160
    """Training clips of which nothing is asked. They are possible ones of the kind of the pairs: what a model is to find
    surprising later must not have happened before."""
    num_val: int = 20
    num_test: int = 80
    num_val_pairs: int = 100
    """Pairs of a possible and an impossible clip, a multiple of 2."""
    num_test_pairs: int = 400
    levels: tuple[str, ...] = ("easy",)
    num_frames: int = 14
    frame_step: int = 3
    """Every so many frames one is shown: with 3, frames 0, 3, 6..."""
    image_size: int = 56
    fps: float = 4.0
    tower_layers: int = 6
    seed: int = 0

    @property
    def shown_frames(self) -> range:
        """Of each clip."""
        return range(0, self.num_frames, self.frame_step)


@dataclass(frozen=True, kw_only=True)
class StudyQuestion:
    clip: int
    """Number of the clip among all of the study."""
    id: str = ""
    question_type: str = ""
    prompt: tuple[int, ...] = ()
    """Tokens after the video; none: the clip is shown, and nothing is asked."""
    choices: tuple[int, ...] = ()
    """One token each."""
    answer: int = 0
    """The place of the right one."""


@dataclass(frozen=True, kw_only=True)
class EventPair:
    """Violation of expectation: two clips that are equal before `event_frame`."""

    possible: int
    impossible: int
    event: str
    event_frame: int


class Vocabulary:
    """Words, punctuation and whole choices <-> numbers, as they occur in some entries of the benchmark."""

    def __init__(self, entries: Sequence[dict[str, Any]]) -> None:
        phrases = sorted(
            {choice for entry in entries for choice in entry["choices"]}, key=lambda text: (-len(text), text)
        )
        self._pattern = re.compile(
            "|".join([*(rf"\b{re.escape(phrase)}\b" for phrase in phrases), r"\w+", r"[^\w\s]"])
        )
        pieces = sorted({piece for entry in entries for piece in self._pieces(_prompt_of(entry))} | set(phrases))
        self._ids = {piece: number for number, piece in enumerate(pieces, start=END + 1)}

    def __len__(self) -> int:
        return END + 1 + len(self._ids)

    def _pieces(self, text: str) -> list[str]:
        return self._pattern.findall(text)

    def encode(self, text: str) -> tuple[int, ...]:
        """Raises KeyError for a word that no entry has."""
        return tuple(self._ids[piece] for piece in self._pieces(text))


def _prompt_of(entry: dict[str, Any]) -> str:
    return entry["conversations"][0]["value"].removeprefix("<video>\n")


class StudyData:
    """All clips of the study, numbered through, with their questions and pairs by split.

    Of some training clips nothing is asked (`DataSettings.num_watched`).
    """

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings
        numbers = {"val": settings.num_val, "test": settings.num_test, "train": settings.num_train}
        num_pairs = {"val": settings.num_val_pairs, "test": settings.num_test_pairs, "train": settings.num_watched}
        options = {"seed": settings.seed, "num_frames": settings.num_frames, "levels": settings.levels}
        self.clips: list[BenchmarkClip] = []
        entries, pairs = {}, {}
        for split, number in numbers.items():
            clips = make_clips(number, split=split, question_types=settings.question_types, **options)
            entries[split] = entries_of(clips, question_types=settings.question_types)
            pairs[split] = make_clips(2 * num_pairs[split], split=split, question_types=["possible"], **options)
            clips += pairs[split][::2] if split == "train" else pairs[split]
            self.clips += sorted(
                clips, key=lambda clip: clip.name[-4:]
            )  # kinds are mixed: the first ones stand for all
        self.vocabulary = Vocabulary([entry for some in entries.values() for entry in some])
        places = {clip.name: place for place, clip in enumerate(self.clips)}
        self.questions = {split: [self._question(entry, places) for entry in some] for split, some in entries.items()}
        self.pairs = {
            split: [
                EventPair(
                    possible=places[one.name],
                    impossible=places[other.name],
                    event=one.draft.notes["event"],
                    event_frame=one.draft.notes["event_frame"],
                )
                for one, other in zip(clips[::2], clips[1::2], strict=True)
            ]
            for split, clips in pairs.items()
            if split != "train"
        }
        self.questions["train"] += [StudyQuestion(clip=places[clip.name]) for clip in pairs["train"][::2]]

    def _question(self, entry: dict[str, Any], places: dict[str, int]) -> StudyQuestion:
        name = entry["video"].removeprefix("videos/").removesuffix(".mp4")
        choices = [self.vocabulary.encode(choice) for choice in entry["choices"]]
        return StudyQuestion(
            id=entry["id"],
            clip=places[name],
            question_type=entry["question_type"],
            prompt=self.vocabulary.encode(_prompt_of(entry)),
            choices=tuple(token for (token,) in choices),
            answer=entry["choices"].index(entry["conversations"][1]["value"]),
        )

    @property
    def fingerprint(self) -> str:
        """Of the settings that the clips depend on, not of the code that draws them."""
        return hashlib.sha256(json.dumps(asdict(self.settings)).encode()).hexdigest()[:12]

    @property
    def num_frames(self) -> int:
        """Of each clip, as it is shown (T)."""
        return len(self.settings.shown_frames)

    @property
    def training_frames(self) -> slice:
        """Where those of training clips lie among the frames of all clips."""
        return slice(min(question.clip for question in self.questions["train"]) * self.num_frames, None)

    def frames(self, clip: int) -> np.ndarray:
        """`[T, H, W, 3]` uint8."""
        return render_clip(self.clips[clip], self.settings.image_size, self.settings.shown_frames)

    def frame_numbers(self, clip: int, *, shuffled: bool = False) -> np.ndarray:
        """`[T]`, numbered through all clips; in the order of the benchmark's control if `shuffled`.

        Of the few frames that are shown, the control leaves now and then all in their places: 7 of 240 test questions.
        """
        order = np.arange(self.num_frames)
        if shuffled:
            drawn = frame_order(self.clips[clip], "shuffled") // self.settings.frame_step
            order = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        return clip * self.num_frames + order


class StudySamples(Dataset):
    """Questions as samples of the package's collator.

    Args:
        layout: of the model's video tokens.
        answered: with the answer, as in training.
        shuffled: the frames of each clip in random order, at the same times.
    """

    def __init__(
        self,
        data: StudyData,
        questions: Sequence[StudyQuestion],
        layout: FrameTokenLayout,
        *,
        answered: bool = True,
        shuffled: bool = False,
    ) -> None:
        self.data, self.questions, self.layout = data, questions, layout
        self.answered, self.shuffled = answered, shuffled

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        question, settings = self.questions[index], self.data.settings
        video = [VIDEO] * self.layout.num_tokens(self.data.num_frames)
        if question.prompt:
            answer = [question.choices[question.answer], END] if self.answered else []
            text = [*question.prompt, *answer]
        else:
            text, answer = [END], []
        labels = [-100] * (len(video) + len(text) - len(answer)) + answer
        numbers = torch.from_numpy(self.data.frame_numbers(question.clip, shuffled=self.shuffled))
        return {
            "input_ids": torch.tensor(video + text),
            "labels": torch.tensor(labels),
            "pixel_values_videos": numbers.float().view(1, -1, 1, 1, 1),
            "video_frame_mask": torch.ones(1, self.data.num_frames, dtype=torch.bool),
            "video_timestamps": torch.arange(self.data.num_frames)[None] * settings.frame_step / settings.fps,
            "video_layout": self.layout.as_tensor()[None],
        }
