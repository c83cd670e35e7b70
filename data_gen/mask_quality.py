"""How good the masks are: the segmenter against Toyland's renderer, which knows the truth.

    python -m data_gen.mask_quality --config configs/data_gen_toyland.yaml [key=value ...]

Draws `candidates` subjects with the renderer, cuts them out as the configuration says and prints,
for the masks that pass the filters, their intersection over union with the true ones. It does so
for the renderings themselves and for what the VAE of `pictures.model` makes of them: the pictures
that a text-to-image model draws are the VAE's, and they are blurred.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.toyland import world
from bootpig_jax.toyland.render import Rendering, render
from bootpig_jax.yaml_config import parse_command_line
from data_gen.config import DataGenConfig, FiltersConfig
from data_gen.masks import filtered, make_segmenter
from data_gen.shards import count_text
from data_gen.stages import Rejected, Segmenter

_GOOD_IOU = 0.8
_BATCH = 64


@dataclass(frozen=True)
class Quality:
    """What became of a set of pictures.

    Attributes:
      ious: intersection over union with the truth, of the masks that were kept.
      rejects: pictures rejected, by reason.
    """

    ious: list[float]
    rejects: dict[str, int]

    def __str__(self) -> str:
        """One line for a terminal."""
        count = len(self.ious) + sum(self.rejects.values())
        if not self.ious:
            return f"all {count} rejected ({count_text(self.rejects)})"
        ious = np.array(self.ious)
        good = (ious >= _GOOD_IOU).mean()
        return (
            f"mean IoU {ious.mean():.3f}, {good:.1%} at least {_GOOD_IOU}, worst {ious.min():.2f}; "
            f"kept {len(ious)} of {count}; rejected: {count_text(self.rejects) or 'none'}"
        )


def main() -> None:
    """The command line."""
    config = parse_command_line(
        DataGenConfig,
        None,
        prog="python -m data_gen.mask_quality",
        description="Compare the segmenter's masks with the true ones of Toyland's renderer.",
    )
    segmenter = make_segmenter(config.masks)
    truth = sample_renderings(config.candidates, config.seed)
    sharp = [rendering.image for rendering in truth]
    sets = {"renderings": sharp}
    if config.pictures.model is not None:
        sets["through the VAE"] = through_vae(config.pictures.model, sharp)
    for name, pictures in sets.items():
        print(f"{name}: {measure(segmenter, pictures, truth, config.masks.filters)}", flush=True)


def sample_renderings(count: int, seed: int) -> list[Rendering]:
    """Draws subjects of all categories in turn, in scenes and positions taken at random."""
    rng = np.random.default_rng(seed)
    return [
        render(
            world.sample_subject(rng, world.CATEGORIES[number % len(world.CATEGORIES)]),
            world.SCENES[rng.integers(len(world.SCENES))],
            world.POSITIONS[rng.integers(len(world.POSITIONS))],
            rng,
        )
        for number in range(count)
    ]


def measure(
    segmenter: Segmenter,
    pictures: Sequence[UInt8[np.ndarray, "h w 3"]],
    truth: Sequence[Rendering],
    filters: FiltersConfig,
) -> Quality:
    """Cuts the subjects out of `pictures` and compares the masks with those of `truth`."""
    count = len(pictures)
    names = ["toy"] * count
    ious, rejects = [], Counter[str]()
    found = segmenter.segment(pictures, names, range(count))
    for segmentation, rendering in zip(found, truth, strict=True):
        kept = filtered(segmentation, rendering.mask.shape, filters)
        if isinstance(kept, Rejected):
            rejects[kept.reason] += 1
        else:
            both = (kept.mask & rendering.mask).sum()
            ious.append(float(both / (kept.mask | rendering.mask).sum()))
    return Quality(ious, dict(rejects))


def through_vae(
    model: str, pictures: Sequence[UInt8[np.ndarray, "h w 3"]]
) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Encodes and decodes pictures of one size by the VAE of a text-to-image model.

    Args:
      model: a folder in diffusers layout, or a hub id.
      pictures: of a size that the VAE takes.

    Raises:
      UserError: the VAE cannot be loaded.
    """
    import torch
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(model, subfolder="vae", use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"pictures.model: {model} has no VAE: {reason}") from error
    decoded = []
    with torch.inference_mode():
        for start in range(0, len(pictures), _BATCH):
            batch = torch.from_numpy(np.stack(pictures[start : start + _BATCH]))
            scaled = batch.permute(0, 3, 1, 2).float() / 127.5 - 1
            output = vae.decode(vae.encode(scaled).latent_dist.mode()).sample
            grey = (output.clamp(-1, 1) + 1) * 127.5
            decoded.append(grey.round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return list(np.concatenate(decoded))


if __name__ == "__main__":
    run_cli(main)
