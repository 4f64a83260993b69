"""LlavaNextARProcessor: prompts as LLaVA-NeXT writes them, placeholders, masks, refusals, saving."""

import json
import re
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from golden_data import golden_cases, parametrize_golden
from packaging import version
from PIL import Image
from release_marks import since_transformers
from tiny import LAYOUTS, ONEVISION, tiny_config, tiny_model
from tiny_tokenizer import byte_tokenizer, character_tokenizer
from transformers import AutoProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from video_clips import write_clip

from llava_next_ar.configuration.frame_token_layout import FrameTokenLayout
from llava_next_ar.processing.llava_conversation import llava_conversation_to_messages
from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor
from llava_next_ar.processing.video_processing_llava_next_ar import LlavaNextARVideoProcessor

TENSORS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


def frames(num_frames: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, 30, 40, 3), dtype=np.uint8)


def picture(seed: int = 0, height: int = 30, width: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*parts) -> dict:
    """A turn of the user; strings are text, arrays videos, pictures images."""
    kinds = {str: "text", np.ndarray: "video", Image.Image: "image"}
    return {"role": "user", "content": [{"type": kinds[type(part)], kinds[type(part)]: part} for part in parts]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def make_processor(tokenizer=None, config=None, **kwargs) -> LlavaNextARProcessor:
    if config is None:
        config = tiny_config()
        if tokenizer is not None:
            config.image_token_id, config.video_token_id = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    return LlavaNextARProcessor.for_config(config, tokenizer or character_tokenizer(), **kwargs)


@pytest.fixture(scope="module")
def processor() -> LlavaNextARProcessor:
    return make_processor()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 20, fps=10, width=64, height=48)


# -- Prompts


def test_prompt_of_the_original(processor):
    conversation = [user(frames(), "Please describe this video in detail.")]
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<video>\nPlease describe this video in detail.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def _short_cases() -> list:
    cases = [
        case for case in golden_cases("frame_sampling") if "docs_prompt_qwen_1_5" in case and case["n_frames"] <= 64
    ]
    return [case for case in cases if not isinstance(case["process_video_with_decord"].get("error"), str)][::4]


@pytest.mark.parametrize("case", _short_cases(), ids=lambda case: case.name)
def test_time_instruction_and_prompt_of_the_original(case):
    layout = FrameTokenLayout(patches_height=1, patches_width=1, pool_stride=1, newline_position="no_token")
    base = make_processor(byte_tokenizer())
    processor = LlavaNextARProcessor(
        base.image_processor,
        base.tokenizer,
        LlavaNextARVideoProcessor(size=4),
        frame_token_layout=layout,
        add_time_instruction=True,
    )
    sampling = {"fps": case["video_fps"], "force_sample": case["force_sample"]}
    sampling |= {"max_frames": case["max_frames"]} if case["max_frames"] else {}
    out = processor.apply_chat_template(
        [user(np.zeros((case["n_frames"], 4, 4, 3), dtype=np.uint8), "Please describe this video in detail.")],
        add_generation_prompt=True,
        processor_kwargs={
            "sampling": "llava_video",
            "video_metadata": {"total_num_frames": case["n_frames"], "fps": case["avg_fps"]},
            **sampling,
        },
        **TENSORS,
    )
    text = re.sub("(<video>)+", "<image>", processor.decode(out["input_ids"][0]))
    assert text == case["docs_prompt_qwen_1_5"]
    assert (out["input_ids"] == processor.video_token_id).sum() == len(case["process_video_with_decord"]["frame_idx"])


def test_time_instruction_is_a_setting_too(tmp_path):
    processor = make_processor(byte_tokenizer(), add_time_instruction=True)
    processor.save_pretrained(tmp_path)
    processor = LlavaNextARProcessor.from_pretrained(tmp_path)
    conversation = [user(frames(2), frames(3), "Compare."), assistant("Alike.")]
    out = processor.apply_chat_template(conversation, return_assistant_tokens_mask=True, **TENSORS)
    text = processor.decode(out["input_ids"][0])
    assert "<video>The video lasts for 1.00 seconds, and 2 frames" in text
    assert "These frames are located at 0.00s,0.50s,1.00s.Please answer the following" in text
    assert processor.decode(out["input_ids"][0][out["assistant_masks"][0].bool()]) == "Alike.<|im_end|>"
    processor.add_time_instruction = False
    without = processor.apply_chat_template(conversation, **TENSORS)
    assert "lasts" not in processor.decode(without["input_ids"][0])


