# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Normalisation of the `videos` argument: the frames of each video, before resizing.

`flatten_videos` finds the videos in any nesting; `read_clip` turns one of them into frames, times and metadata.
Nothing is dropped: anything else raises an error with its position.

Shape letters: T frames, C channels, H x W pixels.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.video_utils import VideoMetadata

from ..configuration.key_names import refuse_unknown
from .media_sources import (
    IMAGE_FPS,
    PICTURE_ERRORS,
    check_range,
    check_shape,
    decode_base64,
    is_animation,
    is_url,
    load_picture,
    names_picture,
    native_picture,
    num_pictures,
    rgb_picture,
    source_name,
    tensor_of,
)
from .video_decoding import VideoReadError, choose_backend
from .video_frames import FrameSampling, VideoFrames, load_video


class MediaRequest:
    """Video or image with its own `PART_OPTIONS`; `place` is the position of its content part, for messages.

    Not a dataclass: transformers 5.24 converts dataclasses in messages to dicts.
    """

    def __init__(self, source: Any, options: dict[str, Any], place: str) -> None:
        self.source, self.options, self.place = source, options, place

    @property
    def pixel_limits(self) -> tuple[int, float]:
        """Return `min_pixels` and `max_pixels`; raises ValueError for invalid or contradictory ones."""
        for name in {"min_pixels", "max_pixels"} & self.options.keys():
            value = self.options[name]
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{self.place}: {name}={value!r} must be an integer of at least 1")
        low, high = self.options.get("min_pixels", 1), self.options.get("max_pixels", math.inf)
        if low > high:
            raise ValueError(f"{self.place}: min_pixels={low} is more than max_pixels={high}")
        return low, high

    def check_pixels(self, height: int, width: int) -> None:
        """Raise ValueError for frames beyond the limits: their size is that of the vision tower, which is fixed."""
        low, high = self.pixel_limits
        if not low <= height * width <= high:
            name = "min_pixels" if low > height * width else "max_pixels"
            raise ValueError(
                f"{self.place}: {name}={self.options[name]}, but each frame is resized to {height}x{width}, {height * width} "
                f" pixels, the input size of the vision tower; leave {name} out"
            )

    def sampling_options(
        self, metadata: VideoMetadata | None
    ) -> tuple[dict[str, Any], VideoMetadata | None, dict[str, Any]]:
        """Return sampling options, metadata and arguments of `load_video`; `fps` is the rate of frames without times."""
        of_source = {name: value for name, value in self.options.items() if not name.endswith("_pixels")}
        if of_source and _is_video_frames(self.source):
            raise ValueError(f"{', '.join(of_source)} cannot be applied to frames that are sampled already")
        if "fps" in of_source and isinstance(self.source, (list, tuple, np.ndarray, torch.Tensor)):
            FrameSampling(policy="fps", fps=of_source["fps"])  # validates it
            return (
                of_source,
                VideoMetadata(**{"total_num_frames": None, **(metadata or {}), "fps": of_source.pop("fps")}),
                {},
            )
        is_folder = _is_path(self.source) and os.path.isdir(self.source)
        return of_source, metadata, {"fps": of_source.pop("fps")} if is_folder and "fps" in of_source else {}

    def fit_image(self, image: Any) -> Image.Image:
        """Resize a picture to the limits, with its aspect ratio."""
        if not isinstance(image, Image.Image):
            raise ValueError(f"{self.place}: {', '.join(self.options)} need a picture, got {type(image).__name__}")
        sides = self.fitted_size(image.size)
        return image if sides == image.size else image.resize(sides, Image.BICUBIC)

    def fitted_size(self, sides: tuple[int, int]) -> tuple[int, int]:
        """Width and height of an image within the limits."""
        (low, high), size = self.pixel_limits, sides[0] * sides[1]
        scale = math.sqrt(min(max(size, low), high) / size)
        rounded = math.floor if scale < 1 else math.ceil  # never beyond the limit
        return tuple(max(1, rounded(side * scale)) for side in sides)


def flatten_videos(videos: Any) -> "tuple[list[Any], list[int] | int]":
    """Return the videos in order, and their number for each prompt if they are nested by prompts, else in all.

    A video is a path, URL, bytes, file object, `VideoFrames`, array or tensor (`[T, H, W, C]` or `[T, C, H, W]`; a
    fifth dimension in front is a batch), or a list of frames (images, arrays, paths of images). A list of videos is a
    batch, a list of lists of videos groups them by prompt. Strings are videos, unless all in their list are names of
    still images, or they lie three lists deep.

    Raises:
        ValueError: without a video, for an empty list of frames, or an array with another number of dimensions.
        TypeError: for an item that is not a video, with its position.
    """
    flat = _flatten(videos, depth=0, where="videos")
    if not flat:
        raise ValueError("no video was given, only empty lists")
    if isinstance(videos, (list, tuple)) and not _is_frame_list(videos, depth=0):
        if all(isinstance(item, (list, tuple)) and not _is_frame_list(item, depth=1) for item in videos):
            return flat, [len(_flatten(item, depth=1, where="videos")) for item in videos]
    return flat, len(flat)


