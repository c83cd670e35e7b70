"""What users call: prompts and reference pictures in, pictures out.

`BootPIGPipeline` is called like a diffusers pipeline, or step by step: `encode_references` and
`encode_original` turn pictures into latents, a `Request` says what one prompt's pictures are drawn
from, and `draw_batch` draws some pictures of several requests together. `sampling.batches` says
where the noise comes from.

The references' latents are the means of the VAE's posterior.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8
from PIL import Image
from tqdm import tqdm

from bootpig_jax.attention import Strategy
from bootpig_jax.checkpoints.diffusers import (
    StableDiffusion,
    open_stable_diffusion,
    read_networks,
)
from bootpig_jax.checkpoints.stored import read_weights
from bootpig_jax.checkpoints.tokenizer import Tokenizer, tokenize_with_warnings
from bootpig_jax.diffusion.schedule import NoiseSchedule
from bootpig_jax.diffusion.solvers import Solver, make_solver
from bootpig_jax.errors import UserError
from bootpig_jax.kernels import compute_dtype
from bootpig_jax.models.unet import UNet, UNetConfig
from bootpig_jax.models.vae import VAEConfig
from bootpig_jax.sampling.batches import Place, draw_noise, make_batches
from bootpig_jax.sampling.conditioning import Conditioning, ReferenceCaption, ReferenceTimestep
from bootpig_jax.sampling.denoise import KeptLatents, OnStep, denoise, denoise_with_references
from bootpig_jax.sampling.encoding import decode, encode_images, encode_text
from bootpig_jax.sampling.inpainting import make_original
from bootpig_jax.sampling.references import Segmenter, prepare_references
from bootpig_jax.sampling.requests import (
    Callback,
    Cancelled,
    Drawn,
    EncodedOriginal,
    Pictures,
    Progress,
    Request,
    reference_sets,
)
from bootpig_jax.sampling.settings import SamplingSettings, check_original, check_prompts
from bootpig_jax.sampling.trained import check_bootpig, open_bootpig, save_bootpig

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class BootPIGPipeline:
    """Stable Diffusion with BootPIG's Reference UNet.

    Attributes:
        model: the text-to-image model; its `unet` is the Base UNet.
        reference_unet: the Reference UNet.
        conditioning: how the Reference UNet was trained to see its references.
    """

    def __init__(
        self, model: StableDiffusion, reference_unet: UNet, conditioning: Conditioning | None = None
    ):
        self.model = model
        self.reference_unet = reference_unet
        self.conditioning = conditioning or Conditioning()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        bootpig: str | Path | None = None,
        *,
        precision: Precision = "auto",
        allow_pickle: bool = False,
    ) -> Self:
        """Loads a text-to-image model and, if given, trained UNets.

        Args:
            folder: a folder in diffusers' layout, or a hub id.
            bootpig: a folder with `base_unet/` and `ref_unet/`: what `bootpig_jax.train` exports or
                the authors' release saves. `None`: untrained, both UNets are the model's own.
            precision: of weights and computation; `auto` is float32 on CPUs, float16 on NVIDIA's
                GPUs before Ampere, and bfloat16 on other accelerators.
            allow_pickle: whether PyTorch's pickled weights are opened where there are no
                safetensors. Only tensors are read from them; no code in them is run.

        Raises:
            UserError: a folder or file is missing or damaged.
        """
        conditioning = None if bootpig is None else check_bootpig(bootpig)
        dtype = _dtype(precision)
        model = open_stable_diffusion(
            folder, dtype=dtype, param_dtype=dtype, allow_pickle=allow_pickle
        )
        if bootpig is None:
            model = read_networks(model)
            # The same object: sampling changes no weights.
            return cls(model, model.unet)
        base, reference = open_bootpig(
            bootpig, model.unet.config, dtype=dtype, allow_pickle=allow_pickle
        )
        # The model's own UNet is never read.
        model = read_networks(dataclasses.replace(model, unet=base))
        return cls(model, read_weights(reference), conditioning)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `base_unet/`, `ref_unet/` and `bootpig.json`, for `from_pretrained(bootpig=...)`.

        The VAE and the text encoder are the text-to-image model's, and stay there.

        Args:
            folder: created if missing.

        Raises:
            UserError: it cannot be written to.
        """
        save_bootpig(folder, self.model.unet, self.reference_unet, self.conditioning)

    def __call__(
        self,
        prompt: str | Sequence[str],
        references: Pictures | Sequence[Pictures] | None = None,
        *,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        num_inference_steps: int = 50,
        image_guidance_scale: float = 5.0,
        guidance_scale: float = 7.5,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_prompt: str = "",
        strategy: str = "softmax",
        reference_scale: float | None = None,
        reference_caption: str | None = None,
        reference_timestep: ReferenceTimestep | None = None,
        reuse_features: int = 1,
        num_images: int = 1,
        seed: int = 0,
        solver: str = "unipc",
        spacing: str | None = None,
        sigmas: str = "default",
        strength: float = 1.0,
        segmenter: str = "auto",
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 4,
        strict: bool = False,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> list[Image.Image]:
        """Draws pictures. Every argument that is not explained here is in `SamplingSettings`.

        Args:
            prompt: one prompt or several.
            references: pictures of the subject, for all prompts; or one list of pictures for each
                prompt, of equal lengths. `None` draws from the text alone.
            image: a picture to change: where `mask` is white, or everywhere by `strength`.
            mask: of the image's size; white is drawn anew, and black comes back as it was.
            num_inference_steps: how many times the networks are evaluated.
            image_guidance_scale: eta_im of Eq. 4.
            guidance_scale: eta_txt of Eq. 4.
            guidance_interval: which part of the trajectory is guided.
            negative_prompt: what the picture should not show.
            strategy: how several references are pooled.
            reference_scale: factor on the reference tokens that feed the keys.
            reference_caption: what the Reference UNet reads.
            reference_timestep: "same" or 0.
            reuse_features: for how many steps the references' features are kept.
            num_images: pictures for each prompt.
            seed: where all noise comes from.
            solver: its name.
            spacing: of the timesteps.
            sigmas: `default` or `karras`.
            strength: how much of `image` is drawn anew.
            segmenter: how references are cut out.
            height: in pixels.
            width: in pixels.
            batch_size: pictures that are drawn together.
            strict: whether a prompt that is too long is an error.
            progress: whether to show a progress bar on standard error.
            callback: called after each step; see `Callback`. The loop then runs step by step.

        Returns:
            `num_images` pictures of the first prompt, then those of the second, and so on.

        Raises:
            UserError: an argument is out of its range, or a picture can't be used.
            Cancelled: the callback returned False.
        """
        settings = SamplingSettings(
            num_inference_steps=num_inference_steps,
            image_guidance_scale=image_guidance_scale,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            negative_prompt=negative_prompt,
            strategy=strategy,
            reference_scale=reference_scale,
            reference_caption=reference_caption,
            reference_timestep=reference_timestep,
            reuse_features=reuse_features,
            num_images=num_images,
            seed=seed,
            solver=solver,
            spacing=spacing,
            sigmas=sigmas,
            strength=strength,
            segmenter=segmenter,
            height=height,
            width=width,
            batch_size=batch_size,
            strict=strict,
        )
        return self.draw(
            prompt,
            references,
            settings,
            image=image,
            mask=mask,
            progress=progress,
            callback=callback,
        )

    def draw(
        self,
        prompt: str | Sequence[str],
        references: Pictures | Sequence[Pictures] | None,
        settings: SamplingSettings,
        *,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> list[Image.Image]:
        """Draws pictures as `__call__` does, from settings that were checked before."""
        how: dict[str, Any] = {"progress": progress, "callback": callback}
        drawn = self.draw_each(prompt, references, settings, image=image, mask=mask, **how)
        return [d.picture for d in sorted(drawn, key=lambda d: (d.prompt, d.image))]

    def draw_each(
        self,
        prompt: str | Sequence[str],
        references: Pictures | Sequence[Pictures] | None,
        settings: SamplingSettings,
        *,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Iterator[Drawn]:
        """Draws pictures as `draw` does, and hands over each batch as soon as it is there."""
        prompts = check_prompts(prompt)
        sets = reference_sets(references, len(prompts))
        solver_of(self.model.schedule, settings)
        check_texts(self.model.tokenizer, prompts, settings)
        check_original(image is not None, mask is not None, settings)
        original = None
        if image is not None:
            original = self.encode_original(image, mask, settings)
        encoded = self._encode_reference_sets(sets, settings) if sets else [None] * len(prompts)
        requests = [
            Request(text, settings, p, latents, original)
            for p, (text, latents) in enumerate(zip(prompts, encoded, strict=True))
        ]
        return self._draw_requests(requests, settings, progress, callback)

    def _draw_requests(
        self,
        requests: Sequence[Request],
        settings: SamplingSettings,
        progress: bool,
        callback: Callback | None,
    ) -> Iterator[Drawn]:
        batches = list(make_batches(len(requests), settings.num_images, settings.batch_size))
        bar = tqdm(batches, desc="drawing", unit="batch", disable=not progress, file=sys.stderr)
        done = set()
        for number, batch in enumerate(bar, start=1):

            def on_step(step: int, steps: int, number: int = number) -> bool | None:
                assert callback is not None
                return callback(Progress(number, len(batches), step, steps))

            pictures = self.draw_batch(
                [requests[p] for p in batch.prompts],
                batch.images,
                on_step=None if callback is None else on_step,
            )
            shape = (len(batch.prompts), len(batch.images))
            for row, (pair, picture) in enumerate(zip(batch.pairs, pictures, strict=True)):
                if pair not in done:  # the last batches may draw some again, to be full
                    done.add(pair)
                    yield Drawn(*pair, picture, Place(*shape, row, stepwise=callback is not None))

    def draw_batch(
        self,
        requests: Sequence[Request],
        images: Sequence[int],
        *,
        on_step: Callable[[int, int], bool | None] | None = None,
    ) -> list[Image.Image]:
        """Draws some pictures of several requests together, in one compiled program.

        Args:
            requests: with equal settings but for the seed and the negative prompt, the same number
                of references, and all or none with an original, in one size.
            images: which pictures of each.
            on_step: called with the number of steps done and of all steps after each; returning
                False stops.

        Returns:
            The pictures of the first request, then those of the second, and so on.

        Raises:
            Cancelled: `on_step` returned False.
        """
        settings = requests[0].settings
        solver = solver_of(self.model.schedule, settings)
        steps = len(solver.timesteps)
        references = [r.references for r in requests if r.references is not None]
        originals = [r.original for r in requests if r.original is not None]
        timestep = settings.reference_timestep
        if timestep is None:
            timestep = self.conditioning.reference_timestep
        noisy = len(references[0]) if references and timestep == "same" else 0
        factor = self.model.vae.config.downsampling
        height, width = (side // factor for side in self.size(settings))
        initial, noise = draw_noise(
            [r.settings.seed for r in requests],
            prompts=[r.index for r in requests],
            images=images,
            latent_shape=(height, width, self.model.unet.config.in_channels),
            references=noisy,
            steps=steps,
        )
        low, high = settings.guidance_interval
        how: dict[str, Any] = {
            "solver": solver,
            # Floats, because an integer would compile a program of its own.
            "guidance_scale": float(settings.guidance_scale),
            # No second program for the steps outside, where there are none.
            "guidance_interval": None if spans_all(settings) else (float(low), float(high)),
            "on_step": None if on_step is None else _stopping(on_step, steps),
        }
        if originals:
            rows = jnp.stack([o.latents for o in originals]).repeat(len(images), axis=0)
            if settings.strength < 1:
                how["start_from"] = rows
            if originals[0].original.mask is not None:
                masks = np.stack([o.original.latent_mask(factor) for o in originals])
                how["kept"] = KeptLatents(rows, jnp.asarray(masks.repeat(len(images), axis=0)))
        text, negative = (
            self._encode_texts(texts).repeat(len(images), axis=0)
            for texts in (
                [r.prompt for r in requests],
                [r.settings.negative_prompt for r in requests],
            )
        )
        if not references:
            drawn = denoise(self.model.unet, initial, text, negative, **how)
        else:
            scale = settings.reference_scale
            if scale is None:
                scale = self.conditioning.reference_key_scale
            drawn = denoise_with_references(
                self.model.unet,
                self.reference_unet,
                initial,
                text,
                negative,
                jnp.stack(references),
                self._encode_texts([self.reference_caption(r.prompt, settings) for r in requests]),
                noise if noisy else None,
                image_guidance_scale=float(settings.image_guidance_scale),
                strategy=cast(Strategy, settings.strategy),
                reference_timestep=timestep,
                reference_key_scale=float(scale),
                reuse_features=settings.reuse_features,
                **how,
            )
        pixels = list(self.decode(drawn))
        if originals:
            per_row = [o.original for o in originals for _ in images]
            pixels = [o.paste(picture) for o, picture in zip(per_row, pixels, strict=True)]
        return [Image.fromarray(picture) for picture in pixels]

    def reference_caption(self, prompt: str, settings: SamplingSettings) -> str:
        """What the Reference UNet reads when the Base UNet reads `prompt`."""
        asked = settings.reference_caption
        if asked is None:
            return self.conditioning.caption(prompt)
        if asked not in get_args(ReferenceCaption):
            return asked
        kind = cast(ReferenceCaption, asked)
        return dataclasses.replace(self.conditioning, reference_caption=kind).caption(prompt)

    def encode_references(
        self, pictures: Pictures, settings: SamplingSettings
    ) -> Float[Array, "k h w c"]:
        """The latents of one subject's references, as `Request` wants them.

        Raises:
            UserError: a picture can't be used; the message counts them from 1.
        """
        segmenter = cast(Segmenter, settings.segmenter)
        return self.encode_images(prepare_references(pictures, *self.size(settings), segmenter))

    def encode_original(
        self, image: Image.Image, mask: Image.Image | None, settings: SamplingSettings
    ) -> EncodedOriginal:
        """The picture to change, as `Request` wants it.

        Raises:
            UserError: one of the pictures can't be used.
        """
        original = make_original(image, mask, *self.size(settings))
        return EncodedOriginal(original, self.encode_images(original.view()[None])[0])

    def size(self, settings: SamplingSettings) -> tuple[int, int]:
        """Height and width that are drawn: those asked for, or the model's own.

        Raises:
            UserError: the model cannot draw that size.
        """
        return size_of(self.model.unet.config, self.model.vae.config, settings)

    def _encode_texts(self, texts: Sequence[str]) -> Float[Array, "b l e"]:
        # One by one: what a text becomes must not depend on how many others there are.
        encoded = {
            text: self.encode_text(self.model.tokenizer([text]))[0] for text in dict.fromkeys(texts)
        }
        return jnp.stack([encoded[text] for text in texts])

    def encode_text(self, ids: Int32[np.ndarray, "b l"]) -> Float[Array, "b l e"]:
        """The token features of tokenized prompts."""
        return encode_text(self.model.text_encoder, ids)

    def encode_images(self, images: Float32[np.ndarray, "b H W 3"]) -> Float[Array, "b h w c"]:
        """The scaled latents of pictures in [-1, 1]: the means of the VAE's posterior."""
        return encode_images(self.model.vae, images)

    def decode(self, latents: Float[Array, "b h w c"]) -> UInt8[np.ndarray, "b H W 3"]:
        """The pictures of scaled latents, as 8-bit RGB."""
        return decode(self.model.vae, latents)

    def _encode_reference_sets(
        self, sets: list[Pictures], settings: SamplingSettings
    ) -> list[Float[Array, "k h w c"]]:
        encoded: dict[tuple[int, ...], Array] = {}
        keys = [tuple(map(id, pictures)) for pictures in sets]
        for key, pictures in zip(keys, sets, strict=True):
            if key not in encoded:  # all prompts usually share one set
                encoded[key] = self.encode_references(pictures, settings)
        return [encoded[key] for key in keys]


def _stopping(on_step: Callable[[int, int], bool | None], steps: int) -> OnStep:
    def called(step: int, _: Array) -> None:
        if on_step(step, steps) is False:
            raise Cancelled(f"after step {step} of {steps}")

    return called


def solver_of(schedule: NoiseSchedule, settings: SamplingSettings) -> Solver:
    """The solver that the settings ask for.

    Raises:
        UserError: the schedule or the other settings do not allow it.
    """
    return make_solver(
        settings.solver,
        schedule,
        settings.num_inference_steps,
        spacing=settings.spacing,
        sigmas=settings.sigmas,
        strength=settings.strength,
    )


def size_of(unet: UNetConfig, vae: VAEConfig, settings: SamplingSettings) -> tuple[int, int]:
    """Height and width that are drawn: those asked for, or the model's own.

    Raises:
        UserError: the model cannot draw that size.
    """
    default = vae.downsampling * unet.sample_size
    size = settings.height or default, settings.width or default
    multiple = vae.downsampling * unet.downsampling
    for name, value in zip(("height", "width"), size, strict=True):
        if value % multiple:
            raise UserError(f"{name}: this model needs a multiple of {multiple}, not {value}")
    return size


def check_texts(tokenizer: Tokenizer, prompts: Sequence[str], settings: SamplingSettings) -> None:
    """Warns of every text that is too long for the model, and shows what it will not see.

    Raises:
        UserError: there is one, and `settings.strict`.
    """
    caption = settings.reference_caption
    own = [] if caption is None or caption in get_args(ReferenceCaption) else [caption]
    texts = [*prompts, settings.negative_prompt, *own]
    tokenize_with_warnings(tokenizer, texts, strict=settings.strict)


def spans_all(settings: SamplingSettings) -> bool:
    """Whether every step is guided."""
    return settings.guidance_interval == (0, 1)


def _dtype(precision: Precision) -> jnp.dtype:
    if precision not in get_args(Precision):
        raise UserError(f"precision: {precision!r} is not one of {', '.join(get_args(Precision))}")
    return compute_dtype(precision)
