"""The loop: it gives up on what will not get better, and never waits for ever."""

import inspect
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bootpig_jax.bootpig import BootPIG
from bootpig_jax.checkpoints.diffusers import load_stable_diffusion
from bootpig_jax.checkpoints.tokenizer import Tokenizer
from bootpig_jax.config import (
    DataConfig,
    LoggingConfig,
    ModelConfig,
    TrainableConfig,
    TrainConfig,
)
from bootpig_jax.errors import UserError
from bootpig_jax.sampling.conditioning import Conditioning
from bootpig_jax.sampling.denoise import denoise_with_references
from bootpig_jax.sampling.encoding import encode_images, encode_text
from bootpig_jax.training import loop, validation
from bootpig_jax.training.loop import make_draw_grid, run_steps, to_pictures
from bootpig_jax.training.metrics import MetricLogger, read_history
from bootpig_jax.training.sharding import make_mesh
from bootpig_jax.training.step import (
    Frozen,
    Graphs,
    Pictures,
    TrainState,
    merge_parameters,
    take_apart,
)
from bootpig_jax.training.validation import make_validation


def configuration(folder: Path, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "model": ModelConfig(base="base"),
        "data": DataConfig(dir=Path("data")),
        "output_dir": folder,
        "steps": 30,
        "checkpoint": {"every": 4},
        "logging": {"every": 3},
    }
    return TrainConfig(**(fields | changes))


class Saves:
    """Stands for the checkpoints: notes which steps were saved."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def save(self, state: TrainState, data: Any) -> None:
        self.steps.append(int(state.step))


def train(config: TrainConfig, broken: set[int], saves: Saves) -> None:
    """Runs the loop over updates of which those in `broken` are not finite."""

    def train_step(state: TrainState, frozen: Any, batch: Any) -> Any:
        step = int(state.step) + 1
        skipped = float(step in broken)
        loss = jnp.float32("nan" if skipped else step)
        metrics = {
            "loss": loss,
            "skipped": jnp.float32(skipped),
            "loss_in_bucket": jnp.full(10, loss / 10).at[3].set(0),
            "bucket_count": jnp.full(10, 0.1).at[3].set(0),
        }
        return TrainState(state.step + 1, {}, (), {}), metrics

    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with MetricLogger(config, first_step=0) as logger:
        run_steps(
            train_step,
            TrainState(jnp.zeros((), jnp.int32), {}, (), {}),
            None,
            iter(lambda: {}, None),
            lambda batch: batch,
            config=config,
            mesh=mesh,
            checkpoints=saves,
            logger=logger,
        )


@pytest.mark.promise("R7", "NaN: the run stops after N updates in a row")
def test_gives_up_after_many_skipped_updates_in_a_row(tmp_path):
    config = configuration(tmp_path, safety={"max_skipped": 5})
    saves = Saves()
    train(config, {2, 3, 4, 5, 7, 8, 9, 20}, saves)  # at most four in a row
    assert saves.steps == [4, 8, 12, 16, 20, 24, 28, 30]
    rows = read_history(tmp_path)
    assert [row["step"] for row in rows] == list(range(3, 31, 3))
    # Of updates 1 to 3, the first was made; nothing was drawn from one tenth of the timesteps.
    assert rows[0]["skipped"] == 2 and rows[0]["loss"] == rows[0]["loss_t20-30"] == 1
    assert "loss_t30-40" not in rows[0] and rows[0]["lr_reference"] == pytest.approx(5e-6)
    saves = Saves()
    with pytest.raises(UserError, match="were not finite in 5 updates in a row") as caught:
        train(config, set(range(11, 31)), saves)
    assert "\n" not in str(caught.value)
    assert saves.steps[-1] <= 16


class Words:
    """Stands for the tokenizer: a text's ids are its letters' numbers."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[ord(letter) for letter in text.ljust(12)[:12]] for text in texts])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("target", None), ("first_clause", ["a red cup"]), ("object", ["cup"])],
)
def test_the_reference_unet_reads_what_it_is_configured_to(kind, expected):
    batch = {
        "target": np.zeros((1, 8, 8, 3), np.uint8),
        "reference": np.ones((1, 8, 8, 3), np.uint8),
        "caption": np.array(["a red cup, there"]),
        "object": np.array(["cup"]),
    }
    pictures = to_pictures(batch, Words(), Conditioning(reference_caption=kind))
    np.testing.assert_array_equal(pictures.caption, Words()(["a red cup, there"]))
    assert pictures.target is batch["target"] and pictures.reference is batch["reference"]
    if expected is None:
        assert pictures.reference_caption is None  # the same
    else:
        np.testing.assert_array_equal(pictures.reference_caption, Words()(expected))


@pytest.fixture(scope="module")
def parts(model_folder: Path) -> tuple[Graphs, Frozen, Tokenizer, TrainState]:
    model = load_stable_diffusion(model_folder)
    bootpig, dtype = BootPIG.from_unet(model.unet), jnp.dtype("float32")
    graphs, trainable, frozen = take_apart(model, bootpig, TrainableConfig(), dtype)
    return graphs, frozen, model.tokenizer, TrainState(jnp.zeros((), jnp.int32), trainable, (), {})


