"""The study: its variants, its cached features, and how its numbers become tables."""

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_next_ar.experiments.sources.drawn_clips import drawn_library
from llava_next_ar.experiments.study import features as study_features
from llava_next_ar.experiments.study import runs as study_runs
from llava_next_ar.experiments.study import study
from llava_next_ar.experiments.study import tables as study_tables
from llava_next_ar.experiments.study.data import (
    END,
    PAD,
    VIDEO,
    DataSettings,
    StudyData,
    StudyQuestion,
    StudySamples,
    open_data,
)
from llava_next_ar.experiments.study.features import (
    FeatureBank,
    StandardizedTower,
    encode_frames,
    feature_statistics,
    normalized_pixels,
    open_features,
)
from llava_next_ar.experiments.study.measures import (
    SCORES,
    WHERE,
    clip_scores,
    measure_answers,
    measure_frames,
    measure_pairs,
)
from llava_next_ar.experiments.study.runs import as_json, build_model, read_run, run_path, training_samples, write_run
from llava_next_ar.experiments.study.tables import (
    CHEAP_SCORE,
    SURPRISE_SCORE,
    accuracy,
    bootstrap_of_mean,
    format_table,
    mean_interval,
    pair_accuracy,
    read_ceilings,
    read_experiment,
)
from llava_next_ar.experiments.study.variants import EXPERIMENTS, Experiment, RunSettings, Variant
from llava_next_ar.experiments.temporal.benchmark import make_clips
from llava_next_ar.modeling.frame_surprise import VideoSurprise
from llava_next_ar.training.collator import LlavaVideoCollator

TINY_DATA = DataSettings(
    num_train=4,
    num_watched=4,
    num_val=4,
    num_test=4,
    num_val_pairs=2,
    num_test_pairs=4,
    frame_step=2,
    image_size=28,
    tower_layers=1,
)
TINY = RunSettings(
    data=TINY_DATA,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_attention_heads=2,
    head={"embedding_dim": 16, "num_heads": 2},
    batch_size=4,
    num_steps=3,
    learning_rate=1e-3,  # with more, three steps go astray
    warmup_steps=1,
    curve_points=2,
)


@pytest.fixture(scope="module")
def data():
    return StudyData(TINY_DATA, [drawn_library(TINY_DATA)])


@pytest.fixture(scope="module")
def tower(data):
    return build_model(TINY, 0, data.vocabulary).model.vision_tower.eval()


@pytest.fixture(scope="module")
def raw_features(data, tower):
    return encode_frames(tower, np.concatenate([data.frames(clip) for clip in range(len(data.library.clips))])).numpy()


@pytest.fixture(scope="module")
def bank(raw_features):
    return FeatureBank(raw_features, *feature_statistics(raw_features))


def all_variants() -> list[Variant]:
    return list(
        {
            (variant.experiment, variant.name): variant for table in EXPERIMENTS.values() for variant in table.variants
        }.values()
    )


def tiny(variant: Variant) -> RunSettings:
    """Tiny settings of a variant: drawn clips and a language model with random weights."""
    return replace(variant.settings(TINY), data=TINY_DATA, language_model="", num_layers=1, batch_size=4)


# --- data ----------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_of_clips_that_are_only_watched_and_all_of_them_are_possible(data):
    watched = [question.clip for question in data.questions["train"] if not question.prompt]
    assert len(watched) == TINY_DATA.num_watched
    drawn = make_clips(2 * TINY_DATA.num_watched, split="train", levels=["easy"], question_types=["possible"])
    answers = {clip.name: clip.draft.questions[0].answer for clip in drawn}
    assert [answers[data.library.clips[clip].name] for clip in watched] == ["possible"] * len(watched)
    assert all(question.prompt for split in ("val", "test") for question in data.questions[split])


def test_questions_and_pairs_point_to_their_clips(data):
    for split, questions in data.questions.items():
        asked = [question for question in questions if question.prompt]
        assert {question.question_type for question in asked} == set(TINY_DATA.question_types)
        for question in asked:
            assert question.id == f"{data.library.clips[question.clip].name}_{question.question_type}"
            assert question.id.startswith(split)
    for split, number in (("val", TINY_DATA.num_val_pairs), ("test", TINY_DATA.num_test_pairs)):
        assert len(data.pairs[split]) == number
        for pair in data.pairs[split]:
            possible, impossible = (data.frames(clip) for clip in (pair.possible, pair.changed))
            differs = (possible != impossible).any(axis=(1, 2, 3))
            assert not differs[: pair.event_frame].any() and differs[pair.event_frame]


