"""R14: data generation that is killed loses nothing, doubles nothing and writes the same bytes."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import data_gen_stubs as stubs

ROOT = Path(__file__).parents[1]


def test_killed_at_20_random_points(tmp_path):
    child = subprocess.run(
        [sys.executable, "-m", "tests.data_gen_killed", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr[-3000:]


def toyland(folder):
    """A run of the command line on Toyland's Stable Diffusion."""
    return subprocess.Popen(
        [sys.executable, "-m", "data_gen.run", "--config", "configs/data_gen_toyland.yaml"]
        + [f"output_dir={folder}", "candidates=64", "candidates_per_shard=16"]
        + ["pictures.batch_size=4", "pictures.steps=4"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.long
def test_toyland_killed_at_20_random_moments(tmp_path):
    expected, folder, rng = tmp_path / "expected", tmp_path / "killed", random.Random(0)
    assert toyland(expected).wait() == 0
    started = time.monotonic()
    assert toyland(tmp_path / "timed").wait() == 0
    seconds = time.monotonic() - started
    kills = 0
    while kills < 20:
        child = toyland(folder)
        try:
            child.wait(timeout=rng.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
            assert child.wait() < 0
            kills += 1
        else:
            assert child.returncode == 0
            assert stubs.shards(folder) == stubs.shards(expected)
            folder = tmp_path / f"killed-{kills}"
    assert toyland(folder).wait() == 0
    assert stubs.shards(folder) == stubs.shards(expected)
