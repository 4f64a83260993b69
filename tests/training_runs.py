"""One optimizer step of a Trainer, its gradients and its log; in this process or, started with torchrun, on several
ranks.

    python -m torch.distributed.run --nproc-per-node 2 tests/training_runs.py result.pt
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import guard_runs
import torch
from peft import LoraConfig, get_peft_model
from tiny import collate, make_sample, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from llava_next_ar.configuration.transformers_compat import ACTIVATION_CHECKPOINTING
from llava_next_ar.training.checkpoints import release_process_group
from llava_next_ar.training.trainer import AutoregressiveTrainer, LlavaVideoCollator

# Frames of the videos of each sample: unequal, several, of one frame (nothing to predict), none.
FRAMES = ([2], [], [5, 3], [7, 1], [1], [3], [4], [6])
TEXTS = (5, 23, 9, 14, 17, 2, 8, 11)
UNLABELLED = 6  # the sample that is there for reconstruction alone
# What is trained, loss_weight, whether labels are kept.
OBJECTIVES = {"main": (0.0, True), "reconstruction": (1.0, False), "both": (1.0, True)}
TRAINERS = {"AutoregressiveTrainer": AutoregressiveTrainer, "Trainer": Trainer}
# A plain Trainer counts targets only: videos without labels weigh nothing there.
CASES = [(t, o) for t in TRAINERS for o in OBJECTIVES if (t, o) != ("Trainer", "reconstruction")]
# On one and on two processes: batch size x accumulation of a step of eight samples. The first is the reference.
SPLITS = {1: ((8, 1), (4, 2), (2, 4)), 2: ((4, 1), (2, 2))}
# What else can keep two ranks from meeting: (ways that the tower trains, recompute activations, a part that is frozen).
TOWERS = {
    "frozen tower": {"checkpointing": True, "frozen": "language_model.layers.0"},
    "trained tower and its frozen copy": {
        "checkpointing": True,
        "tower": "trained",
        "frozen": "multi_modal_projector",
    },
    "adapters on the tower": {"checkpointing": True, "tower": "adapters"},
}


def make_samples(config: Any, frames=FRAMES, with_labels: bool = True) -> list[dict[str, torch.Tensor]]:
    """Samples as `LlavaVideoDataset` gives them, with 4 to 7 targets each."""
    samples = []
    for index, lengths in enumerate(frames):
        sample = make_sample(config, lengths, seed=index, text=TEXTS[index])
        start = len(sample["labels"]) - 4 - index % 4
        sample["labels"][start:] = sample["input_ids"][start:]
        batch = collate([sample])
        batch.pop("attention_mask")
        for name in ("input_ids", "labels"):
            batch[name] = batch[name][0]
        if not with_labels or index == UNLABELLED:
            batch["labels"].fill_(-100)
        samples.append(batch)
    return samples


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_step(
    objective: str,
    batch_size: int,
    accumulation: int,
    trainer: str = "AutoregressiveTrainer",
    frames=FRAMES,
    packing: bool = False,
    tower: str = "frozen",
    frozen: str = "vision_tower",
    checkpointing: bool = False,
) -> dict[str, Any]:
    """Gradients by parameter and the log of one step over all samples.

    `tower` is `frozen | trained | adapters`; `frozen` names what else is.
    """
    loss_weight, with_labels = OBJECTIVES[objective]
    model = tiny_model(head={"loss_weight": loss_weight})
    # The head starts at zero and would pass no gradient on.
    generator = torch.Generator().manual_seed(1)
    change = model.autoregressive_module.change
    change.weight.data = torch.randn(change.weight.shape, generator=generator) * 0.1
    config = model.config
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            parameter.requires_grad_(tower == "trained")
        elif frozen in name:
            parameter.requires_grad_(False)
    if tower == "adapters":
        targets = r".*(language_model|vision_tower\.encoder)\..*\.(q_proj|v_proj)"
        saved = ["multi_modal_projector", "autoregressive_module"]
        lora = LoraConfig(r=2, target_modules=targets, modules_to_save=saved, init_lora_weights=False)
        model = get_peft_model(model, lora)
    keep = KeepGradients()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0,  # unclipped
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            **{ACTIVATION_CHECKPOINTING: checkpointing},
        )
        run = TRAINERS[trainer](
            model=model,
            args=args,
            train_dataset=make_samples(config, frames, with_labels),
            data_collator=LlavaVideoCollator(0, packing=packing),
            callbacks=[keep],
        )
        run.train()
    return {"gradients": keep.gradients, "log": run.state.log_history[0], "processes": run.accelerator.num_processes}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of any gradient, relative to the largest entry of that parameter's gradient."""
    one, other = ({name.removeprefix("module."): g for name, g in gradients.items()} for gradients in (one, other))
    # One may lack parameters that the other touched with zeros.
    zero = torch.zeros(())
    names = one.keys() | other.keys()
    # The tower's queries meet all keys with the same bias, which no softmax sees: that gradient is rounding alone.
    names = [name for name in names if "vision_tower" not in name or not name.endswith("k_proj.bias")]
    pairs = [(one.get(name, zero), other.get(name, zero)) for name in names]
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-8)).item() for a, b in pairs)


def run_on_ranks(path: str) -> None:
    results: dict[Any, Any] = {}
    for trainer, objective in CASES:
        for batch_size, accumulation in SPLITS[2]:
            results[trainer, objective, (2, batch_size, accumulation)] = one_step(
                objective, batch_size, accumulation, trainer
            )
    # One rank with a video, one without.
    for name, options in TOWERS.items():
        results[name] = one_step("both", 1, 1, frames=FRAMES[:2], **options)
    results["guards"] = guard_runs.run_on_ranks(Path(path).parent)
    if torch.distributed.get_rank() == 0:
        torch.save(results, path)
    with release_process_group():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_on_ranks(sys.argv[1])
