"""Conversations that go on from a cache, prompts without their media, prompts that are too long, and vLLM's base model."""

import copy
import logging
from unittest import mock

import pytest
import torch
from release_marks import since_transformers
from tiny import (
    IMAGE_SIZE,
    IMAGE_TOKEN,
    LAYOUTS,
    ONEVISION,
    PAD_TOKEN,
    VIDEO_TOKEN,
    tiny_config,
    tiny_model,
    video_batch,
)
from transformers import AttentionInterface, DynamicCache, LogitsProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging

from llava_next_ar.configuration.transformers_compat import CACHE_ARGUMENT
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration, LlavaNextARModel

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD_TOKEN}
two_layouts = pytest.mark.parametrize("layout", ["one_token", "slow_fast"])


def prompts(model, lengths, **keys) -> dict:
    batch = video_batch(model.config, lengths, padding_side="left", **keys)
    return {name: value for name, value in batch.items() if name != "labels"}


def generate(model, inputs: dict, **settings):
    """(new tokens, the logits behind each, how many frames the tower saw)."""
    with mock.patch.object(model.model.vision_tower, "forward", wraps=model.model.vision_tower.forward) as tower:
        out = model.generate(
            **copy.deepcopy(inputs), **{**GREEDY, **settings}, return_dict_in_generate=True, output_logits=True
        )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    return new, torch.stack(out.logits, dim=1), sum(len(call.args[0]) for call in tower.call_args_list)


def cache_of(model, inputs: dict, length: int) -> DynamicCache:
    """Cache of the first `length` positions of the prompts."""
    cache = DynamicCache(config=model.config.get_text_config())
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(**copy.deepcopy(inputs), position_ids=positions, past_key_values=cache)
    if length < cache.get_seq_length():
        cache.crop(length - cache.get_seq_length())
    return cache


def begin_of(model, inputs: dict, video: int) -> int:
    """Position of the first token of a video in the only prompt, counted from 0."""
    lengths = inputs["video_frame_mask"].sum(1).tolist()
    skipped = sum(model.config.frame_token_layout.num_tokens(length) for length in lengths[:video])
    return int((inputs["input_ids"][0] == VIDEO_TOKEN).nonzero()[skipped])


@two_layouts
@pytest.mark.parametrize("chunk", [None, pytest.param(7, marks=since_transformers("5.23", "chunks"))])
@pytest.mark.parametrize(
    ("cut", "frames"),
    [("all but one token", 0), ("before the second video", 3), ("in the first video", 7), ("in the second video", 3)],
)
def test_what_is_cached_is_not_encoded_again(layout, chunk, cut, frames):
    """Whole inputs beside the cache of their beginning, as in a second turn or with a cached prompt."""
    model = tiny_model(**LAYOUTS[layout])
    inputs = prompts(model, [[4, 3]])
    length = {
        "all but one token": inputs["input_ids"].shape[1] - 1,
        "before the second video": begin_of(model, inputs, 1),
        "in the first video": begin_of(model, inputs, 0) + 5,
        "in the second video": begin_of(model, inputs, 1) + 5,
    }[cut]
    expected_new, expected_logits, _ = generate(model, inputs)
    cache = cache_of(model, inputs, length)
    new, logits, seen = generate(model, inputs, past_key_values=cache, prefill_chunk_size=chunk)
    assert torch.equal(new, expected_new)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    assert seen == frames


@two_layouts
def test_videos_of_the_new_turn_alone_are_taken_as_such(layout):
    model = tiny_model(**LAYOUTS[layout])
    inputs = prompts(model, [[4, 3]])
    cache = cache_of(model, inputs, begin_of(model, inputs, 1))
    new_ones = {name: value[1:] if value.shape[0] == 2 else value for name, value in inputs.items()}
    new, logits, _ = generate(model, new_ones, past_key_values=cache)
    expected_new, expected_logits, _ = generate(model, inputs)
    assert torch.equal(new, expected_new)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)


