"""Every way that a picture takes shows it upright, unmirrored and in its own colours.

A subject with four coloured corners goes in; what comes out is read back as a word
(`tests.corners`).
"""

import base64
import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from bootpig_jax import cache_latents
from bootpig_jax.checkpoints.diffusers import load_stable_diffusion
from bootpig_jax.config import TrainConfig
from bootpig_jax.data import augment, records
from bootpig_jax.data.cache import make_cached_loader
from bootpig_jax.data.pipeline import make_loader
from bootpig_jax.evaluation import embedders
from bootpig_jax.evaluation.report import thumbnail as report_thumbnail
from bootpig_jax.sampling.batches import Place
from bootpig_jax.sampling.contact_sheet import Row, contact_sheet
from bootpig_jax.sampling.encoding import decode, encode_images
from bootpig_jax.sampling.inpainting import make_original, open_original
from bootpig_jax.sampling.references import open_reference, prepare_references, reference_picture
from bootpig_jax.sampling.requests import Drawn
from bootpig_jax.train import base_sha256, cache_contents
from bootpig_jax.training.loop import to_encoded
from bootpig_jax.training.metrics import MetricLogger, picture_grid
from bootpig_jax.web.app import draw_with, run_job
from bootpig_jax.web.drawing import Models, make_request
from bootpig_jax.yaml_config import load_config
from data_gen.config import DataGenConfig, GrabCutConfig, KeyingConfig
from data_gen.masks import GrabCutSegmenter, KeyingSegmenter
from data_gen.picture_files import PictureFiles
from data_gen.shards import make_shard, shard_path
from data_gen.stages import Caption, Stages
from data_gen.thumbnails import thumbnail
from tests.corners import BOX, GREY, MIRRORED, SIDE, UPRIGHT, exif, read, scene, stored
from tests.pixel_vae import PixelVAE

