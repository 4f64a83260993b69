"""`llava-next-ar train --check`: the effect of a recipe on its data, without training.

Reads the configuration, the processor and a random sample of the data: texts and headers of media, and a few of the samples
decoded. Needs no weights and writes nothing.
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
class SampleStatistics:
    """Counts of one sample. `problem` is the reason why it cannot be used, None if it can."""

    position: str
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
        """The entry's own `id`, if it has one, and its position in the data set, counted from 0."""
        return self.position if self.sample_id is None else f"{self.sample_id!r}, {self.position}"


@dataclass
class PreflightReport:
    """Lines of the report, and the faults that would certainly end the run."""

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        verdict = [f"FAILS: {failure}" for failure in self.failures] or ["nothing found that would certainly fail"]
        return "\n".join([*self.lines, "", *verdict])


class _Statistics(Dataset):
    """`SampleStatistics` in the place of samples: from text and headers, or with `decodes` from the decoded sample."""

    def __init__(self, samples: Sequence[UnreadSample], decodes: bool) -> None:
        self.samples, self.decodes = samples, decodes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> SampleStatistics:
        sample = self.samples[number]
        statistics = SampleStatistics(f"sample {sample.index} of {sample.source}")
        try:
            encoded = self._decode(sample, statistics) if self.decodes else self._count(sample, statistics)
        except BadSampleError as error:
            statistics.problem, statistics.sample_id = _one_line(error.cause), error.sample_id
            return statistics
        statistics.length, statistics.targets = len(encoded["input_ids"]), int((encoded["labels"] != -100).sum())
        try:
            sample.reader.fit(encoded)
        except ValueError as error:
            entry = sample.entry() if callable(sample.entry) else sample.entry
            statistics.problem, statistics.is_too_long = _one_line(f"ValueError: {error}"), True
            statistics.sample_id = entry.get("id")
        return statistics

    def _count(self, sample: UnreadSample, statistics: SampleStatistics) -> dict[str, torch.Tensor]:
        text, labels = read_sample(sample.reader, "text", sample.entry, source=sample.source, index=sample.index)
        statistics.videos, statistics.frames, statistics.images = text.num_videos, text.num_frames, text.num_images
        return {"input_ids": text.input_ids, "labels": labels}

    def _decode(self, sample: UnreadSample, statistics: SampleStatistics) -> dict[str, torch.Tensor]:
        encoded = read_sample(sample.reader, "encode", sample.entry, source=sample.source, index=sample.index)
        if "pixel_values_videos" in encoded:
            statistics.videos = len(encoded["pixel_values_videos"])
            statistics.frames = int(encoded["video_frame_mask"].sum())
        statistics.images = int(encoded["batch_num_images"].sum()) if "batch_num_images" in encoded else 0
        return encoded


def collect_statistics(
    samples: Sequence[UnreadSample], num_decoded: int, num_workers: int
) -> tuple[list[SampleStatistics], list[str]]:
    """Returns statistics of samples, the first `num_decoded` usable ones with media decoded, and lines about these."""

    def collect(samples: Sequence[UnreadSample], decodes: bool) -> list[SampleStatistics]:
        loader = DataLoader(
            _Statistics(samples, decodes), batch_size=1, collate_fn=lambda batch: batch[0], num_workers=num_workers
        )
        return list(tqdm(loader, total=len(samples), desc="decoding" if decodes else "reading headers"))

    # A processor of remote code may be older than counting: then each sample is decoded.
    can_count = hasattr(samples[0].reader.processor, "video_text")
    if not can_count:
        return collect(samples, decodes=True), [f"samples               {len(samples)} decoded"]
    statistics = collect(samples, decodes=False)
    with_media = [
        number for number, sample in enumerate(statistics) if sample.problem is None and sample.videos + sample.images
    ]
    chosen = with_media[:num_decoded]
    decoded = collect([samples[number] for number in chosen], decodes=True) if chosen else []
    differing = 0
    for number, sample in zip(chosen, decoded, strict=True):
        differing += sample.length not in (0, statistics[number].length)
        statistics[number] = sample
    lines = [f"samples               {len(samples)} read, of which {len(decoded)} decoded"]
    if differing:
        lines.append(f"    {differing} of these {len(decoded)} have another length than their headers give")
    return statistics, lines


