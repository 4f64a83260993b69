"""Fine-tune a video language model with next-frame reconstruction.

    llava-next-ar train --launch ddp --config full --model llava-hf/llava-onevision-qwen2-0.5b-ov-hf \\
        --train_data clips/train.json --output_dir outputs/run

    torchrun --nproc_per_node 8 -m llava_next_ar.scripts.train --config lora ...

    # a tiny model on one CPU, in seconds (`llava-next-ar demo` makes model and data)
    llava-next-ar train --config demo --model demo_output/base --train_data demo_output/clips/train.json \\
        --output_dir demo_output/run

Every key of a recipe can be given on the command line too, and wins over the file: `--learning_rate 1e-5`,
`--autoregressive_config.num_hist 4` or just `--num_hist 4`, `--report_to tensorboard`, `--fsdp_config '{...}'`. Keys
are those of `ModelArguments`, `DataArguments` and `GuardArguments` in scripts/recipes.py, of transformers'
`TrainingArguments`, of the model's configuration (`model_config.mm_newline_position`) and of its head
(`autoregressive_config.num_hist`). An unknown key is an error. With `--check` nothing is trained: it reads the recipe,
decodes a sample of the data and says what the step would need. The prototype's list form (`- type: trainer`, see
scripts/configs/prototype_basic.yaml) is read as well.

The model may be a checkpoint of this package or of LLaVA-OneVision, which gets a new head. `output_dir` becomes a
complete Hub folder: model (or adapter), processor, code and card. `--push_to_hub true` pushes it, scripts/push_to_hub.py
later.
"""

import dataclasses
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoProcessor, AutoTokenizer, TrainingArguments, set_seed

from ..configuration.configuration_llava_next_ar import LlavaNextARConfig
from ..hub.model_card import write_card
from ..processing.llava_conversation import DEFAULT_CHAT_TEMPLATE
from ..processing.processing_llava_next_ar import LlavaNextARProcessor
from .bad_samples import BadSampleLedger
from .checkpoints import UNFINISHED, StopOnSigterm, last_complete_checkpoint, replace_model
from .collator import LlavaVideoCollator
from .data import load_training_data
from .expected_messages import quiet_expected_messages
from .guards import BadStepError
from .preflight import Findings, examine
from .recipes import DataArguments, ModelArguments, make_parser, parse_arguments
from .trained_model import (
    BRIDGE,
    check_adapter_base,
    check_quantization,
    choose_trainable,
    load_config,
    load_model,
    model_without_weights,
    sharding_asked_for,
    weights_dtype,
)
from .trainer import HEAD, AutoregressiveTrainer

VIDEO_OPTIONS = (
    *("sampling", "num_frames", "fps", "max_frames", "sample_rate"),
    *("video_backend", "resize_backend", "allow_partial"),
)
FAST_SLOW_OPTIONS = ("use_fast_slow_frames", "fast_stride", "slow_stride", "num_fast", "num_slow")


# ----------------------------------------------------------------------------------------------------------- processor


def load_processor(args: ModelArguments, data_args: DataArguments, config: Any) -> Any:
    """The checkpoint's processor with the model's layout and the recipe's sampling; a new one if it has none.

    Raises:
        ValueError: on sampling options that contradict each other, or a tokenizer with other placeholders.
    """
    source = args.processor or args.model
    options = {name: getattr(data_args, name) for name in VIDEO_OPTIONS if getattr(data_args, name) is not None}
    head = config.autoregressive_config
    if config.enable_autoregressive and head.use_fast_slow_frames and not options.keys() & {"sampling", "fps"}:
        options.update({name: getattr(head, name) for name in FAST_SLOW_OPTIONS})
    is_own = isinstance(config, LlavaNextARConfig)
    try:
        if is_own:
            processor = LlavaNextARProcessor.from_pretrained(source, **options)
        else:
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=True, **options)
    except OSError:  # only a tokenizer is there
        tokenizer = AutoTokenizer.from_pretrained(source)
        processor = LlavaNextARProcessor.for_config(config, tokenizer, **options)
    # LLaVA-OneVision's own template marks no answers, and is this one in other words.
    if "generation" not in (processor.chat_template or "") and "<|im_start|>" in processor.tokenizer.get_vocab():
        processor.chat_template = DEFAULT_CHAT_TEMPLATE
    # The recipe may have changed how the model lays out its tokens.
    layout_class = type(processor.frame_token_layout)
    processor.frame_token_layout = layout_class.from_dict(config.frame_token_layout.to_dict())
    for name in ("vision_aspect_ratio", "mm_patch_merge_type", "unpad_rounding"):
        setattr(processor, name, getattr(config, name))
    if data_args.add_time_instruction is not None:
        processor.add_time_instruction = data_args.add_time_instruction
    processor.check_layout(config)
    return processor


