"""The figures that logs and plans show: their units, and what exactly they are figures of."""

import dataclasses
import math
import re
import resource
import shutil
import sys
import time
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

import data_gen.plan
from bootpig_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from bootpig_jax.data.records import ShardReader
from bootpig_jax.errors import UserError
from bootpig_jax.toyland.quickstart import peak_memory
from bootpig_jax.training import plan as training_plan
from bootpig_jax.training.checkpointing import Checkpoints
from bootpig_jax.training.loop import run_steps
from bootpig_jax.training.metrics import MetricLogger, read_history, summary
from bootpig_jax.training.optimizer import learning_rate, make_optimizer, updates_made
from bootpig_jax.training.sharding import make_mesh
from bootpig_jax.training.step import TrainState, loss_by_timestep
from data_gen.shards import make_shard
from data_gen.stages import Caption, Stages
from tests import data_gen_stubs as stubs


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


# --- speed


class Clock:
    """Stands for the time of day, which passes only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def pass_by(self, seconds: float, answer: Any = None) -> Any:
        self.now += seconds
        return answer


class NoCheckpoints:
    def save(self, state: TrainState, data: Any) -> None:
        """Takes no time."""


def test_speeds_are_per_second_of_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three quarters of a second an update, one of them waiting for 24 images."""
    clock = Clock(monkeypatch)
    config = configuration(
        tmp_path,
        steps=4,
        logging={"every": 2, "grid_every": 1},
        validation={"every": 1},
    )

    def step(state: TrainState, frozen: Any, batch: Any) -> Any:
        clock.pass_by(0.5)
        return dataclasses.replace(state, step=state.step + 1), update_metrics()

    with MetricLogger(config, first_step=0) as logger:
        run_steps(
            step,
            TrainState(jnp.zeros((), jnp.int32), {}, (), {}),
            None,
            iter(lambda: clock.pass_by(0.25, {}), None),
            lambda batch: batch,
            config=config,
            mesh=make_mesh(config.mesh, jax.devices()[:1]),
            checkpoints=NoCheckpoints(),
            logger=logger,
            count_flops=lambda *_: 3e9,
            draw_grid=lambda state: clock.pass_by(1e3, np.zeros((2, 2, 3), np.uint8)),
            validate=lambda state: clock.pass_by(1e4, {"loss": 1.0}),
        )
    rows = [row for row in read_history(tmp_path) if row["group"] == "train"]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(32)
        assert row["waiting_for_data"] == pytest.approx(1 / 3)
        assert row["gflops_per_second"] == pytest.approx(4)
    bar = capsys.readouterr().err
    assert "images/s=32" in bar and "GFLOP/s=4" in bar and "4/4" in bar


