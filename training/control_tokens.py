# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Control tokens in the texts of a data set, encoded as plain text.

An answer may quote `<video>` or `<|im_end|>`. In the usual encoding the former would be a placeholder without a video, and the
latter would end the answer. transformers encodes them as text too (`sanitize_control_tokens`), but not together with a mask of
the assistant's tokens.
"""

import copy
from typing import Any

import torch
from tokenizers import AddedToken

_FIRST_STAND_IN = 0xF0000  # a plane of Unicode that no text uses


class ControlTokenEscape:
    """Replaces each control token in a text by a private character, and this character by the token's plain encoding.

    Control tokens are the placeholders of media, the tokenizer's own (end, padding, ...) and special tokens that the chat
    template writes. Other special tokens, such as those that a user added for time stamps, stay as they are.

    Args:
        processor: with a tokenizer and a chat template.
    """

    def __init__(self, processor: Any) -> None:
        self._original = processor
        self._processor: Any = None
        tokenizer = processor.tokenizer
        template = processor.chat_template or ""
        template = "".join(template.values()) if isinstance(template, dict) else template
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        named = [token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)]
        written = [token for token in special if token in template]
        placeholders = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video")]
        tokens = dict.fromkeys(token for token in (*placeholders, *named, *written) if token)
        self._stand_ins = {token: chr(_FIRST_STAND_IN + number) for number, token in enumerate(tokens)}

    def mark(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Any]:
        """Returns the conversation without control tokens in its texts, and the processor that encodes it.

        Raises:
            ValueError: if a text already holds a private character, or a control token has no plain encoding.
        """
        texts = [text for message in messages for text in _texts_of(message)]
        found = [token for token in self._stand_ins if any(token in text for text in texts)]
        if not found:
            return messages, self._original
        for stand_in in self._stand_ins.values():
            if any(stand_in in text for text in texts):
                raise ValueError(f"a text holds {found[0]!r} and the private character U+{ord(stand_in):X}")
        for token in found:
            self._plain_ids(token)
        return [self._marked(message) for message in messages], self._escaping_processor()

    def restore(self, input_ids: torch.Tensor, is_target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inserts the plain encodings into the tokens `[S]` of a marked conversation and into its mask of targets `[S]`."""
        tokenizer = self._escaping_processor().tokenizer
        plain = {tokenizer.convert_tokens_to_ids(char): self._plain_ids(t) for t, char in self._stand_ins.items()}
        ids, targets = [], []
        for token_id, target in zip(input_ids.tolist(), is_target.tolist(), strict=True):
            written = plain.get(token_id, [token_id])
            ids += written
            targets += [target] * len(written)
        return torch.tensor(ids, dtype=input_ids.dtype), torch.tensor(targets, dtype=torch.bool)

    def _plain_ids(self, token: str) -> list[int]:
        tokenizer = self._original.tokenizer
        ids = tokenizer.encode(token, add_special_tokens=False, split_special_tokens=True)
        if tokenizer.convert_tokens_to_ids(token) in ids:
            raise ValueError(f"a text holds the control token {token!r}, which this tokenizer cannot encode as text")
        return ids

    def _escaping_processor(self) -> Any:
        """A copy of the processor whose tokenizer has one token for each private character."""
        if self._processor is None:
            self._processor = copy.copy(self._original)
            self._processor.tokenizer = tokenizer = copy.deepcopy(self._original.tokenizer)
            tokenizer.add_tokens(
                [AddedToken(char, special=True, normalized=False) for char in self._stand_ins.values()],
                special_tokens=True,
            )
        return self._processor

    def _marked(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        if isinstance(content, str):
            return {**message, "content": self._marked_text(content)}
        parts = [{**p, "text": self._marked_text(p["text"])} if p["type"] == "text" else p for p in content]
        return {**message, "content": parts}

    def _marked_text(self, text: str) -> str:
        for token in sorted(self._stand_ins, key=len, reverse=True):  # a token may hold another one
            text = text.replace(token, self._stand_ins[token])
        return text


def _texts_of(message: dict[str, Any]) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
