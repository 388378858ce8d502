"""Inflation: start a 3-D network from the weights of a 2-D one (Carreira & Zisserman 2017).

A 2-D kernel is repeated along time and divided by the number of repeats, so that a clip of one
still image gives the 2-D network's features, away from the temporal borders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from i3d_gn.models.blocks import NORM_NAMES, Bottleneck
from i3d_gn.models.i3d import I3D, STEMS
from i3d_gn.norm import GroupNorm
from i3d_gn.weights.files import WeightsInfo, read_weight_file
from i3d_gn.weights.read import Weights, read_weights
from i3d_gn.weights.tensor_names import own_name


@dataclass(frozen=True)
class InflationReport:
    """What became of every tensor, by state-dict key.

    Attributes:
        loaded: keys of the model that were filled.
        left_at_init: keys of the model that were not: the head's, and with convolutions only those
            of the normalisation layers.
        unused: keys of the source that nothing was made of, the 2-D classifier `fc` among them.
    """

    loaded: tuple[str, ...]
    left_at_init: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"inflated {len(self.loaded)} tensors; {len(self.left_at_init)} left at their initial "
            f"values ({_some(self.left_at_init)}); {len(self.unused)} of the source unused "
            f"({_some(self.unused)})"
        )


def inflate_kernel(weight_2d: Tensor, temporal_kernel: int) -> Tensor:
    """Repeat (O, I, H, W) along time and divide: (O, I, temporal_kernel, H, W), same sum."""
    if weight_2d.dim() != 4:
        raise ValueError(f"weight has shape {tuple(weight_2d.shape)}; expected (O, I, H, W)")
    if temporal_kernel < 1:
        raise ValueError(f"temporal_kernel={temporal_kernel}; expected 1 or more")
    return weight_2d[:, :, None].repeat(1, 1, temporal_kernel, 1, 1) / temporal_kernel


def load_imagenet_weights(
    model: I3D,
    source: str | PathLike[str] | Mapping[str, Tensor],
    convolutions_only: bool = False,
    source_norm: str | None = None,
) -> InflationReport:
    """Fill an I3D network from a 2-D ResNet, all but the head; in place, all or nothing.

    Batch norm's weights go into `bn`, `sync_bn` and `frozen_bn`, group norm's into `gn`. For any
    other pair, ask for the convolutions only: normalisation layers then start afresh, gamma 1, beta
    0, the last gamma of each block as the model was configured.

    Args:
        model: the network, of the source's depth.
        source: a 2-D state dict with torchvision's names (`conv1`, `bn1`, `layer1.0.conv1`, ...,
            `fc`; a `module.` prefix is ignored) or ours, or the path of one, alone in its file or
            under `state_dict`. Any floating-point type. A file that `i3d-gn convert` wrote also
            says what network it is for.
        convolutions_only: leave the source's normalisation layers unused.
        source_norm: `ln` or `in`, which the tensors do not tell from `gn`.

    Returns:
        What was loaded, left and unused.

    Raises:
        ValueError: no such file, no state dict in it, or source and model do not match in depth,
            shapes, normalisation or what the file says. The model is then unchanged.
    """
    info: WeightsInfo | None = None
    if isinstance(source, Mapping):
        content, origin = source, "the given state dict"
    else:
        (content, info), origin = read_weight_file(source), str(source)
    source_2d = _strip_prefix(_as_state_dict(content, origin))
    if info is not None:
        check_same_network(model, info, origin, convolutions_only=convolutions_only)
        source_norm = norm_kind(info)
    return fill(
        model,
        source_2d,
        origin,
        convolutions_only=convolutions_only,
        source_norm=source_norm,
        with_head=False,
    )


def load_pretrained(
    model: I3D,
    source: str | PathLike[str] | Mapping[str, Any] | Weights,
    *,
    convolutions_only: bool = False,
) -> tuple[InflationReport, WeightsInfo]:
    """Fill a network from image weights, inflated, or video weights; all or nothing.

    Args:
        model: the network.
        source: what `i3d_gn.weights.read.read_weights` reads, or what it returned.
        convolutions_only: leave the source's normalisation layers unused.

    Returns:
        What became of every tensor, and what is known of the weights: `mean` and `std` are how
        clips must be normalised for them (None where the file does not say).

    Raises:
        ValueError: unreadable, or of a network that differs; the message names the options.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    info = weights.info
    origin = f"of {info.source}" if isinstance(source, (Weights, Mapping)) else str(source)
    check_same_network(model, info, origin, convolutions_only=convolutions_only)
    report = fill(
        model,
        weights.tensors,
        f"weights {origin}",
        convolutions_only=convolutions_only,
        source_norm=norm_kind(info),
        with_head=info.spatial_dims == 3,
    )
    return report, info


