"""The fast path gives the numbers of Eq. 4-8 taken literally.

Literally: `tests.torch_bootpig`, where in float64 every sample makes its own references' features,
every branch of Eq. 4 is a network call of its own and every ``RSA(f, f_i)`` an attention over
joined tokens.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UniPCMultistepScheduler

from bootpig_jax.attention import STRATEGIES, Strategy
from bootpig_jax.diffusion.schedule import NoiseSchedule
from bootpig_jax.diffusion.solvers import make_solver
from bootpig_jax.sampling.denoise import denoise_with_references
from tests import torch_bootpig
from tests.sampling_models import SCHEDULER, random_unet

STEPS, SETS, EACH = 10, 2, 2
SCALES = {"image_guidance_scale": 3.0, "guidance_scale": 5.0}


@functools.cache
def normal(name: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(list(name.encode())).standard_normal(shape, np.float32)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """On arrays this small, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# One reference needs no pooling, so one strategy stands for all.
@pytest.mark.parametrize(
    ("count", "strategy"),
    [
        (1, "softmax"),
        *((3, strategy) for strategy in STRATEGIES),
        *(pytest.param(6, strategy, marks=pytest.mark.long) for strategy in STRATEGIES),
    ],
)
def test_ten_steps(bootpig_folder: Path, count: int, strategy: Strategy) -> None:
    batch = SETS * EACH
    shared: dict[str, Any] = {
        "initial_latents": normal("initial", batch, 8, 8, 4),
        "text": normal("text", batch, 16, 16),
        "empty_text": normal("empty", 1, 16, 16),
    }
    by_set: dict[str, Any] = {
        "reference_latents": normal("references", SETS, 6, 8, 8, 4)[:, :count],
        "reference_text": normal("reference text", SETS, 16, 16),
        "reference_noise": normal("noise", STEPS, SETS, 6, 8, 8, 4)[:, :, :count],
    }
    ours = denoise_with_references(
        random_unet(4),
        random_unet(5),
        **{name: jnp.asarray(array) for name, array in (shared | by_set).items()},
        **SCALES,
        strategy=strategy,
        reference_key_scale=1.1,
        solver=make_solver("unipc", NoiseSchedule.from_config(SCHEDULER), STEPS),
    )
    scheduler = UniPCMultistepScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(STEPS)
    literal = torch_bootpig.sample(
        torch_bootpig.TorchBootPIG(
            *(
                UNet2DConditionModel.from_pretrained(bootpig_folder / name)
                for name in ("base_unet", "ref_unet")
            )
        ),
        torch_bootpig.Process(SCHEDULER["beta_start"], SCHEDULER["beta_end"], "epsilon"),
        scheduler,
        **shared,
        **{
            name: np.repeat(array, EACH, axis=1 if name == "reference_noise" else 0)
            for name, array in by_set.items()
        },
        **SCALES,
        strategy=strategy,
        key_scale=1.1,
    ).movedim(1, -1)
    error = np.linalg.norm(ours - literal.numpy()) / np.linalg.norm(literal)
    assert error <= 1e-4
