"""Properties of Eq. 2, 3 and 5-8 as pure functions, and the equations written out in NumPy."""

import functools
import itertools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bootpig_jax.attention import (
    STRATEGIES,
    Strategy,
    attend_to_references,
    attend_to_shared_references,
    attention,
    merge,
    partial_attention,
    pool,
    reference_self_attention,
    reference_share,
)
from bootpig_jax.kernels import PLAIN, SERIAL, Kernels

B, K, N, M, H, D = 3, 3, 10, 7, 2, 8
C = H * D
KEEP, ALL = np.array([True, False, True]), np.ones(B, bool)
RNG = np.random.default_rng(0)
Q, KEY, V = RNG.standard_normal((3, B, N, H, D), np.float32)
K_REFS, V_REFS = RNG.standard_normal((2, B, K, M, H, D), np.float32)
# Not the identity, so that a norm taken before Wo shows; wide, so that the softmax is not flat.
WO = RNG.standard_normal((C, C), np.float32) / 2
WEIGHT = RNG.standard_normal((B, N, C), np.float32)  # of the sum that gradients are taken of
BIAS = RNG.standard_normal(C, np.float32)


def project_out(x: Any) -> Any:
    return x @ WO + BIAS


@functools.partial(jax.jit, static_argnames="strategy")
def layer(*arrays: jax.Array, strategy: Strategy, keep: jax.Array | None) -> jax.Array:
    return attend_to_references(*arrays, project_out, strategy, keep)


def run(
    k_refs: np.ndarray = K_REFS,
    v_refs: np.ndarray = V_REFS,
    strategy: Strategy = "softmax",
    keep: np.ndarray | None = ALL,
) -> np.ndarray:
    return np.asarray(layer(Q, KEY, V, k_refs, v_refs, strategy=strategy, keep=keep))


