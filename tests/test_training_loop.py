"""The loop: it gives up on what will not get better, and never waits for ever."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bootpig_jax.config import DataConfig, ModelConfig, TrainConfig
from bootpig_jax.errors import UserError
from bootpig_jax.training.loop import run_steps
from bootpig_jax.training.metrics import MetricLogger, read_history
from bootpig_jax.training.sharding import make_mesh
from bootpig_jax.training.step import TrainState


def configuration(folder: Path, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "model": ModelConfig(base="base"),
        "data": DataConfig(dir=Path("data")),
        "output_dir": folder,
        "steps": 30,
        "checkpoint": {"every": 4},
        "logging": {"every": 3},
    }
    return TrainConfig(**(fields | changes))


class Saves:
    """Stands for the checkpoints: notes which steps were saved."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def save(self, state: TrainState, data: Any) -> None:
        self.steps.append(int(state.step))


def train(config: TrainConfig, broken: set[int], saves: Saves) -> None:
    """Runs the loop over updates of which those in `broken` are not finite."""

    def train_step(state: TrainState, frozen: Any, batch: Any) -> Any:
        step = int(state.step) + 1
        skipped = float(step in broken)
        loss = jnp.float32("nan" if skipped else step)
        metrics = {
            "loss": loss,
            "skipped": jnp.float32(skipped),
            "loss_in_bucket": jnp.full(10, loss / 10).at[3].set(0),
            "bucket_count": jnp.full(10, 0.1).at[3].set(0),
        }
        return TrainState(state.step + 1, {}, (), {}), metrics

    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with MetricLogger(config, first_step=0) as logger:
        run_steps(
            train_step,
            TrainState(jnp.zeros((), jnp.int32), {}, (), {}),
            None,
            iter(lambda: {}, None),
            lambda batch: batch,
            config=config,
            mesh=mesh,
            checkpoints=saves,
            logger=logger,
        )


@pytest.mark.promise("R7", "NaN: the run stops after N updates in a row")
def test_gives_up_after_many_skipped_updates_in_a_row(tmp_path):
    config = configuration(tmp_path, safety={"max_skipped": 5})
    saves = Saves()
    train(config, {2, 3, 4, 5, 7, 8, 9, 20}, saves)  # at most four in a row
    assert saves.steps == [4, 8, 12, 16, 20, 24, 28, 30]
    rows = read_history(tmp_path)
    assert [row["step"] for row in rows] == list(range(3, 31, 3))
    # Of updates 1 to 3, the first was made; nothing was drawn from one tenth of the timesteps.
    assert rows[0]["skipped"] == 2 and rows[0]["loss"] == rows[0]["loss_t20-30"] == 1
    assert "loss_t30-40" not in rows[0] and rows[0]["lr_reference"] == pytest.approx(5e-6)
    saves = Saves()
    with pytest.raises(UserError, match="were not finite in 5 updates in a row") as caught:
        train(config, set(range(11, 31)), saves)
    assert "\n" not in str(caught.value)
    assert saves.steps[-1] <= 16


HANGS = """
import sys, time
from pathlib import Path
from tests.test_training_loop import Saves, configuration, hang
hang(configuration(Path(sys.argv[1]), safety={"hang_seconds": 2}))
"""


def hang(config: TrainConfig) -> None:
    """Runs the loop over a loader that never answers."""

    def never() -> Iterator[Any]:
        print("waiting", flush=True)
        time.sleep(600)
        yield {}

    run_steps(
        lambda *arguments: arguments,  # type: ignore[arg-type, return-value]
        TrainState(jnp.zeros((), jnp.int32), {}, (), {}),
        None,  # type: ignore[arg-type]
        never(),  # type: ignore[arg-type]
        lambda batch: batch,  # type: ignore[arg-type, return-value]
        config=config,
        mesh=make_mesh(config.mesh, jax.devices()[:1]),
        checkpoints=Saves(),  # type: ignore[arg-type]
        logger=None,  # type: ignore[arg-type]
    )


@pytest.mark.promise("R8", "a hung loader: stacks printed, the process ends in time")
def test_a_loader_that_hangs_ends_the_process_with_its_stacks(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout == "waiting\n"
    assert process.returncode == 1
    assert "Timeout (0:00:02)!" in process.stderr
    assert "in never" in process.stderr and "in run_steps" in process.stderr


def test_a_run_that_goes_on_forgets_what_it_logged_beyond_its_checkpoint(tmp_path):
    config = configuration(tmp_path)
    train(config, set(), Saves())
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    (tmp_path / "history.jsonl").write_text("\n".join(lines) + '\n{"step": 31, "lo')
    with MetricLogger(config, first_step=12):
        pass
    assert (tmp_path / "history.jsonl").read_text().splitlines() == lines[:4]


def test_a_full_disk_is_one_line_and_the_history_stays_readable(tmp_path):
    train(configuration(tmp_path), set(), Saves())
    before = read_history(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "history.jsonl").stat().st_size
    with pytest.raises(
        UserError, match="output_dir: .* cannot be written to .*make room"
    ) as caught:
        try:
            with MetricLogger(configuration(tmp_path), first_step=30) as logger:
                # Writes beyond it fail, as on a full disk.
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limit[1]))
                logger.scalars(31, "train", {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(caught.value)
    assert read_history(tmp_path) == before
