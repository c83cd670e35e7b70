"""Shards: the unit of work, deterministic and restartable.

Shard `i` holds what became of the candidates `config.shard_indices(i)`, and every candidate depends
on (run seed, global index) alone. So `make_shard(config, stages, i)` gives the same bytes wherever
and whenever it runs, and any engine (a loop, an array of jobs, actors on a cluster) may call it.

A finished shard has a report beside it, `<shard>.done.json`, written last. A run goes on by making
the shards that have none.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
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
from data_gen.masks import filtered
from data_gen.stages import Caption, Rejected, Segmentation, Stages, picture_seed

REPORT_SUFFIX = ".done.json"

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
      samples_hash: hash of all that its contents depend on (`config.samples_hash`).
      rejects: candidates rejected, by reason.
    """

    shard: str
    candidates: int
    count: int
    num_bytes: int
    crc32c: str
    samples_hash: str
    rejects: dict[str, int]


def shard_path(config: DataGenConfig, shard: int) -> Path:
    """Returns the path of shard number `shard`."""
    return config.output_dir / shard_name(config.dataset, config.split, shard, config.num_shards)


def make_shard(
    config: DataGenConfig, stages: Stages, shard: int, on_outcome: Outcome = lambda reason: None
) -> ShardReport:
    """Makes one shard and, last of all, its report.

    Args:
      config: the run's configuration.
      stages: the stages, set up from `config`.
      shard: the shard's number, in [0, config.num_shards).
      on_outcome: told of every candidate.

    Raises:
      UserError: all candidates were rejected, or the shard cannot be written.
    """
    rejects: Counter[str] = Counter()

    def note(reason: str | None) -> None:
        if reason is not None:
            rejects[reason] += 1
        on_outcome(reason)

    path = shard_path(config, shard)
    candidates = len(config.shard_indices(shard))
    records = iter(_records(config, stages, shard, note))
    first = next(records, None)
    if first is None:
        raise UserError(
            f"{path}: all {candidates} candidates were rejected "
            f"({count_text(rejects)}): change masks.filters or the pictures' settings"
        )
    info = write_shard(path, chain([first], records))
    report = ShardReport(
        shard=path.name,
        candidates=candidates,
        count=info.count,
        num_bytes=info.num_bytes,
        crc32c=f"{info.crc32c:08x}",
        samples_hash=samples_hash(config, stages.pictures.model_hash),
        rejects=dict(sorted(rejects.items())),
    )
    write_text(path.with_name(path.name + REPORT_SUFFIX), json.dumps(asdict(report), indent=2))
    return report


def finished_shards(config: DataGenConfig, model_hash: str) -> dict[int, ShardReport]:
    """Returns the reports of the shards that need not be made again.

    A shard whose report is damaged, or whose file is missing or of another size, is made again.

    Raises:
      UserError: the folder holds shards of another run: other settings, seed or model.
    """
    expected = samples_hash(config, model_hash)
    reports = {}
    for path in sorted(config.output_dir.glob(f"*{REPORT_SUFFIX}")):
        report = _read_report(path)
        if report is not None and report.samples_hash != expected:
            raise UserError(
                f"output_dir: {config.output_dir} holds shards made with other settings or another "
                f"model ({path.name}): choose another folder, or delete it to start afresh"
            )
        if report is not None:
            reports[report.shard] = report
    paths = {shard: shard_path(config, shard) for shard in range(config.num_shards)}
    return {
        shard: reports[path.name]
        for shard, path in paths.items()
        if path.name in reports
        and path.is_file()
        and path.stat().st_size == reports[path.name].num_bytes
    }


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


def _records(config: DataGenConfig, stages: Stages, shard: int, note: Outcome) -> Iterator[Record]:
    """Yields the samples of a shard in the order of their global indices."""
    of_shard, batch_size = config.shard_indices(shard), config.pictures.batch_size
    for start in range(0, len(of_shard), batch_size):
        for sample in _samples(config, stages, of_shard[start : start + batch_size]):
            if isinstance(sample, Rejected):
                note(sample.reason)
            else:
                yield sample
                note(None)


def _samples(
    config: DataGenConfig, stages: Stages, indices: Sequence[int]
) -> list[Record | Rejected]:
    """Returns what becomes of each candidate of one batch."""
    captions = stages.captions.captions(indices)
    seeds = [picture_seed(config.seed, index) for index in indices]
    drawn = stages.pictures.draw([caption.text for caption in captions], seeds)
    pictures = {n: picture for n, picture in enumerate(drawn) if isinstance(picture, np.ndarray)}
    segmentations = stages.segmenter.segment(
        list(pictures.values()),
        [captions[n].object for n in pictures],
        [seeds[n] for n in pictures],
    )
    samples: dict[int, Record | Rejected] = {
        n: picture for n, picture in enumerate(drawn) if isinstance(picture, Rejected)
    }
    for (n, picture), segmentation in zip(pictures.items(), segmentations, strict=True):
        found = filtered(segmentation, picture.shape[:2], config.masks.filters)
        samples[n] = (
            found
            if isinstance(found, Rejected)
            else _record(config, indices[n], captions[n], seeds[n], picture, found)
        )
    return [samples[n] for n in range(len(indices))]


def _record(
    config: DataGenConfig,
    index: int,
    caption: Caption,
    seed: int,
    picture: UInt8[np.ndarray, "h w 3"],
    found: Segmentation,
) -> Record:
    return Record(
        target=encode_picture(picture),
        mask=encode_mask(found.mask),
        caption=caption.text,
        object=caption.object,
        seed=seed,
        id=f"{config.split}-{index:09d}",
        box=bounding_box(found.mask),
        score=found.score,
    )


def _read_report(path: Path) -> ShardReport | None:
    try:
        return ShardReport(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def count_text(rejects: Mapping[str, int]) -> str:
    """Returns the counts in one line, the largest first, such as "too_small 12, empty 3"."""
    ordered = sorted(rejects.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count}" for reason, count in ordered)
