"""Compare each back end with the ffmpeg command on about a hundred odd video files, which it makes with that command.

    python -m llava_next_ar.experiments.benchmarks.video_corpus --ffmpeg /usr/bin/ffmpeg
    python -m llava_next_ar.experiments.benchmarks.video_corpus --only 'avi_*' --backends pyav
    python -m llava_next_ar.experiments.benchmarks.video_corpus --write-samples tests/corpus   # the committed tiny files

Without `--ffmpeg` the command of the package imageio-ffmpeg is used, or else the one on the PATH.

For each file and back end the table holds one of

    ok          number of frames, their size, times and pixels are those of ffmpeg
    partial     the same, after losses were reported as missing (with allow_partial)
    refused     VideoReadError; correct for decord and torchcodec, whose message names the cause (see --causes)
    DIFFERS     with the first difference

Pixels are compared as means over blocks of 8 x 8 pixels: `exact` files by at most 2 of 255, others by at most 12, since
FFmpeg's releases enlarge the colours of formats other than 8-bit 4:2:0 in different ways. The exit status is 1 if a file
differs, or if PyAV does not read one.
"""

import argparse
import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...hub.command_line import CommandParser
from ...processing.video_frames import VideoReadError, load_video

BLOCK = 8  # pixels
EXACT, CLOSE = 2.0, 12.0  # of 255
TIME_TOLERANCE = 2e-3  # seconds
WIDTH, HEIGHT, FPS, NUM_FRAMES = 96, 64, 10, 24


@dataclass(frozen=True)
class Entry:
    """One file and its reference.

    Attributes:
        name: of the file.
        make: arguments of ffmpeg after its input, or a function of (ffmpeg, folder, path) that writes the file.
        filters: of the generated picture.
        before: input options of the reference.
        view: filters of the reference.
        has_alpha: whether the reference is laid on white.
        is_exact: whether pixels must be those of ffmpeg.
        is_sample: whether the file is among the committed ones.
    """

    name: str
    make: tuple[str, ...] | Callable[[str, Path, Path], None]
    filters: str = ""
    before: tuple[str, ...] = ()
    view: str = ""
    has_alpha: bool = False
    is_exact: bool = True
    is_sample: bool = False


# -- Writing files


def run(ffmpeg: str, *arguments: object) -> None:
    subprocess.run([ffmpeg, "-v", "error", "-y", *map(str, arguments)], check=True, capture_output=True)


def generate(
    ffmpeg: str, path: Path, *arguments: str, filters: str = "", seed: int = 0, frames: int = NUM_FRAMES
) -> None:
    """Moving colours without hard edges, numbered by their brightness."""
    colours = "n=4:c0=red:c1=green:c2=blue:c3=gray"
    source = f"gradients=s={WIDTH}x{HEIGHT}:r={FPS}:d={frames / FPS}:speed=0.05:seed={7 + seed}:{colours}"
    chain = ",".join(part for part in (filters, "" if "format=" in filters else "format=yuv420p") if part)
    run(ffmpeg, "-f", "lavfi", "-i", source, "-vf", chain, "-frames:v", frames, *arguments, path)


def derived(*steps: tuple[str, ...], **options: object) -> Callable[[str, Path, Path], None]:
    """Encode with the first step into a file named by its last item; each further step reads the file of the step before."""

    def make(ffmpeg: str, folder: Path, path: Path) -> None:
        (*first, name), *others = steps
        source = folder / f"source_{path.stem}_{name}"
        generate(ffmpeg, source, *first, **options)
        for number, step in enumerate(others):
            target = path if number == len(others) - 1 else folder / f"step{number}_{path.name}"
            place = step.index("INPUT")
            run(ffmpeg, *step[:place], "-i", source, *step[place + 1 :], target)
            source = target

    return make


def without_packets(first: int, *arguments: str) -> Callable[[str, Path, Path], None]:
    """An MPEG-TS without its first packets, like a recording that starts in the middle."""
    drop = ("INPUT", "-c", "copy", "-bsf:v", f"noise=drop='lt(n,{first})'", "-f", "mpegts")
    return derived((*arguments, "whole.ts"), drop)


def joined(*parts: tuple[str, ...]) -> Callable[[str, Path, Path], None]:
    """The bytes of several MPEG-TS files one after another."""

    def make(ffmpeg: str, folder: Path, path: Path) -> None:
        content = b""
        for number, part in enumerate(parts):
            piece = folder / f"part{number}_{path.name}"
            generate(ffmpeg, piece, *part, "-f", "mpegts", seed=number)
            content += piece.read_bytes()
        path.write_bytes(content)

    return make


