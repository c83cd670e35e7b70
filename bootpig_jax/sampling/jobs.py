"""Many subjects and prompts in one go: a file with one job a line, in JSON.

    {"id": "dog-snow", "references": ["dog1.png", "dog2.png"], "prompt": "a dog in the snow"}
    {"id": "dog-beach", "references": ["dog1.png"], "prompt": "a dog on a beach", "seed": 7}

A job may have `image` and `mask` (inpainting), and every field of `SamplingSettings` but
`batch_size`; what it has not, the command line decides. Paths are relative to the file's folder.
Pictures go to `OUTPUT/id/00.png`, `01.png` and so on.

Jobs of one shape (the same settings but for the seed and the negative prompt, as many references)
are drawn together, by one compiled program. Pictures that exist are not drawn again. The batches
are cut as if there were none, so a run that was stopped and went on leaves the same bits as one
that was not.
"""

import contextlib
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import pydantic
from jaxtyping import Array
from PIL import Image
from pydantic import Field
from tqdm import tqdm

from bootpig_jax.errors import UserError
from bootpig_jax.files import LocalName
from bootpig_jax.sampling.batches import Place, make_batches
from bootpig_jax.sampling.inpainting import open_original, read_original
from bootpig_jax.sampling.picture_settings import (
    InputFile,
    PictureSettings,
    first_problem,
    read_picture_settings,
    write_png,
)
from bootpig_jax.sampling.pipeline import BootPIGPipeline
from bootpig_jax.sampling.references import Segmenter, check_segmenter, open_reference
from bootpig_jax.sampling.requests import EncodedOriginal, Request
from bootpig_jax.sampling.settings import (
    SamplingSettings,
    check_original,
    check_reference_count,
    check_text,
)
from bootpig_jax.yaml_config import ConfigModel

MAX_JOBS = 100_000
MAX_LINE = 1 << 20  # characters
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclasses.dataclass(frozen=True)
class Job:
    """Pictures of one subject from one prompt.

    Attributes:
        id: the name of its folder.
        prompt: the prompt.
        references: pictures of the subject; none: the text alone.
        image: a picture to change.
        mask: which part of it is drawn anew.
        settings: all others.
    """

    id: str
    prompt: str
    references: tuple[Path, ...]
    image: Path | None
    mask: Path | None
    settings: SamplingSettings


class _Line(ConfigModel):
    """A line of the file, but for the settings."""

    id: str
    prompt: str
    references: tuple[Annotated[LocalName, Field(min_length=1, max_length=4096)], ...] = ()
    image: LocalName | None = None
    mask: LocalName | None = None


def read_jobs(path: Path, defaults: SamplingSettings) -> list[Job]:
    """Reads all jobs of a file.

    Args:
        path: the file.
        defaults: what a job does not say.

    Raises:
        UserError: it cannot be read, or a line is wrong; the message begins with its number.
    """
    jobs: list[Job] = []
    lines: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            job = _parse(line, path.parent, defaults)
            # Some file systems take "Dog" and "dog" for one folder.
            first = lines.setdefault(job.id.casefold(), number)
            if first != number:
                raise UserError(f"id: {job.id!r} is line {first}'s already; use another")
            if len(jobs) == MAX_JOBS:
                raise UserError(f"more than {MAX_JOBS} jobs; split the file")
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        jobs.append(job)
    if not jobs:
        raise UserError(f"{path}: holds no job")
    return jobs


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise UserError(f"{path}:{number}: longer than {MAX_LINE} characters")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as such") from None


def _parse(line: str, folder: Path, defaults: SamplingSettings) -> Job:
    try:
        fields = json.loads(line, object_pairs_hook=_without_repetitions)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError("not a JSON object")
    changed = {
        field.name: fields.pop(field.name)
        for field in dataclasses.fields(SamplingSettings)
        if field.name in fields and field.name != "batch_size"
    }
    try:
        parsed = _Line.model_validate_json(json.dumps(fields), strict=True)
        settings = _SETTINGS.validate_json(
            json.dumps(dataclasses.asdict(defaults) | changed), strict=True
        )
    except pydantic.ValidationError as error:
        raise UserError(first_problem(error)) from None
    if not SAFE_ID.fullmatch(parsed.id):
        raise UserError(
            f"id: {parsed.id!r} is no safe name for a folder; use letters, digits, '.', '_', '-', "
            "and begin with a letter or digit"
        )
    check_text("prompt", parsed.prompt)
    for name in (*parsed.references, parsed.image or "", parsed.mask or ""):
        check_text("a file's name", name)
    if parsed.references:
        check_reference_count(len(parsed.references))
    check_original(parsed.image is not None, parsed.mask is not None, settings)
    return Job(
        id=parsed.id,
        prompt=parsed.prompt,
        references=tuple(folder / name for name in parsed.references),
        image=None if parsed.image is None else folder / parsed.image,
        mask=None if parsed.mask is None else folder / parsed.mask,
        settings=settings,
    )


_SETTINGS = pydantic.TypeAdapter(SamplingSettings)


def _without_repetitions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field stands there twice")
    return fields


