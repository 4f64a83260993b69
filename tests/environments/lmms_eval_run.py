"""Run lmms-eval itself on a tiny checkpoint, in an environment of its own, and compares with scripts/evaluate.py.

    python tests/environments/lmms_eval_run.py                    # what `make test-lmms-eval` runs
    python tests/environments/lmms_eval_run.py --folder outputs/lmms_eval     # keep environment, tasks, logs and results

lmms-eval requires torchvision, an old release of PyAV and some sixty other packages. Here it is installed without them: its
wheel alone, and the imports of its command line that this environment lacks, whose packages the new one sees. The model comes
by the entry point that this package has for lmms-eval.

Tasks are made of clips of scripts/synthetic_clips.py: a question with a video and a generated answer (`clips_exact`), with a
picture (`clips_picture`), its choices by likelihood (`clips_choice`), and a conversation of two rounds (`clips_rounds`). Public
tasks run with their own definitions on stand-in data (public_tasks.py). Each runs in batches of 1 and of 4, and on two
processes. The checkpoint is trained for some steps, so that it is right at times.

Exit code 1 unless every text and every loss is the same in all runs (losses to 1e-5) and the same as those of
scripts/evaluate.py where that asks the same.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from own_environment import install, make_environment, run
from PIL import Image
from public_tasks import PUBLIC_METRICS, public_entries, write_public_data
from tqdm import tqdm

from llava_next_ar.evaluation import evaluate
from llava_next_ar.evaluation.settings import EvaluationSettings
from llava_next_ar.experiments.demo.tiny_checkpoint import build_tiny_checkpoint, texts_of
from llava_next_ar.experiments.temporal.synthetic_clips import write_dataset
from llava_next_ar.processing.video_frames import FrameSampling, load_video
from llava_next_ar.training.collator import LlavaVideoCollator
from llava_next_ar.training.data import LlavaVideoDataset

ROOT = Path(__file__).resolve().parents[2]
LMMS_EVAL = "lmms-eval==0.7.3"
# Packages that its command line imports and this project's environment lacks.
NEEDED = ("evaluate", "loguru", "pytablewriter", "pytz", "sacrebleu", "tenacity")
QUESTION_TYPES = ("next", "bounce", "color")
MAX_NEW_TOKENS = 4
TOLERANCE = 1e-5
# Name of a run -> what stands before `-m lmms_eval`, and the batch size.
RUNS = {
    "batch 1": ((), 1),
    "batch 4": ((), 4),
    "two processes": (
        ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"),
        4,
    ),
}

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {documents}
test_split: test
output_type: {output_type}
doc_to_visual: !function utils.{visual}
doc_to_text: {text}
doc_to_target: answer
"""
_GENERATION = f"""\
generation_kwargs:
  max_new_tokens: {MAX_NEW_TOKENS}
  do_sample: false
"""
_EXACT = """\
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
"""
_CHOICE = """\
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
_ROUNDS = """\
process_results: !function utils.answers_of_rounds
metric_list:
  - metric: num_rounds
    aggregation: mean
    higher_is_better: true
