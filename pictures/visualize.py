"""Draw a checkpoint's predictions, surprise, attention and tokens for a video.

    llava-next-ar visualize --model outputs/run --video clip.mp4 --output pictures
    llava-next-ar visualize --model user/checkpoint --video a.mp4 b.mp4 --num-frames 32 --question "What falls down?" \\
        --output pictures --trust-remote-code

    # a tiny model on one CPU, in seconds (`llava-next-ar demo` makes model and clips)
    llava-next-ar visualize --model demo_output/model --video demo_output/clips/videos/test_00000.mp4 --output pictures

Writes `index.html`, one page with everything in it, a folder of PNG files for each video, and `numbers.json` with the numbers
behind them (of six digits; errors and surprise by frame and patch, attention by layer, frame and patch, the tokens of each
frame, features as coordinates on their principal components). The pictures:

    film        frames, and their features as colours: true, predicted from the frames before, copied from the last one
    errors      error of the prediction and of copying, by patch
    surprise    the error over that of copying and a floor (see frame_surprise.py) by time; over that of copying, by patch
    attention   attention of the answer to the question: by frame and patch, and by layer
    layout      tokens of each frame, with their positions in the prompt
    mask        frames that the head attends to

The output folder may exist. A second run replaces its `index.html`, `numbers.json` and pictures of the same videos, and reports
that; pictures of other videos stay. Use a folder for each run to keep both pages.

A checkpoint without a head, and a video of one frame, get the pictures that need no prediction. Page and numbers name each
picture that is left out, with the reason, and each video that cannot be read. The exit code is 1 if a video cannot be read, and
2 if nothing could be drawn or written.
"""

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from ..configuration.frame_token_layout import VideoTokens
from ..evaluation.html_page import Report
from ..evaluation.measures import load_checkpoint
from ..evaluation.questions import sampling_options
from ..evaluation.settings import (
    HelpFormatter,
    VideoOptions,
    add_video_options,
    check_device,
    model_identity,
    resolved_revision,
    versions,
)
from ..hub.command_line import CommandParser, stop
from ..modeling.frame_surprise import SURPRISE_FLOOR
from .attention import answer_attention, attention_layers, attention_maps, attention_numbers
from .features import error_figure, features_of, film_figure, fit_basis
from .layout import layout_figure, layout_numbers, mask_figure, sequence_figure
from .strip import NotThereError, legible, save_figure, shorten, shorten_text, unnormalise
from .surprise import copying_surprise, surprise_maps, surprise_of, surprise_timeline

# Sections of the page: heading, explanation, and its pictures with their alternative texts.
SECTIONS = (
    (
        "True and predicted features",
        "The vision features of each frame as colours, on one basis for all rows, the principal components of the true ones: "
        "lightness is the first, blue to yellow the second, green to red the third. Equal colours are equal features. The "
        "first frame cannot be predicted.",
        {"film": "frames above their true, predicted and copied features"},
    ),
    (
        "Where predictions are wrong",
        "The squared error of each patch below its frame, of the prediction and of copying the frame before, on one scale.",
        {"errors": "errors of predicting and of copying below the frames"},
    ),
    (
        "Surprise",
        "Surprise is the error of the prediction, divided by the error of copying the last frame plus a floor. The floor keeps "
        "noise in static patches from counting as surprise. 1 is the error of copying plus the floor. The surprise of copying "
        "itself is below 1, and far below 1 where little moves; it is drawn beside that of the prediction. Marks and colours "
        "compare with copying: a patch with the error of copying is neutral, and so is one in which both errors are far below "
        "the floor. Each thumbnail is the most surprising frame of its stretch of time.",
        {
            "surprise": "surprise and errors over time",
            "surprise_maps": "error of each patch over that of copying, the floor added to both, below the frames",
        },
    ),
    (
        "Attention of the answer",
        "Attention of the answer's tokens, mean over these tokens and the heads: by patch below the frames (mean over layers "
        "too; bright is high), and by layer. Language models attend much to the first tokens of any prompt.",
        {"attention": "attention of the answer below the frames", "attention_layers": "attention of the answer by layer"},
    ),
    (
        "From frames to tokens",
        "The prompt as the language model reads it, and each frame cut into its tokens, with their positions in the prompt.",
        {"sequence": "the parts of the prompt by position", "layout": "frames cut into tokens"},
    ),
    (
        "Frames that the head attends to",
        "Rows are the frames from which the next one is predicted. Columns are the frames whose hidden states the head attends "
        "to. Each hidden state comes from the language model, which has read all frames up to its own.",
        {"mask": "attention mask of the head by frame"},
    ),
)  # fmt: skip

