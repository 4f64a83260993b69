"""The example of a custom predictor and loss has all properties of the head, in training and after a reload.

It is used as a reader uses it: written into the folder of a checkpoint, loaded as remote code.
"""

import re

import pytest
import torch
from documents import code_blocks
from elsewhere import run_elsewhere
from tiny import LAYOUTS, collate, make_sample, tiny_config, tiny_model, train_briefly, video_batch
from transformers import AutoModelForImageTextToText, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from llava_next_ar.hub.hub_code import code_files
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration, logger
from llava_next_ar.training.trainer import AutoregressiveTrainer

(EXAMPLE,) = [block for block in code_blocks("docs/extend.md", "python") if re.match(r"# \S+\.py\n", block)]
FRAMES = [[6], [4, 5]]


@pytest.fixture(scope="module")
def model_class(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extending") / "my-model"
    tiny_model().config.save_pretrained(folder)  # with it comes all code
    (folder / "my_head.py").write_text(EXAMPLE)
    return get_class_from_dynamic_module("my_head.MyModel", str(folder))


def build(model_class, seed: int = 0, **keys):
    torch.manual_seed(seed)
    model = model_class(tiny_config(**keys)).eval()
    model.model.vision_tower.requires_grad_(False)
    return model


def test_the_example_is_short():
    lines = [line for line in EXAMPLE.splitlines()[1:] if line.strip()]
    assert len(lines) < 40


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_starts_at_the_copy_baseline(model_class, layout):
    model = build(model_class, **LAYOUTS[layout])
    predictions = model.predict_next_frames(**video_batch(model.config, FRAMES))
    assert [prediction.metrics["skill"] for prediction in predictions] == [0.0] * 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_later_frame_changes_a_prediction(model_class, layout):
    model = build(model_class, **LAYOUTS[layout])
    torch.nn.init.normal_(
        model.autoregressive_module.change.weight
    )  # initially zero, which would hide every difference
    batch = video_batch(model.config, [[6]])
    before = model.predict_next_frames(**batch)[0]
    for changed in range(1, 6):
        pixels = batch["pixel_values_videos"].clone()
        pixels[0, changed:] += torch.randn_like(pixels[0, changed:])
        after = model.predict_next_frames(**{**batch, "pixel_values_videos": pixels})[0]
        # entry i predicts frame i + 1 from frames 0 ... i
        for entry in range(5):
            same = torch.equal(before.predictions[entry], after.predictions[entry])
            assert same == (entry < changed), f"frames {changed} and later reach the prediction of frame {entry + 1}"


def test_a_frame_sees_num_hist_frames_and_no_more(model_class):
    """Hidden states contain the past too, so the head is tested alone."""
    model = build(model_class, head={"num_hist": 2, "num_layers": 1})
    head = model.autoregressive_module
    clip = model.config.frame_token_layout.video(5)
    hidden_states = torch.randn(len(clip.patch_offsets), 32, requires_grad=True)
    batch = head.token_layout.batch([5])
    states = head._predictor_states(hidden_states, batch, head._plan(batch, None), torch.arange(5.0))
    states[3].sum().backward()
    reached = hidden_states.grad.abs().sum(1).view(5, -1).sum(1) > 0
    assert reached.tolist() == [False, False, True, True, False]


def test_its_loss_is_the_one_that_trains(model_class):
    model = build(model_class, head={"loss_weight": 1.0})
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.1)
    batch = video_batch(model.config, [[4], [4]])
    output = model(**batch, return_reconstruction=True)
    predictions, targets = output.reconstruction.predictions, output.reconstruction.targets
    cosine = torch.nn.functional.cosine_similarity(predictions, targets, dim=-1)
    expected = ((predictions - targets).square().mean(-1) + 0.1 * (1 - cosine)).mean()
    assert output.autoregressive_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    losses = train_briefly(model, batch, steps=8)
    assert losses[-1] < 0.9 * losses[0]
    moved = [name for name, p in model.autoregressive_module.blocks.named_parameters() if p.grad.abs().sum() > 0]
    assert len(moved) == len(list(model.autoregressive_module.blocks.parameters()))


def test_a_batch_without_video_still_touches_every_parameter(model_class):
    model = build(model_class).train()
    model(**video_batch(model.config, [[], []])).loss.backward()
    assert all(p.grad is not None for p in model.autoregressive_module.parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def trained(model_class, tmp_path_factory):
    """Output folder of a Trainer, and predictions of its model."""
    folder = tmp_path_factory.mktemp("trained") / "my-trained-model"
    model = build(model_class)
    samples = [make_sample(model.config, [5], seed=0)] * 8
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
    )
    trainer = AutoregressiveTrainer(model, arguments, train_dataset=samples, data_collator=collate)
    trainer.train()
    trainer.save_model(str(folder))
    batch = collate(samples[:1])
    prediction = model.eval().predict_next_frames(**batch)[0]
    assert prediction.metrics["skill"] > 0
    return folder, batch, prediction


def test_a_fresh_process_without_the_package_loads_it_under_every_auto_class(trained, tmp_path):
    folder, batch, prediction = trained
    torch.save(batch, tmp_path / "batch.pt")
    code = """
        import json, sys
        from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
        batch, found = torch.load(sys.argv[2], weights_only=True), []
        for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            model = auto_class.from_pretrained(sys.argv[1], trust_remote_code=True)
            predicted = model.predict_next_frames(**batch)[0]
            head = type(model.autoregressive_module).__name__
            found.append([type(model).__name__, head, [p.tolist() for p in predicted.predictions]])
        model.save_pretrained(sys.argv[3])
        print(json.dumps(found))
    """
    found = run_elsewhere(code, folder, tmp_path / "batch.pt", tmp_path / "again", cwd=tmp_path)
    assert [names for *names, _ in found] == [["MyModel", "MyHead"]] * 3
    for *_, predictions in found:
        assert all(map(torch.equal, map(torch.tensor, predictions), prediction.predictions))
    modules = sorted(path.name for path in folder.glob("*.py"))
    assert modules == sorted([*code_files(), "my_head.py"])
    for name in [*modules, "config.json", "model.safetensors"]:
        again = (tmp_path / "again" / name).read_bytes()
        assert again == (folder / name).read_bytes() or name == "config.json", name
    assert '"AutoModel": "my_head.MyModel"' in (tmp_path / "again" / "config.json").read_text()


def test_loading_it_as_the_plain_class_is_told(trained, caplog):
    """The weights of the other predictor would be left out, with a table of keys as the only sign."""
    folder, *_ = trained
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(RuntimeError):  # layers of the same names, but of other sizes
            LlavaNextARForConditionalGeneration.from_pretrained(folder)
    finally:
        logger.removeHandler(caplog.handler)
    assert "is one of my_head.MyModel, but is loaded as" in caplog.text
    again = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert type(again).__name__ == "MyModel"
