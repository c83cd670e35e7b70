"""Our networks against diffusers' and transformers', on tiny random folders of three kinds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from bootpig_jax.bootpig import dead_tail
from bootpig_jax.checkpoints.diffusers import (
    StableDiffusion,
    diffusers_name,
    load_network,
    load_stable_diffusion,
    load_unet,
    parameter_count,
    save_network,
    save_unet,
    to_torch_layout,
)
from bootpig_jax.errors import UserError
from bootpig_jax.models.shapes import OneKey
from bootpig_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from bootpig_jax.models.unet import UNet, UNetConfig
from bootpig_jax.models.vae import VAE, VAEConfig
from tests.tiny_models import KINDS, Kind, save_tiny_model, torch_unet, torch_vae

TOLERANCE = 1e-4

# The file that Stable Diffusion 2.1-base ships, where it differs from diffusers' defaults.
SD21_BASE_UNET = {
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "use_linear_projection": True,
    "sample_size": 64,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp(kind), kind)


@pytest.fixture(scope="module")
def ours(folder: Path) -> StableDiffusion:
    return load_stable_diffusion(folder)


def relative_error(ours: jax.Array, theirs: torch.Tensor) -> float:
    expected = theirs.detach().numpy()
    return float(np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max())


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def run(function: Callable[..., Any], *arrays: np.ndarray) -> Any:
    return jax.jit(lambda *xs: function(*xs))(*map(jnp.asarray, arrays))


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_unet_predicts_what_diffusers_predicts(folder: Path, ours: StableDiffusion) -> None:
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet")
    latents, text = random(0, 3, 8, 12, 4), random(1, 3, 7, 24)
    t = np.array([0, 421, 999])
    prediction, features = run(ours.unet, latents, t, text)
    expected = theirs(nchw(latents), torch.from_numpy(t), torch.from_numpy(text)).sample
    assert relative_error(prediction.transpose(0, 3, 1, 2), expected) <= TOLERANCE

    layers = [m for name, m in theirs.named_modules() if name.endswith("attn1")]
    assert len(features) == len(layers) > 0


def test_features_are_what_enters_each_self_attention(folder: Path, ours: StableDiffusion) -> None:
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet")
    seen: list[torch.Tensor] = []
    for name, module in theirs.named_modules():
        if name.endswith("attn1"):
            module.register_forward_pre_hook(
                lambda _, args, kw: seen.append(args[0]), with_kwargs=True
            )
    latents, text = random(2, 2, 8, 8, 4), random(3, 2, 7, 24)
    t = np.array([7, 650])
    theirs(nchw(latents), torch.from_numpy(t), torch.from_numpy(text))
    _, features = run(ours.unet, latents, t, text)
    for feature, expected in zip(features, seen, strict=True):
        assert relative_error(feature, expected) <= TOLERANCE


def test_vae_halves_match_diffusers(folder: Path, ours: StableDiffusion) -> None:
    theirs = AutoencoderKL.from_pretrained(folder / "vae")
    images, latents = random(4, 2, 16, 24, 3), random(5, 2, 8, 12, 4)
    mean, log_variance = run(ours.vae.encode, images)
    moments = theirs.encode(nchw(images)).latent_dist
    assert relative_error(mean.transpose(0, 3, 1, 2), moments.mean) <= TOLERANCE
    assert relative_error(log_variance.transpose(0, 3, 1, 2), moments.logvar) <= TOLERANCE
    decoded = run(ours.vae.decode, latents)
    assert (
        relative_error(decoded.transpose(0, 3, 1, 2), theirs.decode(nchw(latents)).sample) <= 1e-4
    )


def test_log_variances_are_cut_off_as_diffusers_does(tmp_path: Path) -> None:
    theirs = torch_vae()
    with torch.no_grad():
        theirs.quant_conv.bias[4:] = torch.tensor([-60.0, -25.0, 15.0, 60.0])
    theirs.save_pretrained(tmp_path)
    images = random(6, 1, 16, 16, 3)
    _, log_variance = run(load_network(tmp_path, VAE, VAEConfig).encode, images)
    expected = theirs.encode(nchw(images)).latent_dist.logvar.detach()
    assert float(expected.min()) == -30 and float(expected.max()) == 20
    assert relative_error(log_variance.transpose(0, 3, 1, 2), expected) <= TOLERANCE


def test_every_norm_has_their_epsilon(folder: Path, ours: StableDiffusion) -> None:
    """No output tells 1e-5 from 1e-6 where variances are near 1."""
    for network, theirs in (
        (ours.unet, UNet2DConditionModel.from_pretrained(folder / "unet")),
        (ours.vae, AutoencoderKL.from_pretrained(folder / "vae")),
        (ours.text_encoder, CLIPTextModel.from_pretrained(folder / "text_encoder")),
    ):
        found = {
            diffusers_name((*path, "scale")).removesuffix(".weight"): module.epsilon
            for path, module in nnx.iter_modules(network)
            if hasattr(module, "epsilon")
        }
        expected = {
            name.removeprefix("text_model."): module.eps
            for name, module in theirs.named_modules()
            if hasattr(module, "eps")
        }
        assert {name.removeprefix("text_model."): eps for name, eps in found.items()} == expected


def test_text_encoder_reads_captions_as_transformers_does(
    folder: Path, ours: StableDiffusion
) -> None:
    captions = ["", "a photo of the dog, in the snow", "the " * 100]
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    theirs = CLIPTextModel.from_pretrained(folder / "text_encoder")
    ids = tokenizer(
        captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    np.testing.assert_array_equal(ours.tokenizer(captions), ids.numpy())
    hidden = run(ours.text_encoder, ids.numpy())
    assert relative_error(hidden, theirs(ids).last_hidden_state) <= TOLERANCE


def test_prediction_type_comes_from_the_folder(kind: Kind, ours: StableDiffusion) -> None:
    expected = "v_prediction" if kind == "sd21" else "epsilon"
    assert ours.schedule.prediction_type == expected


def test_saved_unet_is_what_diffusers_saved(
    folder: Path, ours: StableDiffusion, tmp_path: Path
) -> None:
    save_unet(tmp_path, ours.unet)
    file = "diffusion_pytorch_model.safetensors"
    saved, original = load_file(tmp_path / file), load_file(folder / "unet" / file)
    assert saved.keys() == original.keys()
    for name in saved:
        np.testing.assert_array_equal(saved[name], original[name], name)
    UNet2DConditionModel.from_pretrained(tmp_path)  # raises where the sizes do not fit
    save_unet(tmp_path, ours.unet, np.float16)
    assert {array.dtype for array in load_file(tmp_path / file).values()} == {np.dtype(np.float16)}


def test_a_saved_vae_is_what_diffusers_saved(tmp_path: Path) -> None:
    theirs = torch_vae()
    theirs.save_pretrained(tmp_path / "theirs")
    vae = load_network(tmp_path / "theirs", VAE, VAEConfig)
    save_network(tmp_path / "ours", vae, "AutoencoderKL", "diffusion_pytorch_model")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "ours").state_dict()
    assert loaded.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def parameters(unet: UNet) -> dict[str, np.ndarray]:
    return {
        diffusers_name(path): to_torch_layout(np.asarray(leaf[...]), path)
        for path, leaf in nnx.to_flat_state(nnx.state(unet, nnx.Param))
    }


def test_full_precision_is_preferred_and_a_model_in_several_files_joined(tmp_path: Path) -> None:
    stem = tmp_path / "diffusion_pytorch_model"
    torch_unet("sd15").save_pretrained(tmp_path)
    whole = load_file(f"{stem}.safetensors")
    half = {name: array.astype(np.float16) for name, array in whole.items()}
    save_file(half, f"{stem}.fp16.safetensors", {"format": "pt"})

    def assert_loads(expected: dict[str, np.ndarray]) -> None:
        loaded = parameters(load_unet(tmp_path))
        assert loaded.keys() == expected.keys()
        for name, array in loaded.items():
            assert array.dtype == np.float32  # whatever the file's
            np.testing.assert_array_equal(array, expected[name].astype(np.float32), name)

    assert_loads(whole)
    Path(f"{stem}.safetensors").unlink()
    weight_map = {}
    for part, names in enumerate((sorted(whole)[::2], sorted(whole)[1::2])):
        file = f"diffusion_pytorch_model-{part}.safetensors"
        save_file({name: whole[name] for name in names}, tmp_path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = Path(f"{stem}.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_loads(whole)
    index.unlink()
    assert_loads(half)


def rename(path: Path, new_name: dict[str, str]) -> None:
    def renamed(name: str) -> str:
        for old, new in new_name.items():
            name = name.replace(old, new)
        return name

    save_file({renamed(k): v for k, v in load_file(path).items()}, path, {"format": "pt"})


def test_old_spellings_load(folder: Path, ours: StableDiffusion, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    rename(
        tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors",
        {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"},
    )
    text = tmp_path / "model" / "text_encoder" / "model.safetensors"
    has_prefix = any(name.startswith("text_model.") for name in load_file(text))
    if has_prefix:
        rename(text, {"text_model.": ""})
    else:
        tensors = {f"text_model.{k}": v for k, v in load_file(text).items()}
        tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
        save_file(tensors, text, {"format": "pt"})
    loaded = load_stable_diffusion(tmp_path / "model")
    for network in ("vae", "text_encoder"):
        expected = nnx.to_pure_dict(nnx.state(getattr(ours, network), nnx.Param))
        actual = nnx.to_pure_dict(nnx.state(getattr(loaded, network), nnx.Param))
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_left_over_and_missing_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "unet", tmp_path / "unet")
    rename(
        tmp_path / "unet" / "diffusion_pytorch_model.safetensors", {"conv_in.bias": "conv_im.bias"}
    )
    with pytest.raises(UserError, match=r"missing: conv_in\.bias; left over: conv_im\.bias"):
        load_unet(tmp_path / "unet")


def test_a_tensor_of_the_wrong_shape_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "unet", tmp_path / "unet")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 8}))
    with pytest.raises(UserError, match=r"attn2\.to_k\.weight has the shape \(\d+, 24\)"):
        load_unet(tmp_path / "unet")


def test_a_tensor_of_as_many_values_is_refused_all_the_same(tmp_path: Path) -> None:
    torch_unet("sd15").save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("attn2.to_k.weight"))
    save_file(tensors | {name: np.ascontiguousarray(tensors[name].T)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"attn2\.to_k\.weight has the shape \(24, \d+\)"):
        load_unet(tmp_path)


def test_an_unknown_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "unet", tmp_path / "unet")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    config["class_embed_type"] = "timestep"
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="class_embed_type = 'timestep' is not supported"):
        load_unet(tmp_path / "unet")


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_unet(tmp_path / "unet")


def test_pickled_weights_are_not_opened(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match="only pickled weights"):
        load_unet(tmp_path / "unet")
    with pytest.raises(UserError, match="cannot be read as a table of tensors"):
        load_unet(tmp_path / "unet", allow_pickle=True)


def test_pickled_weights_are_opened_when_asked_for(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: torch.from_numpy(array) for name, array in load_file(file).items()}
    torch.save(tensors, file.with_suffix(".bin"))
    file.unlink()
    loaded, expected = (
        nnx.state(load_unet(path, allow_pickle=True))
        for path in (tmp_path / "unet", folder / "unet")
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


class WritesAFile:
    """What a hostile pickle holds: a call that is made while it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_runs_no_code_when_asked_for(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    torch.save({"conv_in.weight": WritesAFile(tmp_path / "run")}, file.with_suffix(".bin"))
    with pytest.raises(UserError, match="cannot be read as a table of tensors"):
        load_unet(tmp_path / "unet", allow_pickle=True)
    assert not (tmp_path / "run").exists()


def test_a_missing_model_is_one_line() -> None:
    with pytest.raises(UserError, match="neither a folder nor the id"):
        load_stable_diffusion("no/such/folder")


@pytest.fixture(scope="module")
def sd21_base_shapes() -> UNet:
    config = UNetConfig.from_dict(SD21_BASE_UNET)
    return nnx.eval_shape(lambda: UNet(config, rngs=OneKey(0)))


def test_the_whole_of_sd21_base_maps(sd21_base_shapes: UNet) -> None:
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(SD21_BASE_UNET)
    expected = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    ours = nnx.to_flat_state(nnx.state(sd21_base_shapes, nnx.Param))
    assert (
        parameter_count(sd21_base_shapes)
        == 865_910_724
        == sum(p.numel() for p in theirs.parameters())
    )
    assert {diffusers_name(path) for path, _ in ours} == expected.keys()
    for path, leaf in ours:
        assert sorted(leaf.shape) == sorted(expected[diffusers_name(path)])


def test_the_reference_unets_dead_tail_is_24_tensors(sd21_base_shapes: UNet) -> None:
    parameters = nnx.to_flat_state(nnx.state(sd21_base_shapes, nnx.Param))
    names = [".".join(map(str, path)) for path, _ in parameters]
    dead = [name for name in names if name.startswith(dead_tail(sd21_base_shapes.config))]
    assert len(dead) == 24
    assert sum(name.endswith("attn1.to_q.kernel") for name in names) == 16


def test_the_text_encoder_of_sd21_maps() -> None:
    from transformers import CLIPTextConfig

    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    }
    with torch.device("meta"):
        theirs = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=49408))
    config = TextEncoderConfig.from_dict(sizes)
    ours = nnx.eval_shape(lambda: TextEncoder(config, rngs=OneKey(0)))
    names = {diffusers_name(path) for path, _ in nnx.to_flat_state(nnx.state(ours, nnx.Param))}
    expected = {
        name if name.startswith("text_model.") else f"text_model.{name}"
        for name, _ in theirs.named_parameters()
    }
    assert names == expected
