"""Measure inference-time uses of the head against model-free baselines at the same budget.

    # a small model that has learned to predict motion, then one that has seen videos with frames and tokens left out
    python scripts/demo.py
    python scripts/inference_uses.py train --model demo_output/model --data demo_output/clips/train_mix.json --output uses/model
    python scripts/synthetic_clips.py --output uses/test --num-train 0 --num-test 400 --seed 7 --num-frames 8 --size 64 \\
        --question-types direction color

    # one command for each table; each writes raw numbers
    published="--results experiments/study/results/inference"
    python scripts/inference_uses.py key-frames --model uses/model --data uses/test/test.json $published
    python scripts/inference_uses.py tokens --model uses/model --data uses/test/test.json $published
    python scripts/inference_uses.py prefill --repeats 5 --shares 1 0.7 0.5 0.3 0.2 0.1 $published

    # bounded streams: a model that has seen parts of clips, on clips of the demo's length and on long ones; tables beside
    python scripts/inference_uses.py train --model demo_output/model --data demo_output/clips/train_mix.json \\
        --output uses/stream_model --steps 200 --learning-rate 1e-3 --whole-share 0
    clips="scripts/synthetic_clips.py --num-train 0 --seed 7 --size 64 --question-types direction"
    python $clips --output uses/steady --num-test 64 --num-frames 8
    python $clips --output uses/long --num-test 32 --num-frames 32
    streams="scripts/inference_uses.py streams --model uses/stream_model --results experiments/study/results/inference"
    python $streams --data uses/steady/test.json --name steady --num-kept 3 4 6
    python $streams --data uses/long/test.json --name long --num-frames 32 --num-kept 4 8 16 --batch-size 8

    # methods without a model alone: the time of each, and the moments that their key frames show
    python scripts/inference_uses.py moments --data glimpse/still/test.json --num-frames 32 --name still $published

    # raw numbers -> tables.md and accuracy.png beside them
    python scripts/inference_uses.py tables $published

The same where a short moment alone shows the answer, in clips in which the rest stands still, moves steadily, or moves faster
and slower in turn; numbers go to experiments/study/results/inference_glimpse/:

    clips="scripts/synthetic_clips.py --num-frames 32 --size 48"
    python $clips --output glimpse/clips --num-train 960 --num-test 240 --question-types glimpse busy_glimpse surging_glimpse
    python $clips --output glimpse/still --num-train 0 --num-test 240 --seed 7 --question-types glimpse
    python $clips --output glimpse/busy --num-train 0 --num-test 240 --seed 7 --question-types busy_glimpse
    python $clips --output glimpse/surging --num-train 0 --num-test 240 --seed 7 --question-types surging_glimpse

    # one thread; the head's motion first, then answers, then with frames and tokens left out
    export OMP_NUM_THREADS=1
    python scripts/tiny_checkpoint.py --data glimpse/clips/train.json --output glimpse/base --num-frames 32 --image-size 48
    train="scripts/train.py --config scripts/configs/demo.yaml --train_data glimpse/clips/train.json --num_frames 32"
    train="$train --per_device_train_batch_size 8"
    python $train --model glimpse/base --output_dir glimpse/trained --max_steps 900
    python $train --model glimpse/trained --output_dir glimpse/trained_b --max_steps 450 --loss_weight 2
    python scripts/inference_uses.py train --model glimpse/trained_b --data glimpse/clips/train.json --output glimpse/model \\
        --steps 900 --batch-size 8 --num-frames 2 4 8 16 32

    for name in still busy surging; do
        options="--model glimpse/model --data glimpse/$name/test.json --name $name"
        options="$options --results experiments/study/results/inference_glimpse"
        python scripts/inference_uses.py key-frames $options --num-kept 2 4 8 16
        python scripts/inference_uses.py tokens $options
        python scripts/evaluate.py --model glimpse/model --data glimpse/$name/test.json  # skill
    done
    python scripts/inference_uses.py tables --results experiments/study/results/inference_glimpse --name still busy surging

`key-frames`: of a dense sampling, K frames are shown. Chosen evenly, at random, or by a score of each frame (measures.py). A
score chooses in two ways: `top` takes the first frame and the K - 1 highest, `spread` goes in equal steps along the sum of the
scores.

`tokens`: a share of each video's patch tokens reaches the language model; the others are dropped before it, and those that
stay keep their positions. Chosen by a score of each patch. The first frame comes first in all of them, and uses up a share
below one over the number of frames. Newline tokens stay and do not count.

`streams`: the video is read as a stream in a cache of K frames (streams.py). The departure of its surprise from the
unbounded stream, and answers to a question at the end, against K frames at even steps and the last K frames.

`moments`: the key frames of the methods without a model, and whether they show the moment of the question.

`prefill`: seconds and memory of the cache over the share, and the cost of the scores.

Accuracy is that of the most probable choice, over the questions that not every frame answers. Intervals are 95% bootstrap
intervals over clips; differences are paired. Where entries have a `moment` (the seconds of the first and last frame that show
the answer), key frames are counted that show it. Any checkpoint with a head and any LLaVA JSON with `choices` and one video for
each question will do.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ...evaluation.measures import load_checkpoint
from ...evaluation.questions import Question, read_questions
from ...evaluation.settings import (
    EvaluationSettings,
    check_device,
    entries_sha256,
    hardware,
    model_identity,
    resolved_revision,
    versions,
)
from ...evaluation.tables import write_results
from ...hub.command_line import CommandParser, stop
from ...training.data import LlavaVideoDataset
from .measures import measure_key_frames, measure_tokens
from .moments import measure_moments
from .streams import measure_streams, write_stream_tables
from .tables import check_choice_matters, write_tables
from .timing import PrefillSettings, measure_prefill
from .training import train_with_parts_left_out

RESULTS = Path("outputs/inference_uses")


def measure(
    kind: str,
    settings: EvaluationSettings,
    budgets: Sequence[float],
    *,
    model: Any = None,
    processor: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The raw numbers of a table.

    Args:
        kind: `key_frames` or `streams`, where budgets are numbers of frames, or `tokens`, where they are shares.
        model, processor: instead of those that `settings.model` names.

    Returns:
        settings, versions, model and data; `questions`; and `conditions`: the fields of each `Condition`.

    Raises:
        ValueError: for a model without a head, a question without choices or with other media than one video, or, of key
            frames, a processor that writes into the prompt which frames there are.
    """
    settings = replace(settings, generation=False, reconstruction=False)
    budgets = list(dict.fromkeys(budgets))
    identity = {}
    if model is None:
        revision = resolved_revision(settings.model, settings.revision)
        settings = replace(settings, revision=revision)
        options = {"trust_remote_code": settings.trust_remote_code, "device": settings.device, "dtype": settings.dtype}
        model, processor = load_checkpoint(settings.model, revision=revision, **options)
        identity = model_identity(settings.model, model, revision)
    if kind != "tokens" and processor.add_time_instruction:
        raise ValueError(
            "the processor has add_time_instruction on: its prompts state the number and times of all frames, not of the key "
            "frames; turn it off in the checkpoint's processor"
        )
    dataset = LlavaVideoDataset(settings.data, processor, video_root=settings.video_root)
    questions = read_questions(dataset, settings.max_samples)
    _check_questions(questions)
    check_choice_matters([question.question_type for question in questions])
    results: dict[str, Any] = {
        "settings": asdict(settings),
        "budgets": budgets,
        "versions": versions(),
        "model": identity,
        "data": {"path": settings.data, "sha256": entries_sha256(dataset.entries[: settings.max_samples])},
        "hardware": hardware(settings.device),
    }
    measure_all = {"key_frames": measure_key_frames, "tokens": measure_tokens, "streams": measure_streams}[kind]
    conditions = measure_all(model, processor, questions, settings, budgets, progress=progress)
    results["questions"] = [
        {"id": q.id, "question_type": q.question_type, "video": Path(q.media[0]).name, "num_choices": len(q.choices)}
        for q in questions
    ]
    results["conditions"] = [asdict(condition) for condition in conditions]
    return results


