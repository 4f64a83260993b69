"""Time that dropping visual tokens saves, and time that selecting them costs.

On a model with random weights: neither time nor memory depends on what they are.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers.cache_utils import DynamicCache

from ...configuration.configuration_llava_next_ar import LlavaNextARConfig
from ...modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from .selection import change_scores, first_frame_first, keep_tokens, keep_with_newlines, prune_prompts

_PAD, _IMAGE, _VIDEO, _VOCABULARY = 0, 1, 2, 1000


@dataclass(frozen=True, kw_only=True)
class PrefillSettings:
    """A language model of the width of Qwen2-0.5B behind a small vision tower, and one prompt about one video."""

    num_layers: int = 12
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_heads: int = 14
    num_key_value_heads: int = 2
    vision_size: int = 64
    image_size: int = 112
    patch_size: int = 8
    num_frames: int = 16
    num_text_tokens: int = 32
    repeats: int = 5
    device: str = "cpu"
    seed: int = 0


def build_model(settings: PrefillSettings) -> LlavaNextARForConditionalGeneration:
    torch.manual_seed(settings.seed)
    config = LlavaNextARConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": settings.vision_size,
            "intermediate_size": 2 * settings.vision_size,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": settings.image_size,
            "patch_size": settings.patch_size,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": settings.hidden_size,
            "intermediate_size": settings.intermediate_size,
            "num_hidden_layers": settings.num_layers,
            "num_attention_heads": settings.num_heads,
            "num_key_value_heads": settings.num_key_value_heads,
            "vocab_size": _VOCABULARY,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": _PAD,
        },
        image_token_index=_IMAGE,
        video_token_index=_VIDEO,
        image_grid_pinpoints=[[settings.image_size, settings.image_size]],
    )
    return LlavaNextARForConditionalGeneration(config).to(settings.device).eval()


def make_prompt(model: Any, settings: PrefillSettings) -> dict[str, torch.Tensor]:
    """The inputs of one prompt: a video of noise, then text."""
    generator = torch.Generator().manual_seed(settings.seed)
    num_tokens = model.config.frame_token_layout.num_tokens(settings.num_frames)
    words = torch.randint(_VIDEO + 1, _VOCABULARY, (settings.num_text_tokens,), generator=generator)
    input_ids = torch.cat([torch.full((num_tokens,), _VIDEO), words])[None]
    shape = (1, settings.num_frames, 3, settings.image_size, settings.image_size)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values_videos": torch.randn(shape, generator=generator),
    }
    return {name: value.to(settings.device) for name, value in inputs.items()}


def cache_bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.inference_mode()
def measure_prefill(settings: PrefillSettings, shares: Sequence[float], *, progress: bool = True) -> dict[str, Any]:
    """Time to the first answer token, given the vision features, and memory of the cache, at each share and at 1.

    Everything is measured once before it counts, then in turns, so that a machine that slows down does so for all alike. On a
    CPU these are processor seconds of one thread, in which other processes do not count.

    Returns:
        `tower_seconds`, `surprise_seconds` (the pass through language model and head that scores by surprise),
        `change_seconds` (EVS), the medians of the repeats; and `by_share`, for each `share` with `num_tokens` (of the prompt),
        `seconds`, `all_seconds` (one for each repeat) and `cache_bytes`.
    """
    shares = list(dict.fromkeys([1.0, *shares]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = build_model(settings)
        batch = make_prompt(model, settings)
        pixels = batch["pixel_values_videos"]
        video = model.model.get_video_features(pixels, return_dict=True)
        (features,), (tokens,) = video.pooler_output, model.model.video_tokens(video)
        caches: dict[float, DynamicCache] = {}
        lengths: dict[float, int] = {}

        def prefill(share: float) -> None:
            # These scores cost nothing; the cost of real ones is measured apart.
            scores = torch.arange(len(tokens.patch_offsets), 0, -1, device=features.device)
            keep = keep_with_newlines(keep_tokens(scores, share), tokens)
            pruned = prune_prompts(model, batch, [features], [keep])
            caches[share] = DynamicCache(config=model.config.get_text_config())
            model(**pruned.inputs, past_key_values=caches[share], use_cache=True, logits_to_keep=1)
            lengths[share] = pruned.inputs["attention_mask"].shape[1]

        def score_by_change() -> None:
            first_frame_first(change_scores(features, tokens), tokens)

        jobs: dict[Any, Callable[[], Any]] = {
            "tower": lambda: model.model.get_video_features(pixels, return_dict=True),
            "surprise": lambda: model.surprise(**batch),
            "change": score_by_change,
            **{share: (lambda share=share: prefill(share)) for share in shares},
        }
        seconds: dict[Any, list[float]] = {name: [] for name in jobs}
        with tqdm(total=(settings.repeats + 1) * len(jobs), desc="prefill", disable=not progress) as bar:
            for number in range(settings.repeats + 1):
                for name, job in jobs.items():
                    taken = _seconds_of(job, settings.device)
                    if number > 0:
                        seconds[name].append(taken)
                    bar.update()
    finally:
        torch.set_num_threads(threads)
    tower, surprise, change = (statistics.median(seconds[name]) for name in ("tower", "surprise", "change"))
    return {
        "tower_seconds": tower,
        # Its pass runs the tower as well, which every way has to do once.
        "surprise_seconds": surprise - tower,
        "change_seconds": change,
        "by_share": [
            {
                "share": share,
                "num_tokens": lengths[share],
                "seconds": statistics.median(seconds[share]),
                "all_seconds": [round(taken, 5) for taken in seconds[share]],
                "cache_bytes": cache_bytes(caches[share]),
            }
            for share in shares
        ],
    }


def _seconds_of(job: Callable[[], Any], device: str) -> float:
    if torch.device(device).type == "cpu":
        start = time.process_time()
        job()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    job()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start
