"""Half precision, 16-bit weights with a float32 head, autocast: finite, and close to float32."""

import os
import sys

import processes
import pytest
import torch
from tiny import LAYOUTS, tiny_model, video_batch

from llava_next_ar.modeling.loss_functions import zero_through


def moved_model(**keys):
    """With a head that predicts something."""
    model = tiny_model(**keys)
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.1)
    return model


def cast(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if "pixel" in name else value for name, value in inputs.items()}


@pytest.mark.parametrize("layout", ["one_token", "slow_fast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inference_in_16_bits(layout, dtype):
    model = moved_model(**LAYOUTS[layout])
    inputs = video_batch(model.config, [[4], [3]])
    inputs.pop("labels")
    expected, surprise = model.predict_next_frames(**inputs), model.surprise(**inputs)
    model.to(dtype)
    for pixels in (inputs, cast(inputs, dtype)):
        actual = model.predict_next_frames(**pixels)
        assert all(frame.dtype == torch.float32 for one in actual for frame in one.predictions)
        for one, other in zip(actual, expected, strict=True):
            for frame, same in zip(one.predictions, other.predictions, strict=True):
                torch.testing.assert_close(frame, same, rtol=0.1, atol=0.1)
        for one, other in zip(model.surprise(**pixels), surprise, strict=True):
            torch.testing.assert_close(one.frames, other.frames, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("lengths", [[[4], [3]], [[], []], [[1], []]], ids=["videos", "text", "one frame"])
@pytest.mark.parametrize("freeze_tower", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_with_16_bit_weights_is_finite(dtype, freeze_tower, lengths):
    """The zero that touches unused parts was a sum of hidden states times 0: NaN in float16 beyond 65504."""
    model = moved_model(freeze_tower=freeze_tower).to(dtype).train()
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(1000)  # hidden states whose sum overflows
    inputs = cast(video_batch(model.config, lengths), dtype)
    loss = model(**inputs, skip_logits=True).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert loss.isfinite() and all(grad is not None for grad in grads.values())
    if not lengths[0]:
        assert not any(grad.any() for name, grad in grads.items() if "autoregressive_module" in name)
        assert all(grad.isfinite().all() for name, grad in grads.items() if "tower" in name or "autoregress" in name)


def test_a_zero_is_a_zero_whatever_it_comes_through():
    values = [torch.full((200,), 60000.0, dtype=torch.float16), torch.tensor([torch.inf, torch.nan])]
    values = [value.requires_grad_() for value in values]
    zero = zero_through(*values)
    zero.backward()
    assert zero == 0 and all(value.grad is not None and not value.grad.any() for value in values)


def test_a_float32_head_on_bfloat16_weights():
    model = moved_model().train()
    inputs = video_batch(model.config, [[4], [3]])
    expected = model(**inputs, return_reconstruction=True)
    model.to(torch.bfloat16).autoregressive_module.float()
    output = model(**inputs, return_reconstruction=True)
    torch.testing.assert_close(output.autoregressive_loss, expected.autoregressive_loss, rtol=0.05, atol=0.02)
    output.loss.backward()
    head = [p.grad for p in model.autoregressive_module.parameters()]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in head)
    text = model(**video_batch(model.config, [[]]))
    text.loss.backward()
    assert text.loss.isfinite()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_scaled_loss(dtype, checkpointing):
    model = moved_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    inputs = video_batch(model.config, [[4], [3]])
    expected = model(**inputs).loss
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", dtype=dtype):
            loss = model(**inputs).loss
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(expected.item(), rel=0.02)
    assert losses[-1] < losses[0] and scaler.get_scale() in (1.0, 1024.0), "a step was skipped"


def test_the_modules_may_be_imported_under_any_default_device():
    """The wavelengths were tensors of the class: without values for the whole process if it was made on `meta`."""
    program = (
        "import torch\n"
        "with torch.device('meta'):\n"
        "    import llava_next_ar.modeling.modeling_llava_next_ar\n"
        "from tiny import tiny_model, video_batch\n"
        "model = tiny_model()\n"
        "print(float(model(**video_batch(model.config, [[3]])).autoregressive_loss))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = processes.run_python("-c", program, env=environment, timeout=240)
    model = tiny_model()
    expected = model(**video_batch(model.config, [[3]])).autoregressive_loss.item()
    assert float(printed.split()[-1]) == pytest.approx(expected, rel=1e-6)
