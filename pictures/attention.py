"""Attention of the answer's tokens to the frames of a video; used by `llava-next-ar visualize`.

The weights are those of the tokens from which the answer is predicted: the last token of the prompt, and all but the last token
of the answer. The prompt is read with the attention implementation of the checkpoint. Only the tokens of the answer are read
with `eager`, the implementation that returns weights. Memory therefore grows linearly with the length of the prompt.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from transformers.cache_utils import DynamicCache

from ..configuration.frame_token_layout import VideoTokens
from .strip import (
    BLUE,
    LIGHT,
    ORANGE,
    WIDTH,
    ColourBar,
    NotThereError,
    StripRow,
    colour_scale,
    frame_strip,
    patch_colours,
    time_labels,
    write_title,
)

# From dark to bright: patches with high attention stand out.
COLOURS = "magma"


@dataclass(frozen=True)
class AnswerAttention:
    """Generated answer and the attention of its tokens.

    Attributes:
        answer: the generated text.
        num_tokens: number of its tokens, with the one that ends the turn.
        weights: `[layers, S]` float32, mean over heads and answer tokens. S counts the prompt and the answer without its last
            token; each row sums to 1.
    """

    answer: str
    num_tokens: int
    weights: torch.Tensor


@contextmanager
def _eager(language_model: Any) -> Iterator[None]:
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)


@torch.inference_mode()
def answer_attention(
    model: Any, processor: Any, inputs: dict[str, torch.Tensor], max_new_tokens: int = 16
) -> AnswerAttention:
    """Answers a prompt greedily, and reads the attention of the answer's tokens.

    Args:
        model, processor: of a checkpoint.
        inputs: of one generation prompt, with text after its last image or video.
        max_new_tokens: of the answer.

    Raises:
        NotThereError: if the language model returns no attention weights, or the prompt ends with a visual token.
    """
    prompt = inputs["input_ids"]
    visual = (prompt[0] == model.config.video_token_id) | (prompt[0] == model.config.image_token_id)
    if bool(visual[-1]):
        raise NotThereError("the prompt ends with a visual token; the token that answers must be text")
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    answer = generated[:, prompt.shape[1] :]
    read = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    # transformers 5.24 calls it `cache`, and takes the old name too
    cache = DynamicCache(config=model.config.get_text_config())
    model(
        **read,
        input_ids=prompt[:, :-1],
        past_key_values=cache,
        use_cache=True,
        skip_reconstruction=True,
        logits_to_keep=1,
    )
    speakers = torch.cat([prompt[:, -1:], answer[:, :-1]], dim=1)
    with _eager(model.model.language_model):
        attentions = model(
            input_ids=speakers, past_key_values=cache, use_cache=True, output_attentions=True, logits_to_keep=1
        ).attentions
    if not attentions or any(layer is None for layer in attentions):
        raise NotThereError(f"{type(model.model.language_model).__name__} returns no attention weights")
    length = prompt.shape[1] - 1 + speakers.shape[1]
    # A layer with a sliding window has the last keys only: the weight of the others is 0.
    weights = [
        torch.nn.functional.pad(layer[0].float().mean((0, 1)), (length - layer.shape[-1], 0)) for layer in attentions
    ]
    text = processor.tokenizer.decode(answer[0], skip_special_tokens=True).strip()
    return AnswerAttention(text, answer.shape[1], torch.stack(weights).cpu())


def attention_numbers(weights: torch.Tensor, tokens: VideoTokens, first_position: int) -> dict[str, Any]:
    """Attention by part of the sequence: shares that sum to 1 for each layer.

    Args:
        weights: `[layers, S]`.
        tokens: token map of the video.
        first_position: position of the video's first token in the sequence.

    Returns:
        `layers`: for each layer `before` (text before the video), `frames` (patches of each frame), `separators` (newline and
        faster tokens of the video) and `after` (text after the video, and the answer so far).
        `patches`: for each frame `[h][w]`, the mean over layers, as a multiple of uniform attention over the sequence.
    """
    video = weights[:, first_position : first_position + len(tokens)].double()
    offsets = tokens.patch_offsets
    counts = [height * width for height, width in tokens.frame_grids]
    by_frame = video[:, offsets].split(counts, dim=1)
    shares = torch.stack([own.sum(1) for own in by_frame], dim=1)  # [layers, T]
    before = weights[:, :first_position].double().sum(1)
    after = weights[:, first_position + len(tokens) :].double().sum(1)
    separators = video.sum(1) - shares.sum(1)
    layers = [
        {"before": b, "frames": f, "separators": max(s, 0.0), "after": a}
        for b, f, s, a in zip(before.tolist(), shares.tolist(), separators.tolist(), after.tolist(), strict=True)
    ]
    patches = [
        (own.mean(0) * weights.shape[1]).unflatten(0, grid).tolist()
        for own, grid in zip(by_frame, tokens.frame_grids, strict=True)
    ]
    return {"layers": layers, "patches": patches}


def attention_maps(frames: np.ndarray, seconds: Sequence[float], numbers: dict[str, Any], title: str) -> Figure:
    """Attention to each patch, mean over layers and heads, below its frame; bright is high.

    Args:
        frames: `[T, H, W, 3]` in 0 to 1.
        seconds: time of each frame.
        numbers: of `attention_numbers`.
        title: of the whole.
    """
    patches = [np.array(some) for some in numbers["patches"]]
    most = max(float(np.percentile(np.concatenate([some.ravel() for some in patches]), 99)), 1e-9)
    scale = colour_scale(COLOURS, Normalize(0, most))
    shares = np.mean([layer["frames"] for layer in numbers["layers"]], axis=0)
    rows = [
        StripRow(name="frame", pictures=list(frames)),
        StripRow(
            name="attention",
            pictures=[patch_colours(frame, some, scale) for frame, some in zip(frames, patches, strict=True)],
            captions=[f"{100 * share:.2g}%" for share in shares],
        ),
    ]
    label = "attention to a patch, 1 = uniform over the prompt (numbers: share of the frame)"
    return frame_strip(
        rows, time_labels(seconds), title=title, bars=[ColourBar(scale=scale, label=label, extend="max")]
    )


def attention_layers(numbers: dict[str, Any], title: str) -> Figure:
    """Attention of each layer to each frame, and its split between video and text."""
    layers = numbers["layers"]
    shares = np.array([layer["frames"] for layer in layers])
    num_layers, num_frames = shares.shape
    height = 1.5 + min(max(0.2 * num_layers, 0.9), 5)
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    write_title(figure, title)
    top, bottom = 1 - 0.72 / height, 0.5 / height
    frame_ax, split_ax = figure.subplots(
        1,
        2,
        gridspec_kw={
            "left": 0.065,
            "right": 0.985,
            "top": top,
            "bottom": bottom,
            "wspace": 0.2,
            "width_ratios": (3, 2),
        },
    )
    image = frame_ax.imshow(
        100 * shares, aspect="auto", cmap=COLOURS, vmin=0, interpolation="nearest",
        extent=(-0.5, num_frames - 0.5, num_layers - 0.5, -0.5),
    )  # fmt: skip
    bar = figure.colorbar(image, ax=frame_ax, fraction=0.04, pad=0.02)
    bar.ax.tick_params(labelsize=8, length=2)
    frame_ax.set_title("to the patches of each frame, in %", fontsize=9)
    frame_ax.set_xlabel("frame", fontsize=8.5, labelpad=2)
    left = np.zeros(num_layers)
    parts = (
        ("before", "text before", LIGHT),
        ("frames", "frames", BLUE),
        ("separators", "newline and faster tokens", ORANGE),
        ("after", "text after, and answer", "#8C8C8C"),
    )
    for name, label, colour in parts:
        values = 100 * np.array([np.sum(layer[name]) for layer in layers])
        split_ax.barh(range(num_layers), values, left=left, height=0.8, color=colour, label=label)
        left += values
    split_ax.set(xlim=(0, 100), ylim=(num_layers - 0.5, -0.5))
    split_ax.set_xlabel("% of the layer's attention", fontsize=8.5, labelpad=2)
    split_ax.legend(
        fontsize=8, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), borderpad=0.2, columnspacing=1,
        handlelength=1,
    )  # fmt: skip
    step = max(1, num_layers // 8)
    for ax in (frame_ax, split_ax):
        ax.set_yticks(range(0, num_layers, step))
        ax.tick_params(labelsize=8, length=2)
    frame_ax.set_xticks(range(0, num_frames, max(1, num_frames // 16)))
    frame_ax.set_ylabel("layer", fontsize=9)
    split_ax.spines[["top", "right"]].set_visible(False)
    return figure
