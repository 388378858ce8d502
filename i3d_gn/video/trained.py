"""A trained network: from a checkpoint of this package, or from a file of weights."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from i3d_gn.engine.checkpoint import CheckpointError, load_checkpoint, load_model_state
from i3d_gn.engine.classification import saved_normalization
from i3d_gn.engine.typed_config import differences, to_dict
from i3d_gn.models import VideoNetwork
from i3d_gn.video import build
from i3d_gn.video.config import ClipConfig, Config, ModelConfig
from i3d_gn.weights.download import is_published_name
from i3d_gn.weights.read import Weights

logger = logging.getLogger(__name__)

# Keys of `model` that a trained network does not depend on.
_TRAINING_ONLY = ("weights", "weights_convolutions_only", "dropout", "checkpoint_stages")
# Weights in a format that is not that of checkpoints.
_WEIGHT_SUFFIXES = (".safetensors", ".pkl", ".pyth", ".pth")


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with everything that its use depends on.

    Attributes:
        model: On its device.
        mean, std: RGB in [0, 1], to normalize clips by.
        class_names: By class id; None if the file does not say.
        config: The config that trained it, as nested dictionaries; None if the file does not say.
        step: Optimizer steps of the training; None if the file does not say.
    """

    model: VideoNetwork
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None
    config: dict[str, Any] | None
    step: int | None


def load_trained(path: Path, config: Config, device: torch.device) -> TrainedNetwork:
    """Load the network of `config.model` with the weights of `path`.

    Args:
        path: A checkpoint of training, or weights of a video network that `i3d-gn convert` reads
            or wrote.
        config: Must describe the same network; a different clip is logged.
        device: Of the network.

    Raises:
        CheckpointError: The file is missing, damaged, or of another network.
        ValueError: The weights cannot be read.
    """
    if is_weights(path):
        return trained_from_weights(str(path), path, config, device)
    saved = load_checkpoint(path)
    _check_same_model(saved["config"], config, path)
    _warn_of_other_clips(saved["config"], config, path)
    return trained_from_checkpoint(saved, path, config, device)


def is_weights(source: str | Path) -> bool:
    """Whether `source` is a weight file or a published name, and not a checkpoint of training."""
    return Path(source).suffix in _WEIGHT_SUFFIXES or is_published_name(str(source))


def trained_from_checkpoint(
    saved: dict[str, Any], path: Path, config: Config, device: torch.device
) -> TrainedNetwork:
    """The network of `config.model` with the weights in the contents of a checkpoint.

    Raises:
        CheckpointError: The network is another, or `config.data` normalizes otherwise.
    """
    mean, std = saved_normalization(saved)
    for key, trained, here in (("mean", mean, config.data.mean), ("std", std, config.data.std)):
        if here is not None and not np.allclose(here, trained, rtol=1e-6):
            raise CheckpointError(
                f"{path} was trained with {key} {list(trained)}, but data.{key} is {list(here)}; "
                f"remove data.{key}"
            )
    model = build.build_model(config, device)
    load_model_state(model, saved["model"], path=path)
    names = saved.get("class_names")
    return TrainedNetwork(
        model, mean, std, None if names is None else tuple(names), saved["config"], saved["step"]
    )


def trained_from_weights(
    weights: str | Weights,
    path: str | Path,
    config: Config,
    device: torch.device,
    *,
    needs_head: bool = True,
) -> TrainedNetwork:
    """The network of `config.model` with weights of `path`, read before or not.

    With `needs_head`, the classifier must be among them; otherwise those of images are inflated.
    """
    model = build.build_model(config, device)
    report = build.load_weights(model, weights)
    if needs_head and report.left_at_init:
        raise CheckpointError(
            f"{path} is not a trained network of this config: it has no "
            f"{', '.join(report.left_at_init)} for {config.model.num_classes} classes; use weights "
            "with this classifier, or for features i3d-gn features --weights"
        )
    mean, std = config.data.mean or report.info.mean, config.data.std or report.info.std
    if mean is None or std is None:
        raise CheckpointError(
            f"{path} does not say how clips must be normalized; set data.mean and data.std, such "
            "as data.mean=[0.485,0.456,0.406] and data.std=[0.229,0.224,0.225]"
        )
    names = report.info.class_names if needs_head else None
    return TrainedNetwork(model, mean, std, class_names=names, config=None, step=None)


def _check_same_model(trained: dict[str, Any], config: Config, path: Path) -> None:
    if not isinstance(trained.get("model"), dict):
        raise CheckpointError(f"{path} is not of a video network: its config has no model")
    theirs, ours = (
        {key: value for key, value in c["model"].items() if key not in _TRAINING_ONLY}
        for c in (trained, to_dict(config))
    )
    if changed := differences(theirs, ours, ModelConfig):
        raise CheckpointError(
            f"{path} was trained with another model than this config's: "
            f"{'; '.join(f'model.{line}' for line in changed)}"
        )


def _warn_of_other_clips(trained: dict[str, Any], config: Config, path: Path) -> None:
    changed = differences(trained.get("clip") or {}, to_dict(config.clip), ClipConfig)
    if changed:
        lines = "; ".join(f"clip.{line}" for line in changed)
        logger.warning("%s was trained with other clips: %s", path, lines)
