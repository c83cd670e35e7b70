"""The input pipeline: exact resume, disjoint processes, and what augmentation may do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import grain
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from bootpig_jax.data import augment, pipeline, records
from bootpig_jax.data.pipeline import Batch, make_loader
from bootpig_jax.errors import UserError

COUNTS = (4, 3, 6)
NUM_RECORDS = sum(COUNTS)
SIZE = 32


def make_picture(index: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """A green picture with a red and blue subject that is no mirror image of itself; its mask."""
    picture = np.full((size, size, 3), (0, 160, 0), np.uint8)
    mask = np.zeros((size, size), bool)
    y, x = 2 + index % 7, 3 + index % 5
    mask[y : y + 16, x : x + 12] = True
    mask[y : y + 4, x : x + 6] = False
    picture[mask] = (200, 20, 40)
    picture[y + 8 : y + 12, x + 2 : x + 6] = (20, 40, 200)
    return picture, mask


def make_record(index: int, **changes: Any) -> records.Record:
    picture, mask = make_picture(index)
    values: dict[str, Any] = {
        "target": records.encode_picture(picture),
        "mask": records.encode_mask(mask),
        "caption": f"A photo of a thing, at {'far ' * (index % 3)}place {index}",
        "object": "thing",
        "seed": index,
        "id": f"{index:08d}",
        "box": records.bounding_box(mask),
        "score": 1.0,
    }
    return records.Record(**{**values, **changes})


def write_dataset(folder: Path, *shards: list[records.Record]) -> Path:
    for index, shard in enumerate(shards):
        records.write_shard(folder / records.shard_name("toy", "train", index, len(shards)), shard)
    records.write_dataset_metadata(folder, "toy", {"train": [len(shard) for shard in shards]})
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    starts = np.cumsum((0, *COUNTS))
    return write_dataset(
        tmp_path_factory.mktemp("data"),
        *[
            [make_record(int(i)) for i in range(a, b)]
            for a, b in zip(starts[:-1], starts[1:], strict=True)
        ],
    )


def loader(dataset: Path, **changes: Any) -> grain.DatasetIterator[Batch]:
    options: dict[str, Any] = {
        "batch_size": 4,
        "image_size": SIZE,
        "seed": 5,
        "num_threads": 0,
        **changes,
    }
    return make_loader(dataset, **options)


def take(iterator: grain.DatasetIterator[Batch], count: int) -> list[Batch]:
    return [next(iterator) for _ in range(count)]


def assert_equal(a: Sequence[Mapping], b: Sequence[Mapping]) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])


# --- batches


def test_batches_hold_what_was_stored(dataset: Path) -> None:
    for batch in take(loader(dataset, augmentation="none"), 5):
        for key in ("target", "reference"):
            assert batch[key].shape == (4, SIZE, SIZE, 3)
            assert batch[key].dtype == np.uint8
        for row, identity in enumerate(batch["id"]):
            index = int(identity)
            stored = make_record(index)
            assert batch["caption"][row] == stored.caption
            assert batch["object"][row] == stored.object
            picture, mask = records.decode_picture(stored.target), make_picture(index)[1]
            expected = np.where(mask[..., None], picture, 255)
            np.testing.assert_array_equal(batch["target"][row], picture)
            np.testing.assert_array_equal(batch["reference"][row], expected)


def test_every_epoch_holds_every_sample_once_in_a_new_order(dataset: Path) -> None:
    ids = np.concatenate([b["id"] for b in take(loader(dataset), NUM_RECORDS)])
    epochs = ids.reshape(4, NUM_RECORDS)
    for epoch in epochs:
        assert sorted(epoch) == [f"{i:08d}" for i in range(NUM_RECORDS)]
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_every_epoch_augments_anew(dataset: Path) -> None:
    batches = take(loader(dataset, batch_size=NUM_RECORDS), 3)
    versions = [
        batch["reference"][list(batch["id"]).index("00000003")].tobytes() for batch in batches
    ]
    assert len(set(versions)) == 3


def test_the_seed_decides_everything(dataset: Path) -> None:
    first = take(loader(dataset), 4)
    assert_equal(first, take(loader(dataset), 4))
    other = take(loader(dataset, seed=6), 4)
    assert any(np.any(a["id"] != b["id"]) for a, b in zip(first, other, strict=True))


def test_larger_pictures_are_reduced(dataset: Path) -> None:
    (batch,) = take(loader(dataset, image_size=16), 1)
    assert batch["target"].shape == batch["reference"].shape == (4, 16, 16, 3)


def test_first_examples_are_unaugmented_and_in_order(dataset: Path) -> None:
    batch = pipeline.first_examples(dataset, count=6, image_size=SIZE)
    assert list(batch["id"]) == [f"{i:08d}" for i in range(6)]
    subject = make_picture(2)[1]
    assert np.all(batch["reference"][2][~subject] == 255)
    assert len(pipeline.first_examples(dataset, count=99, image_size=SIZE)["id"]) == NUM_RECORDS


def test_every_copy_of_every_row_is_augmented_in_its_own_way(tmp_path: Path) -> None:
    """... which depends on nothing but the seed, the row and the copy's number."""
    write_dataset(tmp_path, [make_record(0, id=str(row)) for row in range(3)])
    source = pipeline.RecordSource(tmp_path, "train")

    def references(rows: list[int], copies: int, seed: int = 0) -> list[list[bytes]]:
        how: dict[str, Any] = {"image_size": SIZE, "augmentation": "paper"}
        batches = pipeline.read_copies(source, rows, copies=copies, seed=seed, **how)
        return [[row.tobytes() for row in batch["reference"]] for batch in batches]

    both = references([0, 1, 2], copies=2)
    assert len({one for copy in both for one in copy}) == 6
    assert references([1], copies=1) == [[both[0][1]]]
    assert references([0, 1, 2], copies=2, seed=1) != both


