"""What one guided step of sampling costs, in operations and in seconds.

    python -m benchmarks.sample flops [--output benchmarks/results/sample_flops.json]
    python -m benchmarks.sample time [--device auto|cpu|gpu|tpu] [--rounds 2] [--output FILE]

A step is the references' features and the three branches of Eq. 4, for Stable Diffusion 2.1-base at
512 px with random weights, in float32 on a CPU and bfloat16 on an accelerator; `--scale` makes the
UNets narrower.

`flops` counts our step and Eq. 4-8 taken literally: each sample makes its own references' features,
each branch is a network call, each ``RSA(f, f_i)`` of Eq. 5-8 an attention over joined tokens with
projections of its own. Both are JAX programs, counted after compilation, so dead code is gone from
both; no weights are needed.

`time` measures our step against one in PyTorch that is written plainly but batched: diffusers'
UNets, hooks that collect the reference features, all branches in one call, an attention processor
that does plain self-attention for every row, and RSA over joined tokens for each reference and row
that sees it, as the authors' release does. Two such UNets take 7 GB, so only one side is there at a
time: a process prepares, makes one step to warm up and then those that count, and the sides take
turns. On a GPU PyTorch's UNets are channels last. Memory is the card's, or on a CPU the largest the
process ever was, compiling included. On a TPU ours is timed alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import devices
from bootpig_jax.errors import run_cli
from bootpig_jax.files import local_path

SIZES = Path(__file__).parents[1] / "configs" / "models" / "stable-diffusion-2-1-base"
TOKENS = 77
IMAGE_GUIDANCE, GUIDANCE = 5.0, 7.5
COUNTED = [(samples, references) for references in (1, 4, 6) for samples in (1, 4)]
TIMED = [(samples, references) for references in (1, 4) for samples in (1, 4)]
# To count operations only XLA's own passes matter: this leaves out what makes machine code fast.
COUNTING = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_PLATFORMS": "cpu",
}


def unet_sizes(scale: float) -> dict[str, Any]:
    """The UNet's `config.json`, its channels multiplied by `scale`; heads stay 64 wide."""
    config = json.loads((SIZES / "unet" / "config.json").read_text())
    heads = [max(1, round(count * scale)) for count in config["attention_head_dim"]]
    return config | {
        "attention_head_dim": heads,
        "block_out_channels": [64 * count for count in heads],
    }


def shapes(scale: float, samples: int, references: int, latents: int) -> dict[str, Any]:
    """Arguments of `denoise_with_references` for one set of references, as shapes."""
    import jax

    text = (TOKENS, unet_sizes(scale)["cross_attention_dim"])
    picture = (latents, latents, 4)
    return {
        name: jax.ShapeDtypeStruct(shape, "float32")
        for name, shape in {
            "initial_latents": (samples, *picture),
            "text": (samples, *text),
            "empty_text": (1, *text),
            "reference_latents": (1, references, *picture),
            "reference_text": (1, *text),
        }.items()
    }


# Operations.


def count(scale: float, latents: int) -> dict[str, Any]:
    """Counts our step and the literal one; see the module's docstring.

    Returns:
      What is written as JSON; operations in units of 1e9, 2 for each multiply-add.
    """
    from bootpig_jax.kernels import plain

    rows = []
    # XLA counts the body of a loop once, so nothing may go block by block; nothing is run.
    with mock.patch.object(plain, "BLOCKED_FROM", float("inf")):
        for references in sorted({references for _, references in COUNTED}):
            # Literally, samples share nothing.
            literal = _operations(literal_step, scale, 1, references, latents)
            for samples in (samples for samples, k in COUNTED if k == references):
                ours = _operations(our_step, scale, samples, references, latents)
                rows.append(
                    {
                        "references": references,
                        "samples": samples,
                        "literal_gflop": samples * literal,
                        "ours_gflop": ours,
                        "ratio": ours / (samples * literal),
                    }
                )
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {
        "what": "one guided step, compiled for a CPU: XLA's count of floating point operations",
        "unet": unet_sizes(scale),
        "latents": [latents, latents],
        "rows": rows,
    }


