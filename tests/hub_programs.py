"""Programs for separate processes that use the local Hub: push, load back and serve, each with empty caches.

    python tests/hub_programs.py load_back '[...]'

`run_program` starts one; it prints its result as one line of JSON last. `--hide` hides this package.
"""

import importlib
import importlib.abc
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes

ROWS = ("model", "sharded-model", "adapter", "merged", "processor")
PACKAGE = "llava_next_ar"


@dataclass(frozen=True)
class Finished:
    result: Any
    stderr: str


def run_program(
    name: str,
    *arguments: Any,
    endpoint: str,
    home: Path,
    token: str | None = None,
    offline: bool = False,
    hide_package: bool = False,
) -> Finished:
    """Run a function of this module on JSON in a process with one Hub.

    Args:
        home: `HF_HOME` and working directory.
    """
    home.mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, __file__, name, json.dumps(arguments), *(["--hide"] if hide_package else [])]
    done = processes.run(command, cwd=home, env=environment, timeout=300)
    return Finished(json.loads(done.stdout.strip().splitlines()[-1]), done.stderr)


class _Hiding(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def prepare(clip: str, processor: Any) -> Any:
    question = [
        {"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": "What moves?"}]}
    ]
    return processor.apply_chat_template(question, tokenize=True, return_dict=True, return_tensors="pt")


def measure(clip: str, model: Any, processor: Any) -> list[Any]:
    """Logits of the last tokens, and the error of the predicted frames: values that a wrong weight changes."""
    import torch

    inputs = prepare(clip, processor)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -4:]
    return [logits.tolist(), model.predict_next_frames(**inputs)[0].metrics["mse"]]


# ---- pushing ----------------------------------------------------------------------------------------------------------


def _new_model(seed: int) -> Any:
    import torch
    from tiny import tiny_model

    model = tiny_model(seed=seed)
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.1)  # it starts as the copy baseline
    return model


def push_models(clip: str) -> dict[str, Any]:
    """Push model, sharded model and processor with `push_to_hub`, in two versions: row -> version -> expected values."""
    from tiny_processor import tiny_processor

    expected: dict[str, Any] = {}

    def note(row: str, version: str, commit: Any, *measured: Any) -> None:
        expected.setdefault(row, {})[version] = {"commit": commit.oid, "measured": measure(clip, *measured)}

    processor = tiny_processor(_new_model(0).config, num_frames=4)
    processor.push_to_hub("model", private=True)
    processor.push_to_hub("sharded-model")
    _new_model(9).push_to_hub("sharded-model")  # in one file, which must not be loaded
    for version, seed, size in (("first", 1, "40KB"), ("last", 2, "90KB")):
        model = _new_model(seed)
        note("model", version, model.push_to_hub("model"), model, processor)
        note("sharded-model", version, model.push_to_hub("sharded-model", max_shard_size=size), model, processor)
    for version, num_frames in (("first", 3), ("last", 5)):
        processor = tiny_processor(model.config, num_frames=num_frames)
        note("processor", version, processor.push_to_hub("processor"), model, processor)
    return expected


def push_adapters(clip: str) -> dict[str, Any]:
    """Push an adapter with scripts/push_to_hub.py, and the merged model, in two versions each."""
    import torch
    from huggingface_hub import snapshot_download
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from llava_next_ar.hub import push as push_to_hub

    expected: dict[str, Any] = {"adapter": {}, "merged": {}}
    # From its folder in the cache: the adapter must refer to its base by the id.
    base = snapshot_download("ann/model")
    processor = AutoProcessor.from_pretrained(base, trust_remote_code=True)
    processor.push_to_hub("merged")
    for version, seed in (("first", 1), ("last", 2)):
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=2,
            target_modules=r".*language_model.*(q_proj|v_proj)",
            modules_to_save=["autoregressive_module"],
            init_lora_weights=False,
        )
        model = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True)
        adapted = get_peft_model(model, lora).eval()
        torch.nn.init.normal_(adapted.base_model.model.autoregressive_module.change.weight, std=0.1)
        adapted.save_pretrained("adapter")
        processor.save_pretrained("adapter")
        commit = push_to_hub.main(["adapter", "ann/adapter", "--license", "apache-2.0"])
        measured = measure(clip, adapted.base_model.model, processor)
        expected["adapter"][version] = {"commit": commit.oid, "measured": measured}

        model = AutoModelForImageTextToText.from_pretrained("ann/model", trust_remote_code=True)
        merged = PeftModel.from_pretrained(model, "ann/adapter").merge_and_unload()
        commit = merged.push_to_hub("merged")
        expected["merged"][version] = {"commit": commit.oid, "measured": measure(clip, merged, processor)}
    return expected


# ---- loading ----------------------------------------------------------------------------------------------------------


