# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Back ends beside PyAV, for MP4, MOV, Matroska and WebM: decord and torchcodec.

Pixels of 8-bit video equal those of PyAV. Pixels of video with more bits differ, most at edges of colour. Neither
mirrors frames, reads transparency, or separates the fields of interlaced pictures.

`DecordReader` reads from the start and never seeks: decord counts frames after a seek. The count is wrong where a
key frame is followed by frames that are shown before it (open groups of pictures, the default of x265; MPEG-4 with
B-frames), after intra refresh, and in AVI and MPEG-TS. So the reader is exact, but slow in long videos. decord 0.6 does
not decode AV1 and rejects a damaged file as a whole.

`TorchCodecReader` seeks. torchcodec lists no times: they are read by PyAV, or by decoding all frames.
"""

import contextlib
import io
import logging
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .video_reader import (
    Emit,
    FrameReader,
    VideoReadError,
    display_matrix,
    frame_rate,
    has_alpha,
    is_matroska,
    is_mp4,
    orientation,
    why_unreadable,
)

try:
    import decord
except ImportError:
    decord = None

logger = logging.getLogger(__name__)

_TIME_TOLERANCE = 2e-3  # seconds; Matroska rounds to milliseconds


def import_torchcodec() -> Any:
    """The class `torchcodec.decoders.VideoDecoder`.

    Raises:
        ImportError: if it cannot be imported, with the cause in one line (torchcodec's message has hundreds).
    """
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        hint = "pip install torchcodec" if isinstance(error, ModuleNotFoundError) else "it needs FFmpeg's libraries"
        cause = _first_line(error).rstrip(". ")
        raise ImportError(f"video backend 'torchcodec' cannot be imported: {cause}; {hint}") from error
    return VideoDecoder


class DecordReader:
    """Reader of a file with decord, from its start.

    Args:
        file: path or content.
        name: for messages.
        num_threads: of the decoder.
        stream_index: unused; decord chooses the stream.
        times: unused; decord lists times.
    """

    backend = "decord"
    costs = None
    takes_stream_index = False
    turns_inexactly = False  # only by a multiple of 90 degrees, and only in MP4

    def __init__(
        self,
        file: str | bytes,
        name: str,
        num_threads: int,
        stream_index: int | None = None,
        times: np.ndarray | None = None,
    ) -> None:
        self.name, self.missing = name, 0
        _refuse_container(file, name, self.backend)
        try:
            opened = io.BytesIO(file) if isinstance(file, bytes) else file
            self._reader = reader = decord.VideoReader(opened, num_threads=num_threads)
            shown = reader.get_frame_timestamp(list(range(len(reader))))[:, 0].astype(np.float64)
            rate = float(reader.get_avg_fps())
        except (decord.DECORDError, RuntimeError) as error:
            if "Failed to measure duration" in str(error):  # live streams and pipes, as Chrome records them
                cause = "its header has no duration, which decord needs to count frames; use the back end 'pyav'"
                raise VideoReadError(name, cause) from error
            raise VideoReadError(name, why_unreadable(file, _first_line(error))) from error
        shown = shown[shown >= 0]  # frames that an edit list hides; decord counts them, and repeats the last frame
        if not len(shown):
            raise VideoReadError(name, "it has no readable video frame")
        self.timestamps = shown - shown[0]
        self.fps = frame_rate(rate, self.timestamps)
        self.duration = float(self.timestamps[-1]) + 1 / self.fps

    def close(self) -> None:
        self._reader = None

    def read(self, indices: np.ndarray, emit: Emit) -> set[int]:
        wanted = indices.tolist()
        reader = self._reader
        keys = sorted(set(reader.get_key_indices()))
        at = 0
        for done, index in enumerate(wanted):
            try:
                # `skip_frames` seeks where it would reach or pass a key frame: read up to it instead.
                for key in [key for key in keys if at < key <= index]:
                    _skip(reader, key - 1 - at)
                    reader.next()
                    at = key
                _skip(reader, index - at)
                frame = reader.next().asnumpy()
                at = index + 1
            except (decord.DECORDError, RuntimeError, StopIteration) as error:
                if "DECORD_EOF_RETRY_MAX" in str(error):
                    raise VideoReadError(
                        self.name,
                        "decord gave up waiting for the last frames, as it does on busy machines; "
                        "use the back end 'pyav' or set the environment variable DECORD_EOF_RETRY_MAX above 10240",
                    ) from error
                logger.debug("%s: decoding fails at frame %d: %s", self.name, index, _first_line(error))
                return set(wanted[done:])
            emit(index, frame)
        return set()


class TorchCodecReader:
    """Reader of a file with torchcodec.

    Args:
        file: path or content.
        name: for messages.
        num_threads: of the decoder.
        stream_index: None for the stream that FFmpeg prefers.
        times: `[total_frames]` seconds from the first frame; None decodes all frames to find them.
    """

    backend = "torchcodec"
    costs = None
    takes_stream_index = True
    turns_inexactly = True

    def __init__(
        self,
        file: str | bytes,
        name: str,
        num_threads: int,
        stream_index: int | None = None,
        times: np.ndarray | None = None,
    ) -> None:
        self.name, self.missing = name, 0
        _refuse_container(file, name, self.backend)
        video_decoder = import_torchcodec()
        source = (
            file if isinstance(file, bytes) else f"file:{file}"
        )  # without the prefix it could be read as an address
        options = {"dimension_order": "NHWC", "num_ffmpeg_threads": num_threads, "stream_index": stream_index}
        try:
            self._decoder = video_decoder(source, **options)
            total = len(self._decoder)
            if times is None or len(times) != total:
                times = np.array([self._decoder.get_frame_at(index).pts_seconds for index in range(total)])
            rate = float(self._decoder.metadata.average_fps_from_header or 0)
        except (RuntimeError, ValueError, IndexError) as error:
            raise VideoReadError(name, why_unreadable(file, _first_line(error))) from error
        if not total:
            raise VideoReadError(name, "it has no readable video frame")
        self._start = float(self._decoder.metadata.begin_stream_seconds or 0.0)
        self.timestamps = times - times[0]
        self.fps = frame_rate(rate, self.timestamps)
        self.duration = float(self.timestamps[-1]) + 1 / self.fps

    def close(self) -> None:
        self._decoder = None

    def read(self, indices: np.ndarray, emit: Emit) -> set[int]:
        for index in indices.tolist():
            try:
                frame = self._decoder.get_frame_at(index)
            except (RuntimeError, IndexError) as error:
                cause = f"torchcodec does not decode frame {index} ({_first_line(error)}); use the back end 'pyav'"
                raise VideoReadError(self.name, cause) from error
            off = frame.pts_seconds - self._start - self.timestamps[index]
            if abs(off) > _TIME_TOLERANCE:
                cause = f"torchcodec returned a frame {off:+.3f} s from number {index}; use the back end 'pyav'"
                raise VideoReadError(self.name, cause)
            emit(index, frame.data.numpy())
        return set()


def checked_reader(
    reader_class: Callable[..., FrameReader], exact_class: Callable[..., Any] | None
) -> Callable[[str | bytes, str, int], FrameReader]:
    """Open files with `reader_class`; raises VideoReadError where `exact_class`, the reader of PyAV, returns other frames
    or times. Without PyAV (None), nothing is checked."""

    def opened(file: str | bytes, name: str, num_threads: int) -> FrameReader:
        if exact_class is None:
            return reader_class(file, name, num_threads)
        _refuse_container(file, name, reader_class.backend)
        with contextlib.closing(exact_class(file, name, 1)) as exact:
            reader = reader_class(file, name, num_threads, exact.stream_index, exact.timestamps)
            cause = _unlike(reader, exact)
            if cause is not None:
                reader.close()
                raise VideoReadError(name, f"{reader_class.backend} {cause}; use the back end 'pyav'")
            reader.fps, reader.duration, reader.costs = exact.fps, exact.duration, exact.costs
            return reader

    return opened


def _unlike(reader: Any, exact: Any) -> str | None:
    """Find a reason why the frames of another back end differ from those of PyAV, or None."""
    first = exact.first_frame()
    if first is None or not _same_times(reader.timestamps, exact.timestamps):
        return f"finds {len(reader.timestamps)} frames where there are {len(exact.timestamps)}, or other times"
    if exact.num_streams > 1 and not reader.takes_stream_index:
        return "may choose another of its video streams"
    if has_alpha(first):
        return "drops its transparency"
    if first.interlaced_frame and first.format.name.startswith(("yuv420", "yuvj420", "nv12")):
        return "mixes the colours of its interlaced fields"
    matrix = display_matrix(first)
    mirrored, turns, off = (False, 0, 0.0) if matrix is None else orientation(matrix)
    in_header = reader.turns_inexactly or (not off and is_mp4(exact.file))
    if mirrored or off > 1 or ((turns or off) and not (in_header and exact.is_turned_by_header())):
        return "does not turn or mirror its frames by their display matrix"
    return None


def _refuse_container(file: str | bytes, name: str, backend: str) -> None:
    """Validate the container: raises VideoReadError for those in which decord and torchcodec mistake frames."""
    if not (is_mp4(file) or is_matroska(file)):
        raise VideoReadError(
            name,
            f"it is not MP4, MOV, Matroska or WebM, and {backend} mistakes frames in other containers; "
            "use the back end 'pyav' (pip install av)",
        )


def _same_times(times: np.ndarray, other_times: np.ndarray) -> bool:
    """Compare two arrays `[T]` of seconds, up to rounding."""
    return len(times) == len(other_times) and bool(np.all(np.abs(times - other_times) <= _TIME_TOLERANCE))


def _skip(reader: Any, num_frames: int) -> None:
    if num_frames > 0:
        reader.skip_frames(num_frames)


def _first_line(error: Exception) -> str:
    """Shorten a message: decord's contain a time, a source line and a stack, torchcodec's span many lines."""
    return re.sub(r"^\[[\d:]+\] \S+: ", "", str(error).strip().split("\n")[0])
