"""The whole model: nothing leaks, nothing depends on padding, and OneVision's weights give OneVision's numbers."""

import copy
import datetime
import math

import processes
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    IMAGE_SIZE,
    IMAGE_TOKEN,
    LAYOUTS,
    PAD_TOKEN,
    VIDEO_TOKEN,
    collate,
    make_sample,
    tiny_config,
    tiny_model,
    tiny_onevision,
    train_briefly,
    video_batch,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlavaOnevisionForConditionalGeneration

from llava_next_ar.configuration.frame_token_layout import FrameTokenLayout
from llava_next_ar.modeling import loss_functions
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration, NextFramePrediction

FAST_SLOW = [0, 1, 1, 0]  # as a video processor may choose frames


def without_labels(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name != "labels"}


def count_calls(monkeypatch, *modules) -> list[int]:
    """Counts forward calls of each module, until the test ends."""
    calls = [0] * len(modules)
    for index, module in enumerate(modules):

        def counted(*args, _index=index, _forward=module.forward, **kwargs):
            calls[_index] += 1
            return _forward(*args, **kwargs)

        monkeypatch.setattr(module, "forward", counted)
    return calls


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict, expected: dict, atol: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


# ---- no leak --------------------------------------------------------------------------------------------------------

LEAK_CASES = {
    **{name: ({}, keys, None) for name, keys in LAYOUTS.items()},
    "pyramid": ({"enable_multiscale_pooling": True}, LAYOUTS["grid"], None),
    "pyramid, slow_fast": ({"enable_multiscale_pooling": True, "add_faster_video": True}, LAYOUTS["slow_fast"], None),
    "chosen frames": ({"use_fast_slow_frames": True, "num_hist": 2}, LAYOUTS["slow_fast"], FAST_SLOW),
    "chosen frames, plain tokens": ({"use_fast_slow_frames": True, "num_hist": 2}, {}, FAST_SLOW),
    "all history": ({"num_hist": 10, "loss_type": "cosine"}, {}, None),
}


def changed_from(frame: int, inputs: dict, videos=slice(None)) -> dict:
    """The same inputs with other pixels in every frame from `frame` on."""
    pixels = inputs["pixel_values_videos"].clone()
    pixels[videos, frame:] = 3 * torch.randn_like(pixels[videos, frame:])
    return {**inputs, "pixel_values_videos": pixels}


def leaks(before: list[NextFramePrediction], after: list[NextFramePrediction], frame: int) -> list[bool]:
    """True for predictions of frames up to `frame` that changed when the pixels changed from `frame` on."""
    return [
        not torch.equal(old, new)
        for mine, other in zip(before, after, strict=True)
        for index, old, new in zip(mine.frame_index.tolist(), mine.predictions, other.predictions, strict=True)
        if index <= frame
    ]


@pytest.mark.parametrize("case", LEAK_CASES)
def test_no_prediction_depends_on_its_target_or_anything_later(case):
    head, keys, types = LEAK_CASES[case]
    model = tiny_model(head, **keys)
    inputs = video_batch(model.config, [[4], [3]], types=types, padding_side="left")
    losses = train_briefly(model, inputs)
    assert losses[-1] < losses[0], "a head that has learned nothing cannot leak"
    inputs = without_labels(inputs)
    before = model.predict_next_frames(**inputs)
    for frame in range(1, 4):
        torch.manual_seed(frame)
        changed = changed_from(frame, inputs)
        after = model.predict_next_frames(**changed)
        assert not any(leaks(before, after, frame))
        # The check is alive: what was predicted from a changed frame did change.
        for mine, other in zip(before, after, strict=True):
            for index, old, new in zip(mine.frame_index.tolist(), mine.predictions, other.predictions, strict=True):
                assert index <= frame or not torch.equal(old, new)

        model.autoregressive_module.config.use_frame_causal_mask = False
        unmasked = leaks(model.predict_next_frames(**inputs), model.predict_next_frames(**changed), frame)
        assert any(unmasked), "without the causal mask the same check must fail"
        model.autoregressive_module.config.use_frame_causal_mask = True


def test_no_leak_between_two_videos_of_one_sample():
    model = tiny_model()
    inputs = video_batch(model.config, [[3, 4]])
    train_briefly(model, inputs)
    inputs = without_labels(inputs)
    before = model.predict_next_frames(**inputs)
    for frame in range(0, 4):
        after = model.predict_next_frames(**changed_from(frame, inputs, videos=1))
        assert not any(leaks(before[:1], after[:1], 4)), "an earlier video must not see a later one"
        assert not any(leaks(before[1:], after[1:], frame))
    # And the other way round it does: the language model reads the first video before the second.
    after = model.predict_next_frames(**changed_from(0, inputs, videos=0))
    assert all(leaks(before[1:], after[1:], 4))


def test_no_leak_with_eager_attention_and_images_in_the_prompt():
    model = tiny_model(attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    sample = make_sample(model.config, [4])
    image_tokens = torch.full((26,), IMAGE_TOKEN)  # one tile: 25 patches and a newline
    sample["input_ids"] = torch.cat([image_tokens, sample["input_ids"]])
    sample["labels"] = torch.cat([torch.full((26,), -100), sample["labels"]])
    inputs = collate([sample])
    inputs["pixel_values"] = torch.randn(1, 1, 3, IMAGE_SIZE, IMAGE_SIZE)
    inputs["image_sizes"] = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]])
    inputs["batch_num_images"] = torch.tensor([2])  # no tiles
    train_briefly(model, inputs)
    inputs = without_labels(inputs)
    before = model.predict_next_frames(**inputs)
    for frame in range(1, 4):
        assert not any(leaks(before, model.predict_next_frames(**changed_from(frame, inputs)), frame))


