"""One command for a GPU: parity of attention back ends, speed, memory, precision and every entry point, from random weights.

    python scripts/benchmark_gpu.py                                # at most 8 minutes; writes docs/gpu_<card>.json and .md
    python scripts/benchmark_gpu.py --parts parity step --shapes 0.5b --frames 16
    python scripts/benchmark_gpu.py --device cpu --shapes tiny --output outputs/gpu        # what the tests run

Nothing is downloaded. Each part runs in a process of its own, within what is left of the budget; what fails or is left out
stands in the table with its reason.

parity      logits and predicted frames with sdpa, flash and flex attention against eager, in float32 (flash: bfloat16)
precision   bfloat16 and float16 against float64, relative error of logits and predicted frames
step        an optimizer step against LlavaOnevisionForConditionalGeneration under a plain Trainer: time, peak memory,
            tokens/s, model FLOP utilisation, and the share of the head; all weights at 0.5B, LoRA and QLoRA at 7B
inference   prefill, decoding, one more frame of a stream
entries     every entry point once, so that a tensor on the wrong device shows
launch      a start under FSDP2 and under DeepSpeed ZeRO-2, of two steps
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Trainer, TrainingArguments

from ...configuration.configuration_llava_next_ar import LlavaNextARConfig
from ...configuration.transformers_compat import ACTIVATION_CHECKPOINTING
from ...hub.command_line import CommandParser
from ...modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from ...training.throughput import COUNTS, StepFlops, count_batch, peak_flops
from ...training.trainer import AutoregressiveTrainer
from .training import IMAGE_TOKEN, VIDEO_TOKEN, StepClock, make_batch, shape_config, wait, with_adapters

Row = dict[str, Any]
ATTENTION = {"sdpa": torch.float32, "flex_attention": torch.float32, "flash_attention_2": torch.bfloat16}
ROOT = Path(__file__).resolve().parents[2]


class NotRun(RuntimeError):
    """A measurement that cannot be made here; the message is the reason."""


# -- Models and inputs


def build(options: argparse.Namespace, shape: str, *, ours: bool = True, dtype: torch.dtype, **keys: Any) -> nn.Module:
    """A model of random weights on the device, equal for equal shapes; its head does not predict the copy."""
    torch.manual_seed(0)
    config_class = LlavaNextARConfig if ours else LlavaOnevisionConfig
    model_class = LlavaNextARForConditionalGeneration if ours else LlavaOnevisionForConditionalGeneration
    attention = keys.pop("attn_implementation", "sdpa")
    with torch.device(options.device):
        model = model_class._from_config(
            config_class(**shape_config(shape, **keys)), dtype=dtype, attn_implementation=attention
        )
    if ours and model.autoregressive_module is not None:
        torch.manual_seed(1)
        nn.init.normal_(model.autoregressive_module.change.weight, std=0.02)
    return model.eval()


def inputs_of(options: argparse.Namespace, shape: str, num_frames: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    batch = make_batch(num_frames, 1)
    batch["pixel_values_videos"] = batch["pixel_values_videos"].to(dtype)
    return {name: value.to(options.device) for name, value in batch.items()}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the answer, and the predicted features of every next frame."""
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    output = model(**inputs, return_reconstruction=True, logits_to_keep=64)
    return output.logits, output.reconstruction.predictions


# -- The parts


def parity(options: argparse.Namespace, shape: str) -> Iterator[Row]:
    for name, dtype in ATTENTION.items():
        try:
            if options.device == "cpu" and name != "sdpa":
                raise NotRun("needs a GPU")
            inputs = inputs_of(options, shape, options.frames[0], dtype)
            expected = outputs_of(build(options, shape, dtype=dtype, attn_implementation="eager"), inputs)
            found = outputs_of(build(options, shape, dtype=dtype, attn_implementation=name), inputs)
            errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
            yield {"case": f"{name}, {_name(dtype)}", "logits": errors[0], "predictions": errors[1]}
        except (NotRun, ImportError, ValueError, RuntimeError) as error:
            yield {"case": f"{name}, {_name(dtype)}", "not run": _first_line(error)}


