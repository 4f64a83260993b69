# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Tokens of a sample from its text and the headers of its media, without decoding."""

import io
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from transformers.utils.chat_template_utils import render_jinja_template

from ..processing.frame_sampling import FrameSampling, SampledFrames
from ..processing.llava_conversation import prepare_messages
from ..processing.media_sources import IMAGE_FPS, open_image
from ..processing.video_frames import video_length, video_times
from ..processing.video_inputs import MediaRequest, is_request, load_images


@dataclass(frozen=True)
class _Metadata:
    """The part of `VideoMetadata` that the text of a video depends on."""

    total_num_frames: int
    fps: float
    duration: float


@dataclass(frozen=True)
class SampleText:
    """Tokens of a sample, whose media are not decoded.

    Attributes:
        input_ids: `[S]` int64, a placeholder for each visual token.
        is_target: `[S]` bool, the tokens of assistant turns; None unless asked for.
        num_videos, num_frames, num_images: numbers of media and of sampled frames.
    """

    input_ids: torch.Tensor
    is_target: torch.Tensor | None
    num_videos: int
    num_frames: int
    num_images: int


def encode_text(
    processor: Any, messages: list[dict[str, Any]], options: dict[str, Any], with_targets: bool = False
) -> SampleText:
    """Encodes a conversation as the processor does, from its text and the headers of its media.

    Exact where a file's header gives the true number of frames and rate.

    Args:
        messages: with paths of media, or the media.
        options: of the call of the processor, for its videos.
        with_targets: find the tokens of assistant turns.

    Raises:
        ValueError, OSError: for a medium whose header cannot be read or that the sampling rejects.
    """
    prompt = processor.apply_chat_template(messages, tokenize=False)
    messages = prepare_messages(messages, "", {"tokenize": True})  # media with options become requests
    media = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    videos = [_video_text(processor, part["video"], options) for part in media if part["type"] == "video"]
    images = _image_texts(processor, [part["image"] for part in media if part["type"] == "image"])
    texts = {processor.video_token: iter([text for text, _ in videos]), processor.image_token: iter(images)}
    pieces, repeats, shifts = [], [], []  # of the text; of each placeholder; (end in the prompt, characters gained)
    position = 0
    for piece in re.split("(" + "|".join(map(re.escape, texts)) + ")", prompt):
        position += len(piece)
        if piece in texts:
            replacement = next(texts[piece])
            number = replacement.count(piece)
            repeats += [number] * bool(number)
            # One placeholder stays where it is, since the text on both sides of it is encoded by itself.
            written = replacement.replace(piece * number, piece, 1) if number else replacement
            shifts.append((position, len(written) - len(piece)))
            piece = written
        pieces.append(piece)
    tokenizer = processor.tokenizer
    has_start = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    encoded = tokenizer(
        "".join(pieces),
        return_offsets_mapping=with_targets,
        **({"add_special_tokens": False} if has_start else {}),
    )
    ids = np.asarray(encoded["input_ids"])
    counts = np.ones(len(ids), dtype=np.int64)
    counts[np.isin(ids, [processor.video_token_id, processor.image_token_id])] = repeats
    is_target = None
    if with_targets:
        spans = _assistant_spans(processor, messages, shifts)
        begins, ends = np.asarray(encoded["offset_mapping"]).T
        is_target = np.zeros(len(ids), dtype=bool)
        for begin, end in spans:
            is_target |= (begins < end) & (ends > begin)
        is_target = torch.from_numpy(is_target.repeat(counts))
    return SampleText(
        input_ids=torch.from_numpy(ids.repeat(counts)),
        is_target=is_target,
        num_videos=len(videos),
        num_frames=sum(num_frames for _, num_frames in videos),
        num_images=len(images),
    )


def _assistant_spans(
    processor: Any, messages: list[dict[str, Any]], shifts: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """(begin, end) of assistant turns, in characters of the prompt whose placeholders have become texts."""
    template = processor.chat_template
    template = template["default"] if isinstance(template, dict) else template
    _, ((*spans,),) = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **processor.tokenizer.special_tokens_map
    )
    return [tuple(at + sum(gained for end, gained in shifts if end <= at) for at in span) for span in spans]


