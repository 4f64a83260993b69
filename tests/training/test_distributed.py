"""Sharded training, launch files and sharded checkpoints. Two ranks on the CPU stand for any number of GPUs."""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from sharded_runs import CASES, KINDS, batch_of, build
from tiny import tiny_model, video_batch
from tiny_processor import tiny_processor
from torch.distributed.fsdp import StateDictType
from training_runs import make_samples
from transformers import AutoModel, AutoProcessor, TrainingArguments

from llava_next_ar.conversion import consolidate
from llava_next_ar.modeling import modeling_llava_next_ar
from llava_next_ar.training import run as train
from llava_next_ar.training import trained_model
from llava_next_ar.training.recipes import ModelArguments
from llava_next_ar.training.trained_model import choose_trainable
from llava_next_ar.training.trainer import AutoregressiveTrainer, LlavaVideoCollator

TESTS = Path(__file__).resolve().parents[1]
LAUNCH_FILES = sorted((TESTS.parent / "scripts" / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folder with the results of two ranks of sharded_runs.py."""
    folder = tmp_path_factory.mktemp("sharded")
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    processes.run_python(*command, TESTS / "sharded_runs.py", folder, timeout=300)
    for name in ("checkpoint", "adapter"):
        tiny_processor(tiny_model().config, num_frames=4).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def results(runs) -> dict:
    return json.loads((runs / "results.json").read_text())


# ------------------------------------------------------------------------------------------------------------ sharding


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_step_gives_the_gradients_of_one_process(results, case):
    """A rank that ran a module more often than the other one hung both, or mixed up their gradients."""
    result = results[case]
    assert result["gradients"] < 1e-5 and result["loss"] < 1e-5
    assert result["without gradient"] == []
    # Layer by layer: of the language model, of the tower (and its copy), and of the head.
    assert {"FSDPQwen2DecoderLayer", "FSDPSiglipEncoderLayer", "FSDPFramePredictorBlock"} <= set(result["sharded"])


def test_a_sharded_evaluation_meets_on_all_ranks(results):
    assert results["evaluation"]["loss"] < 1e-5


def test_accelerate_shards_nothing_on_a_cpu(results):
    assert results["accelerate on a CPU"] == "MULTI_CPU"  # why sharded_runs.py calls its wrapping directly


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_train_refuses_what_accelerate_silently_does_not_split(name, monkeypatch):
    nothing = SimpleNamespace(fsdp=None, deepspeed=None)
    split, plain = SimpleNamespace(distributed_type=name), SimpleNamespace(distributed_type="MULTI_CPU")
    train.check_sharding(nothing, plain)
    with pytest.raises(ValueError, match=f"asks for {name}"):
        train.check_sharding(SimpleNamespace(**{"fsdp": None, "deepspeed": None, name.lower(): "x"}), plain)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")  # as accelerate launch says it
    train.check_sharding(nothing, split)
    with pytest.raises(ValueError, match=f"asks for {name}, but accelerate runs MULTI_CPU here"):
        train.check_sharding(nothing, plain)


@pytest.mark.parametrize(
    "options", [{}, {"train_tower": True}, {"tower_lora": True}, {"frozen": "autoregressive_module"}]
)
def test_gradients_become_ready_in_one_order_whatever_a_rank_holds(options, monkeypatch):
    """DeepSpeed's ZeRO-2 sends them off as they come, and mixed up those of ranks that differed."""
    monkeypatch.setattr(modeling_llava_next_ar, "has_several_ranks", lambda: True)
    orders = {}
    for kind in KINDS:
        model, order = build(**options), []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
        model(**batch_of(model.config, kind, 0), skip_logits=True).loss.backward()
        orders[kind] = order
    assert len(orders["text"]) > 30
    for kind, order in orders.items():
        assert order == orders["text"], kind


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_modules_are_entered_in_one_order_whatever_a_rank_holds(trainable, monkeypatch):
    """ZeRO-3 compares the order over ranks, PEFT's wrappers included, and fails where it differs."""
    monkeypatch.setattr(modeling_llava_next_ar, "has_several_ranks", lambda: True)
    args = ModelArguments(model="tiny", trainable=trainable)
    orders = {}
    for kind in KINDS:
        model = choose_trainable(tiny_model(), args, TrainingArguments(use_cpu=True, report_to="none"))
        order = orders[kind] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name, order=order: order.append(name))
        model(**batch_of(model.config, kind, 0), skip_logits=True)
    assert len(orders["text"]) > 100
    for kind, order in orders.items():
        assert order == orders["text"], kind


@pytest.mark.parametrize("sharding", ["", "DEEPSPEED"])
def test_all_that_trains_has_one_precision_under_deepspeed(sharding, monkeypatch):
    """ZeRO-3 fails on two; without it, adapters and the modules trained whole are float32, as small updates need."""
    monkeypatch.setattr(trained_model, "sharding_asked_for", lambda _: [sharding])
    args = ModelArguments(model="tiny", trainable="lora")
    training_args = TrainingArguments(use_cpu=True, bf16=True, report_to="none")
    model = choose_trainable(tiny_model().to(torch.bfloat16), args, training_args)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.bfloat16 if sharding else torch.float32}


