"""The configuration: one default for each key, OneVision's accepted, and nothing wrong let in silently."""

import copy
import importlib.util
import json
import re
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny import ONEVISION, tiny_config
from transformers import LlavaOnevisionConfig

from llava_next_ar.configuration import configuration_llava_next_ar as configuration_module
from llava_next_ar.configuration import key_names
from llava_next_ar.configuration.configuration_llava_next_ar import (
    MINIMUM_TRANSFORMERS,
    SUPPORTED_TRANSFORMERS,
    LlavaNextARAutoregressiveConfig,
    LlavaNextARConfig,
)
from llava_next_ar.configuration.frame_token_layout import FrameTokenLayout
from llava_next_ar.hub.hub_code import AUTO_MAP

ROOT = Path(__file__).parents[2]

# a head, a layout and a tower that share no value with the defaults
OTHER = {
    "enable_autoregressive": False,
    "autoregressive_config": {
        "embedding_dim": 96,
        "num_hist": 5,
        "loss_weight": 2,
        "num_heads": 4,
        "num_layers": 2,
        "use_frame_causal_mask": False,
        "loss_type": "cosine",
        "target_norm": False,
        "use_fast_slow_frames": True,
        "fast_stride": 2,
        "slow_stride": 6,
        "num_fast": 3,
        "num_slow": 7,
        "enable_multiscale_pooling": True,
        "mm_spatial_pool_stride": 3,
        "mm_spatial_pool_mode": "max",
        "add_faster_video": True,
        "faster_token_stride": 4,
        "separate_teacher": True,
    },
    "mm_spatial_pool_stride": 3,
    "mm_spatial_pool_mode": "average",
    "mm_newline_position": "grid",
    "add_faster_video": True,
    "faster_token_stride": 2,
}


# --- defaults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, default",
    [
        ("embedding_dim", 1152),
        ("num_hist", 3),
        ("loss_weight", 0.1),
        ("num_heads", 8),
        ("num_layers", 3),
        ("use_frame_causal_mask", True),
        ("loss_type", "mse"),
        ("target_norm", True),
        ("use_fast_slow_frames", False),
        ("fast_stride", 1),
        ("slow_stride", 4),
        ("num_fast", 8),
        ("num_slow", 8),
        ("enable_multiscale_pooling", False),
        ("separate_teacher", False),
    ],
)
def test_default_of_the_head(key, default):
    value = getattr(LlavaNextARConfig().autoregressive_config, key)
    assert value == default and type(value) is type(default)


@pytest.mark.parametrize(
    "key, default",
    [
        ("enable_autoregressive", True),
        ("mm_spatial_pool_stride", 2),
        ("mm_spatial_pool_mode", "bilinear"),
        ("mm_newline_position", "one_token"),
        ("add_faster_video", False),
        ("faster_token_stride", 10),
    ],
)
def test_default_of_the_model(key, default):
    value = getattr(LlavaNextARConfig(), key)
    assert value == default and type(value) is type(default)


def test_default_layout_is_onevisions():
    config = LlavaNextARConfig()
    assert config.frame_token_layout == FrameTokenLayout(patches_height=27, patches_width=27)
    assert config.frame_token_layout.num_tokens(8) == 8 * 14 * 14 + 1


def test_every_key_is_documented_in_its_class():
    own = {field.name for field in fields(LlavaNextARConfig)} - {field.name for field in fields(LlavaOnevisionConfig)}
    documented = re.split(r"\n\n    All other keys", LlavaNextARConfig.__doc__)[0]
    assert {key for key in own if not re.search(rf"\b{key}\b", documented)} == set()
    head_keys = set(LlavaNextARAutoregressiveConfig().to_dict()) - {"model_type", "transformers_version"}
    documented = LlavaNextARAutoregressiveConfig.__doc__
    assert {key for key in head_keys if not re.search(rf"\b{key}\b", documented)} == set()


def test_docstring_example():
    config = LlavaNextARConfig(mm_newline_position="grid", autoregressive_config={"num_hist": 4})
    assert str(config.frame_token_layout.num_tokens(num_frames=8)) in LlavaNextARConfig.__doc__
    assert config.autoregressive_config.num_hist == 4


# --- what follows from other keys ---------------------------------------------------------------------------


