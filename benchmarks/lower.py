"""Traces and lowers every program for an accelerator, at full size, on a machine that has none.

    python -m benchmarks.lower --device cuda|tpu [PROGRAM ...]

Nothing is allocated and nothing compiled. A line a program: seconds of tracing and of lowering, and
its kernels by name, as they are written in the program, loops multiplied out. The status is 1 if a
program fails, or attends plainly where the device has a kernel for the precision and the heads.
PROGRAM is a name or the beginning of names; all by default. `--list` shows them.

JAX believes that cuDNN is there because its three questions about it are answered here.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from bootpig_jax.attention import STRATEGIES
from bootpig_jax.checkpoints.diffusers import network_shapes, read_json
from bootpig_jax.config import TrainConfig
from bootpig_jax.diffusion.schedule import NoiseSchedule
from bootpig_jax.diffusion.solvers import SOLVERS, make_solver
from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.kernels import CUDNN, SPLASH, Kernels, cudnn, splash
from bootpig_jax.kernels.plain import PLAIN_ATTENTION
from bootpig_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from bootpig_jax.models.unet import UNet, UNetConfig
from bootpig_jax.models.vae import VAE, VAEConfig
from bootpig_jax.sampling.denoise import KeptLatents, denoise, denoise_with_references
from bootpig_jax.training.flops import equations
from bootpig_jax.training.plan import abstract_step
from bootpig_jax.training.sharding import make_mesh
from bootpig_jax.yaml_config import load_config

ROOT = Path(__file__).parents[1] / "configs"
MODELS = ROOT / "models"
SD21_BASE, SD21, SD15 = (
    MODELS / name
    for name in ("stable-diffusion-2-1-base", "stable-diffusion-2-1", "stable-diffusion-v1-5")
)
KERNELS: Mapping[str, tuple[Kernels, Callable[[Any], bool]]] = {
    "cuda": (CUDNN, cudnn.takes),
    "tpu": (SPLASH, splash.takes),
}
HALF = jnp.dtype(jnp.bfloat16)
STEPS = 50

Program = Callable[[Kernels], jax.stages.Traced]


@contextlib.contextmanager
def as_on(device: str) -> Iterator[None]:
    """Makes JAX trace for `device` as if it were there (jax 0.10.2 to 0.11.2)."""
    with contextlib.ExitStack() as stack:
        if device == "cuda":
            module = "jax._src.cudnn.fused_attention_stablehlo"
            for question, answer in (
                ("check_cudnn_version", 91300),
                ("check_compute_capability", True),
                ("is_cuda_compute_capability_equal", False),
            ):
                patch = mock.patch(f"{module}.{question}", return_value=answer)
                stack.enter_context(patch)
        yield


def update(
    kernels: Kernels,
    *changes: str,
    preset: str = "paper",
    model: Path = SD21_BASE,
) -> jax.stages.Traced:
    """One update of a preset in `configs/`, sixteen samples at a time."""
    config = load_config(
        TrainConfig,
        ROOT / f"{preset}.yaml",
        [f"model.base={model}", "precision=bfloat16", "batch_size=16", "accumulation=1", *changes],
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    step, arguments = abstract_step(config, HALF, mesh, kernels)
    return step.trace(*arguments)


def sampling(
    kernels: Kernels,
    references: int,
    *,
    samples: int = 4,
    dtype: jnp.dtype = HALF,
    model: Path = SD21_BASE,
    strategy: str = "softmax",
    solver: str = "unipc",
    inpaint: bool = False,
    change: bool = False,
    **options: Any,
) -> jax.stages.Traced:
    """The whole denoising loop, from one set of `references` pictures or from none."""
    config = UNetConfig.from_dict(read_json(model / "unet" / "config.json"))
    schedule = NoiseSchedule.from_config(read_json(model / "scheduler" / "scheduler_config.json"))
    side, width = config.sample_size, config.cross_attention_dim
    graph, weights = _shapes(model / "unet", UNet, UNetConfig, kernels, dtype)
    picture = shape(samples, side, side, 4, dtype=jnp.float32)
    text, one_text = (shape(count, 77, width, dtype=dtype) for count in (samples, 1))
    arrays = {"initial_latents": picture, "text": text, "empty_text": one_text}
    if inpaint:
        mask = shape(samples, side, side, 1, dtype=jnp.float32)
        arrays["kept"] = KeptLatents(picture, mask)
    options["solver"] = make_solver(solver, schedule, STEPS, strength=0.6 if change else 1.0)
    if change:
        arrays["start_from"] = picture
    if not references:
        return jax.jit(lambda w, kw: denoise(nnx.merge(graph, w), **kw, **options)).trace(
            weights, arrays
        )
    steps = len(options["solver"].timesteps)
    latents = (1, references, side, side, 4)
    arrays["reference_latents"] = shape(*latents, dtype=jnp.float32)
    arrays["reference_noise"] = shape(steps, *latents, dtype=jnp.float32)
    arrays["reference_text"] = one_text
    if options.get("reference_timestep") == 0:
        arrays["reference_noise"] = None

    def draw(base: nnx.State, reference: nnx.State, arrays: dict[str, Any]) -> jax.Array:
        unets = (nnx.merge(graph, weights) for weights in (base, reference))
        return denoise_with_references(*unets, **arrays, strategy=strategy, **options)

    return jax.jit(draw).trace(weights, weights, arrays)


def vae(
    kernels: Kernels, direction: str, *, dtype: jnp.dtype = HALF, model: Path = SD21_BASE
) -> jax.stages.Traced:
    """The VAE's encoder or decoder, for one picture."""
    graph, weights = _shapes(model / "vae", VAE, VAEConfig, kernels, dtype)
    sizes = VAEConfig.from_dict(read_json(model / "vae" / "config.json"))
    side = sizes.sample_size // (1 if direction == "encode" else sizes.downsampling)
    x = shape(1, side, side, 3 if direction == "encode" else 4, dtype=dtype)
    return jax.jit(lambda w, x: getattr(nnx.merge(graph, w), direction)(x)).trace(weights, x)


