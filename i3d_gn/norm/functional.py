"""Group norm as a function: picks an implementation that is right for the tensor at hand."""

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from i3d_gn.norm.channels_last_cpu import group_norm_channels_last
from i3d_gn.norm.fused import group_norm_fused, group_norm_fused_again

# The environment variable that forces an implementation: auto (the default), triton or native.
KERNEL_VARIABLE = "I3D_GN_NORM_KERNEL"

_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalise each sample over groups of channels and all positions ([GN] Eqn. 7).

    y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and biased variance per sample and
    group, over the group's C / G channels and all of (T, H, W). Statistics are computed in float32
    at least, under autocast too. `relu` and `residual` cost no further pass over memory where the
    fused kernels run (`uses_fused_kernels`).

    Args:
        x: (N, C, *), floating point, any number of spatial dimensions, any strides.
        num_groups: G, a divisor of C. 1 is layer norm, C is instance norm.
        weight: (C,), None for 1.
        bias: (C,), None for 0.
        eps: added to the variance.
        relu: whether to replace negative results by 0.
        residual: of x's shape, added to the normalised x before the ReLU; needs `relu`.

    Returns:
        Tensor of the shape, dtype and memory format of `x`.

    Raises:
        ValueError: `x` is not floating point or has no channel dimension, G does not divide C,
            `weight` or `bias` has another shape, `residual` has another shape or comes without
            `relu`, or the environment forces kernels that cannot run.
    """
    weight, bias = _parameters(x, num_groups, weight, bias)
    if residual is not None and (not relu or residual.shape != x.shape):
        raise ValueError(
            f"residual of shape {tuple(residual.shape)}, relu={relu}: the residual is added before "
            f"a ReLU; pass relu=True and a residual of x's shape {tuple(x.shape)}"
        )
    if x.numel() == 0:
        # No statistics, but a graph: gradients of an empty batch are zeros, not None.
        by_channel = (1, -1, *(1,) * (x.dim() - 2))
        y = (x * weight.view(by_channel) + bias.view(by_channel)).to(x.dtype)
        return y if residual is None else y + residual.to(x.dtype)

    layout = _memory_format(x)
    if uses_fused_kernels(x):
        operator = group_norm_fused
    elif layout != torch.contiguous_format and x.device.type == "cpu" and not _must_be_native():
        operator = group_norm_channels_last
    else:
        y = _native_group_norm(x.contiguous(), num_groups, weight, bias, eps, residual, relu)
        return y.contiguous(memory_format=layout)
    x = x.contiguous(memory_format=layout)
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=layout)
    return operator(x, residual, num_groups, weight, bias, eps, relu)[0]


def group_norm_relu_with_again(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """`group_norm` with ReLU, and a function that computes the result once more from x.

    The function keeps x, statistics and parameters alive, not the result; it is for backward and
    has no gradient. x must be dense and `uses_fused_kernels` true of it.

    Raises:
        RuntimeError: by the function, if x or a parameter was modified in place in between.
    """
    weight, bias = _parameters(x, num_groups, weight, bias)
    y, statistics = group_norm_fused(x, None, num_groups, weight, bias, eps, True)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    versions = [t._version for t in (x, weight, bias)]

    def again() -> Tensor:
        # What autograd checks of the tensors that it keeps.
        if versions != [t._version for t in (x, weight, bias)]:
            raise RuntimeError(
                "the input, weight or bias of a group norm was modified in place between forward "
                "and backward, which computes the result again; modify a copy"
            )
        return group_norm_fused_again(x, num_groups, weight, bias, statistics, True)

    return y, again


def uses_fused_kernels(x: Tensor) -> bool:
    """Whether `group_norm` runs the fused Triton kernels on a tensor like x, forward and backward.

    They are right for float32, bfloat16 and float16 of any layout on a CUDA device, and are chosen
    there unless the environment variable I3D_GN_NORM_KERNEL is `native`. `triton` makes it an error
    if they cannot run, and lets them run on the CPU in Triton's interpreter (TRITON_INTERPRET=1).
    `torch.export` sees the native operator, which any runtime knows, and so do the transforms of
    `torch.func`, which cannot look into an operator of our own.

    Raises:
        ValueError: the environment variable has another value, or demands what cannot be had.
    """
    choice = os.environ.get(KERNEL_VARIABLE, "auto")
    if choice not in ("auto", "triton", "native"):
        raise ValueError(f"{KERNEL_VARIABLE}={choice!r} is unknown; choose auto, triton or native")
    if choice == "native" or _must_be_native():
        return False
    if x.device.type == "cuda":
        # What bfloat16 needs.
        able = _HAS_TRITON and torch.cuda.get_device_properties(x.device).major >= 8
    else:
        interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        able = _HAS_TRITON and choice == "triton" and (interpreted or x.device.type == "meta")
    able = able and x.dtype in _FUSED_DTYPES
    if choice == "triton" and not able:
        raise ValueError(
            f"{KERNEL_VARIABLE}=triton, but x is {x.dtype} on {x.device}; Triton must be installed "
            "and x be float32, bfloat16 or float16 on a CUDA device of compute capability 8.0 or "
            "more (or on the CPU with TRITON_INTERPRET=1); unset the variable otherwise"
        )
    return able


def _parameters(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias (C,) as all implementations take them: dense, as kernels index them.

    In fp32 beside low-precision x: torch's CPU kernel then keeps the statistics for backward in
    fp32, where it would otherwise round the mean to x's precision.
    """
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; group norm takes (N, C, *)")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; group norm takes floating point, so convert it first")
    num_channels = x.shape[1]
    if num_groups < 1 or num_channels % num_groups:
        raise ValueError(
            f"{num_channels} channels do not split into num_groups={num_groups} equal groups; "
            f"choose a divisor of {num_channels}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (num_channels,):
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}; x of {num_channels} channels takes "
                f"({num_channels},)"
            )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = x.new_ones(num_channels, dtype=dtype) if weight is None else weight.to(dtype)
    bias = x.new_zeros(num_channels, dtype=dtype) if bias is None else bias.to(dtype)
    return weight.contiguous(), bias.contiguous()


