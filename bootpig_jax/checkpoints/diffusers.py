"""Stable Diffusion folders in diffusers' layout, in and out.

A parameter's path in our networks is its name in diffusers, but for the few patterns in `RENAMED`.
The table is an exact bijection: a tensor left over on either side is an error that names it.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from bootpig_jax.checkpoints.stored import Stored, map_safetensors, read_weights
from bootpig_jax.checkpoints.tokenizer import Tokenizer, load_tokenizer
from bootpig_jax.diffusion.schedule import NoiseSchedule
from bootpig_jax.errors import UserError
from bootpig_jax.files import local_name
from bootpig_jax.kernels import Kernels, kernels_for
from bootpig_jax.models.shapes import OneKey
from bootpig_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from bootpig_jax.models.unet import UNet, UNetConfig
from bootpig_jax.models.vae import VAE, VAEConfig

MAX_DEPTH = 32  # of a JSON file; what is deeper cannot even be shown in an error

ParameterPath = tuple[Any, ...]  # of attribute names and list indices
Network = TypeVar("Network", UNet, VAE, TextEncoder)

# Our spelling -> diffusers' and transformers', applied in this order to dotted names.
RENAMED: tuple[tuple[str, str], ...] = (
    (r"\battentions\.(\d+)\.attention\.", r"attentions.\1."),  # the VAE's one-headed attention
    (r"\bto_out\.", "to_out.0."),
    (r"\bff\.gate\.", "ff.net.0.proj."),
    (r"\bff\.out\.", "ff.net.2."),
    (r"^layers\.", "text_model.encoder.layers."),
    (r"^(token|position)_embedding\.", r"text_model.embeddings.\1_embedding."),
    (r"^final_layer_norm\.", "text_model.final_layer_norm."),
    (r"\.(kernel|scale|embedding)$", ".weight"),
)

# Spellings that files in circulation use -> the current one; None: a buffer that is no parameter.
OLD_SPELLINGS: tuple[tuple[str, str | None], ...] = (
    (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    (r"^(encoder\.layers|embeddings|final_layer_norm)\.", r"text_model.\1."),
    (r"^text_model\.embeddings\.position_ids$", None),
)


@dataclasses.dataclass(frozen=True)
class StableDiffusion:
    """A text-to-image model: its networks, its tokenizer and its noise schedule.

    In the networks that `open_stable_diffusion` returns, every parameter is `Stored`.

    Attributes:
        scheduler_config: the parsed `scheduler_config.json` that `schedule` was made from.
    """

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    scheduler_config: Mapping[str, Any]


def load_stable_diffusion(model: str | Path, **how: Any) -> StableDiffusion:
    """Loads SD 1.5, 2.1-base, 2.1 or a smaller model of the same layout to the default device.

    Args:
        model: a folder in diffusers' layout, or the id of one on the Hugging Face hub.
        how: as in `open_stable_diffusion`.

    Raises:
        UserError: a file is missing, cut short or does not fit its configuration.
    """
    return read_networks(open_stable_diffusion(model, **how))


def read_networks(model: StableDiffusion) -> StableDiffusion:
    """Brings the networks of `open_stable_diffusion` to the default device."""
    return dataclasses.replace(
        model,
        unet=read_weights(model.unet),
        vae=read_weights(model.vae),
        text_encoder=read_weights(model.text_encoder),
    )


def open_stable_diffusion(
    model: str | Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    param_dtype: jnp.dtype = jnp.float32,
    kernels: Kernels | None = None,
    allow_pickle: bool = False,
) -> StableDiffusion:
    """Opens a model and checks its weights' names and shapes; their values are read later.

    Args:
        model: a folder in diffusers' layout, or the id of one on the Hugging Face hub.
        dtype: the precision of the computation.
        param_dtype: the precision the parameters are kept in.
        kernels: how the device computes; those of the default device when ``None``.
        allow_pickle: see `open_tensors`.

    Raises:
        UserError: a file is missing, cut short or does not fit its configuration.
    """
    folder = find_model(model, allow_pickle=allow_pickle)
    how: dict[str, Any] = {
        "dtype": dtype,
        "param_dtype": param_dtype,
        "kernels": kernels,
        "allow_pickle": allow_pickle,
    }
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    return StableDiffusion(
        unet=open_network(folder / "unet", UNet, UNetConfig, **how),
        vae=open_network(folder / "vae", VAE, VAEConfig, **how),
        text_encoder=open_network(folder / "text_encoder", TextEncoder, TextEncoderConfig, **how),
        tokenizer=load_tokenizer(folder / "tokenizer"),
        schedule=NoiseSchedule.from_config(scheduler_config),
        scheduler_config=scheduler_config,
    )


def find_model(model: str | Path, *, allow_pickle: bool = False) -> Path:
    """The local folder of a model: itself, or what the hub's client downloads for an id.

    Args:
        model: a folder, or an id.
        allow_pickle: whether pickled weights are downloaded too.

    Raises:
        UserError: neither.
    """
    if Path(model).is_dir():
        return Path(model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", local_name(str(model))):
        raise UserError(f"model: {model} is neither a folder nor the id of a model on the hub")
    import huggingface_hub

    patterns = ["*.json", "*.txt", "*/*.safetensors", *(["*/*.bin"] if allow_pickle else [])]
    try:
        return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=patterns))
    except Exception as error:  # the client raises many kinds, all meaning "could not get it"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"model: {model} is no folder and can't be downloaded: {reason}") from error


def load_unet(folder: str | Path, **how: Any) -> UNet:
    """Loads one UNet's folder: a model's `unet/`, or `base_unet/` and `ref_unet/` of a BootPIG.

    Args:
        folder: of the UNet.
        how: as in `open_network`.

    Raises:
        UserError: a file is missing, cut short or does not fit its configuration.
    """
    return load_network(Path(folder), UNet, UNetConfig, **how)


class Config(Protocol):
    """A network's configuration."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads a parsed `config.json`."""