def test_the_objective_trains_the_language_model_at_the_video_and_nothing_of_the_teacher():
    model = tiny_model(freeze_tower=False)
    inputs = video_batch(model.config, [[3], [2]])
    train_briefly(model, inputs, steps=3)
    model.train()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    kept = []
    hook = model.model.language_model.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    output = model(**inputs)
    hook.remove()
    kept[0].retain_grad()
    grads = gradients(model, output.autoregressive_loss)
    # Gradient at the last layer: exactly at the patches of all frames that predict, which are all but the last.
    expected = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, num_frames in enumerate((3, 2)):
        start = int((inputs["input_ids"][row] == VIDEO_TOKEN).nonzero()[0])
        expected[row, start : start + 9 * (num_frames - 1)] = True
    assert torch.equal(kept[0].grad.abs().sum(-1) > 0, expected)
    for part in ("language_model.layers.0.self_attn.q_proj", "language_model.layers.1.mlp.up_proj"):
        assert grads[f"model.{part}.weight"].abs().max() > 0
    assert grads["model.vision_tower.encoder.layers.0.mlp.fc1.weight"].abs().max() > 0  # through the language model
    assert "lm_head.weight" not in grads
    assert list(model.autoregressive_module.teacher.parameters())
    assert not [name for name in grads if "teacher" in name]
    assert not output.loss.isnan() and output.main_loss == 0


def test_targets_carry_no_gradient_even_where_the_tower_would():
    """In eval mode a trainable tower is its own teacher; what it gives as target is cut off all the same."""
    model = tiny_model(freeze_tower=False)
    output = model(**video_batch(model.config, [[3], [2]]), return_reconstruction=True)
    assert model.autoregressive_module.teacher is None
    assert not output.reconstruction.targets.requires_grad and not output.reconstruction.copies.requires_grad
    frames = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, requires_grad=True)
    assert model.model.vision_tower(frames).last_hidden_state.requires_grad
    assert not model.autoregressive_module.teacher_features(model.model.vision_tower, frames).requires_grad


def test_at_initialisation_the_error_is_that_of_the_copy():
    for keys in LAYOUTS.values():
        model = tiny_model(**keys)
        inputs = video_batch(model.config, [[3, 2], [4]])
        output = model(**inputs, return_reconstruction=True)
        metrics = output.reconstruction.frame_metrics()
        assert torch.equal(metrics["mse"], metrics["copy_mse"]) and (metrics["mse"] > 0).all()
        assert all(p.metrics["skill"] == 0 for p in model.predict_next_frames(**inputs))


# ---- padding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("freeze_tower", [True, False], ids=["shared teacher", "own teacher"])
def test_padding_changes_nothing(layout, padding_side, freeze_tower):
    model = tiny_model(freeze_tower=freeze_tower, **LAYOUTS[layout])
    lengths = [[4], [2, 3], [1], []]
    train_briefly(model, video_batch(model.config, lengths))
    # Texts of different length too, and noise where frames are padded.
    samples = [make_sample(model.config, own, seed=i, text=3 + 4 * i) for i, own in enumerate(lengths)]
    together = collate(samples, padding_side, garbage=True)
    with torch.no_grad():
        output = model(**together, return_reconstruction=True)
        alone = [model(**collate([sample]), return_reconstruction=True) for sample in samples]
    for row, single in enumerate(alone):
        real = together["attention_mask"][row].bool()
        torch.testing.assert_close(output.logits[row][real], single.logits[0], rtol=0, atol=1e-5)
    losses = torch.cat([single.reconstruction.loss_per_video for single in alone if single.reconstruction is not None])
    torch.testing.assert_close(output.reconstruction.loss_per_video, losses, rtol=0, atol=1e-5)
    assert output.reconstruction.video_index.tolist() == [0, 1, 2]
    main_losses = torch.stack([single.main_loss for single in alone])  # four labels each
    torch.testing.assert_close(output.main_loss, main_losses.mean(), rtol=0, atol=1e-5)
    assert [single.autoregressive_loss is None for single in alone] == [False, False, True, True]


# ---- OneVision's numbers --------------------------------------------------------------------------------------------


def image_inputs(onevision, sizes: list[tuple[int, int]], tiled: bool) -> dict:
    """Images in the given order, and the number of placeholders of each by OneVision itself."""
    tiles = 5 if tiled else 1
    pixels = torch.randn(len(sizes), tiles, 3, IMAGE_SIZE, IMAGE_SIZE)
    sizes = torch.tensor(sizes)
    counts = None if tiled else torch.tensor([len(sizes)])
    with torch.no_grad():
        features = onevision.get_image_features(pixels, sizes, batch_num_images=counts, return_dict=True).pooler_output
    inputs = {"pixel_values": pixels, "image_sizes": sizes}
    if counts is not None:
        inputs["batch_num_images"] = counts
    return inputs | {"num_tokens": [len(image) for image in features]}


def rows(*rows_of_pieces, padding_side="left") -> dict:
    """Sequences of words and placeholders; an int stands for so many words, a pair for (token, how many)."""
    sequences = []
    for pieces in rows_of_pieces:
        parts = [
            torch.randint(1, 120, (piece,)) if isinstance(piece, int) else torch.full((piece[1],), piece[0])
            for piece in pieces
        ]
        sequences.append(torch.cat(parts))
    mask = [torch.ones_like(sequence) for sequence in sequences]
    pad = {"batch_first": True, "padding_side": padding_side}
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(sequences, padding_value=PAD_TOKEN, **pad),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(mask, **pad),
    }


def onevision_inputs(onevision, kind: str) -> dict:
    video = (VIDEO_TOKEN, 3 * 9 + 1)  # three frames, bilinear, one newline
    pixels = torch.randn(4, 3, 3, IMAGE_SIZE, IMAGE_SIZE)
    if kind == "text":
        return rows([12], [7])
    if kind == "video":
        return rows([4, video, 6]) | {"pixel_values_videos": pixels[:1]}
    if kind == "several videos":
        return rows([4, video, 2, video, 6], [3, video, 3], [9]) | {"pixel_values_videos": pixels[:3]}
    tiled = kind in ("any-resolution image", "mixture")
    sizes = [(40, 70), (70, 33)] if tiled else [(35, 35), (50, 35), (20, 30)]
    inputs = image_inputs(onevision, sizes, tiled)
    images = [(IMAGE_TOKEN, count) for count in inputs.pop("num_tokens")]
    if kind == "any-resolution image":
        assert images[0] != images[1] and images[0][1] > 26
        return rows([4, images[0], 6], [8, images[1], 3]) | inputs
    if kind == "several images":
        return rows([4, images[0], 2, images[1], images[2], 6]) | inputs
    assert kind == "mixture"
    sequences = rows([4, images[0], 2, video, 6], [11], [2, video, 2, video, images[1], 5])
    return sequences | inputs | {"pixel_values_videos": pixels[:3]}


KINDS = ["text", "any-resolution image", "several images", "video", "several videos", "mixture"]


