"""Is the drawn subject the reference's, and the scene the caption's? Fixed, nothing learnt.

*scene@10*: the share of pictures whose nearest scene, among the ten, is the caption's. Distance to
a scene is the CIELAB distance to the scene's mean rendering, cut off at `_SCENE_CAP` and averaged
over the picture. The cut-off makes a subject cost the same for every scene, wherever it stands.
Chance: 10 %.

*subject@16*: the share of pictures whose subject is nearest to its own reference among 16 held-out
subjects of its category, the 15 others drawn at random. Chance: 1/16 = 6.25 %. The mean rank of
the own reference (1 is best, chance 8.5) says more when few pictures are scored.

The descriptor behind subject@16:

1. Foreground weight of a pixel: a ramp in its CIELAB distance from the background (the mean
   rendering of the caption's scene; white for a reference), times a ramp in its chroma. Subjects
   are vivid and scenes are pale; eyes, wheels and windows are neutral and the same on all subjects
   of a category, so nothing is lost by leaving them out.
2. A soft colour histogram p(c) over 5 x 5 x 5 CIELAB bins (each pixel shared linearly between its
   neighbouring bins, so that blur and compression move it little), and the joint histogram p(c, z)
   with z one of 4 x 2 soft zones: height, and distance from the vertical axis, both relative to
   the foreground's own centre and spread. A mirrored picture has the same descriptor.
3. Distance: Euclidean between the square roots, i.e. Hellinger distances with equal weight:
   D^2 = 1/2 |sqrt p(c) - sqrt q(c)|^2 + 1/2 |sqrt p(c, z) - sqrt q(c, z)|^2.

A picture with almost no foreground gets the last rank. `python -m bootpig_jax.toyland.measures`
prints what true renderings, damaged ones, and wrong subjects score.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.evaluation.metrics import gallery_rank
from bootpig_jax.toyland.render import (
    SIZE,
    Rendering,
    render,
    render_reference,
    render_scene,
)
from bootpig_jax.toyland.world import (
    CATEGORIES,
    POSITIONS,
    SCENES,
    Subject,
    caption,
    colour_pairs,
    sample_subject,
    srgb_to_lab,
)

NUM_CANDIDATES = 16  # the own reference and 15 look-alikes

_SCENE_CAP = 30.0  # CIELAB units
_SCENE_SAMPLES = 64
_DISTANCE_RAMP = (15.0, 35.0)  # CIELAB units from the background
_CHROMA_RAMP = (20.0, 35.0)
_MIN_FOREGROUND = 20.0  # summed weight, pixels; a subject's is 400 or more
# Bin centres along L, a and b: 5 each, over what sRGB can reach.
_LAB_CENTRES = np.linspace((0, -100, -110), (100, 100, 100), 5, dtype=np.float32).T
# Zone centres in standard deviations of the foreground from its centre: heights, and |x|.
_ZONE_Y = np.array([-1.2, -0.4, 0.4, 1.2], np.float32)
_ZONE_X = np.array([0.4, 1.3], np.float32)

Picture = UInt8[np.ndarray, "64 64 3"]


@dataclass(frozen=True)
class Case:
    """One thing to draw, and what to compare the drawing with.

    Attributes:
        subject: The held-out subject that the references show.
        look_alikes: 15 other held-out subjects of the same category.
        scene: One of `SCENES`.
        position: One of `POSITIONS`.
        references: Pictures of the subject cut out on white (as the model is given them), with
            masks. The first is the standard one; further ones vary in size.
    """

    subject: Subject
    look_alikes: tuple[Subject, ...]
    scene: str
    position: str
    references: tuple[Rendering, ...]

    @property
    def category(self) -> str:
        """The word for the subject."""
        return self.subject.category

    @property
    def caption(self) -> str:
        """The caption to draw from, in the paper's form."""
        return caption(self.category, self.position, self.scene)


@dataclass(frozen=True)
class Scores:
    """What `score` found, case by case.

    Attributes:
        ranks: Rank of the own reference among the 16 candidates, 1 to 16; ties count against it.
        scenes: Index into `SCENES` of the nearest scene.
        scene_correct: Whether that is the caption's.
    """

    ranks: Int[np.ndarray, " n"]
    scenes: Int[np.ndarray, " n"]
    scene_correct: Bool[np.ndarray, " n"]

    @property
    def subject_at_16(self) -> float:
        """Share of pictures whose own reference is nearest; chance 1/16."""
        return float((self.ranks == 1).mean())

    @property
    def subject_rank(self) -> float:
        """Mean rank of the own reference; chance 8.5, best 1."""
        return float(self.ranks.mean())

    @property
    def scene_at_10(self) -> float:
        """Share of pictures whose nearest scene is the caption's; chance 1/10."""
        return float(self.scene_correct.mean())