def text_encoder(kernels: Kernels, model: Path) -> jax.stages.Traced:
    """The text encoder, for sixteen captions."""
    graph, weights = _shapes(model / "text_encoder", TextEncoder, TextEncoderConfig, kernels)
    ids = shape(16, 77, dtype=jnp.int32)
    return jax.jit(lambda w, ids: nnx.merge(graph, w)(ids)).trace(weights, ids)


def shape(*sizes: int, dtype: Any = HALF) -> jax.ShapeDtypeStruct:
    """An array of which only the shape is there."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def _shapes(
    folder: Path, network: Any, config: Any, kernels: Kernels, dtype: jnp.dtype = HALF
) -> Any:
    sizes = config.from_dict(read_json(folder / "config.json"))
    how: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "kernels": kernels}
    return nnx.split(network_shapes(network, sizes, **how))


PROGRAMS: Mapping[str, Program] = {
    "update": update,
    "update-cached": lambda kernels: update(kernels, "data.cache=unused"),
    "update-accumulated": lambda kernels: update(kernels, "batch_size=64", "accumulation=4"),
    "update-rematerialised": lambda kernels: update(kernels, "remat=true"),
    "update-576": lambda kernels: update(kernels, "data.image_size=576"),
    "update-release": functools.partial(update, preset="release"),
    **{
        f"update-{path.stem}": functools.partial(update, preset=path.stem)
        for path in sorted(ROOT.glob("table2_*.yaml"))
    },
    "update-sd15": functools.partial(update, preset="sd15", model=SD15),
    "update-sd21-768": functools.partial(update, preset="sd21_768", model=SD21),
    "sampling-text": functools.partial(sampling, references=0),
    "sampling-1": functools.partial(sampling, references=1),
    "sampling-1-clean": functools.partial(sampling, references=1, reference_timestep=0),
    "sampling-1-sd15": functools.partial(sampling, references=1, model=SD15),
    "sampling-1-768": functools.partial(sampling, references=1, model=SD21),
    **{
        f"sampling-4-{strategy}": functools.partial(sampling, references=4, strategy=strategy)
        for strategy in STRATEGIES
    },
    **{
        f"sampling-1-{solver}": functools.partial(sampling, references=1, solver=solver)
        for solver in SOLVERS
    },
    "sampling-4-reused": functools.partial(sampling, references=4, reuse_features=2),
    "sampling-1-interval": functools.partial(sampling, references=1, guidance_interval=(0.1, 0.9)),
    "inpainting": functools.partial(sampling, references=1, inpaint=True),
    "image-to-image": functools.partial(sampling, references=1, change=True),
    "vae-encode": functools.partial(vae, direction="encode"),
    "vae-decode": functools.partial(vae, direction="decode"),
    "vae-decode-768": functools.partial(vae, direction="decode", model=SD21),
    "text-encoder": functools.partial(text_encoder, model=SD21_BASE),
    "text-encoder-sd15": functools.partial(text_encoder, model=SD15),
}


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What became of a program.

    Attributes:
        traced: seconds.
        lowered: seconds.
        kernels: how often each is called; `plain attention` where that was meant.
        plainly: the operands' shapes of attentions that should have been a kernel's.
    """

    traced: float
    lowered: float
    kernels: Mapping[str, int]
    plainly: list[str]


