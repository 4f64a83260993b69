"""The GPU benchmark at a tiny shape on the CPU, so that it cannot rot between two looks at a GPU."""

import json
import sys
from argparse import Namespace

import pytest

from llava_next_ar.experiments.benchmarks import benchmark, gpu

OPTIONS = Namespace(device="cpu", frames=[2], steps=1, new_tokens=2, shapes=["tiny"], parts=["entries"], budget=300.0)


def rows(name: str) -> list[dict]:
    return list(gpu.PARTS[name][0](OPTIONS, "tiny"))


def test_every_entry_point_runs():
    assert {row["case"]: row["result"] for row in rows("entries")} == dict.fromkeys(
        (
            *(
                "forward",
                "forward and backward",
                "skip_logits",
                "return_reconstruction",
                "generate",
                "generate, beams",
            ),
            *("predict_next_frames", "surprise", "surprise_stream", "imagine", "text alone"),
        ),
        "ran",
    )


def test_attention_back_ends_are_compared_where_they_run():
    sdpa, *others = rows("parity")
    assert 0 <= sdpa["logits"] < 1e-4 and 0 <= sdpa["predictions"] < 1e-4
    assert all(row["not run"] == "needs a GPU" for row in others)


def test_lower_precision_has_an_error_of_its_size():
    bfloat16, float16 = rows("precision")
    assert 1e-3 < bfloat16["logits"] < 0.1
    assert 1e-5 < float16["logits"] < bfloat16["logits"]


def test_a_step_is_compared_with_onevision():
    found = rows("step")
    assert [(row["checkpointing"], row["model"]) for row in found] == [
        (checkpointing, model) for checkpointing in (True, False) for model in ("onevision", "ours", "no head")
    ]
    for row in found:
        assert row["seconds"] > 0 and row["tokens/s"] > 0
        assert (row["seconds ratio"] == 1) == (row["model"] == "onevision")


def test_adapters_are_measured_and_a_missing_quantizer_is_named(monkeypatch):
    row = gpu._measure_step(OPTIONS, "tiny", "lora", 2, True, "ours")
    assert row["seconds"] > 0
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(gpu.NotRun, match="bitsandbytes is not installed"):
        gpu._measure_step(OPTIONS, "tiny", "qlora", 2, True, "ours")


def test_prefill_decoding_and_streams_are_timed():
    (row,) = rows("inference")
    assert all(row[name] > 0 for name in ("prefill ms", "surprise ms", "stream ms/frame"))


def test_parts_run_in_processes_of_their_own_and_a_spent_budget_is_a_row(tmp_path, capsys):
    arguments = ["--device", "cpu", "--shapes", "tiny", "--frames", "2", "--parts", "launch"]
    gpu.main([*arguments, "--output", str(tmp_path / "gpu")])
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["case"] for row in written["rows"]] == ["fsdp2", "deepspeed_zero2"]
    assert all("needs a GPU" in row["result"] for row in written["rows"])
    assert "| tiny | fsdp2 |" in (tmp_path / "gpu.md").read_text()
    (row,) = gpu.run(Namespace(**{**vars(OPTIONS), "budget": 0.0}))
    assert row["not run"] == "the budget of 0 s is spent"


def test_a_missing_gpu_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["gpu"])
    assert stopped.value.code == 2 and "torch sees no GPU here" in capsys.readouterr().err
