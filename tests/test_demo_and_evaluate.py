"""scripts/evaluate.py, scripts/demo.py and what they are made of, on a tiny checkpoint and real mp4 files."""

import json
import subprocess
import sys
from pathlib import Path

import demo
import evaluate
import numpy as np
import pytest
import report
import torch
from synthetic_clips import write_dataset
from tiny_checkpoint import build_tiny_checkpoint, texts_of, word_tokenizer

from llava_next_ar.processing_llava_next_ar import LlavaNextARProcessor
from llava_next_ar.training_data import LlavaVideoDataset

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
NUM_FRAMES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`clips/` with questions of different length and one to four choices of one or two words, and `base/`."""
    folder = tmp_path_factory.mktemp("demo")
    types = ("next", "bounce", "color")
    entries = write_dataset(
        folder / "clips", num_train=0, num_test=4, size=48, num_frames=8, question_types=types, progress=False
    )["test"]
    build_tiny_checkpoint(folder / "base", texts_of(entries), num_frames=NUM_FRAMES)
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    model, processor = evaluate.load_checkpoint(str(folder / "base"))
    # With tied random embeddings a model repeats the last word, and the head starts at zero: make things differ.
    torch.manual_seed(0)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / 3)
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.02)
    return model, processor


def settings_for(folder, **options) -> evaluate.EvaluationSettings:
    data = str(folder / "clips" / "test.json")
    return evaluate.EvaluationSettings(model=str(folder / "base"), data=data, **{"max_new_tokens": 3, **options})


def entries_of(folder) -> list[dict]:
    return json.loads((folder / "clips" / "test.json").read_text())


# -- evaluate.py


def test_evaluate_as_a_command(folder, tmp_path):
    output = tmp_path / "new" / "results.json"
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), "--model", str(folder / "base"), "--max-new-tokens", "2"]
    command += ["--data", str(folder / "clips" / "test.json"), "--output", str(output), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    entries = entries_of(folder)
    by_type = results["question_answering"]["by_type"]
    assert {name: s["num_questions"] for name, s in by_type.items()} == {"next": 2, "bounce": 2, "color": 4}
    assert {name: s["chance"] for name, s in by_type.items()} == {"next": 0.25, "bounce": 0.5, "color": 0.25}
    assert [answer["answer"] for answer in results["answers"]] == [e["conversations"][1]["value"] for e in entries]
    # Each clip once, though most carry two questions; an untrained head is exactly the copy baseline.
    frames = results["reconstruction"]
    assert (frames["num_videos"], frames["num_frames"]) == (4, 4 * (NUM_FRAMES - 1))
    assert frames["mse"] == frames["copy_mse"] > 0 and frames["skill"] == 0
    assert frames["temporal_consistency_chance"] == pytest.approx(1 / NUM_FRAMES)
    assert results["settings"]["max_new_tokens"] == 2 and results["settings"]["seed"] == 0
    assert results["versions"]["torch"] == torch.__version__
    assert "skill" in done.stdout and "chance" in done.stdout and "bounce" in done.stdout


def test_a_mistake_is_one_sentence(folder, tmp_path, capsys):
    entries = entries_of(folder)
    entries[0]["conversations"][1]["value"] = "sideways"
    data = tmp_path / "test.json"
    data.write_text(json.dumps(entries))
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--model", str(folder / "base"), "--data", str(data), "--video-root", str(folder / "clips")])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert entries[0]["id"] in message and "'sideways'" in message


def test_likelihoods_equal_those_of_each_choice_read_alone(folder, checkpoint):
    """Left-padded prompts of different length, read once, against one unpadded sequence for each choice."""
    model, processor = checkpoint
    results = evaluate.evaluate(settings_for(folder, batch_size=5), model, processor, progress=False)
    dataset = LlavaVideoDataset(str(folder / "clips" / "test.json"), processor)
    lengths, checked = set(), 0
    for question, record in zip(evaluate.read_questions(dataset), results["answers"], strict=True):
        for choice, measured in zip(question.choices, record["log_likelihoods"], strict=True):
            messages = [*question.messages, {"role": "assistant", "content": [{"type": "text", "text": choice}]}]
            inputs = processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
            )
            spoken = inputs.pop("assistant_masks")[0].bool().nonzero()[:, 0]
            with torch.no_grad():
                logits = model(**inputs).logits[0].log_softmax(-1)
            expected = logits[spoken - 1].gather(1, inputs["input_ids"][0, spoken, None]).sum().item()
            assert measured == pytest.approx(expected, abs=1e-4)
            lengths.add(len(spoken))
            checked += 1
    assert checked == 2 * 4 + 2 * 2 + 4 * 4
    assert lengths == {2, 3}  # words, and the token that ends the turn


def test_results_do_not_depend_on_the_batches(folder, checkpoint):
    one, three = (
        evaluate.evaluate(settings_for(folder, batch_size=size), *checkpoint, progress=False) for size in (1, 3)
    )
    for a, b in zip(one["answers"], three["answers"], strict=True):
        assert a["generated"] == b["generated"]
        assert a["log_likelihoods"] == pytest.approx(b["log_likelihoods"], abs=1e-4)
    assert len({answer["generated"] for answer in one["answers"]}) > 1  # the model does not say the same to all
    for name in ("mse", "copy_mse", "skill", "cosine", "temporal_consistency", "num_frames"):
        assert one["reconstruction"][name] == pytest.approx(three["reconstruction"][name], rel=1e-4), name
    assert one["reconstruction"]["mse"] != pytest.approx(one["reconstruction"]["copy_mse"], rel=1e-2)


def test_reconstruction_equals_predict_next_frames(folder, checkpoint):
    model, processor = checkpoint
    results = evaluate.evaluate(
        settings_for(folder, generation=False, likelihood=False), model, processor, progress=False
    )
    videos = sorted({entry["video"] for entry in entries_of(folder)})
    metrics = [demo.predict(model, processor, folder / "clips" / video)[0].metrics for video in videos]
    for name in ("mse", "copy_mse", "cosine", "temporal_consistency"):
        assert results["reconstruction"][name] == pytest.approx(np.mean([m[name] for m in metrics]), rel=1e-4)
    assert "exact" not in results["question_answering"]["all"]


def test_the_code_in_the_folder_gives_the_same_results(folder):
    package, remote = (
        evaluate.evaluate(settings_for(folder, trust_remote_code=trust), progress=False) for trust in (False, True)
    )
    for name in ("question_answering", "reconstruction", "answers"):
        assert remote[name] == package[name]
    model, _ = evaluate.load_checkpoint(str(folder / "base"), trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")


def answer_record(answer: str, generated: str, question_type: str = "color", choices=("red", "blue")) -> dict:
    exact = evaluate.normalise_answer(generated) == evaluate.normalise_answer(answer)
    return {"question_type": question_type, "answer": answer, "choices": list(choices), "exact": exact}


def test_accuracy_and_what_guessing_is_worth():
    settings = evaluate.EvaluationSettings(model="", data="")
    said = [("red", " Red."), ("red", "blue"), ("red", "red"), ("blue", "red blue")]
    answers = [answer_record(*pair) for pair in said]
    answers += [answer_record("up", "up", "direction", ("left", "right", "up", "down"))] * 2
    summary = evaluate.summarize_answers(answers, list(range(6)), settings)
    color, direction = summary["by_type"]["color"], summary["by_type"]["direction"]
    assert (color["exact"], color["chance"], color["best_guess"]) == (0.5, 0.5, 0.75)
    assert (direction["exact"], direction["chance"], direction["best_guess"]) == (1.0, 0.25, 1.0)
    assert direction["exact_interval"] == [1.0, 1.0]
    assert color["exact_interval"][0] < 0.5 < color["exact_interval"][1]
    assert summary["all"]["exact"] == pytest.approx(4 / 6)


def test_questions_about_one_clip_are_no_independent_evidence():
    settings = evaluate.EvaluationSettings(model="", data="")
    answers = [answer_record("red", word) for word in ("red", "blue", "red", "red", "blue", "red")]
    alone = evaluate.summarize_answers(answers, list(range(6)), settings)["all"]
    asked_thrice = evaluate.summarize_answers(answers * 3, list(range(6)) * 3, settings)["all"]
    as_if_independent = evaluate.summarize_answers(answers * 3, list(range(18)), settings)["all"]
    assert asked_thrice["exact_interval"] == alone["exact_interval"]
    assert np.diff(as_if_independent["exact_interval"]) < np.diff(alone["exact_interval"])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"dtype": "float33"}, {"max_samples": -1}])
def test_settings_out_of_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is .*{value}"):
        evaluate.EvaluationSettings(model="", data="", **options)


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


def test_logs_are_told_from_other_output():
    line = "{'loss': '0.5', 'main_loss': '0.25', 'autoregressive_loss': '0.1', 'epoch': '0.5'}\n"
    assert demo._logged(line) == {"loss": 0.5, "main_loss": 0.25, "autoregressive_loss": 0.1, "epoch": 0.5}
    for other in ("saved to x", "{'train_loss': '1'}", "{'main_loss': broken", "main_loss 3"):
        assert demo._logged(other) is None


def test_equal_features_have_equal_colours():
    features = np.random.default_rng(0).normal(size=(9, 16))
    a, b, c = report.pca_colours([features, features.copy(), features + 3 * features[0]])
    assert np.array_equal(a, b) and not np.allclose(a, c)
    assert a.min() >= 0 and a.max() <= 1
    assert np.std(a, axis=0).min() > 0.05  # three components, all in use


@pytest.mark.slow
def test_the_quick_demo_runs_from_clips_to_report(tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, str(SCRIPTS / "demo.py"), "--quick", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 8
    assert "transformers_modules" in page  # the code that was saved with the model answered
    assert {"losses.png", "accuracy.png", "mask.png"} <= {path.name for path in (output / "pictures").iterdir()}
    history = json.loads((output / "model" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "autoregressive_loss" in entry]) == 4
    results = json.loads((output / "results.json").read_text())
    assert set(results["question_answering"]["by_type"]) == {"direction", "color"}
