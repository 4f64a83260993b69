# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Video processor: padded pixel values of videos with a frame mask, times and frame types.

A standard transformers video processor that needs no torchvision. `choose_sampling` selects the sampling policy,
video_inputs.py reads the frames, and this module resizes them as uint8 and writes them, normalised, into one
preallocated batch.

The vision towers were trained on frames resized by Pillow. `resize_backend="pil"` gives those pixel values bit for
bit; the default `"torch"` is several times as fast and differs by at most 2 of the 255 steps of a colour.

Shape letters: N videos, T frames of the longest, C channels (3 once converted to RGB), H x W pixels.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, PILImageResampling
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import VideoMetadata

from ..configuration.key_names import keep_unknown, refuse_misspelt, refuse_unknown, warn_unknown
from ..hub.hub_code import AUTO_MAP
from ..hub.pushed_model import travels_with_code
from .frame_sampling import (
    OPTIONAL_SETTINGS,
    SAMPLING_SETTINGS,
    FrameSampling,
    choose_policy,
    choose_sampling,
    with_own_options,
)
from .option_checks import check_pixel_options
from .video_decoding import VideoBackend
from .video_frames import ResizeBackend, resize_frames
from .video_inputs import Clip, MediaRequest, check_metadata, flatten_metadata, flatten_videos, is_request, read_clip

_RESAMPLE = {PILImageResampling.BICUBIC: "bicubic", PILImageResampling.BILINEAR: "bilinear"}
# Pixel options of a configuration file of another video processor are read here too, its sampling options are not.
_PIXEL_KEYS = {
    "crop_size",
    "default_to_square",
    "do_center_crop",
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
    "size",
}
# Keys of a saved file that are not options.
_FILE_KEYS = {"auto_map", "processor_class", "video_processor_type"}


class LlavaNextARVideoProcessorKwargs(VideosKwargs, total=False):
    r"""
    sampling (`str`, *optional*, defaults to `"uniform"`):
        Policy: `uniform | num_frames | fps | every_nth | fast_slow`, `uniform_time | fps_time` for variable frame
        rates, `codec` for frames with the most coded bytes, or one of the `llava_*` policies that reproduce LLaVA-NeXT.
        `uniform` gives all frames of a clip with fewer than `num_frames` frames.
    max_frames (`int`, *optional*):
        Upper limit for the policies that use the frame rate.
    sample_rate (`int`, *optional*):
        Stride of `every_nth` in frames.
    use_fast_slow_frames (`bool`, *optional*, defaults to `False`):
        The same as `sampling="fast_slow"`.
    fast_stride, slow_stride, num_fast, num_slow (`int`, *optional*, default to 1, 4, 8, 8):
        The last `num_fast` frames `fast_stride` apart, and `num_slow` over the whole clip, `slow_stride` apart or
        wider.
    force_sample (`bool`, *optional*, defaults to `False`):
        Let `llava_*` policies repeat frames of short clips.
    short_clip (`str`, *optional*):
        `all | error`: result for a clip with fewer frames than requested. Default: `all`; for `num_frames`: `error`.
    video_backend (`str`, *optional*, defaults to `"auto"`):
        `auto | decord | pyav | torchcodec`.
    resize_backend (`str`, *optional*, defaults to `"torch"`):
        `torch | pil`.
    enable_multiscale (`bool`, *optional*, defaults to `False`):
        Return the video at the other `scale_factors` too.
    scale_factors (`list[float]`, *optional*, defaults to `[1.0, 0.75, 0.5]`):
        Sizes as fractions of the main size; they include 1.0, the main size.
    return_uint8 (`bool`, *optional*, defaults to `False`):
        Return pixels as 8 bits, a quarter of the bytes to copy to a GPU; the model normalises them there.
    allow_partial (`bool`, *optional*, defaults to `False`):
        Return the readable frames of a damaged video instead of an error.
    """

    sampling: str | None
    max_frames: int | None
    sample_rate: int | None
    use_fast_slow_frames: bool | None
    fast_stride: int | None
    slow_stride: int | None
    num_fast: int | None
    num_slow: int | None
    force_sample: bool | None
    short_clip: str | None
    video_backend: VideoBackend | None
    resize_backend: ResizeBackend | None
    enable_multiscale: bool | None
    scale_factors: list[float | int] | tuple[float | int, ...] | None
    return_uint8: bool | None
    allow_partial: bool | None
    rescale_factor: float | int | None
    video_metadata: Any