def check_same_network(
    model: I3D, info: WeightsInfo, origin: str, *, convolutions_only: bool
) -> None:
    """Refuse weights for a network that differs in what the tensors do not show.

    Args:
        model: the network.
        info: what is known of the weights.
        origin: where they come from, for the message.
        convolutions_only: the groups of group norm do not matter.

    Raises:
        ValueError: naming the options that differ.
    """
    differing = [
        f"model.{option}={has} where the weights need {needs}"
        for option, has in _structure(model).items()
        if (needs := getattr(info, option)) is not None and has != needs
    ]
    if not convolutions_only:
        differing += _differing_groups(model, info)
    if differing:
        raise ValueError(
            f"weights {origin} are for another network: {'; '.join(differing)}. Change the "
            "model's options, or convert the weights again if their metadata is wrong"
        )


def norm_kind(info: WeightsInfo) -> str:
    """`info.norm`, but for group norm's extremes, which are layer norm and instance norm."""
    if info.norm == "gn" and info.num_groups == 1:
        return "ln"
    return "in" if info.norm == "gn" and info.channels_per_group == 1 else info.norm


def fill(
    model: I3D,
    source: Mapping[str, Tensor],
    origin: str,
    *,
    convolutions_only: bool,
    source_norm: str | None,
    with_head: bool,
) -> InflationReport:
    """Fill an I3D network from tensors under torchvision's names or ours, 2-D or 3-D.

    Args:
        model: the network.
        source: its tensors.
        origin: where they come from, for messages.
        convolutions_only: see `load_imagenet_weights`.
        source_norm: of the source, None to tell it by its tensors.
        with_head: the source is a video network: take its head too, if it has as many classes.

    Raises:
        ValueError: source and model do not match. The model is then unchanged.
    """
    head = source.get("head.linear.weight")
    with_head = with_head and head is not None and head.shape == model.head.linear.weight.shape
    targets = {
        key: t for key, t in model.state_dict().items() if with_head or not key.startswith("head.")
    }
    if not convolutions_only:
        _check_same_norm(source, model, origin, source_norm)

    mapped: dict[str, tuple[str, Tensor]] = {}
    unused, unknown = [], []
    for key, tensor in source.items():
        target = _target_key(key)
        if target is not None and (
            (target.startswith("head.") and not with_head)
            or (convolutions_only and _is_norm_key(target))
        ):
            unused.append(key)
        elif target in targets and target not in mapped:
            mapped[target] = (key, tensor)
        elif target is not None and target.endswith(".num_batches_tracked"):
            unused.append(key)  # a frozen batch norm does not count
        else:
            unknown.append(key)
    left = [k for k in targets if k not in mapped and convolutions_only and _is_norm_key(k)]
    missing = [
        key
        for key in targets
        # Batch norms saved before torch 0.4.1 have no count; it does not enter the result.
        if key not in mapped and key not in left and not key.endswith(".num_batches_tracked")
    ]
    if unknown or missing:
        raise ValueError(
            f"{origin} cannot fill the model: {len(unknown)} tensors have no place in it "
            f"({_some(unknown)}) and {len(missing)} of the model's are not filled "
            f"({_some(missing)}); give weights with torchvision's names and the model's depth"
        )
    values = {
        target: _fit(tensor, targets[target], key, origin)
        for target, (key, tensor) in mapped.items()
    }

    if convolutions_only:
        model.reset_norms()
    with torch.no_grad():
        for key, value in values.items():
            targets[key].copy_(value)
    left += [key for key in model.state_dict() if key not in mapped and key not in left]
    return InflationReport(loaded=tuple(values), left_at_init=tuple(left), unused=tuple(unused))