@pytest.mark.parametrize("timestep", ["same", 0])
def test_a_grid_uses_references_as_training_does(parts, monkeypatch, timestep):
    """What it hands to the denoising loop, and how it shows what comes back."""
    graphs, frozen, tokenizer, state = parts
    rng = np.random.default_rng(0)
    examples = {
        "reference": rng.integers(0, 256, (2, 16, 16, 3), np.uint8),
        "caption": np.array(["a cup, there", "a hat, here"]),
        "object": np.array(["cup", "hat"]),
    }
    conditioning = Conditioning(timestep, 1.3, "object")
    logging = LoggingConfig(
        grid_steps=4, grid_prompts=("{object} in snow", "a {object}"), guidance_scale=3.0
    )
    given: dict[str, Any] = {}
    drawn = jnp.asarray(rng.standard_normal((4, 8, 8, 4)), jnp.float32)

    def denoise(*positional: Any, **named: Any) -> jax.Array:
        signature = inspect.signature(denoise_with_references)
        given.update(signature.bind(*positional, **named).arguments)
        return drawn

    monkeypatch.setattr(loop, "denoise_with_references", denoise)
    draw = make_draw_grid(graphs, frozen, tokenizer, examples, conditioning, logging)
    grid = draw(state)
    encoder = merge_parameters(graphs.text_encoder, frozen.text_encoder)
    vae = merge_parameters(graphs.vae, frozen.vae)
    for name, texts in (
        ("text", ["cup in snow", "a cup", "hat in snow", "a hat"]),
        ("reference_text", ["cup", "hat"]),
        ("empty_text", [""]),
    ):
        wanted = encode_text(encoder, tokenizer(texts))
        np.testing.assert_allclose(given[name], wanted, atol=1e-5, err_msg=name)
    references = np.float32(examples["reference"])
    latents = encode_images(vae, references / np.float32(127.5) - 1)
    np.testing.assert_allclose(given["reference_latents"], latents[:, None], atol=1e-5)
    assert given["reference_key_scale"] == 1.3 and given["reference_timestep"] == timestep
    assert given["image_guidance_scale"] == 5.0 and given["guidance_scale"] == 3.0
    if timestep == 0:
        assert given["reference_noise"] is None
    else:
        assert given["reference_noise"].shape == (4, 2, 1, 8, 8, 4)
    decoded = np.asarray(jax.jit(lambda vae, latents: vae.decode_latents(latents))(vae, drawn))
    pictures = np.concatenate(
        [references[:, None], (decoded.reshape(2, 2, 16, 16, 3) + 1) * 127.5], axis=1
    )
    shown = grid.reshape(2, 18, 3, 18, 3).swapaxes(1, 2)[:, :, 1:-1, 1:-1]
    assert np.abs(shown - pictures).max() <= 0.5 + 1e-2


def test_validation_uses_references_as_training_does(parts, monkeypatch):
    graphs, frozen, tokenizer, state = parts
    given: dict[str, Any] = {}

    class Enough(Exception):
        """What is wanted is known."""

    def loss(*_: Any, **named: Any) -> None:
        given.update(named)
        raise Enough

    monkeypatch.setattr(validation, "bootpig_loss", loss)
    picture = np.zeros((3, 16, 16, 3), np.uint8)
    pictures = Pictures(picture, picture, tokenizer(["a"] * 3), None)
    config = configuration(
        Path("unused"),
        data=DataConfig(dir=Path("data"), image_size=16),
        reference_key_scale=1.3,
        reference_timestep=0,
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with pytest.raises(Enough):
        make_validation(graphs, frozen, pictures, config, mesh)(state)
    assert given["reference_key_scale"] == 1.3 and given["reference_timestep"] == 0


HANGS = """
import sys, time
from pathlib import Path
from tests.test_training_loop import Saves, configuration, hang
hang(configuration(Path(sys.argv[1]), safety={"hang_seconds": 2}))
"""


def hang(config: TrainConfig) -> None:
    """Runs the loop over a loader that never answers."""

    def never() -> Iterator[Any]:
        print("waiting", flush=True)
        time.sleep(600)
        yield {}

    run_steps(
        lambda *arguments: arguments,  # type: ignore[arg-type, return-value]
        TrainState(jnp.zeros((), jnp.int32), {}, (), {}),
        None,  # type: ignore[arg-type]
        never(),  # type: ignore[arg-type]
        lambda batch: batch,  # type: ignore[arg-type, return-value]
        config=config,
        mesh=make_mesh(config.mesh, jax.devices()[:1]),
        checkpoints=Saves(),  # type: ignore[arg-type]
        logger=None,  # type: ignore[arg-type]
    )


@pytest.mark.promise("R8", "a hung loader: stacks printed, the process ends in time")
def test_a_loader_that_hangs_ends_the_process_with_its_stacks(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout == "waiting\n"
    assert process.returncode == 1
    assert "Timeout (0:00:02)!" in process.stderr
    assert "in never" in process.stderr and "in run_steps" in process.stderr


def test_a_run_that_goes_on_forgets_what_it_logged_beyond_its_checkpoint(tmp_path):
    config = configuration(tmp_path)
    train(config, set(), Saves())
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    (tmp_path / "history.jsonl").write_text("\n".join(lines) + '\n{"step": 31, "lo')
    with MetricLogger(config, first_step=12):
        pass
    assert (tmp_path / "history.jsonl").read_text().splitlines() == lines[:4]


def test_a_full_disk_is_one_line_and_the_history_stays_readable(tmp_path):
    train(configuration(tmp_path), set(), Saves())
    before = read_history(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "history.jsonl").stat().st_size
    with pytest.raises(
        UserError, match="output_dir: .* cannot be written to .*make room"
    ) as caught:
        try:
            with MetricLogger(configuration(tmp_path), first_step=30) as logger:
                # Writes beyond it fail, as on a full disk.
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limit[1]))
                logger.scalars(31, "train", {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(caught.value)
    assert read_history(tmp_path) == before
