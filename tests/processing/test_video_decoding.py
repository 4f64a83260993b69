"""Decoding: exact frames and times, reported damage, constant memory, workers that do not hang."""

import io
import logging
import os
import pickle
import struct
import sys
import types
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from video_clips import cut, decode_everything, hide_first_frames, picture, write_audio, write_clip

from llava_next_ar.processing import video_decoding
from llava_next_ar.processing.video_decoding import PyAVReader, VideoReadError
from llava_next_ar.processing.video_frames import FrameSampling, load_video, video_length
from llava_next_ar.processing.video_reader import clock_offsets, filled_times, on_white, orientation

MILLISECONDS = np.cumsum(np.random.default_rng(0).integers(1, 9, 48) * 20).tolist()
OPEN_GROUPS = {"x264-params": "keyint=12:bframes=3:open-gop=1:scenecut=0"}
EIGHT = FrameSampling(num_frames=8)

# Name (with the container): how to write it. The first block is within what decord can do exactly.
CLIPS = {
    "b_frames.mp4": {},
    "b_frames.mkv": {},
    "variable_rate.mp4": {"milliseconds": MILLISECONDS},
    "variable_rate.mkv": {"milliseconds": MILLISECONDS},
    "late_start.mp4": {"first_frame": 37},
    "late_start.mkv": {"first_frame": 37},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "rotated.mp4": {"rotation": 90},
    "odd_size.mp4": {"width": 129, "height": 97, "pixel_format": "yuv444p"},
    "full_range.mp4": {"pixel_format": "yuvj420p"},
    "open_groups.mp4": {"options": OPEN_GROUPS},
    "intra_refresh.mp4": {"options": {"x264-params": "keyint=12:intra-refresh=1"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "h265.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=12:bframes=3:log-level=none"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "lag-in-frames": "10", "cpu-used": "8"}},
    "b_frames.ts": {},
    "late_start.ts": {"first_frame": 37},
    "open_groups.ts": {"options": OPEN_GROUPS},
    "b_frames.avi": {},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "motion_jpeg.avi": {"codec": "mjpeg", "options": {}, "pixel_format": "yuvj420p"},
    "b_frames.h264": {},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12"}},
    "ten_bit.mp4": {"pixel_format": "yuv420p10le"},
}
DECORD_CLIPS = [name for name in CLIPS if name.endswith((".mp4", ".mkv", ".webm")) and name[:3] not in ("av1", "ten")]

