"""Violation of expectation: pairs of a possible and an impossible clip that are equal up to the event.

A pair is made of two tracks, each of which is possible from the beginning to the end: with the shape and without it,
on one lane and on another, in one color and in another, in one shape and in another, on the left of a wall and on its
right. The possible clip shows one track; the impossible one shows it up to the event, and the other track from then on.
As either track comes first equally often, every single frame of an impossible clip is as often one of a possible clip.

    vanish      a shape is gone, or there is one where there was none
    teleport    it goes on in another lane
    color       it comes out from behind the screen in another color
    shape       it comes out as another shape
    solid       it comes out on the other side of a wall (which is seen above the screen) instead of bouncing back
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .draws import GROUND, HELD_OUT, RADIUS, Draft, Draw, ground_box, panel
from .scenes import SIDEWAYS, Body, Box, Look, simulate
from .synthetic_clips import SHAPES, Question

EVENTS = ("vanish", "teleport", "color", "shape", "solid")


def possible(draw: Draw) -> list[Draft]:
    """The two clips of a pair, the possible one first.

    They share the keys `event`, `event_frame` (the first frame that differs), `event_places` (where it does: `[x, y]`
    as fractions of that frame) and `event_hidden` (whether it happens behind the screen, and shows only afterwards).
    """
    event, colors = EVENTS[draw.index // 2 % len(EVENTS)], draw.colors()
    thrown = event in ("vanish", "color", "shape") and draw.flip()
    hidden = event in ("color", "shape", "solid") or not draw.level.plain_sight
    looks = _two_looks(draw, event, colors)
    reach = RADIUS * max(SIDEWAYS[look.shape] for look in looks)
    wall = 0.015  # half its width
    width = max(draw.level.screen, 0.42) if event == "solid" else draw.level.screen
    near = RADIUS + wall if event == "solid" else 0.0  # as near as the center comes to the middle of the picture
    while True:
        moment = draw.uniform(0.36, 0.64) * draw.last
        pace = (draw.uniform(0.37, 0.42) - near) / max(moment, draw.last - moment)
        away = near + pace * np.abs(draw.t - moment)
        if not hidden:
            event_frame = int(np.ceil(moment))
            break
        # The event is seen when the shape ought to come out: wholly hidden in one frame, seen in the next.
        out = away + reach - width / 2  # how far it sticks out
        event_frame = int(np.argmax((draw.t > moment) & (out > 0.6 * pace)))
        if out[event_frame - 1] <= 0:
            break
    x = 0.5 + draw.rng.choice([-1, 1]) * (away if event == "solid" else pace * (draw.t - moment))
    y, boxes, bystanders = _thrown(draw, moment, colors[2:]) if thrown else _rolling(draw, colors[2:])
    path = np.stack([x, y], axis=1)
    tracks = [path, path]
    if event == "vanish":
        tracks[1] = np.full_like(path, np.nan)
    elif event == "teleport":
        lanes = draw.uniform(0.36, 0.48), draw.uniform(0.7, 0.84)
        tracks = [np.stack([x, np.full_like(x, lane)], axis=1) for lane in lanes]
    elif event == "solid":
        tracks[1] = path * [-1, 1] + [1, 0]
        boxes += (Box(kind="wall", center=(0.5, 0.5), half=(wall, 0.5)),)
    if hidden:
        boxes += (panel(width),)
    if draw.index % 2:
        tracks, looks = tracks[::-1], looks[::-1]

    after = (draw.t >= event_frame)[:, None]
    bodies = [
        Body(look=look, path=np.where(after == late, track, np.nan), radius=RADIUS)
        for late, track, look in zip((False, True), tracks, looks, strict=True)
    ]
    whole = Body(look=looks[0], path=tracks[0], radius=RADIUS)
    scene = draw.stage([*bystanders, whole], boxes)
    impossible = replace(scene, bodies=(*bystanders, *bodies))
    places = [scene.seen_at(track)[event_frame] for track in tracks]
    places = [place for place in places if not np.isnan(place).any()]
    if len(places) == 2 and np.array_equal(*places):
        places = places[:1]
    notes = {
        "event": event,
        "event_frame": event_frame,
        "event_places": [[round(float(value), 4) for value in place] for place in places],
        "event_hidden": hidden,
    }
    choices = ("possible", "impossible")
    text = "Could this happen in the real world, or is it impossible?"
    return [
        Draft(
            scenes=(one,),
            questions=(Question(question_type="possible", text=text, choices=choices, answer=choices[twin]),),
            notes=notes,
        )
        for twin, one in enumerate((scene, impossible))
    ]


def _two_looks(draw: Draw, event: str, colors: Sequence[str]) -> list[Look]:
    """Looks before and after an event that changes the look."""
    look = draw.look(colors[0])
    if event == "color":
        while not draw.may_hold_out and (colors[1], look.shape) in HELD_OUT:
            look = draw.look(colors[0])
        return [look, Look(shape=look.shape, color=colors[1], pattern=look.pattern)]
    if event == "shape":
        other = draw.look(colors[0], tuple(shape for shape in SHAPES if shape != look.shape))
        return [look, Look(shape=other.shape, color=look.color, pattern=look.pattern)]
    return [look, look]


def _rolling(draw: Draw, colors: Sequence[str]) -> tuple[np.ndarray, tuple[Box, ...], list[Body]]:
    """A scene from above: heights `[T]`, boxes and bystanders."""
    return np.full(draw.num_frames, draw.uniform(0.4, 0.82)), (), draw.bystanders(colors)


def _thrown(draw: Draw, moment: float, colors: Sequence[str]) -> tuple[np.ndarray, tuple[Box, ...], list[Body]]:
    """A scene from the side: up and down again under gravity, over a ground on which others rest."""
    top, turn = draw.uniform(0.36, 0.46), moment + draw.uniform(-1, 1)
    longest = max(turn, draw.last - turn)
    gravity = draw.uniform(0.7, 0.95) * 2 * (GROUND - 1.3 * RADIUS - top) / longest**2
    start = [(0.0, top + gravity / 2 * turn**2)]
    motion = simulate(start, [(0.0, -gravity * turn)], radius=RADIUS, num_frames=draw.num_frames, gravity=gravity)
    places = draw.rng.permutation([draw.uniform(0.1, 0.2), draw.uniform(0.8, 0.9)])
    others = zip(colors[: draw.level.distractors], places, strict=False)
    resting = [draw.resting(color, place) for color, place in others]
    return motion.positions[:, 0, 1], (ground_box(),), resting
