"""Shards: the unit of work, deterministic and restartable.

Shard `i` holds what became of the candidates `config.shard_indices(i)`. Every candidate depends on
its caption and (run seed, global index) alone, so `make_shard(config, stages, i, captions)` gives
the same bytes wherever and whenever it runs, and any engine (a loop, an array of jobs, actors on a
cluster) may call it.

Within a shard two threads work side by side, so that the model never waits for masks and JPEGs:

    this thread     draws batch n + 1, writes the records of batch n - 1
    a worker        cuts out, filters and encodes batch n

A finished shard has a report beside it, `<shard>.done.json`, written last. A run goes on by making
the shards that have none.
"""

import base64
import hashlib
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from bootpig_jax.data.records import (
    Record,
    bounding_box,
    encode_mask,
    encode_picture,
    shard_name,
    write_shard,
)
from bootpig_jax.errors import UserError
from data_gen.config import DataGenConfig, samples_hash
from data_gen.locks import held
from data_gen.masks import filtered
from data_gen.stages import Caption, Rejected, Segmentation, Stages, picture_seed
from data_gen.thumbnails import thumbnail

REPORT_SUFFIX = ".done.json"
REJECTS_FOLDER = "rejects"

_BATCHES_AHEAD = 2  # drawn and not yet encoded
_SHOWN_REJECTS = 4  # of each reason in each shard

Outcome = Callable[[str | None], None]
"""Called after each candidate with the reason it was rejected for, None if it was kept."""


@dataclass(frozen=True)
class ShardReport:
    """What is known of a finished shard.

    Attributes:
      shard: its file name.
      candidates: pictures drawn for it.
      count: records in it.
      num_bytes: size of its file.
      crc32c: checksum of its file, 8 hexadecimal digits.
      samples_hash: hash of what its contents depend on, besides the captions
        (`config.samples_hash`).
      captions_hash: hash of its captions (`captions_hash`).
      rejects: candidates rejected, by reason.
      seconds: by stage, how long it took: `pictures`; `masks` and `encoding`, beside them in a
        thread of their own; `waiting` for those with nothing left to draw into; `total`.
    """

    shard: str
    candidates: int
    count: int
    num_bytes: int
    crc32c: str
    samples_hash: str
    captions_hash: str
    rejects: dict[str, int]
    seconds: dict[str, float]


@dataclass(frozen=True)
class RejectedSample:
    """A rejected candidate, to be looked at.

    Attributes:
      reason: what it was rejected for.
      id: the one its record would have had.
      caption: what was to be drawn.
      picture: a small JPEG.
    """

    reason: str
    id: str
    caption: str
    picture: bytes


def shard_path(config: DataGenConfig, shard: int) -> Path:
    """Returns the path of shard number `shard`."""
    return config.output_dir / shard_name(config.dataset, config.split, shard, config.num_shards)


def captions_hash(captions: Sequence[Caption]) -> str:
    """Hashes captions and their order: 32 hexadecimal digits."""
    text = json.dumps([(caption.text, caption.object) for caption in captions])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def make_shard(
    config: DataGenConfig,
    stages: Stages,
    shard: int,
    captions: Sequence[Caption],
    on_outcome: Outcome = lambda reason: None,
) -> ShardReport:
    """Makes one shard and, last of all, its report; unless it is finished.

    Args:
      config: the run's configuration.
      stages: the stages, set up from `config`.
      shard: the shard's number, in [0, config.num_shards).
      captions: one for each of its candidates, `config.shard_indices(shard)`.
      on_outcome: told of every candidate.

    Raises:
      Locked: another process is making this shard.
      UserError: it cannot be written.
    """
    path, indices = shard_path(config, shard), config.shard_indices(shard)
    if len(captions) != len(indices):
        raise ValueError(f"{len(captions)} captions for {len(indices)} candidates")
    started = time.perf_counter()
    with held(config.output_dir, path.name):
        report = _read_report(path)
        run = _ShardRun(config, stages)
        if report is not None and report.samples_hash == run.samples_hash:
            if report.captions_hash == captions_hash(captions):
                return report  # by another process, since this one looked
        info = write_shard(path, run.records(indices, captions, on_outcome))
        _write_rejects(config, path.name, run.shown)
        report = ShardReport(
            shard=path.name,
            candidates=len(indices),
            count=info.count,
            num_bytes=info.num_bytes,
            crc32c=f"{info.crc32c:08x}",
            samples_hash=run.samples_hash,
            captions_hash=captions_hash(captions),
            rejects=dict(sorted(run.rejects.items())),
            seconds={**run.watch.seconds, "total": time.perf_counter() - started},
        )
        write_text(_report_path(path), json.dumps(asdict(report), indent=2))
    return report


