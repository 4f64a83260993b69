"""Image layouts and padded batches against the reference code's numbers, and both ways of rounding the padding."""

import pytest
import torch
from golden_data import MEDIA_PLACEHOLDER, parametrize_golden
from golden_models import expand, expand_batch, watch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

from llava_next_ar.configuration.image_token_layout import ImageTokenLayout, unpadded_grid
from llava_next_ar.conversion.original_checkpoint import (
    image_layout_from_original_config,
    settings_from_original_config,
)
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARModel


def image_layout(case) -> ImageTokenLayout:
    return image_layout_from_original_config(case["config"], case["patches_per_side"], case["tower_image_size"])


@parametrize_golden("layout_image_batch", "image")
def test_golden_image(case):
    layout = image_layout(case)
    newline, embed_tokens = case.tensor("image_newline"), case.tensor("embed_tokens")
    sizes = [(height, width) for width, height in case["image_sizes_wh"]]
    views = [case.tensor(name) for name in case["inputs"]]
    if "error" in case:
        with pytest.raises(ValueError):
            [layout.assemble(features, size, newline) for features, size in zip(views, sizes, strict=True)]
        return
    images = [layout.assemble(features, size, newline) for features, size in zip(views, sizes, strict=True)]
    counts = [
        layout.num_base_tokens if len(features) == 1 else layout.num_tokens(size)
        for features, size in zip(views, sizes, strict=True)
    ]
    assert counts == [len(image) for image in images]
    sequence = torch.tensor(expand(case["input_ids"], [MEDIA_PLACEHOLDER] * len(counts), counts))
    assert len(sequence) == case["n_tokens"]
    embeds = embed_tokens[sequence.clamp(min=0)]
    embeds[sequence == MEDIA_PLACEHOLDER] = torch.cat(images)
    # interpolation rounds by the width of the embeddings
    torch.testing.assert_close(embeds, case.tensor(case["output"]), rtol=0, atol=1e-6)
    is_newline = (embeds == newline).all(1)
    assert is_newline.int().tolist() == case.tensor(case["kind"]).tolist()


@parametrize_golden("layout_image_batch", "batch")
@torch.no_grad()
def test_golden_batch(case):
    """The media's features are put into the sequences by the model itself, then compared before the language model."""
    embed_tokens = case.tensor("embed_tokens")
    side = case["tower_image_size"]
    config = settings_from_original_config(
        {
            **case["config"],
            "mm_vision_tower": "siglip",
            "mm_projector_type": "mlp2x_gelu",
            "hidden_size": embed_tokens.shape[1],
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "vocab_size": len(embed_tokens) + 2,
        },
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "image_size": side,
            "patch_size": side // case["patches_per_side"],
        },
    ).config
    config.image_token_id, config.video_token_id = len(embed_tokens), len(embed_tokens) + 1
    config.text_config.head_dim = 2  # whatever the width of the reference: positions rotate pairs of numbers
    model = LlavaNextARModel(config).eval()
    model.get_input_embeddings().weight[: len(embed_tokens)] = embed_tokens
    newline = case.tensor("image_newline")
    seen = watch(model)

    packed = {"image": [], "video": []}
    ids, counts = [], []
    samples = zip(case["inputs"], case["modalities"], case["image_sizes_wh"], strict=True)
    for name, modality, (width, height) in samples:
        ids.append([]), counts.append([])
        if modality == "text":  # the reference gives it a dummy image and drops it
            continue
        features = case.tensor(name)
        if modality == "video":
            tokens = config.frame_token_layout.assemble(features, newline)
        else:
            aspect_ratio = config.vision_aspect_ratio
            (tokens,), _ = model.pack_image_features([features], [(height, width)], newline, aspect_ratio)
        packed[modality].append(tokens)
        ids[-1].append(getattr(config, f"{modality}_token_id"))
        counts[-1].append(len(tokens))

    batch = expand_batch(
        case.tensor("batch/input_ids"),
        case.tensor("batch/attention_mask"),
        case.tensor("batch/labels"),
        ids,
        counts,
        case["config"].get("tokenizer_padding_side", "right"),
    )
    encoded = {kind: BaseModelOutputWithPooling(pooler_output=tokens) for kind, tokens in packed.items() if tokens}
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], mm_encoder_outputs=encoded)
    # The reference cuts sequences at this length; this processor raises ValueError instead.
    limit = case["config"].get("tokenizer_model_max_length")
    mask, labels, embeds = batch["attention_mask"], batch["labels"], seen.inputs_embeds
    if limit is not None:
        mask, labels, embeds = (values[:, :limit] for values in (mask, labels, embeds))
    assert torch.equal(mask, case.tensor(case["attention_mask"]))
    assert torch.equal(labels, case.tensor(case["labels"]))
    expected = case.tensor(case["inputs_embeds"])
    torch.testing.assert_close(embeds[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


# --- rounding -----------------------------------------------------------------------------------------------


@given(*[st.integers(1, 30)] * 2, *[st.integers(1, 2000)] * 2)
@example(4, 12, 47, 188)
def test_rounding_as_transformers_does(height, width, image_height, image_width):
    """`round` is what transformers cuts; where the two differ, `truncate` never shows more."""
    ours = unpadded_grid((height, width), (image_height, image_width), "round")
    theirs = unpad_image(torch.zeros(1, height, width), (image_height, image_width)).shape[1:]
    assert ours == tuple(theirs)
    truncated = unpadded_grid((height, width), (image_height, image_width), "truncate")
    assert all(0 <= a - b <= 2 for a, b in zip(ours, truncated, strict=True))


def test_the_two_roundings_differ():
    """The reference data hold such an image; 188x47 in 3x1 tiles of 4x4 patches."""
    found = {rounding: unpadded_grid((4, 12), (47, 188), rounding) for rounding in ("round", "truncate")}
    assert found == {"round": (4, 12), "truncate": (2, 12)}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"merge_type": "spatial_pad"}, "spatial_pad"),
        ({"merge_type": "unpad"}, "merge_type"),
        ({"aspect_ratio": "anyres_max_"}, "anyres_max_"),
        ({"unpad_rounding": "floor"}, "floor"),
    ],
)
def test_unknown_values_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        ImageTokenLayout(patches_height=4, patches_width=4, tile_size=56, **keys)


def test_features_that_are_not_those_of_the_image_are_refused():
    layout = ImageTokenLayout(patches_height=2, patches_width=2, tile_size=28, grid_pinpoints=[[28, 56], [28, 28]])
    newline = torch.zeros(3)
    layout.assemble(torch.zeros(3, 4, 3), (20, 40), newline)
    with pytest.raises(ValueError, match="1x2 tiles"):
        layout.assemble(torch.zeros(2, 4, 3), (20, 40), newline)
    with pytest.raises(ValueError, match="2x2 patches"):
        layout.assemble(torch.zeros(3, 5, 3), (20, 40), newline)
    with pytest.raises(ValueError, match="image_newline"):
        layout.assemble(torch.zeros(3, 4, 3), (20, 40))
