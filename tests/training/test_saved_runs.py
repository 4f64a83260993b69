"""Whole runs that end in a folder: a class of the user's own, a merge after the training, a processor in `datasets.map`."""

import json
import os
import sys
from pathlib import Path

import processes
import pytest
import safetensors.torch
import torch
from command_line import ends_with
from tiny import tiny_model
from tiny_processor import tiny_processor
from transformers import AutoModelForImageTextToText, AutoProcessor
from video_clips import write_clip

from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from llava_next_ar.training import merge
from llava_next_ar.training import run as train
from llava_next_ar.training.collator import LlavaVideoCollator
from llava_next_ar.training.data import LlavaVideoDataset

CONFIGS = Path(__file__).resolve().parents[2] / "scripts" / "configs"
OWN_HEAD = '''
"""A loss of one's own."""

from llava_next_ar.modeling.autoregressive_reconstruction import AutoregressiveReconstructionModule
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration


class MyHead(AutoregressiveReconstructionModule):
    def patch_loss(self, predictions, targets):
        return 7 + 0 * super().patch_loss(predictions, targets)


class MyModel(LlavaNextARForConditionalGeneration):
    head_class = MyHead
'''


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_clip(folder / "a.mp4", 6, width=64, height=48)
    asked = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    (folder / "train.json").write_text(json.dumps([{"conversations": asked, "video": "a.mp4"}] * 4))
    model = tiny_model(head={"loss_weight": 1.0})
    model.save_pretrained(folder / "base")
    tiny_processor(model.config, num_frames=4).save_pretrained(folder / "base")
    return folder


