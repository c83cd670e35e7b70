"""Pictures: a text-to-image model draws the captions.

Any pipeline of diffusers that goes from text to pictures: Stable Diffusion 1.5 and 2.1, SDXL with
or without its refiner, few-step models.

Every picture derives from (run seed, global index) alone: all its noise (the initial latents and
what some schedulers add at each step) comes from a generator of its own, on the CPU. So the batch
it is drawn in changes nothing but the rounding of sums, and the device nothing but that.
"""

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from jaxtyping import Float, UInt8
from safetensors import SafetensorError

from bootpig_jax.data.pictures import square
from bootpig_jax.errors import UserError
from data_gen.config import PicturesConfig
from data_gen.networks import find_device
from data_gen.stages import Rejected

_SCHEDULERS: dict[str, Any] = {
    "unipc": UniPCMultistepScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,  # the algorithm that it runs by default
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "lcm": LCMScheduler,
}
# What a pipeline must take to be driven by this module.
_ARGUMENTS = {
    *("prompt", "height", "width", "num_inference_steps"),
    *("guidance_scale", "generator", "output_type"),
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class DiffusionPictures:
    """Draws with a text-to-image pipeline, and with a refiner if there is one."""

    def __init__(self, config: PicturesConfig) -> None:
        """Loads the models onto their device.

        Raises:
          UserError: a model is missing, cannot be loaded or does not fit the configuration, or
            there is no such device, or it is too small.
        """
        assert config.model is not None  # the configuration sees to it
        self._config = config
        device = find_device(config.device, "pictures.device")
        folder = _find(config.model, config, "pictures.model")
        self.model_hash = hash_model(folder, config.variant)
        self._pipeline = _load(folder, config, "pictures.model")
        _check_text_to_image(self._pipeline, folder, config)
        self._refiner = None
        if config.refiner is not None:
            folder = _find(config.refiner.model, config, "pictures.refiner.model")
            self.model_hash += hash_model(folder, config.variant)
            self._refiner = _load_refiner(folder, config, self._pipeline)
        for pipeline in self._pipelines:
            try:
                pipeline.to(device)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"pictures.device: {device} has too little memory for {config.model}: use "
                    "pictures.dtype=float16 or a larger GPU"
                ) from None

    @property
    def _pipelines(self) -> list[Any]:
        return [self._pipeline] if self._refiner is None else [self._pipeline, self._refiner]

    def draw(
        self, indices: Sequence[int], captions: Sequence[str], seeds: Sequence[int]
    ) -> list[UInt8[np.ndarray, "h w 3"] | Rejected]:
        """Draws one batch of pictures (see `stages.PictureSource`).

        Raises:
          UserError: the device's memory is too small for the batch.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        try:
            with torch.inference_mode():
                output = self._run(list(captions), generators)
        except torch.OutOfMemoryError:
            lower = "lower it" if len(captions) > 1 else "set pictures.attention=sliced"
            raise UserError(
                f"pictures.batch_size: the GPU's memory is too small to draw {len(captions)} at "
                f"once: {lower}"
            ) from None
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(captions)
        return [
            Rejected("nsfw") if nsfw else self._quantised(picture)
            for picture, nsfw in zip(output.images, flagged, strict=True)
        ]

    def _run(self, captions: list[str], generators: list[torch.Generator]) -> Any:
        config = self._config
        shared: dict[str, Any] = {
            "prompt": captions,
            "num_inference_steps": config.steps,
            "guidance_scale": config.guidance_scale,
            "generator": generators,
        }
        size = {"height": config.image_size, "width": config.image_size}
        if config.refiner is None or self._refiner is None:
            return self._pipeline(**shared, **size, output_type="np")
        start = config.refiner.start
        base = self._pipeline(**shared, **size, output_type="latent", denoising_end=start)
        # The generators go on where the base left them.
        return self._refiner(**shared, image=base.images, denoising_start=start, output_type="np")

    def _quantised(
        self, picture: Float[np.ndarray, "h w 3"]
    ) -> UInt8[np.ndarray, "h2 w2 3"] | Rejected:
        """Returns the picture as it is stored."""
        if not np.isfinite(picture).all():
            return Rejected("not_finite")  # half precision overflowed
        pixels = np.rint(picture * 255).astype(np.uint8)
        if not pixels.any():
            return Rejected("not_finite")  # it did so before something replaced NaN by 0
        return square(pixels, self._config.stored_size)


def hash_model(folder: Path, variant: str | None = None) -> str:
    """Hashes the configurations and weights of a model in diffusers layout.

    Args:
      folder: holds `model_index.json` and a folder for each part of the model.
      variant: the set of weights that is used; where a part has others besides, they do not count.

    Returns:
      The CRC-32C, in hexadecimal, of the names and contents of its JSON, text and safetensors
      files. Enough to tell a retrained model from the one a run was started with.
    """
    crc = 0
    for path in sorted([folder / "model_index.json", *folder.glob("*/*")]):
        weights = path.suffix == ".safetensors"
        if weights and not _is_of_variant(path, variant):
            continue
        if weights or path.suffix in (".json", ".txt", ".model"):
            crc = google_crc32c.extend(crc, path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 24):
                    crc = google_crc32c.extend(crc, chunk)
    return f"{crc:08x}"


def _is_of_variant(path: Path, variant: str | None) -> bool:
    """Tells whether these weights are those of the variant, as `model.fp16.safetensors` is."""
    # Shards are numbered: `model.fp16-00001-of-00002.safetensors`.
    _, _, found = path.stem.partition(".")
    return found.partition("-")[0] == (variant or "")


def _find(model: str, config: PicturesConfig, field: str) -> Path:
    """Returns a model's folder; a hub id is downloaded, or found where it once was.

    Raises:
      UserError: it is neither a folder in diffusers layout nor a hub id that can be had.
    """
    if Path(model).is_dir():
        if not (Path(model) / "model_index.json").is_file():
            raise UserError(
                f"{field}: {model} has no model_index.json: name a folder in diffusers layout"
            )
        return Path(model)
    if not _HUB_ID.fullmatch(model):
        raise UserError(f"{field}: {model} is neither a folder nor the id of a model on the hub")
    try:
        return Path(DiffusionPipeline.download(model, variant=config.variant, use_safetensors=True))
    except Exception as error:  # the client raises many kinds, all meaning "could not get it"
        raise UserError(
            f"{field}: {model} is no folder and cannot be downloaded: {_one_line(error)}"
        ) from error


def _load(folder: Path, config: PicturesConfig, field: str, **parts: Any) -> Any:
    """Loads the pipeline in a folder, on the CPU, with the scheduler asked for.

    Args:
      folder: in diffusers layout.
      config: the run's pictures.
      field: what an error calls the model.
      **parts: of the pipeline that are there already, and not loaded again.

    Raises:
      UserError: it cannot be loaded, or does not fit the configuration.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        if "safety_checker" in index and not config.safety_checker:
            parts |= {"safety_checker": None, "requires_safety_checker": False}
        pipeline: Any = DiffusionPipeline.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            variant=config.variant,
            use_safetensors=True,  # never unpickle
            local_files_only=True,
            **parts,
        )
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError),
        SafetensorError,
    ) as error:
        raise UserError(f"{field}: {folder} cannot be loaded: {_one_line(error)}") from error
    _set_scheduler(pipeline, config)
    if getattr(pipeline, "watermark", None) is not None:
        # SDXL marks pictures if some package happens to be installed: they must not depend on it.
        pipeline.watermark = None
    if config.attention == "sliced":
        pipeline.enable_attention_slicing()
        pipeline.vae.enable_slicing()
    if config.torch_compile:
        (getattr(pipeline, "unet", None) or pipeline.transformer).compile()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _set_scheduler(pipeline: Any, config: PicturesConfig) -> None:
    """Puts the scheduler asked for in the place of the model's, whose noise schedule it takes."""
    own = pipeline.scheduler
    diffuses = EulerDiscreteScheduler in own.compatibles  # flow-matching models do not
    if config.scheduler != "default":
        if not diffuses:
            raise UserError(
                f"pictures.scheduler: {config.scheduler} does not fit the model, which uses "
                f"{type(own).__name__}: use default"
            )
        pipeline.scheduler = _SCHEDULERS[config.scheduler].from_config(own.config)
    if diffuses:
        try:
            pipeline.scheduler.set_timesteps(config.steps)
        except ValueError as error:
            raise UserError(f"pictures.steps: {_one_line(error)}") from None


