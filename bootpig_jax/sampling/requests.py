"""What the pipeline is asked for, and what it answers with."""

import dataclasses
from collections.abc import Callable, Sequence

from jaxtyping import Array, Float
from PIL import Image

from bootpig_jax.errors import UserError
from bootpig_jax.sampling.batches import Place
from bootpig_jax.sampling.inpainting import Original
from bootpig_jax.sampling.settings import SamplingSettings, check_reference_count

Pictures = Sequence[Image.Image]


@dataclasses.dataclass(frozen=True)
class EncodedOriginal:
    """A picture that is changed, and its latents.

    Attributes:
        original: its pixels, and which of them are drawn anew.
        latents: scaled as the UNet sees them.
    """

    original: Original
    latents: Float[Array, "h w c"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What one prompt's pictures are drawn from.

    Attributes:
        prompt: the prompt.
        settings: those of requests that are drawn together differ in `seed` and `negative_prompt`
            at most.
        index: p in the layout of the noise; see `sampling.batches`.
        references: latents of the references, from `encode_references`; `None`: the text alone.
        original: the picture that is changed, from `encode_original`; `None`: a new one.
    """

    prompt: str
    settings: SamplingSettings
    index: int = 0
    references: Float[Array, "k h w c"] | None = None
    original: EncodedOriginal | None = None


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A picture that has been drawn.

    Attributes:
        prompt: index of its prompt.
        image: which of the prompt's pictures it is.
        picture: in RGB.
        place: what has to be known to draw the same bits again.
    """

    prompt: int
    image: int
    picture: Image.Image
    place: Place


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the drawing is.

    Attributes:
        batch: which batch is being drawn, from 1.
        batches: how many there are.
        step: which of its steps is done, from 1.
        steps: how many there are.
    """

    batch: int
    batches: int
    step: int
    steps: int


# Called after each step. Returning False stops the drawing: `Cancelled` is raised.
Callback = Callable[[Progress], bool | None]


class Cancelled(Exception):
    """A callback stopped the drawing."""


def reference_sets(
    references: Pictures | Sequence[Pictures] | None, num_prompts: int
) -> list[Pictures] | None:
    """One list of pictures for each prompt."""
    if references is None:
        return None
    if isinstance(references, Image.Image):
        raise UserError("references: must be a list of pictures; put the picture in a list")
    nested = [item for item in references if not isinstance(item, Image.Image)]
    sets: list[Pictures]
    if not nested:
        sets = [[item for item in references if isinstance(item, Image.Image)]] * num_prompts
    elif len(nested) != len(references):
        raise UserError("references: must be pictures, or lists of pictures, not both")
    else:
        sets = [list(pictures) for pictures in nested]
    if len(sets) != num_prompts:
        raise UserError(f"references: {len(sets)} lists for {num_prompts} prompts; give one each")
    for pictures in sets:
        check_reference_count(len(pictures))
        if len(pictures) != len(sets[0]):
            raise UserError("references: every prompt needs as many as the others")
        if not all(isinstance(picture, Image.Image) for picture in pictures):
            raise UserError("references: must be PIL pictures; open files with PIL.Image.open")
    return sets
