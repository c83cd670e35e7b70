"""The compiled loop equals Eq. 4 written out step by step, with every noise given."""

from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import Array

from bootpig_jax.bootpig import reference_features
from bootpig_jax.checkpoints.diffusers import load_stable_diffusion
from bootpig_jax.diffusion.schedule import NoiseSchedule, add_noise
from bootpig_jax.diffusion.solvers import make_solver
from bootpig_jax.models.blocks import References
from bootpig_jax.sampling import denoise as denoise_module
from bootpig_jax.sampling.denoise import denoise, denoise_with_references
from tests.sampling_models import SCHEDULER, random_unet

STEPS, SETS, EACH, K = 3, 2, 2, 2
BATCH = SETS * EACH
SCALES = {"image_guidance_scale": 3.0, "guidance_scale": 5.0}


def normal(number: int, *shape: int) -> Array:
    return jax.random.normal(jax.random.key(number), shape)


@pytest.fixture(scope="module")
def arrays() -> dict[str, Any]:
    return {
        "initial_latents": normal(0, BATCH, 8, 8, 4),
        "text": normal(1, BATCH, 16, 16),
        "empty_text": normal(2, 1, 16, 16),
        "reference_latents": normal(3, SETS, K, 8, 8, 4),
        "reference_text": normal(4, SETS, 16, 16),
        "reference_noise": normal(5, STEPS, SETS, K, 8, 8, 4),
    }


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule.from_config(SCHEDULER)


@jax.jit
def base_unet(x: Array, t: Array, text: Array, references: References | None) -> Array:
    return random_unet(4)(x, t, text, references)[0]


@jax.jit
def features_of(latents: Array, t: Array, text: Array) -> tuple[Array, ...]:
    return reference_features(random_unet(5), latents, t, text)


def written_out(
    arrays: dict[str, Any], schedule: NoiseSchedule, clean: bool, key_scale: float
) -> Array:
    """Eq. 4, one network call for each term, each sample with its own references' features."""
    solver = make_solver("unipc", schedule, STEPS)
    state = solver.init(arrays["initial_latents"])
    r = jnp.repeat(arrays["reference_latents"], EACH, axis=0)
    r_text = jnp.repeat(arrays["reference_text"], EACH, axis=0)
    empty = jnp.tile(arrays["empty_text"], (BATCH, 1, 1))
    for i, step in enumerate(solver.timesteps.tolist()):
        t = jnp.full((BATCH,), step)
        if clean:
            features = features_of(r, jnp.zeros_like(t), r_text)
        else:
            noise = jnp.repeat(arrays["reference_noise"][i], EACH, axis=0)
            features = features_of(add_noise(schedule, r, noise, t), t, r_text)
        seen = References(features=features, key_scale=key_scale, strategy="softmax")
        x = solver.latents(state)
        u_sa = base_unet(x, t, empty, None)
        u_rsa = base_unet(x, t, empty, seen)
        u_rsa_text = base_unet(x, t, arrays["text"], seen)
        output = u_sa + 3.0 * (u_rsa - u_sa) + 5.0 * (u_rsa_text - u_rsa)
        state = solver.step(state, output, i)
    return solver.latents(state)


@pytest.mark.parametrize("reference_timestep", ["same", 0])
def test_loop_equals_the_equations(
    arrays: dict[str, Any], schedule: NoiseSchedule, reference_timestep: Any
) -> None:
    clean = reference_timestep == 0
    given = arrays | {"reference_noise": None} if clean else arrays
    ours = denoise_with_references(
        random_unet(4),
        random_unet(5),
        **given,
        **SCALES,
        solver=make_solver("unipc", schedule, STEPS),
        schedule=schedule,
        strategy="softmax",
        reference_timestep=reference_timestep,
        reference_key_scale=1.1 if clean else 1.0,
    )
    expected = written_out(arrays, schedule, clean, key_scale=1.1 if clean else 1.0)
    difference = jnp.linalg.norm(ours - expected) / jnp.linalg.norm(expected)
    assert difference < 1e-5


def test_reference_noise_must_fit(arrays: dict[str, Any], schedule: NoiseSchedule) -> None:
    unet = random_unet(4)
    options: dict[str, Any] = {
        "solver": make_solver("ddim", schedule, STEPS),
        "schedule": schedule,
    }
    with pytest.raises(ValueError, match="reference_noise"):
        denoise_with_references(unet, unet, **arrays, **options, reference_timestep=0)
    with pytest.raises(ValueError, match="cannot share"):
        wrong = {name: arrays[name][:3] for name in ("initial_latents", "text")}
        denoise_with_references(unet, unet, **(arrays | wrong), **options)


def test_text_to_latents_equals_diffusers(model_folder: Path) -> None:
    theirs = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel.from_pretrained(model_folder / "unet"),
        vae=diffusers.AutoencoderKL.from_pretrained(model_folder / "vae"),
        scheduler=diffusers.UniPCMultistepScheduler.from_config(SCHEDULER),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    latents, text, empty = normal(0, 2, 8, 8, 4), normal(1, 2, 16, 16), normal(2, 1, 16, 16)
    expected = theirs(
        prompt_embeds=torch.tensor(np.asarray(text)),
        negative_prompt_embeds=torch.tensor(np.repeat(empty, 2, axis=0)),
        latents=torch.tensor(np.asarray(latents).transpose(0, 3, 1, 2)),
        num_inference_steps=10,
        guidance_scale=3.0,
        output_type="latent",
    ).images.numpy()
    model = load_stable_diffusion(model_folder)

    def ours(scale: float) -> np.ndarray:
        solver = make_solver("unipc", model.schedule, 10)
        latents_0 = denoise(model.unet, latents, text, empty, solver=solver, guidance_scale=scale)
        return np.asarray(latents_0).transpose(0, 3, 1, 2)

    error = np.linalg.norm(ours(3.0) - expected) / np.linalg.norm(expected)
    assert error < 1e-4
    compiled = denoise_module._denoise._cache_size()
    assert not np.allclose(ours(9.0), expected, rtol=0.1)
    assert denoise_module._denoise._cache_size() == compiled, "a new scale compiled a new program"


def test_no_sample_sees_anothers_set(arrays: dict[str, Any], schedule: NoiseSchedule) -> None:
    options: dict[str, Any] = {
        "solver": make_solver("unipc", schedule, STEPS),
        "schedule": schedule,
        "strategy": "softmax",
    }
    changed_latents = arrays["reference_latents"].at[1].multiply(-1)
    plain, changed = (
        np.asarray(
            denoise_with_references(
                random_unet(4), random_unet(5), **(arrays | change), **SCALES, **options
            )
        )
        for change in ({}, {"reference_latents": changed_latents})
    )
    np.testing.assert_array_equal(plain[:EACH], changed[:EACH])
    assert not np.allclose(plain[EACH:], changed[EACH:])
