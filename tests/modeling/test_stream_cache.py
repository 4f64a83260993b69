"""Streams in a fixed number of tokens: kept frames, positions of their keys, memory, and questions at the end."""

import copy

import pytest
import torch
from test_streaming import TYPES, inputs_of, live_bytes, moving_model, prompt_of
from tiny import GRID, LAYOUTS, ONEVISION, PAD_TOKEN, VIDEO_TOKEN, tiny_model
from transformers import DynamicCache

from llava_next_ar.configuration.transformers_compat import CACHE_ARGUMENT
from llava_next_ar.modeling.frame_stream import FrameStream
from llava_next_ar.modeling.stream_cache import StreamCache

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD_TOKEN}
# In one layer, keys and values hold nothing of other tokens: a bounded stream then equals a video of the kept frames.
ONE_LAYER = {**ONEVISION["text_config"], "num_hidden_layers": 1}


def text_config(**keys) -> dict:
    return {"text_config": {**ONEVISION["text_config"], **keys}}


def tokens_of_frame(model) -> int:
    return model.config.frame_token_layout.tokens_per_frame()


def video_of(inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs["pixel_values_videos"][0], inputs["video_timestamps"][0]


def part_of(model, inputs, frames: list[int]) -> dict:
    """The inputs of the same prompt with some frames of its only video."""
    ids, types = inputs["input_ids"], None
    if "video_frame_types" in inputs:
        types = inputs["video_frame_types"][:, frames]
    num_tokens = model.config.frame_token_layout.num_tokens(len(frames), None if types is None else types[0].tolist())
    is_video = ids[0] == VIDEO_TOKEN
    begin, end = int(is_video.nonzero()[0]), int(is_video.nonzero()[-1]) + 1
    ids = torch.cat([ids[:, :begin], ids.new_full((1, num_tokens), VIDEO_TOKEN), ids[:, end:]], dim=1)
    part = {name: inputs[name][:, frames] for name in inputs if name not in ("input_ids", "attention_mask")}
    return {**part, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def question_of(inputs) -> torch.Tensor:
    ids = inputs["input_ids"][0]
    return ids[int((ids == VIDEO_TOKEN).nonzero()[-1]) + 1 :]


# ---- kept frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["recent", "surprise"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cache_that_is_never_full_changes_no_bit(layout, keep):
    model = moving_model(**LAYOUTS[layout])
    inputs = inputs_of(model)
    pixels, times = video_of(inputs)
    unbounded, bounded = (
        model.surprise_stream(prompt_of(inputs), **options) for options in ({}, {"max_tokens": 1000, "keep": keep})
    )
    for number in range(len(pixels)):
        frame, time = pixels[number, None], times[number, None]
        assert torch.equal(bounded.read(frame, time).frames, unbounded.read(frame, time).frames)
    assert bounded.kept_frames == unbounded.kept_frames == list(range(9))


@pytest.mark.parametrize("sizes", [(1,) * 30, (7, 1, 22), (30,)], ids=["one by one", "in pieces", "together"])
def test_frames_read_together_are_evicted_as_one_by_one(sizes):
    model = moving_model()
    inputs = inputs_of(model, (30,))
    pixels, times = video_of(inputs)
    reference = model.surprise_stream(max_tokens=6 * tokens_of_frame(model), keep="surprise")
    expected: list[float] = []
    for number in range(30):
        expected += reference.read(pixels[number, None], times[number, None]).frames.tolist()
    stream, found = model.surprise_stream(max_tokens=6 * tokens_of_frame(model), keep="surprise"), []
    for piece, time in zip(pixels.split(sizes), times.split(sizes), strict=True):
        found += stream.read(piece, time).frames.tolist()
    assert found == pytest.approx(expected, abs=1e-6) and stream.kept_frames == reference.kept_frames


@pytest.mark.parametrize("num_first", [0, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_recent_and_the_first_frames_are_kept(layout, num_first):
    model = moving_model(**LAYOUTS[layout])
    inputs = inputs_of(model, (25,))
    pixels, times = video_of(inputs)
    prompt, slow = prompt_of(inputs), tokens_of_frame(model)
    max_tokens = len(prompt) + 6 * slow + slow // 2
    stream = model.surprise_stream(prompt, max_tokens=max_tokens, num_first_frames=num_first)
    types = model.config.frame_token_layout.frame_types(25)
    sizes = [model.config.frame_token_layout.tokens_per_frame(frame_type) for frame_type in types]
    for number in range(25):
        stream.read(pixels[number, None], times[number, None])
        first = list(range(min(num_first, number + 1)))
        expected = [*first, *range(len(first), number + 1)]
        while sum(sizes[frame] for frame in expected) > 6 * slow + slow // 2:
            expected.pop(len(first))
        # A smaller frame, read after a larger one left, finds room; it brings no evicted frame back.
        assert set(stream.kept_frames) <= set(expected) and stream.kept_frames[-1] == number
        assert stream.kept_frames[: len(first)] == first
        if layout != "slow_fast":
            assert stream.kept_frames == expected
        assert stream._cache.get_seq_length() == len(prompt) + sum(sizes[f] for f in stream.kept_frames)
        assert stream._cache.get_seq_length() <= max_tokens


@pytest.mark.parametrize("num_recent", [1, 3])
def test_the_most_surprising_frames_are_kept(num_recent):
    model = moving_model()
    inputs = inputs_of(model, (40,))
    pixels, times = video_of(inputs)
    prompt, size = prompt_of(inputs), tokens_of_frame(model)
    stream = model.surprise_stream(
        prompt, max_tokens=len(prompt) + 7 * size, keep="surprise", num_recent_frames=num_recent
    )
    scores, kept, ranked_out = {0: 0.0}, [], 0
    for number in range(40):
        if len(kept) == 7:
            candidates = [frame for frame in kept if frame and frame <= number - num_recent]
            kept.remove(min(candidates, key=scores.__getitem__))
            ranked_out += kept[1] != min(candidates)
        kept.append(number)
        surprise = stream.read(pixels[number, None], times[number, None])
        scores[number] = float(surprise.frames[0]) if number else 0.0
        assert stream.kept_frames == kept
    assert kept[0] == 0 and kept[-num_recent:] == list(range(40 - num_recent, 40))
    assert kept[1:-num_recent] != list(range(34, 40 - num_recent)), "not the recent ones"


def test_the_smallest_budget_holds_the_prompt_and_one_frame():
    model = moving_model()
    inputs = inputs_of(model)
    pixels, times = video_of(inputs)
    least = len(prompt_of(inputs)) + tokens_of_frame(model)
    stream = model.surprise_stream(prompt_of(inputs), max_tokens=least, num_first_frames=3)
    for number in range(9):
        stream.read(pixels[number, None], times[number, None])
        assert stream.kept_frames == [number]
    with pytest.raises(
        ValueError, match=f"max_tokens={least - 1} is less than the 5 tokens of the prompt and the 9 of one"
    ):
        model.surprise_stream(prompt_of(inputs), max_tokens=least - 1)
    assert model.surprise_stream(max_tokens=9).read(pixels, times).frames.shape == (8,)
    with pytest.raises(
        ValueError, match="max_tokens=8 is less than the 0 tokens of the prompt and the 9 of one frame"
    ):
        model.surprise_stream(max_tokens=8)


# ---- positions -----------------------------------------------------------------------------------------------------


ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        **{"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}


@pytest.mark.parametrize("keep", ["recent", "surprise"])
@pytest.mark.parametrize(
    ("layout", "types", "rope"),
    [*((layout, None, "default") for layout in LAYOUTS), ("slow_fast", TYPES, "default")]
    + [("one_token", None, rope) for rope in list(ROPES)[1:]],
)
def test_a_bounded_stream_equals_a_video_of_the_kept_frames(layout, types, rope, keep):
    """Exact where keys hold nothing of other tokens: one layer, and a head that sees the last frame alone."""
    text = {**ONE_LAYER, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", **ROPES[rope]}}
    model = moving_model({"num_hist": 1}, **LAYOUTS[layout], text_config=text)
    num_frames = len(types or range(14))
    inputs = inputs_of(model, (num_frames,), types=types)
    if types is None and layout == "slow_fast":
        types = [int(kind) for kind in model.config.frame_token_layout.frame_types(num_frames)]
        inputs = inputs_of(model, (num_frames,), types=types)
    pixels, times = video_of(inputs)
    max_tokens = len(prompt_of(inputs)) + 4 * tokens_of_frame(model)
    stream = model.surprise_stream(prompt_of(inputs), max_tokens=max_tokens, keep=keep, num_recent_frames=2)
    num_evicted = 0
    for number in range(num_frames):
        before = stream.kept_frames
        own_type = None if types is None else [types[number]]
        frames = stream.read(pixels[number, None], times[number, None], own_type).frames.tolist()
        if number:
            (expected,) = model.surprise(**part_of(model, inputs, [*before, number]))
            assert frames == pytest.approx(expected.frames[-1:].tolist(), rel=2e-5, abs=2e-5)
        num_evicted += len(before) + 1 - len(stream.kept_frames)
    assert num_evicted >= 3
    whole = part_of(model, inputs, stream.kept_frames)
    expected = model.generate(**whole, **GREEDY, output_logits=True, return_dict_in_generate=True)
    answer = model.generate(
        **stream.generate_inputs(question_of(inputs)), **GREEDY, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(answer.sequences[:, -5:], expected.sequences[:, -5:])
    torch.testing.assert_close(torch.stack(answer.logits), torch.stack(expected.logits), rtol=2e-5, atol=2e-5)


def first_keys_error(stream: FrameStream, model, features: list[torch.Tensor]) -> float:
    """Largest difference of the first layer's keys from those of a cache into which the kept frames were read anew."""
    anew = DynamicCache(config=model.config.get_text_config())
    newline, layout = model.model.image_newline, model.config.frame_token_layout
    projected = model.model.multi_modal_projector(torch.stack([features[frame] for frame in stream.kept_frames]))
    tokens = layout.assemble(projected, newline)
    with torch.no_grad():
        model.model.language_model(inputs_embeds=tokens[None], use_cache=True, **{CACHE_ARGUMENT: anew})
    kept = stream._cache.to_dynamic(model.config.get_text_config())
    assert kept.layers[0].keys.shape == anew.layers[0].keys.shape
    return float((kept.layers[0].keys - anew.layers[0].keys).abs().max())


def test_rounding_errors_of_rotations_do_not_add_up():
    """Each kept frame moved at up to 58 evictions, one frame at a time."""
    model = tiny_model(**LAYOUTS["frame"])
    generator, features, errors = torch.Generator().manual_seed(0), [], []
    stream = FrameStream(model, max_tokens=60 * tokens_of_frame(model))
    for number in range(180):
        encoded, teacher = stream.encode(torch.randn(1, 3, 35, 35, generator=generator))
        features.append(encoded[0])
        stream.read(encoded, teacher, [float(number)])
        if number in (61, 179):
            errors.append(first_keys_error(stream, model, features))
    assert max(errors) < 1e-5
    assert errors[1] < 4 * errors[0]


def test_keys_are_rotated_in_float32_for_half_precision():
    model = moving_model(**LAYOUTS["no_token"]).bfloat16()
    features, generator = [], torch.Generator().manual_seed(0)
    stream = FrameStream(model, max_tokens=20 * GRID**2)
    for number in range(60):
        encoded, teacher = stream.encode(torch.randn(1, 3, 35, 35, generator=generator))
        features.append(encoded[0])
        stream.read(encoded, teacher, [float(number)])
    keys = stream._cache.layers[0].keys
    assert keys.dtype == torch.bfloat16
    assert first_keys_error(stream, model, features) <= 3 * 2**-8 * float(keys.abs().max())


# ---- memory --------------------------------------------------------------------------------------------------------


def entries_over_frames(model, num_frames: int, every: int, **options) -> list[tuple[int, int]]:
    """Cached tokens and bytes of all live tensors, after each `every` frames of a video without end."""
    stream, generator, sizes = model.surprise_stream(**options), torch.Generator().manual_seed(0), []
    for first in range(0, num_frames, 10):  # the tower reads ten at once
        pixels = torch.randn(10, 3, 35, 35, generator=generator)
        stream.read(pixels, torch.arange(first, first + 10) * 10**8)
        if (first + 10) % every == 0:
            lengths = {int(layer.keys.shape[2]) for layer in stream._cache.layers}
            (length,) = lengths
            sizes.append((length, live_bytes()))
    return sizes


@pytest.mark.parametrize("keep", ["recent", "surprise"])
def test_memory_is_flat(keep):
    model = moving_model()
    sizes = entries_over_frames(model, 80, 40, max_tokens=8 * tokens_of_frame(model), keep=keep)
    assert len(set(sizes)) == 1 and sizes[0][0] == 8 * tokens_of_frame(model)


@pytest.mark.parametrize("keep", ["recent", "surprise"])
def test_the_head_drops_evicted_slow_frames(keep):
    """Slow frames stay visible to it; in a video without end they would add up."""
    model = moving_model({"use_fast_slow_frames": True}, **LAYOUTS["slow_fast"])
    stream, generator = model.surprise_stream(max_tokens=60, keep=keep), torch.Generator().manual_seed(0)
    for frame in range(40):
        stream.read(torch.randn(1, 3, 35, 35, generator=generator), [float(frame)])
        assert set(stream._memory._frames) <= {*stream.kept_frames, frame - 2, frame - 1, frame}
        assert all(len(inputs) == len(stream._memory._frames) for inputs in stream._memory._inputs)
        assert stream._cache.get_seq_length() <= 60
    assert {0, 36} <= set(stream._memory._frames)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["recent", "surprise"])
def test_memory_over_twenty_thousand_frames(keep):
    model = moving_model()
    sizes = entries_over_frames(model, 20_000, 1000, max_tokens=16 * tokens_of_frame(model), keep=keep)
    print("tokens and bytes after each 1,000 frames:", sizes)
    assert len(set(sizes)) == 1 and sizes[0][0] == 16 * tokens_of_frame(model)


# ---- a question at the end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_tokens": 1000}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_question_after_the_stream_is_answered_as_after_the_whole_video(layout, options):
    model = moving_model(**LAYOUTS[layout])
    inputs = inputs_of(model)
    pixels, times = video_of(inputs)
    expected = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    stream = model.surprise_stream(prompt_of(inputs), **options)
    stream.read(pixels[:6], times[:6])
    stream.generate_inputs(question_of(inputs))  # leaves the stream as it is
    stream.read(pixels[6:], times[6:])
    question = question_of(inputs)
    for ids in (question, question[None]):
        asked = stream.generate_inputs(ids)
        answer = model.generate(**asked, **GREEDY, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(answer.sequences[0, : len(question)], question)
        assert torch.equal(answer.sequences[:, len(question) :], expected.sequences[:, -5:])
        torch.testing.assert_close(torch.stack(answer.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5)


def test_a_question_after_evictions_leaves_the_stream_unchanged():
    model = moving_model()
    inputs = inputs_of(model, (30,))
    pixels, times = video_of(inputs)
    streams = [model.surprise_stream(prompt_of(inputs), max_tokens=60, keep="surprise") for _ in range(2)]
    for stream in streams:
        stream.read(pixels[:20], times[:20])
    asked = streams[0].generate_inputs(question_of(inputs))
    answers = [model.generate(**copy.deepcopy(asked), **GREEDY).tolist() for _ in range(2)]
    answers.append(model.generate(**streams[0].generate_inputs(question_of(inputs)), **GREEDY).tolist())
    assert answers[0] == answers[1] == answers[2]
    first, second = (stream.read(pixels[20:], times[20:]).frames for stream in streams)
    assert torch.equal(first, second)
    twin = copy.deepcopy(streams[0])
    assert twin.kept_frames == streams[1].kept_frames


def test_a_question_that_cannot_be_is_an_error():
    model = moving_model()
    inputs = inputs_of(model)
    pixels, times = video_of(inputs)
    stream = model.surprise_stream(prompt_of(inputs))
    with pytest.raises(ValueError, match="needs text and frames, got 2 tokens and 0 frames"):
        stream.generate_inputs(torch.tensor([5, 6]))
    stream.read(pixels, times)
    with pytest.raises(ValueError, match="needs text and frames, got 0 tokens and 9 frames"):
        stream.generate_inputs(torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="input_ids holds video tokens"):
        stream.generate_inputs(inputs["input_ids"])


# ---- errors --------------------------------------------------------------------------------------------------------

REJECTED = {
    "max_tokens must be an integer of at least 1, got 0": {"max_tokens": 0},
    "max_tokens must be an integer of at least 1, got 64.0": {"max_tokens": 64.0},
    "max_tokens must be an integer of at least 1, got True": {"max_tokens": True},
    "keep must be one of recent, surprise, got 'oldest'": {"max_tokens": 64, "keep": "oldest"},
    "num_first_frames must be an integer of at least 0, got -1": {"max_tokens": 64, "num_first_frames": -1},
    "num_recent_frames must be an integer of at least 1, got 0": {"max_tokens": 64, "num_recent_frames": 0},
    "'keep': 'surprise'.* choose frames to keep, which needs max_tokens": {"keep": "surprise"},
    "'num_first_frames': 2.* choose frames to keep, which needs max_tokens": {"num_first_frames": 2},
}


@pytest.mark.parametrize("message", REJECTED)
def test_options_that_cannot_be_are_errors(message):
    with pytest.raises(ValueError, match=message):
        moving_model().surprise_stream(**REJECTED[message])
    with pytest.raises(TypeError, match="unknown"):
        moving_model().surprise_stream(max_tokens=64, unknown=1)


MODELS = {
    "full attention in each layer, but the caches of qwen2 are DynamicLayer, DynamicSlidingWindowLayer": text_config(
        use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    r"keys of qwen2 \(rope_type 'dynamic'\) cannot be moved to other positions within max_tokens=64": text_config(
        rope_parameters={"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=32
    ),
    r"keys of cohere \(rope_type 'default'\) cannot be moved": text_config(model_type="cohere"),
    "a language model with one rotary embedding, and gpt2 has none": {
        "text_config": {
            **{"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 512},
            **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD_TOKEN, "tie_word_embeddings": False},
        }
    },
}


@pytest.mark.parametrize("message", MODELS)
def test_language_models_whose_keys_cannot_be_moved_are_errors(message):
    with pytest.raises(ValueError, match=message):
        moving_model(**MODELS[message]).surprise_stream(max_tokens=64)
    assert moving_model(**MODELS[message]).surprise_stream().num_frames == 0


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "qwen3", "stablelm"])
def test_other_families_with_rotary_positions_are_bounded(family):
    """Partial rotary embeddings too: the other features of a key hold no position."""
    partial = {"partial_rotary_factor": 0.5} if family in ("phi3", "stablelm") else {}
    keys = {**ONE_LAYER, "model_type": family, "sliding_window": None, "head_dim": 8}
    if partial:
        keys["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, **partial}
    model = moving_model({"num_hist": 1}, text_config=keys)
    inputs = inputs_of(model, (12,))
    pixels, times = video_of(inputs)
    stream = model.surprise_stream(prompt_of(inputs), max_tokens=len(prompt_of(inputs)) + 36)
    for number in range(12):
        before = stream.kept_frames
        frames = stream.read(pixels[number, None], times[number, None]).frames.tolist()
        if number:
            (expected,) = model.surprise(**part_of(model, inputs, [*before, number]))
            assert frames == pytest.approx(expected.frames[-1:].tolist(), rel=2e-5, abs=2e-5)
    assert stream.kept_frames == [0, 9, 10, 11]
    assert isinstance(stream._cache, StreamCache)
