"""The optimiser against PyTorch's, the mesh and its rules, metrics and grids."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import wandb
from jax.sharding import PartitionSpec as P

from bootpig_jax.config import (
    DataConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from bootpig_jax.errors import UserError
from bootpig_jax.training.metrics import MetricLogger, picture_grid, read_history
from bootpig_jax.training.optimizer import gradient_norms, make_optimizer
from bootpig_jax.training.sharding import check_batch, make_mesh, partition_specs
from bootpig_jax.training.step import loss_by_timestep


def test_optimizer_equals_torch_with_clipping_over_both_parts():
    config = OptimizerConfig(lr_reference=3e-3, lr_rsa=7e-4)
    shapes = {
        "reference.a.kernel": (3, 4),
        "reference.b.bias": (5,),
        "base.c.kernel": (2, 2),
        "base.d.bias": (3,),  # with gradients as small as epsilon
    }
    rng = np.random.default_rng(0)
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    groups = [
        {"params": [t for n, t in tensors.items() if n.startswith(part)], "lr": rate}
        for part, rate in (("reference", config.lr_reference), ("base", config.lr_rsa))
    ]
    expected = torch.optim.AdamW(
        groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    optimizer = make_optimizer(config, 10)
    parameters = jax.tree.map(jnp.asarray, start)
    state = jax.jit(optimizer.init)(parameters)
    update = jax.jit(optimizer.update)
    for scale in (10.0, 0.05, 1.0):  # clipped, not clipped, clipped
        gradients = {
            name: (scale * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes.items()
        }
        gradients["base.d.bias"] *= 1e-8
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradients[name])
        norm = torch.nn.utils.clip_grad_norm_(tensors.values(), config.clip_norm)
        expected.step()
        np.testing.assert_allclose(
            jax.jit(gradient_norms)(gradients)["gradient_norm"], norm, rtol=1e-6
        )
        updates, state = update(gradients, state, parameters)
        parameters = jax.tree.map(np.add, parameters, updates)
    for name, tensor in tensors.items():
        np.testing.assert_allclose(parameters[name], tensor.detach(), rtol=1e-5, err_msg=name)


def test_warm_up_and_cosine_decay():
    """AdamW's first updates have the size of the learning rate, whatever the gradient."""
    config = OptimizerConfig(
        lr_reference=1e-2, warmup_steps=2, schedule="cosine", weight_decay=0.0, betas=(0.0, 0.0)
    )
    optimizer = make_optimizer(config, 6)
    parameters = {"reference.x": jnp.ones(1)}
    state = optimizer.init(parameters)
    update = jax.jit(optimizer.update)
    sizes = []
    for _ in range(6):
        updates, state = update({"reference.x": jnp.ones(1)}, state, parameters)
        sizes.append(-float(updates["reference.x"][0]))
    decay = 0.5 * (1 + np.cos(np.pi * np.arange(4) / 4))
    np.testing.assert_allclose(sizes, 1e-2 * np.array([0, 0.5, *decay]), rtol=1e-5, atol=1e-9)


def test_gradient_norms_by_part():
    norms = gradient_norms({"reference.x": jnp.array([3.0]), "base.y": jnp.array([4.0])})
    assert jax.tree.map(float, norms) == {
        "gradient_norm": 5.0,
        "gradient_norm_reference": 3.0,
        "gradient_norm_base": 4.0,
    }


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (1, -1, (1, 8)), (2, 4, (2, 4))]
)
def test_mesh_takes_all_devices(data, fsdp, shape):
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp))
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == shape


@pytest.mark.parametrize(("data", "fsdp"), [(4, 1), (-1, 3), (16, -1), (3, 3)])
def test_mesh_that_is_not_the_devices_is_refused(data, fsdp):
    with pytest.raises(UserError, match=f"mesh: data {data} x fsdp {fsdp}.* 8 devices"):
        make_mesh(MeshConfig(data=data, fsdp=fsdp))


def test_batch_must_divide():
    mesh = make_mesh(MeshConfig())
    check_batch(64, 4, mesh)
    with pytest.raises(UserError, match="batch_size: 20 .* use a multiple of 8"):
        check_batch(20, 1, mesh)
    with pytest.raises(UserError, match="use a multiple of 32"):
        check_batch(16, 4, mesh)


def test_rules_split_large_kernels_only():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    shapes = {
        "a.kernel": (3, 3, 8, 16),
        "b.kernel": (3, 5),
        "c.kernel": (8, 8),
        "d.scale": (1024,),
        "e.embedding": (64, 8),
    }
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    assert partition_specs(tree, mesh, fsdp_min_size=15) == {
        "a.kernel": P(None, None, None, "fsdp"),
        "b.kernel": P(),  # nothing divides
        "c.kernel": P(None, "fsdp"),
        "d.scale": P(),
        "e.embedding": P("fsdp"),
    }
    assert set(partition_specs(tree, mesh, fsdp_min_size=10**6).values()) == {P()}
    with pytest.raises(ValueError, match="no sharding rule matches x.weight"):
        partition_specs({"x.weight": tree["a.kernel"]}, mesh, 1)