@jax.jit
def stock(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return project_out(attention(q, k, v))


@jax.jit
def stock_gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return jax.grad(lambda *x: jnp.sum(WEIGHT * stock(*x)), argnums=(0, 1, 2))(*arrays)


@jax.jit
def rsa(*arrays: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    return project_out(reference_self_attention(*arrays, keep))


def close(ours: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    error = np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max()
    return bool(error <= tolerance)


# The equations, for one sample, in float64.


def eq2(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) v, one head and one query after the other."""
    out = np.empty((len(q), H, v.shape[-1]))
    for token, head in itertools.product(range(len(q)), range(H)):
        scores = np.exp(k[:, head] @ q[token, head] / np.sqrt(q.shape[-1]))
        out[token, head] = scores / scores.sum() @ v[:, head]
    return out.reshape(len(q), -1)


def eq3(q: np.ndarray, k: np.ndarray, v: np.ndarray, *refs: Any) -> np.ndarray:
    """Keys and values of [f ; f_ref]; each of `refs` is (its keys, its values)."""
    keys = np.concatenate([k, *(k_ref for k_ref, _ in refs)])
    values = np.concatenate([v, *(v_ref for _, v_ref in refs)])
    return project_out(eq2(q, keys, values))


def eq5_to_8(strategy: str, sample: int) -> np.ndarray:
    q, k, v, k_refs, v_refs = (x[sample].astype(float) for x in (Q, KEY, V, K_REFS, V_REFS))
    refs = list(zip(k_refs, v_refs, strict=True))
    if strategy == "concat":
        return eq3(q, k, v, *refs)
    o = eq3(q, k, v, (k, v))
    o_i = [eq3(q, k, v, ref) for ref in refs]
    if strategy == "average":
        return sum(o_i) / K
    pooled = np.empty_like(o)
    for token in range(N):
        n = np.array([np.linalg.norm(o_ref[token] - o[token]) for o_ref in o_i])
        if strategy == "argmax":
            pooled[token] = o_i[int(n.argmax())][token]
        else:
            p = np.exp(n) / np.exp(n).sum()
            pooled[token] = o[token] + sum(p[i] * (o_i[i][token] - o[token]) for i in range(K))
    return pooled


def test_strategies_are_the_papers_and_the_releases() -> None:
    assert STRATEGIES == get_args(Strategy) == ("softmax", "concat", "average", "argmax")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_is_its_equation(strategy: Strategy) -> None:
    ours = run(strategy=strategy, keep=KEEP)
    everywhere = run(strategy=strategy)
    for sample in range(B):
        expected = eq5_to_8(strategy, sample)
        plain = project_out(eq2(*(x[sample].astype(float) for x in (Q, KEY, V))))
        assert not close(expected, plain, 0.1)
        assert close(everywhere[sample], expected)
        assert close(ours[sample], expected if KEEP[sample] else plain)


@pytest.mark.parametrize("key_lengths", [None, np.array([N, 1, 4], np.int32)])
def test_attention_is_jaxs(key_lengths: np.ndarray | None) -> None:
    expected = jax.jit(jax.nn.dot_product_attention)(
        Q, KEY, V, key_value_seq_lengths=key_lengths
    ).reshape(B, N, C)
    assert close(jax.jit(attention)(Q, KEY, V, key_lengths), expected, 1e-6)


def test_without_references_it_is_stock_attention() -> None:
    expected = stock(Q, KEY, V)
    dropped = ~ALL
    nothing = run(K_REFS[:, :, :0], V_REFS[:, :, :0], "concat", keep=None)
    np.testing.assert_array_equal(nothing, expected)
    for strategy in STRATEGIES:
        ours = run(strategy=strategy, keep=dropped)
        assert close(ours, expected, 1e-6)
        # What the dropped references hold leaves no trace, to the last bit.
        other = run(7 * K_REFS + 1, V_REFS[::-1], strategy, dropped)
        np.testing.assert_array_equal(ours, other)


def test_a_dropped_reference_changes_no_other_sample() -> None:
    one = run(K_REFS[:, :1], V_REFS[:, :1], keep=KEEP)
    all_kept = run(K_REFS[:, :1], V_REFS[:, :1], keep=ALL)
    np.testing.assert_array_equal(one[KEEP], all_kept[KEEP])
    assert not close(one[~KEEP], all_kept[~KEEP], 0.1)


def test_rsa_of_a_feature_with_itself_is_sa() -> None:
    """Doubled keys and values double the softmax's numerator and denominator."""
    sa = stock(Q, KEY, V)
    assert close(rsa(Q, KEY, V, KEY, V), sa, 1e-6)
    for strategy in STRATEGIES:
        copies = run(*(np.repeat(x[:, None], K, 1) for x in (KEY, V)), strategy)
        assert close(copies, sa, 2e-6)


@pytest.mark.parametrize("keep", [None, KEEP])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_reference_needs_no_pooling(strategy: Strategy, keep: np.ndarray | None) -> None:
    expected = rsa(Q, KEY, V, K_REFS[:, 0], V_REFS[:, 0], keep=keep)
    ours = run(K_REFS[:, :1], V_REFS[:, :1], strategy, keep)
    np.testing.assert_array_equal(ours, expected)
    if strategy != "concat":
        pooled = jax.jit(pool, static_argnums=2)(stock(Q, KEY, V), expected[:, None], strategy)
        assert close(pooled, expected, 2e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_of_references_does_not_matter(strategy: Strategy) -> None:
    order = np.array([2, 0, 1])
    shuffled = run(K_REFS[:, order], V_REFS[:, order], strategy)
    assert close(shuffled, run(strategy=strategy), 2e-6)


@pytest.mark.parametrize(
    ("strategy", "count"), [("softmax", 1), *((strategy, K) for strategy in STRATEGIES)]
)
def test_no_gradient_reaches_dropped_references(strategy: Strategy, count: int) -> None:
    def loss(*arrays: jax.Array) -> jax.Array:
        keep = jnp.asarray(KEEP)
        return jnp.sum(WEIGHT * attend_to_references(*arrays, project_out, strategy, keep))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))
    arrays = (Q, KEY, V, K_REFS[:, :count], V_REFS[:, :count])
    *own, to_keys, to_values = map(np.asarray, gradients(*arrays))
    for gradient in (to_keys, to_values):
        assert not gradient[~KEEP].any()
        assert np.abs(gradient[KEEP]).max() > 0
    for gradient, expected in zip(own, stock_gradients(Q, KEY, V), strict=True):
        assert np.isfinite(gradient).all()
        assert close(gradient[~KEEP], np.asarray(expected)[~KEEP])


def test_a_reference_equal_to_the_target_leaves_finite_gradients() -> None:
    """The norm of Eq. 6 has no derivative where o_i = o."""
    o = jnp.asarray(RNG.standard_normal((B, N, C), np.float32))
    gradient = jax.jit(jax.grad(lambda o: pool(o, jnp.stack([o, o], 1), "softmax").sum()))(o)
    np.testing.assert_allclose(gradient, 1.0, rtol=1e-6)


def test_pool_refuses_what_pools_nothing() -> None:
    o = stock(Q, KEY, V)
    with pytest.raises(ValueError, match="'concat' pools nothing"):
        jax.eval_shape(lambda o: pool(o, o[:, None], "concat"), o)


@pytest.mark.parametrize("kernels", [PLAIN, SERIAL], ids=lambda kernels: kernels.name)
def test_parts_of_the_keys_merge_to_attention_over_all(kernels: Kernels) -> None:
    @jax.jit
    def merged(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        slices = (np.s_[:, :3], np.s_[:, 3:8], np.s_[:, 8:])
        parts = (partial_attention(q, k[part], v[part], kernels=kernels) for part in slices)
        return project_out(merge(*parts))

    assert close(merged(Q, KEY, V), stock(Q, KEY, V), 1e-6)


@functools.partial(jax.jit, static_argnames=("strategy", "plain", "seeing"))
def shared_layer(
    *arrays: jax.Array, strategy: Strategy, plain: int, seeing: int
) -> tuple[jax.Array, jax.Array]:
    *own, k_refs, v_refs = arrays
    ours = attend_to_shared_references(
        *own, k_refs, v_refs, project_out, strategy, plain=plain, seeing=seeing
    )
    last = [x[-seeing:] for x in own]
    each = [jnp.repeat(x, seeing // len(x), axis=0) for x in (k_refs, v_refs)]
    seen = attend_to_references(*last, *each, project_out, strategy)
    return ours, jnp.concatenate([project_out(attention(*own))[:plain], seen])


@pytest.mark.parametrize(
    ("strategy", "count"), [("softmax", 1), *((strategy, K) for strategy in STRATEGIES)]
)
def test_shared_references_give_the_same_numbers(strategy: Strategy, count: int) -> None:
    """Two sets for the last four of six rows, or for both of two rows, which come out twice."""
    own = [np.concatenate([x, x[::-1] / 2]) for x in (Q, KEY, V)]
    refs = [x[:2, :count] for x in (K_REFS, V_REFS)]
    for rows, plain, seeing in ((6, 2, 4), (2, 2, 2)):
        ours, expected = shared_layer(
            *(x[:rows] for x in own), *refs, strategy=strategy, plain=plain, seeing=seeing
        )
        assert ours.shape == (plain + seeing, N, C)
        assert close(ours, np.asarray(expected))


def test_shared_references_have_no_gradient_rather_than_a_wrong_one() -> None:
    def loss(*arrays: jax.Array) -> jax.Array:
        ours = attend_to_shared_references(*arrays, project_out, "softmax", plain=0, seeing=B)
        return jnp.sum(ours)

    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.eval_shape(jax.grad(loss), Q, KEY, V, K_REFS[:1], V_REFS[:1])


def test_reference_share_is_the_weight_of_the_references_keys():
    q, k, k_ref = (jnp.asarray(x) for x in (Q, KEY, K_REFS[:, 0]))
    share = reference_share(q, k, k_ref)
    for b in range(B):
        keys = np.concatenate([KEY[b], K_REFS[b, 0]])
        scores = np.exp(np.einsum("nhd,mhd->hnm", Q[b], keys) / np.sqrt(D))
        expected = scores[..., N:].sum(-1) / scores.sum(-1)
        np.testing.assert_allclose(share[b], expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(reference_share(q, k, k), 0.5, rtol=1e-6)
