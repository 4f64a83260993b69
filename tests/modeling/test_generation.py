"""Features that the flags of the model announce, on videos of unequal length: attention back ends, devices, decoding.

Equality with OneVision, of a batch with its samples and of cached with uncached decoding are in test_modeling.py; here
each feature is compared with plain greedy decoding of the same batch.
"""

import copy
from unittest import mock

import pytest
import torch
from release_marks import since_transformers
from tiny import LAYOUTS, ONEVISION, PAD_TOKEN, tiny_model, tiny_onevision, train_briefly, video_batch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig, PreTrainedModel, masking_utils
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flex_attention as flex_integration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava_next_ar.configuration import transformers_compat
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration, LlavaNextARModel

LENGTHS = [[4], [2, 3], [1]]
# Kernels for GPUs want heads of at least 16.
WIDE = {
    "text_config": {**ONEVISION["text_config"], "hidden_size": 64},
    "vision_config": {**ONEVISION["vision_config"], "hidden_size": 32},
}
two_layouts = pytest.mark.parametrize("layout", ["one_token", "slow_fast"])

# Every flag that is set, and what shows it.
SHOWN = {
    "_supports_sdpa": "test_attention_back_ends_agree",
    "_supports_flash_attn": "test_attention_back_ends_agree",
    "_supports_flex_attn": "test_attention_back_ends_agree",
    "_supports_attention_backend": "test_attention_back_ends_agree",
    "supports_gradient_checkpointing": "test_modeling.py: test_gradient_checkpointing_changes_nothing",
}


def prompts(model, lengths=LENGTHS, **keys) -> dict:
    batch = video_batch(model.config, lengths, padding_side="left", **keys)
    return {name: value for name, value in batch.items() if name != "labels"}


def generate(model, inputs: dict, **settings):
    """Greedy, six tokens, with the logits behind each."""
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD_TOKEN, **settings}
    out = model.generate(**copy.deepcopy(inputs), **settings, return_dict_in_generate=True, output_logits=True)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    return new, torch.stack(out.logits, dim=1)


def assert_same(actual, expected, atol: float = 1e-5) -> None:
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=atol)


def test_every_flag_that_is_set_is_shown():
    for model_class in (LlavaNextARForConditionalGeneration, LlavaNextARModel):
        names = [name for name in dir(model_class) if "supports_" in name or name.startswith("_can_compile")]
        claimed = {name for name in names if getattr(model_class, name) is True}
        assert claimed == set(SHOWN)
    assert {name for name in SHOWN.values() if ":" not in name} <= set(globals())


# ---- attention ---------------------------------------------------------------------------------------------------------


def reference_flash(q, k, v, softmax_scale=None, causal=False):
    """`flash_attn_func` in plain torch: `[B, S, heads, d]`, fewer heads of keys than of queries, aligned at the end."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = causal_lower_right(q.shape[2], k.shape[2]) if causal else None
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)
    return out.transpose(1, 2)


def reference_flash_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
):
    """`flash_attn_varlen_func` in plain torch: sequences one behind the other, `[tokens, heads, d]`."""
    spans_q, spans_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = [
        reference_flash(q[None, a:b], k[None, c:d], v[None, c:d], softmax_scale, causal)[0]
        for a, b, c, d in zip(spans_q, spans_q[1:], spans_k, spans_k[1:], strict=False)
    ]
    return torch.cat(out)


def use_kernels_in_torch(monkeypatch, back_end: str) -> list[mock.Mock]:
    """transformers' whole path to a back end, but with its kernels in plain torch. Returns them."""
    if back_end == "flash_attention_2":  # has kernels for GPUs alone
        flash, varlen = (mock.create_autospec(f, side_effect=f) for f in (reference_flash, reference_flash_varlen))
        kernels = (flash, varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
        monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: kernels)
        monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
        monkeypatch.setattr(PreTrainedModel, "_flash_attn_import_error", lambda *args, **kwargs: None)
        matrix = flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX
        monkeypatch.setitem(matrix, 2, {**matrix[2], "supported_devices": ((lambda: True, "cuda"),)})
        return [flash, varlen]
    if back_end == "flex_attention":  # is compiled; for CPUs not in every version of torch, and without gradients
        flex = mock.create_autospec(flex_attention, side_effect=flex_attention)
        monkeypatch.setattr(
            flex_integration, "compile_friendly_flex_attention", lambda *a, training, **k: flex(*a, **k)
        )
        monkeypatch.setattr(masking_utils, "create_block_mask", lambda *a, _compile, **k: create_block_mask(*a, **k))
        return [flex]
    if back_end == "own":
        own = mock.create_autospec(sdpa_attention_forward, side_effect=sdpa_attention_forward)
        AttentionInterface.register("own", own)
        AttentionMaskInterface.register("own", masking_utils.sdpa_mask)
        return [own]
    return []


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@two_layouts
@pytest.mark.parametrize("back_end", ["eager", "flash_attention_2", "flex_attention", "own"])
def test_attention_back_ends_agree(monkeypatch, back_end, layout):
    """With SDPA, on a left-padded batch: generation, both losses and their gradients (which torch's flex attention has on
    a GPU alone)."""
    model = tiny_model(freeze_tower=False, **LAYOUTS[layout])
    inputs = video_batch(model.config, LENGTHS, padding_side="left")
    train_briefly(model, inputs, steps=2)
    trains = back_end != "flex_attention"
    expected, expected_loss, expected_grads = measured(model, inputs, trains)
    kernels = use_kernels_in_torch(monkeypatch, back_end)
    model.set_attn_implementation(back_end)
    parts = [model.config, model.config.text_config, model.config.vision_config]
    assert [part._attn_implementation for part in parts] == [back_end] * 3
    actual, loss, grads = measured(model, inputs, trains)
    assert all(kernel.called for kernel in kernels)
    assert_same(actual, expected)
    assert not torch.equal(actual[1], expected[1]) or back_end == "own", "other kernels round otherwise"
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def measured(model, inputs: dict, trains: bool):
    generated = generate(model, {name: value for name, value in inputs.items() if name != "labels"})
    model.zero_grad()
    with torch.set_grad_enabled(trains):
        loss = model(**inputs).loss
    if trains:
        loss.backward()
    return generated, loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_attention_can_be_switched_for_each_part_and_back(tmp_path):
    model = tiny_model()
    inputs = prompts(model)
    expected = generate(model, inputs)
    mixed = {"text_config": "eager", "vision_config": "sdpa"}
    model.set_attn_implementation(mixed)
    used = (model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation)
    assert used == ("eager", "sdpa")
    eager = generate(model, inputs)
    assert_same(eager, expected)
    assert not torch.equal(eager[1], expected[1]), "another implementation rounds otherwise, if it was used"
    model.set_attn_implementation("sdpa")
    assert torch.equal(generate(model, inputs)[1], expected[1])

    model.save_pretrained(tmp_path)
    loaded = LlavaNextARForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=mixed)
    assert torch.equal(generate(loaded, inputs)[1], eager[1])


