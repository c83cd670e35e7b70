"""Pictures by tiny, randomly initialised pipelines, through diffusers' real classes."""

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from pydantic import ValidationError

from bootpig_jax.errors import UserError
from data_gen.config import DataGenConfig, PicturesConfig, samples_hash
from data_gen.pictures import DiffusionPictures, hash_model
from data_gen.stages import Rejected, picture_seed
from tests.tiny_pipelines import save_sdxl, save_stable_diffusion

CAPTIONS = [f"A photo of a {word}, on it" for word in ("cup", "cat", "car", "can", "cap")]
SEEDS = [picture_seed(0, index) for index in range(len(CAPTIONS))]
SCHEDULERS = {
    "default": PNDMScheduler,
    "unipc": UniPCMultistepScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "lcm": LCMScheduler,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small networks lose more by waiting for threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_sdxl(tmp_path_factory.mktemp("sdxl"))


def configure(model, /, **changes) -> PicturesConfig:
    config = dict(model=str(model), scheduler="unipc", steps=3, image_size=16, device="cpu")
    return PicturesConfig.model_validate({**config, **changes})


def make(model, /, **changes) -> DiffusionPictures:
    return DiffusionPictures(configure(model, **changes))


def draw(pictures: DiffusionPictures, batch_size: int) -> np.ndarray:
    drawn = [
        picture
        for start in range(0, len(CAPTIONS), batch_size)
        for picture in pictures.draw(
            range(start, min(start + batch_size, len(CAPTIONS))),
            CAPTIONS[start : start + batch_size],
            SEEDS[start : start + batch_size],
        )
    ]
    assert not [picture for picture in drawn if isinstance(picture, Rejected)]
    return np.stack(drawn)


def assert_within_a_grey_level(one: np.ndarray, other: np.ndarray) -> None:
    assert np.abs(one.astype(int) - other).max() <= 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_pictures_do_not_depend_on_the_batch(model, scheduler):
    pictures = make(model, scheduler=scheduler)
    assert type(pictures._pipeline.scheduler) is SCHEDULERS[scheduler]
    assert pictures._pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pictures._pipeline.scheduler.config.beta_schedule == "scaled_linear"
    alone, together = draw(pictures, 1), draw(pictures, 4)
    assert together.shape == (5, 16, 16, 3) and together.dtype == np.uint8
    assert_within_a_grey_level(alone, together)
    assert len({picture.tobytes() for picture in together}) == 5


@pytest.mark.parametrize("scheduler", ["default", "unipc", "euler_ancestral"])
def test_sdxl_and_its_refiner_do_not_depend_on_the_batch(sdxl, scheduler):
    base, refiner = sdxl
    second = dict(refiner=dict(model=str(refiner), start=0.5))
    pictures = make(base, scheduler=scheduler, steps=4, **second)
    assert_within_a_grey_level(draw(pictures, 1), draw(pictures, 4))


def test_the_noise_of_each_step_is_the_pictures_own(model):
    """Two pictures of one caption and one seed are the same, wherever they stand in the batch."""
    pictures = make(model, scheduler="euler_ancestral")
    seeds = [1, 2, 1, 3]
    drawn = pictures.draw(range(4), CAPTIONS[:1] * 4, seeds)
    assert_within_a_grey_level(drawn[0], drawn[2])
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() > 1


def test_a_rerun_draws_the_same(model):
    np.testing.assert_array_equal(draw(make(model), 4), draw(make(model), 4))


def test_equals_the_pipeline_called_plainly(model):
    """The same seed through diffusers' own pipeline, one picture at a time."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        CAPTIONS[0],
        height=16,
        width=16,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(SEEDS[0]),
        output_type="np",
    ).images[0]
    drawn = make(model, scheduler="ddim").draw([0], CAPTIONS[:1], SEEDS[:1])[0]
    assert np.abs(drawn - expected * 255).max() <= 1


def test_equals_the_refiner_called_plainly(sdxl):
    """As the authors' release draws: SDXL until 0.8, then the refiner."""
    base = StableDiffusionXLPipeline.from_pretrained(sdxl[0], add_watermarker=False)
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(sdxl[1], add_watermarker=False)
    for pipeline in (base, refiner):
        pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEEDS[0])
    shared = dict(prompt=CAPTIONS[0], num_inference_steps=5, generator=generator)
    latents = base(
        **shared, height=16, width=16, guidance_scale=5.0, denoising_end=0.8, output_type="latent"
    ).images
    expected = refiner(
        **shared, image=latents, guidance_scale=5.0, denoising_start=0.8, output_type="np"
    ).images[0]
    second = dict(refiner=dict(model=str(sdxl[1])))
    pictures = make(sdxl[0], scheduler="default", steps=5, guidance_scale=5.0, **second)
    assert np.abs(pictures.draw([0], CAPTIONS[:1], SEEDS[:1])[0] - expected * 255).max() <= 1
    unrefined = make(sdxl[0], scheduler="default", steps=5, guidance_scale=5.0)
    assert unrefined.model_hash != pictures.model_hash