def our_step(base: Any, reference: Any, noise: Any, **arrays: Any) -> Any:
    """One step of `denoise_with_references`."""
    from bootpig_jax.sampling.denoise import denoise_with_references

    return denoise_with_references(
        base,
        reference,
        **arrays,
        reference_noise=noise[None],
        solver=_solver(1),
        image_guidance_scale=IMAGE_GUIDANCE,
        guidance_scale=GUIDANCE,
    )


def literal_step(base: Any, reference: Any, noise: Any, **arrays: Any) -> Any:
    """The same, from the equations as they are printed."""
    import jax.numpy as jnp

    from bootpig_jax.bootpig import reference_features
    from bootpig_jax.diffusion.guidance import guide
    from bootpig_jax.models.blocks import Attention, References

    solver = _solver(1)
    state = solver.init(arrays["initial_latents"])
    x, text, empty = solver.latents(state), arrays["text"], arrays["empty_text"]
    t = jnp.full(len(x), solver.timesteps[0])
    noised = solver.alphas[0] * arrays["reference_latents"] + solver.sigmas[0] * noise
    seen = References(reference_features(reference, noised, t, arrays["reference_text"]))
    with mock.patch.object(Attention, "__call__", literal_attention):
        u_sa, u_rsa, u_rsa_text = (
            base(x, t, *conditions)[0] for conditions in [(empty,), (empty, seen), (text, seen)]
        )
    output = guide(u_sa, u_rsa, u_rsa_text, IMAGE_GUIDANCE, GUIDANCE)
    return solver.latents(solver.step(state, output, 0))


def literal_attention(self: Any, x: Any, context: Any = None, references: Any = None) -> Any:
    """`Attention.__call__` by Eq. 2, 3 and 5-8, each as it stands."""
    import jax.numpy as jnp

    from bootpig_jax.attention import attention, pool

    def attend(f: Any, source: Any) -> Any:
        projected = (self.to_q(f), self.to_k(source), self.to_v(source))
        attended = attention(*map(self._split_heads, projected), kernels=self.kernels)
        return self.to_out(attended)

    def rsa(f: Any, f_ref: Any) -> Any:
        return attend(f, jnp.concatenate([f, f_ref], axis=1))

    if references is None:
        return attend(x, x if context is None else context)
    (f_refs,) = references.features
    o_refs = [rsa(x, f_refs[:, i]) for i in range(f_refs.shape[1])]
    return pool(rsa(x, x), jnp.stack(o_refs, axis=1), "softmax")


def _operations(
    step: Callable[..., Any], scale: float, samples: int, references: int, latents: int
) -> float:
    import jax
    from flax import nnx

    from bootpig_jax.kernels import SERIAL

    graph, weights = nnx.split(_unet(scale, SERIAL, "float32"))
    arrays = shapes(scale, samples, references, latents)
    program = jax.jit(
        lambda base, reference, noise, arrays: step(
            nnx.merge(graph, base), nnx.merge(graph, reference), noise, **arrays
        )
    )
    lowered = program.lower(weights, weights, arrays["reference_latents"], arrays)
    return lowered.compile().cost_analysis()["flops"] / 1e9


def _unet(scale: float, kernels: Any, precision: str) -> Any:
    """A UNet with shapes in the place of its weights."""
    import jax.numpy as jnp

    from bootpig_jax.checkpoints.diffusers import network_shapes
    from bootpig_jax.models.unet import UNet, UNetConfig

    sizes = UNetConfig.from_dict(unet_sizes(scale))
    dtype = jnp.dtype(precision)
    return network_shapes(UNet, sizes, dtype=dtype, param_dtype=dtype, kernels=kernels)


def _solver(steps: int) -> Any:
    from bootpig_jax.diffusion.schedule import NoiseSchedule
    from bootpig_jax.diffusion.solvers import make_solver

    config = json.loads((SIZES / "scheduler" / "scheduler_config.json").read_text())
    return make_solver("ddim", NoiseSchedule.from_config(config), steps)


# Seconds.


