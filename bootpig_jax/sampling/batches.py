"""What is drawn together, and from which noise.

Every random number comes from a seed, in a layout that does not depend on how the work is cut into
batches. With `key = jax.random.key(seed)` and f = `jax.random.fold_in`, prompt p's

- image j starts from `normal(f(f(f(key, 0), p), j), (h, w, c))`;
- references get the noise `normal(f(f(key, 1), p), (n, k, h, w, c))` over the n steps, which all
  images of the prompt share.

A picture's last bits also depend on the shape of the batch it is drawn in, because a compiled
program adds in another order for another shape; they do not depend on the other pictures in it.
`Place` is what has to be known to get the same bits again.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a picture was drawn.

    Attributes:
        prompts: how many prompts the batch had.
        images: how many pictures of each.
        row: of the picture, from 0; the pictures of the first prompt come first.
        stepwise: whether the loop was run step by step, for a callback: another program.
    """

    prompts: int
    images: int
    row: int
    stepwise: bool = False


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
    seed: int | Sequence[int],
    *,
    prompts: Sequence[int],
    images: Sequence[int],
    latent_shape: tuple[int, int, int],
    references: int,
    steps: int,
) -> tuple[Float32[Array, "b h w c"], Float32[Array, "n p k h w c"]]:
    """All noise of one batch; the layout is in the module's docstring.

    Args:
        seed: of all prompts, or of each.
        prompts: indices of the prompts.
        images: indices of the pictures of each prompt.
        latent_shape: (h, w, c).
        references: k, how many references each prompt has.
        steps: n, the number of solver steps.

    Returns:
        The initial latents, all pictures of the first prompt first, and the references' noise.
    """
    seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
    keys = jnp.stack([jax.random.key(s) for s in seeds])

    def draw_initial(key: Array, p: Array, j: Array) -> Array:
        initial_key = jax.random.fold_in(key, 0)
        image_key = jax.random.fold_in(jax.random.fold_in(initial_key, p), j)
        return jax.random.normal(image_key, latent_shape)

    def draw_reference_noise(key: Array, p: Array) -> Array:
        shape = (steps, references, *latent_shape)
        reference_key = jax.random.fold_in(key, 1)
        return jax.random.normal(jax.random.fold_in(reference_key, p), shape)

    rows = list(itertools.product(range(len(prompts)), images))
    prompt_of_row, j = (jnp.array(index) for index in zip(*rows, strict=True))
    p = jnp.array(prompts)
    initial = jax.vmap(draw_initial)(keys[prompt_of_row], p[prompt_of_row], j)
    noise = jax.vmap(draw_reference_noise, out_axes=1)(keys, p)
    return initial, noise


def _windows(total: int, size: int) -> Iterator[tuple[int, ...]]:
    """Ranges of `size` that cover `total`; the last one reaches back to be full."""
    for start in range(0, total, size):
        stop = min(start + size, total)
        yield tuple(range(stop - size, stop))
