"""Drawing and scoring that are killed again and again end as if nothing had happened."""

import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bootpig_jax.evaluation.datasets import Dataset, open_dataset
from bootpig_jax.evaluation.embedders import EmbeddingCache
from bootpig_jax.evaluation.generate import GenerateSettings, generate
from bootpig_jax.evaluation.score import About, Settings, dump_scores, read_scores, score_folder
from bootpig_jax.files import write_whole
from tests.evaluation_folders import CLASSES, write_dreambooth, write_pictures
from tests.test_evaluation_score import Projection

PAUSE = 0.02  # seconds of each step, so that kills fall into all of them
BATCH = 4
ROUNDS = 3


class SlowDrawer:
    """Draws two pictures that depend on the prompt, and writes down that it did."""

    use_references = True

    def __init__(self, log: Path) -> None:
        self.log = log

    def draw(self, prompt: str, references: Sequence[Image.Image]) -> list[Image.Image]:
        note(self.log, prompt + str(np.asarray(references[0]).sum()))
        base = sum(prompt.encode()) + int(np.asarray(references[0]).sum())
        return [Image.new("RGB", (64, 64), (base % 256, j, len(prompt))) for j in range(2)]


class SlowEmbedder(Projection):
    """A projection that writes down how many pictures went through it."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log = log

    def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        note(self.log, str(len(pixels)))
        return super().embed_pixels(pixels)


def note(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(f"{line}\n")
    time.sleep(PAUSE)


def draw(dataset: Dataset, folder: Path) -> None:
    how = GenerateSettings()
    drawer, about = SlowDrawer(folder / "log"), About(method="slow")
    generate(dataset, drawer, folder / "pictures", about, num_images=2, settings=how)


def score(dataset: Dataset, folder: Path) -> None:
    found = score_folder(
        dataset,
        folder.parent / "pictures",
        [SlowEmbedder(folder / "log")],
        cache=EmbeddingCache(folder / "cache"),
        settings=Settings(batch_size=BATCH),
    )
    write_whole(folder / "scores.json", dump_scores(found))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return open_dataset("dreambooth", write_dreambooth(tmp_path / "dataset"))


def killed_until_done(
    work: Callable[[Dataset, Path], None], dataset: Dataset, folder: Path, seconds: float
) -> int:
    """Runs `work` in processes that are killed at random times, until one ends by itself.

    Returns:
        How many were killed.
    """
    # Its processes are forks of one that has imported this module.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    rng = random.Random(folder.name)
    for kills in range(200):
        process = context.Process(target=work, args=(dataset, folder))
        process.start()
        process.join(rng.uniform(0, seconds / 2))
        if process.exitcode is None:
            process.kill()
            process.join()
        else:
            assert process.exitcode == 0
            return kills
    raise AssertionError("it never came to an end")


def seconds_of(work: Callable[[Dataset, Path], None], dataset: Dataset, folder: Path) -> float:
    start = time.monotonic()
    work(dataset, folder)
    return time.monotonic() - start


def visible(folder: Path) -> dict[str, bytes]:
    """The files of a folder but the hidden drafts, which nothing reads."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_drawing(dataset: Dataset, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    seconds = seconds_of(draw, dataset, whole)
    prompts = len((whole / "log").read_text().splitlines())
    assert prompts == 4 * 3
    kills = []
    for number in range(ROUNDS):
        folder = tmp_path / f"killed{number}"
        folder.mkdir()
        kills.append(killed_until_done(draw, dataset, folder, seconds))
        assert visible(folder / "pictures") == visible(whole / "pictures")
        # A prompt is drawn again only if its process was killed while it was drawn.
        drawn = (folder / "log").read_text().splitlines()
        assert prompts <= len(drawn) <= prompts + kills[-1]
    assert sum(kills) >= 5


def test_scoring(dataset: Dataset, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", list(CLASSES), prompts=3, images=2)
    whole = tmp_path / "whole"
    whole.mkdir()
    seconds = seconds_of(score, dataset, whole)
    wanted = read_scores(whole / "scores.json")
    kills = []
    for number in range(ROUNDS):
        folder = tmp_path / f"killed{number}"
        folder.mkdir()
        kills.append(killed_until_done(score, dataset, folder, seconds))
        found = read_scores(folder / "scores.json")
        assert [one.file for one in found.pictures] == [one.file for one in wanted.pictures]
        for one, other in zip(found.pictures, wanted.pictures, strict=True):
            assert one.values == pytest.approx(other.values, abs=1e-6)
        # 24 pictures and 12 real ones; again only those of a batch that was under way.
        embedded = sum(map(int, (folder / "log").read_text().split()))
        assert 36 <= embedded <= 36 + BATCH * kills[-1]
    assert sum(kills) >= 5