TOWER = {"hidden_size": 64, "num_attention_heads": 4}


def test_embedding_dim_is_the_towers_width():
    assert LlavaNextARConfig(vision_config=TOWER).autoregressive_config.embedding_dim == 64
    two_layers = LlavaNextARConfig(vision_config=TOWER, vision_feature_layer=[-2, -1])
    assert two_layers.autoregressive_config.embedding_dim == two_layers.vision_feature_dim == 128
    given = LlavaNextARConfig(vision_config=TOWER, autoregressive_config={"embedding_dim": 32})
    assert given.autoregressive_config.embedding_dim == 32


def test_one_head_configuration_serves_models_with_different_towers():
    # The width found for the first model was once written into the caller's object, and the second model got it.
    head = LlavaNextARAutoregressiveConfig(num_hist=5)
    widths = [
        LlavaNextARConfig(
            vision_config={**TOWER, "hidden_size": width}, autoregressive_config=head
        ).autoregressive_config
        for width in (64, 32)
    ]
    assert [config.embedding_dim for config in widths] == [64, 32]
    assert [config.num_hist for config in widths] == [5, 5]
    assert head.embedding_dim is None


def test_token_layout_follows_the_keys():
    # 100 pixels are 7 patches of 14 and a rest
    config = LlavaNextARConfig(vision_config={"image_size": 100, "patch_size": 14, "hidden_size": 96}, **OTHER)
    assert config.frame_token_layout == FrameTokenLayout(
        patches_height=7,
        patches_width=7,
        pool_stride=3,
        pool_mode="average",
        newline_position="grid",
        add_faster_video=True,
        faster_token_stride=2,
    )


TOKEN_LAYOUT = FrameTokenLayout(
    patches_height=16,
    patches_width=8,
    pool_stride=4,
    pool_mode="max",
    newline_position="grid",
    add_faster_video=True,
    faster_token_stride=3,
)


def targets(**keys) -> tuple:
    layout = LlavaNextARAutoregressiveConfig(**keys).target_layout(TOKEN_LAYOUT)
    assert (layout.patches_height, layout.patches_width) == (16, 8)
    return layout.pool_stride, layout.pool_mode, layout.add_faster_video, layout.faster_token_stride


def test_targets_are_pooled_as_the_tokens_are_when_nothing_is_set():
    assert LlavaNextARAutoregressiveConfig().target_layout(TOKEN_LAYOUT) == TOKEN_LAYOUT


def test_multiscale_pooling_brings_defaults_of_its_own():
    assert targets(enable_multiscale_pooling=True) == (2, "average", False, 10)


@pytest.mark.parametrize("multiscale, rest", [(False, (4, "max", True, 3)), (True, (2, "average", False, 10))])
def test_target_keys_replace_one_value_each(multiscale, rest):
    for position, (key, value) in enumerate(
        [
            ("mm_spatial_pool_stride", 1),
            ("mm_spatial_pool_mode", "bilinear"),
            ("add_faster_video", not rest[2]),
            ("faster_token_stride", 7),
        ]
    ):
        expected = rest[:position] + (value,) + rest[position + 1 :]
        assert targets(enable_multiscale_pooling=multiscale, **{key: value}) == expected


def test_targets_of_slow_and_fast_frames_differ_in_resolution():
    layout = LlavaNextARAutoregressiveConfig(add_faster_video=True).target_layout(
        FrameTokenLayout(patches_height=16, patches_width=16)
    )
    assert layout.video(11).frame_grids[9:] == ((4, 4), (8, 8))  # frame 9 is fast, frame 10 slow


# --- OneVision's configuration ------------------------------------------------------------------------------

# as released: keys that transformers has since dropped or renamed are part of it
RELEASED_ONEVISION = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "ignore_index": -100,
    "image_grid_pinpoints": [[384, 384], [384, 768], [768, 384]],
    "image_token_index": 151646,
    "model_type": "llava_onevision",
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "Qwen/Qwen2-0.5B-Instruct",
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 152000,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.45.0.dev0",
    "use_image_newline_parameter": True,
    "video_token_index": 151647,
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}


def onevision_saved(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(RELEASED_ONEVISION))
    return folder


