"""What a shipped configuration file says, against what takes effect."""

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from bootpig_jax.yaml_config import dump_config, load_config


def assert_takes_effect(model_cls: type[pydantic.BaseModel], path: Path, scratch: Path) -> None:
    """Every field of the file has its value in the configuration, which is written to `scratch`
    and read back equal."""
    config = load_config(model_cls, path)
    values = config.model_dump(mode="json")
    said = list(_leaves(yaml.safe_load(path.read_text())))
    assert said
    for keys, value in said:
        assert functools.reduce(dict.__getitem__, keys, values) == pytest.approx(value), keys
    scratch.write_text(dump_config(config))
    assert load_config(model_cls, scratch) == config


def _leaves(
    values: Mapping[str, Any], keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*keys, key))
        else:
            # PyYAML, the other reader here, takes 5e-6 for text.
            written_short = re.fullmatch(r"[\d.]+e-?\d+", str(value))
            yield (*keys, key), float(value) if written_short else value
