"""scripts/inference_uses.py: key frames and fewer visual tokens, chosen by the head and by cheaper ways."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_folder import NUM_FRAMES, make_demo_folder
from tiny import LAYOUTS, VIDEO_TOKEN, make_sample, tiny_model, video_batch
from transformers.cache_utils import DynamicCache
from video_clips import write_clip

from llava_next_ar.configuration.frame_token_layout import TokenKind
from llava_next_ar.evaluation import evaluate
from llava_next_ar.evaluation.measures import choice_log_likelihoods
from llava_next_ar.evaluation.questions import Question
from llava_next_ar.evaluation.settings import EvaluationSettings
from llava_next_ar.experiments.inference import uses as inference_uses
from llava_next_ar.experiments.inference.measures import (
    FRAME_SCORES,
    TOKEN_SCORES,
    choose_frames,
    frame_scores,
    shows_moment,
    surprise_of_batch,
)
from llava_next_ar.experiments.inference.moments import measure_moments
from llava_next_ar.experiments.inference.selection import (
    change_scores,
    codec_scores,
    even_scores,
    first_frame_first,
    keep_frames,
    keep_tokens,
    keep_with_newlines,
    pixel_changes,
    prune_prompts,
    select_key_frames,
    spread_key_frames,
    uniform_frames,
)
from llava_next_ar.experiments.inference.tables import (
    Answers,
    MomentHits,
    accuracy_rows,
    any_frame_tells,
    as_markdown,
    gain_rows,
    hit_rows,
    knowledge_rows,
    prefill_rows,
    write_tables,
)
from llava_next_ar.experiments.inference.timing import PrefillSettings, measure_prefill
from llava_next_ar.experiments.inference.training import DecodedSamples, ThinningCollator
from llava_next_ar.experiments.study import study
from llava_next_ar.experiments.temporal.synthetic_clips import write_video
from llava_next_ar.modeling.frame_surprise import VideoSurprise
from llava_next_ar.processing.video_frames import video_times
from llava_next_ar.training.data import LlavaVideoDataset

# -- Frames


def test_key_frames_are_the_first_and_the_highest_in_time_order():
    scores = [9.0, 0.1, 0.5, 0.3, 0.5, 0.2]
    assert select_key_frames(scores, 1) == [0]
    assert select_key_frames(scores, 2) == [0, 2]  # of equal scores the earlier one
    assert select_key_frames(scores, 4) == [0, 2, 3, 4]
    assert select_key_frames(scores, 6) == [0, 1, 2, 3, 4, 5]
    assert select_key_frames([0.0, 1.0, 1.0], 2) == [0, 1]  # the first frame's own score is not looked at


def test_spread_key_frames_go_in_equal_steps_along_the_sum():
    assert spread_key_frames([0.0] + [1.0] * 12, 5) == [0, 3, 6, 9, 12] == uniform_frames(13, 5)
    assert spread_key_frames([7.0, 0, 0, 1, 1, 0, 0, 1, 1], 5) == [0, 3, 4, 7, 8]
    # Frame 2 holds nearly all of the sum; the highest others fill up.
    assert spread_key_frames([0, 0.1, 9, 0.3, 0.2, 0.1], 4) == [0, 2, 3, 5]
    assert spread_key_frames([0.0] * 4, 3) == [0, 1, 2]
    assert spread_key_frames([0.0, 1.0], 1) == [0]


@pytest.mark.parametrize("choose", [select_key_frames, spread_key_frames])
def test_every_budget_of_frames_is_kept_exactly(choose):
    rng = np.random.default_rng(0)
    for number in range(1, 17):
        scores = rng.exponential(size=16).round(1).tolist()
        frames = choose(scores, number)
        assert (
            len(frames) == len(set(frames)) == number
            and frames[0] == 0
            and frames == sorted(frames)
            and frames[-1] < 16
        )
        assert uniform_frames(16, number)[0] == 0 and len(set(uniform_frames(16, number))) == number
    for bad in (0, 17):
        with pytest.raises(ValueError, match=f"{bad} frames were asked for, expected 1 to 16"):
            choose(scores, bad)
    with pytest.raises(ValueError, match="must not be negative"):
        spread_key_frames([0, 1, -0.5], 2)


def processed(model, lengths, seed=0, types=None):
    """A sample as `Prompts` gives it."""
    sample = make_sample(model.config, lengths, seed=seed, types=types)
    frames = lengths[0]
    sample |= {
        "pixel_values_videos": torch.stack(sample.pop("videos")),
        "video_frame_mask": torch.ones(len(lengths), frames, dtype=torch.bool),
        "video_timestamps": torch.stack(sample.pop("times")),
    }
    types = sample.pop("types")
    if types is not None:
        sample["video_frame_types"] = torch.tensor([types[:frames]])
    return sample


@pytest.mark.parametrize("layout", ["grid", "slow_fast"])
def test_a_video_of_some_frames_is_what_it_would_be_with_these_alone(layout):
    model = tiny_model(**LAYOUTS[layout])
    types = [0, 1, 1, 0, 1] if layout == "slow_fast" else None
    sample, frames = processed(model, [5], types=types), [0, 3, 4]
    kept = keep_frames(sample, frames, model.config.frame_token_layout, VIDEO_TOKEN)
    assert kept["video_timestamps"].tolist() == [sample["video_timestamps"][0, frames].tolist()]
    torch.testing.assert_close(kept["pixel_values_videos"][0], sample["pixel_values_videos"][0, frames])
    is_text, was_text = (s["input_ids"] != VIDEO_TOKEN for s in (kept, sample))
    assert kept["input_ids"][is_text].tolist() == sample["input_ids"][was_text].tolist()
    assert len(kept["labels"]) == len(kept["input_ids"]) and (kept["labels"] >= 0).sum() == 4
    expected = model.config.frame_token_layout.num_tokens(3, None if types is None else [0, 0, 1])
    assert (~is_text).sum() == expected
    model(
        **{name: value[None] if value.dim() == 1 else value for name, value in kept.items()}
    )  # tokens fit placeholders
    with pytest.raises(ValueError, match="one video, got 2"):
        keep_frames(processed(model, [3, 3]), [0], model.config.frame_token_layout, VIDEO_TOKEN)


def test_scores_of_frames_and_what_is_chosen_by_them():
    surprise = VideoSurprise(
        frame_index=torch.arange(1, 4),
        seconds=torch.arange(1.0, 4),
        frames=torch.tensor([0.5, 2.0, 1.0]),
        patches=[torch.ones(1, 2)] * 3,
        errors=[torch.tensor([[0.0, value]]) for value in (6.0, 2.0, 4.0)],
        copy_errors=[torch.tensor([[value, 0.0]]) for value in (2.0, 4.0, 6.0)],
        floors=torch.full((3,), 0.1),
    )
    pixels = torch.tensor([0.0, 3, 3, 4]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    scores = frame_scores(surprise, pixels, [0.0, 1.0, 4.0, 2.0])
    assert scores == {
        "surprise": [0, 0.5, 2, 1],
        "error": [0, 3, 1, 2],
        "change": [0, 1, 2, 3],
        "pixels": [0, 9, 0, 1],
        "codec": [0, 1, 4, 2],
    }
    chosen = choose_frames(scores, 2, "a.mp4")
    tops = {"surprise": 2, "error": 1, "change": 3, "pixels": 1, "codec": 2}
    assert {name: chosen[f"{name} top"] for name in FRAME_SCORES} == {name: [0, own] for name, own in tops.items()}
    assert chosen["uniform"] == [0, 3] and all(len(frames) == 2 for frames in chosen.values())
    assert chosen["random"] == choose_frames(scores, 2, "a.mp4")["random"]
    drawn = {choose_frames(scores, 2, f"{name}.mp4")["random"][1] for name in range(40)}
    assert drawn == {1, 2, 3}


def test_codec_scores_add_up_the_frames_that_were_not_sampled(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 24)
    times, _, _, costs = video_times(path)
    assert codec_scores(path, times.tolist()) == pytest.approx([0, *costs[1:]])
    some = [0, 5, 6, 20]
    expected = [0, costs[1:6].sum(), costs[6], costs[7:21].sum()]
    assert codec_scores(path, (times[some] + 2e-4).tolist()) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no frames of its own at"):
        codec_scores(path, [0.0, 0.02])
    with pytest.raises(ValueError, match="no frames of its own at"):
        codec_scores(path, [0.0, 0.0])
    still = write_clip(tmp_path / "a.avi", 6, codec="mjpeg", options={}, pixel_format="yuvj420p")
    with pytest.raises(ValueError, match="key frames alone"):
        codec_scores(still, [0.0, 1 / 24])


def test_pixel_changes_on_a_grid():
    frames = torch.zeros(2, 3, 4, 4)
    frames[1, :, :2, :2] = 2
    assert pixel_changes(frames).tolist() == [[[1.0]]]
    assert pixel_changes(frames, (2, 2)).tolist() == [[[4.0, 0.0], [0.0, 0.0]]]


def test_a_moment_is_shown_if_a_frame_lies_in_it():
    asked = {"index": 0, "id": "0", "question_type": "glimpse", "messages": [], "answer": "red"}
    times = torch.arange(8) / 3 + 5  # the moment counts from the first frame on
    question = Question(**asked, moment=(1.0, 4 / 3))
    assert [shows_moment(question, times, [0, frame]) for frame in range(8)] == [0, 0, 0, 1, 1, 0, 0, 0]
    assert shows_moment(question, (times * 1e9).round().long(), [3]) == 1  # nanoseconds
    assert shows_moment(Question(**asked), times, [3]) is None


# -- Tokens


def test_the_budget_of_tokens_is_kept_exactly_and_ties_go_to_the_earlier():
    scores = torch.tensor([1.0, 3, 3, 0, 3, 2, torch.inf, 1])
    for share, number in ((1.0, 8), (0.7, 6), (0.5, 4), (0.3, 2), (0.1, 1), (0.01, 1)):
        assert keep_tokens(scores, share).sum() == number
    assert keep_tokens(scores, 0.4).nonzero().flatten().tolist() == [1, 2, 6]
    assert keep_tokens(torch.zeros(100), 0.3).nonzero().flatten().tolist() == list(range(30))
    for bad in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match=f"share is {bad}"):
            keep_tokens(scores, bad)


def test_evs_scores_and_the_first_frame():
    layout = tiny_model(**LAYOUTS["grid"]).config.frame_token_layout
    tokens = layout.video(3)
    features = torch.randn(len(tokens), 8)
    (height, width), where = layout.frame_grid(), tokens.patch_offsets.unflatten(0, (3, -1))
    features[where[1]] = -2 * features[where[0]]  # only the direction counts
    features[where[2, 1]] = -features[where[1, 1]]
    features[where[2, 0]] = features[where[1, 0]]
    first, second = change_scores(features, tokens)
    assert first.shape == second.shape == (height, width)
    torch.testing.assert_close(first, torch.full((height, width), 2.0))
    assert second.flatten()[0] == pytest.approx(0, abs=1e-6) and second.flatten()[1] == pytest.approx(2)
    ranked = first_frame_first([first, second], tokens)
    size = height * width
    assert ranked.shape == (3 * size,)
    # All of the first frame, all of the second, which is its opposite, and then the most changed of the third.
    best = 2 * size + int(second.argmax())
    assert keep_tokens(ranked, (2 * size + 1) / (3 * size)).nonzero().flatten().tolist() == [*range(2 * size), best]
    assert keep_tokens(ranked, 1 / 3).nonzero().flatten().tolist() == list(range(size))
    with pytest.raises(ValueError, match="on grids"):
        first_frame_first([first, second[:1]], tokens)
    mixed = tiny_model(**LAYOUTS["slow_fast"]).config.frame_token_layout.video(3)
    with pytest.raises(ValueError, match="where grids differ"):
        change_scores(torch.randn(len(mixed), 8), mixed)


def test_even_steps_keep_whole_frames():
    tokens = tiny_model(**LAYOUTS["grid"]).config.frame_token_layout.video(8)
    size = len(tokens.patch_offsets) // 8
    for share, frames in ((1.0, range(8)), (0.5, (0, 2, 5, 7)), (0.25, (0, 7)), (0.125, (0,))):
        keep = keep_tokens(first_frame_first(even_scores(tokens, share), tokens), share).view(8, size)
        assert keep.all(1).nonzero().flatten().tolist() == list(frames) and keep.sum() == len(frames) * size
    # A share between: all of the frames at even steps but the last tokens of the last one.
    keep = keep_tokens(first_frame_first(even_scores(tokens, 0.3), tokens), 0.3).view(8, size)
    assert keep.any(1).nonzero().flatten().tolist() == [0, 4, 7] and keep.sum() == round(0.3 * 8 * size)


def prompts(model, lengths, **keys):
    batch = video_batch(model.config, [[length] for length in lengths], padding_side="left", **keys)
    batch.pop("labels")
    return batch


def features_of(model, batch):
    return model.model.get_video_features(
        **{name: value for name, value in batch.items() if "video" in name}, return_dict=True
    )


def random_masks(model, video, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        keep_with_newlines(keep_tokens(torch.rand(len(t.patch_offsets), generator=generator), share), t)
        for t in model.model.video_tokens(video)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_with_all_tokens_kept_nothing_changes(layout):
    model = tiny_model(**LAYOUTS[layout])
    batch = prompts(model, (5, 3))
    video = features_of(model, batch)
    pruned = prune_prompts(model, batch, video.pooler_output, random_masks(model, video, 1.0))
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = model(**batch, position_ids=positions, logits_to_keep=1).logits
    torch.testing.assert_close(model(**pruned.inputs, logits_to_keep=1).logits, expected, rtol=1e-5, atol=1e-5)
    assert pruned.next_positions.tolist() == batch["attention_mask"].sum(1).tolist()


@pytest.mark.parametrize("layout", ["one_token", "slow_fast"])
@torch.no_grad()
def test_dropped_tokens_are_as_if_nobody_looked_at_them(layout):
    """Kept tokens keep their positions: the same as a mask over the whole prompt, by which the small model is trained."""
    model = tiny_model(**LAYOUTS[layout])
    batch = prompts(model, (5, 3))
    video = features_of(model, batch)
    keep = random_masks(model, video, 0.4)
    pruned = prune_prompts(model, batch, video.pooler_output, keep)
    for own, tokens, mask in zip(keep, model.model.video_tokens(video), pruned.inputs["attention_mask"], strict=True):
        is_patch = tokens.kind == TokenKind.PATCH
        assert own[is_patch].sum() == round(0.4 * int(is_patch.sum())) and own[~is_patch].all()
        assert mask.sum() == own.sum() + 11  # words of the prompt
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    masked = batch["attention_mask"].clone()
    masked[batch["input_ids"] == VIDEO_TOKEN] = torch.cat(keep).long()
    expected = model(**{**batch, "attention_mask": masked}, position_ids=positions, logits_to_keep=1).logits
    actual = model(**pruned.inputs, logits_to_keep=1).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    changed = model(**batch, position_ids=positions, logits_to_keep=1).logits
    assert (actual - changed).abs().max() > 1e-3


@torch.no_grad()
def test_a_batch_of_pruned_prompts_answers_as_each_alone():
    model = tiny_model()
    batch = prompts(model, (5, 3))
    video = features_of(model, batch)
    keep = random_masks(model, video, 0.3)
    choices = [[[5, 6, 7], [8]], [[9, 10], [11, 12]]]

    def scores(batch, features, keep, choices):
        pruned = prune_prompts(model, batch, features, keep)
        cache = DynamicCache(config=model.config.get_text_config())
        logits = model(**pruned.inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        mask = pruned.inputs["attention_mask"]
        return choice_log_likelihoods(model, cache, logits, mask, choices, pruned.next_positions)

    together = scores(batch, video.pooler_output, keep, choices)
    for row in range(2):
        one = {
            name: batch[name][row, None, batch["attention_mask"][row].bool()]
            for name in ("input_ids", "attention_mask")
        }
        (alone,) = scores(one, video.pooler_output[row : row + 1], keep[row : row + 1], choices[row : row + 1])
        assert together[row] == pytest.approx(alone, abs=1e-5)
        # The first choice as one more piece of a prompt of which nothing was dropped, with the same tokens hidden.
        said = torch.tensor([choices[row][0]])
        whole = {name: video_inputs_of(batch, row)[name] for name in video_inputs_of(batch, row)}
        whole["input_ids"] = torch.cat([one["input_ids"], said], 1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        whole["attention_mask"][whole["input_ids"] == VIDEO_TOKEN] = keep[row].long()
        logits = model(**whole, position_ids=torch.arange(whole["input_ids"].shape[1])[None]).logits
        expected = logits[0, -1 - said.shape[1] : -1].log_softmax(-1).gather(1, said.T).sum()
        assert together[row][0] == pytest.approx(float(expected), abs=1e-5)
    image = {**batch, "input_ids": batch["input_ids"].clone()}
    image["input_ids"][0, -1] = model.config.image_token_id
    with pytest.raises(ValueError, match="images"):
        prune_prompts(model, image, video.pooler_output, keep)


def video_inputs_of(batch, row):
    length = int(batch["video_frame_mask"][row].sum())
    return {name: value[row, None, :length] for name, value in batch.items() if "video" in name}


def test_surprise_of_a_batch_needs_one_video_in_each_prompt():
    model = tiny_model()
    assert [len(own.frames) for own in surprise_of_batch(model, prompts(model, (5, 3)))] == [4, 2]
    two = video_batch(model.config, [[3, 3]], padding_side="left")
    two.pop("labels")
    with pytest.raises(ValueError, match="1 prompts hold 2 videos"):
        surprise_of_batch(model, two)
    with pytest.raises(ValueError, match="1 of them of two frames"):
        surprise_of_batch(model, prompts(model, (5, 1)))


# -- The small model


def test_the_small_models_batches_show_some_frames_and_hide_some_tokens():
    model = tiny_model()
    samples = [processed(model, [6], seed=seed) for seed in range(4)]
    collator = ThinningCollator(0, model.config, [2, 3, 6], seed=1)
    batches = [collator(samples) for _ in range(40)]
    lengths, hidden = set(), 0
    for batch in batches:
        lengths.add(batch["pixel_values_videos"].shape[1])
        is_video = batch["input_ids"] == VIDEO_TOKEN
        assert batch["attention_mask"][~is_video].all()  # all prompts are equally long here
        hidden += not batch["attention_mask"].all()
        times = batch["video_timestamps"]
        assert (times.diff(dim=1) > 0).all()
        assert model(**batch).loss.isfinite()
    assert lengths == {2, 3, 6} and 10 < hidden < 30
    chosen = {
        tuple(batch["video_timestamps"][0].tolist()) for batch in batches if batch["video_timestamps"].shape[1] == 2
    }
    assert len(chosen) > 3
    again = ThinningCollator(0, model.config, [2, 3, 6], num_whole=2, seed=1)
    for _ in range(2):
        whole = again(samples)
        assert whole["pixel_values_videos"].shape[1] == 6 and whole["attention_mask"].all()
    for batch in batches[:3]:
        assert all(torch.equal(value, batch[name]) for name, value in again(samples).items())


# -- The tables, from fixed numbers


def fixed_results(**right) -> dict:
    questions = [
        {"id": str(n), "question_type": "color" if n == 4 else "order", "video": f"{n // 2}.mp4", "num_choices": 2}
        for n in range(5)
    ]
    conditions = [{"way": "all", "budget": None, "right": [1, 1, 1, 1, 0]}]
    conditions += [{"way": name, "budget": 0.5, "right": values} for name, values in right.items()]
    settings = {"model": "m", "data": "d.json", "bootstrap_samples": 200}
    return {
        "settings": settings,
        "budgets": [0.5],
        "questions": questions,
        "conditions": conditions,
        "command": "run it",
    }


def test_tables_from_fixed_numbers(tmp_path):
    results = fixed_results(change=[1, 1, 0, 0, 1], surprise=[1, 0, 0, 0, 1], random=[0, 0, 0, 0, 0])
    answers = Answers(results, "tokens")
    # `color` does not need time; clips 0 (two right) and 1 (none) are drawn as wholes.
    assert answers.accuracy("change", 0.5) == (0.5, [0.0, 1.0])
    assert answers.accuracy("all", question_type="color") == (0.0, None)
    assert answers.difference("surprise", "change", 0.5) == (-0.25, [-0.5, 0.0])
    assert answers.chance("order") == 0.5
    rows = accuracy_rows(answers)
    assert rows[0] == ["chosen by", "0.5 of the tokens", "0.5 of the tokens - EVS"]
    assert rows[1] == ["EVS", "0.500 [0.000, 1.000]", ""]
    assert rows[2] == ["surprise", "0.250 [0.000, 0.500]", "-0.250 [-0.500, +0.000]"]
    assert rows[-1][:2] == ["everything shown", "1.000 [1.000, 1.000]"]
    assert [row[:2] for row in knowledge_rows(answers)[1:]] == [
        ["color", "yes, so not counted below"],
        ["order", "no"],
    ]
    assert any_frame_tells("color") and not any_frame_tells("direction")
    assert not any_frame_tells("of another data set") and not any_frame_tells("glimpse")

    prefill = {"command": "time it", "tower_seconds": 0.1, "surprise_seconds": 3.0, "change_seconds": 0.01}
    prefill["by_share"] = [
        {"share": 1.0, "num_tokens": 110, "seconds": 2.0, "all_seconds": [2.0], "cache_bytes": 4_000_000},
        {"share": 0.5, "num_tokens": 60, "seconds": 1.0, "all_seconds": [1.0], "cache_bytes": 2_000_000},
    ]
    assert prefill_rows(prefill)[1:] == [
        ["1", "110", "2.00", "1.00", "4.0", "1.00", "-", "-", "-"],
        ["0.5", "60", "1.00", "0.50", "2.0", "0.50", "0.51", "2.00", "3.0"],
    ]
    with pytest.raises(FileNotFoundError, match="holds no results"):
        write_tables(tmp_path)
    (tmp_path / "tokens_test.json").write_text(json.dumps(results))
    (tmp_path / "prefill.json").write_text(json.dumps(prefill))
    text = write_tables(tmp_path)
    assert (tmp_path / "tables.md").read_text() == text
    assert as_markdown(rows) in text and as_markdown(prefill_rows(prefill)) in text and "`run it`" in text
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


def test_results_that_no_table_can_show():
    short = fixed_results(change=[1, 1, 0, 0])
    with pytest.raises(ValueError, match="4 answers by change at 0.5, expected 5"):
        Answers(short, "tokens")
    of_color = fixed_results(change=[1, 1, 0, 0, 1])
    for question in of_color["questions"]:
        question["question_type"] = "color"
    with pytest.raises(ValueError, match="any frame answers each of the 5 questions"):
        Answers(of_color, "tokens")


def key_frame_results(hits: list[int | None]) -> dict:
    results = fixed_results(
        **{"uniform": [0] * 5, "change top": [1, 1, 0, 0, 1], "surprise top": [1, 0, 0, 0, 1], "pixels top": [0] * 5}
    )
    for condition in results["conditions"][1:]:
        condition["hits"] = hits
    return results


def test_key_frames_are_compared_with_feature_difference_and_with_when_it_was_seen(tmp_path):
    # Clips 0 and 1 count; the last question, about color, does not, and has no moment.
    answers = Answers(key_frame_results([1, 0, 0, 0, None]), "key_frames")
    assert gain_rows(answers, "change")[1:] == [["surprise, top", "-0.250 [-0.500, +0.000]"]]
    assert gain_rows(answers, "pixels")[1:] == [["surprise, top", "+0.250 [+0.000, +0.500]"]]
    assert answers.has_moments and answers.hit_rate("surprise top", 0.5) == (0.25, [0.0, 0.5])
    assert [row[0] for row in hit_rows(answers)[1:]] == [
        "uniform",
        "feature difference, top",
        "surprise, top",
        "pixel difference, top",
    ]
    assert not Answers(key_frame_results([1, None, 0, 0, None]), "key_frames").has_moments
    assert not Answers(fixed_results(uniform=[0] * 5), "key_frames").has_moments  # results without `hits`
    for name, hits in (("a", [1, 0, 0, 0, None]), ("b", [None] * 5)):
        (tmp_path / f"key_frames_{name}.json").write_text(json.dumps(key_frame_results(hits)))
    text = write_tables(tmp_path, ["a", "b"])
    assert text.count("gained over feature difference") == 2 and text.count("moment is shown") == 1
    assert as_markdown(hit_rows(answers)) in text
    heights = []
    for names in (["a"], ["a", "b"]):
        write_tables(tmp_path, names)
        heights.append(int.from_bytes((tmp_path / "accuracy.png").read_bytes()[20:24], "big"))
    assert heights[1] == 2 * heights[0]  # a row for each


def moment_results(**hits) -> dict:
    questions = [{"id": str(n), "question_type": "glimpse", "video": f"{n}.mp4", "num_choices": 4} for n in range(4)]
    settings = EvaluationSettings(model="", data="clips.json")
    return {
        "command": "run it",
        "settings": asdict(settings),
        "budgets": [2, 4],
        "data": {"sha256": "abc"},
        "cpu_seconds": {"decode": 0.004, "pixels": 0.001, "codec": 0.002},
        "questions": questions,
        "hits": {way: dict(zip(("2", "4"), own, strict=True)) for way, own in hits.items()},
    }


def test_moments_of_free_methods_stand_beside_those_of_the_head(tmp_path):
    moments = moment_results(**{"codec top": ("1110", "1111"), "uniform": ("0000", "0100")})
    stored = {"data": {"sha256": "abc"}, "conditions": [{"way": "all", "budget": None, "hits": []}]}
    stored["conditions"] += [{"way": "error top", "budget": 2, "hits": [1, 0, 0, 0]}]
    hits = MomentHits(moments, stored)
    assert [row[:2] for row in hits.rows()[1:]] == [
        ["codec, top", "0.750 [0.250, 1.000]"],
        ["prediction error, top", "0.250 [0.000, 0.750]"],
        ["uniform", "0.000 [0.000, 0.000]"],
    ]
    assert hits.rows()[2][2] == "-"  # not among the stored budgets
    assert hits.difference_rows()[1] == ["prediction error, top", "+0.500 [+0.000, +1.000]", "-"]
    assert hits.cost_rows()[1:] == [
        ["codec: pass over packets", "2.0"],
        ["pixel difference: decode all frames, compare", "5.0"],
    ]
    with pytest.raises(ValueError, match="not those of `key-frames`"):
        MomentHits(moments, {**stored, "data": {"sha256": "other"}})
    (tmp_path / "moments_a.json").write_text(json.dumps(moments))
    assert "Key frames without a model, data `a`" in write_tables(tmp_path)


def test_moments_are_found_at_a_cut(tmp_path):
    """One run at a tiny size: the codec spends most where the picture changes, which is the moment."""
    (tmp_path / "videos").mkdir()
    entries = []
    for number in range(2):
        frames = np.full((12, 48, 48, 3), 90, np.uint8)
        frames[5 + number :] = np.random.default_rng(number).integers(0, 255, (48, 48, 3))
        write_video(frames, tmp_path / "videos" / f"{number}.mp4", 4.0)
        turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "red"}]
        moment = [(5 + number) / 4, (6 + number) / 4]
        entries.append({"video": f"videos/{number}.mp4", "conversations": turns, "choices": ["red"], "moment": moment})
    data = tmp_path / "test.json"
    data.write_text(json.dumps(entries))
    inference_uses.main(
        ["moments", "--data", str(data), "--num-frames", "12", "--num-kept", "2", "--results", str(tmp_path)]
    )
    results = json.loads((tmp_path / "moments_test.json").read_text())
    assert results["hits"]["codec top"] == results["hits"]["pixels top"] == {"2": "11"}
    assert results["hits"]["uniform"] == {"2": "00"} and set(results["cpu_seconds"]) == {"decode", "pixels", "codec"}
    for bad, message in (
        ({"video": ["a", "b"]}, "expected the path of one file"),
        ({"moment": None}, "has no `moment`"),
    ):
        entry = {name: value for name, value in {**entries[0], **bad}.items() if value is not None}
        data.write_text(json.dumps([entry]))
        with pytest.raises(ValueError, match=message):
            measure_moments(data, [2], num_frames=12, progress=False)


def test_the_committed_moments_are_those_of_the_stored_key_frames():
    folder = study.RESULTS / "inference_glimpse"
    for path in folder.glob("moments_*.json"):
        moments = json.loads(path.read_text())
        stored = json.loads((folder / path.name.replace("moments", "key_frames")).read_text())
        for condition in stored["conditions"]:
            if condition["way"] in moments["hits"]:
                own = moments["hits"][condition["way"]][str(condition["budget"])]
                assert list(map(int, own)) == condition["hits"], (path.name, condition["way"])


# -- Time and memory


def test_prefill_counts_what_is_kept():
    sizes = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "num_key_value_heads": 2}
    settings = PrefillSettings(**sizes, vision_size=16, image_size=32, num_frames=4, num_text_tokens=7, repeats=2)
    results = measure_prefill(settings, [0.5, 0.1], progress=False)  # and all of them, first
    patches = 4 * 2 * 2  # 4 frames, 4 x 4 patches each, pooled by 2
    for row, kept in zip(results["by_share"], (patches, 8, 2), strict=True):
        assert row["num_tokens"] == kept + 1 + 7  # a newline and the words
        assert (
            row["cache_bytes"] == 2 * 2 * 2 * 8 * 4 * row["num_tokens"]
        )  # layers, keys and values, heads, size, bytes
        assert len(row["all_seconds"]) == 2 and row["seconds"] > 0
    assert min(results[name] for name in ("tower_seconds", "change_seconds")) > 0


# -- The commands, on a tiny checkpoint and real files


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_demo_folder(tmp_path_factory.mktemp("uses"))


def test_everything_shown_is_what_the_evaluation_measures(folder):
    settings = EvaluationSettings(
        model=str(folder / "base"), data=str(folder / "clips" / "test.json"), batch_size=3, generation=False
    )
    expected = [record["likelihood"] for record in evaluate.evaluate(settings, progress=False)["answers"]]
    assert 0 < sum(expected) < len(expected)
    frames = inference_uses.measure("key_frames", settings, [NUM_FRAMES, 2], progress=False)
    tokens = inference_uses.measure("tokens", settings, [1.0, 0.2], progress=False)
    assert frames["model"]["weights_sha256"] and len(frames["questions"]) == len(expected)
    for results, ways in ((frames, 2 + 2 * len(FRAME_SCORES)), (tokens, len(TOKEN_SCORES))):
        assert len(results["conditions"]) == 1 + 2 * ways
        for condition in results["conditions"]:
            if condition["budget"] in (None, NUM_FRAMES, 1.0):
                assert condition["right"] == expected, condition["way"]
    shown = {c["way"]: c["frames"] for c in frames["conditions"] if c["budget"] == 2}
    assert shown["uniform"] == [[0, NUM_FRAMES - 1]] * len(expected)
    again = inference_uses.measure("key_frames", replace(settings, batch_size=8), [2], progress=False)
    assert {c["way"]: c["frames"] for c in again["conditions"] if c["budget"] == 2} == shown


def test_questions_that_cannot_be_scored_are_refused(folder, tmp_path):
    entries = json.loads((folder / "clips" / "test.json").read_text())
    path = folder / "clips" / "bad.json"
    settings = EvaluationSettings(model=str(folder / "base"), data=str(path))
    for change, message in (({"choices": []}, "has no choices"), ({"video": [entries[0]["video"]] * 2}, "about 2")):
        value = entries[0]["conversations"][0]["value"]
        turns = [{"from": "human", "value": "<video>" * ("video" in change) + value}, entries[0]["conversations"][1]]
        path.write_text(json.dumps([{**entries[0], "conversations": turns, **change}]))
        with pytest.raises(ValueError, match=message):
            inference_uses.measure("tokens", settings, [0.5], progress=False)


def test_prompts_that_say_which_frames_there_are_leave_none_out(folder, monkeypatch):
    model, processor = evaluate.load_checkpoint(str(folder / "base"))
    settings = EvaluationSettings(model=str(folder / "base"), data=str(folder / "clips" / "test.json"), max_samples=2)
    monkeypatch.setattr(processor, "add_time_instruction", True)
    options = {"model": model, "processor": processor, "progress": False}
    with pytest.raises(ValueError, match="add_time_instruction"):
        inference_uses.measure("key_frames", settings, [2], **options)
    inference_uses.measure("tokens", settings, [0.5], **options)  # all frames are there, if not all of their tokens


def test_the_commands_from_training_to_tables(folder, tmp_path, capsys):
    data, model, results = str(folder / "clips" / "test.json"), str(tmp_path / "model"), str(tmp_path / "results")
    options = ["--model", model, "--data", data, "--results", results, "--device", "cpu"]
    train = ["train", "--model", str(folder / "base"), "--data", data, "--output", model]
    inference_uses.main([*train, "--steps", "2", "--batch-size", "4", "--num-frames", "2", "3"])
    log = json.loads((tmp_path / "model" / "trainer_state.json").read_text())
    assert log["global_step"] == 2 and "skill" in log["log_history"][0]
    inference_uses.main(["key-frames", *options, "--num-kept", "3"])
    inference_uses.main(["tokens", *options, "--shares", "0.5", "0.5", "--max-samples", "4", "--batch-size", "2"])
    capsys.readouterr()
    inference_uses.main(["tables", "--results", results])
    printed = capsys.readouterr().out
    assert "key-frames --model" in printed and "0.5 of the tokens - EVS" in printed and "3 frames - uniform" in printed
    raw = json.loads((tmp_path / "results" / "key_frames_test.json").read_text())
    assert len(raw["questions"]) == 8 and raw["settings"]["batch_size"] == 32
    for job in ("key-frames", "prefill"):
        with pytest.raises(SystemExit):
            inference_uses.main([job, *(options[:-2] if job == "key-frames" else ()), "--device", "gpu"])
        assert "device is 'gpu', expected one that is there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        inference_uses.main(["key-frames", *options, "--num-kept", "99"])
    assert "99 frames were asked for" in capsys.readouterr().err


def test_decoded_samples_are_those_of_the_data_set(folder):
    _, processor = evaluate.load_checkpoint(str(folder / "base"))
    dataset = LlavaVideoDataset(folder / "clips" / "test.json", processor)
    decoded = DecodedSamples(dataset, progress=False)
    assert len(decoded) == len(dataset) and decoded.processor is processor
    for name, value in dataset[1].items():
        if name == "pixel_values_videos":
            torch.testing.assert_close(decoded[1][name], value, rtol=1e-3, atol=1e-3)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(decoded[1][name], value)
