"""The training step: what trains, what the dropouts do, and that no mesh changes the result."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bootpig_jax.bootpig import BootPIG
from bootpig_jax.checkpoints.diffusers import load_stable_diffusion
from bootpig_jax.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainableConfig,
    TrainConfig,
)
from bootpig_jax.models.unet import UNet
from bootpig_jax.training.flops import equations
from bootpig_jax.training.optimizer import Parameters, make_optimizer, part_of
from bootpig_jax.training.sharding import make_mesh, partition_specs, place, place_batch
from bootpig_jax.training.step import (
    Batch,
    Draws,
    Encoded,
    Frozen,
    Graphs,
    Metrics,
    Pictures,
    Posterior,
    TrainState,
    accumulate,
    bootpig_loss,
    draw,
    encode,
    first_state,
    init_state,
    loss_by_timestep,
    make_train_step,
    merge_parameters,
    split_parameters,
    take_apart,
    unit_range,
)
from tests.sampling_models import UNET, random_network

BATCH = 16
LATENTS = (BATCH, 8, 8, 4)
SMALL = dataclasses.replace(
    UNET,
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
)
FLOAT32 = jnp.dtype("float32")


@dataclasses.dataclass(frozen=True)
class Parts:
    graphs: Graphs
    trainable: Parameters
    frozen: Frozen
    pictures: Batch


@pytest.fixture(scope="module")
def parts(model_folder: Path) -> Parts:
    # One resolution: every program of this file is compiled in each run of the tests.
    unet = random_network(UNet, SMALL, 1)
    model = dataclasses.replace(load_stable_diffusion(model_folder), unet=unet)
    bootpig = BootPIG.from_unet(model.unet)
    graphs, trainable, frozen = take_apart(model, bootpig, TrainableConfig(), FLOAT32)
    rng = np.random.default_rng(0)
    pictures = Pictures(
        target=rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8),
        reference=rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8),
        caption=model.tokenizer([f"dog {i}" for i in range(BATCH)]),
        reference_caption=model.tokenizer([f"cat {i}" for i in range(BATCH)]),
    )
    return Parts(graphs, jax.tree.map(np.asarray, trainable), frozen, pictures)


def configuration(**changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "model": ModelConfig(base="unused"),
        "data": DataConfig(dir=Path("unused"), image_size=16),
        "output_dir": Path("unused"),
        "batch_size": BATCH,
        "optimizer": OptimizerConfig(lr_reference=1e-3, lr_rsa=2e-3),
        "mesh": {"fsdp_min_size": 1},
    }
    return TrainConfig(**(fields | changes))


def run(
    parts: Parts, config: TrainConfig, steps: int, devices: int
) -> tuple[TrainState, list[Metrics]]:
    """Trains on one batch; a last update whose loss is not finite must change nothing.

    Also follows the running average, if there is one.
    """
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    optimizer = make_optimizer(config.optimizer, config.steps)
    min_size = config.mesh.fsdp_min_size
    decay = config.ema_decay
    state = init_state(dict(parts.trainable), optimizer, mesh, min_size, ema=decay is not None)
    average = {} if decay is None else parts.trainable
    frozen = place(parts.frozen, partition_specs(parts.frozen, mesh, min_size), mesh)
    step = make_train_step(parts.graphs, optimizer, config, mesh, state, frozen)
    history = []
    for _ in range(steps):
        state, metrics = step(state, frozen, place_batch(parts.pictures, mesh))
        history.append(metrics)
        trained = jax.device_get(state.trainable)
        average = {n: decay * average[n] + (1 - decay) * trained[n] for n in average}
    for name in average:
        np.testing.assert_allclose(state.ema[name], average[name], rtol=1e-5, atol=1e-7)
    before = jax.device_get(state)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, frozen)
    state, metrics = step(state, broken, place_batch(parts.pictures, mesh))
    assert metrics["skipped"] == 1 and state.step == before.step + 1
    after = dataclasses.replace(jax.device_get(state), step=before.step)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    return before, jax.device_get(history)


def test_bytes_become_what_division_makes_of_them() -> None:
    values = np.arange(256, dtype=np.uint8)
    expected = np.divide(values, 127.5, dtype=np.float32) - np.float32(1)
    assert expected[0] == -1 and expected[255] == 1
    pictures = np.broadcast_to(values[:, None], (2, 3, 256, 3))
    for function in (unit_range, jax.jit(unit_range)):
        found = np.asarray(function(jnp.asarray(pictures)))
        np.testing.assert_array_equal(found, expected[pictures])


STEPS, MANY_STEPS = 3, 10


@pytest.fixture(scope="module")
def one_device(parts: Parts) -> tuple[TrainState, list[Metrics]]:
    return run(parts, configuration(), STEPS, devices=1)


@pytest.fixture(scope="module")
def one_device_many_steps(parts: Parts) -> tuple[TrainState, list[Metrics]]:
    return run(parts, configuration(), MANY_STEPS, devices=1)


def adam_moments(state: TrainState, moment: str) -> dict[str, np.ndarray]:
    """The optimiser's first (`mu`) or second (`nu`) moments by parameter name."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.optimizer)[0]:
        if any(getattr(key, "name", None) == moment for key in path):
            found[path[-1].key] = leaf
    return found


