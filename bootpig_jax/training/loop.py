"""The loop around the step: batches in, metrics, sample grids and checkpoints out.

The loop never waits for the device between two readings of the metrics: a step is dispatched, and
while it runs the next batch is fetched, tokenised and sent.
"""

import faulthandler
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from bootpig_jax.bootpig import BootPIG
from bootpig_jax.checkpoints.tokenizer import Tokenizer
from bootpig_jax.config import LoggingConfig, TrainConfig
from bootpig_jax.data import pipeline
from bootpig_jax.data.cache import CachedBatch
from bootpig_jax.diffusion.solvers import make_solver
from bootpig_jax.errors import UserError
from bootpig_jax.sampling.conditioning import Conditioning
from bootpig_jax.sampling.denoise import denoise_with_references
from bootpig_jax.training.checkpointing import Checkpoints
from bootpig_jax.training.metrics import MetricLogger, picture_grid
from bootpig_jax.training.sharding import place_batch
from bootpig_jax.training.step import (
    Batch,
    Encoded,
    Frozen,
    Graphs,
    Metrics,
    Pictures,
    Posterior,
    TrainState,
    encode,
    merge_parameters,
)
from bootpig_jax.training.validation import Validate

TrainStep = Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]
CountFlops = Callable[[TrainState, Frozen, Batch], float]
DrawGrid = Callable[[TrainState], UInt8[np.ndarray, "H W 3"]]


def to_pictures(
    batch: pipeline.Batch, tokenizer: Tokenizer, conditioning: Conditioning
) -> Pictures:
    """Turns what the data pipeline yields into what the step takes: captions into token ids."""
    captions = [str(caption) for caption in batch["caption"]]
    match conditioning.reference_caption:
        case "target":
            reference_caption = None
        case "first_clause":
            reference_caption = tokenizer([conditioning.caption(caption) for caption in captions])
        case "object":
            reference_caption = tokenizer([str(words) for words in batch["object"]])
    return Pictures(
        target=batch["target"],
        reference=batch["reference"],
        caption=tokenizer(captions),
        reference_caption=reference_caption,
    )


def to_encoded(batch: CachedBatch) -> Encoded:
    """Turns what the cached loader yields into what the step takes."""
    return Encoded(
        target=Posterior(batch["target"][:, 0], batch["target"][:, 1]),
        reference=Posterior(batch["reference"][:, 0], batch["reference"][:, 1]),
        text=batch["text"],
        reference_text=batch.get("reference_text"),
    )


def run_steps(
    train_step: TrainStep,
    state: TrainState,
    frozen: Frozen,
    loader: grain.DatasetIterator,
    prepare: Callable[[Any], Batch],
    *,
    config: TrainConfig,
    mesh: Mesh,
    checkpoints: Checkpoints,
    logger: MetricLogger,
    count_flops: CountFlops | None = None,
    draw_grid: DrawGrid | None = None,
    validate: Validate | None = None,
) -> tuple[TrainState, bool]:
    """Trains until `config.steps` updates are made or the process is asked to end.

    Args:
      train_step: what `make_train_step` returns; it donates the state.
      state: where to start; do not use it afterwards.
      frozen: what the step reads.
      loader: this process's batches, at the position that belongs to `state`.
      prepare: turns a batch of the loader into one for the step.
      config: of the run.
      mesh: the devices.
      checkpoints: open.
      logger: open.
      count_flops: returns the FLOPs of an update, for the logger.
      draw_grid: draws samples of a state, every `config.logging.grid_every` updates.
      validate: measures a state on held-out samples, every `config.validation.every` updates.

    Returns:
      The state, saved, and whether the run is complete.
    """
    step, skipped = int(state.step), 0
    with stop_when_asked() as asked, end_if_hung(config.safety.hang_seconds) as alive:
        while step < config.steps and not asked(step):
            alive()
            before = time.perf_counter()
            batch = prepare(next(loader))
            waited = time.perf_counter() - before
            batch = place_batch(batch, mesh)
            if logger.flops is None and count_flops is not None:
                logger.flops = count_flops(state, frozen, batch)
            state, metrics = train_step(state, frozen, batch)
            step += 1
            for read in logger.update(step, metrics, waited):
                skipped = skipped + 1 if read["skipped"] else 0
                if skipped == config.safety.max_skipped:
                    raise UserError(
                        f"loss or gradients were not finite in {skipped} updates in a row, before "
                        f"update {step}: the state was left as it was; try smaller learning rates "
                        "or precision=float32"
                    )
            if step % config.checkpoint.every == 0:
                checkpoints.save(state, loader)
            if validate is not None and step % config.validation.every == 0:
                with logger.paused():
                    logger.scalars(step, "validation", validate(state))
            grid_every = config.logging.grid_every
            if draw_grid is not None and grid_every and step % grid_every == 0:
                with logger.paused():
                    logger.image(step, "samples", draw_grid(state))
        checkpoints.save(state, loader)
    return state, step >= config.steps


