"""Group norm over one frame at a time, or over the frames so far, instead of a whole clip.

Statistics over (T, H, W) let early frames depend on late ones, and make the result depend on how a
long video is cut into clips. Streaming and causal networks need statistics over (H, W), or over all
frames up to the current one.
"""

from typing import Literal

import torch
from torch import Tensor

from i3d_gn.norm.kernel_launches import (
    compute_statistics,
    gradient_averages,
    input_gradient,
    normalize,
)
from i3d_gn.norm.operators import Operator, no_gradient

# Over the whole clip, over each frame, over each frame and those before it.
Over = Literal["thw", "hw", "causal"]


def to_frames(clips: Tensor) -> Tensor:
    """(N, C, T, H, W) to (N * T, C, H, W); not a copy of channels_last_3d clips."""
    return clips.transpose(1, 2).flatten(0, 1)


def to_clips(frames: Tensor, num_clips: int, layout: torch.memory_format) -> Tensor:
    """(N * T, C, H, W) to (N, C, T, H, W) in `layout`; not a copy if both are channels_last."""
    clips = frames.unflatten(0, (num_clips, -1)).transpose(1, 2)
    return clips.contiguous(memory_format=layout)


def running_statistics(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of all frames up to each frame, from those of single frames.

    Both are (N, T, G) in and out. The parallel formula of Chan et al. (1979) in float64, relative
    to the first frame, so that large squares are never subtracted. The results are in float64.
    """
    count = torch.arange(1, mean.shape[1] + 1, dtype=torch.float64, device=mean.device)[:, None]
    first = mean[:, :1].double()
    offset = mean.double() - first
    average = offset.cumsum(1) / count
    square = (variance.double() + offset * offset).cumsum(1) / count
    return average + first, (square - average * average).clamp(min=0)


def causal_group_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Causal group norm of clips (N, C, T, H, W) from differentiable operators of torch.

    For every device and dtype, and for `torch.export`. Weight and bias (C,) have the dtype that is
    computed in.
    """
    groups = x.to(weight.dtype).unflatten(1, (num_groups, -1))
    frame_variance, frame_mean = torch.var_mean(groups, dim=(2, 4, 5), correction=0)
    mean, variance = (
        values.to(weight.dtype).transpose(1, 2)[:, :, None, :, None, None]
        for values in running_statistics(frame_mean.transpose(1, 2), frame_variance.transpose(1, 2))
    )
    y = ((groups - mean) * (variance + eps).rsqrt()).flatten(1, 2)
    by_channel = (1, -1, 1, 1, 1)
    return (y * weight.view(by_channel) + bias.view(by_channel)).to(x.dtype)


def _forward(
    frames: Tensor,
    residual: Tensor | None,
    num_frames: int,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Causal group norm on the kernels of `group_norm_fused`, with its arguments and results.

    The samples are the frames of clips of `num_frames` frames; `frames` is (N * T, C, H, W).
    """
    mean, rstd = compute_statistics(frames, num_groups, 0.0).unflatten(1, (-1, num_frames))
    mean, variance = running_statistics(mean, rstd.double().pow(-2))
    statistics = torch.stack((mean, (variance + eps).rsqrt())).flatten(1, 2).float()
    y = normalize(frames, residual, num_groups, weight, bias, statistics, relu, silu)
    return y, statistics


def _gradients(
    grad_y: Tensor,
    frames: Tensor,
    y: Tensor | None,
    num_frames: int,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    relu: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the backward of `group_norm_fused`.

    With m_t, r_t the statistics of frame t and S_t, L_t the means over its groups of w * grad *
    x_normalized and of w * grad, every frame s <= t contributes to the statistics of frame t:

        grad_x_s = w * grad_s * r_s
                   - sum over t >= s of (r_t * L_t + r_t^2 * S_t * (x_s - m_t)) / (t + 1)

    with t from 0. The kernel takes the sum as the means L and S of an ordinary group norm.
    """
    averages, grad_residual, grad_weight, grad_bias = gradient_averages(
        grad_y, frames, y, num_groups, weight, bias, statistics, relu, silu
    )
    mean, rstd = statistics.double().unflatten(1, (-1, num_frames))
    slope, level = averages.double().unflatten(1, (-1, num_frames))
    count = torch.arange(1, num_frames + 1, dtype=torch.float64, device=mean.device)[:, None]
    slope = slope * rstd * rstd / count
    offset = mean - mean[:, -1:]
    later_slopes = _sum_from_here_on(slope)
    level = _sum_from_here_on(rstd * level / count - slope * offset) + later_slopes * offset
    averages = torch.stack((later_slopes / (rstd * rstd), level / rstd)).flatten(1, 2).float()
    grad_x = input_gradient(
        grad_y if y is None else grad_residual,
        frames, y is not None, num_groups, weight, bias, statistics, averages, relu, silu,
    )  # fmt: skip
    return grad_x, grad_residual, grad_weight, grad_bias


def _sum_from_here_on(values: Tensor) -> Tensor:
    """Sums of (N, T, G) over each frame and those after it."""
    return values.flip(1).cumsum(1).flip(1)


def _fake_forward(frames, residual, num_frames, num_groups, weight, bias, eps, relu, silu):
    statistics = frames.new_empty((2, frames.shape[0], num_groups), dtype=torch.float32)
    return torch.empty_like(frames), statistics


def _fake_gradients(
    grad_y, frames, y, num_frames, num_groups, weight, bias, statistics, relu, silu
):
    grad_residual = frames.new_empty(0) if y is None else torch.empty_like(frames)
    return torch.empty_like(frames), grad_residual, torch.empty_like(weight), torch.empty_like(bias)


def _save_for_backward(ctx, inputs, output):
    frames, residual, num_frames, num_groups, weight, bias, _, relu, silu = inputs
    y, statistics = output
    ctx.options = (num_frames, num_groups)
    ctx.activation = (relu, silu)
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(statistics)
    saved = (frames, weight, bias, statistics)
    ctx.save_for_backward(*saved, y) if ctx.has_residual else ctx.save_for_backward(*saved)


def _backward(ctx, grad_y, _grad_statistics):
    frames, weight, bias, statistics, *y = ctx.saved_tensors
    layout = torch.contiguous_format if frames.is_contiguous() else torch.channels_last
    grad_y = grad_y.to(frames.dtype).contiguous(memory_format=layout)
    grad_x, grad_residual, grad_weight, grad_bias = causal_group_norm_fused_backward(
        grad_y, frames, y[0] if y else None, *ctx.options, weight, bias, statistics, *ctx.activation
    )
    if not y:
        grad_residual = None
    return grad_x, grad_residual, None, None, grad_weight, grad_bias, None, None, None


causal_group_norm_fused = Operator(
    "i3d_gn::causal_group_norm_fused",
    _forward,
    fake=_fake_forward,
    setup_context=_save_for_backward,
    backward=_backward,
)
causal_group_norm_fused_backward = Operator(
    "i3d_gn::causal_group_norm_fused_backward",
    _gradients,
    fake=_fake_gradients,
    **no_gradient(
        "the fused causal group norm does not support second derivatives; set the environment "
        "variable I3D_GN_NORM_KERNEL=native to differentiate twice"
    ),
)
