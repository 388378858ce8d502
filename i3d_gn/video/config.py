"""Configuration of a video run.

A YAML file is complete in itself (no inheritance). Keys that it omits take the defaults below: the
recipe of the paper's baseline ([NL], see docs/design.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

from i3d_gn.engine.recipe import Recipe, check_recipe
from i3d_gn.engine.typed_config import (
    ConfigError,
    added_key,
    check_numbers,
    from_dict,
    load_typed,
    machine_key,
)
from i3d_gn.video.named_networks import I3D_OPTIONS, defaults_of, is_adapted

# What `train.lr_multipliers` are for, in this order.
LR_STAGES = ("conv1", "res2", "res3", "res4", "res5", "head")


@dataclass(frozen=True)
class ModelConfig:
    """The network, and the weights it starts from."""

    # the network
    # I3D, or a network of torchvision or pytorchvideo: docs/norms.md
    name: Literal[
        "i3d_resnet50",
        "i3d_resnet101",
        "i3d_small",
        "i3d_tiny",
        "r3d_18",
        "mc3_18",
        "r2plus1d_18",
        "s3d",
        "slow_r50",
        "c2d_r50",
        "i3d_r50",
        "csn_r101",
        "r2plus1d_r50",
        "x3d_xs",
        "x3d_s",
        "x3d_m",
        "slowfast_r50",
    ] = "i3d_resnet50"
    num_classes: int = 0  # 0: as many as the index has
    norm: Literal["gn", "bn", "sync_bn", "frozen_bn", "ln", "in", "brn", "none"] = "gn"  # layer
    num_groups: int | None = None  # of gn; 32 unless channels_per_group is given
    channels_per_group: int | None = None  # of gn, instead of num_groups
    kernel_norm: Literal["weight_standardization"] | None = added_key(None)  # of convolutions
    # of gn, ln and in: statistics over the clip, each frame, or each frame and those before it
    norm_over: Literal["thw", "hw", "causal"] = added_key("thw")
    stem: Literal["strided", "8x8", "mmaction2"] = "strided"  # strided: 32 or 64 frames
    inflate: bool = True  # False: C2D, all temporal kernels are 1
    pool_padding: int = 0  # of pool1; 1 in PySlowFast and pytorchvideo
    stride_in: Literal["3x3", "1x1"] = "3x3"  # 1x1: original MSRA ResNet
    dropout: float = 0.5  # before the classifier
    zero_init_last_norm: bool = True  # last gamma of a block starts at 0, if it is trainable
    checkpoint_stages: tuple[str, ...] = ()  # recompute in backward, e.g. [res2, res3]
    weights: str | None = None  # anything `i3d-gn convert` reads; 2-D weights are inflated
    weights_convolutions_only: bool = False  # for weights of a network with another norm

    def completed(self, num_classes: int) -> "ModelConfig":
        """With this number of classes if it has none."""
        return self if self.num_classes else replace(self, num_classes=num_classes)


@dataclass(frozen=True)
class DataConfig:
    """The videos, and how they are decoded."""

    train_index: str = MISSING  # made by `i3d-gn index`
    val_index: str = MISSING  # for validation and testing
    root: str | None = machine_key(None)  # folder of the videos; None: as recorded in the indexes
    allowed_hosts: tuple[str, ...] = machine_key(())  # that indexes may name for packed videos
    decoder: Literal["pyav", "decord"] = "pyav"  # library that reads the videos
    num_workers: int | None = machine_key(None)  # per rank; None: by the cores and the device
    timeout_seconds: float = machine_key(300.0)  # for a worker to load a batch or a test video
    mean: tuple[float, ...] | None = None  # RGB in [0, 1]; None: the weights', or ImageNet's
    std: tuple[float, ...] | None = None  # as mean
    max_broken_clips: int = 1000  # training stops if more clips fail to decode,
    max_broken_share: float = 0.2  # or this share of them


@dataclass(frozen=True)
class ClipConfig:
    """A training clip; testing uses the same `num_frames` and `stride`."""

    num_frames: int = 32  # frames per clip
    stride: int = 2  # frames from one to the next; 0 repeats one: a control without motion
    short_side_min: int = 256  # pixels; the short side is drawn from this range,
    short_side_max: int = 320  # both ends included
    crop_size: int = 224  # pixels, side of the random square crop
    flip_probability: float = 0.5  # of a horizontal flip
    rand_augment: int = added_key(0)  # magnitude of two operations on training clips, up to 30


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """The recipe, and what it needs to know about clips."""

    epochs: float | None = added_key(None)  # instead of steps: passes over the training videos
    validate_every_epochs: float | None = added_key(None)  # instead of validate_every
    label_smoothing: float = added_key(0.0)  # share of the target spread over all classes
    mixup: float = added_key(0.0)  # alpha of mixup, e.g. 0.2; 0: none
    cutmix: float = added_key(0.0)  # alpha of CutMix, e.g. 1; with mixup, one of them at a time
    class_weights: Literal["equal", "balanced"] = added_key("equal")  # balanced: rare ones more
    # factors of lr in conv1, res2, res3, res4, res5, head, e.g. [0, 0, 0.1, 0.1, 1, 1]; 0: frozen
    lr_multipliers: tuple[float, ...] = added_key(())
    clips_per_gpu: int = 8  # the batch of BN's statistics, on any number of GPUs
    channels_last: bool | None = None  # None: what was measured to be faster
    validate_multi_clip: bool = False  # also run the multi-clip test at each validation
    # global batches before each validation; 0: the moving averages of training; BN only
    precise_bn_iterations: int = 200


@dataclass(frozen=True)
class TestConfig:
    """Multi-clip testing."""

    __test__ = False  # tells pytest that this is no test class

    num_clips: int = 10  # evenly spaced clips per video
    spacing: Literal["nonlocal", "uniform", "slowfast"] = "nonlocal"  # see data/clips.py
    align_starts: bool = False  # round down to multiples of the stride: fewer frames to decode
    spatial: Literal["full", "three_crop", "center"] = "full"  # part of the frame that is seen
    short_side: int = 256  # pixels
    average: Literal["softmax", "logits"] = "softmax"  # what is averaged over clips and places
    clips_per_forward: int = machine_key(10)  # limits the memory that testing needs


@dataclass(frozen=True)
class Config:
    """A whole run."""

    output_dir: str = machine_key(MISSING)  # folder of everything that the run writes
    seed: int = 0  # of all random numbers
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)

    def completed(self, *, num_classes: int, num_videos: int) -> "Config":
        """The config with what it leaves to the training index, which has these numbers.

        The number of classes, and epochs as steps: of at least 1, to the nearest whole one.
        """
        train = self.train

        def steps(epochs: float) -> int:
            return max(1, round(epochs * num_videos / train.global_batch_size))

        if train.epochs is not None:
            train = replace(train, epochs=None, steps=steps(train.epochs))
        if train.validate_every_epochs is not None:
            every = steps(train.validate_every_epochs)
            train = replace(train, validate_every_epochs=None, validate_every=every)
        return replace(self, train=train, model=self.model.completed(num_classes))

    def may_change(self, key: str, saved: dict[str, Any]) -> bool:
        """Whether a run with config `saved` may resume although `key` has changed.

        More steps are the same experiment for longer, unless the schedule depends on their number.
        """
        train = saved.get("train", {})
        return (
            key == "train.steps"
            and self.train.schedule == train.get("schedule") == "step"
            and self.train.steps > train.get("steps", self.train.steps)
        )

    def how_to_continue(self, changed: Sequence[str]) -> str:
        """What to do in addition to another output_dir, to train a network further."""
        return " and model.weights=CHECKPOINT" if "train.steps" in changed else ""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, check all of it.

    Raises:
        ConfigError: The file is missing or not YAML; a key is unknown, missing or out of range, or
            has a wrong type.
    """
    return load_typed(path, overrides, Config, _check_values, defaults=_defaults)


