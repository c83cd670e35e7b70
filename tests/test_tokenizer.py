"""The tokenizer gives transformers' ids, from every kind of folder, on every kind of text."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from bootpig_jax.checkpoints.tokenizer import Tokenizer, load_tokenizer, tokenize_with_warnings
from bootpig_jax.errors import UserError
from tests.tokenizer_folder import EOS, write_tokenizer

TEXTS = [
    "",
    " ",
    "a photo of the dog in the snow",
    "A  PHOTO\tof\n\nthe   DOG ",
    "it's, they're; I'LL won't we'd 've",
    "wow! wow!! !!! a!b ! b",
    "12 dogs, 3rd 4½ ² Ⅷ",
    "café cafe\u0301 Å \u212b ﬁ",
    "naïve coöperation — “quoted” … ¿qué?",
    "İstanbul ẞtraße ΣΑΣ",
    "狗在雪地里 犬 강아지 собака",
    "كلب في الثلج \u200f كَلْب",
    "👩\u200d👩\u200d👧 🐶🏽 ❄\ufe0f",
    "zero\u200bwidth \xa0nbsp \u3000wide \ufeffbom",
    "<|endoftext|> in <|STARTOFTEXT|>the",
    "e-mail: a_b@c.d/?q=1&r#x \\ ~`^ {}[]",
    "\x01\x1f\x7f control",
    "the " * 100,
    "snow" * 60 + "!",
]


@pytest.fixture(
    scope="module",
    params=[
        ("!", "vocab.json"),
        (EOS, "vocab.json"),
        ("!", "tokenizer.json"),
        (EOS, "tokenizer.json"),
    ],
    ids=["sd2-vocab", "sd1-vocab", "sd2-json", "sd1-json"],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pad, kind = request.param
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer", pad=pad, kind=kind)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return load_tokenizer(write_tokenizer(path, pad="!", kind="vocab.json"))


def test_ids_equal_transformers(folder: Path) -> None:
    theirs = CLIPTokenizer.from_pretrained(folder)
    rng = np.random.default_rng(0)
    noise = ["".join(map(chr, rng.integers(1, 0xD7FF, 40))) for _ in range(200)]
    texts = TEXTS + noise
    expected = theirs(
        texts, padding="max_length", truncation=True, max_length=77, return_tensors="np"
    )["input_ids"]
    ours = load_tokenizer(folder)(texts)
    assert ours.dtype == np.int32
    for text, a, b in zip(texts, ours, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=repr(text))


def test_every_row_is_framed(tokenizer: Tokenizer) -> None:
    rows = tokenizer(TEXTS)
    assert rows.shape == (len(TEXTS), 77)
    assert (rows[:, 0] == tokenizer.bos_id).all()
    assert (rows == tokenizer.eos_id).any(axis=1).all()
    np.testing.assert_array_equal(rows[0, 1:], [tokenizer.eos_id] + [tokenizer.pad_id] * 75)


def test_nul_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="NUL"):
        tokenizer(["a dog\0"])


def test_lone_surrogate_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="Unicode"):
        tokenizer(["a dog\ud800"])


def test_too_long_shows_what_is_dropped(tokenizer: Tokenizer) -> None:
    text = "the " * 75 + "Snow  dog"
    assert tokenizer.dropped("the " * 75) == ""
    assert tokenizer.dropped(text) == "Snow  dog"
    with pytest.warns(UserWarning, match="does not see 'Snow  dog'"):
        ids = tokenize_with_warnings(tokenizer, ["a dog", text])
    np.testing.assert_array_equal(ids, tokenizer(["a dog", text]))
    with pytest.raises(UserError, match="Snow  dog"):
        tokenize_with_warnings(tokenizer, [text], strict=True)


def test_short_length_from_the_folder(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", pad="!", kind="vocab.json")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 8}))
    rows = load_tokenizer(folder)(["the dog", "the the the the the the the the"])
    assert rows.shape == (2, 8)
    assert rows[1, -1] == load_tokenizer(folder).eos_id


@pytest.mark.parametrize(
    ("name", "text"),
    [("vocab.json", None), ("merges.txt", None), ("vocab.json", "{"), ("merges.txt", "a b c\n")],
)
def test_broken_folder_is_one_line(tmp_path: Path, name: str, text: str | None) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", pad="!", kind="vocab.json")
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
