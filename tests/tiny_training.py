"""A run of `python -m bootpig_jax.train` that is small enough to be followed number by number."""

from pathlib import Path
from typing import Any

import numpy as np
from diffusers import UNet2DConditionModel

from bootpig_jax.data import records
from tests.tiny_models import UNET, Kind, randomised, save_tiny_model

SIZE, LATENTS, COUNT = 16, (8, 8, 4), 32
UPDATES, BATCH, PARTS, SEED, DROPOUT = 3, 16, 2, 7, 0.4
RATES = {"base": 0.004, "reference": 0.01}
# Below the first updates' norms, above the last one's.
CLIP_NORM = 0.35
# Adam is all but blind to the gradients' size unless this is not much below it; and float32's
# rounding of gradients that are almost 0 would be blown up.
EPSILON = 1e-3

# One resolution: what is compiled, is compiled in every run of the tests.
ONE_RESOLUTION: dict[str, Any] = UNET | {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "attention_head_dim": 2,
    "use_linear_projection": True,
}


def save_model(folder: Path, kind: Kind) -> Path:
    save_tiny_model(folder, kind)
    randomised(UNet2DConditionModel(**ONE_RESOLUTION)).save_pretrained(folder / "unet")
    return folder


def picture_and_mask(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks in random colours, some of them the subject: no picture is its own mirror image."""
    rng = np.random.default_rng(index)

    def enlarged(blocks: np.ndarray) -> np.ndarray:
        return blocks.repeat(SIZE // 4, axis=0).repeat(SIZE // 4, axis=1)

    subject = rng.random((4, 4)) < 0.4
    subject[1, 2] = True
    return enlarged(rng.integers(0, 256, (4, 4, 3), np.uint8)), enlarged(subject)


def make_record(index: int) -> records.Record:
    picture, mask = picture_and_mask(index)
    return records.Record(
        target=records.encode_picture(picture),
        mask=records.encode_mask(mask),
        caption=f"A photo of thing {index}, {'in the snow ' * (1 + index % 3)}and fog",
        object=f"thing {index}",
        seed=index,
        id=str(index),
        box=records.bounding_box(mask),
        score=1.0,
    )


def save_data(folder: Path) -> Path:
    folder.mkdir()
    bounds = (0, 10, COUNT)
    for shard, (first, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        name = records.shard_name("blocks", "train", shard, 2)
        records.write_shard(folder / name, map(make_record, range(first, end)))
    records.write_dataset_metadata(folder, "blocks", {"train": np.diff(bounds).tolist()})
    return folder


def arguments(model: Path, data: Path, output: Path, **changes: Any) -> list[str]:
    """The command line of a run."""
    fields = {
        "model.base": model,
        "data.dir": data,
        "data.image_size": SIZE,
        "output_dir": output,
        "steps": UPDATES,
        "batch_size": BATCH,
        "accumulation": PARTS,
        "seed": SEED,
        "precision": "float32",
        "ema_decay": 0.5,
        "reference_dropout": DROPOUT,
        "caption_dropout": DROPOUT,
        "optimizer.lr_reference": RATES["reference"],
        "optimizer.lr_rsa": RATES["base"],
        "optimizer.eps": EPSILON,
        "optimizer.clip_norm": CLIP_NORM,
        "logging.every": 1,
        "logging.grid_every": 0,
    }
    return [f"{name}={value}" for name, value in (fields | changes).items()]
