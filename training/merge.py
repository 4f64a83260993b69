"""Merge a trained adapter into its base: a whole model, which loads without PEFT.

    llava-next-ar merge outputs/lora outputs/merged
    llava-next-ar merge user/adapter outputs/merged --base user/base --dtype bfloat16

The base is the one that the adapter names, unless `--base` gives another folder or Hub id. An adapter that was trained on a
base in 4 bits is merged into the base in its own precision. The recipe of the adapter (`train_config.yaml`) is copied, so that
the card of the merged model states it. Exit status: 2 on bad input, with one line on standard error.

Merged adapters on the vision tower would change the targets of the reconstruction head. So the tower without them is
kept as the head's teacher (`keep_teacher`), and the reconstruction loss does not change.
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..hub.command_line import CommandParser, stop
from ..hub.model_card import recipe_file, write_card
from ..modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from ..processing.processing_llava_next_ar import LlavaNextARProcessor
from .expected_messages import quiet_expected_messages
from .output_folder import RECIPE
from .own_code import check_own_code, find_file


def merge_adapters(model: Any) -> Any:
    """Merges the adapters of a PEFT model into its base, and returns the base.

    Raises:
        ValueError: if the base is quantized, since its rounded weights would be rounded again.
    """
    base = model.get_base_model()
    if getattr(base, "is_quantized", False):
        raise ValueError("the base is quantized: load it in its own precision to merge the adapter into it")
    base.keep_teacher()
    return model.merge_and_unload()


def merge_checkpoint(
    adapter: str,
    output: str | os.PathLike,
    *,
    base: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Writes the merged model, its processor, code and card to a new folder.

    Args:
        adapter: folder or Hub id.
        output: new or empty folder.
        base: folder or Hub id of the base; by default the one that the adapter names.
        dtype: precision to merge in and to save; `auto` is that of the base's files.

    Raises:
        ValueError: if `adapter` is not an adapter, its base is not named or cannot be read, or code is not trusted.
        FileExistsError: if `output` is not empty.
        OSError: if a file cannot be loaded.
    """
    from peft import PeftConfig, PeftModel

    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already and is not an empty folder")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype is {dtype!r}, expected auto or one such as float32 or bfloat16")
    if find_file(adapter, "adapter_config.json") is None:
        raise ValueError(f"{adapter} is not an adapter: it has no adapter_config.json")
    named = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    base = base or named
    if not base:
        raise ValueError(f"{adapter} does not name its base: give it with --base")
    check_base(adapter, base)
    check_own_code(base, trust_remote_code)
    check_own_code(adapter, trust_remote_code)
    model_class, processor_class, trust = LlavaNextARForConditionalGeneration, LlavaNextARProcessor, {}
    if trust_remote_code:
        model_class, processor_class, trust = AutoModelForImageTextToText, AutoProcessor, {"trust_remote_code": True}
    loaded = model_class.from_pretrained(base, dtype=dtype, **trust)
    merged = merge_adapters(PeftModel.from_pretrained(loaded, adapter))
    has_processor = find_file(adapter, "processor_config.json") is not None
    processor = processor_class.from_pretrained(adapter if has_processor else base, **trust)

    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        merged.save_pretrained(partial)
        processor.save_pretrained(partial)
        # The card is made from it, now and at a push.
        recipe = recipe_file(Path(adapter).resolve()) if os.path.isdir(adapter) else find_file(adapter, RECIPE)
        if recipe is not None and os.path.isfile(recipe):
            shutil.copy(recipe, partial / RECIPE)
        write_card(partial, f"user/{output.resolve().name}")
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return output


def check_base(adapter: str, base: str) -> None:
    """Raises ValueError if the base of an adapter is neither a model's folder nor a Hub id that can be read."""
    try:
        is_model = find_file(base, "config.json") is not None
        cause = f"{base} has no config.json"
    except (OSError, ValueError) as error:  # the latter from the Hub's client, for a path that does not exist
        is_model, cause = False, "the folder does not exist" if os.path.isabs(base) else str(error)
    if not is_model:
        raise ValueError(
            f"the base {base} of {adapter} cannot be read ({cause}); give its folder or Hub id with --base"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and merges."""
    quiet_expected_messages()
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder or Hub id of the adapter")
    parser.add_argument("output", help="folder to be made")
    parser.add_argument("--base", help="folder or Hub id of its base (default: the one that the adapter names)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: that of the base's files)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that the checkpoints carry (default: the installed package)",
    )
    options = parser.parse_args(argv)
    try:
        output = merge_checkpoint(
            options.adapter,
            options.output,
            base=options.base,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
        )
    except (ValueError, OSError, ImportError) as error:
        stop(error)
    print(f"saved to {output}")


if __name__ == "__main__":
    main()
