"""Pictures and animations (Pillow's pixels, own delays), data URLs, and downloads with limits.

Numbers of frames, times and pixels of animations are those of FFmpeg's command line (`-fps_mode passthrough`), or what
was written where FFmpeg shows the first frame only (AVIF).
"""

import base64
import http.server
import io
import logging
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from video_clips import write_clip

from llava_next_ar.processing.media_sources import (
    DOWNLOAD_SECONDS,
    IMAGE_SUFFIXES,
    MAX_DOWNLOAD_BYTES,
    is_url,
    names_picture,
    rgb_picture,
    source_name,
)
from llava_next_ar.processing.video_frames import FrameSampling, VideoReadError, load_video, video_length
from llava_next_ar.processing.video_inputs import load_images

DELAYS = [100, 40, 250, 30, 500]  # milliseconds


def logos() -> list[Image.Image]:
    """A moving black square and a half transparent red bar, on nothing."""
    images = []
    for index in range(5):
        pixels = np.zeros((48, 64, 4), np.uint8)
        pixels[10:30, 4 * index : 4 * index + 20] = (30 * index, 0, 0, 255)
        pixels[30:40, 5:20] = (200, 10, 10, 128)
        images.append(Image.fromarray(pixels))
    return images


def on_white(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image.convert("RGBA")).astype(float)
    alpha = pixels[..., 3:] / 255
    return np.round(pixels[..., :3] * alpha + 255 * (1 - alpha))


def shown(source, **options) -> np.ndarray:
    """`[T, H, W, 3]`"""
    return load_video(source, **options).frames.permute(0, 2, 3, 1).numpy()


# -- Animations

ANIMATIONS = {
    "a.gif": {"disposal": 2},
    "b.gif": {"disposal": 1},
    "a.apng": {"format": "PNG"},
    "a.png": {"format": "PNG", "disposal": 1, "blend": 0},
    "a.webp": {"lossless": True},
    "a.avif": {"quality": 100, "subsampling": "4:4:4"},
}


@pytest.mark.parametrize("name", ANIMATIONS)
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_an_animation_is_a_video_with_its_own_delays(tmp_path, name, backend):
    pytest.importorskip({"pyav": "av", "decord": "decord"}[backend])
    if name.endswith("avif") and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    images = logos()
    first, *others = [Image.fromarray(on_white(i).astype(np.uint8)) for i in images] if "gif" in name else images
    path = tmp_path / name
    first.save(path, save_all=True, append_images=others, duration=DELAYS, **ANIMATIONS[name])
    video = load_video(path, backend=backend)
    np.testing.assert_allclose(video.timestamps, [0, 0.1, 0.14, 0.39, 0.42], atol=1e-9)
    assert video.duration == pytest.approx(0.92) and video.fps == pytest.approx(5 / 0.92)
    assert video.total_frames == 5 and video.missing == 0
    tolerance = {"gif": 0, "avif": 8}.get(name.split(".")[1], 1)  # Pillow rounds its own way, AVIF is lossy
    for frame, image in zip(shown(path), images, strict=True):
        assert np.abs(frame - on_white(image)).max() <= tolerance
    assert video_length(path) == (5, video.fps)
    # by content too, whatever the name, and in any order of reading
    for source in (path.read_bytes(), io.BytesIO(path.read_bytes()), Image.open(path)):
        last = load_video(source, FrameSampling(policy="every_nth", sample_rate=3))
        assert torch.equal(last.frames, video.frames[[0, 3]]) and last.duration == video.duration


def test_half_transparent_parts_of_an_apng_are_blended_once(tmp_path):
    """Pillow pastes a part that is to be blended with itself as mask: its alpha of 128 became 64."""
    first, *others = logos()
    first.save(tmp_path / "a.png", save_all=True, append_images=others, duration=100, disposal=1, blend=1)
    frames = shown(tmp_path / "a.png")
    assert frames[:, 35, 10].tolist() == [[227, 132, 132]] * 5  # 200 * 128 / 255 + 127
    assert frames[1:, 15, 2].tolist() == [[255, 255, 255]] * 4  # outside of the part: cleared


def test_a_picture_beside_the_animation_is_not_part_of_it(tmp_path):
    first, *others = logos()
    path = tmp_path / "a.png"
    first.save(path, save_all=True, append_images=others, duration=DELAYS[1:], default_image=True)
    video = load_video(path)
    np.testing.assert_allclose(video.timestamps, [0, 0.04, 0.29, 0.32], atol=1e-9)
    assert np.abs(shown(path)[0] - on_white(others[0])).max() <= 1