backends = pytest.mark.parametrize("backend", ["pyav", "decord", "torchcodec"])


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Path of a clip by its name, written once."""
    folder = tmp_path_factory.mktemp("clips")

    def clip(name: str):
        path = folder / name
        if not path.exists():
            codec = CLIPS[name].get("codec", "libx264")
            if codec not in av.codecs_available:
                pytest.skip(f"this FFmpeg has no {codec}")
            if "rotation" in CLIPS[name] and not hasattr(av.VideoStream, "set_display_rotation"):
                pytest.skip("this PyAV cannot write a rotation")
            write_clip(path, **CLIPS[name])
        return path

    return clip


def require(backend: str) -> None:
    try:
        video_decoding.choose_backend(backend)
    except ImportError as error:
        pytest.skip(str(error))


def assert_true_frames(video, truth):
    assert video.total_frames == len(truth.frames)
    wrong = [
        index
        for index, frame in zip(video.indices.tolist(), video.frames, strict=True)
        if not np.array_equal(frame.permute(1, 2, 0).numpy(), truth.frames[index])
    ]
    assert wrong == []
    if truth.times is not None:
        np.testing.assert_allclose(video.timestamps, truth.times[video.indices], atol=2e-6)


# -- The right frames


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("name", CLIPS)
def test_pyav_gives_the_frames_of_a_full_decode(clips, name, num_threads):
    truth = decode_everything(clips(name))
    for num_frames in (1, 2, 7, 48):
        sampling = FrameSampling(num_frames=num_frames)
        assert_true_frames(load_video(clips(name), sampling, backend="pyav", num_threads=num_threads), truth)


@pytest.mark.parametrize("name", DECORD_CLIPS)
@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_other_back_ends_give_the_same_frames(clips, name, backend):
    require(backend)
    if (backend, name) == ("torchcodec", "intra_refresh.mp4"):
        with pytest.raises(VideoReadError, match="torchcodec does not decode frame .* use the back end 'pyav'"):
            load_video(clips(name), backend=backend)
        return
    truth = decode_everything(clips(name))
    for num_frames in (1, 2, 7, 48):
        assert_true_frames(load_video(clips(name), FrameSampling(num_frames=num_frames), backend=backend), truth)


@pytest.mark.parametrize("name", ["b_frames.ts", "b_frames.avi"])
def test_decord_refuses_containers_in_which_it_mistakes_frames(clips, name):
    require("decord")
    with pytest.raises(VideoReadError, match="use the back end 'pyav'"):
        load_video(clips(name), EIGHT, backend="decord")


@backends
def test_frames_hidden_by_an_edit_list_are_not_frames(clips, tmp_path, backend):
    require(backend)
    path = hide_first_frames(clips("b_frames.mp4"), tmp_path / "edited.mp4", 5)
    original = decode_everything(clips("b_frames.mp4"))
    if backend == "torchcodec":
        with pytest.raises(VideoReadError, match="torchcodec returned a frame .* use the back end 'pyav'"):
            load_video(path, backend=backend)
        return
    video = load_video(path, backend=backend)
    assert video.total_frames == 43
    assert np.array_equal(video.frames.permute(0, 2, 3, 1).numpy(), original.frames[5:])


def test_times_are_those_of_the_container_not_of_a_constant_rate(clips):
    video = load_video(clips("variable_rate.mp4"), EIGHT)
    expected = (np.array(MILLISECONDS) - MILLISECONDS[0])[video.indices] / 1000
    np.testing.assert_allclose(video.timestamps, expected, atol=1e-6)
    assert np.ptp(np.diff(video.timestamps)) > 0.05, "the clip has no variable rate: the test shows nothing"
    assert video.timestamps.dtype == torch.float64
    span = (MILLISECONDS[-1] - MILLISECONDS[0]) / 1000
    assert video.fps == pytest.approx(47 / span, rel=0.02), "the average, not the rate given to the encoder"
    assert video.duration == pytest.approx(span + 0.02, abs=1e-6), "the file holds the duration of the last frame"


def test_seeking_decodes_little(tmp_path, monkeypatch):
    """The speed comes from decoding only what a wanted frame needs: here 1 of 20 groups, and not all of it."""
    path = write_clip(tmp_path / "long.mp4", 240)
    decoded = []
    original = PyAVReader._frames_of_group

    def counting(self, *args):
        for frame in original(self, *args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(PyAVReader, "_frames_of_group", counting)
    emitted = []
    PyAVReader(str(path), "long", 1).read(np.array([130]), lambda index, frame: emitted.append(index))
    assert emitted == [130]
    assert len(decoded) < 10, "frame 130 is the 11th of its group; the non-reference ones before it are skipped"


def test_a_demuxer_that_lands_too_late_is_noticed(clips, monkeypatch):
    reader = PyAVReader(str(clips("b_frames.mp4")), "clip", 1)
    reader._seek_to = [reader._seek_to[-1]] * len(reader._seek_to)  # every seek goes to the last key frame
    truth = decode_everything(clips("b_frames.mp4"))
    seen = {}
    assert reader.read(np.array([3, 20, 47]), seen.__setitem__) == set()
    assert all(np.array_equal(seen[index], truth.frames[index]) for index in (3, 20, 47)) and len(seen) == 3


# -- Orientation

FIXED = 65536  # one in the fixed-point numbers of a display matrix
# Display matrix (a, b, c, d) -> the same with numpy: how ISO 14496-12 defines it, without angles.
ORIENTATIONS = {
    (1, 0, 0, 1): lambda frame: frame,
    (-1, 0, 0, 1): lambda frame: frame[:, ::-1],
    (1, 0, 0, -1): lambda frame: frame[::-1],
    (-1, 0, 0, -1): lambda frame: frame[::-1, ::-1],
    (0, 1, 1, 0): lambda frame: frame.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda frame: frame[::-1, ::-1].transpose(1, 0, 2),
    (0, 1, -1, 0): lambda frame: frame[::-1].transpose(1, 0, 2),
    (0, -1, 1, 0): lambda frame: frame[:, ::-1].transpose(1, 0, 2),
}


def with_matrix(source, target, a: float, b: float, c: float, d: float):
    """A copy of an MP4 file whose track headers have the display matrix."""
    content = bytearray(source.read_bytes())
    at = content.find(b"tkhd")
    assert at > 0
    while at > 0:
        numbers = [round(number * FIXED) for number in (a, b, 0, c, d, 0, 0, 0)]
        content[at + 44 : at + 80] = struct.pack(">9i", *numbers, 1 << 30)
        at = content.find(b"tkhd", at + 1)
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_frames_are_turned_and_mirrored_as_the_display_matrix_says(clips, tmp_path, matrix):
    """A matrix that mirrors was once taken for a half turn (androidx/media#1704, mpv#16078)."""
    path = with_matrix(clips("b_frames.mp4"), tmp_path / "turned.mp4", *matrix)
    stored = decode_everything(clips("b_frames.mp4")).frames
    video = load_video(path, EIGHT, backend="pyav")
    for index, frame in zip(video.indices.tolist(), video.frames.permute(0, 2, 3, 1).numpy(), strict=True):
        assert np.array_equal(frame, ORIENTATIONS[matrix](stored[index]))


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_other_back_ends_turn_frames_too_or_are_named(clips, tmp_path, matrix, backend):
    require(backend)
    path = with_matrix(clips("b_frames.mp4"), tmp_path / "turned.mp4", *matrix)
    if matrix[0] * matrix[3] - matrix[1] * matrix[2] < 0:
        with pytest.raises(VideoReadError, match=f"{backend} does not turn or mirror its frames"):
            load_video(path, EIGHT, backend=backend)
    else:
        assert torch.equal(
            load_video(path, EIGHT, backend=backend).frames, load_video(path, EIGHT, backend="pyav").frames
        )


def turned(degrees: float) -> tuple[float, float, float, float]:
    radians = np.deg2rad(degrees)
    return np.cos(radians), np.sin(radians), -np.sin(radians), np.cos(radians)


@pytest.mark.parametrize(("degrees", "turns"), [(89, 1), (91, 1), (179, 2), (269.5, 3), (1, 0), (359, 0), (100, 1)])
def test_the_nearest_quarter_turn_counts(clips, tmp_path, caplog, degrees, turns):
    """89 degrees were once not turned at all, and 179 by 90 (ExoPlayer#8928)."""
    path = with_matrix(clips("b_frames.mp4"), tmp_path / "oblique.mp4", *turned(degrees))
    stored = decode_everything(clips("b_frames.mp4")).frames
    frame = load_video(path, FrameSampling(num_frames=1)).frames[0].permute(1, 2, 0).numpy()
    assert np.array_equal(frame, np.rot90(stored[0], -turns))
    assert ("more or less than" in caplog.text) == (degrees == 100), "10 degrees off is said, 1 is rounding"


def test_orientation_of_scaled_matrices():
    assert orientation([2 * FIXED, 0, 0, 0, FIXED, 0, 0, 0, 1]) == (False, 0, 0.0)
    assert orientation([0, 2 * FIXED, 0, -FIXED, 0, 0, 0, 0, 1]) == (False, 1, 0.0)
    mirrored, turns, off = orientation([*turned(30)[:2], 0, *turned(30)[2:], 0, 0, 0, 1])
    assert (mirrored, turns) == (False, 0) and off == pytest.approx(30)


# -- Transparency


def test_transparency_is_laid_on_white_as_pillow_does():
    rgba = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    ground = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    expected = np.asarray(Image.alpha_composite(ground, Image.fromarray(rgba)).convert("RGB")).astype(int)
    assert np.abs(on_white(rgba) - expected).max() <= 1
    assert np.array_equal(on_white(np.full((1, 1, 4), 255, np.uint8)), np.full((1, 1, 3), 255, np.uint8))


def write_logo(path, codec: str, pixel_format: str):
    """A black square that moves over nothing; the colour of what is transparent is black too."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"auto-alt-ref": "0"} if "vpx" in codec else {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixel_format
        for index in range(8):
            picture_of_logo = np.zeros((48, 64, 4), np.uint8)
            picture_of_logo[8:40, 4 * index : 4 * index + 24, 3] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture_of_logo, format="rgba")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("logo.mov", "qtrle", "argb"),
        ("logo4444.mov", "prores_ks", "yuva444p10le"),
        ("png.mov", "png", "rgba"),
        ("ffv1.mkv", "ffv1", "yuva420p"),
        ("vp9.webm", "libvpx-vp9", "yuva420p"),
        ("vp8.webm", "libvpx", "yuva420p"),
    ],
)
def test_a_black_logo_on_nothing_stays_visible(tmp_path, name, codec, pixel_format):
    """Transparency was once dropped, so that all was black (moviepy#2229)."""
    path = write_logo(tmp_path / name, codec, pixel_format)
    frames = load_video(path, FrameSampling(num_frames=3), backend="pyav").frames
    assert frames[:, :, 2, 60].min() > 245, "white where there is nothing"
    assert frames[0, :, 24, 12].max() < 10 and frames[2, :, 24, 40].max() < 10, "black where the logo is"
    for backend in ("decord", "torchcodec"):
        try:
            video_decoding.choose_backend(backend)
        except ImportError:
            continue
        with pytest.raises(VideoReadError, match=f"{backend} drops its transparency; use the back end 'pyav'"):
            load_video(path, backend=backend)


def test_transparency_without_its_decoder_is_refused(tmp_path, monkeypatch):
    path = write_logo(tmp_path / "vp9.webm", "libvpx-vp9", "yuva420p")
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libvpx-vp9"})
    with pytest.raises(VideoReadError, match="its transparency needs the decoder libvpx-vp9"):
        load_video(path)


# -- Streams, starts and clocks


def write_streams(path, *streams: tuple[int, int, int]):
    """One H.264 stream for each (width, height, number of frames)."""
    with av.open(str(path), "w") as container:
        opened = []
        for width, height, _ in streams:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            opened.append(stream)
        for stream, (width, height, count) in zip(opened, streams, strict=True):
            for index in range(count):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index, width, height), format="rgb24")))
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name", ["streams.mkv", "streams.ts"])
def test_the_video_is_read_and_not_its_thumbnail(tmp_path, name):
    """The first stream was once read, whatever it was (ffmpegthumbnailer#114, immich#11603)."""
    small_first = write_streams(tmp_path / name, (64, 48, 1), (128, 96, 12))
    assert load_video(small_first).frames.shape == (12, 3, 96, 128)
    large_still = write_streams(tmp_path / f"still_{name}", (128, 96, 1), (64, 48, 12))
    assert load_video(large_still).frames.shape == (12, 3, 48, 64)


