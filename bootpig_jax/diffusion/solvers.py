r"""Solvers of the probability-flow ODE as tables of linear coefficients: UniPC and DDIM.

**One step is one small matrix.** A multistep solver only ever forms linear combinations of latents
and model outputs, with coefficients that depend on the schedule and not on the data. So its state
is a stack of S arrays of the latents' shape, s = (s_0 = x, s_1, ...), where x is what the network
sees next, and step i with the model output u is

    s <- W_i (s ; u),      W_i of shape [S, S + 1].

All W_i are computed in float64 from the schedule before sampling and stored as float32. A solver
*is* its timesteps and W; a new solver is a new function that fills W. The rows are written with
`_Linear`, a vector over the basis (s_0, ..., s_{S-1}, u).

Below, alpha_i, sigma_i and lambda_i = log(alpha_i / sigma_i) belong to timestep t_i of step i, and
i + 1 is where the step goes. x_0 and eps stand for the predictions that x and u imply
(`schedule.x0_coefficients`, `schedule.epsilon_coefficients`): linear in (x, u), too.

**DDIM** (eta = 0; Song et al., arXiv 2010.02502, Eq. 12). S = 1, s = (x):

    x <- alpha_{i+1} x_0 + sigma_{i+1} eps.

diffusers goes to t_i - T // n, which need not be t_{i+1}, and past t = 0 to `set_alpha_to_one`'s
alpha. Both are kept.

**UniPC** (Zhao et al., arXiv 2302.04867), data prediction, B(h) = e^h - 1 (bh2). Exactly, with
m(lambda) the x_0 prediction along the trajectory and h = lambda_{i+1} - lambda_i,

    x_{i+1} = (sigma_{i+1} / sigma_i) x_i
              + sigma_{i+1} \int_{lambda_i}^{lambda_{i+1}} e^lambda m(lambda) dlambda.

Hold m at m_i: the integral gives alpha_{i+1} (1 - e^{-h}) m_i, the first-order update (it is
DDIM). Otherwise m is interpolated through m_i and q further points at relative positions
r_j = (lambda_j - lambda_i) / h, with differences D_j = (m_j - m_i) / r_j:

    x_{i+1} = (sigma_{i+1} / sigma_i) x_i + alpha_{i+1} (1 - e^{-h}) (m_i + sum_j rho_j D_j).

The weights rho make this exact for polynomials m of degree up to q. With s = lambda - lambda_i and
the integrals e^{-h} \int_0^h e^s s^k ds = k! h^{k+1} phi_{k+1}(-h), that is, for k = 1..q,

    sum_j r_j^{k-1} rho_j = k! h phi_{k+1}(-h) / (1 - e^{-h}) = k! g_k / (e^{-h} - 1),

where g_k = -h phi_{k+1}(-h) follows from phi_1(z) = (e^z - 1) / z and
phi_{k+1}(z) = (phi_k(z) - 1 / k!) / z:

    g_1 = (e^{-h} - 1) / (-h) - 1,      g_{k+1} = g_k / (-h) - 1 / (k + 1)!.

The *predictor* UniP-p takes the p - 1 points before i. The *corrector* UniC-p, once m_{i+1} is
known from the network at the predicted x_{i+1}, redoes the same step with the point r = 1, m_{i+1}
added. With one point (UniP-2, UniC-1) the paper takes rho = 1/2, as diffusers does.

Step i of the table thus (1) reads m_i from (x, u); (2) corrects x_i, starting again from the
corrected x_{i-1}; (3) predicts x_{i+1}. The state is s = (x_i predicted, x_{i-1} corrected,
m_{i-1}, ..., m_{i-p}). The order is min(p, i + 1, n - i): a warm-up, and first order at the end.
The last step ends at sigma = 0, where h is infinite: there e^{-h} = 0 and the first-order update is
x = m_i.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int, Int32

from bootpig_jax.diffusion.schedule import (
    NoiseSchedule,
    epsilon_coefficients,
    x0_coefficients,
)
from bootpig_jax.errors import UserError

SolverName = Literal["unipc", "ddim"]

# A linear combination of the state's arrays and the model output, as a vector over that basis.
_Linear = Float64[np.ndarray, " basis"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Solver:
    """A linear multistep solver: where to evaluate the network, and what to do with its outputs.

    A pytree whose leaves are the two tables: pass it to a jitted function as an argument, and
    neither a new prompt or seed nor another schedule with as many steps compiles anew.

    Attributes:
        timesteps: descending, one for each step, int32 [n].
        weights: W_i of every step, float32 [n, S, S + 1]; see the module's docstring.
    """

    timesteps: Int32[np.ndarray, " n"] | Int32[Array, " n"]
    weights: Float32[np.ndarray, "n s s+1"] | Float32[Array, "n s s+1"]

    def init(self, latents: Float[Array, "*shape"]) -> Float32[Array, " s *shape"]:
        """The state before the first step, from standard normal latents."""
        size = self.weights.shape[1]
        state = jnp.zeros((size, *latents.shape), jnp.float32)
        return state.at[0].set(latents.astype(jnp.float32))

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


def make_solver(name: str, schedule: NoiseSchedule, num_steps: int) -> Solver:
    """Builds a solver by name.

    Args:
        name: "unipc" or "ddim".
        schedule: the checkpoint's noise schedule; decides the timesteps and the prediction type.
        num_steps: how many times the network is evaluated.

    Raises:
        UserError: the name is unknown, or the schedule has no room for that many steps.
    """
    if name == "unipc":
        return unipc(schedule, num_steps)
    if name == "ddim":
        return ddim(schedule, num_steps)
    raise UserError(f"solver: {name!r} is unknown; use one of {', '.join(get_args(SolverName))}")


def ddim(schedule: NoiseSchedule, num_steps: int) -> Solver:
    """DDIM with eta = 0, as diffusers' `DDIMScheduler`."""
    _check_num_steps(schedule, num_steps)
    total = schedule.num_train_timesteps
    ascending: np.ndarray
    match schedule.timestep_spacing or "leading":
        case "linspace":
            ascending = np.linspace(0, total - 1, num_steps).round()
        case "leading":
            ascending = np.arange(num_steps) * (total // num_steps) + schedule.steps_offset
        case "trailing":
            ascending = _trailing(total, num_steps)
    timesteps = _checked_timesteps(ascending, schedule, num_steps)

    next_timesteps = timesteps - total // num_steps
    final = 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0]
    next_alphas_cumprod = np.where(
        next_timesteps >= 0, schedule.alphas_cumprod[next_timesteps], final
    )
    next_alpha, next_sigma = np.sqrt(next_alphas_cumprod), np.sqrt(1.0 - next_alphas_cumprod)
    alpha, sigma = schedule.alphas[timesteps], schedule.sigmas[timesteps]

    x0 = np.stack(x0_coefficients(schedule.prediction_type, alpha, sigma), axis=-1)
    epsilon = np.stack(epsilon_coefficients(schedule.prediction_type, alpha, sigma), axis=-1)
    weights = next_alpha[:, None] * x0 + next_sigma[:, None] * epsilon
    return Solver(timesteps, weights[:, None, :].astype(np.float32))


