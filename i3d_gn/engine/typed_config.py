"""A YAML file as a typed, checked, frozen dataclass, whatever it configures.

Anything misspelt or mistyped is one `ConfigError` that names the file, the line, the key and what
would be right.
"""

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

ConfigT = TypeVar("ConfigT")

# Keys that may change between a run and its continuation: they change no result.
MACHINE_KEYS = frozenset(
    {
        "output_dir",
        "data.num_workers",
        "train.log_every",
        "train.checkpoint_every",
        "train.checkpoint_every_epochs",
        "train.keep_checkpoints",
        "test.clips_per_forward",
    }
)


class ConfigError(ValueError):
    """A config that cannot be used, in one line."""


def load_typed(
    path: str | Path,
    overrides: Sequence[str],
    schema: type[ConfigT],
    check: Callable[[ConfigT, Path], None],
) -> ConfigT:
    """Read a YAML file as the dataclass `schema`, apply `key=value` overrides, `check` it.

    Raises:
        ConfigError: file missing or not YAML; key unknown, mistyped or left out; what `check`
            raises.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        text = path.read_text(encoding="utf-8")
        root, values = yaml.compose(text), OmegaConf.create(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected `key: value` lines at top level")
    lines: dict[str, int] = {}
    for key, line in _key_lines(root):
        _check_key(key, f"{path}:{line}", schema)
        if key in lines:  # once nested, once with a dot
            raise ConfigError(f"{path}:{line}: {key} was already set in line {lines[key]}")
        lines[key] = line
    merged = _writable_schema(schema)
    for key, value in _flatten(_plain(values)):
        _assign(merged, key, value, f"{path}:{lines[key]}", schema)
    for override in overrides:
        where = f"override {override!r}"
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"{where}: expected key=value, e.g. train.lr=0.02")
        _check_key(key, where, schema)
        try:
            values = OmegaConf.from_dotlist([override])
        except yaml.YAMLError as error:
            raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
        for inner_key, value in _flatten(_plain(values)):
            _assign(merged, inner_key, value, where, schema)
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{path}: no value for {', '.join(missing)}")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {_first_line(error)}") from error
    assert isinstance(config, schema)
    check(config, path)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain nested dictionaries and lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """The resolved config as YAML text that `load_typed` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def config_hash(config: Any) -> str:
    """SHA-256 of everything in the config that can change a result."""
    values = {k: v for k, v in _flatten(to_dict(config)) if k not in MACHINE_KEYS}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: Any, *, section: str = "") -> list[str]:
    """`key: old -> new` for every key under `section` that can change a result and does."""
    before, after = dict(_flatten(old)), dict(_flatten(to_dict(new)))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if key.startswith(section) and key not in MACHINE_KEYS and before.get(key) != after.get(key)
    ]


def check_numbers(
    config: Any,
    path: Path,
    *,
    at_least_1: Sequence[str] = (),
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    up_to_1: Sequence[str] = (),
) -> None:
    """Check the ranges of numbers, and of all numbers of a list, by their keys.

    Raises:
        ConfigError: a number, not None, is out of its range, infinite or not a number.
    """
    rules: tuple[tuple[Sequence[str], Callable[[float], bool], str], ...] = (
        (at_least_1, lambda number: number >= 1, "be at least 1"),
        (positive, lambda number: number > 0, "be positive"),
        (not_negative, lambda number: number >= 0, "not be negative"),
        (up_to_1, lambda number: 0 <= number <= 1, "lie in [0, 1]"),
    )
    for keys, holds, rule in rules:
        for key in keys:
            value = attrgetter(key)(config)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not (holds(number) and math.isfinite(number)):
                    raise ConfigError(f"{path}: {key} is {number}; it must {rule}")


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _writable_schema(schema: type) -> Any:
    structured = OmegaConf.structured(schema)
    OmegaConf.set_readonly(structured, False)  # frozen dataclasses come out read-only
    for section in _sections(schema):
        OmegaConf.set_readonly(structured[section], False)
    return structured


def _plain(values: Any) -> dict[str, Any]:
    container = OmegaConf.to_container(values)
    assert isinstance(container, dict)
    return container  # type: ignore[return-value]


def _assign(config: Any, key: str, value: Any, where: str, schema: type) -> None:
    """Set `key` of `config`, which knows its type; `where` is where the value was given."""
    _check_key(key, where, schema)
    if key in _sections(schema):
        raise ConfigError(f"{where}: {key} is {value!r}; it is a section, set {key}.<key> instead")
    try:
        OmegaConf.update(config, key, value)
    except (OmegaConfBaseException, TypeError) as error:
        # OmegaConf leaves its template unfilled where an element of a tuple is wrong.
        reason = _first_line(error).replace("$VALUE_TYPE", type(value).__name__)
        reason = reason.replace("$VALUE", str(value))
        raise ConfigError(f"{where}: {key}: {reason}") from error


def _first_line(error: Exception) -> str:
    return str(getattr(error, "msg", None) or error).splitlines()[0]


def _sections(schema: type) -> dict[str, Any]:
    """Name -> dataclass of the keys that have keys below them."""
    return {f.name: f.type for f in dataclasses.fields(schema) if dataclasses.is_dataclass(f.type)}


def _known_keys(schema: type) -> set[str]:
    keys = {top.name for top in dataclasses.fields(schema)}
    for name, section in _sections(schema).items():
        keys |= {f"{name}.{inner.name}" for inner in dataclasses.fields(section)}
    return keys


def _key_lines(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, int]]:
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        yield key, key_node.start_mark.line + 1
        if isinstance(value_node, yaml.MappingNode):
            yield from _key_lines(value_node, f"{key}.")


def _check_key(key: str, where: str, schema: type) -> None:
    known = _known_keys(schema)
    if key in known:
        return
    last_parts = {k.rpartition(".")[2]: k for k in known}
    candidates = known - set(_sections(schema)) if "." in key else known
    near = difflib.get_close_matches(key, candidates, n=1, cutoff=0.6)
    same_name = last_parts.get(key.rpartition(".")[2])
    nearest = same_name or (near[0] if near else None)
    if nearest:
        raise ConfigError(f"{where}: unknown key {key!r}; did you mean {nearest!r}?")
    section = key.rpartition(".")[0]
    beside = sorted(k for k in known if k.rpartition(".")[0] == section)
    keys = beside or sorted(k for k in known if "." not in k)
    raise ConfigError(f"{where}: unknown key {key!r}; there are {', '.join(keys)}")
