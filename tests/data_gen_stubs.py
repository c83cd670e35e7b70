"""Tiny stages without networks, importable by a cluster's actors and by child processes."""

import os
import time
from pathlib import Path

import numpy as np

from bootpig_jax.errors import UserError
from data_gen.config import DataGenConfig
from data_gen.stages import Rejected, Segmentation, Stages

SIDE = 16


class StubPictures:
    """A picture of noise around a bright rectangle, both drawn from the seed alone."""

    model_hash = "stub"

    def draw(self, indices, captions, seeds):
        return [self._draw(index, seed) for index, seed in zip(indices, seeds, strict=True)]

    def _draw(self, index, seed):
        rng = np.random.default_rng(seed)
        picture = rng.integers(0, 40, (SIDE, SIDE, 3), np.uint8)
        picture[4:12, 5:11] += np.uint8(200)
        return Rejected("not_finite") if seed % 9 == 0 else picture


class StubSegmenter:
    """Takes what is bright; finds nothing in some pictures."""

    model_hash = ""

    def segment(self, pictures, objects, seeds):
        return [
            Rejected("empty") if seed % 5 == 0 else Segmentation(picture.min(-1) > 100, 1.0)
            for picture, seed in zip(pictures, seeds, strict=True)
        ]


def make_config(folder: Path, **changes: object) -> DataGenConfig:
    values = {
        "output_dir": folder,
        "dataset": "stub",
        "candidates": 22,
        "candidates_per_shard": 6,
        "pictures": {"model": "unused", "image_size": SIDE, "batch_size": 4},
        "masks": {"filters": {"border": 0.0}},
        "max_attempts": 2,
    }
    return DataGenConfig.model_validate({**values, **changes})


def make_stages(config: DataGenConfig) -> Stages:
    return Stages(StubPictures(), StubSegmenter())


class Trouble(StubPictures):
    """Draws like `StubPictures`, but troubles start with the candidate of a certain index.

    What happened once is remembered in files, which all processes see.
    """

    def __init__(self, output_dir, events):
        self._folder, self._events = output_dir.with_name("happened"), events
        self._folder.mkdir(exist_ok=True)

    def _draw(self, index, seed):
        event = self._events.get(index)
        if event == "poison":
            raise ValueError("<b>this candidate always fails</b>")
        if event is not None and self._first(event):
            if event == "crash":
                os._exit(1)
            if event == "transient":
                raise TimeoutError("once")
        return super()._draw(index, seed)

    def _first(self, event):
        try:
            (self._folder / event).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def make_troubled_stages(config: DataGenConfig) -> Stages:
    """One actor crashes in shard 0, one error passes in shard 1, shard 2 never works."""
    first = [config.shard_indices(shard)[1] for shard in range(3)]
    events = dict(zip(first, ("crash", "transient", "poison"), strict=True))
    return Stages(Trouble(config.output_dir, events), StubSegmenter())


def make_no_stages(config: DataGenConfig) -> Stages:
    raise UserError("pictures.model: no such folder")


class SlowPictures(StubPictures):
    def _draw(self, index, seed):
        time.sleep(0.05)
        return super()._draw(index, seed)


def make_slow_stages(config: DataGenConfig) -> Stages:
    return Stages(SlowPictures(), StubSegmenter())


def shards(folder: Path) -> dict[str, bytes]:
    """The shards and what they show of rejects, by name: all that must not vary between runs."""
    paths = [
        path
        for path in (*folder.iterdir(), *(folder / "rejects").glob("*"))
        if ".tfrecord" in path.name and not path.name.endswith(".done.json")
    ]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
