"""Plants small faults in a copy of the project, one after the other: do the tests find them?

    make mutants                                  all of them
    python -m tests.mutants training diffusion    those of two rooms

A tool that makes mutants by rule (mutmut, cosmic-ray) makes thousands of this code, most of which
change nothing or break everything at once, and would run for days. So the faults are a list
(`tests/mutants/*.yaml`) of mistakes as people make them, each with the tests that should find it.

First every test file is run with nothing planted. Then each fault meets the default tests of its
room, until the first one fails: the one that has found it before, if any, then all. What takes
longer than `LIMIT` counts as found, too. Results are kept in `runs/mutants/`, by the fault and the
content of all that its tests read: a run that was stopped goes on, and what changed is run again.
The exit status is 1 if less than `ENOUGH` of the faults that change anything were found.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants import ROOT, Fault, applies, read_faults

RUNS = ROOT / "runs" / "mutants"
LIMIT = 900  # seconds, for a file of tests: none takes a tenth of it alone on two cores
ENOUGH = 0.95
LEFT_OUT = (".git", ".venv*", ".cache", "__pycache__", "*.egg-info", "runs", "out", "docs", "*.md")
NOTHING = "nothing planted"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("rooms", nargs="*", help="names of lists; all by default")
    parser.add_argument("--workers", type=int, default=2, help="faults side by side")
    arguments = parser.parse_args()
    faults = read_faults(arguments.rooms)
    files = dict.fromkeys(test for fault in faults for test in fault.tests)
    unplanted = [Fault(NOTHING, test, "", "", "", (test,)) for test in files]

    copies: queue.Queue[Path] = queue.Queue()
    for number in range(arguments.workers):
        copy = RUNS / f"copy-{number}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        copies.put(copy)
    results = Results(RUNS / "results.jsonl", digests(RUNS / "copy-0"))

    def run(fault: Fault) -> str:
        copy = copies.get()
        try:
            return results.of(fault, copy)
        finally:
            copies.put(copy)

    with ThreadPoolExecutor(arguments.workers) as pool:
        failing = zip(unplanted, pool.map(run, unplanted), strict=True)
        broken = [fault.name for fault, test in failing if test]
        if broken:
            print(f"fail with nothing planted: {', '.join(broken)}")
            return 1
        found = dict(zip(faults, pool.map(run, faults), strict=True))
    return summarise(found, RUNS / "copy-0")


def summarise(found: Mapping[Fault, str], root: Path) -> int:
    """Prints what was found and what was not in the project at `root`; returns the exit status."""
    counting = [fault for fault in found if not fault.equivalent]
    missed = [fault for fault in counting if not found[fault]]
    # What is said to change nothing and is found does change something.
    wrong = [fault for fault in found if fault.equivalent and found[fault]]
    stale = [fault for fault in found if not applies(fault, root)]
    for title, listed in (
        ("survived", missed),
        ("found, though said to change nothing", wrong),
        ("do not apply", stale),
    ):
        for fault in listed:
            print(f"{title}: {fault.room}: {fault.name} ({fault.file})")
    share = 1 - len(missed) / max(1, len(counting))
    print(
        f"{len(found)} faults: {len(found) - len(counting)} change nothing; of the others "
        f"{len(counting) - len(missed)} of {len(counting)} found: {share:.1%}"
    )
    return int(share < ENOUGH or bool(wrong or stale))


def digests(copy: Path) -> dict[str, str]:
    """The hash of each file that a test may read."""
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    return {
        path.relative_to(copy).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


class Results:
    """What is known of faults: the test that found each, "" where none did."""

    def __init__(self, path: Path, sources: Mapping[str, str]) -> None:
        self.path = path
        self._sources = sources
        # Of each planted file one more: Python takes its bytecode for another text's otherwise.
        self._times = itertools.count(1)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        entries = [json.loads(line) for line in lines]
        self._known = {entry["key"]: entry for entry in entries}
        self._found_by = {(e["room"], e["name"]): e["test"] for e in entries if "::" in e["test"]}

    def of(self, fault: Fault, copy: Path) -> str:
        """Looks a fault up, or plants it in `copy` and runs its tests."""
        if fault.room != NOTHING and not applies(fault, copy):
            print(f"does not apply  {fault.room}: {fault.name}", flush=True)
            return ""
        key = self._key(fault)
        if key not in self._known:
            started = time.monotonic()
            test = self._plant(fault, copy)
            seconds = round(time.monotonic() - started)
            entry = {"key": key, "room": fault.room, "name": fault.name}
            self._known[key] = entry | {"test": test, "seconds": seconds}
            if not (test and fault.room == NOTHING):  # a failure that may be this machine's
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(self._known[key]) + "\n")
        entry = self._known[key]
        outcome = "found" if entry["test"] else ("equivalent" if fault.equivalent else "survived")
        if fault.room == NOTHING:
            outcome = "FAILS" if entry["test"] else "passes"
        print(
            f"{outcome:10}  {fault.room}: {fault.name}  {entry['seconds']} s  {entry['test']}",
            flush=True,
        )
        return entry["test"]

    def _key(self, fault: Fault) -> str:
        read = {
            name: digest
            for name, digest in self._sources.items()
            if not re.match(r"tests/(mutants/|test_)", name) or name in fault.tests
        }
        content = json.dumps([dataclasses.astuple(fault), read])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def _plant(self, fault: Fault, copy: Path) -> str:
        if fault.room == NOTHING:
            return run_tests(fault.name, copy, keep_programs=True)
        path = copy / fault.file
        text = path.read_text(encoding="utf-8")
        try:
            path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
            moment = next(self._times)
            os.utime(path, (moment, moment))
            before = self._found_by.get((fault.room, fault.name))
            tests = [before, *fault.tests] if before else fault.tests
            return next(filter(None, (run_tests(test, copy) for test in tests)), "")
        finally:
            path.write_text(text, encoding="utf-8")


def run_tests(tests: str, copy: Path, *, keep_programs: bool = False) -> str:
    """Runs a file of tests, or one, in a copy of the project; returns the first that fails, or "".

    Programs that were compiled before are taken, but those that hold a fault are not kept.
    """
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    }
    if not keep_programs:
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e6"
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", tests],
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"{tests}: longer than {LIMIT} s"
    gone = process.returncode == 4 and "::" in tests  # a test that has found a fault before
    if process.returncode == 0 or gone:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    if failed is None:
        raise RuntimeError(f"{tests}: pytest did not end as usual:\n{output}")
    return failed[1]


if __name__ == "__main__":
    sys.exit(main())
