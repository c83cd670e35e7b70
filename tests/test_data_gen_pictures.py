"""Pictures by a tiny, randomly initialised Stable Diffusion, through diffusers' real classes."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bootpig_jax.errors import UserError
from data_gen.config import PicturesConfig
from data_gen.pictures import StableDiffusionPictures, hash_model
from data_gen.stages import picture_seed

CAPTIONS = [f"A photo of a {word}, on it" for word in ("cup", "cat", "car", "can", "cap")]


def write_tokenizer(folder):
    """A byte-level BPE of single letters, so that any English text has ids."""
    letters = [chr(code) for code in range(33, 127)]
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "ca",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16), len(words)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder in diffusers layout: 8x8 latents of 16 px pictures."""
    root = tmp_path_factory.mktemp("sd")
    tokenizer, vocabulary_size = write_tokenizer(root / "words")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=vocabulary_size - 1,
        bos_token_id=vocabulary_size - 2,
        pad_token_id=vocabulary_size - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(root / "model")
    return root / "model"


def make(model, **changes):
    config = dict(model=model, steps=3, image_size=16, device="cpu")
    return StableDiffusionPictures(PicturesConfig(**{**config, **changes}))


def draw(pictures, batch_size):
    seeds = [picture_seed(0, index) for index in range(len(CAPTIONS))]
    return np.stack(
        [
            picture
            for start in range(0, len(CAPTIONS), batch_size)
            for picture in pictures.draw(
                CAPTIONS[start : start + batch_size], seeds[start : start + batch_size]
            )
        ]
    )


def test_pictures_do_not_depend_on_the_batch(model):
    pictures = make(model)
    alone, together = draw(pictures, 1), draw(pictures, 8)
    assert together.shape == (5, 16, 16, 3) and together.dtype == np.uint8
    assert np.abs(alone.astype(int) - together).max() <= 1
    assert len({picture.tobytes() for picture in together}) == 5


def test_a_rerun_draws_the_same(model):
    np.testing.assert_array_equal(draw(make(model), 4), draw(make(model), 4))


def test_the_scheduler_is_the_one_asked_for_with_the_models_schedule(model):
    for name, kind in (("ddim", DDIMScheduler), ("unipc", UniPCMultistepScheduler)):
        scheduler = make(model, scheduler=name)._pipeline.scheduler
        assert type(scheduler) is kind
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.beta_schedule == "scaled_linear"


def test_equals_the_pipeline_called_plainly(model):
    """The same latents through diffusers' own pipeline, one picture at a time."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    seed = picture_seed(0, 0)
    expected = pipeline(
        CAPTIONS[0],
        height=16,
        width=16,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]
    drawn = make(model, scheduler="ddim").draw(CAPTIONS[:1], [seed])[0]
    assert np.abs(drawn - expected * 255).max() <= 1


def test_pictures_that_overflow_are_rejected(model):
    pictures = make(model)
    with torch.no_grad():
        pictures._pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    assert pictures.draw(CAPTIONS[:1], [0])[0].reason == "not_finite"


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


def test_unusable_models_are_one_line_errors(model, tmp_path):
    with pytest.raises(UserError, match="no model_index.json"):
        make(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no cuda:77 here"):
        make(model, device="cuda:77")
    (tmp_path / "model_index.json").write_text((model / "model_index.json").read_text())
    with pytest.raises(UserError, match="cannot be loaded") as error:
        make(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_cut_short_are_refused(model, tmp_path):
    StableDiffusionPipeline.from_pretrained(model, safety_checker=None).save_pretrained(tmp_path)
    weights = next((tmp_path / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        make(tmp_path)
