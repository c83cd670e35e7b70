"""AdamW as PyTorch computes it, with one learning rate for each of the two UNets.

Per tensor, after the gradients g of all trained tensors together were scaled down to norm
`clip_norm`:

    m <- b1 m + (1 - b1) g                 v <- b2 v + (1 - b2) g^2
    w <- (1 - lr wd) w - lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)

which is `torch.optim.AdamW` after `torch.nn.utils.clip_grad_norm_`. (PyTorch adds 1e-6 to the norm
it divides by; that is below float32's precision at norms above 10 and 1e-6 of the gradient at norm
1.)
"""

from collections.abc import Mapping

import jax.numpy as jnp
import optax
from jaxtyping import Array

from bootpig_jax.config import OptimizerConfig

Parameters = dict[str, Array]
"""Arrays by their dotted name in `BootPIG`, such as `base.conv_in.kernel`."""


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Builds the optimiser for parameters whose names start with `reference.` or `base.`.

    Args:
        config: learning rates and AdamW's constants.
        steps: the run's last update, at which a `cosine` schedule reaches 0.
    """

    def adamw(peak: float) -> optax.GradientTransformation:
        return optax.adamw(
            learning_rate(config, peak, steps),
            b1=config.betas[0],
            b2=config.betas[1],
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition(
            {"reference": adamw(config.lr_reference), "base": adamw(config.lr_rsa)},
            lambda parameters: {name: part_of(name) for name in parameters},
        ),
    )


def learning_rate(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates made.

    Args:
        config: warm-up and schedule.
        peak: `lr_reference` or `lr_rsa`.
        steps: the run's last update.
    """
    warmup = optax.linear_schedule(0.0, peak, max(1, config.warmup_steps))
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, max(1, steps - config.warmup_steps))
    else:
        rest = optax.constant_schedule(peak)
    return optax.join_schedules([warmup, rest], [config.warmup_steps])


def updates_made(state: optax.OptState) -> int:
    """Returns how many updates an optimiser of `make_optimizer` has made."""
    # All of its counters agree; each UNet's AdamW has two.
    return int(optax.tree_utils.tree_get_all_with_path(state, "count")[0][1])


def part_of(name: str) -> str:
    """Returns the UNet that a parameter belongs to: `reference` or `base`."""
    return name.partition(".")[0]


def gradient_norms(gradients: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the norm of all gradients and of each UNet's that is trained, before clipping."""
    squares = {name: jnp.sum(jnp.square(g)) for name, g in gradients.items()}
    parts = {"gradient_norm": list(squares.values())}
    for name, square in squares.items():
        parts.setdefault(f"gradient_norm_{part_of(name)}", []).append(square)
    return {label: jnp.sqrt(sum(values)) for label, values in parts.items()}
