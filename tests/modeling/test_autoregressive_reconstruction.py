"""The head alone: attention against a dense reference, losses and metrics against arithmetic, the teacher's rules."""

import copy
import math

import pytest
import torch
from tiny import GRID, IMAGE_SIZE, LAYOUTS, tiny_config, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_next_ar.configuration.configuration_llava_next_ar import LlavaNextARAutoregressiveConfig
from llava_next_ar.modeling.autoregressive_reconstruction import (
    AutoregressiveReconstructionModule,
    create_autoregressive_reconstruction_module,
    seconds_since,
)
from llava_next_ar.modeling.frame_masks import FrameLevelMaskGenerator as Masks
from llava_next_ar.modeling.reconstruction_metrics import Reconstruction, straight_line, summarize_frame_metrics

HIDDEN, VISION = 32, 16
# Targets pooled otherwise than the tokens.
TARGETS = {
    "as tokens": {},
    "stride 1": {"mm_spatial_pool_stride": 1},
    "max 3": {"mm_spatial_pool_stride": 3, "mm_spatial_pool_mode": "max", "add_faster_video": False},
    "slow and fast": {"mm_spatial_pool_mode": "bilinear", "add_faster_video": True, "faster_token_stride": 3},
    "pyramid": {"enable_multiscale_pooling": True},
    "pyramid of slow and fast": {
        "enable_multiscale_pooling": True,
        "mm_spatial_pool_stride": 1,
        "add_faster_video": True,
        "faster_token_stride": 2,
    },
}


