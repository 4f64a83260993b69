"""Records of an evaluation, on disk as they come, so that it can be interrupted and resumed.

results.json                      the output
results.records-0.jsonl           process 0: a line of what the numbers depend on, then one line for each batch
results.records-1.jsonl           process 1
"""

import glob
import json
from pathlib import Path
from typing import Any, TextIO

from .settings import first_difference

Batches = dict[int, list[dict[str, Any]]]
"""Records of the questions of each finished batch, by its place in the global list of batches."""


class RecordFiles:
    """The record files beside an output. A run may be resumed by another number of processes than began it.

    Args:
        output: the file that the results will be written to.
        process: index of this process, which writes to a file of its own.
    """

    def __init__(self, output: Path, process: int) -> None:
        self.output = output
        self.own = output.with_name(f"{output.stem}.records-{process}.jsonl")
        self._file: TextIO | None = None

    def existing(self) -> list[Path]:
        pattern = f"{glob.escape(self.output.stem)}.records-*.jsonl"
        return sorted(self.output.parent.glob(pattern))

    def read(self, provenance: dict[str, Any]) -> Batches:
        """All finished batches. A line that was cut off by the end of its process is left out.

        Raises:
            ValueError: if they were made with other settings, of another model, on other data or with other versions
                (naming the key), or a file is damaged elsewhere than at its end.
        """
        batches: Batches = {}
        for path in self.existing():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True)):
                if not line.endswith("\n"):
                    continue  # the last one
                try:
                    entry = json.loads(line)
                    if number:
                        batches[entry["batch"]] = entry["records"]
                        continue
                    difference = first_difference(provenance, entry)
                except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"line {number + 1} of {path} is damaged ({error}); delete the file") from error
                if difference:
                    raise ValueError(
                        f"cannot resume from {path}: {difference}. Give the same, or delete the file to start anew"
                    )
        return batches

    def open(self, provenance: dict[str, Any]) -> None:
        """Makes this process's file, or goes on with it behind its last complete line."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        content = self.own.read_bytes() if self.own.exists() else b""
        self._file = open(self.own, "a", encoding="utf-8")
        self._file.truncate(content.rfind(b"\n") + 1)
        if b"\n" not in content:
            self._write(provenance)

    def append(self, batch: int, records: list[dict[str, Any]]) -> None:
        self._write({"batch": batch, "records": records})

    def remove(self) -> None:
        """Deletes all of them, once the output is written."""
        for path in self.existing():
            path.unlink(missing_ok=True)

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
