"""Configuration of a COCO run; the defaults are those of Detectron's GN baselines ([GN] 4.2)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import MISSING

from i3d_gn.engine.recipe import Recipe, check_recipe
from i3d_gn.engine.typed_config import (
    ConfigError,
    added_key,
    check_numbers,
    load_typed,
    machine_key,
)

# Average precision as `COCOeval.summarize` averages it, see `average_precision`.
STATISTICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
METRICS = tuple(f"{kind}_{name}" for kind in ("box", "mask") for name in STATISTICS)


@dataclass(frozen=True)
class DetectorConfig:
    """The network."""

    name: Literal["mask_rcnn_fpn", "mask_rcnn_c4"] = "mask_rcnn_fpn"  # the network
    # the ResNet of the network
    backbone: Literal["resnet50", "resnet101", "resnet_small", "resnet_tiny"] = "resnet50"
    num_classes: int = 80  # without the background; must be that of the annotations
    norm: Literal["gn", "bn", "sync_bn", "frozen_bn"] = "gn"  # of the backbone, and of res5 in C4
    fpn_norm: Literal["gn", "bn", "sync_bn", "none"] = "gn"  # of the pyramid; none in C4
    # of the convolutions of box head 4conv1fc; none in C4 and for 2fc
    box_head_norm: Literal["gn", "bn", "sync_bn", "none"] = "gn"
    # of the convolutions of the mask head; none in C4
    mask_head_norm: Literal["gn", "bn", "sync_bn", "none"] = "gn"
    num_groups: int = 32  # of gn
    # two linear layers, or four convolutions and one linear layer; not in C4
    box_head: Literal["2fc", "4conv1fc"] = "4conv1fc"
    channels: int = 256  # of the pyramid and of the convolutions of the heads
    fc_channels: int = 1024  # of the linear layers of the box head
    # pixels; one per level of the pyramid, or all on the one level of C4
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    num_frozen: int = 2  # 0: nothing; 1: conv1 is frozen; 2: conv1 and res2; ...
    weights: str | None = None  # of an image network or a detector; None: start from scratch


@dataclass(frozen=True)
class CocoConfig:
    """Images and annotations in COCO's format."""

    train_images: str = MISSING  # folder
    train_annotations: str = MISSING  # instances_*.json
    val_images: str = MISSING  # folder
    val_annotations: str = MISSING  # instances_*.json, with the same categories
    num_workers: int | None = machine_key(None)  # per rank; None: by the cores and the device
    min_size: int = 800  # pixels of the short side
    max_size: int = 1333  # pixels of the long side, at most


@dataclass(frozen=True)
class DetectionTrainConfig(Recipe):
    """The recipe."""

    steps: int = 180_000  # optimizer steps of the whole run
    global_batch_size: int = 16
    images_per_gpu: int = 2  # per forward pass: the batch of BN's statistics
    lr: float = 0.02
    lr_batch_size: int = 16
    milestones: tuple[int, ...] = (120_000, 160_000)
    warmup_steps: int = 500
    warmup_from: float = 1 / 3
    nesterov: bool = False
    best_metric: str | None = added_key(None)  # keep best.pt by it, e.g. val/box_ap
    regions_per_image: int = 512  # proposals per image that the heads are trained on


@dataclass(frozen=True)
class DetectionConfig:
    """A whole run."""

    output_dir: str = machine_key(MISSING)  # folder of everything that the run writes
    seed: int = 0  # of all random numbers
    model: DetectorConfig = field(default_factory=DetectorConfig)
    data: CocoConfig = field(default_factory=CocoConfig)
    train: DetectionTrainConfig = field(default_factory=DetectionTrainConfig)


def load_detection_config(path: str | Path, overrides: tuple[str, ...] = ()) -> DetectionConfig:
    """Read a YAML file, apply `key=value` overrides, check all of it.

    Raises:
        ConfigError: The file is missing or not YAML; a key is unknown, missing or out of range, or
            has a wrong type.
    """
    return load_typed(path, overrides, DetectionConfig, _check_values)


def _check_values(config: DetectionConfig, path: Path) -> None:
    model, train = config.model, config.train
    check_numbers(
        config,
        f"{path}: ",
        at_least_1=(
            "model.num_classes",
            "model.num_groups",
            "model.channels",
            "model.fc_channels",
            "model.anchor_sizes",
            "data.min_size",
            "train.steps",
            "train.regions_per_image",
        ),
        not_negative=("seed", "data.num_workers", "model.num_frozen"),
    )
    check_recipe(
        train,
        f"{path}: train.",
        per_gpu="images_per_gpu",
        metrics=[f"val/{name}" for name in METRICS],
    )
    if config.data.max_size < config.data.min_size:
        raise ConfigError(
            f"{path}: data.max_size {config.data.max_size} is smaller than data.min_size "
            f"{config.data.min_size}"
        )
    if train.compile:
        raise ConfigError(
            f"{path}: train.compile is not for detectors, whose shapes change with every image; "
            "set train.compile=false"
        )
    last_stage = 4 if model.name == "mask_rcnn_c4" else 5  # of the backbone; res5 is C4's head
    if model.num_frozen > last_stage:
        raise ConfigError(
            f"{path}: model.num_frozen is {model.num_frozen}; it must be at most {last_stage} for "
            f"{model.name}"
        )
    if not model.anchor_sizes:
        raise ConfigError(f"{path}: model.anchor_sizes are []; expected at least one")
    if model.weights is None and (model.num_frozen or model.norm == "frozen_bn"):
        key = "num_frozen=0" if model.num_frozen else "norm=gn"
        raise ConfigError(
            f"{path}: without model.weights nothing can be frozen, as it would stay random; set "
            f"model.weights or model.{key}"
        )
    if model.name == "mask_rcnn_c4":
        for key in ("fpn_norm", "box_head_norm", "mask_head_norm"):
            if getattr(model, key) != "none":
                raise ConfigError(
                    f"{path}: model.{key} is {getattr(model, key)}, but mask_rcnn_c4 has no such "
                    f"convolutions, and model.norm is that of res5; set model.{key}=none"
                )
    elif len(model.anchor_sizes) != 5:
        raise ConfigError(
            f"{path}: model.anchor_sizes are {list(model.anchor_sizes)}; the pyramid has 5 levels"
        )
    elif model.box_head == "2fc" and model.box_head_norm != "none":
        raise ConfigError(
            f"{path}: model.box_head_norm is {model.box_head_norm}, but box head 2fc has no "
            "convolutions; set model.box_head_norm=none"
        )