"""
_UTILS = '''\
"""Visuals, prompts and results of a document."""

from PIL import Image


def video(document):
    return [document["video"]]


def picture(document):
    return [Image.open(document["picture"]).convert("RGB")]


def next_round(document, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return document["question"]
    return [document["video"]], f"You said {previous_output[-1]}. Why?", round_idx == 2, previous_output, None


def answers_of_rounds(document, results):
    (texts,) = results
    return {"num_rounds": float(len(texts))}
'''


# -- Tasks and checkpoint


def make_tasks(folder: Path, clips: Path, entries: Sequence[dict[str, Any]]) -> None:
    """YAML files as lmms-eval reads them, with their documents and pictures."""
    folder.mkdir(parents=True)
    documents = folder / "documents.jsonl"
    with open(documents, "w", encoding="utf-8") as file:
        for entry in entries:
            video, picture = clips / entry["video"], folder / f"{Path(entry['video']).stem}.png"
            if not picture.exists():
                frame = load_video(video, FrameSampling(policy="uniform", num_frames=1)).frames[0]
                Image.fromarray(frame.permute(1, 2, 0).numpy()).save(picture)
            question, answer = (turn["value"] for turn in entry["conversations"])
            document = {
                "question": question.removeprefix("<video>\n"),
                "video": str(video),
                "picture": str(picture),
                "choices": entry["choices"],
                "answer": answer,
            }
            file.write(json.dumps(document) + "\n")
    (folder / "utils.py").write_text(_UTILS)
    for name, output_type, visual, text, rest in (
        ("clips_exact", "generate_until", "video", "question", _GENERATION + _EXACT),
        ("clips_picture", "generate_until", "picture", "question", _GENERATION + _EXACT),
        ("clips_choice", "multiple_choice", "video", "question", _CHOICE),
        (
            "clips_rounds",
            "generate_until_multi_round",
            "video",
            "!function utils.next_round",
            _GENERATION + _ROUNDS,
        ),
    ):
        task = _TASK.format(name=name, documents=documents, output_type=output_type, visual=visual, text=text)
        (folder / f"{name}.yaml").write_text(task + rest)


def make_checkpoint(folder: Path, data: Path, entries: Sequence[dict[str, Any]], num_steps: int = 20) -> None:
    """A tiny model that was trained on the answers for some steps: right at times."""
    model = build_tiny_checkpoint(folder, texts_of(entries))
    _, processor = evaluate.load_checkpoint(str(folder))
    dataset = LlavaVideoDataset(data, processor)
    batch = LlavaVideoCollator(processor)([dataset[index] for index in range(len(dataset))])
    optimizer = torch.optim.AdamW(model.model.language_model.parameters(), lr=3e-3)
    for _ in tqdm(range(num_steps), desc="training", unit="step", disable=None):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)


# -- Runs


def run_lmms_eval(python: Path, folder: Path, name: str, checkpoint: Path) -> dict[str, Any]:
    """Results of a run: for each task its `metrics`, and what was `said` to each document.

    That is a list of texts, or of the loss of each choice with True if it is greedy.
    """
    launcher, batch_size = RUNS[name]
    output = folder / name.replace(" ", "_")
    tasks = [*sorted(path.stem for path in (folder / "tasks").glob("*.yaml")), *PUBLIC_METRICS]
    command = (
        *(
            python,
            *launcher,
            "-m",
            "lmms_eval",
            "--model",
            "llava_next_ar",
            "--model_args",
            f"pretrained={checkpoint}",
        ),
        *("--device", "cpu", "--batch_size", batch_size, "--tasks", ",".join(tasks)),
        *("--include_path", folder / "tasks", "--log_samples", "--output_path", output),
        *("--verbosity", "DEBUG"),  # otherwise a run that failed ends with 0, too
    )
    run(*command, log=folder / f"{output.name}.log")
    (results,) = output.rglob("*_results.json")
    metrics = json.loads(results.read_text())["results"]
    found = {}
    for task in tasks:
        (samples,) = output.rglob(f"*_samples_{task}.jsonl")
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
        numbers = {key.partition(",")[0]: value for key, value in metrics[task].items() if isinstance(value, float)}
        found[task] = {
            "metrics": {key: value for key, value in numbers.items() if "_stderr" not in key},
            "said": [_as_logged(line["filtered_resps"]) for line in lines],
        }
    return found


def _as_logged(responses: Any) -> list[Any]:
    """lmms-eval writes numbers as text, and a single text without a list around it."""
    if isinstance(responses, str):
        return [responses]
    return [text if isinstance(text, str) else (float(text[0]), text[1] == "True") for text in responses]


def run_evaluate(checkpoint: Path, data: Path, public: Path) -> dict[str, Any]:
    """The same of scripts/evaluate.py, for the tasks that it supports.

    Args:
        data: of the tasks of clips.
        public: LLaVA JSON of the questions of the public tasks.

    Raises:
        ValueError: if a text would be judged over the network, as tempcompass does with all but yes and no.
    """
    settings = EvaluationSettings(
        model=str(checkpoint), data=str(data), max_new_tokens=MAX_NEW_TOKENS, reconstruction=False, bootstrap_samples=0
    )
    results = evaluate.evaluate(settings)
    accuracy, answers = results["question_answering"]["all"], results["answers"]
    asked = evaluate.evaluate(dataclasses.replace(settings, data=str(public), likelihood=False))
    texts = {
        task: [[answer["generated"]] for answer in asked["answers"] if answer["question_type"] == task]
        for task in PUBLIC_METRICS
    }
    others = [text for (text,) in texts["tempcompass_yes_no"] if not text.startswith(("yes", "no"))]
    if others:
        raise ValueError(f"answers of the tiny model to tempcompass are {others}, expected yes or no")
    return {
        **{
            task: {
                "metrics": {metric: scale * asked["question_answering"]["by_type"][task]["exact"]},
                "said": texts[task],
            }
            for task, (metric, scale) in PUBLIC_METRICS.items()
        },
        "clips_exact": {
            "metrics": {"exact_match": accuracy["exact"]},
            "said": [[answer["generated"]] for answer in answers],
        },
        "clips_choice": {
            "metrics": {"acc": accuracy["likelihood"]},
            "said": [[(-number, None) for number in answer["log_likelihoods"]] for answer in answers],
        },
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Differences between `found` and `expected`, for the tasks in `expected`."""
    lines = []
    for task, wanted in expected.items():
        for key, value in wanted["metrics"].items():
            if abs(found[task]["metrics"][key] - value) > 1e-9:
                lines.append(f"{task}: {key} is {found[task]['metrics'][key]}, expected {value}")
        for number, (own, other) in enumerate(zip(found[task]["said"], wanted["said"], strict=True)):
            if not all(_is_same(*pair) for pair in zip(own, other, strict=True)):
                lines.append(f"{task}, document {number}: {own}, expected {other}")
    return lines


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, str):
        return one == other
    (loss, is_greedy), (expected, expected_greedy) = one, other
    return abs(loss - expected) <= TOLERANCE * abs(expected) and expected_greedy in (None, is_greedy)


