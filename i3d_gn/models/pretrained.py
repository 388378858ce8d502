"""Start a video network from weights in any naming, and refuse those made for another network."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from i3d_gn.models.i3d import FORMS, I3D, Bottleneck
from i3d_gn.models.inflate import InflationReport, load_imagenet_weights, load_video_weights
from i3d_gn.models.weights import Weights, WeightsInfo, read_weights
from i3d_gn.norm import GroupNorm


def load_pretrained(
    model: I3D,
    source: str | PathLike[str] | Mapping[str, Any] | Weights,
    *,
    convolutions_only: bool = False,
) -> tuple[InflationReport, WeightsInfo]:
    """Fill a network from image weights, inflated, or video weights; all or nothing.

    Args:
        model: the network.
        source: what `i3d_gn.models.weights.read_weights` reads, or what it returned.
        convolutions_only: leave the source's normalisation layers unused.

    Returns:
        What became of every tensor, and what is known of the weights: `mean` and `std` are how
        clips must be normalised for them (None where the file does not say).

    Raises:
        ValueError: unreadable, or of a network that differs; the message names the options.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    info = weights.info
    differing = [
        f"model.{option}={has} where the weights need {needs}"
        for option, has in _structure(model).items()
        if (needs := getattr(info, option)) is not None and has != needs
    ]
    if not convolutions_only:
        differing += _differing_groups(model, info)
    if differing:
        raise ValueError(
            f"weights of {info.source} are for another network: {'; '.join(differing)}. Change the "
            "model's options, or convert the weights again if their metadata is wrong"
        )
    source_norm = info.norm if info.norm in ("ln", "in") else None
    load = load_video_weights if info.spatial_dims == 3 else load_imagenet_weights
    return load(model, weights.tensors, convolutions_only, source_norm), info


def _structure(model: I3D) -> dict[str, Any]:
    """The options that the tensors do not show, read from the modules."""
    first = model.res3[0]
    assert isinstance(first, Bottleneck)
    pool1_kernel, pool1_stride, pool1_padding = (
        values if isinstance(values, tuple) else (values,) * 3
        for values in (model.pool1.kernel_size, model.pool1.stride, model.pool1.padding)
    )
    pools_as_printed = pool1_padding[0] == 1
    form = next(
        name
        for name, form in FORMS.items()
        if form.conv1_stride == model.conv1.stride[0]
        and form.pool1_stride == pool1_stride[0]
        and (form.pool1_kernel == pool1_kernel[0] or pools_as_printed)
    )
    return {
        "stride_in": "1x1" if first.conv1.stride[1] == 2 else "3x3",
        "form": form,
        "inflate": model.conv1.kernel_size[0] > 1,
        "pool_padding": pool1_padding[1],
        "paper_pools": pools_as_printed,
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
