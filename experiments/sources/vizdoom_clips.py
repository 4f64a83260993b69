"""Clips of the first-person simulator ViZDoom on the maps of Freedoom, with the true actions of the viewer.

ViZDoom (Wydmuch et al., 2018; MIT licence) carries two WAD files of Freedoom (BSD licence) with 68 maps. Maps of validation and
test are not among those of training. The viewer stands at the place of some item of the map, without monsters.

| question type | clip | choices |
|---|---|---|
| turn | the view turns steadily | left, right |
| strafe | the viewer steps sideways steadily | left, right |
| order | first a turn to one side, then one to the other; the first one is asked | left, right |
| next | turns to the left and right alternate, two frames each; the next one is asked | left, right |

A clip and its mirror image have different answers, and both sides are equally frequent: a single frame does not help.

Pairs: the viewer is moved elsewhere (warp), the view jumps (jump), a barrel vanishes or appears.
"""

import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from .clips import ClipQuestion, LibraryBuilder

LEFT_RIGHT = ("left", "right")
EVENTS = ("warp", "jump", "vanish", "appear")
MAPS = (
    *(("freedoom2", f"MAP{number:02}") for number in range(1, 33)),
    *(("freedoom1", f"E{episode}M{number}") for episode in range(1, 5) for number in range(1, 10)),
)
TICS = 4  # of the simulator's 35 a second, from one shown frame to the next
SETTLE_TICS = 12
MIN_CHANGE = 5.0  # mean absolute difference of successive frames; with less, the viewer stands before a bare wall
MIN_STEP = 4.0  # map units from frame to frame; with less, a wall stops the step
BARREL = "ExplosiveBarrel"
CROP_HEIGHT, CROP_WIDTH = 120, 160


@dataclass(frozen=True, kw_only=True)
class VizdoomSettings:
    """Numbers of recordings of each question type, by split, and all else that the clips depend on."""

    name: str = "vizdoom"
    num_train: int = 480
    num_val: int = 40
    num_test: int = 160
    num_watched: int = 200
    """Training clips without a question: possible ones of the pairs' kind, and walks."""
    num_val_pairs: int = 40
    num_test_pairs: int = 120
    num_frames: int = 6
    frame_seconds: float = TICS / 35
    image_size: int = 112
    seed: int = 0

    def __post_init__(self) -> None:
        if not 56 <= self.image_size <= CROP_HEIGHT:
            raise ValueError(f"image_size is {self.image_size}, expected 56 to {CROP_HEIGHT} pixels")

    def record(self) -> LibraryBuilder:
        """Run the simulator; 10 to 20 recordings a CPU second.

        Raises:
            ImportError: if ViZDoom is not installed.
        """
        return _Recorder(self).record()


def maps_of_split(split: str) -> list[tuple[str, str]]:
    """WAD and map: each fourth map is for test, each eighth for validation, the others for training."""
    places = {"test": {3, 7}, "val": {2}}
    places["train"] = set(range(8)) - places["test"] - places["val"]
    return [entry for number, entry in enumerate(MAPS) if number % 8 in places[split]]


@dataclass(frozen=True, kw_only=True)
class Motion:
    """Turn in degrees, step to the right and walk forwards, from one frame to the next; `[T - 1]` each."""

    turn: np.ndarray
    step: np.ndarray
    walk: np.ndarray


class _Failed(Exception):
    """The drawn place does not allow the motion; another one is drawn."""


