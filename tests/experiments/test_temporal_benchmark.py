"""The temporal benchmark: answers are true in decoded pixels and in the paths, pairs differ only from the event on, and
what needs time, or order, cannot be answered without.
"""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import processes
import pytest
from PIL import Image

from llava_next_ar.experiments.temporal.benchmark import (
    CLIP_KINDS,
    CONTROLS,
    entries_of,
    frame_order,
    main,
    make_clips,
    preview,
    render_clip,
    type_table,
    write_benchmark,
)
from llava_next_ar.experiments.temporal.draws import HELD_OUT, LEVELS, RADIUS
from llava_next_ar.experiments.temporal.events import EVENTS
from llava_next_ar.experiments.temporal.questions import QUESTION_TYPES
from llava_next_ar.experiments.temporal.scenes import DOWNWARDS, SIDEWAYS, simulate
from llava_next_ar.experiments.temporal.synthetic_clips import COLORS, CORNERS, DIRECTIONS, SHAPES, signed_distance

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "temporal_benchmark.py"


# -- Reading pixels


def decode(path: Path) -> np.ndarray:
    """`[T, H, W, 3]`."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def mask_of(frames: np.ndarray, color: str) -> np.ndarray:
    """Pixels that show a color, bright or dark: `[T, H, W]` bool."""
    bright, dark = frames.max(axis=-1), frames.min(axis=-1)
    mask = (bright > 90) & (dark < 0.55 * bright)  # no ground or screen is so colorful
    pixels = frames[mask].astype(float)
    hues = pixels - pixels.mean(axis=-1, keepdims=True)
    names = np.array(list(COLORS.values()), dtype=float)
    names -= names.mean(axis=1, keepdims=True)
    names /= np.linalg.norm(names, axis=1, keepdims=True)
    mask[mask] = (hues @ names.T).argmax(axis=-1) == list(COLORS).index(color)
    return mask


def track(frames: np.ndarray, color: str, wraps: bool = True) -> np.ndarray:
    """Centers of the pixels of a color as fractions of the picture, NaN where there are hardly any: `[T, 2]`."""
    mask = mask_of(frames, color)
    place = (np.arange(mask.shape[1]) + 0.5) / mask.shape[1]
    centers = []
    for axis in (1, 2):  # summed over y, x is left, and the other way round
        weights = mask.sum(axis=axis)
        if wraps:
            centers.append(np.angle((weights * np.exp(2j * np.pi * place)).sum(axis=1)) / (2 * np.pi) % 1)
        else:
            centers.append((weights * place).sum(axis=1) / np.maximum(weights.sum(axis=1), 1))
    enough = mask.sum(axis=(1, 2)) > 8
    return np.where(enough[:, None], np.stack(centers, axis=1), np.nan)


def steps_of(centers: np.ndarray) -> np.ndarray:
    """The short way round: `[T - 1, 2]`."""
    return (np.diff(centers, axis=0) + 0.5) % 1.0 - 0.5


def nearest_name(way: np.ndarray, ways: dict[str, tuple[int, int]]) -> str:
    return max(ways, key=lambda name: float(way @ ways[name]))


def color_in(text: str) -> str:
    (color,) = [color for color in COLORS if f" {color} " in text]
    return color


# -- What a viewer of the pixels answers. Easy clips only: there the camera rests and other shapes are absent.


def seen_direction(frames, entry):
    return nearest_name(steps_of(track(frames, seen_color(frames, entry))).sum(axis=0), DIRECTIONS)


def seen_camera(frames, entry):
    """Motion of the ground, by phase correlation of the first frame with the others; the camera goes the other way."""
    spectra = np.fft.fft2(frames.astype(float).mean(axis=-1))
    ways = []
    for first, second in zip(spectra, spectra[1:], strict=False):
        cross = second * first.conj()
        peak = np.fft.ifft2(cross / np.maximum(np.abs(cross), 1e-9)).real
        y, x = np.unravel_index(peak.argmax(), peak.shape)
        ways.append([(shift + len(peak) / 2) % len(peak) - len(peak) / 2 for shift in (x, y)])
    return nearest_name(-np.median(ways, axis=0), DIRECTIONS)


def seen_next(frames, entry):
    steps = steps_of(track(frames, color_in(entry["conversations"][0]["value"])))
    heading = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))
    coming = heading[-1] + (heading[-1] - heading[0]) / (len(heading) - 1)
    return nearest_name(np.array([np.cos(coming), np.sin(coming)]), CORNERS)


def seen_order(frames, entry):
    moving = {color: np.linalg.norm(steps_of(track(frames, color)), axis=1) > 0.025 for color in entry["choices"]}
    assert all(row.any() and not row.all() for row in moving.values())
    return min(moving, key=lambda color: int(moving[color].argmax()))


def count_bounces(heights: np.ndarray) -> int:
    """Fits arcs of any period, phase and height to the heights `[T]`, and counts their ends within the clip."""
    last = len(heights) - 1
    periods = last / np.arange(0.7, 4.5, 0.02)[:, None, None]
    first = np.arange(0, 1, 1 / 80)[:, None] * periods
    arcs = (2 * ((np.arange(last + 1) - first) / periods % 1) - 1) ** 2  # 0 at the top, 1 at the ground: [P, C, T]
    arcs -= arcs.mean(axis=-1, keepdims=True)
    fit = (arcs @ (heights - heights.mean())) / np.linalg.norm(arcs, axis=-1)
    best, phase = np.unravel_index(fit.argmax(), fit.shape)
    times = first[best, phase] + periods[best] * np.arange(6)
    return int((times < last).sum())


def seen_count(frames, entry):
    return str(count_bounces(track(frames, color_in(entry["conversations"][0]["value"]), wraps=False)[:, 1]))


def seen_faster(frames, entry):
    return max(entry["choices"], key=lambda color: np.linalg.norm(steps_of(track(frames, color)), axis=1).mean())


def seen_speed(frames, entry):
    steps = np.linalg.norm(steps_of(track(frames, color_in(entry["conversations"][0]["value"]))), axis=1)
    return "it speeds up" if steps[-4:].mean() > steps[:4].mean() else "it slows down"


def seen_bounce(frames, entry):
    x = track(frames, color_in(entry["conversations"][0]["value"]), wraps=False)[:, 0]
    assert np.isnan(x).any(), "it is never behind the screen"
    return "yes" if (x[0] > 0.5) == (x[-1] > 0.5) else "no"


def seen_cause(frames, entry):
    moved = {color: np.linalg.norm(steps_of(track(frames, color))[:3], axis=1).mean() for color in entry["choices"]}
    assert min(moved.values()) < 0.01 < max(moved.values())
    return max(moved, key=moved.get)


def seen_cut(frames, entry):
    change = np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
    start = int(change.argmax()) + 1
    assert start == entry["cut_frame"]
    places = track(frames, color_in(entry["conversations"][0]["value"]))
    before, after = (steps_of(part).sum(axis=0) for part in (places[:start], places[start:]))
    return "yes" if before @ after > 0 else "no"


def seen_arrow(frames, entry):
    (color,) = [color for color in COLORS if mask_of(frames, color).sum() > 500]
    steps = np.linalg.norm(steps_of(track(frames, color)), axis=1)
    return "forward" if steps[:4].mean() > steps[-4:].mean() else "backward"


def seen_color(frames, entry):
    return max(COLORS, key=lambda color: mask_of(frames, color).sum())


SEEN = {name.removeprefix("seen_"): function for name, function in globals().items() if name.startswith("seen_")}


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """A small benchmark on disk, its entries and its decoded files."""
    folder = tmp_path_factory.mktemp("easy")
    entries = write_benchmark(
        folder, num_per_type={"train": 0, "test": 4}, levels=["easy"], seed=3, progress=False, control_splits=["test"]
    )
    return folder, entries, {path.name: decode(path) for path in (folder / "videos").iterdir()}


def test_every_answer_is_true_in_the_decoded_file(easy):
    _, entries, decoded = easy
    checked = Counter()
    for entry in entries["test"]:
        if entry["question_type"] in SEEN:
            frames = decoded[Path(entry["video"]).name]
            assert frames.shape == (14, 96, 96, 3)
            seen = SEEN[entry["question_type"]](frames, entry)
            assert seen == entry["conversations"][1]["value"], entry["id"]
            checked[entry["question_type"]] += 1
    assert checked == dict.fromkeys(set(QUESTION_TYPES) - {"possible"}, 4)


# -- The same from the paths, at every level


def body_of(clip, color):
    (body,) = [body for body in clip.draft.scenes[0].bodies if body.look.color == color]
    return body


def true_answer(clip):
    """From where the shapes are in the world, by simple measurements; None where pixels are needed."""
    asked, scene = clip.draft.questions[0], clip.draft.scenes[0]
    kind = asked.question_type
    if kind in ("order", "faster", "cause"):
        steps = {color: np.linalg.norm(np.diff(body_of(clip, color).path, axis=0), axis=1) for color in asked.choices}
        if kind == "faster":
            return max(steps, key=lambda color: steps[color].mean())
        return min(steps, key=lambda color: int((steps[color] > 1e-6).argmax()))
    if kind == "camera":
        return nearest_name(scene.camera[-1, :2] - scene.camera[0, :2], DIRECTIONS)
    if kind == "direction":
        (body,) = [body for body in scene.bodies if f" {body.look.shape} " in asked.text]  # one has that shape
        return nearest_name(body.path[-1] - body.path[0], DIRECTIONS)
    if kind in ("speed", "arrow"):
        steps = [np.linalg.norm(np.diff(body.path, axis=0), axis=1) for body in scene.bodies]
        steps = steps if kind == "arrow" else [steps[-1]]  # distractors that slide obey the arrow of time too
        grows = {bool(step[-1] > step[0]) for step in steps}
        assert len(grows) == 1
        return asked.choices[0 if grows.pop() == (kind == "speed") else 1]
    color = color_in(asked.text) if kind in ("bounce", "count", "cut") else None
    if kind == "bounce":
        x = body_of(clip, color).path[:, 0]
        return "yes" if (x[0] > 0.5) == (x[-1] > 0.5) else "no"
    if kind == "cut":
        ways = [
            body.path[-1] - body.path[0]
            for one in clip.draft.scenes
            for body in one.bodies
            if body.look.color == color
        ]
        return "yes" if ways[0] @ ways[1] > 0 else "no"
    if kind == "count":
        return str(count_bounces(body_of(clip, color).path[:, 1]))
    return None


@pytest.mark.parametrize("num_frames", [12, 14, 24])
def test_every_answer_is_true_of_the_paths_at_every_level(num_frames):
    checked = Counter()
    for clip in make_clips(12, split="val", seed=1, num_frames=num_frames):
        assert clip.num_frames == num_frames
        answer = true_answer(clip)
        if answer is not None:
            assert answer == clip.draft.questions[0].answer, clip.name
            checked[clip.draft.questions[0].question_type] += 1
    assert checked == dict.fromkeys(set(CLIP_KINDS) - {"next", "possible"}, 36)


def test_shapes_are_drawn_where_their_paths_lead():
    """With a moving camera too, and distractors beside them: so what is true of the paths is true of the pixels."""
    compared = 0
    for clip in make_clips(4, split="test", seed=5, levels=["hard"]):
        (scene, *_), frames = clip.draft.scenes, render_clip(clip)
        for body in scene.bodies:
            others = [other.path for other in scene.bodies if other is not body]
            seen = scene.seen_at(body.path)
            for frame in range(0, scene.num_frames, 4):
                inside = np.all((seen[frame] > 0.15) & (seen[frame] < 0.85))
                free = all(np.linalg.norm(scene.seen_at(path)[frame] - seen[frame]) > 0.3 for path in others)
                if inside and free and not scene.boxes:
                    (place,) = track(frames[frame : frame + 1], body.look.color)
                    assert np.abs(place - seen[frame]).max() < 0.025, (clip.name, frame)
                    compared += 1
    assert compared > 30


# -- Physics


def test_bodies_fall_as_far_as_they_should():
    motion = simulate([(0.5, 0.1)], [(0.03, -0.05)], radius=0.05, num_frames=12, gravity=0.02)
    t = np.arange(12)
    assert np.allclose(motion.positions[:, 0, 0], 0.5 + 0.03 * t)
    assert np.allclose(motion.positions[:, 0, 1], 0.1 - 0.05 * t + 0.01 * t**2)
    assert not motion.contacts


def test_an_elastic_ball_comes_back_as_high_and_another_one_less():
    options = {"radius": 0.05, "num_frames": 40, "gravity": 0.01, "ground": 1.0, "steps_per_frame": 64}
    for restitution in (1.0, 0.8):
        motion = simulate([(0.5, 0.45)], [(0, 0)], restitution=restitution, **options)
        between = [(a.time + b.time) / 2 for a, b in zip(motion.contacts, motion.contacts[1:], strict=False)]
        tops = [0.95 - motion.positions[int(round(time)), 0, 1] for time in between]
        for number, top in enumerate(tops, start=1):
            assert top == pytest.approx(0.5 * restitution ** (2 * number), abs=0.01)
        assert motion.contacts[0].time == pytest.approx(10, abs=0.05)  # sqrt(2 h / g)
        assert len(tops) >= 1 and {contact.second for contact in motion.contacts} == {None}


@pytest.mark.parametrize("restitution", [1.0, 0.5, 0.0])
def test_collisions_keep_momentum_and_lose_only_the_energy_that_they_should(restitution):
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(20):
        masses = rng.uniform(0.5, 3, size=2)
        start = np.array([[0.0, 0.0], [0.5, rng.uniform(-0.12, 0.12)]])
        velocities = np.array([[rng.uniform(0.04, 0.08), 0], [-rng.uniform(0, 0.04), 0.0]])
        motion = simulate(start, velocities, radius=0.08, num_frames=14, masses=masses, restitution=restitution)
        momentum = np.einsum("b,tbi->ti", masses, motion.velocities)
        assert np.allclose(momentum, momentum[0], atol=1e-12)
        energy = 0.5 * np.einsum("b,tbi->t", masses, motion.velocities**2)
        (contact, *_), last = motion.contacts, int(np.ceil(motion.contacts[0].time))
        between = motion.positions[last - 1, 1] - motion.positions[last - 1, 0]
        between += (motion.velocities[last - 1, 1] - motion.velocities[last - 1, 0]) * (contact.time - last + 1)
        normal = between / np.linalg.norm(between)
        assert np.linalg.norm(between) == pytest.approx(0.16, abs=0.004)
        before, after = ((motion.velocities[k, 0] - motion.velocities[k, 1]) @ normal for k in (last - 1, last))
        assert after == pytest.approx(-restitution * before, abs=1e-9)
        lost = 0.5 * (1 - restitution**2) * before**2 / (1 / masses).sum()
        assert energy[last - 1] - energy[last] == pytest.approx(lost, abs=1e-9)
        hits += 1
    assert hits == 20


def test_friction_stops_what_slides_where_it_should():
    motion = simulate([(0, 0)], [(0.06, 0.08)], radius=0.05, num_frames=16, friction=0.01)
    assert np.linalg.norm(motion.positions[-1, 0]) == pytest.approx(0.1**2 / (2 * 0.01), rel=0.01)
    assert np.array_equal(motion.positions[11], motion.positions[15]) and not motion.velocities[11].any()
    speeds = np.linalg.norm(motion.velocities[:10, 0], axis=1)
    assert np.allclose(np.diff(speeds), -0.01)


def test_bodies_that_overlap_are_refused():
    with pytest.raises(ValueError, match="bodies 0 and 1 overlap"):
        simulate([(0, 0), (0.05, 0)], [(0, 0), (0, 0)], radius=0.05, num_frames=2)


def test_a_push_passes_all_momentum_on():
    for clip in make_clips(8, question_types=["cause"]):
        first, second = clip.draft.scenes[0].bodies[-2:]
        moves = [np.diff(body.path, axis=0) for body in (first, second)]
        frame = clip.draft.notes["event_frame"]
        assert np.allclose(moves[0][0], moves[1][frame]) and not moves[1][0].any()
        assert np.abs(moves[0][frame]).max() < 1e-9
        assert np.linalg.norm(first.path[frame] - second.path[frame]) >= 2 * RADIUS - 0.002


@pytest.mark.parametrize("shape", SHAPES)
def test_how_far_shapes_reach(shape):
    place = np.linspace(-2, 2, 801)
    inside = signed_distance(shape, place[None, :], place[:, None], 1.0) <= 0
    assert np.abs(place[inside.any(axis=0)]).max() == pytest.approx(SIDEWAYS[shape], abs=0.01)
    assert place[inside.any(axis=1)].max() == pytest.approx(DOWNWARDS[shape], abs=0.01)


# -- Pairs


def test_the_clips_of_a_pair_are_decoded_the_same_before_the_event_and_not_from_then_on(tmp_path):
    options = {"question_types": ["possible"], "levels": ["easy", "hard"], "seed": 2}
    entries = write_benchmark(tmp_path, num_per_type={"test": 20}, control_splits=[], progress=False, **options)
    clips = {clip.name: clip for clip in make_clips(20, split="test", **options)}
    pairs, events = defaultdict(dict), Counter()
    for entry in entries["test"]:
        pairs[entry["pair"]][entry["conversations"][1]["value"]] = entry
    assert len(pairs) == 20
    for pair in pairs.values():
        assert set(pair) == {"possible", "impossible"}
        one, other = (decode(tmp_path / pair[name]["video"]).astype(int) for name in ("possible", "impossible"))
        notes = {name: pair["possible"][name] for name in ("event", "event_frame", "event_places", "event_hidden")}
        assert notes.items() <= pair["impossible"].items()
        frame = notes["event_frame"]
        assert 2 <= frame < len(one) - 2
        assert np.array_equal(one[:frame], other[:frame]), notes
        # The difference at the event is where the JSON says: no farther away than a shape is wide.
        drawn = [render_clip(clips[Path(one["video"]).stem], 96, [frame])[0].astype(int) for one in pair.values()]
        differs = np.abs(drawn[0] - drawn[1]).max(axis=-1) > 20
        assert differs.any(), notes
        places = (np.argwhere(differs)[:, ::-1] + 0.5) / 96
        away = np.linalg.norm(places[:, None] - np.array(notes["event_places"]), axis=-1).min(axis=1)
        assert away.max() < 1.9 * RADIUS, notes
        assert (np.abs(one[-2] - other[-2]).max(axis=-1) > 40).any(), notes
        events[notes["event"]] += 1
    assert events == dict.fromkeys(EVENTS, 4)


def test_the_two_halves_of_an_impossible_clip_are_those_of_possible_ones():
    """Both tracks come first equally often, so no frame of an impossible clip is one that a possible one lacks."""
    first = Counter()
    for clip in make_clips(40, question_types=["possible"], levels=["medium"]):
        if clip.draft.questions[0].answer == "impossible":
            notes, bodies = clip.draft.notes, clip.draft.scenes[0].bodies[-2:]
            before, after = (~np.isnan(body.path).any(axis=1) for body in bodies)
            assert not before[notes["event_frame"] :].any() and not after[: notes["event_frame"]].any()
            if notes["event"] == "vanish":
                assert before.any() != after.any()
                first[bool(before.any())] += 1
            else:
                assert before.sum() + after.sum() == clip.num_frames
    assert first == {True: 2, False: 2}


def test_an_event_behind_the_screen_is_hidden_while_it_happens():
    for clip in make_clips(20, question_types=["possible"], levels=["hard"], num_frames=24):
        scene, notes = clip.draft.scenes[0], clip.draft.notes
        (screen,) = [box for box in scene.boxes if box.kind == "screen"]
        for body in scene.bodies[LEVELS["hard"].distractors :]:
            x = body.path[notes["event_frame"] - 1, 0]
            reach = SIDEWAYS[body.look.shape] * RADIUS
            assert np.isnan(x) or abs(x - 0.5) + reach <= screen.half[0] + 1e-9, clip.name


# -- Balance, seeds, splits


@pytest.mark.parametrize("num_frames", [12, 14])
def test_answers_are_balanced_exactly_in_every_type_and_level(num_frames):
    entries = entries_of(make_clips(8, num_frames=num_frames))
    counts = defaultdict(Counter)
    for entry in entries:
        place = entry["choices"].index(entry["conversations"][1]["value"])
        counts[entry["difficulty"], entry["question_type"]][place] += 1
    assert len(counts) == 3 * len(QUESTION_TYPES)
    for (level, name), places in counts.items():
        chance = type_table(entries, num_frames)[name]["chance"]
        assert places == dict.fromkeys(range(round(1 / chance)), 8 * chance), (level, name)
    one_frame = {name: row.one_frame for name, row in QUESTION_TYPES.items() if name != "color"}
    assert one_frame == {name: type_table(entries, num_frames)[name]["chance"] for name in one_frame}


def test_color_says_nothing_about_direction():
    pairs = Counter()
    for clip in make_clips(16, question_types=["direction"], levels=["hard"]):
        pairs[tuple(question.answer for question in clip.draft.questions)] += 1
    assert len(pairs) == 16 and set(pairs.values()) == {1}


def test_same_seed_same_bytes(tmp_path):
    options = {"num_per_type": {"val": 4}, "levels": ["hard"], "control_splits": ["val"], "progress": False}
    options |= {"question_types": ["cut", "count", "possible"], "size": 48}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_benchmark(tmp_path / name, seed=seed, **options)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 4 + 3 * 12
    for file in files:
        stored = {name: (tmp_path / name / file).read_bytes() for name in "abc"}
        assert stored["a"] == stored["b"], file
        assert stored["a"] != stored["c"] or "one_frame" in file.name, file


def test_asking_for_less_changes_nothing_about_the_rest():
    def firsts(**options):
        clips = {clip.name: clip for clip in make_clips(4, seed=1, levels=["medium"], **options)}
        return {name: clip.draft.scenes[0].bodies[-1].path for name, clip in clips.items() if "_speed_" in name}

    alone, among, more = firsts(question_types=["speed"]), firsts(), make_clips(12, seed=1, levels=["medium"])
    assert len(alone) == 4
    for name, path in alone.items():
        assert np.array_equal(path, among[name])
        (clip,) = [clip for clip in more if clip.name == name]
        assert np.array_equal(path, clip.draft.scenes[0].bodies[-1].path)


def test_splits_share_nothing():
    seeds = {
        split: {clip.draft.scenes[0].texture_seed for clip in make_clips(8, split=split)}
        for split in ("train", "val", "test")
    }
    assert all(len(some) == 3 * 8 * 12 - 3 * 4 for some in seeds.values())  # the clips of a pair share theirs
    assert not (seeds["train"] & seeds["val"] | seeds["train"] & seeds["test"] | seeds["val"] & seeds["test"])


def test_only_test_clips_show_the_combinations_held_out():
    def looks(split):
        clips = make_clips(16, split=split)
        shown = {(b.look.color, b.look.shape) for clip in clips for scene in clip.draft.scenes for b in scene.bodies}
        return shown, np.mean([entry["held_out"] for entry in entries_of(clips)])

    everything = {(color, shape) for color in COLORS for shape in SHAPES}
    for split in ("train", "val"):
        shown, share = looks(split)
        assert shown == everything - HELD_OUT and share == 0
    shown, share = looks("test")
    assert shown == everything and 0.2 < share < 0.6


def test_levels_get_harder():
    levels = [LEVELS[name] for name in ("easy", "medium", "hard")]
    for easier, harder in zip(levels, levels[1:], strict=False):
        for name in ("distractors", "contrast", "pan", "zoom", "screen", "post"):
            assert getattr(easier, name) < getattr(harder, name)
        for name in ("ratio", "lag"):
            assert getattr(easier, name) > getattr(harder, name)
        assert harder.step[0] < easier.step[0] and harder.step[1] > easier.step[1]
    for name, level in LEVELS.items():
        for clip in make_clips(4, levels=[name]):
            if clip.draft.questions[0].question_type not in ("camera", "order", "faster", "cause", "possible"):
                assert len(clip.draft.scenes[0].bodies) == level.distractors + 1


# -- Controls: what needs no time


def test_controls_show_the_frames_that_they_name(easy):
    folder, entries, decoded = easy
    by_id = {entry["id"]: entry for entry in entries["test"]}
    for control in CONTROLS:
        stored = json.loads((folder / f"test_{control}.json").read_text())
        assert stored == entries[f"test_{control}"] and {entry["id"] for entry in stored} == set(by_id)
        for entry in stored:
            original, order = by_id[entry["id"]], entry["frame_order"]
            assert entry["conversations"] == original["conversations"] and entry["control"] == control
            shown, frames = (decoded[Path(one["video"]).name].astype(int) for one in (entry, original))
            # encoded anew, so not to the bit; frames of two different clips or moments are many times farther apart
            assert np.abs(shown - frames[order]).mean() < 4
            if control == "shuffled":
                assert sorted(order) == list(range(14))
                inverse = np.argsort(order)
                assert np.abs(shown[inverse] - frames).mean() < 4
            else:
                assert len(set(order)) == 1 and len(order) == 14
    orders = [tuple(entry["frame_order"]) for entry in entries["test_shuffled"] if "pair" not in entry]
    assert len(set(orders)) > 0.9 * len(orders) / 2  # two questions about each clip of `direction`
    picked = Counter(entry["frame_order"][0] for entry in entries["test_one_frame"])
    assert len(picked) > 10


def test_both_clips_of_a_pair_are_shuffled_alike():
    clips = make_clips(8, question_types=["possible"], levels=["easy"])
    for one, other in zip(clips[::2], clips[1::2], strict=True):
        assert one.pair == other.pair
        for control in CONTROLS:
            assert np.array_equal(frame_order(one, control), frame_order(other, control))
    with pytest.raises(ValueError, match="control is 'reversed'"):
        frame_order(clips[0], "reversed")


def seen_places(clip) -> np.ndarray:
    """Place of each color in the picture, the colors that are asked about first: `[T, 4, 2]`, NaN where it is not."""
    asked = clip.draft.questions[0]
    named = [color for color in asked.choices if color in COLORS]
    if asked.question_type == "direction":  # named by its shape
        named = [body.look.color for body in clip.draft.scenes[0].bodies if f" {body.look.shape} " in asked.text]
    named = named or [color for color in COLORS if f" {color} " in asked.text]
    colors = named + [color for color in COLORS if color not in named]
    parts = []
    for scene in clip.draft.scenes:
        part = np.full((scene.num_frames, 4, 2), np.nan)
        for body in scene.bodies:
            there = ~np.isnan(body.path).any(axis=1)
            part[there, colors.index(body.look.color)] = scene.seen_at(body.path)[there]
        parts.append(part)
    return np.concatenate(parts)


def describe(places: np.ndarray) -> np.ndarray:
    """Features that identify a place or a constellation, for each frame: `[T, 4, 2]` -> `[T, F]`."""
    there = ~np.isnan(places).any(axis=-1)
    angles = 2 * np.pi * np.nan_to_num(places.reshape(len(places), -1))
    waves = np.concatenate([np.cos(angles), np.sin(angles), np.cos(2 * angles), np.sin(2 * angles)], axis=1)
    between = 2 * np.pi * np.nan_to_num(places[:, 1:] - places[:, :1]).reshape(len(places), -1)
    waves = np.concatenate([waves, np.cos(between), np.sin(between)], axis=1)
    first = np.concatenate([np.nan_to_num(places[:, 0]), np.cos(angles[:, :4]), np.sin(angles[:, :4])], axis=1)
    products = np.stack([first[:, i] * first[:, j] for i in range(10) for j in range(i, 10)], axis=1)
    return np.concatenate([there, waves, products], axis=1)


def accuracy(features, clips: dict[str, list]) -> float:
    """Accuracy of a linear classifier (ridge regression) that is trained on one split and tried on another."""
    numbers, labels = {}, {}
    for split, some in clips.items():
        numbers[split] = np.stack([features(clip) for clip in some])
        labels[split] = np.array([c.draft.questions[0].choices.index(c.draft.questions[0].answer) for c in some])
    mean, scale = numbers["train"].mean(axis=0), numbers["train"].std(axis=0) + 1e-6
    x, tried = ((numbers[split] - mean) / scale for split in ("train", "val"))
    targets = np.eye(labels["train"].max() + 1)[labels["train"]]
    weights = np.linalg.solve(x.T @ x + 0.1 * len(x) * np.eye(x.shape[1]), x.T @ (targets - targets.mean(axis=0)))
    return float(((tried @ weights).argmax(axis=1) == labels["val"]).mean())


def both_splits(kind: str, level: str, number: int) -> dict[str, list]:
    return {
        split: make_clips(number, split=split, seed=11, levels=[level], question_types=[kind])
        for split in ("train", "val")
    }


def margin(chance: float, number: int) -> float:
    return 4 * np.sqrt(chance * (1 - chance) / number)  # four standard deviations of as many guesses


@pytest.mark.parametrize(
    "level, number",
    [
        ("hard", 300),
        pytest.param("easy", 2000, marks=pytest.mark.slow),
        pytest.param("hard", 2000, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_without_time_or_order_a_classifier_stays_where_it_should(kind, level, number):
    clips = both_splits(kind, level, number)
    told = {clip.name: describe(seen_places(clip)) for some in clips.values() for clip in some}
    one_frame, unordered = QUESTION_TYPES[kind].one_frame, QUESTION_TYPES[kind].unordered
    for frame in (0, 5, 13):
        reached = accuracy(lambda clip, frame=frame: told[clip.name][frame], clips)
        assert reached < one_frame + margin(one_frame, number), frame

    def without_order(clip):
        return np.concatenate([told[clip.name].mean(axis=0), told[clip.name].std(axis=0)])

    if unordered < 1:
        assert accuracy(without_order, clips) < unordered + margin(unordered, number)


def test_the_same_classifier_on_ordered_frames_is_far_above_chance():
    # So the test above would have found a cue, had there been one; on unordered frames too, where there is one.
    def steps(clip):
        way = np.nan_to_num(steps_of(seen_places(clip)[:, :2].reshape(14, 4)))
        return np.concatenate([way.ravel(), np.abs(way).ravel()])

    def spread(clip):
        told = describe(seen_places(clip))
        return np.concatenate([told.mean(axis=0), told.std(axis=0)])

    for kind in ("direction", "order", "cause", "speed"):
        clips = both_splits(kind, "easy", 200)
        assert accuracy(steps, clips) > QUESTION_TYPES[kind].one_frame + 0.2, kind
    for kind in ("bounce", "possible"):
        assert accuracy(spread, both_splits(kind, "easy", 200)) > 0.75, kind


@pytest.mark.parametrize("kind", ["camera", "possible"])
def test_pixels_of_one_frame_do_not_tell_either(kind):
    clips = both_splits(kind, "medium", 160)

    def tiny(clip):
        (picture,) = render_clip(clip, 48, [9])
        return picture.reshape(12, 4, 12, 4, 3).mean(axis=(1, 3)).ravel()

    chance = QUESTION_TYPES[kind].one_frame
    assert accuracy(tiny, clips) < chance + margin(chance, 160)


def test_frames_of_bouncing_balls_are_the_same_as_a_set_for_any_number():
    """The claim about `count`, exactly: they show 13 evenly spaced phases of a bounce, whatever the number is."""
    for clip in make_clips(12, question_types=["count"], levels=["easy"]):
        heights = clip.draft.scenes[0].bodies[-1].path[:, 1]
        assert heights[0] == pytest.approx(heights[-1], abs=1e-6)
        misses = []
        for offset in np.linspace(0.4, 0.6, 81):
            phases = (np.arange(13) + 1 - offset) / 13
            arc = np.sort((2 * phases - 1) ** 2)
            line = np.polyfit(arc, np.sort(heights[1:]), 1)
            misses.append(np.abs(np.polyval(line, arc) - np.sort(heights[1:])).max())
        assert min(misses) < 1e-3, clip.name


@pytest.mark.parametrize("num_frames", range(12, 25))
def test_what_unordered_frames_tell_about_count_is_that_of_the_length(num_frames):
    told: dict[str, set[int]] = {}
    clips = make_clips(8, question_types=["count"], levels=["easy"], num_frames=num_frames)
    for clip in clips:
        heights = clip.draft.scenes[0].bodies[-1].path[:-1, 1]  # the last frame is the first one again
        told.setdefault(clip.draft.questions[0].answer, set()).add(len(np.unique(heights.round(7))))
    assert {len(numbers) for numbers in told.values()} == {1} and len(told) == 4
    row = type_table(entries_of(clips, question_types=["count"]), num_frames)["count"]
    assert row["unordered"] == len(set.union(*told.values())) / 4
    assert (row["unordered"] == row["chance"]) == (num_frames in (12, 14, 18, 20, 24))
    assert (row["unordered_frames_tell"] == "nothing") == (num_frames in (12, 14, 18, 20, 24))


# -- Files and command line


def test_evaluation_and_training_read_the_entries(easy):
    from tiny import tiny_config
    from tiny_processor import tiny_processor

    from llava_next_ar.evaluation.evaluate import read_questions
    from llava_next_ar.training.data import LlavaVideoDataset

    folder, entries, _ = easy
    for name in ("test", "test_shuffled"):
        dataset = LlavaVideoDataset(folder / f"{name}.json", tiny_processor(tiny_config()))
        questions = read_questions(dataset)
        assert [q.id for q in questions] == [entry["id"] for entry in entries[name]]
        assert {q.question_type for q in questions} == set(QUESTION_TYPES)
        for question, entry in zip(questions, entries[name], strict=True):
            assert question.choices == tuple(entry["choices"]) and question.answer in question.choices
            assert question.media == (str(folder / entry["video"]),)
    assert len({entry["question_type"] for entry in entries["test"][:20]}) > 5  # mixed, for --max-samples


def test_bad_options_are_named_before_anything_is_written(tmp_path):
    for options, message in [
        ({"num_per_type": {"train": 6}}, "6 train clips for each question type, expected a multiple of 4"),
        ({"num_frames": 8}, "num_frames is 8, expected 12 to 24"),
        ({"size": 65}, "size is 65"),
        ({"fps": 0}, "fps is 0"),
        ({"levels": ["brutal"]}, "levels are brutal, expected some of easy, medium, hard"),
        ({"question_types": []}, "question types are missing"),
        ({"num_per_type": {"dev": 4}}, "split is dev"),
        ({"control_splits": ["val"]}, "control splits are val, expected some of train"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_benchmark(
                tmp_path / "new", **{"num_per_type": {"train": 4}, "control_splits": (), "progress": False} | options
            )
        assert not (tmp_path / "new").exists()


def test_preview_shows_every_kind_of_clip():
    sheet = np.asarray(preview(["medium"], size=48))
    rows = len(CLIP_KINDS) - 1 + 2 * len(EVENTS)
    assert sheet.shape == (rows * 52, 300 + 8 * 52, 3)
    for row in range(rows):
        pictures = sheet[row * 52 : row * 52 + 48, 300:]
        assert pictures.std() > 10 and sheet[row * 52 : row * 52 + 48, :300].min() < 100  # a picture and a text


def test_preview_shows_the_clips_that_are_asked_for(tmp_path, capsys):
    assert preview(["easy"], size=48, question_types=["cut", "color"]).size == (300 + 8 * 52, 2 * 52)
    lengths = [np.asarray(preview(["easy"], size=48, question_types=["cut"], num_frames=n)) for n in (12, 24)]
    assert not np.array_equal(*lengths)
    main(
        ["--preview", str(tmp_path / "new" / "one.png"), "--levels", "easy", "--size", "48", "--question-types", "cut"]
    )
    with Image.open(tmp_path / "new" / "one.png") as sheet:
        assert sheet.size == (300 + 8 * 52, 52)
    with pytest.raises(SystemExit) as stopped:
        main(["--preview", str(tmp_path / "other" / "two.png"), "--num-frames", "11"])
    assert stopped.value.code == 2 and "num_frames is 11" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_command_line(tmp_path):
    command = [sys.executable, str(SCRIPT), "--output", "data", "--train", "4", "--val", "0", "--test", "4"]
    command += ["--levels", "hard", "--size", "48", "--question-types", "cut", "color", "--num-frames", "12"]
    done = processes.run(command, cwd=tmp_path, timeout=120)
    assert "train: 8 questions on 8 clips" in done.stdout and "test_shuffled: 8 questions on 8 clips" in done.stdout
    assert "encoding" in done.stderr  # the progress bar
    summary = json.loads((tmp_path / "data" / "benchmark.json").read_text())
    assert summary["settings"]["num_frames"] == 12 and summary["levels"]["hard"]["distractors"] == 2
    assert summary["question_types"]["cut"]["chance"] == summary["question_types"]["cut"]["unordered"] == 0.5
    assert decode(tmp_path / "data" / "videos" / "test_hard_cut_0000.mp4").shape == (12, 48, 48, 3)
    refused = processes.run([*command, "--train", "3"], cwd=tmp_path, timeout=120, status=2)
    assert "3 train clips" in refused.stderr