def _as_state_dict(content: Any, origin: str) -> Mapping[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        raise ValueError(
            f"weights {origin}: not a state dict, which maps names to tensors; save "
            "model.state_dict()"
        )
    return content


def _strip_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def _target_key(key: str) -> str | None:
    """Our name of a torchvision tensor, or of ours, None if it has none."""
    return own_name(key, "torchvision") or own_name(key, "i3d_gn")


def _is_norm_key(target_key: str) -> bool:
    return target_key.split(".")[-2] in NORM_NAMES


def _check_same_norm(
    source: Mapping[str, Tensor], model: I3D, origin: str, source_norm: str | None
) -> None:
    has_norms = any(_is_norm_key(target) for key in source if (target := _target_key(key)))
    has_statistics = any(key.endswith(".running_mean") for key in source)
    source_norm = source_norm or ("bn" if has_statistics else "gn" if has_norms else "none")
    model_norm = _model_norm(model)
    if source_norm != model_norm:
        raise ValueError(
            f"{origin} has norm {source_norm!r} and the model {model_norm!r}: the weights of one "
            "mean nothing to the other. To take the convolutions alone and start the normalisation "
            "layers afresh, pass convolutions_only=True (config key "
            "model.weights_convolutions_only: true)"
        )


def _structure(model: I3D) -> dict[str, Any]:
    """The options that the tensors do not show, read from the modules."""
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


def _differing_groups(model: I3D, info: WeightsInfo) -> list[str]:
    if info.norm != "gn":
        return []
    for layer in model.modules():
        if not isinstance(layer, GroupNorm):
            continue
        per_group = layer.num_channels // layer.num_groups
        if info.num_groups not in (None, layer.num_groups):
            return [f"num_groups={layer.num_groups} where the weights need {info.num_groups}"]
        if info.channels_per_group not in (None, per_group):
            return [
                f"channels_per_group={per_group} where the weights need {info.channels_per_group}"
            ]
    return []


def _model_norm(model: I3D) -> str:
    """`bn` for all of its kinds, `gn`, `ln`, `in`, or `none`."""
    if any(key.endswith(".running_mean") for key in model.state_dict()):
        return "bn"
    groups = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    if groups:
        if all(m.num_groups == 1 for m in groups):
            return "ln"
        return "in" if all(m.num_groups == m.num_channels for m in groups) else "gn"
    return "gn" if any(_is_norm_key(key) for key in model.state_dict()) else "none"


def _fit(tensor: Tensor, target: Tensor, key: str, origin: str) -> Tensor:
    """Upcast, inflate a 2-D kernel where the target is a 3-D one, and check the shape."""
    expected = tuple(target.shape)
    inflates = target.dim() == 5 and tensor.dim() != 5
    if inflates:
        expected = (*expected[:2], *expected[3:])
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{origin}: {key} has shape {tuple(tensor.shape)}, the model needs {expected}; give "
            "weights of the model's depth and width"
        )
    # Before dividing: half-precision storage should not cost a second rounding.
    tensor = tensor.to(target.dtype)
    return inflate_kernel(tensor, target.shape[2]) if inflates else tensor


def _some(keys: list[str] | tuple[str, ...]) -> str:
    """A list short enough for one line; enough to tell which layers are meant."""
    if not keys:
        return "none"
    return ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