def make_cases(seed: int, n: int, num_references: int = 1) -> list[Case]:
    """Make `n` cases of held-out subjects; the first m of them do not depend on `n`."""
    if n < 1 or num_references < 1:
        raise UserError("n, num_references: must be at least 1")
    return [_make_case(seed, i, num_references) for i in range(n)]


def _make_case(seed: int, index: int, num_references: int) -> Case:
    rng = np.random.default_rng([seed, index])
    category = CATEGORIES[index % len(CATEGORIES)]
    scene = SCENES[rng.integers(len(SCENES))]
    position = POSITIONS[rng.integers(len(POSITIONS))]
    subjects: list[Subject] = []
    while len(subjects) < NUM_CANDIDATES:
        subject = sample_subject(rng, category, "held_out")
        if subject not in subjects:
            subjects.append(subject)
    sizes = rng.uniform(34.0, 46.0, num_references - 1)
    references = (
        render_reference(subjects[0]),
        *(render_reference(subjects[0], height) for height in sizes),
    )
    return Case(subjects[0], tuple(subjects[1:]), scene, position, references)


# ---------------------------------------------------------------- scenes


@cache
def _scene_means() -> Float32[np.ndarray, "10 64 64 3"]:
    """Each scene's mean rendering without a subject, in CIELAB."""
    rng = np.random.default_rng(0)
    means = [
        np.mean([render_scene(scene, rng) for _ in range(_SCENE_SAMPLES)], axis=0)
        for scene in SCENES
    ]
    return srgb_to_lab(np.stack(means))


def nearest_scene(picture: Picture) -> int:
    """Index into `SCENES` of the scene whose mean rendering is nearest."""
    distances = np.linalg.norm(srgb_to_lab(picture) - _scene_means(), axis=-1)
    return int(np.minimum(distances, _SCENE_CAP).mean(axis=(1, 2)).argmin())


# ---------------------------------------------------------------- subjects


def _ramp(values: np.ndarray, low_high: tuple[float, float]) -> np.ndarray:
    low, high = low_high
    return np.clip((values - low) / (high - low), 0, 1)


def _share(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Share each value linearly between the two nearest of evenly spaced centres: [p] -> [k, p]."""
    step = centres[1] - centres[0]
    clipped = np.clip(values, centres[0], centres[-1])
    return np.maximum(0, 1 - np.abs(clipped - centres[:, None]) / step)


def descriptor(
    picture: Picture, background: Float32[np.ndarray, "*_"]
) -> Float32[np.ndarray, "1125"] | None:
    """The subject's descriptor (see the module), of unit length.

    Args:
        picture: The picture, sRGB.
        background: What it would be without the subject, in CIELAB, broadcastable to [64, 64, 3].

    Returns:
        The square roots of p(c) and p(c, z), or None where there is almost no foreground.
    """
    lab = srgb_to_lab(picture)
    weight = _ramp(np.linalg.norm(lab - background, axis=-1), _DISTANCE_RAMP)
    weight = weight * _ramp(np.hypot(lab[..., 1], lab[..., 2]), _CHROMA_RAMP)
    if weight.sum() < _MIN_FOREGROUND:
        return None
    y, x = np.nonzero(weight)
    p = (weight[y, x] / weight.sum()).astype(np.float32)
    colour = lab[y, x]
    lightness, a, b = (_share(colour[:, i], _LAB_CENTRES[i]) for i in range(3))
    colours = (lightness[:, None, None] * a[:, None] * b).reshape(-1, len(p))
    rows = _share(_standardise(y, p), _ZONE_Y)
    columns = _share(np.abs(_standardise(x, p)), _ZONE_X)
    zones = (rows[:, None] * columns * p).reshape(-1, len(p))
    joint = np.einsum("cp,zp->cz", colours, zones)  # not `@`: too small to be worth BLAS's threads
    return np.sqrt(0.5 * np.concatenate([joint.sum(axis=1), joint.ravel()]))


def _standardise(values: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Centre and scale to unit spread under the weights `p`."""
    values = values.astype(np.float32)
    centred = values - (p * values).sum()
    return centred / max(float(np.sqrt((p * centred**2).sum())), 1e-6)


@cache
def _reference_descriptor(subject: Subject) -> np.ndarray:
    white = srgb_to_lab(np.full(3, 255))
    found = descriptor(render_reference(subject).image, white)
    if found is None:
        raise ValueError(f"{subject} is invisible on white")
    return found


def subject_rank(
    picture: Picture, case: Case, mask: Bool[np.ndarray, "64 64"] | None = None
) -> int:
    """Rank (1 to 16) of the own reference by distance to the picture's subject.

    Args:
        picture: The picture, sRGB.
        case: What it should show.
        mask: Where to look for the subject; everywhere when None.
    """
    background = _scene_means()[SCENES.index(case.scene)]
    if mask is not None:
        background = np.where(mask[..., None], background, srgb_to_lab(picture))
    drawn = descriptor(picture, background)
    if drawn is None:
        return NUM_CANDIDATES
    candidates = np.stack([_reference_descriptor(s) for s in (case.subject, *case.look_alikes)])
    return gallery_rank(drawn, candidates)


def score(pictures: np.ndarray, cases: Sequence[Case]) -> Scores:
    """Score pictures, uint8 [n, 64, 64, 3], one for each of the n cases.

    Raises:
        UserError: The pictures' shape or type is wrong, or their number is not that of the cases.
    """
    pictures = np.asarray(pictures)
    expected = (len(cases), SIZE, SIZE, 3)
    if not cases or pictures.shape != expected or pictures.dtype != np.uint8:
        raise UserError(
            f"pictures: need uint8 {list(expected)}, one for each of one or more cases, "
            f"not {pictures.dtype} {list(pictures.shape)}"
        )
    pairs = list(zip(pictures, cases, strict=True))
    scenes = np.array([nearest_scene(picture) for picture, _ in pairs])
    truth = np.array([SCENES.index(case.scene) for case in cases])
    ranks = np.array([subject_rank(picture, case) for picture, case in pairs])
    return Scores(ranks=ranks, scenes=scenes, scene_correct=scenes == truth)


# ---------------------------------------------------------------- calibration


def blurred(picture: Picture) -> Picture:
    """The picture after a Gaussian blur of 1.2 pixels."""
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), 1.2), np.uint8)


