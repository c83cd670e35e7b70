"""The curves of a run: what is drawn, and one line where nothing can be."""

import json

import numpy as np
import pytest
from PIL import Image

from bootpig_jax import plot_run
from bootpig_jax.errors import UserError


def test_curves_follow_the_history_and_become_a_picture(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": s, "group": "train", "loss": 1 / s, "lr_rsa": 1e-6} for s in range(1, 9)]
    rows.append({"step": 8, "group": "validation", "loss": 0.5, "reference_share_00": 0.25})
    (run / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = plot_run.curves(rows)
    assert curves["train/loss"] == ([*range(1, 9)], [1 / s for s in range(1, 9)])
    assert curves["validation/reference_share_00"] == ([8], [0.25])
    plot_run.main([str(run), str(run)])
    assert capsys.readouterr().out.strip() == str(run / "curves.png")
    with Image.open(run / "curves.png") as picture:
        colours = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
    assert picture.width > 1000 and len(colours) > 10


def test_smoothing_is_a_running_mean():
    np.testing.assert_allclose(plot_run.smoothed([1, 2, 6, 1], 1), [1, 2, 6, 1])
    np.testing.assert_allclose(plot_run.smoothed([1, 2, 6, 1], 3), [1, 1.5, 3, 3])


def test_no_history_is_one_line(tmp_path):
    with pytest.raises(UserError, match="history.jsonl is missing or empty: name the output_dir"):
        plot_run.main([str(tmp_path)])