def test_a_system_message_replaces_the_default(processor):
    conversation = [{"role": "system", "content": "Be brief."}, user("Hi."), assistant("Yes?")]
    assert processor.apply_chat_template(conversation) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n"
    )


def test_media_keep_their_place_among_the_text(processor):
    prompt = processor.apply_chat_template([user("First ", picture(), "then ", frames(), frames(), "and ", frames())])
    assert "user\nFirst <image>\nthen <video>\n<video>\nand <video><|im_end|>" in prompt


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([{"role": "user", "content": [{"type": "audio"}]}], "text, image or video, got audio"),
        ([{"role": "assistant", "content": [{"type": "video"}]}], "holds text only, got a part of type video"),
    ],
)
def test_the_template_refuses_what_it_would_drop(processor, conversation, message):
    with pytest.raises(Exception, match=message):  # jinja's own class, from inside the template
        processor.apply_chat_template(conversation)


def test_continuing_the_last_message(processor):
    conversation = [user("Count."), assistant("One, two")]
    assert processor.apply_chat_template(conversation, continue_final_message=True).endswith("assistant\nOne, two")


# -- Placeholders


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sampling", [{}, {"use_fast_slow_frames": True, "num_fast": 2, "num_slow": 2}])
def test_the_model_finds_a_placeholder_for_each_of_its_tokens(layout, sampling):
    model = tiny_model(**LAYOUTS[layout])
    processor = make_processor(config=model.config, **sampling)
    conversations = [[user(frames(6), "What?")], [user(frames(1), frames(3, seed=1), "Which?")]]
    inputs = processor.apply_chat_template(conversations, processor_kwargs={"padding": True}, **TENSORS)
    assert ("video_frame_types" in inputs) == bool(sampling)
    expected = []
    for index, mask in enumerate(inputs["video_frame_mask"]):
        types = inputs["video_frame_types"][index][mask].tolist() if sampling else None
        expected.append(model.config.frame_token_layout.num_tokens(int(mask.sum()), types))
    found = (inputs["input_ids"] == processor.video_token_id).sum(1).tolist()
    assert found == [expected[0], expected[1] + expected[2]]
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_counts_are_known_without_pixels(layout):
    config = tiny_config(**LAYOUTS[layout])
    processor = make_processor(config=config)
    sizes = [(1, 30, 40), (5, 30, 40), (12, 9, 9)]
    counted = processor._get_num_multimodal_tokens(video_sizes=sizes, image_sizes=[(30, 60)])
    assert counted["num_video_tokens"] == [config.frame_token_layout.num_tokens(length) for length, _, _ in sizes]
    inputs = processor(text="<image>", images=picture(height=30, width=60), return_tensors="pt")
    assert counted["num_image_tokens"] == [(inputs["input_ids"] == processor.image_token_id).sum()]


def test_the_layout_travels_with_the_batch(processor):
    inputs = processor(text=["<video>", "<video>"], videos=[frames(2), frames(3)], padding=True, return_tensors="pt")
    assert inputs["video_layout"].shape == (2, 7) and inputs["video_layout"].dtype == torch.int64
    assert FrameTokenLayout.from_tensor(inputs["video_layout"][1]) == processor.frame_token_layout


