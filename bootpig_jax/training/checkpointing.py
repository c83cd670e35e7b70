"""Training checkpoints: state, position in the data and configuration, in one Orbax step each.

    output_dir/checkpoints/500/state    trained parameters, optimiser, step count
                              /data     the Grain iterator's state, one file for each process
                              /run      the configuration and the dataset's fingerprint

Saving is asynchronous: the arrays are copied and training goes on while they are written. Arrays
are stored under their dotted names, so what does not fit is reported by name. All of Orbax that the
project uses for training is in this file.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import grain
import grain.checkpoint
import jax
import orbax.checkpoint as ocp
from jaxtyping import Array

from bootpig_jax.config import CheckpointConfig, TrainConfig
from bootpig_jax.errors import UserError
from bootpig_jax.training.sharding import array_name
from bootpig_jax.training.step import TrainState

# Where a run may change between two starts without becoming another run.
FREE_FIELDS = (
    "checkpoint",
    "data.dir",  # the dataset's fingerprint stands for it
    "data.threads",
    "logging",
    "mesh",
    "output_dir",
    "steps",
)


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last one to be written."""

    def __init__(self, config: TrainConfig, data_fingerprint: str) -> None:
        """Looks for checkpoints; creates nothing.

        Args:
          config: of the run.
          data_fingerprint: of the dataset.

        Raises:
          UserError: `resume: must` and there is none, or `resume: never` and there is one.
        """
        self._folder = (config.output_dir / "checkpoints").absolute()
        self._config = config
        self._run = {
            "config": config.model_dump(mode="json"),
            "data_fingerprint": data_fingerprint,
        }
        self._manager: ocp.CheckpointManager | None = None
        self.latest = latest_step(self._folder)
        _check_resume(config.checkpoint, self._folder, self.latest)

    def __enter__(self) -> Self:
        """Opens the folder, creating it if needed."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._config.checkpoint.keep,
            # What a killed run left half-written.
            cleanup_tmp_directories=True,
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"output_dir: {self._folder} cannot be created: {error.strerror}"
            ) from None
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": grain.checkpoint.CheckpointHandler(),
                "run": ocp.JsonCheckpointHandler(),
            },
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits until everything is written."""
        self._open().close()

    def save(self, state: TrainState, data: grain.DatasetIterator) -> None:
        """Starts to save the state and the data's position, unless this step is saved."""
        step = int(state.step)
        if step == self.latest:
            return
        self._open().save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_by_name(state)),
                data=grain.checkpoint.CheckpointSave(data),
                run=ocp.args.JsonSave(self._run),
            ),
            force=True,
        )
        self.latest = step

    def restore(self, state: TrainState, data: grain.DatasetIterator) -> TrainState:
        """Reads the latest checkpoint.

        Args:
          state: one of the run's shapes and shardings. Do not use it afterwards.
          data: set to the position of the checkpoint, in place.

        Returns:
          The saved state, laid out as `state` was.

        Raises:
          UserError: the checkpoint is of another model, configuration or dataset, or is damaged.
        """
        manager, step = self._open(), cast(int, self.latest)
        where = self._folder / str(step)
        try:
            saved = manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))[
                "run"
            ]
            shapes = manager.item_metadata(step)["state"]
        except Exception as error:  # Orbax and what lies under it raise many kinds.
            raise _damaged(where, error) from error
        _check_run(saved, self._run, where)
        names = _by_name(state)
        _check_shapes(shapes, names, where)
        abstract = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
            for name, array in names.items()
        }
        try:
            restored = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    data=grain.checkpoint.CheckpointRestore(data),
                ),
            )["state"]
        except UserError:
            raise
        except Exception as error:
            raise _damaged(where, error) from error
        return jax.tree_util.tree_map_with_path(lambda path, _: restored[array_name(path)], state)

    def _open(self) -> ocp.CheckpointManager:
        assert self._manager is not None, "use Checkpoints in a with statement"
        return self._manager


def latest_step(folder: Path) -> int | None:
    """Returns the newest finished step in a folder of checkpoints, or None."""
    if not folder.is_dir():
        return None
    # Orbax renames a step to its number only when it is complete.
    return max(
        (int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()), default=None
    )


def _check_resume(config: CheckpointConfig, folder: Path, latest: int | None) -> None:
    if config.resume == "must" and latest is None:
        raise UserError(
            f"checkpoint.resume: must, but {folder} holds no checkpoint: check output_dir, or "
            "start a new run with checkpoint.resume=auto"
        )
    if config.resume == "never" and latest is not None:
        raise UserError(
            f"checkpoint.resume: never, but {folder} already holds step {latest}: choose another "
            "output_dir, or go on with checkpoint.resume=auto"
        )


def _check_run(saved: Any, current: dict[str, Any], where: Path) -> None:
    """Refuses to go on with another configuration or dataset than the checkpoint's."""
    before, now = _flat(saved["config"]), _flat(current["config"])
    for field in sorted(before.keys() | now.keys()):
        free = any(field == name or field.startswith(f"{name}.") for name in FREE_FIELDS)
        if free or before.get(field) == now.get(field):
            continue
        raise UserError(
            f"{field}: {now.get(field)!r}, but the checkpoint {where} was trained with "
            f"{before.get(field)!r}: set it back, or choose another output_dir"
        )
    if saved["data_fingerprint"] != current["data_fingerprint"]:
        raise UserError(
            f"data.dir: its shards are not those that the checkpoint {where} was trained on: "
            "restore them, or choose another output_dir"
        )


def _check_shapes(saved: Any, current: dict[str, Array], where: Path) -> None:
    for name in sorted(saved.keys() ^ current.keys()):
        side = "only in the checkpoint" if name in saved else "not in the checkpoint"
        raise UserError(f"{name} is {side} {where}: the architecture differs")
    for name, array in current.items():
        shape, dtype = tuple(saved[name].shape), saved[name].dtype
        if (shape, dtype) != (array.shape, array.dtype):
            raise UserError(
                f"{name} is {dtype}{list(shape)} in the checkpoint {where} and "
                f"{array.dtype}{list(array.shape)} in this run: architecture or precision differs"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _by_name(state: TrainState) -> dict[str, Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {array_name(path): leaf for path, leaf in leaves}


def _damaged(where: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"checkpoint {where} cannot be read ({reason[:200]}): move it away to go on from the one "
        "before"
    )
