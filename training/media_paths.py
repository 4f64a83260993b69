# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Paths of an untrusted data set, confined to a folder."""

import os
from pathlib import Path

from ..processing.media_sources import source_name


def path_below(root: str | os.PathLike, name: str, kind: str = "file") -> str:
    """Returns the real path of a file or folder below `root`.

    Neither `..`, absolute paths nor symbolic links lead out of `root`, nor does a link among the frames of a folder.
    The path returned holds no link, so that the checked file is read even if a link changes afterwards. (A process that
    exchanges folders while they are being read is stopped by file permissions alone.)

    Args:
        root: a folder.
        name: a path, relative to `root` or absolute.
        kind: noun for the file in messages.

    Raises:
        ValueError: if the path leads out of `root`, naming its target.
        FileNotFoundError: if the file does not exist.
    """
    root = Path(root).resolve()
    path = Path(os.path.abspath(root / name))
    shown = source_name(name)
    real = _checked(path, root, f"{kind} {shown!r}")
    if not real.exists():
        raise FileNotFoundError(f"no such file: {path if shown == name else shown}")
    if real.is_dir():
        with os.scandir(real) as entries:
            for entry in entries:
                if entry.is_symlink():
                    _checked(Path(entry.path), root, f"{entry.name!r} in the {kind} folder {shown!r}")
    return str(real)


def _checked(path: Path, root: Path, what: str) -> Path:
    real = path.resolve()
    if not real.is_relative_to(root):
        raise ValueError(f"{what} leads to {real}, outside of {root}; allow_outside_root=True accepts it")
    return real