def test_a_model_with_another_layout_refuses_the_batch(processor):
    inputs = processor(text="<video>", videos=frames(2), return_tensors="pt")
    with pytest.raises(ValueError, match="newline_position: 'frame' in the model, 'one_token' in the processor"):
        tiny_model(**LAYOUTS["frame"])(**inputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing_else(processor, side):
    conversations = [[user(frames(6), "What?")], [user("Hi.")], [user(frames(2, seed=1), frames(3, seed=2))]]
    kwargs = {"padding": True, "padding_side": side}
    batch = processor.apply_chat_template(conversations, processor_kwargs=kwargs, **TENSORS)
    video = 0
    for index, conversation in enumerate(conversations):
        alone = processor.apply_chat_template(conversation, **TENSORS)
        real = batch["attention_mask"][index].bool()
        assert torch.equal(batch["input_ids"][index][real], alone["input_ids"][0])
        width = int(real.sum())
        assert (real[-width:] if side == "left" else real[:width]).all()
        for number, mask in enumerate(alone.get("video_frame_mask", ())):
            found = batch["pixel_values_videos"][video][batch["video_frame_mask"][video]]
            assert torch.equal(found, alone["pixel_values_videos"][number][mask])
            video += 1
    assert video == len(batch["pixel_values_videos"]) == 3


@pytest.mark.parametrize("key", ["path", "url", "video"])
@pytest.mark.parametrize("as_path", [True, False])
def test_straight_from_a_file(processor, clip, key, as_path):
    part = {"type": "video", key: clip if as_path else str(clip)}
    conversation = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(conversation, processor_kwargs={"num_frames": 5}, **TENSORS)
    expected = processor.video_processor(clip, num_frames=5, return_tensors="pt")
    for name, value in expected.items():
        assert torch.equal(inputs[name], value)


@pytest.mark.parametrize("kind", ["bytes", "images", "paths", "tensor"])
def test_no_kind_of_video_is_dropped_from_a_chat(processor, clip, tmp_path, kind):
    for index, frame in enumerate(frames(3)):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    paths = [str(tmp_path / f"{index}.png") for index in range(3)]
    video = {
        "bytes": clip.read_bytes(),
        "images": [Image.open(path) for path in paths],
        "paths": paths,
        "tensor": torch.from_numpy(frames(3)),
    }[kind]
    conversation = [{"role": "user", "content": [{"type": "video", "video": item} for item in (video, clip)]}]
    inputs = processor.apply_chat_template(conversation, processor_kwargs={"num_frames": 3}, **TENSORS)
    expected = processor.video_processor([video, clip], num_frames=3, return_tensors="pt")["pixel_values_videos"]
    assert len(expected) == 2 and torch.equal(inputs["pixel_values_videos"], expected)


def test_images_and_videos_in_one_batch():
    model = tiny_model()
    processor = make_processor(config=model.config)
    conversations = [
        [user(frames(3), "What?")],
        [user(picture(), "What?")],
        [user(picture(1), picture(2), frames(2), "Which?")],
    ]
    inputs = processor.apply_chat_template(conversations, processor_kwargs={"padding": True}, **TENSORS)
    assert inputs["batch_num_images"].tolist() == [1, 2]
    assert len(inputs["image_sizes"]) == len(inputs["pixel_values"]) == 3
    assert inputs["video_frame_mask"].sum(1).tolist() == [3, 2]
    assert model(**inputs).logits.isfinite().all()


def test_image_files(processor, tmp_path):
    picture().save(tmp_path / "a.png")
    expected = processor(text="<image>", images=picture(), return_tensors="pt")["pixel_values"]
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        conversation = [{"role": "user", "content": [{"type": "image", "path": path}]}]
        assert torch.equal(processor.apply_chat_template(conversation, **TENSORS)["pixel_values"], expected)


@parametrize_golden("preprocess")
def test_image_tiles_of_the_original(case):
    if case["kind"] != "image":
        pytest.skip("videos: test_video_processing.py")
    side = case["size"]
    config = tiny_config(vision_config={**ONEVISION["vision_config"], "image_size": side})
    config.image_grid_pinpoints = case["image_grid_pinpoints"]
    processor = make_processor(config=config)
    image = case.tensor(f"{case.name}/uint8_hwc").numpy()
    found = processor(text="<image>", images=Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
    # The reference data is Pillow 13's, which resizes a tall picture's height first; earlier ones always resize the width
    # first, and round to other levels in between.
    is_tall = image.shape[0] > image.shape[1]
    levels = 3.01 if is_tall and version.parse(PIL.__version__) < version.parse("13") else 0
    tolerance = levels / 255 / min(processor.image_processor.image_std)
    torch.testing.assert_close(found, case.tensor(f"{case.name}/anyres_pixel_values"), rtol=0, atol=tolerance)


# -- Masks for training


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokenizer", [character_tokenizer, byte_tokenizer])
def test_masked_tokens_are_exactly_what_the_assistant_says(side, tokenizer):
    said = [
        "A cat - or so it seems.",
        "No.",
        "Both.",
        "Grüße, 你好!" if tokenizer is byte_tokenizer else "Bye!",
        "Text only.",
    ]
    conversations = [
        [user(frames(6), "What?"), assistant(said[0]), user(picture(), "That?"), assistant(said[1])],
        [
            user(frames(1), "A", frames(3), "or B?"),
            {"role": "assistant", "content": said[2]},
            user("?"),
            assistant(said[3]),
        ],
        [user("No media."), assistant(said[4])],
    ]
    processor = make_processor(tokenizer())
    for tensors in (TENSORS, {"tokenize": True, "return_dict": True}):
        out = processor.apply_chat_template(
            conversations,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": side},
            **tensors,
        )
        assert torch.is_tensor(out["assistant_masks"]) == ("return_tensors" in tensors)
        ids, masks = torch.as_tensor(out["input_ids"]), torch.as_tensor(out["assistant_masks"]).bool()
        decoded = [processor.decode(row[mask]) for row, mask in zip(ids, masks, strict=True)]
        end = "<|im_end|>"
        assert decoded == [said[0] + end + said[1] + end, said[2] + end + said[3] + end, said[4] + end]


def test_masks_need_a_template_that_marks_them(processor):
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(
        ValueError, match=r"return_assistant_tokens_mask=True needs a chat template with \{% generation"
    ):
        processor.apply_chat_template(
            [{"role": "user", "content": "Hi."}], template, return_assistant_tokens_mask=True, **TENSORS
        )


# -- Refusals


@pytest.mark.parametrize(
    ("text", "videos", "message"),
    [
        ("<video>", None, "hold 1 and no videos were passed.*content part"),
        (
            "<video><video>",
            [frames()],
            "<video> tokens in the prompts should be the same.* hold 2 and 1 video was passed",
        ),
        ("Hi.", [frames()], "hold 0 and 1 video was passed; video_token is '<video>'$"),
        (["<video>", "<video>"], [[frames(), frames()], []], "prompt 0 holds 1 <video> placeholders for 2 videos"),
        ([1], None, "text must be a string or a list of strings"),
    ],
)
def test_placeholders_and_videos_must_match(processor, text, videos, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, videos=videos)


def test_images_are_counted_by_prompt_too(processor):
    with pytest.raises(ValueError, match="prompt 0 holds 1 <image> placeholders for 2 images"):
        processor(text=["<image>", "<image>"], images=[[picture(), picture()], []])
    with pytest.raises(ValueError, match="hold 1 and no images were passed"):
        processor(text="<image>")


def test_nothing_to_process_and_audio_are_refused(processor):
    with pytest.raises(ValueError, match="at least one of text, images and videos"):
        processor()
    with pytest.raises(ValueError, match="takes no audio"):
        processor(text="Hi.", audio=np.zeros(9))


def test_a_placeholder_that_a_user_writes_is_an_error(processor):
    with pytest.raises(ValueError, match="A literal <video> in a user's text counts as a placeholder too"):
        processor.apply_chat_template([user(frames(2), "What does <video> mean?")], **TENSORS)


@since_transformers("5.23", "it brought sanitize_control_tokens")
def test_a_sanitized_placeholder_is_text_and_the_video_beside_it_arrives(processor):
    conversation = [user(frames(2), "What does <video> mean?")]
    inputs = processor.apply_chat_template(conversation, sanitize_control_tokens=True, **TENSORS)
    num_tokens = processor.frame_token_layout.num_tokens(2)
    assert (inputs["input_ids"] == processor.video_token_id).sum() == num_tokens
    assert "mean?" in processor.decode(inputs["input_ids"][0])
    with pytest.raises(ValueError, match="visual tokens are never cut off"):
        processor.apply_chat_template(
            conversation,
            sanitize_control_tokens=True,
            processor_kwargs={"truncation": True, "max_length": num_tokens},
            **TENSORS,
        )


def test_visual_tokens_are_never_cut_off(processor):
    conversation = [user("Look: ", frames(6), "What happens in this video?")]
    whole = processor.apply_chat_template(conversation, **TENSORS)["input_ids"]
    length, visual = whole.shape[1], int((whole == processor.video_token_id).sum())
    last_visual = int((whole[0] == processor.video_token_id).nonzero()[-1])
    cut = {"truncation": True, "max_length": last_visual + 1}
    inputs = processor.apply_chat_template(conversation, processor_kwargs=cut, **TENSORS)
    assert torch.equal(inputs["input_ids"], whole[:, : last_visual + 1])  # words may go
    cut["max_length"] = last_visual - 4
    message = (
        f"prompt 0 has {length} tokens, {visual} of them visual: {length - last_visual + 4} more than the "
        rf"{last_visual - 4} that max_length allows, .*\(5 would be\). "
        "Lower num_frames, fps or max_frames, or raise max_length"
    )
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation, processor_kwargs=cut, **TENSORS)
    with pytest.raises(ValueError, match="return_overflowing_tokens"):
        processor(text="<video>", videos=frames(6), return_overflowing_tokens=True, truncation=True, max_length=9)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_frame": 4}, "unknown option 'num_frame'.*did you mean 'num_frames'"),
        ({"videos_kwargs": {"framesize": 4}}, "unknown option 'framesize' for videos_kwargs"),
        ({"video_fps": 4}, "unknown option 'video_fps'.*did you mean 'fps'"),
        ({"nframes": 4}, "unknown option 'nframes'.*did you mean 'num_frames'"),
        (
            {"do_sample": False},
            "'do_sample' is an option of generate: .* a pipeline as generate_kwargs={'do_sample': ...}",
        ),
        ({"temperature": 1.0}, "'temperature' is an option of generate"),
    ],
)
def test_unknown_options_are_refused(processor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor(text="<video>", videos=frames(), **kwargs)
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template([user(frames())], processor_kwargs=kwargs, **TENSORS)


def test_options_reach_the_video_processor_by_any_way(processor):
    video = frames(6)
    for kwargs in ({"num_frames": 3}, {"videos_kwargs": {"num_frames": 3}}):
        inputs = processor(text="<video>", videos=video, return_tensors="pt", **kwargs)
        assert inputs["pixel_values_videos"].shape[1] == 3
    assert "video_metadata" not in inputs
    inputs = processor(text="<video>", videos=video, return_tensors="pt", return_metadata=True, enable_multiscale=True)
    assert inputs["video_metadata"][0].total_num_frames == 6
    assert [scale.shape[-1] for scale in inputs["pixel_values_videos_scales"]] == [26, 18]


def test_the_callers_options_are_left_as_they_were(processor):
    kwargs = {"padding": True, "videos_kwargs": {"num_frames": 2}}
    processor.apply_chat_template(
        [user(frames()), assistant("Yes.")], processor_kwargs=kwargs, return_assistant_tokens_mask=True, **TENSORS
    )
    assert kwargs == {"padding": True, "videos_kwargs": {"num_frames": 2}}


def test_model_input_names_are_the_keys_of_a_call(processor):
    inputs = processor(text="<image><video>", images=picture(), videos=frames(), return_tensors="pt")
    assert set(inputs) == set(processor.model_input_names)


# -- LLaVA's JSON


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        ("<video>\nWhat happens?", "<video>\nWhat happens?"),
        ("<video>What happens?", "<video>\nWhat happens?"),
        ("What colour is it?<video>", "What colour is it?<video>"),
        ("What colour is it?\n<video>", "What colour is it?\n<video>"),
        ("Here: <video>\n\nWell?", "Here: <video>\n\nWell?"),
    ],
)
def test_llava_conversations_keep_the_place_of_the_video(processor, value, prompt):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "A cat."}]
    messages = llava_conversation_to_messages(turns, videos=["x.mp4"])
    assert [part for part in messages[0]["content"] if part["type"] == "video"] == [
        {"type": "video", "video": "x.mp4"}
    ]
    assert processor.apply_chat_template(messages).endswith(
        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    )


