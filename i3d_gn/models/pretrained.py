"""Start a video network from weights in any naming, and refuse those made for another network."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from i3d_gn.models.i3d import I3D
from i3d_gn.models.inflate import InflationReport, check_same_network, fill, norm_kind
from i3d_gn.models.weight_files import WeightsInfo
from i3d_gn.models.weights import Weights, read_weights


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
