"""Sources of every kind, resizing, several scales, and the loader of the prototype's guide."""

import functools
import http.server
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_data import pillow_tolerance
from PIL import Image
from safetensors.torch import load_file
from video_clips import picture, write_clip

from llava_next_ar.configuration.frame_token_layout import pool_patches
from llava_next_ar.processing.video_frames import (
    FrameSampling,
    MultiScaleVideoFrameLoader,
    VideoReadError,
    load_video,
    resize_frames,
)

GOLDEN = Path(os.environ.get("LLAVA_NEXT_AR_GOLDEN", Path(__file__).parents[1] / "golden"))
FOUR = FrameSampling(num_frames=4)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("frames") / "clip.mp4", 30, fps=10)


@pytest.fixture(scope="session")
def pictures():
    return np.stack([picture(index) for index in range(10)])  # [10, 96, 128, 3]


# -- load_video


def test_what_a_video_holds(clip):
    video = load_video(clip, FOUR, size=(48, 64))
    assert video.frames.dtype == torch.uint8 and video.frames.shape == (4, 3, 48, 64)
    assert video.indices.tolist() == [0, 9, 19, 29]
    np.testing.assert_allclose(video.timestamps, [0, 0.9, 1.9, 2.9], atol=1e-9)
    assert (video.fps, video.total_frames, video.missing, video.frame_types) == (10.0, 30, 0, None)
    assert video.duration == pytest.approx(3.0)
    assert repr(video) == f"VideoFrames('{clip}': frames [4, 3, 48, 64], 3.00 s at 10.00 fps, 30 frames, 0 missing)"
    assert len(video) == 4


def test_frame_types_come_along(clip):
    sampling = FrameSampling(policy="fast_slow", num_fast=2, num_slow=3, slow_stride=4)
    video = load_video(clip, sampling)
    assert video.indices.tolist() == [0, 12, 28, 29] and video.frame_types == (0, 0, 0, 1)


def test_policies_that_repeat_frames(clip):
    video = load_video(clip, FrameSampling(policy="llava_video", fps=1, max_frames=64, force_sample=True), size=16)
    assert len(video) == 64 and len(set(video.indices.tolist())) == 30
    every = load_video(clip, size=16)
    assert torch.equal(video.frames, every.frames[video.indices])


def test_resizing_while_decoding_is_resizing_afterwards(clip):
    full = load_video(clip, FOUR)
    small = load_video(clip, FOUR, size=(40, 56), other_sizes=[24, (10, 20)], resize_backend="pil", num_threads=2)
    for frames, size in zip((small.frames, *small.other_scales), [(40, 56), (24, 24), (10, 20)], strict=True):
        assert torch.equal(frames, resize_frames(full.frames, size, backend="pil"))


def test_num_frames_beyond_the_video_is_refused(clip):
    with pytest.raises(ValueError, match="num_frames=31 is more than the 30 frames"):
        load_video(clip, FrameSampling(policy="num_frames", num_frames=31))


# -- Sources