@pytest.mark.parametrize("how", ["dict", "folder", "kwargs", "saved again"])
def test_onevision_configuration_is_accepted_with_the_same_values(how, tmp_path):
    onevision = LlavaOnevisionConfig.from_dict(copy.deepcopy(RELEASED_ONEVISION))
    if how == "dict":
        config = LlavaNextARConfig.from_dict(copy.deepcopy(RELEASED_ONEVISION))
    elif how == "folder":
        config = LlavaNextARConfig.from_pretrained(onevision_saved(tmp_path))
    elif how == "kwargs":
        config = LlavaNextARConfig(**copy.deepcopy(RELEASED_ONEVISION))
    else:
        onevision.save_pretrained(tmp_path)
        config = LlavaNextARConfig.from_pretrained(tmp_path)
    assert config.model_type == "llava_next_ar"
    ours, theirs = config.to_dict(), onevision.to_dict()
    changed = {key for key in theirs if ours.get(key) != theirs[key]}
    assert changed <= {"model_type", "transformers_version", *configuration_module._ONEVISION_LEGACY_KEYS}
    assert config.tie_word_embeddings  # OneVision takes it from its text configuration
    assert config.frame_token_layout == FrameTokenLayout(patches_height=27, patches_width=27)
    assert config.autoregressive_config == LlavaNextARAutoregressiveConfig(embedding_dim=1152)


# --- rejected values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typo, nearest",
    [
        ("mm_spatial_pool_strid", "mm_spatial_pool_stride"),
        ("mm_new_line_position", "mm_newline_position"),
        ("enable_autoregresive", "enable_autoregressive"),
        ("autoregressive_confg", "autoregressive_config"),
        ("add_faster_videos", "add_faster_video"),
        ("vision_feature_layers", "vision_feature_layer"),
        ("image_token", "image_token_id"),
    ],
)
def test_a_typo_is_refused_naming_the_nearest_key(typo, nearest):
    with pytest.raises(ValueError, match=f"unknown option '{typo}' for the model configuration.*'{nearest}'"):
        LlavaNextARConfig(**{typo: 1})


@pytest.mark.parametrize(
    "typo, nearest",
    [
        ("num_hst", "num_hist"),
        ("loss_weigth", "loss_weight"),
        ("enable_multiscale", "enable_multiscale_pooling"),
        ("num_head", "num_heads"),
        ("embed_dim", "embedding_dim"),
        ("use_causal_mask", "use_frame_causal_mask"),
    ],
)
def test_a_typo_in_the_head_is_refused_naming_the_nearest_key(typo, nearest):
    for build in (
        lambda: LlavaNextARAutoregressiveConfig(**{typo: 1}),
        lambda: LlavaNextARConfig(autoregressive_config={typo: 1}),
    ):
        with pytest.raises(ValueError, match=f"unknown option '{typo}' for autoregressive_config.*'{nearest}'"):
            build()


@pytest.mark.parametrize("key", sorted(set(OTHER["autoregressive_config"]) - set(OTHER)))
def test_a_key_of_the_head_one_level_too_high_is_refused(key):
    with pytest.raises(
        ValueError, match=f"'{key}' for the model configuration; '{key}' belongs in autoregressive_config"
    ):
        LlavaNextARConfig(**{key: OTHER["autoregressive_config"][key]})


@pytest.mark.parametrize("key", ["enable_autoregressive", "mm_newline_position", "vision_config"])
def test_a_key_of_the_model_one_level_too_low_is_refused(key):
    with pytest.raises(
        ValueError, match=f"'{key}' for autoregressive_config; '{key}' belongs in the model configuration"
    ):
        LlavaNextARConfig(autoregressive_config={key: OTHER.get(key)})


INFINITY = float("inf")


@pytest.mark.parametrize(
    "key, value",
    [(key, 0) for key in ("num_hist", "num_heads", "num_layers", "fast_stride", "slow_stride", "num_fast", "num_slow")]
    + [(key, -1) for key in ("embedding_dim", "mm_spatial_pool_stride", "faster_token_stride", "num_hist")]
    + [("loss_weight", value) for value in (-0.1, float("nan"), INFINITY)],
)
def test_a_value_of_the_head_out_of_range_is_refused(key, value):
    low = 0 if key == "loss_weight" else 1
    with pytest.raises(ValueError, match=rf"autoregressive_config\.{key} must be .*at least {low}, got {value}"):
        LlavaNextARConfig(autoregressive_config={key: value})


