"""The schedule, guidance and solvers against diffusers (PyTorch) and against their own algebra."""

import json
from collections.abc import Mapping
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from bootpig_jax.diffusion.guidance import classifier_free_guidance, guide
from bootpig_jax.diffusion.schedule import (
    NoiseSchedule,
    add_noise,
    predict_epsilon,
    predict_x0,
    training_target,
)
from bootpig_jax.diffusion.solvers import Solver, make_solver
from bootpig_jax.errors import UserError
from bootpig_jax.models.unet import timestep_embedding

# scheduler/scheduler_config.json as the Stable Diffusion repositories ship it.
SD21_BASE = json.loads("""{
  "_class_name": "PNDMScheduler",
  "_diffusers_version": "0.10.0.dev0",
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "clip_sample": false,
  "num_train_timesteps": 1000,
  "prediction_type": "epsilon",
  "set_alpha_to_one": false,
  "skip_prk_steps": true,
  "steps_offset": 1,
  "trained_betas": null
}""")
SD21 = SD21_BASE | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


ORACLES = {
    "unipc": diffusers.UniPCMultistepScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
}
# Each solver with the noise levels that it has: DDIM has no Karras sigmas.
SOLVERS_AND_SIGMAS = [
    *((name, "default") for name in ORACLES),
    *((name, "karras") for name in ORACLES if name != "ddim"),
]
PREDICTION_TYPES = ("epsilon", "v_prediction")
SHAPE = (2, 4, 4, 3)


def network(xp: Any, x: Any, t: Any) -> Any:
    """A nonlinear stand-in for a UNet that depends on x and t, in JAX's or PyTorch's `xp`."""
    return 0.5 * x + xp.sin(x + 0.01 * t)


