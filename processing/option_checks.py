# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Validation of the options of the processors when they are set, before they are used.

transformers takes most values of a configuration file as they are. These checks stand between the file and its use.
"""

import math
import sys
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypedDict

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig
from transformers.image_utils import PILImageResampling

from ..configuration.frame_token_layout import FrameTokenLayout
from ..configuration.image_token_layout import UnpadRounding
from .video_decoding import MAX_FRAME_PIXELS

_SIZES = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"})


class _Settings(TypedDict, total=False):
    """Types of `LlavaNextARProcessor`'s own settings."""

    num_image_tokens: int | None
    vision_feature_select_strategy: Literal["default", "full"] | None
    chat_template: str | dict[str, str] | None
    image_token: str
    video_token: str
    vision_aspect_ratio: str
    add_time_instruction: bool
    mm_patch_merge_type: str
    unpad_rounding: UnpadRounding


_SERVER = "transformers.cli.serving.server"  # only `transformers serve` loads this module
_FRAMES_OF_SERVER = (
    "; `transformers serve` requests num_frames=32 for each video, unless it is started with --chat-template-kwargs "
    "'{\"num_frames\": null}', which keeps the checkpoint's own sampling"
)
_GENERATION_OPTIONS = GenerationConfig().to_dict().keys()

SETTINGS = tuple(_Settings.__annotations__)


