"""The measures, as pure functions of embeddings.

With g a generated picture of subject s, R_s its real pictures and cos the cosine of embeddings:

    CLIP-T      cos(g, prompt of g)
    CLIP-I      mean over r in R_s of cos(g, r), of CLIP; DINO the same of DINO
    unseen      the same over those r that the method was not given
    real        mean over r' != r in R_s of cos(r, r'): what the real pictures score
    subject@k   whether s is the nearest of k look-alikes (`gallery_rank`)
    diversity   1 - mean of cos(g, g') over the other pictures g' of the same prompt

A figure is the mean over a subject's pictures, then over the subjects. As every picture of a
subject has the same R_s, the first is the mean over all pairs. Intervals resample subjects.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 10_000
GALLERY = 16


def unit(vectors: Float[np.ndarray, "... d"]) -> Float[np.ndarray, "... d"]:
    """Vectors of length 1, in float64."""
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def image_similarity(
    pictures: Float[np.ndarray, "n d"], real: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, " n"]:
    """Each picture's mean cosine to the real ones."""
    # The mean of cosines is the cosine-like product with the mean of unit vectors.
    return unit(pictures) @ unit(real).mean(axis=0)


def text_similarity(
    pictures: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, " n"]:
    """Each picture's cosine to its own text."""
    return (unit(pictures) * unit(texts)).sum(axis=-1)


def real_similarity(
    real: Float[np.ndarray, "m d"], *, with_itself: bool = False
) -> Float[np.ndarray, " m"]:
    """Each real picture's mean cosine to the subject's others; at least two are needed."""
    cosines = unit(real) @ unit(real).T
    if with_itself:
        return cosines.mean(axis=1)
    return (cosines.sum(axis=1) - np.diag(cosines)) / (len(real) - 1)


def diversity(pictures: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Each picture's mean distance 1 - cos to the others of its prompt; at least two are needed."""
    return 1 - real_similarity(pictures)


def nearest_input(
    pictures: Float[np.ndarray, "n d"],
    inputs: Float[np.ndarray, "k d"],
    real: Float[np.ndarray, "m d"],
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"], float]:
    """How near pictures are to what the method was given.

    Args:
        pictures: generated.
        inputs: the real pictures that the method was given.
        real: all real pictures of the subject, at least two.

    Returns:
        Each picture's nearest input, its cosine, and the largest cosine between two different real
        pictures: beyond that, a picture is suspected to be copied.
    """
    cosines = unit(pictures) @ unit(inputs).T
    pairs = unit(real) @ unit(real).T
    largest = float(pairs[~np.eye(len(real), dtype=bool)].max())
    return cosines.argmax(axis=1), cosines.max(axis=1), largest


def gallery_rank(picture: Float[np.ndarray, " d"], gallery: Float[np.ndarray, "k d"]) -> int:
    """Rank of the first of the gallery by Euclidean distance; ties count against it.

    Between unit vectors the order of distances is the reverse order of cosines.
    """
    distances = np.linalg.norm(gallery - picture, axis=1)
    return 1 + int((distances[1:] <= distances[0]).sum())


def look_alikes(
    subjects: Float[np.ndarray, "s d"], size: int = GALLERY
) -> Int[np.ndarray, "s size2"]:
    """For each subject, its gallery: itself, then the `size` - 1 subjects nearest to it.

    Args:
        subjects: one embedding each.
        size: of the gallery; all subjects where there are fewer.
    """
    vectors = unit(subjects)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, np.inf)
    return np.argsort(-cosines, axis=1, kind="stable")[:, :size]


def subject_means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Each subject's mean over its pictures; subjects without any are left out."""
    return {name: float(np.mean(found)) for name, found in values.items() if len(found)}


def bootstrap_interval(means: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean over subjects; `None` for a single one.

    It says how far the figure would move with other subjects of the same kind.
    """
    values = np.asarray(means, np.float64)
    if len(values) < 2:
        return None
    chosen = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[chosen].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
