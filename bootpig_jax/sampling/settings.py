"""How pictures are drawn: every setting with its range, checked before any model is loaded."""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any, get_args

import pydantic

from bootpig_jax.attention import STRATEGIES
from bootpig_jax.diffusion.solvers import SIGMAS, SOLVERS, SPACINGS
from bootpig_jax.errors import UserError
from bootpig_jax.sampling.conditioning import (
    MAX_KEY_SCALE,
    ReferenceCaption,
    ReferenceTimestep,
)
from bootpig_jax.sampling.references import SEGMENTERS

MAX_REFERENCES = 16
MAX_GUIDANCE = 100.0
MAX_SIDE = 2048
MAX_STEPS = 1000
MAX_IMAGES = 10_000
MAX_TEXT = 10_000  # characters; a text encoder sees a few hundred of them


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn, checked on construction.

    Attributes:
        num_inference_steps: how many times the networks are evaluated.
        image_guidance_scale: eta_im of Eq. 4; unused without references.
        guidance_scale: eta_txt of Eq. 4.
        guidance_interval: which part of the way from noise to picture is guided, in [0, 1]: step i
            of n is where low <= i / n < high. Elsewhere one branch instead of three is evaluated.
        negative_prompt: what the branches without a caption read instead of the empty text: what
            the picture should not show.
        strategy: how several references are pooled: `softmax`, `concat`, `average` or `argmax`.
        reference_scale: factor on the reference tokens that feed the keys; the authors' release has
            1.1. `None`: as the model was trained.
        reference_caption: what the Reference UNet reads: `target`, `first_clause` or `object`, see
            `Conditioning`; any other text: these words. `None`: as the model was trained.
        reference_timestep: "same": references are noised to each step's t; 0: they stay clean.
            `None`: as the model was trained.
        reuse_features: references go through the Reference UNet at every so-manieth step only;
            above 1 this is an approximation.
        num_images: pictures for each prompt.
        seed: where all noise comes from.
        solver: `unipc`, `dpmpp_2m`, `ddim` or `euler`.
        spacing: of the timesteps: `linspace`, `leading` or `trailing`. `None`: the model's own.
        sigmas: noise levels as the model's schedule has them (`default`), or `karras`.
        strength: how much of a given picture is drawn anew, in (0, 1]; 1 keeps nothing of it but
            what a mask keeps.
        segmenter: how references are cut out; see `sampling.references`.
        height: of what is drawn, in pixels. `None`: the model's own.
        width: likewise.
        batch_size: pictures that are drawn together.
        strict: whether a prompt that is too long is an error rather than a warning.

    Raises:
        UserError: a field is out of its range.
    """

    # For those who read settings from JSON with pydantic: no other keys.
    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    num_inference_steps: int = 50
    image_guidance_scale: float = 5.0
    guidance_scale: float = 7.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    negative_prompt: str = ""
    strategy: str = "softmax"
    reference_scale: float | None = None
    reference_caption: str | None = None
    reference_timestep: ReferenceTimestep | None = None
    reuse_features: int = 1
    num_images: int = 1
    seed: int = 0
    solver: str = "unipc"
    spacing: str | None = None
    sigmas: str = "default"
    strength: float = 1.0
    segmenter: str = "auto"
    height: int | None = None
    width: int | None = None
    batch_size: int = 4
    strict: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        self._check_integer("num_inference_steps", 1, MAX_STEPS)
        self._check_integer("reuse_features", 1, MAX_STEPS)
        self._check_integer("num_images", 1, MAX_IMAGES)
        self._check_integer("batch_size", 1, MAX_IMAGES)
        self._check_integer("seed", 0, 2**32 - 1)
        for name in ("image_guidance_scale", "guidance_scale"):
            if not is_number(getattr(self, name)) or not 0 <= getattr(self, name) <= MAX_GUIDANCE:
                self._refuse(name, f"a number from 0 to {MAX_GUIDANCE:g}")
        if not is_number(self.strength) or not 0 < self.strength <= 1:
            self._refuse("strength", "a number above 0, 1 at most")
        scale = self.reference_scale
        if scale is not None and not (is_number(scale) and 0 < scale <= MAX_KEY_SCALE):
            self._refuse("reference_scale", f"a number above 0, {MAX_KEY_SCALE} at most")
        self._check_interval()
        self._check_choice("strategy", STRATEGIES)
        self._check_choice("solver", SOLVERS)
        if self.spacing is not None:
            self._check_choice("spacing", SPACINGS)
        self._check_choice("sigmas", SIGMAS)
        self._check_choice("segmenter", SEGMENTERS)
        check_text("negative_prompt", self.negative_prompt)
        if self.reference_caption is not None:
            self._check_reference_caption(self.reference_caption)
        timestep = self.reference_timestep
        known = (None, *get_args(ReferenceTimestep))
        if timestep not in known or isinstance(timestep, bool | float):
            self._refuse("reference_timestep", '"same" or 0')
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                self._check_integer(name, 8, MAX_SIDE)
                if getattr(self, name) % 8:
                    self._refuse(name, "a multiple of 8")

    def _check_integer(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self._refuse(name, f"an integer from {least} to {most}")

    def _check_choice(self, name: str, known: Sequence[str]) -> None:
        if getattr(self, name) not in known:
            raise UserError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(known)}")

    def _check_interval(self) -> None:
        interval = self.guidance_interval
        numbers = isinstance(interval, tuple) and len(interval) == 2
        if not (numbers and all(map(is_number, interval)) and 0 <= interval[0] < interval[1] <= 1):
            self._refuse("guidance_interval", "two rising numbers from 0 to 1")

    def _check_reference_caption(self, caption: str) -> None:
        check_text("reference_caption", caption)
        known = get_args(ReferenceCaption)
        # A slip of the pen must not become the words that the model reads.
        meant = difflib.get_close_matches(caption.lower(), known, n=1, cutoff=0.8)
        if caption not in known and meant:
            raise UserError(f"reference_caption: {caption!r}: did you mean {meant[0]!r}?")

    def _refuse(self, name: str, expected: str) -> None:
        raise UserError(f"{name}: must be {expected}, not {getattr(self, name)!r}")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number; `True` is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_prompts(prompt: str | Sequence[str]) -> list[str]:
    """The prompts as a list.

    Raises:
        UserError: there is none, one is no text, or one holds NUL.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UserError("prompt: none given; give at least one")
    for number, text in enumerate(prompts, start=1):
        check_text(f"prompt {number}", text)
    return prompts


