"""Sampling options of an entry and of its content parts: the same frames as in a chat, and the same number of tokens."""

import re
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model
from tiny_processor import tiny_processor
from video_clips import write_clip

from llava_next_ar.evaluation.questions import read_questions
from llava_next_ar.training.bad_samples import BadSampleError
from llava_next_ar.training.data import LlavaVideoDataset

FPS = 10
ASKED = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A square."}]
ANSWER = {"role": "assistant", "content": "A square."}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_model().config, num_frames=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "a.mp4", 40, width=64, height=48, fps=FPS)  # 4 s
    write_clip(folder / "b.mp4", 40, width=64, height=48, fps=FPS)
    write_uneven_clip(folder / "uneven.mkv")
    np.save(folder / "c.npy", np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), dtype=np.uint8))
    (folder / "frames").mkdir()
    for number in range(9):
        Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(folder / "frames" / f"{number}.png")
    return folder


def write_uneven_clip(path):
    """40 frames: 30 in the first second, 10 in the following five."""
    times = [*np.arange(30) / 30, *(1 + np.arange(10) / 2)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 6 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), stream.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


CASES = [
    ("a.mp4", {"fps": 2}, 8),
    ("a.mp4", {"num_frames": 7}, 7),
    ("a.mp4", {"nframes": 7}, 7),
    ("a.mp4", {"max_frames": 3}, 3),
    ("a.mp4", {"fps": 5, "max_frames": 6}, 6),
    ("a.mp4", {"sample_rate": 8}, 5),
    ("a.mp4", {"video_start": 1.0, "video_end": 2.0, "num_frames": 99}, 11),  # 1.0, 1.1, ..., 2.0
    ("a.mp4", {"start": 1.0, "end": 1.2}, 3),
    ("a.mp4", {"video_start": 3.5, "fps": 10}, 5),
    ("a.mp4", {"sampling": "num_frames", "num_frames": 5}, 5),
    ("uneven.mkv", {"sampling": "fps_time", "fps": 1}, 6),
    ("uneven.mkv", {"video_start": 1.0, "sampling": "every_nth", "sample_rate": 1}, 10),
    ("c.npy", {"fps": 4, "video_end": 0.75, "num_frames": 12}, 4),  # frames without times: fps is their own
    ("c.npy", {"num_frames": 5}, 5),
    ("frames", {"fps": 4, "video_start": 1.0}, 4),  # at 1.0, 1.25, ..., 2.0: five, of which num_frames are taken
]


@pytest.mark.parametrize("form", ["entry", "strings", "parts", "part", "alone"])
@pytest.mark.parametrize(("video", "options", "num_frames"), CASES)
def test_options_mean_what_they_mean_in_a_chat(video, options, num_frames, form, processor, root):
    question = {"type": "text", "text": "What?"}
    part = {"type": "video", "path": video}
    entries = {
        "entry": {"video": video, "conversations": ASKED, **options},
        "strings": {"video": video, "messages": [{"role": "user", "content": "<video>\nWhat?"}, ANSWER], **options},
        "parts": {"messages": [{"role": "user", "content": [part, question]}, ANSWER], **options},
        "part": {"messages": [{"role": "user", "content": [{**part, **options}, question]}, ANSWER]},
        "alone": {"video": video, **options},
    }
    source = np.load(root / video) if video.endswith(".npy") else str(root / video)
    content = [{"type": "video", "video": source, **options}]
    chat = [{"role": "user", "content": content if form == "alone" else [*content, question]}]
    call = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor.apply_chat_template(chat if form == "alone" else [*chat, ANSWER], **call)
    data = LlavaVideoDataset([entries[form]], processor, video_root=root)
    sample = data[0]
    assert sample["video_frame_mask"].sum() == num_frames
    assert torch.equal(sample["input_ids"], expected["input_ids"][0])
    for name in ("pixel_values_videos", "video_timestamps", "video_frame_mask"):
        assert torch.equal(sample[name], expected[name]), name
    assert data.lengths() == [len(sample["input_ids"])]


