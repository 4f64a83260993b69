# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Sources of entries: LLaVA JSON, JSON lines, parquet, and data sets of the `datasets` library.

`open_entries` returns a sequence, `stream_entries` an iterable without an index. Entries stay in their stored form
(text, or Arrow tables on disk) until they are accessed. So DataLoader workers share the memory of their parent. With
millions of Python objects each access would copy memory pages, since it changes a reference count.

`datasets` is needed for formats other than JSON. Its decoding of media is not used: tables are read in their stored form, and
the bytes or the path are passed to the processor. So torchcodec is not needed.
"""

import json
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..configuration.key_names import nearest_name
from .entries import without_nulls

try:
    import datasets
except ImportError:
    datasets = None

JSON_SUFFIXES = (".json", ".jsonl")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ROWS_AT_A_TIME = 64  # rows of a batch of a stream


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One source of entries.

    Attributes:
        path: a `.json`, `.jsonl` or `.parquet` file, a folder written by `datasets`' `save_to_disk`, or the id of a data
            set on the Hub.
        weight: relative frequency of its samples; see `LlavaVideoMixture` and `LlavaVideoStream`.
        name: configuration of a data set on the Hub.
        split: of a data set on the Hub or on disk; by default the only one, or `train`.
        revision: of a data set on the Hub.
        video_root, image_root: folders that paths are relative to; by default those of the data set's arguments.

    Raises:
        ValueError: if the weight is not above 0.
    """

    path: str
    weight: float = 1.0
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    video_root: str | None = None
    image_root: str | None = None

    def __post_init__(self) -> None:
        is_number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not is_number or not 0 < self.weight < float("inf"):
            raise ValueError(f"the weight of {self.path} must be a number above 0, got {self.weight!r}")

    @classmethod
    def parse(cls, value: "str | os.PathLike | dict[str, Any] | DataSource") -> "DataSource":
        """Returns a source from a path, or from a mapping of this class's attributes, also as JSON text.

        Raises:
            ValueError: on an unknown key, naming the nearest, or a missing path.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = json.loads(value)
        if not isinstance(value, dict):
            return cls(path=os.fspath(value))
        known = [field.name for field in fields(cls)]
        for key in value:
            if key not in known:
                nearest = nearest_name(str(key), known)
                raise ValueError(f"unknown key {key!r} of a data source; did you mean {nearest!r}?")
        if not isinstance(value.get("path"), (str, os.PathLike)):
            raise ValueError(f"a data source needs a path, got {value!r}")
        return cls(**{**value, "path": os.fspath(value["path"])})

    @property
    def label(self) -> str:
        """Name in errors and in the ledger of bad samples."""
        parts = [self.path, *(f"{key}={getattr(self, key)}" for key in ("name", "split") if getattr(self, key))]
        return " ".join(parts)

    @property
    def default_root(self) -> Path:
        """Default folder that paths are relative to: the folder of the file; the working folder for the Hub."""
        path = Path(self.path).absolute()
        return path if path.is_dir() else path.parent if path.is_file() else Path.cwd()


def parse_sources(value: Any) -> list[DataSource]:
    """Returns a list of sources from one or several. Raises ValueError for none, or for the same twice."""
    sources = [DataSource.parse(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    if not sources:
        raise ValueError("no data source is given")
    labels = [source.label for source in sources]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{label} is given {labels.count(label)} times; give it once, with a weight")
    return sources


def open_entries(source: DataSource) -> Sequence[Any]:
    """Returns the entries of a source, which are loaded on access.

    Raises:
        ValueError: if the file holds no entries.
        FileNotFoundError: if neither the file nor the data set exists.
    """
    if _is_json(source):
        return JsonEntries(source.path)
    return ArrowEntries(_load_with_datasets(source, streaming=False))


def stream_entries(source: DataSource) -> Iterable[Any]:
    """Returns an iterable of the entries of a source in their order, which keeps none in memory."""
    if _is_json(source):
        return JsonEntries(source.path)
    return _ArrowStream(_load_with_datasets(source, streaming=True))


class _Entries(Sequence):
    """Entries by number, or several by a slice."""

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._entry(i) for i in range(*index.indices(len(self)))]
        return self._entry(index)

    def _entry(self, index: int) -> Any:
        raise NotImplementedError


class JsonEntries(_Entries):
    """Entries of a JSON list or of JSON lines, kept as text until they are accessed.

    JSON lines stay in the file, and only their positions are kept. A line that is not valid JSON is an error on access. A JSON
    list is read once and kept as one block of text.

    Raises:
        ValueError: if a `.json` file holds no list, or is not valid JSON.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise FileNotFoundError(f"no such file: {self._path}")
        if self._path.suffix == ".jsonl":
            self._text = None
            self._spans = _line_spans(self._path)
            return
        try:
            with open(self._path, encoding="utf-8") as file:
                entries = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self._path} is not valid JSON: {error}") from error
        if not isinstance(entries, list):
            raise ValueError(f"{self._path} must hold a list of entries, got {type(entries).__name__}")
        texts = [json.dumps(entry).encode() for entry in entries]
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._text = np.frombuffer(b"".join(texts), dtype=np.uint8)
        self._spans = (
            np.stack([ends - [len(text) for text in texts], ends], axis=1) if texts else np.zeros((0, 2), int)
        )

    def __len__(self) -> int:
        return len(self._spans)

    def _entry(self, index: int) -> Any:
        start, end = self._spans[index].tolist()
        if self._text is not None:
            return json.loads(self._text[start:end].tobytes())
        with open(self._path, "rb") as file:  # each worker has its own descriptor
            file.seek(start)
            return json.loads(file.read(end - start))