def test_every_prompt_of_a_batch_has_its_own_cached_videos():
    """Left-padded rows, each with another video behind position 40."""
    model = tiny_model()
    inputs = prompts(model, [[2, 3], [4], [1, 1]])
    expected_new, expected_logits, _ = generate(model, inputs)
    new, logits, _ = generate(model, inputs, past_key_values=cache_of(model, inputs, 40))
    assert torch.equal(new, expected_new)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [8, 20, 60])
def test_images_are_skipped_too(length):
    """The prompt: an image, then a video; the cache ends before, in and behind the image."""
    model = tiny_model()
    pixels, sizes = torch.randn(1, 2, 3, IMAGE_SIZE, IMAGE_SIZE), torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]])
    image = {"pixel_values": pixels, "image_sizes": sizes, "batch_num_images": torch.tensor([1])}
    with torch.no_grad():
        (features,) = model.model.get_image_features(**image, return_dict=True).pooler_output
    inputs = prompts(model, [[3]])
    begin = torch.tensor([[5, *[6] * 9, *[IMAGE_TOKEN] * len(features), 7]])
    inputs["input_ids"] = torch.cat([begin, inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs |= image
    expected_new, expected_logits, all_seen = generate(model, inputs)
    new, logits, seen = generate(model, inputs, past_key_values=cache_of(model, inputs, length))
    assert torch.equal(new, expected_new)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    assert (seen, all_seen) == (3 if length > len(begin[0]) else 5, 5)


@two_layouts
def test_one_cached_video_serves_two_questions(layout):
    model = tiny_model(**LAYOUTS[layout])
    inputs = prompts(model, [[4]])
    ids, prefix = inputs["input_ids"], int((inputs["input_ids"][0] == VIDEO_TOKEN).nonzero()[-1]) + 1
    cache = cache_of(model, inputs, prefix)
    for question in ([5, 9, 11], [12, 13, 14, 15]):
        whole = torch.cat([ids[:, :prefix], torch.tensor([question])], dim=1)
        asked = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
        expected_new, expected_logits, _ = generate(model, asked)
        new, logits, seen = generate(model, asked, **{CACHE_ARGUMENT: copy.deepcopy(cache)})
        assert torch.equal(new, expected_new)
        assert seen == 0
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)


def test_a_cache_of_the_whole_prompt_is_refused():
    """transformers would read the prompt a second time, behind itself."""
    model = tiny_model()
    inputs = prompts(model, [[4]])
    length = inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match=rf"cache holds {length} tokens and the prompts {length}"):
        generate(model, inputs, past_key_values=cache_of(model, inputs, length))


# ---- prompts without their media ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ids", "input_ids", "no cache", "forward", "embeddings"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_placeholders_without_media_are_an_error(kind, way):
    """transformers#37943: apply_chat_template(tokenize=True) without return_dict gives ids alone."""
    model = tiny_model()
    token = {"image": IMAGE_TOKEN, "video": VIDEO_TOKEN}[kind]
    ids = torch.tensor([[5, token, token, token, 9]])
    with pytest.raises(ValueError, match=f"3 {kind} placeholders, but no {kind} was given.*return_dict=True"):
        if way == "forward":
            model(input_ids=ids)
        elif way == "ids":
            model.generate(ids, **GREEDY)
        elif way == "embeddings":
            model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY)
        else:
            model.generate(input_ids=ids, use_cache=way != "no cache", **GREEDY)


def test_a_new_video_without_pixels_is_an_error_beside_a_cache_too():
    model = tiny_model()
    inputs = prompts(model, [[4, 3]])
    begin = begin_of(model, inputs, 1)
    cache, ids = cache_of(model, inputs, begin), inputs["input_ids"]
    num_new = int((ids[:, begin:] == VIDEO_TOKEN).sum())
    with pytest.raises(ValueError, match=f"{num_new} video placeholders, but no video"):
        model.generate(ids, past_key_values=cache, **GREEDY)


