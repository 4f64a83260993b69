"""Frame sampling: LLaVA-NeXT's own numbers, the promises for short clips, and the refusals."""

import numpy as np
import pytest
from golden_data import parametrize_golden
from hypothesis import given
from hypothesis import strategies as st
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from llava_next_ar.processing.frame_sampling import (
    FAST,
    SAMPLING_POLICIES,
    SLOW,
    FrameSampling,
    llava_video_times,
    time_instruction,
)

counts = st.integers(1, 80)
totals = st.integers(1, 2000)
rates = st.sampled_from([0.5, 1.0, 7.5, 10.0, 23.976, 24.0, 25.0, 29.97, 30.0, 60.0])


def select(policy: str, total: int, native_fps: float | None = None, **settings) -> list[int]:
    return FrameSampling(policy=policy, **settings).select(total, native_fps).indices.tolist()


# -- LLaVA-NeXT


@parametrize_golden("frame_sampling", "")
def test_llava_video_reproduces_process_video_with_decord(case):
    expected = case["process_video_with_decord"]
    settings = {
        "fps": case["video_fps"],
        "max_frames": case["max_frames"] or None,
        "force_sample": case["force_sample"],
    }
    sampling = FrameSampling(policy="llava_video", **settings)
    if "error" in expected:
        with pytest.raises(ValueError, match="fps"):
            sampling.select(case["n_frames"], case["avg_fps"])
        return
    assert sampling.select(case["n_frames"], case["avg_fps"]).indices.tolist() == expected["frame_idx"]
    times = llava_video_times(case["n_frames"], case["avg_fps"], **settings)
    assert ",".join(f"{time:.2f}s" for time in times) == expected["frame_time"]
    if "time_instruction" in case:
        assert time_instruction(case["n_frames"] / case["avg_fps"], times) == case["time_instruction"]


@parametrize_golden("frame_sampling", "pyav")
def test_llava_video_pyav_reproduces_process_video_with_pyav(case):
    sampling = FrameSampling(policy="llava_video_pyav", fps=case["video_fps"], max_frames=case["max_frames"] or None)
    if "error" in case:
        with pytest.raises(ValueError):
            sampling.select(case["n_frames"], case["fps"])
        return
    assert sampling.select(case["n_frames"], case["fps"]).indices.tolist() == case["frame_idx"]


@parametrize_golden("frame_sampling", "frame_folder")
def test_llava_frame_folder_reproduces_training_on_folders(case):
    total = case["n_frame_files"]
    indices = FrameSampling(
        policy="llava_frame_folder", max_frames=case["frames_upbound"], force_sample=case["force_sample"]
    ).select(total)
    assert indices.indices.tolist() == case["frame_idx"]
    assert time_instruction(total / 2, indices.indices / 2) in case["train_user_turn"]


@given(total=totals, native=rates, fps=st.floats(0.1, 90))
def test_the_fps_policy_is_that_of_transformers(total, native, fps):
    metadata = VideoMetadata(total_num_frames=total, fps=native)
    if max(1, int(total / native * fps)) <= total:
        assert select("fps", total, native, fps=fps) == default_sample_indices_fn(metadata, fps=fps).tolist()
    else:  # transformers refuses; a data set of mixed frame rates should not stop for that
        assert select("fps", total, native, fps=fps) == list(range(total))


def test_time_instruction_word_for_word():
    assert time_instruction(12.345, [0.0, 1.005, 2]) == (
        "The video lasts for 12.35 seconds, and 3 frames are uniformly sampled from it. These frames are located at "
        "0.00s,1.00s,2.00s.Please answer the following questions related to this video."
    )


# -- Policies by example


def test_uniform():
    assert select("uniform", 300, num_frames=8) == [0, 42, 85, 128, 170, 213, 256, 299]
    assert select("uniform", 5, num_frames=8) == [0, 1, 2, 3, 4], "a short clip gives each of its frames once"
    assert select("uniform", 100, num_frames=1) == [0]


