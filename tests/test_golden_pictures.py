"""The shipped models draw the committed pictures; `golden_pictures` says how to raise them."""

from pathlib import Path

import pytest
from PIL import Image

from tests.golden_pictures import FOLDER, NAMES, committed, distance, draw


@pytest.fixture(scope="module")
def drawn() -> dict[str, Image.Image]:
    return draw()


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_picture_is_drawn(
    drawn: dict[str, Image.Image], name: str, tmp_path: Path
) -> None:
    drawn[name].save(tmp_path / f"{name}.png")
    assert distance(drawn[name], committed(name)) <= 1, f"look at {tmp_path / name}.png"


def test_nothing_else_is_committed() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(f"{n}.png" for n in NAMES)
