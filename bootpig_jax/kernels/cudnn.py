"""Attention on NVIDIA GPUs: cuDNN's fused kernels, through JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bootpig_jax.kernels import plain

# From which compute capability on cuDNN has them, and the largest heads that it takes there.
CAPABILITY = (8, 0)
LARGEST_HEAD = 128


def attend(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    key_lengths: Int[Array, " b"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "b n h d"]:
    """See `kernels.Attend`.

    Under a gradient JAX refuses odd numbers of queries or keys for cuDNN (77 text tokens; the
    latents of 576 pixels). So these get one more, of zeros: keys that no query sees, as a length or
    the causal order hides them, and queries that are cut off.
    """
    if not takes(q):
        return plain.attend(q, k, v, key_lengths, causal=causal)
    n, m = q.shape[1], k.shape[1]
    if m % 2 and key_lengths is None and not causal:
        key_lengths = jnp.full(len(q), m, jnp.int32)
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=key_lengths, implementation="cudnn"
    )
    return out[:, :n]


def attend_with_lse(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
    """Attention and its log-sum-exp, of which cuDNN would drop the gradient."""
    if not takes(q):
        return plain.attend_with_lse(q, k, v)
    # jax.nn.dot_product_attention calls this, and rounds the log-sum-exp to q's precision: with
    # bfloat16 that triples the error of a merge.
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention

    out, lse = dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, return_residual=True)
    return out, lse.swapaxes(1, 2)


def takes(q: Array) -> bool:
    """Whether cuDNN takes queries of this precision and size of heads."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= LARGEST_HEAD