def several_streams(*sizes: tuple[int, int, int], marks: tuple[str, ...] = ()) -> Callable[[str, Path, Path], None]:
    """One stream of (width, height, frames) after another; `marks` are their dispositions."""

    def make(ffmpeg: str, folder: Path, path: Path) -> None:
        inputs, options = [], []
        for number, (width, height, frames) in enumerate(sizes):
            piece = folder / f"stream{number}_{path.stem}.mkv"
            scale = f"scale={width}:{height}"
            generate(ffmpeg, piece, *H264, filters=scale, seed=number, frames=frames)
            inputs += ["-i", str(piece)]
            options += ["-map", str(number)]
        for number, mark in enumerate(marks):
            options += [f"-disposition:{number}", mark]
        run(ffmpeg, *inputs, *options, "-c", "copy", path)

    return make


def with_cover(ffmpeg: str, folder: Path, path: Path) -> None:
    """A small video with a large picture as its cover."""
    video, cover = folder / "covered.mp4", folder / "cover.png"
    generate(ffmpeg, video, *H264)
    run(ffmpeg, "-f", "lavfi", "-i", "color=red:s=200x200", "-frames:v", "1", cover)
    run(
        ffmpeg,
        "-i",
        cover,
        "-i",
        video,
        "-map",
        "1",
        "-map",
        "0",
        "-c",
        "copy",
        "-disposition:1",
        "attached_pic",
        path,
    )


def cut_bytes(fraction: float, *arguments: str) -> Callable[[str, Path, Path], None]:
    def make(ffmpeg: str, folder: Path, path: Path) -> None:
        generate(ffmpeg, path, *arguments)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])

    return make


X264 = "keyint=8:min-keyint=8:scenecut=0"
H264 = ("-c:v", "libx264", "-x264-params", X264)
NO_B = ("-c:v", "libx264", "-x264-params", f"{X264}:bframes=0")
OPEN = ("-c:v", "libx264", "-x264-params", f"{X264}:bframes=3:open-gop=1")
REFRESH = ("-c:v", "libx264", "-x264-params", "keyint=8:intra-refresh=1:bframes=0")
X265 = "log-level=none:keyint=8:min-keyint=8:scenecut=0"
H265 = ("-c:v", "libx265", "-x265-params", X265)
H265_OPEN = ("-c:v", "libx265", "-x265-params", f"{X265}:open-gop=1:bframes=3")
H265_RADL = ("-c:v", "libx265", "-x265-params", f"{X265}:open-gop=0:bframes=3:radl=2")
VVC = ("-c:v", "libvvenc", "-preset", "faster", "-period", "1")
MPEG4 = ("-c:v", "mpeg4", "-bf", "2", "-g", "8", "-q:v", "3")
MPEG2 = ("-c:v", "mpeg2video", "-bf", "2", "-g", "8", "-q:v", "3")
VP8 = ("-c:v", "libvpx", "-g", "8", "-cpu-used", "8", "-deadline", "realtime")
VP9 = ("-c:v", "libvpx-vp9", "-g", "8", "-cpu-used", "8", "-deadline", "realtime")
VP9_ALTREF = ("-c:v", "libvpx-vp9", "-g", "12", "-lag-in-frames", "10", "-auto-alt-ref", "1")
AV1 = ("-c:v", "libsvtav1", "-preset", "12", "-g", "8", "-svtav1-params", "log-level=0")
MJPEG = ("-c:v", "mjpeg", "-q:v", "3", "-pix_fmt", "yuvj420p")
MPEG2_25 = (*MPEG2, "-r", "25")  # MPEG-1 and 2 know few frame rates
GAPS = "setpts='(N+floor(N/3)*2+floor(N/7)*5)/10/TB'"  # uneven times
PASS = ("-fps_mode", "vfr", "-enc_time_base", "1:100")
FADED = "format={},colorchannelmixer=aa=0.5,format={}"
DISPLAY = {
    "90": ("-display_rotation", "90"),
    "180": ("-display_rotation", "180"),
    "270": ("-display_rotation", "270"),
    "hflip": ("-display_rotation", "0", "-display_hflip"),
    "vflip": ("-display_rotation", "0", "-display_vflip"),
    "90_hflip": ("-display_rotation", "90", "-display_hflip"),
    "90_vflip": ("-display_rotation", "90", "-display_vflip"),
}
TURNED = {"89": "transpose=cclock", "179": "hflip,vflip", "271": "transpose=clock", "1": "null"}