@pytest.mark.gpu
@two_layouts
@pytest.mark.parametrize("back_end", ["sdpa", "eager", "flex_attention", "flash_attention_2"])
def test_attention_back_ends_agree_on_a_gpu(back_end, layout):
    if back_end == "flash_attention_2":
        pytest.importorskip("flash_attn")
    model = tiny_model(**WIDE, **LAYOUTS[layout])
    inputs = prompts(model)
    _, expected = generate(model.float(), inputs)
    model.to("cuda", torch.bfloat16).set_attn_implementation(back_end)
    moved = {name: value.cuda() for name, value in inputs.items()}
    moved["pixel_values_videos"] = moved["pixel_values_videos"].bfloat16()
    with torch.no_grad():
        logits = model(**moved, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(logits.float().cpu(), expected[:, 0], rtol=0.05, atol=0.05)


# ---- devices -----------------------------------------------------------------------------------------------------------


@two_layouts
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(tmp_path, device_map, layout):
    pytest.importorskip("accelerate")
    model = tiny_model(**LAYOUTS[layout])
    inputs = prompts(model)
    model.save_pretrained(tmp_path)
    loaded = LlavaNextARForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
    inputs = {name: value.to(loaded.device) for name, value in inputs.items()}
    new, logits = generate(loaded, inputs)
    assert_same((new.cpu(), logits.cpu()), generate(model, {name: value.cpu() for name, value in inputs.items()}))


@pytest.mark.filterwarnings("ignore:.*device_map keys do not match any submodules")  # parameters of the model itself
@two_layouts
def test_layers_on_disk(tmp_path, layout):
    """Every weight is loaded for its own module alone, so no module may reach into another."""
    pytest.importorskip("accelerate")
    model = tiny_model(**LAYOUTS[layout])
    inputs = video_batch(model.config, LENGTHS, padding_side="left")
    model.save_pretrained(tmp_path / "model")
    loaded = LlavaNextARForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        device_map={
            "model.vision_tower": "disk",
            "model.multi_modal_projector": "cpu",
            "model.language_model": "disk",
            "model.image_newline": "cpu",
            **({} if model.model.faster_token is None else {"model.faster_token": "cpu"}),
            "lm_head": "cpu",
            "autoregressive_module": "disk",
        },
        offload_folder=tmp_path / "offload",
    )
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    with torch.no_grad():
        expected, actual = model(**inputs), loaded(**inputs)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.loss, expected.loss)


@pytest.mark.gpu
def test_layers_on_gpu_and_cpu(tmp_path):
    pytest.importorskip("accelerate")
    model = tiny_model()
    inputs = prompts(model)
    expected = generate(model, inputs)
    model.save_pretrained(tmp_path)
    half = sum(parameter.numel() * 4 for parameter in model.parameters()) // 2
    loaded = LlavaNextARForConditionalGeneration.from_pretrained(
        tmp_path, device_map="auto", max_memory={0: half, "cpu": "1GiB"}
    )
    assert len(set(loaded.hf_device_map.values())) == 2
    new, logits = generate(loaded, {name: value.cuda() for name, value in inputs.items()})
    assert_same((new.cpu(), logits.cpu()), expected, atol=1e-3)


