"""Whole tiny models of the original project: converted from its files, then compared at every stage with it."""

import json
from functools import cache

import pytest
import torch
from golden_data import FOLDER, MEDIA_PLACEHOLDER, golden_cases
from golden_models import expand_batch, watch

from llava_next_ar.conversion.checkpoint_conversion import convert_checkpoint
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration

MODELS = [path.parent.name for path in sorted(FOLDER.glob("*/manifest.json"))]
CASES = [case for model in MODELS for case in golden_cases(f"{model}/manifest")]
ATOL, LOGITS_ATOL = 1e-5, 5e-5


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Case -> (model, placeholder ids). Each way to read a checkpoint is converted once."""

    @cache
    def convert(folder, overrides):
        manifest = json.loads((folder / "manifest.json").read_text())
        cases = [case for case in CASES if case.folder == folder]
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        used = {
            token
            for case in cases
            for name in ("input_ids", "greedy_ids")
            if has(case, name)
            for token in read(case, name).flatten().tolist()
        }
        image_id, video_id = sorted(set(range(vocab_size)) - used)[:2]
        output = tmp_path_factory.mktemp("converted") / "model"
        convert_checkpoint(
            folder,
            output,
            vision_config=manifest["vision_config_full"],
            config_overrides=dict(overrides),
            autoregressive_config={"num_heads": 1, "num_layers": 1},
            image_token_id=image_id,
            video_token_id=video_id,
            progress=False,
        )
        model, report = LlavaNextARForConditionalGeneration.from_pretrained(
            output, dtype=torch.float32, output_loading_info=True
        )
        assert not report["unexpected_keys"] and not report["mismatched_keys"]
        assert all(name.startswith("autoregressive_module.") for name in report["missing_keys"])
        return model.eval(), watch(model.model), {"image": image_id, "video": video_id}

    def for_case(case):
        overrides = dict(case.get("config_override", {}))
        if case["path"] == "snapshot":
            overrides["mm_spatial_pool_stride"] = 2  # the published code always pools by 2
        return convert(case.folder, tuple(sorted(overrides.items())))

    return for_case


def read(case, name: str) -> torch.Tensor:
    tensor = case.tensor(f"{case.name}/{name}")
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def has(case, name: str) -> bool:
    try:
        case.tensor(f"{case.name}/{name}")
    except KeyError:
        return False
    return True


def media_of(case) -> list[tuple[str, torch.Tensor, tuple[int, int] | None]]:
    """(modality, views or frames, image size as (height, width)) of each medium of the case, in order."""
    sizes = case.get("image_sizes_wh") or [None] * len(case["media"])
    return [
        (modality, read(case, f"pixel_values_{index}"), None if size is None else (size[1], size[0]))
        for index, (modality, _, size) in enumerate(zip(case["modalities"], case["media"], sizes, strict=False))
    ]


def inputs_of(case, config, placeholder_ids) -> tuple[dict[str, torch.Tensor], list]:
    """Output of our processor for the case, and its media."""
    media = media_of(case)
    counts = []
    for modality, pixels, size in media:
        if modality == "video":
            counts.append(config.frame_token_layout.num_tokens(len(pixels)))
        else:
            layout = config.image_token_layout
            counts.append(layout.num_base_tokens if len(pixels) == 1 else layout.num_tokens(size))
    input_ids = read(case, "input_ids")
    remaining = iter(zip([placeholder_ids[modality] for modality, *_ in media], counts, strict=True))
    in_sample = [[next(remaining) for _ in range(int((row == MEDIA_PLACEHOLDER).sum()))] for row in input_ids]
    inputs = expand_batch(
        input_ids,
        read(case, "attention_mask") if has(case, "attention_mask") else None,
        read(case, "labels") if has(case, "labels") else None,
        [[token for token, _ in sample] for sample in in_sample],
        [[count for _, count in sample] for sample in in_sample],
    )
    if not has(case, "labels"):
        inputs.pop("labels")
    videos = [pixels for modality, pixels, _ in media if modality == "video"]
    images = [(pixels, size) for modality, pixels, size in media if modality == "image"]
    if videos:
        lengths = torch.tensor([len(video) for video in videos])
        inputs["pixel_values_videos"] = torch.nn.utils.rnn.pad_sequence(videos, batch_first=True)
        inputs["video_frame_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
    if images:
        inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence([pixels for pixels, _ in images], batch_first=True)
        inputs["image_sizes"] = torch.tensor([size for _, size in images])
        untiled = {len(pixels) == 1 for pixels, _ in images}
        assert len(untiled) == 1, "images with and without tiles in one case"
        if untiled == {True}:  # as one of several images of a prompt
            inputs["batch_num_images"] = torch.tensor([max(2, len(images))])
    return inputs, media


@pytest.mark.parametrize("case", CASES, ids=[f"{case.group}/{case.name}" for case in CASES])
@torch.no_grad()
def test_golden_model(case, converted):
    model, seen, placeholder_ids = converted(case)
    inputs, media = inputs_of(case, model.config, placeholder_ids)
    seen.projector.clear()
    output = model(**inputs, output_hidden_states=True, skip_reconstruction=True)
    passed = list(seen.projector)

    # videos pass the projector first, then images; each medium finds its own rows
    for modality in ("video", "image"):
        own = [index for index, medium in enumerate(media) if medium[0] == modality]
        if not own:
            continue
        vision, projected = passed.pop(0)
        lengths = [len(media[index][1]) for index in own]
        for name, values in (("vision_features", vision), ("projected", projected)):
            for index, rows in zip(own, values.split(lengths), strict=True):
                if has(case, f"{name}_{index}"):
                    close(rows, read(case, f"{name}_{index}"))

    mask = inputs["attention_mask"].bool()
    assert mask.sum(1).max() == case["sequence_length"]
    if has(case, "inputs_embeds"):
        close(seen.inputs_embeds[mask], read(case, "inputs_embeds")[mask])
    close(output.hidden_states[-1][mask], read(case, "last_hidden_state")[mask])
    close(output.logits[mask], read(case, "logits")[mask], LOGITS_ATOL)
    if has(case, "loss"):
        assert torch.equal(inputs["attention_mask"], read(case, "expanded_attention_mask"))
        assert torch.equal(inputs["labels"], read(case, "expanded_labels"))
        close(output.main_loss.reshape(1), read(case, "loss"))
    if has(case, "greedy_ids") and case["greedy_min_top2_gap"] > 1e-4:
        expected = read(case, "greedy_ids")
        inputs.pop("labels", None)
        answer = model.generate(**inputs, max_new_tokens=expected.shape[1], do_sample=False, eos_token_id=None)
        assert torch.equal(answer[:, inputs["input_ids"].shape[1] :], expected)


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = ATOL) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
