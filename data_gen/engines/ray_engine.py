"""Shards on a Ray cluster: one actor a GPU, each with the models loaded, one shard at a time.

Plain actors rather than `ray.data`: a shard writes its own file, so there is no data to move. And
what matters here, who tries which shard how often, is then in this file: `ray.data` retries what
fails in blocks, by rules of its own, and knows no end for a shard that kills its actor each time.

The driver (this process) asks for the captions and hands them out. It needs no GPU.

An actor that has failed is replaced by a new process, also where it lives on: an error of the GPU
may leave it unable to compute anything.
"""

import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bootpig_jax.errors import UserError
from data_gen.config import DataGenConfig, RayConfig, samples_hash
from data_gen.engines import Failure, StageFactory, one_line
from data_gen.progress import Progress, Tally
from data_gen.shards import ShardReport, check_samples, finished_shards, make_shard
from data_gen.stages import Caption, CaptionSource, Stages

_SECONDS_BETWEEN_POLLS = 2.0


def run(
    config: DataGenConfig,
    make_stages: StageFactory,
    captions: CaptionSource,
    shards: Sequence[int],
    progress: Progress,
) -> list[Failure]:
    """Makes the shards that are not there yet, on a cluster (see `_connected`).

    Args:
      config: the run's configuration.
      make_stages: loads the stages. A function of a module that the actors can import.
      captions: the run's captions.
      shards: the numbers of those to make.
      progress: told of every candidate, every other second.

    Returns:
      The shards that failed at every attempt.

    Raises:
      UserError: there is no Ray or no such cluster, or something that every shard would fail of.
    """
    with _connected() as ray:
        driver = _Driver(ray, config, make_stages, captions, progress)
        return driver.run(shards)


class ShardMaker:
    """What an actor does: loads the stages once, then makes shards."""

    def __init__(self, config: DataGenConfig, make_stages: StageFactory) -> None:
        """Loads nothing yet: an error here would reach the driver without its type."""
        self._config = config
        self._make_stages = make_stages
        self._stages: Stages | None = None
        self._tally = Tally()

    def load(self, folder: str) -> str:
        """Loads the stages and returns `config.samples_hash`.

        Args:
          folder: what the configuration's relative paths start from.
        """
        try:
            os.chdir(folder)
        except OSError as error:
            raise UserError(
                f"--engine ray: a machine of the cluster has no folder {folder} "
                f"({error.strerror}): share it among all of them"
            ) from error
        self._stages = self._make_stages(self._config)
        return samples_hash(self._config, self._stages.model_hash)

    def make(self, shard: int, captions: Sequence[Caption]) -> ShardReport:
        """Makes one shard."""
        assert self._stages is not None
        self._tally = Tally()
        return make_shard(self._config, self._stages, shard, captions, self._tally.note)

    def tally(self) -> Tally:
        """Returns how far the shard has come. May be called while it is made."""
        return self._tally


@dataclass(frozen=True)
class _Task:
    """What an actor is busy with: a shard, or, None, loading its models."""

    actor: Any
    shard: int | None


