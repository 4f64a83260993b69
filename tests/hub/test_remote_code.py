"""Loading from a saved folder without this package installed: all parts, unchanged by a round trip."""

import filecmp
import json
from pathlib import Path

import pytest
import torch
from elsewhere import run_elsewhere
from tiny import tiny_model
from tiny_processor import tiny_processor
from video_clips import write_clip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved checkpoint with a head that no longer predicts the copy baseline, a clip, and its inputs and logits."""
    folder = tmp_path_factory.mktemp("checkpoint")
    clip = write_clip(folder / "clip.mp4", 24)
    model = tiny_model()
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.1)
    processor = tiny_processor(model.config, num_frames=4)
    model.save_pretrained(folder / "saved")
    processor.save_pretrained(folder / "saved")
    return folder, model, processor, clip


QUESTION = [{"role": "user", "content": [{"type": "video", "path": None}, {"type": "text", "text": "What moves?"}]}]


def ask(clip: Path) -> list[dict]:
    conversation = json.loads(json.dumps(QUESTION))
    conversation[0]["content"][0]["path"] = str(clip)
    return conversation


def test_a_fresh_process_without_the_package_answers_and_predicts(checkpoint, tmp_path):
    folder, model, processor, clip = checkpoint
    inputs = processor.apply_chat_template(
        ask(clip), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    metrics = model.predict_next_frames(**inputs)[0].metrics

    code = """
        import json, sys
        from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
        from transformers.models.auto.video_processing_auto import AutoVideoProcessor
        folder, conversation = sys.argv[1], json.loads(sys.argv[2])
        trust = {"trust_remote_code": True}
        config = AutoConfig.from_pretrained(folder, **trust)
        processor = AutoProcessor.from_pretrained(folder, **trust)
        video_processor = AutoVideoProcessor.from_pretrained(folder, **trust)
        results = []
        for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            model = auto_class.from_pretrained(folder, **trust)
            inputs = processor.apply_chat_template(
                conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
            )
            with torch.no_grad():
                logits = model(**inputs).logits[0, -1]
            answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1]:]
            metrics = model.predict_next_frames(**inputs)[0].metrics
            results.append([type(model).__name__, logits.tolist(), answer.tolist(), metrics])
        print(json.dumps({
            "results": results,
            "config": config.to_dict()["autoregressive_config"],
            "classes": [type(config).__name__, type(processor).__name__, type(video_processor).__name__],
            "num_frames": video_processor.num_frames,
        }))
    """
    found = run_elsewhere(code, folder / "saved", json.dumps(ask(clip)), cwd=tmp_path)
    assert found["classes"] == ["LlavaNextARConfig", "LlavaNextARProcessor", "LlavaNextARVideoProcessor"]
    assert found["config"] == model.config.to_dict()["autoregressive_config"]
    assert found["num_frames"] == 4
    assert len(found["results"]) == 3
    for name, found_logits, found_answer, found_metrics in found["results"]:
        assert name == "LlavaNextARForConditionalGeneration"
        assert torch.equal(torch.tensor(found_logits), logits)
        assert found_answer == answer.tolist()
        assert found_metrics == pytest.approx(metrics, rel=1e-6)
    assert metrics["mse"] != metrics["copy_mse"]  # the head contributes


def test_saving_what_was_loaded_from_a_folder_gives_the_same_files(checkpoint, tmp_path):
    """A class of remote code lies in a cache folder: a save from there must be complete."""
    folder, *_ = checkpoint
    code = """
        import json, sys
        from transformers import AutoModel, AutoProcessor
        AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])
        AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])
        print("{}")
    """
    first, second, third = folder / "saved", tmp_path / "second", tmp_path / "third"
    run_elsewhere(code, first, second, cwd=tmp_path)
    run_elsewhere(code, second, third, cwd=tmp_path)
    names = sorted(path.name for path in first.iterdir())
    for before, after, expected in ((first, second, ["config.json"]), (second, third, [])):
        assert names == sorted(path.name for path in after.iterdir())
        _, different, unreadable = filecmp.cmpfiles(before, after, names, shallow=False)
        assert (different, unreadable) == (expected, [])
    # transformers writes the dtype of the sub-models when it loads them: the one difference from a model built in memory.
    configs = [json.loads((save / "config.json").read_text()) for save in (first, second)]
    for part in ("text_config", "vision_config"):
        assert configs[1][part].pop("dtype") == "float32"
    assert configs[0] == configs[1]
