"""Attention on TPUs: JAX's splash attention, in Pallas.

The kernel works on one sample, wants queries and keys in multiples of 128 once anything is masked,
and takes no scale. So samples are mapped over, both are padded, the padding is masked by segments,
and the queries are scaled before. On several devices it has to stand inside `jax.shard_map`, as the
training step and the sampling loop do.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from bootpig_jax.kernels import plain

LANES = 128
# How many queries and keys a block has at most.
BLOCK = 512
LARGEST_HEAD = 256


def attend(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    key_lengths: Int[Array, " b"] | None = None,
    *,
    causal: bool = False,
    interpret: bool = False,
) -> Float[Array, "b n h d"]:
    """See `kernels.Attend`; `interpret` runs the kernel without a TPU."""
    if not takes(q):
        return plain.attend(q, k, v, key_lengths, causal=causal)
    how = {"causal": causal, "with_lse": False, "interpret": interpret}
    return _unpadded(_splash(q, k, v, key_lengths, **how), q)


def attend_with_lse(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
    """Attention and its log-sum-exp; the kernel has no gradient for the two together."""
    if not takes(q):
        return plain.attend_with_lse(q, k, v)
    out, (lse,) = _splash(q, k, v, None, causal=False, with_lse=True, interpret=interpret)
    return _unpadded(out, q), _unpadded(lse, q)


def takes(q: Array) -> bool:
    """Whether the kernel takes queries of this precision and size of heads.

    In float32 its products would be single passes in bfloat16.
    """
    return q.dtype == jnp.bfloat16 and q.shape[-1] <= LARGEST_HEAD


def _splash(q: Array, k: Array, v: Array, key_lengths: Array | None, **how: Any) -> Any:
    """What the kernel returns: heads first, and padded."""
    (b, _, h, d), m = q.shape, k.shape[1]

    def padded(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, 0))).swapaxes(1, 2)

    q, k, v = padded((q / math.sqrt(d)).astype(q.dtype)), padded(k), padded(v)
    queries, keys = q.shape[2], k.shape[2]
    segments = None
    if keys != m or key_lengths is not None:
        lengths = jnp.full(b, m, jnp.int32) if key_lengths is None else key_lengths
        hidden = (jnp.arange(keys) >= lengths[:, None]).astype(jnp.int32)
        # Every query, also one that pads, belongs to the segment of the keys that count.
        segments = kernel.SegmentIds(jnp.zeros((b, queries), jnp.int32), hidden)
    return jax.vmap(_kernel(h, queries, keys, **how))(q, k, v, segments)


def _unpadded(x: Array, q: Array) -> Array:
    """``[b h n ..]`` with padding to ``[b n h ..]`` without."""
    return x[:, :, : q.shape[1]].swapaxes(1, 2)


@functools.cache
def _kernel(
    heads: int, queries: int, keys: int, *, causal: bool, with_lse: bool, interpret: bool
) -> kernel.SplashAttentionKernel:
    of_head = (masks.CausalMask if causal else masks.FullMask)((queries, keys))
    q, k = (next(x for x in range(BLOCK, 0, -LANES) if size % x == 0) for size in (queries, keys))
    with jax.ensure_compile_time_eval():
        return kernel.make_splash_mha(
            masks.MultiHeadMask([of_head] * heads),
            block_sizes=kernel.BlockSizes(
                block_q=q,
                block_kv=k,
                block_kv_compute=k,
                block_q_dkv=q,
                block_kv_dkv=k,
                block_kv_dkv_compute=k,
                block_q_dq=q,
                block_kv_dq=k,
            ),
            head_shards=1,
            q_seq_shards=1,
            save_residuals=with_lse,
            interpret=interpret,
        )
