r"""The noise schedule of a Stable Diffusion checkpoint, and what a network is trained to predict.

The process is variance preserving. With betas beta_s of a diffusers `scheduler_config.json`,

    alpha_t^2 = prod_{s <= t} (1 - beta_s)      (diffusers' `alphas_cumprod`)
    sigma_t^2 = 1 - alpha_t^2
    x_t = alpha_t x_0 + sigma_t eps,            eps ~ N(0, 1).

Eq. 1 trains the network on eps. A checkpoint with `prediction_type: v_prediction` is trained on the
velocity v = alpha_t eps - sigma_t x_0 instead. (x_0, eps) -> (x_t, v) is a rotation by the angle
whose cosine is alpha_t, so its inverse is

    x_0 = alpha_t x_t - sigma_t v,      eps = sigma_t x_t + alpha_t v,

and from eps itself x_0 = (x_t - sigma_t eps) / alpha_t. Whatever the network predicts, x_0 and eps
are therefore linear in (x_t, model output): `x0_coefficients` and `epsilon_coefficients`.

Tables are float64 NumPy arrays, rounded to float32 only where they meet JAX arrays: near t = 0,
sigma_t computed in float32 as sqrt(1 - alpha_t^2) would lose half of its digits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from bootpig_jax.errors import UserError

PredictionType = Literal["epsilon", "v_prediction"]
TimestepSpacing = Literal["linspace", "leading", "trailing"]

# Fields that would change a trajectory in a way that is not implemented, with the one value that
# leaves it unchanged. A missing field counts as that value. That includes `clip_sample`, although
# diffusers' DDIMScheduler clips by default: its Stable Diffusion pipelines switch that off, since
# latents do not live in [-1, 1].
_FIXED_FIELDS: Mapping[str, object] = {
    "clip_sample": False,
    "thresholding": False,
    "predict_x0": True,
    "lower_order_final": True,
    "disable_corrector": [],
    "solver_p": None,
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "use_lu_lambdas": False,
    "lambda_min_clipped": -math.inf,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
}


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving noise schedule with timesteps 0 <= t < T.

    Compared and hashed by identity, so it can be closed over or be a static argument of `jax.jit`.

    Attributes:
        alphas_cumprod: alpha_t^2 for every training timestep, float64 [T].
        prediction_type: what the network predicts.
        timestep_spacing: how solvers place their timesteps; None means the solver's own default.
        steps_offset: added to the timesteps of the "leading" spacing.
        set_alpha_to_one: whether DDIM's last step ends at alpha = 1 rather than at alpha_0.
        solver_order: the order of multistep solvers.
    """

    alphas_cumprod: Float64[np.ndarray, " T"]
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    solver_order: int = 2

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Builds the schedule from the contents of a diffusers `scheduler_config.json`.

        Fields carry over between scheduler classes as in diffusers' `from_config`: a field that
        the file does not hold (or lists under `_use_default_values`) takes the default of the
        solver that will be used, not of the class that the file names. So SD 2.1-base, whose
        PNDM file has no `timestep_spacing`, is sampled by UniPC with "linspace" and by DDIM with
        "leading". Fields that are unknown are ignored.

        Args:
            config: the parsed JSON object.

        Raises:
            UserError: a field has a wrong type or an unsupported value; the message names it.
        """
        if config.get("beta_schedule") is None and config.get("trained_betas") is None:
            raise _field_error(
                "beta_schedule",
                "missing, so this is no DDPM-type schedule; use a Stable Diffusion 1.x or 2.x one",
            )
        defaulted = config.get("_use_default_values") or []
        if not isinstance(defaulted, list):
            raise _field_error("_use_default_values", f"must be a list, not {defaulted!r}")
        fields = {name: value for name, value in config.items() if name not in defaulted}
        for name, required in _FIXED_FIELDS.items():
            if fields.get(name, required) != required:
                raise _field_error(name, f"{fields[name]!r} is not supported; set {required!r}")
        # diffusers' UniPC reads the types of DPM-Solver as bh2.
        _choice(fields, "solver_type", "bh2", ("bh2", "midpoint", "heun", "logrho"))

        prediction_type = _choice(fields, "prediction_type", "epsilon", ("epsilon", "v_prediction"))
        spacing = fields.get("timestep_spacing")
        if spacing is not None:
            _choice(fields, "timestep_spacing", "", ("linspace", "leading", "trailing"))

        betas = _betas(fields)
        alphas_cumprod = np.cumprod(1.0 - betas)
        if _boolean(fields, "rescale_betas_zero_snr", False):
            if prediction_type == "epsilon":
                raise _field_error(
                    "rescale_betas_zero_snr",
                    "with prediction_type 'epsilon' the last timestep says nothing about the "
                    "image; set it to false or use a v_prediction checkpoint",
                )
            alphas_cumprod = _rescale_zero_terminal_snr(alphas_cumprod)

        return cls(
            alphas_cumprod=alphas_cumprod,
            prediction_type=cast(PredictionType, prediction_type),
            timestep_spacing=cast(TimestepSpacing | None, spacing),
            steps_offset=_integer(fields, "steps_offset", 0, minimum=0),
            set_alpha_to_one=_boolean(fields, "set_alpha_to_one", True),
            solver_order=_integer(fields, "solver_order", 2, minimum=1, maximum=3),
        )

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of timesteps the network was trained on."""
        return len(self.alphas_cumprod)

    @property
    def alphas(self) -> Float64[np.ndarray, " T"]:
        """alpha_t, the scale of the clean latents in x_t."""
        return np.sqrt(self.alphas_cumprod)

    @property
    def sigmas(self) -> Float64[np.ndarray, " T"]:
        """sigma_t, the standard deviation of the noise in x_t."""
        return np.sqrt(1.0 - self.alphas_cumprod)


