"""How fast data generation is: `python -m benchmarks.data_gen --config FILE [key=value ...]`.

Makes shards as `data_gen.run` does and, in turns with it, the same number of samples by the plain
loop: one picture at a time, the model's own scheduler, 50 steps, one thing after another. Prints
pictures a second and the share of the time that each stage takes, and writes them as JSON.

    python -m benchmarks.data_gen --config configs/data_gen_toyland.yaml --pictures 64

Both draw with the same model at the same size and guidance, and cut out with the same segmenter.
Loading the models and one batch that warms them up are not counted. Where stages run side by side,
their shares add up to more than the whole.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bootpig_jax.data.records import (
    Record,
    bounding_box,
    encode_mask,
    encode_picture,
    write_shard,
)
from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.files import local_path
from bootpig_jax.yaml_config import load_config
from data_gen.captions import make_caption_source
from data_gen.config import DataGenConfig, PicturesConfig
from data_gen.loading import load_stages
from data_gen.masks import filtered
from data_gen.shards import make_shard
from data_gen.stages import Caption, Rejected, Stages, picture_seed

STAGES = ("captions", "pictures", "masks", "encoding and writing")
PLAIN_STEPS = 50
SETTINGS = {
    *("model", "refiner", "scheduler", "steps", "guidance_scale", "image_size", "output_size"),
    *("dtype", "attention", "torch_compile", "batch_size"),
}


@dataclass(frozen=True)
class Timing:
    """One round.

    Attributes:
      pictures: how many were drawn.
      total: seconds from the first caption to the shard on disk.
      seconds: by stage.
    """

    pictures: int
    total: float
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """All rounds of one way to do it.

    Attributes:
      name: of the way.
      settings: what sets it apart.
      pictures_a_second: of each round.
      median: of those.
      shares: of each stage in all rounds' time.
    """

    name: str
    settings: dict[str, Any]
    pictures_a_second: list[float]
    median: float
    shares: dict[str, float]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_gen",
        usage="%(prog)s --config FILE [options] [key=value ...]",
        description="Measure data generation against the plain loop.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="such as configs/data_gen_toyland.yaml")
    parser.add_argument("--pictures", type=int, default=64, help="in each round")
    parser.add_argument("--rounds", type=int, default=3, help="of each way")
    parser.add_argument(
        "--plain-dtype", choices=("float32", "float16"), default="float32", help="the plain loop's"
    )
    parser.add_argument("--output", type=local_path, help="a JSON file for the results")
    given, overrides = parser.parse_known_args()
    if given.pictures < 1 or given.rounds < 1:
        raise UserError("--pictures and --rounds: give at least 1")
    with tempfile.TemporaryDirectory() as folder:
        overrides += [f"output_dir={json.dumps(folder)}", f"candidates={given.pictures}"]
        overrides += [f"candidates_per_shard={given.pictures}"]
        config = load_config(DataGenConfig, given.config, overrides)
        measured_on = machine(config.pictures.device)
        results = compare(config, given.config, given.rounds, given.plain_dtype)
    print(table(results))
    if given.output is not None:
        command = f"python -m benchmarks.data_gen {' '.join(sys.argv[1:])}"
        write_json(given.output, results, command, measured_on)


def compare(
    config: DataGenConfig, name: str, rounds: int, plain_dtype: Literal["float32", "float16"]
) -> list[Result]:
    """Measures the plain loop and the pipeline in turns.

    Args:
      config: the pipeline's; all candidates are one shard.
      name: what the results call it.
      rounds: of each.
      plain_dtype: precision of the plain loop.

    Raises:
      UserError: the pictures are not drawn, or something cannot be loaded.
    """
    if config.pictures.source != "model":
        raise UserError("pictures.source: the benchmark draws: set it to model")
    plain = config.model_copy(update={"pictures": plain_pictures(config.pictures, plain_dtype)})
    plain_stages, stages = load_stages(plain), load_stages(config)
    _warm_up(plain, plain_stages)
    _warm_up(config, stages)
    plain_rounds, pipeline_rounds = [], []
    for number in range(rounds):
        plain_rounds.append(_plain_round(plain, plain_stages))
        place = config.model_copy(update={"output_dir": config.output_dir / f"round{number}"})
        place.output_dir.mkdir()
        pipeline_rounds.append(_pipeline_round(place, stages))
    return [
        _summary("plain loop", plain.pictures, plain_rounds),
        _summary(name, config.pictures, pipeline_rounds),
    ]


def plain_pictures(config: PicturesConfig, dtype: Literal["float32", "float16"]) -> PicturesConfig:
    """Returns the settings of somebody's first script."""
    plain = {"batch_size": 1, "scheduler": "default", "steps": PLAIN_STEPS, "dtype": dtype}
    return config.model_copy(update={**plain, "attention": "sdpa", "torch_compile": False})


