"""Clips and questions of the study as samples for the package's collator; frames are given by their numbers.

Clips come from a library of experiments/sources: drawn by seed, or recorded in simulators. Words are tokens, and so is each
choice as a whole: the model's answer is one token and the end of its turn.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ...configuration.frame_token_layout import FrameTokenLayout
from ..sources.clips import ClipLibrary, ClipQuestion, fingerprint_of, join, open_library
from ..sources.drawn_clips import DataSettings, drawn_library
from ..sources.metaworld_clips import MOTIONS, MetaworldSettings
from ..sources.vizdoom_clips import VizdoomSettings

PAD, VIDEO, IMAGE, END = range(4)  # ids of the tokens that are not words, in the study's own vocabulary


@dataclass(frozen=True, kw_only=True)
class SimulatedSettings:
    """Clips of two simulators, recorded once into a cache."""

    vizdoom: VizdoomSettings = field(default_factory=VizdoomSettings)
    metaworld: MetaworldSettings = field(default_factory=MetaworldSettings)
    motions: MetaworldSettings = field(
        default_factory=lambda: MetaworldSettings(
            name="metaworld_motions", num_train=0, num_val=2, num_test=8, num_cameras=0, num_val_pairs=16,
            num_test_pairs=80, events=MOTIONS, seed=1,
        )
    )  # fmt: skip
    """Further pairs, whose event is an impossible motion without a sudden change."""
    question_types: tuple[str, ...] = ("turn", "strafe", "order", "next", "opens", "object")
    """Questions of other types are left out, and clips that have no other questions too."""
    tower_layers: int = 6

    def __post_init__(self) -> None:
        sizes = {own.name: own.image_size for own in (self.vizdoom, self.metaworld, self.motions)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"image_size is {sizes}, expected the same for all")

    @property
    def image_size(self) -> int:
        return self.vizdoom.image_size


Settings = DataSettings | SimulatedSettings


class SpecialTokens(NamedTuple):
    """Ids of the tokens that are not words."""

    pad: int = PAD
    video: int = VIDEO
    image: int = IMAGE
    end: int = END


@dataclass(frozen=True, kw_only=True)
class StudyQuestion:
    clip: int
    """Number of the clip among all of the study."""
    id: str = ""
    question_type: str = ""
    prompt: tuple[int, ...] = ()
    """Tokens after the video; empty if the clip has no question."""
    choices: tuple[int, ...] = ()
    """One token each."""
    answer: int = 0
    """Index of the right choice."""


class Vocabulary:
    """Mapping between words, punctuation and whole choices and token ids, as they occur in questions."""

    special = SpecialTokens()

    def __init__(self, questions: Sequence[ClipQuestion]) -> None:
        phrases = sorted(
            {choice for question in questions for choice in question.choices}, key=lambda text: (-len(text), text)
        )
        self._pattern = re.compile(
            "|".join([*(rf"\b{re.escape(phrase)}\b" for phrase in phrases), r"\w+", r"[^\w\s]"])
        )
        pieces = sorted({piece for question in questions for piece in self._pieces(question.text)} | set(phrases))
        self._ids = {piece: number for number, piece in enumerate(pieces, start=END + 1)}

    def __len__(self) -> int:
        return END + 1 + len(self._ids)

    def _pieces(self, text: str) -> list[str]:
        return self._pattern.findall(text)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text.

        Raises:
            KeyError: for a word that occurs in no question.
        """
        return tuple(self._ids[piece] for piece in self._pieces(text))


