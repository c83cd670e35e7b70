"""What a training run shows: a progress bar, TensorBoard, `history.jsonl`, grids of samples.

Reading a scalar waits for the device. So the step's metrics are kept as they are, on the device,
and read together every `logging.every` updates. Each reading is a line of `history.jsonl`: its step
and the means since the last one. `python -m bootpig_jax.plot_run` draws that file.

How fast it goes: `images_per_second`; `gflops_per_second`, of all devices together; `mfu`, these as
a part of the devices' stated peak, where that is known (`training.flops.PEAKS`). Work that is done
twice, as under `remat`, counts once.
"""

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import Array, UInt8
from tensorboardX import summary as tensorboard
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from bootpig_jax.config import TrainConfig
from bootpig_jax.errors import UserError
from bootpig_jax.training.flops import peak_flops
from bootpig_jax.training.optimizer import learning_rate
from bootpig_jax.training.step import TIMESTEP_BUCKETS

HISTORY = "history.jsonl"


class MetricLogger:
    """Collects metrics and shows their means; a context manager.

    Args:
      config: of the run.
      first_step: updates already made. What an earlier start logged beyond them is forgotten.
      first_update: how many of them were not skipped; None: all.
      active: False on all processes but the first, which then show nothing.

    Attributes:
      flops: of an update, over all devices; None while they are not known.

    Raises:
      UserError: `logging.wandb` is set and Weights & Biases is not installed or can't be used; or
        `output_dir` cannot be written to, here or later.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        first_step: int,
        first_update: int | None = None,
        active: bool = True,
    ) -> None:
        """See the class."""
        self.flops: float | None = None
        self._made = first_step if first_update is None else first_update
        self._config, self._active = config, active
        # First: it is what may fail.
        self._wandb: Any = (
            _wandb_run(config) if active and config.logging.wandb is not None else None
        )
        self._bar = tqdm(
            total=config.steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not active,
        )
        if active:
            with writing_to(config.output_dir):
                _forget_history_after(first_step, config.output_dir)
                (config.output_dir / "tensorboard").mkdir(exist_ok=True)
                # Not `SummaryWriter`, which writes in a thread: there a full disk is a traceback
                # that nobody can catch.
                self._events = EventsWriter(str(config.output_dir / "tensorboard" / "events"))
                # TensorBoard forgets what an earlier start logged from this step on.
                self._event(first_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._pending: list[Mapping[str, Array]] = []
        self._waited = 0.0
        self._since = time.perf_counter()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the files and ends the progress bar's line."""
        self._bar.close()
        if self._active:
            # All was written when it was given, but for what could not be, which was told then.
            with suppress(OSError):
                self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error is not None))

    def update(
        self, step: int, metrics: Mapping[str, Array], waited: float
    ) -> Sequence[Mapping[str, Array]]:
        """Takes the metrics of update `step`; reads those since the last time if it is their turn.

        Args:
          step: counted from 1.
          metrics: still on the device.
          waited: seconds that this update waited for its batch.

        Returns:
          The metrics that were read, one entry for each update: none in most calls.
        """
        self._pending.append(metrics)
        self._waited += waited
        if step % self._config.logging.every and step != self._config.steps:
            return ()
        fetched = jax.device_get(self._pending)
        now = time.perf_counter()
        seconds = now - self._since
        self._made += sum(not update["skipped"] for update in fetched)
        scalars = summary(fetched) | {
            "images_per_second": len(fetched) * self._config.batch_size / seconds,
            "waiting_for_data": self._waited / seconds,
            **self._speed(len(fetched) / seconds),
            **self._learning_rates(),
            **_memory(),
        }
        self.scalars(step, "train", scalars)
        shown = {
            "loss": f"{scalars.get('loss', np.nan):.4f}",
            "images/s": f"{scalars['images_per_second']:.3g}",
        }
        if "mfu" in scalars:
            shown["MFU"] = f"{scalars['mfu']:.0%}"
        elif "gflops_per_second" in scalars:
            shown["GFLOP/s"] = f"{scalars['gflops_per_second']:.3g}"
        if "memory_gib" in scalars:
            shown["GiB"] = f"{scalars['memory_gib']:.1f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(len(fetched))
        self._pending, self._waited, self._since = [], 0.0, now
        return fetched

    def scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """Writes values of one step: a line of the history, and a curve for each elsewhere."""
        if not self._active:
            return
        line = json.dumps({"step": step, "group": group, **values})
        with writing_to(self._config.output_dir):
            with (self._config.output_dir / HISTORY).open("a", encoding="utf-8") as history:
                history.write(f"{line}\n")
            for name, value in values.items():
                self._event(step, summary=tensorboard.scalar(f"{group}/{name}", value))
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def image(self, step: int, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Shows a picture in TensorBoard, and in Weights & Biases."""
        if not self._active:
            return
        with writing_to(self._config.output_dir):
            self._event(step, summary=tensorboard.image(name, picture, dataformats="HWC"))
            self._events.flush()
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(picture)}, step=step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time within does not count as training."""
        jax.block_until_ready(self._pending)  # The updates before are still being computed.
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def _event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(step=step, wall_time=time.time(), **content))

    def _speed(self, updates_per_second: float) -> dict[str, float]:
        if self.flops is None:
            return {}
        speed = self.flops * updates_per_second
        devices = jax.devices()
        peak = peak_flops(devices[0].device_kind)
        utilisation = {} if peak is None else {"mfu": speed / (len(devices) * peak)}
        return {"gflops_per_second": speed / 1e9, **utilisation}

    def _learning_rates(self) -> dict[str, float]:
        config = self._config.optimizer
        # The last update was made with the rate after those before it. One that is skipped does not
        # move the optimiser on; where all were, this is the rate that they would have had.
        before = max(0, self._made - 1)
        return {
            f"lr_{part}": float(learning_rate(config, peak, self._config.steps)(before))
            for part, peak in (("reference", config.lr_reference), ("rsa", config.lr_rsa))
        }


