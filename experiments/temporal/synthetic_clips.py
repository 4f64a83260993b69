"""Generate videos of moving shapes with questions whose answers are true by construction.

    python scripts/synthetic_clips.py --output clips --num-train 320 --num-test 80 --seed 0
    python scripts/synthetic_clips.py --output clips --num-train 16 --num-test 16 --size 64 --num-frames 8

Writes real mp4 files (H.264) and LLaVA JSON, one entry per question; paths are relative to the output folder:

    clips/videos/train_00000.mp4 ...   clips/train.json   clips/test.json

Five types of question:

    direction  one shape moves straight on: left, right, up or down?                                     4 choices
    next       one shape moves along a curve: where does its next step lead, once the clip has ended?    4 choices
    order      two shapes rest, then set off one after the other: which one first?                       2 choices
    bounce     one shape reaches an edge: does it bounce, or does it come back on the other side?        2 choices
    color      the color of the shape: the easy control, which one frame answers                         4 choices

Except for `color`, no single frame says anything about the answer. Positions are drawn uniformly and the picture wraps
around (what leaves on the right comes back on the left), so that at every moment a shape is everywhere equally often,
whatever the answer is. A `bounce` clip reaches one edge at a moment that does not depend on the answer, the side is
random, and nothing is drawn at the opposite edge: again each frame looks the same under both answers. Several frames
without their order do tell something: for `direction` the axis, for `order` and `bounce` all. The frames must be in
order for `next` and for the rest of `direction`.

Three more types are asked if they are named. Here any frame of a short moment tells the answer, and no other frame does:

    glimpse          a shape is seen for two or three frames: its color? Four others rest all the time    4 choices
    busy_glimpse     the same, while the four others move straight on, always as fast                     4 choices
    surging_glimpse  the same, while the four others move straight on, faster and slower in turn          4 choices

The four others are a pattern, half a picture apart in both directions: when one leaves, the next one comes in its place, so
that the same goes on in every frame. They are black or white, which no answer is. The moment begins anywhere in the last
three quarters of a clip; the entry says when as `moment`, the times of its first and its last frame in seconds.

    python scripts/synthetic_clips.py --output clips --num-frames 32 --question-types glimpse busy_glimpse surging_glimpse

Answers are balanced: exactly, in every type, if the number of clips of a split is a multiple of 16 (with all types
of the first list asked for), otherwise to within one question for each kind of clip.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from ...hub.command_line import CommandParser

COLORS = {"red": (225, 55, 50), "green": (60, 190, 75), "blue": (60, 105, 235), "yellow": (240, 215, 60)}
# Colors of shapes that are never asked about.
OTHER_COLORS = {"white": (240, 240, 240), "black": (15, 15, 15)}
SHAPES = ("circle", "square", "diamond", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CORNERS = {"upper left": (-1, -1), "upper right": (1, -1), "lower left": (-1, 1), "lower right": (1, 1)}
RIVALS = (("red", "blue"), ("green", "yellow"))  # the pairs of colors that set off one after the other

# Every kind of clip is named by the question that it is made for; clips of one shape carry `color` as well.
CLIP_KINDS = ("direction", "next", "order", "bounce")
QUESTION_TYPES = (*CLIP_KINDS, "color")
# Asked only if named.
GLIMPSES = ("glimpse", "busy_glimpse", "surging_glimpse")
RADIUS = 0.13  # of a shape, as a fraction of the picture


@dataclass(frozen=True, kw_only=True)
class Question:
    question_type: str
    text: str
    choices: tuple[str, ...]
    answer: str

    def prompt(self) -> str:
        *others, last = self.choices
        return f"<video>\n{self.text} Answer with {', '.join(others)} or {last}."


@dataclass(frozen=True, kw_only=True)
class MovingShape:
    shape: str
    color: str
    path: np.ndarray
    """Centers (x, y) as fractions of the picture, x to the right, y downwards: `[num_frames + 1, 2]`. The last one is
    where the shape is in the first frame after the clip, which is not drawn."""
    moment: range | None = None
    """The frames that show it, if not all do."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    name: str
    shapes: tuple[MovingShape, ...]
    wraps: bool
    """Whether the part of a shape that is beyond an edge is drawn at the opposite edge."""
    questions: tuple[Question, ...]
    texture_seed: int

    @property
    def num_frames(self) -> int:
        return len(self.shapes[0].path) - 1

    @property
    def moment(self) -> range | None:
        """Frames that show the moment of the question; None if all do."""
        return next((shape.moment for shape in self.shapes if shape.moment is not None), None)