@pytest.fixture(scope="module")
def onevision():
    return tiny_onevision()


def on_disk(onevision, folder, legacy: bool):
    """OneVision's weights under the keys of today's class, or under those of the released checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    onevision.config.save_pretrained(folder)
    weights = {}
    for name, value in onevision.state_dict().items():
        if legacy:
            for new, old in (
                ("lm_head.", "language_model.lm_head."),
                ("model.language_model.", "language_model.model."),
                ("model.vision_tower.", "vision_tower.vision_model."),
                ("model.multi_modal_projector.", "multi_modal_projector."),
                ("model.image_newline", "image_newline"),
            ):
                if name.startswith(new):
                    name = old + name.removeprefix(new)
                    break
        if not (name.endswith("lm_head.weight") and onevision.config.tie_word_embeddings):
            weights[name] = value.clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder, **keys):
    """Our model from OneVision's files; only the head may be new."""
    model, report = LlavaNextARForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, autoregressive_config={"num_heads": 2, "num_layers": 1}, **keys
    )
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all(key.startswith("autoregressive_module.") for key in report["missing_keys"])
    assert bool(report["missing_keys"]) == model.config.enable_autoregressive
    return model


@pytest.fixture(scope="module")
def same_weights(onevision, tmp_path_factory):
    folder = on_disk(onevision, tmp_path_factory.mktemp("onevision"), legacy=False)
    return {enabled: load(folder, enable_autoregressive=enabled) for enabled in (True, False)}


@pytest.mark.parametrize("head", [True, False], ids=["head on", "head off"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_onevisions(onevision, same_weights, kind, head):
    inputs = onevision_inputs(onevision, kind)
    model = same_weights[head]
    assert (model.autoregressive_module is not None) == head
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= IMAGE_TOKEN, -100)
    with torch.no_grad():
        expected = onevision(**inputs, labels=labels)
        actual = model(**inputs, labels=labels)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.main_loss, expected.loss)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("legacy", [False, True], ids=["current keys", "legacy keys"])
def test_both_generations_of_checkpoint_files_load(tmp_path, legacy, tied):
    config = {"tie_word_embeddings": tied}
    text = {**tiny_config().text_config.to_dict(), "tie_word_embeddings": tied}
    onevision = tiny_onevision(text_config=text, **config)
    folder = on_disk(onevision, tmp_path / "weights", legacy)
    names = load_file(folder / "model.safetensors").keys()
    assert any(name.startswith("language_model.model.") for name in names) == legacy
    assert any(name.endswith("lm_head.weight") for name in names) != tied
    model = load(folder)
    inputs = onevision_inputs(onevision, "mixture")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, onevision(**inputs).logits)
    shared = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert shared == tied
    # What OneVision's own class reads from the same file is the control for the renaming in this test.
    control = LlavaOnevisionForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(control.lm_head.weight, model.lm_head.weight)


