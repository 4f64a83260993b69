"""LlavaNextARVideoProcessor: the pixels of the original, every kind of input, every option, and clear refusals."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_data import parametrize_golden, pillow_tolerance
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features
from transformers.image_transforms import center_crop
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.video_utils import VideoMetadata
from video_clips import cut, decode_everything, write_clip

import llava_next_ar.processing.video_inputs as video_inputs
from llava_next_ar.processing.frame_sampling import SAMPLING_POLICIES
from llava_next_ar.processing.video_frames import VideoReadError, load_video, resize_frames
from llava_next_ar.processing.video_processing_llava_next_ar import (
    LlavaNextARVideoProcessor,
    choose_policy,
    choose_sampling,
    flatten_videos,
)

SIZE = {"height": 20, "width": 24}


def frames(num_frames: int = 6, height: int = 12, width: int = 16, channels: int = 3, seed: int = 0) -> np.ndarray:
    """`[T, H, W, C]` uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, channels), dtype=np.uint8)


def pixels(videos, **kwargs) -> torch.Tensor:
    return LlavaNextARVideoProcessor(size=SIZE)(videos, return_tensors="pt", **kwargs)["pixel_values_videos"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 30, fps=10, width=64, height=48)


@pytest.fixture(scope="module")
def damaged(clip) -> Path:
    return cut(write_clip(clip.parent / "whole.mkv", 30), clip.parent / "damaged.mkv", 0.6)


# -- Pixel values


@parametrize_golden("preprocess")
@pytest.mark.parametrize("backend", ["pil", "torch"])
def test_pixel_values_of_the_original(case, backend):
    video = case.tensor(f"{case.name}/uint8_thwc" if case["kind"] == "video" else f"{case.name}/uint8_hwc")
    expected = case.tensor(f"{case.name}/pixel_values")
    processor = LlavaNextARVideoProcessor(size=case["size"], resize_backend=backend)
    found = processor(video, do_sample_frames=False, return_tensors="pt")["pixel_values_videos"][0]
    # exact with the reference's Pillow; the documented tolerance of torch's resizing is 2 of 255 steps of 2/255 each
    tolerance = pillow_tolerance() if backend == "pil" else 2 * 2 / 255 + 1e-6
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_normalisation_is_exact_for_every_value():
    values = np.arange(256, dtype=np.uint8)
    video = np.broadcast_to(values.reshape(1, 16, 16, 1), (1, 16, 16, 3))
    found = pixels(video, do_resize=False)[0, 0, 0].flatten().numpy()
    # the original's order: the product in float64, mean and std in float32
    expected = ((values.astype(np.float64) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"do_normalize": False}, lambda x: x / 255),
        ({"do_rescale": False}, lambda x: (x - 0.5) / 0.5),
        ({"do_rescale": False, "do_normalize": False}, lambda x: x),
        ({"rescale_factor": -1.0, "image_mean": 0.0, "image_std": 2.0}, lambda x: -x / 2),
        (
            {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1.0]},
            lambda x: (
                (x / 255 - x.new_tensor([0.1, 0.2, 0.3])[:, None, None]) / x.new_tensor([0.5, 0.25, 1])[:, None, None]
            ),
        ),
    ],
)
def test_rescaling_and_normalising_are_options(options, expected):
    video = frames()
    as_floats = torch.from_numpy(video).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(pixels(video, do_resize=False, **options)[0], expected(as_floats), rtol=1e-6, atol=1e-6)


def test_a_video_is_the_same_alone_and_in_a_padded_batch():
    videos = [frames(6), frames(2, height=30, seed=1), frames(4, seed=2)]
    processor = LlavaNextARVideoProcessor(size=SIZE)
    batch = processor(videos, return_tensors="pt")
    assert batch["pixel_values_videos"].shape == (3, 6, 3, 20, 24)
    assert batch["video_frame_mask"].tolist() == [[index < length for index in range(6)] for length in (6, 2, 4)]
    for index, video in enumerate(videos):
        alone = processor(video, return_tensors="pt")
        real = batch["video_frame_mask"][index]
        for name in ("pixel_values_videos", "video_timestamps"):
            assert torch.equal(batch[name][index][real], alone[name][0])
            assert not batch[name][index][~real].any()


def test_the_input_is_left_as_it_was():
    video = frames()
    before, tensor = video.copy(), torch.from_numpy(frames()).permute(0, 3, 1, 2)
    pixels(video)
    pixels(tensor)
    np.testing.assert_array_equal(video, before)
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), before)


# -- Kinds of input


def all_kinds(video: np.ndarray, folder: Path) -> dict:
    """The same frames `[T, H, W, 3]` in every way that frames may be given."""
    for index, frame in enumerate(video):
        Image.fromarray(frame).save(folder / f"{index}.png")
    paths = [folder / f"{index}.png" for index in range(len(video))]
    read_only = video.copy()
    read_only.flags.writeable = False
    return {
        "channels last": video,
        "channels first": video.transpose(0, 3, 1, 2),
        "tensor": torch.from_numpy(video),
        "tensor, channels first": torch.from_numpy(video).permute(0, 3, 1, 2),
        "read-only": read_only,
        "negative strides": video[::-1].copy()[::-1],
        "floats up to 255": video.astype(np.float32),
        "half floats": torch.from_numpy(video).half(),
        "integers": video.astype(np.int64),
        "list of arrays": list(video),
        "list of tensors": list(torch.from_numpy(video).permute(0, 3, 1, 2)),
        "tuple of images": tuple(map(Image.fromarray, video)),
        "list of paths": paths,
        "list of strings": [str(path) for path in paths],
        "folder": folder,
        "batch of one": video[None],
        "list of one": [video],
        "nested": [[video]],
        "nested images": [[list(map(Image.fromarray, video))]],
        "nested paths": [[[str(path) for path in paths]]],
    }


