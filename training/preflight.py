"""`scripts/train.py --check`: what a recipe and its data would do, before an hour on a GPU is spent.

Reads the configuration, the processor and a random sample of the data, which it decodes, and needs no weights. Writes
nothing.
"""

import functools
import inspect
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..configuration.transformers_compat import ACTIVATION_CHECKPOINTING
from ..processing.frame_sampling import SAMPLING_POLICIES
from .bad_samples import BadSampleError
from .recipes import DataArguments
from .samples import read_sample
from .step_memory import step_memory
from .stream import UnreadSample

BAR_WIDTH = 40  # characters of the longest bar of a histogram
NUM_BINS = 8
NUM_EXAMPLES = 2  # of each cause of failure


@dataclass
class SampleFacts:
    """Statistics of one sample. `problem` is the reason why it cannot be used, None if it can."""

    place: str
    length: int = 0
    targets: int = 0
    frames: int = 0
    videos: int = 0
    images: int = 0
    problem: str | None = None
    is_too_long: bool = False
    sample_id: Any = None

    @property
    def name(self) -> str:
        """The entry's own `id`, if it has one, and its place in the data set, counted from 0."""
        return self.place if self.sample_id is None else f"{self.sample_id!r}, {self.place}"


@dataclass
class Findings:
    """The report, and what would certainly fail."""

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        verdict = [f"FAILS: {failure}" for failure in self.failures] or ["nothing found that would certainly fail"]
        return "\n".join([*self.lines, "", *verdict])


