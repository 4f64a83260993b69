# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Compare the code of a checkpoint with that of a release of this package.

    llava-next-ar compare outputs/run
    llava-next-ar compare user/model --revision <commit> --diff

Remote code is run by whoever loads it. This reports whether the modules in a folder or a Hub repository are, byte for byte,
what this package writes at a save, or what an earlier release wrote; otherwise it lists what differs, and `--diff` prints
it. Modules of the owner, such as a head of their own, are listed apart. Nothing of the checkpoint is imported or run.

Exit status: 0 if all code is that of one release, 1 if something differs or comes from elsewhere, 2 if there is no code.
"""

import argparse
import difflib
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import snapshot_download

from .command_line import CommandParser, stop
from .hub_code import code_files

RELEASES = Path(__file__).with_name("releases.json")  # release -> file name -> SHA-256, written by --record
DISTRIBUTION = "llava-next-ar"


@dataclass(frozen=True)
class CodeComparison:
    """Modules of a checkpoint beside those of a release."""

    release: str
    """The installed release, or an earlier one that fits better."""
    same: tuple[str, ...]
    different: tuple[str, ...]
    missing: tuple[str, ...]
    """Modules of the release that the checkpoint lacks."""
    added: tuple[str, ...]
    """Modules that are not of the release, such as a user's own head."""

    @property
    def is_exact(self) -> bool:
        """All modules are those of the release, and there are no others."""
        return not (self.different or self.missing or self.added)

    def __str__(self) -> str:
        if self.is_exact:
            return f"{len(self.same)} modules: exactly the code of {DISTRIBUTION} {self.release}"
        lines = [f"{len(self.same)} modules equal those of {DISTRIBUTION} {self.release}"]
        for name in ("different", "missing", "added"):
            lines += [f"{name:<10} {module}" for module in getattr(self, name)]
        return "\n".join(lines)


def compare_code(found: Mapping[str, bytes]) -> CodeComparison:
    """Compares modules with the installed release and all recorded ones, and returns the closest comparison.

    Args:
        found: file name -> content of the modules of a checkpoint.
    """
    releases = {**recorded_releases(), version(DISTRIBUTION): _hashes(code_files())}
    here = _hashes(found)
    comparisons = [
        CodeComparison(
            release=release,
            same=tuple(sorted(name for name in here if there.get(name) == here[name])),
            different=tuple(sorted(name for name in here if there.get(name, here[name]) != here[name])),
            missing=tuple(sorted(there.keys() - here.keys())),
            added=tuple(sorted(here.keys() - there.keys())),
        )
        for release, there in reversed(releases.items())
    ]
    return min(comparisons, key=lambda one: len(one.different) + len(one.missing) + len(one.added))


def read_code(source: str, revision: str | None = None) -> dict[str, bytes]:
    """File name -> content of the modules in a folder, or in a repository on the Hub.

    Raises:
        ValueError: if there are none.
    """
    folder = Path(source) if Path(source).is_dir() else None
    if folder is None:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns="*.py"))
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("*.py"))}
    if not found:
        raise ValueError(f"{source} holds no code: expected the modules of a checkpoint, such as hub_code.py")
    return found


def recorded_releases() -> dict[str, dict[str, str]]:
    """Release -> file name -> SHA-256 of each module that it wrote at a save."""
    return json.loads(RELEASES.read_text(encoding="utf-8"))


def record_release() -> None:
    """Adds the code of this checkout, under its version, to the recorded releases."""
    releases = {**recorded_releases(), version(DISTRIBUTION): _hashes(code_files())}
    RELEASES.write_text(json.dumps(releases, indent=1) + "\n", encoding="utf-8")


def _hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="folder of a checkpoint, or Hub id")
    parser.add_argument("--revision", help="of the Hub id: a commit, branch or tag; the default branch if not given")
    parser.add_argument("--diff", action="store_true", help="print how modules differ from those installed here")
    parser.add_argument(
        "--record", action="store_true", help="record the code of this release (for those who make one)"
    )
    options = parser.parse_args(argv)
    if options.record:
        record_release()
        return
    if options.source is None:
        parser.error("give a folder or a Hub id")
    try:
        found = read_code(options.source, options.revision)
    except (ValueError, OSError) as error:
        stop(error)
    comparison = compare_code(found)
    print(comparison)
    if options.diff:
        installed = code_files()
        for name in comparison.different:
            before, after = (files.get(name, b"").decode(errors="replace") for files in (installed, found))
            lines = (before.splitlines(keepends=True), after.splitlines(keepends=True))
            sys.stdout.writelines(difflib.unified_diff(*lines, f"{DISTRIBUTION}/{name}", f"{options.source}/{name}"))
    sys.exit(int(not comparison.is_exact))