def run_preflight(
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
) -> PreflightReport:
    """Reports the statistics of a sample of the data, and the memory of the step that it makes.

    Args:
        model: on the meta device, with what trains set to train.
        data: what `load_training_data` returned, without a ledger.
        data_args: of the recipe: how many samples are read and decoded at most, and bounds on bad ones.
        compute_dtype: of autocast, or of the weights.
        num_quantized: weights that will be loaded in 4 bits.
        makes_mask: whether the attention of a packed row has a mask of all its tokens.
        is_sharded: whether the devices share the weights.
    """
    report = PreflightReport()
    samples = choose_samples(data, data_args.check_samples, training_args.seed)
    statistics, lines = collect_statistics(samples, data_args.check_decoded, training_args.dataloader_num_workers)
    usable = [sample for sample in statistics if sample.problem is None]
    report.lines += [
        *describe_frames(processor),
        *lines,
        *describe_samples(statistics, model, samples[0].reader.max_length),
    ]
    num_entries = len(data) if hasattr(data, "__len__") else None
    describe_problems(statistics, report, data_args, num_entries)
    report.lines += describe_steps(data, training_args, data_args.num_processes, len(usable) / len(statistics))
    if usable and not any(sample.targets for sample in usable) and not data_args.reconstruction_only:
        report.failures.append(
            f"none of {len(usable)} samples has a supervised token, so main_loss would stay 0: put answers under "
            "'conversations' (turns from 'gpt') or 'messages', or set reconstruction_only: true if that is meant"
        )
    if usable:
        options = {"compute_dtype": compute_dtype, "num_quantized": num_quantized, "makes_mask": makes_mask}
        describe_memory(usable, model, training_args, report, is_sharded, **options)
    else:
        report.failures.append(f"none of the {len(statistics)} samples can be used")
    return report


def choose_samples(data: Any, num_samples: int, seed: int) -> list[UnreadSample]:
    """Returns a random choice without repetition; the first samples of a stream."""
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
    frame_types = [0, 1] if layout.is_slow_fast else [0]
    per_frame = " (slow), ".join(str(layout.tokens_per_frame(frame_type)) for frame_type in frame_types)
    sampling = processor.video_processor.sampling_for()
    settings = inspect.signature(SAMPLING_POLICIES[sampling.policy]).parameters.values()
    names = [setting.name for setting in settings if setting.kind is inspect.Parameter.KEYWORD_ONLY]
    chosen = ", ".join(f"{name} {getattr(sampling, name)}" for name in names if getattr(sampling, name))
    return [
        f"tokens per frame      {per_frame}{' (fast)' * (len(frame_types) > 1)}",
        f"frames                {sampling.policy}: {chosen}",
    ]