def _check_questions(questions: Sequence[Question]) -> None:
    for question in questions:
        if not question.choices:
            raise ValueError(f"question {question.id} has no choices, and is scored by the most probable one")
        if len(question.media) != 1:
            raise ValueError(f"question {question.id} is about {len(question.media)} images and videos, expected one")


def main(argv: Sequence[str] | None = None) -> None:
    parser = _make_parser()
    options = vars(parser.parse_args(argv))
    command = shlex.join(["python", "scripts/inference_uses.py", *(sys.argv[1:] if argv is None else argv)])
    job, results = options.pop("job"), options.pop("results", RESULTS)
    logging.set_verbosity_error()
    try:
        check_device(options.get("device", "cpu"))
        if job == "train":
            train_with_parts_left_out(**options)
        elif job == "tables":
            print(write_tables(results, options["name"]))
        elif job == "moments":
            name = options["name"]
            _write({"command": command, **measure_moments(**options)}, results / f"moments_{name}.json")
        elif job == "prefill":
            shares = options.pop("shares")
            settings = PrefillSettings(**options)
            numbers = measure_prefill(settings, shares)
            made_with = {"settings": asdict(settings), "versions": versions(), "hardware": hardware(settings.device)}
            _write({"command": command, **made_with, **numbers}, results / "prefill.json")
        else:
            budgets, name = options.pop("budgets"), options.pop("name")
            kind = job.replace("-", "_")
            settings = EvaluationSettings(**options)
            numbers = {"command": command, **measure(kind, settings, budgets)}
            _write(numbers, results / f"{kind}_{name}.json")
            if kind == "streams":
                write_stream_tables(numbers, results / f"streams_{name}.md")
    except (ValueError, OSError) as error:
        stop(error)


