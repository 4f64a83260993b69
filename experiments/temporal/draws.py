"""Random draws of the temporal benchmark: levels of difficulty, and parts that scenes share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .scenes import DOWNWARDS, PATTERNS, Body, Box, Look, Scene, still_camera
from .synthetic_clips import COLORS, SHAPES, Question

RADIUS = 0.08  # of every shape
GROUND = 0.88  # y of the ground of a stage that is seen from the side
# Combinations of color and shape that only test clips show.
HELD_OUT = frozenset({("red", "triangle"), ("green", "diamond"), ("blue", "square"), ("yellow", "triangle")})


@dataclass(frozen=True, kw_only=True)
class Level:
    """Level of difficulty. Lengths are fractions of the picture, speeds are per frame."""

    name: str
    distractors: int
    """Number of shapes without a question."""
    step: tuple[float, float]
    """Range of speeds."""
    ratio: float
    """Of the faster speed to the slower one, where speeds are compared."""
    lag: int
    """Frames between two events whose order is asked for."""
    contrast: float
    """Of the ground, in gray levels."""
    pan: float
    """Greatest speed of the camera; where the world does not wrap, 4 times as much over the whole clip."""
    zoom: float
    """Greatest factor by which the camera zooms over a clip, where the world does not wrap."""
    screen: float
    """Width of the screen that shapes pass behind, in types that are about one."""
    post: float
    """Side of a square that hides a part of the world in other types; 0: there is none."""
    plain_sight: bool
    """Whether shapes vanish and teleport in full view instead of behind the screen."""


LEVELS = {
    level.name: level
    for level in (
        Level(
            name="easy",
            distractors=0,
            step=(0.06, 0.08),
            ratio=2.2,
            lag=5,
            contrast=10,
            pan=0.0,
            zoom=1.0,
            screen=0.28,
            post=0.0,
            plain_sight=True,
        ),
        Level(
            name="medium",
            distractors=1,
            step=(0.05, 0.085),
            ratio=1.7,
            lag=3,
            contrast=17,
            pan=0.012,
            zoom=1.06,
            screen=0.34,
            post=0.14,
            plain_sight=False,
        ),
        Level(
            name="hard",
            distractors=2,
            step=(0.04, 0.09),
            ratio=1.35,
            lag=2,
            contrast=25,
            pan=0.022,
            zoom=1.12,
            screen=0.4,
            post=0.2,
            plain_sight=False,
        ),
    )
}


def panel(width: float) -> Box:
    """A screen in the middle of a stage, up to the lane of the bystanders."""
    return Box(kind="screen", center=(0.5, 0.22 + 0.5), half=(width / 2, 0.5))


def ground_box() -> Box:
    """A ground that covers all below `GROUND`."""
    return Box(kind="ground", center=(0.5, GROUND + 0.5), half=(2.0, 0.5))


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A clip without a name."""

    scenes: tuple[Scene, ...]
    """Shown one after the other, with a cut between them."""
    questions: tuple[Question, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else the JSON entries say about the clip."""


# ---------------------------------------------------------------------------------------------------------------------
# Drawing the parts of a scene


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Source of random draws of a recipe."""

    rng: np.random.Generator
    level: Level
    index: int
    """Number of the draft among those of its type and level; answers cycle with it."""
    num_frames: int
    may_hold_out: bool
    """Whether combinations in `HELD_OUT` are allowed."""

    @property
    def t(self) -> np.ndarray:
        """`[T]`."""
        return np.arange(self.num_frames, dtype=np.float64)

    @property
    def last(self) -> int:
        return self.num_frames - 1

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def flip(self) -> bool:
        return bool(self.rng.integers(2))

    def speed(self) -> float:
        return self.uniform(*self.level.step)

    def heading(self) -> np.ndarray:
        angle = self.uniform(0, 2 * np.pi)
        return np.array([np.cos(angle), np.sin(angle)])

    def colors(self) -> list[str]:
        """Choices in random order: each names one shape of the clip."""
        return [str(color) for color in self.rng.permutation(list(COLORS))]

    def look(self, color: str, shapes: tuple[str, ...] = SHAPES) -> Look:
        allowed = [shape for shape in shapes if self.may_hold_out or (color, shape) not in HELD_OUT]
        return Look(shape=str(self.rng.choice(allowed)), color=color, pattern=str(self.rng.choice(PATTERNS)))

    def body(self, color: str, path: np.ndarray, shapes: tuple[str, ...] = SHAPES) -> Body:
        return Body(look=self.look(color, shapes), path=path, radius=RADIUS)

    def straight(self, velocity: np.ndarray) -> np.ndarray:
        """A path with a random start in a world that wraps: `[T, 2]`."""
        return self.rng.uniform(size=2) + self.t[:, None] * velocity

    def lanes(self, alongs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Paths `[T, 2]` along two parallel lanes of a world that wraps, from the ways `[T]` along them: they never meet."""
        lanes = self.rng.permutation([0.25, 0.75]) + self.rng.uniform(-0.08, 0.08, size=2) + self.uniform(0, 1)
        paths = [
            np.stack([self.uniform(0, 1) + along, np.full_like(along, lane)], axis=1)
            for along, lane in zip(alongs, lanes, strict=True)
        ]
        return [path[:, ::-1] for path in paths] if self.flip() else paths

    def distractors(self, colors: Sequence[str], shapes: tuple[str, ...] = SHAPES) -> list[Body]:
        """Cross a world that wraps."""
        return [
            self.body(color, self.straight(self.speed() * self.heading()), shapes)
            for color in colors[: self.level.distractors]
        ]

    def resting(self, color: str, x: float) -> Body:
        """A shape that stands on the ground of a stage."""
        look = self.look(color)
        place = (x, GROUND - DOWNWARDS[look.shape] * RADIUS)
        return Body(look=look, path=np.tile(place, (self.num_frames, 1)), radius=RADIUS)

    def bystanders(self, colors: Sequence[str]) -> list[Body]:
        """Distractors that drift along the upper edge of a stage, above its screen."""
        bodies = []
        for color, place in zip(colors[: self.level.distractors], self.rng.permutation([0.25, 0.75]), strict=False):
            x = place + self.uniform(-0.05, 0.05) + self.uniform(-0.008, 0.008) * (self.t - self.last / 2)
            bodies.append(self.body(color, np.stack([x, np.full_like(x, 0.11)], axis=1)))
        return bodies

    def post(self) -> tuple[Box, ...]:
        """A square that hides a part of the world, also in the way of the shapes: a free way would give the direction away."""
        if not self.level.post:
            return ()
        return (Box(kind="screen", center=tuple(self.rng.uniform(size=2)), half=(self.level.post / 2,) * 2),)

    def open_scene(
        self, bodies: Sequence[Body], *, boxes: tuple[Box, ...] = (), camera: np.ndarray | None = None
    ) -> Scene:
        """A world that wraps around, over which the camera glides."""
        if camera is None:
            camera = self.gliding(self.level.pan * self.uniform(0.5, 1) * self.heading())
        return self._scene(tuple(bodies), boxes, camera, wraps=True)

    def gliding(self, velocity: np.ndarray) -> np.ndarray:
        """A camera with a random start in a world that wraps: `[T, 3]`."""
        camera = still_camera(self.num_frames)
        camera[:, :2] = self.rng.uniform(size=2) + (self.t - self.last / 2)[:, None] * velocity
        return camera

    def stage(self, bodies: Sequence[Body], boxes: tuple[Box, ...], *, still: bool = False) -> Scene:
        """A world that does not wrap. The camera rests, or moves and zooms so little that all stays in view."""
        level, share = self.level, self.t / self.last
        camera = still_camera(self.num_frames)
        if not still:
            camera[:, :2] += 4 * level.pan * self.uniform(0.5, 1) * (share - 0.5)[:, None] * self.heading()
            zoom = level.zoom ** (-share * self.uniform(0.5, 1))  # outwards from 1, so that nothing leaves
            camera[:, 2] = zoom[::-1] if self.flip() else zoom
        return self._scene(tuple(bodies), boxes, camera, wraps=False)

    def _scene(self, bodies: tuple[Body, ...], boxes: tuple[Box, ...], camera: np.ndarray, *, wraps: bool) -> Scene:
        seed = int(self.rng.integers(2**32))
        contrast = self.level.contrast
        return Scene(bodies=bodies, boxes=boxes, camera=camera, wraps=wraps, contrast=contrast, texture_seed=seed)
