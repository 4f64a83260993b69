"""Generate a benchmark of temporal understanding, without any download: videos with true answers.

    python scripts/temporal_benchmark.py --output temporal --train 40 --val 20 --test 20 --seed 0
    python scripts/temporal_benchmark.py --output temporal --train 4 --val 4 --test 4 --size 64 --levels easy
    python scripts/temporal_benchmark.py --preview sheet.png --levels hard    # a picture of every kind of clip

Writes real mp4 files (H.264) and LLaVA JSON as scripts/train.py and scripts/evaluate.py read it, one entry per question:

    temporal/videos/test_hard_cause_0003.mp4 ...
    temporal/train.json  val.json  test.json       fixed by the seed; the splits share no clip
    temporal/test_shuffled.json                    the same questions, frames in random order
    temporal/test_one_frame.json                   the same questions, one random frame instead of all
    temporal/benchmark.json                        settings, levels, and what guessing and what no time are worth

What is asked (and the best accuracy that is to be had from one frame | from all frames without their order):

    direction  where does the shape move?                                4 choices    chance | half
    camera     where does the camera move?                               4 choices    chance | half
    next       where does the curve lead after the clip?                 4 choices    chance | about three quarters
    order      which of two shapes moves first?                          2 choices    chance | chance
    count      how often does the ball touch the ground?                 4 choices    chance | chance
    faster     which of two shapes is faster?                            2 choices    chance | all
    speed      does the shape speed up or slow down?                     2 choices    chance | chance
    bounce     does the shape bounce back behind the screen?             2 choices    chance | all
    cause      which of two shapes sets the other in motion?             2 choices    chance | chance
    cut        does the shape move on as before after the cut?           2 choices    chance | chance
    arrow      is sliding with friction played forward or backward?      2 choices    chance | chance
    possible   could this happen, or is it impossible?                   2 choices    chance | all
    color      the color of a shape: the easy control                    4 choices    all    | all

The columns are the best accuracy with one frame and with all frames without their order. questions.py and, for `possible`,
events.py describe the constructions. `count` needs the order if the number of frames less one has no factor 2 or 3 (12, 14,
18, 20 and 24 frames); otherwise the frames repeat themselves more often for some numbers. The controls measure the table for
a model instead of taking it from here: trained and tested on shuffled frames (`--control-splits train test`), it shows the
accuracy that can be learned without order. The clips of a pair of `possible` are identical before `event_frame`, in the
decoded pixels too.

Answers are balanced exactly: in every type, level and split, each place among the choices is right equally often.
Levels (easy, medium, hard) differ in distractors, range and difference of speeds, texture, camera motion and screens;
see `LEVELS`. Some combinations of color and shape are in test clips only; entries whose clip shows one say
`"held_out": true`.

Keys of an entry beside LLaVA's: `question_type`, `choices`, `difficulty`, `held_out`, and where they apply `pair` (the
same for both clips of a pair), `event`, `event_frame`, `event_places`, `event_hidden`, `cut_frame`; in the controls
`control` and `frame_order` (place i shows frame `frame_order[i]` of the original clip, whose frames the other keys count).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ...hub.command_line import CommandParser
from .draws import HELD_OUT, LEVELS, Draft, Draw
from .events import EVENTS
from .questions import QUESTION_TYPES, unordered_ceiling
from .scenes import render
from .synthetic_clips import chance_levels, write_video

SPLITS = ("train", "val", "test")
CONTROLS = ("shuffled", "one_frame")
CLIP_KINDS = tuple(name for name in QUESTION_TYPES if name != "color")  # `color` is asked about clips of `direction`
BALANCE = 4  # the number of clips of a kind, level and split is a multiple of it: then answers are balanced exactly


@dataclass(frozen=True, kw_only=True)
class BenchmarkClip:
    name: str
    level: str
    draft: Draft
    pair: str | None = None
    """Name that a possible and an impossible clip have in common."""

    @property
    def num_frames(self) -> int:
        return sum(scene.num_frames for scene in self.draft.scenes)

    @property
    def held_out(self) -> bool:
        """True for a clip with a combination of color and shape that training clips do not have."""
        looks = [body.look for scene in self.draft.scenes for body in scene.bodies]
        return any((look.color, look.shape) in HELD_OUT for look in looks)


def make_clips(
    num_per_type: int,
    *,
    split: str = "train",
    seed: int = 0,
    num_frames: int = 14,
    levels: Sequence[str] = tuple(LEVELS),
    question_types: Sequence[str] = tuple(QUESTION_TYPES),
) -> list[BenchmarkClip]:
    """Draw the clips of a split. The same arguments give the same clips, fewer of them the first ones of each kind.

    Args:
        num_per_type: number of clips for each question type and level, a multiple of 4. (`color` is asked about the
            clips of `direction`.)
        num_frames: 12 to 24.
        levels: any of `LEVELS`.
        question_types: any of `QUESTION_TYPES`.

    Raises:
        ValueError: if a number is out of range or a name is unknown.
    """
    if num_per_type < 0 or num_per_type % BALANCE:
        raise ValueError(f"{num_per_type} {split} clips for each question type, expected a multiple of {BALANCE}")
    if not 12 <= num_frames <= 24:
        raise ValueError(f"num_frames is {num_frames}, expected 12 to 24")
    for what, names, known in (
        ("split is", [split], SPLITS),
        ("levels are", levels, LEVELS),
        ("question types are", question_types, QUESTION_TYPES),
    ):
        if not names or not set(names) <= set(known):
            raise ValueError(f"{what} {', '.join(names) or 'missing'}, expected some of {', '.join(known)}")
    wanted = {"direction" if name == "color" else name for name in question_types}
    clips = []
    for level in [name for name in LEVELS if name in levels]:
        for kind in [kind for kind in CLIP_KINDS if kind in wanted]:
            # Every kind has a generator of its own: what else is asked for changes nothing about it.
            rng = np.random.default_rng([seed, *f"{split} {level} {kind}".encode()])
            number = 0
            while number < num_per_type:
                draw = Draw(
                    rng=rng,
                    level=LEVELS[level],
                    index=number // 2 if kind == "possible" else number,
                    num_frames=num_frames,
                    may_hold_out=split == "test",
                )
                drafts = QUESTION_TYPES[kind].recipe(draw)
                pair = f"{split}_{level}_{kind}_pair_{draw.index:04d}" if len(drafts) == 2 else None
                for draft in drafts:
                    name = f"{split}_{level}_{kind}_{number:04d}"
                    clips.append(BenchmarkClip(name=name, level=level, draft=draft, pair=pair))
                    number += 1
    return clips


def render_clip(clip: BenchmarkClip, size: int = 96, frames: Sequence[int] | None = None) -> np.ndarray:
    """Frames of a clip, all or those with the given indices: `[T, size, size, 3]` uint8, RGB."""
    return render(clip.draft.scenes, size, frames)


def frame_order(clip: BenchmarkClip, control: str) -> np.ndarray:
    """Indices `[T]` of the frames that a control of a clip shows; the same ones for both clips of a pair.

    `shuffled`: all, in random order. `one_frame`: one at random, again and again, so that a model gets as many tokens.
    """
    rng = np.random.default_rng(list(f"{control} {clip.pair or clip.name}".encode()))
    if control == "shuffled":
        return rng.permutation(clip.num_frames)
    if control == "one_frame":
        return np.full(clip.num_frames, rng.integers(clip.num_frames))
    raise ValueError(f"control is {control!r}, expected one of {CONTROLS}")


def entries_of(
    clips: Sequence[BenchmarkClip],
    *,
    question_types: Sequence[str] = tuple(QUESTION_TYPES),
    control: str | None = None,
) -> list[dict]:
    """LLaVA JSON entries, one per question, in an order that mixes types and answers."""
    entries = []
    for clip in clips:
        notes: dict = {"difficulty": clip.level, "held_out": clip.held_out}
        notes |= {"pair": clip.pair} if clip.pair else {}
        notes |= clip.draft.notes
        if control is not None:
            notes |= {"control": control, "frame_order": frame_order(clip, control).tolist()}
        for question in clip.draft.questions:
            if question.question_type not in question_types:
                continue
            entries.append(
                {
                    "id": f"{clip.name}_{question.question_type}",
                    "video": f"videos/{_file_name(clip, control)}",
                    "question_type": question.question_type,
                    "conversations": [
                        {"from": "human", "value": question.prompt()},
                        {"from": "gpt", "value": question.answer},
                    ],
                    "choices": list(question.choices),
                    **notes,
                }
            )
    return [entries[place] for place in np.random.default_rng(len(entries)).permutation(len(entries))]


def _file_name(clip: BenchmarkClip, control: str | None) -> str:
    return f"{clip.name}.mp4" if control is None else f"{clip.name}_{control}.mp4"


def write_benchmark(
    output: Path | str,
    *,
    num_per_type: Mapping[str, int],
    seed: int = 0,
    size: int = 96,
    num_frames: int = 14,
    fps: float = 4.0,
    levels: Sequence[str] = tuple(LEVELS),
    question_types: Sequence[str] = tuple(QUESTION_TYPES),
    control_splits: Sequence[str] = ("test",),
    progress: bool = True,
) -> dict[str, list[dict]]:
    """Write `videos/*.mp4`, a JSON file for each split and for each of its controls, and `benchmark.json`.

    Args:
        num_per_type: for each split the number of clips of each question type and level, a multiple of 4.
        size: side of the square frames in pixels, even.
        fps: frames per second that the files state.
        control_splits: those that get the controls as well.

    Returns:
        the entries of each JSON file, by its name without suffix.

    Raises:
        ValueError: if an option is out of range; nothing has been written then.
    """
    if size < 48 or size % 2:
        raise ValueError(f"size is {size}, expected an even number of at least 48 pixels")
    if fps <= 0:
        raise ValueError(f"fps is {fps}, expected a positive number of frames per second")
    if not set(control_splits) <= set(num_per_type):
        raise ValueError(f"control splits are {', '.join(control_splits)}, expected some of {', '.join(num_per_type)}")
    clips = {
        split: make_clips(
            number, split=split, seed=seed, num_frames=num_frames, levels=levels, question_types=question_types
        )
        for split, number in num_per_type.items()
    }
    output = Path(output)
    (output / "videos").mkdir(parents=True, exist_ok=True)
    work = [(clip, CONTROLS if split in control_splits else ()) for split, some in clips.items() for clip in some]
    for clip, controls in tqdm(work, desc="encoding", unit="clip", disable=not progress):
        frames = render_clip(clip, size)
        write_video(frames, output / "videos" / _file_name(clip, None), fps, causal=True)
        for control in controls:
            path = output / "videos" / _file_name(clip, control)
            write_video(frames[frame_order(clip, control)], path, fps, causal=True)
    entries = {split: entries_of(some, question_types=question_types) for split, some in clips.items()}
    for split in control_splits:
        for control in CONTROLS:
            name = f"{split}_{control}"
            entries[name] = entries_of(clips[split], question_types=question_types, control=control)
    for name, some in entries.items():
        (output / f"{name}.json").write_text(json.dumps(some, indent=1) + "\n", encoding="utf-8")
    summary = {
        "settings": {
            "num_per_type": dict(num_per_type),
            "seed": seed,
            "size": size,
            "num_frames": num_frames,
            "fps": fps,
            "levels": list(levels),
            "question_types": list(question_types),
            "control_splits": list(control_splits),
        },
        "levels": {level: asdict(LEVELS[level]) for level in levels},
        "question_types": type_table([entry for some in entries.values() for entry in some], num_frames),
    }
    (output / "benchmark.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return entries


def type_table(entries: Sequence[dict], num_frames: int) -> dict[str, dict]:
    """Description and ceilings of each question type of the entries: `chance`, `one_frame` and `unordered`.

    Args:
        num_frames: of the clips.
    """
    table = {}
    for name, level in chance_levels(entries).items():
        unordered, why = unordered_ceiling(name, num_frames)
        table[name] = {
            "asks": QUESTION_TYPES[name].asks,
            "chance": level["chance"],
            "one_frame": QUESTION_TYPES[name].one_frame,
            "unordered": unordered,
            "unordered_frames_tell": why,
        }
    return table


# ---------------------------------------------------------------------------------------------------------------------
# A look at it


def preview(
    levels: Sequence[str] = tuple(LEVELS),
    *,
    seed: int = 0,
    size: int = 96,
    num_frames: int = 14,
    question_types: Sequence[str] = tuple(QUESTION_TYPES),
    columns: int = 8,
) -> Image.Image:
    """A contact sheet: one clip of each kind in a row, for `possible` both clips of each event, at every level.

    The frame of an event or a cut has a red frame.

    Raises:
        ValueError: as `make_clips`.
    """
    rows: list[BenchmarkClip] = []
    for level in [name for name in LEVELS if name in levels]:
        clips = make_clips(
            BALANCE * len(EVENTS),
            split="test",
            seed=seed,
            num_frames=num_frames,
            levels=[level],
            question_types=question_types,
        )
        firsts = [clip for clip in clips if clip.name.endswith("0001") and not clip.pair]
        rows += firsts + [clip for clip in clips if clip.pair and int(clip.name[-4:]) % BALANCE < 2]
    margin, gap = 300, 4
    sheet = Image.new("RGB", (margin + columns * (size + gap), len(rows) * (size + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for row, clip in enumerate(rows):
        top = row * (size + gap)
        asked = next(question for question in clip.draft.questions if question.question_type in question_types)
        event = clip.draft.notes.get("event_frame", clip.draft.notes.get("cut_frame"))
        title = ", ".join(filter(None, (asked.question_type, clip.draft.notes.get("event"), clip.level)))
        words, lines = asked.text.split(), [""]
        for word in words:
            lines[-1:] = [f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < 44 else [lines[-1], word]
        pen.multiline_text((4, top + 4), "\n".join([title, *lines, f"-> {asked.answer}"]), fill="black", font=font)
        shown = np.unique(np.rint(np.linspace(0, clip.num_frames - 1, columns)).astype(int))
        if event is not None:  # in place of its neighbor
            shown[np.argmin(np.abs(shown[1:-1] - event)) + 1] = event
        for column, (frame, picture) in enumerate(zip(shown, render_clip(clip, size, shown.tolist()), strict=True)):
            left = margin + column * (size + gap)
            sheet.paste(Image.fromarray(picture), (left, top))
            if frame == event:
                pen.rectangle((left - 2, top - 2, left + size + 1, top + size + 1), outline="red", width=2)
    return sheet


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder to write, made if missing")
    parser.add_argument(
        "--preview", type=Path, help="picture to write: a clip of every kind; alone or beside --output"
    )
    for split, number in (("train", 40), ("val", 20), ("test", 20)):
        parser.add_argument(f"--{split}", type=int, default=number, help="clips of each question type and level")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=96, help="side of the frames in pixels")
    parser.add_argument("--num-frames", type=int, default=14, help="frames of a clip, 12 to 24")
    parser.add_argument("--fps", type=float, default=4.0, help="frames per second that the files state")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--question-types", nargs="+", choices=QUESTION_TYPES, default=list(QUESTION_TYPES))
    parser.add_argument(
        "--control-splits", nargs="*", choices=SPLITS, default=["test"], help="splits that get the controls as well"
    )
    options = vars(parser.parse_args(argv))
    picture, output = options.pop("preview"), options.pop("output")
    if picture is None and output is None:
        parser.error("nothing to write: give --output, --preview or both")
    options["num_per_type"] = {split: options.pop(split) for split in SPLITS}
    shown = {name: options[name] for name in ("levels", "seed", "size", "num_frames", "question_types")}
    try:
        if picture is not None:
            sheet = preview(**shown)
            picture.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(picture)
            print(f"written to {picture}")
        if output is None:
            return
        entries = write_benchmark(output, **options)
    except ValueError as error:
        parser.error(str(error))
    for name, some in entries.items():
        print(f"{name}: {len(some)} questions on {len({entry['video'] for entry in some})} clips")
    print(f"{'':<10} {'chance':>7} {'one frame':>10} {'unordered':>10}   the best that can be had, and why")
    for name, row in type_table([e for some in entries.values() for e in some], options["num_frames"]).items():
        print(
            f"{name:<10} {row['chance']:>7.2f} {row['one_frame']:>10.2f} {row['unordered']:>10.2f}   "
            f"{row['unordered_frames_tell']}"
        )


if __name__ == "__main__":
    main()
