"""Decoding: every frame is the right one with its real time, damage is told, memory is flat, workers do not hang."""

import io
import logging
import pickle

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from video_clips import cut, decode_everything, hide_first_frames, picture, write_audio, write_clip

from llava_next_ar.processing import video_decoding
from llava_next_ar.processing.video_decoding import PyAVReader, VideoReadError
from llava_next_ar.processing.video_frames import FrameSampling, load_video

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

backends = pytest.mark.parametrize("backend", ["pyav", "decord"])


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
    pytest.importorskip({"pyav": "av", "decord": "decord"}[backend])


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
def test_decord_gives_the_same_frames(clips, name):
    require("decord")
    truth = decode_everything(clips(name))
    for num_frames in (1, 2, 7, 48):
        assert_true_frames(load_video(clips(name), FrameSampling(num_frames=num_frames), backend="decord"), truth)


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
    video = load_video(path, backend=backend)
    assert video.total_frames == 43
    assert np.array_equal(video.frames.permute(0, 2, 3, 1).numpy(), original.frames[5:])


def test_times_are_those_of_the_container_not_of_a_constant_rate(clips):
    video = load_video(clips("variable_rate.mp4"), EIGHT)
    expected = (np.array(MILLISECONDS) - MILLISECONDS[0])[video.indices] / 1000
    np.testing.assert_allclose(video.timestamps, expected, atol=1e-6)
    assert np.ptp(np.diff(video.timestamps)) > 0.05, "the clip has no variable rate: the test says nothing"
    assert video.timestamps.dtype == torch.float64
    span = (MILLISECONDS[-1] - MILLISECONDS[0]) / 1000
    assert video.fps == pytest.approx(47 / span, rel=0.02), "the average, not the rate that the encoder was told"
    assert video.duration == pytest.approx(span + 1 / video.fps, abs=1e-6)


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


def test_auto_prefers_pyav_and_falls_back(monkeypatch):
    assert video_decoding.choose_backend("auto") == "pyav"
    monkeypatch.setattr(video_decoding, "av", None)
    monkeypatch.setattr(video_decoding, "decord", object())
    assert video_decoding.choose_backend("auto") == "decord"
    with pytest.raises(ImportError, match="'pyav' needs the package 'av': pip install av"):
        video_decoding.choose_backend("pyav")
    monkeypatch.setattr(video_decoding, "decord", None)
    with pytest.raises(ImportError, match="pip install av"):
        video_decoding.choose_backend("auto")
    with pytest.raises(ValueError, match="'ffmpeg' is not one of auto, pyav, decord"):
        video_decoding.choose_backend("ffmpeg")


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


def test_picture_tells_indices_apart():
    """The clips only prove something if no two of their frames are alike."""
    assert len({picture(index).tobytes() for index in range(240)}) == 240
