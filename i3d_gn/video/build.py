"""From a `Config` to the objects it describes."""

import functools
import hashlib
import json
import logging
import os
from typing import Any, cast, get_args

import numpy as np
import torch
from torch.utils.data import Sampler

from i3d_gn.data import loader
from i3d_gn.data.batches import Batch, Sample, Stream
from i3d_gn.data.to_device import ToDevice
from i3d_gn.data.videos import RandomClips, TestVideos
from i3d_gn.engine.cores import num_workers
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.typed_config import ConfigError
from i3d_gn.models import I3D, VideoNetwork, i3d_resnet50, i3d_resnet101, i3d_small, i3d_tiny
from i3d_gn.models.adapted_weights import load_adapted_weights
from i3d_gn.models.inflate import InflationReport, NormMismatchError, load_imagenet_weights
from i3d_gn.models.network import AdaptedNetwork
from i3d_gn.models.pytorchvideo_networks import PytorchvideoName, pytorchvideo_network
from i3d_gn.models.torchvision_video import TorchvisionName, torchvision_network
from i3d_gn.norm import GroupNorm, make_norm, normalize_kernels
from i3d_gn.video.config import Config
from i3d_gn.video_io.index import RootNotFoundError, VideoIndex
from i3d_gn.video_io.packed import host_of
from i3d_gn.video_io.video_files import VideoFiles
from i3d_gn.weights.read import IMAGENET_MEAN, IMAGENET_STD, Weights

logger = logging.getLogger(__name__)

_VARIANTS = {
    "i3d_resnet50": i3d_resnet50,
    "i3d_resnet101": i3d_resnet101,
    "i3d_small": i3d_small,
    "i3d_tiny": i3d_tiny,
}


def build_model(config: Config, device: torch.device) -> VideoNetwork:
    """The network of `config.model` on `device`, randomly initialized.

    Raises:
        ValueError: The clips of `config` are too small for it, in training or in testing, or the
            number of classes is not known.
    """
    model = config.model
    if not model.num_classes:
        raise ConfigError("the number of classes is not known; set model.num_classes")
    built = _i3d(config) if model.name in _VARIANTS else _adapted(config)
    clip, side = config.clip, config.test.short_side
    map_size = training_map(built, config)
    # The map of a larger crop is not smaller.
    if side < clip.crop_size and built.feature_size(clip.num_frames, side, side) < map_size:
        raise ConfigError(
            f"test.short_side {side} is too small for a network trained on crops of "
            f"clip.crop_size {clip.crop_size}; use at least {clip.crop_size}"
        )
    built.to(device)
    if uses_channels_last(config, device):
        built.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return built


def _group_options(config: Config) -> dict[str, Any]:
    """The groups that the config sets, if any."""
    model = config.model
    options: dict[str, Any] = {
        "num_groups": model.num_groups,
        "channels_per_group": model.channels_per_group,
    }
    return {option: value for option, value in options.items() if value is not None}


def _i3d(config: Config) -> I3D:
    model = config.model
    options = _group_options(config)
    if model.zero_init_last_norm and model.norm == "none":
        logger.info("model.zero_init_last_norm has no effect: norm none has no gamma")
    built = _VARIANTS[model.name](
        norm=functools.partial(make_norm, model.norm, **options) if options else model.norm,
        num_classes=model.num_classes,
        stem=model.stem,
        inflate=model.inflate,
        pool_padding=model.pool_padding,
        stride_in=model.stride_in,
        dropout=model.dropout,
        zero_init_last_norm=model.zero_init_last_norm,
        checkpoint_stages=model.checkpoint_stages,
    )
    if model.kernel_norm is not None:
        normalize_kernels(built, model.kernel_norm)
    for layer in built.modules():
        if isinstance(layer, GroupNorm):
            layer.over = model.norm_over
    built.freeze(config.train.lr_multipliers.count(0))
    return built


def _adapted(config: Config) -> AdaptedNetwork:
    """A network of another library."""
    model = config.model
    options = {
        "num_classes": model.num_classes,
        "dropout": model.dropout,
        "norm": model.norm,
        "over": model.norm_over,
        **_group_options(config),
    }
    if model.name in get_args(TorchvisionName):
        return torchvision_network(cast(TorchvisionName, model.name), **options)
    return pytorchvideo_network(cast(PytorchvideoName, model.name), **options)


