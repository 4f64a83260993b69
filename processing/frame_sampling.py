# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Policies that choose which frames of a clip the model sees.

Each policy is a pure function from the length of a clip (and its frame rate or times) to frame indices. `FrameSampling`
is the validated choice of one policy with its settings:

    FrameSampling(policy="uniform", num_frames=8).select(total_frames=300, native_fps=30.0).indices
    # array([  0,  42,  85, 128, 170, 213, 256, 299])

Most policies count frames. `uniform_time` and `fps_time` use presentation times; the results differ where the frame rate
varies. `codec` uses the bytes of coded frames, a baseline at no cost. The three `llava_*` policies reproduce LLaVA-NeXT
(https://github.com/LLaVA-VL/LLaVA-NeXT), frame for frame.

A clip with fewer frames than requested gives each of its frames once; with `short_clip="error"` it raises ValueError, the
default of the policy `num_frames`, which samples as transformers does. Only `force_sample` and
`llava_frame_folder` repeat frames, as LLaVA-NeXT does.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

_SAME_TIME = 1e-6  # seconds: tolerance for the rounding of times and limits
# Settings that every policy takes.
_OF_ANY_POLICY = ("policy", "short_clip", "video_start", "video_end")
SLOW, FAST = 0, 1  # as `FrameType` in frame_token_layout.py


# Arguments by position: the clip, by its rate, `times` [total_frames] in seconds, or `costs` [total_frames]. By name: the
# keys of `FrameSampling` that the policy reads; those without a default must be set.


def uniform(total_frames: int, native_fps: float | None, *, num_frames: int) -> np.ndarray:
    """`num_frames` evenly spaced frames, the first and the last among them. A shorter clip gives each of its
    frames once."""
    if total_frames <= num_frames:
        return np.arange(total_frames)
    return _spread(total_frames, num_frames)


def starts_of_parts(total_frames: int, native_fps: float | None, *, num_frames: int) -> np.ndarray:
    """`num_frames` frames, each at the start of one of as many equal parts, as transformers samples. A shorter
    clip gives each of its frames once."""
    num_frames = min(num_frames, total_frames)
    return np.arange(num_frames) * total_frames // num_frames


def frames_per_second(
    total_frames: int, native_fps: float | None, *, fps: float, max_frames: int | None = None
) -> np.ndarray:
    """`fps` times the duration of the clip, at most `max_frames` and at most all frames, each at the start of one of as
    many equal parts, as transformers samples. A short clip gives at least its first frame. (`llava_video` takes every
    n-th frame instead.)"""
    num_frames = max(1, int(total_frames / _known("fps", native_fps) * fps))
    num_frames = min(num_frames, total_frames, total_frames if max_frames is None else max_frames)
    return starts_of_parts(total_frames, native_fps, num_frames=num_frames)


def uniform_time(total_frames: int, times: np.ndarray, *, num_frames: int) -> np.ndarray:
    """`num_frames` frames nearest to as many times, evenly spaced from the first frame to the last, none of them
    twice. A shorter clip gives each of its frames once."""
    if total_frames <= num_frames:
        return np.arange(total_frames)
    wanted = np.linspace(times[0], times[-1], num_frames)
    after = np.searchsorted(times, wanted).clip(1, total_frames - 1)
    nearest = np.where(wanted - times[after - 1] <= times[after] - wanted, after - 1, after)
    # Where several times share a frame, take its neighbours: indices rise by at least 1, and leave room for the rest.
    positions = np.arange(num_frames)
    rising = np.maximum.accumulate(nearest - positions) + positions
    return np.minimum(rising, total_frames - num_frames + positions)


def frames_per_second_time(
    total_frames: int, times: np.ndarray, *, fps: float, max_frames: int | None = None
) -> np.ndarray:
    """The frames shown at all multiples of 1 / `fps` seconds, each once, however long it is shown. More than `max_frames`
    of them are replaced by `max_frames` frames of `uniform_time`. A short clip gives at least its first frame."""
    last = times[-1] - times[0]
    ticks = times[0] + np.arange(int(min(last * fps + 1e-6, 2**24)) + 1) / fps
    indices = np.unique(np.searchsorted(times, ticks + 1e-6, side="right") - 1)
    if max_frames is None or len(indices) <= max_frames:
        return indices
    return uniform_time(total_frames, times, num_frames=max_frames)


def codec(total_frames: int, costs: np.ndarray, *, num_frames: int) -> np.ndarray:
    """The first frame, and the `num_frames` - 1 others on which the codec spent most for their picture type
    (`coding_costs`), after LLaVA-OneVision-2 (arXiv 2605.25979). Of equal costs the earlier. A clip that has no more gives
    each of its frames once."""
    most = np.argsort(-costs[1:], kind="stable")[: num_frames - 1] + 1
    return np.sort(np.append(most, 0))


def every_nth(
    total_frames: int, native_fps: float | None, *, sample_rate: int, max_frames: int | None = None
) -> np.ndarray:
    """Every `sample_rate`-th frame, evenly thinned to `max_frames`. A short clip gives at least its first frame."""
    indices = np.arange(0, total_frames, sample_rate)
    if max_frames is None or len(indices) <= max_frames:
        return indices
    return indices[_spread(len(indices), max_frames)]


def fast_slow(
    total_frames: int,
    native_fps: float | None,
    *,
    num_fast: int,
    fast_stride: int,
    num_slow: int,
    slow_stride: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Fast: the last `num_fast` frames `fast_stride` apart, up to the last one. Slow: `num_slow` frames over the
    clip, at least `slow_stride` apart. Returns their union in order of time and its types; a frame in both is slow.
    A short clip gives as many of each as fit."""
    fast = np.arange(total_frames - 1, -1, -fast_stride)[:num_fast]
    slow = np.arange(0, total_frames, slow_stride)
    if len(slow) > num_slow:
        slow = slow[_spread(len(slow), num_slow)]
    indices = np.union1d(fast, slow)
    return indices, np.where(np.isin(indices, slow), SLOW, FAST)


def llava_video(
    total_frames: int,
    native_fps: float | None,
    *,
    fps: float,
    max_frames: int | None = None,
    force_sample: bool = False,
) -> np.ndarray:
    """LLaVA-NeXT's `process_video_with_decord`: every n-th frame, n = round(native_fps / fps); more than
    `max_frames` of them are replaced by `max_frames` evenly spaced frames of the clip, with `force_sample` always, so
    that a short clip repeats frames. Raises ValueError where the original fails: fps above twice the clip's own."""
    step = _llava_step(_known("llava_video", native_fps), fps)
    if force_sample and max_frames is not None:
        return _spread(total_frames, max_frames)
    return _at_most(np.arange(0, total_frames, step), max_frames, total_frames)


def llava_video_times(
    total_frames: int,
    native_fps: float,
    *,
    fps: float,
    max_frames: int | None = None,
    force_sample: bool = False,
) -> np.ndarray:
    """Seconds `[T]` that LLaVA-NeXT puts into its time instruction for the frames of `llava_video`.

    They are right if frames were thinned to `max_frames`. Otherwise the original divides by its stride and not by the
    frame rate, so that frames are 0, 1, 2, ... "seconds" apart whatever `fps` is. Use them for prompts like those
    in the training of the released models; elsewhere use the timestamps of the video.
    """
    indices = llava_video(total_frames, native_fps, fps=fps, max_frames=max_frames, force_sample=force_sample)
    step = _llava_step(native_fps, fps)
    every_nth = len(range(0, total_frames, step))
    thinned = max_frames is not None and (force_sample or every_nth > max_frames)
    return indices / (native_fps if thinned else step)


def llava_video_pyav(
    total_frames: int, native_fps: float | None, *, fps: float, max_frames: int | None = None
) -> np.ndarray:
    """LLaVA-NeXT's `process_video_with_pyav`, which uses the last frame's time as the duration and so overestimates the
    frame rate. Raises ValueError where the original fails, a clip of one frame included."""
    if total_frames == 1:
        raise ValueError("llava_video_pyav needs two frames for the frame rate, got one")
    duration = (total_frames - 1) / _known("llava_video_pyav", native_fps)
    return _at_most(np.arange(0, total_frames, _llava_step(total_frames / duration, fps)), max_frames, total_frames)


def llava_frame_folder(
    total_frames: int,
    native_fps: float | None,
    *,
    max_frames: int | None = None,
    force_sample: bool = False,
) -> np.ndarray:
    """LLaVA-NeXT's training on folders of frames: 10 evenly spaced ones, or `max_frames` with `force_sample`. A short
    clip repeats frames."""
    return _spread(total_frames, max_frames if force_sample and max_frames is not None else 10)


SAMPLING_POLICIES: dict[str, Callable[..., np.ndarray | tuple[np.ndarray, np.ndarray]]] = {
    "uniform": uniform,
    "num_frames": starts_of_parts,
    "fps": frames_per_second,
    "uniform_time": uniform_time,
    "fps_time": frames_per_second_time,
    "codec": codec,
    "every_nth": every_nth,
    "fast_slow": fast_slow,
    "llava_video": llava_video,
    "llava_video_pyav": llava_video_pyav,
    "llava_frame_folder": llava_frame_folder,
}


SHORT_CLIPS = ("all", "error")


@dataclass(frozen=True)
class SampledFrames:
    """Attributes:
    indices: `[T]` int64, in order of time.
    frame_types: 0 (slow) or 1 (fast) for each; None if the policy has no types.
    """

    indices: np.ndarray
    frame_types: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """One policy of `SAMPLING_POLICIES`, documented in its docstring, with its settings.

    `fps`, `max_frames`, `sample_rate` and `force_sample` raise ValueError where the policy would ignore them.

    Attributes:
        policy: a key of `SAMPLING_POLICIES`.
        num_frames: read by `uniform`, `num_frames`, `uniform_time` and `codec`.
        fps: frames wanted per second of video; read by `fps` and `llava_*`.
        max_frames: upper limit; None for unlimited.
        sample_rate: stride of `every_nth` in frames.
        fast_stride, slow_stride, num_fast, num_slow: read by `fast_slow`.
        force_sample: let `llava_*` repeat frames of short clips.
        short_clip: `"all"` or `"error"`: result for a clip from which the policy takes fewer frames than `num_frames`,
            or than `max_frames` for policies that read it. None is `"error"` for policy `num_frames`, else `"all"`.
        video_start, video_end: seconds; limits of the clip that the policy samples, both included.

    Raises:
        ValueError: for a value out of range, a required setting that is missing, or a setting that the policy ignores.
    """

    policy: str = "uniform"
    num_frames: int = 16
    fps: float | None = None
    max_frames: int | None = None
    sample_rate: int | None = None
    fast_stride: int = 1
    slow_stride: int = 4
    num_fast: int = 8
    num_slow: int = 8
    force_sample: bool = False
    short_clip: str | None = None
    video_start: float | None = None
    video_end: float | None = None

    def __post_init__(self) -> None:
        if self.policy not in SAMPLING_POLICIES:
            raise ValueError(f"policy={self.policy!r} is not one of {', '.join(SAMPLING_POLICIES)}")
        read = _settings_of(self.policy)
        if self.short_clip not in (None, *SHORT_CLIPS):
            raise ValueError(f"short_clip={self.short_clip!r} is not one of {', '.join(SHORT_CLIPS)}")
        start, end = self.video_start, self.video_end
        for key, value in (("video_start", start), ("video_end", end)):
            if value is not None and (isinstance(value, (bool, str)) or not 0 <= value < float("inf")):
                raise ValueError(f"{key}={value!r} must be a finite number of seconds, 0 or more")
        if end is not None and end < (start or 0):
            raise ValueError(f"video_end={end!r} lies before video_start={start!r}")
        for key in (field.name for field in fields(self) if field.name not in _OF_ANY_POLICY):
            value = getattr(self, key)
            if value is None or value is False:
                if key in read and read[key].default is inspect.Parameter.empty:
                    raise ValueError(f"{key}={value!r}, but policy={self.policy!r} needs {key} to be set")
            elif key == "fps":
                if not 0 < value < float("inf"):
                    raise ValueError(f"fps={value!r} must be a finite number above 0")
            elif key == "force_sample":
                if value is not True:
                    raise ValueError(f"force_sample={value!r} must be True or False")
            elif isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{key}={value!r} must be an integer of at least 1")
            if value and key not in read and key in ("fps", "max_frames", "sample_rate", "force_sample"):
                raise ValueError(
                    f"{key}={value!r} has no effect with policy={self.policy!r}, which reads {', '.join(read)}"
                )
        if self.short_clip == "error" and self._asked() is None:
            raise ValueError(f"short_clip='error' has no effect with policy={self.policy!r} without max_frames")

    def _asked(self) -> int | None:
        """Requested number of frames, if it does not depend on the clip."""
        return self.num_frames if "num_frames" in _settings_of(self.policy) else self.max_frames

    @property
    def needs_times(self) -> bool:
        """True if the choice depends on times or costs of frames, beyond their number and rate."""
        return _goes_by(self.policy) != "native_fps" or bool(self.video_start) or self.video_end is not None

    def select(
        self,
        total_frames: int,
        native_fps: float | None = None,
        times: np.ndarray | None = None,
        costs: np.ndarray | None = None,
    ) -> SampledFrames:
        """Choose among the frames 0 ... total_frames - 1 of a clip.

        Args:
            native_fps: frames per second, for policies that use it.
            times: `[total_frames]` seconds, not decreasing, for policies by time and for
                `video_start` and `video_end`. None: evenly spaced at `native_fps`.
            costs: `[total_frames]`, for `codec`: see `coding_costs` in video_reader.py.

        Raises:
            ValueError: if the clip is empty, also between its limits; if the policy lacks rate, times or costs, or fails as
                its docstring states; or if the clip is too short for `short_clip="error"`.
        """
        if total_frames < 1:
            raise ValueError(f"total_frames={total_frames} must be at least 1")
        settings = {key: getattr(self, key) for key in _settings_of(self.policy)}
        first, stop = self._window(total_frames, native_fps, times)
        length = stop - first
        clip: Any = native_fps
        if _goes_by(self.policy) == "times":
            clip = _times_of(self.policy, total_frames, native_fps, times)[first:stop]
        elif _goes_by(self.policy) == "costs":
            if costs is None:
                raise ValueError(
                    f"policy {self.policy!r} needs the bytes of each coded frame, which arrays, pictures, and videos of key "
                    "frames alone lack, and which PyAV reads from a video file"
                )
            clip = costs[first:stop]
        chosen = SAMPLING_POLICIES[self.policy](length, clip, **settings)
        indices, types = chosen if isinstance(chosen, tuple) else (chosen, None)
        is_error = self.short_clip == "error" or (self.short_clip is None and self.policy == "num_frames")
        if is_error and len(indices) < self._asked():
            key = "num_frames" if "num_frames" in settings else "max_frames"
            raise ValueError(
                f"{key}={self._asked()} is more than the {length} frames of the video, from which "
                f"policy={self.policy!r} takes {len(indices)}; short_clip='all' returns these"
            )
        return SampledFrames(indices.astype(np.int64) + first, None if types is None else tuple(types.tolist()))

    def _window(self, total: int, native_fps: float | None, times: np.ndarray | None) -> tuple[int, int]:
        """Index of the first frame from `video_start` on, and of the first one behind `video_end`."""
        start, end = self.video_start or 0.0, self.video_end
        if not start and end is None:
            return 0, total
        if times is None:
            times = np.arange(total) / _known("video_start and video_end", native_fps)
        first = int(np.searchsorted(times, start - _SAME_TIME))
        stop = total if end is None else int(np.searchsorted(times, end + _SAME_TIME, side="right"))
        if first >= stop:
            raise ValueError(
                f"no frame lies between video_start={start:g} and video_end={end} seconds: the frames of the video are at "
                f"{times[0]:g} to {times[-1]:g} seconds"
            )
        return first, stop


def time_instruction(duration: float, timestamps: Sequence[float]) -> str:
    """Time instruction of LLaVA-Video before a question, verbatim (without a space after the last full stop).

    Args:
        duration: of the clip in seconds.
        timestamps: of the sampled frames in seconds.
    """
    times = ",".join(f"{time:.2f}s" for time in timestamps)
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(timestamps)} frames are uniformly sampled from it. "
        f"These frames are located at {times}.Please answer the following questions related to this video."
    )


