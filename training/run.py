"""Fine-tune a video language model with next-frame reconstruction.

    llava-next-ar train --launch ddp --config full --model llava-hf/llava-onevision-qwen2-0.5b-ov-hf \\
        --train_data clips/train.json --output_dir outputs/run

    torchrun --nproc_per_node 8 -m llava_next_ar.scripts.train --config lora ...

    # a tiny model on one CPU, in seconds (`llava-next-ar demo` makes model and data)
    llava-next-ar train --config demo --model demo_output/base --train_data demo_output/clips/train.json \\
        --output_dir demo_output/run

Every key of a recipe can be given on the command line too, and wins over the file: `--learning_rate 1e-5`,
`--autoregressive_config.num_hist 4` or just `--num_hist 4`, `--report_to tensorboard`, `--fsdp_config '{...}'`. Keys
are those of `ModelArguments`, `DataArguments` and `GuardArguments` in training/recipes.py, of transformers'
`TrainingArguments`, of the model's configuration (`model_config.mm_newline_position`) and of its head
(`autoregressive_config.num_hist`). An unknown key is an error. `--check` trains nothing: it reads the recipe and a sample of
the data and reports the lengths, the steps and their memory. The prototype's list form (`- type: trainer`, see
scripts/configs/prototype_basic.yaml) is read as well.

The model may be a checkpoint of this package or of LLaVA-OneVision, which gets a new head. `output_dir` becomes a
complete Hub folder: model (or adapter), processor, code and card. `--push_to_hub true` pushes it, `llava-next-ar push` does so
later. A folder that holds a run already is an error, unless that run is resumed (`--resume_from_checkpoint true`) or
replaced (`--overwrite_output_dir true`).

Exit status:

    0    the run is complete, or `--check` found no fault
    1    a bad step stopped the run, or `--check` found a fault
    2    bad input: command line, recipe, data, checkpoint or output folder; one line on standard error names it
    130  Ctrl-C
    143  SIGTERM

SIGTERM and the first Ctrl-C save a checkpoint at the end of the step; a second Ctrl-C ends the run at once. Under `accelerate
launch` and `torchrun` these are the statuses of the ranks; the launcher itself ends with status 1 and a traceback that names
SignalException. A launcher kills its ranks 30 seconds after it has passed SIGTERM on. While they save a checkpoint it is
stopped, so that a longer save is complete. A step that takes longer needs `TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600` (seconds;
torch 2.13 has it) in the environment of the launcher.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoProcessor, AutoTokenizer, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from ..configuration.configuration_llava_next_ar import LlavaNextARConfig
from ..hub.command_line import BAD_INPUT, stop
from ..hub.model_card import write_card
from ..processing.frame_sampling import head_sampling
from ..processing.llava_conversation import DEFAULT_CHAT_TEMPLATE
from ..processing.processing_llava_next_ar import LlavaNextARProcessor, layout_options
from ..processing.video_processing_llava_next_ar import LlavaNextARVideoProcessorKwargs
from .bad_samples import BadSampleError, BadSampleLedger, TooManyBadSamplesError
from .checkpoints import TRAINER_STATE, UNFINISHED, ResumeError, holds_weights, replace_model
from .collator import LlavaVideoCollator
from .data import any_answers, load_training_data
from .expected_messages import quiet_expected_messages
from .guards import BadStepError
from .merge import merge_adapters
from .output_folder import checkpoint_to_resume, remove_run, write_recipe
from .own_code import check_own_code, find_file
from .preflight import PreflightReport, choose_samples, run_preflight
from .progress import show_progress
from .recipes import DataArguments, GuardArguments, ModelArguments, make_parser, parse_arguments
from .termination import StopOnSigterm
from .trained_model import (
    BRIDGE,
    check_adapter_base,
    check_attention,
    check_quantization,
    check_teacher,
    choose_trainable,
    load_config,
    load_model,
    model_without_weights,
    sharding_asked_for,
    weights_dtype,
)
from .trainer import HEAD, AutoregressiveTrainer

logger = logging.get_logger(__name__)

VIDEO_OPTIONS = {field.name for field in dataclasses.fields(DataArguments)} & set(
    LlavaNextARVideoProcessorKwargs.__annotations__
)
NUM_SAMPLES_WITH_ANSWERS = 500  # read before a training starts, without decoding
BAD_STEP = 1  # exit status; that of bad input is `BAD_INPUT`


@contextlib.contextmanager
def stop_on_bad_input() -> Iterator[None]:
    """Context whose errors are those of the recipe, the checkpoint or the data."""
    try:
        yield
    except (ValueError, OSError, ImportError, StrictDataclassError, TooManyBadSamplesError) as error:
        stop(error)


# ----------------------------------------------------------------------------------------------------------- processor


def load_processor(args: ModelArguments, data_args: DataArguments, config: Any) -> Any:
    """Returns the checkpoint's processor, or a new one, with the model's layout and the recipe's sampling.

    Raises:
        ValueError: on sampling options that contradict each other, or a tokenizer with other placeholders.
        OSError: if an existing processor cannot be loaded, or the Hub does not answer.
    """
    source = args.processor or args.model
    if args.processor is not None:
        check_own_code(args.processor, args.trust_remote_code)
    options = {name: getattr(data_args, name) for name in VIDEO_OPTIONS if getattr(data_args, name) is not None}
    if not options.keys() & {"sampling", "fps"}:
        options |= head_sampling(config)
    is_installed = isinstance(config, LlavaNextARConfig)  # not a class of remote code
    # Found by name: an error while loading does not show that the checkpoint has no processor.
    if any(find_file(source, name) is not None for name in ("processor_config.json", "preprocessor_config.json")):
        if is_installed:
            processor = LlavaNextARProcessor.from_pretrained(source, **options)
        else:
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=True, **options)
    else:  # a tokenizer alone
        tokenizer = AutoTokenizer.from_pretrained(source)
        processor = LlavaNextARProcessor.for_config(config, tokenizer, **options)
    # LLaVA-OneVision's own template marks no answers, and renders the same text.
    if "generation" not in (processor.chat_template or "") and "<|im_start|>" in processor.tokenizer.get_vocab():
        processor.chat_template = DEFAULT_CHAT_TEMPLATE
    # The recipe may have changed how the model lays out its tokens.
    layout_class = type(processor.frame_token_layout)
    for name, value in layout_options(config).items():
        is_layout = name == "frame_token_layout"  # a processor of remote code has another class of this name
        setattr(processor, name, layout_class.from_dict(value.to_dict()) if is_layout else value)
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
    """Opens the data set, mixture or stream of the recipe; validates every entry with `check_data`."""
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
        ignored_keys=data_args.ignored_keys or (),
    )
    if data_args.check_data and training_args.local_process_index == 0 and not streaming:
        data.check()
    return data


def warn_without_answers(data: Any, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Logs a warning if none of a few samples of the data has an answer, without `reconstruction_only`."""
    if data_args.reconstruction_only or training_args.process_index:
        return
    samples = choose_samples(data, NUM_SAMPLES_WITH_ANSWERS, training_args.seed)
    if not any_answers(samples):
        logger.warning(
            f"none of {len(samples)} samples of the training data has an answer: the language modeling loss (main_loss) "
            "stays 0. Put answers under 'conversations' or 'messages', or set reconstruction_only: true if that is meant"
        )