def test_llava_conversation_with_several_media_and_a_system_turn(processor):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image><image>\nand <video>\nAlike?"},
        {"from": "gpt", "value": "No."},
        {"from": "human", "value": "And this? <video>"},
        {"from": "gpt", "value": "Yes."},
    ]
    messages = llava_conversation_to_messages(turns, videos=["a.mp4", "b.mp4"], images=["1.png", "2.png"])
    parts = [part for message in messages for part in message["content"]]
    assert [part[part["type"]] for part in parts if part["type"] != "text"] == ["1.png", "2.png", "a.mp4", "b.mp4"]
    assert processor.apply_chat_template(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\n<image>\nand <video>\nAlike?<|im_end|>\n"
        "<|im_start|>assistant\nNo.<|im_end|>\n<|im_start|>user\nAnd this? <video><|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )


def test_llava_video_data_write_image_for_a_video(processor):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    messages = llava_conversation_to_messages(turns, videos=[frames()])
    assert messages[0]["content"][0]["type"] == "video"
    out = processor.apply_chat_template(messages, return_assistant_tokens_mask=True, **TENSORS)
    assert processor.decode(out["input_ids"][0][out["assistant_masks"][0].bool()]) == "A cat.<|im_end|>"


@pytest.mark.parametrize(
    ("turns", "media", "message"),
    [
        ([("human", "<video>\nWhat?")], {}, "1 <video> placeholders for 0 videos.*What"),
        ([("human", "What?")], {"videos": ["a.mp4"]}, "placeholders for 1 videos"),
        ([("human", "<video><image>")], {"videos": ["a.mp4"]}, "1 <image> placeholders for 0 images"),
        ([("human", "<image><image>")], {"videos": ["a.mp4"]}, "2 <image> placeholders for 1 videos"),
        ([("tool", "Hi.")], {}, "turn 0 is from 'tool', expected one of system, human, gpt"),
        ([("human", "Hi."), ("gpt", "A <video>.")], {"videos": ["a.mp4"]}, "0 <video> placeholders for 1 videos"),
        ([], {}, "no turns"),
    ],
)
def test_llava_conversations_that_do_not_fit_their_media(turns, media, message):
    with pytest.raises(ValueError, match=message):
        llava_conversation_to_messages([{"from": role, "value": value} for role, value in turns], **media)


def test_turns_must_be_turns():
    with pytest.raises(ValueError, match="turn 0 must be a dict with 'from' and 'value'"):
        llava_conversation_to_messages([{"role": "user", "content": "Hi."}])


# -- Building, saving, loading


def test_everything_of_a_configuration_is_in_its_processor():
    head = {"use_fast_slow_frames": True, "num_fast": 3, "slow_stride": 2}
    config = tiny_config(head, **LAYOUTS["slow_fast"])
    processor = make_processor(config=config, resize_backend="pil", image_mean=[0.4] * 3)
    assert processor.frame_token_layout == config.frame_token_layout
    assert processor.num_image_tokens == 25
    video_processor = processor.video_processor
    assert dict(video_processor.size) == dict(processor.image_processor.size) == {"height": 35, "width": 35}
    assert video_processor.use_fast_slow_frames and (video_processor.num_fast, video_processor.slow_stride) == (3, 2)
    assert video_processor.resize_backend == "pil"
    assert list(processor.image_processor.image_mean) == list(video_processor.image_mean) == [0.4] * 3
    assert not make_processor(config=config, use_fast_slow_frames=False).video_processor.use_fast_slow_frames


def test_missing_placeholder_tokens_are_added_and_told_to_the_configuration():
    tokenizer, config = byte_tokenizer(placeholders=False), tiny_config()
    with pytest.raises(ValueError, match="the tokenizer has no token '<image>'"):
        LlavaNextARProcessor(
            LlavaOnevisionImageProcessorPil(), tokenizer, LlavaNextARVideoProcessor(), num_image_tokens=25
        )
    size = len(tokenizer)
    processor = LlavaNextARProcessor.for_config(config, tokenizer)
    assert (config.image_token_id, config.video_token_id) == (size, size + 1)
    inputs = processor(text="<video>", videos=frames(), return_tensors="pt")
    assert (inputs["input_ids"] == config.video_token_id).all()


def test_a_tokenizer_with_its_own_placeholder():
    tokenizer = byte_tokenizer(extra_special_tokens={"video_token": "<|video_pad|>", "image_token": "<|image_pad|>"})
    config = tiny_config()
    config.image_token_id, config.video_token_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    processor = LlavaNextARProcessor.for_config(config, tokenizer)
    assert (processor.image_token, processor.video_token) == ("<|image_pad|>", "<|video_pad|>")
    inputs = processor.apply_chat_template([user(frames(), "What?")], **TENSORS)
    num_tokens = processor.frame_token_layout.num_tokens(4)
    assert (inputs["input_ids"] == processor.video_token_id).sum() == num_tokens


def test_a_processor_that_does_not_fit_a_model_says_where(processor):
    processor.check_layout(tiny_config())
    with pytest.raises(ValueError, match="pool_stride: 1 in the model, 2 in the processor"):
        processor.check_layout(tiny_config(mm_spatial_pool_stride=1))
    with pytest.raises(ValueError, match="video_token_id is 5 in the model, but 127 in the tokenizer"):
        processor.check_layout(tiny_config(video_token_index=5))
    with pytest.raises(ValueError, match="image_token_id is 126 in the model, but 258"):
        LlavaNextARProcessor.for_config(tiny_config(), byte_tokenizer())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_image_tokens": 26}, "num_image_tokens=26 is not a square number"),
        (
            {"num_image_tokens": 16, "frame_token_layout": {"patches_height": 5, "patches_width": 5}},
            "num_image_tokens=16 contradicts the layout's 5x5 patches",
        ),
        ({"frame_token_layout": {"patches": 5}}, "unknown layout keys"),
    ],
)
def test_a_layout_must_be_known(processor, keys, message):
    parts = (processor.image_processor, processor.tokenizer, processor.video_processor)
    with pytest.raises(ValueError, match=message):
        LlavaNextARProcessor(*parts, **keys)