def test_urls(clip):
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path == "/cut.mp4":  # a server that hangs up in the middle
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                self.wfile.write(b"x" * 1000)
            elif self.path == "/odd_length.mp4":
                self.send_response(200)
                self.send_header("Content-Length", "many")
                self.end_headers()
            elif self.path == "/no_http.mp4":
                self.wfile.write(b"Good morning!\r\n\r\n")
            else:
                super().do_GET()

    handler = functools.partial(Silent, directory=str(clip.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        expected = load_video(clip, FOUR)
        for url in (f"{base}/{clip.name}", clip.as_uri()):
            video = load_video(url, FOUR)
            assert torch.equal(video.frames, expected.frames) and video.source == url
        for name, cause in (
            ("nothing.mp4", "failed: .*404"),
            ("cut.mp4", "stopped after 1000 of 100000 bytes"),
            ("odd_length.mp4", "failed: .*'many'"),
            ("no_http.mp4", "failed: Good morning!"),  # http.client.BadStatusLine is not an OSError
            ("a b.mp4", "failed: URL can't contain control characters"),
        ):
            with pytest.raises(VideoReadError, match=f"{base}/{name}: download {cause}"):
                load_video(f"{base}/{name}")
        server.shutdown()


def test_what_cannot_be_a_url_is_named():
    with pytest.raises(VideoReadError, match=r"cannot read video http://\[::1: download failed: .*IPv6"):
        load_video("http://[::1")


def test_arrays_of_any_layout(pictures):
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2)[[0, 3, 6, 9]]
    sources = {
        "T H W C": pictures,
        "T C H W": pictures.transpose(0, 3, 1, 2),
        "tensor": torch.from_numpy(pictures).permute(0, 3, 1, 2),
        "float": pictures.astype(np.float32) / 255,
        "int64": torch.from_numpy(pictures).long(),
        "uint16": torch.from_numpy(pictures.astype(np.uint16)),
        "big endian": pictures.astype(">u4"),
        "mixed": [pictures[0] / 255, Image.fromarray(pictures[1]), *pictures[2:4], *(pictures[4:] / np.float32(255))],
        "arrays": list(pictures),
        "images": [Image.fromarray(frame) for frame in pictures],
    }
    for name, source in sources.items():
        video = load_video(source, FOUR, fps=4)
        assert torch.equal(video.frames, expected), name
        assert video.timestamps.tolist() == [0, 0.75, 1.5, 2.25] and video.duration == 2.5, name


def test_frames_without_times_are_half_a_second_apart(pictures):
    assert load_video(pictures, FOUR).timestamps.tolist() == [0, 1.5, 3, 4.5]


def test_grey_and_transparent_frames():
    grey = np.arange(30, dtype=np.uint8).reshape(2, 3, 5)
    for source in (grey[..., None], grey[:, None], list(grey), [Image.fromarray(frame) for frame in grey]):
        frames = load_video(source).frames
        assert all(np.array_equal(frames[:, channel], grey) for channel in range(3))
    clear = np.zeros((1, 2, 2, 4), np.uint8)
    clear[0, 0, 0] = (10, 20, 30, 255)
    clear[0, 1, 1] = (0, 0, 0, 51)  # a fifth black
    for source in (clear, clear.transpose(0, 3, 1, 2), [Image.fromarray(clear[0])], clear / 255.0):
        frame = load_video(source).frames[0]
        assert frame[:, 0, 0].tolist() == [10, 20, 30]
        assert frame[:, 0, 1].tolist() == [255, 255, 255] and frame[:, 1, 1].tolist() == [204, 204, 204]


def test_folders_and_lists_of_images_in_the_order_people_count(pictures, tmp_path):
    for index, frame in enumerate(pictures):
        Image.fromarray(frame).save(tmp_path / f"frame_{index + 1}.png")
    (tmp_path / "notes.txt").write_text("no image")
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    assert torch.equal(load_video(tmp_path).frames, expected)
    paths = [str(tmp_path / f"frame_{number}.png") for number in (3, 1)]
    assert torch.equal(load_video(paths).frames, expected[[2, 0]])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], VideoReadError, "<list of frames>: it holds no frames"),
        (np.zeros((0, 4, 4, 3), np.uint8), VideoReadError, "<array>: it holds no frames"),
        (np.zeros((4, 4, 3), np.uint8), ValueError, r"\[T, H, W, C\] or \[T, C, H, W\], got shape \(4, 4, 3\)"),
        (np.zeros((2, 5, 6, 7), np.uint8), ValueError, r"1, 3 or 4 channels C, got shape \(2, 5, 6, 7\)"),
        (np.zeros((3, 8, 6, 7), np.uint8), ValueError, r"got shape \(3, 8, 6, 7\); a video \[C, T, H, W\] needs"),
        (np.zeros((8, 6, 7), np.uint8), ValueError, r"\[T, H, W, C\] or \[T, C, H, W\], got shape \(8, 6, 7\)"),
        ([np.zeros((8, 6, 7), np.uint8)], ValueError, r"frame 0: .*got shape \(8, 6, 7\); a grey video \[T, H, W\]"),
        (np.full((1, 2, 2, 3), 200.0), ValueError, r"float64 frames must lie in \[0, 1\], got \[200, 200\]"),
        (np.full((1, 2, 2, 3), np.nan), ValueError, r"must lie in \[0, 1\]"),
        (np.full((1, 2, 2, 3), 300), ValueError, r"int64 frames must lie in \[0, 255\], got \[300, 300\]"),
        (np.full((1, 2, 2, 3), -0.5), ValueError, r"float64 frames must lie in \[0, 1\], got \[-0.5, -0.5\]"),
        (np.full((1, 2, 2, 3), 300, np.uint16), ValueError, r"uint16 frames must .*divide 16-bit values by 257"),
        (torch.full((1, 2, 2, 3), 300, dtype=torch.uint16), ValueError, r"uint16 frames must lie in \[0, 255\]"),
        (np.zeros((1, 2, 2, 3), bool), ValueError, "integers from 0 to 255 or floats, got bool"),
        ([3], TypeError, "frame 0 is a int"),
        (42, TypeError, "a video is a path, URL, .* not int"),
        (["/nowhere/1.png"], VideoReadError, r"frame 0 \(/nowhere/1.png\)"),
    ],
)
def test_sources_that_are_none(source, error, message):
    with pytest.raises(error, match=message):
        load_video(source)