def table(results: Sequence[Result]) -> str:
    """Returns the results as text; the last line is the second's gain over the first."""
    width = max(len(result.name) for result in results)
    lines = [f"{'':{width}}  pictures/s  " + "  ".join(STAGES)]
    for result in results:
        shares = "  ".join(f"{result.shares[stage]:{len(stage)}.1%}" for stage in STAGES)
        lines.append(f"{result.name:{width}}  {result.median:10.3f}  {shares}")
    gain = results[1].median / results[0].median
    lines.append(f"{'':{width}}  {gain:9.2f}x")
    return "\n".join(lines)


def machine(device: str) -> dict[str, object]:
    """Returns, in words, what the figures are measured on and with.

    Call it before measuring: it also tells how many processes were busy in the last minute, which
    on a machine of one's own are none.
    """
    import diffusers
    import torch

    on_gpu = device != "cpu" and torch.cuda.is_available()
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    return {
        "machine": torch.cuda.get_device_name() if on_gpu else cores,
        "busy_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def write_json(path: Path, results: Sequence[Result], command: str, measured_on: object) -> None:
    """Writes the results.

    Raises:
      UserError: the file cannot be written.
    """
    content = {
        "command": command,
        "measured_on": measured_on,
        "results": [asdict(result) for result in results],
        "gain": results[1].median / results[0].median,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {error.strerror}") from error


def _summary(name: str, config: PicturesConfig, timings: Sequence[Timing]) -> Result:
    rates = [timing.pictures / timing.total for timing in timings]
    total = sum(timing.total for timing in timings)
    return Result(
        name=name,
        settings=config.model_dump(mode="json", include=SETTINGS),
        pictures_a_second=rates,
        median=statistics.median(rates),
        shares={stage: sum(one.seconds[stage] for one in timings) / total for stage in STAGES},
    )


def _captions(config: DataGenConfig) -> list[Caption]:
    with make_caption_source(config) as source:
        return source.captions(range(config.candidates))


def _warm_up(config: DataGenConfig, stages: Stages) -> None:
    """Draws and cuts out one batch."""
    indices = range(min(config.pictures.batch_size, config.candidates))
    captions = _captions(config)[: len(indices)]
    seeds = [picture_seed(config.seed, index) for index in indices]
    drawn = stages.pictures.draw(indices, [caption.text for caption in captions], seeds)
    kept = [n for n, picture in enumerate(drawn) if not isinstance(picture, Rejected)]
    stages.segmenter.segment(
        [drawn[n] for n in kept],  # type: ignore[misc]
        [captions[n].object for n in kept],
        [seeds[n] for n in kept],
    )


def _pipeline_round(config: DataGenConfig, stages: Stages) -> Timing:
    """Makes the run's one shard as `data_gen.run` does."""
    started = time.perf_counter()
    captions = _captions(config)
    captioned = time.perf_counter()
    report = make_shard(config, stages, 0, captions)
    total = time.perf_counter() - started
    making = report.seconds["total"]
    in_this_thread = report.seconds["pictures"] + report.seconds["waiting"]
    return Timing(
        config.candidates,
        total,
        {
            "captions": captioned - started,
            "pictures": report.seconds["pictures"],
            "masks": report.seconds["masks"],
            "encoding and writing": report.seconds["encoding"] + making - in_this_thread,
        },
    )


def _plain_round(config: DataGenConfig, stages: Stages) -> Timing:
    """Makes the same samples one after another."""
    seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def watch(stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[stage] += time.perf_counter() - started

    def records() -> Iterator[Record]:
        for index, caption in enumerate(captions):
            seed = picture_seed(config.seed, index)
            with watch("pictures"):
                picture = stages.pictures.draw([index], [caption.text], [seed])[0]
            if isinstance(picture, Rejected):
                continue
            with watch("masks"):
                found = stages.segmenter.segment([picture], [caption.object], [seed])[0]
                found = filtered(found, picture.shape[:2], config.masks.filters)
            if not isinstance(found, Rejected):
                yield Record(
                    target=encode_picture(picture),
                    mask=encode_mask(found.mask),
                    caption=caption.text,
                    object=caption.object,
                    seed=seed,
                    id=str(index),
                    box=bounding_box(found.mask),
                    score=found.score,
                )

    started = time.perf_counter()
    with watch("captions"):
        captions = _captions(config)
    write_shard(config.output_dir / "plain.tfrecord", records())
    total = time.perf_counter() - started
    seconds["encoding and writing"] = total - sum(seconds.values())
    return Timing(config.candidates, total, seconds)


if __name__ == "__main__":
    run_cli(main)
