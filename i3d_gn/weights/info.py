"""What must be known of a network, beside its tensors, to use its weights. No torch."""

from dataclasses import dataclass
from typing import Any

STEM_NAMES = ("strided", "8x8", "mmaction2")


@dataclass(frozen=True)
class WeightsInfo:
    """The network for which weights are meant; None where that is unknown.

    Attributes:
        source: Whose tensor names the file had (`torchvision`, `caffe2_gn`, ...).
        spatial_dims: 2 for kernels (O, I, H, W), 3 for (O, I, T, H, W).
        norm: `bn` (every kind with running statistics), `gn`, `ln`, `in` or `none`.
        num_groups: Of `gn`; None if `channels_per_group` is fixed.
        channels_per_group: Of `gn`; None if `num_groups` is fixed.
        mean: Of the input, RGB in [0, 1].
        std: Of the input, RGB in [0, 1].
        stride_in: Which convolution of a bottleneck has the stride, `3x3` or `1x1`.
        stem: Of video networks, see `i3d_gn.models.I3D`.
        inflate: Of video networks: whether kernels extend over time.
        pool_padding: Of video networks: spatial padding of pool1.
        class_names: Of a trained video network, by class id.
        settings: Of a trained video network: sections `clip` and `test` of its config.
    """

    source: str
    spatial_dims: int
    norm: str
    num_groups: int | None = None
    channels_per_group: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    stride_in: str | None = None
    stem: str | None = None
    inflate: bool | None = None
    pool_padding: int | None = None
    class_names: tuple[str, ...] | None = None
    settings: dict[str, Any] | None = None
