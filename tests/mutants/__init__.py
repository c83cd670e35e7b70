"""Small faults to plant: the list, one file a room, and how it is read.

tests: [tests/test_metrics.py, ...]   those of the room, the quickest and likeliest first
faults:
  - name: what is wrong
    file: bootpig_jax/...             where
    old: text that stands there once
    new: what it becomes
    tests: [...]                      in place of the room's
    equivalent: why it changes nothing that a test could see
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
LISTS = Path(__file__).parent


@dataclass(frozen=True)
class Fault:
    room: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""


def read_faults(rooms: Iterator[str] | list[str] | None = None) -> list[Fault]:
    found = sorted(path.stem for path in LISTS.glob("*.yaml"))
    return [fault for room in rooms or found for fault in _read(room)]


def applies(fault: Fault, root: Path = ROOT) -> bool:
    path = root / fault.file
    return path.is_file() and path.read_text(encoding="utf-8").count(fault.old) == 1


def _read(room: str) -> Iterator[Fault]:
    content: dict[str, Any] = yaml.safe_load((LISTS / f"{room}.yaml").read_text(encoding="utf-8"))
    for fields in content["faults"]:
        tests = tuple(fields.pop("tests", content["tests"]))
        yield Fault(room=room, tests=tests, **fields)