class StudyData:
    """All clips of the study, numbered through, with their questions and pairs by split.

    Training clips without a question are shown without one; those whose questions are of other types are left out.

    Args:
        settings: of the clips.
        libraries: one for each source.
        vocabulary: of a pretrained language model; otherwise one is made of the words of the questions.

    Raises:
        ValueError: if a choice is not a single token of the vocabulary.
    """

    def __init__(
        self, settings: Settings, libraries: Sequence[ClipLibrary], vocabulary: Vocabulary | Any | None = None
    ) -> None:
        self.settings, self.libraries = settings, libraries
        self.library = libraries[0] if len(libraries) == 1 else join(libraries)
        asked = {
            split: [(clip, question) for clip, question in own if question.question_type in settings.question_types]
            for split, own in self.library.questions.items()
        }
        if vocabulary is None:
            vocabulary = Vocabulary([question for own in asked.values() for _, question in own])
        self.vocabulary = vocabulary
        self.questions = {
            split: [self._question(clip, question) for clip, question in own] for split, own in asked.items()
        }
        self.pairs = {split: pairs for split, pairs in self.library.pairs.items() if split != "train"}
        with_question = {clip for clip, _ in self.library.questions["train"]}
        self.questions["train"] += [
            StudyQuestion(clip=clip) for clip in self.library.of_split("train") if clip not in with_question
        ]

    def _question(self, clip: int, question: ClipQuestion) -> StudyQuestion:
        choices = [self.vocabulary.encode(choice) for choice in question.choices]
        if any(len(tokens) != 1 for tokens in choices):
            raise ValueError(f"choices {question.choices} have the tokens {choices}, expected one token each")
        return StudyQuestion(
            id=f"{self.library.clips[clip].name}_{question.question_type}",
            clip=clip,
            question_type=question.question_type,
            prompt=self.vocabulary.encode(question.text),
            choices=tuple(token for (token,) in choices),
            answer=question.choices.index(question.answer),
        )

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the settings, not of the code that makes the clips."""
        return fingerprint_of(self.settings)

    @property
    def num_frames(self) -> int:
        """Number of shown frames of each clip (T)."""
        return self.library.num_frames

    def training_frames(self, count: int) -> np.ndarray:
        """Numbers of at most `count` frames of training recordings; kinds are mixed."""
        recordings = sorted({self.library.clips[clip].recording for clip in self.library.of_split("train")})
        if isinstance(self.settings, SimulatedSettings):  # sorted by source and map
            recordings = np.random.default_rng(0).permutation(recordings)
        frames = np.asarray(recordings)[:, None] * self.num_frames + np.arange(self.num_frames)
        return frames.flatten()[:count]

    def frames(self, clip: int) -> np.ndarray:
        """`[T, H, W, 3]` uint8."""
        return self.library.frames(clip)

    def frame_numbers(self, clip: int, *, shuffled: bool = False) -> np.ndarray:
        """Numbers `[T]` of a clip's frames among those of all recordings; in random order if `shuffled`."""
        order = self.library.frame_order(clip, shuffled=shuffled)
        return self.library.clips[clip].recording * self.num_frames + order


def open_data(settings: Settings, cache: Path, vocabulary: Vocabulary | Any | None = None) -> StudyData:
    """The clips of the study, drawn, or recorded into `cache/sources` unless they lie there.

    Args:
        vocabulary: of a pretrained language model.

    Raises:
        ImportError: if clips must be recorded and the simulator is not installed.
    """
    if isinstance(settings, DataSettings):
        return StudyData(settings, [drawn_library(settings)], vocabulary)
    sources = [
        open_library(own, cache / "sources") for own in (settings.vizdoom, settings.metaworld, settings.motions)
    ]
    return StudyData(settings, sources, vocabulary)


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
        question, special = self.questions[index], self.data.vocabulary.special
        video = [special.video] * self.layout.num_tokens(self.data.num_frames)
        if question.prompt:
            answer = [question.choices[question.answer], special.end] if self.answered else []
            text = [*question.prompt, *answer]
        else:
            text, answer = [special.end], []
        labels = [-100] * (len(video) + len(text) - len(answer)) + answer
        numbers = torch.from_numpy(self.data.frame_numbers(question.clip, shuffled=self.shuffled))
        return {
            "input_ids": torch.tensor(video + text),
            "labels": torch.tensor(labels),
            "pixel_values_videos": numbers.float().view(1, -1, 1, 1, 1),
            "video_frame_mask": torch.ones(1, self.data.num_frames, dtype=torch.bool),
            "video_timestamps": torch.arange(self.data.num_frames)[None] * self.data.library.frame_seconds,
            "video_layout": self.layout.as_tensor()[None],
        }
