"""The model card: its facts about a folder, facts that are left out, and errors."""

import dataclasses
import importlib.metadata
import json
import re
from pathlib import Path

import pytest
import yaml
from card_metadata import check_card
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_security import REQUIRED
from tiny import tiny_model
from transformers.pipelines import SUPPORTED_TASKS

from llava_next_ar.evaluation.tables import format_results
from llava_next_ar.hub.hub_folder import weights_sha256
from llava_next_ar.hub.model_card import CardOptions, build_card
from llava_next_ar.training.recipes import ARGUMENT_CLASSES

FRAMES = {
    **{"num_videos": 2, "num_frames": 6, "mse": 0.5, "copy_mse": 1.0, "skill": 0.5, "cosine": 0.9},
    **{"temporal_consistency": 0.3, "temporal_consistency_chance": 0.125},
}
RESULTS = {
    "settings": {
        **{"data": "clips/test.json", "dtype": "float32", "num_frames": None, "max_samples": None},
        "frame_order": "natural",
    },
    "versions": {"python": "3.11", "torch": "2.13", "transformers": "5.23"},
    "model": {"id": "out", "revision": None, "weights_sha256": None},
    "question_answering": {
        "all": {"num_questions": 4, "chance": 0.25, "best_guess": 0.5, "exact": 0.75, "exact_interval": [0.5, 1.0]},
        "by_type": {},
    },
    "reconstruction": {**FRAMES, "by_gap": [], "rollout": None},
    "num_bad_samples": 0,
    "table": "questions  exact\n4  0.750",
    "bad_samples": [],
    "seconds": 1.0,
    "answers": [],
}
RESULTS["table"] = format_results(RESULTS, problems=False)


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_the_card_lists_what_its_code_needs(folder):
    """All direct requirements of the model's code, in the ranges of the package."""
    text = build_card(folder, "ann/model").text
    (line,) = re.findall(r"^pip install (.*)$", text, re.MULTILINE)
    wanted = {Requirement(part) for part in re.findall('"([^"]*)"', line)}
    assert wanted < {Requirement(part) for part in importlib.metadata.requires("llava-next-ar")}
    brought, waiting = set(), [one.name for one in wanted]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in brought:
            brought.add(name)
            found = map(Requirement, importlib.metadata.requires(name) or ())
            waiting += [one.name for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    names = {canonicalize_name({"PIL": "pillow"}.get(module, module)) for module in REQUIRED}
    assert names < brought


def test_no_place_and_no_name_of_the_recipe_goes_into_the_card(folder):
    """Keys with free text that stay in the card; each new key of transformers needs a decision."""
    shown = set(
        """
        dtype attn_implementation trainable lora_target_modules on_bad_sample sampling short_clip video_backend resize_backend
        bad_step_action lr_scheduler_type lr_scheduler_kwargs optim optim_args optim_target_modules
        activation_checkpointing_kwargs gradient_checkpointing_kwargs torch_compile_backend torch_compile_mode
        logging_strategy include_num_input_tokens_seen log_level log_level_replica eval_strategy include_for_metrics
        save_strategy metric_for_best_model dataloader_multiprocessing_context label_names train_sampling_strategy
        length_column_name ddp_backend fsdp debug liger_kernel_config
        """.split()
    )
    keys = {f.name for arguments in ARGUMENT_CLASSES for f in dataclasses.fields(arguments) if "str" in str(f.type)}
    keys |= {"parallelism_config", "autoregressive_config.loss_type"}
    (folder / "train_config.yaml").write_text(yaml.safe_dump(dict.fromkeys(keys, "/home/ann")))
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```", build_card(folder, "a/b").text, re.MULTILINE | re.DOTALL)
    assert yaml.safe_load(recipe).keys() == shown & keys | {"autoregressive_config.loss_type"}


def test_the_card_states_the_objective_that_was_trained(folder):
    text = build_card(folder, "ann/model").text
    assert "with `loss_weight` 1.0" in text or "with `loss_weight` 0.1" in text
    assert "mean squared error between" in text and "each patch normalised" in text
    assert "smooth L1" not in text and "cosine distance" not in text
    config = json.loads((folder / "config.json").read_text())
    config["autoregressive_config"] |= {"loss_type": "cosine", "target_norm": False, "loss_weight": 0.25}
    (folder / "config.json").write_text(json.dumps(config))
    text = build_card(folder, "ann/model").text
    assert "with `loss_weight` 0.25" in text and "cosine distance between" in text and "not normalised" in text
    assert "mean squared error" not in text
    (folder / "config.json").write_text(json.dumps({**config, "enable_autoregressive": False}))
    text = build_card(folder, "ann/model").text
    assert "has no reconstruction head" in text and "cosine" not in text.partition("## Training")[2].partition("##")[0]


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ({"max_steps": 3}, "language model, projector, head"),
        ({"trainable": "head"}, "head"),
        ({"trainable": "projector_and_head"}, "projector, head"),
        ({"trainable": "full", "freeze_vision_tower": False}, "language model, projector, head, vision tower"),
        (
            {"trainable": "lora", "freeze_vision_tower": False},
            "adapters on the language model, projector, head, adapters on the vision tower",
        ),
    ],
)
def test_the_card_names_the_parts_that_were_trained(folder, recipe, parts):
    assert "Trained: " not in build_card(folder, "ann/model").text
    (folder / "train_config.yaml").write_text(yaml.safe_dump(recipe))
    assert f"\nTrained: {parts}.\n" in build_card(folder, "ann/model").text


def test_the_card_names_data_sets_of_the_hub_and_no_file_of_a_computer(folder):
    sources = ["ann/clips", {"path": "bob/more", "weight": 0.5}, "clips/train.json", "/home/ann/data", str(folder)]
    (folder / "train_config.yaml").write_text(yaml.safe_dump({"train_data": sources}))
    card = build_card(folder, "ann/model")
    assert card.data.datasets == ["ann/clips", "bob/more"]
    assert "[bob/more](https://huggingface.co/datasets/bob/more)" in card.text and "/home" not in card.text
    assert build_card(folder, "ann/model", CardOptions(datasets=("c/d",))).data.datasets == ["c/d"]
    (folder / "train_config.yaml").write_text(yaml.safe_dump({"train_data": "ann/clips"}))
    assert build_card(folder, "ann/model").data.datasets == ["ann/clips"]


def test_the_numbers_of_the_card_are_in_tables_that_a_page_scrolls(folder):
    with_results(folder)
    text = build_card(folder, "ann/model").text
    evaluation = text.partition("## Evaluation")[2]
    assert "```" not in evaluation
    head, rule, row = [line for line in evaluation.splitlines() if line.startswith("|")][:3]
    assert head.startswith("| question type | questions | exact |") and set(rule) <= set("|-:")
    assert row.split("|")[1:4] == [" all ", " 4 ", " 0.750 [0.50, 1.00] "]
    assert head.count("|") == rule.count("|") == row.count("|")


def test_the_task_of_the_card_is_one_of_the_pipelines(folder):
    assert build_card(folder, "ann/model").data.pipeline_tag in SUPPORTED_TASKS


def with_results(folder: Path, *, here: bool = True, **changes: object) -> Path:
    """Write RESULTS, with some entries replaced, into the folder of a model, or beside it."""
    path = (folder if here else folder.parent) / "results.json"
    results = {**RESULTS, **changes}
    path.write_text(json.dumps({**results, "table": format_results(results, problems=False)}))
    return path


def metrics_of(card: ModelCard) -> dict[str, float]:
    return {result.metric_name: result.metric_value for result in card.data.eval_results or ()}


def test_the_card_holds_all_accuracies_and_only_numbers_that_there_are(folder):
    answering = RESULTS["question_answering"]["all"]
    kinds = {"order": {**answering, "exact": 0.5, "choice": 0.25}, "count": {**answering, "likelihood": 1.0}}
    still = {**RESULTS["reconstruction"], "skill": None}  # clips without motion: the copy baseline has no error
    with_results(
        folder,
        question_answering={"all": {**answering, "choice": 0.625}, "by_type": kinds},
        reconstruction=still,
    )
    card = build_card(folder, "ann/model")
    assert metrics_of(card) == {
        **{"Exact match": 0.75, "Accuracy by named choice": 0.625},
        **{"Exact match, order": 0.5, "Accuracy by named choice, order": 0.25},
        **{"Exact match, count": 0.75, "Accuracy by likelihood, count": 1.0},
        **{"Next frame, mse": 0.5, "Next frame, copy mse": 1.0, "Next frame, cosine": 0.9},
        "Next frame, temporal consistency": 0.3,
    }
    assert check_card(str(card)) == []
    # With one question type, all rows would be repeated.
    with_results(folder, question_answering={"all": answering, "by_type": {"order": answering}})
    assert not any("order" in name for name in metrics_of(build_card(folder, "ann/model")))


def test_the_card_counts_bad_samples_without_a_path_of_this_computer(folder):
    bad = [{"id": "z", "problem": "cannot read video /home/ann/clips/z.mp4: it is damaged"}]
    settings = {**RESULTS["settings"], "data": "/home/ann/clips/test.json"}
    with_results(folder, num_bad_samples=1, bad_samples=bad, settings=settings)
    text = str(build_card(folder, "ann/model"))
    assert "NOTE: 1 entries could not be read and are in no number\n" in text
    assert "name: clips/test.json" in text and "/home" not in text


def test_results_of_other_weights_stay_out_of_the_card(folder, caplog):
    """A folder that is trained further keeps the file of an earlier evaluation; a file given by the user is an error."""
    weights = {"id": "out", "revision": None, "weights_sha256": weights_sha256(folder)}
    path = with_results(folder, model=weights)
    (folder / "training_args.bin").write_bytes(b"settings, not weights")
    assert metrics_of(build_card(folder, "ann/model"))["Exact match"] == 0.75
    tiny_model(seed=1).save_pretrained(folder)
    assert not caplog.records
    card = build_card(folder, "ann/model")
    assert metrics_of(card) == {} and "Not measured yet" in card.text
    assert f"{path} is left out of the card: it holds results of other weights" in caplog.text
    for given in (path, with_results(folder, here=False, model=weights)):
        with pytest.raises(ValueError, match=f"{given} holds results of other weights than those in {folder}"):
            build_card(folder, "ann/model", CardOptions(results=given))


def test_results_of_another_release_are_refused(folder, tmp_path):
    """Results of older releases lack the metrics of rollouts."""
    old = tmp_path / "old.json"
    frames = {**FRAMES, "horizon": 1, "by_horizon": {"1": {**FRAMES, "by_gap": []}}}
    old.write_text(json.dumps({**RESULTS, "reconstruction": frames}))
    with pytest.raises(ValueError, match="was not written by this release"):
        build_card(folder, "ann/model", CardOptions(results=old))


def test_a_relation_that_is_not_the_folders_is_refused(folder):
    with pytest.raises(ValueError, match=f"relation is 'adapter', but {folder} holds a model"):
        build_card(folder, "ann/model", CardOptions(relation="adapter"))
    given = CardOptions(base_model="ann/base", relation="merge")
    assert build_card(folder, "ann/model", given).data.base_model_relation == "merge"
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "ann/base"}))
    with pytest.raises(ValueError, match=f"relation is 'merge', but {folder} holds an adapter"):
        build_card(folder, "ann/model", given)
    with pytest.raises(ValueError, match="relation is 'child', expected one of finetune, adapter"):
        CardOptions(relation="child")