# --- resuming and sharing


@pytest.fixture(scope="module")
def uninterrupted(dataset: Path) -> list[Batch]:
    return take(loader(dataset, batch_size=1), 120)


@pytest.mark.promise("R6", "data: the next 100 batches after resuming, with 0, 2, 4 threads")
@pytest.mark.parametrize("num_threads", [0, 2, 4])
def test_resume_gives_the_next_100_batches(
    dataset: Path, uninterrupted: list[Batch], num_threads: int
) -> None:
    running = loader(dataset, batch_size=1, num_threads=num_threads)
    for step in range(20):
        assert_equal(take(running, 1), uninterrupted[step : step + 1])
        resumed = loader(dataset, batch_size=1, num_threads=num_threads)
        resumed.set_state(running.get_state())
        horizon = 100 if step == 19 else 3
        assert_equal(take(resumed, horizon), uninterrupted[step + 1 :][:horizon])


def test_state_moves_between_thread_counts_and_backwards(dataset: Path) -> None:
    expected = take(loader(dataset), 12)
    threaded = loader(dataset, num_threads=4)
    take(threaded, 5)
    single = loader(dataset, num_threads=0)
    single.set_state(threaded.get_state())
    assert_equal(take(single, 7), expected[5:])
    state = single.get_state()
    threaded.set_state(loader(dataset).get_state())
    assert_equal(take(threaded, 12), expected)
    assert threaded.get_state() == state


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_partition_the_stream(dataset: Path, process_count: int) -> None:
    """The same global batches, row by row, for any number of processes."""
    per_process = 4 // process_count
    whole = take(loader(dataset), 8)
    parts: list[Sequence[Mapping]] = [
        take(
            loader(
                dataset,
                batch_size=per_process,
                process_index=index,
                process_count=process_count,
            ),
            8,
        )
        for index in range(process_count)
    ]
    for step, batch in enumerate(whole):
        for key, values in batch.items():
            joined = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(joined, values)


def test_processes_draw_different_augmentations(tmp_path: Path) -> None:
    """With one record only, equal generators would give equal references."""
    write_dataset(tmp_path, [make_record(0)])
    a, b = (
        take(loader(tmp_path, process_index=index, process_count=2), 1)[0]["reference"]
        for index in range(2)
    )
    assert not np.array_equal(a, b)


def test_a_process_outside_the_count_is_a_defect(dataset: Path) -> None:
    for wrong in ({"process_index": 2, "process_count": 2}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="process"):
            loader(dataset, **wrong)


def test_fingerprint_follows_the_shards(dataset: Path, tmp_path: Path) -> None:
    assert pipeline.num_records(dataset) == NUM_RECORDS
    shards = [[make_record(i)] for i in range(2)]
    fingerprint = pipeline.dataset_fingerprint(write_dataset(tmp_path, *shards))
    assert fingerprint == pipeline.dataset_fingerprint(write_dataset(tmp_path, *shards))
    shards[1][0] = make_record(1, caption="longer by a word")
    assert fingerprint != pipeline.dataset_fingerprint(write_dataset(tmp_path, *shards))


# --- bad data


