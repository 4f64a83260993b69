"""Models in 8 and 4 bits: the language model is quantized, the heads and the teacher are not, and all methods work."""

import copy

import pytest
import torch
from tiny import ONEVISION, PAD_TOKEN, tiny_model, train_briefly, video_batch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration

# Kernels for 4 bits take blocks of 64 weights.
SIZES = {
    "text_config": {**ONEVISION["text_config"], "hidden_size": 128, "intermediate_size": 256},
    "vision_config": {**ONEVISION["vision_config"], "hidden_size": 64, "intermediate_size": 128},
}
KINDS = ["8 bit", "4 bit", "8 bit, as values", "torchao"]


def quantization(kind: str, **options):
    if kind == "torchao":
        quantized = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        return TorchAoConfig(quantized.Int8WeightOnlyConfig(), **options)
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if "modules_to_not_convert" in options:
        options = {"llm_int8_skip_modules": options["modules_to_not_convert"]}
    if kind == "8 bit, as values":
        return {"quant_method": "bitsandbytes", "load_in_8bit": True, **options}
    return BitsAndBytesConfig(**{f"load_in_{kind[0]}bit": True}, **options)


@pytest.fixture(scope="module")
def trained():
    model = tiny_model(**SIZES)
    train_briefly(model, video_batch(model.config, [[4], [3]]))
    return model


def load(trained, config):
    weights = {name: value.clone() for name, value in trained.state_dict().items()}
    model = LlavaNextARForConditionalGeneration.from_pretrained(
        None, config=copy.deepcopy(trained.config), state_dict=weights, quantization_config=config
    )
    return model.eval()


def is_quantized(module: nn.Module) -> bool:
    return type(module.weight.data) is not torch.Tensor or not module.weight.is_floating_point()


def inputs_of(model) -> dict[str, torch.Tensor]:
    inputs = video_batch(model.config, [[4], [3]], padding_side="left")
    return {name: value for name, value in inputs.items() if name != "labels"}


@pytest.mark.filterwarnings("ignore")  # of the kernels
@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_alone_is_quantized_by_default(trained, kind):
    config = quantization(kind)
    before = copy.deepcopy(config if isinstance(config, dict) else config.to_dict())
    model = load(trained, config)
    assert (config if isinstance(config, dict) else config.to_dict()) == before, "the caller's stays as it was"
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name for name, module in linear.items() if is_quantized(module)}
    layers = {name for name in linear if name.startswith("model.language_model.layers.")}
    assert layers and layers <= quantized
    assert quantized - layers <= {name for name in linear if name.startswith("model.multi_modal_projector.")}
    inputs = inputs_of(model)
    expected = trained.predict_next_frames(**inputs)
    for one, other in zip(model.predict_next_frames(**inputs), expected, strict=True):
        assert all(map(torch.equal, one.targets, other.targets)), "the teacher is the same"
        assert one.metrics["mse"] == pytest.approx(other.metrics["mse"], rel=0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_predicts_works(trained, kind, everything):
    """With `everything`, the caller has the head and the tower quantized too, all but one layer of 96 inputs."""
    options = {"modules_to_not_convert": ["autoregressive_module.place_projection"]} if everything else {}
    model = load(trained, quantization(kind, **options))
    assert is_quantized(model.autoregressive_module.input_projection) is everything
    inputs = inputs_of(model)
    tolerance = 0.3 if kind == "4 bit" else 0.1
    for one, other in zip(model.predict_next_frames(**inputs), trained.predict_next_frames(**inputs), strict=True):
        assert one.metrics["mse"] == pytest.approx(other.metrics["mse"], rel=tolerance)
    for one, other in zip(model.surprise(**inputs), trained.surprise(**inputs), strict=True):
        torch.testing.assert_close(one.frames, other.frames, rtol=tolerance, atol=tolerance)
    for one, other in zip(model.imagine(2, **inputs), trained.imagine(2, **inputs), strict=True):
        assert one.grids == other.grids
        assert all(prediction.isfinite().all() for prediction in one.predictions)
    stream = model.surprise_stream()
    pixels, seconds = inputs["pixel_values_videos"][0], inputs["video_timestamps"][0]
    streamed = [stream.read(frame[None], second[None]) for frame, second in zip(pixels, seconds, strict=True)]
    assert [len(one.frames) for one in streamed] == [0, 1, 1, 1]
    new = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=PAD_TOKEN)
    assert new.shape == (2, inputs["input_ids"].shape[1] + 3)
