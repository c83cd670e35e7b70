"""What an earlier version wrote is read, and gone on with, to the same result.

`tests/fixtures_8eb1dfc/make.py` says what is in the archive and how it was made.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import bootpig_jax.train
from bootpig_jax import sample
from bootpig_jax.config import TrainConfig
from bootpig_jax.data.cache import CacheSource, make_cached_loader
from bootpig_jax.data.records import ShardReader, decode, read_split
from bootpig_jax.evaluate import main as evaluate
from bootpig_jax.evaluation.datasets import open_dataset
from bootpig_jax.sampling.picture_settings import read_picture_settings
from bootpig_jax.sampling.pipeline import BootPIGPipeline
from bootpig_jax.training.metrics import read_history
from bootpig_jax.web import study
from bootpig_jax.web.votes import Database, arrange
from bootpig_jax.yaml_config import load_config
from data_gen.run import parse_arguments
from data_gen.run import run as generate

ARCHIVE = Path(__file__).parent / "fixtures_8eb1dfc" / "fixtures.tar.xz"
EXPECTED = Path("expected")


@pytest.fixture(autouse=True)
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything, for this test alone, in the working folder: all paths in it are relative."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def assert_same_picture(drawn: Path | Image.Image, stored: Path) -> None:
    """To one of 255, in every pixel."""
    image = Image.open(drawn) if isinstance(drawn, Path) else drawn
    pixels, expected = (np.asarray(one, np.int32) for one in (image, Image.open(stored)))
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= 1


def test_a_run_goes_on_from_its_checkpoint() -> None:
    before = read_history(Path("run"))
    bootpig_jax.train.main(["--config", "train.yaml", "steps=4", "checkpoint.resume=must"])
    history = read_history(Path("run"))
    assert history[:2] == before
    losses = {str(row["step"]): row["loss"] for row in history}
    assert losses == pytest.approx(read(EXPECTED / "history.json"), rel=1e-5)


def test_an_export_draws_the_same_picture() -> None:
    pipeline = BootPIGPipeline.from_pretrained("model", bootpig="run")
    (drawn,) = pipeline(
        "a dog in the snow",
        references=[Image.open("inputs/a.png"), Image.open("inputs/b.png")],
        num_inference_steps=4,
        segmenter="keying",
        seed=7,
    )
    assert_same_picture(drawn, Path("pictures/references/000_00.png"))


@pytest.mark.parametrize("kind", ["references", "text", "room"])
def test_a_picture_is_drawn_again(kind: str) -> None:
    stored = Path("pictures", kind, "000_00.png")
    sample.main(["--from-png", str(stored), "--output", "again"])
    assert_same_picture(Path("again/000_00.png"), stored)
    settings, _ = read_picture_settings(stored)
    assert read_picture_settings("again/000_00.png")[0].draws_the_same_as(settings)


def test_jobs_that_are_half_done_are_completed() -> None:
    done = {path: path.read_bytes() for path in Path("jobs").rglob("*.png")}
    assert len(done) == 3
    sample.main(
        ["--model", "model", "--bootpig", "run", "--jobs", "jobs.jsonl", "--output", "jobs"]
        + ["--num-images", "2", "--steps", "4", "--segmenter", "none", "--batch-size", "1"]
    )
    assert {path: path.read_bytes() for path in done} == done
    assert_same_picture(Path("jobs/snow/01.png"), EXPECTED / "jobs/snow/01.png")
    assert len([path for path in Path("jobs").rglob("*") if path.is_file()]) == 4


def test_a_cache_gives_its_records_in_their_order() -> None:
    config = load_config(TrainConfig, "train.yaml", ["data.cache=cache", "data.cache_copies=2"])
    contents = bootpig_jax.train.cache_contents(config, bootpig_jax.train.base_sha256(config))
    source = CacheSource(Path("cache"), contents)
    loader = make_cached_loader(Path("cache"), contents, batch_size=4, seed=0)
    found = {
        name: np.stack([source[index][name] for index in range(len(source))]) for name in source[0]
    }
    for number in range(2):
        found |= {f"batch{number}.{name}": array for name, array in next(loader).items()}
    with np.load(EXPECTED / "cache.npz") as expected:
        assert found.keys() == set(expected)
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_data_that_is_half_made_ends_in_the_same_bytes() -> None:
    made = sorted(Path("triplets").glob("*.done.json"))
    reports = {path: path.read_bytes() for path in made}
    assert len(made) == 2
    # Its captions are all there: the language model, which is gone, is not asked.
    assert generate(parse_arguments(["--config", "data_gen.yaml"])) == 0
    assert {path: path.read_bytes() for path in made} == reports, "these were made again"
    expected = [path for path in (EXPECTED / "triplets").rglob("*") if path.is_file()]
    expected = [path for path in expected if path.parent.name != ".locks"]
    assert len(expected) == 8
    for path in expected:
        found = Path("triplets") / path.relative_to(EXPECTED / "triplets")
        assert found.read_bytes() == path.read_bytes(), found.name
    split = read_split("triplets")
    readers = [ShardReader(*shard) for shard in zip(split.paths, strict=True)]
    captions = [decode(reader[i]).caption for reader in readers for i in range(len(reader))]
    assert len(captions) == split.num_records == 10
    assert captions[0] == "A photo of a red teapot, standing in the kitchen"


def test_scores_make_the_same_report() -> None:
    def figures(path: Path) -> dict[str, Any]:
        return {
            f"{table['title']}, {row['name']}, {column}": cell["value"]
            for table in read(path)["tables"]
            for row in table["rows"]
            for column, cell in zip(table["columns"], row["cells"], strict=True)
            if isinstance(cell, dict) and cell["value"] is not None
        }

    scores = ["--scores", "scores/ours.json", "scores/theirs.json", "--data", "dataset"]
    assert evaluate(["report", *scores, "--output", "report"]) == 0
    found, expected = figures(Path("report/report.json")), figures(EXPECTED / "report.json")
    assert found.keys() >= expected.keys() and len(expected) > 20
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_a_study_takes_the_next_vote() -> None:
    expected = read(EXPECTED / "votes.json")
    dataset = open_dataset("dreambooth", Path("dataset"))
    pairs = study.find_pairs(dataset, Path("methods/ours"), Path("methods/theirs"))
    database = Database.create(Path("votes.sqlite"), "ours", "theirs")
    seen = database.seen_by("Bob")
    assert database.seen_by("Ada") == pairs.keys() and len(seen) == 5
    order = arrange(database.key, "Bob", list(pairs))
    pair, a_left = next((pair, a_left) for pair, a_left in order if pair not in seen)
    assert [pair, a_left] == expected["next"]

    study.main(["--database", "votes.sqlite", "--export", "before.json"])
    assert read(Path("before.json")) == {k: v for k, v in expected.items() if k != "next"}
    database.add("Bob", pair, a_left, {"subject": "left", "prompt": "right"})
    study.main(["--database", "votes.sqlite", "--export", "after.json"])
    added = read(Path("after.json"))["votes"][len(expected["votes"]) :]
    winners = {vote["question"]: vote["winner"] for vote in added}
    assert winners == (
        {"subject": "a", "prompt": "b"} if a_left else {"subject": "b", "prompt": "a"}
    )
