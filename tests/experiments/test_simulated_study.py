"""The study on recorded clips: linear ceilings, the small model and a pretrained language model, at a tiny size."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from modules import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llava_next_ar.experiments.sources.clips import ClipQuestion, LibraryBuilder
from llava_next_ar.experiments.sources.metaworld_clips import MetaworldSettings
from llava_next_ar.experiments.sources.vizdoom_clips import VizdoomSettings
from llava_next_ar.experiments.study import runs as study_runs
from llava_next_ar.experiments.study import study
from llava_next_ar.experiments.study import tables as study_tables
from llava_next_ar.experiments.study.ceilings import (
    clip_features,
    measure_ceilings,
    neighbour_products,
    ridge_accuracy,
)
from llava_next_ar.experiments.study.data import SimulatedSettings, Vocabulary, open_data
from llava_next_ar.experiments.study.features import FeatureBank, StackedFeatures
from llava_next_ar.experiments.study.language_models import IMAGE_TOKEN, VIDEO_TOKEN, language_weights, open_vocabulary
from llava_next_ar.experiments.study.runs import build_model, read_run, run_variant
from llava_next_ar.experiments.study.tables import ceilings_table, pair_wins, read_ceilings
from llava_next_ar.experiments.study.variants import EXPERIMENTS, RunSettings, Variant

T, SIZE = 4, 56
SIDES = ("left", "right")
OBJECTS = ("door", "drawer")


def moving_square(right: bool, start: int, seed: int) -> np.ndarray:
    """Frames `[T, SIZE, SIZE, 3]`: a bright square on noise that moves by one patch of 14 pixels from frame to frame."""
    frames = np.random.default_rng(seed).integers(0, 40, size=(1, SIZE, SIZE, 3), dtype=np.uint8).repeat(T, axis=0)
    for t in range(T):
        column = (start + (t if right else -t)) % 4 * 14
        frames[t, 14:42, column : column + 14] = 230
    return frames


def moving_clips() -> LibraryBuilder:
    built, seed = LibraryBuilder(), 0
    for split, number in (("train", 32), ("val", 8), ("test", 8)):
        for n in range(number):
            seed += 1
            asked = ClipQuestion(question_type="turn", text="which way ?", choices=SIDES, answer=SIDES[n % 2])
            frames = moving_square(n % 2 == 1, n // 2 % 4, seed)
            built.add_clip(frames, name=f"{split}_turn_{n}", split=split, group=split, questions=[asked])
    for split in ("val", "test"):
        changed = moving_square(True, 0, 0)
        changed[2:] = 255
        built.add_pair(
            moving_square(True, 0, 0), changed, name=f"{split}_warp", split=split, group=split, event="warp"
        )
    return built


def still_clips(asked: bool) -> LibraryBuilder:
    built = LibraryBuilder()
    for split, number in (("train", 8), ("val", 4), ("test", 4)):
        for n in range(number if asked else 0):
            frames = np.full((T, SIZE, SIZE, 3), 60 + 120 * (n % 2), dtype=np.uint8)
            asked = ClipQuestion(question_type="object", text="which object ?", choices=OBJECTS, answer=OBJECTS[n % 2])
            built.add_clip(frames, name=f"{split}_object_{n}", split=split, group=split, questions=[asked])
    for split in ("val", "test"):
        for event in ("gone", "light") if asked else ("stuck",):
            possible = np.full((T, SIZE, SIZE, 3), 60, dtype=np.uint8)
            changed = possible.copy()
            changed[2:] += 50 if event == "light" else 150
            name = f"{split}_{event}"
            built.add_pair(
                possible, changed, name=name, split=split, group=split, event=event, impossible=event == "gone"
            )
    return built


SETTINGS = SimulatedSettings(
    vizdoom=VizdoomSettings(num_frames=T, image_size=SIZE),
    metaworld=MetaworldSettings(num_frames=T, image_size=SIZE),
    motions=MetaworldSettings(name="motions", num_frames=T, image_size=SIZE),
    question_types=("turn", "object"),
    tower_layers=1,
)
TINY = {"data": SETTINGS, "num_steps": 3, "batch_size": 4, "warmup_steps": 1, "curve_points": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache whose clips are drawn here instead of recorded, with a tower of random weights."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VizdoomSettings, "record", lambda self: moving_clips())
        patch.setattr(MetaworldSettings, "record", lambda self: still_clips(asked=self.name == "metaworld"))
        open_data(SETTINGS, folder)
    write_tiny_language_model(folder / "language_model")
    return folder


@pytest.fixture(autouse=True)
def random_tower(monkeypatch):
    tower = build_model(RunSettings(data=SETTINGS, num_layers=1), 0, Vocabulary([])).model.vision_tower.eval()
    monkeypatch.setattr(study_runs, "load_tower", lambda folder, **keys: tower)


@pytest.fixture
def data(cache):
    return open_data(SETTINGS, cache)


@pytest.fixture
def bank(data, cache):
    return study_runs.open_bank(data, cache)


def write_tiny_language_model(folder) -> None:
    words = [*SIDES, *OBJECTS, "which", "way", "object", "?"]
    vocab = {word: number for number, word in enumerate(["<pad>", IMAGE_TOKEN, VIDEO_TOKEN, "<end>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=len(vocab), tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(7)
    LlamaForCausalLM(config).save_pretrained(folder)


# --- features and ceilings ----------------------------------------------------------------------------------------


def test_stacked_features_are_those_of_their_parts():
    parts = [np.arange(6.0).reshape(3, 2), 10 + np.arange(4.0).reshape(2, 2)]
    stacked, whole = StackedFeatures(parts), np.concatenate(parts)
    assert len(stacked) == 5
    for index in (np.array([4, 0, 3, 0]), slice(1, 4), np.array([2])):
        assert np.array_equal(stacked[index], whole[index])


def test_clip_features_are_averaged_to_the_grid_of_the_probes():
    features = np.random.default_rng(0).normal(size=(3, 1 + 64, 5)).astype(np.float32)
    bank = FeatureBank(features, torch.zeros(5), torch.tensor(1.0))
    grid = clip_features(bank, np.array([2, 0]))
    assert grid.shape == (2, 4, 4, 5)
    patches = torch.from_numpy(features[2, 1:]).view(8, 8, 5)
    torch.testing.assert_close(grid[0, 1, 3], patches[2:4, 6:8].mean((0, 1)))


def test_products_pair_each_patch_with_its_neighbours_in_the_next_frame():
    """A patch that moves to the right by one has its greatest product at that offset."""
    features = torch.zeros(3, 4, 4, 1)
    for t in range(3):
        features[t, 2, t] = 1.0
    products = neighbour_products(features).view(2, 9, 1)
    assert products.shape[1] == 9 and products.argmax(1).flatten().tolist() == [5, 5]  # down 0, right 1
    assert products[0, 5].item() == pytest.approx(1 / 12)  # of 4 rows and 3 columns with a right neighbour
    assert products.sum() == products[:, 5].sum()


def test_a_ridge_probe_separates_what_is_linear_and_nothing_else():
    rng = torch.Generator().manual_seed(0)
    features = {name: torch.randn(200, 10, generator=rng) for name in ("train", "val", "test")}
    linear = {name: (own[:, 0] > 0).long() for name, own in features.items()}
    product = {name: (own[:, 0] * own[:, 1] > 0).long() for name, own in features.items()}
    for labels, low, high in ((linear, 0.9, 1.0), (product, 0.35, 0.65)):
        parts = [(features[name], labels[name]) for name in ("val", "test")]
        assert low <= ridge_accuracy(features["train"], labels["train"], parts)[1] <= high


def test_ceilings_separate_static_from_temporal_questions(data, bank, cache, tmp_path):
    entries = {entry["question_type"]: entry for entry in measure_ceilings(data, bank)}
    assert entries["object"]["single frame"] == entries["object"]["mean frame"] == 1.0
    # All starts are equally frequent in both directions: a frame alone does not help, products do.
    assert entries["turn"]["products"] == 1.0 and entries["turn"]["mean frame"] <= 0.75
    assert entries["turn"]["num_train"] == 32 and entries["turn"]["chance"] == 0.5
    path = study.write_ceilings(SETTINGS, results=tmp_path, cache=cache)
    assert json.loads(path.read_text())["tower"] == study_runs.TOWER_WHEEL
    assert "| turn | 32 | 8 | 0.50 |" in ceilings_table(read_ceilings(tmp_path))


# --- runs ---------------------------------------------------------------------------------------------------------


def test_a_run_on_recorded_clips(data, bank):
    variant = Variant(experiment="simulated", name="weight-1", title="1", changes={
        **EXPERIMENTS["simulated"].variants[-1].changes, **TINY, "num_layers": 1,
    })  # fmt: skip
    run = run_variant(variant, RunSettings(), 0, data, bank)
    assert {name: len(digits) for name, digits in run["answers"].items()} == {"object": 4, "turn": 8}
    assert run["frames"]["skill"] != 0 and run["settings"]["layout"] == {"mm_spatial_pool_stride": 2}
    assert {name: len(digits) for name, digits in run["pairs"]["error_frame"].items()} == {
        "gone": 1,
        "light": 1,
        "stuck": 1,
        "warp": 1,
    }
    assert len(pair_wins(run, "error_frame")) == 3  # the change of light is not an impossible event
    assert len(pair_wins(run, "error_frame", "light")) == 1


def test_a_pretrained_language_model_is_cut_to_its_first_layers(cache, bank):
    vocabulary = open_vocabulary(cache)
    assert vocabulary.special == (0, 2, 1, 3) and vocabulary.encode("left ?") == (5, 12)
    settings = RunSettings(**{**TINY, "language_model": "tiny", "num_layers": 2, "head": {"embedding_dim": 16}})
    model = build_model(settings, 0, vocabulary, bank, cache)
    whole = LlamaForCausalLM.from_pretrained(cache / "language_model")
    assert len(model.model.language_model.layers) == 2 and len(language_weights(cache, 2)) == 2 * 9 + 2
    for name, weight in model.model.language_model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="num_layers is 4, expected 1 to 3"):
        build_model(replace(settings, num_layers=4), 0, vocabulary, bank, cache)


@pytest.mark.parametrize("name", ["pretrained", "pretrained-few-labels", "pretrained-pilot"])
def test_the_experiments_with_a_pretrained_language_model_run_whole(cache, tmp_path, monkeypatch, name):
    """The rehearsal of `study.py run --experiment pretrained`: each variant and seed, then the tables."""
    experiment = EXPERIMENTS[name]
    small = {
        **TINY,
        "num_layers": 2,
        "measured_share": 1.0,
        "train_share": 0.5 if name == "pretrained-few-labels" else 1.0,
    }
    variants = tuple(
        replace(
            variant, changes={**variant.changes, **small, "head": {**variant.changes["head"], "embedding_dim": 16}}
        )
        for variant in experiment.variants
    )
    tiny = {name: replace(experiment, variants=variants, num_seeds=2)}
    for module in (study, study_tables):
        monkeypatch.setattr(module, "EXPERIMENTS", tiny)
    (tmp_path / study.CEILINGS).write_text(json.dumps({"question_types": [
        {"question_type": kind, "single frame": 0.5, "mean frame": 0.5, "shuffled": 0.5, "ordered": 0.5, "products": 1.0,
         "num_train": 1, "num_test": 1, "chance": 0.5} for kind in ("turn", "object")
    ]}))  # fmt: skip
    options = {"results": tmp_path, "cache": cache}
    assert study.run_experiments([name], RunSettings(), **options, seeds=[0]) == len(variants)
    assert "This table was interrupted: some runs are missing." in study.write_tables([name], RunSettings(), tmp_path)
    assert study.run_experiments([name], RunSettings(), **options) == len(variants)
    text = study.write_tables([name], RunSettings(), tmp_path)
    assert "interrupted" not in text and "2 of 2 seeds each." in text
    weights = {variant.name: variant.changes["head"]["loss_weight"] for variant in variants}
    for variant in variants:
        skill = read_run(tmp_path, variant, RunSettings(), 0)["frames"]["skill"]
        assert (skill == 0) == (weights[variant.name] == 0)


def test_an_accelerator_that_is_not_there_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        study.main(["run", "--experiment", "pretrained", "--device", "accelerator"])
    assert raised.value.code == 2
    assert "--device is accelerator, and PyTorch finds none here" in capsys.readouterr().err


# --- tables in the repository -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["simulated", "pretrained-pilot"])
def test_the_summaries_in_the_repository_are_what_their_runs_say(tmp_path, name):
    ceilings = (study.RESULTS / study.CEILINGS).read_text()
    (tmp_path / study.CEILINGS).write_text(ceilings)
    (tmp_path / name).symlink_to(study.RESULTS / name)
    study.write_summaries([name], RunSettings(), tmp_path)
    written = (tmp_path / f"{name}_summary.md").read_text()
    assert written == (study.RESULTS / f"{name}_summary.md").read_text()


@pytest.mark.parametrize("name", ["simulated_ceilings.md", "simulated_summary.md"])
def test_the_page_shows_the_tables_of_the_repository(name):
    page = (ROOT / "docs" / "study.md").read_text()
    tables = [part for part in (study.RESULTS / name).read_text().split("\n\n") if part.startswith("|")]
    assert tables and all(table.strip() in page for table in tables)