@pytest.mark.parametrize(("name", "delay"), [("a.gif", 0.1), ("a.webp", 0.1), ("a.png", 1 / 15)])
def test_frames_without_a_delay_are_shown_as_ffmpeg_shows_them(tmp_path, name, delay):
    first, *others = [image.convert("RGB") for image in logos()]
    first.save(tmp_path / name, save_all=True, append_images=others, duration=0)
    video = load_video(tmp_path / name)
    np.testing.assert_allclose(video.timestamps, np.arange(5) * delay, atol=1e-9)
    assert video.duration == pytest.approx(5 * delay)


def test_rounded_delays_of_avif_do_not_add_up(tmp_path):
    """24 frames a second are 41.67 ms, which Pillow rounds to 42: a second of film ended at 1.008 s."""
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    images = [Image.new("RGB", (32, 32), (index * 10, 0, 0)) for index in range(24)]
    delays = [42, 41, 42] * 8
    images[0].save(tmp_path / "a.avif", save_all=True, append_images=images[1:], duration=delays)
    times = load_video(tmp_path / "a.avif").timestamps
    np.testing.assert_allclose(times, np.cumsum([0, *delays[:-1]]) / 1000, atol=1e-9)


def test_a_truncated_animation_is_damaged(tmp_path):
    first, *others = [Image.effect_noise((64, 48), 50).convert("RGB") for _ in range(5)]
    for name in ("a.png", "a.gif"):
        first.save(tmp_path / "whole", format=name[2:], save_all=True, append_images=others, duration=100)
        content = (tmp_path / "whole").read_bytes()
        (tmp_path / name).write_bytes(content[: int(len(content) * 0.7)])
        with pytest.raises(VideoReadError, match=rf"{name}: it is damaged or truncated, \d of its frames"):
            load_video(tmp_path / name)
        video = load_video(tmp_path / name, allow_partial=True)
        assert video.missing >= 1 and 1 <= len(video) < 5
        assert torch.equal(video.frames, load_video(tmp_path / "whole").frames[: len(video)])


def test_an_animation_is_not_a_frame(tmp_path):
    first, *others = logos()
    first.save(tmp_path / "0.webp", save_all=True, append_images=others, duration=100)
    first.save(tmp_path / "1.webp")
    for source in ([tmp_path / "0.webp", tmp_path / "1.webp"], tmp_path, [Image.open(tmp_path / "0.webp")]):
        with pytest.raises(VideoReadError, match="frame 0.*: it holds 5 pictures, expected one frame"):
            load_video(source)


# -- Still pictures


@pytest.mark.parametrize("orientation", range(1, 9))
def test_frames_and_images_are_turned_as_the_camera_was_held(tmp_path, orientation):
    upright = Image.fromarray(np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "frames").mkdir()
    for suffix in ("png", "webp", "tiff"):
        path = tmp_path / "frames" / f"0.{suffix}"
        upright.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        assert expected.shape == ((16, 12, 3) if orientation > 4 else (12, 16, 3))
        for source in (tmp_path / "frames", [path], path, [Image.open(path)]):
            np.testing.assert_array_equal(shown(source)[0], expected)
        for source in (path, Image.open(path)):
            np.testing.assert_array_equal(np.asarray(load_images(source)), expected)
        path.unlink()


def test_damaged_exif_data_do_not_lose_the_picture(tmp_path, caplog):
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    picture.save(tmp_path / "a.png", exif=b"Exif\x00\x00not a header at all")
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(shown([tmp_path / "a.png"])[0], np.asarray(picture))
    assert "EXIF" in caplog.text


def transparent_pictures() -> dict[str, tuple[Image.Image, dict]]:
    """Black in the middle of nothing, in every way that Pillow writes transparency."""
    alpha = np.zeros((6, 6), np.uint8)
    alpha[2:4, 2:4] = 255
    black = Image.new("RGBA", (6, 6))
    black.putalpha(Image.fromarray(alpha))
    palette = (
        Image.fromarray((alpha == 0).astype(np.uint8), mode="P") if False else Image.fromarray(alpha).convert("P")
    )
    palette.putpalette([0, 0, 0] * 256)
    wide = Image.fromarray(np.where(alpha == 0, 77, 0).astype(np.uint16))
    colour = Image.fromarray(np.where(alpha[..., None] == 0, (10, 20, 30), 0).astype(np.uint8))
    grey = Image.fromarray(np.where(alpha == 0, 9, 0).astype(np.uint8))
    return {
        "RGBA.png": (black, {}),
        "LA.png": (black.convert("LA"), {}),
        "RGBA.webp": (black, {"lossless": True}),
        "palette.png": (palette, {"transparency": 0}),
        "palette_bytes.png": (palette, {"transparency": bytes([0]) + bytes([255]) * 255}),
        "palette.gif": (palette, {"transparency": 0}),
        "colour_key.png": (colour, {"transparency": (10, 20, 30)}),
        "grey_key.png": (grey, {"transparency": 9}),
        "16_bit_key.png": (wide, {"transparency": 77}),
    }


