"""The loss on held-out triplets, and how much attention goes to their references.

Everything but the trained weights is fixed: samples, noise, and timesteps, which are spread evenly
over [0, T). So two values differ by what was learned, not by what was drawn.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from bootpig_jax.bootpig import BootPIG
from bootpig_jax.config import TrainConfig
from bootpig_jax.training.metrics import summary
from bootpig_jax.training.optimizer import Parameters
from bootpig_jax.training.step import (
    Draws,
    Frozen,
    Graphs,
    Pictures,
    TrainState,
    bootpig_loss,
    encode,
    loss_by_timestep,
    merge_parameters,
)

BATCH_SIZE = 8  # samples at once, on every device

Validate = Callable[[TrainState], dict[str, float]]


def make_validation(
    graphs: Graphs, frozen: Frozen, pictures: Pictures, config: TrainConfig, mesh: Mesh
) -> Validate:
    """Prepares the validation.

    Args:
      graphs: the networks.
      frozen: their frozen parameters.
      pictures: the held-out samples, the same on all processes.
      config: of the run.
      mesh: the devices. All compute the same.

    Returns:
      A function of a state: the `summary` of all samples, among it `reference_share`, the share of
      the Base UNet's self-attention that goes to the reference, also by layer in execution order.
    """
    count = len(pictures.target)
    side = config.data.image_size // graphs.latent_downsampling
    shape = (count, 4, side, side, graphs.latent_channels)
    # NumPy's: several processes then hold the same, on no device yet.
    noise: Any = np.asarray(jax.random.normal(jax.random.key(0), shape))
    num_timesteps = graphs.schedule.num_train_timesteps
    everything: Any = np.ones(count, bool)
    t: Any = ((np.arange(count) + 0.5) * num_timesteps / count).astype(np.int32)
    draws = Draws(
        target_posterior=noise[:, 0],
        reference_posterior=noise[:, 1],
        target_noise=noise[:, 2],
        reference_noise=noise[:, 3],
        t=t,
        keep_reference=everything,
        keep_caption=everything,
    )

    def measure(
        trainable: Parameters, frozen: Frozen, pictures: Pictures, draws: Draws
    ) -> tuple[Array, Array]:
        """The losses [b], and the shares [layers, b]."""
        bootpig: BootPIG = merge_parameters(graphs.bootpig, trainable, frozen.unets)
        losses, (features, reference_features) = bootpig_loss(
            bootpig,
            encode(
                merge_parameters(graphs.vae, frozen.vae),
                merge_parameters(graphs.text_encoder, frozen.text_encoder),
                pictures,
            ),
            frozen.empty_text,
            draws,
            graphs.schedule,
            reference_timestep=config.reference_timestep,
            reference_key_scale=config.reference_key_scale,
            dtype=graphs.dtype,
        )
        shares: list[Array] = [
            attention.reference_share(f, f_ref[:, 0], config.reference_key_scale)
            for attention, f, f_ref in zip(
                bootpig.base.self_attentions(), features, reference_features, strict=True
            )
        ]
        return losses, jnp.stack(shares)

    compiled = jax.jit(measure, out_shardings=NamedSharding(mesh, P()))
    size = min(BATCH_SIZE, count)

    def part(tree: Any, start: int) -> Any:
        # The last part is filled up with the last sample: one program for all.
        rows = np.minimum(np.arange(start, start + size), count - 1)
        return jax.tree.map(lambda leaf: leaf[rows], tree)

    def validate(state: TrainState) -> dict[str, float]:
        parts = [
            compiled(state.result, frozen, part(pictures, start), part(draws, start))
            for start in range(0, count, size)
        ]
        losses, shares = (
            np.concatenate(one, axis=-1)[..., :count]
            for one in zip(*jax.device_get(parts), strict=True)
        )
        metrics = {
            "loss": losses.mean(),
            "skipped": np.zeros(()),
            "reference_share": shares.mean(axis=-1),
            **jax.device_get(loss_by_timestep(jnp.asarray(losses), jnp.asarray(t), num_timesteps)),
        }
        return summary([metrics])

    return validate
