"""bfloat16, the precision of accelerators, and what float32 means there.

Rounding to bfloat16 is 2^-9 of a number at most. How it grows is no theorem but measured, on tiny
models with random weights: each budget is twice what was found, and docs/precision.md has them all.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bootpig_jax.checkpoints.diffusers import StableDiffusion, load_stable_diffusion
from bootpig_jax.training.flops import equations

PRODUCTS = ("dot_general", "conv_general_dilated")


def programs(model: StableDiffusion) -> dict[str, Any]:
    """The networks as programs, of the shapes that they are given."""
    text = jnp.zeros((2, 77, model.unet.config.cross_attention_dim))
    latents = jnp.zeros((2, 8, 8, 4))
    return {
        "unet": jax.make_jaxpr(model.unet)(latents, jnp.zeros(2), text),
        "encoder": jax.make_jaxpr(model.vae.encode)(jnp.zeros((1, 16, 16, 3))),
        "decoder": jax.make_jaxpr(model.vae.decode)(latents),
        "text_encoder": jax.make_jaxpr(model.text_encoder)(jnp.zeros((1, 77), jnp.int32)),
    }


def products(program: Any) -> list[Any]:
    return [e for e, _ in equations(program) if e.primitive.name in PRODUCTS]


def test_float32_is_float32_on_every_device(model_folder: Path) -> None:
    """Each product asks for it: a GPU would take TF32, a TPU bfloat16."""
    highest = jax.lax.Precision.HIGHEST
    for name, program in programs(load_stable_diffusion(model_folder)).items():
        asked = [e.params["precision"] for e in products(program)]
        assert asked and all(p == (highest, highest) for p in asked), name


def test_bfloat16_is_left_to_the_device(model_folder: Path) -> None:
    """But for the UNet's last convolution, which is in float32, as is what it returns."""
    half = jnp.dtype(jnp.bfloat16)
    model = load_stable_diffusion(model_folder, dtype=half, param_dtype=half)
    for name, program in programs(model).items():
        of = {e.outvars[0].aval.dtype: e for e in products(program) if e.params["precision"]}
        assert len(of) == (name == "unet"), name
    unet = programs(model)["unet"]
    assert unet.out_avals[0].dtype == jnp.float32
    last = [e for e in products(unet) if e.primitive.name == "conv_general_dilated"][-1]
    assert [x.aval.dtype for x in last.invars] == [jnp.float32, jnp.float32]
