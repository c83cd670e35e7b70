"""Pooling does not depend on the references' order, nor merging on how the keys are split."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.properties  # noqa: F401 - its profile
from bootpig_jax.attention import (
    STRATEGIES,
    attend_to_references,
    attend_to_shared_references,
    attention,
    merge,
    partial_attention,
)

ROWS, TOKENS, HEADS, WIDTH, COUNT = 2, 3, 2, 4, 4
SEEDS = st.integers(0, 2**32 - 1)
# From attention that is nearly even to attention that is nearly one key's.
SCALES = st.sampled_from([0.0, 0.01, 1.0, 30.0])


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def project_out(x: Any) -> Any:
    """A layer's Wo; not the identity, because pooling takes place after it."""
    return x @ normal(np.random.default_rng(0), HEADS * WIDTH, HEADS * WIDTH)


@functools.partial(jax.jit, static_argnames="strategy")
def both(q: Any, k: Any, v: Any, k_refs: Any, v_refs: Any, strategy: Any) -> tuple[Any, Any]:
    """The layer as training computes it and as sampling does."""
    arguments = (q, k, v, k_refs, v_refs, project_out, strategy)
    return (
        attend_to_references(*arguments),
        attend_to_shared_references(*arguments, plain=0, seeing=ROWS),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=40)
@given(SEEDS, SCALES, st.permutations(range(COUNT)), st.lists(st.booleans(), min_size=COUNT))
def test_the_order_of_references(
    strategy: str, seed: int, scale: float, order: list[int], repeated: list[bool]
) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = (normal(rng, ROWS, TOKENS, HEADS, WIDTH) for _ in range(3))
    k_refs, v_refs = (normal(rng, ROWS, COUNT, TOKENS, HEADS, WIDTH) for _ in range(2))
    # Some references are the same picture once more.
    source = np.where(repeated[:COUNT], 0, np.arange(COUNT))
    k_refs, v_refs = k_refs[:, source], v_refs[:, source]
    q *= np.float32(scale)
    found = both(q, k, v, k_refs, v_refs, strategy)
    shuffled = both(q, k, v, k_refs[:, order], v_refs[:, order], strategy)
    for one, other in zip(found, shuffled, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


KEYS = 6  # few, because each size of a part and each number of parts is another program
attend, attend_to_part, merge_parts = map(jax.jit, (attention, partial_attention, merge))


@settings(max_examples=60)
@given(SEEDS, SCALES, st.permutations(range(KEYS)), st.sets(st.integers(1, KEYS - 1)))
def test_merging(seed: int, scale: float, order: list[int], cuts: set[int]) -> None:
    """Parts of any sizes, in any order, are together what one softmax gives."""
    rng = np.random.default_rng(seed)
    q = np.float32(scale) * normal(rng, ROWS, TOKENS, HEADS, WIDTH)
    k, v = (normal(rng, ROWS, KEYS, HEADS, WIDTH) for _ in range(2))
    ends = [0, *sorted(cuts), KEYS]
    parts = [
        attend_to_part(q, k[:, order[start:end]], v[:, order[start:end]])
        for start, end in zip(ends[:-1], ends[1:], strict=True)
    ]
    np.testing.assert_allclose(merge_parts(*parts), attend(q, k, v), rtol=1e-4, atol=1e-5)
