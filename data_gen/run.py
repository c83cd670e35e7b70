"""Makes training triplets: `python -m data_gen.run --config FILE [key=value ...]`.

    captions -> pictures -> masks -> records

Writes to `output_dir`:

    <dataset>-<split>.tfrecord-00000-of-00004              the shards
    <dataset>-<split>.tfrecord-00000-of-00004.done.json    beside each finished shard: its report
    dataset_info.json, features.json                       what TFDS and the training read
    contact_sheet.png                                      the first samples
    summary.json                                           samples, rejects by reason, configuration

A run that was stopped, in whatever way, is continued by the same command; finished shards are not
made again.
"""

import fcntl
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from bootpig_jax.data.records import Record, ShardReader, decode, write_dataset_metadata
from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.yaml_config import parse_command_line
from data_gen.captions import make_caption_source
from data_gen.config import DataGenConfig
from data_gen.contact_sheet import write_contact_sheet
from data_gen.masks import make_segmenter
from data_gen.shards import (
    ShardReport,
    count_text,
    finished_shards,
    make_shard,
    shard_path,
    write_text,
)
from data_gen.stages import Stages

_SHEET_SAMPLES = 48
_SECONDS_BETWEEN_LINES = 10.0  # of progress, where standard error is a file


def main() -> None:
    """The command line."""
    config = parse_command_line(
        DataGenConfig,
        None,
        prog="python -m data_gen.run",
        description="Make training triplets: captions, pictures, masks, records.",
    )
    with exclusive(config.output_dir):
        generate(config, make_stages(config))


def make_stages(config: DataGenConfig) -> Stages:
    """Loads what the configuration asks for.

    Raises:
      UserError: the text-to-image model cannot be loaded.
    """
    # These take seconds to import: a mistake in the configuration is reported before.
    import diffusers.utils.logging
    import transformers

    # Bars for loading a few files, and warnings about packages that are not used here.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    from data_gen.pictures import StableDiffusionPictures

    return Stages(
        captions=make_caption_source(config.captions, config.seed),
        pictures=StableDiffusionPictures(config.pictures),
        segmenter=make_segmenter(config.masks),
    )


def generate(config: DataGenConfig, stages: Stages) -> None:
    """Makes the shards that are not there yet, then the files that describe them.

    Raises:
      UserError: the folder holds another run's shards, every candidate of a shard was rejected, or
        something cannot be written.
    """
    reports = finished_shards(config, stages.pictures.model_hash)
    done = sum(report.candidates for report in reports.values())
    rejects: Counter[str] = Counter()
    for report in reports.values():
        rejects.update(report.rejects)
    interval = 0.5 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
    with tqdm(
        total=config.candidates, initial=done, unit="picture", mininterval=interval
    ) as progress:

        def show(reason: str | None) -> None:
            if reason is not None:
                rejects[reason] += 1
                progress.set_postfix_str(f"rejected: {count_text(rejects)}", refresh=False)
            progress.update()

        for shard in range(config.num_shards):
            if shard not in reports:
                reports[shard] = make_shard(config, stages, shard, show)
    ordered = [reports[shard] for shard in range(config.num_shards)]
    _describe(config, ordered)
    kept = sum(report.count for report in ordered)
    print(f"{kept} samples of {config.candidates} candidates in {config.output_dir}")
    if rejects:
        print(f"rejected: {count_text(rejects)}")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Creates the output folder and keeps other runs out of it.

    Raises:
      UserError: it cannot be created or written to, or another run writes to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be created: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"output_dir: {folder} cannot be written to")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Let go by the kernel when the process ends, however it ends.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"output_dir: another run is writing to {folder}: wait for it") from None
    try:
        yield
    finally:
        os.close(descriptor)


def _describe(config: DataGenConfig, reports: list[ShardReport]) -> None:
    counts = {config.split: [report.count for report in reports]}
    write_dataset_metadata(config.output_dir, config.dataset, counts)
    write_contact_sheet(config.output_dir / "contact_sheet.png", _first_records(config))
    rejects: Counter[str] = Counter()
    for report in reports:
        rejects.update(report.rejects)
    summary: Mapping[str, object] = {
        "candidates": config.candidates,
        "samples": sum(report.count for report in reports),
        "rejects": dict(sorted(rejects.items())),
        "samples_hash": reports[0].samples_hash,
        "config": config.model_dump(mode="json"),
    }
    write_text(config.output_dir / "summary.json", json.dumps(summary, indent=2))


def _first_records(config: DataGenConfig) -> list[Record]:
    records: list[Record] = []
    for shard in range(config.num_shards):
        reader = ShardReader(shard_path(config, shard))
        for index in range(min(len(reader), _SHEET_SAMPLES - len(records))):
            records.append(decode(reader[index]))
        if len(records) == _SHEET_SAMPLES:
            break
    return records


if __name__ == "__main__":
    run_cli(main)
