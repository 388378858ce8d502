"""Group norm, residual sum and ReLU or SiLU as one operator on Triton kernels, with its backward.

Memory traffic in bytes per element in bf16: forward 6 (x read twice, y written), 8 with a residual;
backward 10, or 14 with a residual. The only activation that the forward saves is its input x, and
with a residual also the result, which the next convolution saves anyway.
"""

import torch
from torch import Tensor

from i3d_gn.norm.kernel_launches import (
    compute_statistics,
    gradient_averages,
    input_gradient,
    normalize,
)
from i3d_gn.norm.operators import Operator, no_gradient


def _forward(
    x: Tensor,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Normalize, then optionally add `residual` and apply ReLU or SiLU.

    Args:
        x: (N, C, *) in float32, bfloat16 or float16, contiguous or dense channels_last, not empty.
        residual: of x's shape, dtype and strides; requires `relu`.
        num_groups: G, a divisor of C.
        weight: (C,) in float32.
        bias: (C,) in float32.
        eps: added to the variance.
        relu: whether to apply ReLU.
        silu: whether to apply SiLU; not with `relu` or `residual`.

    Returns:
        The result, in x's dtype and layout, and the statistics (2, N, G) in float32: mean and
        1 / sqrt(var + eps).
    """
    statistics = compute_statistics(x, num_groups, eps)
    return normalize(x, residual, num_groups, weight, bias, statistics, relu, silu), statistics


def _recompute(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, statistics: Tensor, relu: bool
) -> Tensor:
    """The result of `group_norm_fused` without SiLU, bit-identical, from its statistics."""
    return normalize(x, None, num_groups, weight, bias, statistics, relu, False)


def _gradients(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    relu: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, residual, weight and bias.

    Args:
        grad_y: of x's shape, dtype and strides.
        x: as in the forward.
        y: the result of the forward if it had a residual, else None.
        num_groups: as in the forward.
        weight: as in the forward.
        bias: as in the forward.
        statistics: from the forward.
        relu: as in the forward.
        silu: as in the forward.

    Returns:
        The gradients. Without a residual, its gradient is an empty tensor.
    """
    averages, grad_residual, grad_weight, grad_bias = gradient_averages(
        grad_y, x, y, num_groups, weight, bias, statistics, relu, silu
    )
    grad = grad_y if y is None else grad_residual
    has_residual = y is not None
    grad_x = input_gradient(
        grad, x, has_residual, num_groups, weight, bias, statistics, averages, relu, silu
    )
    return grad_x, grad_residual, grad_weight, grad_bias


def _fake_forward(x, residual, num_groups, weight, bias, eps, relu, silu):
    return torch.empty_like(x), x.new_empty((2, x.shape[0], num_groups), dtype=torch.float32)


def _fake_recompute(x, num_groups, weight, bias, statistics, relu):
    return torch.empty_like(x)


def _fake_gradients(grad_y, x, y, num_groups, weight, bias, statistics, relu, silu):
    grad_residual = x.new_empty(0) if y is None else torch.empty_like(x)
    return torch.empty_like(x), grad_residual, torch.empty_like(weight), torch.empty_like(bias)


def _save_for_backward(ctx, inputs, output):
    x, residual, num_groups, weight, bias, _, relu, silu = inputs
    y, statistics = output
    ctx.num_groups = num_groups
    ctx.activation = (relu, silu)
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(statistics)
    saved = (x, weight, bias, statistics)
    ctx.save_for_backward(*saved, y) if ctx.has_residual else ctx.save_for_backward(*saved)


def _backward(ctx, grad_y, _grad_statistics):
    x, weight, bias, statistics, *y = ctx.saved_tensors
    # The gradient of a sum or a slice is not dense; copy it to the layout of x.
    grad_y = grad_y.to(x.dtype).contiguous(memory_format=_layout(x))
    grad_x, grad_residual, grad_weight, grad_bias = group_norm_fused_backward(
        grad_y, x, y[0] if y else None, ctx.num_groups, weight, bias, statistics, *ctx.activation
    )
    return grad_x, grad_residual if y else None, None, grad_weight, grad_bias, None, None, None


def _layout(x: Tensor) -> torch.memory_format:
    if x.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


_NO_SECOND_DERIVATIVE = no_gradient(
    "the fused group norm does not support second derivatives; set the environment variable "
    "I3D_GN_NORM_KERNEL=native to differentiate twice"
)


group_norm_fused = Operator(
    "i3d_gn::group_norm_fused",
    _forward,
    fake=_fake_forward,
    setup_context=_save_for_backward,
    backward=_backward,
)
group_norm_fused_recompute = Operator(
    "i3d_gn::group_norm_fused_recompute",
    _recompute,
    fake=_fake_recompute,
    **_NO_SECOND_DERIVATIVE,
)
group_norm_fused_backward = Operator(
    "i3d_gn::group_norm_fused_backward",
    _gradients,
    fake=_fake_gradients,
    **_NO_SECOND_DERIVATIVE,
)