def _without(entry: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != key}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--folder", type=Path, help="keep everything in this folder, new or empty; else a temporary one"
    )
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="lmms_eval_") as temporary:
        folder = Path(temporary if options.folder is None else options.folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        clips, checkpoint = folder / "clips", folder / "checkpoint"
        entries = write_dataset(
            clips, num_train=0, num_test=8, size=48, num_frames=8, question_types=QUESTION_TYPES, progress=False
        )["test"]
        public = public_entries(entries)
        (clips / "public.json").write_text(json.dumps([_without(entry, "source") for entry in public]))
        (clips / "all.json").write_text(json.dumps([*entries, *json.loads((clips / "public.json").read_text())]))
        make_checkpoint(checkpoint, clips / "all.json", [*entries, *public])
        make_tasks(folder / "tasks", clips, entries)
        write_public_data(folder, clips, [*entries, *public])
        expected = {"scripts/evaluate.py": run_evaluate(checkpoint, clips / "test.json", clips / "public.json")}
        try:
            log = folder / "environment.log"
            python = make_environment(folder / "environment", log)
            install(python, "--no-deps", LMMS_EVAL, log=log)
            install(python, "-c", ROOT / "constraints.txt", *NEEDED, log=log)
            for name in tqdm(RUNS, desc="lmms-eval", unit="run", disable=None):
                expected[name] = run_lmms_eval(python, folder, name, checkpoint)
        except subprocess.SubprocessError as error:
            logs = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
            print(f"{error}\n{logs[-1].read_text(errors='replace')[-3000:]}", file=sys.stderr)
            return 1
    first = expected["batch 1"]
    wrong = [f"{name}: {line}" for name in expected for line in differences(first, expected[name])]
    print(f"{LMMS_EVAL}, {len(entries)} documents in each task")
    for task in first:
        numbers = {
            name: ", ".join(f"{key} {value:.4f}" for key, value in run[task]["metrics"].items())
            for name, run in expected.items()
            if task in run
        }
        print(f"{task:<26}" + "   ".join(f"{name}: {number}" for name, number in numbers.items()))
    print("\n".join(wrong) or "every text and every loss is the same in all of them")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
