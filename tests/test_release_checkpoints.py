"""Checkpoints of the authors' release load here, and ours load in their class."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from flax import nnx
from safetensors.numpy import load_file

from bootpig_jax.checkpoints.diffusers import diffusers_name, load_unet, save_unet, to_torch_layout
from bootpig_jax.checkpoints.release import is_release
from bootpig_jax.models.unet import UNet
from bootpig_jax.sampling.conditioning import Conditioning
from tests.sampling_models import random_unet
from tests.tiny_models import torch_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Their `config.json` is of diffusers 0.26, written out in full.
OLD_FIELDS: dict[str, Any] = {
    "_diffusers_version": "0.26.0",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "dropout": 0,
    "mid_block_only_cross_attention": None,
    "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "upcast_attention": False,
}


class BootPIGUNet(UNet2DConditionModel):
    """A class that saves and loads as theirs does.

    It declares every field of its parent's configuration again, and one more, and replaces the
    forward function of each transformer block after construction.
    """

    def __init__(self, *args: Any, bootpig_mode: str = "ref", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mode = bootpig_mode
        for block in self.modules():
            if isinstance(block, BasicTransformerBlock):
                block._original_inner_forward = block.forward
                block.forward = block._original_inner_forward
                for module in block.modules():
                    module.bootpig_mode = bootpig_mode

    # The signature that diffusers reads the names of the fields from.
    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *inspect.signature(UNet2DConditionModel.__init__).parameters.values(),
            inspect.Parameter(
                "bootpig_mode", inspect.Parameter.POSITIONAL_OR_KEYWORD, default="ref"
            ),
        ]
    )
    __init__ = register_to_config(__init__)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as their training script writes it."""
    folder = tmp_path_factory.mktemp("release") / "checkpoint-10000"
    for name, mode in (("base_unet", "base"), ("ref_unet", "ref")):
        plain = torch_unet("sd21base")
        unet = BootPIGUNet.from_config(plain.config, bootpig_mode=mode)
        unet.load_state_dict(plain.state_dict())
        unet.save_pretrained(folder / name)
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        assert config["_class_name"] == "BootPIGUNet"
        assert config["bootpig_mode"] == mode
        path.write_text(json.dumps(config | OLD_FIELDS))
    # `accelerate` saves its own state in the same folder.
    (folder / "optimizer.bin").write_bytes(b"")
    return folder


def torch_tensors(unet: UNet) -> dict[str, np.ndarray]:
    return {
        diffusers_name(path): to_torch_layout(np.asarray(leaf[...]), path)
        for path, leaf in nnx.to_flat_state(nnx.state(unet, nnx.Param))
    }


def assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(actual[name], tensor, err_msg=name)


def test_theirs_load_here(theirs: Path) -> None:
    assert is_release(theirs)
    folder = theirs / "ref_unet"  # the other differs in `bootpig_mode` alone
    assert_equal(torch_tensors(load_unet(folder)), load_file(folder / WEIGHTS))


def test_ours_load_in_their_class(tmp_path: Path) -> None:
    unet = random_unet(4)
    save_unet(tmp_path / "base_unet", unet)
    loaded, report = BootPIGUNet.from_pretrained(
        tmp_path, subfolder="base_unet", bootpig_mode="base", output_loading_info=True
    )
    assert not any(report.values()), report
    assert loaded.mode == "base"
    tensors = {name: tensor.numpy() for name, tensor in loaded.state_dict().items()}
    assert_equal(tensors, torch_tensors(unet))
    with torch.no_grad():  # the configuration fits the weights
        loaded(torch.zeros(1, 4, 8, 8), 0, torch.zeros(1, 3, unet.config.cross_attention_dim))


def test_the_releases_weights_are_sampled_as_they_were_trained(tmp_path: Path) -> None:
    def write(name: str, config: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(config)

    assert not is_release(tmp_path)
    write("base_unet", '{"_class_name": "BootPIGUNet", "bootpig_mode": "base"}')
    for other in ('{"_class_name": "UNet2DConditionModel"}', "[]", "{"):
        write("ref_unet", other)
        assert not is_release(tmp_path)
        assert Conditioning.read(tmp_path) == Conditioning()
    write("ref_unet", '{"_class_name": "BootPIGUNet", "bootpig_mode": "ref"}')
    assert is_release(tmp_path)
    assert Conditioning.read(tmp_path) == Conditioning("same", 1.1, "first_clause")
    # What `bootpig.json` says counts more.
    Conditioning(reference_key_scale=1.3).write(tmp_path)
    assert Conditioning.read(tmp_path) == Conditioning(reference_key_scale=1.3)
