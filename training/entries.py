# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""An entry of a data set -> chat messages, with the places of its media. Nothing is decoded.

    {"conversations": [{"from": "human", "value": "<video>\\nWhat happens?"}, {"from": "gpt", "value": "Rain."}],
     "video": "x.mp4"}

Chat messages under `messages` are read as well. Sampling options (`SAMPLING_KEYS`, such as `fps` or `video_start` and
`video_end` in seconds) stand in an entry, for its one video, or in a content part of `messages`. They have the meaning
that they have in a chat, and win over the processor's own. An entry is untrusted: its content is either read or raises
a ValueError (a FileNotFoundError for a missing file). So a key that is not read is an error, unless it is a usual
annotation (`ANNOTATION_KEYS`), null, or named in `ignored_keys`.
"""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..configuration.key_names import nearest_name
from ..processing.llava_conversation import (
    OPTION_ALIASES,
    PART_OPTIONS,
    SAMPLING_OPTIONS,
    llava_conversation_to_messages,
    shown,
)
from ..processing.media_sources import is_animation, names_picture, source_name
from .media_paths import path_below

_CHAT_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}  # and what LLaVA calls them

CONTENT_KEYS = ("conversations", "messages", "system", "video", "videos", "image", "images")
# Annotations, which change nothing in a sample. Evaluations read `choices` and `moment`.
ANNOTATION_KEYS = frozenset(
    (
        *("id", "question_id", "sample_id", "video_id", "image_id", "data_source", "dataset", "source", "split"),
        *("question_type", "category", "task", "choices", "moment", "metadata", "model", "license", "url"),
        *(
            "difficulty",
            "held_out",
            "pair",
            "control",
            "frame_order",
            "event",
            "event_frame",
            "event_hidden",
            "event_places",
            "cut_frame",
        ),
    )
)
# Sampling options of an entry's one video, under the names that content parts of chats have for them.
SAMPLING_KEYS = (*SAMPLING_OPTIONS, *OPTION_ALIASES)
# Options that other trainers read from an entry, and where the same is set here.
_OPTION_KEYS = {
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight"), "a source has a weight, an entry has none"),
    **dict.fromkeys(("min_frames", "video_fps"), "frames are sampled by 'num_frames', 'fps' and 'max_frames'"),
    **dict.fromkeys(
        ("start_time", "end_time", "clip", "segment", "timestamps"),
        "a part of a video is given by 'video_start' and 'video_end', in seconds",
    ),
}
# Of a content part of each type, beside `type` and options; a medium lies under one of them.
_PART_KEYS = {"text": ("text",)} | {kind: (kind, "path", "url", f"{kind}_url") for kind in ("video", "image")}
_PART_OPTIONS = {"text": (), "image": PART_OPTIONS["image"], "video": (*PART_OPTIONS["video"], *OPTION_ALIASES)}
_TEXT_WORDS = re.compile(
    r"(question|answer|caption|text|prompt|completion|response|reply|instruction|input|output|conversation|dialog"
    r"|dialogue|chat|message|turn|query|qa|description|transcript|subtitle|narration|summary|label|solution|history)"
)


_MISSPELT = 0.8  # similarity from which on a key with the name of a text is a misspelling of another one


@dataclass(frozen=True)
class MediaFolders:
    """Folders of media.

    Attributes:
        video_root, image_root: folders that paths are relative to.
        allow_outside_root: accept URLs, and paths that leave the folder (`..`, absolute paths, symbolic links).
    """

    video_root: Path
    image_root: Path
    allow_outside_root: bool = False

    def locate(self, media: Any, kind: str) -> Any:
        """Returns the full path of a `video` or `image`, or the medium itself if the entry holds it.

        Args:
            media: a path; bytes; frames as an array or tensor; a PIL image; or `{"bytes": ..., "path": ...}` as the `datasets`
                library stores media.
            kind: `video` or `image`.

        Raises:
            ValueError: for another type, an image where a video is expected, or a path outside of the folder.
            FileNotFoundError: if the file does not exist.
        """
        if isinstance(media, Mapping) and media.keys() <= {"bytes", "path"}:
            content = media.get("bytes")
            media = media.get("path") if content is None else content
        if isinstance(media, (bytes, bytearray, memoryview)) and len(media):
            return bytes(media)
        if isinstance(media, (np.ndarray, torch.Tensor) if kind == "video" else Image.Image):
            return media
        if not isinstance(media, str) or not media:
            raise ValueError(f"{kind} must be a path, got {shown(media)}")
        root = self.video_root if kind == "video" else self.image_root
        if "://" in media or media.startswith("data:"):
            if self.allow_outside_root:
                return media
            raise ValueError(
                f"{kind} {source_name(media)!r} is a URL, expected a path below {root}; allow_outside_root=True accepts it"
            )
        path = os.path.abspath(root / media) if self.allow_outside_root else path_below(root, media, kind)
        if not os.path.exists(path):
            raise FileNotFoundError(f"no such file: {source_name(path)}")
        if kind == "video" and names_picture(media, only_still=True) and not is_animation(path):
            raise ValueError(f"video {media[-200:]!r} is an image; give it under 'image'")
        return path


def entry_to_messages(entry: Any, folders: MediaFolders, ignored_keys: Collection[str] = ()) -> list[dict[str, Any]]:
    """Returns messages for `apply_chat_template`, with media as `MediaFolders.locate` returns them.

    Args:
        ignored_keys: keys of an entry, a turn, a message or a content part that may be left out.

    Raises:
        ValueError: if the entry is malformed, has a key that is not read, or has neither a conversation nor a video alone.
        FileNotFoundError: if a file is missing.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"an entry must be a dict, got {type(entry).__name__}")
    _check_keys(entry, (*CONTENT_KEYS, *SAMPLING_KEYS), "the entry", {*ANNOTATION_KEYS, *ignored_keys})
    videos = [folders.locate(media, "video") for media in _as_list(entry, "video")]
    images = [folders.locate(media, "image") for media in _as_list(entry, "image")]
    turns, chat = entry.get("conversations"), entry.get("messages")
    if turns is not None and chat is not None:
        raise ValueError("the entry has both 'conversations' and 'messages'")
    if turns is not None:
        turns = _checked_turns(turns, ignored_keys)
        messages = llava_conversation_to_messages(turns, videos=videos, images=images)
    elif chat is not None:
        messages = _from_chat(chat, videos, images, folders, ignored_keys)
    elif videos and not images:
        messages = [{"role": "user", "content": [{"type": "video", "video": video} for video in videos]}]
        for key in ("conversations", "messages"):
            if key in entry:  # a table has every key in every row: there, `without_nulls` has taken it out
                raise ValueError(f"{key!r} is null; an entry of a video alone, for reconstruction, has no such key")
    else:
        raise ValueError("the entry has neither 'conversations' nor 'messages', nor a video alone to reconstruct")
    if turns is not None or chat is not None:
        _check_answers(messages)
    options = {key: entry[key] for key in SAMPLING_KEYS if key not in ignored_keys and entry.get(key) is not None}
    _give_to_video(options, messages)
    return _with_system(messages, entry.get("system"))