def compressed(picture: Picture) -> Picture:
    """The picture after JPEG at quality 50."""
    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 50])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


def _repainted(subject: Subject, rng: np.random.Generator) -> Subject:
    """A subject with the same two colours, its pattern and part drawn at random."""
    other = sample_subject(rng, subject.category, "held_out")
    return Subject(subject.category, subject.body, subject.accent, other.pattern, other.part)


def calibrate(seed: int, n: int) -> dict[str, Scores]:
    """Score true renderings, damaged ones, and renderings of wrong subjects, `n` of each."""
    cases = make_cases(seed, n)
    rng = np.random.default_rng([seed, n])

    def draw(choose: Callable[[Case], Subject]) -> np.ndarray:
        return np.stack([render(choose(c), c.scene, c.position, rng).image for c in cases])

    true = draw(lambda case: case.subject)
    rows = {
        "true renderings": true,
        "the same, blurred (1.2 px)": np.stack([blurred(picture) for picture in true]),
        "the same, JPEG quality 50": np.stack([compressed(picture) for picture in true]),
        "right colours, random pattern and part": draw(lambda c: _repainted(c.subject, rng)),
        "a random training subject": draw(lambda c: sample_subject(rng, c.category, "train")),
        "a random held-out subject": draw(lambda c: sample_subject(rng, c.category, "held_out")),
        "the scene without a subject": np.stack([render_scene(c.scene, rng) for c in cases]),
    }
    return {name: score(pictures, cases) for name, pictures in rows.items()}


def main() -> None:
    """Print the calibration table."""
    parser = argparse.ArgumentParser(description="Calibrate Toyland's two measures.")
    parser.add_argument("--count", type=int, default=1000, help="cases (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.count < 1 or arguments.seed < 0:
        raise UserError("--count must be at least 1 and --seed at least 0")
    table = calibrate(arguments.seed, arguments.count)
    print(f"{'':40}subject@16  mean rank  scene@10")
    print(f"{'chance':40}{1 / NUM_CANDIDATES:10.1%} {8.5:10.2f} {1 / len(SCENES):9.1%}")
    for name, s in table.items():
        print(f"{name:40}{s.subject_at_16:10.1%} {s.subject_rank:10.2f} {s.scene_at_10:9.1%}")
    print(
        f"{arguments.count} cases; {len(colour_pairs('held_out'))} of "
        f"{len(colour_pairs('held_out')) + len(colour_pairs('train'))} colour pairs are held out"
    )


if __name__ == "__main__":
    run_cli(main)