def _codecs() -> list[Entry]:
    """Codecs, containers and pixel formats."""
    found = []
    codecs = {
        "h264": (H264, "mp4 mkv mov ts avi flv h264"),
        "h264nob": (NO_B, "mp4 avi h264 flv"),
        "h264open": (OPEN, "mp4 mkv ts"),
        "h264refresh": (REFRESH, "mp4 ts"),
        "h265": (H265, "mp4 mkv ts hevc"),
        "h265open": (H265_OPEN, "mp4 mkv ts"),
        "vvc": (VVC, "mp4 ts"),
        "mpeg4": (MPEG4, "mp4 avi mkv ts m4v"),
        "mpeg2": (MPEG2_25, "mpg ts mkv m2v"),
        "mpeg1": (("-c:v", "mpeg1video", "-g", "8", "-bf", "2", "-q:v", "3", "-r", "25"), "mpg"),
        "vp8": (VP8, "webm mkv"),
        "vp9": (VP9, "webm mp4 ivf"),
        "vp9altref": (VP9_ALTREF, "webm mp4"),
        "av1": (AV1, "mp4 webm obu ivf"),
        "mjpeg": (MJPEG, "avi mov mjpeg"),
        "msmpeg4": (("-c:v", "msmpeg4", "-q:v", "3"), "avi asf"),
        "wmv2": (("-c:v", "wmv2", "-q:v", "3"), "asf"),
        "flv1": (("-c:v", "flv", "-q:v", "3"), "flv"),
        "theora": (("-c:v", "libtheora", "-q:v", "8"), "ogg"),
    }
    for codec, (options, containers) in codecs.items():
        for container in containers.split():
            found.append(Entry(f"{codec}.{container}", options))
    for name, (pixel_format, container, options) in {
        "ffv1_yuv444": ("yuv444p", "mkv", ("-c:v", "ffv1")),
        "huffyuv_422": ("yuv422p", "avi", ("-c:v", "huffyuv")),
        "prores_422": ("yuv422p10", "mov", ("-c:v", "prores_ks")),
        "h264_10bit": ("yuv420p10", "mp4", H264),
        "h264_422": ("yuv422p", "mkv", H264),
        "h264_444": ("yuv444p", "mp4", H264),
        "h264_gray": ("gray", "mp4", H264),
        "h264_rgb": ("rgb24", "mkv", ("-c:v", "libx264rgb", "-qp", "10")),
        "h265_12bit": ("yuv420p12", "mkv", H265),
        "raw_rgb": ("rgb24", "avi", ("-c:v", "rawvideo")),
    }.items():
        found.append(Entry(f"{name}.{container}", options, f"format={pixel_format}", is_exact=False))
    found.append(Entry("full_range.mp4", (*H264, "-color_range", "pc"), "scale=out_range=pc,format=yuvj420p"))
    found.append(Entry("bt709.mp4", (*H264, "-colorspace", "bt709"), "scale=out_color_matrix=bt709,format=yuv420p"))
    found.append(Entry("odd_size.mp4", H264, "scale=97:65,format=yuv444p", is_exact=False))
    return found


def _times() -> list[Entry]:
    """Uneven times, edit lists, AVI with empty packets, streams without times."""
    found = []
    for container in ("mp4", "mkv", "mov", "ts", "flv", "webm"):
        codec = VP9 if container == "webm" else H264
        found.append(Entry(f"variable.{container}", (*codec, *PASS), GAPS, is_sample=container == "mp4"))
    for container in ("mp4", "mkv", "ts"):
        found.append(Entry(f"late_start.{container}", (*H264, "-output_ts_offset", "7.5")))
    found.append(Entry("fragmented.mp4", (*H264, "-movflags", "frag_keyframe+empty_moov")))
    edit = ("-ss", "1.13", "INPUT", "-c", "copy")
    found.append(Entry("edit_list.mp4", derived((*H264, "whole.mp4"), edit), is_sample=True))
    found.append(Entry("edit_list.mov", derived((*MPEG4, "whole.mp4"), edit)))
    found.append(Entry("edit_list_h265.mp4", derived((*H265_OPEN, "whole.mp4"), edit)))
    for name, options in (("b", H264), ("nob", NO_B), ("mpeg4", MPEG4)):
        slow = (*options, "-fps_mode", "passthrough", "-enc_time_base", "1:600")  # an index with empty places
        found.append(Entry(f"avi_600_{name}.avi", slow, is_sample=name == "b"))
    found.append(
        Entry(
            "vfw_b.mkv",
            derived((*MPEG4, "whole.avi"), ("-fflags", "+genpts", "INPUT", "-c", "copy", "-allow_raw_vfw", "1")),
        )
    )
    for rate in ("5", "24000/1001", "60"):
        for name, options in (("h264", H264), ("hevc", H265)):
            shown = f"raw_{rate.split('/')[0]}.{name}"
            found.append(Entry(shown, (*options, "-r", rate), is_sample=shown == "raw_5.h264"))
    found.append(
        Entry("pipe.webm", derived((*VP9, "whole.mkv"), ("INPUT", "-c", "copy", "-live", "1")), is_sample=True)
    )
    return found


