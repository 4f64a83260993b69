"""Parts of the benchmark about training: time and memory of a step, and cost of the head.

training-step: one optimizer step on the same weights and batch, each way in processes of its own that take turns,

    onevision   LlavaOnevisionForConditionalGeneration under a plain Trainer: no reconstruction
    ours        LlavaNextARForConditionalGeneration under AutoregressiveTrainer, with the head
    no head     the same with enable_autoregressive=False

head: forward and backward of the reconstruction head alone, over the number of frames.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ...configuration.configuration_llava_next_ar import LlavaNextARConfig
from ...modeling.autoregressive_reconstruction import AutoregressiveReconstructionModule
from ...modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from ...training.trainer import AutoregressiveTrainer

WAYS = ("onevision", "ours", "no head")
VOCABULARY, IMAGE_TOKEN, VIDEO_TOKEN = 151_936, 151_646, 151_647
PROMPT, ANSWER = 32, 64  # tokens around a video

# hidden size, layers, heads, key-value heads, intermediate size of the language model; the same of the tower without
# key-value heads. `tiny` is for tests, `small` for two CPU cores; the others are LLaVA-OneVision's.
SHAPES = {
    "tiny": ((32, 2, 2, 1, 64), (32, 2, 2, 64)),
    "small": ((256, 4, 4, 2, 1024), (192, 4, 4, 768)),
    "0.5b": ((896, 24, 14, 2, 4864), (1152, 26, 16, 4304)),
    "7b": ((3584, 28, 28, 4, 18944), (1152, 26, 16, 4304)),
}


def shape_config(shape: str, **keys: Any) -> dict[str, Any]:
    """A OneVision configuration of 27x27 patches: 196 tokens a frame."""
    (hidden, layers, heads, kv_heads, intermediate), (vision_hidden, vision_layers, vision_heads, vision_mlp) = SHAPES[
        shape
    ]
    return {
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": intermediate,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 32768,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision_hidden,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
            "intermediate_size": vision_mlp,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "image_token_index": IMAGE_TOKEN,
        "video_token_index": VIDEO_TOKEN,
        "tie_word_embeddings": False,
        **keys,
    }


def make_batch(num_frames: int, batch_size: int) -> dict[str, torch.Tensor]:
    """Samples of one video and an answer of `ANSWER` supervised tokens."""
    random = torch.Generator().manual_seed(0)
    layout = LlavaNextARConfig(**shape_config("small")).frame_token_layout
    words = torch.randint(0, 150_000, (batch_size, PROMPT + ANSWER), generator=random)
    video = torch.full((batch_size, layout.num_tokens(num_frames)), VIDEO_TOKEN)
    input_ids = torch.cat([words[:, :PROMPT], video, words[:, PROMPT:]], dim=1)
    labels = torch.full_like(input_ids, -100)
    labels[:, -ANSWER:] = input_ids[:, -ANSWER:]
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "pixel_values_videos": torch.randn(batch_size, num_frames, 3, 384, 384, generator=random),
    }


# -- The step


class StepClock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        wait()
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self.start)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _load(way: str, options: argparse.Namespace, checkpoint: str) -> torch.nn.Module:
    keys: dict[str, Any] = {"dtype": torch.bfloat16 if options.bf16 else torch.float32}
    if options.attn_implementation:
        keys["attn_implementation"] = options.attn_implementation
    if way == "onevision":
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(checkpoint, **keys)
    else:
        model = LlavaNextARForConditionalGeneration.from_pretrained(
            checkpoint, enable_autoregressive=way == "ours", **keys
        )
    model.model.vision_tower.requires_grad_(False)
    return with_adapters(model, has_head=way == "ours") if options.lora else model


def with_adapters(model: torch.nn.Module, has_head: bool) -> torch.nn.Module:
    """Adapters on the linear layers of the language model; projector and head train whole, as in the recipe `lora`."""
    from peft import LoraConfig, get_peft_model

    saved = ["multi_modal_projector", *(["autoregressive_module"] if has_head else [])]
    targets = r".*\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    return get_peft_model(model, LoraConfig(r=64, target_modules=targets, modules_to_save=saved))


def _run_way(way: str, options: argparse.Namespace, checkpoint: str) -> dict[str, Any]:
    """Seconds of each step, peak memory in bytes and first losses; runs in a separate process."""
    model = _load(way, options, checkpoint)
    batch = make_batch(options.frames, options.batch_size)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=options.steps + 1,
            per_device_train_batch_size=1,
            gradient_checkpointing=options.activation_checkpointing,
            bf16=options.bf16,
            use_cpu=options.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            optim="sgd",  # of the optimizer's own memory and time both ways would have the same
            learning_rate=0.0,
        )
        trainer_class = Trainer if way == "onevision" else AutoregressiveTrainer
        keys = {} if way == "onevision" else {"enable_autoregressive": way == "ours"}
        trainer = trainer_class(
            model,
            arguments,
            train_dataset=[batch] * (options.steps + 1),
            data_collator=lambda samples: dict(samples[0]),
            callbacks=[clock],
            **keys,
        )
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
    first = trainer.state.log_history[0]
    return {
        "seconds": clock.seconds[1:],
        "peak": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": first["loss"] if way == "onevision" else first["main_loss"],
    }


def training_step(options: argparse.Namespace) -> None:
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir=options.cache if options.cache.is_dir() else None) as folder:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        with torch.device(options.device):
            config = LlavaOnevisionConfig(**shape_config(options.shape))
            model = LlavaOnevisionForConditionalGeneration._from_config(config, dtype=dtype)
        model.save_pretrained(folder)
        del model
        context = multiprocessing.get_context("spawn")  # each with a peak memory of its own
        for _ in range(options.repeats):
            for way in WAYS:
                with context.Pool(1) as process:
                    results[way].append(process.apply(_run_way, (way, options, folder)))
    settings = f"{options.shape}, {options.frames} frames of 196 tokens, batch {options.batch_size}, {options.device}"
    settings += ", bf16" * options.bf16 + ", LoRA" * options.lora
    settings += ", activation checkpointing" * options.activation_checkpointing
    print(f"{settings}; fastest of {options.repeats} x {options.steps} steps")
    print(f"{'':<12}{'s/step':>9}{'peak GB':>9}{'main loss':>11}{'time ratio':>12}{'memory ratio':>14}")
    summary = {
        way: (min(second for run in runs for second in run["seconds"]), min(run["peak"] for run in runs))
        for way, runs in results.items()
    }
    base_seconds, base_peak = summary["onevision"]
    for way, (seconds, peak) in summary.items():
        line = f"{way:<12}{seconds:>9.3f}{peak / 1e9:>9.2f}{results[way][0]['loss']:>11.4f}"
        print(f"{line}{seconds / base_seconds:>12.3f}{peak / base_peak:>14.3f}")
    print(f"the head takes {1 - summary['no head'][0] / summary['ours'][0]:.1%} of the step")


# -- The head


def head(options: argparse.Namespace) -> None:
    config = LlavaNextARConfig(**shape_config(options.shape))
    layout, hidden_size = config.frame_token_layout, config.text_config.hidden_size
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    with torch.device(options.device):
        module = AutoregressiveReconstructionModule(
            config.autoregressive_config, hidden_size, config.vision_feature_dim, layout
        ).to(dtype)
    print(f"{options.shape}, {options.device}; forward and backward, fastest of {options.repeats}")
    print(f"{'frames':>7}{'ms':>10}{'ms/frame':>10}")
    per_frame = []
    for num_frames in options.frames:
        clip = layout.video(num_frames)
        hidden = torch.randn(len(clip.patch_offsets), hidden_size, device=options.device, dtype=dtype)
        hidden.requires_grad_()
        features = torch.randn(num_frames, 27 * 27, config.vision_feature_dim, device=options.device, dtype=dtype)
        seconds = float("inf")
        for _ in range(options.repeats):
            wait()
            start = time.perf_counter()
            module(hidden, [clip], features).loss_per_video.sum().backward()
            wait()
            seconds = min(seconds, time.perf_counter() - start)
        per_frame.append(seconds / num_frames)
        print(f"{num_frames:>7}{seconds * 1e3:>10.1f}{seconds / num_frames * 1e3:>10.2f}", flush=True)
    print(f"a frame of {options.frames[-1]} costs {per_frame[-1] / per_frame[0]:.2f} times one of {options.frames[0]}")


def common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true")


def training_step_options(parser: argparse.ArgumentParser) -> None:
    common_options(parser)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="after one to warm up")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--attn-implementation")


def head_options(parser: argparse.ArgumentParser) -> None:
    common_options(parser)
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--repeats", type=int, default=3)