@pytest.mark.parametrize("options", [{"num_frames": 4}, {"do_sample_frames": False}, {"resize_backend": "pil"}])
def test_every_kind_of_frames_gives_the_same_pixels(tmp_path, options):
    video = frames()
    expected = pixels(video, **options)
    assert expected.shape[:2] == (1, 4 if "num_frames" in options else 6)
    kinds = all_kinds(video, tmp_path)
    for kind, given_so in kinds.items():
        assert torch.equal(pixels(given_so, **options), expected), kind
    several = [kinds["channels last"], kinds["list of paths"], kinds["tuple of images"], kinds["folder"]]
    assert torch.equal(pixels(several, **options), expected.expand(4, -1, -1, -1, -1))


def test_every_kind_of_file_gives_the_frames_that_are_in_it(clip):
    truth = decode_everything(clip).frames
    expected = pixels(truth, num_frames=5)
    kinds = {
        "string": str(clip),
        "path": clip,
        "url": clip.as_uri(),
        "bytes": clip.read_bytes(),
        "file": io.BytesIO(clip.read_bytes()),
        "read before": load_video(clip, choose_sampling({"sampling": "uniform"}, {"num_frames": 5})),
    }
    for kind, given_so in kinds.items():
        assert torch.equal(pixels(given_so, num_frames=5), expected), kind
    nested = pixels([[kinds["string"], kinds["bytes"]], [], [truth]], num_frames=5)
    assert torch.equal(nested, expected.expand(3, -1, -1, -1, -1))


def test_frames_of_a_file_are_resized_alike_whether_while_decoding_or_after(clip):
    at_once = pixels(clip, num_frames=3, size={"height": 24, "width": 32})
    afterwards = pixels(clip, num_frames=3, size={"shortest_edge": 24})
    assert torch.equal(at_once, afterwards)


def test_floats_in_unit_range_need_no_rescaling():
    video = frames()
    scaled = video.astype(np.float32) / 255
    torch.testing.assert_close(
        pixels(scaled, do_rescale=False, do_resize=False), pixels(video, do_resize=False), rtol=0, atol=1e-6
    )
    # resized without rounding to 8 bits on the way, which is what Pillow does after each direction
    smooth = np.add.outer(np.arange(12) * 7, np.arange(16) * 5).astype(np.uint8)[None, ..., None].repeat(3, axis=-1)
    found = pixels(smooth.astype(np.float32) / 255, do_rescale=False)
    torch.testing.assert_close(found, pixels(smooth, resize_backend="pil"), rtol=0, atol=2 / 255)
    # zeros and ones are whole numbers, but no 8-bit values
    mask = (smooth > 60).astype(np.float32)
    found = pixels(mask, do_rescale=False, resample=2)
    torch.testing.assert_close(found, pixels(mask.astype(np.uint8) * 255, resample=2), rtol=0, atol=4 / 255)
    for one in (scaled, list(scaled), [scaled[0], Image.fromarray(video[1])]):
        with pytest.raises(
            ValueError, match=r"floats lie in \[0, 1\].*divide them by 255 once more.*do_rescale=False"
        ):
            pixels(one)


@pytest.mark.parametrize("as_list", [False, True])
def test_values_out_of_range_are_refused(as_list):
    """[-1, 1] became a constant picture, without a word."""
    video = np.random.default_rng(0).uniform(-1, 1, (4, 12, 16, 3)).astype(np.float32)
    given = list(video) if as_list else video
    with pytest.raises(ValueError, match=r"float32 frames must lie in \[0, 255\], got \[-0.99"):
        pixels(given)
    with pytest.raises(ValueError, match=r"must not be negative where they are normalized, got \[-0.99"):
        pixels(given, do_rescale=False)
    with pytest.raises(ValueError, match="float32 frames must be finite, got non-finite values"):
        pixels(
            [frame * np.float32(np.inf) for frame in video] if as_list else video * np.float32(np.nan),
            do_rescale=False,
            do_normalize=False,
        )
    found = pixels(given, do_rescale=False, do_normalize=False, do_resize=False)
    assert torch.equal(found[0], torch.from_numpy(video).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"float32 frames must lie in \[0, 255\], got \[-?\d"):
        pixels([frame * 300 for frame in video] if as_list else video * 300)
    wide = np.abs(video) * 65535
    found = pixels(list(wide) if as_list else wide, rescale_factor=1 / 65535, do_normalize=False, do_resize=False)
    torch.testing.assert_close(found[0], torch.from_numpy(np.abs(video)).permute(0, 3, 1, 2), rtol=1e-5, atol=1e-6)


