"""Cost of one more frame of a stream, with all frames before it in the cache; a part of the benchmark.

    frames      how many were read
    stream      milliseconds of one more frame, the median of those since the row before
    whole       milliseconds of reading all of them at once, which is what one more frame costs without a stream
    memory      kilobytes that each frame has added since the row before: its tokens in the language model's cache
    apart       largest difference of a frame's surprise between stream and whole video

Where reading the whole video at once takes too much memory, `--no-whole` leaves it out.
"""

import argparse
import gc
import statistics
import time

import torch
from tqdm import tqdm

from ...configuration.configuration_llava_next_ar import LlavaNextARConfig
from ...modeling.frame_surprise import SurpriseStream
from ...modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from .training import VIDEO_TOKEN, common_options, shape_config, wait


def _live_bytes(device: str) -> int:
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    storages = (thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def stream(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = LlavaNextARConfig(**shape_config(options.shape))
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    with torch.device(options.device):
        model = LlavaNextARForConditionalGeneration._from_config(config, dtype=dtype).eval().requires_grad_(False)
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.02)  # or every prediction is a copy
    print(
        f"{options.shape}, {options.device}, {dtype}; every frame {config.frame_token_layout.tokens_per_frame()} tokens"
    )
    print(f"{'frames':>7}{'stream ms':>11}{'whole ms':>10}{'ratio':>7}{'memory kB':>11}{'apart':>10}")
    reader, seen, surprises, times = SurpriseStream(model), [], [], []
    before = _live_bytes(options.device)
    frames = torch.randn(max(options.frames), 3, 384, 384, generator=torch.Generator().manual_seed(1))
    for number, pixels in enumerate(tqdm(frames, unit="frame", leave=False)):
        wait()
        start = time.perf_counter()
        own = reader.read(pixels[None].to(dtype), torch.tensor([float(number)]))
        wait()
        times.append(time.perf_counter() - start)
        surprises.append(own.frames)
        if number + 1 not in options.frames:
            continue
        num_frames, added = number + 1, number + 1 - sum(seen)
        del own
        now = _live_bytes(options.device)
        kilobytes = (now - before) / added / 1e3
        milliseconds = statistics.median(times[-added:]) * 1e3
        line = f"{num_frames:>7}{milliseconds:>11.1f}"
        if options.whole:
            whole, difference = _read_whole(model, frames[:num_frames].to(dtype), torch.cat(surprises))
            line += f"{whole * 1e3:>10.1f}{milliseconds / whole / 1e3:>7.3f}"
        else:
            line += f"{'-':>10}{'-':>7}"
        line += f"{kilobytes:>11.1f}" + (f"{difference:>10.1e}" if options.whole else f"{'-':>10}")
        tqdm.write(line)
        seen.append(added)
        before = _live_bytes(options.device)


def _read_whole(
    model: LlavaNextARForConditionalGeneration, frames: torch.Tensor, expected: torch.Tensor
) -> tuple[float, float]:
    """Seconds for all frames at once, and the distance of their surprise from the stream's."""
    tokens = torch.full((1, model.config.frame_token_layout.num_tokens(len(frames))), VIDEO_TOKEN, device=model.device)
    wait()
    start = time.perf_counter()
    (own,) = model.surprise(input_ids=tokens, pixel_values_videos=frames[None].to(model.device))
    wait()
    return time.perf_counter() - start, float((own.frames - expected).abs().max())


def stream_options(parser: argparse.ArgumentParser) -> None:
    common_options(parser)
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument(
        "--no-whole",
        dest="whole",
        action="store_false",
        help="do not compare with the whole video, as is done by default",
    )