def test_folder_without_images(tmp_path):
    with pytest.raises(VideoReadError, match="the folder holds no images"):
        load_video(tmp_path)


def test_frames_of_different_size_need_a_size(pictures):
    frames = [pictures[0], pictures[1][:50]]
    with pytest.raises(VideoReadError, match="its frames differ in size .*96x128 and 50x128.* give a size"):
        load_video(frames)
    assert load_video(frames, size=20).frames.shape == (2, 3, 20, 20)


def test_arguments_out_of_range(pictures):
    for arguments, message in [
        ({"fps": 0}, "fps must be a finite number above 0, got 0"),
        ({"fps": float("nan")}, "fps must be a finite number above 0, got nan"),
        ({"fps": float("inf")}, "fps must be a finite number above 0, got inf"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
        ({"size": (0, 4)}, r"size must be .* got \(0, 4\)"),
        ({"size": 8, "resample": "nearest"}, "resample='nearest' is not one of bicubic, bilinear"),
        ({"size": 8, "resize_backend": "cv2"}, "resize backend 'cv2' is not one of torch, pil"),
        ({"backend": "ffmpeg"}, "video backend 'ffmpeg' is not one of auto, pyav, decord, torchcodec"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_video(pictures, **arguments)


# -- Resizing


def normalised(frames: torch.Tensor) -> torch.Tensor:
    return (frames.double() / 255 - 0.5) / 0.5


@pytest.mark.parametrize("case", json.loads((GOLDEN / "preprocess.json").read_text())["cases"], ids=lambda c: c["id"])
def test_pixels_of_the_original_preprocessing(case):
    tensors = load_file(GOLDEN / "preprocess.safetensors")
    name = case["id"]
    frames = tensors[f"{name}/uint8_thwc"] if case["kind"] == "video" else tensors[f"{name}/uint8_hwc"][None]
    frames = frames.permute(0, 3, 1, 2)
    expected = tensors[f"{name}/pixel_values"].double()
    exact = resize_frames(frames, case["size"], backend="pil")
    torch.testing.assert_close(normalised(exact), expected, rtol=0, atol=pillow_tolerance() + 1e-6)
    near = resize_frames(frames, case["size"], backend="torch")
    assert (normalised(near) - expected).abs().max() <= 2 * 2 / 255 + 1e-6, "more than 2 of 255"


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(384, 384), (31, 50), (96, 64), (200, 100)])
def test_torch_differs_from_pillow_by_at_most_two(size, resample):
    noise = np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), dtype=np.uint8)
    edges = np.where(np.indices((96, 128)).sum(0)[None, ..., None] // 7 % 2, 255, 0).astype(np.uint8).repeat(3, -1)
    frames = torch.from_numpy(np.concatenate([noise, edges, picture(3)[None]])).permute(0, 3, 1, 2)
    near = resize_frames(frames, size, resample=resample).int()
    for frame, resized in zip(frames, near, strict=True):
        image = Image.fromarray(frame.permute(1, 2, 0).numpy())
        image = image.resize(size[::-1], Image.Resampling[resample.upper()])
        difference = (resized - torch.from_numpy(np.array(image)).permute(2, 0, 1).int()).abs()
        assert difference.max() <= 2
        assert (difference > 0).double().mean() < 0.05
        assert torch.equal(
            resize_frames(frame[None], size, resample=resample, backend="pil")[0].permute(1, 2, 0),
            torch.from_numpy(np.array(image)),
        )


def test_resizing_does_not_depend_on_memory_format_or_neighbours(pictures):
    frames = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    together = resize_frames(frames, 50)
    assert torch.equal(together, resize_frames(frames.contiguous(), 50))
    assert torch.equal(together[7], resize_frames(frames[7:8], 50)[0])
    assert resize_frames(frames, (96, 128)) is frames
    with pytest.raises(ValueError, match=r"\[T, 3, H, W\] uint8, got \[10, 3, 96, 128\] torch.float32"):
        resize_frames(frames.float(), 50)


# -- The loader


def test_loader_at_one_scale(clip):
    frames = MultiScaleVideoFrameLoader().load_video_frames(
        str(clip), max_frames=4, sample_rate=3, target_size=(32, 48)
    )
    assert frames.dtype == torch.float32 and frames.shape == (4, 3, 32, 48)
    expected = load_video(clip, size=(32, 48)).frames[[0, 9, 18, 27]]
    torch.testing.assert_close(frames, expected / 255)
    assert 0 <= frames.min() and frames.max() <= 1 and frames.max() > 0.5


def test_loader_at_several_scales_decodes_once(clip, monkeypatch):
    from llava_next_ar.processing.video_decoding import PyAVReader

    reads = []
    original = PyAVReader.read
    monkeypatch.setattr(PyAVReader, "read", lambda self, *args: reads.append(args) or original(self, *args))
    loader = MultiScaleVideoFrameLoader(backend="pyav", resize_backend="pil")
    scales = loader.load_video_frames(
        clip, max_frames=5, target_size=(40, 56), enable_multiscale=True, scale_factors=[1.0, 0.75, 0.5]
    )
    assert [tuple(scale.shape) for scale in scales] == [(5, 3, 40, 56), (5, 3, 30, 42), (5, 3, 20, 28)]
    assert len(reads) == 1
    full = load_video(clip, FrameSampling(policy="every_nth", sample_rate=1, max_frames=5)).frames
    for scale in scales:
        assert torch.equal(scale, resize_frames(full, tuple(scale.shape[2:]), backend="pil") / 255)


def test_loader_takes_short_clips_as_they_are(clip):
    assert (
        MultiScaleVideoFrameLoader().load_video_frames(clip, max_frames=64, sample_rate=8, target_size=8).shape[0] == 4
    )


def test_loader_can_refuse_short_clips(clip):
    loader = MultiScaleVideoFrameLoader()
    with pytest.raises(ValueError, match="max_frames=64 is more than the 30 frames of the video"):
        loader.load_video_frames(clip, max_frames=64, target_size=8, short_clip="error")
    assert len(loader.load_video_frames(clip, max_frames=30, target_size=8, short_clip="error")) == 30


def test_loading_by_time_goes_by_the_times_of_the_file(tmp_path):
    milliseconds = [*range(0, 2000, 50), *range(2000, 10001, 2000)]  # 40 frames in 2 s, then one every 2 s
    path = write_clip(tmp_path / "variable.mkv", len(milliseconds), milliseconds=milliseconds)
    video = load_video(path, FrameSampling(policy="fps_time", fps=1))
    np.testing.assert_allclose(video.timestamps, [0, 1, 2, 4, 6, 8, 10], atol=1e-3)
    video = load_video(path, FrameSampling(policy="uniform_time", num_frames=6))
    np.testing.assert_allclose(video.timestamps, [0, 2, 4, 6, 8, 10], atol=1e-3)


def test_loader_refusals(clip, tmp_path):
    loader = MultiScaleVideoFrameLoader()
    with pytest.raises(VideoReadError, match="no such file"):
        loader.load_video_frames(tmp_path / "nowhere.mp4")
    with pytest.raises(ValueError, match="sample_rate=0"):
        loader.load_video_frames(clip, sample_rate=0)
    with pytest.raises(ValueError, match="scale_factors must be .* got"):
        loader.load_video_frames(clip, enable_multiscale=True, scale_factors=[1.0, -1.0])


@pytest.mark.parametrize(("mode", "tokens"), [("average", 169), ("max", 169), ("bilinear", 196)])
def test_spatial_pooling(mode, tokens):
    features = torch.randn(2, 729, 5)
    loader = MultiScaleVideoFrameLoader()
    pooled = loader.apply_spatial_pooling(features, stride=2, mode=mode)
    assert pooled.shape == (2, tokens, 5)
    assert torch.equal(pooled, pool_patches(features, (27, 27), 2, mode))
    if mode != "bilinear":  # by hand: the last row and column drop out
        corner = features.view(2, 27, 27, 5)[:, :2, :2].flatten(1, 2)
        expected = corner.mean(1) if mode == "average" else corner.amax(1)
        torch.testing.assert_close(pooled[:, 0], expected)


def test_spatial_pooling_of_grids_that_are_no_square():
    features = torch.randn(1, 24, 3)
    loader = MultiScaleVideoFrameLoader()
    with pytest.raises(ValueError, match="24 patches a frame are not a square"):
        loader.apply_spatial_pooling(features, stride=2)
    pooled = loader.apply_spatial_pooling(features, stride=2, grid=(4, 6))
    torch.testing.assert_close(pooled[:, 5], features.view(1, 4, 6, 3)[:, 2:, 4:].flatten(1, 2).mean(1))