@pytest.mark.parametrize("name", transparent_pictures())
def test_transparency_is_laid_on_white(tmp_path, name):
    picture, options = transparent_pictures()[name]
    path = tmp_path / name
    picture.save(path, **options)
    expected = np.full((6, 6, 3), 255)
    expected[2:4, 2:4] = 0
    for source in (path, [path], [Image.open(path)], path.read_bytes()):
        np.testing.assert_array_equal(shown(source)[0], expected)
    for source in (path, Image.open(path)):
        np.testing.assert_array_equal(np.asarray(load_images(source)), expected)


def test_16_bit_grey_is_scaled(tmp_path):
    """Clipped at 255, a ramp of 64 levels became two (python-pillow/Pillow#5991)."""
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (4, 1))
    expected = np.repeat(np.round(ramp / 257).astype(np.uint8)[..., None], 3, axis=-1)
    assert len(np.unique(expected)) == 64
    Image.fromarray(ramp).save(tmp_path / "0.png")
    Image.fromarray(ramp).save(tmp_path / "0.tiff")
    (tmp_path / "0.ppm").write_bytes(b"P5 64 4 65535\n" + ramp.astype(">u2").tobytes())
    for path in (tmp_path / "0.png", tmp_path / "0.tiff", tmp_path / "0.ppm"):
        for source in (path, [path], [Image.open(path)]):
            np.testing.assert_array_equal(shown(source)[0], expected)
        np.testing.assert_array_equal(np.asarray(load_images(path)), expected)
    for values, kind in ((ramp.astype(np.int32), "32-bit integers"), (ramp.astype(np.float32), "floats")):
        Image.fromarray(values).save(tmp_path / "1.tiff")
        with pytest.raises(VideoReadError, match=rf"1\.tiff\): the image holds {kind} .* expected 8 or 16 bits"):
            load_video([tmp_path / "1.tiff"])
        with pytest.raises(ValueError, match=f"cannot load image .*1.tiff.*holds {kind}"):
            load_images(tmp_path / "1.tiff")


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "RGBX"]
)
def test_every_mode_of_pillow_becomes_rgb(mode):
    picture = Image.new("RGB", (4, 4), (255, 255, 255))
    if mode in ("RGBa", "La"):
        picture = picture.convert(mode[:-1] + "A")
    picture = picture.convert("P").convert("PA") if mode == "PA" else picture.convert(mode)
    assert np.asarray(rgb_picture(picture)).tolist() == [[[255, 255, 255]] * 4] * 4


# -- Names and data URLs


@pytest.mark.parametrize("folder", ["C#", "why?", "50%", "a b", "é", "%23", "a;b", "http:", "data:,x"])
def test_a_path_may_hold_any_character(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / "0.png"
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    picture.save(path)
    assert names_picture(path) and names_picture(str(path))
    for source in (
        path.parent,
        str(path.parent),
        [str(path)],
        path,
        path.as_uri(),
        f"file://{path}".replace("%", "%25"),
    ):
        np.testing.assert_array_equal(shown(source)[0], np.asarray(picture))


def test_names_of_pictures():
    for suffix in IMAGE_SUFFIXES:
        assert names_picture(f"a{suffix.upper()}") and names_picture(f"https://host/a{suffix}?b=c.mp4#d")
        assert names_picture(f"a{suffix}", only_still=True) == (suffix != ".gif")
    assert names_picture("data:image/png;base64,AA") and not names_picture("data:image/gif;base64,AA", only_still=True)
    assert not names_picture("https://host/a.mp4?b=c.png") and not names_picture("data:video/mp4;base64,AA.png")
    assert not is_url("C#/a.png") and not is_url("http.mp4") and not is_url("data:x") and is_url("HTTPS://host/a.png")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 6, width=64, height=48)