def has_answer(messages: list[dict[str, Any]]) -> bool:
    """Returns True if a conversation has an assistant turn."""
    return any(message["role"] == "assistant" for message in messages)


def media_names(entry: Any) -> list[str]:
    """Returns the files that an entry names, for error messages; the entry may be malformed."""
    if not isinstance(entry, Mapping):
        return []
    values = [entry.get(name) for name in ("video", "videos", "image", "images")]
    messages = entry.get("messages")
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else []:
            names = ("video", "image", "path", "url", "video_url", "image_url")
            values += [part.get(name) for name in names] if isinstance(part, Mapping) else []
    flat = [name for value in values for name in (value if isinstance(value, (list, tuple)) else [value])]
    flat = [name.get("path") or name.get("url") if isinstance(name, Mapping) else name for name in flat]
    names = [str(name) for name in flat if isinstance(name, (str, int, float, os.PathLike))]
    return [source_name(name)[:500] for name in names]


def without_nulls(value: Any) -> Any:
    """Removes null values, at any depth: every row of a table has the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _check_keys(given: Mapping[str, Any], known: Collection[str], where: str, ignored: Collection[str]) -> None:
    """Raises ValueError for the first key with a value that is neither in `known` nor in `ignored`."""
    for key, value in given.items():
        if value is None or key in known or key in ignored:
            continue
        name = str(key).lower()
        if name in _OPTION_KEYS:
            hint = f"; {_OPTION_KEYS[name]}"
        elif _TEXT_WORDS.search(name) and "conversations" in known:
            nearest = nearest_name(name, known, _MISSPELT) or "conversations"
            hint = f"; did you mean {nearest!r}? Texts are read from 'conversations' and 'messages' alone"
        else:
            hint = f"; did you mean {nearest_name(name, known)!r}?"
        raise ValueError(
            f"{where} has the unknown key {str(key)[:100]!r}{hint} (ignored_keys accepts keys that may be left out)"
        )


def _check_answers(messages: list[dict[str, Any]]) -> None:
    """Raises ValueError without an answer, or for one without text, of which the end token alone would be learned."""
    answers = {number: _text_of(m) for number, m in enumerate(messages) if m["role"] == "assistant"}
    if not any(text.strip() for text in answers.values()):
        raise ValueError("the conversation has no answer (no turn from 'gpt' with text)")
    for number, text in answers.items():
        if not text.strip():
            raise ValueError(f"turn {number}, from 'gpt', is an answer without text")


def _give_to_video(options: Mapping[str, Any], messages: list[dict[str, Any]]) -> None:
    """Writes an entry's sampling options into the content part of its one video."""
    if not options:
        return
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    parts = [part for content in contents for part in content if part["type"] == "video"]
    names = ", ".join(map(repr, options))
    if len(parts) != 1:
        raise ValueError(
            f"the entry has {names}, expected one video that these are of, got {len(parts)}; with several, give them in "
            "the content parts of 'messages'"
        )
    for key in options:
        name = OPTION_ALIASES.get(key, key)
        other = next((option for option in parts[0] if OPTION_ALIASES.get(option, option) == name), None)
        if other is not None:
            raise ValueError(f"the entry has {key!r}, and its video has {other!r} as well; give one")
        parts[0][key] = options[key]