@pytest.mark.parametrize("key", ["mm_spatial_pool_stride", "faster_token_stride"])
@pytest.mark.parametrize("value", [0, -2])
def test_a_value_of_the_model_out_of_range_is_refused(key, value):
    with pytest.raises(ValueError, match=rf"config\.{key} must be .*at least 1, got {value}"):
        LlavaNextARConfig(**{key: value})


def test_bounds_themselves_are_allowed():
    config = LlavaNextARConfig(
        mm_spatial_pool_stride=1,
        faster_token_stride=1,
        autoregressive_config={"num_hist": 1, "loss_weight": 0, "num_heads": 1, "num_layers": 1},
    )
    assert config.autoregressive_config.loss_weight == 0
    assert config.frame_token_layout.num_tokens(1) == 27 * 27 + 1


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"add_faster_video": True}, "add_faster_video=True needs mm_newline_position='grid', got 'one_token'"),
        ({"add_faster_video": True, "mm_newline_position": "frame"}, "'grid', got 'frame'"),
        ({"autoregressive_config": {"num_heads": 7}}, "embedding_dim=1152 is not divisible by num_heads=7"),
        # refused with the head switched off as well: the width is saved, and the file could not be loaded again
        (
            {"enable_autoregressive": False, "autoregressive_config": {"num_heads": 7}},
            "embedding_dim=1152 is not divisible by num_heads=7",
        ),
        (
            {"autoregressive_config": {"embedding_dim": 100, "num_heads": 8}},
            "embedding_dim=100 is not divisible by num_heads=8",
        ),
        (
            {"mm_spatial_pool_stride": 28, "mm_spatial_pool_mode": "average"},
            r"pool_stride=28 \(average\) leaves no patch of a slow frame with 27x27 patches",
        ),
        (
            {
                "mm_spatial_pool_stride": 14,
                "mm_spatial_pool_mode": "max",
                "mm_newline_position": "grid",
                "add_faster_video": True,
            },
            r"pool_stride=14 \(max\) leaves no patch of a fast frame",
        ),
        (
            {"autoregressive_config": {"mm_spatial_pool_stride": 28, "mm_spatial_pool_mode": "max"}},
            r"autoregressive_config: pool_stride=28 \(max\) leaves no patch",
        ),
        (
            {"autoregressive_config": LlavaOnevisionConfig()},
            "autoregressive_config must be .*got LlavaOnevisionConfig",
        ),
    ],
)
def test_contradictions_are_refused_naming_both_values(keys, message):
    with pytest.raises(ValueError, match=message):
        LlavaNextARConfig(**keys)


@pytest.mark.parametrize(
    "build, key, named",
    [
        (lambda: LlavaNextARConfig(mm_spatial_pool_stride=2.0), "mm_spatial_pool_stride", "expected int, got float"),
        (lambda: LlavaNextARConfig(mm_spatial_pool_stride=True), "mm_spatial_pool_stride", "expected int, got bool"),
        (lambda: LlavaNextARConfig(enable_autoregressive="yes"), "enable_autoregressive", "expected bool, got str"),
        (
            lambda: LlavaNextARConfig(mm_spatial_pool_mode="mean"),
            "mm_spatial_pool_mode",
            "'average', 'max', 'bilinear'",
        ),
        (lambda: LlavaNextARConfig(mm_newline_position="row"), "mm_newline_position", "'one_token', 'grid', 'frame'"),
        (lambda: LlavaNextARConfig(autoregressive_config=3), "autoregressive_config", "expected dict, got int"),
        (lambda: LlavaNextARAutoregressiveConfig(num_hist="3"), "num_hist", "expected int, got str (value: '3')"),
        (lambda: LlavaNextARAutoregressiveConfig(num_hist=True), "num_hist", "expected int, got bool"),
        # what YAML makes of 1e-2
        (lambda: LlavaNextARAutoregressiveConfig(loss_weight="1e-2"), "loss_weight", "expected float, got str"),
        (lambda: LlavaNextARAutoregressiveConfig(loss_type="l1"), "loss_type", "'mse', 'smooth_l1', 'cosine'"),
    ],
)
def test_wrong_types_and_names_are_refused(build, key, named):
    with pytest.raises(StrictDataclassFieldValidationError) as error:
        build()
    assert f"'{key}'" in str(error.value) and named in str(error.value)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, OTHER], ids=["defaults", "everything else"])
