# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""An entry of a data set -> chat messages, with the places of its media. Nothing is decoded.

    {"conversations": [{"from": "human", "value": "<video>\\nWhat happens?"}, {"from": "gpt", "value": "Rain."}],
     "video": "x.mp4"}

Chat messages under `messages` are read as well. An entry comes from a stranger: whatever it holds is either understood
or refused with a ValueError (a missing file with a FileNotFoundError).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..processing.llava_conversation import llava_conversation_to_messages
from ..processing.media_sources import is_animation, names_picture, source_name
from .media_paths import path_below

_CHAT_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}  # and what LLaVA calls them


@dataclass(frozen=True)
class MediaFolders:
    """Where media lie.

    Attributes:
        video_root, image_root: folders that paths are relative to.
        allow_outside_root: accept URLs, and paths that leave the folder (`..`, absolute paths, symbolic links).
    """

    video_root: Path
    image_root: Path
    allow_outside_root: bool = False

    def locate(self, media: Any, kind: str) -> Any:
        """The full path of a `video` or `image`, or the thing itself if the entry holds that: bytes, frames as an
        array or tensor, a PIL image, or a `{"bytes": ..., "path": ...}` as the `datasets` library stores media.

        Raises:
            ValueError: if it is none of these, an image where a video should be, or outside of its folder.
            FileNotFoundError: if there is no such file.
        """
        if isinstance(media, Mapping) and media.keys() <= {"bytes", "path"}:
            content = media.get("bytes")
            media = media.get("path") if content is None else content
        if isinstance(media, (bytes, bytearray, memoryview)) and len(media):
            return bytes(media)
        if isinstance(media, (np.ndarray, torch.Tensor) if kind == "video" else Image.Image):
            return media
        if not isinstance(media, str) or not media:
            raise ValueError(f"{kind} must be a path, got {str(media)[:200]!r}")
        root = self.video_root if kind == "video" else self.image_root
        if "://" in media or media.startswith("data:"):
            if self.allow_outside_root:
                return media
            raise ValueError(
                f"{kind} {source_name(media)!r} is a URL, expected a path below {root}; allow_outside_root=True accepts it"
            )
        path = os.path.abspath(root / media) if self.allow_outside_root else path_below(root, media, kind)
        if not os.path.exists(path):
            raise FileNotFoundError(f"no such file: {path}")
        if kind == "video" and names_picture(media, only_still=True) and not is_animation(path):
            raise ValueError(f"video {media[-200:]!r} is an image; give it under 'image'")
        return path