def open_ledger(data_args: DataArguments, training_args: TrainingArguments) -> BadSampleLedger | None:
    """Returns the ledger of bad samples with `on_bad_sample: skip`, else None."""
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
) -> PreflightReport:
    """Reports on a recipe from configuration and data: reads no weights, writes nothing."""
    failures = []
    for attempt in (lambda: check_attention(args, config), lambda: check_reports(training_args)):
        try:
            attempt()
        except (ValueError, ImportError) as error:
            failures.append(" ".join(str(error).split()))
    model, num_quantized = model_without_weights(args, config, training_args)
    frozen_dtype = weights_dtype(args, training_args)
    compute_dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else frozen_dtype
    data_args = dataclasses.replace(data_args, check_data=False)  # the sample alone is validated
    data = load_data(
        data_args.train_data, data_args, training_args, processor, ledger=None, streaming=data_args.streaming
    )
    report = run_preflight(
        model,
        data,
        processor,
        training_args,
        data_args,
        compute_dtype=compute_dtype,
        num_quantized=num_quantized,
        makes_mask=data_args.packing and args.attn_implementation in (None, "sdpa", "eager"),
        is_sharded=bool(sharding_asked_for(training_args)),
    )
    report.failures[:0] = failures
    return report


def check_reports(training_args: TrainingArguments) -> None:
    """Creates the callbacks that report the run, to validate them.

    Raises:
        ValueError: for an unknown name in `report_to`, or one whose package is not installed.
    """
    for callback in get_reporting_integration_callbacks(training_args.report_to):
        try:
            callback()
        except (RuntimeError, ImportError) as error:
            raise ValueError(f"report_to: {error}") from error


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
    """Raises ValueError for FSDP and DeepSpeed where accelerate would silently run without them, as it does without GPUs."""
    distributed_type = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    for name in sharding_asked_for(training_args):
        if distributed_type != name:
            raise ValueError(
                f"the launch file or recipe asks for {name}, but accelerate runs {distributed_type} here and would split "
                "nothing: it needs GPUs and several processes (scripts/accelerate/cpu.yaml is for processes without GPUs)"
            )


