"""Options of one content part, keys that are None or unknown, what a template would drop, and the side of padding."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config, tiny_model
from tiny_processor import tiny_processor
from tiny_tokenizer import character_tokenizer
from transformers import pipeline
from video_clips import write_clip

from llava_next_ar.processing.frame_sampling import FrameSampling
from llava_next_ar.processing.llava_conversation import DEFAULT_CHAT_TEMPLATE
from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor
from llava_next_ar.processing.video_frames import load_video

TENSORS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
FRAMES = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_config())


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """20 frames, 10 a second."""
    return str(write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 20, fps=10, width=64, height=48))


def chat(*parts: dict, text: str = "What happens?") -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def times(processor, part: dict, **options) -> list[float]:
    out = processor.apply_chat_template(chat({"type": "video", **part}), processor_kwargs=options, **TENSORS)
    assert (out["input_ids"] == processor.video_token_id).sum() == processor.frame_token_layout.num_tokens(
        out["video_timestamps"].shape[1]
    )
    return [round(time, 3) for time in out["video_timestamps"][0].tolist()]


# ---- options of a part -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fps": 2}, [0, 0.5, 1, 1.5]),
        ({"fps": 2.0, "max_frames": 3}, [0, 0.6, 1.3]),
        ({"num_frames": 3}, [0, 0.9, 1.9]),
        ({"nframes": 3}, [0, 0.9, 1.9]),
        ({"max_frames": 3}, [0, 0.9, 1.9]),
        ({"max_frames": 50}, [0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 1.0, 1.1, 1.2, 1.3, 1.5, 1.6, 1.7, 1.9]),
        ({"sample_rate": 8}, [0, 0.8, 1.6]),
        ({"sampling": "fps", "fps": 1}, [0, 1.0]),
        ({"video_start": 0.5, "video_end": 0.8}, [0.5, 0.6, 0.7, 0.8]),
        ({"start": 1.65, "end": 5}, [1.7, 1.8, 1.9]),
        ({"start": 0.5, "end": 1.5, "nframes": 3}, [0.5, 1.0, 1.5]),
        ({"video_end": 0}, [0]),
        ({"max_pixels": 1225, "min_pixels": 1, "num_frames": 2}, [0, 1.9]),
    ],
)
def test_a_part_says_which_frames_it_gives(processor, clip, options, expected):
    assert times(processor, {"path": clip, **options}) == expected


def test_options_of_a_part_win_over_those_of_the_call_and_are_its_own(processor, clip):
    video = {"type": "video", "path": clip}
    out = processor.apply_chat_template(
        chat({**video, "fps": 1}, video, {**video, "end": 0.4}), processor_kwargs={"num_frames": 5}, **TENSORS
    )
    real = [row[mask].tolist() for row, mask in zip(out["video_timestamps"], out["video_frame_mask"], strict=True)]
    rounded = [[round(time, 2) for time in row] for row in real]
    assert rounded == [[0, 1], [0, 0.4, 0.9, 1.4, 1.9], [0, 0.1, 0.2, 0.3, 0.4]]


def test_a_window_alone_keeps_all_of_its_frames_where_nothing_is_sampled(processor, clip):
    assert times(processor, {"path": clip, "start": 1.75}, do_sample_frames=False) == [1.8, 1.9]


def test_the_frames_of_a_window_are_those_of_the_file(processor, clip):
    part = {"type": "video", "path": clip, "start": 0.7, "end": 1.1}
    pixels = processor.apply_chat_template(chat(part), **TENSORS)["pixel_values_videos"]
    expected = processor.video_processor([load_video(clip).frames[7:12]], return_tensors="pt")["pixel_values_videos"]
    torch.testing.assert_close(pixels, expected, atol=0.02, rtol=0)


def test_limits_go_by_the_times_of_the_file():
    """Frames at 0, 0.1, 0.2, 3, 3.1: by their mean rate, the third would be at 1.3 seconds."""
    sampling = FrameSampling(num_frames=16, video_start=0.1, video_end=3.0)
    uneven = np.array([0, 0.1, 0.2, 3.0, 3.1])
    assert sampling.select(5, 5 / 3.1, uneven).indices.tolist() == [1, 2, 3]
    assert sampling.select(5, 1.0).indices.tolist() == [1, 2, 3]


@pytest.mark.parametrize("form", ["array", "list", "tensor", "pictures", "folder"])
def test_fps_of_frames_is_their_own(processor, tmp_path, form):
    pictures = [Image.fromarray(frame) for frame in FRAMES]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    video = {
        "array": FRAMES,
        "list": list(FRAMES),
        "tensor": torch.from_numpy(FRAMES),
        "pictures": pictures,
        "folder": str(tmp_path),
    }[form]
    assert times(processor, {"video": video, "fps": 30}) == [0, 0.033, 0.067, 0.1, 0.133, 0.167]
    assert times(processor, {"video": video, "fps": 30.0, "nframes": 2}) == [0, 0.167]
    assert times(processor, {"video": video, "fps": 4, "start": 1}) == [1, 1.25]
    assert times(processor, {"video": video}) == [0, 0.5, 1, 1.5, 2, 2.5]


@pytest.mark.parametrize(
    ("limits", "size"),
    [({}, [100, 200]), ({"max_pixels": 5000}, [50, 100]), ({"min_pixels": 80000}, [200, 400])],
)
def test_an_image_is_brought_within_its_limits(processor, limits, size):
    part = {"type": "image", "image": Image.new("RGB", (200, 100)), **limits}
    assert processor.apply_chat_template(chat(part), **TENSORS)["image_sizes"].tolist() == [size]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"video_fps": 2}, "unknown key 'video_fps'; did you mean 'fps'"),
        ({"nframe": 2}, "unknown key 'nframe'; did you mean 'nframes'"),
        ({"total_pixels": 9}, "unknown key 'total_pixels'"),
        ({"image": "a.png"}, "unknown key 'image'"),
        ({"fps": "2"}, "fps"),
        ({"fps": -1}, "fps=-1"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"max_frames": True}, "'max_frames'"),
        ({"num_frames": 2, "nframes": 2}, "'num_frames' twice, once as 'nframes'"),
        ({"num_frames": 2, "fps": 2}, "exclude each other"),
        ({"start": 1, "end": 0.5}, "video_end=0.5 lies before video_start=1"),
        ({"start": -1}, "video_start=-1"),
        ({"start": "0:01"}, "video_start='0:01'"),
        ({"end": float("nan")}, "video_end=nan"),
        ({"max_pixels": 100}, "max_pixels=100, but each frame is resized to 35x35"),
        ({"min_pixels": 2000}, "min_pixels=2000, but each frame is resized to 35x35"),
        ({"max_pixels": 0.5}, "max_pixels=0.5 must be an integer"),
        ({"min_pixels": 20, "max_pixels": 10}, "min_pixels=20 is more than max_pixels=10"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_their_place(processor, clip, options, message):
    with pytest.raises(ValueError, match=rf"conversation\[0\]\['content'\]\[0\].*{re.escape(message)}"):
        times(processor, {"path": clip, **options})


def test_a_window_behind_the_end_is_refused(processor, clip):
    with pytest.raises(ValueError, match=r"no frame lies between video_start=3 and .* at 0 to 1\.9 seconds"):
        times(processor, {"path": clip, "start": 3})


def test_sampled_frames_are_a_video(processor, clip):
    assert times(processor, {"video": load_video(clip, FrameSampling(num_frames=3))}) == [0, 0.9, 1.9]


def test_sampled_frames_are_not_sampled_again(processor, clip):
    with pytest.raises(ValueError, match="num_frames cannot be applied to frames that are sampled already"):
        times(processor, {"video": load_video(clip), "nframes": 2})


# ---- keys --------------------------------------------------------------------------------------------------------------


def test_none_is_absent(processor, clip):
    """trl#5364: in a table, every row has the keys of all rows."""
    keys = dict.fromkeys(["video", "url", "path", "image", "text", "fps", "nframes", "start", "end", "max_pixels"])
    rows = [
        {"role": "user", "tool_calls": None, "name": None, "content": [
            {**keys, "type": "video", "path": clip}, {**keys, "type": "text", "text": "What happens?"}
        ]}
    ]  # fmt: skip
    expected = processor.apply_chat_template(chat({"type": "video", "path": clip}), **TENSORS)
    actual = processor.apply_chat_template(rows, **TENSORS)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert rows[0]["content"][0]["url"] is None, "the caller's rows stay as they are"