def add_noise(
    schedule: NoiseSchedule,
    x0: Float[Array, "*shape"],
    noise: Float[Array, "*shape"],
    t: Int[Array, "*batch"],
) -> Float[Array, "*shape"]:
    """x_t = alpha_t x_0 + sigma_t eps.

    Args:
        schedule: the noise schedule.
        x0: clean latents.
        noise: eps, standard normal, of the shape of `x0`.
        t: timesteps in [0, T), one for each leading index of `x0` (or a scalar).

    Returns:
        The noised latents.
    """
    return _combine(schedule.alphas, schedule.sigmas, x0, noise, t)


def training_target(
    schedule: NoiseSchedule,
    x0: Float[Array, "*shape"],
    noise: Float[Array, "*shape"],
    t: Int[Array, "*batch"],
) -> Float[Array, "*shape"]:
    """What the network should predict for `add_noise(schedule, x0, noise, t)`.

    The true noise (Eq. 1), or for a v-prediction checkpoint the velocity alpha_t eps - sigma_t x_0.
    """
    if schedule.prediction_type == "epsilon":
        return noise
    return _combine(-schedule.sigmas, schedule.alphas, x0, noise, t)


def predict_x0(
    schedule: NoiseSchedule,
    x_t: Float[Array, "*shape"],
    model_output: Float[Array, "*shape"],
    t: Int[Array, "*batch"],
) -> Float[Array, "*shape"]:
    """The clean latents x_0 that a model output implies at the noised latents x_t."""
    on_x, on_output = x0_coefficients(schedule.prediction_type, schedule.alphas, schedule.sigmas)
    return _combine(on_x, on_output, x_t, model_output, t)


def predict_epsilon(
    schedule: NoiseSchedule,
    x_t: Float[Array, "*shape"],
    model_output: Float[Array, "*shape"],
    t: Int[Array, "*batch"],
) -> Float[Array, "*shape"]:
    """The noise eps that a model output implies at the noised latents x_t."""
    on_x, on_output = epsilon_coefficients(
        schedule.prediction_type, schedule.alphas, schedule.sigmas
    )
    return _combine(on_x, on_output, x_t, model_output, t)