def check_text(name: str, text: Any) -> None:
    """Refuses what is no text, holds NUL or lone surrogates, or is absurdly long.

    Raises:
        UserError: it begins with `name`.
    """
    if not isinstance(text, str):
        raise UserError(f"{name}: must be text, not {type(text).__name__}")
    if "\0" in text:
        raise UserError(f"{name}: holds a NUL character; remove it")
    if len(text) > MAX_TEXT:
        raise UserError(f"{name}: has {len(text)} characters; use at most {MAX_TEXT}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: not valid Unicode at character {error.start}") from None


def check_reference_count(count: int) -> None:
    """Refuses too few and too many references.

    Raises:
        UserError: `count` is not from 1 to `MAX_REFERENCES`.
    """
    if not 1 <= count <= MAX_REFERENCES:
        raise UserError(f"references: give from 1 to {MAX_REFERENCES} pictures, not {count}")


def check_original(image: bool, mask: bool, settings: SamplingSettings) -> None:
    """Refuses a picture to change, a mask and a strength that do not go together.

    Args:
        image: whether there is a picture to change.
        mask: whether there is a mask of what is drawn anew.
        settings: with the strength.

    Raises:
        UserError: nothing of the picture would be left, or there is none.
    """
    if mask and not image:
        raise UserError("mask: says which part of a picture is drawn anew; give image too")
    if settings.strength < 1 and not image:
        raise UserError("strength: says how much of a picture is drawn anew; give image too")
    if image and not mask and settings.strength == 1:
        raise UserError(
            "strength: 1 keeps nothing of the image; use less, or give a mask of what to redraw"
        )
