"""Scenes of the temporal benchmark: bodies with simple physics, occluders, a camera, and their pictures.

    motion = simulate([(0.2, 0.5), (0.6, 0.5)], [(0.05, 0), (0, 0)], radius=0.08, num_frames=16)   # an elastic push
    scene = Scene(bodies=..., camera=still_camera(16), ...)
    frames = render([scene], size=96)                                    # [16, 96, 96, 3] uint8

Lengths are fractions of the picture at zoom 1, x to the right and y downwards; the camera looks at (0.5, 0.5) if it
rests. The unit of time is one frame. A world may wrap around with period 1 (what leaves on the right comes back on the
left), and its ground is a texture with the same period, so that camera motion is seen wherever the camera is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .synthetic_clips import COLORS, SHAPES, signed_distance

PATTERNS = ("plain", "striped", "ringed", "spotted")
# of boxes, as (dark, light) RGB: none of them is near the color of a shape
BOX_COLORS = {
    "screen": ((84, 88, 112), (112, 116, 140)),
    "wall": ((40, 36, 40), (66, 60, 62)),
    "ground": ((62, 74, 62), (82, 94, 78)),
}
# How far a shape reaches from its center to either side, and how far down, in radii (see `signed_distance`).
SIDEWAYS = {"circle": 1.0, "square": 0.89, "diamond": 0.89 * 2**0.5, "triangle": 0.78 * 3**0.5}
DOWNWARDS = {"circle": 1.0, "square": 0.89, "diamond": 0.89 * 2**0.5, "triangle": 0.78}


# ---------------------------------------------------------------------------------------------------------------------
# Physics


@dataclass(frozen=True, kw_only=True)
class Contact:
    time: float
    """In frames; of two bodies, exact to one step of the simulation."""
    first: int
    second: int | None
    """The other body; None: the ground."""


@dataclass(frozen=True, kw_only=True)
class Motion:
    positions: np.ndarray
    """`[num_frames, bodies, 2]`."""
    velocities: np.ndarray
    """`[num_frames, bodies, 2]`, per frame."""
    contacts: tuple[Contact, ...]


def simulate(
    positions: Sequence[Sequence[float]],
    velocities: Sequence[Sequence[float]],
    *,
    radius: float,
    num_frames: int,
    masses: Sequence[float] | None = None,
    gravity: float = 0.0,
    friction: float = 0.0,
    restitution: float = 1.0,
    ground: float | None = None,
    steps_per_frame: int = 64,
) -> Motion:
    """Discs that fall, slide, bounce and push each other, in an unbounded plane, in small time steps.

    Args:
        positions, velocities: of the centers in frame 0, `[bodies, 2]`.
        masses: 1 each if not given.
        gravity: acceleration downwards (towards greater y), per frame squared.
        friction: deceleration of whatever slides, per frame squared, against its velocity, until it rests.
        restitution: relative speed after a contact over that before it: 1 elastic (no energy is lost), 0 sticks.
        ground: y of a floor that nothing falls through.

    Raises:
        ValueError: if bodies overlap in frame 0 (what then happens has no physics), or the numbers do not fit.
    """
    n = len(positions)
    masses = [1.0] * n if masses is None else list(masses)
    if len(velocities) != n or len(masses) != n:
        raise ValueError(f"{n} positions, {len(velocities)} velocities and {len(masses)} masses, expected as many")
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    for i, j in pairs:
        if np.hypot(*np.subtract(positions[i], positions[j])) < 2 * radius:
            raise ValueError(f"bodies {i} and {j} overlap at the start: radius is {radius}")
    # Plain floats: for a handful of bodies they are many times faster than arrays.
    x, y = ([float(p[axis]) for p in positions] for axis in (0, 1))
    u, v = ([float(w[axis]) for w in velocities] for axis in (0, 1))
    dt = 1 / steps_per_frame
    places, speeds, contacts = [], [], []
    for frame in range(num_frames):
        places.append(list(zip(x, y, strict=True)))
        speeds.append(list(zip(u, v, strict=True)))
        for step in range(steps_per_frame if frame < num_frames - 1 else 0):
            now = frame + (step + 1) * dt
            for i in range(n):
                kept = 1.0
                if friction:
                    speed = (u[i] ** 2 + v[i] ** 2) ** 0.5
                    kept = max(0.0, 1 - friction * dt / speed) if speed else 0.0
                x[i] += 0.5 * (1 + kept) * u[i] * dt
                y[i] += 0.5 * (1 + kept) * v[i] * dt + 0.5 * gravity * dt * dt
                u[i] *= kept
                v[i] = v[i] * kept + gravity * dt
                if ground is not None and y[i] + radius > ground and v[i] > 0:
                    # Back to the moment of the contact, and on from there: no height is won or lost, and no time.
                    depth = y[i] + radius - ground
                    fallen = max(0.0, v[i] ** 2 - 2 * gravity * depth) ** 0.5
                    since = 2 * depth / (v[i] + fallen)
                    v[i] = gravity * since - restitution * fallen
                    y[i] = min(
                        ground - radius, ground - radius - restitution * fallen * since + gravity * since**2 / 2
                    )
                    if fallen > 2 * gravity * dt:  # else it rests
                        contacts.append(Contact(time=now - since, first=i, second=None))
            for i, j in pairs:
                dx, dy = x[j] - x[i], y[j] - y[i]
                distance = (dx * dx + dy * dy) ** 0.5
                if distance >= 2 * radius:
                    continue
                dx, dy = dx / distance, dy / distance
                closing = (u[i] - u[j]) * dx + (v[i] - v[j]) * dy
                if closing <= 0:
                    continue
                impulse = (1 + restitution) * closing / (1 / masses[i] + 1 / masses[j])
                for k, sign in ((i, -1), (j, 1)):
                    u[k] += sign * impulse / masses[k] * dx
                    v[k] += sign * impulse / masses[k] * dy
                contacts.append(Contact(time=now, first=i, second=j))
    return Motion(positions=np.array(places), velocities=np.array(speeds), contacts=tuple(contacts))


# ---------------------------------------------------------------------------------------------------------------------
# What a scene consists of


@dataclass(frozen=True, kw_only=True)
class Look:
    shape: str
    color: str
    pattern: str

    def __post_init__(self) -> None:
        for name, allowed in (("shape", SHAPES), ("color", tuple(COLORS)), ("pattern", PATTERNS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {allowed}")


@dataclass(frozen=True, kw_only=True)
class Body:
    look: Look
    path: np.ndarray
    """Centers in the world, `[T, 2]`; NaN in frames without the body."""
    radius: float


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle that rests in the world."""

    kind: Literal["screen", "wall", "ground"]
    """A screen hides the bodies, which pass behind it; wall and ground are behind them."""
    center: tuple[float, float]
    half: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One take, without a cut."""

    bodies: tuple[Body, ...]
    """Later ones are in front."""
    boxes: tuple[Box, ...] = ()
    camera: np.ndarray
    """Where it looks, x and y, and its zoom: `[T, 3]`."""
    wraps: bool
    contrast: float
    """Of the texture: standard deviation in gray levels."""
    texture_seed: int

    @property
    def num_frames(self) -> int:
        return len(self.camera)

    def seen_at(self, path: np.ndarray) -> np.ndarray:
        """Points of the world as fractions of the picture, x and y: `[T, 2]` -> `[T, 2]`; in a world that wraps, 0 to 1."""
        offset = path - self.camera[:, :2]
        if self.wraps:
            offset = offset - np.round(offset)
        return 0.5 + offset * self.camera[:, 2:]


def still_camera(num_frames: int) -> np.ndarray:
    return np.tile([0.5, 0.5, 1.0], (num_frames, 1))


def backward(scene: Scene) -> Scene:
    """The scene played backwards."""
    bodies = tuple(replace(body, path=body.path[::-1]) for body in scene.bodies)
    return replace(scene, bodies=bodies, camera=scene.camera[::-1])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


class Ground:
    """A still texture: grayish waves of period 1, which continue in all directions."""

    def __init__(self, seed: int, contrast: float, num_waves: int = 40) -> None:
        rng = np.random.default_rng(seed)
        self.waves = rng.integers(-6, 7, size=(num_waves, 2)) * 2 * np.pi
        self.phases = rng.uniform(0, 2 * np.pi, size=num_waves)
        strengths = 1 / (1 + np.hypot(*self.waves.T) / (4 * np.pi))
        self.strengths = strengths * contrast * np.sqrt(2 / (strengths**2).sum())
        self.tint = rng.uniform(0.88, 1.12, size=3)

    def picture(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Colors `[H, W, 3]` float at the places `x` `[W]` and `y` `[H]` of the world."""
        across, down = x[:, None] * self.waves[:, 0] + self.phases, y[:, None] * self.waves[:, 1]
        # cos(a + b), with the two axes apart; einsum's own loops give the same bits on any number of threads
        rows = np.concatenate([np.cos(down), -np.sin(down)], axis=1) * np.tile(self.strengths, 2)
        columns = np.concatenate([np.cos(across), np.sin(across)], axis=1)
        gray = 100 + np.einsum("yk,xk->yx", rows.astype(np.float32), columns.astype(np.float32))
        return np.clip(gray, 35, 165)[..., None] * self.tint.astype(np.float32)


