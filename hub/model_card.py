"""The model card of a checkpoint: model_card.md, filled in from its folder.

`llava-next-ar train` writes it into the output folder, `llava-next-ar push` into the Hub repository. Its facts are read from
the checkpoint itself: base model and relation, objective (config.json), training recipe (train_config.yaml), evaluation (the
JSON that `llava-next-ar evaluate` writes), film strip (film.png).
"""

import importlib.metadata
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from packaging.requirements import Requirement
from transformers.utils import logging

from .hub_folder import is_library_card, weights_sha256
from .pushed_model import MODEL_TAGS, hub_id

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).resolve().parent.parent / "model_card.md"
PIPELINE_TAG = "image-text-to-text"  # the task of transformers' `pipeline` that takes these models, with videos too
FILM = "film.png"  # a picture that `llava-next-ar visualize` draws; shown in the card if it lies in the folder
TRAINED = {
    "full": ("language model", "projector", "head"),
    "projector_and_head": ("projector", "head"),
    "head": ("head",),
    "lora": ("adapters on the language model", "projector", "head"),
}
LOSSES = {"mse": "mean squared error", "smooth_l1": "smooth L1 loss", "cosine": "cosine distance"}
RELATIONS = ("finetune", "adapter", "merge", "quantized")
HEAD = "autoregressive_module"  # where a model keeps it
RECIPE, RESULTS = "train_config.yaml", "results.json"
# In every generated card, and in no other: one that somebody wrote or edited by hand is kept.
GENERATED = "<!-- Generated from model_card.md and written again with every push. Remove this line to keep edits. -->"
# Keys of a recipe that say where things are on one computer, or who may push.
_PRIVATE_KEYS = {
    *("model", "processor", "train_data", "eval_data", "video_root", "image_root", "output_dir", "logging_dir"),
    *("resume_from_checkpoint", "ignored_keys", "run_name", "report_to", "project"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("deepspeed", "fsdp_config", "accelerator_config", "parallelism_config"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision", "hub_always_push"),
}


# What the code of a card needs, but for what these bring along.
_NEEDED = ("torch", "transformers", "pillow", "av")


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """Facts about a checkpoint that its folder does not hold."""

    base_model: str | None = None
    """Hub id; read from the folder if None."""
    base_revision: str | None = None
    """The base's commit, to which the code of an adapter's card is pinned."""
    relation: str | None = None
    """One of `RELATIONS`; read from the folder if None."""
    license: str | None = None
    language: Sequence[str] = ()
    """ISO 639 codes of what the model reads and writes."""
    datasets: Sequence[str] = ()
    """Hub ids of the training data."""
    results: Path | None = None
    """JSON of `llava-next-ar evaluate`; `results.json` of the folder if None, and there."""
    has_film: bool = False
    """Whether `film.png` is pushed along; if not, it is shown if it lies in the folder."""

    def __post_init__(self) -> None:
        if self.relation not in (None, *RELATIONS):
            raise ValueError(f"relation is {self.relation!r}, expected one of {', '.join(RELATIONS)}")
        if self.results is not None and not self.results.is_file():
            raise ValueError(f"results are read from {self.results}, which is not a file")


def build_card(
    folder: Path, repo_id: str, options: CardOptions = CardOptions(), *, revision: str | None = None
) -> ModelCard:
    """Build the card of a checkpoint.

    Args:
        folder: model or adapter, with `train_config.yaml` (for a Trainer checkpoint, in the folder above) and
            `results.json` if there are any.
        repo_id: what the code of the card loads.
        revision: the commit that it is pinned to; without one the card says how to pin.

    Raises:
        ValueError: if the relation is not the folder's, or the results given are not of this model, or of a control.
    """
    recipe, adapter, config = _recipe(folder), _read(folder / "adapter_config.json"), _read(folder / "config.json")
    base_model = find_base_model(folder, options.base_model)
    relation = options.relation or _relation(adapter, config)
    if (relation == "adapter") != bool(adapter):
        raise ValueError(f"relation is {relation!r}, but {folder} holds {'an adapter' if adapter else 'a model'}")
    results = _results(folder, options.results)
    datasets = list(options.datasets) or _datasets(recipe)
    has_head = (
        HEAD in (adapter.get("modules_to_save") or ()) if adapter else config.get("enable_autoregressive", False)
    )
    tags = sorted({*MODEL_TAGS, *(["lora"] if adapter.get("peft_type") == "LORA" else [])})
    data = ModelCardData(
        license=options.license,
        language=list(options.language) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=PIPELINE_TAG,
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        datasets=datasets or None,
        tags=tags,
        model_name=repo_id.split("/")[-1],
        eval_results=list(_eval_results(results, options.datasets)) or None,
    )
    if data.eval_results is None:
        data.model_name = None  # names the results, and is no key of its own
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        revision=revision,
        relation=relation,
        base_model=base_model,
        base_revision=options.base_revision,
        requirements=_requirements((*_NEEDED, "peft") if adapter else _NEEDED),
        has_head=has_head,
        trained=_trained(recipe, has_head),
        objective=_objective(recipe, config),
        datasets=datasets,
        has_film=options.has_film or (folder / FILM).is_file(),
        recipe=_recipe_text(recipe),
        evaluation=_table(results),
        evaluation_settings=_settings_text(results),
    )
    card.text = f"\n{GENERATED}\n{card.text}"
    return card


def find_base_model(folder: Path, given: str | None = None) -> str | None:
    """The Hub id of what a checkpoint was made from, if `given` or the folder says so."""
    adapter = _read(folder / "adapter_config.json")
    return given or hub_id(adapter.get("base_model_name_or_path")) or hub_id(_recipe(folder).get("model"))


def is_generated(text: str) -> bool:
    """Return True if a card may be replaced: this package or a library generated it."""
    return GENERATED in text or is_library_card(text)


def write_card(folder: Path, repo_id: str, options: CardOptions = CardOptions()) -> None:
    """Writes README.md, unless somebody wrote one by hand."""
    path = folder / "README.md"
    if not path.is_file() or is_generated(path.read_text(encoding="utf-8")):
        build_card(folder, repo_id, options).save(path)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    return (yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)) or {}


