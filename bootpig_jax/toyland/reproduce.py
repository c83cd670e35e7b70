"""The paper's tables and figures in miniature: `python -m bootpig_jax.toyland.reproduce`.

    Table 2     six rows of what is trained, each with three seeds
    Table 1     the text alone, BootPIG before training, and after it (Table 2's last row)
    Fig. 6, 7   that model with the four poolings and 1 to 5 references

This module is a list of commands that a user could type, and what is made of their results: tables
in Markdown and plots. A command whose result is there is not run again, and a training that was
stopped goes on; so the whole can be stopped at any time and started again.
"""

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from bootpig_jax.attention import STRATEGIES
from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.toyland.evaluate import SHIPPED_MODEL, Report, Result
from bootpig_jax.yaml_config import ConfigModel, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
# Copies of each reference in the cache: without augmentation all would be alike.
COPIES = {"paper": 4, "none": 1}

Count = Annotated[int, Field(ge=1)]


class ReproduceConfig(ConfigModel):
    """What `make reproduce` does. Every field can be overridden as `key=value`."""

    output_dir: Path = Path("runs/reproduce")
    model: Path = SHIPPED_MODEL
    data: Path | None = None
    """A dataset that is there already; made with `data_gen` when absent."""
    data_gen: Path = CONFIGS / "data_gen_toyland.yaml"
    train: Path = CONFIGS / "toyland_ablation.yaml"
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
        paper: CLIP-T, CLIP-I and DINO in the paper, times 100; None where it ran out of memory.
    """

    name: str
    base: str
    reference: str
    augmentation: str
    paper: tuple[float, float, float] | None


ROWS = (
    Row("all_all", "all", "all", "paper", None),
    Row("none_all", "none", "all", "paper", (30.6, 72.8, 43.8)),
    Row("all_none", "all", "none", "paper", (31.6, 78.8, 66.4)),
    Row("rsa_none", "rsa", "none", "paper", (30.9, 78.2, 64.9)),
    Row("rsa_all_no_augmentation", "rsa", "all", "none", (30.2, 78.8, 67.0)),
    Row("rsa_all", "rsa", "all", "paper", (31.1, 79.7, 67.4)),
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


def mean_and_spread(values: Iterable[float]) -> str:
    """`mean ± standard deviation` over seeds, in percent."""
    percent = 100 * np.array(list(values))
    if not len(percent):
        return "–"
    spread = f" ± {percent.std(ddof=1):.1f}" if len(percent) > 1 else ""
    return f"{percent.mean():.1f}{spread}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_results(config: ReproduceConfig) -> None:
    """Writes `results.md`, `results.json` and the plots of what is there."""
    out = config.output_dir
    first = {
        name: [rows[0] for rows in read_results(config, name)]
        for name in ("text", "before", *(row.name for row in ROWS))
    }

    def scores(name: str) -> list[str]:
        found = first[name]
        return [
            mean_and_spread(r.subject_at_16 for r in found),
            mean_and_spread(r.scene_at_10 for r in found),
            str(len(found)),
        ]

    names = {"text": "text alone", "before": "BootPIG before training", "rsa_all": "BootPIG"}
    table_1 = markdown(
        ["", "subject@16", "scene@10", "seeds"],
        [[title, *scores(name)] for name, title in names.items()],
    )
    table_2 = markdown(
        ["Base", "Reference", "augmentation", "subject@16", "scene@10", "seeds", "paper: DINO",
         "CLIP-I", "CLIP-T"],
        [
            [row.base, row.reference, "yes" if row.augmentation == "paper" else "no",
             *scores(row.name), *paper_scores(row)]
            for row in ROWS
        ],
    )  # fmt: skip
    pooled = pooled_scores(config)
    counts = [k for k in config.references if any((k, s) in pooled for s in STRATEGIES)]
    figures = [
        markdown(
            [measure, *map(str, counts)],
            [
                [s, *(mean_and_spread(getattr(r, field) for r in pooled.get((k, s), []))
                      for k in counts)]
                for s in STRATEGIES
            ],
        )
        for measure, field in (("subject@16", "subject_at_16"), ("scene@10", "scene_at_10"))
    ]  # fmt: skip
    parts = ["Table 1", table_1, "Table 2", table_2, "Fig. 6 and 7", *figures]
    (out / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    results = {
        "table_1_and_2": {k: [r.model_dump() for r in v] for k, v in first.items()},
        "figures_6_and_7": [r.model_dump() for found in pooled.values() for r in found],
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if pooled:
        plot_poolings(pooled, out / "poolings.png")
    print("\n\n".join(parts))
    say(f"{out / 'results.md'}")


def paper_scores(row: Row) -> list[str]:
    """DINO, CLIP-I and CLIP-T of a row of Table 2."""
    if row.paper is None:
        return ["out of memory", "–", "–"]
    clip_t, clip_i, dino = row.paper
    return [f"{dino}", f"{clip_i}", f"{clip_t}"]


def pooled_scores(config: ReproduceConfig) -> dict[tuple[int, str], list[Result]]:
    """The results by number of references and strategy; one reference is the same for all."""
    pooled: dict[tuple[int, str], list[Result]] = {}
    for results in read_results(config, "poolings"):
        for r in results:
            for strategy in STRATEGIES if r.references == 1 else (r.strategy,):
                pooled.setdefault((r.references, strategy), []).append(r)
    return pooled


def plot_poolings(pooled: dict[tuple[int, str], list[Result]], path: Path) -> None:
    """Fig. 6 and 7: both measures by number of references, a line for each pooling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    measures = {"subject@16": "subject_at_16", "scene@10": "scene_at_10"}
    for panel, (title, field) in zip(panels, measures.items(), strict=True):
        for place, strategy in enumerate(STRATEGIES):
            counts = sorted(k for k, s in pooled if s == strategy)
            values = [[100 * getattr(r, field) for r in pooled[k, strategy]] for k in counts]
            spread = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
            # Set apart a little, so that the bars do not hide each other.
            x = np.array(counts) + 0.06 * (place - 1.5)
            means = [np.mean(v) for v in values]
            panel.errorbar(x, means, spread, marker="o", ms=4, capsize=2, label=strategy)
        panel.set(title=title, xlabel="references", ylabel="%", xticks=counts)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
