"""Draws the curves of training runs: `python -m bootpig_jax.plot_run RUN [RUN ...]`.

Reads each run's `history.jsonl` and writes one PNG: the loss, the loss by timestep, gradient norms,
learning rates, images a second and the share of time spent waiting for data. Several runs are drawn
over each other. Works while a run goes on.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.files import local_path
from bootpig_jax.training.metrics import HISTORY, read_history

# The title of each panel, and the metrics it shows: those whose name starts with one of these.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("train/loss", "validation/loss")),
    ("loss by timestep (% of T)", ("train/loss_t",)),
    ("gradient norm, before clipping", ("train/gradient_norm",)),
    ("learning rate", ("train/lr_",)),
    ("images a second", ("train/images_per_second",)),
    ("share of time waiting for data", ("train/waiting_for_data",)),
    ("attention that goes to references", ("validation/reference_share",)),
)
LOG_SCALED = ("gradient norm, before clipping",)
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def curves(rows: Sequence[Mapping[str, Any]]) -> Curves:
    """Turns a history into curves: `group/name` -> steps and values."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "group"):
                steps, values = found.setdefault(f"{row['group']}/{name}", ([], []))
                steps.append(row["step"])
                values.append(value)
    return found


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Returns the running mean over the last `window` values."""
    totals = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (totals[ends] - totals[starts]) / (ends - starts)


def plot(runs: Mapping[str, Curves], path: Path) -> None:
    """Draws runs over each other, a panel for each group of metrics that one of them has.

    Args:
      runs: their curves, by the name shown.
      path: the PNG.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed: install the extra eval") from None

    def shown(title: str, prefixes: tuple[str, ...], name: str) -> bool:
        # "train/loss" is one curve, "train/loss_t..." are others.
        exact = title == "loss"
        return name in prefixes if exact else name.startswith(prefixes)

    panels = [
        (title, prefixes)
        for title, prefixes in PANELS
        if any(shown(title, prefixes, name) for run in runs.values() for name in run)
    ]
    columns = 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(13, 3.4 * rows), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for axes in all_axes[len(panels) :]:
        axes.remove()
    for axes, (title, prefixes) in zip(all_axes, panels, strict=False):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("updates", fontsize=9)
        axes.grid(alpha=0.3)
        for run, found in runs.items():
            for name in sorted(name for name in found if shown(title, prefixes, name)):
                steps, values = found[name]
                label = name.partition("/")[2] if name.startswith("train") else name
                label = label if len(runs) == 1 else f"{run}: {label}"
                (line,) = axes.plot(steps, smoothed(values, len(values) // 20 + 1), label=label)
                axes.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.8)
        if title in LOG_SCALED:
            axes.set_yscale("log")
        axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
      UserError: a run has no history, or the picture cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bootpig_jax.plot_run", description="Draws the curves of training runs."
    )
    parser.add_argument("runs", nargs="+", type=local_path, metavar="RUN", help="an output_dir")
    parser.add_argument("--output", type=local_path, help="the PNG; RUN/curves.png by default")
    options = parser.parse_args(arguments)
    runs = {}
    for run in options.runs:
        rows = read_history(run)
        if not rows:
            raise UserError(f"{run / HISTORY} is missing or empty: name the output_dir of a run")
        runs[str(run)] = curves(rows)
    output = options.output or options.runs[0] / "curves.png"
    try:
        plot(runs, output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    print(output)


if __name__ == "__main__":
    run_cli(main)
