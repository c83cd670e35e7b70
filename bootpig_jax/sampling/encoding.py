"""Texts and pictures to what the UNets see, and back: jitted.

Pictures go through the VAE one by one: its activations are larger than the UNets', one picture of
512 px keeps a GPU busy, and what becomes of a picture does not depend on those beside it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8

from bootpig_jax.models.text_encoder import TextEncoder
from bootpig_jax.models.vae import VAE


def encode_text(text_encoder: TextEncoder, ids: Int32[np.ndarray, "b l"]) -> Float[Array, "b l e"]:
    """The token features of tokenized texts."""
    graph, state = nnx.split(text_encoder)
    return _encode_text(graph, state, jnp.asarray(ids))


def encode_images(vae: VAE, images: Float32[np.ndarray, "b H W 3"]) -> Float[Array, "b h w c"]:
    """The scaled latents of pictures in [-1, 1]: the means of the VAE's posterior."""
    graph, state = nnx.split(vae)
    return jnp.concatenate([_encode_images(graph, state, image[None]) for image in images])


def decode(vae: VAE, latents: Float[Array, "b h w c"]) -> UInt8[np.ndarray, "b H W 3"]:
    """The pictures of scaled latents, as 8-bit RGB."""
    graph, state = nnx.split(vae)
    decoded = [_decode(graph, state, row[None]) for row in np.asarray(latents)]
    return np.concatenate(jax.device_get(decoded))


@partial(jax.jit, static_argnames="graph")
def _encode_text(
    graph: nnx.GraphDef[TextEncoder], state: nnx.State, ids: Int[Array, "b l"]
) -> Float[Array, "b l e"]:
    return nnx.merge(graph, state)(ids)


@partial(jax.jit, static_argnames="graph")
def _encode_images(
    graph: nnx.GraphDef[VAE], state: nnx.State, images: Float[Array, "b H W 3"]
) -> Float[Array, "b h w c"]:
    vae = nnx.merge(graph, state)
    mean, _ = vae.encode(images)
    return vae.config.scaling_factor * mean.astype(jnp.float32)


@partial(jax.jit, static_argnames="graph")
def _decode(
    graph: nnx.GraphDef[VAE], state: nnx.State, latents: Float[Array, "b h w c"]
) -> UInt8[Array, "b H W 3"]:
    images = nnx.merge(graph, state).decode_latents(latents).astype(jnp.float32)
    return jnp.round((images + 1) * 127.5).astype(jnp.uint8)