def _video_text(processor: Any, video: Any, options: dict[str, Any]) -> tuple[str, int]:
    """The text of a video, or of a `MediaRequest` of one, and its number of frames."""
    video_processor = processor.video_processor
    names = video_processor.valid_kwargs.__annotations__
    given = {name: value for name, value in options.items() if name in names} | options.get("videos_kwargs", {})
    request = video if is_request(video) else MediaRequest(video, {}, "")
    request = MediaRequest(_opened(request.source), request.options, request.place)
    metadata, sampling, _, loading = video_processor.sampling_of_request(request, None, given)
    clip = _clock(request.source, metadata.fps if metadata else loading.get("fps"), sampling)
    sampled = SampledFrames(np.arange(clip.total)) if sampling is None else sampling.select(*clip[:4])
    fps = clip.fps or IMAGE_FPS
    timestamps = sampled.indices / fps if clip.times is None else clip.times[sampled.indices]
    processed: dict[str, Any] = {
        "video_frame_mask": torch.ones(1, len(sampled.indices), dtype=torch.bool),
        "video_timestamps": torch.from_numpy(timestamps)[None],
        "video_metadata": [_Metadata(clip.total, fps, clip.total / fps if clip.duration is None else clip.duration)],
    }
    if sampled.frame_types is not None:
        processed["video_frame_types"] = torch.tensor([sampled.frame_types])
    return processor.video_text(processed, 0, given), len(sampled.indices)


def _opened(video: Any) -> Any:
    """The video as `SampleReader` passes it to the processor."""
    if isinstance(video, str) and video.lower().endswith(".npy"):
        return np.load(video, mmap_mode="r", allow_pickle=False)
    return video


class _Clock(NamedTuple):
    """Frames, frames per second, seconds and cost of each frame, and duration of a video; None for values not looked up."""

    total: int
    fps: float | None
    times: np.ndarray | None = None
    costs: np.ndarray | None = None
    duration: float | None = None


def _clock(video: Any, fps: float | None, sampling: FrameSampling | None) -> _Clock:
    """Reads the values that the sampling needs; `fps` is that of frames without times."""
    needs_times = sampling is not None and sampling.needs_times
    if isinstance(video, (np.ndarray, torch.Tensor)):
        # As in `read_clip`: times use the default rate, the choice of frames by time does not.
        has_times = needs_times and (fps or sampling.policy != "fps_time")
        return _Clock(len(video), fps, np.arange(len(video)) / (fps or IMAGE_FPS) if has_times else None)
    if not needs_times:
        total, native_fps = video_length(video)
        return _Clock(total, fps or native_fps)
    times, native_fps, duration, costs = video_times(video, fps)  # packets are read, which costs more than a header
    return _Clock(len(times), native_fps, times, costs, duration)


def _image_texts(processor: Any, images: list[Any]) -> list[str]:
    if not images:
        return []
    size = processor.image_processor.size
    side = size["height"] if "height" in size else size["shortest_edge"]
    stand_in = torch.empty(1, 1, 1, 1, side)
    inputs = {
        "pixel_values": stand_in.expand(len(images), -1, -1, -1, -1),
        "image_sizes": [_upright_size(image)[::-1] for image in images],
        "batch_num_images": [len(images)],
    }
    return [processor.replace_image_token(inputs, index) for index in range(len(images))]


def _upright_size(media: Any) -> tuple[int, int]:
    """(width, height) of the image after the EXIF rotation."""
    if is_request(media):
        return media.fitted_size(_upright_size(media.source))
    if isinstance(media, Image.Image):
        image = media
    elif isinstance(media, str) and ("://" in media or media.startswith("data:")):
        image = load_images(media)
    else:
        image = open_image(io.BytesIO(media) if isinstance(media, bytes) else media)
    is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size[::-1] if is_turned else image.size