def test_a_sample_is_the_video_the_question_and_one_token_of_answer(data):
    layout = build_model(TINY, 0, data.vocabulary).config.frame_token_layout
    question = data.questions["train"][0]
    sample = StudySamples(data, [question], layout)[0]
    answer = question.choices[question.answer]
    num_video = layout.num_tokens(7)
    assert sample["input_ids"].tolist() == [VIDEO] * num_video + [*question.prompt, answer, END]
    assert sample["labels"].tolist() == [-100] * (num_video + len(question.prompt)) + [answer, END]
    numbers = sample["pixel_values_videos"].flatten().tolist()
    assert numbers == [question.clip * 7 + frame for frame in range(7)]
    assert sample["video_timestamps"][0].tolist() == [0.5 * frame for frame in range(7)]
    silent = StudySamples(data, [StudyQuestion(clip=question.clip)], layout)[0]
    assert silent["input_ids"].tolist() == [VIDEO] * num_video + [END] and set(silent["labels"].tolist()) == {-100}


def test_shuffled_frames_are_all_frames_and_the_same_for_both_clips_of_a_pair(data):
    moved = 0
    for pair in data.pairs["test"]:
        orders = [data.frame_numbers(clip, shuffled=True) - 7 * clip for clip in (pair.possible, pair.changed)]
        assert orders[0].tolist() == orders[1].tolist() and sorted(orders[0]) == list(range(7))
        moved += orders[0].tolist() != list(range(7))
    assert moved


# --- features computed before --------------------------------------------------------------------------------------


def test_training_on_the_bank_gives_the_losses_and_weights_of_training_on_pixels(data, tower, bank):
    """The very reason why the study's numbers speak about the package: only the tower's pass is left out."""
    seen, numbers = {}, [0, 4, 8, 12]
    for name, own in (("pixels", StandardizedTower(tower, bank.mean, bank.deviation)), ("bank", bank)):
        model = build_model(TINY, 0, data.vocabulary, own)
        samples = StudySamples(data, data.questions["train"], model.config.frame_token_layout)
        batch = LlavaVideoCollator(PAD)([samples[number] for number in numbers])
        if name == "pixels":
            frames = [data.frames(data.questions["train"][number].clip) for number in numbers]
            batch["pixel_values_videos"] = torch.stack([normalized_pixels(some) for some in frames])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(3):
            outputs = model.train()(**batch, skip_logits=True)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append([outputs.main_loss.item(), outputs.autoregressive_loss.item()])
        weights = {n: p.detach() for n, p in model.named_parameters() if "vision_tower" not in n}
        seen[name] = losses, weights
    np.testing.assert_allclose(*(losses for losses, _ in seen.values()), rtol=1e-5)
    assert losses[2][1] < losses[0][1]  # or nothing would have been compared
    for name, weight in seen["pixels"][1].items():
        torch.testing.assert_close(seen["bank"][1][name], weight, atol=1e-4, rtol=1e-3)


def test_patches_are_standardized_and_the_class_token_counts_as_none():
    features = np.random.default_rng(0).normal([3, 0, -1, 2], [2, 1, 1, 1], size=(50, 5, 4)).astype(np.float32)
    features[:, 0] = 1000.0
    bank = FeatureBank(features, *feature_statistics(features))
    patches = bank(torch.arange(50.0).view(50, 1, 1, 1)).hidden_states[-1][:, 1:].flatten(0, 1)
    torch.testing.assert_close(patches.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.square().mean(), torch.tensor(1.0))
    assert 1.7 < patches[:, 0].std() / patches[:, 1].std() < 2.3


