"""Configurations from YAML, checked on load: an unknown, missing or ill-typed key is named."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from distill.errors import ConfigError

T = TypeVar("T")


def check_choice(owner: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{owner}.{name} is {value!r}; expected one of {list(choices)}")


def check_least(config: Any, owner: str, **least: float) -> None:
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and not value >= low:
            raise ConfigError(f"{owner}.{name} is {value}; expected at least {low}")


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` from YAML as the annotated type `kind`, or a ConfigError that names `where`."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if value is None else _build(options[0], value, where)
    if is_dataclass(kind):
        return from_dict(kind, value, where)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where} is {value!r}; expected a list")
        item = typing.get_args(kind)[0]
        return [_build(item, v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}; expected a mapping")
        item = (typing.get_args(kind) or (str, Any))[1]
        return {k: v if item is Any else _build(item, v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 (no dot) as text; a number is meant.
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    raise ConfigError(f"{where} is {value!r}; expected {getattr(kind, '__name__', kind)}")


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """A config dataclass from plain data; keys are checked at every level."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'the configuration'} is {data!r}; expected a mapping of keys")
    dot = f"{where}." if where else ""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise ConfigError(f"unknown key {dot}{key}; known keys are {sorted(known)}")
    for name, f in known.items():
        if name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"missing key {dot}{name}")
    hints = typing.get_type_hints(cls)
    built = {key: _build(hints[key], value, f"{dot}{key}") for key, value in data.items()}
    try:
        return cls(**built)
    except ConfigError as err:
        raise ConfigError(f"{where}: {err}" if where else str(err)) from None


def to_dict(config: Any) -> dict[str, Any]:
    return asdict(config)


def bundled(name: str) -> Path:
    """Path of a configuration that comes with the package, such as "digits.yaml"."""
    return Path(str(resources.files("distill") / "configs" / name))


def load_config(cls: type[T], path: Path | str) -> T:
    """Read a YAML file as `cls`; a bare name that is no file may be a bundled configuration."""
    import yaml

    path = Path(path)
    if not path.is_file() and path.parent == Path(".") and bundled(path.name).is_file():
        path = bundled(path.name)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"cannot read the configuration {path}: {err.strerror or err}") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(err).split())}") from err
    try:
        return from_dict(cls, data)
    except ConfigError as err:
        raise ConfigError(f"{path}: {err}") from None
