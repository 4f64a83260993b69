# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Compare the code of a checkpoint with that of a release of this package.

    llava-next-ar compare outputs/run
    llava-next-ar compare user/model --revision <commit> --diff

Loading a checkpoint with `trust_remote_code=True` runs its modules. The command reports whether the modules in a folder or Hub
repository equal, byte for byte, those that this package or an earlier release writes. Otherwise it lists the modules that
differ; `--diff` prints the differences. Modules of the owner, such as a custom head, are listed apart. No code of the
checkpoint is imported or run.

Exit status: 0 if all code is that of one release, 1 if a module differs or is not of the release, 2 if no code is found.
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
from .hub_folder import check_source
from .push_targets import endpoint_files

RELEASES = Path(__file__).with_name("releases.json")  # release -> file name -> SHA-256, written by --record
DISTRIBUTION = "llava-next-ar"
HANDLER = "handler.py"


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
    """Modules that are not of the release, such as a user's custom head."""

    @property
    def is_exact(self) -> bool:
        """True if all modules are those of the release, without others."""
        return not (self.different or self.missing or self.added)

    def __str__(self) -> str:
        if self.is_exact:
            return f"{len(self.same)} modules: exactly the code of {DISTRIBUTION} {self.release}"
        lines = [f"{len(self.same)} modules equal those of {DISTRIBUTION} {self.release}"]
        for name in ("different", "missing", "added"):
            lines += [f"{name:<10} {module}" for module in getattr(self, name)]
        return "\n".join(lines)


def compare_code(found: Mapping[str, bytes]) -> CodeComparison:
    """Compare modules with the installed release and all recorded ones, and return the closest comparison.

    Args:
        found: file name -> content of the modules of a checkpoint. `handler.py` of an Inference Endpoint is optional.
    """
    releases = {**recorded_releases(), version(DISTRIBUTION): _hashes(installed_code())}
    here = _hashes(found)
    comparisons = [
        CodeComparison(
            release=release,
            same=tuple(sorted(name for name in here if there.get(name) == here[name])),
            different=tuple(sorted(name for name in here if there.get(name, here[name]) != here[name])),
            missing=tuple(sorted(there.keys() - here.keys() - {HANDLER})),
            added=tuple(sorted(here.keys() - there.keys())),
        )
        for release, there in reversed(releases.items())
    ]
    return min(comparisons, key=lambda one: len(one.different) + len(one.missing) + len(one.added))


def installed_code() -> dict[str, bytes]:
    """File name -> content of the modules that the installed package writes: at each save, and for an Inference Endpoint."""
    return {**code_files(), HANDLER: endpoint_files()[HANDLER]}


def read_code(source: str, revision: str | None = None) -> dict[str, bytes]:
    """File name -> content of the modules in a folder, or in a repository on the Hub.

    Raises:
        ValueError: if it holds no modules, or `source` is neither a folder nor a Hub id.
    """
    check_source(source)
    folder = Path(source) if Path(source).is_dir() else None
    if folder is None:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns="*.py"))
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("*.py"))}
    if not found.keys() - {HANDLER}:
        raise ValueError(f"{source} holds no code: expected the modules of a checkpoint, such as hub_code.py")
    return found


def recorded_releases() -> dict[str, dict[str, str]]:
    """Release -> file name -> SHA-256 of each module that the release writes."""
    return json.loads(RELEASES.read_text(encoding="utf-8"))


def record_release() -> None:
    """Add the code of this checkout, under its version, to the recorded releases."""
    releases = {**recorded_releases(), version(DISTRIBUTION): _hashes(installed_code())}
    RELEASES.write_text(json.dumps(releases, indent=1) + "\n", encoding="utf-8")


def _hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="folder of a checkpoint, or Hub id")
    parser.add_argument("--revision", help="of the Hub id: a commit, branch or tag; the default branch if not given")
    parser.add_argument("--diff", action="store_true", help="print how modules differ from those installed here")
    parser.add_argument(
        "--record", action="store_true", help="record the code of this release (a step of making a release)"
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
        installed = installed_code()
        for name in comparison.different:
            before, after = (files.get(name, b"").decode(errors="replace") for files in (installed, found))
            lines = (before.splitlines(keepends=True), after.splitlines(keepends=True))
            sys.stdout.writelines(difflib.unified_diff(*lines, f"{DISTRIBUTION}/{name}", f"{options.source}/{name}"))
    sys.exit(int(not comparison.is_exact))
