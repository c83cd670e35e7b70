"""What sampling's approximations cost in quality, on Toyland.

    python -m benchmarks.approximations [--cases 64] [--output benchmarks/results/FILE.json]

Each way of drawing sees the same cases and the same noise as the exact one above it. `difference`
is the mean distance of their pictures' values, 0 to 255. The shipped BootPIG sees clean references,
whose features are the same at every step; so `reuse_features` is measured with references that are
noised to each step's t, as in the paper, which that model was not trained for.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    use_compilation_cache()
    pipeline = BootPIGPipeline.from_pretrained(SHIPPED_MODEL, SHIPPED_BOOTPIG)
    cases = make_cases(0, options.cases)
    rows = []
    exact: Pictures | None = None
    for name, settings in list_ways():
        print(name, file=sys.stderr, flush=True)
        draw_cases(pipeline, cases[:BATCH], settings, "bootpig")  # compiles
        started = time.monotonic()
        pictures = draw_cases(pipeline, cases, settings, "bootpig")
        seconds = (time.monotonic() - started) / options.cases
        if exact is None or name.startswith("exact"):
            exact = pictures
        found = score(pictures, cases)
        rows.append(
            {
                "way": name,
                "subject_at_16": found.subject_at_16,
                "scene_at_10": found.scene_at_10,
                "difference": float(np.abs(pictures.astype(np.float32) - exact).mean()),
                "seconds_a_picture": seconds,
            }
        )
        print(
            f"{name:42} subject@16 {found.subject_at_16:6.1%} scene@10 {found.scene_at_10:6.1%} "
            f"difference {rows[-1]['difference']:5.1f} {seconds:5.2f} s a picture",
            flush=True,
        )
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(
            json.dumps({"cases": options.cases, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    run_cli(main)
