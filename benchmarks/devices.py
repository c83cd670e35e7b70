"""Where a benchmark runs: its processes' environment, and what the device is."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

Device = Literal["auto", "cpu", "gpu", "tpu"]
DEVICES: tuple[Device, ...] = get_args(Device)
JAX_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
CPU_ENVIRONMENT = Path(__file__).parents[1] / "launch" / "cpu_env.sh"
# Of the product that the rate is measured with: large enough to fill a card.
SIDE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}


def environment(device: Device) -> Mapping[str, str]:
    """The environment of a process that computes on `device`; PyTorch's has it, too."""
    if device == "auto":
        return os.environ
    chosen = {"JAX_PLATFORMS": JAX_PLATFORMS[device]}
    if device == "cpu":
        # PyTorch gets the memory that is kept as well.
        script = f"source {CPU_ENVIRONMENT} && env -0"
        shown = subprocess.run(
            ["bash", "-c", script], stdout=subprocess.PIPE, check=True, text=True
        )
        chosen |= dict(entry.split("=", 1) for entry in shown.stdout.split("\0") if entry)
        chosen["CUDA_VISIBLE_DEVICES"] = ""
    else:
        # Two processes share the card.
        chosen["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return os.environ | chosen


def find(device: Device) -> dict[str, Any]:
    """`describe`s `device` in a process of its own, which leaves it as it was."""
    command = [sys.executable, "-m", "benchmarks.devices"]
    shown = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment(device))
    return json.loads(shown.stdout)


def describe() -> dict[str, Any]:
    """The device that JAX computes on here, and the rate of its matrix products.

    Returns:
      What is written as JSON: `platform`, `kind`, the `precision` that models have there, and
      `tflops`, measured with a square product in that precision.
    """
    import jax
    import jax.numpy as jnp

    from bootpig_jax.kernels import compute_dtype, default_device

    device, dtype = default_device(), compute_dtype("auto")
    side = SIDE.get(device.platform, SIDE["gpu"])
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    times = []
    for _ in range(10):
        started = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - started)
    cpu = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return {
        "platform": device.platform,
        "kind": cpu if device.platform == "cpu" else device.device_kind,
        "precision": jnp.dtype(dtype).name,
        "tflops": 2 * side**3 / sorted(times)[len(times) // 2] / 1e12,
    }


def peak_bytes(library: Literal["jax", "torch"]) -> int:
    """The most memory that this process had: the card's if it computes on one, else its own."""
    if library == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    else:
        from bootpig_jax.kernels import default_device

        statistics = default_device().memory_stats() or {}
        if "peak_bytes_in_use" in statistics:
            return statistics["peak_bytes_in_use"]
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024


if __name__ == "__main__":
    print(json.dumps(describe()))