def _defaults(given: dict[str, Any]) -> dict[str, Any]:
    steps, epochs = "train.validate_every", "train.validate_every_epochs"
    keys = list(given)  # in the order in which they were set
    if given.get(epochs) is not None and steps in keys[keys.index(epochs) :]:
        raise ConfigError(
            f"{steps} {given[steps]} has no effect, since {epochs} is {given[epochs]}; add "
            f"{epochs}=null"
        )
    return defaults_of(given)


def config_of_checkpoint(
    saved: dict[str, Any], path: Path, overrides: Sequence[str] = ()
) -> Config:
    """The config that trained a checkpoint, from its contents, with `key=value` overrides.

    Raises:
        ConfigError: It is not the config of a video run, or of a newer version of this package.
    """
    if not isinstance(saved["config"].get("clip"), dict):
        raise ConfigError(f"{path} is not of a video network: its config has no clips")
    return from_dict(saved["config"], path, Config, _check_values, overrides)


def config_of_values(values: dict[str, Any], path: Path, overrides: Sequence[str] = ()) -> Config:
    """A config of the given sections, for a network whose training is unknown.

    Keys that they omit are those of the published network, if they name one of another library.

    Raises:
        ConfigError: As `load_config`; `path` stands before the key in messages.
    """
    unused = {"output_dir": "", "data": {"train_index": "", "val_index": ""}, "train": {"steps": 1}}
    published = defaults_of({"model.name": values.get("model", {}).get("name")})
    return from_dict({**unused, **published, **values}, path, Config, _check_values, overrides)


