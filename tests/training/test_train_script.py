"""scripts/train.py on a tiny checkpoint: recipes, refusals, resuming, adapters, two processes."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import safetensors.torch
import torch
import yaml
from command_line import ends_with
from guard_runs import losses_logged
from tiny import tiny_model, tiny_onevision
from tiny_processor import tiny_processor
from tiny_tokenizer import character_tokenizer
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.quantizers.quantizers_utils import should_convert_module
from video_clips import write_clip

from llava_next_ar.modeling.autoregressive_reconstruction import AutoregressiveReconstructionModule
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from llava_next_ar.training import recipes, termination, trained_model
from llava_next_ar.training import run as train
from llava_next_ar.training.checkpoints import checkpoint_problem, last_complete_checkpoint
from llava_next_ar.training.trainer import LlavaVideoCollator, LlavaVideoDataset

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CONFIGS = SCRIPTS / "configs"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tiny checkpoint with processor (`base`), a LLaVA-OneVision one with a tokenizer (`onevision`), and data."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "data").mkdir()
    for name, num_frames in (("a", 6), ("b", 9)):
        write_clip(folder / "data" / f"{name}.mp4", num_frames, width=64, height=48)
    conversations = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    entries = [{"conversations": conversations, "video": name} for name in ("a.mp4", "b.mp4", "a.mp4")]
    entries += [{"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]}]
    (folder / "data" / "train.json").write_text(json.dumps(entries))
    model = tiny_model()
    model.save_pretrained(folder / "base")
    tiny_processor(model.config, num_frames=4).save_pretrained(folder / "base")
    tiny_onevision().save_pretrained(folder / "onevision")
    character_tokenizer().save_pretrained(folder / "onevision")
    return folder


def options(work: Path, output: str, *more: str, config: str = "demo", model: str = "base") -> list[str]:
    chosen = ["--config", str(CONFIGS / f"{config}.yaml"), "--model", str(work / model)]
    chosen += ["--train_data", str(work / "data" / "train.json"), "--output_dir", str(work / output)]
    chosen += ["--use_cpu", "true", "--dataloader_num_workers", "0", "--max_steps", "2", "--logging_steps", "1"]
    chosen += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--warmup_steps", "0"]
    # A later value wins over an earlier one only across sources, so drop what the caller overrides.
    for key in more[::2]:
        if key in chosen:
            del chosen[chosen.index(key) : chosen.index(key) + 2]
    return [*chosen, *more]


def history(folder: Path) -> list[dict]:
    return losses_logged(json.loads((folder / "trainer_state.json").read_text())["log_history"])


def batch_of(work: Path, processor) -> dict[str, torch.Tensor]:
    dataset = LlavaVideoDataset(work / "data" / "train.json", processor)
    return LlavaVideoCollator(processor)([dataset[0], dataset[1], dataset[3]])


def test_a_recipe_trains_and_the_folder_loads_anywhere(work):
    data = str(work / "data" / "train.json")
    output = processes.run_python(
        str(SCRIPTS / "train.py"),
        *options(work, "out", "--eval_data", data, "--loss_weight", "0.5", "--num_frames", "5"),
    )
    assert "effective batch size 4 = 4 per device x 1 accumulated x 1 processes, from 4 samples" in output
    assert "trainable parameters" in output and "autoregressive_module" in output and "vision_tower" not in output
    logs = history(work / "out")
    assert [log["step"] for log in logs] == [1, 2]
    for log in logs:
        assert log["total_loss"] == pytest.approx(log["loss"], rel=1e-6)
        assert log["total_loss"] == pytest.approx(log["main_loss"] + 0.5 * log["autoregressive_loss"], rel=1e-6)
    assert {"eval_loss", "eval_main_loss", "eval_autoregressive_loss", "eval_skill"} <= json.loads(
        (work / "out" / "all_results.json").read_text()
    ).keys()
    # Loaded by someone who has only the folder, from elsewhere.
    code = "import sys; from transformers import AutoModel, AutoProcessor\n"
    code += "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    code += "processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    code += "assert not any(name.split('.')[0] == 'llava_next_ar' for name in sys.modules)\n"
    code += "print(type(model).__name__, processor.video_processor.num_frames)"
    assert processes.run_python("-c", code, str(work / "out")).split()[-2:] == [
        "LlavaNextARForConditionalGeneration",
        "5",
    ]


def test_packing_trains_the_same(work):
    for name in ("false", "true"):
        train.main(options(work, f"packing_{name}", "--packing", name))
    padded, packed = (history(work / f"packing_{name}") for name in ("false", "true"))
    for one, other in zip(padded, packed, strict=True):
        for key in ("loss", "main_loss", "autoregressive_loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4), key


def test_only_what_is_chosen_changes(work):
    expected = {
        "full": {"language_model", "lm_head", "multi_modal_projector", "autoregressive_module", "image_newline"},
        "projector_and_head": {"multi_modal_projector", "autoregressive_module", "image_newline"},
        "head": {"autoregressive_module"},
    }
    before = safetensors.torch.load_file(work / "base" / "model.safetensors")
    for trainable, parts in expected.items():
        folder = f"parts_{trainable}"
        train.main(options(work, folder, "--trainable", trainable, "--weight_decay", "0.1", "--learning_rate", "0.01"))
        after = safetensors.torch.load_file(work / folder / "model.safetensors")
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        named = parts | {"vision_tower"}
        assert {part for name in changed for part in named if part in name.split(".")} <= parts
        assert {"autoregressive_module"} <= {part for name in changed for part in named if part in name.split(".")}
        assert all(set(name.split(".")) & parts for name in changed), trainable


def test_a_trained_tower_keeps_its_teacher(work):
    train.main(options(work, "tower", "--freeze_vision_tower", "false", "--learning_rate", "0.01"))
    before = safetensors.torch.load_file(work / "base" / "model.safetensors")
    after = safetensors.torch.load_file(work / "tower" / "model.safetensors")
    tower = [name for name in before if name.startswith("model.vision_tower.encoder.")]
    assert any(not torch.equal(before[name], after[name]) for name in tower)
    for name in tower:
        teacher = "autoregressive_module.teacher." + name.split("vision_tower.", 1)[1]
        assert torch.equal(after[teacher], before[name])


def test_resuming_gives_what_an_uninterrupted_run_gives(work):
    steps = ("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--per_device_train_batch_size", "2")
    train.main(options(work, "whole", *steps))
    (work / "part").mkdir()
    (work / "whole" / "checkpoint-2").rename(work / "part" / "checkpoint-2")
    processes.run_python(str(SCRIPTS / "train.py"), *options(work, "part", *steps, "--resume_from_checkpoint", "true"))
    one, other = (safetensors.torch.load_file(work / name / "model.safetensors") for name in ("whole", "part"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    losses = [[entry["loss"] for entry in history(work / name)] for name in ("whole", "part")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    more = ("--resume_from_checkpoint", "true", "--gradient_accumulation_steps", "2")
    with ends_with("its steps had 2 samples .* these would have 4"):
        train.main(options(work, "part", *steps, *more))


def test_a_checkpoint_without_all_weights_ends_in_one_line(work):
    shutil.copytree(work / "base", work / "incomplete")
    weights = safetensors.torch.load_file(work / "incomplete" / "model.safetensors")
    name = next(name for name in weights if "multi_modal_projector" in name)
    del weights[name]
    safetensors.torch.save_file(weights, work / "incomplete" / "model.safetensors", metadata={"format": "pt"})
    with ends_with(r"incomplete lacks 1 weights of the model, the first of them .*multi_modal_projector.*\n$"):
        train.main(options(work, "never", model="incomplete"))
    with ends_with("base has embedding_dim 16, the recipe asks for 32"):
        train.main(options(work, "never", "--embedding_dim", "32"))
    with ends_with("(?i)target[ _]modules"):  # PEFT's own words, which differ by release
        train.main(options(work, "never", "--lora_target_modules", "no_such_layer", config="lora"))
    assert not (work / "never").exists()


def test_two_processes(work):
    output = processes.run_python(
        *("-m", "accelerate.commands.launch", "--config_file", str(SCRIPTS / "accelerate" / "cpu.yaml")),
        *("--main_process_port", "0", str(SCRIPTS / "train.py")),
        *options(work, "ranks", "--per_device_train_batch_size", "2", "--max_steps", "1"),
    )
    assert "effective batch size 4 = 2 per device x 1 accumulated x 2 processes" in output
    assert output.count("effective batch size") == 1
    train.main(options(work, "one_process", "--per_device_train_batch_size", "4", "--max_steps", "1"))
    ranks, one = history(work / "ranks")[0], history(work / "one_process")[0]
    for name in ("loss", "main_loss", "autoregressive_loss", "grad_norm"):
        assert ranks[name] == pytest.approx(one[name], rel=1e-4), name


def test_a_onevision_checkpoint_gets_a_head_and_a_processor(work):
    train.main(options(work, "from_onevision", "--num_heads", "2", "--num_frames", "5", model="onevision"))
    model = AutoModel.from_pretrained(work / "from_onevision", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(work / "from_onevision", trust_remote_code=True)
    assert model.autoregressive_module is not None and processor.video_processor.num_frames == 5
    # It started from the checkpoint's weights, under their new names.
    before = tiny_onevision().state_dict()
    after = model.state_dict()
    for name in before:
        if "vision_tower" in name:
            assert torch.equal(before[name], after[name])
    assert (before["lm_head.weight"] - after["lm_head.weight"]).abs().max() < 0.01


def test_layout_and_sampling_of_a_recipe_reach_model_and_processor(work):
    more = ("--model_config.mm_newline_position", "grid", "--use_fast_slow_frames", "true", "--num_fast", "2")
    train.main(options(work, "layout", *more, "--num_slow", "3", config="prototype_basic"))
    model = AutoModel.from_pretrained(work / "layout", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(work / "layout", trust_remote_code=True)
    assert model.config.mm_newline_position == "grid"
    assert model.config.autoregressive_config.num_fast == 2 and model.config.autoregressive_config.loss_weight == 0.1
    assert processor.video_processor.sampling == "fast_slow"
    batch = batch_of(work, processor)
    assert set(batch["video_frame_types"].flatten().tolist()) == {0, 1}
    with torch.no_grad():
        assert model(**batch).autoregressive_loss.isfinite()


# ---------------------------------------------------------------------------------------------------------------- lora


def test_an_adapter_trains_and_reloads(work):
    train.main(options(work, "lora", "--lora_r", "4", config="lora"))
    assert (work / "lora" / "adapter_model.safetensors").exists()
    assert not (work / "lora" / "model.safetensors").exists()
    weights = safetensors.torch.load_file(work / "lora" / "adapter_model.safetensors")
    assert any("autoregressive_module" in name for name in weights) and any("lora_A" in name for name in weights)
    assert not any("vision_tower" in name for name in weights)
    model = AutoModelForImageTextToText.from_pretrained(work / "lora", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(work / "lora", trust_remote_code=True)
    # Merged in a second run with the same seed: the same model in one piece.
    train.main(options(work, "merged", "--lora_r", "4", "--merge_lora", "true", config="lora"))
    merged = AutoModel.from_pretrained(work / "merged", trust_remote_code=True).eval()
    batch = batch_of(work, processor)
    with torch.no_grad():
        one, other = model.float()(**batch), merged.float()(**batch)
    torch.testing.assert_close(one.autoregressive_loss, other.autoregressive_loss, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(one.main_loss, other.main_loss, rtol=1e-2, atol=1e-4)


def test_a_resumed_adapter_gives_what_an_uninterrupted_run_gives(work):
    steps = ("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--lora_r", "4")
    train.main(options(work, "lora_whole", *steps, config="lora"))
    (work / "lora_part").mkdir()
    (work / "lora_whole" / "checkpoint-2").rename(work / "lora_part" / "checkpoint-2")
    train.main(options(work, "lora_part", *steps, "--resume_from_checkpoint", "true", config="lora"))
    one, other = (
        safetensors.torch.load_file(work / name / "adapter_model.safetensors") for name in ("lora_whole", "lora_part")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_that_would_not_fit_its_base_is_refused(work):
    with ends_with(r"num_hist \(3 there, 2 here\): set merge_lora"):
        train.main(options(work, "refused", "--num_hist", "2", config="lora"))
    with ends_with("model_type"):
        train.main(options(work, "refused", "--num_heads", "2", config="lora", model="onevision"))


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_read_and_every_key_is_explained(path, tmp_path):
    arguments = ["--model", "m", "--train_data", "d", "--use_cpu", "true", "--output_dir", str(tmp_path)]
    *_, sections, values = recipes.parse_arguments(["--config", str(path), *arguments])
    assert set(sections) == {"autoregressive_config", "model_config"} and len(values) > 10
    for line in path.read_text().splitlines():
        is_key = line.strip() and not line.strip().startswith(("#", "-")) and not line.strip().endswith(":")
        assert not is_key or "  # " in line, f"{path.name}: {line.strip()} has no comment"


def test_both_forms_say_the_same(tmp_path):
    head = {"num_hist": 5, "loss_weight": 0.3}
    plain = {"learning_rate": "1e-5", "num_frames": 7, "num_hist": 5, "autoregressive_config": {"loss_weight": 0.3}}
    listed = {"trainer_type": "autoregressive_trainer", "learning_rate": 1e-5, "num_frames": 7}
    listed["model_config"] = {"autoregressive_config": head}
    common = ["--model", "m", "--train_data", "d", "--use_cpu", "true", "--output_dir", str(tmp_path)]
    for document in (plain, [{"type": "trainer", "config": listed}]):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(document))
        _, data_args, _, training_args, sections, _ = recipes.parse_arguments(["--config", str(path), *common])
        assert training_args.learning_rate == 1e-5 and data_args.num_frames == 7
        assert sections["autoregressive_config"] == head


def test_the_command_line_wins_over_the_recipe():
    arguments = [
        "--config",
        str(CONFIGS / "full.yaml"),
        "--model",
        "m",
        "--train_data=d",
        "--use-cpu",
        "--num_hist",
        "7",
    ]
    arguments += ["--learning_rate", "3e-5", "--autoregressive_config.loss_weight", "0.5", "--bf16", "false"]
    arguments += ["--lora_target_modules", "q_proj", "v_proj", "--lr_scheduler_kwargs", "{num_cycles: 0.4}"]
    model_args, _, _, training_args, sections, _ = recipes.parse_arguments(arguments)
    assert training_args.learning_rate == 3e-5 and training_args.bf16 is False and training_args.use_cpu is True
    assert training_args.lr_scheduler_kwargs == {"num_cycles": 0.4}
    assert model_args.lora_target_modules == ["q_proj", "v_proj"] and model_args.head_learning_rate == 1e-4
    assert sections["autoregressive_config"] == {"loss_weight": 0.5, "num_hist": 7, "num_layers": 3, "num_heads": 8}


def test_no_as_a_strategy_is_no_although_yaml_reads_false(tmp_path):
    strategies = ("save_strategy", "eval_strategy", "logging_strategy")
    (tmp_path / "recipe.yaml").write_text("".join(f"{name}: no\n" for name in strategies) + "bf16: no\n")
    common = ["--config", str(tmp_path / "recipe.yaml"), "--model", "m", "--train_data", "d"]
    for more in ([], [word for name in strategies for word in (f"--{name}", "no")]):
        _, _, _, args, _, _ = recipes.parse_arguments([*common, "--output_dir", str(tmp_path), *more])
        assert [getattr(args, name) for name in strategies] == ["no"] * 3 and args.bf16 is False


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_recipes_name_activation_checkpointing_as_the_installed_transformers_does(name, monkeypatch):
    monkeypatch.setattr(recipes, "ACTIVATION_CHECKPOINTING", name)
    document = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    assert recipes.flatten_recipe(document, "recipe") == {name: True, f"{name}_kwargs": {"use_reentrant": False}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "the command line: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["--num_hists", "1"], "unknown key 'num_hists'; did you mean 'autoregressive_config.num_hist'?"),
        (["--autoregressive_config.loss", "1"], "did you mean 'autoregressive_config.loss_type'?"),
        (["--model_config", "{mm_newline: grid}"], "did you mean 'model_config.mm_newline_position'?"),
        (
            ["--mm_spatial_pool_stride", "2"],
            "stands for autoregressive_config.mm_spatial_pool_stride or for model_config",
        ),
        (["--max_steps", "many"], "many"),
        (["--trainable", "some"], "trainable is 'some', expected one of full, projector_and_head, head, lora"),
        (
            ["--num_hist", "1", "--autoregressive_config.num_hist", "2"],
            "autoregressive_config.num_hist is given twice",
        ),
        (["5"], "expected --key before '5'"),
        (["--streaming", "true"], "streaming: true needs max_steps"),
        (
            ["--streaming", "true", "--max_steps", "5", "--train_sampling_strategy", "group_by_length"],
            "group_by_length needs the lengths of all samples, which a stream lacks",
        ),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llava-next-ar train"])
    with ends_with("^llava-next-ar train: " + ".*" + re.escape(message)):
        train.main([*arguments, *(["--model", "m", "--train_data", "d", "--use_cpu", "true"])])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "recipe.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("autoregressive_config: {num_hists: 1}", "did you mean 'autoregressive_config.num_hist'?"),
        ("- type: trainer\n  config: {model_config: {autoregressive_config: {num_hists: 1}}}", "num_hist'?"),
        ("- type: evaluator\n  config: {}", "`- type: trainer`"),
        ("- type: trainer\n  config: {trainer_type: sft}", "trainer_type is 'sft', expected 'autoregressive_trainer'"),
        ("autoregressive_config: 3", "autoregressive_config must hold keys and values, got 3"),
    ],
)
def test_mistakes_in_a_recipe(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with ends_with(re.escape(message)):
        train.main(["--config", str(path), "--model", "m", "--train_data", "d"])


def test_with_skip_bad_samples_are_listed_beside_the_model(work):
    entries = json.loads((work / "data" / "train.json").read_text())
    bad = [{"video": "gone.mp4", "id": "x9"}, {"video": "broken.mp4"}]
    (work / "data" / "broken.mp4").write_bytes(b"no video")
    (work / "data" / "some_bad.json").write_text(json.dumps([*entries, *bad]))
    data = ("--train_data", str(work / "data" / "some_bad.json"), "--on_bad_sample", "skip")
    train.main(options(work, "skipped", *data, "--max_bad_share", "0.4", "--max_steps", "3"))
    lines = [json.loads(line) for line in (work / "skipped" / "bad_samples.jsonl").read_text().splitlines()]
    assert [(line["index"], line["id"], line["files"]) for line in lines] == [
        (4, "x9", ["gone.mp4"]),
        (5, None, ["broken.mp4"]),
    ]
    with ends_with("1 of 6 .* max_bad_share=0.1 "):
        train.main(options(work, "too_many", *data, "--max_bad_share", "0.1"))


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_several_sources_with_weights(work, streaming):
    (work / "data" / "videos.jsonl").write_text('{"video": "a.mp4"}\n{"video": "b.mp4"}\n')
    sources = [str(work / "data" / "train.json"), f"{{path: {work / 'data' / 'videos.jsonl'}, weight: 1.5}}"]
    given = options(work, f"mixed_{streaming}", "--streaming", streaming)
    place = given.index("--train_data")
    given[place + 1 : place + 2] = sources
    train.main(given)
    losses = history(work / f"mixed_{streaming}")
    assert len(losses) == 2 and all(log["autoregressive_loss"] > 0 for log in losses)


def test_a_bad_sample_stops_the_run_before_it_starts(work):
    entries = json.loads((work / "data" / "train.json").read_text())
    (work / "data" / "bad.json").write_text(json.dumps([*entries, {"video": "gone.mp4", "id": "x9"}]))
    with ends_with("sample 4 .*x9.*gone.mp4"):
        train.main(options(work, "never", "--train_data", str(work / "data" / "bad.json")))
    assert not os.path.exists(work / "never")


def test_a_terminated_run_ends_with_status_143_and_the_same_command_finishes_it(work, monkeypatch, capsys):
    steps = ("--max_steps", "3", "--learning_rate", "0.01", "--per_device_train_batch_size", "2")
    train.main(options(work, "not_terminated", *steps))
    step = train.AutoregressiveTrainer.training_step

    def terminated(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    command = options(work, "terminated", *steps, "--resume_from_checkpoint", "true")
    monkeypatch.setattr(train.AutoregressiveTrainer, "training_step", terminated)
    with pytest.raises(SystemExit) as ended:
        train.main(command)
    assert ended.value.code == 143 and "stopped after step 1" in capsys.readouterr().out
    assert (work / "terminated" / "checkpoint-1").is_dir()
    assert not (work / "terminated" / "model.safetensors").exists()  # that would be the model of a finished run
    monkeypatch.undo()
    train.main(command)
    one, other = (work / name / "model.safetensors" for name in ("not_terminated", "terminated"))
    assert one.read_bytes() == other.read_bytes()
    assert history(work / "not_terminated") == history(work / "terminated")


def interrupt(monkeypatch, *steps: int) -> None:
    """Sends SIGINT in the middle of the steps of these numbers."""
    step = train.AutoregressiveTrainer.training_step

    def interrupted(self, *args):
        if self.state.global_step in steps:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(train.AutoregressiveTrainer, "training_step", interrupted)


def test_the_first_ctrl_c_saves_and_ends_with_status_130(work, monkeypatch, capfd):
    handler = signal.getsignal(signal.SIGINT)
    steps = ("--max_steps", "3", "--learning_rate", "0.01", "--per_device_train_batch_size", "2")
    train.main(options(work, "not_interrupted", *steps))
    interrupt(monkeypatch, 0)
    with pytest.raises(SystemExit) as ended:
        train.main(options(work, "interrupted", *steps))
    said = capfd.readouterr()
    assert ended.value.code == 130 and "stopped after step 1; go on with --resume_from_checkpoint true" in said.out
    assert "Ctrl-C: saving a checkpoint after this step; press it again to stop at once" in said.err
    assert "Traceback" not in said.err and signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    train.main(options(work, "interrupted", *steps, "--resume_from_checkpoint", "true"))
    one, other = (work / name / "model.safetensors" for name in ("not_interrupted", "interrupted"))
    assert one.read_bytes() == other.read_bytes()


def test_a_second_ctrl_c_stops_at_once_and_in_one_line(work, monkeypatch, capfd):
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(termination, "_SAME_KEY_PRESS", -1.0)  # each signal is a key press of its own
    step = train.AutoregressiveTrainer.training_step

    def interrupted(self, *args):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(train.AutoregressiveTrainer, "training_step", interrupted)
    with pytest.raises(SystemExit) as ended:
        train.main(options(work, "interrupted_twice"))
    said = capfd.readouterr()
    assert ended.value.code == 130 and ": stopped by Ctrl-C" in said.err and "Traceback" not in said.err
    assert not list((work / "interrupted_twice").glob("checkpoint-*")) and signal.getsignal(signal.SIGINT) is handler


def test_a_key_press_that_comes_twice_is_one(work, monkeypatch):
    """From the terminal and from a launcher that passes it on."""
    step = train.AutoregressiveTrainer.training_step

    def interrupted(self, *args):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(train.AutoregressiveTrainer, "training_step", interrupted)
    with pytest.raises(SystemExit) as ended:
        train.main(options(work, "passed_on"))
    assert ended.value.code == 130 and (work / "passed_on" / "checkpoint-1").is_dir()


def test_a_worker_that_the_terminal_interrupts_too_says_and_does_nothing(capfd, monkeypatch):
    stop, state, process = termination.StopOnSigterm(), SimpleNamespace(is_local_process_zero=True), os.getpid()
    stop.on_train_begin(None, state, None)
    try:
        monkeypatch.setattr(termination.os, "getpid", lambda: -1)  # as in a fork
        os.kill(process, signal.SIGINT)
        assert stop.requests == [0, 0] and capfd.readouterr().err == ""
        monkeypatch.undo()
        os.kill(process, signal.SIGINT)
        assert stop.requests == [0, 1] and "Ctrl-C: saving" in capfd.readouterr().err
    finally:
        stop.restore()


def test_ctrl_c_before_the_training_ends_in_one_line(work, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_model", interrupted)
    with pytest.raises(SystemExit) as ended:
        train.main(options(work, "not_even_begun"))
    assert ended.value.code == 130 and capsys.readouterr().err.strip().endswith(": stopped by Ctrl-C")


def test_a_folder_that_holds_a_run_is_not_started_in_again(work, capsys):
    steps = ("--save_strategy", "steps", "--save_steps", "1", "--learning_rate", "0.01")
    train.main(options(work, "again", *steps, "--max_steps", "4"))
    before = (work / "again" / "model.safetensors").read_bytes()

    def refusal(*more: str) -> str:
        with ends_with("") as written:
            train.main(options(work, "again", *steps, *more))
        assert (work / "again" / "model.safetensors").read_bytes() == before
        return written.getvalue()

    assert "holds checkpoint-4 and a model of an earlier run" in refusal("--max_steps", "2")
    assert "--resume_from_checkpoint true" in refusal() and "--overwrite_output_dir true" in refusal()
    both = ("--resume_from_checkpoint", "true", "--overwrite_output_dir", "true")
    assert "contradict each other" in refusal(*both)
    (work / "data" / "other.json").write_text((work / "data" / "train.json").read_text())
    other = ("--train_data", str(work / "data" / "other.json"), "--resume_from_checkpoint", "true")
    assert "holds a run with train_data=" in refusal(*other) and "other.json" in refusal(*other)

    capsys.readouterr()
    train.main(options(work, "again", *steps, "--max_steps", "2", "--overwrite_output_dir", "true"))
    assert "deleted checkpoint-1, checkpoint-2, checkpoint-3, checkpoint-4 of the run" in capsys.readouterr().out
    assert sorted(path.name for path in (work / "again").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert (work / "again" / "model.safetensors").read_bytes() != before
    assert [entry["step"] for entry in history(work / "again")] == [1, 2]


def test_a_stale_checkpoint_is_not_what_a_run_goes_on_from(work):
    """A longer run in the same folder left one with a higher number."""
    steps = ("--save_strategy", "steps", "--save_steps", "2")
    train.main(options(work, "stale", *steps, "--max_steps", "4"))
    stale = work / "stale" / "checkpoint-4"
    kept = stale.rename(work / "kept")
    train.main(options(work, "stale", *steps, "--max_steps", "2", "--overwrite_output_dir", "true"))
    kept.rename(stale)  # as if it had not been deleted
    assert last_complete_checkpoint(work / "stale") == str(work / "stale" / "checkpoint-2")
    assert last_complete_checkpoint(work / "kept") is None


def test_a_finished_model_without_checkpoints_is_not_trained_over(work):
    train.main(options(work, "finished"))
    with ends_with("holds a model and no checkpoint to resume from"):
        train.main(options(work, "finished", "--resume_from_checkpoint", "true"))


def test_a_checkpoint_of_the_model_alone_is_refused_before_anything_is_loaded(work, monkeypatch):
    steps = ("--save_strategy", "steps", "--save_steps", "1", "--save_only_model", "true")
    train.main(options(work, "model_only", *steps))
    monkeypatch.setattr(train, "load_model", lambda *args: pytest.fail("it was loaded"))
    with ends_with("checkpoint-2: it holds the model without the state of the optimizer"):
        train.main(options(work, "model_only", "--resume_from_checkpoint", "true"))


def test_lines_tell_how_far_it_is_and_what_comes_next(work, capsys):
    data = str(work / "data" / "train.json")
    train.main(options(work, "lines", "--eval_data", data, "--disable_tqdm", "true"))
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split("   ")[0] for line in steps] == ["step 1/2", "step 2/2"]
    assert "left   loss" in steps[0] and "samples/s" in steps[0] and "0:00:00 left" in steps[1]
    assert not any(line.startswith("{") for line in lines)
    assert sum(line.startswith("evaluation at step 2: eval_loss") for line in lines) == 1
    following = lines[lines.index("next:") + 1 :]
    assert f"llava-next-ar evaluate --model {work / 'lines'} --data {data} --output lines_results.json" in following[0]
    assert [line.split("llava-next-ar ")[1].split()[0] for line in following] == ["evaluate", "visualize", "push"]


def test_commands_after_a_training_are_quoted_and_a_complete_run_keeps_its_metrics(work, capsys):
    steps = ("--save_strategy", "steps", "--save_steps", "1")
    train.main(options(work, "two words", *steps))
    folder = work / "two words"
    metrics = (folder / "train_results.json").read_bytes()
    lines = capsys.readouterr().out.splitlines()
    evaluate, _, push = (shlex.split(line.split(":", 1)[1]) for line in lines[lines.index("next:") + 1 :])
    assert evaluate[3] == str(folder) and evaluate[-1] == "two words_results.json"
    assert push[2:4] == [str(folder), "<user>/two-words"]
    train.main(options(work, "two words", *steps, "--resume_from_checkpoint", "true"))
    assert "checkpoint-2 has all 2 steps: nothing was left to train" in capsys.readouterr().out
    assert (folder / "train_results.json").read_bytes() == metrics


# Saves for longer than the launcher waits.
SLOW_SAVE = """
import sys, time
from llava_next_ar.training import run
save = run.AutoregressiveTrainer._save_checkpoint
def slow(self, *args):
    print("saving", flush=True)
    time.sleep(6)
    save(self, *args)
