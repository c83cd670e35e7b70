"""The compiled loop equals Eq. 4 written out step by step, with every noise given."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import Array

from bootpig_jax.bootpig import dead_tail, reference_features
from bootpig_jax.checkpoints.diffusers import load_stable_diffusion
from bootpig_jax.diffusion.schedule import NoiseSchedule, add_noise
from bootpig_jax.diffusion.solvers import make_solver
from bootpig_jax.models.blocks import References
from bootpig_jax.sampling import denoise as denoise_module
from bootpig_jax.sampling.denoise import KeptLatents, denoise, denoise_with_references
from tests.sampling_models import SCHEDULER, UNET, random_unet

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
    arrays: dict[str, Any],
    schedule: NoiseSchedule,
    *,
    clean: bool = False,
    key_scale: float = 1.0,
    guided: Sequence[bool] = (True,) * STEPS,
    reuse: int = 1,
    start_from: Array | None = None,
    kept: KeptLatents | None = None,
) -> Array:
    """Eq. 4, one network call for each term, each sample with its own references' features."""
    solver = make_solver("unipc", schedule, STEPS)
    noise = arrays["initial_latents"]
    if start_from is None:
        state = solver.init(noise)
    else:
        state = solver.start(jnp.broadcast_to(start_from, noise.shape), noise)
    r = jnp.repeat(arrays["reference_latents"], EACH, axis=0)
    r_text = jnp.repeat(arrays["reference_text"], EACH, axis=0)
    empty = jnp.broadcast_to(arrays["empty_text"], arrays["text"].shape)
    steps = solver.timesteps.tolist()
    for i, step in enumerate(steps):
        t = jnp.full((BATCH,), step)
        if kept is not None:
            picture = add_noise(schedule, jnp.broadcast_to(kept.latents, noise.shape), noise, t)
            state = state.at[0].set(jnp.where(kept.mask == 1, state[0], picture))
        if clean:
            features = features_of(r, jnp.zeros_like(t), r_text)
        elif i % reuse == 0:
            reference_noise = jnp.repeat(arrays["reference_noise"][i], EACH, axis=0)
            features = features_of(add_noise(schedule, r, reference_noise, t), t, r_text)
        seen = References(features=features, key_scale=key_scale, strategy="softmax")
        x = solver.latents(state)
        output = u_rsa_text = base_unet(x, t, arrays["text"], seen)
        if guided[i]:
            u_sa = base_unet(x, t, empty, None)
            u_rsa = base_unet(x, t, empty, seen)
            output = u_sa + 3.0 * (u_rsa - u_sa) + 5.0 * (u_rsa_text - u_rsa)
        state = solver.step(state, output, i)
    drawn = solver.latents(state)
    return drawn if kept is None else jnp.where(kept.mask == 1, drawn, kept.latents)