GENERATION = {
    "greedy": {"do_sample": False},
    "beam": {"num_beams": 3, "do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 50},
    "without cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("head", [True, False], ids=["head on", "head off"])
@pytest.mark.parametrize("kind", ["mixture", "several videos"])
@pytest.mark.parametrize("how", GENERATION)
def test_generation_is_onevisions(onevision, same_weights, how, kind, head):
    inputs = onevision_inputs(onevision, kind)
    results = []
    for model in (onevision, same_weights[head]):
        torch.manual_seed(3)
        results.append(
            model.generate(
                **copy.deepcopy(inputs),
                **GENERATION[how],
                max_new_tokens=6,
                pad_token_id=PAD_TOKEN,
                suppress_tokens=[IMAGE_TOKEN, VIDEO_TOKEN],  # random weights say them, and no media belong to them
                return_dict_in_generate=True,
                output_logits=True,
            )
        )
    assert torch.equal(results[0].sequences, results[1].sequences)
    for expected, actual in zip(results[0].logits, results[1].logits, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_by_token_equals_one_pass_and_a_batch_equals_its_samples(layout):
    model = tiny_model(**LAYOUTS[layout])
    samples = [make_sample(model.config, own, seed=i) for i, own in enumerate([[4], [2, 3], []])]
    batch = without_labels(collate(samples, padding_side="left"))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD_TOKEN}
    together = model.generate(**batch, **settings)[:, -5:]
    for row, sample in enumerate(samples):
        inputs = without_labels(collate([sample]))
        out = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(out.sequences[0, -5:], together[row])
        # The same tokens in one pass, without a cache.
        whole = {**inputs, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
        with torch.no_grad():
            logits = model(**whole, use_cache=False).logits[0, -6:-1]
        torch.testing.assert_close(torch.cat(out.logits), logits, rtol=1e-4, atol=1e-5)


def test_sampling_several_answers_keeps_the_videos_of_a_sample_together():
    """Two videos of one sample: repeated for several answers they must stay first, second, first, second."""
    model = tiny_model()
    inputs = without_labels(video_batch(model.config, [[2, 4]]))
    settings = {"max_new_tokens": 6, "pad_token_id": PAD_TOKEN}
    torch.manual_seed(0)
    sampled = model.generate(**inputs, **settings, do_sample=True, num_return_sequences=4)
    greedy = model.generate(**inputs, **settings, do_sample=True, top_k=1, num_return_sequences=3)
    assert all(torch.equal(row, greedy[0]) for row in greedy)
    assert torch.equal(greedy[0], model.generate(**inputs, **settings, do_sample=False)[0])
    assert len({tuple(row.tolist()) for row in sampled}) > 1


def test_generation_calls_the_tower_once_and_the_head_never(monkeypatch):
    model = tiny_model(**LAYOUTS["slow_fast"])
    inputs = without_labels(video_batch(model.config, [[4], [3]], padding_side="left"))
    inputs["video_layout"] = model.config.frame_token_layout.as_tensor()[None].repeat(2, 1)
    calls = count_calls(monkeypatch, model.model.vision_tower, model.autoregressive_module, model.model.language_model)
    for settings in ({}, {"num_beams": 2}, {"use_cache": False}):
        calls[:] = [0, 0, 0]
        model.generate(**inputs, **settings, max_new_tokens=4, do_sample=False, pad_token_id=PAD_TOKEN)
        assert calls[:2] == [1, 0] and calls[2] >= 4


# ---- losses ---------------------------------------------------------------------------------------------------------


def trained_model(**keys):
    model = tiny_model(**keys)
    train_briefly(model, video_batch(model.config, [[3], [2]]), steps=3)
    return model


def test_the_loss_is_the_weighted_sum_of_its_parts():
    model = tiny_model({"loss_weight": 0.3})
    output = model(**video_batch(model.config, [[3], [2]]))
    assert output.autoregressive_loss > 0 and output.main_loss > 0
    torch.testing.assert_close(output.loss, output.main_loss + 0.3 * output.autoregressive_loss)
    silent = tiny_model({"loss_weight": 0.0})(**video_batch(model.config, [[3], [2]]))
    assert torch.equal(silent.loss, silent.main_loss)
    assert torch.equal(silent.autoregressive_loss, output.autoregressive_loss)


@pytest.mark.parametrize("num_items", [None, 17, torch.tensor(17)])
def test_skipping_logits_changes_neither_loss_nor_gradient(num_items):
    model = trained_model()
    inputs = video_batch(model.config, [[3, 2], [2], []])
    inputs["labels"][0, 3] = inputs["input_ids"][0, 3]  # a label away from the others
    full = model(**inputs, num_items_in_batch=num_items)
    expected = gradients(model, full.loss)
    skipped = model(**inputs, num_items_in_batch=num_items, skip_logits=True)
    assert full.logits is not None and skipped.logits is None
    torch.testing.assert_close(skipped.main_loss, full.main_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(skipped.loss, full.loss, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(model, skipped.loss), expected)


def test_chunks_of_supervised_positions_change_neither_loss_nor_gradient(monkeypatch):
    model = trained_model()
    inputs = video_batch(model.config, [[3], [2]])
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] > 119, -100)  # 20 odd words, no pixels
    whole = model(**inputs, skip_logits=True)
    expected = gradients(model, whole.loss)
    most_logits = []
    model.lm_head.register_forward_hook(lambda module, args, logits: most_logits.append(logits.numel()))
    monkeypatch.setattr(loss_functions, "LOGITS_AT_A_TIME", 5 * model.config.text_config.vocab_size)
    chunked = model(**inputs, skip_logits=True)
    torch.testing.assert_close(chunked.main_loss, whole.main_loss)
    assert_same_gradients(gradients(model, chunked.loss), expected)
    assert len(most_logits) > 4 and max(most_logits) == 5 * model.config.text_config.vocab_size


@pytest.mark.parametrize("skip_logits", [False, True])
def test_labels_may_come_shifted(skip_logits):
    model = trained_model()
    inputs = video_batch(model.config, [[3], [2]])
    expected = model(**inputs)
    labels = inputs["labels"]
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    actual = model(**{**inputs, "labels": labels.flip(1)}, shift_labels=shifted, skip_logits=skip_logits)
    torch.testing.assert_close(actual.main_loss, expected.main_loss)


def test_the_head_may_be_skipped():
    model = trained_model().train()
    inputs = video_batch(model.config, [[3], [2]])
    output = model(**inputs, skip_reconstruction=True, return_reconstruction=True)
    assert torch.equal(output.loss, output.main_loss) and torch.equal(output.main_loss, model(**inputs).main_loss)
    assert output.autoregressive_loss is None and output.reconstruction is None
    grads = gradients(model, output.loss)
    assert not any(grad.any() for name, grad in grads.items() if "autoregressive_module" in name)


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("num_items", [None, 8])
@pytest.mark.parametrize("lengths", [[[3], [2]], [[], []], [[1], []]])
def test_without_a_single_label_the_main_loss_is_zero(lengths, num_items, skip_logits):
    model = trained_model().train()
    inputs = video_batch(model.config, lengths)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    output = model(**inputs, skip_logits=skip_logits, num_items_in_batch=num_items)
    assert output.main_loss == 0 and output.loss.isfinite()
    grads = gradients(model, output.loss)
    assert all(grad.isfinite().all() for grad in grads.values())
    has_objective = output.autoregressive_loss is not None and num_items is None
    assert (grads["autoregressive_module.change.weight"].abs().max() > 0) == has_objective


def test_without_labels_there_is_no_loss_and_no_head(monkeypatch):
    model = tiny_model()
    inputs = without_labels(video_batch(model.config, [[3]]))
    calls = count_calls(monkeypatch, model.autoregressive_module)
    output = model(**inputs)
    assert (output.loss, output.main_loss, output.autoregressive_loss, output.reconstruction) == (None,) * 4
    assert calls == [0] and output.logits is not None
    asked = model(**inputs, return_reconstruction=True)
    assert asked.loss is None and asked.autoregressive_loss > 0 and asked.reconstruction is not None
    assert model(**inputs, skip_logits=True).logits is not None  # nothing to skip to


def test_the_reconstruction_is_returned_on_request_only():
    model = tiny_model()
    inputs = video_batch(model.config, [[3]])
    assert model(**inputs).reconstruction is None
    assert model(**inputs, return_reconstruction=True).reconstruction.predictions.shape[0] == 2


BATCH = [[4], [1, 2], [3, 2], []]  # one-frame videos and samples without video count for nothing


def labelled_batch(model) -> list[dict]:
    samples = [make_sample(model.config, own, seed=i) for i, own in enumerate(BATCH)]
    for sample, drop in zip(samples, (0, 2, 1, 3), strict=True):
        sample["labels"][-4 : -4 + drop] = -100
    return samples


@pytest.mark.parametrize("splits", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 3], [1, 2]], [[3], [2, 0, 1]]])
@pytest.mark.parametrize("counted", ["videos", "labels alone"])
def test_both_losses_do_not_depend_on_how_a_step_is_split(splits, counted):
    model = trained_model().train()
    samples = labelled_batch(model)
    num_items = sum(int((sample["labels"] != -100).sum()) for sample in samples)
    counts = {"num_items_in_batch": num_items}
    if counted == "videos":
        counts["num_videos_in_batch"] = 4
    # By hand, from each video's own loss.
    model.eval()
    with torch.no_grad():
        single = [model(**collate([sample]), return_reconstruction=True) for sample in samples]
    losses = [None if s.reconstruction is None else s.reconstruction.loss_per_video.tolist() for s in single]
    labels = [4, 2, 3, 1]
    assert [None if own is None else len(own) for own in losses] == [1, 1, 2, None]
    main = sum(s.main_loss.item() * n for s, n in zip(single, labels, strict=True)) / 10
    if counted == "videos":
        auxiliary = sum(sum(own) for own in losses if own) / 4
    else:
        auxiliary = sum(n * sum(own) / len(own) for own, n in zip(losses, labels, strict=True) if own) / 10
    model.train()
    total = {"main": 0.0, "auxiliary": 0.0}
    model.zero_grad()
    for split in splits:
        output = model(**collate([samples[i] for i in split], padding_side="left"), **counts)
        output.loss.backward()
        total["main"] += output.main_loss.item()
        total["auxiliary"] += 0.0 if output.autoregressive_loss is None else output.autoregressive_loss.item()
    assert total["main"] == pytest.approx(main, rel=1e-5)
    assert total["auxiliary"] == pytest.approx(auxiliary, rel=1e-5)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    whole = gradients(model, model(**collate(samples), **counts).loss)
    assert_same_gradients(grads, whole)


