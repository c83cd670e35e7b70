"""Training checkpoints: exact, refused where they do not fit, never silently from scratch."""

import dataclasses
import resource
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bootpig_jax.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from bootpig_jax.errors import UserError
from bootpig_jax.training.checkpointing import MANIFEST, Checkpoints, saved_steps
from bootpig_jax.training.optimizer import make_optimizer
from bootpig_jax.training.sharding import make_mesh
from bootpig_jax.training.step import TrainState, init_state

BASE = "ba5e" * 16  # the hash of the base weights


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
    with Checkpoints(configuration(tmp_path), "f", BASE) as checkpoints:
        checkpoints.save(state, data)
        # The buffers that are being written are donated at once.
        for _ in range(20):
            state = advance(state)
        expected = [next(data) for _ in range(5)]
    with Checkpoints(configuration(tmp_path), "f", BASE) as checkpoints:
        assert checkpoints.latest == 1
        data = numbers()
        restored = checkpoints.restore(new_state(), data)
    jax.tree.map(np.testing.assert_array_equal, saved, jax.device_get(restored))
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings
    np.testing.assert_array_equal(expected, [next(data) for _ in range(5)])


def test_resume_modes(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="checkpoint.resume: must, but .* holds no checkpoint"):
        Checkpoints(configuration(folder, checkpoint={"resume": "must"}), "f", BASE)
    assert not folder.exists()
    with Checkpoints(configuration(folder), "f", BASE) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(new_state(), numbers())
    assert Checkpoints(configuration(folder, checkpoint={"resume": "must"}), "f", BASE).latest == 0
    with pytest.raises(UserError, match="checkpoint.resume: never, but .* already holds step 0"):
        Checkpoints(configuration(folder, checkpoint={"resume": "never"}), "f", BASE)


def test_what_differs_is_named(tmp_path):
    with Checkpoints(configuration(tmp_path), "f", BASE) as checkpoints:
        checkpoints.save(new_state(), numbers())

    def refused(
        state: TrainState,
        fingerprint: str = "f",
        base: str = BASE,
        folder: Path = tmp_path,
        **changes: Any,
    ) -> str:
        with pytest.raises(UserError) as caught:
            with Checkpoints(configuration(folder, **changes), fingerprint, base) as checkpoints:
                checkpoints.restore(state, numbers())
        message = str(caught.value)
        assert "\n" not in message
        return message

    assert "base.attn1.kernel is float32[8, 4] in the" in refused(new_state(width=8))
    assert "reference.conv.bias is only in the checkpoint" in refused(new_state(bias=False))
    kernel = {"base.attn1.kernel": jnp.zeros((8, 4), jnp.bfloat16)}
    half = dataclasses.replace(new_state(), trainable=new_state().trainable | kernel)
    assert "base.attn1.kernel is float32[8, 4] in the checkpoint" in refused(half)
    assert "seed: 1, but the checkpoint" in refused(new_state(), seed=1)
    assert "optimizer.lr_rsa: 0.5, but" in refused(new_state(), optimizer={"lr_rsa": 0.5})
    assert "data.dir: its shards are not those" in refused(new_state(), fingerprint="g")
    assert "model.base: the weights in base are not those" in refused(new_state(), base="0" * 64)
    # What may change between two starts.
    free: dict[str, Any] = {"steps": 9, "mesh": {"fsdp": 2}, "model": {"base": "moved"}}
    moved = configuration(tmp_path, data={"dir": "moved", "threads": 1}, **free)
    with Checkpoints(moved, "f", BASE) as checkpoints:
        checkpoints.restore(new_state(), numbers())
        assert checkpoints.knows_base


