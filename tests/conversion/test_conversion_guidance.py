"""Notes of a conversion on parts that are left out, and the warning before a download."""

import logging

import pytest
from tiny import tiny_model
from tiny_processor import tiny_processor

from llava_next_ar.conversion import original_checkpoint
from llava_next_ar.conversion.checkpoint_conversion import convert_checkpoint


def test_guidance_comes_before_the_vision_tower_is_looked_up(monkeypatch, caplog):
    seen = []

    def look_up(name):
        seen.append(caplog.text)
        raise OSError("no network")

    monkeypatch.setattr(original_checkpoint.AutoConfig, "from_pretrained", look_up)
    original_checkpoint.logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="give it with --vision-config"):
            original_checkpoint._tower_config({"mm_vision_tower": "someone/tower"}, None)
    finally:
        original_checkpoint.logger.removeHandler(caplog.handler)
    assert len(seen) == 1 and "'someone/tower'" in seen[0] and "--vision-config" in seen[0]


@pytest.mark.parametrize("with_head", [True, False])
def test_an_export_says_that_it_leaves_the_head_out(with_head, tmp_path):
    model = tiny_model(enable_autoregressive=with_head)
    model.save_pretrained(tmp_path / "ours")
    tiny_processor(model.config).save_pretrained(tmp_path / "ours")
    result = convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="llava_onevision", progress=False)
    notes = [note for note in result.notes if "was left out: LLaVA-OneVision has no place for it" in note]
    assert len(notes) == with_head
