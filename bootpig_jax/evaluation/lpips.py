"""LPIPS (Zhang et al. 2018): how different two pictures look to a calibrated AlexNet.

The package `lpips` holds the network and its calibration, torchvision fetches AlexNet's weights.
Both are pickled files, of which only tensors are read. Needs the extra `lpips`; nothing is imported
before a model is loaded.
"""

import warnings
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.embedders import ModelCard, Preprocessing, hash_tensors

# [-1, 1], which the network expects.
PREPROCESSING = Preprocessing(resize=256, crop=256, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Lpips:
    """The network, and what identifies it."""

    def __init__(self, card: ModelCard, model: Any, device: str) -> None:
        """`load_lpips` makes one."""
        self.card = card
        self._model = model.to(device)
        self._device = device

    def distances(self, pixels: Float32[np.ndarray, "n 3 h w"]) -> Float[np.ndarray, "n n"]:
        """The distance between any two of what `preprocess` with `PREPROCESSING` returns."""
        import torch

        tensor = torch.from_numpy(pixels).to(self._device)
        found = np.zeros((len(pixels), len(pixels)))
        for i in range(1, len(pixels)):
            with torch.inference_mode():
                row = self._model(tensor[i : i + 1].expand_as(tensor[:i]), tensor[:i])
            found[i, :i] = found[:i, i] = row.flatten().float().cpu().numpy()
        return found


def load_lpips(*, allow_pickle: bool = False, device: str | None = None) -> Lpips:
    """Loads LPIPS 0.1 with AlexNet, the version that diversity is published with.

    Args:
        allow_pickle: its weights are pickled and are opened only with this.
        device: PyTorch's name of it; by default a GPU if there is one.

    Raises:
        UserError: a package is missing, or the weights can't be had.
    """
    if not allow_pickle:
        raise UserError("--lpips: its weights are pickled; --allow-pickle reads their tensors")
    try:
        import lpips
        import torch
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision of another torch
        raise UserError(
            f"--lpips: needs lpips, and the torchvision that matches torch ({error}); "
            "pip install 'bootpig_jax[lpips]'"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision in a deprecated way
        # Without AlexNet's weights: it would unpickle whatever the file holds.
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    try:
        weights = AlexNet_Weights.IMAGENET1K_V1.get_state_dict(
            progress=False, check_hash=True, weights_only=True
        )
        # slice2.3.bias there is features.3.bias here.
        names = {name: f"features.{name.partition('.')[2]}" for name in model.net.state_dict()}
        model.net.load_state_dict({name: weights[theirs] for name, theirs in names.items()})
    except Exception as error:  # the network, the disk and torch fail in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--lpips: {AlexNet_Weights.IMAGENET1K_V1.url} can't be loaded ({reason}); "
            f"put it into {torch.hub.get_dir()}/checkpoints"
        ) from error
    card = ModelCard(
        source="lpips 0.1, alex",
        sha256=hash_tensors(model.state_dict()),
        preprocessing=PREPROCESSING,
    )
    return Lpips(card, model.eval(), device or ("cuda" if torch.cuda.is_available() else "cpu"))
