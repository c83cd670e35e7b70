"""Training checkpoints: exact, refused where they do not fit, never silently from scratch."""

from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bootpig_jax.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from bootpig_jax.errors import UserError
from bootpig_jax.training.checkpointing import Checkpoints
from bootpig_jax.training.optimizer import make_optimizer
from bootpig_jax.training.sharding import make_mesh
from bootpig_jax.training.step import TrainState, init_state


def configuration(folder: Path, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "model": ModelConfig(base="base"),
        "data": DataConfig(dir=Path("data")),
        "output_dir": folder,
    }
    return TrainConfig(**(fields | changes))


def new_state(width: int = 4, bias: bool = True) -> TrainState:
    parameters = {
        "base.attn1.kernel": jnp.arange(8.0 * width).reshape(8, width),
        "reference.conv.kernel": jnp.ones((2, 8)),
    }
    if bias:
        parameters["reference.conv.bias"] = jnp.zeros(8)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    return init_state(parameters, make_optimizer(OptimizerConfig(), 10), mesh, fsdp_min_size=1)


def numbers() -> grain.DatasetIterator:
    dataset = grain.MapDataset.source(range(50)).seed(3).shuffle().repeat().batch(2)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2)))


@jax.jit
def _advance(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf + 1, state)


def test_round_trip_is_exact_while_training_goes_on(tmp_path):
    advance = jax.jit(_advance, donate_argnums=0)
    state, data = new_state(), numbers()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    for _ in range(5):
        next(data)
    state = advance(state)
    saved = jax.device_get(jax.tree.map(jnp.copy, state))
    with Checkpoints(configuration(tmp_path), "f") as checkpoints:
        checkpoints.save(state, data)
        # The buffers that are being written are donated at once.
        for _ in range(20):
            state = advance(state)
        expected = [next(data) for _ in range(5)]
    with Checkpoints(configuration(tmp_path), "f") as checkpoints:
        assert checkpoints.latest == 1
        data = numbers()
        restored = checkpoints.restore(new_state(), data)
    jax.tree.map(np.testing.assert_array_equal, saved, jax.device_get(restored))
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings
    np.testing.assert_array_equal(expected, [next(data) for _ in range(5)])


def test_resume_modes(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="checkpoint.resume: must, but .* holds no checkpoint"):
        Checkpoints(configuration(folder, checkpoint={"resume": "must"}), "f")
    assert not folder.exists()
    with Checkpoints(configuration(folder), "f") as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(new_state(), numbers())
    assert Checkpoints(configuration(folder, checkpoint={"resume": "must"}), "f").latest == 0
    with pytest.raises(UserError, match="checkpoint.resume: never, but .* already holds step 0"):
        Checkpoints(configuration(folder, checkpoint={"resume": "never"}), "f")


def test_what_differs_is_named(tmp_path):
    with Checkpoints(configuration(tmp_path), "f") as checkpoints:
        checkpoints.save(new_state(), numbers())

    def refused(
        state: TrainState, fingerprint: str = "f", folder: Path = tmp_path, **changes: Any
    ) -> str:
        with Checkpoints(configuration(folder, **changes), fingerprint) as checkpoints:
            with pytest.raises(UserError) as caught:
                checkpoints.restore(state, numbers())
        message = str(caught.value)
        assert "\n" not in message
        return message

    assert "base.attn1.kernel is float32[8, 4] in the" in refused(new_state(width=8))
    assert "reference.conv.bias is only in the checkpoint" in refused(new_state(bias=False))
    assert "seed: 1, but the checkpoint" in refused(new_state(), seed=1)
    assert "optimizer.lr_rsa: 0.5, but" in refused(new_state(), optimizer={"lr_rsa": 0.5})
    assert "data.dir: its shards are not those" in refused(new_state(), fingerprint="g")
    # What may change between two starts.
    with Checkpoints(
        configuration(tmp_path, steps=9, mesh={"fsdp": 2}, data={"dir": "moved", "threads": 1}), "f"
    ) as checkpoints:
        checkpoints.restore(new_state(), numbers())

    state = tmp_path / "checkpoints" / "0" / "state"
    for path in [path for path in state.rglob("*") if path.is_file()]:
        path.write_bytes(b"")
    assert "cannot be read" in refused(new_state())


def test_old_steps_are_removed(tmp_path):
    state = new_state()
    with Checkpoints(configuration(tmp_path, checkpoint={"keep": 2}), "f") as checkpoints:
        for _ in range(4):
            state = _advance(state)
            checkpoints.save(state, numbers())
            checkpoints.save(state, numbers())  # the same step: nothing to do
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [3, 4]