# ---- ways to generate --------------------------------------------------------------------------------------------------


@two_layouts
def test_a_static_cache_changes_nothing(layout):
    model = tiny_model(**LAYOUTS[layout])
    inputs = prompts(model)
    assert_same(generate(model, inputs, cache_implementation="static"), generate(model, inputs))


@since_transformers("5.23", "before, generate gave every chunk the features of the first, LLaVA-OneVision's too")
@two_layouts
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_a_prefill_in_chunks_changes_nothing(chunk, layout):
    """Chunks end within a video, and within a frame."""
    model = tiny_model(**LAYOUTS[layout])
    inputs = prompts(model)
    assert_same(generate(model, inputs, prefill_chunk_size=chunk), generate(model, inputs))


def test_a_prefill_in_chunks_is_refused_where_transformers_cannot_do_it(monkeypatch):
    monkeypatch.setattr(transformers_compat, "_CAN_PREFILL_IN_CHUNKS", False)
    model = tiny_model()
    with pytest.raises(ValueError, match=r"prefill_chunk_size=7 needs transformers>=5\.23"):
        generate(model, prompts(model), prefill_chunk_size=7)


@two_layouts
@pytest.mark.parametrize("assistant", ["same weights", "other weights", "prompt lookup"])
def test_assisted_decoding_changes_nothing(assistant, layout):
    model = tiny_model(**LAYOUTS[layout])
    inputs = prompts(model, [[2, 4]])
    expected = generate(model, inputs)
    if assistant == "prompt lookup":
        settings = {"prompt_lookup_num_tokens": 3}
    else:
        settings = {"assistant_model": tiny_model(seed=int(assistant == "other weights"), **LAYOUTS[layout])}
    assert_same(generate(model, inputs, **settings), expected)


@two_layouts
def test_beams_of_a_batch_are_those_of_its_samples(layout):
    """The three videos of the first two samples must be repeated sample by sample, not video by video."""
    model = tiny_model(**LAYOUTS[layout])
    inputs = prompts(model)
    settings = {
        "num_beams": 3,
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": PAD_TOKEN,
        "length_penalty": 0.0,
    }
    settings |= {"return_dict_in_generate": True, "output_scores": True, "num_return_sequences": 2}
    together = model.generate(**copy.deepcopy(inputs), **settings)
    first_video = 0
    for row, videos in enumerate(LENGTHS):
        real = inputs["attention_mask"][row].bool()
        single = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
        for name in inputs.keys() - single.keys():
            single[name] = inputs[name][first_video : first_video + len(videos)]
        first_video += len(videos)
        alone = model.generate(**single, **settings)
        best = slice(2 * row, 2 * row + 2)
        assert torch.equal(together.sequences[best, -5:], alone.sequences[:, -5:])
        torch.testing.assert_close(together.sequences_scores[best], alone.sequences_scores, rtol=1e-4, atol=1e-5)


@two_layouts
def test_a_second_turn_goes_on_from_the_cache(layout):
    model = tiny_model(**LAYOUTS[layout])
    inputs = prompts(model, [[2, 4]])
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD_TOKEN, "return_dict_in_generate": True}
    first = model.generate(**copy.deepcopy(inputs), **settings)
    question = torch.tensor([[5, 9, 11]])
    longer = torch.cat([first.sequences, question], dim=1)
    whole = {**inputs, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
    expected = model.generate(**copy.deepcopy(whole), **settings).sequences
    text_alone = {name: whole[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(
        model.generate(**text_alone, past_key_values=first.past_key_values, **settings).sequences, expected
    )


@two_layouts
def test_embeddings_instead_of_ids(layout):
    model = tiny_model(**LAYOUTS[layout])
    inputs = prompts(model)
    embeddings = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    del embeddings["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD_TOKEN}
    assert torch.equal(model.generate(**embeddings, **settings), generate(model, inputs)[0])


# ---- compilation -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@two_layouts
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_decoding_compiles_as_one_graph(backend, layout):
    """`generate` compiles every step but the first by itself, on a GPU with a static cache."""
    model = tiny_model(**LAYOUTS[layout])
    inputs = prompts(model)
    expected = generate(model, inputs)
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    actual = generate(model, inputs, cache_implementation="static", compile_config=config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    assert_same(actual, expected, atol=1e-4)


@pytest.mark.slow
def test_a_forward_with_video_compiles_as_far_as_onevisions():
    """With graph breaks only: as long as that is so for OneVision too, `_can_compile_fullgraph` is not claimed."""
    model, onevision = tiny_model(), tiny_onevision()
    inputs = prompts(model, [[3], [3]])
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values_videos")}
    for one, own_inputs in ((onevision, plain), (model, inputs)):
        with torch.no_grad():
            expected = one(**own_inputs).logits
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(one, backend="eager")(**own_inputs).logits, expected)
            torch._dynamo.reset()
            with pytest.raises(torch._dynamo.exc.Unsupported):
                torch.compile(one, backend="eager", fullgraph=True)(**own_inputs)
