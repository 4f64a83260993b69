"""The token layout of a video: properties of any layout, and the numbers of the original and of transformers."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from golden_data import MEDIA_PLACEHOLDER, parametrize_golden
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlavaOnevisionModel

from llava_next_ar.configuration.frame_token_layout import (
    FrameTokenLayout,
    FrameType,
    TokenKind,
    pool_patches,
    pooled_grid,
    split_video_positions,
)
from llava_next_ar.conversion.original_checkpoint import layout_from_original_config

SLOW, FAST = FrameType.SLOW, FrameType.FAST
MODES = ("average", "max", "bilinear")
POSITIONS = ("one_token", "grid", "frame", "no_token")


@st.composite
def layouts(draw, **fixed) -> FrameTokenLayout:
    keys = {
        "patches_height": draw(st.integers(1, 7)),
        "patches_width": draw(st.integers(1, 7)),
        "pool_stride": draw(st.integers(1, 4)),
        "pool_mode": draw(st.sampled_from(MODES)),
        "newline_position": draw(st.sampled_from(POSITIONS)),
        "add_faster_video": draw(st.booleans()),
        "faster_token_stride": draw(st.integers(1, 5)),
    } | fixed
    coarsest = keys["pool_stride"] * (2 if keys["add_faster_video"] and keys["newline_position"] == "grid" else 1)
    assume(0 not in pooled_grid((keys["patches_height"], keys["patches_width"]), coarsest, keys["pool_mode"]))
    return FrameTokenLayout(**keys)


@st.composite
def videos(draw, **fixed) -> tuple[FrameTokenLayout, int, list[int] | None]:
    """A layout, a number of frames, and sometimes explicit frame types."""
    num_frames = draw(st.integers(1, 9))
    types = draw(st.none() | st.lists(st.sampled_from([0, 1]), min_size=num_frames, max_size=num_frames))
    return draw(layouts(**fixed)), num_frames, types


SLOW_FAST = FrameTokenLayout(
    patches_height=5, patches_width=4, newline_position="grid", add_faster_video=True, faster_token_stride=3
)


def random_features(layout: FrameTokenLayout, num_frames: int, dim: int = 3) -> torch.Tensor:
    return torch.randn(num_frames, layout.patches_height * layout.patches_width, dim)


# --- the token map ------------------------------------------------------------------------------------------


@given(videos())
@example((SLOW_FAST, 7, None))
@example((SLOW_FAST, 4, [1, 1, 0, 1]))
def test_placeholders_map_and_features_are_equally_many(video):
    layout, num_frames, types = video
    dim = 3
    assembled = layout.assemble(random_features(layout, num_frames), torch.randn(dim), torch.randn(dim), types)
    assert layout.num_tokens(num_frames, types) == len(layout.video(num_frames, types)) == assembled.shape[0]
    assert assembled.shape[1] == dim


@given(videos())
@example((SLOW_FAST, 7, None))
def test_token_counts_follow_closed_formulas(video):
    layout, num_frames, types = video
    tokens = layout.video(num_frames, types)
    grids = [layout.frame_grid(frame_type) for frame_type in tokens.frame_types]
    newlines = {
        "one_token": 1,
        "grid": sum(height for height, _ in grids),
        "frame": num_frames,
        "no_token": 0,
    }[layout.newline_position]
    slow_fast = layout.add_faster_video and layout.newline_position == "grid"
    counts = [int((tokens.kind == kind).sum()) for kind in TokenKind]
    assert counts == [sum(h * w for h, w in grids), newlines, num_frames if slow_fast else 0]
    assert len(tokens) == sum(counts)


@given(videos())
@example((SLOW_FAST, 7, None))
def test_tokens_per_frame_add_up(video):
    layout, num_frames, types = video
    expected = sum(layout.tokens_per_frame(frame_type) for frame_type in layout.frame_types(num_frames, types))
    assert layout.num_tokens(num_frames, types) == expected + (layout.newline_position == "one_token")


@given(videos())
def test_patches_stand_by_frame_then_row_then_column(video):
    layout, num_frames, types = video
    tokens = layout.video(num_frames, types)
    patches = tokens.patch_offsets
    places = torch.stack([tokens.frame, tokens.row, tokens.column], dim=1)[patches]
    assert places.tolist() == [
        [frame, row, column]
        for frame, (height, width) in enumerate(tokens.frame_grids)
        for row in range(height)
        for column in range(width)
    ]
    assert torch.equal(patches, patches.sort().values)


@given(videos())
def test_token_of_inverts_the_map(video):
    layout, num_frames, types = video
    tokens = layout.video(num_frames, types)
    for offset in tokens.patch_offsets.tolist():
        place = int(tokens.frame[offset]), int(tokens.row[offset]), int(tokens.column[offset])
        assert tokens.token_of(*place) == offset


def test_token_of_refuses_what_is_not_there():
    tokens = FrameTokenLayout(patches_height=4, patches_width=6).video(3)  # 2 x 3 grids
    for place, message in (
        ((3, 0, 0), "frame 3 is not one of the 3 frames"),
        ((-1, 0, 0), "frame -1 is not one of the 3 frames"),
        ((0, 2, 0), r"patch \(2, 0\) is outside the 2x3 grid of frame 0"),
        ((2, 0, -1), r"patch \(0, -1\) is outside the 2x3 grid of frame 2"),
    ):
        with pytest.raises(IndexError, match=message):
            tokens.token_of(*place)


def test_every_token_of_a_small_slow_fast_video():
    layout = FrameTokenLayout(
        patches_height=2,
        patches_width=4,
        pool_stride=1,
        pool_mode="average",
        newline_position="grid",
        add_faster_video=True,
        faster_token_stride=2,
    )
    tokens = layout.video(2)  # a slow frame of 2 x 4, a fast one of 1 x 2
    expected = [(TokenKind.PATCH, 0, 0, column) for column in range(4)] + [(TokenKind.NEWLINE, 0, 0, -1)]
    expected += [(TokenKind.PATCH, 0, 1, column) for column in range(4)] + [(TokenKind.NEWLINE, 0, 1, -1)]
    expected += [(TokenKind.FASTER, 0, -1, -1)]
    expected += [(TokenKind.PATCH, 1, 0, column) for column in range(2)] + [(TokenKind.NEWLINE, 1, 0, -1)]
    expected += [(TokenKind.FASTER, 1, -1, -1)]
    assert torch.stack([tokens.kind, tokens.frame, tokens.row, tokens.column], dim=1).tolist() == [
        list(map(int, token)) for token in expected
    ]
    assert tokens.frame_grids == ((2, 4), (1, 2))


@pytest.mark.parametrize("position, frame_of_last", [("one_token", -1), ("frame", 2)])
def test_closing_newline(position, frame_of_last):
    layout = FrameTokenLayout(patches_height=4, patches_width=4, newline_position=position)
    tokens = layout.video(3)
    assert [tokens.kind[-1], tokens.frame[-1], tokens.row[-1], tokens.column[-1]] == [
        TokenKind.NEWLINE,
        frame_of_last,
        -1,
        -1,
    ]


@given(st.integers(1, 30), st.integers(1, 12))
def test_stride_and_explicit_frame_types_agree(num_frames, faster_token_stride):
    layout = FrameTokenLayout(
        patches_height=4,
        patches_width=4,
        newline_position="grid",
        add_faster_video=True,
        faster_token_stride=faster_token_stride,
    )
    types = layout.frame_types(num_frames)
    assert [frame for frame, kind in enumerate(types) if kind is SLOW] == list(
        range(0, num_frames, faster_token_stride)
    )
    for explicit in (list(map(int, types)), torch.tensor(types)):
        assert layout.frame_types(num_frames, explicit) == types
        assert layout.num_tokens(num_frames, explicit) == layout.num_tokens(num_frames)


def test_explicit_frame_types_win_over_the_stride():
    types = SLOW_FAST.frame_types(4, [1, 0, 0, 1])
    assert types == (FAST, SLOW, SLOW, FAST) != SLOW_FAST.frame_types(4)
    # 5 x 4 patches, bilinear: 3 x 2 slow, 2 x 1 fast; a newline a row and a faster token a frame
    assert SLOW_FAST.num_tokens(4, [1, 0, 0, 1]) == 2 * (3 * 2 + 3 + 1) + 2 * (2 * 1 + 2 + 1)


@given(layouts(newline_position="frame"), st.integers(1, 6))
def test_frame_types_change_nothing_without_slow_and_fast(layout, num_frames):
    assert layout.frame_types(num_frames, [1] * num_frames) == (SLOW,) * num_frames


@given(layouts(), st.integers(1, 6))
def test_add_faster_video_changes_nothing_outside_of_grid(layout, num_frames):
    assume(layout.newline_position != "grid")
    values = layout.to_dict()
    without, with_faster = (FrameTokenLayout(**{**values, "add_faster_video": on}) for on in (False, True))
    features = random_features(layout, num_frames)
    newline = torch.randn(3)
    assert torch.equal(without.assemble(features, newline), with_faster.assemble(features, newline, torch.randn(3)))


def test_what_is_cached_is_usable_after_inference_mode_and_meta_device():
    # The map is cached. Once it was made in inference mode, and the next training step failed; once while a model was
    # built on the meta device, and its values were gone for the rest of the process.
    layout = FrameTokenLayout(patches_height=3, patches_width=11, pool_stride=1)
    coarse = FrameTokenLayout(patches_height=3, patches_width=11)
    with torch.inference_mode():
        layout.video(2)
        coarse.unpool(torch.zeros(12, 5))
    with torch.device("meta"):
        layout.video(3)
        SLOW_FAST.unpool(torch.zeros(6, 3))
    frames = torch.nn.Parameter(torch.zeros(2, 5))
    torch.nn.functional.embedding(layout.video(2).frame[:-1], frames).sum().backward()
    assert torch.equal(frames.grad, torch.full((2, 5), 33.0))
    assert layout.video(3).frame.tolist() == [0] * 33 + [1] * 33 + [2] * 33 + [-1]
    coarse.unpool(torch.nn.Parameter(torch.zeros(12, 5))).sum().backward()
    assert SLOW_FAST.unpool(torch.ones(6, 3)).device.type == "cpu"


# --- features -----------------------------------------------------------------------------------------------


@given(layouts(pool_stride=1, add_faster_video=False), st.integers(1, 4))
def test_assemble_puts_each_feature_where_the_map_says(layout, num_frames):
    # A patch's feature is its own (frame, row, column), so that a feature in the wrong place is visible.
    axes = [torch.arange(n) for n in (num_frames, layout.patches_height, layout.patches_width)]
    features = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(1, 2).float()
    newline = torch.full((3,), -7.0)
    assembled = layout.assemble(features, newline)
    tokens = layout.video(num_frames)
    for offset in range(len(tokens)):
        if tokens.kind[offset] == TokenKind.PATCH:
            expected = torch.stack([tokens.frame[offset], tokens.row[offset], tokens.column[offset]]).float()
        else:
            expected = newline
        assert torch.equal(assembled[offset], expected)


@given(videos())
@example((SLOW_FAST, 7, None))
def test_assemble_puts_pooled_features_and_learned_tokens(video):
    layout, num_frames, types = video
    features, newline, faster = random_features(layout, num_frames), torch.randn(3), torch.randn(3)
    assembled = layout.assemble(features, newline, faster, types)
    tokens = layout.video(num_frames, types)
    for frame, frame_type in enumerate(tokens.frame_types):
        of_frame = assembled[(tokens.kind == TokenKind.PATCH) & (tokens.frame == frame)]
        assert torch.equal(of_frame, layout.pool(features[frame : frame + 1], frame_type)[0])
    assert (assembled[tokens.kind == TokenKind.NEWLINE] == newline).all()
    assert (assembled[tokens.kind == TokenKind.FASTER] == faster).all()


@given(videos(), videos())
@example((SLOW_FAST, 7, None), (SLOW_FAST, 2, [1, 0]))
def test_a_batch_is_its_videos_one_behind_the_other(video, other):
    layout, *first = video
    _, num_frames, types = other
    lengths, of_types = (first[0], num_frames), (first[1], types)
    batch = layout.batch(lengths, of_types)
    assert layout.batch(lengths, of_types) is batch, "made once"
    features = random_features(layout, sum(lengths))
    newline, faster = torch.randn(2, features.shape[-1])
    alone = [
        layout.assemble(own, newline, faster, own_types)
        for own, own_types in zip(features.split(lengths), of_types, strict=True)
    ]
    assert torch.equal(batch.assemble(features, newline, faster), torch.cat(alone))
    assert batch.num_tokens == tuple(map(len, alone)) and batch.num_frames == lengths
    maps = [layout.video(count, own) for count, own in zip(lengths, of_types, strict=True)]
    _, patches, first_token = batch.tokens.on(torch.device("cpu"))
    assert first_token.tolist() == [0, len(alone[0])]
    assert torch.equal(patches, torch.cat([maps[0].patch_offsets, maps[1].patch_offsets + len(alone[0])]))
    frame, place = batch.places.on(torch.device("cpu"))
    expected = torch.cat([maps[0].frame[maps[0].patch_offsets], maps[1].frame[maps[1].patch_offsets] + lengths[0]])
    assert torch.equal(frame, expected)
    grids = torch.tensor(batch.frame_grids)[frame]
    places = torch.cat([torch.stack([own.row, own.column], dim=1)[own.patch_offsets] for own in maps])
    assert torch.equal(place, (places + 0.5) / grids)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "meta"])
def test_index_tensors_outlive_the_context_that_they_are_made_in(context):
    layout = dataclasses.replace(SLOW_FAST, faster_token_stride=5 if context is torch.inference_mode else 6)
    with context():
        layout.batch([4, 3]).tokens.on(torch.device("cpu"))
    features = random_features(layout, 7).requires_grad_()
    layout.batch([4, 3]).assemble(features, torch.ones(3), torch.ones(3)).sum().backward()
    assert features.grad.abs().sum() > 0


def test_index_tensors_of_a_tracer_are_not_kept():
    layout = dataclasses.replace(SLOW_FAST, faster_token_stride=7)
    batch = layout.batch([2])
    with FakeTensorMode():
        batch.tokens.on(torch.device("cpu"))
    assert all(type(tensor) is torch.Tensor for tensor in batch.tokens.on(torch.device("cpu")))


def test_pooling_by_hand():
    features = torch.arange(15.0).reshape(1, 15, 1)  # 3 rows of 5
    assert pool_patches(features, (3, 5), 2, "average").flatten().tolist() == [3.0, 5.0]
    assert pool_patches(features, (3, 5), 2, "max").flatten().tolist() == [6.0, 8.0]
    # 3 x 5 to 2 x 3: centres at rows 0.25, 1.75 and columns 1/3, 2, 11/3
    rows, columns = torch.tensor([0.25, 1.75]), torch.tensor([1 / 3, 2.0, 11 / 3])
    expected = (5 * rows[:, None] + columns).flatten()
    torch.testing.assert_close(pool_patches(features, (3, 5), 2, "bilinear").flatten(), expected)
    assert pool_patches(features, (3, 5), 1, "bilinear") is features


@given(layouts(), st.data())
@example(
    FrameTokenLayout(patches_height=27, patches_width=27), None
)  # of the released models: 27 is not a multiple of 2
@example(FrameTokenLayout(patches_height=27, patches_width=27, pool_mode="average", pool_stride=4), None)
def test_unpooled_values_are_what_pooling_gives_back(layout, data):
    frame_type = data.draw(st.sampled_from(FrameType)) if data and layout.is_slow_fast else FrameType.SLOW
    features = random_features(layout, 1)
    before = layout.pool(features, frame_type)
    added = torch.randn(before.shape[1:])
    spread = layout.unpool(added, frame_type)
    assert spread.shape == features.shape[1:]
    torch.testing.assert_close(layout.pool(features + spread, frame_type), before + added, rtol=1e-4, atol=1e-4)
    constant = layout.unpool(
        torch.ones_like(added), frame_type
    )  # no patch is left out, or is given more than its share
    torch.testing.assert_close(constant, torch.ones_like(constant), rtol=1e-4, atol=1e-4)


def test_unpooling_a_grid_that_the_stride_divides_repeats_each_value():
    for mode in ("average", "max", "bilinear"):
        layout = FrameTokenLayout(patches_height=4, patches_width=8, pool_mode=mode, pool_stride=4)
        spread = layout.unpool(torch.tensor([[1.0], [2.0]])).unflatten(0, (4, 8))[..., 0]
        torch.testing.assert_close(spread, torch.tensor([[1.0] * 4 + [2.0] * 4] * 4))


def test_gradient_flows_to_features_newline_and_faster_token():
    layout = FrameTokenLayout(
        patches_height=4,
        patches_width=4,
        pool_stride=1,
        pool_mode="average",
        newline_position="grid",
        add_faster_video=True,
    )
    features = random_features(layout, 3).requires_grad_()
    newline, faster = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    layout.assemble(features, newline, faster, frame_types=[0, 1, 0]).sum().backward()
    share = torch.tensor([1.0, 0.25, 1.0])  # a fast frame's patch is a quarter of a token
    assert torch.equal(features.grad, share[:, None, None].expand(3, 16, 3))
    assert newline.grad.tolist() == [4.0 + 2.0 + 4.0] * 3
    assert faster.grad.tolist() == [3.0] * 3


def test_assemble_keeps_the_features_dtype():
    layout = FrameTokenLayout(patches_height=4, patches_width=4)
    assembled = layout.assemble(random_features(layout, 2).bfloat16(), torch.ones(3))
    assert assembled.dtype == torch.bfloat16
    assert assembled[-1].tolist() == [1.0] * 3


@pytest.mark.parametrize("image_size, patch_size", [(56, 14), (70, 14), (384, 14), (30, 10)])
def test_default_layout_equals_transformers_onevision(image_size, patch_size):
    vision_config = SimpleNamespace(image_size=image_size, patch_size=patch_size)
    layout = FrameTokenLayout.for_vision_config(vision_config)
    side = image_size // patch_size
    features, newline = torch.randn(3, side * side, 6), torch.randn(6)
    onevision = SimpleNamespace(config=SimpleNamespace(vision_config=vision_config))
    pooled = LlavaOnevisionModel.apply_pooling(onevision, features)
    assert torch.equal(layout.assemble(features, newline), torch.cat([pooled.flatten(0, 1), newline[None]]))


# --- validation and travel ----------------------------------------------------------------------------------


@given(layouts())
@example(SLOW_FAST)
def test_round_trips(layout):
    assert FrameTokenLayout.from_dict(layout.to_dict()) == layout
    assert FrameTokenLayout.from_tensor(layout.as_tensor()) == layout
    assert layout.as_tensor().dtype == torch.int64
    assert set(map(type, layout.to_dict().values())) <= {int, bool, str}  # fit for a JSON file


@given(layouts(), layouts())
def test_tensors_are_equal_only_for_equal_layouts(layout, other):
    assert torch.equal(layout.as_tensor(), other.as_tensor()) == (layout == other)


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("patches_height", 0, "at least 1"),
        ("patches_width", -3, "at least 1"),
        ("patches_width", 2.0, "integer"),
        ("pool_stride", 0, "at least 1"),
        ("pool_stride", True, "integer"),
        ("faster_token_stride", 0, "at least 1"),
        ("faster_token_stride", "2", "integer"),
        ("add_faster_video", 1, "True or False"),
        ("pool_mode", "nearest", "average, max, bilinear"),
        ("newline_position", "row", "one_token, grid, frame, no_token"),
    ],
)
def test_wrong_values_are_refused_naming_key_value_and_what_is_allowed(key, value, allowed):
    values = {"patches_height": 4, "patches_width": 4, key: value}
    with pytest.raises(ValueError) as error:
        FrameTokenLayout(**values)
    assert key in str(error.value) and repr(value) in str(error.value) and allowed in str(error.value)


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"pool_stride": 5, "pool_mode": "average"},
            r"pool_stride=5 \(average\) leaves no patch of a slow frame with 9x4",
        ),
        ({"pool_stride": 3, "pool_mode": "max"}, None),
        ({"pool_stride": 5, "pool_mode": "bilinear"}, None),
        (
            {"pool_stride": 3, "pool_mode": "max", "newline_position": "grid", "add_faster_video": True},
            r"pool_stride=3 \(max\) leaves no patch of a fast frame with 9x4",
        ),
        ({"pool_stride": 3, "pool_mode": "max", "newline_position": "frame", "add_faster_video": True}, None),
    ],
)
def test_pooling_that_leaves_nothing_is_refused_at_once(keys, message):
    if message is None:
        assert FrameTokenLayout(patches_height=9, patches_width=4, **keys).num_tokens(1) > 0
        return
    with pytest.raises(ValueError, match=message):
        FrameTokenLayout(patches_height=9, patches_width=4, **keys)


def test_from_dict_refuses_an_unknown_key():
    with pytest.raises(ValueError, match=r"\['pool_strid'\].*'pool_stride'"):
        FrameTokenLayout.from_dict({"patches_height": 4, "patches_width": 4, "pool_strid": 2})


def test_check_same_names_every_key_that_differs_and_both_values():
    SLOW_FAST.check_same(FrameTokenLayout(**SLOW_FAST.to_dict()))
    other = FrameTokenLayout(**{**SLOW_FAST.to_dict(), "pool_mode": "max", "faster_token_stride": 4})
    with pytest.raises(ValueError) as error:
        SLOW_FAST.check_same(other)
    message = str(error.value)
    assert "pool_mode: 'bilinear' in the model, 'max' in the processor" in message
    assert "faster_token_stride: 3 in the model, 4 in the processor" in message
    assert "newline_position" not in message and "pool_stride" not in message


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SLOW_FAST.video(0), "at least one frame, got 0"),
        (lambda: SLOW_FAST.video(3, [0, 1]), "2 frame types were given for 3 frames"),
        (lambda: SLOW_FAST.video(3, [0, 1, 2]), r"must be 0 \(slow\) or 1 \(fast\), got \[0, 1, 2\]"),
        (lambda: FrameTokenLayout(patches_height=2, patches_width=2).video(3, [0]), "1 frame types .* 3 frames"),
        (lambda: SLOW_FAST.batch([2]).assemble(torch.zeros(3, 20, 2)), "2 frame types were given for 3 frames"),
        (lambda: SLOW_FAST.assemble(torch.zeros(3, 20, 2)), "'grid'.*`image_newline`.*missing"),
        (lambda: SLOW_FAST.assemble(torch.zeros(3, 20, 2), torch.zeros(2)), "True needs `faster_token`.*missing"),
        (lambda: SLOW_FAST.assemble(torch.zeros(3, 16, 2)), "16 patches a frame, but the grid 5x4 has 20"),
        (lambda: pool_patches(torch.zeros(1, 4, 2), (2, 2), 0, "max"), "at least 1, got 0"),
        (lambda: pool_patches(torch.zeros(1, 4, 2), (2, 2), 2, "mean"), "'mean' is not one of average, max, bilinear"),
        (
            lambda: pool_patches(torch.zeros(1, 4, 2), (2, 2), 3, "max"),
            r"2x2 grid by stride 3 \(max\) leaves no patch",
        ),
    ],
)
def test_wrong_inputs_are_refused_with_their_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- videos in a batch --------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_split_video_positions_finds_each_video(videos_of_samples, random):
    # Rows of text and videos, padded to one length; the text token 0 stands between and around the videos.
    rows, expected = [], []
    for videos_of_sample in videos_of_samples:
        row = []
        for num_tokens in videos_of_sample:
            row += [False] * random.randint(0, 3)
            expected.append((len(rows), range(len(row), len(row) + num_tokens)))
            row += [True] * num_tokens
        rows.append(row)
    length = max(map(len, rows)) + 1
    mask = torch.tensor([row + [False] * (length - len(row)) for row in rows])
    counts = [count for videos_of_sample in videos_of_samples for count in videos_of_sample]
    found = split_video_positions(mask, counts)
    assert [positions.tolist() for positions in found] == [
        [sample * length + offset for offset in offsets] for sample, offsets in expected
    ]


@pytest.mark.parametrize("num_tokens", [[3, 3], [3, 1], [3], []])
def test_split_video_positions_refuses_another_number_of_placeholders(num_tokens):
    mask = torch.tensor([[True, True, True, False], [False, True, True, False]])
    with pytest.raises(
        ValueError, match=f"hold 5 video placeholders.*{len(num_tokens)} videos.*{sum(num_tokens)} tokens"
    ):
        split_video_positions(mask, num_tokens)


# --- reference data -----------------------------------------------------------------------------------------


def assert_pooled_equal(actual: torch.Tensor, expected: torch.Tensor, mode: str, stride: int) -> None:
    """Tolerances of the reference data's README; bilinear is exact on the machine that wrote the data."""
    assert actual.dtype == expected.dtype
    if expected.dtype == torch.bfloat16:
        tolerance = 2e-2
    elif mode == "max" or stride == 1:
        tolerance = 0.0
    else:
        tolerance = 1e-6
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@parametrize_golden("pooling")
def test_golden_pooling(case):
    side, stride, mode = case["patches_per_side"], case["stride"], case["mode"]
    features = case.tensor(case["input"]).to(getattr(torch, case["dtype"]))
    if "error" in case:
        with pytest.raises(ValueError):
            pool_patches(features, (side, side), stride, mode)
        with pytest.raises(ValueError):
            FrameTokenLayout(patches_height=side, patches_width=side, pool_stride=stride, pool_mode=mode)
        return
    layout = FrameTokenLayout(patches_height=side, patches_width=side, pool_stride=stride, pool_mode=mode)
    assert layout.frame_grid() == (case["output_side"], case["output_side"])
    pooled = layout.pool(features)
    assert_pooled_equal(pooled, case.tensor(case["output"]).to(pooled.dtype), mode, stride)
    if case.get("bit_identical_to_input"):
        assert torch.equal(pooled, features)


