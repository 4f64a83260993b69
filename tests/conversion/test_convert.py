"""Conversion there and back, what is refused, and how much memory it takes."""

import json
import re
import shutil
import textwrap
from fnmatch import fnmatch
from pathlib import Path

import processes
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import IMAGE_SIZE, IMAGE_TOKEN, ONEVISION, VIDEO_TOKEN, tiny_model, tiny_onevision, video_batch
from tiny_tokenizer import character_tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaOnevisionForConditionalGeneration

from llava_next_ar.conversion import checkpoint_conversion, convert
from llava_next_ar.conversion.checkpoint_conversion import convert_checkpoint
from llava_next_ar.conversion.original_checkpoint import settings_from_original_config
from llava_next_ar.conversion.streamed_safetensors import CheckpointError
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor

SCRIPTS = Path(__file__).parents[2] / "scripts"
TOWER = {**ONEVISION["vision_config"], "num_hidden_layers": 3}  # the original drops its last layer
HEAD = {"num_heads": 2, "num_layers": 1}

# Names of a tensor on disk as transformers writes them today -> in other generations of checkpoints.
GENERATIONS = {
    "today": {},
    "released": {r"^vision_tower\.": "vision_tower.vision_model."},
    "in memory": {
        r"^language_model\.lm_head": "lm_head",
        r"^language_model\.model": "model.language_model",
        r"^(vision_tower|multi_modal_projector|image_newline)": r"model.\1",
    },
    "in between": {
        r"^language_model\.lm_head": "lm_head",
        r"^language_model\.model": "model.language_model",
        r"^vision_tower\.": "model.vision_tower.vision_model.",
        r"^(multi_modal_projector|image_newline)": r"model.\1",
    },
}
TO_ORIGINAL = {
    r"^language_model\.lm_head": "lm_head",
    r"^language_model\.model": "model",
    r"^vision_tower\.": "model.vision_tower.vision_tower.vision_model.",
    r"^multi_modal_projector\.linear_1": "model.mm_projector.0",
    r"^multi_modal_projector\.linear_2": "model.mm_projector.2",
    r"^image_newline": "model.image_newline",
}


def renamed(tensors: dict[str, torch.Tensor], rules: dict[str, str]) -> dict[str, torch.Tensor]:
    for pattern, replacement in rules.items():
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return tensors


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def store(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Writes weights as one file, or spread over shards with their index."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = dict(list(tensors.items())[shard::shards])
        save_file(own, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def onevision(folder: Path, *, generation: str = "today", shards: int = 1, tied: bool = False, dtype=torch.float32):
    """A folder as LLaVA-OneVision checkpoints are; returns its model."""
    keys = {"text_config": {**ONEVISION["text_config"], "tie_word_embeddings": tied}, "tie_word_embeddings": tied}
    model = tiny_onevision(**keys).to(dtype)
    model.save_pretrained(folder)
    store(folder, renamed(weights(folder), GENERATIONS[generation]), shards)
    return model


ORIGINAL_CONFIG = {
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "llava_qwen",
    **{k: v for k, v in ONEVISION["text_config"].items() if k != "model_type" and v is not None},
    "mm_vision_tower": "tiny/siglip",
    "mm_projector_type": "mlp2x_gelu",
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_spatial_pool_stride": 2,
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[IMAGE_SIZE * w, IMAGE_SIZE * h] for w, h in ((1, 1), (2, 1), (1, 2), (3, 1))],
    "add_time_instruction": True,
    "force_sample": True,
    "torch_dtype": "float32",
}


def original(folder: Path, *, tied: bool = False, shards: int = 1, tokenizer: bool = False, **keys) -> dict:
    """A folder as the original project's checkpoints are; returns the weights under our names."""
    ours = onevision(folder, tied=tied).state_dict()
    if tied:
        del ours["lm_head.weight"]
    on_disk = weights(folder)
    for path in folder.glob("*"):
        path.unlink()
    store(folder, renamed(on_disk, TO_ORIGINAL), shards)
    (folder / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, "tie_word_embeddings": tied, **keys}))
    if tokenizer:
        character_tokenizer().save_pretrained(folder)
    return ours


