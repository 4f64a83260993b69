"""Steps that would spoil the weights, names of samples, the share of the objective, and where the log goes."""

import importlib.util
import json
import math

import pytest
import torch
from guard_runs import named_samples, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_model
from tiny_processor import tiny_processor
from training_runs import make_samples
from transformers import Trainer, TrainingArguments
from video_clips import write_clip

from llava_next_ar.training import recipes
from llava_next_ar.training import trainer as training_llava_next_ar
from llava_next_ar.training.guards import ShareWatch, StepGuard
from llava_next_ar.training.trainer import (
    AutoregressiveTrainer,
    BadStepPolicy,
    LlavaVideoCollator,
    LlavaVideoDataset,
)


@pytest.fixture(scope="module")
def spoiled() -> list[dict]:
    """Two of each make a step; sample 5 spoils the third one."""
    return named_samples(tiny_model().config, 8, bad=5)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        same(value, other[name]) if isinstance(value, dict) else torch.equal(value, other[name])
        for name, value in one.items()
    )


# ------------------------------------------------------------------------------------------------------------ bad steps


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_that_is_not_finite_stops_training_and_names_its_samples(spoiled, max_grad_norm):
    stopped = train(spoiled, 4, max_grad_norm=max_grad_norm)
    before = train(spoiled, 2, max_grad_norm=max_grad_norm)
    assert same(stopped["weights"], before["weights"]) and same(stopped["optimizer"], before["optimizer"])
    assert [entry["loss"] for entry in stopped["log"]] == [entry["loss"] for entry in before["log"]]
    error = stopped["error"]
    assert error["step"] == 3 and "step 3: the gradient norm is nan" in error["message"]
    assert "batch 1 of rank 0 (loss nan): clip 5." in error["message"] and "clip 4" not in error["message"]
    (line,) = stopped["ledger"]
    assert (line["step"], line["grad_norm"], line["action"]) == (3, "nan", "stop")
    assert [batch["samples"] for batch in line["batches"]] == [["clip 4"], ["clip 5"]]
    assert math.isfinite(line["batches"][0]["loss"]) and line["batches"][1]["loss"] == "nan"
    assert error["batches"] == line["batches"]


def test_a_skipped_step_leaves_no_trace_but_in_the_log(spoiled):
    skipped = train(spoiled, 4, BadStepPolicy("skip"))
    absent = train(spoiled[:4] + spoiled[6:], 3)
    assert same(skipped["weights"], absent["weights"]) and same(skipped["optimizer"], absent["optimizer"])
    names = ("loss", "main_loss", "autoregressive_loss", "total_loss", "autoregressive_share", "grad_norm")
    for name in names:
        assert [entry.get(name) for entry in skipped["log"]] == [entry.get(name) for entry in absent["log"]], name
    assert [entry["step"] for entry in skipped["log"]] == [1, 2, 4]
    assert [entry.get("skipped_steps") for entry in skipped["log"]] == [None, None, 1]
    assert skipped["result"]["train_loss"] == pytest.approx(absent["result"]["train_loss"], rel=1e-6)
    (line,) = skipped["ledger"]
    assert line["action"] == "skip" and line["batches"][1]["samples"] == ["clip 5"]


def test_the_log_of_a_window_is_of_the_steps_that_were_made(spoiled):
    single = train(spoiled, 4, BadStepPolicy("skip"))["log"]
    (_, window) = train(spoiled, 4, BadStepPolicy("skip"), logging_steps=2)["log"]
    # Steps 3 and 4, of which 3 was not made: its loss does not count as a 0 in a mean of two.
    for name in ("loss", "total_loss", "main_loss"):
        assert window[name] == pytest.approx(single[2][name], rel=1e-6)


def test_without_the_filter_of_trainer_nothing_changes(spoiled):
    one, other = (train(spoiled, 4, BadStepPolicy("skip"), logging_nan_inf_filter=value) for value in (True, False))
    assert same(one["weights"], other["weights"]) and one["log"] == other["log"]