def _starts() -> list[Entry]:
    """Files that start or end in the middle, and joined ones."""
    found = []
    for name, options in {
        "h264": H264, "h264open": OPEN, "h265open": H265_OPEN, "h265radl": H265_RADL, "mpeg2": MPEG2_25, "vvc": VVC,
    }.items():  # fmt: skip
        for first in (3, 8, 9):
            sample = (name, first) == ("h265radl", 8)
            found.append(Entry(f"cut_{name}_{first}.ts", without_packets(first, *options), is_sample=sample))
    late = (*H264, "-output_ts_offset", "3600")
    found.append(Entry("joined.ts", joined(H264, H264), is_sample=True))
    found.append(Entry("joined_back.ts", joined(late, H264)))
    found.append(Entry("joined_ahead.ts", joined(H264, late)))
    found.append(Entry("joined_three.ts", joined(NO_B, NO_B, NO_B)))
    found.append(Entry("joined_mpeg2.ts", joined(MPEG2_25, MPEG2_25)))
    found.append(Entry("truncated.ts", cut_bytes(0.6, *H264)))
    found.append(Entry("truncated.mkv", cut_bytes(0.6, *H264)))
    return found


def _orientations() -> list[Entry]:
    """Display matrices in the header and with the pictures."""
    found = []
    for name, options in DISPLAY.items():
        for container in ("mp4", "mkv", "mov"):
            turn = (*options, "INPUT", "-c", "copy")
            sample = f"{name}.{container}" in ("90.mp4", "hflip.mp4", "90_vflip.mp4")
            found.append(Entry(f"display_{name}.{container}", derived((*H264, "whole.mp4"), turn), is_sample=sample))
    for degrees, view in TURNED.items():
        turn = ("-display_rotation", degrees, "INPUT", "-c", "copy")
        make = derived((*H264, "whole.mp4"), turn)
        found.append(Entry(f"display_{degrees}.mp4", make, before=("-noautorotate",), view=view))
    for name, sei in {"rotate": "rotate=90", "flip": "flip=horizontal", "both": "rotate=90:flip=vertical"}.items():
        mark = ("INPUT", "-c", "copy", "-bsf:v", f"h264_metadata=display_orientation=insert:{sei}")
        found.append(Entry(f"display_sei_{name}.mp4", derived((*H264, "whole.mp4"), mark), is_sample=name == "both"))
    return found


def _pictures() -> list[Entry]:
    """Transparency, interlaced fields, and several streams."""
    found = []
    for name, (pixel_format, options) in {
        "prores.mov": ("yuva444p10", ("-c:v", "prores_ks", "-profile:v", "4")),
        "qtrle.mov": ("argb", ("-c:v", "qtrle")),
        "png.mov": ("rgba", ("-c:v", "png")),
        "ffv1.mkv": ("yuva420p", ("-c:v", "ffv1")),
    }.items():
        make = (*options, "-pix_fmt", pixel_format)
        faded = FADED.format("rgba", pixel_format)
        entry = Entry(f"alpha_{name}", make, faded, has_alpha=True, is_exact=False)
        found.append(entry)
    for name, (decoder, options) in {"vp8": ("libvpx", VP8), "vp9": ("libvpx-vp9", VP9)}.items():
        faded = FADED.format("rgba", "yuva420p")
        make = (*options, "-auto-alt-ref", "0")
        before = ("-c:v", decoder)
        found.append(
            Entry(f"alpha_{name}.webm", make, faded, before, has_alpha=True, is_exact=False, is_sample=name == "vp9")
        )
    # interlaced
    for name, options in {
        "mpeg2.mpg": (*MPEG2_25, "-flags", "+ilme+ildct"),
        "h264.mp4": ("-c:v", "libx264", "-x264-params", f"{X264}:interlaced=1:tff=1"),
        "h264.ts": ("-c:v", "libx264", "-x264-params", f"{X264}:interlaced=1:tff=1"),
        "ffv1.mkv": ("-c:v", "ffv1"),
    }.items():
        found.append(
            Entry(f"interlaced_{name}", options, "setfield=tff,format=yuv420p", is_sample=name == "mpeg2.mpg")
        )
    # several streams
    small, large, still = (48, 32, 24), (96, 64, 24), (48, 32, 1)
    found.append(Entry("streams_still.mkv", several_streams(still, large, marks=("0", "default")), is_sample=True))
    found.append(Entry("streams_default.mkv", several_streams(large, small, marks=("0", "default"))))
    found.append(Entry("streams_default.mp4", several_streams(small, large, marks=("0", "default"))))
    found.append(Entry("streams_size.ts", several_streams(small, large)))
    found += [Entry(f"streams_cover.{container}", with_cover) for container in ("mp4", "mkv")]
    return found


