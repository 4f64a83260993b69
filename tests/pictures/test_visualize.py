"""scripts/visualize.py and the drawings that it is made of, on tiny models and real mp4 files."""

import base64
import io
import json
import re
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, find_chromium
from demo_folder import NUM_FRAMES, make_demo_folder
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from PIL import Image
from tiny import LAYOUTS, VIDEO_TOKEN, tiny_model, video_batch
from tiny_processor import tiny_processor
from video_clips import write_clip

from llava_next_ar.evaluation.html_page import Report, answers_figure
from llava_next_ar.modeling.frame_surprise import SURPRISE_FLOOR, VideoSurprise
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from llava_next_ar.pictures import visualize
from llava_next_ar.pictures.attention import answer_attention, attention_layers, attention_maps, attention_numbers
from llava_next_ar.pictures.features import FeatureBasis, error_figure, features_of, film_figure, fit_basis
from llava_next_ar.pictures.layout import head_visibility, layout_figure, layout_numbers, sequence_figure
from llava_next_ar.pictures.strip import (
    BLUE,
    VERMILION,
    NotThereError,
    StripRow,
    colour_scale,
    frame_strip,
    legible,
    patch_colours,
    shorten,
    shorten_text,
    write_title,
)
from llava_next_ar.pictures.surprise import (
    copying_surprise,
    is_worse,
    shown_frames,
    surprise_maps,
    surprise_of,
    surprise_timeline,
)
from llava_next_ar.pictures.visualize import VisualizeSettings, read_clip
from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor

PICTURES = [name for _, _, pictures in visualize.SECTIONS for name in pictures]
NEED_HEAD = {"film", "errors", "surprise", "surprise_maps", "mask"}


def moving(model):
    """A head that predicts changes, as if it had been trained."""
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_demo_folder(tmp_path_factory.mktemp("visualize"))


@pytest.fixture(scope="module")
def checkpoint(folder):
    torch.manual_seed(0)
    model = LlavaNextARForConditionalGeneration.from_pretrained(folder / "base").eval()
    return moving(model), LlavaNextARProcessor.from_pretrained(folder / "base")


@pytest.fixture(scope="module")
def settings(folder) -> VisualizeSettings:
    videos = sorted(str(path) for path in (folder / "clips" / "videos").glob("*.mp4"))[:2]
    return VisualizeSettings(model=str(folder / "base"), videos=tuple(videos), max_new_tokens=3)


@pytest.fixture(scope="module")
def drawn(checkpoint, settings, tmp_path_factory):
    """Folder and results of two videos."""
    output = tmp_path_factory.mktemp("pictures")
    return output, visualize.visualize(settings, output, *checkpoint, progress=False)