class _Driver:
    """Hands the shards to the actors and replaces those that fail."""

    def __init__(
        self,
        ray: Any,
        config: DataGenConfig,
        make_stages: StageFactory,
        captions: CaptionSource,
        progress: Progress,
    ) -> None:
        self._ray, self._config, self._make_stages = ray, config, make_stages
        self._captions, self._progress = captions, progress
        self._tasks: dict[Any, _Task] = {}  # by the reference to their result
        self._queue: deque[int] = deque()
        self._attempts: Counter[int] = Counter()
        self._failed_loads = 0  # one after another
        self._failures: list[Failure] = []
        self._samples_hash: str | None = None

    def run(self, shards: Sequence[int]) -> list[Failure]:
        """See the module's `run`."""
        finished = {n: one for n, one in finished_shards(self._config).items() if n in shards}
        self._queue.extend(shard for shard in shards if shard not in finished)
        resources = self._ray.cluster_resources()
        wanted = actor_count(self._config.ray, resources, self._nodes())
        self._actor_class = self._ray.remote(ShardMaker).options(
            num_gpus=1 if resources.get("GPU") else 0,
            num_cpus=self._config.ray.cpus_per_actor,
            max_concurrency=2,  # `tally` beside `make`
            scheduling_strategy="SPREAD",
        )
        self._progress.start(finished)
        # One at least: it tells which model the finished shards must have been made with.
        for _ in range(max(1, min(wanted, len(self._queue)))):
            self._start_actor()
        while self._samples_hash is None or self._queue or self._making():
            ready, _ = self._ray.wait(
                list(self._tasks), num_returns=1, timeout=_SECONDS_BETWEEN_POLLS
            )
            for reference in ready:
                self._finish(reference)
            self._poll()
        return sorted(self._failures, key=lambda failure: failure.shard)

    def _nodes(self) -> int:
        return sum(node["Alive"] for node in self._ray.nodes())

    def _making(self) -> dict[int, Any]:
        """Returns the actors that make a shard, by its number."""
        return {t.shard: t.actor for t in self._tasks.values() if t.shard is not None}

    def _start_actor(self) -> None:
        actor = self._actor_class.remote(self._config, self._make_stages)
        self._tasks[actor.load.remote(os.getcwd())] = _Task(actor, None)

    def _finish(self, reference: Any) -> None:
        """Takes what a task has come to and gives its actor, or the next one, more to do."""
        task = self._tasks.pop(reference)
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, UserError):
                raise cause from None
            self._ray.kill(task.actor)
            self._note_failure(task.shard, cause)
            if self._queue:
                self._start_actor()
            return
        if task.shard is None:
            self._failed_loads = 0
            self._check(result)
        else:
            self._progress.show(task.shard, Tally.of(result))
        if self._queue:
            shard = self._queue.popleft()
            captions = self._captions.captions(self._config.shard_indices(shard))
            self._tasks[task.actor.make.remote(shard, captions)] = _Task(task.actor, shard)
        else:
            self._ray.kill(task.actor)

    def _note_failure(self, shard: int | None, error: BaseException) -> None:
        if shard is None:
            self._failed_loads += 1
            if self._failed_loads >= self._config.max_attempts:
                raise UserError(f"--engine ray: actors cannot load the models: {one_line(error)}")
            return
        self._progress.give_up(shard)
        self._attempts[shard] += 1
        attempt = self._attempts[shard]
        print(f"shard {shard}: attempt {attempt} failed: {one_line(error)}", file=sys.stderr)
        if attempt < self._config.max_attempts:
            self._queue.append(shard)
        else:
            self._failures.append(Failure(shard, one_line(error)))

    def _check(self, samples: str) -> None:
        if self._samples_hash is None:
            check_samples(self._config, samples)
            self._samples_hash = samples
        elif samples != self._samples_hash:
            raise UserError(
                "--engine ray: the machines of the cluster hold different models: "
                "give all of them the same files"
            )

    def _poll(self) -> None:
        """Shows how far the shards have come."""
        asked = {actor.tally.remote(): shard for shard, actor in self._making().items()}
        if not asked:
            return
        answered, _ = self._ray.wait(
            list(asked), num_returns=len(asked), timeout=_SECONDS_BETWEEN_POLLS
        )
        for reference in answered:
            try:
                self._progress.show(asked[reference], self._ray.get(reference))
            except self._ray.exceptions.RayError:
                pass  # the actor died: its task will say so


def actor_count(config: RayConfig, resources: dict[str, float], machines: int) -> int:
    """Returns how many actors to start.

    Args:
      config: what is asked for.
      resources: what the cluster has in all, of `GPU` and `CPU`.
      machines: in the cluster.

    Raises:
      UserError: the cluster is too small for them: they would wait forever.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    actors = config.actors or gpus or machines
    if gpus and actors > gpus:
        raise UserError(f"ray.actors: {actors} actors need as many GPUs; the cluster has {gpus}")
    if actors * config.cpus_per_actor > cpus:
        raise UserError(
            f"ray.cpus_per_actor: {actors} actors with {config.cpus_per_actor} each are more than "
            f"the cluster's {cpus} CPUs"
        )
    return actors


@contextmanager
def _connected() -> Iterator[Any]:
    """Connects to the cluster that RAY_ADDRESS names, else one that runs here, else starts one."""
    # Ray otherwise reports every start to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError(
            "--engine ray: ray is not installed: pip install 'bootpig_jax[data-gen-ray]'"
        ) from None
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS", "here")
        raise UserError(
            f"RAY_ADDRESS: no Ray cluster answers at {address}, or it wants a token "
            f"(RAY_AUTH_MODE=token): {one_line(error)}"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
