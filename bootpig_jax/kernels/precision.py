"""What `float32` means: the same on every device."""

import jax
import jax.numpy as jnp


def product_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """The precision to ask for in a product of arrays of type `dtype`.

    Left to itself a float32 product is TF32 on NVIDIA's GPUs and one pass in bfloat16 on TPUs.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
