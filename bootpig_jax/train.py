"""Trains BootPIG: `python -m bootpig_jax.train --config configs/toyland.yaml [key=value ...]`.

Writes to `output_dir`:

    config.yaml                the configuration that took effect
    checkpoints/               to resume from
    tensorboard/               scalars and sample grids
    history.jsonl              the scalars again; `python -m bootpig_jax.plot_run` draws them
    base_unet/ ref_unet/       the result in diffusers' layout, as safetensors
    bootpig.json               how the result wants its references; `BootPIGPipeline` reads it
    README.md                  the model card
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bootpig_jax.bootpig import BootPIG
from bootpig_jax.checkpoints.diffusers import (
    StableDiffusion,
    find_model,
    open_network,
    open_stable_diffusion,
)
from bootpig_jax.checkpoints.identity import hash_model
from bootpig_jax.config import TrainConfig
from bootpig_jax.data.cache import Contents, make_cached_loader, name_weights
from bootpig_jax.data.pipeline import (
    dataset_fingerprint,
    first_examples,
    make_loader,
    num_records,
)
from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.kernels import compute_dtype
from bootpig_jax.models.unet import UNet, UNetConfig
from bootpig_jax.sampling.conditioning import Conditioning
from bootpig_jax.sampling.trained import save_bootpig
from bootpig_jax.training.accelerators import ACCELERATORS, pretend
from bootpig_jax.training.checkpointing import Checkpoints
from bootpig_jax.training.distributed import join_processes, told_by_first
from bootpig_jax.training.flops import count_flops
from bootpig_jax.training.loop import make_draw_grid, run_steps, to_encoded, to_pictures
from bootpig_jax.training.metrics import MetricLogger, read_history, writing_to
from bootpig_jax.training.model_card import model_card
from bootpig_jax.training.optimizer import Parameters, make_optimizer, updates_made
from bootpig_jax.training.plan import plan, report
from bootpig_jax.training.sharding import check_batch, make_mesh, partition_specs, place
from bootpig_jax.training.step import (
    Batch,
    Frozen,
    TrainState,
    init_state,
    make_train_step,
    merge_parameters,
    split_parameters,
    take_apart,
    without_remat,
)
from bootpig_jax.training.validation import make_validation
from bootpig_jax.yaml_config import dump_config, parse_command_line

UNNAMED_WEIGHTS = (
    "warning: {0} was made before it was kept from which weights: they are taken for those in {1}"
)


def train(config: TrainConfig) -> None:
    """Trains, or goes on training, as the configuration says, and exports the result.

    Raises:
      UserError: before anything is written, if the run cannot work.
    """
    # 1. What can be checked without the model.
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, config.accumulation, mesh)
    fingerprint = dataset_fingerprint(config.data.dir, config.data.split)
    base = told_by_first(partial(base_sha256, config))
    checkpoints = Checkpoints(config, fingerprint, base)
    for step, reason in checkpoints.damaged.items():
        say(f"warning: checkpoint {step} is damaged ({reason}): it is moved aside")
    if not checkpoints.knows_base:
        say(UNNAMED_WEIGHTS.format(f"checkpoint {checkpoints.latest}", config.model.base))

    # 2. The model: what is trained in float32, what is frozen in the compute precision.
    dtype = training_dtype(config)
    #    Its weights stay in their files until step 3 puts them where they belong.
    model = open_stable_diffusion(
        config.model.base, dtype=dtype, allow_pickle=config.model.allow_pickle
    )
    check_image_size(config.data.image_size, model)
    conditioning = Conditioning(
        reference_timestep=config.reference_timestep,
        reference_key_scale=config.reference_key_scale,
        reference_caption=config.reference_caption,
    )
    graphs, trainable, frozen = take_apart(
        model, BootPIG.from_unet(model.unet, remat=config.remat), config.trainable, dtype
    )
    tokenizer = model.tokenizer

    # 3. On the devices.
    optimizer = make_optimizer(config.optimizer, config.steps)
    min_size = config.mesh.fsdp_min_size
    encodes = config.data.cache is None or config.validation.dir is not None
    if not encodes and not config.logging.grid_every:
        frozen = dataclasses.replace(frozen, vae={}, text_encoder={})  # Nobody reads them.
    frozen = place(frozen, partition_specs(frozen, mesh, min_size), mesh)
    state = init_state(trainable, optimizer, mesh, min_size, ema=config.ema_decay is not None)
    train_step = make_train_step(graphs, optimizer, config, mesh, state, frozen)

    def flops_of(state: TrainState, frozen: Frozen, batch: Batch) -> float:
        counted = train_step
        if config.remat:  # What is computed twice counts once.
            plain = without_remat(graphs, state, frozen)
            counted = make_train_step(plain, optimizer, config, mesh, state, frozen)
        return count_flops(counted.trace(state, frozen, batch).jaxpr)

    # 4. The data.
    share: dict[str, Any] = {
        "batch_size": config.batch_size // jax.process_count(),
        "seed": config.seed,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "num_threads": config.data.threads,
    }
    loader: grain.DatasetIterator[Any]
    prepare: Callable[[Any], Batch]
    if config.data.cache is None:
        loader = make_loader(
            config.data.dir,
            split=config.data.split,
            image_size=config.data.image_size,
            augmentation=config.data.augmentation,
            **share,
        )
        prepare = partial(to_pictures, tokenizer=tokenizer, conditioning=conditioning)
    else:
        contents = cache_contents(config, base)
        if jax.process_index() == 0 and name_weights(config.data.cache, contents):
            say(UNNAMED_WEIGHTS.format(f"data.cache {config.data.cache}", config.model.base))
        loader = make_cached_loader(config.data.cache, contents, **share)
        prepare = to_encoded
    # Read also where no grid is wanted: a dataset that does not fit is found before training.
    examples = first_examples(
        config.data.dir,
        split=config.data.split,
        count=config.logging.grid_references,
        image_size=config.data.image_size,
    )
    draw_grid = None
    if config.logging.grid_every:
        draw_grid = make_draw_grid(
            graphs, frozen, tokenizer, examples, conditioning, config.logging
        )

    validate = None
    if config.validation.dir is not None:
        held_out = first_examples(
            config.validation.dir,
            split=config.validation.split,
            count=config.validation.samples,
            image_size=config.data.image_size,
        )
        pictures = to_pictures(held_out, tokenizer, conditioning)
        validate = make_validation(graphs, frozen, pictures, config, mesh)

    # 5. Resume, then train.
    first = jax.process_index() == 0
    checkpoints.check_space(state)
    with checkpoints:
        if checkpoints.latest is not None:
            state = checkpoints.restore(state, loader)
            say(f"going on from step {checkpoints.latest} in {config.output_dir}")
        if first:
            with writing_to(config.output_dir):
                effective = dump_config(config)
                (config.output_dir / "config.yaml").write_text(effective, encoding="utf-8")
        with MetricLogger(
            config,
            first_step=int(state.step),
            first_update=updates_made(state.optimizer),
            active=first,
        ) as logger:
            state, complete = run_steps(
                train_step,
                state,
                frozen,
                loader,
                prepare,
                config=config,
                mesh=mesh,
                checkpoints=checkpoints,
                logger=logger,
                count_flops=flops_of,
                draw_grid=draw_grid,
                validate=validate,
            )
    if not complete:
        say(f"stopped at step {int(state.step)}, saved; the same command goes on from here")
        return

    # 6. The result.
    export(config, state, mesh, conditioning, base)
    say(f"exported to {config.output_dir}")


def base_sha256(config: TrainConfig) -> str:
    """Returns the hash of the base checkpoint's files; a hub id is downloaded first.

    Raises:
      UserError: it is missing, or cannot be read.
    """
    allow_pickle = config.model.allow_pickle
    folder = find_model(config.model.base, allow_pickle=allow_pickle)
    return hash_model(folder, allow_pickle=allow_pickle)


def cache_contents(config: TrainConfig, base: str) -> Contents:
    """Returns what a cache must be made of for this run."""
    return Contents(
        model=config.model.base,
        model_sha256=base,
        data_fingerprint=dataset_fingerprint(config.data.dir, config.data.split),
        split=config.data.split,
        image_size=config.data.image_size,
        augmentation=config.data.augmentation,
        reference_caption=config.reference_caption,
        copies=config.data.cache_copies,
        seed=config.seed,
        precision=training_dtype(config).name,
    )


def check_image_size(image_size: int, model: StableDiffusion) -> None:
    """Checks that the VAE and then the UNet can halve a picture as often as they do.

    Raises:
      UserError: they cannot.
    """
    multiple = model.vae.config.downsampling * model.unet.config.downsampling
    if image_size % multiple:
        raise UserError(
            f"data.image_size: {image_size} does not fit the model: use a multiple of {multiple}"
        )


def training_dtype(config: TrainConfig) -> jnp.dtype:
    """Returns the precision of the computation."""
    dtype = compute_dtype(config.precision)
    # Gradients in float16 would need a scaled loss.
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype


def export(
    config: TrainConfig,
    state: TrainState,
    mesh: Mesh,
    conditioning: Conditioning,
    base: str,
) -> None:
    """Writes both UNets in diffusers' layout, `bootpig.json` and the model card.

    What was not trained is read from the base checkpoint again: in memory it may be rounded to
    bfloat16.

    Args:
      config: of the run.
      state: its last.
      mesh: the devices.
      conditioning: how the Reference UNet was used.
      base: the base checkpoint's hash when the run began.

    Raises:
      UserError: the base checkpoint has changed since, or the folder cannot be written to.
    """
    first = jax.process_index() == 0
    trained: Parameters = {}
    for name, array in state.result.items():  # One at a time: each is whole on every device.
        whole = place(array, P(), mesh)
        if first:
            trained[name] = np.asarray(whole)  # type: ignore[assignment]
    if first:
        allow_pickle = config.model.allow_pickle
        if base_sha256(config) != base:
            raise UserError(
                f"model.base: the weights in {config.model.base} have changed while the run went "
                "on: restore them; the same command then exports"
            )
        folder = find_model(config.model.base, allow_pickle=allow_pickle)
        unet = open_network(folder / "unet", UNet, UNetConfig, allow_pickle=allow_pickle)
        graph, parameters, _ = split_parameters(BootPIG.from_unet(unet), lambda path: True)
        bootpig: BootPIG = merge_parameters(graph, parameters | trained)
        precision = np.dtype(config.export_precision)
        save_bootpig(config.output_dir, bootpig.base, bootpig.reference, conditioning, precision)
        history = read_history(config.output_dir)
        card = model_card(
            config,
            num_records(config.data.dir, config.data.split),
            int(state.step),
            next((row for row in reversed(history) if row["group"] == "validation"), None),
        )
        with writing_to(config.output_dir):
            (config.output_dir / "README.md").write_text(card, encoding="utf-8")


def say(message: str) -> None:
    """Prints a line on standard error, from the first process only."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--plan", action="store_true")
    flags.add_argument("--accelerator", choices=ACCELERATORS)
    flags.add_argument("--devices", type=int)
    options, rest = flags.parse_known_args(argv)
    config = parse_command_line(
        TrainConfig,
        rest,
        prog="python -m bootpig_jax.train",
        description="Trains BootPIG on a dataset that data_gen made. --plan [--accelerator "
        f"{'|'.join(ACCELERATORS)}] [--devices N] prints what a step takes and trains nothing: on "
        "this machine's devices, or on N accelerators that are not here.",
    )
    if options.plan:
        print_plan(config, options.accelerator, options.devices)
        return
    for name in ("accelerator", "devices"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: only together with --plan; training uses what is here")
    join_processes()
    train(config)


def print_plan(config: TrainConfig, accelerator: str | None, devices: int | None) -> None:
    """Prints what a step of this run takes.

    Args:
      config: of the run.
      accelerator: a key of `ACCELERATORS`, to plan for what is not here.
      devices: how many to plan for that are not here. None for those that are, or, with an
        accelerator, for one.
    """
    kernels, pretended = None, accelerator is not None or devices is not None
    if pretended:
        there, kernels = pretend(accelerator, 1 if devices is None else devices)
    else:
        there = jax.devices()
    mesh = make_mesh(config.mesh, there)
    check_batch(config.batch_size, config.accumulation, mesh)
    kind = None if accelerator is None else ACCELERATORS[accelerator]
    compiler = f"compiled for {kind.name if kind else there[0].device_kind}"
    if kernels is not None:
        compiler = "estimated: compiled for a CPU, with plain attention"
    say("compiling: minutes for a model of full size, for a TPU many")
    # What is planned for what is not here is a run on accelerators.
    planned = jnp.dtype("bfloat16") if pretended and config.precision == "auto" else None
    print(report(plan(config, planned or training_dtype(config), mesh, kernels), compiler, kind))


if __name__ == "__main__":
    run_cli(main)
