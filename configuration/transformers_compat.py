# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Replacements for names that the oldest supported transformers lacks. No other module depends on the release.

Each entry names the release that brought it, and is deleted when `MINIMUM_TRANSFORMERS` reaches that release.
"""

import inspect
import re

import torch
from transformers import GenerationConfig, LlavaOnevisionModel, PreTrainedModel
from transformers.generation import utils as generation_utils
from transformers.utils import output_capturing

try:  # 5.21
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """`[B, S, D]` to its last `logits_to_keep` positions (0 keeps all), or to those of a 1-D tensor."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept]


try:  # 5.23
    from transformers.processing_utils import _MARKED_RE as MARKED_CONTROL_TOKEN
except ImportError:
    MARKED_CONTROL_TOKEN = re.compile("(?!)")  # matches nothing: no control token of a user's text is marked

_CAN_SELECT_HIDDEN_STATES = hasattr(output_capturing, "select_hidden_states")  # 5.23
_CAN_PREFILL_IN_CHUNKS = hasattr(generation_utils, "_slice_mm_encoder_output")  # 5.23

# The argument of `TrainingArguments`; 5.23 brought this name, and warns about the old one.
_CAN_NAME_ACTIVATIONS = hasattr(PreTrainedModel, "activation_checkpointing_enable")
ACTIVATION_CHECKPOINTING = "activation_checkpointing" if _CAN_NAME_ACTIVATIONS else "gradient_checkpointing"

# The argument of a language model that takes its cache; 5.24 brought the short name, and warns about the old one.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlavaOnevisionModel.forward).parameters else "past_key_values"

__all__ = [
    "ACTIVATION_CHECKPOINTING",
    "CACHE_ARGUMENT",
    "MARKED_CONTROL_TOKEN",
    "check_prefill",
    "hidden_states_to_keep",
    "slice_logits_to_keep",
]


def hidden_states_to_keep(layer: int | list[int]) -> bool | int | list[int]:
    """Value of `output_hidden_states` with which a vision tower returns `layer`: that layer, or True for all."""
    return layer if _CAN_SELECT_HIDDEN_STATES else True


def check_prefill(generation_config: GenerationConfig) -> None:
    """Validates `prefill_chunk_size`: earlier releases give each chunk the features of the first one, without an error.

    Raises:
        ValueError: if a `prefill_chunk_size` is set that this release cannot apply.
    """
    if generation_config.prefill_chunk_size is not None and not _CAN_PREFILL_IN_CHUNKS:
        raise ValueError(
            f"prefill_chunk_size={generation_config.prefill_chunk_size} needs transformers>=5.23: earlier ones give every "
            "chunk the images and videos of the first; leave it at None"
        )
