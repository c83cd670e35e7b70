"""Training computes the committed losses; `golden_losses` says how to raise them."""

from pathlib import Path

from tests.golden_losses import UPDATES, curve, difference, golden


def test_the_committed_losses_are_computed(tmp_path: Path) -> None:
    ours = curve(tmp_path)
    assert ours.keys() == golden().keys()
    assert all(len(values) == UPDATES for values in (*ours.values(), *golden().values()))
    assert difference(ours) <= 1e-5, ours
