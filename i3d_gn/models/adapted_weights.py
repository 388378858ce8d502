"""Load weights into networks of other libraries, under the names that those libraries use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from i3d_gn.models.inflate import InflationReport, NormMismatchError
from i3d_gn.models.network import AdaptedNetwork
from i3d_gn.norm import FrozenBatchNorm, GroupNorm
from i3d_gn.weights.download import download_weights, is_published_name
from i3d_gn.weights.files import read_weight_file
from i3d_gn.weights.info import WeightsInfo
from i3d_gn.weights.tensor_names import first_names

# Of modules and dictionaries around a network: DataParallel, and `AdaptedNetwork` itself.
_PREFIXES = ("", "net.", "module.", "module.net.")
_MAX_DEPTH = 4


def load_adapted_weights(
    model: AdaptedNetwork,
    source: str | PathLike[str] | Mapping[str, Any],
    convolutions_only: bool = False,
) -> InflationReport:
    """Load weights of the same network of another library; in place, all or nothing.

    Args:
        model: The network.
        source: A file (torch.save or safetensors; also a checkpoint of a run), a state dict, or a
            published name: a torchvision enum (`R3D_18_Weights.KINETICS400_V1`) or one of
            pytorchvideo's zoo (`pytorchvideo/x3d_xs`). The classifier is loaded if it has as many
            classes as the model.
        convolutions_only: Do not load the normalization layers, which those of another norm do not
            fit.

    Raises:
        ValueError: The source cannot be read, or its tensors are not those of the network or of
            its norm. The network is then unchanged.
    """
    origin = "of the given state dict" if isinstance(source, Mapping) else str(source)
    content: Any = source if isinstance(source, Mapping) else _read(source)
    targets = model.net.state_dict()
    tensors = _best_state_dict(content, targets)
    norm_layers = {
        name
        for name, module in model.net.named_modules()
        if isinstance(module, (_BatchNorm, FrozenBatchNorm, GroupNorm))
    }
    classifier = _classifier_path(model)
    convolutions = [n for n in targets if n.rpartition(".")[0] not in {*norm_layers, classifier}]
    if lacking := [name for name in convolutions if name not in tensors]:
        raise ValueError(_misfit(origin, [n for n in tensors if n not in targets], lacking))
    norm = "bn" if any(name.endswith(".running_mean") for name in tensors) else "other"
    has_statistics = any(name.endswith(".running_mean") for name in targets)
    if not convolutions_only and (norm == "bn") != has_statistics:
        theirs, ours = ("batch norm", "another") if norm == "bn" else ("another", "batch norm")
        raise NormMismatchError(
            f"the norm of weights {origin} is {theirs} and the model's is {ours}: gamma and beta "
            "of one do not fit the other. To load only the convolutions, pass "
            "convolutions_only=True"
        )

    def is_skipped(name: str) -> bool:
        layer = name.rpartition(".")[0]
        if layer == classifier:
            return name in tensors and tensors[name].shape != targets[name].shape
        return name.endswith("num_batches_tracked") or (convolutions_only and layer in norm_layers)

    wanted = [name for name in targets if not is_skipped(name)]
    missing = [name for name in wanted if name not in tensors]
    unknown = [
        name
        for name in tensors
        if name not in targets and not convolutions_only and not is_skipped(name)
    ]
    if missing or unknown:
        raise ValueError(_misfit(origin, unknown, missing))
    for name in wanted:
        if tensors[name].shape != targets[name].shape:
            raise ValueError(
                f"weights {origin}: {name} has shape {tuple(tensors[name].shape)}, but the network "
                f"needs {tuple(targets[name].shape)}"
            )
    with torch.no_grad():
        for name in wanted:
            targets[name].copy_(tensors[name])
    mean, std = _normalization(content)
    return InflationReport(
        loaded=tuple(wanted),
        left_at_init=tuple(
            n for n in targets if n not in wanted and not n.endswith("num_batches_tracked")
        ),
        unused=tuple(name for name in tensors if name not in wanted),
        info=WeightsInfo(source=origin, spatial_dims=3, norm=norm, mean=mean, std=std),
    )


def describe_adapted_weights(
    model: AdaptedNetwork, source: str | PathLike[str]
) -> tuple[int, bool]:
    """Number of classes of weights, 0 if they have no classifier, and whether they have batch norm.

    Args:
        model: The network, with any norm and number of classes, on any device.
        source: As `load_adapted_weights`, but no state dict.

    Raises:
        ValueError: The source cannot be read.
    """
    tensors = _best_state_dict(_read(source), model.net.state_dict())
    head = tensors.get(f"{_classifier_path(model)}.weight")
    has_batch_norm = any(name.endswith(".running_mean") for name in tensors)
    return 0 if head is None else len(head), has_batch_norm


def _read(source: str | PathLike[str]) -> Any:
    path = download_weights(str(source)) if is_published_name(str(source)) else source
    content, _ = read_weight_file(path)
    return content


def _classifier_path(model: AdaptedNetwork) -> str:
    return next(n for n, m in model.net.named_modules() if m is model.classifier())


def _misfit(origin: str, unknown: list[str], missing: list[str]) -> str:
    return (
        f"weights {origin} do not fit the network: {len(unknown)} tensors have no place in it "
        f"({first_names(unknown)}) and {len(missing)} of its own are missing "
        f"({first_names(missing)}); use weights of the network that model.name names"
    )


def _best_state_dict(content: Any, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict in `content` with the most names of the network, without prefixes."""
    best: dict[str, Tensor] = {}
    for found in _dictionaries(content, _MAX_DEPTH):
        for prefix in _PREFIXES:
            tensors = {
                name.removeprefix(prefix): value
                for name, value in found.items()
                if isinstance(value, Tensor) and str(name).startswith(prefix)
            }
            if len(targets.keys() & tensors.keys()) > len(targets.keys() & best.keys()):
                best = tensors
    return best


def _dictionaries(content: Any, depth: int) -> Iterator[Mapping[str, Any]]:
    if isinstance(content, Mapping) and depth > 0:
        yield content
        for value in content.values():
            yield from _dictionaries(value, depth - 1)


def _normalization(
    content: Any,
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std that a checkpoint of a run carries."""
    values = content.get("input") if isinstance(content, Mapping) else None
    if not isinstance(values, Mapping) or not {"mean", "std"} <= values.keys():
        return None, None
    return tuple(values["mean"]), tuple(values["std"])