def entries() -> list[Entry]:
    """All files of the corpus."""
    return [*_codecs(), *_times(), *_starts(), *_orientations(), *_pictures()]


def write(entry: Entry, ffmpeg: str, folder: Path) -> Path:
    """Write the file of an entry into a folder; returns its path."""
    path = folder / entry.name
    if callable(entry.make):
        entry.make(ffmpeg, folder, path)
    else:
        generate(ffmpeg, path, *entry.make, filters=entry.filters)
    return path


# -- Comparing


@dataclass(frozen=True)
class Decoded:
    """Frames of a file: `size` (H, W), `times` `[T]` seconds from the first, `blocks` `[T, h, w, 3]` mean colours."""

    size: tuple[int, int]
    times: np.ndarray
    blocks: np.ndarray


def block_means(frames: np.ndarray) -> np.ndarray:
    """`[T, H, W, 3]` -> `[T, H // BLOCK, W // BLOCK, 3]` float32; rows and columns that fill no block are left out."""
    rows, columns = frames.shape[1] // BLOCK, frames.shape[2] // BLOCK
    cropped = frames[:, : rows * BLOCK, : columns * BLOCK].astype(np.float32)
    return cropped.reshape(len(frames), rows, BLOCK, columns, BLOCK, 3).mean((2, 4))


def decode_with_ffmpeg(entry: Entry, ffmpeg: str, path: Path) -> Decoded:
    """Frames, times and pixels as the ffmpeg command returns them."""
    view = ",".join(part for part in (entry.view, "showinfo", "scale=interl=-1") if part)
    pixel_format, channels = ("rgba", 4) if entry.has_alpha else ("rgb24", 3)
    command = [
        ffmpeg,
        "-hide_banner",
        "-y",
        *entry.before,
        "-i",
        str(path),
        "-an",
        "-fps_mode",
        "passthrough",
        "-vf",
        view,
    ]
    done = subprocess.run([*command, "-pix_fmt", pixel_format, "-f", "rawvideo", "-"], capture_output=True)
    report = done.stderr.decode(errors="replace")
    found = re.findall(r"pts_time:\s*(\S+) .*? s:(\d+)x(\d+) ", report)
    if not found:
        raise RuntimeError(f"{path.name}: ffmpeg decodes nothing: {report[-300:]}")
    height, width = int(found[0][2]), int(found[0][1])
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, channels)
    if entry.has_alpha:
        alpha = frames[..., 3:].astype(np.float32) / 255
        frames = frames[..., :3] * alpha + 255 * (1 - alpha)
    times = np.array([float(time) for time, *_ in found[: len(frames)]])
    return Decoded((height, width), times - times[0], block_means(frames))


def decode_with(backend: str, path: Path) -> tuple[Decoded, int]:
    """Frames, times and pixels by `load_video`, and the number of missing frames."""
    video = load_video(path, backend=backend, allow_partial=True)
    frames = video.frames.permute(0, 2, 3, 1).numpy()
    return Decoded(frames.shape[1:3], video.timestamps.numpy(), block_means(frames)), video.missing


