"""Suggestions for unknown names."""

import pytest

from llava_next_ar.configuration.key_names import keep_unknown, nearest_name, refuse_misspelt, refuse_unknown

VIDEO_OPTIONS = ["fps", "num_frames", "max_frames", "sample_rate", "video_backend", "videos_kwargs", "video_metadata"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("num_frame", "num_frames"),
        ("nframes", "num_frames"),
        ("frames_num", "num_frames"),  # the same words
        ("video_fps", "fps"),  # `videos_kwargs` shares more letters, and means something else
        ("backend", "video_backend"),
        ("metadata", "video_metadata"),
        ("xyzzy", None),
        ("", None),
    ],
)
def test_nearest_name(name, nearest):
    assert nearest_name(name, VIDEO_OPTIONS, cutoff=0.6) == nearest


def test_the_nearest_of_none():
    assert nearest_name("a", []) is None
    assert nearest_name("xyzzy", VIDEO_OPTIONS) in VIDEO_OPTIONS


def test_unknown_names_raise_with_a_suggestion():
    refuse_unknown(["fps"], VIDEO_OPTIONS, "a test")
    with pytest.raises(ValueError, match="^unknown option 'fsp' for a test; did you mean 'fps'\\?$"):
        refuse_unknown(["fps", "fsp"], VIDEO_OPTIONS, "a test")
    with pytest.raises(ValueError, match="^unknown option 'x' for a test; known are: a, b$"):
        refuse_unknown(["x"], {"b", "a"}, "a test")
    with pytest.raises(ValueError, match="^unknown option 'num_frame' for a test; 'num_frames' belongs in a video$"):
        refuse_unknown(["num_frame"], {"length"}, "a test", {"a video": VIDEO_OPTIONS})


def test_names_that_are_not_near_pass_where_they_may_be_meant_for_others():
    refuse_misspelt(["eos_token", "xyzzy", "num_frames"], ["video_token", "num_frames"], "a test")
    with pytest.raises(ValueError, match="unknown option 'vidio_token' for a test; did you mean 'video_token'"):
        refuse_misspelt(["vidio_token"], ["video_token"], "a test")
    with pytest.raises(ValueError, match="'num_frames' belongs in a video"):
        refuse_misspelt(["num_frames"], ["video_token"], "a test", {"a video": VIDEO_OPTIONS})


def test_a_kept_key_cannot_hide_a_member():
    class Target:
        default = 1
        size = property(lambda self: 3)

        def method(self): ...

        @classmethod
        def build(cls): ...

    target = Target()
    keep_unknown(target, {"default": 2, "other": None}, "a file")
    assert (target.default, target.other) == (2, None)
    for name in ("size", "method", "build", "__init__"):
        with pytest.raises(ValueError, match=f"key '{name}' in a file is the name of a method or property of Target"):
            keep_unknown(target, {name: 1}, "a file")
