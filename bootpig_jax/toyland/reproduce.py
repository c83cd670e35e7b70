"""The paper's tables and figures in miniature: `python -m bootpig_jax.toyland.reproduce`.

    Table 2     six rows of what is trained, each with three seeds
    Table 1     the text alone, BootPIG before training, and after it (Table 2's last row)
    Fig. 6, 7   that model with the four poolings and 1 to 5 references

This module is a list of commands that a user could type, and what is made of their results: tables
and plots on one page. A command whose result is there is not run again, and a training that was
stopped goes on; so the whole can be stopped at any time and started again.
"""

import argparse
import base64
import dataclasses
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import Field

from bootpig_jax.attention import STRATEGIES
from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.evaluation.published import TABLE_2
from bootpig_jax.evaluation.render import (
    Curve,
    Gallery,
    Line,
    Picture,
    Table,
    TableRow,
    plot_curves,
    render_markdown,
    write_report,
)
from bootpig_jax.evaluation.render import Report as PageReport
from bootpig_jax.files import LocalPath
from bootpig_jax.toyland.evaluate import SHIPPED_MODEL, Report, Result
from bootpig_jax.yaml_config import ConfigModel, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
# Copies of each reference in the cache: without augmentation all would be alike.
COPIES = {"paper": 4, "none": 1}
# Where the paper has DINO and CLIP-I, and CLIP-T; with their names in `Result`.
MEASURES = {"subject@16": "subject_at_16", "scene@10": "scene_at_10"}

Count = Annotated[int, Field(ge=1)]


class ReproduceConfig(ConfigModel):
    """What `make reproduce` does. Every field can be overridden as `key=value`."""

    output_dir: LocalPath = Path("runs/reproduce")
    model: LocalPath = SHIPPED_MODEL
    data: LocalPath | None = None
    """A dataset that is there already; made with `data_gen` when absent."""
    data_gen: LocalPath = CONFIGS / "data_gen_toyland.yaml"
    train: LocalPath = CONFIGS / "toyland_ablation.yaml"
    steps: Count = 250
    """Updates of each training."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = (0, 1, 2)
    """Of the trainings. Each seed also draws its own cases, the same for all rows."""
    cases: Count = 64
    """Held-out cases for each seed."""
    references: tuple[Count, ...] = (1, 2, 3, 4, 5)
    batch_size: Count = 32
    """Cases drawn together."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of Table 2.

    Attributes:
        name: of its folders.
        base: what is trained of the Base UNet.
        reference: what is trained of the Reference UNet.
        augmentation: of the references.
        published: its name in the paper's table, `published.TABLE_2`.
    """

    name: str
    base: str
    reference: str
    augmentation: str
    published: str

    @property
    def title(self) -> str:
        """As in the paper's table."""
        with_or_without = "with" if self.augmentation == "paper" else "without"
        return f"{self.base} / {self.reference}, {with_or_without} augmentation"