def test_features_are_computed_once_and_a_half_written_file_is_none(tmp_path, data, tower, raw_features):
    path, calls = tmp_path / "features.npy", []

    def frames_of(clip):
        calls.append(clip)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return data.frames(clip)

    with pytest.raises(KeyboardInterrupt):
        open_features(path, 20, frames_of, lambda: tower)
    assert not path.exists()
    features = open_features(path, 20, data.frames, lambda: tower)
    np.testing.assert_allclose(features, raw_features[: 20 * 7], atol=1e-5)
    again = open_features(path, 20, frames_of, lambda: pytest.fail("the tower was called again"))
    assert np.array_equal(again, features)


def test_the_onnx_file_becomes_a_dinov2(tmp_path):
    width, numpy_helper = study_features.TOWER_WIDTH, onnx.numpy_helper
    rng = np.random.default_rng(0)
    arrays = {
        "backbone.encoder.layer.0.attention.attention.query.bias": rng.normal(size=width),
        "onnx::MatMul_7": rng.normal(size=(width, width)),
        "onnx::Concat_8": rng.normal(size=(1, 1, width)),
        "onnx::Reshape_9": rng.normal(size=(1, study_features.POSITIONS, width)),
        "decoder.bias": rng.normal(size=3),
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    node = onnx.helper.make_node(
        "MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/backbone/encoder/layer.0/attention/attention/query/MatMul"
    )
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph([node], "tower", [], [], initializer=tensors)
    written = study_features.dinov2_state(onnx.helper.make_model(graph).SerializeToString())
    save_file(written, tmp_path / "model.safetensors")  # which takes contiguous tensors alone
    state = load_file(tmp_path / "model.safetensors")
    query = "encoder.layer.0.attention.attention.query"
    assert set(state) == {
        f"{query}.weight", f"{query}.bias", "embeddings.position_embeddings", "embeddings.mask_token"
    }  # fmt: skip
    assert np.array_equal(state[f"{query}.weight"], arrays["onnx::MatMul_7"].T)
    assert np.array_equal(state["embeddings.position_embeddings"][:, 1:], arrays["onnx::Reshape_9"])


# --- variants ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", all_variants(), ids=lambda variant: f"{variant.experiment}/{variant.name}")
def test_a_variant_differs_in_what_it_names_alone(variant):
    common, own = (as_json(settings) for settings in (RunSettings(), variant.settings(RunSettings())))
    changed = {name for name in own if own[name] != common[name]}
    assert changed and changed <= set(variant.changes)
    for name in changed & {"head", "layout"}:
        assert own[name] == {**common[name], **variant.changes[name]}


@pytest.mark.parametrize("variant", all_variants(), ids=lambda variant: f"{variant.experiment}/{variant.name}")
def test_the_model_of_a_variant_learns_what_the_variant_names(data, bank, variant):
    settings = replace(tiny(variant), batch_size=2)  # few enough for a tenth of the labels
    model = build_model(settings, 0, data.vocabulary, bank).train()
    samples = training_samples(settings, 0, data, model)
    batch = LlavaVideoCollator(PAD)([samples[0], samples[len(samples) - 1]])
    outputs = model(**batch, return_reconstruction=True)
    weight = model.config.autoregressive_config.loss_weight
    assert settings.head["loss_weight"] == weight  # named by the variant, whatever the default is
    expected = outputs.main_loss + weight * outputs.autoregressive_loss
    assert outputs.loss.item() == pytest.approx(expected.item())
    grids = set(map(tuple, outputs.reconstruction.grids.tolist()))
    pooled = {"slow-fast": {(2, 2), (1, 1)}}
    expected = {(1, 1)} if settings.layout.get("mm_spatial_pool_stride") == 2 else {(2, 2)}
    assert grids == pooled.get(variant.name, expected)
    outputs.loss.backward()
    learns = model.autoregressive_module.change.weight.grad.abs().max().item() > 0
    assert learns == (weight > 0)


def test_variants_of_a_table_share_first_weights_and_samples(data, bank):
    for table in EXPERIMENTS.values():
        if table.name in ("layout", "few-labels", "pretrained-few-labels", "patience"):
            continue  # their models, batches or steps differ, which is what they are about
        weights, orders = [], []
        for variant in table.variants:
            settings = tiny(variant)
            model = build_model(settings, 3, data.vocabulary, bank)
            weights.append(torch.nn.utils.parameters_to_vector(model.parameters()))
            orders.append(training_samples(settings, 3, data, model).indices)
        assert all(torch.equal(one, weights[0]) for one in weights)
        assert all(order == orders[0] for order in orders)


def test_few_labels_are_the_same_with_and_without_more_clips(data, bank):
    table = EXPERIMENTS["few-labels"]
    asked, questions = {}, data.questions["train"]
    for variant in table.variants:
        settings = replace(variant.settings(TINY), train_share=0.25, num_steps=20)
        model = build_model(settings, 1, data.vocabulary, bank)
        samples = training_samples(settings, 1, data, model)
        steps = np.array(samples.indices).reshape(20, -1)
        asked[variant.name] = steps[:, :4].tolist()
        labels = [(samples[number]["labels"] != -100).any().item() for number in range(steps.shape[1])]
        drawn = [samples.dataset.questions[number] for number in steps[0, :4]]
        assert labels == [bool(question.prompt) for question in drawn] + [False] * (steps.shape[1] - 4)
        assert any(labels)
        shown = {samples.dataset.questions[number].clip for number in steps[:, 4:].flatten()}
        assert shown == ({question.clip for question in questions} if variant.name == "objective-on-all" else set())
    first, *others = asked.values()
    assert all(other == first for other in others)
    assert len({number for step in first for number in step}) == round(0.25 * len(questions))


def test_a_share_of_labels_too_small_for_a_step_is_refused(data, bank):
    settings = replace(TINY, train_share=0.02)
    model = build_model(settings, 0, data.vocabulary, bank)
    with pytest.raises(ValueError, match="train_share is 0.02, which leaves 0 of 16 samples"):
        training_samples(settings, 0, data, model)


# --- measures ------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_most_probable_choice(data, bank):
    model, questions = build_model(TINY, 0, data.vocabulary, bank).eval(), data.questions["test"]
    right = measure_answers(model, data, questions)
    for number in (0, 7, len(questions) - 1):  # one by one, unpadded
        sample = StudySamples(data, questions, model.config.frame_token_layout, answered=False)[number]
        batch = LlavaVideoCollator(PAD)([sample])
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0, -1]
        choices = questions[number].choices
        assert right[number] == (max(choices, key=lambda token: logits[token]) == choices[questions[number].answer])
    assert 0 < sum(right) < len(right)


