"""Measure a checkpoint on a LLaVA-JSON data set: answers to questions, and predictions of the next frame.

    llava-next-ar evaluate --model outputs/run --data clips/test.json --output results.json
    llava-next-ar evaluate --model user/checkpoint --data clips/test.json --trust-remote-code --dtype bfloat16

    # the same numbers on all GPUs (--launch cpu: on two CPU processes; accelerate launch and torchrun serve too)
    llava-next-ar evaluate --launch ddp --model outputs/run --data test.json --output r.json
    # after a kill, on any number of processes, go on where it was
    llava-next-ar evaluate --model outputs/run --data test.json --output r.json --resume

    # which questions need no time: each video's frames in random order
    llava-next-ar evaluate --model outputs/run --data test.json --frame-order shuffled --output shuffled.json

    # a tiny model on one CPU, in seconds (`llava-next-ar demo` makes model and data)
    llava-next-ar evaluate --model demo_output/model --data demo_output/clips/test.json --max-samples 16

Question answering: of every entry the last answer is asked for, given all turns before it. `exact` is the share of
greedily generated answers that equal the reference (upper and lower case, outer spaces and a final period do not
count). For entries with `choices`, `choice` is the share of questions where the generated text names the right one, by
letter or by text (the rule: `parse_choice` in questions.py; texts that name none are wrong, and counted as
`num_unparsable`), and `likelihood` the share where the model gives the right choice the highest probability, the token
that ends its turn included. All are reported for each `question_type` beside `chance` (one over the number of choices)
and `best_guess` (always giving the most frequent answer, or the choice at the place that is most often right).

Next-frame prediction, over the distinct videos, each counted once: `mse`, `copy_mse` (of copying the last frame) and
`linear_mse` (of continuing the last two in a straight line), `skill = 1 - mse / copy_mse`, `cosine`, and
`temporal_consistency` (how often the true next frame is the nearest of its clip to the prediction), by horizon and by the
seconds between the last frame that was seen and the predicted one, in bins around powers of two: that of 0.25 s holds 0.177 to
0.354 s. These are of every frame, predicted from all true ones before it. With `--horizons N`, the last N frames of each video
(where the prompt is text and this video alone) are held back as well and predicted from those before, each from the predictions
before it, which compares horizons 1 to N (`rollout`). Intervals are 95% bootstrap intervals; questions that share a video,
be it through others, are drawn together.

The JSON output holds the results, every answer, the numbers of every predicted frame, all settings, the versions, model
and data that they were made with, and the command that repeats it. An HTML report lies beside it. Batches are the same
for any number of processes, each of which takes every n-th one, so that on devices of one kind the numbers are identical.
An entry that cannot be read is an error; with `--max-bad-samples N`, up to N are left out and listed.
"""

import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..hub.command_line import stop
from ..processing.video_decoding import choose_backend
from ..training.data import LlavaVideoDataset
from .measures import load_checkpoint, measure_batch
from .metrics import summarize_answers, summarize_frames
from .questions import PromptCollator, Prompts, Question, check_answers_fit, media_groups, read_questions
from .records import Batches, RecordFiles
from .settings import (
    EvaluationSettings,
    check_device,
    command_line,
    device_of_process,
    entries_sha256,
    hardware,
    make_parser,
    model_identity,
    resolved_revisions,
    versions,
)
from .tables import format_results, write_results

# A process that is done waits for the slowest one; a launcher ends all of them when one fails.
_PATIENCE = timedelta(days=7)
# Keys of a record that are about predicted frames, not about the answer.
_OF_FRAMES = ("next_frame", "rollout", "no_rollout")


