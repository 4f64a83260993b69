# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Typed, validated configuration: LLaVA-OneVision's, plus the token layout of a video, plus the reconstruction head.

Every key has one default, here. An unknown keyword argument raises and names the nearest key, so that a typo in a
recipe cannot silently train something else. An unknown key of a file is kept with a warning, as in transformers.
"""

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal

import transformers
from packaging.specifiers import SpecifierSet

# Before the other imports: an unsupported transformers lacks some of the names, and its own error would not say why.
MINIMUM_TRANSFORMERS = "5.19.0"  # the oldest release with which the tests pass
SUPPORTED_TRANSFORMERS = f">={MINIMUM_TRANSFORMERS},<6"
if not SpecifierSet(SUPPORTED_TRANSFORMERS).contains(transformers.__version__, prereleases=True):
    raise ImportError(
        f"LLaVA-NeXT-AR needs transformers{SUPPORTED_TRANSFORMERS}, found {transformers.__version__}: "
        f"pip install -U 'transformers{SUPPORTED_TRANSFORMERS}'"
    )

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers import GenerationConfig, LlavaOnevisionConfig, PreTrainedConfig  # noqa: E402
from transformers.activations import ACT2FN  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from ..hub.hub_code import AUTO_MAP  # noqa: E402
from ..hub.pushed_model import travels_with_code  # noqa: E402
from .frame_token_layout import FrameTokenLayout, NewlinePosition, PoolMode  # noqa: E402
from .image_token_layout import ImageTokenLayout, UnpadRounding  # noqa: E402
from .key_names import keep_unknown, refuse_misspelt, refuse_unknown, warn_unknown  # noqa: E402

# Tables in which `transformers serve` looks a type up. A class of ours in the first one would announce audio as well.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault("llava_next_ar", "LlavaOnevisionForConditionalGeneration")
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("llava_next_ar", "LlavaNextARForConditionalGeneration")

# Keys that transformers itself reads from or writes to a config.json without declaring them as fields.
_TRANSFORMERS_KEYS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "tie_last_hidden_states",
    "torch_dtype",
    "use_cache",
} | set(GenerationConfig._get_default_generation_params())
# Keys of released LLaVA-OneVision checkpoints that transformers no longer reads.
_ONEVISION_LEGACY_KEYS = {"ignore_index", "use_image_newline_parameter"}

# Sizes that transformers does not validate: with a wrong one it fails much later, or never ends.
_PART_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "num_channels", "image_size", "patch_size"),
)
_MAX_SIZE, _MAX_LAYERS = 2**31 - 1, 1000
_MAX_ROPE_THETA = 2**63  # torch computes with no larger integer


def _check_range(where: str, name: str, value: float, low: float, high: float = _MAX_SIZE) -> None:
    if not low <= value <= high:  # false for NaN too
        limit = f"at most {high}" if high < value < float("inf") else f"finite and at least {low}"
        raise ValueError(f"{where}.{name} must be {limit}, got {value!r}")


def _check_rope(text_config: dict[str, Any]) -> None:
    """Validates rotary parameters before transformers reads them, which looks the type up in a table without a check."""
    rope = text_config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    per_layer_type = [value for value in rope.values() if isinstance(value, dict) and "rope_type" in value]
    for parameters in per_layer_type or [rope]:
        rope_type, theta = parameters.get("rope_type", "default"), parameters.get("rope_theta", 1.0)
        if not isinstance(rope_type, str) or rope_type not in {"default", *ROPE_INIT_FUNCTIONS}:
            known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
            raise ValueError(f"text_config.rope_parameters: rope_type must be one of {known}, got {rope_type!r}")
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < _MAX_ROPE_THETA:
            raise ValueError(
                f"text_config.rope_parameters: rope_theta must be above 0 and below {_MAX_ROPE_THETA}, got {theta!r}"
            )


def _check_part(where: str, part: PreTrainedConfig) -> None:
    """Raises ValueError for a vision tower or language model that cannot be built."""
    values = part.to_dict()
    for name in _PART_SIZES:
        size = values.get(name)
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int):
            raise ValueError(f"{where}.{name} must be an integer, got {size!r}")
        _check_range(where, name, size, 1, _MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE)
    padding, num_tokens = values.get("pad_token_id"), values.get("vocab_size")
    if padding is not None and num_tokens and not -num_tokens <= padding < num_tokens:
        raise ValueError(f"{where}.pad_token_id must be within vocab_size={num_tokens}, got {padding}")
    heads, groups, hidden_size = (values.get(n) for n in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads and hidden_size and hidden_size % heads and not values.get("head_dim"):
        raise ValueError(f"{where}.hidden_size={hidden_size} is not divisible by num_attention_heads={heads}")
    if heads and groups and heads % groups:
        raise ValueError(f"{where}.num_attention_heads={heads} is not divisible by num_key_value_heads={groups}")
    if values.get("hidden_act") is not None:
        _check_activation(f"{where}.hidden_act", values["hidden_act"])


def _check_activation(name: str, value: Any) -> None:
    if not isinstance(value, str) or value not in ACT2FN:
        raise ValueError(f"{name} must be one of {', '.join(sorted(ACT2FN))}, got {value!r}")


class _NamedKeys:
    """Validates keyword arguments by name, and keeps unknown keys of a file."""

    _location: str  # of the keys, for messages

    @classmethod
    def _declared_keys(cls) -> set[str]:
        """Keys of this class, without those that every configuration of transformers has."""
        return {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}

    @classmethod
    def _inherited_keys(cls) -> set[str]:
        """Further keys that transformers reads or ignores."""
        return {field.name for field in fields(PreTrainedConfig)} | _TRANSFORMERS_KEYS

    @classmethod
    def _unknown_keys(cls, names: Iterable[str]) -> list[str]:
        known = cls._declared_keys() | cls._inherited_keys()
        return [name for name in names if name not in known and not name.startswith("_")]

    @classmethod
    def _names(cls) -> dict[str, Any]:
        """Arguments of the functions of key_names.py: the keys of this class, and those of the head or model beside it."""
        is_head = issubclass(cls, LlavaNextARAutoregressiveConfig)
        partner = LlavaNextARConfig if is_head else LlavaNextARAutoregressiveConfig
        elsewhere = {partner._location: partner._declared_keys()}
        return {"known": cls._declared_keys(), "where": cls._location, "elsewhere": elsewhere}

    @classmethod
    def check_keywords(cls, names: Iterable[str]) -> None:
        """Raises ValueError for names that the constructor does not take."""
        refuse_unknown(cls._unknown_keys(names), **cls._names())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers: unknown keys of `config_dict`, the content of a file, are kept, with a warning.

        Raises:
            ValueError: on a value or contradiction that construction rejects, or a misspelt keyword argument. Other
                keyword arguments are left to the model or tokenizer that is loaded with this configuration.
        """
        refuse_misspelt(cls._unknown_keys(kwargs), **cls._names())
        unknown = {name: kwargs.pop(name, config_dict[name]) for name in cls._unknown_keys(config_dict)}
        known = {name: value for name, value in config_dict.items() if name not in unknown}
        loaded = super().from_dict(known, **kwargs)
        keep_unknown(loaded[0] if isinstance(loaded, tuple) else loaded, unknown, cls._location)
        warn_unknown(unknown, **cls._names())
        return loaded

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """As in transformers; see `from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))


@strict
class LlavaNextARAutoregressiveConfig(_NamedKeys, PreTrainedConfig):
    r"""Configuration of the reconstruction head: from the frames read so far, predict the next frame's features.

    Args:
        embedding_dim (`int`, *optional*): width of the predictor; the vision tower's width if unset (1152 for SigLIP
            SO400M). Divisible by `num_heads`.
        num_hist (`int`, defaults to 3): frames a patch may attend to, its own included.
        loss_weight (`float`, defaults to 0.1): weight of the reconstruction loss in the total loss; 0 computes and
            reports it without training on it. The effect of other weights on accuracy is measured in the study
            (experiments/study/results/weights.md).
        num_heads (`int`, defaults to 8): attention heads of the predictor.
        num_layers (`int`, defaults to 3): transformer layers of the predictor.
        use_frame_causal_mask (`bool`, defaults to `True`): `False` lets a patch see every frame of the clip, the
            target included. Then the loss measures no prediction; it exists for the ablation.
        loss_type (`str`, defaults to `"mse"`): `mse | smooth_l1 | cosine`.
        target_norm (`bool`, defaults to `True`): normalise each target patch to zero mean and unit variance over its
            features (per-patch normalisation as in MAE, arXiv 2111.06377).
        use_fast_slow_frames (`bool`, defaults to `False`): the clip is sampled as fast and slow frames. Sampling
            itself is the video processor's work; in the head, slow frames stay visible to every later frame.
        fast_stride, slow_stride, num_fast, num_slow (`int`, default to 1, 4, 8, 8): the sampling that goes with it.
        enable_multiscale_pooling (`bool`, defaults to `False`): average the loss over a pyramid of coarser grids too.
        mm_spatial_pool_stride, mm_spatial_pool_mode, add_faster_video, faster_token_stride (*optional*): how *targets*
            are pooled. Unset, exactly as the tokens are; with `enable_multiscale_pooling`, 2, `average`, `False`, 10.
        separate_teacher (`bool`, defaults to `False`): the checkpoint holds a frozen copy of the vision tower as
            teacher. Set by the model when the tower starts to train.

    Raises:
        ValueError: on an unknown keyword argument (naming the nearest key), or a value out of range (naming key, value
            and range).
        huggingface_hub.errors.StrictDataclassFieldValidationError: on a value of the wrong type or not among the names
            allowed (naming key, value and the allowed ones). Not a subclass of ValueError.
    """

    model_type = "llava_next_ar_head"
    base_config_key = "autoregressive_config"
    _location = "autoregressive_config"

    embedding_dim: int | None = None
    num_hist: int = 3
    loss_weight: float | int = 0.1
    num_heads: int = 8
    num_layers: int = 3
    use_frame_causal_mask: bool = True
    loss_type: Literal["mse", "smooth_l1", "cosine"] = "mse"
    target_norm: bool = True
    use_fast_slow_frames: bool = False
    fast_stride: int = 1
    slow_stride: int = 4
    num_fast: int = 8
    num_slow: int = 8
    enable_multiscale_pooling: bool = False
    mm_spatial_pool_stride: int | None = None
    mm_spatial_pool_mode: PoolMode | None = None
    add_faster_video: bool | None = None
    faster_token_stride: int | None = None
    separate_teacher: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_keywords(kwargs)
        self.check_ranges()
        super().__post_init__(**kwargs)

    def check_ranges(self) -> None:
        """Validates ranges, also of values assigned after construction.

        Raises:
            ValueError: naming key, value and range.
        """
        for name in ("num_hist", "num_heads", "fast_stride", "slow_stride", "num_fast", "num_slow"):
            _check_range("autoregressive_config", name, getattr(self, name), 1)
        _check_range("autoregressive_config", "num_layers", self.num_layers, 1, _MAX_LAYERS)
        for name in ("embedding_dim", "mm_spatial_pool_stride", "faster_token_stride"):
            if getattr(self, name) is not None:
                _check_range("autoregressive_config", name, getattr(self, name), 1)
        _check_range("autoregressive_config", "loss_weight", self.loss_weight, 0)
        if self.embedding_dim is not None and self.embedding_dim % self.num_heads:
            raise ValueError(
                f"autoregressive_config.embedding_dim={self.embedding_dim} is not divisible by "
                f"num_heads={self.num_heads}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Keys of the head and unknown ones, without those that every transformers configuration has."""
        left_out = self._inherited_keys() - self._declared_keys() - {"model_type", "transformers_version"}
        values = super().to_dict().items()
        return {name: value for name, value in values if name not in left_out and not name.startswith("_")}

    def target_layout(self, token_layout: FrameTokenLayout) -> FrameTokenLayout:
        """The layout by which targets are pooled, for a layout of the tokens."""
        defaults = (2, "average", False, 10)
        given = (
            self.mm_spatial_pool_stride,
            self.mm_spatial_pool_mode,
            self.add_faster_video,
            self.faster_token_stride,
        )
        if not self.enable_multiscale_pooling:
            if all(value is None for value in given):
                return token_layout
            defaults = (
                token_layout.pool_stride,
                token_layout.pool_mode,
                token_layout.is_slow_fast,
                token_layout.faster_token_stride,
            )
        stride, mode, faster, faster_stride = (
            default if value is None else value for value, default in zip(given, defaults, strict=True)
        )
        return FrameTokenLayout(
            patches_height=token_layout.patches_height,
            patches_width=token_layout.patches_width,
            pool_stride=stride,
            pool_mode=mode,
            newline_position="grid",  # targets hold no newline; `grid` is where slow and fast frames differ
            add_faster_video=faster,
            faster_token_stride=faster_stride,
        )


