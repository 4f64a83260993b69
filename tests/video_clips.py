"""Small real videos for the tests and their content, written and decoded from start to end with PyAV."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# Key frames every 12, B-frames that others depend on, and no key frame at a change of scene.
X264 = "keyint=12:min-keyint=12:bframes=3:b-pyramid=normal:scenecut=0"


@dataclass(frozen=True)
class DecodedClip:
    """`frames [T, H, W, 3]` uint8 and `times [T]` seconds from the first frame, None for a file without times."""

    frames: np.ndarray
    times: np.ndarray | None


def picture(index: int, width: int = 128, height: int = 96) -> np.ndarray:
    """`[H, W, 3]` uint8, different for every index below 256: moving gradients."""
    rows, columns = np.mgrid[:height, :width]
    channels = (columns * 3 + index * 5, rows * 4 + index * 3, rows + columns + index * 7)
    return (np.stack(channels, axis=-1) % 256).astype(np.uint8)


def write_clip(
    path: Path,
    num_frames: int = 48,
    *,
    width: int = 128,
    height: int = 96,
    fps: int = 24,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
    milliseconds: Sequence[int] | None = None,
    first_frame: int = 0,
    rotation: int = 0,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write `num_frames` frames of `picture`.

    Args:
        milliseconds: presentation time of each frame, for a variable frame rate; else `fps` apart.
        first_frame: start of the stream in units of `1 / fps`.
        rotation: degrees, as phones store it.
    """
    options = {"preset": "veryfast", "x264-params": X264} if options is None else options
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if rotation:
            stream.set_display_rotation(rotation)
        if milliseconds is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(index, width, height), format="rgb24")
            frame.time_base = Fraction(1, fps) if milliseconds is None else Fraction(1, 1000)
            frame.pts = first_frame + index if milliseconds is None else milliseconds[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def hide_first_frames(source: Path, target: Path, num_frames: int) -> Path:
    """Copy an MP4 with an edit list that starts `num_frames` later, as cutting without encoding does."""
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    with av.open(str(source)) as container, av.open(str(target), "w", options=options) as copy:
        stream = container.streams.video[0]
        shift = int(num_frames / stream.average_rate / stream.time_base)
        copied = copy.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copied
                copy.mux(packet)
    return target


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for _ in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut(source: Path, target: Path, fraction: float) -> Path:
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * fraction)])
    return target


def decode_everything(path: Path) -> DecodedClip:
    """Reference: all frames from the start, without a seek."""
    frames, times = [], []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            frames.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
            times.append(frame.time)
    usable = None not in times and bool(np.all(np.diff(times) > 0))
    return DecodedClip(np.stack(frames), np.array(times) - times[0] if usable else None)
