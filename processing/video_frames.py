# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Frames of a video with their presentation times, at one or several scales.

    video = load_video("clip.mp4", FrameSampling(policy="uniform", num_frames=8), size=(384, 384))
    video.frames       # [8, 3, 384, 384] uint8
    video.timestamps   # [8] seconds, as stored in the file, also if the frame rate varies

A video is a file, bytes, a URL, an array, a list of images or a folder of images. Frames are resized as they are
decoded, so that memory holds the small frames alone. Files are decoded in video_decoding.py, pictures in media_sources.py,
frames are chosen in frame_sampling.py.

Shape letters: T frames, H x W and h x w pixels before and after resizing, P patches, D features.
"""

import contextlib
import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from ..configuration.frame_token_layout import pool_patches
from .frame_sampling import (  # noqa: F401
    FAST,
    SAMPLING_POLICIES,
    SLOW,
    FrameSampling,
    SampledFrames,
    time_instruction,
)
from .media_sources import (  # noqa: F401
    IMAGE_SUFFIXES,
    ImageReader,
    PictureReader,
    check_shape,
    images_in,
    is_url,
    local_file,
    open_image,
    open_picture,
    source_name,
)
from .video_decoding import (  # noqa: F401
    FILE_READERS,
    MAX_FRAME_PIXELS,
    MAX_THREADS,
    Emit,
    FrameReader,
    PyAVReader,
    TimesChanged,
    VideoBackend,
    VideoReadError,
    choose_backend,
)

logger = logging.getLogger(__name__)

ResizeBackend = Literal["torch", "pil"]
Resample = Literal["bicubic", "bilinear"]


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """Frames of one video. Built by `load_video`.

    Attributes:
        frames: `[T, 3, h, w]` uint8 RGB. Without resizing a view of `[T, H, W, 3]` (memory format channels last).
        timestamps: `[T]` float64, seconds from the first frame of the video, as stored in the container.
        indices: `[T]` int64, indices of the frames in the video, in order of time.
        frame_types: 0 (slow) or 1 (fast) for each frame, if the policy has types.
        fps: average frame rate of the video.
        duration: seconds, the last frame of the video shown for `1 / fps`, or for its own delay in an animation,
            included.
        total_frames: number of readable frames of the video.
        source: name of the video, for messages.
        missing: number of unreadable frames; above 0 only with `allow_partial`.
        other_scales: `[T, 3, h, w]` uint8 for each of `other_sizes`.
    """

    frames: torch.Tensor
    timestamps: torch.Tensor
    indices: torch.Tensor
    frame_types: tuple[int, ...] | None
    fps: float
    duration: float
    total_frames: int
    source: str
    missing: int = 0
    other_scales: tuple[torch.Tensor, ...] = ()

    def __len__(self) -> int:
        return self.frames.shape[0]

    def __repr__(self) -> str:
        scales = "".join(f" + {list(scale.shape)}" for scale in self.other_scales)
        return (
            f"VideoFrames({self.source!r}: frames {list(self.frames.shape)}{scales}, {self.duration:.2f} s at "
            f"{self.fps:.2f} fps, {self.total_frames} frames, {self.missing} missing)"
        )


def load_video(
    source: Any,
    sampling: FrameSampling | None = None,
    *,
    backend: VideoBackend = "auto",
    size: tuple[int, int] | int | None = None,
    other_sizes: Sequence[tuple[int, int] | int] = (),
    resample: Resample = "bicubic",
    resize_backend: ResizeBackend = "torch",
    allow_partial: bool = False,
    fps: float | None = None,
    num_threads: int | None = None,
) -> VideoFrames:
    """Read the sampled frames of a video.

    Args:
        source: a path, a http(s), file or data URL, bytes, a file object, an array or tensor of frames (`[T, H, W, C]`
            or `[T, C, H, W]`, integers from 0 to 255 or floats in [0, 1], C = 1, 3 or 4), a list of images (PIL,
            arrays, paths, URLs), or a folder of images. Animated pictures (GIF, APNG, WebP, AVIF) are videos with their
            own delays. Pictures are turned upright (EXIF), grey is repeated, transparency laid on white.
        sampling: None for all frames.
        backend: `"pyav"`, `"decord"`, `"torchcodec"`, or `"auto"`: PyAV if it is installed, else another one.
            PyAV was the fastest and the most exact in measurements (see video_decoding.py).
        size: `(h, w)`, or one number for a square; None leaves frames as they are.
        other_sizes: further sizes, resized from the same decoded frames, returned as `other_scales`.
        resample, resize_backend: see `resize_frames`.
        allow_partial: return the readable frames of a damaged video (with a warning) instead of an error. Frames are
            then sampled from the readable ones. decord rejects most damaged files as a whole.
        fps: frame rate of arrays and still images, which have no times; by default 2.
        num_threads: for decoding; by default torch's number of threads (1 in a DataLoader worker), at most 8.

    Raises:
        VideoReadError: if the video is missing, not a video, damaged or empty, with the source and the cause.
        ValueError: if the sampling policy rejects the video or an argument is out of range.
        TypeError: for a source of another type.
        ImportError: if the back end is not installed, or too old.
    """
    sizes = [None if size is None else _size(size), *map(_size, other_sizes)]
    _check_resize_options(resample, resize_backend)
    with _open_reader(source, backend, fps=fps, num_threads=num_threads) as reader:
        if reader.missing and not allow_partial:
            raise _damaged(reader, reader.missing)
        sampled, scales, lost = _read_sampled(reader, sampling, sizes, resample, resize_backend)
        kept = [row for row, index in enumerate(sampled.indices.tolist()) if index not in lost]
        missing = reader.missing + len(lost)
        if missing and not (allow_partial and kept):
            raise _damaged(reader, missing)
        if missing:
            logger.warning("%s is damaged: %d of its frames are missing", reader.name, missing)
        frames, *other_scales = [scale if not lost else scale[kept] for scale in scales]
        indices = sampled.indices[kept]
        return VideoFrames(
            frames=frames,
            timestamps=torch.from_numpy(reader.timestamps[indices].astype(np.float64)),
            indices=torch.from_numpy(indices),
            frame_types=None if sampled.frame_types is None else tuple(sampled.frame_types[k] for k in kept),
            fps=reader.fps,
            duration=reader.duration,
            total_frames=len(reader.timestamps),
            source=reader.name,
            missing=missing,
            other_scales=tuple(other_scales),
        )


def video_length(source: Any) -> tuple[int, float]:
    """Return the number of frames and the frame rate of any source of `load_video`.

    For a file that PyAV reads, these are the values of its header, which are cheap and can be wrong. Without them, and
    for all other sources, the values are exact.

    Raises:
        VideoReadError: if the video is missing, not a video or empty, as far as its header shows.
    """
    is_path = isinstance(source, (str, os.PathLike)) and not is_url(source) and os.path.isfile(source)
    if (is_path or isinstance(source, bytes)) and choose_backend("auto") == "pyav":
        file, name = os.fspath(source) if is_path else source, source_name(source)
        picture = open_picture(file, name)
        if picture is None:
            num_frames, fps = PyAVReader.read_header(file, name)
            if num_frames and fps:
                return num_frames, fps
        else:
            picture.close()
    with _open_reader(source) as reader:
        return len(reader.timestamps), reader.fps


def video_times(source: Any, fps: float | None = None) -> tuple[np.ndarray, float, float, np.ndarray | None]:
    """Return presentation times `[T]` in seconds, frame rate, duration, and costs as in `FrameReader`, of a source that
    `load_video` reads with `fps`.

    Nothing is decoded where a file's packets have times.

    Raises:
        VideoReadError: as `video_length`.
    """
    with _open_reader(source, fps=fps) as reader:
        return reader.timestamps, reader.fps, reader.duration, reader.costs


def _read_sampled(
    reader: FrameReader,
    sampling: FrameSampling | None,
    sizes: list[tuple[int, int] | None],
    resample: Resample,
    resize_backend: ResizeBackend,
) -> tuple[SampledFrames, list[torch.Tensor], set[int]]:
    """Return the selection, its pixels `[T, 3, h, w]` for each size, and the indices that could not be decoded."""
    while True:
        total = len(reader.timestamps)
        if sampling is None:
            sampled = SampledFrames(np.arange(total))
        else:
            sampled = sampling.select(total, reader.fps, reader.timestamps, reader.costs)
        distinct, place_of = np.unique(sampled.indices, return_inverse=True)  # some policies repeat frames
        stacks = [_FrameStack(len(distinct), size, resample, resize_backend, reader.name) for size in sizes]

        def emit(index: int, frame: np.ndarray, stacks=stacks, distinct=distinct) -> None:
            for stack in stacks:
                stack.put(int(np.searchsorted(distinct, index)), frame)

        try:
            lost = reader.read(distinct, emit)
        except TimesChanged:  # at most once
            continue
        scales = [stack.frames for stack in stacks]
        if len(distinct) < len(sampled.indices) and len(lost) < len(distinct):
            scales = [scale[place_of] for scale in scales]
        return sampled, scales, lost


class _FrameStack:
    """Buffer of frames of one size, resized as they arrive, from several threads and in any order."""

    def __init__(
        self, num_frames: int, size: tuple[int, int] | None, resample: Resample, backend: ResizeBackend, source: str
    ):
        self._num_frames, self._size, self._resample, self._backend = num_frames, size, resample, backend
        self._source, self._lock = source, threading.Lock()
        self.frames = None if size is None else torch.empty(num_frames, 3, *size, dtype=torch.uint8)  # [T, 3, h, w]

    def put(self, row: int, frame: np.ndarray) -> None:
        pixels = torch.from_numpy(np.require(frame, requirements=["C", "W"])).permute(2, 0, 1)  # [3, H, W]
        if self._size is not None:
            pixels = _resize(pixels, self._size, self._resample, self._backend)
        with self._lock:
            if self.frames is None:  # rows of RGB triples, as decoders write them: a copy without reordering
                self.frames = torch.empty(self._num_frames, *frame.shape, dtype=torch.uint8).permute(0, 3, 1, 2)
        if pixels.shape != self.frames.shape[1:]:
            raise VideoReadError(
                self._source,
                f"its frames differ in size ({_by(self.frames.shape[2:])} and {_by(pixels.shape[1:])}); give a size",
            )
        _copy(pixels, self.frames[row])


def _damaged(reader: FrameReader, missing: int) -> VideoReadError:
    return VideoReadError(
        reader.name,
        f"it is damaged or truncated, {missing} of its frames are missing (allow_partial=True reads the rest)",
    )


# -- Resizing


def resize_frames(
    frames: torch.Tensor,
    size: tuple[int, int] | int,
    *,
    resample: Resample = "bicubic",
    backend: ResizeBackend = "torch",
) -> torch.Tensor:
    """Resize uint8 frames with antialiasing, one at a time (the fastest way, in constant memory).

    Args:
        frames: `[T, 3, H, W]` uint8.
        size: `(h, w)`, or one number for a square. Frames of that size are returned as they are.
        resample: `"bicubic"` or `"bilinear"`.
        backend: `"pil"` is Pillow, bit for bit. `"torch"` is several times as fast, most for frames in memory format
            channels last, and differs from Pillow by at most 2 of 255 (measured on films, noise and sharp edges,
            shrinking and growing). The share of values that differ depends on the sizes.

    Returns:
        `[T, 3, h, w]` uint8.
    """
    height, width = _size(size)
    _check_resize_options(resample, backend)
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(f"frames must be [T, 3, H, W] uint8, got {list(frames.shape)} {frames.dtype}")
    if frames.shape[2:] == (height, width):
        return frames
    resized = torch.empty(len(frames), 3, height, width, dtype=torch.uint8)
    for frame, target in zip(frames, resized, strict=True):
        _copy(_resize(frame, (height, width), resample, backend), target)
    return resized


def _resize(frame: torch.Tensor, size: tuple[int, int], resample: Resample, backend: ResizeBackend) -> torch.Tensor:
    """`[3, H, W]` -> `[3, h, w]`; the arguments are valid."""
    if frame.shape[1:] == size:
        return frame
    if backend == "torch":
        return torch.nn.functional.interpolate(frame[None], size, mode=resample, antialias=True)[0]
    image = Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).numpy()))
    image = image.resize((size[1], size[0]), Image.Resampling[resample.upper()])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy with numpy: waking torch's thread pool costs more than the copy on a busy machine."""
    np.copyto(target.numpy(), source.numpy())