def evaluate(
    settings: EvaluationSettings,
    model: Any = None,
    processor: Any = None,
    *,
    progress: bool = True,
    output: Path | None = None,
    resume: bool = False,
) -> dict[str, Any] | None:
    """Evaluates a checkpoint, on all processes that accelerate or torchrun started.

    Args:
        model, processor: instead of those that `settings.model` names.
        progress: show a progress bar on stderr.
        output: where the caller will write the results: records are kept beside it as they come, until the caller
            deletes them (`RecordFiles.remove`).
        resume: take over the records of an interrupted run, if there are any. Whether they are of the same weights is
            checked for a model that `settings` names, not for one that was handed over.

    Returns:
        `settings`, `versions`, `model`, `data`, `command`, `question_answering` (`all`, and `by_type`), `reconstruction`
        (None without head or videos), `num_bad_samples`, `bad_samples`, `seconds`, `run` (what the numbers do not depend
        on), `answers`, one record for each question, and `videos`, the numbers of each predicted frame. On all processes
        but the first, None.

    Raises:
        ImportError: if the library of `video_backend` cannot be imported.
        ValueError: for a bad entry of the data; for an answer that takes more than `max_new_tokens`; if records beside the
            output belong to another evaluation, or to an interrupted one that shall not be resumed.
    """
    start = time.perf_counter()
    on_cpu = torch.device(settings.device).type == "cpu"
    processes = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    device = device_of_process(settings.device, processes)
    torch.manual_seed(settings.seed)
    identity: dict[str, Any] = {"id": settings.model, "revision": None, "weights_sha256": None}
    if model is None or processor is None:
        settings, model, processor, identity = _load(settings, device, processes)
    dataset = LlavaVideoDataset(
        settings.data,
        processor,
        video_root=settings.video_root,
        allow_outside_root=settings.allow_outside_root,
        ignored_keys=(settings.ignored_keys or "").split(","),
    )
    questions = read_questions(dataset, settings.max_samples, max_bad_samples=settings.max_bad_samples)
    if settings.generation:
        check_answers_fit(questions, processor, settings.max_new_tokens)
    backend = settings.video_backend or processor.video_processor.video_backend
    provenance = {
        "settings": asdict(settings),
        "versions": {**versions(), "video_decoder": choose_backend(backend)},
        "model": identity,
        "data": {"path": settings.data, "sha256": entries_sha256(dataset.entries[: settings.max_samples])},
    }
    with _threads(settings.cpu_threads if on_cpu else torch.get_num_threads()):
        batches, num_resumed = _measure(
            settings, model, processor, questions, provenance, processes, output, resume, progress
        )
    if not processes.is_main_process:
        return None
    records = [record for number in sorted(batches) for record in batches[number]]
    answered = [(r, q) for r, q in zip(records, questions, strict=True) if "problem" not in r]
    bad = [record for record in records if "problem" in record]
    answers = [{name: value for name, value in r.items() if name not in _OF_FRAMES} for r, _ in answered]
    videos = [
        {"id": r["id"], **{name: r[name] for name in _OF_FRAMES if name in r}}
        for r, _ in answered
        if r.keys() & set(_OF_FRAMES)
    ]
    with _threads(1):  # the mean over many frames is a sum, too
        answering = summarize_answers(answers, media_groups([q for _, q in answered]), settings)
        frames = summarize_frames(videos, settings)
    measured = {question.videos[number] for _, question in answered for number in question.first_videos}
    unmeasured = {video for _, question in answered for video in question.videos} - measured
    results = {
        **provenance,
        "command": command_line(settings, output),
        "question_answering": answering,
        "reconstruction": frames,
        "num_bad_samples": len(bad),
        "bad_samples": bad,
        # Of these the frames are in no number: the question that should have measured them could not be read.
        "unmeasured_videos": sorted(unmeasured) if frames else [],
        "seconds": round(time.perf_counter() - start, 2),
        "run": {
            "num_processes": processes.num_processes,
            "hardware": hardware(settings.device),
            "num_resumed_questions": num_resumed,
        },
        "answers": answers,
        "videos": videos,
    }
    return {**results, "table": format_results(results, problems=False)}  # for the model card


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Context with a number of threads, which change the order in which a sum is rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(
    settings: EvaluationSettings, device: str | torch.device, processes: PartialState
) -> tuple[EvaluationSettings, Any, Any, dict[str, Any]]:
    """Settings with the commits of the model, the model, its processor and identity; the same on all processes."""
    is_main = processes.is_main_process
    commits = resolved_revisions(settings.model, settings.revision, settings.base_revision) if is_main else None
    ((revision, base_revision),) = broadcast_object_list([commits])
    settings = replace(settings, revision=revision, base_revision=base_revision)
    # Code of a checkpoint is copied to a cache before it runs: by one process, and not under the hands of another.
    with processes.local_main_process_first() if settings.trust_remote_code else nullcontext():
        model, processor = load_checkpoint(
            settings.model,
            trust_remote_code=settings.trust_remote_code,
            device=device,
            dtype=settings.dtype,
            revision=revision,
            base_revision=base_revision,
        )
    identity = model_identity(settings.model, model, revision, base_revision) if is_main else None
    (identity,) = broadcast_object_list([identity])
    return settings, model, processor, identity