def run(source: Path, output: Path, **keys):
    keys = {"autoregressive_config": HEAD, "progress": False, **keys}
    if "to" in keys:
        keys.pop("autoregressive_config")
    elif "mm_vision_tower" in json.loads((source / "config.json").read_text()):
        keys = {"vision_config": TOWER, "image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN, **keys}
    return convert_checkpoint(source, output, **keys)


def same_bytes(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
        for name in first
    )


# --- there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_onevision_there_and_back(tmp_path, generation, shards, tied):
    theirs = onevision(tmp_path / "theirs", generation=generation, shards=shards, tied=tied)
    run(tmp_path / "theirs", tmp_path / "ours", max_shard_size=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    done = run(tmp_path / "ours", tmp_path / "back", to="llava_onevision")
    assert not any("head" in note for note in done.notes)  # it never had one
    theirs.save_pretrained(tmp_path / "expected")
    assert same_bytes(weights(tmp_path / "back"), weights(tmp_path / "expected"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("expected", "back")]
    assert configs[0] == configs[1]
    assert not list((tmp_path / "back").glob("*.py"))


@torch.no_grad()
def test_a_converted_onevision_model_gives_its_logits(tmp_path):
    theirs = onevision(tmp_path / "theirs", generation="released", tied=True)
    run(tmp_path / "theirs", tmp_path / "ours")
    ours, report = LlavaNextARForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert {name.partition(".")[0] for name in report["missing_keys"]} == {"autoregressive_module"}
    assert not report["unexpected_keys"]
    inputs = video_batch(ours.config, [[2], [2]])
    expected = theirs(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pixel_values_videos=inputs["pixel_values_videos"],
    )
    assert torch.equal(ours(**inputs).logits, expected.logits)
    assert ours.config.unpad_rounding == "round"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 4])
def test_original_checkpoints(tmp_path, tied, shards):
    """Every tensor arrives under its name; with and without a stored copy of the tied head."""
    expected = original(tmp_path / "original", tied=tied, shards=shards)
    result = run(tmp_path / "original", tmp_path / "ours")
    assert same_bytes(weights(tmp_path / "ours"), expected)
    assert result.config.unpad_rounding == "truncate"
    assert result.config.mm_newline_position == "grid"
    given = ORIGINAL_CONFIG["image_grid_pinpoints"]
    assert result.config.image_grid_pinpoints == [[height, width] for width, height in given]
    if tied:
        stored = weights(tmp_path / "original")
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
        store(tmp_path / "original", stored)
        run(tmp_path / "original", tmp_path / "again")
        assert same_bytes(weights(tmp_path / "again"), expected)
        stored["lm_head.weight"][0, 0] += 1
        store(tmp_path / "original", stored)
        with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
            run(tmp_path / "original", tmp_path / "other")


def test_names_on_disk_are_those_that_saving_writes(tmp_path):
    original(tmp_path / "original")
    run(tmp_path / "original", tmp_path / "ours")
    model = LlavaNextARForConditionalGeneration.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "saved")
    saved = {name for name in weights(tmp_path / "saved") if not name.startswith("autoregressive_module.")}
    assert saved == weights(tmp_path / "ours").keys()


