"""2,000 malformed configurations, processor files, conversations and videos: each works, or raises a documented error.

`fuzzing.check` tests it. The mutations are the same in every run; `-m slow` reads ten times as many others.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import processes
import pytest
import torch
from fuzzing import as_json, check, mutate
from PIL import Image, features
from tiny import tiny_config, tiny_model
from tiny_processor import tiny_processor
from video_clips import picture, write_clip

from llava_next_ar.configuration.configuration_llava_next_ar import LlavaNextARConfig
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # numpy's of overflow, torch's of empty tensors: values are absurd here

seeds = pytest.mark.parametrize(
    "seeds", [range(500), pytest.param(range(10_000, 15_000), marks=pytest.mark.slow)], ids=["plain", "more"]
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 6, width=64, height=48)


@pytest.fixture(scope="module")
def image(clip) -> Path:
    path = clip.with_name("image.png")
    Image.fromarray(picture(1, 40, 30)).save(path)
    return path


@pytest.fixture
def table(capsys):
    """Print one row for each kind of input: how many worked, and how many raised each error."""

    def row(kind: str, counts: Counter, problems: list[str]) -> None:
        with capsys.disabled():
            outcomes = ", ".join(f"{name} {number}" for name, number in counts.most_common())
            print(
                f"\nfuzz {kind:<13} {counts.total() + len(problems):5d} inputs: {outcomes}; violations {len(problems)}"
            )
        assert counts["worked"] > 0.1 * counts.total(), "hardly anything works: the mutations are not a good test"
        assert problems == []

    return row


def fuzz(good: Any, seeds: range, run: Callable[[Any], Any], also_named: dict[str, set[str]] | None = None):
    """(how it ended for how many, what is wrong) for a mutation of `good` for each seed."""
    counts: Counter = Counter()
    problems = []
    for seed in seeds:
        value, fields = mutate(good, Random(seed))
        named = fields.union(*((also_named or {}).get(field, set()) for field in fields))
        problem = check(lambda value=value: run(value), named, counts)
        if problem:
            problems.append(f"seed {seed}, {sorted(fields)}: {problem}\n    {as_json(value)}")
    return counts, problems


@seeds
def test_configurations(seeds, tmp_path, table):
    path = tmp_path / "config.json"

    def load(values):
        path.write_text(json.dumps(values))
        config = LlavaNextARConfig.from_pretrained(tmp_path)
        with torch.device("meta"):
            LlavaNextARForConditionalGeneration(config)

    good = json.loads(tiny_config().to_json_string())
    load(good)
    table("config", *fuzz(good, seeds, load))
    assert list(tmp_path.iterdir()) == [path]


@seeds
def test_processor_files(seeds, tmp_path, clip, image, table):
    processor = tiny_processor(tiny_config(), num_frames=2)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    good, files = json.loads(path.read_text()), sorted(tmp_path.iterdir())

    def load(values):
        path.write_text(json.dumps(values))
        processor = LlavaNextARProcessor.from_pretrained(tmp_path)
        processor.apply_chat_template(conversation(clip, image), tokenize=True, return_dict=True, return_tensors="pt")

    load(good)
    # The wrong value inside is an option of the class.
    table("processor", *fuzz(good, seeds, load, {"video_processor": {"LlavaNextARVideoProcessor"}}))
    assert sorted(tmp_path.iterdir()) == files


@seeds
def test_conversations(seeds, clip, image, table):
    processor = tiny_processor(tiny_config(), num_frames=2)

    def ask(values):
        processor.apply_chat_template(
            values.get("conversation"),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
        )

    good = {"conversation": conversation(clip, image)}
    ask(good)
    # The message contains an unreadable file and its role, and the position of an item that is not a video.
    also_named = {"path": {"cannot read video", "cannot load image", "videos"}}
    table("conversation", *fuzz(good, seeds, ask, also_named))


def conversation(clip: Path, image: Path) -> list[dict[str, Any]]:
    parts = [{"type": "video", "path": str(clip)}, {"type": "image", "path": str(image)}]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*parts, {"type": "text", "text": "What moves?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A shape."}]},
        {"role": "user", "content": "Where?"},
    ]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    pytest.importorskip("av")
    pytest.importorskip("resource")
    folder = tmp_path_factory.mktemp("clips")
    small = {"num_frames": 10, "width": 64, "height": 48}
    for name in ("h264.mp4", "h264.mkv", "h264.ts"):
        write_clip(folder / name, **small)
    write_clip(folder / "fragments.mp4", container_options={"movflags": "frag_keyframe+empty_moov"}, **small)
    write_clip(folder / "mpeg4.avi", codec="mpeg4", options={"bf": "2", "g": "5"}, **small)
    write_clip(folder / "mjpeg.avi", codec="mjpeg", options={}, pixel_format="yuvj420p", **small)
    write_clip(folder / "sorenson.flv", codec="flv1", options={}, **small)
    write_clip(folder / "vp9.webm", codec="libvpx-vp9", options={"g": "5", "cpu-used": "8"}, **small)
    images = [Image.fromarray(picture(index, 64, 48)) for index in range(6)]
    for name in (
        "animated.gif",
        "animated.png",
        "animated.webp",
        *(["animated.avif"] if features.check("avif") else []),
    ):
        images[0].save(folder / name, save_all=True, append_images=images[1:], duration=100)
    images[0].save(
        folder / "still.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03" + bytes(8)
    )
    return folder


@seeds
def test_videos(seeds, clips, table):
    """In a process of its own: a crash is attributed to the clip that was being read, and the next process goes on."""
    counts: Counter = Counter()
    problems = []
    at = seeds.start
    while at < seeds.stop:
        command = [sys.executable, Path(__file__).parents[1] / "fuzz_videos.py", clips, at, seeds.stop - at]
        try:
            done = processes.run(command, timeout=300 + len(seeds), status=None)
            output, end = done.stdout, f"ended with {done.returncode}: {done.stderr[-500:]}"
        except processes.TimedOutError as error:  # a hang that holds the interpreter: no signal gets through
            output, end = error.stdout, f"hang: {str(error)[-2000:]}"
        for line in output.splitlines():
            seed, clip, outcome = (*line.split(" ", 2), "")[:3]
            at = int(seed) + 1
            if not outcome:
                problems.append(f"seed {seed}, {clip}: {end}")
            elif " " in outcome:
                problems.append(f"seed {seed}, {clip}: {outcome}")
            else:
                counts[outcome] += 1
        assert output, end
    table("video", counts, problems)


# -- Nothing half-written


def broken_config(model, processor):
    model.config.autoregressive_config.num_hist = -1
    return model.config


def broken_model(model, processor):
    model.config.faster_token_stride = 0
    return model


def broken_generation(model, processor):
    model.generation_config.num_return_sequences = 3  # of greedy search
    return model


def broken_setting(model, processor):
    processor.vision_aspect_ratio = 7
    return processor


def unserializable_setting(model, processor):
    processor.chat_template = object()
    return processor


def broken_image_processor(model, processor):
    processor.image_processor.image_std = [0.5, 0.0, 0.5]
    return processor


@pytest.mark.parametrize(
    "spoil",
    [broken_config, broken_model, broken_generation, broken_setting, unserializable_setting, broken_image_processor],
)
def test_a_save_that_fails_writes_nothing(tmp_path, spoil):
    """transformers writes the code files first, and looks at what it saves afterwards."""
    model = tiny_model()
    broken = spoil(model, tiny_processor(model.config))
    with pytest.raises((ValueError, TypeError)):
        broken.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