def finished_shards(config: DataGenConfig) -> dict[int, ShardReport]:
    """Returns the reports of the finished shards, by number.

    A shard whose report is damaged, or whose file is missing or of another size, is not finished.
    """
    reports = {}
    for shard in range(config.num_shards):
        report = _read_report(shard_path(config, shard))
        if report is not None:
            reports[shard] = report
    return reports


def check_samples(config: DataGenConfig, expected: str | None = None) -> None:
    """Checks that all shards in the output folder belong to one run.

    Args:
      config: the run's configuration.
      expected: `samples_hash` of the run; None to have all agree with each other.

    Raises:
      UserError: some were made with other settings, another seed or another model.
    """
    for path in sorted(config.output_dir.glob(f"*{REPORT_SUFFIX}")):
        report = _parse_report(path)
        if report is None:
            continue
        expected = expected or report.samples_hash
        if report.samples_hash != expected:
            raise UserError(
                f"output_dir: {config.output_dir} holds shards made with other settings or another "
                f"model ({path.name}): choose another folder, or delete it to start afresh"
            )


def total_rejects(reports: Iterable[ShardReport]) -> Counter[str]:
    """Adds up the candidates that were rejected, by reason."""
    return sum((Counter(report.rejects) for report in reports), Counter[str]())


def read_rejects(config: DataGenConfig, shard: int) -> list[RejectedSample]:
    """Returns the rejected candidates of a shard that are kept to be looked at."""
    path = _rejects_path(config, shard_path(config, shard).name)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [
            RejectedSample(**{**entry, "picture": base64.b64decode(entry["picture"])})
            for entry in entries
        ]
    except (OSError, ValueError, TypeError, KeyError):
        return []  # nothing depends on it


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is either whole or not there.

    Raises:
      UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def count_text(rejects: Mapping[str, int]) -> str:
    """Returns the counts in one line, the largest first, such as "too_small 12, empty 3"."""
    ordered = sorted(rejects.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count}" for reason, count in ordered)