def ours(scale: float, samples: int, references: int, latents: int, steps: int) -> Iterator[float]:
    """Makes steps of `denoise_with_references`; yields the seconds of each."""
    import jax
    import numpy as np
    from flax import nnx

    from bootpig_jax.kernels import compute_dtype, kernels_for
    from bootpig_jax.sampling.denoise import denoise_with_references

    rng = np.random.default_rng(0)

    def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.numpy.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    graph, weights = nnx.split(_unet(scale, kernels_for(), compute_dtype("auto").name))
    base, reference = (nnx.merge(graph, jax.tree.map(filled, weights)) for _ in range(2))
    arrays = jax.tree.map(filled, shapes(scale, samples, references, latents))
    noise = jax.ShapeDtypeStruct((steps, *arrays["reference_latents"].shape), np.float32)
    ends = [time.perf_counter()]
    denoise_with_references(
        base,
        reference,
        **arrays,
        reference_noise=filled(noise),
        solver=_solver(steps),
        on_step=lambda *_: ends.append(time.perf_counter()),
    )
    yield from np.diff(ends).tolist()


def theirs(
    scale: float, samples: int, references: int, latents: int, steps: int
) -> Iterator[float]:
    """The same in PyTorch."""
    import diffusers
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    on_gpu = torch.cuda.is_available()
    how: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16} if on_gpu else {}
    layout = torch.channels_last if on_gpu else torch.contiguous_format
    sizes = {name: size for name, size in unet_sizes(scale).items() if name[0] != "_"}
    base, reference = (
        diffusers.UNet2DConditionModel(**sizes).eval().to(**how, memory_format=layout)
        for _ in range(2)
    )
    features: dict[str, torch.Tensor] = {}

    def attend(attn: Any, f: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection, x in ((attn.to_q, f), (attn.to_k, source), (attn.to_v, source))
        )
        out = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))

    class PooledReferences:
        """An attention processor: Eq. 5-8 for the rows after the first third."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, attn: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
            out = attend(attn, hidden_states, hidden_states)
            f, o = hidden_states[samples:], out[samples:]
            f_refs = features[self.name].unflatten(0, (samples, references))
            o_refs = []
            for i in range(references):
                joined = torch.cat([f, f_refs[:, i].repeat(2, 1, 1)], dim=1)
                o_refs.append(attend(attn, f, joined))
            differences = torch.stack(o_refs) - o
            p = torch.softmax(torch.linalg.vector_norm(differences, dim=-1), dim=0)
            return torch.cat([out[:samples], o + (p[..., None] * differences).sum(dim=0)])

    def collect(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            features[name] = arguments[0]

        return hook

    for name, module in reference.named_modules():
        if name.endswith(".attn1"):
            module.register_forward_pre_hook(collect(name))
    base.set_attn_processor(
        {
            name: PooledReferences(name.removesuffix(".processor")) if ".attn1." in name else stock
            for name, stock in base.attn_processors.items()
        }
    )
    x = torch.randn(samples, 4, latents, latents, **how)
    pictures = torch.randn(samples * references, 4, latents, latents, **how)
    text = torch.randn(samples, TOKENS, sizes["cross_attention_dim"], **how)
    empty = torch.randn_like(text[:1]).expand_as(text)
    for _ in range(steps):
        started = time.perf_counter()
        reference(pictures, 500, text.repeat_interleave(references, dim=0))
        output = base(x.repeat(3, 1, 1, 1), 500, torch.cat([empty, empty, text])).sample
        u_sa, u_rsa, u_rsa_text = output.chunk(3)
        x = u_sa + IMAGE_GUIDANCE * (u_rsa - u_sa) + GUIDANCE * (u_rsa_text - u_rsa)
        if on_gpu:
            torch.cuda.synchronize()
        yield time.perf_counter() - started


SIDES = {"bootpig_jax": ours, "PyTorch": theirs}


def work(side: str, scale: float, samples: int, references: int, latents: int, steps: int) -> None:
    """One side's process: prints the seconds of each step but the first, and the peak memory."""
    _, *seconds = SIDES[side](scale, samples, references, latents, 1 + steps)
    peak = devices.peak_bytes("jax" if side == "bootpig_jax" else "torch")
    print(json.dumps({"seconds": seconds, "peak": peak}))