# ---------------------------------------------------------------------------------------------------------------------
# Motion. All lengths are fractions of the picture, all times are frame numbers; t is [num_frames + 1].


def direction_clip(rng: np.random.Generator, index: int, t: np.ndarray) -> tuple[list[np.ndarray], Question]:
    answer = list(DIRECTIONS)[index % 4]
    step = rng.uniform(0.05, 0.09)
    path = rng.uniform(size=2) + step * t[:, None] * np.array(DIRECTIONS[answer])
    text = "In which direction does the shape move?"
    return [path % 1.0], Question(question_type="direction", text=text, choices=tuple(DIRECTIONS), answer=answer)


def next_clip(rng: np.random.Generator, index: int, t: np.ndarray) -> tuple[list[np.ndarray], Question]:
    answer = list(CORNERS)[index % 4]
    x, y = CORNERS[answer]
    # The step that follows the clip leads into the middle 60 degrees of its quarter. Up to half a turn to either side
    # lies before it, so that the first steps alone lead into any quarter about equally often.
    last_heading = np.arctan2(y, x) + np.radians(rng.uniform(-30, 30))
    turn = np.radians(rng.uniform(10, 180)) * rng.choice([-1, 1])
    heading = last_heading + turn * (t[1:] - t[-1]) / (t[-1] - t[1])
    steps = rng.uniform(0.06, 0.09) * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    path = rng.uniform(size=2) + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    text = "The shape keeps following its curve. Where does its next step lead, seen from where it is at the end?"
    return [path % 1.0], Question(question_type="next", text=text, choices=tuple(CORNERS), answer=answer)


