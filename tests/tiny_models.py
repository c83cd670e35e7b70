"""Tiny Stable Diffusion folders with random weights, written by diffusers and transformers.

Three kinds, after the models people have: `sd15` (convolution `proj_in`, one head count, quick
GELU), `sd21base` (linear `proj_in`, heads by level, predicts the noise) and `sd21` (predicts the
velocity).
"""

from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.tokenizer_folder import write_tokenizer

Kind = Literal["sd15", "sd21base", "sd21"]
KINDS: tuple[Kind, ...] = ("sd15", "sd21base", "sd21")

Module = TypeVar("Module", bound=torch.nn.Module)

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def torch_unet(kind: Kind) -> UNet2DConditionModel:
    """A UNet with every parameter random, the zero-initialised ones too."""
    if kind == "sd15":
        sizes = {"attention_head_dim": 4}
    else:
        sizes = {"attention_head_dim": (2, 4), "use_linear_projection": True}
    return randomised(UNet2DConditionModel(**UNET, **sizes))


def torch_vae() -> AutoencoderKL:
    return randomised(
        AutoencoderKL(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    )


def torch_text_encoder(kind: Kind, vocab_size: int) -> CLIPTextModel:
    return randomised(
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=77,
                hidden_act="quick_gelu" if kind == "sd15" else "gelu",
            )
        )
    )


def randomised(module: Module) -> Module:
    """Fills every parameter with seeded noise: no norm is the identity, no bias zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            scale = 1.0 if "embedding" in name else fan_in**-0.5
            parameter.copy_(noise * (scale if parameter.ndim > 1 else 0.1))
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return module.eval()


def save_tiny_model(folder: Path, kind: Kind) -> Path:
    """Writes a whole model and returns its folder."""
    torch_unet(kind).save_pretrained(folder / "unet")
    torch_vae().save_pretrained(folder / "vae")
    tokenizer = write_tokenizer(
        folder / "tokenizer",
        pad="<|endoftext|>" if kind == "sd15" else "!",
        kind="vocab.json" if kind == "sd15" else "tokenizer.json",
    )
    vocab_size = len(CLIPTokenizer.from_pretrained(tokenizer))
    torch_text_encoder(kind, vocab_size).save_pretrained(folder / "text_encoder")
    if kind == "sd21":
        scheduler = DDIMScheduler(**SCHEDULE, prediction_type="v_prediction", clip_sample=False)
    else:
        scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True)
    scheduler.save_pretrained(folder / "scheduler")
    return folder