def test_skipping_has_bounds(spoiled):
    bad = spoiled[4:6]
    in_a_row = train(spoiled[:4] + bad * 4, 6, BadStepPolicy("skip", max_consecutive_skips=2))
    assert in_a_row["error"]["step"] == 5 and "the 2 steps before were skipped" in in_a_row["error"]["message"]
    assert [line["action"] for line in in_a_row["ledger"]] == ["skip", "skip", "stop"]
    scattered = bad + spoiled[:2] + bad + spoiled[2:4] + bad
    in_all = train(scattered, 5, BadStepPolicy("skip", max_skipped_steps=2))
    assert in_all["error"]["step"] == 5 and "2 steps were skipped before" in in_all["error"]["message"]


def test_an_exploding_gradient_is_a_bad_step():
    class Exploding(AutoregressiveTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * 1e4 if self.state.global_step == 21 else loss

    samples = named_samples(tiny_model().config, 1) * 46
    policy = BadStepPolicy("skip", explosion_factor=50)
    exploded = train(samples, 23, policy, Exploding)
    (line,) = exploded["ledger"]
    assert line["step"] == 22 and "times the usual" in line["problem"] and line["grad_norm"] > 50
    assert same(exploded["weights"], train(samples[:44], 22)["weights"])


def test_an_infinite_gradient_of_float16_is_not_judged_but_an_infinite_loss_is(tmp_path):
    guard = StepGuard(BadStepPolicy(explosion_factor=10), str(tmp_path))
    for _ in range(20):
        assert guard.judge(norm=1.0, loss=2.0) is None
    assert guard.judge(norm=math.inf, loss=2.0) is None
    assert guard.judge(norm=1.0, loss=math.nan) == "the loss is nan"
    assert "11 times the usual 1" in guard.judge(norm=11.0, loss=2.0)
    by_default = StepGuard(BadStepPolicy(), str(tmp_path))
    assert [by_default.judge(norm) for norm in (*[1.0] * 20, 1e30)] == [None] * 21


def test_what_was_skipped_and_is_usual_survives_a_resume(tmp_path):
    guard, other = (StepGuard(BadStepPolicy("skip", explosion_factor=10), str(tmp_path)) for _ in range(2))
    for norm in (1.0, 2.0, 3.0) * 7:
        guard.judge(norm)
    guard.skipped = 3
    other.load_state(json.loads(json.dumps(guard.state())))
    assert other.skipped == 3 and other.judge(19.0) is None and other.judge(21.0) == guard.judge(21.0) is not None


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"action": "ignore"}, "'ignore'"),
        ({"max_skipped_steps": 0}, "max_skipped_steps must be at least 1, got 0"),
        ({"max_consecutive_skips": 0}, "max_consecutive_skips must be at least 1, got 0"),
        ({"explosion_factor": 1.0}, "explosion_factor must be over 1, got 1.0"),
        ({"explosion_window": 5}, "at least 20, got 5"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(options, cause):
    with pytest.raises(ValueError, match=cause):
        BadStepPolicy(**options)


def test_names_reach_the_trainer_from_workers_but_no_model(tmp_path):
    write_clip(tmp_path / "a.mp4", 3, width=64, height=48)
    processor = tiny_processor(tiny_model().config, num_frames=2)
    dataset = LlavaVideoDataset([{"video": "a.mp4", "id": 7}, {"video": "a.mp4"}], processor, video_root=tmp_path)
    options = {"use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2, "dataloader_num_workers": 1}
    args = TrainingArguments(str(tmp_path / "run"), train_sampling_strategy="sequential", **options)
    trainer = AutoregressiveTrainer(tiny_model(), args, dataset, eval_dataset=dataset)
    (batch,) = trainer.get_train_dataloader()
    assert batch.pop("sample_names") == [
        "sample 0 (id 7) of the list of samples [a.mp4]",
        "sample 1 of the list of samples [a.mp4]",
    ]
    plain = Trainer(tiny_model(), args, data_collator=LlavaVideoCollator(processor), train_dataset=dataset)
    for loader in (trainer.get_eval_dataloader(), plain.get_train_dataloader()):
        (other,) = loader
        assert other.keys() == batch.keys()


def test_a_recipe_sets_the_policy():
    common = ["--model", "m", "--train_data", "d", "--output_dir", "o"]
    *_, guards, _, _, _ = recipes.parse_arguments([*common, "--bad_step_action", "skip", "--explosion_factor", "30"])
    assert guards.bad_step_policy() == BadStepPolicy("skip", explosion_factor=30.0)
    *_, guards, _, _, _ = recipes.parse_arguments(common)
    assert guards.bad_step_policy() == BadStepPolicy() and guards.save_on_sigterm
    with pytest.raises(ValueError, match="'sometimes'"):
        recipes.parse_arguments([*common, "--bad_step_action", "sometimes"])
    with pytest.raises(ValueError, match="enable_jit_checkpoint"):
        recipes.parse_arguments([*common, "--enable_jit_checkpoint", "true"])


# ---------------------------------------------------------------------------------------------------------------- share


def test_a_share_out_of_the_band_is_reported_once_with_a_remedy():
    watch = ShareWatch(window=3)
    main, auxiliary = 1.0, 9.0
    said = [watch.add(main, main + auxiliary) for _ in range(8)]
    assert [text is not None for text in said] == [False, False, True, False, False, False, False, False]
    assert (
        "90.0% of the total loss over the last 3 log entries; 5% to 15% are recommended: lower loss_weight" in said[2]
    )
    factor = float(said[2].split("to ")[2].split()[0])
    assert factor * auxiliary / (main + factor * auxiliary) == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([(99.0, 100.0)] * 3, "raise loss_weight, to 11 times what it is"),
        ([(80.0, 100.0), (99.0, 100.0), (99.0, 100.0)], None),  # 7% on the whole
        ([(5.0, 5.0)] * 3, "Is loss_weight 0, or has no video two frames?"),
        ([(0.0, 5.0)] * 3, None),  # videos without text
    ],
)
def test_the_share_is_that_of_the_window(losses, expected):
    watch = ShareWatch(window=3)
    last = [watch.add(*pair) for pair in losses][-1]
    assert last is None if expected is None else expected in last