def draw_motion(kind: str, number: int, num_frames: int, rng: np.random.Generator) -> tuple[Motion, str]:
    """A motion of a question type with its answer.

    Args:
        kind: `turn`, `strafe`, `order`, `next`, `walk` or `slow`; the last two have no question and no answer.
        number: of the clip; even and odd ones have different answers.

    Raises:
        ValueError: for another `kind`.
    """
    turn, step, walk = np.zeros((3, num_frames - 1))
    sign = 1 - 2 * (number % 2)  # to the right first
    answer = ""
    if kind == "turn":
        turn[:] = sign * rng.uniform(8, 18)
        answer = LEFT_RIGHT[sign > 0]
    elif kind == "strafe":
        step[:] = sign * rng.uniform(24, 48)
        answer = LEFT_RIGHT[sign > 0]
    elif kind == "order":
        change = (num_frames - 1) // 2 + int(rng.integers(2))
        turn[:] = sign * rng.uniform(8, 18)
        turn[change:] *= -1
        answer = LEFT_RIGHT[sign > 0]
    elif kind == "next":
        phase = int(rng.integers(2))
        signs = sign * (1 - 2 * ((np.arange(num_frames) + phase) // 2 % 2))
        turn[:] = signs[:-1] * rng.uniform(8, 18)
        answer = LEFT_RIGHT[int(signs[-1] > 0)]
    elif kind == "walk":
        walk[:] = rng.uniform(24, 48)
    elif kind == "slow":
        turn[:] = sign * rng.uniform(2, 6)
    else:
        raise ValueError(f"kind is {kind!r}, expected turn, strafe, order, next, walk or slow")
    return Motion(turn=turn, step=step, walk=walk), answer


def question_of(kind: str, answer: str) -> ClipQuestion:
    """The question of a type, with its choices."""
    texts = {
        "turn": ("which way does the view turn ?", LEFT_RIGHT),
        "strafe": ("which way does the viewer step ?", LEFT_RIGHT),
        "order": ("which way does the view turn first ?", LEFT_RIGHT),
        "next": ("which way does the view turn next ?", LEFT_RIGHT),
    }
    text, choices = texts[kind]
    return ClipQuestion(question_type=kind, text=text, choices=choices, answer=answer)


@contextmanager
def _game(wad: str, seed: int) -> Any:
    """The simulator with one WAD; its settings file and folder are written into a temporary folder."""
    try:
        import vizdoom
    except ImportError as error:
        raise ImportError("ViZDoom is not installed: pip install 'llava-next-ar[sources]'") from error
    game, before = vizdoom.DoomGame(), os.getcwd()
    game.set_doom_game_path(str(Path(vizdoom.__file__).parent / f"{wad}.wad"))
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    for part in ("hud", "weapon", "crosshair", "messages", "screen_flashes", "decals", "particles"):
        getattr(game, f"set_render_{part}")(False)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_objects_info_enabled(True)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_seed(seed)
    game.set_episode_timeout(0)
    game.add_game_args("-nomonsters +sv_cheats 1 +cl_showsecretmessage 0")
    buttons = ("TURN_LEFT_RIGHT_DELTA", "MOVE_LEFT_RIGHT_DELTA", "MOVE_FORWARD_BACKWARD_DELTA")
    game.set_available_buttons([getattr(vizdoom.Button, name) for name in buttons])
    variables = ("POSITION_X", "POSITION_Y", "ANGLE")
    game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in variables])
    with TemporaryDirectory() as folder:
        game.set_doom_config_path(str(Path(folder) / "vizdoom.ini"))
        os.chdir(folder)  # ViZDoom makes a folder in the working directory
        try:
            game.init()
        finally:
            os.chdir(before)
        try:
            yield game
        finally:
            game.close()