def test_counts_may_be_tensors_and_without_counts_videos_are_averaged():
    model = trained_model()
    inputs = video_batch(model.config, BATCH)
    per_video = model(**inputs, return_reconstruction=True).reconstruction.loss_per_video
    torch.testing.assert_close(model(**inputs).autoregressive_loss, per_video.mean())
    counts = {"num_items_in_batch": torch.tensor(16), "num_videos_in_batch": torch.tensor(8)}
    torch.testing.assert_close(model(**inputs, **counts).autoregressive_loss, per_video.sum() / 8)


@pytest.mark.parametrize("lengths", [[[], []], [[1], []], [[2], []]])
@pytest.mark.parametrize("layout", ["one_token", "no_token", "slow_fast"])
def test_every_batch_touches_every_parameter(layout, lengths):
    """Distributed training waits for the gradient of every parameter, whatever a rank's batch holds."""
    model = tiny_model(freeze_tower=False, **LAYOUTS[layout]).train()
    inputs = video_batch(model.config, lengths)
    output = model(**inputs)
    assert (output.autoregressive_loss is None) == (lengths[0] != [2])
    grads = gradients(model, output.loss)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and name not in grads]
    if output.autoregressive_loss is None:
        assert torch.equal(output.loss, output.main_loss)
        assert not any(grad.any() for name, grad in grads.items() if "autoregressive_module" in name)
    if not lengths[0]:
        assert not any(grad.any() for name, grad in grads.items() if "vision_tower" in name or "projector" in name)


def _train_as_one_of_two(rank: int, wrapper: str, store: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout
    )
    model = tiny_model(freeze_tower=False).train()
    model.create_teacher()
    if wrapper == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        parts = model.model
        for layer in (
            *parts.language_model.layers,
            *parts.vision_tower.encoder.layers,
            *model.autoregressive_module.blocks,
        ):
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        assert isinstance(model.lm_head.weight, torch.distributed.tensor.DTensor), "nothing was sharded"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(4):
        # One rank has a video where the other has text alone.
        inputs = video_batch(model.config, [[3]] if (rank + step) % 2 else [[]])
        wrapped(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = model.autoregressive_module.change.weight.detach()
    mine = weight.full_tensor() if wrapper == "fsdp2" else weight
    other = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(other, mine.contiguous())
    assert mine.abs().max() > 0 and torch.equal(other[0], other[1])
    del wrapped, model  # the wrapper before the process group that it holds: see `release_process_group`
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_ranks_with_and_without_video_do_not_wait_for_each_other_in_vain(tmp_path, wrapper):
    """Sharded ranks must run the same modules in the same order: the empty tower pass once came after the language
    model where the real one comes before, and the collectives did not match."""
    processes.spawn(_train_as_one_of_two, (wrapper, str(tmp_path / "store")), nprocs=2)


def test_the_prototypes_loss_is_the_models_own():
    model = trained_model(head={"loss_weight": 0.2}, **LAYOUTS["grid"])
    inputs = video_batch(model.config, [[3], [3]])
    output = model(**inputs)
    hidden_states = model.model(**without_labels(inputs)).last_hidden_state
    position_map = torch.stack([(row == VIDEO_TOKEN).nonzero().squeeze(1) for row in inputs["input_ids"]])
    loss = model.autoregressive_module.compute_autoregressive_loss(
        hidden_states, inputs["pixel_values_videos"], position_map, inputs["video_timestamps"]
    )
    torch.testing.assert_close(loss, 0.2 * output.autoregressive_loss)
    with pytest.raises(ValueError, match="position_map"):
        model.autoregressive_module.compute_autoregressive_loss(hidden_states, inputs["pixel_values_videos"])


def test_embeddings_instead_of_ids_give_the_same_losses():
    model = trained_model()
    inputs = video_batch(model.config, [[3], [2]])
    expected = model(**inputs)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    actual = model(**inputs)
    assert torch.equal(actual.loss, expected.loss) and torch.equal(actual.logits, expected.logits)


def test_time_reaches_the_head():
    model = trained_model()
    inputs = without_labels(video_batch(model.config, [[4]]))
    inputs["video_timestamps"] = torch.tensor([[0.0, 0.5, 1.0, 2.5]])

    def predict(**changed):
        return torch.stack(model.predict_next_frames(**{**inputs, **changed})[0].predictions)

    expected = predict()
    assert torch.equal(predict(video_timestamps=inputs["video_timestamps"] + 64), expected)
    assert not torch.equal(predict(video_timestamps=inputs["video_timestamps"] * 2), expected)
    assert torch.equal(predict(video_timestamps=None), predict(video_timestamps=torch.arange(4.0)[None]))


@pytest.mark.parametrize("layout", ["one_token", "slow_fast"])
def test_frame_types_reach_the_head_whether_or_not_the_tokens_show_them(layout):
    model = trained_model(head={"use_fast_slow_frames": True, "num_hist": 1}, **LAYOUTS[layout])
    inputs = without_labels(video_batch(model.config, [[4], [3]], types=FAST_SLOW))

    def predict() -> list[torch.Tensor]:
        return [frame for video in model.predict_next_frames(**inputs) for frame in video.predictions]

    expected = predict()
    model.autoregressive_module.config.use_fast_slow_frames = False
    window_alone = predict()
    # Seen by itself, frame 0 predicts frame 1; frames 1 and 2 look back at the slow frame 0 as well.
    changed = [not torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, window_alone, strict=True)]
    assert changed == [False, True, True, False, True]


