"""Write a complete Hub folder with a tiny model: random weights, real code paths, trains on a CPU in minutes.

    python scripts/tiny_checkpoint.py --data clips/train.json --output tiny

The vocabulary is that of the data set's texts. The vision tower is a random one-layer SigLIP: it never trains, and
random projections of patches keep enough of the picture to say what is where.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from ...configuration.configuration_llava_next_ar import LlavaNextARConfig
from ...hub.command_line import CommandParser
from ...modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from ...processing.processing_llava_next_ar import LlavaNextARProcessor

SPECIAL_TOKENS = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
_TEMPLATE_TEXT = "You are a helpful assistant. system user assistant"  # what DEFAULT_CHAT_TEMPLATE may write
_WORD = r"\w+|[^\w\s]"
# How far the patches of the random tower stand out against its random position embedding.
_PATCH_GAIN, _POSITION_GAIN = 4.0, 0.1


def texts_of(entries: Sequence[dict[str, Any]]) -> list[str]:
    """All texts of LLaVA JSON entries, with the choices that are not the answer."""
    said = [turn["value"] for entry in entries for turn in entry.get("conversations") or ()]
    for message in (message for entry in entries for message in entry.get("messages") or ()):
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        said += [part["text"] for part in parts if part.get("text") is not None]
    said += [entry["system"] for entry in entries if entry.get("system") is not None]
    return said + [choice for entry in entries for choice in entry.get("choices", ())]


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """One token for each word and punctuation mark of the texts and the chat template, and the chat's own tokens."""
    words = {word for text in (_TEMPLATE_TEXT, *texts) for word in re.findall(_WORD, text)} - set("<>|")
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return TokenizersBackend(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<image>", "<video>"],
    )


def tiny_config(tokenizer: PreTrainedTokenizerBase, *, image_size: int = 64, num_hist: int = 1) -> LlavaNextARConfig:
    """About 600,000 parameters; a frame of 64 pixels is 8 x 8 patches and becomes 4 x 4 tokens."""
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": 8,
        "vision_use_head": False,
    }
    text = {
        "model_type": "qwen2",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048,
        # Short sequences and few dimensions per head: wavelengths of 6 to 400 tokens, not of 6 to 30,000.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlavaNextARConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[image_size, image_size]],
        tie_word_embeddings=True,
        # With one visible frame the head itself cannot see motion: the language model has to.
        autoregressive_config={"embedding_dim": 64, "num_heads": 4, "num_layers": 2, "num_hist": num_hist},
    )


def build_tiny_checkpoint(
    directory: Path | str, texts: Iterable[str], *, num_frames: int = 8, seed: int = 0, **config_options: Any
) -> LlavaNextARForConditionalGeneration:
    """Write model, processor and code to `directory` and returns the model.

    Args:
        texts: everything that the model shall be able to read and say.
        num_frames: frames of a video, uniformly sampled.
        config_options: of `tiny_config`.
    """
    tokenizer = word_tokenizer(texts)
    config = tiny_config(tokenizer, **config_options)
    # Pixel statistics of the synthetic clips' background: what is not a shape is then close to zero.
    processor = LlavaNextARProcessor.for_config(
        config, tokenizer, num_frames=num_frames, image_mean=[0.39] * 3, image_std=[0.25] * 3
    )
    torch.manual_seed(seed)
    model = LlavaNextARForConditionalGeneration(config).eval()
    embeddings = model.model.vision_tower.embeddings
    with torch.no_grad():
        embeddings.patch_embedding.weight.mul_(_PATCH_GAIN)
        embeddings.position_embedding.weight.mul_(_POSITION_GAIN)
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
    )
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return model


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="LLaVA JSON files with the texts")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=64, help="side of the frames in pixels")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    texts = [text for path in options.data for text in texts_of(json.loads(path.read_text(encoding="utf-8")))]
    sizes = {"num_frames": options.num_frames, "image_size": options.image_size}
    model = build_tiny_checkpoint(options.output, texts, seed=options.seed, **sizes)
    print(f"{model.num_parameters():,} parameters, {model.config.text_config.vocab_size} words: {options.output}")


if __name__ == "__main__":
    main()