def _with_system(messages: list[dict[str, Any]], system: Any) -> list[dict[str, Any]]:
    """Returns the conversation with the entry's system prompt in front, if it has one."""
    if system is None:
        return messages
    if not isinstance(system, str) or not system.strip():
        raise ValueError(f"'system' must be the text of the system prompt, got {shown(system)}")
    if any(message["role"] == "system" for message in messages):
        raise ValueError("the entry has 'system', and its conversation a system turn too")
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]


def _from_chat(
    chat: Any, videos: list[Any], images: list[Any], folders: MediaFolders, ignored_keys: Collection[str]
) -> list[dict[str, Any]]:
    if not isinstance(chat, list) or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in chat):
        raise ValueError(f"'messages' must be a list of dicts with 'role' and 'content', got {shown(chat)}")
    for number, message in enumerate(chat):
        _check_keys(message, ("role", "content"), f"message {number}", ignored_keys)
        if not isinstance(message["role"], str) or message["role"] not in _CHAT_ROLES:
            raise ValueError(
                f"message {number} has the role {shown(message['role'])}, expected one of {', '.join(_CHAT_ROLES)}"
            )
        if not isinstance(message["content"], (str, list)):
            raise ValueError(f"message {number} must have text or a list of parts, got {shown(message['content'])}")
    if all(isinstance(message["content"], str) for message in chat):
        # Plain strings with placeholders: LLaVA's form under other names.
        turns = [{"from": _CHAT_ROLES[message["role"]], "value": message["content"]} for message in chat]
        return llava_conversation_to_messages(turns, videos=videos, images=images)
    left = {"video": list(videos), "image": list(images)}
    messages = []
    for number, message in enumerate(chat):
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            part_type = str(part.get("type")).removesuffix("_url") if isinstance(part, Mapping) else None
            if part_type in _PART_KEYS:
                known = ("type", *_PART_KEYS[part_type], *_PART_OPTIONS[part_type])
                _check_keys(part, known, f"a {part_type} part of message {number}", ignored_keys)
        read = [_part(part, f"message {number}", message["role"], left, folders) for part in parts]
        for part, read_part in zip(parts, read, strict=True):
            names = [name for name in _PART_OPTIONS[read_part["type"]] if name not in ignored_keys]
            read_part |= {name: part[name] for name in names if part.get(name) is not None}
        messages.append({"role": message["role"], "content": read})
    for kind, names in left.items():
        if names:
            raise ValueError(
                f"{len(names)} more {kind}s were given than the messages have parts for: {shown(names[0])}"
            )
    return messages


def _part(part: Any, where: str, role: str, left: dict[str, list[Any]], folders: MediaFolders) -> dict[str, Any]:
    part_type = part.get("type") if isinstance(part, Mapping) else None
    if part_type == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    for media in ("video", "image"):
        if part_type not in (media, f"{media}_url"):
            continue
        if role != "user":
            raise ValueError(f"{where} is from {role!r} but holds a {media}")
        names = [name for name in _PART_KEYS[media] if part.get(name) is not None]
        if len(names) > 1:
            raise ValueError(f"{where} holds a {media} part with both {names[0]!r} and {names[1]!r}; give one")
        if names:
            source = part[names[0]]
            if isinstance(source, Mapping) and "url" in source:
                _check_keys(source, ("url",), f"{names[0]!r} of {where}", ())
                source = source["url"]
            return {"type": media, media: folders.locate(source, media)}
        if not left[media]:
            raise ValueError(f"{where} holds a {media} part, but no {media} is given for it")
        return {"type": media, media: left[media].pop(0)}
    raise ValueError(f"{where} holds {shown(part)}; a content part is a dict of type text, image or video")


def _as_list(entry: Mapping[str, Any], kind: str) -> list[Any]:
    """Values of an entry under `video` or `videos`: none, a single one or a list."""
    values = [entry[name] for name in (kind, f"{kind}s") if entry.get(name) is not None]
    if len(values) > 1:
        raise ValueError(f"the entry has both {kind!r} and '{kind}s'")
    value = values[0] if values else []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _checked_turns(conversations: Any, ignored_keys: Collection[str]) -> list[dict[str, str]]:
    if not isinstance(conversations, list):
        raise ValueError(f"'conversations' must be a list of turns, got {type(conversations).__name__}")
    for number, turn in enumerate(conversations):
        if isinstance(turn, Mapping):
            _check_keys(turn, ("from", "value"), f"turn {number}", ignored_keys)
        for key in ("from", "value") if isinstance(turn, Mapping) else ():
            if not isinstance(turn.get(key, ""), str):
                raise ValueError(f"turn {number} must have a string as {key!r}, got {shown(turn[key])}")
    return conversations


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
