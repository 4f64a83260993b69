"""Selection of frames and of visual tokens for a language model, and scores that need no model.

All rules are deterministic: of equal scores the earlier one wins.

Shape letters: T frames, K kept frames, P patch tokens of a video (in sequence order), L all its tokens, S tokens of a prompt,
D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...configuration.frame_token_layout import FrameTokenLayout, TokenKind, VideoTokens, split_video_positions
from ...processing.video_frames import video_times

SAME_TIME = 1e-3  # seconds: files and entries round times differently
# Inputs with an entry for each frame of a sample's video, `[1, T, ...]`.
_OF_FRAMES = ("pixel_values_videos", "video_frame_mask", "video_timestamps", "video_frame_types")

# -- Frames


def codec_scores(video: Any, seconds: Sequence[float]) -> list[float]:
    """The cost of each sampled frame in the file, 0 for the first, as policy `codec` compares them.

    The cost of frames that were not sampled counts for the next sampled one, since it shows their changes too.

    Args:
        video: path of the file.
        seconds: `[T]` of the sampled frames, from the first frame of the file.

    Raises:
        ValueError: if the file has no costs (`coding_costs`), or no frame at one of the times.
    """
    times, _, _, costs = video_times(video)
    if costs is None:
        raise ValueError(f"{video} has key frames alone, expected a video with predicted frames")
    found = np.abs(times[:, None] - np.asarray(seconds)).argmin(0)
    if np.abs(times[found] - seconds).max() > SAME_TIME or (np.diff(found) <= 0).any():
        raise ValueError(f"{video} has no frames of its own at {list(seconds)} seconds")
    sums = np.append(0, np.cumsum(costs))[found + 1]
    return [0.0, *np.diff(sums).tolist()]


def pixel_changes(pixel_values: torch.Tensor, grid: tuple[int, int] = (1, 1)) -> torch.Tensor:
    """Mean squared difference of each frame to the frame before on a grid: `[T, 3, H, W]` -> `[T - 1, h, w]`."""
    change = pixel_values.float().diff(dim=0).square().mean(1)
    return torch.nn.functional.adaptive_avg_pool2d(change[:, None], grid)[:, 0]


def uniform_frames(num_frames: int, num_kept: int) -> list[int]:
    """`num_kept` evenly spread frames, the first and the last among them; the first alone if one is kept."""
    _check_number(num_frames, num_kept)
    return np.rint(np.linspace(0, num_frames - 1, num_kept)).astype(int).tolist()


def select_key_frames(scores: Sequence[float], num_kept: int) -> list[int]:
    """The first frame and those with the highest scores, in time order.

    Args:
        scores: one for each frame; that of the first does not count.

    Raises:
        ValueError: if `num_kept` is 0 or more than the number of frames.
    """
    _check_number(len(scores), num_kept)
    return sorted([0, *_by_score(scores)[: num_kept - 1]])


def spread_key_frames(scores: Sequence[float], num_kept: int) -> list[int]:
    """The first frame and those at which equal shares of the summed scores are reached, in time order.

    With equal scores this is nearly uniform. A frame that holds several shares by itself is taken once, and those with the
    highest scores fill up.

    Raises:
        ValueError: as `select_key_frames`, or if a score is negative.
    """
    _check_number(len(scores), num_kept)
    rest = np.asarray(scores[1:], dtype=float)
    if (rest < 0).any():
        raise ValueError(f"scores are summed and must not be negative, got {rest.min()}")
    if num_kept == 1:
        return [0]
    total = rest.cumsum()
    shares = total[-1] * np.arange(1, num_kept) / (num_kept - 1)
    # A hair less than each share, so that rounding decides nothing.
    kept = {0, *(np.searchsorted(total, shares * (1 - 1e-9)) + 1).tolist()}
    fill = [frame for frame in _by_score(scores) if frame not in kept]
    return sorted([*kept, *fill[: num_kept - len(kept)]])


def _by_score(scores: Sequence[float]) -> list[int]:
    return sorted(range(1, len(scores)), key=lambda frame: (-scores[frame], frame))


def _check_number(num_frames: int, num_kept: int) -> None:
    if not 1 <= num_kept <= num_frames:
        raise ValueError(f"{num_kept} frames were asked for, expected 1 to {num_frames}, the number there is")


def keep_frames(
    sample: dict[str, torch.Tensor], frames: Sequence[int], layout: FrameTokenLayout, video_token_id: int
) -> dict[str, torch.Tensor]:
    """A prompt whose video shows some of its frames alone, at their own times, with as many placeholders as they need.

    Args:
        sample: `input_ids` and `labels` `[S]`, and the inputs of one video `[1, T, ...]`.
        frames: in time order.

    Raises:
        ValueError: if the sample does not hold exactly one video.
    """
    videos = sample.get("pixel_values_videos", ())
    if len(videos) != 1:
        raise ValueError(f"frames are chosen from one video, got {len(videos)}")
    kept = {name: value[:, frames] if name in _OF_FRAMES else value for name, value in sample.items()}
    types = kept["video_frame_types"][0] if "video_frame_types" in kept else None
    is_video = sample["input_ids"] == video_token_id
    first, num_tokens = int(is_video.int().argmax()), layout.num_tokens(len(frames), types)
    last = first + int(is_video.sum())
    for name in ("input_ids", "labels"):
        row = sample[name]
        kept[name] = torch.cat([row[:first], row[first].expand(num_tokens), row[last:]])
    return kept


# -- Tokens


def keep_tokens(scores: torch.Tensor, share: float) -> torch.Tensor:
    """`[P]` scores -> `[P]` bool: True at the `share` (rounded, at least one) with the highest scores.

    Raises:
        ValueError: if the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected more than 0 and at most 1")
    order = scores.argsort(descending=True, stable=True)
    keep = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    keep[order[: max(1, round(share * len(scores)))]] = True
    return keep


