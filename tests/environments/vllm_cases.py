"""Checkpoints, files and conversations of vllm_run.py, and the answers that `generate` gives."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

import av
import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava_next_ar.configuration.configuration_llava_next_ar import LlavaNextARConfig
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor

MAX_NEW_TOKENS = 12
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
# Qwen's: a full stop and the newline behind it are one piece, and become one token.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SIDE, _PATCH = 35, 7

# Name of a layout -> keys of the configuration, options of the processor.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one token": ({}, {"num_frames": 6}),
    "grid": ({"mm_newline_position": "grid", "mm_spatial_pool_mode": "average"}, {"num_frames": 6}),
    "frame": ({"mm_newline_position": "frame", "mm_spatial_pool_mode": "max"}, {"num_frames": 6}),
    "no token": ({"mm_newline_position": "no_token", "mm_spatial_pool_stride": 1}, {"fps": 4.0, "max_frames": 24}),
    "faster tokens": (
        {"mm_newline_position": "grid", "add_faster_video": True, "faster_token_stride": 3},
        {"num_frames": 8},
    ),
    "fast and slow": (
        {"mm_newline_position": "grid", "add_faster_video": True, "faster_token_stride": 3},
        {"use_fast_slow_frames": True, "num_fast": 5, "num_slow": 4},
    ),
    "grid, times": (
        {"mm_newline_position": "grid", "mm_spatial_pool_mode": "average"},
        {"fps": 2.0, "max_frames": 8, "add_time_instruction": True},
    ),
    "untied": ({"tie_word_embeddings": False}, {"num_frames": 20}),
    "average, stride 3": (
        {"mm_spatial_pool_stride": 3, "mm_spatial_pool_mode": "average"},
        {"sampling": "uniform_time", "num_frames": 6},
    ),
}


# -- Checkpoints


def bpe_tokenizer(texts: Sequence[str], vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's pre-tokenizer, trained on the texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def make_checkpoint(
    folder: Path, keys: dict[str, Any], options: dict[str, Any], *, hidden_size: int = 128, num_layers: int = 2
) -> tuple[LlavaNextARForConditionalGeneration, LlavaNextARProcessor]:
    """Writes a checkpoint with random weights, large enough that answers depend on the prompt; returns what it holds."""
    instruction = "These frames are located at 0.00s.Please answer the following questions related to this video.\n"
    tokenizer = bpe_tokenizer([instruction * 9, "What happens in the video?\nDescribe the image.\n" * 9])
    tied = keys.get("tie_word_embeddings", True)
    text = {
        "model_type": "qwen2",
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 32,  # vLLM has no attention of narrower heads
        "num_key_value_heads": hidden_size // 64,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": _SIDE,
        "patch_size": _PATCH,
        "vision_use_head": False,
    }
    config = LlavaNextARConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[_SIDE * h, _SIDE * w] for h, w in ((1, 1), (1, 2), (2, 1), (2, 2))],
        autoregressive_config={"num_heads": 2, "num_layers": 1},
        **{"tie_word_embeddings": True, **keys},
    )
    processor = LlavaNextARProcessor.for_config(config, tokenizer, **options)
    torch.manual_seed(0)
    model = LlavaNextARForConditionalGeneration(config).eval()
    with torch.no_grad():  # what is seen stands out against the words
        model.model.multi_modal_projector.linear_2.weight.mul_(20)
        model.model.vision_tower.embeddings.patch_embedding.weight.mul_(8)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config.update(**ids, bos_token_id=None)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


# -- Files


def write_video(
    path: Path, num_frames: int, seed: int, *, fps: int = 8, codec: str = "libx264", side: int = 48
) -> Path:
    """Colours that drift, another way for each seed. With the codec `rawvideo` all files have one size."""
    random = np.random.default_rng(seed)
    start, drift = random.uniform(0, 255, (2, side, side, 3)) * [[[[1]]], [[[0.2]]]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            picture = np.abs((start + drift * index) % 510 - 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_image(path: Path, width: int, height: int, seed: int) -> Path:
    random = np.random.default_rng(seed)
    small = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.BICUBIC).save(path)
    return path


def write_files(folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True)
    return {
        "short": write_video(folder / "short.mp4", 5, 1),
        "medium": write_video(folder / "medium.mp4", 16, 2),
        "long": write_video(folder / "long.mp4", 120, 3),
        "wide": write_image(folder / "wide.png", 140, 60, 4),
        "tall": write_image(folder / "tall.png", 50, 120, 5),
        "square": write_image(folder / "square.png", 64, 64, 6),
    }


# -- Conversations, as OpenAI's clients write them


def user(*parts: Any) -> dict[str, Any]:
    """A message of texts and files; pictures are known by their suffix."""
    content = []
    for part in parts:
        if isinstance(part, Path):
            kind = "image_url" if part.suffix == ".png" else "video_url"
            content.append({"type": kind, kind: {"url": part.as_uri()}})
        else:
            content.append({"type": "text", "text": part})
    return {"role": "user", "content": content}


def conversations(files: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Name of a case -> messages. The order matters: later ones find files of earlier ones in the caches."""
    what, describe = "What happens in the video?", "Describe the image."
    short, medium, long, wide, tall, square = (
        files[name] for name in ("short", "medium", "long", "wide", "tall", "square")
    )
    system = {"role": "system", "content": "You answer in one word."}
    said = {"role": "assistant", "content": "The colours change."}
    return {
        "text": [user("Hello, who are you?")],
        "image, wide": [user(wide, describe)],
        "image, tall": [user(tall, describe)],
        "two images, one known": [user(wide, square, describe)],
        "three images": [user(square, tall, wide, describe)],
        "one image twice": [user(tall, tall, describe)],
        "image, known from a group": [user(square, describe)],
        "video, short": [user(short, what)],
        "video, long": [user(long, what)],
        "system prompt and video": [system, user(medium, what)],
        "two videos": [user(short, long, "Compare the videos.")],
        "one video twice": [user(medium, medium, "Compare the videos.")],
        "image and video": [user(tall, medium, "Is the image in the video?")],
        "video, images between texts": [user("First", long, "then", wide, "and", square, "end.")],
        "second turn": [user(short, what), said, user("And then?")],
        "second turn with a video": [user(short, what), said, user(medium, "And in this one?")],
        "media behind the text": [user(what, long)],
    }


