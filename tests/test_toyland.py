"""Toyland: the seed fixes what it draws, its split leaks nothing, its measures measure."""

from typing import Any, cast

import numpy as np
import pytest

from bootpig_jax.errors import UserError
from bootpig_jax.toyland import measures
from bootpig_jax.toyland.render import SIZE, render, render_reference, render_scene
from bootpig_jax.toyland.world import (
    CATEGORIES,
    MIN_ACCENT_DISTANCE,
    PALETTE,
    PARTS,
    PATTERNS,
    POSITIONS,
    SCENES,
    VOCABULARY,
    Split,
    Subject,
    caption,
    colour_pairs,
    parse_caption,
    sample_subject,
    srgb_to_lab,
)


def test_sizes_of_the_world() -> None:
    assert len(CATEGORIES) >= 12
    assert len(SCENES) == 10
    assert len(POSITIONS) == 3
    subjects = sum(len(colour_pairs(s)) for s in ("train", "held_out")) * len(PATTERNS) * len(PARTS)
    assert subjects > 4000
    assert len(VOCABULARY) < 80
    assert all(name[0] not in "aeiou" for name in CATEGORIES)  # captions say "a"


def test_every_caption_parses_back_and_uses_the_vocabulary() -> None:
    for category in CATEGORIES:
        for position in POSITIONS:
            for scene in SCENES:
                text = caption(category, position, scene)
                assert text == f"A photo of a {category}, {position} {scene}"
                assert parse_caption(text) == (category, position, scene)
                assert set(text.lower().replace(",", " ,").split()) <= set(VOCABULARY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A photo of a dog, on the left in the snow",
        "A photo of a duck on the left in the snow",
        "A photo of a duck, on the left",
        "A photo of a duck, in the snow",
        "A photo of a duck, on the left in the snow ",
        "photo of a duck, on the left in the snow",
    ],
)
def test_other_captions_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="caption"):
        parse_caption(text)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="category"):
        sample_subject(np.random.default_rng(0), "dog")
    with pytest.raises(Exception, match="split"):  # from the type checker, where that is on
        sample_subject(np.random.default_rng(0), "duck", cast(Split, cast(Any, "test")))
    with pytest.raises(UserError, match="scene"):
        caption("duck", "on the left", "on the moon")


def test_held_out_colour_pairs_occur_in_training_in_neither_order() -> None:
    train = {frozenset(pair) for pair in colour_pairs("train")}
    held_out = {frozenset(pair) for pair in colour_pairs("held_out")}
    assert not train & held_out
    assert 0.08 < len(held_out) / len(train | held_out) < 0.2
    assert {name for pair in held_out for name in pair} == set(PALETTE)
    rng = np.random.default_rng(0)
    splits: dict[Split, set[frozenset[str]]] = {"train": train, "held_out": held_out}
    for split, pairs in splits.items():
        for _ in range(200):
            subject = sample_subject(rng, "duck", split)
            assert frozenset((subject.body, subject.accent)) in pairs


def test_accents_differ_clearly_from_bodies() -> None:
    for split in ("train", "held_out"):
        for body, accent in colour_pairs(split):
            lab = srgb_to_lab(np.array([PALETTE[body], PALETTE[accent]]))
            assert np.linalg.norm(lab[0] - lab[1]) >= MIN_ACCENT_DISTANCE


def test_a_rendering_follows_from_its_arguments_and_the_generator() -> None:
    subject = sample_subject(np.random.default_rng(1), "boat")
    first, again, other = (
        render(subject, "at sunset", "on the left", np.random.default_rng(seed))
        for seed in (5, 5, 6)
    )
    assert first.image.shape == (SIZE, SIZE, 3) and first.image.dtype == np.uint8
    assert first.mask.shape == (SIZE, SIZE) and first.mask.dtype == bool
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.mask, again.mask)
    assert (first.image != other.image).any()


@pytest.mark.parametrize("category", CATEGORIES)
def test_subjects_are_large_and_inside_and_where_the_caption_says(category: str) -> None:
    rng = np.random.default_rng(2)
    for i in range(30):
        position = POSITIONS[i % 3]
        subject = sample_subject(rng, category)
        mask = render(subject, SCENES[i % 10], position, rng).mask
        assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        assert 24 <= len(rows) <= 50
        assert 22 <= len(columns) <= 40
        centre = (columns[0] + columns[-1]) / 2
        assert abs(centre - (20, 32, 44)[i % 3]) < 5


def test_the_mask_is_where_the_subject_changed_the_scene() -> None:
    subject = Subject("duck", "scarlet", "cobalt", "half", "hat")
    rendering = render(subject, "in the snow", "in the middle", np.random.default_rng(3))
    # The scene takes the generator's first draws, so this is the same scene without the duck.
    scene = render_scene("in the snow", np.random.default_rng(3))
    changed = (rendering.image != scene).any(-1)
    assert (changed & ~rendering.mask).sum() < 120  # the outline's anti-aliasing
    assert (rendering.mask & ~changed).sum() == 0


