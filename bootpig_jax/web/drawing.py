"""What the page to draw with is asked for and what it shows, without the page."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bootpig_jax.attention import STRATEGIES
from bootpig_jax.data.pictures import PictureError, open_picture
from bootpig_jax.errors import UserError
from bootpig_jax.sampling.picture_settings import InputFile, PictureSettings, write_png
from bootpig_jax.sampling.requests import Drawn, Progress
from bootpig_jax.sampling.settings import SamplingSettings, check_prompts, check_reference_count

MAX_SHOWN = 100  # pictures that a page remembers
IMAGE_FILE, MASK_FILE = "picture.png", "mask.png"


@dataclasses.dataclass(frozen=True)
class Models:
    """The models that are drawn with, as they were named."""

    model: str
    bootpig: str | None


@dataclasses.dataclass(frozen=True)
class DrawRequest:
    """What somebody asks for.

    Attributes:
        prompt: the sentence.
        references: files with pictures of the subject.
        settings: one for each pooling, all others equal.
        image: a picture to change.
        mask: which part of it; `None`: all.
    """

    prompt: str
    references: tuple[Path, ...]
    settings: tuple[SamplingSettings, ...]
    image: Image.Image | None = None
    mask: Image.Image | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """How far a job is: `done` of `total` steps, with `strategy`."""

    strategy: str
    done: int
    total: int


@dataclasses.dataclass(frozen=True)
class Used:
    """The files of the picture that is changed and of its mask."""

    paths: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Tile:
    """A picture on the page: its file, what is written below it, and how to draw it again."""

    path: str
    caption: str
    settings: PictureSettings


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a page shows: all its pictures, newest first, and which of them are the last job's."""

    pictures: tuple[Tile, ...] = ()
    last: tuple[Tile, ...] = ()

    def add(self, tiles: Sequence[Tile]) -> "Shown":
        """With the next pictures of the last job."""
        return Shown((*reversed(tiles), *self.pictures)[:MAX_SHOWN], (*self.last, *tiles))


OnStep = Callable[[Progress], None]  # may raise to stop
Draw = Callable[[DrawRequest, SamplingSettings, OnStep], Iterable[Drawn]]


# ---------------------------------------------------------------- what is asked for


def make_request(
    prompt: str,
    references: Sequence[tuple[str, Any]] | None,
    strategies: Sequence[str],
    picture: dict[str, Any] | None,
    fields: dict[str, Any],
) -> DrawRequest:
    """Checks what the page's controls hold.

    Args:
        prompt: the sentence.
        references: (file, caption) of each.
        strategies: poolings.
        picture: from the image editor: `background` and `layers`, RGBA.
        fields: by name in `SamplingSettings`; `reference_scale` as text, empty for `None`.

    Raises:
        UserError: something is missing or out of its range.
    """
    check_prompts(prompt)
    if not prompt.strip():
        raise UserError("prompt: is empty; say what to draw")
    files = tuple(Path(path) for path, _ in references or ())
    check_reference_count(len(files))
    if not strategies:
        raise UserError("poolings: none chosen; choose at least one")
    scale = fields["reference_scale"].strip()
    try:
        fields = fields | {"reference_scale": float(scale) if scale else None}
    except ValueError:
        raise UserError(f"reference_scale: {scale!r} is no number; leave it empty") from None
    settings = tuple(
        SamplingSettings(strategy=name, **fields) for name in STRATEGIES if name in strategies
    )
    image, mask = split_picture(picture)
    return DrawRequest(prompt, files, settings, image, mask)


def open_upload(path: Path) -> Image.Image:
    """Opens an uploaded reference.

    Raises:
        UserError: it is no picture, or a damaged one; it names the file as it was uploaded.
    """
    try:
        return open_picture(path)
    except PictureError as error:
        raise UserError(f"reference {path.name}: {error}") from None
    except OSError as error:
        raise UserError(f"reference {path.name}: cannot be read ({error.strerror})") from None


def split_picture(
    picture: dict[str, Any] | None,
) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture in the image editor, on white, and what was painted on it as a mask."""
    if not picture or picture["background"] is None:
        return None, None
    background = picture["background"].convert("RGBA")
    if background.getchannel("A").getextrema()[1] == 0:
        return None, None  # an empty canvas
    image = Image.alpha_composite(Image.new("RGBA", background.size, "white"), background)
    painted = np.zeros(background.size[::-1], bool)
    for layer in picture["layers"]:
        if layer.size != background.size:
            raise UserError("picture: its mask has another size; paint it anew")
        painted |= np.asarray(layer.convert("RGBA").getchannel("A")) > 0
    mask = Image.fromarray(np.where(painted, 255, 0).astype(np.uint8)) if painted.any() else None
    return image.convert("RGB"), mask


@dataclasses.dataclass(frozen=True)
class Files:
    """A request's pictures as files, for those who draw it again elsewhere.

    Attributes:
        references: the uploaded ones.
        image: the picture that was changed.
        mask: which part of it.
    """

    references: tuple[InputFile, ...]
    image: InputFile | None
    mask: InputFile | None


def write_files(request: DrawRequest, folder: Path) -> Files:
    """Hashes the references, and writes the picture to change and its mask to `folder`.

    In the result they all go by their names alone: the server's folders say nothing elsewhere.
    """

    def of(path: Path) -> InputFile:
        return InputFile(path=path.name, sha256=InputFile.of(path).sha256)

    written: list[InputFile | None] = []
    for name, image in ((IMAGE_FILE, request.image), (MASK_FILE, request.mask)):
        if image is not None:
            write_png(folder / name, image)
        written.append(None if image is None else of(folder / name))
    return Files(tuple(of(path) for path in request.references), *written)


def describe(
    request: DrawRequest, settings: SamplingSettings, files: Files, models: Models, drawn: Drawn
) -> PictureSettings:
    """What a picture was drawn from."""
    return PictureSettings(
        model=models.model,
        bootpig=models.bootpig,
        prompt=request.prompt,
        image_index=drawn.image,
        references=files.references,
        image=files.image,
        mask=files.mask,
        settings=settings,
        place=drawn.place,
    )
