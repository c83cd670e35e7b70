"""Attention in plain JAX: for a CPU, and for other devices where `attention` has no kernel to call.

What is fast on a CPU was measured (`python -m benchmarks.layers` compares with PyTorch's kernel):
heads before tokens, and from a million scores on, blocks of queries whose scores stay in the cache.
A block's scores are never kept: the backward pass computes them again from the queries, the keys
and the log-sum-exp, as FlashAttention does. So it takes the memory that a fused kernel takes.

Below, ``q`` are queries divided by ``sqrt(d)``. ``lengths`` say how many keys count: in `_attend`
and `_scores` they broadcast to the scores, in `_blocked` there is one for each head.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# From how many scores on attention works in blocks, and how many queries a block has.
BLOCKED_FROM = 2**20
QUERY_BLOCK = 512

Tree = TypeVar("Tree")


def plain_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    key_lengths: Int[Array, " b"] | None = None,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
    """``softmax(q k^T / sqrt(d)) v`` and the logarithm of the softmax's denominator.

    Args:
        q: queries.
        k: keys.
        v: values.
        key_lengths: for each sample, how many of the ``m`` keys count, at least 1; all when
            ``None``.
    """
    b, n, h, d = q.shape
    # Heads first, which is twice as fast; and smaller than the scores, the queries are scaled.
    q, k, v = (x.swapaxes(1, 2) for x in (q / math.sqrt(d), k, v))
    block = _query_block(n)
    if n * k.shape[2] < BLOCKED_FROM or block == 1:
        lengths = None if key_lengths is None else key_lengths[:, None, None, None]
        out, lse = _attend(q, k, v, lengths)
    else:
        lengths = None if key_lengths is None else jnp.repeat(key_lengths, h)
        q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
        out, lse = (x.reshape(b, h, n, -1) for x in _blocked(q, k, v, lengths, block))
    return out.swapaxes(1, 2), lse[..., 0].swapaxes(1, 2)


def _query_block(queries: int) -> int:
    """The most queries, `QUERY_BLOCK` at most, that cut `queries` evenly."""
    return next(size for size in range(QUERY_BLOCK, 0, -1) if queries % size == 0)


def _attend(q: Array, k: Array, v: Array, lengths: Array | None) -> tuple[Array, Array]:
    """Attention ``[.. n d]`` of scaled queries, and its log-sum-exp ``[.. n 1]``."""
    scores = _scores(q, k, lengths)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    exponentials = jnp.exp(scores - top)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    out = _product("...nm,...md->...nd", exponentials.astype(v.dtype), v)
    # Divided last: the outputs are fewer than the scores.
    return (out / total).astype(v.dtype), top + jnp.log(total)


def _scores(q: Array, k: Array, lengths: Array | None) -> Array:
    scores = _product("...nd,...md->...nm", q, k)
    if lengths is None:
        return scores
    return scores + jnp.where(jnp.arange(k.shape[-2]) < lengths, 0.0, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(q: Array, k: Array, v: Array, lengths: Array | None, size: int) -> tuple[Array, Array]:
    """`_attend` for heads ``[h n d]``, one head and one block of `size` queries after the other."""

    def head(arguments: tuple[Any, ...]) -> tuple[Array, Array]:
        q, k, v, length = arguments
        return jax.lax.map(lambda q: _attend(q, k, v, length), _cut(q, size))

    return _glue(jax.lax.map(head, (q, k, v, lengths)))


def _blocked_forward(
    q: Array, k: Array, v: Array, lengths: Array | None, size: int
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    out, lse = _blocked(q, k, v, lengths, size)
    return (out, lse), (q, k, v, lengths, out, lse)


def _blocked_backward(
    size: int, residuals: tuple[Any, ...], gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    """The gradient as in FlashAttention-2 (arXiv 2307.08691, Algorithm 2).

    With the weights ``w = exp(q k^T - lse)`` and ``g`` the output's gradient, the scores' gradient
    is ``w * (g v^T - <g, out> + g_lse)``, the product ``<,>`` taken for each query.
    """
    q, k, v, lengths, out, lse = residuals
    g, g_lse = gradients
    shift = g_lse - jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)

    def head(arguments: tuple[Any, ...]) -> tuple[Array, Array, Array]:
        k, v, length, *of_queries = arguments

        def block(
            sums: tuple[Array, Array], of_block: Sequence[Array]
        ) -> tuple[tuple[Array, Array], Array]:
            q, g, lse, shift = of_block
            weights = jnp.exp(_scores(q, k, length) - lse)
            g_scores = (weights * (_product("nd,md->nm", g, v) + shift)).astype(q.dtype)
            # As [d m]: to transpose q and g is less work than to transpose the scores.
            g_k = sums[0] + _product("nd,nm->dm", q, g_scores)
            g_v = sums[1] + _product("nd,nm->dm", g, weights.astype(g.dtype))
            return (g_k, g_v), _product("nm,md->nd", g_scores, k)

        zeros = jnp.zeros(k.T.shape, jnp.float32)
        (g_k, g_v), g_q = jax.lax.scan(block, (zeros, zeros), [_cut(x, size) for x in of_queries])
        return g_q, g_k.T, g_v.T

    g_q, g_k, g_v = jax.lax.map(head, (k, v, lengths, q, g, lse, shift))
    return _glue(g_q).astype(q.dtype), g_k.astype(k.dtype), g_v.astype(v.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _cut(x: Array, size: int) -> Array:
    """``[n d]`` to blocks ``[n/size size d]``."""
    return x.reshape(-1, size, x.shape[-1])


def _glue(blocks: Tree) -> Tree:
    """Blocks ``[h n/size size d]`` to ``[h n d]``."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, x.shape[-1]), blocks)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
