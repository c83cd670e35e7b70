"""Draws held-out cases of Toyland and scores them: subject@16 and scene@10.

    python -m bootpig_jax.toyland.evaluate --output runs/evaluation/report.json
    python -m bootpig_jax.toyland.evaluate --bootpig runs/toyland --cases 256 --output FILE.json
    python -m bootpig_jax.toyland.evaluate --method text --output FILE.json
    python -m bootpig_jax.toyland.evaluate --references 1 3 5 --strategy softmax average ...

Every case has its own caption and its own references; as many as fill a batch are drawn together,
by one compiled program. Writes the report and, beside it with the ending `.png`, a sheet of the
first way of drawing. Several numbers of references or strategies give one row each, on the same
cases; one reference is drawn once, since all strategies then are the same.

The intervals are bootstrap intervals over cases: they say how far the figure would move with other
held-out cases, and nothing about other trainings.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pydantic
from jaxtyping import Bool, UInt8
from PIL import Image

from bootpig_jax.attention import STRATEGIES
from bootpig_jax.compilation_cache import use_compilation_cache
from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.files import local_name, local_path
from bootpig_jax.sampling.conditioning import ReferenceTimestep
from bootpig_jax.sampling.contact_sheet import Row, contact_sheet
from bootpig_jax.sampling.pipeline import BootPIGPipeline
from bootpig_jax.sampling.settings import SamplingSettings, check_reference_count
from bootpig_jax.toyland.measures import NUM_CANDIDATES, Case, Scores, make_cases, score
from bootpig_jax.toyland.render import SIZE
from bootpig_jax.toyland.world import CATEGORIES, SCENES

WEIGHTS = Path(__file__).parent / "weights"
SHIPPED_MODEL = WEIGHTS / "sd"
SHIPPED_BOOTPIG = WEIGHTS / "bootpig"

Method = Literal["text", "bootpig"]
Pictures = UInt8[np.ndarray, "n 64 64 3"]

_RESAMPLES = 10_000
_SHEET_CASES = 8 * len(CATEGORIES)


class Result(pydantic.BaseModel):
    """How one way of drawing scored.

    Attributes:
        name: of the way of drawing.
        references: how many pictures of the subject were given; 0 for the text alone.
        strategy: how they were pooled.
        cases: how many were drawn.
        subject_at_16: share of pictures whose subject is nearest to its own reference.
        subject_interval: its 95 % interval.
        subject_rank: mean rank of the own reference.
        scene_at_10: share of pictures whose scene is the caption's.
        scene_interval: its 95 % interval.
        seconds: drawing took, compilation included.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    name: str
    references: int
    strategy: str
    cases: int
    subject_at_16: float
    subject_interval: tuple[float, float]
    subject_rank: float
    scene_at_10: float
    scene_interval: tuple[float, float]
    seconds: float


class Report(pydantic.BaseModel):
    """What is written: how the cases were drawn, and how they scored."""

    model_config = pydantic.ConfigDict(frozen=True)

    settings: SamplingSettings
    results: tuple[Result, ...]


def sampling_settings(
    *,
    steps: int,
    image_guidance_scale: float,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    strategy: str = "softmax",
) -> SamplingSettings:
    """Settings for Toyland's cases, whose references are cut out and of the right size already."""
    return SamplingSettings(
        num_inference_steps=steps,
        image_guidance_scale=image_guidance_scale,
        guidance_scale=guidance_scale,
        seed=seed,
        batch_size=batch_size,
        strategy=strategy,
        segmenter="none",
        height=SIZE,
        width=SIZE,
    )


def draw_cases(
    pipeline: BootPIGPipeline,
    cases: Sequence[Case],
    settings: SamplingSettings,
    method: Method,
    *,
    reference_timestep: ReferenceTimestep | None = None,
) -> Pictures:
    """Draws each case's caption, with `method` "bootpig" from its references too.

    Args:
        pipeline: the model.
        cases: all with the same number of references.
        settings: from `sampling_settings`.
        method: "text" draws with the pipeline's Base UNet from the captions alone.
        reference_timestep: "same" or 0; `None`: as the Reference UNet was trained.
    """
    references = [
        [Image.fromarray(reference.image) for reference in case.references] for case in cases
    ]
    if reference_timestep is not None:
        settings = dataclasses.replace(settings, reference_timestep=reference_timestep)
    images = pipeline.draw(
        [case.caption for case in cases],
        references if method == "bootpig" else None,
        settings,
        progress=True,
    )
    return np.stack([np.asarray(image) for image in images])


def summarise(
    name: str, scores: Scores, seconds: float, *, references: int, strategy: str = "softmax"
) -> Result:
    """Adds the intervals to what `measures.score` found."""
    return Result(
        name=name,
        references=references,
        strategy=strategy,
        cases=len(scores.ranks),
        subject_at_16=scores.subject_at_16,
        subject_interval=bootstrap_interval(scores.ranks == 1),
        subject_rank=scores.subject_rank,
        scene_at_10=scores.scene_at_10,
        scene_interval=bootstrap_interval(scores.scene_correct),
        seconds=round(seconds, 1),
    )


