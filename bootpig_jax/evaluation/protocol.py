"""The protocol card: everything that a figure depends on beside the pictures themselves."""

import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from bootpig_jax.evaluation.embedders import ModelCard
from bootpig_jax.yaml_config import ConfigModel

PAIRS = (
    "every generated with every real picture of a subject; mean over a subject's pictures, then "
    "over subjects"
)


class Card(ConfigModel):
    """What two results must share to stand in one table.

    Attributes:
        dataset: its name.
        dataset_sha256: of its names, prompts and real pictures.
        limit: how many subjects and prompts of each are scored; None: all.
        subjects: how many.
        prompts: how many, over all subjects.
        pictures_per_prompt: the most that any prompt has.
        models: label -> model and preprocessing.
        masked: how foregrounds are cut out; None where they are not scored.
        template: what a prompt is put into before CLIP reads it.
        pairs: which pictures are compared, and how means are taken.
        lpips: the model of the LPIPS diversity; None where it is not scored.
    """

    dataset: str
    dataset_sha256: str
    limit: int | None
    subjects: int
    prompts: int
    pictures_per_prompt: int
    models: dict[str, ModelCard]
    masked: str | None
    template: str
    pairs: str = PAIRS
    lpips: ModelCard | None = None


class Environment(ConfigModel):
    """What a figure should not depend on, but might.

    Attributes:
        versions: of Python and the packages that compute.
        platform: the operating system.
        command: that made the result.
    """

    versions: dict[str, str]
    platform: str
    command: str


def read_versions() -> dict[str, str]:
    """The versions of Python and the packages that compute."""
    found = {"python": platform.python_version()}
    for name in (
        "bootpig_jax",
        "torch",
        "transformers",
        "numpy",
        "pillow",
        "opencv-python-headless",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_platform() -> str:
    """The operating system and the processor's architecture."""
    return f"{sys.platform} {platform.machine()}"


def differences(one: Card, other: Card) -> list[str]:
    """The fields in which two cards differ, dotted; where a model came from does not count.

    Nor does what is about pictures of one prompt where one of them is of the real pictures, which
    have no prompt.
    """
    values = [card.model_dump(mode="json") for card in (one, other)]
    for card in values:
        for model in card["models"].values():
            del model["source"]
        if not (one.pictures_per_prompt and other.pictures_per_prompt):
            del card["pictures_per_prompt"], card["lpips"]
    return sorted(_differing(values[0], values[1], ""))


def _differing(one: Any, other: Any, name: str) -> list[str]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return [
            difference
            for key in one.keys() | other.keys()
            for difference in _differing(
                one.get(key), other.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if one == other else [name]
