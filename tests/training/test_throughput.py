"""Counts, floating-point operations and rates of the log, and the lines that show them."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from memory_run import memory_config
from peft import LoraConfig, get_peft_model
from tiny import VIDEO_TOKEN, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from training_runs import make_samples

from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from llava_next_ar.training import progress, throughput
from llava_next_ar.training.collator import LlavaVideoCollator
from llava_next_ar.training.throughput import COUNTS, StepFlops, ThroughputMeter, count_batch, peak_flops

ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda row: row)  # of one process


def counts_of(samples: list, **options) -> dict[str, float]:
    batch = LlavaVideoCollator(0, **options)(samples)
    return dict(zip(COUNTS, count_batch(batch, len(samples), [VIDEO_TOKEN]).tolist(), strict=True))


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_counts_of_a_batch_do_not_count_padding(packing):
    frames = ([2], [], [5, 3])
    samples = make_samples(tiny_model().config, frames=frames)
    lengths = [len(sample["input_ids"]) for sample in samples]
    visual = sum(int((sample["input_ids"] == VIDEO_TOKEN).sum()) for sample in samples)
    assert len(set(lengths)) == 3 and visual > 0
    assert counts_of(samples, packing=packing) == {
        "samples": 3,
        "text_tokens": sum(lengths) - visual,
        "visual_tokens": visual,
        "squares": sum(length**2 for length in lengths),
        "targets": 4 + 5 + 6,
        "frames": 10,
    }


@pytest.mark.parametrize("trained", ["all but the tower", "all", "adapters", "adapters on the tower", "head"])
def test_the_operations_of_a_step_are_those_that_torch_counts(trained):
    """Attention that keeps its weights, as a fused kernel's operations are not counted on every device."""
    config = memory_config()
    model = LlavaNextARForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.requires_grad_(trained != "head")
    model.autoregressive_module.requires_grad_(True)
    model.model.vision_tower.requires_grad_(trained == "all")
    if trained.startswith("adapters"):
        part = "(language_model|vision_tower.encoder)" if "tower" in trained else "language_model"
        saved = ["multi_modal_projector", "autoregressive_module"]
        targets = rf".*{part}.*(q_proj|v_proj)"
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, modules_to_save=saved))
    model.train()
    num_frames = 3
    text = torch.arange(1, 200)
    visual = torch.full((config.frame_token_layout.num_tokens(num_frames),), config.video_token_id)
    input_ids = torch.cat([text, visual, text])[None]
    labels = torch.where(torch.arange(input_ids.shape[1]) >= input_ids.shape[1] - 50, input_ids, -100)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "pixel_values_videos": torch.randn(1, num_frames, 3, 112, 112),
        "video_frame_mask": torch.ones(1, num_frames, dtype=torch.bool),
        "video_timestamps": torch.arange(float(num_frames))[None],
    }
    flops = StepFlops(model, has_head=True)
    with FlopCounterMode(display=False) as counted:
        model(**batch, skip_logits=True).loss.backward()
    counts = count_batch(batch, 1, [config.video_token_id])
    expected = flops(dict(zip(COUNTS, counts.tolist(), strict=True)))
    assert expected == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_rates_are_of_the_time_within_steps(monkeypatch):
    """Steps of 3 and 5 seconds, of which the data took 1 and 1; 100 seconds in between are another's."""
    now = itertools.chain([10.0, 13.0, 113.0, 118.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(throughput, "peak_memory", lambda device: 3 * 2**30)
    meter = ThroughputMeter(flops=lambda sums: 1e12 * sums["samples"], peak=1e13)
    row = {"samples": 2, "text_tokens": 30, "visual_tokens": 50, "squares": 0, "targets": 0, "frames": 0}
    for _ in range(2):
        meter.begin_step()
        meter.add_data([torch.tensor(list(row.values()), dtype=torch.float64)] * 3, waited=1.0)  # three batches
        meter.end_step()
        meter.end_step()  # as at the end of an epoch
    assert meter.pop(ACCELERATOR) == {
        "samples_per_second": 12 / 8,
        "tokens_per_second": 480 / 8,
        "visual_tokens_per_second": 300 / 8,
        "text_tokens_per_second": 180 / 8,
        "data_wait_share": 2 / 8,
        "peak_memory_gib": 3,
        "model_flops_utilization": 12e12 / (8 * 1e13),
    }
    assert meter.pop(ACCELERATOR) == {}


def test_ranks_add_up_and_the_slowest_gives_the_time(monkeypatch):
    monkeypatch.setattr(throughput, "peak_memory", lambda device: 2**30)
    meter = ThroughputMeter(flops=lambda sums: sums["samples"], peak=1.0)
    now = iter([0.0, 2.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(now))
    meter.begin_step()
    meter.add_data([torch.ones(len(COUNTS), dtype=torch.float64)], waited=0.5)
    meter.end_step()
    other = torch.tensor([[3.0] * len(COUNTS) + [4.0, 3.0, 5 * 2**30]], dtype=torch.float64)
    entries = meter.pop(SimpleNamespace(device=torch.device("cpu"), gather=lambda row: torch.cat([row, other])))
    assert entries["samples_per_second"] == 4 / 4 and entries["data_wait_share"] == 3 / 4
    assert entries["peak_memory_gib"] == 5 and entries["model_flops_utilization"] == 4 / (4 * 2)


def test_memory_that_is_not_known_is_not_logged(monkeypatch):
    """Windows has no module `resource`."""
    monkeypatch.setattr(throughput, "resource", None)
    meter = ThroughputMeter(flops=None, peak=None)
    meter.begin_step()
    meter.end_step()
    entries = meter.pop(ACCELERATOR)
    assert set(throughput.ENTRIES) - set(entries) == {"peak_memory_gib", "model_flops_utilization"}


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H200", 9.89e14),
        ("NVIDIA H100 80GB HBM3", 9.89e14),
        ("NVIDIA H100 PCIe", 7.56e14),
        ("NVIDIA A100-SXM4-80GB", 3.12e14),
        ("NVIDIA A10G", 1.25e14),
        ("NVIDIA L40S", 3.62e14),
        ("NVIDIA L4", 1.21e14),
        ("NVIDIA GeForce RTX 4090", 1.652e14),
        ("Tesla V100-SXM2-32GB", 1.25e14),
        ("Tesla T4", 6.5e13),
        ("NVIDIA T400 4GB", None),
        ("Quadro K620", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(name, flops):
    assert peak_flops(name) == flops


# --------------------------------------------------------------------------------------------------------------- lines


def test_a_line_says_where_the_training_is_and_when_it_ends(monkeypatch, capsys):
    now = iter([100.0, 160.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    lines = progress.ProgressLines()
    state = SimpleNamespace(global_step=10, max_steps=1000, is_world_process_zero=True)
    lines.on_train_begin(None, state, None)  # resumed at step 10
    state.global_step = 40
    logs = {"loss": 2.5, "main_loss": 2.0, "autoregressive_loss": 0.5, "autoregressive_share": 0.2, "skill": 0.25}
    logs |= {"learning_rate": 1e-4, "grad_norm": 1.23456, "samples_per_second": 12.0, "tokens_per_second": 3456.0}
    lines.on_log(None, state, None, logs=logs | {"data_wait_share": 0.031, "peak_memory_gib": 1.26})
    assert capsys.readouterr().out == (
        "step   40/1000   0:01:00, 0:32:00 left   loss 2.5 (text 2, frames 0.5, 20% of the total)   skill +0.250   "
        "rate 0.0001   norm 1.23   12 samples/s   3,456 tokens/s   3% waiting for data   1.3 GiB\n"
    )
    lines.on_log(None, state, None, logs={"eval_loss": 1.5, "eval_skill": 0.1, "eval_runtime": 3.0, "epoch": 1.0})
    lines.on_log(None, state, None, logs={"train_runtime": 3.0, "train_loss": 1.0})
    assert capsys.readouterr().out == "evaluation at step 40: eval_loss 1.5, eval_skill 0.1\n"
    state.is_world_process_zero = False
    lines.on_log(None, state, None, logs={"eval_loss": 1.5})
    assert capsys.readouterr().out == ""
