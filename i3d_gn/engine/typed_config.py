"""A YAML file as a typed, checked, frozen dataclass.

A misspelled key or a value of the wrong type is one `ConfigError` that names the file, the line,
the key, and the nearest valid key.
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

from i3d_gn.engine.config_files import config_files

ConfigT = TypeVar("ConfigT")

_MACHINE = "machine"
_ADDED = "added"
_MAX_BYTES = 100_000


class ConfigError(ValueError):
    """A config that cannot be used; a one-line message."""


def machine_key(default: Any) -> Any:
    """A dataclass field that belongs to the machine, not to the experiment: it changes no result.

    Such keys may differ when a run resumes, and do not count in `differences` and `config_hash`.
    """
    return dataclasses.field(default=default, metadata={_MACHINE: True})


def added_key(default: Any) -> Any:
    """A dataclass field that earlier configs lack; its default changes nothing for them.

    At its default it does not count in `config_hash`, so that hashes in earlier results stay valid.
    """
    return dataclasses.field(default=default, metadata={_ADDED: True})


def load_typed(
    path: str | Path,
    overrides: Sequence[str],
    schema: type[ConfigT],
    check: Callable[[ConfigT, Path], None],
    defaults: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> ConfigT:
    """Read a YAML file as the dataclass `schema`, apply `key=value` overrides, `check` it.

    Args:
        path: A file, or the name of a config that comes with the package, such as `demo`; a file
            of that name wins.
        overrides: `key=value`.
        schema: Of the config.
        check: Raises a ConfigError for values that are wrong although their types are right.
        defaults: Other defaults than the schema's, by key, for the keys that are set.

    Raises:
        ConfigError: The file is missing or not YAML; a key is unknown, missing or has a wrong type;
            or what `check` raises.
    """
    path = find_config(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: over {_MAX_BYTES // 1000} kB, which no config is")
        text = path.read_text(encoding="utf-8")
        root, values = yaml.compose(text), OmegaConf.create(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not a config: nested too deeply") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected `key: value` lines at top level")
    lines: dict[str, int] = {}
    for key, line in _key_lines(root):
        _check_key(key, f"{path}:{line}", schema)
        if key in lines:  # once nested, once dotted
            raise ConfigError(f"{path}:{line}: {key} was already set in line {lines[key]}")
        lines[key] = line
    given = [(key, value, f"{path}:{lines[key]}") for key, value in _flatten(_plain(values))]
    given += _parse_overrides(overrides, schema)
    merged = _writable_schema(schema)
    if defaults is not None:
        for key, value in defaults({key: value for key, value, _ in given}).items():
            _assign(merged, key, value, f"{path}: default", schema)
    for key, value, where in given:
        _assign(merged, key, value, where, schema)
    return _checked(merged, path, schema, check)


def find_config(path: str | Path) -> Path:
    """`path`, or the file of the config that comes with the package under this name.

    Raises:
        ConfigError: There is neither.
    """
    path = Path(path)
    if path.is_file():
        return path
    by_name = config_files()
    found = by_name.get(path.as_posix().removesuffix(".yaml"))
    if found is None:
        names = ", ".join(by_name)
        raise ConfigError(f"config file not found: {path}; configs known by name are {names}")
    return found


def from_dict(
    values: dict[str, Any],
    path: Path,
    schema: type[ConfigT],
    check: Callable[[ConfigT, Path], None],
    overrides: Sequence[str] = (),
) -> ConfigT:
    """The dataclass `schema` from what `to_dict` returned and the file `path` contains.

    Raises:
        ConfigError: As `load_typed`.
    """
    merged = _writable_schema(schema)
    for key, value in _flatten(values):
        _assign(merged, key, value, str(path), schema)
    for key, value, where in _parse_overrides(overrides, schema):
        _assign(merged, key, value, where, schema)
    return _checked(merged, path, schema, check)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain nested dictionaries and lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_flat_dict(config: Any) -> dict[str, Any]:
    """The config as `{"section.key": value}`."""
    return dict(_flatten(to_dict(config)))


def to_yaml(config: Any) -> str:
    """The resolved config as YAML text that `load_typed` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def config_hash(config: Any) -> str:
    """SHA-256 of everything in the config that can change a result."""
    schema = type(config)
    machine, defaults = _marked_keys(schema, _MACHINE), _defaults(schema)
    added = _marked_keys(schema, _ADDED)
    values = {
        key: value
        for key, value in _flatten(to_dict(config))
        if key not in machine and not (key in added and value == defaults[key])
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], schema: type) -> list[str]:
    """`key: old -> new` for every key that differs and can change a result.

    A key that one of them lacks, because an earlier version wrote it, has its default there.
    """
    before, after, defaults = dict(_flatten(old)), dict(_flatten(new)), _defaults(schema)
    changed = []
    for key in sorted((before.keys() | after.keys()) - _marked_keys(schema, _MACHINE)):
        values = [side.get(key, defaults.get(key)) for side in (before, after)]
        if values[0] != values[1]:
            changed.append(f"{key}: {values[0]} -> {values[1]}")
    return changed