def order_clip(rng: np.random.Generator, index: int, t: np.ndarray) -> tuple[list[np.ndarray], Question]:
    # The first named shape is as often the first to move as not. Each has a lane, so that they never meet.
    first, num_frames = index % 2, len(t) - 1
    start = rng.integers(1, num_frames - 4)
    starts = [start, rng.integers(start + 2, num_frames - 2)]  # at least two frames apart, and both seen moving
    if first == 1:
        starts.reverse()
    lanes = rng.permutation([0.25, 0.75]) + rng.uniform(-0.08, 0.08, size=2)
    axis = rng.integers(2)
    paths = []
    for start, lane in zip(starts, lanes, strict=True):
        along = rng.uniform() + rng.choice([-1, 1]) * rng.uniform(0.05, 0.09) * np.maximum(t - start, 0)
        path = np.stack([along, np.full_like(along, lane)], axis=1) % 1.0
        paths.append(path[:, ::-1] if axis else path)
    choices = RIVALS[index // 2 % 2]
    text = "Which of the two shapes starts to move first?"
    return paths, Question(question_type="order", text=text, choices=choices, answer=choices[first])


def bounce_clip(rng: np.random.Generator, index: int, t: np.ndarray) -> tuple[list[np.ndarray], Question]:
    answer = ("yes", "no")[index % 2]
    duration = len(t) - 2  # in frames, from the first one drawn to the last one
    moment = rng.uniform(0.3, 0.7) * duration  # when the center is at the edge
    distance = rng.uniform(0.6, 0.8) / duration * np.abs(t - moment)  # to the edge, at most 0.56: the other one is far
    along = distance if answer == "yes" else np.where(t < moment, distance, 1 - distance)
    if rng.integers(2):
        along = 1 - along
    # The lane stays clear of the edges beside it, so that only one edge is reached.
    path = np.stack([along, np.full_like(along, rng.uniform(0.2, 0.8))], axis=1)
    if rng.integers(2):
        path = path[:, ::-1]
    text = "Does the shape bounce off an edge of the picture?"
    return [path], Question(question_type="bounce", text=text, choices=("yes", "no"), answer=answer)


def glimpse_clip(
    rng: np.random.Generator, index: int, t: np.ndarray, *, kind: str
) -> tuple[list[MovingShape], Question]:
    answer, num_frames = list(COLORS)[index % 4], len(t) - 1
    way = rng.uniform(0.05, 0.09) * t
    if kind == "surging_glimpse":  # 0.4 to 1.6 times as fast, every 8 frames the same
        angle = 2 * np.pi * (t / 8 + rng.uniform())
        way += 0.6 * way[1] * np.sin(angle) * 8 / (2 * np.pi)
    elif kind == "glimpse":
        way *= 0
    way = rng.uniform(size=2) + way[:, None] * rng.choice(list(DIRECTIONS.values()))
    pattern = {"shape": str(rng.choice(SHAPES)), "color": str(rng.choice(list(OTHER_COLORS)))}
    shapes = [MovingShape(path=(way + np.array(place) / 2) % 1.0, **pattern) for place in np.ndindex(2, 2)]
    duration = rng.integers(2, 4)
    first = int(rng.integers(num_frames // 4, num_frames - duration + 1))
    moment, path = range(first, first + int(duration)), np.tile(rng.uniform(size=2), (len(t), 1))
    shapes.append(MovingShape(shape=str(rng.choice(SHAPES)), color=answer, path=path, moment=moment))
    text = "One shape is seen for a moment only. What is its color?"
    return shapes, Question(question_type=kind, text=text, choices=tuple(COLORS), answer=answer)


MOTIONS = {"direction": direction_clip, "next": next_clip, "order": order_clip, "bounce": bounce_clip}


# ---------------------------------------------------------------------------------------------------------------------
# Clips


def make_clips(
    num_clips: int,
    *,
    split: str = "train",
    seed: int = 0,
    num_frames: int = 12,
    question_types: Sequence[str] = QUESTION_TYPES,
) -> list[Clip]:
    """Draw the clips of a split. Another `split` or `seed` gives other clips; the same ones give the same clips.

    Args:
        num_clips: number of clips, shared evenly between the kinds that `question_types` needs.
        num_frames: 8 to 32.
        question_types: any of `QUESTION_TYPES` and `GLIMPSES`; `color` is asked about the clips of one shape.

    Raises:
        ValueError: if `num_frames` is out of range or a question type is unknown.
    """
    if not 8 <= num_frames <= 32:
        raise ValueError(f"num_frames is {num_frames}, expected 8 to 32")
    known = (*QUESTION_TYPES, *GLIMPSES)
    if not question_types or not set(question_types) <= set(known):
        raise ValueError(f"question_types are {list(question_types)}, expected some of {list(known)}")
    if num_clips < 0:
        raise ValueError(f"num_clips is {num_clips}, expected 0 or more")

    kinds = [kind for kind in (*CLIP_KINDS, *GLIMPSES) if kind in question_types]
    if "color" in question_types and not set(kinds) - {"order", *GLIMPSES}:
        kinds.append("direction")
    rng = np.random.default_rng([seed, *split.encode()])
    t = np.arange(num_frames + 1, dtype=np.float64)
    drafts = []
    for number in range(num_clips):
        kind, index = kinds[number % len(kinds)], number // len(kinds)
        if kind in GLIMPSES:
            shapes, question = glimpse_clip(rng, index, t, kind=kind)
            drafts.append((tuple(shapes), True, (question,), int(rng.integers(2**32))))
            continue
        paths, question = MOTIONS[kind](rng, index, t)
        if kind == "order":
            colors, questions = question.choices, [question]
        else:
            # A Latin square: every color is as frequent as any other, with each answer, over 16 clips of a kind.
            color = list(COLORS)[(index + index // 4) % 4]
            text = "What is the color of the shape?"
            control = Question(question_type="color", text=text, choices=tuple(COLORS), answer=color)
            colors, questions = [color], [question, control]
        shapes = tuple(
            MovingShape(shape=str(rng.choice(SHAPES)), color=color, path=path)
            for color, path in zip(colors, paths, strict=True)
        )
        questions = tuple(item for item in questions if item.question_type in question_types)
        drafts.append((shapes, kind != "bounce", questions, int(rng.integers(2**32))))
    # The place in the data set says nothing about the kind or the answer.
    return [
        Clip(
            name=f"{split}_{place:05d}",
            shapes=drafts[number][0],
            wraps=drafts[number][1],
            questions=drafts[number][2],
            texture_seed=drafts[number][3],
        )
        for place, number in enumerate(rng.permutation(num_clips))
    ]


def entries_of(clips: Sequence[Clip], fps: float = 4.0) -> list[dict]:
    """LLaVA JSON entries, one per question; questions of a clip share its file `videos/<name>.mp4`."""
    return [
        {
            "id": f"{clip.name}_{question.question_type}",
            "video": f"videos/{clip.name}.mp4",
            "question_type": question.question_type,
            "conversations": [
                {"from": "human", "value": question.prompt()},
                {"from": "gpt", "value": question.answer},
            ],
            "choices": list(question.choices),
            **({"moment": [clip.moment[0] / fps, clip.moment[-1] / fps]} if clip.moment else {}),
        }
        for clip in clips
        for question in clip.questions
    ]


def training_mix(entries: Sequence[dict[str, Any]], one_in: int = 4) -> list[dict[str, Any]]:
    """All questions about motion and every fourth one about color, the easy control."""
    colors = [entry for entry in entries if entry["question_type"] == "color"]
    return [entry for entry in entries if entry["question_type"] != "color"] + colors[::one_in]


def chance_levels(entries: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Accuracy of guessing, per question type.

    Returns:
        for each type `num_questions`, `chance` (the mean of one over the number of choices) and `best_guess`, the
        accuracy of always giving the choice at the place that is most often right; equal where answers are balanced.
    """
    levels = {}
    for question_type in sorted({entry["question_type"] for entry in entries}):
        some = [entry for entry in entries if entry["question_type"] == question_type]
        places = Counter(entry["choices"].index(entry["conversations"][-1]["value"]) for entry in some)
        levels[question_type] = {
            "num_questions": len(some),
            "chance": sum(1 / len(entry["choices"]) for entry in some) / len(some),
            "best_guess": max(places.values()) / len(some),
        }
    return levels


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline, negative inside, in the unit of the arguments; the shapes have about the same area."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.89 * radius
    if shape == "diamond":
        return (np.abs(dx) + np.abs(dy)) / np.sqrt(2) - 0.89 * radius
    if shape == "triangle":  # equilateral, pointing up, its centroid at the center
        return np.maximum(dy, np.sqrt(3) / 2 * np.abs(dx) - dy / 2) - 0.78 * radius
    raise ValueError(f"shape is {shape!r}, expected one of {SHAPES}")


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A still background of soft grayish blotches: `[size, size, 3]` float, 60 to 140."""
    coarse = rng.uniform(70, 130, size=(6, 6, 1)) + rng.uniform(-10, 10, size=(6, 6, 3))
    # bilinear interpolation, written as one matrix per axis
    place = np.linspace(0, 5, size)
    weights = np.maximum(1 - np.abs(place[:, None] - np.arange(6)), 0)
    return np.einsum("yi,xj,ijc->yxc", weights, weights, coarse)


def render_clip(clip: Clip, size: int = 96) -> np.ndarray:
    """Draw all frames: `[num_frames, size, size, 3]` uint8, RGB."""
    rng = np.random.default_rng(clip.texture_seed)
    background = texture(rng, size).astype(np.float32)
    frames = np.repeat(background[None], clip.num_frames, axis=0)
    pixel = (np.arange(size, dtype=np.float32) + 0.5) / size
    palette = {**COLORS, **OTHER_COLORS}
    for shape in clip.shapes:
        centers = shape.path[: clip.num_frames].astype(np.float32)
        offset = pixel - centers[:, :, None]  # [T, 2, size]
        if clip.wraps:
            offset = (offset + 0.5) % 1.0 - 0.5
        distance = signed_distance(shape.shape, offset[:, 0, None, :], offset[:, 1, :, None], RADIUS)
        cover = np.clip(0.5 - distance * size, 0, 1)[..., None]  # an edge of one pixel: antialiased
        shown = slice(None) if shape.moment is None else list(shape.moment)
        frames[shown] += cover[shown] * (np.array(palette[shape.color], dtype=np.float32) - frames[shown])
    frames += rng.integers(-3, 4, size=frames.shape, dtype=np.int8)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def write_video(frames: np.ndarray, path: Path | str, fps: float, *, causal: bool = False) -> None:
    """Encode `[T, H, W, 3]` uint8 RGB frames as H.264; `H` and `W` must be even.

    With `causal`, no frame is encoded with a look at later ones: clips that are equal up to some frame are decoded
    equal up to that frame. It makes the files larger.
    """
    num_frames, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"frames are {height} x {width}, expected even sizes (the chroma planes have half of each)")
    with av.open(str(path), "w") as container:
        # A constant quantizer, since with crf the rate control (x264's mbtree) may give other bits in another run.
        options = {"qp": "16", "preset": "veryfast", "threads": "1"}
        if causal:
            options["tune"] = "zerolatency"
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_dataset(
    output: Path | str,
    *,
    num_train: int = 320,
    num_test: int = 80,
    seed: int = 0,
    size: int = 96,
    num_frames: int = 12,
    fps: float = 4.0,
    question_types: Sequence[str] = QUESTION_TYPES,
    progress: bool = True,
) -> dict[str, list[dict]]:
    """Write `videos/*.mp4`, `train.json` and `test.json` under `output`.

    Args:
        num_train, num_test: number of clips; most carry two questions.
        size: side of the square frames in pixels, even.
        fps: frames per second that the files state.

    Returns:
        the entries of each split, as written.

    Raises:
        ValueError: if an option is out of range; nothing has been written then.
    """
    if size < 32 or size % 2:
        raise ValueError(f"size is {size}, expected an even number of at least 32 pixels")
    if fps <= 0:
        raise ValueError(f"fps is {fps}, expected a positive number of frames per second")
    output = Path(output)
    sizes = {"train": num_train, "test": num_test}
    clips = {
        split: make_clips(number, split=split, seed=seed, num_frames=num_frames, question_types=question_types)
        for split, number in sizes.items()
    }
    (output / "videos").mkdir(parents=True, exist_ok=True)
    everything = [clip for split in clips.values() for clip in split]
    for clip in tqdm(everything, desc="encoding", unit="clip", disable=not progress):
        write_video(render_clip(clip, size), output / "videos" / f"{clip.name}.mp4", fps)
    entries = {split: entries_of(some, fps) for split, some in clips.items()}
    for split, some in entries.items():
        (output / f"{split}.json").write_text(json.dumps(some, indent=1) + "\n", encoding="utf-8")
    return entries


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write, made if missing")
    parser.add_argument("--num-train", type=int, default=320, help="training clips")
    parser.add_argument("--num-test", type=int, default=80, help="held-out clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=96, help="side of the frames in pixels")
    parser.add_argument("--num-frames", type=int, default=12, help="frames of a clip, 8 to 32")
    parser.add_argument("--fps", type=float, default=4.0, help="frames per second that the files state")
    known = (*QUESTION_TYPES, *GLIMPSES)
    parser.add_argument("--question-types", nargs="+", choices=known, default=list(QUESTION_TYPES))
    options = vars(parser.parse_args(argv))
    try:
        entries = write_dataset(**options)
    except ValueError as error:
        parser.error(str(error))
    for split, some in entries.items():
        print(f"{split}: {len(some)} questions on {len({entry['video'] for entry in some})} clips")
        for question_type, level in chance_levels(some).items():
            print(
                f"  {question_type:<15} {level['num_questions']:>5} questions   chance {level['chance']:.3f}   "
                f"best guess {level['best_guess']:.3f}"
            )


if __name__ == "__main__":
    main()
