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


ORACLES = {"unipc": diffusers.UniPCMultistepScheduler, "ddim": diffusers.DDIMScheduler}
PREDICTION_TYPES = ("epsilon", "v_prediction")
SHAPE = (2, 4, 4, 3)


def network(xp: Any, x: Any, t: Any) -> Any:
    """A nonlinear stand-in for a UNet that depends on x and t, in JAX's or PyTorch's `xp`."""
    return 0.5 * x + xp.sin(x + 0.01 * t)


def oracle_trajectory(oracle: Any, latents: np.ndarray) -> list[np.ndarray]:
    """The latents after every step of a diffusers scheduler."""
    x = torch.from_numpy(latents)
    samples = []
    for t in oracle.timesteps:
        x = oracle.step(network(torch, x, t), t, x).prev_sample
        samples.append(x.numpy())
    return samples


@jax.jit
def trajectory(solver: Solver, latents: jax.Array) -> jax.Array:
    """The latents after every step of a solver of ours, as one compiled program."""

    def body(state: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = solver.step(state, network(jnp, solver.latents(state), solver.timesteps[i]), i)
        return state, solver.latents(state)

    return jax.lax.scan(body, solver.init(latents), jnp.arange(len(solver.timesteps)))[1]


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def relative_error(actual: Any, expected: Any) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def assert_follows_diffusers(name: str, config: Mapping[str, Any], num_steps: int) -> None:
    """Same timesteps, and the latents after every step within 1e-4, in float32."""
    oracle = ORACLES[name].from_config(config)
    oracle.set_timesteps(num_steps)
    solver = make_solver(name, NoiseSchedule.from_config(config), num_steps)
    assert solver.timesteps.dtype == np.int32
    np.testing.assert_array_equal(solver.timesteps, oracle.timesteps.numpy())

    latents = normal(num_steps, *SHAPE)
    expected = oracle_trajectory(oracle, np.array(latents))
    actual = trajectory(solver, latents)
    assert actual.dtype == jnp.float32
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert relative_error(ours, theirs) <= 1e-4, f"step {i}"


@pytest.mark.parametrize("num_steps", [10, 25, 50])
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
        SD21 | {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace"},
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
        "cosine",
        "trained-betas",
    ],
)
def test_fields_carry_over_as_in_diffusers(name: str, config: Mapping[str, Any]) -> None:
    assert_follows_diffusers(name, config, 10)


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
    sample = solver.latents(solver.step(solver.init(x), u, 0))
    expected = predict_x0(schedule, x, u, jnp.full(SHAPE[0], 999))
    assert relative_error(sample, expected) < 1e-6


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ORACLES)
def test_a_perfect_network_recovers_its_image(name: str, prediction_type: str) -> None:
    """If every output is the target for one (x_0, eps), every sample is x_t of that pair."""
    schedule = NoiseSchedule.from_config(
        SD21_BASE | {"prediction_type": prediction_type, "set_alpha_to_one": True}
    )
    solver = make_solver(name, schedule, 10)
    x0, noise = normal(0, *SHAPE), normal(1, *SHAPE)
    state = solver.init(add_noise(schedule, x0, noise, jnp.asarray(solver.timesteps[0])))
    for i, t in enumerate(solver.timesteps):
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


def test_unknown_solver_is_refused() -> None:
    with pytest.raises(UserError, match="solver: 'euler' is unknown; use one of unipc, ddim"):
        make_solver("euler", NoiseSchedule.from_config(SD21_BASE), 10)


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
    arguments = [torch.from_numpy(np.array(a)) for a in (x0, noise, t)]
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
