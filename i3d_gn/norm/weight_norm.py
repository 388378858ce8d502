"""Normalization of convolution kernels, instead of or in addition to normalizing activations."""

import re
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

KernelNorm = Literal["weight_norm", "weight_standardization"]

# How `torch.nn.utils.parametrize` names what a kernel is computed from.
_REPARAMETRIZED = re.compile(r"(.*)\.parametrizations\.weight\.original([01]?)")


class WeightStandardization(nn.Module):
    """Weight standardization (Qiao et al., arXiv:1903.10520): zero mean, unit std.

    Over all but the first dimension of a kernel (O, I, *), computed in at least float32.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        """Standardize a kernel; the result has its dtype."""
        axes = list(range(1, weight.dim()))
        upcast = weight.to(torch.promote_types(weight.dtype, torch.float32))
        variance, mean = torch.var_mean(upcast, dim=axes, correction=0, keepdim=True)
        return ((upcast - mean) * torch.rsqrt(variance + self.eps)).to(weight.dtype)


def normalize_kernels(model: nn.Module, kind: str) -> None:
    """Reparametrize every convolution of a model, in place.

    Args:
        model: any network; its kernels are parametrized by `torch.nn.utils.parametrize`.
        kind: `weight_norm` (Salimans & Kingma, arXiv:1602.07868), a learned norm per output
            channel that starts at the current one, or `weight_standardization`.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind not in get_args(KernelNorm):
        raise ValueError(f"kernel norm {kind!r} is unknown; choose one of {get_args(KernelNorm)}")
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            if kind == "weight_norm":
                weight_norm(module, dim=0)
            else:
                parametrize.register_parametrization(module, "weight", WeightStandardization())


def kernel_name(name: str) -> str:
    """The name of a kernel if `name` is of a tensor that `normalize_kernels` made of it."""
    match = _REPARAMETRIZED.fullmatch(name)
    return f"{match[1]}.weight" if match else name


def computed_kernels(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network with the kernels that it computes with, under their plain names.

    Args:
        tensors: A state dict, with or without kernels that `normalize_kernels` reparametrized.

    Raises:
        ValueError: A kernel with weight normalization lacks its norms.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _REPARAMETRIZED.fullmatch(name)
        if match is None:
            plain[name] = tensor
        elif not match[2]:
            plain[kernel_name(name)] = WeightStandardization()(tensor)
        elif match[2] == "1":
            norms = tensors.get(name.removesuffix("1") + "0")
            if norms is None:
                raise ValueError(f"{name} has no norms: {name.removesuffix('1')}0 is missing")
            axes = list(range(1, tensor.dim()))
            lengths = torch.linalg.vector_norm(tensor, dim=axes, keepdim=True)
            plain[kernel_name(name)] = tensor * (norms / lengths)
    return plain
