"""Votes between two methods' pictures: which are asked for, how they are kept, what they say.

A rater sees a pair of pictures of the same subject and prompt, without the methods' names, and says
which is better, once for each of `QUESTIONS`. In which order the pairs come and which picture is on
the left is drawn from the study's key, the rater's name and the pair, so that a rater who comes
back goes on where they left off.
"""

import csv
import hashlib
import io
import json
import math
import re
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

import numpy as np
from jaxtyping import Bool, Int

from bootpig_jax.errors import UserError
from bootpig_jax.files import write_whole

Side = Literal["left", "right"]
Winner = Literal["a", "b"]
# By the name in the database.
QUESTIONS: dict[str, str] = {
    "subject": "Which picture shows the same thing as the reference?",
    "prompt": "Which picture fits the description better?",
}
MAX_RATER = 64
RESAMPLES = 10_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS study (
    only INTEGER PRIMARY KEY CHECK (only = 1), a TEXT NOT NULL, b TEXT NOT NULL, key TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS votes (
    rater TEXT NOT NULL,
    pair TEXT NOT NULL,
    question TEXT NOT NULL,
    winner TEXT NOT NULL CHECK (winner IN ('a', 'b')),
    left_method TEXT NOT NULL CHECK (left_method IN ('a', 'b')),
    time TEXT NOT NULL,
    PRIMARY KEY (rater, pair, question)
);
"""


@dataclass(frozen=True)
class Vote:
    """One answer.

    Attributes:
        rater: who gave it.
        pair: about which pictures, `subject/prompt/file`.
        question: one of `QUESTIONS`.
        winner: the method whose picture was chosen.
        left_method: the method whose picture was on the left.
        time: when, UTC, ISO 8601.
    """

    rater: str
    pair: str
    question: str
    winner: Winner
    left_method: Winner
    time: str


@dataclass(frozen=True)
class WinRate:
    """How often method a was chosen.

    Attributes:
        question: the answers to which.
        wins: votes for a.
        votes: all votes.
        pairs: pairs with a vote.
        rate: `wins / votes`; `None` without votes.
        wilson: 95 % interval of `rate`, if all votes were independent.
        bootstrap: 95 % interval of `rate` over the pairs, whose votes belong together.
    """

    question: str
    wins: int
    votes: int
    pairs: int
    rate: float | None
    wilson: tuple[float, float]
    bootstrap: tuple[float, float] | None


# ---------------------------------------------------------------- what is asked


def arrange(key: str, rater: str, pairs: Sequence[str]) -> list[tuple[str, bool]]:
    """The pairs in a rater's order, each with whether method a is on the left."""

    def draw(pair: str) -> bytes:
        return hashlib.sha256(json.dumps([key, rater, pair]).encode()).digest()

    drawn = sorted((draw(pair), pair) for pair in pairs)
    return [(pair, digest[-1] % 2 == 0) for digest, pair in drawn]


def check_rater(name: str) -> str:
    """A rater's name with single spaces and none around it.

    Raises:
        UserError: it is empty, too long or has other characters than a name needs.
    """
    name = " ".join(name.split())
    if not name:
        raise UserError("name: is empty; give one, and the same when you come back")
    # Nothing that a spreadsheet would take for a formula.
    if len(name) > MAX_RATER or not re.fullmatch(r"\w[\w .@-]*", name):
        raise UserError(f"name: use at most {MAX_RATER} letters, digits and spaces")
    return name


# ---------------------------------------------------------------- how votes are kept


@dataclass(frozen=True)
class Database:
    """The votes of one study, in a SQLite file that several processes may use at once.

    Attributes:
        path: the file.
        a: name of the first method.
        b: name of the second.
        key: random; what each rater sees is drawn from it.
    """

    path: Path
    a: str
    b: str
    key: str

    @classmethod
    def create(cls, path: Path, a: str, b: str) -> Self:
        """Opens a study of methods `a` and `b`, or starts it.

        Raises:
            UserError: the file holds another study or something else, or can't be written.
        """
        with _connection(path) as connection:
            connection.executescript(_SCHEMA)
            connection.execute(
                "INSERT INTO study VALUES (1, ?, ?, ?) ON CONFLICT (only) DO NOTHING",
                (a, b, secrets.token_hex(16)),
            )
        found = cls.open(path)
        if (found.a, found.b) != (a, b):
            raise UserError(f"--database: {path} compares {found.a} with {found.b}; name another")
        return found

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens a study that exists.

        Raises:
            UserError: the file is missing or holds something else.
        """
        if not path.is_file():
            raise UserError(f"--database: {path} is missing")
        with _connection(path) as connection:
            row = connection.execute("SELECT a, b, key FROM study").fetchone()
        if row is None:
            raise UserError(f"--database: {path} holds no study; name another")
        return cls(path, *row)

    def add(self, rater: str, pair: str, a_left: bool, answers: Mapping[str, Side]) -> None:
        """Keeps a rater's answers about a pair: all or none, and the first ones if it has some.

        Args:
            rater: who.
            pair: about what.
            a_left: whether method a's picture was on the left.
            answers: which side was chosen, by question.
        """
        time = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [
            (
                rater,
                pair,
                question,
                "a" if (side == "left") == a_left else "b",
                "a" if a_left else "b",
                time,
            )
            for question, side in answers.items()
        ]
        with _connection(self.path) as connection:
            connection.executemany(
                "INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (rater, pair, question) DO NOTHING",
                rows,
            )

    def votes(self) -> list[Vote]:
        """All votes, in the order in which they were given."""
        with _connection(self.path) as connection:
            rows = connection.execute("SELECT * FROM votes ORDER BY rowid").fetchall()
        return [Vote(*row) for row in rows]

    def seen_by(self, rater: str) -> set[str]:
        """The pairs that a rater has answered."""
        with _connection(self.path) as connection:
            rows = connection.execute("SELECT DISTINCT pair FROM votes WHERE rater = ?", (rater,))
            return {pair for (pair,) in rows}


@contextmanager
def _connection(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection whose changes are kept together, or not at all if something raises."""
    try:
        with closing(sqlite3.connect(path, timeout=30)) as connection, connection:
            yield connection
    except sqlite3.DatabaseError as error:
        raise UserError(f"--database: {path} can't be used ({error}); name another") from None


# ---------------------------------------------------------------- what they say


def win_rates(votes: Sequence[Vote]) -> list[WinRate]:
    """How often method a was chosen, for each question."""
    rates = []
    for question in QUESTIONS:
        mine = [vote for vote in votes if vote.question == question]
        won = np.array([vote.winner == "a" for vote in mine], bool)
        _, clusters = np.unique([vote.pair for vote in mine], return_inverse=True)
        rates.append(
            WinRate(
                question=question,
                wins=int(won.sum()),
                votes=len(mine),
                pairs=int(clusters.max()) + 1 if mine else 0,
                rate=float(won.mean()) if mine else None,
                wilson=wilson(int(won.sum()), len(mine)),
                bootstrap=bootstrap(won, clusters.astype(np.int64)) if mine else None,
            )
        )
    return rates


def wilson(wins: int, votes: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); (0, 1) without votes."""
    if votes == 0:
        return 0.0, 1.0
    rate, weight = wins / votes, z * z / votes
    middle = (rate + weight / 2) / (1 + weight)
    half = z * math.sqrt(rate * (1 - rate) / votes + weight / (4 * votes)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(won: Bool[np.ndarray, " n"], clusters: Int[np.ndarray, " n"]) -> tuple[float, float]:
    """95 % percentile interval of the mean of `won`, clusters drawn with replacement.

    Args:
        won: one value for each vote.
        clusters: which votes belong together: numbers from 0.
    """
    count = int(clusters.max()) + 1
    sizes, wins = np.bincount(clusters, minlength=count), np.bincount(clusters, won, count)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    low, high = np.quantile((drawn @ wins) / (drawn @ sizes), [0.025, 0.975])
    return float(low), float(high)


def format_rates(rates: Sequence[WinRate], a: str, b: str) -> str:
    """A line for each question."""
    lines = []
    for rate in rates:
        if rate.rate is None or rate.bootstrap is None:
            lines.append(f"{rate.question}: no votes yet")
            continue
        low, high = (100 * end for end in rate.bootstrap)
        lines.append(
            f"{rate.question}: {a} chosen over {b} in {rate.wins} of {rate.votes} votes, "
            f"{100 * rate.rate:.1f} % [{low:.1f}, {high:.1f}] over {rate.pairs} pairs"
        )
    return "\n".join(lines)


def export(database: Database, path: Path) -> None:
    """Writes all votes, to a `.csv`, or with the methods' names and win rates to a `.json`.

    Raises:
        UserError: the file has another ending or can't be written.
    """
    votes = database.votes()
    match path.suffix.lower():
        case ".csv":
            buffer = io.StringIO()
            writer = csv.DictWriter(buffer, list(Vote.__annotations__), lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(vote) for vote in votes)
            write_whole(path, buffer.getvalue())
        case ".json":
            content = {
                "a": database.a,
                "b": database.b,
                "win_rates_of_a": [asdict(rate) for rate in win_rates(votes)],
                "votes": [asdict(vote) for vote in votes],
            }
            write_whole(path, json.dumps(content, indent=2) + "\n")
        case _:
            raise UserError(f"--export: {path} must end in .csv or .json")