@travels_with_code
@strict
class LlavaNextARConfig(_NamedKeys, LlavaOnevisionConfig):
    r"""Configuration of `LlavaNextARForConditionalGeneration`.

    A LLaVA-OneVision configuration (file, dict or Hub id) is a valid one: the defaults of the added keys are those of
    OneVision.

    Args:
        enable_autoregressive (`bool`, defaults to `True`): build the reconstruction head.
        autoregressive_config (`LlavaNextARAutoregressiveConfig` or `dict`, *optional*): the head's configuration.
        mm_spatial_pool_stride (`int`, defaults to 2), mm_spatial_pool_mode (`str`, defaults to `"bilinear"`): spatial
            pooling of video frames, as in LLaVA-NeXT.
        mm_newline_position (`str`, defaults to `"one_token"`): `one_token | grid | frame | no_token`.
        add_faster_video (`bool`, defaults to `False`), faster_token_stride (`int`, defaults to 10): slow and fast
            frames of LLaVA-Video; need `mm_newline_position="grid"`.
        mm_patch_merge_type (`str`, defaults to `"spatial_unpad"`): how the views of an image are put together, as in
            LLaVA-NeXT; see `ImageTokenLayout`. Videos follow `mm_newline_position` alone.
        unpad_rounding (`str`, defaults to `"round"`): how the padding around an image is cut off: `round` as in
            transformers, `truncate` as in the original project, whose converted checkpoints have it.

    All other keys are those of `LlavaOnevisionConfig`.

    Raises:
        ValueError: on an unknown keyword argument (naming the nearest key), a value out of range or a contradiction
            (naming both values).
        huggingface_hub.errors.StrictDataclassFieldValidationError: on a value of the wrong type or not among the names
            allowed (naming key, value and the allowed ones). Not a subclass of ValueError.

    Example:

    ```python
    >>> config = LlavaNextARConfig(mm_newline_position="grid", autoregressive_config={"num_hist": 4})
    >>> config.frame_token_layout.num_tokens(num_frames=8)
    1680
    ```
    """

    model_type = "llava_next_ar"
    _auto_class = "AutoConfig"
    _location = "the model configuration"
    keys_to_ignore_at_inference = [
        "cache",  # since transformers 5.24, which renamed past_key_values and the two *_hidden_states
        "past_key_values",
        "main_loss",
        "autoregressive_loss",
        "video_hidden_states",
        "image_hidden_states",
        "video_outputs",
        "image_outputs",
        "reconstruction",
    ]
    sub_configs = {**LlavaOnevisionConfig.sub_configs, "autoregressive_config": LlavaNextARAutoregressiveConfig}

    enable_autoregressive: bool = True
    autoregressive_config: dict | PreTrainedConfig | None = None
    mm_spatial_pool_stride: int = 2
    mm_spatial_pool_mode: PoolMode = "bilinear"
    mm_newline_position: NewlinePosition = "one_token"
    add_faster_video: bool = False
    faster_token_stride: int = 10
    mm_patch_merge_type: str = "spatial_unpad"
    unpad_rounding: UnpadRounding = "round"

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_keywords(kwargs)
        auto_map = {}
        if kwargs.pop("model_type", None) == self.model_type:  # a LLaVA-OneVision config names its own type
            auto_map = kwargs.get("auto_map") or {}  # may name a model class of the user's own
        if not isinstance(auto_map, dict) or not all(isinstance(value, str) for value in auto_map.values()):
            raise ValueError(f"auto_map must be a dict of strings, got {auto_map!r}")
        for name in ("vision_config", "text_config", "autoregressive_config"):
            part = getattr(self, name)
            if isinstance(part, dict) and not isinstance(part.get("model_type", ""), str):
                raise ValueError(f"{name}.model_type must be a string, got {part['model_type']!r}")
        if isinstance(self.text_config, dict):
            _check_rope(self.text_config)
        if self.autoregressive_config is None or isinstance(self.autoregressive_config, dict):
            self.autoregressive_config = LlavaNextARAutoregressiveConfig(**(self.autoregressive_config or {}))
        super().__post_init__(**kwargs)
        self.auto_map = {**AUTO_MAP, **auto_map}
        self._check_consistency()

    def _check_consistency(self) -> None:
        _check_range("config", "mm_spatial_pool_stride", self.mm_spatial_pool_stride, 1)
        _check_range("config", "faster_token_stride", self.faster_token_stride, 1)
        _check_part("vision_config", self.vision_config)
        _check_part("text_config", self.text_config)
        _check_activation("projector_hidden_act", self.projector_hidden_act)
        vision = self.vision_config
        if vision.image_size < vision.patch_size:
            raise ValueError(
                f"vision_config.image_size={vision.image_size} is less than patch_size={vision.patch_size}"
            )
        layers, last = self.vision_feature_layer, vision.num_hidden_layers  # hidden state 0 is the first layer's input
        for layer in [layers] if isinstance(layers, int) else layers:
            if not -last - 1 <= layer <= last:
                raise ValueError(f"vision_feature_layer must be from {-last - 1} to {last}, got {layer}")
        if self.add_faster_video and self.mm_newline_position != "grid":
            raise ValueError(
                f"add_faster_video=True needs mm_newline_position='grid', got {self.mm_newline_position!r} "
                "(LLaVA-NeXT ignores slow and fast frames there)"
            )
        head = self.autoregressive_config
        if head.model_type != LlavaNextARAutoregressiveConfig.model_type:
            raise ValueError(
                "autoregressive_config must be a dict or a LlavaNextARAutoregressiveConfig, got "
                f"{type(head).__name__} with model_type={head.model_type!r}"
            )
        if head.embedding_dim is None:
            head = copy.copy(head)  # the caller's object may serve a model with another tower too
            head.embedding_dim = self.vision_feature_dim
            self.autoregressive_config = head
        head.check_ranges()
        if not self.image_token_layout.is_anyres:
            raise ValueError(f"vision_aspect_ratio must be anyres or anyres_max_N, got {self.vision_aspect_ratio!r}")
        token_layout = self.frame_token_layout  # layouts validate themselves
        try:
            head.target_layout(token_layout)
        except ValueError as error:
            raise ValueError(f"impossible targets in autoregressive_config: {error}") from error

    def check(self) -> None:
        """Validates values that were assigned after construction.

        Unknown attributes are saved, too, as in transformers; a warning names them.

        Raises:
            ValueError, huggingface_hub.errors.StrictDataclassClassValidationError: see the class.
        """
        self.validate()
        self._check_consistency()
        for part in (self, self.autoregressive_config):
            warn_unknown(part._unknown_keys(vars(part)), **part._names())

    @classmethod
    def _declared_keys(cls) -> set[str]:
        return super()._declared_keys() | set(cls.attribute_map)

    @classmethod
    def _inherited_keys(cls) -> set[str]:
        return super()._inherited_keys() | _ONEVISION_LEGACY_KEYS

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers: unknown keys of `config_dict` are kept with a warning, those of the head in it, too.

        Raises:
            ValueError: on a value or contradiction that construction rejects, or a misspelt keyword argument, in an
                `autoregressive_config` given by keyword, too.
        """
        config_dict, kwargs = dict(config_dict), dict(kwargs)
        head = config_dict.get("autoregressive_config")
        if isinstance(kwargs.get("autoregressive_config"), Mapping) and isinstance(head, (Mapping, type(None))):
            changed = kwargs.pop("autoregressive_config")
            LlavaNextARAutoregressiveConfig.check_keywords(changed)
            head = {**(head or {}), **changed}
        if isinstance(head, Mapping) and isinstance(head.get("model_type", ""), str):
            config_dict["autoregressive_config"] = LlavaNextARAutoregressiveConfig.from_dict(head)
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config._check_consistency()
        return loaded

    @property
    def vision_feature_dim(self) -> int:
        """Width of the vision features that the projector reads."""
        num_layers = 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)
        return self.vision_config.hidden_size * num_layers

    @property
    def frame_token_layout(self) -> FrameTokenLayout:
        """The token layout of videos."""
        return FrameTokenLayout.for_vision_config(
            self.vision_config,
            pool_stride=self.mm_spatial_pool_stride,
            pool_mode=self.mm_spatial_pool_mode,
            newline_position=self.mm_newline_position,
            add_faster_video=self.add_faster_video,
            faster_token_stride=self.faster_token_stride,
        )

    @property
    def image_token_layout(self) -> ImageTokenLayout:
        """The token layout of images."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return ImageTokenLayout(
            patches_height=side,
            patches_width=side,
            tile_size=self.vision_config.image_size,
            grid_pinpoints=self.image_grid_pinpoints,
            aspect_ratio=self.vision_aspect_ratio,
            merge_type=self.mm_patch_merge_type,
            unpad_rounding=self.unpad_rounding,
        )
