"""The measures against plain loops over the same embeddings."""

import itertools
import math

import numpy as np
import pytest

from bootpig_jax.evaluation import metrics

rng = np.random.default_rng(0)
PICTURES = rng.standard_normal((7, 5)).astype(np.float32)
REAL = rng.standard_normal((4, 5)).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))


def test_image_and_text_similarity() -> None:
    found = metrics.image_similarity(PICTURES, REAL)
    wanted = [sum(cosine(p, r) for r in REAL) / 4 for p in PICTURES]
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    # The mean of pictures' means is the mean over all pairs.
    pairs = [cosine(p, r) for p in PICTURES for r in REAL]
    assert found.mean() == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    texts = rng.standard_normal((7, 5))
    wanted = [cosine(p, t) for p, t in zip(PICTURES, texts, strict=True)]
    np.testing.assert_allclose(metrics.text_similarity(PICTURES, texts), wanted, atol=1e-12)


def test_real_pictures_and_diversity() -> None:
    pairs = [cosine(REAL[i], REAL[j]) for i, j in itertools.permutations(range(4), 2)]
    assert metrics.real_similarity(REAL).mean() == pytest.approx(sum(pairs) / 12, abs=1e-12)
    everything = metrics.real_similarity(REAL, with_itself=True).mean()
    assert everything == pytest.approx((sum(pairs) + 4) / 16, abs=1e-12)
    assert metrics.diversity(REAL).mean() == pytest.approx(1 - sum(pairs) / 12, abs=1e-12)


def test_nearest_input() -> None:
    nearest, cosines, largest = metrics.nearest_input(PICTURES, REAL[:2], REAL)
    for picture, index, value in zip(PICTURES, nearest, cosines, strict=True):
        both = [cosine(picture, REAL[0]), cosine(picture, REAL[1])]
        assert index == int(both[1] > both[0])
        assert value == pytest.approx(max(both))
    pairs = [cosine(a, b) for a, b in itertools.combinations(REAL, 2)]
    assert largest == pytest.approx(max(pairs))


def test_gallery() -> None:
    gallery = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [-1.0, 0.0]])
    assert metrics.gallery_rank(np.array([1.0, 0.0]), gallery) == 1
    assert metrics.gallery_rank(np.array([1.0, 0.2]), gallery) == 2
    assert metrics.gallery_rank(np.array([-0.5, 0.9]), gallery) == 4
    ties = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert metrics.gallery_rank(np.array([1.0, 0.0]), ties) == 2

    subjects = rng.standard_normal((6, 4))
    found = metrics.look_alikes(subjects, 3)
    assert found.shape == (6, 3)
    for s, row in enumerate(found):
        others = sorted(
            (other for other in range(6) if other != s),
            key=lambda other: -cosine(subjects[s], subjects[other]),  # noqa: B023 - used at once
        )
        assert list(row) == [s, *others[:2]]
    assert metrics.look_alikes(subjects).shape == (6, 6)


def test_means_and_intervals() -> None:
    # Over subjects, not over pictures: b's many pictures count no more than a's one.
    means = metrics.subject_means({"a": [1.0], "b": [0.0, 0.0, 0.5, 0.5], "c": []})
    assert means == {"a": 1.0, "b": 0.25}
    assert metrics.bootstrap_interval([0.5]) is None
    assert metrics.bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    values = list(np.random.default_rng(1).normal(0.7, 0.1, 400))
    interval = metrics.bootstrap_interval(values)
    assert interval is not None
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert interval[0] == pytest.approx(np.mean(values) - half, abs=1e-3)
    assert interval[1] == pytest.approx(np.mean(values) + half, abs=1e-3)
    assert interval == metrics.bootstrap_interval(values)


def test_order_changes_nothing() -> None:
    order = rng.permutation(7)
    found = metrics.image_similarity(PICTURES, REAL)
    shuffled = metrics.image_similarity(PICTURES[order], REAL[::-1])
    np.testing.assert_allclose(shuffled, found[order], atol=1e-14)