def _settings_of(policy: str) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(SAMPLING_POLICIES[policy]).parameters
    return {key: value for key, value in parameters.items() if value.kind is inspect.Parameter.KEYWORD_ONLY}


def _spread(total: int, num: int) -> np.ndarray:
    """`num` evenly spaced indices below `total`, the first and the last among them. Rounded by numpy,
    as in LLaVA-NeXT, which can differ from `i * (total - 1) // (num - 1)`."""
    return np.linspace(0, total - 1, num, dtype=int)


def _at_most(indices: np.ndarray, max_frames: int | None, total_frames: int) -> np.ndarray:
    if max_frames is None or len(indices) <= max_frames:
        return indices
    return _spread(total_frames, max_frames)


def _goes_by(policy: str) -> str:
    return list(inspect.signature(SAMPLING_POLICIES[policy]).parameters)[1]


def _times_of(policy: str, total_frames: int, native_fps: float | None, times: np.ndarray | None) -> np.ndarray:
    if times is None:
        return np.arange(total_frames) / (_known(policy, native_fps) if policy == "fps_time" else native_fps or 1.0)
    times = np.asarray(times, dtype=np.float64)
    if times.shape != (total_frames,) or not np.all(np.isfinite(times)) or np.any(np.diff(times) < 0):
        raise ValueError(f"times must be {total_frames} finite seconds that do not decrease, got {times!r}")
    return times


