"""How much of the host's memory loading takes, for Stable Diffusion 2.1-base at full size.

    python -m benchmarks.load [--precision bfloat16] [--output benchmarks/results/load.json]
    python -m benchmarks.load --picture

It writes a model of the full size with constant weights in float16 (2.6 GB) into a temporary folder
and loads it as training does (trained weights in float32, frozen ones in the precision) and as the
pipeline does, with a BootPIG and without, each in a process of its own.

The peak is of the process's anonymous memory (`RssAnon`), looked up every few milliseconds: with
JAX itself, and without the pages of mapped files, which the kernel takes back when it needs them.
On a CPU the weights themselves are in it, as the device's memory is the host's.

`--picture` loads nothing. It prints what the programs of one picture of 512 px from one reference
take beside the weights: this machine's compiler's account of them in float32, which is an estimate
of what an accelerator takes, in bfloat16 rather less.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bootpig_jax.errors import run_cli
from bootpig_jax.files import local_path

ROOT = Path(__file__).parents[1]
SIZES = ROOT / "configs" / "models" / "stable-diffusion-2-1-base"
TOKENIZER = ROOT / "bootpig_jax" / "toyland" / "weights" / "sd" / "tokenizer"
GIB = 2**30


def write_model(folder: Path) -> None:
    """Writes a text-to-image model, and beside it in `bootpig/` two links to its UNet."""
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from bootpig_jax.checkpoints.diffusers import network_shapes, read_json, save_network
    from bootpig_jax.checkpoints.stored import Stored
    from bootpig_jax.kernels import SERIAL
    from bootpig_jax.models.text_encoder import TextEncoder, TextEncoderConfig
    from bootpig_jax.models.unet import UNet, UNetConfig
    from bootpig_jax.models.vae import VAE, VAEConfig
    from bootpig_jax.sampling.conditioning import Conditioning

    half = np.dtype(np.float16)
    how: dict[str, Any] = {"dtype": jnp.float32, "param_dtype": half, "kernels": SERIAL}
    networks: tuple[tuple[str, Any, Any, str, str], ...] = (
        ("unet", UNet, UNetConfig, "UNet2DConditionModel", "diffusion_pytorch_model"),
        ("vae", VAE, VAEConfig, "AutoencoderKL", "diffusion_pytorch_model"),
        ("text_encoder", TextEncoder, TextEncoderConfig, "CLIPTextModel", "model"),
    )
    for name, network, config, class_name, file_name in networks:
        sizes = config.from_dict(read_json(SIZES / name / "config.json"))
        graph, state = nnx.split(network_shapes(network, sizes, **how))
        for path, leaf in nnx.to_flat_state(state):
            del path
            leaf.set_value(Stored(np.broadcast_to(half.type(0.01), leaf.shape), half))
        save_network(folder / name, nnx.merge(graph, state), class_name, file_name)
    shutil.copytree(SIZES / "scheduler", folder / "scheduler")
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    for name in ("base_unet", "ref_unet"):
        (folder / "bootpig").mkdir(exist_ok=True)
        (folder / "bootpig" / name).symlink_to(folder / "unet")
    Conditioning().write(folder / "bootpig")


def load_for_training(folder: Path, precision: str) -> Any:
    """All that a step reads, on the devices; the optimiser's state is not there yet."""
    import jax.numpy as jnp

    from bootpig_jax.bootpig import BootPIG
    from bootpig_jax.checkpoints.diffusers import open_stable_diffusion
    from bootpig_jax.config import MeshConfig, TrainableConfig
    from bootpig_jax.training.sharding import make_mesh, partition_specs, place
    from bootpig_jax.training.step import take_apart

    dtype, mesh = jnp.dtype(precision), make_mesh(MeshConfig())
    model = open_stable_diffusion(folder, dtype=dtype)
    bootpig = BootPIG.from_unet(model.unet)
    _, *parameters = take_apart(model, bootpig, TrainableConfig(), dtype)
    min_size = MeshConfig().fsdp_min_size
    return [place(tree, partition_specs(tree, mesh, min_size), mesh) for tree in parameters]


