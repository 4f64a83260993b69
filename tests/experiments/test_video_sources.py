"""Sources of video: libraries of clips, the answers of their questions, and pairs with an event."""

import importlib.util
import json
import sys
from dataclasses import asdict, dataclass

import numpy as np
import pytest

from llava_next_ar.experiments.sources import metaworld_clips, vizdoom_clips
from llava_next_ar.experiments.sources.clips import (
    ClipQuestion,
    LibraryBuilder,
    contact_sheet,
    join,
    open_library,
    sheet_rows,
)
from llava_next_ar.experiments.sources.drawn_clips import DataSettings, drawn_library
from llava_next_ar.experiments.sources.metaworld_clips import AZIMUTHS, MetaworldSettings, draw_camera, shown_states
from llava_next_ar.experiments.sources.vizdoom_clips import MAPS, VizdoomSettings, draw_motion, maps_of_split

T = 4


def frames_of(value: int) -> np.ndarray:
    """Frames `[T, 2, 2, 3]` whose pixels are `value` + the number of the frame."""
    return np.tile(np.arange(value, value + T, dtype=np.uint8)[:, None, None, None], (1, 2, 2, 3))


def question(kind: str, answer: str) -> ClipQuestion:
    return ClipQuestion(question_type=kind, text=f"{kind} ?", choices=("yes", "no"), answer=answer)


def small_builder() -> LibraryBuilder:
    built = LibraryBuilder()
    built.add_clip(
        frames_of(10),
        name="one",
        split="train",
        group="a",
        questions=[question("opens", "yes")],
        backwards_questions=[question("opens", "no")],
    )
    built.add_clip(frames_of(20), name="two", split="test", group="b", questions=[question("opens", "no")])
    changed = frames_of(30)
    changed[2:] += 100
    built.add_pair(frames_of(30), changed, name="three", split="test", group="b", event="jump")
    return built


@dataclass(frozen=True, kw_only=True)
class FakeSettings:
    name: str = "fake"
    num_frames: int = T
    frame_seconds: float = 0.5
    fails: bool = False

    def record(self) -> LibraryBuilder:
        if self.fails:
            raise KeyboardInterrupt
        return small_builder()