def _recipe(folder: Path) -> dict[str, Any]:
    run = folder.parent if folder.name.startswith("checkpoint-") else folder
    return _read(run / RECIPE)


def _relation(adapter: dict[str, Any], config: dict[str, Any]) -> str:
    if adapter:
        return "adapter"
    return "quantized" if config.get("quantization_config") else "finetune"


def _datasets(recipe: dict[str, Any]) -> list[str]:
    """Hub ids among the recipe's training data. Files and folders of one computer are left out."""
    sources = recipe.get("train_data") or []
    paths = [one.get("path") if isinstance(one, dict) else one for one in sources if isinstance(sources, list)]
    paths = [sources] if isinstance(sources, str) else paths
    is_file = re.compile(r".*\.(json|jsonl|parquet)")
    return [path for path in paths if path and "/" in path and not is_file.fullmatch(path) and hub_id(path)]


def _trained(recipe: dict[str, Any], has_head: bool) -> str:
    """Parts of the model that a recipe trains; nothing without a recipe."""
    way = recipe.get("trainable", "full")
    parts = [part for part in TRAINED.get(way, ()) if has_head or part != "head"] if recipe else []
    if parts and not recipe.get("freeze_vision_tower", True):
        parts.append("adapters on the vision tower" if way == "lora" else "vision tower")
    return ", ".join(parts)


