"""Sampling policy `codec`: the frames on which the codec spent most, of every container, back end and option."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from tiny import tiny_model
from tiny_processor import tiny_processor

from llava_next_ar.processing import video_decoding
from llava_next_ar.processing.frame_sampling import FrameSampling
from llava_next_ar.processing.other_decoders import DecordReader, checked_reader
from llava_next_ar.processing.video_frames import load_video, video_times
from llava_next_ar.processing.video_processing_llava_next_ar import LlavaNextARVideoProcessor
from llava_next_ar.processing.video_reader import coding_costs
from llava_next_ar.training.data import LlavaVideoDataset

NUM_FRAMES, CUT = 40, 21
SIZE = {"height": 28, "width": 28}
FIXED = "keyint=8:min-keyint=8:scenecut=0:bframes=0"  # key frames at 0, 8, 16, 24, 32
ADAPTIVE = "keyint=16:min-keyint=1:scenecut=40:bframes=0"  # key frames at 0, 16 and at the cut


def scene(index: int) -> np.ndarray:
    """A texture that drifts slowly, and another one from frame `CUT` on: `[64, 96, 3]` uint8."""
    rng = np.random.default_rng(int(index >= CUT))
    coarse = np.kron(rng.integers(0, 255, (8, 14, 3)), np.ones((8, 8, 1)))
    return np.roll(coarse, index // 2, axis=1)[:, 8:104].astype(np.uint8)


def write_scenes(
    path: Path, x264: str = FIXED, *, codec: str = "libx264", milliseconds: np.ndarray | None = None
) -> Path:
    options = {"preset": "veryfast", "qp": "20", "x264-params": x264} if codec == "libx264" else {"b": "400k"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(scene(index), format="rgb24")
            frame.pts = index if milliseconds is None else int(milliseconds[index])
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def chosen(source, num_frames: int = 2, **options) -> list[int]:
    return load_video(source, FrameSampling(policy="codec", num_frames=num_frames, **options)).indices.tolist()


# -- Costs


def test_costs_are_relative_to_frames_of_the_same_picture_type():
    # Decoding order I P B B P B B I P B; shown 0 3 1 2 6 4 5 7 9 8.
    sizes = np.array([900, 200, 20, 40, 400, 80, 20, 1800, 200, 40])
    is_key = np.array([1, 0, 0, 0, 0, 0, 0, 1, 0, 0], dtype=bool)
    times = np.array([0, 3, 1, 2, 6, 4, 5, 7, 9, 8])
    # Medians 900, 300 and 40, mean 125. With two key frames, nothing shows that the second came at a regular distance.
    expected = [1, 325 / 425, 145 / 165, 1, 525 / 425, 205 / 165, 145 / 165, 1925 / 425, 325 / 425, 1]
    assert coding_costs(sizes, is_key, times) == pytest.approx(expected)
    twice, later = np.tile(sizes[:7], 3), np.concatenate([times[:7] + 7 * group for group in range(3)])
    regular = coding_costs(twice * np.repeat([1, 2, 3], 7), np.tile(is_key[:7], 3), later)
    mean = (760 * (1 + 2 + 3)) / 18
    assert regular[[0, 7, 14]] == pytest.approx([(own + mean) / (1800 + mean) for own in (900, 1800, 2700)])


def test_a_key_frame_before_its_time_is_compared_with_predicted_frames():
    is_key = np.zeros(30, dtype=bool)
    is_key[[0, 10, 14, 24]] = True  # distances 10, 4, 10
    sizes = np.where(is_key, 1000, 100)
    costs = coding_costs(sizes, is_key, np.arange(30))
    assert costs[14] == pytest.approx(1100 / 200) and costs[[0, 10, 24]] == pytest.approx(1)
    assert np.delete(costs, 14) == pytest.approx(1)


def test_costs_without_key_frames_and_of_key_frames_alone():
    assert coding_costs(np.array([3, 1, 2]), np.zeros(3, dtype=bool), np.arange(3)) == pytest.approx([1.25, 0.75, 1])
    assert coding_costs(np.array([3, 1, 2]), np.ones(3, dtype=bool), np.arange(3)) is None


# -- The policy


def test_the_first_frame_and_the_most_expensive_ones_in_order_of_time():
    costs = np.array([9.0, 1, 3, 2, 3, 1])
    select = FrameSampling(policy="codec", num_frames=3).select
    assert select(6, costs=costs).indices.tolist() == [0, 2, 4]
    assert FrameSampling(policy="codec", num_frames=2).select(6, costs=costs).indices.tolist() == [0, 2]  # the earlier
    assert FrameSampling(policy="codec", num_frames=1).select(6, costs=costs).indices.tolist() == [0]
    assert select(2, costs=costs[:2]).indices.tolist() == [0, 1]
    part = FrameSampling(policy="codec", num_frames=2, video_start=0.3, video_end=0.5)
    assert part.select(6, 10.0, costs=costs).indices.tolist() == [3, 4]
    with pytest.raises(ValueError, match="policy 'codec' needs the bytes of each coded frame"):
        select(6, 10.0)
    with pytest.raises(ValueError, match="num_frames=3 is more than the 2 frames"):
        FrameSampling(policy="codec", num_frames=3, short_clip="error").select(2, costs=costs[:2])


@pytest.mark.parametrize(
    "x264",
    [FIXED, ADAPTIVE, "keyint=250:scenecut=0:bframes=0", "keyint=250:bframes=0", "keyint=12:open-gop=1:bframes=3"],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi", "a.h264", "a.mov"])
def test_a_cut_is_found_wherever_key_frames_lie(tmp_path, name, x264):
    """Without regard to the type of a frame, the regular key frames would come first."""
    assert chosen(write_scenes(tmp_path / name, x264)) == [0, CUT]


@pytest.mark.parametrize(
    ("name", "codec"), [("a.webm", "libvpx-vp9"), ("a.webm", "libvpx"), ("a.avi", "mpeg4"), ("a.mpg", "mpeg2video")]
)
def test_a_cut_is_found_in_other_codecs(tmp_path, name, codec):
    assert chosen(write_scenes(tmp_path / name, codec=codec)) == [0, CUT]


@pytest.mark.parametrize("x264", ["bframes=2:keyint=8:scenecut=0", "bframes=3:b-adapt=0", "bframes=2:b-pyramid=none"])
def test_costs_of_reordered_frames_are_the_same_in_every_container(tmp_path, x264):
    """Raw streams and AVI are decoded to find out which packet is which frame; the others are not decoded.

    The first frame coded after the cut may be shown some frames later, and those before it rest on it.
    """
    costs = {}
    for name in ("a.mp4", "a.mkv", "a.mov", "a.ts", "a.avi", "a.h264"):
        path = write_scenes(tmp_path / name, x264)
        *_, own = video_times(path)
        assert len(own) == NUM_FRAMES and CUT <= chosen(path)[1] <= CUT + 3
        costs[name] = own[1:]  # the first packet may carry headers
    for name, own in costs.items():
        assert own.argmax() == costs["a.mp4"].argmax(), name
        if name in ("a.mkv", "a.mov"):
            assert own == pytest.approx(costs["a.mp4"])
        else:  # start codes add some bytes to each packet
            assert np.corrcoef(own, costs["a.mp4"])[0, 1] > 0.99, name


def test_the_rate_of_frames_may_vary(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(1, 9, NUM_FRAMES))
    path = write_scenes(tmp_path / "uneven.mkv", milliseconds=times)
    video = load_video(path, FrameSampling(policy="codec", num_frames=2))
    assert video.indices.tolist() == [0, CUT]
    assert video.timestamps[1] == pytest.approx((times[CUT] - times[0]) / 10, abs=2e-3)


def test_the_stream_that_is_read_is_the_one_that_counts(tmp_path):
    """A second, smaller stream, whose scene changes elsewhere, plays no part."""
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = []
        for width in (96, 48):
            stream = container.add_stream("libx264", rate=10, options={"qp": "20", "x264-params": "bframes=0"})
            stream.width, stream.height, stream.pix_fmt = width, 64, "yuv420p"
            streams.append(stream)
        for index in range(NUM_FRAMES):
            for stream, place in zip(streams, (index, index + 10), strict=True):
                pixels = np.ascontiguousarray(scene(place)[:, : stream.width])
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = index
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    assert chosen(tmp_path / "two.mkv") == [0, CUT]


# -- Back ends and sources without packets


def test_decord_takes_the_costs_from_the_pass_of_pyav(tmp_path):
    path = write_scenes(tmp_path / "a.mp4")
    sampling = FrameSampling(policy="codec", num_frames=3)
    assert torch.equal(load_video(path, sampling, backend="decord").indices, load_video(path, sampling).indices)


def test_decord_without_pyav_has_no_costs(tmp_path, monkeypatch):
    path = write_scenes(tmp_path / "a.mp4")
    monkeypatch.setitem(video_decoding.FILE_READERS, "decord", checked_reader(DecordReader, None))
    with pytest.raises(ValueError, match="policy 'codec' needs .* PyAV reads"):
        load_video(path, FrameSampling(policy="codec", num_frames=2), backend="decord")


def test_sources_without_predicted_frames_are_an_error(tmp_path):
    frames = np.stack([scene(index) for index in range(4)])
    sampling = FrameSampling(policy="codec", num_frames=2)
    for source in (frames, list(frames), write_scenes(tmp_path / "a.avi", codec="mjpeg")):
        with pytest.raises(ValueError, match="policy 'codec' needs the bytes of each coded frame"):
            load_video(source, sampling)
    with pytest.raises(ValueError, match="policy 'codec' needs"):
        LlavaNextARVideoProcessor(size=SIZE, sampling="codec", num_frames=2)(frames, return_tensors="pt")


# -- Options of a processor, a call, a part and an entry


def test_options_of_the_processor_and_of_a_call(tmp_path):
    path = write_scenes(tmp_path / "a.mp4")

    def indices(processor, **options) -> list[int]:
        batch = processor(path, return_tensors="pt", return_metadata=True, **options)
        return batch["video_metadata"][0].frames_indices

    stored = LlavaNextARVideoProcessor(size=SIZE, sampling="codec", num_frames=2)
    assert indices(stored) == [0, CUT]
    assert indices(LlavaNextARVideoProcessor(size=SIZE), sampling="codec", num_frames=2) == [0, CUT]
    assert len(indices(stored, num_frames=5)) == 5 and CUT in indices(stored, num_frames=5)
    assert indices(stored, sampling="uniform") == [0, NUM_FRAMES - 1]
    stored.save_pretrained(tmp_path / "saved")
    assert indices(LlavaNextARVideoProcessor.from_pretrained(tmp_path / "saved")) == [0, CUT]
    with pytest.raises(ValueError, match="fps=2 has no effect with policy='codec'"):
        indices(stored, sampling="codec", fps=2)


def test_options_of_a_part_and_of_an_entry_with_their_lengths(tmp_path):
    write_scenes(tmp_path / "a.mp4")
    processor = tiny_processor(tiny_model().config, num_frames=4)
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    part = {"type": "video", "path": "a.mp4", "sampling": "codec", "num_frames": 2}
    message = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
    entries = [
        {"video": "a.mp4", "conversations": turns, "sampling": "codec", "num_frames": 2},
        {"messages": [message, {"role": "assistant", "content": "A square."}]},
    ]
    data = LlavaVideoDataset(entries, processor, video_root=tmp_path)
    for sample in (data[0], data[1]):
        assert sample["video_timestamps"][0].tolist() == pytest.approx([0, CUT / 10])
    assert data.lengths() == [len(data[0]["input_ids"]), len(data[1]["input_ids"])]
    limited = LlavaVideoDataset(
        [{"video": "a.mp4", "conversations": turns, "max_frames": 2}],
        processor,
        video_root=tmp_path,
        processor_kwargs={"sampling": "codec"},
    )
    assert limited[0]["video_timestamps"][0].tolist() == pytest.approx([0, CUT / 10])
