"""Controls for violation of expectation: their signals, harmless changes, scores and tables."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from llava_next_ar.experiments.controls import controls
from llava_next_ar.experiments.controls.controls import Scorer, measure, random_tower, statistics_of
from llava_next_ar.experiments.controls.pairs import CHANGES, IMPOSSIBLE, changed_frames, with_harmless_pairs
from llava_next_ar.experiments.controls.scores import (
    clip_values,
    feature_scores,
    model_scores,
    pixel_scores,
    untrained,
)
from llava_next_ar.experiments.controls.signals import SIGNALS, geometric_signals
from llava_next_ar.experiments.controls.tables import (
    alarm_rows,
    change_rows,
    event_rows,
    gain_rows,
    separation_rows,
    write_tables,
)
from llava_next_ar.experiments.sources.drawn_clips import DataSettings, drawn_library
from llava_next_ar.experiments.study.data import StudyData
from llava_next_ar.experiments.study.features import encode_frames
from llava_next_ar.experiments.study.runs import build_model
from llava_next_ar.experiments.study.variants import RunSettings

DATA = DataSettings(
    num_train=4,
    num_watched=4,
    num_val=4,
    num_test=4,
    num_val_pairs=4,
    num_test_pairs=10,
    image_size=28,
    tower_layers=1,
)
COMMON = RunSettings(
    data=DATA,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_attention_heads=2,
    head={"embedding_dim": 16, "num_heads": 2},
)


@pytest.fixture(scope="module")
def data():
    return StudyData(DATA, [drawn_library(DATA)])


@pytest.fixture(scope="module")
def library(data):
    return with_harmless_pairs(data.library)


@pytest.fixture(scope="module")
def tower(data):
    return build_model(COMMON, 0, data.vocabulary).model.vision_tower.eval()


@pytest.fixture(scope="module")
def numbers(library, tower, data):
    """Raw numbers of tiny models without training."""
    towers = {"trained": tower, "random": random_tower(tower, 0)}
    statistics = {name: statistics_of(own, library) for name, own in towers.items()}
    models = {
        "seed 0": build_model(COMMON, 0, data.vocabulary).eval(),
        "untrained": untrained(build_model(COMMON, 0, data.vocabulary), 0).eval(),
    }
    made = {"source": "drawn", "variant": "weight-1", "seeds": [0]}
    return made | measure(Scorer(library, towers, statistics, models))


# -- Signals


def test_geometric_signals_of_a_known_path():
    path = np.array([[0, 0], [1, 0], [2, 0], [2, 2], [4, 2]], dtype=float)
    signals = geometric_signals(path)
    nan = np.nan
    assert list(signals) == list(SIGNALS)
    assert signals["step size"] == pytest.approx([nan, 1, 1, 2, 2], nan_ok=True)
    assert signals["turning angle"] == pytest.approx([nan, nan, 0, np.pi / 2, np.pi / 2], nan_ok=True)
    assert signals["angle variance"] == pytest.approx([np.var([0, np.pi / 2, np.pi / 2])] + [nan] * 4, nan_ok=True)
    assert signals["acceleration"] == pytest.approx([nan, nan, 0, 5**0.5, 8**0.5], nan_ok=True)
    # Lines through (0, 0), (1, 0), then also (2, 0), then also (2, 2): the next points are (2, 0), (3, 0) and (3, 2).
    assert signals["linear residual"] == pytest.approx([nan, nan, 0, 5**0.5, 1], nan_ok=True)


def test_a_straight_path_has_no_angle_and_no_residual():
    path = np.arange(6)[:, None] * np.array([[1.0, -2, 0.5]])
    signals = geometric_signals(path)
    for name in ("turning angle", "angle variance", "acceleration", "linear residual"):
        assert np.nanmax(signals[name]) == pytest.approx(0, abs=1e-6), name
    with pytest.raises(ValueError, match="T of at least 3"):
        geometric_signals(path[:2])


# -- Harmless changes


def test_light_changes_all_pixels_from_the_event_on():
    frames = np.full((4, 6, 6, 3), 100, np.uint8)
    assert changed_frames(frames, "light", 2, 0)[:, 0, 0, 0].tolist() == [100, 100, 75, 75]
    assert changed_frames(frames, "light throughout", 2, 1)[:, 0, 0, 0].tolist() == [125] * 4


def test_floor_changes_what_stands_still():
    frames = np.full((5, 8, 8, 3), 80, np.uint8)
    for frame in range(5):
        frames[frame, 2, frame] = 200  # a body that moves
    changed = changed_frames(frames, "floor", 3, 0)
    assert np.array_equal(changed[:3], frames[:3])
    assert changed[3, 0, 0].tolist() == [100, 80, 60] and changed[3, 2, 3].tolist() == [200] * 3
    assert changed[3, 2, 0].tolist() == [100, 80, 60]  # where the body was before


def test_each_impossible_pair_has_a_harmless_one_of_each_change(library, data):
    for split in ("val", "test"):
        impossible = [pair for pair in library.pairs[split] if pair.impossible]
        assert impossible == list(data.library.pairs[split])
        for change in CHANGES:
            own = [pair for pair in library.pairs[split] if pair.event == change]
            assert [pair.possible for pair in own] == [pair.possible for pair in impossible]
            for pair in own:
                possible, changed = library.frames(pair.possible), library.frames(pair.changed)
                differs = (possible != changed).any(axis=(1, 2, 3))
                assert not pair.impossible and differs[pair.event_frame :].all()
                assert differs[: pair.event_frame].all() == change.endswith("throughout")


# -- Scores


def test_a_head_without_training_gives_the_feature_difference(library, tower, data):
    """So the raw and the normalized feature difference are the error and the surprise of an untrained head."""
    frames = library.frames(library.pairs["test"][0].changed)
    encoded = encode_frames(tower, frames)[None]
    statistics = statistics_of(tower, library)
    model = build_model(COMMON, 0, data.vocabulary).eval()
    (scores,) = model_scores(model, encoded, statistics, 0.75)
    expected = feature_scores(((encoded[0, :, 1:] - statistics[0]) / statistics[1]).numpy())
    assert scores["prediction error"][1:] == pytest.approx(expected["feature difference"][1:], rel=1e-4)
    assert scores["surprise"][1:] == pytest.approx(expected["feature difference, normalized"][1:], rel=1e-4)
    (other,) = model_scores(untrained(model, 0), encoded, statistics, 0.75)
    assert np.abs(other["prediction error"][1:] / scores["prediction error"][1:] - 1).min() > 1e-3
    with pytest.raises(ValueError, match="no layer at zero"):
        untrained(model, 0)


def test_pixel_scores_of_known_frames():
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    frames[1:, 0] = 255  # half of the second frame turns white
    scores = pixel_scores(frames)
    assert scores["pixel difference"] == pytest.approx([np.nan, 0.5, 0], nan_ok=True)
    normalized = 0.5 / (0.5 + 0.1 * 0.25)  # the variance of half black, half white is a quarter
    assert scores["pixel difference, normalized"] == pytest.approx([np.nan, normalized, 0], nan_ok=True)


def test_values_of_a_clip():
    values = clip_values({"a": np.array([np.nan, 1, 5, 3])}, 3)
    assert values == {"a": {"mean": 3, "max": 5, "event": 3}}
    assert np.isnan(clip_values({"a": np.array([np.nan, 1, 5, 3])}, 0)["a"]["event"])


def test_a_random_tower_differs_in_its_weights_alone(tower):
    drawn = random_tower(tower, 1)
    frames = np.random.default_rng(0).integers(0, 255, (2, 28, 28, 3), dtype=np.uint8)
    one, other, again = (encode_frames(own, frames) for own in (tower, drawn, random_tower(tower, 1)))
    assert one.shape == other.shape and not torch.allclose(one, other) and torch.equal(other, again)


# -- Raw numbers


def test_raw_numbers_are_those_of_the_clips(numbers, library, tower):
    impossible = [pair for pair in library.pairs["test"] if pair.impossible]
    assert numbers["events"] == [pair.event for pair in impossible] and numbers["changes"] == list(CHANGES)
    wins = numbers["scores"]["pixel difference"]["event"]["wins"]
    for change in (IMPOSSIBLE, *CHANGES):
        own = impossible if change == IMPOSSIBLE else [p for p in library.pairs["test"] if p.event == change]
        for pair, digit in zip(own, wins[change], strict=True):
            low, high = (
                pixel_scores(library.frames(clip))["pixel difference"][pair.event_frame]
                for clip in (pair.possible, pair.changed)
            )
            assert int(digit) == 1 + (high > low) - (high < low)
    assert set(wins["light"]) == {"2"}  # a sudden light always changes more pixels
    alarms = numbers["scores"]["pixel difference"]["event"]["alarms"]
    assert alarms.keys() == {"possible", IMPOSSIBLE, *CHANGES} and set(alarms["light"]) == {"1"}
    same = numbers["scores"]["prediction error | seed 0"], numbers["scores"]["feature difference | trained tower"]
    assert same[0] == same[1]  # the model without training copies


def test_tables_of_known_digits(tmp_path):
    def place(wins, over, alarms):
        return {
            "wins": {IMPOSSIBLE: wins, "light": "2200"},
            "over": {"light": over},
            "alarms": {"possible": "0000", IMPOSSIBLE: alarms, "light": "1100"},
        }

    numbers = {
        "source": "made up",
        "variant": "weight-1",
        "seeds": [0, 1],
        "events": ["vanish", "vanish", "jump", "jump"],
        "changes": ["light"],
        "num_reference": 7,
        "scores": {
            "pixel difference": {"max": place("2100", "0000", "0000"), "event": place("2200", "0000", "0000")},
            "step size | random tower": {"max": place("0000", "2222", "0001")},
            "surprise | seed 0": {"max": place("2222", "2222", "1111")},
            "surprise | seed 1": {"max": place("2200", "0000", "1100")},
        },
    }
    assert [row[:3] for row in separation_rows(numbers)[1:]] == [
        ["surprise", "-", "0.750 [0.500, 1.000]"],
        ["pixel difference", "-", "0.375 [0.000, 0.750]"],
        ["step size, random tower", "-", "0.000 [0.000, 0.000]"],
    ]
    # 1, 1, 0.5 and 0.5 less 1, 0.5, 0 and 0; the best score that learns nothing is chosen by its mean.
    (row,) = gain_rows(numbers)[1:]
    assert row[0] == "surprise" and row[2].startswith("+0.375 [") and row[2].endswith("over pixel difference")
    assert row[1] == row[3] == "-"
    assert change_rows(numbers, "max", "over")[1] == ["surprise", "0.500 [0.500, 0.500]"]
    assert alarm_rows(numbers, "max")[1][1:3] == ["0.000 [0.000, 0.000]", "0.750 [0.500, 1.000]"]
    assert event_rows(numbers, "max")[1] == ["surprise", "0.50", "1.00"]
    (tmp_path / "made_up.json").write_text(json.dumps({**numbers, "seeds": []}))
    text = write_tables(tmp_path)
    assert (tmp_path / "controls.md").read_text() == text and "4 pairs; models: none." in text
    with pytest.raises(FileNotFoundError, match="holds no raw numbers"):
        write_tables(tmp_path / "empty")


def test_the_command_from_training_to_tables(tmp_path, monkeypatch, tower, capsys):
    """One run at a tiny size: a model is trained and kept, measured, and read again."""
    common = replace(COMMON, batch_size=4, num_steps=2, warmup_steps=1, curve_points=1, learning_rate=1e-3)
    monkeypatch.setattr(controls, "RunSettings", lambda: common)
    monkeypatch.setattr(controls, "load_tower", lambda *args, **options: tower)
    monkeypatch.setattr("llava_next_ar.experiments.study.runs.load_tower", lambda *args, **options: tower)
    options = ["--cache", str(tmp_path / "cache"), "--results", str(tmp_path / "results")]
    controls.main(["run", "--source", "drawn", "--seeds", "0", *options])
    (weights,) = (tmp_path / "cache" / "models").glob("*.safetensors")
    first, written = (tmp_path / "results" / "drawn.json").read_text(), weights.stat().st_mtime_ns
    assert "### " not in first and "prediction error, head without training" in capsys.readouterr().out
    controls.main(["run", "--source", "drawn", "--seeds", "0", *options])
    assert (tmp_path / "results" / "drawn.json").read_text() == first and weights.stat().st_mtime_ns == written
    with pytest.raises(SystemExit):
        controls.main(["tables", "--results", str(tmp_path / "nothing")])
    assert "holds no raw numbers" in capsys.readouterr().err


def test_the_committed_numbers_give_the_committed_tables(tmp_path):
    for path in controls.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    assert write_tables(tmp_path) == (controls.RESULTS / "controls.md").read_text()
