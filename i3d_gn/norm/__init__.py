"""Normalization layers: group norm as in the paper, and the alternatives to it, by name."""

from i3d_gn.norm.batch_renorm import BatchRenorm
from i3d_gn.norm.frozen_batch_norm import FrozenBatchNorm
from i3d_gn.norm.functional import uses_fused_kernels
from i3d_gn.norm.group_norm import GroupNorm
from i3d_gn.norm.make_norm import make_norm
from i3d_gn.norm.recompute import Recomputation, saved_as
from i3d_gn.norm.split_batch_norm import SplitBatchNorm
from i3d_gn.norm.weight_norm import normalize_kernels

__all__ = [
    "BatchRenorm",
    "FrozenBatchNorm",
    "GroupNorm",
    "Recomputation",
    "SplitBatchNorm",
    "make_norm",
    "normalize_kernels",
    "saved_as",
    "uses_fused_kernels",
]
