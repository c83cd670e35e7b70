"""What a training run will take, before it starts: bytes on each device, FLOPs, time.

    python -m bootpig_jax.train --config configs/paper.yaml --plan
    python -m bootpig_jax.train --config configs/paper.yaml --plan --accelerator v5p --devices 16
    python -m bootpig_jax.train --config configs/paper.yaml --plan --devices 16 mesh.fsdp=16

The step is compiled for the real shapes and nothing is loaded: of the base checkpoint only its
`config.json` files are read (`configs/models` holds those of Stable Diffusion 2.1-base).

- What stays on a device between steps (weights, optimiser) follows from shapes and shardings.
- What a step takes besides (activations, gradients, gathered weights) is the compiler's own
  account of its buffers. For the devices that are here, and for TPUs, which have a compiler that
  needs none (`training.accelerators`), it is that of the very program that would run.
- For any other accelerator it is an estimate: that of a program for this machine's CPU. Attention
  is the plain one there, in blocks of queries: up to a GiB more than a fused one takes.
- FLOPs are counted in the program as it is written (`training.flops`), so with what `remat`
  computes again.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from bootpig_jax.bootpig import BootPIG, is_trainable
from bootpig_jax.checkpoints.diffusers import find_model, read_json
from bootpig_jax.config import TrainConfig
from bootpig_jax.diffusion.schedule import NoiseSchedule
from bootpig_jax.errors import UserError
from bootpig_jax.kernels import Kernels, kernels_for
from bootpig_jax.models.shapes import OneKey
from bootpig_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from bootpig_jax.models.unet import UNet, UNetConfig
from bootpig_jax.models.vae import VAE, VAEConfig
from bootpig_jax.training.accelerators import Accelerator
from bootpig_jax.training.flops import PEAKS, count_flops
from bootpig_jax.training.optimizer import Parameters, make_optimizer
from bootpig_jax.training.sharding import BATCH, named, partition_specs
from bootpig_jax.training.step import (
    Batch,
    Encoded,
    Frozen,
    Graphs,
    Pictures,
    Posterior,
    TrainState,
    cast,
    first_state,
    make_train_step,
    split_parameters,
)

UTILISATION = 0.35
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes on one device. Bytes, unless said otherwise.

    Attributes:
        masters: the trained weights, float32, and their average if one is kept.
        moments: the optimiser's state.
        frozen: the weights that are read only.
        batch: the pictures and token ids.
        temporary: activations, gradients and everything else that lives within a step.
        compiled: what the compiler states itself, under its names.
        flops: of all devices together, for one update.
        devices: how many there are.
    """

    masters: int
    moments: int
    frozen: int
    batch: int
    temporary: int
    compiled: Mapping[str, int]
    flops: float
    devices: int

    @property
    def peak(self) -> int:
        """All of it: the most memory that a device needs at once."""
        return self.masters + self.moments + self.frozen + self.batch + self.temporary


def plan(config: TrainConfig, dtype: jnp.dtype, mesh: Mesh, kernels: Kernels | None = None) -> Plan:
    """Compiles the step for the mesh and adds up what it takes.

    Args:
      config: of the run.
      dtype: of the computation.
      mesh: the devices, which may be pretended ones.
      kernels: how they compute; what the mesh's devices have when `None`.

    Raises:
      UserError: the base checkpoint's `config.json` files are missing or not understood; or the
        compiler finds that the step does not fit the device's memory.
    """
    device = mesh.devices.flat[0]
    kernels = kernels or kernels_for(device)
    step, (state, frozen, batch) = abstract_step(config, dtype, mesh, kernels)
    traced = step.trace(state, frozen, batch)
    # What counts is the buffers, which are assigned before machine code is made: the code that is
    # made fastest will do. On a GPU the kernels that are chosen take buffers themselves.
    cheap = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options: dict[str, Any] = cheap if device.platform == "cpu" else {}
    memory = compile_to_fit(traced.lower(), options).memory_analysis()
    assert memory is not None  # every compiler that plans are made with tells
    return Plan(
        masters=_bytes_per_device((state.trainable, state.ema)),
        moments=_bytes_per_device(state.optimizer),
        frozen=_bytes_per_device(frozen),
        batch=_bytes_per_device(batch),
        # What is donated is counted as an argument already.
        temporary=memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        compiled={
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "peak": memory.peak_memory_in_bytes,
        },
        flops=count_flops(traced.jaxpr),
        devices=mesh.size,
    )


def compile_to_fit(lowered: jax.stages.Lowered, options: dict[str, Any]) -> jax.stages.Compiled:
    """Compiles a program.

    Raises:
      UserError: the compiler finds that it does not fit the device's memory.
    """
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        status, _, reason = str(error).partition(": ")
        if status != "RESOURCE_EXHAUSTED":
            raise
        raise UserError(
            f"the step does not fit the device: {reason.splitlines()[0].rstrip('.')}: raise "
            "accumulation or mesh.fsdp, or set remat=true"
        ) from None


