# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Parts that all back ends of video_decoding.py share: the reader's interface, its errors, times and orientation."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

try:
    import av
except ImportError:
    av = None

Emit = Callable[[int, np.ndarray], None]

FALLBACK_FPS = 25.0  # of streams that state neither times nor a rate
JUMP_FORWARD, JUMP_BACK = 10.0, 0.1  # seconds; FFmpeg's limits (dts_delta_threshold) for a clock that was reset
# Formats that FFmpeg may open: no playlists (concat, hls, dash, sdp), no numbered series (image2), no devices.
FORMATS = tuple(
    (
        "mov matroska avi mpegts mpeg mpegvideo flv live_flv asf ogg mxf gxf nut ivf rm dv wtv nsv amv swf h264 hevc vvc "
        "m4v av1 obu vc1 dirac cavsvideo avs2 avs3 h261 h263 mjpeg mpjpeg yuv4mpegpipe gif apng bmp_pipe jpeg_pipe "
        "pam_pipe pgm_pipe png_pipe ppm_pipe tiff_pipe webp_pipe"
    ).split()
)
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
MATROSKA_MAGIC = b"\x1a\x45\xdf\xa3"
_DEGREES_OFF = 2.0  # a display matrix further than this from a quarter turn is reported


class VideoReadError(ValueError):
    """Unreadable video: the name of the `source`, and the `cause`."""

    def __init__(self, source: str, cause: str) -> None:
        super().__init__(f"cannot read video {source}: {cause}")
        self.source = source
        self.cause = cause

    def __reduce__(self) -> tuple:  # exceptions are pickled between processes (DataLoader workers) by their arguments
        return type(self), (self.source, self.cause)


class SeekMissed(Exception):
    """Seek of the demuxer that ended behind the requested key frame."""


class TimesChanged(Exception):
    """Decoding found other frames than packets. `timestamps` is now correct: select and read again."""


class FrameReader(Protocol):
    """Interface of every source that `load_video` reads.

    Attributes:
        name: of the source, for messages.
        timestamps: `[total_frames]` float64, presentation times in seconds, the first is 0.
        fps: average number of frames a second.
        duration: seconds, from the first frame to the end of the last one.
        costs: `[total_frames]`, see `coding_costs`; None if unknown.
        missing: number of announced or present frames that cannot be read.
    """

    name: str
    timestamps: np.ndarray
    costs: np.ndarray | None
    fps: float
    duration: float
    missing: int

    def read(self, indices: np.ndarray, emit: Emit) -> set[int]:
        """Call `emit(index, frame)` once for each of the sorted, distinct `indices`, with `[H, W, 3]` uint8 RGB, from
        any thread and in any order. Returns the indices that could not be decoded. May be called once."""
        ...

    def close(self) -> None:
        """Close the file and the decoder."""
        ...


# -- Times


def frame_rate(declared: float, timestamps: np.ndarray) -> float:
    """Declared rate of the container if it agrees with the timestamps to 2%, else their average."""
    span = timestamps[-1] - timestamps[0]
    if span <= 0:
        return declared or FALLBACK_FPS
    measured = float((len(timestamps) - 1) / span)
    return declared if abs(declared - measured) <= 0.02 * measured else measured


def clock_offsets(times: Sequence[int | None], step: int, second: float) -> np.ndarray:
    """Corrections `[N]` int64 that make a clock continuous, as the ffmpeg command makes that of MPEG-TS and MPEG-PS.

    Such a clock may be reset, for example where recordings were joined: it then jumps back, or ahead by more than
    `JUMP_FORWARD`. The frame after a jump follows the one before it by `step`.

    Args:
        times: in the order in which they must not decrease; None for unknown times.
        step: usual distance of two times.
        second: length of a second in the unit of `times`.
    """
    offsets, offset, last = [], 0, None
    for time in times:
        if time is not None:
            gap = 0 if last is None else time + offset - last
            if gap < -JUMP_BACK * second or gap - step > JUMP_FORWARD * second:
                offset += step - gap
            last = time + offset
        offsets.append(offset)
    return np.array(offsets, dtype=np.int64)