def load_back(clip: str, pins: dict[str, str] | None) -> dict[str, Any]:
    """Load every row, at the pinned commits (`base` is that of the model under adapter and processor) or at main.

    Returns:
        row -> measured values.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    def load(auto_class: Any, row: str, pinned_as: str | None = None) -> Any:
        pin: dict[str, Any] = {} if pins is None else {"revision": pins[pinned_as or row]}
        if row == "adapter" and auto_class is AutoModelForImageTextToText and pins is not None:
            pin = {"adapter_kwargs": pin, "revision": pins["base"]}
        return auto_class.from_pretrained(f"ann/{row}", trust_remote_code=True, **pin)

    results = {}
    for row in ROWS:
        processor = load(AutoProcessor, row)
        if row == "processor":  # runs with the weights that it was pushed for
            model = load(AutoModelForImageTextToText, "model", pinned_as="base")
        else:
            model = load(AutoModelForImageTextToText, row)
        results[row] = measure(clip, model, processor)
    return results


def load_every_way(clip: str) -> dict[str, Any]:
    """Load the model by every auto class and option: way -> logits, or the returned class."""
    import torch
    import transformers
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor

    trust = {"trust_remote_code": True}
    processor = transformers.AutoProcessor.from_pretrained("ann/model", **trust)
    results: dict[str, Any] = {}
    for name in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        model = getattr(transformers, name).from_pretrained("ann/model", **trust)
        results[name] = measure(clip, model, processor)
    auto_class = transformers.AutoModelForImageTextToText
    for name in ("cpu", "auto"):
        model = auto_class.from_pretrained("ann/model", device_map=name, **trust)
        results[f"device_map={name}"] = measure(clip, model, processor)
    model = auto_class.from_pretrained("ann/model", dtype=torch.bfloat16, **trust)
    results["bfloat16"] = [str(model.dtype), *measure(clip, model, processor)]
    results["AutoConfig"] = transformers.AutoConfig.from_pretrained("ann/model", **trust).to_dict()["auto_map"]
    results["AutoVideoProcessor"] = AutoVideoProcessor.from_pretrained("ann/model", **trust).num_frames
    ask = transformers.pipeline("image-text-to-text", model="ann/model", **trust)
    question = [
        {"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": "What moves?"}]}
    ]
    options = {"max_new_tokens": 3, "do_sample": False}
    results["pipeline"] = ask(text=question, generate_kwargs=options, return_full_text=False)
    expected = auto_class.from_pretrained("ann/model", **trust)
    inputs = processor.apply_chat_template(
        question, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    answer = expected.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    results["generated"] = processor.decode(answer, skip_special_tokens=True)
    return results


def load_one(clip: str, repo_id: str) -> list[Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    trust = {"trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(repo_id, **trust)
    return measure(clip, AutoModelForImageTextToText.from_pretrained(repo_id, **trust), processor)


def load_quantized(clip: str, bits: int) -> float:
    """Return the largest difference of any logit from those in bfloat16, both on a GPU; relative to their spread."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    options = {"trust_remote_code": True, "device_map": "cuda", "dtype": torch.bfloat16}
    quantization = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    inputs = prepare(clip, AutoProcessor.from_pretrained("ann/model", trust_remote_code=True)).to("cuda")
    logits = []
    for more in ({}, {"quantization_config": quantization}):
        model = AutoModelForImageTextToText.from_pretrained("ann/model", **options, **more)
        with torch.no_grad():
            logits.append(model(**inputs).logits.float())
    assert model.is_quantized
    return ((logits[0] - logits[1]).abs().max() / logits[0].std()).item()


def train_on_a_dataset(folder: str, output: str) -> dict[str, Any]:
    """Push clips as a dataset repository, read them back with datasets, and train a step on them."""
    from datasets import load_dataset
    from huggingface_hub import HfApi, snapshot_download
    from tiny import tiny_model
    from tiny_processor import tiny_processor
    from transformers import TrainingArguments

    from llava_next_ar.training.trainer import AutoregressiveTrainer, LlavaVideoDataset

    api = HfApi()
    api.create_repo("clips", repo_type="dataset", private=True)
    api.upload_folder(repo_id="ann/clips", repo_type="dataset", folder_path=folder)
    entries = load_dataset("ann/clips", split="train")
    # Copies: in the cache they are links that leave the folder, which raises an error.
    root = snapshot_download("ann/clips", repo_type="dataset", local_dir="clips")
    model = tiny_model()
    dataset = LlavaVideoDataset(entries.to_list(), tiny_processor(model.config, num_frames=4), video_root=root)
    arguments = TrainingArguments(output, max_steps=1, logging_steps=1, report_to="none", use_cpu=True)
    trainer = AutoregressiveTrainer(model, arguments, train_dataset=dataset)
    trainer.train()
    return {"entries": entries.to_list(), "log": trainer.state.log_history[0]}


# ---- serving ----------------------------------------------------------------------------------------------------------


def push_endpoint(folder: str, repo_id: str) -> str:
    from llava_next_ar.hub import push as push_to_hub

    return push_to_hub.main([folder, repo_id, "--endpoint", "--license", "apache-2.0"]).oid


def call_endpoint(repo_id: str, requests: str) -> list[Any]:
    """Results of the requests of a JSON file, or the error, from the handler of a downloaded repository."""
    import importlib.util

    from huggingface_hub import snapshot_download

    folder = snapshot_download(repo_id, local_dir="repository")
    spec = importlib.util.spec_from_file_location("handler", f"{folder}/handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(folder)
    results: list[Any] = []
    for request in json.loads(Path(requests).read_text()):
        try:
            results.append(handler(request))
        except Exception as error:  # as the toolkit of the endpoint does, which sends the message with status 400
            results.append({"error": f"{type(error).__name__}: {error}"})
    return results


def main() -> None:
    name, arguments, *options = sys.argv[1:]
    if options == ["--hide"]:
        sys.meta_path.insert(0, _Hiding())
        try:
            importlib.import_module(PACKAGE)
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError(f"{PACKAGE} can be imported")
    import torch

    torch.set_num_threads(1)
    result = globals()[name](*json.loads(arguments))
    if options == ["--hide"]:
        assert not any(module.split(".")[0] == PACKAGE for module in sys.modules)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
