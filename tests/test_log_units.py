"""The figures that logs and plans show: their units, and what exactly they are figures of."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bootpig_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from bootpig_jax.training.metrics import MetricLogger, read_history
from bootpig_jax.training.optimizer import learning_rate, make_optimizer, updates_made


def configuration(folder: Path, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "model": ModelConfig(base="base"),
        "data": DataConfig(dir=Path("data")),
        "output_dir": folder,
        "steps": 10,
        "batch_size": 24,
        "logging": {"every": 2},
    }
    return TrainConfig(**(fields | changes))


def update_metrics(**changes: Any) -> dict[str, Any]:
    none = np.zeros(10)
    return {
        "loss": 1.0,
        "skipped": 0.0,
        "loss_in_bucket": none,
        "bucket_count": none,
    } | changes


# --- learning rates


COSINE = OptimizerConfig(lr_reference=8e-3, lr_rsa=2e-3, schedule="cosine", warmup_steps=2)


def rate(peak: float, made: int) -> float:
    """That of the update after `made` others: two of warming up, then half a cosine over eight."""
    return peak * made / 2 if made < 2 else peak * 0.5 * (1 + math.cos(math.pi * (made - 2) / 8))


@pytest.mark.parametrize("before", [0, 3], ids=["from the start", "going on, one was skipped"])
def test_the_learning_rate_shown_is_that_of_the_last_update_that_was_made(
    tmp_path: Path, before: int
) -> None:
    config = configuration(tmp_path, optimizer=COSINE)
    first_step = before + (before > 0)
    skipped = {4, 7, 8}
    with MetricLogger(config, first_step=first_step, first_update=before) as logger:
        for step in range(first_step + 1, 11):
            logger.update(step, update_metrics(skipped=float(step in skipped)), waited=0.0)
    made = before
    rows = iter(read_history(tmp_path))
    for step in range(first_step + 1, 11):
        made += step not in skipped
        if step % 2 == 0:
            row = next(rows)
            assert row["step"] == step
            assert row["lr_reference"] == pytest.approx(rate(8e-3, made - 1), rel=1e-5, abs=1e-12)
            assert row["lr_rsa"] == pytest.approx(rate(2e-3, made - 1), rel=1e-5, abs=1e-12)
    assert next(rows, None) is None


def test_the_optimiser_counts_the_updates_it_made() -> None:
    optimizer = make_optimizer(COSINE, 10)
    parameters = {"reference.x": jnp.ones(1), "base.x": jnp.ones(1)}
    state = optimizer.init(parameters)
    update = jax.jit(optimizer.update)
    for made in range(3):
        assert updates_made(state) == made
        _, state = update(parameters, state, parameters)
    assert float(learning_rate(COSINE, 8e-3, 10)(3)) == pytest.approx(rate(8e-3, 3), rel=1e-5)