@pytest.mark.parametrize("category", CATEGORIES)
def test_body_and_accent_both_show(category: str) -> None:
    for pattern in PATTERNS:
        subject = Subject(category, "scarlet", "cobalt", pattern, "none")
        picture = render_reference(subject).image
        body, accent = (
            (np.abs(picture.astype(int) - PALETTE[name]).max(-1) < 8).sum()
            for name in ("scarlet", "cobalt")
        )
        assert 0.25 < accent / (accent + body) < 0.75, pattern


def test_every_attribute_of_a_subject_shows() -> None:
    base = Subject("mug", "scarlet", "cobalt", "half", "none")
    others = [
        Subject("mug", "lime", "cobalt", "half", "none"),
        Subject("mug", "scarlet", "lime", "half", "none"),
        Subject("mug", "cobalt", "scarlet", "half", "none"),
        *(Subject("mug", "scarlet", "cobalt", p, "none") for p in PATTERNS if p != "half"),
        Subject("mug", "scarlet", "cobalt", "half", "hat"),
    ]
    picture = render_reference(base).image.astype(int)
    for other in others:
        assert (np.abs(render_reference(other).image - picture).max(-1) > 40).sum() > 60, other


def test_cases_are_held_out_and_reproducible() -> None:
    cases = measures.make_cases(seed=4, n=24, num_references=3)
    assert cases[:5] != measures.make_cases(seed=5, n=5)
    pairs = set(colour_pairs("held_out"))
    for case, again in zip(
        cases, measures.make_cases(seed=4, n=30, num_references=3), strict=False
    ):
        assert (case.subject, case.look_alikes, case.caption) == (
            again.subject,
            again.look_alikes,
            again.caption,
        )
        candidates = {case.subject, *case.look_alikes}
        assert len(candidates) == measures.NUM_CANDIDATES
        assert {c.category for c in candidates} == {case.category}
        assert all((c.body, c.accent) in pairs for c in candidates)
        assert parse_caption(case.caption) == (case.category, case.position, case.scene)
        assert len(case.references) == 3
        for reference in case.references:
            assert (reference.image[~reference.mask] > 120).all(-1).mean() > 0.9


@pytest.fixture(scope="module")
def calibration() -> dict[str, measures.Scores]:
    return measures.calibrate(seed=1, n=60)


def test_true_renderings_score_above_95_percent(calibration: dict[str, measures.Scores]) -> None:
    scores = calibration["true renderings"]
    assert scores.subject_at_16 > 0.95
    assert scores.scene_at_10 > 0.98
    assert scores.subject_rank < 1.1


def test_blur_and_compression_are_tolerated(calibration: dict[str, measures.Scores]) -> None:
    for name in ("the same, blurred (1.2 px)", "the same, JPEG quality 50"):
        assert calibration[name].subject_at_16 > 0.85
        assert calibration[name].scene_at_10 > 0.85


def test_wrong_subjects_score_chance(calibration: dict[str, measures.Scores]) -> None:
    for name in ("a random training subject", "a random held-out subject"):
        assert calibration[name].subject_at_16 < 0.16  # 1/16 and three standard errors
        assert 7 < calibration[name].subject_rank < 10


def test_a_missing_subject_never_counts(calibration: dict[str, measures.Scores]) -> None:
    assert calibration["the scene without a subject"].subject_at_16 <= 0.02


def test_the_wrong_scene_never_counts() -> None:
    cases = measures.make_cases(seed=6, n=10)
    rng = np.random.default_rng(6)
    wrong = [SCENES[(SCENES.index(case.scene) + 1) % len(SCENES)] for case in cases]
    pictures = np.stack(
        [render(c.subject, s, c.position, rng).image for c, s in zip(cases, wrong, strict=True)]
    )
    assert measures.score(pictures, cases).scene_at_10 == 0


def test_the_descriptor_is_the_same_in_a_mirror() -> None:
    white = srgb_to_lab(np.full(3, 255))
    picture = render_reference(Subject("duck", "scarlet", "cobalt", "column", "hat")).image
    mirrored = np.ascontiguousarray(picture[:, ::-1])
    straight, flipped = (measures.descriptor(p, white) for p in (picture, mirrored))
    assert straight is not None and flipped is not None
    np.testing.assert_allclose(straight, flipped, atol=1e-3)


def test_pictures_that_do_not_match_the_cases_are_refused() -> None:
    cases = measures.make_cases(seed=7, n=2)
    for pictures in (
        np.zeros((3, SIZE, SIZE, 3), np.uint8),
        np.zeros((2, SIZE, SIZE, 3), np.float32),
        np.zeros((2, 32, 32, 3), np.uint8),
    ):
        with pytest.raises(UserError, match="pictures"):
            measures.score(pictures, cases)
    with pytest.raises(UserError, match="pictures"):
        measures.score(np.zeros((0, SIZE, SIZE, 3), np.uint8), [])
