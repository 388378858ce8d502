"""One YAML file -> one typed, checked, frozen `Config`.

A file is complete in itself (no inheritance). What it leaves out takes the default below, which is
the recipe of the paper's baseline ([NL], see docs/design.md). Anything misspelt or mistyped is one
`ConfigError` that names the file, the line, the key and what would be right.
"""

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

ConfigT = TypeVar("ConfigT")


class ConfigError(ValueError):
    """A config that cannot be used, in one line."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network, and which weights it starts from."""

    name: Literal["i3d_resnet50", "i3d_resnet101", "i3d_tiny"] = "i3d_resnet50"
    num_classes: int = 400
    norm: Literal["gn", "bn", "sync_bn", "frozen_bn", "ln", "in", "brn", "none"] = "gn"
    num_groups: int | None = None  # of gn; 32 unless channels_per_group is given
    channels_per_group: int | None = None
    form: Literal["long", "8x8", "mmaction2"] = "long"  # long: 32 or 64 frames in
    inflate: bool = True  # False: C2D, every convolution kernel 1 long in time
    pool_padding: int = 0  # 1: pool1 as PySlowFast and pytorchvideo have it
    stride_in: Literal["3x3", "1x1"] = "3x3"  # 1x1: original MSRA ResNet
    dropout: float = 0.5
    zero_init_last_norm: bool = True
    checkpoint_stages: tuple[str, ...] = ()  # recompute in backward, e.g. [res2, res3]
    weights: str | None = None  # what i3d-gn convert reads or wrote; 2-D weights are inflated
    weights_convolutions_only: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Index files of `data_tools/index_videos.py`, and how frames are read."""

    train_index: str = MISSING
    val_index: str = MISSING
    decoder: Literal["pyav", "decord"] = "pyav"
    num_workers: int | None = None  # per process; None: the cores this process may use
    mean: tuple[float, ...] | None = None  # RGB of 0..1; None: the weights', else ImageNet's
    std: tuple[float, ...] | None = None
    max_broken_clips: int = 1000  # training stops when more clips could not be decoded


@dataclass(frozen=True)
class ClipConfig:
    """What one training clip is; testing takes `num_frames` and `stride` from here too."""

    num_frames: int = 32
    stride: int = 2  # 0 repeats one frame: a control that sees no motion
    short_side_min: int = 256
    short_side_max: int = 320
    crop_size: int = 224
    flip_probability: float = 0.5


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser's recipe and the bookkeeping."""

    steps: int = MISSING
    global_batch_size: int = 64
    clips_per_gpu: int = 8  # what BN's statistics see, whatever the number of GPUs
    lr: float = 0.01  # at a global batch of lr_batch_size; scaled linearly from there
    lr_batch_size: int = 64
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[int, ...] = ()  # steps after which lr is multiplied by 0.1
    warmup_steps: int = 0
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    norm_weight_decay: float = 0.0  # of gamma and beta
    clip_grad_norm: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool | None = None  # None: what was measured to be faster
    compile: bool = False
    log_every: int = 20
    validate_every: int = 10_000
    validate_multi_clip: bool = False  # also test with `test`'s clips at each validation
    precise_bn_iterations: int = 200  # global batches, before validation; only BN has use for it
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 3


@dataclass(frozen=True)
class TestConfig:
    """Multi-clip testing."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    num_clips: int = 10
    spacing: Literal["nonlocal", "uniform", "slowfast"] = "nonlocal"
    align_starts: bool = False  # to multiples of the stride: half the frames to decode
    spatial: Literal["full", "three_crop", "center"] = "full"
    short_side: int = 256
    average: Literal["softmax", "logits"] = "softmax"
    clips_per_forward: int = 10


@dataclass(frozen=True)
class Config:
    """A whole run."""

    output_dir: str = MISSING
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)


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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, check all of it.

    Raises:
        ConfigError: file missing or not YAML; key unknown, mistyped, out of range or left out.
    """
    return load_typed(path, overrides, Config, _check_values)


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


def config_from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`."""
    config = OmegaConf.to_object(
        OmegaConf.merge(_writable_schema(Config), OmegaConf.create(values))
    )
    assert isinstance(config, Config)
    return config


def to_yaml(config: Any) -> str:
    """The resolved config as YAML text that `load_config` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def config_hash(config: Config) -> str:
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


def check_sgd(config: Any, path: Path) -> None:
    """Check what `train` says of the optimiser, whatever it trains.

    Raises:
        ConfigError: a value is out of its range, or does not go with the others.
    """
    recipe = config.train
    check_numbers(
        config,
        path,
        at_least_1=("train.lr_batch_size", "train.milestones"),
        not_negative=("train.lr", "train.weight_decay", "train.norm_weight_decay"),
    )
    if not 0 <= recipe.momentum < 1:
        raise ConfigError(f"{path}: train.momentum is {recipe.momentum}; it must lie in [0, 1)")
    if recipe.nesterov and not recipe.momentum:
        raise ConfigError(
            f"{path}: train.nesterov needs momentum and train.momentum is 0; set "
            "train.nesterov=false or a momentum"
        )
    if list(recipe.milestones) != sorted(set(recipe.milestones)):
        raise ConfigError(f"{path}: train.milestones {list(recipe.milestones)} must increase")


def _check_values(config: Config, path: Path) -> None:
    """Constraints that types do not express."""
    check_numbers(
        config,
        path,
        at_least_1=(
            "model.num_classes",
            "model.num_groups",
            "model.channels_per_group",
            "clip.num_frames",
            "clip.crop_size",
            "train.steps",
            "train.global_batch_size",
            "train.clips_per_gpu",
            "train.log_every",
            "train.validate_every",
            "train.checkpoint_every",
            "train.keep_checkpoints",
            "train.precise_bn_iterations",
            "test.num_clips",
            "test.short_side",
            "test.clips_per_forward",
        ),
        positive=("train.clip_grad_norm", "data.std"),
        not_negative=(
            "seed",
            "clip.stride",
            "train.warmup_steps",
            "data.max_broken_clips",
            "data.num_workers",
            "data.mean",
        ),
        up_to_1=("model.dropout", "clip.flip_probability"),
    )
    check_sgd(config, path)
    clip = config.clip
    if not clip.crop_size <= clip.short_side_min <= clip.short_side_max:
        raise ConfigError(
            f"{path}: clip.crop_size {clip.crop_size}, clip.short_side_min {clip.short_side_min}, "
            f"clip.short_side_max {clip.short_side_max}: they must not decrease in this order"
        )
    if config.test.spatial != "full" and config.test.short_side < clip.crop_size:
        raise ConfigError(
            f"{path}: test.short_side {config.test.short_side} is smaller than clip.crop_size "
            f"{clip.crop_size}, which test.spatial={config.test.spatial} cuts from it"
        )
    for key, value in {"data.mean": config.data.mean, "data.std": config.data.std}.items():
        if value is not None and len(value) != 3:
            raise ConfigError(f"{path}: {key} is {list(value)}; it takes three numbers")
    if config.model.num_groups is not None and config.model.channels_per_group is not None:
        raise ConfigError(f"{path}: give model.num_groups or model.channels_per_group, not both")
    if config.train.global_batch_size % config.train.clips_per_gpu:
        raise ConfigError(
            f"{path}: train.global_batch_size {config.train.global_batch_size} is not a multiple "
            f"of train.clips_per_gpu {config.train.clips_per_gpu}"
        )
    if config.train.schedule == "cosine" and config.train.milestones:
        raise ConfigError(f"{path}: train.milestones have no meaning with train.schedule cosine")