@contextmanager
def stop_when_asked() -> Iterator[Callable[[int], bool]]:
    """Turns SIGTERM, which schedulers send before they kill, into a question for the loop.

    Yields:
      A function of the number of updates made: whether to save now and stop. With several processes
      all answer alike, after the same update, whichever of them got the signal.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Python handles signals in the main thread only.
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def end_if_hung(seconds: int) -> Iterator[Callable[[], None]]:
    """Ends the process if a loader, a device or another process lets it wait for too long.

    The timer is Python's own (`faulthandler`), in a thread that needs no interpreter: it also goes
    off where a call into a library never returns. It prints every thread's stack on standard error.

    Args:
      seconds: between two signs of life; 0: no timer.

    Yields:
      A function to call as a sign of life.
    """
    if not seconds:
        yield lambda: None
        return
    try:
        # 2: standard error itself; what replaced `sys.stderr` may have no descriptor.
        yield lambda: faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    finally:
        faulthandler.cancel_dump_traceback_later()


def make_draw_grid(
    graphs: Graphs,
    frozen: Frozen,
    tokenizer: Tokenizer,
    examples: pipeline.Batch,
    conditioning: Conditioning,
    logging: LoggingConfig,
) -> DrawGrid:
    """Prepares the sample grid: a row for each example, its reference and then its prompts drawn.

    Everything but the trained weights is fixed: references, prompts, initial latents and noise.

    Args:
      graphs: the networks.
      frozen: their frozen parameters.
      tokenizer: for the prompts.
      examples: the references, with their captions and objects.
      conditioning: how the Reference UNet is used.
      logging: the prompts, the number of solver steps and the guidance.
    """
    vae = merge_parameters(graphs.vae, frozen.vae)
    text_encoder = merge_parameters(graphs.text_encoder, frozen.text_encoder)
    captions = [str(caption) for caption in examples["caption"]]
    objects = [str(words) for words in examples["object"]]
    # One row for each example: its prompts.
    prompts = [
        [prompt.replace("{object}", words) for prompt in logging.grid_prompts] or [caption]
        for caption, words in zip(captions, objects, strict=True)
    ]
    columns = len(prompts[0])
    flat = [prompt for row in prompts for prompt in row]
    reference_captions = (
        objects
        if conditioning.reference_caption == "object"
        else [conditioning.caption(caption) for caption in captions]
    )
    encoded = jax.jit(encode)(
        vae,
        text_encoder,
        Pictures(
            target=examples["reference"],
            reference=examples["reference"],
            caption=tokenizer(reference_captions),
            reference_caption=None,
        ),
    )
    text = jax.jit(lambda encoder, ids: encoder(ids))(text_encoder, tokenizer(flat))
    solver = make_solver("unipc", graphs.schedule, logging.grid_steps)
    latents = encoded.reference.mean.astype(jnp.float32)[:, None]
    keys = jax.random.split(jax.random.key(0), 2)
    initial = jax.random.normal(keys[0], (len(flat), *latents.shape[2:]))
    noise: Array | None = None
    if conditioning.reference_timestep == "same":
        noise = jax.random.normal(keys[1], (len(solver.timesteps), *latents.shape))
    references = examples["reference"]
    decode = jax.jit(lambda vae, latents: vae.decode_latents(latents))

    def draw_grid(state: TrainState) -> UInt8[np.ndarray, "H W 3"]:
        bootpig: BootPIG = merge_parameters(graphs.bootpig, state.result, frozen.unets)
        drawn = denoise_with_references(
            bootpig.base,
            bootpig.reference,
            initial.astype(graphs.dtype),
            text,
            frozen.empty_text[None],
            latents.astype(graphs.dtype),
            encoded.text,
            None if noise is None else noise.astype(graphs.dtype),
            solver=solver,
            image_guidance_scale=logging.image_guidance_scale,
            guidance_scale=logging.guidance_scale,
            reference_timestep=conditioning.reference_timestep,
            reference_key_scale=conditioning.reference_key_scale,
        )
        pictures = _to_bytes(np.asarray(decode(vae, drawn.astype(graphs.dtype)), np.float32))
        rows = pictures.reshape(len(references), columns, *pictures.shape[1:])
        return picture_grid(
            [
                np.concatenate([reference[None], row])
                for reference, row in zip(references, rows, strict=True)
            ]
        )

    return draw_grid


def _to_bytes(pictures: np.ndarray) -> np.ndarray:
    return np.clip(np.round((pictures + 1) * 127.5), 0, 255).astype(np.uint8)
