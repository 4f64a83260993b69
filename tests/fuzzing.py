"""Mutations of valid inputs, and the check of the errors for malformed ones: see `check`."""

import copy
import json
import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from huggingface_hub.errors import StrictDataclassError

# Errors in the docstrings of the configuration, the processors and `load_video` (VideoReadError is a ValueError);
# transformers raises OSError for a file that is not JSON.
DOCUMENTED = (ValueError, TypeError, StrictDataclassError, OSError)
SECONDS = 30  # limit for one input; milliseconds are usual, but the machine may be busy

_VALUES = [
    *(None, True, False, -1, 0, 1, 2, 3, 5, 1000, 2**31, 2**70, -(2**70), 0.5, 1e308, math.nan, math.inf, -math.inf),
    *("", "x", "1", "../../etc/passwd", "average", "\x00", "é" * 50, [], {}, [None], [0], [-1, "x"], [[]], {"": None}),
    *({"height": 0, "width": 0}, [0.5, 0.5], "http://127.0.0.1:1/x.mp4", "http://127.0.0.1:1/a b.mp4", "http://[::1"),
]


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of each item below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from _places(child, (*path, key))


def mutate(good: Any, random: Random) -> tuple[Any, set[str]]:
    """Return a copy of JSON-like `good` with one error, and the name of its field (two names if renamed)."""
    value = copy.deepcopy(good)
    path = random.choice(list(_places(value)))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    fields = {next(part for part in reversed(path) if isinstance(part, str))}
    kind = random.choice(["replace"] * 5 + ["scale", "delete", "rename", "add", "wrap"])
    if kind == "delete":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        renamed = key[:-1] + random.choice("xyz_")
        parent[renamed] = parent.pop(key)
        fields.add(renamed)
    elif kind == "add" and isinstance(parent, dict):
        added = random.choice(["unknown_key", "num_frame", "class", "0"])
        parent[added] = random.choice(_VALUES)
        fields = {added}
    elif kind == "wrap":
        parent[key] = random.choice(([parent[key]], {"value": parent[key]}, str(parent[key])))
    elif kind == "scale" and isinstance(parent[key], (int, float)):
        parent[key] = random.choice((-1, 0.5, 1.5, 1000)) * parent[key]
    else:
        parent[key] = copy.deepcopy(random.choice(_VALUES))
    return value, fields


def damage(content: bytes, random: Random) -> bytes:
    """Return a copy of `content` with bytes changed, cut out, repeated or moved."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 8, 64])):
        start = random.randrange(len(data) + 1)
        # start and end determine most of a file
        start = random.choice([start, min(start, len(data), random.randrange(256)), max(0, len(data) - start % 512)])
        length = random.choice([1, 1, 2, 4, 16, 512])
        kind = random.choice(["flip", "flip", "set", "set", "random", "cut", "truncate", "repeat"])
        if kind == "flip" and start < len(data):
            data[start] ^= 1 << random.randrange(8)
        elif kind == "set":
            data[start : start + length] = random.choice([b"\x00", b"\xff", b"\x7f"]) * len(
                data[start : start + length]
            )
        elif kind == "random":
            data[start : start + length] = random.randbytes(len(data[start : start + length]))
        elif kind == "cut":
            del data[start : start + length]
        elif kind == "truncate" and random.random() < 0.3:
            del data[max(1, start) :]
        elif kind == "repeat":
            data[start:start] = data[start : start + length]
    return bytes(data)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after the limit. `DOCUMENTED` must not catch it: it is an OSError."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def check(run: Callable[[], Any], fields: set[str], counts: Counter) -> str | None:
    """Run one malformed input: it must work, or raise a documented error. Returns a description of a fault, or None.

    A documented error is of one of the `DOCUMENTED` classes, and its text contains the field (as the key, or as words:
    "video processor").
    """
    try:
        with time_limit(SECONDS):
            run()
    except TimeoutError as error:
        return f"hang: {error}"
    except DOCUMENTED as error:
        if any(name in str(error) or name.replace("_", " ") in str(error) for name in fields):
            counts[type(error).__name__] += 1
            return None
        return f"does not contain {sorted(fields)}: {type(error).__name__}: {error}"
    except Exception as error:  # a fault that the tests must find
        return f"undocumented {type(error).__name__}: {error}"
    counts["worked"] += 1
    return None


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:600]