def test_a_checkpoint_from_before_goes_on_and_the_next_names_its_base(tmp_path):
    with Checkpoints(configuration(tmp_path), "f", BASE) as checkpoints:
        del checkpoints._run["base_sha256"]  # as an earlier version saved it
        checkpoints.save(new_state(), numbers())
    # Weights of which nothing is known but where they lay.
    with pytest.raises(UserError, match="model.base: 'moved', but the checkpoint"):
        Checkpoints(configuration(tmp_path, model={"base": "moved"}), "f", BASE)
    with Checkpoints(configuration(tmp_path), "f", BASE) as checkpoints:
        assert not checkpoints.knows_base
        checkpoints.save(_advance(checkpoints.restore(new_state(), numbers())), numbers())
    assert Checkpoints(configuration(tmp_path), "f", BASE).knows_base
    with pytest.raises(UserError, match="the weights in base are not those"):
        Checkpoints(configuration(tmp_path), "f", "0" * 64)


def two_steps(folder: Path) -> dict[int, TrainState]:
    """Saves the steps 0 and 1 of a run and returns their states."""
    state = new_state()
    states = {}
    with Checkpoints(configuration(folder), "f", BASE) as checkpoints:
        for step in range(2):
            checkpoints.save(state, numbers())
            states[step] = jax.device_get(jax.tree.map(jnp.copy, state))
            state = _advance(state)
    return states


def damage(path: Path, kind: str, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    match kind:
        case "flip":
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[: rng.integers(len(content))])
        case "delete":
            path.unlink()


MUTATIONS = 200


@pytest.mark.promise("R3", "damaged checkpoints: none restored silently wrong")
def test_no_damage_to_the_newest_step_goes_unnoticed(tmp_path, found):
    states = two_steps(tmp_path)
    files = sorted(path for path in (tmp_path / "checkpoints/1").rglob("*") if path.is_file())
    files = [path for path in files if path.stat().st_size]
    rng = np.random.default_rng(0)
    harmless = 0
    for number in range(MUTATIONS):
        file = files[number % len(files)]
        original = file.read_bytes()
        damage(file, ("flip", "cut", "delete")[number // len(files) % 3], rng)
        checkpoints = Checkpoints(configuration(tmp_path), "f", BASE)
        if checkpoints.latest == 1:
            # Orbax's own notes on the step, which say nothing about the arrays.
            assert file.name in ("_CHECKPOINT_METADATA", "commit_success.txt")
            with checkpoints:
                restored = checkpoints.restore(new_state(), numbers())
            jax.tree.map(np.testing.assert_array_equal, states[1], jax.device_get(restored))
            harmless += 1
        else:
            assert checkpoints.latest == 0
            (reason,) = checkpoints.damaged.values()
            # A manifest that was changed blames the file whose entry it was.
            assert file.name in reason or file.name == MANIFEST
        file.write_bytes(original)
    found(
        f"{MUTATIONS} mutations of {len(files)} files: {MUTATIONS - harmless} found, {harmless} "
        "without effect"
    )


def test_a_damaged_step_is_moved_out_of_the_way(tmp_path):
    states = two_steps(tmp_path)
    damage(tmp_path / "checkpoints/1/run/metadata", "flip", np.random.default_rng(0))
    checkpoints = Checkpoints(configuration(tmp_path), "f", BASE)
    with checkpoints:
        restored = checkpoints.restore(new_state(), numbers())
        # The bad step is out of the way, so its number can be saved again.
        checkpoints.save(_advance(restored), numbers())
    assert sorted(path.name for path in (tmp_path / "damaged_checkpoints").iterdir()) == ["1-0"]
    again = Checkpoints(configuration(tmp_path), "f", BASE)
    assert again.latest == 1 and not again.damaged
    with again:
        restored = again.restore(new_state(), numbers())
    jax.tree.map(np.testing.assert_array_equal, states[1], jax.device_get(restored))
    # The next one does not take its place.
    damage(tmp_path / "checkpoints/1/run/metadata", "flip", np.random.default_rng(0))
    with Checkpoints(configuration(tmp_path), "f", BASE):
        moved = sorted(path.name for path in (tmp_path / "damaged_checkpoints").iterdir())
    assert moved == ["1-0", "1-1"]


def test_steps_are_numbers(tmp_path):
    for name in ("9", "10", "100", "2.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    assert saved_steps(tmp_path) == [9, 10, 100]
    assert saved_steps(tmp_path / "nowhere") == []


def test_a_step_that_lost_its_manifest_does_not_get_another(tmp_path):
    states = two_steps(tmp_path)
    (tmp_path / "checkpoints/0/manifest.json").unlink()
    with Checkpoints(configuration(tmp_path), "f", BASE) as checkpoints:
        state = checkpoints.restore(new_state(), numbers())
        checkpoints.save(_advance(state), numbers())
    assert not (tmp_path / "checkpoints/0/manifest.json").exists()
    assert (tmp_path / "checkpoints/2/manifest.json").exists() and states[1].step == 1


def test_never_from_scratch_where_every_step_is_damaged(tmp_path):
    two_steps(tmp_path)
    rng = np.random.default_rng(0)
    for step in "01":
        damage(tmp_path / "checkpoints" / step / "run" / "metadata", "flip", rng)
    with pytest.raises(UserError) as caught:
        Checkpoints(configuration(tmp_path), "f", BASE)
    message = str(caught.value)
    assert "1 (run/metadata differs" in message and "0 (run/metadata differs" in message
    assert "\n" not in message


@pytest.mark.promise("R4", "disk full: the last good checkpoint can be restored")
def test_a_full_disk_leaves_the_last_good_step(tmp_path, found):
    states = two_steps(tmp_path)
    state = _advance(_advance(new_state(width=4096)))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for largest in 2 ** np.arange(5, 15):  # bytes: each lets the save come further
        with pytest.raises(UserError, match="cannot be written .* the last good one is step 1"):
            try:
                with Checkpoints(configuration(tmp_path), "f", BASE) as checkpoints:
                    # Writes beyond it fail, as on a full disk.
                    resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest), limit[1]))
                    checkpoints.save(state, numbers())
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        checkpoints = Checkpoints(configuration(tmp_path), "f", BASE)
        assert checkpoints.latest == 1
        with checkpoints:
            restored = checkpoints.restore(new_state(), numbers())
        jax.tree.map(np.testing.assert_array_equal, states[1], jax.device_get(restored))
    found("10 of 10 writes that fail, after 32 bytes to 16 KiB of a file")


