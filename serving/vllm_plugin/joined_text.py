# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Prompts with a time instruction: tokens across the border of what vLLM puts in and the text behind it."""

from collections.abc import Iterable
from typing import Any


def join_texts(prompt: list[int], placeholders: Iterable[Any], tokenizer: Any) -> list[int]:
    """The prompt with the text behind each placeholder encoded in one piece.

    vLLM encodes the time instruction alone. Its last full stop and the newline behind it are one token of Qwen's
    vocabulary: the prompt would be another than in training.

    Args:
        prompt: ids of the whole prompt.
        placeholders: vLLM's `PlaceholderFeaturesInfo` in order. They are changed in place: to their new positions, and to
            the tokens of images and videos alone.
        tokenizer: of the prompt.
    """
    special = set(tokenizer.get_added_vocab().values())
    joined: list[int] = []
    at = 0
    for placeholder in placeholders:
        tokens = placeholder.tokens
        num_embeds = len(tokens) if placeholder.is_embed is None else int(placeholder.is_embed.sum())
        begin, end = placeholder.start_idx + num_embeds, placeholder.start_idx + len(tokens)
        joined += prompt[at : placeholder.start_idx]
        placeholder.start_idx, placeholder.tokens, placeholder.is_embed = len(joined), tokens[:num_embeds], None
        joined += tokens[:num_embeds]
        at = begin
        if end > begin:
            at = next((index for index in range(end, len(prompt)) if prompt[index] in special), len(prompt))
            text = tokenizer.decode(prompt[begin:at], skip_special_tokens=False)
            joined += tokenizer.encode(text, add_special_tokens=False)
    return joined + prompt[at:]
