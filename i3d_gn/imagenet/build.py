"""From an `ImagenetConfig` to the objects it describes."""

import functools
import hashlib
import json
import os
from dataclasses import fields

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler

from i3d_gn.data import loader
from i3d_gn.data.batches import Batch, Sample
from i3d_gn.data.images import LabeledImages
from i3d_gn.data.to_device import ToDevice
from i3d_gn.engine.cores import num_workers
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.recipe import Recipe, SharedRecipe
from i3d_gn.engine.typed_config import ConfigError
from i3d_gn.imagenet.config import ImagenetConfig, default_num_groups
from i3d_gn.models.resnet2d import RESNETS
from i3d_gn.models.vgg import VGG16
from i3d_gn.norm import make_norm, normalize_kernels


def build_model(config: ImagenetConfig, device: torch.device) -> nn.Module:
    """The network of `config.model` on `device`, randomly initialized."""
    model, train = config.model, config.train
    num_groups = model.num_groups
    if model.norm == "gn" and num_groups is None and model.channels_per_group is None:
        num_groups = default_num_groups(model.name)
    norm = functools.partial(
        make_norm,
        model.norm,
        spatial_dims=2,
        num_groups=num_groups,
        channels_per_group=model.channels_per_group,
        r_max=model.r_max,
        d_max=model.d_max,
        stats_batch_size=train.images_per_gpu if model.norm in ("bn", "brn") else None,
    )
    if model.name == "vgg16":
        network: nn.Module = VGG16(norm, model.num_classes)
    else:
        network = RESNETS[model.name](
            norm, model.num_classes, zero_init_last_norm=model.zero_init_last_norm
        )
    if model.kernel_norm is not None:
        normalize_kernels(network, model.kernel_norm)
    network.to(device)
    if train.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def load_images(folder: str, config: ImagenetConfig) -> LabeledImages:
    """List the images of a folder and check their number of classes.

    Raises:
        ConfigError: It has another number of classes than the network.
    """
    images = LabeledImages(folder)
    if len(images.class_names) != config.model.num_classes:
        raise ConfigError(
            f"{folder} has {len(images.class_names)} classes, but model.num_classes is "
            f"{config.model.num_classes}; set model.num_classes={len(images.class_names)}"
        )
    return images


def describe_images(images: LabeledImages, root: str) -> str:
    """Number of images and classes, and a hash of their paths below `root` and labels."""
    names = [os.path.relpath(path, root) for path in images.paths]
    text = json.dumps([names, images.labels, images.class_names])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{len(images)} images, {len(images.class_names)} classes, {digest[:16]}"


def recipe(config: ImagenetConfig, steps_per_epoch: int) -> Recipe:
    """The recipe of the config, its epochs counted in optimizer steps."""
    train = config.train
    shared = {field.name: getattr(train, field.name) for field in fields(SharedRecipe)}
    shared["milestones"] = tuple(epoch * steps_per_epoch for epoch in train.milestones)
    return Recipe(
        steps=train.epochs * steps_per_epoch,
        global_batch_size=train.global_batch_size,
        validate_every=steps_per_epoch,
        checkpoint_every=train.checkpoint_every_epochs * steps_per_epoch,
        **shared,
    )


def images_per_forward(config: ImagenetConfig, process: Process) -> int:
    """Images per forward pass of a rank.

    Raises:
        ConfigError: The images of a step do not split evenly across ranks and forward passes.
    """
    train = config.train
    if train.num_gpus % process.world_size:
        raise ConfigError(
            f"{process.world_size} ranks cannot share the work of train.num_gpus={train.num_gpus} "
            "evenly; use a number of ranks that divides it"
        )
    per_rank = train.global_batch_size // process.world_size
    per_forward = train.images_per_forward or per_rank
    if per_rank % per_forward:
        raise ConfigError(
            f"train.images_per_forward={per_forward} does not divide the {per_rank} images that "
            f"each of {process.world_size} ranks has in a step"
        )
    return per_forward


def image_loader(
    images: Dataset[Batch], order: Sampler[list[Sample]], config: ImagenetConfig, process: Process
) -> loader.Loader[Batch]:
    """A loader of micro-batches."""
    workers = num_workers(config, process)
    return loader.batch_loader(images, order, num_workers=workers, device=process.device)


def to_device(config: ImagenetConfig, process: Process) -> ToDevice:
    """How images reach the network."""
    return ToDevice(
        device=process.device,
        mean=config.data.mean,
        std=config.data.std,
        precision=config.train.precision,
    )