# ---- teacher --------------------------------------------------------------------------------------------------------


def targets(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_reconstruction=True).reconstruction.targets


def test_a_frozen_tower_is_its_own_teacher_at_no_cost(monkeypatch):
    model = tiny_model().train()
    inputs = video_batch(model.config, [[3], [2]])
    calls = count_calls(monkeypatch, model.model.vision_tower)
    model(**inputs).loss.backward()
    assert calls == [1]
    assert model.autoregressive_module.teacher is None
    assert not model.config.autoregressive_config.separate_teacher
    outside = {name for name in model.state_dict() if not name.startswith("model.vision_tower")}
    assert not [name for name in outside if "teacher" in name or "tower" in name]


@pytest.mark.parametrize("layer", [-1, -2, [-2, -1]])
def test_the_teacher_gives_what_the_projector_reads(monkeypatch, layer):
    model = tiny_model(freeze_tower=False, vision_feature_layer=layer)
    inputs = video_batch(model.config, [[3], [2]])
    shared = targets(model, inputs)
    model.create_teacher()
    teacher = model.autoregressive_module.teacher
    assert teacher is not None and model.config.autoregressive_config.separate_teacher
    calls = count_calls(monkeypatch, model.model.vision_tower, teacher)
    assert torch.equal(targets(model, inputs), shared)
    assert calls == [1, 1]


def test_the_copy_stays_while_the_tower_trains_and_survives_saving(tmp_path):
    model = tiny_model(freeze_tower=False)
    inputs = video_batch(model.config, [[3], [2]])
    before = targets(model, inputs)
    start = {name: value.clone() for name, value in model.model.vision_tower.state_dict().items()}
    train_briefly(model, inputs)
    tower, teacher = model.model.vision_tower, model.autoregressive_module.teacher
    weight = "encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(tower.state_dict()[weight], start[weight]), "the tower was to train"
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, start[name])
    assert torch.equal(targets(model, inputs), before)
    model.create_teacher()
    assert model.autoregressive_module.teacher is teacher, "a second call must not copy the trained tower"

    model.save_pretrained(tmp_path)
    assert any(name.startswith("autoregressive_module.teacher.") for name in load_file(tmp_path / "model.safetensors"))
    loaded, report = LlavaNextARForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(targets(loaded, inputs), before)
    model.eval()
    assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)
    for mode in (None, True, False):
        if mode is not None:
            loaded.train(mode)
        frozen = loaded.autoregressive_module.teacher
        assert not frozen.training and not any(module.training for module in frozen.modules())
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert any(parameter.requires_grad for parameter in loaded.model.vision_tower.parameters())
    train_briefly(loaded, inputs)
    assert torch.equal(targets(loaded, inputs), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_copy_follows_the_model(dtype):
    model = tiny_model(freeze_tower=False).train()
    model.create_teacher()
    model.to(dtype)
    assert {parameter.dtype for parameter in model.autoregressive_module.teacher.parameters()} == {dtype}
    inputs = video_batch(model.config, [[3]])
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(dtype)
    model(**inputs).loss.backward()


@pytest.mark.parametrize("freeze_tower", [True, False])
def test_a_model_straight_from_its_constructor_trains(freeze_tower):
    """Only `train()` once made the teacher: the first step of a model that was in training mode already failed."""
    torch.manual_seed(0)
    model = LlavaNextARForConditionalGeneration(tiny_config())
    if freeze_tower:
        model.model.vision_tower.requires_grad_(False)
    inputs = video_batch(model.config, [[4], [3]])
    before = targets(model.eval(), inputs)
    output = model.train()(**inputs, return_reconstruction=True)
    assert torch.equal(output.reconstruction.targets, before)
    grads = gradients(model, output.loss)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(grads) and any("vision_tower" in name for name in trained) != freeze_tower
    assert (model.autoregressive_module.teacher is None) == freeze_tower


def test_train_changes_neither_weights_nor_configuration():
    model = tiny_model(freeze_tower=False)
    model.requires_grad_(True)
    before = {name: p.requires_grad for name, p in model.named_parameters()}, model.config.to_dict()
    model.train()
    assert ({name: p.requires_grad for name, p in model.named_parameters()}, model.config.to_dict()) == before
    model.freeze_unused_parts()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"model.vision_tower.post_layernorm.{part}" for part in ("weight", "bias")}


def test_a_tower_unfrozen_later_keeps_its_first_weights_as_teacher():
    model = tiny_model().train()
    inputs = video_batch(model.config, [[3]])
    before = targets(model, inputs)
    model(**inputs)
    assert model.autoregressive_module.teacher is None
    model.model.vision_tower.requires_grad_(True)
    train_briefly(model, inputs, steps=3)
    assert torch.equal(targets(model, inputs), before)


@pytest.mark.parametrize("attribute", ["ds_id", "placements"])
def test_a_sharded_tower_cannot_be_copied(attribute):
    model = tiny_model(freeze_tower=False).train()
    setattr(next(model.model.vision_tower.parameters()), attribute, 0)
    with pytest.raises(RuntimeError, match=r"sharded.*model\.create_teacher\(\) before"):
        model(**video_batch(model.config, [[3]]))


def test_parts_that_no_feature_passes_through_do_not_train(tmp_path):
    model = tiny_model(freeze_tower=False)
    model.save_pretrained(tmp_path)
    loaded = LlavaNextARForConditionalGeneration.from_pretrained(tmp_path)
    for state in (loaded, loaded.train()):
        frozen = {name for name, p in state.named_parameters() if not p.requires_grad and "teacher" not in name}
        assert frozen == {f"model.vision_tower.post_layernorm.{part}" for part in ("weight", "bias")}


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def test_with_adapters_the_teacher_is_the_tower_without_them(monkeypatch, peft):
    model = tiny_model()
    inputs = video_batch(model.config, [[3], [2]])
    before = targets(model, inputs)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            target_modules=r".*(vision_tower|language_model).*q_proj", modules_to_save=["autoregressive_module"]
        ),
    )
    calls = count_calls(monkeypatch, model.model.vision_tower)
    train_briefly(adapted, inputs, steps=8, lr=3e-2)
    assert calls == [16], "with adapters the teacher costs one more pass"
    lora = [p for name, p in model.named_parameters() if "vision_tower" in name and "lora_B" in name]
    assert lora and all(p.abs().max() > 0 for p in lora)
    assert torch.equal(targets(adapted, inputs), before)
    # The adapters are on again after the teacher's pass.
    with torch.no_grad():
        on = model.get_video_features(inputs["pixel_values_videos"]).vision_features
        with adapted.disable_adapter():
            off = model.get_video_features(inputs["pixel_values_videos"]).vision_features
    assert not torch.allclose(on, off, atol=1e-3)
    assert not any("teacher" in name for name in model.state_dict())