def load_data(
    sources: list[str],
    data_args: DataArguments,
    training_args: TrainingArguments,
    processor: Any,
    ledger: BadSampleLedger | None,
    streaming: bool = False,
) -> Any:
    """The data set, the mixture or the stream that the recipe asks for, every entry looked through if it says so."""
    data = load_training_data(
        sources,
        processor,
        streaming=streaming,
        shuffle_buffer=data_args.shuffle_buffer,
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
        bad_samples=ledger,
        video_root=data_args.video_root,
        image_root=data_args.image_root,
        allow_outside_root=data_args.allow_outside_root,
        max_length=data_args.max_length,
        truncate=data_args.truncate,
    )
    if data_args.check_data and training_args.local_process_index == 0 and not streaming:
        data.check()
    return data


def open_ledger(data_args: DataArguments, training_args: TrainingArguments) -> BadSampleLedger | None:
    """Where bad samples are written down, if training is to go on without them."""
    if data_args.on_bad_sample == "raise":
        return None
    return BadSampleLedger(
        Path(training_args.output_dir) / "bad_samples.jsonl",
        max_samples=data_args.max_bad_samples,
        max_share=data_args.max_bad_share,
    )


# ------------------------------------------------------------------------------------------------------------- the run


def check(
    args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments, config: Any, processor: Any
) -> Findings:
    """What the recipe would do, by the configuration alone: no weights are read, and nothing is written."""
    model, num_quantized = model_without_weights(args, config, training_args)
    frozen_dtype = weights_dtype(args, training_args)
    compute_dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else frozen_dtype
    data_args = dataclasses.replace(data_args, check_data=False)  # the sample is looked through, and no more
    data = load_data(
        data_args.train_data, data_args, training_args, processor, ledger=None, streaming=data_args.streaming
    )
    return examine(
        model,
        data,
        processor,
        training_args,
        num_samples=data_args.check_samples,
        on_bad_sample=data_args.on_bad_sample,
        max_bad_samples=data_args.max_bad_samples,
        max_bad_share=data_args.max_bad_share,
        compute_dtype=compute_dtype,
        num_quantized=num_quantized,
        makes_mask=data_args.packing and args.attn_implementation in (None, "sdpa", "eager"),
        is_sharded=bool(sharding_asked_for(training_args)),
    )


def describe(model: Any, training_args: TrainingArguments, data: Any) -> str:
    samples = f"{len(data)} samples" if hasattr(data, "__len__") else "a stream of samples"
    per_device, accumulation = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    effective = per_device * accumulation * training_args.world_size
    lines = [
        f"effective batch size {effective} = {per_device} per device x {accumulation} accumulated x "
        f"{training_args.world_size} processes, from {samples}"
    ]
    trainable: dict[str, int] = {}
    total = 0
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed's ZeRO-3 leaves empty ones behind
        if type(parameter).__name__ == "Params4bit":
            size *= 2 * parameter.element_size()  # packed
        total += size
        part = next((p for p in ("vision_tower", *BRIDGE, HEAD) if p in name.split(".")), "language_model")
        if parameter.requires_grad:
            trainable[part] = trainable.get(part, 0) + size
    parts = ", ".join(f"{part} {size:,}" for part, size in trainable.items())
    share = 100 * sum(trainable.values()) / total
    lines.append(f"trainable parameters {sum(trainable.values()):,} of {total:,} ({share:.2f}%): {parts}")
    return "\n".join(lines)


