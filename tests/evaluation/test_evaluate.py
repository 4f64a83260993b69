"""`llava-next-ar evaluate` and its parts, on a tiny checkpoint and real mp4 files."""

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from demo_folder import NUM_FRAMES, entries_of, make_changed_checkpoint, make_demo_folder
from peft import LoraConfig, get_peft_model

from llava_next_ar.evaluation import evaluate
from llava_next_ar.evaluation import settings as evaluation_settings
from llava_next_ar.evaluation.html_page import horizon_figure
from llava_next_ar.evaluation.metrics import gap_bin, summarize_answers, summarize_frames
from llava_next_ar.evaluation.questions import (
    Question,
    frame_order,
    media_groups,
    normalise_answer,
    parse_choice,
    read_questions,
)
from llava_next_ar.evaluation.records import RecordFiles
from llava_next_ar.evaluation.report import write_report
from llava_next_ar.evaluation.settings import (
    EvaluationSettings,
    command_line,
    make_parser,
    resolved_revision,
    versions,
)
from llava_next_ar.evaluation.tables import MAX_ROWS, format_results, write_results
from llava_next_ar.experiments.demo import demo
from llava_next_ar.experiments.temporal.synthetic_clips import write_video
from llava_next_ar.hub.hub_folder import weights_sha256
from llava_next_ar.training.data import LlavaVideoDataset

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SETTINGS = EvaluationSettings(model="", data="")
# What may differ between two runs that measure the same.
OF_THE_RUN = ("seconds", "run", "command")  # of these the command names another output


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`clips/`, `base/` and `changed/`."""
    folder = make_demo_folder(tmp_path_factory.mktemp("evaluate"))
    make_changed_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    return evaluate.load_checkpoint(str(folder / "changed"))


def settings_for(folder: Path, **options) -> EvaluationSettings:
    data = str(folder / "clips" / "test.json")
    defaults = {"model": str(folder / "changed"), "data": data, "max_new_tokens": 3, "bootstrap_samples": 50}
    return EvaluationSettings(**{**defaults, **options})


def numbers_of(results: dict) -> dict:
    """The content of a results file without the keys of the run."""
    return {name: value for name, value in json.loads(json.dumps(results)).items() if name not in OF_THE_RUN}


# -- The command, on one and on two processes


@pytest.fixture(scope="module")
def outputs(folder, tmp_path_factory) -> dict[int, Path]:
    """Output files of the same command in this process, and on two processes of accelerate with gloo."""
    outputs = {number: tmp_path_factory.mktemp("output") / "new" / "results.json" for number in (1, 2)}
    options = ["--model", str(folder / "changed"), "--data", str(folder / "clips" / "test.json"), "--device", "cpu"]
    options += ["--max-new-tokens", "3", "--batch-size", "3"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", str(SCRIPTS / "accelerate" / "cpu.yaml")]
    command = [*launch, SCRIPTS / "evaluate.py", *options, "--output", outputs[2]]
    with processes.Program(command, merge=True) as program:
        evaluate.main([*options, "--output", str(outputs[1])])
        printed = program.finish(timeout=240).stdout
    assert printed.count("best guess") == 1 and "skill" in printed  # one of them speaks
    return outputs


def test_one_and_two_processes_give_identical_numbers(outputs):
    one, two = (json.loads(outputs[number].read_text()) for number in (1, 2))
    assert (one["run"]["num_processes"], two["run"]["num_processes"]) == (1, 2)
    assert list(one) == list(two)
    assert numbers_of(one) == numbers_of(two)
    assert len({answer["generated"] for answer in one["answers"]}) > 1
    assert len({answer["log_likelihoods"][0] for answer in one["answers"]}) == len(one["answers"])
    for output in outputs.values():
        assert {path.name for path in output.parent.iterdir()} == {"results.json", "results.html"}
    assert outputs[1].with_suffix(".html").read_text().count("data:image/png;base64,") == 2


def test_what_the_output_holds(folder, outputs):
    results = json.loads(outputs[2].read_text())
    entries = entries_of(folder)
    by_type = results["question_answering"]["by_type"]
    assert {name: s["num_questions"] for name, s in by_type.items()} == {"next": 2, "bounce": 2, "color": 4}
    assert {name: s["chance"] for name, s in by_type.items()} == {"next": 0.25, "bounce": 0.5, "color": 0.25}
    assert [answer["id"] for answer in results["answers"]] == [entry["id"] for entry in entries]
    assert [answer["answer"] for answer in results["answers"]] == [e["conversations"][1]["value"] for e in entries]
    # Each clip once, though most carry two questions.
    frames = results["reconstruction"]
    assert (frames["num_videos"], frames["num_frames"]) == (4, 4 * (NUM_FRAMES - 1))
    assert frames["skill"] == 1 - frames["mse"] / frames["copy_mse"] != 0
    assert frames["temporal_consistency_chance"] == pytest.approx(1 / NUM_FRAMES)
    (quarter,) = frames["by_gap"]  # of a second: 8 frames at 4 fps
    assert (quarter["gap"], quarter["num_frames"], quarter["skill"]) == (0.25, frames["num_frames"], frames["skill"])
    videos = list(dict.fromkeys(entry["video"] for entry in entries))
    assert [video["id"] for video in results["videos"]] == [
        next(entry["id"] for entry in entries if entry["video"] == video) for video in videos
    ]
    assert results["settings"]["max_new_tokens"] == 3 and results["settings"]["seed"] == 0
    assert results["versions"]["torch"] == torch.__version__
    assert results["versions"].keys() >= {"python", "transformers", "tokenizers", "accelerate", "llava_next_ar"}
    assert results["versions"]["video_decoder"] == "pyav"
    assert results["versions"]["av"] == importlib.metadata.version("av")
    assert results["versions"]["pillow"] == importlib.metadata.version("pillow")
    assert results["command"].endswith(f"--output {outputs[2]}")
    assert len(results["model"]["weights_sha256"]) == len(results["data"]["sha256"]) == 64


def test_an_untrained_head_is_exactly_the_copy_baseline(folder):
    results = evaluate.evaluate(
        settings_for(folder, model=str(folder / "base"), generation=False, likelihood=False), progress=False
    )
    frames = results["reconstruction"]
    assert frames["mse"] == frames["copy_mse"] > 0 and frames["skill"] == 0
    assert "exact" not in results["question_answering"]["all"]


def test_the_command_in_the_output_repeats_it(folder):
    settings = settings_for(folder, likelihood=False, trust_remote_code=True, frame_order="reversed", num_frames=4)
    output = Path("new") / "r.json"
    program, name, *words = command_line(settings, output).split()
    assert (program, name) == ("llava-next-ar", "evaluate")
    options = vars(make_parser("").parse_args(words))
    assert [options.pop(name) for name in ("output", "resume", "no_report")] == [output, False, False]
    assert EvaluationSettings(**options) == settings
    assert "--output" not in command_line(settings)


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


def test_versions_know_a_changed_module(tmp_path, monkeypatch):
    root = Path(evaluation_settings.__file__).parents[1]
    for folder in evaluation_settings._MEASURED_WITH:
        shutil.copytree(root / folder, tmp_path / folder)
    monkeypatch.setattr(evaluation_settings, "__file__", str(tmp_path / "evaluation" / "settings.py"))
    copied = versions()["code_sha256"]
    with open(tmp_path / "modeling" / "loss_functions.py", "a") as file:
        file.write("#\n")
    monkeypatch.setattr(evaluation_settings, "version", without_decord)
    changed = versions()
    assert len(copied) == 64 and changed["code_sha256"] != copied
    assert "decord" not in changed and changed["av"]


def without_decord(name: str) -> str:
    if name == "decord":
        raise importlib.metadata.PackageNotFoundError(name)
    return importlib.metadata.version(name)


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("r.html", [], "output is .*r.html, expected a JSON file"),
        ("r.HTML", [], "output is .*r.HTML, expected a JSON file"),
        ("folder", [], "output is .*folder, which is a folder"),
        ("folder", ["--no-report"], "output is .*folder, which is a folder"),
        ("taken.json", [], "written to .*taken.html, which is a folder"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys, output, options, message
):
    """`r.html` was once written as JSON, overwritten by the report of the same name, and its records deleted."""
    monkeypatch.setattr(evaluate, "evaluate", None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--model", "m", "--data", "d", "--output", str(tmp_path / output), *options])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_only_the_report_needs_matplotlib(folder, tmp_path):
    """The extra `train` brings all but that."""
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.argv[0] = 'evaluate.py'; "
        "from llava_next_ar.evaluation import evaluate; evaluate.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code]
    command += ["--model", str(folder / "base"), "--data", str(folder / "clips" / "test.json"), "--device", "cpu"]
    command += ["--max-samples", "1", "--no-generation", "--no-likelihood", "--output", str(tmp_path / "r.json")]
    refused = processes.run(command, timeout=120, status=2)
    assert not list(tmp_path.iterdir())
    assert (
        "matplotlib" in refused.stderr
        and "llava-next-ar[eval]" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    processes.run([*command, "--no-report"], timeout=120)
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_device_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--model", "m", "--data", "d", "--device", "gpu"])
    assert "device is 'gpu', expected one that is there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"dtype": "float33"}, {"max_samples": -1}, {"max_bad_samples": -1}, {"frame_order": "none"}],
)
def test_settings_out_of_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is .*{value}"):
        EvaluationSettings(model="", data="", **options)


@pytest.fixture
def hub():
    """Puts folders into the cache, as if they had been downloaded from the Hub: `hub(name, folder, *commits)`, main last."""
    made = []

    def put(name: str, source: Path, *commits: str) -> None:
        cache = Path(os.environ["HF_HOME"]) / "hub" / f"models--user--{name}"
        made.append(cache)
        for commit in commits:
            shutil.copytree(source, cache / "snapshots" / commit)
            if not (source / "config.json").exists():  # what a cache remembers of a file that the Hub does not have
                (cache / ".no_exist" / commit).mkdir(parents=True)
                (cache / ".no_exist" / commit / "config.json").touch()
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(commits[-1])

    yield put
    for cache in made:
        shutil.rmtree(cache)


def test_a_model_on_the_hub_is_named_by_its_commit(folder, hub):
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub("tiny", folder / "base", commit)
    settings = settings_for(folder, model="user/tiny", max_samples=1, generation=False, likelihood=False)
    results = evaluate.evaluate(settings, progress=False)
    assert results["settings"]["revision"] == results["model"]["revision"] == commit
    assert f"--revision {commit}" in results["command"]
    assert results["model"]["base"] is results["settings"]["base_revision"] is None
    with pytest.raises(ValueError, match="revision is 'main'"):
        resolved_revision(str(folder / "base"), "main")
    with pytest.raises(ValueError, match="base_revision is 'main', but user/tiny is not an adapter"):
        evaluate.evaluate(dataclasses.replace(settings, base_revision="main"), progress=False)


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_an_adapter_on_the_hub_and_its_base_are_named_by_their_commits(folder, hub, tmp_path, trust_remote_code):
    """transformers looks for `revision` of an adapter in the repository of its base, where that commit is not."""
    model, processor = evaluate.load_checkpoint(str(folder / "changed"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = "user/base"
    adapted.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    own, old, new = ("a" * 40, "b" * 40, "c" * 40)
    hub("adapter", tmp_path, own)
    hub("base", folder / "changed", old, new)
    settings = settings_for(
        folder, model="user/adapter", max_samples=2, generation=False, trust_remote_code=trust_remote_code
    )
    expected = evaluate.evaluate(settings, adapted, processor, progress=False)
    results = evaluate.evaluate(settings, progress=False)
    assert results["answers"] == expected["answers"]
    named = {"id": "user/adapter", "revision": own, "base": "user/base", "base_revision": new}
    assert results["model"].items() >= named.items()
    assert f"--revision {own} --base-revision {new}" in results["command"]
    again = evaluate.evaluate(dataclasses.replace(settings, base_revision=old), progress=False)
    assert (again["model"]["base_revision"], again["answers"]) == (old, expected["answers"])
    # One in a folder, on a base in a folder.
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "changed")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    local = evaluate.evaluate(dataclasses.replace(settings, model=str(tmp_path)), progress=False)
    assert local["answers"] == expected["answers"]
    hashes = (weights_sha256(tmp_path), weights_sha256(folder / "changed"))
    assert (local["model"]["weights_sha256"], local["model"]["base_weights_sha256"]) == hashes
    del config["base_model_name_or_path"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="base_model_name_or_path in .*adapter_config.json is None"):
        evaluate.evaluate(dataclasses.replace(settings, model=str(tmp_path)), progress=False)


# -- Killed and resumed


def test_a_resumed_run_gives_what_an_uninterrupted_one_gives(folder, checkpoint, tmp_path, monkeypatch):
    settings = settings_for(folder, batch_size=3)
    expected = evaluate.evaluate(settings, *checkpoint, progress=False)
    output = tmp_path / "results.json"
    measure, measured = evaluate.measure_batch, []

    def measure_until(limit: int):
        def measure_batch(*args):
            if len(measured) == limit:
                raise KeyboardInterrupt
            measured.append([question.id for question in args[3]])
            return measure(*args)

        return measure_batch

    monkeypatch.setattr(evaluate, "measure_batch", measure_until(2))
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(settings, *checkpoint, progress=False, output=output)
    records = tmp_path / "results.records-0.jsonl"
    header, *lines = records.read_text().splitlines(keepends=True)
    assert len(lines) == 2
    # As if two processes had shared the work, and one of them had been killed while it wrote.
    (tmp_path / "results.records-1.jsonl").write_text(header + lines[1])
    records.write_text(header + lines[0] + lines[1][:-40])

    with pytest.raises(ValueError, match="--resume"):
        evaluate.evaluate(settings, *checkpoint, progress=False, output=output)
    for options in ({"max_new_tokens": 4}, {"batch_size": 4}, {"frame_order": "reversed"}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name} is {value!r} here, but {getattr(settings, name)!r} there"):
            other = dataclasses.replace(settings, **options)
            evaluate.evaluate(other, *checkpoint, progress=False, output=output, resume=True)

    monkeypatch.setattr(evaluate, "measure_batch", measure_until(9))
    resumed = evaluate.evaluate(settings, *checkpoint, progress=False, output=output, resume=True)
    assert numbers_of(resumed) == numbers_of(expected)
    assert resumed["run"]["num_resumed_questions"] == 6
    assert sum(measured, []) == [entry["id"] for entry in entries_of(folder)]  # each once, before the kill or after it
    # What is on disk now is complete: the cut line was not built upon.
    again = evaluate.evaluate(settings, *checkpoint, progress=False, output=output, resume=True)
    assert len(measured) == 3 and numbers_of(again) == numbers_of(expected)


def test_threads_are_a_setting_and_not_what_the_launcher_leaves(folder, checkpoint, monkeypatch):
    """On this tiny model, two threads instead of one change a digit of a likelihood."""
    seen = []

    def measure_batch(*args):
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "measure_batch", measure_batch)
    before = torch.get_num_threads()
    for number in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            evaluate.evaluate(settings_for(folder, cpu_threads=number), *checkpoint, progress=False)
    assert seen == [1, 2] and torch.get_num_threads() == before


def test_records_of_another_model_or_data_are_refused(tmp_path):
    provenance = {
        "settings": {"seed": 0, "num_workers": 0},
        "versions": {"torch": "2"},
        "model": {"weights_sha256": "ab"},
        "data": {"sha256": "cd"},
    }
    files = RecordFiles(tmp_path / "r.json", 0)
    files.open(provenance)
    files.append(4, [{"id": "a", "exact": True}])
    files.close()
    assert files.read(provenance) == {4: [{"id": "a", "exact": True}]}
    assert files.read({**provenance, "settings": {"seed": 0, "num_workers": 2}})  # changes no number
    for part, name in (("settings", "seed"), ("versions", "torch"), ("model", "weights_sha256"), ("data", "sha256")):
        with pytest.raises(ValueError, match=f"{name} is 'other' here"):
            files.read({**provenance, part: {**provenance[part], name: "other"}})
    with open(files.own, "a") as file:
        file.write("{broken\n" + json.dumps({"batch": 5, "records": []}) + "\n")
    with pytest.raises(ValueError, match="line 3 of .*damaged"):
        files.read(provenance)
    files.remove()
    assert not files.existing()


# -- Bad samples


def test_an_entry_that_cannot_be_read_is_named_and_never_left_out_silently(folder, checkpoint, tmp_path):
    shutil.copytree(folder / "clips", tmp_path / "clips")
    entries = entries_of(folder)
    broken, missing = list(dict.fromkeys(entry["video"] for entry in entries))[1:3]
    (tmp_path / "clips" / broken).write_bytes(b"no video")
    (tmp_path / "clips" / missing).unlink()
    bad = [entry["id"] for entry in entries if entry["video"] in (broken, missing)]

    def run(**options):
        data = str(tmp_path / "clips" / "test.json")
        return evaluate.evaluate(settings_for(folder, data=data, batch_size=1, **options), *checkpoint, progress=False)

    with pytest.raises(ValueError, match=missing):
        run()
    with pytest.raises(ValueError, match=f"{len(bad)} bad samples, more than max_bad_samples={len(bad) - 1}"):
        run(max_bad_samples=len(bad) - 1)
    results = run(max_bad_samples=len(bad))
    assert results["num_bad_samples"] == len(bad)
    assert sorted(record["id"] for record in results["bad_samples"]) == sorted(bad)
    assert {broken in record["problem"] or missing in record["problem"] for record in results["bad_samples"]} == {True}
    whole = evaluate.evaluate(settings_for(folder, batch_size=1), *checkpoint, progress=False)
    assert results["answers"] == [answer for answer in whole["answers"] if answer["id"] not in bad]
    assert results["videos"] == [video for video in whole["videos"] if video["id"] not in bad]
    assert results["question_answering"]["all"]["num_questions"] == len(entries) - len(bad)
    assert f"NOTE: {len(bad)} entries could not be read" in format_results(results)


# -- Answers of the model


def test_likelihoods_equal_those_of_each_choice_read_alone(folder, checkpoint):
    """Left-padded prompts of different length, read once, against one unpadded sequence for each choice."""
    model, processor = checkpoint
    results = evaluate.evaluate(settings_for(folder, batch_size=5), model, processor, progress=False)
    dataset = LlavaVideoDataset(str(folder / "clips" / "test.json"), processor)
    lengths, checked = set(), 0
    for question, record in zip(read_questions(dataset), results["answers"], strict=True):
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


CHOICES = ("red", "dark red", "blue")


@pytest.mark.parametrize(
    ("text", "choices", "named"),
    [
        # the text itself
        ("Red.", CHOICES, "red"),
        (" dark red", CHOICES, "dark red"),
        ("B", ("A", "B"), "B"),
        # a letter, alone or as a label
        ("b", CHOICES, "dark red"),
        ("(C)", CHOICES, "blue"),
        ("C.", CHOICES, "blue"),
        ("A) dark red", CHOICES, "red"),
        ("Answer: B", CHOICES, "dark red"),
        ("The correct answer is (b).", CHOICES, "dark red"),
        ("D", CHOICES, None),
        # the choices' own labels
        ("C", ("B. up", "C. down"), "C. down"),
        ("up", ("B. up", "C. down"), "B. up"),
        ("A", ("B. up", "C. down"), None),
        # a word in a sentence
        ("It is blue, I think", CHOICES, "blue"),
        ("A dark red shape", CHOICES, "dark red"),
        ("The answer is red", CHOICES, "red"),
        ("A blue one", CHOICES, "blue"),  # an article, no letter
        ("red or blue", CHOICES, None),
        ("reddish", CHOICES, None),
        ("", CHOICES, None),
    ],
)
def test_which_choice_a_text_names(text, choices, named):
    place = parse_choice(text, choices)
    assert (None if place is None else choices[place]) == named


def answer_record(answer: str, generated: str, question_type: str = "color", choices=("red", "blue")) -> dict:
    exact = normalise_answer(generated) == normalise_answer(answer)
    record = {"question_type": question_type, "answer": answer, "choices": list(choices), "exact": exact}
    if choices:
        place = parse_choice(generated, choices)
        record["choice"] = None if place is None else choices[place]
    return record


def test_accuracy_and_what_guessing_is_worth():
    said = [("red", " Red."), ("red", "blue"), ("red", "it is red"), ("blue", "red blue")]
    answers = [answer_record(*pair) for pair in said]
    answers += [answer_record("up", "up", "direction", ("left", "right", "up", "down"))] * 2
    summary = summarize_answers(answers, list(range(6)), SETTINGS)
    color, direction = summary["by_type"]["color"], summary["by_type"]["direction"]
    assert (color["exact"], color["chance"], color["best_guess"]) == (0.25, 0.5, 0.75)
    assert (color["choice"], color["num_unparsable"]) == (0.5, 1)
    assert (direction["exact"], direction["chance"], direction["best_guess"]) == (1.0, 0.25, 1.0)
    assert (direction["exact_interval"], direction["num_unparsable"]) == ([1.0, 1.0], 0)
    assert color["choice_interval"][0] < 0.5 < color["choice_interval"][1]
    assert summary["all"]["exact"] == pytest.approx(3 / 6)
    assert "likelihood" not in summary["all"]


def test_open_questions_have_a_best_guess_but_no_chance_level():
    said = [("A dog.", "a dog"), ("a dog", "cat"), ("cat", "dog")]
    answers = [answer_record(*pair, "open", ()) for pair in said] + [answer_record("red", "red")]
    summary = summarize_answers(answers, list(range(4)), SETTINGS)
    opened = summary["by_type"]["open"]
    assert (opened["exact"], opened["best_guess"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert not {"chance", "choice", "num_unparsable"} & opened.keys()
    assert "chance" not in summary["all"] and summary["all"]["choice"] == 1.0  # of the one with choices


def test_questions_about_one_clip_are_no_independent_evidence():
    answers = [answer_record("red", word) for word in ("red", "blue", "red", "red", "blue", "red")]
    alone = summarize_answers(answers, list(range(6)), SETTINGS)["all"]
    asked_thrice = summarize_answers(answers * 3, list(range(6)) * 3, SETTINGS)["all"]
    as_if_independent = summarize_answers(answers * 3, list(range(18)), SETTINGS)["all"]
    assert asked_thrice["exact_interval"] == alone["exact_interval"]
    assert np.diff(as_if_independent["exact_interval"]) < np.diff(alone["exact_interval"])


# -- What the head predicts


def test_reconstruction_equals_predict_next_frames(folder, checkpoint):
    model, processor = checkpoint
    settings = settings_for(folder, generation=False, likelihood=False, num_frames=4)
    results = evaluate.evaluate(settings, model, processor, progress=False)
    videos = list(dict.fromkeys(entry["video"] for entry in entries_of(folder)))
    for video, record in zip(videos, results["videos"], strict=True):
        prediction, inputs = demo.predict(model, processor, folder / "clips" / video, num_frames=4)
        measured = record["next_frame"]
        for name in ("mse", "copy_mse", "cosine", "temporal_consistency"):
            assert measured[name] == pytest.approx(prediction.frame_metrics[name].tolist(), rel=1e-4), name
        assert measured["frame"] == prediction.frame_index.tolist() == [1, 2, 3]
        assert measured["gap"] == pytest.approx(inputs["video_timestamps"][0].diff().tolist(), abs=1e-6)
    whole = results["reconstruction"]
    assert whole["mse"] == pytest.approx(np.mean([record["next_frame"]["mse"] for record in results["videos"]]))
    # Frames 0, 2, 4 and 7 of eight at 4 fps.
    bins = whole["by_gap"]
    assert [(entry["gap"], entry["num_frames"]) for entry in bins] == [(0.5, 8), (1.0, 4)]
    assert measured["gap"] == [0.5, 0.5, 0.75]


def test_frames_further_ahead_are_imagined_and_compared_with_both_baselines(folder, checkpoint, tmp_path):
    model, processor = checkpoint
    settings = settings_for(folder, generation=False, likelihood=False, num_frames=6, horizons=3)
    results = evaluate.evaluate(settings, model, processor, progress=False)
    videos = list(dict.fromkeys(entry["video"] for entry in entries_of(folder)))
    for video, record in zip(videos, results["videos"], strict=True):
        prediction, inputs = demo.predict(model, processor, folder / "clips" / video, num_frames=6)
        (own,) = model.imagine(3, hold_back=True, **inputs)
        seconds = inputs["video_timestamps"][0].tolist()
        for ahead in (1, 2, 3):
            measured = record["rollout"][str(ahead)]
            for name, values in own.frame_metrics().items():
                assert measured[name] == pytest.approx([float(values[ahead - 1])], rel=1e-4), name
            assert measured["frame"] == [2 + ahead]
            assert measured["gap"] == pytest.approx([seconds[2 + ahead] - seconds[2]], abs=1e-6)
        next_frame = record["next_frame"]
        assert next_frame["linear_mse"][0] == pytest.approx(next_frame["copy_mse"][0])  # one frame makes no line
        frames = own.candidates[0]  # the same for each frame: this layout has no slow and fast ones
        ratio = (seconds[4] - seconds[3]) / (seconds[3] - seconds[2])
        line = frames[3] + (frames[3] - frames[2]) * ratio
        assert next_frame["linear_mse"][3] == pytest.approx(float((line - frames[4]).square().mean()), rel=1e-4)
    # All horizons of the same last frame: the first is not the mean over every frame, which differs.
    frames = results["reconstruction"]
    by_horizon = frames["rollout"]["by_horizon"]
    assert {summary["num_frames"] for summary in by_horizon.values()} == {4} and frames["num_frames"] == 4 * 5
    assert by_horizon["1"]["mse"] != pytest.approx(frames["mse"], rel=1e-3)
    at_start = [record["next_frame"]["mse"][2] for record in results["videos"]]
    assert by_horizon["1"]["mse"] == pytest.approx(np.mean(at_start), rel=1e-4)
    text = format_results(results)
    assert "1, every frame" in text and "1, held back" in text and "NOTE" not in text
    assert list(by_horizon) == ["1", "2", "3"]
    assert by_horizon["3"]["mse"] == pytest.approx(np.mean([r["rollout"]["3"]["mse"] for r in results["videos"]]))
    assert "straight line" in format_results(results)
    drawn = {line.get_label(): list(line.get_ydata()) for line in horizon_figure(by_horizon).axes[0].lines}
    assert drawn["predicted"] == [summary["mse"] for summary in by_horizon.values()]
    assert drawn["straight line through the last two"][2] == by_horizon["3"]["linear_mse"]
    write_report(results, tmp_path / "report.html")
    assert "error by horizon" in (tmp_path / "report.html").read_text(encoding="utf-8")


def data_of(folder: Path, path: Path, *videos: list[str], answer: str = "red") -> dict[str, str]:
    """Settings for open questions about videos of the folder, `videos[i]` in the prompt of question i."""
    entries = [
        {
            "id": f"q{number}",
            "video": own if len(own) > 1 else own[0],
            "conversations": [
                {"from": "human", "value": "<video>\n" * len(own) + "Which?"},
                {"from": "gpt", "value": answer},
            ],
        }
        for number, own in enumerate(videos)
    ]
    path.write_text(json.dumps(entries))
    return {"data": str(path), "video_root": str(folder / "clips"), "allow_outside_root": True}


def short_clip(path: Path, num_frames: int) -> str:
    write_video(np.random.default_rng(0).integers(0, 255, (num_frames, 48, 48, 3), np.uint8), path, 4.0)
    return str(path)


def test_every_distinct_video_counts_once_whatever_it_is_shown_with(folder, checkpoint, tmp_path):
    a, b, c = list(dict.fromkeys(entry["video"] for entry in entries_of(folder)))[:3]
    data = data_of(folder, tmp_path / "d.json", [a, b], [a], [b, a], [b, c, c])
    settings = settings_for(folder, **data, generation=False, likelihood=False)
    results = evaluate.evaluate(settings, *checkpoint, progress=False)
    frames = results["reconstruction"]
    assert (frames["num_videos"], frames["num_frames"]) == (3, 3 * (NUM_FRAMES - 1))
    shown = [(video["id"], sorted(set(video["next_frame"]["video"]))) for video in results["videos"]]
    assert shown == [("q0", [0, 1]), ("q3", [1])]
    ahead = evaluate.evaluate(dataclasses.replace(settings, horizons=2), *checkpoint, progress=False)
    assert "NOTE: 3 of 3 videos are in no number of the frames held back, 2 of each: not alone" in format_results(
        ahead
    )
    assert ahead["reconstruction"]["rollout"]["by_horizon"] == {} and ahead["answers"] == results["answers"]
    write_report(ahead, tmp_path / "report.html")
    assert "error by horizon" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_videos_that_a_bad_sample_takes_along_are_named(folder, checkpoint, tmp_path):
    a, b = list(dict.fromkeys(entry["video"] for entry in entries_of(folder)))[:2]
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    data = data_of(folder, tmp_path / "d.json", [a, str(bad)], [a], [b])
    settings = settings_for(folder, **data, generation=False, likelihood=False, max_bad_samples=1)
    results = evaluate.evaluate(settings, *checkpoint, progress=False)
    assert [Path(video).name for video in results["unmeasured_videos"]] == [Path(a).name] and results[
        "reconstruction"
    ]["num_videos"] == 1
    assert "NOTE: the frames of 1 videos are in no number" in format_results(results)


def test_questions_that_share_a_video_are_one_group():
    media = [("a", "b"), ("c",), (), ("c", "d"), ("b", "e"), (), ("d", "e"), ("f",)]
    questions = [
        Question(index=n, id="", question_type="", messages=[], answer="", media=own) for n, own in enumerate(media)
    ]
    assert media_groups(questions[:6]) == [0, 1, 2, 1, 0, 5]
    assert media_groups(questions) == [0, 0, 2, 0, 0, 5, 0, 7]  # the seventh has d of the fourth and e of the fifth


def test_videos_that_are_too_short_for_the_horizons_are_counted(folder, checkpoint, tmp_path):
    video, short = entries_of(folder)[0]["video"], short_clip(tmp_path / "short.mp4", 3)
    one = short_clip(tmp_path / "one.mp4", 1)
    settings = settings_for(
        folder, **data_of(folder, tmp_path / "d.json", [video], [short], [one]), generation=False, horizons=3
    )
    results = evaluate.evaluate(settings, *checkpoint, progress=False)
    rollout = results["reconstruction"]["rollout"]
    assert (rollout["num_videos"], rollout["left_out"]) == (3, {"too short": 2})
    assert rollout["by_horizon"]["3"]["num_videos"] == 1
    assert "NOTE: 2 of 3 videos are in no number of the frames held back, 3 of each: too short" in format_results(
        results
    )
    with pytest.raises(ValueError, match="horizons is 4, expected fewer than the 4 frames of num_frames"):
        dataclasses.replace(settings, horizons=4, num_frames=4)


def test_more_frames_than_there_are_give_all_of_them(folder, checkpoint):
    settings = settings_for(folder, generation=False)
    expected = evaluate.evaluate(settings, *checkpoint, progress=False)
    more = evaluate.evaluate(dataclasses.replace(settings, num_frames=NUM_FRAMES + 8), *checkpoint, progress=False)
    assert (more["answers"], more["videos"]) == (expected["answers"], expected["videos"])


def test_an_answer_that_no_generated_text_could_equal_is_refused(folder, checkpoint, tmp_path):
    video = entries_of(folder)[0]["video"]
    data = data_of(folder, tmp_path / "d.json", [video], answer="red " * 5 + "red.")
    settings = settings_for(folder, **data, max_new_tokens=5)
    with pytest.raises(ValueError, match="max_new_tokens is 5, but the answer of question q0 takes 6 tokens.* give 6"):
        evaluate.evaluate(settings, *checkpoint, progress=False)
    for options in ({"max_new_tokens": 6}, {"generation": False}):
        evaluate.evaluate(dataclasses.replace(settings, **options), *checkpoint, progress=False)
    entries = json.loads(Path(data["data"]).read_text())
    entries[0]["choices"] = [entries[0]["conversations"][1]["value"], "blue"]  # of which the letter is enough
    Path(data["data"]).write_text(json.dumps(entries))
    evaluate.evaluate(settings, *checkpoint, progress=False)


def test_bins_of_time_gaps():
    for gap in (0.0625, 0.25, 1.0, 2.0, 32.0):
        assert {gap_bin(gap * factor) for factor in (0.72, 0.9999, 1.0, 1.0001, 1.4)} == {gap}
        assert gap_bin(gap * 0.7) == gap / 2 and gap_bin(gap * 1.42) == gap * 2
    assert gap_bin(0.0) == 0.0


def frames_of(gaps: list[float], mse: list[float], copy_mse: list[float]) -> dict[str, list[float]]:
    places = {"video": [0] * len(gaps), "frame": list(range(1, len(gaps) + 1)), "gap": gaps}
    constant = {name: [0.5] * len(gaps) for name in ("cosine", "temporal_consistency", "temporal_consistency_chance")}
    return {**places, "mse": mse, "copy_mse": copy_mse, **constant}


def test_skill_by_time_gap_and_horizon():
    clips = [
        {"next_frame": frames_of([0.2, 0.3, 2.1], [1, 2, 6], [2, 4, 4]), "no_rollout": ["too short"]},
        {"next_frame": frames_of([0.25, 2.0], [3, 0], [6, 4]), "rollout": {"2": frames_of([4.0], [1], [5])}},
    ]
    summary = summarize_frames(clips, SETTINGS)
    near, far = summary["by_gap"]
    assert (near["gap"], near["num_frames"], near["num_videos"]) == (0.25, 3, 2)
    assert (near["mse"], near["copy_mse"], near["skill"], near["skill_interval"]) == (2, 4, 0.5, [0.5, 0.5])
    assert (far["gap"], far["num_frames"], far["skill"]) == (2.0, 2, 0.25)
    assert far["skill_interval"] == [-0.5, 1.0]  # that of either clip alone
    assert (near["from"], near["to"]) == (0.1768, 0.3536)
    assert summary["skill"] == pytest.approx(1 - 12 / 20) and summary["num_frames"] == 5
    assert (summary["rollout"]["num_videos"], summary["rollout"]["left_out"]) == (2, {"too short": 1})
    two = summary["rollout"]["by_horizon"]["2"]
    assert (two["num_frames"], two["skill"], two["by_gap"][0]["gap"]) == (1, 0.8, 4.0)
    assert two["skill_interval"] is None  # one clip
    still = summarize_frames([{"next_frame": frames_of([0.0], [0.0], [0.0])}], SETTINGS)
    assert still["skill"] is None and still["by_gap"][0]["gap"] == 0.0 and still["rollout"] is None
    assert summarize_frames([], SETTINGS) is None


# -- Frames in another order


def test_orders_of_frames():
    assert frame_order(5, "natural", "a") == [0, 1, 2, 3, 4]
    assert frame_order(5, "reversed", "a") == [4, 3, 2, 1, 0]
    assert frame_order(5, "shuffled", "a") == frame_order(5, "shuffled", "a")
    orders = {tuple(frame_order(3, "shuffled", str(key))) for key in range(50)}
    assert len(orders) == 5 and (0, 1, 2) not in orders  # all but the natural one
    assert frame_order(1, "shuffled", "a") == [0]


def test_reversed_frames_are_shown_at_the_natural_times(folder, checkpoint):
    model, processor = checkpoint
    results = {
        order: evaluate.evaluate(
            settings_for(folder, frame_order=order, batch_size=4), model, processor, progress=False
        )
        for order in ("natural", "shuffled", "reversed")
    }
    for number, video in enumerate(dict.fromkeys(entry["video"] for entry in entries_of(folder))):
        _, inputs = demo.predict(model, processor, folder / "clips" / video)
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].flip(1)
        with torch.inference_mode():
            (prediction,) = model.predict_next_frames(**inputs)
        measured = {order: own["videos"][number]["next_frame"] for order, own in results.items()}
        expected = prediction.frame_metrics["mse"].tolist()
        assert measured["reversed"]["mse"] == pytest.approx(expected, rel=1e-4)
        assert measured["natural"]["mse"] != pytest.approx(expected, rel=1e-3)
        assert measured["shuffled"]["mse"] != pytest.approx(measured["natural"]["mse"], rel=1e-3)
        assert measured["reversed"]["gap"] == measured["natural"]["gap"]
    answers = [[answer["log_likelihoods"] for answer in own["answers"]] for own in results.values()]
    assert answers[0] != answers[1] and answers[0] != answers[2]
    assert "control" in format_results(results["shuffled"]) and "control" not in format_results(results["natural"])


# -- The code in the folder


def test_the_code_in_the_folder_gives_the_same_results(folder):
    package, remote = (
        evaluate.evaluate(settings_for(folder, trust_remote_code=trust), progress=False) for trust in (False, True)
    )
    for name in ("question_answering", "reconstruction", "answers"):
        assert remote[name] == package[name]
    model, _ = evaluate.load_checkpoint(str(folder / "base"), trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")


# -- For people


def test_the_report_shows_what_was_wrong_and_how_to_repeat_it(folder, checkpoint, tmp_path):
    results = evaluate.evaluate(settings_for(folder, frame_order="shuffled"), *checkpoint, progress=False)
    results["answers"] = [
        {
            "id": f"<{n}>",
            "question_type": "color",
            "choices": [],
            "answer": "red",
            "generated": word,
            "exact": word == "red",
        }
        for n, word in enumerate(["red"] + ["<b>blue</b>"] * (MAX_ROWS + 5))
    ]
    results["num_bad_samples"], results["bad_samples"] = 1, [{"id": "z", "problem": "z.mp4 is damaged"}]
    write_report(results, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert f"Wrong answers: {MAX_ROWS + 5} of {MAX_ROWS + 6}" in page
    assert page.count("&lt;b&gt;blue&lt;/b&gt;") == MAX_ROWS and "<b>" not in page and "&lt;0&gt;" not in page
    assert "shuffled order" in page and "z.mp4 is damaged" in page
    assert "--frame-order shuffled" in page and torch.__version__ in page and "http" not in page
    results["reconstruction"] = None
    write_results(results, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(results))
    assert "not measured" in format_results(results)
    write_report(results, tmp_path / "r.html")