def x0_coefficients(
    prediction_type: PredictionType,
    alpha: Float64[np.ndarray, "*n"],
    sigma: Float64[np.ndarray, "*n"],
) -> tuple[Float64[np.ndarray, "*n"], Float64[np.ndarray, "*n"]]:
    """(a, b) with x_0 = a x_t + b model_output; see the module's docstring."""
    if prediction_type == "epsilon":
        return 1.0 / alpha, -sigma / alpha
    return alpha, -sigma


def epsilon_coefficients(
    prediction_type: PredictionType,
    alpha: Float64[np.ndarray, "*n"],
    sigma: Float64[np.ndarray, "*n"],
) -> tuple[Float64[np.ndarray, "*n"], Float64[np.ndarray, "*n"]]:
    """(a, b) with eps = a x_t + b model_output; see the module's docstring."""
    if prediction_type == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    return sigma, alpha


def _combine(
    on_x: Float64[np.ndarray, " T"],
    on_y: Float64[np.ndarray, " T"],
    x: Float[Array, "*shape"],
    y: Float[Array, "*shape"],
    t: Int[Array, "*batch"],
) -> Float[Array, "*shape"]:
    """on_x[t] x + on_y[t] y, with t aligned to the leading axes."""

    def at_t(table: np.ndarray) -> jax.Array:
        values = jnp.asarray(table, jnp.float32)[jnp.asarray(t)]
        return jnp.expand_dims(values, tuple(range(values.ndim, x.ndim)))

    return at_t(on_x) * x + at_t(on_y) * y


def _betas(fields: Mapping[str, Any]) -> Float64[np.ndarray, " T"]:
    """The betas of the forward process, as diffusers builds them."""
    if fields.get("trained_betas") is not None:
        try:
            betas = np.asarray(fields["trained_betas"], np.float64)
        except (TypeError, ValueError):
            betas = np.empty(0)
        if betas.ndim != 1 or not betas.size or not np.all((betas > 0) & (betas < 1)):
            raise _field_error("trained_betas", "must be a list of numbers between 0 and 1")
        return betas

    kind = _choice(
        fields, "beta_schedule", "linear", ("linear", "scaled_linear", "squaredcos_cap_v2")
    )
    num_timesteps = _integer(fields, "num_train_timesteps", 1000, minimum=1, maximum=100_000)
    if kind == "squaredcos_cap_v2":
        s = np.arange(num_timesteps + 1) / num_timesteps
        alpha_bar = np.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    start = _beta(fields, "beta_start", 0.0001)
    end = _beta(fields, "beta_end", 0.02)
    if kind == "linear":
        return np.linspace(start, end, num_timesteps)
    return np.linspace(math.sqrt(start), math.sqrt(end), num_timesteps) ** 2


def _rescale_zero_terminal_snr(
    alphas_cumprod: Float64[np.ndarray, " T"],
) -> Float64[np.ndarray, " T"]:
    """Shifts and scales alpha_t: the last is 0, the first stays (arXiv 2305.08891, Alg. 1)."""
    alphas = np.sqrt(alphas_cumprod)
    return ((alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])) ** 2


def _field_error(name: str, problem: str) -> UserError:
    return UserError(f"scheduler_config.json: {name}: {problem}")


def _choice(fields: Mapping[str, Any], name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = fields.get(name, default)
    if value not in allowed:
        raise _field_error(name, f"{value!r} is not supported; use one of {', '.join(allowed)}")
    return str(value)


def _boolean(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise _field_error(name, f"must be true or false, not {value!r}")
    return value


def _integer(
    fields: Mapping[str, Any], name: str, default: int, *, minimum: int, maximum: int | None = None
) -> int:
    value = fields.get(name, default)
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    if not fits or (maximum is not None and value > maximum):
        limits = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise _field_error(name, f"must be an integer {limits}, not {value!r}")
    return cast(int, value)


def _beta(fields: Mapping[str, Any], name: str, default: float) -> float:
    value = fields.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
        raise _field_error(name, f"must be a number between 0 and 1, not {value!r}")
    return float(value)