def served_options(video_processor: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a chat template; under `transformers serve` a clip of fewer than `num_frames` frames gives all of them."""
    is_default = video_processor.sampling == "num_frames" and video_processor.short_clip is None
    if _SERVER in sys.modules and is_default and options.get("num_frames") is not None:
        return {"short_clip": "all", **options}
    return options


def served_error(message: str, options: Mapping[str, Any]) -> ValueError:
    """A ValueError. Under `transformers serve` it is an `HTTPException` too: the client gets the message with status 400.

    For any other exception, the server answers "Internal Server Error" with status 500.
    """
    if _SERVER not in sys.modules:
        return ValueError(message)
    if options.get("num_frames") is not None and "num_frames" in message:
        message += _FRAMES_OF_SERVER
    reply = type("RequestError", (sys.modules["fastapi"].HTTPException, ValueError), {})
    return reply(status_code=400, detail=message)


def refuse_generation_options(names: Collection[str], known: Collection[str]) -> None:
    """Raise ValueError for an option of `generate` among those of a processor, as pipelines pass it."""
    for name in names:
        if name in _GENERATION_OPTIONS and name not in known:
            raise ValueError(
                f"{name!r} is an option of generate: pass it there, or to a pipeline as generate_kwargs={{{name!r}: ...}}"
            )


def check_pixel_options(options: Mapping[str, Any], resamples: Collection[int], num_channels: Collection[int]) -> None:
    """Validate transformers' pixel options, except those of steps that are off.

    Args:
        options: `do_resize`, `size`, `resample`, `do_center_crop`, `crop_size`, `do_rescale`, `rescale_factor`,
            `do_normalize`, `image_mean`, `image_std`; a missing step is off.
        resamples: Pillow's numbers of the available filters.
        num_channels: number of values of `image_mean` and `image_std`, if there are several.

    Raises:
        ValueError: with the option, its value and the allowed values.
    """
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if not isinstance(options.get(name), (bool, type(None))):
            raise ValueError(f"{name} must be True or False, got {options[name]!r}")
    if options.get("do_resize"):
        resample = options["resample"]
        if isinstance(resample, bool) or not isinstance(resample, int) or resample not in resamples:
            names = {2: "2 (bilinear)", 3: "3 (bicubic)"}
            allowed = " or ".join(names.get(number, str(int(number))) for number in sorted(resamples, reverse=True))
            raise ValueError(f"resample must be {allowed}, got {resample!r}")
        _check_size("size", options["size"], _SIZES)
    if options.get("do_center_crop"):
        _check_size("crop_size", options["crop_size"], _SIZES[:1])
    if options.get("do_rescale") and not (_is_number(options["rescale_factor"]) and options["rescale_factor"]):
        raise ValueError(f"rescale_factor must be a finite number other than 0, got {options['rescale_factor']!r}")
    for name in ("image_mean", "image_std") if options.get("do_normalize") else ():
        value = options[name]
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if isinstance(value, (list, tuple)) and len(values) not in num_channels:
            expected = " or ".join(map(str, sorted(num_channels)))
            raise ValueError(f"{name} has {len(values)} values, expected {expected}")
        if not all(_is_number(number) for number in values):
            raise ValueError(f"{name} must contain finite numbers, got {value!r}")
        if name == "image_std" and 0 in values:
            raise ValueError(f"image_std must not hold 0, got {value!r}")


def _check_size(name: str, value: Any, allowed: Collection[set[str]]) -> None:
    try:
        size = dict(value or {})
    except (TypeError, ValueError):  # not a mapping
        size = {}
    sides = list(size.values())
    if set(size) not in allowed or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in sides):
        forms = ", ".join("{" + ", ".join(sorted(form)) + "}" for form in allowed)
        raise ValueError(f"{name} must be {forms}, of whole numbers of at least 1, got {value!r}")
    if sides[0] * sides[-1] > MAX_FRAME_PIXELS:
        raise ValueError(f"{name} must give at most {MAX_FRAME_PIXELS} pixels, got {size}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_image_processor(image_processor: Any) -> None:
    """Validate the settings of a LLaVA-OneVision image processor; raises as `check_pixel_options`."""
    options = {**image_processor.to_dict(), "do_resize": True}  # tiles always have the `size`
    check_pixel_options(options, resamples={int(number) for number in PILImageResampling}, num_channels=(3,))
    _check_size("size", options["size"], _SIZES[:1])  # the same for all views of an image
    if not image_processor.image_grid_pinpoints:
        raise ValueError("image_grid_pinpoints must contain at least one size, got none")


def check_processor_settings(**values: Any) -> None:
    """Validate types and values of the settings of `LlavaNextARProcessor`.

    Raises:
        ValueError: with the setting and its value.
    """
    try:
        validate_typed_dict(_Settings, values)
    except StrictDataclassError as error:
        raise ValueError(f"LlavaNextARProcessor: {error}") from error
    num_image_tokens = values["num_image_tokens"]
    if num_image_tokens is not None and not 1 <= num_image_tokens <= MAX_FRAME_PIXELS:
        raise ValueError(f"num_image_tokens must be from 1 to {MAX_FRAME_PIXELS}, got {num_image_tokens}")
    for name in ("image_token", "video_token"):
        if not values[name]:
            raise ValueError(f"{name} must not be empty")


def check_processor_file(values: Mapping[str, Any]) -> None:
    """Validate the parts of `processor_config.json` that transformers takes unchecked.

    Args:
        values: content of the file.

    Raises:
        ValueError: with the key and the expected form.
    """
    for name in ("image_processor", "video_processor"):
        part = values.get(name, {})
        if not isinstance(part, Mapping):
            raise ValueError(f"{name} in processor_config.json must be an object, got {part!r}")
        if not isinstance(part.get("auto_map", {}), Mapping):
            raise ValueError(f"auto_map of the {name} must be an object, got {part['auto_map']!r}")
        if not isinstance(part.get(f"{name}_type", ""), str):
            raise ValueError(f"{name}_type must be a string, got {part[f'{name}_type']!r}")
        for option in ("size", "crop_size"):
            if isinstance(part.get(option), list) and len(part[option]) != 2:
                raise ValueError(f"{option} of the {name} must be a pair (height, width), got {part[option]!r}")


def resolve_layout(
    layout: "FrameTokenLayout | dict[str, Any] | None", num_image_tokens: int | None, select_strategy: str | None
) -> FrameTokenLayout | None:
    if layout is not None:
        # The layout of a model from the Hub has another class of the same name: pass its values.
        if not (isinstance(layout, dict) or hasattr(layout, "to_dict")):
            raise ValueError(f"frame_token_layout must be a FrameTokenLayout or a dict, got {layout!r}")
        try:
            layout = FrameTokenLayout.from_dict(layout if isinstance(layout, dict) else layout.to_dict())
        except (ValueError, TypeError) as error:  # the latter if a key is missing
            raise ValueError(f"frame_token_layout: {error}") from error
    num_patches = _num_patches(num_image_tokens, select_strategy)
    if layout is None:
        if num_patches is None:
            return None
        side = math.isqrt(num_patches)
        if side**2 != num_patches:
            raise ValueError(
                f"num_image_tokens={num_image_tokens} is not a square number, so the patch grid is unknown: give the "
                "frame_token_layout of the model's configuration"
            )
        return FrameTokenLayout(patches_height=side, patches_width=side)
    if num_patches is not None and num_patches != layout.patches_height * layout.patches_width:
        raise ValueError(
            f"num_image_tokens={num_image_tokens} contradicts the layout's {layout.patches_height}x"
            f"{layout.patches_width} patches (patches_height x patches_width)"
        )
    return layout


def _num_patches(num_image_tokens: int | None, select_strategy: str | None) -> int | None:
    """LLaVA-OneVision counts a class token that its strategy later drops; the patches are the rest."""
    if num_image_tokens is None:
        return None
    without_class_token = num_image_tokens - 1
    if select_strategy == "default" and math.isqrt(without_class_token) ** 2 == without_class_token:
        return without_class_token
    return num_image_tokens