def _objective(recipe: dict[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
    """Loss, weight and normalisation of the targets that the checkpoint was trained with; None if it does not hold them.

    Keys of the recipe come first: an adapter's folder has no configuration of the model.
    """
    prefix = "autoregressive_config."
    keys = {**config.get("autoregressive_config", {})}
    keys |= {key.removeprefix(prefix): value for key, value in recipe.items() if key.startswith(prefix)}
    if not {"loss_type", "target_norm", "loss_weight"} <= keys.keys():
        return None
    return {**keys, "loss": LOSSES.get(keys["loss_type"], keys["loss_type"])}


def _requirements(names: Sequence[str]) -> str:
    """For pip: packages with the ranges that this one asks for."""
    requirements = map(Requirement, importlib.metadata.requires("llava-next-ar"))
    # One with extras, such as transformers[serving], names the package a second time, without its range.
    found = {requirement.name: requirement.specifier for requirement in requirements if not requirement.extras}
    return " ".join(f'"{name}{found[name]}"' for name in names)


def _recipe_text(recipe: dict[str, Any]) -> str:
    shown = {key: value for key, value in recipe.items() if key not in _PRIVATE_KEYS and not key.endswith("_token")}
    return yaml.safe_dump(shown).strip() if shown else ""


# -- Evaluation


def _results(folder: Path, given: Path | None) -> dict[str, Any]:
    """The evaluation of the model in a folder; nothing if there is none.

    Raises:
        ValueError: if the file was not written by `llava-next-ar evaluate`, holds a control, or was given and is of other
            weights. One that lies in the folder and is older than its weights is left out.
    """
    path = given or folder / RESULTS
    results = _read(path)
    if not results:
        return {}
    needed = {"settings", "versions", "model", "question_answering", "reconstruction", "num_bad_samples", "table"}
    is_current = needed <= results.keys() and "frame_order" in results["settings"]
    if not is_current or "rollout" not in (results["reconstruction"] or {"rollout": None}):
        raise ValueError(f"{path} was not written by this release's `llava-next-ar evaluate`")
    if results["settings"]["frame_order"] != "natural":
        raise ValueError(f"{path} holds a control (frame_order), not what the model can do")
    measured, here = results["model"]["weights_sha256"], weights_sha256(folder)
    if None not in (measured, here) and measured != here:
        if given is not None:
            raise ValueError(f"{path} holds results of other weights than those in {folder}")
        logger.warning(f"{path} is left out of the card: it holds results of other weights than those beside it")
        return {}
    return results


def _data_name(results: dict[str, Any], datasets: Sequence[str]) -> tuple[str, str]:
    """Identifier and pretty name of the data that was evaluated on."""
    path = Path(results["settings"]["data"])
    name = "/".join(path.parts[-2:]) if len(path.parts) > 1 else path.name
    return (datasets[0] if datasets else path.stem), name


def _eval_results(results: dict[str, Any], datasets: Sequence[str]) -> Iterator[EvalResult]:
    if not results:
        return
    identifier, name = _data_name(results, datasets)
    common = {"task_type": PIPELINE_TAG, "dataset_type": identifier, "dataset_name": name}
    answering = results["question_answering"]
    types = answering["by_type"] if len(answering["by_type"]) > 1 else {}
    for kind, summary in {"all": answering["all"], **types}.items():
        for measure, title in (
            ("exact", "Exact match"),
            ("choice", "Accuracy by named choice"),
            ("likelihood", "Accuracy by likelihood"),
        ):
            if measure in summary:
                title = title if kind == "all" else f"{title}, {kind}"
                value = round(summary[measure], 4)
                yield EvalResult(**common, metric_type="accuracy", metric_name=title, metric_value=value)
    for measure, value in (results["reconstruction"] or {}).items():
        # The skill of clips in which nothing moves is None.
        if measure in ("mse", "copy_mse", "skill", "cosine", "temporal_consistency") and value is not None:
            title = f"Next frame, {measure.replace('_', ' ')}"
            yield EvalResult(**common, metric_type=measure, metric_name=title, metric_value=round(value, 4))


def _table(results: dict[str, Any]) -> str:
    """The tables of an evaluation in Markdown: a page scrolls them, where it would cut off lines of text."""
    lines, is_row = [], False
    for line in results["table"].splitlines() if results else ():
        cells = re.split(" {2,}", line.strip())
        was_row, is_row = is_row, len(cells) > 1
        lines += [""] if is_row != was_row else []
        if is_row:
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
            lines += [] if was_row else ["|---" + "|---:" * (len(cells) - 1) + "|"]
        else:
            lines.append(line)
    return "\n".join(lines).strip()


def _settings_text(results: dict[str, Any]) -> str:
    if not results:
        return ""
    settings, versions = results["settings"], results["versions"]
    shown = [f"{key} {settings[key]}" for key in ("dtype", "num_frames", "max_samples") if settings[key] is not None]
    return ", ".join([*shown, f"transformers {versions['transformers']}", f"torch {versions['torch']}"])