def test_without_any_layout_text_is_all_that_can_be_processed(processor, tmp_path):
    LlavaNextARProcessor(processor.image_processor, processor.tokenizer, processor.video_processor).save_pretrained(
        tmp_path
    )
    built = LlavaNextARProcessor.from_pretrained(tmp_path)
    assert len(built(text="Hi.")["input_ids"][0]) == 3
    for media in ({"text": "<video>", "videos": frames()}, {"text": "<image>", "images": picture()}):
        with pytest.raises(ValueError, match="has no layout of visual tokens"):
            built(**media)


@pytest.mark.parametrize(
    ("num_image_tokens", "strategy"), [(25, "full"), (25, None), (26, "default"), (25, "default")]
)
def test_without_a_layout_it_is_that_of_onevision(processor, num_image_tokens, strategy):
    parts = (processor.image_processor, processor.tokenizer, processor.video_processor)
    built = LlavaNextARProcessor(*parts, num_image_tokens=num_image_tokens, vision_feature_select_strategy=strategy)
    assert built.frame_token_layout == FrameTokenLayout(patches_height=5, patches_width=5)
    assert built.frame_token_layout.num_tokens(4) == 4 * 3 * 3 + 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("size", {"shortest_edge": 35}, "size must be {height, width}, of whole numbers"),
        ("image_grid_pinpoints", [], "image_grid_pinpoints must contain at least one size, got none"),
    ],
)
def test_an_image_processor_that_cannot_make_tiles_is_refused(processor, tmp_path, key, value, message):
    """transformers fails on it with the first image that is not square."""
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    saved = json.loads(path.read_text())
    saved["image_processor"][key] = value
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message):
        LlavaNextARProcessor.from_pretrained(tmp_path)