def summary(updates: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Averages the metrics of several updates.

    Args:
      updates: what the step returned for each (`training.step.make_train_step`); or the same of a
        validation's samples (`training.validation`).

    Returns:
      Means over the updates that were not skipped; `loss_t<from>-<to>` for each tenth of the
      timesteps that was drawn, in percent of T; of a validation, `reference_share` and
      `reference_share_<layer>`; `skipped`, a count.
    """
    good = [update for update in updates if not update["skipped"]]
    result = {"skipped": float(len(updates) - len(good))}
    if not good:
        return result
    means = {name: np.mean([update[name] for update in good], axis=0) for name in good[0]}
    losses, counts = means.pop("loss_in_bucket"), means.pop("bucket_count")
    shares = means.pop("reference_share", np.zeros(0))
    del means["skipped"]
    width = 100 // TIMESTEP_BUCKETS
    by_timestep = {
        f"loss_t{bucket * width:02d}-{(bucket + 1) * width}": float(loss / count)
        for bucket, (loss, count) in enumerate(zip(losses, counts, strict=True))
        if count
    }
    by_layer = {f"reference_share_{layer:02d}": float(s) for layer, s in enumerate(shares)}
    if by_layer:
        by_layer["reference_share"] = float(np.mean(shares))
    return {name: float(mean) for name, mean in means.items()} | by_timestep | by_layer | result


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's history, oldest first; a last line that was cut is left out."""
    rows = []
    path = folder / HISTORY
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns a write within that fails, as on a full disk, into one line.

    Raises:
      UserError: it failed.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output_dir: {folder} cannot be written to ({error.strerror or error}): make room, "
            "then start again: the run goes on from its last checkpoint"
        ) from None


def picture_grid(rows: list[UInt8[np.ndarray, "n h w 3"]]) -> UInt8[np.ndarray, "H W 3"]:
    """Joins rows of equally many pictures of one size into one picture, with thin white lines."""
    padded = [np.pad(row, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate([np.concatenate(list(row), axis=1) for row in padded], axis=0)


def _forget_history_after(step: int, folder: Path) -> None:
    """Cuts the history; a run that is killed meanwhile has the old one or the new one."""
    kept = [json.dumps(row) + "\n" for row in read_history(folder) if row["step"] <= step]
    temporary = folder / f".{HISTORY}.tmp"
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(folder / HISTORY)


def _memory() -> dict[str, float]:
    """The largest device's peak so far, where devices tell (CPUs do not)."""
    peaks = [
        (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    known = [peak for peak in peaks if peak is not None]
    return {"memory_gib": max(known) / 2**30} if known else {}


def _wandb_run(config: TrainConfig) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "logging.wandb: Weights & Biases is not installed: pip install wandb, or leave it unset"
        ) from None
    # A run that goes on is the same run there, too; its name stays free for the user to change.
    identity = config.output_dir / "wandb_id"
    if not identity.exists():
        with writing_to(config.output_dir):
            identity.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    try:
        return wandb.init(
            project=config.logging.wandb,
            dir=str(config.output_dir),
            name=config.output_dir.absolute().name,
            config=config.model_dump(mode="json"),
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
        )
    except wandb.Error as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"logging.wandb: Weights & Biases can't start a run: {reason}: log in with `wandb "
            "login`, or set WANDB_MODE=offline"
        ) from None
