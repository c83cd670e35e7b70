"""Puts held-out subjects into finished pictures, and scores what stands there.

    python -m bootpig_jax.toyland.inpainting --cases 64 --output runs/inpainting/report.json

Each case of `measures.make_cases` becomes a picture of its scene with *another* subject of the same
category, one seen in training, and a mask: the box around that subject and a little more. What is
drawn into the mask has to be the case's own subject, which its references show.

*subject@16* is `measures`'; outside the mask nothing counts. *unchanged* is the share of pixels
outside the mask that come back bit for bit. The report has three rows: the pictures as they were,
the mask filled from the caption alone, and from the references too. Beside the report, with the
ending `.png`, is a sheet.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence

import numpy as np
import pydantic
from jaxtyping import Bool, UInt8
from PIL import Image

from bootpig_jax.compilation_cache import use_compilation_cache
from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.files import local_name, local_path
from bootpig_jax.sampling.batches import make_batches
from bootpig_jax.sampling.contact_sheet import Row, contact_sheet
from bootpig_jax.sampling.pipeline import BootPIGPipeline
from bootpig_jax.sampling.requests import Request
from bootpig_jax.sampling.settings import SamplingSettings, check_reference_count
from bootpig_jax.toyland.evaluate import (
    SHIPPED_BOOTPIG,
    SHIPPED_MODEL,
    bootstrap_interval,
    sampling_settings,
)
from bootpig_jax.toyland.measures import Case, make_cases, subject_rank
from bootpig_jax.toyland.render import SIZE, render
from bootpig_jax.toyland.world import sample_subject

MARGIN = 4  # pixels that the mask is larger than the subject in it, on each side
SHEET_CASES = 6


@dataclasses.dataclass(frozen=True)
class Room:
    """A case with the picture that is changed.

    Attributes:
        case: what has to be drawn.
        picture: the case's scene, with another subject.
        mask: True where something new is drawn.
    """

    case: Case
    picture: UInt8[np.ndarray, "64 64 3"]
    mask: Bool[np.ndarray, "64 64"]


class Result(pydantic.BaseModel):
    """How one way of filling the mask scored.

    Attributes:
        name: of the way.
        subject_at_16: share of pictures whose subject, in the mask, is nearest to its own
            reference; chance is 1/16.
        subject_interval: its 95 % interval.
        subject_rank: mean rank of the own reference; chance is 8.5.
        unchanged: share of pixels outside the mask that are the picture's own.
        seconds: drawing took, compilation included.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    name: str
    subject_at_16: float
    subject_interval: tuple[float, float]
    subject_rank: float
    unchanged: float
    seconds: float


class Report(pydantic.BaseModel):
    """What is written."""

    model_config = pydantic.ConfigDict(frozen=True)

    settings: SamplingSettings
    cases: int
    references: int
    results: tuple[Result, ...]


def make_rooms(cases: Sequence[Case], seed: int) -> list[Room]:
    """A picture and a mask for each case; the first m do not depend on how many there are."""
    rooms = []
    for index, case in enumerate(cases):
        rng = np.random.default_rng([seed, index, 1])
        other = sample_subject(rng, case.category, "train")
        rendering = render(other, case.scene, case.position, rng)
        rows, columns = (np.flatnonzero(rendering.mask.any(axis=axis)) for axis in (1, 0))
        mask = np.zeros((SIZE, SIZE), bool)
        mask[
            max(0, rows[0] - MARGIN) : rows[-1] + 1 + MARGIN,
            max(0, columns[0] - MARGIN) : columns[-1] + 1 + MARGIN,
        ] = True
        rooms.append(Room(case, rendering.image, mask))
    return rooms


def fill_rooms(
    pipeline: BootPIGPipeline,
    rooms: Sequence[Room],
    settings: SamplingSettings,
    *,
    with_references: bool,
) -> UInt8[np.ndarray, "n 64 64 3"]:
    """Draws into each mask, from the case's caption and, if asked, its references."""

    def request(index: int) -> Request:
        room = rooms[index]
        image, mask = Image.fromarray(room.picture), Image.fromarray(room.mask)
        references = [Image.fromarray(reference.image) for reference in room.case.references]
        return Request(
            room.case.caption,
            settings,
            index,
            pipeline.encode_references(references, settings) if with_references else None,
            pipeline.encode_original(image, mask, settings),
        )

    drawn: dict[int, np.ndarray] = {}
    for batch in make_batches(len(rooms), 1, settings.batch_size):
        pictures = pipeline.draw_batch([request(index) for index in batch.prompts], batch.images)
        drawn |= dict(zip(batch.prompts, map(np.asarray, pictures), strict=True))
        print(f"{len(drawn)} of {len(rooms)}", file=sys.stderr, flush=True)
    return np.stack([drawn[index] for index in range(len(rooms))])