def load_pipeline(folder: Path, precision: str, bootpig: Path | None) -> Any:
    """The pipeline."""
    from bootpig_jax.sampling.pipeline import BootPIGPipeline

    return BootPIGPipeline.from_pretrained(folder, bootpig, precision=precision)  # type: ignore[arg-type]


CASES: dict[str, Callable[[Path, str], Any]] = {
    "training": load_for_training,
    "pipeline": lambda folder, precision: load_pipeline(folder, precision, None),
    "pipeline with a BootPIG": lambda folder, precision: load_pipeline(
        folder, precision, folder / "bootpig"
    ),
}


def print_picture() -> None:
    """Prints what one picture's programs take within them."""
    import jax
    import jax.numpy as jnp

    from benchmarks import lower
    from bootpig_jax.kernels import PLAIN

    # Buffers are assigned before machine code is made: the code that is made fastest will do.
    options: dict[str, Any] = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    # In bfloat16 a CPU's program holds float32 copies of all weights.
    dtype = jnp.dtype(jnp.float32)
    programs: dict[str, Callable[[], jax.stages.Traced]] = {
        "a reference is encoded": lambda: lower.vae(PLAIN, "encode", dtype=dtype),
        "50 guided steps": lambda: lower.sampling(PLAIN, 1, samples=1, dtype=dtype),
        "the picture is decoded": lambda: lower.vae(PLAIN, "decode", dtype=dtype),
    }
    for name, program in programs.items():
        memory = program().lower().compile(compiler_options=options).memory_analysis()
        print(f"{name:<24}{memory.temp_size_in_bytes / GIB:6.2f} GiB (estimated)", flush=True)


def anonymous() -> int:
    """This process's anonymous memory in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+)", status)[0]) * 1024


def measure(load: Callable[[], Any]) -> dict[str, float]:
    """Loads, and looks at the memory meanwhile.

    Returns:
      GiB before, at the peak and of all arrays at the end, and seconds.
    """
    import jax

    jax.devices()
    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    loaded = load()
    jax.block_until_ready(jax.live_arrays())
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    weights = sum(array.nbytes for array in jax.live_arrays())
    del loaded
    return {
        "before_gib": before / GIB,
        "peak_gib": max(peak, anonymous()) / GIB,
        "weights_gib": weights / GIB,
        "beside_weights_gib": (max(peak, anonymous()) - weights) / GIB,
        "seconds": seconds,
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", allow_abbrev=False)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--output", type=local_path, help="write the figures as JSON")
    parser.add_argument("--folder", type=local_path, help=argparse.SUPPRESS)
    parser.add_argument("--picture", action="store_true", help="of one picture's programs")
    parser.add_argument("--case", choices=("write", *CASES), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.picture:
        print_picture()
        return
    if options.case == "write":
        write_model(options.folder)
        return
    if options.case is not None:
        load = CASES[options.case]
        print(json.dumps(measure(lambda: load(options.folder, options.precision))))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in ("write", *CASES):
            command = [sys.executable, "-m", "benchmarks.load", "--folder", folder]
            command += ["--case", case, "--precision", options.precision]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            if case != "write":
                results[case] = json.loads(process.stdout.splitlines()[-1])
                print(
                    f"{case}: peak {results[case]['peak_gib']:.2f} GiB, weights "
                    f"{results[case]['weights_gib']:.2f} GiB, {results[case]['seconds']:.0f} s",
                    flush=True,
                )
    if options.output is not None:
        report = {
            "model": "Stable Diffusion 2.1-base, float16 in the files",
            "precision": options.precision,
            "machine": f"{os.cpu_count()} CPU cores",
            "cases": results,
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