def test_num_frames():
    assert select("num_frames", 10, num_frames=4) == [0, 2, 5, 7]
    with pytest.raises(ValueError, match="num_frames=11 is more than the 10 frames"):
        select("num_frames", 10, num_frames=11)


def test_fps():
    assert select("fps", 120, 30.0, fps=1) == [0, 30, 60, 90]
    assert select("fps", 120, 30.0, fps=1, max_frames=3) == [0, 40, 80], "spread over the clip"
    assert select("fps", 4, 30.0, fps=1) == [0]
    assert select("fps", 4, 30.0, fps=120) == [0, 1, 2, 3], "no more than there is"
    with pytest.raises(ValueError, match="native_fps=None"):
        select("fps", 100, None, fps=1)


def test_every_nth():
    assert select("every_nth", 20, sample_rate=6) == [0, 6, 12, 18]
    assert select("every_nth", 100, sample_rate=10, max_frames=4) == [0, 30, 60, 90], "thinned among the n-th frames"
    assert select("every_nth", 3, sample_rate=6) == [0]


def test_fast_slow():
    sampled = FrameSampling(policy="fast_slow", num_fast=3, fast_stride=2, num_slow=4, slow_stride=5).select(40)
    assert sampled.indices.tolist() == [0, 10, 20, 35, 37, 39]
    assert sampled.frame_types == (SLOW, SLOW, SLOW, SLOW, FAST, FAST), "35 is in both, hence slow"
    sampled = FrameSampling(policy="fast_slow").select(3)
    assert (sampled.indices.tolist(), sampled.frame_types) == ([0, 1, 2], (SLOW, FAST, FAST))


# -- Policies by property


@given(total=totals, num=counts)
def test_uniform_is_sorted_distinct_and_reaches_both_ends(total, num):
    indices = select("uniform", total, num_frames=num)
    assert len(indices) == min(total, num)
    assert indices == sorted(set(indices))
    assert indices[0] == 0 and (len(indices) == 1 or indices[-1] == total - 1)
    gaps = np.diff(indices)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@given(total=totals, num=counts)
def test_num_frames_is_what_it_says(total, num):
    if num > total:
        with pytest.raises(ValueError, match=f"num_frames={num}"):
            select("num_frames", total, num_frames=num)
    else:
        indices = select("num_frames", total, num_frames=num)
        assert len(indices) == num and indices[0] == 0 and indices == sorted(set(indices)) and indices[-1] < total


@given(total=totals, native=rates, fps=st.floats(0.1, 90), limit=st.none() | counts)
def test_fps_gaps_and_limit(total, native, fps, limit):
    indices = select("fps", total, native, fps=fps, max_frames=limit)
    assert indices[0] == 0 and indices[-1] < total and indices == sorted(set(indices))
    wanted = max(1, int(total / native * fps))
    assert len(indices) == min(wanted, total, total if limit is None else limit)
    gaps = np.diff(indices)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@given(total=totals, rate=st.integers(1, 50), limit=st.none() | counts)
