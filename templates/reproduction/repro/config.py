"""Typed configuration: one YAML file per experiment, overrides that reach every copy of a field.

A configuration is a tree of `Section`s. Every field stands in the file: a value that shapes a result is never
a default of the code.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from repro.errors import BadInput


class Section(BaseModel):
    """A frozen group of fields. Unknown keys and wrong types are refused; nothing is coerced."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Pace(Section):
    """How often a phase logs its loss and saves its state, in steps. It shapes no result."""

    log_every: PositiveInt
    checkpoint_every: PositiveInt


class RunConfig(Section):
    """What the kit needs of every configuration. A method's own one adds its fields, `phases` among them."""

    experiment: str
    pace: Pace


MOST_VALUES = 1_000_000
"""In one file. A dozen lines of aliases of aliases stand for billions."""

AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class Change:
    """One field that an override changed."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.before)} -> {json.dumps(self.after)}"


class _Loader(yaml.SafeLoader):
    """Safe loading with the scalars of YAML 1.2 (`1e-4` is a number, `no` is text) and no repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|)$", ["~", "n", ""]),
    ("bool", r"^(?:true|false)$", list("tf")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    # PyYAML's own constructor reads 0123 as octal.
    return int(loader.construct_scalar(node))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    known = set()
    for key in (loader.construct_object(key, deep=True) for key, _ in node.value):
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(
                problem=f"found the key {key!r}, expected text", problem_mark=node.start_mark
            )
        if key in known:
            raise yaml.MarkedYAMLError(
                problem=f"found the key '{key}' twice, expected once", problem_mark=node.start_mark
            )
        known.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


_QUOTES_NEEDED = "; put text with any of : [ { , * @ in quotes"
_TEXT_READ_AS_SYNTAX = re.compile(
    r"expected ',' or '[]}]', but got (?!'<stream end>')|mapping values are not allowed"
    r"|expected the node content|expected <block end>, but found '<scalar>'|found undefined alias"
    r"|found character '[^\\]' that cannot start"
    r"|expected alphabetic or numeric character"
)
"""What PyYAML says of a text such as `x[::6]` or `one: two` that it took for syntax."""


def parse_yaml(text: str, source: str) -> Any:
    """The plain data in a YAML text. Raises BadInput with the line when it is no YAML."""
    try:
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data only
        if _size(data, {}) > MOST_VALUES:
            raise ValueError(f"found more than {MOST_VALUES:,} values, each alias counted, expected fewer")
        return data
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem or error.context or "no YAML"
        hint = _QUOTES_NEEDED if _TEXT_READ_AS_SYNTAX.match(problem) else ""
        raise BadInput(f"{source}{line}: {problem}{hint}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f"{source}: no YAML: {' '.join(str(error).split())}") from None


def _size(data: Any, known: dict[int, int]) -> int:
    """How many values there are when every alias is written out; in memory each is one object."""
    if data is None or isinstance(data, bool | int | float | str):
        return 1
    if not isinstance(data, dict | list):
        raise ValueError(
            f"found a value of type {type(data).__name__}, expected text, numbers, lists and mappings"
        )
    if id(data) not in known:
        known[id(data)] = 0  # being counted
        known[id(data)] = 1 + sum(
            _size(item, known) for item in (data.values() if isinstance(data, dict) else data)
        )
    if not known[id(data)]:
        raise ValueError("found an alias inside of what it stands for")
    return known[id(data)]


def read_yaml(path: Path, may_be_empty: bool = False) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one where that may be.

    Raises BadInput when the file is missing, unreadable or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: found no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text: {error}") from None
    data = parse_yaml(text, str(path))
    if data is None and may_be_empty:
        return {}
    if not isinstance(data, dict):
        raise BadInput(f"{path}: found {_kind(data)}, expected a mapping of keys to values")
    return data


def validate(model: type[AnySection], data: Any, source: str) -> AnySection:
    """`data` as a `model`. Raises BadInput with one line per problem: source, key, found, expected."""
    try:
        return model.model_validate_json(json.dumps(data))  # JSON mode: strict, yet lists may fill tuples
    except ValidationError as error:
        raise BadInput(*(_problem(item, model, source) for item in error.errors())) from None


def load(
    model: type[AnySection], path: Path, overrides: Sequence[str] = ()
) -> tuple[AnySection, list[Change]]:
    """The configuration in `path` with `overrides` ("key=value"), and each field that they changed."""
    config = validate(model, read_yaml(path), str(path))
    data, changes, refused = config.model_dump(mode="json"), [], None
    for override in overrides:
        changes += _override(data, override)
        try:
            config, refused = validate(model, data, f"--set {override}"), None
        except BadInput as error:
            refused = refused or error  # a later override may belong to this one: fields are judged together
    if refused:
        raise refused
    return config, changes


def matches(config: Section, override: str) -> bool:
    """Whether an override ("pattern=value") names a field of the configuration."""
    pattern = override.partition("=")[0].split(".")
    return any(True for _ in _places(config.model_dump(mode="json"), pattern, ""))


def digest(data: Any) -> str:
    """A short hash of plain data or a Section: equal content, equal hash."""
    if isinstance(data, BaseModel):
        data = data.model_dump(mode="json")
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a nested mapping by its dotted key."""
    if isinstance(data, BaseModel):
        data = data.model_dump(mode="json")
    if not isinstance(data, dict):
        return {prefix: data}
    return {
        key: leaf
        for name, child in data.items()
        for key, leaf in flatten(child, f"{prefix}.{name}" if prefix else name).items()
    }


def shaping(config: RunConfig) -> dict[str, Any]:
    """The plain data of what shapes a result: everything but the pace."""
    return config.model_dump(mode="json", exclude={"pace"})


def differences(before: Any, after: Any) -> list[Change]:
    """The leaves in which two configurations differ."""
    left, right = flatten(before), flatten(after)
    return [
        Change(key, left.get(key), right.get(key))
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key)
    ]


def _override(data: dict[str, Any], override: str) -> list[Change]:
    """Applies "pattern=value" to `data` in place; `*` stands for any one name in the dotted path."""
    pattern, equals, text = override.partition("=")
    if not equals or not pattern:
        raise BadInput(f"--set {override}: found no value, expected key=value")
    value = parse_yaml(text, f"--set {override}")
    places = list(_places(data, pattern.split("."), ""))
    if not places:
        raise BadInput(
            f"--set {override}: found no field '{pattern}', expected one of this "
            f"configuration{_hint(pattern, _patterns(data))}"
        )
    changes = [Change(key, parent[name], value) for parent, name, key in places if parent[name] != value]
    for parent, name, _ in places:
        parent[name] = value
    return changes


def _patterns(data: dict[str, Any]) -> list[str]:
    """What could have been meant: every field, and every field with one name of its path replaced by `*`."""
    found: dict[str, None] = {}
    for key in flatten(data):
        names = key.split(".")
        for index in range(1, len(names) - 1):
            found[".".join([*names[:index], "*", *names[index + 1 :]])] = None
        found[key] = None
    return list(found)


def _places(node: Any, pattern: list[str], prefix: str) -> Iterator[tuple[dict[str, Any], str, str]]:
    """(mapping, name in it, dotted key) of each field that a pattern matches."""
    if isinstance(node, dict):
        for name in (name for name in node if fnmatchcase(name, pattern[0])):
            key = f"{prefix}.{name}" if prefix else name
            if len(pattern) == 1:
                yield node, name, key
            else:
                yield from _places(node[name], pattern[1:], key)


def _problem(error: Mapping[str, Any], model: type[Section], source: str) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "(the whole file)"
    if error["type"] == "extra_forbidden":
        siblings = [k for k in _known_keys(model, error["loc"][:-1])]
        expected = f"{', '.join(siblings) or 'none here'}{_hint(str(error['loc'][-1]), siblings)}"
        return f"{source}: {key}: found an unknown key, expected {expected}"
    if error["type"] == "missing":
        return f"{source}: {key}: found nothing, expected a value"
    expected = re.sub(r"^(Input should be|Value error,) ?", "", error["msg"]).replace(
        "an object", "a mapping"
    )
    if error["type"] == "string_type" and isinstance(error["input"], int | float):
        expected += "; put it in quotes"
    found = _fields_named(error["input"], expected) or _kind(error["input"])
    return f"{source}: {key}: found {found}, expected {expected}"


def _fields_named(section: Any, expected: str) -> str:
    """The single values of a section whose names the words of its validator use."""
    fields = section.items() if isinstance(section, dict) else ()
    values = {name: value for name, value in fields if not isinstance(value, dict | list)}
    return ", ".join(
        f"{name} {_kind(value)}" for name, value in values.items() if re.search(rf"\b{name}\b", expected)
    )


def _known_keys(model: Any, location: Sequence[int | str]) -> list[str]:
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        choices = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((c for c in choices if hasattr(c, "model_fields")), None)
    return list(getattr(model, "model_fields", {}))


def _hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _kind(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
