"""Captions without a network: seeded grammars.

A grammar's sentences are numbered 0 ... N-1; caption `i` of a run is sentence `pi(i mod N)`, where
`pi` is a pseudo-random permutation drawn from (run seed, i div N). So a caption depends on (run
seed, i) alone, the first N captions are all distinct, and every sentence is used equally often, up
to one.

The permutation is a Feistel network: numbers are written as two digits (l, r) in base m,
`m = ceil(sqrt(N))`, and each round maps (l, r) to (r, l + F(r) mod m), which is invertible whatever
the function F is. Results that are not below N are mapped again until they are ("cycle walking").
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import UInt64

from bootpig_jax.toyland import world
from data_gen import vocabulary
from data_gen.stages import Caption

_ROUNDS = 6


@dataclass(frozen=True)
class Production:
    """The sentences "A photo of a {object}, {position} {scene}" over all choices of the three.

    An object is an attribute, a space and a noun.
    """

    attributes: tuple[str, ...]
    nouns: tuple[str, ...]
    positions: tuple[str, ...]
    scenes: tuple[str, ...]

    def __len__(self) -> int:
        """Returns the number of sentences."""
        return len(self.attributes) * len(self.nouns) * len(self.positions) * len(self.scenes)

    def sentence(self, number: int) -> Caption:
        """Returns sentence `number`, read as digits of mixed radix, the scene being the lowest."""
        number, scene = divmod(number, len(self.scenes))
        number, position = divmod(number, len(self.positions))
        attribute, noun = divmod(number, len(self.nouns))
        name = f"{self.attributes[attribute]} {self.nouns[noun]}"
        text = f"A photo of a {name}, {self.positions[position]} {self.scenes[scene]}"
        return Caption(text, name)


class OpenWorldGrammar:
    """Everyday things and animals in everyday places: for a Stable Diffusion of the real world."""

    productions = (
        Production(
            vocabulary.THING_ATTRIBUTES,
            vocabulary.THINGS,
            vocabulary.THING_POSITIONS,
            vocabulary.SCENES,
        ),
        Production(
            vocabulary.ANIMAL_ATTRIBUTES,
            vocabulary.ANIMALS,
            vocabulary.ANIMAL_POSITIONS,
            vocabulary.SCENES,
        ),
    )

    def __len__(self) -> int:
        """Returns the number of sentences."""
        return sum(len(production) for production in self.productions)

    def sentence(self, number: int) -> Caption:
        """Returns sentence `number`, counted through the productions in order."""
        for production in self.productions:
            if number < len(production):
                return production.sentence(number)
            number -= len(production)
        raise IndexError("the grammar has no sentence of this number")


class ToylandGrammar:
    """Toyland's captions: every category in every position of every scene."""

    def __len__(self) -> int:
        """Returns the number of sentences."""
        return len(world.CATEGORIES) * len(world.POSITIONS) * len(world.SCENES)

    def sentence(self, number: int) -> Caption:
        """Returns sentence `number`."""
        number, scene = divmod(number, len(world.SCENES))
        category, position = divmod(number, len(world.POSITIONS))
        name = world.CATEGORIES[category]
        text = world.caption(name, world.POSITIONS[position], world.SCENES[scene])
        return Caption(text, name)


class GrammarSource:
    """Captions from a grammar, in a random order that depends on the run's seed."""

    rejects: Mapping[str, int] = {}

    def __init__(self, grammar: OpenWorldGrammar | ToylandGrammar, seed: int) -> None:
        """Draws nothing yet: captions are computed when asked for."""
        self._grammar = grammar
        self._seed = seed

    def __enter__(self) -> Self:
        """Nothing runs in the background."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing runs in the background."""

    def complete(self, count: int) -> bool:
        """A grammar never ends."""
        return True

    def captions(self, indices: Sequence[int]) -> list[Caption]:
        """Returns one caption for each global index."""
        size = len(self._grammar)
        rounds, numbers = np.divmod(np.asarray(indices, np.uint64), np.uint64(size))
        keys = _mixed(_mixed(np.full_like(rounds, self._seed)) ^ rounds)
        return [self._grammar.sentence(n) for n in permuted(numbers, size, keys).tolist()]


def permuted(
    numbers: UInt64[np.ndarray, " n"], size: int, keys: UInt64[np.ndarray, " n"]
) -> UInt64[np.ndarray, " n"]:
    """Permutes numbers below `size`: the Feistel network of the module's docstring.

    Args:
      numbers: below `size`.
      size: N, below 2^32.
      keys: each names the permutation that its number goes through.
    """
    base = np.uint64(math.isqrt(size - 1) + 1)
    left, right = np.divmod(numbers, base)
    for round_ in range(1, _ROUNDS + 1):
        mixed = _mixed(right ^ _mixed(keys + np.uint64(round_)))
        left, right = right, (left + mixed % base) % base
    images = left * base + right
    outside = images >= size
    if outside.any():
        images[outside] = permuted(images[outside], size, keys[outside])
    return images


def _mixed(words: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Scrambles 64-bit words: the output function of SplitMix64 (Steele et al. 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
