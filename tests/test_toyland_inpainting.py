"""Inpainting on Toyland: the masks, and that the score looks inside them."""

import json
from pathlib import Path

import numpy as np
import pytest

from bootpig_jax.toyland import inpainting
from bootpig_jax.toyland.inpainting import make_rooms, score_rooms
from bootpig_jax.toyland.measures import make_cases
from bootpig_jax.toyland.render import render


def test_the_score_looks_into_the_mask() -> None:
    cases = make_cases(0, 24)
    rooms = make_rooms(cases, 0)
    assert all(0 < room.mask.sum() < room.mask.size for room in rooms)
    other = score_rooms("as it was", rooms, np.stack([room.picture for room in rooms]), 0)
    assert other.subject_at_16 < 0.3 and other.unchanged == 1

    rng = np.random.default_rng(1)
    true = [render(c.subject, c.scene, c.position, rng).image for c in cases]
    pasted = [
        np.where(room.mask[..., None], picture, room.picture)
        for room, picture in zip(rooms, true, strict=True)
    ]
    found = score_rooms("the subject in the mask", rooms, np.stack(pasted), 0)
    assert found.subject_at_16 > 0.9 and found.unchanged == 1
    # The right subject everywhere but in the mask is not found.
    outside = [
        np.where(room.mask[..., None], room.picture, picture)
        for room, picture in zip(rooms, true, strict=True)
    ]
    missed = score_rooms("the subject elsewhere", rooms, np.stack(outside), 0)
    assert missed.subject_at_16 < 0.3 and missed.unchanged < 0.9


@pytest.mark.long
def test_held_out_subjects_are_put_into_pictures(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    inpainting.main(["--cases", "32", "--output", str(path)])
    before, caption, references = json.loads(path.read_text())["results"]
    assert caption["unchanged"] == references["unchanged"] == 1
    assert references["subject_at_16"] > caption["subject_at_16"] + 0.2
    assert path.with_suffix(".png").is_file()