def test_mixing_kinds_of_frames_does_not_change_their_scale():
    """With one PIL image among them, frames of floats were taken for [0, 1] instead of [0, 255]."""
    video = frames(4)
    whole, fractions = video.astype(np.float32), np.minimum(video + 0.5, 255).astype(np.float32)
    mixed = [
        whole[0],
        Image.fromarray(video[1]),
        torch.from_numpy(video[2]).permute(2, 0, 1),
        video[3].astype(np.int32),
    ]
    assert torch.equal(pixels(mixed), pixels(video))
    expected = pixels(np.stack([fractions[0], whole[1]]), do_resize=False)
    assert torch.equal(pixels([fractions[0], Image.fromarray(video[1])], do_resize=False), expected)
    with pytest.raises(ValueError, match="no common scale with do_rescale=False"):
        pixels([whole[0] / 255, Image.fromarray(video[1])], do_rescale=False)
    # of different size too, grey too
    grey = [video[0, ..., 0], Image.fromarray(video[1, ..., 1]), frames(1, height=30)[0], video[2, ..., :1]]
    alone = [pixels([frame])[0, 0] for frame in grey]
    assert torch.equal(pixels(grey)[0], torch.stack(alone))


@pytest.mark.parametrize(
    "dtype", ["int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", ">u2", ">f4", "float16", "longdouble"]
)
def test_numbers_of_any_type(dtype):
    video = frames() // 2
    expected = pixels(video)
    assert torch.equal(pixels(video.astype(dtype)), expected)
    assert torch.equal(pixels(list(video.astype(dtype))), expected)
    if dtype[0] != ">" and dtype != "longdouble":
        assert torch.equal(pixels(torch.from_numpy(video.astype(dtype))), expected)
    if dtype not in ("int8", ">f4", "float16", "longdouble"):
        for video in (np.full((2, 12, 16, 3), 300, dtype), list(np.full((2, 12, 16, 3), 300, dtype))):
            with pytest.raises(
                ValueError, match=r"int\d+ frames must lie in \[0, 255\], got \[300, 300\].*by 257|>u2"
            ):
                pixels(video)


def test_transparency_is_laid_on_white_and_grey_repeated(tmp_path):
    video = frames(channels=4)
    alpha = video[..., 3:] / 255
    blended = np.round(video[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    expected = pixels(blended, do_resize=False)
    step = 2 / 255 + 1e-6  # Pillow rounds its own way
    for kind in (video, video.transpose(0, 3, 1, 2), [Image.fromarray(frame) for frame in video]):
        assert (pixels(kind, do_resize=False) - expected).abs().max() <= step
    opaque = frames(channels=4)
    opaque[..., 3] = 255
    assert torch.equal(pixels(opaque), pixels(opaque[..., :3]))

    grey = frames(channels=1)
    expected = pixels(np.repeat(grey, 3, axis=-1))
    assert torch.equal(pixels(grey), expected)
    assert torch.equal(pixels([Image.fromarray(frame[..., 0]) for frame in grey]), expected)


def test_channels_are_kept_without_conversion_to_rgb():
    options = {"do_convert_rgb": False, "do_resize": False, "do_normalize": False, "do_rescale": False}
    video = frames(channels=4)
    for kind in (video, list(map(Image.fromarray, video))):
        assert torch.equal(pixels(kind, **options)[0], torch.from_numpy(video).permute(0, 3, 1, 2).float())
    assert pixels(video, do_convert_rgb=False, image_mean=0.5, image_std=0.5).shape == (1, 6, 4, 20, 24)


def test_ambiguous_channels_follow_the_input_data_format():
    video = frames(height=3, width=8)  # [T, 3, 8, 3]
    first = pixels(video, do_resize=False, input_data_format="channels_first")
    last = pixels(video, do_resize=False, input_data_format="channels_last")
    assert first.shape == (1, 6, 3, 8, 3) and last.shape == (1, 6, 3, 3, 8)


def test_images_come_from_files_and_base64_alike(tmp_path):
    picture = Image.fromarray(frames(1)[0])
    picture.save(tmp_path / "a.png")
    encoded = base64.encodebytes((tmp_path / "a.png").read_bytes()).decode()  # in lines
    sources = [tmp_path / "a.png", [str(tmp_path / "a.png")], encoded, f"data:image/png;base64,{encoded}"]
    loaded = video_inputs.load_images(sources)
    assert [np.array(image).tolist() for image in (loaded[0], loaded[1][0], *loaded[2:])] == [
        np.array(picture).tolist()
    ] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gone.png", "'gone.png': no such file, and not base64"),
        ("iVBOR", "'iVBOR': no such file, and not base64"),
        ("data:image/png;base64,iVBO%", r"'data:image/png;base64,... \(27 characters\)': its data is not base64"),
        ("data:video/mp4;base64,AAAA", r"'data:video/mp4;base64,... \(26 characters\)': cannot identify"),
    ],
)
def test_what_is_neither_a_file_nor_base64_is_named(text, message):
    with pytest.raises(ValueError, match=f"cannot load image {message}"):
        video_inputs.load_images([text])


