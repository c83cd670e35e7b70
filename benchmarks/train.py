"""One training step against the same step in PyTorch, on this machine's CPU.

    python -m benchmarks.train [--rounds 5] [--batch-size 2] [--output benchmarks/results/FILE.json]

Both sides train BootPIG as the paper does (all of the Reference UNet, of the Base UNet the RSA
layers) with AdamW and clipping, in float32, from latents and text features, on UNets of Stable
Diffusion 2.1's shape and 0.4 of its width, at 32x32 latents. PyTorch's step is written plainly:
diffusers' UNets, hooks that collect the reference features, an attention processor that joins them
to keys and values, autograd. It drops no references, which spares it a mask.

Each side is a process of its own, which compiles and warms up first. Then they take turns of three
steps, of which the first is not timed: a process that has been idle runs slower for a moment, and a
training is not idle. Memory is the largest the process ever was, compiling included.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bootpig_jax.errors import run_cli

UNET = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": [2, 4, 8, 8],
    "block_out_channels": [128, 256, 512, 512],
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "use_linear_projection": True,
    "sample_size": 32,
}
SIZES = Path(__file__).parents[1] / "configs" / "models" / "stable-diffusion-2-1-base"
LATENTS, TOKENS, WIDTH = 32, 77, 1024
TIMED_STEPS = 2  # of a turn
LEARNING_RATES = {"reference": 5e-6, "base": 1e-6}
# For XLA's programs: the Makefile sets the same for what it trains. PyTorch gets the memory, too.
ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=68719476736"
    ":glibc.malloc.trim_threshold=68719476736",
    "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution",
    "JAX_PLATFORMS": "cpu",
}

Step = Callable[[], float]


def ours(batch_size: int) -> Step:
    """Prepares `make_train_step`'s program; returns a function that makes one update."""
    import jax
    import jax.numpy as jnp

    from bootpig_jax.config import TrainConfig
    from bootpig_jax.kernels import kernels_for
    from bootpig_jax.training.optimizer import make_optimizer
    from bootpig_jax.training.plan import abstract_parts
    from bootpig_jax.training.sharding import make_mesh
    from bootpig_jax.training.step import Encoded, Posterior, init_state, make_train_step
    from bootpig_jax.yaml_config import load_config

    with tempfile.TemporaryDirectory() as folder:
        for file in SIZES.glob("*/*.json"):
            path = Path(folder) / file.relative_to(SIZES)
            path.parent.mkdir()
            path.write_text(json.dumps(UNET) if path.parent.name == "unet" else file.read_text())
        config = load_config(
            TrainConfig,
            None,
            [f"model.base={folder}", "data.dir=none", "output_dir=none", "precision=float32"]
            + [f"batch_size={batch_size}", f"data.image_size={LATENTS * 8}"],
        )
        graphs, shapes, frozen = abstract_parts(config, jnp.dtype("float32"), kernels_for())
    keys = iter(jax.random.split(jax.random.key(0), 10_000))

    def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), leaf.shape, leaf.dtype)

    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = init_state(jax.tree.map(filled, shapes), optimizer, mesh, config.mesh.fsdp_min_size)
    # From latents and features on: neither VAE nor text encoder is there.
    frozen = type(frozen)(jax.tree.map(filled, frozen.unets), {}, {}, filled(frozen.empty_text))

    def posterior() -> Posterior:
        shape = jax.ShapeDtypeStruct((batch_size, LATENTS, LATENTS, 4), jnp.float32)
        return Posterior(50 * filled(shape), jnp.abs(filled(shape)))

    text = 50 * filled(jax.ShapeDtypeStruct((batch_size, TOKENS, WIDTH), jnp.float32))
    batch = Encoded(posterior(), posterior(), text, None)
    train_step = make_train_step(graphs, optimizer, config, mesh, state, frozen)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, frozen, batch)
        return float(metrics["loss"])

    return step


