# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""The vision tower and its use as a teacher: features, adapters, trainable parts.

Shape letters: F frames, P patches of a frame, Dv width of the vision features.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..configuration.transformers_compat import hidden_states_to_keep


def encode_frames(
    tower: nn.Module, pixel_values: torch.Tensor, layer: int | list[int], strategy: str, **kwargs: Any
) -> tuple[Any, torch.Tensor]:
    """Runs a vision tower, without a graph if it is frozen.

    Activation checkpointing makes the output of every embedding require a gradient. With a graph, a frozen tower would run
    twice and be back-propagated for nothing.

    Args:
        tower: a transformers vision model.
        pixel_values: `[F, 3, H, W]`.
        layer, strategy: `vision_feature_layer` and `vision_feature_select_strategy` of the configuration.
        kwargs: for the tower.

    Returns:
        The tower's output, and the features that the projector reads, `[F, P, Dv]`.
    """
    # Without the name of the layer, the tower stores the hidden states of all layers.
    kept = kwargs.pop("output_hidden_states", None) or hidden_states_to_keep(layer)
    with no_graph_of_frozen(tower, pixel_values):
        outputs = tower(pixel_values, output_hidden_states=kept, return_dict=True, **kwargs)
    layers = [layer] if isinstance(layer, int) else layer
    features = torch.cat([outputs.hidden_states[index] for index in layers], dim=-1)
    return outputs, features[:, 1:] if strategy == "default" else features


@contextmanager
def no_graph_of_frozen(tower: nn.Module, pixel_values: torch.Tensor) -> Iterator[None]:
    """Context in which a vision tower builds no graph below its first trainable layer; later modules build one."""
    layers = getattr(getattr(tower, "encoder", None), "layers", ())
    below_trains = pixel_values.requires_grad or trains(getattr(tower, "embeddings", None))
    with no_graph_below([tower], pixel_values.requires_grad), no_graph_below(layers, below_trains):
        yield


def trains(*parts: nn.Module | nn.Parameter | None) -> bool:
    """True if a parameter among modules and parameters requires a gradient."""
    return any(
        parameter.requires_grad
        for part in parts
        if part is not None
        for parameter in (part.parameters() if isinstance(part, nn.Module) else (part,))
    )


@contextmanager
def no_graph_below(layers: Sequence[nn.Module], below_trains: bool) -> Iterator[None]:
    """Context in which a forward pass through layers builds no graph below the first trainable one.

    Args:
        layers: in the order in which they run.
        below_trains: a gradient is needed for the input of the first.
    """
    first = next((index for index, layer in enumerate(layers) if trains(layer)), len(layers))
    if below_trains or first == 0 or not torch.is_grad_enabled():
        yield
        return
    # Checkpointing would switch gradients off again within a layer; without a graph it saves nothing.
    checkpointed = [layer for layer in layers[:first] if getattr(layer, "gradient_checkpointing", False)]

    def start_graph(layer: nn.Module, args: Any, output: Any) -> None:
        torch.set_grad_enabled(True)
        if first < len(layers):  # reentrant checkpoints pass on gradients only where an input requires one
            (output if isinstance(output, torch.Tensor) else output[0]).requires_grad_()

    hook = layers[first - 1].register_forward_hook(start_graph)
    try:
        for layer in checkpointed:
            layer.gradient_checkpointing = False
        with torch.no_grad():
            yield
    finally:
        hook.remove()
        for layer in checkpointed:
            layer.gradient_checkpointing = True


def adapter_layers(module: nn.Module) -> list[nn.Module]:
    """PEFT's layers in a module."""
    # Detected by their flag, without importing PEFT. Every transformers model has a method of that name, hence the test for
    # bool.
    return [layer for layer in module.modules() if isinstance(getattr(layer, "disable_adapters", None), bool)]


def copy_without_adapters(module: nn.Module) -> nn.Module:
    """Copies a module, with the wrapped layers in the place of PEFT's layers.

    Raises:
        RuntimeError: if an adapter is merged into its layer, which overwrites the weights of the layer.
    """
    if any(getattr(layer, "merged", False) for layer in adapter_layers(module)):
        raise RuntimeError("adapters are merged into the vision tower: unmerge them (unmerge_adapter) first")
    return _unwrapped(copy.deepcopy(module))


def _unwrapped(module: nn.Module) -> nn.Module:
    while isinstance(getattr(module, "disable_adapters", None), bool):
        module = module.base_layer if hasattr(module, "base_layer") else module.original_module
    for name, child in module.named_children():
        setattr(module, name, _unwrapped(child))
    return module


def tower_trains(vision_tower: nn.Module, adapters: list[nn.Module]) -> bool:
    """True if weights of the tower itself train, without those of adapters."""
    adapter_ids = {
        id(parameter)
        for layer in adapters
        for name, parameter in layer.named_parameters()
        if not name.startswith(("base_layer.", "original_module."))
    }
    return any(p.requires_grad and id(p) not in adapter_ids for p in vision_tower.parameters())


class Unregistered:
    """Holds a module that belongs to another one, out of sight of `parameters()` and `state_dict()`.

    A copy of the whole model holds the copied module; a copy of the holder's owner alone (PEFT's `modules_to_save`) still
    holds the original, not a hidden duplicate of it.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> "Unregistered":
        return Unregistered(memo.get(id(self.module), self.module))


@contextmanager
def adapters_off(layers: list[nn.Module]) -> Iterator[None]:
    """Context in which these layers run without their adapters."""
    enabled = [layer for layer in layers if not layer.disable_adapters]
    trainable = [(parameter, parameter.requires_grad) for layer in enabled for parameter in layer.parameters()]
    for layer in enabled:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in enabled:
            layer.enable_adapters(True)
        for parameter, requires_grad in trainable:  # PEFT makes all adapters trainable that it switches on
            parameter.requires_grad_(requires_grad)


def has_several_ranks() -> bool:
    """True in distributed training with more than one process."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
