r"""Solvers of the probability-flow ODE as tables of linear coefficients.

UniPC, DPM-Solver++ 2M, Euler and DDIM, step by step equal to diffusers' schedulers.

**One step is one small matrix.** A multistep solver only ever forms linear combinations of latents
and model outputs, with coefficients that depend on the schedule and not on the data. So its state
is a stack of S arrays of the latents' shape, s = (s_0 = x, s_1, ...), where x is what the network
sees next, and step i with the model output u is

    s <- W_i (s ; u),      W_i of shape [S, S + 1].

All W_i are computed in float64 from the schedule before sampling and stored as float32. A solver
*is* its tables; a new solver is a new way to fill W. The rows are written with `_Linear`, a vector
over the basis (s_0, ..., s_{S-1}, u).

Below, alpha_i, sigma_i and lambda_i = log(alpha_i / sigma_i) belong to timestep t_i of step i, and
i + 1 is where the step goes; the last step ends at alpha = 1, sigma = 0. x_0 and eps stand for the
predictions that x and u imply (`schedule.x0_coefficients`, `schedule.epsilon_coefficients`): linear
in (x, u), too.

**First order.** Three solvers share this update; they differ in where they take the steps:

    x_{i+1} = alpha_{i+1} x_0 + sigma_{i+1} eps.

**DDIM** (eta = 0; Song et al., arXiv 2010.02502, Eq. 12) is this. diffusers goes to t_i - T // n,
which need not be t_{i+1}, and past t = 0 to `set_alpha_to_one`'s alpha. Both are kept.

**Euler** (Karras et al., arXiv 2206.00364, Alg. 1 without its correction) looks different. It works
on y = x / alpha with noise levels s = sigma / alpha, along dy/ds = (y - x_0) / s, and the network
sees y / sqrt(s^2 + 1) = x. But (y - x_0) / s = eps, so its step y + (s_{i+1} - s_i) eps is
x_0 + s_{i+1} eps, and times alpha_{i+1} that is the line above. What differs are the places: t_i
may be fractional, and s_i is interpolated between the schedule's. And the first x: diffusers takes
y = s_0 noise where the spacing begins at the last timestep, hence `Solver.init_scale` = sigma_0.

**Multistep.** Exactly, with m(lambda) the x_0 prediction along the trajectory and
h = lambda_{i+1} - lambda_i,

    x_{i+1} = (sigma_{i+1} / sigma_i) x_i
              + sigma_{i+1} \int_{lambda_i}^{lambda_{i+1}} e^lambda m(lambda) dlambda.

Hold m at m_i: the integral gives alpha_{i+1} (1 - e^{-h}) m_i, which is the first-order update.
Otherwise m is interpolated through m_i and q further points at relative positions
r_j = (lambda_j - lambda_i) / h, with differences D_j = (m_j - m_i) / r_j:

    x_{i+1} = (sigma_{i+1} / sigma_i) x_i + alpha_{i+1} (1 - e^{-h}) (m_i + sum_j rho_j D_j).

The weights rho make this exact for polynomials m of degree up to q. With the integrals
e^{-h} \int_0^h e^y y^k dy = k! h^{k+1} phi_{k+1}(-h), where y = lambda - lambda_i, that is, for
k = 1..q,

    sum_j r_j^{k-1} rho_j = k! h phi_{k+1}(-h) / (1 - e^{-h}) = k! g_k / (e^{-h} - 1),

where g_k = -h phi_{k+1}(-h) follows from phi_1(z) = (e^z - 1) / z and
phi_{k+1}(z) = (phi_k(z) - 1 / k!) / z:

    g_1 = (e^{-h} - 1) / (-h) - 1,      g_{k+1} = g_k / (-h) - 1 / (k + 1)!.

The *predictor* UniP-p takes the p - 1 points before i. The *corrector* UniC-p, once m_{i+1} is
known from the network at the predicted x_{i+1}, redoes the same step with the point r = 1, m_{i+1}
added. With one point (UniP-2, UniC-1) the paper takes rho = 1/2, as diffusers does.

**DPM-Solver++ 2M** (Lu et al., arXiv 2211.01095, Alg. 2; midpoint) is UniP-2 alone: its state is
s = (x, m_{i-1}). Euler is UniP-1 alone, s = (x).

**UniPC** (Zhao et al., arXiv 2302.04867; data prediction, B(h) = e^h - 1, called bh2) uses both.
Step i of the table (1) reads m_i from (x, u); (2) corrects x_i, starting again from the corrected
x_{i-1}; (3) predicts x_{i+1}. The state is s = (x_i predicted, x_{i-1} corrected, m_{i-1}, ...,
m_{i-p}).

The order is min(p, i + 1, n - i): a warm-up, and first order at the end. At the last step h is
infinite: there e^{-h} = 0 and the first-order update is x = m_i.

**Karras sigmas** (arXiv 2206.00364, Eq. 5) place the levels s = sigma / alpha evenly in s^{1/7}:

    s_i = (s_max^{1/7} + i / (n - 1) (s_min^{1/7} - s_max^{1/7}))^7.

The network is then evaluated at the timestep whose level is s_i, log s being interpolated between
timesteps; UniPC and DPM-Solver++ round it (but for a cosine schedule, where diffusers' DPM-Solver++
drops the fraction and this does not). They take s_max and s_min from the whole schedule, Euler
from the timesteps of its spacing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int, Int32

from bootpig_jax.diffusion.schedule import (
    NoiseSchedule,
    PredictionType,
    TimestepSpacing,
    epsilon_coefficients,
    x0_coefficients,
)
from bootpig_jax.errors import UserError

SolverName = Literal["unipc", "dpmpp_2m", "ddim", "euler"]
SigmaSpacing = Literal["default", "karras"]
SOLVERS: tuple[str, ...] = get_args(SolverName)
SPACINGS: tuple[str, ...] = get_args(TimestepSpacing)
SIGMAS: tuple[str, ...] = get_args(SigmaSpacing)

KARRAS_RHO = 7.0

# A linear combination of the state's arrays and the model output, as a vector over that basis.
_Linear = Float64[np.ndarray, " basis"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Solver:
    """A linear multistep solver: where to evaluate the network, and what to do with its outputs.

    A pytree whose leaves are the tables: pass it to a jitted function as an argument, and neither a
    new prompt or seed nor another schedule with as many steps compiles anew.

    Attributes:
        timesteps: descending, one for each step; float32 for Euler's, which may be fractional.
        weights: W_i of every step, float32 [n, S, S + 1]; see the module's docstring.
        alphas: the scale of the clean latents in what the network sees at each step, and after the
            last: 1. Not always the schedule's at `timesteps`.
        sigmas: likewise the standard deviation of the noise; 0 at the end.
        init_scale: the standard deviation of the first latents.
    """

    timesteps: (
        Int32[np.ndarray, " n"]
        | Float32[np.ndarray, " n"]
        | Int32[Array, " n"]
        | Float32[Array, " n"]
    )
    weights: Float32[np.ndarray, "n s s+1"] | Float32[Array, "n s s+1"]
    alphas: Float32[np.ndarray, " n+1"] | Float32[Array, " n+1"]
    sigmas: Float32[np.ndarray, " n+1"] | Float32[Array, " n+1"]
    init_scale: Float32[np.ndarray, ""] | Float32[Array, ""]

    def init(self, noise: Float[Array, "*shape"]) -> Float32[Array, " s *shape"]:
        """The state before the first step of text to image, from standard normal latents."""
        return self._state(jnp.asarray(self.init_scale) * noise.astype(jnp.float32))

    def start(
        self, x0: Float[Array, "*shape"], noise: Float[Array, "*shape"]
    ) -> Float32[Array, " s *shape"]:
        """The state before the first step of image to image.

        Args:
            x0: the picture's clean latents.
            noise: standard normal.
        """
        alpha, sigma = jnp.asarray(self.alphas)[0], jnp.asarray(self.sigmas)[0]
        return self._state(alpha * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32))

    def latents(self, state: Float32[Array, " s *shape"]) -> Float32[Array, "*shape"]:
        """What the network sees at the next step; after the last step, the sample."""
        return state[0]

    def step(
        self,
        state: Float32[Array, " s *shape"],
        model_output: Float[Array, "*shape"],
        i: int | Int[Array, ""],
    ) -> Float32[Array, " s *shape"]:
        """The state after step i.

        Args:
            state: the state before it.
            model_output: the network's (guided) output at `latents(state)` and `timesteps[i]`.
            i: index of the step, 0 <= i < n; may be traced.
        """
        w = jnp.asarray(self.weights)[i]
        basis = [*state, model_output.astype(jnp.float32)]
        # Written out, because a matrix product may run in reduced precision on an accelerator.
        rows = [sum(w[r, c] * array for c, array in enumerate(basis)) for r in range(len(state))]
        return jnp.stack(rows)

    def _state(self, x: Float32[Array, "*shape"]) -> Float32[Array, " s *shape"]:
        state = jnp.zeros((self.weights.shape[1], *x.shape), jnp.float32)
        return state.at[0].set(x)


class _Steps(NamedTuple):
    """Where the steps are: n timesteps, descending, and n + 1 noise levels, the last one clean."""

    timesteps: Float64[np.ndarray, " n"]
    alphas: Float64[np.ndarray, " n+1"]
    sigmas: Float64[np.ndarray, " n+1"]

    def last(self, count: int) -> "_Steps":
        """The last steps, as image to image takes them."""
        return _Steps(self.timesteps[-count:], self.alphas[-count - 1 :], self.sigmas[-count - 1 :])


def make_solver(
    name: str,
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    spacing: str | None = None,
    sigmas: str = "default",
    strength: float = 1.0,
) -> Solver:
    """Builds a solver by name.

    Args:
        name: one of `SOLVERS`: diffusers' `UniPCMultistepScheduler` (bh2, of the schedule's
            `solver_order`), `DPMSolverMultistepScheduler` (dpmsolver++, midpoint, second order),
            `DDIMScheduler` (eta = 0) or `EulerDiscreteScheduler`.
        schedule: the checkpoint's noise schedule; decides the prediction type and the spacing.
        num_steps: how many times the network is evaluated, were `strength` 1.
        spacing: one of `SPACINGS`, instead of the schedule's.
        sigmas: "karras" for its noise levels, which DDIM does not have. UniPC and DPM-Solver++ then
            have no spacing.
        strength: how much of the trajectory image to image runs: the last
            ``int(num_steps * strength)`` steps. The state then comes from `Solver.start`.

    Raises:
        UserError: a name is unknown, two settings do not go together, or the schedule has no room
            for that many steps.
    """
    for field, value, allowed in (
        ("solver", name, SOLVERS),
        ("spacing", spacing or SPACINGS[0], SPACINGS),
        ("sigmas", sigmas, SIGMAS),
    ):
        if value not in allowed:
            raise UserError(f"{field}: {value!r} is unknown; use one of {', '.join(allowed)}")
    if sigmas == "karras":
        if name == "ddim":
            raise UserError("sigmas: ddim has no Karras sigmas; use another solver")
        if name != "euler" and spacing is not None:
            raise UserError(f"spacing: Karras sigmas place {name}'s timesteps; leave it out")
    _check_num_steps(schedule, num_steps)
    count = _step_count(num_steps, strength)
    spacing = spacing or schedule.timestep_spacing or ("leading" if name == "ddim" else "linspace")

    timesteps = _timesteps(name, schedule, num_steps, spacing)
    if name == "ddim":
        return _ddim(schedule, timesteps, count)
    steps = _steps(name, schedule, timesteps, sigmas)
    # See Euler in the module's docstring. The other solvers take standard normal latents anyway.
    scaled = name == "euler" and spacing in ("linspace", "trailing")
    order = {"unipc": schedule.solver_order, "dpmpp_2m": 2, "euler": 1}[name]
    return _multistep(
        steps.last(count),
        schedule.prediction_type,
        order=order,
        corrector=name == "unipc",
        init_scale=float(steps.sigmas[0]) if scaled else 1.0,
        dtype=np.float32 if name == "euler" else np.int32,
    )


def _ddim(schedule: NoiseSchedule, timesteps: Float64[np.ndarray, " n"], count: int) -> Solver:
    t = timesteps.astype(np.int32)[-count:]
    next_t = t - schedule.num_train_timesteps // len(timesteps)
    final = 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0]
    next_alphas_cumprod = np.where(next_t >= 0, schedule.alphas_cumprod[next_t], final)
    next_alpha, next_sigma = np.sqrt(next_alphas_cumprod), np.sqrt(1.0 - next_alphas_cumprod)
    alpha, sigma = schedule.alphas[t], schedule.sigmas[t]

    x0 = np.stack(x0_coefficients(schedule.prediction_type, alpha, sigma), axis=-1)
    epsilon = np.stack(epsilon_coefficients(schedule.prediction_type, alpha, sigma), axis=-1)
    weights = next_alpha[:, None] * x0 + next_sigma[:, None] * epsilon
    return _solver(t, weights[:, None, :], np.append(alpha, 1.0), np.append(sigma, 0.0), 1.0)


def _multistep(
    steps: _Steps,
    prediction_type: PredictionType,
    *,
    order: int,
    corrector: bool,
    init_scale: float,
    dtype: type,
) -> Solver:
    """UniP of an order, with or without UniC; see the module's docstring."""
    alpha, sigma = steps.alphas, steps.sigmas
    with np.errstate(divide="ignore"):
        lambda_ = np.log(alpha) - np.log(sigma)

    num_steps = len(steps.timesteps)
    remembered = order if corrector else order - 1  # the last m's
    first = 2 if corrector else 1  # x_i predicted, and x_{i-1} corrected
    size = first + remembered
    basis = np.eye(size + 1)
    x, history, output = basis[0], list(basis[first:size]), basis[size]
    x0_on_x, x0_on_output = x0_coefficients(prediction_type, alpha, sigma)

    def update(i: int, x_i: _Linear, m: Sequence[_Linear], end: Sequence[_Linear]) -> _Linear:
        """x_{i+1} from x_i, m = (m_i, m_{i-1}, ...) and end = (m_{i+1},) if it is known."""
        h = lambda_[i + 1] - lambda_[i]
        r = [(lambda_[i - j] - lambda_[i]) / h for j in range(1, len(m))] + [1.0] * len(end)
        differences = [(m_j - m[0]) / r_j for m_j, r_j in zip([*m[1:], *end], r, strict=True)]
        weighted = [rho * d for rho, d in zip(_unipc_rho(r, h), differences, strict=True)]
        slope = m[0] + sum(weighted, np.zeros(size + 1))
        return sigma[i + 1] / sigma[i] * x_i - alpha[i + 1] * math.expm1(-h) * slope

    weights = np.empty((num_steps, size, size + 1))
    previous_order = 0
    for i in range(num_steps):
        m_i = x0_on_x[i] * x + x0_on_output[i] * output
        x_i = x
        if corrector and i > 0:
            x_i = update(i - 1, basis[1], history[:previous_order], [m_i])
        m = [m_i, *history]
        previous_order = min(order, i + 1, num_steps - i)
        x_next = update(i, x_i, m[:previous_order], [])
        weights[i] = np.stack([x_next, *([x_i] if corrector else []), *m[:remembered]])
    return _solver(steps.timesteps.astype(dtype), weights, alpha, sigma, init_scale)