def test_the_video_processor_must_be_one(processor):
    with pytest.raises(TypeError, match="video_processor must be a video processor, got str"):
        LlavaNextARProcessor(processor.image_processor, processor.tokenizer, "video", num_image_tokens=25)


def assert_same_files(first: Path, second: Path) -> None:
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize("through", [LlavaNextARProcessor, AutoProcessor])
def test_saved_loaded_and_saved_again_every_file_is_the_same(tmp_path, through):
    processor = make_processor(
        config=tiny_config(**LAYOUTS["slow_fast"]), fps=2.0, max_frames=5, add_time_instruction=True
    )
    conversation = [user(frames(6), picture(), "What?"), assistant("A cat.")]
    kwargs = {"padding": "max_length", "max_length": 999, "truncation": True}
    kwargs |= {"video_metadata": {"total_num_frames": 6, "fps": 4.0}}
    before = processor.apply_chat_template(conversation, processor_kwargs=kwargs, **TENSORS)
    processor.save_pretrained(tmp_path / "first")
    (tmp_path / "first" / "config.json").write_text(tiny_config().to_json_string())  # as beside a checkpoint
    trust = {"trust_remote_code": True} if through is AutoProcessor else {}
    loaded = through.from_pretrained(tmp_path / "first", **trust)
    (tmp_path / "first" / "config.json").unlink()
    loaded.save_pretrained(tmp_path / "second")
    assert_same_files(tmp_path / "first", tmp_path / "second")
    again = through.from_pretrained(tmp_path / "second", **trust)
    again.save_pretrained(tmp_path / "third")
    assert_same_files(tmp_path / "second", tmp_path / "third")

    assert type(loaded).__name__ == "LlavaNextARProcessor"
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.frame_token_layout.to_dict() == processor.frame_token_layout.to_dict()
    after = loaded.apply_chat_template(conversation, processor_kwargs=kwargs, **TENSORS)
    assert set(after) == set(before)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_how_the_last_call_padded_is_not_saved(tmp_path, processor):
    """Fast tokenizers keep it in tokenizer.json, and transformers would make it an option of every later call."""
    processor(text="Hi.", padding="max_length", max_length=50, truncation=True)
    processor.save_pretrained(tmp_path)
    loaded = LlavaNextARProcessor.from_pretrained(tmp_path)
    assert len(loaded(text="Hello.")["input_ids"][0]) == len("Hello.")