class Page(HTMLParser):
    """The tags of a page, and the text outside of its style."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    @property
    def text(self):
        return " ".join(self.words)


# -- The numbers


def test_the_numbers_are_those_of_the_model(checkpoint, settings, drawn):
    model, processor = checkpoint
    results = json.loads((drawn[0] / "numbers.json").read_text())
    for video, record in zip(settings.videos, results["videos"], strict=True):
        clip = read_clip(model, processor, video, settings)
        (prediction,) = model.predict_next_frames(**clip.inputs)
        (surprise,) = model.surprise(**clip.inputs)
        numbers = record["prediction"]
        assert record["seconds"] == pytest.approx(clip.inputs["video_timestamps"][0].tolist())
        assert numbers["frame_index"] == surprise.frame_index.tolist() == list(range(1, NUM_FRAMES))
        for name, expected in {**prediction.frame_metrics, "surprise": surprise.frames}.items():
            assert numbers[name] == pytest.approx(expected.tolist(), rel=1e-5), name
        assert numbers["metrics"] == pytest.approx(prediction.metrics, rel=1e-5)
        assert not numbers["is_copy"] and numbers["surprise_floor"] == SURPRISE_FLOOR
        assert numbers["copying_surprise"] == pytest.approx(copying_surprise(surprise), rel=1e-5)
        maps = {name: getattr(surprise, name) for name in ("errors", "copy_errors")}
        for name, expected in {**maps, "surprise_patches": surprise.patches}.items():
            for own, other in zip(numbers[name], expected, strict=True):
                torch.testing.assert_close(torch.tensor(own), other, rtol=1e-5, atol=1e-7)
    assert drawn[1] == results  # what a caller gets is what the file holds
    assert results["videos"][0]["prediction"] != results["videos"][1]["prediction"]


def test_numbers_that_are_none_are_null():
    values = visualize.plain(
        {"a": float("nan"), "b": np.array([1.23456789]), "c": torch.tensor([True]), "d": (1, "x")}
    )
    assert values == {"a": None, "b": [1.23457], "c": [True], "d": [1, "x"]}
    json.dumps(values, allow_nan=False)


def test_surprise_of_predictions_is_that_of_the_model(checkpoint, settings):
    clip = read_clip(*checkpoint, settings.videos[0], settings)
    (prediction,) = checkpoint[0].predict_next_frames(**clip.inputs)
    (expected,) = checkpoint[0].surprise(**clip.inputs)
    own = surprise_of(prediction, clip.times + 5)  # a clip from the middle of a file
    torch.testing.assert_close(own.seconds, expected.seconds)
    torch.testing.assert_close(own.frames, expected.frames)


def test_copying_is_as_surprising_as_a_model_that_copies(checkpoint, settings):
    clip = read_clip(*checkpoint, settings.videos[0], settings)
    (prediction,) = checkpoint[0].predict_next_frames(**clip.inputs)
    surprise = surprise_of(prediction, clip.times)
    prediction.predictions = prediction.copies
    assert copying_surprise(surprise) == pytest.approx(surprise_of(prediction, clip.times).frames.tolist(), rel=1e-5)


def rows_of(module: str, draw, *arguments):
    """The lines and the options that a drawing gives `frame_strip`."""
    strip = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            f"llava_next_ar.pictures.{module}.frame_strip",
            lambda rows, headings, **more: strip.update(more, rows=rows, headings=headings),
        )
        draw(*arguments)
    return strip


def test_copying_is_neutral_however_little_moves(folder, settings):
    """An untrained head copies: where little moves its surprise is far below 1, which once looked like foresight."""
    model = LlavaNextARForConditionalGeneration.from_pretrained(folder / "base").eval()
    clip = read_clip(model, LlavaNextARProcessor.from_pretrained(folder / "base"), settings.videos[0], settings)
    (surprise,) = model.surprise(**clip.inputs)
    assert surprise.frames.max() < 0.9
    assert copying_surprise(surprise) == surprise.frames.tolist()
    shown = (clip.frames, clip.times.tolist(), surprise, "title")
    strip = rows_of("surprise", surprise_maps, *shown)
    assert strip["rows"][1].captions == ["", *["1.00"] * len(surprise.frames)]
    for picture in strip["rows"][1].pictures[1:]:
        assert np.ptp(picture, axis=-1).max() < 0.02  # gray: neither purple nor orange
    # ... and a little worse is marked, though its surprise is below 1 still.
    surprise.errors[2], surprise.frames[2] = 1.1 * surprise.errors[2], 1.1 * surprise.frames[2]
    for number, errors in enumerate(surprise.errors):
        surprise.errors[number] = errors if number == 2 else 0.9 * errors
    figure = surprise_timeline(*shown)
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    assert surprise.frames[2] < 1
    np.testing.assert_allclose(lines["worse than copying by over 1%"], lines["prediction"][[2]])
    borders = [ax.spines["top"].get_edgecolor() for ax in figure.axes[2:]]
    assert [border == to_rgba(VERMILION) for border in borders] == [number == 2 for number in range(len(borders))]


def test_nothing_is_marked_where_copying_is_the_prediction():
    surprise = made_up(5)
    surprise.errors = surprise.copy_errors
    surprise.floors *= 3  # whatever the floor is
    surprise.frames = torch.tensor(copying_surprise(surprise))
    figure = surprise_timeline(np.random.default_rng(0).random((5, 8, 8, 3)), range(5), surprise, "title")
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    np.testing.assert_array_equal(lines["copying"], lines["prediction"])
    assert len(lines["worse than copying by over 1%"]) == 0
    assert all(ax.spines["top"].get_edgecolor() == to_rgba(BLUE) for ax in figure.axes[2:])


def test_rounding_is_not_marked_as_worse_than_copying():
    surprise = made_up(5)
    surprise.errors = [errors * (1 + 1e-5) for errors in surprise.copy_errors]
    assert not is_worse(surprise).any()
    surprise.errors[1] = surprise.copy_errors[1] * 1.5
    assert is_worse(surprise).tolist() == [False, True, False, False]


@pytest.mark.parametrize("scale", [1e-4, 0.3, 3.0])
def test_every_line_of_the_timeline_is_in_its_legend_and_every_mark_inside_its_axes(scale):
    """A dotted line once had no name, the axis began at 0, and small values lay on the frame of an axis up to 1.25."""
    surprise = made_up(5)
    surprise.frames = scale * torch.tensor([0.0, 0.3, 1.0, 0.5])
    surprise.copy_errors = [torch.full((4, 4), 1e-5 if scale < 0.1 else 0.2)] * 4
    figure = surprise_timeline(np.random.default_rng(0).random((5, 8, 8, 3)), range(5), surprise, "title")
    for ax in figure.axes[:2]:
        named = {text.get_text() for text in ax.get_legend().get_texts()}
        assert {line.get_label() for line in ax.lines} == named
        low, high = ax.get_ylim()
        values = np.concatenate([line.get_ydata() for line in ax.lines])
        assert low < -0.02 * high and values.min() >= 0 and values.max() < 0.95 * high
    assert figure.axes[0].get_ylim()[1] < 1.2 * max(scale, *copying_surprise(surprise), 1.0 if scale > 0.1 else 0)
    assert ("1 = error of copying + floor" in {line.get_label() for line in figure.axes[0].lines}) == (scale > 0.1)


def test_half_and_twice_as_wrong_as_copying_are_equally_strong():
    surprise = made_up(2, grid=(1, 5))
    surprise.copy_errors = [torch.tensor([[0.3, 0.5, 1.9, 0.0, 1e-5]])]
    surprise.errors = [
        torch.tensor([[0.1, 0.5, 3.9, 0.7, 1e-4]])
    ]  # where nothing moved: wrong, and wrong by noise alone
    strip = rows_of("surprise", surprise_maps, np.ones((2, 1, 5, 3)), [0.0, 1.0], surprise, "title")
    assert strip["rows"][1].name == "error / error\nof copying"
    scale = strip["bars"][0].scale
    drawn = strip["rows"][1].pictures[1][0]
    np.testing.assert_allclose(drawn, scale.to_rgba([0.5, 1, 2, 8, (1e-4 + 0.1) / (1e-5 + 0.1)])[:, :3], atol=1e-6)
    half, same, twice = scale.norm([0.5, 1.0, 2.0])
    assert same - half == pytest.approx(twice - same) and same == pytest.approx(0.5)
    assert strip["rows"][1].captions[1] == f"{(5.2001 + 0.5) / (2.70001 + 0.5):.2f}"


def test_copying_without_an_error_is_no_surprise():
    surprise = made_up(3)
    surprise.copy_errors[0] = torch.zeros(4, 4)
    surprise.copy_errors[1] = surprise.errors[1] = torch.zeros(4, 4)
    assert copying_surprise(surprise) == [0, 0]


# -- Features as colours


def test_one_basis_for_all_fitted_on_the_true_features(checkpoint, settings):
    clip = read_clip(*checkpoint, settings.videos[0], settings)
    (prediction,) = checkpoint[0].predict_next_frames(**clip.inputs)
    features = features_of(prediction)
    assert [len(features[kind]) for kind in ("true", "predicted", "copied")] == [
        NUM_FRAMES,
        NUM_FRAMES - 1,
        NUM_FRAMES - 1,
    ]
    basis = fit_basis(features)
    true = np.concatenate([frame.reshape(-1, frame.shape[-1]) for frame in features["true"]])
    np.testing.assert_allclose(basis.mean, true.mean(0), atol=1e-6)
    centered = true.astype(np.float64) - true.mean(0)
    strongest = np.linalg.svd(centered, full_matrices=False)
    for own, other in zip(basis.components, strongest.Vh[:3], strict=True):
        assert abs(own @ other) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(basis.explained, strongest.S[:3] ** 2 / (strongest.S**2).sum(), rtol=1e-6)
    features["predicted"] = [frame + 100 for frame in features["predicted"]]
    assert np.array_equal(fit_basis(features).components, basis.components)  # predictions do not move it


def test_coordinates_in_the_numbers_are_on_that_basis(drawn):
    numbers = drawn[1]["videos"][0]["prediction"]
    features = {kind: np.array(some) for kind, some in numbers["features"].items()}
    # What is copied is the true frame before: the same coordinates, hence one basis; and the predicted ones differ.
    np.testing.assert_array_equal(features["copied"], features["true"][:-1])
    assert not np.allclose(features["predicted"], features["copied"])
    np.testing.assert_allclose(features["true"].mean((0, 1, 2)), 0, atol=1e-4)
    components = np.array(numbers["basis"]["components"])
    np.testing.assert_allclose(components @ components.T, np.eye(3), atol=1e-4)


def test_equal_features_have_equal_colours_and_the_first_component_is_lightness():
    features = np.random.default_rng(0).normal(size=(200, 16)) * np.linspace(3, 0.5, 16)
    basis = FeatureBasis.fit([features])
    colours = basis.colours(features)
    assert np.array_equal(colours, basis.colours(features.copy())) and not np.allclose(
        colours, basis.colours(features + 1)
    )
    assert colours.min() >= 0 and colours.max() <= 1 and np.std(colours, axis=0).min() > 0.05
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert np.corrcoef(lightness, basis.coordinates(features)[:, 0])[0, 1] > 0.9
    flat = FeatureBasis.fit([np.ones((5, 2))])  # neither three directions nor any variance
    assert np.isfinite(flat.colours(np.ones((5, 2)))).all() and flat.components.shape == (3, 2)


# -- Attention


def attention_inputs(model, text=5):
    inputs = video_batch(model.config, [[3]], text=text)
    inputs.pop("labels")
    return inputs


@pytest.mark.parametrize("window", [None, 12])
def test_attention_is_that_of_the_answers_tokens(window):
    """Against one pass over all tokens with eager attention, which a long prompt has no memory for."""
    model = tiny_model()
    if window is not None:  # the second layer sees the last tokens only
        layers = ["full_attention", "sliding_attention"]
        sliding = {"use_sliding_window": True, "sliding_window": window, "layer_types": layers}
        model.config.text_config.update(sliding)
        model = LlavaNextARForConditionalGeneration(model.config).eval()
    # A placeholder that the model writes would have no medium in the pass over all tokens.
    model.generation_config.suppress_tokens = [model.config.image_token_id, model.config.video_token_id]
    processor, inputs = tiny_processor(model.config), attention_inputs(model)
    before = model.model.language_model.config._attn_implementation
    attention = answer_attention(model, processor, inputs, max_new_tokens=4)
    assert model.model.language_model.config._attn_implementation == before == "sdpa"
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, :-1]
    assert attention.num_tokens == tokens.shape[1] + 1 - inputs["input_ids"].shape[1] == 4
    model.set_attn_implementation("eager")
    whole = {**inputs, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        expected = model(**whole, output_attentions=True).attentions
    for own, layer in zip(attention.weights, expected, strict=True):
        torch.testing.assert_close(own, layer[0, :, -4:].mean((0, 1)), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(attention.weights.sum(1), torch.ones(2))
    assert (attention.weights[1] == 0).any() == (window is not None)


def test_attention_is_split_without_loss():
    model = tiny_model(**LAYOUTS["slow_fast"])
    inputs = attention_inputs(model)
    tokens = model.config.frame_token_layout.video(3)
    first = int((inputs["input_ids"][0] == VIDEO_TOKEN).nonzero()[0])
    weights = torch.rand(2, inputs["input_ids"].shape[1]).softmax(1)
    numbers = attention_numbers(weights, tokens, first)
    for own, layer in zip(numbers["layers"], weights.double(), strict=True):
        assert own["before"] + sum(own["frames"]) + own["separators"] + own["after"] == pytest.approx(1, abs=1e-6)
        assert own["before"] == pytest.approx(float(layer[:first].sum()))
        for frame, share in enumerate(own["frames"]):
            is_patch = (tokens.kind == 0) & (tokens.frame == frame)
            assert share == pytest.approx(float(layer[first : first + len(tokens)][is_patch].sum()))
    place = first + tokens.token_of(2, 1, 0)
    assert numbers["patches"][2][1][0] == pytest.approx(float(weights[:, place].mean()) * weights.shape[1], rel=1e-5)


def test_a_language_model_without_weights_to_give_is_told_apart(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model.model.language_model), "_can_set_attn_implementation", lambda self: False)
    with pytest.raises(NotThereError, match="Qwen2Model returns no attention weights"):
        answer_attention(model, tiny_processor(model.config), attention_inputs(model))
    inputs = attention_inputs(model)
    end = int((inputs["input_ids"][0] == VIDEO_TOKEN).nonzero()[-1]) + 1
    inputs.update(input_ids=inputs["input_ids"][:, :end], attention_mask=inputs["attention_mask"][:, :end])
    with pytest.raises(NotThereError, match="ends with a visual token"):
        answer_attention(model, tiny_processor(model.config), inputs)


# -- Layout and masks


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_numbers_cover_every_token_once(name):
    config = tiny_model(**LAYOUTS[name]).config
    tokens = config.frame_token_layout.video(5)
    layout = layout_numbers(tokens, first_position=7)
    covered = [p for own in layout["frames"] for p in range(own["first"], own["last"] + 1)]
    covered += [] if layout["closing_newline"] is None else [layout["closing_newline"]]
    assert covered == list(range(7, 7 + len(tokens))) and layout["last"] == covered[-1]
    assert (layout["closing_newline"] is not None) == (name == "one_token")
    for own in layout["frames"]:
        assert own["last"] - own["first"] + 1 == own["patches"] + own["newlines"] + own["faster"]
        assert own["newlines"] == {"grid": own["grid"][0], "slow_fast": own["grid"][0], "frame": 1}.get(name, 0)
        assert own["faster"] == (name == "slow_fast")
    kinds = [own["type"] for own in layout["frames"]]
    assert kinds == (["slow", "fast"] * 3)[:5] if name == "slow_fast" else ["slow"] * 5


def test_a_drawn_frame_shows_each_of_its_tokens():
    tokens = tiny_model(**LAYOUTS["slow_fast"]).config.frame_token_layout.video(2)
    layout = layout_numbers(tokens, 0)
    frames = np.full((2, 20, 20, 3), 0.5)
    strip = rows_of("layout", layout_figure, frames, [0.0, 1.0], layout, "title")
    orange, purple = np.array([0xE6, 0x9F, 0x00]) / 255, np.array([0xCC, 0x79, 0xA7]) / 255
    for picture, own in zip(strip["rows"][0].pictures, layout["frames"], strict=True):
        right = np.isclose(picture[:, -5], orange).all(-1).astype(int)
        assert (np.diff(right, prepend=0) == 1).sum() == own["newlines"] == own["grid"][0]
        below = np.isclose(picture[-5], purple).all(-1).astype(int)
        assert (np.diff(below, prepend=0) == 1).sum() == own["faster"] == 1
        is_frame = np.isclose(picture[10, :336], 0.5).all(-1).astype(int)
        assert (np.diff(is_frame, prepend=0) == 1).sum() == own["grid"][1]
    assert strip["rows"][0].captions == [f"{own['first']} to {own['last']}" for own in layout["frames"]]
    assert strip["headings"] == ["0.00 s, slow", "1.00 s, fast"]


@pytest.mark.parametrize(
    ("head", "types"),
    [
        ({"num_hist": 2}, None),
        ({"num_hist": 2}, [0, 1, 1, 0, 1]),
        ({"num_hist": 2, "use_fast_slow_frames": True}, [0, 1, 1, 0, 1]),
        ({"use_frame_causal_mask": False}, None),
    ],
)
def test_the_drawn_mask_is_the_heads(head, types):
    model = tiny_model(head=head)
    plan = model.autoregressive_module._plan(model.config.frame_token_layout.batch([5], [types]), [types])
    visible, key_mask, _ = plan.attention.on(torch.device("cpu"))
    valid = key_mask.view(5, visible.shape[1], -1).all(-1)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    for frame in range(5):
        expected[frame, visible[frame][valid[frame]]] = True
    assert torch.equal(head_visibility(model.config.autoregressive_config, 5, types), expected)


# -- Drawing


def made_up(num_frames: int, grid=(4, 4)) -> VideoSurprise:
    errors = [torch.rand(grid) for _ in range(num_frames - 1)]
    copies = [torch.rand(grid) for _ in range(num_frames - 1)]
    return VideoSurprise(
        frame_index=torch.arange(1, num_frames),
        seconds=torch.arange(1, num_frames) * 7.5,
        frames=torch.tensor([float(e.mean() / (c.mean() + 0.1)) for e, c in zip(errors, copies, strict=True)]),
        patches=[e / (c + 0.1) for e, c in zip(errors, copies, strict=True)],
        errors=errors,
        copy_errors=copies,
        floors=torch.full((num_frames - 1,), 0.1),
    )


def all_figures(num_frames: int, name: str = "a_rather_long_name_of_a_video_" * 5):
    """Every kind of drawing, with numbers as long as they come."""
    name = shorten(name)
    model = tiny_model(**LAYOUTS["slow_fast"])
    frames, seconds = (
        np.random.default_rng(0).random((num_frames, 24, 24, 3)),
        [1000 + 7.5 * t for t in range(num_frames)],
    )
    surprise = made_up(num_frames)
    features = {
        "true": [np.random.default_rng(t).normal(size=(3, 3, 8)) for t in range(num_frames)],
        "predicted": [np.random.default_rng(t).normal(size=(3, 3, 8)) for t in range(1, num_frames)],
        "copied": [np.random.default_rng(t).normal(size=(3, 3, 8)) for t in range(1, num_frames)],
    }
    tokens = model.config.frame_token_layout.video(num_frames)
    layout = layout_numbers(tokens, 12000)
    attention = attention_numbers(torch.rand(28, 12300 + len(tokens)).softmax(1), tokens, 12000)
    yield film_figure(
        frames, seconds, features, fit_basis(features), f"{name}: features as colours (100% of their variance)"
    )
    yield layout_figure(frames, seconds, layout, f"{name}: frames cut into tokens")
    yield sequence_figure(layout, tokens, 12300 + len(tokens), f"{name}: the prompt, 12345 tokens")
    yield attention_maps(frames, seconds, attention, f"{name}: attention of the answer '{shorten(name * 2, 40)}'")
    yield attention_layers(attention, f"{name}: attention of the answer '{shorten(name * 2, 40)}'")
    yield error_figure(frames, seconds, surprise, f"{name}: errors")
    yield surprise_maps(frames, seconds, surprise, f"{name}: surprise of each patch")
    yield surprise_timeline(frames, seconds, surprise, f"{name}: surprise over time")


def drawn_texts(figure) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Texts that really are drawn, with their boxes in pixels: ticks outside of an axis are not."""
    texts, draw = [], Text.draw

    def note(self, renderer):
        if self.get_visible() and self.get_text().strip():
            box = self.get_window_extent(renderer)
            texts.append((self.get_text(), (box.x0, box.y0, box.x1, box.y1)))
        draw(self, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", note)
        FigureCanvasAgg(figure).draw()
    return texts


@pytest.mark.parametrize("num_frames", [2, 4, 32])
def test_no_text_covers_another_or_leaves_its_figure(num_frames):
    for figure in all_figures(num_frames):
        texts = drawn_texts(figure)
        width, height = figure.get_size_inches() * figure.dpi
        assert len(texts) > 3
        for number, (text, (left, bottom, right, top)) in enumerate(texts):
            assert left >= 0 and bottom >= 0 and right <= width and top <= height, f"{text!r} leaves {texts[0][0]!r}"
            for other, box in texts[:number]:
                apart = right <= box[0] + 1 or box[2] <= left + 1 or top <= box[1] + 1 or box[3] <= bottom + 1
                assert apart, f"{text!r} covers {other!r} ({num_frames} frames)"


def test_a_dollar_in_a_title_begins_no_formula():
    def width(title: str) -> float:
        box = next(box for text, box in drawn_texts(sequence_figure(layout, tokens, 90, title)) if text == title)
        return box[2] - box[0]

    tokens = tiny_model().config.frame_token_layout.video(2)
    layout = layout_numbers(tokens, 0)
    assert width("$5 or $10") > width("5 or 10")
    width("a$b_$c.mp4")  # not a formula that matplotlib can read
    for figure in all_figures(2, "a$b_$c"):
        assert any("a$b_$c" in text for text, _ in drawn_texts(figure))
    answers_figure({"what costs $b_$": {"exact": 0.5}}).savefig(io.BytesIO())


@pytest.fixture
def few_fonts(monkeypatch):
    """As if matplotlib found those alone that come with it."""
    own = [font for font in fontManager.ttflist if font.name.startswith(("DejaVu", "Last Resort"))]
    monkeypatch.setattr(fontManager, "ttflist", own)


@pytest.fixture
def chinese_font(few_fonts, tmp_path):
    """A font with two characters, one a square and one without ink, where matplotlib finds it."""
    pen = TTGlyphPen(None)
    for move, place in ((pen.moveTo, (0, 0)), *((pen.lineTo, place) for place in ((0, 800), (800, 800), (800, 0)))):
        move(place)
    pen.closePath()
    empty = TTGlyphPen(None).glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "ink", "none"])
    font.setupCharacterMap({ord("红"): "ink", ord("色"): "none"})
    font.setupGlyf({".notdef": empty, "ink": pen.glyph(), "none": empty})
    font.setupHorizontalMetrics(dict.fromkeys((".notdef", "ink", "none"), (1000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupOS2()
    font.setupNameTable({"familyName": "Two Characters", "styleName": "Regular"})
    font.setupPost()
    font.save(tmp_path / "two.ttf")
    fontManager.addfont(tmp_path / "two.ttf")


def test_a_title_has_the_font_that_has_its_characters(chinese_font):
    def drawn(title: str) -> bytes:
        figure = Figure(figsize=(4, 1))
        write_title(figure, title)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return bytes(canvas.buffer_rgba())

    assert legible("clip 红色") == "clip 红色" and legible("clip 红蓝") == "(see the page)"
    assert drawn("clip 红") != drawn("clip 色")  # boxes would be equal


def test_words_that_no_font_has_are_on_the_page(few_fonts, tmp_path, monkeypatch):
    model, titles, answer = moving(tiny_model()), [], "红色的圆 costs $5_ and $6"

    def note(draw, *arguments):
        titles.append(arguments[-1])
        return draw(*arguments)

    for name in ("attention_maps", "film_figure"):
        monkeypatch.setattr(visualize, name, partial(note, getattr(visualize, name)))
    monkeypatch.setattr(
        visualize, "answer_attention", lambda *arguments: replace(answer_attention(*arguments), answer=answer)
    )
    for name in ("圆", "a$b_$c"):
        clip = write_clip(tmp_path / f"{name}.mp4", 8)
        settings = VisualizeSettings(model="none", videos=(str(clip),), num_frames=2, max_new_tokens=1)
        visualize.visualize(settings, tmp_path / "out", model, tiny_processor(model.config), progress=False)
        page = Page(tmp_path / "out" / "index.html")
        assert answer in page.words and str(clip) in page.words
    assert "圆" not in "".join(titles) and "".join(titles).count("(see the page)") == 4
    assert titles[2].startswith("a$b_$c.mp4: features") and titles[1].startswith("(see the page): attention of")


def test_names_are_shortened_to_the_room_that_they_take():
    assert shorten("a" * 24) == "a" * 24 and shorten("ab" * 20) == "ab" * 5 + "..." + "ab" * 5
    assert shorten("红" * 12) == "红" * 12 and shorten("红" * 13) == "红" * 5 + "..." + "红" * 5
    assert shorten("clip_" + "红" * 13) == "clip_红红...红红红红红"


def test_titles_end_between_words():
    answer = "The red circle moves to the left and then it stops"
    assert shorten_text(answer, 40) == "The red circle moves to the left and ..."
    assert shorten_text(answer, 39) == "The red circle moves to the left ..."
    assert shorten_text(f" {answer}\n", 60) == answer
    assert shorten_text("a" * 50 + " b", 24) == "a" * 10 + "..." + "a" * 10
    assert shorten_text("红" * 30, 24) == "红" * 5 + "..." + "红" * 5


@pytest.mark.parametrize("frame", [np.zeros((6, 9, 3)), np.ones((6, 9, 3)), np.linspace(0, 1, 162).reshape(6, 9, 3)])
def test_numbers_lie_on_the_place_that_they_are_about_in_a_colour_of_the_bar(frame):
    """A colour that is blended with the frame cannot be found on the bar."""
    scale, values = colour_scale("OrRd", Normalize(0, 1)), np.array([[0.0, 1.0, 0.5], [0.25, 0.75, 1.0]])
    picture = patch_colours(frame, values, scale)
    expected = scale.to_rgba(values)[..., :3].repeat(3, axis=0).repeat(3, axis=1)
    np.testing.assert_array_equal(picture, expected)


def test_the_most_attended_patch_is_the_brightest(checkpoint, settings):
    numbers = {"patches": [[[0.0, 1.0], [2.0, 3.0]]], "layers": [{"frames": [0.5]}]}
    strip = rows_of("attention", attention_maps, np.ones((1, 4, 4, 3)), [0.0], numbers, "title")
    drawn = strip["rows"][1].pictures[0][::2, ::2].sum(-1)  # of white frames, on which pale colours shine
    assert drawn[0, 0] < drawn[0, 1] < drawn[1, 0] < drawn[1, 1]


def test_a_strip_needs_a_picture_for_each_frame():
    row = StripRow(name="frame", pictures=[np.ones((2, 2, 3))])
    with pytest.raises(ValueError, match="'frame' does not have one picture .* of 2 frames"):
        frame_strip([row], ["0 s", "1 s"], title="")
    with pytest.raises(ValueError, match="no row has a picture"):
        frame_strip([StripRow(name="frame", pictures=[None])], ["0 s"], title="")


def test_thumbnails_are_the_most_surprising_of_their_stretch():
    surprise = made_up(33)
    surprise.frames = torch.zeros(32)
    surprise.frames[[3, 17]] = 2.0
    shown = shown_frames(surprise, most=4)
    assert shown == [3, 8, 17, 24]
    assert shown_frames(made_up(3), most=4) == [0, 1]


# -- The page


def test_the_page_holds_all_pictures_and_needs_nothing_else(settings, drawn):
    output, results = drawn
    page = Page(output / "index.html")
    images = page.all("img")
    assert len(images) == 2 * len(PICTURES)
    embedded = {base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in images}
    files = {path.read_bytes() for path in output.glob("*/*.png")}
    assert embedded == files and len(files) > len(PICTURES)  # each file is there, and of each video its own
    assert len({image["alt"] for image in images}) == len(images)
    for record in results["videos"]:
        assert set(record["pictures"]) == set(PICTURES)
        for path in record["pictures"].values():
            with Image.open(output / path) as picture:
                assert min(picture.size) > 100
    assert not page.all("script") and not page.all("iframe")
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert all(link.startswith("data:") or link[1:] in anchors for link in links)
    assert "url(" not in (output / "index.html").read_text() and "@import" not in (output / "index.html").read_text()
    for heading, _, _ in visualize.SECTIONS:
        assert page.words.count(heading) == 2
    for video in settings.videos:
        assert video in page.words
    skill = results["videos"][0]["prediction"]["metrics"]["skill"]
    assert f"{skill:+.3f} (0 is as good as copying" in page.text
    assert results["command"] in page.text and "Left out" not in page.text


def test_text_on_the_page_is_text(tmp_path):
    report = Report("<b>")
    report.heading("a < b", anchor='"x"')
    report.facts([("<i>", "&amp;")])
    report.text("use `x < y`, and a lone ` stays")
    report.write(tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "<p>use <code>x &lt; y</code>, and a lone ` stays</p>" in (tmp_path / "page.html").read_text()
    assert page.words.count("<b>") == 2 and "a < b" in page.words and "<i>" in page.words and "&amp;" in page.words
    assert not page.all("b") and not page.all("i") and page.all("h2") == [{"id": '"x"'}]


# -- What is left out, and what goes wrong


def test_without_a_head_the_rest_is_drawn(tmp_path):
    model = tiny_model(enable_autoregressive=False)
    video = write_clip(tmp_path / "clip.mp4", 8)
    settings = VisualizeSettings(model="none", videos=(str(video),), num_frames=4, max_new_tokens=1)
    output = tmp_path / "out"
    (output / "clip").mkdir(parents=True)
    (output / "clip" / "film.png").write_bytes(b"of an earlier run, with a head")
    (output / "clip" / "other.png").write_bytes(b"somebody's")
    results = visualize.visualize(settings, output, model, tiny_processor(model.config), progress=False)
    (record,) = results["videos"]
    assert set(record["left_out"]) == NEED_HEAD and record["prediction"] is None
    assert all("no head" in reason for reason in record["left_out"].values())
    assert set(record["pictures"]) == set(PICTURES) - NEED_HEAD
    files = {path.stem for path in (output / "clip").iterdir()}
    assert files == set(PICTURES) - NEED_HEAD | {"other"}
    page = Page(output / "index.html")
    assert len(page.all("img")) == len(PICTURES) - len(NEED_HEAD)
    assert page.text.count("Left out: the checkpoint has no head that predicts (enable_autoregressive=False).") == 4


def test_one_frame_has_nothing_to_predict_and_an_untrained_head_is_told(checkpoint, settings, tmp_path):
    model, processor = checkpoint
    one = VisualizeSettings(model="none", videos=settings.videos[:1], num_frames=1, max_new_tokens=1)
    (record,) = visualize.visualize(one, tmp_path / "one", model, processor, progress=False)["videos"]
    assert set(record["left_out"]) == NEED_HEAD and "one frame" in record["left_out"]["film"]
    untrained = tiny_model()
    shown = VisualizeSettings(model="none", videos=settings.videos[:1], num_frames=3, max_new_tokens=1)
    results = visualize.visualize(shown, tmp_path / "raw", untrained, tiny_processor(untrained.config), progress=False)
    assert results["videos"][0]["prediction"]["is_copy"]
    assert "this head has not been trained" in Page(tmp_path / "raw" / "index.html").text


def test_a_head_that_sees_later_frames_is_told(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 8)
    settings = VisualizeSettings(model="none", videos=(str(clip),), num_frames=3, max_new_tokens=1)
    for causal in (True, False):
        model = moving(tiny_model(head={"use_frame_causal_mask": causal}))
        visualize.visualize(settings, tmp_path / "out", model, tiny_processor(model.config), progress=False)
        text = Page(tmp_path / "out" / "index.html").text
        assert ("predicted from the columns to its left alone" in text) == causal
        assert ("the head has read the frames that it predicts (use_frame_causal_mask=False)" in text) != causal


def test_videos_that_cannot_be_read_are_left_out(folder, tmp_path, capsys):
    good = sorted((folder / "clips" / "videos").glob("*.mp4"))[0]
    bad = tmp_path / "bad.mp4"
    output = tmp_path / "out"
    base = ["--model", str(folder / "base"), "--output", str(output), "--device", "cpu"]
    base += ["--num-frames", "2", "--max-new-tokens", "1", "--video"]
    bad.write_bytes(good.read_bytes())
    visualize.main([*base, str(bad), str(good)])
    assert (output / "bad" / "film.png").exists()
    bad.write_bytes(b"no video")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        visualize.main([*base, str(bad), str(good)])
    said = capsys.readouterr()
    assert stopped.value.code == 1 and f"{bad}: cannot read video" in said.err
    assert "page: " in said.out and "no film" not in said.out
    unread, read = json.loads((output / "numbers.json").read_text())["videos"]
    assert set(unread["left_out"]) == set(PICTURES) and unread["seconds"] is None and unread["pictures"] == {}
    assert read["left_out"] == {} and set(read["pictures"]) == set(PICTURES)
    assert not list((output / "bad").iterdir())  # the pictures of what it once was
    page = Page(output / "index.html")
    assert len(page.all("img")) == len(PICTURES) and page.words.count(str(bad)) == 2
    assert page.text.count("Left out: cannot read video") == 1
    # Where none can be read, what is there stays.
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    worse = tmp_path / "worse.mp4"
    worse.write_bytes(b"no video")
    with pytest.raises(SystemExit) as stopped:
        visualize.main([*base, str(bad), str(worse)])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and "bad.mp4: cannot" in said.err and "worse.mp4: cannot" in said.err
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_video_in_which_nothing_changes_can_be_drawn(tmp_path):
    model = tiny_model()
    clip = tmp_path / "clip.mp4"
    write_clip(clip, 8)
    settings = VisualizeSettings(model="none", videos=(str(clip),), num_frames=3, max_new_tokens=1)
    processor = tiny_processor(model.config)
    with pytest.MonkeyPatch.context() as patch:
        read = visualize.read_clip

        def frozen(*arguments):
            own = read(*arguments)
            own.inputs["pixel_values_videos"][:] = own.inputs["pixel_values_videos"][:, :1].clone()
            return own

        patch.setattr(visualize, "read_clip", frozen)
        results = visualize.visualize(settings, tmp_path / "out", model, processor, progress=False)
    assert results["videos"][0]["prediction"]["metrics"]["skill"] is None
    assert "not defined: nothing in the video changes" in Page(tmp_path / "out" / "index.html").text


def test_the_command_line_names_what_is_wrong(folder, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    base = ["--model", str(folder / "base"), "--output", str(tmp_path / "out")]
    clip = sorted((folder / "clips" / "videos").glob("*.mp4"))[0]
    for options, message in (
        (["--video", str(clip), "missing.mp4", "lost.mp4"], "no such video: missing.mp4, lost.mp4"),
        (["--video", str(broken)], "broken.mp4"),
        (["--video", str(clip), "--num-frames", "0"], "num_frames is 0"),
        (["--video", str(clip), "--dtype", "float31"], "dtype is 'float31'"),
        (["--video", str(clip), "--device", "gpu"], "device is 'gpu', expected one that is there"),
        (["--video", str(clip), "--device", "cuda:99"], "device is 'cuda:99', expected one that is there"),
        (["--video", str(clip), "--revision", "v1"], "revision is 'v1'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            visualize.main([*base, *options])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_the_command_repeats_itself(folder, tmp_path, capsys):
    """From a folder, as a user would call it; the command in the output gives the same numbers."""
    clip = sorted((folder / "clips" / "videos").glob("*.mp4"))[0]
    question = 'Which color is the "shape"?'
    arguments = ["--model", str(folder / "base"), "--video", str(clip), "--output", str(tmp_path / "a b")]
    visualize.main([*arguments, "--question", question, "--num-frames", "3", "--device", "cpu"])
    said = capsys.readouterr().out
    assert str(tmp_path / "a b" / "index.html") in said and "replaces" not in said
    first = json.loads((tmp_path / "a b" / "numbers.json").read_text())
    assert first["settings"]["question"] == question and len(first["videos"][0]["seconds"]) == 3
    assert re.fullmatch("[0-9a-f]{64}", first["model"]["weights_sha256"])
    program, script, *words = visualize.shlex.split(first["command"])
    assert (program, script) == ("llava-next-ar", "visualize")
    visualize.main(words)
    assert "index.html (replaces that of an earlier run)" in capsys.readouterr().out
    assert json.loads((tmp_path / "a b" / "numbers.json").read_text()) == first


def test_videos_of_one_name_get_folders_of_their_own():
    assert visualize.folder_names(["a/x.mp4", "b/x.mp4", "x_2.mp4", "x.avi"]) == ["x", "x_2", "x_2_2", "x_3"]


# -- In a browser

chromium = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed, or named by CHROMIUM")


def problems_of(browser: Browser, page: Path, **options) -> list[str]:
    """Faults of a page as a browser shows it."""
    browser.requests.clear()
    browser.complaints.clear()
    browser.open(page, **options)
    problems = [f"console: {text}" for text in browser.complaints]
    own = page.resolve().as_uri()
    problems += [f"asks for {url[:80]}" for url in browser.requests if url != own and not url.startswith("data:")]
    broken = browser.evaluate("[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.alt)")
    problems += [f"picture not shown: {alt}" for alt in broken]
    wide = browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return problems + [f"{wide} pixels too wide"] * (wide > 0)


@chromium
def test_the_page_is_fine_in_a_browser(drawn, tmp_path):
    page = drawn[0] / "index.html"
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<body><img src='http://192.0.2.1/x.png' alt='far'><img src='data:image/png;base64,AAAA' alt='torn'>"
        "<div style='width:3000px'>wide</div><script>console.error('oh'); nothing.here</script>"
    )
    grays = {}
    with Browser(find_chromium()) as browser:
        for width, dark in ((1200, False), (1200, True), (390, False)):
            assert problems_of(browser, page, width=width, dark=dark) == []
            assert browser.evaluate("document.images.length") == 2 * len(PICTURES)
            shot = browser.screenshot(tmp_path / "shot.png")
            with Image.open(shot) as picture:
                assert picture.width == width and picture.height > 3000
                grays[width, dark] = picture.convert("L").getpixel((2, 2))
        assert grays[1200, False] > 240 > 60 > grays[1200, True]
        # The check can fail: it finds everything that is wrong with a page made for that.
        problems = " | ".join(problems_of(browser, bad))
    for problem in ("console: console.error: ['oh']", "console: exception", "asks for http://192.0.2.1/x.png",
                    "picture not shown: far", "picture not shown: torn", "pixels too wide"):  # fmt: skip
        assert problem in problems
