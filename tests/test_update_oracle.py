"""Three updates end to end, from records on disk to exported weights, against PyTorch.

`python -m bootpig_jax.train` runs as it is. The other side is Algorithm 1 written out in float64:
Pillow reads the records' bytes; the networks are diffusers' and transformers', the optimiser is
PyTorch's. Only the order of the records and the random numbers are taken from our side.
"""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

import bootpig_jax.train
from bootpig_jax import cache_latents
from bootpig_jax.data.pipeline import make_loader
from bootpig_jax.training.metrics import read_history
from bootpig_jax.training.step import Draws, draw
from tests import tiny_training
from tests.tiny_models import SCHEDULE, Kind
from tests.tiny_training import BATCH, DROPOUT, LATENTS, PARTS, RATES, SEED, SIZE, UPDATES
from tests.torch_bootpig import Process, TorchBootPIG, nchw

NETWORKS = {"base": "base_unet", "reference": "ref_unet"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """What a run is told, and what Algorithm 1 makes of it."""

    kind: Kind
    prediction_type: str
    cached: bool
    ema_decay: float | None
    reference_caption: str
    reference_key_scale: float


CASES = {
    "online-epsilon-average": Case("sd21base", "epsilon", False, 0.5, "target", 1.0),
    "cached-v-release": Case("sd21", "v_prediction", True, None, "first_clause", 1.1),
}


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """On arrays this small, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_training.save_data(tmp_path_factory.mktemp("data") / "blocks")


class Algorithm1:
    """The paper's Algorithm 1; the networks start as the model's."""

    def __init__(self, case: Case, model: Path):
        self.case = case
        self.unets = TorchBootPIG(
            *(UNet2DConditionModel.from_pretrained(model / "unet") for _ in NETWORKS)
        )
        self.vae = AutoencoderKL.from_pretrained(model / "vae").double()
        self.text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder").double()
        self.tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")

    def train(self, batches: list[list[int]]) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        """Makes an update of each batch of records.

        Returns:
          What each update measured; the trained weights, or their running average if one is kept.
        """
        self.losses(batches[0], draws_of(0)).mean().backward()  # shows what gets a gradient
        trained = self.unets.trained()
        average = {name: weight.detach().clone() for name, weight in trained.items()}
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for name, p in trained.items() if name.startswith(part)], "lr": rate}
                for part, rate in RATES.items()
            ],
            betas=(0.9, 0.999),
            eps=tiny_training.EPSILON,
            weight_decay=1e-2,
        )
        history = []
        for update, batch in enumerate(batches):
            optimizer.zero_grad()
            draws, loss = draws_of(update), 0.0
            for part in (slice(i, None, PARTS) for i in range(PARTS)):
                share = Draws(**{name: array[part] for name, array in vars(draws).items()})
                mean = self.losses(batch[part], share).mean() / PARTS
                mean.backward()
                loss += mean.item()
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), tiny_training.CLIP_NORM)
            history.append({"loss": loss, "gradient_norm": norm.item()})
            optimizer.step()
            decay = self.case.ema_decay or 0.0
            for name, weight in trained.items():
                average[name] = decay * average[name] + (1 - decay) * weight.detach()
        return history, average

    def losses(self, batch: list[int], draws: Draws) -> Tensor:
        """Eq. 1 for each sample."""
        process = Process(SCHEDULE["beta_start"], SCHEDULE["beta_end"], self.case.prediction_type)
        targets, references = zip(*map(target_and_reference, batch), strict=True)
        captions = [tiny_training.make_record(index).caption for index in batch]
        t = torch.tensor(draws.t, dtype=torch.long)

        r = self.latents(references, draws.reference_posterior)
        r_t = process.noised(r, nchw(draws.reference_noise), t)
        whole = self.case.reference_caption == "target"
        read = captions if whole else [caption.split(",")[0] for caption in captions]
        features = self.unets.features(r_t, t, self.text(read))

        x, noise = self.latents(targets, draws.target_posterior), nchw(draws.target_noise)
        seen = [c if keep else "" for c, keep in zip(captions, draws.keep_caption, strict=True)]
        prediction = self.unets.predict(
            process.noised(x, noise, t),
            t,
            self.text(seen),
            [features],
            keep=draws.keep_reference.tolist(),
            key_scale=self.case.reference_key_scale,
        )
        return ((process.truth(x, noise, t) - prediction) ** 2).mean(dim=(1, 2, 3))

    def latents(self, pictures: tuple[np.ndarray, ...], noise: np.ndarray) -> Tensor:
        with torch.no_grad():
            posterior = self.vae.encode(nchw(np.stack(pictures) / 127.5 - 1)).latent_dist
        return self.vae.config.scaling_factor * (posterior.mean + posterior.std * nchw(noise))

    def text(self, captions: list[str]) -> Tensor:
        tokens = self.tokenizer(captions, padding="max_length", return_tensors="pt")
        with torch.no_grad():
            return self.text_encoder(tokens.input_ids).last_hidden_state


def target_and_reference(index: int) -> tuple[np.ndarray, np.ndarray]:
    """What a record's pictures are, from its bytes and the mask it was made of."""
    picture, mask = tiny_training.picture_and_mask(index)
    target = np.asarray(Image.open(io.BytesIO(tiny_training.make_record(index).target)))
    assert np.abs(target.astype(int) - picture).mean() <= 3  # JPEG
    return target, np.where(mask[..., None], target, 255)


def draws_of(update: int) -> Draws:
    """What the step draws for an update, from its number and the seed alone."""
    draws = draw(
        jax.random.fold_in(jax.random.key(SEED), update),
        (BATCH, *LATENTS),
        num_timesteps=1000,
        reference_dropout=DROPOUT,
        reference_dropout_unit="sample",
        caption_dropout=DROPOUT,
    )
    for kept in (draws.keep_reference, draws.keep_caption):
        assert 0 < kept.sum() < BATCH
    return jax.tree.map(np.asarray, draws)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_three_updates_from_records_to_weights(case: Case, data: Path, tmp_path: Path) -> None:
    model, run = tiny_training.save_model(tmp_path / "model", case.kind), tmp_path / "run"
    changes: dict[str, Any] = {
        "data.augmentation": "none",
        "ema_decay": case.ema_decay or "null",
        "reference_caption": case.reference_caption,
        "reference_key_scale": case.reference_key_scale,
    }
    if case.cached:
        changes |= {"data.cache": tmp_path / "cache", "data.cache_copies": 2}
    arguments = tiny_training.arguments(model, data, run, **changes)
    if case.cached:
        cache_latents.main(arguments)
    bootpig_jax.train.main(arguments)

    order = make_loader(data, batch_size=BATCH, image_size=SIZE, seed=SEED, num_threads=0)
    batches = [list(map(int, next(order)["id"])) for _ in range(UPDATES)]
    measured, expected = Algorithm1(case, model).train(batches)

    norms = [update["gradient_norm"] for update in measured]
    assert max(norms) > 1.5 * tiny_training.CLIP_NORM and min(norms) < tiny_training.CLIP_NORM
    for row, update in zip(read_history(run), measured, strict=True):
        found = {name: row[name] for name in update}
        assert found == pytest.approx(update, rel=TOLERANCE, abs=0)
    start = load_file(model / "unet" / WEIGHTS)
    for network, folder in NETWORKS.items():
        weights = load_file(run / folder / WEIGHTS)
        assert weights.keys() == start.keys()
        for name, weight in weights.items():
            trained = expected.pop(f"{network}.{name}", None)
            if trained is None:
                np.testing.assert_array_equal(weight, start[name], err_msg=name)
                continue
            error = np.linalg.norm(weight - trained.numpy())
            change = np.linalg.norm(trained.numpy() - start[name])
            # Each update rounds to float32, by half a unit in the last place at most.
            rounding = np.linalg.norm(0.5 * UPDATES * np.spacing(np.abs(weight)))
            assert error <= TOLERANCE * change + rounding, f"{network}.{name}"
    assert not expected