def unipc(schedule: NoiseSchedule, num_steps: int) -> Solver:
    """UniPC of order `schedule.solver_order`, as diffusers' `UniPCMultistepScheduler` (bh2)."""
    _check_num_steps(schedule, num_steps)
    total = schedule.num_train_timesteps
    # Unlike DDIM's, these spacings leave out t = 0 (before the offset).
    ascending: np.ndarray
    match schedule.timestep_spacing or "linspace":
        case "linspace":
            ascending = np.linspace(0, total - 1, num_steps + 1).round()[1:]
        case "leading":
            ascending = np.arange(1, num_steps + 1) * (total // (num_steps + 1))
            ascending = ascending + schedule.steps_offset
        case "trailing":
            ascending = _trailing(total, num_steps)
    timesteps = _checked_timesteps(ascending, schedule, num_steps)

    # At zero terminal SNR lambda would be -inf; diffusers takes the smallest half-precision number.
    alphas_cumprod = schedule.alphas_cumprod[timesteps]
    alphas_cumprod = np.where(alphas_cumprod > 0, alphas_cumprod, 2.0**-24)
    # One more entry than steps: the last step ends without noise.
    alpha = np.append(np.sqrt(alphas_cumprod), 1.0)
    sigma = np.append(np.sqrt(1.0 - alphas_cumprod), 0.0)
    with np.errstate(divide="ignore"):
        lambda_ = np.log(alpha) - np.log(sigma)

    size = 2 + schedule.solver_order  # x_i predicted, x_{i-1} corrected, and the last m's
    basis = np.eye(size + 1)
    x, corrected, history, output = basis[0], basis[1], list(basis[2:size]), basis[size]
    x0_on_x, x0_on_output = x0_coefficients(schedule.prediction_type, alpha, sigma)

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
        x_i = x if i == 0 else update(i - 1, corrected, history[:previous_order], [m_i])
        m = [m_i, *history[:-1]]
        previous_order = min(schedule.solver_order, i + 1, num_steps - i)
        weights[i] = np.stack([update(i, x_i, m[:previous_order], []), x_i, *m])
    return Solver(timesteps, weights.astype(np.float32))


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


def _trailing(total: int, num_steps: int) -> Float64[np.ndarray, " n"]:
    """T, T - T/n, ..., T/n, rounded as diffusers rounds them, minus one; ascending."""
    # For some n (61, say, at T = 1000) the range overshoots by rounding: diffusers then has an
    # extra timestep of -1.
    return np.arange(total, 0, -total / num_steps)[:num_steps].round()[::-1] - 1


def _check_num_steps(schedule: NoiseSchedule, num_steps: int) -> None:
    if not 1 <= num_steps <= schedule.num_train_timesteps:
        raise UserError(
            f"num_inference_steps: must be from 1 to {schedule.num_train_timesteps}, "
            f"not {num_steps}"
        )


def _checked_timesteps(
    ascending: np.ndarray, schedule: NoiseSchedule, num_steps: int
) -> Int32[np.ndarray, " n"]:
    """The timesteps, descending; refuses what diffusers would turn into NaN or an index error."""
    timesteps = ascending[::-1].astype(np.int32)
    in_range = timesteps[-1] >= 0 and timesteps[0] < schedule.num_train_timesteps
    if len(timesteps) != num_steps or not in_range or not np.all(np.diff(timesteps) < 0):
        raise UserError(
            f"num_inference_steps: {num_steps} steps do not fit this checkpoint's "
            f"{schedule.num_train_timesteps} timesteps; use fewer"
        )
    return timesteps
