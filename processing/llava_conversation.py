# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""LLaVA's conversations: how they are written for the language model, and how its data become chat messages."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
_LLAVA_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

# LLaVA-NeXT's `qwen_1_5` conversation. Media keep their place among the parts of a message and are followed by a
# newline, the last part excepted. What the assistant says, its closing token included, is what is trained on.
DEFAULT_CHAT_TEMPLATE = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] != 'text' -%}"
    "{{- raise_exception('an assistant message holds text only, got a part of type ' + part['type']) -}}"
    "{%- endif -%}"
    "{{- part['text'] -}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endgeneration -%}"
    "{%- else -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- elif part['type'] in ['image', 'video'] -%}"
    "{{- {'image': '<image>', 'video': '<video>'}[part['type']] -}}{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}"
    "{%- else -%}"
    "{{- raise_exception('a content part is text, image or video, got ' + part['type'] + ' as its type') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


# Where a content part of each kind may have its medium, in the order in which transformers looks.
_MEDIA_KEYS = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}


def check_messages(conversation: Any, *, with_media: bool) -> None:
    """Refuses what is no conversation, or batch of conversations, before a chat template stumbles over it.

    Roles and kinds of parts other than the usual ones are left to the template.

    Args:
        conversation: as for `apply_chat_template`.
        with_media: whether the media are going to be read, so that a video part needs one.

    Raises:
        ValueError: naming the place, what was found there and what was expected.
    """
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError(f"conversation must be a list of messages that is not empty, got {_shown(conversation)}")
    if all(isinstance(item, (list, tuple)) for item in conversation):
        for number, one in enumerate(conversation):
            if not one:
                raise ValueError(f"conversation[{number}] is empty")
        batch = [(f"conversation[{number}]", one) for number, one in enumerate(conversation)]
    else:
        batch = [("conversation", conversation)]
    for where, messages in batch:
        for number, message in enumerate(messages):
            _check_message(f"{where}[{number}]", message, with_media)


def _check_message(where: str, message: Any, with_media: bool) -> None:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where} must be a dict with a string as 'role' and with 'content', got {_shown(message)}")
    content = message.get("content")
    if content is None and "tool_calls" in message:
        return
    if isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{where}['content'] must be a string or a list of parts, got {_shown(content)}")
    for number, part in enumerate(content):
        place = f"{where}['content'][{number}]"
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise ValueError(f"{place} must be a dict with a string as 'type', got {_shown(part)}")
        kind = part["type"]
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"{place} is of type 'text' and must have a string as 'text', got {_shown(part)}")
        for key in _MEDIA_KEYS.get(kind, ()):
            # Media themselves are seen to by who reads them. A video may be a list of frames, an image may not.
            if isinstance(part.get(key), (bool, int, float, Mapping, *((list, tuple) if kind == "image" else ()))):
                raise ValueError(
                    f"{place}['{key}'] must be a path, a URL or the {kind} itself, got {_shown(part[key])}"
                )
        if kind == "video" and with_media and all(part.get(key) is None for key in _MEDIA_KEYS[kind]):
            raise ValueError(
                f"{place} is of type 'video' and must have one of 'video', 'url' and 'path', got {_shown(part)}"
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def llava_conversation_to_messages(
    conversations: Sequence[dict[str, str]],
    *,
    videos: Sequence[Any] = (),
    images: Sequence[Any] = (),
) -> list[dict[str, Any]]:
    """Converts a LLaVA conversation to chat messages, media in the place of their placeholders.

    Args:
        conversations: turns such as `{"from": "human", "value": "<video>\\nWhat happens?"}`; roles
            `human | gpt | system`.
        videos, images: media in the order of their placeholders, anything that a content part may hold. As
            LLaVA-Video's own data write `<image>` for a video too, `<image>` stands for a video where there are videos
            only and no `<video>`.

    Returns:
        Messages for `apply_chat_template`.

    Raises:
        ValueError: on an unknown role, or if the placeholders of human turns and the media differ in number.
    """
    if not conversations:
        raise ValueError("the conversation has no turns")
    for number, turn in enumerate(conversations):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise ValueError(f"turn {number} must be a dict with 'from' and 'value', got {turn!r}")
        if turn["from"] not in _LLAVA_ROLES:
            raise ValueError(f"turn {number} is from {turn['from']!r}, expected one of {', '.join(_LLAVA_ROLES)}")
    # In any other turn the word is text: an answer may quote it.
    text = "".join(turn["value"] for turn in conversations if turn["from"] == "human")
    counts = {VIDEO_TOKEN: text.count(VIDEO_TOKEN), IMAGE_TOKEN: text.count(IMAGE_TOKEN)}
    media = {VIDEO_TOKEN: ("video", iter(videos)), IMAGE_TOKEN: ("image", iter(images))}
    given = {VIDEO_TOKEN: len(videos), IMAGE_TOKEN: len(images)}
    if videos and not images and counts[IMAGE_TOKEN] and not counts[VIDEO_TOKEN]:
        media[IMAGE_TOKEN] = media[VIDEO_TOKEN]
        given = {VIDEO_TOKEN: 0, IMAGE_TOKEN: len(videos)}
    for token, count in counts.items():
        if count != given[token]:
            raise ValueError(
                f"the conversation has {count} {token} placeholders for {given[token]} {media[token][0]}s: "
                f"{text[:200]!r}"
            )
    messages = []
    for turn in conversations:
        role, content = _LLAVA_ROLES[turn["from"]], []
        # The template writes the newline behind a media part, so the one that is there goes with the placeholder.
        pattern = f"({VIDEO_TOKEN}\n?|{IMAGE_TOKEN}\n?)"
        for piece in re.split(pattern, turn["value"]) if role == "user" else [turn["value"]]:
            if role == "user" and piece.rstrip("\n") in media:
                kind, items = media[piece.rstrip("\n")]
                content.append({"type": kind, kind: next(items)})
            elif piece:
                content.append({"type": "text", "text": piece})
        messages.append({"role": role, "content": content or [{"type": "text", "text": ""}]})
    return messages


def check_placeholders(kind: str, token: str, in_text: list[int], counts: "list[int] | int | None") -> None:
    """Refuses prompts whose placeholders are not as many as their media.

    Args:
        kind: `image | video`.
        token: its placeholder.
        in_text: how many of it each prompt holds.
        counts: media of each prompt where they are given so, else their total.

    Raises:
        ValueError: naming both numbers.
    """
    total = counts if isinstance(counts, int) else sum(counts or ())
    if sum(in_text) != total:
        hint = ""
        if sum(in_text) > total:
            hint = (
                f". A literal {token} in a user's text counts as a placeholder too: give the {kind} as a content part "
                f"{{'type': '{kind}', 'path': ...}}, or pass sanitize_control_tokens=True to encode the word as text"
            )
        elif not sum(in_text):
            hint = f"; {kind}_token is {token!r}"
        given = f"{total or 'no'} {kind}{' was' if total == 1 else 's were'}"
        raise ValueError(
            f"the number of {token} tokens in the prompts should be the same as the number of {kind}s, but the "
            f"prompts hold {sum(in_text)} and {given} passed{hint}"
        )
    if isinstance(counts, list) and len(counts) == len(in_text) and counts != in_text:
        index = next(index for index, count in enumerate(counts) if count != in_text[index])
        raise ValueError(f"prompt {index} holds {in_text[index]} {token} placeholders for {counts[index]} {kind}s")
