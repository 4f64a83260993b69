"""Tiny configurations, models and batches for the tests. Odd patch grid (5x5), so that every pooling mode differs."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from llava_next_ar.configuration.configuration_llava_next_ar import LlavaNextARConfig
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration

IMAGE_SIZE, PATCH_SIZE, GRID = 35, 7, 5
VOCAB_SIZE, IMAGE_TOKEN, VIDEO_TOKEN, PAD_TOKEN = 128, 126, 127, 0

ONEVISION = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "vision_use_head": False,
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": PAD_TOKEN,
    },
    "image_token_index": IMAGE_TOKEN,
    "video_token_index": VIDEO_TOKEN,
    "tie_word_embeddings": False,
    "image_grid_pinpoints": [[IMAGE_SIZE * h, IMAGE_SIZE * w] for h, w in ((1, 1), (1, 2), (2, 1), (2, 2))],
}
HEAD = {"num_heads": 2, "num_layers": 2}

LAYOUTS = {
    "one_token": {},
    "grid": {"mm_newline_position": "grid", "mm_spatial_pool_mode": "average"},
    "frame": {"mm_newline_position": "frame", "mm_spatial_pool_mode": "max"},
    "no_token": {"mm_newline_position": "no_token", "mm_spatial_pool_stride": 1},
    "slow_fast": {"mm_newline_position": "grid", "add_faster_video": True, "faster_token_stride": 2},
}


def tiny_config(head: dict[str, Any] | None = None, **keys: Any) -> LlavaNextARConfig:
    """A config of a few thousand parameters; `head` overrides keys of `autoregressive_config`."""
    return LlavaNextARConfig(**{**copy.deepcopy(ONEVISION), "autoregressive_config": {**HEAD, **(head or {})}, **keys})


def tiny_model(head: dict[str, Any] | None = None, seed: int = 0, freeze_tower: bool = True, **keys: Any):
    """A model with random weights, in eval mode; with `freeze_tower` the tower is its own teacher."""
    torch.manual_seed(seed)
    model = LlavaNextARForConditionalGeneration(tiny_config(head, **keys)).eval()
    if freeze_tower:
        model.model.vision_tower.requires_grad_(False)
    return model


def tiny_onevision(seed: int = 0, **keys: Any) -> LlavaOnevisionForConditionalGeneration:
    torch.manual_seed(seed)
    config = LlavaOnevisionConfig(**{**copy.deepcopy(ONEVISION), **keys})
    return LlavaOnevisionForConditionalGeneration(config).eval()


def make_sample(
    config: LlavaNextARConfig, lengths: Sequence[int], seed: int = 0, types: Any = None, text: int = 5
) -> dict:
    """One sample: text, the videos with text between them, and an answer of four supervised tokens."""
    random = torch.Generator().manual_seed(seed)

    def words(count: int) -> torch.Tensor:
        return torch.randint(1, 120, (count,), generator=random)

    pieces, videos, times = [words(text)], [], []
    for length in lengths:
        num_tokens = config.frame_token_layout.num_tokens(length, None if types is None else types[:length])
        pieces += [torch.full((num_tokens,), VIDEO_TOKEN), words(2)]
        videos.append(torch.randn(length, 3, IMAGE_SIZE, IMAGE_SIZE, generator=random))
        times.append(torch.rand(length, generator=random).cumsum(0))
    answer = words(4)
    input_ids = torch.cat([*pieces, answer])
    labels = torch.full_like(input_ids, -100)
    labels[-len(answer) :] = answer
    return {"input_ids": input_ids, "labels": labels, "videos": videos, "times": times, "types": types}


def collate(samples: Sequence[dict], padding_side: str = "right", garbage: bool = False) -> dict[str, torch.Tensor]:
    """A batch as processor and collator give it. With `garbage`, padded frames hold noise instead of zeros."""
    width = max(len(sample["input_ids"]) for sample in samples)
    batch: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for sample in samples:
        missing = width - len(sample["input_ids"])
        amount = (missing, 0) if padding_side == "left" else (0, missing)
        ones = torch.ones_like(sample["input_ids"])
        for name, values, fill in (
            ("input_ids", sample["input_ids"], PAD_TOKEN),
            ("attention_mask", ones, 0),
            ("labels", sample["labels"], -100),
        ):
            batch[name].append(torch.nn.functional.pad(values, amount, value=fill))
    inputs = {name: torch.stack(rows) for name, rows in batch.items()}
    videos = [video for sample in samples for video in sample["videos"]]
    if not videos:
        return inputs
    num_frames = max(map(len, videos))
    shape = (len(videos), num_frames)
    filler = torch.randn(*shape, *videos[0].shape[1:]) * 9 if garbage else torch.zeros(*shape, *videos[0].shape[1:])
    inputs["pixel_values_videos"] = filler
    inputs["video_frame_mask"] = torch.zeros(shape, dtype=torch.bool)
    inputs["video_timestamps"] = torch.zeros(shape)
    if samples[0]["types"] is not None:
        inputs["video_frame_types"] = torch.zeros(shape, dtype=torch.long)
    row = 0
    for sample in samples:
        for video, time in zip(sample["videos"], sample["times"], strict=True):
            length = len(video)
            inputs["pixel_values_videos"][row, :length] = video
            inputs["video_frame_mask"][row, :length] = True
            inputs["video_timestamps"][row, :length] = time
            if sample["types"] is not None:
                inputs["video_frame_types"][row, :length] = torch.as_tensor(sample["types"][:length])
            row += 1
    return inputs


def video_batch(config: LlavaNextARConfig, lengths: Sequence[Sequence[int]], **keys: Any) -> dict[str, torch.Tensor]:
    """A batch of samples, each with videos of the given numbers of frames; sample i is seeded with i."""
    collate_keys = {name: keys.pop(name) for name in ("padding_side", "garbage") if name in keys}
    return collate([make_sample(config, own, seed=i, **keys) for i, own in enumerate(lengths)], **collate_keys)


def train_briefly(model, inputs: dict[str, torch.Tensor], steps: int = 6, lr: float = 1e-2) -> list[float]:
    """A few optimizer steps on all that trains; returns the unweighted reconstruction losses. Leaves eval mode."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        output = model(**inputs)
        optimizer.zero_grad()
        # Weight 1, whatever loss_weight says: few steps must show.
        (output.main_loss + output.autoregressive_loss).backward()
        optimizer.step()
        losses.append(output.autoregressive_loss.item())
    model.eval()
    return losses


def spread_answers(model: torch.nn.Module) -> None:
    """Draw wider weights of the language model, so that answers depend on each image, video and turn of a prompt."""
    for name, parameter in model.model.language_model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