def abstract_step(
    config: TrainConfig, dtype: jnp.dtype, mesh: Mesh, kernels: Kernels
) -> tuple[jax.stages.Wrapped, tuple[TrainState, Frozen, Batch]]:
    """Returns the training step and the shapes and shardings of its three arguments.

    Raises:
      UserError: the base checkpoint's `config.json` files are missing or not understood.
    """
    graphs, trainable, frozen = abstract_parts(config, dtype, kernels)
    optimizer = make_optimizer(config.optimizer, config.steps)
    min_size = config.mesh.fsdp_min_size
    state = jax.eval_shape(
        lambda t: first_state(t, optimizer, ema=config.ema_decay is not None), trainable
    )
    batch = _abstract_batch(config, graphs, frozen)
    if isinstance(batch, Encoded):
        frozen = dataclasses.replace(frozen, vae={}, text_encoder={})
    step = make_train_step(graphs, optimizer, config, mesh, state, frozen)
    return step, (
        _placed(state, partition_specs(state, mesh, min_size), mesh),
        _placed(frozen, partition_specs(frozen, mesh, min_size), mesh),
        _placed(batch, jax.tree.map(lambda _: BATCH, batch), mesh),
    )


def _abstract_batch(config: TrainConfig, graphs: Graphs, frozen: Frozen) -> Batch:
    """A batch as the loader makes it: of pictures, or with `data.cache` of latents."""
    count, size, text = config.batch_size, config.data.image_size, frozen.empty_text.shape
    separate = config.reference_caption != "target"

    def pictures() -> Pictures:
        picture = jnp.zeros((count, size, size, 3), jnp.uint8)
        ids = jnp.zeros((count, text[0]), jnp.int32)
        return Pictures(picture, picture, ids, ids if separate else None)

    def encoded() -> Encoded:
        side = size // graphs.latent_downsampling
        latents = jnp.zeros((count, side, side, graphs.latent_channels), graphs.dtype)
        features = jnp.zeros((count, *text), graphs.dtype)
        posterior = Posterior(latents, latents)
        return Encoded(posterior, posterior, features, features if separate else None)

    return jax.eval_shape(pictures if config.data.cache is None else encoded)


def abstract_parts(
    config: TrainConfig, dtype: jnp.dtype, kernels: Kernels
) -> tuple[Graphs, Parameters, Frozen]:
    """What `take_apart` returns, with shapes in the place of arrays.

    Raises:
      UserError: a `config.json` is missing or not understood.
    """
    folder: Path = find_model(config.model.base)
    unet_sizes = UNetConfig.from_dict(read_json(folder / "unet" / "config.json"))
    vae_sizes = VAEConfig.from_dict(read_json(folder / "vae" / "config.json"))
    text_sizes = TextEncoderConfig.from_dict(read_json(folder / "text_encoder" / "config.json"))
    schedule = NoiseSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    graphs: dict[str, nnx.GraphDef] = {}

    how: dict[str, Any] = {"rngs": OneKey(0), "dtype": dtype, "kernels": kernels}

    def parts() -> tuple[Parameters, Frozen]:
        def unet() -> UNet:
            return UNet(unet_sizes, **how)

        def selected(path: tuple[str | int, ...]) -> bool:
            trained = config.trainable
            return is_trainable(path, unet_sizes, trained.base, trained.reference)

        vae_network, text_network = VAE(vae_sizes, **how), TextEncoder(text_sizes, **how)
        graphs["bootpig"], trainable, rest = split_parameters(
            BootPIG(unet(), unet(), remat=config.remat), selected
        )
        graphs["vae"], vae, _ = split_parameters(vae_network, lambda path: True)
        graphs["text_encoder"], text, _ = split_parameters(text_network, lambda path: True)
        frozen = Frozen(
            unets=cast(rest, dtype),
            vae=cast(vae, dtype),
            text_encoder=cast(text, dtype),
            empty_text=jnp.zeros(
                (text_sizes.max_position_embeddings, text_sizes.hidden_size), dtype
            ),
        )
        return cast(trainable, jnp.dtype(jnp.float32)), frozen

    trainable, frozen = jax.eval_shape(parts)
    skeleton = Graphs(
        **graphs,
        schedule=schedule,
        dtype=dtype,
        latent_downsampling=vae_sizes.downsampling,
        latent_channels=vae_sizes.latent_channels,
    )
    return skeleton, trainable, frozen


def report(plan: Plan, compiler: str, accelerator: Accelerator | None = None) -> str:
    """Returns the plan as a table.

    Args:
      plan: of a run.
      compiler: whose account it is, such as `compiled for TPU v5e`.
      accelerator: that it is for; any when `None`.
    """
    rows = [
        ("trained weights, float32", plan.masters),
        ("optimiser", plan.moments),
        ("frozen weights", plan.frozen),
        ("batch", plan.batch),
        ("within a step: activations, gradients, ...", plan.temporary),
        ("together", plan.peak),
        *((f"stated by the compiler: {name}", size) for name, size in plan.compiled.items()),
    ]
    lines = [f"On each of {plan.devices} devices, GiB ({compiler}):"]
    lines += [f"  {name:<44}{size / GIB:10.4f}" for name, size in rows]
    if accelerator is not None:
        # What does not fit a TPU its compiler has refused.
        fits = "fits" if accelerator.axes or plan.peak <= accelerator.memory * GIB else "exceeds"
        lines.append(
            f"It {fits} {accelerator.name}, which has {accelerator.memory:.2f} GiB for a program."
        )
    lines.append(f"TFLOP an update, all devices: {plan.flops / 1e12:.2f}")
    lines.append(f"Seconds an update at {UTILISATION:.0%} of the devices' stated peak (estimated):")
    peaks = PEAKS if accelerator is None else {accelerator.name: accelerator.peak}
    lines += [
        f"  {name:<44}{plan.flops / (plan.devices * peak * UTILISATION):10.4f}"
        for name, peak in peaks.items()
    ]
    return "\n".join(lines)


def _placed(tree: Any, specs: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        named(specs, mesh),
    )


def _bytes_per_device(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