# None stands for the default of these options; for others it has the meaning of transformers.
_NONE_IS_DEFAULT = {"num_frames", *LlavaNextARVideoProcessorKwargs.__annotations__} - {*VideosKwargs.__annotations__}


@travels_with_code
class LlavaNextARVideoProcessor(VideoProcessorMixin):
    r"""Video processor: reads, samples, resizes and normalises videos.

    Inputs are those of transformers' video processors, also mixed in one call (see `flatten_videos`). All options of
    `LlavaNextARVideoProcessorKwargs` are valid at construction and in a call. An int as `size` is a square.

    A call returns a `BatchFeature` with

    - `pixel_values_videos` `[N, T, 3, H, W]` float32, shorter videos padded with zeros at the end;
    - with `return_uint8` these as uint8, and `video_pixel_norm` `[N, 2, 3]` int64, divisor and offset of each channel in
      billionths: the model computes `x / divisor - offset`;
    - `video_frame_mask` `[N, T]` bool, True at real frames;
    - `video_timestamps` `[N, T]` float32, seconds from the start of the video;
    - `video_frame_types` `[N, T]` int64, 0 slow and 1 fast, with slow and fast sampling only;
    - `pixel_values_videos_scales`, a list of `[N, T, 3, h, w]`, with `enable_multiscale` only;
    - `video_metadata`, a list, with `return_metadata` only.

    Without `return_tensors` each is a list with one tensor, not padded, for each video.

    A clip with fewer than `num_frames` frames gives all of them; with `sampling="num_frames"` it raises ValueError, as
    in transformers.

    Times come from the file. Arrays and images have none: their `fps` is that of `video_metadata`, or 2.

    Arrays contain integers from 0 to 255, or floats: from 0 to 255 with `do_rescale`, else as given.

    Raises:
        ValueError: on an unknown or contradictory option, if a video cannot be read (with its name and the cause) or its
            values are out of range, or for one tensor of videos of different size.

    Example:

    ```python
    >>> video_processor = LlavaNextARVideoProcessor(num_frames=8)
    >>> video_processor("clip.mp4", return_tensors="pt")["pixel_values_videos"].shape
    torch.Size([1, 8, 3, 384, 384])
    ```
    """

    _auto_class = "AutoVideoProcessor"
    valid_kwargs = LlavaNextARVideoProcessorKwargs

    do_resize = True
    size = {"height": 384, "width": 384}
    default_to_square = True
    resample = PILImageResampling.BICUBIC
    do_center_crop = None
    crop_size = None
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_convert_rgb = True
    do_pad = True
    do_sample_frames = True
    sampling = FrameSampling.policy
    num_frames = FrameSampling.num_frames
    fps = FrameSampling.fps
    max_frames = FrameSampling.max_frames
    sample_rate = FrameSampling.sample_rate
    fast_stride = FrameSampling.fast_stride
    slow_stride = FrameSampling.slow_stride
    num_fast = FrameSampling.num_fast
    num_slow = FrameSampling.num_slow
    force_sample = FrameSampling.force_sample
    short_clip = FrameSampling.short_clip
    video_backend = "auto"
    resize_backend = "torch"
    enable_multiscale = False
    scale_factors = [1.0, 0.75, 0.5]
    return_uint8 = False
    allow_partial = False

    def __init__(self, **kwargs: Unpack[LlavaNextARVideoProcessorKwargs]) -> None:
        refuse_unknown(kwargs.keys() - _FILE_KEYS, self.valid_kwargs.__annotations__, type(self).__name__)
        options = {
            name: value
            for name, value in kwargs.items()
            if name not in _FILE_KEYS and not (value is None and name in _NONE_IS_DEFAULT)
        }
        self._check_types(options)
        given = {name: value for name, value in options.items() if value is not None}
        # A saved file contains its policy and all settings; settings imply a policy only where none is given.
        options["sampling"] = choose_policy(type(self).sampling, given)
        options.pop("use_fast_slow_frames", None)
        super().__init__(**options)
        self._set_attributes(**options)
        self.auto_map = dict(AUTO_MAP)
        self.check()

    def check(self) -> None:
        """Validate the options, also those that were assigned after construction.

        Raises:
            ValueError: on a value out of range, or options that contradict each other.
        """
        choose_sampling(self._stored(), {})
        self._check_options(self._stored())

    @property
    def use_fast_slow_frames(self) -> bool:
        """True for slow and fast frames: an alias of `sampling="fast_slow"`."""
        return self.sampling == "fast_slow"

    @use_fast_slow_frames.setter
    def use_fast_slow_frames(self, value: bool) -> None:
        self.sampling = choose_policy(self.sampling, {"use_fast_slow_frames": bool(value)})

    @property
    def model_input_names(self) -> list[str]:
        """Keys of the output of a call without further options."""
        names = ["pixel_values_videos", "video_frame_mask", "video_timestamps"]
        names += ["video_frame_types"] * self.use_fast_slow_frames + ["video_pixel_norm"] * bool(self.return_uint8)
        return names + ["pixel_values_videos_scales"] * bool(self.enable_multiscale)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain values, for a JSON file."""
        return {**super().to_dict(), "use_fast_slow_frames": self.use_fast_slow_frames}

    @classmethod
    def from_dict(cls, video_processor_dict: dict[str, Any], **kwargs: Any) -> "LlavaNextARVideoProcessor":
        """As in transformers: unknown keys of the file are kept, with a warning; a misspelt keyword argument raises.

        Files of other video processors give the pixel options, not the sampling options.
        """
        values = dict(video_processor_dict)
        if values.get("video_processor_type", cls.__name__) != cls.__name__ or "image_processor_type" in values:
            values = {name: value for name, value in values.items() if name in _PIXEL_KEYS}
        options = cls.valid_kwargs.__annotations__
        refuse_misspelt(kwargs, options, cls.__name__)
        unknown = {name: values.pop(name) for name in [*values] if name not in {*options, *_FILE_KEYS}}
        stored = values.get("sampling", cls.sampling)
        given = {name: kwargs[name] for name in options if kwargs.get(name) is not None}
        values["sampling"] = choose_policy(stored, given)
        values.pop("use_fast_slow_frames", None)
        if values["sampling"] != stored:
            values = {name: value for name, value in values.items() if name not in OPTIONAL_SETTINGS}
        loaded = super().from_dict(values, **kwargs)
        keep_unknown(loaded[0] if isinstance(loaded, tuple) else loaded, unknown, "the video processor's file")
        warn_unknown(unknown, options, "the video processor's file")
        return loaded

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "LlavaNextARVideoProcessor":
        """As in transformers; see `from_dict`."""
        return cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))

    def sampling_for(self, **kwargs: Any) -> FrameSampling | None:
        """Frame sampling of a call with these options; None for all frames.

        Raises:
            ValueError: see `choose_sampling`.
        """
        given = {name: value for name, value in kwargs.items() if value is not None}
        if not kwargs.get("do_sample_frames", self.do_sample_frames):
            return None
        return choose_sampling(self._stored(), given)

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: int | float | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Indices of the frames that a call with these options samples from a video of that length and frame rate.

        Raises:
            ValueError: as the call does.
        """
        metadata = check_metadata(metadata)
        given = {"num_frames": num_frames, "fps": fps, **kwargs}
        sampling = self.sampling_for(**{**given, "do_sample_frames": True})
        return sampling.select(metadata.total_num_frames, metadata.fps).indices

    def preprocess(self, videos: Any, **kwargs: Unpack[LlavaNextARVideoProcessorKwargs]) -> BatchFeature:
        """See the class."""
        refuse_unknown(kwargs, self.valid_kwargs.__annotations__, type(self).__name__)
        kwargs = {name: value for name, value in kwargs.items() if not (value is None and name in _NONE_IS_DEFAULT)}
        self._check_types(kwargs)
        sampling = self.sampling_for(**kwargs)
        options = {**self._stored(), **kwargs}
        options = {**options, **self._standardize_kwargs(**options)}
        self._validate_preprocess_kwargs(**options)
        self._check_options(options)

        sources, _ = flatten_videos(videos)
        clips = []
        for source, metadata in zip(sources, flatten_metadata(options["video_metadata"], len(sources)), strict=True):
            request, own_sampling, own_kwargs, loading = None, sampling, kwargs, {}
            if is_request(source):
                request, source = source, source.source
                metadata, own_sampling, own_kwargs, loading = self.sampling_of_request(request, metadata, kwargs)
            clip = read_clip(
                source,
                metadata,
                own_sampling,
                do_convert_rgb=options["do_convert_rgb"],
                float_range=_float_range(options),
                input_data_format=options["input_data_format"],
                sizes=_exact_sizes(options),
                backend=options["video_backend"],
                resample=_RESAMPLE.get(options["resample"], "bicubic"),
                resize_backend=options["resize_backend"],
                allow_partial=options["allow_partial"],
                **loading,
            )
            clips.append(_resized_and_cropped(clip, options))
            if request is not None:
                request.check_pixels(*clips[-1].scales[0].shape[-2:])
        return _collate(clips, options)

    def sampling_of_request(
        self, request: MediaRequest, metadata: VideoMetadata | None, kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Return metadata, sampling, options and further arguments of `read_clip` for a video with its own options in a call
        with the options `kwargs`; `fps` is the rate of frames without times. Raises ValueError as a call does."""
        try:
            self._check_types({name: request.options[name] for name in request.options.keys() & SAMPLING_SETTINGS})
            of_source, metadata, loading = request.sampling_options(metadata)
            own_kwargs = with_own_options(self._stored(), kwargs, of_source)
            return metadata, self.sampling_for(**own_kwargs), own_kwargs, loading
        except ValueError as error:
            raise ValueError(f"{request.place}: {error}") from error

    def _stored(self) -> dict[str, Any]:
        return {name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__}

    def _check_types(self, kwargs: dict[str, Any]) -> None:
        try:
            validate_typed_dict(self.valid_kwargs, kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from error

    def _check_options(self, options: dict[str, Any]) -> None:
        factors = list(options["scale_factors"])
        if 1 not in factors or not all(0 < factor <= 1 for factor in factors) or len(set(factors)) < len(factors):
            raise ValueError(
                f"scale_factors must be different numbers above 0 and up to 1, with 1 among them, got {factors}"
            )
        # Other scales are resized, also where the main scale is not.
        scaled = options["enable_multiscale"] and not options["do_resize"]
        if scaled and options["resample"] not in _RESAMPLE:
            raise ValueError(f"resample must be 3 (bicubic) or 2 (bilinear), got {options['resample']!r}")
        check_pixel_options(options, resamples=_RESAMPLE, num_channels=(1, 3, 4))
        if options["data_format"] not in (None, *(form.value for form in ChannelDimension), *ChannelDimension):
            raise ValueError(f"data_format must be channels_first or channels_last, got {options['data_format']!r}")

    def _standardize_kwargs(self, default_to_square: bool | None = None, **kwargs: Any) -> dict[str, Any]:
        # transformers drops default_to_square here, and with it the value of a saved file
        square = self.default_to_square if default_to_square is None else default_to_square
        return {**super()._standardize_kwargs(default_to_square=square, **kwargs), "default_to_square": square}


def _float_range(options: dict[str, Any]) -> tuple[float, float]:
    """Valid range of a video of floats: up to white where values are rescaled, else unlimited."""
    if options["do_rescale"]:
        return 0, max(255, round(1 / abs(options["rescale_factor"])))
    return (0 if options["do_normalize"] else -math.inf), math.inf


# -- Resizing


def _factors(options: dict[str, Any]) -> list[float]:
    """Factors of the scales, the main scale first."""
    return [1, *(f for f in options["scale_factors"] if f != 1)] if options["enable_multiscale"] else [1]


def _scaled(edge: int, factor: float) -> int:
    return max(1, round(edge * factor))


def _exact_sizes(options: dict[str, Any]) -> "list[tuple[int, int]] | None":
    """Return (h, w) of each scale if it is the same for all videos, so that frames can be resized as they are decoded."""
    if not options["do_resize"] or "height" not in options["size"]:
        return None
    return _scale_sizes((0, 0), options)


def _scale_sizes(native: tuple[int, int], options: dict[str, Any]) -> list[tuple[int, int]]:
    """Return (h, w) of each scale of a video with frames of the (height, width) `native`."""
    height, width = native
    if options["do_resize"]:
        size = options["size"]
        if "height" in size:
            height, width = size.height, size.width
        else:
            # as in transformers: the short edge is exact, the long one is cut to whole pixels
            short, long = sorted(native)
            new_short, new_long = size.shortest_edge, size.shortest_edge * long // short
            if "longest_edge" in size and new_long > size.longest_edge:
                new_short, new_long = max(1, size.longest_edge * short // long), size.longest_edge
            height, width = (new_short, new_long) if height <= width else (new_long, new_short)
    return [(_scaled(height, factor), _scaled(width, factor)) for factor in _factors(options)]


def _resized_and_cropped(clip: Clip, options: dict[str, Any]) -> Clip:
    if not clip.is_resized:
        native = clip.scales[0]
        clip.scales = [_resize(native, size, options) for size in _scale_sizes(native.shape[-2:], options)]
    if options["do_center_crop"]:
        height, width = options["crop_size"].height, options["crop_size"].width
        clip.scales = [
            _center_crop(scale, (_scaled(height, factor), _scaled(width, factor)))
            for scale, factor in zip(clip.scales, _factors(options), strict=True)
        ]
    return clip


def _resize(frames: torch.Tensor, size: tuple[int, int], options: dict[str, Any]) -> torch.Tensor:
    """`[T, C, H, W]` -> `[T, C, h, w]`. Floats are not rounded to 8 bits, and always resized with torch."""
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    resample = _RESAMPLE[options["resample"]]
    is_8_bit = frames.dtype == torch.uint8
    if is_8_bit and frames.shape[1] == 3 and frames.device.type == "cpu":
        return resize_frames(frames, size, resample=resample, backend=options["resize_backend"])
    low, high = (0, 255) if is_8_bit else (frames.min().item(), frames.max().item())
    resized = nn.functional.interpolate(frames.float(), size, mode=resample, antialias=True)
    resized = resized.clamp_(low, high)  # bicubic overshoots at edges
    return resized.round_().to(torch.uint8) if is_8_bit else resized


def _center_crop(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Crop the middle `size` of `[T, C, H, W]`, zero outside of the frame, as in transformers."""
    for axis, wanted in zip((-2, -1), size, strict=True):
        missing = max(0, wanted - frames.shape[axis])
        if missing:
            after = missing // 2
            padding = (missing - after, after)
            frames = nn.functional.pad(frames, padding if axis == -1 else (0, 0, *padding))
        frames = frames.narrow(axis, (frames.shape[axis] - wanted) // 2, wanted)
    return frames


# -- The batch


def _collate(clips: list[Clip], options: dict[str, Any]) -> BatchFeature:
    """Return the outputs that `LlavaNextARVideoProcessor` documents."""
    is_batch = options["return_tensors"] is not None
    device = torch.device("cpu" if options["device"] is None else options["device"])
    lengths = [len(clip) for clip in clips]
    typed = [clip.frame_types is not None for clip in clips]
    if any(typed) != all(typed):
        raise ValueError("the batch mixes videos with and without slow and fast frames")
    if is_batch and not options["do_pad"] and len(set(lengths)) > 1:
        raise ValueError(
            f"videos of {sorted(set(lengths))} frames cannot become one tensor with do_pad=False: use do_pad=True, or "
            "return_tensors=None for a list"
        )
    data: dict[str, Any] = {}
    if options["return_uint8"]:
        if any(scale.dtype != torch.uint8 for clip in clips for scale in clip.scales):
            raise ValueError("return_uint8=True needs videos of whole numbers from 0 to 255, got floats")
        norm = np.stack([np.broadcast_to(values, 3) for values in _divisor_and_offset(3, options)])
        data["video_pixel_norm"] = [torch.from_numpy((norm * 1e9).round().astype(np.int64))] * len(clips)
    pixels = [
        _normalised([clip.scales[scale] for clip in clips], device, options) for scale in range(len(clips[0].scales))
    ]
    padded = [max(lengths) if is_batch else length for length in lengths]
    data |= {
        "video_frame_mask": [torch.arange(n) < length for n, length in zip(padded, lengths, strict=True)],
        "video_timestamps": [_pad(clip.timestamps.float(), n) for clip, n in zip(clips, padded, strict=True)],
    }
    if all(typed):
        data["video_frame_types"] = [
            _pad(torch.tensor(clip.frame_types), n) for clip, n in zip(clips, padded, strict=True)
        ]
    data = {name: [value.to(device) for value in values] for name, values in data.items()}
    if is_batch:
        data = {name: torch.stack(values) for name, values in data.items()}
    data = {"pixel_values_videos": pixels[0], **data}
    if options["enable_multiscale"]:
        to_numpy = options["return_tensors"] == "np"
        data["pixel_values_videos_scales"] = [scale.numpy() if to_numpy else scale for scale in pixels[1:]]
    if options["return_metadata"]:
        data["video_metadata"] = [clip.metadata for clip in clips]
    # The other scales differ in size, so they stay a list.
    skip = ["pixel_values_videos_scales", "video_metadata"]
    return BatchFeature(data, tensor_type=options["return_tensors"], skip_tensor_conversion=skip)


def _pad(values: torch.Tensor, length: int) -> torch.Tensor:
    return nn.functional.pad(values, (0, length - len(values)))


def _normalised(
    videos: list[torch.Tensor], device: torch.device, options: dict[str, Any]
) -> "torch.Tensor | list[torch.Tensor]":
    """Stack videos `[T, C, H, W]` to one `[N, T, C, H, W]`, or without `return_tensors` to a list; see `return_uint8`."""
    dtype = torch.uint8 if options["return_uint8"] else torch.float32
    if options["return_tensors"] is None:
        out = [torch.empty(video.shape, device=device, dtype=dtype) for video in videos]
    else:
        shapes = {tuple(video.shape[1:]) for video in videos}
        if len(shapes) > 1:
            raise ValueError(
                f"videos of different [C, H, W] {sorted(shapes)} cannot become one tensor: use do_resize=True with a "
                "fixed height and width, or return_tensors=None for a list"
            )
        shape = (len(videos), max(len(video) for video in videos), *videos[0].shape[1:])
        out = torch.empty(shape, device=device, dtype=dtype)
    for video, target in zip(videos, out, strict=True):
        if options["return_uint8"]:
            target[: len(video)] = video
        else:
            _normalise_into(target[: len(video)], video.to(device), options)
        target[len(video) :] = 0
    if options["data_format"] not in (ChannelDimension.LAST, ChannelDimension.LAST.value):
        return out
    if isinstance(out, list):
        return [video.movedim(-3, -1).contiguous() for video in out]
    return out.movedim(-3, -1).contiguous()


def _normalise_into(target: torch.Tensor, frames: torch.Tensor, options: dict[str, Any]) -> None:
    """Write `(frames * rescale_factor - mean) / std` of `[T, C, H, W]` into `target`.

    Computed as `frames / (std / rescale_factor) - mean / std`: two passes over one frame, which stays in the cache. With
    mean and std of 0.5 the values equal bit for bit those of the towers' training, where the product was computed in
    float64; the textbook order in float32 differs.
    """
    divisor, offset = _divisor_and_offset(frames.shape[1], options)
    is_moved, divisor, offset = offset.any(), *(_per_channel(values, target.device) for values in (divisor, offset))
    for frame, out in zip(frames, target, strict=True):  # [C, H, W]
        torch.div(frame, divisor, out=out)
        if is_moved:
            out.sub_(offset)


def _divisor_and_offset(num_channels: int, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Divisor and offset of each channel, or of all channels: pixels become `x / divisor - offset`."""
    mean, std = (options["image_mean"], options["image_std"]) if options["do_normalize"] else (0, 1)
    mean, std = np.atleast_1d(np.asarray(mean, dtype=np.float64)), np.atleast_1d(np.asarray(std, dtype=np.float64))
    for name, values in (("image_mean", mean), ("image_std", std)):
        if len(values) not in (1, num_channels):
            raise ValueError(f"{name} has {len(values)} values for a video of {num_channels} channels")
    return std / (options["rescale_factor"] if options["do_rescale"] else 1), mean / std


def _per_channel(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return `[C, 1, 1]` float32, or a scalar for equal channels, which is faster."""
    shaped = values[0] if (values == values[0]).all() else values[:, None, None]
    return torch.tensor(shaped, dtype=torch.float32, device=device)


__all__ = ["LlavaNextARVideoProcessor", "choose_sampling", "flatten_videos"]