def describe_samples(statistics: list[SampleStatistics], model: Any, max_length: int | None) -> list[str]:
    read = [sample for sample in statistics if sample.length]
    if not read:
        return ["    none of them can be read"]
    lengths = np.array([sample.length for sample in read])
    frames = [sample.frames for sample in read if sample.videos]
    targets = [sample.targets for sample in read]
    context = _base(model).config.text_config.max_position_embeddings
    limits = {"the context (max_position_embeddings)": context}
    if max_length is not None:
        limits["max_length"] = max_length
    without_video = sum(not sample.videos for sample in read)
    without_answer = sum(not sample.targets for sample in read)
    lines = []
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
    """Returns one line for each of up to `NUM_BINS` ranges of integers."""
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
    statistics: list[SampleStatistics],
    report: PreflightReport,
    data_args: DataArguments,
    num_entries: int | None,
) -> None:
    """Reports bad samples by cause, with examples. Messages that differ in names and numbers alone have one cause."""
    max_bad_samples, max_bad_share = data_args.max_bad_samples, data_args.max_bad_share
    is_skipped = data_args.on_bad_sample == "skip"
    bad = [sample for sample in statistics if sample.problem is not None]
    report.lines.append(f"bad samples           {len(bad)} of {len(statistics)} ({len(bad) / len(statistics):.1%})")
    by_cause: dict[str, list[SampleStatistics]] = {}
    for sample in bad:
        by_cause.setdefault(_cause_of(sample), []).append(sample)
    for cause, examples in sorted(by_cause.items(), key=lambda item: -len(item[1])):
        report.lines.append(f"    {len(examples)} x {cause}")
        report.lines += [f"        {sample.name}: {sample.problem}" for sample in examples[:NUM_EXAMPLES]]
    if bad and not is_skipped:
        report.failures.append(f"{bad[0].name} cannot be used ({bad[0].problem}), and on_bad_sample is raise")
    if max_bad_samples is not None and is_skipped and len(bad) > max_bad_samples:
        report.failures.append(f"{len(bad)} bad samples alone are more than max_bad_samples={max_bad_samples}")
    if max_bad_share is not None and num_entries is not None and is_skipped:
        if len(bad) > max_bad_share * num_entries:
            report.failures.append(
                f"{len(bad)} bad samples alone are more than max_bad_share={max_bad_share} of {num_entries}"
            )


def describe_steps(data: Any, training_args: Any, num_processes: int | None, good_share: float) -> list[str]:
    """Returns lines about batch size and steps.

    Args:
        num_processes: by default those that run.
        good_share: share of samples that can be used.
    """
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
    usable: list[SampleStatistics],
    model: Any,
    training_args: Any,
    report: PreflightReport,
    is_sharded: bool,
    *,
    makes_mask: bool,
    **options: Any,
) -> None:
    """Reports the memory of a step with the longest of the samples in every row."""
    batch_size = training_args.per_device_train_batch_size
    batch = {
        "batch_size": batch_size,
        "length": max(sample.length for sample in usable),
        "num_frames": batch_size * max(sample.frames for sample in usable),
        "num_targets": batch_size * max(sample.targets for sample in usable),
    }
    options["optimizer"] = str(getattr(training_args.optim, "value", training_args.optim))
    options["masked_length"] = batch_size * batch["length"] if makes_mask else 0
    report.lines.append(
        f"memory per device     of a batch of {batch_size} x {batch['length']} tokens, {batch['num_frames']} frames and "
        f"{batch['num_targets']} targets, nothing sharded:"
    )
    is_on = bool(getattr(training_args, ACTIVATION_CHECKPOINTING))
    for checkpointing in (False, True):
        parts = step_memory(model, **batch, **options, checkpointing=checkpointing)
        title = f"{'with' if checkpointing else 'without'} checkpointing{' (this recipe)' * (checkpointing == is_on)}"
        shown = ", ".join(f"{name} {_readable(size)}" for name, size in parts.items() if name != "total" and size)
        report.lines.append(f"    {title}: {_readable(parts['total'])} = {shown}")
        fixed = sum(parts[name] for name in ("weights", "gradients", "optimizer"))
    if torch.cuda.is_available() and training_args.device.type == "cuda":
        available = torch.cuda.get_device_properties(training_args.device).total_memory
        if fixed > available and not is_sharded:
            report.failures.append(
                f"weights, gradients and optimizer take {_readable(fixed)}, the device has "
                f"{_readable(available)}: shard them (FSDP, ZeRO), or train adapters"
            )


def _cause_of(statistics: SampleStatistics) -> str:
    if statistics.is_too_long:
        return "too long"
    # Quoted texts, paths and numbers become dots. The remaining sentence is common to all messages of a cause.
    common = re.sub(r"'[^']*'|\"[^\"]*\"|\S*[/\\]\S*|\b\d[\w.]*", "...", statistics.problem)
    return common if len(common) <= 160 else f"{common[:160]} ..."


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 400 else f"{line[:400]} ..."


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