def test_an_untrained_head_copies_and_a_copying_head_is_as_surprised_as_frames_differ(data, bank):
    model = build_model(TINY, 0, data.vocabulary, bank).eval()
    frames = measure_frames(model, data, [0, 1, 2])
    assert frames["skill"] == 0 and frames["mse"] == frames["copy_mse"] > 0
    assert frames["linear_skill"] == 1 - frames["linear_mse"] / frames["copy_mse"] < 0
    wins = measure_pairs(model, data, data.pairs["test"])
    assert set(wins) == set(SCORES) and all(len(some) == TINY_DATA.num_test_pairs for some in wins.values())
    assert all(wins[f"error_{where}"] == wins[f"difference_{where}"] for where in WHERE)


def test_a_clip_is_scored_from_the_event_on():
    def maps(*values):
        return [torch.tensor([value, 0.0]).view(1, 2) for value in values]

    surprise = VideoSurprise(
        frame_index=torch.tensor([1, 2, 3]),
        seconds=torch.arange(3.0),
        frames=torch.tensor([9.0, 2.0, 3.0]),
        patches=maps(9.0, 4.0, 1.0),
        errors=maps(9.0, 1.0, 3.0),
        copy_errors=maps(9.0, 5.0, 1.0),
        floors=torch.full((3,), 0.1),
    )
    assert clip_scores(surprise, 2) == {
        "surprise_at_event": 2.0,
        "surprise_frame": 3.0,
        "surprise_patch": 4.0,
        "error_at_event": 0.5,
        "error_frame": 1.5,
        "error_patch": 3.0,
        "difference_at_event": 2.5,
        "difference_frame": 2.5,
        "difference_patch": 5.0,
    }


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_variants(monkeypatch):
    variants = tuple(
        Variant(experiment="pair", name=name, title=name, changes={"head": {"loss_weight": weight}})
        for name, weight in (("off", 0.0), ("on", 1.0))
    )
    table = Experiment(name="pair", title="On and off", variants=variants, num_seeds=2)
    for module in (study, study_tables):
        monkeypatch.setattr(module, "EXPERIMENTS", {"pair": table})
    return table


