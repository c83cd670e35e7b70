"""From sentences and pictures to pixels in PyTorch: what our pipeline is compared with.

The networks and schedulers are diffusers' and transformers', the two UNets those of
`torch_bootpig`. The rules that are the pipeline's own are written out here a second time, as
plainly as they can be: where noise comes from, which latents a mask touches, what is put back into
a picture, what becomes of a cut-out. Latents, latents' masks and noise are NCHW; everything runs in
float64.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import diffusers
import jax
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tests.torch_bootpig import Features, Process, TorchBootPIG

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"solver_type": "midpoint"}),
    # Its pipelines switch clipping off, because latents do not live in [-1, 1].
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
}


def make_scheduler(folder: Path, solver: str) -> Any:
    """diffusers' scheduler of that name, as it reads the model's configuration."""
    kind, settings = SCHEDULERS[solver]
    return kind.from_config(read_config(folder), **settings)


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


def initial_noise(seed: int, prompts: int, images: int, height: int, width: int) -> Tensor:
    """Of each prompt's pictures, in the order in which they are handed over."""
    return torch.stack(
        [
            _normal(seed, 0, p, j, shape=(height, width, 4))
            for p in range(prompts)
            for j in range(images)
        ]
    )


def reference_noise(seed: int, prompt: int, steps: int, k: int, height: int, width: int) -> Tensor:
    """[steps, k, 4, height, width] for one prompt; all its pictures share it."""
    return _normal(seed, 1, prompt, shape=(steps, k, height, width, 4))


def _normal(seed: int, *path: int, shape: tuple[int, ...]) -> Tensor:
    key = jax.random.key(seed)
    for number in path:
        key = jax.random.fold_in(key, number)
    drawn = np.asarray(jax.random.normal(key, shape), np.float64)
    return torch.from_numpy(np.moveaxis(drawn, -1, -3).copy())


@dataclasses.dataclass(frozen=True)
class References:
    """Of one prompt, and how they are seen.

    `latents` is [k, c, h, w], `noise` [steps, k, c, h, w]; without it they stay clean, at t = 0.
    """

    latents: Tensor
    noise: Tensor | None
    caption: str
    key_scale: float = 1.0
    strategy: str = "softmax"


@dataclasses.dataclass(frozen=True)
class Kept:
    """A picture's clean latents [c, h, w], and where [h, w] they are drawn anew."""

    latents: Tensor
    touched: Tensor