def test_slow_and_fast_frames(tmp_path):
    keys = {"add_faster_video": True, "faster_token_stride": 3}
    original(tmp_path / "original", **keys)
    with pytest.raises(CheckpointError, match=r"missing tensors \(1\): model.faster_token.*add_faster_video=false"):
        run(tmp_path / "original", tmp_path / "ours")
    plain = run(tmp_path / "original", tmp_path / "plain", config_overrides={"add_faster_video": False})
    assert not plain.config.add_faster_video

    stored = weights(tmp_path / "original")
    stored["model.faster_token"] = torch.randn(ONEVISION["text_config"]["hidden_size"])
    store(tmp_path / "original", stored)
    run(tmp_path / "original", tmp_path / "ours")
    model = LlavaNextARForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert torch.equal(model.model.faster_token, stored["model.faster_token"])
    assert model.config.faster_token_stride == 3
    without = run(tmp_path / "original", tmp_path / "without", config_overrides={"add_faster_video": False})
    assert any("model.faster_token was left out" in note for note in without.notes)
    with pytest.raises(ValueError, match="add_faster_video=True"):
        run(tmp_path / "ours", tmp_path / "back", to="llava_onevision")


@pytest.mark.parametrize(
    "keys",
    [
        {"mm_newline_position": "grid"},
        {"mm_spatial_pool_mode": "average"},
        {"mm_spatial_pool_stride": 1},
        {"mm_patch_merge_type": "spatial"},
        {"unpad_rounding": "truncate"},
    ],
)
def test_what_onevision_cannot_express_is_refused_by_name(tmp_path, keys):
    tiny_model(**keys).save_pretrained(tmp_path / "ours")
    ((name, value),) = keys.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        run(tmp_path / "ours", tmp_path / "back", to="llava_onevision")
    assert not (tmp_path / "back").exists()


def test_a_trained_model_goes_back_without_its_head(tmp_path):
    ours = tiny_model()
    ours.save_pretrained(tmp_path / "ours")
    done = run(tmp_path / "ours", tmp_path / "back", to="llava_onevision")
    assert [note for note in done.notes if "head" in note] == [
        "the head (autoregressive_module.*) was left out: LLaVA-OneVision has no place for it"
    ]
    theirs_class = LlavaOnevisionForConditionalGeneration
    theirs, report = theirs_class.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    found = theirs.state_dict()
    expected = {name: value for name, value in ours.state_dict().items() if "autoregressive_module" not in name}
    assert same_bytes(found, expected)


@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float16])
def test_dtype_is_kept_or_chosen(tmp_path, dtype):
    onevision(tmp_path / "theirs", dtype=torch.bfloat16)
    run(tmp_path / "theirs", tmp_path / "ours", dtype=dtype)
    expected = torch.float16 if dtype is torch.float16 else torch.bfloat16
    assert {tensor.dtype for tensor in weights(tmp_path / "ours").values()} == {expected}
    assert LlavaNextARForConditionalGeneration.from_pretrained(tmp_path / "ours").dtype == expected
    with pytest.raises(ValueError, match="int8"):
        run(tmp_path / "theirs", tmp_path / "other", dtype="int8")


# --- the folder ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_converted_original_is_a_complete_checkpoint(tmp_path):
    """Loaded as users do; the image is one where the original rounds otherwise than transformers."""
    original(tmp_path / "original", tokenizer=True)
    run(tmp_path / "original", tmp_path / "ours", num_frames=4, base_model="someone/original")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    assert processor.add_time_instruction
    assert processor.video_processor.sampling == "llava_video" and processor.video_processor.max_frames == 4
    assert (tmp_path / "ours" / "README.md").read_text().splitlines()[4] == "base_model: someone/original"

    image = Image.effect_noise((735, 196), 80).convert("RGB")  # width, height: three tiles in a row
    inputs = processor(text="<image>?", images=image, return_tensors="pt")
    logits = model(**inputs).logits
    assert logits.isfinite().all()
    counts = {}
    for rounding in ("round", "truncate"):
        processor.unpad_rounding = rounding
        counts[rounding] = list(processor(text="<image>?", images=image)["input_ids"][0]).count(IMAGE_TOKEN)
    assert counts["round"] > counts["truncate"] == int((inputs["input_ids"] == IMAGE_TOKEN).sum())
    with pytest.raises(ValueError, match="unpad_rounding is 'truncate' in the model, but 'round' in the processor"):
        processor.unpad_rounding = "round"
        processor.check_layout(model.config)


