# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Video file -> exactly the frames asked for, and when each of them is shown.

Two back ends. A reader serves one call and is closed: that works in DataLoader workers and after a fork, and memory
stays flat over thousands of clips.

`PyAVReader` is exact for every container and codec that FFmpeg knows, and fast. One pass over the packets, which
decodes nothing, yields times and key frames. Then only those groups of pictures are decoded that hold a wanted frame,
each no further than that frame and without the frames that nothing depends on (H.264 non-reference frames), several
groups at once (FFmpeg releases the interpreter lock). A frame is recognised by its timestamp, never by counting. Where
a packet turns out not to be a frame (field pairs, hidden frames), the times are those of a full decode.

`DecordReader` reads from the start and never seeks: decord counts frames after a seek, which silently goes wrong where
a key frame is followed by frames that are shown before it (open groups of pictures, the default of x265; MPEG-4 with
B-frames), after intra refresh, and in AVI and MPEG-TS. So it is exact, but slow in long videos, and takes MP4, MOV,
Matroska and WebM only. decord 0.6 knows no AV1 and refuses a damaged file as a whole. The pixels of 8-bit video are
those of PyAV; those of 10-bit video differ slightly, as the FFmpeg inside decord is years older.

Videos come from strangers. FFmpeg goes by content, not by suffix, and some of its formats are lists of other files, or
of addresses to connect to: `PyAVReader` opens nothing but the one file, and only as one of `FORMATS`. Frames larger than
`MAX_FRAME_PIXELS` are refused before memory is taken for them, whatever a header claims; decord tells no size before
it decodes, so it has no such limit. Prefer PyAV for files that you did not make.
"""

import contextlib
import io
import itertools
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

try:
    import av
except ImportError:
    av = None

try:
    import decord
except ImportError:
    decord = None

logger = logging.getLogger(__name__)

VideoBackend = Literal["auto", "pyav", "decord"]
Emit = Callable[[int, np.ndarray], None]

MAX_THREADS = 8
FALLBACK_FPS = 25.0  # of streams that tell neither times nor a rate
# Codecs whose non-reference frames no other frame depends on. HEVC's may still be needed by higher temporal layers.
_SKIPPABLE_CODECS = ("h264", "mpeg4", "mpeg2video")
_DURATION_TOLERANCE = 0.5  # seconds that a Matroska file may end before it announces to
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
_MATROSKA_MAGIC = b"\x1a\x45\xdf\xa3"
_COVER_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC: the "video" of an audio file
_AV_MAJOR = int(av.__version__.split(".")[0]) if av is not None else 0
# What FFmpeg may take a file for: no playlists (concat, hls, dash, sdp), no numbered series (image2), no devices.
FORMATS = (
    *(
        "mov",
        "matroska",
        "avi",
        "mpegts",
        "mpeg",
        "mpegvideo",
        "flv",
        "live_flv",
        "asf",
        "ogg",
        "mxf",
        "gxf",
        "nut",
        "ivf",
    ),
    *("rm", "dv", "wtv", "nsv", "amv", "swf", "h264", "hevc", "vvc", "m4v", "av1", "obu", "vc1", "dirac", "cavsvideo"),
    *("avs2", "avs3", "h261", "h263", "mjpeg", "mpjpeg", "yuv4mpegpipe", "gif", "apng", "bmp_pipe", "jpeg_pipe"),
    *("pam_pipe", "pgm_pipe", "png_pipe", "ppm_pipe", "tiff_pipe", "webp_pipe"),
)
MAX_FRAME_PIXELS = 2**26  # 8192 x 8192, above 8K films
_DECODER_OPTIONS = {"max_pixels": str(MAX_FRAME_PIXELS)}
_AV_OPEN_OPTIONS = {
    "container_options": {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"},
    "options": _DECODER_OPTIONS,  # of the decoders that find out what the streams are
    **({"metadata_errors": "replace"} if _AV_MAJOR < 19 else {}),  # later ones never fail on metadata
}
# Of a header alone: FFmpeg would decode frames of every file, to find out what a container like MP4 says anyway.
_AV_HEADER_OPTIONS = {
    **_AV_OPEN_OPTIONS,
    "container_options": {**_AV_OPEN_OPTIONS["container_options"], "probesize": "32"},
    "options": {**_DECODER_OPTIONS, "skip_frame": "all"},
}
_AV_REFORMAT_OPTIONS = {"threads": 1} if _AV_MAJOR >= 17 else {}  # else one thread for each core and conversion


class VideoReadError(ValueError):
    """A video cannot be read: `source` names it, `cause` says why."""

    def __init__(self, source: str, cause: str) -> None:
        super().__init__(f"cannot read video {source}: {cause}")
        self.source = source
        self.cause = cause

    def __reduce__(self) -> tuple:  # exceptions cross process borders (DataLoader workers) by their arguments
        return type(self), (self.source, self.cause)


class FrameReader(Protocol):
    """What every kind of source looks like to `load_video`.

    Attributes:
        name: of the source, for messages.
        timestamps: `[total_frames]` float64, presentation times in seconds, the first is 0.
        fps: average number of frames a second.
        missing: how many frames the file announces or holds that cannot be read.
    """

    name: str
    timestamps: np.ndarray
    fps: float
    missing: int

    def read(self, indices: np.ndarray, emit: Emit) -> set[int]:
        """Calls `emit(index, frame)` once for each of the sorted, distinct `indices`, with `[H, W, 3]` uint8 RGB, from
        any thread and in any order. Returns the indices that could not be decoded. To be called once."""
        ...

    def close(self) -> None:
        """Frees the file and the decoder."""
        ...


class TimesChanged(Exception):
    """Decoding has shown that packets are not frames here. `timestamps` is now right: select and read again."""


class _SeekMissed(Exception):
    """The demuxer landed behind the key frame that it was sent to."""


@dataclass(frozen=True)
class _Group:
    """The part of one group of pictures that must be decoded.

    Attributes:
        first, last: positions (in decoding order) of the key frame and of the wanted frame that is decoded last.
        wanted: pts -> index of the wanted frames.
    """

    first: int
    last: int
    wanted: dict[int, int]


class PyAVReader:
    """Reads a file with PyAV. Packets are numbered in decoding order (`position`), frames in order of time (`index`).

    Args:
        file: path or content.
        name: for messages.
        num_threads: groups of pictures that are decoded at once; threads within a group if there is but one.
    """

    def __init__(self, file: str | bytes, name: str, num_threads: int) -> None:
        self.name, self._file, self._num_threads = name, file, num_threads
        self._packets_are_frames = True
        self.missing = 0
        self._opened = contextlib.ExitStack()
        self._unused: list[tuple[Any, Any]] = []  # what `_index_packets` opened, as long as nothing is decoded from it
        try:
            self._index_packets()
        except av.FFmpegError as error:
            self.close()
            raise VideoReadError(name, _why_unreadable(file, error.strerror)) from error
        except VideoReadError:
            self.close()
            raise

    def close(self) -> None:
        self._unused.clear()
        self._opened.close()

    @classmethod
    def read_header(cls, file: str | bytes, name: str) -> tuple[int, float]:
        """(number of frames, frames a second) as the container announces them; (0, 0.0) where it does not.

        Raises:
            VideoReadError: if it is no video.
        """
        reader = cls.__new__(cls)  # without the pass over all packets, which would read the whole file
        reader.name, reader._file = name, file
        try:
            with contextlib.suppress(VideoReadError), reader._open(_AV_HEADER_OPTIONS) as (_, stream):
                if stream.frames and stream.average_rate:
                    return stream.frames, float(stream.average_rate)
            with reader._open() as (container, stream):
                fps = float(stream.average_rate or 0)
                seconds = (container.duration or 0) / av.time_base
                return stream.frames or round(seconds * fps), fps
        except av.FFmpegError as error:
            raise VideoReadError(name, _why_unreadable(file, error.strerror)) from error

    # -- opening and indexing

    @contextlib.contextmanager
    def _open(self, options: dict[str, Any] = _AV_OPEN_OPTIONS) -> Iterator[tuple[Any, Any]]:
        """(container, video stream); one for each thread."""
        # Without the prefix, the name of a file could be an address: of another protocol, or a pattern.
        file = io.BytesIO(self._file) if isinstance(self._file, bytes) else f"file:{self._file}"
        try:
            container = av.open(file, **options)
        except av.ArgumentError as error:
            cause = f"it is in none of the formats that are read here, or a playlist of other files ({error.strerror})"
            raise VideoReadError(self.name, cause) from error
        with container:
            streams = [stream for stream in container.streams.video if not stream.disposition.value & _COVER_PICTURE]
            if not streams:
                kinds = sorted({stream.type for stream in container.streams})
                raise VideoReadError(self.name, f"it holds no video stream (only {', '.join(kinds) or 'nothing'})")
            if streams[0].codec_context is None:
                raise VideoReadError(self.name, "FFmpeg has no decoder for its codec")
            codec = streams[0].codec_context
            if codec.width * codec.height > MAX_FRAME_PIXELS:
                size = f"{codec.width}x{codec.height}"
                raise VideoReadError(self.name, f"its frames are {size}, more than {MAX_FRAME_PIXELS} pixels")
            codec.options = _DECODER_OPTIONS
            yield container, streams[0]

    def _packets(self, container: Any, stream: Any, errors: list[str]) -> Iterator[Any]:
        """Packets in file order, of all streams if `stream` is None; `errors` tells why they end early, if they do."""
        try:
            for packet in container.demux() if stream is None else container.demux(stream):
                if packet.size:  # else it is the demuxer's end mark, or an empty AVI chunk
                    yield packet
        except av.FFmpegError as error:
            errors.append(error.strerror)

    def _index_packets(self) -> None:
        """One pass over the packets, which decodes nothing: times, key frames and damage."""
        pts, dts, keys, hidden, corrupt, errors = [], [], [], [], [], []
        end = 0.0  # of the last packet of any stream
        container, stream = self._opened.enter_context(self._open())
        is_mov, is_matroska, is_avi = (name in container.format.name for name in ("mov", "matroska", "avi"))
        for packet in self._packets(container, None if is_matroska else stream, errors):
            if packet.stream_index == stream.index:
                pts.append(packet.pts)
                dts.append(packet.dts)
                keys.append(packet.is_keyframe)
                hidden.append(packet.is_discard)
                corrupt.append(packet.is_corrupt)
            if is_matroska and packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if not pts:
            raise VideoReadError(self.name, "it holds no readable video frame")
        self._time_base = float(stream.time_base)
        self._declared_fps = float(stream.average_rate) if stream.average_rate else 0.0
        # AVI has no presentation times; FFmpeg's guesses may follow the packets although frames are reordered.
        guessed = is_avi and stream.codec_context.has_b_frames and None not in pts and pts == sorted(pts)
        # MP4 announces every packet, Matroska its duration.
        self.missing = len(errors) + sum(corrupt)
        if is_mov and hasattr(stream, "index_entries"):
            self.missing += max(0, len(stream.index_entries) - len(pts))
        if is_matroska and container.duration:
            gap = container.duration / av.time_base - end
            self.missing += max(1, round(gap * self._declared_fps)) if gap > _DURATION_TOLERANCE else 0

        self._num_leading = keys.index(True) if True in keys else 0  # cannot be decoded: no key frame before them
        if guessed or None in pts or len(set(pts)) < len(pts):
            self._index_frames()
            return
        self._unused.append((container, stream))
        self._pts = np.array(pts, dtype=np.int64)
        self._position = {time: position for position, time in enumerate(pts)}
        self._seek_to = [p if d is None else d for p, d in zip(pts, dts, strict=True)]
        self._keys = np.flatnonzero(keys) if True in keys else np.array([0])
        self._corrupt = set(np.flatnonzero(corrupt).tolist())
        is_frame = ~np.array(hidden) & ~np.array(corrupt) & (self._pts >= self._pts[self._num_leading])
        is_frame[: self._num_leading] = False
        self._set_times(np.sort(self._pts[is_frame]))

    def _index_frames(self) -> None:
        """Times of the frames that a full decode gives, for files where a packet is not always one frame."""
        self._packets_are_frames = False
        lost = []
        pts = [frame.pts for frame in self._intact_frames(lost)]
        self.missing = max(self.missing, len(lost))
        if None in pts or np.any(np.diff(pts) <= 0):  # without usable times (raw streams) the frames are evenly spaced
            pts = range(len(pts))
            self._time_base = 1 / (self._declared_fps or FALLBACK_FPS)
        self._set_times(np.array(pts, dtype=np.int64))

    def _set_times(self, pts: np.ndarray) -> None:
        if not len(pts):
            raise VideoReadError(self.name, "it holds no readable video frame")
        self._frame_pts = pts  # [total_frames]
        self.timestamps = (pts - pts[0]) * self._time_base
        damaged = self.missing and self._declared_fps  # then gaps say nothing about the rate
        self.fps = self._declared_fps if damaged else _frame_rate(self._declared_fps, self.timestamps)

    # -- reading

    def read(self, indices: np.ndarray, emit: Emit) -> set[int]:
        if not self._packets_are_frames:
            return self._read_all(indices, emit)
        groups = deque(self._groups(indices))
        num_workers = min(self._num_threads, len(groups))
        threads_each = self._num_threads // num_workers
        seen: set[int] = set()
        failed: set[int] = set()

        def work() -> None:
            to_rgb = _RgbConverter()
            with contextlib.ExitStack() as stack:
                try:
                    container, stream = self._unused.pop()  # atomic, as `popleft` below
                except IndexError:
                    container, stream = stack.enter_context(self._open())
                _set_threads(stream, threads_each)
                while True:
                    try:
                        group = groups.popleft()
                    except IndexError:
                        return
                    try:
                        done, lost = self._decode_group(container, stream, group, emit, to_rgb, seek=True)
                    except _SeekMissed:
                        container, stream = stack.enter_context(self._open())
                        _set_threads(stream, threads_each)
                        done, lost = self._decode_group(container, stream, group, emit, to_rgb, seek=False)
                    seen.update(done)
                    failed.update(lost)

        try:
            with ThreadPoolExecutor(num_workers) as pool:
                for future in [pool.submit(work) for _ in range(num_workers)]:
                    future.result()
        except av.FFmpegError as error:
            raise VideoReadError(self.name, error.strerror) from error
        if len(seen) + len(failed) < len(indices):  # no error, and yet fewer frames than packets
            logger.debug("%s: packets are not frames, decoding all of it", self.name)
            self._index_frames()
            raise TimesChanged
        return failed

    def _groups(self, indices: np.ndarray) -> list[_Group]:
        """Wanted frames by the key frame from which they are decoded: the last one shown and decoded before them."""
        wanted: dict[int, dict[int, int]] = {}
        for index in indices.tolist():
            pts = int(self._frame_pts[index])
            nearest = int(np.searchsorted(self._keys, self._position[pts], side="right")) - 1
            while self._pts[self._keys[nearest]] > pts:
                nearest -= 1
            wanted.setdefault(int(self._keys[nearest]), {})[pts] = index
        return [_Group(key, max(self._position[p] for p in group), group) for key, group in wanted.items()]

    def _decode_group(
        self, container: Any, stream: Any, group: _Group, emit: Emit, to_rgb: "_RgbConverter", seek: bool
    ) -> tuple[set[int], set[int]]:
        """Emits the wanted frames of a group; (indices emitted, indices lost to damage)."""
        done: set[int] = set()
        damaged_from = None  # position; what is decoded later may depend on it
        try:
            for frame in self._frames_of_group(container, stream, group, seek):
                if frame.pts is None or frame.pts < self._pts[group.first]:
                    continue  # shown before the key frame: needs the group before and is wanted from there
                if frame.is_corrupt:
                    position = self._position.get(frame.pts, group.first)
                    damaged_from = position if damaged_from is None else min(position, damaged_from)
                elif frame.pts in group.wanted:
                    emit(group.wanted[frame.pts], to_rgb(frame))
                    done.add(group.wanted[frame.pts])
        except av.FFmpegError as error:
            if not stream.codec_context.width:  # nor did the decoder that looked at the stream find out
                cause = f"its frames have no size, or more than {MAX_FRAME_PIXELS} pixels ({error.strerror})"
                raise VideoReadError(self.name, cause) from error
            logger.debug("%s: decoding fails: %s", self.name, error)
            return done, set(group.wanted.values()) - done
        if any(group.first <= position <= group.last for position in self._corrupt):
            return done, set(group.wanted.values()) - done
        if damaged_from is not None:
            lost = {index for pts, index in group.wanted.items() if self._position[pts] >= damaged_from}
            return done - lost, lost
        return done, set()

    def _frames_of_group(self, container: Any, stream: Any, group: _Group, seek: bool) -> Iterator[Any]:
        codec = stream.codec_context
        may_skip = codec.name in _SKIPPABLE_CODECS
        if codec.is_open:
            codec.flush_buffers()
        if seek:
            container.seek(self._seek_to[group.first], stream=stream, backward=True)
        started = False
        for packet in self._packets(container, stream, []):
            position = self._position.get(packet.pts, -1)
            if position < group.first:
                continue
            if seek and not started and position > group.first:
                raise _SeekMissed
            started = True
            if position in self._corrupt:
                break
            if may_skip:
                codec.skip_frame = "DEFAULT" if packet.pts in group.wanted else "NONREF"
            yield from codec.decode(packet)
            if position == group.last:
                break
        if seek and not started:
            raise _SeekMissed
        yield from codec.decode(None)  # what the decoder still holds back

    def _intact_frames(self, lost: list[str]) -> Iterator[Any]:
        """Decodes all: the frames that came out whole, in order of time. `lost` receives the reason of each loss."""
        with self._open() as (container, stream):
            _set_threads(stream, self._num_threads)
            packets = itertools.islice(self._packets(container, stream, lost), self._num_leading, None)
            intact = True
            for packet in itertools.chain(packets, [None]):  # None: what the decoder still holds back
                try:
                    frames = stream.codec_context.decode(packet)
                except av.FFmpegError as error:
                    lost.append(error.strerror)
                    intact = False
                    continue
                for frame in frames:
                    intact = not frame.is_corrupt and (intact or frame.key_frame)
                    if intact:
                        yield frame
                    else:
                        lost.append("it depends on a damaged frame")

    def _read_all(self, indices: np.ndarray, emit: Emit) -> set[int]:
        wanted, to_rgb = set(indices.tolist()), _RgbConverter()
        for index, frame in enumerate(self._intact_frames([])):
            if index in wanted:
                emit(index, to_rgb(frame))
                wanted.remove(index)
                if not wanted:
                    break
        return wanted


def _set_threads(stream: Any, num_threads: int) -> None:
    """Must come before the first frame is decoded."""
    codec = stream.codec_context
    codec.thread_count, codec.thread_type = num_threads, "AUTO" if num_threads > 1 else "SLICE"


class _RgbConverter:
    """Decoded frame -> `[H, W, 3]` uint8, upright. Reuses one converter, which is costly to set up; one for each
    thread."""

    def __init__(self) -> None:
        self._reformatter = av.video.reformatter.VideoReformatter()

    def __call__(self, frame: Any) -> np.ndarray:
        rgb = self._reformatter.reformat(frame, format="rgb24", **_AV_REFORMAT_OPTIONS).to_ndarray()
        return np.rot90(rgb, frame.rotation // 90) if frame.rotation else rgb


class DecordReader:
    """Reads a file with decord, from its start. See the module's docstring for what decord cannot do."""

    def __init__(self, file: str | bytes, name: str, num_threads: int) -> None:
        self.name, self.missing = name, 0
        head = _head(file)
        if head[4:8] not in _MP4_BOXES and head[:4] != _MATROSKA_MAGIC:
            raise VideoReadError(
                name,
                "it is not MP4, MOV, Matroska or WebM, and decord mistakes frames in other containers; "
                "use the back end 'pyav' (pip install av)",
            )
        try:
            opened = io.BytesIO(file) if isinstance(file, bytes) else file
            self._reader = reader = decord.VideoReader(opened, num_threads=num_threads)
            times = reader.get_frame_timestamp(list(range(len(reader))))[:, 0].astype(np.float64)
            rate = float(reader.get_avg_fps())
        except (decord.DECORDError, RuntimeError) as error:
            raise VideoReadError(name, _why_unreadable(file, _first_line(error))) from error
        times = times[times >= 0]  # what an edit list hides; decord counts it, and repeats the last frame instead
        if not len(times):
            raise VideoReadError(name, "it holds no readable video frame")
        self.timestamps = times - times[0]
        self.fps = _frame_rate(rate, self.timestamps)

    def close(self) -> None:
        self._reader = None

    def read(self, indices: np.ndarray, emit: Emit) -> set[int]:
        wanted = indices.tolist()
        reader = self._reader
        keys = sorted(set(reader.get_key_indices()))
        at = 0
        for done, index in enumerate(wanted):
            try:
                # `skip_frames` seeks where it would arrive at or pass a key frame: arrive there by reading instead.
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


