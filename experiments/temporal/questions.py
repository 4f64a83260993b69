"""Question types of the temporal benchmark: each draws a scene together with its true answer.

What a type asks, and what one frame, or all frames without their order, tell about its answer, stands in
`QUESTION_TYPES`. The recipes follow three rules that keep the answer out of single frames:

- Where nothing bounds the scene, the world wraps around and places are drawn uniformly, so that at every moment a
  shape is everywhere equally often, whatever the answer is.
- Where order is the answer, the clips with one answer are those with the other answer played backward. Then frames
  without their order tell nothing either. A moving camera gives the order away only up to that reversal.
- Where a clip has halves (before and after the screen, before and after an impossible event), both answers put the
  halves together from the same tracks, and each track looks the same at any moment.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from .draws import GROUND, RADIUS, Draft, Draw, ground_box, panel
from .events import possible
from .scenes import DOWNWARDS, Body, backward, simulate
from .synthetic_clips import COLORS, DIRECTIONS, SHAPES, Question, next_clip

# ---------------------------------------------------------------------------------------------------------------------
# Recipes. Each returns one draft, or two that differ only in what is impossible.


def direction(draw: Draw) -> list[Draft]:
    answer = list(DIRECTIONS)[draw.index % 4]
    # A Latin square: every color is as frequent as any other, with each answer, over 16 clips.
    color = list(COLORS)[(draw.index + draw.index // 4) % 4]
    others = [other for other in draw.colors() if other != color]
    look = draw.look(color)
    path = draw.straight(draw.speed() * np.array(DIRECTIONS[answer]))
    # The shape names the target in the question about its color.
    distractors = draw.distractors(others, tuple(shape for shape in SHAPES if shape != look.shape))
    scene = draw.open_scene([*distractors, Body(look=look, path=path, radius=RADIUS)], boxes=draw.post())
    text = f"In which direction does the {look.shape} move over the ground?"
    asked = Question(question_type="direction", text=text, choices=tuple(DIRECTIONS), answer=answer)
    text = f"What is the color of the {look.shape}?"
    control = Question(question_type="color", text=text, choices=tuple(COLORS), answer=color)
    return [Draft(scenes=(scene,), questions=(asked, control))]


def camera(draw: Draw) -> list[Draft]:
    answer = list(DIRECTIONS)[draw.index % 4]
    colors = draw.colors()
    resting = Body(
        look=draw.look(colors[0]), path=np.tile(draw.rng.uniform(size=2), (draw.num_frames, 1)), radius=RADIUS
    )
    glide = draw.gliding(0.6 * draw.speed() * np.array(DIRECTIONS[answer]))
    scene = draw.open_scene([resting, *draw.distractors(colors[1:])], camera=glide)
    text = "In which direction does the camera move over the ground?"
    asked = Question(question_type="camera", text=text, choices=tuple(DIRECTIONS), answer=answer)
    return [Draft(scenes=(scene,), questions=(asked,))]


def following(draw: Draw) -> list[Draft]:
    """`next`: the curves of the synthetic clips, over this ground."""
    colors = draw.colors()
    (path,), asked = next_clip(draw.rng, draw.index, np.arange(draw.num_frames + 1, dtype=np.float64))
    target = draw.body(colors[0], path[: draw.num_frames])
    scene = draw.open_scene([*draw.distractors(colors[1:]), target])
    text = f"On the ground, the {colors[0]} shape keeps following its curve. Where does its next step lead from the last place?"
    asked = Question(question_type="next", text=text, choices=asked.choices, answer=asked.answer)
    return [Draft(scenes=(scene,), questions=(asked,))]


def order(draw: Draw) -> list[Draft]:
    first, colors = draw.index % 2, draw.colors()
    duration = 4
    start = int(draw.rng.integers(1, draw.last - duration - draw.level.lag))  # rest before and after: both are seen
    starts = [start, start + draw.level.lag][:: -1 if first else 1]
    speeds = [draw.speed() * draw.rng.choice([-1, 1]) for _ in starts]
    alongs = [speed * np.clip(draw.t - start, 0, duration) for speed, start in zip(speeds, starts, strict=True)]
    targets = [draw.body(color, path) for color, path in zip(colors, draw.lanes(alongs), strict=False)]
    scene = draw.open_scene([*draw.distractors(colors[2:]), *targets])
    text = "Each of these two shapes moves once. Which one moves first?"
    asked = Question(question_type="order", text=text, choices=tuple(colors[:2]), answer=colors[first])
    return [Draft(scenes=(scene,), questions=(asked,))]


def count(draw: Draw) -> list[Draft]:
    answer, colors = draw.index % 4 + 1, draw.colors()
    x, *places = draw.rng.permutation([0.17, 0.39, 0.61, 0.83]) + draw.uniform(-0.04, 0.04)
    look = draw.look(colors[0])
    target = Body(look=look, path=_bouncing(draw, x, answer, RADIUS * DOWNWARDS[look.shape]), radius=RADIUS)
    others = zip(colors[1:][: draw.level.distractors], places, strict=False)
    # Nothing else moves, neither camera nor distractors: it would be a clock that puts the frames in order.
    scene = draw.stage([*(draw.resting(color, place) for color, place in others), target], (ground_box(),), still=True)
    text = f"How many times does the {colors[0]} shape touch the ground?"
    asked = Question(question_type="count", text=text, choices=("1", "2", "3", "4"), answer=str(answer))
    return [Draft(scenes=(scene,), questions=(asked,))]


def _bouncing(draw: Draw, x: float, number: int, radius: float) -> np.ndarray:
    """A ball that touches the ground a given number of times and keeps its height: `[T, 2]`.

    The clip lasts for as many periods, from any of as many phases as it has steps. So at every moment the ball is at
    each height equally often, whatever the number; and if the number of steps has no factor in common with it, the
    frames as a set are those of any other number (for 13 steps and 4 bounces, phases 0, 4/13, 8/13, 12/13, 3/13...).
    """
    height, period = draw.uniform(0.4, 0.6), draw.last / number
    # The first contact; between two frames even where both are near it, so that one can tell.
    first = (draw.rng.integers(draw.last) + draw.uniform(0.4, 0.6)) / draw.last * period
    gravity = 8 * height / period**2
    rise = period / 2 - first  # time until it is at its highest (since then, if negative)
    start = (x, GROUND - radius - height + gravity / 2 * rise**2)
    motion = simulate(
        [start], [(0.0, -gravity * rise)], radius=radius, num_frames=draw.num_frames, gravity=gravity, ground=GROUND
    )
    if len(motion.contacts) != number:
        raise RuntimeError(f"the ball touched the ground {len(motion.contacts)} times, expected {number}")
    return motion.positions[:, 0]


def faster(draw: Draw) -> list[Draft]:
    quick, colors = draw.index % 2, draw.colors()
    top = draw.uniform(0.07, 0.09)
    speeds = [top, top / draw.level.ratio][:: -1 if quick else 1]
    alongs = [speed * draw.rng.choice([-1, 1]) * draw.t for speed in speeds]
    targets = [draw.body(color, path) for color, path in zip(colors, draw.lanes(alongs), strict=False)]
    scene = draw.open_scene([*draw.distractors(colors[2:]), *targets], boxes=draw.post())
    text = "Which of these two shapes moves faster?"
    asked = Question(question_type="faster", text=text, choices=tuple(colors[:2]), answer=colors[quick])
    return [Draft(scenes=(scene,), questions=(asked,))]


def speed(draw: Draw) -> list[Draft]:
    choices, colors = ("it speeds up", "it slows down"), draw.colors()
    ratio = 1 + 2.5 * (draw.level.ratio - 1)
    mean, last = draw.speed(), draw.last
    slow, quick = 2 * mean / (1 + ratio), 2 * mean * ratio / (1 + ratio)
    along = slow * draw.t + (quick - slow) * draw.t**2 / (2 * last)
    path = draw.rng.uniform(size=2) + along[:, None] * draw.heading()
    target = draw.body(colors[0], path)
    scene = draw.open_scene([*draw.distractors(colors[1:]), target], boxes=draw.post())
    answer = choices[draw.index % 2]
    text = f"Does the {colors[0]} shape speed up or slow down?"
    asked = Question(question_type="speed", text=text, choices=choices, answer=answer)
    return [Draft(scenes=(scene if answer == choices[0] else backward(scene),), questions=(asked,))]


def bounce(draw: Draw) -> list[Draft]:
    answer, colors = ("yes", "no")[draw.index % 2], draw.colors()
    moment = draw.uniform(0.38, 0.62) * draw.last
    away = draw.uniform(0.36, 0.42) / max(moment, draw.last - moment) * np.abs(draw.t - moment)
    side = draw.rng.choice([-1, 1]) * np.where((draw.t > moment) & (answer == "no"), -1, 1)
    path = np.stack([0.5 + side * away, np.full(draw.num_frames, draw.uniform(0.4, 0.8))], axis=1)
    target = draw.body(colors[0], path)
    scene = draw.stage([*draw.bystanders(colors[1:]), target], (panel(draw.level.screen),))
    text = f"Behind the screen, does the {colors[0]} shape bounce back?"
    asked = Question(question_type="bounce", text=text, choices=("yes", "no"), answer=answer)
    return [Draft(scenes=(scene,), questions=(asked,))]


def cause(draw: Draw) -> list[Draft]:
    mover, colors = draw.index % 2, draw.colors()
    moment = draw.uniform(0.3, 0.7) * draw.last
    pace = draw.uniform(0.45, 0.6) / (0.7 * draw.last)
    along = draw.heading()
    across = np.array([-along[1], along[0]])
    hit = draw.rng.uniform(size=2)
    start = hit - (2 * RADIUS + pace * moment) * along
    motion = simulate([start, hit], [pace * along, (0, 0)], radius=RADIUS, num_frames=draw.num_frames)
    (contact,) = motion.contacts
    names = [colors[mover], colors[1 - mover]]
    pair = [draw.body(color, motion.positions[:, k], ("circle",)) for k, color in enumerate(names)]
    # Distractors pass beside the two. To keep them away from all of their way would tell where it leads.
    others = []
    for color, lane in zip(colors[2:][: draw.level.distractors], (0.33, -0.33), strict=False):
        way = draw.uniform(0, 1) + draw.rng.choice([-1, 1]) * pace * draw.t
        path = hit + lane * across + way[:, None] * along
        others.append(draw.body(color, path, ("circle",)))
    scene = draw.open_scene([*others, *pair])
    text = "Which of these two shapes sets the other one in motion?"
    asked = Question(question_type="cause", text=text, choices=tuple(colors[:2]), answer=colors[mover])
    return [Draft(scenes=(scene,), questions=(asked,), notes={"event_frame": int(np.ceil(contact.time))})]


def cut(draw: Draw) -> list[Draft]:
    answer, colors = ("yes", "no")[draw.index % 2], draw.colors()
    look, axis, sign = draw.look(colors[0]), np.roll([1, 0], draw.rng.integers(2)), draw.rng.choice([-1, 1])
    start = int(draw.rng.integers(draw.num_frames // 2 - 2, draw.num_frames // 2 + 3))
    scenes = []
    for length, way in ((start, sign), (draw.num_frames - start, sign if answer == "yes" else -sign)):
        shot = replace(draw, num_frames=length)
        path = shot.straight(shot.speed() * way * axis)
        target = Body(look=look, path=path, radius=RADIUS)
        scenes.append(shot.open_scene([*shot.distractors(colors[1:]), target]))
    text = f"The clip cuts to another place. Does the {colors[0]} shape move in the same direction there as before?"
    asked = Question(question_type="cut", text=text, choices=("yes", "no"), answer=answer)
    return [Draft(scenes=tuple(scenes), questions=(asked,), notes={"cut_frame": start})]


def arrow(draw: Draw) -> list[Draft]:
    answer, colors = ("forward", "backward")[draw.index % 2], draw.colors()
    bodies = []
    for color in colors[: draw.level.distractors + 1]:
        stop, distance = draw.uniform(0.6, 0.9) * draw.last, draw.uniform(0.4, 0.7)
        friction = 2 * distance / stop**2
        place, pace = draw.rng.uniform(size=2), friction * stop * draw.heading()
        motion = simulate(
            [place], [pace], radius=RADIUS, num_frames=draw.num_frames, friction=friction, steps_per_frame=16
        )
        bodies.append(draw.body(color, motion.positions[:, 0]))
    scene = draw.open_scene(bodies, boxes=draw.post())
    text = "Here friction slows down whatever slides. Is the clip played forward or backward?"
    asked = Question(question_type="arrow", text=text, choices=("forward", "backward"), answer=answer)
    return [Draft(scenes=(scene if answer == "forward" else backward(scene),), questions=(asked,))]


# ---------------------------------------------------------------------------------------------------------------------
# What there is to ask


@dataclass(frozen=True, kw_only=True)
class QuestionType:
    asks: str
    recipe: Callable[[Draw], list[Draft]]
    """Of the clips that the question is asked about."""
    one_frame: float
    """The best accuracy that can be had from one frame, whichever; chance for every type but the control."""
    unordered: float
    """The best accuracy that can be had from all frames without their order (for `count`: see `unordered_ceiling`)."""
    why: str
    """What the frames tell without their order."""


NOTHING = "nothing"
QUESTION_TYPES: Mapping[str, QuestionType] = MappingProxyType(
    {
        name: QuestionType(asks=asks, recipe=recipe, one_frame=one_frame, unordered=unordered, why=why)
        for name, recipe, asks, one_frame, unordered, why in (
            ("direction", direction, "where a shape moves", 0.25, 0.5, "the axis"),
            ("camera", camera, "where the camera moves", 0.25, 0.5, "the axis"),
            ("next", following, "where a curve leads after the clip", 0.25, 0.76, "the curve, not its end"),
            ("order", order, "which of two shapes moves first", 0.5, 0.5, NOTHING),
            ("count", count, "how often a ball touches the ground", 0.25, 0.25, NOTHING),
            ("faster", faster, "which of two shapes is faster", 0.5, 1.0, "who is spread wider"),
            ("speed", speed, "whether a shape speeds up or slows down", 0.5, 0.5, NOTHING),
            ("bounce", bounce, "whether a shape bounces back behind a screen", 0.5, 1.0, "on which sides it is seen"),
            ("cause", cause, "which of two shapes sets the other in motion", 0.5, 0.5, NOTHING),
            ("cut", cut, "whether a shape moves as before after a cut", 0.5, 0.5, NOTHING),
            ("arrow", arrow, "whether sliding with friction is played backward", 0.5, 0.5, NOTHING),
            ("possible", possible, "whether an impossible event is seen", 0.5, 1.0, "that both tracks are seen"),
            ("color", direction, "the color of a shape: the easy control", 1.0, 1.0, "all, as one frame does"),
        )
    }
)


def unordered_ceiling(question_type: str, num_frames: int) -> tuple[float, str]:
    """The best accuracy with all frames of clips of that length without their order, and the reason.

    For `count`, where a ball touches the ground n times in a number of steps that has the factor g in common with n, every
    frame is there g times: numbers with different factors are distinguishable, those with the same are not.
    """
    kind = QUESTION_TYPES[question_type]
    if question_type != "count":
        return kind.unordered, kind.why
    factors = {math.gcd(num_frames - 1, number) for number in range(1, 5)}
    return len(factors) / 4, kind.why if len(factors) == 1 else "how often frames repeat themselves"