def test_adapters_do_not_depend_on_random_numbers_that_loading_took():
    states = []
    for number in range(2):
        torch.rand(1 + number)
        args = ModelArguments(model="tiny", trainable="lora")
        model = choose_trainable(tiny_model(seed=number), args, TrainingArguments(use_cpu=True, report_to="none"))
        states.append({n: p.clone() for n, p in model.named_parameters() if "lora_A" in n})
    assert len(states[0]) > 5 and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("trainable", "freeze", "has_copy", "fails"),
    [
        ("full", False, False, True),
        ("full", False, True, False),
        ("full", True, False, False),
        ("lora", False, False, False),
    ],
)
def test_a_tower_that_zero3_cannot_copy_is_refused_before_it_loads(trainable, freeze, has_copy, fails, monkeypatch):
    monkeypatch.setattr(trained_model, "is_deepspeed_zero3_enabled", lambda: True)
    args = ModelArguments(model="tiny", trainable=trainable, freeze_vision_tower=freeze)
    config = tiny_model(head={"separate_teacher": has_copy}).config
    with pytest.raises(ValueError, match="ZeRO-3 splits the vision tower") if fails else contextlib.nullcontext():
        trained_model.check_teacher(args, config)


def test_a_teacher_is_not_copied_from_a_tower_that_deepspeed_has_split():
    model = tiny_model(freeze_tower=False)
    for parameter in model.model.vision_tower.parameters():
        parameter.ds_id = 0  # the mark of ZeRO-3; what is left of the weights in this process is empty
    with pytest.raises(RuntimeError, match="the vision tower is sharded"):
        model.create_teacher()


def test_only_classes_that_the_model_has_are_named_for_wrapping():
    # accelerate fails on any other, such as the text embeddings of Siglip, which transformers lists.
    assert tiny_model()._no_split_modules == {
        *("Qwen2DecoderLayer", "SiglipEncoderLayer", "SiglipVisionEmbeddings", "FramePredictorBlock")
    }
    assert "FramePredictorBlock" not in tiny_model(enable_autoregressive=False)._no_split_modules


# -------------------------------------------------------------------------------------------------------- launch files


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_accelerate_knows_every_key_of_a_launch_file(path):
    """The file's own reader refuses unknown keys outside of the two sections only."""
    config = load_config_from_file(str(path))
    options = vars(launch_command_parser().parse_args(["train.py"]))
    assert {*config.fsdp_config, *config.deepspeed_config} <= options.keys()


def test_the_fsdp_file_means_what_it_says(monkeypatch):
    path = next(path for path in LAUNCH_FILES if path.stem == "fsdp2")
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "train.py"]))
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith("FSDP_") or name == "ACCELERATE_USE_FSDP":
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type is StateDictType.FULL_STATE_DICT and not plugin.activation_checkpointing
    plugin.set_auto_wrap_policy(tiny_model())  # raises on a class that the model has not


# ------------------------------------------------------------------------------------------------------- frame times