def test_the_text_of_a_cached_conversation_alone_goes_on():
    """As ids of the whole conversation, and as the new ids alone beside a mask of all."""
    model = tiny_model()
    inputs = prompts(model, [[4]])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected, _, _ = generate(model, inputs)
    length = ids.shape[1] - 2
    whole = model.generate(ids, past_key_values=cache_of(model, inputs, length), **GREEDY)
    assert torch.equal(whole[:, -4:], expected)
    rest = {**inputs, "input_ids": ids[:, length:]}
    for new_inputs in ({"input_ids": ids[:, length:], "attention_mask": mask}, rest):
        new, _, seen = generate(model, new_inputs, past_key_values=cache_of(model, inputs, length))
        assert torch.equal(new, expected)
        assert seen == 0


def test_a_video_without_placeholders_is_an_error_beside_a_cache_too():
    model = tiny_model()
    inputs = prompts(model, [[4]])
    text = torch.tensor([[5, 6, 7, 8, 9]])
    whole = {**inputs, "input_ids": text, "attention_mask": torch.ones_like(text)}
    cache = cache_of(model, {"input_ids": text, "attention_mask": torch.ones_like(text)}, 3)
    with pytest.raises(ValueError, match="tokens: 0"):
        generate(model, whole, past_key_values=cache)


def test_a_placeholder_that_the_model_itself_writes_is_no_error():
    class Always(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([VIDEO_TOKEN]), 0.0)

    model = tiny_model()
    new, _, _ = generate(model, prompts(model, [[2]]), logits_processor=[Always()])
    assert new.tolist() == [[VIDEO_TOKEN] * 4]


# ---- prompts that are too long -----------------------------------------------------------------------------------------


@pytest.fixture
def warnings_of_transformers(caplog):
    transformers_logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield caplog
    transformers_logging.disable_propagation()


def too_long(log) -> list[str]:
    found = [record.getMessage() for record in log.records if "max_position_embeddings" in record.getMessage()]
    log.clear()
    return found


def test_a_prompt_beyond_the_positions_is_named_once_a_call(warnings_of_transformers):
    """Padding does not count; what was warned of in the first call is warned of in the next."""
    log = warnings_of_transformers
    lengths = {"text_config": {**ONEVISION["text_config"], "max_position_embeddings": 50}}
    model = tiny_model(**lengths)
    long, short = prompts(model, [[5]]), prompts(model, [[3]])
    real = long["input_ids"].shape[1]
    assert short["input_ids"].shape[1] + 4 <= 50 < real
    padded = {name: torch.nn.functional.pad(short[name], (20, 0)) for name in ("input_ids", "attention_mask")}
    for _ in range(2):
        for call in (model.generate, model.predict_next_frames, model.surprise):
            settings = GREEDY if call == model.generate else {}
            call(**copy.deepcopy(long), **settings)
            (message,) = too_long(log)
            assert f"{real} tokens" in message and "made for 50" in message
        model.generate(**{**short, **padded}, **GREEDY)
        assert not too_long(log)
    model.imagine(3, **short)
    assert len(too_long(log)) == 1
    model(**video_batch(model.config, [[5]]))
    assert not too_long(log), "training looks at its samples before it begins"


# ---- serving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["vllm", "vllm_mla"])
def test_vllm_gets_the_base_model_and_its_weights(attention):
    """vLLM takes what `AutoModel` makes of a configuration, puts an lm_head of its own on it, and loads the checkpoint."""
    AttentionInterface.register(attention, sdpa_attention_forward)
    trained, config = tiny_model(), tiny_config()
    assert type(LlavaNextARForConditionalGeneration._from_config(config)) is LlavaNextARForConditionalGeneration
    config._attn_implementation = attention
    assert type(LlavaNextARForConditionalGeneration._from_config(config)) is LlavaNextARModel
    weights = {name: value.clone() for name, value in trained.state_dict().items()}
    loaded, info = LlavaNextARModel.from_pretrained(
        None, config=tiny_config(), state_dict=weights, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == {"lm_head.weight"}, "vLLM's own head must find its weights"
    assert torch.equal(loaded.image_newline, trained.model.image_newline)


def test_transformers_serve_finds_the_type():
    """Before a model is imported, and as one with answers for images and videos, but not for sound."""
    names = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    assert "llava_next_ar" in names
    assert LlavaNextARForConditionalGeneration.__name__ not in names.values()
    assert LlavaNextARForConditionalGeneration.__name__ in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    )
