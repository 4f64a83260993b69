"""Training of a small model on videos with frames and tokens left out.

A model trained on evenly spaced frames alone would be at a disadvantage under a rule with another spacing. This one is trained
on random frames of random number, and in half of the batches on a random share of the tokens. So it favours none of the rules.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import TrainingArguments

from ...evaluation.measures import load_checkpoint
from ...training.collator import LlavaVideoCollator
from ...training.data import LlavaVideoDataset
from ...training.trainer import AutoregressiveTrainer
from .selection import keep_frames


class DecodedSamples(Dataset):
    """The samples of a data set, decoded once and held in memory; pixels in half precision, finer than their 8 bits."""

    def __init__(self, dataset: LlavaVideoDataset, *, progress: bool = True) -> None:
        self.processor = dataset.processor
        self._samples = []
        for index in tqdm(range(len(dataset)), desc="decoding", unit="clip", disable=not progress):
            sample = dataset[index]
            self._samples.append({**sample, "pixel_values_videos": sample["pixel_values_videos"].half()})

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self._samples[index]
        return {**sample, "pixel_values_videos": sample["pixel_values_videos"].float()}


class ThinningCollator:
    """Samples of one video each -> a batch in which a random choice of frames is shown, and in half of them of tokens.

    A token is left out by its place in `attention_mask`, which for the other tokens equals its absence.

    Args:
        processor: for the collator.
        config: of the model.
        num_frames: numbers of frames to draw from, one for a batch.
        num_whole: number of first batches that leave nothing out, from which motion is learned.
        least_share: of the tokens that stay.
        seed: of the draws.
    """

    def __init__(
        self,
        processor: Any,
        config: Any,
        num_frames: Sequence[int],
        *,
        num_whole: int = 0,
        least_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        self._collate = LlavaVideoCollator(processor)
        self._layout, self._video_token = config.frame_token_layout, config.video_token_id
        self._num_frames, self._num_whole, self._least_share = list(num_frames), num_whole, least_share
        self._rng = np.random.default_rng(seed)

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if self._num_whole > 0:
            self._num_whole -= 1
            return self._collate(samples)
        number = int(self._rng.choice(self._num_frames))
        batch = self._collate([self._thin(sample, number) for sample in samples])
        if self._rng.random() < 0.5:
            share = self._rng.uniform(self._least_share, 1)
            drawn = torch.from_numpy(self._rng.random(batch["input_ids"].shape))
            dropped = (batch["input_ids"] == self._video_token) & (drawn > share)
            batch["attention_mask"] = batch["attention_mask"].masked_fill(dropped, 0)
        return batch

    def _thin(self, sample: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
        frames = np.sort(self._rng.permutation(sample["pixel_values_videos"].shape[1])[:number]).tolist()
        return keep_frames(sample, frames, self._layout, self._video_token)


def train_with_parts_left_out(
    model: str,
    data: Path | str,
    output: Path | str,
    *,
    steps: int = 700,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
    num_frames: Sequence[int] = (2, 3, 4, 6, 8),
    whole_share: float = 0.55,
    progress: bool = True,
) -> None:
    """Train a small model further, and save it with the log.

    Args:
        model: checkpoint with a head whose processor samples as many frames as the longest video has.
        data: LLaVA JSON with one video for each entry; all of it is held in memory.
        num_frames: see `ThinningCollator`.
        whole_share: of the steps, the first of which leave nothing out.
    """
    loaded, processor = load_checkpoint(model)
    loaded.model.vision_tower.requires_grad_(False)
    samples = DecodedSamples(LlavaVideoDataset(data, processor), progress=progress)
    arguments = TrainingArguments(
        output_dir=str(output),
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=20,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        use_cpu=True,
        seed=seed,
        save_strategy="no",
        logging_steps=max(1, steps // 100),
        report_to="none",
        disable_tqdm=not progress,
        remove_unused_columns=False,
    )
    num_whole = int(whole_share * steps)
    collator = ThinningCollator(processor, loaded.config, num_frames, num_whole=num_whole, seed=seed)
    trainer = AutoregressiveTrainer(loaded, arguments, samples, processing_class=processor, data_collator=collator)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