def test_trained_changed_and_optimised_are_one_set(parts, one_device):
    state, _ = one_device
    names = set(parts.trainable)
    assert {part_of(name) for name in names} == {"base", "reference"}
    assert all(".attn1." in name for name in names if part_of(name) == "base")
    assert set(adam_moments(state, "mu")) == set(adam_moments(state, "nu")) == names
    # The second moment is a mean of squared gradients: zero only if no step had one.
    assert {name for name, nu in adam_moments(state, "nu").items() if nu.any()} == names
    changed = {n for n, before in parts.trainable.items() if (state.trainable[n] != before).any()}
    assert changed == names
    assert all(array.dtype == np.float32 for array in state.trainable.values())


def all_parameters(parts: Parts) -> Parameters:
    return {**parts.trainable, **parts.frozen.unets}


@pytest.fixture(scope="module")
def loss_and_gradients(parts: Parts) -> Callable[..., Any]:
    """(parameters, encoded, draws) -> ((loss, losses), gradients), `same` timestep."""

    def loss(parameters: Parameters, encoded: Encoded, draws: Draws) -> tuple[Any, Any]:
        losses, _ = bootpig_loss(
            merge_parameters(parts.graphs.bootpig, parameters),
            encoded,
            parts.frozen.empty_text,
            draws,
            parts.graphs.schedule,
        )
        return losses.mean(), losses

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def random_encoded(seed: int) -> Encoded:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return Encoded(
        target=Posterior(normal(*LATENTS), np.full(LATENTS, 0.1, np.float32)),
        reference=Posterior(normal(*LATENTS), np.full(LATENTS, 0.1, np.float32)),
        text=normal(BATCH, 16, 16),
        reference_text=normal(BATCH, 16, 16),
    )


def random_draws(**changes: Any) -> Draws:
    draws = draw(
        jax.random.key(1),
        LATENTS,
        num_timesteps=1000,
        reference_dropout=0.15,
        reference_dropout_unit="sample",
        caption_dropout=0.15,
    )
    return dataclasses.replace(draws, **changes)


def test_trained_set_is_what_can_get_a_gradient(parts, loss_and_gradients):
    everything = all_parameters(parts)
    _, gradients = loss_and_gradients(everything, random_encoded(0), random_draws())
    reached = {name for name, gradient in gradients.items() if np.any(gradient)}
    trained = {name for name in parts.trainable if part_of(name) == "reference"}
    assert {name for name in reached if part_of(name) == "reference"} == trained
    # All of the Base UNet could be trained; what is not is a choice (Table 2).
    assert {name for name in reached if part_of(name) == "base"} == {
        name for name in everything if part_of(name) == "base"
    }


def test_dropouts_take_away_exactly_what_they_name(parts, loss_and_gradients):
    everything, encoded, other = all_parameters(parts), random_encoded(0), random_encoded(1)
    half = np.arange(BATCH) < BATCH // 2

    def losses(draws: Draws, **changes: Any) -> np.ndarray:
        (_, each), _ = loss_and_gradients(
            everything, dataclasses.replace(encoded, **changes), draws
        )
        return np.asarray(each)

    # Without a reference neither its latents nor its caption matter.
    draws = random_draws(keep_reference=jnp.asarray(half), keep_caption=jnp.ones(BATCH, bool))
    before = losses(draws)
    after = losses(draws, reference=other.reference, reference_text=other.reference_text)
    np.testing.assert_array_equal(before[~half], after[~half])
    assert (before[half] != after[half]).all()
    # Without a caption the Base UNet's text does not matter.
    draws = random_draws(keep_caption=jnp.asarray(half))
    before, after = losses(draws), losses(draws, text=other.text)
    np.testing.assert_array_equal(before[~half], after[~half])
    assert (before[half] != after[half]).all()


