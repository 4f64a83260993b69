"""Odd files against the ffmpeg command: committed tiny ones everywhere, the whole corpus where that command is."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from llava_next_ar.experiments.benchmarks.video_corpus import (
    CLOSE,
    EXACT,
    TIME_TOLERANCE,
    compare,
    decode_with,
    decode_with_ffmpeg,
    entries,
    find_ffmpeg,
    write,
)
from llava_next_ar.processing.video_decoding import VideoReadError, choose_backend
from llava_next_ar.processing.video_frames import FrameSampling, load_video

SAMPLES = Path(__file__).parents[1] / "corpus"
EXPECTED = json.loads((SAMPLES / "expected.json").read_text())
MISSING = {"cut_h265radl_8.ts": 6}  # all others are whole


def require(backend: str) -> None:
    try:
        choose_backend(backend)
    except ImportError as error:
        pytest.skip(str(error))


def assert_as_expected(name: str, decoded, missing: int) -> None:
    expected = EXPECTED[name]
    assert list(decoded.size) == expected["size"]
    np.testing.assert_allclose(decoded.times, expected["times"], atol=TIME_TOLERANCE)
    blocks = np.array([list(map(float, frame.split())) for frame in expected["blocks"]])
    found = decoded.blocks[:, ::3, ::3].reshape(len(decoded.times), -1)
    assert np.abs(found - blocks).max() <= (EXACT if expected["is_exact"] else CLOSE) + 0.5
    assert missing == MISSING.get(name, 0)


@pytest.mark.parametrize("name", EXPECTED)
def test_pyav_reads_odd_files_as_ffmpeg_does(name):
    assert_as_expected(name, *decode_with("pyav", SAMPLES / name))


@pytest.mark.parametrize("name", EXPECTED)
def test_single_frames_of_odd_files_are_those_of_all_frames(name):
    """Seeking gives what reading from the start gives."""
    whole = load_video(SAMPLES / name, backend="pyav", allow_partial=True)
    for number in (2, 5):
        some = load_video(SAMPLES / name, FrameSampling(num_frames=number), backend="pyav", allow_partial=True)
        assert np.array_equal(some.frames, whole.frames[some.indices])
        assert np.array_equal(some.timestamps, whole.timestamps[some.indices])


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
@pytest.mark.parametrize("name", EXPECTED)
def test_other_back_ends_give_the_same_or_name_themselves(name, backend):
    require(backend)
    try:
        decoded, missing = decode_with(backend, SAMPLES / name)
    except VideoReadError as error:
        assert backend in error.cause or "pyav" in error.cause
    else:
        assert_as_expected(name, decoded, missing)


def test_the_samples_hold_every_kind():
    assert set(EXPECTED) == {entry.name for entry in entries() if entry.is_sample}
    assert len({tuple(expected["times"]) for expected in EXPECTED.values()}) > 4


@pytest.mark.slow
@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_the_whole_corpus(entry, tmp_path, caplog):
    ffmpeg = find_ffmpeg()
    if ffmpeg is None:
        pytest.skip("no ffmpeg command; pip install imageio-ffmpeg")
    caplog.set_level(logging.ERROR)
    path = write(entry, ffmpeg, tmp_path)
    reference = decode_with_ffmpeg(entry, ffmpeg, path)
    verdict, remark = compare(entry, reference, "pyav", path)
    assert verdict in ("ok", "partial"), remark
    for backend in ("decord", "torchcodec"):
        try:
            choose_backend(backend)
        except ImportError:
            continue
        verdict, remark = compare(entry, reference, backend, path)
        assert verdict != "DIFFERS", f"{backend}: {remark}"
