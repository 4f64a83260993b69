# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Whatever a caller may mean by "videos" -> the frames of each, before resizing.

`flatten_videos` finds the videos in any nesting; `read_clip` turns one of them into frames, times and metadata.
Nothing is dropped: what is no video is an error that names its place.

Shape letters: T frames, C channels, H x W pixels.
"""

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, load_image
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from .video_decoding import VideoReadError, choose_backend
from .video_frames import (
    IMAGE_FPS,
    IMAGE_SUFFIXES,
    FrameSampling,
    VideoFrames,
    downloaded,
    load_video,
    open_image,
    split_url,
)

logger = logging.get_logger(__name__)

# A list of these is one video of frames. A GIF is more often a video of its own.
_FRAME_SUFFIXES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix != ".gif")


class MediaRequest:
    """A video or image with options of `PART_OPTIONS` of its own; `place` is that of its content part, for messages.

    Not a dataclass: transformers 5.24 makes dicts of those in messages.
    """

    def __init__(self, source: Any, options: dict[str, Any], place: str) -> None:
        self.source, self.options, self.place = source, options, place

    @property
    def pixel_limits(self) -> tuple[int, float]:
        """`min_pixels` and `max_pixels`. Raises ValueError if they are no numbers of pixels, or contradict each other."""
        for name in {"min_pixels", "max_pixels"} & self.options.keys():
            value = self.options[name]
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{self.place}: {name}={value!r} must be an integer of at least 1")
        low, high = self.options.get("min_pixels", 1), self.options.get("max_pixels", math.inf)
        if low > high:
            raise ValueError(f"{self.place}: min_pixels={low} is more than max_pixels={high}")
        return low, high

    def check_pixels(self, height: int, width: int) -> None:
        """Raises ValueError for frames beyond the limits: their size is that of the vision tower, which is fixed."""
        low, high = self.pixel_limits
        if not low <= height * width <= high:
            name = "min_pixels" if low > height * width else "max_pixels"
            raise ValueError(
                f"{self.place}: {name}={self.options[name]}, but every frame becomes {height}x{width}, {height * width} "
                f"pixels, as the vision tower takes it; leave {name} out"
            )

    def fit_image(self, image: Any) -> Image.Image:
        """The picture, enlarged or reduced to the limits, its proportions kept."""
        if not isinstance(image, Image.Image):
            raise ValueError(f"{self.place}: {', '.join(self.options)} need a picture, got {type(image).__name__}")
        (low, high), size = self.pixel_limits, image.width * image.height
        scale = math.sqrt(min(max(size, low), high) / size)
        rounded = math.floor if scale < 1 else math.ceil  # never beyond the limit
        sides = [max(1, rounded(side * scale)) for side in image.size]
        return image if scale == 1 else image.resize(sides, Image.BICUBIC)


def flatten_videos(videos: Any) -> "tuple[list[Any], list[int] | int]":
    """The videos in `videos`, in order, and how many each prompt has, where they are nested so, else their number.

    One video is a path, URL, bytes, file object, `VideoFrames`, array or tensor (`[T, H, W, C]` or `[T, C, H, W]`; a
    fifth dimension in front is a batch), or a list of frames (images, arrays, paths of images). A list of videos is a
    batch, a list of lists of videos groups them by prompt. Strings are videos, unless all in their list name images,
    or they lie three lists deep.

    Raises:
        ValueError: if there is no video, a list of frames is empty, or an array has another number of dimensions.
        TypeError: naming the place of what is no video.
    """
    flat = _flatten(videos, depth=0, where="videos")
    if not flat:
        raise ValueError("no video was given, only empty lists")
    if isinstance(videos, (list, tuple)) and not _is_frame_list(videos, depth=0):
        if all(isinstance(item, (list, tuple)) and not _is_frame_list(item, depth=1) for item in videos):
            return flat, [len(_flatten(item, depth=1, where="videos")) for item in videos]
    return flat, len(flat)


def flatten_metadata(metadata: Any, num_videos: int) -> list[VideoMetadata | None]:
    """One entry for each video, None where nothing is given.

    Raises:
        ValueError: if there are more or fewer entries than videos.
        TypeError: if an entry is no mapping.
    """
    if metadata is None:
        return [None] * num_videos
    flat = []
    for entry in [metadata] if isinstance(metadata, Mapping) else metadata:
        flat.extend(entry if isinstance(entry, (list, tuple)) else [entry])
    if len(flat) != num_videos:
        raise ValueError(f"{num_videos} videos were given, but {len(flat)} video_metadata entries; give one for each")
    for entry in flat:
        if not (entry is None or isinstance(entry, Mapping)):
            raise TypeError(f"video_metadata must hold dicts or VideoMetadata, got {type(entry).__name__}")
    return [None if entry is None else VideoMetadata(**{"total_num_frames": None, **entry}) for entry in flat]


@dataclass
class Clip:
    """One video after reading.

    Attributes:
        scales: `[T, C, H, W]` each, uint8 or float32. One, of the native size, unless `is_resized`.
        timestamps: `[T]` float64 seconds.
        frame_types: 0 (slow) or 1 (fast) for each frame, if the sampling has types.
        metadata: as transformers' video processors return it.
        is_resized: whether `scales` have the sizes that were asked for already.
    """

    scales: list[torch.Tensor]
    timestamps: torch.Tensor
    frame_types: tuple[int, ...] | None
    metadata: VideoMetadata
    is_resized: bool = False

    def __len__(self) -> int:
        return len(self.scales[0])


def read_clip(
    source: Any,
    metadata: VideoMetadata | None,
    sampling: FrameSampling | None,
    *,
    do_convert_rgb: bool | None,
    do_rescale: bool | None,
    input_data_format: "str | ChannelDimension | None",
    sizes: list[tuple[int, int]] | None,
    **loading: Any,
) -> Clip:
    """Reads the sampled frames of one video of `flatten_videos`.

    Args:
        metadata: of arrays and images, which have no times of their own: without `fps` 2 frames a second, with
            `frames_indices` the places of the given frames in the video that they come from.
        sampling: which frames; None for all of them. A `VideoFrames` is sampled already.
        do_convert_rgb, do_rescale, input_data_format: as in transformers.
        sizes: (h, w) of each wanted scale; files and images are resized to them as they are decoded.
        loading: arguments of `load_video`: `backend`, `resample`, `resize_backend`, `allow_partial`.

    Raises:
        ValueError: if the video cannot be read (naming it and the cause), its sampling is refused, or its values,
            shape or metadata make no sense.
    """
    if _is_video_frames(source):
        return _clip_of(source, None, is_resized=False)
    if not isinstance(source, (list, tuple, np.ndarray, torch.Tensor)):
        video = _load(source, sampling, sizes, loading)
        return _clip_of(video, choose_backend(loading["backend"]), is_resized=sizes is not None)

    frames, times = _sample_frames(source, metadata, sampling)
    if do_convert_rgb and isinstance(frames, list) and not all(_is_array(frame) for frame in frames):
        video = _load([load_images(frame) if _is_url(frame) else frame for frame in frames], None, sizes, loading)
        return Clip([video.frames, *video.other_scales], *times, is_resized=sizes is not None)
    return Clip([_to_channels_first(_stacked(frames), do_convert_rgb, do_rescale, input_data_format)], *times)


def load_images(images: Any) -> Any:
    """Image files and URLs become RGB images, in any nesting; everything else stays as it is.

    Raises:
        ValueError: if one cannot be loaded, naming it and the cause.
    """
    if isinstance(images, (list, tuple)):
        return [load_images(image) for image in images]
    if is_request(images):
        return images.fit_image(load_images(images.source))
    if not isinstance(images, (str, os.PathLike)):
        return images
    source = os.fspath(images)
    try:
        if _is_url(source):
            with downloaded(source) as path, open_image(path) as opened:
                return load_image(opened)
        content = source if os.path.isfile(source) else io.BytesIO(_from_base64(source))
        return load_image(open_image(content))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        cause = error.cause if isinstance(error, VideoReadError) else error
        raise ValueError(f"cannot load image {source[:200]!r}: {cause}") from error


def _from_base64(text: str) -> bytes:
    encoded = text.partition(",")[2] if text.startswith("data:image/") else text
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError as error:
        raise ValueError("there is no such file, and it is no base64") from error


# -- Nesting


def _flatten(item: Any, depth: int, where: str) -> list[Any]:
    if is_request(item):
        inner = _flatten(item.source, 2, item.place)  # a list in a content part is one video
        if len(inner) != 1:
            raise ValueError(f"{item.place} must hold one video, got {len(inner)}")
        return [MediaRequest(inner[0], item.options, item.place)]
    if _is_array(item):
        if not 3 <= item.ndim <= 5:
            raise ValueError(
                f"{where}: an array is a video [T, H, W, C] or [T, C, H, W], a batch of videos, or one frame, got "
                f"shape {tuple(item.shape)}"
            )
        return list(item) if item.ndim == 5 else [item if item.ndim == 4 else item[None]]
    if isinstance(item, Image.Image):
        return [[item]]
    is_content = isinstance(item, (bytes, bytearray, memoryview)) or hasattr(item, "read")
    if is_content or _is_path(item) or _is_video_frames(item):
        return [item]
    if not isinstance(item, (list, tuple)):
        raise TypeError(
            f"{where} is a {type(item).__name__}; a video is a path, URL, bytes, file object, array, tensor or list "
            "of frames"
        )
    if not item:
        if depth == 1:
            return []  # a prompt without a video
        raise ValueError(f"{where} is an empty list, expected frames or videos")
    if _is_frame_list(item, depth):
        return [list(item)]
    return [video for index, one in enumerate(item) for video in _flatten(one, depth + 1, f"{where}[{index}]")]


def _is_frame_list(items: Sequence[Any], depth: int) -> bool:
    if not items:
        return False
    if all(_is_path(item) for item in items):
        return depth >= 2 or all(_names_image(item) for item in items)
    return all(
        isinstance(item, Image.Image)
        or (_is_array(item) and item.ndim == 3)
        or (_is_path(item) and _names_image(item))
        for item in items
    )


def _is_array(item: Any) -> bool:
    return isinstance(item, (np.ndarray, torch.Tensor))


def _is_path(item: Any) -> bool:
    return isinstance(item, (str, os.PathLike))


def _is_url(item: Any) -> bool:
    return isinstance(item, str) and split_url(item).scheme in ("http", "https")


def is_request(item: Any) -> bool:
    """Whether it is a `MediaRequest`; by its parts, as in `_is_video_frames`."""
    return hasattr(item, "source") and hasattr(item, "options")


def _is_video_frames(item: Any) -> bool:
    """By its parts, as the class exists twice when the package is loaded from a folder as remote code."""
    return hasattr(item, "frames") and hasattr(item, "timestamps")


def _names_image(path: "str | os.PathLike") -> bool:
    return split_url(os.fspath(path)).path.lower().endswith(_FRAME_SUFFIXES)


# -- Files


def _load(
    source: Any, sampling: FrameSampling | None, sizes: list[tuple[int, int]] | None, loading: dict[str, Any]
) -> VideoFrames:
    if not sizes:
        return load_video(source, sampling, **loading)
    return load_video(source, sampling, size=sizes[0], other_sizes=sizes[1:], **loading)


def _clip_of(video: VideoFrames, backend: str | None, *, is_resized: bool) -> Clip:
    metadata = VideoMetadata(
        total_num_frames=video.total_frames,
        fps=video.fps,
        duration=video.duration,
        video_backend=backend,
        frames_indices=video.indices.tolist(),
    )
    scales = [video.frames, *video.other_scales] if is_resized else [video.frames]
    return Clip(scales, video.timestamps, video.frame_types, metadata, is_resized)


# -- Arrays and images


def _sample_frames(
    frames: Any, metadata: VideoMetadata | None, sampling: FrameSampling | None
) -> tuple[Any, tuple[torch.Tensor, tuple[int, ...] | None, VideoMetadata]]:
    """(the sampled frames, (their times, types and metadata))."""
    num_frames = len(frames)
    if not num_frames:
        raise ValueError("a video has no frames")
    metadata = metadata or VideoMetadata(total_num_frames=num_frames)
    places = metadata.frames_indices  # of the given frames in the video that they come from
    total = num_frames if metadata.total_num_frames is None else metadata.total_num_frames
    described = total if places is None else len(places)
    if described != num_frames:
        raise ValueError(
            f"video_metadata describes {described} frames, but the video has {num_frames}; for frames that were "
            "sampled from a longer video give their frames_indices"
        )
    chosen, frame_types = np.arange(num_frames), None
    if sampling is not None:
        # The default rate is good enough for times, but frames are not chosen by a rate that nobody knows.
        native_fps = metadata.fps * num_frames / total if metadata.fps else None
        times = (np.arange(num_frames) if places is None else np.asarray(places)) / (metadata.fps or IMAGE_FPS)
        sampled = sampling.select(num_frames, native_fps, times)
        if not np.array_equal(chosen, sampled.indices):
            chosen = sampled.indices
            frames = [frames[i] for i in chosen] if isinstance(frames, list) else frames[chosen]
        frame_types = sampled.frame_types
    fps = metadata.fps or IMAGE_FPS
    places = chosen if places is None else np.asarray(places)[chosen]
    metadata = VideoMetadata(
        total_num_frames=total,
        fps=fps,
        width=metadata.width,
        height=metadata.height,
        duration=metadata.duration or total / fps,
        video_backend=metadata.video_backend,
        frames_indices=places.tolist(),
    )
    return frames, (torch.from_numpy(places / fps), frame_types, metadata)


def _stacked(frames: Any) -> torch.Tensor:
    """An array, a tensor, or a list of arrays or images as one tensor with four dimensions."""
    if isinstance(frames, torch.Tensor):
        return frames.detach()
    if isinstance(frames, list):
        tensors = [frame if isinstance(frame, torch.Tensor) else _tensor_of(_opened(frame)) for frame in frames]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise ValueError(f"the frames of one video must have one shape, got {sorted(shapes)}")
        stacked = torch.stack(tensors)
        return stacked if stacked.ndim == 4 else stacked[..., None]  # grey images have no channels
    return _tensor_of(frames)


def _opened(frame: Any) -> np.ndarray:
    if _is_array(frame):
        return frame
    if _is_path(frame):
        frame = load_images(frame) if _is_url(frame) else open_image(frame)
    return np.array(frame)


def _tensor_of(array: np.ndarray) -> torch.Tensor:
    # torch warns of arrays that must not be written to (nothing is written here) and refuses negative strides
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def _to_channels_first(
    frames: torch.Tensor,
    do_convert_rgb: bool | None,
    do_rescale: bool | None,
    input_data_format: "str | ChannelDimension | None",
) -> torch.Tensor:
    """`[T, C, H, W]`: uint8 where all values are whole numbers from 0 to 255, else float32."""
    channels = input_data_format or infer_channel_dimension_format(frames, num_channels=(1, 3, 4))
    if ChannelDimension(channels) == ChannelDimension.LAST:
        frames = frames.permute(0, 3, 1, 2)
    if frames.dtype != torch.uint8:
        frames = _checked_values(frames, do_rescale)
    if not do_convert_rgb:
        return frames
    if frames.shape[1] == 1:
        return frames.expand(-1, 3, -1, -1)
    if frames.shape[1] == 4:  # transparency is laid on white, as in transformers
        top = 255.0 if frames.dtype == torch.uint8 or frames.max() > 1 else 1.0
        alpha = frames[:, 3:].float() / top
        blended = frames[:, :3] * alpha + top * (1 - alpha)
        return blended.round().to(torch.uint8) if frames.dtype == torch.uint8 else blended
    if frames.shape[1] != 3:
        raise ValueError(f"a video has 1, 3 or 4 channels, got {list(frames.shape)} as [T, C, H, W]")
    return frames


def _checked_values(frames: torch.Tensor, do_rescale: bool | None) -> torch.Tensor:
    if frames.dtype == torch.bool or frames.is_complex():
        raise ValueError(f"a video holds uint8 or float values, got {frames.dtype}")
    low, high = frames.min().item(), frames.max().item()
    is_8_bit = low >= 0 and high <= 255
    if not frames.is_floating_point():
        if not is_8_bit:
            raise ValueError(f"a video of {frames.dtype} must lie in 0 ... 255, got {low} ... {high}")
        return frames.to(torch.uint8)
    if low != low or high != high or abs(low) == float("inf") or high == float("inf"):
        raise ValueError("a video holds values that are not finite")
    if do_rescale and low >= 0 and high <= 1:
        logger.warning_once(
            "The values of a video given as floats lie in [0, 1] already, and do_rescale=True divides them by 255 "
            "once more: set do_rescale=False."
        )
    return frames.to(torch.uint8) if is_8_bit and bool((frames == frames.round()).all()) else frames.float()