def flatten_metadata(metadata: Any, num_videos: int) -> list[VideoMetadata | None]:
    """Return one entry for each video, None where nothing is given.

    Raises:
        ValueError: if there are more or fewer entries than videos, or a value is invalid (see `check_metadata`).
        TypeError: if an entry is not a mapping.
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
            raise TypeError(f"video_metadata must contain dicts or VideoMetadata, got {type(entry).__name__}")
    return [None if entry is None else check_metadata(entry) for entry in flat]


def check_metadata(entry: Mapping[str, Any]) -> VideoMetadata:
    """Validate frame rate, duration and frames of metadata; None, or a missing key, stands for an unknown value.

    Raises:
        ValueError: for an unknown key; a rate, a duration, a size or a number of frames that is not a finite number
            above 0; or `frames_indices` that are not whole numbers in order of time and within the video.
    """
    known = [field.name for field in fields(VideoMetadata)]
    refuse_unknown(entry, known, "video_metadata")
    values = {**dict.fromkeys(known), **entry}
    for name in ("total_num_frames", "width", "height", "fps", "duration"):
        value, types = values[name], (int, np.integer) if name not in ("fps", "duration") else (int, float, np.number)
        if value is None:
            continue
        if isinstance(value, (bool, complex)) or not isinstance(value, types) or not 0 < value < math.inf:
            kind = "finite" if name in ("fps", "duration") else "whole"
            raise ValueError(f"{name} in video_metadata must be a {kind} number above 0, or None, got {value!r}")
    indices = values["frames_indices"]
    if indices is not None:
        total = values["total_num_frames"]
        indices = indices.cpu().numpy() if isinstance(indices, torch.Tensor) else np.asarray(indices)
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or not len(indices):
            raise ValueError(
                f"frames_indices in video_metadata must be whole numbers, got {str(indices.tolist())[:200]}"
            )
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or (total is not None and high >= total) or np.any(np.diff(indices.astype(np.int64)) < 0):
            last = "" if total is None else f" to {total - 1}"
            raise ValueError(
                f"frames_indices in video_metadata must be in order of time, from 0{last}, got {low} to {high}"
                + (", not in order" if low >= 0 and (total is None or high < total) else "")
            )
        values["frames_indices"] = indices.tolist()
        values["total_num_frames"] = high + 1 if total is None else total
    return VideoMetadata(**values)


@dataclass
class Clip:
    """One video after reading.

    Attributes:
        scales: `[T, C, H, W]` each, uint8 or float32. One, of the native size, unless `is_resized`.
        timestamps: `[T]` float64 seconds.
        frame_types: 0 (slow) or 1 (fast) for each frame, if the sampling has types.
        metadata: as transformers' video processors return it.
        is_resized: True if `scales` have the requested sizes already.
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
    float_range: tuple[float, float],
    input_data_format: "str | ChannelDimension | None",
    sizes: list[tuple[int, int]] | None,
    **loading: Any,
) -> Clip:
    """Read the sampled frames of one video of `flatten_videos`.

    Args:
        metadata: of arrays and images, which have no times. Default of `fps`: 2 frames a second. `frames_indices`:
            indices of the given frames in the video that they were sampled from.
        sampling: None for all frames. A `VideoFrames` is sampled already.
        do_convert_rgb, input_data_format: as in transformers.
        float_range: valid range of arrays of floats; infinite where they are not rescaled.
        sizes: (h, w) of each wanted scale; files and images are resized to them as they are decoded.
        loading: arguments of `load_video`: `backend`, `resample`, `resize_backend`, `allow_partial`.

    Raises:
        ValueError: if the video cannot be read (with its name and the cause), the policy rejects it, or its values, shape
            or metadata are invalid.
    """
    if _is_video_frames(source):
        return _clip_of(source, None, is_resized=False)
    if not isinstance(source, (list, np.ndarray, torch.Tensor)):
        video = _load(source, sampling, sizes, loading)
        return _clip_of(video, choose_backend(loading["backend"]), is_resized=sizes is not None)

    if len(source) == 1 and is_url(source[0]) and metadata is None:  # not downloaded yet: it may be an animation
        return _clip_of(_load(source[0], sampling, sizes, loading), None, is_resized=sizes is not None)
    frames, times = _sample_frames(source, metadata, sampling)
    if isinstance(frames, list) and do_convert_rgb and not any(map(_is_array, frames)):  # read one at a time
        video = _load(frames, None, sizes, loading)
    else:
        parts = _channels_first_parts(frames, do_convert_rgb, float_range, input_data_format)
        if len({part.shape[1:] for part in parts}) == 1:
            return Clip([parts[0] if len(parts) == 1 else torch.cat(parts)], *times)
        if not do_convert_rgb or any(part.dtype != torch.uint8 for part in parts):
            shapes = sorted({tuple(part.shape[1:]) for part in parts})
            raise ValueError(f"the frames of one video must have one shape, got {shapes} as [C, H, W]")
        video = _load([part[0].permute(1, 2, 0) for part in parts], None, sizes, loading)
    return Clip([video.frames, *video.other_scales], *times, is_resized=sizes is not None)


