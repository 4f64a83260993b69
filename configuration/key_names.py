# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Unknown names: an error in keyword arguments, kept with a warning in the files of a checkpoint.

A misspelt keyword is a mistake of the caller. A file may hold keys of other tools, which are kept and saved again, as in
transformers. Both messages name the nearest known name.
"""

import difflib
import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

_SIMILAR = 0.6  # from this similarity on a name is worth suggesting
_MISSPELT = 0.85  # from this one on it is a misspelling; `eos_token` and `video_token` have 0.8


def nearest_name(name: str, known: Iterable[str], cutoff: float = 0.0) -> str | None:
    """The known name that is most similar, by letters in their order or by shared words; None below `cutoff` (0 to 1)."""
    words = set(name.split("_"))

    def similarity(candidate: str) -> tuple[float, float]:
        by_letters = difflib.SequenceMatcher(None, name, candidate).ratio()
        candidate_words = set(candidate.split("_"))
        by_words = 2 * len(words & candidate_words) / (len(words) + len(candidate_words))
        return max(by_letters, by_words), by_letters

    best = max(sorted(known), key=similarity, default=None)
    return None if best is None or similarity(best)[0] < cutoff else best


def refuse_unknown(
    names: Iterable[str], known: Collection[str], where: str, elsewhere: Mapping[str, Collection[str]] | None = None
) -> None:
    """Raises ValueError for unknown keywords.

    Args:
        names: keywords of the call.
        known: all valid keywords.
        where: the object or file, as the message names it.
        elsewhere: valid keywords of other objects, by the name of the object.

    Raises:
        ValueError: naming the first unknown one, and the nearest known one, or all known ones if none is near.
    """
    for name in names:
        if name not in known:
            hint = _hint(name, known, elsewhere) or f"known are: {', '.join(sorted(known))}"
            raise ValueError(f"unknown option {name!r} for {where}; {hint}")


def refuse_misspelt(
    names: Iterable[str], known: Collection[str], where: str, elsewhere: Mapping[str, Collection[str]] | None = None
) -> None:
    """As `refuse_unknown`, for names close to a known one alone. The rest may be meant for another object that is loaded."""
    candidates = [*known, *(name for names in (elsewhere or {}).values() for name in names)]
    misspelt = [name for name in names if nearest_name(name, candidates, _MISSPELT)]
    refuse_unknown(misspelt, known, where, elsewhere)


def warn_unknown(
    names: Iterable[str], known: Collection[str], where: str, elsewhere: Mapping[str, Collection[str]] | None = None
) -> None:
    """Warns once about keys that are kept although they are not known; arguments as in `refuse_unknown`."""
    for name in names:
        if name not in known:
            hint = _hint(name, known, elsewhere)
            logger.warning_once(f"unknown key {name!r} in {where} is kept, but has no effect{hint and f'; {hint}'}")


def keep_unknown(target: Any, values: Mapping[str, Any], where: str) -> None:
    """Sets unknown keys of a file as attributes of the object that was built from the known ones.

    Raises:
        ValueError: naming a key that would hide a method, property or table (`sub_configs`) of the object.
    """
    for name, value in values.items():
        member = inspect.getattr_static(type(target), name, None)
        if callable(member) or isinstance(member, (property, classmethod, staticmethod, dict)):
            raise ValueError(f"key {name!r} in {where} is the name of a method or property of {type(target).__name__}")
        setattr(target, name, value)


def _hint(name: str, known: Collection[str], elsewhere: Mapping[str, Collection[str]] | None) -> str:
    """A suggestion, or an empty text if no name is near."""
    locations = {candidate: location for location, names in (elsewhere or {}).items() for candidate in names}
    locations |= dict.fromkeys(known, "")
    nearest = nearest_name(name, locations, _SIMILAR)
    if nearest is None:
        return ""
    return f"{nearest!r} belongs in {locations[nearest]}" if locations[nearest] else f"did you mean {nearest!r}?"