def test_few_steps_without_guidance(model):
    """As Turbo models are used: with the words' branch alone."""
    one = draw(make(model, scheduler="euler_ancestral", steps=1, guidance_scale=0.0), 4)
    same = draw(make(model, scheduler="euler_ancestral", steps=1, guidance_scale=1.0), 4)
    np.testing.assert_array_equal(one, same)


def test_a_model_that_embeds_its_guidance(tmp_path):
    """As latent consistency models do."""
    folder = save_stable_diffusion(tmp_path, time_cond_proj_dim=8)
    pictures = make(folder, scheduler="lcm", steps=4, guidance_scale=8.0)
    assert_within_a_grey_level(draw(pictures, 1), draw(pictures, 4))


def test_pictures_are_stored_in_another_size_than_drawn(model):
    drawn = draw(make(model), 4)
    stored = draw(make(model, output_size=8), 4)
    assert stored.shape == (5, 8, 8, 3)
    means = drawn.reshape(5, 8, 2, 8, 2, 3).mean((2, 4))
    assert np.abs(stored - means).mean() < 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_draws_nearly_the_same(model, dtype):
    exact, half = draw(make(model), 4), draw(make(model, dtype=dtype), 4)
    # Random weights, and the noise itself is drawn in half precision.
    assert np.abs(half.astype(int) - exact).mean() < 64


def test_sliced_attention_draws_the_same(model):
    assert_within_a_grey_level(draw(make(model), 4), draw(make(model, attention="sliced"), 4))


def test_compiling_reaches_the_denoiser(model, monkeypatch):
    compiled = []
    monkeypatch.setattr(UNet2DConditionModel, "compile", lambda self: compiled.append(self))
    make(model)
    assert not compiled
    pictures = make(model, torch_compile=True)
    assert len(compiled) == 1 and compiled[0] is pictures._pipeline.unet


