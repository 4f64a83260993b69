"""One run of the study: train a variant with a seed, measure it, and write one file."""

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...configuration.configuration_llava_next_ar import LlavaNextARConfig
from ...evaluation.settings import versions
from ...modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from ...training.collator import LlavaVideoCollator
from ...training.trainer import AutoregressiveTrainer
from ..sources.clips import ClipPair
from .data import END, PAD, SimulatedSettings, StudyData, StudyQuestion, StudySamples
from .features import (
    PATCH_SIZE,
    TOWER_WHEEL,
    TOWER_WIDTH,
    FeatureBank,
    StackedFeatures,
    feature_statistics,
    load_tower,
    open_features,
)
from .language_models import language_config, language_weights
from .measures import measure_answers, measure_frames, measure_pairs
from .variants import HEAD, LAYOUT, RunSettings, Variant

logger = logging.getLogger(__name__)

STATISTICS_FRAMES = 2000  # of training clips, by which features are standardized

# ---------------------------------------------------------------------------------------------------------------------
# What is trained


def build_model(
    settings: RunSettings,
    seed: int,
    vocabulary: Any,
    tower: nn.Module | None = None,
    cache: Path | None = None,
) -> LlavaNextARForConditionalGeneration:
    """A model with random weights drawn by the seed, but for a pretrained language model.

    Args:
        vocabulary: of the data.
        tower: takes the place of the model's vision tower, frozen.
        cache: folder of the pretrained language model, if the settings name one.
    """
    special = vocabulary.special
    config = LlavaNextARConfig(
        vision_config={
            "model_type": "dinov2",
            "hidden_size": TOWER_WIDTH,
            "num_hidden_layers": settings.data.tower_layers,
            "num_attention_heads": 6,
            "image_size": settings.data.image_size,
            "patch_size": PATCH_SIZE,
        },
        text_config=(
            language_config(cache, settings.num_layers)
            if settings.language_model
            else _small_language_config(settings, len(vocabulary))
        ),
        image_token_index=special.image,
        video_token_index=special.video,
        tie_word_embeddings=bool(settings.language_model),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        autoregressive_config={**HEAD, **settings.head},
        **{**LAYOUT, **settings.layout},
    )
    torch.manual_seed(seed)
    model = LlavaNextARForConditionalGeneration(config)
    if settings.language_model:
        model.model.language_model.load_state_dict(language_weights(cache, settings.num_layers))
    if tower is not None:
        model.model.vision_tower = tower
    model.model.vision_tower.requires_grad_(False)
    return model


def _small_language_config(settings: RunSettings, vocab_size: int) -> dict[str, Any]:
    return {
        # Positions that rotate: the same patch of the frame before is always as many tokens away. A GPT-2, which learns a
        # vector for each position instead, was far slower to see motion.
        "model_type": "qwen2",
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_attention_heads,
        "num_key_value_heads": settings.num_attention_heads,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
        "initializer_range": settings.initializer_range,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }


def training_samples(settings: RunSettings, seed: int, data: StudyData, model: Any) -> Subset:
    """All samples of a run in their order; equal for all variants with the same pool and batch sizes.

    A step is `batch_size` questions and then `unlabeled_batch_size` clips without a question. Both go through their pool in
    random order, again and again.
    """
    questions = data.questions["train"]
    num_shared = round(settings.train_share * len(questions))
    if num_shared < settings.batch_size:
        raise ValueError(
            f"train_share is {settings.train_share}, which leaves {num_shared} of {len(questions)} samples, expected at "
            f"least the batch_size of {settings.batch_size}"
        )
    pool = np.random.default_rng([seed, 0]).permutation(len(questions))[:num_shared]
    asked = _rounds(pool, settings.num_steps * settings.batch_size, np.random.default_rng([seed, 1]))
    unasked = [StudyQuestion(clip=clip) for clip in sorted({question.clip for question in questions})]
    shown = _rounds(
        np.arange(len(unasked)), settings.num_steps * settings.unlabeled_batch_size, np.random.default_rng([seed, 2])
    )
    steps = [asked.reshape(settings.num_steps, -1), len(questions) + shown.reshape(settings.num_steps, -1)]
    samples = StudySamples(data, [*questions, *unasked], model.config.frame_token_layout)
    return Subset(samples, np.concatenate(steps, axis=1).flatten().tolist())


