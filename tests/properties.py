"""What the tests of properties share: one profile of hypothesis, and strategies for outside text.

A property runs on the same examples each time: they are derived from the test itself, none is kept
between runs, and no clock decides anything.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, configuration, settings
from hypothesis import strategies as st

from bootpig_jax.errors import UserError

configuration.set_hypothesis_home_dir(Path(__file__).parents[1] / ".cache" / "hypothesis")
settings.register_profile(
    "deterministic",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("deterministic")


def value_or_user_error(parse: Callable[..., Any], *arguments: Any) -> Any:
    """What `parse` returns, or its `UserError`, which must be one line."""
    try:
        return parse(*arguments)
    except UserError as error:
        assert str(error) and len(str(error).splitlines()) == 1, str(error)
        return error


# What JSON can hold that parsers stumble over, beside what `json.dumps` makes of Python's values.
_ODD_JSON = st.one_of(
    st.integers(1, 4000).map(lambda depth: "[" * depth + "]" * depth),
    st.integers(1, 4000).map(lambda depth: '{"a":' * depth + "1" + "}" * depth),
    st.sampled_from(["1" * 5000, "1e999", "-1e999", "NaN", "Infinity", r'"\ud800"', '"a\\nb"']),
)
_PLAIN_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.integers(-9, 9)
    | st.floats()
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
).map(json.dumps)
JSON_VALUES = _ODD_JSON | _PLAIN_JSON
"""Text of a JSON value."""


def changed_json(valid: Any) -> st.SearchStrategy[str]:
    """Text of `valid` with one of its values, at whatever depth, replaced by another."""
    return st.builds(_replaced, st.just(valid), st.sampled_from(list(_paths(valid))), JSON_VALUES)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _paths(inner, (*path, key))
        yield (*path, "another")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, inner in enumerate(value):
            yield from _paths(inner, (*path, index))


def _replaced(valid: Any, path: tuple[Any, ...], text: str) -> str:
    if not path:
        return text
    document = inner = json.loads(json.dumps(valid))
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = "\0"
    return json.dumps(document).replace(r'"\u0000"', text)


def changed_bytes(valid: bytes, pieces: Sequence[bytes] = ()) -> st.SearchStrategy[bytes]:
    """`valid` with up to three short stretches replaced by other bytes or by one of `pieces`."""
    inserted = st.binary(max_size=6)
    if pieces:
        inserted |= st.sampled_from(list(pieces))
    cuts = st.lists(
        st.tuples(st.integers(0, len(valid)), st.integers(0, 12), inserted), min_size=1, max_size=3
    )

    def apply(cuts: list[tuple[int, int, bytes]]) -> bytes:
        data = valid
        for start, length, piece in cuts:
            data = data[:start] + piece + data[start + length :]
        return data

    return cuts.map(apply)