@pytest.mark.parametrize("suffix", ["gif", "png", "apng", "webp", "avif"])
def test_animations_are_videos_in_every_nesting(tmp_path, suffix):
    """As a chat hands them over, `[["a.webp"]]` was one video of one frame."""
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    images = [Image.new("RGB", (24, 20), (index * 40, 0, 0)) for index in range(6)]
    paths = [str(tmp_path / f"{index}.{suffix}") for index in range(2)]
    options = {"format": "PNG"} if suffix == "apng" else {"quality": 100, "lossless": True} if suffix == "webp" else {}
    images[0].save(
        paths[0], save_all=True, append_images=images[1:], duration=[100, 200, 300, 400, 500, 600], **options
    )
    images[0].save(paths[1], save_all=True, append_images=images[1:4], duration=100, **options)
    url = f"data:image/{suffix};base64,{base64.b64encode(Path(paths[0]).read_bytes()).decode()}"
    processor = LlavaNextARVideoProcessor(size=SIZE)
    for one in (paths[0], [paths[0]], [[paths[0]]], [[Path(paths[0])]], url, [[url]], [[Image.open(paths[0])]]):
        batch = processor(one, return_tensors="pt", return_metadata=True)
        assert batch["pixel_values_videos"].shape[:2] == (1, 6)
        torch.testing.assert_close(batch["video_timestamps"], torch.tensor([[0, 0.1, 0.3, 0.6, 1.0, 1.5]]))
        assert batch["video_metadata"][0].duration == pytest.approx(2.1)
    batch = processor([paths], return_tensors="pt")
    assert batch["video_frame_mask"].sum(1).tolist() == [6, 4]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(sum))
def test_flattening_keeps_every_video_in_order(counts):
    """Property: nested by prompt, videos come out in order and counted by prompt."""
    names = iter(f"{number}.mp4" for number in range(99))
    nested = [[next(names) for _ in range(count)] for count in counts]
    flat, found = flatten_videos(nested)
    assert flat == [name for prompt in nested for name in prompt]
    assert found == counts


@pytest.mark.parametrize(
    ("videos", "expected"),
    [
        ("a.mp4", 1),
        (["a.mp4", "b.mp4"], 2),
        (["1.jpg", "2.JPG"], 1),
        ([["1.jpg", "2.jpg"], ["3.jpg"]], 2),
        ([[["frame", "frame"]]], [1]),
        ([["http://host/a.png?x=1", "b.png"]], 1),
        (["a.gif", "b.gif"], 2),
        (["C#/1.png", "C#/2.png"], 1),
        (["why?/1.png", "50%/2.png"], 1),
        ([["data:image/png;base64,AA", "data:image/jpeg;base64,AA"]], 1),
        ([["data:video/mp4;base64,AA", "data:video/mp4;base64,AA"]], [2]),
        ([np.zeros((4, 4)), np.zeros((4, 4))], 1),
        ([b"", b""], 2),
        (np.zeros((2, 5, 4, 4, 3)), 2),
        (np.zeros((4, 4, 3)), 1),
        ([np.zeros((5, 4, 4, 3)), ["a.jpg"]], 2),
        ([[np.zeros((4, 4, 3))] * 3, [np.zeros((4, 4, 3))] * 2], 2),
        ([[np.zeros((2, 4, 4, 3)), "a.mp4"], ["b.mp4"]], [2, 1]),
    ],
)
def test_what_counts_as_one_video(videos, expected):
    flat, count = flatten_videos(videos)
    assert count == expected
    assert len(flat) == (expected if isinstance(expected, int) else sum(expected))


@pytest.mark.parametrize(
    ("videos", "error", "message"),
    [
        ([], ValueError, "videos is an empty list"),
        ([[]], ValueError, "no video was given"),
        ([["a.mp4", None]], TypeError, r"videos\[0\]\[1\] is a NoneType"),
        (3, TypeError, "videos is a int"),
        ([{"path": "a.mp4"}], TypeError, r"videos\[0\] is a dict"),
        (np.zeros((4, 4)), ValueError, r"got shape \(4, 4\)"),
        ([["a.mp4", []]], ValueError, r"videos\[0\]\[1\] is an empty list"),
    ],
)
def test_what_is_no_video_is_refused_with_its_place(videos, error, message):
    with pytest.raises(error, match=message):
        pixels(videos)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((2, 4, 4, 3), dtype=bool), "integers from 0 to 255 or floats, got bool"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.complex64), "integers from 0 to 255 or floats, got complex64"),
        (np.full((2, 4, 4, 3), 300), r"int64 frames must lie in \[0, 255\], got \[300, 300\]; divide 16-bit"),
        (np.full((2, 4, 4, 3), np.nan), r"float64 frames must lie in \[0, 255\], got non-finite values"),
        (
            np.zeros((16, 48, 64)),
            r"with 1, 3 or 4 channels C, got shape \(16, 48, 64\); a grey video \[T, H, W\] needs",
        ),
        (np.zeros((3, 16, 48, 64)), r"got shape \(3, 16, 48, 64\); a video \[C, T, H, W\] needs"),
        ([np.zeros((16, 48, 64))] * 2, r"got shape \(16, 48, 64\)"),
        (np.zeros((2, 16, 48, 64, 2)), r"got shape \(16, 48, 64, 2\)"),
        (np.zeros((0, 4, 4, 3), dtype=np.uint8), "no frames"),
        ([np.full((4, 4, 3), 1.5), np.zeros((4, 5, 3))], "must have one shape"),
    ],
)
def test_frames_that_make_no_sense_are_refused(video, message):
    with pytest.raises(ValueError, match=message):
        pixels(video)


def test_unreadable_files_are_named(tmp_path, damaged):
    (tmp_path / "text.mp4").write_text("no video")
    for path in (tmp_path / "missing.mp4", tmp_path / "text.mp4", damaged):
        with pytest.raises(VideoReadError, match=path.name):
            pixels(path)
    assert pixels(damaged, allow_partial=True, num_frames=4).shape[1] == 4


# -- Sampling


STORED = {"sampling": "uniform", "num_frames": 16}


