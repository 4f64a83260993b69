# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Exact frames of a video file, with their presentation times.

Three back ends. A reader serves one call and is closed, which works in DataLoader workers and keeps memory constant.

`PyAVReader` is exact for every container and codec that FFmpeg knows, and fast. One pass over the packets, without
decoding, yields times and key frames. Then only the groups of pictures with a requested frame are decoded, up to that
frame and without H.264 non-reference frames, several groups at once (FFmpeg releases the interpreter lock). A frame is
identified by its timestamp, not by counting. Where packets do not determine the frames (field pairs, hidden frames,
damage, containers without presentation times), frames and times are those of a full decode. The reference is the ffmpeg
command. Transparency is laid on white.

`DecordReader` and `TorchCodecReader` (other_decoders.py) reject files for which PyAV, if installed, finds other frames.

Videos are untrusted input. FFmpeg detects formats by content, not by suffix, and some formats are lists of other files or
addresses: `PyAVReader` opens the one file alone, as one of `FORMATS`. Frames larger than `MAX_FRAME_PIXELS` raise an error
before memory is allocated for them. Without PyAV, decord has no such limit.
"""

import contextlib
import io
import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import numpy as np

try:
    import av
except ImportError:
    av = None

from .other_decoders import (
    DecordReader,
    TorchCodecReader,
    checked_reader,
    decord,
    import_torchcodec,
)
from .video_reader import (
    FALLBACK_FPS,
    FORMATS,
    Emit,
    FrameGroup,
    FrameReader,
    OpenedFile,
    PacketEntry,
    RgbConverter,
    SeekMissed,
    TimesChanged,
    VideoReadError,
    clock_offsets,
    coding_costs,
    display_matrix,
    filled_times,
    frame_rate,
    oblique,
    set_threads,
    why_unreadable,
)

logger = logging.getLogger(__name__)

VideoBackend = Literal["auto", "pyav", "decord", "torchcodec"]

MAX_THREADS = 8
# Codecs without frames that depend on non-reference frames. In HEVC, higher temporal layers may depend on them.
_SKIPPABLE_CODECS = ("h264", "mpeg4", "mpeg2video")
_DURATION_TOLERANCE = 0.5  # seconds by which a Matroska file may end before its announced duration
# Decoders that return nothing for pictures with missing references. Other decoders invent frames.
_JUDGING_CODECS = ("h264", "hevc", "vvc", "mpeg1video", "mpeg2video")
# FFmpeg's decoders of these codecs drop the transparency that WebM stores beside the pictures.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# H.264, H.265 and VVC may store a display matrix with the first picture: a message of type 47 and of 3 bytes.
_ORIENTATION, _SEARCHED = b"\x2f\x03", 2048  # bytes
_DEFAULT, _COVERS, _IMPAIRED = 0x1, 0x400 | 0x800, 0x80 | 0x100  # AV_DISPOSITION_*; a cover is the "video" of a song
_NO_TIMESTAMPS, _CLOCK_RESETS = 0x80, 0x200  # AVFMT_NOTIMESTAMPS, AVFMT_TS_DISCONT
_COPY_OPAQUE = 0x80  # AV_CODEC_FLAG_COPY_OPAQUE: frames carry the number of their packet
_MIN_AV_MAJOR = 17  # before it, colours of BT.709 are up to 25 levels off (PyAV#2230), or reading crashes
_AV_MAJOR = int(av.__version__.split(".")[0]) if av is not None else 0
MAX_FRAME_PIXELS = 2**26  # 8192 x 8192, above 8K films
_DECODER_OPTIONS = {"max_pixels": str(MAX_FRAME_PIXELS)}
_AV_OPEN_OPTIONS = {
    "container_options": {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"},
    "options": _DECODER_OPTIONS,  # of the decoders that probe the streams
    **({"metadata_errors": "replace"} if _AV_MAJOR < 19 else {}),  # later ones never fail on metadata
}
# Header alone: FFmpeg would decode frames of every file for values that containers like MP4 state.
_AV_HEADER_OPTIONS = {
    **_AV_OPEN_OPTIONS,
    "container_options": {**_AV_OPEN_OPTIONS["container_options"], "probesize": "32"},
    "options": {**_DECODER_OPTIONS, "skip_frame": "all"},
}


class PyAVReader:
    """Reader of a file with PyAV. Packets are numbered in decoding order (`position`), frames in order of time (`index`).

    Args:
        file: path or content.
        name: for messages.
        num_threads: groups of pictures decoded at once; threads within a group if there is one group.
    """

    stream_index: int | None = None  # set when the file is first opened
    _matrix: list[int] | None = None  # of frames without one
    _is_strict = _has_dts_only = _has_order = _has_no_times = False

    def __init__(self, file: str | bytes, name: str, num_threads: int) -> None:
        self.name, self.file, self._num_threads = name, file, num_threads
        self._packets_are_frames = True
        self.missing = 0
        self._oblique: set[str] = set()  # display matrices that were reported
        self._opened = contextlib.ExitStack()
        self._unused: list[OpenedFile] = []  # by `_index_packets`, as long as nothing is decoded from it
        try:
            self._index_packets()
        except av.FFmpegError as error:
            self.close()
            raise VideoReadError(name, why_unreadable(file, error.strerror)) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._unused.clear()
        self._opened.close()

    @classmethod
    def read_header(cls, file: str | bytes, name: str) -> tuple[int, float]:
        """Return the announced number of frames and frame rate of the container; (0, 0.0) without them.

        Raises:
            VideoReadError: if the file is not a video.
        """
        reader = cls.__new__(cls)  # without the pass over all packets, which would read the whole file
        reader.name, reader.file = name, file
        try:
            with contextlib.suppress(VideoReadError), reader._open(_AV_HEADER_OPTIONS) as opened:
                if opened.stream.frames and opened.stream.average_rate and opened.container.format.name != "avi":
                    return opened.stream.frames, float(opened.stream.average_rate)
            reader.stream_index = None
            with reader._open() as opened:
                if opened.container.format.name == "avi":  # its header counts the gaps between frames
                    return 0, 0.0
                fps = float(opened.stream.average_rate or 0)
                seconds = (opened.container.duration or 0) / av.time_base
                return opened.stream.frames or round(seconds * fps), fps
        except av.FFmpegError as error:
            raise VideoReadError(name, why_unreadable(file, error.strerror)) from error

    # -- opening and indexing

    def _container(self, options: dict[str, Any] = _AV_OPEN_OPTIONS) -> Any:
        # Without the prefix, a file name could be read as an address of another protocol, or as a pattern.
        file = io.BytesIO(self.file) if isinstance(self.file, bytes) else f"file:{self.file}"
        try:
            return av.open(file, **options)
        except av.ArgumentError as error:
            cause = f"its format is not supported, or it is a playlist of other files ({error.strerror})"
            raise VideoReadError(self.name, cause) from error

    @contextlib.contextmanager
    def _open(self, options: dict[str, Any] = _AV_OPEN_OPTIONS) -> Iterator[OpenedFile]:
        with self._container(options) as container:
            if self.stream_index is None:
                self.stream_index = self._best_stream(container)
            stream = container.streams[self.stream_index]
            codec = stream.codec_context
            width, height = codec.width, codec.height
            if width * height > MAX_FRAME_PIXELS:
                raise VideoReadError(
                    self.name, f"its frames are {width}x{height}, more than {MAX_FRAME_PIXELS} pixels"
                )
            if codec.name in _ALPHA_DECODERS and stream.metadata.get("alpha_mode") == "1":
                codec = self._alpha_decoder(codec)
            codec.flags |= _COPY_OPAQUE
            codec.options = _DECODER_OPTIONS | ({"err_detect": "explode"} if self._is_strict else {})
            yield OpenedFile(container, stream, codec)

    def _best_stream(self, container: Any) -> int:
        """Index of the stream to read among those with a decoder, without covers: default streams first, then streams of
        several frames, then the largest."""
        streams = [stream for stream in container.streams.video if not stream.disposition.value & _COVERS]
        if not streams:
            kinds = sorted({stream.type for stream in container.streams})
            raise VideoReadError(self.name, f"it holds no video stream (only {', '.join(kinds) or 'nothing'})")
        streams = [stream for stream in streams if stream.codec_context is not None]
        if not streams:
            raise VideoReadError(self.name, "FFmpeg has no decoder for its codec")
        self.num_streams = len(streams)
        counts: Counter[int] = Counter()
        if len(streams) > 1:
            with self._container() as other:
                for packet in self._packets(other, [other.streams[stream.index] for stream in streams], []):
                    counts[packet.stream_index] += 1
                    if all(counts[stream.index] > 1 for stream in streams):
                        break

        def merits(stream: Any) -> tuple:
            flags, size = stream.disposition.value, stream.codec_context.width * stream.codec_context.height
            return bool(flags & _DEFAULT) - bool(flags & _IMPAIRED), counts[stream.index] > 1, size

        return max(streams, key=merits).index  # the first of equal streams

    def _alpha_decoder(self, codec: Any) -> Any:
        name = _ALPHA_DECODERS[codec.name]
        if name not in av.codecs_available:
            raise VideoReadError(self.name, f"its transparency needs the decoder {name}, which this FFmpeg lacks")
        decoder = av.CodecContext.create(name, "r")
        decoder.extradata = codec.extradata
        return decoder

    def first_frame(self) -> Any:
        """First decodable frame, as PyAV returns it, or None."""
        with contextlib.closing(self._intact_frames([])) as frames:
            return next(frames, None)

    def is_turned_by_header(self) -> bool:
        """Test for a display matrix of the container. Some codecs store it with the pictures instead."""
        with self._open() as opened, contextlib.suppress(av.FFmpegError):
            decoder = av.CodecContext.create(opened.codec.name, "r")
            decoder.extradata = opened.codec.extradata
            for packet in self._packets(opened.container, opened.stream, []):
                for frame in decoder.decode(packet):
                    return display_matrix(frame) is None
        return False

    def _packets(self, container: Any, streams: Any, errors: list[str]) -> Iterator[Any]:
        """Packets in file order, of all streams if `streams` is None; `errors` receives the cause of an early end."""
        dts_for_pts = self._has_dts_only and not self._has_order  # decoders copy it to the frame of the packet
        try:
            for packet in container.demux() if streams is None else container.demux(streams):
                if packet.size:  # else the end mark of the demuxer, or an empty AVI chunk
                    if dts_for_pts:
                        packet.pts = packet.dts
                    yield packet
        except av.FFmpegError as error:
            errors.append(error.strerror)

    def _index_packets(self) -> None:
        """Index times, key frames and damage in one pass over the packets, without decoding."""
        opened = self._opened.enter_context(self._open())
        container, stream = opened.container, opened.stream
        is_matroska = "matroska" in container.format.name
        packets, errors, is_corrupt, is_marked = [], [], False, False
        end = 0.0  # of the last packet of any stream
        for packet in self._packets(container, None if is_matroska else stream, errors):
            if packet.stream_index == stream.index:
                is_marked = is_marked if packets else _ORIENTATION in bytes(packet)[:_SEARCHED]
                kind = packet.is_keyframe, packet.is_discard
                packets.append(PacketEntry(packet.pts, packet.dts, packet.duration or 0, *kind, packet.size))
                is_corrupt |= packet.is_corrupt
            if is_matroska and packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if not packets:
            raise VideoReadError(self.name, "it holds no readable video frame")
        self._time_base = float(stream.time_base)
        self._has_no_times = bool(container.format.flags & _NO_TIMESTAMPS)  # the demuxer assumes 25 frames a second
        self._clock_resets = bool(container.format.flags & _CLOCK_RESETS)
        self._declared_fps = float((stream.guessed_rate if self._has_no_times else stream.average_rate) or 0)
        # MP4 announces every packet, Matroska its duration.
        self.missing = len(errors)
        if "mov" in container.format.name:
            self.missing += max(0, len(stream.index_entries) - len(packets))
        if is_matroska and container.duration:
            gap = container.duration / av.time_base - end
            self.missing += max(1, round(gap * self._declared_fps)) if gap > _DURATION_TOLERANCE else 0

        # AVI and some Matroska files have decoding times alone. FFmpeg's guesses ignore dropped and reordered frames.
        unknown_pts = any(packet.pts is None for packet in packets)
        if container.format.name == "avi" or unknown_pts:
            self._has_dts_only = all(packet.dts is not None for packet in packets) and not self._has_no_times
        # Where FFmpeg has detected reordered frames, its guesses are in the right order.
        guesses = [packet.pts for packet in packets]
        is_unique = not unknown_pts and len(set(guesses)) == len(guesses)
        self._has_order = self._has_dts_only and is_unique and guesses != sorted(guesses)
        pts = [packet.dts for packet in packets] if self._has_dts_only and not self._has_order else guesses
        self._index, self._pts = packets, pts
        # A packet marked as damaged can still decode, as at the joint of concatenated MPEG-TS files.
        self._is_strict = is_corrupt
        self._first_key = next((position for position, packet in enumerate(packets) if packet.is_key), 0)
        self._num_skipped = 0 if opened.codec.name in _JUDGING_CODECS else self._first_key
        if is_marked and (first := self.first_frame()) is not None:
            self._matrix = display_matrix(first)
        is_reordered = self._has_dts_only and opened.codec.has_b_frames and not self._has_order
        if is_corrupt or is_reordered or self._has_no_times or None in pts or len(set(pts)) < len(pts):
            self._index_frames()
            return
        self._unused.append(opened)
        self._position = {time: position for position, time in enumerate(pts)}
        self._seek_to = [p if packet.dts is None else packet.dts for p, packet in zip(pts, packets, strict=True)]
        self._pts = np.array(pts, dtype=np.int64)
        keys = np.flatnonzero([packet.is_key for packet in packets])
        self._keys = keys if len(keys) else np.array([0])
        is_frame = ~np.array([packet.is_hidden for packet in packets])
        self._drop_undecodable(is_frame)
        self._set_packet_times(is_frame)

    def _drop_undecodable(self, is_frame: np.ndarray) -> None:
        """Clear in `is_frame` `[packets]` the frames that are shown before the first key frame and depend on frames before
        the start of the file. Others are independent (RADL pictures of H.265, recovery points): decoding decides."""
        start = self._pts[self._first_key]
        is_leading = is_frame & (self._pts < start)
        is_leading[: self._first_key] = is_frame[: self._first_key]
        is_leading[self._second_key() :] = False
        if not is_leading.any():
            return
        times = (frame.pts for frame in self._intact_frames([]) if frame.pts in self._position)
        decoded = set(itertools.takewhile(lambda time: time < start, times))
        if any(self._position[pts] < self._first_key for pts in decoded):
            self._keys = np.insert(self._keys, 0, 0)
        is_lost = is_leading & ~np.isin(self._pts, list(decoded))
        is_frame[is_lost] = False
        self.missing += int(is_lost.sum())

    def _set_packet_times(self, is_frame: np.ndarray) -> None:
        times = self._pts
        if self._clock_resets:
            times = times + clock_offsets(self._seek_to, self._step(), 1 / self._time_base)
        order = np.flatnonzero(is_frame)
        order = order[np.argsort(times[order], kind="stable")]
        costs = coding_costs(*np.array([(packet.size, packet.is_key) for packet in self._index]).T, times)
        self.costs = None if costs is None else costs[order]
        if self._has_dts_only:  # the n-th frame is shown a constant time after the n-th packet is decoded
            dts = np.sort([self._index[position].dts for position in order])
            self._set_times(self._pts[order], dts, 0)
        else:
            last = self._index[order[-1]].duration if len(order) else 0
            self._set_times(self._pts[order], times[order], last)

    def _index_frames(self) -> None:
        """Times of the frames of a full decode, for files where a packet is not always one frame."""
        self._packets_are_frames = self._has_order = False
        if self._has_dts_only:
            self._pts = [packet.dts for packet in self._index]
        lost: list[str] = []
        pts, positions, ticks = [], [], 0
        for frame in self._intact_frames(lost):
            pts.append(frame.pts)
            positions.append(frame.opaque)
            ticks = frame.duration or 0
        self.costs = None if not pts or None in positions else self._decoded_costs(np.array(positions))
        start = list(zip(self._pts, self._index, strict=True))[: self._second_key()]
        shown = [time for time, packet in start if time is not None and not packet.is_hidden]
        num_early = sum(time < pts[0] for time in shown) if pts and pts[0] is not None else 0
        self.missing = max(self.missing, len(lost), num_early)
        if self._has_dts_only:
            times, ticks = np.sort(self._pts if len(pts) == len(self._pts) else pts), 0
        else:
            times = np.array(filled_times(pts, self._step()), dtype=np.int64)
            if self._clock_resets:
                times += clock_offsets(times.tolist(), self._step(), 1 / self._time_base)
        if self._has_no_times or np.any(np.diff(times) <= 0):  # then the frames are evenly spaced
            times, ticks = np.arange(len(pts)), 0
            self._time_base = 1 / (self._declared_fps or FALLBACK_FPS)
        self._set_times(times, times, ticks)

    def _decoded_costs(self, positions: np.ndarray) -> np.ndarray | None:
        """`coding_costs` in order of time. A packet without a frame, as of a second field, counts for the one before it.

        Args:
            positions: `[total_frames]`, of the packet of each frame.
        """
        order = np.argsort(positions, kind="stable")
        places, sizes = positions[order], np.array([packet.size for packet in self._index])
        is_key = np.array([packet.is_key for packet in self._index])[places]
        costs = coding_costs(np.add.reduceat(sizes, places), is_key, order)
        return None if costs is None else costs[np.argsort(order)]

    def _second_key(self) -> int:
        """Position of the first packet whose frame cannot precede the first one. If its time does, the clock was reset."""
        keys = (position for position, packet in enumerate(self._index) if packet.is_key)
        return next(itertools.islice(keys, 1, None), len(self._index))

    def _step(self) -> int:
        """Median time between two frames, in units of the stream."""
        return max(1, round(1 / (self._time_base * (self._declared_fps or FALLBACK_FPS))))

    def _set_times(self, pts: np.ndarray, times: np.ndarray, last_duration: int) -> None:
        """Args: `[total_frames]` presentation times in units of the stream, as in the file and corrected; duration of
        the last frame, 0 if unknown."""
        if not len(pts):
            raise VideoReadError(self.name, "it holds no readable video frame")
        self._frame_pts = pts
        self.timestamps = (times - times[0]) * self._time_base
        damaged = self.missing and self._declared_fps  # then gaps do not determine the rate
        self.fps = self._declared_fps if damaged else frame_rate(self._declared_fps, self.timestamps)
        self.duration = float(self.timestamps[-1]) + (last_duration * self._time_base or 1 / self.fps)

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
            to_rgb = RgbConverter(self._report_oblique)
            with contextlib.ExitStack() as stack:
                try:
                    opened = self._unused.pop()  # atomic, as `popleft` below
                except IndexError:
                    opened = stack.enter_context(self._open())
                set_threads(opened.codec, threads_each)
                while True:
                    try:
                        group = groups.popleft()
                    except IndexError:
                        return
                    try:
                        done, lost = self._decode_group(opened, group, emit, to_rgb, seek=True)
                    except SeekMissed:
                        opened = stack.enter_context(self._open())
                        set_threads(opened.codec, threads_each)
                        done, lost = self._decode_group(opened, group, emit, to_rgb, seek=False)
                    seen.update(done)
                    failed.update(lost)

        try:
            with ThreadPoolExecutor(num_workers) as pool:
                for future in [pool.submit(work) for _ in range(num_workers)]:
                    future.result()
        except av.FFmpegError as error:
            raise VideoReadError(self.name, error.strerror) from error
        if len(seen) + len(failed) < len(indices):  # fewer frames than packets without an error
            logger.debug("%s: packets are not frames, decoding all of it", self.name)
            self._index_frames()
            raise TimesChanged
        return failed

    def _groups(self, indices: np.ndarray) -> list[FrameGroup]:
        """Group the requested frames by their key frame: the last one that is shown and decoded before them."""
        wanted: dict[int, dict[int, int]] = {}
        for index in indices.tolist():
            pts = int(self._frame_pts[index])
            nearest = int(np.searchsorted(self._keys, self._position[pts], side="right")) - 1
            while nearest and self._pts[self._keys[nearest]] > pts:
                nearest -= 1
            wanted.setdefault(int(self._keys[nearest]), {})[pts] = index
        return [FrameGroup(key, max(self._position[p] for p in group), group) for key, group in wanted.items()]

    def _decode_group(
        self, opened: OpenedFile, group: FrameGroup, emit: Emit, to_rgb: RgbConverter, seek: bool
    ) -> tuple[set[int], set[int]]:
        """Emit the requested frames of a group; return emitted indices and those lost to damage."""
        done: set[int] = set()
        to_rgb.matrix = self._matrix
        damaged_from = None  # position; later frames may depend on it
        try:
            for frame in self._frames_of_group(opened, group, seek):
                if frame.pts is None or (group.first != self._keys[0] and frame.pts < self._pts[group.first]):
                    continue  # shown before the key frame: decoded with the group before it
                if frame.key_frame:
                    to_rgb.observe(frame)
                if frame.is_corrupt:
                    position = self._position.get(frame.pts, group.first)
                    damaged_from = position if damaged_from is None else min(position, damaged_from)
                elif frame.pts in group.wanted:
                    emit(group.wanted[frame.pts], to_rgb(frame))
                    done.add(group.wanted[frame.pts])
        except av.FFmpegError as error:
            if not opened.codec.width:  # nor did the decoder that probed the stream
                cause = f"its frames have no size, or more than {MAX_FRAME_PIXELS} pixels ({error.strerror})"
                raise VideoReadError(self.name, cause) from error
            logger.debug("%s: decoding fails: %s", self.name, error)
            return done, set(group.wanted.values()) - done
        if damaged_from is not None:
            lost = {index for pts, index in group.wanted.items() if self._position[pts] >= damaged_from}
            return done - lost, lost
        return done, set()

    def _frames_of_group(self, opened: OpenedFile, group: FrameGroup, seek: bool) -> Iterator[Any]:
        codec = opened.codec
        may_skip = codec.name in _SKIPPABLE_CODECS
        if codec.is_open:
            codec.flush_buffers()
        if seek:
            opened.container.seek(self._seek_to[group.first], stream=opened.stream, backward=True)
        started = False
        for packet in self._packets(opened.container, opened.stream, []):
            position = self._position.get(packet.pts, -1)
            if position < group.first:
                continue
            if seek and not started and position > group.first:
                raise SeekMissed
            started = True
            if may_skip:
                codec.skip_frame = "DEFAULT" if packet.pts in group.wanted else "NONREF"
            with contextlib.suppress(*([av.FFmpegError] if position < self._first_key else [])):
                yield from codec.decode(packet)
            if position == group.last:
                break
        if seek and not started:
            raise SeekMissed
        yield from codec.decode(None)  # frames that the decoder still buffers

    def _intact_frames(self, lost: list[str]) -> Iterator[Any]:
        """Decode all: yield the complete frames in order of time. `lost` receives the reason of each loss."""
        with self._open() as opened:
            # One thread where errors must be separated from those before the first key frame: several report late.
            set_threads(opened.codec, 1 if self._first_key else self._num_threads)
            packets = enumerate(self._packets(opened.container, opened.stream, lost))
            started, intact = False, True
            for number, packet in itertools.chain(itertools.islice(packets, self._num_skipped, None), [(0, None)]):
                if packet is not None:  # None: frames that the decoder still buffers
                    packet.opaque = number
                    started |= packet.is_keyframe
                try:
                    frames = opened.codec.decode(packet)
                except av.FFmpegError as error:
                    lost.append(error.strerror)
                    intact = not started  # no frame depends on packets before the first key frame, if it decodes
                    continue
                for frame in frames:
                    intact = not frame.is_corrupt and (intact or frame.key_frame)
                    if intact:
                        yield frame
                    else:
                        lost.append("it depends on a damaged frame")

    def _report_oblique(self, matrix: list[int]) -> None:
        message = oblique(matrix)
        if message is not None and message not in self._oblique:
            self._oblique.add(message)
            logger.warning("%s: %s", self.name, message)

    def _read_all(self, indices: np.ndarray, emit: Emit) -> set[int]:
        wanted, to_rgb = set(indices.tolist()), RgbConverter(self._report_oblique)
        to_rgb.matrix = self._matrix
        for index, frame in enumerate(self._intact_frames([])):
            if frame.key_frame:
                to_rgb.observe(frame)
            if index in wanted:
                emit(index, to_rgb(frame))
                wanted.remove(index)
                if not wanted:
                    break
        return wanted


FILE_READERS: dict[str, Callable[[str | bytes, str, int], FrameReader]] = {
    "pyav": PyAVReader,
    "decord": checked_reader(DecordReader, PyAVReader if av else None),
    "torchcodec": checked_reader(TorchCodecReader, PyAVReader if av else None),
}


def choose_backend(backend: VideoBackend) -> str:
    """Key of `FILE_READERS` for the name of a back end.

    `"auto"` is PyAV. Where it is not installed: torchcodec, if that can be imported, else decord.

    Raises:
        ValueError: for an unknown name.
        ImportError: if its package is missing, too old or broken, with the required version.
    """
    if backend not in get_args(VideoBackend):
        raise ValueError(f"video backend {backend!r} is not one of {', '.join(get_args(VideoBackend))}")
    if backend == "auto":
        backend = "pyav" if av is not None else _other_than_pyav()
    if backend == "torchcodec":
        import_torchcodec()
    elif (av if backend == "pyav" else decord) is None:
        package = "av" if backend == "pyav" else "decord"
        raise ImportError(f"video backend {backend!r} needs the package {package!r}: pip install {package}")
    elif backend == "pyav" and _AV_MAJOR < _MIN_AV_MAJOR:
        needed = f"'av>={_MIN_AV_MAJOR}'"
        raise ImportError(
            f"video backend 'pyav' needs PyAV>={_MIN_AV_MAJOR}, but {av.__version__} is installed: "
            f"pip install --upgrade {needed}"
        )
    return backend


def _other_than_pyav() -> str:
    try:
        import_torchcodec()
    except ImportError:
        return "pyav" if decord is None else "decord"  # the first one for its message
    return "torchcodec"
