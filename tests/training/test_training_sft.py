"""TRL's SFTTrainer: what it trains by itself, and both losses with `AutoregressiveSFTTrainer`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from tiny_processor import tiny_processor
from training_runs import KeepGradients, difference, make_samples, one_step
from transformers import AutoModelForImageTextToText, TrainingArguments

from llava_next_ar.modeling import modeling_llava_next_ar, video_language_model
from llava_next_ar.training.guards import StepGuard
from llava_next_ar.training.mixture import LlavaVideoMixture
from llava_next_ar.training.trainer import AutoregressiveTrainer, LlavaVideoCollator, LlavaVideoDataset

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install trl)")
from llava_next_ar.training import sft as training_sft  # noqa: E402

SPLITS = ((8, 1), (4, 2), (2, 4))  # batch size x accumulation of a step of eight samples
OPTIONS = {"max_steps": 1, "max_grad_norm": 0, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
OPTIONS |= {"use_cpu": True, "disable_tqdm": True}


def model_with_a_moving_head():
    model = tiny_model(head={"loss_weight": 1.0})
    change = model.autoregressive_module.change
    change.weight.data = torch.randn(change.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    return model


def config(folder: Path, batch_size: int = 8, accumulation: int = 1, **more: Any) -> Any:
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    return trl.SFTConfig(folder, bf16=False, activation_checkpointing=True, **{**OPTIONS, **sizes, **more})


def make_trainer(model: Any, args: Any, **more: Any) -> Any:
    samples = make_samples(model.config)
    return training_sft.AutoregressiveSFTTrainer(
        model,
        args,
        samples,
        eval_dataset=samples,
        data_collator=LlavaVideoCollator(0),
        processing_class=tiny_processor(model.config),
        **more,
    )


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """Warnings of the model, in a list that grows."""
    seen: list[str] = []
    for module in (modeling_llava_next_ar, video_language_model):
        monkeypatch.setattr(module.logger, "warning_once", seen.append)
    return seen


def test_gradients_are_those_of_the_autoregressive_trainer_however_a_step_is_split(tmp_path, warnings):
    reference = one_step("both", 8, 1)
    for split in SPLITS:
        keep = KeepGradients()
        trainer = make_trainer(model_with_a_moving_head(), config(tmp_path, *split), callbacks=[keep])
        trainer.train()
        worst = difference(reference["gradients"], keep.gradients)
        print(f"AutoregressiveSFTTrainer {split[0]} x {split[1]}: {worst:.1e}")
        assert worst < 1e-5
        log = trainer.state.log_history[0]
        for name in ("loss", "main_loss", "autoregressive_loss", "skill"):
            assert log[name] == pytest.approx(reference["log"][name], rel=1e-5)
    assert not warnings


def test_sft_trainer_alone_trains_the_language_model_exactly_and_no_head(tmp_path, warnings):
    reference = one_step("main", 8, 1)["gradients"]
    for split in SPLITS:
        keep = KeepGradients()
        model = model_with_a_moving_head()
        args = config(tmp_path, *split, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = trl.SFTTrainer(
            model,
            args,
            train_dataset=training_sft._as_hf_dataset(make_samples(model.config)),
            data_collator=lambda rows: LlavaVideoCollator(0)([row["sample"] for row in rows]),
            processing_class=tiny_processor(model.config),
            callbacks=[keep],
        )
        trainer.train()
        assert not any("autoregressive_module" in name for name in keep.gradients)
        assert "its reconstruction head does not train" in warnings[-1]
        assert difference(reference, keep.gradients) < 1e-5  # there the head's are zero


def test_evaluation_and_checkpoints_are_those_of_the_autoregressive_trainer(tmp_path):
    model = model_with_a_moving_head()
    samples = make_samples(model.config)
    plain = AutoregressiveTrainer(
        model,
        TrainingArguments(tmp_path / "plain", **OPTIONS, per_device_eval_batch_size=3),
        samples,
        eval_dataset=samples,
        data_collator=LlavaVideoCollator(0),
    ).evaluate()
    args = config(tmp_path / "sft", per_device_eval_batch_size=3, save_strategy="steps", save_steps=1)
    trainer = make_trainer(model_with_a_moving_head(), args)
    metrics = trainer.evaluate()
    for name in ("eval_loss", "eval_main_loss", "eval_autoregressive_loss", "eval_skill"):
        assert metrics[name] == pytest.approx(plain[name], rel=1e-5)
    trainer.train()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "sft" / "checkpoint-1", trust_remote_code=True)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in trainer.model.state_dict().items())


def test_names_mixtures_and_lengths_are_those_of_the_real_data_sets(tmp_path, monkeypatch):
    """The indices that TRL is given instead have no names, know no epochs and are all equally long."""
    seen: list[list[list[str | None]]] = []
    begin = StepGuard.begin

    def spy(self, batches):
        num_samples = begin(self, batches)
        seen[-1] += self._names
        return num_samples

    monkeypatch.setattr(StepGuard, "begin", spy)
    processor = tiny_processor(tiny_model().config)
    texts = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * i}]}
        for i in range(1, 11)
    ]
    options = {
        **OPTIONS,
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "group_by_length",
    }
    plain, sft = TrainingArguments(tmp_path, **options), config(tmp_path, 2, **options)
    for trainer_class, args in ((AutoregressiveTrainer, plain), (training_sft.AutoregressiveSFTTrainer, sft)):
        seen.append([])
        parts = [LlavaVideoDataset(texts[start::2], processor) for start in range(2)]
        data = LlavaVideoMixture(parts, [1.0, 0.6])
        trainer_class(tiny_model(), args, data).train()
    assert seen[0] == seen[1] and len(seen[0]) == 8
    epochs = [sorted(sum(half, [])) for half in (seen[0][:4], seen[0][4:])]
    assert epochs[0] != epochs[1] and all(name.startswith("sample ") for name in epochs[0])


def test_adapters_of_trl_train_the_head_too(tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(
        r=2, target_modules=r".*language_model.*(q_proj|v_proj)", modules_to_save=["autoregressive_module"]
    )
    keep = KeepGradients()
    trainer = make_trainer(model_with_a_moving_head(), config(tmp_path), peft_config=lora, callbacks=[keep])
    trainer.train()
    assert trainer.state.log_history[0]["autoregressive_loss"] > 0
    parts = {part for name in keep.gradients for part in ("lora_B", "modules_to_save.default.change") if part in name}
    assert parts == {"lora_B", "modules_to_save.default.change"}


def test_what_would_replace_the_losses_is_refused(tmp_path, monkeypatch):
    model = tiny_model()
    with pytest.raises(ValueError, match="loss_type='dft'"):
        make_trainer(model, config(tmp_path, loss_type="dft"))
    with pytest.raises(ValueError, match="must be a trl.SFTConfig, got TrainingArguments"):
        make_trainer(model, TrainingArguments(tmp_path, **OPTIONS))
    monkeypatch.setattr(training_sft, "datasets", None)
    with pytest.raises(ImportError, match="pip install trl"):
        make_trainer(model, config(tmp_path))