def load_images(images: Any) -> Any:
    """Load image files, URLs, base64 texts and PIL images in any nesting as upright RGB images, transparency laid on
    white. Arrays stay as they are.

    Raises:
        ValueError: if an image cannot be loaded, with its name and the cause, or the values of an array are neither
            integers from 0 to 255 nor floats.
    """
    if isinstance(images, (list, tuple)):
        return [load_images(image) for image in images]
    if _is_array(images):
        tensor_of(images)
        return images
    if is_request(images):
        return images.fit_image(load_images(images.source))
    if not isinstance(images, (str, os.PathLike, Image.Image)):
        return images
    try:
        if isinstance(images, Image.Image):
            return rgb_picture(images)
        if isinstance(images, str) and not is_url(images) and not os.path.isfile(images):
            return load_picture(_from_base64(images))
        return load_picture(images)
    except PICTURE_ERRORS as error:
        cause = error.cause if isinstance(error, VideoReadError) else error
        name = "of a PIL object" if isinstance(images, Image.Image) else repr(source_name(images))
        raise ValueError(f"cannot load image {name}: {cause}") from error


def _from_base64(text: str) -> bytes:
    try:
        return decode_base64(text)
    except ValueError:
        raise ValueError("no such file, and not base64") from None


# -- Nesting


def _flatten(item: Any, depth: int, where: str) -> list[Any]:
    if is_request(item):
        inner = _flatten(item.source, 2, item.place)  # a list in a content part is one video
        if len(inner) != 1:
            raise ValueError(f"{item.place} must contain one video, got {len(inner)}")
        return [MediaRequest(inner[0], item.options, item.place)]
    if _is_array(item):
        if not 3 <= item.ndim <= 5:
            raise ValueError(
                f"{where}: an array is a video [T, H, W, C] or [T, C, H, W], a batch of videos, or one frame, got "
                f"shape {tuple(item.shape)}"
            )
        try:
            check_shape(item.shape[-4:])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return list(item) if item.ndim == 5 else [item if item.ndim == 4 else item[None]]
    if isinstance(item, Image.Image):
        return [item if num_pictures(item) > 1 else [item]]
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
    return [video for index, inner in enumerate(item) for video in _flatten(inner, depth + 1, f"{where}[{index}]")]


def _is_frame_list(items: Sequence[Any], depth: int) -> bool:
    if not items or (len(items) == 1 and isinstance(items[0], Image.Image) and num_pictures(items[0]) > 1):
        return False
    if all(_is_path(item) for item in items):
        return depth >= 2 or (all(_names_still(item) for item in items) and not any(map(is_animation, items)))
    return all(
        isinstance(item, Image.Image)
        or (_is_array(item) and item.ndim in (2, 3))
        or (_is_path(item) and _names_still(item))
        for item in items
    )


def _names_still(path: "str | os.PathLike") -> bool:
    return names_picture(path, only_still=True)


def _is_array(item: Any) -> bool:
    return isinstance(item, (np.ndarray, torch.Tensor))


def _is_path(item: Any) -> bool:
    return isinstance(item, (str, os.PathLike))


def is_request(item: Any) -> bool:
    """True for a `MediaRequest`, recognized by its attributes as in `_is_video_frames`."""
    return hasattr(item, "source") and hasattr(item, "options")


