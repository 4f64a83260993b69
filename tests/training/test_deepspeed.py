"""scripts/train.py under DeepSpeed's ZeRO-2 and ZeRO-3 on the CPU; `make test-deepspeed` installs DeepSpeed and runs it."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import processes
import pytest
import torch
from guard_runs import losses_logged
from safetensors.torch import load_file
from tiny import ONEVISION, tiny_model, tiny_onevision
from tiny_processor import tiny_processor
from tiny_tokenizer import character_tokenizer
from transformers import AutoModel, AutoModelForImageTextToText
from video_clips import write_clip

from llava_next_ar.conversion import consolidate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed; `make test-deepspeed` does it",
    ),
]

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# What the recipes share with the CPU runs: one optimizer step is one batch of four samples.
TINY = {"dataloader_num_workers": 0, "logging_steps": 1, "warmup_steps": 0, "max_steps": 3, "use_cpu": "true"}
LORA = {"trainable": "lora", "lora_r": 4, "lora_dropout": 0}
LOSSES = ("loss", "main_loss", "autoregressive_loss", "total_loss", "grad_norm")
RECIPES = ("full", "projector_and_head", "lora", "lora_vision", "prototype_basic", "prototype_full")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Checkpoints: `base`, `tied` (embeddings), `teacher` (with the tower's frozen copy), `onevision` (no head); and data."""
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "data").mkdir()
    for name, num_frames in (("a", 6), ("b", 9)):
        write_clip(folder / "data" / f"{name}.mp4", num_frames, width=64, height=48)
    conversations = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    entries = [{"conversations": conversations, "video": name} for name in ("a.mp4", "b.mp4", "a.mp4")]
    entries += [{"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]}]
    (folder / "data" / "train.json").write_text(json.dumps(entries))
    tied = {"text_config": {**ONEVISION["text_config"], "tie_word_embeddings": True}, "tie_word_embeddings": True}
    with_teacher = tiny_model(freeze_tower=False)
    with_teacher.create_teacher()
    for name, model in {"base": tiny_model(), "tied": tiny_model(**tied), "teacher": with_teacher}.items():
        model.save_pretrained(folder / name)
        tiny_processor(model.config, num_frames=4).save_pretrained(folder / name)
    tiny_onevision().save_pretrained(folder / "onevision")
    character_tokenizer().save_pretrained(folder / "onevision")
    return folder


def train(
    work: Path,
    name: str,
    stage: int | None = None,
    num_processes: int = 2,
    model: str = "base",
    gather: bool = True,
    status: int = 0,
    **keys: object,
) -> str:
    """Trains with the demo's recipe into `work / name`, four samples a step; returns what was printed."""
    if stage is not None:
        zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": gather}
        sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
        config = {"zero_optimization": zero, "gradient_clipping": "auto", **dict.fromkeys(sizes, "auto")}
        path = work / f"zero{stage}{'' if gather else '_split'}.json"
        path.write_text(json.dumps({**config, "zero_allow_untested_optimizer": True}))
        keys["deepspeed"] = path
    keys = {
        **TINY,
        "per_device_train_batch_size": 4 // num_processes,
        "save_strategy": "steps",
        "save_steps": 2,
        **keys,
    }
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_processes)
    return start(work, name, command, "demo", model, status, keys)


def start(
    work: Path, name: str, launcher: tuple, recipe: str, model: str, status: int, keys: dict[str, object]
) -> str:
    keys = {"model": work / model, "train_data": work / "data" / "train.json", "output_dir": work / name, **keys}
    options = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    config = SCRIPTS / "configs" / f"{recipe}.yaml"
    command = [sys.executable, *launcher, SCRIPTS / "train.py", "--config", config, *options]
    # The first start compiles DeepSpeed's extension for CPU processes.
    return processes.run(command, timeout=600, status=status, merge=True).stdout


def history(folder: Path) -> list[dict]:
    return losses_logged(json.loads((folder / "trainer_state.json").read_text())["log_history"])


def assert_same_losses(folder: Path, expected: Path, tolerance: float = 1e-4) -> None:
    logs, others = history(folder), history(expected)
    assert [log["step"] for log in logs] == [log["step"] for log in others] == [1, 2, 3]
    for log, other in zip(logs, others, strict=True):
        for key in LOSSES:
            assert log[key] == pytest.approx(other[key], rel=tolerance), (log["step"], key)


def assert_same_weights(one: Path, other: Path, tolerance: float = 0.0) -> None:
    """`one` and `other` are files of weights."""
    weights, expected = load_file(one), load_file(other)
    assert weights.keys() == expected.keys() and len(weights) > 30
    for name, tensor in expected.items():
        torch.testing.assert_close(
            weights[name], tensor, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def num_partitions(checkpoint: Path) -> int:
    """Files with a part of the optimizer's state: none unless DeepSpeed trained."""
    return len(list(checkpoint.glob("global_step*/*optim_states.pt")))


@pytest.fixture(scope="module")
def runs(work) -> Path:
    """Full training for three steps: `plain`, `ddp` and, by ZeRO stage and number of processes, `zero2_1` and so on."""
    train(work, "plain", num_processes=1)
    train(work, "ddp")
    for stage in (2, 3):
        for num_processes in (1, 2):
            train(work, f"zero{stage}_{num_processes}", stage, num_processes)
    return work


# -------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("stage", [2, 3])
def test_losses_and_weights_are_those_of_a_plain_run_and_of_ddp(runs, stage, num_processes):
    folder = runs / f"zero{stage}_{num_processes}"
    assert num_partitions(folder / "checkpoint-2") == num_processes
    assert num_partitions(runs / "plain" / "checkpoint-2") == num_partitions(runs / "ddp" / "checkpoint-2") == 0
    for expected in ("plain", "ddp"):
        assert_same_losses(folder, runs / expected)
        # Adam's first steps have the size of the learning rate, 2e-3, whatever that of the gradient: where that is rounding
        # alone (biases of keys), so is the weight.
        weights, others = (load_file(path / "model.safetensors") for path in (folder, runs / expected))
        assert weights.keys() == others.keys()
        differences = torch.cat([(weights[n] - others[n]).abs().flatten() for n in others if "k_proj.bias" not in n])
        assert differences.mean() < 1e-6 and differences.max() < 1e-3
    start = load_file(runs / "base" / "model.safetensors")
    assert any((weights[n] - start[n]).abs().max() > 1e-3 for n in start)  # it trained


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trained_tower_has_its_frozen_copy_as_teacher(work, stage):
    """ZeRO-2 makes the copy; ZeRO-3 trains from a checkpoint that has it."""
    model = "base" if stage == 2 else "teacher"
    keys = {"freeze_vision_tower": "false", "save_strategy": "no"}
    train(work, f"tower_plain_{model}", num_processes=1, model=model, **keys)
    train(work, f"tower_zero{stage}", stage, model=model, **keys)
    assert_same_losses(work / f"tower_zero{stage}", work / f"tower_plain_{model}")
    weights, start = (load_file(work / name / "model.safetensors") for name in (f"tower_zero{stage}", model))
    of_tower = [name for name in weights if "vision_tower" in name and name in start]
    assert any((weights[name] - start[name]).abs().max() > 1e-3 for name in of_tower)
    copies = {name: tensor for name, tensor in weights.items() if ".teacher." in name}
    assert copies
    if stage == 3:
        assert all(torch.equal(tensor, start[name]) for name, tensor in copies.items())


def test_zero3_refuses_a_tower_that_it_cannot_copy_before_it_trains(work):
    output = train(work, "refused", stage=3, status=1, freeze_vision_tower="false")
    assert "train.py: ZeRO-3 splits the vision tower" in output and not (work / "refused").exists()


def test_a_new_head_starts_at_the_copy_baseline(work):
    """LLaVA-OneVision has none. ZeRO-3 initialises split weights in a way of its own."""
    for name, stage in (("new_plain", None), ("new_zero3", 3)):
        train(
            work, name, stage, 1 if stage is None else 2, "onevision", learning_rate=0, max_steps=1, save_strategy="no"
        )
    logs = [history(work / name)[0] for name in ("new_plain", "new_zero3")]
    for log in logs:
        assert log["skill"] == pytest.approx(0, abs=1e-6)
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-5)
    plain, split = (load_file(work / name / "model.safetensors") for name in ("new_plain", "new_zero3"))
    assert plain.keys() == split.keys()
    for name in plain:
        if name.startswith("autoregressive_module.") and plain[name].numel() > 200:
            assert split[name].std().item() == pytest.approx(plain[name].std().item(), rel=0.2), name
        elif not name.startswith("autoregressive_module."):
            assert torch.equal(plain[name], split[name]), name


# -------------------------------------------------------------------------------------------------- resuming and joining


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_resumes_as_if_nothing_had_happened(runs, stage):
    whole, resumed = runs / f"zero{stage}_2", runs / f"resumed{stage}"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-3", ignore_errors=True)
    (resumed / "model.safetensors").unlink()
    output = train(runs, resumed.name, stage, resume_from_checkpoint="true")
    assert f"resuming from {resumed / 'checkpoint-2'}" in output
    assert "step 3/3" in output and "step 2/3" not in output
    assert [{key: log[key] for key in LOSSES} for log in history(resumed)] == [
        {key: log[key] for key in LOSSES} for log in history(whole)
    ]
    assert_same_weights(resumed / "model.safetensors", whole / "model.safetensors")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_checkpoint_becomes_a_folder_that_loads_anywhere(runs, tmp_path, stage, num_processes):
    checkpoint = runs / f"zero{stage}_{num_processes}" / "checkpoint-2"
    consolidate.main([str(checkpoint), str(tmp_path / "whole")])
    assert_same_weights(tmp_path / "whole" / "model.safetensors", checkpoint / "model.safetensors")
    model, report = AutoModel.from_pretrained(tmp_path / "whole", trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(model).__name__ == "LlavaNextARForConditionalGeneration"


def test_weights_that_stay_split_are_joined_by_the_command_that_is_printed(work, tmp_path):
    """DeepSpeed's default: no process ever holds the whole model. Here with tied embeddings."""
    output = train(work, "split", 3, model="tied", gather=False)
    train(work, "tied_plain", num_processes=1, model="tied")
    assert_same_losses(work / "split", work / "tied_plain")
    folder = work / "split"
    assert not list(folder.glob("*.safetensors")) and num_partitions(folder) == 2
    assert f"llava-next-ar consolidate {folder} {folder}_whole" in output
    consolidate.main([str(folder), f"{folder}_whole"])
    model, report = AutoModel.from_pretrained(f"{folder}_whole", trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    weights, expected = (load_file(work / name / "model.safetensors") for name in ("split_whole", "tied_plain"))
    assert weights.keys() == expected.keys()
    differences = torch.cat([(weights[n] - expected[n]).abs().flatten() for n in expected if "k_proj.bias" not in n])
    assert differences.mean() < 1e-6 and differences.max() < 1e-3


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_train_resume_and_are_joined(work, tmp_path, stage):
    if not (work / "lora_plain").exists():
        train(work, "lora_plain", num_processes=1, **LORA)
    folder, resumed = work / f"lora{stage}", work / f"lora{stage}_resumed"
    train(work, folder.name, stage, **LORA)
    assert_same_losses(folder, work / "lora_plain")
    assert num_partitions(folder / "checkpoint-2") == 2
    weights, expected = (load_file(path / "adapter_model.safetensors") for path in (folder, work / "lora_plain"))
    assert weights.keys() == expected.keys()
    differences = torch.cat([(weights[name] - expected[name]).abs().flatten() for name in expected])
    assert differences.mean() < 1e-5
    consolidate.consolidate(folder / "checkpoint-2", tmp_path / "joined")
    assert_same_weights(
        tmp_path / "joined" / "adapter_model.safetensors", folder / "checkpoint-2" / "adapter_model.safetensors"
    )
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "joined", trust_remote_code=True).state_dict()
    name = "autoregressive_module.change.weight"
    (saved,) = (
        tensor
        for key, tensor in load_file(tmp_path / "joined" / "adapter_model.safetensors").items()
        if key.endswith(name)
    )
    assert any(key.endswith("change.weight") and torch.equal(tensor, saved) for key, tensor in loaded.items())
    shutil.copytree(folder, resumed)
    shutil.rmtree(resumed / "checkpoint-3", ignore_errors=True)
    train(work, resumed.name, stage, resume_from_checkpoint="true", **LORA)
    assert_same_losses(resumed, folder, tolerance=1e-6)
    assert_same_weights(resumed / "adapter_model.safetensors", folder / "adapter_model.safetensors", tolerance=1e-7)


# ----------------------------------------------------------------------------------------------- recipes and launch files


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stage", [2, 3])
def test_the_recipes_run_with_the_launch_files_in_bfloat16(work, recipe, stage):
    """All recipes but qlora.yaml, whose 4-bit weights need a GPU. One rank has a sample of text alone, the other a video."""
    name = f"{recipe}_{stage}"
    launch_file = SCRIPTS / "accelerate" / f"deepspeed_zero{stage}.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", launch_file, "--num_processes", 2)
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3, "logging_steps": 1}
    keys = {**sizes, "dataloader_num_workers": 0, "save_steps": 2, "num_frames": 4, "bf16": "true"}
    if recipe == "prototype_full":  # which has a head of another size than the checkpoint
        keys |= {"embedding_dim": 16, "num_heads": 2}
    start(work, name, (*launcher, "--main_process_port", 0), recipe, "base", 0, keys)
    folder = work / name
    assert num_partitions(folder / "checkpoint-2") == 2
    logs = history(folder)
    assert [log["step"] for log in logs] == [1, 2, 3]
    assert logs[0]["main_loss"] == pytest.approx(4.887, rel=2e-2)  # of the same step in float32
    assert all(log["total_loss"] == pytest.approx(log["loss"], rel=1e-3) for log in logs)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
