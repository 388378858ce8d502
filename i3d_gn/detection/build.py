"""From a `DetectionConfig` to the objects it describes."""

import functools
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from torchvision.models.detection import MaskRCNN

from i3d_gn.data import loader
from i3d_gn.data.batches import Sample
from i3d_gn.detection.coco import CocoImages, DetectionBatch
from i3d_gn.detection.config import DetectionConfig
from i3d_gn.engine.cores import num_workers
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.typed_config import ConfigError
from i3d_gn.models.mask_rcnn import mask_rcnn_c4, mask_rcnn_fpn
from i3d_gn.models.resnet2d import RESNETS
from i3d_gn.norm import make_norm

# An image may take minutes to arrive from a busy network drive.
_TIMEOUT_SECONDS = 300.0


def build_model(config: DetectionConfig, device: torch.device) -> MaskRCNN:
    """The network of `config.model` on `device`, randomly initialized."""
    model = config.model

    def norm(name: str) -> Any:
        if name == "none":
            return name
        options = {"num_groups": model.num_groups} if name == "gn" else {}
        return functools.partial(make_norm, name, spatial_dims=2, **options)

    backbone = RESNETS[model.backbone](norm(model.norm), num_classes=1)
    common: dict[str, Any] = {
        "channels": model.channels,
        "anchor_sizes": model.anchor_sizes,
        "num_frozen": model.num_frozen,
        "min_size": config.data.min_size,
        "max_size": config.data.max_size,
        "regions_per_image": config.train.regions_per_image,
    }
    if model.name == "mask_rcnn_c4":
        return mask_rcnn_c4(backbone, model.num_classes, **common).to(device)
    return mask_rcnn_fpn(
        backbone,
        model.num_classes,
        fpn_norm=norm(model.fpn_norm),
        box_head=model.box_head,
        box_head_norm=norm(model.box_head_norm),
        mask_head_norm=norm(model.mask_head_norm),
        fc_channels=model.fc_channels,
        **common,
    ).to(device)


def load_images(folder: str, annotations: str, config: DetectionConfig) -> CocoImages:
    """Read annotations and check their number of categories.

    Raises:
        ConfigError: It is not that of the network.
        ValueError: See `CocoImages`.
    """
    images = CocoImages(folder, annotations)
    count = len(images.category_ids)
    if count != config.model.num_classes:
        raise ConfigError(
            f"{annotations} has {count} categories, but model.num_classes is "
            f"{config.model.num_classes}; set model.num_classes={count}"
        )
    return images


def image_loader(
    images: Dataset[DetectionBatch],
    order: Sampler[list[Sample]],
    config: DetectionConfig,
    process: Process,
) -> loader.Loader[DetectionBatch]:
    """A loader of micro-batches."""
    return loader.Loader(
        images,
        order,
        num_workers=num_workers(config, process),
        device=process.device,
        timeout_seconds=_TIMEOUT_SECONDS,
    )
