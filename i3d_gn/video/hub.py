"""Trained networks as folders and repositories of the Hugging Face Hub (extra `hub`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from i3d_gn.engine.typed_config import to_dict
from i3d_gn.video import build
from i3d_gn.video.classifier import ClipClassifier
from i3d_gn.video.config import config_of_values
from i3d_gn.video.load import load_network

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError as error:
    raise ImportError(
        "i3d_gn.video.hub needs huggingface_hub: pip install 'i3d_gn[hub]'"
    ) from error

_CPU = torch.device("cpu")


class PretrainedClassifier(
    ClipClassifier,
    PyTorchModelHubMixin,
    library_name="i3d_gn",
    tags=["video-classification"],
):
    """A trained network that `from_pretrained` loads and `save_pretrained` saves.

    ::

        PretrainedClassifier.from_checkpoint("runs/demo").save_pretrained("demo")
        classifier = PretrainedClassifier.from_pretrained("demo")  # or "owner/name" of the Hub
        scores = classifier(clips)  # uint8 (N, T, H, W, 3) -> (N, K)

    A folder has the weights as `model.safetensors`, and the arguments below as `config.json`.

    Args:
        settings: The sections `model`, `clip` and `test` of the config that trained the network.
        mean: RGB in [0, 1].
        std: RGB in [0, 1].
        class_names: By class id; None if they are not known.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        mean: Sequence[float],
        std: Sequence[float],
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.run_config = config_of_values(settings, Path("config.json"))
        network = build.build_model(self.run_config, _CPU)
        _, *window = build.training_map(network, self.run_config)
        super().__init__(
            network.to(memory_format=torch.contiguous_format),  # type: ignore[call-overload]
            mean=tuple(mean),
            std=tuple(std),
            window=(window[0], window[1]) if network.has_window else None,
            average=self.run_config.test.average,
        )
        self.class_names = None if class_names is None else tuple(class_names)

    @classmethod
    def from_checkpoint(cls, source: str | Path) -> PretrainedClassifier:
        """The network of a checkpoint, of a run or of weights, see `load_network`.

        Raises:
            ValueError: `source` is not a trained video network.
        """
        trained, config = load_network(source, device=_CPU)
        sections = {name: to_dict(config)[name] for name in ("model", "clip", "test")}
        sections["model"]["weights"] = None  # where training started
        names = None if trained.class_names is None else list(trained.class_names)
        classifier = cls(sections, list(trained.mean), list(trained.std), names)
        classifier.network.load_state_dict(trained.model.state_dict())
        return classifier.eval()