def check_numbers(
    config: Any,
    where: str,
    *,
    at_least_1: Sequence[str] = (),
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    up_to_1: Sequence[str] = (),
) -> None:
    """Check the ranges of numbers, or of all numbers of a list, by their keys; None is valid.

    `where` stands before the key in messages.

    Raises:
        ConfigError: A number is out of range, too large for torch, infinite or NaN.
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
                if number is None:
                    continue
                if isinstance(number, float) and not math.isfinite(number):
                    raise ConfigError(f"{where}{key} is {number}; it must be finite")
                if not holds(number):
                    raise ConfigError(f"{where}{key} is {number}; it must {rule}")
                if abs(number) >= 2**63:  # torch's integers
                    raise ConfigError(f"{where}{key} is {number}; it must be less than 2**63")


def _parse_overrides(overrides: Sequence[str], schema: type) -> list[tuple[str, Any, str]]:
    """Key, value and where it was set, of each."""
    parsed = []
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
        parsed += [(inner_key, value, where) for inner_key, value in _flatten(_plain(values))]
    return parsed


def _checked(
    merged: Any, path: Path, schema: type[ConfigT], check: Callable[[ConfigT, Path], None]
) -> ConfigT:
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{path}: missing value for {', '.join(missing)}")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {_first_line(error)}") from error
    assert isinstance(config, schema)
    check(config, path)
    return config


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _writable_schema(schema: type) -> Any:
    structured = OmegaConf.structured(schema)
    OmegaConf.set_readonly(
        structured, False
    )  # OmegaConf makes those of frozen dataclasses read-only
    for section in _sections(schema):
        OmegaConf.set_readonly(structured[section], False)
    return structured


def _plain(values: Any) -> dict[str, Any]:
    container = OmegaConf.to_container(values)
    assert isinstance(container, dict)
    return container  # type: ignore[return-value]


def _assign(config: Any, key: str, value: Any, where: str, schema: type) -> None:
    """Set `key` of the typed `config`; `where` says where the value comes from."""
    _check_key(key, where, schema)
    if key in _sections(schema):
        raise ConfigError(f"{where}: {key} is {value!r}; it is a section; set {key}.<key> instead")
    try:
        OmegaConf.update(config, key, value)
    except (OmegaConfBaseException, TypeError) as error:
        # OmegaConf does not fill in its message template if an element of a tuple is wrong.
        reason = _first_line(error).replace("$VALUE_TYPE", type(value).__name__)
        reason = reason.replace("$VALUE", str(value))
        raise ConfigError(f"{where}: {key}: {reason}") from error


def _first_line(error: Exception) -> str:
    return str(getattr(error, "msg", None) or error).splitlines()[0]


def _sections(schema: type) -> dict[str, Any]:
    """Sections of the config: name -> dataclass."""
    return {f.name: f.type for f in dataclasses.fields(schema) if dataclasses.is_dataclass(f.type)}


def _known_keys(schema: type) -> set[str]:
    keys = {top.name for top in dataclasses.fields(schema)}
    for name, section in _sections(schema).items():
        keys |= {f"{name}.{inner.name}" for inner in dataclasses.fields(section)}
    return keys


def _key_fields(schema: type) -> dict[str, dataclasses.Field[Any]]:
    """Every key of the config and of its sections, with its field."""
    named = [("", schema), *((f"{name}.", section) for name, section in _sections(schema).items())]
    return {
        f"{prefix}{field.name}": field
        for prefix, section in named
        for field in dataclasses.fields(section)
    }


def _marked_keys(schema: type, mark: str) -> set[str]:
    """Keys made by `machine_key` or `added_key`."""
    return {key for key, field in _key_fields(schema).items() if mark in field.metadata}


def _defaults(schema: type) -> dict[str, Any]:
    """Default of each key that has one, as `to_dict` would give it."""
    return {
        key: list(field.default) if isinstance(field.default, tuple) else field.default
        for key, field in _key_fields(schema).items()
        if field.default is not dataclasses.MISSING
    }


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
    section, _, name = key.rpartition(".")
    beside = sorted(k for k in known if k.rpartition(".")[0] == section)
    keys = beside or sorted(k for k in known if "." not in k)
    # A known name in another section, else similar names in this one, else in any.
    near = [k for k in sorted(known) if k.rpartition(".")[2] == name]
    for candidates in (keys, sorted(known - set(_sections(schema)))):
        near = near or difflib.get_close_matches(key, candidates, n=2, cutoff=0.75)
    if near:
        options = " or ".join(repr(k) for k in near)
        raise ConfigError(f"{where}: unknown key {key!r}; did you mean {options}?")
    raise ConfigError(f"{where}: unknown key {key!r}; valid keys are {', '.join(keys)}")