def _is_video_frames(item: Any) -> bool:
    """Test by attributes: the class exists twice when the package is loaded from a folder as remote code."""
    return hasattr(item, "frames") and hasattr(item, "timestamps")


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
    """Return the sampled frames, and their times, types and metadata."""
    num_frames = len(frames)
    if not num_frames:
        raise ValueError("a video has no frames")
    metadata = metadata or VideoMetadata(total_num_frames=num_frames)
    indices = metadata.frames_indices  # indices of the given frames in their video
    total = num_frames if metadata.total_num_frames is None else metadata.total_num_frames
    described = total if indices is None else len(indices)
    if described != num_frames:
        raise ValueError(
            f"video_metadata describes {described} frames, but the video has {num_frames}; for frames that were "
            "sampled from a longer video give their frames_indices"
        )
    chosen, frame_types = np.arange(num_frames), None
    if sampling is not None:
        # The default rate serves for times. Sampling by an unknown rate is an error.
        native_fps = metadata.fps * num_frames / total if metadata.fps else None
        times = (np.arange(num_frames) if indices is None else np.asarray(indices)) / (metadata.fps or IMAGE_FPS)
        times = None if sampling.policy == "fps_time" and not metadata.fps else times
        sampled = sampling.select(num_frames, native_fps, times)
        if not np.array_equal(chosen, sampled.indices):
            chosen = sampled.indices
            frames = [frames[i] for i in chosen] if isinstance(frames, list) else frames[chosen]
        frame_types = sampled.frame_types
    fps = metadata.fps or IMAGE_FPS
    indices = chosen if indices is None else np.asarray(indices)[chosen]
    metadata = VideoMetadata(
        total_num_frames=total,
        fps=fps,
        width=metadata.width,
        height=metadata.height,
        duration=metadata.duration or total / fps,
        video_backend=metadata.video_backend,
        frames_indices=indices.tolist(),
    )
    return frames, (torch.from_numpy(indices / fps), frame_types, metadata)


def _channels_first_parts(
    frames: Any,
    do_convert_rgb: bool | None,
    float_range: tuple[float, float],
    input_data_format: "str | ChannelDimension | None",
) -> list[torch.Tensor]:
    """Convert an array to one `[T, C, H, W]`, a list of arrays and pictures to one `[1, C, H, W]` each: uint8 if all
    values are whole numbers from 0 to 255, else float32.

    Raises:
        ValueError: for an invalid shape or value.
    """
    if _is_array(frames):
        arrays, formats = [tensor_of(frames)], [input_data_format]
    else:
        arrays, formats = [], []
        for frame in frames:
            is_array = _is_array(frame)
            pixels = tensor_of(frame if is_array else np.array(_native(frame)))
            arrays.append((pixels if pixels.ndim == 3 else pixels[..., None])[None])
            formats.append(input_data_format if is_array else ChannelDimension.LAST)
    arrays, white = _of_one_scale(arrays, float_range)
    parts = []
    for pixels, channels in zip(arrays, formats, strict=True):
        if channels is None:
            check_shape(pixels.shape if _is_array(frames) else pixels.shape[1:])
            channels = infer_channel_dimension_format(pixels, num_channels=(1, 3, 4))
        pixels = pixels.permute(0, 3, 1, 2) if ChannelDimension(channels) == ChannelDimension.LAST else pixels
        parts.append(_rgb(pixels, white) if do_convert_rgb else pixels)
    return parts


def _native(frame: Any) -> Image.Image:
    if isinstance(frame, Image.Image):
        return native_picture(frame)
    return load_picture(frame, only_still=True, convert=native_picture)


def _of_one_scale(arrays: list[torch.Tensor], float_range: tuple[float, float]) -> tuple[list[torch.Tensor], float]:
    """Return the frames of one video, all uint8 or all float32, and the value of white."""
    low, high = float_range
    floats = [array for array in arrays if array.is_floating_point()]
    if not floats:
        return arrays, 255.0
    greatest = max(check_range(array, low, high)[1] for array in floats)
    if high == math.inf:
        if len(floats) < len(arrays):
            raise ValueError("a list of 8-bit frames and frames of floats has no common scale with do_rescale=False")
        return [array.float() for array in arrays], 1.0 if greatest <= 1 else 255.0
    if 0 < greatest <= 1:
        raise ValueError(
            f"the values of a video given as floats lie in [0, {greatest:g}], and do_rescale=True would divide them by "
            f"{high:g} once more: set do_rescale=False, or give values up to {high:g}"
        )
    if high == 255 and all(bool((array == array.round()).all()) for array in floats):
        return [array.to(torch.uint8) for array in arrays], 255.0
    return [array.float() for array in arrays], high


def _rgb(frames: torch.Tensor, white: float) -> torch.Tensor:
    """`[T, C, H, W]` -> `[T, 3, H, W]`; transparency is laid on white, as in transformers."""
    if frames.shape[1] == 1:
        return frames.expand(-1, 3, -1, -1)
    if frames.shape[1] == 4:
        alpha = frames[:, 3:].float() / white
        blended = frames[:, :3] * alpha + white * (1 - alpha)
        return blended.round().to(torch.uint8) if frames.dtype == torch.uint8 else blended
    if frames.shape[1] != 3:
        raise ValueError(f"a video has 1, 3 or 4 channels, got {list(frames.shape)} as [T, C, H, W]")
    return frames
