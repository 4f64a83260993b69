"""Configuration of original LLaVA-NeXT checkpoints (`llava_qwen`), translated to this package's.

Its `config.json` is flat and has the vision tower as a Hub id alone. It lacks settings that the project's evaluation set on
the command line, and sizes are (width, height).
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, PreTrainedConfig, Qwen2Config
from transformers.utils import logging

from ..configuration.configuration_llava_next_ar import LlavaNextARConfig
from ..configuration.frame_token_layout import FrameTokenLayout
from ..configuration.image_token_layout import ImageTokenLayout

logger = logging.get_logger(__name__)

# Vision towers without download: their whole configuration, by the last part of the Hub id.
KNOWN_TOWERS = {
    "siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
_DEFAULT_FRAMES = 64  # LLaVA-Video's

# Original key -> key of this package; the first match counts.
ORIGINAL_KEYS = (
    (r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.(?=(?:embed_tokens|layers|norm)\.)", "model.language_model."),
)


@dataclass(frozen=True)
class OriginalSettings:
    """Settings translated from a configuration of the original project.

    Attributes:
        config: of this package.
        processor: options of `LlavaNextARProcessor.for_config`.
        notes: settings that the original leaves open, with the chosen values.
    """

    config: LlavaNextARConfig
    processor: dict[str, Any]
    notes: list[str]


def is_original_config(config: Mapping[str, Any]) -> bool:
    """Test a `config.json` for the format of the original project."""
    return "mm_vision_tower" in config or str(config.get("model_type", "")).startswith("llava_qwen")


def settings_from_original_config(
    config: Mapping[str, Any],
    *,
    vision_config: Mapping[str, Any] | None = None,
    autoregressive_config: Mapping[str, Any] | None = None,
    num_frames: int | None = None,
) -> OriginalSettings:
    """Translate the `config.json` of an original checkpoint.

    Args:
        config: content of the file.
        vision_config: configuration of the whole vision tower, as its repository publishes it; required if
            `mm_vision_tower` is not among `KNOWN_TOWERS` and cannot be downloaded.
        autoregressive_config: keys of the head.
        num_frames: frames of a video, if not the configuration's `frames_upbound` or 64.

    Raises:
        ValueError: on a setting that this package does not implement, with its key.
    """
    config = {key: value for key, value in config.items() if value is not None}
    notes: list[str] = []
    _refuse_unsupported(config)
    tower = {**_tower_config(config, vision_config), "model_type": "siglip_vision_model", "vision_use_head": False}
    tower["num_hidden_layers"] -= 1  # the original drops the last layer and reads the output of the layer before it
    layout = layout_from_original_config(config, tower["image_size"] // tower["patch_size"], "encode_multimodals")
    for key, value, choice in (
        ("mm_spatial_pool_mode", layout.pool_mode, "; for average pooling: --pool-mode average"),
        ("mm_spatial_pool_stride", layout.pool_stride, ""),
        ("mm_newline_position", layout.newline_position, ""),
    ):
        if key not in config:
            notes.append(f"the configuration leaves {key} open: {value}, the original's default{choice}")
    images = image_layout_from_original_config(config, tower["image_size"] // tower["patch_size"], tower["image_size"])
    text = {key: config[key] for key in _text_keys() if key in config}
    ours = LlavaNextARConfig(
        vision_config=tower,
        text_config={"model_type": "qwen2", **text},
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        image_grid_pinpoints=images.grid_pinpoints,
        vision_aspect_ratio=images.aspect_ratio,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        mm_spatial_pool_stride=layout.pool_stride,
        mm_spatial_pool_mode=layout.pool_mode,
        mm_newline_position=layout.newline_position,
        add_faster_video=layout.is_slow_fast,
        faster_token_stride=layout.faster_token_stride,
        mm_patch_merge_type=images.merge_type,
        unpad_rounding=images.unpad_rounding,
        autoregressive_config=dict(autoregressive_config or {}),
    )
    return OriginalSettings(ours, _processor_options(config, num_frames, notes), notes)


def layout_from_original_config(config: Mapping[str, Any], patches_per_side: int, path: str) -> FrameTokenLayout:
    """Return the token layout of an original configuration; missing keys take the original's defaults.

    Args:
        config: attributes of a LLaVA-NeXT configuration (`config.json` of an original checkpoint).
        patches_per_side: side of the vision tower's patch grid.
        path: `snapshot` is the published code, which always pools by 2, without slow and fast frames;
            `encode_multimodals` the code behind LLaVA-Video, which follows the configuration.

    Raises:
        ValueError: if the original cannot run this configuration or rejects a value.
    """
    merge_type = config.get("mm_patch_merge_type", "flat")
    newline_position = config.get("mm_newline_position", "one_token")
    pool_stride = config.get("mm_spatial_pool_stride", 2) if path == "encode_multimodals" else 2
    add_faster_video = config.get("add_faster_video", False)
    if merge_type == "flat":
        newline_position = "no_token"
    elif not merge_type.startswith("spatial"):
        raise ValueError(f"mm_patch_merge_type must be 'flat' or begin with 'spatial', got {merge_type!r}")
    elif newline_position == "one_token" and "unpad" not in merge_type:
        newline_position = "no_token"  # `grid` and `frame` ignore `unpad`
    if add_faster_video and newline_position == "grid" and (path == "snapshot" or pool_stride == 1):
        raise ValueError(f"add_faster_video=True cannot run on {path!r} with mm_spatial_pool_stride={pool_stride}")
    return FrameTokenLayout(
        patches_height=patches_per_side,
        patches_width=patches_per_side,
        pool_stride=pool_stride,
        pool_mode=config.get("mm_spatial_pool_mode", "bilinear"),
        newline_position=newline_position,
        add_faster_video=add_faster_video,
        faster_token_stride=config.get("faster_token_stride", 10),
    )


def image_layout_from_original_config(
    config: Mapping[str, Any], patches_per_side: int, tile_size: int
) -> ImageTokenLayout:
    """Return the token layout of images; `tile_size` is the side in pixels of the tower's input.

    Raises:
        ValueError: on a value that the original rejects.
    """
    return ImageTokenLayout(
        patches_height=patches_per_side,
        patches_width=patches_per_side,
        tile_size=tile_size,
        grid_pinpoints=_grid_pinpoints(config, tile_size),
        aspect_ratio=config.get("image_aspect_ratio", "square"),
        merge_type=config.get("mm_patch_merge_type", "flat"),
        unpad_rounding="truncate",
    )


def _refuse_unsupported(config: dict[str, Any]) -> None:
    architecture = (config.get("architectures") or ["LlavaQwenForCausalLM"])[0]
    if architecture != "LlavaQwenForCausalLM":
        raise ValueError(f"architectures must be LlavaQwenForCausalLM, got {architecture!r}")
    tower = config.get("mm_vision_tower")
    if tower is None or "siglip" not in tower.lower():
        raise ValueError(f"mm_vision_tower must be a SigLIP tower, got {tower!r}")
    for key, allowed in (
        ("mm_projector_type", ("mlp2x_gelu",)),
        ("mm_resampler_type", (None,)),
        ("mm_use_im_start_end", (False, None)),
    ):
        if config.get(key) not in allowed:
            raise ValueError(f"{key} must be {allowed[0]!r}, got {config[key]!r}: this package has no such model")
    aspect_ratio = config.get("image_aspect_ratio", "square")
    if not re.fullmatch(r"anyres(_max_\d+)?", aspect_ratio):
        raise ValueError(
            f"image_aspect_ratio must be anyres or anyres_max_N, got {aspect_ratio!r}. For a model of videos "
            "alone, set it: --set image_aspect_ratio=anyres_max_9"
        )


def _tower_config(config: dict[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    name = config["mm_vision_tower"]
    if given is None:
        given = KNOWN_TOWERS.get(name.rstrip("/").rsplit("/", 1)[-1])
    if given is None:
        logger.warning(
            f"the vision tower {name!r} is not among the known ones: its configuration is downloaded from the Hub; offline, "
            "give it with --vision-config (config.json of the tower's repository)"
        )
        try:
            given = AutoConfig.from_pretrained(name).to_dict()
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ValueError(
                f"the configuration of the vision tower {name!r} is not known here and cannot be downloaded: give it "
                "with --vision-config (config.json of the tower's repository)"
            ) from error
    given = dict(given.get("vision_config", given))
    missing = sorted(set(KNOWN_TOWERS["siglip-so400m-patch14-384"]) - set(given))
    if missing:
        raise ValueError(f"the configuration of the vision tower lacks {', '.join(missing)}")
    return given


def _text_keys() -> list[str]:
    inherited = {field.name for field in fields(PreTrainedConfig)}
    names = [field.name for field in fields(Qwen2Config) if field.name not in inherited]
    return [*names, "rope_theta", "rope_scaling"]


def _grid_pinpoints(config: Mapping[str, Any], tile_size: int) -> list[list[int]]:
    """Return sizes as (height, width); the original has (width, height), or `(1x1),...,(6x6)` in tiles."""
    if not config.get("image_aspect_ratio", "square").startswith("anyres"):
        return []
    pinpoints = config.get("image_grid_pinpoints")
    if pinpoints is None:
        raise ValueError(f"image_aspect_ratio={config['image_aspect_ratio']!r} needs image_grid_pinpoints")
    if isinstance(pinpoints, str):
        tiles = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if tiles:
            (first_width, first_height), (last_width, last_height) = tiles[0], tiles[-1]
            pinpoints = [
                (width * tile_size, height * tile_size)
                for width in range(first_width, last_width + 1)
                for height in range(first_height, last_height + 1)
            ]
        else:
            pinpoints = ast.literal_eval(pinpoints)
    return [[height, width] for width, height in pinpoints]


def _processor_options(config: dict[str, Any], num_frames: int | None, notes: list[str]) -> dict[str, Any]:
    max_frames = num_frames or config.get("frames_upbound")
    if not max_frames:
        max_frames = _DEFAULT_FRAMES
        notes.append(f"the configuration leaves the number of frames open: {max_frames}; for another: --num-frames")
    return {
        "sampling": "llava_video",
        "fps": config.get("video_fps", 1),
        "max_frames": max_frames,
        "force_sample": config.get("force_sample", False),
        "add_time_instruction": config.get("add_time_instruction", False),
    }
