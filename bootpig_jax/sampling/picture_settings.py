"""What a picture was drawn from, kept in the picture: a text chunk of the PNG, in JSON.

With it, `python -m bootpig_jax.sample --from-png FILE` draws the picture again. A PNG may come from
anybody, so what is read is checked like any other input: its size first, then every field. Files
are named by path and SHA-256, and nothing but pictures is ever opened by such a path.
"""

import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Annotated, Self

import pydantic
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from pydantic import Field

from bootpig_jax import __version__
from bootpig_jax.data.pictures import PictureError, open_picture
from bootpig_jax.errors import UserError
from bootpig_jax.sampling.batches import Place
from bootpig_jax.sampling.settings import (
    MAX_IMAGES,
    MAX_REFERENCES,
    MAX_TEXT,
    SamplingSettings,
    check_text,
)
from bootpig_jax.yaml_config import ConfigModel

KEY = "bootpig"
MAX_PATH = 4096
# Characters of the text chunk: the longest texts and paths fit, twelve for each of their characters
# that JSON writes as two escapes, and 16 KiB for all else.
MAX_JSON = 12 * (3 * MAX_TEXT + (MAX_REFERENCES + 4) * MAX_PATH) + 16 * 1024

Name = Annotated[str, Field(max_length=MAX_PATH)]
Index = Annotated[int, Field(ge=0, lt=2**31)]


class InputFile(ConfigModel):
    """A picture file that was given.

    Attributes:
        path: as it was given.
        sha256: of its content, in hexadecimal.
    """

    path: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @classmethod
    def of(cls, path: str | Path) -> Self:
        """Hashes a file.

        Raises:
            UserError: it cannot be read, or its name is no text.
        """
        check_text(str(path), str(path))  # it has to fit into JSON
        try:
            with open(path, "rb") as file:
                return cls(path=str(path), sha256=hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None

    def check(self, name: str) -> None:
        """Raises `UserError`, with `name` for the file, if it is missing or has changed."""
        if not Path(self.path).is_file():
            raise UserError(f"{name} {self.path}: no such file; name where it is now")
        if InputFile.of(self.path) != self:
            raise UserError(
                f"{name} {self.path}: has changed since the picture was drawn; "
                f"name the right file, or this one to use it as it is"
            )


class PictureSettings(ConfigModel):
    """What a picture was drawn from.

    Attributes:
        version: of this package.
        model: the text-to-image model, as it was given.
        bootpig: the trained UNets, as they were given.
        prompt: the prompt.
        prompt_index: p in the layout of the noise; see `sampling.batches`.
        image_index: j in it.
        references: pictures of the subject.
        image: the picture that was changed.
        mask: which part of it was drawn anew.
        settings: all others, with the seed and the negative prompt.
        place: where in which shape of batch it was drawn.
    """

    version: Annotated[str, Field(max_length=100)] = __version__
    model: Name
    bootpig: Name | None
    prompt: Annotated[str, Field(max_length=MAX_TEXT)]
    prompt_index: Index = 0
    image_index: Index = 0
    references: Annotated[tuple[InputFile, ...], Field(max_length=MAX_REFERENCES)] = ()
    image: InputFile | None = None
    mask: InputFile | None = None
    settings: SamplingSettings
    place: Place = Place(1, 1, 0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        check_text("prompt", self.prompt)
        place = self.place
        rows = place.prompts * place.images
        if min(place.prompts, place.images) < 1 or rows > MAX_IMAGES:
            raise ValueError(f"place: a batch has from 1 to {MAX_IMAGES} pictures")
        if not 0 <= place.row < rows:
            raise ValueError("place: row lies outside the batch")
        return self

    def draws_the_same_as(self, other: "PictureSettings") -> bool:
        """Whether both describe one picture, up to its last bits."""
        return self._essence() == other._essence()

    def _essence(self) -> "PictureSettings":
        """Without what decides nothing but the last bits, and where the files are."""

        def content(file: InputFile | None) -> InputFile | None:
            return None if file is None else file.model_copy(update={"path": ""})

        settings = dataclasses.replace(self.settings, num_images=1, batch_size=1, strict=False)
        ignored = {
            "version": "",
            "place": Place(1, 1, 0),
            "settings": settings,
            "references": tuple(map(content, self.references)),
            "image": content(self.image),
            "mask": content(self.mask),
        }
        return self.model_copy(update=ignored)


def read_picture_settings(path: str | Path) -> tuple[PictureSettings, Image.Image]:
    """What a PNG was drawn from, and the picture itself.

    Raises:
        UserError: the file is no PNG, or has no settings or damaged ones.
    """
    try:
        image = open_picture(Path(path), min_side=1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except PictureError as error:
        raise UserError(f"{path}: {error}") from None
    text = image.text.get(KEY) if isinstance(image, PngImageFile) else None
    if text is None:
        raise UserError(f"{path}: has no settings in it; use a PNG that bootpig_jax.sample wrote")
    if len(text) > MAX_JSON:
        raise UserError(f"{path}: its settings have {len(text)} characters, which is too many")
    try:
        return PictureSettings.model_validate_json(text, strict=True), image
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: its settings are damaged: {first_problem(error)}") from None
    except UserError as error:
        raise UserError(f"{path}: its settings are damaged: {error}") from None


def first_problem(error: pydantic.ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, problem["loc"]))
    message = " ".join(problem["msg"].removeprefix("Value error, ").split())
    return f"{where}: {message}" if where else message


def png_bytes(picture: Image.Image, settings: PictureSettings | None = None) -> bytes:
    """A PNG with the settings, if there are any, in its text chunk."""
    info = PngInfo()
    if settings is not None:
        # ASCII: a chunk of the oldest kind, which every reader knows.
        info.add_text(KEY, json.dumps(settings.model_dump(mode="json"), ensure_ascii=True))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def write_png(path: Path, picture: Image.Image, settings: PictureSettings | None = None) -> None:
    """Writes a picture whole or not at all: under another name first, then renamed.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(png_bytes(picture, settings))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"output: cannot write {path} ({reason}); make room and retry") from error
