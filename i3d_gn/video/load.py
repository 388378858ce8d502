"""A trained network from one file alone: the file says which network it is."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from i3d_gn.engine.checkpoint import BEST, CheckpointError, latest_checkpoint, load_checkpoint
from i3d_gn.models.adapted_weights import describe_adapted_weights
from i3d_gn.models.i3d import STAGE_NAMES
from i3d_gn.models.network import AdaptedNetwork
from i3d_gn.video import build
from i3d_gn.video.config import Config, config_of_checkpoint, config_of_values
from i3d_gn.video.named_networks import is_adapted, network_of_published
from i3d_gn.video.trained import (
    TrainedNetwork,
    is_weights,
    trained_from_checkpoint,
    trained_from_weights,
)
from i3d_gn.weights.read import Weights, read_weights
from i3d_gn.weights.state_dicts import UnknownNetworkError

# (blocks per stage, channels of conv1) -> the name of the network in a config.
_NAMES: dict[tuple[tuple[int, ...], int], str] = {
    ((3, 4, 6, 3), 64): "i3d_resnet50",
    ((3, 4, 23, 3), 64): "i3d_resnet101",
    ((1, 2, 2, 1), 24): "i3d_small",
    ((1, 1, 1, 1), 16): "i3d_tiny",
}
# Of networks with stem 8x8, whose files do not say it ([NL], PySlowFast).
_CLIP_8X8 = {"num_frames": 8, "stride": 8}


def load_network(
    source: str | Path, *, overrides: Sequence[str] = (), device: torch.device
) -> tuple[TrainedNetwork, Config]:
    """Load a trained network, and the config by which it is used.

    Args:
        source: A checkpoint of training, the `output_dir` of a run (its `best.pt` if there is one,
            else the newest checkpoint), or a file or published name of weights with a classifier.
        overrides: `key=value`, which change the config; for weights also what they do not say.
        device: Of the network.

    Raises:
        CheckpointError: The file is missing, damaged, or not of a trained video network.
        ConfigError: An override is wrong.
        ValueError: The weights cannot be read.
    """
    path = network_file(source)
    if is_weights(path):
        return load_weights(str(source), overrides=overrides, device=device, needs_head=True)
    saved = load_checkpoint(path)
    # The number of loader workers was chosen for the machine and the data of the training.
    config = config_of_checkpoint(saved, path, ["data.num_workers=null", *overrides])
    return trained_from_checkpoint(saved, path, config, device), config


def load_weights(
    source: str, *, overrides: Sequence[str] = (), device: torch.device, needs_head: bool = False
) -> tuple[TrainedNetwork, Config]:
    """Load what `model.weights` of a config can be; weights of images are inflated.

    Without `needs_head`, the classifier of the network may be untrained. Files of networks of other
    libraries do not say which network they are of: `overrides` must, by `model.name`.

    Raises:
        CheckpointError: There is no network of these sizes, or what is missing of it is needed.
        ConfigError: An override is wrong.
        ValueError: The weights cannot be read.
    """
    if name := _adapted_name(source, overrides):
        return _load_adapted(name, source, overrides, device, needs_head=needs_head)
    try:
        weights = read_weights(source)
    except UnknownNetworkError as error:
        raise CheckpointError(
            f"{error}; if it is a network by name (docs/norms.md), set model.name, such as "
            "model.name=x3d_s"
        ) from error
    config = config_of_values(_config_values(weights, source), Path(source), overrides)
    trained = trained_from_weights(weights, source, config, device, needs_head=needs_head)
    return trained, config


def network_file(source: str | Path) -> Path:
    """The file that `source` stands for: the best or newest checkpoint if it is a run's folder.

    Raises:
        CheckpointError: There is no checkpoint in the folder.
    """
    path = Path(source)
    return _checkpoint_of_run(path) if path.is_dir() else path


def _checkpoint_of_run(folder: Path) -> Path:
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    best = checkpoints / BEST
    path = best if best.is_file() else latest_checkpoint(checkpoints)
    if path is None:
        raise CheckpointError(
            f"no checkpoint in {folder}; give the output_dir of a training run, or a checkpoint"
        )
    return path


def _adapted_name(source: str, overrides: Sequence[str]) -> str | None:
    """The network of another library that the overrides or published weights name."""
    given = [o.partition("=")[2] for o in overrides if o.startswith("model.name=")]
    name = given[-1] if given else network_of_published(source)
    return name if name is not None and is_adapted(name) else None


def _load_adapted(
    name: str, source: str, overrides: Sequence[str], device: torch.device, *, needs_head: bool
) -> tuple[TrainedNetwork, Config]:
    """Load weights of a network of another library, with its own norm unless overrides say."""

    def config_of(model: dict[str, Any]) -> Config:
        return config_of_values({"model": {"name": name, **model}}, Path(source), overrides)

    with torch.device("meta"):
        empty = build.build_model(config_of({"num_classes": 1}), torch.device("meta"))
    assert isinstance(empty, AdaptedNetwork)
    num_classes, has_batch_norm = describe_adapted_weights(empty, source)
    norm = {"norm": "bn"} if has_batch_norm else {}
    config = config_of({"num_classes": num_classes or 1, **norm})
    trained = trained_from_weights(source, source, config, device, needs_head=needs_head)
    return trained, config


def _config_values(weights: Weights, source: str) -> dict[str, Any]:
    """Sections of the config, from the sizes of tensors and what is known beside them."""
    tensors, info = weights.tensors, weights.info
    blocks: dict[str, int] = dict.fromkeys(STAGE_NAMES, 0)
    for name in tensors:
        if match := re.match(r"(res\d)\.(\d+)\.", name):
            blocks[match[1]] = max(blocks[match[1]], int(match[2]) + 1)
    conv1 = tensors.get("conv1.weight")
    sizes = tuple(blocks.values()), 0 if conv1 is None else len(conv1)
    if sizes not in _NAMES:
        known = ", ".join(_NAMES.values())
        raise CheckpointError(
            f"{source}: {sizes[0]} blocks per stage after {sizes[1]} channels are of no network "
            f"of this package ({known})"
        )
    head = tensors.get("head.linear.weight")
    model = {
        "name": _NAMES[sizes],
        "num_classes": 1 if head is None else len(head),
        "norm": info.norm,
        "num_groups": info.num_groups,
        "channels_per_group": info.channels_per_group,
        "stride_in": info.stride_in,
        "stem": info.stem,
        "inflate": info.inflate,
        "pool_padding": info.pool_padding,
    }
    settings = info.settings or {"clip": _CLIP_8X8 if info.stem == "8x8" else {}}
    return {"model": {k: v for k, v in model.items() if v is not None}, **settings}
