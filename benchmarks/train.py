"""One training step against the same step in PyTorch, on this machine's CPU or accelerator.

    python -m benchmarks.train [--device auto|cpu|gpu|tpu] [--rounds 5] [--batch-size N]
        [--output benchmarks/results/FILE.json]

Both sides train BootPIG as the paper does (all of the Reference UNet, of the Base UNet the RSA
layers) with AdamW and clipping, from latents and text features: on a CPU in float32, on UNets of
Stable Diffusion 2.1's shape and 0.4 of its width, at 32x32 latents, two samples at a time; on an
accelerator in bfloat16 with float32 masters, on Stable Diffusion 2.1-base itself, at 64x64 latents,
sixteen at a time. PyTorch's step is written plainly: diffusers' UNets (on a GPU channels last and
under autocast), hooks that collect the reference features, an attention processor that joins them
to keys and values, autograd. It drops no references, which spares it a mask. On a TPU ours is timed
alone.

Each side is a process of its own, which compiles and warms up first. Then they take turns of three
steps, of which the first is not timed: a process that has been idle runs slower for a moment, and a
training is not idle. Memory is the card's, or on a CPU the largest the process ever was, compiling
included. `share` is the part of the device's rate of matrix products, measured before, that the
counted operations of our step reach.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import devices
from bootpig_jax.errors import run_cli
from bootpig_jax.files import local_path

SD21_BASE = Path(__file__).parents[1] / "configs" / "models" / "stable-diffusion-2-1-base"
TOKENS, WIDTH = 77, 1024
TIMED_STEPS = 2  # of a turn
LEARNING_RATES = {"reference": 5e-6, "base": 1e-6}


@dataclasses.dataclass(frozen=True)
class Size:
    """What is trained: the UNet's heads of each resolution, 64 wide, and the latents' side."""

    heads: tuple[int, ...]
    latents: int
    batch_size: int

    def unet(self) -> dict[str, Any]:
        """The UNet's `config.json`."""
        return json.loads((SD21_BASE / "unet" / "config.json").read_text()) | {
            "attention_head_dim": list(self.heads),
            "block_out_channels": [64 * heads for heads in self.heads],
            "sample_size": self.latents,
        }


ON_A_CPU = Size((2, 4, 8, 8), latents=32, batch_size=2)
ON_AN_ACCELERATOR = Size((5, 10, 20, 20), latents=64, batch_size=16)

Step = Callable[[], float]


def ours(size: Size) -> tuple[Step, float]:
    """Prepares `make_train_step`'s program.

    Returns:
      A function that makes one update, and the FLOPs of one.
    """
    import jax
    import jax.numpy as jnp

    from bootpig_jax.config import TrainConfig
    from bootpig_jax.kernels import compute_dtype, kernels_for
    from bootpig_jax.training.flops import count_flops
    from bootpig_jax.training.optimizer import make_optimizer
    from bootpig_jax.training.plan import abstract_parts
    from bootpig_jax.training.sharding import make_mesh
    from bootpig_jax.training.step import Encoded, Posterior, init_state, make_train_step
    from bootpig_jax.yaml_config import load_config

    dtype, batch_size = compute_dtype("auto"), size.batch_size
    with tempfile.TemporaryDirectory() as folder:
        for file in SD21_BASE.glob("*/*.json"):
            path = Path(folder) / file.relative_to(SD21_BASE)
            path.parent.mkdir()
            unet = path.parent.name == "unet"
            path.write_text(json.dumps(size.unet()) if unet else file.read_text())
        config = load_config(
            TrainConfig,
            None,
            [f"model.base={folder}", "data.dir=none", "output_dir=none", f"precision={dtype.name}"]
            + [f"batch_size={batch_size}", f"data.image_size={size.latents * 8}"],
        )
        graphs, shapes, frozen = abstract_parts(config, dtype, kernels_for())
    keys = iter(jax.random.split(jax.random.key(0), 10_000))

    def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), leaf.shape, leaf.dtype)

    mesh = make_mesh(config.mesh, jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = init_state(jax.tree.map(filled, shapes), optimizer, mesh, config.mesh.fsdp_min_size)
    # From latents and features on: neither VAE nor text encoder is there.
    frozen = type(frozen)(jax.tree.map(filled, frozen.unets), {}, {}, filled(frozen.empty_text))

    def posterior() -> Posterior:
        shape = jax.ShapeDtypeStruct((batch_size, size.latents, size.latents, 4), jnp.float32)
        return Posterior(50 * filled(shape), jnp.abs(filled(shape)))

    text = 50 * filled(jax.ShapeDtypeStruct((batch_size, TOKENS, WIDTH), dtype))
    batch = Encoded(posterior(), posterior(), text, None)
    train_step = make_train_step(graphs, optimizer, config, mesh, state, frozen)
    flops = count_flops(train_step.trace(state, frozen, batch).jaxpr)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, frozen, batch)
        return float(metrics["loss"])

    return step, flops


