"""Order and share: every sample once an epoch over all processes, in one order however many."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import bootpig_jax.train
from bootpig_jax.data.cache import CacheWriter, Contents, make_cached_loader
from bootpig_jax.data.pipeline import make_loader
from tests.training_helpers import save_tiny_data

RECORDS = 24
# A process's stream of samples, by their numbers: (batch size, its index, the number of processes).
Stream = Callable[[int, int, int], Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_data(tmp_path_factory.mktemp("data") / "tiny", RECORDS)


@pytest.fixture(params=["records", "cache"])
def stream(request: pytest.FixtureRequest, data: Path, tmp_path: Path) -> Stream:
    if request.param == "records":
        return lambda size, index, count: (
            [int(identity) for identity in batch["id"]]
            for batch in make_loader(
                data,
                batch_size=size,
                image_size=16,
                seed=3,
                process_index=index,
                process_count=count,
                num_threads=0,
            )
        )
    contents = Contents("", "", "", "", 0, "", "", 1, 0, "float32")
    shapes = {"target": (RECORDS, 1), "reference": (RECORDS, 1, 1)}
    numbers = np.arange(RECORDS, dtype=np.float32)[:, None]
    CacheWriter(tmp_path, contents, shapes).append(
        {"target": numbers, "reference": numbers[..., None]}
    )
    return lambda size, index, count: (
        batch["target"][:, 0].astype(int).tolist()
        for batch in make_cached_loader(
            tmp_path,
            contents,
            batch_size=size,
            seed=3,
            process_index=index,
            process_count=count,
            num_threads=0,
        )
    )


def joined(stream: Stream, size: int, count: int, samples: int) -> list[int]:
    """What all processes see together, batch after batch, the first process's part first."""
    parts = [stream(size, index, count) for index in range(count)]
    seen: list[int] = []
    while len(seen) < samples:
        for part in parts:
            seen += next(part)
    return seen[:samples]


def test_every_sample_once_an_epoch_and_in_one_order_however_many_processes(
    stream: Stream,
) -> None:
    expected = joined(stream, 1, 1, 3 * RECORDS)
    for epoch in np.reshape(expected, (3, RECORDS)):
        assert sorted(epoch) == list(range(RECORDS)) and list(epoch) != sorted(epoch)
    # Also where neither batches nor processes divide an epoch.
    for size, count in ((4, 1), (5, 1), (1, 2), (2, 3), (5, 2), (1, 7)):
        assert joined(stream, size, count, 3 * RECORDS) == expected, (size, count)


class SecondOfThree:
    """Stands for jax where three processes train."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)

    def process_index(self) -> int:
        return 1

    def process_count(self) -> int:
        return 3


class Asked(Exception):
    """Ends a run at the loader."""


@pytest.mark.parametrize("loader", ["make_loader", "make_cached_loader"])
def test_training_gives_each_process_its_share(
    data: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loader: str,
) -> None:
    asked: dict[str, Any] = {}

    def ask(*_: Any, **how: Any) -> None:
        asked.update(how)
        raise Asked

    monkeypatch.setattr(bootpig_jax.train, "jax", SecondOfThree())
    monkeypatch.setattr(bootpig_jax.train, loader, ask)
    more = [f"data.cache={tmp_path / 'cache'}"] if loader == "make_cached_loader" else []
    with pytest.raises(Asked):
        bootpig_jax.train.main(
            [
                *(f"model.base={model_folder}", f"data.dir={data}", "data.image_size=16"),
                *(f"output_dir={tmp_path / 'run'}", "batch_size=24", "seed=5", *more),
            ]
        )
    wanted = {"batch_size": 8, "seed": 5, "process_index": 1, "process_count": 3}
    assert wanted.items() <= asked.items()
