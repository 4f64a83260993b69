"""Accuracy of linear probes on frozen features: the level that a question type reaches without a video language model.

Each probe is a ridge classifier on one view of the features of a clip. Its penalty is chosen on the validation split.

| view | features | needs the order of the frames |
|---|---|---|
| single frame | one frame; the best one is chosen on validation | no |
| mean frame | mean over the frames | no |
| shuffled | all frames in random order | no |
| ordered | all frames in order | yes |
| products | products of neighbouring patches in successive frames | yes |

An accuracy of the model counts as temporal where it is above the first three.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .data import StudyData, StudyQuestion
from .features import FeatureBank

PENALTIES = tuple(10.0**power for power in range(-3, 5))
"""Of the ridge, relative to the mean of the kernel's diagonal."""
GRID = 4
"""Rows and columns of patches that a probe sees of each frame; finer ones are averaged."""
UNORDERED_VIEWS = ("single frame", "mean frame", "shuffled")
ORDERED_VIEWS = ("ordered", "products")


def clip_features(bank: FeatureBank, frame_numbers: np.ndarray) -> torch.Tensor:
    """Features `[T, GRID, GRID, Dv]` of the frames of a clip, standardised as the model gets them."""
    hidden_state = bank(torch.from_numpy(frame_numbers).float().view(-1, 1, 1, 1)).hidden_states[-1][:, 1:]
    side = round(hidden_state.shape[1] ** 0.5)
    grid = hidden_state.unflatten(1, (side, side)).movedim(-1, 1)
    return torch.nn.functional.adaptive_avg_pool2d(grid, min(side, GRID)).movedim(1, -1)


def neighbour_products(features: torch.Tensor) -> torch.Tensor:
    """Products of patches with their neighbours in the next frame, `[T, H, W, Dv]` -> `[(T - 1) * 9 * Dv]`.

    For each of nine offsets of at most one patch, the mean over the patches whose neighbour lies in the frame.
    """
    now, after = features[:-1], features[1:]
    height, width = features.shape[1:3]
    means = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            rows = slice(max(0, -down), height - max(0, down)), slice(max(0, down), height - max(0, -down))
            columns = slice(max(0, -right), width - max(0, right)), slice(max(0, right), width - max(0, -right))
            means.append((now[:, rows[0], columns[0]] * after[:, rows[1], columns[1]]).mean((1, 2)))
    return torch.stack(means, dim=1).flatten()


def ridge_accuracy(
    train: torch.Tensor, train_labels: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> list[float]:
    """Accuracy on validation and test of a ridge classifier, with the penalty that is best on validation.

    Args:
        train: features `[N, F]`.
        train_labels: `[N]` of class numbers.
        parts: features and labels of validation, then of test.
    """
    mean = train.mean(0)
    centred = train - mean
    kernel = (centred @ centred.T).double()
    targets = torch.nn.functional.one_hot(train_labels).double()
    offset = targets.mean(0)
    kernels = [((own - mean) @ centred.T).double() for own, _ in parts]
    scale = kernel.diagonal().mean()
    best = [-1.0, -1.0]
    for penalty in PENALTIES:
        weights = torch.linalg.solve(kernel + penalty * scale * torch.eye(len(kernel)), targets - offset)
        accuracies = [
            ((own @ weights + offset).argmax(1) == labels).double().mean().item()
            for own, (_, labels) in zip(kernels, parts, strict=True)
        ]
        best = max(best, accuracies, key=lambda pair: pair[0])
    return best


def views_of(data: StudyData) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Functions from the features `[T, H, W, Dv]` of a clip to those of a view, by name; `shuffled` is missing."""
    singles = {f"frame {t}": (lambda features, t=t: features[t].flatten()) for t in range(data.num_frames)}
    return {
        **singles,
        "mean frame": lambda features: features.mean(0).flatten(),
        "ordered": torch.flatten,
        "products": neighbour_products,
    }


def measure_ceilings(data: StudyData, bank: FeatureBank) -> Iterator[dict[str, Any]]:
    """One entry for each question type: the numbers of clips, and the test accuracy of each view."""
    for question_type in data.settings.question_types:
        asked = {
            split: [question for question in data.questions[split] if question.question_type == question_type]
            for split in ("train", "val", "test")
        }
        if not all(asked.values()):
            raise ValueError(f"question type {question_type!r} is missing in some split, expected questions in each")
        yield {
            "question_type": question_type,
            "num_train": len(asked["train"]),
            "num_test": len(asked["test"]),
            "chance": 1 / len(asked["test"][0].choices),
            **_accuracies(data, bank, asked),
        }


def _accuracies(
    data: StudyData, bank: FeatureBank, asked: dict[str, list[StudyQuestion]]
) -> dict[str, float | dict[str, float]]:
    labels = {split: _labels(questions) for split, questions in asked.items()}
    results: dict[str, list[float]] = {}

    def probe(name: str, view: Callable[[torch.Tensor], torch.Tensor], shuffled: bool) -> None:
        features = {
            split: torch.stack(
                [view(clip_features(bank, data.frame_numbers(one.clip, shuffled=shuffled))) for one in questions]
            )
            for split, questions in asked.items()
        }
        parts = [(features[split], labels[split]) for split in ("val", "test")]
        results[name] = ridge_accuracy(features["train"], labels["train"], parts)

    for name, view in views_of(data).items():
        probe(name, view, False)
    probe("shuffled", torch.flatten, True)
    singles = {name: own for name, own in results.items() if name.startswith("frame ")}
    chosen = max(singles, key=lambda name: singles[name][0])
    return {
        "single frame": singles[chosen][1],
        "chosen frame": float(chosen.removeprefix("frame ")),
        **{name: round(own[1], 4) for name, own in results.items() if not name.startswith("frame ")},
        "frames": {name: round(own[1], 4) for name, own in singles.items()},
    }


def _labels(questions: Sequence[StudyQuestion]) -> torch.Tensor:
    """Tokens of the answers as class numbers."""
    classes = sorted(questions[0].choices)
    return torch.tensor([classes.index(question.choices[question.answer]) for question in questions])
