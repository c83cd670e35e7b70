"""bfloat16, the precision of accelerators, and what float32 means there.

Rounding to bfloat16 is 2^-9 of a number at most. How it grows is no theorem but measured, on tiny
models with random weights: each budget is twice what was found, and docs/precision.md has them all.
"""

import re
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bootpig_jax.bootpig import BootPIG
from bootpig_jax.checkpoints.diffusers import StableDiffusion, load_stable_diffusion
from bootpig_jax.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainableConfig,
    TrainConfig,
)
from bootpig_jax.sampling.encoding import decode
from bootpig_jax.sampling.pipeline import BootPIGPipeline
from bootpig_jax.training.flops import equations
from bootpig_jax.training.optimizer import make_optimizer
from bootpig_jax.training.sharding import make_mesh
from bootpig_jax.training.step import Pictures, init_state, make_train_step, take_apart

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


# Relative errors, the difference's norm over the norm in float32; pixels in units of 1 of 255.
BUDGETS = {
    "UNet's prediction": 0.03,
    "UNet's features": 0.03,
    "VAE's latents": 0.025,
    "VAE's pictures": 0.03,
    "text features": 0.013,
    "loss": 0.002,
    "gradient": 0.035,
    "loss after five updates": 0.0005,
    "change of the weights in five updates": 0.055,
    "latents after ten guided steps": 0.055,
    "pixels after ten guided steps": 2.8,
}


def error(found: Any, exact: Any) -> float:
    """The relative error of one array or of a tree's arrays together."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True))
    squares = [
        (np.sum((np.float64(f) - np.float64(e)) ** 2), np.sum(np.float64(e) ** 2)) for f, e in pairs
    ]
    return float(np.sqrt(sum(s for s, _ in squares) / sum(s for _, s in squares)))


def check(name: str, found: float) -> None:
    print(f"{name}: {found:.2e}")
    assert BUDGETS[name] / 20 < found < BUDGETS[name], f"{name}: {found}"


@pytest.fixture(scope="module")
def in_both(model_folder: Path) -> tuple[StableDiffusion, StableDiffusion]:
    """A model in bfloat16, weights too, and in float32."""
    half = jnp.dtype(jnp.bfloat16)
    return (
        load_stable_diffusion(model_folder, dtype=half, param_dtype=half),
        load_stable_diffusion(model_folder),
    )


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_networks_in_bfloat16(in_both: tuple[StableDiffusion, StableDiffusion]) -> None:
    def outputs(model: StableDiffusion, dtype: Any) -> dict[str, Any]:
        def run(function: Any, *arrays: Any) -> Any:
            inputs = [jnp.asarray(x) for x in arrays]
            inputs = [x.astype(dtype) if x.dtype == jnp.float32 else x for x in inputs]
            return jax.device_get(jax.jit(lambda *x: function(*x))(*inputs))

        width = model.unet.config.cross_attention_dim
        latents, t = random(0, 2, 8, 8, 4), np.array([10, 700])
        prediction, features = run(model.unet, latents, t, random(1, 2, 77, width))
        return {
            "UNet's prediction": prediction,
            "UNet's features": features,
            "VAE's latents": run(model.vae.encode, random(2, 2, 16, 16, 3))[0],
            "VAE's pictures": run(model.vae.decode, random(3, 2, 8, 8, 4)),
            "text features": run(model.text_encoder, model.tokenizer(["a dog in the snow"])),
        }

    half, single = outputs(in_both[0], jnp.bfloat16), outputs(in_both[1], jnp.float32)
    for name in half:
        check(name, error(half[name], single[name]))


def test_training_in_bfloat16(model_folder: Path) -> None:
    """Loss, gradient and five updates, with float32 masters, as `train` makes them."""

    def train(precision: str) -> tuple[Any, Any, list[float]]:
        dtype = jnp.dtype(precision)
        model = load_stable_diffusion(model_folder, dtype=dtype)
        config = TrainConfig(
            model=ModelConfig(base="unused"),
            data=DataConfig(dir=Path("unused"), image_size=16),
            output_dir=Path("unused"),
            batch_size=8,
            optimizer=OptimizerConfig(lr_reference=1e-3, lr_rsa=1e-3, eps=1e-4, clip_norm=1e6),
        )
        graphs, trainable, frozen = take_apart(
            model, BootPIG.from_unet(model.unet), TrainableConfig(), dtype
        )
        first = jax.device_get(trainable)
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        optimizer = make_optimizer(config.optimizer, config.steps)
        state = init_state(trainable, optimizer, mesh, 1)
        step = make_train_step(graphs, optimizer, config, mesh, state, frozen)
        rng = np.random.default_rng(4)
        pictures = Pictures(
            target=rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
            reference=rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
            caption=model.tokenizer([f"dog {i}" for i in range(8)]),
            reference_caption=None,
        )
        losses, moments = [], None
        for _ in range(5):
            state, metrics = step(state, frozen, pictures)
            losses.append(float(metrics["loss"]))
            if moments is None:  # of the first update: the gradient times 1 - b1
                leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state.optimizer))
                moments = [leaf for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)]
        change = jax.tree.map(lambda a, b: a - b, jax.device_get(state.trainable), first)
        return moments, change, losses

    moments, change, losses = train("bfloat16")
    exact_moments, exact_change, exact_losses = train("float32")
    check("loss", abs(losses[0] / exact_losses[0] - 1))
    check("gradient", error(moments, exact_moments))
    check("loss after five updates", abs(losses[-1] / exact_losses[-1] - 1))
    check("change of the weights in five updates", error(change, exact_change))


def test_sampling_in_bfloat16(model_folder: Path, bootpig_folder: Path) -> None:
    rng = np.random.default_rng(6)
    reference = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))

    def draw(precision: Any) -> tuple[np.ndarray, np.ndarray]:
        pipe = BootPIGPipeline.from_pretrained(model_folder, bootpig_folder, precision=precision)
        seen = {}

        def keep(vae: Any, latents: Any) -> Any:
            seen["latents"] = np.asarray(latents, np.float32)
            return decode(vae, latents)

        with mock.patch("bootpig_jax.sampling.pipeline.decode", keep):
            pictures = pipe("a dog", [reference], num_inference_steps=10, segmenter="none")
        return seen["latents"], np.stack([np.asarray(p, np.float32) for p in pictures])

    latents, pixels = draw("bfloat16")
    exact_latents, exact_pixels = draw("float32")
    check("latents after ten guided steps", error(latents, exact_latents))
    check("pixels after ten guided steps", float(np.abs(pixels - exact_pixels).mean()))


def test_the_budgets_stand_in_the_docs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "precision.md").read_text()
    rows = re.findall(r"^\| ([^|]+?) \| [^|]+ \| ([\d.]+) \|$", text, re.MULTILINE)
    assert {name: float(budget) for name, budget in rows} == BUDGETS
