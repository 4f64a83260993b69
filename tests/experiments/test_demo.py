"""scripts/demo.py and what it is made of, on a tiny checkpoint and real mp4 files."""

import json
import sys
from pathlib import Path

import processes
import pytest
from demo_folder import entries_of, make_demo_folder

from llava_next_ar.experiments.demo import demo
from llava_next_ar.experiments.demo.tiny_checkpoint import word_tokenizer
from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor
from llava_next_ar.training.data import LlavaVideoDataset

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_demo_folder(tmp_path_factory.mktemp("demo"))


# -- The tiny checkpoint


def test_the_tiny_checkpoint_knows_all_words(folder):
    processor = LlavaNextARProcessor.from_pretrained(folder / "base")
    dataset = LlavaVideoDataset(str(folder / "clips" / "test.json"), processor)
    tokenizer = processor.tokenizer
    for index, entry in enumerate(entries_of(folder)):
        sample = dataset[index]
        assert tokenizer.unk_token_id not in sample["input_ids"]
        supervised = sample["labels"][sample["labels"] != -100]
        assert tokenizer.decode(supervised, skip_special_tokens=True) == entry["conversations"][1]["value"]
    unknown = word_tokenizer(["red"])("green")["input_ids"]
    assert unknown == [word_tokenizer(["red"]).unk_token_id]


def test_the_tiny_checkpoint_is_a_complete_hub_folder(folder):
    names = {path.name for path in (folder / "base").iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= names
    assert {"modeling_llava_next_ar.py", "processing_llava_next_ar.py", "frame_token_layout.py"} <= names


# -- demo.py


def results_like(skill: float, exact: float, interval: tuple[float, float]) -> dict:
    summary = {"exact": exact, "exact_interval": list(interval), "chance": 0.25}
    return {"reconstruction": {"skill": skill}, "question_answering": {"by_type": {"direction": summary}}}


def test_the_demo_says_when_nothing_was_learned():
    assert demo.judge(results_like(0.2, 0.6, (0.5, 0.7))) == []
    assert "skill" in demo.judge(results_like(0.0, 0.6, (0.5, 0.7)))[0]
    assert "direction" in demo.judge(results_like(0.2, 0.30, (0.26, 0.34)))[0]  # above chance, but hardly
    assert "direction" in demo.judge(results_like(0.2, 0.40, (0.24, 0.56)))[0]  # may be chance


def test_color_questions_are_thinned_out_and_no_others():
    entries = [{"question_type": kind, "id": n} for n in range(8) for kind in ("direction", "color")]
    mix = demo.training_mix(entries)
    assert [e["id"] for e in mix if e["question_type"] == "direction"] == list(range(8))
    assert [e["id"] for e in mix if e["question_type"] == "color"] == [0, 4]


@pytest.mark.slow
def test_the_quick_demo_runs_from_clips_to_report(tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, str(SCRIPTS / "demo.py"), "--quick", "--output", str(output)]
    processes.run(command, cwd=tmp_path, timeout=1800)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 8
    assert "transformers_modules" in page  # the code that was saved with the model answered
    assert {"losses.png", "accuracy.png", "mask.png"} <= {path.name for path in (output / "pictures").iterdir()}
    history = json.loads((output / "model" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "autoregressive_loss" in entry]) == 4
    results = json.loads((output / "results.json").read_text())
    assert set(results["question_answering"]["by_type"]) == {"direction", "color"}
