"""A short loss curve that every change has to keep.

Whatever changes a number that training computes changes it: the order of the samples, an
augmentation, a random key, a network, the optimiser. Where that is meant, write it anew and commit
it with the change:

    python -m tests.golden_losses --write

Without `--write` it says how far today's curve is from that in `tests/golden/losses.json`.
"""

import tests.conftest  # noqa: F401, I001 - first: programs are then compiled as in the tests

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

import bootpig_jax.train
from bootpig_jax.training.metrics import read_history
from tests import tiny_training

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
UPDATES = 8

Curve = dict[str, list[float]]


def golden() -> Curve:
    """The committed curve."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def curve(folder: Path) -> Curve:
    """Today's, from a run in `folder`."""
    model = tiny_training.save_model(folder / "model", "sd21base")
    data = tiny_training.save_data(folder / "data")
    # The program is that of a case of `test_update_oracle`: compiled once.
    bootpig_jax.train.main(
        tiny_training.arguments(
            model, data, folder / "run", **{"data.augmentation": "paper", "steps": UPDATES}
        )
    )
    rows = read_history(folder / "run")
    return {name: [row[name] for row in rows] for name in ("loss", "gradient_norm")}


def difference(ours: Curve) -> float:
    """The largest relative difference from the golden curve."""
    return float(np.max([np.abs(np.divide(ours[name], golden()[name]) - 1) for name in ours]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put today's curve in its place")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        ours = curve(Path(folder))
    if write:
        rounded = {name: [float(f"{value:.8g}") for value in ours[name]] for name in ours}
        GOLDEN.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")
    else:
        print(f"{difference(ours):.1e} of the values")


if __name__ == "__main__":
    main()