def _known(policy: str, native_fps: float | None) -> float:
    if native_fps is None or not native_fps > 0:
        raise ValueError(f"policy {policy!r} needs the frame rate of the video, got native_fps={native_fps!r}")
    return native_fps


def _llava_step(native_fps: float, fps: float) -> int:
    step = round(native_fps / fps)
    if step < 1:
        raise ValueError(f"fps={fps} is more than the rate of the video ({native_fps:g} frames a second)")
    return step


# -- Options of a processor and of a call -> one `FrameSampling`

# Names in `FrameSampling`: all settings, those that are off by default, slow and fast frames, policies that read fps.
_LIMITS = ("video_start", "video_end")  # of one video, not of a processor
SAMPLING_SETTINGS = tuple(field.name for field in fields(FrameSampling) if field.name not in ("policy", *_LIMITS))
OPTIONAL_SETTINGS = tuple(name for name in SAMPLING_SETTINGS if not getattr(FrameSampling, name))
_FAST_SLOW_SETTINGS = tuple(inspect.getfullargspec(SAMPLING_POLICIES["fast_slow"]).kwonlyargs)
_READ_FPS = tuple(name for name, read in SAMPLING_POLICIES.items() if "fps" in inspect.getfullargspec(read).kwonlyargs)
_READ_NUM_FRAMES = ("num_frames", "uniform_time", "codec")