def _rounds(pool: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """A given number of members of a pool; each one is repeated only after all others."""
    rounds = [rng.permutation(pool) for _ in range(-(-number // len(pool)))]
    return np.concatenate([*rounds, pool[:0]])[:number]


# ---------------------------------------------------------------------------------------------------------------------
# A run


class _Curve(TrainerCallback):
    """Callback that measures the development split a few times during training."""

    def __init__(self, num_points: int, measure: Any) -> None:
        self.num_points, self.measure, self.points = num_points, measure, []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        done = state.global_step * self.num_points
        if done // state.max_steps > (done - self.num_points) // state.max_steps:
            model.eval()
            point = {"step": state.global_step, **self.measure(model)}
            self.points.append(point)
            logger.info("step %(step)d: accuracy %(accuracy).3f, skill %(skill).3f", point)
            model.train()


def open_bank(data: StudyData, cache: Path) -> FeatureBank:
    """The features of all clips, from `cache` or computed into it."""
    settings = data.settings
    tower = partial(load_tower, cache / "tower", num_layers=settings.tower_layers, image_size=settings.image_size)
    # Recordings are many: half precision halves their features on disk.
    dtype = np.float16 if isinstance(settings, SimulatedSettings) else np.float32
    parts = []
    for library in data.libraries:
        path = cache / f"features-{TOWER_WHEEL}-{settings.tower_layers}layers-{library.fingerprint}.npy"
        parts.append(open_features(path, len(library.recordings), library.recording_frames, tower, dtype))
    features = parts[0] if len(parts) == 1 else StackedFeatures(parts)
    return FeatureBank(features, *feature_statistics(features[data.training_frames(STATISTICS_FRAMES)]))


def run_variant(
    variant: Variant,
    common: RunSettings,
    seed: int,
    data: StudyData,
    bank: nn.Module,
    *,
    cache: Path | None = None,
    use_cpu: bool = True,
    weights: Path | None = None,
) -> dict[str, Any]:
    """Train and measure; returns the content of the file of the run.

    Args:
        cache: folder of the pretrained language model, if the settings name one.
        use_cpu: False trains on the accelerator, with bf16 where the settings name a pretrained language model.
        weights: safetensors file to write the trained model to.
    """
    settings, start, begun = variant.settings(common), time.process_time(), time.monotonic()
    model = build_model(settings, seed, data.vocabulary, bank, cache)

    def measure(model: Any) -> dict[str, Any]:
        questions, pairs = _measured(settings, data, "val")
        right = measure_answers(model, data, questions)
        wins = measure_pairs(model, data, [pair for pair in pairs if pair.impossible])
        return {
            "accuracy": float(np.mean(right)),
            "answers": _by_type(questions, right),
            **measure_frames(model, data, sorted({question.clip for question in questions})),
            "pairs": {name: float(np.mean(some)) for name, some in wins.items()},
        }

    curve = _Curve(settings.curve_points, measure)
    with TemporaryDirectory() as folder:
        trainer = AutoregressiveTrainer(
            model,
            TrainingArguments(
                output_dir=folder,
                max_steps=settings.num_steps,
                per_device_train_batch_size=settings.batch_size + settings.unlabeled_batch_size,
                train_sampling_strategy="sequential",
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
                warmup_steps=settings.warmup_steps,
                lr_scheduler_type="cosine",
                logging_steps=max(1, settings.num_steps // 20),
                save_strategy="no",
                report_to=[],
                seed=seed,
                use_cpu=use_cpu,
                bf16=bool(settings.language_model) and not use_cpu,
            ),
            training_samples(settings, seed, data, model),
            data_collator=LlavaVideoCollator(data.vocabulary.special.pad),
            callbacks=[curve],
        )
        trainer.train()
    if weights is not None:
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
    model.eval()
    return {
        "variant": variant.name,
        "seed": seed,
        "settings": as_json(settings),
        "versions": versions(),
        "tower": TOWER_WHEEL,
        **_measure_test(model, settings, data),
        "curve": curve.points,
        "training_log": [
            {name: entry[name] for name in ("step", "main_loss", "autoregressive_loss") if name in entry}
            for entry in trainer.state.log_history
            if "main_loss" in entry
        ],
        "cpu_seconds": round(time.process_time() - start, 1),
        "seconds": round(time.monotonic() - begun, 1),
    }


def _measure_test(model: Any, settings: RunSettings, data: StudyData) -> dict[str, Any]:
    questions, pairs = _measured(settings, data, "test")
    return {
        "frames": measure_frames(model, data, sorted({question.clip for question in questions})),
        "answers": _by_type(questions, measure_answers(model, data, questions)),
        "answers_shuffled": _by_type(questions, measure_answers(model, data, questions, shuffled=True)),
        "pairs": {name: _by_event(pairs, some) for name, some in measure_pairs(model, data, pairs).items()},
    }


def _measured(settings: RunSettings, data: StudyData, split: str) -> tuple[list[StudyQuestion], list[ClipPair]]:
    """Questions and pairs of a split, or a fixed random share of them."""
    parts = []
    for own in (data.questions[split], data.pairs[split]):
        count = max(1, round(settings.measured_share * len(own)))
        chosen = np.sort(np.random.default_rng(0).permutation(len(own))[:count])
        parts.append([own[number] for number in chosen])
    return parts[0], parts[1]


def _by_type(questions: Sequence[Any], right: Sequence[bool]) -> dict[str, str]:
    """For each type a string with a digit for each question: 1 if the answer was right."""
    digits: dict[str, str] = {}
    for question, hit in zip(questions, right, strict=True):
        digits[question.question_type] = digits.get(question.question_type, "") + str(int(hit))
    return dict(sorted(digits.items()))


def _by_event(pairs: Sequence[ClipPair], wins: Sequence[float]) -> dict[str, str]:
    """For each event a string with a digit for each pair: 2 if the impossible clip scored higher, 1 if as high, 0 if lower."""
    digits: dict[str, str] = {}
    for pair, win in zip(pairs, wins, strict=True):
        digits[pair.event] = digits.get(pair.event, "") + str(round(2 * win))
    return dict(sorted(digits.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def as_json(settings: RunSettings) -> dict[str, Any]:
    """The settings in the form that a JSON file returns."""
    return json.loads(json.dumps(asdict(settings), default=dict))


def run_path(results: Path, variant: Variant, seed: int) -> Path:
    return results / variant.experiment / f"{variant.name}_seed{seed}.json"


def read_run(results: Path, variant: Variant, common: RunSettings, seed: int) -> dict[str, Any] | None:
    """The finished run, or None.

    Raises:
        ValueError: if there is one with other settings or another tower.
    """
    path = run_path(results, variant, seed)
    if not path.exists():
        return None
    run = json.loads(path.read_text(encoding="utf-8"))
    wanted = {"tower": TOWER_WHEEL, **as_json(variant.settings(common))}
    # A setting that did not exist when the run was made had its default.
    found = {"tower": run["tower"], **as_json(RunSettings()), **run["settings"]}
    if found != wanted:
        names = [name for name in wanted if wanted[name] != found.get(name)]
        raise ValueError(
            f"{path} was made with other settings ({', '.join(names) or 'others than there are now'}): move it away, or "
            "give another folder of results"
        )
    return run


def write_run(results: Path, variant: Variant, seed: int, run: dict[str, Any]) -> None:
    """Write the file of a run at once: a file that exists is complete."""
    path = run_path(results, variant, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
