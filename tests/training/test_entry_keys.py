"""Keys of entries, control tokens in texts, and errors that are not a sample's fault."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny_model
from tiny_processor import tiny_processor
from video_clips import write_clip

from llava_next_ar.evaluation.questions import read_questions
from llava_next_ar.experiments.temporal import synthetic_clips
from llava_next_ar.processing import video_inputs
from llava_next_ar.training import samples
from llava_next_ar.training.bad_samples import BadSampleError, BadSampleLedger
from llava_next_ar.training.data import LlavaVideoDataset, any_answers, load_training_data
from llava_next_ar.training.preflight import choose_samples

ASKED = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A square."}]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_model().config, num_frames=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "a.mp4", 6, width=64, height=48)
    return folder


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"conversation": ASKED}, "unknown key 'conversation'; did you mean 'conversations'"),
        ({"Conversations": ASKED}, "unknown key 'Conversations'; did you mean 'conversations'"),
        ({"message": ASKED}, "unknown key 'message'; did you mean 'messages'"),
        (
            {"question": "What?", "answer": "A square."},
            "'question'; did you mean 'conversations'.*Texts are read from",
        ),
        ({"caption": "A square."}, "'caption'; did you mean 'conversations'"),
        ({"text": "A square."}, "'text'; did you mean 'conversations'"),
        ({"prompt": "What?", "completion": "A square."}, "'prompt'; did you mean 'conversations'"),
        ({"instruction": "What?", "output": "A square."}, "'instruction'; did you mean 'conversations'"),
        ({"dense_captions": ["A square."]}, "'dense_captions'; did you mean 'conversations'"),
        ({"conversations": None}, "'conversations' is null"),
        ({"messages": None}, "'messages' is null"),
        ({"conversations": ASKED, "vidoes": ["b.mp4"]}, "'vidoes'; did you mean 'videos'"),
        ({"conversations": ASKED, "image_path": "b.png"}, "'image_path'; did you mean 'image"),
        ({"conversations": ASKED, "weight": 2.0}, "'weight'; a source has a weight"),
        ({"conversations": ASKED, "video_fps": 4}, "'video_fps'; frames are sampled by 'num_frames'"),
        ({"conversations": ASKED, "start_time": 1.0}, "'start_time'; a part of a video is given by 'video_start'"),
        ({"conversations": ASKED, "fsp": 1.0}, "'fsp'; did you mean 'fps'"),
        ({"conversations": [{**ASKED[0], "loss": False}, ASKED[1]]}, "turn 0 has the unknown key 'loss'"),
        ({"messages": [{"role": "user", "content": "<video>", "tool_calls": []}]}, "message 0 has the unknown key"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "path": "a.mp4", "num_frame": 4}]}]},
            "a video part of message 0 has the unknown key 'num_frame'; did you mean 'num_frames'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png", "fps": 4}]}]},
            "an? image part of message 0 has the unknown key 'fps'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "path": "a.mp4", "video": "a.mp4"}]}]},
            "both 'video' and 'path'",
        ),
        (
            {"conversations": [*ASKED, ASKED[0] | {"value": "And?"}, ASKED[1] | {"value": " "}]},
            "turn 3, from 'gpt', is",
        ),
        ({"conversations": [ASKED[0], ASKED[1] | {"value": ""}]}, "has no answer"),
        ({"conversations": ASKED, "system": ""}, "'system' must be the text"),
        ({"conversations": [{"from": "system", "value": "Hi."}, *ASKED], "system": "Be brief."}, "a system turn too"),
    ],
)
def test_what_is_not_read_of_an_entry_is_refused_by_name(entry, message, processor, root):
    with pytest.raises(BadSampleError, match=message):
        LlavaVideoDataset([{"video": "a.mp4", **entry}], processor, video_root=root).messages(0)


def test_nulls_notes_and_keys_that_are_named_may_stand(processor, root):
    plain = LlavaVideoDataset([{"video": "a.mp4", "conversations": ASKED}], processor, video_root=root)[0]
    notes = {
        "id": 3,
        "data_source": "x",
        "question_type": "color",
        "choices": ["A", "B"],
        "caption": None,
        "messages": None,
    }
    read = LlavaVideoDataset([{"video": "a.mp4", "conversations": ASKED, **notes}], processor, video_root=root)[0]
    assert torch.equal(read["input_ids"], plain["input_ids"]) and torch.equal(read["labels"], plain["labels"])
    extra = {"video": "a.mp4", "conversations": [{**turn, "loss": 1} for turn in ASKED], "caption": "A square."}
    options = {"video_root": root, "ignored_keys": ["caption", "loss"]}
    read = LlavaVideoDataset([extra], processor, **options)[0]
    assert torch.equal(read["input_ids"], plain["input_ids"])
    with pytest.raises(BadSampleError, match="unknown key 'caption'"):
        LlavaVideoDataset([extra], processor, video_root=root, ignored_keys=["loss"]).check()


def test_the_generated_data_sets_hold_no_unknown_key(processor, root):
    clips = synthetic_clips.make_clips(12)
    for entry in synthetic_clips.entries_of(clips):
        entry = {**entry, "video": "a.mp4"}
        assert LlavaVideoDataset([entry], processor, video_root=root).messages(0)


def test_a_system_prompt_of_an_entry_is_that_of_the_conversation(processor, root):
    turn = {"from": "system", "value": "Be brief."}
    data = [
        {"video": "a.mp4", "conversations": [turn, *ASKED]},
        {"video": "a.mp4", "conversations": ASKED, "system": "Be brief."},
    ]
    one, other = LlavaVideoDataset(data, processor, video_root=root)
    assert torch.equal(one["input_ids"], other["input_ids"]) and torch.equal(one["labels"], other["labels"])
    assert "system\nBe brief.<|im_end|>" in processor.tokenizer.decode(other["input_ids"])


# ------------------------------------------------------------------------------------------- control tokens in texts


def spelled(processor, text: str) -> list[int]:
    """The tokens of a text without a control token."""
    return processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("quoted", ["<video>", "<image>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"])
@pytest.mark.parametrize("form", ["conversations", "messages"])
def test_a_control_token_in_an_answer_is_text(quoted, form, processor, root):
    answer = f"The tag {quoted}, twice: {quoted}."
    if form == "conversations":
        entry = {"video": "a.mp4", "conversations": [ASKED[0], {"from": "gpt", "value": answer}]}
    else:
        parts = [{"type": "video", "path": "a.mp4"}, {"type": "text", "text": f"What is {quoted}?"}]
        spoken = [{"type": "text", "text": answer}]
        entry = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": spoken}]}
    data = LlavaVideoDataset([entry], processor, video_root=root)
    sample = data[0]
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sample["labels"][sample["labels"] != -100].tolist() == [*spelled(processor, answer), end]
    layout = processor.frame_token_layout
    assert (sample["input_ids"] == processor.video_token_id).sum() == layout.num_tokens(4)
    assert (sample["input_ids"] == processor.image_token_id).sum() == 0
    assert (sample["input_ids"] == end).sum() == 3  # of system, user and assistant
    assert data.lengths() == [len(sample["input_ids"])]
    assert len(processor.tokenizer) == len(tiny_processor(tiny_model().config).tokenizer)  # it is as it was
    # What stands before and after the word is what it would be beside another one.
    text = json.dumps(entry).replace(f"The tag {quoted}", "The tag #").replace(f"twice: {quoted}", "twice: #")
    text = text.replace(f"What is {quoted}", "What is #")
    other = LlavaVideoDataset([json.loads(text)], processor, video_root=root)[0]
    gained = (3 if form == "messages" else 2) * (len(spelled(processor, quoted)) - 1)
    assert len(sample["input_ids"]) == len(other["input_ids"]) + gained


def test_special_tokens_of_the_users_own_are_trained_on_as_tokens(root):
    own = tiny_processor(tiny_model().config, num_frames=4)
    own.tokenizer.add_tokens(["<t1>"], special_tokens=True)
    sample = LlavaVideoDataset(
        [{"video": "a.mp4", "conversations": [ASKED[0], {"from": "gpt", "value": "At <t1>."}]}], own, video_root=root
    )[0]
    assert (sample["labels"] == own.tokenizer.convert_tokens_to_ids("<t1>")).sum() == 1


# ------------------------------------------------------------------------------------------------- whose fault it is


@pytest.mark.parametrize(
    "error", [AttributeError, NameError, TypeError, KeyError, IndexError, AssertionError, NotImplementedError], ids=str
)
def test_a_mistake_of_the_program_is_not_a_bad_sample(error, processor, root, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise error("a mistake")

    ledger = BadSampleLedger(tmp_path / "bad.jsonl", max_samples=9)
    data = LlavaVideoDataset(
        [{"video": "a.mp4", "conversations": ASKED}], processor, video_root=root, bad_samples=ledger
    )
    for place in ("entry_to_messages", "_open_media"):
        with monkeypatch.context() as patch:
            patch.setattr(samples, place, broken)
            with pytest.raises(error, match="a mistake") as caught:
                data[0]
            assert not isinstance(caught.value, BadSampleError)
    assert not ledger.path.exists()


def test_whatever_a_decoder_raises_is_a_bad_sample(processor, root, monkeypatch):
    # As numpy does for an array that cannot be converted: from its own code, called by ours.
    broken = lambda *args, **kwargs: np.lib.format.header_data_from_array_1_0(None)  # noqa: E731
    with pytest.raises(AttributeError):
        broken()
    monkeypatch.setattr(video_inputs, "load_video", broken)
    with pytest.raises(BadSampleError, match="AttributeError|no attribute"):
        LlavaVideoDataset([{"video": "a.mp4", "conversations": ASKED}], processor, video_root=root)[0]


# --------------------------------------------------------------------------------------------------- nothing to answer


def test_data_without_any_answer_is_found_without_decoding(processor, root, tmp_path, monkeypatch):
    monkeypatch.setattr(video_inputs, "load_video", lambda *args, **kwargs: pytest.fail("it decodes"))
    for name, data, expected in (
        ("none", [{"video": "a.mp4"}] * 3, False),
        ("some", [{"video": "a.mp4"}] * 3 + [{"video": "a.mp4", "conversations": ASKED}], True),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        for streaming in (False, True):
            loaded = load_training_data(str(path), processor, streaming=streaming, video_root=root)
            assert any_answers(choose_samples(loaded, 9, seed=0)) is expected
    assert (
        read_questions(LlavaVideoDataset(data, processor, video_root=root), max_bad_samples=9)[3].answer == "A square."
    )
