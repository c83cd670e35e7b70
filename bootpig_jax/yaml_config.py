"""Reads a typed configuration from a YAML file and the command line, strictly.

A configuration decides hours of computing, so nothing in it is guessed at: an unknown or repeated
key, a value of the wrong type, a number that is not finite, an alias or a tag that would run Python
are all one-line errors that name the file, the line and the field.

The YAML read here is a subset of YAML 1.2. YAML 1.1, which PyYAML implements, turns `1e-4` into a
string, `no` into False, `010` into 8 and `1:30` into 90; here `1e-4` is a number and the others are
not converted. Values are validated in pydantic's strict mode, where `true` is no number and `"3"`
no integer.

This module imports neither jax nor torch: training and data generation share it.
"""

import argparse
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic
import yaml

from bootpig_jax.errors import UserError
from bootpig_jax.files import local_name


class ConfigModel(pydantic.BaseModel):
    """Base class of all configurations: frozen, closed, and without NaN or infinity."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Model = TypeVar("Model", bound=pydantic.BaseModel)

_COMMAND_LINE = "command line"

# One entry for each key of the file or the command line: its dotted path -> "file:line" or "command
# line".
_Sources = dict[tuple[str | int, ...], str]


def load_config(
    model_cls: type[Model], path: str | Path | None, overrides: Sequence[str] = ()
) -> Model:
    """Reads, overrides and validates a configuration.

    Args:
      model_cls: a pydantic model with `extra="forbid"`, such as a subclass of `ConfigModel`.
      path: a YAML file, or None to start from the defaults.
      overrides: what stands on the command line: `a.b=c`, `--a.b=c` or `--a.b c`, where `c` is
      YAML.
        They are applied in order, after the file.

    Returns:
      The validated model.

    Raises:
      UserError: one line that names the file and the field and says what is wrong.
    """
    values: dict[str, Any] = {}
    sources: _Sources = {}
    origin = _COMMAND_LINE
    if path is not None:
        origin = str(path)
        values = _read_file(Path(path), sources)
    for key, text in _split_overrides(overrides):
        _override(values, key, text, sources)
    try:
        # Going through JSON lets strict mode take a list for a tuple and a string for a path.
        return model_cls.model_validate_json(json.dumps(values), strict=True)
    except RecursionError:
        raise UserError(f"{origin}: is nested too deeply") from None
    except pydantic.ValidationError as error:
        raise UserError(_explain(error, model_cls, sources, origin)) from None


def dump_config(model: pydantic.BaseModel) -> str:
    """Returns the configuration as YAML that `load_config` reads back to an equal model."""
    values = model.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_command_line(
    model_cls: type[Model], argv: Sequence[str] | None, *, prog: str, description: str
) -> Model:
    """Parses `--config FILE [--print-config] [key=value ...]` into a configuration.

    `--print-config` prints the effective configuration and exits with status 0.

    Args:
      model_cls: the configuration's model.
      argv: the arguments without the program's name; None for `sys.argv[1:]`.
      prog: the command shown in the help, such as `python -m bootpig_jax.train`.
      description: the first line of the help.

    Raises:
      UserError: the configuration is not valid.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} --config FILE [--print-config] [key=value ...]",
        description=description,
        epilog="Every field can be overridden: a.b=value or --a.b value. Fields: "
        + ", ".join(_fields(model_cls)),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=local_name,
        metavar="FILE",
        help="a YAML file, such as configs/toyland.yaml",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the effective configuration and exit"
    )
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.config is None and not overrides and not arguments.print_config:
        raise UserError(
            "--config is missing: name a YAML file, such as --config configs/toyland.yaml"
        )
    model = load_config(model_cls, arguments.config, overrides)
    if arguments.print_config:
        print(dump_config(model), end="")
        raise SystemExit(0)
    return model


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without aliases, repeated keys and YAML 1.1's surprising scalars."""

    # Not inherited: PyYAML would also resolve `on`, `010`, `1:30` and dates.
    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        # An alias repeats a subtree: nested, a few lines grow to gigabytes.
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not supported", problem_mark=mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is not a name", problem_mark=key_node.start_mark
                )
            line = key_node.start_mark.line + 1
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} appears twice (first on line {seen[key]}): remove one",
                    problem_mark=key_node.start_mark,
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text that `_StrictLoader` would take for a number, such as `1e4`."""


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    text = str(loader.construct_scalar(node)).lower()
    if text.lstrip("+-") in (".inf", ".nan"):
        return float(text.replace(".", ""))
    value = float(text)
    # So that `steps: 1e4` is a whole number. An integer is fine where a float is asked for.
    return int(value) if "." not in text and value.is_integer() else value


_StrictLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))"
        r"|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    for _resolver in (_StrictLoader, _Dumper):
        _resolver.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
        )


def _parse_yaml(text: str, name: str) -> tuple[Any, yaml.Node | None]:
    """Returns the value and the node tree (which knows the lines) of one YAML document."""
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None or name == _COMMAND_LINE else f"{name}:{mark.line + 1}"
        problem = error.problem or "is not valid YAML"
        if "could not determine a constructor for the tag" in problem:
            tag = problem.rsplit(" ", 1)[-1].strip("'").replace("tag:yaml.org,2002:", "!!")
            problem = f"the tag {tag} is not allowed: write a plain value"
        raise UserError(f"{where}: {_one_line(problem)}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{name}: is not valid YAML: {_one_line(str(error))}") from None
    except (AttributeError, KeyError, TypeError):
        # How PyYAML fails where a tag stands before what it is not, such as `!!timestamp x`.
        raise UserError(f"{name}: a tag such as !!bool does not fit its value") from None
    except RecursionError:
        raise UserError(f"{name}: is nested too deeply") from None


def _read_file(path: Path, sources: _Sources) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    values, node = _parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold `key: value` lines at its top level")
    if node is not None:
        for keys, line in _lines(node):
            sources[keys] = f"{path}:{line}"
    return values


def _lines(
    node: yaml.Node, prefix: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """Yields the path and the line of every key below `node`."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*prefix, key.value), key.start_mark.line + 1
            yield from _lines(value, (*prefix, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*prefix, index), value.start_mark.line + 1
            yield from _lines(value, (*prefix, index))


def _split_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (dotted key, YAML text) for `a.b=c`, `--a.b=c` and `--a.b c`."""
    remaining = iter(arguments)
    for argument in remaining:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            if not argument.startswith("--"):
                raise UserError(f"{_COMMAND_LINE}: {argument!r} is no override: write key=value")
            following = next(remaining, None)
            if following is None:
                raise UserError(
                    f"{_COMMAND_LINE}: {argument} needs a value: write {argument} VALUE"
                )
            text = following
        if not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UserError(f"{_COMMAND_LINE}: {argument!r} is no override: write key=value")
        yield key, text


def _override(values: dict[str, Any], key: str, text: str, sources: _Sources) -> None:
    """Sets the dotted `key` of the nested `values` to the YAML `text`, in place."""
    value, _ = _parse_yaml(text, _COMMAND_LINE)
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if inner is None:
            inner = values[parent] = {}
        if not isinstance(inner, dict):
            raise UserError(f"{_COMMAND_LINE}: {key}: {parent} is a single value and has no fields")
        values = inner
    values[last] = value
    sources[tuple(key.split("."))] = _COMMAND_LINE


def _explain(
    error: pydantic.ValidationError,
    model_cls: type[pydantic.BaseModel],
    sources: _Sources,
    origin: str,
) -> str:
    """Puts the first of the validation errors into one line."""
    details = error.errors(include_url=False)
    # An unknown key is the likelier mistake when a required one is missing too.
    first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    location = tuple(first["loc"])
    where = origin
    for length in range(len(location), 0, -1):
        if location[:length] in sources:
            where = sources[location[:length]]
            break
    field = ".".join(map(str, location))
    if first["type"] == "extra_forbidden":
        message = f"unknown key {field}{_did_you_mean(model_cls, location)}"
    elif first["type"] == "missing":
        message = f"{field} is missing: set it in the file or as {field}=..."
    else:
        problem = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        problem = problem.removeprefix("Input ")
        got = first["input"]
        shown = "" if isinstance(got, Mapping) else f", got {json.dumps(got, default=str)[:80]}"
        message = f"{field}: {problem}{shown}" if field else problem
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{where}: {_one_line(message)}{more}"


def _did_you_mean(model_cls: type[pydantic.BaseModel], location: tuple[str | int, ...]) -> str:
    fields = list(_fields(model_cls))
    dotted = ".".join(str(part) for part in location if isinstance(part, str))
    *parents, last = dotted.split(".")
    prefix = "".join(f"{parent}." for parent in parents)
    siblings = sorted({f[len(prefix) :].split(".")[0] for f in fields if f.startswith(prefix)})
    close = difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)
    if close:
        return f": did you mean {prefix}{close[0]}?"
    # The name may be right and the section wrong.
    last_words = {f.rsplit(".", 1)[-1]: f for f in fields}
    close = difflib.get_close_matches(last, last_words, n=1, cutoff=0.6)
    if close:
        return f": did you mean {last_words[close[0]]}?"
    return f": the keys here are {', '.join(siblings)}"


def _fields(model_cls: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all fields, those of nested models included."""
    for name, field in model_cls.model_fields.items():
        nested = [
            kind
            for kind in (field.annotation, *get_args(field.annotation))
            if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)
        ]
        if not nested:
            yield f"{prefix}{name}"
        for kind in nested:
            yield from _fields(kind, f"{prefix}{name}.")


def _one_line(text: str) -> str:
    return " ".join(text.split())
