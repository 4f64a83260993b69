"""Optimizer steps of the model sharded over two gloo ranks, as accelerate's FSDP2 shards it, against one process.

    python -m torch.distributed.run --nproc-per-node 2 tests/sharded_runs.py folder

accelerate itself refuses to shard on a CPU (it silently falls back to DDP), so its own wrapping is called directly. Ranks
hold different kinds of samples. Writes `results.json`: for each case the largest relative difference of gradients and of
the loss; and `checkpoint/`, as accelerate writes sharded weights, with `full.safetensors` to compare with.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model, save_fsdp_model
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import IMAGE_SIZE, IMAGE_TOKEN, ONEVISION, collate, make_sample, tiny_model
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from training_runs import difference

from llava_next_ar.training.trainer import prepare_for_training

KINDS: dict[str, dict[str, Any]] = {
    "text": {"lengths": []},
    "image": {"lengths": [], "image": True},
    "still": {"lengths": [1]},
    "videos": {"lengths": [5, 3]},
    "short video": {"lengths": [2]},
    "video and image": {"lengths": [4], "image": True},
}


def batch_of(config: Any, kind: str, seed: int) -> dict[str, torch.Tensor]:
    """One sample of a kind; an image is one view, in front of the text."""
    lengths, has_image = KINDS[kind]["lengths"], KINDS[kind].get("image", False)
    batch = collate([make_sample(config, lengths, seed=seed, text=7 + 4 * seed)])
    if has_image:
        front = torch.full((1, config.image_token_layout.num_base_tokens), IMAGE_TOKEN)
        batch["input_ids"] = torch.cat([front, batch["input_ids"]], dim=1)
        for name, fill in (("labels", -100), ("attention_mask", 1)):
            batch[name] = pad(batch[name], (front.shape[1], 0), value=fill)
        generator = torch.Generator().manual_seed(seed)
        batch["pixel_values"] = torch.randn(1, 1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        batch["image_sizes"] = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]])
        batch["batch_num_images"] = torch.tensor([2])  # no tiles
    return batch


def build(train_tower: bool = False, tower_lora: bool = False, frozen: str = "", **keys: Any) -> torch.nn.Module:
    """A tiny model with some parts frozen, on both ranks the same, checkpointing its activations."""
    model = tiny_model(head={"loss_weight": 1.0}, **keys)
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.1)
    if train_tower:
        model.model.vision_tower.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    model.config.use_cache = False
    if tower_lora:
        lora = LoraConfig(
            r=2,
            target_modules=r".*(language_model|vision_tower\.encoder)\..*\.(q_proj|v_proj)",
            modules_to_save=["multi_modal_projector", "autoregressive_module"],
            init_lora_weights=False,  # else half of the gradients are zero
        )
        model = get_peft_model(model, lora)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return prepare_for_training(model)


def shard(model: torch.nn.Module) -> torch.nn.Module:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=distributed.get_rank() == 0,
        num_processes=2,
        process_index=distributed.get_rank(),
        wait_for_everyone=distributed.barrier,
    )
    model = fsdp2_prepare_model(accelerator, model)
    model.save_sharded = lambda folder, **more: save_fsdp_model(plugin, accelerator, model, folder, **more)
    return model


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: full(p.grad) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def compare(kinds: tuple[str, str], make: Callable[[], torch.nn.Module], evaluate: bool = False) -> dict[str, Any]:
    """One step of `make()`, sharded, with a kind of sample on each rank, against both samples in this process."""
    reference, sharded = make(), shard(make())
    config = reference.config
    batches = [batch_of(config, kind, seed) for seed, kind in enumerate(kinds)]
    counts = {
        "num_items_in_batch": sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches),
        "num_videos_in_batch": sum(sum(length > 1 for length in KINDS[kind]["lengths"]) for kind in kinds),
    }
    if evaluate:
        reference.eval(), sharded.eval()
    with torch.no_grad():  # what a forward leaves undone shows in the next one
        sharded(**batches[distributed.get_rank()], **counts, skip_logits=True)
    with torch.set_grad_enabled(not evaluate):
        expected = sum(reference(**batch, **counts, skip_logits=True).loss for batch in batches)
        loss = sharded(**batches[distributed.get_rank()], **counts, skip_logits=True).loss
    total = loss.detach().clone()
    distributed.all_reduce(total)
    result = {"loss": ((total - expected).abs() / expected.abs()).item()}
    result["sharded"] = sorted({type(m).__name__ for m in sharded.modules() if isinstance(m, FSDPModule)})
    if not evaluate:
        expected.backward()
        (loss * 2).backward()  # FSDP takes the mean over ranks
        result["gradients"] = difference(gradients(reference), gradients(sharded))
        result["without gradient"] = [n for n, p in sharded.named_parameters() if p.requires_grad and p.grad is None]
    return result


CASES: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "frozen tower, video and text": (("videos", "text"), {}),
    "trained tower, all and still": (("video and image", "still"), {"train_tower": True}),
    "adapters on the tower, video and image": (("short video", "image"), {"tower_lora": True}),
    "bridge and head": (
        ("image", "videos"),
        {"frozen": "language_model", "mm_newline_position": "grid", "mm_spatial_pool_mode": "average"},
    ),
    "frozen head": (("text", "videos"), {"frozen": "autoregressive_module"}),
    "tied embeddings": (
        ("videos", "text"),
        {"text_config": {**ONEVISION["text_config"], "tie_word_embeddings": True}, "tie_word_embeddings": True},
    ),
}


def main(folder: Path) -> None:
    PartialState(cpu=True)  # joins the ranks by gloo; accelerate's logger wants it
    results = {}
    for name, (kinds, options) in CASES.items():
        results[name] = compare(kinds, lambda options=options: build(**options))
    results["evaluation"] = compare(("text", "video and image"), build, evaluate=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    results["accelerate on a CPU"] = Accelerator(cpu=True, fsdp_plugin=plugin).distributed_type.value
    # With a separate teacher.
    model = shard(build(train_tower=True))
    model.save_sharded(str(folder / "checkpoint"))
    state = {name: full(tensor).contiguous() for name, tensor in model.state_dict().items()}
    if distributed.get_rank() == 0:
        save_file(state, folder / "full.safetensors")
        model.save_pretrained(folder / "saved", state_dict=state)  # as Trainer saves under FULL_STATE_DICT
        model.config.save_pretrained(folder / "checkpoint")
    adapted = shard(build(tower_lora=True))
    adapted.save_sharded(str(folder / "adapter"), adapter_only=True)
    state = {name: full(tensor).contiguous() for name, tensor in get_peft_model_state_dict(adapted).items()}
    if distributed.get_rank() == 0:
        save_file(state, folder / "adapter.safetensors")
        adapted.peft_config["default"].save_pretrained(folder / "adapter")
        (folder / "results.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