def oracle_scheduler(name: str, config: Mapping[str, Any], **settings: Any) -> Any:
    if name == "dpmpp_2m":  # 2M whatever the configuration says
        settings |= {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
    return ORACLES[name].from_config(config, **settings)


def oracle_trajectory(oracle: Any, timesteps: Any, x: torch.Tensor) -> list[np.ndarray]:
    """What the network sees at every step of a diffusers scheduler, and the sample."""
    seen = []
    for t in timesteps:
        seen.append(oracle.scale_model_input(x, t))
        x = oracle.step(network(torch, seen[-1], t), t, x).prev_sample
    return [latents.numpy() for latents in (*seen, x)]


@jax.jit
def trajectory(solver: Solver, state: jax.Array) -> jax.Array:
    """What the network sees at every step of a solver of ours, and the sample; one program."""

    def body(state: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = solver.latents(state)
        return solver.step(state, network(jnp, x, jnp.asarray(solver.timesteps)[i]), i), x

    state, seen = jax.lax.scan(body, state, jnp.arange(len(solver.timesteps)))
    return jnp.concatenate([seen, solver.latents(state)[None]])


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def to_torch(x: jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


def relative_error(actual: Any, expected: Any) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def assert_same_timesteps(name: str, solver: Solver, expected: torch.Tensor) -> None:
    if name == "euler":  # fractional, and diffusers has log sigma in float32
        assert solver.timesteps.dtype == np.float32
        np.testing.assert_allclose(solver.timesteps, expected.numpy(), rtol=0, atol=0.01)
    else:
        assert solver.timesteps.dtype == np.int32
        np.testing.assert_array_equal(solver.timesteps, expected.numpy())


def assert_same_trajectory(actual: jax.Array, expected: list[np.ndarray]) -> None:
    assert actual.dtype == jnp.float32
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert relative_error(ours, theirs) <= 1e-4, f"step {i}"


def assert_follows_diffusers(name: str, config: Mapping[str, Any], num_steps: int) -> None:
    """Same timesteps, and the latents at every step within 1e-4, in float32."""
    oracle = oracle_scheduler(name, config)
    oracle.set_timesteps(num_steps)
    solver = make_solver(name, NoiseSchedule.from_config(config), num_steps)
    assert_same_timesteps(name, solver, oracle.timesteps)

    noise = normal(num_steps, *SHAPE)
    expected = oracle_trajectory(
        oracle, oracle.timesteps, to_torch(noise) * oracle.init_noise_sigma
    )
    assert_same_trajectory(trajectory(solver, solver.init(noise)), expected)


@pytest.mark.parametrize("num_steps", [10, 50])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", [None, "linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", ORACLES)
def test_trajectory_equals_diffusers(
    name: str, spacing: str | None, prediction_type: str, num_steps: int
) -> None:
    config = SD21_BASE | {"prediction_type": prediction_type}
    if spacing is not None:
        config["timestep_spacing"] = spacing
    assert_follows_diffusers(name, config, num_steps)


@pytest.mark.parametrize("num_steps", [1, 10, 50])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("name", "spacing"),
    [("unipc", None), ("dpmpp_2m", None), *(("euler", s) for s in (None, "leading", "trailing"))],
)
def test_karras_sigmas_equal_diffusers(
    name: str, spacing: str | None, prediction_type: str, num_steps: int
) -> None:
    config = SD21_BASE | {"prediction_type": prediction_type}
    changed = {} if spacing is None else {"timestep_spacing": spacing}
    oracle = oracle_scheduler(name, config, use_karras_sigmas=True, **changed)
    oracle.set_timesteps(num_steps)
    schedule = NoiseSchedule.from_config(config)
    solver = make_solver(name, schedule, num_steps, spacing=spacing, sigmas="karras")
    assert_same_timesteps(name, solver, oracle.timesteps)

    noise = normal(num_steps, *SHAPE)
    # Not `step(t)` by its value: with many steps several have the same rounded timestep.
    oracle.set_begin_index(0)
    first = to_torch(noise) * oracle.init_noise_sigma
    expected = oracle_trajectory(oracle, oracle.timesteps, first)
    assert_same_trajectory(trajectory(solver, solver.init(noise)), expected)


@pytest.mark.parametrize("strength", [0.1, 0.75, 1.0])
@pytest.mark.parametrize(("name", "sigmas"), SOLVERS_AND_SIGMAS)
def test_image_to_image_equals_diffusers(name: str, sigmas: str, strength: float) -> None:
    """As `StableDiffusionImg2ImgPipeline.get_timesteps` and `prepare_latents` do it."""
    changed = {"use_karras_sigmas": True} if sigmas == "karras" else {}
    oracle = oracle_scheduler(name, SD21, **changed)
    oracle.set_timesteps(10)
    skipped = 10 - min(int(10 * strength), 10)
    timesteps = oracle.timesteps[skipped:]
    if hasattr(oracle, "set_begin_index"):
        oracle.set_begin_index(skipped)
    solver = make_solver(
        name, NoiseSchedule.from_config(SD21), 10, sigmas=sigmas, strength=strength
    )
    assert_same_timesteps(name, solver, timesteps)

    x0, noise = normal(0, *SHAPE), normal(1, *SHAPE)
    repeated = timesteps[:1].repeat(SHAPE[0])
    first = oracle.add_noise(to_torch(x0), to_torch(noise), repeated)
    expected = oracle_trajectory(oracle, timesteps, first)
    assert_same_trajectory(trajectory(solver, solver.start(x0, noise)), expected)


def test_fractional_timesteps_are_embedded_as_in_diffusers() -> None:
    t = np.asarray([0.0, 0.25, 498.61, 998.99], np.float32)
    expected = get_timestep_embedding(
        torch.from_numpy(t), 32, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    np.testing.assert_allclose(timestep_embedding(jnp.asarray(t), 32), expected, atol=1e-4)


@pytest.mark.parametrize(("name", "sigmas"), SOLVERS_AND_SIGMAS)
def test_levels_are_those_of_every_step(name: str, sigmas: str) -> None:
    """The pair (alphas[i], sigmas[i]) is the noise level of what the network sees at step i."""
    schedule = NoiseSchedule.from_config(SD21_BASE | {"set_alpha_to_one": True})
    solver = make_solver(name, schedule, 10, sigmas=sigmas)
    x0, noise = normal(0, *SHAPE), normal(1, *SHAPE)
    state = solver.start(x0, noise)
    for i in range(10):
        x_i = solver.alphas[i] * x0 + solver.sigmas[i] * noise
        assert relative_error(solver.latents(state), x_i) < 1e-5
        state = solver.step(state, noise, i)  # a network that is always right
    assert (solver.alphas[-1], solver.sigmas[-1]) == (1, 0)
    assert relative_error(solver.latents(state), x0) < 1e-4
    np.testing.assert_allclose(solver.alphas**2 + solver.sigmas**2, 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("heun", {}, "solver: 'heun' is unknown; use one of unipc, dpmpp_2m, ddim, euler"),
        ("unipc", {"spacing": "even"}, "spacing: 'even' is unknown"),
        ("unipc", {"sigmas": "beta"}, "sigmas: 'beta' is unknown"),
        ("ddim", {"sigmas": "karras"}, "sigmas: ddim has no Karras sigmas"),
        ("dpmpp_2m", {"sigmas": "karras", "spacing": "trailing"}, "spacing: Karras sigmas place"),
        ("euler", {"strength": 0.0}, "strength: must be above 0"),
        ("euler", {"strength": 1.1}, "strength: must be above 0"),
        ("euler", {"strength": float("nan")}, "strength: must be above 0"),
        ("unipc", {"strength": 0.09}, "strength: 0.09 of 10 steps is less than one"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_solver(name, NoiseSchedule.from_config(SD21_BASE), 10, **settings)


def test_spacing_overrides_the_checkpoints() -> None:
    schedule = NoiseSchedule.from_config(SD21_BASE | {"timestep_spacing": "leading"})
    assert make_solver("unipc", schedule, 10, spacing="trailing").timesteps[0] == 999


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize(
    "config",
    [
        SD21,
        # What a pipeline holds in memory and what it saves: the latter states every default.
        diffusers.PNDMScheduler.from_config(SD21_BASE).config,
        json.loads(diffusers.PNDMScheduler.from_config(SD21_BASE).to_json_string()),
        json.loads(
            diffusers.DDIMScheduler.from_config(
                SD21 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            ).to_json_string()
        ),
        json.loads(diffusers.DPMSolverMultistepScheduler.from_config(SD21_BASE).to_json_string()),
        SD21_BASE | {"set_alpha_to_one": True, "timestep_spacing": "leading", "steps_offset": 0},
        SD21_BASE | {"solver_order": 1},
        SD21_BASE | {"solver_order": 3},
        SD21_BASE | {"beta_schedule": "linear"},
        {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist(), "clip_sample": False},
    ],
    ids=[
        "sd21",
        "pndm-in-memory",
        "pndm-saved",
        "zero-snr",
        "dpm-solver",
        "alpha-to-one",
        "first-order",
        "third-order",
        "linear",
        "trained-betas",
    ],
)
def test_fields_carry_over_as_in_diffusers(name: str, config: Mapping[str, Any]) -> None:
    assert_follows_diffusers(name, config, 10)


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        ("unipc", "linspace"),
        ("dpmpp_2m", "linspace"),
        ("ddim", "linspace"),
        # Not from t = 999, where sigma / alpha is 20 000: in diffusers' own scaling float32 then
        # leaves an error of 1.8e-4.
        ("euler", "leading"),
    ],
)
def test_a_cosine_schedule_equals_diffusers(name: str, spacing: str) -> None:
    config = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": spacing}
    assert_follows_diffusers(name, SD21 | config, 10)


def test_sd21_base_is_sampled_with_each_solvers_own_spacing() -> None:
    schedule = NoiseSchedule.from_config(SD21_BASE)
    assert schedule.timestep_spacing is None
    assert make_solver("unipc", schedule, 50).timesteps[[0, 1, -1]].tolist() == [999, 979, 20]
    assert make_solver("ddim", schedule, 50).timesteps[[0, 1, -1]].tolist() == [981, 961, 1]


@pytest.mark.parametrize("name", ORACLES)
def test_one_step_gives_x0(name: str) -> None:
    """From the last timestep to alpha = 1 in one step: the network's x_0, whatever the solver."""
    schedule = NoiseSchedule.from_config(
        SD21 | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    )
    solver = make_solver(name, schedule, 1)
    x, u = normal(0, *SHAPE), normal(1, *SHAPE)
    state = solver.init(x)
    sample = solver.latents(solver.step(state, u, 0))
    expected = predict_x0(schedule, solver.latents(state), u, jnp.full(SHAPE[0], 999))
    assert relative_error(sample, expected) < 1e-6


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ORACLES)
def test_a_perfect_network_recovers_its_image(name: str, prediction_type: str) -> None:
    """If every output is the target for one (x_0, eps), every sample is x_t of that pair."""
    schedule = NoiseSchedule.from_config(
        SD21_BASE | {"prediction_type": prediction_type, "set_alpha_to_one": True}
    )
    solver = make_solver(name, schedule, 10, spacing="leading")  # whole timesteps for Euler, too
    x0, noise = normal(0, *SHAPE), normal(1, *SHAPE)
    state = solver.start(x0, noise)
    for i, t in enumerate(solver.timesteps.astype(np.int32)):
        x_t = add_noise(schedule, x0, noise, jnp.asarray(t))
        assert relative_error(solver.latents(state), x_t) < 1e-4
        state = solver.step(state, training_target(schedule, x0, noise, jnp.asarray(t)), i)
    assert relative_error(solver.latents(state), x0) < 1e-4


def test_another_schedule_or_sample_compiles_nothing_anew() -> None:
    traces = []

    @jax.jit
    def step(solver: Solver, latents: jax.Array, i: int) -> jax.Array:
        traces.append(i)
        return solver.latents(solver.step(solver.init(latents), latents, i))

    for seed, config in enumerate([SD21_BASE, SD21]):
        solver = make_solver("unipc", NoiseSchedule.from_config(config), 3)
        step(solver, normal(seed, *SHAPE), seed)
    assert len(traces) == 1


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_every_accepted_number_of_steps_is_sound(name: str, spacing: str) -> None:
    schedule = NoiseSchedule.from_config(
        SD21_BASE | {"num_train_timesteps": 30, "timestep_spacing": spacing}
    )
    accepted = 0
    for num_steps in range(1, 31):
        try:
            solver = make_solver(name, schedule, num_steps)
        except UserError:
            continue
        accepted += 1
        assert solver.timesteps.shape == (num_steps,)
        assert np.all(np.diff(solver.timesteps) < 0)
        assert solver.timesteps[-1] >= 0 and solver.timesteps[0] < 30
        assert np.all(np.isfinite(solver.weights))
    assert accepted >= 28


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("num_steps", [-1, 0, 1001])
def test_impossible_numbers_of_steps_are_refused(name: str, num_steps: int) -> None:
    with pytest.raises(UserError, match="num_inference_steps"):
        make_solver(name, NoiseSchedule.from_config(SD21_BASE), num_steps)


@pytest.mark.parametrize(
    "change",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "num_train_timesteps": 200},
        {"trained_betas": np.linspace(0.001, 0.02, 50).tolist()},
    ],
)
def test_alphas_cumprod_equals_diffusers(change: dict[str, Any]) -> None:
    config = SD21_BASE | change
    schedule = NoiseSchedule.from_config(config)
    expected = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    assert schedule.alphas_cumprod.dtype == np.float64
    assert schedule.num_train_timesteps == len(expected)
    np.testing.assert_allclose(schedule.alphas_cumprod, expected, rtol=2e-4, atol=1e-7)


