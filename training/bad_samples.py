# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Samples that cannot be used: an error that names them, or a ledger of samples that training leaves out.

Without a ledger a bad sample stops training. With a ledger it is recorded once, and the data set returns a `BadSample` in its
place, which the collator drops. Training then uses the other samples alone. Above a bound in number or in share it stops.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:  # Unix only
    import fcntl
except ImportError:
    fcntl = None

logger = logging.getLogger(__name__)


class BadSampleError(ValueError):
    """A sample that cannot be used.

    Attributes:
        index: of the sample in its data set.
        sample_id: the entry's own `id`, if any.
        files: the media that the entry names.
        source: name of the data set.
        cause: class and message of the error.
    """

    # One positional argument: DataLoader re-raises a worker's error in the parent with its text alone.
    def __init__(
        self,
        message: str,
        *,
        index: int | None = None,
        sample_id: Any = None,
        files: Sequence[str] = (),
        source: str = "",
        cause: str = "",
    ) -> None:
        super().__init__(message)
        self.index = index
        self.sample_id = sample_id
        self.files = tuple(files)
        self.source = source
        self.cause = cause


class TooManyBadSamplesError(RuntimeError):
    """More bad samples than the ledger's bounds allow."""


@dataclass(frozen=True)
class BadSample:
    """Placeholder for a sample that is left out.

    Attributes:
        source, index: the data set and its entry.
        bad_sample_cause: class and message of the error.
    """

    source: str
    index: int
    bad_sample_cause: str


def is_bad_sample(sample: Any) -> bool:
    """Return True for a `BadSample`, recognised by its attribute: remote code has a second class of that name."""
    return hasattr(sample, "bad_sample_cause")


class BadSampleLedger:
    """A file of bad samples, one JSON object a line: `source`, `index`, `id`, `files`, `cause`.

    Workers and ranks share it by its path. Lines are appended whole, each sample once, also over epochs and after a restart.
    The count is that of all processes which share the file system.

    Args:
        path: of the file. It is created, with its folder, for the first bad sample.
        max_samples: upper bound on the number of bad samples.
        max_share: upper bound as a share of all entries of the data sets with this ledger, 0 to 1. A stream has no number of
            entries, hence no share: it needs `max_samples`.

    Raises:
        ValueError: without a bound, or for one that is out of range.
        TooManyBadSamplesError: by a data set that exceeds a bound.
    """

    def __init__(
        self, path: str | os.PathLike, *, max_samples: int | None = None, max_share: float | None = None
    ) -> None:
        if max_samples is None and max_share is None:
            raise ValueError(
                "a ledger of bad samples needs max_samples or max_share, or a broken disk empties the data"
            )
        if max_samples is not None and max_samples < 0:
            raise ValueError(f"max_samples must be at least 0, got {max_samples}")
        if max_share is not None and not 0 <= max_share <= 1:
            raise ValueError(f"max_share must lie in 0 ... 1, got {max_share}")
        self.path = Path(path).absolute()
        self.max_samples = max_samples
        self.max_share = max_share
        self.num_entries = 0
        self._recorded: set[tuple[str, int]] = set()
        self._read_up_to = 0  # bytes

    def expect(self, num_entries: int) -> None:
        """Counts a data set's entries among those that `max_share` is a share of."""
        self.num_entries += num_entries

    def __len__(self) -> int:
        """Number of bad samples in the file, of all processes."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                self._catch_up(file)
        return len(self._recorded)

    def records(self) -> list[dict[str, Any]]:
        """All lines of the file."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def add(self, error: BadSampleError) -> BadSample:
        """Records a bad sample, unless it is recorded already; returns its placeholder.

        Raises:
            TooManyBadSamplesError: if the file now lists more than allowed.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "source": error.source,
            "index": error.index,
            "id": error.sample_id,
            "files": list(error.files),
            "cause": error.cause,
        }
        with open(self.path, "ab+", buffering=0) as file, _locked(file):
            self._catch_up(file)
            is_new = (error.source, error.index) not in self._recorded
            if is_new:
                file.write(json.dumps(record, default=str).encode() + b"\n")  # at the end, in one piece
                self._catch_up(file)
        if is_new:
            logger.warning("bad sample %d, left out: %s", len(self._recorded), error)
        self.check_bounds()
        return BadSample(error.source, error.index, error.cause)

    def check_bounds(self) -> None:
        """Raises TooManyBadSamplesError if the file lists more than allowed."""
        count = len(self)
        bounds = [] if self.max_samples is None else [("max_bad_samples", self.max_samples, self.max_samples)]
        if self.max_share is not None and self.num_entries:
            bounds.append(("max_bad_share", self.max_share, self.max_share * self.num_entries))
        for name, bound, allowed in bounds:
            if count > allowed:
                of_all = f" of {self.num_entries} ({count / self.num_entries:.1%})" if self.num_entries else ""
                raise TooManyBadSamplesError(
                    f"{count}{of_all} samples are bad, more than {name}={bound} allows; {self.path} lists them. Mend "
                    "or remove them and delete that file, or raise the bound"
                )

    def _catch_up(self, file: Any) -> None:
        """Reads the lines that were appended since the last call; an incomplete line is left for the next call."""
        file.seek(self._read_up_to)
        lines = file.read()
        lines = lines[: lines.rfind(b"\n") + 1]
        self._read_up_to += len(lines)
        for line in lines.splitlines():
            record = json.loads(line)
            self._recorded.add((record["source"], record["index"]))


@contextlib.contextmanager
def _locked(file: Any) -> Iterator[None]:
    """Context in which no other process writes, where the system has file locks.

    Elsewhere two workers may both record a sample that they meet at the same moment. It is counted once.
    """
    locked = False
    if fcntl is not None:
        with contextlib.suppress(OSError):  # some network file systems have none
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
    try:
        yield
    finally:
        if locked:
            fcntl.flock(file, fcntl.LOCK_UN)


__all__ = ["BadSample", "BadSampleError", "BadSampleLedger", "TooManyBadSamplesError", "is_bad_sample"]
