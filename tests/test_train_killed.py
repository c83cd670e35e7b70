"""SIGKILL at random moments of training costs nothing but time.

`make test-long` kills 20 times, `make torture` 200 times.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bootpig_jax.training.checkpointing import fault, saved_steps
from tests.training_helpers import save_tiny_data

STEPS, EVERY = 150, 5
WEIGHTS = "diffusion_pytorch_model.safetensors"
ROOT = Path(__file__).parents[1]


def command(model: Path, data: Path, output: Path, steps: int) -> list[str]:
    fields = {
        "model.base": model,
        "data.dir": data,
        "data.image_size": 16,
        "data.threads": 2,
        "output_dir": output,
        "batch_size": 2,
        "steps": steps,
        "precision": "float32",
        "optimizer.lr_reference": 1e-3,
        "optimizer.lr_rsa": 1e-3,
        "ema_decay": 0.9,
        "checkpoint.every": EVERY,
        "checkpoint.keep": 10_000,
        "logging.every": 1,
        "logging.grid_every": 0,
    }
    return [
        *(sys.executable, "-m", "bootpig_jax.train"),
        *(f"{name}={value}" for name, value in fields.items()),
    ]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors.decode()


def losses(output: Path) -> dict[int, float]:
    history = output / "history.jsonl"
    lines = history.read_text().splitlines() if history.exists() else []
    found = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # a line that was being written
            break
        found[row["step"]] = row["loss"]
    return found


@pytest.mark.promise("R1", "SIGKILL in training: no committed step lost, same bits at the end")
@pytest.mark.parametrize(
    ("kills", "steps"),
    [
        pytest.param(20, STEPS, marks=pytest.mark.long),
        pytest.param(200, 10 * STEPS, marks=pytest.mark.torture),
    ],
)
def test_killed_runs_end_as_an_uninterrupted_one(
    model_folder: Path, tmp_path: Path, kills: int, steps: int, found: Callable[[str], None]
) -> None:
    data = save_tiny_data(tmp_path / "tiny")
    whole, output = tmp_path / "whole", tmp_path / "killed"
    finish(start(command(model_folder, data, whole, steps)))
    expected = losses(whole)
    assert expected.keys() == set(range(1, steps + 1))

    rng = np.random.default_rng(0)
    killed = half_written = 0
    committed: set[int] = set()
    while killed < kills:
        process = start(command(model_folder, data, output, steps))
        # Somewhere after its first update, so often while a checkpoint is being written.
        before = max(committed, default=0)
        wanted = min(before + int(rng.integers(1, 3 * EVERY)), steps)
        while process.poll() is None and max(losses(output), default=0) < wanted:
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.05)))
        if process.poll() is not None:
            finish(process)
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
        folder = output / "checkpoints"
        now = set(saved_steps(folder))
        assert committed <= now, "a step that was committed is gone"
        assert all(fault(folder / str(step)) is None for step in now - committed)
        half_written += sum(not entry.name.isdigit() for entry in folder.iterdir())
        committed = now
        for step, loss in losses(output).items():
            assert loss == expected[step], step
    finish(start(command(model_folder, data, output, steps)))
    assert losses(output) == expected
    for name in ("base_unet", "ref_unet"):
        assert (output / name / WEIGHTS).read_bytes() == (whole / name / WEIGHTS).read_bytes()
    found(f"{killed} kills, {half_written} unfinished checkpoints left, {steps} losses compared")


@pytest.mark.long
@pytest.mark.promise("R9", "the same seed three times: same losses, same weights")
def test_the_same_seed_is_the_same_run(
    model_folder: Path, tmp_path: Path, found: Callable[[str], None]
) -> None:
    data, steps = save_tiny_data(tmp_path / "tiny"), 20
    runs = [tmp_path / str(number) for number in range(3)]
    for run in runs:
        finish(start(command(model_folder, data, run, steps)))
        assert losses(run) == losses(runs[0]) and len(losses(run)) == steps
        for name in ("base_unet", "ref_unet"):
            assert (run / name / WEIGHTS).read_bytes() == (runs[0] / name / WEIGHTS).read_bytes()
    found(f"{steps} updates each, bit-identical")