def quiet_other_ranks(training_args: TrainingArguments) -> None:
    """Silences warnings and progress bars on all processes of a machine but the first: they are the same there."""
    if training_args.local_process_index != 0:
        training_args.log_level_replica = "error"  # which a Trainer sets
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        warnings.simplefilter("ignore")


def load_sets(data_args: DataArguments, training_args: TrainingArguments, processor: Any) -> tuple[Any, Any]:
    """The data to train on and, if the recipe names it, the data to evaluate on."""
    ledger = open_ledger(data_args, training_args)
    streaming = data_args.streaming
    train_data = load_data(data_args.train_data, data_args, training_args, processor, ledger, streaming=streaming)
    eval_data = None
    if data_args.eval_data:
        eval_data = load_data(data_args.eval_data, data_args, training_args, processor, ledger)
    return train_data, eval_data


def make_trainer(
    model: Any,
    data: tuple[Any, Any],
    args: ModelArguments,
    data_args: DataArguments,
    guard_args: GuardArguments,
    training_args: TrainingArguments,
    processor: Any,
    enable_autoregressive: bool,
) -> AutoregressiveTrainer:
    """Returns the trainer of a model and of the data to train and to evaluate on."""
    train_data, eval_data = data
    trainer = AutoregressiveTrainer(
        model,
        training_args,
        train_data,
        eval_dataset=eval_data,
        processing_class=processor,
        data_collator=LlavaVideoCollator(processor, packing=data_args.packing),
        enable_autoregressive=enable_autoregressive,
        head_learning_rate=args.head_learning_rate,
        bad_steps=guard_args.bad_step_policy(),
        recommended_share=guard_args.recommended_share,
        callbacks=[StopOnSigterm()] if guard_args.save_on_sigterm else None,
    )
    show_progress(trainer)
    check_sharding(training_args, trainer.accelerator)
    return trainer


def train(trainer: AutoregressiveTrainer, checkpoint: str | None) -> None:
    """Trains. Ends the process after a bad step, bad input or a signal, on all ranks alike."""
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except (BadStepError, BadSampleError, TooManyBadSamplesError, ResumeError) as error:
        trainer.end()
        # The text of an error in a worker of the loader is a traceback that ends with class and message.
        message = (
            str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
        )
        stop(message, BAD_STEP if isinstance(error, BadStepError) else BAD_INPUT)
    stopped = max((c.stopped for c in trainer.callback_handler.callbacks if isinstance(c, StopOnSigterm)), default=0)
    if stopped:
        if trainer.is_world_process_zero():
            print(
                f"stopped after step {trainer.state.global_step}; go on with --resume_from_checkpoint true", flush=True
            )
        trainer.end()
        sys.exit(128 + stopped)
    if checkpoint is not None and steps_of(checkpoint) == trainer.state.global_step:
        if trainer.is_world_process_zero():
            print(f"{checkpoint} has all {trainer.state.global_step} steps: nothing was left to train", flush=True)
    else:  # else the metrics of no step would replace those of the run
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


def save(trainer: AutoregressiveTrainer, merge_lora: bool) -> None:
    """Saves the model and its card to the output folder, and pushes them if the run is to."""
    training_args, is_main = trainer.args, trainer.is_world_process_zero()
    folder = Path(training_args.output_dir)
    if merge_lora:
        if is_main:
            merged = folder / UNFINISHED
            shutil.rmtree(merged, ignore_errors=True)
            merge_adapters(trainer.accelerator.unwrap_model(trainer.model)).save_pretrained(merged)
            trainer.processing_class.save_pretrained(merged)
            replace_model(merged, folder)
    else:
        if trainer.is_fsdp_enabled:  # checkpoints may be sharded; the final folder loads without a conversion
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(_internal_call=True)  # pushed below, with its card
    if is_main:
        write_card(folder, trainer.hub_model_id or f"user/{repository_name(folder)}")
    trainer.accelerator.wait_for_everyone()
    if training_args.push_to_hub:
        trainer.push_to_hub()


