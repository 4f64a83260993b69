"""Lengths from text and headers: the same as those of the samples, without frames and at a fraction of their cost."""

import time

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config
from tiny_tokenizer import byte_tokenizer
from video_clips import write_clip

from llava_next_ar.processing import video_decoding
from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor
from llava_next_ar.training.data import LlavaVideoDataset

ASKED = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A square. " * 9}]


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi", "a.ts"])
def test_a_header_is_read_the_same_with_and_without_looking_at_frames(name, tmp_path, monkeypatch):
    write_clip(tmp_path / name, 30, width=64, height=48)
    path = str(tmp_path / name)
    quick = video_decoding.PyAVReader.read_header(path, name)
    monkeypatch.setattr(video_decoding, "_AV_HEADER_OPTIONS", video_decoding._AV_OPEN_OPTIONS)
    assert quick == video_decoding.PyAVReader.read_header(path, name)
    if name.endswith(".avi"):  # whose header counts the empty places between frames
        assert quick == (0, 0.0)
        return
    with av.open(path) as container:
        num_frames = sum(1 for _ in container.decode(video=0))
        announced = 0 if name.endswith(".avi") else 30  # the header of AVI counts the places of dropped frames, too
        assert num_frames == 30 and (quick[0] == announced or name.endswith(".ts"))


@pytest.mark.parametrize("num_frames", [4, 32])
def test_counting_costs_a_fraction_of_reading(num_frames, tmp_path):
    processor = LlavaNextARProcessor.for_config(
        tiny_config(mm_newline_position="grid"), byte_tokenizer(placeholders=False), num_frames=num_frames
    )
    entries = []
    for number in range(6):
        write_clip(tmp_path / f"{number}.mp4", 48, width=320, height=240)
        entries.append({"video": f"{number}.mp4", "conversations": ASKED})
    data = LlavaVideoDataset(entries, processor, video_root=tmp_path)
    assert data.lengths() == [len(sample["input_ids"]) for sample in data]
    costs = np.zeros((3, 2))
    for row in costs:
        data._lengths = None
        start = time.process_time()
        data.lengths()
        middle = time.process_time()
        list(data)
        row[:] = middle - start, time.process_time() - middle
    counting, reading = costs.min(0)
    assert counting < 0.25 * reading  # 0.09 on a quiet machine with these tiny frames


@pytest.mark.parametrize("options", [{"num_frames": 4}, {"fps": 3, "add_time_instruction": True}])
def test_tokens_and_targets_are_those_of_the_decoded_sample(options, tmp_path):
    config = tiny_config(mm_newline_position="grid")
    processor = LlavaNextARProcessor.for_config(config, byte_tokenizer(placeholders=False), **options)
    for name, length in (("a", 12), ("b", 30)):
        write_clip(tmp_path / f"{name}.mp4", length, width=64, height=48)
    Image.new("RGB", (80, 60), "red").save(tmp_path / "i.png")
    chat = [
        {"role": "system", "content": "Short answers."},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Then"}, {"type": "image"}]},
        {"role": "assistant", "content": "It holds <video> and <|im_end|>."},
        {"role": "user", "content": [{"type": "text", "text": "And?"}, {"type": "video", "num_frames": 3}]},
        {"role": "assistant", "content": "A circle."},
    ]
    entries = [
        {"video": "a.mp4", "conversations": ASKED},
        {"video": "b.mp4"},
        {"conversations": [{**ASKED[0], "value": "Hi?"}, ASKED[1]]},
        {"video": ["a.mp4", "b.mp4"], "image": "i.png", "messages": chat},
    ]
    reader = LlavaVideoDataset(entries, processor, video_root=tmp_path).reader
    counts = []
    for entry in entries:
        text, labels = reader.text(entry)
        sample = reader.encode(entry)
        assert torch.equal(text.input_ids, sample["input_ids"]) and torch.equal(labels, sample["labels"])
        assert text.num_frames == (sample["video_frame_mask"].sum() if "video_frame_mask" in sample else 0)
        counts.append((text.num_videos, text.num_images, bool((labels != -100).any())))
    assert counts == [(1, 0, True), (1, 0, False), (0, 0, True), (2, 1, True)]