@dataclasses.dataclass(frozen=True)
class Work:
    """A job with what its pictures will say of themselves, and which of them exist.

    Attributes:
        job: the job.
        record: of its first picture; others differ in `image_index` and `place`.
        existing: indices of the pictures that are there.
    """

    job: Job
    record: PictureSettings
    existing: frozenset[int]

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to draw."""
        return len(self.existing) == self.job.settings.num_images


def plan_jobs(jobs: Sequence[Job], output: Path, model: str, bootpig: str | None) -> list[Work]:
    """Checks every file and segmenter of every job, and which pictures exist.

    Args:
        jobs: from `read_jobs`.
        output: the folder that the pictures go to.
        model: the text-to-image model, as pictures record it.
        bootpig: the trained UNets, likewise.

    Raises:
        UserError: a picture or a segmenter can't be used, or a picture in `output` was drawn from
            something else.
    """

    @functools.cache
    def checked_reference(path: Path) -> InputFile:
        open_reference(path)
        return InputFile.of(path)

    @functools.cache
    def checked_original(image: Path, mask: Path | None) -> dict[str, Any]:
        read_original(*_open_original(image, mask))
        paths = {"image": image, "mask": mask}
        return {name: InputFile.of(path) for name, path in paths.items() if path is not None}

    planned = []
    for job in jobs:
        with named(job):
            if bootpig is not None and not job.references:
                raise UserError("references: --bootpig needs at least one")
            record = PictureSettings(
                model=model,
                bootpig=bootpig,
                prompt=job.prompt,
                references=tuple(checked_reference(path) for path in job.references),
                settings=job.settings,
                **({} if job.image is None else checked_original(job.image, job.mask)),
            )
        existing = set()
        for j in range(job.settings.num_images):
            path = picture_path(output, job, j)
            if path.exists():
                there, _ = read_picture_settings(path)
                if not there.draws_the_same_as(record.model_copy(update={"image_index": j})):
                    raise UserError(
                        f"output: {path} was drawn from something else than job {job.id} says; "
                        "remove it, or name another folder"
                    )
                existing.add(j)
        planned.append(Work(job, record, frozenset(existing)))
    for work in planned:
        if work.job.references and not work.complete:
            with named(work.job):
                check_segmenter(cast(Segmenter, work.job.settings.segmenter))
    return planned


def draw_jobs(
    pipeline: BootPIGPipeline, planned: Sequence[Work], output: Path, batch_size: int
) -> None:
    """Draws and writes every picture that is not there.

    Args:
        pipeline: the model.
        planned: from `plan_jobs`, complete ones included.
        output: the folder; there is one for each job in it.
        batch_size: pictures that are drawn together.

    Raises:
        UserError: the model cannot draw a job, or a picture cannot be written.
    """

    @functools.lru_cache(maxsize=64)
    def encode_references(paths: tuple[Path, ...], settings: SamplingSettings) -> Array:
        return pipeline.encode_references([open_reference(path) for path in paths], settings)

    @functools.lru_cache(maxsize=8)
    def encode_original(
        image: Path, mask: Path | None, settings: SamplingSettings
    ) -> EncodedOriginal:
        return pipeline.encode_original(*_open_original(image, mask), settings)

    def sized(job: Job) -> SamplingSettings:
        """The settings with the size that is drawn, and without what may differ in a batch."""
        height, width = pipeline.size(job.settings)
        return dataclasses.replace(
            job.settings, height=height, width=width, seed=0, negative_prompt="", strict=False
        )

    def request(job: Job, shared: SamplingSettings) -> Request:
        own = job.settings.seed, job.settings.negative_prompt
        with named(job):
            references = encode_references(job.references, shared) if job.references else None
            original = encode_original(job.image, job.mask, shared) if job.image else None
        return Request(
            prompt=job.prompt,
            settings=dataclasses.replace(shared, seed=own[0], negative_prompt=own[1]),
            references=references,
            original=original,
        )

    groups: dict[tuple[Any, ...], list[Work]] = {}
    for work in planned:
        job = work.job
        with named(job):
            shape = (sized(job), len(job.references), job.image is None, job.mask is None)
        groups.setdefault(shape, []).append(work)
    missing = sum(work.job.settings.num_images - len(work.existing) for work in planned)
    with tqdm(total=missing, desc="drawing", unit="picture", file=sys.stderr) as bar:
        for (shared, *_), group in groups.items():
            done = {(p, j) for p, work in enumerate(group) for j in work.existing}
            for batch in make_batches(len(group), shared.num_images, batch_size):
                if done.issuperset(batch.pairs):
                    continue
                jobs = [group[p].job for p in batch.prompts]
                pictures = pipeline.draw_batch([request(job, shared) for job in jobs], batch.images)
                counts = len(batch.prompts), len(batch.images)
                for row, ((p, j), picture) in enumerate(zip(batch.pairs, pictures, strict=True)):
                    if (p, j) in done:
                        continue
                    path = picture_path(output, group[p].job, j)
                    path.parent.mkdir(exist_ok=True)
                    place = Place(*counts, row)
                    record = group[p].record.model_copy(update={"image_index": j, "place": place})
                    write_png(path, picture, record)
                    done.add((p, j))
                    bar.update()


@contextlib.contextmanager
def named(job: Job) -> Iterator[None]:
    """Names the job in errors."""
    try:
        yield
    except UserError as error:
        raise UserError(f"job {job.id}: {error}") from None


def _open_original(image: Path, mask: Path | None) -> tuple[Image.Image, Image.Image | None]:
    return open_original(image), None if mask is None else open_original(mask, "mask")


def picture_path(output: Path, job: Job, image: int) -> Path:
    """Where a job's picture goes."""
    return output / job.id / f"{image:02d}.png"