def filled_times(times: Sequence[int | None], step: int) -> list[int]:
    """`times` with each None replaced by its neighbour's time, `step` later (or earlier, at the start)."""
    known = next((index for index, time in enumerate(times) if time is not None), 0)
    last = (times[known] if times and times[known] is not None else 0) - (known + 1) * step
    filled = []
    for time in times:
        last = last + step if time is None else time
        filled.append(last)
    return filled


# -- Packets


@dataclass(frozen=True)
class OpenedFile:
    """One container with the stream to read and its decoder; one for each thread."""

    container: Any
    stream: Any
    codec: Any


@dataclass(frozen=True)
class PacketEntry:
    """Times of a packet in units of the stream, None where unknown, its kind, and its size in bytes."""

    pts: int | None
    dts: int | None
    duration: int
    is_key: bool
    is_hidden: bool
    size: int


@dataclass(frozen=True)
class FrameGroup:
    """The part of one group of pictures that must be decoded.

    Attributes:
        first, last: positions (in decoding order) of the key frame and of the wanted frame that is decoded last.
        wanted: pts -> index of the wanted frames.
    """

    first: int
    last: int
    wanted: dict[int, int]


def coding_costs(sizes: np.ndarray, is_key: np.ndarray, times: np.ndarray) -> np.ndarray | None:
    """Bytes of each frame over those usual for its picture type, `[N]` float64; None if all frames are key frames.

        cost = (bytes + mean) / (median of the type + mean)

    The mean is that of all frames but key frames. Without it, any change would be large beside frames of next to no bytes.

    Types are key frames, others (P), and those among them that are shown before a frame decoded earlier (B): each type
    costs less than the one before it, whatever it shows. Encoders start a new group of pictures at a regular distance, and
    at a cut: a key frame at another than the greatest, repeated distance counts as a P frame.

    Args:
        sizes, is_key, times: `[N]` each, in decoding order; of the times only the order counts.
    """
    if is_key.all():
        return None
    is_reordered = times < np.maximum.accumulate(times)
    keys = np.flatnonzero(is_key)
    distances = np.diff(keys)
    is_greatest = distances > 0.9 * distances.max(initial=0)
    types = np.where(is_key, 2, is_reordered.astype(int))
    types[keys[1:][~is_greatest | (is_greatest.sum() == 1)]] = 0
    mean = sizes[is_key == 0].mean()
    usual = np.array([np.median(sizes[types == kind]) if (types == kind).any() else 0 for kind in range(3)])
    return (sizes + mean) / (usual[types] + mean)


# -- Orientation


def orientation(matrix: Sequence[float]) -> tuple[bool, int, float]:
    """Mirroring (left to right, before turning), clockwise quarter turns, and remaining degrees of a display matrix.

    Args:
        matrix: the 9 numbers of a display matrix, row by row, as in MP4's track header. A pixel (x, y), y pointing
            down, is shown at (a x + c y, b x + d y), where (a, b) starts the first row and (c, d) the second one.
    """
    (a, b), (c, d) = matrix[0:2], matrix[3:5]
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    degrees = math.degrees(math.atan2(b - c, a + d))
    turns = round(degrees / 90)
    return mirrored, turns % 4, abs(degrees - 90 * turns)


def upright(frame: np.ndarray, matrix: Sequence[float]) -> np.ndarray:
    """View of `[H, W, ...]` as the display matrix shows it, turned by the nearest multiple of 90 degrees."""
    mirrored, turns, _ = orientation(matrix)
    return np.rot90(frame[:, ::-1] if mirrored else frame, -turns)


def oblique(matrix: Sequence[float]) -> str | None:
    """Warning for a display matrix that is far from every quarter turn, else None."""
    _, turns, off = orientation(matrix)
    if off <= _DEGREES_OFF:
        return None
    return f"its display matrix turns frames by {off:.0f} degrees more or less than {90 * turns}, which is applied"


# -- Transparency