def theirs(batch_size: int) -> Step:
    """Prepares PyTorch's step; returns a function that makes one update."""
    import diffusers
    import torch
    from torch.nn.functional import mse_loss, scaled_dot_product_attention

    torch.manual_seed(0)
    sizes = {key: value for key, value in UNET.items() if not key.startswith("_")}
    base, reference = (diffusers.UNet2DConditionModel(**sizes) for _ in range(2))
    reference.load_state_dict(base.state_dict())
    features: dict[str, torch.Tensor] = {}

    class JoinReferences:
        """An attention processor: keys and values of `[f ; f_ref]`, Eq. 3."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, attn: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
            joined = torch.cat([hidden_states, features[self.name]], dim=1)
            q, k, v = (
                projection(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for projection, x in (
                    (attn.to_q, hidden_states),
                    (attn.to_k, joined),
                    (attn.to_v, joined),
                )
            )
            out = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return attn.to_out[1](attn.to_out[0](out))

    def collect(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            features[name] = arguments[0]

        return hook

    for name, module in reference.named_modules():
        if name.endswith(".attn1"):
            module.register_forward_pre_hook(collect(name))
    base.set_attn_processor(
        {
            name: JoinReferences(name.removesuffix(".processor")) if ".attn1." in name else stock
            for name, stock in base.attn_processors.items()
        }
    )
    base.requires_grad_(False)
    rsa = [p for name, p in base.named_parameters() if ".attn1." in name]
    for parameter in rsa:
        parameter.requires_grad_(True)
    trained = [*reference.parameters(), *rsa]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(reference.parameters()), "lr": LEARNING_RATES["reference"]},
            {"params": rsa, "lr": LEARNING_RATES["base"]},
        ],
        weight_decay=1e-2,
    )
    scheduler = diffusers.DDPMScheduler.from_config(
        json.loads((SIZES / "scheduler" / "scheduler_config.json").read_text())
    )
    shape = (batch_size, 4, LATENTS, LATENTS)
    target, picture = torch.randn(shape), torch.randn(shape)
    text = torch.randn(batch_size, TOKENS, WIDTH)

    def step() -> float:
        t = torch.randint(0, 1000, (batch_size,))
        noise = torch.randn(shape)
        reference(scheduler.add_noise(picture, torch.randn(shape), t), t, text)
        loss = mse_loss(base(scheduler.add_noise(target, noise, t), t, text).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return step


SIDES = {"bootpig_jax": ours, "PyTorch": theirs}


def work(side: str, batch_size: int) -> None:
    """One side's process: warms up, then makes a turn's steps for each line it is sent."""
    started = time.perf_counter()
    step = SIDES[side](batch_size)
    for _ in range(2):
        step()
    print(json.dumps({"ready": time.perf_counter() - started}), flush=True)
    for _ in sys.stdin:
        step()
        seconds = []
        for _ in range(TIMED_STEPS):
            started = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - started)
        status = Path("/proc/self/status").read_text()
        peak = int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024
        print(json.dumps({"seconds": seconds, "peak": peak, "loss": loss}), flush=True)


def compare(batch_size: int, rounds: int) -> dict[str, Any]:
    """Times both sides in turns.

    Returns:
      What is written as JSON: for each side seconds a step (all, and their median), its preparation
      and its peak memory; and both sides' ratios, PyTorch's over ours.
    """
    processes = {}
    results: dict[str, Any] = {}
    for side in SIDES:
        processes[side] = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train", "--work", side]
            + ["--batch-size", str(batch_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
        # One after the other: they would take each other's time.
        results[side] = {"preparation": _answer(processes[side])["ready"], "seconds": []}
        print(f"{side}: ready after {results[side]['preparation']:.0f} s", file=sys.stderr)
    for number in range(rounds):
        for side, process in processes.items():
            assert process.stdin is not None
            print(file=process.stdin, flush=True)
            answer = _answer(process)
            results[side]["seconds"] += answer["seconds"]
            results[side]["peak_gib"] = answer["peak"] / 2**30
            times = " ".join(f"{seconds:.2f} s" for seconds in answer["seconds"])
            print(f"round {number + 1}: {side} {times}", file=sys.stderr)
    for process in processes.values():
        process.communicate("")
    for result in results.values():
        result["median"] = statistics.median(result["seconds"])
    mine, other = (results[side] for side in SIDES)
    return {
        "what": "one update of BootPIG from latents, float32",
        "batch_size": batch_size,
        "unet": UNET,
        "latents": [LATENTS, LATENTS],
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "sides": results,
        "speed_ratio": other["median"] / mine["median"],
        "memory_ratio": other["peak_gib"] / mine["peak_gib"],
    }


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args} ended with status {process.wait()}")
    return json.loads(line)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--work", choices=tuple(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.batch_size)
        return
    report = compare(options.batch_size, options.rounds)
    for side, result in report["sides"].items():
        print(f"{side:<12} {result['median']:8.2f} s a step {result['peak_gib']:8.2f} GiB")
    print(
        f"PyTorch / bootpig_jax: time {report['speed_ratio']:.2f}, "
        f"memory {report['memory_ratio']:.2f}"
    )
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