def skip_without(package: str) -> None:
    """Skip the test without a simulator; it is not imported, since MuJoCo reads its environment once."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install 'llava-next-ar[sources]')")


# --- libraries ----------------------------------------------------------------------------------------------------


def test_a_clip_that_is_played_backwards_shares_its_recording(tmp_path):
    library = open_library(FakeSettings(), tmp_path)
    forwards, backwards = library.of_split("train")
    assert library.clips[forwards].recording == library.clips[backwards].recording == 0
    assert library.frames(forwards)[:, 0, 0, 0].tolist() == [10, 11, 12, 13]
    assert library.frames(backwards)[:, 0, 0, 0].tolist() == [13, 12, 11, 10]
    answers = {library.clips[clip].name: asked.answer for clip, asked in library.questions["train"]}
    assert answers == {"one": "yes", "one_backwards": "no"}


def test_the_event_of_a_pair_is_the_first_frame_that_differs(tmp_path):
    library = open_library(FakeSettings(), tmp_path)
    (pair,) = library.pairs["test"]
    possible, changed = library.frames(pair.possible), library.frames(pair.changed)
    assert (pair.event, pair.event_frame, pair.impossible) == ("jump", 2, True)
    assert np.array_equal(possible[:2], changed[:2]) and (possible[2:] != changed[2:]).all()
    orders = [library.frame_order(clip, shuffled=True).tolist() for clip in (pair.possible, pair.changed)]
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(T))


@pytest.mark.parametrize("first", [0, T])
def test_a_pair_without_an_event_after_the_first_frame_raises(first):
    changed = frames_of(0)
    changed[first:] += 50
    with pytest.raises(ValueError, match="'bad' differ in frames .*expected one or more, but not the first"):
        LibraryBuilder().add_pair(frames_of(0), changed, name="bad", split="test", group="a", event="jump")


def test_an_answer_that_is_not_a_choice_raises():
    with pytest.raises(ValueError, match=r"answer is 'perhaps', expected one of \('yes', 'no'\)"):
        question("opens", "perhaps")


def test_an_unknown_split_raises(tmp_path):
    with pytest.raises(ValueError, match="split is 'dev', expected one of"):
        open_library(FakeSettings(), tmp_path).of_split("dev")


def test_clips_are_recorded_once_and_an_interrupted_recording_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        open_library(FakeSettings(fails=True), tmp_path)
    first = open_library(FakeSettings(), tmp_path)
    monkeypatch.setattr(FakeSettings, "record", lambda self: pytest.fail("recorded again"))
    again = open_library(FakeSettings(), tmp_path)
    assert again.clips == first.clips and again.questions == first.questions and again.pairs == first.pairs
    assert np.array_equal(again.frames(3), first.frames(3)) and again.fingerprint.startswith("fake-")
    (tmp_path / again.fingerprint / "clips.json").unlink()  # as if killed between both files
    with pytest.raises(pytest.fail.Exception, match="recorded again"):
        open_library(FakeSettings(), tmp_path)


def test_joined_libraries_number_clips_recordings_and_pairs_through(tmp_path):
    library = open_library(FakeSettings(), tmp_path)
    both = join([library, library])
    count = len(library.clips)
    assert len(both.clips) == 2 * count and len(both.recordings) == 2 * len(library.recordings)
    for clip in range(2 * count):
        assert np.array_equal(both.frames(clip), library.frames(clip % count))
    first, second = both.pairs["test"]
    assert (second.possible, second.changed) == (first.possible + count, first.changed + count)
    assert {clip for clip, _ in both.questions["train"]} == {0, 1, count, count + 1}
    assert both.fingerprint == f"{library.fingerprint}+{library.fingerprint}"


def test_libraries_of_different_length_are_not_joined(tmp_path):
    library = open_library(FakeSettings(), tmp_path)
    with pytest.raises(ValueError, match="expected the same for all"):
        join([library, drawn_library(DataSettings(num_train=4, num_watched=4, num_val=4, num_test=4,
                                                  num_val_pairs=2, num_test_pairs=2))])  # fmt: skip


def test_settings_are_told_apart_by_their_fingerprint(tmp_path):
    names = {open_library(FakeSettings(frame_seconds=seconds), tmp_path).fingerprint for seconds in (0.5, 1.0)}
    assert len(names) == 2


def test_a_sheet_shows_a_clip_of_each_question_type_and_event(tmp_path):
    library = open_library(FakeSettings(), tmp_path)
    rows = sheet_rows(library)
    assert [label for label, _ in rows] == ["opens: no", "jump"] and rows[1][1] == library.pairs["test"][0].changed
    sheet = np.asarray(contact_sheet(library, rows, size=10))
    assert sheet.shape == (2 * 12, 110 + T * 12, 3)
    assert sheet[5, 115].tolist() == [20, 20, 20] and sheet[17, 110 + 2 * 12 + 5].tolist() == [132, 132, 132]


# --- ViZDoom ------------------------------------------------------------------------------------------------------


def test_maps_are_held_out():
    splits = {split: set(maps_of_split(split)) for split in ("train", "val", "test")}
    assert sum(map(len, splits.values())) == len(MAPS) == len(set.union(*splits.values())) == 68
    assert {split: len(maps) for split, maps in splits.items()} == {"train": 42, "val": 9, "test": 17}


@pytest.mark.parametrize("number", range(8))
def test_answers_follow_from_the_motion(number):
    """Positive turns and steps lead to the right."""
    rng = np.random.default_rng(number)
    side = ("left", "right")
    for kind, part in (("turn", "turn"), ("strafe", "step")):
        motion, answer = draw_motion(kind, number, 6, rng)
        moved = getattr(motion, part)
        assert (np.sign(moved) == np.sign(moved[0])).all() and answer == side[int(moved[0] > 0)]
    motion, answer = draw_motion("order", number, 6, rng)
    changes = np.flatnonzero(np.diff(np.sign(motion.turn)))
    assert answer == side[int(motion.turn[0] > 0)] and changes.tolist() in ([1], [2])
    motion, answer = draw_motion("next", number, 6, rng)
    # Two frames each: the next turn is the opposite of the one two frames ago.
    assert answer == side[int(-motion.turn[-2] > 0)]
    assert all(np.sign(motion.turn[t]) == -np.sign(motion.turn[t - 2]) for t in range(2, 5))


def test_both_answers_are_equally_frequent():
    for kind in ("turn", "strafe", "order", "next"):
        answers = [draw_motion(kind, number, 6, np.random.default_rng(number))[1] for number in range(400)]
        assert abs(answers.count("left") - 200) <= (40 if kind == "next" else 0), kind


def test_an_unknown_motion_raises():
    with pytest.raises(ValueError, match="kind is 'fly', expected turn, strafe"):
        draw_motion("fly", 0, 6, np.random.default_rng(0))


@pytest.mark.parametrize("size", [28, 200])
def test_a_frame_size_that_the_simulator_does_not_have_raises(size):
    with pytest.raises(ValueError, match=f"image_size is {size}, expected 56 to 120"):
        VizdoomSettings(image_size=size)


@pytest.mark.parametrize(
    ("settings", "package"),
    [(VizdoomSettings(num_train=2, num_val=2, num_test=2), "vizdoom"), (MetaworldSettings(num_train=1), "metaworld.env_dict")],
)  # fmt: skip
def test_a_missing_simulator_names_the_extra(tmp_path, monkeypatch, settings, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"is not installed: pip install 'llava-next-ar\[sources\]'"):
        open_library(settings, tmp_path)


TINY_VIZDOOM = VizdoomSettings(num_train=4, num_val=2, num_test=2, num_watched=2, num_val_pairs=0, num_test_pairs=4)


@pytest.mark.slow
def test_vizdoom_records_the_same_clips_again_with_true_answers(tmp_path):
    skip_without("vizdoom")
    library = open_library(TINY_VIZDOOM, tmp_path / "one")
    again = open_library(TINY_VIZDOOM, tmp_path / "two")
    assert np.array_equal(library.recordings, again.recordings) and library.clips == again.clips
    assert {clip.group for clip in library.clips if clip.split == "test"} <= {
        name for _, name in maps_of_split("test")
    }
    checked = 0
    for clip, asked in library.questions["train"]:
        if asked.question_type == "turn":
            shift = image_shift(library.frames(clip))
            assert (shift < 0) == (asked.answer == "right"), library.clips[
                clip
            ].name  # the picture moves the other way
            checked += 1
    assert checked == TINY_VIZDOOM.num_train
    events = {pair.event: pair for pair in library.pairs["test"]}
    assert set(events) == set(vizdoom_clips.EVENTS)
    assert not (tmp_path / "_vizdoom").exists()


def image_shift(frames: np.ndarray) -> float:
    """Pixels by which the middle of the picture moves to the right from frame to frame, by correlation."""
    rows = frames[:, 30:80].astype(float).mean(-1)
    shifts = []
    for now, after in zip(rows[:-1], rows[1:], strict=True):
        errors = {
            s: np.abs(now[:, 40:72] - after[:, 40 + s : 72 + s]).mean() for s in range(-40, 41)
        }  # after at x + s shows now at x
        shifts.append(min(errors, key=errors.get))
    return float(np.median(shifts))


# --- MetaWorld ----------------------------------------------------------------------------------------------------


def test_cameras_are_held_out():
    ranges = sorted(AZIMUTHS.values())
    assert all(low[1] < high[0] for low, high in zip(ranges[:-1], ranges[1:], strict=True))
    for split, (low, high) in AZIMUTHS.items():
        cameras = [draw_camera(split, np.random.default_rng(seed)) for seed in range(20)]
        assert all(low <= camera.azimuth <= high for camera in cameras)


def test_the_middle_of_the_motion_is_shown():
    positions = np.concatenate([np.zeros(10), np.linspace(0, -1, 101), np.full(10, -1.0)])
    shown = shown_states(positions, 6)
    assert positions[shown].round(2).tolist() == [-0.2, -0.32, -0.44, -0.56, -0.68, -0.8]
    assert shown_states(np.zeros(50), 6) is None  # nothing moves
    assert shown_states(np.array([0.0, 0.0, 1.0, 1.0]), 3) is None  # faster than frames are shown


def test_a_mujoco_that_was_imported_without_a_renderer_is_reported(tmp_path, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setitem(sys.modules, "mujoco", object())
    with pytest.raises(RuntimeError, match="imported before MUJOCO_GL was set, expected MUJOCO_GL=egl"):
        open_library(MetaworldSettings(num_train=1), tmp_path)


@pytest.mark.slow
def test_metaworld_records_the_same_clips_again_with_true_answers(tmp_path):
    skip_without("metaworld")
    settings = MetaworldSettings(num_train=1, num_val=0, num_test=1, num_cameras=1, num_val_pairs=0, num_test_pairs=10)
    library = open_library(settings, tmp_path / "one")
    again = open_library(settings, tmp_path / "two")
    assert np.array_equal(library.recordings, again.recordings) and library.clips == again.clips
    for clip, asked in library.questions["test"]:
        own = library.clips[clip]
        _, thing, action = own.name.split("_")[:3]
        reverse = {"opens": "closes", "closes": "opens"}[action]
        expected = {"object": thing, "opens": reverse if own.backwards else action}
        assert asked.answer == expected[asked.question_type]
    pairs = library.pairs["test"]
    assert {pair.event for pair in pairs if pair.impossible} == set(metaworld_clips.EVENTS)
    assert {pair.event for pair in pairs if not pair.impossible} == set(metaworld_clips.APPEARANCES)


@pytest.mark.slow
def test_impossible_motions_change_no_more_than_possible_ones(tmp_path):
    """The difference of two frames does not give them away: what is stuck moves less, what moves back moves as much."""
    skip_without("metaworld")
    settings = MetaworldSettings(
        num_train=0,
        num_val=0,
        num_test=1,
        num_cameras=0,
        num_val_pairs=0,
        num_test_pairs=16,
        events=metaworld_clips.MOTIONS,
    )
    library = open_library(settings, tmp_path)
    assert not library.questions["test"]
    changes = {event: [] for event in metaworld_clips.MOTIONS}
    for pair in library.pairs["test"]:
        assert pair.impossible and 0 < pair.event_frame < settings.num_frames
        moved = [
            np.abs(np.diff(library.frames(clip).astype(float)[pair.event_frame - 1 :], axis=0)).mean()
            for clip in (pair.possible, pair.changed)
        ]
        changes[pair.event].append(moved[1] / moved[0])
    assert np.mean(changes["stuck"]) < 1 and np.mean(changes["reverse"]) < 1.3


# --- drawn clips --------------------------------------------------------------------------------------------------


def test_drawn_clips_are_those_of_the_benchmark():
    settings = DataSettings(num_train=4, num_watched=4, num_val=4, num_test=4, num_val_pairs=2, num_test_pairs=4)
    library = drawn_library(settings)
    assert library.num_frames == 5 and library.frame_seconds == 0.75
    assert library.frames(0).shape == (5, 56, 56, 3)
    assert {split: len(pairs) for split, pairs in library.pairs.items()} == {"val": 2, "test": 4}
    for pair in library.pairs["test"]:
        differs = (library.frames(pair.possible) != library.frames(pair.changed)).any(axis=(1, 2, 3))
        assert int(differs.argmax()) == pair.event_frame
        assert library.clips[pair.possible].pair == library.clips[pair.changed].pair != ""
    assert json.loads(json.dumps(asdict(settings)))["num_frames"] == 14
