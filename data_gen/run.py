"""Makes training triplets: `python -m data_gen.run --config FILE [key=value ...]`.

    captions -> pictures -> masks -> records

Writes to `output_dir`:

    captions.jsonl                                         answers of the language model, if one is
    <dataset>-<split>.tfrecord-00000-of-00004              the shards
    <dataset>-<split>.tfrecord-00000-of-00004.done.json    beside each finished shard: its report
    rejects/                                               a few rejected pictures of each shard
    dataset_info.json, features.json                       what TFDS and the training read
    summary.json, report.html                              what came out, for programs and people

A run that was stopped, in whatever way, is continued by the same command; finished shards are not
made again. `docs/data_generation.md` says how to run it on several machines.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.files import local_name
from bootpig_jax.yaml_config import dump_config, load_config
from data_gen import engines
from data_gen.captions import make_caption_source
from data_gen.config import DataGenConfig
from data_gen.loading import load_stages
from data_gen.locks import Locked, held
from data_gen.plan import make_plan
from data_gen.progress import Progress, Tally
from data_gen.report import describe
from data_gen.shards import check_samples, count_text, finished_shards, total_rejects
from data_gen.stages import CaptionSource

FAILED_SHARDS_STATUS = 1


@dataclass(frozen=True)
class Part:
    """Job `index` of `count`: it makes every `count`-th shard, from shard `index` on."""

    index: int
    count: int

    def shards(self, config: DataGenConfig) -> range:
        """Returns the numbers of its shards."""
        return range(self.index, config.num_shards, self.count)


WHOLE = Part(0, 1)


@dataclass(frozen=True)
class Command:
    """What the command line asks for.

    Attributes:
      config: what to make.
      part: which of the shards.
      engine: where.
      only: `captions`: make the captions and stop. `describe`: write the files that describe the
        shards, all of which are there.
      dry_run: print the plan and stop.
    """

    config: DataGenConfig
    part: Part = WHOLE
    engine: Literal["local", "ray"] = "local"
    only: Literal["captions", "describe"] | None = None
    dry_run: bool = False


def main() -> int:
    """The command line; returns its exit status."""
    command = parse_arguments()
    if command.dry_run:
        print(make_plan(command.config, command.part.shards(command.config)).text())
        return 0
    return run(command)


def parse_arguments(arguments: Sequence[str] | None = None) -> Command:
    """Reads the command line.

    Raises:
      UserError: it is wrong, or the configuration is.
    """
    parser = _Parser(
        prog="python -m data_gen.run",
        usage="%(prog)s --config FILE [options] [key=value ...]",
        description="Make training triplets: captions, pictures, masks, records.",
        epilog="Every field of the configuration can be overridden: a.b=value or --a.b value. "
        "--print-config shows all of them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=local_name, metavar="FILE", help="such as configs/data_gen_toyland.yaml"
    )
    parser.add_argument("--captions", metavar="FILE", help="take captions from a .txt or .jsonl")
    parser.add_argument("--images", metavar="FOLDER", help="take these pictures and draw none")
    parser.add_argument(
        "--shards",
        metavar="I/N",
        type=_part,
        default=WHOLE,
        help="make every N-th shard, from shard I on (0 ... N-1): job I of N",
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument(
        "--only",
        choices=("captions", "describe"),
        help="make the captions alone; or describe the shards, once all are there",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what it would take")
    parser.add_argument("--print-config", action="store_true", help="print the configuration")
    given, overrides = parser.parse_known_args(arguments)
    if given.captions is not None:
        overrides += ["captions.source=file", f"captions.file={json.dumps(given.captions)}"]
    if given.images is not None:
        overrides += ["pictures.source=folder", f"pictures.folder={json.dumps(given.images)}"]
    if given.config is None and not overrides:
        raise UserError(
            "--config is missing: name a YAML file, such as configs/data_gen_toyland.yaml"
        )
    if given.only is not None and given.shards != WHOLE:
        raise UserError(f"--shards: --only {given.only} is of all shards: leave --shards out")
    config = load_config(DataGenConfig, given.config, overrides)
    if given.print_config:
        print(dump_config(config), end="")
        raise SystemExit(0)
    return Command(config, given.shards, given.engine, given.only, given.dry_run)


def run(command: Command, make_stages: engines.StageFactory = load_stages) -> int:
    """Makes what is not there yet and describes it.

    Args:
      command: what to make, and where.
      make_stages: loads the stages.

    Returns:
      The exit status: 0, or 1 where shards failed at every attempt and all others are done.

    Raises:
      UserError: the folder holds another run's shards, all candidates were rejected, or something
        that every shard would fail of.
    """
    config = command.config
    with _claimed(config.output_dir, shared=command.part != WHOLE):
        captions = make_caption_source(config)
        if command.only == "captions":
            return _make_captions(config, captions)
        if command.only == "describe":
            return _describe(command, captions, [])
        if command.part != WHOLE and not captions.complete(config.candidates):
            raise UserError(
                "--shards: several jobs cannot ask the language model side by side: first run the "
                "same command once, with --only captions in the place of --shards"
            )
        engines.check_captions(config, captions, finished_shards(config))
        progress = Progress(
            sum(len(config.shard_indices(shard)) for shard in command.part.shards(config))
        )
        with captions, progress:
            failures = _engine(command.engine)(
                config, make_stages, captions, command.part.shards(config), progress
            )
        return _describe(command, captions, failures)


def _engine(name: Literal["local", "ray"]) -> engines.Engine:
    if name == "ray":
        from data_gen.engines import ray_engine

        return ray_engine.run
    from data_gen.engines import local

    return local.run


def _make_captions(config: DataGenConfig, captions: CaptionSource) -> int:
    progress = Progress(config.candidates, unit="caption")
    with captions, progress:
        progress.start({})
        for shard in range(config.num_shards):
            indices = config.shard_indices(shard)
            captions.captions(indices)
            progress.show(shard, Tally(len(indices)))
    print(f"{config.candidates} captions in {config.output_dir}")
    return 0


def _describe(
    command: Command, captions: CaptionSource, failures: Sequence[engines.Failure]
) -> int:
    """Describes the shards if this process is the one to do so; returns the exit status."""
    config = command.config
    check_samples(config)
    reports = finished_shards(config)
    left = config.num_shards - len(reports)
    if left and command.only == "describe":
        raise UserError(
            f"--only describe: {left} of {config.num_shards} shards are not there yet: "
            f"make them first, the first one is number {min(set(range(left + 1)) - set(reports))}"
        )
    if not left or command.part == WHOLE:
        try:
            with held(config.output_dir, "describe"):
                describe(config, reports, captions, failures)
        except Locked:
            pass  # another job found all shards done, too, and is at it
    kept = sum(report.count for report in reports.values())
    drawn = sum(report.candidates for report in reports.values())
    rejects = total_rejects(reports.values())
    print(f"{kept} samples of {drawn} candidates in {config.output_dir}")
    if rejects:
        print(f"rejected: {count_text(rejects)}")
    if left and not failures:
        print(f"{left} of {config.num_shards} shards are left to other jobs")
    if failures:
        named = "; ".join(f"shard {one.shard}: {one.error}" for one in failures[:3])
        more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
        print(
            f"error: {len(failures)} shards failed {config.max_attempts} times each ({named}"
            f"{more}); the others are done; the same command tries again",
            file=sys.stderr,
        )
        return FAILED_SHARDS_STATUS
    if not left and not kept:
        raise UserError(
            f"all {drawn} candidates were rejected ({count_text(rejects)}): look at "
            f"{config.output_dir}/report.html, then change masks.filters or the pictures' settings"
        )
    return 0


@contextmanager
def _claimed(folder: Path, *, shared: bool) -> Iterator[None]:
    """Creates the output folder and keeps other runs out of it.

    Jobs that make a part each share it; each shard has a lock of its own.

    Raises:
      UserError: it cannot be created or written to, or another run writes to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be created: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"output_dir: {folder} cannot be written to")
    try:
        with held(folder, "run", shared=shared):
            yield
    except Locked:
        raise UserError(f"output_dir: another run is writing to {folder}: wait for it") from None


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument like every other mistake: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _part(text: str) -> Part:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I below N, such as 0/16")
    return Part(int(match[1]), int(match[2]))


if __name__ == "__main__":
    run_cli(main)