def choose_policy(stored: str, given: Mapping[str, Any]) -> str:
    """Sampling policy: the named one, else the one that the given settings imply, else the stored one.

    `use_fast_slow_frames=True` implies `fast_slow`, `fps` implies `fps`, `sample_rate` implies `every_nth`, and
    `num_frames` implies `uniform`, unless the stored policy reads the setting already.

    Args:
        stored: the policy of the processor.
        given: options named by the caller, without those that are None.

    Raises:
        ValueError: if the given options contradict each other.
    """
    fast_slow = given.get("use_fast_slow_frames")
    policy = given.get("sampling")
    if policy is not None:
        if fast_slow is not None and fast_slow != (policy == "fast_slow"):
            raise ValueError(f"sampling={policy!r} contradicts use_fast_slow_frames={fast_slow!r}")
    elif "fps" in given and "num_frames" in given:
        raise ValueError(
            f"fps={given['fps']!r} and num_frames={given['num_frames']!r} exclude each other; to limit the number of "
            "frames at a given fps, use max_frames"
        )
    elif fast_slow:
        policy = "fast_slow"
    elif "fps" in given:
        policy = stored if stored in _READ_FPS else "fps"
    elif "sample_rate" in given:
        policy = "every_nth"
    elif "num_frames" in given:
        policy = stored if stored in _READ_NUM_FRAMES else "uniform"
    else:
        policy = "uniform" if fast_slow is False and stored == "fast_slow" else stored
    if not isinstance(policy, str) or policy not in SAMPLING_POLICIES:
        raise ValueError(f"sampling={policy!r} is not one of {', '.join(SAMPLING_POLICIES)}")
    return policy


