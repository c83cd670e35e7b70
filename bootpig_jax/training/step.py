"""One training step: Eq. 1 with both dropouts, its gradient, and an AdamW update.

For a batch of targets x and references r with captions c, and for each sample

    t ~ U{0 .. T-1}        eps, eps_r ~ N(0, 1)        keep_f, keep_c ~ B(1 - 0.15)

    f    = features of the Reference UNet phi at (r_t, t, c_r),   r_t = alpha_t r + sigma_t eps_r
    u    = U_theta(x_t, t, f if keep_f, c if keep_c else "")      x_t = alpha_t x + sigma_t eps
    loss = mean |eps - u|^2                                       (v-prediction: the velocity)

in the latent space of the VAE, whose posterior is sampled, as Stable Diffusion was trained. With
`reference_timestep: 0` the references stay clean, r_0 = r, and phi is told t = 0.

Every random quantity is an argument (`Draws`), so a step can be replayed against another
implementation. `encode` (pictures to latents, captions to features; never differentiated) and
`bootpig_loss` are separate, so a batch may carry `Pictures` or what `encode` made of them earlier.

Parameters are flat dictionaries `{dotted name: array}`. `is_trainable` splits them in two: what is
trained has float32 masters, optimiser state and a place in the checkpoint; the rest is an input.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray, UInt8

from bootpig_jax.bootpig import BootPIG, is_trainable, reference_features
from bootpig_jax.checkpoints.diffusers import StableDiffusion
from bootpig_jax.config import TrainableConfig, TrainConfig
from bootpig_jax.diffusion.schedule import NoiseSchedule, add_noise, training_target
from bootpig_jax.models.blocks import References
from bootpig_jax.models.text_encoder import TextEncoder
from bootpig_jax.models.vae import VAE
from bootpig_jax.training.optimizer import Parameters, gradient_norms
from bootpig_jax.training.sharding import (
    BATCH,
    gather,
    named,
    partition_specs,
    place,
    reduce_mean,
)

Metrics = dict[str, Array]
Features = tuple[Array, ...]
TIMESTEP_BUCKETS = 10
EIGHT_BITS = 257 / 2**15  # of 1 / 127.5: the product with a byte is exact in float32
Module = TypeVar("Module", bound=nnx.Module)


# The fields of the pytrees below are arrays of the given shapes, or under JAX's transformations
# whatever stands for them: shapes, shardings, partition specs. So their types say only `Array`.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pictures:
    """A batch as the data pipeline makes it.

    Attributes:
        target: [b, H, W, 3] in 0 .. 255, a byte a value: so they travel to the devices.
        reference: [b, H, W, 3] likewise.
        caption: [b, l] token ids for the Base UNet.
        reference_caption: [b, l] token ids for the Reference UNet; None if it reads the same
        caption.
    """

    target: Array | np.ndarray
    reference: Array | np.ndarray
    caption: Array | np.ndarray
    reference_caption: Array | np.ndarray | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Posterior:
    """The Gaussian that the VAE's encoder returns, times the VAE's scaling factor.

    Attributes:
        mean: [b, h, w, c].
        std: [b, h, w, c].
    """

    mean: Array
    std: Array

    def sample(self, noise: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns the scaled latents for standard normal `noise`."""
        return self.mean + self.std * noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """A batch after the frozen VAE and text encoder.

    Attributes:
        target: the targets' latents.
        reference: the references' latents.
        text: [b, l, e], the captions' features, for the Base UNet.
        reference_text: [b, l, e] for the Reference UNet; None if it reads the same caption.
    """

    target: Posterior
    reference: Posterior
    text: Array
    reference_text: Array | None