def test_clean_references_are_not_noised(parts):
    @jax.jit
    def losses_of(parameters: Parameters, encoded: Encoded, draws: Draws) -> Any:
        return bootpig_loss(
            merge_parameters(parts.graphs.bootpig, parameters),
            encoded,
            parts.frozen.empty_text,
            draws,
            parts.graphs.schedule,
            reference_timestep=0,
        )[0]

    def losses(draws: Draws) -> Any:
        return losses_of(all_parameters(parts), random_encoded(0), draws)

    draws = random_draws(keep_reference=jnp.ones(BATCH, bool))
    noise = jnp.zeros(LATENTS)
    np.testing.assert_array_equal(
        losses(draws), losses(dataclasses.replace(draws, reference_noise=noise))
    )
    assert (losses(draws) != losses(dataclasses.replace(draws, target_noise=noise))).all()


@pytest.fixture(scope="module")
def encoded_parts(parts: Parts) -> Parts:
    """The same batch as latents and text features, as a cache would hold it."""
    encoded = jax.jit(encode)(
        merge_parameters(parts.graphs.vae, parts.frozen.vae),
        merge_parameters(parts.graphs.text_encoder, parts.frozen.text_encoder),
        parts.pictures,
    )
    return dataclasses.replace(parts, pictures=encoded)


@pytest.mark.parametrize(
    ("devices", "mesh", "accumulation", "steps"),
    [
        (8, {"data": 4, "fsdp": 2}, 2, STEPS),
        pytest.param(1, {}, 4, MANY_STEPS, marks=pytest.mark.long),
        pytest.param(8, {"data": 8}, 1, MANY_STEPS, marks=pytest.mark.long),
        pytest.param(8, {"data": 1, "fsdp": 8}, 1, MANY_STEPS, marks=pytest.mark.long),
        pytest.param(8, {"data": 2, "fsdp": 4}, 1, MANY_STEPS, marks=pytest.mark.long),
        pytest.param(8, {"data": 4, "fsdp": 2}, 2, MANY_STEPS, marks=pytest.mark.long),
    ],
)
@pytest.mark.promise("R5", "meshes and accumulation: losses, gradients as on one device")
def test_meshes_and_accumulation_change_nothing(
    encoded_parts, request, devices, mesh, accumulation, steps, found
):
    """... and neither does a batch that was encoded before; `one_device` saw the pictures."""
    config = configuration(
        accumulation=accumulation,
        mesh={"fsdp_min_size": 1, **mesh},
        # In one of the cases: it changes nothing else.
        ema_decay=0.9 if accumulation == 2 else None,
    )
    state, history = run(encoded_parts, config, steps, devices)
    expected_state, expected_history = request.getfixturevalue(
        "one_device" if steps == STEPS else "one_device_many_steps"
    )
    for metrics, expected in zip(history, expected_history, strict=True):
        assert metrics.keys() == expected.keys()
        for name in metrics:
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
    for name, expected in adam_moments(expected_state, "mu").items():
        # Means of gradients. Adam's update itself divides noise by noise where they vanish.
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            adam_moments(state, "mu")[name], expected, atol=1e-4 * scale, err_msg=name
        )
    found(f"{mesh or '1 device'} x {accumulation}, {steps} steps")


@pytest.mark.long
def test_rematerialisation_changes_nothing_but_memory(parts, one_device):
    bootpig = merge_parameters(parts.graphs.bootpig, parts.trainable, parts.frozen.unets)
    bootpig.base.remat = bootpig.reference.remat = True
    graphs = dataclasses.replace(parts.graphs, bootpig=nnx.split(bootpig)[0])
    state, history = run(dataclasses.replace(parts, graphs=graphs), configuration(), STEPS, 1)
    for metrics, expected in zip(history, one_device[1], strict=True):
        for name in metrics:
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)


def test_gradients_are_reduced_once(parts):
    """However many micro-batches: no communication inside the loop over them.

    Weights travel in the precision of the computation, sums in float32.
    """
    config = configuration(accumulation=2, mesh={"data": 4, "fsdp": 2, "fsdp_min_size": 1})
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = jax.eval_shape(lambda t: first_state(t, optimizer), parts.trainable)
    graphs = dataclasses.replace(parts.graphs, dtype=jnp.dtype("bfloat16"))
    step = make_train_step(graphs, optimizer, config, mesh, state, parts.frozen)
    jaxpr = step.trace(state, parts.frozen, parts.pictures).jaxpr
    names = {"psum", "all_gather", "reduce_scatter"}
    assert not names & scan_primitives(jaxpr)
    sent = {
        (equation.primitive.name, operand.aval.dtype.name)
        for equation, _ in equations(jaxpr)
        if equation.primitive.name in names
        for operand in equation.invars
    }
    assert sent == {
        ("all_gather", "bfloat16"),
        ("reduce_scatter", "float32"),
        ("psum", "float32"),
    }


