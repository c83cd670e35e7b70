"""A trained BootPIG on disk: `base_unet/`, `ref_unet/` and `bootpig.json` in one folder."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from bootpig_jax.checkpoints.diffusers import open_network, save_unet
from bootpig_jax.errors import UserError
from bootpig_jax.models.unet import UNet, UNetConfig
from bootpig_jax.sampling.conditioning import Conditioning

BASE_UNET = "base_unet"
FOLDERS = (BASE_UNET, "ref_unet")


def check_bootpig(folder: str | Path) -> Conditioning:
    """Reads `bootpig.json`, before the large files: a wrong path should not cost a minute.

    Raises:
        UserError: a folder is missing, or the file is wrong.
    """
    for name in FOLDERS:
        if not (Path(folder) / name).is_dir():
            raise UserError(f"bootpig: {Path(folder) / name} is missing; export it anew")
    return Conditioning.read(folder)


def open_bootpig(
    folder: str | Path, config: UNetConfig, *, dtype: jnp.dtype, allow_pickle: bool = False
) -> tuple[UNet, UNet]:
    """Opens the Base UNet and the Reference UNet; `read_weights` reads them.

    Args:
        folder: what `save_bootpig` wrote, or the authors' release saves.
        config: of the text-to-image model's UNet.
        dtype: of weights and computation.
        allow_pickle: see `checkpoints.diffusers.open_tensors`.

    Raises:
        UserError: a file is missing or damaged, or the UNets are of another size.
    """
    base, reference = (
        open_network(
            Path(folder) / name,
            UNet,
            UNetConfig,
            dtype=dtype,
            param_dtype=dtype,
            allow_pickle=allow_pickle,
        )
        for name in FOLDERS
    )
    for unet in (base, reference):
        # `sample_size` only says at which resolution the network was trained last.
        if dataclasses.replace(unet.config, sample_size=config.sample_size) != config:
            raise UserError(f"bootpig: the UNets in {folder} are not of the size of the model's")
    return base, reference


def save_bootpig(
    folder: str | Path,
    base: UNet,
    reference: UNet,
    conditioning: Conditioning,
    dtype: np.dtype | None = None,
) -> None:
    """Writes `base_unet/`, `ref_unet/` and `bootpig.json`: a trained BootPIG.

    Args:
        folder: created if missing.
        base: the Base UNet.
        reference: the Reference UNet.
        conditioning: how it was trained to see its references.
        dtype: the precision in the files; that of the parameters when `None`.

    Raises:
        UserError: it cannot be written to.
    """
    try:
        save_unet(Path(folder) / FOLDERS[0], base, dtype)
        save_unet(Path(folder) / FOLDERS[1], reference, dtype)
        conditioning.write(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror or error})") from None
