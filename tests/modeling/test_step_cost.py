"""Work of a training step: the frozen parts run once and without a graph, few operations, and no wait for the device."""

import collections
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from tiny import IMAGE_SIZE, IMAGE_TOKEN, LAYOUTS, ONEVISION, tiny_model, video_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llava_next_ar.modeling import modeling_llava_next_ar, video_language_model
from llava_next_ar.modeling.video_language_model import to_host

MEDIA = ["video", "image", "text"]


def checkpointed(model, use_reentrant: bool = False):
    """In training mode with activation checkpointing, as Trainer switches it on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that the oldest supported transformers has
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model.train()


def batch_of(config, media: str) -> dict[str, torch.Tensor]:
    if media == "video":
        return video_batch(config, [[4], [3]])
    inputs = video_batch(config, [[]], text=12)
    if media == "image":
        inputs["input_ids"] = torch.cat([torch.full((1, 26), IMAGE_TOKEN), inputs["input_ids"]], dim=1)
        inputs["labels"] = torch.nn.functional.pad(inputs["labels"], (26, 0), value=-100)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["pixel_values"] = torch.randn(
            1, 1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(3)
        )
        inputs["image_sizes"] = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]])
        inputs["batch_num_images"] = torch.tensor([2])  # no tiles
    return inputs


def attention_calls(model, inputs) -> dict[str, set[int]]:
    """Number of calls of each attention of tower and language model in a step, the backward pass included."""
    calls = collections.Counter()

    def count(name):
        return lambda *_: calls.update([name])

    hooks = [
        module.register_forward_hook(count(name))
        for name, module in model.named_modules()
        if name.endswith("self_attn")
    ]
    model(**inputs).loss.backward()
    for hook in hooks:
        hook.remove()
    parts = ("vision_tower", "language_model")
    return {part: {count for name, count in calls.items() if part in name} for part in parts}


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- what is frozen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("media", MEDIA)
def test_under_checkpointing_the_frozen_tower_runs_once_and_builds_no_graph(monkeypatch, media, use_reentrant):
    """Checkpointing makes the tower's embeddings require a gradient: it ran twice and was back-propagated for nothing."""
    model = checkpointed(tiny_model(), use_reentrant)
    inputs = batch_of(model.config, media)
    seen = []
    project = model.model.multi_modal_projector.forward
    monkeypatch.setattr(
        model.model.multi_modal_projector,
        "forward",
        lambda features: seen.append(features.requires_grad) or project(features),
    )
    assert attention_calls(model, inputs) == {"vision_tower": {1}, "language_model": {2}}
    assert seen == [False]


@pytest.mark.parametrize("media", MEDIA)
def test_gradients_are_bit_for_bit_those_of_a_tower_with_a_graph(monkeypatch, media):
    model = checkpointed(tiny_model())
    inputs = batch_of(model.config, media)
    actual = gradients(model, inputs)
    parameter = next(model.model.vision_tower.parameters())
    parameter.requires_grad_(True)  # as long as one trains, there is a graph
    monkeypatch.setattr(model.autoregressive_module, "create_teacher", lambda tower: None)
    monkeypatch.setattr(
        modeling_llava_next_ar.LlavaNextARForConditionalGeneration, "create_teacher", lambda model: None
    )
    monkeypatch.setattr(
        type(model.autoregressive_module), "teacher_features", lambda self, tower, pixels, own=None: own.detach()
    )
    assert attention_calls(model, inputs)["vision_tower"] == {2}
    expected = gradients(model, inputs)
    expected.pop(next(name for name, own in model.named_parameters() if own is parameter))
    assert actual.keys() == expected.keys() and len(actual) > 20
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_gradient_for_the_pixels_passes_the_frozen_tower():
    model = tiny_model().train()
    inputs = batch_of(model.config, "video")
    inputs["pixel_values_videos"].requires_grad_()
    model(**inputs).main_loss.backward()
    assert inputs["pixel_values_videos"].grad.abs().max() > 0


