"""Start a video network from weights of images (inflated) or of videos.

Inflation (Carreira & Zisserman, arXiv:1705.07750) repeats a 2-D kernel along time and divides it by
the number of repeats, so that a clip of one still image gives the features of the 2-D network, away
from the temporal borders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from i3d_gn.models.blocks import NORM_NAMES, Bottleneck
from i3d_gn.models.i3d import I3D, STEMS
from i3d_gn.norm import GroupNorm
from i3d_gn.weights.info import WeightsInfo
from i3d_gn.weights.read import Weights, read_weights
from i3d_gn.weights.tensor_names import first_names


@dataclass(frozen=True)
class InflationReport:
    """What became of every tensor.

    Attributes:
        loaded: State-dict keys of the model that were filled.
        left_at_init: State-dict keys of the model that kept their initial values: the head's, and
            with `convolutions_only` those of the normalization layers.
        unused: Names in the source of tensors that were not used, such as the 2-D classifier's.
        info: What is known of the weights. Normalize clips by its `mean` and `std` (None if
            unknown).
        entry: Which of several state dicts was loaded, see `i3d_gn.weights.read.Weights`.
        other_entries: The others.
    """

    loaded: tuple[str, ...]
    left_at_init: tuple[str, ...]
    unused: tuple[str, ...]
    info: WeightsInfo
    entry: str = ""
    other_entries: tuple[str, ...] = ()

    def __str__(self) -> str:
        done = "inflated" if self.info.spatial_dims == 2 else "loaded"
        others = ", ".join(self.other_entries)
        origin = f" of {self.entry} (not of {others})" if others else ""
        return (
            f"{done} {len(self.loaded)} tensors{origin}; "
            f"{len(self.left_at_init)} left at their initial values "
            f"({first_names(self.left_at_init)}); "
            f"{len(self.unused)} of the source unused ({first_names(self.unused)})"
        )


class NormMismatchError(ValueError):
    """Weights whose normalization layers do not fit the model; `convolutions_only` avoids it."""


_CONVOLUTIONS_ONLY = "To load only the convolutions, pass convolutions_only=True"


def inflate_kernel(weight_2d: Tensor, temporal_kernel: int) -> Tensor:
    """Repeat (O, I, H, W) along time and divide: (O, I, temporal_kernel, H, W), same sum."""
    if weight_2d.dim() != 4:
        raise ValueError(f"weight has shape {tuple(weight_2d.shape)}; expected (O, I, H, W)")
    if temporal_kernel < 1:
        raise ValueError(f"temporal_kernel={temporal_kernel}; expected 1 or more")
    return weight_2d[:, :, None].repeat(1, 1, temporal_kernel, 1, 1) / temporal_kernel


def load_imagenet_weights(
    model: I3D,
    source: str | PathLike[str] | Mapping[str, Any] | Weights,
    convolutions_only: bool = False,
    source_norm: str | None = None,
) -> InflationReport:
    """Load weights of a 2-D ResNet, inflated, or of a video network; in place, all or nothing.

    The head is loaded from video networks with as many classes as the model. Weights of batch norm
    fit `bn`, `sync_bn` and `frozen_bn`; those of the other norms fit the same norm only. To combine
    other norms, set `convolutions_only`: the normalization layers then start with gamma 1 and beta
    0, the last gamma of each block as the model was configured.

    Args:
        model: Network of the source's depth.
        source: What `i3d_gn.weights.read.read_weights` reads (a file, a published name or a state
            dict; any naming, any floating-point type), or what it returned.
        convolutions_only: Do not load the normalization layers.
        source_norm: `ln` or `in`, whose state dicts look like those of `gn`.

    Returns:
        What was loaded, what was not, and what is known of the weights.

    Raises:
        ValueError: The source cannot be read, or differs from the model in depth, shapes,
            normalization or options. The model is then unchanged.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    is_named = not isinstance(source, (Weights, Mapping))
    origin = f"weights {source}" if is_named else f"weights of {weights.info.source}"
    if source_norm is not None:
        info = _with_norm(weights.info, source_norm, origin)
        weights = dataclasses.replace(weights, info=info)
    _check_options(model, weights.info, origin)
    if not convolutions_only:
        _check_norm(model, weights.info, origin)
    return _fill(model, weights, origin, convolutions_only=convolutions_only)


def _with_norm(info: WeightsInfo, norm: str, origin: str) -> WeightsInfo:
    """`info` with the norm that the caller states."""
    known = _norm_kind(info)
    if norm == known:
        return info
    if known != "gn" or norm not in ("ln", "in"):
        raise ValueError(f"source_norm={norm!r}, but the norm of {origin} is {known!r}")
    return dataclasses.replace(info, norm=norm, num_groups=None, channels_per_group=None)


def _norm_kind(info: WeightsInfo) -> str:
    """`info.norm`, but for group norm's extremes, which are layer norm and instance norm."""
    if info.norm == "gn" and info.num_groups == 1:
        return "ln"
    return "in" if info.norm == "gn" and info.channels_per_group == 1 else info.norm


def _check_options(model: I3D, info: WeightsInfo, origin: str) -> None:
    """Refuse weights for a network that differs in what the tensors do not show."""
    differing = [
        f"{option}={has} where the weights need {needs}"
        for option, has in _structure(model).items()
        if (needs := getattr(info, option)) is not None and has != needs
    ]
    if differing:
        raise ValueError(
            f"{origin} are for another network; the model has {'; '.join(differing)}. Change the "
            "model's options, or convert the weights again if their metadata is wrong"
        )


