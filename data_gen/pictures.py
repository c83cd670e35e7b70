"""Pictures: a text-to-image model draws the captions.

Every picture derives from (run seed, global index) alone: its initial latents come from a generator
of its own, so the batch it is drawn in changes nothing but the rounding of sums.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UniPCMultistepScheduler
from jaxtyping import UInt8
from safetensors import SafetensorError

from bootpig_jax.errors import UserError
from data_gen.config import PicturesConfig
from data_gen.stages import Rejected

_SCHEDULERS: dict[str, Any] = {"unipc": UniPCMultistepScheduler, "ddim": DDIMScheduler}


class StableDiffusionPictures:
    """Draws with a Stable Diffusion in a local folder of diffusers layout."""

    def __init__(self, config: PicturesConfig) -> None:
        """Loads the model onto its device.

        Raises:
          UserError: the folder is missing or cannot be loaded, or there is no such device.
        """
        self._config = config
        self._device = _device(config.device)
        self.model_hash = hash_model(config.model)
        self._pipeline = _load(config).to(self._device)
        factor = self._pipeline.vae_scale_factor
        if config.image_size % factor:
            raise UserError(
                f"pictures.image_size: {config.image_size} is not a multiple of {factor}, the "
                f"factor of the VAE in {config.model}"
            )
        side = config.image_size // factor
        self._latent_shape = (1, self._pipeline.unet.config.in_channels, side, side)

    def draw(
        self, captions: Sequence[str], seeds: Sequence[int]
    ) -> list[UInt8[np.ndarray, "h w 3"] | Rejected]:
        """Draws one batch of pictures (see `stages.PictureSource`)."""
        # On the CPU and in float32, so that device and precision do not change them.
        noise = [
            torch.randn(self._latent_shape, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        latents = torch.cat(noise).to(self._device, self._pipeline.unet.dtype)
        size = self._config.image_size
        # cuDNN otherwise picks convolution algorithms whose sums differ from run to run.
        with torch.inference_mode(), torch.backends.cudnn.flags(deterministic=True):
            pictures = self._pipeline(
                list(captions),
                height=size,
                width=size,
                num_inference_steps=self._config.steps,
                guidance_scale=self._config.guidance_scale,
                latents=latents,
                output_type="np",
            ).images
        return [
            np.rint(picture * 255).astype(np.uint8)
            if np.isfinite(picture).all()
            else Rejected("not_finite")  # half precision overflowed
            for picture in pictures
        ]


def hash_model(folder: Path) -> str:
    """Hashes the configurations and weights of a model in diffusers layout.

    Args:
      folder: holds `model_index.json` and a folder for each part of the model.

    Returns:
      The CRC-32C, in hexadecimal, of the names and contents of all its JSON, text and safetensors
      files. Enough to tell a retrained model from the one a run was started with.

    Raises:
      UserError: there is no such model.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"pictures.model: {folder} has no model_index.json: name a folder in diffusers layout"
        )
    crc = 0
    for path in sorted([folder / "model_index.json", *folder.glob("*/*")]):
        if path.suffix in (".json", ".txt", ".safetensors"):
            crc = google_crc32c.extend(crc, path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 24):
                    crc = google_crc32c.extend(crc, chunk)
    return f"{crc:08x}"


def _load(config: PicturesConfig) -> Any:
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            config.model,
            dtype=getattr(torch, config.dtype),
            safety_checker=None,
            requires_safety_checker=False,
            use_safetensors=True,  # never unpickle
            local_files_only=True,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"pictures.model: {config.model} cannot be loaded: {reason}") from error
    scheduler = _SCHEDULERS[config.scheduler]
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"pictures.device: there is no {name} here: use cpu or auto")
    return device