def test_adapters_that_are_off_stay_off(peft):
    model = tiny_model()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*vision_tower.*q_proj"))
    inputs = video_batch(model.config, [[3]])
    with adapted.disable_adapter():
        targets(adapted, inputs)
        layers = [m for m in model.modules() if isinstance(getattr(m, "disable_adapters", None), bool)]
        assert layers and all(layer.disable_adapters for layer in layers)


def test_adapters_come_back_after_an_error_in_the_teacher(monkeypatch, peft):
    model = tiny_model()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*vision_tower.*q_proj"))
    layers = [m for m in adapted.modules() if isinstance(getattr(m, "disable_adapters", None), bool)]
    seen = []

    def out_of_memory(*args, **kwargs):
        seen.extend(layer.disable_adapters for layer in layers)
        raise MemoryError

    monkeypatch.setattr(model.model.vision_tower, "forward", out_of_memory)
    with pytest.raises(MemoryError):
        model.autoregressive_module.teacher_features(model.model.vision_tower, torch.zeros(1, 3, 35, 35))
    assert seen and all(seen)
    assert not any(layer.disable_adapters for layer in layers)


def test_adapters_beside_which_the_tower_itself_trains_are_refused(peft):
    """With `bias='all'` the tower's biases train too; adapters off, the targets once moved with them."""
    model = tiny_model()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*vision_tower.*q_proj", bias="all")).train()
    with pytest.raises(RuntimeError, match="adapters, and weights of its own"):
        adapted(**video_batch(model.config, [[3]]))


def test_a_tower_trained_in_full_beside_adapters_has_its_original_as_teacher(peft):
    model = tiny_model()
    inputs = video_batch(model.config, [[3], [2]])
    before = targets(model, inputs)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["vision_tower"])
    )
    train_briefly(adapted, inputs, steps=4)
    assert torch.equal(targets(adapted, inputs), before)


def test_adapters_and_a_batch_without_video(peft):
    model = tiny_model()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["autoregressive_module"])
    ).train()
    wrapper = model.autoregressive_module
    assert wrapper.modules_to_save["default"]._vision_tower.module is model.model.vision_tower
    grads = gradients(adapted, adapted(**video_batch(model.config, [[], []])).loss)
    assert not [name for name, p in adapted.named_parameters() if p.requires_grad and name not in grads]


# ---- dtype, checkpointing, compilation ------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze_tower", [True, False])
def test_bfloat16_stays_close_and_finite(freeze_tower):
    model = tiny_model(freeze_tower=freeze_tower, **LAYOUTS["slow_fast"])
    inputs = video_batch(model.config, [[4], [3, 2]])
    train_briefly(model, inputs)
    model.train()
    expected = model(**inputs)
    model.to(torch.bfloat16)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].bfloat16()
    output = model(**inputs, return_reconstruction=True)
    assert output.logits.dtype == torch.bfloat16 and output.reconstruction.predictions.dtype == torch.float32
    assert output.main_loss.item() == pytest.approx(expected.main_loss.item(), rel=0.03)
    assert output.autoregressive_loss.item() == pytest.approx(expected.autoregressive_loss.item(), rel=0.03)
    grads = gradients(model, output.loss)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert grads["model.language_model.layers.0.self_attn.q_proj.weight"].any()


def test_autocast_stays_close():
    model = trained_model()
    inputs = video_batch(model.config, [[4], [3]])
    expected = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.03)
    assert output.loss.dtype == torch.float32


@pytest.mark.parametrize("freeze_tower", [True, False])
def test_gradient_checkpointing_changes_nothing(monkeypatch, freeze_tower):
    model = tiny_model(freeze_tower=freeze_tower)
    inputs = video_batch(model.config, [[4], [3]])
    train_briefly(model, inputs, steps=3)
    model.train()
    plain = model(**inputs)
    expected = gradients(model, plain.loss)
    model.gradient_checkpointing_enable()
    parts = [block.attention for block in model.autoregressive_module.blocks]
    calls = count_calls(monkeypatch, *parts, model.model.language_model.layers[0].self_attn)
    output = model(**inputs)
    assert calls == [1, 1, 1]
    actual = gradients(model, output.loss)
    assert calls == [2, 2, 2], "nothing was recomputed"
    assert torch.equal(output.loss, plain.loss)
    assert_same_gradients(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one_token", "slow_fast"])
def test_compiled_model_gives_the_same(layout):
    model = trained_model(**LAYOUTS[layout]).train()
    inputs = video_batch(model.config, [[4], [3]])
    plain = model(**inputs)
    expected = gradients(model, plain.loss)
    compiled = torch.compile(model, backend="aot_eager")
    output = compiled(**inputs)
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(model, output.loss), expected, atol=1e-5)


# ---- mismatches -----------------------------------------------------------------------------------------------------


def test_truncated_placeholders_are_refused_with_both_numbers():
    model = tiny_model()
    inputs = video_batch(model.config, [[3], [2]])
    needed = 2 * 1 + 9 * 5
    for name in ("input_ids", "attention_mask", "labels"):
        inputs[name] = inputs[name][:, :20]
    present = int((inputs["input_ids"] == VIDEO_TOKEN).sum())
    with pytest.raises(ValueError, match=f"hold {present} video placeholders, but the 2 videos take {needed} tokens"):
        model(**inputs)
    with pytest.raises(ValueError, match=f"{present}.*{needed}"):
        model.generate(**without_labels(inputs), max_new_tokens=1)


