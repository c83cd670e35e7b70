"""Networks of which only the shapes are wanted, because their weights come from a file."""

import jax
from flax import nnx


class OneKey(nnx.Rngs):
    """Gives every layer the same key.

    `nnx.Rngs` counts the keys it gives, and under `jax.eval_shape` each count takes longer than the
    one before: of Stable Diffusion's UNet it takes 20 seconds.
    """

    def params(self) -> jax.Array:
        """The key."""
        return self.default.key[...]