def test_media_as_openai_writes_them(processor, clip):
    for part in ({"video_url": {"url": clip}}, {"video_url": clip}, {"video_url": {"url": clip, "fps": 2}}):
        out = processor.apply_chat_template(chat({"type": "video_url", **part}), **TENSORS)
        assert out["video_timestamps"].shape[1] == (4 if "fps" in str(part) else 16)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "path": "a.mp4", "url": "b.mp4"}, "one as 'url' and one as 'path'"),
        ({"type": "text", "text": "a", "video": "b.mp4"}, "unknown key 'video'"),
        ({"type": "image", "path": "a.png", "fps": 2}, "unknown key 'fps'"),
    ],
)
def test_a_medium_that_nobody_would_see_is_an_error(processor, part, message):
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(chat(part), tokenize=tokenize)


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}, "tool_calls"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"type": "function"}]}, "tool_calls"),
        ({"role": "tool", "content": "21", "tool_call_id": "1"}, "tool_call_id"),
        ({"role": "assistant", "content": "a", "reasoning_content": "b"}, "reasoning_content"),
    ],
)
def test_what_the_template_would_drop_of_a_message_is_refused(processor, message, name):
    """transformers#45290"""
    with pytest.raises(ValueError, match=rf"conversation\[1\] has '{name}', but the chat template does not read it"):
        processor.apply_chat_template([*chat(), message])
    reads = DEFAULT_CHAT_TEMPLATE + "{{- messages[1]['" + name + "'] -}}"
    message = {"content": "a", **{key: value for key, value in message.items() if value is not None}}
    assert str(message[name]) in processor.apply_chat_template([*chat(), message], chat_template=reads)


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_what_the_template_would_drop_of_a_call_is_refused(processor, name):
    with pytest.raises(ValueError, match=f"does not read '{name}'"):
        processor.apply_chat_template(chat(), **{name: [{"title": "a", "text": "b"}]})
    reads = DEFAULT_CHAT_TEMPLATE + "{{- " + name + "[0]['title'] -}}"
    documents = {name: [{"title": "seen", "text": "b"}]}
    assert processor.apply_chat_template(chat(), chat_template=reads, **documents).endswith("seen")
    assert processor.apply_chat_template(chat(), **{name: []}) == processor.apply_chat_template(chat())