@pytest.mark.long
def test_compiled_models_draw_the_same(model, monkeypatch):
    """With torch.compile's tracer, but not its code generator, which needs a C++ compiler."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compile_module(module, backend="eager")
    )
    assert_within_a_grey_level(draw(make(model), 5), draw(make(model, torch_compile=True), 5))


def test_pictures_that_overflow_are_rejected(model):
    pictures = make(model)
    bias = pictures._pipeline.vae.decoder.conv_out.bias
    for value in (float("nan"), -1e4):  # not a number, and black
        with torch.no_grad():
            bias.fill_(value)
        assert pictures.draw([0], CAPTIONS[:1], [0]) == [Rejected("not_finite")]


def test_what_the_safety_checker_flags_is_rejected(tmp_path):
    folder = save_stable_diffusion(tmp_path, safety_checker=True)
    assert make(folder)._pipeline.safety_checker is None
    assert draw(make(folder), 5).any()
    checked = make(folder, safety_checker=True)
    assert checked.draw([0, 1], CAPTIONS[:2], [0, 1]) == [Rejected("nsfw")] * 2
    with torch.no_grad():
        checked._pipeline.safety_checker.concept_embeds_weights.fill_(2)
    np.testing.assert_array_equal(draw(checked, 5), draw(make(folder), 5))


def test_too_little_memory_is_a_one_line_error(model, monkeypatch):
    def full(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    pictures = make(model)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", full)
    with pytest.raises(UserError, match=r"pictures.batch_size: .* draw 5 at once: lower it$"):
        draw(pictures, 5)
    with pytest.raises(UserError, match="attention=sliced$"):
        draw(pictures, 1)
    monkeypatch.undo()
    monkeypatch.setattr(StableDiffusionPipeline, "to", full)
    with pytest.raises(UserError, match=r"pictures.device: cpu has too little memory"):
        make(model)


def test_seeds_differ_and_fit_the_records():
    seeds = {picture_seed(run, index) for run in range(30) for index in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_hash_changes_with_a_single_weight(model, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.save_pretrained(tmp_path)
    before = hash_model(tmp_path)
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] += 1
    pipeline.unet.save_pretrained(tmp_path / "unet")
    assert hash_model(tmp_path) != before


def test_weights_of_another_variant_do_not_count(model, tmp_path):
    folder, halved = tmp_path / "model", tmp_path / "halved"
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.save_pretrained(folder)
    before = hash_model(folder)
    pipeline.to(torch.float16).save_pretrained(halved, variant="fp16")
    for weights in halved.glob("*/*.fp16.safetensors"):
        shutil.copy(weights, folder / weights.relative_to(halved))
    assert hash_model(folder) == before != hash_model(folder, "fp16")
    assert_within_a_grey_level(
        draw(make(folder, variant="fp16"), 5), draw(make(halved, variant="fp16"), 5)
    )


def test_where_and_how_it_is_drawn_is_not_in_the_hash(model, sdxl):
    def hashed(**changes):
        pictures = configure(model, steps=9, refiner=dict(model="here"))
        config = DataGenConfig(output_dir=Path("x"), pictures=pictures)
        pictures = pictures.model_copy(update=changes)
        return samples_hash(config.model_copy(update={"pictures": pictures}), "hash")

    other_place = configure(model, steps=9, refiner=dict(model="there")).refiner
    same = dict(model="elsewhere", batch_size=3, device="cuda", attention="sliced")
    assert hashed() == hashed(**same, torch_compile=True, refiner=other_place)
    changed = dict(scheduler="lcm", steps=8, guidance_scale=1.0, output_size=8, refiner=None)
    assert len({hashed(), *(hashed(**{key: value}) for key, value in changed.items())}) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model="nowhere"), "pictures.model: nowhere is neither a folder nor the id"),
        (dict(model="some/model"), "pictures.model: some/model is no folder and cannot be down"),
        (dict(device="cuda:77"), "no cuda:77 here"),
        (dict(scheduler="lcm", steps=60), "pictures.steps: .*50"),
        (dict(safety_checker=True), "pictures.safety_checker: .* has none"),
        (dict(variant="bf16"), "cannot be loaded"),
        (dict(refiner=dict(model="x/y"), steps=9), "pictures.refiner.model: x/y is no folder"),
    ],
)
def test_unusable_settings_are_one_line_errors(model, changes, message):
    with pytest.raises(UserError, match=message) as error:
        make(model, **changes)
    assert "\n" not in str(error.value)


def test_models_of_other_kinds_are_refused(model, sdxl, tmp_path):
    base, refiner = (str(folder) for folder in sdxl)
    with pytest.raises(UserError, match="does not go from text to pictures"):
        make(refiner)
    with pytest.raises(UserError, match="goes on from SDXL"):
        make(model, steps=9, refiner=dict(model=refiner))
    with pytest.raises(UserError, match="no refiner"):
        make(base, steps=9, refiner=dict(model=base))
    with pytest.raises(UserError, match="no model_index.json"):
        make(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="pictures.scheduler: unipc does not fit"):
        make(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model=None), "model is missing"),
        (dict(source="folder"), "folder is missing"),
        (dict(steps=4, refiner=dict(model="x")), "too few to share"),
        (dict(steps=1, refiner=dict(model="x", start=0.5)), "too few to share"),
        (dict(scheduler="best"), "euler_ancestral"),
        (dict(variant="../x"), "pattern"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        configure("m", **changes)


def test_damaged_weights_are_refused(model, tmp_path):
    StableDiffusionPipeline.from_pretrained(model, safety_checker=None).save_pretrained(tmp_path)
    weights = next((tmp_path / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded") as error:
        make(tmp_path)
    assert "\n" not in str(error.value)
    weights.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        make(tmp_path)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ],
)
def test_pickled_weights_are_never_loaded(model, tmp_path, part, name):
    folder = tmp_path / "model"
    StableDiffusionPipeline.from_pretrained(model, safety_checker=None).save_pretrained(folder)
    next((folder / part).glob("*.safetensors")).unlink()
    (folder / part / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(UserError, match="cannot be loaded"):
        make(folder)
    assert not (tmp_path / "sprung").exists()


def test_code_that_comes_with_a_model_is_never_run(model, tmp_path):
    StableDiffusionPipeline.from_pretrained(model, safety_checker=None).save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(
        index.read_text().replace('"StableDiffusionPipeline"', '["pipeline", "Own"]', 1)
    )
    (tmp_path / "pipeline.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UserError, match="cannot be loaded"):
        make(tmp_path)
