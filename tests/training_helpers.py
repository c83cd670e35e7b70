"""A tiny dataset for the tests of training."""

from pathlib import Path

import numpy as np

from bootpig_jax.data import records

IMAGE_SIZE = 16


def save_tiny_data(folder: Path, count: int = 24) -> Path:
    """Coloured squares on coloured grounds, in two shards."""
    rng = np.random.default_rng(0)

    def record(index: int) -> records.Record:
        picture = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        picture[:] = rng.integers(0, 256, 3)
        mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
        y, x = rng.integers(0, 8, 2)
        mask[y : y + 8, x : x + 8] = True
        picture[mask] = rng.integers(0, 256, 3)
        letter = chr(ord("a") + index % 26)
        return records.Record(
            target=records.encode_picture(picture),
            mask=records.encode_mask(mask),
            caption=f"a {letter}, b c",
            object=letter,
            seed=index,
            id=str(index),
            box=records.bounding_box(mask),
            score=1.0,
        )

    folder.mkdir(parents=True)
    for shard in range(2):
        name = records.shard_name("tiny", "train", shard, 2)
        half = range(shard * count // 2, (shard + 1) * count // 2)
        records.write_shard(folder / name, [record(index) for index in half])
    records.write_dataset_metadata(folder, "tiny", {"train": [count // 2, count // 2]})
    return folder
