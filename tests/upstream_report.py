"""For test_transformers_common.py: the markers of transformers' tests, which of them are slow, and a count at the end."""

from collections import Counter

import pytest
from environments import fetch_transformers_tests

FILE = "test_transformers_common.py"
MARKERS = (
    *("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "generate"),
    *("torch_compile_test", "torch_export_test", "training_ci", "tensor_parallel_ci"),
)


def pytest_configure(config):
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: of transformers' own tests")


def pytest_itemcollected(item):
    fast = getattr(getattr(item, "cls", None), "fast_tests", None)
    if item.path.name == FILE and fast is not None and item.originalname not in fast:
        item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter):
    outcomes, reasons = {}, Counter()
    # From what weighs least to what weighs most: a test whose part fails has failed, one of whose parts is skipped has not
    # been skipped.
    for outcome in ("skipped", "passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            is_part = hasattr(report, "context")
            if FILE in getattr(report, "nodeid", "") and not (is_part and outcome == "skipped"):
                outcomes[report.nodeid] = outcome
                if outcome == "skipped":
                    reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1
    counts = Counter(outcomes.values())
    failed = counts["failed"] + counts["error"]
    if not counts:
        return
    terminalreporter.section("transformers' own common tests")
    if counts["passed"] or failed:
        for line in fetch_transformers_tests.describe(fetch_transformers_tests.fetch()):
            terminalreporter.line(line)
        summary = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "error", "skipped"))
        terminalreporter.line(summary, red=bool(failed), green=not failed)
    for reason, count in sorted(reasons.items(), key=lambda entry: -entry[1]):
        terminalreporter.line(f"skipped {count:>3}: {reason}")
