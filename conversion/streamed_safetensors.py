"""Safetensors checkpoints read and written tensor by tensor, in the memory of one tensor.

`read_index` reads names, shapes and types from the headers alone and rejects damaged files and pickles. `write_shards`
writes the header of each shard from such an index, and then one tensor at a time.
"""

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """Unreadable checkpoint, or a checkpoint with other tensors than the model."""


@dataclass(frozen=True)
class StoredTensor:
    """Tensor in a file, not read yet."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Index all tensors of the checkpoint in a folder, in the order of the files.

    Raises:
        CheckpointError: without a safetensors checkpoint (pickles are not read), with two, if a shard is missing or
            damaged, or shards and index differ.
    """
    tensors: dict[str, StoredTensor] = {}
    promised = None
    files = _single_file(folder)
    if (folder / _INDEX).exists():
        if (folder / "model.safetensors").exists():
            raise CheckpointError(f"{folder} holds both model.safetensors and {_INDEX}: remove the outdated one")
        promised = json.loads((folder / _INDEX).read_text())["weight_map"]
        files = [folder / name for name in sorted(set(promised.values()))]
    for file in files:
        for tensor in _read_header(file):
            if tensor.name in tensors:
                raise CheckpointError(f"{tensor.name} is both in {tensors[tensor.name].file.name} and in {file.name}")
            tensors[tensor.name] = tensor
    if promised is not None:
        lost = [f"{name} ({file})" for name, file in promised.items() if name not in tensors]
        stray = [f"{name} ({tensor.file.name})" for name, tensor in tensors.items() if name not in promised]
        if lost or stray:
            raise CheckpointError(
                f"the shards differ from {_INDEX} ; missing: {listed(lost)}; not in it: {listed(stray)}"
            )
    return tensors


def _single_file(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").exists() or (folder / _INDEX).exists():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(f"{folder} holds {len(found)} safetensors files, but no {_INDEX} that lists them")
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} has weights as pickles only ({listed(pickles)}), which can run any code when they are "
            "loaded: use a safetensors version of the checkpoint"
        )
    raise CheckpointError(f"{folder} has no safetensors file")


def _read_header(file: Path) -> list[StoredTensor]:
    if not file.exists():
        raise CheckpointError(f"{file.name} is missing from {file.parent}")
    tensors = []
    try:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():
                view = shard.get_slice(name)
                code = view.get_dtype()
                if code not in DTYPES:
                    raise CheckpointError(f"{name} in {file.name} has the type {code}, expected one of {list(DTYPES)}")
                tensors.append(StoredTensor(name, file, tuple(view.get_shape()), DTYPES[code]))
    except SafetensorError as error:
        raise CheckpointError(f"{file.name} is damaged or not a safetensors file: {error}") from error
    return tensors


class TensorReader:
    """Reader of stored tensors. It keeps the last file open alone, which frees the memory maps of the others."""

    def __init__(self):
        self._stack = ExitStack()
        self._file = None
        self._shard = None

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """Return the tensor; it can be a view of the file."""
        if tensor.file != self._file:
            self._stack.close()
            self._shard = self._stack.enter_context(safe_open(tensor.file, framework="pt"))
            self._file = tensor.file
        return self._shard.get_tensor(tensor.name)

    def same(self, first: StoredTensor, second: StoredTensor, rows: int = 4096) -> bool:
        """Compare two stored tensors piece by piece; True if they are equal."""
        if first.shape != second.shape:
            return False
        with safe_open(first.file, framework="pt") as a, safe_open(second.file, framework="pt") as b:
            left, right = a.get_slice(first.name), b.get_slice(second.name)
            return all(
                torch.equal(left[start : start + rows], right[start : start + rows])
                for start in range(0, first.shape[0], rows)
            )


@dataclass(frozen=True)
class PlannedTensor:
    """Tensor to be written, and its source.

    Attributes:
        name, shape, dtype: as written.
        source: stored tensor; None for zeros.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: StoredTensor | None

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def load(self, reader: TensorReader) -> torch.Tensor:
        if self.source is None:
            return torch.zeros(self.shape, dtype=self.dtype)
        return reader.read(self.source).to(self.dtype)


def write_shards(
    folder: Path,
    plan: Sequence[PlannedTensor],
    max_shard_size: int,
    on_written: Callable[[PlannedTensor], None] = lambda tensor: None,
) -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_size` bytes (or one tensor) and their index."""
    shards = list(_split(plan, max_shard_size))
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, on_written)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in plan)},
            "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _split(plan: Sequence[PlannedTensor], max_shard_size: int) -> Iterator[list[PlannedTensor]]:
    shard: list[PlannedTensor] = []
    for tensor in plan:
        if shard and sum(other.num_bytes for other in shard) + tensor.num_bytes > max_shard_size:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write_shard(path: Path, shard: list[PlannedTensor], on_written: Callable[[PlannedTensor], None]) -> None:
    # Wide types first, so that each tensor begins at a multiple of its width.
    shard = sorted(shard, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file, TensorReader() as reader:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in shard:
            values = tensor.load(reader).contiguous().reshape(-1)
            file.write(memoryview(values.view(torch.uint8).numpy()))
            del values  # a view of the file would keep it mapped while the next file is opened
            on_written(tensor)


def listed(names: Sequence[str], limit: int = 20) -> str:
    """Names in an error message."""
    shown = ", ".join(names[:limit]) or "none"
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
