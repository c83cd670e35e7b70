"""Captions of the paper's form: the grammars, files of the user's own, statistics."""

import json
from collections import Counter

import numpy as np
import pytest

from bootpig_jax.errors import UserError
from bootpig_jax.toyland import world
from bootpig_jax.yaml_config import load_config
from data_gen import vocabulary
from data_gen.captions import (
    MAX_CAPTION,
    MAX_OBJECT,
    CaptionStatistics,
    caption_statistics,
    make_caption_source,
    parse_caption,
)
from data_gen.config import DataGenConfig, samples_hash
from data_gen.grammar import GrammarSource, OpenWorldGrammar, Production, ToylandGrammar, permuted
from data_gen.stages import Caption, picture_seed


def make_config(folder="out", **captions):
    values = dict(output_dir=folder, captions=captions, pictures=dict(model="unused"))
    return DataGenConfig.model_validate(values)


def grammar_source(name, seed=0):
    return make_caption_source(make_config(source=name).model_copy(update={"seed": seed}))


def permuted_range(size, key):
    return permuted(np.arange(size, dtype=np.uint64), size, np.full(size, key, np.uint64)).tolist()


@pytest.mark.parametrize("size", [1, 2, 7, 360, 1000])
def test_permutation_is_a_bijection(size):
    assert sorted(permuted_range(size, key=3)) == list(range(size))


def test_permutation_depends_on_its_key():
    images = [permuted_range(360, key) for key in (0, 1, 2)]
    assert images[0] != images[1] != images[2] != images[0]


def test_200_000_open_world_captions_are_distinct():
    captions = grammar_source("open_world", seed=0).captions(range(200_000))
    assert len({caption.text for caption in captions}) == 200_000
    # All of the grammar is used, each part about equally often.
    scenes = Counter(scene for caption in captions for scene in [caption.text.split(", ")[1]])
    assert len(scenes) > 5000
    assert len({caption.object for caption in captions}) > 40_000


def test_every_open_world_caption_has_the_papers_form():
    for caption in grammar_source("open_world", 1).captions(range(2000)):
        assert parse_caption(caption.text) == caption
        assert len(caption.text.split()) <= 20


def test_grammar_numbers_all_sentences():
    grammar = OpenWorldGrammar()
    assert len({grammar.sentence(n).text for n in (0, 1, len(grammar) - 1)}) == 3
    with pytest.raises(IndexError):
        grammar.sentence(len(grammar))


def test_sentences_are_counted_scene_by_scene():
    production = Production(
        ("red", "blue"), ("cup", "hat"), ("lying", "standing"), ("here", "there")
    )
    assert [production.sentence(n).text for n in (0, 1, 2, 4, 8)] == [
        "A photo of a red cup, lying here",
        "A photo of a red cup, lying there",
        "A photo of a red cup, standing here",
        "A photo of a red hat, lying here",
        "A photo of a blue cup, lying here",
    ]
    assert len({production.sentence(n) for n in range(len(production))}) == len(production) == 16


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
    for caption in grammar_source("toyland").captions(range(50)):
        assert world.parse_caption(caption.text)[0] == caption.object


def test_a_caption_depends_on_seed_and_index_alone():
    one, other = (grammar_source("open_world", seed) for seed in (0, 1))
    assert one.captions([7])[0] == one.captions(range(5, 10))[2]
    assert one.captions([7]) != other.captions([7])


def test_no_two_pictures_share_a_seed():
    """Neither of one run nor of neighbouring runs."""
    assert len({picture_seed(run, index) for run in range(10) for index in range(100)}) == 1000


