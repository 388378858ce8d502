"""Normalisation layers by the names the field uses."""

from typing import Literal, get_args

from torch import nn

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
    eps: float = 1e-5,
    spatial_dims: int = 3,
    stats_batch_size: int | None = None,
    r_max: float | None = None,
    d_max: float | None = None,
    schedule: tuple[int, int, int] | None = None,
) -> nn.Module:
    """Make the normalisation layer `name` for tensors (N, C, *).

    Args:
        name: `gn` group norm; `bn` batch norm; `sync_bn` batch norm over all processes;
            `frozen_bn` batch norm as a fixed affine map; `ln` layer norm, one group of all
            channels; `in` instance norm, one group per channel, without running statistics; `brn`
            Batch Renormalization; `none` the identity. All but the last have a weight and a bias
            per channel.
        num_channels: C.
        num_groups: for `gn`; 32 if neither it nor `channels_per_group` is given.
        channels_per_group: for `gn`, in place of `num_groups` ([GN] Table 3).
        eps: added to the variance.
        spatial_dims: 3 for video (N, C, T, H, W), 2 for images (N, C, H, W). It matters to `bn`
            alone; the others take any number of dimensions.
        stats_batch_size: for `bn` and `brn`: statistics see n samples of a batch at a time, as n
            samples on each of several workers would (`SplitBatchNorm`).
        r_max: for `brn`, see `BatchRenorm`. Limits without a schedule hold from the start; if none
            of the three is given, they are Ioffe's.
        d_max: likewise.
        schedule: likewise.

    Raises:
        ValueError: an unknown name, a number of channels that does not split into the groups asked
            for, both ways of choosing groups at once, or an option for a layer that has none.
    """
    if name not in get_args(NormName):
        raise ValueError(f"norm {name!r} is unknown; choose one of {', '.join(get_args(NormName))}")
    if name != "gn" and (num_groups is not None or channels_per_group is not None):
        raise ValueError(
            f"num_groups={num_groups}, channels_per_group={channels_per_group} are for norm 'gn'; "
            f"leave them out for {name!r}"
        )
    if name not in ("bn", "brn") and stats_batch_size is not None:
        raise ValueError(
            f"stats_batch_size={stats_batch_size} is for norms 'bn' and 'brn'; leave it out for "
            f"{name!r}"
        )
    if name != "brn" and not r_max is d_max is schedule is None:
        raise ValueError(
            f"r_max={r_max}, d_max={d_max}, schedule={schedule} are for norm 'brn'; leave them "
            f"out for {name!r}"
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
            return GroupNorm.from_channels_per_group(channels_per_group, num_channels, eps=eps)
        num_groups = DEFAULT_NUM_GROUPS if num_groups is None else num_groups
        return GroupNorm(num_groups, num_channels, eps=eps)
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
        return GroupNorm(1, num_channels, eps=eps)
    if name == "in":
        return GroupNorm(num_channels, num_channels, eps=eps)
    return nn.Identity()
