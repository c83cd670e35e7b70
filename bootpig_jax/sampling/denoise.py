r"""The denoising loop as a function of arrays: all noise is an argument.

Nothing here draws a random number, so a run can be replayed against another implementation number
for number. From x_T, the initial latents, each of the solver's n steps i at timestep t_i makes

1. the references' features. With `reference_timestep="same"` (the paper) the reference latents r
   are noised afresh to t_i with that step's own noise, alpha_t r + sigma_t eps_i, and go through
   the Reference UNet with the caption. With 0 they go through it once, clean and at t = 0, before
   the loop;
2. the three evaluations of the Base UNet that Eq. 4 needs, as one batch: without references and
   caption, with references, with both. The features, made with the caption, serve both branches
   that see references;
3. their guided combination, and from it the solver's next latents.

Without references this is Stable Diffusion with classifier-free guidance. Either way the loop is
one `lax.scan` in one compiled program, and the guidance scales are traced: new ones compile
nothing.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from bootpig_jax.attention import Strategy
from bootpig_jax.bootpig import reference_features
from bootpig_jax.diffusion.guidance import classifier_free_guidance, guide
from bootpig_jax.diffusion.schedule import NoiseSchedule
from bootpig_jax.diffusion.solvers import Solver
from bootpig_jax.models.blocks import References
from bootpig_jax.models.unet import UNet
from bootpig_jax.sampling.conditioning import ReferenceTimestep


def denoise(
    base: UNet,
    initial_latents: Float[Array, "b h w c"],
    text: Float[Array, "b l e"],
    empty_text: Float[Array, "1 l e"],
    *,
    solver: Solver,
    guidance_scale: float = 7.5,
) -> Float[Array, "b h w c"]:
    """Text to latents: Stable Diffusion with classifier-free guidance.

    Args:
        base: the UNet.
        initial_latents: x_T, standard normal.
        text: the prompts' token features.
        empty_text: the empty prompt's.
        solver: the timesteps and the update rule; from `make_solver`.
        guidance_scale: eta_txt; 1 means no guidance.

    Returns:
        The latents x_0, scaled as the UNet sees them (by the VAE's `scaling_factor`).
    """
    graph, state = nnx.split(base)
    return _denoise(graph, state, initial_latents, text, empty_text, solver, guidance_scale)


def denoise_with_references(
    base: UNet,
    reference: UNet,
    initial_latents: Float[Array, "b h w c"],
    text: Float[Array, "b l e"],
    empty_text: Float[Array, "1 l e"],
    reference_latents: Float[Array, "r k h w c"],
    reference_text: Float[Array, "r l e"],
    reference_noise: Float[Array, "n r k h w c"] | None,
    *,
    solver: Solver,
    schedule: NoiseSchedule,
    image_guidance_scale: float = 5.0,
    guidance_scale: float = 7.5,
    strategy: Strategy = "softmax",
    reference_timestep: ReferenceTimestep = "same",
    reference_key_scale: float = 1.0,
) -> Float[Array, "b h w c"]:
    """Text and references to latents: BootPIG.

    The b samples may share r sets of references, b a multiple of r: sample i then sees the set
    i // (b / r), whose features are computed once for all its samples.

    Args:
        base: the Base UNet theta.
        reference: the Reference UNet phi.
        initial_latents: x_T, standard normal.
        text: the prompts' token features.
        empty_text: the empty prompt's.
        reference_latents: the clean latents of each set's k references, scaled by the VAE's
            `scaling_factor`.
        reference_text: the token features that the Reference UNet reads, one caption for each set.
        reference_noise: the noise of the references at each of the solver's n steps, standard
            normal; `None` exactly if `reference_timestep` is 0.
        solver: the timesteps and the update rule; from `make_solver`.
        schedule: the noise schedule that `solver` was made from.
        image_guidance_scale: eta_im of Eq. 4.
        guidance_scale: eta_txt of Eq. 4.
        strategy: how several references are pooled.
        reference_timestep: "same" noises the references to each step's t; 0 leaves them clean.
        reference_key_scale: factor on the reference tokens that feed the keys.

    Returns:
        The latents x_0, scaled as the UNet sees them (by the VAE's `scaling_factor`).

    Raises:
        ValueError: `reference_noise` is there although references stay clean, or the reverse, or b
            is no multiple of r.
    """
    if (reference_noise is None) != (reference_timestep == 0):
        raise ValueError("reference_noise belongs to reference_timestep='same', and only to it")
    if len(initial_latents) % len(reference_latents):
        raise ValueError(
            f"{len(initial_latents)} samples cannot share {len(reference_latents)} reference sets"
        )
    graph, state = nnx.split(base)
    reference_graph, reference_state = nnx.split(reference)
    t = np.asarray(solver.timesteps)
    return _denoise_with_references(
        graph,
        state,
        reference_graph,
        reference_state,
        initial_latents,
        text,
        empty_text,
        reference_latents,
        reference_text,
        reference_noise,
        solver,
        schedule.alphas[t].astype(np.float32),
        schedule.sigmas[t].astype(np.float32),
        image_guidance_scale,
        guidance_scale,
        strategy,
        reference_key_scale,
    )


class _Step(NamedTuple):
    """What one step of the scan reads."""

    i: Int32[Array, ""]
    t: Int32[Array, ""]
    alpha: Float[Array, ""]
    sigma: Float[Array, ""]
    noise: Float[Array, "r k h w c"] | None


@partial(jax.jit, static_argnames="graph")
def _denoise(
    graph: nnx.GraphDef[UNet],
    state: nnx.State,
    initial_latents: Float[Array, "b h w c"],
    text: Float[Array, "b l e"],
    empty_text: Float[Array, "1 l e"],
    solver: Solver,
    guidance_scale: Float[Array, ""] | float,
) -> Float[Array, "b h w c"]:
    base = nnx.merge(graph, state)
    texts = jnp.concatenate([jnp.broadcast_to(empty_text, text.shape), text])

    def step(carry: Array, i_and_t: tuple[Array, Array]) -> tuple[Array, None]:
        i, t = i_and_t
        x = solver.latents(carry)
        output, _ = base(jnp.concatenate([x, x]), _timesteps(t, len(texts)), texts)
        u, u_text = jnp.split(output.astype(jnp.float32), 2)
        return solver.step(carry, classifier_free_guidance(u, u_text, guidance_scale), i), None

    t = jnp.asarray(solver.timesteps)
    carry, _ = jax.lax.scan(step, solver.init(initial_latents), (jnp.arange(len(t)), t))
    return solver.latents(carry)


@partial(
    jax.jit,
    static_argnames=("graph", "reference_graph", "strategy", "reference_key_scale"),
)
def _denoise_with_references(
    graph: nnx.GraphDef[UNet],
    state: nnx.State,
    reference_graph: nnx.GraphDef[UNet],
    reference_state: nnx.State,
    initial_latents: Float[Array, "b h w c"],
    text: Float[Array, "b l e"],
    empty_text: Float[Array, "1 l e"],
    reference_latents: Float[Array, "r k h w c"],
    reference_text: Float[Array, "r l e"],
    reference_noise: Float[Array, "n r k h w c"] | None,
    solver: Solver,
    alphas: Float[Array, " n"] | Float[np.ndarray, " n"],
    sigmas: Float[Array, " n"] | Float[np.ndarray, " n"],
    image_guidance_scale: Float[Array, ""] | float,
    guidance_scale: Float[Array, ""] | float,
    strategy: Strategy,
    reference_key_scale: float,
) -> Float[Array, "b h w c"]:
    base, reference = nnx.merge(graph, state), nnx.merge(reference_graph, reference_state)
    samples, sets = len(initial_latents), len(reference_latents)
    empty = jnp.broadcast_to(empty_text, text.shape)
    texts = jnp.concatenate([empty, empty, text])
    keep = jnp.repeat(jnp.array([False, True, True]), samples)

    def references(latents: Array, t: Array) -> References:
        features = reference_features(reference, latents, _timesteps(t, sets), reference_text)
        rows = [jnp.repeat(f, samples // sets, axis=0) for f in features]
        return References(
            features=tuple(jnp.concatenate([f, f, f]) for f in rows),
            keep=keep,
            key_scale=reference_key_scale,
            strategy=strategy,
        )

    clean = references(reference_latents, jnp.int32(0)) if reference_noise is None else None

    def step(carry: Array, at: _Step) -> tuple[Array, None]:
        seen = clean
        if at.noise is not None:
            seen = references(at.alpha * reference_latents + at.sigma * at.noise, at.t)
        x = solver.latents(carry)
        output, _ = base(jnp.concatenate([x, x, x]), _timesteps(at.t, len(texts)), texts, seen)
        u_sa, u_rsa, u_rsa_text = jnp.split(output.astype(jnp.float32), 3)
        guided = guide(u_sa, u_rsa, u_rsa_text, image_guidance_scale, guidance_scale)
        return solver.step(carry, guided, at.i), None

    t = jnp.asarray(solver.timesteps)
    steps = _Step(jnp.arange(len(t)), t, jnp.asarray(alphas), jnp.asarray(sigmas), reference_noise)
    carry, _ = jax.lax.scan(step, solver.init(initial_latents), steps)
    return solver.latents(carry)


def _timesteps(t: Int[Array, ""], count: int) -> Int[Array, " b"]:
    return jnp.broadcast_to(t, (count,))