@dataclasses.dataclass
class Accelerator:
    """Stands for a device that tells its memory."""

    gib: float
    device_kind = "NVIDIA H100 80GB HBM3"

    def memory_stats(self) -> dict[str, int]:
        used = int(self.gib * 1024**3)
        return {"bytes_in_use": used // 2, "peak_bytes_in_use": used}


def test_memory_is_the_largest_devices_peak_in_gib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(jax, "local_devices", lambda: [Accelerator(2), Accelerator(5.5)])
    monkeypatch.setattr(jax, "devices", jax.local_devices)
    with MetricLogger(configuration(tmp_path, steps=1), first_step=0) as logger:
        logger.flops = 0.25 * 2 * 989e12 * 4
        clock.pass_by(4)
        logger.update(1, update_metrics(), waited=0.0)
    (row,) = read_history(tmp_path)
    assert row["memory_gib"] == 5.5 and row["mfu"] == pytest.approx(0.25)
    bar = capsys.readouterr().err
    assert "GiB=5.5" in bar and "MFU=25%" in bar


# --- losses


def test_losses_by_timestep_are_means_over_the_samples_in_a_tenth() -> None:
    def update(losses: list[float], t: list[int], skipped: float = 0.0) -> dict[str, Any]:
        found = loss_by_timestep(jnp.array(losses), jnp.array(t), 1000)
        return {"loss": np.mean(losses), "skipped": skipped, **jax.device_get(found)}

    found = summary(
        [
            update([1.0, 3.0, 5.0, 7.0], [0, 99, 100, 450]),
            update([8.0, 9.0, 10.0, 2.0], [99, 999, 900, 899]),
            update([math.nan, 1.0, 1.0, 1.0], [0, 100, 500, 999], skipped=1.0),
        ]
    )
    assert found == pytest.approx(
        {
            "loss": (4 + 7.25) / 2,
            "skipped": 1,
            "loss_t00-10": (1 + 3 + 8) / 3,
            "loss_t10-20": 5,
            "loss_t40-50": 7,
            "loss_t80-90": 2,
            "loss_t90-100": (9 + 10) / 2,
        }
    )


def test_tensorboard_has_the_historys_figures(tmp_path: Path) -> None:
    with MetricLogger(configuration(tmp_path), first_step=0) as logger:
        for step in range(1, 5):
            logger.update(step, update_metrics(loss=0.25 * step), waited=0.0)
        logger.scalars(4, "validation", {"loss": 0.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    reader = ShardReader(path)  # event files have TFRecord's frames
    events = [Event.FromString(reader[index]) for index in range(len(reader))]
    shown = {
        (event.step, value.tag): value.simple_value
        for event in events
        for value in event.summary.value
    }
    written = {
        (row["step"], f"{row['group']}/{name}"): value
        for row in read_history(tmp_path)
        for name, value in row.items()
        if name not in ("step", "group")
    }
    assert shown == pytest.approx(written, rel=1e-6)
    assert shown[2, "train/loss"] == 0.375 and shown[4, "validation/loss"] == 0.5


# --- plans and the disk


def test_the_plan_of_training_is_in_gib_and_seconds() -> None:
    gib = 1024**3
    table = training_plan.report(
        training_plan.Plan(
            masters=2 * gib,
            moments=4 * gib,
            frozen=gib // 2,
            batch=gib // 4,
            temporary=8 * gib,
            compiled={},
            flops=1.5e15,
            devices=4,
        ),
        "estimated",
    )
    figures = dict(re.findall(r"^ *(\S.*?)[: ] +([\d.]+)$", table, re.MULTILINE))
    assert "On each of 4 devices, GiB" in table
    assert [float(figures[name]) for name in ("trained weights, float32", "together")] == [2, 14.75]
    assert float(figures["TFLOP an update, all devices"]) == 1500
    seconds = 1.5e15 / 4 / (989e12 * 0.35)
    assert float(figures["NVIDIA H100"]) == pytest.approx(seconds, abs=1e-4)


def data_plan(**changes: Any) -> data_gen.plan.Plan:
    fields: dict[str, Any] = {
        "output_dir": Path("out"),
        "captions": "toyland",
        "calls": None,
        "drawing": "model",
        "shards": 4,
        "shards_left": 2,
        "pictures": 9000,
        "pictures_left": 5400,
        "tflop": 400.0,
        "seconds": None,
        "kept": None,
        "bytes_left": 2.5e9,
        "bytes_measured": True,
    }
    return data_gen.plan.Plan(**(fields | changes))


def test_the_plan_of_data_is_in_gb_and_hours() -> None:
    assert "2.50 GB more at most (measured)" in data_plan().text()
    hours = 5400 * 400 / (790 * 0.35) / 3600
    assert f" {hours:.1f} GPU hours on an H100" in data_plan().text()
    measured = data_plan(seconds=2.0, kept=0.8).text()
    assert "3.0 hours left (measured: 2 s a picture" in measured
    assert "80.0% of the candidates kept" in measured


def test_a_shards_report_is_in_seconds_of_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    class Pictures(stubs.StubPictures):
        def draw(self, *arguments: Any) -> Any:
            return clock.pass_by(3, super().draw(*arguments))

    class Segmenter(stubs.StubSegmenter):
        def segment(self, *arguments: Any) -> Any:
            return clock.pass_by(5, super().segment(*arguments))

    config = stubs.make_config(tmp_path, candidates=4)
    captions = [Caption("a cup", "cup")] * 4
    report = make_shard(config, Stages(Pictures(), Segmenter()), 0, captions)
    assert report.candidates == 4 and report.count + sum(report.rejects.values()) == 4
    assert (report.seconds["pictures"], report.seconds["masks"]) == (3, 5)
    assert report.seconds["total"] == 8


def test_a_full_disk_is_told_in_gb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = types.SimpleNamespace(free=3_100_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    large: Any = np.broadcast_to(np.float32(0), 5 * 10**8)  # 2 GB that take no memory
    state = TrainState(large, {}, (), {})
    with pytest.raises(UserError, match=r"has 3\.1 GB free, its checkpoints need 4\.0 GB"):
        Checkpoints(configuration(tmp_path), "fingerprint", "base").check_space(state)


def test_the_quickstarts_memory_is_in_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {resource.RUSAGE_SELF: 1_000_000, resource.RUSAGE_CHILDREN: 2_500_000}  # kibibytes
    monkeypatch.setattr(
        resource, "getrusage", lambda kind: types.SimpleNamespace(ru_maxrss=peaks[kind])
    )
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_memory() == pytest.approx(2.56)