def test_the_recommended_share_can_be_set():
    assert ShareWatch(window=1, recommended=(0.0, 1.0)).add(1.0, 10.0) is None
    assert "10.0% of the total" in ShareWatch(window=1, recommended=(0.2, 0.9)).add(90.0, 100.0)
    for wrong in ((0.5,), (0.5, 0.2), (-0.1, 0.5), (0.5, 1.5)):
        with pytest.raises(ValueError, match="expected two rising numbers from 0 to 1"):
            ShareWatch(recommended=wrong)


# -------------------------------------------------------------------------------------------------------------- reports


def test_tensorboard_holds_what_was_logged_and_the_share_is_warned_of(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(training_llava_next_ar.logger, "warning", warnings.append)
    model = tiny_model(head={"loss_weight": 50.0})
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.05)
    args = TrainingArguments(
        str(tmp_path),
        max_steps=22,
        logging_steps=1,
        report_to="tensorboard",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=1,
    )
    samples = make_samples(model.config, ([2], [3]))
    trainer = AutoregressiveTrainer(model, args, samples, data_collator=LlavaVideoCollator(0))
    trainer.train()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 22
    for name in ("main_loss", "autoregressive_loss", "total_loss", "skill", "autoregressive_share", "loss"):
        logged = {entry["step"]: entry[name] for entry in log}
        scalars = {scalar.step: scalar.value for scalar in read.Scalars(f"train/{name}")}
        assert scalars == pytest.approx(logged, rel=1e-6), name
    assert len({entry["skill"] for entry in log}) > 10  # no constant
    assert len(warnings) == 1 and "lower loss_weight" in warnings[0]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_recipe_names_the_tracker_and_a_missing_package_is_named(package, tmp_path):
    common = ["--model", "m", "--train_data", "d", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    _, _, _, args, _, _ = recipes.parse_arguments([*common, "--report_to", package])
    assert args.report_to == [package]
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(RuntimeError, match=f"pip install {package}"):
        AutoregressiveTrainer(tiny_model(), args, make_samples(tiny_model().config))
