"""The stages of data generation: what each is asked and what it answers.

    CaptionSource -> PictureSource -> Segmenter

This module is what an implementation of a stage has to know (a language model for the captions,
another diffusion model, a segmenter that understands words); it imports none of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

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

    Whoever runs the shards asks it and hands them their captions. Within its `with` block a source
    may ask a server in the background; leaving the block ends that. All but `captions` may be used
    outside of the block, too, and asks no server.
    """

    @property
    def rejects(self) -> Mapping[str, int]:
        """How many captions were offered and not taken so far, by reason."""
        ...

    def __enter__(self) -> Self:
        """Starts what makes captions in the background."""
        ...

    def __exit__(self, *exception: object) -> None:
        """Ends it, without waiting for captions that nobody asked for."""
        ...

    def complete(self, count: int) -> bool:
        """Whether the first `count` captions are there without asking a server."""
        ...

    def captions(self, indices: Sequence[int]) -> list[Caption]:
        """Returns one caption for each global index, always the same; waits until they exist.

        Raises:
          UserError: the server that makes them failed for good.
        """
        ...


class PictureSource(Protocol):
    """Gives the pictures of captions: draws them, or takes them from a folder."""

    @property
    def model_hash(self) -> str:
        """Hash of all that, besides the configuration, the pictures depend on."""
        ...

    def draw(
        self, indices: Sequence[int], captions: Sequence[str], seeds: Sequence[int]
    ) -> list[UInt8[np.ndarray, "h w 3"] | Rejected]:
        """Returns one RGB picture for each caption; up to rounding, a function of what it is given.

        Args:
          indices: the global indices of the candidates, one batch.
          captions: for each, the text.
          seeds: for each, the seed of all its randomness, in [0, 2^63).
        """
        ...


class Segmenter(Protocol):
    """Cuts objects out of pictures."""

    @property
    def model_hash(self) -> str:
        """Hash of all that, besides the configuration, the masks depend on; "" if nothing."""
        ...

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
    """What a process loads to make shards of captions."""

    pictures: PictureSource
    segmenter: Segmenter

    @property
    def model_hash(self) -> str:
        """Hash of all that, besides captions and configuration, the samples depend on."""
        return self.pictures.model_hash + self.segmenter.model_hash


def picture_seed(run_seed: int, index: int) -> int:
    """Returns the seed, in [0, 2^63), of the picture with this global index."""
    # SeedSequence mixes well: neighbouring indices and run seeds give unrelated generators.
    word = np.random.SeedSequence((run_seed, index)).generate_state(1, np.uint64)[0]
    return int(word) >> 1
