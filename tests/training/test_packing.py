"""Several samples in one row: each as if it were alone, and both losses as in a padded batch."""

import pytest
import torch
from tiny import tiny_model, train_briefly, video_batch
from training_runs import difference, make_samples, one_step

from llava_next_ar.training.collator import LlavaVideoCollator


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    model = tiny_model(attn_implementation=request.param)
    train_briefly(model, video_batch(model.config, [[3], [2]]), steps=2)  # a head that predicts something
    return model


@pytest.fixture
def samples(model):
    return make_samples(model.config)


def forward_backward(model, batch, **options):
    model.zero_grad(set_to_none=True)
    output = model(**batch, **options)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_row_holds_the_samples_one_behind_the_other(samples):
    batch = LlavaVideoCollator(0, packing=True)(samples)
    assert torch.equal(batch["input_ids"][0], torch.cat([sample["input_ids"] for sample in samples]))
    assert "attention_mask" not in batch
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert starts == [sum(lengths[:index]) for index in range(len(lengths))]
    assert (batch["labels"][0, starts] == -100).all()  # no sample predicts the first token of the next one


@pytest.mark.parametrize(
    "counts", [{}, {"num_items_in_batch": 40}, {"num_items_in_batch": 40, "num_videos_in_batch": 5}]
)
@pytest.mark.parametrize("skip_logits", [False, True])
def test_losses_and_gradients_are_those_of_the_padded_batch(model, samples, counts, skip_logits):
    options = {**counts, "skip_logits": skip_logits}
    padded, expected = forward_backward(model, LlavaVideoCollator(0)(samples), **options)
    packed, actual = forward_backward(model, LlavaVideoCollator(0, packing=True)(samples), **options)
    for name in ("loss", "main_loss", "autoregressive_loss"):
        torch.testing.assert_close(packed[name], padded[name], rtol=1e-5, atol=1e-6)
    assert difference(expected, actual) < 1e-5


def test_no_sample_sees_another(model, samples):
    collator = LlavaVideoCollator(0, packing=True)
    with torch.no_grad():
        before = model(**collator(samples), return_reconstruction=True)
        changed = [dict(sample) for sample in samples]
        changed[0]["input_ids"] = changed[0]["input_ids"].clone()
        changed[0]["input_ids"][1] += 1
        changed[0]["pixel_values_videos"] = changed[0]["pixel_values_videos"] + 1
        after = model(**collator(changed), return_reconstruction=True)
    first = len(samples[0]["input_ids"])
    assert not torch.equal(before.logits[:, :first], after.logits[:, :first])
    torch.testing.assert_close(after.logits[:, first:], before.logits[:, first:], rtol=0, atol=1e-6)
    others = before.reconstruction.frame_video > 0
    torch.testing.assert_close(
        after.reconstruction.predictions[others], before.reconstruction.predictions[others], rtol=0, atol=1e-6
    )


def test_padding_of_a_row_is_a_sample_of_its_own(model, samples):
    packed, expected = forward_backward(model, LlavaVideoCollator(0, packing=True)(samples))
    rounded = LlavaVideoCollator(0, packing=True, pad_to_multiple_of=64)(samples)
    assert rounded["input_ids"].shape[1] % 64 == 0 and rounded["position_ids"][0, -1] > 0
    padded, actual = forward_backward(model, rounded)
    torch.testing.assert_close(padded.loss, packed.loss)
    assert difference(expected, actual) < 1e-5


@pytest.mark.parametrize("trainer", ["AutoregressiveTrainer", "Trainer"])
def test_a_step_of_a_trainer_does_not_depend_on_packing(trainer):
    reference = one_step("both", 4, 1, trainer)
    print(f"\n{trainer}, batch x accumulation, max relative difference of gradients, packed against padded")
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        packed = one_step("both", batch_size, accumulation, trainer, packing=True)
        worst = difference(reference["gradients"], packed["gradients"])
        print(f"{batch_size} x {accumulation}  {worst:.1e}")
        assert worst < 1e-5
        assert packed["log"]["loss"] == pytest.approx(reference["log"]["loss"], rel=1e-5)


def test_packing_has_nothing_on_the_left():
    with pytest.raises(ValueError, match="padding_side='left'"):
        LlavaVideoCollator(0, packing=True, padding_side="left")