@pytest.mark.parametrize(
    ("stored", "given", "expected"),
    [
        ({}, {}, {"policy": "uniform", "num_frames": 16}),
        ({}, {"num_frames": 4}, {"policy": "uniform", "num_frames": 4}),
        ({}, {"fps": 2}, {"policy": "fps", "fps": 2, "max_frames": None}),
        ({}, {"fps": 2, "max_frames": 8}, {"policy": "fps", "fps": 2, "max_frames": 8}),
        ({}, {"sample_rate": 3}, {"policy": "every_nth", "sample_rate": 3}),
        ({}, {"use_fast_slow_frames": True, "num_slow": 2}, {"policy": "fast_slow", "num_slow": 2}),
        ({}, {"sampling": "num_frames"}, {"policy": "num_frames", "num_frames": 16}),
        ({"sampling": "num_frames"}, {"num_frames": 4}, {"policy": "num_frames", "num_frames": 4}),
        ({"sampling": "fps", "fps": 1, "max_frames": 64}, {}, {"policy": "fps", "fps": 1, "max_frames": 64}),
        ({"sampling": "fps", "fps": 1, "max_frames": 64}, {"fps": 2}, {"policy": "fps", "fps": 2, "max_frames": 64}),
        ({"sampling": "fps", "fps": 1, "max_frames": 64}, {"num_frames": 4}, {"policy": "uniform", "num_frames": 4}),
        ({"sampling": "llava_video", "fps": 1}, {"fps": 2}, {"policy": "llava_video", "fps": 2}),
        ({"sampling": "fast_slow"}, {"use_fast_slow_frames": False}, {"policy": "uniform", "num_frames": 16}),
        ({"sampling": "fast_slow", "num_fast": 3}, {}, {"policy": "fast_slow", "num_fast": 3}),
    ],
)
def test_what_the_call_says_wins_over_what_is_stored(stored, given, expected):
    sampling = choose_sampling({**STORED, **stored}, given)
    assert {name: getattr(sampling, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fps": 2, "num_frames": 4}, "exclude each other.*max_frames"),
        ({"sampling": "sometimes"}, "'sometimes' is not one of uniform"),
        ({"sampling": "uniform", "use_fast_slow_frames": True}, "contradicts"),
        ({"sampling": "uniform", "fps": 2}, "fps=2 has no effect"),
        ({"max_frames": 4}, "max_frames=4 has no effect"),
        ({"num_fast": 4}, "num_fast=4 has no effect"),
        ({"sampling": "fps"}, "needs fps"),
        ({"num_frames": 0}, "num_frames=0 must be"),
        ({"fps": -1}, "fps"),
    ],
)
def test_contradictory_sampling_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        pixels(frames(), **given)


def test_settings_name_the_policy_at_construction_too():
    assert LlavaNextARVideoProcessor().sampling == "uniform"
    assert LlavaNextARVideoProcessor(fps=1, max_frames=32).sampling == "fps"
    assert LlavaNextARVideoProcessor(sample_rate=2).sampling == "every_nth"
    assert LlavaNextARVideoProcessor(use_fast_slow_frames=True).sampling == "fast_slow"
    assert choose_policy("uniform", {}) == "uniform"
    processor = LlavaNextARVideoProcessor()
    processor.use_fast_slow_frames = True
    assert processor.sampling == "fast_slow"
    processor.fps = 2  # without its policy: an error, not ignored
    with pytest.raises(ValueError, match="fps=2 has no effect"):
        processor(frames())


@pytest.mark.parametrize("asked", [7, 6, 16])
def test_more_frames_than_exist(clip, asked):
    """A clip gives all of its frames, wherever their number was requested; the policy `num_frames` alone raises ValueError."""
    video = frames(6)
    expected = pixels(video, do_sample_frames=False)
    for options in ({}, {"sampling": "uniform"}, {"do_sample_frames": False}):
        assert torch.equal(pixels(video, num_frames=asked, **options), expected)
    processor = LlavaNextARVideoProcessor(size=SIZE, num_frames=asked)
    assert torch.equal(processor(video, return_tensors="pt")["pixel_values_videos"], expected)
    assert pixels(clip, num_frames=asked + 24).shape[1] == 30
    assert processor.sample_frames(VideoMetadata(total_num_frames=6), num_frames=asked).tolist() == list(range(6))
    if asked > 6:
        with pytest.raises(ValueError, match=f"num_frames={asked} is more than the 6 frames"):
            processor(video, sampling="num_frames")


@pytest.mark.parametrize("policy", sorted(SAMPLING_POLICIES.keys() - {"codec"}))  # arrays were never coded
def test_a_file_and_its_frames_are_sampled_alike(clip, policy):
    settings = {"fps": 2.0} if policy in ("fps", "fps_time", "llava_video", "llava_video_pyav") else {}
    settings |= {"sample_rate": 4} if policy == "every_nth" else {}
    processor = LlavaNextARVideoProcessor(size=SIZE, sampling=policy, **settings)
    from_file = processor(clip, return_tensors="pt", return_metadata=True)
    metadata = {"total_num_frames": 30, "fps": 10.0}
    from_array = processor(
        decode_everything(clip).frames, video_metadata=metadata, return_tensors="pt", return_metadata=True
    )
    assert torch.equal(from_file["pixel_values_videos"], from_array["pixel_values_videos"])
    torch.testing.assert_close(from_file["video_timestamps"], from_array["video_timestamps"])
    indices = from_file["video_metadata"][0].frames_indices
    assert indices == from_array["video_metadata"][0].frames_indices
    assert indices == processor.sample_frames(VideoMetadata(**metadata)).tolist()