def test_a_trained_tower_is_recomputed_and_gets_its_gradient():
    model = checkpointed(tiny_model(freeze_tower=False))
    model.create_teacher()
    inputs = batch_of(model.config, "video")
    calls = attention_calls(model, inputs)
    assert calls["vision_tower"] == {2}
    names = {name for name, p in model.model.vision_tower.named_parameters() if p.requires_grad}
    assert names == {name for name, p in model.model.vision_tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("media", MEDIA)
def test_adapters_on_the_tower_get_the_gradient_that_they_get_without_checkpointing(media, use_reentrant):
    peft = pytest.importorskip("peft")

    def step(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny_model()
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=r".*(vision_tower|language_model).*q_proj", init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).train()
        if checkpointing:
            checkpointed(model, use_reentrant)
        return gradients(adapted, batch_of(model.config, media))

    actual, expected = step(True), step(False)
    assert actual.keys() == expected.keys() and sum("vision_tower" in name for name in actual) == 4
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-7)
    assert media == "text" or all(value.any() for name, value in actual.items() if "vision_tower" in name)


@pytest.mark.parametrize("media", MEDIA)
def test_below_a_head_that_trains_alone_the_language_model_builds_no_graph(media):
    model = tiny_model()
    model.requires_grad_(False).autoregressive_module.requires_grad_(True)
    checkpointed(model)
    inputs = batch_of(model.config, media)
    assert attention_calls(model, inputs) == {"vision_tower": {1}, "language_model": {1}}
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grads == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_layers_below_the_first_that_trains_run_once(part, use_reentrant):
    """With the upper half of a part alone to be trained, the lower half was recomputed and back-propagated."""

    def step(checkpointing: bool):
        keys = {name: {**ONEVISION[name], "num_hidden_layers": 4} for name in ("vision_config", "text_config")}
        model = tiny_model(**keys)
        model.requires_grad_(False)
        stack = getattr(model.model, part)
        for layer in (stack.encoder.layers if part == "vision_tower" else stack.layers)[2:]:
            layer.requires_grad_(True)
        model.freeze_unused_parts()
        model.create_teacher()
        if checkpointing:
            checkpointed(model, use_reentrant)
        model.train()
        calls = collections.Counter()
        for name, module in model.named_modules():
            if part in name and name.endswith("self_attn") and "teacher" not in name:
                module.register_forward_hook(lambda *_, name=name: calls.update([int(name.split(".")[-2])]))
        return gradients(model, batch_of(model.config, "video")), dict(calls), model

    actual, calls, model = step(True)
    assert calls == {0: 1, 1: 1, 2: 2, 3: 2}
    expected, _, _ = step(False)
    assert actual.keys() == expected.keys() and len(actual) > 10
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert torch.is_grad_enabled()


def test_a_step_with_a_frozen_tower_costs_one_forward_pass_of_it():
    def flops(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    model = checkpointed(tiny_model())
    inputs = batch_of(model.config, "video")
    frames = inputs["pixel_values_videos"][inputs["video_frame_mask"]]
    with torch.no_grad():
        tower = flops(lambda: model.model.vision_tower(frames))
    frozen = flops(lambda: model(**inputs).loss.backward())
    with_graph = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].clone().requires_grad_()}
    # Its layers, without the embedding of patches, were run again, and as many operations gave the activations' gradient.
    assert flops(lambda: model(**with_graph).loss.backward()) - frozen > 1.5 * tower


# ---- operations and waits -------------------------------------------------------------------------------------------


