"""Attention in plain JAX: exact, of bounded memory, and the oracle of the kernels beside it.

From a size on it works in blocks of queries. A block's scores are never kept: the backward pass
computes them again from the queries, the keys and the log-sum-exp, as FlashAttention does. So it
takes the memory that a fused kernel takes: `attend` holds at most `SCORES` scores at a time,
256 MiB, and about four times that in the backward pass.

`attend_serially` is for a CPU, where what counts is the cache: one head after the other, and few
enough scores to stay there (`python -m benchmarks.layers` compares with PyTorch's kernel).

Below, ``q`` are queries divided by ``sqrt(d)``, and ``limits`` say for each query how many keys it
sees. The axes are groups, which go one after the other, heads, queries or keys, and channels.
"""

import functools
import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bootpig_jax.kernels.precision import product_precision

SCORES = 2**26
SCORES_IN_CACHE = 2**21
# With fewer scores a CPU keeps them for the backward pass: to compute them again takes longer.
BLOCKED_FROM = 2**20

# The names, in a program, of the functions below: who counts its work reads them.
PLAIN_ATTENTION = "plain_attention"
SCORES_AGAIN = "scores_again"

Tree = TypeVar("Tree")


def attend(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    key_lengths: Int[Array, " b"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "b n h d"]:
    """Attention of all rows and heads at once; see `kernels.Attend`."""
    return _at_once(q, k, v, _limits(q, key_lengths, causal))[0]


def attend_with_lse(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
    """The same, and the logarithm of the softmax's denominator."""
    return _at_once(q, k, v, None)


def attend_serially(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    key_lengths: Int[Array, " b"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "b n h d"]:
    """Attention of one head after the other; see `kernels.Attend`."""
    return _serially(q, k, v, _limits(q, key_lengths, causal))[0]


def attend_serially_with_lse(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
    """The same, and the logarithm of the softmax's denominator."""
    return _serially(q, k, v, None)


def _limits(q: Array, key_lengths: Array | None, causal: bool) -> Array | None:
    """How many keys each query sees, ``[b n]``; all when ``None``."""
    b, n = q.shape[:2]
    limits = None if key_lengths is None else jnp.broadcast_to(key_lengths[:, None], (b, n))
    if not causal:
        return limits
    own = jnp.broadcast_to(jnp.arange(1, n + 1), (b, n))
    return own if limits is None else jnp.minimum(own, limits)


def _at_once(q: Array, k: Array, v: Array, limits: Array | None) -> tuple[Array, Array]:
    b, _, h, _ = q.shape
    return plain_attention(q, k, v, limits, (1, b * h), SCORES)


def _serially(q: Array, k: Array, v: Array, limits: Array | None) -> tuple[Array, Array]:
    b, n, h, _ = q.shape
    if n * k.shape[1] >= BLOCKED_FROM:
        return plain_attention(q, k, v, limits, (b * h, 1), SCORES_IN_CACHE)
    q, k, v = (x.swapaxes(1, 2) for x in (_scaled(q), k, v))
    out, lse = _attend(q, k, v, None if limits is None else limits[:, None, :, None])
    return out.swapaxes(1, 2), lse[..., 0].swapaxes(1, 2)


# A program of its own within a larger one, so that layers of the same shapes are traced once, and
# so that it is seen there by its name.
@functools.partial(jax.jit, static_argnames=("groups", "scores"))
def plain_attention(
    q: Array, k: Array, v: Array, limits: Array | None, groups: tuple[int, int], scores: int
) -> tuple[Array, Array]:
    """Attention ``[b n h d]`` and its log-sum-exp ``[b n h]``, at most `scores` scores at a time.

    Args:
        q: queries ``[b n h d]``, not scaled.
        k: keys.
        v: values.
        limits: how many keys each query sees, ``[b n]``.
        groups: how many groups of how many heads the ``b * h`` heads are.
        scores: the bound, but for a block of one query.
    """
    b, n, h, d = q.shape
    blocks = -(-n // max(1, scores // (groups[1] * k.shape[1])))
    size = -(-n // blocks)
    pad = blocks * size - n

    def grouped(x: Array) -> Array:
        return x.swapaxes(1, 2).reshape(*groups, x.shape[1], x.shape[-1])

    queries = jnp.pad(_scaled(q), ((0, 0), (0, pad), (0, 0), (0, 0)))
    if limits is not None:
        # What pads sees a key too: without any its softmax would be 0 / 0.
        limits = jnp.pad(limits, ((0, 0), (0, pad)), mode="edge")
        limits = grouped(jnp.broadcast_to(limits[:, :, None, None], (*limits.shape, h, 1)))
    out, lse = _blocked(grouped(queries), grouped(k), grouped(v), limits, size)
    out, lse = (x.reshape(b, h, n + pad, -1)[:, :, :n].swapaxes(1, 2) for x in (out, lse))
    return out, lse[..., 0]


def _scaled(q: Array) -> Array:
    return q / math.sqrt(q.shape[-1])


def _attend(q: Array, k: Array, v: Array, limits: Array | None) -> tuple[Array, Array]:
    """Attention ``[.. n d]`` of scaled queries, and its log-sum-exp ``[.. n 1]``."""
    scores = _scores(q, k, limits)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    exponentials = jnp.exp(scores - top)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    out = _product("...nm,...md->...nd", exponentials.astype(v.dtype), v)
    # Divided last: the outputs are fewer than the scores.
    return (out / total).astype(v.dtype), top + jnp.log(total)


def _scores(q: Array, k: Array, limits: Array | None) -> Array:
    scores = _product("...nd,...md->...nm", q, k)
    if limits is None:
        return scores
    return jnp.where(jnp.arange(k.shape[-2]) < limits, scores, -jnp.inf)


@jax.jit
def scores_again(q: Array, k: Array, limits: Array | None) -> Array:
    """The scores in the backward pass, which computes them a second time."""
    return _scores(q, k, limits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(q: Array, k: Array, v: Array, limits: Array | None, size: int) -> tuple[Array, Array]:
    """`_attend` for ``[g h n d]``, one group and one block of `size` queries after the other."""

    def group(arguments: tuple[Array, Array, Array, Array | None]) -> tuple[Array, Array]:
        q, k, v, limits = arguments
        blocks = jax.lax.map(lambda of: _attend(of[0], k, v, of[1]), _cut((q, limits), size))
        return _glue(blocks)

    return jax.lax.map(group, (q, k, v, limits))


def _blocked_forward(
    q: Array, k: Array, v: Array, limits: Array | None, size: int
) -> tuple[tuple[Array, Array], tuple[Array | None, ...]]:
    out, lse = _blocked(q, k, v, limits, size)
    return (out, lse), (q, k, v, limits, out, lse)


def _blocked_backward(
    size: int, residuals: tuple[Array, ...], gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    """The gradient as in FlashAttention-2 (arXiv 2307.08691, Algorithm 2).

    With the weights ``w = exp(q k^T - lse)`` and ``g`` the output's gradient, the scores' gradient
    is ``w * (g v^T - <g, out> + g_lse)``, the product ``<,>`` taken for each query.
    """
    q, k, v, limits, out, lse = residuals
    g, g_lse = gradients
    shift = g_lse - jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)

    def group(arguments: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        k, v, *of_queries = arguments

        def block(
            sums: tuple[Array, Array], of_block: Sequence[Array]
        ) -> tuple[tuple[Array, Array], Array]:
            q, g, lse, shift, limits = of_block
            weights = jnp.exp(scores_again(q, k, limits) - lse)
            g_scores = (weights * (_product("hnd,hmd->hnm", g, v) + shift)).astype(q.dtype)
            # As [d m]: to transpose q and g is less work than to transpose the scores.
            g_k = sums[0] + _product("hnd,hnm->hdm", q, g_scores)
            g_v = sums[1] + _product("hnd,hnm->hdm", g, weights.astype(g.dtype))
            return (g_k, g_v), _product("hnm,hmd->hnd", g_scores, k)

        zeros = jnp.zeros(k.mT.shape, jnp.float32)
        (g_k, g_v), g_q = jax.lax.scan(block, (zeros, zeros), _cut(of_queries, size))
        return _glue(g_q), g_k.mT, g_v.mT

    g_q, g_k, g_v = jax.lax.map(group, (k, v, q, g, lse, shift, limits))
    return g_q.astype(q.dtype), g_k.astype(k.dtype), g_v.astype(v.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _cut(arrays: Tree, size: int) -> Tree:
    """``[h n d]`` to blocks ``[n/size h size d]``."""
    return jax.tree.map(lambda x: x.reshape(len(x), -1, size, x.shape[-1]).swapaxes(0, 1), arrays)


def _glue(blocks: Tree) -> Tree:
    """Blocks ``[n/size h size d]`` to ``[h n d]``."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[-1]), blocks)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(
        subscripts,
        a,
        b,
        precision=product_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )
