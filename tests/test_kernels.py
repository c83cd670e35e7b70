"""Every device's attention against the plain one, which is held against the equation in NumPy.

A TPU's kernel runs in Pallas' interpreter. cuDNN's is not to be had without an NVIDIA GPU: its
calls are traced, as JAX would trace them there.
"""

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.lower import as_on
from bootpig_jax.kernels import (
    CUDNN,
    PLAIN,
    SERIAL,
    SPLASH,
    Kernels,
    compute_dtype,
    cuda_capability,
    kernels_for,
    plain,
    splash,
)
from bootpig_jax.training.flops import count_flops, equations

B, H, D = 2, 3, 16
RNG = np.random.default_rng(0)
HALF = jnp.bfloat16

Arrays = tuple[Any, Any, Any]


def arrays(queries: int, keys: int, dtype: Any = jnp.float32, width: int = D) -> Arrays:
    q, k, v = (RNG.standard_normal((B, n, H, width)) for n in (queries, keys, keys))
    return jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)


def equation(
    q: Any, k: Any, v: Any, lengths: Any = None, causal: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """``softmax(q k^T / sqrt(d)) v`` and the log-sum-exp, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, m = q.shape[1], k.shape[1]
    seen = np.ones((B, 1, n, m), bool)
    if lengths is not None:
        seen &= np.arange(m) < np.asarray(lengths)[:, None, None, None]
    if causal:
        seen &= np.arange(m) <= np.arange(n)[:, None]
    scores = np.where(seen, np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    top = scores.max(-1, keepdims=True)
    total = np.exp(scores - top).sum(-1, keepdims=True)
    out = np.einsum("bhnm,bmhd->bnhd", np.exp(scores - top) / total, v)
    return out, (top + np.log(total))[..., 0].swapaxes(1, 2)


def out_and_gradients(attend: Callable[..., Any], q: Any, k: Any, v: Any, weight: Any) -> Any:
    out, pull_back = jax.vjp(attend, q, k, v)
    return out, *pull_back(weight.astype(out.dtype))


MASKS = pytest.mark.parametrize(
    ("lengths", "causal"), [(None, False), ((77, 30), False), (None, True), ((60, 20), True)]
)


@MASKS
def test_plain_attention_is_the_equation(lengths: Any, causal: bool) -> None:
    q, k, v = arrays(75, 77)
    lengths = None if lengths is None else jnp.array(lengths)
    for kernels in (PLAIN, SERIAL):
        out = kernels.attend(q, k, v, lengths, causal=causal)
        np.testing.assert_allclose(out, equation(q, k, v, lengths, causal)[0], atol=2e-6)
        for found, wanted in zip(kernels.attend_with_lse(q, k, v), equation(q, k, v), strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-6)


@MASKS
def test_blocks_of_queries_change_nothing(
    lengths: Any, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last block is not full, and with one query in each."""
    q, k, v = arrays(75, 77)
    lengths = None if lengths is None else jnp.array(lengths)
    weight = jnp.asarray(RNG.standard_normal(q.shape), jnp.float32)

    def attend(kernels: Kernels) -> Any:
        return lambda *x: kernels.attend(*x, lengths, causal=causal)

    expected = out_and_gradients(attend(SERIAL), q, k, v, weight)
    monkeypatch.setattr(plain, "BLOCKED_FROM", 0)
    for scores in (plain.SCORES, 20 * B * H * 77, 1):
        monkeypatch.setattr(plain, "SCORES", scores)
        monkeypatch.setattr(plain, "SCORES_IN_CACHE", max(scores // (B * H), 1))
        for kernels in (PLAIN, SERIAL):
            found = out_and_gradients(attend(kernels), q, k, v, weight)
            for mine, other in zip(found, expected, strict=True):
                np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


def test_plain_attention_holds_the_scores_it_promises() -> None:
    """768 px, twelve rows of five heads: all scores at once would be 40 GB."""
    q, k = (jax.ShapeDtypeStruct((12, n, 5, 64), jnp.float32) for n in (9216, 18432))
    program = jax.make_jaxpr(lambda *x: out_and_gradients(PLAIN.attend, *x, x[0]))(q, k, k)
    sizes = [x.aval.size for e, _ in equations(program) for x in e.outvars]
    assert plain.SCORES // 2 < max(sizes) <= max(plain.SCORES, k.size)


@pytest.mark.parametrize("keys", [128, 77])
@MASKS
def test_a_tpus_attention_is_the_plain_one(lengths: Any, causal: bool, keys: int) -> None:
    """In bfloat16, whose rounding is 2^-9 at most: outputs and gradients within 1 %."""
    lengths = None if lengths is None else jnp.array(lengths)
    queries = keys if causal else 75
    q, k, v = arrays(queries, keys, HALF)
    weight = jnp.asarray(RNG.standard_normal(q.shape), jnp.float32)
    exact = [x.astype(jnp.float32) for x in (q, k, v)]

    def attend(function: Any) -> Any:
        return lambda *x: function(*x, lengths, causal=causal)

    kernel = functools.partial(splash.attend, interpret=True)
    found = out_and_gradients(attend(kernel), q, k, v, weight)
    expected = out_and_gradients(attend(PLAIN.attend), *exact, weight)
    for mine, other in zip(found, expected, strict=True):
        assert relative(mine, other) < 1e-2


def test_a_tpus_log_sum_exp_is_the_plain_one() -> None:
    q, k, v = arrays(75, 77, HALF)
    out, lse = splash.attend_with_lse(q, k, v, interpret=True)
    exact_out, exact_lse = equation(q, k, v)
    assert relative(out, exact_out) < 1e-2
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, exact_lse, atol=1e-5)


def relative(found: Any, exact: Any) -> float:
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("queries", [64, 75, 2025])
@pytest.mark.parametrize("keys", [64, 77, 2025])
@pytest.mark.parametrize("lengths", [False, True])
def test_cudnn_takes_odd_lengths_under_a_gradient(queries: int, keys: int, lengths: bool) -> None:
    """2025 are the latents of 360 px; JAX itself refuses odd numbers of queries and of keys."""
    q, k, v = (jax.ShapeDtypeStruct((B, n, H, 64), HALF) for n in (queries, keys, keys))
    length = jax.ShapeDtypeStruct((B,), jnp.int32) if lengths else None

    def gradient(q: Any, k: Any, v: Any, length: Any) -> Any:
        attended = lambda *x: CUDNN.attend(*x, length).astype(jnp.float32).sum()  # noqa: E731
        return CUDNN.attend(q, k, v, length), jax.grad(attended, (0, 1, 2))(q, k, v)

    with as_on("cuda"):
        program = jax.make_jaxpr(gradient)(q, k, v, length)
    assert calls(program) == {
        "dot_product_attention_fwd_wrapper": 2,
        "dot_product_attention_bwd_wrapper": 1,
    }
    assert [out.shape for out in program.out_avals] == [x.shape for x in (q, q, k, v)]
    masked = lengths or keys % 2
    masks = {str(e.params["mask_type"]) for e, _ in equations(program) if "mask_type" in e.params}
    assert masks == {"MaskType.PADDING" if masked else "MaskType.NO_MASK"}


def test_cudnn_reads_captions_causally_and_gives_the_log_sum_exp_in_float32() -> None:
    q, k, v = (jax.ShapeDtypeStruct((B, 77, H, 64), HALF) for _ in range(3))
    with as_on("cuda"):
        program = jax.make_jaxpr(functools.partial(CUDNN.attend, causal=True))(q, k, v)
        parts = jax.make_jaxpr(CUDNN.attend_with_lse)(q, k, v)
    (mask,) = (e.params["mask_type"] for e, _ in equations(program) if "mask_type" in e.params)
    assert str(mask) == "MaskType.CAUSAL"
    assert calls(parts) == {"dot_product_attention_fwd_wrapper": 1}
    assert [(x.shape, x.dtype) for x in parts.out_avals] == [
        (q.shape, HALF),
        ((B, 77, H), jnp.float32),
    ]


@pytest.mark.parametrize(
    ("kernels", "dtype", "width"),
    [
        (CUDNN, jnp.float32, 64),
        (CUDNN, HALF, 512),  # the VAE's
        (CUDNN, HALF, 36),
        (SPLASH, jnp.float32, 64),
        (SPLASH, jnp.float16, 64),
        (SPLASH, HALF, 512),
    ],
)
def test_what_a_kernel_does_not_take_is_attended_plainly(
    kernels: Kernels, dtype: Any, width: int
) -> None:
    q, k, v = arrays(9, 7, dtype, width)
    lengths = jnp.array([7, 3])
    np.testing.assert_array_equal(kernels.attend(q, k, v, lengths), PLAIN.attend(q, k, v, lengths))
    for found, expected in zip(
        kernels.attend_with_lse(q, k, v), PLAIN.attend_with_lse(q, k, v), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_every_backend_counts_the_same_flops() -> None:
    q, k = (jax.ShapeDtypeStruct((B, n, H, 64), HALF) for n in (1024, 2048))
    scores = B * H * 1024 * 2048 * 64 * 2

    def backward(kernels: Kernels) -> Any:
        return jax.grad(lambda *x: kernels.attend(*x).astype(jnp.float32).sum(), (0, 1, 2))

    for kernels in (SERIAL, PLAIN, CUDNN, SPLASH):
        with as_on("cuda" if kernels is CUDNN else "cpu"):
            assert count_flops(jax.make_jaxpr(kernels.attend)(q, k, k)) == 2 * scores
            assert count_flops(jax.make_jaxpr(kernels.attend_with_lse)(q, k, k)) == 2 * scores
            counted = count_flops(jax.make_jaxpr(backward(kernels))(q, k, k))
        # Splash sums the products of outputs and their gradients as a matrix product.
        assert counted == pytest.approx(6 * scores, rel=1e-4)


@pytest.mark.parametrize("width", [40, 64, 80, 128, 160])
def test_a_tpus_kernels_lower_with_their_gradients(width: int) -> None:
    q, k = (jax.ShapeDtypeStruct((B, n, H, width), HALF) for n in (300, 77))
    attended = jax.grad(lambda *x: SPLASH.attend(*x).astype(jnp.float32).sum(), (0, 1, 2))
    text = jax.jit(attended).trace(q, k, k).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 3


def device(platform: str, capability: str | None = None) -> Any:
    answers = {} if capability is None else {"compute_capability": capability}
    return types.SimpleNamespace(platform=platform, **answers)


@pytest.mark.parametrize(
    ("simulated", "kernels", "precision"),
    [
        (device("cpu"), SERIAL, "float32"),
        (device("gpu", "9.0"), CUDNN, "bfloat16"),
        (device("gpu", "8.0"), CUDNN, "bfloat16"),
        (device("gpu", "12.0"), CUDNN, "bfloat16"),
        (device("gpu", "7.5"), PLAIN, "float16"),  # a T4
        (device("gpu", "gfx942"), PLAIN, "bfloat16"),  # AMD's
        (device("tpu"), SPLASH, "bfloat16"),
        (device("METAL"), PLAIN, "bfloat16"),
    ],
)
def test_each_device_has_its_kernels(simulated: Any, kernels: Kernels, precision: str) -> None:
    assert kernels_for(simulated) is kernels
    assert compute_dtype("auto", simulated) == jnp.dtype(precision)
    assert compute_dtype("float32", simulated) == jnp.float32


def test_the_default_device_decides_where_none_is_named() -> None:
    assert kernels_for() is SERIAL
    with jax.default_device(jax.devices("cpu")[3]):
        assert kernels_for() is SERIAL
    assert cuda_capability(jax.devices()[0]) == (0, 0)


def calls(program: Any) -> dict[str, int]:
    names = [e.primitive.name for e, _ in equations(program)]
    return {n: names.count(n) for n in set(names) if n.startswith("dot_product_attention")}


def test_nothing_above_the_door_asks_which_device_it_is_on() -> None:
    """No platform's name, no gradient of our own, no choice while a program is traced."""
    package = Path(plain.__file__).parents[1]
    above = [package / "attention.py", package / "bootpig.py"]
    above += [path for room in ("models", "diffusion") for path in (package / room).glob("*.py")]
    assert len(above) > 10
    forbidden = ("default_backend", "custom_vjp", "platform", "devices(", '"gpu"', '"cpu"', '"tpu"')
    found = [(p.name, word) for p in above for word in forbidden if word in p.read_text()]
    assert found == []