def test_slow_and_fast_frames(clip):
    processor = LlavaNextARVideoProcessor(size=SIZE, num_fast=3, num_slow=4, slow_stride=2)
    assert "video_frame_types" not in processor(clip, return_tensors="pt")
    batch = processor([clip, frames(2)], use_fast_slow_frames=True, return_tensors="pt", return_metadata=True)
    # slow 0, 8, 18, 28; fast 27, 28, 29; a frame in both is slow
    assert batch["video_metadata"][0].frames_indices == [0, 8, 18, 27, 28, 29]
    assert batch["video_frame_types"].tolist() == [[0, 0, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert batch["video_frame_types"].dtype == torch.int64
    assert batch["video_frame_mask"].sum(1).tolist() == [6, 2]
    assert (batch["video_timestamps"][0].diff() > 0).all()


def test_videos_with_and_without_types_do_not_mix(clip):
    typed = load_video(clip, choose_sampling({"sampling": "fast_slow"}, {}))
    with pytest.raises(ValueError, match="the batch mixes videos with and without slow and fast frames"):
        pixels([typed, frames()])


def test_the_frame_rate_of_arrays_must_be_known_to_sample_by_it():
    with pytest.raises(ValueError, match="frame rate"):
        pixels(frames(), fps=1)
    with pytest.raises(ValueError, match="frame rate"):
        LlavaNextARVideoProcessor().sample_frames(VideoMetadata(total_num_frames=8), fps=3)


# -- Times and metadata


def test_times_of_a_file_are_those_it_tells(tmp_path):
    milliseconds = [0, 40, 500, 540, 3000, 3100]
    path = write_clip(tmp_path / "uneven.mkv", 6, milliseconds=milliseconds)
    times = LlavaNextARVideoProcessor(size=SIZE)(path, return_tensors="pt")["video_timestamps"]
    torch.testing.assert_close(times, torch.tensor([milliseconds]) / 1000)
    assert times.dtype == torch.float32


def test_metadata(clip):
    processor = LlavaNextARVideoProcessor(size=SIZE, num_frames=3)
    assert "video_metadata" not in processor(clip)
    (of_file,) = processor(clip, return_metadata=True, video_backend="pyav")["video_metadata"]
    assert dict(of_file) == {
        "total_num_frames": 30,
        "fps": 10.0,
        "duration": pytest.approx(3.0),
        "video_backend": "pyav",
        "frames_indices": [0, 14, 29],
        "width": None,
        "height": None,
    }
    given = [[{"total_num_frames": 6, "fps": 3.0}], [VideoMetadata(total_num_frames=4, fps=8, duration=9.0)]]
    batch = processor([[frames(6)], [frames(4)]], video_metadata=given, return_metadata=True, return_tensors="pt")
    assert [entry.frames_indices for entry in batch["video_metadata"]] == [[0, 2, 5], [0, 1, 3]]
    assert [entry.duration for entry in batch["video_metadata"]] == [2.0, 9.0]
    torch.testing.assert_close(batch["video_timestamps"], torch.tensor([[0, 2 / 3, 5 / 3], [0, 1 / 8, 3 / 8]]))
    # without metadata, 2 frames a second, as LLaVA-NeXT takes it for frames without time
    assert processor(frames(6), return_tensors="pt")["video_timestamps"].tolist() == [[0.0, 1.0, 2.5]]


def test_frames_sampled_elsewhere_keep_their_times():
    metadata = {"total_num_frames": 100, "fps": 10.0, "frames_indices": [0, 20, 40, 60, 80, 99]}
    processor = LlavaNextARVideoProcessor(size=SIZE)
    for options, kept in (({"do_sample_frames": False}, [0, 20, 40, 60, 80, 99]), ({"num_frames": 3}, [0, 40, 99])):
        for video in (frames(6), list(map(Image.fromarray, frames(6)))):
            out = processor(video, video_metadata=metadata, return_metadata=True, return_tensors="pt", **options)
            assert out["video_metadata"][0].frames_indices == kept
            torch.testing.assert_close(out["video_timestamps"], torch.tensor([kept]) / 10)


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ([{"total_num_frames": 6}] * 2, ValueError, "1 videos were given, but 2 video_metadata entries"),
        ([], ValueError, "but 0 video_metadata entries"),
        ({"total_num_frames": 5}, ValueError, "describes 5 frames, but the video has 6.*frames_indices"),
        ({"total_num_frames": 9, "frames_indices": [1, 2]}, ValueError, "describes 2 frames"),
        (["fps"], TypeError, "dicts or VideoMetadata, got str"),
        ({"frame_indices": [1]}, ValueError, "unknown option 'frame_indices'.*did you mean 'frames_indices'"),
        *(
            (
                {name: value},
                ValueError,
                f"{name} in video_metadata must be a finite number above 0, or None, got {value!r}",
            )
            for name in ("fps", "duration")
            for value in (float("nan"), float("inf"), -1, 0, "3", True)
        ),
        *(
            (
                {name: value},
                ValueError,
                f"{name} in video_metadata must be a whole number above 0, or None, got {value!r}",
            )
            for name in ("total_num_frames", "width")
            for value in (0, -6, 6.5, "6")
        ),
        ({"total_num_frames": 9, "frames_indices": [0, 1, 2, 3, 4, 9]}, ValueError, "from 0 to 8, got 0 to 9"),
        ({"frames_indices": [-1, 0, 1, 2, 3, 4]}, ValueError, "in order of time, from 0, got -1 to 4"),
        ({"frames_indices": [0, 1, 2, 4, 3, 5]}, ValueError, "got 0 to 5, not in order"),
        ({"frames_indices": [0, 0.5, 1, 2, 3, 4]}, ValueError, "must be whole numbers, got"),
        ({"frames_indices": 3}, ValueError, "must be whole numbers, got 3"),
    ],
)
def test_metadata_must_fit_the_videos(metadata, error, message):
    with pytest.raises(error, match=message):
        pixels(frames(6), video_metadata=metadata)