def load_weights(
    model: VideoNetwork,
    source: str | os.PathLike[str] | Weights,
    *,
    convolutions_only: bool = False,
) -> InflationReport:
    """Load weights by the reader of the network's library.

    Raises:
        ValueError: The weights cannot be read, or are those of another network.
    """
    if isinstance(model, AdaptedNetwork):
        assert not isinstance(source, Weights)  # these have the names of I3D
        return load_adapted_weights(model, source, convolutions_only)
    assert isinstance(model, I3D)
    return load_imagenet_weights(model, source, convolutions_only)


def training_map(model: VideoNetwork, config: Config) -> tuple[int, int, int]:
    """Size (T, H, W) of the last feature map for a training clip."""
    clip = config.clip
    return model.feature_size(clip.num_frames, clip.crop_size, clip.crop_size)


def load_starting_weights(
    model: VideoNetwork, config: Config
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Load the weights that the config names, if any, and log what was loaded.

    Returns:
        Mean and std that normalize the clips: the config's, or else those of the weights, or else
        ImageNet's.

    Raises:
        ConfigError: Mean or std of the config differs from that of the weights.
        ValueError: The weights cannot be read, or are those of another network.
    """
    mean, std = config.data.mean, config.data.std
    if config.model.weights is None:
        return mean or IMAGENET_MEAN, std or IMAGENET_STD
    try:
        report = load_weights(
            model,
            config.model.weights,
            convolutions_only=config.model.weights_convolutions_only,
        )
    except NormMismatchError as error:
        raise ConfigError(f"{error} (model.weights_convolutions_only: true)") from error
    info = report.info
    logger.info("weights %s: %s", config.model.weights, report)
    for key, given, needed in (("mean", mean, info.mean), ("std", std, info.std)):
        if given and needed and max(abs(g - n) for g, n in zip(given, needed, strict=True)) > 1e-4:
            raise ConfigError(
                f"data.{key} is {list(given)}, but {config.model.weights} was trained with "
                f"{[round(n, 4) for n in needed]}; remove data.{key} to use that of the weights"
            )
    return mean or info.mean or IMAGENET_MEAN, std or info.std or IMAGENET_STD


def load_index(path: str, config: Config, *, labeled: bool = True) -> VideoIndex:
    """Load an index and check that its labels fit the network.

    Raises:
        ConfigError: It has another number of classes or, if `labeled`, videos without a label, its
            folder does not exist, or it names a host that the config does not.
    """
    try:
        index = VideoIndex.load(path, config.data.root, allowed_hosts=config.data.allowed_hosts)
    except RootNotFoundError as error:
        raise ConfigError(
            f"{error.problem}; set data.root to the folder where they are, or index them again"
        ) from error
    if root := index.refused_root:
        raise ConfigError(f"{path} says that its videos are at {root}; {_how_to_allow(root)}")
    if modified := index.modified():
        logger.warning(
            "%s: %d videos were modified after they were indexed, unlike the others (%s ...); if "
            "their content has changed, index the videos again",
            path, len(modified), ", ".join(modified[:3]),
        )  # fmt: skip
    if config.model.num_classes not in (0, len(index.class_names)):
        raise ConfigError(
            f"{path} has {len(index.class_names)} classes, but model.num_classes is "
            f"{config.model.num_classes}; set model.num_classes={len(index.class_names)}"
        )
    unlabeled = int((index.labels < 0).sum())
    if unlabeled and labeled:
        raise ConfigError(
            f"{path}: {unlabeled} videos have no label, which training and validation need"
        )
    return index


def check_classes(train_index: VideoIndex, val_index: VideoIndex) -> None:
    """Check that a classifier can be trained; warn of classes that it cannot learn.

    Raises:
        ConfigError: The indexes have different class ids, or a single class.
    """
    names = train_index.class_names
    if names != val_index.class_names:
        differing = sorted({*names} ^ {*val_index.class_names})
        which = f" (only one of them has {differing[0]!r})" if differing else ""
        raise ConfigError(
            f"{train_index.index_path} and {val_index.index_path} have different class ids{which}; "
            "make the second one with --label-map and the first"
        )
    if len(names) < 2:
        raise ConfigError(
            f"{train_index.index_path} has one class, {', '.join(names)}; training needs at least "
            "two"
        )
    trained, validated = (
        np.bincount(index.labels, minlength=len(names)) for index in (train_index, val_index)
    )
    if missing := [name for name, number in zip(names, trained, strict=True) if not number]:
        logger.warning(
            "%d of %d classes have no training video and cannot be learned, but %d validation "
            "videos: %s", len(missing), len(names), validated[trained == 0].sum(),
            ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else ""),
        )  # fmt: skip


def _how_to_allow(root: str) -> str:
    if host := host_of(root):
        return f"if you trust {host}, add data.allowed_hosts: [{host}]"
    return f"if you trust it, add data.root: {root}"


def warn_of_shared_videos(train_index: VideoIndex, val_index: VideoIndex) -> None:
    """Warn if a file is in both indexes, which makes the validation too optimistic."""
    train, val = (
        {os.path.join(index.root, path) for path in index.paths}
        for index in (train_index, val_index)
    )
    if shared := sorted(train & val):
        logger.warning(
            "%d videos are for training and for validation, which makes accuracy look too good: "
            "%s ...", len(shared), ", ".join(shared[:3]),
        )  # fmt: skip


def class_weights(index: VideoIndex) -> torch.Tensor:
    """Weights (K,) that give all classes the same share of the loss: N / (K n) for n of N videos.

    Their mean over the videos is 1 if no class is without; "balanced" in scikit-learn, after King &
    Zeng, Logistic Regression in Rare Events Data, 2001.
    """
    counts = np.bincount(index.labels, minlength=len(index.class_names))
    weights = len(index) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.from_numpy(weights).float()


def describe_index(index: VideoIndex) -> str:
    """Number of videos and classes, and a hash of everything in the index that training uses."""
    digest = hashlib.sha256()
    for array in (index.labels, index.num_frames, index.heights, index.widths):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(json.dumps([index.paths, list(index.class_names)]).encode())
    return f"{len(index)} videos, {len(index.class_names)} classes, {digest.hexdigest()[:16]}"


def random_clips(
    index: VideoIndex, config: Config, *, stream: Stream, salt: int = 0
) -> RandomClips:
    """Clips with the training augmentation, drawn from `stream`."""
    clip = config.clip
    return RandomClips(
        index,
        num_frames=clip.num_frames,
        stride=clip.stride,
        short_side=(clip.short_side_min, clip.short_side_max),
        crop_size=clip.crop_size,
        flip_probability=clip.flip_probability,
        rand_augment=clip.rand_augment if stream == Stream.TRAIN_CLIP else 0,
        backend=config.data.decoder,
        seed=config.seed,
        stream=stream,
        salt=salt,
    )


def clip_loader(
    clips: RandomClips, order: Sampler[list[Sample]], config: Config, process: Process
) -> loader.Loader[Batch]:
    """A loader of micro-batches."""
    workers = num_workers(config, process)
    return loader.batch_loader(
        clips,
        order,
        num_workers=workers,
        device=process.device,
        timeout_seconds=config.data.timeout_seconds,
    )


def test_videos(index: VideoIndex | VideoFiles, config: Config) -> TestVideos:
    """Videos with the clips and crops of `config.test`."""
    return TestVideos(
        index,
        num_clips=config.test.num_clips,
        num_frames=config.clip.num_frames,
        stride=config.clip.stride,
        spacing=config.test.spacing,
        align_starts=config.test.align_starts,
        short_side=config.test.short_side,
        spatial=config.test.spatial,
        crop_size=config.clip.crop_size,
        backend=config.data.decoder,
    )


def to_device(
    config: Config, process: Process, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> ToDevice:
    """How clips reach the network."""
    return ToDevice(
        device=process.device,
        mean=mean,
        std=std,
        precision=config.train.precision,
        channels_last=uses_channels_last(config, process.device),
    )


def uses_channels_last(config: Config, device: torch.device) -> bool:
    """Memory format of clips and weights: the config's, or else the one measured to be faster.

    Group norm on a CPU in fp32 takes 0.83 of the time per training step when contiguous; everything
    else is as fast or faster in channels_last_3d (benchmarks/results/cpu.md).
    """
    if config.train.channels_last is not None:
        return config.train.channels_last
    contiguous = config.model.norm in ("gn", "ln", "in") and config.train.precision == "fp32"
    return not (device.type == "cpu" and contiguous)