def first_frame_first(scores: Sequence[torch.Tensor], tokens: VideoTokens) -> torch.Tensor:
    """`[P]` scores in which no token is above those of the first frame.

    Args:
        scores: for each frame but the first `[h, w]`.

    Raises:
        ValueError: if a frame's scores are on another grid than its tokens.
    """
    grids = [tuple(own.shape) for own in scores]
    if grids != list(tokens.frame_grids[1:]):
        raise ValueError(
            f"scores are on grids {grids}, but the tokens of the frames on {list(tokens.frame_grids[1:])}"
        )
    height, width = tokens.frame_grids[0]
    first = torch.full((height * width,), torch.inf, device=scores[0].device if scores else None)
    return torch.cat([first, *(own.float().flatten() for own in scores)])


def change_scores(features: torch.Tensor, tokens: VideoTokens) -> list[torch.Tensor]:
    """Difference of each token to the one at its place in the frame before: the score of Efficient Video Sampling.

    One minus the cosine of the embeddings, as in https://arxiv.org/abs/2510.14624.

    Args:
        features: `[L, D]` of one video, as the language model gets them.

    Returns:
        for each frame but the first `[h, w]`.

    Raises:
        ValueError: if frames differ in their grids.
    """
    if len(set(tokens.frame_grids)) > 1:
        raise ValueError(
            f"tokens have no place in the frame before where grids differ: {sorted(set(tokens.frame_grids))}"
        )
    patches = features[tokens.patch_offsets.to(features.device)].float().unflatten(0, (len(tokens.frame_grids), -1))
    change = 1 - torch.nn.functional.cosine_similarity(patches[1:], patches[:-1], dim=-1)
    return list(change.unflatten(1, tokens.frame_grids[0]))


def even_scores(tokens: VideoTokens, share: float) -> list[torch.Tensor]:
    """Scores by which whole frames at even steps are kept: for each frame but the first `[h, w]`, 1 if kept, else 0."""
    num_frames = len(tokens.frame_grids)
    kept = uniform_frames(num_frames, max(1, min(num_frames, -int(-share * num_frames // 1))))
    return [torch.full(grid, float(frame in kept)) for frame, grid in enumerate(tokens.frame_grids)][1:]


def keep_with_newlines(keep: torch.Tensor, tokens: VideoTokens) -> torch.Tensor:
    """`[P]` kept patches -> `[L]` kept tokens: newline and faster tokens, which show nothing, stay."""
    kept = (tokens.kind != TokenKind.PATCH).to(keep.device)
    kept[tokens.patch_offsets.to(keep.device)] = keep
    return kept


@dataclass
class PrunedPrompts:
    """Prompts without some of their video tokens, padded on the left. What is left keeps its position.

    Attributes:
        inputs: `inputs_embeds` `[B, S, D]`, `attention_mask` and `position_ids` `[B, S]`, for the model.
        next_positions: `[B]`, of the first token after each prompt: as if nothing had been dropped.
    """

    inputs: dict[str, torch.Tensor]
    next_positions: torch.Tensor


def prune_prompts(
    model: Any, batch: dict[str, torch.Tensor], features: Sequence[torch.Tensor], keep: Sequence[torch.Tensor]
) -> PrunedPrompts:
    """Drops video tokens before the language model.

    Args:
        batch: `input_ids` and `attention_mask` `[B, S]` of prompts with text and videos.
        features: for each video `[L, D]`, as `get_video_features` gives them in `pooler_output`.
        keep: for each video `[L]` bool.

    Raises:
        ValueError: if a prompt holds images, or the placeholders are not as many as the videos' tokens.
    """
    input_ids, exists = batch["input_ids"], batch["attention_mask"].bool()
    if (input_ids == model.config.image_token_id).any():
        raise ValueError("tokens are dropped from prompts of text and videos, but one holds images")
    embeddings = model.get_input_embeddings()(input_ids)
    is_video = input_ids == model.config.video_token_id
    places = split_video_positions(is_video, [len(own) for own in features])
    kept = exists.flatten().clone()
    kept[torch.cat(places)] = torch.cat(list(keep)).to(kept.device)
    embeddings = embeddings.flatten(0, 1).index_put(
        (torch.cat(places),), torch.cat(list(features)).to(embeddings.dtype)
    )
    kept, embeddings = kept.view_as(exists), embeddings.view(*exists.shape, -1)
    positions = exists.cumsum(-1) - 1
    length = int(kept.sum(1).max())
    padded = {
        name: _pad_left([row[own] for row, own in zip(values, kept, strict=True)], length)
        for name, values in (
            ("inputs_embeds", embeddings),
            ("attention_mask", batch["attention_mask"]),
            ("position_ids", positions),
        )
    }
    return PrunedPrompts(inputs=padded, next_positions=exists.sum(1))


def _pad_left(rows: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """Rows `[S_i, ...]` -> `[B, length, ...]`, zeros before each."""
    padded = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for place, row in zip(padded, rows, strict=True):
        place[length - len(row) :] = row
    return padded
