"""Texts and pictures to what the UNets see, and back: jitted, a few pictures at a time."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8

from bootpig_jax.models.text_encoder import TextEncoder
from bootpig_jax.models.vae import VAE

VAE_BATCH = 4  # pictures that go through the VAE together: its activations are the largest


def encode_text(text_encoder: TextEncoder, ids: Int32[np.ndarray, "b l"]) -> Float[Array, "b l e"]:
    """The token features of tokenized texts."""
    graph, state = nnx.split(text_encoder)
    return _encode_text(graph, state, jnp.asarray(ids))


def encode_images(vae: VAE, images: Float32[np.ndarray, "b H W 3"]) -> Float[Array, "b h w c"]:
    """The scaled latents of pictures in [-1, 1]: the means of the VAE's posterior."""
    graph, state = nnx.split(vae)
    encoded = [_encode_images(graph, state, jnp.asarray(part)) for part in _in_parts(images)]
    return jnp.concatenate(encoded)[: len(images)]


def decode(vae: VAE, latents: Float[Array, "b h w c"]) -> UInt8[np.ndarray, "b H W 3"]:
    """The pictures of scaled latents, as 8-bit RGB."""
    graph, state = nnx.split(vae)
    parts = _in_parts(np.asarray(latents))
    decoded = [np.asarray(_decode(graph, state, jnp.asarray(part))) for part in parts]
    return np.concatenate(decoded)[: len(latents)]


def _in_parts(values: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of `VAE_BATCH` rows at most, of one length; the last is filled up with its last row."""
    size = min(VAE_BATCH, len(values))
    for start in range(0, len(values), size):
        part = values[start : start + size]
        yield np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])


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
