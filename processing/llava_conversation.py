# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""LLaVA conversations: the chat template, and conversion of LLaVA's data to chat messages."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from .media_sources import source_name
from .video_inputs import MediaRequest

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
_LLAVA_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

# LLaVA-NeXT's `qwen_1_5` conversation. Media keep their place among the parts of a message and are followed by a
# newline, except the last part. The assistant's turns, with their closing token, are the training targets.
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


# Keys of a content part for its medium, in the order in which transformers reads them.
_MEDIA_KEYS = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}
_PIXEL_LIMITS = ("min_pixels", "max_pixels")
SAMPLING_OPTIONS = ("fps", "num_frames", "max_frames", "sample_rate", "sampling", "video_start", "video_end")
# Options of one medium beside it in a content part, and their other names in public data.
PART_OPTIONS = {"image": _PIXEL_LIMITS, "video": (*SAMPLING_OPTIONS, *_PIXEL_LIMITS)}
_MEDIA_NAMES = {name for names in (*_MEDIA_KEYS.values(), *PART_OPTIONS.values()) for name in names}
_PAYLOAD = re.compile(r"(data:[\w/.+;=-]{0,60},)[\w+/=%-]{8,}")  # of a data URL in a text
OPTION_ALIASES = {"nframes": "num_frames", "start": "video_start", "end": "video_end"}


def prepare_messages(conversation: Any, template: str, options: Mapping[str, Any]) -> list[Any]:
    """Return a validated copy of a conversation, or of a batch of conversations, in the form that chat templates read.

    Keys whose value is None are absent: every row of a table has the keys of all rows. `image_url` and `video_url` parts
    become `image` and `video` parts. With `tokenize` among the `options` of `apply_chat_template`, a video part needs a
    video, and a medium with its own options becomes a `MediaRequest`. Other roles and types of parts are left to the
    template.

    Raises:
        ValueError: with the position, the value and the expected form; also for keys that are not read.
    """
    for name in ("tools", "documents"):
        if options.get(name) and not template_reads(template, name):
            raise ValueError(
                f"the chat template does not read {name!r} and would drop it: give a chat_template that reads it"
            )
    with_media = bool(options.get("tokenize"))
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError(f"conversation must be a non-empty list of messages, got {shown(conversation)}")
    is_batch = all(isinstance(item, (list, tuple)) for item in conversation)
    prepared = []
    for number, messages in enumerate(conversation if is_batch else [conversation]):
        where = f"conversation[{number}]" if is_batch else "conversation"
        if not messages:
            raise ValueError(f"{where} is empty")
        prepared.append(
            [_message(f"{where}[{n}]", message, template, with_media) for n, message in enumerate(messages)]
        )
    return prepared if is_batch else prepared[0]