@dataclasses.dataclass(frozen=True)
class TorchModel:
    """A Stable Diffusion, or a BootPIG, from its folders."""

    folder: Path
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unets: TorchBootPIG

    @classmethod
    def load(cls, folder: Path, bootpig: Path) -> Self:
        return cls(
            folder,
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            CLIPTextModel.from_pretrained(folder / "text_encoder").double(),
            AutoencoderKL.from_pretrained(folder / "vae").double(),
            TorchBootPIG(
                *(
                    UNet2DConditionModel.from_pretrained(bootpig / name)
                    for name in ("base_unet", "ref_unet")
                )
            ),
        )

    @torch.no_grad()
    def features(self, text: str) -> Tensor:
        """[1, l, e], padded to the model's length."""
        ids = self.tokenizer(
            text, padding="max_length", max_length=self.tokenizer.model_max_length
        ).input_ids
        return self.text_encoder(torch.tensor([ids])).last_hidden_state

    @torch.no_grad()
    def encode(self, rgb: np.ndarray) -> Tensor:
        """The latents of an 8-bit picture, as the UNets see them."""
        x = torch.from_numpy(rgb.astype(np.float64) / 255 * 2 - 1).permute(2, 0, 1)
        return 0.18215 * self.vae.encode(x[None]).latent_dist.mean[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """The 8-bit picture of latents."""
        x = self.vae.decode(latents[None] / 0.18215).sample[0].permute(1, 2, 0).numpy()
        return np.rint(255 * ((x + 1) / 2).clip(0, 1)).astype(np.uint8)

    @torch.no_grad()
    def draw(
        self,
        noise: Tensor,
        prompt: str,
        negative_prompt: str,
        *,
        solver: str,
        steps: int,
        strength: float = 1.0,
        guidance_scale: float,
        image_guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        references: References | None = None,
        kept: Kept | None = None,
    ) -> np.ndarray:
        """One picture, by Eq. 4 at every timestep; without references its middle term is 0."""
        config = read_config(self.folder)
        process = Process(
            config["beta_start"], config["beta_end"], config.get("prediction_type", "epsilon")
        )
        scheduler = make_scheduler(self.folder, solver)
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps[steps - math.floor(steps * strength) :]

        text, empty = self.features(prompt), self.features(negative_prompt)
        x = noise
        for i, t in enumerate(timesteps):
            if i == 0 and strength < 1:
                assert kept is not None
                x = process.noised(kept.latents, noise, t)[0]
            if kept is not None:
                x = torch.where(kept.touched, x, process.noised(kept.latents, noise, t)[0])
            at = (x[None], t[None])
            seen: list[Features] = []
            how: dict[str, Any] = {}
            if references is not None:
                seen = self._features_at(references, process, i, t)
                how = {"key_scale": references.key_scale, "strategy": references.strategy}
            output = u_rsa_text = self.unets.predict(*at, text, seen, **how)
            if guidance_interval[0] <= i / len(timesteps) < guidance_interval[1]:
                u = self.unets.predict(*at, empty, [])
                u_rsa = self.unets.predict(*at, empty, seen, **how)
                output = (
                    u + image_guidance_scale * (u_rsa - u) + guidance_scale * (u_rsa_text - u_rsa)
                )
            x = scheduler.step(output[0], t, x).prev_sample
        if kept is not None:
            x = torch.where(kept.touched, x, kept.latents)
        return self.decode(x)

    def _features_at(
        self, references: References, process: Process, i: int, t: Tensor
    ) -> list[Features]:
        """Of each reference, noised with step i's noise to its t."""
        text = self.features(references.caption)
        if references.noise is None:
            latents, t = references.latents, torch.zeros_like(t)
        else:
            latents = process.noised(references.latents, references.noise[i], t)
        return [self.unets.features(one[None], t[None], text) for one in latents]


Box = tuple[int, int, int, int]  # top, left, height, width


def touched_latents(mask: np.ndarray, window: Box, height: int, width: int) -> Tensor:
    """The latents [height, width] of a window under which any part of a masked pixel lies."""
    touched = np.zeros((height, width), bool)
    for i in range(height):
        for j in range(width):
            rows = _covered(i, height, window[0], window[2])
            columns = _covered(j, width, window[1], window[3])
            touched[i, j] = mask[rows, columns].any()
    return torch.from_numpy(touched)


def _covered(i: int, latents: int, start: int, length: int) -> slice:
    """The pixels of a picture that the latent i of a row or column covers, in part at least."""
    first, end = Fraction(i * length, latents), Fraction((i + 1) * length, latents)
    return slice(max(0, start + math.floor(first)), max(0, start + math.ceil(end)))


def view(rgb: np.ndarray, window: Box, height: int, width: int) -> np.ndarray:
    """What the model sees of a window; beyond the picture's edges its last pixels go on."""
    top, left, rows, columns = window
    y = np.arange(top, top + rows).clip(0, rgb.shape[0] - 1)
    x = np.arange(left, left + columns).clip(0, rgb.shape[1] - 1)
    cut = Image.fromarray(rgb[y][:, x])
    return np.asarray(cut.resize((width, height), Image.Resampling.BICUBIC))


def pasted(rgb: np.ndarray, mask: np.ndarray, window: Box, drawn: np.ndarray) -> np.ndarray:
    """A picture with what was drawn put back where the mask is.

    The drawn part comes in over 8 of its pixels from the mask's edge inwards, at most over half of
    the mask's inner radius and at least over one pixel of the picture.
    """
    top, left, rows, columns = window
    new = np.asarray(Image.fromarray(drawn).resize((columns, rows), Image.Resampling.BICUBIC))
    outside = np.argwhere(~mask)
    depth = {
        (y, x): np.sqrt(((outside - (y, x)) ** 2).sum(axis=1)).min() for y, x in np.argwhere(mask)
    }
    reach = max(1, min(8 * columns / drawn.shape[1], max(depth.values()) / 2))
    result = rgb.copy()
    for (y, x), inside in depth.items():
        share = min(1, inside / reach)
        old = rgb[y, x].astype(np.float64)
        result[y, x] = np.rint(old + share * (new[y - top, x - left] - old))
    return result


def on_white(subject: np.ndarray, height: int, width: int) -> np.ndarray:
    """A cut-out in the model's size: with a margin of 5 % of its longer side, in the middle."""
    margin = round(0.05 * max(subject.shape[:2]))
    rows, columns = (side + 2 * margin for side in subject.shape[:2])
    framed = np.full((rows, columns, 3), 255, np.uint8)
    framed[margin : rows - margin, margin : columns - margin] = subject
    scale = min(height / rows, width / columns)
    size = round(columns * scale), round(rows * scale)
    canvas = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    canvas[top : top + size[1], left : left + size[0]] = np.asarray(
        Image.fromarray(framed).resize(size, Image.Resampling.BICUBIC)
    )
    return canvas


def assert_same_pictures(
    ours: Sequence[Image.Image], theirs: Sequence[np.ndarray], mask: np.ndarray | None = None
) -> None:
    """To 1 of 255 in every channel of every pixel, and equal but where a rounding is undecided.

    That there is something to see is asserted, too: contrast, and no two pictures alike. With a
    mask that and the roundings are counted inside it.
    """
    assert [picture.mode for picture in ours] == ["RGB"] * len(theirs)
    expected = np.stack(theirs).astype(int)
    found = np.stack([np.asarray(picture) for picture in ours]).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1
    if mask is not None:
        found, expected = found[:, mask], expected[:, mask]
    # Cutting off instead of rounding would change half of them by 1.
    assert (found != expected).mean() < 0.01
    assert expected.std(axis=tuple(range(1, expected.ndim - 1))).min() > 20
    for one, other in itertools.combinations(expected, 2):
        assert np.abs(one - other).mean() > 5
