"""Attention over the target's tokens and the references' tokens: Eq. 2, 3 and 5-8 of the paper.

Everything here is a pure function of arrays. ``q``, ``k`` and ``v`` are the projections of the
Base UNet's feature ``f``; ``k_refs`` and ``v_refs`` those of ``K`` reference features, made with
the same matrices. ``project_out`` is the layer's ``Wo``; it is an argument because the pooling of
several references (Eq. 6) measures distances *after* it.

The paper leaves out the factor ``1/sqrt(d)`` and the heads, which Stable Diffusion has; so do we
in the names and not in the code.

Dropping a sample's references (``keep[b] = False``) shortens its key sequence to the self part.
The result is then ordinary self-attention, exactly, and no gradient reaches the references.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Strategy = Literal["softmax", "concat", "average", "argmax"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)

# On a CPU: from how many scores on attention works in blocks, and how many queries a block has.
BLOCKED_FROM = 2**20
QUERY_BLOCK = 512


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    key_lengths: Int[Array, " b"] | None = None,
) -> Float[Array, "b n h*d"]:
    """``softmax(q k^T / sqrt(d)) v``, the heads joined (Eq. 2 without ``Wo``).

    Args:
        q: queries.
        k: keys.
        v: values.
        key_lengths: for each sample, how many of the ``m`` keys count; all when ``None``.
    """
    if jax.default_backend() == "cpu":
        large = q.shape[1] * k.shape[1] >= BLOCKED_FROM and q.shape[1] % QUERY_BLOCK == 0
        out = (_blocked if large else _heads_first)(q, k, v, key_lengths)
    else:
        # cuDNN has to be asked for: None means XLA's own attention, also on a GPU.
        fused = (
            jax.default_backend() == "gpu"
            and q.dtype in (jnp.bfloat16, jnp.float16)
            and q.shape[-1] % 8 == 0
            and q.shape[-1] <= 128
        )
        out = jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=key_lengths, implementation="cudnn" if fused else "xla"
        )
    return out.reshape(*out.shape[:2], -1)


def _heads_first(q: Array, k: Array, v: Array, key_lengths: Array | None) -> Array:
    """`jax.nn.dot_product_attention` with the heads moved to the front: twice as fast on a CPU."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(q.shape[-1])
    if key_lengths is not None:
        counts = jnp.arange(k.shape[2]) < key_lengths[:, None]
        scores = jnp.where(counts[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bhmd->bhnd", weights, v).swapaxes(1, 2)


def _blocked(q: Array, k: Array, v: Array, key_lengths: Array | None) -> Array:
    """The same, one head and one block of queries after the other.

    The scores of a block stay in the cache, and no more than that is ever in memory: the backward
    pass computes them again. So its memory is also what a fused attention takes on a GPU.
    """
    b, n, h, d = q.shape
    lengths = jnp.full(b, k.shape[1]) if key_lengths is None else key_lengths

    @jax.checkpoint
    def block(q: Array, k: Array, v: Array, length: Array) -> Array:
        scores = jnp.einsum("nd,md->nm", q, k, preferred_element_type=jnp.float32) / math.sqrt(d)
        scores = jnp.where(jnp.arange(len(k)) < length, scores, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v

    def head(arguments: tuple[Array, Array, Array, Array]) -> Array:
        q, k, v, length = arguments
        blocks = q.reshape(-1, QUERY_BLOCK, d)
        return jax.lax.map(lambda q: block(q, k, v, length), blocks).reshape(n, d)

    q, k, v = (x.swapaxes(1, 2).reshape(b * h, -1, d) for x in (q, k, v))
    out = jax.lax.map(head, (q, k, v, jnp.repeat(lengths, h)))
    return out.reshape(b, h, n, d).swapaxes(1, 2)


def reference_self_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    k_ref: Float[Array, "b m h d"],
    v_ref: Float[Array, "b m h d"],
    keep: Bool[Array, " b"] | None = None,
) -> Float[Array, "b n h*d"]:
    """RSA, Eq. 3 without ``Wo``: keys and values of ``[f ; f_ref]``, joined along the tokens."""
    n, m = k.shape[1], k_ref.shape[1]
    key_lengths = None if keep is None else jnp.where(keep, n + m, n)
    return attention(
        q,
        jnp.concatenate([k, k_ref], axis=1),
        jnp.concatenate([v, v_ref], axis=1),
        key_lengths,
    )


def attend_to_references(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    k_refs: Float[Array, "b K m h d"],
    v_refs: Float[Array, "b K m h d"],
    project_out: Callable[[Array], Array],
    strategy: Strategy,
    keep: Bool[Array, " b"] | None = None,
) -> Float[Array, "b n c"]:
    """RSA with ``K`` references, pooled by ``strategy``.

    ``concat`` joins all references' tokens in one sequence. The others compute one output per
    reference, ``o_i = RSA(f, f_i)``, and pool these with ``o = RSA(f, f) = SA(f)``; see `pool`.
    One reference needs no pooling: ``o + 1 * (o_1 - o)`` is plain RSA.

    Returns:
        The layer's output, after ``Wo``.
    """
    batch, count, m = k_refs.shape[:3]
    if strategy == "concat" or count == 1:
        joined = (batch, count * m, *k_refs.shape[3:])
        k_ref, v_ref = k_refs.reshape(joined), v_refs.reshape(joined)
        return project_out(reference_self_attention(q, k, v, k_ref, v_ref, keep))
    o = project_out(attention(q, k, v))
    o_refs = jax.vmap(
        lambda k_ref, v_ref: project_out(reference_self_attention(q, k, v, k_ref, v_ref, keep)),
        in_axes=1,
        out_axes=1,
    )(k_refs, v_refs)
    return pool(o, o_refs, strategy)


def pool(
    o: Float[Array, "b n c"], o_refs: Float[Array, "b K n c"], strategy: Strategy
) -> Float[Array, "b n c"]:
    """Pools the outputs of ``K`` references, token by token (Eq. 5-8 and Fig. 6).

    ``n_i = |o_i - o|`` (Eq. 6), ``p = softmax(n_1 ... n_K)`` (Eq. 7) and
    ``o + sum_i p_i (o_i - o)`` (Eq. 8) for ``softmax``. ``average`` takes ``p_i = 1/K``;
    ``argmax``, the authors' release, takes the reference with the largest ``n_i`` alone.

    Args:
        o: the output without a reference, ``RSA(f, f)`` (Eq. 5).
        o_refs: the outputs with each reference.
        strategy: how to weigh them; ``concat`` pools nothing and is refused.

    Raises:
        ValueError: for any other strategy.
    """
    difference = o_refs - o[:, None]
    square = jnp.sum(jnp.square(difference.astype(jnp.float32)), axis=-1)
    # A dropped reference can have o_i = o exactly, where the root's derivative is infinite.
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    match strategy:
        case "softmax":
            weights = jax.nn.softmax(norm, axis=1)
        case "average":
            weights = jnp.full_like(norm, 1 / norm.shape[1])
        case "argmax":
            weights = jax.nn.one_hot(jnp.argmax(norm, axis=1), norm.shape[1], axis=1)
        case _:
            raise ValueError(f"strategy {strategy!r} pools nothing")
    return o + jnp.einsum("bkn,bknc->bnc", weights.astype(o.dtype), difference)


def reference_share(
    q: Float[Array, "b n h d"], k: Float[Array, "b n h d"], k_ref: Float[Array, "b m h d"]
) -> Float[Array, " b"]:
    """How much of the attention of RSA (Eq. 3) goes to the reference.

    Args:
        q: queries.
        k: keys of the own tokens.
        k_ref: keys of one reference's tokens.

    Returns:
        The weights of the reference's tokens summed, in [0, 1], averaged over heads and queries.
    """

    def of_sample(keys: tuple[Array, Array, Array]) -> Array:
        q, k, k_ref = keys
        joined = jnp.concatenate([k, k_ref])
        scores = jnp.einsum("nhd,mhd->hnm", q, joined, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]), axis=-1)
        return jnp.mean(jnp.sum(weights[..., len(k) :], axis=-1))

    # One after the other: all scores of a batch at once would not fit.
    return jax.lax.map(of_sample, (q, k, k_ref))