def test_frames_of_a_longer_video_say_how_long_it_is_at_least():
    metadata = {"fps": 10.0, "frames_indices": torch.tensor([0, 20, 40, 60, 80, 99])}
    out = LlavaNextARVideoProcessor(size=SIZE)(frames(6), video_metadata=metadata, return_metadata=True)
    assert out["video_metadata"][0].total_num_frames == 100 and out["video_metadata"][0].duration == 10.0


# -- Sizes and shapes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (10, (10, 10)),
        ({"height": 6, "width": 9}, (6, 9)),
        ({"shortest_edge": 6}, (6, 8)),
        ({"shortest_edge": 24, "longest_edge": 20}, (15, 20)),
        ((5, 7), (5, 7)),
    ],
)
@pytest.mark.parametrize("at_construction", [True, False])
def test_sizes(size, expected, at_construction):
    video = frames(height=12, width=16)
    if at_construction:
        found = LlavaNextARVideoProcessor(size=size)(video, return_tensors="pt")["pixel_values_videos"]
    else:
        found = pixels(video, size=size)
    resized = resize_frames(torch.from_numpy(video).permute(0, 3, 1, 2), expected)
    assert torch.equal(found[0], pixels(resized, do_resize=False)[0])
    turned = pixels(video.transpose(0, 2, 1, 3), size=size)
    assert turned.shape[-2:] == (expected[::-1] if isinstance(size, dict) and "height" not in size else expected)


def test_an_int_is_a_square_unless_asked_otherwise(tmp_path):
    assert dict(LlavaNextARVideoProcessor(size=42).size) == {"height": 42, "width": 42}
    processor = LlavaNextARVideoProcessor(size=42, default_to_square=False)
    assert dict(processor.size) == {"shortest_edge": 42}
    processor.save_pretrained(tmp_path)
    assert dict(LlavaNextARVideoProcessor.from_pretrained(tmp_path, size=21).size) == {"shortest_edge": 21}


@pytest.mark.parametrize("crop", [(8, 10), (12, 16), (15, 9), (21, 30)])
def test_center_crop_is_that_of_transformers(crop):
    video = frames(height=12, width=16)
    found = pixels(video, do_resize=False, do_center_crop=True, crop_size={"height": crop[0], "width": crop[1]})
    expected = np.stack([center_crop(frame, crop) for frame in video])
    assert torch.equal(found, pixels(expected, do_resize=False))


def test_scales_are_each_resized_from_the_full_frames_decoded_once(clip, monkeypatch):
    calls = []
    monkeypatch.setattr(video_inputs, "load_video", lambda *a, **k: calls.append(a) or load_video(*a, **k))
    processor = LlavaNextARVideoProcessor(size=SIZE, num_frames=3, enable_multiscale=True, scale_factors=[0.5, 1, 0.3])
    batch = processor([clip, clip], return_tensors="pt")
    assert len(calls) == 2
    assert batch["pixel_values_videos"].shape == (2, 3, 3, 20, 24)
    assert [scale.shape[-2:] for scale in batch["pixel_values_videos_scales"]] == [(10, 12), (6, 7)]
    for scale, size in zip(batch["pixel_values_videos_scales"], ((10, 12), (6, 7)), strict=True):
        alone = processor(
            clip, size={"height": size[0], "width": size[1]}, enable_multiscale=False, return_tensors="pt"
        )
        assert torch.equal(scale[1], alone["pixel_values_videos"][0])
    frames_of_clip = decode_everything(clip).frames
    from_array = processor(frames_of_clip, return_tensors="pt")["pixel_values_videos_scales"]
    for scale, expected in zip(from_array, batch["pixel_values_videos_scales"], strict=True):
        assert torch.equal(scale[0], expected[0])
    assert "pixel_values_videos_scales" not in processor(clip, enable_multiscale=False)
    as_numpy = processor(clip, return_tensors="np")["pixel_values_videos_scales"]
    assert all(isinstance(scale, np.ndarray) for scale in as_numpy)


def test_forms_of_the_output():
    videos = [frames(4), frames(2, seed=1)]
    batch = LlavaNextARVideoProcessor(size=SIZE)(videos, return_tensors="pt")
    as_numpy = LlavaNextARVideoProcessor(size=SIZE)(videos, return_tensors="np")
    as_list = LlavaNextARVideoProcessor(size=SIZE)(videos)
    assert batch["video_frame_mask"].dtype == torch.bool
    for name, value in batch.items():
        np.testing.assert_array_equal(as_numpy[name], value.numpy())
        assert [len(part) for part in as_list[name]] == [4, 2]
        for part, whole in zip(as_list[name], value, strict=True):
            assert torch.equal(part, whole[: len(part)])
    last = pixels(videos, data_format="channels_last")
    assert torch.equal(last.permute(0, 1, 4, 2, 3), batch["pixel_values_videos"])