def score_rooms(
    name: str, rooms: Sequence[Room], pictures: UInt8[np.ndarray, "n 64 64 3"], seconds: float
) -> Result:
    """Looks inside the masks for the subject, and outside for what has changed."""
    pairs = list(zip(rooms, pictures, strict=True))
    ranks = np.array([subject_rank(picture, room.case, room.mask) for room, picture in pairs])
    same = [(room.picture == picture).all(axis=-1)[~room.mask] for room, picture in pairs]
    return Result(
        name=name,
        subject_at_16=float((ranks == 1).mean()),
        subject_interval=bootstrap_interval(ranks == 1),
        subject_rank=float(ranks.mean()),
        unchanged=float(np.concatenate(same).mean()),
        seconds=round(seconds, 1),
    )


def room_sheet(
    rooms: Sequence[Room], ways: Sequence[tuple[str, UInt8[np.ndarray, "n 64 64 3"]]]
) -> Image.Image:
    """A row for each of the first cases: the picture, the mask, the reference, what was drawn."""
    rows = []
    for index, room in enumerate(rooms[:SHEET_CASES]):
        shown = np.where(room.mask[..., None], 255, room.picture).astype(np.uint8)
        cells = [room.picture, shown, room.case.references[0].image]
        cells += [pictures[index] for _, pictures in ways]
        rows.append(Row(room.case.caption, [[Image.fromarray(cell)] for cell in cells]))
    return contact_sheet(rows, ["picture", "mask", "reference", *(name for name, _ in ways)])


def format_table(results: Sequence[Result]) -> str:
    """The results, for the terminal."""
    width = max(len(result.name) for result in results)
    lines = [f"{'':{width}}  {'subject@16':>23}  mean rank  unchanged outside  seconds"]
    lines += [
        f"{r.name:{width}}  {r.subject_at_16:6.1%} [{r.subject_interval[0]:6.1%}, "
        f"{r.subject_interval[1]:6.1%}]  {r.subject_rank:9.1f}  {r.unchanged:17.1%}"
        f"  {r.seconds:7.1f}"
        for r in results
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        UserError: an argument is wrong; nothing has been drawn then.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bootpig_jax.toyland.inpainting",
        description="Puts held-out subjects of Toyland into finished pictures, and scores them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", type=local_path, default=SHIPPED_MODEL, help="in diffusers' layout"
    )
    parser.add_argument(
        "--bootpig", type=local_name, default=str(SHIPPED_BOOTPIG), help="what train exports"
    )
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("--references", type=int, default=1, help="pictures of each subject")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--image-guidance", type=float, default=3.0)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0, help="of the cases and of the noise")
    parser.add_argument("--batch-size", type=int, default=16, help="cases drawn together")
    parser.add_argument("--output", type=local_path, required=True, help="the report, a .json file")
    options = parser.parse_args(argv)
    settings = sampling_settings(
        steps=options.steps,
        image_guidance_scale=options.image_guidance,
        guidance_scale=options.guidance,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    check_reference_count(options.references)
    if options.output.suffix != ".json":
        raise UserError(f"output: must be a .json file, not {options.output}")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot create its folder: {error.strerror}") from None

    use_compilation_cache()
    rooms = make_rooms(make_cases(options.seed, options.cases, options.references), options.seed)
    pipeline = BootPIGPipeline.from_pretrained(options.model, options.bootpig)
    before = np.stack([room.picture for room in rooms])
    results = [score_rooms("as it was", rooms, before, 0)]
    ways = []
    for name, with_references in (("caption", False), ("references", True)):
        started = time.monotonic()
        pictures = fill_rooms(pipeline, rooms, settings, with_references=with_references)
        ways.append((name, pictures))
        results.append(score_rooms(name, rooms, pictures, time.monotonic() - started))

    report = Report(
        settings=settings,
        cases=len(rooms),
        references=options.references,
        results=tuple(results),
    )
    sheet = options.output.with_suffix(".png")
    room_sheet(rooms, ways).save(sheet)
    draft = options.output.with_suffix(".draft")
    draft.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(draft, options.output)
    print(format_table(results))
    print(f"{options.output}\n{sheet}")


if __name__ == "__main__":
    run_cli(main)