def _solver(
    timesteps: np.ndarray,
    weights: np.ndarray,
    alphas: np.ndarray,
    sigmas: np.ndarray,
    init_scale: float,
) -> Solver:
    return Solver(
        timesteps=timesteps,
        weights=weights.astype(np.float32),
        alphas=alphas.astype(np.float32),
        sigmas=sigmas.astype(np.float32),
        init_scale=np.asarray(init_scale, np.float32),
    )


def _unipc_rho(r: Sequence[float], h: float) -> Sequence[float]:
    """UniPC's weights rho of the differences at the relative positions r; see the docstring."""
    if len(r) <= 1:
        return [0.5] * len(r)
    g = math.expm1(-h) / -h - 1.0
    b = []
    for k in range(1, len(r) + 1):
        b.append(math.factorial(k) * g / math.expm1(-h))
        g = g / -h - 1.0 / math.factorial(k + 1)
    powers = np.vander(r, len(r), increasing=True).T
    return np.linalg.solve(powers, np.asarray(b)).tolist()


def _timesteps(
    name: str, schedule: NoiseSchedule, num_steps: int, spacing: str
) -> Float64[np.ndarray, " n"]:
    """The spacings of diffusers' schedulers, descending.

    Those of UniPC and DPM-Solver++ leave out t = 0 (before the offset), those of DDIM and Euler do
    not; Euler's "linspace" is not rounded.

    Raises:
        UserError: diffusers would turn these into NaN or an index error.
    """
    total = schedule.num_train_timesteps
    skipped = 1 if name in ("unipc", "dpmpp_2m") else 0
    count = num_steps + skipped
    ascending: np.ndarray
    match spacing:
        case "linspace":
            ascending = np.linspace(0, total - 1, count)[skipped:]
            if name != "euler":
                ascending = ascending.round()
        case "leading":
            ascending = np.arange(skipped, count) * (total // count) + schedule.steps_offset
        case _:
            # For some n (61, say, at T = 1000) the range overshoots by rounding: diffusers then has
            # an extra timestep of -1.
            trailing = np.arange(total, 0, -total / num_steps)[:num_steps].round()
            ascending = trailing[::-1] - 1
    timesteps = ascending[::-1].astype(np.float64)
    in_range = timesteps[-1] >= 0 and timesteps[0] < total
    if len(timesteps) != num_steps or not in_range or not np.all(np.diff(timesteps) < 0):
        raise UserError(
            f"num_inference_steps: {num_steps} steps do not fit this checkpoint's "
            f"{total} timesteps; use fewer"
        )
    return timesteps


def _steps(
    name: str, schedule: NoiseSchedule, timesteps: Float64[np.ndarray, " n"], sigmas: str
) -> _Steps:
    """The noise levels of the multistep solvers and of Euler, and their timesteps."""
    # At zero terminal SNR the level would be infinite; diffusers takes the smallest half-precision
    # number for alpha^2.
    alphas_cumprod = np.where(schedule.alphas_cumprod > 0, schedule.alphas_cumprod, 2.0**-24)
    table = np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)  # s = sigma / alpha
    every_t = np.arange(len(table))
    levels = np.interp(timesteps, every_t, table)
    if sigmas == "karras":
        high, low = (levels[0], levels[-1]) if name == "euler" else (table[-1], table[0])
        ends = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
        levels = np.linspace(*ends, len(timesteps)) ** KARRAS_RHO
        timesteps = np.interp(np.log(levels), np.log(table), every_t)
        if name != "euler":
            timesteps = timesteps.round()
    levels = np.append(levels, 0.0)
    alphas = 1.0 / np.sqrt(1.0 + levels**2)
    return _Steps(timesteps, alphas, levels * alphas)


def _check_num_steps(schedule: NoiseSchedule, num_steps: int) -> None:
    if not 1 <= num_steps <= schedule.num_train_timesteps:
        raise UserError(
            f"num_inference_steps: must be from 1 to {schedule.num_train_timesteps}, "
            f"not {num_steps}"
        )


def _step_count(num_steps: int, strength: float) -> int:
    """How many of the steps image to image takes."""
    if not 0 < strength <= 1:  # also NaN
        raise UserError(f"strength: must be above 0 and at most 1, not {strength}")
    count = int(num_steps * strength)
    if count == 0:
        raise UserError(
            f"strength: {strength} of {num_steps} steps is less than one; raise it, or "
            "num_inference_steps"
        )
    return count