def check_sharding(training_args: TrainingArguments, accelerator: Any) -> None:
    """Refuses FSDP and DeepSpeed where accelerate silently does something else, as it does without GPUs."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    for name in sharding_asked_for(training_args):
        if kind != name:
            sys.exit(
                f"train.py: the launch file or recipe asks for {name}, but accelerate runs {kind} here and would split "
                "nothing: it needs GPUs and several processes (scripts/accelerate/cpu.yaml is for processes without GPUs)"
            )


def checkpoint_to_resume(training_args: TrainingArguments) -> str | None:
    """`resume_from_checkpoint: true` means the last complete one in `output_dir`, if there is any."""
    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none"):
        return None
    if str(wanted).lower() != "true":
        return wanted
    return last_complete_checkpoint(training_args.output_dir)


def main(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        make_parser(__doc__).print_help()
        return
    quiet_expected_messages()
    try:
        args, data_args, guard_args, training_args, sections, values = parse_arguments(argv)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    is_main = training_args.process_index == 0
    if training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = False  # the model touches every parameter in every batch
    # What is not finite never gets as far as the log, and the filter waits for the device after every batch.
    training_args.logging_nan_inf_filter = False
    if args.merge_lora and sharding_asked_for(training_args):
        sys.exit("train.py: merge_lora needs the whole model in each process, which FSDP and DeepSpeed split")
    try:
        check_quantization(args)
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    if args.merge_lora and training_args.push_to_hub:
        sys.exit("train.py: push_to_hub would upload the adapter; push the merged model with scripts/push_to_hub.py")
    set_seed(training_args.seed)  # the head of a LLaVA-OneVision checkpoint is new

    config, changed = load_config(args, sections)
    if args.trainable == "lora":
        check_adapter_base(args, changed, training_args)
    processor = load_processor(args, data_args, config)
    if data_args.check:
        if not is_main:
            sys.exit()
        findings = check(args, data_args, training_args, config, processor)
        print(findings, flush=True)
        sys.exit(bool(findings.failures))
    ledger = open_ledger(data_args, training_args)
    train_data = load_data(
        data_args.train_data, data_args, training_args, processor, ledger, streaming=data_args.streaming
    )
    eval_data = None
    if data_args.eval_data:
        eval_data = load_data(data_args.eval_data, data_args, training_args, processor, ledger)
    model = choose_trainable(load_model(args, config, training_args), args, training_args)

    sigterm = StopOnSigterm()
    trainer = AutoregressiveTrainer(
        model,
        training_args,
        train_data,
        eval_dataset=eval_data,
        processing_class=processor,
        data_collator=LlavaVideoCollator(processor, packing=data_args.packing),
        enable_autoregressive=sections["model_config"].get("enable_autoregressive", True),
        head_learning_rate=args.head_learning_rate,
        bad_steps=guard_args.bad_step_policy(),
        callbacks=[sigterm] if guard_args.save_on_sigterm else None,
    )
    check_sharding(training_args, trainer.accelerator)
    if is_main:
        print(describe(model, training_args, train_data), flush=True)
        Path(training_args.output_dir).mkdir(parents=True, exist_ok=True)
        with open(Path(training_args.output_dir) / "train_config.yaml", "w", encoding="utf-8") as file:
            yaml.safe_dump({key: value for key, value in values.items() if not key.endswith("_token")}, file)
    checkpoint = checkpoint_to_resume(training_args)
    if is_main and training_args.resume_from_checkpoint:
        print(f"resuming from {checkpoint}" if checkpoint else "there is no checkpoint to resume from", flush=True)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except BadStepError as error:
        sys.exit(f"train.py: {error}")
    if sigterm.stopped:
        if is_main:
            print(
                f"stopped after step {trainer.state.global_step}; go on with --resume_from_checkpoint true", flush=True
            )
        sys.exit(128 + signal.SIGTERM)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if eval_data is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.trainable == "lora" and args.merge_lora:
        if is_main:
            merged = Path(training_args.output_dir) / UNFINISHED
            shutil.rmtree(merged, ignore_errors=True)
            trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(merged)
            processor.save_pretrained(merged)
            replace_model(merged, training_args.output_dir)
    else:
        if trainer.is_fsdp_enabled:  # whatever checkpoints hold, the final folder loads as it is
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(_internal_call=True)  # pushed below, with its card
    if is_main:
        folder = Path(training_args.output_dir)
        write_card(folder, trainer.hub_model_id or f"user/{folder.resolve().name}")
    trainer.accelerator.wait_for_everyone()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if is_main:
        print(f"saved to {training_args.output_dir}", flush=True)
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1:])
