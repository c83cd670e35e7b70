"""What a run shows of itself: pictures, rate, time left and rejects."""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self, TextIO

from tqdm import tqdm

from data_gen.shards import ShardReport, count_text

_SECONDS_BETWEEN_LINES = 10.0  # where standard error is a file


@dataclass
class Tally:
    """What became of some candidates.

    Attributes:
      candidates: how many there were.
      rejects: those rejected, by reason.
    """

    candidates: int = 0
    rejects: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, report: ShardReport) -> Self:
        """Returns what a finished shard's report says."""
        return cls(report.candidates, Counter(report.rejects))

    def note(self, reason: str | None) -> None:
        """Counts one candidate; `reason` is what it was rejected for, None if it was kept."""
        self.candidates += 1
        if reason is not None:
            self.rejects[reason] += 1


class Progress:
    """A bar on a terminal; in a file, a line every ten seconds.

    A shard counts as far as it has come; one that is given up, no longer.
    """

    def __init__(self, total: int, unit: str = "picture", stream: TextIO | None = None) -> None:
        """Shows nothing yet.

        Args:
          total: candidates of all shards that are to be finished.
          unit: what they are called.
          stream: a terminal or a file; standard error if None.
        """
        self._total = total
        self._unit = unit
        self._stream = stream or sys.stderr
        self._shards: dict[int, Tally] = {}
        self._bar: tqdm | None = None

    def start(self, finished: Mapping[int, ShardReport]) -> None:
        """Starts the clock, with the shards that earlier runs have finished."""
        self._shards = {shard: Tally.of(report) for shard, report in finished.items()}
        terminal = self._stream.isatty()
        self._bar = tqdm(
            total=self._total,
            initial=self._candidates(),
            unit=self._unit,
            file=self._stream if terminal else _Lines(self._stream),
            mininterval=0.5 if terminal else _SECONDS_BETWEEN_LINES,
            miniters=1,  # else tqdm guesses from the last rate when to look at the clock again
        )

    def show(self, shard: int, tally: Tally) -> None:
        """Shows how far a shard has come."""
        self._shards[shard] = tally
        self._refresh()

    def give_up(self, shard: int) -> None:
        """Takes back what was shown of a shard: it starts again, or not at all."""
        self._shards.pop(shard, None)
        self._refresh()

    def __enter__(self) -> Self:
        """Shows nothing yet, either."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Shows the last state and leaves it there."""
        if self._bar is not None:
            self._bar.close()

    def _candidates(self) -> int:
        return sum(tally.candidates for tally in self._shards.values())

    def _refresh(self) -> None:
        if self._bar is None:
            return
        rejects = sum((tally.rejects for tally in self._shards.values()), Counter[str]())
        if rejects:
            self._bar.set_postfix_str(f"rejected: {count_text(rejects)}", refresh=False)
        self._bar.update(self._candidates() - self._bar.n)


class _Lines:
    """A stream that ends each of tqdm's states with a new line, instead of overwriting it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()
