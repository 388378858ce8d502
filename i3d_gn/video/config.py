"""The config of a run on videos.

A file is complete in itself (no inheritance). What it leaves out takes the default below, which is
the recipe of the paper's baseline ([NL], see docs/design.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

from i3d_gn.engine.typed_config import ConfigError, check_numbers, load_typed


@dataclass(frozen=True)
class ModelConfig:
    """Which network, and which weights it starts from."""

    name: Literal["i3d_resnet50", "i3d_resnet101", "i3d_tiny"] = "i3d_resnet50"
    num_classes: int = 400
    norm: Literal["gn", "bn", "sync_bn", "frozen_bn", "ln", "in", "brn", "none"] = "gn"
    num_groups: int | None = None  # of gn; 32 unless channels_per_group is given
    channels_per_group: int | None = None
    stem: Literal["strided", "8x8", "mmaction2"] = "strided"  # strided: 32 or 64 frames
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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, check all of it.

    Raises:
        ConfigError: file missing or not YAML; key unknown, mistyped, out of range or left out.
    """
    return load_typed(path, overrides, Config, _check_values)


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
