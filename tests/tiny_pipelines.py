"""Tiny, randomly initialised text-to-image pipelines, of diffusers' real classes, in folders.

All draw pictures of 16 px from 8x8 latents.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from tests.tokenizer_folder import EOS, write_tokenizer

WIDTH = 16
NOISE: dict[str, Any] = {"beta_schedule": "scaled_linear", "steps_offset": 1}


def save_stable_diffusion(folder: Path, safety_checker: bool = False, **unet_changes: Any) -> Path:
    """Stable Diffusion 1.5 (with a checker that flags everything) or 2.1, in miniature."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(folder)
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=WIDTH, **unet_changes),
        scheduler=PNDMScheduler(**NOISE, prediction_type="v_prediction", skip_prk_steps=True),
        safety_checker=_safety_checker() if safety_checker else None,
        feature_extractor=_image_processor() if safety_checker else None,
        requires_safety_checker=safety_checker,
    ).save_pretrained(folder / "model")
    return folder / "model"


def save_sdxl(folder: Path) -> tuple[Path, Path]:
    """SDXL and its refiner, in miniature."""
    torch.manual_seed(0)
    tokenizer, vae = _tokenizer(folder), _vae()
    config = _text_config(tokenizer)
    larger_encoder = CLIPTextModelWithProjection(config)
    scheduler = EulerDiscreteScheduler(**NOISE)
    # What SDXL adds to the timestep: the pooled words and 6 numbers (sizes and crop); its refiner
    # has 5 (one score in the place of two sizes).
    added: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        text_encoder_2=larger_encoder,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_unet(
            cross_attention_dim=2 * WIDTH,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
            **added,
        ),
        scheduler=scheduler,
    ).save_pretrained(folder / "base")
    StableDiffusionXLImg2ImgPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=larger_encoder,
        tokenizer=None,
        tokenizer_2=tokenizer,
        unet=_unet(
            cross_attention_dim=WIDTH,
            projection_class_embeddings_input_dim=WIDTH + 5 * 8,
            **added,
        ),
        scheduler=scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    ).save_pretrained(folder / "refiner")
    return folder / "base", folder / "refiner"


def _tokenizer(folder: Path) -> CLIPTokenizer:
    written = write_tokenizer(folder / "words", pad=EOS, kind="vocab.json", max_length=16)
    return CLIPTokenizer.from_pretrained(written, model_max_length=16)


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    size = len(tokenizer)
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        intermediate_size=32,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )


def _unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **changes,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


def _image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def _safety_checker() -> StableDiffusionSafetyChecker:
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=WIDTH))
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2)  # thresholds of a cosine
    return checker
