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

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bootpig_jax.kernels import PLAIN, Kernels
from bootpig_jax.kernels.precision import product_precision

Strategy = Literal["softmax", "concat", "average", "argmax"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    key_lengths: Int[Array, " b"] | None = None,
    *,
    causal: bool = False,
    kernels: Kernels = PLAIN,
) -> Float[Array, "b n h*d"]:
    """``softmax(q k^T / sqrt(d)) v``, the heads joined (Eq. 2 without ``Wo``).

    Args:
        q: queries.
        k: keys.
        v: values.
        key_lengths: for each sample, how many of the ``m`` keys count; all when ``None``.
        causal: whether query ``i`` sees the keys up to ``i`` only, as in CLIP's text encoder.
        kernels: how the device computes it, here as in every function below.
    """
    return _join_heads(kernels.attend(q, k, v, key_lengths, causal=causal))


def partial_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    *,
    kernels: Kernels = PLAIN,
) -> "Partial":
    """Attention to a part of the keys; `merge` joins such parts.

    For sampling only: some kernels drop the gradient of the log-sum-exp, so there is none here.
    """
    out, lse = kernels.attend_with_lse(q, k, v)
    return Partial(_without_gradient(out.astype(jnp.float32)), _without_gradient(lse))


def _join_heads(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], -1)


class Partial(NamedTuple):
    """Attention to a part of the keys, in float32.

    Attributes:
        out: the values' sum, weighted by the softmax over this part.
        lse: the logarithm of that softmax's denominator.
    """

    out: Float[Array, "*b n h d"]
    lse: Float[Array, "*b n h"]


def merge(*parts: Partial) -> Float[Array, "*b n c"]:
    """Attention to the keys of all `parts` together, the heads joined.

    The softmax over all keys weighs each part by its share of the common denominator, which is the
    softmax of the parts' log-sum-exps.
    """
    shares = jax.nn.softmax(jnp.stack([part.lse for part in parts]), axis=0)
    outs = (share[..., None] * part.out for share, part in zip(shares, parts, strict=True))
    return _join_heads(functools.reduce(jnp.add, outs))


@jax.custom_jvp
def _without_gradient(x: Array) -> Array:
    return x


@_without_gradient.defjvp
def _refuse(*_: Any) -> Any:
    raise NotImplementedError("partial attention has no gradient; use `attention`")


def reference_self_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    k_ref: Float[Array, "b m h d"],
    v_ref: Float[Array, "b m h d"],
    keep: Bool[Array, " b"] | None = None,
    *,
    kernels: Kernels = PLAIN,
) -> Float[Array, "b n h*d"]:
    """RSA, Eq. 3 without ``Wo``: keys and values of ``[f ; f_ref]``, joined along the tokens."""
    n, m = k.shape[1], k_ref.shape[1]
    key_lengths = None if keep is None else jnp.where(keep, n + m, n)
    return attention(
        q,
        jnp.concatenate([k, k_ref], axis=1),
        jnp.concatenate([v, v_ref], axis=1),
        key_lengths,
        kernels=kernels,
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
    *,
    kernels: Kernels = PLAIN,
) -> Float[Array, "b n c"]:
    """RSA with ``K`` references, pooled by ``strategy``.

    ``concat`` joins all references' tokens in one sequence. The others compute one output per
    reference, ``o_i = RSA(f, f_i)``, and pool these with ``o = RSA(f, f) = SA(f)``; see `pool`.
    One reference needs no pooling: ``o + 1 * (o_1 - o)`` is plain RSA.

    Returns:
        The layer's output, after ``Wo``.
    """
    batch, count, m = k_refs.shape[:3]

    def rsa(k_ref: Array, v_ref: Array) -> Array:
        return reference_self_attention(q, k, v, k_ref, v_ref, keep, kernels=kernels)

    if strategy == "concat" or count == 1:
        joined = (batch, count * m, *k_refs.shape[3:])
        return project_out(rsa(k_refs.reshape(joined), v_refs.reshape(joined)))
    o = project_out(attention(q, k, v, kernels=kernels))
    o_refs = jax.vmap(lambda k_ref, v_ref: project_out(rsa(k_ref, v_ref)), in_axes=1, out_axes=1)(
        k_refs, v_refs
    )
    return pool(o, o_refs, strategy)


def attend_to_shared_references(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    k_refs: Float[Array, "s K m h d"],
    v_refs: Float[Array, "s K m h d"],
    project_out: Callable[[Array], Array],
    strategy: Strategy,
    *,
    plain: int,
    seeing: int,
    kernels: Kernels = PLAIN,
) -> Float[Array, "p n c"]:
    """The same numbers as `attend_to_references`, for sampling: no part of them computed twice.

    The first `plain` rows come out as self-attention leaves them; after them come the last `seeing`
    rows with references, those that share one of the ``s`` sets next to each other. A row can be
    both.

    ``RSA(f, f) = SA(f)``: Eq. 5 needs no more than the attention of the tokens to themselves, and
    Eq. 3 that, merged with the attention to the reference. So self-attention is computed once for
    all ``K`` references, and the rows that share a set attend to it as if they were one sample with
    more queries.

    Returns:
        The layer's output, after ``Wo``, of ``plain + seeing`` rows.
    """
    sets, count = k_refs.shape[:2]

    def seen(x: Array) -> Array:
        return x[len(x) - seeing :].reshape(sets, -1, *x.shape[2:])

    own = partial_attention(q, k, v, kernels=kernels)
    own_seen = Partial(*map(seen, own))
    parts = [
        partial_attention(seen(q), k_refs[:, i], v_refs[:, i], kernels=kernels)
        for i in range(count)
    ]

    def output(attended: Array) -> Array:
        return project_out(attended.astype(k.dtype).reshape(-1, *k.shape[1:-2], attended.shape[-1]))

    if strategy == "concat":
        merged = [merge(own_seen, *parts)]
    else:
        merged = [merge(own_seen, part) for part in parts]
    if strategy == "average":  # Wo is linear, so the mean can be taken before it
        merged = [functools.reduce(jnp.add, merged) / len(merged)]
    o_refs = [output(attended) for attended in merged]
    if len(o_refs) == 1:
        (pooled,) = o_refs
    else:
        pooled = pool(output(merge(own_seen)), jnp.stack(o_refs, axis=1), strategy)
    return jnp.concatenate([output(merge(own)[:plain]), pooled])


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
    precision = product_precision(o.dtype)
    pooled = jnp.einsum("bkn,bknc->bnc", weights.astype(o.dtype), difference, precision=precision)
    return o + pooled


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
        scores = jnp.einsum(
            "nhd,mhd->hnm",
            q,
            joined,
            precision=product_precision(q.dtype),
            preferred_element_type=jnp.float32,
        )
        weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]), axis=-1)
        return jnp.mean(jnp.sum(weights[..., len(k) :], axis=-1))

    # One after the other: all scores of a batch at once would not fit.
    return jax.lax.map(of_sample, (q, k, k_ref))