def make_head(head=None, noise: float = 0.0, seed: int = 0, **keys) -> AutoregressiveReconstructionModule:
    """The head of a tiny config; `noise` moves every weight, as training would."""
    config = tiny_config(head, **keys)
    torch.manual_seed(seed)
    module = AutoregressiveReconstructionModule(
        config.autoregressive_config, HIDDEN, config.vision_feature_dim, config.frame_token_layout
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += noise * torch.randn_like(parameter)
    return module.eval()


def make_clips(module, lengths, types=None, seed: int = 1):
    """Random inputs of `module.forward` for clips of the given lengths."""
    torch.manual_seed(seed)
    layout = module.token_layout
    clips = [layout.video(length, None if types is None else types[:length]) for length in lengths]
    num_patches = sum(len(clip.patch_offsets) for clip in clips)
    timestamps = [torch.rand(length).cumsum(0) for length in lengths]
    return torch.randn(num_patches, HIDDEN), clips, torch.randn(sum(lengths), GRID * GRID, VISION), timestamps


# ---- attention ------------------------------------------------------------------------------------------------------


def predictor_states(module, hidden_states, clips, timestamps, frame_types) -> list[torch.Tensor]:
    """Predictor states of each frame, without padding: `[h * w, E]`."""
    batch = module.token_layout.batch([len(clip.frame_types) for clip in clips], [clip.frame_types for clip in clips])
    states = module._predictor_states(hidden_states, batch, module._plan(batch, frame_types), torch.cat(timestamps))
    return [frame[: math.prod(grid)] for frame, grid in zip(states, batch.frame_grids, strict=True)]


def dense_predictor(module, hidden_states, clips, timestamps, visibilities) -> torch.Tensor:
    """The predictor with one dense mask over all tokens of all clips: `[num_patches, E]`."""
    masks = []
    for clip, visibility in zip(clips, visibilities, strict=True):
        masks.append(Masks.expand(visibility, [height * width for height, width in clip.frame_grids]))
    mask = torch.block_diag(*masks).bool()
    places = []
    for clip, times in zip(clips, timestamps, strict=True):
        seconds = seconds_since(times[0], times)
        # The frame after the last has no time; its gap is taken to be the last one, and one second where there is none.
        gaps = torch.cat([seconds.diff(), seconds.diff()[-1:]]) if len(seconds) > 1 else torch.ones(1)
        batch = module.token_layout.batch([len(times)], [clip.frame_types])
        places.append(module._position_features(batch, seconds, gaps))
    x = module._embed(hidden_states, torch.cat(places))
    for block in module.blocks:
        heads = block.attention.num_heads
        normed = block.attention_norm(x)
        query, key, value = block.attention.qkv(normed).unflatten(1, (3, heads, -1)).unbind(1)  # [L, heads, d]
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        x = x + block.attention.out(torch.einsum("hqk,khd->qhd", weights, value).flatten(1))
        x = x + block.mlp(block.mlp_norm(x))
    return module.output_norm(x)


@pytest.mark.parametrize("num_hist", [1, 3, 20])
@pytest.mark.parametrize("layout", ["one_token", "slow_fast"])
@pytest.mark.parametrize("use_fast_slow_frames", [False, True])
def test_attention_over_listed_frames_equals_dense_masked_attention(layout, num_hist, use_fast_slow_frames):
    module = make_head(
        {"num_hist": num_hist, "use_fast_slow_frames": use_fast_slow_frames}, noise=0.3, **LAYOUTS[layout]
    )
    types = [0, 1, 1, 1, 0, 1, 1]
    hidden_states, clips, features, timestamps = make_clips(module, [7, 2, 1, 5], types)
    if layout == "slow_fast":
        assert len({len(clip.frame_grids) for clip in clips}) > 1 and len(set(clips[0].frame_grids)) == 2
    lengths = [7, 2, 1, 5]
    visibilities = [
        Masks.frame_visibility(length, num_hist, types[:length] if use_fast_slow_frames else None)
        for length in lengths
    ]
    chosen = [types[:length] for length in lengths]
    with torch.no_grad():
        actual = torch.cat(predictor_states(module, hidden_states, clips, timestamps, chosen))
        expected = dense_predictor(module, hidden_states, clips, timestamps, visibilities)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_without_the_causal_mask_attention_is_dense_within_each_clip():
    module = make_head({"use_frame_causal_mask": False}, noise=0.3)
    hidden_states, clips, _, timestamps = make_clips(module, [4, 3])
    visibilities = [torch.ones(4, 4, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)]
    with torch.no_grad():
        actual = torch.cat(predictor_states(module, hidden_states, clips, timestamps, [None, None]))
        expected = dense_predictor(module, hidden_states, clips, timestamps, visibilities)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def attended(monkeypatch, module, *inputs) -> tuple[int, int]:
    """Query-key pairs of one block, and the largest mask that was made."""
    pairs, masks = [], [0]
    attention = nn.functional.scaled_dot_product_attention

    def count(query, key, value, attn_mask=None):
        pairs.append(query.shape[0] * query.shape[2] * key.shape[2])
        masks.append(0 if attn_mask is None else attn_mask.numel())
        return attention(query, key, value, attn_mask=attn_mask)

    with monkeypatch.context() as context:
        context.setattr(nn.functional, "scaled_dot_product_attention", count)
        module(*inputs)
    return pairs[0], max(masks)


@pytest.mark.parametrize("layout", ["one_token", "slow_fast"])
def test_cost_is_linear_in_the_number_of_frames(monkeypatch, layout):
    module = make_head({"num_hist": 3}, **LAYOUTS[layout])
    short = attended(monkeypatch, module, *make_clips(module, [8]))
    long = attended(monkeypatch, module, *make_clips(module, [64]))
    patches = 9  # of a slow frame
    assert long[0] == 8 * short[0] == 64 * patches * 3 * patches
    assert long[1] <= 64 * 3 * patches, "a dense mask was made"


class _CountNumbers(TorchDispatchMode):
    """Adds up the sizes of all tensors that operations write."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += sum(value.numel() for value in tree_leaves(result) if isinstance(value, torch.Tensor))
        return result


@pytest.mark.parametrize("layout", ["one_token", "slow_fast"])
def test_memory_traffic_of_a_training_step_is_linear_in_the_number_of_frames(layout):
    """Padding row by row into one tensor made the backward pass copy the gradient of the whole clip for each frame."""
    module = make_head({"num_hist": 3}, noise=0.1, **LAYOUTS[layout]).train()
    traffic = []
    for length in (16, 64, 112):
        hidden_states, clips, features, timestamps = make_clips(module, [length])
        hidden_states.requires_grad_()
        module(hidden_states, clips, features, timestamps)  # makes the tables of which frame sees which, of T x T
        with _CountNumbers() as counted:
            module(hidden_states, clips, features, timestamps).loss_per_video.sum().backward()
        traffic.append(counted.total)
    # It was 80% more with the copies.
    assert traffic[2] - traffic[1] == pytest.approx(traffic[1] - traffic[0], rel=0.05)


def test_use_fast_slow_frames_keeps_the_window_where_nothing_tells_frames_apart(monkeypatch):
    """With tokens all alike, every frame once counted as slow, that is visible to all: `num_hist` was ignored."""
    module = make_head({"num_hist": 2, "use_fast_slow_frames": True}, noise=0.3)
    plain = make_head({"num_hist": 2}, noise=0.3)
    inputs = make_clips(module, [8])
    torch.testing.assert_close(module(*inputs).predictions, plain(*inputs).predictions, rtol=0, atol=0)
    assert attended(monkeypatch, module, *inputs) == attended(monkeypatch, plain, *inputs)
    types = [0, 1, 1, 1, 0, 1, 1, 1]
    chosen = module(*inputs, frame_types=[types])
    far = [
        not torch.allclose(a, b, atol=1e-4)
        for a, b in zip(chosen.predictions, module(*inputs).predictions, strict=True)
    ]
    # Entry i is predicted by frame i: up to frame 1 the window holds all; from 2 on the slow first frame is added.
    assert far == [False, False, True, True, True, True, True]


def test_clips_of_a_batch_do_not_see_each_other():
    module = make_head(noise=0.3, **LAYOUTS["slow_fast"])
    hidden_states, clips, features, timestamps = make_clips(module, [5, 3])
    together = module(hidden_states, clips, features, timestamps)
    split = len(clips[0].patch_offsets)
    first = module(hidden_states[:split], clips[:1], features[:5], timestamps[:1])
    second = module(hidden_states[split:], clips[1:], features[5:], timestamps[1:])
    expected = torch.cat([first.loss_per_video, second.loss_per_video])
    torch.testing.assert_close(together.loss_per_video, expected, rtol=1e-5, atol=1e-6)
    noisy = torch.cat([hidden_states[:split], torch.randn_like(hidden_states[split:]) * 50])
    assert torch.equal(module(noisy, clips, features, timestamps).predictions[:4], together.predictions[:4])


# ---- baseline and targets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_starts_exactly_at_the_copy_baseline(layout, target):
    module = make_head(TARGETS[target], **LAYOUTS[layout])
    reconstruction = module(*make_clips(module, [5, 1, 2]))
    metrics = reconstruction.frame_metrics()
    assert torch.equal(reconstruction.predictions, reconstruction.copies)
    assert torch.equal(metrics["mse"], metrics["copy_mse"]) and (metrics["mse"] > 0.1).all()
    assert summarize_frame_metrics(metrics)["skill"] == 0
    assert not metrics["temporal_consistency"].any(), "the frame itself is nearer than the next"
    if not module.config.enable_multiscale_pooling:
        expected = torch.stack([metrics["mse"][:4].mean(), metrics["mse"][4:].mean()])
        torch.testing.assert_close(reconstruction.loss_per_video, expected)


@pytest.mark.parametrize("target_norm", [True, False])
def test_targets_and_copies_are_the_pooled_normalised_features_of_their_frames(target_norm):
    module = make_head({"mm_spatial_pool_stride": 2, "mm_spatial_pool_mode": "average", "target_norm": target_norm})
    hidden_states, clips, features, timestamps = make_clips(module, [3, 2])
    reconstruction = module(hidden_states, clips, features, timestamps)
    grid = features.unflatten(1, (GRID, GRID))
    pooled = torch.stack(
        [grid[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((1, 2)) for r in range(2) for c in range(2)], dim=1
    )
    if target_norm:
        pooled = (pooled - pooled.mean(-1, keepdim=True)) / (pooled.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    # Frames 1 and 2 of the first clip, frame 1 of the second; never across clips.
    torch.testing.assert_close(reconstruction.targets, pooled[[1, 2, 4]])
    torch.testing.assert_close(reconstruction.copies, pooled[[0, 1, 3]])
    assert reconstruction.frame_video.tolist() == [0, 0, 1]
    assert reconstruction.frame_index.tolist() == [1, 2, 1]
    assert reconstruction.video_index.tolist() == [0, 1]


def test_prediction_is_the_frame_before_plus_a_learned_change():
    module = make_head(noise=0.2)
    inputs = make_clips(module, [3])
    reconstruction = module(*inputs)
    states = predictor_states(module, inputs[0], inputs[1], inputs[3], [None])
    for index in range(2):
        change = module.change(states[index])
        torch.testing.assert_close(reconstruction.predictions[index], reconstruction.copies[index] + change)
        assert change.abs().max() > 0.1


def test_slow_and_fast_targets_are_compared_on_the_grid_of_the_predicted_frame():
    module = make_head(noise=0.2, **LAYOUTS["slow_fast"])
    hidden_states, clips, features, timestamps = make_clips(module, [4], [0, 1, 1, 0])
    reconstruction = module(hidden_states, clips, features, timestamps)
    assert reconstruction.grids.tolist() == [[2, 2], [2, 2], [3, 3]]
    assert reconstruction.patch_mask.sum(1).tolist() == [4, 4, 9]
    layout = module.token_layout
    for entry, (frame, kind) in enumerate(((1, 1), (2, 1), (3, 0))):
        size = 4 if kind else 9
        on_grid = nn.functional.layer_norm(
            layout.pool(features, layout.frame_types(4, [0, 1, 1, 0])[frame]), (VISION,)
        )
        torch.testing.assert_close(reconstruction.targets[entry, :size], on_grid[frame])
        torch.testing.assert_close(reconstruction.copies[entry, :size], on_grid[frame - 1])
        error = (reconstruction.predictions[entry, :size] - on_grid[frame]).square().mean()
        torch.testing.assert_close(reconstruction.frame_metrics()["mse"][entry], error)


def test_targets_carry_no_gradient_and_hidden_states_do():
    module = make_head(noise=0.2)
    hidden_states, clips, features, timestamps = make_clips(module, [3])
    hidden_states.requires_grad_()
    reconstruction = module(hidden_states, clips, features, timestamps)
    assert not reconstruction.targets.requires_grad and not reconstruction.copies.requires_grad
    reconstruction.loss_per_video.sum().backward()
    reached = hidden_states.grad.abs().sum(1) > 0
    assert reached[:18].all() and not reached[18:].any()  # frames 0 and 1 predict; the last predicts nothing known


def test_clips_without_a_second_frame_predict_nothing():
    module = make_head()
    assert module(*make_clips(module, [1, 1])) is None
    reconstruction = module(*make_clips(module, [1, 3, 1]))
    assert reconstruction.video_index.tolist() == [1] and set(reconstruction.frame_video.tolist()) == {1}


# ---- losses ---------------------------------------------------------------------------------------------------------


def by_hand(loss_type: str, prediction: torch.Tensor, target: torch.Tensor) -> float:
    """The loss of one patch, in plain arithmetic."""
    pairs = list(zip(prediction.tolist(), target.tolist(), strict=True))
    if loss_type == "mse":
        return sum((p - t) ** 2 for p, t in pairs) / len(pairs)
    if loss_type == "smooth_l1":
        return sum(0.5 * (p - t) ** 2 if abs(p - t) < 1 else abs(p - t) - 0.5 for p, t in pairs) / len(pairs)
    dot = sum(p * t for p, t in pairs)
    return 1 - dot / math.sqrt(sum(p * p for p, _ in pairs) * sum(t * t for _, t in pairs))


@pytest.mark.parametrize("loss_type", ["mse", "smooth_l1", "cosine"])
@pytest.mark.parametrize("layout", ["grid", "slow_fast"])
def test_loss_is_the_mean_over_patches_then_frames(loss_type, layout):
    module = make_head({"loss_type": loss_type}, noise=0.3, **LAYOUTS[layout])
    reconstruction = module(*make_clips(module, [3, 4]))
    frames = []
    for prediction, target, mask in zip(
        reconstruction.predictions, reconstruction.targets, reconstruction.patch_mask, strict=True
    ):
        patches = [by_hand(loss_type, p, t) for p, t in zip(prediction[mask], target[mask], strict=True)]
        frames.append(sum(patches) / len(patches))
    expected = torch.tensor([sum(frames[:2]) / 2, sum(frames[2:]) / 3])
    torch.testing.assert_close(reconstruction.loss_per_video, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["mse", "cosine"])
def test_multiscale_loss_is_the_mean_over_a_pyramid_of_coarser_grids(loss_type):
    keys = {
        "enable_multiscale_pooling": True,
        "loss_type": loss_type,
        "mm_spatial_pool_stride": 1,
        "mm_spatial_pool_mode": "bilinear",
        "add_faster_video": True,
        "faster_token_stride": 2,
    }
    module = make_head(keys, noise=0.3)
    reconstruction = module(*make_clips(module, [4]))
    assert reconstruction.grids.tolist() == [[3, 3], [5, 5], [3, 3]]
    frames = []
    for prediction, target, mask, (side, _) in zip(
        reconstruction.predictions,
        reconstruction.targets,
        reconstruction.patch_mask,
        reconstruction.grids.tolist(),
        strict=True,
    ):
        pair = [values[: side * side].reshape(side, side, VISION) for values in (prediction, target)]
        levels = []
        while True:
            cells = [(r, c) for r in range(side) for c in range(side)]
            levels.append(sum(by_hand(loss_type, pair[0][r, c], pair[1][r, c]) for r, c in cells) / len(cells))
            if side < 2:
                break
            side //= 2  # the remainder is dropped
            pair = [
                torch.stack(
                    [
                        torch.stack([v[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((0, 1)) for c in range(side)])
                        for r in range(side)
                    ]
                )
                for v in pair
            ]
        assert len(levels) == {25: 3, 9: 2}[int(mask.sum())]  # 5, 2, 1 and 3, 1
        frames.append(sum(levels) / len(levels))
    torch.testing.assert_close(reconstruction.loss_per_video[0].item(), sum(frames) / 3, rtol=1e-4, atol=1e-5)


# ---- metrics --------------------------------------------------------------------------------------------------------


def reconstruction_of(frames: torch.Tensor, predictions: torch.Tensor) -> Reconstruction:
    """One clip `[T, P, Dv]` and predictions of all frames but the first."""
    count = len(frames) - 1
    return Reconstruction(
        predictions=predictions,
        targets=frames[1:],
        copies=frames[:-1],
        patch_mask=torch.ones(count, frames.shape[1], dtype=torch.bool, device=frames.device),
        frame_video=torch.zeros(count, dtype=torch.long),
        frame_index=torch.arange(1, count + 1),
        candidates=(frames,) * count,
        grids=torch.tensor([[1, frames.shape[1]]] * count),
    )


def test_metrics_of_a_perfect_prediction():
    frames = torch.randn(5, 4, 8)
    metrics = reconstruction_of(frames, frames[1:].clone()).frame_metrics()
    summary = summarize_frame_metrics(metrics)
    assert summary["mse"] == 0 and summary["skill"] == 1 and summary["temporal_consistency"] == 1
    assert summary["copy_mse"] > 0.5
    torch.testing.assert_close(metrics["cosine"], torch.ones(4))


def test_metrics_take_frame_numbers_that_are_on_another_device_than_the_features():
    """Rollouts once gave them on the CPU, whatever the device of the features: on a GPU, all metrics were missing."""
    frames = torch.randn(5, 4, 8, device="meta")
    reconstruction = reconstruction_of(frames, frames[1:])
    assert reconstruction.frame_index.device.type == "cpu"
    assert {values.device.type for values in reconstruction.frame_metrics().values()} == {"meta"}


@pytest.mark.parametrize("first", [0, 2**60])
def test_a_straight_line_by_hand(first):
    frames = torch.randn(3, 4, 8)
    times = [
        first,
        first + 1,
        first + 5,
    ]  # of nanoseconds since 1970, no floating point number holds these differences
    line = frames[2] + (frames[2] - frames[1]) * 0.75
    torch.testing.assert_close(straight_line(frames, times, first + 8), line)
    assert torch.equal(straight_line(frames[:1], times[:1], times[2]), frames[0])
    assert torch.equal(straight_line(frames, [times[0], times[2], times[2]], times[2] + 8), frames[2])
    torch.testing.assert_close(straight_line(frames, [0.0, 0.5, 1.5], 2.25), line)


def test_metrics_of_a_copy():
    frames = torch.randn(5, 4, 8)
    summary = summarize_frame_metrics(reconstruction_of(frames, frames[:-1].clone()).frame_metrics())
    assert summary["skill"] == 0 and summary["mse"] == summary["copy_mse"] and summary["temporal_consistency"] == 0


def test_metrics_of_a_static_clip():
    frames = torch.randn(1, 4, 8).expand(4, 4, 8)
    metrics = reconstruction_of(frames, frames[1:].clone()).frame_metrics()
    summary = summarize_frame_metrics(metrics)
    assert summary["copy_mse"] == 0 and math.isnan(summary["skill"])
    # All frames are equally near: which of them comes first in memory must not decide.
    assert metrics["temporal_consistency"].tolist() == [0, 0, 0]


def test_temporal_consistency_does_not_depend_on_the_order_of_equal_frames():
    """The first of two equal candidates once counted as found and the second not."""
    a, b = torch.randn(2, 4, 8).unbind()
    for frames in (torch.stack([a, b, b]), torch.stack([b, b, a])):
        metrics = reconstruction_of(frames, frames[1:].clone()).frame_metrics()
        expected = [float(not torch.equal(frame, b)) for frame in frames[1:]]
        assert metrics["temporal_consistency"].tolist() == expected


def test_metrics_by_hand():
    frames = torch.tensor([[[0.0, 2.0], [1.0, 0.0]], [[3.0, 4.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    predictions = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 2.0], [1.0, 1.0]]])
    metrics = reconstruction_of(frames, predictions).frame_metrics()
    # Frame 1: patch errors 0 and (1+1)/2; copied (9+4)/2 and 0. Frame 2: 4/2 and 1/2; copied (9+16)/2 and (1+1)/2.
    assert metrics["mse"].tolist() == [0.5, 1.25]
    assert metrics["copy_mse"].tolist() == [3.25, 6.75]
    # Frame 1: cosines 1 and 0. Frame 2: the target patch is zero, then (0,1).(1,1) / sqrt 2.
    torch.testing.assert_close(metrics["cosine"], torch.tensor([0.5, math.sqrt(0.5) / 2]))
    # Frame 1: distances 15, 2, 25, so found. Frame 2: distances 1, 14, 5, the first frame is nearer.
    assert metrics["temporal_consistency"].tolist() == [1.0, 0.0]
    summary = summarize_frame_metrics(metrics)
    assert summary["mse"] == 0.875 and summary["copy_mse"] == 5.0 and summary["skill"] == pytest.approx(1 - 0.875 / 5)


def test_patch_errors_average_to_the_frame_metrics_on_unequal_grids():
    module = make_head(noise=0.3, **LAYOUTS["slow_fast"])
    reconstruction = module(*make_clips(module, [5, 2]))
    errors, copy_errors = reconstruction.patch_errors()
    metrics = reconstruction.frame_metrics()
    sizes = reconstruction.patch_mask.sum(1)
    assert sizes.unique().numel() == 2
    torch.testing.assert_close(errors.sum(1) / sizes, metrics["mse"])
    torch.testing.assert_close(copy_errors.sum(1) / sizes, metrics["copy_mse"])
    assert not errors[~reconstruction.patch_mask].any() and not copy_errors[~reconstruction.patch_mask].any()
    assert (errors[reconstruction.patch_mask] > 0).all()
    # Padding adds nothing to the cosine either.
    entry = int(sizes.argmin())
    own = slice(0, int(sizes[entry]))
    cosine = nn.functional.cosine_similarity(
        reconstruction.predictions[entry, own], reconstruction.targets[entry, own], dim=-1
    )
    torch.testing.assert_close(metrics["cosine"][entry], cosine.mean())


# ---- time -----------------------------------------------------------------------------------------------------------


def test_predictions_depend_on_real_time_but_not_on_where_it_starts():
    module = make_head(noise=0.3)
    hidden_states, clips, features, _ = make_clips(module, [4])
    times = torch.tensor([0.0, 0.5, 1.0, 3.0])

    def predict(seconds):
        return module(hidden_states, clips, features, None if seconds is None else [seconds]).predictions

    assert torch.equal(predict(times), predict(times + 1000.25))
    assert torch.equal(predict(None), predict(torch.arange(4.0)))
    changed = predict(torch.tensor([0.0, 0.5, 1.0, 2.0]))
    # The gap to the target is known to the frame before it, and to no earlier one.
    assert torch.equal(changed[:2], predict(times)[:2]) and not torch.equal(changed[2], predict(times)[2])
    slower = predict(times * 2)
    assert all(not torch.equal(a, b) for a, b in zip(slower, predict(times), strict=True))


# ---- the prototype's names ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower():
    return tiny_model().model.vision_tower


def test_head_from_a_dict_a_head_config_and_a_model_config(tower):
    from_dict = create_autoregressive_reconstruction_module(tower, HIDDEN, {"num_hist": 5, "num_heads": 2})
    assert from_dict.config.num_hist == 5 and from_dict.config.num_layers == 3  # given and default
    assert from_dict.config.embedding_dim == VISION
    assert from_dict.token_layout.patches_height == GRID and from_dict.token_layout.newline_position == "one_token"
    own = LlavaNextARAutoregressiveConfig(num_heads=4, embedding_dim=24)
    from_head = create_autoregressive_reconstruction_module(tower, HIDDEN, own)
    assert from_head.change.weight.shape == (VISION, 24)
    config = tiny_config(vision_feature_layer=[-1, -2], **LAYOUTS["grid"])
    from_model = create_autoregressive_reconstruction_module(tower, HIDDEN, config)
    assert from_model.token_layout == config.frame_token_layout
    assert from_model.change.weight.shape[0] == 2 * VISION
    for module in (from_dict, from_head, from_model):
        assert module.input_projection.in_features == HIDDEN
        assert not module.change.weight.any() and not module.change.bias.any()
        assert module.teacher is None, "a frozen tower is its own teacher"
        assert not [name for name, _ in module.named_parameters() if "tower" in name]


def test_the_callers_config_stays_as_it_was(tower):
    config = LlavaNextARAutoregressiveConfig(num_heads=2)
    module = create_autoregressive_reconstruction_module(tower, HIDDEN, config)
    assert config.embedding_dim is None and module.config.embedding_dim == VISION


def test_impossible_heads_are_refused_when_built(tower):
    for config in ({"num_heads": 3}, LlavaNextARAutoregressiveConfig(num_heads=3)):
        with pytest.raises(ValueError, match="embedding_dim=16 is not divisible by num_heads=3"):
            create_autoregressive_reconstruction_module(tower, HIDDEN, config)
    with pytest.raises(ValueError, match="num_hst.*num_hist"):
        create_autoregressive_reconstruction_module(tower, HIDDEN, {"num_hst": 3})


def test_a_tower_that_trains_gets_its_frozen_copy_at_once(tower):
    trainable = copy.deepcopy(tower).requires_grad_(True)
    module = create_autoregressive_reconstruction_module(trainable, HIDDEN, {"num_heads": 2})
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())
    frames = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    before = module.train().teacher_features(trainable, frames)
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter += 1
    assert torch.equal(module.teacher_features(trainable, frames), before)


@pytest.fixture
def prototype(tower):
    config = tiny_config({"loss_weight": 0.25}, **LAYOUTS["grid"])
    torch.manual_seed(0)
    module = create_autoregressive_reconstruction_module(tower, HIDDEN, config)
    nn.init.normal_(module.change.weight, std=0.1)
    return module


def test_compute_autoregressive_loss_is_the_weighted_loss_of_the_head(prototype, tower):
    frames = torch.randn(2, 3, 3, IMAGE_SIZE, IMAGE_SIZE)
    clip = prototype.token_layout.video(3)
    hidden_states = torch.randn(2, len(clip), HIDDEN)
    loss = prototype.compute_autoregressive_loss(hidden_states, frames)
    features = tower(frames.flatten(0, 1), output_hidden_states=True).hidden_states[-1].detach()
    patches = hidden_states[:, clip.patch_offsets].flatten(0, 1)
    expected = prototype(patches, [clip, clip], features).loss_per_video.mean()
    torch.testing.assert_close(loss, 0.25 * expected)
    # Somewhere in a longer sequence, in another place for each sample.
    position_map = torch.stack([torch.arange(len(clip)) + 3, torch.arange(len(clip)) + 7])
    longer = torch.randn(2, len(clip) + 9, HIDDEN)
    for sample in range(2):
        longer[sample, position_map[sample]] = hidden_states[sample]
    moved = prototype.compute_autoregressive_loss(longer, frames, position_map=position_map)
    torch.testing.assert_close(moved, loss)
    timed = prototype.compute_autoregressive_loss(hidden_states, frames, timestamps=torch.tensor([[0, 3, 9.0]] * 2))
    assert not torch.equal(timed, loss)


def test_hidden_states_that_cannot_be_aligned_are_an_error(prototype):
    frames = torch.randn(2, 3, 3, IMAGE_SIZE, IMAGE_SIZE)
    num_tokens = prototype.token_layout.num_tokens(3)
    with pytest.raises(ValueError, match=f"{num_tokens + 1} positions, but 3 frames take {num_tokens} tokens"):
        prototype.compute_autoregressive_loss(torch.randn(2, num_tokens + 1, HIDDEN), frames)
    with pytest.raises(ValueError, match=f"position_map has 5 positions, 3 frames take {num_tokens} tokens"):
        prototype.compute_autoregressive_loss(
            torch.randn(2, 50, HIDDEN), frames, position_map=torch.zeros(2, 5, dtype=torch.long)
        )
    with pytest.raises(ValueError, match="3 samples, video_frames 2 videos"):
        prototype.compute_autoregressive_loss(torch.randn(3, num_tokens, HIDDEN), frames)


def test_one_frame_gives_a_zero_that_reaches_every_parameter(prototype):
    prototype.requires_grad_(True)
    loss = prototype.compute_autoregressive_loss(
        torch.randn(1, 6, HIDDEN), torch.randn(1, 1, 3, IMAGE_SIZE, IMAGE_SIZE)
    )
    assert loss.item() == 0
    loss.backward()
    for name, parameter in prototype.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_without_a_tower_frames_cannot_be_read():
    with pytest.raises(RuntimeError, match="without a vision tower"):
        make_head().compute_autoregressive_loss(
            torch.randn(1, 7, HIDDEN), torch.randn(1, 2, 3, IMAGE_SIZE, IMAGE_SIZE)
        )


def test_copying_the_head_does_not_copy_the_tower_and_copying_the_model_does(prototype, tower):
    """PEFT copies the modules that it trains in full; a copied head once held a hidden second tower."""
    assert copy.deepcopy(prototype)._vision_tower.module is tower
    model = tiny_model()
    duplicate = copy.deepcopy(model)
    assert duplicate.autoregressive_module._vision_tower.module is duplicate.model.vision_tower
    assert duplicate.model.vision_tower is not model.model.vision_tower