# ---- padding -----------------------------------------------------------------------------------------------------------


def test_padding_is_on_the_left_unless_the_tokenizer_says_otherwise(tmp_path):
    processor = tiny_processor(tiny_config())
    assert processor.tokenizer.padding_side == "left"
    processor.tokenizer.save_pretrained(tmp_path)
    assert type(processor.tokenizer).from_pretrained(tmp_path).padding_side == "left"
    parts = (processor.image_processor, character_tokenizer(padding_side="right"), processor.video_processor)
    right = LlavaNextARProcessor(*parts, frame_token_layout=processor.frame_token_layout)
    assert right.tokenizer.padding_side == "right"


def test_a_pipeline_answers_in_batches_as_one_by_one(processor):
    """LLaVA-NeXT#365: prompts that were padded on the right got no answer, or another one."""
    model = tiny_model()
    chats = [
        chat({"type": "video", "video": FRAMES[:n]}, text=text)
        for n, text in ((2, "Hi"), (5, "What is it?"), (1, "A"))
    ]
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"generate_kwargs": {"max_new_tokens": 5, "do_sample": False}, "return_full_text": False}
    alone = [ask(text=one, **settings)[0]["generated_text"] for one in chats]
    together = ask(text=chats, batch_size=3, **settings)
    assert [answer[0]["generated_text"] for answer in together] == alone
    assert all(alone)
