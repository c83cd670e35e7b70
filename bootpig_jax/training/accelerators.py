"""The accelerators that a run can be planned for on a machine that has none of them.

A TPU's compiler comes as a package, `libtpu`, and needs no TPU: `jax.experimental.topologies`
describes a slice of one generation, and what is compiled for that is what runs there. An NVIDIA
GPU's needs the card. So its plan is the account of this machine's compiler: an estimate.
"""

import dataclasses
import importlib.util
import os

import jax
from jax.experimental import topologies

from bootpig_jax.errors import UserError
from bootpig_jax.kernels import PLAIN, Kernels
from bootpig_jax.training.flops import peak_flops

# What libtpu is told on a machine without a TPU. Left to itself it asks what it runs on and prints
# errors, writes a log for each process into a folder that all users share, and locks out a second
# process, which would be right if there were a TPU to share.
WITHOUT_A_TPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# The part of a GPU's memory that JAX takes for itself unless it is told otherwise.
SHARE_OF_A_GPU = 0.75


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One kind of device.

    Attributes:
        name: as users read it.
        kind: how JAX names it, its `device_kind`.
        memory: GiB of a device that a program can have.
        axes: of a TPU's slice, how many directions its chips are wired in; 0 of a GPU.
    """

    name: str
    kind: str
    memory: float
    axes: int = 0

    @property
    def peak(self) -> float:
        """The FLOP/s that its maker states."""
        peak = peak_flops(self.kind)
        assert peak is not None
        return peak


# A TPU's memory is what its compiler gives a program; each device is a chip.
ACCELERATORS = {
    "v5e": Accelerator("TPU v5e", "TPU v5 lite", 15.75, axes=2),
    "v5p": Accelerator("TPU v5p", "TPU v5", 95.74, axes=3),
    "v6e": Accelerator("TPU v6e", "TPU v6 lite", 31.25, axes=2),
    "a100": Accelerator("NVIDIA A100 80 GB", "NVIDIA A100", SHARE_OF_A_GPU * 80),
    "h100": Accelerator("NVIDIA H100 80 GB", "NVIDIA H100", SHARE_OF_A_GPU * 80),
    "h200": Accelerator("NVIDIA H200", "NVIDIA H200", SHARE_OF_A_GPU * 140),
}


def pretend(name: str | None, count: int) -> tuple[list[jax.Device], Kernels | None]:
    """Makes devices that programs can be compiled for, but not run on.

    Args:
      name: a key of `ACCELERATORS`; `None` for no particular accelerator.
      count: how many.

    Returns:
      The devices: a TPU's, or this machine's CPU so often. And how they compute, `None` if as
      devices of their kind do: cuDNN's attention can't be compiled without its card, so the plain
      one, of bounded memory too, stands for it.

    Raises:
      UserError: there is no such slice of TPUs, or `libtpu` is not installed.
    """
    if count < 1:
        raise UserError(f"--devices: must be at least 1, not {count}")
    # Before anything asks JAX for devices: what is here stays untouched.
    jax.config.update("jax_platforms", "cpu")
    if name is None or not ACCELERATORS[name].axes:
        jax.config.update("jax_num_cpu_devices", count)
        return jax.devices(), PLAIN
    shape = slice_shape(ACCELERATORS[name], count)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--accelerator: the compiler for {ACCELERATORS[name].name} is the package libtpu, "
            "which is not installed: run `make libtpu` and put PYTHONPATH=.venv-tpu before this"
        )
    for variable, value in WITHOUT_A_TPU.items():
        os.environ.setdefault(variable, value)
    # JAX writes what it compiles for what is not here, and can't read it.
    jax.config.update("jax_enable_compilation_cache", False)
    # A host has 2 x 2 chips, or the whole of a smaller slice.
    host = tuple(min(size, 2) for size in shape[:2])
    topology = topologies.get_topology_desc(
        f"{name}:{'x'.join(map(str, shape))}", "tpu", chips_per_host_bounds=(*host, 1)
    )
    return topology.devices, None


def slice_shape(accelerator: Accelerator, count: int) -> tuple[int, ...]:
    """How `count` chips of a TPU lie: 4 x 2, or 4 x 2 x 2; as near to a cube as powers of 2 are.

    Raises:
      UserError: `count` is no power of 2.
    """
    exponent, axes = count.bit_length() - 1, accelerator.axes
    if count != 2**exponent:
        raise UserError(
            f"--devices: slices of {accelerator.name} are planned for powers of 2, not {count}"
        )
    return tuple(2 ** ((exponent + axis) // axes) for axis in reversed(range(axes)))
