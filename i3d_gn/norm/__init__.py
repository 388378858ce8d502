"""Normalization layers: group norm as in the paper, and the alternatives to it, by name."""

from i3d_gn.norm.axes import Over
from i3d_gn.norm.batch_renorm import BatchRenorm
from i3d_gn.norm.fold_norm import FoldReport, fold_norm
from i3d_gn.norm.frozen_batch_norm import FrozenBatchNorm
from i3d_gn.norm.functional import uses_fused_kernels
from i3d_gn.norm.group_norm import GroupNorm
from i3d_gn.norm.make_norm import make_norm
from i3d_gn.norm.recompute import Recomputation, saved_as
from i3d_gn.norm.replace_norm import NormReport, ReplacedNorm, replace_norm
from i3d_gn.norm.split_batch_norm import SplitBatchNorm
from i3d_gn.norm.weight_norm import normalize_kernels

__all__ = [
    "BatchRenorm",
    "FoldReport",
    "FrozenBatchNorm",
    "GroupNorm",
    "NormReport",
    "Over",
    "Recomputation",
    "ReplacedNorm",
    "SplitBatchNorm",
    "fold_norm",
    "make_norm",
    "normalize_kernels",
    "replace_norm",
    "saved_as",
    "uses_fused_kernels",
]