@pytest.mark.parametrize(
    "header",
    ["data:video/mp4;base64,", "data:;base64,", "DATA:video/mp4;BASE64,", "data:video/mp4;codecs=avc1;base64,"],
)
def test_data_urls_are_decoded(clip, header):
    expected = load_video(clip)
    content = clip.read_bytes()
    texts = [base64.b64encode(content), base64.urlsafe_b64encode(content).rstrip(b"="), base64.encodebytes(content)]
    for text in texts:
        video = load_video(header + text.decode())
        assert torch.equal(video.frames, expected.frames) and len(video.source) < 80


def test_data_urls_of_images():
    pictures = [Image.fromarray(np.full((4, 4, 3), index * 50, np.uint8)) for index in range(3)]
    urls = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    np.testing.assert_array_equal(shown(urls), [np.asarray(picture) for picture in pictures])
    np.testing.assert_array_equal(shown(urls[1]), [np.asarray(pictures[1])])
    np.testing.assert_array_equal(np.asarray(load_images(urls[2])), np.asarray(pictures[2]))


@pytest.mark.parametrize("read", [load_video, load_images, lambda text: load_video([text])])
def test_no_payload_in_a_message(read, caplog):
    payload = base64.b64encode(bytes(range(256)) * 40).decode()
    for text in (f"data:video/mp4;base64,{payload}", f"data:image/png;base64,{payload}%", payload, payload[:400]):
        with caplog.at_level(logging.DEBUG), pytest.raises(ValueError) as error:
            read(text)
        assert len(str(error.value)) < 300 and payload[20:40] not in str(error.value) + caplog.text
    assert source_name("a" * 90 + ".mp4") == "a" * 90 + ".mp4"


def test_text_files_are_not_videos(clip):
    with pytest.raises(TypeError, match="opened in binary mode"):
        load_video(io.StringIO("text"))


# -- Downloads


@pytest.fixture
def server(clip, monkeypatch):
    """Address of a server on this machine: /clip.mp4, /endless (no length), /huge (announced), /slow and /silent."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    end = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            content = clip.read_bytes()
            if self.path == "/silent":
                end.wait(20)
                return
            if self.path == "/slow_headers":
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
                while not end.wait(0.05):
                    self.wfile.write(b"x")
                return
            self.send_response(200)
            if self.path in ("/clip.mp4", "/huge"):
                self.send_header("Content-Length", str(len(content) if self.path == "/clip.mp4" else 10**15))
            self.end_headers()
            if self.path == "/clip.mp4":
                self.wfile.write(content)
            while self.path in ("/endless", "/slow") and not end.wait(0.05 if self.path == "/slow" else 0):
                self.wfile.write(b"x" if self.path == "/slow" else b"x" * 10_000)

        def handle(self):
            try:
                super().handle()
            except OSError:  # the client is gone
                pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        end.set()
        served.shutdown()


@pytest.mark.parametrize("read", [load_video, load_images])
def test_downloads_have_a_limit_of_bytes(server, clip, monkeypatch, read):
    size = clip.stat().st_size
    monkeypatch.setenv(MAX_DOWNLOAD_BYTES, str(size))
    assert torch.equal(load_video(f"{server}/clip.mp4").frames, load_video(clip).frames)
    monkeypatch.setenv(MAX_DOWNLOAD_BYTES, str(size - 1))
    for name, found in (("clip.mp4", f"has {size} bytes"), ("huge", f"has {10**15} bytes"), ("endless", "goes on")):
        with pytest.raises(
            ValueError, match=f"{server}/{name}.*{found}, the limit is {size - 1} .{MAX_DOWNLOAD_BYTES}"
        ):
            read(f"{server}/{name}")


def test_announced_sizes_are_limited_by_default(server):
    with pytest.raises(VideoReadError, match=f"has {10**15} bytes, the limit is {2 * 2**30}"):
        load_video(f"{server}/huge")


@pytest.mark.parametrize("name", ["slow", "silent", "slow_headers"])
def test_downloads_have_a_limit_of_time(server, monkeypatch, name):
    monkeypatch.setenv(DOWNLOAD_SECONDS, "0.5")
    start = time.monotonic()
    with pytest.raises(VideoReadError, match=f"{name}: download takes longer than 0.5 seconds .{DOWNLOAD_SECONDS}"):
        load_video(f"{server}/{name}")
    assert time.monotonic() - start < 5


def test_limits_must_be_numbers(monkeypatch):
    for value in ("many", "0", "-1", "nan"):
        monkeypatch.setenv(MAX_DOWNLOAD_BYTES, value)
        with pytest.raises(ValueError, match=f"{MAX_DOWNLOAD_BYTES} must be a number above 0, got '{value}'"):
            load_video("http://127.0.0.1:9/clip.mp4")