def on_white(frame: np.ndarray) -> np.ndarray:
    """`[H, W, 4]` uint8 RGBA -> `[H, W, 3]` RGB on a white ground, rounded as Pillow does."""
    alpha = frame[..., 3:].astype(np.uint16)
    blended = frame[..., :3] * alpha + 255 * (255 - alpha) + 128
    return ((blended + (blended >> 8)) >> 8).astype(np.uint8)


# -- Pixels


class RgbConverter:
    """Converter of decoded frames to `[H, W, 3]` uint8, upright, on white where transparent. One for each thread: it
    reuses buffers.

    Args:
        report: called with the display matrix of each frame that is turned.

    Attributes:
        matrix: display matrix of frames without one: some codecs store it with key frames alone.
    """

    def __init__(self, report: Callable[[list[int]], None]) -> None:
        self._reformatter, self._thumbnails = (av.video.reformatter.VideoReformatter() for _ in range(2))
        self._report = report
        self.matrix: list[int] | None = None
        self._has_alpha: dict[str, bool] = {}  # by pixel format

    def __call__(self, frame: Any) -> np.ndarray:
        pixel_format = frame.format.name
        if pixel_format not in self._has_alpha:
            self._has_alpha[pixel_format] = has_alpha(frame)
        if self._has_alpha[pixel_format]:
            rgb = on_white(self._reformatter.reformat(frame, format="rgba", threads=1).to_ndarray())
        else:
            rgb = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        self.observe(frame)
        if self.matrix is None:
            return rgb
        self._report(self.matrix)
        return upright(rgb, self.matrix)

    def observe(self, frame: Any) -> None:
        """Store the display matrix of a frame, if it has one, for later frames."""
        self.matrix = display_matrix(frame, self._thumbnails) or self.matrix


def has_alpha(frame: Any) -> bool:
    """Test the pixel format of a decoded frame for transparency, also in a palette."""
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def display_matrix(frame: Any, reformatter: Any = None) -> list[int] | None:
    """The 9 numbers of a decoded frame's display matrix, see `orientation`; None if it has none.

    Args:
        reformatter: PyAV's, to reuse; by default a new one.
    """
    # PyAV's side data and their frame refer to each other, which keeps the frame in memory: read a thumbnail's.
    reformatter = reformatter or av.video.reformatter.VideoReformatter()
    thumbnail = reformatter.reformat(frame, width=16, height=16, format="gray", interpolation="POINT", threads=1)
    data = thumbnail.side_data.get("DISPLAYMATRIX")
    return None if data is None else np.frombuffer(data, dtype=np.int32, count=9).tolist()


# -- Files


def head(file: str | bytes) -> bytes:
    """The first 16 bytes of a file, by its path or content."""
    if isinstance(file, bytes):
        return file[:16]
    with open(file, "rb") as opened:
        return opened.read(16)


def is_mp4(file: str | bytes) -> bool:
    """Test the content for MP4 or MOV."""
    return head(file)[4:8] in MP4_BOXES


def is_matroska(file: str | bytes) -> bool:
    """Test the content for Matroska or WebM."""
    return head(file)[:4] == MATROSKA_MAGIC


def why_unreadable(file: str | bytes, message: str) -> str:
    """Replace FFmpeg's general error by a cause, if one is found."""
    if not is_mp4(file):
        return f"it is not a video, or damaged ({message})"
    with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
        end = opened.seek(0, io.SEEK_END)
        start = 0
        while start + 8 <= end:  # walk over the boxes of the top level
            opened.seek(start)
            header = opened.read(16)
            size = int.from_bytes(header[:4], "big")
            if header[4:8] == b"moov" and start + size <= end:
                return f"it has no video that can be decoded, or is damaged ({message})"
            size = int.from_bytes(header[8:16], "big") if size == 1 else size
            if size < 8:
                break
            start += size
    return f"it is truncated: an MP4 file without its index, the moov atom ({message})"


def set_threads(codec: Any, num_threads: int) -> None:
    """Configure the decoder; call it before the first frame is decoded."""
    codec.thread_count, codec.thread_type = num_threads, "AUTO" if num_threads > 1 else "SLICE"
