"""Predictions in an interactive session: a short repr, a plot, and NaN as the skill of a static clip."""

import importlib
import math
import sys

import pytest
import torch
from tiny import LAYOUTS, tiny_model, video_batch

from llava_next_ar.modeling.reconstruction_metrics import NextFramePrediction


def inputs_of(model, lengths) -> dict:
    return {name: value for name, value in video_batch(model.config, lengths).items() if name != "labels"}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_a_prediction_is_short_at_the_prompt(model):
    inputs = inputs_of(model, [[5]])
    (prediction,), (surprise,) = model.predict_next_frames(**inputs), model.surprise(**inputs)
    (imagined,) = model.imagine(2, hold_back=True, **inputs)
    shown = repr(prediction)
    assert shown.startswith("NextFramePrediction(frame_index=[4], predictions=4 x [9, 16], ")
    assert f"skill: {prediction.metrics['skill']:.4g}" in shown and "grids=4 x (3, 3)" in shown
    assert repr(imagined).startswith("ImaginedFrames(frame_index=[2], seconds=[2], grids=2 x (3, 3), ")
    for one in (prediction, surprise, imagined, [prediction] * 3):
        assert len(repr(one)) < 1200 and "\n" not in repr(one) and "tensor" not in repr(one)


def test_frames_of_different_grids_are_all_named():
    model = tiny_model(**LAYOUTS["slow_fast"])
    (prediction,) = model.predict_next_frames(**inputs_of(model, [[5]]))
    assert {tuple(one.shape) for one in prediction.predictions} == {(9, 16), (4, 16)}
    assert "predictions=4 x [4, 16] or [9, 16]" in repr(prediction)


def test_skill_of_a_static_clip_is_nan_and_said_so(model):
    inputs = inputs_of(model, [[4]])
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:, :1].expand(-1, 4, -1, -1, -1).contiguous()
    (prediction,) = model.predict_next_frames(**inputs)
    assert prediction.metrics["copy_mse"] == 0 and math.isnan(prediction.metrics["skill"])
    assert "skill: nan" in repr(prediction)
    assert "NaN for a static clip" in NextFramePrediction.__doc__


def test_a_prediction_is_plotted(model):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    (prediction,) = model.predict_next_frames(**inputs_of(model, [[5]]))
    axes = prediction.plot()
    drawn = {line.get_label(): line for line in axes.lines}
    for label, name in (("prediction", "mse"), ("copying the last frame", "copy_mse")):
        assert drawn[label].get_xdata().tolist() == [1, 2, 3, 4]
        assert torch.equal(torch.tensor(drawn[label].get_ydata()), prediction.frame_metrics[name])
    other = pyplot.figure().add_subplot()
    assert prediction.plot(other) is other
    pyplot.close("all")


def test_matplotlib_is_imported_by_the_plot_alone(model, monkeypatch):
    (prediction,) = model.predict_next_frames(**inputs_of(model, [[3]]))
    module = importlib.import_module(NextFramePrediction.__module__)
    assert "matplotlib" not in vars(module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        prediction.plot()