def test_too_little_space_is_told_before_training(tmp_path, monkeypatch):
    """An old step is removed when the new one is complete: there must be room for two."""
    usage = namedtuple("usage", "total used free")
    state = new_state(width=4096)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    checkpoints = Checkpoints(configuration(tmp_path), "f", BASE)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2 * size - 1))
    with pytest.raises(UserError, match="0.0 GB free, its checkpoints need"):
        checkpoints.check_space(state)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2 * size))
    checkpoints.check_space(state)


@pytest.mark.promise("R7", "NaN: never in a checkpoint")
def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    two_steps(tmp_path)
    state = jax.tree.map(lambda leaf: leaf, _advance(_advance(new_state())))
    broken = dataclasses.replace(
        state, trainable=state.trainable | {"reference.conv.bias": jnp.zeros(8).at[3].set(jnp.nan)}
    )
    with Checkpoints(configuration(tmp_path), "f", BASE) as checkpoints:
        with pytest.raises(UserError, match="not finite after update 2: it is not saved"):
            checkpoints.save(broken, numbers())
    assert Checkpoints(configuration(tmp_path), "f", BASE).latest == 1


def test_old_steps_are_removed(tmp_path):
    state = new_state()
    with Checkpoints(configuration(tmp_path, checkpoint={"keep": 2}), "f", BASE) as checkpoints:
        for _ in range(4):
            state = _advance(state)
            checkpoints.save(state, numbers())
            checkpoints.save(state, numbers())  # the same step: nothing to do
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [3, 4]
