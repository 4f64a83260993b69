"""Messages that a user cannot act on are not shown; all others are."""

import logging
import warnings

import pytest
from tiny import tiny_model, tiny_onevision

from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from llava_next_ar.training.expected_messages import ExpectedMessages, quiet_expected_messages
from llava_next_ar.training.recipes import ModelArguments
from llava_next_ar.training.trained_model import load_config


@pytest.fixture
def shown():
    """Texts that transformers logs, with the filters installed, and none of them afterwards."""
    texts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())

    handler, root = Collector(), logging.getLogger("transformers")
    level = root.level
    root.setLevel(logging.WARNING)  # other tests silence it, as the ranks of a training do
    root.addHandler(handler)
    with warnings.catch_warnings():
        quiet_expected_messages()
        yield texts
    root.removeHandler(handler)
    root.setLevel(level)
    for name in ("transformers.modeling_utils", "transformers.configuration_utils"):
        logger = logging.getLogger(name)
        for own in [own for own in logger.filters if isinstance(own, ExpectedMessages)]:
            logger.removeFilter(own)


def test_a_base_without_a_head_gives_one_line(shown, tmp_path):
    tiny_onevision().save_pretrained(tmp_path)
    LlavaNextARForConditionalGeneration.from_pretrained(tmp_path)
    reports = [text for text in shown if "autoregressive_module" in text]
    assert len(reports) == 1 and len(reports[0].splitlines()) == 1 and "it is new" in reports[0]
    assert not any("can yield errors" in text for text in shown)


def test_any_other_missing_or_unexpected_weight_is_reported_in_full(shown, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("layers.0.mlp.up_proj.weight") and "language_model" in name]
    del weights[name]
    for head in [key for key in weights if key.startswith("autoregressive_module.change")]:
        del weights[head]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    LlavaNextARForConditionalGeneration.from_pretrained(tmp_path)
    (report,) = [text for text in shown if "LOAD REPORT" in text]
    assert "up_proj" in report and "autoregressive_module.change.weight" in report


def test_a_head_of_which_a_layer_is_missing_is_not_called_new(shown, tmp_path):
    tiny_model(head={"num_layers": 1}).save_pretrained(tmp_path)
    LlavaNextARForConditionalGeneration.from_pretrained(tmp_path, autoregressive_config={"num_layers": 2})
    (report,) = [text for text in shown if "LOAD REPORT" in text]
    assert "autoregressive_module.blocks.1" in report and "it is new" not in report


def test_a_recipe_that_reshapes_a_trained_head_is_reported(tmp_path, caplog):
    """Attention weights fit into another number of heads without an error, and mean something else."""
    tiny_model().save_pretrained(tmp_path)
    saved = tiny_model().config.autoregressive_config.num_heads
    for num_heads in (saved, saved // 2):
        caplog.clear()
        sections = {"model_config": {}, "autoregressive_config": {"num_heads": num_heads}}
        load_config(ModelArguments(model=str(tmp_path)), sections)
        assert ("do not fit the new shape" in caplog.text) == (num_heads != saved)
    assert f"num_heads={saved}" in caplog.text and f"--num_heads {saved}" in caplog.text


def test_other_warnings_stay():
    with pytest.warns(UserWarning, match="something else"), warnings.catch_warnings():
        quiet_expected_messages()
        warnings.warn("something else", UserWarning, stacklevel=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_expected_messages()
        warnings.warn("This DataLoader will create 4 worker processes in total.", UserWarning, stacklevel=1)
    assert not caught
