"""What a run shows of itself: which weights it takes, and that no held-out sample is left out."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from bootpig_jax.bootpig import BootPIG
from bootpig_jax.checkpoints.diffusers import load_stable_diffusion, load_unet, save_unet
from bootpig_jax.checkpoints.tokenizer import Tokenizer
from bootpig_jax.config import DataConfig, ModelConfig, TrainableConfig, TrainConfig
from bootpig_jax.data.pipeline import first_examples
from bootpig_jax.errors import UserError
from bootpig_jax.models.unet import UNet
from bootpig_jax.sampling.conditioning import Conditioning
from bootpig_jax.train import base_sha256, export
from bootpig_jax.training.loop import make_draw_grid, to_pictures
from bootpig_jax.training.optimizer import Parameters
from bootpig_jax.training.sharding import make_mesh
from bootpig_jax.training.step import (
    Draws,
    Frozen,
    Graphs,
    TrainState,
    bootpig_loss,
    encode,
    merge_parameters,
    split_parameters,
    take_apart,
)
from bootpig_jax.training.validation import make_validation
from tests.sampling_models import UNET, random_network
from tests.training_helpers import save_tiny_data

# One resolution, which compiles faster.
SMALL = dataclasses.replace(
    UNET,
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
)
SAMPLES = 11  # a whole batch of the validation, and a rest


@dataclasses.dataclass(frozen=True)
class Run:
    config: TrainConfig
    graphs: Graphs
    weights: Parameters
    frozen: Frozen
    tokenizer: Tokenizer
    mesh: Mesh

    def state(self, trained: float, average: float | None = None) -> TrainState:
        """A state whose weights, and their average if there is one, are the model's times these."""

        def scaled(factor: float) -> Parameters:
            return {name: factor * array for name, array in self.weights.items()}

        ema = {} if average is None else scaled(average)
        return TrainState(jnp.zeros((), jnp.int32), scaled(trained), (), ema)


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    base = shutil.copytree(model_folder, folder / "model")
    shutil.rmtree(base / "unet")
    save_unet(base / "unet", random_network(UNet, SMALL, 1))
    config = TrainConfig(
        model=ModelConfig(base=str(base)),
        data=DataConfig(dir=save_tiny_data(folder / "data"), image_size=16),
        output_dir=folder / "output",
        ema_decay=0.9,
    )
    model = load_stable_diffusion(base)
    parts = take_apart(
        model, BootPIG.from_unet(model.unet), TrainableConfig(), jnp.dtype("float32")
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    return Run(config, *parts, model.tokenizer, mesh)


def held_out(run: Run) -> Any:
    return first_examples(run.config.data.dir, count=SAMPLES, image_size=16)


@pytest.fixture(scope="module")
def validate(run: Run) -> Any:
    pictures = to_pictures(held_out(run), run.tokenizer, Conditioning())
    return make_validation(run.graphs, run.frozen, pictures, run.config, run.mesh)


def test_validation_takes_every_sample_at_its_own_timestep(run: Run, validate: Any) -> None:
    """The losses of all samples in one batch, from Eq. 1's own function."""
    shape = (SAMPLES, 4, 8, 8, 4)
    noise = jax.random.normal(jax.random.key(0), shape)
    t = (np.arange(SAMPLES) + 0.5) * 1000 / SAMPLES
    draws = Draws(
        *(noise[:, i] for i in range(4)),
        t=jnp.asarray(t, jnp.int32),
        keep_reference=jnp.ones(SAMPLES, bool),
        keep_caption=jnp.ones(SAMPLES, bool),
    )

    @jax.jit
    def losses_of(parameters: Parameters, frozen: Frozen, draws: Draws) -> Any:
        encoded = encode(
            merge_parameters(run.graphs.vae, frozen.vae),
            merge_parameters(run.graphs.text_encoder, frozen.text_encoder),
            to_pictures(held_out(run), run.tokenizer, Conditioning()),
        )
        bootpig = merge_parameters(run.graphs.bootpig, parameters, frozen.unets)
        return bootpig_loss(bootpig, encoded, frozen.empty_text, draws, run.graphs.schedule)[0]

    losses = np.asarray(losses_of(run.weights, run.frozen, draws))
    found = validate(run.state(trained=1.0))
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    for bucket in range(10):
        inside = losses[(100 * bucket <= t) & (t < 100 * (bucket + 1))]
        assert len(inside) >= 1
        name = f"loss_t{bucket}0-{bucket + 1}0"
        assert found[name] == pytest.approx(inside.mean(), rel=1e-5), name


@pytest.fixture(scope="module")
def draw_grid(run: Run) -> Any:
    examples = first_examples(run.config.data.dir, count=1, image_size=16)
    logging = run.config.logging.model_copy(update={"grid_steps": 1})
    return make_draw_grid(run.graphs, run.frozen, run.tokenizer, examples, Conditioning(), logging)


def test_nothing_is_exported_beside_other_weights(run: Run) -> None:
    with pytest.raises(UserError, match="have changed while the run went on"):
        export(run.config, run.state(1.0), run.mesh, Conditioning(), "0" * 64)
    assert not run.config.output_dir.exists()


def exported(run: Run, state: TrainState) -> dict[str, np.ndarray]:
    export(run.config, state, run.mesh, Conditioning(), base_sha256(run.config))
    unets = (load_unet(run.config.output_dir / name) for name in ("base_unet", "ref_unet"))
    _, parameters, _ = split_parameters(BootPIG(*unets), lambda path: True)
    return {name: np.asarray(array) for name, array in parameters.items()}


@pytest.mark.parametrize("shown", ["validation", "grid", "export"])
def test_the_running_average_is_what_is_shown_and_exported(
    run: Run, request: pytest.FixtureRequest, shown: str
) -> None:
    if shown == "export":
        run.config.output_dir.mkdir(exist_ok=True)

    def show(state: TrainState) -> Any:
        match shown:
            case "validation":
                return request.getfixturevalue("validate")(state)
            case "grid":
                return {"grid": request.getfixturevalue("draw_grid")(state)}
            case _:
                return exported(run, state)

    average, trained = show(run.state(trained=1.1)), show(run.state(trained=0.9))
    found = show(run.state(trained=0.9, average=1.1))
    for name, value in average.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert any(np.any(trained[name] != value) for name, value in average.items())
