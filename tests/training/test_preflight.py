"""`llava-next-ar train --check`, and its estimate of memory."""

import json
import re
import sys
from pathlib import Path

import processes
import pytest
import torch
from memory_run import NUM_FRAMES, NUM_TARGETS, NUM_TEXT, NUM_VIDEOS, memory_config
from tiny import tiny_config
from tiny_processor import tiny_processor
from transformers import TrainingArguments
from video_clips import write_clip

from llava_next_ar.configuration.configuration_llava_next_ar import LlavaNextARConfig
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from llava_next_ar.training import run as train
from llava_next_ar.training import trained_model
from llava_next_ar.training.preflight import run_preflight
from llava_next_ar.training.recipes import ModelArguments
from llava_next_ar.training.step_memory import step_memory

CONFIGS = Path(__file__).resolve().parents[2] / "scripts" / "configs"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A checkpoint without weights, and data."""
    folder = tmp_path_factory.mktemp("work")
    config = tiny_config()
    config.save_pretrained(folder / "base")
    tiny_processor(config, num_frames=4).save_pretrained(folder / "base")
    (folder / "data").mkdir()
    write_clip(folder / "data" / "a.mp4", 6, width=64, height=48)
    write_clip(folder / "data" / "b.mp4", 2, width=64, height=48)
    asked = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    text = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello " * 20}]
    good = [{"conversations": asked, "video": "a.mp4"}, {"conversations": text}, {"video": "b.mp4"}] * 4
    (folder / "data" / "good.json").write_text(json.dumps(good))
    bad = [{"video": f"gone{i}.mp4"} for i in range(3)] + [{"conversations": []}]
    (folder / "data" / "bad.json").write_text(json.dumps(good + bad))
    return folder


def check(work: Path, capsys, data: str, *more: str) -> tuple[int, str]:
    options = ["--config", str(CONFIGS / "full.yaml"), "--model", str(work / "base"), "--num_heads", "2"]
    options += ["--train_data", str(work / "data" / data), "--output_dir", str(work / "never"), "--use_cpu", "true"]
    options += ["--dataloader_num_workers", "0", "--num_frames", "4", "--check", *more]
    with pytest.raises(SystemExit) as caught:
        train.main(options)
    assert not (work / "never").exists() and not list(work.rglob("*.safetensors")) and not list(work.rglob("*.jsonl"))
    return int(caught.value.code), capsys.readouterr().out


def test_what_a_recipe_would_do_is_said_without_weights(work, capsys):
    code, report = check(work, capsys, "good.json", "--max_length", "200", "--check_samples", "100")
    assert code == 0 and "nothing found that would certainly fail" in report
    layout = tiny_config().frame_token_layout
    assert f"tokens per frame      {layout.tokens_per_frame()}\n" in report
    assert "frames                uniform: num_frames 4\n" in report
    assert "samples               12 read, of which 8 decoded\nframes per sample     2 to 4, mean 3.0\n" in report
    counts = [int(count) for count in re.findall(r"^ +\d+ - +\d+ #* (\d+)$", report, flags=re.MULTILINE)]
    assert sum(counts) == 12
    assert "longer than max_length of 200: 0 of 12" in report
    assert "samples without video 4 (33.3%)" in report and "without answers       4 (33.3%)" in report
    assert "effective batch       8 = 1 per device x 8 accumulated x 1 processes" in report
    assert "optimizer steps       2: 1.00 epochs of 12 samples" in report
    assert "with checkpointing (this recipe):" in report
    # A square. + its end, Hello... + its end
    assert f"supervised tokens     {4 * 10 + 4 * 121} of " in report


def test_what_would_fail_is_named_and_the_exit_code_says_so(work, capsys):
    code, report = check(work, capsys, "bad.json")
    assert code == 1 and "bad samples           4 of 16 (25.0%)" in report
    assert (
        "3 x FileNotFoundError: no such file:" in report and "1 x ValueError: the conversation has no turns" in report
    )
    assert re.search(r"FAILS: sample 1\d of .*bad.json cannot be used", report)
    assert check(work, capsys, "bad.json", "--on_bad_sample", "skip", "--max_bad_share", "0.25")[0] == 0
    code, report = check(work, capsys, "bad.json", "--on_bad_sample", "skip", "--max_bad_share", "0.2")
    assert code == 1 and "4 bad samples alone are more than max_bad_share=0.2 of 16" in report
    stream = ("--streaming", "true", "--max_steps", "9")  # of which no share is known
    assert check(work, capsys, "bad.json", "--on_bad_sample", "skip", "--max_bad_share", "0.2", *stream)[0] == 0
    code, report = check(work, capsys, "bad.json", "--on_bad_sample", "skip", "--max_bad_samples", "3")
    assert code == 1 and "4 bad samples alone are more than max_bad_samples=3" in report
    code, report = check(work, capsys, "good.json", "--max_length", "100")
    assert code == 1 and "8 x too long" in report and "longer than max_length of 100: 8 of 12" in report
    code, report = check(work, capsys, "good.json", "--check_samples", "5", "--streaming", "true", "--max_steps", "9")
    assert code == 0 and "5 read, of which" in report and "optimizer steps       9, from a stream" in report


def meta_model(trainable: str, tmp_path: Path, config: LlavaNextARConfig | None = None, **options):
    with torch.device("meta"):
        model = LlavaNextARForConditionalGeneration._from_config(config or tiny_config(), dtype=torch.float32)
        args = ModelArguments(trainable=trainable, lora_r=4, **options)
        return trained_model.choose_trainable(model, args, TrainingArguments(tmp_path, use_cpu=True))


def test_memory_by_part(tmp_path):
    batch = {"batch_size": 2, "length": 500, "num_frames": 8, "num_targets": 20}
    full = meta_model("full", tmp_path)
    sizes = {p: p.numel() * 4 for p in full.parameters()}
    trained = sum(size for p, size in sizes.items() if p.requires_grad)
    parts = step_memory(full, **batch)
    assert parts["weights"] == sum(sizes.values())
    assert parts["gradients"] == trained and parts["optimizer"] == 2 * trained
    assert parts["logits"] == 20 * full.config.text_config.vocab_size * 12
    assert step_memory(full, **batch, optimizer="sgd")["optimizer"] == 0
    longer = step_memory(full, **{**batch, "length": 1000})
    assert parts["activations"] < longer["activations"] < 2 * parts["activations"]  # tower and head stay as they are
    less = step_memory(full, **batch, checkpointing=True)
    assert less["activations"] < parts["activations"] and less["weights"] == parts["weights"]
    # Nothing of the language model is kept where only the head trains; with a tower that trains, the tower too.
    assert step_memory(meta_model("head", tmp_path), **batch)["activations"] < 0.5 * parts["activations"]
    with_tower = step_memory(meta_model("full", tmp_path, freeze_vision_tower=False), **batch)
    assert with_tower["activations"] > parts["activations"] and with_tower["weights"] > parts["weights"]
    lora = meta_model("lora", tmp_path)
    adapters = step_memory(lora, **batch)
    assert adapters["gradients"] < parts["gradients"] and adapters["activations"] > 0.5 * parts["activations"]
    # In four bits a weight takes half a byte and its share of the scales, whatever is computed in.
    for options in ({}, {"compute_dtype": torch.bfloat16}):
        plain = step_memory(lora, **batch, **options)
        quantized = step_memory(lora, **batch, **options, num_quantized=10_000)
        changed = {name: plain[name] - quantized[name] for name in plain if plain[name] != quantized[name]}
        assert changed == {"weights": 40_000 - 5_160, "total": 40_000 - 5_160}
    # A mask of bool, and what is added to the scores.
    masked = step_memory(full, **batch, masked_length=1000)
    assert masked["mask"] == 1000**2 * (1 + 4) and parts["mask"] == 0
    assert masked["total"] == parts["total"] + masked["mask"]


@pytest.mark.parametrize(
    ("more", "has_mask"),
    [
        (("--packing", "true"), True),
        (("--packing", "true", "--attn_implementation", "flash_attention_2"), False),
        (("--packing", "false"), False),
    ],
)
def test_a_packed_row_has_a_mask_where_attention_needs_one(work, capsys, more, has_mask):
    _, report = check(work, capsys, "good.json", "--per_device_train_batch_size", "4", *more)
    assert (", mask " in report) is has_mask


def test_check_counts_what_will_be_in_four_bits(work, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "check_quantization", lambda args: None)  # no GPU is needed
    monkeypatch.setattr(
        train,
        "run_preflight",
        lambda *args, **more: seen.append(more["num_quantized"]) or run_preflight(*args, **more),
    )
    for quantized in ("true", "false"):
        check(work, capsys, "good.json", "--trainable", "lora", "--merge_lora", "true", "--load_in_4bit", quantized)
    text = LlavaNextARForConditionalGeneration(tiny_config()).model.language_model.layers
    assert seen == [sum(p.numel() for name, p in text.named_parameters() if name.endswith("proj.weight")), 0]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(("tower", "checkpointing"), [(False, False), (True, False), (False, True)])
def test_the_memory_of_a_real_step_is_as_foretold(tower, checkpointing, tmp_path):
    config = memory_config()
    model = meta_model("full", tmp_path, config, freeze_vision_tower=not tower)
    foretold = step_memory(
        model,
        batch_size=NUM_VIDEOS,
        length=config.frame_token_layout.num_tokens(NUM_FRAMES) + NUM_TEXT,
        num_frames=NUM_VIDEOS * NUM_FRAMES,
        num_targets=NUM_VIDEOS * NUM_TARGETS,
        checkpointing=checkpointing,
    )["total"]
    command = [sys.executable, Path(__file__).parents[1] / "memory_run.py", tower, checkpointing]
    done = processes.run(command, timeout=300)
    measured = int(done.stdout.split("PEAK")[1])
    print(f"tower trains {tower}, checkpointing {checkpointing}: {foretold / measured:.2f} of what was measured")
    assert 1 / 1.5 < foretold / measured < 1.5
