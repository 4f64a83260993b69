"""Join a checkpoint whose weights are spread over the ranks that trained it into a folder that loads anywhere.

    llava-next-ar consolidate outputs/full/checkpoint-500 consolidated
    # a checkpoint without configuration and processor: name the model that training started from
    llava-next-ar consolidate outputs/full/checkpoint-500 consolidated --model <checkpoint>

Reads what accelerate writes under FSDP with `fsdp_state_dict_type: SHARDED_STATE_DICT` (`pytorch_model_fsdp_0`), one tensor
at a time and without a GPU; and DeepSpeed's ZeRO checkpoints (`global_step...`), for which DeepSpeed must be installed and
the whole model fit in memory. The folder gets weights, configuration, processor and code, and loads with
`AutoModel.from_pretrained(folder, trust_remote_code=True)`; of an adapter's checkpoint it becomes an adapter's folder. It
appears only once it is complete.
"""

import argparse
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as distributed_checkpoint
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..configuration.configuration_llava_next_ar import LlavaNextARConfig
from ..modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from ..processing.processing_llava_next_ar import LlavaNextARProcessor
from .streamed_safetensors import PlannedTensor, TensorReader, listed, write_shards

FSDP_WEIGHTS = "pytorch_model_fsdp_0"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ShardedTensor(PlannedTensor):
    """A tensor in pieces, in a folder of `torch.distributed.checkpoint`."""

    folder: Path | None = None

    def load(self, reader: TensorReader | None = None) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        distributed_checkpoint.load({"model": {self.name: tensor}}, checkpoint_id=self.folder, no_dist=True)
        return tensor


@dataclass(frozen=True)
class HeldTensor(PlannedTensor):
    """A tensor that is in memory already."""

    tensor: torch.Tensor | None = None

    def load(self, reader: TensorReader | None = None) -> torch.Tensor:
        return self.tensor


def read_plan(checkpoint: Path) -> list[PlannedTensor]:
    """The tensors of a sharded checkpoint, under the names of the model's `state_dict`.

    Raises:
        ValueError: if the folder holds no sharded weights, or DeepSpeed's and DeepSpeed is not installed.
    """
    for folder in (checkpoint / FSDP_WEIGHTS, checkpoint):
        if (folder / ".metadata").exists():
            metadata = distributed_checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
            return [
                ShardedTensor(name.removeprefix("model."), tuple(entry.size), entry.properties.dtype, None, folder)
                for name, entry in metadata.items()
            ]
    if (checkpoint / "latest").exists() or list(checkpoint.glob("global_step*")):
        try:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
        except ImportError as error:
            raise ValueError(
                f"{checkpoint} is a DeepSpeed checkpoint, which only DeepSpeed reads: pip install deepspeed"
            ) from error
        state = _as_saved(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint)))
        return [HeldTensor(name, tuple(t.shape), t.dtype, None, t.contiguous()) for name, t in state.items()]
    raise ValueError(
        f"{checkpoint} holds no sharded weights: neither {FSDP_WEIGHTS}/.metadata (FSDP, SHARDED_STATE_DICT) nor "
        "global_step* (DeepSpeed)"
    )


def _as_saved(state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Returns the tensors of an adapter under the names that PEFT gives them in its file, and those of a model as they are.

    In memory, and so in DeepSpeed's checkpoints, the names also hold that of the adapter, and frozen weights may be there.
    """
    if not any(".lora_" in name for name in state):
        return state
    of_adapter = {name: tensor for name, tensor in state.items() if ".lora_" in name or ".modules_to_save." in name}
    return {re.sub(r"(\.modules_to_save)?\.default(?=\.|$)", "", name): t for name, t in of_adapter.items()}


def check_names(plan: Mapping[str, PlannedTensor], config: LlavaNextARConfig) -> None:
    """Compares names and shapes with those of the model.

    Raises:
        ValueError: naming what is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        expected = LlavaNextARForConditionalGeneration(config).state_dict()
    missing = sorted(expected.keys() - plan.keys())
    unexpected = sorted(plan.keys() - expected.keys())
    shapes = sorted(n for n in expected.keys() & plan.keys() if tuple(expected[n].shape) != plan[n].shape)
    if missing or unexpected or shapes:
        raise ValueError(
            "the weights are not those of this configuration (another --model?); missing: "
            f"{listed(missing)}; unexpected: {listed(unexpected)}; of another shape: {listed(shapes)}"
        )


def write_model(plan: list[PlannedTensor], source: str, folder: Path, max_shard_size: int) -> None:
    """Writes weights and configuration of a whole model."""
    by_name = {tensor.name: tensor for tensor in plan}
    config = LlavaNextARConfig.from_pretrained(source)
    if config.enable_autoregressive:
        # A teacher that was made when training began is in the weights, and may not be in the first configuration.
        has_teacher = any(name.startswith("autoregressive_module.teacher.") for name in by_name)
        config.autoregressive_config.separate_teacher = has_teacher
    if config.tie_word_embeddings:
        embedding = by_name.get("model.language_model.embed_tokens.weight")
        if embedding is not None and "lm_head.weight" not in by_name:
            by_name["lm_head.weight"] = embedding
    check_names(by_name, config)
    if config.tie_word_embeddings:
        del by_name["lm_head.weight"]  # one tensor, as save_pretrained writes it
    config.architectures = [LlavaNextARForConditionalGeneration.__name__]
    plan = list(by_name.values())
    with tqdm(total=sum(tensor.num_bytes for tensor in plan), unit="B", unit_scale=True) as bar:
        write_shards(folder, plan, max_shard_size, lambda tensor: bar.update(tensor.num_bytes))
    if os.path.exists(os.path.join(source, "generation_config.json")):
        GenerationConfig.from_pretrained(source).save_pretrained(folder)
    config.save_pretrained(folder)


def consolidate(checkpoint: Path, output: Path, model: str | None = None, max_shard_size: int = 5 * 10**9) -> None:
    """Writes `output`, a complete folder, from the sharded `checkpoint`.

    Args:
        checkpoint: a checkpoint folder of a Trainer.
        output: folder to be made.
        model: folder or Hub id with configuration and processor; the checkpoint itself if None.
        max_shard_size: bytes of a file of weights.

    Raises:
        FileExistsError: if there is something at `output`.
        ValueError: if the checkpoint cannot be read or is not of this model.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists already")
    plan = read_plan(checkpoint)
    source = str(checkpoint) if model is None else model
    is_adapter = any(".lora_" in tensor.name for tensor in plan)
    needed = checkpoint / ADAPTER_CONFIG if is_adapter else checkpoint / "config.json"
    if (is_adapter or model is None) and not needed.exists():
        raise ValueError(f"{checkpoint} has no {needed.name}" + ("" if is_adapter else ": name a model that has one"))
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        if is_adapter:
            save_file({tensor.name: tensor.load() for tensor in plan}, partial / "adapter_model.safetensors")
            shutil.copy(needed, partial / ADAPTER_CONFIG)
        else:
            write_model(plan, source, partial, max_shard_size)
        LlavaNextARProcessor.from_pretrained(source).save_pretrained(partial)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder of a Trainer")
    parser.add_argument("output", type=Path, help="folder to be made")
    parser.add_argument(
        "--model", help="folder or Hub id with configuration and processor, if the checkpoint has none"
    )
    parser.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB")
    options = parser.parse_args(argv)
    try:
        consolidate(options.checkpoint, options.output, options.model, int(options.max_shard_size * 10**9))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
