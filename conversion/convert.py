"""Convert checkpoints from and to this package, without a GPU and in the memory of one shard.

    # LLaVA-OneVision (transformers) or the original LLaVA-NeXT project's, from a folder or the Hub
    llava-next-ar convert llava-hf/llava-onevision-qwen2-7b-ov-hf converted
    llava-next-ar convert lmms-lab/LLaVA-Video-7B-Qwen2 converted --pool-mode average
    # back to LLaVA-OneVision, where the model is one but for the head
    llava-next-ar convert converted exported --to llava_onevision

Prints what the source left open and what was chosen. A checkpoint that does not fit is refused with the names of the
tensors that are missing, unexpected or wrongly shaped, and the output folder appears only once it is complete.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from .checkpoint_conversion import convert_checkpoint


def _assignment(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _json(text: str) -> dict[str, Any]:
    """An object, or the file that holds it."""
    return json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and converts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or Hub id")
    parser.add_argument("output", type=Path, help="folder to be made")
    parser.add_argument("--to", choices=("llava_next_ar", "llava_onevision"), default="llava_next_ar")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--pool-mode", choices=("average", "max", "bilinear"), help="default: the configuration's")
    parser.add_argument(
        "--set",
        type=_assignment,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="a key of the source's configuration, read as if it had this value; may be repeated",
    )
    parser.add_argument("--vision-config", type=_json, help="JSON or file: the vision tower of an original checkpoint")
    parser.add_argument("--head", type=_json, help='JSON or file: keys of the new head, such as {"num_hist": 4}')
    parser.add_argument("--tokenizer", help="folder or Hub id, if not the source")
    parser.add_argument("--image-token-id", type=int, help="default: the tokenizer's")
    parser.add_argument("--video-token-id", type=int, help="default: the tokenizer's")
    parser.add_argument("--num-frames", type=int, help="frames of a video, for an original checkpoint")
    parser.add_argument("--base-model", help="Hub id for the model card, if the source is a folder")
    parser.add_argument("--revision", help="of the Hub id")
    parser.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB")
    parser.add_argument("--no-progress", action="store_true")
    options = parser.parse_args(argv)
    try:
        result = convert_checkpoint(
            options.source,
            options.output,
            to=options.to,
            dtype=options.dtype,
            pool_mode=options.pool_mode,
            config_overrides=dict(options.overrides),
            vision_config=options.vision_config,
            autoregressive_config=options.head,
            tokenizer=options.tokenizer,
            image_token_id=options.image_token_id,
            video_token_id=options.video_token_id,
            num_frames=options.num_frames,
            base_model=options.base_model,
            revision=options.revision,
            max_shard_size=int(options.max_shard_size * 10**9),
            progress=not options.no_progress,
        )
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")
    print(f"wrote {result.num_tensors} tensors ({result.num_bytes / 10**9:.2f} GB) to {result.output}")
    for note in result.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    main()
