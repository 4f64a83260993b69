"""Killed and resumed runs, complete and incomplete checkpoints, SIGTERM.

The plain run survives 5 kills, `pytest -m slow` 100. More: `python tests/resume_runs.py folder 1000`.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import peft
import processes
import pytest
import resume_runs
import torch
from guard_runs import losses_logged
from resume_runs import make_trainer
from tiny import tiny_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from llava_next_ar.hub.hub_code import code_files
from llava_next_ar.training import checkpoints as training_checkpoints
from llava_next_ar.training.checkpoints import checkpoint_problem, replace_model
from llava_next_ar.training.hub_trainer import HubTrainer
from llava_next_ar.training.trainer import StopOnSigterm, last_complete_checkpoint

TESTS = Path(__file__).resolve().parents[1]


# --------------------------------------------------------------------------------------------------------------- kills


def check_kills(folder: Path, number: int, seed: int) -> None:
    processes.run_python(TESTS / "resume_runs.py", folder, number, "--seed", seed, timeout=240 + 60 * number)
    results = json.loads((folder / "results.json").read_text())
    assert sum(run["killed"] for run in results["runs"]) >= number
    for case, whole in results["whole"].items():
        assert [entry["step"] for entry in whole["log"]] == [3, 6]
        assert whole["checkpoints"] == ["checkpoint-6", "checkpoint-7"]
        for run in results["runs"]:
            if run["case"] == case:
                told = (case, run["kills"], run["resumed_from"])
                assert (run["log"], run["weights"]) == (whole["log"], whole["weights"]), told
                # A kill right after the last checkpoint leaves one that would have been deleted next.
                assert set(whole["files"]) <= set(run["files"]) <= {*whole["files"], "checkpoint-4"}, told
    # Else there was nothing to survive.
    assert any(left is not None for run in results["runs"] for left in run["resumed_from"])
    kinds = {name.split()[0] for names in results["events"].values() for name in names}
    assert {"batch", "fsync", "os.rename", "os.rmdir", "save", "serialize_file"} <= kinds


def test_killed_runs_give_the_losses_and_weights_of_one_that_was_not(tmp_path):
    check_kills(tmp_path, 5, seed=1)


@pytest.mark.slow
def test_a_hundred_kills_are_survived(tmp_path):
    check_kills(tmp_path, 100, seed=2)


# ------------------------------------------------------------------------------------------------ complete and not


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run with checkpoint-2, -4 and -5."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(folder, "full", max_steps=5, save_total_limit=5, logging_steps=1)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [remove, cut])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.pt", "rng_state.pth", "progress_0.json", "trainer_state.json", "config.json"],
)
def test_a_checkpoint_that_is_not_all_there_is_passed_over(copied, damage, name, monkeypatch):
    warnings = []
    monkeypatch.setattr(training_checkpoints.logger, "warning", warnings.append)
    damage(copied / "checkpoint-5" / name)
    os.utime(copied / "checkpoint-2")  # the order of times is not that of steps
    assert last_complete_checkpoint(copied) == str(copied / "checkpoint-4")
    assert len(warnings) == 1 and "checkpoint-5" in warnings[0] and name in warnings[0]
    with pytest.raises(ValueError, match=f"cannot resume from .*checkpoint-5: .*{name}"):
        make_trainer(copied, "full").train(resume_from_checkpoint=str(copied / "checkpoint-5"))


def test_a_plain_trainers_half_written_checkpoint_is_passed_over(copied):
    for name in ("checkpoint-4", "checkpoint-5"):
        (copied / name / "checkpoint_files.json").unlink()
        (copied / name / "progress_0.json").unlink()
    assert last_complete_checkpoint(copied) == str(copied / "checkpoint-5")
    (copied / "checkpoint-5" / "trainer_state.json").unlink()  # which it writes last
    assert last_complete_checkpoint(copied) == str(copied / "checkpoint-4")


def test_resuming_without_a_complete_checkpoint_is_refused(copied, tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    for step in (2, 4, 5):
        (copied / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make_trainer(copied, "full").train(resume_from_checkpoint=True)


def test_the_limit_counts_complete_checkpoints_only(copied, monkeypatch):
    # A half-written checkpoint, newer or older, made Trainer delete a good one, or all; so did times out of order.
    shutil.copytree(copied / "checkpoint-5", copied / "checkpoint-90")
    for name in ("checkpoint-5", "checkpoint-90"):
        (copied / name / "optimizer.pt").unlink()
    os.utime(copied / "checkpoint-2")
    newest = []
    rotate = training_checkpoints._rotate

    def watched(final, *args):
        newest.append(last_complete_checkpoint(copied))
        rotate(final, *args)

    monkeypatch.setattr(training_checkpoints, "_rotate", watched)
    for max_steps, limit, left in ((6, 2, [4, 5, 6, 90]), (8, 1, [5, 8, 90])):
        trainer = make_trainer(copied, "full", max_steps=max_steps, save_total_limit=limit)
        trainer.train(resume_from_checkpoint=True)
        assert sorted(int(path.name.split("-")[1]) for path in copied.glob("checkpoint-*")) == left
    # The new one was there before any old one was deleted.
    assert newest == [str(copied / "checkpoint-6"), str(copied / "checkpoint-8")]


@pytest.mark.parametrize("case", ["full", "lora"])
def test_every_checkpoint_is_a_complete_hub_folder(tmp_path, case):
    trainer = make_trainer(tmp_path / "run", case, max_steps=1)
    if case == "lora":
        tiny_model().save_pretrained(tmp_path / "base")
        trainer.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert code_files().keys() <= {path.name for path in checkpoint.iterdir()}
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules")
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    assert processor.video_processor.num_frames == 5
    head = "autoregressive_module.change.weight"
    trained = {name.replace("base_model.model.", ""): p for name, p in trainer.model.named_parameters()}
    restored = dict(loaded.named_parameters())
    name = head if head in restored else "autoregressive_module.modules_to_save.default.change.weight"
    assert torch.equal(restored[name], trained[name])


def test_a_model_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    old, new = tiny_model(seed=0), tiny_model(seed=1, mm_newline_position="frame")
    old.save_pretrained(tmp_path / "old", max_shard_size="50KB")
    assert len(list((tmp_path / "old").glob("model-*"))) > 1
    new.save_pretrained(tmp_path / "new")
    (tmp_path / "old" / "mine.txt").write_text("stays")
    replace, count = os.replace, len([path for path in (tmp_path / "new").rglob("*") if path.is_file()])

    class Killed(BaseException):
        pass

    for survived in range(count + 1):
        folder = Path(shutil.copytree(tmp_path / "old", tmp_path / f"run-{survived}"))
        staged = Path(shutil.copytree(tmp_path / "new", folder / "_unfinished"))
        left = [survived]

        def die(source, target, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", die)
        if survived < count:
            with pytest.raises(Killed):
                replace_model(staged, folder)
            with pytest.raises(OSError, match="model.safetensors"):
                type(new).from_pretrained(folder)
        else:
            replace_model(staged, folder)
    loaded = type(new).from_pretrained(folder)
    assert loaded.config.mm_newline_position == "frame"
    assert torch.equal(loaded.get_input_embeddings().weight, new.get_input_embeddings().weight)
    assert not list(folder.glob("model-*")) and not staged.exists() and (folder / "mine.txt").exists()


@pytest.fixture
def saved(tmp_path) -> dict[str, Path]:
    """A model, and an adapter whose base is elsewhere, each beside a card of its own."""
    folders = {name: tmp_path / name for name in ("base", "model", "adapter")}
    for name in ("base", "model"):
        tiny_model(seed=len(name)).save_pretrained(folders[name])
    model = peft.get_peft_model(tiny_model(seed=4), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(folders["base"])
    model.save_pretrained(folders["adapter"])
    for name in ("model", "adapter"):
        (folders[name] / "README.md").write_text(name)
    return folders


@pytest.mark.parametrize(("old", "new"), [("adapter", "model"), ("model", "adapter")])
def test_a_model_in_the_place_of_an_adapter_is_what_loads_and_the_other_way_round(saved, tmp_path, old, new):
    folder = Path(shutil.copytree(saved[old], tmp_path / "run"))
    (folder / "mine.txt").write_text("stays")
    replace_model(shutil.copytree(saved[new], folder / "_unfinished"), folder)
    assert (folder / "README.md").read_text() == new and (folder / "mine.txt").exists()
    weights = {"model": "model.safetensors", "adapter": "adapter_model.safetensors"}
    assert (folder / weights[new]).read_bytes() == (saved[new] / weights[new]).read_bytes()
    assert not (folder / weights[old]).exists() and (folder / "adapter_config.json").exists() is (new == "adapter")
    expected, loaded = (
        AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True) for path in (saved[new], folder)
    )
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


def test_what_is_saved_without_weights_leaves_those_that_are_there(saved, tmp_path):
    # FSDP's shards stay in checkpoints; a card beside them once deleted the weights of the folder.
    folder = Path(shutil.copytree(saved["model"], tmp_path / "run"))
    staged = folder / "_unfinished"
    staged.mkdir()
    (staged / "README.md").write_text("new")
    replace_model(staged, folder)
    assert (folder / "README.md").read_text() == "new" and not staged.exists()
    assert (folder / "model.safetensors").read_bytes() == (saved["model"] / "model.safetensors").read_bytes()


def test_an_adapter_does_not_replace_its_own_base(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved["base"])
    staged = Path(shutil.copytree(saved["adapter"], saved["base"] / "_unfinished"))
    before = {path: path.read_bytes() for path in saved["base"].rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="is the base of the adapter"):
        replace_model(staged, tmp_path / "link")
    assert before == {path: path.read_bytes() for path in saved["base"].rglob("*") if path.is_file()}


def test_a_run_that_was_killed_in_its_last_save_takes_no_further_step(copied):
    # 5 steps end in the middle of an epoch, where Trainer would have made a sixth.
    before = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").unlink()
    trainer = make_trainer(copied, "full", max_steps=5, save_total_limit=5, logging_steps=1)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    assert trainer.state.global_step == 5
    assert (copied / "model.safetensors").read_bytes() == before


def test_the_mean_loss_after_a_resume_is_that_of_the_steps_since(finished, tmp_path):
    make_trainer(tmp_path, "full", max_steps=5, save_total_limit=5).train()
    for step in (4, 5):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    trainer = make_trainer(tmp_path, "full", max_steps=5)
    result = trainer.train(resume_from_checkpoint=True)
    losses = [entry["loss"] for entry in read_log(finished / "checkpoint-5")]
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(sum(losses[:3]) / 3, rel=1e-6)
    assert result.training_loss == pytest.approx(sum(losses[2:5]) / 3, rel=1e-6)


def read_log(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_the_best_checkpoint_is_named_where_it_is(tmp_path):
    trainer = make_trainer(
        tmp_path, "full", max_steps=4, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best in (str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-4"))
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    assert checkpoint_problem(best) is None


def test_only_complete_checkpoints_are_pushed(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, "full", max_steps=2)
    trainer.args.push_to_hub = True
    pushed = []
    monkeypatch.setattr(
        HubTrainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, checkpoint_problem(folder)))
    )
    trainer.train()
    assert pushed == [(str(tmp_path / "checkpoint-2"), None)]


def test_a_checkpoint_of_more_processes_starts_a_new_window(finished, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    for step in (4, 5):
        shutil.rmtree(folder / f"checkpoint-{step}")
    path = folder / "checkpoint-2" / "progress_0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "world_size": 2, "accumulation": 1}))
    warnings = []
    monkeypatch.setattr(training_checkpoints.logger, "warning", warnings.append)
    trainer = make_trainer(folder, "full", max_steps=3, logging_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert "saved by 2 processes and is resumed by 1" in warnings[0]
    third = read_log(finished / "checkpoint-5")[2]["loss"]
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(third, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- SIGTERM


class Terminate(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):  # in the middle of a step
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_at_the_end_of_the_step_and_stops(finished, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(tmp_path, "full", max_steps=5, logging_steps=1, save_strategy="no")
    trainer.add_callback(Terminate(3))
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) is handler
    stop = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StopOnSigterm))
    assert stop.stopped and trainer.state.global_step == 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    again = make_trainer(tmp_path, "full", max_steps=5, logging_steps=1)
    again.train(resume_from_checkpoint=True)
    assert losses_logged(again.state.log_history) == losses_logged(read_log(finished / "checkpoint-5"))


def break_off(*args, **kwargs):
    raise RuntimeError("broken off")


def test_sigterm_means_what_it_meant_after_an_error_too(tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(tmp_path, "full", max_steps=1, save_strategy="no")
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "training_step", break_off)
        with pytest.raises(RuntimeError, match="broken off"):
            trainer.train()
    assert signal.getsignal(signal.SIGTERM) is handler
    stop = StopOnSigterm()
    plain = Trainer(trainer.model, trainer.args, trainer.data_collator, trainer.train_dataset, callbacks=[stop])
    with monkeypatch.context() as patched:
        patched.setattr(plain, "training_step", break_off)
        with pytest.raises(RuntimeError, match="broken off"):
            plain.train()
    assert signal.getsignal(signal.SIGTERM) == stop._request  # the callback is not notified
    plain.train()  # and is not taken for the one from before
    assert signal.getsignal(signal.SIGTERM) is handler
    stop.restore()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_sigterm_works_with_a_plain_trainer(tmp_path):
    ours = make_trainer(tmp_path, "full", max_steps=4, save_strategy="no")
    trainer = Trainer(
        ours.model,
        ours.args,
        data_collator=ours.data_collator,
        train_dataset=ours.train_dataset,
        callbacks=[StopOnSigterm(), Terminate(2)],
    )
    trainer.train()
    assert get_last_checkpoint(str(tmp_path)).endswith("checkpoint-2")


def test_streams_are_read_on_where_they_were_left(tmp_path):
    """4 samples, 2 for a step: the third step is the first of the second pass."""
    seen: list[list[int]] = []

    class Spy(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            seen.append([])

    def run(folder: Path, **options) -> None:
        trainer = make_trainer(folder, "stream", logging_steps=1, **options)
        trainer.add_callback(Spy())
        step = trainer.training_step
        trainer.training_step = lambda model, inputs, *args: (
            seen[-1].append(int(inputs["input_ids"].sum())) or step(model, inputs, *args)
        )
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))

    run(tmp_path / "whole")
    run(tmp_path / "parts", max_steps=4)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-2")
    run(tmp_path / "parts")
    assert seen[0] == seen[1] + seen[2] and len(seen[0]) == 2 * resume_runs.STEPS
