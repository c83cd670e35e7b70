r"""Trains Toyland's Stable Diffusion from nothing: the VAE, then the UNet with its text encoder.

    python -m bootpig_jax.toyland.train_sd --run runs/toyland_sd \
        --output bootpig_jax/toyland/weights/sd

Both stages resume from their checkpoints under `--run`. The result is a folder in diffusers'
layout.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from bootpig_jax.checkpoints.diffusers import (
    load_network,
    load_stable_diffusion,
    save_network,
    save_unet,
)
from bootpig_jax.checkpoints.tokenizer import load_tokenizer
from bootpig_jax.diffusion.schedule import NoiseSchedule, add_noise, training_target
from bootpig_jax.errors import run_cli
from bootpig_jax.files import local_path
from bootpig_jax.models.text_encoder import TextEncoder
from bootpig_jax.models.unet import UNet
from bootpig_jax.models.vae import VAE, VAEConfig
from bootpig_jax.toyland import sd_config, world
from bootpig_jax.toyland.render import render

SEED = 0
KL_WEIGHT = 1e-5
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.9995
SAVE_EVERY = 500  # steps
VAE_BATCH_SIZE, UNET_BATCH_SIZE = 16, 32

State = dict[str, Any]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--run", type=local_path, required=True, help="checkpoints, resumed if present"
    )
    parser.add_argument(
        "--output", type=local_path, required=True, help="where the model is written"
    )
    parser.add_argument("--pictures", type=int, default=40_000, help="how many are rendered")
    parser.add_argument("--vae-steps", type=int, default=2_500)
    parser.add_argument("--unet-steps", type=int, default=4_500)
    parser.add_argument("--stage", choices=("vae", "unet", "all"), default="all")
    arguments = parser.parse_args()

    pictures, captions = render_pictures(arguments.pictures)
    args = (arguments.run, arguments.output, pictures)
    if arguments.stage in ("vae", "all"):
        train_vae(*args, steps=arguments.vae_steps)
    if arguments.stage in ("unet", "all"):
        train_unet(*args, captions, steps=arguments.unet_steps)


def render_pictures(count: int) -> tuple[UInt8[np.ndarray, "n 64 64 3"], list[str]]:
    """Pictures of training subjects and their captions; number `i` depends on `i` alone."""
    pictures = np.empty((count, 64, 64, 3), np.uint8)
    captions = []
    for i in tqdm(range(count), desc="rendering", mininterval=5):
        rng = np.random.default_rng((SEED, i))
        category = world.CATEGORIES[rng.integers(len(world.CATEGORIES))]
        scene = world.SCENES[rng.integers(len(world.SCENES))]
        position = world.POSITIONS[rng.integers(len(world.POSITIONS))]
        subject = world.sample_subject(rng, category, "train")
        pictures[i] = render(subject, scene, position, rng).image
        captions.append(world.caption(category, position, scene))
    return pictures, captions


def train_vae(
    run: Path,
    output: Path,
    pictures: UInt8[np.ndarray, "n 64 64 3"],
    *,
    steps: int,
) -> None:
    """Trains the autoencoder on the error of the picture, and writes it with its scaling factor."""
    vae = VAE(sd_config.VAE_SIZES, rngs=nnx.Rngs(SEED))
    graph, params = nnx.split(vae)

    def loss_fn(params: Any, batch: Array, key: Array) -> tuple[Array, dict[str, Array]]:
        images = _normalised(batch)
        vae = nnx.merge(graph, params)
        mean, log_variance = vae.encode(images)
        noise = jax.random.normal(key, mean.shape)
        decoded = vae.decode(mean + jnp.exp(0.5 * log_variance) * noise)
        squared = jnp.mean(jnp.square(decoded - images))
        absolute = jnp.mean(jnp.abs(decoded - images))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
        metrics = {"psnr": 10 * jnp.log10(4 / squared)}
        return squared + 0.2 * absolute + KL_WEIGHT * kl, metrics

    state = _train(
        "vae",
        run / "vae",
        params,
        loss_fn,
        _batches(len(pictures), VAE_BATCH_SIZE, lambda i: pictures[i]),
        steps=steps,
        learning_rate=2e-3,
    )
    vae = nnx.merge(graph, state["ema"])
    mean, _ = _encode_all(vae, pictures[:2048])
    scaling_factor = float(1 / np.std(mean.astype(np.float32)))
    vae.config = dataclasses.replace(sd_config.VAE_SIZES, scaling_factor=scaling_factor)
    save_network(output / "vae", vae, "AutoencoderKL", "diffusion_pytorch_model", np.float16)


def train_unet(
    run: Path,
    output: Path,
    pictures: UInt8[np.ndarray, "n 64 64 3"],
    captions: list[str],
    *,
    steps: int,
) -> None:
    """Trains the UNet and the text encoder together on Eq. 1, and writes both."""
    sd_config.write_small_files(output)
    vae = load_network(output / "vae", VAE, VAEConfig)
    tokenizer = load_tokenizer(output / "tokenizer")
    schedule = NoiseSchedule.from_config(sd_config.SCHEDULER)
    moments = _encode_all(vae, pictures)
    ids = tokenizer(captions)
    empty = jnp.asarray(tokenizer([""]))

    graph, params = nnx.split(
        nnx.Dict(
            unet=UNet(sd_config.UNET_SIZES, rngs=nnx.Rngs(SEED)),
            text_encoder=TextEncoder(sd_config.text_encoder_sizes(), rngs=nnx.Rngs(SEED + 1)),
        )
    )

    def loss_fn(params: Any, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        mean, log_variance, ids = batch
        networks = nnx.merge(graph, params)
        keys = jax.random.split(key, 4)
        drop = jax.random.bernoulli(keys[0], CAPTION_DROPOUT, (len(ids), 1))
        text = networks["text_encoder"](jnp.where(drop, empty, ids))
        latents = vae_scale * (
            mean + jnp.exp(0.5 * log_variance) * jax.random.normal(keys[1], mean.shape)
        )
        noise = jax.random.normal(keys[2], mean.shape)
        t = jax.random.randint(keys[3], (len(ids),), 0, 1000)
        prediction, _ = networks["unet"](add_noise(schedule, latents, noise, t), t, text)
        target = training_target(schedule, latents, noise, t)
        return jnp.mean(jnp.square(prediction - target)), {}

    vae_scale = vae.config.scaling_factor
    state = _train(
        "unet",
        run / "unet",
        params,
        loss_fn,
        _batches(len(pictures), UNET_BATCH_SIZE, lambda i: (moments[0][i], moments[1][i], ids[i])),
        steps=steps,
        learning_rate=1.5e-3,
    )
    networks: Any = nnx.merge(graph, state["ema"])
    save_unet(output / "unet", networks["unet"], np.float16)
    save_network(
        output / "text_encoder", networks["text_encoder"], "CLIPTextModel", "model", np.float16
    )
    load_stable_diffusion(output)


def _train(
    name: str,
    folder: Path,
    params: Any,
    loss_fn: Callable[[Any, Any, Array], tuple[Array, dict[str, Array]]],
    batches: Callable[[int], Iterator[Any]],
    *,
    steps: int,
    learning_rate: float,
) -> State:
    """Adam with warm-up and cosine decay, an average of the weights, checkpoints and progress."""
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 200, steps, learning_rate / 50)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-3)
    )
    state: State = {
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "optimizer": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
    }

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: Any) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(SEED), state["step"])
        (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state["params"], batch, key
        )
        updates, moments = optimizer.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        # Young averages follow faster, or the random start would stay in them.
        decay = jnp.minimum(EMA_DECAY, (1 + state["step"]) / (10 + state["step"]))
        ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state["ema"], params)
        state = {"params": params, "ema": ema, "optimizer": moments, "step": state["step"] + 1}
        return state, {"loss": loss, **metrics}

    options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(folder.absolute(), options=options) as checkpoints:
        latest = checkpoints.latest_step()
        if latest is not None:
            state = checkpoints.restore(latest, args=ocp.args.StandardRestore(state))
        first = int(state["step"])
        progress = tqdm(total=steps, initial=first, desc=name, unit="step", mininterval=5)
        recent: list[dict[str, Array]] = []
        started = time.monotonic()
        for i, batch in zip(range(first, steps), batches(first), strict=False):
            state, metrics = step(state, batch)
            recent.append(metrics)
            progress.update()
            if (i + 1) % 100 == 0:
                means = {k: float(np.mean([m[k] for m in recent])) for k in recent[0]}
                rate_now = (i + 1 - first) / (time.monotonic() - started)
                progress.set_postfix(means, refresh=False)
                tqdm.write(f"{name} {i + 1}/{steps} {means} {rate_now:.2f} steps/s")
                recent.clear()
            if (i + 1) % SAVE_EVERY == 0 or i + 1 == steps:
                checkpoints.save(i + 1, args=ocp.args.StandardSave(state))
        progress.close()
    return state


def _batches(
    count: int, batch_size: int, select: Callable[[np.ndarray], Any]
) -> Callable[[int], Iterator[Any]]:
    """Endless shuffled batches; the batch at a step depends on the step alone."""

    def batches(first: int) -> Iterator[Any]:
        per_epoch = count // batch_size
        step = first
        while True:
            epoch, position = divmod(step, per_epoch)
            order = np.random.default_rng((SEED, epoch)).permutation(count)
            for i in range(position, per_epoch):
                yield select(order[i * batch_size : (i + 1) * batch_size])
                step += 1

    return batches


def _normalised(pictures: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    return pictures.astype(jnp.float32) / 127.5 - 1


def _encode_all(
    vae: VAE, pictures: UInt8[np.ndarray, "n 64 64 3"], batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """The moments of all pictures' latents, in half precision."""
    graph, params = nnx.split(vae)
    encode = jax.jit(lambda params, x: nnx.merge(graph, params).encode(_normalised(x)))
    means, log_variances = [], []
    for start in tqdm(range(0, len(pictures), batch_size), desc="encoding", mininterval=5):
        mean, log_variance = encode(params, pictures[start : start + batch_size])
        means.append(np.asarray(mean, np.float16))
        log_variances.append(np.asarray(log_variance, np.float16))
    return np.concatenate(means), np.concatenate(log_variances)


if __name__ == "__main__":
    run_cli(main)