def test_videos_that_do_not_fit_into_one_tensor():
    videos = [frames(2), frames(2, height=20)]
    with pytest.raises(
        ValueError, match=r"different \[C, H, W\] \[\(3, 12, 16\), \(3, 20, 16\)\].*return_tensors=None"
    ):
        pixels(videos, do_resize=False)
    with pytest.raises(ValueError, match="different"):
        pixels(videos, size={"shortest_edge": 8})
    listed = LlavaNextARVideoProcessor()(videos, do_resize=False)["pixel_values_videos"]
    assert [tuple(video.shape) for video in listed] == [(2, 3, 12, 16), (2, 3, 20, 16)]
    with pytest.raises(ValueError, match=r"videos of \[2, 3\] frames cannot become one tensor with do_pad=False"):
        pixels([frames(2), frames(3)], do_pad=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frame": 4}, "unknown option 'num_frame'.*did you mean 'num_frames'"),
        ({"num_frames": "4"}, "num_frames"),
        ({"resize_backend": "opencv"}, "resize_backend"),
        ({"size": {"max_pixels": 4, "min_pixels": 1}}, "size must be"),
        ({"size": 0}, "size must be"),
        ({"resample": 1}, "resample must be 3"),
        ({"do_center_crop": True}, "crop_size"),
        ({"data_format": "channels_middle"}, "data_format"),
        ({"rescale_factor": 0.0}, "rescale_factor"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"image_mean": [0.5, 0.5]}, "image_mean has 2 values"),
        ({"scale_factors": [0.5], "enable_multiscale": True}, "scale_factors"),
        ({"scale_factors": [1.0, 2.0]}, "scale_factors"),
    ],
)
def test_wrong_options_are_refused_in_call_and_construction(options, message):
    with pytest.raises(ValueError, match=message):
        pixels(frames(), **options)
    if "image_mean" not in options:  # a video of another number of channels may come
        with pytest.raises(ValueError, match=message):
            LlavaNextARVideoProcessor(**options)


# -- Saving and loading


def test_saving_and_loading_keeps_every_option(tmp_path):
    processor = LlavaNextARVideoProcessor(
        size={"shortest_edge": 30}, fps=2.0, max_frames=5, resize_backend="pil", enable_multiscale=True,
        scale_factors=[1.0, 0.25], image_mean=[0.1, 0.2, 0.3], do_normalize=None,
    )  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    processor.save_pretrained(first)
    loaded = LlavaNextARVideoProcessor.from_pretrained(first)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.sampling == "fps" and loaded.do_normalize is None
    loaded.save_pretrained(second)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    video, metadata = frames(), {"total_num_frames": 6, "fps": 4.0}
    assert torch.equal(
        processor(video, video_metadata=metadata)["pixel_values_videos"][0],
        loaded(video, video_metadata=metadata)["pixel_values_videos"][0],
    )


@pytest.mark.parametrize(
    ("changes", "policy"),
    [({"fps": 4.0}, "fps"), ({"num_frames": 3}, "uniform"), ({"use_fast_slow_frames": True}, "fast_slow")],
)
def test_options_may_be_changed_when_loading(tmp_path, changes, policy):
    LlavaNextARVideoProcessor(fps=2.0, max_frames=5, size=30).save_pretrained(tmp_path)
    loaded = LlavaNextARVideoProcessor.from_pretrained(tmp_path, **changes)
    assert loaded.sampling == policy and dict(loaded.size) == {"height": 30, "width": 30}
    loaded(frames(), video_metadata={"total_num_frames": 6, "fps": 4.0})


@pytest.mark.parametrize(
    "kind", [{"video_processor_type": "LlavaOnevisionVideoProcessor"}, {"image_processor_type": "X"}]
)
def test_of_another_processors_file_the_pixel_options_are_taken(tmp_path, kind):
    file = {**kind, "size": {"height": 30, "width": 30}, "image_mean": [0.4] * 3, "do_sample_frames": False, "odd": 1}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(file))
    loaded = LlavaNextARVideoProcessor.from_pretrained(tmp_path)
    assert dict(loaded.size) == {"height": 30, "width": 30} and list(loaded.image_mean) == [0.4] * 3
    assert loaded.do_sample_frames  # else every frame of a file would be read


def test_the_auto_class_loads_it_from_a_folder(tmp_path):
    processor = LlavaNextARVideoProcessor(size=SIZE, num_frames=3)
    processor.save_pretrained(tmp_path / "saved")
    loaded = AutoVideoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(loaded).__name__ == "LlavaNextARVideoProcessor" and type(loaded) is not LlavaNextARVideoProcessor
    assert torch.equal(
        loaded(frames(), return_tensors="pt")["pixel_values_videos"],
        processor(frames(), return_tensors="pt")["pixel_values_videos"],
    )
    loaded.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "saved").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_model_input_names_are_the_keys_of_a_call(clip):
    for options in ({}, {"use_fast_slow_frames": True}, {"enable_multiscale": True}):
        processor = LlavaNextARVideoProcessor(size=SIZE, **options)
        assert set(processor(clip, return_tensors="pt")) == set(processor.model_input_names)


def test_instances_do_not_share_their_defaults():
    first, second = LlavaNextARVideoProcessor(), LlavaNextARVideoProcessor()
    first.scale_factors.append(0.1)
    first.size["height"] = 1
    assert second.scale_factors == [1.0, 0.75, 0.5] and second.size["height"] == 384