def _measure(
    settings: EvaluationSettings,
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    provenance: dict[str, Any],
    processes: PartialState,
    output: Path | None,
    resume: bool,
    progress: bool,
) -> tuple[Batches, int]:
    """The records of all batches, on every process, and the number of questions that were taken over."""
    # The same batches for any number of processes: what else is in a batch changes the last digits of a number.
    batches = [
        list(range(first, min(first + settings.batch_size, len(questions))))
        for first in range(0, len(questions), settings.batch_size)
    ]
    files = None if output is None else RecordFiles(output, processes.process_index)
    done = _records_of_earlier_run(files, provenance, resume)
    num_resumed = sum(len(records) for records in done.values())
    pending = [number for number in range(len(batches)) if number not in done]
    own = pending[processes.process_index :: processes.num_processes]
    loader = DataLoader(
        Prompts(questions, processor, settings),
        batch_sampler=[batches[number] for number in own],
        num_workers=settings.num_workers,
        collate_fn=PromptCollator(processor),
    )
    num_bad = sum("problem" in record for records in done.values() for record in records)
    measured: Batches = {}
    if files is not None:
        files.open(provenance)
    total = sum(len(batches[number]) for number in own)
    show = progress and processes.is_main_process
    name = "evaluating" if processes.num_processes == 1 else f"evaluating (process 1 of {processes.num_processes})"
    if resume and show:
        tqdm.write(f"{num_resumed} of {len(questions)} questions were measured before", file=sys.stderr)
    with tqdm(total=total, desc=name, unit="question", disable=not show) as bar:
        for number, (inputs, problems) in zip(own, loader, strict=True):
            some = [questions[index] for index in batches[number]]
            asked = [q for q, problem in zip(some, problems, strict=True) if problem is None]
            answered = iter(measure_batch(model, processor, inputs, asked, settings) if asked else [])
            measured[number] = [
                next(answered)
                if problem is None
                else {"id": q.id, "question_type": q.question_type, "problem": problem}
                for q, problem in zip(some, problems, strict=True)
            ]
            num_bad += sum(problem is not None for problem in problems)
            if num_bad > settings.max_bad_samples:
                raise _too_many(measured[number], num_bad, settings)
            if files is not None:
                files.append(number, measured[number])
            bar.update(len(some))
    if files is not None:
        files.close()
    gathered = dict(gather_object(list(measured.items())))
    everything = {**done, **gathered}
    bad = [record for number in sorted(everything) for record in everything[number] if "problem" in record]
    if len(bad) > settings.max_bad_samples:  # each process had few enough
        raise _too_many(bad, len(bad), settings)
    return everything, num_resumed


def _records_of_earlier_run(files: RecordFiles | None, provenance: dict[str, Any], resume: bool) -> Batches:
    if files is None:
        if resume:
            raise ValueError("resume needs the output that the interrupted run was to write")
        return {}
    # Every process reads what it sees (machines need not share a disk) before any of them writes.
    found = gather_object([str(path) for path in files.existing()])
    if found and not resume:
        raise ValueError(
            f"{found[0]} holds records of an interrupted run: go on with it by --resume, or delete it to start anew"
        )
    return dict(gather_object(list(files.read(provenance).items())))


def _too_many(records: Sequence[dict[str, Any]], num_bad: int, settings: EvaluationSettings) -> ValueError:
    last = [record["problem"] for record in records if "problem" in record][-1]
    if settings.max_bad_samples == 0:
        return ValueError(last)
    return ValueError(f"{num_bad} bad samples, more than max_bad_samples={settings.max_bad_samples}, the last: {last}")


def _check_output(output: Path, *, has_report: bool) -> None:
    """Raise for an output that cannot be written, before anything is loaded."""
    if output.is_dir():
        raise ValueError(
            f"output is {output}, which is a folder: give a file to write, such as {output / 'results.json'}"
        )
    if not has_report:
        return
    report = output.with_suffix(".html")
    if output.suffix.lower() == ".html":
        raise ValueError(
            f"output is {output}, expected a JSON file: the HTML report beside it would be written to {report}"
        )
    if report.is_dir():
        raise ValueError(
            f"the report would be written to {report}, which is a folder: give --no-report, or another output"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "the HTML report needs matplotlib, which is not installed: pip install 'llava-next-ar[eval]', or give --no-report"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__.split("\n\n")[0])
    options = vars(parser.parse_args(argv))
    output, resume, no_report = (options.pop(name) for name in ("output", "resume", "no_report"))
    try:
        settings = EvaluationSettings(**options)
        if output is not None:
            _check_output(output, has_report=not no_report)
        check_device(settings.device)
        results = evaluate(settings, output=output, resume=resume)
    except (ValueError, OSError, ImportError) as error:  # the latter of a video back end
        stop(error)
    processes = PartialState()
    if results is not None:
        print(format_results(results))
        if output is not None:
            results["command"] += " --no-report" if no_report else ""
            write_results(results, output)
            print(f"\nwritten to {output}")
            if not no_report:
                from .report import write_report  # needs matplotlib, which the extra `train` does not bring

                write_report(results, output.with_suffix(".html"))
                print(f"report: {output.with_suffix('.html')}")
    processes.wait_for_everyone()
    if output is not None and processes.is_local_main_process:
        RecordFiles(output, processes.process_index).remove()
    processes.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