def _must_be_native() -> bool:
    # torch.func.jvp takes an operator of our own for a constant, without a word.
    return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


def _native_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """`torch.group_norm` of a contiguous tensor, right whatever its strides of size-1 dimensions.

    Avoided are autocast's casts, CUDA's low-precision statistics and, on a CPU, the channels_last
    kernel: it would also run on a contiguous tensor that might be called channels_last, one of a
    single channel or position. (N, C, S) cannot.
    """
    shape, dtype = x.shape, x.dtype
    x = x.view(*shape[:2], -1)
    if x.device.type != "cpu":
        # The CUDA kernel keeps mean and rstd in x's dtype: 8 bits of the mean in bf16.
        x = x.to(weight.dtype)
    if x.is_meta:  # which autocast does not know
        y = torch.group_norm(x, num_groups, weight, bias, eps)
    else:
        with torch.autocast(x.device.type, enabled=False):
            y = torch.group_norm(x, num_groups, weight, bias, eps)
    # In place before the view: backward copies the gradients of a view that was written to.
    y = y.to(dtype)
    if residual is not None:
        y += residual.reshape(x.shape)
    return (y.relu_() if relu else y).view(shape)


def _memory_format(x: Tensor) -> torch.memory_format:
    """The format that operators which preserve it would give a result of `x`."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    # Of a single channel or position both formats are the same.
    if channels_last is None or x.is_contiguous() or 1 in (x.shape[1], x[0, 0].numel()):
        return torch.contiguous_format
    if torch._C._are_functorch_transforms_active():
        return torch.contiguous_format  # vmap cannot tell
    if x.is_contiguous(memory_format=channels_last):
        return channels_last
    # empty_like looks through slicing: a cropped channels_last tensor counts as channels_last.
    if torch.empty_like(x, device="meta").is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format
