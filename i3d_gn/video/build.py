"""From a `Config` to the objects it describes; shared by the entry points."""

import functools
import logging

from torch.utils.data import DataLoader, Sampler

from i3d_gn.data import loader
from i3d_gn.data.batches import ClipBatch, Sample, Stream
from i3d_gn.data.to_device import DeviceClips
from i3d_gn.data.videos import RandomClips, TestVideos
from i3d_gn.engine.distributed import World
from i3d_gn.engine.typed_config import ConfigError
from i3d_gn.models import I3D, i3d_resnet50, i3d_resnet101, i3d_tiny
from i3d_gn.models.inflate import load_pretrained
from i3d_gn.norm import make_norm
from i3d_gn.video.config import Config
from i3d_gn.video_io.index import VideoIndex
from i3d_gn.weights.read import IMAGENET_MEAN, IMAGENET_STD

logger = logging.getLogger(__name__)

_VARIANTS = {
    "i3d_resnet50": i3d_resnet50,
    "i3d_resnet101": i3d_resnet101,
    "i3d_tiny": i3d_tiny,
}


def build_model(config: Config) -> I3D:
    """The network of `config.model`, randomly initialised."""
    model = config.model
    norm = functools.partial(
        make_norm,
        model.norm,
        num_groups=model.num_groups,
        channels_per_group=model.channels_per_group,
    )
    explicit = model.num_groups is not None or model.channels_per_group is not None
    built = _VARIANTS[model.name](
        norm=norm if explicit else model.norm,
        num_classes=model.num_classes,
        stem=model.stem,
        inflate=model.inflate,
        pool_padding=model.pool_padding,
        stride_in=model.stride_in,
        dropout=model.dropout,
        zero_init_last_norm=model.zero_init_last_norm,
        checkpoint_stages=model.checkpoint_stages,
    )
    clip, side = config.clip, config.test.short_side
    # Raises if clips are too small, in training or in testing.
    window = built.feature_size(clip.num_frames, clip.crop_size, clip.crop_size)
    if built.feature_size(clip.num_frames, side, side) < window:
        raise ConfigError(
            f"test.short_side {side} is too small for a network trained on crops of "
            f"clip.crop_size {clip.crop_size}; make it at least {clip.crop_size}"
        )
    return built


def load_starting_weights(
    model: I3D, config: Config
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Fill the network from the weights that the config names, if any, and log what was taken.

    Returns:
        Mean and deviation that clips are to be normalised by: the config's, or else those of the
        weights, or else ImageNet's.

    Raises:
        ConfigError: the config's mean or deviation is not that of the weights.
        ValueError: the weights cannot be read, or are for another network.
    """
    mean, std = config.data.mean, config.data.std
    if config.model.weights is None:
        return mean or IMAGENET_MEAN, std or IMAGENET_STD
    report, info = load_pretrained(
        model,
        config.model.weights,
        convolutions_only=config.model.weights_convolutions_only,
    )
    logger.info("weights %s: %s", config.model.weights, report)
    for key, given, needed in (("mean", mean, info.mean), ("std", std, info.std)):
        if given and needed and max(abs(g - n) for g, n in zip(given, needed, strict=True)) > 1e-4:
            raise ConfigError(
                f"data.{key} is {list(given)}, and {config.model.weights} was trained with "
                f"{[round(n, 4) for n in needed]}; leave data.{key} out, which takes the weights'"
            )
    return mean or info.mean or IMAGENET_MEAN, std or info.std or IMAGENET_STD


def load_index(path: str, config: Config) -> VideoIndex:
    """An index whose labels fit the network."""
    index = VideoIndex.load(path)
    if len(index.class_names) != config.model.num_classes:
        raise ConfigError(
            f"{path} has {len(index.class_names)} classes, model.num_classes is "
            f"{config.model.num_classes}; set model.num_classes={len(index.class_names)}"
        )
    unlabelled = int((index.labels < 0).sum())
    if unlabelled:
        raise ConfigError(
            f"{path}: {unlabelled} videos have no label; training and testing need labelled videos"
        )
    return index


def random_clips(
    index: VideoIndex, config: Config, *, stream: Stream, salt: int = 0
) -> RandomClips:
    """Clips of the training recipe, drawn from `stream`."""
    clip = config.clip
    return RandomClips(
        index,
        num_frames=clip.num_frames,
        stride=clip.stride,
        short_side=(clip.short_side_min, clip.short_side_max),
        crop_size=clip.crop_size,
        flip_probability=clip.flip_probability,
        backend=config.data.decoder,
        seed=config.seed,
        stream=stream,
        salt=salt,
    )


def clip_loader(
    clips: RandomClips, order: Sampler[list[Sample]], world: World, config: Config
) -> DataLoader[ClipBatch]:
    """A loader of micro-batches with the config's workers."""
    return loader.clip_loader(
        clips,
        order,
        num_workers=num_workers(world, config),
        pin_memory=world.device.type == "cuda",
    )


def videos_to_test(index: VideoIndex, config: Config) -> TestVideos:
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


def device_clips(
    world: World, config: Config, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> DeviceClips:
    """How clips reach the network."""
    return DeviceClips(
        device=world.device,
        mean=mean,
        std=std,
        precision=config.train.precision,
        channels_last=uses_channels_last(world, config),
    )


def uses_channels_last(world: World, config: Config) -> bool:
    """The memory format of clips and weights: what the config says, or else what is faster.

    Group norm on a CPU in fp32 trains in 0.83 of the time when contiguous; all else is as fast or
    faster in channels_last_3d (benchmarks/results/cpu.md).
    """
    if config.train.channels_last is not None:
        return config.train.channels_last
    contiguous = config.model.norm in ("gn", "ln", "in") and config.train.precision == "fp32"
    return not (world.device.type == "cpu" and contiguous)


def num_workers(world: World, config: Config) -> int:
    """Loader processes of this process."""
    if config.data.num_workers is not None:
        return config.data.num_workers
    return loader.default_num_workers(world.size)
