"""Pixels as 8 bits on the way to the device, normalised by the model: the same numbers as normalised by the processor."""

import numpy as np
import pytest
import torch
from tiny import IMAGE_SIZE, LAYOUTS, tiny_model
from tiny_processor import tiny_processor

from llava_next_ar.processing.video_processing_llava_next_ar import LlavaNextARVideoProcessor
from llava_next_ar.training.collator import LlavaVideoCollator

NORMS = {
    "as saved": {},
    "by channel": {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "not normalised": {"do_normalize": False},
    "not rescaled": {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 50.0, 40.0]},
}


def clip(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, 40, 50, 3), dtype=np.uint8)


@pytest.mark.parametrize("norm", NORMS)
def test_the_model_normalises_as_the_processor_would(norm):
    model = tiny_model(**LAYOUTS["slow_fast"])
    options = {"sampling": "uniform", "num_frames": 4, "return_tensors": "pt", **NORMS[norm]}
    processor = tiny_processor(model.config, **NORMS[norm]).video_processor
    expected = processor([clip(6), clip(3, seed=1)], **options)
    actual = processor([clip(6), clip(3, seed=1)], **options, return_uint8=True)
    assert actual["pixel_values_videos"].dtype == torch.uint8 and "video_pixel_norm" not in expected
    assert actual["video_pixel_norm"].shape == (2, 2, 3) and actual["video_pixel_norm"].dtype == torch.int64
    with torch.no_grad():
        features = [model.get_video_features(**inputs) for inputs in (actual, expected)]
    torch.testing.assert_close(features[0].pixel_values, features[1].pixel_values, rtol=1e-6, atol=1e-6)
    if norm == "as saved":
        assert torch.equal(features[0].pixel_values, features[1].pixel_values)
        assert torch.equal(torch.cat(features[0].pooler_output), torch.cat(features[1].pooler_output))


def test_a_training_batch_of_8_bits_has_the_loss_of_floats():
    model = tiny_model().train()
    losses = []
    for return_uint8 in (False, True):
        processor = tiny_processor(model.config, num_frames=4, return_uint8=return_uint8)
        assert ("video_pixel_norm" in processor.video_processor.model_input_names) == return_uint8
        samples = []
        for seed, num_frames in enumerate((4, 3)):
            messages = [{"role": "user", "content": [{"type": "video", "video": clip(num_frames, seed)}]}]
            messages += [{"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
            inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
            ids = inputs.pop("input_ids")[0]
            inputs.pop("attention_mask")
            samples.append({"input_ids": ids, "labels": ids.clone(), **inputs})
        batch = LlavaVideoCollator(processor)(samples)
        assert (batch["pixel_values_videos"].dtype == torch.uint8) == return_uint8
        losses.append(model(**batch).loss)
    assert torch.equal(*losses)


def test_what_cannot_travel_as_8_bits_is_an_error():
    processor = LlavaNextARVideoProcessor(size=IMAGE_SIZE, return_uint8=True)
    with pytest.raises(ValueError, match="return_uint8=True needs videos of whole numbers from 0 to 255, got floats"):
        processor(clip(2) / 255.0 * 0.9, do_rescale=False)
    model = tiny_model()
    pixels = processor(clip(2), return_tensors="pt")["pixel_values_videos"]
    with pytest.raises(ValueError, match=r"torch.uint8, which needs the video_pixel_norm"):
        model.get_video_features(pixels)


def test_the_option_is_off_and_saved():
    assert LlavaNextARVideoProcessor().return_uint8 is False
    values = LlavaNextARVideoProcessor(return_uint8=True).to_dict()
    assert LlavaNextARVideoProcessor.from_dict(values).return_uint8 is True