def choose_sampling(stored: Mapping[str, Any], given: Mapping[str, Any]) -> FrameSampling:
    """Frame sampling of a call. Options of the call win over those of the processor; see `choose_policy`.

    Args:
        stored: the options of the processor, the name of its policy under `sampling`.
        given: options named in the call, without those that are None.

    Raises:
        ValueError: on a contradiction, a value out of range, or a setting that the policy ignores.
    """
    policy = choose_policy(stored["sampling"], given)
    settings = {name: stored[name] for name in SAMPLING_SETTINGS if stored.get(name) is not None}
    if policy != stored["sampling"]:  # the stored policy may read it: not an error of the call
        settings = {name: settings[name] for name in settings if name not in OPTIONAL_SETTINGS}
    for name in _FAST_SLOW_SETTINGS if policy != "fast_slow" else ():
        if name in given:
            raise ValueError(f"{name}={given[name]!r} has no effect with sampling={policy!r}")
    given = {name: given[name] for name in (*SAMPLING_SETTINGS, *_LIMITS) if name in given}
    return FrameSampling(policy=policy, **{**settings, **given})


def with_own_options(
    stored: Mapping[str, Any], call: Mapping[str, Any], of_video: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of a call (see `choose_sampling`) for a video with its own sampling options, which win. Its `max_frames` is
    an upper limit for every policy."""
    given = {name: value for name, value in call.items() if value is not None}
    if of_video.keys() & {"sampling", "fps", "num_frames", "sample_rate"}:
        replaced = {"sampling", "use_fast_slow_frames", *SAMPLING_SETTINGS}
        if of_video.keys() & {"num_frames", "max_frames"} or of_video.get("sampling") in (
            "uniform",
            *_READ_NUM_FRAMES,
        ):
            replaced -= {"short_clip"}  # it goes by a number of frames, and these options give one
        given = {name: given[name] for name in given.keys() - replaced}
        given["do_sample_frames"] = True
    elif of_video and not given.get("do_sample_frames", stored["do_sample_frames"]):
        given |= {"do_sample_frames": True, "sampling": "every_nth", "sample_rate": 1}
    given |= of_video
    policy = choose_policy(stored["sampling"], given) if "max_frames" in of_video else ""
    if policy in ("uniform", *_READ_NUM_FRAMES):
        FrameSampling(policy="every_nth", sample_rate=1, max_frames=of_video["max_frames"])  # validates it
        limit = min(given.pop("max_frames"), given.get("num_frames", stored["num_frames"]))
        given |= {"num_frames": limit, "sampling": given.get("sampling", policy.replace("num_frames", "uniform"))}
    return given


def head_sampling(config: Any) -> dict[str, Any]:
    """Sampling options of the slow and fast frames of a model's reconstruction head; empty without them.

    Args:
        config: a `LlavaNextARConfig`.
    """
    head = config.autoregressive_config
    if not (config.enable_autoregressive and head.use_fast_slow_frames):
        return {}
    return {name: getattr(head, name) for name in ("use_fast_slow_frames", *_FAST_SLOW_SETTINGS)}