run.AutoregressiveTrainer._save_checkpoint = slow
step = run.AutoregressiveTrainer.training_step
def steady(self, *args):
    time.sleep(0.3)
    print("in a step", flush=True)
    return step(self, *args)
run.AutoregressiveTrainer.training_step = steady
run.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_launcher_waits_for_a_save_that_takes_longer_than_its_patience(work, tmp_path):
    (tmp_path / "slow_save.py").write_text(SLOW_SAVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--shutdown-timeout", "2", tmp_path / "slow_save.py"]
    more = ("--max_steps", "200", "--per_device_train_batch_size", "2")
    with processes.Program([*command, *options(work, "preempted", *more)]) as program:
        while "in a step" not in program.stdout and program.process.poll() is None:
            time.sleep(0.1)
        program.process.send_signal(signal.SIGTERM)
        done = program.finish(timeout=120, status=None)
    assert done.returncode != 0 and done.stdout.count("saving") == 2, done.stderr[-3000:]
    (checkpoint,) = (work / "preempted").glob("checkpoint-*")
    assert checkpoint_problem(checkpoint) is None
    assert "SIGTERM: saving a checkpoint after step" in done.stderr


def test_a_spoiled_step_ends_the_run_with_the_names_of_its_samples(work, monkeypatch):
    loss = train.AutoregressiveTrainer.compute_loss
    monkeypatch.setattr(
        train.AutoregressiveTrainer, "compute_loss", lambda *args, **kwargs: loss(*args, **kwargs) * float("nan")
    )
    with ends_with(r"step 1: the gradient norm is nan.*train.json \[a.mp4\]", status=1):
        train.main(options(work, "spoiled"))
    with ends_with("1 steps were skipped before", status=1):
        train.main(options(work, "spoiled_twice", "--bad_step_action", "skip", "--max_skipped_steps", "1"))


# -------------------------------------------------------------------------------------------------- adapters on the tower


def tower_features(model, pixels: torch.Tensor) -> torch.Tensor:
    """Inputs of the projector, from the tower in its present state."""
    head = model.autoregressive_module
    with torch.no_grad():
        return head.run_tower(model.model.vision_tower, pixels)


def test_adapters_on_the_tower_move_its_features_and_never_the_targets(work, monkeypatch):
    seen = []
    compute = AutoregressiveReconstructionModule.teacher_features

    def teacher_features(self, vision_tower, pixel_values, tower_features=None):
        features = compute(self, vision_tower, pixel_values, tower_features)
        seen.append((pixel_values.clone(), tower_features.detach().clone(), features.clone()))
        return features

    monkeypatch.setattr(AutoregressiveReconstructionModule, "teacher_features", teacher_features)
    more = ("--lora_r", "4", "--bf16", "false", "--learning_rate", "0.02", "--max_steps", "3")
    train.main(options(work, "lora_vision", *more, config="lora_vision"))
    base = LlavaNextARForConditionalGeneration.from_pretrained(work / "base").eval()
    assert len(seen) == 3
    for step, (pixels, student, teacher) in enumerate(seen):
        assert torch.equal(teacher, tower_features(base, pixels))  # bit for bit, whatever the adapters have learned
        assert torch.equal(student, teacher) == (step == 0)  # adapters start as nothing
    weights = safetensors.torch.load_file(work / "lora_vision" / "adapter_model.safetensors")
    assert any("vision_tower" in name and "lora_B" in name and tensor.any() for name, tensor in weights.items())
    assert {"projector", "autoregressive_module"} <= {
        part for name in weights for part in ("projector", "autoregressive_module", "image_newline") if part in name
    }
    model = AutoModelForImageTextToText.from_pretrained(work / "lora_vision", trust_remote_code=True).eval()
    pixels = seen[0][0]
    assert not torch.equal(tower_features(model, pixels), tower_features(base, pixels))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    teacher = compute(model.autoregressive_module, model.model.vision_tower, pixels)
    assert torch.equal(teacher, tower_features(base, pixels))
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}  # PEFT once switched them all on
    assert torch.equal(model.model.image_newline, base.model.image_newline)