def test_a_table_goes_on_where_it_was_stopped(tmp_path, monkeypatch, two_variants, bank):
    calls = []

    def run_variant(variant, common, seed, data, bank, **options):
        calls.append((variant.name, seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"settings": as_json(variant.settings(common)), "tower": study_features.TOWER_WHEEL}

    monkeypatch.setattr(study, "run_variant", run_variant)
    monkeypatch.setattr(study, "open_bank", lambda data, cache: bank)
    options = {"results": tmp_path / "results", "cache": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        study.run_experiments(["pair"], TINY, **options)
    assert study.run_experiments(["pair"], TINY, **options) == 2
    assert calls == [("off", 0), ("on", 0), ("off", 1), ("off", 1), ("on", 1)]
    assert study.run_experiments(["pair"], TINY, **options) == 0 and len(calls) == 5
    with pytest.raises(ValueError, match=r"off_seed0.json was made with other settings \(num_steps\)"):
        study.run_experiments(["pair"], replace(TINY, num_steps=4), **options)
    monkeypatch.setattr(study_runs, "TOWER_WHEEL", "another==1.0")
    with pytest.raises(ValueError, match=r"off_seed0.json was made with other settings \(tower\)"):
        study.run_experiments(["pair"], TINY, **options)


def test_a_seed_that_no_table_shows_is_not_run(tmp_path, two_variants):
    with pytest.raises(ValueError, match="seeds 2, 5 belong to no experiment of pair"):
        study.run_experiments(["pair"], TINY, results=tmp_path, cache=tmp_path, seeds=[0, 5, 2])


def test_the_whole_way_from_clips_to_a_table(tmp_path, monkeypatch, two_variants, tower):
    monkeypatch.setattr(study_runs, "load_tower", lambda folder, **keys: tower)
    results = tmp_path / "results"
    assert study.run_experiments(["pair"], TINY, results=results, cache=tmp_path / "cache") == 4
    off, on = (read_run(results, variant, TINY, 0) for variant in two_variants.variants)
    assert off["frames"]["skill"] == 0 != on["frames"]["skill"]
    assert [point["step"] for point in on["curve"]] == [2, 3]
    assert [entry["step"] for entry in on["training_log"]] == [1, 2, 3]
    assert on["training_log"][0] == off["training_log"][0]  # the first loss is that of the first weights
    assert on["training_log"][2]["autoregressive_loss"] < off["training_log"][2]["autoregressive_loss"]
    assert sum(map(len, on["answers"].values())) == 4 * 3 and sum(map(len, on["pairs"]["error_frame"].values())) == 4
    again = study_runs.run_variant(two_variants.variants[1], TINY, 0, *_data_and_bank(tmp_path / "cache"))
    assert {**again, "cpu_seconds": 0, "seconds": 0} == {**on, "cpu_seconds": 0, "seconds": 0}
    text = study.write_tables(["pair"], TINY, results)
    assert "2 of 2 seeds each" in text and (results / "pair.md").read_text() == text + "\n"
    for name in ("pair_curves.png", "pair_types.png", "pair_type_curves.png"):
        assert (results / name).stat().st_size > 5_000


def _data_and_bank(cache):
    data = open_data(TINY_DATA, cache)
    return data, study_runs.open_bank(data, cache)


# --- numbers ---------------------------------------------------------------------------------------------------------


def a_run(answers: str, pairs: str, skill: float) -> dict:
    return {
        "tower": study_features.TOWER_WHEEL,
        "answers": {"color": answers},
        "answers_shuffled": {"color": answers[::-1]},
        "frames": {"mse": 1 - skill, "skill": skill, "linear_skill": -1.0, "temporal_consistency": 0.5},
        "pairs": {name: {"vanish": "1" * len(pairs)} for name in SCORES} | {SURPRISE_SCORE: {"vanish": pairs}},
    }


def test_intervals_are_students():
    # mean 3, standard deviation 1.5811, of 5: half width 2.7764 * 1.5811 / sqrt(5)
    mean, half = mean_interval([1, 2, 3, 4, 5])
    assert mean == 3 and half == pytest.approx(1.9632, abs=1e-4)
    assert mean_interval([0.25, 0.75]) == (0.5, pytest.approx(12.7062 * 0.25, abs=1e-4))
    assert mean_interval([0.5])[0] == 0.5 and math.isnan(mean_interval([0.5])[1])
    low, high = bootstrap_of_mean([0.0, 1.0] * 200)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005) and high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)