@dataclass(frozen=True)
class _Watch:
    """Adds up the seconds spent in each stage."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("pictures", "masks", "encoding", "waiting"), 0.0)
    )

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started


@dataclass(frozen=True)
class _Candidate:
    """A candidate on its way; `picture` is None where none was drawn."""

    index: int
    caption: Caption
    seed: int
    picture: UInt8[np.ndarray, "h w 3"] | None


@dataclass(frozen=True)
class _Outcome:
    candidate: _Candidate
    result: Record | Rejected


class _ShardRun:
    """The making of one shard: what `make_shard` writes down of it."""

    def __init__(self, config: DataGenConfig, stages: Stages) -> None:
        self._config, self._stages = config, stages
        self.samples_hash = samples_hash(config, stages.model_hash)
        self.rejects: Counter[str] = Counter()
        self.shown: list[RejectedSample] = []
        self.watch = _Watch()

    def records(
        self, indices: Sequence[int], captions: Sequence[Caption], on_outcome: Outcome
    ) -> Iterator[Record]:
        """Yields the samples in the order of their global indices."""
        for outcome in self._outcomes(indices, captions):
            if isinstance(outcome.result, Rejected):
                self._note(outcome.candidate, outcome.result.reason)
                on_outcome(outcome.result.reason)
            else:
                yield outcome.result
                on_outcome(None)

    def _outcomes(self, indices: Sequence[int], captions: Sequence[Caption]) -> Iterator[_Outcome]:
        size = self._config.pictures.batch_size
        finishing: deque[Future[list[_Outcome]]] = deque()
        # One worker: a segmenter need not be safe to share, and what it finds stays in order.
        worker = ThreadPoolExecutor(1, thread_name_prefix="masks")
        try:
            for start in range(0, len(indices), size):
                part = slice(start, start + size)
                with self.watch("pictures"):
                    drawn = self._draw(indices[part], captions[part])
                finishing.append(worker.submit(self._finish, drawn))
                while finishing and (len(finishing) > _BATCHES_AHEAD or finishing[0].done()):
                    yield from self._wait(finishing.popleft())
            while finishing:
                yield from self._wait(finishing.popleft())
        finally:
            worker.shutdown(cancel_futures=True)

    def _wait(self, finishing: Future[list[_Outcome]]) -> list[_Outcome]:
        with self.watch("waiting"):
            return finishing.result()

    def _draw(
        self, indices: Sequence[int], captions: Sequence[Caption]
    ) -> list[tuple[_Candidate, Rejected | None]]:
        """Draws one batch; beside each candidate, the reason that it was not drawn for."""
        seeds = [picture_seed(self._config.seed, index) for index in indices]
        texts = [caption.text for caption in captions]
        drawn = self._stages.pictures.draw(indices, texts, seeds)
        return [
            (_Candidate(index, caption, seed, None), picture)
            if isinstance(picture, Rejected)
            else (_Candidate(index, caption, seed, picture), None)
            for index, caption, seed, picture in zip(indices, captions, seeds, drawn, strict=True)
        ]

    def _finish(self, drawn: Sequence[tuple[_Candidate, Rejected | None]]) -> list[_Outcome]:
        """Cuts out, filters and encodes one batch. Runs in the worker."""
        there = [candidate for candidate, _ in drawn]
        pictures = {c.index: c.picture for c in there if c.picture is not None}
        segmented = [c for c in there if c.index in pictures]
        with self.watch("masks"):
            found = self._stages.segmenter.segment(
                list(pictures.values()),
                [candidate.caption.object for candidate in segmented],
                [candidate.seed for candidate in segmented],
            )
            kept = {
                index: filtered(one, picture.shape[:2], self._config.masks.filters)
                for (index, picture), one in zip(pictures.items(), found, strict=True)
            }
        with self.watch("encoding"):
            return [
                _Outcome(candidate, rejected or self._result(candidate, kept[candidate.index]))
                for candidate, rejected in drawn
            ]

    def _result(self, candidate: _Candidate, found: Segmentation | Rejected) -> Record | Rejected:
        if isinstance(found, Rejected):
            return found
        assert candidate.picture is not None
        return Record(
            target=encode_picture(candidate.picture),
            mask=encode_mask(found.mask),
            caption=candidate.caption.text,
            object=candidate.caption.object,
            seed=candidate.seed,
            id=self._id(candidate),
            box=bounding_box(found.mask),
            score=found.score,
        )

    def _note(self, candidate: _Candidate, reason: str) -> None:
        self.rejects[reason] += 1
        # One without a picture has nothing to show.
        if candidate.picture is not None and self.rejects[reason] <= _SHOWN_REJECTS:
            small = thumbnail(candidate.picture)
            shown = RejectedSample(reason, self._id(candidate), candidate.caption.text, small)
            self.shown.append(shown)

    def _id(self, candidate: _Candidate) -> str:
        return f"{self._config.split}-{candidate.index:09d}"


def _report_path(shard: Path) -> Path:
    return shard.with_name(shard.name + REPORT_SUFFIX)


def _read_report(shard: Path) -> ShardReport | None:
    """Returns a shard's report if the shard is finished."""
    report = _parse_report(_report_path(shard))
    try:
        whole = report is not None and shard.stat().st_size == report.num_bytes
    except OSError:
        whole = False
    return report if whole else None


def _parse_report(path: Path) -> ShardReport | None:
    try:
        return ShardReport(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _rejects_path(config: DataGenConfig, shard: str) -> Path:
    return config.output_dir / REJECTS_FOLDER / f"{shard}.json"


def _write_rejects(config: DataGenConfig, shard: str, shown: Sequence[RejectedSample]) -> None:
    path = _rejects_path(config, shard)
    entries = [{**asdict(one), "picture": base64.b64encode(one.picture).decode()} for one in shown]
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be created: {error.strerror}") from error
    write_text(path, json.dumps(entries, indent=1))
