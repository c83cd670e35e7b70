"""What users call: prompts and reference pictures in, pictures out.

Every random number comes from the seed, in a layout that does not depend on how the work is cut
into batches. With `key = jax.random.key(seed)` and f = `jax.random.fold_in`, prompt p's

- image j starts from `normal(f(f(f(key, 0), p), j), (h, w, c))`;
- references get the noise `normal(f(f(key, 1), p), (n, k, h, w, c))` over the n steps, which all
  images of the prompt share.

The references' latents are the means of the VAE's posterior. `draw_noise` computes both arrays, for
replaying a run through `sampling.denoise`.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8
from PIL import Image
from tqdm import tqdm

from bootpig_jax.attention import STRATEGIES, Strategy
from bootpig_jax.checkpoints.diffusers import StableDiffusion, load_stable_diffusion, load_unet
from bootpig_jax.checkpoints.tokenizer import tokenize_with_warnings
from bootpig_jax.diffusion.solvers import SolverName, make_solver
from bootpig_jax.errors import UserError
from bootpig_jax.models.text_encoder import TextEncoder
from bootpig_jax.models.unet import UNet
from bootpig_jax.models.vae import VAE
from bootpig_jax.sampling.conditioning import Conditioning, ReferenceTimestep
from bootpig_jax.sampling.denoise import denoise, denoise_with_references
from bootpig_jax.sampling.references import SEGMENTERS, Segmenter, prepare_references

MAX_REFERENCES = 16
MAX_GUIDANCE = 100.0
MAX_SIDE = 2048
MAX_STEPS = 1000
MAX_IMAGES = 10_000
VAE_BATCH = 4  # pictures that go through the VAE together: its activations are the largest

Precision = Literal["auto", "float32", "bfloat16"]
Pictures = Sequence[Image.Image]


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn, checked on construction, before any model is needed.

    Attributes:
        num_inference_steps: how many times the networks are evaluated.
        image_guidance_scale: eta_im of Eq. 4; unused without references.
        guidance_scale: eta_txt of Eq. 4.
        strategy: how several references are pooled: `softmax`, `concat`, `average` or `argmax`.
        num_images: pictures for each prompt.
        seed: where all noise comes from.
        solver: `unipc` or `ddim`.
        segmenter: how references are cut out; see `sampling.references`.
        height: of the pictures, in pixels; the model's own when `None`.
        width: of the pictures, in pixels; the model's own when `None`.
        batch_size: pictures that are drawn together.
        strict: whether a prompt that is too long is an error rather than a warning.

    Raises:
        UserError: a field is out of its range.
    """

    num_inference_steps: int = 50
    image_guidance_scale: float = 5.0
    guidance_scale: float = 7.5
    strategy: str = "softmax"
    num_images: int = 1
    seed: int = 0
    solver: str = "unipc"
    segmenter: str = "auto"
    height: int | None = None
    width: int | None = None
    batch_size: int = 4
    strict: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        self._check_integer("num_inference_steps", 1, MAX_STEPS)
        self._check_integer("num_images", 1, MAX_IMAGES)
        self._check_integer("batch_size", 1, MAX_IMAGES)
        self._check_integer("seed", 0, 2**32 - 1)
        for name in ("image_guidance_scale", "guidance_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= MAX_GUIDANCE):
                raise UserError(f"{name}: must be a number from 0 to {MAX_GUIDANCE:g}, not {value}")
        self._check_choice("strategy", STRATEGIES)
        self._check_choice("solver", get_args(SolverName))
        self._check_choice("segmenter", SEGMENTERS)
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                self._check_integer(name, 8, MAX_SIDE)
                if getattr(self, name) % 8:
                    raise UserError(f"{name}: must be a multiple of 8, not {getattr(self, name)}")

    def _check_integer(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise UserError(f"{name}: must be an integer from {least} to {most}, not {value!r}")

    def _check_choice(self, name: str, known: Sequence[str]) -> None:
        if getattr(self, name) not in known:
            raise UserError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(known)}")


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
            precision: of weights and computation; `auto` is bfloat16 on accelerators and float32 on
                CPUs.
            allow_pickle: whether PyTorch's pickled weights are opened where there are no
                safetensors. Only tensors are read from them; no code in them is run.

        Raises:
            UserError: a folder or file is missing or damaged.
        """
        if bootpig is not None:
            # Before the large files: a wrong path should not cost a minute.
            for name in ("base_unet", "ref_unet"):
                if not (Path(bootpig) / name).is_dir():
                    raise UserError(f"bootpig: {Path(bootpig) / name} is missing; export it anew")
        conditioning = None if bootpig is None else Conditioning.read(bootpig)
        dtype = _dtype(precision)
        how: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": dtype,
            "allow_pickle": allow_pickle,
        }
        model = load_stable_diffusion(folder, **how)
        if bootpig is None:
            # The same object: sampling changes no weights.
            return cls(model, model.unet)
        base, reference = (
            load_unet(Path(bootpig) / name, **how) for name in ("base_unet", "ref_unet")
        )
        for unet in (base, reference):
            # `sample_size` only says at which resolution the network was trained last.
            sizes = dataclasses.replace(unet.config, sample_size=model.unet.config.sample_size)
            if sizes != model.unet.config:
                raise UserError(
                    f"bootpig: the UNets in {bootpig} are not of the size of {folder}'s"
                )
        return cls(dataclasses.replace(model, unet=base), reference, conditioning)

    def __call__(
        self,
        prompt: str | Sequence[str],
        references: Pictures | Sequence[Pictures] | None = None,
        *,
        num_inference_steps: int = 50,
        image_guidance_scale: float = 5.0,
        guidance_scale: float = 7.5,
        strategy: str = "softmax",
        num_images: int = 1,
        seed: int = 0,
        solver: str = "unipc",
        reference_timestep: ReferenceTimestep | None = None,
        segmenter: str = "auto",
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 4,
        strict: bool = False,
        progress: bool = False,
    ) -> list[Image.Image]:
        """Draws pictures.

        Args:
            prompt: one prompt or several.
            references: pictures of the subject, for all prompts; or one list of pictures for each
                prompt, of equal lengths. `None` draws from the text alone.
            num_inference_steps: as all that follow but two, see `SamplingSettings`.
            image_guidance_scale: eta_im of Eq. 4.
            guidance_scale: eta_txt of Eq. 4.
            strategy: how several references are pooled.
            num_images: pictures for each prompt.
            seed: where all noise comes from.
            solver: `unipc` or `ddim`.
            reference_timestep: "same" or 0; `None`: as the Reference UNet was trained.
            segmenter: how references are cut out.
            height: in pixels.
            width: in pixels.
            batch_size: pictures that are drawn together.
            strict: whether a prompt that is too long is an error.
            progress: whether to show a progress bar on standard error.

        Returns:
            `num_images` pictures of the first prompt, then those of the second, and so on.

        Raises:
            UserError: an argument is out of its range, or a reference can't be used.
        """
        settings = SamplingSettings(
            num_inference_steps=num_inference_steps,
            image_guidance_scale=image_guidance_scale,
            guidance_scale=guidance_scale,
            strategy=strategy,
            num_images=num_images,
            seed=seed,
            solver=solver,
            segmenter=segmenter,
            height=height,
            width=width,
            batch_size=batch_size,
            strict=strict,
        )
        return self.draw(
            prompt, references, settings, reference_timestep=reference_timestep, progress=progress
        )

    def draw(
        self,
        prompt: str | Sequence[str],
        references: Pictures | Sequence[Pictures] | None,
        settings: SamplingSettings,
        *,
        reference_timestep: ReferenceTimestep | None = None,
        progress: bool = False,
    ) -> list[Image.Image]:
        """Draws pictures as `__call__` does, from settings that were checked before."""
        prompts = check_prompts(prompt)
        sets = _reference_sets(references, len(prompts))
        if reference_timestep is None:
            reference_timestep = self.conditioning.reference_timestep
        if reference_timestep not in get_args(ReferenceTimestep):
            raise UserError(f'reference_timestep: use "same" or 0, not {reference_timestep!r}')
        height, width = self._size(settings)
        factor = self.model.vae.config.downsampling
        latent_shape = (
            height // factor,
            width // factor,
            self.model.unet.config.in_channels,
        )
        schedule = self.model.schedule
        solver = make_solver(
            cast(SolverName, settings.solver), schedule, settings.num_inference_steps
        )
        ids = tokenize_with_warnings(self.model.tokenizer, prompts, strict=settings.strict)
        text = self.encode_text(ids)
        empty_text = self.encode_text(self.model.tokenizer([""]))
        count = 0  # of the references that need noise
        reference_latents = reference_text = None
        if sets is not None:
            count = len(sets[0]) if reference_timestep == "same" else 0
            reference_latents = self._encode_reference_sets(sets, height, width, settings)
            captions = [self.conditioning.caption(prompt) for prompt in prompts]
            reference_text = self.encode_text(self.model.tokenizer(captions))

        latents: dict[tuple[int, int], Array] = {}
        batches = list(make_batches(len(prompts), settings.num_images, settings.batch_size))
        for batch in tqdm(
            batches, desc="drawing", unit="batch", disable=not progress, file=sys.stderr
        ):
            p, rows = np.array(batch.prompts), np.array(batch.rows)
            initial, noise = draw_noise(
                settings.seed,
                prompts=batch.prompts,
                images=batch.images,
                latent_shape=latent_shape,
                references=count,
                steps=settings.num_inference_steps,
            )
            if reference_latents is None or reference_text is None:
                drawn = denoise(
                    self.model.unet,
                    initial,
                    text[rows],
                    empty_text,
                    solver=solver,
                    guidance_scale=settings.guidance_scale,
                )
            else:
                drawn = denoise_with_references(
                    self.model.unet,
                    self.reference_unet,
                    initial,
                    text[rows],
                    empty_text,
                    reference_latents[p],
                    reference_text[p],
                    noise if count else None,
                    solver=solver,
                    schedule=schedule,
                    image_guidance_scale=settings.image_guidance_scale,
                    guidance_scale=settings.guidance_scale,
                    strategy=cast(Strategy, settings.strategy),
                    reference_timestep=reference_timestep,
                    reference_key_scale=self.conditioning.reference_key_scale,
                )
            drawn.block_until_ready()
            latents |= dict(zip(batch.pairs, drawn, strict=True))
        order = [(p, j) for p in range(len(prompts)) for j in range(settings.num_images)]
        pixels = self.decode(jnp.stack([latents[pair] for pair in order]))
        return [Image.fromarray(picture) for picture in pixels]

    def encode_text(self, ids: Int32[np.ndarray, "b l"]) -> Float[Array, "b l e"]:
        """The token features of tokenized prompts."""
        graph, state = nnx.split(self.model.text_encoder)
        return _encode_text(graph, state, jnp.asarray(ids))

    def encode_images(self, images: Float32[np.ndarray, "b H W 3"]) -> Float[Array, "b h w c"]:
        """The scaled latents of pictures in [-1, 1]: the means of the VAE's posterior."""
        graph, state = nnx.split(self.model.vae)
        parts = _in_parts(images, VAE_BATCH)
        encoded = [_encode_images(graph, state, jnp.asarray(part)) for part in parts]
        return jnp.concatenate(encoded)[: len(images)]

    def decode(self, latents: Float[Array, "b h w c"]) -> UInt8[np.ndarray, "b H W 3"]:
        """The pictures of scaled latents, as 8-bit RGB."""
        graph, state = nnx.split(self.model.vae)
        parts = _in_parts(np.asarray(latents), VAE_BATCH)
        decoded = [np.asarray(_decode(graph, state, jnp.asarray(part))) for part in parts]
        return np.concatenate(decoded)[: len(latents)]

    def _encode_reference_sets(
        self, sets: list[Pictures], height: int, width: int, settings: SamplingSettings
    ) -> Float[Array, "p k h w c"]:
        encoded: dict[tuple[int, ...], Array] = {}
        keys = [tuple(map(id, pictures)) for pictures in sets]
        for key, pictures in zip(keys, sets, strict=True):
            if key not in encoded:  # all prompts usually share one set
                pixels = prepare_references(
                    pictures, height, width, cast(Segmenter, settings.segmenter)
                )
                encoded[key] = self.encode_images(pixels)
        return jnp.stack([encoded[key] for key in keys])

    def _size(self, settings: SamplingSettings) -> tuple[int, int]:
        factor = self.model.vae.config.downsampling
        unet = self.model.unet.config
        default = factor * unet.sample_size
        size = settings.height or default, settings.width or default
        multiple = factor * unet.downsampling
        for name, value in zip(("height", "width"), size, strict=True):
            if value % multiple:
                raise UserError(f"{name}: this model needs a multiple of {multiple}, not {value}")
        return size


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures that are drawn together: `images` of each of `prompts`.

    Attributes:
        prompts: indices of the prompts.
        images: indices of the pictures, the same for each prompt.
    """

    prompts: tuple[int, ...]
    images: tuple[int, ...]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(prompt, image) of each row of the batch."""
        return [(p, j) for p in self.prompts for j in self.images]

    @property
    def rows(self) -> list[int]:
        """The prompt of each row of the batch."""
        return [p for p, _ in self.pairs]


def make_batches(num_prompts: int, num_images: int, batch_size: int) -> Iterator[Batch]:
    """Cuts the work into batches of one shape, so that there is one program to compile.

    What is missing in the last batch is filled up by drawing some pictures again; batches are made
    as even as they can be, so that this is little.
    """
    images_each = math.ceil(num_images / math.ceil(num_images / batch_size))
    at_once = max(1, batch_size // images_each)
    prompts_each = math.ceil(num_prompts / math.ceil(num_prompts / at_once))
    for prompts in _windows(num_prompts, prompts_each):
        for images in _windows(num_images, images_each):
            yield Batch(prompts, images)


def draw_noise(
    seed: int,
    *,
    prompts: Sequence[int],
    images: Sequence[int],
    latent_shape: tuple[int, int, int],
    references: int,
    steps: int,
) -> tuple[Float32[Array, "b h w c"], Float32[Array, "n p k h w c"]]:
    """All noise of one batch; the layout is in the module's docstring.

    Args:
        seed: the run's seed.
        prompts: indices of the prompts.
        images: indices of the pictures of each prompt.
        latent_shape: (h, w, c).
        references: k, how many references each prompt has.
        steps: n, the number of solver steps.

    Returns:
        The initial latents, all pictures of the first prompt first, and the references' noise.
    """
    key = jax.random.key(seed)
    initial_key, reference_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)

    def draw_initial(p: Array, j: Array) -> Array:
        image_key = jax.random.fold_in(jax.random.fold_in(initial_key, p), j)
        return jax.random.normal(image_key, latent_shape)

    def draw_reference_noise(p: Array) -> Array:
        shape = (steps, references, *latent_shape)
        return jax.random.normal(jax.random.fold_in(reference_key, p), shape)

    p, j = (jnp.array(index) for index in zip(*itertools.product(prompts, images), strict=True))
    initial = jax.vmap(draw_initial)(p, j)
    noise = jax.vmap(draw_reference_noise, out_axes=1)(jnp.array(prompts))
    return initial, noise


def check_prompts(prompt: str | Sequence[str]) -> list[str]:
    """The prompts as a list.

    Raises:
        UserError: there is none, one is no text, or one holds NUL.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UserError("prompt: none given; give at least one")
    for number, text in enumerate(prompts, start=1):
        if not isinstance(text, str):
            raise UserError(f"prompt {number}: must be text, not {type(text).__name__}")
        if "\0" in text:
            raise UserError(f"prompt {number}: holds a NUL character; remove it")
    return prompts


def check_reference_count(count: int) -> None:
    """Refuses too few and too many references.

    Raises:
        UserError: `count` is not from 1 to `MAX_REFERENCES`.
    """
    if not 1 <= count <= MAX_REFERENCES:
        raise UserError(f"references: give from 1 to {MAX_REFERENCES} pictures, not {count}")


def _reference_sets(
    references: Pictures | Sequence[Pictures] | None, num_prompts: int
) -> list[Pictures] | None:
    """One list of pictures for each prompt."""
    if references is None:
        return None
    if isinstance(references, Image.Image):
        raise UserError("references: must be a list of pictures; put the picture in a list")
    nested = [item for item in references if not isinstance(item, Image.Image)]
    sets: list[Pictures]
    if not nested:
        sets = [[item for item in references if isinstance(item, Image.Image)]] * num_prompts
    elif len(nested) != len(references):
        raise UserError("references: must be pictures, or lists of pictures, not both")
    else:
        sets = [list(pictures) for pictures in nested]
    if len(sets) != num_prompts:
        raise UserError(f"references: {len(sets)} lists for {num_prompts} prompts; give one each")
    for pictures in sets:
        check_reference_count(len(pictures))
        if len(pictures) != len(sets[0]):
            raise UserError("references: every prompt needs as many as the others")
        if not all(isinstance(picture, Image.Image) for picture in pictures):
            raise UserError("references: must be PIL pictures; open files with PIL.Image.open")
    return sets


def _windows(total: int, size: int) -> Iterator[tuple[int, ...]]:
    """Ranges of `size` that cover `total`; the last one reaches back to be full."""
    for start in range(0, total, size):
        stop = min(start + size, total)
        yield tuple(range(stop - size, stop))


def _in_parts(values: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Parts of one length; the last is filled up with its last element."""
    size = min(size, len(values))
    for start in range(0, len(values), size):
        part = values[start : start + size]
        yield np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])


def _dtype(precision: Precision) -> jnp.dtype:
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if precision not in get_args(Precision):
        raise UserError(f"precision: {precision!r} is not one of {', '.join(get_args(Precision))}")
    return jnp.dtype(precision)


@partial(jax.jit, static_argnames="graph")
def _encode_text(
    graph: nnx.GraphDef[TextEncoder], state: nnx.State, ids: Int[Array, "b l"]
) -> Float[Array, "b l e"]:
    return nnx.merge(graph, state)(ids)


@partial(jax.jit, static_argnames="graph")
def _encode_images(
    graph: nnx.GraphDef[VAE], state: nnx.State, images: Float[Array, "b H W 3"]
) -> Float[Array, "b h w c"]:
    vae = nnx.merge(graph, state)
    mean, _ = vae.encode(images)
    return vae.config.scaling_factor * mean.astype(jnp.float32)


@partial(jax.jit, static_argnames="graph")
def _decode(
    graph: nnx.GraphDef[VAE], state: nnx.State, latents: Float[Array, "b h w c"]
) -> UInt8[Array, "b H W 3"]:
    images = nnx.merge(graph, state).decode_latents(latents).astype(jnp.float32)
    return jnp.round((images + 1) * 127.5).astype(jnp.uint8)
