"""How weights get from their files to the devices: once, in parts, in the precision they keep."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import save_file

from bootpig_jax.bootpig import BootPIG
from bootpig_jax.checkpoints.diffusers import (
    load_network,
    load_stable_diffusion,
    open_stable_diffusion,
    parameter_count,
)
from bootpig_jax.checkpoints.stored import Stored, map_safetensors
from bootpig_jax.config import MeshConfig, TrainableConfig
from bootpig_jax.errors import UserError
from bootpig_jax.models.vae import VAE, VAEConfig
from bootpig_jax.sampling.pipeline import BootPIGPipeline
from bootpig_jax.training.sharding import make_mesh, partition_specs, place
from bootpig_jax.training.step import take_apart
from tests.tiny_models import torch_vae

HALF = jnp.dtype("bfloat16")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Every array that is read from a file while the test runs."""
    found: list[np.ndarray] = []
    read = Stored.__getitem__

    def noted(self: Stored, index: Any) -> np.ndarray:
        found.append(read(self, index))
        return found[-1]

    monkeypatch.setattr(Stored, "__getitem__", noted)
    return found


def test_a_pipeline_reads_what_it_keeps_and_no_more(
    model_folder: Path, bootpig_folder: Path, reads: list[np.ndarray]
) -> None:
    """Of the text-to-image model's own UNet nothing, where there are two others."""
    pipeline = BootPIGPipeline.from_pretrained(model_folder, bootpig_folder, precision="bfloat16")
    model = pipeline.model
    networks = (model.unet, pipeline.reference_unet, model.vae, model.text_encoder)
    assert sum(array.size for array in reads) == sum(map(parameter_count, networks))
    assert {array.dtype for array in reads} == {HALF}
    del reads[:]
    model = BootPIGPipeline.from_pretrained(model_folder, precision="float32").model
    networks = (model.unet, model.vae, model.text_encoder)
    assert sum(array.size for array in reads) == sum(map(parameter_count, networks))
    assert {array.dtype for array in reads} == {np.dtype(np.float32)}


def test_training_reads_each_part_for_its_device_in_its_precision(
    model_folder: Path, reads: list[np.ndarray]
) -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    model = open_stable_diffusion(model_folder, dtype=HALF)
    bootpig = BootPIG.from_unet(model.unet)
    _, *parts = take_apart(model, bootpig, TrainableConfig(), HALF)
    # For the features of the empty caption.
    assert sum(array.size for array in reads) == parameter_count(model.text_encoder)
    assert {array.dtype for array in reads} == {HALF}
    del reads[:]
    specs = [partition_specs(part, mesh, 64) for part in parts]
    trainable, frozen = (place(part, spec, mesh) for part, spec in zip(parts, specs, strict=True))
    # Each of eight devices its eighth of the large ones; small ones once for all.
    placed = jax.tree.leaves((trainable, frozen))
    assert (
        sum(array.size for array in reads)
        == sum(array.size for array in placed) - frozen.empty_text.size
    )
    assert any("fsdp" in spec for spec in specs[0].values())
    assert {array.dtype for array in trainable.values()} == {np.dtype(np.float32)}
    assert {array.dtype for array in jax.tree.leaves(frozen)} == {HALF}

    loaded = load_stable_diffusion(model_folder)
    flat = {
        prefix + ".".join(map(str, path)): leaf[...]
        for prefix, network in (
            ("base.", loaded.unet),
            ("reference.", loaded.unet),
            ("vae.", loaded.vae),
            ("text_encoder.", loaded.text_encoder),
        )
        for path, leaf in nnx.to_flat_state(nnx.state(network))
    }
    found = {
        **trainable,
        **frozen.unets,
        **{f"vae.{name}": array for name, array in frozen.vae.items()},
        **{f"text_encoder.{name}": array for name, array in frozen.text_encoder.items()},
    }
    assert found.keys() == flat.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, flat[name].astype(array.dtype), name)


def test_bfloat16_files_load_and_are_not_needed_any_more(tmp_path: Path) -> None:
    theirs = torch_vae().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    vae = load_network(tmp_path, VAE, VAEConfig, param_dtype=HALF)
    for values in map_safetensors(file).values():
        assert not np.shares_memory(Stored(values, values.dtype)[...], values)
    # Whoever writes into the file afterwards changes no weight.
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(bytes(file.stat().st_size - start))
    expected = theirs.encoder.conv_in.weight.detach().float().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(vae.encoder.conv_in.kernel[...].astype(np.float32), expected)
    bias = theirs.decoder.conv_out.bias.detach().float().numpy()
    np.testing.assert_array_equal(vae.decoder.conv_out.bias[...].astype(np.float32), bias)


def test_a_type_that_no_weight_has_is_named(tmp_path: Path) -> None:
    save_file({"conv_in.weight": torch.zeros(2, dtype=torch.bool)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"conv_in\.weight is of the type BOOL"):
        map_safetensors(tmp_path / "x.safetensors")
