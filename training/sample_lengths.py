# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Number of tokens of a sample from its text and the headers of its media, without a pixel."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image

from ..processing.frame_sampling import FrameSampling, SampledFrames
from ..processing.llava_conversation import prepare_messages
from ..processing.media_sources import IMAGE_FPS, open_image
from ..processing.video_frames import video_length, video_times
from ..processing.video_inputs import MediaRequest, is_request, load_images


@dataclass(frozen=True)
class _Metadata:
    """Of `VideoMetadata`, what the text of a video depends on."""

    total_num_frames: int
    fps: float
    duration: float


def count_tokens(
    processor: Any,
    messages: list[dict[str, Any]],
    options: dict[str, Any],
    count_text: Callable[[list[int]], int] = len,
) -> int:
    """The number of tokens that the processor makes of a conversation.

    Exact where a file's header gives the true number of frames and rate.

    Args:
        messages: with places of media, or the media.
        options: of the call of the processor, for its videos.
        count_text: of the tokens of the text.

    Raises:
        ValueError, OSError: for a medium whose header cannot be read, or that the sampling refuses.
    """
    prompt = processor.apply_chat_template(messages, tokenize=False)
    messages = prepare_messages(messages, "", {"tokenize": True})  # media with options become requests
    media = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    videos = [_video_text(processor, part["video"], options) for part in media if part["type"] == "video"]
    images = _image_texts(processor, [part["image"] for part in media if part["type"] == "image"])
    texts = {processor.video_token: iter(videos), processor.image_token: iter(images)}
    pieces, num_visual = [], 0
    for piece in re.split("(" + "|".join(map(re.escape, texts)) + ")", prompt):
        if piece in texts:
            replacement = next(texts[piece])
            own = replacement.count(piece)
            num_visual += own
            # One placeholder stays where it is, since the text on both sides of it is encoded by itself.
            piece = replacement.replace(piece * own, piece, 1) if own else replacement
            num_visual -= bool(own)
        pieces.append(piece)
    text, tokenizer = "".join(pieces), processor.tokenizer
    has_start = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    ids = tokenizer(text, **({"add_special_tokens": False} if has_start else {}))["input_ids"]
    return count_text(ids) + num_visual


def _video_text(processor: Any, video: Any, options: dict[str, Any]) -> str:
    """The text of a video, or of a `MediaRequest` of one."""
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
    return processor.video_text(processed, 0, given)


def _opened(video: Any) -> Any:
    """As `SampleReader` hands it to the processor."""
    if isinstance(video, str) and video.lower().endswith(".npy"):
        return np.load(video, mmap_mode="r", allow_pickle=False)
    return video


class _Clock(NamedTuple):
    """Number of frames, frames a second, seconds and cost of each frame, duration of a video; None if not looked up."""

    total: int
    fps: float | None
    times: np.ndarray | None = None
    costs: np.ndarray | None = None
    duration: float | None = None


def _clock(video: Any, fps: float | None, sampling: FrameSampling | None) -> _Clock:
    """Reads what the sampling goes by; `fps` is that of frames without times of their own."""
    needs_times = sampling is not None and sampling.needs_times
    if isinstance(video, (np.ndarray, torch.Tensor)):
        # As in `read_clip`: the default rate serves for times, but no frame is chosen by it.
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
    """(width, height) as transformers sees the image, that is, turned the way the camera was held."""
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