class _Facts(Dataset):
    """`SampleFacts` in the place of samples."""

    def __init__(self, samples: Sequence[UnreadSample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> SampleFacts:
        sample = self.samples[number]
        facts = SampleFacts(f"sample {sample.index} of {sample.source}")
        try:
            encoded = read_sample(sample.reader, "encode", sample.entry, source=sample.source, index=sample.index)
        except BadSampleError as error:
            facts.problem, facts.sample_id = _one_line(error.cause), error.sample_id
            return facts
        facts.length = len(encoded["input_ids"])
        facts.targets = int((encoded["labels"] != -100).sum())
        if "pixel_values_videos" in encoded:
            facts.videos = len(encoded["pixel_values_videos"])
            facts.frames = int(encoded["video_frame_mask"].sum())
        facts.images = int(encoded["batch_num_images"].sum()) if "batch_num_images" in encoded else 0
        try:
            sample.reader.fit(encoded)
        except ValueError as error:
            entry = sample.entry() if callable(sample.entry) else sample.entry
            facts.problem, facts.is_too_long = _one_line(f"ValueError: {error}"), True
            facts.sample_id = entry.get("id")
        return facts


def examine(
    model: Any,
    data: Any,
    processor: Any,
    training_args: Any,
    data_args: DataArguments,
    *,
    compute_dtype: torch.dtype = torch.float32,
    num_quantized: int = 0,
    makes_mask: bool = False,
    is_sharded: bool = False,
) -> Findings:
    """Looks at a sample of the data and at the step that it makes.

    Args:
        model: on the meta device, with what trains set to train.
        data: what `load_training_data` returned, without a ledger.
        data_args: of the recipe: how many samples are decoded, at most, and what about bad ones.
        compute_dtype: of autocast, or of the weights.
        num_quantized: weights that will be loaded in 4 bits.
        makes_mask: whether the attention of a packed row has a mask of all its tokens.
        is_sharded: whether the devices share the weights.
    """
    findings = Findings()
    samples = choose_samples(data, data_args.check_samples, training_args.seed)
    loader = DataLoader(
        _Facts(samples), batch_size=1, collate_fn=lambda one: one[0], num_workers=training_args.dataloader_num_workers
    )
    facts = list(tqdm(loader, total=len(samples), desc="decoding"))
    usable = [one for one in facts if one.problem is None]
    findings.lines += [
        *describe_frames(processor),
        *describe_samples(facts, model, samples[0].reader.max_length),
    ]
    num_entries = len(data) if hasattr(data, "__len__") else None
    describe_problems(facts, findings, data_args, num_entries)
    findings.lines += describe_steps(data, training_args, data_args.num_processes, len(usable) / len(facts))
    if usable and not any(one.targets for one in usable) and not data_args.reconstruction_only:
        findings.failures.append(
            f"none of {len(usable)} samples has a supervised token, so main_loss would stay 0: put answers under "
            "'conversations' (turns from 'gpt') or 'messages', or set reconstruction_only: true if that is meant"
        )
    if usable:
        options = {"compute_dtype": compute_dtype, "num_quantized": num_quantized, "makes_mask": makes_mask}
        describe_memory(usable, model, training_args, findings, is_sharded, **options)
    else:
        findings.failures.append(f"none of the {len(facts)} samples can be used")
    return findings


def choose_samples(data: Any, num_samples: int, seed: int) -> list[UnreadSample]:
    """A random choice without repetition; of a stream, what comes first."""
    if not hasattr(data, "__len__"):
        return list(itertools.islice(data, num_samples))
    chosen = np.random.default_rng(seed).permutation(len(data))[:num_samples]
    samples = []
    for position in chosen.tolist():
        part, index = data, position
        if hasattr(data, "locate"):
            number, index = data.locate(position)
            part = data.datasets[number]
        samples.append(
            UnreadSample(part.name, index, functools.partial(part.entries.__getitem__, index), part.reader, None)
        )
    return samples


# -------------------------------------------------------------------------------------------------------------- report


def describe_frames(processor: Any) -> list[str]:
    layout = processor.frame_token_layout
    kinds = [0, 1] if layout.is_slow_fast else [0]
    per_frame = " (slow), ".join(str(layout.tokens_per_frame(kind)) for kind in kinds)
    sampling = processor.video_processor.sampling_for()
    settings = inspect.signature(SAMPLING_POLICIES[sampling.policy]).parameters.values()
    names = [setting.name for setting in settings if setting.kind is inspect.Parameter.KEYWORD_ONLY]
    chosen = ", ".join(f"{name} {getattr(sampling, name)}" for name in names if getattr(sampling, name))
    return [
        f"tokens per frame      {per_frame}{' (fast)' * (len(kinds) > 1)}",
        f"frames                {sampling.policy}: {chosen}",
    ]


def describe_samples(facts: list[SampleFacts], model: Any, max_length: int | None) -> list[str]:
    read = [one for one in facts if one.length]
    if not read:
        return [f"samples               {len(facts)} looked at, none of which can be read"]
    lengths = np.array([one.length for one in read])
    frames = [one.frames for one in read if one.videos]
    targets = [one.targets for one in read]
    context = _base(model).config.text_config.max_position_embeddings
    limits = {"the context (max_position_embeddings)": context}
    if max_length is not None:
        limits["max_length"] = max_length
    without_video = sum(not one.videos for one in read)
    without_answer = sum(not one.targets for one in read)
    lines = [f"samples               {len(facts)} looked at"]
    if frames:
        lines.append(f"frames per sample     {min(frames)} to {max(frames)}, mean {np.mean(frames):.1f}")
    lines.append(f"tokens per sample     {lengths.min()} to {lengths.max()}, median {np.median(lengths):.0f}")
    lines += [f"    {line}" for line in histogram(lengths)]
    for name, limit in limits.items():
        over = int((lengths > limit).sum())
        lines.append(f"longer than {name} of {limit}: {over} of {len(read)} ({over / len(read):.1%})")
    lines += [
        f"supervised tokens     {sum(targets)} of {lengths.sum()} ({sum(targets) / lengths.sum():.1%}), "
        f"{min(targets)} to {max(targets)} a sample",
        f"samples without video {without_video} ({without_video / len(read):.1%})",
        f"without answers       {without_answer} ({without_answer / len(read):.1%}), for reconstruction alone",
    ]
    return lines


def histogram(values: np.ndarray) -> list[str]:
    """One line for each of up to `NUM_BINS` ranges of whole numbers."""
    low, high = int(values.min()), int(values.max())
    width = max(1, math.ceil((high - low + 1) / NUM_BINS))
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(values, edges)
    digits = len(str(edges[-1]))
    return [
        f"{start:>{digits}} - {start + width - 1:>{digits}} {'#' * math.ceil(BAR_WIDTH * count / counts.max())} {count}"
        for start, count in zip(edges[:-1].tolist(), counts.tolist(), strict=True)
    ]


def describe_problems(
    facts: list[SampleFacts],
    findings: Findings,
    data_args: DataArguments,
    num_entries: int | None,
) -> None:
    """Failures by cause, with examples. Messages that differ in names and numbers alone are one cause."""
    max_bad_samples, max_bad_share = data_args.max_bad_samples, data_args.max_bad_share
    is_skipped = data_args.on_bad_sample == "skip"
    bad = [one for one in facts if one.problem is not None]
    findings.lines.append(f"bad samples           {len(bad)} of {len(facts)} ({len(bad) / len(facts):.1%})")
    by_cause: dict[str, list[SampleFacts]] = {}
    for one in bad:
        by_cause.setdefault(_kind_of(one), []).append(one)
    for cause, some in sorted(by_cause.items(), key=lambda item: -len(item[1])):
        findings.lines.append(f"    {len(some)} x {cause}")
        findings.lines += [f"        {one.name}: {one.problem}" for one in some[:NUM_EXAMPLES]]
    if bad and not is_skipped:
        findings.failures.append(f"{bad[0].name} cannot be used ({bad[0].problem}), and on_bad_sample is raise")
    if max_bad_samples is not None and is_skipped and len(bad) > max_bad_samples:
        findings.failures.append(f"{len(bad)} bad samples alone are more than max_bad_samples={max_bad_samples}")
    if max_bad_share is not None and num_entries is not None and is_skipped:
        if len(bad) > max_bad_share * num_entries:
            findings.failures.append(
                f"{len(bad)} bad samples alone are more than max_bad_share={max_bad_share} of {num_entries}"
            )


def describe_steps(data: Any, training_args: Any, num_processes: int | None, good_share: float) -> list[str]:
    """Batch size and steps, for `num_processes` (by default those that run) and a share of samples that can be used."""
    num_processes = num_processes or training_args.world_size
    per_device, accumulation = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    effective = per_device * accumulation * num_processes
    lines = [
        f"effective batch       {effective} = {per_device} per device x {accumulation} accumulated x "
        f"{num_processes} processes"
    ]
    num_workers, num_cores = num_processes * training_args.dataloader_num_workers, os.cpu_count() or 1
    if num_workers > num_cores:
        lines.append(
            f"decoding              {num_workers} workers (one thread each) share {num_cores} cores: set "
            f"dataloader_num_workers to {max(1, num_cores // num_processes)} or less, if all processes run on this machine"
        )
    if not hasattr(data, "__len__"):
        return [*lines, f"optimizer steps       {training_args.max_steps}, from a stream"]
    batches = math.ceil(math.ceil(len(data) / num_processes) / per_device)
    in_epoch = math.ceil(batches / accumulation)
    steps = training_args.max_steps
    if steps <= 0:
        steps = math.ceil(in_epoch * training_args.num_train_epochs)
    epochs = f"{steps / in_epoch:.2f} epochs of {len(data)} samples"
    if good_share < 1:
        epochs += f", of which about {round(good_share * len(data))} can be used"
    return [*lines, f"optimizer steps       {steps}: {epochs}"]


def describe_memory(
    usable: list[SampleFacts],
    model: Any,
    training_args: Any,
    findings: Findings,
    is_sharded: bool,
    *,
    makes_mask: bool,
    **options: Any,
) -> None:
    """The step with the longest of the samples in every row."""
    batch_size = training_args.per_device_train_batch_size
    batch = {
        "batch_size": batch_size,
        "length": max(one.length for one in usable),
        "num_frames": batch_size * max(one.frames for one in usable),
        "num_targets": batch_size * max(one.targets for one in usable),
    }
    options["optimizer"] = str(getattr(training_args.optim, "value", training_args.optim))
    options["masked_length"] = batch_size * batch["length"] if makes_mask else 0
    findings.lines.append(
        f"memory per device     of a batch of {batch_size} x {batch['length']} tokens, {batch['num_frames']} frames and "
        f"{batch['num_targets']} targets, nothing sharded:"
    )
    is_on = bool(getattr(training_args, ACTIVATION_CHECKPOINTING))
    for checkpointing in (False, True):
        parts = step_memory(model, **batch, **options, checkpointing=checkpointing)
        title = f"{'with' if checkpointing else 'without'} checkpointing{' (this recipe)' * (checkpointing == is_on)}"
        shown = ", ".join(f"{name} {_readable(size)}" for name, size in parts.items() if name != "total" and size)
        findings.lines.append(f"    {title}: {_readable(parts['total'])} = {shown}")
        fixed = sum(parts[name] for name in ("weights", "gradients", "optimizer"))
    if torch.cuda.is_available() and training_args.device.type == "cuda":
        available = torch.cuda.get_device_properties(training_args.device).total_memory
        if fixed > available and not is_sharded:
            findings.failures.append(
                f"weights, gradients and optimizer take {_readable(fixed)}, the device has "
                f"{_readable(available)}: shard them (FSDP, ZeRO), or train adapters"
            )


def _kind_of(facts: SampleFacts) -> str:
    if facts.is_too_long:
        return "too long"
    # Quoted texts, paths and numbers become dots: what is left is the sentence that the messages have in common.
    common = re.sub(r"'[^']*'|\"[^\"]*\"|\S*[/\\]\S*|\b\d[\w.]*", "...", facts.problem)
    return common if len(common) <= 160 else f"{common[:160]} ..."


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 400 else f"{line[:400]} ..."


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
