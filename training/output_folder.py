# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""The output folder of a run: conditions for a start, the checkpoint to resume from, the recipe."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from .checkpoints import (
    RUN_FILE,
    TRAINER_STATE,
    holds_weights,
    last_complete_checkpoint,
    list_checkpoints,
    resume_problem,
)
from .guards import BAD_STEPS

RECIPE = "train_config.yaml"  # keys and values of the run
# Keys that identify a run; other keys may change when it is resumed.
_IDENTITY = ("model", "train_data", "trainable")
_RUN_FILES = (BAD_STEPS, "bad_samples.jsonl", TRAINER_STATE, RUN_FILE, RECIPE)
_RESULTS = ("train_results.json", "eval_results.json", "all_results.json")


def checkpoint_to_resume(folder: Path, wanted: Any, overwrite: bool, values: dict[str, Any]) -> str | None:
    """Returns the checkpoint that a run resumes from, or None if it starts anew.

    Args:
        folder: output of the run.
        wanted: `resume_from_checkpoint`: a path; true for the last checkpoint of this run, if there is one.
        overwrite: replace an earlier run.
        values: keys and values of the run.

    Raises:
        ValueError: if the folder holds another run, or one that is not to be resumed; if the checkpoint cannot be resumed
            from; if the run is to be both resumed and replaced.
    """
    resumes = wanted is not None and str(wanted).lower() not in ("false", "none")
    if resumes and overwrite:
        raise ValueError(f"resume_from_checkpoint={wanted} and overwrite_output_dir=True contradict each other")
    checkpoints = list_checkpoints(folder)
    is_used = bool(checkpoints) or holds_weights(folder)
    if not resumes:
        if is_used and not overwrite:
            found = [path.name for path in checkpoints[-1:]] + ["a model"] * holds_weights(folder)
            raise ValueError(
                f"{folder} holds {' and '.join(found)} of an earlier run. Go on with that run "
                "(--resume_from_checkpoint true), replace it (--overwrite_output_dir true) or choose another output_dir"
            )
        return None
    if str(wanted).lower() != "true":
        checkpoint = str(wanted)
    else:
        _check_identity(folder, values)
        checkpoint = last_complete_checkpoint(folder)
        if checkpoint is None and holds_weights(folder):
            raise ValueError(
                f"{folder} holds a model and no checkpoint to resume from. Replace it (--overwrite_output_dir true) or "
                "choose another output_dir"
            )
    problem = None if checkpoint is None else resume_problem(checkpoint)
    if problem is not None:
        raise ValueError(f"cannot resume from {checkpoint}: {problem}")
    return checkpoint


def remove_run(folder: Path) -> list[str]:
    """Deletes the checkpoints, ledgers and results of an earlier run; its model stays until the new one replaces it.

    Returns:
        the names of the checkpoints.
    """
    checkpoints = list_checkpoints(folder)
    for path in checkpoints:
        shutil.rmtree(path)
    for name in (*_RUN_FILES, *_RESULTS):
        (folder / name).unlink(missing_ok=True)
    return [path.name for path in checkpoints]


def write_recipe(folder: Path, values: dict[str, Any]) -> None:
    """Writes keys and values of a run, tokens left out."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / RECIPE, "w", encoding="utf-8") as file:
        yaml.safe_dump({key: value for key, value in values.items() if not key.endswith("_token")}, file)


def _check_identity(folder: Path, values: dict[str, Any]) -> None:
    if not (folder / RECIPE).is_file():
        return
    recorded = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8")) or {}
    for key in _IDENTITY:
        if _comparable(recorded.get(key)) != _comparable(values.get(key)):
            raise ValueError(
                f"{folder} holds a run with {key}={recorded.get(key)!r}, this one has {key}={values.get(key)!r}: choose "
                "another output_dir, replace that run (--overwrite_output_dir true), or name the checkpoint to resume from"
            )


def _comparable(value: Any) -> Any:
    """Returns a list of absolute paths and other values, for comparison: one source may stand alone or in a list."""
    items = value if isinstance(value, list) else [value]
    return [str(Path(item).resolve()) if isinstance(item, str) and Path(item).exists() else item for item in items]