def difference(decoded: Decoded, reference: Decoded, tolerance: float) -> str | None:
    """The first difference of two results, or None."""
    if decoded.size != reference.size:
        return f"size {decoded.size}, not {reference.size}"
    if len(decoded.times) != len(reference.times):
        return f"{len(decoded.times)} frames, not {len(reference.times)}"
    worst = int(np.abs(decoded.times - reference.times).argmax())
    if abs(decoded.times[worst] - reference.times[worst]) > TIME_TOLERANCE:
        return f"frame {worst} at {decoded.times[worst]:.3f} s, not {reference.times[worst]:.3f}"
    pixels = np.abs(decoded.blocks - reference.blocks).reshape(len(decoded.times), -1).max(1)
    if pixels.max() > tolerance:
        return f"pixels of frame {int(pixels.argmax())} by {pixels.max():.0f} of 255"
    return None


def compare(entry: Entry, reference: Decoded, backend: str, path: Path) -> tuple[str, str]:
    """Verdict and remark of one back end on one file."""
    try:
        decoded, missing = decode_with(backend, path)
    except VideoReadError as error:
        return "refused", error.cause
    found = difference(decoded, reference, EXACT if entry.is_exact else CLOSE)
    if found is not None:
        return "DIFFERS", found
    return ("partial", f"{missing} missing") if missing else ("ok", "")


# -- The command


def find_ffmpeg(given: str | None = None) -> str | None:
    """Path of an ffmpeg command: the given one, that of imageio-ffmpeg, or the one on the PATH; None without any."""
    if given is None:
        try:
            import imageio_ffmpeg

            return imageio_ffmpeg.get_ffmpeg_exe()
        except (ImportError, RuntimeError):
            pass
    return shutil.which(given or "ffmpeg")


def write_samples(ffmpeg: str, folder: Path) -> None:
    """Write the tiny files and `expected.json`: size, times, and mean colours of each frame by ffmpeg."""
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    with tempfile.TemporaryDirectory() as scratch:
        for entry in entries():
            if entry.is_sample:
                shutil.copy(path := write(entry, ffmpeg, Path(scratch)), folder)
                reference = decode_with_ffmpeg(entry, ffmpeg, path)
                coarse = reference.blocks[:, ::3, ::3].round().astype(int)
                expected[entry.name] = {
                    "size": reference.size,
                    "times": [round(time, 4) for time in reference.times.tolist()],
                    "blocks": [" ".join(map(str, frame.ravel())) for frame in coarse],
                    "is_exact": entry.is_exact,
                }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ffmpeg", help="command to compare with")
    parser.add_argument("--backends", nargs="+", default=["pyav", "decord", "torchcodec"])
    parser.add_argument("--only", default="*", help="pattern of file names")
    parser.add_argument("--causes", action="store_true", help="print why files cannot be read")
    parser.add_argument("--write-samples", type=Path, metavar="FOLDER", help="write the committed files instead")
    options = parser.parse_args()
    ffmpeg = find_ffmpeg(options.ffmpeg)
    if ffmpeg is None:
        parser.error("no ffmpeg command; pip install imageio-ffmpeg, or name one with --ffmpeg")
    if options.write_samples:
        write_samples(ffmpeg, options.write_samples)
        return
    chosen = [entry for entry in entries() if fnmatch.fnmatch(entry.name, options.only)]
    counts: dict[str, dict[str, int]] = {backend: {} for backend in options.backends}
    print(f"{'file':<26}{'frames':>7}" + "".join(f"  {backend:<22}" for backend in options.backends))
    with tempfile.TemporaryDirectory() as scratch:
        for entry in chosen:
            try:
                path = write(entry, ffmpeg, Path(scratch))
            except subprocess.CalledProcessError as error:
                print(f"{entry.name:<26} not written: {error.stderr.decode(errors='replace').strip()[-120:]}")
                continue
            reference = decode_with_ffmpeg(entry, ffmpeg, path)
            line = f"{entry.name:<26}{len(reference.times):>7}"
            for backend in list(options.backends):
                try:
                    verdict, remark = compare(entry, reference, backend, path)
                except ImportError as error:
                    print(f"{backend} is left out: {error}")
                    options.backends.remove(backend)
                    continue
                counts[backend][verdict] = counts[backend].get(verdict, 0) + 1
                shown = remark if verdict != "refused" or options.causes else ""
                line += f"  {f'{verdict} {shown}'.strip():<22}"
            print(line, flush=True)
    for backend in options.backends:
        print(f"{backend}: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts[backend].items())))
    failed = any(counts[backend].get("DIFFERS") for backend in options.backends)
    sys.exit(failed or bool(counts.get("pyav", {}).get("refused")))


if __name__ == "__main__":
    main()