class _Operations(TorchDispatchMode):
    """Counts operations, and those by which the host waits for the device, by the module that asks for them."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select", "equal.default")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.waits = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        indices = args[1] if func._overloadpacket is torch.ops.aten.index and len(args) > 1 else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or any(name in str(func) for name in self.WAITS):
            frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            self.waits[frames[-2].filename.rsplit("/", 1)[-1]] += 1
        return func(*args, **(kwargs or {}))


class _OnHost(torch.Tensor):
    """A tensor that was read from the device; what is computed from it is of this class, too."""


# Forward operations of the head, of the whole step and of its backward pass, as measured; they may become less. They do
# not depend on the number of videos and frames.
BUDGET = {
    "one_token": (140, 480, 620),
    "grid": (140, 480, 620),
    "frame": (140, 480, 620),
    "no_token": (140, 480, 620),
    "slow_fast": (190, 550, 700),
}


@pytest.mark.parametrize("lengths", [[[32]] * 8, [[32], [20], [7], [1, 9]]], ids=["alike", "mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operations_and_waits_of_a_step_stay_within_their_budget(monkeypatch, layout, lengths):
    """8 videos of 32 frames took 2,758 operations (4,911 with slow and fast frames) and waited 46 times."""
    model = tiny_model(**LAYOUTS[layout]).train()
    inputs = video_batch(model.config, lengths)
    inputs["video_layout"] = model.config.frame_token_layout.as_tensor().expand(len(inputs["video_frame_mask"]), -1)
    head, in_head = model.autoregressive_module, _Operations()
    forward = head.forward

    def counted(*args, **kwargs):
        with in_head:
            return forward(*args, **kwargs)

    model(**inputs, skip_logits=True)  # makes the index tensors
    monkeypatch.setattr(head, "forward", counted)
    with _Operations() as step:
        loss = model(**inputs, skip_logits=True, num_items_in_batch=torch.tensor(8)).loss
    with _Operations() as backward:
        loss.backward()
    most_in_head, most, most_backward = BUDGET[layout]
    mixed = 60 * (lengths[0] != lengths[1])  # padding is masked, in the tower's batch too
    assert in_head.count <= most_in_head + mixed
    assert step.count <= most + 2 * mixed and backward.count <= most_backward + mixed
    # transformers reads the mask, before the language model's first layer.
    assert not backward.waits and set(step.waits) <= {"masking_utils.py"} and step.waits.total() <= 2


@pytest.mark.parametrize("packed", [False, True])
def test_after_the_read_of_the_batch_the_host_looks_at_no_other_tensor(monkeypatch, packed):
    """On a GPU each such look waits for all that was launched before. Here the tensors that were read are marked."""
    model = tiny_model(**LAYOUTS["slow_fast"]).train()
    inputs = video_batch(model.config, [[5], [3]])
    if packed:
        inputs.pop("attention_mask")
        rows = [inputs["input_ids"].shape[1]] * 2
        inputs["position_ids"] = torch.cat([torch.arange(length) for length in rows])[None]
        inputs |= {name: inputs[name].reshape(1, -1) for name in ("input_ids", "labels")}
    model(**inputs, skip_logits=True)
    reads, looks, package = [], [], str(Path(modeling_llava_next_ar.__file__).parents[1])

    def marked(*tensors):
        reads.append(tensors)
        return [value if value is None else value.clone().as_subclass(_OnHost) for value in to_host(*tensors)]

    for module in (modeling_llava_next_ar, video_language_model):
        monkeypatch.setattr(module, "to_host", marked)
    for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        original = getattr(torch.Tensor, name)

        def look(tensor, *args, original=original, name=name, **kwargs):
            caller = traceback.extract_stack()[-2].filename
            is_ours = caller.startswith(package) and "site-packages" not in caller  # .venv may lie in the checkout
            if is_ours and not isinstance(tensor, _OnHost):
                looks.append((name, caller))
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, look)
    model(**inputs, skip_logits=True, num_items_in_batch=torch.tensor(8)).loss.backward()
    # The features' own read is of what lies on the host already.
    assert len(reads) == 2 and all(value is None or isinstance(value, _OnHost) for value in reads[1])
    assert not looks