# Cases of `conversations` with at most one image, and with videos of which vLLM takes all frames.
EQUAL_WITHOUT_PLUGIN = frozenset(
    {
        "text",
        "image, wide",
        "image, tall",
        "image, known from a group",
        "video, short",
        "system prompt and video",
        "one video twice",
        "image and video",
        "second turn",
        "second turn with a video",
    }
)


def for_processor(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with paths, as `apply_chat_template` takes them."""
    converted = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                part
                if part["type"] == "text"
                else {"type": kind.removesuffix("_url"), "path": _path(part[kind]["url"])}
                for part in content
                for kind in [part["type"]]
            ]
        converted.append({**message, "content": content})
    return converted


def _path(url: str) -> str:
    return url2pathname(url.removeprefix("file://"))


def prompt_inputs(processor: Any, messages: Sequence[dict[str, Any]], **options: Any) -> Any:
    """Inputs of `generate` for one conversation."""
    return processor.apply_chat_template(
        for_processor(messages),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )


def generate(model: Any, processor: Any, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
    """Ids of the answer that transformers gives. `options` are those of the processor."""
    inputs = prompt_inputs(processor, messages, **options)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def write_case_folder(folder: Path, layout: str, files: dict[str, Path]) -> dict[str, list[int]]:
    """Writes `checkpoint`, `conversations.json` and `expected.json` of a layout; returns the expected ids."""
    model, processor = make_checkpoint(folder / "checkpoint", *LAYOUTS[layout])
    cases = conversations(files)
    expected = {name: generate(model, processor, messages) for name, messages in cases.items()}
    (folder / "conversations.json").write_text(json.dumps(cases))
    (folder / "expected.json").write_text(json.dumps(expected))
    (folder / "settings.json").write_text(json.dumps({"max_tokens": MAX_NEW_TOKENS}))
    return expected
