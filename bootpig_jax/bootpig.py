"""BootPIG: the Reference UNet ``phi`` and the Base UNet ``theta`` as one model.

``phi`` starts as a copy of ``theta``. It reads the reference pictures' latents and hands the Base
UNet one feature for each self-attention layer; the Base UNet attends to them (Eq. 3).
"""

from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Real

from bootpig_jax.models.unet import UNet, UNetConfig

BaseTrained = Literal["none", "rsa", "all"]
ReferenceTrained = Literal["none", "all"]


class BootPIG(nnx.Module):
    """The two UNets.

    Args:
        base: ``theta``, which draws.
        reference: ``phi``, which reads the references; it must own its parameters.
        remat: whether the backward pass computes what is inside the blocks again, instead of
            keeping it: less memory, and a forward pass more in each backward pass.
    """

    def __init__(self, base: UNet, reference: UNet, *, remat: bool = False):
        self.base = base
        self.reference = reference
        base.remat = reference.remat = remat

    @classmethod
    def from_unet(cls, unet: UNet, *, remat: bool = False) -> Self:
        """``phi = theta``, in buffers of its own: shared ones can't be donated.

        Parameters that are still in their file (`checkpoints.stored`) stay there, and are read for
        each of the two.
        """
        graph, state = nnx.split(unet)
        return cls(unet, nnx.merge(graph, jax.tree.map(lambda a: a.copy(), state)), remat=remat)


def reference_features(
    reference: UNet,
    latents: Float[Array, "b K h w c"],
    timesteps: Real[Array, " b"],
    text: Float[Array, "b l e"],
) -> tuple[Float[Array, "b K _n _d"], ...]:
    """What enters each self-attention layer of the Reference UNet.

    Args:
        reference: ``phi``.
        latents: the references' latents, noised to `timesteps`.
        timesteps: one for all references of a sample.
        text: the caption's token features.

    Returns:
        One array for each self-attention layer, in execution order; `References.features`.
    """
    b, k = latents.shape[:2]
    _, features = reference(
        latents.reshape(b * k, *latents.shape[2:]),
        jnp.repeat(timesteps, k, axis=0),
        jnp.repeat(text, k, axis=0),
    )
    return tuple(f.reshape(b, k, *f.shape[1:]) for f in features)


def is_trainable(
    path: tuple[str | int, ...],
    config: UNetConfig,
    base: BaseTrained = "rsa",
    reference: ReferenceTrained = "all",
) -> bool:
    """Whether training changes a parameter of `BootPIG`; the paper's setting by default.

    Gradients, optimiser state, precision and what a checkpoint holds all follow this predicate.

    Args:
        path: the parameter's path in `BootPIG`, e.g. ``("base", "down_blocks", 0, ...)``.
        config: the UNets' sizes.
        base: of the Base UNet nothing, the self-attention layers (`attn1`) or everything.
        reference: of the Reference UNet nothing, or everything that can get a gradient.
    """
    network, *inner = path
    name = ".".join(map(str, inner))
    if network == "base":
        return base == "all" or (base == "rsa" and ".attn1." in name)
    return reference == "all" and not name.startswith(dead_tail(config))


def dead_tail(config: UNetConfig) -> tuple[str, ...]:
    """Prefixes of the parameters behind the last captured feature.

    In the Reference UNet these never get a gradient, and weight decay alone would erode them. In
    Stable Diffusion's layout they are 24 tensors.
    """
    attending = [i for i, kind in enumerate(config.up_block_types) if kind.startswith("CrossAttn")]
    last = attending[-1] if attending else -1
    transformer = f"up_blocks.{last}.attentions.{config.layers_per_block}"
    block = f"{transformer}.transformer_blocks.0"
    later = tuple(f"up_blocks.{i}." for i in range(last + 1, len(config.up_block_types)))
    return (
        *(f"{block}.{layer}." for layer in ("attn1", "norm2", "attn2", "norm3", "ff")),
        f"{transformer}.proj_out.",
        f"up_blocks.{last}.upsamplers.",
        *later,
        "conv_norm_out.",
        "conv_out.",
    )
