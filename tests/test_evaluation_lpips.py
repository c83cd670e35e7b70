"""LPIPS diversity, with stand-ins for the packages `lpips` and `torchvision`, which tests lack."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bootpig_jax import evaluate
from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.datasets import open_dataset
from bootpig_jax.evaluation.embedders import EmbeddingCache, decode, preprocess
from bootpig_jax.evaluation.lpips import PREPROCESSING, load_lpips
from bootpig_jax.evaluation.protocol import differences
from bootpig_jax.evaluation.report import describe_scores
from bootpig_jax.evaluation.score import Settings, score_folder, score_real
from tests.evaluation_folders import CLASSES, write_dreambooth, write_pictures
from tests.test_evaluation_score import Projection

ALEXNET = {
    "features.0.weight": torch.full((2, 3, 1, 1), 0.5),
    "features.0.bias": torch.zeros(2),
    "features.3.weight": torch.tensor([1.0, -2.0]).reshape(1, 2, 1, 1),
    "features.3.bias": torch.ones(1),
    "classifier.1.weight": torch.zeros(1),
}


class StandIn(torch.nn.Module):
    """Named and called like `lpips.LPIPS`; AlexNet is two convolutions, the distance a mean."""

    def __init__(self, net: str, pnet_rand: bool, verbose: bool) -> None:
        super().__init__()
        assert net == "alex" and pnet_rand and not verbose
        first, second = torch.nn.Sequential(), torch.nn.Sequential()
        first.add_module("0", torch.nn.Conv2d(3, 2, 1))
        second.add_module("3", torch.nn.Conv2d(2, 1, 1))
        self.net = torch.nn.Sequential()
        self.net.add_module("slice1", first)
        self.net.add_module("slice2", second)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        assert not self.training and one.shape == other.shape and one.shape[1:] == (3, 256, 256)
        return ((self.net(one) - self.net(other)) ** 2).mean(dim=(1, 2, 3), keepdim=True)


def pretend(monkeypatch: pytest.MonkeyPatch, weights: dict[str, torch.Tensor]) -> None:
    """Installs stand-ins for the packages `lpips` and `torchvision`."""

    def get_state_dict(**how: Any) -> dict[str, torch.Tensor]:
        assert how == {"progress": False, "check_hash": True, "weights_only": True}
        return weights

    enum = SimpleNamespace(url="https://alexnet.pth", get_state_dict=get_state_dict)
    modules = {name: ModuleType(name) for name in ("lpips", "torchvision", "torchvision.models")}
    modules["lpips"].LPIPS = StandIn  # type: ignore[attr-defined]
    modules["torchvision.models"].AlexNet_Weights = SimpleNamespace(  # type: ignore[attr-defined]
        IMAGENET1K_V1=enum
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def distance(one: bytes, other: bytes) -> float:
    """What the stand-in does, in NumPy: 1 + (1 - 2) · half the sum of a pixel's channels."""
    a, b = (
        1 - 0.5 * preprocess(decode(data, "whole"), PREPROCESSING).astype(np.float64).sum(axis=0)
        for data in (one, other)
    )
    return float(((a - b) ** 2).mean())


def test_diversity_is_the_mean_distance_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, ALEXNET)
    dataset = open_dataset("dreambooth", write_dreambooth(tmp_path / "dataset"))
    pictures = write_pictures(tmp_path / "pictures", list(CLASSES), prompts=3, images=3)
    (pictures / "dog" / "00" / "01.png").write_bytes(b"broken")
    for name in ("00.png", "01.png"):
        (pictures / "dog" / "01" / name).unlink()
    how = {"cache": EmbeddingCache(None), "settings": Settings()}
    lpips = load_lpips(allow_pickle=True)
    found = score_folder(dataset, pictures, [Projection()], lpips=lpips, **how)  # type: ignore[arg-type]
    values = {one.file: one.values.get("LPIPS diversity") for one in found.pictures}
    three = [(pictures / "dog2" / "02" / f"{n:02d}.png").read_bytes() for n in range(3)]
    wanted = (distance(three[0], three[1]) + distance(three[0], three[2])) / 2
    assert values["dog2/02/00.png"] == pytest.approx(wanted, rel=1e-5)
    # Two of three are whole.
    pair = [(pictures / "dog" / "00" / f"{n:02d}.png").read_bytes() for n in (0, 2)]
    assert values["dog/00/00.png"] == pytest.approx(distance(*pair), rel=1e-5)
    assert values["dog/00/02.png"] == values["dog/00/00.png"]
    assert values["dog/01/02.png"] is None, "alone"
    assert found.summary["LPIPS diversity"].pictures == 36 - 1 - 2 - 1
    # The card tells; the real pictures can stand beside it all the same.
    plain = score_folder(dataset, pictures, [Projection()], **how)  # type: ignore[arg-type]
    assert differences(found.card, plain.card) == ["lpips"]
    real = score_real(dataset, [Projection()], **how)  # type: ignore[arg-type]
    report = describe_scores([found, real])
    assert "LPIPS diversity" in {row.name for table in report.tables for row in table.rows}


def test_the_network_sees_colours_from_minus_one_to_one() -> None:
    for level, expected in ((0, -1), (255, 1)):
        pixels = np.full((256, 256, 3), level, np.uint8)
        np.testing.assert_allclose(preprocess(pixels, PREPROCESSING), expected, atol=1e-6)


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dreambooth(tmp_path / "dataset")
    how = ["score", "--dataset", "dreambooth", "--data", str(data), "--output", "x.json", "--lpips"]
    with pytest.raises(UserError, match="--lpips: compares the pictures of a prompt"):
        evaluate.main([*how, "--sanity"])
    with pytest.raises(UserError, match="--lpips: its weights are pickled; --allow-pickle"):
        load_lpips()
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"--lpips: needs lpips, .*; pip install 'bootpig_jax"):
        load_lpips(allow_pickle=True)
    pretend(monkeypatch, {})
    with pytest.raises(UserError, match="https://alexnet.pth can't be loaded .*; put it into /"):
        load_lpips(allow_pickle=True)
