"""Writes a dataset with data_gen, and what our own reader finds in it as JSON.

    python -m tests.tfds_dump FOLDER

`tfds_check.py` then reads the same dataset in an environment with TensorFlow.
"""

import base64
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from bootpig_jax.data.records import ShardReader, decode, decode_mask, decode_picture, read_split
from data_gen.run import Command, run
from data_gen.stages import Rejected, Stages
from tests import data_gen_stubs as stubs


class NothingInTheThirdBatch(stubs.StubSegmenter):
    """Leaves one shard empty: batches are as large as shards."""

    def __init__(self) -> None:
        self._batches = 0

    def segment(self, pictures, objects, seeds):
        self._batches += 1
        if self._batches == 3:
            return [Rejected("empty") for _ in pictures]
        return super().segment(pictures, objects, seeds)


def make_stages(config):
    return Stages(stubs.StubPictures(), NothingInTheThirdBatch())


def main(folder: Path) -> None:
    pictures = {"model": "unused", "image_size": stubs.SIDE, "batch_size": 8}
    config = stubs.make_config(folder / "data", candidates=40, candidates_per_shard=8)
    config = type(config).model_validate({**config.model_dump(), "pictures": pictures})
    assert run(Command(config), make_stages) == 0
    split = read_split(config.output_dir)
    assert len(split.counts) == 4 and config.num_shards == 5, "one shard is to be empty"
    found = []
    for path in split.paths:
        reader = ShardReader(path)
        for index in range(len(reader)):
            record = decode(reader[index])
            fields = dataclasses.asdict(record)
            fields["target"] = base64.b64encode(record.target).decode()
            fields["mask"] = base64.b64encode(record.mask).decode()
            fields["target_pixels"] = decode_picture(record.target).tolist()
            fields["mask_pixels"] = decode_mask(record.mask).astype(np.uint8).tolist()
            found.append(fields)
    (folder / "records.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
