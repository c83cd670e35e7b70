"""Pictures end to end: `BootPIGPipeline`'s pixels are those of diffusers and of the equations.

Each case asks for much at once: pictures that are wider than high, two prompts with two pictures
each, a negative prompt, a seed. The noise that the other side is given is the pipeline's own.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion import (
    pipeline_stable_diffusion_img2img,
    pipeline_stable_diffusion_inpaint,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from bootpig_jax import BootPIGPipeline
from bootpig_jax.checkpoints.diffusers import load_stable_diffusion
from tests.tiny_models import Kind, save_tiny_model, torch_unet
from tests.torch_pictures import (
    Box,
    Kept,
    References,
    TorchModel,
    assert_same_pictures,
    initial_noise,
    make_scheduler,
    on_white,
    pasted,
    reference_noise,
    touched_latents,
    view,
)

HEIGHT, WIDTH = 16, 24
LATENTS = (HEIGHT // 2, WIDTH // 2)
PROMPTS = ["A photo of a dog, in the snow", "12 phones of the sand..."]
SEED = 7
GUIDANCE: dict[str, Any] = {"negative_prompt": "the night and snow", "guidance_scale": 3.0}
OPTIONS: dict[str, Any] = GUIDANCE | {
    "num_images": 2,
    "seed": SEED,
    "height": HEIGHT,
    "width": WIDTH,
}
Folders = Callable[[Kind], tuple[Path, Path]]


def picture(seed: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """On arrays this small, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A model's folder, and one with a Base and a Reference UNet as training changes them."""

    @functools.cache
    def save(kind: Kind) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(kind)
        generator = torch.Generator().manual_seed(1)
        for network in ("base_unet", "ref_unet"):
            unet = torch_unet(kind)
            with torch.no_grad():
                for name, parameter in unet.named_parameters():
                    if network == "ref_unet" or ".attn1." in name:
                        noise = torch.randn(parameter.shape, generator=generator)
                        parameter.add_(0.3 * parameter.std() * noise)
            unet.save_pretrained(folder / "bootpig" / network)
        return save_tiny_model(folder / "model", kind), folder / "bootpig"

    return save


@pytest.fixture
def given_noise(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The pipeline's noise, which is also what diffusers draws; it encodes pictures to the mean."""
    noise = initial_noise(SEED, len(PROMPTS), 2, *LATENTS).float()
    for module in (pipeline_stable_diffusion_img2img, pipeline_stable_diffusion_inpaint):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: noise.reshape(shape))
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, _: self.mean)
    return noise