ORIENTATIONS = range(1, 9)
# To [-1, 1], at the size that it has.
PREPROCESSING = embedders.Preprocessing(
    resize=SIDE, crop=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


def test_a_word_tells_every_change() -> None:
    picture, _ = scene()
    turned = [stored(picture, orientation) for orientation in ORIENTATIONS]
    words = [read(one) for one in (*turned, picture[..., ::-1], picture[..., [1, 0, 2]])]
    assert words[:2] == [UPRIGHT, MIRRORED] and len(set(words)) == len(words)


# --- training data


def test_augmentation_mirrors_half_of_the_references_and_turns_none() -> None:
    picture, mask = scene()
    plain = augment.build_reference(picture, mask, np.random.default_rng(0), size=SIDE, kind="none")
    assert read(plain) == UPRIGHT
    for how in (augment.PAPER, augment.RELEASE):
        how = dataclasses.replace(how, erase_probability=0.0)
        words = [
            read(
                augment.augment_reference(
                    picture, mask, np.random.default_rng(seed), size=SIDE, how=how
                )
            )
            for seed in range(120)
        ]
        assert set(words) == {UPRIGHT, MIRRORED}
        assert 0.35 < words.count(MIRRORED) / len(words) < 0.65


def test_a_mirrored_reference_is_the_subject_mirrored_pixel_by_pixel() -> None:
    picture, mask = scene()
    picture[BOX] = np.random.default_rng(0).integers(0, 255, picture[BOX].shape)
    # As large as it is in the picture: 32 of 64 pixels.
    how = augment.Augmentation(scale=(0.5, 0.5), flip_probability=1.0)
    reference = augment.augment_reference(
        picture, mask, np.random.default_rng(0), size=SIDE, how=how
    )
    box = augment.bounding_slices((reference < 255).any(axis=-1))
    np.testing.assert_array_equal(reference[box], picture[BOX][:, ::-1])


def scene_record(index: int) -> records.Record:
    picture, mask = scene()
    return records.Record(
        target=records.encode_picture(picture),
        mask=records.encode_mask(mask),
        caption=f"a {chr(ord('a') + index)}",
        object="thing",
        seed=index,
        id=str(index),
        box=records.bounding_box(mask),
        score=1.0,
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    name = records.shard_name("corners", "train", 0, 1)
    records.write_shard(folder / name, [scene_record(index) for index in range(16)])
    records.write_dataset_metadata(folder, "corners", {"train": [16]})
    return folder


@pytest.mark.parametrize("size", [SIDE, 32])
def test_batches_show_targets_upright_and_mirror_references_alone(dataset: Path, size: int) -> None:
    loader = make_loader(dataset, batch_size=32, image_size=size, seed=0, num_threads=0)
    batch = next(loader)
    assert {read(target) for target in batch["target"]} == {UPRIGHT}
    assert {read(reference) for reference in batch["reference"]} == {UPRIGHT, MIRRORED}


def test_the_cache_holds_pictures_as_batches_do(
    dataset: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dataclasses.replace(load_stable_diffusion(model_folder), vae=PixelVAE())
    monkeypatch.setattr(cache_latents, "open_stable_diffusion", lambda *_, **__: model)
    monkeypatch.setattr(cache_latents, "read_weights", lambda network: network)
    arguments = [
        *(f"model.base={model_folder}", f"data.dir={dataset}", f"data.cache={tmp_path / 'cache'}"),
        *(f"data.image_size={SIDE}", "data.cache_copies=4", "output_dir=unused"),
    ]
    cache_latents.main([*arguments, "precision=float32"])
    config = load_config(TrainConfig, None, [*arguments, "precision=float32"])
    assert config.data.cache is not None
    contents = cache_contents(config, base_sha256(config))
    loader = make_cached_loader(config.data.cache, contents, batch_size=32, seed=0, num_threads=0)
    encoded = to_encoded(next(loader))
    scale = model.vae.config.scaling_factor
    shown = [np.asarray(latents)[..., :3] / scale for latents in encoded.target.mean]
    assert {read(picture) for picture in shown} == {UPRIGHT}
    shown = [np.asarray(latents)[..., :3] / scale for latents in encoded.reference.mean]
    assert {read(picture) for picture in shown} == {UPRIGHT, MIRRORED}
    deviation = scale * np.exp(-2)  # of a log-variance of -4
    np.testing.assert_allclose(encoded.target.std, deviation, rtol=1e-6)
    np.testing.assert_allclose(encoded.reference.std, deviation, rtol=1e-6)


# --- making data


@pytest.mark.parametrize(
    "segmenter",
    [KeyingSegmenter(KeyingConfig()), GrabCutSegmenter(GrabCutConfig(working_size=SIDE))],
    ids=["keying", "grabcut"],
)
def test_shards_hold_a_folders_pictures_upright_with_their_masks(
    tmp_path: Path, segmenter: Any
) -> None:
    picture, mask = scene()
    folder = tmp_path / "pictures"
    folder.mkdir()
    for orientation in ORIENTATIONS:
        image = Image.fromarray(np.ascontiguousarray(stored(picture, orientation)))
        image.save(folder / f"{orientation}.png", exif=exif(orientation))
    config = DataGenConfig.model_validate(
        {
            "output_dir": tmp_path,
            "candidates": 8,
            "pictures": {"source": "folder", "folder": folder, "min_side": 8, "output_size": SIDE},
        }
    )
    source = PictureFiles(config.pictures, 8)
    captions = [Caption(f"a cup {number}", "cup") for number in range(8)]
    report = make_shard(config, Stages(source, segmenter), 0, captions)
    reader = records.ShardReader(shard_path(config, 0))
    assert report.count == len(reader) == 8
    for number in range(8):
        record = records.decode(reader[number])
        assert record.caption == f"a cup {number}"
        assert read(records.decode_picture(record.target)) == UPRIGHT
        np.testing.assert_array_equal(records.decode_mask(record.mask), mask)
        # ymin, xmin, ymax, xmax
        np.testing.assert_allclose(record.box, np.array([12, 20, 36, 52]) / SIDE)


# --- sampling


@pytest.fixture(params=ORIENTATIONS)
def photo(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A JPEG as phones write it: stored in some other way than it is to be seen."""
    path = tmp_path / "photo.jpg"
    image = Image.fromarray(np.ascontiguousarray(stored(scene()[0], request.param)))
    image.save(path, quality=100, subsampling=0, exif=exif(request.param))
    return path


def test_references_are_cut_out_upright(photo: Path) -> None:
    image = open_reference(photo)
    for segmenter in ("none", "keying", "grabcut"):
        assert read(reference_picture(image, 48, 40, segmenter)) == UPRIGHT
    (pixels,) = prepare_references([image], 40, 48)
    assert read(pixels) == UPRIGHT
    picture, mask = scene()
    transparent = Image.fromarray(np.dstack([picture, np.uint8(255) * mask]))
    assert read(reference_picture(transparent, 48, 48, "alpha")) == UPRIGHT


def test_inpainting_sees_a_picture_upright(photo: Path) -> None:
    mask = Image.fromarray(np.uint8(255) * scene()[1])
    original = make_original(open_original(photo), mask, 64, 96)
    assert read(original.view()) == UPRIGHT


def test_what_is_drawn_is_pasted_upright() -> None:
    drawn, _ = scene()
    for height, width in ((SIDE, SIDE), (90, 140)):
        ground = Image.fromarray(np.full((height, width, 3), GREY, np.uint8))
        mask = np.full((height, width), 255, np.uint8)
        mask[0] = 0  # a picture without anything to keep is refused
        original = make_original(ground, Image.fromarray(mask), SIDE, SIDE)
        assert read(original.paste(drawn)) == UPRIGHT


def test_pictures_go_to_latents_and_back_in_their_order() -> None:
    turned = np.stack([stored(scene()[0], orientation) for orientation in ORIENTATIONS[:7]])
    latents = encode_images(PixelVAE(), turned.astype(np.float32) / 127.5 - 1)
    words = [read(picture) for picture in turned]
    assert [read(2 * latent[..., :3]) for latent in np.asarray(latents)] == words
    assert [read(picture) for picture in decode(PixelVAE(), latents)] == words


def test_sheets_show_rows_and_columns_in_order() -> None:
    pictures = [Image.fromarray(stored(scene()[0], o)) for o in ORIENTATIONS[:4]]
    words = [read(picture) for picture in pictures]
    cells = [Row("", [[picture] for picture in row]) for row in (pictures[:2], pictures[2:])]
    sheet = np.asarray(contact_sheet(cells, cell=SIDE))
    halves = [half for part in np.split(sheet[: len(sheet) // 2 * 2], 2) for half in columns(part)]
    assert [read(half) for half in halves] == words


def columns(picture: np.ndarray) -> list[np.ndarray]:
    middle = picture.shape[1] // 2
    return [picture[:, :middle], picture[:, middle:]]


# --- training's own pictures


def test_grids_reach_tensorboard_upright_and_in_order(tmp_path: Path) -> None:
    turned = [stored(scene()[0], orientation) for orientation in ORIENTATIONS[:4]]
    grid = picture_grid([np.stack(turned[:2]), np.stack(turned[2:])])
    config = load_config(
        TrainConfig, None, ["model.base=base", "data.dir=data", f"output_dir={tmp_path}"]
    )
    with MetricLogger(config, first_step=0) as logger:
        logger.image(3, "samples", grid)
    (path,) = (tmp_path / "tensorboard").iterdir()
    reader = records.ShardReader(path)  # event files have TFRecord's frames
    (value,) = [
        value
        for index in range(len(reader))
        for value in Event.FromString(reader[index]).summary.value
    ]
    assert value.tag == "samples"
    shown = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
    np.testing.assert_array_equal(shown, grid)
    halves = [half for part in np.split(shown, 2) for half in columns(part)]
    assert [read(half) for half in halves] == [read(picture) for picture in turned]


# --- evaluation and reports


def test_scores_and_reports_see_pictures_upright(photo: Path) -> None:
    data = photo.read_bytes()
    assert read(embedders.decode(data, "whole")) == UPRIGHT
    assert read(embedders.decode(data, "masked")) == UPRIGHT
    pixels = embedders.preprocess(embedders.decode(data, "whole"), PREPROCESSING)
    assert read(pixels.transpose(1, 2, 0)) == UPRIGHT
    assert read(Image.open(io.BytesIO(base64.b64decode(report_thumbnail(data))))) == UPRIGHT
    assert read(Image.open(io.BytesIO(thumbnail(scene()[0])))) == UPRIGHT


# --- the page


class Pipeline:
    """Keeps what it is given; what it draws is the picture to change."""

    def draw_each(
        self, prompt: str, references: Sequence[Image.Image], settings: Any, **how: Any
    ) -> Iterator[Drawn]:
        self.references, self.mask = references, how["mask"]
        yield Drawn(0, 0, how["image"], Place(1, 1, 0))


def test_the_page_takes_and_shows_pictures_upright(photo: Path, tmp_path: Path) -> None:
    picture, subject = scene()
    painted = np.zeros((SIDE, SIDE, 4), np.uint8)
    painted[subject] = (255, 61, 154, 255)  # by the editor's brush
    edited = {"background": Image.fromarray(picture), "layers": [Image.fromarray(painted)]}
    fields = {"seed": 5, "reference_scale": ""}
    request = make_request("a cup", [(str(photo), None)], ["softmax"], edited, fields)
    pipeline, reports = Pipeline(), []
    run_job(draw_with(pipeline), request, Models("model", None), tmp_path, reports.append)  # type: ignore[arg-type]
    (given,) = pipeline.references
    assert read(reference_picture(given, SIDE, SIDE)) == UPRIGHT
    np.testing.assert_array_equal(np.asarray(pipeline.mask) > 0, subject)
    used, (tile,) = reports
    files = {Path(path).name: np.asarray(Image.open(path)) for path in used.paths}
    np.testing.assert_array_equal(files["picture.png"], picture)
    np.testing.assert_array_equal(files["mask.png"] > 0, subject)
    np.testing.assert_array_equal(np.asarray(Image.open(tile.path)), picture)
