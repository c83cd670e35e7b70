"""One shard after another, in this process."""

import sys
import time
import traceback
from collections.abc import Sequence

from bootpig_jax.errors import UserError
from data_gen.config import DataGenConfig, samples_hash
from data_gen.engines import Failure, StageFactory, one_line
from data_gen.progress import Progress, Tally
from data_gen.shards import check_samples, finished_shards, make_shard
from data_gen.stages import Caption, CaptionSource, Stages

_FIRST_PAUSE = 1.0  # seconds before the second attempt; doubled before every further one


def run(
    config: DataGenConfig,
    make_stages: StageFactory,
    captions: CaptionSource,
    shards: Sequence[int],
    progress: Progress,
) -> list[Failure]:
    """Makes the shards that are not there yet.

    Args:
      config: the run's configuration.
      make_stages: loads the stages.
      captions: the run's captions.
      shards: the numbers of those to make.
      progress: told of every candidate.

    Returns:
      The shards that failed at every attempt.

    Raises:
      UserError: something that every shard would fail of.
    """
    stages = make_stages(config)
    check_samples(config, samples_hash(config, stages.model_hash))
    finished = {n: report for n, report in finished_shards(config).items() if n in shards}
    progress.start(finished)
    failures = []
    for shard in shards:
        if shard not in finished:
            of_shard = captions.captions(config.shard_indices(shard))
            failure = _make(config, stages, shard, of_shard, progress)
            if failure is not None:
                failures.append(failure)
    return failures


def _make(
    config: DataGenConfig,
    stages: Stages,
    shard: int,
    captions: Sequence[Caption],
    progress: Progress,
) -> Failure | None:
    for attempt in range(1, config.max_attempts + 1):
        tally = Tally()

        def note(reason: str | None, tally: Tally = tally) -> None:
            tally.note(reason)
            progress.show(shard, tally)

        try:
            report = make_shard(config, stages, shard, captions, note)
        except UserError:
            raise
        except Exception as error:
            progress.give_up(shard)
            print(f"shard {shard}: attempt {attempt} failed: {one_line(error)}", file=sys.stderr)
            if attempt == config.max_attempts:
                traceback.print_exc()
                return Failure(shard, one_line(error))
            time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1))
        else:
            progress.show(shard, Tally.of(report))
            return None
    raise AssertionError("max_attempts is at least 1")
