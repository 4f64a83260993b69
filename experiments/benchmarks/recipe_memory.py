"""Predicted GPU memory of each recipe; the part `recipe-memory` of the benchmark.

Makes checkpoints of the sizes of LLaVA-OneVision that hold a configuration, a processor and no weights, and one clip of as many
frames as any recipe reads, and runs `train --check` on them. Nothing is downloaded and no GPU is needed; `qlora` is counted
as if there were one.
"""

import argparse
import contextlib
import io
import json
import re
import tempfile
from pathlib import Path
from unittest import mock

from ...configuration.configuration_llava_next_ar import LlavaNextARConfig
from ...processing.processing_llava_next_ar import LlavaNextARProcessor
from ...training import run
from ..demo.tiny_checkpoint import texts_of, word_tokenizer
from ..temporal.synthetic_clips import write_dataset
from .training import SHAPES, shape_config

RECIPES = ("full", "projector_and_head", "lora", "lora_vision", "qlora", "prototype_basic", "prototype_full")
# With 0.5 billion parameters, LLaVA-OneVision ties the embeddings to the vocabulary projection.
_TIED = {"0.5b"}


def write_checkpoint(folder: Path, shape: str, texts: list[str]) -> None:
    """Configuration and processor of a size, without weights."""
    tokenizer = word_tokenizer(texts)
    tokens = {"image_token_index": "<image>", "video_token_index": "<video>"}
    keys = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    config = LlavaNextARConfig(**shape_config(shape, **keys, tie_word_embeddings=shape in _TIED))
    config.save_pretrained(folder)
    LlavaNextARProcessor.for_config(config, tokenizer, num_frames=32).save_pretrained(folder)


def predicted_memory(recipe: str, model: Path, data: Path) -> tuple[str, str]:
    """Tokens of the sample and memory of a step, as `train --check` prints them.

    Raises:
        RuntimeError: if `--check` fails, with its report.
    """
    words = ["--check", "--config", recipe, "--model", str(model), "--train_data", str(data), "--merge_lora", "true"]
    words += ["--dataloader_num_workers", "0", "--output_dir", str(model / "run"), "--report_to", "none"]
    printed = io.StringIO()
    # Without a GPU, the check that 4 bits can be had would end the report before it begins.
    with mock.patch.object(run, "check_quantization"), contextlib.redirect_stdout(printed):
        try:
            run.main(words)
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"--check of {recipe} failed ({end.code}):\n{printed.getvalue()}") from end
    report = printed.getvalue()
    tokens = re.search(r"tokens per sample +\d+ to (\d+)", report)
    memory = re.search(r"\(this recipe\): ([\d.]+ [GM]iB)", report)
    return tokens[1], memory[1]


def recipe_memory(options: argparse.Namespace) -> None:
    """Print a Markdown table: a row for each recipe, a column for each size."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write = {"size": 32, "num_frames": 32, "question_types": ("direction",), "progress": False}
        entries = write_dataset(folder / "clips", num_train=1, num_test=1, **write)["train"]
        data = folder / "clips" / "one.json"
        data.write_text(json.dumps(entries[:1]), encoding="utf-8")
        for shape in options.sizes:
            write_checkpoint(folder / shape, shape, texts_of(entries))
        print(f"| recipe | tokens of a sample | {' | '.join(options.sizes)} |")
        print("|---|---|" + "---|" * len(options.sizes))
        for recipe in options.recipes:
            found = [predicted_memory(recipe, folder / shape, data) for shape in options.sizes]
            print(f"| {recipe} | {found[0][0]} | {' | '.join(memory for _, memory in found)} |", flush=True)


def recipe_memory_options(parser: argparse.ArgumentParser) -> None:
    sizes = [shape for shape in SHAPES if shape != "small"]
    parser.add_argument("--sizes", nargs="+", choices=tuple(SHAPES), default=sizes, help="of the language model")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
