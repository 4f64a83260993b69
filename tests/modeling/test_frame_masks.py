"""Masks between frames, held against the definition in loops, and their two forms against each other."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_next_ar.modeling.frame_masks import FrameLevelMaskGenerator as Masks


@st.composite
def clips(draw):
    """(token counts, window or None, types or None): frames of unequal size."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=7))
    window = draw(st.none() | st.integers(1, 8))
    types = draw(st.none() | st.lists(st.integers(0, 1), min_size=len(counts), max_size=len(counts)))
    return counts, window, types


def may_attend(query: int, key: int, window: int | None, types: list[int] | None) -> bool:
    """The definition, for one pair of frames."""
    if key > query:
        return False
    if window is None or query - key < window:
        return True
    return types is not None and types[key] == 0


def reference(counts: list[int], window: int | None = None, types: list[int] | None = None) -> torch.Tensor:
    owner = [frame for frame, count in enumerate(counts) for _ in range(count)]
    return torch.tensor([[may_attend(query, key, window, types) for key in owner] for query in owner])


@given(clips())
def test_dense_masks_follow_the_definition(clip):
    counts, window, types = clip
    assert torch.equal(Masks.create_causal_frame_mask(len(counts), counts), reference(counts))
    if window is not None:
        sliding = Masks.create_sliding_window_mask(len(counts), counts, window)
        assert torch.equal(sliding, reference(counts, window))
        if types is not None:
            assert torch.equal(Masks.create_fast_slow_mask(types, counts, window), reference(counts, window, types))


def test_one_count_for_all_frames_is_a_count_for_each():
    assert torch.equal(Masks.create_causal_frame_mask(3, 4), reference([4, 4, 4]))
    assert torch.equal(Masks.create_sliding_window_mask(4, 2, 2), reference([2] * 4, 2))


def test_a_sliding_window_by_hand():
    expected = [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1],
    ]
    assert Masks.create_sliding_window_mask(3, [2, 1, 2], 2).int().tolist() == expected


def test_slow_frames_are_the_long_memory():
    mask = Masks.create_fast_slow_mask([0, 1, 1, 0, 1], 1, window_size=2)
    assert mask[4].tolist() == [True, False, False, True, True]  # the slow first frame, not the fast ones after it
    assert not mask.triu(1).any()


def test_without_causality_every_frame_sees_every_frame():
    assert Masks.frame_visibility(3, window_size=1, causal=False).all()


@given(clips())
def test_lists_of_visible_frames_say_the_same_as_the_mask(clip):
    counts, window, types = clip
    visibility = Masks.frame_visibility(len(counts), window, types)
    visible, valid = Masks.visible_frames(visibility)
    assert visible.shape[1] == visibility.sum(1).max()
    for frame in range(len(counts)):
        assert visible[frame][valid[frame]].tolist() == visibility[frame].nonzero().squeeze(1).tolist()
        assert (visible[frame][~valid[frame]] == frame).all()


def test_a_window_costs_the_same_however_long_the_clip():
    for num_frames in (5, 50, 500):
        visible, _ = Masks.visible_frames(Masks.frame_visibility(num_frames, window_size=3))
        assert visible.shape == (num_frames, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Masks.create_causal_frame_mask(0, 4), "num_frames must be at least 1, got 0"),
        (lambda: Masks.create_sliding_window_mask(2, 4, 0), "window_size must be at least 1, got 0"),
        (lambda: Masks.create_causal_frame_mask(3, [4, 4]), r"each of 3 frames, got \[4, 4\]"),
        (lambda: Masks.create_causal_frame_mask(2, [4, 0]), r"positive count.*got \[4, 0\]"),
        (lambda: Masks.create_causal_frame_mask(2, -1), "positive count"),
        (lambda: Masks.create_fast_slow_mask([], 4, 2), "num_frames must be at least 1"),
        (lambda: Masks.frame_visibility(3, 2, [0, 1]), "2 frame types were given for 3 frames"),
        (lambda: Masks.visualize_mask(torch.ones(3, 4)), r"square mask, got shape \(3, 4\)"),
        (lambda: Masks.visualize_mask(torch.ones(4)), "square mask"),
        (lambda: Masks.visualize_mask(torch.ones(4, 4), num_patches_per_frame=3), "frames hold 3 tokens, the mask 4"),
        (lambda: Masks.visualize_mask(torch.ones(4, 4), num_patches_per_frame=[3, 2]), "hold 5 tokens, the mask 4"),
        (
            lambda: Masks.visualize_mask(torch.ones(4, 4), num_patches_per_frame=2, frame_types=[0]),
            "1 frame types for 2 frames",
        ),
    ],
)
def test_wrong_values_are_refused_with_their_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_picture_shows_the_mask_its_boundaries_and_the_frame_types(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from matplotlib.figure import Figure

    before = pyplot.get_fignums()
    counts, types = [3, 1, 2], [0, 1, 1]
    mask = Masks.create_fast_slow_mask(types, counts, 1)
    path = tmp_path / "mask.png"
    figure = Masks.visualize_mask(
        mask, "three frames", num_patches_per_frame=counts, frame_types=types, save_path=str(path)
    )
    assert isinstance(figure, Figure)
    axes = figure.axes[0]
    assert axes.get_title() == "three frames"
    assert torch.equal(torch.as_tensor(axes.images[0].get_array().astype(bool)), mask)
    horizontal = {line.get_ydata()[0] for line in axes.lines if line.get_ydata()[0] == line.get_ydata()[1]}
    vertical = {line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[1]}
    assert {2.5, 3.5} <= horizontal and {2.5, 3.5} <= vertical  # between tokens 2|3 and 3|4
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0 slow", "1 fast", "2 fast"]
    assert axes.get_xticks().tolist() == [1.0, 3.0, 4.5]  # the middle of each frame
    assert path.read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == before, "a picture must not open figures behind the caller's back"


def test_the_picture_works_without_frames_and_draws_no_boundary_then():
    pytest.importorskip("matplotlib")
    assert not Masks.visualize_mask(torch.ones(4, 4).bool()).axes[0].lines


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        Masks.visualize_mask(torch.ones(2, 2))
