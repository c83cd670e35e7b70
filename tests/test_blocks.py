"""The layers of our own, against PyTorch's."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from bootpig_jax.models.blocks import GroupNorm, layer_norm


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


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_layer_norms_equal_pytorchs(offset: float) -> None:
    """Far from zero a variance in one pass, as the mean square less the squared mean, is noise."""
    x = np.float32(np.random.default_rng(0).standard_normal((2, 5, 8)) + offset)
    found = layer_norm(8, rngs=nnx.Rngs(0))(jnp.asarray(x))
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (8,), eps=1e-5)
    np.testing.assert_allclose(found, expected, atol=2e-3 if offset else 1e-5)
