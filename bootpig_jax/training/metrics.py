"""What a training run shows: a progress bar, TensorBoard scalars and grids of samples.

Reading a scalar waits for the device. So the step's metrics are kept as they are, on the device,
and read together every `logging.every` updates.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import jax
import numpy as np
from jaxtyping import Array, UInt8
from tensorboardX import SummaryWriter
from tqdm import tqdm


class MetricLogger:
    """Collects metrics and shows their means; a context manager.

    Args:
      folder: where TensorBoard's files go.
      steps: updates in the whole run.
      first_step: updates already made.
      batch_size: samples an update, over all processes.
      every: updates between two readings.
      active: False on all processes but the first, which then show nothing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        first_step: int,
        batch_size: int,
        every: int,
        active: bool = True,
    ) -> None:
        """See the class."""
        self._writer = SummaryWriter(str(folder)) if active else None
        self._bar = tqdm(
            total=steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not active
        )
        self._steps, self._batch_size, self._every = steps, batch_size, every
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
        """Flushes the files and ends the progress bar's line."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def update(
        self, step: int, metrics: Mapping[str, Array], waited: float
    ) -> Sequence[Mapping[str, Array]]:
        """Takes the metrics of update `step`; reads those since the last time if it is their turn.

        Args:
          step: counted from 1.
          metrics: scalars, still on the device.
          waited: seconds that this update waited for its batch.

        Returns:
          The metrics that were read, one entry for each update: none in most calls.
        """
        self._pending.append(metrics)
        self._waited += waited
        if step % self._every and step != self._steps:
            return ()
        fetched = jax.device_get(self._pending)
        scalars = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
        now = time.perf_counter()
        seconds = now - self._since
        scalars["images_per_second"] = len(fetched) * self._batch_size / seconds
        scalars["waiting_for_data"] = self._waited / seconds
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(f"train/{name}", value, step)
        self._bar.set_postfix(
            {
                "loss": f"{scalars['loss']:.4f}",
                "images/s": f"{scalars['images_per_second']:.3g}",
            },
            refresh=False,
        )
        self._bar.update(len(fetched))
        self._pending, self._waited, self._since = [], 0.0, now
        return fetched

    def image(self, step: int, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Shows a picture in TensorBoard. The time it took to make does not count as training."""
        if self._writer is not None:
            self._writer.add_image(name, picture, step, dataformats="HWC")
            self._writer.flush()
        self._since = time.perf_counter()


def picture_grid(rows: list[UInt8[np.ndarray, "n h w 3"]]) -> UInt8[np.ndarray, "H W 3"]:
    """Joins rows of equally many pictures of one size into one picture, with thin white lines."""
    padded = [np.pad(row, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate([np.concatenate(list(row), axis=1) for row in padded], axis=0)