# Added for a head with a causal mask.
FORESIGHT = "Each column is predicted from the columns to its left alone."


@dataclass(frozen=True, kw_only=True)
class VisualizeSettings(VideoOptions):
    """All settings of the pictures."""

    model: str
    videos: tuple[str, ...]
    revision: str | None = None
    """Of a model on the Hub. In the output it is the commit that was loaded."""
    question: str = "What happens in this video?"
    max_new_tokens: int = 16
    trust_remote_code: bool = False
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.videos:
            raise ValueError("videos is empty, expected at least one file")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype is {self.dtype!r}, expected one such as float32 or bfloat16")

    def command_line(self, output: Path) -> str:
        """The command that repeats it, every setting spelled out."""
        words = [
            "llava-next-ar",
            "visualize",
            "--model",
            self.model,
            "--output",
            str(output),
            "--video",
            *self.videos,
        ]
        names = ("revision", "question", "max_new_tokens", "device", "dtype")
        values = {name: getattr(self, name) for name in names} | self.video_options()
        for name, value in values.items():
            words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join(words + ["--trust-remote-code"] * self.trust_remote_code)


# -- One video


class Album:
    """The pictures of one video, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.widths: dict[str, int] = {}

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.png"

    def add(self, name: str, figure: Figure, scale: float = 1) -> None:
        """Saves a figure; `scale` is its size on the page relative to its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.widths[name] = round(scale * save_figure(figure, self.path(name)))

    def remove_others(self) -> None:
        """Deletes pictures of an earlier run that this one does not have."""
        for name in (name for _, _, pictures in SECTIONS for name in pictures if name not in self.widths):
            self.path(name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Clip:
    """Video as the model reads it.

    Attributes:
        video: its file.
        name: for titles.
        inputs: of the model, with the question.
        frames: `[T, H, W, 3]` in 0 to 1.
        times: `[T]` float32, seconds from the start of the file.
        frame_types: slow (0) or fast (1), if the video processor chose types.
        tokens: its token map.
        first_position: position of its first token in the prompt.
    """

    video: str
    name: str
    inputs: dict[str, torch.Tensor]
    frames: np.ndarray
    times: torch.Tensor
    frame_types: list[int] | None
    tokens: VideoTokens
    first_position: int


def read_clip(
    model: Any, processor: Any, video: str, settings: VisualizeSettings, device: str | torch.device | None = None
) -> Clip:
    """Read a video with its question, as inputs on a device; that of the model if None.

    Raises:
        ValueError, OSError: if the video cannot be read with the settings.
    """
    content = [{"type": "video", "path": video}, {"type": "text", "text": settings.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=sampling_options(processor, **settings.video_options()),
    )
    inputs = {name: value.to(model.device if device is None else device) for name, value in inputs.items()}
    video_processor = processor.video_processor
    frames = unnormalise(inputs["pixel_values_videos"][0], video_processor.image_mean, video_processor.image_std)
    types = inputs["video_frame_types"][0].tolist() if "video_frame_types" in inputs else None
    return Clip(
        video=video,
        name=legible(shorten(Path(video).name)),
        inputs=inputs,
        frames=frames,
        times=inputs["video_timestamps"][0].cpu(),
        frame_types=types,
        tokens=model.config.frame_token_layout.video(len(frames), types),
        first_position=int((inputs["input_ids"][0] == model.config.video_token_id).nonzero()[0]),
    )


def draw_layout(model: Any, processor: Any, clip: Clip, settings: VisualizeSettings, album: Album) -> dict[str, Any]:
    length = clip.inputs["input_ids"].shape[1]
    layout = layout_numbers(clip.tokens, clip.first_position)
    album.add("sequence", sequence_figure(layout, clip.tokens, length, f"{clip.name}: the prompt, {length} tokens"))
    title = f"{clip.name}: frames cut into tokens"
    album.add("layout", layout_figure(clip.frames, clip.times.tolist(), layout, title))
    return {"num_prompt_tokens": length, **layout}


@torch.inference_mode()
def draw_prediction(
    model: Any, processor: Any, clip: Clip, settings: VisualizeSettings, album: Album
) -> dict[str, Any]:
    """Features, errors, surprise and the head's mask.

    Raises:
        NotThereError: if the model has no head, or the video has one frame alone.
    """
    if model.autoregressive_module is None:
        raise NotThereError("the checkpoint has no head that predicts (enable_autoregressive=False)")
    if len(clip.frames) < 2:
        raise NotThereError("the video has one frame alone, so that no frame can be predicted")
    (prediction,) = model.predict_next_frames(**clip.inputs)
    surprise = surprise_of(prediction, clip.times)
    features = features_of(prediction)
    basis = fit_basis(features)
    shown = (clip.frames, clip.times.tolist())
    head, layout = model.config.autoregressive_config, model.config.frame_token_layout
    # As in the head: types of the token layout, or else those that the video processor chose.
    kinds = clip.tokens.frame_types if layout.is_slow_fast else clip.frame_types
    mask, mask_picture = mask_figure(head, len(clip.frames), kinds)
    title = f"{clip.name}: features as colours ({basis.explained.sum():.0%} of their variance)"
    album.add("film", film_figure(*shown, features, basis, title))
    album.add("errors", error_figure(*shown, surprise, f"{clip.name}: errors"))
    album.add("surprise", surprise_timeline(*shown, surprise, f"{clip.name}: surprise over time"))
    album.add(
        "surprise_maps", surprise_maps(*shown, surprise, f"{clip.name}: error of each patch over that of copying")
    )
    album.add("mask", mask_picture, scale=0.75)
    return {
        "frame_index": surprise.frame_index,
        **prediction.frame_metrics,
        "metrics": prediction.metrics,
        "sees_later_frames": not head.use_frame_causal_mask,
        # The last layer of an untrained head is zero.
        "is_copy": all(torch.equal(a, b) for a, b in zip(prediction.predictions, prediction.copies, strict=True)),
        "errors": surprise.errors,
        "copy_errors": surprise.copy_errors,
        "surprise": surprise.frames,
        "copying_surprise": copying_surprise(surprise),
        "surprise_patches": surprise.patches,
        "surprise_floor": SURPRISE_FLOOR,
        "floors": surprise.floors,
        "basis": asdict(basis),
        "features": {kind: [basis.coordinates(frame) for frame in some] for kind, some in features.items()},
        "head_mask": mask,
    }


def draw_attention(
    model: Any, processor: Any, clip: Clip, settings: VisualizeSettings, album: Album
) -> dict[str, Any]:
    """Answer to the question, and attention of its tokens.

    Raises:
        NotThereError: if the language model returns no weights.
    """
    attention = answer_attention(model, processor, clip.inputs, settings.max_new_tokens)
    numbers = attention_numbers(attention.weights, clip.tokens, clip.first_position)
    said = legible(repr(shorten_text(attention.answer, 40))) if attention.answer else "(no words)"
    title = f"{clip.name}: attention of the answer {said}"
    album.add("attention", attention_maps(clip.frames, clip.times.tolist(), numbers, title))
    album.add("attention_layers", attention_layers(numbers, title))
    return {"answer": attention.answer, "num_answer_tokens": attention.num_tokens, **numbers}


# Parts of the numbers: the function that draws each, and the names of its pictures.
PARTS = {
    "layout": (draw_layout, ("sequence", "layout")),
    "prediction": (draw_prediction, ("film", "errors", "surprise", "surprise_maps", "mask")),
    "attention": (draw_attention, ("attention", "attention_layers")),
}


def draw_video(
    model: Any, processor: Any, video: str, settings: VisualizeSettings, album: Album, bar: tqdm
) -> dict[str, Any]:
    """Draws all pictures of one video.

    Args:
        album: folder of the pictures.
        bar: advanced by one for each of `PARTS`.

    Returns:
        its numbers: `video`, `seconds` of each frame, `question`, each of `PARTS` (None where left out), and `left_out` with
        the reason for each missing picture. If the video cannot be read, `seconds` is None too.
    """
    record = {"video": video, "seconds": None, "question": settings.question, **dict.fromkeys(PARTS), "left_out": {}}
    try:
        clip = read_clip(model, processor, video, settings)
    except (ValueError, OSError) as error:
        for _, pictures in PARTS.values():
            record["left_out"].update(dict.fromkeys(pictures, str(error)))
        bar.update(len(PARTS))
        return record
    record["seconds"] = clip.times
    for part, (draw, pictures) in PARTS.items():
        bar.set_postfix_str(f"{part} of {Path(video).name}")
        try:
            record[part] = draw(model, processor, clip, settings, album)
        except NotThereError as error:
            record["left_out"].update(dict.fromkeys(pictures, str(error)))
        bar.update()
    return record


# -- All of it


def visualize(
    settings: VisualizeSettings, output: Path, model: Any = None, processor: Any = None, *, progress: bool = True
) -> dict[str, Any]:
    """Writes pictures, page and numbers to a folder; returns the numbers.

    Args:
        output: folder to write. The page, the numbers and pictures of the same name of an earlier run are replaced. Nothing is
            written if no video can be read.
        model, processor: instead of those that `settings.model` names.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: if the device does not exist, the checkpoint cannot be loaded, or no video can be read with the frames asked
            for.
        FileNotFoundError: naming the videos that do not exist.
    """
    missing = [video for video in settings.videos if not Path(video).is_file()]
    if missing:
        raise FileNotFoundError(f"no such video: {', '.join(missing)}")
    if model is None or processor is None:
        check_device(settings.device)
        settings = replace(settings, revision=resolved_revision(settings.model, settings.revision))
        model, processor = load_checkpoint(
            settings.model,
            trust_remote_code=settings.trust_remote_code,
            device=settings.device,
            dtype=settings.dtype,
            revision=settings.revision,
        )
    folders = folder_names(settings.videos)
    albums = [Album(output / folder) for folder in folders]
    with tqdm(total=len(PARTS) * len(albums), desc="drawing", unit="part", disable=not progress) as bar:
        records = [
            draw_video(model, processor, video, settings, album, bar)
            for video, album in zip(settings.videos, albums, strict=True)
        ]
    if all(map(is_unread, records)):
        raise ValueError("\n".join(f"{record['video']}: {reason_unread(record)}" for record in records))
    for record, folder, album in zip(records, folders, albums, strict=True):
        album.remove_others()
        record["pictures"] = {name: f"{folder}/{album.path(name).name}" for name in album.widths}
    results = {
        "settings": plain(asdict(settings)),
        "command": settings.command_line(output),
        "versions": versions(),
        "model": model_identity(settings.model, model, settings.revision),
        "videos": [plain(record) for record in records],
    }
    (output / "numbers.json").write_text(json.dumps(results, allow_nan=False) + "\n", encoding="utf-8")
    write_page(results, albums, folders, output / "index.html")
    return results


def is_unread(record: dict[str, Any]) -> bool:
    """Return True for the record of a video that could not be read."""
    return record["seconds"] is None


def reason_unread(record: dict[str, Any]) -> str:
    return next(iter(record["left_out"].values()))


def folder_names(videos: Sequence[str]) -> list[str]:
    """Folder of each video: its name without ending, numbered from the second of the same name on."""
    names: list[str] = []
    for video in videos:
        stem, number = Path(video).stem, 1
        name = stem
        while name in names:
            number += 1
            name = f"{stem}_{number}"
        names.append(name)
    return names


def plain(value: Any) -> Any:
    """Values of JSON types: arrays and tensors as lists, numbers of six digits, None for non-finite numbers."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {name: plain(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(own) for own in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write_page(results: dict[str, Any], albums: Sequence[Album], anchors: Sequence[str], path: Path) -> None:
    """Writes one HTML file that holds all pictures."""
    report = Report(f"Predictions of {results['settings']['model']}")
    records = results["videos"]
    if len(records) > 1:
        report.contents({anchor: record["video"] for anchor, record in zip(anchors, records, strict=True)})
    for record, album, anchor in zip(records, albums, anchors, strict=True):
        report.heading(record["video"], anchor=anchor)
        if is_unread(record):
            report.text(f"Left out: {reason_unread(record)}.")
            continue
        report.facts(facts(record))
        for heading, text, pictures in SECTIONS:
            report.heading(heading, level=3)
            reasons = {record["left_out"][name] for name in pictures if name in record["left_out"]}
            if reasons:
                report.text(f"Left out: {'; '.join(sorted(reasons))}.")
                continue
            if "film" in pictures and not record["prediction"]["sees_later_frames"]:
                text = f"{text} {FORESIGHT}"
            report.text(text, note=True)
            for name, alt in pictures.items():
                report.picture(album.path(name), album.widths[name], f"{record['video']}: {alt}")
    report.heading("How to repeat it")
    report.code(results["command"])
    report.facts([(name, str(value)) for part in ("model", "versions") for name, value in results[part].items()])
    report.write(path)


def facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Facts of a video, shown before its pictures."""
    seconds, layout = record["seconds"], record["layout"]
    rows = [
        ("frames", f"{len(seconds)}, from {seconds[0]:.2f} to {seconds[-1]:.2f} s"),
        ("tokens", f"{layout['num_tokens']} of the video, {layout['num_prompt_tokens']} of the prompt"),
        ("question", record["question"]),
    ]
    if record["attention"] is not None:
        rows.append(("answer", record["attention"]["answer"] or "(none)"))
    if record["prediction"] is not None:
        metrics = record["prediction"]["metrics"]
        skill = "not defined: nothing in the video changes" if metrics["skill"] is None else f"{metrics['skill']:+.3f}"
        rows += [
            ("skill", f"{skill} (0 is as good as copying the frame before, 1 is perfect)"),
            (
                "error",
                f"{metrics['mse']:.4g} (squared; of copying {metrics['copy_mse']:.4g}), cosine {metrics['cosine']:.3f}",
            ),
        ]
        if record["prediction"]["sees_later_frames"]:
            rows.append(("note", "the head has read the frames that it predicts (use_frame_causal_mask=False)"))
        if record["prediction"]["is_copy"]:
            rows.append(("note", "every prediction is the frame before: this head has not been trained"))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    defaults = VisualizeSettings(model="", videos=("",))
    parser = CommandParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--video", dest="videos", nargs="+", required=True, help="video files")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder to write; page, numbers and pictures of an earlier run in it are replaced",
    )
    parser.add_argument(
        "--question", default=defaults.question, help="question of the answer whose attention is drawn"
    )
    add_video_options(parser)
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, help="length of the answer")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that the checkpoint carries",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    parser.add_argument("--dtype", default=defaults.dtype, help="float32, bfloat16 or float16")
    options = vars(parser.parse_args(argv))
    output = options.pop("output")
    replaced = (output / "index.html").is_file()
    try:
        results = visualize(VisualizeSettings(**{**options, "videos": tuple(options["videos"])}), output)
    except (ValueError, OSError, ImportError) as error:  # ImportError: of a video back end
        stop(error)
    unread = [record for record in results["videos"] if is_unread(record)]
    for record in results["videos"]:
        for picture, reason in record["left_out"].items() if record not in unread else ():
            print(f"{record['video']}: no {picture}: {reason}")
    print(f"page: {output / 'index.html'}{' (replaces that of an earlier run)' if replaced else ''}")
    print(f"numbers: {output / 'numbers.json'}")
    if unread:
        reasons = (f"{parser.prog}: {record['video']}: {reason_unread(record)}\n" for record in unread)
        parser.exit(1, "".join(reasons))


if __name__ == "__main__":
    main(sys.argv[1:])