@pytest.mark.parametrize(
    "key, value",
    [("pool_stride", 1), ("pool_mode", "average"), ("newline_position", "frame"), ("patches_height", 7)],
)
def test_a_processor_with_another_layout_is_refused_naming_the_key(key, value):
    model = tiny_model()
    inputs = video_batch(model.config, [[3], [2]])
    mine = model.config.frame_token_layout
    other = FrameTokenLayout(**{**mine.to_dict(), key: value})
    inputs["video_layout"] = torch.stack([mine.as_tensor(), mine.as_tensor()])
    model(**inputs)
    inputs["video_layout"] = torch.stack([mine.as_tensor(), other.as_tensor()])
    for call in (model, lambda **kwargs: model.generate(**without_labels(kwargs), max_new_tokens=1)):
        with pytest.raises(
            ValueError, match=f"{key}: {getattr(mine, key)!r} in the model, {value!r} in the processor"
        ):
            call(**inputs)


def test_impossible_frame_masks_are_refused():
    model = tiny_model()
    inputs = video_batch(model.config, [[3], [2]])
    inputs["video_frame_mask"][1] = False
    with pytest.raises(ValueError, match="video 1 of the batch has no real frame"):
        model(**inputs)
    # Times and types are read from the front; a hole would silently shift them.
    for row in ([False, True, True], [True, False, True]):
        inputs["video_frame_mask"][1] = torch.tensor(row)
        with pytest.raises(ValueError, match="True for the first frames"):
            model(**inputs)


def test_pixels_and_encoded_features_together_are_refused():
    model = tiny_model()
    inputs = without_labels(video_batch(model.config, [[3]]))
    pixels = {name: inputs.pop(name) for name in list(inputs) if "video" in name}
    encoded = model.get_video_features(**pixels)
    with torch.no_grad():
        alone = model(**inputs, mm_encoder_outputs={"video": encoded}).logits
        assert torch.equal(alone, model(**inputs, **pixels).logits)
    for callee in (model, model.model):
        with pytest.raises(ValueError, match="both pixels and encoded features of the videos"):
            callee(**inputs, **pixels, mm_encoder_outputs={"video": encoded})
    with pytest.raises(ValueError, match="both pixels and encoded features of the images"):
        model(
            input_ids=torch.tensor([[5, IMAGE_TOKEN]]),
            pixel_values=torch.zeros(1, 1, 3, IMAGE_SIZE, IMAGE_SIZE),
            image_sizes=torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]]),
            mm_encoder_outputs={"image": encoded},
        )


def test_frame_types_must_fit_their_frames():
    model = tiny_model(**LAYOUTS["slow_fast"])
    inputs = video_batch(model.config, [[4]], types=FAST_SLOW)
    model(**inputs)
    with pytest.raises(ValueError, match="frame types were given for 4 frames"):
        model(**{**inputs, "video_frame_types": inputs["video_frame_types"][:, :3]})


# ---- predictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_predictions_come_by_video_and_frame(layout):
    model = trained_model(**LAYOUTS[layout])
    inputs = video_batch(model.config, [[3, 1], [], [2, 4]])
    predicted = model.predict_next_frames(**inputs)
    assert [p.frame_index.tolist() for p in predicted] == [[1, 2], [1], [1, 2, 3]]  # the one-frame video is left out
    reconstruction = model(**inputs, return_reconstruction=True).reconstruction
    entry = 0
    for video in predicted:
        for i in range(len(video.frame_index)):
            size = math.prod(video.grids[i])
            for name in ("predictions", "targets", "copies"):
                mine, all_of_them = getattr(video, name)[i], getattr(reconstruction, name)
                assert mine.shape[0] == size
                torch.testing.assert_close(mine, all_of_them[entry, :size], rtol=0, atol=1e-5)
            error = (video.predictions[i] - video.targets[i]).square().mean()
            torch.testing.assert_close(video.frame_metrics["mse"][i], error)
            entry += 1
        assert video.metrics["mse"] == pytest.approx(video.frame_metrics["mse"].mean().item())
        expected = 1 - video.frame_metrics["mse"].mean() / video.frame_metrics["copy_mse"].mean()
        assert video.metrics["skill"] == pytest.approx(expected.item(), abs=1e-6)
    assert entry == len(reconstruction.predictions)


def test_predictions_need_a_head_and_two_frames():
    model = tiny_model(enable_autoregressive=False)
    with pytest.raises(ValueError, match="enable_autoregressive=False"):
        model.predict_next_frames(**video_batch(model.config, [[3]]))
    model = tiny_model()
    for lengths in ([[1]], [[]]):
        with pytest.raises(ValueError, match="at least one video with two frames"):
            model.predict_next_frames(**video_batch(model.config, lengths))


def test_without_a_head_only_the_main_loss_is_left():
    model = tiny_model(enable_autoregressive=False).train()
    inputs = video_batch(model.config, [[3]])
    output = model(**inputs, return_reconstruction=True)
    assert torch.equal(output.loss, output.main_loss)
    assert output.autoregressive_loss is None and output.reconstruction is None
    assert not [name for name in model.state_dict() if "autoregressive" in name]


def test_a_promised_teacher_that_the_checkpoint_lacks_is_refused(tmp_path):
    """It would be a random one, reported in the load report alone: a config of one run beside the base weights of another."""
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no teacher.*separate_teacher.: False"):
        LlavaNextARForConditionalGeneration.from_pretrained(tmp_path, autoregressive_config={"separate_teacher": True})


def test_layers_behind_the_features_stay_frozen(tmp_path):
    """No gradient ever reaches them, and distributed training would wait for it."""
    model = tiny_model(freeze_tower=False, vision_feature_layer=-2)
    model.save_pretrained(tmp_path)
    reloaded = LlavaNextARForConditionalGeneration.from_pretrained(tmp_path).train()
    inputs = video_batch(model.config, [[2]])
    reloaded(**inputs).loss.backward()
    assert [name for name, p in reloaded.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not any(p.requires_grad for p in reloaded.model.vision_tower.encoder.layers[-1].parameters())
    assert all(p.requires_grad for p in reloaded.model.vision_tower.encoder.layers[0].parameters())


def test_a_class_without_a_file_of_its_own_is_not_saved(tmp_path):
    """Its code could not travel: the checkpoint would load on this computer only, or never."""
    model = tiny_model()
    model.__class__ = type("Mine", (type(model),), {"__module__": "__main__"})
    with pytest.raises(
        ValueError, match="Mine is defined in __main__, whose code cannot be saved: put it into a file"
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_files_hold_the_names_of_the_state_dict(tmp_path):
    """`Trainer` resumes with `load_state_dict`, which knows nothing of legacy names."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