def steps_of(checkpoint: str) -> int:
    """Returns the number of steps of a checkpoint's state."""
    return json.loads((Path(checkpoint) / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"]


def repository_name(folder: Path) -> str:
    """Returns the name of a folder with hyphens for characters that a name on the Hub cannot have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).strip("-.") or "model"


def next_commands(folder: Path, data_args: DataArguments) -> str:
    """Returns a text with the usual commands after a training, quoted for a shell."""
    data = shlex.quote(data_args.eval_data[0]) if data_args.eval_data else "<test.json>"
    name = repository_name(folder)
    commands: tuple[tuple[str, str], ...] = ()
    if not holds_weights(folder):  # DeepSpeed's ZeRO-3 left them split
        whole = folder.with_name(f"{folder.name}_whole")
        commands = (("join the shards", f"consolidate {shlex.quote(str(folder))} {shlex.quote(str(whole))}"),)
        folder = whole
    model, stem = shlex.quote(str(folder)), folder.name
    commands += (
        ("evaluate", f"evaluate --model {model} --data {data} --output {shlex.quote(f'{stem}_results.json')}"),
        ("look at a clip", f"visualize --model {model} --video <clip.mp4> --output {shlex.quote(f'{stem}_pictures')}"),
        ("share", f"push {model} <user>/{name} --dry-run"),
    )
    return "\n".join(["next:", *(f"  {task + ':':<16}llava-next-ar {command}" for task, command in commands)])


def main(argv: list[str]) -> None:
    """Runs the command line. Ctrl-C ends it with status 130, during training once a checkpoint is saved."""
    try:
        run(argv)
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped by Ctrl-C", file=sys.stderr, flush=True)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            os._exit(128 + signal.SIGINT)  # the usual exit would wait for other ranks, which may wait for this one
        sys.exit(128 + signal.SIGINT)


def run(argv: list[str]) -> None:
    """Reads the recipe, checks it, trains and saves; with `check`, only checks."""
    if "--help" in argv or "-h" in argv:
        make_parser(__doc__).print_help()
        return
    quiet_expected_messages()
    with stop_on_bad_input():
        args, data_args, guard_args, training_args, sections, values = parse_arguments(argv)
        folder = Path(training_args.output_dir)
        overwrite = guard_args.overwrite_output_dir
        checkpoint, folder_in_use = None, []
        try:
            checkpoint = checkpoint_to_resume(folder, training_args.resume_from_checkpoint, overwrite, values)
        except ValueError as error:
            if not data_args.check:
                raise
            folder_in_use = [str(error)]  # one finding of the report among others
        check_quantization(args)
    is_main = training_args.process_index == 0
    quiet_other_ranks(training_args)
    if training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = False  # the model touches every parameter in every batch
    # The guard stops non-finite losses before the log, and this filter waits for the device after every batch.
    training_args.logging_nan_inf_filter = False
    if args.merge_lora and sharding_asked_for(training_args):
        stop("merge_lora needs the whole model in each process, which FSDP and DeepSpeed split")
    if args.merge_lora and training_args.push_to_hub:
        stop("push_to_hub would upload the adapter; push the merged model with `llava-next-ar push`")
    set_seed(training_args.seed)  # the head of a LLaVA-OneVision checkpoint is new

    with stop_on_bad_input():
        config, changed = load_config(args, sections)
        if args.trainable == "lora":
            check_adapter_base(args, changed, training_args)
        check_teacher(args, config)
        processor = load_processor(args, data_args, config)
        if data_args.check:
            if not is_main:
                sys.exit()
            report = check(args, data_args, training_args, config, processor)
            report.failures[:0] = folder_in_use
            print(report, flush=True)
            sys.exit(bool(report.failures))
        check_reports(training_args)
        data = load_sets(data_args, training_args, processor)
        warn_without_answers(data[0], data_args, training_args)
        model = choose_trainable(load_model(args, config, training_args), args, training_args)
        has_objective = sections["model_config"].get("enable_autoregressive", True)
        trainer = make_trainer(model, data, args, data_args, guard_args, training_args, processor, has_objective)
    if is_main:
        print(describe(trainer.model, training_args, trainer.train_dataset), flush=True)
        removed = remove_run(folder) if overwrite else []
        if removed:
            print(f"deleted {', '.join(removed)} of the run that {folder} held", flush=True)
        write_recipe(folder, values)
        if checkpoint or training_args.resume_from_checkpoint:
            print(f"resuming from {checkpoint}" if checkpoint else "found no checkpoint to resume from", flush=True)
    train(trainer, checkpoint)
    save(trainer, merge_lora=args.trainable == "lora" and args.merge_lora)
    if is_main:
        print(f"saved to {folder}\n{next_commands(folder, data_args)}", flush=True)
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1:])