def test_frame_times_survive_what_casts_floating_inputs():
    """DeepSpeed and FSDP make bfloat16 of them, in which a clip's frames after a minute all have the same time."""
    model = tiny_model()
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.1)
    (sample,) = make_samples(model.config, frames=([5],))
    sample["video_timestamps"] = 61 + torch.tensor([[0.0, 0.04, 0.08, 0.12, 0.2]])
    batch = LlavaVideoCollator(0)([sample])

    def cast(inputs):
        return {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in inputs.items()}

    @torch.no_grad()
    def loss(inputs, **more):
        return model(**{**inputs, **more}).autoregressive_loss

    exact = loss(batch, video_timestamps=sample["video_timestamps"])
    times = cast(batch)["video_timestamps"]
    torch.testing.assert_close(loss(batch, video_timestamps=times), exact, rtol=1e-6, atol=0)
    coarse = loss(batch, video_timestamps=sample["video_timestamps"].to(torch.bfloat16))
    assert abs(coarse - exact) / exact > 1e-4  # what would be lost


# ----------------------------------------------------------------------------------------------------- sharded weights


@torch.no_grad()
def test_a_sharded_checkpoint_becomes_a_folder_that_loads_anywhere(runs, tmp_path):
    consolidate.main([str(runs / "checkpoint"), str(tmp_path / "whole"), "--max-shard-size", "0.0001"])
    files = sorted((tmp_path / "whole").glob("model-*.safetensors"))
    assert len(files) > 1
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(runs / "full.safetensors")
    assert weights.keys() == expected.keys() and any("teacher" in name for name in weights)
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype and torch.equal(weights[name], tensor), name
    model = AutoModel.from_pretrained(tmp_path / "whole", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "whole", trust_remote_code=True)
    assert model.config.autoregressive_config.separate_teacher and processor.video_processor.num_frames == 4
    # And what a Trainer saves in one piece, of a model whose class torch has replaced, is the same.
    saved = AutoModel.from_pretrained(runs / "saved", trust_remote_code=True).eval()
    assert not list((runs / "saved").glob("_fsdp*"))
    batch = video_batch(model.config, ([4], [3]))
    one, other = model(**batch), saved(**batch)
    assert torch.equal(one.loss, other.loss) and torch.equal(one.logits, other.logits)


def test_a_sharded_adapter_becomes_an_adapter(runs, tmp_path):
    consolidate.consolidate(runs / "adapter", tmp_path / "adapter")
    weights, expected = (
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
        load_file(runs / "adapter.safetensors"),
    )
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    loaded = get_peft_model_state_dict(model)
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_an_adapter_of_deepspeed_gets_the_names_of_its_file(tmp_path, monkeypatch):
    """Its checkpoints have those of the model in memory, with the name of the adapter, and frozen weights as well."""
    model = build(tower_lora=True)
    module = SimpleNamespace(get_fp32_state_dict_from_zero_checkpoint=lambda _: model.state_dict())
    for name in ("deepspeed", "deepspeed.utils", "deepspeed.utils.zero_to_fp32"):
        monkeypatch.setitem(sys.modules, name, module)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "latest").write_text("global_step1")
    model.peft_config["default"].save_pretrained(checkpoint)
    tiny_processor(tiny_model().config, num_frames=4).save_pretrained(checkpoint)
    consolidate.consolidate(checkpoint, tmp_path / "adapter")
    weights, expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_consolidating_refuses_what_it_cannot_read(runs, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no sharded weights"):
        consolidate.consolidate(tmp_path / "empty", tmp_path / "out")
    tiny_model(head={"num_layers": 1}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"missing: none; unexpected: autoregressive_module.blocks.1"):
        consolidate.consolidate(runs / "checkpoint", tmp_path / "out", str(tmp_path / "other"))
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "latest").write_text("global_step1")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match="only DeepSpeed reads"):
        consolidate.consolidate(tmp_path / "zero", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_checkpoint_of_sharded_weights_has_all_but_the_weights(tmp_path):
    model = tiny_model()
    args = TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    processor = tiny_processor(model.config, num_frames=4)
    trainer = AutoregressiveTrainer(model, args, [], processing_class=processor)
    trainer.is_fsdp_enabled = True  # which needs GPUs
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(state_dict_type="StateDictType.SHARDED_STATE_DICT")),
        unwrap_model=lambda wrapped: wrapped,
        wait_for_everyone=lambda: None,
    )
    trainer.save_model(tmp_path / "checkpoint-1")
    assert (
        AutoProcessor.from_pretrained(tmp_path / "checkpoint-1", trust_remote_code=True).video_processor.num_frames
        == 4
    )
    config = json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())
    assert config["model_type"] == "llava_next_ar"