def test_a_grammar_is_always_complete():
    with grammar_source("open_world") as source:
        assert source.complete(10**9)
        assert source.rejects == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("A photo of a cup", "not of the form"),
        ("A photo of a , on it", "not of the form"),
        ("A photo of a  , on it", "not of the form"),
        ("A photo of a ?!, on it", "not of the form"),
        ("A photo of a cup,", "not of the form"),
        ("a photo of a cup, x", "not of the form"),
        ("A photo of the cup, on it", "not of the form"),
        ("A photo of a [object], on a table", "placeholder"),
        ("A photo of a cup\0, on a table", "control characters"),
        ("A photo of a cup, on a table\nand more", "control characters"),
        ("A photo of a cup, on a \u202etable", "control characters"),
        ("A photo of a cup, on a \ud800table", "control characters"),
        ("A photo of a cup, " + "x" * MAX_CAPTION, "longer than 300"),
        ("A photo of a " + "cup" * 30 + ", x", "longer than 80"),
        ("x" * 10**7, "longer than 300"),
    ],
)
def test_captions_off_the_form_are_refused(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_caption(text)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value) and "\0" not in str(error)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A photo of a pair of brand new running shoes, laces untied and ready to go.",
         "pair of brand new running shoes"),
        ("A photo of an old  clock, on\u00a0a wall", "old clock"),
        ("A photo of a ../../etc/x, on a table", "../../etc/x"),
        ("A photo of a cafe\u0301 sign, in the rain", "caf\u00e9 sign"),
        ("A photo of a cup, ".ljust(MAX_CAPTION, "x"), "cup"),
        (f"A photo of a {'c' * MAX_OBJECT}, on it", "c" * MAX_OBJECT),
    ],
)  # fmt: skip
def test_the_object_is_what_stands_before_the_first_comma(text, name):
    caption = parse_caption(text)
    assert caption.object == name
    assert parse_caption(caption.text) == caption


def file_source(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return make_caption_source(make_config(source="file", file=path))


CUP = "A photo of a cup, on a table"
CAT = "A photo of a black cat, sleeping in the sun"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.txt", f"{CUP}\n\n  \n{CAT}\n"),
        ("captions.txt", f"\ufeff{CUP}\r\n{CAT}"),
        (
            "captions.jsonl",
            f'{{"caption": "{CUP}"}}\n{{"object": "black cat", "caption": "{CAT}"}}',
        ),
    ],
)
def test_a_file_of_captions_is_read(tmp_path, name, text):
    with file_source(tmp_path, name, text) as source:
        assert source.captions([0, 1]) == [Caption(CUP, "cup"), Caption(CAT, "black cat")]
        assert source.complete(10)
        assert source.rejects == {}


def test_captions_of_a_file_are_used_again(tmp_path):
    source = file_source(tmp_path, "captions.txt", f"{CUP}\n{CAT}\n")
    assert [c.object for c in source.captions(range(5))] == ["cup", "black cat"] * 2 + ["cup"]


def test_a_file_that_names_the_object_may_hold_any_caption(tmp_path):
    line = json.dumps({"caption": "Ein Foto von einem Hund am Strand", "object": "Hund"})
    (caption,) = file_source(tmp_path, "captions.jsonl", line).captions([0])
    assert caption == Caption("Ein Foto von einem Hund am Strand", "Hund")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "", "has no captions"),
        ("c.txt", "\n\n", "has no captions"),
        ("c.txt", f"{CUP}\na cup\n{CAT}\nx\n\n", r"c.txt:2: not of the form.* \(and 1 more"),
        ("c.txt", f"{CUP}\n{CUP}\0\n", r"c.txt:2: holds control characters"),
        ("c.txt", b"\xff\xfe", "is not UTF-8"),
        ("c.jsonl", CUP, r"c.jsonl:1: not a JSON object"),
        ("c.jsonl", "[1]", 'c.jsonl:1: has no "caption"'),
        ("c.jsonl", '{"caption": 3}', 'c.jsonl:1: has no "caption"'),
        ("c.jsonl", '{"caption": ""}', "c.jsonl:1: empty"),
        ("c.jsonl", '{"caption": "a dog"}', "c.jsonl:1: not of the form"),
        ("c.jsonl", '{"caption": "a dog", "object": ""}', "c.jsonl:1: caption or object: empty"),
        ("c.jsonl", '{"caption": "a dog", "object": 3}', 'c.jsonl:1: has an "object"'),
        ("c.jsonl", '{"caption": "a dog", "objekt": "dog"}', "has the key 'objekt'"),
        ("c.jsonl", "[" * 100_000, "c.jsonl:1: not a JSON object"),
        ("c.jsonl", '{"caption": "a\u2028b", "object": "b"}', "c.jsonl:1: .* control characters"),
    ],
)
def test_bad_files_of_captions_are_one_line_with_the_place(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message) as error:
        file_source(tmp_path, name, text)
    assert "\n" not in str(error.value) and "\0" not in str(error.value)
    assert str(error.value).startswith("captions.file: ")