def test_onevision_processor_there_and_back(tmp_path):
    onevision(tmp_path / "theirs")
    ours = tiny_model()
    processor = LlavaNextARProcessor.for_config(ours.config, character_tokenizer())
    processor.save_pretrained(tmp_path / "processor")
    checkpoint_conversion._export_processor(tmp_path / "processor", tmp_path / "theirs", [])
    run(tmp_path / "theirs", tmp_path / "ours")
    found = LlavaNextARProcessor.from_pretrained(tmp_path / "ours")
    found.check_layout(ours.config)
    assert found.to_dict().keys() == processor.to_dict().keys()
    assert found.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    run(tmp_path / "ours", tmp_path / "back", to="llava_onevision")
    values = json.loads((tmp_path / "back" / "processor_config.json").read_text())
    assert values == json.loads((tmp_path / "theirs" / "processor_config.json").read_text())
    assert values["processor_class"] == "LlavaOnevisionProcessor"
    assert "auto_map" not in json.dumps(values)


def test_a_hub_id_is_downloaded_without_its_pickles(tmp_path, monkeypatch):
    onevision(tmp_path / "snapshot")
    asked = {}

    def download(repo_id, *, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, patterns=allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(checkpoint_conversion, "snapshot_download", download)
    convert_checkpoint("someone/tiny", tmp_path / "ours", revision="v1", autoregressive_config=HEAD, progress=False)
    assert (asked["repo_id"], asked["revision"]) == ("someone/tiny", "v1")
    matched = {p for p in ("a.safetensors", "pytorch_model.bin", "config.json") if matches(p, asked["patterns"])}
    assert matched == {"a.safetensors", "config.json"}
    assert "base_model: someone/tiny" in (tmp_path / "ours" / "README.md").read_text()


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def test_nothing_is_left_of_a_conversion_that_breaks_off(tmp_path, monkeypatch):
    onevision(tmp_path / "theirs")

    class NoDisk(OSError):
        pass

    def fail(folder, plan, max_shard_size, on_written):
        (folder / "model.safetensors").write_bytes(b"half")
        raise NoDisk

    monkeypatch.setattr(checkpoint_conversion, "write_shards", fail)
    with pytest.raises(NoDisk):
        run(tmp_path / "theirs", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_folder_that_holds_something_is_not_touched(tmp_path):
    onevision(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="ours"):
        run(tmp_path / "theirs", tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["notes.txt"]


# --- settings -----------------------------------------------------------------------------------------------

LLAVA_VIDEO_7B = {
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "llava",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_spatial_pool_stride": 2,
    "mm_spatial_pool_mode": None,
    "add_faster_video": False,
    "add_time_instruction": True,
    "force_sample": True,
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": "(1x1),...,(6x6)",
    "tie_word_embeddings": False,
}


def test_settings_of_a_released_model():
    settings = settings_from_original_config(LLAVA_VIDEO_7B)
    config = settings.config
    assert config.vision_config.num_hidden_layers == 26
    assert (config.vision_config.hidden_size, config.vision_config.image_size) == (1152, 384)
    assert config.frame_token_layout.num_tokens(1) == 210
    assert any("mm_spatial_pool_mode open: bilinear" in n and "--pool-mode average" in n for n in settings.notes)
    assert config.text_config.rope_parameters["rope_theta"] == 1000000.0
    assert len(config.image_grid_pinpoints) == 36
    assert config.image_grid_pinpoints[1] == [768, 384]  # 1x2 tiles: one wide, two high
    assert settings.processor["add_time_instruction"] and settings.processor["force_sample"]

    average = settings_from_original_config({**LLAVA_VIDEO_7B, "mm_spatial_pool_mode": "average"})
    assert average.config.frame_token_layout.num_tokens(1) == 182
    assert not any("pool_mode" in note for note in average.notes)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type must be 'mlp2x_gelu', got 'linear'"),
        ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type"),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "LlavaLlamaForCausalLM"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14"}, "clip-vit-large-patch14"),
        ({"mm_vision_tower": "someone/siglip-of-mine"}, "--vision-config"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio"),
        ({"mm_patch_merge_type": "spatial_pad"}, "spatial_pad"),
        ({"mm_spatial_pool_mode": "median"}, "median"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(keys, message):
    with pytest.raises(ValueError, match=message):
        settings_from_original_config({**LLAVA_VIDEO_7B, **keys})


def test_command_line(tmp_path, capsys):
    original(tmp_path / "original")
    tower, head = json.dumps(TOWER), json.dumps(HEAD)
    arguments = [str(tmp_path / "original"), str(tmp_path / "ours"), "--vision-config", tower, "--head", head]
    convert.main([*arguments, "--pool-mode", "average", "--set", "faster_token_stride=5", "--no-progress"])
    printed = capsys.readouterr().out
    assert "number of frames open: 64" in printed and "initialised when the model is loaded" in printed
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (written["mm_spatial_pool_mode"], written["faster_token_stride"]) == ("average", 5)
    with pytest.raises(SystemExit) as stopped:
        convert.main(arguments)
    assert stopped.value.code == 2
    assert "not an empty folder" in capsys.readouterr().err


# --- what is refused ----------------------------------------------------------------------------------------


def truncate(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    return rf"{path.name} is damaged"


def lose_a_shard(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.unlink()
    return rf"{path.name} is missing"


def put_a_pickle_in_place_of_a_shard(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    torch.save({"a": torch.zeros(2)}, path)
    return rf"{path.name} is damaged or no safetensors file"


def add_an_outdated_file(folder):
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    return "holds both"


def edit(change):
    def apply(folder):
        tensors = weights(folder)
        message = change(tensors)
        store(folder, tensors, shards=3)
        return message

    return apply


def reshape(tensors):
    name = "language_model.model.norm.weight"
    tensors[name] = tensors[name][:-1].clone()
    return rf"wrongly shaped tensors \(1\): {name} is \[31\], expected \[32\]"


def lose(tensors):
    tensors.pop("vision_tower.encoder.layers.1.mlp.fc1.bias")
    return r"missing tensors \(1\): model.vision_tower.encoder.layers.1.mlp.fc1.bias"


def add(tensors):
    tensors["language_model.model.layers.2.mlp.up_proj.weight"] = torch.zeros(2, 2)
    return r"unexpected tensors \(1\): language_model.model.layers.2.mlp.up_proj.weight"


def duplicate(tensors):
    tensors["model.image_newline"] = tensors["image_newline"].clone()
    return r"there twice \(1\)"


def lie_in_the_index(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["nowhere.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    return "missing: nowhere.weight"


DAMAGES = [truncate, lose_a_shard, put_a_pickle_in_place_of_a_shard, add_an_outdated_file, lie_in_the_index]
DAMAGES += [edit(reshape), edit(lose), edit(add), edit(duplicate)]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    onevision(tmp_path / "theirs", shards=3)
    message = damage(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path / "theirs", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_never_loaded(tmp_path):
    folder, sprung = tmp_path / "theirs", tmp_path / "sprung"
    onevision(folder)
    torch.save({"image_newline": Trap(sprung)}, folder / "pytorch_model.bin")
    run(folder, tmp_path / "ours")  # beside safetensors it is ignored
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickles only.*pytorch_model.bin"):
        run(folder, tmp_path / "again")
    assert not sprung.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert sprung.exists()  # it would have been


def test_other_models_and_places_are_refused(tmp_path):
    onevision(tmp_path / "theirs")
    with pytest.raises(ValueError, match="cannot convert a 'llava_onevision' checkpoint to 'llava_onevision'"):
        run(tmp_path / "theirs", tmp_path / "ours", to="llava_onevision")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        convert_checkpoint(tmp_path / "no" / "such" / "folder", tmp_path / "ours")
    (tmp_path / "theirs" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


# --- memory -------------------------------------------------------------------------------------------------

# ru_maxrss would not do: a new process inherits it from the one that started it.
MEMORY = """
    import pathlib, re, sys
    from llava_next_ar.conversion.checkpoint_conversion import convert_checkpoint

    def kilobytes(name):
        return int(re.search(name + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

    head = {{"num_heads": 2, "num_layers": 1}}
    convert_checkpoint({small!r}, {small!r} + "_out", autoregressive_config=head, progress=False)  # imports, buffers
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = kilobytes("VmRSS")
    convert_checkpoint({large!r}, {large!r} + "_kept", autoregressive_config=head, progress=False)
    convert_checkpoint({large!r}, {large!r} + "_cast", autoregressive_config=head, dtype="bfloat16", progress=False)
    print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
def test_memory_is_that_of_one_shard(tmp_path):
    """Eight shards of about 40 MB become one file, as they are and in bfloat16: never is all in memory."""
    onevision(tmp_path / "small")
    text = {**ONEVISION["text_config"], "hidden_size": 640, "intermediate_size": 4096, "num_hidden_layers": 8}
    folder = tmp_path / "large"
    folder.mkdir()
    with torch.device("meta"):
        model = tiny_onevision(text_config=text)
    config = model.config
    config.architectures = ["LlavaOnevisionForConditionalGeneration"]
    config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weight_map, sizes = {}, []
    for layer in range(8):
        marker = f".language_model.layers.{layer}."
        own = {
            name: torch.full(shape, 0.5)
            for name, shape in shapes.items()
            if marker in name or (layer == 0 and ".language_model.layers." not in name)
        }
        file = folder / f"model-{layer + 1:05d}-of-00008.safetensors"
        save_file(own, file)
        weight_map |= dict.fromkeys(own, file.name)
        sizes.append(file.stat().st_size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    code = MEMORY.format(small=str(tmp_path / "small"), large=str(folder))
    growth = int(processes.run_python("-c", textwrap.dedent(code), timeout=300).split()[-1])
    print(f"peak memory: +{growth / 1e6:.0f} MB, shard: {max(sizes) / 1e6:.0f} MB, all: {sum(sizes) / 1e6:.0f} MB")
    for name, factor in (("large_kept", 1), ("large_cast", 2)):
        assert (tmp_path / name / "model.safetensors").stat().st_size == pytest.approx(sum(sizes) / factor, rel=0.01)
    # The shard that is read, and up to 32 MB of freed copies in another type that the allocator keeps for later.
    assert growth < max(sizes) + 50e6 < 0.4 * sum(sizes)
    shutil.rmtree(tmp_path)  # 900 MB


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"config_overrides": {"mm_newline_positon": "grid"}}, "did you mean 'mm_newline_position'"),
        ({"config_overrides": {"xyzzy": 1}}, "unknown option 'xyzzy' for the model configuration"),
        ({"autoregressive_config": {"num_hsit": 4}}, "'num_hsit' for autoregressive_config; did you mean 'num_hist'"),
    ],
)
def test_misspelt_options_are_refused_and_unknown_keys_of_the_file_kept(tmp_path, keys, message):
    tiny_onevision().save_pretrained(tmp_path / "onevision")
    path = tmp_path / "onevision" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trained_by": {"tool": 1}}))
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "onevision", tmp_path / "refused", **keys)
    run(tmp_path / "onevision", tmp_path / "ours")
    assert LlavaNextARForConditionalGeneration.from_pretrained(tmp_path / "ours").config.trained_by == {"tool": 1}
    with pytest.raises(ValueError, match="'num_hist' belongs in autoregressive_config"):
        LlavaNextARForConditionalGeneration.from_pretrained(tmp_path / "ours", num_hsit=4)
