"""Device memory of a training step, from a model on the meta device, without weights.

    weights       every parameter in its precision (the frozen copy of a trained tower included), or in four bits
    gradients     every parameter that trains, in its precision
    optimizer     two moments of each such parameter with Adam(W), half a byte to none with others (`OPTIMIZER_BYTES`)
    copies        16-bit copies of float32 matrices, with bf16 or fp16
    activations   tensors that autograd saves for the backward pass. The language model, the projector, the head and, if it
                  trains, the tower run on the meta device, and each saved tensor is counted once. Attention counts as a
                  fused kernel (queries, keys, values and the result) unless it is eager. The size of one layer is added for
                  the gradients that pass through it. With activation checkpointing, the input of each layer, and all of
                  one layer
    logits        targets x vocabulary x (two copies in 16 bits, if there are such, and three in float32), of the chunk of
                  targets that `LOGITS_AT_A_TIME` lets exist at a time
    inputs        the pixels of the batch in float32
    mask          of a packed row, where attention needs one (sdpa, eager): tokens x tokens, as it is and as it is added

    total = weights + gradients + optimizer + copies + max(activations + logits + inputs + mask, the tower as it runs
            frozen, the optimizer's own copy of the gradients)

Not included: memory of the framework, fragmentation, buffers of communication. Sharding by FSDP or ZeRO divides the first three
(ZeRO-2: gradients and optimizer) by the number of devices.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..modeling.loss_functions import LOGITS_AT_A_TIME

# Bytes per trained parameter by the beginning of an optimizer's name; the first match counts. Without a match: two copies.
OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0.1, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion": 4}
QUANTIZED_BYTES = 0.516  # of a weight in four bits, with a scale of eight bits for each 64 of them


def step_memory(
    model: nn.Module,
    *,
    batch_size: int,
    length: int,
    num_frames: int,
    num_targets: int,
    optimizer: str = "adamw_torch_fused",
    compute_dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    num_quantized: int = 0,
    masked_length: int = 0,
) -> dict[str, int]:
    """Bytes by part, and their `total`; see the module.

    Args:
        model: on the meta device, with what trains set to train; with adapters or without.
        batch_size: rows of a batch.
        length: tokens of a row, padding included.
        num_frames, num_targets: of the batch.
        optimizer: name of a transformers optimizer.
        compute_dtype: of autocast, or of the weights.
        checkpointing: of activations.
        num_quantized: weights of linear layers that will be loaded in 4 bits.
        masked_length: tokens of a row whose attention has a mask of all of them.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    is_mixed = compute_dtype != torch.float32
    per_parameter = next((n for name, n in OPTIMIZER_BYTES.items() if optimizer.startswith(name)), None)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Without quantization these weights would have the precision of the vocabulary, which is frozen too.
    saved = round(num_quantized * (base.get_input_embeddings().weight.dtype.itemsize - QUANTIZED_BYTES))
    parts = {
        "weights": sum(map(_bytes, parameters)) - saved,
        "gradients": sum(map(_bytes, trained)),
        "optimizer": sum(
            2 * _bytes(p) if per_parameter is None else round(per_parameter * p.numel()) for p in trained
        ),
        "copies": sum(2 * p.numel() for p in trained if is_mixed and p.dtype == torch.float32 and p.ndim > 1),
    }
    config = base.config
    cast = copy.deepcopy(base).to(compute_dtype).train()
    text, vision = config.text_config, config.vision_config
    size = compute_dtype.itemsize
    patches = config.frame_token_layout.patches_height * config.frame_token_layout.patches_width
    tower = cast.model.vision_tower
    pixels = (num_frames, vision.num_channels, vision.image_size, vision.image_size)

    activations = 0
    if num_frames:
        if any(p.requires_grad for p in tower.parameters()):
            activations += _saved(tower, lambda: tower(_empty(*pixels, dtype=compute_dtype)), checkpointing, vision)
        projector, features = cast.model.multi_modal_projector, (num_frames * patches, config.vision_feature_dim)
        activations += _saved(projector, lambda: projector(_empty(*features, dtype=compute_dtype)))
    bridge = [cast.get_input_embeddings(), cast.model.multi_modal_projector]
    starts_graph = any(p.requires_grad for part in bridge for p in part.parameters())
    language_model = cast.model.language_model
    activations += _saved(
        language_model,
        lambda: language_model(
            inputs_embeds=_empty(batch_size, length, text.hidden_size, dtype=compute_dtype).requires_grad_(
                starts_graph
            ),
            position_ids=_empty(1, length, dtype=torch.long),
            attention_mask={"full_attention": None, "sliding_attention": None},
            use_cache=False,
        ),
        checkpointing,
        text,
        row_bytes=batch_size * length * text.hidden_size * size,
    )
    if cast.autoregressive_module is not None and num_frames:
        activations += _saved(cast.autoregressive_module, lambda: _run_head(cast, num_frames, patches, compute_dtype))
    parts["activations"] = activations
    num_logits = min(num_targets * text.vocab_size, LOGITS_AT_A_TIME)
    parts["logits"] = num_logits * (12 + (2 * size if is_mixed else 0))
    parts["inputs"] = 4 * num_frames * vision.num_channels * vision.image_size**2
    passing = num_frames * patches * (2 * vision.intermediate_size + 6 * vision.hidden_size) * size + parts["inputs"]
    fixed = sum(parts[name] for name in ("weights", "gradients", "optimizer", "copies"))
    parts["mask"] = masked_length**2 * (1 + size)
    forward = sum(parts[name] for name in ("activations", "logits", "inputs", "mask"))
    working = max(forward, passing, parts["gradients"])
    return {**parts, "total": fixed + working}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _saved(
    module: nn.Module,
    run: Callable[[], Any],
    checkpointing: bool = False,
    layers: Any = None,
    row_bytes: int = 0,
) -> int:
    """Returns the bytes that autograd saves in a run on the meta device, without parameters.

    Args:
        layers: configuration with the number of equal layers. The gradients that pass through one layer are added. With
            checkpointing, all tensors of one layer count, and the input of each, of `row_bytes`.
    """
    of_module = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in of_module:
            kept[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        _fused_attention(),
        torch.device("meta"),
    ):
        run()
    total = sum(storage.nbytes() for storage in kept.values())
    if layers is None or not total:
        return total
    of_one = total // layers.num_hidden_layers
    return of_one + (min(total, of_one + layers.num_hidden_layers * row_bytes) if checkpointing else total)


def _run_head(model: Any, num_frames: int, patches: int, dtype: torch.dtype) -> torch.Tensor:
    """Runs the head's predictor on one clip of all frames; returns its loss in float32."""
    head, layout = model.autoregressive_module, model.config.frame_token_layout
    height, width = layout.frame_grid()
    hidden_size = model.config.text_config.hidden_size
    states = _empty(num_frames, height * width, hidden_size, dtype=dtype).requires_grad_()
    states = head.input_projection(head.input_norm(states))
    visible = _empty(num_frames, min(head.config.num_hist, num_frames), dtype=torch.long)
    for block in head.blocks:
        states = block(states, visible, None)
    change = head.change(head.output_norm(states)).float()
    return (change + torch.empty_like(change)).square().mean()


class _FusedAttention(torch.autograd.Function):
    """Saved tensors of a fused kernel: its inputs, its result and one number for each query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        attended = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, attended, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        raise NotImplementedError("there is nothing to compute on the meta device")


@contextmanager
def _fused_attention() -> Any:
    """Context with a fused attention: on the meta device torch takes a path that saves all attention weights."""
    with mock.patch.object(
        nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, **options: _FusedAttention.apply(query, key, value),
    ):
        yield
