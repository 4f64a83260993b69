"""Programs that run with this release of the package or with an earlier one, whichever comes first on the path.

python release_programs.py NAME '[JSON arguments]'      # prints a line of JSON
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

try:
    from llava_next_ar.configuration.configuration_llava_next_ar import LlavaNextARConfig
    from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
    from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor
    from llava_next_ar.training.trainer import AutoregressiveTrainer
except ImportError:  # 0.1.0 was flat
    from llava_next_ar.configuration_llava_next_ar import LlavaNextARConfig
    from llava_next_ar.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
    from llava_next_ar.processing_llava_next_ar import LlavaNextARProcessor
    from llava_next_ar.training_llava_next_ar import AutoregressiveTrainer


def _measure(model: Any, batch: str) -> dict[str, Any]:
    inputs = torch.load(batch, weights_only=True)
    with torch.no_grad():
        output = model.eval()(**inputs, return_reconstruction=True)
    return {"logits": output.logits.tolist(), "predictions": output.reconstruction.predictions.tolist()}


def save(source: str, folder: str, batch: str) -> dict[str, Any]:
    """A model of random weights, whose head no longer predicts the copy, and the processor of `source`."""
    torch.manual_seed(0)
    model = LlavaNextARForConditionalGeneration(LlavaNextARConfig.from_pretrained(source))
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.1)
    model.save_pretrained(folder)
    LlavaNextARProcessor.from_pretrained(source).save_pretrained(folder)
    return _measure(model, batch)


def load(folder: str, batch: str) -> list[Any]:
    """Outputs with the installed class and with the code beside the weights."""
    found = []
    for model_class, processor_class, trust in (
        (LlavaNextARForConditionalGeneration, LlavaNextARProcessor, {}),
        (AutoModelForImageTextToText, AutoProcessor, {"trust_remote_code": True}),
    ):
        model, processor = (one.from_pretrained(folder, **trust) for one in (model_class, processor_class))
        processor.check_layout(model.config)
        found.append({"class": type(model).__name__, **_measure(model, batch)})
    return found


def train(folder: str, samples: str, output: str, checkpoint: str | None) -> list[float]:
    """Logged losses of four steps with a checkpoint after two, or of what is left of them after a checkpoint."""
    model = LlavaNextARForConditionalGeneration.from_pretrained(folder)
    model.model.vision_tower.requires_grad_(False)
    arguments = TrainingArguments(
        output, max_steps=4, save_steps=2, logging_steps=1, learning_rate=1e-3, per_device_train_batch_size=1,
        remove_unused_columns=False, report_to="none", use_cpu=True, seed=0, disable_tqdm=True,
    )  # fmt: skip
    data = torch.load(samples, weights_only=True)
    trainer = AutoregressiveTrainer(model, arguments, train_dataset=data, data_collator=lambda batch: dict(batch[0]))
    trainer.train(resume_from_checkpoint=checkpoint)
    return [entry["total_loss"] for entry in trainer.state.log_history if "total_loss" in entry]


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = {"save": save, "load": load, "train": train}[sys.argv[1]](*json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(result))
