"""Votes between two methods: how they are kept, what they say, and the page that asks for them."""

import csv
import io
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page
from scipy.stats import binomtest

from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.datasets import open_dataset
from bootpig_jax.web.study import find_pairs, main
from bootpig_jax.web.votes import (
    QUESTIONS,
    Database,
    arrange,
    bootstrap,
    check_rater,
    wilson,
    win_rates,
)
from tests.web_server import browser_page, running

SIDE_A, SIDE_B = 40, 56  # pixels: how the test tells the methods apart
ANSWERS = {"subject": "left", "prompt": "right"}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A dataset of two subjects with one prompt, and two methods' pictures of them."""
    data = tmp_path / "data"
    methods = tmp_path / "secret_alpha", tmp_path / "secret_beta"
    info = PngInfo()
    info.add_text("bootpig", "secret settings")
    for subject, colour in (("cup", "teal"), ("dog", "gold")):
        for folder, side in (
            (data / subject, 32),
            (methods[0] / subject / "0", SIDE_A),
            (methods[1] / subject / "0", SIDE_B),
        ):
            folder.mkdir(parents=True)
            Image.new("RGB", (side, side), colour).save(folder / "00.png", pnginfo=info)
    (data / "prompts.txt").write_text("a {} on <b>the</b> moon\n")
    return data, *methods


def test_wilson_is_scipys() -> None:
    for wins, votes in ((0, 1), (0, 7), (3, 7), (7, 7), (690, 1000)):
        low, high = binomtest(wins, votes).proportion_ci(method="wilson")
        np.testing.assert_allclose(wilson(wins, votes), (low, high), atol=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_draws_pairs_not_votes() -> None:
    won = np.repeat([True, False], 50)
    low, high = bootstrap(won, np.arange(100))
    assert (low, high) == pytest.approx((0.4, 0.6), abs=0.011)  # a binomial's
    # Ten votes on each of ten pairs, all alike within a pair: as good as ten votes.
    low, high = bootstrap(won, np.arange(100) // 10)
    assert (low, high) == pytest.approx((0.2, 0.8), abs=0.01)
    assert bootstrap(won, np.zeros(100, int)) == (0.5, 0.5)


def test_order_and_sides_are_drawn_for_each_rater() -> None:
    pairs = [f"dog/{n}/00" for n in range(200)]
    first, second = (arrange("key", rater, pairs) for rater in ("Ann", "Bob"))
    assert first == arrange("key", "Ann", pairs[::-1])
    assert sorted(pair for pair, _ in first) == sorted(pairs)
    assert [pair for pair, _ in first] != [pair for pair, _ in second]
    assert dict(first) != dict(second)
    assert 60 < sum(a_left for _, a_left in first) < 140
    assert first != arrange("another key", "Ann", pairs)


def test_a_rater_answers_a_pair_once(tmp_path: Path) -> None:
    database = Database.create(tmp_path / "votes.sqlite", "ours", "theirs")
    database.add("Ann", "dog/0/00", True, ANSWERS)
    database.add("Ann", "dog/0/00", False, ANSWERS)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: database.add("Bob", "dog/0/00", False, ANSWERS), range(16)))
    votes = [(v.rater, v.question, v.winner, v.left_method) for v in database.votes()]
    assert votes == [
        ("Ann", "subject", "a", "a"),
        ("Ann", "prompt", "b", "a"),
        ("Bob", "subject", "b", "b"),
        ("Bob", "prompt", "a", "b"),
    ]
    assert database.seen_by("Ann") == {"dog/0/00"} and database.seen_by("Eve") == set()
    # All answers about a pair, or none.
    with pytest.raises(UserError, match="database"):
        database.add("Eve", "dog/0/00", True, {"subject": "left", None: "right"})  # type: ignore[dict-item]
    assert database.seen_by("Eve") == set()


def test_win_rates_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "votes.sqlite"
    database = Database.create(path, "ours", "theirs")
    assert [rate.rate for rate in win_rates(database.votes())] == [None, None]
    for n in range(4):
        for rater in ("Ann", "Bob"):
            database.add(rater, f"dog/{n}/00", n % 2 == 0, {"subject": "left", "prompt": "left"})
    database.add("Zoë", "dog/0/00", True, {"subject": "left", "prompt": "right"})
    subject, prompt = win_rates(database.votes())
    assert (subject.wins, subject.votes, subject.pairs) == (5, 9, 4)
    assert (prompt.wins, prompt.votes, prompt.rate) == (4, 9, 4 / 9)
    assert subject.bootstrap is not None and subject.bootstrap[0] < 5 / 9 < subject.bootstrap[1]

    main(["--database", str(path), "--export", str(tmp_path / "votes.csv")])
    assert "ours chosen over theirs in 5 of 9 votes" in capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO((tmp_path / "votes.csv").read_text("utf-8"))))
    assert len(rows) == 18 and rows[-1]["rater"] == "Zoë" and rows[-1]["winner"] == "b"
    main(["--database", str(path), "--export", str(tmp_path / "votes.json")])
    content = json.loads((tmp_path / "votes.json").read_text())
    assert content["win_rates_of_a"][0]["wins"] == 5 and len(content["votes"]) == 18