def _check_resize_options(resample: Resample, backend: ResizeBackend) -> None:
    if resample not in get_args(Resample):
        raise ValueError(f"resample={resample!r} is not one of {', '.join(get_args(Resample))}")
    if backend not in get_args(ResizeBackend):
        raise ValueError(f"resize backend {backend!r} is not one of {', '.join(get_args(ResizeBackend))}")


def _size(size: tuple[int, int] | int) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size must be (height, width) of at least 1 pixel each, got {size!r}")
    return int(height), int(width)


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


class MultiScaleVideoFrameLoader:
    """Loader of videos as float frames, at one scale or at several from one decode.

        loader = MultiScaleVideoFrameLoader()
        loader.load_video_frames("clip.mp4", max_frames=8)     # [8, 3, 384, 384]
        loader.load_video_frames("clip.mp4", max_frames=8, enable_multiscale=True, scale_factors=(1.0, 0.5))
        # list of [8, 3, 384, 384] and [8, 3, 192, 192]

    Args:
        backend, resize_backend, allow_partial, num_threads: as for `load_video`.
    """

    def __init__(
        self,
        backend: VideoBackend = "auto",
        *,
        resize_backend: ResizeBackend = "torch",
        allow_partial: bool = False,
        num_threads: int | None = None,
    ) -> None:
        self._options = {
            "backend": backend,
            "resize_backend": resize_backend,
            "allow_partial": allow_partial,
            "num_threads": num_threads,
        }

    def load_video_frames(
        self,
        video_path: Any,
        max_frames: int = 32,
        sample_rate: int = 1,
        target_size: tuple[int, int] | int = (384, 384),
        enable_multiscale: bool = False,
        scale_factors: Sequence[float] = (1.0, 0.75, 0.5),
        short_clip: str = "all",
    ) -> torch.Tensor | list[torch.Tensor]:
        """Every `sample_rate`-th frame, evenly thinned to `max_frames`.

        Args:
            video_path: any source that `load_video` takes.
            target_size: `(h, w)`, or one number for a square.
            enable_multiscale: return one tensor for each of `scale_factors`.
            scale_factors: the sizes as fractions of `target_size`, rounded to whole pixels.
            short_clip: `"all"`: a clip with fewer than `max_frames` frames gives all; `"error"`: ValueError.

        Returns:
            `[T, 3, h, w]` float32 in [0, 1], or a list of such. Raises what `load_video` raises.
        """
        height, width = _size(target_size)
        factors = tuple(scale_factors) if enable_multiscale else (1.0,)
        if not factors or min(factors) <= 0:
            raise ValueError(f"scale_factors must be one or more numbers above 0, got {scale_factors!r}")
        sizes = [(max(1, round(height * factor)), max(1, round(width * factor))) for factor in factors]
        sampling = FrameSampling(
            policy="every_nth", sample_rate=sample_rate, max_frames=max_frames, short_clip=short_clip
        )
        video = load_video(video_path, sampling, size=sizes[0], other_sizes=sizes[1:], **self._options)
        scales = [scale.to(torch.float32).div_(255) for scale in (video.frames, *video.other_scales)]
        return scales if enable_multiscale else scales[0]

    def apply_spatial_pooling(
        self,
        video_features: torch.Tensor,
        stride: int = 2,
        mode: Literal["average", "max", "bilinear"] = "average",
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Pool the patches of each frame over space: `[T, P, D]` -> `[T, P', D]`.

        Args:
            stride, mode: as for `pool_patches`: average and max drop incomplete windows, bilinear rounds up.
            grid: `(height, width)` of the patches; by default a square.

        Raises:
            ValueError: if `P` is neither a square nor the size of the grid.
        """
        num_patches = video_features.shape[1]
        if grid is None:
            side = math.isqrt(num_patches)
            if side * side != num_patches:
                raise ValueError(f"{num_patches} patches a frame are not a square; give their grid (height, width)")
            grid = (side, side)
        return pool_patches(video_features, grid, stride, mode)


# -- Sources


@contextlib.contextmanager
def _open_reader(
    source: Any, backend: VideoBackend = "auto", *, fps: float | None = None, num_threads: int | None = None
) -> Iterator[FrameReader]:
    """Open any source of `load_video`; arguments and errors are described there."""
    if backend not in get_args(VideoBackend):
        raise ValueError(f"video backend {backend!r} is not one of {', '.join(get_args(VideoBackend))}")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps must be a finite number above 0, got {fps}")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")
    num_threads = min(num_threads or torch.get_num_threads(), MAX_THREADS)

    with contextlib.ExitStack() as stack:
        if isinstance(source, (np.ndarray, torch.Tensor)):
            if source.ndim != 4:
                raise ValueError(
                    f"an array of frames is [T, H, W, C] or [T, C, H, W], got shape {tuple(source.shape)}"
                )
            check_shape(source.shape)
            reader = ImageReader(source, "<array>", fps)
        elif isinstance(source, (list, tuple)):
            reader = ImageReader(source, "<list of frames>", fps)
        elif isinstance(source, Image.Image):
            reader = PictureReader(source, "<image>", fps)
        else:
            file, name = stack.enter_context(local_file(source)), source_name(source)
            if isinstance(file, str) and os.path.isdir(file):
                reader = ImageReader(images_in(file), name, fps)
            elif (picture := open_picture(file, name)) is not None:
                reader = PictureReader(stack.enter_context(picture), name, fps)
            else:
                reader = FILE_READERS[choose_backend(backend)](file, name, num_threads)
        stack.callback(reader.close)
        yield reader