def render(scenes: Sequence[Scene], size: int = 96, frames: Sequence[int] | None = None) -> np.ndarray:
    """Draw scenes one after the other, with a cut between them: `[T, size, size, 3]` uint8, RGB.

    Args:
        frames: only these, numbered through all scenes.
    """
    total = sum(scene.num_frames for scene in scenes)
    wanted = range(total) if frames is None else frames
    drawn: dict[int, np.ndarray] = {}
    start = 0
    for scene in scenes:
        # Noise and ground have generators of their own: which frames are wanted changes neither.
        noise = np.random.default_rng([scene.texture_seed, 1])
        ground, last_view, below = Ground(scene.texture_seed, scene.contrast), None, None
        for frame in range(scene.num_frames):
            grain = noise.integers(-3, 4, size=(size, size, 3), dtype=np.int8)
            if start + frame not in wanted:
                continue
            if last_view is None or not np.array_equal(last_view, scene.camera[frame]):
                last_view = scene.camera[frame]
                below = ground.picture(*_view(last_view, size))
            picture = _draw(scene, frame, size, below.copy()) + grain
            drawn[start + frame] = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
        start += scene.num_frames
    return np.stack([drawn[frame] for frame in wanted])


def _view(camera: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """World coordinates of the columns and the rows of pixels: `[size]` each."""
    offset = ((np.arange(size) + 0.5) / size - 0.5) / camera[2]
    return camera[0] + offset, camera[1] + offset


def _draw(scene: Scene, frame: int, size: int, picture: np.ndarray) -> np.ndarray:
    """Draw all bodies of one frame onto `picture` `[size, size, 3]`, which is changed and returned."""
    view = _view(scene.camera[frame], size)
    sharpness = size * scene.camera[frame, 2]  # pixels per unit of length: edges are one pixel wide
    boxes = {kind: [box for box in scene.boxes if box.kind == kind] for kind in BOX_COLORS}

    def offsets(center: Sequence[float]) -> list[np.ndarray]:
        some = [place - middle for place, middle in zip(view, center, strict=True)]
        return [offset - np.round(offset) for offset in some] if scene.wraps else some

    def draw_box(box: Box) -> None:
        dx, dy = offsets(box.center)
        inside = [
            np.clip(0.5 + (half - np.abs(d)) * sharpness, 0, 1) for d, half in zip((dx, dy), box.half, strict=True)
        ]
        dark, light = (np.array(color, dtype=np.float32) for color in BOX_COLORS[box.kind])
        planks = 0.5 + 0.5 * np.sin(2 * np.pi * dx / 0.08)  # upright, at rest in the world
        color = dark + planks[None, :, None] * (light - dark)
        picture[...] += (inside[1][:, None] * inside[0])[..., None].astype(np.float32) * (color - picture)

    def draw_body(body: Body) -> None:
        dx, dy = offsets(body.path[frame])
        columns, rows = (np.flatnonzero(np.abs(d) < 1.7 * body.radius) for d in (dx, dy))
        if not (len(columns) and len(rows)):
            return  # out of the picture
        x, y = dx[None, columns], dy[rows, None]
        cover = np.clip(0.5 - signed_distance(body.look.shape, x, y, body.radius) * sharpness, 0, 1)[..., None]
        color = shading(body.look.pattern, x / body.radius, y / body.radius)[..., None] * COLORS[body.look.color]
        area = np.ix_(rows, columns)
        picture[area] += cover * (color - picture[area])

    for box in boxes["ground"] + boxes["wall"]:
        draw_box(box)
    for body in scene.bodies:
        if not np.isnan(body.path[frame]).any():
            draw_body(body)
    for box in boxes["screen"]:
        draw_box(box)
    return picture


def shading(pattern: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Brightness of a shape, 0.64 to 1, in coordinates that move with it (its radius is 1)."""
    if pattern == "plain":
        wave = np.ones(np.broadcast_shapes(x.shape, y.shape))
    elif pattern == "striped":
        wave = np.sin(6 * (x + y))
    elif pattern == "ringed":
        wave = np.cos(9 * np.hypot(x, y))
    else:  # spotted
        wave = 1 - 2 * np.cos(4 * x) ** 2 * np.cos(4 * y) ** 2
    return 0.82 + 0.18 * wave
