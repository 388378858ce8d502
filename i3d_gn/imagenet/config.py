"""Configuration of an ImageNet run; the defaults are those of [GN] section 4.1."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import MISSING

from i3d_gn.engine.recipe import SharedRecipe, check_shared_recipe
from i3d_gn.engine.typed_config import ConfigError, check_numbers, load_typed, machine_key


@dataclass(frozen=True)
class ImageModelConfig:
    """The network."""

    # the network
    name: Literal["resnet50", "resnet101", "vgg16", "resnet_small", "resnet_tiny"] = "resnet50"
    num_classes: int = 1000  # must be that of the folders
    norm: Literal["gn", "bn", "ln", "in", "brn", "none"] = "gn"  # layer
    num_groups: int | None = None  # of gn; None: 32, or 8 for small networks
    channels_per_group: int | None = None  # of gn, instead of num_groups
    r_max: float | None = None  # of brn; None for both: Ioffe's limits and schedule
    d_max: float | None = None  # of brn
    kernel_norm: Literal["weight_norm", "weight_standardization"] | None = None  # of convolutions
    zero_init_last_norm: bool = True  # the last gamma of each block starts at 0


@dataclass(frozen=True)
class ImageDataConfig:
    """The images (one subfolder per class), and their crops."""

    train_folder: str = MISSING  # one subfolder of images per class
    val_folder: str = MISSING  # with the same classes
    num_workers: int | None = machine_key(None)  # per rank; None: by the cores and the device
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # RGB in [0, 1]
    std: tuple[float, ...] = (0.229, 0.224, 0.225)  # as mean
    crop_size: int = 224  # pixels
    area_min: float = 0.08  # smallest fraction of an image that a training crop covers
    val_short_side: int = 256  # pixels, before the center crop


@dataclass(frozen=True)
class ImageTrainConfig(SharedRecipe):
    """The recipe, in epochs."""

    epochs: int = 100  # passes over the training images
    images_per_gpu: int = 32  # the batch of BN's statistics
    num_gpus: int = 8  # of the experiment, on any number of GPUs; global batch = product
    images_per_forward: int | None = None  # per rank at once; None: all of its share of a step
    lr: float = 0.1
    lr_batch_size: int = 256
    milestones: tuple[int, ...] = (30, 60, 90)  # epochs after which lr is multiplied by 0.1
    norm_weight_decay: float = 1e-4
    channels_last: bool = True  # memory format of images and weights
    log_every: int = machine_key(100)
    checkpoint_every_epochs: int = machine_key(1)  # epochs from one checkpoint to the next
    keep_checkpoints: int = machine_key(2)

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step."""
        return self.images_per_gpu * self.num_gpus

    @property
    def epochs_of_median(self) -> int:
        """Epochs whose median error is reported: the last 5, or those after the last milestone."""
        after_last_drop = self.epochs - max((0, *(m for m in self.milestones if m < self.epochs)))
        return min(5, after_last_drop)


@dataclass(frozen=True)
class ImagenetConfig:
    """A whole run."""

    output_dir: str = machine_key(MISSING)  # folder of everything that the run writes
    seed: int = 0  # of all random numbers
    model: ImageModelConfig = field(default_factory=ImageModelConfig)
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    train: ImageTrainConfig = field(default_factory=ImageTrainConfig)


def default_num_groups(model_name: str) -> int:
    """G of `gn` if neither it nor the channels per group are given: the paper's 32.

    The channels of `resnet_small` and `resnet_tiny` do not split into 32 groups; they have 8.
    """
    return 8 if model_name in {"resnet_small", "resnet_tiny"} else 32


def load_imagenet_config(path: str | Path, overrides: tuple[str, ...] = ()) -> ImagenetConfig:
    """Read a YAML file, apply `key=value` overrides, check all of it.

    Raises:
        ConfigError: The file is missing or not YAML; a key is unknown, missing or out of range, or
            has a wrong type.
    """
    return load_typed(path, overrides, ImagenetConfig, _check_values)


def _check_values(config: ImagenetConfig, path: Path) -> None:
    recipe, data, model = config.train, config.data, config.model
    check_numbers(
        config,
        f"{path}: ",
        at_least_1=(
            "model.num_classes",
            "model.num_groups",
            "model.channels_per_group",
            "model.r_max",
            "data.crop_size",
            "train.epochs",
            "train.images_per_gpu",
            "train.num_gpus",
            "train.images_per_forward",
            "train.checkpoint_every_epochs",
        ),
        positive=("data.std",),
        not_negative=("seed", "model.d_max", "data.num_workers"),
        up_to_1=("data.mean",),
    )
    check_shared_recipe(config.train, f"{path}: train.")
    if not 0 < data.area_min <= 1:
        raise ConfigError(f"{path}: data.area_min is {data.area_min}; it must lie in (0, 1]")
    if data.val_short_side < data.crop_size:
        raise ConfigError(
            f"{path}: data.val_short_side {data.val_short_side} is smaller than data.crop_size "
            f"{data.crop_size}, the crop that is taken from it"
        )
    for key, value in {"data.mean": data.mean, "data.std": data.std}.items():
        if len(value) != 3:
            raise ConfigError(f"{path}: {key} is {list(value)}; expected three numbers")
    if model.num_groups is not None and model.channels_per_group is not None:
        raise ConfigError(f"{path}: set model.num_groups or model.channels_per_group, not both")
    forward = recipe.images_per_forward
    if forward is not None and (
        forward % recipe.images_per_gpu or recipe.global_batch_size % forward
    ):
        raise ConfigError(
            f"{path}: train.images_per_forward is {forward}; it must be a multiple of "
            f"train.images_per_gpu {recipe.images_per_gpu} and divide the batch of "
            f"{recipe.global_batch_size}"
        )