def _check_norm(model: I3D, info: WeightsInfo, origin: str) -> None:
    """Refuse weights of another norm, or of group norm with other groups."""
    norm, model_norm = _norm_kind(info), _model_norm(model)
    if norm != model_norm:
        raise NormMismatchError(
            f"the norm of {origin} is {norm!r} and the model's is {model_norm!r}: gamma and beta "
            f"of one do not fit the other. {_CONVOLUTIONS_ONLY}"
        )
    if differing := _differing_groups(model, info):
        raise NormMismatchError(
            f"{origin} are for other groups; the model has {differing}. Change the model's groups, "
            f"or convert the weights again if their metadata is wrong. {_CONVOLUTIONS_ONLY}"
        )


def _fill(model: I3D, weights: Weights, origin: str, *, convolutions_only: bool) -> InflationReport:
    """Copy the tensors into the model, or raise `ValueError` and leave it unchanged."""
    source, state = weights.tensors, _state_by_plain_names(model)
    head = source.get("head.linear.weight")
    with_head = (
        weights.info.spatial_dims == 3
        and head is not None
        and head.shape == model.head.linear.weight.shape
    )

    def is_skipped(key: str) -> bool:
        return (key.startswith("head.") and not with_head) or (
            convolutions_only and _is_norm_key(key)
        )

    def is_count(key: str) -> bool:
        """Frozen batch norms and those saved before torch 0.4.1 lack it; no result needs it."""
        return key.endswith(".num_batches_tracked")

    targets = {key: t for key, t in state.items() if not is_skipped(key)}
    loaded = [key for key in source if key in targets]
    rest = [key for key in source if key not in targets]
    unknown = [key for key in rest if not is_skipped(key) and not is_count(key)]
    missing = [key for key in targets if key not in source and not is_count(key)]
    names = weights.source_names
    if unknown or missing:
        theirs = [names.get(key, key) for key in unknown]
        raise ValueError(
            f"{origin} do not fit the model: {len(unknown)} tensors have no place in it "
            f"({first_names(theirs)}) and {len(missing)} of the model's are missing "
            f"({first_names(missing)}); use weights of a ResNet of the model's depth"
        )
    values = {key: _fit(source[key], targets[key], names.get(key, key), origin) for key in loaded}

    if convolutions_only:
        model.reset_norms()
    with torch.no_grad():
        for key, value in values.items():
            targets[key].copy_(value)
    return InflationReport(
        loaded=tuple(values),
        left_at_init=tuple(
            key for key in state if key not in values and (is_skipped(key) or not is_count(key))
        ),
        unused=(*(names.get(key, key) for key in rest), *weights.unused),
        info=weights.info,
        entry=weights.entry,
        other_entries=weights.other_entries,
    )


def _state_by_plain_names(model: I3D) -> dict[str, Tensor]:
    """The model's state, with a kernel that is standardized under its name without that."""
    return {
        key.replace(".parametrizations.weight.original", ".weight"): tensor
        for key, tensor in model.state_dict().items()
    }


def _is_norm_key(key: str) -> bool:
    return key.rpartition(".")[0].rpartition(".")[2] in NORM_NAMES


def _structure(model: I3D) -> dict[str, Any]:
    """The options of the model that its tensors do not show, read from its modules."""
    first = model.res3[0]
    assert isinstance(first, Bottleneck)
    pool1_kernel, pool1_stride, pool1_padding = (
        values if isinstance(values, tuple) else (values,) * 3
        for values in (model.pool1.kernel_size, model.pool1.stride, model.pool1.padding)
    )
    stem = next(
        name
        for name, stem in STEMS.items()
        if stem.conv1_stride == model.conv1.stride[0]
        and stem.pool1_stride == pool1_stride[0]
        and stem.pool1_kernel == pool1_kernel[0]
    )
    return {
        "stride_in": "1x1" if first.conv1.stride[1] == 2 else "3x3",
        "stem": stem,
        "inflate": model.conv1.kernel_size[0] > 1,
        "pool_padding": pool1_padding[1],
    }


def _differing_groups(model: I3D, info: WeightsInfo) -> str | None:
    for layer in model.modules():
        if not isinstance(layer, GroupNorm):
            continue
        per_group = layer.num_channels // layer.num_groups
        if info.num_groups not in (None, layer.num_groups):
            return f"num_groups={layer.num_groups} where the weights need {info.num_groups}"
        if info.channels_per_group not in (None, per_group):
            return (
                f"channels_per_group={per_group} where the weights need {info.channels_per_group}"
            )
    return None


def _model_norm(model: I3D) -> str:
    """`bn` (every kind with running statistics), `gn`, `ln`, `in` or `none`."""
    if any(key.endswith(".running_mean") for key in model.state_dict()):
        return "bn"
    groups = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    if groups:
        if all(m.num_groups == 1 for m in groups):
            return "ln"
        return "in" if all(m.num_groups == m.num_channels for m in groups) else "gn"
    return "gn" if any(_is_norm_key(key) for key in model.state_dict()) else "none"


def _fit(tensor: Tensor, target: Tensor, name: str, origin: str) -> Tensor:
    """Check the shape, convert to the target's dtype, and inflate a 2-D kernel for a 3-D target."""
    expected = tuple(target.shape)
    inflates = target.dim() == 5 and tensor.dim() != 5
    if inflates:
        expected = (*expected[:2], *expected[3:])
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{origin}: {name} has shape {tuple(tensor.shape)}, but the model needs {expected}; "
            "use weights of the model's depth and width"
        )
    # Before dividing, so that weights stored in half precision are not rounded twice.
    tensor = tensor.to(target.dtype)
    return inflate_kernel(tensor, target.shape[2]) if inflates else tensor