def sub_jaxprs(equation: Any) -> list[Any]:
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if hasattr(leaf, "eqns")]


def primitives(jaxpr: Any, into_scans: bool) -> set[str]:
    found = set()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        # jax renames variants: psum_invariant, psum2, all_gather_reduced.
        found.add(equation.primitive.name)
        for inner in sub_jaxprs(equation):
            found |= primitives(inner, into_scans)
    return found


def scan_primitives(jaxpr: Any) -> set[str]:
    found = set()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for inner in sub_jaxprs(equation):
            if equation.primitive.name == "scan":
                found |= primitives(inner, into_scans=True)
            else:
                found |= scan_primitives(inner)
    return found


def test_one_gradient_that_is_not_finite_changes_nothing(parts, monkeypatch):
    """... although the loss is finite; `run` has shown the reverse."""
    gradients = {name: np.ones_like(array) for name, array in parts.trainable.items()}
    next(iter(gradients.values())).flat[-1] = np.inf
    metrics = loss_by_timestep(jnp.ones(1), jnp.zeros(1, int), 1000)
    monkeypatch.setattr(
        "bootpig_jax.training.step.accumulate",
        lambda *_: ((jnp.ones(()), metrics), jax.tree.map(jnp.asarray, gradients)),
    )
    config = configuration()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = init_state(dict(parts.trainable), optimizer, mesh, 1)
    before = jax.device_get(state)
    step = make_train_step(parts.graphs, optimizer, config, mesh, state, parts.frozen)
    state, metrics = step(state, parts.frozen, place_batch(parts.pictures, mesh))
    assert metrics["skipped"] == 1 and metrics["loss"] == 1 and state.step == 1
    after = dataclasses.replace(jax.device_get(state), step=before.step)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_what_is_trained_is_kept_in_full_precision(model_folder):
    model = load_stable_diffusion(model_folder)
    bootpig, half = BootPIG.from_unet(model.unet), jnp.dtype("bfloat16")
    _, trainable, frozen = take_apart(model, bootpig, TrainableConfig(), half)
    assert {array.dtype for array in jax.tree.leaves(trainable)} == {FLOAT32}
    assert {array.dtype for array in jax.tree.leaves(frozen)} == {half}


def test_accumulate_is_the_mean_over_parts():
    batch = jnp.arange(12.0).reshape(6, 2)
    for parts in (1, 2, 3):
        mean = accumulate(lambda part: {"mean": part.mean(0)}, batch, parts)
        np.testing.assert_allclose(mean["mean"], batch.mean(0))


def test_draws_follow_their_distributions():
    def many(unit: str, key: int) -> Draws:
        return draw(
            jax.random.key(key),
            (20_000, 1, 1, 1),
            num_timesteps=10,
            reference_dropout=0.15,
            reference_dropout_unit=unit,
            caption_dropout=0.4,
        )

    draws = many("sample", 0)
    assert abs(1 - draws.keep_reference.mean() - 0.15) < 0.01
    assert abs(1 - draws.keep_caption.mean() - 0.4) < 0.015
    # Independent of each other.
    assert abs(draws.keep_caption[draws.keep_reference].mean() - 0.6) < 0.015
    np.testing.assert_allclose(np.bincount(draws.t, minlength=10) / 20_000, 0.1, atol=0.01)
    noises = np.stack(
        [
            draws.target_posterior,
            draws.reference_posterior,
            draws.target_noise,
            draws.reference_noise,
        ]
    ).reshape(4, -1)
    np.testing.assert_allclose(np.cov(noises), np.eye(4), atol=0.05)
    together = [many("batch", key).keep_reference for key in range(20)]
    assert all(keep.all() or not keep.any() for keep in together)
    assert 0 < sum(bool(keep.any()) for keep in together) < 20


def test_split_and_merge_are_inverse(parts):
    bootpig = merge_parameters(parts.graphs.bootpig, all_parameters(parts))
    _, picked, rest = split_parameters(bootpig, lambda path: path[0] == "base")
    assert {part_of(name) for name in picked} == {"base"}
    assert {part_of(name) for name in rest} == {"reference"}
    assert picked.keys() | rest.keys() == all_parameters(parts).keys()
