"""Clips of scripted robot tasks of MetaWorld, with the true state of the object that the robot moves.

MetaWorld (Yu et al., 2019; MIT licence) on MuJoCo (Apache 2.0), rendered on the CPU. Cameras of training, validation and test
look from different directions. A clip shows the middle of the motion. It is also played backwards: opening becomes closing, and
the mean frame is the same for both answers.

| question type | choices |
|---|---|
| opens | opens, closes |
| object (static control) | door, drawer, window, faucet |

Pairs: the moving part slips along its joint (slip), the whole object is lifted (lift) or gone (gone); the part is stuck while
the hand moves on (stuck), or moves against the hand (reverse). The pairs `light` and `floor` change the appearance alone, and
nothing impossible happens in them.
"""

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from .clips import ClipQuestion, LibraryBuilder

OBJECTS = {"door": "doorjoint", "drawer": "goal_slidey", "window": "window_slide", "faucet": "knob_Joint_1"}
"""Objects that the robot opens and closes, with their joints."""
ACTIONS = ("opens", "closes")
EVENTS = ("slip", "lift", "gone")
"""Sudden changes, which the difference of two frames shows as well."""
MOTIONS = ("stuck", "reverse")
"""Impossible motions without a sudden change."""
APPEARANCES = ("light", "floor")
"""Harmless changes of the appearance."""
AZIMUTHS = {"train": (100.0, 125.0), "val": (128.0, 134.0), "test": (137.0, 150.0)}
"""Directions of the cameras in degrees."""
MAX_STEPS = 250
NOISE = 0.1  # of the actions, whose range is -1 to 1
MIN_CHANGE, MIN_PIXELS = (
    25,
    30,
)  # as many pixels of a pair differ by so much at the event; with fewer, it is hardly seen


@dataclass(frozen=True, kw_only=True)
class MetaworldSettings:
    """Numbers of runs of the robot for each of the eight tasks, by split, and all else that the clips depend on."""

    name: str = "metaworld"
    num_train: int = 24
    num_val: int = 3
    num_test: int = 10
    num_cameras: int = 3
    """Views of each run; each is a recording that is played in both directions."""
    num_val_pairs: int = 40
    num_test_pairs: int = 160
    events: tuple[str, ...] = EVENTS + APPEARANCES
    """Of the pairs, in turn."""
    num_frames: int = 6
    frame_seconds: float = 4 / 35
    """As in the clips of ViZDoom; the robot's own time is stretched to it."""
    image_size: int = 112
    seed: int = 0

    def record(self) -> LibraryBuilder:
        """Run the robot and render; about 5 recordings a CPU second.

        Raises:
            ImportError: if MetaWorld or MuJoCo is not installed.
        """
        return _record(self)


@dataclass(frozen=True)
class Camera:
    azimuth: float
    elevation: float
    distance: float


def draw_camera(split: str, rng: np.random.Generator) -> Camera:
    """A camera in the directions of a split."""
    return Camera(
        azimuth=float(rng.uniform(*AZIMUTHS[split])),
        elevation=float(rng.uniform(-40, -25)),
        distance=float(rng.uniform(0.9, 1.1)),
    )


def shown_states(positions: np.ndarray, num_frames: int) -> np.ndarray | None:
    """Steps `[num_frames]` at which the object has moved by 20% to 80% of its whole way, evenly; None if it hardly moves.

    Args:
        positions: `[N]` of the object's joint.
    """
    whole = positions[-1] - positions[0]
    if abs(whole) < 0.02:
        return None
    progress = (positions - positions[0]) / whole
    first, last = int((progress >= 0.2).argmax()), int((progress >= 0.8).argmax())
    if last - first < num_frames - 1:
        return None
    return np.linspace(first, last, num_frames).round().astype(int)