def load_network(
    folder: Path, network: Callable[..., Network], config: type[Config], **how: Any
) -> Network:
    """Loads one network's folder to the default device; `how` is as in `open_network`.

    Raises:
        UserError: a file is missing, cut short or does not fit its configuration.
    """
    loaded: Network = read_weights(open_network(folder, network, config, **how))
    return loaded


def open_network(
    folder: Path,
    network: Callable[..., Network],
    config: type[Config],
    *,
    dtype: jnp.dtype = jnp.float32,
    param_dtype: jnp.dtype = jnp.float32,
    kernels: Kernels | None = None,
    allow_pickle: bool = False,
) -> Network:
    """Builds a network's shapes from `config.json`, with the folder's tensors as its parameters.

    Args:
        folder: of the network.
        network: its class.
        config: its configuration's class.
        dtype: the precision of the computation.
        param_dtype: the precision the parameters are wanted in.
        kernels: how the device computes; those of the default device when ``None``.
        allow_pickle: see `open_tensors`.

    Returns:
        The network; every parameter is `Stored`.

    Raises:
        UserError: a file is missing or cut short, a tensor is missing, left over or of a wrong
            shape.
    """
    sizes = config.from_dict(read_json(folder / "config.json"))
    graph, state = nnx.split(
        network_shapes(
            network,
            sizes,
            dtype=dtype,
            param_dtype=param_dtype,
            kernels=kernels or kernels_for(),
        )
    )
    shapes = dict(nnx.to_flat_state(state))
    names = {diffusers_name(path): path for path in shapes}

    tensors = open_tensors(folder, allow_pickle=allow_pickle)
    missing, left_over = sorted(names.keys() - tensors), sorted(tensors.keys() - names.keys())
    if missing or left_over:
        raise UserError(
            f"{folder}: the weights do not fit config.json; "
            f"missing: {_listing(missing)}; left over: {_listing(left_over)}"
        )
    for name, path in names.items():
        value = from_torch_layout(tensors[name], path)
        if value.shape != shapes[path].shape:
            raise UserError(
                f"{folder}: {name} has the shape {tensors[name].shape}, which does not fit "
                f"config.json: {to_torch_shape(shapes[path].shape, path)} is expected"
            )
        shapes[path] = shapes[path].replace(Stored(value, np.dtype(param_dtype)))
    return nnx.merge(graph, nnx.from_flat_state(shapes))


def network_shapes(network: Callable[..., Network], sizes: Config, **how: Any) -> Network:
    """A network with shapes in the place of its parameters.

    Args:
        network: its class.
        sizes: its configuration.
        how: `dtype`, `param_dtype` and `kernels`, as the class takes them.
    """
    return nnx.eval_shape(lambda: network(sizes, rngs=OneKey(0), **how))


def save_unet(folder: str | Path, unet: UNet, dtype: np.dtype | type | None = None) -> None:
    """Writes a UNet that diffusers' `UNet2DConditionModel.from_pretrained` loads.

    Args:
        folder: created if missing.
        unet: the network.
        dtype: the precision in the file; that of the parameters when ``None``.
    """
    save_network(folder, unet, "UNet2DConditionModel", "diffusion_pytorch_model", dtype)