class ArrowEntries(_Entries):
    """Rows of a `datasets.Dataset`, read from disk. Media are not decoded."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def _entry(self, index: int) -> Any:
        return without_nulls(self._dataset[int(index)].to_pylist()[0])


class _ArrowStream:
    """Rows of a `datasets` data set one after the other. Media are not decoded.

    Read in batches of rows. Iterated row by row, `datasets` would return the part of its DataLoader worker alone, and
    `LlavaVideoStream` distributes samples by itself.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset.with_format("arrow")

    def __iter__(self) -> Iterator[Any]:
        for table in self._dataset.iter(batch_size=_ROWS_AT_A_TIME):
            yield from map(without_nulls, table.to_pylist())


def _is_json(source: DataSource) -> bool:
    return Path(source.path).suffix in JSON_SUFFIXES


def _load_with_datasets(source: DataSource, streaming: bool) -> Any:
    if datasets is None:
        raise ImportError(
            f"{source.path} is read with the package datasets, which is not installed: pip install datasets"
        )
    path = Path(source.path)
    if path.suffix == ".parquet":
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        loaded = datasets.load_from_disk(str(path))  # memory-mapped, so it needs no stream
    elif path.exists():
        raise ValueError(
            f"{path} is not a data set: expected a .json, .jsonl or .parquet file, or a folder written by save_to_disk"
        )
    elif not _HUB_ID.fullmatch(source.path):
        raise FileNotFoundError(f"no such file: {path}")
    else:
        options = {"name": source.name, "revision": source.revision}
        loaded = datasets.load_dataset(source.path, split=source.split, streaming=streaming, **options)
    if not isinstance(loaded, dict):
        return loaded
    split = source.split or (next(iter(loaded)) if len(loaded) == 1 else "train")
    if split not in loaded:
        raise ValueError(f"{source.path} has no split {split!r}, only {', '.join(loaded)}")
    return loaded[split]


def _line_spans(path: Path) -> np.ndarray:
    """Begin and end of the lines that are not empty, `[N, 2]`."""
    if not path.stat().st_size:
        return np.zeros((0, 2), dtype=np.int64)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        spans, start = [], 0
        while start < len(text):
            end = text.find(b"\n", start)
            end = len(text) if end < 0 else end
            if text[start:end].strip():
                spans.append((start, end))
            start = end + 1
    return np.array(spans, dtype=np.int64).reshape(-1, 2)
