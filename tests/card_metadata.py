"""The Hub's rules for the metadata of a model card, as `/api/validate-yaml` applies them to the keys used here.

From https://huggingface.co/docs/hub/model-cards and https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

LICENSES = set(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma grok2-community unknown other
    """.split()
)
PIPELINE_TAGS = set(
    """
    text-classification token-classification table-question-answering question-answering zero-shot-classification
    translation summarization feature-extraction text-generation fill-mask sentence-similarity text-to-speech
    text-to-audio automatic-speech-recognition audio-to-audio audio-classification audio-text-to-text
    voice-activity-detection depth-estimation image-classification object-detection image-segmentation text-to-image
    image-to-text image-to-image image-to-video unconditional-image-generation video-classification
    reinforcement-learning robotics tabular-classification tabular-regression time-series-forecasting
    text-to-video image-text-to-text visual-question-answering document-question-answering zero-shot-image-classification
    graph-ml mask-generation zero-shot-object-detection text-to-3d image-to-3d image-feature-extraction
    video-text-to-text keypoint-detection visual-document-retrieval any-to-any video-to-video other
    """.split()
)
RELATIONS = {"finetune", "adapter", "merge", "quantized"}
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TEXTS = ("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model_relation")
_LISTS_OF_TEXTS = ("tags", "datasets", "language", "base_model", "metrics")


def check_card(text: str, kind: str = "model") -> list[str]:
    """Errors that the Hub reports for a README.md; empty if it accepts the file."""
    block = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if block is None:
        return []  # missing metadata are a warning, not an error
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"]
    if data is None:
        return []
    if not isinstance(data, dict):
        return ["the metadata must hold keys and values"]
    return list(_errors(data) if kind == "model" else _type_errors(data))


def _type_errors(data: dict[str, Any]) -> Iterator[str]:
    for key in _TEXTS:
        if key in data and not isinstance(data[key], str):
            yield f'"{key}" must be a string'
    for key in _LISTS_OF_TEXTS:
        values = data.get(key, [])
        values = values if isinstance(values, list) else [values]
        if not all(isinstance(value, str) for value in values):
            yield f'"{key}" must be a string or a list of strings'
        elif len(set(values)) < len(values):
            yield f'"{key}" contains a duplicate value'


def _errors(data: dict[str, Any]) -> Iterator[str]:
    wrong_types = list(_type_errors(data))
    yield from wrong_types
    if wrong_types:
        return
    if "license" in data and data["license"] not in LICENSES:
        yield f'"license" must be one of the known licenses, got {data["license"]}'
    if "pipeline_tag" in data and data["pipeline_tag"] not in PIPELINE_TAGS:
        yield f'"pipeline_tag" must be one of the known tasks, got {data["pipeline_tag"]}'
    if "base_model_relation" in data and data["base_model_relation"] not in RELATIONS:
        yield f'"base_model_relation" must be one of {sorted(RELATIONS)}, got {data["base_model_relation"]}'
    for key, what in (("base_model", "model"), ("datasets", "dataset")):
        values = data.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not _REPO_ID.fullmatch(value) or "--" in value or ".." in value:
                yield f'"{key}" with value "{value}" is not valid. Use a {what} id from https://hf.co/{what}s'
    languages = data.get("language", [])
    for value in languages if isinstance(languages, list) else [languages]:
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", value):
            yield f'"language" must be an ISO 639 code, got {value}'
    if "model-index" in data:
        yield from _model_index_errors(data["model-index"])


def _model_index_errors(models: Any) -> Iterator[str]:
    if not isinstance(models, list):
        yield '"model-index" must be an array'
        return
    for number, model in enumerate(models):
        where = f"model-index[{number}]"
        if not isinstance(model.get("name"), str):
            yield f'"{where}.name" is required'
        if not isinstance(model.get("results"), list):  # Trainer's own cards have none
            yield f'"{where}.results" must be an array'
            continue
        for place, result in enumerate(model["results"]):
            for group, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
                for key in keys:
                    if not isinstance(result.get(group, {}).get(key), str):
                        yield f'"{where}.results[{place}].{group}.{key}" is required'
            if result.get("task", {}).get("type") not in PIPELINE_TAGS:
                yield f'"{where}.results[{place}].task.type" must be one of the known tasks'
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                yield f'"{where}.results[{place}].metrics" must be an array with an element or more'
                continue
            for metric in metrics:
                if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                    yield f'"{where}.results[{place}].metrics" must have a type and a value each'