def test_mistakes_are_one_line(tmp_path: Path, folders: tuple[Path, Path, Path]) -> None:
    data, a, b = folders
    path = tmp_path / "votes.sqlite"
    Database.create(path, "ours", "theirs")
    (tmp_path / "text.sqlite").write_text("no database" * 100)
    study = ["--data", str(data), "--a", str(a), "--b", str(b), "--database"]
    for arguments, message in (
        (["--database", str(tmp_path / "none"), "--export", "x.csv"], "is missing"),
        (["--database", str(path), "--export", str(tmp_path / "x.txt")], ".csv or .json"),
        (["--database", str(path)], "--a, --b"),
        ([*study, str(path)], "compares ours with theirs"),
        ([*study, str(tmp_path / "text.sqlite")], "can't be used"),
        ([*study, str(tmp_path / "no" / "folder.sqlite")], "can't be used"),
        (["--data", str(data), "--a", str(a), "--b", str(a), "--database", str(path)], "both"),
        ([*study[:-1]], "--database"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            main(arguments)
        assert "\n" not in str(caught.value)
    with sqlite3.connect(tmp_path / "empty.sqlite") as connection:
        connection.execute("CREATE TABLE other (x)")
    with pytest.raises(UserError, match="can't be used"):
        Database.open(tmp_path / "empty.sqlite")
    for name in ("", "  ", "=1+1", "a\0b", "x" * 65):
        with pytest.raises(UserError, match="name: "):
            check_rater(name)
    assert check_rater("  Zoë  O.\u00a0B-2 ") == "Zoë O. B-2"


def test_pairs_are_what_both_methods_drew(folders: tuple[Path, Path, Path]) -> None:
    data, a, b = folders
    dataset = open_dataset("folder", data)
    Image.new("RGB", (16, 16)).save(a / "dog" / "0" / "01.png")
    pairs = find_pairs(dataset, a, b)
    assert list(pairs) == ["cup/0/00", "dog/0/00"]
    assert pairs["cup/0/00"].prompt == "a cup on <b>the</b> moon"
    (b / "dog" / "0" / "00.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="dog/0/00.png"):
        find_pairs(dataset, a, b)
    (b / "dog" / "0" / "00.png").unlink()
    (b / "cup" / "0" / "00.png").rename(b / "cup" / "0" / "02.png")
    with pytest.raises(UserError, match="same subject"):
        find_pairs(dataset, a, b)


@pytest.mark.long
def test_two_raters_vote_and_the_result_adds_up(
    tmp_path: Path, folders: tuple[Path, Path, Path]
) -> None:
    data, a, b = folders
    path = tmp_path / "votes.sqlite"
    command = ["--data", str(data), "--a", str(a), "--b", str(b), "--database", str(path)]
    with running("bootpig_jax.study", *command, "--port") as server:
        with browser_page(server.url) as (page, asked):
            begin(page, "Ann")
            page.get_by_text("1 of 2").wait_for()
            # Text stays text, and nothing tells which method is which.
            assert page.locator("#description b").count() == 0
            assert "secret" not in page.content()
            for side in ("left", "right"):
                picture = page.request.get(page.locator(f"#{side} img").get_attribute("src") or "")
                assert Image.open(io.BytesIO(picture.body())).info.get("bootpig") is None
            # An answer is missing.
            page.locator("#answer-subject").get_by_label("Left").check()
            page.locator("#next").click()
            page.get_by_text("Answer both questions").wait_for()
            vote(page, subject=SIDE_A, prompt=SIDE_B)
            page.get_by_text("2 of 2").wait_for()
            # Ann leaves, and Bob votes.
            page.reload()
            begin(page, "Bob")
            page.get_by_text("1 of 2").wait_for()
            vote(page, subject=SIDE_A, prompt=SIDE_A)
            page.get_by_text("2 of 2").wait_for()
            vote(page, subject=SIDE_B, prompt=SIDE_A)
            page.get_by_text("Thank you").wait_for()
            # Ann goes on where she left off.
            page.reload()
            begin(page, "Ann")
            page.get_by_text("2 of 2").wait_for()
            vote(page, subject=SIDE_A, prompt=SIDE_A)
            page.get_by_text("Thank you").wait_for()
            assert all(address.startswith((server.url, "data:", "blob:")) for address in asked)
            assert not any("secret" in address for address in asked)
        said = server.stop()
    assert "subject: secret_alpha chosen over secret_beta in 3 of 4 votes, 75.0 %" in said
    votes = Database.open(path).votes()
    assert len(votes) == 8 and {vote.rater for vote in votes} == {"Ann", "Bob"}
    assert {rate.question: (rate.wins, rate.votes) for rate in win_rates(votes)} == {
        "subject": (3, 4),
        "prompt": (3, 4),
    }


def begin(page: Page, name: str) -> None:
    page.locator("#name").get_by_role("textbox").fill(name)
    page.locator("#begin").click()


def vote(page: Page, **chosen: int) -> None:
    """Answers each question by the side, in pixels, of the picture that is chosen."""
    sides = {}
    for side in ("left", "right"):
        picture = f"document.querySelector('#{side} img')"
        page.wait_for_function(f"{picture}?.complete && {picture}.naturalWidth > 0")
        sides[page.evaluate(f"{picture}.naturalWidth")] = side
    assert sides.keys() == {SIDE_A, SIDE_B}
    for question in QUESTIONS:
        choice = sides[chosen[question]].capitalize()
        page.locator(f"#answer-{question}").get_by_label(choice).check()
    before = page.locator("#left img").get_attribute("src")
    page.locator("#next").click()
    shown = "document.querySelector('#left img')?.getAttribute('src')"
    page.wait_for_function(f"before => {shown} !== before", arg=before)