def test_options_of_a_part_are_of_that_part_alone(processor, root):
    parts = [
        {"type": "video", "path": "a.mp4", "num_frames": 2},
        {"type": "video", "path": "b.mp4"},
        {"type": "video", "path": "b.mp4", "start": 1.0, "end": 1.1},
    ]
    entry = {"messages": [{"role": "user", "content": parts}, ANSWER]}
    data = LlavaVideoDataset([entry], processor, video_root=root)
    assert data[0]["video_frame_mask"].sum(1).tolist() == [2, 4, 2]
    assert data.lengths() == [len(data[0]["input_ids"])]
    # Options of the call are those of videos without their own.
    data = LlavaVideoDataset([entry], processor, video_root=root, processor_kwargs={"num_frames": 3})
    assert data[0]["video_frame_mask"].sum(1).tolist() == [2, 3, 2]
    assert data.lengths() == [len(data[0]["input_ids"])]


@pytest.mark.parametrize(
    "options",
    [{"num_frames": 50}, {"sampling": "uniform_time", "num_frames": 50}, {"fps": FPS, "max_frames": 50}, {"fps": 2}],
)
def test_short_clip_of_the_call_holds_for_a_part_that_asks_for_a_number_of_frames(options, processor, root):
    entry = {"messages": [{"role": "user", "content": [{"type": "video", "path": "a.mp4", **options}]}, ANSWER]}
    for short_clip in ("all", "error"):
        data = LlavaVideoDataset([entry], processor, video_root=root, processor_kwargs={"short_clip": short_clip})
        if short_clip == "error" and options != {"fps": 2}:
            with pytest.raises(BadSampleError, match="40 frames.* 50|50 .*40"):
                data[0]
            with pytest.raises(BadSampleError, match="40 frames.* 50|50 .*40"):
                data.lengths()
        else:
            assert data[0]["video_frame_mask"].sum() == (8 if options == {"fps": 2} else 40)


@pytest.mark.parametrize("times", [False, True])
def test_the_frame_times_in_the_prompt_are_counted(times, processor, root):
    options = {"sampling": "fps_time", "fps": 1} if times else {"num_frames": 13}
    entry = {"video": "uneven.mkv" if times else "a.mp4", "conversations": ASKED, **options}
    processor = tiny_processor(tiny_model().config, num_frames=4, add_time_instruction=True)
    data = LlavaVideoDataset([entry], processor, video_root=root)
    assert data.lengths() == [len(data[0]["input_ids"])]


def test_images_within_limits_of_their_own_are_counted(processor, root):
    image = Image.new("RGB", (160, 60))
    image.save(root / "wide.png")
    for options in ({"max_pixels": 900}, {"min_pixels": 40_000}, {}):
        part = {"type": "image", "path": "wide.png", **options}
        entry = {"messages": [{"role": "user", "content": [part]}, ANSWER]}
        data = LlavaVideoDataset([entry], processor, video_root=root)
        assert data.lengths() == [len(data[0]["input_ids"])]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"video": ["a.mp4", "b.mp4"], "fps": 2}, "the entry has 'fps', expected one video that these are of, got 2"),
        ({"image": "frames/0.png", "num_frames": 2}, "the entry has 'num_frames', expected one video .* got 0"),
        ({"video": "a.mp4", "fps": 0}, "fps=0"),
        ({"video": "a.mp4", "fps": 2, "num_frames": 3}, "fps=2 and num_frames=3 exclude each other"),
        ({"video": "a.mp4", "fps": "2"}, "fps"),
        ({"video": "a.mp4", "num_frames": 2.5}, "num_frames"),
        ({"video": "a.mp4", "start": "00:01"}, "video_start='00:01' must be a finite number of seconds"),
        ({"video": "a.mp4", "start": 3, "end": 2}, "video_end=2 lies before video_start=3"),
        ({"video": "a.mp4", "start": 99.0}, "no frame lies between video_start=99"),
        ({"video": "a.mp4", "start": 1.0, "video_start": 1.0}, "'start', and its video has 'video_start' as well"),
    ],
)
def test_options_that_make_no_sense_are_named_whether_read_or_counted(entry, message, processor, root):
    placeholders = "<video>" * len(entry["video"]) if isinstance(entry.get("video"), list) else ""
    placeholders = placeholders or ("<image>" if "image" in entry else "<video>")
    turns = [{"from": "human", "value": f"{placeholders}\nWhat?"}, ASKED[1]]
    data = LlavaVideoDataset([{**entry, "conversations": turns}], processor, video_root=root)
    for read in (lambda: data[0], data.lengths):
        with pytest.raises(BadSampleError, match=message):
            read()