def test_json_round_trip(keys):
    config = LlavaNextARConfig(**keys)
    text = config.to_json_string()
    again = LlavaNextARConfig(**json.loads(text))
    assert again.to_json_string() == text
    for key, value in keys.get("autoregressive_config", {}).items():
        assert getattr(again.autoregressive_config, key) == value


@pytest.mark.parametrize("keys", [{}, OTHER], ids=["defaults", "everything else"])
def test_save_load_save_is_byte_identical(keys, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    LlavaNextARConfig(**keys).save_pretrained(first)
    LlavaNextARConfig.from_pretrained(first).save_pretrained(second)
    files = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert Path("config.json") in files
    assert files == {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    assert {path for path in files if (first / path).read_bytes() != (second / path).read_bytes()} == set()


def test_saved_configuration_holds_every_key_of_the_head_and_the_full_auto_map(tmp_path):
    LlavaNextARConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP
    assert set(saved["autoregressive_config"]) == set(OTHER["autoregressive_config"]) | {"model_type"}


@pytest.fixture
def saved(tmp_path) -> Path:
    """A `config.json` without the code beside it."""
    (tmp_path / "config.json").write_text(LlavaNextARConfig(**OTHER).to_json_string())
    return tmp_path


def test_overriding_one_key_of_the_head_keeps_the_rest(saved):
    config = LlavaNextARConfig.from_pretrained(saved, autoregressive_config={"num_hist": 7})
    before = LlavaNextARConfig.from_pretrained(saved).to_dict()
    before["autoregressive_config"]["num_hist"] = 7
    assert config.to_dict() == before


def test_overriding_the_head_with_an_object_replaces_it(saved):
    config = LlavaNextARConfig.from_pretrained(
        saved, autoregressive_config=LlavaNextARAutoregressiveConfig(num_hist=7)
    )
    assert config.autoregressive_config == LlavaNextARAutoregressiveConfig(num_hist=7, embedding_dim=1152)


@pytest.mark.parametrize(
    "override, message",
    [
        ({"autoregressive_config": {"num_hst": 7}}, "did you mean 'num_hist'"),
        ({"autoregressive_config": {"num_heads": 7}}, "embedding_dim=96 is not divisible by num_heads=7"),
        ({"mm_spatial_pool_stride": 0}, "mm_spatial_pool_stride must be .*at least 1, got 0"),
        ({"mm_newline_position": "frame"}, "add_faster_video=True needs mm_newline_position='grid', got 'frame'"),
    ],
)
def test_overrides_at_load_are_checked_like_values_at_construction(saved, override, message):
    with pytest.raises(ValueError, match=message):
        LlavaNextARConfig.from_pretrained(saved, **override)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pad_token_id", 128, "text_config.pad_token_id must be within vocab_size=128, got 128"),
        ("pad_token_id", -129, "text_config.pad_token_id must be within vocab_size=128, got -129"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 2**70}, "rope_theta must be above 0 and below"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}, "rope_theta must be above 0 and below"),
    ],
)
def test_a_language_model_that_torch_cannot_build_is_refused_by_name(key, value, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(text_config={**ONEVISION["text_config"], key: value})
    tiny_config(text_config={**ONEVISION["text_config"], "pad_token_id": 127})


def test_unused_arguments_come_back_for_the_model(saved):
    config, unused = LlavaNextARConfig.from_pretrained(
        saved, return_unused_kwargs=True, faster_token_stride=5, device_map="cpu"
    )
    assert config.faster_token_stride == 5
    assert unused == {"device_map": "cpu"}


def test_deepcopy_shares_nothing():
    config = LlavaNextARConfig(**OTHER)
    duplicate = copy.deepcopy(config)
    assert duplicate.to_dict() == config.to_dict()
    duplicate.autoregressive_config.num_hist = 9
    duplicate.vision_config.hidden_size = 8
    assert config.autoregressive_config.num_hist == 5
    assert config.vision_config.hidden_size == 1152


def test_two_configurations_share_nothing():
    first = LlavaNextARConfig()
    first.autoregressive_config.num_hist = 9
    first.auto_map["AutoConfig"] = "elsewhere"
    assert LlavaNextARConfig().autoregressive_config.num_hist == 3
    assert LlavaNextARConfig().auto_map == AUTO_MAP


# --- version guard ------------------------------------------------------------------------------------------


def execute_module_again() -> None:
    spec = importlib.util.spec_from_file_location("llava_next_ar.configuration.again", configuration_module.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("found", ["4.57.1", "5.18.0", "5.9.0", "6.0.0.dev0", "6.0.0"])
def test_another_transformers_is_refused_naming_both_versions(found, monkeypatch):
    # A module with nothing but a version: another transformers lacks names that the configuration imports, and the
    # guard must speak before they are missed.
    other = types.ModuleType("transformers")
    other.__version__ = found
    monkeypatch.setitem(sys.modules, "transformers", other)
    with pytest.raises(ImportError) as error:
        execute_module_again()
    assert f"transformers{SUPPORTED_TRANSFORMERS}" in str(error.value)
    assert f"found {found}" in str(error.value)


@pytest.mark.parametrize("found", [MINIMUM_TRANSFORMERS, "5.23.0.dev0", "5.100.0"])
def test_a_newer_transformers_is_accepted(found, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", found)
    execute_module_again()


def test_the_guard_asks_for_what_the_package_asks_for():
    (dependency,) = re.findall(r'"transformers(>=.*)"', (ROOT / "pyproject.toml").read_text())
    assert dependency == SUPPORTED_TRANSFORMERS


# --- unknown keys of a file, misspelt keyword arguments ---------------------------------------------------


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    """Warnings about names, each once."""
    messages = []
    monkeypatch.setattr(key_names.logger, "warning_once", lambda text: text in messages or messages.append(text))
    return messages


def with_unknown_keys(values: dict) -> dict:
    """Unknown keys of tools in a `config.json`, on both levels, one nearly and one exactly a known one."""
    values = {**values, "unsloth_version": "2026.1", "mm_newline_positon": "grid", "num_hist": 4, "quant": {"a": [1]}}
    head = {**values.get("autoregressive_config", {}), "num_hsit": 9, "trained_by": None}
    return {**values, "autoregressive_config": head}


KEPT = [
    "unknown key 'num_hsit' in autoregressive_config is kept, but has no effect; did you mean 'num_hist'?",
    "unknown key 'trained_by' in autoregressive_config is kept, but has no effect",
    "unknown key 'unsloth_version' in the model configuration is kept, but has no effect",
    "unknown key 'mm_newline_positon' in the model configuration is kept, but has no effect; did you mean "
    "'mm_newline_position'?",
    "unknown key 'num_hist' in the model configuration is kept, but has no effect; 'num_hist' belongs in "
    "autoregressive_config",
    "unknown key 'quant' in the model configuration is kept, but has no effect",
]


@pytest.mark.parametrize("values", [LlavaNextARConfig(**OTHER).to_dict(), LlavaOnevisionConfig().to_dict()])
@pytest.mark.parametrize("how", ["folder", "json file", "dict"])
def test_unknown_keys_of_a_file_are_kept_and_saved_again(values, how, tmp_path, warned):
    written = json.loads(json.dumps(with_unknown_keys(values), default=str))
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = {
        "folder": lambda: LlavaNextARConfig.from_pretrained(tmp_path),
        "json file": lambda: LlavaNextARConfig.from_json_file(tmp_path / "config.json"),
        "dict": lambda: LlavaNextARConfig.from_dict(written),
    }[how]()
    assert warned == KEPT
    assert (config.unsloth_version, config.num_hist, config.quant) == ("2026.1", 4, {"a": [1]})
    assert config.mm_newline_position == values.get("mm_newline_position", "one_token")
    assert config.autoregressive_config.num_hist == values.get("autoregressive_config", {}).get("num_hist", 3)
    saved = json.loads(config.to_json_string())
    for name in ("unsloth_version", "mm_newline_positon", "num_hist", "quant"):
        assert saved[name] == written[name]
    assert saved["autoregressive_config"]["num_hsit"] == 9
    assert saved["autoregressive_config"]["trained_by"] is None
    assert json.loads(LlavaNextARConfig.from_dict(saved).to_json_string()) == saved
    assert warned == KEPT


def test_unknown_attributes_are_saved_with_a_warning(tmp_path, warned):
    config = LlavaNextARConfig()
    config.run_name, config.autoregressive_config.num_hsit = "a", 2
    config.save_pretrained(tmp_path)
    assert [text.split(" is kept")[0] for text in warned] == [
        "unknown key 'run_name' in the model configuration",
        "unknown key 'num_hsit' in autoregressive_config",
    ]
    again = LlavaNextARConfig.from_pretrained(tmp_path)
    assert (again.run_name, again.autoregressive_config.num_hsit) == ("a", 2)
    assert again.to_dict() == config.to_dict()


def test_a_configuration_without_unknown_keys_is_saved_without_a_warning(tmp_path, warned):
    LlavaNextARConfig(**OTHER, dtype="float16", attn_implementation="eager").save_pretrained(tmp_path)
    LlavaNextARConfig.from_pretrained(tmp_path, num_labels=3, return_dict=False).save_pretrained(tmp_path)
    assert warned == []


def test_a_head_given_by_keyword_changes_the_files_and_keeps_its_unknown_keys(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(with_unknown_keys(LlavaNextARConfig(**OTHER).to_dict()), default=str)
    )
    config = LlavaNextARConfig.from_pretrained(tmp_path, autoregressive_config={"num_hist": 8})
    assert (config.autoregressive_config.num_hist, config.autoregressive_config.num_hsit) == (8, 9)
    assert config.autoregressive_config.num_layers == OTHER["autoregressive_config"]["num_layers"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"num_hsit": 4},
            "unknown option 'num_hsit' for the model configuration; 'num_hist' belongs in autoregressive_c",
        ),
        (
            {"num_hist": 4},
            "unknown option 'num_hist' for the model configuration; 'num_hist' belongs in autoregressive_c",
        ),
        ({"mm_newline_positon": "grid"}, "did you mean 'mm_newline_position'"),
        ({"newline_position_mm": "grid"}, "did you mean 'mm_newline_position'"),
        ({"autoregressive_config": {"num_hsit": 4}}, "'num_hsit' for autoregressive_config; did you mean 'num_hist'"),
        ({"autoregressive_config": {"xyzzy": 4}}, "'xyzzy' for autoregressive_config; known are: "),
        (
            {"autoregressive_config": {"enable_autoregressive": 1}},
            "'enable_autoregressive' belongs in the model config",
        ),
    ],
)
@pytest.mark.parametrize("for_model", [False, True])
def test_misspelt_keywords_are_refused_whatever_the_file_holds(saved, keywords, message, for_model):
    """`return_unused_kwargs` is how a model's own `from_pretrained` reads the configuration."""
    path = saved / "config.json"
    path.write_text(json.dumps(with_unknown_keys(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        LlavaNextARConfig.from_pretrained(saved, return_unused_kwargs=for_model, **keywords)


def test_keywords_of_models_and_tokenizers_pass(saved):
    given = {
        "device_map": "cpu",
        "eos_token": "</s>",
        "use_fast": True,
        "quantization_config": None,
        "padding_side": "left",
    }
    given |= {"generation_config": None, "max_length": 5, "variant": "fp16", "key_mapping": {}, "state_dict": None}
    assert LlavaNextARConfig.from_pretrained(saved, return_unused_kwargs=True, **given)[1] == given


@pytest.mark.parametrize("key", ["to_dict", "frame_token_layout", "sub_configs", "attribute_map", "from_pretrained"])
def test_an_unknown_key_of_a_file_cannot_hide_a_method(saved, key):
    values = json.loads((saved / "config.json").read_text())
    with pytest.raises(
        ValueError, match=f"key '{key}' in the model configuration is the name of a method or property"
    ):
        LlavaNextARConfig.from_dict({**values, key: 1})


def test_reading_a_dict_does_not_change_it():
    values = with_unknown_keys(LlavaNextARConfig().to_dict())
    before = copy.deepcopy(values)
    LlavaNextARConfig.from_dict(values, faster_token_stride=3, num_labels=5, autoregressive_config={"num_hist": 8})
    assert values == before


def test_far_from_every_key_all_keys_are_named():
    with pytest.raises(ValueError, match="unknown option 'xyzzy'.*known are: .*mm_newline_position"):
        LlavaNextARConfig(xyzzy=1)
