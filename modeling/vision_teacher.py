# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""What the head must know of a vision tower to use it as its teacher: which features are read, what of it trains, adapters.

Shape letters: F frames, P patches of a frame, Dv width of the vision features.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def select_vision_features(
    hidden_states: Sequence[torch.Tensor], layer: int | list[int], strategy: str
) -> torch.Tensor:
    """The features that the projector reads: `[F, P, Dv]` from the vision tower's hidden states."""
    if isinstance(layer, int):
        features = hidden_states[layer]
    else:
        features = torch.cat([hidden_states[index] for index in layer], dim=-1)
    return features[:, 1:] if strategy == "default" else features


def adapter_layers(module: nn.Module) -> list[nn.Module]:
    """PEFT's layers in a module."""
    # Known by their flag: PEFT need not be installed here. (Every transformers model has a method of that name, hence the
    # test for bool.)
    return [layer for layer in module.modules() if isinstance(getattr(layer, "disable_adapters", None), bool)]


def copy_without_adapters(module: nn.Module) -> nn.Module:
    """A copy of a module in which what PEFT's layers wrap is in their place.

    Raises:
        RuntimeError: if an adapter is merged into its layer, whose own weights are then gone.
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
    """Whether weights of the tower itself train; those of adapters do not count."""
    of_adapters = {
        id(parameter)
        for layer in adapters
        for name, parameter in layer.named_parameters()
        if not name.startswith(("base_layer.", "original_module."))
    }
    return any(p.requires_grad and id(p) not in of_adapters for p in vision_tower.parameters())


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
    """While it lasts, these layers do what they did before they had adapters."""
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
