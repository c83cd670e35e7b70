"""Opens a dataset that data_gen wrote with TensorFlow Datasets and compares every field.

    python tests/tfds_check.py FOLDER

Runs in an environment with TensorFlow, and imports nothing of this project. The folder is what
`tfds_dump.py` wrote.
"""

import base64
import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds


def main(folder: Path) -> None:
    builder = tfds.builder_from_directory(folder / "data")
    expected = json.loads((folder / "records.json").read_text())
    assert builder.info.splits["train"].num_examples == len(expected) > 0
    options = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    raw = {"target": tfds.decode.SkipDecoding(), "mask": tfds.decode.SkipDecoding()}
    decoded = as_list(builder.as_dataset(split="train", read_config=options))
    encoded = as_list(builder.as_dataset(split="train", read_config=options, decoders=raw))
    assert len(decoded) == len(encoded) == len(expected)
    for ours, pixels, data in zip(expected, decoded, encoded, strict=True):
        assert set(pixels) | {"target_pixels", "mask_pixels"} == set(ours)
        for name in ("caption", "object", "id"):
            assert pixels[name].decode() == ours[name], name
        assert pixels["seed"] == ours["seed"] and pixels["seed"].dtype == np.int64
        assert pixels["score"] == np.float32(ours["score"])
        np.testing.assert_array_equal(pixels["box"], np.float32(ours["box"]))
        for name in ("target", "mask"):
            assert data[name] == base64.b64decode(ours[name]), name
        target, mask = pixels["target"], pixels["mask"]
        assert target.dtype == mask.dtype == np.uint8
        ours_target = np.asarray(ours["target_pixels"])
        exact = tf.io.decode_jpeg(data["target"], dct_method="INTEGER_ACCURATE").numpy()
        assert np.abs(exact.astype(int) - ours_target).max() <= 1
        # TFDS decodes faster and less exactly: by 1 on average on pictures, by 4 on this noise.
        assert np.abs(target.astype(int) - ours_target).mean() <= 6
        np.testing.assert_array_equal(mask[..., 0] > 0, np.asarray(ours["mask_pixels"]) > 0)
    half = as_list(builder.as_dataset(split="train[50%:]", read_config=options))
    assert [one["id"] for one in half] == [one["id"] for one in decoded[-len(half) :]]
    assert len(half) == len(expected) - round(len(expected) / 2)
    print(f"TensorFlow reads all {len(expected)} records as we do")


def as_list(dataset) -> list:
    return list(tfds.as_numpy(dataset))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