def _write(results: dict[str, Any], path: Path) -> None:
    write_results(results, path)
    tables = shlex.join(["python", "scripts/inference_uses.py", "tables", "--results", str(path.parent)])
    print(f"written to {path}; `{tables}` makes tables of it")


def _make_parser() -> argparse.ArgumentParser:
    defaults = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    parser = CommandParser(description=__doc__.split("\n\n")[0], **defaults)
    jobs = parser.add_subparsers(dest="job", required=True)

    train = jobs.add_parser("train", help="on videos with frames and tokens left out", **defaults)
    train.add_argument("--model", required=True, help="checkpoint with a head to go on from")
    train.add_argument("--data", type=Path, required=True, help="LLaVA JSON with one video for each entry")
    train.add_argument("--output", type=Path, required=True, help="folder of the model")
    train.add_argument("--steps", type=int, default=700)
    train.add_argument("--batch-size", type=int, default=16)
    train.add_argument("--learning-rate", type=float, default=2e-3)
    train.add_argument(
        "--num-frames", type=int, nargs="+", default=[2, 3, 4, 6, 8], help="to draw from, of each video"
    )
    train.add_argument(
        "--whole-share", type=float, default=0.55, help="of the steps, the first, that leave nothing out"
    )
    train.add_argument("--seed", type=int, default=0)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for job, name, kind, budgets in (
        ("key-frames", "--num-kept", int, [2, 3, 4]),
        ("tokens", "--shares", float, [0.7, 0.5, 0.3, 0.2, 0.1]),
        ("streams", "--num-kept", int, [2, 3, 4, 6]),
    ):
        own = jobs.add_parser(job, help=f"accuracy by {name.strip('-')}", **defaults)
        own.add_argument("--model", required=True, help="checkpoint with a head: a folder or a Hub id")
        own.add_argument("--data", required=True, help="LLaVA JSON with choices, one video for each question")
        own.add_argument(name, dest="budgets", type=kind, nargs="+", default=budgets)
        own.add_argument("--trust-remote-code", action="store_true", help="run the code that the checkpoint carries")
        own.add_argument("--num-frames", type=int, help="of the dense sampling, if not those of the processor")
        own.add_argument("--max-samples", type=int, help="number of first questions to take")
        own.add_argument("--name", default="test", help="of the data, in the name of the results")
        own.add_argument("--batch-size", type=int, default=32)
        own.add_argument("--device", default=device)
        own.add_argument("--seed", type=int, default=0)
        own.add_argument("--results", type=Path, default=RESULTS, help="folder for the raw numbers")

    moments = jobs.add_parser("moments", help="key frames without a model", **defaults)
    moments.add_argument(
        "--data", type=Path, required=True, help="LLaVA JSON with `moment`, one video for each question"
    )
    moments.add_argument("--num-frames", type=int, default=32, help="of the dense sampling, at even steps")
    moments.add_argument("--num-kept", dest="budgets", type=int, nargs="+", default=[2, 4, 8, 16])
    moments.add_argument("--name", default="test", help="of the data, in the name of the results")
    moments.add_argument("--seed", type=int, default=0)
    moments.add_argument("--results", type=Path, default=RESULTS, help="folder for the raw numbers")

    prefill = jobs.add_parser("prefill", help="time and memory by share", **defaults)
    sizes = PrefillSettings()
    for name in ("num_layers", "num_frames", "repeats"):
        prefill.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(sizes, name))
    prefill.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5, 0.3, 0.2, 0.1], help="beside 1")
    prefill.add_argument("--device", default=device)
    prefill.add_argument("--results", type=Path, default=RESULTS, help="folder for the raw numbers")

    tables = jobs.add_parser("tables", help="raw numbers -> tables and a plot", **defaults)
    tables.add_argument("--results", type=Path, default=RESULTS, help="folder of the raw numbers")
    tables.add_argument("--name", nargs="+", default=["test"], help="of the data that the plot shows")
    return parser


if __name__ == "__main__":
    main()