def template_reads(template: str, name: str) -> bool:
    """Test a chat template for the name of a variable or key."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _message(where: str, message: Any, template: str, with_media: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where} must be a dict with a string as 'role' and with 'content', got {shown(message)}")
    content = message.get("content")
    message = {key: value for key, value in message.items() if value not in (None, "", [], {}) or key == "content"}
    for key, value in message.items():
        if key not in ("role", "content") and not template_reads(template, key):
            raise ValueError(
                f"{where} has {key!r}, but the chat template does not read it and would drop {shown(value)}: give a "
                "chat_template that reads it, or write it into the content"
            )
    if content is None and "tool_calls" in message:
        del message["content"]
    elif isinstance(content, (list, tuple)):
        message["content"] = [
            _part(f"{where}['content'][{number}]", part, template, with_media) for number, part in enumerate(content)
        ]
    elif not isinstance(content, str):
        raise ValueError(f"{where}['content'] must be a string or a list of parts, got {shown(content)}")
    return message


def _part(position: str, part: Any, template: str, with_media: bool) -> dict[str, Any]:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ValueError(f"{position} must be a dict with a string as 'type', got {shown(part)}")
    part = {key: value for key, value in part.items() if value is not None}
    part_type = part["type"]
    if part_type in ("image_url", "video_url") and part_type in part:  # the form of OpenAI's clients
        url = part.pop(part_type)
        part_type = part_type.removesuffix("_url")
        part = {**part, **(dict(url) if isinstance(url, Mapping) else {"url": url}), "type": part_type}
    if part_type == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"{position} is of type 'text' and must have a string as 'text', got {shown(part)}")
    media, options = _MEDIA_KEYS.get(part_type, ()), PART_OPTIONS.get(part_type, ())
    aliases = (alias for alias, name in OPTION_ALIASES.items() if name in options)
    known = {"text"} if part_type == "text" else {*media, *options, *aliases}
    for key in sorted(part.keys() - known - {"type"}) if part_type == "text" or media else ():
        if key in _MEDIA_NAMES or not template_reads(template, key):
            near = difflib.get_close_matches(key.removeprefix("video_"), sorted(known), n=1, cutoff=0.0)
            raise ValueError(
                f"{position} is of type {part_type!r} and has the unknown key {key!r}; did you mean {near[0]!r}? It may have "
                f"{', '.join(sorted(known))}"
            )
    return _media_part(position, part, with_media) if media else part


def _media_part(position: str, part: dict[str, Any], with_media: bool) -> dict[str, Any]:
    part_type, media = part["type"], _MEDIA_KEYS[part["type"]]
    given = [key for key in media if key in part]
    for key in given:
        # The reader of a medium validates it. A video may be a list of frames, an image may not.
        if isinstance(part[key], (bool, int, float, Mapping, *((list, tuple) if part_type == "image" else ()))):
            raise ValueError(
                f"{position}['{key}'] must be a path, a URL or the {part_type} itself, got {shown(part[key])}"
            )
    if len(given) > 1:
        raise ValueError(
            f"{position} must have one {part_type}, but has one as {' and one as '.join(map(repr, given))}"
        )
    if part_type == "video" and with_media and not given:
        raise ValueError(
            f"{position} is of type 'video' and must have one of 'video', 'url' and 'path', got {shown(part)}"
        )
    named = {
        key: OPTION_ALIASES.get(key, key) for key in part if OPTION_ALIASES.get(key, key) in PART_OPTIONS[part_type]
    }
    for key, name in named.items():
        if key != name and name in named:
            raise ValueError(f"{position} has {name!r} twice, once as {key!r}")
    if not (with_media and given and (named or is_dataclass(part[given[0]]))):
        return part
    request = MediaRequest(part[given[0]], {name: part[key] for key, name in named.items()}, position)
    return {**{key: value for key, value in part.items() if key not in named}, given[0]: request}


def shown(value: Any) -> str:
    """Short form of a value for messages: about 200 characters, without the content of media."""
    text = _PAYLOAD.sub(r"\1...", repr(_without_content(value)))
    return text if len(text) <= 200 else f"{text[:200]}..."


def _without_content(value: Any) -> Any:
    if isinstance(value, str):
        return source_name(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping):
        return {key: _without_content(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_content(inner) for inner in value[:20]]
    shape = getattr(value, "shape", None)
    return value if shape is None else f"<{type(value).__name__} of shape {tuple(shape)}>"


def llava_conversation_to_messages(
    conversations: Sequence[dict[str, str]],
    *,
    videos: Sequence[Any] = (),
    images: Sequence[Any] = (),
) -> list[dict[str, Any]]:
    """Convert a LLaVA conversation to chat messages, with media in place of their placeholders.

    Args:
        conversations: turns such as `{"from": "human", "value": "<video>\\nWhat happens?"}`; roles
            `human | gpt | system`.
        videos, images: media in the order of their placeholders, any medium of a content part. As in LLaVA-Video's
            data, `<image>` stands for a video if there are only videos and no `<video>`.

    Returns:
        Messages for `apply_chat_template`.

    Raises:
        ValueError: on an unknown role, or if the placeholders of human turns and the media differ in number.
    """
    if not conversations:
        raise ValueError("the conversation has no turns")
    for number, turn in enumerate(conversations):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise ValueError(f"turn {number} must be a dict with 'from' and 'value', got {shown(turn)}")
        if turn["from"] not in _LLAVA_ROLES:
            raise ValueError(f"turn {number} is from {shown(turn['from'])}, expected one of {', '.join(_LLAVA_ROLES)}")
    # In other turns the word is text: an answer may quote it.
    text = "".join(turn["value"] for turn in conversations if turn["from"] == "human")
    counts = {VIDEO_TOKEN: text.count(VIDEO_TOKEN), IMAGE_TOKEN: text.count(IMAGE_TOKEN)}
    media = {VIDEO_TOKEN: ("video", iter(videos)), IMAGE_TOKEN: ("image", iter(images))}
    given = {VIDEO_TOKEN: len(videos), IMAGE_TOKEN: len(images)}
    if videos and not images and counts[IMAGE_TOKEN] and not counts[VIDEO_TOKEN]:
        media[IMAGE_TOKEN] = media[VIDEO_TOKEN]
        given = {VIDEO_TOKEN: 0, IMAGE_TOKEN: len(videos)}
    for token, count in counts.items():
        if count != given[token]:
            hint = f" (a text that quotes {token} goes into a text part of 'messages')" * (count > given[token])
            raise ValueError(
                f"the conversation has {count} {token} placeholders for {given[token]} {media[token][0]}s{hint}: "
                f"{shown(text)}"
            )
    messages = []
    for turn in conversations:
        role, content = _LLAVA_ROLES[turn["from"]], []
        # The template writes the newline behind a media part: remove the one behind the placeholder.
        pattern = f"({VIDEO_TOKEN}\n?|{IMAGE_TOKEN}\n?)"
        for piece in re.split(pattern, turn["value"]) if role == "user" else [turn["value"]]:
            if role == "user" and piece.rstrip("\n") in media:
                medium, items = media[piece.rstrip("\n")]
                content.append({"type": medium, medium: next(items)})
            elif piece:
                content.append({"type": "text", "text": piece})
        messages.append({"role": role, "content": content or [{"type": "text", "text": ""}]})
    return messages


def check_placeholders(medium: str, token: str, in_text: list[int], counts: "list[int] | int | None") -> None:
    """Validate that prompts have as many placeholders as media.

    Args:
        medium: `image | video`.
        token: its placeholder.
        in_text: number of placeholders of each prompt.
        counts: number of media of each prompt if they are nested by prompt, else in all.

    Raises:
        ValueError: with both numbers.
    """
    total = counts if isinstance(counts, int) else sum(counts or ())
    if sum(in_text) != total:
        hint = ""
        if sum(in_text) > total:
            hint = (
                f". A literal {token} in a user's text counts as a placeholder too: give the {medium} as a content part "
                f"{{'type': '{medium}', 'path': ...}}, or pass sanitize_control_tokens=True to encode the word as text"
            )
        elif not sum(in_text):
            hint = f"; {medium}_token is {token!r}"
        given = f"{total or 'no'} {medium}{' was' if total == 1 else 's were'}"
        raise ValueError(
            f"the number of {token} tokens in the prompts should be the same as the number of {medium}s, but the "
            f"prompts hold {sum(in_text)} and {given} passed{hint}"
        )
    if isinstance(counts, list) and len(counts) == len(in_text) and counts != in_text:
        index = next(index for index, count in enumerate(counts) if count != in_text[index])
        raise ValueError(f"prompt {index} holds {in_text[index]} {token} placeholders for {counts[index]} {medium}s")
