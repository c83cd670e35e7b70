r"""The denoising loop as a function of arrays: all noise is an argument.

Nothing here draws a random number, so a run can be replayed against another implementation number
for number. From x_T, the initial latents, each of the solver's n steps i at timestep t_i makes

1. the references' features. With `reference_timestep="same"` (the paper) the reference latents r
   are noised afresh to t_i with that step's own noise, alpha_i r + sigma_i eps_i, and go through
   the Reference UNet with the caption. With 0 they go through it once, clean and at t = 0, before
   the loop. All samples of a set share them;
2. the three evaluations of the Base UNet that Eq. 4 needs, as one batch: without references and
   caption, with references, with both. The features, made with the caption, serve both branches
   that see references. What the three have in common is computed once (`UNet`);
3. their guided combination, and from it the solver's next latents.

Without references this is Stable Diffusion with classifier-free guidance. Either way the loop is
one `lax.scan` in one compiled program. Everything but shapes and the pooling is traced: new
prompts, noise, scales and solver tables of the same length compile nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, Int32

from bootpig_jax.attention import Strategy
from bootpig_jax.bootpig import reference_features
from bootpig_jax.diffusion.guidance import Scale, classifier_free_guidance, guide
from bootpig_jax.diffusion.solvers import Solver
from bootpig_jax.models.blocks import SharedReferences
from bootpig_jax.models.unet import UNet
from bootpig_jax.sampling.conditioning import ReferenceTimestep

# Called after each step with the number of steps done and the latents; raises to stop.
OnStep = Callable[[int, Array], None]
Features = tuple[Array, ...]


@struct.dataclass
class KeptLatents:
    """The part of a picture that inpainting leaves as it is (App. F).

    Attributes:
        latents: the picture's clean latents, for each sample or one for all.
        mask: 1 where the picture is drawn anew, 0 where it is kept.
    """

    latents: Float[Array, "#b h w c"]
    mask: Float[Array, "#b h w 1"]


def denoise(
    base: UNet,
    initial_latents: Float[Array, "b h w c"],
    text: Float[Array, "b l e"],
    empty_text: Float[Array, "#b l e"],
    *,
    solver: Solver,
    guidance_scale: float = 7.5,
    guidance_interval: tuple[float, float] | None = None,
    kept: KeptLatents | None = None,
    start_from: Float[Array, "#b h w c"] | None = None,
    on_step: OnStep | None = None,
) -> Float[Array, "b h w c"]:
    """Text to latents: Stable Diffusion with classifier-free guidance.

    Args:
        base: the UNet.
        initial_latents: x_T, standard normal.
        text: the prompts' token features.
        empty_text: the empty prompt's, or negative prompts'; for each sample or one for all.
        solver: the timesteps and the update rule; from `make_solver`.
        guidance_scale: eta_txt; 1 means no guidance.
        guidance_interval: step i of n is guided if low <= i / n < high; the others evaluate only
            the branch that sees everything. `None`: all are.
        kept: for inpainting, what of a picture stays. Before each evaluation it is put in place,
            noised with `initial_latents`, and at the end clean.
        start_from: for image to image, the clean latents that the solver starts from, noised with
            `initial_latents`.
        on_step: progress; the program is then called step by step.

    Returns:
        The latents x_0, scaled as the UNet sees them (by the VAE's `scaling_factor`).
    """
    run = _Run(
        solver=solver,
        noise=initial_latents,
        text=text,
        empty_text=empty_text,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        kept=kept,
        start_from=start_from,
        references=None,
    )
    return _denoise((base,), run, None, "softmax", on_step)


def denoise_with_references(
    base: UNet,
    reference: UNet,
    initial_latents: Float[Array, "b h w c"],
    text: Float[Array, "b l e"],
    empty_text: Float[Array, "#b l e"],
    reference_latents: Float[Array, "r k h w c"],
    reference_text: Float[Array, "r l e"],
    reference_noise: Float[Array, "n r k h w c"] | None,
    *,
    solver: Solver,
    image_guidance_scale: float = 5.0,
    guidance_scale: float = 7.5,
    strategy: Strategy = "softmax",
    reference_timestep: ReferenceTimestep = "same",
    reference_key_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    reuse_features: int = 1,
    kept: KeptLatents | None = None,
    start_from: Float[Array, "#b h w c"] | None = None,
    on_step: OnStep | None = None,
) -> Float[Array, "b h w c"]:
    """Text and references to latents: BootPIG.

    The b samples may share r sets of references, b a multiple of r: sample i then sees the set
    i // (b / r), whose features are computed once for all its samples.

    Args:
        base: the Base UNet theta.
        reference: the Reference UNet phi.
        initial_latents: x_T, standard normal.
        text: the prompts' token features.
        empty_text: the empty prompt's, or negative prompts'; for each sample or one for all. Both
            branches without a caption see it.
        reference_latents: the clean latents of each set's k references, scaled by the VAE's
            `scaling_factor`.
        reference_text: the token features that the Reference UNet reads, one caption for each set.
        reference_noise: the noise of the references at each of the solver's n steps, standard
            normal; `None` exactly if `reference_timestep` is 0.
        solver: the timesteps and the update rule; from `make_solver`.
        image_guidance_scale: eta_im of Eq. 4.
        guidance_scale: eta_txt of Eq. 4.
        strategy: how several references are pooled.
        reference_timestep: "same" noises the references to each step's t; 0 leaves them clean.
        reference_key_scale: factor on the reference tokens that feed the keys.
        guidance_interval: as in `denoise`.
        reuse_features: for how many steps the references' features are kept; more than 1 is an
            approximation.
        kept: as in `denoise`.
        start_from: as in `denoise`.
        on_step: as in `denoise`.

    Returns:
        The latents x_0, scaled as the UNet sees them (by the VAE's `scaling_factor`).

    Raises:
        ValueError: `reference_noise` is there although references stay clean, or the reverse, or is
            not for n steps, or b is no multiple of r, or `reuse_features` is below 1.
    """
    if (reference_noise is None) != (reference_timestep == 0):
        raise ValueError("reference_noise belongs to reference_timestep='same', and only to it")
    if reference_noise is not None and len(reference_noise) != len(solver.timesteps):
        raise ValueError(
            f"reference_noise is for {len(reference_noise)} steps, not {len(solver.timesteps)}"
        )
    if len(initial_latents) % len(reference_latents):
        raise ValueError(
            f"{len(initial_latents)} samples cannot share {len(reference_latents)} reference sets"
        )
    if reuse_features < 1:
        raise ValueError(f"reuse_features: {reuse_features} is less than 1")
    reused = reference_noise is not None and reuse_features > 1
    run = _Run(
        solver=solver,
        noise=initial_latents,
        text=text,
        empty_text=empty_text,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        kept=kept,
        start_from=start_from,
        references=_References(
            latents=reference_latents,
            text=reference_text,
            key_scale=reference_key_scale,
            guidance_scale=image_guidance_scale,
            reuse=reuse_features if reused else None,
        ),
    )
    return _denoise((base, reference), run, reference_noise, strategy, on_step)


class _References(NamedTuple):
    """What `_Run` says of references. `reuse` is `None` where no step uses another's features."""

    latents: Float[Array, "r k h w c"]
    text: Float[Array, "r l e"]
    key_scale: Scale
    guidance_scale: Scale
    reuse: int | Int32[Array, ""] | None


class _Run(NamedTuple):
    """What all steps read."""

    solver: Solver
    noise: Float[Array, "b h w c"]
    text: Float[Array, "b l e"]
    empty_text: Float[Array, "#b l e"]
    guidance_scale: Scale
    guidance_interval: tuple[Scale, Scale] | None
    kept: KeptLatents | None
    start_from: Float[Array, "#b h w c"] | None
    references: _References | None

    def keep(self, state: Float[Array, "s b h w c"], i: Array | int) -> Float[Array, "s b h w c"]:
        """The solver's state before step i, with the picture's kept part in place."""
        if self.kept is None:
            return state
        alpha, sigma = jnp.asarray(self.solver.alphas)[i], jnp.asarray(self.solver.sigmas)[i]
        picture = alpha * self.kept.latents + sigma * self.noise
        mask = self.kept.mask
        # The rest of the state is of no account there: it only ever makes latents to be replaced.
        return state.at[0].set(mask * self.solver.latents(state) + (1 - mask) * picture)


class _Step(NamedTuple):
    """What one step reads."""

    i: Int32[Array, ""]
    reference_noise: Float[Array, "r k h w c"] | None


class _Carry(NamedTuple):
    """What one step hands to the next; features only where they are kept."""

    state: Float[Array, "s b h w c"]
    features: Features | None


def _denoise(
    networks: tuple[UNet, ...],
    run: _Run,
    reference_noise: Float[Array, "n r k h w c"] | None,
    strategy: Strategy,
    on_step: OnStep | None,
) -> Float[Array, "b h w c"]:
    graphs, weights = zip(*map(nnx.split, networks), strict=True)
    n = len(run.solver.timesteps)
    steps = _Step(jnp.arange(n), reference_noise)
    carry = _start(graphs, weights, run, reference_noise is None)
    if on_step is None:
        carry = _advance(graphs, weights, run, carry, steps, strategy)
    else:
        for i in range(n):
            one = jax.tree.map(lambda x: x[i : i + 1], steps)  # noqa: B023 - used at once
            carry = _advance(graphs, weights, run, carry, one, strategy)
            on_step(i + 1, jax.block_until_ready(run.solver.latents(carry.state)))
    return run.solver.latents(carry.state)


@partial(jax.jit, static_argnames=("graphs", "clean"))
def _start(
    graphs: tuple[nnx.GraphDef[UNet], ...],
    weights: tuple[nnx.State, ...],
    run: _Run,
    clean: bool,
) -> _Carry:
    """What the first step finds: the solver's state, and the features of clean references."""
    if run.start_from is None:
        state = run.solver.init(run.noise)
    else:
        state = run.solver.start(jnp.broadcast_to(run.start_from, run.noise.shape), run.noise)
    features: Features | None = None
    if run.references is not None and (clean or run.references.reuse is not None):
        reference = nnx.merge(graphs[1], weights[1])
        features = _features(reference, run.references, run.references.latents, jnp.int32(0))
        if not clean:  # the first step makes its own; only their shapes are needed
            features = jax.tree.map(jnp.zeros_like, features)
    return _Carry(run.keep(state, 0), features)


@partial(jax.jit, static_argnames=("graphs", "strategy"))
def _advance(
    graphs: tuple[nnx.GraphDef[UNet], ...],
    weights: tuple[nnx.State, ...],
    run: _Run,
    carry: _Carry,
    steps: _Step,
    strategy: Strategy,
) -> _Carry:
    """Makes the given steps."""
    base, *others = map(nnx.merge, graphs, weights)
    solver, references = run.solver, run.references
    timesteps = jnp.asarray(solver.timesteps)
    alphas, sigmas = jnp.asarray(solver.alphas), jnp.asarray(solver.sigmas)

    def features_at(at: _Step, kept: Features | None) -> Features | None:
        if references is None or at.reference_noise is None:
            return kept
        noised = alphas[at.i] * references.latents + sigmas[at.i] * at.reference_noise

        def make() -> Features:
            return _features(others[0], references, noised, timesteps[at.i])

        if references.reuse is None:
            return make()
        return jax.lax.cond(at.i % references.reuse == 0, make, lambda: kept)

    def step(carry: _Carry, at: _Step) -> tuple[_Carry, None]:
        features = features_at(at, carry.features)
        x = solver.latents(carry.state)
        t = jnp.broadcast_to(timesteps[at.i], len(x))

        def guided() -> Array:
            return _guided(base, x, t, run, features, strategy)

        def unguided() -> Array:
            seen = _seen(run.references, features, strategy, plain=0, seeing=len(x))
            return base(x, t, run.text, seen)[0].astype(jnp.float32)

        if run.guidance_interval is None:
            output = guided()
        else:
            low, high = run.guidance_interval
            position = at.i / len(timesteps)
            output = jax.lax.cond((low <= position) & (position < high), guided, unguided)
        state = run.keep(solver.step(carry.state, output, at.i), at.i + 1)
        return _Carry(state, None if carry.features is None else features), None

    return jax.lax.scan(step, carry, steps)[0]


def _guided(
    base: UNet,
    x: Float[Array, "b h w c"],
    t: Array,
    run: _Run,
    features: Features | None,
    strategy: Strategy,
) -> Float[Array, "b h w c"]:
    """The branches of Eq. 4 in one batch, combined; two branches where there are no references."""
    samples = np.arange(len(x))
    empty = jnp.broadcast_to(run.empty_text, run.text.shape)
    if run.references is None:
        rows = np.concatenate([samples, samples])
        output, _ = base(x, t, jnp.concatenate([empty, run.text]), rows=rows)
        u, u_text = jnp.split(output.astype(jnp.float32), 2)
        return classifier_free_guidance(u, u_text, run.guidance_scale)
    # A sample's two rows that see references stand side by side, and so do the rows of a set.
    rows = np.concatenate([samples, np.repeat(samples, 2)])
    pairs = jnp.stack([empty, run.text], axis=1).reshape(-1, *empty.shape[1:])
    seen = _seen(run.references, features, strategy, plain=len(x), seeing=2 * len(x))
    output, _ = base(x, t, jnp.concatenate([empty, pairs]), seen, rows)
    u_sa, u_rsa = jnp.split(output.astype(jnp.float32), [len(x)])
    u_rsa, u_rsa_text = u_rsa[0::2], u_rsa[1::2]
    return guide(u_sa, u_rsa, u_rsa_text, run.references.guidance_scale, run.guidance_scale)


def _seen(
    references: _References | None,
    features: Features | None,
    strategy: Strategy,
    *,
    plain: int,
    seeing: int,
) -> SharedReferences | None:
    if references is None or features is None:
        return None
    return SharedReferences(features, references.key_scale, strategy, plain, seeing)


def _features(
    reference: UNet, references: _References, latents: Float[Array, "r k h w c"], t: Array
) -> Features:
    timesteps = jnp.broadcast_to(t, len(latents))
    return reference_features(reference, latents, timesteps, references.text)