def test_options_may_be_left_out_by_name(processor, root):
    entry = {"video": "a.mp4", "conversations": ASKED, "fps": 24.0, "num_frames": 40}  # notes about the file
    data = LlavaVideoDataset([entry], processor, video_root=root, ignored_keys=["fps", "num_frames"])
    assert data[0]["video_frame_mask"].sum() == 4 and data.lengths() == [len(data[0]["input_ids"])]


def test_two_parts_of_one_video_are_two_clips_of_an_evaluation(processor, root):
    spans = [{"start": 0.0, "end": 1.0}, {"start": 2.0, "end": 3.0}, {"start": 0.0, "end": 1.0}]
    entries = [{"video": "a.mp4", "conversations": ASKED, **span} for span in spans]
    questions = read_questions(LlavaVideoDataset(entries, processor, video_root=root))
    assert [question.first_videos for question in questions] == [(0,), (0,), ()]
    assert len({question.media for question in questions}) == 1, "one file: no independent evidence"
    assert questions[1].videos == (f"{root / 'a.mp4'} (end=3.0, start=2.0)",)


# ------------------------------------------------------------------------------------------------ no content in messages

PAYLOAD = "QUJD" * 60


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": [{"role": "user", "content": [{"type": "audio", "url": f"data:audio/wav;base64,{PAYLOAD}"}]}]},
        {"messages": [{"role": "user", "content": [f"data:video/mp4;base64,{PAYLOAD}"]}]},
        {"messages": f"data:video/mp4;base64,{PAYLOAD}"},
        {"messages": [{"role": "user", "content": {"url": PAYLOAD.encode()}}]},
        {"messages": [{"role": f"data:video/mp4;base64,{PAYLOAD}", "content": "x"}]},
        {"video": [{"url": f"data:video/mp4;base64,{PAYLOAD}"}], "conversations": ASKED},
        {"video": {"bytes": None, "path": {"x": PAYLOAD.encode()}}, "conversations": ASKED},
        {"video": PAYLOAD, "conversations": ASKED},
        {"video": f"data:video/mp4;base64,{PAYLOAD}", "conversations": ASKED},
        {
            "video": "a.mp4",
            "conversations": [{"from": "human", "value": f"see data:video/mp4;base64,{PAYLOAD}"}, ASKED[1]],
        },
        {
            "video": "a.mp4",
            "conversations": [{"from": "human", "value": [f"data:video/mp4;base64,{PAYLOAD}"]}, ASKED[1]],
        },
        {"video": "a.mp4", "conversations": [f"data:video/mp4;base64,{PAYLOAD}"]},
    ],
)
def test_messages_about_entries_hold_no_content_of_media(entry, processor, root):
    data = LlavaVideoDataset([entry], processor, video_root=root)
    with pytest.raises(BadSampleError) as error:
        data[0]
    assert len(re.findall("QUJD", str(error.value))) <= 6, str(error.value)  # two short names
    assert len(str(error.value)) < 900


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "user", "content": [{"type": "image", "image": {"data": f"data:image/png;base64,{PAYLOAD}"}}]}],
        [{"role": "user", "content": [{"type": "text", "url": f"data:image/png;base64,{PAYLOAD}", "text": None}]}],
        [{"role": "user", "content": [{"type": "video", "data": 1, "text": f"data:image/png;base64,{PAYLOAD}"}]}],
        [{"role": "user", "content": [f"data:video/mp4;base64,{PAYLOAD}"]}],
        [{"role": "user", "content": [{"url": f"data:video/mp4;base64,{PAYLOAD}"}]}],
        [{"role": "user", "content": {"bytes": PAYLOAD.encode(), "frames": np.zeros((9, 9))}}],
        [{"role": "user", "content": "x", "thumbnail": f"data:image/png;base64,{PAYLOAD}"}],
        [f"data:video/mp4;base64,{PAYLOAD}"],
        f"data:video/mp4;base64,{PAYLOAD}",
    ],
)
def test_messages_about_chats_hold_no_content_of_media(chat, processor):
    with pytest.raises(ValueError) as error:
        processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert len(re.findall("QUJD", str(error.value))) <= 3, str(error.value)
