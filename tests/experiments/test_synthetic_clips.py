"""The synthetic clips: answers are true in the decoded pixels, balanced, and not readable from any single frame."""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import processes
import pytest

from llava_next_ar.experiments.temporal.synthetic_clips import (
    CLIP_KINDS,
    COLORS,
    CORNERS,
    DIRECTIONS,
    GLIMPSES,
    QUESTION_TYPES,
    chance_levels,
    entries_of,
    make_clips,
    render_clip,
    signed_distance,
    write_dataset,
    write_video,
)

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "synthetic_clips.py"


def decode(path: Path) -> tuple[np.ndarray, float]:
    """Frames `[T, H, W, 3]` and the frame rate that the file states."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, float(stream.average_rate)


def mask_of(frames: np.ndarray, color: str) -> np.ndarray:
    """Pixels that show a color: `[T, H, W]` bool."""
    return np.abs(frames.astype(int) - np.array(COLORS[color])).max(axis=-1) < 45


def track(frames: np.ndarray, color: str, wraps: bool = True) -> np.ndarray:
    """Centers (x, y) of the pixels of a color, as fractions of the picture: `[T, 2]`."""
    mask = mask_of(frames, color)
    assert mask.any(axis=(1, 2)).all(), f"no {color} pixel in some frame"
    centers = []
    for axis in (1, 2):  # the pixels summed over y leave x, and the other way round
        weights = mask.sum(axis=axis)
        place = (np.arange(weights.shape[1]) + 0.5) / weights.shape[1]
        if wraps:  # the mean of angles knows no edge
            angle = np.angle((weights * np.exp(2j * np.pi * place)).sum(axis=1))
            centers.append(angle / (2 * np.pi) % 1.0)
        else:
            centers.append((weights * place).sum(axis=1) / weights.sum(axis=1))
    return np.stack(centers, axis=1)


def steps_of(centers: np.ndarray) -> np.ndarray:
    """Displacements between frames, the short way round: `[T - 1, 2]`."""
    return (np.diff(centers, axis=0) + 0.5) % 1.0 - 0.5


def seen_direction(frames, color):
    total = steps_of(track(frames, color)).sum(axis=0)
    return max(DIRECTIONS, key=lambda name: total @ DIRECTIONS[name])


def seen_next(frames, color):
    steps = steps_of(track(frames, color))
    heading = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))
    turn = (heading[-1] - heading[0]) / (len(heading) - 1)
    coming = [np.cos(heading[-1] + turn), np.sin(heading[-1] + turn)]
    return max(CORNERS, key=lambda name: np.dot(coming, CORNERS[name]))


def seen_order(frames, colors):
    moving = {color: np.abs(steps_of(track(frames, color))).max(axis=1) > 0.02 for color in colors}
    assert all(row.any() for row in moving.values()), "a shape never moves"
    return min(colors, key=lambda color: int(np.argmax(moving[color])))


def seen_bounce(frames, color):
    jumps = np.abs(np.diff(track(frames, color, wraps=False), axis=0)).max()
    return "no" if jumps > 0.5 else "yes"


def seen_color(frames):
    return max(COLORS, key=lambda color: mask_of(frames, color).sum())


@pytest.fixture(scope="module", params=[8, 12, 16, 32], ids="{}_frames".format)
def dataset(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    options = {"num_train": 64, "num_test": 16, "seed": 3, "num_frames": request.param, "fps": 5.0}
    return folder, write_dataset(folder, progress=False, **options), request.param


def test_every_answer_is_true_in_the_decoded_file(dataset):
    folder, entries, num_frames = dataset
    checked = Counter()
    decoded = {path.name: decode(path) for path in (folder / "videos").glob("*.mp4")}
    color_of = {name: seen_color(frames) for name, (frames, _) in decoded.items()}
    for entry in entries["train"] + entries["test"]:
        name = Path(entry["video"]).name
        (frames, fps), color = decoded[name], color_of[name]
        assert frames.shape == (num_frames, 96, 96, 3) and fps == 5.0
        seen = {
            "direction": lambda f=frames, c=color: seen_direction(f, c),
            "next": lambda f=frames, c=color: seen_next(f, c),
            "order": lambda f=frames, choices=entry["choices"]: seen_order(f, choices),
            "bounce": lambda f=frames, c=color: seen_bounce(f, c),
            "color": lambda c=color: c,
        }[entry["question_type"]]()
        assert seen == entry["conversations"][1]["value"], entry["id"]
        checked[entry["question_type"]] += 1
    assert set(checked) == set(QUESTION_TYPES)


def test_entries_are_llava_json_on_disk(dataset):
    folder, entries, _ = dataset
    for split in ("train", "test"):
        stored = json.loads((folder / f"{split}.json").read_text())
        assert stored == entries[split]
        assert len({entry["id"] for entry in stored}) == len(stored)
        for entry in stored:
            assert (folder / entry["video"]).is_file()
            human, gpt = entry["conversations"]
            assert (human["from"], gpt["from"]) == ("human", "gpt")
            assert human["value"].startswith("<video>\n") and human["value"].count("<video>") == 1
            assert gpt["value"] in entry["choices"]
            assert all(choice in human["value"] for choice in entry["choices"])
    # one entry per question, one file per clip
    assert len(list((folder / "videos").iterdir())) == 80
    assert len(entries["train"]) == 64 + 48 and len(entries["test"]) == 16 + 12


@pytest.mark.parametrize("num_frames", [8, 32])
@pytest.mark.parametrize("kind", GLIMPSES)
def test_a_glimpse_is_seen_in_its_moment_alone(kind, num_frames, tmp_path):
    options = {"num_frames": num_frames, "fps": 5.0, "question_types": [kind], "progress": False}
    entries = write_dataset(tmp_path, num_train=0, num_test=16, **options)["test"]
    assert len(entries) == 16
    for entry in entries:
        frames, fps = decode(tmp_path / entry["video"])
        counts = {color: mask_of(frames, color).sum(axis=(1, 2)) for color in COLORS}
        answer = entry["conversations"][1]["value"]
        first, last = (round(seconds * fps) for seconds in entry["moment"])
        shown = np.isin(np.arange(num_frames), range(first, last + 1))
        assert (counts[answer] > 150).tolist() == shown.tolist(), entry["id"]
        # Nothing else has a color that could be the answer: where it is not seen, nothing is.
        assert all(own[~shown].max() < 20 for own in counts.values())
        assert max(own.max() for color, own in counts.items() if color != answer) < 20
        assert last - first in (1, 2) and num_frames // 4 <= first and last < num_frames


def test_glimpses_come_at_any_time_after_the_start_and_are_balanced_exactly():
    clips = make_clips(384, num_frames=32, question_types=GLIMPSES)
    assert {clip.moment[0] for clip in clips} == set(range(8, 31))
    assert {clip.moment[-1] for clip in clips} == set(range(9, 32))
    for question_type, level in chance_levels(entries_of(clips)).items():
        assert level == {"num_questions": 128, "chance": 0.25, "best_guess": 0.25}, question_type


def test_a_glimpse_is_all_that_changes_or_little_beside_the_rest():
    """Change per frame, away from the moment and into it: so much for how hard it is to find by the difference of frames."""
    for kind in GLIMPSES:
        for clip in make_clips(8, num_frames=32, question_types=[kind]):
            change = np.square(np.diff(render_clip(clip, 48).astype(float), axis=0)).mean(axis=(1, 2, 3))
            into = change[[clip.moment[0] - 1]]
            away = np.delete(change, [frame - 1 for frame in (*clip.moment, clip.moment[-1] + 1) if frame < 32])
            if kind == "glimpse":
                assert away.max() < 0.1 * into.min()
            else:
                assert away.min() > 150  # noise alone makes 8
            ratio = away.max() / away.min()
            assert ratio > 2.5 if kind == "surging_glimpse" else ratio < 1.5, (kind, ratio)


def test_glimpses_are_not_among_what_is_asked_by_default():
    assert not {entry["question_type"] for entry in entries_of(make_clips(48))} & set(GLIMPSES)
    asked = entries_of(make_clips(32, question_types=["glimpse", "color"]))
    assert Counter(entry["question_type"] for entry in asked) == {"glimpse": 16, "color": 16}
    assert all(("moment" in entry) == (entry["question_type"] == "glimpse") for entry in asked)


@pytest.mark.parametrize("num_clips", [16, 48, 320])
def test_answers_are_balanced_exactly(num_clips):
    levels = chance_levels(entries_of(make_clips(num_clips)))
    assert {name: level["chance"] for name, level in levels.items()} == {
        "direction": 0.25,
        "next": 0.25,
        "order": 0.5,
        "bounce": 0.5,
        "color": 0.25,
    }
    for name, level in levels.items():
        assert level["best_guess"] == level["chance"], name


def test_any_number_of_clips_is_balanced_as_far_as_it_can_be():
    for num_clips in range(1, 40):
        for kind in CLIP_KINDS:
            entries = entries_of(make_clips(num_clips, question_types=[kind]))
            assert len(entries) == num_clips
            counts = Counter(entry["choices"].index(entry["conversations"][1]["value"]) for entry in entries)
            counts = [counts[place] for place in range(len(entries[0]["choices"]))]
            assert max(counts) - min(counts) <= 1, (kind, num_clips, counts)


def test_color_says_nothing_about_the_other_answer():
    pairs = defaultdict(Counter)
    for clip in make_clips(64 * 4):
        if len(clip.questions) == 2:
            asked, color = clip.questions
            pairs[asked.question_type][asked.answer, color.answer] += 1
    for kind, counts in pairs.items():
        choices = 2 if kind == "bounce" else 4
        assert len(counts) == 4 * choices and len(set(counts.values())) == 1, (kind, counts)


def appearance(clip, frame: int) -> tuple:
    """All there is to see in one frame, positions rounded to a grid of 5 x 5."""
    cells = [tuple(np.minimum(shape.path[frame] * 5, 4).astype(int)) for shape in clip.shapes]
    return tuple(sorted((shape.color, *cell) for shape, cell in zip(clip.shapes, cells, strict=True)))


def accuracy_of_rule(kind: str, cue, num_clips: int = 4000) -> float:
    """Learns the most frequent answer for every value of a cue, and tries it on held-out clips."""
    answers = defaultdict(Counter)
    for clip in make_clips(num_clips, split="train", question_types=[kind]):
        answers[cue(clip)][clip.questions[0].answer] += 1
    rule = {value: counts.most_common(1)[0][0] for value, counts in answers.items()}
    test = make_clips(num_clips, split="test", question_types=[kind])
    return sum(rule.get(cue(clip)) == clip.questions[0].answer for clip in test) / num_clips


@pytest.mark.parametrize("kind", CLIP_KINDS)
@pytest.mark.parametrize("frame", [0, 4, 11], ids=["first", "middle", "last"])
def test_a_rule_on_one_frame_stays_at_chance(kind, frame):
    if kind == "order":  # two shapes: too many appearances to learn jointly, so each color's place by itself

        def cue(clip):
            return clip.shapes[0].color, appearance(clip, frame)[0]
    else:

        def cue(clip):
            return appearance(clip, frame)

    chance = 0.25 if kind in ("direction", "next") else 0.5
    # four standard deviations of 4,000 guesses
    assert abs(accuracy_of_rule(kind, cue) - chance) < 4 * np.sqrt(chance * (1 - chance) / 4000)


def test_the_same_rule_on_several_frames_is_far_above_chance():
    # So the rule above would have found a cue, had there been one.
    def motion(clip, *frames):
        path = clip.shapes[0].path[list(frames)]
        return tuple(np.sign(np.round(steps_of(path), 3)).astype(int).ravel())

    assert accuracy_of_rule("direction", lambda clip: motion(clip, 0, 1), 400) == 1.0
    assert accuracy_of_rule("next", lambda clip: motion(clip, 10, 11), 400) > 0.8
    assert accuracy_of_rule("next", lambda clip: motion(clip, 0, 1), 400) < 0.5  # the start is not enough
    halves = accuracy_of_rule("bounce", lambda clip: tuple((clip.shapes[0].path[[0, 11]] > 0.5).ravel()), 400)
    assert halves > 0.75


def test_same_seed_same_data_set(tmp_path):
    # With crf instead of a constant quantizer, some clips came out with other pixels in a second run.
    options = {"num_train": 8, "num_test": 8, "progress": False}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_dataset(tmp_path / name, seed=seed, **options)
    for split in ("train", "test"):
        stored = {name: (tmp_path / name / f"{split}.json").read_bytes() for name in "abc"}
        assert stored["a"] == stored["b"]
    files = sorted((tmp_path / "a" / "videos").iterdir())
    assert len(files) == 16
    for path in files:
        frames = {name: decode(tmp_path / name / "videos" / path.name)[0] for name in "abc"}
        assert np.array_equal(frames["a"], frames["b"])
        assert not np.array_equal(frames["a"], frames["c"])


def test_test_clips_are_not_among_the_training_clips():
    train, test = (make_clips(400, split=split) for split in ("train", "test"))
    places = np.stack([clip.shapes[0].path[0] for clip in train])
    for clip in test:
        assert np.abs(places - clip.shapes[0].path[0]).max(axis=1).min() > 0
    assert not {clip.texture_seed for clip in train} & {clip.texture_seed for clip in test}
    assert not {clip.name for clip in train} & {clip.name for clip in test}


def test_only_what_is_asked_for():
    entries = entries_of(make_clips(12, question_types=["next", "color"]))
    assert Counter(entry["question_type"] for entry in entries) == {"next": 12, "color": 12}
    entries = entries_of(make_clips(8, question_types=["color"]))
    assert Counter(entry["conversations"][1]["value"] for entry in entries) == dict.fromkeys(COLORS, 2)


@pytest.mark.parametrize("shape", ["circle", "square", "diamond", "triangle"])
def test_shapes_have_about_the_same_area(shape):
    place = (np.arange(400) + 0.5) / 400 - 0.5
    inside = signed_distance(shape, place[None, :], place[:, None], 0.2) < 0
    assert inside.mean() == pytest.approx(np.pi * 0.2**2, rel=0.05)


def test_frames_show_a_shape_where_its_path_says():
    for clip in make_clips(8, question_types=["direction"], seed=1):
        frames = render_clip(clip, size=64)
        (shape,) = clip.shapes
        off = (track(frames, shape.color) - shape.path[:-1] + 0.5) % 1.0 - 0.5
        assert np.abs(off).max() < 0.02


def test_bad_options_are_named_before_anything_is_written(tmp_path):
    for options, message in [
        ({"num_frames": 4}, "num_frames is 4"),
        ({"size": 65}, "size is 65"),
        ({"fps": 0}, "fps is 0"),
        ({"num_train": -1}, "num_clips is -1"),
        ({"question_types": ["speed"]}, "speed"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_dataset(tmp_path / "new", progress=False, **options)
        assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="33 x 32"):
        write_video(np.zeros((2, 33, 32, 3), dtype=np.uint8), tmp_path / "odd.mp4", 4)


def test_command_line(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--output",
        "clips",
        "--num-train",
        "16",
        "--num-test",
        "4",
        "--size",
        "64",
    ]
    done = processes.run(command, cwd=tmp_path, timeout=120)
    assert "train: 28 questions on 16 clips" in done.stdout and "test: 7 questions on 4 clips" in done.stdout
    assert len(json.loads((tmp_path / "clips" / "train.json").read_text())) == 28
    refused = processes.run([*command, "--num-frames", "99"], cwd=tmp_path, timeout=120, status=2)
    assert "num_frames is 99, expected 8 to 32" in refused.stderr
