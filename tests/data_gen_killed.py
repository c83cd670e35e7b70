"""Runs data generation many times over and kills it; prints nothing if all is well.

A process of its own, because it forks, which a process that has loaded jax must not. Called by
`test_data_gen_killed`.
"""

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import tensorflow_datasets  # noqa: F401 - seconds that every child would spend

from bootpig_jax.data import records
from data_gen.run import Command, run
from tests import data_gen_stubs as stubs

KILLS = 20


def count_down(steps: int) -> Callable[[], None]:
    """Returns what kills this process when it is called for the `steps`-th time."""
    left = [steps]

    def step() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return step


def around(step: Callable[[], None], function: Callable) -> Callable:
    """Returns the function with a step before and after it."""

    def wrapped(*arguments: object, **named: object) -> object:
        step()
        result = function(*arguments, **named)
        step()
        return result

    return wrapped


def generate(folder: Path, kill_at: int | None, steps_file: Path | None = None) -> int:
    """Runs in a child, killed at its `kill_at`-th step, and returns how the child ended.

    Steps: before and after every batch is drawn, record encoded, file synced and file renamed.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    # From here on in the child.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    taken = [0]
    if kill_at is not None:
        step = count_down(kill_at)
    else:

        def step() -> None:
            taken[0] += 1

    os.fsync, os.replace = around(step, os.fsync), around(step, os.replace)
    records.encode = around(step, records.encode)
    stubs.StubPictures.draw = around(step, stubs.StubPictures.draw)
    status = 70
    try:
        status = run(Command(stubs.make_config(folder)), stubs.make_stages)
        if steps_file is not None:
            steps_file.write_text(str(taken[0]))
    finally:
        os._exit(status)


def check(folder: Path, expected: Path) -> None:
    """Checks that a finished run holds what the uninterrupted one does, and nothing else."""
    assert stubs.shards(folder) == stubs.shards(expected)
    names = [{p.relative_to(f) for p in f.rglob("*")} for f in (folder, expected)]
    assert names[0] == names[1], names[0] ^ names[1]


def main(root: Path) -> None:
    expected = root / "expected"
    assert generate(expected, None, root / "steps") == 0
    steps = int((root / "steps").read_text())
    points = sorted(random.Random(0).sample(range(1, steps + 1), KILLS))

    # One kill each, wherever it falls.
    for point in points:
        folder = root / "once"
        assert generate(folder, point) == signal.SIGKILL, point
        assert generate(folder, None) == 0, point
        check(folder, expected)
        shutil.rmtree(folder)

    # A run that is killed again and again gets on as long as it finishes a shard now and then.
    folder, kills = root / "often", 0
    per_shard = steps // stubs.make_config(folder).num_shards
    while generate(folder, per_shard + 3) == signal.SIGKILL:
        kills += 1
        assert kills < 20
    assert kills >= 2
    check(folder, expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
