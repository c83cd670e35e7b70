"""How batches and parameters lie on the devices.

The mesh has two axes. A batch is split over both, so every device works on samples of its own.
Parameters and optimiser moments are whole along `data` and split along `fsdp`: with `fsdp: 1` this
is plain data parallelism.

The step computes gradients inside `jax.shard_map`, where each device sees its own samples only and
communication is what the code says it is: parameters are gathered once (`gather`), any number of
micro-batches is worked through, and gradients are reduced once, each device keeping its part
(`reduce_mean`). Left to the compiler, the reduction would sit inside the accumulation loop.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bootpig_jax.config import MeshConfig
from bootpig_jax.errors import UserError

AXES = ("data", "fsdp")
BATCH = P(AXES)

# The first pattern found in an array's dotted name decides. A name that none matches is an error.
RULES: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(count|step)$", "replicate"),
    (r"(^|\.)empty_text$", "replicate"),
    (r"(^|\.)(bias|scale)$", "replicate"),
    (r"(^|\.)(kernel|embedding)$", "fsdp"),
)

Tree = TypeVar("Tree")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices in a mesh with the axes `data` and `fsdp`.

    Args:
      config: the axes' sizes; -1 takes what the other axis leaves.
      devices: those to use; all by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    count = len(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp]
    if -1 in sizes:
        rest, remainder = divmod(count, math.prod(size for size in sizes if size != -1))
        if remainder or not rest:
            raise UserError(
                f"mesh: data {config.data} x fsdp {config.fsdp} does not divide the {count} "
                "devices that are here"
            )
        sizes[sizes.index(-1)] = rest
    if math.prod(sizes) != count:
        raise UserError(
            f"mesh: data {config.data} x fsdp {config.fsdp} is not the {count} devices that are "
            "here: use -1 for one of them"
        )
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto, AxisType.Auto), devices=devices
    )


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Checks that every device gets equally many samples of every micro-batch.

    Raises:
      UserError: it does not.
    """
    if batch_size % (accumulation * mesh.size):
        raise UserError(
            f"batch_size: {batch_size} is not divisible by accumulation {accumulation} x "
            f"{mesh.size} devices: use a multiple of {accumulation * mesh.size}"
        )


def array_name(path: tuple[Any, ...]) -> str:
    """Returns the dotted name of a leaf of a tree, from its key path."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def partition_specs(tree: Tree, mesh: Mesh, fsdp_min_size: int) -> Tree:
    """Returns a tree of the same structure with a `PartitionSpec` for each array.

    Args:
      tree: arrays or their shapes; a leaf's name is its key path.
      mesh: the devices.
      fsdp_min_size: arrays with fewer elements stay whole on every device.

    Raises:
      ValueError: no rule matches a name.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        name = array_name(path)
        for pattern, placement in RULES:
            if re.search(pattern, name):
                split = placement == "fsdp" and math.prod(leaf.shape) >= fsdp_min_size
                return _split_largest(leaf.shape, mesh.shape["fsdp"]) if split else P()
        raise ValueError(f"no sharding rule matches {name}")

    return jax.tree_util.tree_map_with_path(spec, tree)


def named(specs: Tree, mesh: Mesh) -> Tree:
    """Returns the `NamedSharding` of each `PartitionSpec` in a tree."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P)
    )


def place(tree: Tree, specs: Tree, mesh: Mesh) -> Tree:
    """Puts arrays onto the devices as `specs` says.

    Args:
      tree: arrays that lie on the devices already, or that every process can read: of these
        (NumPy's and `Stored` ones) each process reads what its own devices hold, and nothing is
        sent between processes.
      specs: a `PartitionSpec` for each.
      mesh: the devices.
    """

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(array, jax.Array):
            return jax.device_put(array, sharding)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, named(specs, mesh))


def place_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Puts this process's part of a batch onto its devices, as part of one global batch."""
    sharding = NamedSharding(mesh, BATCH)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch
    )


def gather(tree: Tree, specs: Tree, dtype: jnp.dtype) -> Tree:
    """Inside `shard_map`: makes every array whole again.

    Args:
      tree: each device's parts.
      specs: how they were split.
      dtype: the precision in which what was split is sent and kept. What was whole stays as it is.
    """

    def whole(array: jax.Array, spec: P) -> jax.Array:
        axis = _fsdp_axis(spec)
        if axis is None:
            return array
        return jax.lax.all_gather(array.astype(dtype), "fsdp", axis=axis, tiled=True)

    return jax.tree.map(whole, tree, specs)


def reduce_mean(tree: Tree, specs: Tree) -> Tree:
    """Inside `shard_map`: the mean over all devices, of which each keeps its part."""
    count = jax.lax.axis_size(AXES)

    def mean(array: jax.Array, spec: P) -> jax.Array:
        axis = _fsdp_axis(spec)
        if axis is None:
            total = jax.lax.psum(array, AXES)
        else:
            # The scatter comes first: what is left for the slower axis is `fsdp` times smaller.
            part = jax.lax.psum_scatter(array, "fsdp", scatter_dimension=axis, tiled=True)
            total = jax.lax.psum(part, "data")
        return total / count

    return jax.tree.map(mean, tree, specs)


def _split_largest(shape: tuple[int, ...], parts: int) -> P:
    """Splits the largest dimension that divides evenly, the last of equals."""
    fitting = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not fitting:
        return P()
    axis = max(fitting, key=lambda axis: (shape[axis], axis))
    return P(*(None,) * axis, "fsdp")


def _fsdp_axis(spec: P) -> int | None:
    return spec.index("fsdp") if "fsdp" in spec else None
