"""State of a training belongs to one run: a second one, a smaller batch or a trial of a search starts afresh."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.memory import release_memory
from guard_runs import Stream, losses_logged
from tiny import tiny_model
from training_runs import make_samples
from transformers import TrainerCallback, TrainingArguments

from llava_next_ar.training.mixture import FollowEpoch
from llava_next_ar.training.trainer import AutoregressiveTrainer, LlavaVideoCollator

FRAMES = ([2], [], [4, 3], [5])


def make_trainer(folder: Path, *, model: Any = None, dataset: Any = None, **options: Any) -> AutoregressiveTrainer:
    of_trainer = {name: options.pop(name) for name in ("model_init", "enable_autoregressive", "eval_dataset", "callbacks")
                  if name in options}  # fmt: skip
    if model is None and "model_init" not in of_trainer:
        model = tiny_model(head={"loss_weight": 0.5})
    defaults = {"max_steps": 4, "logging_steps": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    defaults |= {"disable_tqdm": True, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "weight_decay": 0.1}
    return AutoregressiveTrainer(
        model,
        TrainingArguments(str(folder), **{**defaults, **options}),
        make_samples(tiny_model().config, FRAMES) if dataset is None else dataset,
        data_collator=LlavaVideoCollator(0),
        **of_trainer,
    )


def num_followers(trainer: AutoregressiveTrainer) -> int:
    return sum(isinstance(callback, FollowEpoch) for callback in trainer.callback_handler.callbacks)


def check_log(trainer: AutoregressiveTrainer) -> None:
    """Checks that the logged components sum to the loss: all steps of this run, and no others."""
    log = losses_logged(trainer.state.log_history)
    assert [entry["step"] for entry in log] == [2, 4]
    for entry in log:
        assert entry["total_loss"] == pytest.approx(entry["loss"], rel=1e-6)
        assert entry["total_loss"] == pytest.approx(entry["main_loss"] + 0.5 * entry["autoregressive_loss"], rel=1e-6)


@pytest.mark.parametrize("error", [RuntimeError("broken off"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_the_log_after_a_run_that_broke_off_is_of_its_own_steps(tmp_path, error):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2)
    step, calls = trainer.training_step, []

    def broken(*args):
        calls.append(None)
        if len(calls) == 4:  # the second batch of the second step, whose first one is in the sums already
            raise error
        return step(*args)

    trainer.training_step = broken
    with pytest.raises(type(error)):
        trainer.train()
    assert not trainer.is_in_train
    trainer.training_step = step
    for _ in range(2):
        trainer.train()
        check_log(trainer)
    assert num_followers(trainer) == 1


def test_smaller_batches_after_one_that_ran_out_of_memory_start_afresh(tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=4, auto_find_batch_size=True)
    step, sizes = trainer.training_step, []

    def hungry(model, inputs, *args):
        sizes.append(len(inputs["input_ids"]))
        loss = step(model, inputs, *args)
        if sizes[-1] > 1:
            raise RuntimeError("CUDA out of memory.")
        return loss

    trainer.training_step = hungry
    trainer.train()
    assert sizes[0] == 4 and sizes[-4:] == [1] * 4 and len(sizes) > 5
    check_log(trainer)
    assert num_followers(trainer) == 1


def test_a_second_trial_of_a_search_trains_a_model_of_its_own(tmp_path):
    """Between two trials, transformers takes the model away."""
    models = []

    def model_init():
        models.append(tiny_model(head={"loss_weight": 0.5}, freeze_tower=False))
        return models[-1]

    trainer = make_trainer(tmp_path, model_init=model_init)
    logs = []
    for _ in range(2):
        trainer.train()
        check_log(trainer)
        logs.append(losses_logged(trainer.state.log_history))
        trainer.model_wrapped, trainer.model = release_memory(trainer.model_wrapped, trainer.model)
        trainer.accelerator.clear()
    assert logs[0] == logs[1] and num_followers(trainer) == 1
    # A tower that trains has a frozen copy as its teacher, made before the first step.
    assert all(model.autoregressive_module.teacher is not None for model in models[-2:])


def test_hyperparameter_search_runs_to_its_end(tmp_path):
    pytest.importorskip("optuna")
    trainer = make_trainer(
        tmp_path,
        model_init=lambda: tiny_model(head={"loss_weight": 0.5}),
        eval_dataset=make_samples(tiny_model().config, FRAMES),
        max_steps=2,
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}, n_trials=3
    )
    assert best.objective > 0


@pytest.mark.parametrize("num_runs", [1, 2])
def test_a_head_that_is_not_to_train_does_not_whoever_makes_the_model(tmp_path, num_runs):
    before = copy.deepcopy(tiny_model().autoregressive_module.state_dict())
    trainer = make_trainer(tmp_path, model_init=lambda: tiny_model(), enable_autoregressive=False)
    for _ in range(num_runs):
        trainer.train()
    head = trainer.model.autoregressive_module
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    trained = trainer.model.lm_head.weight
    assert not torch.equal(trained, tiny_model().lm_head.weight)


def test_a_loader_that_is_made_during_training_leaves_the_epoch_alone(tmp_path):
    """The data set may choose its samples by the epoch, and hears of it from each sampler."""

    class Watched(list):
        epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.get_train_dataloader()
            seen.append((state.global_step, dataset.epochs[-1]))

    seen: list[tuple[int, int]] = []
    dataset = Watched(make_samples(tiny_model().config, FRAMES))
    trainer = make_trainer(tmp_path, dataset=dataset, max_steps=8, callbacks=[Look()])
    trainer.train()
    assert seen == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1), (7, 1), (8, 2)]
    assert num_followers(trainer) == 1


# ---------------------------------------------------------------------------------------------------------- evaluation


class Evaluating(TrainerCallback):
    """Evaluates in the middle of each step."""

    trainer: AutoregressiveTrainer

    def on_substep_end(self, args, state, control, **kwargs):
        self.trainer.evaluate()


def test_an_evaluation_within_a_step_leaves_the_step_alone(tmp_path):
    results = []
    for callbacks in ([], [Evaluating()]):
        trainer = make_trainer(
            tmp_path,
            max_steps=2,
            logging_steps=1,
            gradient_accumulation_steps=2,
            eval_dataset=make_samples(tiny_model().config, ([7, 2, 3, 2],)),
            callbacks=callbacks,
        )
        Evaluating.trainer = trainer
        trainer.train()
        results.append((losses_logged(trainer.state.log_history), trainer.model.state_dict()))
        assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2 * len(callbacks)
    (log, weights), (other_log, other_weights) = results
    assert log == other_log
    assert all(torch.equal(weights[name], value) for name, value in other_weights.items())


def means(metrics: dict[str, float]) -> dict[str, float]:
    names = ("loss", "main_loss", "autoregressive_loss", "skill")
    return {name: next(value for key, value in metrics.items() if key.endswith(f"_{name}")) for name in names}


def test_a_stream_is_evaluated_however_it_is_given(tmp_path):
    """accelerate would cut the batches of a stream into rows, and a batch of videos has none."""
    model = tiny_model(head={"loss_weight": 0.5})
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.05)
    samples = make_samples(model.config, FRAMES)
    options = {"model": model, "per_device_eval_batch_size": 3}
    expected = make_trainer(tmp_path, **options, eval_dataset=samples).evaluate()
    given = [
        make_trainer(tmp_path, **options, eval_dataset=Stream(samples)).evaluate(),
        make_trainer(tmp_path, **options, eval_dataset={"a": Stream(samples), "b": samples}).evaluate(),
        make_trainer(tmp_path, **options).evaluate(Stream(samples)),
        make_trainer(tmp_path, **options).evaluate({"a": Stream(samples)}),
        make_trainer(tmp_path, **options, prediction_loss_only=True).predict(Stream(samples)).metrics,
    ]
    for metrics in given:
        assert means(metrics) == pytest.approx(means(expected), rel=1e-5)
    assert {"eval_a_loss", "eval_b_loss"} <= given[1].keys()
    with pytest.raises(ValueError, match="dispatch_batches=True would cut batches into rows"):
        make_trainer(tmp_path, accelerator_config={"dispatch_batches": True})


# ------------------------------------------------------------------------------------------------------------ resuming


def test_a_checkpoint_without_the_state_of_the_optimizer_is_not_resumed_from(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, save_only_model=True)
    trainer.train()
    for resume in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(
            ValueError, match="state of the optimizer and scheduler .save_only_model.*pass it as the model"
        ):
            make_trainer(tmp_path).train(resume_from_checkpoint=resume)
    folder = tmp_path / "other"
    make_trainer(folder, save_strategy="steps", save_steps=2).train()
    (folder / "checkpoint-4" / "scheduler.pt").unlink()
    (folder / "checkpoint-4" / "checkpoint_files.json").unlink()  # as a plain Trainer leaves it
    with pytest.raises(ValueError, match="without the state of the scheduler "):
        make_trainer(folder).train(resume_from_checkpoint=True)


def test_steps_with_another_number_of_samples_are_not_gone_on_with(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2, "max_steps": 4}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    resumed = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    with pytest.raises(
        ValueError, match=r"had 2 samples \(2 per device x 1 accumulated x 1 processes\), these would have 1"
    ):
        make_trainer(tmp_path, **{**options, "per_device_train_batch_size": 1}).train(**resumed)
    with pytest.raises(ValueError, match="Set gradient_accumulation_steps to 1"):
        make_trainer(tmp_path, **options, gradient_accumulation_steps=3).train(**resumed)
    # The same samples in another split: the same training.
    split = {**options, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    other = make_trainer(tmp_path, **split)
    other.train(**resumed)
    assert [entry["step"] for entry in losses_logged(other.state.log_history)] == [2, 4]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_checkpoints_of_another_run_are_neither_resumed_from_nor_deleted(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    make_trainer(tmp_path, **options, max_steps=6).train()
    make_trainer(tmp_path, **options, max_steps=3).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 3, 5, 6)]
    runs = {n: json.loads((tmp_path / f"checkpoint-{n}" / "progress_0.json").read_text())["run"] for n in (2, 3, 5, 6)}
    assert runs[2] == runs[3] != runs[5] == runs[6]
    trainer = make_trainer(tmp_path, **options, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and (tmp_path / "checkpoint-3").is_dir()
    assert json.loads((tmp_path / "checkpoint-4" / "progress_0.json").read_text())["run"] == runs[2]