def compare(
    device: devices.Device,
    scale: float,
    samples: int,
    references: int,
    latents: int,
    rounds: int,
    steps: int,
) -> dict[str, Any]:
    """Times both sides in turns.

    Returns:
      For each side seconds a step (all, their least and their median) and its peak memory, and both
      sides' ratios, PyTorch's over ours.
    """
    sides = SIDES if device != "tpu" else ["bootpig_jax"]
    results: dict[str, Any] = {side: {"seconds": [], "peak_gib": 0.0} for side in sides}
    options = {"scale": scale, "samples": samples, "references": references}
    options |= {"latents": latents, "steps": steps}
    for number in range(rounds):
        for side, result in results.items():
            command = [sys.executable, "-m", "benchmarks.sample", "work", "--side", side]
            command += [f"--{name}={value}" for name, value in options.items()]
            environment = devices.environment(device)
            process = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, env=environment
            )
            answer = json.loads(process.stdout.splitlines()[-1])
            result["seconds"] += answer["seconds"]
            result["peak_gib"] = max(result["peak_gib"], answer["peak"] / 2**30)
            print(
                f"{samples} samples, {references} references, round {number + 1}: {side} "
                + " ".join(f"{seconds:.2f} s" for seconds in answer["seconds"]),
                file=sys.stderr,
                flush=True,
            )
    for result in results.values():
        result["least"] = min(result["seconds"])
        result["median"] = statistics.median(result["seconds"])
    mine, other = results["bootpig_jax"], results.get("PyTorch")
    return {
        "samples": samples,
        "references": references,
        "sides": results,
        "speed_ratio": other and other["median"] / mine["median"],
        "speed_ratio_of_least": other and other["least"] / mine["least"],
        "memory_ratio": other and other["peak_gib"] / mine["peak_gib"],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("flops", "time", "work"))
    parser.add_argument("--device", choices=devices.DEVICES, default="auto")
    parser.add_argument("--scale", type=float, default=1.0, help="of the UNets' channels")
    parser.add_argument("--latents", type=int, default=64, help="side of the latents")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--steps", type=int, default=1, help="steps a process makes that count")
    parser.add_argument("--samples", type=int, help="only this many pictures")
    parser.add_argument("--references", type=int, help="only this many references")
    parser.add_argument("--output", type=local_path, help="write the figures as JSON")
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = {"scale": options.scale, "latents": options.latents, "steps": options.steps}
    if options.what == "work":
        work(options.side, samples=options.samples, references=options.references, **sizes)
        return
    if options.what == "flops":
        os.environ |= COUNTING
        report = count(options.scale, options.latents)
        print("references samples   literal      ours  ratio")
        for row in report["rows"]:
            print(
                f"{row['references']:10} {row['samples']:7} {row['literal_gflop']:9.0f} "
                f"{row['ours_gflop']:9.0f} {row['ratio']:6.3f}"
            )
    else:
        cases = [
            (samples, references)
            for samples, references in TIMED
            if options.samples in (None, samples) and options.references in (None, references)
        ]
        found = devices.find(options.device)
        report = {
            "what": f"one guided step, {found['precision']}",
            "unet": unet_sizes(options.scale),
            "latents": [options.latents, options.latents],
            "device": found,
            "cases": [
                compare(
                    found["platform"],
                    samples=samples,
                    references=references,
                    rounds=options.rounds,
                    **sizes,
                )
                for samples, references in cases
            ],
        }
        for case in report["cases"]:
            print(f"{case['samples']} samples, {case['references']} references")
            for side, result in case["sides"].items():
                print(
                    f"  {side:<12} {result['median']:8.3f} s a step, least {result['least']:.3f}, "
                    f"{result['peak_gib']:.2f} GiB"
                )
            if case["speed_ratio"] is not None:
                print(
                    f"  PyTorch / bootpig_jax: time {case['speed_ratio']:.2f}, "
                    f"least {case['speed_ratio_of_least']:.2f}, memory {case['memory_ratio']:.2f}"
                )
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
