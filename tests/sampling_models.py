"""A tiny Stable Diffusion and a tiny BootPIG with random weights, on disk."""

import functools
import json
import math
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bootpig_jax.checkpoints.diffusers import save_network, save_unet
from bootpig_jax.models.shapes import OneKey
from bootpig_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from bootpig_jax.models.unet import UNet, UNetConfig
from bootpig_jax.models.vae import VAE, VAEConfig
from bootpig_jax.sampling.conditioning import Conditioning
from tests.tokenizer_folder import write_tokenizer

Network = TypeVar("Network", UNet, VAE, TextEncoder)

UNET = UNetConfig(
    block_out_channels=(8, 16),
    cross_attention_dim=16,
    attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    use_linear_projection=True,
    sample_size=8,
)
VAE_CONFIG = VAEConfig(block_out_channels=(8, 8), norm_num_groups=4, sample_size=16)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@functools.cache
def random_unet(seed: int) -> UNet:
    return random_network(UNet, UNET, seed)


def random_network(kind: type[Network], config: Any, seed: int) -> Network:
    """Random weights everywhere, drawn by NumPy: nothing is compiled, no bias or layer is zero."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.standard_normal(leaf.shape, np.float32)
        name = jax.tree_util.keystr(path)
        if "kernel" in name:
            return jnp.asarray(noise / math.sqrt(math.prod(leaf.shape[:-1])))
        return jnp.asarray(0.1 * noise + ("scale" in name))

    graph, shapes = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=OneKey(0))))
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, shapes))


def save_stable_diffusion(folder: Path) -> Path:
    tokenizer = write_tokenizer(folder / "tokenizer", pad="!", kind="vocab.json", max_length=16)
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    text = TextEncoderConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(vocabulary),
        max_position_embeddings=16,
    )
    save_unet(folder / "unet", random_unet(1))
    vae = random_network(VAE, VAE_CONFIG, 2)
    save_network(folder / "vae", vae, "AutoencoderKL", "diffusion_pytorch_model")
    encoder = random_network(TextEncoder, text, 3)
    save_network(folder / "text_encoder", encoder, "CLIPTextModel", "model")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder


def save_bootpig(folder: Path, conditioning: Conditioning | None = None) -> Path:
    save_unet(folder / "base_unet", random_unet(4))
    save_unet(folder / "ref_unet", random_unet(5))
    if conditioning is not None:
        conditioning.write(folder)
    return folder
