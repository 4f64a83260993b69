"""PEFT: merged adapters and the teacher, trainable tokens, a head that does not train, saves of adapters alone."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, video_batch
from tiny_processor import tiny_processor
from training_runs import make_samples
from transformers import TrainingArguments

from llava_next_ar.hub.model_card import RECIPE, build_card
from llava_next_ar.hub.pushed_model import _replacing_weights
from llava_next_ar.training.collator import LlavaVideoCollator
from llava_next_ar.training.merge import merge_adapters, merge_checkpoint
from llava_next_ar.training.trainer import HEAD, AutoregressiveTrainer

TOWER = r".*vision_tower\.encoder\..*\.(q_proj|v_proj|fc1)"


def adapted(targets: str = rf"{TOWER}|.*language_model\..*\.(q_proj|v_proj)", **options):
    """A model with random adapters on the tower and the language model, in eval mode."""
    model = tiny_model(head={"loss_weight": 1.0})
    torch.manual_seed(3)
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.1)
    options = {"modules_to_save": [HEAD, "multi_modal_projector"], "init_lora_weights": False, **options}
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, **options)).eval()


@pytest.mark.parametrize("modules_to_save", [[HEAD, "multi_modal_projector"], None])
def test_merging_adapters_on_the_tower_keeps_the_teacher(modules_to_save):
    model = adapted(modules_to_save=modules_to_save)
    batch = video_batch(model.get_base_model().config, [[4], [3, 2]])
    with torch.no_grad():
        before = model(**batch)
        naive = copy.deepcopy(model).merge_and_unload()(**batch)
        merged = merge_adapters(model)
        after = merged(**batch)
    assert not torch.isclose(naive.autoregressive_loss, before.autoregressive_loss, rtol=1e-3)  # the fault itself
    torch.testing.assert_close(after.autoregressive_loss, before.autoregressive_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.main_loss, before.main_loss, rtol=1e-5, atol=1e-6)
    head = merged.autoregressive_module
    assert merged.config.autoregressive_config.separate_teacher and head.config.separate_teacher
    plain = tiny_model().model.vision_tower.state_dict()
    kept = head.teacher.state_dict()
    assert kept.keys() == plain.keys() and all(torch.equal(kept[name], plain[name]) for name in plain)
    assert not any(parameter.requires_grad for parameter in head.teacher.parameters())
    # A save holds it, under names that a reload finds.
    assert {f"{HEAD}.teacher.{name}" for name in plain} <= merged.state_dict().keys()


def test_a_merge_by_hand_needs_one_call_and_not_before_it_is_too_late():
    model = adapted()
    batch = video_batch(model.get_base_model().config, [[4]])
    with torch.no_grad():
        before = model(**batch).autoregressive_loss
        model.merge_adapter()
        with pytest.raises(RuntimeError, match="unmerge_adapter"):
            model.get_base_model().keep_teacher()
        model.unmerge_adapter()
        model.get_base_model().keep_teacher()
        after = model.merge_and_unload()(**batch).autoregressive_loss
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


def test_a_merge_without_adapters_on_the_tower_makes_no_copy():
    merged = merge_adapters(adapted(r".*language_model\..*\.q_proj"))
    assert merged.autoregressive_module.teacher is None
    assert not merged.config.autoregressive_config.separate_teacher


@pytest.mark.parametrize("name", ["run", "run/checkpoint-5"])
def test_the_card_of_a_merged_model_keeps_the_recipe(tmp_path, name):
    base, adapter = tmp_path / "base", tmp_path / name
    tiny_model().save_pretrained(base)
    processor = tiny_processor(tiny_model().config)
    model = adapted(r".*language_model\..*\.q_proj")
    model.save_pretrained(adapter)
    processor.save_pretrained(adapter)
    recipe = "model: ann/base\ntrainable: lora\nlearning_rate: 0.00017\nautoregressive_config.loss_weight: 0.1\n"
    (tmp_path / "run" / RECIPE).write_text(recipe)
    merged = merge_checkpoint(str(adapter), tmp_path / "merged", base=str(base))
    for text in ((merged / "README.md").read_text(), str(build_card(merged, "ann/merged"))):
        assert "learning_rate: 0.00017" in text and "base_model: ann/base" in text
        assert "adapters on the language model, projector, head" in text


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("skip_logits", [True, False])
def test_trainable_tokens_train_with_tied_embeddings_too(tied, skip_logits):
    base = tiny_model(tie_word_embeddings=tied)
    base.config.text_config.tie_word_embeddings = tied
    if tied:
        base.tie_weights()
    lora = LoraConfig(r=2, target_modules=r".*language_model\..*\.q_proj", trainable_token_indices=[3, 5])
    model = get_peft_model(base, lora).train()
    batch = video_batch(base.config, [[3]])
    batch["input_ids"][0, 0] = 3
    loss = model(**batch, skip_logits=skip_logits).main_loss
    loss.backward()
    deltas = {n: p.grad for n, p in model.named_parameters() if "trainable_tokens_delta" in n and p.grad is not None}
    assert deltas and any(grad.any() for grad in deltas.values())
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, skip_logits=not skip_logits).main_loss, loss.detach())


def trainer_for(model, folder, **options) -> AutoregressiveTrainer:
    args = TrainingArguments(folder, report_to="none", use_cpu=True, max_steps=1, save_strategy="no")
    samples = make_samples(model.get_base_model().config)
    return AutoregressiveTrainer(model, args, samples, data_collator=LlavaVideoCollator(0), **options)


def test_a_new_head_that_is_frozen_is_refused_and_a_trained_one_is_named(tmp_path, caplog):
    lora = LoraConfig(r=2, target_modules=r".*language_model\..*\.q_proj")
    with pytest.raises(ValueError, match="new and frozen.*'autoregressive_module' in modules_to_save"):
        trainer_for(get_peft_model(tiny_model(), lora), tmp_path)
    trainer_for(get_peft_model(tiny_model(), lora), tmp_path, enable_autoregressive=False)
    saved = LoraConfig(r=2, target_modules=lora.target_modules, modules_to_save=[HEAD])
    trainer_for(get_peft_model(tiny_model(), saved), tmp_path)
    trained = tiny_model()
    torch.nn.init.normal_(trained.autoregressive_module.change.weight)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").addHandler(caplog.handler)
        trainer_for(get_peft_model(trained, lora), tmp_path)
        logging.getLogger("transformers").removeHandler(caplog.handler)
        logging.getLogger("llava_next_ar").removeHandler(caplog.handler)
    assert "is frozen: its loss trains the language model alone" in caplog.text


def test_only_a_save_of_model_weights_warns_of_an_adapter_in_the_folder(tmp_path, caplog):
    def save(name: str) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING), _replacing_weights(tmp_path):
            (tmp_path / "adapter_config.json").write_text("{}")
            (tmp_path / name).write_bytes(b"weights of " + name.encode())
        return caplog.text

    logger = logging.getLogger("llava_next_ar.hub.pushed_model")
    logger.addHandler(caplog.handler)
    try:
        assert "delete adapter_config.json" not in save("adapter_model.safetensors")
        assert "delete adapter_config.json" in save("model.safetensors")
        assert "delete adapter_config.json" not in save("adapter_model.safetensors")
    finally:
        logger.removeHandler(caplog.handler)