Batch = Pictures | Encoded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """Everything random in a step.

    Attributes:
        target_posterior: [b, h, w, c] standard normal, for the sample from the VAE's posterior.
        reference_posterior: likewise, for the references.
        target_noise: [b, h, w, c], eps of Eq. 1.
        reference_noise: likewise, for the references.
        t: [b] int32, timesteps in [0, T).
        keep_reference: [b], False where the Base UNet sees no reference.
        keep_caption: [b], False where the Base UNet's caption is empty.
    """

    target_posterior: Array
    reference_posterior: Array
    target_noise: Array
    reference_noise: Array
    t: Array
    keep_reference: Array
    keep_caption: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a step reads and never changes.

    Attributes:
        unets: those parameters of `BootPIG` that are not trained.
        vae: the autoencoder's parameters.
        text_encoder: the text encoder's parameters.
        empty_text: [l, e], the features of the empty caption.
    """

    unets: Parameters
    vae: Parameters
    text_encoder: Parameters
    empty_text: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes and a checkpoint holds.

    Attributes:
        step: [], how many updates were made.
        trainable: the trained parameters of `BootPIG`, float32.
        optimizer: the state of the optimiser over `trainable`.
        ema: the running average of `trainable`; empty if none is kept.
    """

    step: Array
    trainable: Parameters
    optimizer: optax.OptState
    ema: Parameters

    @property
    def result(self) -> Parameters:
        """What is validated, drawn with and exported: the running average where one is kept."""
        return self.ema or self.trainable


@dataclasses.dataclass(frozen=True)
class Graphs:
    """The networks without their parameters, and the noise schedule."""

    bootpig: nnx.GraphDef
    vae: nnx.GraphDef
    text_encoder: nnx.GraphDef
    schedule: NoiseSchedule
    dtype: jnp.dtype
    latent_downsampling: int
    latent_channels: int


def draw(
    key: PRNGKeyArray,
    latents: tuple[int, int, int, int],
    *,
    num_timesteps: int,
    reference_dropout: float,
    reference_dropout_unit: Literal["sample", "batch"],
    caption_dropout: float,
) -> Draws:
    """Draws what a step needs.

    Args:
      key: of this step alone.
      latents: the shape of the batch's latents.
      num_timesteps: T.
      reference_dropout: how often references are dropped (§3.3).
      reference_dropout_unit: `batch`: one draw for all samples, as in the release.
      caption_dropout: how often captions are dropped (Algorithm 1), independently.
    """
    key_noise, key_t, key_reference, key_caption = jax.random.split(key, 4)
    batch = latents[:1]
    # One draw for all four: a program that compiles faster.
    noise = jax.random.normal(key_noise, (latents[0], 4, *latents[1:]))
    unit = () if reference_dropout_unit == "batch" else batch
    keep_reference = jax.random.bernoulli(key_reference, 1.0 - reference_dropout, unit)
    return Draws(
        target_posterior=noise[:, 0],
        reference_posterior=noise[:, 1],
        target_noise=noise[:, 2],
        reference_noise=noise[:, 3],
        t=jax.random.randint(key_t, batch, 0, num_timesteps),
        keep_reference=jnp.broadcast_to(keep_reference, batch),
        keep_caption=jax.random.bernoulli(key_caption, 1.0 - caption_dropout, batch),
    )


def encode(vae: VAE, text_encoder: TextEncoder, pictures: Pictures) -> Encoded:
    """Applies the frozen VAE encoder and text encoder to a batch."""

    def posterior(images: Array | np.ndarray) -> Posterior:
        mean, log_variance = vae.encode(unit_range(jnp.asarray(images)))
        scale = vae.config.scaling_factor
        return Posterior(scale * mean, scale * jnp.exp(0.5 * log_variance))

    reference_text = None
    if pictures.reference_caption is not None:
        reference_text = text_encoder(jnp.asarray(pictures.reference_caption))
    return Encoded(
        target=posterior(pictures.target),
        reference=posterior(pictures.reference),
        text=text_encoder(jnp.asarray(pictures.caption)),
        reference_text=reference_text,
    )


def unit_range(pictures: UInt8[Array, "b H W 3"]) -> Float32[Array, "b H W 3"]:
    """Maps 0 .. 255 to [-1, 1], exactly at both ends: `x / 127.5 - 1`, to the bit.

    Compilers make a product with the reciprocal of the quotient, which rounds otherwise. Here the
    first product is exact and the second one its rest, so their sum is the quotient, rounded.
    """
    x = pictures.astype(jnp.float32)
    return (x * EIGHT_BITS + x * (1 / 127.5 - EIGHT_BITS)) - 1