def test_what_is_saved(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["frame_token_layout"] == processor.frame_token_layout.to_dict()
    assert saved["video_processor"]["video_processor_type"] == "LlavaNextARVideoProcessor"
    assert {"AutoConfig", "AutoModel", "AutoProcessor", "AutoVideoProcessor"} <= saved["auto_map"].keys()
    assert saved["auto_map"] == saved["video_processor"]["auto_map"]
    assert (tmp_path / "chat_template.jinja").read_text() == processor.chat_template
    for module in set(saved["auto_map"].values()):
        assert (tmp_path / f"{module.split('.')[0]}.py").exists()


def test_options_may_be_changed_when_loading(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    loaded = LlavaNextARProcessor.from_pretrained(tmp_path, num_frames=3, resize_backend="pil", padding_side="left")
    assert (loaded.video_processor.num_frames, loaded.video_processor.resize_backend) == (3, "pil")
    assert loaded.tokenizer.padding_side == "left"
    assert "num_frames" not in loaded.tokenizer.init_kwargs


def test_loads_the_files_of_a_onevision_processor(tmp_path):
    """Flat files, as released checkpoints have them: the layout is OneVision's, and sampling is ours."""
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": 35, "width": 35}, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_grid_pinpoints=[[35, 35]]
    )
    image_processor.save_pretrained(tmp_path)
    video = {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": {"height": 35, "width": 35}}
    video |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_sample_frames": False}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    file = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 25,
        "vision_feature_select_strategy": "full",
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(file))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))
    processor = LlavaNextARProcessor.from_pretrained(tmp_path)
    assert processor.frame_token_layout == FrameTokenLayout(patches_height=5, patches_width=5)
    assert processor.chat_template == "{{ messages[0]['content'] }}"
    inputs = processor(text="<video>", videos=frames(40), return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (1, 16, 3, 35, 35)
    processor.check_layout(tiny_config())
