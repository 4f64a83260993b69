"""Command lines that end with a message: its status and its one line are those that a user sees."""

import contextlib
import io
import re
from collections.abc import Iterator

import pytest

BAD_INPUT = 2  # exit status, as argparse has it for a wrong usage


@contextlib.contextmanager
def ends_with(message: str, status: int = BAD_INPUT) -> Iterator[io.StringIO]:
    """Expects that a command ends with this status, and that its standard error has a line that matches."""
    written = io.StringIO()
    with contextlib.redirect_stderr(written), pytest.raises(SystemExit) as ended:
        yield written
    assert ended.value.code == status, written.getvalue()
    assert re.search(message, written.getvalue()), written.getvalue()
