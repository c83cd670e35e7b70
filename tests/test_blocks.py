"""The layers that are computed in a way of their own, against the plain way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from bootpig_jax.models import blocks
from bootpig_jax.models.blocks import FeedForward, GroupNorm, Linear, conv3x3


@pytest.mark.parametrize("side", [2, 8], ids=["few positions", "many positions"])
@pytest.mark.parametrize("strides", [1, 2])
def test_convolutions_have_the_plain_gradient(side: int, strides: int) -> None:
    graph, state = nnx.split(conv3x3(24, 32, strides=strides, use_bias=False, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, side, side, 24))

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (strides, strides),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return nnx.merge(graph, jax.tree.map(lambda _: kernel, state))(x)

    (kernel,) = jax.tree.leaves(state)
    wanted, wanted_gradients = jax.vjp(plain, x, kernel)
    found, found_gradients = jax.vjp(ours, x, kernel)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    cotangent = jax.random.normal(jax.random.key(2), wanted.shape)
    for mine, other in zip(found_gradients(cotangent), wanted_gradients(cotangent), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0])
def test_group_norms_equal_pytorchs(scale: float) -> None:
    """... also where a group's variance is below epsilon, or is nothing at all."""
    norm = GroupNorm(8, 2, 1e-5, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = jnp.arange(8.0) + 1, jnp.arange(8.0)
    x = 0.5 + scale * np.random.default_rng(0).standard_normal((2, 8, 3, 5), np.float32)
    expected = torch.nn.functional.group_norm(
        torch.from_numpy(x), 2, torch.arange(8.0) + 1, torch.arange(8.0), eps=1e-5
    )
    found = norm(jnp.asarray(x.transpose(0, 2, 3, 1))).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_linear_layers_take_any_number_of_axes() -> None:
    layer = Linear(5, 7, rngs=nnx.Rngs(0))
    for shape in [(5,), (3, 5), (2, 3, 5), (2, 0, 3, 5)]:
        x = jnp.arange(float(np.prod(shape))).reshape(shape)
        np.testing.assert_allclose(layer(x), x @ layer.kernel[...] + layer.bias[...], atol=1e-4)


def test_a_feed_forward_layer_in_blocks_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, weights = nnx.split(FeedForward(8, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (3, 8, 8))

    def layer(weights: nnx.State, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, weights)(x)

    def output_and_gradients() -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        out, pull_back = jax.vjp(layer, weights, x)
        return layer(weights, x), out, jax.tree.leaves(pull_back(jnp.sin(out)))

    def in_blocks() -> bool:
        return "scan" in str(jax.make_jaxpr(lambda *a: layer(*a))(weights, x))  # traced afresh

    wanted = output_and_gradients()
    assert not in_blocks()
    monkeypatch.setattr(blocks, "TOKEN_BLOCK", 6)
    assert in_blocks()
    for found, other in zip(
        jax.tree.leaves(output_and_gradients()), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(found, other, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(blocks, "TOKEN_BLOCK", 7)  # does not cut 24 tokens evenly
    assert not in_blocks()
