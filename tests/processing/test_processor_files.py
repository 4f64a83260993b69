"""Files of processors: unknown keys are kept with a warning and saved again; misspelt keyword arguments raise."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from tiny import tiny_config
from tiny_processor import tiny_processor

from llava_next_ar.configuration import key_names
from llava_next_ar.configuration.configuration_llava_next_ar import LlavaNextARAutoregressiveConfig
from llava_next_ar.processing.frame_sampling import FrameSampling, head_sampling
from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor
from llava_next_ar.processing.video_processing_llava_next_ar import LlavaNextARVideoProcessor


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    messages = []
    monkeypatch.setattr(key_names.logger, "warning_once", lambda text: text in messages or messages.append(text))
    return messages


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny_processor(tiny_config(), num_frames=7).save_pretrained(tmp_path)
    return tmp_path


def rewrite(path: Path, **keys) -> dict:
    values = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps(values))
    return values


@pytest.mark.parametrize("file", ["video_preprocessor_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("how", ["folder", "json file", "dict"])
def test_unknown_keys_of_a_video_processor_are_kept(tmp_path, warned, file, how):
    LlavaNextARVideoProcessor(num_frames=7).to_json_file(tmp_path / file)
    values = rewrite(tmp_path / file, num_frame=3, trained_by={"a": [1]})
    video_processor = {
        "folder": lambda: LlavaNextARVideoProcessor.from_pretrained(tmp_path),
        "json file": lambda: LlavaNextARVideoProcessor.from_json_file(tmp_path / file),
        "dict": lambda: LlavaNextARVideoProcessor.from_dict(values),
    }[how]()
    assert (video_processor.num_frames, video_processor.num_frame, video_processor.trained_by) == (7, 3, {"a": [1]})
    assert warned == [
        "unknown key 'num_frame' in the video processor's file is kept, but has no effect; did you mean 'num_frames'?",
        "unknown key 'trained_by' in the video processor's file is kept, but has no effect",
    ]
    assert json.loads(video_processor.to_json_string()) == values


def test_an_attribute_of_a_video_processor_is_kept(tmp_path):
    video_processor = LlavaNextARVideoProcessor()
    video_processor.note = "a"
    video_processor.to_json_file(tmp_path / "video_preprocessor_config.json")
    assert LlavaNextARVideoProcessor.from_pretrained(tmp_path).note == "a"


def test_an_unknown_key_cannot_hide_a_method_of_the_video_processor():
    with pytest.raises(ValueError, match="key 'preprocess' in the video processor's file is the name of a method"):
        LlavaNextARVideoProcessor.from_dict({"preprocess": 1})


def test_unknown_keys_of_a_processor_are_kept(saved, tmp_path, warned):
    path = saved / "processor_config.json"
    nested = json.loads(path.read_text())
    nested["video_processor"]["num_frame"] = 3
    nested["image_processor"]["image_tool"] = "b"
    values = rewrite(path, **nested, add_time_instructions=True, trained_by={"a": [1]}, image_token_id=5)
    processor = LlavaNextARProcessor.from_pretrained(saved)
    assert processor.add_time_instruction is False and processor.image_token_id != 5
    assert warned[-3:] == [
        "unknown key 'add_time_instructions' in processor_config.json is kept, but has no effect; did you mean "
        "'add_time_instruction'?",
        "unknown key 'trained_by' in processor_config.json is kept, but has no effect",
        "unknown key 'image_token_id' in processor_config.json is kept, but has no effect; did you mean 'image_token'?",
    ]
    processor.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "processor_config.json").read_text()) == values


@pytest.mark.parametrize(
    ("keywords", "nearest"),
    [
        ({"num_frame": 3}, "num_frames"),
        ({"resize_backends": "pil"}, "resize_backend"),
        ({"add_time_instructions": True}, "add_time_instruction"),
        ({"image_grid_pinpoint": []}, "image_grid_pinpoints"),
    ],
)
def test_misspelt_keywords_are_refused_when_loading(saved, keywords, nearest):
    message = f"unknown option '{next(iter(keywords))}' for LlavaNextARProcessor; did you mean '{nearest}'"
    with pytest.raises(ValueError, match=message):
        LlavaNextARProcessor.from_pretrained(saved, **keywords)


def test_misspelt_keywords_of_a_video_processor_are_refused(tmp_path):
    LlavaNextARVideoProcessor(num_frames=7).to_json_file(tmp_path / "video_preprocessor_config.json")
    rewrite(tmp_path / "video_preprocessor_config.json", num_frame=3)
    message = "unknown option 'num_frame' for LlavaNextARVideoProcessor; did you mean 'num_frames'"
    with pytest.raises(ValueError, match=message):
        LlavaNextARVideoProcessor.from_pretrained(tmp_path, num_frame=4)
    with pytest.raises(ValueError, match=message):
        LlavaNextARVideoProcessor(num_frame=4)


def test_keywords_of_the_tokenizer_pass(saved):
    processor = LlavaNextARProcessor.from_pretrained(saved, padding_side="left", model_max_length=77, use_fast=True)
    assert (processor.tokenizer.padding_side, processor.tokenizer.model_max_length) == ("left", 77)


# --- one name and one default for each sampling setting ---------------------------------------------------


def test_every_sampling_setting_is_an_option_with_the_same_default():
    limits = {"video_start", "video_end"}  # of one video
    settings = {field.name: field.default for field in fields(FrameSampling) if field.name not in limits}
    settings["sampling"] = settings.pop("policy")
    assert settings.keys() <= LlavaNextARVideoProcessor.valid_kwargs.__annotations__.keys()
    assert {name: getattr(LlavaNextARVideoProcessor(), name) for name in settings} == settings


def test_slow_and_fast_frames_have_one_default_and_follow_the_head():
    head = LlavaNextARAutoregressiveConfig()
    names = ("fast_stride", "slow_stride", "num_fast", "num_slow")
    assert [getattr(head, name) for name in names] == [getattr(FrameSampling(), name) for name in names]
    keys = {"fast_stride": 2, "slow_stride": 3, "num_fast": 5, "num_slow": 6}
    assert head_sampling(tiny_config({"use_fast_slow_frames": True, **keys})) == {"use_fast_slow_frames": True, **keys}
    assert head_sampling(tiny_config(keys)) == {}
    assert head_sampling(tiny_config({"use_fast_slow_frames": True}, enable_autoregressive=False)) == {}
    processor = tiny_processor(tiny_config({"use_fast_slow_frames": True, **keys}), num_fast=1)
    sampling = processor.video_processor.sampling_for()
    assert sampling == FrameSampling(policy="fast_slow", **{**keys, "num_fast": 1})