def drawn_by_diffusers(
    pipeline: type, folder: Path, solver: str, **options: Any
) -> list[np.ndarray]:
    parts = {
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
        "unet": UNet2DConditionModel,
    }
    stock = pipeline(
        **{name: part.from_pretrained(folder / name) for name, part in parts.items()},
        scheduler=make_scheduler(folder, solver),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    negative = [options.pop("negative_prompt")] * len(PROMPTS)
    drawn = stock(PROMPTS, negative_prompt=negative, num_images_per_prompt=2, **options)
    return [np.asarray(image) for image in drawn.images]


@pytest.mark.parametrize(
    ("kind", "solver"),
    [
        ("sd15", "unipc"),
        ("sd15", "ddim"),
        ("sd21base", "dpmpp_2m"),
        ("sd21", "euler"),
    ],
)
def test_text_to_image_equals_diffusers(
    folders: Folders, given_noise: torch.Tensor, kind: Kind, solver: str
) -> None:
    folder, _ = folders(kind)
    ours = BootPIGPipeline.from_pretrained(folder)(
        PROMPTS, solver=solver, num_inference_steps=3, **OPTIONS
    )
    theirs = drawn_by_diffusers(
        StableDiffusionPipeline,
        folder,
        solver,
        latents=given_noise,
        num_inference_steps=3,
        height=HEIGHT,
        width=WIDTH,
        **GUIDANCE,
    )
    assert_same_pictures(ours, theirs)


def test_decoded_latents_are_cut_off_at_black_and_white(folders: Folders) -> None:
    """Not left to the conversion to 8 bits, which cuts off on some devices and wraps on others."""
    folder, _ = folders("sd15")
    vae, model = load_stable_diffusion(folder).vae, AutoencoderKL.from_pretrained(folder / "vae")
    latents = initial_noise(0, 1, 2, *LATENTS).float()
    ours = np.asarray(jax.jit(vae.decode_latents)(jnp.asarray(latents.permute(0, 2, 3, 1))))
    with torch.no_grad():
        theirs = model.decode(latents / 0.18215).sample.clamp(-1, 1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert ours.min() == -1 and ours.max() == 1


def test_several_pictures_through_the_vae(folders: Folders) -> None:
    folder, bootpig = folders("sd15")
    pipeline, model = BootPIGPipeline.from_pretrained(folder), TorchModel.load(folder, bootpig)
    images = np.stack([picture(seed, HEIGHT, WIDTH) for seed in range(2)])
    encoded = pipeline.encode_images(images.astype(np.float32) / 127.5 - 1)
    expected = torch.stack([model.encode(image) for image in images]).permute(0, 2, 3, 1)
    np.testing.assert_allclose(encoded, expected, atol=1e-5)
    latents = initial_noise(0, 2, 1, *LATENTS)
    decoded = pipeline.decode(jnp.asarray(latents.float().permute(0, 2, 3, 1)))
    assert_same_pictures(
        [Image.fromarray(drawn) for drawn in decoded], [model.decode(one) for one in latents]
    )


# Each takes three steps, so that a kind of solver is compiled once.
STRENGTHS = [(10, 0.3), (5, 0.6), (4, 0.95)]


@pytest.mark.parametrize(
    ("kind", "solver"),
    [("sd15", "euler"), ("sd21base", "unipc"), ("sd21base", "ddim"), ("sd21", "dpmpp_2m")],
)
def test_image_to_image_equals_diffusers(
    folders: Folders, given_noise: torch.Tensor, kind: Kind, solver: str
) -> None:
    folder, _ = folders(kind)
    pipeline = BootPIGPipeline.from_pretrained(folder)
    image = Image.fromarray(picture(0, 50, 60))
    # The largest part of it that has the model's shape, from its middle.
    seen = image.crop((0, 5, 60, 45)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    for steps, strength in STRENGTHS:
        how: dict[str, Any] = {"num_inference_steps": steps, "strength": strength}
        ours = pipeline(PROMPTS, image=image, solver=solver, **how, **OPTIONS)
        theirs = drawn_by_diffusers(
            StableDiffusionImg2ImgPipeline, folder, solver, image=[seen] * 4, **how, **GUIDANCE
        )
        assert_same_pictures(ours, theirs)


def test_inpainting_equals_diffusers_where_the_mask_follows_the_latents(
    folders: Folders, given_noise: torch.Tensor
) -> None:
    folder, _ = folders("sd21")
    image = picture(1, HEIGHT, WIDTH)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[2:12, 4:22] = mask[12:16, 10:14] = True
    pictures: dict[str, Any] = {"image": Image.fromarray(image)}
    how: dict[str, Any] = {"num_inference_steps": 5, "strength": 0.6}
    ours = BootPIGPipeline.from_pretrained(folder)(
        PROMPTS, mask=Image.fromarray(mask), solver="euler", **pictures, **how, **OPTIONS
    )
    theirs = drawn_by_diffusers(
        StableDiffusionInpaintPipeline,
        folder,
        "euler",
        mask_image=Image.fromarray(mask),
        height=HEIGHT,
        width=WIDTH,
        **pictures,
        **how,
        **GUIDANCE,
    )
    window = (0, 0, HEIGHT, WIDTH)
    assert_same_pictures(ours, [pasted(image, mask, window, drawn) for drawn in theirs], mask)


# The size of a picture, the box of a mask in it, and what the model is to see: twice the mask's
# height and width, but not over the picture's right edge; and a mask that no window in the picture
# holds, which is so deep that the seam is as wide as it gets.
MASKED: dict[str, tuple[tuple[int, int], Box, Box]] = {
    "in a corner": ((46, 60), (30, 44, 10, 14), (25, 30, 20, 30)),
    "up to three edges": ((20, 60), (0, 20, 20, 40), (-4, 20, 27, 40)),
}


def masked(name: str) -> tuple[np.ndarray, np.ndarray, Box]:
    """A picture, its mask with a bay and a single pixel in that, and the window."""
    shape, (top, left, height, width), window = MASKED[name]
    mask = np.zeros(shape, bool)
    mask[top : top + height, left : left + width] = True
    mask[top : top + 5, left : left + 6] = False
    mask[top + 2, left + 3] = True
    return picture(2, *shape), mask, window


def kept(model: TorchModel, name: str) -> Kept:
    image, mask, window = masked(name)
    seen = view(image, window, HEIGHT, WIDTH)
    return Kept(model.encode(seen), touched_latents(mask, window, *LATENTS))


def noise_and_prompts() -> Iterator[tuple[torch.Tensor, str]]:
    """Of each picture, in the order in which they are handed over."""
    noise = initial_noise(SEED, len(PROMPTS), 2, *LATENTS)
    return zip(noise, [prompt for prompt in PROMPTS for _ in range(2)], strict=True)


def test_inpainting_equals_a_literal_loop(folders: Folders) -> None:
    """Guided at the last two of three steps only."""
    folder, bootpig = folders("sd15")
    pipeline = BootPIGPipeline.from_pretrained(folder, bootpig=bootpig)
    model = TorchModel.load(folder, bootpig)
    how: dict[str, Any] = {"solver": "dpmpp_2m", "guidance_interval": (0.3, 1.0)}
    for name in MASKED:
        image, mask, window = masked(name)
        ours = pipeline(
            PROMPTS,
            image=Image.fromarray(image),
            mask=Image.fromarray(mask),
            num_inference_steps=3,
            **how,
            **OPTIONS,
        )
        original = kept(model, name)
        drawn = [
            model.draw(noise, prompt, steps=3, kept=original, **how, **GUIDANCE)
            for noise, prompt in noise_and_prompts()
        ]
        theirs = [pasted(image, mask, window, picture) for picture in drawn]
        assert_same_pictures(ours, theirs, mask)
        for found in ours:
            np.testing.assert_array_equal(np.asarray(found)[~mask], image[~mask])


def test_inpainting_with_references_equals_a_literal_loop(folders: Folders) -> None:
    """With a picture that shows through, and clean references with a caption of their own."""
    folder, bootpig = folders("sd15")
    image, mask, window = masked("in a corner")
    how: dict[str, Any] = {"solver": "ddim", "strength": 0.6, "image_guidance_scale": 2.0}
    shots = [transparent(), grey_and_turned_by_the_camera()]
    ours = BootPIGPipeline.from_pretrained(folder, bootpig=bootpig)(
        PROMPTS,
        [shot for shot, _ in shots],
        image=Image.fromarray(image),
        mask=Image.fromarray(mask),
        reference_timestep=0,
        reference_caption="a phone",
        strategy="average",
        num_inference_steps=5,
        **how,
        **OPTIONS,
    )
    model = TorchModel.load(folder, bootpig)
    latents = torch.stack([model.encode(seen) for _, seen in shots])
    references = References(latents, None, "a phone", strategy="average")
    original = kept(model, "in a corner")
    theirs = [
        model.draw(
            noise,
            prompt,
            steps=5,
            references=references,
            kept=original,
            **how,
            **GUIDANCE,
        )
        for noise, prompt in noise_and_prompts()
    ]
    assert_same_pictures(ours, [pasted(image, mask, window, drawn) for drawn in theirs], mask)


# Users' pictures of a subject, each with what the Reference UNet has to see.


def transparent() -> tuple[Image.Image, np.ndarray]:
    """With an alpha channel, soft here and there."""
    rgb, opacity = picture(3, 40, 30), np.zeros((40, 30), np.uint8)
    opacity[5:22, 4:27] = 255
    opacity[9:13, 8:20] = 102
    opacity[16:22, 4:9] = 0
    a = opacity[..., None] / 255
    on_canvas = np.rint(rgb * a + 255 * (1 - a)).astype(np.uint8)
    image = Image.fromarray(np.dstack([rgb, opacity]))
    return image, on_white(on_canvas[5:22, 4:27], HEIGHT, WIDTH)


def before_a_plain_background() -> tuple[Image.Image, np.ndarray]:
    """A long subject; the background shows through a hole in it, and stays there."""
    rng = np.random.default_rng(4)
    rgb = (np.array([40, 90, 160]) + rng.integers(-8, 9, (50, 70, 3))).astype(np.uint8)
    shape = np.zeros((50, 70), bool)
    shape[18:37, 8:24] = shape[28:37, 8:62] = True
    hole = np.zeros_like(shape)
    hole[30:34, 40:50] = True
    rgb[shape & ~hole] = rng.integers(190, 256, (50, 70, 3))[shape & ~hole]
    cut = np.where(shape[..., None], rgb, 255).astype(np.uint8)
    return Image.fromarray(rgb), on_white(cut[18:37, 8:62], HEIGHT, WIDTH)


def grey_and_turned_by_the_camera() -> tuple[Image.Image, np.ndarray]:
    upright = np.full((60, 45), 250, np.uint8)
    upright[10:38, 7:20] = np.random.default_rng(5).integers(0, 200, (28, 13))
    image = Image.fromarray(np.rot90(upright))
    image.getexif()[0x0112] = 6  # to be turned clockwise
    return image, on_white(np.repeat(upright[10:38, 7:20, None], 3, axis=2), HEIGHT, WIDTH)


PICTURES = (transparent, before_a_plain_background, grey_and_turned_by_the_camera)


@pytest.mark.parametrize(
    ("kind", "subjects", "options", "captions"),
    [
        (
            "sd21",
            [PICTURES[1:2], PICTURES[2:]],
            {"reference_caption": "first_clause"},
            ["A photo of a dog", PROMPTS[1]],
        ),
        ("sd21base", [PICTURES], {"reference_scale": 1.1}, PROMPTS),
    ],
    ids=["one picture of each prompt's subject", "three pictures of one subject"],
)
def test_references_to_pixels_equal_the_equations(
    folders: Folders, kind: Kind, subjects: Any, options: dict[str, Any], captions: list[str]
) -> None:
    """The paper's way: references are noised afresh at each step of UniPC."""
    folder, bootpig = folders(kind)
    how: dict[str, Any] = {"solver": "unipc", "image_guidance_scale": 2.0}
    shots = [[take() for take in subject] for subject in subjects]
    images = [[image for image, _ in subject] for subject in shots]
    ours = BootPIGPipeline.from_pretrained(folder, bootpig=bootpig)(
        PROMPTS,
        images[0] if len(images) == 1 else images,
        num_inference_steps=3,
        **how,
        **options,
        **OPTIONS,
    )
    model = TorchModel.load(folder, bootpig)
    references = {
        prompt: References(
            torch.stack([model.encode(seen) for _, seen in subject]),
            reference_noise(SEED, p, 3, len(subject), *LATENTS),
            captions[p],
            key_scale=options.get("reference_scale", 1.0),
        )
        for p, (prompt, subject) in enumerate(zip(PROMPTS, itertools.cycle(shots), strict=False))
    }
    theirs = [
        model.draw(noise, prompt, steps=3, references=references[prompt], **how, **GUIDANCE)
        for noise, prompt in noise_and_prompts()
    ]
    assert_same_pictures(ours, theirs)