def precision(options: argparse.Namespace, shape: str) -> Iterator[Row]:
    """The model rounded once to the lower type, so that the error is that of computing in it."""
    for dtype in (torch.bfloat16, torch.float16):
        model = build(options, shape, dtype=torch.float32).to(dtype)
        inputs = inputs_of(options, shape, options.frames[0], dtype)
        found = outputs_of(model, inputs)
        exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        expected = outputs_of(model.double(), exact)
        errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
        yield {"case": _name(dtype), "logits": errors[0], "predictions": errors[1]}


def step(options: argparse.Namespace, shape: str) -> Iterator[Row]:
    for way in ("lora", "qlora") if shape == "7b" else ("full",):
        for num_frames in options.frames:
            for checkpointing in (True, False):
                theirs = None
                for model_name in ("onevision", "ours", "no head"):
                    row: Row = {
                        "case": f"{way}, {num_frames} frames",
                        "checkpointing": checkpointing,
                        "model": model_name,
                    }
                    try:
                        row |= _measure_step(options, shape, way, num_frames, checkpointing, model_name)
                    except (NotRun, ImportError, torch.cuda.OutOfMemoryError) as error:
                        row["not run"] = _first_line(error)
                    if model_name == "onevision":
                        theirs = row
                    for name in ("seconds", "peak GiB"):
                        if name in row and name in theirs:
                            row[f"{name} ratio"] = row[name] / theirs[name]
                    yield row


def _measure_step(
    options: argparse.Namespace, shape: str, way: str, num_frames: int, checkpointing: bool, model_name: str
) -> Row:
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    keys = {} if model_name == "onevision" else {"enable_autoregressive": model_name == "ours"}
    model = build(options, shape, ours=model_name != "onevision", dtype=dtype, **keys)
    model.model.vision_tower.requires_grad_(False)
    if way == "qlora":
        _quantize(model.model.language_model)
        model.is_loaded_in_4bit = True
    if way != "full":
        model = with_adapters(model, has_head=model_name == "ours")
    batch, clock = inputs_of(options, shape, num_frames, dtype), StepClock()
    is_cuda = options.device != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=options.steps + 1, per_device_train_batch_size=1,
            bf16=is_cuda, use_cpu=not is_cuda, save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=0.0,
            optim="adamw_torch_fused" if is_cuda else "sgd", logging_steps=1, **{ACTIVATION_CHECKPOINTING: checkpointing},
        )  # fmt: skip
        trainer_class = Trainer if model_name == "onevision" else AutoregressiveTrainer
        trainer_keys = {} if model_name == "onevision" else {"enable_autoregressive": model_name == "ours"}
        trainer = trainer_class(
            model,
            arguments,
            train_dataset=[batch] * (options.steps + 1),
            data_collator=lambda samples: dict(samples[0]),
            callbacks=[clock],
            **trainer_keys,
        )
        if is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    seconds = min(clock.seconds[1:])
    row: Row = {"seconds": seconds, "tokens/s": batch["input_ids"].shape[1] / seconds}
    if is_cuda:
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        peak = peak_flops(torch.cuda.get_device_name())
        if peak is not None and model_name != "onevision":
            counts = count_batch(batch, 1, (IMAGE_TOKEN, VIDEO_TOKEN)).tolist()
            flops = StepFlops(model, model_name == "ours")(dict(zip(COUNTS, counts, strict=True)))
            row["MFU"] = flops / seconds / peak
    return row