def bootpig_loss(
    bootpig: BootPIG,
    encoded: Encoded,
    empty_text: Float[Array, "l e"],
    draws: Draws,
    schedule: NoiseSchedule,
    *,
    reference_timestep: Literal["same", 0] = "same",
    reference_key_scale: float = 1.0,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[Float[Array, " b"], tuple[Features, Features]]:
    """Computes each sample's loss: Eq. 1 with the dropouts of §3.3 and Algorithm 1.

    Args:
      bootpig: both UNets.
      encoded: the batch.
      empty_text: the features of the empty caption.
      draws: everything random.
      schedule: the base checkpoint's noise schedule; it says what is predicted.
      reference_timestep: `same`: references are noised to the target's t. 0: they stay clean.
      reference_key_scale: factor on the reference tokens that feed the keys.
      dtype: of the UNets' inputs. The loss is computed in float32.

    Returns:
      The losses; and the inputs of the self-attention layers in execution order, of the Base UNet
      [b, n, d] and of the Reference UNet [b, 1, n, d]. Where nobody uses these, the compiler drops
      them.
    """
    target = encoded.target.sample(draws.target_posterior)
    reference = encoded.reference.sample(draws.reference_posterior)
    if reference_timestep == "same":
        t_reference = draws.t
        reference = add_noise(schedule, reference, draws.reference_noise, t_reference)
    else:
        t_reference = jnp.zeros_like(draws.t)

    reference_text = encoded.text if encoded.reference_text is None else encoded.reference_text
    features = reference_features(
        bootpig.reference,
        reference[:, None].astype(dtype),
        t_reference,
        reference_text.astype(dtype),
    )
    text = jnp.where(draws.keep_caption[:, None, None], encoded.text, empty_text)
    noised = add_noise(schedule, target, draws.target_noise, draws.t)
    prediction, base_features = bootpig.base(
        noised.astype(dtype),
        draws.t,
        text.astype(dtype),
        References(features, keep=draws.keep_reference, key_scale=reference_key_scale),
    )
    truth = training_target(schedule, target, draws.target_noise, draws.t)
    error = prediction.astype(jnp.float32) - truth
    return jnp.mean(jnp.square(error), axis=(1, 2, 3)), (base_features, features)


def loss_by_timestep(
    losses: Float[Array, " b"], t: Int[Array, " b"], num_timesteps: int
) -> Metrics:
    """Sorts losses by timestep: their mean hides learning, as it depends most on the t drawn.

    Args:
      losses: one for each sample.
      t: their timesteps.
      num_timesteps: T.

    Returns:
      For each tenth of [0, T), divided by the batch size: `loss_in_bucket`, the sum of the losses,
      and `bucket_count`. Their quotient is the mean; both can be averaged over batches before.
    """
    in_bucket = t[:, None] * TIMESTEP_BUCKETS // num_timesteps == jnp.arange(TIMESTEP_BUCKETS)
    return {
        # Not a product: one loss that is not finite would spoil all buckets.
        "loss_in_bucket": jnp.mean(jnp.where(in_bucket, losses[:, None], 0.0), axis=0),
        "bucket_count": jnp.mean(in_bucket.astype(jnp.float32), axis=0),
    }


def split_parameters(
    module: nnx.Module, selected: Callable[[tuple[Any, ...]], bool]
) -> tuple[nnx.GraphDef, Parameters, Parameters]:
    """Splits a module into its graph, the parameters that `selected` picks, and the rest."""
    graph, state = nnx.split(module)
    picked: Parameters = {}
    rest: Parameters = {}
    for path, variable in nnx.to_flat_state(state):
        (picked if selected(path) else rest)[".".join(map(str, path))] = variable.get_value()
    return graph, picked, rest


def merge_parameters(graph: nnx.GraphDef, *parameters: Parameters) -> Any:
    """Puts a module together again: the inverse of `split_parameters`."""
    flat: dict[tuple[Any, ...], Any] = {
        tuple(int(part) if part.isdigit() else part for part in name.split(".")): nnx.Param(array)
        for group in parameters
        for name, array in group.items()
    }
    return nnx.merge(graph, nnx.from_flat_state(flat))


def cast(parameters: Parameters, to: jnp.dtype) -> Parameters:
    """Returns the parameters in another precision."""
    return {name: array.astype(to) for name, array in parameters.items()}


def take_apart(
    model: StableDiffusion, bootpig: BootPIG, trainable: TrainableConfig, dtype: jnp.dtype
) -> tuple[Graphs, Parameters, Frozen]:
    """Splits the networks into static graphs, trained and frozen parameters.

    Args:
      model: where the VAE, the text encoder, the tokenizer and the schedule come from.
      bootpig: the two UNets, which compute in `dtype`.
      trainable: which parts of them are trained.
      dtype: the precision of the frozen parameters. Trained ones are float32.

    Returns:
      The graphs, the trained and the frozen parameters. What is `Stored` stays so until `place`.
    """

    def selected(path: tuple[str | int, ...]) -> bool:
        return is_trainable(path, bootpig.base.config, trainable.base, trainable.reference)

    graph, trained, rest = split_parameters(bootpig, selected)
    vae_graph, vae, _ = split_parameters(model.vae, lambda path: True)
    text_graph, text_encoder, _ = split_parameters(model.text_encoder, lambda path: True)
    text_encoder = cast(text_encoder, dtype)
    # Read for this alone, and once more where it is wanted on the mesh.
    encoder = merge_parameters(
        text_graph, {name: jnp.asarray(array[...]) for name, array in text_encoder.items()}
    )
    empty_text = jax.jit(lambda encoder, ids: encoder(ids))(encoder, model.tokenizer([""]))[0]
    graphs = Graphs(
        bootpig=graph,
        vae=vae_graph,
        text_encoder=text_graph,
        schedule=model.schedule,
        dtype=dtype,
        latent_downsampling=model.vae.config.downsampling,
        latent_channels=model.vae.config.latent_channels,
    )
    frozen = Frozen(
        unets=cast(rest, dtype),
        vae=cast(vae, dtype),
        text_encoder=text_encoder,
        empty_text=empty_text.astype(dtype),
    )
    return graphs, cast(trained, jnp.float32), frozen


def without_remat(graphs: Graphs, state: TrainState, frozen: Frozen) -> Graphs:
    """Returns the graphs of networks that keep all activations for the backward pass."""
    bootpig: BootPIG = merge_parameters(graphs.bootpig, state.trainable, frozen.unets)
    bootpig.base.remat = bootpig.reference.remat = False
    return dataclasses.replace(graphs, bootpig=nnx.graphdef(bootpig))


def first_state(
    trainable: Parameters, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """Returns the state before the first update.

    Args:
      trainable: the trained parameters.
      optimizer: what `make_optimizer` returns.
      ema: whether a running average of the parameters is kept.
    """
    average = jax.tree.map(jnp.copy, trainable) if ema else {}
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), average)