def test_metrics_are_read_in_intervals(tmp_path, monkeypatch):
    reads = []
    fetch = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: reads.append(len(tree)) or fetch(tree))
    config = TrainConfig(
        model=ModelConfig(base="base"),
        data=DataConfig(dir=Path("data")),
        output_dir=tmp_path,
        steps=7,
        logging=LoggingConfig(every=3),
    )
    with MetricLogger(config, first_step=0) as logger:
        logger.flops = 2e9
        for step in range(1, 8):
            by_timestep = loss_by_timestep(jnp.array([1.0, step]), jnp.array([0, 999]), 1000)
            metrics = {"loss": jnp.float32(step), "skipped": jnp.float32(0), **by_timestep}
            logger.update(step, metrics, waited=0.0)
        logger.image(7, "samples", np.zeros((4, 4, 3), np.uint8))
    assert reads == [3, 3, 1]
    rows = read_history(tmp_path)
    assert [row["loss"] for row in rows] == [2, 5, 7]
    for row in rows:
        # 2 GFLOP for 64 images; what a CPU could do at most is not known.
        assert row["gflops_per_second"] == pytest.approx(2 * row["images_per_second"] / 64)
        assert "mfu" not in row
    assert [row["loss_t90-100"] for row in rows] == [2, 5, 7] and rows[0]["loss_t00-10"] == 1
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes() and b"samples" in events.read_bytes()


class Accelerator:
    """Stands for one of two devices."""

    device_kind = "NVIDIA H100 80GB HBM3"

    def memory_stats(self) -> dict[str, int]:
        return {"peak_bytes_in_use": 3 * 2**30}


def test_utilisation_is_of_all_devices_and_leaves_pauses_out(tmp_path, monkeypatch):
    now = iter([0.0, 10.0, 110.0, 111.0, 121.0])  # opened; a pause of 100 s; read; read again
    monkeypatch.setattr("bootpig_jax.training.metrics.time.perf_counter", lambda: next(now))
    monkeypatch.setattr(jax, "devices", lambda: [Accelerator()] * 2)
    monkeypatch.setattr(jax, "local_devices", jax.devices)
    config = TrainConfig(
        model=ModelConfig(base="base"),
        data=DataConfig(dir=Path("data")),
        output_dir=tmp_path,
        steps=2,
        logging=LoggingConfig(every=1),
    )
    by_timestep = loss_by_timestep(jnp.ones(1), jnp.zeros(1, int), 1000)
    with MetricLogger(config, first_step=0) as logger:
        logger.flops = 0.4 * 2 * 989e12 * 11
        with logger.paused():
            pass
        logger.update(1, {"loss": 1.0, "skipped": 0.0, **by_timestep}, waited=2.2)
        logger.update(2, {"loss": 1.0, "skipped": 0.0, **by_timestep}, waited=5.0)
    first, second = read_history(tmp_path)
    assert first["mfu"] == pytest.approx(0.4) and first["memory_gib"] == 3
    assert second["mfu"] == pytest.approx(0.44)
    # Of the seconds since the last reading.
    assert first["waiting_for_data"] == pytest.approx(2.2 / 11)
    assert second["waiting_for_data"] == pytest.approx(5 / 10)


def test_a_loss_that_is_not_finite_spoils_its_own_bucket_alone():
    metrics = loss_by_timestep(jnp.array([jnp.nan, 3.0]), jnp.array([0, 999]), 1000)
    np.testing.assert_array_equal(metrics["loss_in_bucket"], [np.nan, *[0.0] * 8, 1.5])
    np.testing.assert_array_equal(metrics["bucket_count"], [0.5, *[0.0] * 8, 0.5])


@pytest.mark.long  # Its service takes seconds to start.
def test_weights_and_biases_gets_everything(tmp_path, monkeypatch):
    for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_files"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "run").mkdir()
    config = TrainConfig(
        model=ModelConfig(base="base"),
        data=DataConfig(dir=Path("data")),
        output_dir=tmp_path / "run",
        steps=2,
        logging=LoggingConfig(every=1, wandb="project"),
    )
    by_timestep = loss_by_timestep(jnp.ones(1), jnp.zeros(1, int), 1000)
    for first in (0, 1):  # the second start goes on
        with MetricLogger(config, first_step=first) as logger:
            for step in range(first + 1, 3):
                metrics = {"loss": jnp.float32(step), "skipped": jnp.float32(0), **by_timestep}
                logger.update(step, metrics, waited=0.0)
            logger.scalars(2, "validation", {"loss": 0.5})
            logger.image(2, "samples", np.zeros((4, 4, 3), np.uint8))
    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    identity = (tmp_path / "run" / "wandb_id").read_text().strip()
    # Two that start in the same second: wandb adds a number to the second one's name.
    assert len(runs) == 2 and all(f"-{identity}" in run.name for run in runs)
    (transaction_log,) = runs[0].glob("*.wandb")
    written = transaction_log.read_bytes()
    assert b"train/loss" in written and b"validation/loss" in written
    assert list(runs[0].glob("files/media/images/samples_2_*.png"))

    def refuse(**settings: object) -> None:
        raise wandb.Error("No API key configured.\nAnd so on.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="logging.wandb: .* No API key .* WANDB_MODE=offline"):
        MetricLogger(config, first_step=0)


def test_picture_grid():
    rows = [np.full((2, 4, 6, 3), value, np.uint8) for value in (10, 20, 30)]
    grid = picture_grid(rows)
    assert grid.shape == (3 * 6, 2 * 8, 3)
    assert (grid[1:5, 1:7] == 10).all() and (grid[13:17, 9:15] == 30).all()
    assert (grid[0] == 255).all()
