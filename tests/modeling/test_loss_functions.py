"""The loss over supervised positions: whichever way it is computed, the same number and gradient."""

import importlib.util
import os
import sys

import processes
import pytest
import torch
from torch import nn

from llava_next_ar.modeling import loss_functions
from llava_next_ar.modeling.loss_functions import summed_cross_entropy

VOCABULARY, HIDDEN = 40, 8


@pytest.fixture
def inputs():
    hidden_states = torch.randn(23, HIDDEN, requires_grad=True)
    return nn.Linear(HIDDEN, VOCABULARY, bias=False), hidden_states, torch.randint(0, VOCABULARY, (23,))


@pytest.fixture
def chunks(monkeypatch) -> list[int]:
    """Two positions at a time; how many the projection was given at each call."""
    monkeypatch.setattr(loss_functions, "LOGITS_AT_A_TIME", 2 * VOCABULARY)
    sizes = []
    monkeypatch.setattr(nn.Linear, "forward", _recording(nn.Linear.forward, sizes))
    return sizes


def _recording(forward, sizes: list[int]):
    def recorded(self, x):
        sizes.append(len(x))
        return forward(self, x)

    return recorded


def result(lm_head, hidden_states, targets) -> list[torch.Tensor]:
    lm_head.weight.grad = hidden_states.grad = None
    loss = summed_cross_entropy(lm_head, hidden_states, targets)
    loss.backward()
    return [loss.detach(), lm_head.weight.grad.clone(), hidden_states.grad.clone()]


def expected(lm_head, hidden_states, targets) -> list[torch.Tensor]:
    loss = nn.functional.cross_entropy(hidden_states @ lm_head.weight.T, targets, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss, [lm_head.weight, hidden_states])]


def test_in_chunks(inputs, chunks):
    torch.testing.assert_close(result(*inputs), expected(*inputs))
    assert max(chunks) == 2 and sum(chunks) == 2 * 23  # forward, and again in the backward pass


def test_no_target_at_all(inputs, chunks):
    lm_head, hidden_states, targets = inputs
    assert result(lm_head, hidden_states[:0].detach().requires_grad_(), targets[:0])[0] == 0
    assert chunks == [0]  # every rank runs the projection


def test_in_one_call_where_ranks_gather_the_weights_at_each(inputs, chunks):
    lm_head, hidden_states, targets = inputs
    lm_head.weight.ds_id = 3  # as DeepSpeed marks what it shards
    torch.testing.assert_close(result(*inputs), expected(*inputs))
    assert chunks == [23]


class _Adapted(nn.Linear):
    """As an adapter: its output is not that of its weight alone."""

    def forward(self, x):
        return super().forward(x) + 1


def test_the_fused_kernel_gets_a_plain_projection_only(inputs, chunks, monkeypatch):
    calls = []

    def kernel(weight, hidden_states, targets):
        calls.append(len(targets))
        return nn.functional.cross_entropy(hidden_states @ weight.T, targets, reduction="sum")

    monkeypatch.setattr(loss_functions, "fused_cross_entropy", lambda device_type: kernel)
    torch.testing.assert_close(result(*inputs), expected(*inputs))
    assert calls == [23] and not chunks
    lm_head, hidden_states, targets = inputs
    adapted = _Adapted(HIDDEN, VOCABULARY, bias=False)
    result(adapted, hidden_states, targets)
    assert calls == [23] and max(chunks) == 2
    lm_head.weight.ds_id = 3
    result(*inputs)
    assert calls == [23] and chunks[-1] == 23


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton")),
    reason="liger-kernel or triton is not installed",
)
def test_ligers_kernel_gives_the_same():
    """On a CPU, through Triton's interpreter."""
    code = (
        "import torch\n"
        "from test_loss_functions import HIDDEN, VOCABULARY, expected, loss_functions, result\n"
        "kernel = loss_functions.fused_cross_entropy('cuda')\n"
        "loss_functions.fused_cross_entropy = lambda device_type: kernel\n"
        "inputs = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False), torch.randn(23, HIDDEN, requires_grad=True)\n"
        "inputs = *inputs, torch.randint(0, VOCABULARY, (23,))\n"
        "torch.testing.assert_close(result(*inputs), expected(*inputs), rtol=1e-4, atol=1e-5)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes.run([sys.executable, "-c", code], env=environment)
