"""Normalise the kernels of convolutions in place of, or beside, their results."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

KernelNorm = Literal["weight_norm", "weight_standardization"]


class WeightStandardization(nn.Module):
    """Weight standardisation (Qiao et al., arXiv:1903.10520): zero mean, unit deviation.

    Over all but the first dimension of a kernel (O, I, *), in float32 at least.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        """The standardised kernel, in the dtype of the given one."""
        axes = list(range(1, weight.dim()))
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=axes, correction=0, keepdim=True)
        return ((wide - mean) * torch.rsqrt(variance + self.eps)).to(weight.dtype)


def normalize_kernels(model: nn.Module, kind: str) -> None:
    """Reparametrise every convolution of a model, in place.

    Args:
        model: any network; its kernels become those of `torch.nn.utils.parametrize`.
        kind: `weight_norm` (Salimans & Kingma, arXiv:1602.07868), a learned length per output
            channel that starts as it is, or `weight_standardization`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in get_args(KernelNorm):
        raise ValueError(f"kernel norm {kind!r} is unknown; choose one of {get_args(KernelNorm)}")
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            if kind == "weight_norm":
                weight_norm(module, dim=0)
            else:
                parametrize.register_parametrization(module, "weight", WeightStandardization())