def test_zero_terminal_snr() -> None:
    config = SD21 | {"rescale_betas_zero_snr": True}
    schedule = NoiseSchedule.from_config(config)
    expected = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    np.testing.assert_allclose(schedule.alphas_cumprod, expected, rtol=2e-4, atol=1e-7)
    assert schedule.alphas_cumprod[-1] == 0
    np.testing.assert_allclose(
        schedule.alphas_cumprod[0], NoiseSchedule.from_config(SD21).alphas_cumprod[0]
    )


def test_noise_and_targets_equal_diffusers() -> None:
    config = SD21_BASE | {"prediction_type": "v_prediction"}
    schedule = NoiseSchedule.from_config(config)
    oracle = diffusers.DDIMScheduler.from_config(config)
    x0, noise, t = normal(0, 4, 3, 3, 2), normal(1, 4, 3, 3, 2), jnp.asarray([0, 1, 500, 999])
    arguments = [to_torch(a) for a in (x0, noise, t)]
    assert relative_error(add_noise(schedule, x0, noise, t), oracle.add_noise(*arguments)) < 1e-5
    velocity = training_target(schedule, x0, noise, t)
    assert relative_error(velocity, oracle.get_velocity(*arguments)) < 1e-5


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_targets_give_back_what_was_noised(prediction_type: str) -> None:
    schedule = NoiseSchedule.from_config(SD21_BASE | {"prediction_type": prediction_type})
    t = jnp.asarray([0, 1, 250, 500, 999])
    x0, noise = normal(0, 5, 8, 8, 4), normal(1, 5, 8, 8, 4)

    @jax.jit
    def round_trip(x0: jax.Array, noise: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_t = add_noise(schedule, x0, noise, t)
        target = training_target(schedule, x0, noise, t)
        return predict_x0(schedule, x_t, target, t), predict_epsilon(schedule, x_t, target, t)

    actual_x0, actual_noise = round_trip(x0, noise, t)
    np.testing.assert_allclose(actual_x0, x0, atol=2e-5)
    np.testing.assert_allclose(actual_noise, noise, atol=2e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_schedule", "sigmoid"),
        ("beta_schedule", None),
        ("beta_start", -0.1),
        ("beta_end", "0.012"),
        ("beta_end", float("nan")),
        ("trained_betas", [0.1, 1.5]),
        ("trained_betas", [[0.1], [0.2, 0.3]]),
        ("trained_betas", []),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 10**12),
        ("num_train_timesteps", 1000.0),
        ("prediction_type", "sample"),
        ("prediction_type", "flow_prediction"),
        ("prediction_type", ["epsilon"]),
        ("timestep_spacing", "karras"),
        ("steps_offset", -1),
        ("steps_offset", True),
        ("set_alpha_to_one", "false"),
        ("clip_sample", True),
        ("thresholding", True),
        ("predict_x0", False),
        ("lower_order_final", False),
        ("disable_corrector", [0]),
        ("final_sigmas_type", "sigma_min"),
        ("use_karras_sigmas", True),
        ("use_flow_sigmas", True),
        ("use_lu_lambdas", True),
        ("lambda_min_clipped", -5.1),
        ("interpolation_type", "log_linear"),
        ("timestep_type", "continuous"),
        ("sigma_min", 0.002),
        ("solver_type", "bh1"),
        ("solver_order", 4),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_unsupported_fields_are_named(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^scheduler_config.json: {field}: [^\n]+$"):
        NoiseSchedule.from_config(SD21_BASE | {field: value})


def test_a_flow_matching_config_is_refused() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    with pytest.raises(UserError, match="beta_schedule"):
        NoiseSchedule.from_config(config)


def test_guidance() -> None:
    u_sa, u_rsa, u_rsa_text = (normal(seed, *SHAPE) for seed in range(3))
    expected = u_sa + 5.0 * (u_rsa - u_sa) + 7.5 * (u_rsa_text - u_rsa)
    np.testing.assert_allclose(guide(u_sa, u_rsa, u_rsa_text, 5.0, 7.5), expected, rtol=1e-6)
    # Scales of one leave the fully conditioned branch; each direction vanishes with its condition.
    np.testing.assert_allclose(guide(u_sa, u_rsa, u_rsa_text, 1.0, 1.0), u_rsa_text, atol=1e-6)
    np.testing.assert_allclose(
        guide(u_sa, u_sa, u_rsa_text, 5.0, 7.5),
        classifier_free_guidance(u_sa, u_rsa_text, 7.5),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        guide(u_sa, u_rsa, u_rsa, 5.0, 7.5), classifier_free_guidance(u_sa, u_rsa, 5.0), atol=1e-5
    )
    # The scales may be traced.
    traced = jax.jit(guide)(u_sa, u_rsa, u_rsa_text, 5.0, 7.5)
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-5)