def _skip(reader: Any, num_frames: int) -> None:
    if num_frames > 0:
        reader.skip_frames(num_frames)


def _frame_rate(declared: float, timestamps: np.ndarray) -> float:
    """What the container declares if the timestamps bear it out (to 2%), else their average."""
    span = timestamps[-1] - timestamps[0]
    if span <= 0:
        return declared or FALLBACK_FPS
    measured = float((len(timestamps) - 1) / span)
    return declared if abs(declared - measured) <= 0.02 * measured else measured


def _head(file: str | bytes) -> bytes:
    if isinstance(file, bytes):
        return file[:16]
    with open(file, "rb") as opened:
        return opened.read(16)


def _why_unreadable(file: str | bytes, message: str) -> str:
    """Turns FFmpeg's catch-all into what is the matter, where that can be told."""
    if _head(file)[4:8] not in _MP4_BOXES:
        return f"it is not a video, or damaged ({message})"
    with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
        end = opened.seek(0, io.SEEK_END)
        start = 0
        while start + 8 <= end:  # walk over the boxes of the top level
            opened.seek(start)
            header = opened.read(16)
            size = int.from_bytes(header[:4], "big")
            if header[4:8] == b"moov" and start + size <= end:
                return f"it holds no video that can be decoded, or is damaged ({message})"
            size = int.from_bytes(header[8:16], "big") if size == 1 else size
            if size < 8:
                break
            start += size
    return f"it is truncated: an MP4 file without its index, the moov atom ({message})"


def _first_line(error: Exception) -> str:
    """decord's messages carry a time, a place in its source and its stack."""
    return re.sub(r"^\[[\d:]+\] \S+: ", "", str(error).strip().split("\n")[0])


FILE_READERS: dict[str, Callable[[str | bytes, str, int], FrameReader]] = {"pyav": PyAVReader, "decord": DecordReader}


def choose_backend(backend: VideoBackend) -> str:
    """Key of `FILE_READERS` for a name that the user gave; raises ImportError if its package is missing."""
    if backend not in get_args(VideoBackend):
        raise ValueError(f"video backend {backend!r} is not one of {', '.join(get_args(VideoBackend))}")
    if backend == "auto":
        backend = "decord" if av is None and decord is not None else "pyav"
    package, module = {"pyav": ("av", av), "decord": ("decord", decord)}[backend]
    if module is None:
        raise ImportError(f"video backend {backend!r} needs the package {package!r}: pip install {package}")
    return backend
