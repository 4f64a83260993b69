# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Training data: LLaVA JSON -> samples.

JSON entry -> messages -> processor (which decodes the video, in a DataLoader worker) -> sample; `training_collator` makes
batches of them. Nothing is decoded ahead of time, and nothing is left out silently: a bad sample is an error that names it.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from .llava_conversation import llava_conversation_to_messages
from .media_paths import path_below
from .training_guards import SAMPLE_NAME


class BadSampleError(ValueError):
    """A sample that cannot be used, and why.

    Attributes:
        index: of the sample in its dataset.
        sample_id: the entry's own `id`, if any.
        files: the media that the entry names.
    """

    # One positional argument: DataLoader re-raises a worker's error in the parent with its text alone.
    def __init__(
        self, message: str, *, index: int | None = None, sample_id: Any = None, files: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.index = index
        self.sample_id = sample_id
        self.files = tuple(files)


class LlavaVideoDataset(Dataset):
    """Samples for training from LLaVA JSON, JSON lines, or a list of such entries.

        {"conversations": [{"from": "human", "value": "<video>\\nWhat happens?"}, {"from": "gpt", "value": "Rain."}],
         "video": "x.mp4"}

    `video` and `image` hold a path or a list of paths, in the order of the placeholders. Chat messages under
    `messages` are accepted as well, their media among the content parts or under `video` and `image`. A video without a
    conversation is a sample for reconstruction alone. Other keys are ignored; `id` is used in errors.

    A sample is a dict of tensors: `input_ids` `[S]`, `labels` `[S]` (-100 except where the assistant speaks, the token
    that ends its turn included), and what the processor returned for its media; beside them, `sample_name`, a text.

    Args:
        data: path of a `.json` or `.jsonl` file, or the entries themselves.
        processor: a `LlavaNextARProcessor`, or one with the same `apply_chat_template`.
        video_root: folder that paths are relative to; by default that of the file, or the working folder for a list.
        image_root: the same for images; by default `video_root`.
        allow_outside_root: accept URLs, and paths that leave the folder (`..`, absolute paths, symbolic links).
            Otherwise they are errors: a data set from elsewhere shall not read whatever it likes.
        max_length: tokens that a sample may have.
        truncate: cut a sample that is longer at its end instead of refusing it. Visual tokens and the last target are
            never cut off: those are errors still.
        processor_kwargs: options for every call of the processor, such as `{"num_frames": 8}`.

    Raises:
        ValueError: if the file holds no list of entries, or the processor's chat template marks no assistant turns.
        BadSampleError: by `dataset[i]`, for a sample that cannot be used.
    """

    def __init__(
        self,
        data: str | os.PathLike | Sequence[dict[str, Any]],
        processor: Any,
        *,
        video_root: str | os.PathLike | None = None,
        image_root: str | os.PathLike | None = None,
        allow_outside_root: bool = False,
        max_length: int | None = None,
        truncate: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.processor = processor
        self.name = "the list of samples"
        default_root = Path.cwd()
        if isinstance(data, (str, os.PathLike)):
            self.name, default_root = os.fspath(data), Path(data).absolute().parent
            data = _read_entries(Path(data))
        if not len(data):
            raise ValueError(f"{self.name} is empty")
        self.entries = data
        self.video_root = Path(default_root if video_root is None else video_root)
        self.image_root = Path(self.video_root if image_root is None else image_root)
        self.allow_outside_root = allow_outside_root
        self.max_length = max_length
        self.truncate = truncate
        self.processor_kwargs = dict(processor_kwargs or {})
        # A template that marks no answers would fail at every sample; say it once, before any is read.
        self._call_processor([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        messages = self.messages(index)
        try:
            return {**self._encode(messages), SAMPLE_NAME: self.sample_name(index)}
        except (ValueError, OSError) as error:
            raise self._bad_sample(index, error) from error

    def sample_name(self, index: int) -> str:
        """How a person finds a sample: its index, its `id` if it has one, the data set and its media."""
        entry = self.entries[index]
        sample_id, files = (entry.get("id"), _media_names(entry)) if isinstance(entry, dict) else (None, [])
        named = f" (id {sample_id!r})" if sample_id is not None else ""
        files_named = f" [{', '.join(files)}]" if files else ""
        return f"sample {index}{named} of {self.name}{files_named}"

    def messages(self, index: int) -> list[dict[str, Any]]:
        """The entry as chat messages with the full paths of its media; decodes nothing.

        Raises:
            BadSampleError: if it is malformed, or a file is missing or outside of its folder.
        """
        try:
            return self._to_messages(self.entries[index])
        except (ValueError, OSError) as error:
            raise self._bad_sample(index, error) from error

    def check(self) -> None:
        """Looks through all entries without decoding any media, so that a typo does not surface after hours.

        Raises:
            BadSampleError: for the first entry that is malformed or whose file is missing.
        """
        for index in range(len(self)):
            self.messages(index)

    def _bad_sample(self, index: int, cause: Exception) -> BadSampleError:
        entry = self.entries[index]
        sample_id, files = None, []
        if isinstance(entry, dict):
            sample_id, files = entry.get("id"), _media_names(entry)
        return BadSampleError(f"{self.sample_name(index)}: {cause}", index=index, sample_id=sample_id, files=files)

    # ---- entry -> messages ------------------------------------------------------------------------------------------

    def _to_messages(self, entry: Any) -> list[dict[str, Any]]:
        if not isinstance(entry, dict):
            raise ValueError(f"an entry must be a dict, got {type(entry).__name__}")
        videos = [self._path(name, "video") for name in _as_list(entry, "video")]
        images = [self._path(name, "image") for name in _as_list(entry, "image")]
        if "conversations" in entry and "messages" in entry:
            raise ValueError("the entry has both 'conversations' and 'messages'")
        if "conversations" in entry:
            messages = llava_conversation_to_messages(_turns(entry["conversations"]), videos=videos, images=images)
        elif "messages" in entry:
            messages = self._from_chat(entry["messages"], videos, images)
        elif videos and not images:
            return [{"role": "user", "content": [{"type": "video", "video": video} for video in videos]}]
        else:
            raise ValueError("the entry has neither 'conversations' nor 'messages', nor a video alone to reconstruct")
        if not any(message["role"] == "assistant" and _text_of(message).strip() for message in messages):
            raise ValueError("the conversation has no answer (no turn from 'gpt' with text)")
        return messages

    def _from_chat(self, chat: Any, videos: list[str], images: list[str]) -> list[dict[str, Any]]:
        if not isinstance(chat, list) or not all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in chat
        ):
            raise ValueError(f"'messages' must be a list of dicts with 'role' and 'content', got {str(chat)[:200]}")
        for number, message in enumerate(chat):
            if message["role"] not in ("system", "user", "assistant"):
                raise ValueError(
                    f"message {number} has the role {message['role']!r}, expected one of system, user, assistant"
                )
        if all(isinstance(message["content"], str) for message in chat):
            # Plain strings with placeholders: LLaVA's form under other names.
            roles = {"system": "system", "user": "human", "assistant": "gpt"}
            turns = [{"from": roles[message["role"]], "value": message["content"]} for message in chat]
            return llava_conversation_to_messages(turns, videos=videos, images=images)
        left = {"video": list(videos), "image": list(images)}
        messages = []
        for number, message in enumerate(chat):
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            parts = [self._part(part, f"message {number}", message["role"], left) for part in parts]
            messages.append({"role": message["role"], "content": parts})
        for kind, names in left.items():
            if names:
                raise ValueError(f"{len(names)} more {kind}s were given than the messages have parts for: {names[0]}")
        return messages

    def _part(self, part: Any, where: str, role: str, left: dict[str, list[str]]) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        for media in ("video", "image"):
            if kind not in (media, f"{media}_url"):
                continue
            if role != "user":
                raise ValueError(f"{where} is from {role!r} but holds a {media}")
            sources = [part[name] for name in (media, "path", "url", f"{media}_url") if part.get(name) is not None]
            if sources:
                source = sources[0].get("url") if isinstance(sources[0], dict) else sources[0]
                return {"type": media, media: self._path(source, media)}
            if not left[media]:
                raise ValueError(f"{where} holds a {media} part, but no {media} is given for it")
            return {"type": media, media: left[media].pop(0)}
        raise ValueError(f"{where} holds {str(part)[:200]}; a content part is a dict of type text, image or video")

    def _path(self, name: Any, kind: str) -> str:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{kind} must be a path, got {name!r}")
        root = self.video_root if kind == "video" else self.image_root
        if "://" in name or name.startswith("data:"):
            if self.allow_outside_root:
                return name
            raise ValueError(
                f"{kind} {name[:200]!r} is a URL, expected a path below {root}; allow_outside_root=True accepts it"
            )
        if not self.allow_outside_root:
            return path_below(root, name, kind)
        path = os.path.abspath(root / name)
        if not os.path.exists(path):
            raise FileNotFoundError(f"no such file: {path}")
        return path

    # ---- messages -> sample -----------------------------------------------------------------------------------------

    def _call_processor(self, messages: list[dict[str, Any]]) -> Any:
        return self.processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs=dict(self.processor_kwargs),
        )

    def _encode(self, messages: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = self._call_processor(messages)
        input_ids, is_target = inputs["input_ids"][0], inputs["assistant_masks"][0].bool()
        labels = torch.where(is_target, input_ids, -100)
        if any(message["role"] == "assistant" for message in messages) and not is_target.any():
            raise ValueError("the chat template marked no token of the answer")
        if self.max_length is not None and len(input_ids) > self.max_length:
            self._check_cut(input_ids, labels)
            input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        media = {
            name: value
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor) and name not in ("input_ids", "attention_mask", "assistant_masks")
        }
        return {"input_ids": input_ids, "labels": labels, **media}

    def _check_cut(self, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        """Refuses a sample that is too long, or whose visual tokens or targets would all be cut off."""
        excess = len(input_ids) - self.max_length
        too_long = f"it has {len(input_ids)} tokens, {excess} more than max_length={self.max_length}"
        is_visual = (input_ids == self.processor.video_token_id) | (input_ids == self.processor.image_token_id)
        num_cut = int(is_visual[self.max_length :].sum())
        if num_cut:
            raise ValueError(
                f"{too_long}, and {num_cut} of its {int(is_visual.sum())} visual tokens lie beyond; they are never "
                "cut off. Sample fewer frames or raise max_length"
            )
        if not self.truncate:
            raise ValueError(f"{too_long}; truncate=True cuts the end off")
        targets = (labels != -100).nonzero().flatten()
        if len(targets) and targets[0] >= self.max_length:
            raise ValueError(
                f"{too_long}, and all its {len(targets)} targets lie beyond; the first one is "
                f"{int(targets[0]) + 1 - self.max_length} too far"
            )


def _read_entries(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                entries = [json.loads(line) for line in file if line.strip()]
            else:
                entries = json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of entries, got {type(entries).__name__}")
    return entries


def _as_list(entry: dict[str, Any], kind: str) -> list[Any]:
    """What an entry holds under `video` or `videos`: nothing, one name or a list of names."""
    values = [entry[name] for name in (kind, f"{kind}s") if entry.get(name) is not None]
    if len(values) > 1:
        raise ValueError(f"the entry has both {kind!r} and '{kind}s'")
    value = values[0] if values else []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _media_names(entry: dict[str, Any]) -> list[str]:
    """Every file that an entry names, for errors: nothing in it can be relied on."""
    values = [entry.get(name) for name in ("video", "videos", "image", "images")]
    messages = entry.get("messages")
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            values += [part.get(name) for name in ("video", "image", "path", "url")] if isinstance(part, dict) else []
    flat = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [str(name) for name in flat if name is not None]


def _turns(conversations: Any) -> list[dict[str, str]]:
    if not isinstance(conversations, list):
        raise ValueError(f"'conversations' must be a list of turns, got {type(conversations).__name__}")
    for number, turn in enumerate(conversations):
        if isinstance(turn, dict) and not isinstance(turn.get("value", ""), str):
            raise ValueError(f"turn {number} must have a string as 'value', got {turn['value']!r}")
    return conversations


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