def test_tokens_that_adapters_would_leave_random_are_refused(work):
    more = ("--model_config.add_faster_video", "true", "--model_config.mm_newline_position", "grid")
    more += ("--merge_lora", "true")
    with ends_with("has no faster_token, .* trainable: lora leaves as it is"):
        train.main(options(work, "refused", *more, config="lora"))


# --------------------------------------------------------------------------------------------------------------- qlora


def test_only_layers_of_the_language_model_are_quantized():
    config = trained_model.quantization_config(torch.bfloat16)
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    linear = {name for name, module in tiny_model().named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name for name in linear if should_convert_module(name, config.llm_int8_skip_modules)}
    assert quantized == {name for name in linear if name.startswith("model.language_model.layers.")}
    assert len(quantized) == 14


def test_qlora_says_what_it_needs(work, monkeypatch):
    def refusal(*more: str) -> str:
        with ends_with("") as written:
            train.main(options(work, "refused", *more, config="qlora"))
        return written.getvalue()

    assert "needs trainable: lora, got full" in refusal("--trainable", "full")
    assert "rounded weights" in refusal("--merge_lora", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds none here: use scripts/configs/lora.yaml" in refusal()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(trained_model, "is_bitsandbytes_available", lambda: False)
    assert "pip install bitsandbytes" in refusal()


# --------------------------------------------------------------------------------------------------- the prototype's form


@pytest.mark.parametrize("name", ["prototype_basic", "prototype_full"])
def test_the_forms_of_the_prototype_run_as_they_stand(work, name, monkeypatch):
    """Once a model and data are named, and nothing else."""
    monkeypatch.chdir(work)  # the recipe's own output_dir is relative
    train.main(["--config", str(CONFIGS / f"{name}.yaml"), "--model", "onevision", "--train_data", "data/train.json"])
    model = AutoModel.from_pretrained(work / "outputs" / name, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(work / "outputs" / name, trust_remote_code=True)
    assert json.loads((work / "outputs" / name / "train_results.json").read_text())["train_loss"] > 0
    if name == "prototype_full":
        assert model.config.autoregressive_config.embedding_dim == 1152
        assert processor.video_processor.sampling == "fast_slow"
        assert model.config.autoregressive_config.enable_multiscale_pooling
    with torch.no_grad():
        assert model(**batch_of(work, processor)).autoregressive_loss.isfinite()
