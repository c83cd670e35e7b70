"""The pipeline: arguments, batches, seeds, and its agreement with the functional layer."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from bootpig_jax import BootPIGPipeline
from bootpig_jax.diffusion.solvers import make_solver
from bootpig_jax.errors import UserError
from bootpig_jax.sampling.batches import draw_noise, make_batches
from bootpig_jax.sampling.conditioning import Conditioning
from bootpig_jax.sampling.contact_sheet import Row, contact_sheet
from bootpig_jax.sampling.denoise import denoise, denoise_with_references
from bootpig_jax.sampling.references import prepare_references
from bootpig_jax.sampling.requests import Cancelled, Progress, Request
from bootpig_jax.sampling.settings import SamplingSettings
from tests.sampling_models import save_bootpig

PROMPTS = ["a dog in the snow", "dog"]
OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "num_images": 2, "segmenter": "none"}


def picture(seed: int, size: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def pipeline(model_folder: Path, bootpig_folder: Path) -> BootPIGPipeline:
    return BootPIGPipeline.from_pretrained(model_folder, bootpig=bootpig_folder)


@pytest.fixture(scope="module")
def references() -> list[Image.Image]:
    return [picture(0), picture(1)]


@pytest.fixture(scope="module")
def drawn(pipeline: BootPIGPipeline, references: list[Image.Image]) -> np.ndarray:
    return np.stack(pipeline(PROMPTS, references, **OPTIONS))


def test_same_seed_same_pictures(
    pipeline: BootPIGPipeline, references: list[Image.Image], drawn: np.ndarray
) -> None:
    assert drawn.shape == (4, 16, 16, 3)
    assert drawn.dtype == np.uint8
    assert len({image.tobytes() for image in drawn}) == 4
    np.testing.assert_array_equal(drawn, np.stack(pipeline(PROMPTS, references, **OPTIONS)))
    other = np.stack(pipeline(PROMPTS, references, **OPTIONS, seed=1))
    assert not np.array_equal(drawn, other)


def test_batches_do_not_change_pictures(
    pipeline: BootPIGPipeline, references: list[Image.Image], drawn: np.ndarray
) -> None:
    small = np.stack(pipeline(PROMPTS, references, **OPTIONS, batch_size=2))
    np.testing.assert_allclose(small.astype(int), drawn.astype(int), atol=1)


def test_one_list_of_references_for_each_prompt(
    pipeline: BootPIGPipeline, references: list[Image.Image], drawn: np.ndarray
) -> None:
    others = [picture(2), picture(3)]
    images = np.stack(pipeline(PROMPTS, [references, others], **OPTIONS))
    np.testing.assert_array_equal(images[:2], drawn[:2])
    assert not np.array_equal(images[2:], drawn[2:])


def test_pipeline_replays_through_the_functional_layer(
    pipeline: BootPIGPipeline, references: list[Image.Image], drawn: np.ndarray
) -> None:
    model = pipeline.model
    latents = pipeline.encode_images(prepare_references(references, 16, 16, "none"))
    text = pipeline.encode_text(model.tokenizer(PROMPTS))
    initial, noise = draw_noise(
        0, prompts=[0, 1], images=[0, 1], latent_shape=(8, 8, 4), references=2, steps=3
    )
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 1)
    one = jax.random.normal(jax.random.fold_in(key, 0), (8, 8, 4))
    np.testing.assert_allclose(initial[2], one, rtol=1e-6)
    result = denoise_with_references(
        model.unet,
        pipeline.reference_unet,
        initial,
        jnp.repeat(text, 2, axis=0),
        pipeline.encode_text(model.tokenizer([""])),
        jnp.stack([latents, latents]),
        text,
        noise,
        solver=make_solver("unipc", model.schedule, 3),
    )
    np.testing.assert_array_equal(pipeline.decode(result), drawn)


def test_weights_and_references_matter(
    pipeline: BootPIGPipeline,
    model_folder: Path,
    references: list[Image.Image],
    drawn: np.ndarray,
) -> None:
    untrained = BootPIGPipeline.from_pretrained(model_folder)
    assert untrained.reference_unet is untrained.model.unet
    assert not np.array_equal(np.stack(untrained(PROMPTS, references, **OPTIONS)), drawn)
    changed = np.stack(pipeline(PROMPTS, [picture(5), references[1]], **OPTIONS))
    assert not np.array_equal(changed, drawn)


def test_text_alone(pipeline: BootPIGPipeline) -> None:
    options = OPTIONS | {"num_images": 1}
    images = pipeline(PROMPTS, **options)
    assert [image.size for image in images] == [(16, 16)] * 2
    # Prompt 0's picture is the same whatever other prompts there are.
    same = pipeline([PROMPTS[0], "snow"], **options)
    np.testing.assert_array_equal(images[0], same[0])


def test_exported_conditioning_is_followed(
    pipeline: BootPIGPipeline, references: list[Image.Image], drawn: np.ndarray
) -> None:
    trained_clean = BootPIGPipeline(
        pipeline.model, pipeline.reference_unet, Conditioning(reference_timestep=0)
    )
    clean = np.stack(trained_clean(PROMPTS, references, **OPTIONS))
    assert not np.array_equal(clean, drawn)
    asked = np.stack(trained_clean(PROMPTS, references, **OPTIONS, reference_timestep="same"))
    np.testing.assert_array_equal(asked, drawn)
    scaled = BootPIGPipeline(
        pipeline.model, pipeline.reference_unet, Conditioning(reference_key_scale=1.3)
    )
    np.testing.assert_array_equal(
        np.stack(scaled(PROMPTS, references, **OPTIONS)),
        np.stack(pipeline(PROMPTS, references, **OPTIONS, reference_scale=1.3)),
    )


def test_the_reference_unet_reads_what_it_was_trained_with_unless_asked_otherwise(
    pipeline: BootPIGPipeline,
) -> None:
    trained = Conditioning(reference_caption="first_clause")
    trained_so = BootPIGPipeline(pipeline.model, pipeline.reference_unet, trained)
    prompt = "A photo of a red dog, in the snow"
    for asked, expected in (
        (None, "A photo of a red dog"),
        ("target", prompt),
        ("object", "red dog"),
        ("my dog", "my dog"),
    ):
        settings = SamplingSettings(reference_caption=asked)
        assert trained_so.reference_caption(prompt, settings) == expected


def test_pictures_are_pasted_into_their_own_originals(
    pipeline: BootPIGPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = np.random.default_rng(0).standard_normal((4, 8, 8, 4)).astype(np.float32)
    monkeypatch.setattr(
        "bootpig_jax.sampling.pipeline.denoise", lambda *_, **__: jnp.asarray(drawn)
    )
    settings = SamplingSettings(num_inference_steps=2)
    images = [picture(7), picture(8)]
    masks = np.zeros((2, 16, 16), bool)
    masks[0, :5], masks[1, 9:] = True, True
    requests = [
        Request(
            "a dog",
            settings,
            original=pipeline.encode_original(image, Image.fromarray(mask), settings),
        )
        for image, mask in zip(images, masks, strict=True)
    ]
    found = pipeline.draw_batch(requests, [0, 1])
    for row, one in enumerate(found):
        mask = masks[row // 2]
        np.testing.assert_array_equal(np.asarray(one)[~mask], np.asarray(images[row // 2])[~mask])
        assert (np.asarray(one)[mask] != np.asarray(images[row // 2])[mask]).any()


def test_conditioning_file(tmp_path: Path) -> None:
    assert Conditioning.read(tmp_path) == Conditioning("same", 1.0, "target")
    release = Conditioning(0, 1.1, "first_clause")
    release.write(tmp_path)
    assert Conditioning.read(tmp_path) == release
    for wrong in (
        "[]",
        "{",
        '{"reference_timestep": 1}',
        '{"reference_timestep": false}',
        '{"reference_key_scale": NaN}',
        '{"reference_caption": "all"}',
        '{"strategy": "softmax"}',
    ):
        (tmp_path / "bootpig.json").write_text(wrong)
        with pytest.raises(UserError, match="bootpig.json"):
            Conditioning.read(tmp_path)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("target", "A photo of a red dog, in the snow, at night"),
        ("first_clause", "A photo of a red dog"),
        ("object", "red dog"),
    ],
)
def test_reference_caption(kind: Any, expected: str) -> None:
    conditioning = Conditioning(reference_caption=kind)
    assert conditioning.caption("A photo of a red dog, in the snow, at night") == expected


def test_an_object_loses_its_article() -> None:
    conditioning = Conditioning(reference_caption="object")
    for prompt in ("A photo of an apple, red", "a Photo of the apple", "apple, on a table"):
        assert conditioning.caption(prompt) == "apple"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_steps", 0),
        ("num_inference_steps", 100_000),
        ("image_guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("guidance_scale", 1e9),
        ("guidance_scale", -1.0),
        ("strategy", "sofmax"),
        ("solver", "heun"),
        ("spacing", "even"),
        ("sigmas", "linear"),
        ("strength", 0.0),
        ("strength", 1.5),
        ("strength", True),
        ("guidance_scale", "7.5"),
        ("guidance_interval", (0.5, 0.5)),
        ("guidance_interval", (0.0, math.nan)),
        ("guidance_interval", [0.0, 1.0]),
        ("negative_prompt", None),
        ("negative_prompt", "a\0dog"),
        ("negative_prompt", "\ud800"),
        ("reference_scale", 0),
        ("reference_scale", math.inf),
        ("reference_caption", "Target"),
        ("reference_timestep", 3),
        ("reference_timestep", False),
        ("reuse_features", 0),
        ("segmenter", "sam"),
        ("num_images", 0),
        ("batch_size", 0),
        ("seed", -1),
        ("height", 20),
        ("width", 0),
        ("width", 1 << 20),
    ],
)
def test_settings_name_the_wrong_field(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{field}: .*"):
        SamplingSettings(**{field: value})


def test_wrong_calls_are_named(pipeline: BootPIGPipeline) -> None:
    one = picture(0)
    calls: list[tuple[str, Any, dict[str, Any]]] = [
        ("prompt", None, {"prompt": []}),
        ("prompt 2", None, {"prompt": ["a dog", "a\0dog"]}),
        ("references", [], {}),
        ("references", [one] * 17, {}),
        ("references", [[one], [one]], {}),
        ("references", [[one], [one, one]], {"prompt": ["a", "b"]}),
        ("reference_timestep", [one], {"reference_timestep": 3}),
        ("num_inference_steps", [one], {"num_inference_steps": 1000}),
    ]
    for name, pictures, arguments in calls:
        prompt = arguments.pop("prompt", "a dog")
        with pytest.raises(UserError, match=f"^{name}: "):
            pipeline(prompt, pictures, **(OPTIONS | arguments))


def test_settings_reach_the_networks(
    pipeline: BootPIGPipeline, references: list[Image.Image], drawn: np.ndarray
) -> None:
    """Each of them changes the pictures; all but the caption's defaults are the paper's."""

    def draw(**options: Any) -> np.ndarray:
        return np.stack(pipeline(PROMPTS, references, **OPTIONS, **options))

    np.testing.assert_array_equal(draw(reference_scale=1, reference_caption="target"), drawn)
    for change in (
        {"negative_prompt": "snow"},
        {"reference_scale": 1.1},
        {"reference_caption": "a photo"},
        {"solver": "unipc", "spacing": "trailing"},
    ):
        assert not np.array_equal(draw(**change), drawn), change


def test_a_picture_can_be_drawn_alone(
    pipeline: BootPIGPipeline, references: list[Image.Image], drawn: np.ndarray
) -> None:
    """In a batch of the same shape, at the same row: whatever else is in the batch."""
    settings = SamplingSettings(**OPTIONS)
    latents = pipeline.encode_references(references, settings)
    for number, found in enumerate(pipeline.draw_each(PROMPTS, references, settings)):
        np.testing.assert_array_equal(np.asarray(found.picture), drawn[number])
    request = Request(PROMPTS[found.prompt], settings, found.prompt, latents)
    place = found.place
    alone = pipeline.draw_batch([request] * place.prompts, [found.image] * place.images)
    np.testing.assert_array_equal(np.asarray(alone[place.row]), drawn[-1])


def test_callbacks_see_every_step_and_can_stop(
    pipeline: BootPIGPipeline, drawn: np.ndarray, references: list[Image.Image]
) -> None:
    seen: list[Progress] = []
    images = pipeline(PROMPTS, references, **OPTIONS, callback=seen.append)
    assert seen == [Progress(1, 1, step, 3) for step in (1, 2, 3)]
    np.testing.assert_allclose(np.stack(images).astype(int), drawn.astype(int), atol=1)
    seen.clear()

    def stop(progress: Progress) -> bool:
        seen.append(progress)
        return progress.step < 2

    with pytest.raises(Cancelled):
        pipeline(PROMPTS, references, **OPTIONS, callback=stop)
    assert len(seen) == 2

    def fail(_: Progress) -> None:
        raise ConnectionError("the client left")

    with pytest.raises(ConnectionError):
        pipeline(PROMPTS, references, **OPTIONS, callback=fail)


def test_image_to_image_starts_from_the_image(pipeline: BootPIGPipeline) -> None:
    image = Image.fromarray(np.full((16, 16, 3), (200, 40, 40), np.uint8))
    options = OPTIONS | {"num_images": 1, "num_inference_steps": 10}
    (drawn,) = pipeline("dog", image=image, strength=0.2, **options)
    model = pipeline.model
    initial, _ = draw_noise(
        0, prompts=[0], images=[0], latent_shape=(8, 8, 4), references=0, steps=2
    )
    text, empty = (pipeline.encode_text(model.tokenizer([text])) for text in ("dog", ""))
    latents = denoise(
        model.unet,
        initial,
        text,
        empty,
        solver=make_solver("unipc", model.schedule, 10, strength=0.2),
        start_from=pipeline.encode_images(np.asarray(image)[None] / np.float32(127.5) - 1),
    )
    np.testing.assert_array_equal(np.asarray(drawn), pipeline.decode(latents)[0])
    for wrong in (
        {"image": image},
        {"strength": 0.5},
        {"mask": image},
        {"image": image, "mask": image.resize((8, 8))},
        {"image": image, "strength": 0.05},
    ):
        with pytest.raises(UserError):
            pipeline("dog", **options, **wrong)


def test_save_pretrained(pipeline: BootPIGPipeline, model_folder: Path, tmp_path: Path) -> None:
    release = Conditioning(0, 1.1, "first_clause")
    BootPIGPipeline(pipeline.model, pipeline.reference_unet, release).save_pretrained(tmp_path)
    loaded = BootPIGPipeline.from_pretrained(model_folder, bootpig=tmp_path)
    assert loaded.conditioning == release
    for one, other in (
        (loaded.model.unet, pipeline.model.unet),
        (loaded.reference_unet, pipeline.reference_unet),
    ):
        same = jax.tree.map(np.array_equal, nnx.state(one), nnx.state(other))
        assert all(jax.tree.leaves(same))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="file"):
        pipeline.save_pretrained(tmp_path / "file")


def test_size_fits_the_model(pipeline: BootPIGPipeline) -> None:
    # One VAE pixel in two, halved once more in the UNet; 8 is the smallest step there is.
    coarse = dataclasses.replace(pipeline.model.unet.config, block_out_channels=(8,) * 4)
    model = dataclasses.replace(pipeline.model, unet=_WithConfig(coarse))
    with pytest.raises(UserError, match="^height: .* multiple of 16"):
        BootPIGPipeline(model, pipeline.reference_unet)("a dog", height=24)


class _WithConfig:
    def __init__(self, config: Any):
        self.config = config


def test_bootpig_folder_is_checked(
    model_folder: Path, bootpig_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="base_unet is missing"):
        BootPIGPipeline.from_pretrained(model_folder, bootpig=tmp_path)
    save_bootpig(tmp_path)
    config_file = tmp_path / "ref_unet" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"attention_head_dim": 4}))
    with pytest.raises(UserError, match="not of the size"):
        BootPIGPipeline.from_pretrained(model_folder, bootpig=tmp_path)
    config_file.write_text(json.dumps(config | {"sample_size": 96}))
    BootPIGPipeline.from_pretrained(model_folder, bootpig=tmp_path)


@pytest.mark.parametrize("prompts", [1, 2, 5, 7])
@pytest.mark.parametrize("images", [1, 3, 4, 9])
@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_batches_cover_everything_in_one_shape(prompts: int, images: int, size: int) -> None:
    batches = list(make_batches(prompts, images, size))
    assert {pair for batch in batches for pair in batch.pairs} == {
        (p, j) for p in range(prompts) for j in range(images)
    }
    assert len({(len(batch.prompts), len(batch.images)) for batch in batches}) == 1
    assert all(len(batch.pairs) <= size for batch in batches)


def test_contact_sheet() -> None:
    images = [picture(i) for i in range(5)]
    rows = [
        Row("a dog in the snow", [images[:3], [images[3]], [images[4]]]),
        Row("ein sehr langer Text " * 20 + "\N{DOG FACE} \u0643\u0644\u0628", [images[:1]]),
        Row("", []),
    ]
    sheet = contact_sheet(rows, ["references"], cell=64)
    assert sheet.size[0] == 8 + 3 * (64 + 8)
    pixels = np.asarray(sheet)
    # The single picture of row 0's second column, four times enlarged.
    tile = np.asarray(images[3].resize((64, 64), Image.Resampling.NEAREST))
    windows = np.lib.stride_tricks.sliding_window_view(pixels[:, 80:144], (64, 64, 3))
    assert (windows[:, 0, 0] == tile).all(axis=(1, 2, 3)).any()
