"""Normalization layers by the names that are common in the field."""

from typing import Literal, get_args

from torch import nn

from i3d_gn.norm.axes import Over
from i3d_gn.norm.batch_renorm import BatchRenorm
from i3d_gn.norm.frozen_batch_norm import FrozenBatchNorm
from i3d_gn.norm.group_norm import GroupNorm
from i3d_gn.norm.split_batch_norm import SplitBatchNorm

NormName = Literal["gn", "bn", "sync_bn", "frozen_bn", "ln", "in", "brn", "none"]

# [GN] section 3: "G = 32 by default".
DEFAULT_NUM_GROUPS = 32


def make_norm(
    name: str,
    num_channels: int,
    *,
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    over: Over = "thw",
    eps: float = 1e-5,
    spatial_dims: int = 3,
    stats_batch_size: int | None = None,
    r_max: float | None = None,
    d_max: float | None = None,
    schedule: tuple[int, int, int] | None = None,
) -> nn.Module:
    """Make the normalization layer `name` for tensors (N, C, *).

    Args:
        name: `gn` group norm; `bn` batch norm; `sync_bn` batch norm over all ranks; `frozen_bn`
            batch norm as a fixed affine map; `ln` layer norm, one group of all channels; `in`
            instance norm, one group per channel, without running statistics; `brn` Batch
            Renormalization; `none` the identity. All but `none` have a weight and a bias per
            channel.
        num_channels: C.
        num_groups: for `gn`; 32 if neither this nor `channels_per_group` is given.
        channels_per_group: for `gn`, instead of `num_groups` ([GN] Table 3).
        over: for `gn`, `ln` and `in`: `thw`, `hw` or `causal`, see `GroupNorm`.
        eps: added to the variance.
        spatial_dims: 3 for video (N, C, T, H, W), 2 for images (N, C, H, W). Matters for `bn` only;
            the other layers take any number of dimensions.
        stats_batch_size: for `bn` and `brn`: compute statistics over this many samples at a time,
            as if each group of samples were on a worker of its own (`SplitBatchNorm`).
        r_max: for `brn`, see `BatchRenorm`. Limits without a schedule apply from the start; if
            none of the three is given, the defaults of `BatchRenorm` apply.
        d_max: see `r_max`.
        schedule: see `r_max`.

    Raises:
        ValueError: `name` is unknown, the channels do not split into the requested groups, both
            `num_groups` and `channels_per_group` are given, or an option does not apply to `name`.
    """
    if name not in get_args(NormName):
        raise ValueError(f"norm {name!r} is unknown; choose one of {', '.join(get_args(NormName))}")
    if name != "gn" and (num_groups is not None or channels_per_group is not None):
        raise ValueError(
            f"num_groups={num_groups}, channels_per_group={channels_per_group} are for norm 'gn'; "
            f"do not set them for {name!r}"
        )
    if name not in ("gn", "ln", "in") and over != "thw":
        raise ValueError(
            f"over={over!r} is for norms 'gn', 'ln' and 'in'; do not set it for {name!r}"
        )
    if name not in ("bn", "brn") and stats_batch_size is not None:
        raise ValueError(
            f"stats_batch_size={stats_batch_size} is for norms 'bn' and 'brn'; do not set it for "
            f"{name!r}"
        )
    if name != "brn" and not r_max is d_max is schedule is None:
        raise ValueError(
            f"r_max={r_max}, d_max={d_max}, schedule={schedule} are for norm 'brn'; do not set "
            f"them for {name!r}"
        )
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims={spatial_dims}; choose 3 for video or 2 for images")
    if name == "gn":
        if channels_per_group is not None:
            if num_groups is not None:
                raise ValueError(
                    f"num_groups={num_groups} and channels_per_group={channels_per_group} are "
                    "both given; give one of them"
                )
            return GroupNorm.from_channels_per_group(
                channels_per_group, num_channels, eps=eps, over=over
            )
        num_groups = DEFAULT_NUM_GROUPS if num_groups is None else num_groups
        return GroupNorm(num_groups, num_channels, eps=eps, over=over)
    if name == "brn":
        if r_max is d_max is schedule is None:
            return BatchRenorm(num_channels, eps=eps, stats_batch_size=stats_batch_size)
        return BatchRenorm(
            num_channels,
            eps=eps,
            r_max=3.0 if r_max is None else r_max,
            d_max=5.0 if d_max is None else d_max,
            schedule=schedule,
            stats_batch_size=stats_batch_size,
        )
    if name == "bn" and stats_batch_size is not None:
        return SplitBatchNorm(num_channels, stats_batch_size, eps=eps)
    if name == "bn":
        return (nn.BatchNorm3d if spatial_dims == 3 else nn.BatchNorm2d)(num_channels, eps=eps)
    if name == "sync_bn":
        return nn.SyncBatchNorm(num_channels, eps=eps)
    if name == "frozen_bn":
        return FrozenBatchNorm(num_channels, eps=eps)
    if name == "ln":
        return GroupNorm(1, num_channels, eps=eps, over=over)
    if name == "in":
        return GroupNorm(num_channels, num_channels, eps=eps, over=over)
    return nn.Identity()
