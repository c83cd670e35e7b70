"""Training checkpoints: state, position in the data and configuration, in one Orbax step each.

    output_dir/checkpoints/500/state           trained parameters, optimiser, step count
                              /data            the position in the data
                              /run             the configuration, the dataset's fingerprint and the
                                               base weights' hash
                              /manifest.json   size and SHA-256 of every file of these three

Saving is asynchronous: the arrays are copied and training goes on while they are written. Orbax
renames a step to its number when it is complete, so a run that is killed leaves whole steps only.
Their bytes may change later, and a flipped bit in an array would go unnoticed: the manifest finds
it. A run starts from the newest step that agrees with its manifest; newer ones are moved to
`output_dir/damaged_checkpoints`.

Arrays are stored under their dotted names, so what does not fit is reported by name. All of Orbax
that the project uses for training is in this file.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pydantic
from jax.experimental import multihost_utils
from jaxtyping import Array
from orbax.checkpoint import type_handlers

from bootpig_jax.config import CheckpointConfig, TrainConfig
from bootpig_jax.errors import UserError
from bootpig_jax.training.sharding import array_name
from bootpig_jax.training.step import TrainState

# Where a run may change between two starts without becoming another run. So may `model.base`, once
# a checkpoint has its weights' hash.
FREE_FIELDS = (
    "accumulation",
    "checkpoint",
    "data.dir",  # the dataset's fingerprint stands for it
    "data.threads",
    "logging",
    "mesh",
    "model.allow_pickle",
    "output_dir",
    "safety",
    "steps",
    "validation",
)
ITEMS = ("state", "data", "run")
MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last one to be written.

    Attributes:
        latest: the newest intact step, or None.
        damaged: what is wrong with each newer one, by step. On the first process only.
        knows_base: whether the latest says which base weights it was trained from. Those that an
            earlier version saved do not.
    """

    def __init__(self, config: TrainConfig, data_fingerprint: str, base_sha256: str) -> None:
        """Looks for checkpoints and checks them; writes nothing.

        Args:
          config: of the run.
          data_fingerprint: of the dataset.
          base_sha256: of the base checkpoint (`checkpoints.identity.hash_model`).

        Raises:
          UserError: `resume: must` and there is none, `resume: never` and there is one, all are
            damaged, or the newest intact one is of another configuration, dataset or base.
        """
        self._folder = (config.output_dir / "checkpoints").absolute()
        self._config = config
        self._run = {
            "config": config.model_dump(mode="json"),
            "data_fingerprint": data_fingerprint,
            "base_sha256": base_sha256,
        }
        self._manager: ocp.CheckpointManager | None = None
        _check_resume(config.checkpoint, self._folder)
        self.latest, self.damaged = _newest_intact(self._folder)
        self.knows_base = True
        if self.latest is not None:
            where = self._folder / str(self.latest)
            saved = _read_run(where)
            _check_run(saved, self._run, where)
            self.knows_base = "base_sha256" in saved

    def __enter__(self) -> Self:
        """Opens the folder, creating it if needed, and moves damaged steps out of it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for step in self.damaged:
                _move_aside(self._folder / str(step))
        except OSError as error:
            raise UserError(
                f"output_dir: {self._folder} cannot be written to: {error.strerror}"
            ) from None
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are moved")
        # By default a small array is cut into slices, so that every device that holds a copy writes
        # one: for hundreds of small arrays that takes seconds.
        whole = type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
        registry = type_handlers.create_type_handler_registry((jax.Array, whole))
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._config.checkpoint.keep,
                # What a killed run left half-written.
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
                "data": ocp.JsonCheckpointHandler(),
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
        try:
            self._open().close()
        except Exception as failure:
            if error is None:
                raise self._not_saved(failure) from failure

    def check_space(self, state: TrainState) -> None:
        """Checks that the disk holds two states: an old one goes when a new one is complete.

        Raises:
          UserError: it does not.
        """
        needed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        parents = (self._folder, *self._folder.parents)
        free = shutil.disk_usage(next(folder for folder in parents if folder.exists())).free
        if free < needed:
            raise UserError(
                f"output_dir: {self._folder} has {free / 1e9:.1f} GB free, its checkpoints need "
                f"{needed / 1e9:.1f} GB: make room, or choose another output_dir"
            )

    def save(self, state: TrainState, data: grain.DatasetIterator) -> None:
        """Starts to save the state and the data's position, unless this step is saved.

        Raises:
          UserError: the state is not finite, or this or the step before cannot be written.
        """
        step = int(state.step)
        if step == self.latest:
            return
        if not bool(_all_finite(state)):
            raise UserError(
                f"the state is not finite after update {step}: it is not saved; {self._good()}"
            )
        try:
            self._open().save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(_by_name(state)),
                    # The index of the next batch: the same on all processes, however many.
                    data=ocp.args.JsonSave(cast(dict[str, Any], data.get_state())),
                    run=ocp.args.JsonSave(self._run),
                ),
                force=True,
            )
        except Exception as error:  # Orbax and what lies under it raise many kinds.
            raise self._not_saved(error) from error
        self.latest = step

    def restore(self, state: TrainState, data: grain.DatasetIterator) -> TrainState:
        """Reads the latest checkpoint.

        Args:
          state: one of the run's shapes and shardings. Do not use it afterwards.
          data: set to the position of the checkpoint, in place.

        Returns:
          The saved state, laid out as `state` was.

        Raises:
          UserError: the checkpoint is of another model, or is damaged.
        """
        manager, step = self._open(), cast(int, self.latest)
        where = self._folder / str(step)
        try:
            shapes = manager.item_metadata(step)["state"].tree
        except Exception as error:
            raise _unreadable(where, error) from error
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
                    state=ocp.args.PyTreeRestore(
                        abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
                    ),
                    data=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:
            raise _unreadable(where, error) from error
        data.set_state(restored["data"])
        saved = restored["state"]
        return jax.tree_util.tree_map_with_path(lambda path, _: saved[array_name(path)], state)

    def _open(self) -> ocp.CheckpointManager:
        assert self._manager is not None, "use Checkpoints in a with statement"
        return self._manager

    def _seal(self) -> None:
        """Writes the manifest of the step that is being saved.

        Orbax calls it on the first process, in the thread that writes, when the step's files are
        complete and before it renames the folder.
        """
        for step in self._folder.iterdir():
            # Not a complete step that has lost its manifest: nothing vouches for that one.
            if step.is_dir() and not step.name.isdigit() and not (step / MANIFEST).exists():
                content = json.dumps(_digests(step), indent=1, sort_keys=True)
                (step / MANIFEST).write_text(content + "\n", encoding="utf-8")

    def _not_saved(self, error: Exception) -> UserError:
        # The writes of all other arrays fail as well; each would say so, with a traceback.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        return UserError(
            f"output_dir: a checkpoint cannot be written ({_reason(error)}); make room, "
            f"then start again: {self._good()}"
        )

    def _good(self) -> str:
        steps = [
            s for s in saved_steps(self._folder) if (self._folder / str(s) / MANIFEST).exists()
        ]
        return f"the last good one is step {steps[-1]}" if steps else "there is no earlier one"


def saved_steps(folder: Path) -> list[int]:
    """Returns the complete steps in a folder of checkpoints, the newest last."""
    if not folder.is_dir():
        return []
    # Orbax renames a step to its number only when it is complete.
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def fault(step: Path) -> str | None:
    """Compares a step with its manifest.

    Returns:
      What is wrong, in a few words; None if nothing is.
    """
    try:
        expected = json.loads((step / MANIFEST).read_text(encoding="utf-8"))
        json.loads((step / "_CHECKPOINT_METADATA").read_text(encoding="utf-8"))  # Orbax reads it
        found = _digests(step)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} or _CHECKPOINT_METADATA cannot be read: {_reason(error)}"
    if not isinstance(expected, dict):
        return f"{MANIFEST} is no table of files"
    names = sorted(expected.keys() | found.keys())
    wrong = next((name for name in names if expected.get(name) != found.get(name)), None)
    if wrong is None:
        return None
    return f"{wrong} {'differs from its checksum' if wrong in found else 'is missing'}"


def _digests(step: Path) -> dict[str, list[Any]]:
    """Returns the size and the SHA-256 of each file of a step's items, by its relative path."""
    digests: dict[str, list[Any]] = {}
    for path in sorted(path for item in ITEMS for path in (step / item).rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[path.relative_to(step).as_posix()] = [path.stat().st_size, digest]
    return digests


def _newest_intact(folder: Path) -> tuple[int | None, dict[int, str]]:
    """Returns the newest intact step and the faults of the newer ones, the same on all processes.

    Raises:
      UserError: there are steps, and all are damaged.
    """
    newest, faults = -1, dict[int, str]()
    if jax.process_index() == 0:
        for step in reversed(saved_steps(folder)):
            reason = fault(folder / str(step))
            if reason is None:
                newest = step
                break
            faults[step] = reason
    # -2 tells the other processes to stop as well.
    told = -2 if faults and newest < 0 else newest
    if jax.process_count() > 1:
        told = int(multihost_utils.broadcast_one_to_all(np.int32(told)))
    if told == -2:
        listing = ", ".join(f"{step} ({reason})" for step, reason in faults.items())
        raise UserError(
            f"checkpoint: every one in {folder} is damaged: {listing}: restore one from a copy, or "
            "choose another output_dir"
        )
    return (None if told < 0 else told), faults


def _move_aside(step: Path) -> None:
    folder = step.parent.parent / "damaged_checkpoints"
    folder.mkdir(exist_ok=True)
    number = 0
    while (folder / f"{step.name}-{number}").exists():
        number += 1
    step.rename(folder / f"{step.name}-{number}")


def _read_run(step: Path) -> Any:
    try:
        return json.loads((step / "run" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check_resume(config: CheckpointConfig, folder: Path) -> None:
    steps = saved_steps(folder)
    if config.resume == "must" and not steps:
        raise UserError(
            f"checkpoint.resume: must, but {folder} holds no checkpoint: check output_dir, or "
            "start a new run with checkpoint.resume=auto"
        )
    if config.resume == "never" and steps:
        raise UserError(
            f"checkpoint.resume: never, but {folder} already holds step {steps[-1]}: choose "
            "another output_dir, or go on with checkpoint.resume=auto"
        )


def _check_run(saved: Any, current: Mapping[str, Any], where: Path) -> None:
    """Refuses to go on with another configuration, dataset or base than the checkpoint's."""
    try:
        # Through the model: fields that are newer than the checkpoint get their defaults.
        config = TrainConfig.model_validate_json(json.dumps(saved["config"]))
    except (pydantic.ValidationError, KeyError, TypeError):
        raise UserError(
            f"checkpoint {where}: its configuration cannot be read by this version: go on with the "
            "version that wrote it, or choose another output_dir"
        ) from None
    base = saved.get("base_sha256")
    may_differ = FREE_FIELDS if base is None else (*FREE_FIELDS, "model.base")
    before, now = _flat(config.model_dump(mode="json")), _flat(current["config"])
    for field in sorted(before.keys() | now.keys()):
        free = any(field == name or field.startswith(f"{name}.") for name in may_differ)
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
    if base not in (None, current["base_sha256"]):
        raise UserError(
            f"model.base: the weights in {now['model.base']} are not those that the checkpoint "
            f"{where} was trained from: restore them, or choose another output_dir"
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


@jax.jit
def _all_finite(state: TrainState) -> Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]))


def _unreadable(where: Path, error: Exception) -> UserError:
    return UserError(
        f"checkpoint {where} cannot be read ({_reason(error)}): move it away to go on from the one "
        "before"
    )


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
