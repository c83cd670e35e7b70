"""The stages of data generation: what each is asked and what it answers.

    CaptionSource -> PictureSource -> Segmenter

This module is what an implementation of a stage has to know (a language model for the captions,
another diffusion model, a segmenter that understands words); it imports none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Bool, UInt8


@dataclass(frozen=True)
class Caption:
    """A caption and the words in it that name the object to cut out."""

    text: str
    object: str


@dataclass(frozen=True)
class Segmentation:
    """The object's mask, of the picture's size, and the confidence in it, in [0, 1]."""

    mask: Bool[np.ndarray, "h w"]
    score: float


@dataclass(frozen=True)
class Rejected:
    """Stands in the place of a picture or mask that is not used.

    Attributes:
      reason: one of a few words, such as "too_small": rejects are counted by it.
    """

    reason: str


class CaptionSource(Protocol):
    """Gives the captions of a run.

    A source that asks a language model may ask for the whole batch in one call; it has to answer
    the same when asked again, from a cache.
    """

    def captions(self, indices: Sequence[int]) -> list[Caption]:
        """Returns one caption for each global index; a function of the run's seed and the index."""
        ...


class PictureSource(Protocol):
    """Draws captions."""

    @property
    def model_hash(self) -> str:
        """Hash of all that, besides the configuration, the pictures depend on."""
        ...

    def draw(
        self, captions: Sequence[str], seeds: Sequence[int]
    ) -> list[UInt8[np.ndarray, "h w 3"] | Rejected]:
        """Draws one RGB picture for each caption; up to rounding, a function of it and its seed.

        Args:
          captions: the texts, one batch.
          seeds: for each, the seed of all its randomness, in [0, 2^63).
        """
        ...


class Segmenter(Protocol):
    """Cuts objects out of pictures."""

    def segment(
        self,
        pictures: Sequence[UInt8[np.ndarray, "h w 3"]],
        objects: Sequence[str],
        seeds: Sequence[int],
    ) -> list[Segmentation | Rejected]:
        """Returns the mask of the named object in each RGB picture.

        Args:
          pictures: one batch.
          objects: for each, the words for its object.
          seeds: for each, the seed of all the randomness there is in cutting it out.
        """
        ...


@dataclass(frozen=True)
class Stages:
    """The three stages that make a sample."""

    captions: CaptionSource
    pictures: PictureSource
    segmenter: Segmenter


def picture_seed(run_seed: int, index: int) -> int:
    """Returns the seed, in [0, 2^63), of the picture with this global index."""
    # SeedSequence mixes well: neighbouring indices and run seeds give unrelated generators.
    word = np.random.SeedSequence((run_seed, index)).generate_state(1, np.uint64)[0]
    return int(word) >> 1
