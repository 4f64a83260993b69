"""Table at the end of the test output: objects pushed to the local Hub x ways of loading them.

The tests of the cells give theirs with the fixture `hub_cell(row, column)`. It travels in the test reports, so the table
is right under `pytest -n` too.
"""

from collections.abc import Callable

import pytest

PROPERTY = "hub_cell"


@pytest.fixture
def hub_cell(record_property) -> Callable[[str, str, str], None]:
    """Record what this test compared, in a word or two: (row, column, outcome)."""
    return lambda row, column, text: record_property(PROPERTY, [row, column, text])


def pytest_terminal_summary(terminalreporter):
    cells: dict[str, dict[str, str]] = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, value in getattr(report, "user_properties", []):
                if key == PROPERTY:
                    row, column, text = value
                    cells.setdefault(row, {})[column] = text if outcome == "passed" else "FAILED"
    if not cells:
        return
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    table = [["pushed \\ loaded", *columns]]
    table += [[row, *(found.get(column, "not run") for column in columns)] for row, found in cells.items()]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    terminalreporter.section("pushed to a local Hub and loaded back")
    for line in table:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        terminalreporter.line(text, red="FAILED" in line)
