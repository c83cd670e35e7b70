"""The list of planted faults fits the project as it is, and planting them works."""

from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import ROOT, Fault, applies, read_faults
from tests.mutants.__main__ import Results, digests, summarise


def test_every_fault_applies_and_has_its_tests():
    faults = read_faults()
    assert [f"{fault.room}: {fault.name}" for fault in faults if not applies(fault)] == []
    assert [fault.name for fault in faults if fault.new == fault.old] == []
    assert [
        name for name, count in Counter((f.room, f.name) for f in faults).items() if count > 1
    ] == []
    tests = {test for fault in faults for test in fault.tests}
    assert [test for test in sorted(tests) if not (ROOT / test).is_file()] == []
    assert sum(not fault.equivalent for fault in faults) >= 120


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A module, and a test that sees one half of it."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "halves.py").write_text(
        "def seen():\n    return 1\n\n\ndef unseen():\n    return 1\n"
    )
    (tmp_path / "tests" / "test_halves.py").write_text(
        "import halves\n\n\ndef test_seen():\n    assert halves.seen() == 1\n"
    )
    return tmp_path


def fault(old: str, new: str, equivalent: str = "") -> Fault:
    tests = ("tests/test_halves.py",)
    return Fault("room", f"{old} -> {new}", "halves.py", old, new, tests, equivalent)


def test_faults_are_planted_found_and_remembered(project, tmp_path_factory, capsys):
    results = Results(tmp_path_factory.mktemp("runs") / "results.jsonl", digests(project))
    before = (project / "halves.py").read_text()
    found = fault("def seen():\n    return 1", "def seen():\n    return 2")
    survives = fault("def unseen():\n    return 1", "def unseen():\n    return 2")
    said = fault("unseen():\n    return 1", "unseen():\n    return 1.0", "1.0 equals 1")
    stale = fault("return 3", "return 4")
    outcome = {f: results.of(f, project) for f in (found, survives, said, stale)}
    assert outcome == {found: "tests/test_halves.py::test_seen", survives: "", said: "", stale: ""}
    assert (project / "halves.py").read_text() == before
    capsys.readouterr()
    assert summarise({found: outcome[found], said: ""}, project) == 0
    assert summarise({found: outcome[found], survives: ""}, project) == 1
    assert summarise({found: outcome[found], stale: ""}, project) == 1
    assert summarise({found: outcome[found], said: "tests/test_halves.py::test_seen"}, project) == 1
    shown = capsys.readouterr().out
    assert "survived: room: def unseen" in shown and "1 of 2 found: 50.0%" in shown
    # What is known is looked up, until a test that the fault is given to changes.
    test = project / "tests" / "test_halves.py"
    test.write_text("def test_nothing():\n    pass\n")
    assert results.of(found, project) == outcome[found]
    again = Results(results.path, digests(project))
    assert again.of(found, project) == "" and again.of(survives, project) == ""
