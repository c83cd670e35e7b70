"""The door to the devices: what one kind of device computes in another way than the next.

Everything above takes these functions from a `Kernels` that it is given, and asks for no device.
`kernels_for` chooses one where a model is made, from the device that will run it:

    SERIAL   a CPU: one head after the other, in pieces that fit its cache
    CUDNN    an NVIDIA GPU with bfloat16 (compute capability 8.0 and later)
    SPLASH   a TPU
    PLAIN    any other: all rows and heads at once, in blocks of bounded memory

Each computes the same numbers as `plain`, which is exact and the oracle of the others. Where a
kernel can't take an array (a precision, a size of heads), `plain` does it.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bootpig_jax.kernels import cudnn, plain, splash


class Attend(Protocol):
    """``softmax(q k^T / sqrt(d)) v``, with a gradient."""

    def __call__(
        self,
        q: Float[Array, "b n h d"],
        k: Float[Array, "b m h d"],
        v: Float[Array, "b m h d"],
        key_lengths: Int[Array, " b"] | None = None,
        *,
        causal: bool = False,
    ) -> Float[Array, "b n h d"]:
        """Attends.

        Args:
            q: queries.
            k: keys.
            v: values.
            key_lengths: for each sample, how many of the ``m`` keys count, at least 1; all when
                ``None``.
            causal: whether query ``i`` sees the keys up to ``i`` only.
        """


AttendWithLse = Callable[[Array, Array, Array], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """How one kind of device computes what the networks are made of.

    It is part of a network's structure, so its fields are functions of a module: a closure made
    anew would compile everything anew.

    Attributes:
        name: as users read it.
        attend: attention.
        attend_with_lse: attention ``[b n h d]`` and, in float32, the logarithm of its softmax's
            denominator ``[b n h]``; without a gradient on some devices, so never differentiated.
    """

    name: str
    attend: Attend
    attend_with_lse: AttendWithLse


SERIAL = Kernels("serial", plain.attend_serially, plain.attend_serially_with_lse)
PLAIN = Kernels("plain", plain.attend, plain.attend_with_lse)
CUDNN = Kernels("cudnn", cudnn.attend, cudnn.attend_with_lse)
SPLASH = Kernels("splash", splash.attend, splash.attend_with_lse)


def kernels_for(device: jax.Device | None = None) -> Kernels:
    """Chooses the kernels of a device; of the one that JAX computes on when ``None``."""
    device = device or default_device()
    match device.platform:
        case "cpu":
            return SERIAL
        case "tpu":
            return SPLASH
        case _:
            return CUDNN if cuda_capability(device) >= cudnn.CAPABILITY else PLAIN


def compute_dtype(precision: str, device: jax.Device | None = None) -> jnp.dtype:
    """The precision of a computation on a device.

    Args:
        precision: its name, or ``auto``: float32 on a CPU, elsewhere the 16-bit format that the
            device multiplies natively: bfloat16, but float16 on NVIDIA's GPUs before Ampere.
        device: the one that JAX computes on when ``None``.
    """
    device = device or default_device()
    if precision != "auto":
        return jnp.dtype(precision)
    if device.platform == "cpu":
        return jnp.dtype(jnp.float32)
    before_ampere = (0, 0) < cuda_capability(device) < (8, 0)
    return jnp.dtype(jnp.float16 if before_ampere else jnp.bfloat16)


def cuda_capability(device: jax.Device) -> tuple[int, int]:
    """An NVIDIA GPU's compute capability, such as (9, 0); (0, 0) for any other device."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    # AMD's GPUs answer with the name of an architecture.
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def default_device() -> jax.Device:
    """The device that JAX puts new arrays on."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]
