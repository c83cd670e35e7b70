"""The scorecard: what was promised about runs that are killed, damaged or fed badly, as a table.

A test marked `promise("R1", "what is promised")` is a line of the table that ends every run of the
tests; the fixture `found` adds what it measured. `make test` has the quick ones, `make test-long`
and `make torture` the others.
"""

from collections.abc import Callable

import pytest

MARKER = "promise(number, what): a line of the scorecard"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("promise"):
            item.user_properties.append(("promise", list(marker.args)))


@pytest.fixture
def found(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Notes a measured figure for the test's line of the scorecard."""
    return lambda figure: record_property("found", figure)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures: dict[tuple[str, str], list[str]] = {}
    broken = set()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            promises = [value for name, value in report.user_properties if name == "promise"]
            for number, what in promises:
                row = figures.setdefault((number, what), [])
                row += [value for name, value in report.user_properties if name == "found"]
                if outcome != "passed":
                    broken.add((number, what))
    if not figures:
        return
    terminalreporter.section("scorecard")
    order = sorted(figures, key=lambda row: (int(row[0].removeprefix("R")), row[1]))
    for number, what in order:
        result = "BROKEN" if (number, what) in broken else "kept"
        measured = "; ".join(dict.fromkeys(figures[number, what]))
        terminalreporter.write_line(f"{number:<4}{what:<66}{result:<8}{measured}".rstrip())