def _quantize(language_model: nn.Module) -> None:
    """Linear layers as the recipe `qlora` loads them: NF4 with double quantization, computed in bfloat16."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise NotRun("bitsandbytes is not installed") from error
    for parent in list(language_model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                packed = bitsandbytes.nn.Linear4bit(
                    layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.bfloat16,
                    compress_statistics=True, quant_type="nf4", device="meta",
                )  # fmt: skip
                weight = layer.weight.data
                packed.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
                packed.bias = layer.bias
                setattr(parent, name, packed.to(weight.device))


@torch.no_grad()
def inference(options: argparse.Namespace, shape: str) -> Iterator[Row]:
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    model = build(options, shape, dtype=dtype)
    for num_frames in options.frames:
        inputs = {k: v for k, v in inputs_of(options, shape, num_frames, dtype).items() if k != "labels"}

        def generate(new_tokens: int, inputs: dict[str, torch.Tensor] = inputs) -> None:
            model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

        prefill, both = (_seconds(lambda n=n: generate(n)) for n in (1, 1 + options.new_tokens))
        surprise = _seconds(lambda inputs=inputs: model.surprise(**inputs))
        stream = model.surprise_stream()
        times = []
        for number, pixels in enumerate(inputs["pixel_values_videos"][0]):
            times.append(_seconds(partial(stream.read, pixels[None], torch.tensor([float(number)])), repeats=1))
        yield {
            "case": f"{num_frames} frames",
            "prefill ms": prefill * 1e3,
            "decode ms/token": max(both - prefill, 0.0) / options.new_tokens * 1e3,
            "surprise ms": surprise * 1e3,
            "stream ms/frame": sorted(times[1:])[len(times[1:]) // 2] * 1e3,
        }


def entries(options: argparse.Namespace, shape: str) -> Iterator[Row]:
    """Run each entry point on the processor's CPU output, moved by `.to(device)` alone."""
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    model = build(options, shape, dtype=dtype)
    model.model.vision_tower.requires_grad_(False)  # it is its own teacher, without which nothing can be imagined
    inputs = inputs_of(options, shape, 4, dtype)
    inputs["video_timestamps"] = torch.arange(4.0, device=options.device)[None]
    prompt = {name: value for name, value in inputs.items() if name != "labels"}

    def train() -> None:
        model.train()
        model(**inputs).loss.backward()
        model.eval()

    stream = model.surprise_stream()
    pixels, times = prompt["pixel_values_videos"][0], torch.arange(4.0)
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(**prompt),
        "forward and backward": train,
        "skip_logits": lambda: model(**inputs, skip_logits=True),
        "return_reconstruction": lambda: model(**prompt, return_reconstruction=True),
        "generate": lambda: model.generate(**prompt, max_new_tokens=2, do_sample=False),
        "generate, beams": lambda: model.generate(**prompt, max_new_tokens=2, num_beams=2, do_sample=False),
        "predict_next_frames": lambda: model.predict_next_frames(**prompt),
        "surprise": lambda: model.surprise(**prompt),
        "surprise_stream": lambda: [stream.read(p[None], t[None]) for p, t in zip(pixels, times, strict=True)],
        "imagine": lambda: model.imagine(1, hold_back=True, **prompt),
        "text alone": lambda: model(input_ids=prompt["input_ids"][:, :8]),
    }
    for name, call in calls.items():
        try:
            call()
            yield {"case": name, "result": "ran"}
        except Exception as error:  # the table is to name what fails, whatever it is
            yield {"case": name, "result": f"{type(error).__name__}: {_first_line(error)}"}


def launch(options: argparse.Namespace, shape: str) -> Iterator[Row]:
    """Run the packaged launch files on one GPU, with the demo's recipe on a tiny checkpoint and generated clips."""
    from ..demo.tiny_checkpoint import build_tiny_checkpoint, texts_of
    from ..temporal.synthetic_clips import write_dataset

    for name in ("fsdp2", "deepspeed_zero2"):
        try:
            if options.device == "cpu":
                raise NotRun("needs a GPU: accelerate shards nothing on a CPU")
            if "deepspeed" in name and importlib.util.find_spec("deepspeed") is None:
                raise NotRun("deepspeed is not installed")
            with tempfile.TemporaryDirectory() as folder:
                clips = Path(folder, "clips")
                write_dataset(clips, num_train=8, num_test=4, size=48, num_frames=4, progress=False)
                data = json.loads((clips / "train.json").read_text())
                build_tiny_checkpoint(Path(folder, "base"), texts_of(data), num_frames=4)
                command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--config_file"]
                command += [ROOT / "scripts" / "accelerate" / f"{name}.yaml", "-m", "llava_next_ar.scripts.train"]
                command += ["--config", ROOT / "scripts" / "configs" / "demo.yaml", "--model", Path(folder, "base")]
                command += ["--train_data", clips / "train.json", "--output_dir", Path(folder, "run")]
                command += ["--max_steps", "2", "--bf16", "true"]
                done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
            yield {"case": name, "result": "ran" if done.returncode == 0 else done.stderr.strip()[-300:]}
        except (NotRun, subprocess.TimeoutExpired) as error:
            yield {"case": name, "result": f"not run: {_first_line(error)}"}