def _check_text_to_image(pipeline: Any, folder: Path, config: PicturesConfig) -> None:
    taken = set(inspect.signature(type(pipeline).__call__).parameters)
    if not _ARGUMENTS <= taken or "image" in taken:
        raise UserError(
            f"pictures.model: {folder} holds a {type(pipeline).__name__}, which does not go from "
            "text to pictures"
        )
    if config.safety_checker and getattr(pipeline, "safety_checker", None) is None:
        raise UserError(
            f"pictures.safety_checker: {folder} has none: use another model, or set it to false"
        )
    factor = pipeline.vae_scale_factor
    if config.image_size % factor:
        raise UserError(
            f"pictures.image_size: {config.image_size} is not a multiple of {factor}, the factor "
            f"of the VAE in {folder}"
        )


def _load_refiner(folder: Path, config: PicturesConfig, base: Any) -> Any:
    if not isinstance(base, StableDiffusionXLPipeline):
        raise UserError(
            f"pictures.refiner: it goes on from SDXL, and {config.model} holds a "
            f"{type(base).__name__}: leave the refiner out"
        )
    # It works on the base's latents, so the VAE is the same; so are the words' larger encoder and
    # gigabytes of memory.
    shared = {part: getattr(base, part) for part in ("vae", "text_encoder_2")}
    refiner = _load(folder, config, "pictures.refiner.model", **shared)
    if not isinstance(refiner, StableDiffusionXLImg2ImgPipeline):
        raise UserError(
            f"pictures.refiner.model: {folder} holds a {type(refiner).__name__}, no refiner"
        )
    return refiner


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
