"""What exists in Toyland: categories, scenes, positions, and subjects that words cannot name.

A caption names the category, the position and the scene. A *subject* is one individual of a
category: a body colour, an accent colour, a pattern and a part, none of which has a word. So a
picture of a particular subject can only be drawn from a reference, never from the caption, which
is what makes subject-driven generation measurable here.

Subjects are split by their *unordered pair of colours*: the pairs that are held out occur on no
training subject of any category, in neither order. Every pattern looks the same in a mirror, so
that flipping a reference (an augmentation) leaves the subject the same.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Literal

import cv2
import numpy as np

from bootpig_jax.errors import UserError

Split = Literal["train", "held_out"]

CATEGORIES: tuple[str, ...] = (
    "ball",
    "boat",
    "car",
    "duck",
    "fish",
    "heart",
    "house",
    "mug",
    "mushroom",
    "robot",
    "rocket",
    "star",
)

POSITIONS: tuple[str, ...] = ("on the left", "in the middle", "on the right")

SCENES: tuple[str, ...] = (
    "on a sandy beach",
    "in the snow",
    "in a green meadow",
    "under the night sky",
    "in a kitchen",
    "at sunset",
    "under water",
    "in a forest",
    "on a stage",
    "on a city street",
)

# Chosen by farthest-point sampling in CIELAB among colours of chroma > 48 that keep 30 units of
# distance from every scene's colours; any two of them are at least 35 units apart.
PALETTE: dict[str, tuple[int, int, int]] = {
    "aqua": (0, 240, 225),
    "sky": (0, 165, 240),
    "cobalt": (30, 90, 225),
    "lavender": (150, 135, 225),
    "indigo": (90, 0, 255),
    "purple": (150, 0, 165),
    "orchid": (255, 135, 255),
    "magenta": (255, 0, 255),
    "plum": (150, 45, 105),
    "cerise": (255, 0, 165),
    "rose": (255, 135, 180),
    "crimson": (255, 0, 90),
    "salmon": (255, 150, 120),
    "scarlet": (255, 45, 0),
    "rust": (165, 45, 15),
    "orange": (255, 150, 0),
    "apricot": (255, 210, 120),
    "bronze": (120, 90, 0),
    "yellow": (255, 225, 0),
    "lime": (165, 240, 0),
    "moss": (150, 195, 75),
    "green": (0, 255, 0),
    "forest": (0, 105, 45),
    "mint": (0, 255, 150),
}

PATTERNS: tuple[str, ...] = ("band", "half", "stripes", "column", "dot")
PARTS: tuple[str, ...] = ("none", "hat")

# Body and accent must be told apart at a glance, also after a small network has blurred them.
MIN_ACCENT_DISTANCE = 60.0
_HELD_OUT_ONE_IN = 8

_PREFIX = "A photo of a "


@dataclass(frozen=True)
class Subject:
    """One individual: what a caption says of it (`category`) and what it cannot say (the rest).

    Attributes:
        category: One of `CATEGORIES`.
        body: A key of `PALETTE`.
        accent: A key of `PALETTE`, at least `MIN_ACCENT_DISTANCE` CIELAB units from `body`.
        pattern: One of `PATTERNS`; the shape of the accent-coloured region on the body.
        part: One of `PARTS`; an extra in the accent colour.
    """

    category: str
    body: str
    accent: str
    pattern: str
    part: str


def srgb_to_lab(colours: np.ndarray) -> np.ndarray:
    """Convert sRGB in [0, 255], shape [..., 3], to CIELAB (D65), float32, same shape."""
    scaled = np.asarray(colours, np.float32) / 255.0
    flat = np.ascontiguousarray(scaled.reshape(1, -1, 3))
    return cv2.cvtColor(flat, cv2.COLOR_RGB2LAB).reshape(scaled.shape)


def is_held_out(body: str, accent: str) -> bool:
    """Whether a pair of colours, in either order, is kept away from all training subjects."""
    key = "-".join(sorted((body, accent))).encode()
    return hashlib.sha256(key).digest()[0] % _HELD_OUT_ONE_IN == 0


@cache
def colour_pairs(split: Split) -> tuple[tuple[str, str], ...]:
    """All ordered (body, accent) pairs of a split, in a fixed order."""
    if split not in ("train", "held_out"):
        raise UserError(f"split: must be 'train' or 'held_out', not {split!r}")
    lab = {name: srgb_to_lab(np.asarray(rgb)) for name, rgb in PALETTE.items()}
    return tuple(
        (body, accent)
        for body, accent in permutations(PALETTE, 2)
        if np.linalg.norm(lab[body] - lab[accent]) >= MIN_ACCENT_DISTANCE
        and is_held_out(body, accent) == (split == "held_out")
    )


def sample_subject(rng: np.random.Generator, category: str, split: Split = "train") -> Subject:
    """Draw a subject of `category`, uniformly over colour pairs, patterns and parts."""
    if category not in CATEGORIES:
        raise UserError(f"category: {category!r} is not one of {', '.join(CATEGORIES)}")
    pairs = colour_pairs(split)
    body, accent = pairs[rng.integers(len(pairs))]
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    part = PARTS[rng.integers(len(PARTS))]
    return Subject(category, body, accent, pattern, part)


def caption(category: str, position: str, scene: str) -> str:
    """The paper's form of caption: `A photo of a [object], [object positioning] [scene]`."""
    for field, value, known in (
        ("category", category, CATEGORIES),
        ("position", position, POSITIONS),
        ("scene", scene, SCENES),
    ):
        if value not in known:
            raise UserError(f"{field}: {value!r} is not one of {', '.join(known)}")
    return f"{_PREFIX}{category}, {position} {scene}"


def parse_caption(text: str) -> tuple[str, str, str]:
    """Invert `caption`: return (category, position, scene), or raise `UserError`."""
    head, comma, tail = text.partition(", ")
    if comma and head.startswith(_PREFIX) and head.removeprefix(_PREFIX) in CATEGORIES:
        for position in POSITIONS:
            scene = tail.removeprefix(position + " ")
            if scene != tail and scene in SCENES:
                return head.removeprefix(_PREFIX), position, scene
    raise UserError(
        f"caption: {text!r} is not of the form 'A photo of a [object], [position] [scene]' "
        "in Toyland's words"
    )


# Every word a caption can hold, lower case, plus the comma; the tokenizer is built from it.
VOCABULARY: tuple[str, ...] = tuple(
    sorted({w for t in (_PREFIX, *CATEGORIES, *POSITIONS, *SCENES) for w in t.lower().split()})
) + (",",)
