"""What the segmenters' networks have in common: how they are loaded, where and how they run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import google_crc32c
import torch
import transformers

from bootpig_jax.errors import UserError
from data_gen.config import MasksConfig

Loaded = TypeVar("Loaded")


def prepare() -> None:
    """Settles, for the whole process, what networks loaded later on say and how they compute."""
    # Bars for loading a few files, and warnings about packages that are not used here.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # cuDNN otherwise picks convolution algorithms whose sums differ from run to run. For the whole
    # process: pictures and masks are made in two threads, and what one of them sets for a while,
    # the other one gets.
    torch.backends.cudnn.deterministic = True


@contextmanager
def inference(config: MasksConfig) -> Iterator[torch.device]:
    """Sets the precision for as long as networks run; gives their device.

    Half precision is autocast's: neither segment_anything nor every release of GroundingDINO runs
    with its weights in it, because they build float32 coordinates.

    Raises:
      UserError: the device's memory is too small for the batch.
    """
    device = find_device(config.device)
    dtype = getattr(torch, config.dtype)
    half = dtype is not torch.float32
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=half):
            yield device
    except torch.OutOfMemoryError:
        raise UserError(
            f"masks.batch_size: {device} has too little memory for {config.batch_size} pictures at "
            "once: lower it"
        ) from None


def find_device(name: str, field: str = "masks.device") -> torch.device:
    """Returns the device that a field of the configuration names.

    Raises:
      UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{field}: there is no {name} here: use cpu or auto")
    return device


def load(field: str, name: str, read: Callable[[str], Loaded]) -> Loaded:
    """Calls `read(name)` and puts whatever it raises into one line.

    Args:
      field: the configuration's field that `name` comes from.
      name: a folder, a file or a hub id.
      read: loads it.

    Raises:
      UserError: it cannot be loaded.
    """
    try:
        return read(name)
    except UserError:
        raise
    except Exception as error:  # the loaders raise many kinds, all meaning the same
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"masks.{field}: {name} cannot be loaded: {reason}") from error


def read_model(kind: Any, name: str) -> Any:
    """Loads a network of transformers with weights that are all its own.

    Args:
      kind: the network's class.
      name: a folder, or a hub id.

    Raises:
      ValueError: weights are missing. transformers itself draws them at random, with a warning.
    """
    model, report = kind.from_pretrained(name, use_safetensors=True, output_loading_info=True)
    parameters = dict(model.named_parameters())
    missing = sorted(key for key in report["missing_keys"] if key in parameters)
    if missing:
        raise ValueError(
            f"it holds no {kind.__name__}: of {len(parameters)} tensors {len(missing)} are "
            f"missing, such as {missing[0]}"
        )
    return model


def hash_weights(model: torch.nn.Module) -> str:
    """Returns the CRC-32C, in hexadecimal, of a network's tensors and their names.

    Enough to tell another checkpoint from the one a run was started with, wherever it lies.
    """
    crc = 0
    for name, tensor in model.state_dict().items():
        crc = google_crc32c.extend(crc, name.encode())
        crc = google_crc32c.extend(crc, tensor.detach().cpu().contiguous().numpy().tobytes())
    return f"{crc:08x}"