def bootstrap_interval(correct: Bool[np.ndarray, " n"]) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a share.

    Drawing n of n yes/no answers with replacement gives a binomial number of yes, so the resampling
    is one call.
    """
    n = len(correct)
    shares = np.random.default_rng(0).binomial(n, correct.mean(), _RESAMPLES) / n
    low, high = np.percentile(shares, [2.5, 97.5])
    return float(low), float(high)


def format_table(results: Sequence[Result]) -> str:
    """The results as a table for the terminal; its first row is what chance gives."""
    names = [row_name(result) for result in results]
    width = max(len(name) for name in ("chance", *names))
    lines = [
        f"{'':{width}}  {'subject@16':>23}  {'mean rank':>9}  {'scene@10':>23}  {'seconds':>7}",
        f"{'chance':{width}}  {_share(1 / NUM_CANDIDATES)}  {(NUM_CANDIDATES + 1) / 2:9.1f}"
        f"  {_share(1 / len(SCENES))}",
    ]
    lines += [
        f"{name:{width}}  {_share(r.subject_at_16, r.subject_interval)}  {r.subject_rank:9.1f}"
        f"  {_share(r.scene_at_10, r.scene_interval)}  {r.seconds:7.1f}"
        for name, r in zip(names, results, strict=True)
    ]
    return "\n".join(lines)


def row_name(result: Result) -> str:
    """What a row of the table is called."""
    if result.references < 2:
        return result.name
    return f"{result.name}, {result.references} references, {result.strategy}"


def _share(value: float, interval: tuple[float, float] | None = None) -> str:
    text = "" if interval is None else f" [{interval[0]:6.1%}, {interval[1]:6.1%}]"
    return f"{value:6.1%}{text:17}"


def case_sheet(cases: Sequence[Case], pictures: Pictures, scores: Scores) -> Image.Image:
    """A row for each category: pairs of a reference and what was drawn, with the rank it got."""
    rows = []
    for category in CATEGORIES:
        # Cases go round the categories, so the first ones show each category as often.
        chosen = [i for i, case in enumerate(cases[:_SHEET_CASES]) if case.category == category]
        if not chosen:
            continue
        texts = [
            f"{cases[i].position} {cases[i].scene}: rank {scores.ranks[i]}, "
            f"scene {'right' if scores.scene_correct[i] else 'wrong'}"
            for i in chosen
        ]
        cells = [
            [Image.fromarray(picture)]
            for i in chosen
            for picture in (cases[i].references[0].image, pictures[i])
        ]
        rows.append(Row(f"{category} - {'; '.join(texts)}", cells))
    columns = max(len(row.cells) for row in rows)
    return contact_sheet(rows, ["reference", "drawn"] * (columns // 2))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bootpig_jax.toyland.evaluate",
        description="Draws and scores held-out cases of Toyland.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", type=local_path, default=SHIPPED_MODEL, help="in diffusers' layout"
    )
    parser.add_argument(
        "--bootpig",
        type=local_name,
        default=str(SHIPPED_BOOTPIG),
        help="what train exports; none: untrained",
    )
    parser.add_argument("--method", choices=get_args(Method), default="bootpig")
    parser.add_argument("--cases", type=int, default=64, help="how many are drawn")
    parser.add_argument(
        "--references", type=int, nargs="+", default=[1], help="pictures of each subject"
    )
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=["softmax"])
    parser.add_argument("--reference-timestep", choices=("trained", "same", "0"), default="trained")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--image-guidance", type=float, default=3.0)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0, help="of the cases and of the noise")
    parser.add_argument("--batch-size", type=int, default=16, help="cases drawn together")
    parser.add_argument("--output", type=local_path, required=True, help="the report, a .json file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        UserError: an argument is wrong; nothing has been drawn then.
    """
    options = parse_arguments(argv)
    if options.output.suffix != ".json":
        raise UserError(f"output: must be a .json file, not {options.output}")
    text_alone = options.method == "text"
    ways = [(0, "softmax")] if text_alone else list_ways(options.references, options.strategy)
    settings = [
        sampling_settings(
            steps=options.steps,
            image_guidance_scale=options.image_guidance,
            guidance_scale=options.guidance,
            seed=options.seed,
            batch_size=options.batch_size,
            strategy=strategy,
        )
        for _, strategy in ways
    ]
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot create its folder: {error.strerror}") from None
    timesteps: dict[str, ReferenceTimestep | None] = {"trained": None, "same": "same", "0": 0}

    use_compilation_cache()
    cases = make_cases(options.seed, options.cases, max(options.references))
    bootpig = None if text_alone or options.bootpig == "none" else options.bootpig
    pipeline = BootPIGPipeline.from_pretrained(options.model, bootpig)
    print("the first batch of each way compiles a program", file=sys.stderr, flush=True)
    name = "text alone" if text_alone else str(bootpig or "untrained")
    results = []
    for (count, strategy), how in zip(ways, settings, strict=True):
        # The first m references of a case do not depend on how many there are.
        given = [dataclasses.replace(c, references=c.references[: max(count, 1)]) for c in cases]
        started = time.monotonic()
        pictures = draw_cases(
            pipeline,
            given,
            how,
            options.method,
            reference_timestep=timesteps[options.reference_timestep],
        )
        seconds = time.monotonic() - started
        scores = score(pictures, given)
        results.append(summarise(name, scores, seconds, references=count, strategy=strategy))
        if len(results) == 1:
            sheet = case_sheet(cases, pictures, scores)

    report = Report(settings=settings[0], results=tuple(results))
    sheet.save(options.output.with_suffix(".png"))
    draft = options.output.with_suffix(".draft")
    draft.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(draft, options.output)
    print(format_table(report.results))
    print(f"{options.output}\n{options.output.with_suffix('.png')}")


def list_ways(references: Sequence[int], strategies: Sequence[str]) -> list[tuple[int, str]]:
    """Every number of references with every strategy; 1 with the first only: they are all alike.

    Raises:
        UserError: a number is too small or too large.
    """
    for count in references:
        check_reference_count(count)
    return [
        (count, strategy)
        for count in dict.fromkeys(references)
        for strategy in (dict.fromkeys(strategies) if count > 1 else strategies[:1])
    ]


if __name__ == "__main__":
    run_cli(main)
