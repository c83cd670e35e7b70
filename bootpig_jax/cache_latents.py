"""Computes latents and text features of a dataset once, for training runs without VAE and text.

    python -m bootpig_jax.cache_latents --config configs/paper.yaml data.cache=FOLDER
    python -m bootpig_jax.train         --config configs/paper.yaml data.cache=FOLDER

A run that was stopped goes on with the same command. `bootpig_jax/data/cache.py` says what is in
the folder; `data.cache_copies` is the number of augmented copies of each reference.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bootpig_jax.checkpoints.diffusers import open_stable_diffusion
from bootpig_jax.checkpoints.stored import read_weights
from bootpig_jax.config import TrainConfig
from bootpig_jax.data.cache import CacheWriter, name_weights
from bootpig_jax.data.pipeline import RecordSource, read_copies
from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.sampling.conditioning import Conditioning
from bootpig_jax.train import (
    UNNAMED_WEIGHTS,
    base_sha256,
    cache_contents,
    check_image_size,
    say,
    training_dtype,
)
from bootpig_jax.training.loop import to_pictures
from bootpig_jax.training.step import Encoded, encode
from bootpig_jax.yaml_config import parse_command_line

BATCH_SIZE = 16  # pictures that go through the VAE together


def cache_latents(config: TrainConfig) -> None:
    """Fills `data.cache`, from where it stopped before.

    Raises:
      UserError: the dataset or the model is missing or damaged, or the folder cannot be written.
    """
    if config.data.cache is None:
        raise UserError("data.cache: name the folder to write")
    source = RecordSource(config.data.dir, config.data.split)
    count = len(source)
    contents = cache_contents(config, base_sha256(config))
    if name_weights(config.data.cache, contents):
        say(UNNAMED_WEIGHTS.format(f"data.cache {config.data.cache}", config.model.base))
    dtype = training_dtype(config)
    model = open_stable_diffusion(
        config.model.base, dtype=dtype, param_dtype=dtype, allow_pickle=config.model.allow_pickle
    )
    check_image_size(config.data.image_size, model)
    vae, text_encoder = read_weights(model.vae), read_weights(model.text_encoder)
    conditioning = Conditioning(
        reference_timestep=config.reference_timestep,
        reference_key_scale=config.reference_key_scale,
        reference_caption=config.reference_caption,
    )
    side = config.data.image_size // model.vae.config.downsampling
    posterior = (2, side, side, model.vae.config.latent_channels)
    text = (
        model.text_encoder.config.max_position_embeddings,
        model.text_encoder.config.hidden_size,
    )
    shapes = {
        "target": (count, *posterior),
        "reference": (count, config.data.cache_copies, *posterior),
        "text": (count, *text),
    }
    if config.reference_caption != "target":
        shapes["reference_text"] = (count, *text)
    writer = CacheWriter(config.data.cache, contents, shapes)

    compiled = jax.jit(encode)
    with tqdm(total=count, initial=writer.done, unit="record", dynamic_ncols=True) as progress:
        while writer.done < count:
            rows = range(writer.done, min(writer.done + BATCH_SIZE, count))
            read = read_copies(
                source,
                rows,
                copies=config.data.cache_copies,
                image_size=config.data.image_size,
                augmentation=config.data.augmentation,
                seed=config.seed,
            )
            pictures = [to_pictures(batch, model.tokenizer, conditioning) for batch in read]
            batches = [compiled(vae, text_encoder, copy) for copy in pictures]
            writer.append(_arrays(batches, dtype))
            progress.update(len(rows))
    print(config.data.cache)


def _arrays(copies: Sequence[Encoded], dtype: jnp.dtype) -> dict[str, np.ndarray]:
    """Joins what the same records became with each copy of their references."""

    def moments(posterior: object) -> np.ndarray:
        return np.stack([np.asarray(leaf, dtype) for leaf in jax.tree.leaves(posterior)], axis=1)

    first = copies[0]
    arrays = {
        "target": moments(first.target),
        "reference": np.stack([moments(copy.reference) for copy in copies], axis=1),
        "text": np.asarray(first.text, dtype),
    }
    if first.reference_text is not None:
        arrays["reference_text"] = np.asarray(first.reference_text, dtype)
    return arrays


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cache_latents(
        parse_command_line(
            TrainConfig,
            argv,
            prog="python -m bootpig_jax.cache_latents",
            description="Computes latents and text features of a training dataset once.",
        )
    )


if __name__ == "__main__":
    run_cli(main)