def without_first_packets(source, target, count: int):
    """An MPEG-TS copy that starts in the middle, as a recording does."""
    with av.open(str(source)) as container, av.open(str(target), "w", format="mpegts") as output:
        stream = container.streams.video[0]
        copied = output.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in container.demux(stream) if packet.size):
            if number >= count:
                packet.stream = copied
                output.mux(packet)
    return target


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "mpeg2video"])
@pytest.mark.parametrize("count", [3, 12, 15])
def test_frames_before_the_first_key_frame_are_kept_if_they_decode_and_else_missing(tmp_path, codec, count):
    """They were once dropped and not counted (FFmpeg#197 of ffvvc, spdl#1236)."""
    options = {
        "libx264": {"x264-params": "keyint=12:bframes=3:open-gop=1:scenecut=0"},
        "libx265": {"x265-params": "log-level=none:keyint=12:min-keyint=12:bframes=3:radl=2:open-gop=0:scenecut=0"},
    }.get(codec, {"g": "12", "bf": "2"})
    fps = 25 if codec == "mpeg2video" else 24  # MPEG-2 has few rates
    whole = write_clip(tmp_path / "whole.ts", codec=codec, options=options, fps=fps)
    path = without_first_packets(whole, tmp_path / "cut.ts", count)
    video = load_video(path, allow_partial=True)
    assert len(video) + video.missing == 48 - count
    if count != 12:  # where the file starts with a key frame, before which some codecs show nothing
        with pytest.raises(VideoReadError, match=f"{video.missing} of its frames are missing"):
            load_video(path)
    truth = decode_everything(whole).frames
    found = [next(i for i, true in enumerate(truth) if np.array_equal(true, frame)) for frame in
             video.frames.permute(0, 2, 3, 1).numpy()]  # fmt: skip
    assert found == list(range(48 - len(video), 48)), "the last ones, all of them intact"
    for number in (1, 3, 8):
        some = load_video(path, FrameSampling(num_frames=number), allow_partial=True)
        assert torch.equal(some.frames, video.frames[some.indices])
    if codec == "libx265" and count == 12:
        key = next(place for place, packet in enumerate(packets_of(path)) if packet[1])
        leading = sum(pts < packets_of(path)[key][0] for pts, _ in packets_of(path)[key:])
        assert leading == 2, "pictures that need nothing before the key frame"