ROWS = (
    Row("all_all", "all", "all", "paper", "table2_all_all"),
    Row("none_all", "none", "all", "paper", "table2_none_all"),
    Row("all_none", "all", "none", "paper", "table2_all_none"),
    Row("rsa_none", "rsa", "none", "paper", "table2_rsa_none"),
    Row("rsa_all_no_augmentation", "rsa", "all", "none", "table2_rsa_all_no_augmentation"),
    Row("rsa_all", "rsa", "all", "paper", "BootPIG"),
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A command and the file or folder that is there once it has run.

    Attributes:
        arguments: after `python -m`.
        result: what it makes last.
    """

    arguments: tuple[str, ...]
    result: Path

    @property
    def command(self) -> str:
        """As a user would type it."""
        return shlex.join(("python", "-m", *self.arguments))


def list_jobs(config: ReproduceConfig) -> list[Job]:
    """All commands in the order in which they run; later ones need earlier ones' results."""
    out = config.output_dir
    jobs = []
    data = config.data
    if data is None:
        data = out / "data"
        how = ("--config", shown(config.data_gen), f"output_dir={data}")
        jobs.append(Job(("data_gen.run", *how), data / "dataset_info.json"))
    model = f"model.base={shown(config.model)}"
    common = ("--config", shown(config.train), model, f"data.dir={data}")
    # Seed by seed, so that a table with fewer seeds is there early.
    for seed in config.seeds:
        for augmentation in COPIES:
            fields = (*cache_fields(out, augmentation, seed), f"seed={seed}")
            result = out / f"cache_{augmentation}_{seed}" / "cache.json"
            jobs.append(Job(("bootpig_jax.cache_latents", *common, *fields), result))
        for row in ROWS:
            jobs += [train_job(config, common, row, seed), evaluate_job(config, row.name, seed)]
    for seed in config.seeds:
        jobs += [
            evaluate_job(config, "text", seed),
            evaluate_job(config, "before", seed),
            evaluate_job(config, "poolings", seed),
        ]
    return jobs


def shown(path: Path) -> str:
    """A path as a user would type it: from the current folder on, where it lies in there."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def cache_fields(out: Path, augmentation: str, seed: int) -> tuple[str, ...]:
    """The latents of one augmentation and seed: where they are, and what of."""
    return (
        f"data.augmentation={augmentation}",
        f"data.cache={out / f'cache_{augmentation}_{seed}'}",
        f"data.cache_copies={COPIES[augmentation]}",
    )


def train_job(config: ReproduceConfig, common: tuple[str, ...], row: Row, seed: int) -> Job:
    """Trains a row of Table 2."""
    folder = training_folder(config, row.name, seed)
    fields = (
        f"trainable.base={row.base}",
        f"trainable.reference={row.reference}",
        *cache_fields(config.output_dir, row.augmentation, seed),
        f"steps={config.steps}",
        f"seed={seed}",
        f"output_dir={folder}",
    )
    return Job(("bootpig_jax.train", *common, *fields), folder / "bootpig.json")


def evaluate_job(config: ReproduceConfig, name: str, seed: int) -> Job:
    """Draws and scores held-out cases: of a row, `text`, `before` or the `poolings`."""
    trained = training_folder(config, "rsa_all" if name == "poolings" else name, seed)
    how = {
        "text": ("--method", "text"),
        "before": ("--bootpig", "none", "--reference-timestep", "0"),
    }.get(name, ("--bootpig", str(trained)))
    if name == "poolings":
        counts = map(str, config.references)
        how += ("--references", *counts, "--strategy", *STRATEGIES)
    result = report_path(config, name, seed)
    sizes = ("--cases", str(config.cases), "--batch-size", str(config.batch_size))
    rest = ("--seed", str(seed), "--output", str(result))
    model = ("--model", shown(config.model))
    return Job(("bootpig_jax.toyland.evaluate", *model, *how, *sizes, *rest), result)


def training_folder(config: ReproduceConfig, name: str, seed: int) -> Path:
    """Where a row's training with a seed is."""
    return config.output_dir / "training" / f"{name}_{seed}"


def report_path(config: ReproduceConfig, name: str, seed: int) -> Path:
    """Where `evaluate` writes what came of a training."""
    return config.output_dir / "scores" / f"{name}_{seed}.json"


def run(config: ReproduceConfig) -> None:
    """Runs what has not run yet, then writes the tables and plots.

    Raises:
        UserError: a command failed, or was asked to stop.
    """
    jobs = list_jobs(config)
    for number, job in enumerate(jobs, start=1):
        if job.result.exists():
            continue
        say(f"[{number}/{len(jobs)}] {job.command}")
        done = subprocess.run([sys.executable, "-m", *job.arguments])
        if done.returncode or not job.result.exists():
            raise UserError(
                f"stopped at command {number} of {len(jobs)} (status {done.returncode}); "
                "the same command goes on from there"
            )
    (config.output_dir / "commands.txt").write_text("".join(f"{job.command}\n" for job in jobs))
    write_results(config)


# ---------------------------------------------------------------- results


def read_results(config: ReproduceConfig, name: str) -> list[list[Result]]:
    """What was scored under a name: for each seed that is there, the rows of its report."""
    paths = [report_path(config, name, seed) for seed in config.seeds]
    return [
        list(Report.model_validate_json(path.read_text("utf-8")).results)
        for path in paths
        if path.exists()
    ]


def percent(results: Sequence[Result], field: str) -> list[float]:
    """A measure by seed, in percent."""
    return [100 * getattr(r, field) for r in results]


def spread(values: Sequence[float]) -> float:
    """The standard deviation over seeds; 0 for a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def mean_and_spread(results: Sequence[Result], field: str) -> str:
    """`mean ± standard deviation` over seeds, in percent."""
    values = percent(results, field)
    if not values:
        return "–"
    around = f" ± {spread(values):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{around}"


def write_results(config: ReproduceConfig) -> None:
    """Writes what is there: `report.html`, `results.md`, `results.json` and `poolings.png`."""
    out = config.output_dir
    first = {
        name: [rows[0] for rows in read_results(config, name)]
        for name in ("text", "before", *(row.name for row in ROWS))
    }
    pooled = pooled_scores(config)
    tables = (*score_tables(first), *(pooling_tables(pooled) if pooled else ()))
    curves = tuple(pooling_curve(pooled, title) for title in MEASURES) if pooled else ()
    report = PageReport(
        title="BootPIG in Toyland",
        summary=f"Mean and standard deviation over {len(config.seeds)} seeds, in percent.",
        tables=tables,
        curves=curves,
        galleries=(sheets(config, first),),
        commands=tuple((str(job.result), job.command) for job in list_jobs(config)),
    )
    write_report(report, out)
    markdown = "\n\n".join(part for t in tables for part in (t.title, render_markdown(t)))
    (out / "results.md").write_text(f"{markdown}\n", encoding="utf-8")
    results = {
        "table_1_and_2": {k: [r.model_dump() for r in v] for k, v in first.items()},
        "figures_6_and_7": [r.model_dump() for found in pooled.values() for r in found],
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if curves:
        plot_curves(curves).savefig(out / "poolings.png", dpi=110)
    print(markdown)
    say(f"{out / 'report.html'}")


def score_tables(first: Mapping[str, Sequence[Result]]) -> tuple[Table, Table]:
    """Tables 1 and 2 of what was scored under each name."""

    def scores(name: str) -> tuple[str, ...]:
        found = first[name]
        return (*(mean_and_spread(found, field) for field in MEASURES.values()), str(len(found)))

    names = {"text": "text alone", "before": "BootPIG before training", "rsa_all": "BootPIG"}
    return (
        Table(
            title="Table 1",
            columns=(*MEASURES, "seeds"),
            rows=tuple(TableRow(name=title, cells=scores(name)) for name, title in names.items()),
        ),
        Table(
            title="Table 2",
            columns=(*MEASURES, "seeds", "paper: DINO", "CLIP-I", "CLIP-T"),
            rows=tuple(
                TableRow(name=row.title, cells=(*scores(row.name), *paper_scores(row)))
                for row in ROWS
            ),
            note="What is trained of the Base / Reference UNet, and whether references are "
            "augmented.",
        ),
    )


def paper_scores(row: Row) -> tuple[str, str, str]:
    """DINO, CLIP-I and CLIP-T of a row of Table 2."""
    _, scores = TABLE_2[row.published]
    if not scores:
        return "out of memory", "–", "–"
    return f"{scores['DINO']}", f"{scores['CLIP-I']}", f"{scores['CLIP-T']}"


def pooled_scores(config: ReproduceConfig) -> dict[tuple[int, str], list[Result]]:
    """The results by number of references and strategy; one reference is the same for all."""
    pooled: dict[tuple[int, str], list[Result]] = {}
    for results in read_results(config, "poolings"):
        for r in results:
            for strategy in STRATEGIES if r.references == 1 else (r.strategy,):
                pooled.setdefault((r.references, strategy), []).append(r)
    return pooled


def pooling_tables(pooled: Mapping[tuple[int, str], Sequence[Result]]) -> list[Table]:
    """Fig. 6 and 7 as tables: a row for each pooling, a column for each number of references."""
    counts = sorted({count for count, _ in pooled})
    return [
        Table(
            title=f"Fig. 6 and 7: {title} by number of references",
            columns=tuple(map(str, counts)),
            rows=tuple(
                TableRow(
                    name=strategy,
                    cells=tuple(
                        mean_and_spread(pooled.get((k, strategy), []), field) for k in counts
                    ),
                )
                for strategy in STRATEGIES
            ),
        )
        for title, field in MEASURES.items()
    ]


def pooling_curve(pooled: Mapping[tuple[int, str], Sequence[Result]], title: str) -> Curve:
    """Fig. 6 and 7 as a plot of one measure, a line for each pooling."""
    lines = []
    for strategy in STRATEGIES:
        points = []
        for count in sorted(k for k, s in pooled if s == strategy):
            values = percent(pooled[count, strategy], MEASURES[title])
            mean, around = float(np.mean(values)), spread(values)
            points.append((float(count), mean, (mean - around, min(100.0, mean + around))))
        lines.append(Line(name=strategy, points=tuple(points)))
    return Curve(title=title, x_label="references", y_label="%", lines=tuple(lines))


def sheets(config: ReproduceConfig, names: Iterable[str]) -> Gallery:
    """What was drawn with the first seed."""
    paths = {name: report_path(config, name, config.seeds[0]).with_suffix(".png") for name in names}
    rows = []
    for name, path in paths.items():
        if path.exists():
            buffer = io.BytesIO()
            Image.open(path).convert("RGB").save(buffer, "JPEG", quality=85)
            picture = Picture(jpeg=base64.b64encode(buffer.getvalue()).decode(), caption=str(path))
            rows.append((name, (picture,)))
    return Gallery(title="Pictures", rows=tuple(rows))


def say(message: str) -> None:
    """Prints a line of progress on standard error."""
    print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    defaults = ReproduceConfig()
    parser = argparse.ArgumentParser(
        prog="python -m bootpig_jax.toyland.reproduce",
        usage="%(prog)s [--list] [key=value ...]",
        description="The paper's tables and figures on Toyland: trains, draws, scores, tabulates.",
        epilog="fields: " + ", ".join(f"{k}={v}" for k, v in defaults.model_dump().items()),
        allow_abbrev=False,
    )
    parser.add_argument("--list", action="store_true", help="print the commands; run none")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config(ReproduceConfig, None, overrides)
    if arguments.list:
        print("\n".join(job.command for job in list_jobs(config)))
    else:
        run(config)


if __name__ == "__main__":
    run_cli(main)