# part -> (function, whether it runs for each shape)
PARTS = {
    "entries": (entries, False),
    "parity": (parity, False),
    "precision": (precision, False),
    "step": (step, True),
    "inference": (inference, True),
    "launch": (launch, False),
}


# -- Running and reporting


def _seconds(call: Callable[[], Any], repeats: int = 3) -> float:
    best = float("inf")
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run_part(connection: Any, name: str, options: argparse.Namespace, shape: str) -> None:
    """Send each row as it comes, then None; runs in a separate process."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for row in PARTS[name][0](options, shape):
        connection.send({"part": name, "shape": shape, **row})
    connection.send(None)


def run(options: argparse.Namespace) -> list[Row]:
    """All rows of the chosen parts; a part that fails or outlasts the budget gives a row with the reason."""
    rows, end = [], time.monotonic() + options.budget
    context = multiprocessing.get_context("spawn")  # each part with a peak memory of its own
    chosen = [(name, shape) for name in options.parts for shape in options.shapes[: None if PARTS[name][1] else 1]]
    for name, shape in tqdm(chosen, unit="part", disable=None):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_run_part, args=(there, name, options, shape))
        process.start()
        there.close()
        problem = None
        try:
            while here.poll(max(end - time.monotonic(), 0.0)):
                row = here.recv()
                if row is None:
                    break
                rows.append(row)
            else:
                problem = f"the budget of {options.budget:g} s is spent"
        except EOFError:
            process.join()
            problem = f"the process ended with status {process.exitcode}"
        if problem is not None:
            process.kill()
            rows.append({"part": name, "shape": shape, "case": "the rest", "not run": problem})
        process.join()
    return rows


def to_markdown(rows: list[Row], about: dict[str, str]) -> str:
    """A table for each part, with the columns that its rows have."""
    lines = [f"# Measured on {about['device']}", "", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += [f"`{about['command']}` measures it again.", ""]
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        columns = [name for name in dict.fromkeys(name for row in own for name in row) if name != "part"]
        lines += [f"## {part}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_shown(row.get(name)) for name in columns) + " |" for row in own]
        lines.append("")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=("tiny", "small", "0.5b", "7b"), default=["0.5b", "7b"])
    parser.add_argument("--frames", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--steps", type=int, default=3, help="of each training run, after one to warm up")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="for everything (default: 480)")
    parser.add_argument("--output", type=Path, help="without suffix; default: docs/gpu_<name of the device>")
    options = parser.parse_args(argv)
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: device is {options.device!r}, and torch sees no GPU here\n")
    device = "CPU" if options.device == "cpu" else torch.cuda.get_device_name()
    words = ["python scripts/benchmark_gpu.py", *(sys.argv[1:] if argv is None else argv)]
    about = {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "command": " ".join(words),
    }
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    rows = run(options)
    output = options.output or ROOT / "docs" / f"gpu_{re.sub(r'[^a-z0-9]+', '_', device.lower())}"
    output.parent.mkdir(parents=True, exist_ok=True)
    text = to_markdown(rows, about)
    output.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {output.with_suffix('.json')} and {output.with_suffix('.md')}")


if __name__ == "__main__":
    main()
