# SPDX-License-Identifier: Apache-2.0
"""Config dataclasses as plain JSON and back, and the difference of two.

A config is a keyword-only frozen dataclass whose fields are numbers, strings, booleans, None, tuples and configs.
Where a field may hold one of several configs (a masking strategy, a model), the JSON carries the class name under
"type".
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar, cast

from masktrain.errors import ConfigError, nearest

T = TypeVar("T")
KIND = "type"


def to_dict(config: Any) -> dict[str, Any]:
    """Return the config as JSON-ready data, each nested config with its class name under "type"."""
    out: dict[str, Any] = {KIND: type(config).__name__}
    for field in dataclasses.fields(config):
        out[field.name] = _plain(getattr(config, field.name))
    return out


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def from_dict(cls: type[T], data: dict[str, Any], path: str = "") -> T:
    """Build `cls` (or one of a union of configs) from what `to_dict` returned; unknown and missing fields are errors."""
    if not isinstance(data, dict):
        raise ConfigError(f"{path or 'config'}: expected an object, received {type(data).__name__}.")
    target = _class_for(cls, data.get(KIND), path)
    hints = typing.get_type_hints(target)
    fields = {f.name: f for f in dataclasses.fields(target)}
    for name in data:
        if name != KIND and name not in fields:
            raise ConfigError(
                f"{_join(path, name)}: {target.__name__} has no such field.{nearest(name, fields)}"
            )
    values = {}
    for name in fields:
        if name not in data:
            raise ConfigError(
                f"{_join(path, name)}: missing; it was written by another version of masktrain."
            )
        values[name] = _build(hints[name], data[name], _join(path, name))
    return cast(T, target(**values))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _members(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [m for arg in typing.get_args(hint) for m in _members(arg)]
    return [hint]


def _class_for(hint: Any, kind: str | None, path: str) -> Any:
    classes: list[Any] = [m for m in _members(hint) if dataclasses.is_dataclass(m)]
    if len(classes) == 1 and kind in (None, classes[0].__name__):
        return classes[0]
    for cls in classes:
        if cls.__name__ == kind:
            return cls
    allowed = [c.__name__ for c in classes]
    raise ConfigError(f"{path or 'config'}: type {kind!r} is not known; allowed: {', '.join(allowed)}.")


def _build(hint: Any, value: Any, path: str) -> Any:
    members = _members(hint)
    if isinstance(value, dict):
        return from_dict(hint, value, path)
    if isinstance(value, list):
        for member in members:
            if typing.get_origin(member) is tuple:
                args = typing.get_args(member)
                inner = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
                if len(inner) != len(value):
                    raise ConfigError(f"{path}: expected {len(inner)} values, received {len(value)}.")
                return tuple(_build(h, v, path) for h, v in zip(inner, value, strict=True))
    if not any(_fits(member, value) for member in members):
        allowed = " or ".join(_name(m) for m in members)
        raise ConfigError(f"{path}: expected {allowed}, received {value!r}.")
    return float(value) if float in members and type(value) is int and int not in members else value


def _fits(member: Any, value: Any) -> bool:
    if typing.get_origin(member) is typing.Literal:
        return value in typing.get_args(member)
    if member is type(None):
        return value is None
    if member is float:
        return type(value) in (int, float)
    return member in (int, str, bool) and type(value) is member


def _name(member: Any) -> str:
    if typing.get_origin(member) is typing.Literal:
        return " or ".join(repr(a) for a in typing.get_args(member))
    return "none" if member is type(None) else getattr(member, "__name__", str(member))


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted field: value} of a config, with the type of each nested config."""
    out: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        _flatten_into(out, _join(prefix, name), value)
    return out


def _flatten_into(out: dict[str, Any], path: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _flatten_into(out, _join(path, name), inner)
    else:
        out[path] = value


def differences(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """Return (dotted field, value in a, value in b) for each field in which two configs differ."""
    flat_a, flat_b = flatten(a), flatten(b)
    absent = "(absent)"
    return [
        (name, flat_a.get(name, absent), flat_b.get(name, absent))
        for name in sorted(flat_a.keys() | flat_b.keys())
        if flat_a.get(name, absent) != flat_b.get(name, absent)
    ]