class _Stage:
    """One task: its simulator, its scripted policy and its renderer."""

    def __init__(self, thing: str, action: str, size: int, seed: int) -> None:
        if "mujoco" in sys.modules and "MUJOCO_GL" not in os.environ:
            raise RuntimeError(
                "mujoco was imported before MUJOCO_GL was set, expected MUJOCO_GL=egl in the environment"
            )
        os.environ.setdefault("MUJOCO_GL", "egl")  # read once, when mujoco is imported
        os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
        os.environ.setdefault("LP_NUM_THREADS", "0")
        try:
            import metaworld.env_dict
            import mujoco
            from metaworld import policies
        except ImportError as error:
            raise ImportError("MetaWorld is not installed: pip install 'llava-next-ar[sources]'") from error
        verb = {"opens": "open", "closes": "close"}[action]
        self._mujoco = mujoco
        self.environment = metaworld.env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[
            f"{thing}-{verb}-v3-goal-observable"
        ](seed=seed)
        self.environment.seeded_rand_vec = True
        self.environment._freeze_rand_vec = False
        self.policy = getattr(policies, f"Sawyer{thing.title()}{verb.title()}V3Policy")()
        self.model, self.data = self.environment.model, self.environment.data
        self.joint = self.model.joint(OBJECTS[thing])
        self.model.vis.quality.offsamples = 0
        self.renderer = mujoco.Renderer(self.model, size, size)
        self.options = mujoco.MjvOption()
        self.options.sitegroup[:] = 0  # the markers of the goal

    def run(self, rng: np.random.Generator) -> np.ndarray:
        """States `[N, nq]` of one run of the policy up to its success, with noise on its actions."""
        observation, _ = self.environment.reset()
        states, after_success = [self.data.qpos.copy()], 0
        for _ in range(MAX_STEPS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of the policies, whose actions are clipped here
                action = self.policy.get_action(observation)
            action = np.clip(action + NOISE * rng.normal(size=action.shape), -1, 1)
            observation, _, _, truncated, info = self.environment.step(action)
            states.append(self.data.qpos.copy())
            after_success += bool(info["success"])
            if truncated or after_success > 5:
                break
        return np.stack(states)

    def render(self, states: np.ndarray, camera: Camera, edit: Callable[[int], None] | None = None) -> np.ndarray:
        """Frames `[T, H, W, 3]` of states `[T, nq]`; `edit` may change the simulator's state before each frame."""
        view = self._mujoco.MjvCamera()
        view.type = self._mujoco.mjtCamera.mjCAMERA_FREE
        view.lookat[:] = (0.0, 0.65, 0.1)
        view.azimuth, view.elevation, view.distance = camera.azimuth, camera.elevation, camera.distance
        flags, frames = self._mujoco.mjtRndFlag, []
        for number, state in enumerate(states):
            self.data.qpos[:] = state
            if edit is not None:
                edit(number)
            self._mujoco.mj_forward(self.model, self.data)
            self.renderer.update_scene(self.data, view, self.options)
            self.renderer.scene.flags[flags.mjRND_SHADOW] = 0  # twenty times faster without these two
            self.renderer.scene.flags[flags.mjRND_REFLECTION] = 0
            frames.append(self.renderer.render())
        return np.stack(frames)

    def render_with(self, event: str, states: np.ndarray, camera: Camera, first: int) -> np.ndarray:
        """Frames with an event from frame `first` on."""
        model, place = self.model, int(self.joint.qposadr[0])
        body = self._object_body()
        kept = [model.body_pos.copy(), model.mat_rgba.copy(), model.vis.headlight.ambient.copy()]

        def edit(number: int) -> None:
            if number < first:
                return
            if event == "slip":
                self.data.qpos[place] = states[0][place] if number > len(states) // 2 else states[-1][place]
            elif event == "lift":
                model.body_pos[body] = kept[0][body] + (0.0, 0.0, 0.12)
            elif event == "gone":
                model.body_pos[body] = kept[0][body] + (0.0, 0.0, -5.0)
            elif event == "stuck":
                self.data.qpos[place] = states[first - 1][place]
            elif event == "reverse":
                self.data.qpos[place] = states[max(0, 2 * (first - 1) - number)][place]
            elif event == "light":
                model.vis.headlight.ambient[:] = kept[2] + 0.25
            elif event == "floor":
                for surface in ("basic_floor", "table_wood"):
                    model.mat(surface).rgba[:] = (0.6, 0.8, 1.0, 1.0)
            else:
                raise ValueError(f"event is {event!r}, expected one of {EVENTS + MOTIONS + APPEARANCES}")

        try:
            return self.render(states, camera, edit)
        finally:
            model.body_pos[:], model.mat_rgba[:], model.vis.headlight.ambient[:] = kept

    def _object_body(self) -> int:
        """The body just below the world that holds the object's joint."""
        body = int(self.model.jnt_bodyid[self.joint.id])
        while self.model.body_parentid[body] != 0:
            body = int(self.model.body_parentid[body])
        return body

    def close(self) -> None:
        self.renderer.close()


def questions_of(thing: str, action: str) -> list[ClipQuestion]:
    """Both questions about a clip."""
    return [
        ClipQuestion(question_type="opens", text="does the robot open or close it ?", choices=ACTIONS, answer=action),
        ClipQuestion(
            question_type="object", text="which object does the robot move ?", choices=tuple(OBJECTS), answer=thing
        ),
    ]


def _record(settings: MetaworldSettings) -> LibraryBuilder:
    built = LibraryBuilder()
    tasks = [(thing, action) for thing in OBJECTS for action in ACTIONS]
    runs = {"val": settings.num_val, "test": settings.num_test, "train": settings.num_train}
    with tqdm(total=len(tasks) * sum(runs.values()), desc="metaworld", unit="run") as bar:
        for index, (thing, action) in enumerate(tasks):
            with closing(_Stage(thing, action, settings.image_size, settings.seed)) as stage:
                for split, number in runs.items():
                    rng = np.random.default_rng([settings.seed, index, len(split)])
                    for run in range(number):
                        states, shown = _successful_run(stage, settings.num_frames, rng)
                        name = f"{split}_{thing}_{action}_{run:03}"
                        _add_views(built, stage, states[shown], split, name, (thing, action), settings, rng)
                        _add_pairs(built, stage, states[shown], split, name, run * len(tasks) + index, settings, rng)
                        bar.update()
    return built


def _successful_run(stage: _Stage, num_frames: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """States of a run, and the steps to show.

    Raises:
        RuntimeError: if the object has hardly moved in 20 runs.
    """
    for _ in range(20):
        states = stage.run(rng)
        shown = shown_states(states[:, int(stage.joint.qposadr[0])], num_frames)
        if shown is not None:
            return states, shown
    raise RuntimeError(f"the robot has not moved {stage.joint.name} in 20 runs")


def _add_views(
    built: LibraryBuilder,
    stage: _Stage,
    states: np.ndarray,
    split: str,
    name: str,
    task: tuple[str, str],
    settings: MetaworldSettings,
    rng: np.random.Generator,
) -> None:
    thing, action = task
    reverse = ACTIONS[1 - ACTIONS.index(action)]
    for view in range(settings.num_cameras):
        camera = draw_camera(split, rng)
        built.add_clip(
            stage.render(states, camera),
            name=f"{name}_{view}",
            split=split,
            group=f"azimuth {camera.azimuth:.1f}",
            questions=questions_of(thing, action),
            backwards_questions=questions_of(thing, reverse),
        )


def _add_pairs(
    built: LibraryBuilder,
    stage: _Stage,
    states: np.ndarray,
    split: str,
    name: str,
    number: int,
    settings: MetaworldSettings,
    rng: np.random.Generator,
) -> None:
    """The pairs of one run: as many as bring the split's number together."""
    wanted = {"val": settings.num_val_pairs, "test": settings.num_test_pairs}.get(split, 0)
    total = {"val": settings.num_val, "test": settings.num_test}.get(split, 0) * len(OBJECTS) * len(ACTIONS)
    for pair in range(wanted * number // max(total, 1), wanted * (number + 1) // max(total, 1)):
        event = settings.events[pair % len(settings.events)]
        for _ in range(10):
            camera, first = draw_camera(split, rng), int(rng.integers(2, settings.num_frames - 1))
            possible = stage.render(states, camera)
            changed = stage.render_with(event, states, camera, first)
            seen = -1 if event in MOTIONS else first
            change = np.abs(possible[seen].astype(np.int16) - changed[seen]).max(axis=-1)
            if (change >= MIN_CHANGE).sum() >= MIN_PIXELS:
                break
        else:
            raise RuntimeError(f"the event {event} of {name} is not seen from ten cameras")
        built.add_pair(
            possible,
            changed,
            name=f"{name}_pair{pair:03}",
            split=split,
            group=f"azimuth {camera.azimuth:.1f}",
            event=event,
            impossible=event not in APPEARANCES,
        )
