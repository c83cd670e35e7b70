"""Where a training step's time goes on one CPU core: our layers against PyTorch's.

    taskset -c 0 python -m benchmarks.layers

At the shapes of `benchmarks.train`: milliseconds of processor time, the least of five, of the
forward pass and of both passes together (gradients of input and weights), and their ratios.
Processor time on one core hardly depends on what else runs; how well a side uses several cores is
for `benchmarks.train` to say.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks import devices

BATCH = 2
# Side, channels in and out.
CONVOLUTIONS = [(32, 128, 128), (32, 256, 128), (16, 256, 256), (8, 512, 512), (8, 1024, 512)]
CONVOLUTIONS += [(4, 512, 512)]
NORMS = [(32, 128), (16, 256), (8, 512)]
# Tokens, channels; RSA with one reference: twice as many keys as queries.
TOKENS = [(1024, 128), (256, 256), (64, 512)]
HEAD = 64

Times = dict[str, float]


def least(call: Callable[[], object]) -> float:
    """Milliseconds of processor time."""
    call(), call()
    times = []
    for _ in range(5):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return 1e3 * min(times)


def ours() -> Times:
    """Our layers, under `jax.jit`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from bootpig_jax.kernels import kernels_for
    from bootpig_jax.models.blocks import FeedForward, GroupNorm, conv3x3, linear

    times: Times = {}

    def measure(name: str, function: Callable[..., jax.Array], *inputs: object) -> None:
        forward = jax.jit(function)
        both = jax.jit(
            jax.grad(
                lambda inputs, cotangent: jnp.vdot(function(*inputs), cotangent),
            )
        )
        cotangent = jnp.ones_like(forward(*inputs))
        times[f"{name}, forward"] = least(lambda: jax.block_until_ready(forward(*inputs)))
        times[name] = least(lambda: jax.block_until_ready(both(inputs, cotangent)))

    def layer(name: str, module: nnx.Module, *shape: int) -> None:
        graph, state = nnx.split(module)
        measure(name, lambda state, x: nnx.merge(graph, state)(x), state, normal(*shape))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(0), shape)

    how = {"rngs": nnx.Rngs(0), "dtype": jnp.dtype(jnp.float32)}
    for side, c, d in CONVOLUTIONS:
        layer(
            f"conv3x3 {side}x{side} {c}>{d}",
            conv3x3(c, d, **how),
            BATCH,
            side,
            side,
            c,
        )
    for side, c in NORMS:
        layer(f"GroupNorm {side}x{side} {c}", GroupNorm(c, 32, 1e-5, **how), BATCH, side, side, c)
    for n, c in TOKENS:
        layer(f"GEGLU {n}x{c}", FeedForward(c, **how), BATCH, n, c)
        layer(f"Linear {n}x{c}", linear(c, c, **how), BATCH, n, c)
        q, k = normal(BATCH, n, c // HEAD, HEAD), normal(BATCH, 2 * n, c // HEAD, HEAD)
        measure(f"attention {n}x{2 * n}", kernels_for().attend, q, k, k)
    return times


def theirs() -> Times:
    """The same in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.set_num_threads(1)
    times: Times = {}

    class GEGLU(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.gate, self.out = (
                nn.Linear(channels, 8 * channels),
                nn.Linear(4 * channels, channels),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            value, gate = self.gate(x).chunk(2, -1)
            return self.out(value * functional.gelu(gate))

    def measure(name: str, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
        with torch.no_grad():
            times[f"{name}, forward"] = least(lambda: function(*inputs))
        for x in inputs:
            x.requires_grad_(True)

        def both() -> None:
            for x in (*inputs, *(function.parameters() if isinstance(function, nn.Module) else ())):
                x.grad = None
            function(*inputs).sum().backward()

        times[name] = least(both)

    for side, c, d in CONVOLUTIONS:
        x = torch.randn(BATCH, c, side, side)
        measure(f"conv3x3 {side}x{side} {c}>{d}", nn.Conv2d(c, d, 3, padding=1), x)
    for side, c in NORMS:
        x = torch.randn(BATCH, c, side, side)
        measure(f"GroupNorm {side}x{side} {c}", nn.GroupNorm(32, c), x)
    for n, c in TOKENS:
        measure(f"GEGLU {n}x{c}", GEGLU(c), torch.randn(BATCH, n, c))
        measure(f"Linear {n}x{c}", nn.Linear(c, c), torch.randn(BATCH, n, c))
        q, k, v = (torch.randn(BATCH, c // HEAD, m, HEAD) for m in (n, 2 * n, 2 * n))
        measure(f"attention {n}x{2 * n}", functional.scaled_dot_product_attention, q, k, v)
    return times


SIDES = {"bootpig_jax": ours, "PyTorch": theirs}


def main() -> None:
    """The command line: each side in a process of its own."""
    if len(sys.argv) > 1:
        print(json.dumps(SIDES[sys.argv[1]]()))
        return
    mine, other = (
        json.loads(
            subprocess.run(
                [sys.executable, "-m", "benchmarks.layers", side],
                env=devices.environment("cpu"),
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
        )
        for side in SIDES
    )
    print(f"{'ms on one core':<36}{'bootpig_jax':>12}{'PyTorch':>12}{'ratio':>8}")
    for name, milliseconds in mine.items():
        ratio = milliseconds / other[name]
        print(f"{name:<36}{milliseconds:12.2f}{other[name]:12.2f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