def test_a_table_of_known_numbers(tmp_path, two_variants):
    off, on = two_variants.variants
    for variant, runs in (
        (off, [("1100", "2100", 0.0), ("1110", "2100", 0.0)]),
        (on, [("1110", "2220", 0.3), ("1111", "2221", 0.5)]),
    ):
        for seed, (answers, pairs, skill) in enumerate(runs):
            write_run(
                tmp_path, variant, seed, {**a_run(answers, pairs, skill), "settings": as_json(variant.settings(TINY))}
            )
    runs = read_experiment(two_variants, TINY, tmp_path)
    assert [accuracy(run) for run in runs["off"]] == [0.5, 0.75]
    assert [pair_accuracy(run, SURPRISE_SCORE) for run in runs["on"]] == [0.75, 0.875]
    rows = [
        line.strip("| ").split(" | ")
        for line in format_table(two_variants, runs).splitlines()
        if line.startswith("| ")
    ]
    cells = {row[0]: row[1:] for row in rows}
    # Both seeds are better by 0.25: the difference is certain, though the means are not.
    assert cells["accuracy"] == ["0.625 ± 1.588", "0.875 ± 1.588", "+0.250 ± 0.000"]
    assert cells["skill"] == ["0.000 ± 0.000", "0.400 ± 1.271", "+0.400 ± 1.271"]
    assert [cell.split(" [")[0] for cell in cells[f"{SURPRISE_SCORE}, less {CHEAP_SCORE}"]] == ["-0.125", "+0.312"]
    assert rows[-1] == ["vanish", "0.500", "0.375", "0.812"]  # frame difference, then the variants


def test_what_normalizing_alone_is_worth_is_taken_off(tmp_path, two_variants):
    off, on = two_variants.variants
    for variant, surprise in ((off, "2201"), (on, "2221")):
        run = {**a_run("10", "2210", 0.1), "settings": as_json(variant.settings(TINY))}
        run["pairs"]["surprise_at_event"] = {"vanish": surprise}
        write_run(tmp_path, variant, 0, run)
    lines = format_table(two_variants, read_experiment(two_variants, TINY, tmp_path)).splitlines()
    (row,) = (line for line in lines if line.startswith("| surprise_at_event, less normalized difference_at_event "))
    assert [cell.split(" [")[0] for cell in row.strip("| ").split(" | ")[1:]] == ["+0.000", "+0.250"]
    trained_only = replace(two_variants, variants=(on,))  # nothing in it is the difference alone
    assert "normalized difference" not in format_table(trained_only, read_experiment(trained_only, TINY, tmp_path))


def test_only_seeds_that_all_variants_have_are_compared(tmp_path, two_variants):
    off, on = two_variants.variants
    for variant, seeds in ((off, [0, 1]), (on, [1])):
        for seed in seeds:
            run = {**a_run("10", "20", 0.1), "seed": seed, "settings": as_json(variant.settings(TINY))}
            write_run(tmp_path, variant, seed, run)
    runs = read_experiment(two_variants, TINY, tmp_path)
    assert {name: [run["seed"] for run in some] for name, some in runs.items()} == {"off": [1], "on": [1]}
    assert run_path(tmp_path, off, 1).parent.name == "pair"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_tables_in_the_repository_are_what_their_runs_say(name):
    """And the runs were made with the settings that the variants have now."""
    path = study.RESULTS / f"{name}.md"
    if path.exists():
        runs = read_experiment(EXPERIMENTS[name], RunSettings(), study.RESULTS)
        assert format_table(EXPERIMENTS[name], runs, read_ceilings(study.RESULTS)) + "\n" == path.read_text(
            encoding="utf-8"
        )
    else:
        assert not list((study.RESULTS / name).glob("*.json"))