def relative_error(ours: Array, expected: Array) -> float:
    return float(jnp.linalg.norm(ours - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("reference_timestep", ["same", pytest.param(0, marks=pytest.mark.long)])
def test_loop_equals_the_equations(
    arrays: dict[str, Any], schedule: NoiseSchedule, reference_timestep: Any
) -> None:
    clean = reference_timestep == 0
    key_scale = 1.1 if clean else 1.0
    given = arrays | {"reference_noise": None} if clean else arrays
    ours = denoise_with_references(
        random_unet(4),
        random_unet(5),
        **given,
        **SCALES,
        solver=make_solver("unipc", schedule, STEPS),
        strategy="softmax",
        reference_timestep=reference_timestep,
        reference_key_scale=key_scale,
    )
    expected = written_out(arrays, schedule, clean=clean, key_scale=key_scale)
    assert relative_error(ours, expected) < 1e-5


def test_options_equal_the_equations(arrays: dict[str, Any], schedule: NoiseSchedule) -> None:
    """All that can be asked for at once, and step by step."""
    original = normal(6, 1, 8, 8, 4)
    mask = jnp.zeros((1, 8, 8, 1)).at[:, 2:7, 1:5].set(1)
    arrays = arrays | {"empty_text": normal(7, BATCH, 16, 16)}  # negative prompts
    seen: list[tuple[int, Array]] = []

    def draw(**options: Any) -> Array:
        return denoise_with_references(
            random_unet(4),
            random_unet(5),
            **arrays,
            **SCALES,
            solver=make_solver("unipc", schedule, STEPS),
            guidance_interval=(1 / 3, 2 / 3),  # of steps at 0, 1/3 and 2/3, the second
            reuse_features=2,
            kept=KeptLatents(original, mask),
            start_from=original,
            **options,
        )

    ours = draw()
    expected = written_out(
        arrays,
        schedule,
        guided=(False, True, False),
        reuse=2,
        kept=KeptLatents(original, mask),
        start_from=original,
    )
    assert relative_error(ours, expected) < 1e-5
    kept = np.broadcast_to(mask == 0, ours.shape)
    np.testing.assert_array_equal(ours[kept], np.broadcast_to(original, ours.shape)[kept])

    stepped = draw(on_step=lambda done, latents: seen.append((done, latents)))
    assert [done for done, _ in seen] == [1, 2, 3]
    np.testing.assert_array_equal(seen[-1][1], stepped)
    np.testing.assert_allclose(stepped, ours, rtol=1e-5, atol=1e-5)
    assert not np.allclose(seen[1][1], stepped, rtol=0.01)

    def cancel(done: int, latents: Array) -> None:
        seen.append((done, latents))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(on_step=cancel)
    assert [done for done, _ in seen] == [1, 2, 3, 1]


def test_nothing_but_shapes_compiles(arrays: dict[str, Any], schedule: NoiseSchedule) -> None:
    def draw(names: str = "", **options: Any) -> Array:
        other = {name: 0.5 * array for name, array in arrays.items() if name in names.split()}
        return denoise_with_references(
            random_unet(4),
            random_unet(5),
            **(arrays | other),
            **(SCALES | {"solver": make_solver("unipc", schedule, STEPS)} | options),
        )

    def programs() -> int:
        return denoise_module._advance._cache_size() + denoise_module._start._cache_size()

    first = draw()
    compiled = programs()
    cosine = NoiseSchedule.from_config(SCHEDULER | {"beta_schedule": "squaredcos_cap_v2"})
    for drawn in (
        draw("text empty_text reference_text"),
        draw("initial_latents reference_noise"),
        draw("reference_latents"),
        draw(image_guidance_scale=2.0, guidance_scale=4.0),
        draw(reference_key_scale=1.1),
        draw(solver=make_solver("unipc", cosine, STEPS)),
    ):
        assert not np.allclose(first, drawn, rtol=1e-3)
    assert programs() == compiled


def test_the_reference_unets_tail_is_not_in_the_program() -> None:
    graph, weights = nnx.split(random_unet(5))

    def features(weights: nnx.State, *arrays: Array) -> tuple[Array, ...]:
        return reference_features(nnx.merge(graph, weights), *arrays)

    arrays = (normal(3, 1, 1, 8, 8, 4), jnp.zeros(1), normal(4, 1, 16, 16))
    program = jax.jit(features).lower(weights, *arrays).as_text()
    read = re.findall(r"%arg\d+: tensor", program[program.index("@main") :].split("\n")[0])
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(weights)]
    behind = [name for name in names if name.startswith(dead_tail(UNET))]
    assert behind
    assert len(read) == len(names) - len(behind) + len(arrays)


def test_what_does_not_fit_is_refused(arrays: dict[str, Any], schedule: NoiseSchedule) -> None:
    unet = random_unet(4)
    options: dict[str, Any] = {"solver": make_solver("ddim", schedule, STEPS)}
    with pytest.raises(ValueError, match="reference_noise"):
        denoise_with_references(unet, unet, **arrays, **options, reference_timestep=0)
    with pytest.raises(ValueError, match="for 3 steps, not 4"):
        denoise_with_references(unet, unet, **arrays, solver=make_solver("ddim", schedule, 4))
    with pytest.raises(ValueError, match="reuse_features"):
        denoise_with_references(unet, unet, **arrays, **options, reuse_features=0)
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
    compiled = denoise_module._advance._cache_size()
    assert not np.allclose(ours(9.0), expected, rtol=0.1)
    assert denoise_module._advance._cache_size() == compiled, "a new scale compiled a new program"


def test_no_sample_sees_anothers_set(arrays: dict[str, Any], schedule: NoiseSchedule) -> None:
    options: dict[str, Any] = {
        "solver": make_solver("unipc", schedule, STEPS),
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