def _check_model(config: Config, path: Path) -> None:
    """Check that the options fit the norm and the network."""
    model = config.model
    if model.num_groups is not None and model.channels_per_group is not None:
        raise ConfigError(f"{path}: set model.num_groups or model.channels_per_group, not both")
    if model.norm_over != "thw" and model.norm not in ("gn", "ln", "in"):
        raise ConfigError(
            f"{path}: model.norm_over {model.norm_over} is for model.norm gn, ln and in, not for "
            f"{model.norm}"
        )
    if not is_adapted(model.name):
        return
    for option in I3D_OPTIONS:
        if getattr(model, option) != getattr(ModelConfig, option):
            raise ConfigError(
                f"{path}: model.{option} is an option of i3d networks; remove it for {model.name}"
            )
    if config.train.lr_multipliers:
        raise ConfigError(
            f"{path}: train.lr_multipliers are for the stages of i3d networks; remove them for "
            f"{model.name}"
        )
    if config.test.spatial == "full":
        raise ConfigError(
            f"{path}: test.spatial is full, but {model.name} is not fully convolutional; use "
            "three_crop or center"
        )


def _check_values(config: Config, path: Path) -> None:
    """Check what types do not express."""
    check_numbers(
        config,
        f"{path}: ",
        at_least_1=(
            "model.num_groups",
            "model.channels_per_group",
            "clip.num_frames",
            "clip.crop_size",
            "test.num_clips",
            "test.short_side",
            "test.clips_per_forward",
        ),
        positive=(
            "train.epochs",
            "train.validate_every_epochs",
            "data.timeout_seconds",
            "data.std",
        ),
        not_negative=(
            "seed",
            "model.num_classes",
            "clip.stride",
            "train.lr_multipliers",
            "train.precise_bn_iterations",
            "train.mixup",
            "train.cutmix",
            "clip.rand_augment",
            "data.max_broken_clips",
            "data.num_workers",
        ),
        up_to_1=(
            "data.mean",
            "model.dropout",
            "train.label_smoothing",
            "clip.flip_probability",
            "data.max_broken_share",
        ),
    )
    _check_train(config.train, f"{path}: train.")
    _check_lr_multipliers(config.train.lr_multipliers, f"{path}: train.lr_multipliers")
    if (config.train.mixup or config.train.cutmix) and config.train.clips_per_gpu == 1:
        raise ConfigError(
            f"{path}: train.mixup and train.cutmix mix the clips of a GPU, but train.clips_per_gpu "
            "is 1; use at least 2"
        )
    if (config.train.steps == 0) == (config.train.epochs is None):
        both = ", not both" if config.train.steps else ""
        raise ConfigError(f"{path}: set train.steps or train.epochs{both}")
    _check_model(config, path)
    clip = config.clip
    if clip.rand_augment > 30:
        raise ConfigError(f"{path}: clip.rand_augment is {clip.rand_augment}; it must be up to 30")
    if not clip.crop_size <= clip.short_side_min <= clip.short_side_max:
        raise ConfigError(
            f"{path}: clip.crop_size {clip.crop_size}, clip.short_side_min {clip.short_side_min}, "
            f"clip.short_side_max {clip.short_side_max}: these must not decrease in this order"
        )
    if config.test.spatial != "full" and config.test.short_side < clip.crop_size:
        raise ConfigError(
            f"{path}: test.short_side {config.test.short_side} is smaller than clip.crop_size "
            f"{clip.crop_size}, the crop that test.spatial={config.test.spatial} takes from it"
        )
    for key, value in {"data.mean": config.data.mean, "data.std": config.data.std}.items():
        if value is not None and len(value) != 3:
            raise ConfigError(f"{path}: {key} is {list(value)}; expected three numbers")


def _check_train(train: TrainConfig, where: str) -> None:
    known, hint = ["val/top1", "val/top5", "val/loss"], ""
    if train.validate_multi_clip:
        known += ["test/top1", "test/top5", "test/mean_class_accuracy"]
    else:
        hint = ", and with validate_multi_clip those of test/"
    check_recipe(train, where, per_gpu="clips_per_gpu", metrics=known, hint=hint)


def _check_lr_multipliers(multipliers: tuple[float, ...], where: str) -> None:
    if not multipliers:
        return
    if len(multipliers) != len(LR_STAGES):
        raise ConfigError(
            f"{where} {list(multipliers)}: expected {len(LR_STAGES)} numbers, for "
            f"{', '.join(LR_STAGES)}"
        )
    if not multipliers[-1] or 0 in multipliers[multipliers.count(0) :]:
        raise ConfigError(
            f"{where} {list(multipliers)}: only the first stages can be frozen (0), not one behind "
            "a stage that is trained, nor all of them"
        )
