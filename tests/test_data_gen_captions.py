"""The caption grammars: numbered, distinct, of the paper's form."""

from collections import Counter

import numpy as np
import pytest

from bootpig_jax.toyland import world
from data_gen import vocabulary
from data_gen.captions import (
    GrammarSource,
    OpenWorldGrammar,
    ToylandGrammar,
    make_caption_source,
    parse_caption,
    permuted,
)


def permuted_range(size, key):
    return permuted(np.arange(size, dtype=np.uint64), size, np.full(size, key, np.uint64)).tolist()


@pytest.mark.parametrize("size", [1, 2, 7, 360, 1000])
def test_permutation_is_a_bijection(size):
    assert sorted(permuted_range(size, key=3)) == list(range(size))


def test_permutation_depends_on_its_key():
    images = [permuted_range(360, key) for key in (0, 1, 2)]
    assert images[0] != images[1] != images[2] != images[0]


def test_200_000_open_world_captions_are_distinct():
    captions = make_caption_source("open_world", 0).captions(range(200_000))
    assert len({caption.text for caption in captions}) == 200_000
    # All of the grammar is used, each part about equally often.
    scenes = Counter(scene for caption in captions for scene in [caption.text.split(", ")[1]])
    assert len(scenes) > 5000
    assert len({caption.object for caption in captions}) > 40_000


def test_every_open_world_caption_has_the_papers_form():
    for caption in make_caption_source("open_world", 1).captions(range(2000)):
        assert parse_caption(caption.text) == caption
        assert len(caption.text.split()) <= 20


def test_grammar_numbers_all_sentences():
    grammar = OpenWorldGrammar()
    assert len({grammar.sentence(n).text for n in (0, 1, len(grammar) - 1)}) == 3
    with pytest.raises(IndexError):
        grammar.sentence(len(grammar))


@pytest.mark.parametrize(
    "name",
    ["THINGS", "ANIMALS", "THING_ATTRIBUTES", "ANIMAL_ATTRIBUTES", "THING_POSITIONS",
     "ANIMAL_POSITIONS", "SCENES"],
)  # fmt: skip
def test_words_are_distinct_and_hold_no_comma(name):
    words = getattr(vocabulary, name)
    assert len(set(words)) == len(words)
    assert not any("," in word or word != word.strip() or not word for word in words)
    if name.endswith("ATTRIBUTES"):
        assert not [word for word in words if word[0].lower() in "aeiou"]


def test_toyland_uses_every_caption_once_a_round():
    source = GrammarSource(ToylandGrammar(), seed=5)
    size = len(ToylandGrammar())
    rounds = [[c.text for c in source.captions(range(k * size, (k + 1) * size))] for k in range(2)]
    assert len(set(rounds[0])) == size
    assert sorted(rounds[0]) == sorted(rounds[1])
    assert rounds[0] != rounds[1]


def test_toyland_captions_are_the_worlds_own():
    for caption in make_caption_source("toyland", 0).captions(range(50)):
        assert world.parse_caption(caption.text)[0] == caption.object


def test_a_caption_depends_on_seed_and_index_alone():
    one, other = (make_caption_source("open_world", seed) for seed in (0, 1))
    assert one.captions([7])[0] == one.captions(range(5, 10))[2]
    assert one.captions([7]) != other.captions([7])


@pytest.mark.parametrize(
    "text", ["", "A photo of a cup", "A photo of a , on it", "a photo of a cup, x"]
)
def test_captions_off_the_form_are_refused(text):
    with pytest.raises(ValueError, match="not of the form"):
        parse_caption(text)
