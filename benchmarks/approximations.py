"""What sampling's approximations cost in quality, on Toyland.

    python -m benchmarks.approximations [--cases 64]

Prints a table. Each way of drawing sees the same cases and the same noise as the exact one above
it. *Difference* is the mean distance of their pictures' values, 0 to 255. The shipped BootPIG sees
clean references, whose features are the same at every step; so `reuse_features` is measured with
references that are noised to each step's t, as in the paper, which that model was not trained for.
"""

import argparse
import dataclasses
import sys

import numpy as np

from bootpig_jax.compilation_cache import use_compilation_cache
from bootpig_jax.errors import run_cli
from bootpig_jax.sampling.pipeline import BootPIGPipeline
from bootpig_jax.sampling.settings import SamplingSettings
from bootpig_jax.toyland.evaluate import (
    SHIPPED_BOOTPIG,
    SHIPPED_MODEL,
    Pictures,
    draw_cases,
    sampling_settings,
)
from bootpig_jax.toyland.measures import make_cases, score

BATCH = 32


def list_ways() -> list[tuple[str, SamplingSettings]]:
    """Names and settings; a name that starts with "exact" is what those below are compared with."""
    plain = sampling_settings(
        steps=50, image_guidance_scale=3.0, guidance_scale=3.0, seed=0, batch_size=BATCH
    )
    noised = dataclasses.replace(plain, num_inference_steps=20, reference_timestep="same")
    ways = [("exact: 50 steps", plain)]
    for steps in (20, 10, 5):
        ways.append((f"{steps} steps", dataclasses.replace(plain, num_inference_steps=steps)))
    for interval in ((0.0, 0.5), (0.1, 0.9)):
        guided = dataclasses.replace(plain, guidance_interval=interval)
        ways.append((f"50 steps, guided from {interval[0]} to {interval[1]}", guided))
    ways.append(("exact: 20 steps, references noised", noised))
    for count in (2, 5):
        reused = dataclasses.replace(noised, reuse_features=count)
        ways.append((f"features kept for {count} steps", reused))
    return ways


def count_evaluations(settings: SamplingSettings) -> tuple[int, int]:
    """How often a picture goes through the Base UNet, and each reference through its own."""
    n = settings.num_inference_steps
    low, high = settings.guidance_interval
    guided = sum(low <= i / n < high for i in range(n))
    seen = 1 if settings.reference_timestep is None else len(range(0, n, settings.reuse_features))
    return 3 * guided + n - guided, seen


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=64)
    options = parser.parse_args()
    use_compilation_cache()
    pipeline = BootPIGPipeline.from_pretrained(SHIPPED_MODEL, SHIPPED_BOOTPIG)
    cases = make_cases(0, options.cases)
    print("| | Base UNet | Reference UNet | subject@16 | scene@10 | difference |")
    print("|---|---|---|---|---|---|", flush=True)
    exact: Pictures | None = None
    for name, settings in list_ways():
        print(name, file=sys.stderr, flush=True)
        pictures = draw_cases(pipeline, cases, settings, "bootpig")
        if exact is None or name.startswith("exact"):
            exact = pictures
        found = score(pictures, cases)
        base, reference = count_evaluations(settings)
        difference = np.abs(pictures.astype(np.float32) - exact).mean()
        print(
            f"| {name} | {base} | {reference} | {found.subject_at_16:.1%} | "
            f"{found.scene_at_10:.1%} | {difference:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    run_cli(main)
