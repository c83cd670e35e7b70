"""Engines: who makes which shard where. All of them call `shards.make_shard`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bootpig_jax.errors import UserError
from data_gen.config import DataGenConfig
from data_gen.progress import Progress
from data_gen.shards import ShardReport, captions_hash
from data_gen.stages import CaptionSource, Stages

StageFactory = Callable[[DataGenConfig], Stages]
"""Loads what a configuration asks for. A cluster's machines import it by its name."""


@dataclass(frozen=True)
class Failure:
    """A shard that was given up.

    Attributes:
      shard: its number.
      error: what its last attempt died of, in one line.
    """

    shard: int
    error: str


Engine = Callable[
    [DataGenConfig, StageFactory, CaptionSource, Sequence[int], Progress], list[Failure]
]
"""Makes those of the numbered shards that are not there yet; returns the ones it gave up."""


def check_captions(
    config: DataGenConfig, captions: CaptionSource, finished: Mapping[int, ShardReport]
) -> None:
    """Checks that finished shards hold the captions that the source gives now.

    Else a caption could have moved to another shard, and be there twice.

    Raises:
      UserError: one does not.
    """
    for shard, report in finished.items():
        indices = config.shard_indices(shard)
        same = (
            captions.complete(indices.stop)  # what is lost is not asked for again
            and captions_hash(captions.captions(indices)) == report.captions_hash
        )
        if not same:
            raise UserError(
                f"output_dir: {config.output_dir}/{report.shard} was made with other captions, "
                "or another seed: bring them back, or choose another folder"
            )


def one_line(error: BaseException) -> str:
    """Returns an exception's type and message in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
