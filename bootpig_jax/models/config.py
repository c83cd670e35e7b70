"""Reads a network's sizes from the `config.json` of a diffusers folder.

A field that changes the computation and that the network does not know is an error, never ignored:
better no picture than a wrong one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from bootpig_jax.errors import UserError

T = TypeVar("T")


def pick(
    cls: type[T], config: Mapping[str, Any], name: str, fixed: Mapping[str, tuple[Any, ...]]
) -> T:
    """Builds the frozen dataclass `cls` from the fields of `config` that it declares.

    Args:
        cls: a frozen dataclass; its field names are the configuration's.
        config: the parsed `config.json`.
        name: what to call the network in an error.
        fixed: for each field the network implements one way only, the values that mean this way.

    Raises:
        UserError: a field is missing, or a fixed one has another value.
    """
    for field, supported in fixed.items():
        if field in config and config[field] not in supported:
            raise UserError(
                f"{name} config.json: {field} = {config[field]!r} is not supported; "
                f"supported: {', '.join(map(repr, supported))}"
            )
    values: dict[str, Any] = {}
    for declared in dataclasses.fields(cls):  # type: ignore[arg-type]
        if declared.name in config:
            value = config[declared.name]
            values[declared.name] = tuple(value) if isinstance(value, list) else value
        elif declared.default is dataclasses.MISSING:
            raise UserError(f"{name} config.json: the field {declared.name} is missing")
    return cls(**values)