class _Recorder:
    def __init__(self, settings: VizdoomSettings) -> None:
        self.settings = settings
        self.built = LibraryBuilder()
        self._map = ""

    def record(self) -> LibraryBuilder:
        jobs = self._jobs()
        with tqdm(total=len(jobs), desc="vizdoom", unit="recording") as bar:
            for wad in ("freedoom2", "freedoom1"):
                with _game(wad, self.settings.seed) as game:
                    for own_wad, place, split, kind, number in jobs:
                        if own_wad == wad:
                            self._job(game, place, split, kind, number)
                            bar.update()
        return self.built

    def _jobs(self) -> list[tuple[str, str, str, str, int]]:
        """WAD, map, split, kind and number of each recording; maps take turns."""
        settings, jobs = self.settings, []
        asked = {"val": settings.num_val, "test": settings.num_test, "train": settings.num_train}
        pairs = {"val": settings.num_val_pairs, "test": settings.num_test_pairs, "train": 0}
        for split, number in asked.items():
            maps, rng = maps_of_split(split), np.random.default_rng([settings.seed, len(split)])
            kinds = [kind for kind in ("turn", "strafe", "order", "next") for _ in range(number)]
            kinds += [EVENTS[n % len(EVENTS)] for n in range(pairs[split])]
            if split == "train":
                kinds += [("walk", "slow")[n % 2] for n in range(settings.num_watched)]
            counts: dict[str, int] = {}
            chosen = rng.permutation(len(kinds)) % len(maps)
            for place, kind in zip(chosen, kinds, strict=True):
                counts[kind] = counts.get(kind, -1) + 1
                jobs.append((*maps[place], split, kind, counts[kind]))
        return sorted(jobs, key=lambda job: job[:3])

    def _job(self, game: Any, place: str, split: str, kind: str, number: int) -> None:
        seed = [self.settings.seed, *f"{split} {kind} {number}".encode()]
        rng = np.random.default_rng(seed)
        name = f"{split}_{kind}_{number:04}"
        for _ in range(200):
            try:
                if kind in EVENTS:
                    self._record_pair(game, place, split, kind, number, name, rng)
                else:
                    self._record_clip(game, place, split, kind, number, name, rng)
                return
            except _Failed:
                if game.is_episode_finished():
                    self._map = ""
        raise RuntimeError(f"no place of {place} allows {kind}: 200 were drawn")

    def _record_clip(
        self, game: Any, place: str, split: str, kind: str, number: int, name: str, rng: np.random.Generator
    ) -> None:
        motion, answer = draw_motion(kind, number, self.settings.num_frames, rng)
        if self._map != place:  # a new episode takes longer than a clip
            _start(game, place, self.settings.seed)
            self._map = place
        game.send_game_command(f"remove {BARREL}")
        _stand(game, rng)
        if kind == "slow" and rng.random() < 0.7:
            game.send_game_command(f"summon {BARREL}")
        frames = self._perform(game, motion)
        _check_seen(frames, least=0.3 if kind == "slow" else MIN_CHANGE)
        self.built.add_clip(
            frames,
            name=name,
            split=split,
            group=place,
            questions=[question_of(kind, answer)] if answer else (),
        )

    def _record_pair(
        self, game: Any, place: str, split: str, event: str, number: int, name: str, rng: np.random.Generator
    ) -> None:
        """Two takes with one seed, one place and one motion; the second has the event."""
        kind = "slow" if event in ("vanish", "appear") else ("strafe", "walk", "turn")[number // len(EVENTS) % 3]
        motion, _ = draw_motion(kind, int(rng.integers(2)), self.settings.num_frames, rng)
        seed, frame = int(rng.integers(1 << 30)), int(rng.integers(2, self.settings.num_frames - 1))
        stood, takes, self._map = rng.bit_generator.state, [], ""
        for commands in ({}, {frame: event}):
            rng.bit_generator.state = stood
            _start(game, place, seed)
            places = _stand(game, rng)
            x, y = places[rng.integers(len(places))]
            if event == "vanish":
                game.send_game_command(f"summon {BARREL}")
            actions = {"warp": f"warp {x} {y}", "vanish": f"remove {BARREL}", "appear": f"summon {BARREL}"}
            takes.append(self._perform(game, motion, {at: actions.get(name, "") for at, name in commands.items()}))
        possible, changed = takes
        _check_seen(possible, least=0.3 if kind == "slow" else MIN_CHANGE)
        differs = (possible != changed).any(axis=(1, 2, 3))
        change = np.abs(possible[frame].astype(float) - changed[frame]).mean()
        if differs[:frame].any() or change < (0.5 if kind == "slow" else MIN_CHANGE):
            raise _Failed
        self.built.add_pair(possible, changed, name=name, split=split, group=place, event=event)

    def _perform(self, game: Any, motion: Motion, commands: dict[int, str] | None = None) -> np.ndarray:
        """Frames `[T, H, W, 3]` of a motion; an empty command turns the view by 120 degrees.

        Raises:
            _Failed: if a wall stops the viewer.
        """
        size = self.settings.image_size
        top, left = (CROP_HEIGHT - size) // 2, (CROP_WIDTH - size) // 2
        commands = commands or {}
        # A step begins slowly: the clip is shown from when it has reached its speed.
        first = [0.0, motion.step[0], motion.walk[0]]
        game.make_action(first, SETTLE_TICS)
        frames, moved = [], [_position(game)]
        for frame in range(self.settings.num_frames):
            if frame:
                turn, step, walk = motion.turn[frame - 1], motion.step[frame - 1], motion.walk[frame - 1]
                if frame in commands:
                    if commands[frame]:
                        game.send_game_command(commands[frame])
                    else:
                        game.make_action([120.0, 0.0, 0.0], 1)
                game.make_action([turn / TICS, step, walk], TICS)
                moved.append(_position(game))
            screen = _state(game).screen_buffer
            frames.append(screen[top : top + size, left : left + size].copy())
        if not commands:
            distance = np.linalg.norm(np.diff(moved, axis=0), axis=1)
            wanted = (np.abs(motion.step) + np.abs(motion.walk)) > 0
            if (distance[wanted] < MIN_STEP).any():
                raise _Failed
        return np.stack(frames)


def _start(game: Any, place: str, seed: int) -> None:
    game.set_doom_map(place)
    game.set_seed(seed)
    game.new_episode()
    game.send_game_command("god")


def _position(game: Any) -> np.ndarray:
    return np.array(_state(game).game_variables[:2])


def _state(game: Any) -> Any:
    state = game.get_state()
    if state is None:  # the viewer has reached the exit of the map
        raise _Failed
    return state


def _stand(game: Any, rng: np.random.Generator) -> Sequence[tuple[int, int]]:
    """Put the viewer where an item of the map lies, looking somewhere; returns the places of all items."""
    objects = _state(game).objects
    places = [(round(one.position_x), round(one.position_y)) for one in objects if one.name != "DoomPlayer"]
    if not places:
        raise _Failed
    x, y = places[rng.integers(len(places))]
    game.send_game_command(f"warp {x} {y}")
    game.make_action([float(rng.uniform(-180, 180)), 0.0, 0.0], 1)
    game.make_action([0.0, 0.0, 0.0], SETTLE_TICS)
    return places


def _check_seen(frames: np.ndarray, least: float) -> None:
    """Raise `_Failed` if some frame hardly differs from the one before."""
    change = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    if change.min() < least:
        raise _Failed
