"""Table at the end of the test output: reference cases that ran, and all cases, for each group.

Every test with a parameter that is a `GoldenCase` is counted; a test that loops over cases calls the fixture
`golden_ran(case)` for each. Counts travel in the test reports, so the table is right under `pytest -n` too.
"""

from collections import defaultdict
from collections.abc import Callable

import pytest
from golden_data import GoldenCase, all_golden_cases

PROPERTY = "golden_case"


@pytest.fixture
def golden_ran(record_property) -> Callable[[GoldenCase], None]:
    """Record that this test runs a case."""
    return lambda case: record_property(PROPERTY, [case.group, case.name])


@pytest.fixture(autouse=True)
def _count_golden_parameters(request):
    parameters = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()
    for value in parameters:
        if isinstance(value, GoldenCase):
            request.getfixturevalue("golden_ran")(value)


def pytest_terminal_summary(terminalreporter):
    outcomes = defaultdict(dict)  # group -> case -> True if all of its tests passed
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, value in getattr(report, "user_properties", []):
                if key == PROPERTY:
                    group, name = value
                    outcomes[group][name] = outcomes[group].get(name, True) and outcome == "passed"
    if not outcomes:
        return
    total = defaultdict(int)
    for case in all_golden_cases():
        total[case.group] += 1
    terminalreporter.section("reference (golden) cases")
    width = max(map(len, total))
    for group, count in total.items():
        failed = sum(not passed for passed in outcomes[group].values())
        line = f"{group:<{width}}  {len(outcomes[group]):>4} of {count:>4} ran"
        line += f", {failed} failed" if failed else ""
        line += " (informational, not to be copied)" if group.endswith("/quirk") else ""
        terminalreporter.line(line, red=bool(failed))