def options(work: Path, output: str, *more: str, config: str = "demo", model: str = "base") -> list[str]:
    given = ["--config", str(CONFIGS / f"{config}.yaml"), "--model", str(work / model)]
    given += ["--train_data", str(work / "train.json"), "--output_dir", str(work / output), "--use_cpu", "true"]
    given += ["--dataloader_num_workers", "0", "--max_steps", "2", "--logging_steps", "1", "--warmup_steps", "0"]
    return [*given, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", *more]


def batch_of(work: Path, processor) -> dict[str, torch.Tensor]:
    dataset = LlavaVideoDataset(work / "train.json", processor)
    return LlavaVideoCollator(processor)([dataset[0]])


def test_a_class_of_the_users_own_trains_if_it_is_trusted_and_its_file_goes_along(work, monkeypatch):
    (work / "code").mkdir()
    (work / "code" / "my_head.py").write_text(OWN_HEAD)
    monkeypatch.syspath_prepend(work / "code")
    import my_head

    model = my_head.MyModel.from_pretrained(work / "base")
    model.save_pretrained(work / "own")
    AutoProcessor.from_pretrained(work / "base", trust_remote_code=True).save_pretrained(work / "own")
    with ends_with(r"code of its own \(my_head.MyModel\).*--trust_remote_code"):
        train.main(options(work, "refused", model="own"))
    assert not (work / "refused").exists()
    train.main(options(work, "trained", "--trust_remote_code", "true", model="own"))
    logs = json.loads((work / "trained" / "trainer_state.json").read_text())["log_history"]
    losses = [log["autoregressive_loss"] for log in logs if "autoregressive_loss" in log]
    assert len(losses) == 2 and losses == pytest.approx([7, 7])
    assert (work / "trained" / "my_head.py").is_file()
    auto_map = json.loads((work / "trained" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageTextToText"] == "my_head.MyModel"
    reloaded = AutoModelForImageTextToText.from_pretrained(work / "trained", trust_remote_code=True)
    assert type(reloaded).__name__ == "MyModel"


@pytest.mark.parametrize("tower", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_adapter_is_merged_later_and_the_losses_stay(tower, work, capsys):
    name = f"lora_{tower}"
    frozen = ("--freeze_vision_tower", str(not tower).lower(), "--num_frames", "5")
    train.main(options(work, name, "--learning_rate", "0.05", *frozen, "--bf16", "false", config="lora"))
    merge.main([str(work / name), str(work / f"{name}_merged")])
    shown = capsys.readouterr()
    assert f"saved to {work / f'{name}_merged'}" in shown.out and "Warning" not in shown.err
    recipe = (work / name / "train_config.yaml").read_text()
    assert "trainable: lora" in recipe and (work / f"{name}_merged" / "train_config.yaml").read_text() == recipe
    assert "lora_r" in (work / f"{name}_merged" / "README.md").read_text()
    adapted = AutoModelForImageTextToText.from_pretrained(work / name, trust_remote_code=True).eval()
    merged = LlavaNextARForConditionalGeneration.from_pretrained(work / f"{name}_merged").eval()
    processor = AutoProcessor.from_pretrained(work / f"{name}_merged", trust_remote_code=True)
    assert processor.video_processor.num_frames == 5
    batch = batch_of(work, processor)
    with torch.no_grad():
        expected, given = adapted(**batch), merged(**batch)
    torch.testing.assert_close(given.main_loss, expected.main_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given.autoregressive_loss, expected.autoregressive_loss, rtol=1e-4, atol=1e-5)
    weights = safetensors.torch.load_file(work / f"{name}_merged" / "model.safetensors")
    assert any(".teacher." in name for name in weights) is tower
    assert not any("lora" in name for name in weights)
    # The same by the recipe's own key, at the end of the training.
    train.main(
        options(
            work,
            f"{name}_at_once",
            "--learning_rate",
            "0.05",
            "--merge_lora",
            "true",
            *frozen,
            "--bf16",
            "false",
            config="lora",
        )
    )
    at_once = safetensors.torch.load_file(work / f"{name}_at_once" / "model.safetensors")
    assert at_once.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(at_once[key], value, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_merged_is_refused_in_one_line(work, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for given, message in (
        ([str(work / "base"), str(tmp_path / "out")], "is not an adapter"),
        ([str(work / "base"), str(tmp_path / "full")], "is not an empty folder"),
        ([str(work / "base"), str(tmp_path / "out"), "--dtype", "float99"], "dtype is 'float99'"),
    ):
        with pytest.raises(SystemExit) as caught:
            merge.main(given)
        assert caught.value.code == 2 and message in capsys.readouterr().err
    for base, cause in ((tmp_path / "gone", "the folder does not exist"), (tmp_path / "full", "has no config.json")):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        config = {"base_model_name_or_path": str(base), "peft_type": "LORA"}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        with ends_with(f"the base {base} of .*adapter cannot be read .*{cause}.* with --base\n$"):
            merge.main([str(tmp_path / "adapter"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


MAP = """
import sys
import datasets
from datasets.fingerprint import Hasher
from transformers import AutoProcessor

def main():
    processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
    rows = datasets.load_from_disk(sys.argv[2])

    def count(row):
        return {"length": len(processor(text=row["text"])["input_ids"][0])}

    print(rows.map(count, num_proc=2)["length"][:], Hasher.hash(count), type(processor).__module__)

main()
"""


@pytest.mark.slow
def test_a_remote_processor_works_in_a_map_of_several_processes_and_hits_its_cache(work, tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "bc", "def", "g"]}).save_to_disk(tmp_path / "rows")
    outputs, caches = [], []
    for _ in range(2):
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        arguments = ("-c", MAP, work / "base", tmp_path / "rows")
        outputs.append(processes.run_python(*arguments, cwd=tmp_path, env=environment, timeout=240))
        caches.append(sorted(path.name for path in (tmp_path / "rows").glob("cache-*")))
    assert outputs[0].startswith("[1, 2, 3, 1]") and "transformers_modules" in outputs[0]
    assert outputs[0] == outputs[1] and caches[0] and caches[0] == caches[1]


def test_modules_of_remote_classes_are_attributes_of_their_package(work):
    processor = AutoProcessor.from_pretrained(work / "base", trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(work / "base", trust_remote_code=True)
    for one in (processor, processor.video_processor, model, model.config):
        package, _, name = type(one).__module__.rpartition(".")
        assert package.startswith("transformers_modules")
        assert getattr(sys.modules[package], name) is sys.modules[type(one).__module__]
