"""Our BootPIG in float32 against `torch_bootpig`, the paper's equations in PyTorch."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import UNet2DConditionModel, UniPCMultistepScheduler
from flax import nnx

from bootpig_jax.attention import STRATEGIES, Strategy
from bootpig_jax.bootpig import BootPIG, is_trainable, reference_features
from bootpig_jax.checkpoints.diffusers import diffusers_name, load_unet, to_torch_layout
from bootpig_jax.config import OptimizerConfig
from bootpig_jax.diffusion.schedule import NoiseSchedule
from bootpig_jax.diffusion.solvers import make_solver
from bootpig_jax.models.blocks import References
from bootpig_jax.models.unet import UNet
from bootpig_jax.sampling.denoise import denoise_with_references
from bootpig_jax.training.optimizer import Parameters, make_optimizer
from bootpig_jax.training.step import (
    Draws,
    Encoded,
    Posterior,
    bootpig_loss,
    merge_parameters,
    split_parameters,
)
from tests import torch_bootpig
from tests.tiny_models import SCHEDULE, torch_unet
from tests.torch_bootpig import Process, TorchBootPIG, nchw, tensor

TOLERANCE = 1e-4
BATCH, K, STEPS = 4, 3, 5
KEY_SCALE = 1.1
T = np.array([3, 421, 650, 999], np.int32)
# Every combination of dropped references and dropped captions.
KEEP_REFERENCE = np.array([True, False, True, False])
KEEP_CAPTION = np.array([True, True, False, False])


@dataclasses.dataclass(frozen=True)
class Case:
    """A setting of training."""

    prediction_type: str = "epsilon"
    reference_timestep: Literal["same", 0] = "same"
    own_reference_text: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {
            "reference_timestep": self.reference_timestep,
            "reference_key_scale": KEY_SCALE,
        }

    @property
    def process(self) -> Process:
        return Process(SCHEDULE["beta_start"], SCHEDULE["beta_end"], self.prediction_type)

    @property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_config({**SCHEDULE, "prediction_type": self.prediction_type})


PAPER = Case()
CASES = {
    "sd21base": PAPER,
    "sd21base-clean-references": Case(reference_timestep=0, own_reference_text=True),
    "sd21": Case("v_prediction", own_reference_text=True),
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


X, TEXT, EMPTY_TEXT = normal(0, BATCH, 8, 8, 4), normal(1, BATCH, 7, 24), normal(2, 7, 24)
REFERENCES, REFERENCE_TEXT = normal(3, BATCH, K, 8, 8, 4), normal(4, BATCH, 7, 24)


def relative_error(ours: Any, theirs: torch.Tensor) -> float:
    expected = theirs.detach().numpy()
    return float(np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """On arrays this small, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base_unet/` and `ref_unet/`, both random and different, as after training."""
    folder = tmp_path_factory.mktemp("bootpig")
    base, reference = torch_unet("sd21base"), torch_unet("sd21base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    base.save_pretrained(folder / "base_unet")
    reference.save_pretrained(folder / "ref_unet")
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> BootPIG:
    return BootPIG(load_unet(folder / "base_unet"), load_unet(folder / "ref_unet"))


def load_torch(folder: Path) -> TorchBootPIG:
    base, reference = (
        UNet2DConditionModel.from_pretrained(folder / name) for name in ("base_unet", "ref_unet")
    )
    return TorchBootPIG(base, reference)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> TorchBootPIG:
    return load_torch(folder)


@jax.jit
def run_unet(
    unet: UNet, x: jax.Array, t: jax.Array, text: jax.Array, seen: References | None = None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return unet(x, t, text, seen)


def compiled(bootpig: BootPIG) -> Any:
    """Each UNet compiled on its own, so that what differs around them compiles nothing anew."""
    return SimpleNamespace(
        base=functools.partial(run_unet, bootpig.base),
        reference=functools.partial(run_unet, bootpig.reference),
    )


def batch(case: Case, seed: int) -> tuple[Encoded, Draws]:
    noise = normal(seed, 8, BATCH, 8, 8, 4)
    text = normal(seed + 1, 2, BATCH, 7, 24)
    encoded = Encoded(
        target=Posterior(jnp.asarray(noise[0]), jnp.asarray(0.1 * np.abs(noise[1]))),
        reference=Posterior(jnp.asarray(noise[2]), jnp.asarray(0.1 * np.abs(noise[3]))),
        text=jnp.asarray(text[0]),
        reference_text=jnp.asarray(text[1]) if case.own_reference_text else None,
    )
    draws = Draws(*map(jnp.asarray, (*noise[4:], T, KEEP_REFERENCE, KEEP_CAPTION)))
    return encoded, draws


def split(bootpig: BootPIG) -> tuple[nnx.GraphDef, Parameters, Parameters]:
    return split_parameters(bootpig, lambda path: is_trainable(path, bootpig.base.config))


def loss_and_gradients(
    graph: nnx.GraphDef,
    case: Case,
    trained: Parameters,
    frozen: Parameters,
    encoded: Encoded,
    draws: Draws,
) -> tuple[jax.Array, Parameters]:
    """Each sample's loss, and the gradients of their mean."""

    def loss(trained: Parameters) -> tuple[jax.Array, jax.Array]:
        bootpig = compiled(merge_parameters(graph, trained, frozen))
        empty = jnp.asarray(EMPTY_TEXT)
        losses, _ = bootpig_loss(bootpig, encoded, empty, draws, case.schedule, **case.options)
        return jnp.mean(losses), losses

    gradients, losses = jax.grad(loss, has_aux=True)(trained)
    return losses, gradients


def in_torch(arrays: Parameters) -> dict[str, np.ndarray]:
    """Names and layouts as the PyTorch side has them."""
    renamed = {}
    for name, array in arrays.items():
        path = tuple(name.split("."))
        renamed[diffusers_name(path)] = to_torch_layout(np.asarray(array), path)
    return renamed


def torch_losses(theirs: TorchBootPIG, case: Case, encoded: Encoded, draws: Draws) -> torch.Tensor:
    return torch_bootpig.loss(theirs, case.process, encoded, EMPTY_TEXT, draws, **case.options)


def features_of(ours: BootPIG, count: int) -> tuple[jax.Array, ...]:
    """The features of the first `count` references, one reference after the other."""
    reference = compiled(ours).reference
    arrays = jnp.asarray(T), jnp.asarray(REFERENCE_TEXT)
    each = [
        reference_features(reference, jnp.asarray(REFERENCES[:, k : k + 1]), *arrays)
        for k in range(count)
    ]
    return tuple(jnp.concatenate(layer, axis=1) for layer in zip(*each, strict=True))


@pytest.fixture(scope="module")
def features(ours: BootPIG) -> tuple[jax.Array, ...]:
    return features_of(ours, K)


@pytest.fixture(scope="module")
def torch_features(theirs: TorchBootPIG) -> list[torch_bootpig.Features]:
    with torch.no_grad():
        t, text = torch.from_numpy(T), tensor(REFERENCE_TEXT)
        return [theirs.features(nchw(REFERENCES[:, k]), t, text) for k in range(K)]


def test_features(
    features: tuple[jax.Array, ...], torch_features: list[torch_bootpig.Features]
) -> None:
    blocks = ["down_blocks.0.attentions.0", "mid_block.attentions.0"]
    blocks += ["up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]
    assert list(torch_features[0]) == [f"{name}.transformer_blocks.0.attn1" for name in blocks]
    for feature, *layer in zip(features, *(f.values() for f in torch_features), strict=True):
        assert relative_error(feature, torch.stack(layer, dim=1)) <= TOLERANCE


def test_features_of_two_references_are_those_of_each(ours: BootPIG) -> None:
    t, text = jnp.asarray(T[:2]), jnp.asarray(REFERENCE_TEXT[:2])
    latents = jnp.asarray(REFERENCES[:2, :2])
    both = reference_features(compiled(ours).reference, latents, t, text)
    for together, alone in zip(both, features_of(ours, 2), strict=True):
        np.testing.assert_allclose(together, alone[:2], rtol=1e-5, atol=1e-5)


# One reference needs no pooling (`test_attention`), so one strategy stands for all.
@pytest.mark.parametrize(
    ("strategy", "count"), [("softmax", 1), *((strategy, K) for strategy in STRATEGIES)]
)
def test_prediction(
    ours: BootPIG,
    theirs: TorchBootPIG,
    features: tuple[jax.Array, ...],
    torch_features: list[torch_bootpig.Features],
    strategy: Strategy,
    count: int,
) -> None:
    seen = References(
        tuple(f[:, :count] for f in features), jnp.asarray(KEEP_REFERENCE), KEY_SCALE, strategy
    )
    prediction, _ = run_unet(ours.base, X, T, TEXT, seen)
    with torch.no_grad():
        arrays = (nchw(X), torch.from_numpy(T), tensor(TEXT))
        expected = theirs.predict(
            *arrays,
            torch_features[:count],
            keep=KEEP_REFERENCE.tolist(),
            key_scale=KEY_SCALE,
            strategy=strategy,
        ).movedim(1, -1)
        stock = theirs.predict(*arrays, []).movedim(1, -1)
    assert relative_error(prediction, expected) <= TOLERANCE
    assert relative_error(prediction[~KEEP_REFERENCE], stock[~KEEP_REFERENCE]) <= TOLERANCE
    assert relative_error(prediction[KEEP_REFERENCE], stock[KEEP_REFERENCE]) > 0.01


def test_zero_references_are_stock_stable_diffusion(
    ours: BootPIG, features: tuple[jax.Array, ...]
) -> None:
    stock, _ = run_unet(ours.base, X, T, TEXT)
    # RSA over references of no tokens: the same bits.
    nothing = References(tuple(f[:, :1, :0] for f in features), key_scale=KEY_SCALE)
    np.testing.assert_array_equal(run_unet(ours.base, X, T, TEXT, nothing)[0], stock)
    # Dropped references leave no trace, but the sums run over masked tokens too.
    first, other = (
        run_unet(ours.base, X, T, TEXT, References(one, jnp.zeros(BATCH, bool), KEY_SCALE))[0]
        for one in (tuple(f[:, i : i + 1] for f in features) for i in (0, 1))
    )
    np.testing.assert_array_equal(first, other)
    np.testing.assert_allclose(first, stock, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_gradients(ours: BootPIG, folder: Path, case: Case) -> None:
    graph, trained, frozen = split(ours)
    encoded, draws = batch(case, seed=10)
    losses, gradients = loss_and_gradients(graph, case, trained, frozen, encoded, draws)
    theirs = load_torch(folder)
    expected = torch_losses(theirs, case, encoded, draws)
    assert relative_error(losses, expected) <= TOLERANCE
    expected.mean().backward()
    with_gradient = theirs.trained()
    assert in_torch(gradients).keys() == with_gradient.keys()
    for name, gradient in in_torch(gradients).items():
        assert relative_error(gradient, with_gradient[name].grad) <= TOLERANCE, name


def test_three_updates(ours: BootPIG, folder: Path) -> None:
    """AdamW with two learning rates behind one clipping."""
    rates = {"base": 2e-4, "reference": 5e-4}
    # The paper's norm of 1 would clip nothing here.
    config = OptimizerConfig(lr_reference=rates["reference"], lr_rsa=rates["base"], clip_norm=0.1)
    optimizer = make_optimizer(config, steps=3)
    batches = [batch(PAPER, seed) for seed in (20, 30, 40)]

    @jax.jit
    def update(gradients: Parameters, state: Any, trained: Parameters) -> tuple[Parameters, Any]:
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state

    graph, start, frozen = split(ours)
    trained, state = start, jax.jit(optimizer.init)(start)
    for encoded, draws in batches:
        _, gradients = loss_and_gradients(graph, PAPER, trained, frozen, encoded, draws)
        trained, state = update(gradients, state, trained)

    theirs = load_torch(folder)
    parameters = {
        f"{network}.{name}": parameter
        for network in rates
        for name, parameter in getattr(theirs, network).named_parameters()
    }
    named = {name: parameters[name] for name in in_torch(start)}
    torch_optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in named.items() if name.startswith(network)], "lr": rate}
            for network, rate in rates.items()
        ],
        weight_decay=1e-2,
    )
    for encoded, draws in batches:
        torch_optimizer.zero_grad()
        torch_losses(theirs, PAPER, encoded, draws).mean().backward()
        assert torch.nn.utils.clip_grad_norm_(named.values(), config.clip_norm) > 0.2
        torch_optimizer.step()

    def distance(weight: np.ndarray, expected: torch.Tensor, start: Any) -> float:
        """Of the whole tensor: Adam blows up the rounding of single gradients that are almost 0."""
        difference = tensor(weight) - expected.detach()
        return float(difference.norm() / (expected.detach() - start).norm())

    before = in_torch(start)
    for name, weight in in_torch(trained).items():
        assert distance(weight, named[name], 0) <= TOLERANCE, name
        assert distance(weight, named[name], tensor(before[name])) <= 1e-2, name


def test_phi_starts_as_a_copy_of_theta(ours: BootPIG) -> None:
    bootpig = BootPIG.from_unet(ours.base)
    base, reference = (
        jax.tree.leaves(nnx.state(unet, nnx.Param)) for unet in (bootpig.base, bootpig.reference)
    )
    for theta, phi in zip(base, reference, strict=True):
        np.testing.assert_array_equal(theta, phi)
        # A shared buffer could not be donated.
        assert theta.unsafe_buffer_pointer() != phi.unsafe_buffer_pointer()


@pytest.mark.parametrize("count", [1, 2])
def test_guided_sampling_is_eq_4_step_by_step(
    ours: BootPIG, theirs: TorchBootPIG, count: int
) -> None:
    arrays = {
        "initial_latents": X[:2],
        "text": TEXT[:2],
        "empty_text": EMPTY_TEXT[None],
        "reference_latents": REFERENCES[:2, :count],
        "reference_text": REFERENCE_TEXT[:2],
        "reference_noise": normal(50, STEPS, 2, count, 8, 8, 4),
    }
    options: dict[str, Any] = {
        "image_guidance_scale": 3.0,
        "guidance_scale": 5.0,
        "strategy": "softmax",
    }
    sampled = denoise_with_references(
        ours.base,
        ours.reference,
        **jax.tree.map(jnp.asarray, arrays),
        **options,
        solver=make_solver("unipc", PAPER.schedule, STEPS),
        reference_key_scale=KEY_SCALE,
    )
    scheduler = UniPCMultistepScheduler.from_config(SCHEDULE)
    scheduler.set_timesteps(STEPS)
    expected = torch_bootpig.sample(
        theirs, PAPER.process, scheduler, **arrays, **options, key_scale=KEY_SCALE
    )
    assert relative_error(sampled, expected.movedim(1, -1)) <= TOLERANCE