def original_layout(case) -> FrameTokenLayout:
    return layout_from_original_config(case["config"], case["patches_per_side"], case["path"])


def learned_tokens(case) -> dict[str, torch.Tensor | None]:
    present = case.get("image_newline_parameter_present", True)
    return {
        "image_newline": case.tensor("image_newline") if present else None,
        "faster_token": case.tensor("faster_token"),
    }


@parametrize_golden("layout_video")
def test_golden_layout(case):
    several = "inputs" in case
    features = [case.tensor(name) for name in (case["inputs"] if several else [case["input"]])]
    num_frames = case["frames"] if several else [case["frames"]]
    if "error" in case:
        with pytest.raises(ValueError):
            [original_layout(case).assemble(video, **learned_tokens(case)) for video in features]
        return
    layout = original_layout(case)
    videos = [layout.assemble(video, **learned_tokens(case)) for video in features]
    counts = [layout.num_tokens(frames) for frames in num_frames]
    if several:
        assert counts == case["tokens_per_video_intended"]
        assembled = put_into_text(videos, counts, case["input_ids"], case.tensor("embed_tokens"))
    else:
        tokens = layout.video(*num_frames)
        assert layout.pool_stride == case["pool_stride_used"]
        assert counts == [case["n_tokens"]]
        assert tokens.kind.tolist() == case.tensor(case["kind"]).tolist()
        assert int((tokens.kind == TokenKind.NEWLINE).sum()) == case["n_newline"]
        assert int((tokens.kind == TokenKind.FASTER).sum()) == case["n_faster"]
        (assembled,) = videos
    assert_pooled_equal(assembled, case.tensor(case["output"]), layout.pool_mode, layout.pool_stride)


def put_into_text(
    videos: list[torch.Tensor], counts: list[int], input_ids: list[int], embed_tokens: torch.Tensor
) -> torch.Tensor:
    """Each placeholder of `input_ids` becomes as many tokens as its video takes; the rest is text."""
    remaining = iter(counts)
    sequence = torch.tensor(
        [t for token in input_ids for t in [token] * (next(remaining) if token == MEDIA_PLACEHOLDER else 1)]
    )
    embeds = embed_tokens[sequence.clamp(min=0)]
    is_video = sequence == MEDIA_PLACEHOLDER
    for positions, video in zip(split_video_positions(is_video[None], counts), videos, strict=True):
        embeds[positions] = video
    return embeds