def save_network(
    folder: str | Path,
    network: UNet | VAE | TextEncoder,
    class_name: str,
    file_name: str,
    dtype: np.dtype | type | None = None,
) -> None:
    """Writes `config.json` and one safetensors file, in PyTorch's layout and names.

    Args:
        folder: created if missing.
        network: the network.
        class_name: which PyTorch class the configuration is for.
        file_name: of the safetensors file, without its ending.
        dtype: the precision in the file; that of the parameters when ``None``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        diffusers_name(path): to_torch_layout(np.asarray(leaf[...], dtype), path)
        for path, leaf in nnx.to_flat_state(nnx.state(network, nnx.Param))
    }
    save_file(tensors, folder / f"{file_name}.safetensors", metadata={"format": "pt"})
    config = {"_class_name": class_name, **dataclasses.asdict(network.config)}
    if isinstance(network, VAE):
        # Without them diffusers builds one level only and drops the other weights with a warning.
        levels = len(network.config.block_out_channels)
        config["down_block_types"] = ["DownEncoderBlock2D"] * levels
        config["up_block_types"] = ["UpDecoderBlock2D"] * levels
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def diffusers_name(path: ParameterPath) -> str:
    """A parameter's name in diffusers or transformers, from its path in our network."""
    name = ".".join(map(str, path))
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def from_torch_layout(value: np.ndarray, path: ParameterPath) -> np.ndarray:
    """PyTorch's kernels (out, in) and (out, in, h, w) to ours, (in, out) and (h, w, in, out)."""
    if path[-1] != "kernel":
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def to_torch_layout(value: np.ndarray, path: ParameterPath) -> np.ndarray:
    """The inverse of `from_torch_layout`."""
    if path[-1] != "kernel":
        return value
    return np.ascontiguousarray(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T)


def to_torch_shape(shape: tuple[int, ...], path: ParameterPath) -> tuple[int, ...]:
    """The shape of `to_torch_layout`'s result."""
    return to_torch_layout(np.broadcast_to(np.float32(0), shape), path).shape


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        UserError: the file is missing or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a folder in diffusers' layout has it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
    if level:
        raise UserError(f"{path} is nested more than {MAX_DEPTH} deep")
    return content


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def open_tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, np.ndarray]:
    """Opens all tensors of a network's folder, old spellings brought up to date.

    Full precision is preferred to the `fp16` variant; a model split over several files is joined.

    Args:
        folder: of one network.
        allow_pickle: whether PyTorch's pickled files are opened where there is no safetensors file.

    Returns:
        Arrays that are mapped into memory, but for pickled ones, which are read.

    Raises:
        UserError: there is no file that may be opened, or one is damaged.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in weight_files(folder, allow_pickle):
        opened = map_safetensors if path.suffix == ".safetensors" else _read_pickled
        for key, tensor in opened(path).items():
            name = _current_name(key)
            if name is not None:
                tensors[name] = tensor
    return tensors


def _read_pickled(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # needed for nothing else
    except ImportError:
        raise UserError(
            f"{path}: pickled weights are read by PyTorch, which is missing: install the extra "
            "eval, or convert the file to safetensors"
        ) from None
    try:
        # `weights_only`: whatever the pickle says, nothing but tensors is built.
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {
            key: tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
            for key, tensor in tensors.items()
        }
    except Exception as error:  # unpickling raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a table of tensors: {reason}") from None


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The files that `read_tensors` reads.

    Raises:
        UserError: there is none that may be opened.
    """
    for stem, ending in (
        ("diffusion_pytorch_model", "safetensors"),
        ("model", "safetensors"),
        *((("diffusion_pytorch_model", "bin"), ("pytorch_model", "bin")) if allow_pickle else ()),
    ):
        for variant in ("", ".fp16"):
            single = folder / f"{stem}{variant}.{ending}"
            index = folder / f"{stem}.{ending}.index{variant}.json"
            if single.is_file():
                return [single]
            if index.is_file():
                files = sorted(set(read_json(index).get("weight_map", {}).values()))
                return [folder / file for file in files]
    pickles = [p.name for kind in ("*.bin", "*.ckpt", "*.pt", "*.pth") for p in folder.glob(kind)]
    if pickles:
        raise UserError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when opened: "
            "convert them to safetensors, or allow them (--allow-pickle, model.allow_pickle)"
        )
    raise UserError(f"{folder} has no .safetensors file")


def _current_name(name: str) -> str | None:
    for pattern, replacement in OLD_SPELLINGS:
        if replacement is None:
            if re.search(pattern, name):
                return None
        else:
            name = re.sub(pattern, replacement, name)
    return name


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def parameter_count(network: nnx.Module) -> int:
    """How many parameters a network has."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))