def packets_of(path) -> list[tuple[int, bool]]:
    with av.open(str(path)) as container:
        return [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("starts", [(0, 0), (90000, 0), (0, 90000), (0, 7, 3), (200, 0)])
def test_joined_recordings_are_one_video(tmp_path, starts):
    """Their seams are marked as damaged, although all frames decode (ffmpegfs#89), and their clocks jump."""
    parts = [write_clip(tmp_path / f"{n}.ts", 24, first_frame=start) for n, start in enumerate(starts)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    video = load_video(path)
    assert (video.total_frames, video.missing) == (24 * len(starts), 0)
    np.testing.assert_allclose(video.timestamps, np.arange(24 * len(starts)) / 24, atol=1e-4)
    truth = np.concatenate([decode_everything(part).frames for part in parts])
    assert np.array_equal(video.frames.permute(0, 2, 3, 1).numpy(), truth)


def test_clocks_that_are_reset_go_on():
    times = [100, 110, 120, 5, 15, 25, 100000, 100010]
    offsets = clock_offsets(times, 10, 1000.0)
    assert (np.array(times) + offsets).tolist() == [100, 110, 120, 130, 140, 150, 160, 170]
    usual = [0, 40, 20, 30, 5000]  # reordered, and a gap of 5 seconds
    assert clock_offsets(usual, 10, 1000.0).tolist() == [0] * 5
    assert filled_times([None, None, 30, None, 50], 10) == [10, 20, 30, 40, 50]
    assert filled_times([None, None], 10) == [0, 10]


def write_avi(path, gap: int, codec: str = "libx264", options=None, num_frames: int = 20):
    """Frames at every `gap`-th of 600 places a second; the others stay empty."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, 600, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 600)
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            frame.pts, frame.time_base = index * gap, Fraction(1, 600)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("codec", "b_frames"), [("libx264", 0), ("libx264", 3), ("mpeg4", 0), ("mpeg4", 2)])
def test_times_of_avi_are_its_places(tmp_path, codec, b_frames):
    """An AVI file that announces 600 places a second was once played at 600 frames a second (rpicam-apps#391)."""
    path = write_avi(tmp_path / "places.avi", 20, codec, {"bf": str(b_frames), "g": "8"})
    video = load_video(path)
    np.testing.assert_allclose(video.timestamps, np.arange(20) / 30, atol=1e-6)
    assert video.fps == pytest.approx(30) and video.duration == pytest.approx(20 / 30)
    assert video_length(path) == (20, pytest.approx(30))
    some = load_video(path, FrameSampling(num_frames=3))
    assert torch.equal(some.frames, video.frames[[0, 9, 19]])


@pytest.mark.parametrize(("container", "codec"), [("h264", "libx264"), ("hevc", "libx265"), ("m2v", "mpeg2video")])
@pytest.mark.parametrize("fps", [5, 25, 30, 60])
def test_streams_without_times_have_their_own_rate(tmp_path, container, codec, fps):
    """They were all once read at 25 frames a second (picamera#500)."""
    if codec == "mpeg2video" and fps == 5:
        pytest.skip("MPEG-2 has no such rate")
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    video = load_video(write_clip(tmp_path / f"clip.{container}", 24, fps=fps, codec=codec, options=options))
    np.testing.assert_allclose(video.timestamps, np.arange(24) / fps, atol=1e-6)
    assert video.fps == pytest.approx(fps)


def test_a_webm_without_duration_names_the_back_end(tmp_path):
    """decord calls it broken; browsers record such files."""
    path = tmp_path / "live.webm"
    write_clip(path, 12, codec="libvpx-vp9", options={}, container_options={"live": "1"})
    assert load_video(path).total_frames == 12
    require("decord")
    with pytest.raises(VideoReadError, match="its header has no duration.* use the back end 'pyav'"):
        load_video(path, backend="decord")


def test_colours_of_interlaced_frames_are_those_of_their_fields(tmp_path):
    """Rows of one field must not take colours from the other: here one is red, the other blue."""
    rows = np.zeros((96, 128, 3), np.uint8)
    rows[::2], rows[1::2] = (255, 0, 0), (0, 0, 255)
    path = tmp_path / "fields.mp4"
    with av.open(str(path), "w") as container:
        params = {"x264-params": "interlaced=1:tff=1:qp=1"}
        stream = container.add_stream("libx264", rate=25, options=params)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        planes = [
            av.VideoFrame.from_ndarray(rows[k::2].copy(), format="rgb24").reformat(format="yuv420p") for k in (0, 1)
        ]
        woven = av.VideoFrame(128, 96, "yuv420p")
        for number, plane in enumerate(woven.planes):
            pixels = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            for k in (0, 1):
                field = np.frombuffer(planes[k].planes[number], np.uint8).reshape(
                    -1, planes[k].planes[number].line_size
                )
                pixels[k::2, : plane.width] = field[:, : plane.width]
        for index in range(6):
            woven.pts = index
            container.mux(stream.encode(woven))
        container.mux(stream.encode(None))
    frame = load_video(path, FrameSampling(num_frames=1)).frames[0].permute(1, 2, 0).numpy()
    assert np.abs(frame.astype(int) - rows).max() < 24
    for backend in ("decord", "torchcodec"):
        try:
            video_decoding.choose_backend(backend)
        except ImportError:
            continue
        with pytest.raises(VideoReadError, match=f"{backend} mixes the colours of its interlaced fields"):
            load_video(path, backend=backend)


# -- Damage


def test_missing_file(tmp_path):
    with pytest.raises(VideoReadError, match=r"nowhere\.mp4: no such file"):
        load_video(tmp_path / "nowhere.mp4")


@backends
@pytest.mark.parametrize(
    ("content", "cause"),
    [(b"", "the file is empty"), (b"hello world " * 100, "not a video|not MP4"), (bytes(range(256)) * 50, "not")],
    ids=["empty", "text", "noise"],
)
def test_files_that_are_no_videos(tmp_path, backend, content, cause):
    require(backend)
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoReadError, match=rf"broken\.mp4: .*({cause})"):
        load_video(path, EIGHT, backend=backend, allow_partial=True)


@backends
def test_audio_only(tmp_path, backend):
    require(backend)
    path = write_audio(tmp_path / "sound.m4a")
    with pytest.raises(VideoReadError, match=r"sound\.m4a: it holds no video"):
        load_video(path, EIGHT, backend=backend)


@backends
def test_mp4_without_its_index(clips, tmp_path, backend):
    require(backend)
    path = cut(clips("b_frames.mp4"), tmp_path / "half.mp4", 0.7)
    with pytest.raises(VideoReadError, match=r"half\.mp4: it is truncated: .*moov atom"):
        load_video(path, EIGHT, backend=backend, allow_partial=True)


@pytest.fixture(scope="session")
def damaged(tmp_path_factory, clips):
    """Path, the intact original, and how many frames PyAV can tell to be missing at least."""
    folder = tmp_path_factory.mktemp("damaged")
    early_index = write_clip(folder / "early_index.mp4", 120, container_options={"movflags": "faststart"})
    content = bytearray(early_index.read_bytes())
    middle = slice(len(content) // 2, len(content) * 11 // 20)
    content[middle] = np.random.default_rng(1).bytes(middle.stop - middle.start)
    (folder / "scrambled.mp4").write_bytes(content)
    return {
        "cut.mp4": (cut(early_index, folder / "cut.mp4", 0.6), early_index, 40),
        "cut.mkv": (cut(clips("b_frames.mkv"), folder / "cut.mkv", 0.6), clips("b_frames.mkv"), 15),
        "cut.ts": (cut(clips("b_frames.ts"), folder / "cut.ts", 0.6), clips("b_frames.ts"), 1),
        "cut.avi": (cut(clips("b_frames.avi"), folder / "cut.avi", 0.6), clips("b_frames.avi"), 1),
        "cut_fragment.mp4": (cut(clips("fragmented.mp4"), folder / "cut_f.mp4", 0.6), clips("fragmented.mp4"), 1),
        "scrambled.mp4": (folder / "scrambled.mp4", early_index, 1),
    }


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.ts", "cut.avi", "cut_fragment.mp4", "scrambled.mp4"])
def test_damage_is_an_error_or_named_and_never_made_up(damaged, name, caplog):
    path, intact, at_least = damaged[name]
    with pytest.raises(
        VideoReadError, match=rf"{path.name}: it is damaged or truncated, \d+ of its frames are missing"
    ):
        load_video(path, backend="pyav")
    with caplog.at_level(logging.WARNING):
        video = load_video(path, backend="pyav", allow_partial=True)
    assert video.missing >= at_least
    assert f"{video.missing} of its frames are missing" in caplog.text and path.name in caplog.text
    truth = decode_everything(intact)
    for frame in video.frames.permute(0, 2, 3, 1).numpy():
        assert any(np.array_equal(frame, true) for true in truth.frames), "a frame that the intact file does not have"
    assert len(video) > 10 and torch.all(video.timestamps.diff() > 0)


def test_sampling_a_damaged_clip_keeps_its_promise(damaged):
    path = damaged["cut.mp4"][0]
    video = load_video(path, EIGHT, backend="pyav", allow_partial=True)
    assert len(video) == 8 and video.indices[-1] == video.total_frames - 1


def test_decord_refuses_damaged_files(damaged):
    require("decord")
    for name in ("cut.mp4", "cut_fragment.mp4", "scrambled.mp4"):
        with pytest.raises(VideoReadError):
            load_video(damaged[name][0], backend="decord")


def test_decord_running_out_of_patience_is_not_called_damage(clips, monkeypatch):
    """On a busy machine decord gives up on the last frames of good files."""
    decord = pytest.importorskip("decord")

    def impatient(self):
        raise decord.DECORDError("Unable to handle EOF because it takes too long ... `DECORD_EOF_RETRY_MAX=10240`")

    monkeypatch.setattr(decord.VideoReader, "next", impatient)
    with pytest.raises(VideoReadError, match="gave up waiting .* set the environment variable"):
        load_video(clips("b_frames.mp4"), EIGHT, backend="decord", allow_partial=True)


def test_the_error_crosses_process_borders():
    error = pickle.loads(pickle.dumps(VideoReadError("clip.mp4", "it is empty")))
    assert isinstance(error, ValueError)
    assert (error.source, error.cause) == ("clip.mp4", "it is empty")
    assert str(error) == "cannot read video clip.mp4: it is empty"


# -- Back ends


def break_torchcodec(monkeypatch, error: Exception | None) -> None:
    """Importing torchcodec raises `error`, or works."""

    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise error

    decoders = types.SimpleNamespace(VideoDecoder=object) if error is None else Broken("torchcodec.decoders")
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)


def test_auto_prefers_pyav_and_falls_back(monkeypatch):
    break_torchcodec(monkeypatch, ImportError("no such module"))
    assert video_decoding.choose_backend("auto") == "pyav"
    monkeypatch.setattr(video_decoding, "av", None)
    monkeypatch.setattr(video_decoding, "decord", object())
    assert video_decoding.choose_backend("auto") == "decord"
    with pytest.raises(ImportError, match="'pyav' needs the package 'av': pip install av"):
        video_decoding.choose_backend("pyav")
    monkeypatch.setattr(video_decoding, "decord", None)
    with pytest.raises(ImportError, match="pip install av"):
        video_decoding.choose_backend("auto")
    break_torchcodec(monkeypatch, None)
    assert video_decoding.choose_backend("auto") == "torchcodec"
    with pytest.raises(ValueError, match="'ffmpeg' is not one of auto, pyav, decord, torchcodec"):
        video_decoding.choose_backend("ffmpeg")


def test_a_broken_torchcodec_is_reported_in_one_line(monkeypatch):
    cause = "Could not load libtorchcodec. Likely causes:\n  1. FFmpeg is missing\n" + "  traceback\n" * 300
    break_torchcodec(monkeypatch, RuntimeError(cause))
    with pytest.raises(ImportError, match="'torchcodec' cannot be imported: Could not load libtorchcodec") as raised:
        video_decoding.choose_backend("torchcodec")
    assert "\n" not in str(raised.value)
    assert video_decoding.choose_backend("auto") == "pyav", "PyAV stays the default"


@pytest.mark.parametrize("name", ["auto", "pyav"])
@pytest.mark.parametrize("version", ["14.4.0", "15.1.0", "16.0.1"])
def test_a_pyav_with_wrong_colours_is_refused(monkeypatch, name, version):
    """PyAV before 17 converts BT.709 with other coefficients, and 14 crashes (PyAV#2230, #2149)."""
    monkeypatch.setattr(video_decoding, "_AV_MAJOR", int(version.split(".")[0]))
    monkeypatch.setattr(video_decoding.av, "__version__", version)
    with pytest.raises(ImportError, match=rf"needs PyAV>=17, but {version} is installed: pip install .*'av>=17'"):
        video_decoding.choose_backend(name)


@backends
def test_bytes_and_file_objects_read_like_files(clips, backend):
    require(backend)
    path = clips("b_frames.mp4")
    expected = load_video(path, EIGHT, backend=backend)
    content = path.read_bytes()
    with path.open("rb") as file:
        for source in (content, io.BytesIO(content), bytearray(content), file):
            video = load_video(source, EIGHT, backend=backend, num_threads=2)
            assert torch.equal(video.frames, expected.frames) and torch.equal(video.timestamps, expected.timestamps)


# -- Processes and memory


class Clips(Dataset):
    def __init__(self, path, backend):
        self.path, self.backend = path, backend

    def __len__(self):
        return 6

    def __getitem__(self, index):
        video = load_video(self.path, FrameSampling(num_frames=index + 1), backend=self.backend, size=32)
        return video.frames, video.indices


@backends
def test_workers_forked_after_decoding_do_not_hang(clips, backend):
    require(backend)
    dataset = Clips(clips("b_frames.mp4"), backend)
    expected = [dataset[index] for index in range(len(dataset))]  # the parent has decoded, threads and all
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=30, persistent_workers=False
    )
    for (frames, indices), (true_frames, true_indices) in zip(loader, expected, strict=True):
        assert torch.equal(frames, true_frames) and torch.equal(indices, true_indices)


@backends
def test_memory_is_flat(tmp_path, backend):
    """decord is known to grow with every reader (dmlc/decord#208): 300 loads, each of which decodes 9 MB of frames."""
    require(backend)
    resource = pytest.importorskip("resource")
    path = write_clip(tmp_path / "clip.mp4", 12, width=640, height=400)

    def load(times: int) -> float:
        for _ in range(times):
            load_video(path, EIGHT, backend=backend, size=64, num_threads=2)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB on Linux, the highest so far

    before = load(100)
    assert load(200) - before < 20


def test_memory_of_turned_clips_is_flat(clips, tmp_path):
    """PyAV's side data, which hold the display matrix, keep a frame alive until Python looks for cycles."""
    resource = pytest.importorskip("resource")
    path = write_clip(tmp_path / "clip.mp4", 12, width=640, height=400)
    path = with_matrix(path, tmp_path / "turned.mp4", -1, 0, 0, 1)

    def load(times: int) -> float:
        for _ in range(times):
            load_video(path, EIGHT, backend="pyav", size=64, num_threads=2)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = load(50)
    assert load(100) - before < 20


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_files_are_closed_again_damaged_ones_too(damaged, clips, tmp_path, backend):
    require(backend)
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts open files in /proc")
    text = tmp_path / "text.mp4"
    text.write_bytes(b"no video " * 99)
    paths = [clips("b_frames.mp4"), text, *(path for path, _, _ in damaged.values())]

    def load() -> int:
        for path in paths:
            try:
                load_video(path, EIGHT, backend=backend, allow_partial=True)
            except VideoReadError:
                pass
        return len(os.listdir("/proc/self/fd"))

    before = load()
    assert max(load() for _ in range(10)) <= before


def test_picture_tells_indices_apart():
    """The clips only prove something if no two of their frames are alike."""
    assert len({picture(index).tobytes() for index in range(240)}) == 240