@pytest.mark.parametrize("num_threads", [0, 2])
def test_damage_is_named_with_file_and_offset(tmp_path: Path, num_threads: int) -> None:
    write_dataset(tmp_path, [make_record(i) for i in range(4)])
    (path,) = records.read_split(tmp_path).paths
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"^{path}: damaged at byte 12: .* record 0 "):
        take(loader(tmp_path, num_threads=num_threads), 2)


def test_a_cut_shard_is_found_before_the_first_batch(tmp_path: Path) -> None:
    write_dataset(tmp_path, [make_record(i) for i in range(4)])
    (path,) = records.read_split(tmp_path).paths
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"^{path}: damaged at byte .* ends inside record 3"):
        loader(tmp_path)


def test_no_dataset_is_named(tmp_path: Path) -> None:
    for call in (loader, pipeline.num_records, pipeline.dataset_fingerprint):
        with pytest.raises(UserError, match=f"^{tmp_path}/dataset_info.json: cannot read"):
            call(tmp_path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"target": b"no picture"}, "feature 'target' is not a picture"),
        ({"mask": b"no picture"}, "feature 'mask' is not a 1-bit"),
        (
            {"target": records.encode_picture(np.zeros((SIZE, 40, 3), np.uint8))},
            "feature 'mask' is 32x32 pixels, the target 40x32",
        ),
        (
            {
                "target": records.encode_picture(np.zeros((SIZE, 40, 3), np.uint8)),
                "mask": records.encode_mask(np.ones((SIZE, 40), bool)),
            },
            "feature 'target' is 40x32, not square",
        ),
        (
            {
                "target": records.encode_picture(np.zeros((16, 16, 3), np.uint8)),
                "mask": records.encode_mask(np.ones((16, 16), bool)),
            },
            "less than image_size 32; set image_size to 16",
        ),
        ({"mask": records.encode_mask(np.zeros((SIZE, SIZE), bool))}, "feature 'mask' is empty"),
    ],
)
def test_unusable_records_are_named(tmp_path: Path, changes: dict, complaint: str) -> None:
    write_dataset(tmp_path, [make_record(0)], [make_record(1), make_record(2, **changes)])
    path = records.read_split(tmp_path).paths[1]
    with pytest.raises(UserError, match=f"^{path}, record 1: .*{complaint}"):
        take(loader(tmp_path), 2)


# --- augmentation


def _references(kind: augment.AugmentationKind, count: int = 200) -> list[np.ndarray]:
    picture, mask = make_picture(0)
    return [
        augment.build_reference(picture, mask, np.random.default_rng(i), size=48, kind=kind)
        for i in range(count)
    ]


def _subject_box(reference: np.ndarray) -> Sequence[int]:
    return cv2.boundingRect((reference.min(axis=-1) < 250).astype(np.uint8))