def test_every_nth_takes_nothing_but_nth_frames(total, rate, limit):
    indices = select("every_nth", total, sample_rate=rate, max_frames=limit)
    assert all(index % rate == 0 and index < total for index in indices) and indices == sorted(set(indices))
    available = -(-total // rate)
    assert len(indices) == (available if limit is None else min(limit, available))


@given(total=totals, num_fast=counts, fast=st.integers(1, 20), num_slow=counts, slow=st.integers(1, 50))
def test_fast_slow_invariants(total, num_fast, fast, num_slow, slow):
    sampled = FrameSampling(
        policy="fast_slow", num_fast=num_fast, fast_stride=fast, num_slow=num_slow, slow_stride=slow
    ).select(total)
    indices, types = sampled.indices, np.array(sampled.frame_types)
    assert len(types) == len(indices) and indices.min() >= 0 and indices.max() == total - 1
    assert np.all(np.diff(indices) > 0), "time runs backwards"
    slow_frames = indices[types == SLOW]
    assert len(slow_frames) == min(num_slow, -(-total // slow)) and slow_frames[0] == 0
    assert np.all(np.diff(slow_frames) >= slow) and np.all(slow_frames % slow == 0)
    all_fast = {total - 1 - fast * step for step in range(num_fast) if total - 1 - fast * step >= 0}
    assert set(indices[types == FAST].tolist()) == all_fast - set(slow_frames.tolist())


@given(total=totals, native=rates, limit=counts, data=st.data())
def test_every_policy_stays_inside_the_clip_and_in_order(total, native, limit, data):
    policy = data.draw(st.sampled_from(sorted(SAMPLING_POLICIES)))
    needed = {"fps": {"fps": 0.25}, "every_nth": {"sample_rate": 7}, "llava_video": {"fps": 0.25, "max_frames": limit}}
    needed["llava_video_pyav"] = {"fps": 0.25}
    needed["fps_time"] = {"fps": 0.25, "max_frames": limit}
    try:
        costs = np.random.default_rng(total).random(total).round(1)
        sampled = FrameSampling(policy=policy, num_frames=limit, **needed.get(policy, {})).select(
            total, native, costs=costs
        )
    except ValueError:
        assert policy == "num_frames" and limit > total or policy == "llava_video_pyav" and total == 1
        return
    assert sampled.indices.dtype == np.int64 and len(sampled.indices) >= 1
    assert sampled.indices.min() >= 0 and sampled.indices.max() < total and np.all(np.diff(sampled.indices) >= 0)


# -- Policies by time

SLOW_THEN_FAST = np.concatenate([np.arange(41) / 20.5, 2 + np.arange(6) * 8 / 5])  # 41 frames in 2 s, 6 in the next 8


def by_time(policy: str, times: np.ndarray, **settings) -> list[int]:
    return FrameSampling(policy=policy, **settings).select(len(times), None, times).indices.tolist()


def test_frames_per_second_of_a_variable_rate():
    """By index, fps=1 takes most of its frames from the busy first two seconds (decord#26, lerobot#3513)."""
    rate = len(SLOW_THEN_FAST) / 10
    by_index = select("fps", len(SLOW_THEN_FAST), rate, fps=1)
    assert sum(SLOW_THEN_FAST[by_index] < 2) > 7
    chosen = by_time("fps_time", SLOW_THEN_FAST, fps=1)
    assert sum(SLOW_THEN_FAST[chosen] < 2) == 2
    assert chosen == [0, 20, 41, 42, 43, 44, 45, 46], "on show at 0, 1, ..., 10 s, each once"
    assert by_time("fps_time", SLOW_THEN_FAST, fps=1, max_frames=3) == [0, 43, 46]


def test_uniform_in_time():
    chosen = by_time("uniform_time", SLOW_THEN_FAST, num_frames=6)
    assert chosen == [0, 41, 42, 43, 45, 46], "nearest to 0, 2, 4, ..., 10 s, the earlier of two"
    assert by_time("uniform_time", SLOW_THEN_FAST, num_frames=99) == list(range(47))
    assert by_time("uniform_time", SLOW_THEN_FAST, num_frames=1) == [0]
    assert by_time("uniform_time", np.zeros(4), num_frames=2) == [0, 1], "no times at all"


@given(gaps=st.lists(st.floats(0, 100), min_size=0, max_size=60), num=counts, fps=st.floats(0.1, 90))
def test_policies_by_time_take_distinct_frames_in_order(gaps, num, fps):
    times = np.cumsum([0.0, *gaps])
    chosen = by_time("uniform_time", times, num_frames=num)
    assert len(chosen) == min(num, len(times)) and chosen == sorted(set(chosen)) and chosen[0] == 0
    chosen = by_time("fps_time", times, fps=fps)
    assert chosen == sorted(set(chosen)) and 0 <= chosen[0] and chosen[-1] < len(times)
    ticks = np.arange(len(times)) / fps
    for index in chosen:  # each is on show at a tick
        end = times[index + 1] if index + 1 < len(times) else np.inf
        first = np.ceil((times[index] - 2e-6) * fps) / fps
        assert first < end + 1e-5 or not ticks.size


@given(total=totals, native=rates, num=counts)
def test_policies_by_time_are_those_by_index_at_a_constant_rate(total, native, num):
    even = select("uniform_time", total, native, num_frames=num)
    assert np.abs(np.array(even) - select("uniform", total, native, num_frames=num)).max() <= 1
    step = int(max(1, native // 5))
    if native == int(native):
        taken = select("fps_time", total, native, fps=native / step)
        assert taken == list(range(0, total, step))


def test_policies_by_time_need_times_or_a_rate():
    with pytest.raises(ValueError, match="policy 'fps_time' needs the frame rate"):
        select("fps_time", 10, None, fps=1)
    with pytest.raises(ValueError, match="times must be 3 finite seconds that do not decrease"):
        FrameSampling(policy="uniform_time", num_frames=2).select(3, 1.0, np.array([0.0, 2.0, 1.0]))


# -- Clips that are too short


@pytest.mark.parametrize("policy", ["uniform", "num_frames", "uniform_time"])
def test_a_short_clip_gives_all_its_frames_or_an_error_as_is_chosen(policy):
    assert select(policy, 8, 10.0, num_frames=32, short_clip="all") == list(range(8))
    with pytest.raises(ValueError, match=f"num_frames=32 is more than the 8 frames of the video.*{policy}"):
        select(policy, 8, 10.0, num_frames=32, short_clip="error")
    assert select(policy, 8, 10.0, num_frames=8, short_clip="error") == list(range(8))


def test_max_frames_can_be_required_too():
    assert select("fps", 80, 10.0, fps=1, max_frames=32) == list(range(0, 80, 10))
    with pytest.raises(ValueError, match="max_frames=32 is more than .* takes 8"):
        select("fps", 80, 10.0, fps=1, max_frames=32, short_clip="error")


# -- Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "random"}, "policy='random' is not one of uniform, num_frames, fps"),
        ({"num_frames": 0}, "num_frames=0 must be an integer of at least 1"),
        ({"num_frames": 7.5}, "num_frames=7.5 must be an integer"),
        ({"num_frames": True}, "num_frames=True must be an integer"),
        ({"policy": "fps"}, "fps=None, but policy='fps' needs fps"),
        ({"policy": "fps", "fps": 0}, "fps=0 must be a finite number above 0"),
        ({"policy": "fps", "fps": float("nan")}, "fps=nan must be a finite number"),
        ({"policy": "fps", "fps": 2, "max_frames": -1}, "max_frames=-1 must be an integer of at least 1"),
        ({"policy": "fps", "fps": 2, "sample_rate": 3}, "sample_rate=3 has no effect with policy='fps'"),
        ({"policy": "uniform", "fps": 2.0}, "fps=2.0 has no effect with policy='uniform', which reads num_frames"),
        ({"policy": "num_frames", "max_frames": 4}, "max_frames=4 has no effect"),
        ({"policy": "every_nth"}, "sample_rate=None, but policy='every_nth' needs"),
        ({"policy": "fast_slow", "slow_stride": 0}, "slow_stride=0 must be"),
        ({"policy": "fast_slow", "force_sample": True}, "force_sample=True has no effect"),
        ({"short_clip": "repeat"}, "short_clip='repeat' is not one of all, error"),
        ({"policy": "fast_slow", "short_clip": "error"}, "short_clip='error' has no effect with policy='fast_slow'"),
        ({"policy": "fps", "fps": 2, "short_clip": "error"}, "short_clip='error' has no effect .* without max_frames"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FrameSampling(**settings)


def test_an_empty_clip_is_refused():
    with pytest.raises(ValueError, match="total_frames=0"):
        FrameSampling().select(0, 30.0)
