"""Ask a checkpoint a question about videos or images.

    llava-next-ar ask outputs/run clip.mp4 "What happens?"
    llava-next-ar ask user/model first.mp4 second.mp4 "What differs between the two videos?" --surprise
    llava-next-ar ask user/model photo.jpg "What is on the table?" --temperature 0.7 --max-new-tokens 200

    # the model of `llava-next-ar demo`, on one CPU, in seconds
    llava-next-ar ask demo_output/model demo_output/clips/videos/test_00000.mp4 "What color is the shape?"

The answer is printed as it is generated. It is greedy unless a sampling option is given. `--surprise` adds a line for each
frame after the first: its time, its surprise, and the surprise of copying the frame before (see the module frame_surprise).
"""

import argparse
import mimetypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer, set_seed
from transformers.utils import logging

from ..hub.command_line import CommandParser, program_name, stop
from .measures import load_checkpoint
from .settings import check_device


def media_part(source: str) -> dict[str, str]:
    """The content part of a file or URL: an image by its ending, unless it is animated; else a video.

    Raises:
        FileNotFoundError: if the file does not exist.
        IsADirectoryError: if it is a folder.
        OSError: if the ending is that of an image, which the file is not.
    """
    kind, _ = mimetypes.guess_type(source)
    is_url, is_image = "://" in source, kind is not None and kind.startswith("image/")
    if not is_url and Path(source).is_dir():
        raise IsADirectoryError(f"{source} is a folder, expected a video or an image")
    if not is_url and not Path(source).is_file():
        raise FileNotFoundError(f"no such file: {source}")
    if is_image and not is_url:
        with Image.open(source) as picture:
            is_image = not getattr(picture, "is_animated", False)
    return {"type": "image" if is_image else "video", "url" if is_url else "path": source}


def surprise_lines(surprises: Sequence[Any], sources: Sequence[str]) -> list[str]:
    """A table for each video: seconds since its first frame, surprise, and the surprise of copying.

    Args:
        surprises: the `VideoSurprise` of each video with two frames or more.
        sources: names of all videos of the prompt, in order.
    """
    lines = []
    for own in surprises:
        lines += [f"{sources[own.video_index]}", f"{'frame':>7}{'seconds':>9}{'surprise':>10}{'copying':>9}"]
        copy_errors = torch.stack([error.float().mean() for error in own.copy_errors]).cpu()
        columns = (own.frame_index, own.seconds, own.frames, copy_errors / (copy_errors + own.floors))
        for frame, seconds, surprise, copying in zip(*(column.tolist() for column in columns), strict=True):
            lines.append(f"{frame:>7}{seconds:>9.2f}{surprise:>10.3f}{copying:>9.3f}")
    shown = {own.video_index for own in surprises}
    lines += [f"{name}: one frame, nothing to predict" for i, name in enumerate(sources) if i not in shown]
    return lines


def ask(model: Any, processor: Any, options: argparse.Namespace) -> None:
    """Print the answer as it is generated and, with `options.surprise`, the surprise of each frame.

    Raises:
        ValueError: if surprise is asked for without a video or a head, or a file cannot be read.
        FileNotFoundError: if a file does not exist.
    """
    parts = [media_part(source) for source in options.media]
    videos = [source for source, part in zip(options.media, parts, strict=True) if part["type"] == "video"]
    if options.surprise and not videos:
        raise ValueError("--surprise needs a video")
    if options.surprise and model.autoregressive_module is None:
        raise ValueError(f"--surprise needs a model with a head, which {options.checkpoint} does not have")
    conversation = [{"role": "user", "content": [*parts, {"type": "text", "text": options.question}]}]
    inputs = processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={} if options.num_frames is None else {"num_frames": options.num_frames},
    ).to(model.device)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    set_seed(options.seed)
    generated = model.generate(
        **inputs,
        max_new_tokens=options.max_new_tokens,
        do_sample=bool(sampling),
        num_beams=1,
        streamer=streamer,
        **sampling,
    )
    answer = processor.tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if not answer.strip():
        print(f"{program_name()}: the answer is empty: the model generated no text", file=sys.stderr)
    if options.surprise:
        print("\n".join(surprise_lines(model.surprise(**inputs), videos)))


def make_parser() -> argparse.ArgumentParser:
    """The command line of `ask`."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", "bfloat16") if has_gpu else ("cpu", "float32")
    parser.add_argument("checkpoint", help="model or adapter: a folder or a Hub id")
    parser.add_argument("media", nargs="*", help="files or URLs of videos and images, in the order of the prompt")
    parser.add_argument("question", help="text after them; quote it")
    parser.add_argument("--surprise", action="store_true", help="print how surprising each frame is (default: no)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="length of the answer (default: 128)")
    parser.add_argument("--num-frames", type=int, help="frames of a video (default: that of the processor)")
    parser.add_argument("--temperature", type=float, help="sample with this temperature (default: greedy)")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens with this total probability")
    parser.add_argument("--top-k", type=int, help="sample from so many of the likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--device", default=device, help=f"cpu, cuda, ... (default here: {device})")
    parser.add_argument("--dtype", default=dtype, help=f"float32, bfloat16 or float16 (default here: {dtype})")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: main)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that the checkpoint carries (default: the installed package)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, load the checkpoint and answer; exit with 2 and one line on an error."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        if not options.question.strip() or Path(options.question).is_file():
            raise ValueError(f"the question is {options.question!r}, expected a text after the files")
        for name in ("max_new_tokens", "num_frames", "top_k"):
            value = getattr(options, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if not isinstance(getattr(torch, options.dtype, None), torch.dtype):
            raise ValueError(f"dtype is {options.dtype!r}, expected one such as float32 or bfloat16")
        for source in options.media:
            media_part(source)
        check_device(options.device)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model, processor = load_checkpoint(
            options.checkpoint,
            trust_remote_code=options.trust_remote_code,
            device=options.device,
            dtype=options.dtype,
            revision=options.revision,
        )
        ask(model, processor, options)
    except (ValueError, OSError) as error:
        stop(error)


if __name__ == "__main__":
    main(sys.argv[1:])