@pytest.mark.parametrize("name", ["none.txt", "."])
def test_a_missing_file_of_captions_is_an_error(tmp_path, name):
    with pytest.raises(UserError, match="no such file"):
        make_caption_source(make_config(source="file", file=tmp_path / name))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["captions.source=llm"], "captions: llm is missing"),
        (["captions.source=file"], "captions: file is missing"),
        (["captions.source=chatgpt"], "captions.source"),
        (["captions.llm.temperature=1"], "captions.llm.model is missing"),
        (["captions.llm.model=m", "captions.llm.api_key=canary-0123"], "did you mean.*api_key_env"),
        (["captions.llm.model=m", "captions.llm.api_key_env=canary-0123"], "not the key itself"),
        (["captions.llm.model=m", "captions.llm.base_url=https://me:canary-0123@host"], "password"),
        (["captions.llm.model=m", "captions.llm.base_url=https://h/v1?key=canary-0123"], "query"),
        (["captions.llm.model=m", "captions.llm.base_url=localhost"], "base_url is no URL"),
        (["captions.llm.model=m", 'captions.llm.base_url="http://[::1"'], "base_url is no URL"),
        (["captions.llm.model=m", "captions.llm.temperature=.nan"], "captions.llm.temperature"),
        (["captions.llm.model=m", "captions.llm.captions_per_call=0"], "captions_per_call"),
    ],
)
def test_bad_settings_are_one_line_without_the_key(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        load_config(DataGenConfig, None, ["output_dir=x", "pictures.model=x", *overrides])
    assert "\n" not in str(error.value) and "canary" not in str(error.value)


def test_the_hash_follows_what_is_asked_and_not_how(tmp_path):
    def hashed(**captions):
        return samples_hash(make_config(**captions), "model")

    def llm(**changes):
        return hashed(source="llm", llm=dict(model="m", **changes))

    assert llm() == llm(base_url="http://localhost:1/v1", api_key_env="KEY", concurrency=9)
    assert llm() == llm(timeout_s=1, attempts=1, ahead=1, json_schema="off", send_seed=False)
    different = [
        llm(),
        llm(temperature=1.2),
        llm(captions_per_call=50),
        llm(max_words=17),
        hashed(source="llm", llm=dict(model="n")),
        hashed(source="toyland"),
        hashed(),
    ]
    assert len(set(different)) == len(different)
    files = {hashed(source="file", file=name) for name in ("a.txt", "b.txt")}
    assert len(files) == 1


def test_statistics_count_captions_objects_and_words():
    texts = [CUP, CUP, CAT, "A photo of a cup, broken"]
    assert caption_statistics(map(parse_caption, texts)) == CaptionStatistics(
        count=4,
        distinct=3,
        distinct_objects=2,
        frequent_objects=(("cup", 3), ("black cat", 1)),
        min_words=6,
        mean_words=(8 + 8 + 10 + 6) / 4,
        max_words=10,
    )
    many = caption_statistics(Caption(f"A photo of a thing, {n}", f"thing {n}") for n in range(30))
    assert [name for name, _ in many.frequent_objects[:3]] == ["thing 0", "thing 1", "thing 10"]
    assert len(many.frequent_objects) == 10


def test_statistics_of_nothing_are_zeros():
    assert caption_statistics([]) == CaptionStatistics(0, 0, 0, (), 0, 0.0, 0)