def theirs(size: Size) -> tuple[Step, float]:
    """The same in PyTorch, but for the FLOPs, which are ours."""
    import diffusers
    import torch
    from torch.nn.functional import mse_loss, scaled_dot_product_attention

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    sizes = {key: value for key, value in size.unet().items() if not key.startswith("_")}
    layout = torch.channels_last if on_gpu else torch.contiguous_format
    base, reference = (
        diffusers.UNet2DConditionModel(**sizes).to(device, memory_format=layout) for _ in range(2)
    )
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
        json.loads((SD21_BASE / "scheduler" / "scheduler_config.json").read_text())
    )
    batch_size = size.batch_size
    shape = (batch_size, 4, size.latents, size.latents)
    target, picture = (torch.randn(shape, device=device) for _ in range(2))
    text = torch.randn(batch_size, TOKENS, WIDTH, device=device)

    def step() -> float:
        t = torch.randint(0, 1000, (batch_size,), device=device)
        noise, reference_noise = (torch.randn(shape, device=device) for _ in range(2))
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            reference(scheduler.add_noise(picture, reference_noise, t), t, text)
            prediction = base(scheduler.add_noise(target, noise, t), t, text).sample
        loss = mse_loss(prediction.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return step, 0.0


SIDES = {"bootpig_jax": ours, "PyTorch": theirs}


def work(side: str, size: Size) -> None:
    """One side's process: warms up, then makes a turn's steps for each line it is sent."""
    started = time.perf_counter()
    step, flops = SIDES[side](size)
    for _ in range(2):
        step()
    print(json.dumps({"ready": time.perf_counter() - started, "flops": flops}), flush=True)
    for _ in sys.stdin:
        step()
        seconds = []
        for _ in range(TIMED_STEPS):
            started = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - started)
        peak = devices.peak_bytes("jax" if side == "bootpig_jax" else "torch")
        print(json.dumps({"seconds": seconds, "peak": peak, "loss": loss}), flush=True)


def compare(device: devices.Device, batch_size: int | None, rounds: int) -> dict[str, Any]:
    """Times both sides in turns.

    Returns:
      What is written as JSON: the device; for each side seconds a step (all, and their median), its
      preparation and its peak memory; both sides' ratios, PyTorch's over ours; and our share of the
      device's rate.
    """
    found = devices.find(device)
    device = found["platform"]
    size = ON_A_CPU if device == "cpu" else ON_AN_ACCELERATOR
    size = dataclasses.replace(size, batch_size=batch_size or size.batch_size)
    processes = {}
    results: dict[str, Any] = {}
    for side in SIDES if device != "tpu" else ["bootpig_jax"]:
        processes[side] = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train", "--work", side, f"--device={device}"]
            + [f"--batch-size={size.batch_size}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=devices.environment(device),
        )
        # One after the other: they would take each other's time.
        answer = _answer(processes[side])
        results[side] = {"preparation": answer["ready"], "flops": answer["flops"], "seconds": []}
        print(f"{side}: ready after {answer['ready']:.0f} s", file=sys.stderr)
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
    mine, other = results["bootpig_jax"], results.get("PyTorch")
    rate = mine["flops"] / mine["median"] / 1e12
    return {
        "what": f"one update of BootPIG from latents, {found['precision']}",
        "device": found,
        "batch_size": size.batch_size,
        "unet": size.unet(),
        "latents": [size.latents, size.latents],
        "sides": results,
        "share": rate / found["tflops"],
        "speed_ratio": other and other["median"] / mine["median"],
        "memory_ratio": other and other["peak_gib"] / mine["peak_gib"],
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
    parser.add_argument("--device", choices=devices.DEVICES, default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, help="2 on a CPU, 16 on an accelerator")
    parser.add_argument("--output", type=local_path, help="write the figures as JSON")
    parser.add_argument("--work", choices=tuple(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        size = ON_A_CPU if options.device == "cpu" else ON_AN_ACCELERATOR
        work(options.work, dataclasses.replace(size, batch_size=options.batch_size))
        return
    report = compare(options.device, options.batch_size, options.rounds)
    found = report["device"]
    print(f"{found['kind']}, {found['precision']}, {found['tflops']:.2f} TFLOP/s in products")
    for side, result in report["sides"].items():
        print(
            f"{side:<12} {result['median']:8.3f} s a step {result['peak_gib']:8.2f} GiB, "
            f"ready after {result['preparation']:.0f} s"
        )
    print(f"bootpig_jax: {report['share']:.1%} of the rate of products")
    if report["speed_ratio"] is not None:
        print(
            f"PyTorch / bootpig_jax: time {report['speed_ratio']:.2f}, "
            f"memory {report['memory_ratio']:.2f}"
        )
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