def entry_to_messages(entry: Any, folders: MediaFolders) -> list[dict[str, Any]]:
    """Messages for `apply_chat_template`, media as `MediaFolders.locate` returns them.

    Raises:
        ValueError: if the entry is malformed or has nothing to learn from.
        FileNotFoundError: if a file is missing.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"an entry must be a dict, got {type(entry).__name__}")
    videos = [folders.locate(media, "video") for media in _as_list(entry, "video")]
    images = [folders.locate(media, "image") for media in _as_list(entry, "image")]
    turns, chat = entry.get("conversations"), entry.get("messages")
    if turns is not None and chat is not None:
        raise ValueError("the entry has both 'conversations' and 'messages'")
    if turns is not None:
        messages = llava_conversation_to_messages(_checked_turns(turns), videos=videos, images=images)
    elif chat is not None:
        messages = _from_chat(chat, videos, images, folders)
    elif videos and not images:
        return [{"role": "user", "content": [{"type": "video", "video": video} for video in videos]}]
    else:
        raise ValueError("the entry has neither 'conversations' nor 'messages', nor a video alone to reconstruct")
    if not any(message["role"] == "assistant" and _text_of(message).strip() for message in messages):
        raise ValueError("the conversation has no answer (no turn from 'gpt' with text)")
    return messages


def media_names(entry: Any) -> list[str]:
    """Every file that an entry names, for errors: nothing in it can be relied on."""
    if not isinstance(entry, Mapping):
        return []
    values = [entry.get(name) for name in ("video", "videos", "image", "images")]
    messages = entry.get("messages")
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else []:
            names = ("video", "image", "path", "url")
            values += [part.get(name) for name in names] if isinstance(part, Mapping) else []
    flat = [name for value in values for name in (value if isinstance(value, (list, tuple)) else [value])]
    flat = [name.get("path") if isinstance(name, Mapping) else name for name in flat]
    return [str(name)[:500] for name in flat if isinstance(name, (str, int, float, os.PathLike))]


def without_nulls(value: Any) -> Any:
    """A row of a table as the JSON entry it stands for: a table has every key in every row."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _from_chat(chat: Any, videos: list[Any], images: list[Any], folders: MediaFolders) -> list[dict[str, Any]]:
    if not isinstance(chat, list) or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in chat):
        raise ValueError(f"'messages' must be a list of dicts with 'role' and 'content', got {str(chat)[:200]}")
    for number, message in enumerate(chat):
        if not isinstance(message["role"], str) or message["role"] not in _CHAT_ROLES:
            raise ValueError(
                f"message {number} has the role {message['role']!r}, expected one of {', '.join(_CHAT_ROLES)}"
            )
        if not isinstance(message["content"], (str, list)):
            raise ValueError(
                f"message {number} must have text or a list of parts, got {str(message['content'])[:200]}"
            )
    if all(isinstance(message["content"], str) for message in chat):
        # Plain strings with placeholders: LLaVA's form under other names.
        turns = [{"from": _CHAT_ROLES[message["role"]], "value": message["content"]} for message in chat]
        return llava_conversation_to_messages(turns, videos=videos, images=images)
    left = {"video": list(videos), "image": list(images)}
    messages = []
    for number, message in enumerate(chat):
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [_part(part, f"message {number}", message["role"], left, folders) for part in parts]
        messages.append({"role": message["role"], "content": parts})
    for kind, names in left.items():
        if names:
            raise ValueError(f"{len(names)} more {kind}s were given than the messages have parts for: {names[0]}")
    return messages


def _part(part: Any, where: str, role: str, left: dict[str, list[Any]], folders: MediaFolders) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    for media in ("video", "image"):
        if kind not in (media, f"{media}_url"):
            continue
        if role != "user":
            raise ValueError(f"{where} is from {role!r} but holds a {media}")
        sources = [part[name] for name in (media, "path", "url", f"{media}_url") if part.get(name) is not None]
        if sources:
            source = sources[0]
            if isinstance(source, Mapping) and "url" in source:
                source = source["url"]
            return {"type": media, media: folders.locate(source, media)}
        if not left[media]:
            raise ValueError(f"{where} holds a {media} part, but no {media} is given for it")
        return {"type": media, media: left[media].pop(0)}
    raise ValueError(f"{where} holds {str(part)[:200]}; a content part is a dict of type text, image or video")


def _as_list(entry: Mapping[str, Any], kind: str) -> list[Any]:
    """What an entry holds under `video` or `videos`: nothing, one name or a list of names."""
    values = [entry[name] for name in (kind, f"{kind}s") if entry.get(name) is not None]
    if len(values) > 1:
        raise ValueError(f"the entry has both {kind!r} and '{kind}s'")
    value = values[0] if values else []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _checked_turns(conversations: Any) -> list[dict[str, str]]:
    if not isinstance(conversations, list):
        raise ValueError(f"'conversations' must be a list of turns, got {type(conversations).__name__}")
    for number, turn in enumerate(conversations):
        for key in ("from", "value") if isinstance(turn, Mapping) else ():
            if not isinstance(turn.get(key, ""), str):
                raise ValueError(f"turn {number} must have a string as {key!r}, got {str(turn[key])[:200]}")
    return conversations


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
