"""Eight small pictures that the shipped models draw, and that every change has to keep.

Where a change is meant to draw others, write them anew, look at them, and commit them with it:

    python -m tests.golden_pictures --write

Without `--write` it says how far today's pictures are from those in `tests/golden/pictures`.
"""

import tests.conftest  # noqa: F401, I001 - first: programs are then compiled as in the tests

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bootpig_jax import BootPIGPipeline
from bootpig_jax.toyland.inpainting import make_rooms
from bootpig_jax.toyland.measures import Case, make_cases

WEIGHTS = Path(__file__).parents[1] / "bootpig_jax" / "toyland" / "weights"
FOLDER = Path(__file__).parent / "golden" / "pictures"
NAMES = (
    *("text_ball", "text_house"),
    *("subject_fish_0", "subject_fish_1", "subject_mug_0", "subject_mug_1"),
    *("inpainted_star_0", "inpainted_star_1"),
)


def draw() -> dict[str, Image.Image]:
    """The pictures by name. Three programs are compiled, which takes most of the time."""
    pipe = BootPIGPipeline.from_pretrained(WEIGHTS / "sd", bootpig=WEIGHTS / "bootpig")
    cases = {case.category: case for case in make_cases(seed=3, n=12, num_references=3)}
    options: dict[str, Any] = {"guidance_scale": 3.0, "image_guidance_scale": 3.0, "seed": 1}

    text = pipe(
        [cases["ball"].caption, cases["house"].caption],
        solver="dpmpp_2m",
        sigmas="karras",
        num_inference_steps=6,
        **options,
    )
    subjects = [cases["fish"], cases["mug"]]
    subject = pipe(
        [case.caption for case in subjects],
        [references(case) for case in subjects],
        num_images=2,
        num_inference_steps=6,
        **options,
    )
    (room,) = make_rooms([cases["star"]], seed=3)
    inpainted = pipe(
        room.case.caption,
        references(room.case)[:1],
        image=Image.fromarray(room.picture),
        mask=Image.fromarray(room.mask),
        strength=0.9,
        reference_timestep="same",
        solver="ddim",
        num_images=2,
        num_inference_steps=7,
        **options,
    )
    return dict(zip(NAMES, [*text, *subject, *inpainted], strict=True))


def references(case: Case) -> list[Image.Image]:
    return [Image.fromarray(reference.image) for reference in case.references]


def committed(name: str) -> Image.Image:
    return Image.open(FOLDER / f"{name}.png")


def distance(one: Image.Image, other: Image.Image) -> int:
    """The largest difference, of 255, in any channel of any pixel."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put today's pictures in their place")
    write = parser.parse_args().write
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, picture in draw().items():
        if write:
            picture.save(FOLDER / f"{name}.png")
        else:
            print(f"{name}: {distance(picture, committed(name))} of 255")


if __name__ == "__main__":
    main()