def lower(device: str, program: Program) -> Lowered:
    """Traces and lowers one program for `cuda` or `tpu`."""
    kernels, takes = KERNELS[device]
    jax.clear_caches()
    with as_on(device):
        start = time.perf_counter()
        traced = program(kernels)
        middle = time.perf_counter()
        traced.lower(lowering_platforms=(device,))
        end = time.perf_counter()
    counts, plainly = _kernels(traced.jaxpr, takes)
    return Lowered(middle - start, end - middle, counts, plainly)


def _kernels(jaxpr: Any, takes: Callable[[Any], bool]) -> tuple[Mapping[str, int], list[str]]:
    counts: collections.Counter[str] = collections.Counter()
    plainly = []
    for equation, times in equations(jaxpr):
        name = equation.primitive.name
        if name.startswith("dot_product_attention"):
            counts["cuDNN " + ("backward" if "_bwd" in name else "forward")] += times
        elif name == "pallas_call":
            counts[equation.params["name"]] += times
        elif equation.params.get("name") == PLAIN_ATTENTION:
            counts["plain attention"] += times
            like_q = next(x.aval for x in equation.outvars if len(x.aval.shape) == 4)
            if takes(like_q):
                plainly.append(f"{like_q.dtype}{list(like_q.shape)}")
    return counts, plainly


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lower", allow_abbrev=False)
    parser.add_argument("--device", choices=KERNELS, required=True)
    parser.add_argument("--list", action="store_true", help="name the programs and end")
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help="the beginning of a name")
    options = parser.parse_args(argv)
    names = []
    for asked in options.programs or [""]:
        names += [asked] if asked in PROGRAMS else [n for n in PROGRAMS if n.startswith(asked)]
        if not names:
            raise UserError(f"{asked}: no program begins so; --list names them")
    if options.list:
        print("\n".join(names))
        return
    failed = 0
    for name in names:
        try:
            result = lower(options.device, PROGRAMS[name])
        except (NotImplementedError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            print(f"{name:<28} FAILED: {type(error).__name__}: {reason}", flush=True)
            failed += 1
            continue
        kernels = ", ".join(f"{times} {kernel}" for kernel, times in result.kernels.items())
        fault = f"; PLAIN where a kernel was meant: {result.plainly[0]}" if result.plainly else ""
        failed += bool(result.plainly)
        seconds = f"{result.traced:6.1f} s traced {result.lowered:6.1f} s lowered"
        print(f"{name:<28}{seconds}  {kernels}{fault}", flush=True)
    print(f"{len(names) - failed} of {len(names)} programs lowered for {options.device}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_cli(main)