@pytest.mark.parametrize("kind", ["none", "paper", "release"])
def test_augmentation_is_pure(kind: augment.AugmentationKind) -> None:
    picture, mask = make_picture(0)
    before = picture.copy(), mask.copy()
    for _ in range(2):
        first, second = (
            augment.build_reference(picture, mask, np.random.default_rng(7), size=SIZE, kind=kind)
            for _ in range(2)
        )
        np.testing.assert_array_equal(first, second)
        assert first.shape == (SIZE, SIZE, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(picture, before[0])
    np.testing.assert_array_equal(mask, before[1])


def test_no_background_leaks_into_a_reference() -> None:
    """The background is green; on the subject red or blue exceeds green, on white all are equal."""
    for reference in _references("paper") + _references("none", 1):
        r, g, b = np.moveaxis(reference.astype(int), -1, 0)
        assert np.all(g <= np.maximum(r, b) + 1)


def test_paper_varies_size_place_and_side_and_keeps_the_subject_whole() -> None:
    boxes = np.asarray([_subject_box(reference) for reference in _references("paper")])
    x, y, width, height = boxes.T
    longest = np.maximum(width, height)
    assert 0.45 * 48 - 1 <= longest.min() < 0.5 * 48 and 0.9 * 48 < longest.max() <= 0.95 * 48 + 1
    np.testing.assert_allclose(width / height, 12 / 16, rtol=0.06)
    slack_x, slack_y = 48 - width, 48 - height
    assert 0.4 < np.mean(x / slack_x) < 0.6 and 0.4 < np.mean(y / slack_y) < 0.6
    assert np.min(x / slack_x) < 0.1 and np.max(x / slack_x) > 0.9
    flipped = [
        # The subject's upper left corner is cut away: after a flip, its upper right.
        np.all(reference[y0, x0] > 250)
        for reference, (x0, y0, _, _) in zip(_references("paper"), boxes, strict=True)
    ]
    assert 0.4 < np.mean(flipped) < 0.6


def test_every_place_where_the_subject_fits_is_taken() -> None:
    subject = np.zeros((7, 8, 3), np.uint8)
    places = set()
    for seed in range(200):
        canvas = augment.place(subject, np.random.default_rng(seed), size=10)
        places.add(tuple(np.argwhere(canvas[..., 0] == 0)[0]))
    assert places == {(y, x) for y in range(4) for x in range(3)}


def test_smaller_pictures_are_means_and_larger_ones_do_not_overshoot() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    means = picture.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    edge = np.full((8, 8, 3), 50, np.uint8)
    edge[:, 4:] = 200
    for resize in (augment.resize_square, augment.resize_longest):
        assert np.abs(resize(picture, 8) - means).max() <= 0.51
        larger = resize(edge, 20)
        assert larger.min() == 50 and larger.max() == 200


def test_release_fills_the_canvas() -> None:
    whole = augment.Augmentation(scale=augment.RELEASE.scale)
    picture, mask = make_picture(0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        reference = augment.augment_reference(picture, mask, rng, size=48, how=whole)
        _, y, width, height = _subject_box(reference)
        assert (y, height) == (0, 48) and width == 36


def test_an_unscaled_subject_keeps_its_pixels() -> None:
    picture, mask = make_picture(0)
    same_size = augment.Augmentation(scale=(16 / SIZE, 16 / SIZE), flip_probability=0.0)
    reference = augment.augment_reference(
        picture, mask, np.random.default_rng(0), size=SIZE, how=same_size
    )
    x, y, width, height = cv2.boundingRect((reference.min(axis=-1) < 255).astype(np.uint8))
    found = reference[y : y + height, x : x + width]
    np.testing.assert_array_equal(
        found, augment.cut_out(picture, mask)[augment.bounding_slices(mask)]
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, SIZE), (SIZE, 1)])
def test_thin_subjects_survive(shape: tuple[int, int]) -> None:
    picture, mask = make_picture(0)[0], np.zeros((SIZE, SIZE), bool)
    mask[: shape[0], : shape[1]] = True
    for kind in ("none", "paper", "release"):
        reference = augment.build_reference(
            picture, mask, np.random.default_rng(0), size=SIZE, kind=kind
        )
        assert reference.min() < 250


def test_an_empty_mask_is_a_defect() -> None:
    with pytest.raises(ValueError, match="empty"):
        augment.build_reference(
            make_picture(0)[0],
            np.zeros((SIZE, SIZE), bool),
            np.random.default_rng(0),
            size=SIZE,
            kind="paper",
        )


def test_erasing_is_white_and_of_2_to_25_percent() -> None:
    black = np.zeros((64, 64, 3), np.uint8)
    shares = []
    for seed in range(200):
        erased = augment.erase(black, np.random.default_rng(seed))
        assert set(np.unique(erased)) == {0, 255}
        shares.append(np.mean(erased == 255))
    assert 0.015 < min(shares) < 0.05 and 0.22 < max(shares) < 0.26


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.15])
def test_colour_changes_agree_with_pillow(factor: float) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for ours, theirs in (
        (augment.adjust_brightness, ImageEnhance.Brightness),
        (augment.adjust_contrast, ImageEnhance.Contrast),
        (augment.adjust_saturation, ImageEnhance.Color),
    ):
        expected = np.asarray(theirs(Image.fromarray(picture)).enhance(factor), np.float32)
        result = np.clip(ours(picture.astype(np.float32), factor), 0, 255)
        np.testing.assert_allclose(result, expected, rtol=0, atol=1.5)


def test_hue_turns_colours_and_leaves_greys() -> None:
    colours = np.asarray([[[255, 0, 0], [90, 90, 90], [255, 255, 255]]], np.float32)
    turned = augment.adjust_hue(colours, 1 / 3)
    np.testing.assert_allclose(
        turned, [[[0, 255, 0], [90, 90, 90], [255, 255, 255]]], rtol=0, atol=0.01
    )
    np.testing.assert_allclose(augment.adjust_hue(turned, -1 / 3), colours, rtol=0, atol=0.01)


def test_jitter_stays_within_its_range() -> None:
    grey = np.full((8, 8, 3), 128, np.uint8)
    levels = [augment.colour_jitter(grey, np.random.default_rng(i))[0, 0, 0] for i in range(200)]
    assert 0.8 * 128 - 1 <= min(levels) < 0.85 * 128 and 1.15 * 128 < max(levels) <= 1.2 * 128 + 1