def init_state(
    trainable: Parameters,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    fsdp_min_size: int,
    *,
    ema: bool = False,
) -> TrainState:
    """Lays the trained parameters and a new optimiser state out on the mesh."""

    def init(trainable: Parameters) -> TrainState:
        return first_state(trainable, optimizer, ema=ema)

    trainable = place(trainable, partition_specs(trainable, mesh, fsdp_min_size), mesh)
    specs = partition_specs(jax.eval_shape(init, trainable), mesh, fsdp_min_size)
    # Donated, or the copies of the masters would live twice.
    return jax.jit(init, out_shardings=named(specs, mesh), donate_argnums=0)(trainable)


def make_train_step(
    graphs: Graphs,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    mesh: Mesh,
    state: TrainState,
    frozen: Frozen,
) -> jax.stages.Wrapped:
    """Compiles the step for states and frozen parameters of the given shapes.

    Args:
      graphs: the networks.
      optimizer: what `make_optimizer` returns.
      config: dropouts, accumulation and what the references look like.
      mesh: the devices.
      state: a state, or its shapes.
      frozen: the frozen parameters, or their shapes.

    Returns:
      `step(state, frozen, batch) -> (state, metrics)`. It donates the state it is given. The
      metrics lie on the device: the batch's `loss`, those of `loss_by_timestep`, gradient norms
      before clipping, and `skipped`: 1 where loss or gradients are not finite. Only the step count
      changes then.
    """
    state_specs = partition_specs(state, mesh, config.mesh.fsdp_min_size)
    frozen_specs = partition_specs(frozen, mesh, config.mesh.fsdp_min_size)
    side = config.data.image_size // graphs.latent_downsampling
    latents = (config.batch_size, side, side, graphs.latent_channels)

    def loss(
        trainable: Parameters, frozen: Frozen, batch: Batch, draws: Draws
    ) -> tuple[Array, Metrics]:
        if isinstance(batch, Pictures):
            batch = jax.lax.stop_gradient(
                encode(
                    merge_parameters(graphs.vae, frozen.vae),
                    merge_parameters(graphs.text_encoder, frozen.text_encoder),
                    batch,
                )
            )
        losses, _ = bootpig_loss(
            merge_parameters(graphs.bootpig, trainable, frozen.unets),
            batch,
            frozen.empty_text,
            draws,
            graphs.schedule,
            reference_timestep=config.reference_timestep,
            reference_key_scale=config.reference_key_scale,
            dtype=graphs.dtype,
        )
        return jnp.mean(losses), loss_by_timestep(
            losses, draws.t, graphs.schedule.num_train_timesteps
        )

    def local_gradients(
        trainable: Parameters, frozen: Frozen, batch: Batch, draws: Draws
    ) -> tuple[tuple[Array, Metrics], Parameters]:
        # In the precision that the layers compute in: half the bytes of the masters'.
        trainable = gather(trainable, state_specs.trainable, graphs.dtype)
        frozen = gather(frozen, frozen_specs, graphs.dtype)

        def of_part(part: Any) -> tuple[tuple[Array, Metrics], Parameters]:
            values, gradients = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, *part)
            # Summed over micro-batches and devices in float32.
            return values, cast(gradients, jnp.float32)

        values, gradients = accumulate(of_part, (batch, draws), config.accumulation)
        whole = jax.tree.map(lambda _: P(), values)
        return reduce_mean(values, whole), reduce_mean(gradients, state_specs.trainable)

    gradients_of = jax.shard_map(
        local_gradients,
        mesh=mesh,
        in_specs=(state_specs.trainable, frozen_specs, BATCH, BATCH),
        out_specs=(P(), state_specs.trainable),
        # Tracking what varies over devices would reduce the gradients in every micro-batch.
        check_vma=False,
    )

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        draws = draw(
            jax.random.fold_in(jax.random.key(config.seed), state.step),
            latents,
            num_timesteps=graphs.schedule.num_train_timesteps,
            reference_dropout=config.reference_dropout,
            reference_dropout_unit=config.reference_dropout_unit,
            caption_dropout=config.caption_dropout,
        )
        (value, by_timestep), gradients = gradients_of(state.trainable, frozen, batch, draws)
        norms = gradient_norms(gradients)
        # A norm is finite only if every gradient is, and AdamW takes a finite state and finite
        # gradients to a finite state.
        finite = jnp.isfinite(value) & jnp.isfinite(norms["gradient_norm"])

        updates, moments = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        ema = {
            name: config.ema_decay * average + (1 - config.ema_decay) * trainable[name]
            for name, average in state.ema.items()
            if config.ema_decay is not None
        }
        # Not a conditional: a GPU's host would wait for its predicate in every step.
        new, old = (trainable, moments, ema), (state.trainable, state.optimizer, state.ema)
        trainable, moments, ema = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        metrics = {
            "loss": value,
            **by_timestep,
            **norms,
            "skipped": 1.0 - finite.astype(jnp.float32),
        }
        return TrainState(state.step + 1, trainable, moments, ema), metrics

    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(named(state_specs, mesh), NamedSharding(mesh, P())),
    )


Tree = TypeVar("Tree")


def accumulate(function: Callable[[Any], Tree], batch: Any, parts: int) -> Tree:
    """Returns the mean of `function` over `parts` equal parts of a batch, one after the other."""
    if parts == 1:
        return function(batch)
    # Sample i goes to part i mod parts, the same on every device.
    batches = jax.tree.map(
        lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1), batch
    )
    zeros = jax.tree.map(
        jnp.zeros_like, jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], batches))
    )

    def add(total: Tree, part: Any) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    total, _ = jax.lax.scan(add, zeros, batches)
    return jax.tree.map(lambda leaf: leaf / parts, total)
