"""Group norm of channels_last tensors on the CPU: the fastest accurate method for each size.

`torch.group_norm` supports this layout, but computes the variance as E[x^2] - E[x]^2 (off by 0.1 at
a mean/std of 100, useless at 1000), and its backward takes up to 30 times as long as on contiguous
tensors (bf16, 64 x 16 x 56 x 56: 49 ms against 1.6). Therefore

- samples with few rows are copied to the contiguous layout; the copies stay in the cache;
- in low precision, forward uses torch's statistics if they show that nothing canceled;
- backward is torch's if nothing can cancel and groups are wide enough for its vectors;
- everything else is computed here, from sums over rows and torch's batch-norm kernels.

For the latter, a channels_last sample is a matrix of S = T*H*W rows and C columns, processed in
slabs of rows that fit the cache. The mean and variance per channel of a slab take two passes over
cached data, with pairwise sums. The parallel formula of Chan et al. (1979) combines slabs and the
channels of a group in float64, so that large squares are never subtracted.
"""

import torch
from torch import Tensor

from i3d_gn.norm.operators import Operator, no_gradient

_LOW_PRECISION = (torch.bfloat16, torch.float16)

# Elements of a slab: 1 MiB in fp32, so that a slab stays in a core's L2 cache (the fastest of 2^15
# to 2^19; larger slabs also save calls).
_SLAB_ELEMENTS = 1 << 18

# Forward: below this many rows torch uses another channels_last kernel, which is fast if groups are
# at least as wide as a vector. Copying is faster for narrower groups, and also for fp32, where
# torch's result is not accurate.
_FEW_ROWS = 1024
_WIDE_GROUP = 16

# Backward: torch's channels_last kernel is as fast as batch norm for groups of at least this width,
# in low precision that of a vector, and its fp32 sums are accurate over at most this many rows. For
# samples of fewer rows than the last value, copying is faster than slabs (all measured at C = 64 to
# 2048).
_WIDE_GROUP_FP32 = 4
_SUMMED_ROWS_FP32 = 4096
_FEW_ROWS_BACKWARD = 512

# The largest |mean| / std at which the error of E[x^2] - E[x]^2 is much less than an ulp of
# bfloat16 or float16: 17 times the relative error of 1e-5 of an fp32 sum over 25,000 numbers.
_LARGEST_TRUSTED_MEAN = 4.0


def _rows(x: Tensor) -> Tensor:
    """View a dense channels_last tensor (N, C, *) as (N, S, C)."""
    return x.movedim(1, -1).flatten(1, -2)


def _with_standard_strides(x: Tensor) -> Tensor:
    """A dense channels_last tensor, copied if dimensions of size 1 have nonstandard strides.

    Such strides have no meaning, but group norm of torch up to 2.13 rejects some of them.
    """
    sizes, strides = x.shape, x.stride()
    standard = 1
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        if strides[dim] != standard:
            return x.clone(memory_format=_layout(x))
        standard *= sizes[dim]
    return x


def _slabs(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, _SLAB_ELEMENTS // rows.shape[1]))


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def _is_faster_contiguous(dtype: torch.dtype, num_rows: int, group_size: int) -> bool:
    """Whether forward copies to the contiguous layout and back."""
    return num_rows < _FEW_ROWS and (group_size < _WIDE_GROUP or dtype not in _LOW_PRECISION)


def _torch_backward_suits(dtype: torch.dtype, num_rows: int, group_size: int) -> bool:
    """Whether torch's channels_last backward is fast, and accurate if statistics are trusted."""
    if dtype in _LOW_PRECISION:
        return group_size >= _WIDE_GROUP
    return group_size >= _WIDE_GROUP_FP32 and num_rows <= _SUMMED_ROWS_FP32


def _are_trusted(mean: Tensor, rstd: Tensor) -> bool:
    """Whether statistics (N, G) of torch's channels_last kernel are accurate; False for NaN."""
    margin = rstd * (_LARGEST_TRUSTED_MEAN - (mean * rstd).abs())  # 0 if the variance overflowed
    return margin.min().item() > 0


def _group_statistics(samples: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per group, (N, G) in float64, of samples (N, S, C)."""
    num_samples, num_rows, num_channels = samples.shape
    group_size = num_channels // num_groups
    compute_dtype = torch.promote_types(samples.dtype, torch.float32)
    scratch = torch.empty_like(_slabs(samples[0])[0], dtype=compute_dtype)
    moments = []
    for rows in samples:
        for slab in _slabs(rows):
            # `sum` adds pairwise; batch norm's kernels do not, and their error is too large here.
            center = slab.sum(0, dtype=compute_dtype) / len(slab)
            centered = torch.sub(slab, center, out=scratch[: len(slab)])
            correction = centered.sum(0) / len(slab)  # rounding error of the center
            square = centered.square_().sum(0) / len(slab)
            moments.append(torch.stack((center, correction, square)))

    # From (N * slabs, 3, C) to three of (N, slabs, G, C / G); dims 1 and 3 belong to one group.
    center, correction, square = (
        torch.stack(moments).double().view(num_samples, -1, 3, num_groups, group_size).unbind(2)
    )
    mean, variance = center + correction, (square - correction * correction).clamp(min=0)
    sizes = torch.tensor([slab.shape[0] for slab in _slabs(samples[0])], dtype=torch.float64)
    fraction = (sizes / (num_rows * group_size)).view(1, -1, 1, 1)
    group_mean = (mean * fraction).sum((1, 3))
    offset = mean - group_mean[:, None, :, None]
    return group_mean, ((variance + offset * offset) * fraction).sum((1, 3))


def _forward(
    x: Tensor,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize a dense channels_last CPU tensor, then optionally add `residual` and apply ReLU.

    Args:
        x: (N, C, H, W) or (N, C, T, H, W), contiguous in the channels_last format, not empty.
        residual: of x's shape and dtype; requires `relu`.
        num_groups: G, a divisor of C.
        weight: (C,) in float32, or in float64 if x is float64.
        bias: as `weight`.
        eps: added to the variance.
        relu: whether to apply ReLU.

    Returns:
        The result, in x's dtype and layout, and the statistics mean and 1 / sqrt(var + eps), both
        (N, G) in weight's dtype.
    """
    y, mean, rstd = _normalize(x, num_groups, weight, bias, eps)
    if residual is not None:
        y += residual
    return y.relu_() if relu else y, mean, rstd


def _normalize(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    num_samples, num_channels = x.shape[:2]
    num_rows, group_size = x.numel() // (num_samples * num_channels), num_channels // num_groups
    sizes = (num_samples, num_channels, num_rows, num_groups)
    if _is_faster_contiguous(x.dtype, num_rows, group_size):
        y, mean, rstd = torch.native_group_norm(x.contiguous(), weight, bias, *sizes, eps)
        return y.contiguous(memory_format=_layout(x)), mean, rstd
    if x.dtype != weight.dtype:
        y, mean, rstd = torch.native_group_norm(
            _with_standard_strides(x), weight, bias, *sizes, eps
        )
        if _are_trusted(mean, rstd):
            return y, mean, rstd
    samples = _rows(x)
    y = torch.empty_like(x)
    mean, variance = _group_statistics(samples, num_groups)
    channel_mean, channel_variance = (
        values.to(weight.dtype).repeat_interleave(group_size, dim=1) for values in (mean, variance)
    )
    unused = (weight.new_empty(0), weight.new_empty(0))
    for n, (rows, out_rows) in enumerate(zip(samples, _rows(y), strict=True)):
        # Batch norm in inference mode, with the statistics of this sample.
        torch.native_batch_norm(
            rows,
            weight,
            bias,
            channel_mean[n],
            channel_variance[n],
            False,
            0.0,
            eps,
            out=(out_rows, *unused),
        )
    return y, mean.to(weight.dtype), (variance + eps).rsqrt().to(weight.dtype)


def _gradients(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    num_groups: int,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, residual, weight and bias.

    Arguments are those and the results of `_forward`; `y` is None if it did not apply ReLU.
    Without a residual, its gradient is an empty tensor.
    """
    if y is not None:
        grad_y = torch.ops.aten.threshold_backward(grad_y, y, 0)
    grad_x, grad_weight, grad_bias = _gradients_before_relu(
        grad_y, x, num_groups, weight, mean, rstd
    )
    return grad_x, grad_y if has_residual else x.new_empty(0), grad_weight, grad_bias


def _gradients_before_relu(
    grad_y: Tensor, x: Tensor, num_groups: int, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    num_samples, num_channels = x.shape[:2]
    num_rows, group_size = x.numel() // (num_samples * num_channels), num_channels // num_groups
    compute_dtype = weight.dtype
    sizes = (num_samples, num_channels, num_rows, num_groups)
    backward = torch.ops.aten.native_group_norm_backward
    if _torch_backward_suits(x.dtype, num_rows, group_size) and _are_trusted(mean, rstd):
        x, grad_y = _with_standard_strides(x), _with_standard_strides(grad_y)
        return backward(grad_y, x, mean, rstd, weight, *sizes, [True] * 3)
    if num_rows < _FEW_ROWS_BACKWARD:
        grad_x, grad_weight, grad_bias = backward(
            grad_y.contiguous(), x.contiguous(), mean, rstd, weight, *sizes, [True] * 3
        )
        return grad_x.contiguous(memory_format=_layout(x)), grad_weight, grad_bias
    grad_x = torch.empty_like(x)
    samples, grad_samples, out_samples = _rows(x), _rows(grad_y), _rows(grad_x)
    channel_mean = mean.repeat_interleave(group_size, dim=1)
    channel_rstd = rstd.repeat_interleave(group_size, dim=1)

    slab_sums = []
    for n, (rows, grad_rows) in enumerate(zip(samples, grad_samples, strict=True)):
        for slab, grad_slab in zip(_slabs(rows), _slabs(grad_rows), strict=True):
            # Batch norm's two reductions: sums of dy * x_normalized and of dy.
            _, projection, total = torch.ops.aten.native_batch_norm_backward(
                grad_slab,
                slab,
                weight,
                channel_mean[n],
                channel_mean[n],
                channel_mean[n],
                channel_rstd[n],
                True,
                0.0,
                [False, True, True],
            )
            slab_sums += [projection, total]
    sums = torch.stack(slab_sums).double().view(num_samples, -1, 2, num_channels).sum(1)
    grad_weight, grad_bias = (sums[:, i].sum(0).to(compute_dtype) for i in range(2))

    # dx = rstd * (w*dy - mean(w*dy) - x_normalized * mean(w*dy * x_normalized)), with means over a
    # group, equals dy * scale + x * slope + offset, with one of each per sample and channel.
    averages = (sums * weight.double()).view(num_samples, 2, num_groups, group_size).sum(3)
    averages /= num_rows * group_size
    double_rstd = rstd.double()
    group_slope = -double_rstd.square() * averages[:, 0]
    group_offset = -double_rstd * averages[:, 1] - group_slope * mean.double()
    scale = channel_rstd * weight
    slope, offset = (
        values.to(compute_dtype).repeat_interleave(group_size, dim=1)
        for values in (group_slope, group_offset)
    )
    # Low precision is upcast slab by slab into buffers that stay in the cache, as operators on
    # mixed dtypes take twice as long; the result is rounded once.
    needs_upcast = x.dtype != compute_dtype
    slab_shape = _slabs(samples[0])[0].shape if needs_upcast else (0,)
    upcast, upcast_grad = torch.empty(2, *slab_shape, dtype=compute_dtype)
    for n in range(num_samples):
        for slab, grad_slab, out_slab in zip(
            _slabs(samples[n]), _slabs(grad_samples[n]), _slabs(out_samples[n]), strict=True
        ):
            if not needs_upcast:
                torch.addcmul(offset[n], grad_slab, scale[n], out=out_slab)
                out_slab.addcmul_(slab, slope[n])
                continue
            result = upcast_grad[: len(slab)].copy_(grad_slab)
            torch.addcmul(offset[n], result, scale[n], out=result)
            result.addcmul_(upcast[: len(slab)].copy_(slab), slope[n])
            out_slab.copy_(result)
    return grad_x, grad_weight, grad_bias


def _gradients_with_graph(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    num_groups: int,
    weight: Tensor,
    eps: float,
    has_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """As `_gradients`, from differentiable operators: the statistics depend on x too."""
    if y is not None:
        grad_y = grad_y * (y > 0)
    groups = x.to(weight.dtype).contiguous().view(len(x), num_groups, -1)
    variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    normalized = (groups - mean) * rstd
    by_channel = grad_y.to(weight.dtype).flatten(2).contiguous()
    scaled = (by_channel * weight[:, None]).view_as(groups)
    projection = (scaled * normalized).mean(2, keepdim=True)
    grad_x = rstd * (scaled - scaled.mean(2, keepdim=True) - normalized * projection)
    grad_weight = (by_channel * normalized.view_as(by_channel)).sum((0, 2))
    return (
        grad_x.view(x.shape).to(x.dtype).contiguous(memory_format=_layout(x)),
        grad_y if has_residual else None,
        grad_weight,
        by_channel.sum((0, 2)),
    )


def _fake_forward(x, residual, num_groups, weight, bias, eps, relu):
    mean, rstd = (weight.new_empty(x.shape[0], num_groups) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _fake_gradients(grad_y, x, y, num_groups, weight, mean, rstd, has_residual):
    grad_residual = torch.empty_like(grad_y) if has_residual else x.new_empty(0)
    return torch.empty_like(x), grad_residual, torch.empty_like(weight), torch.empty_like(weight)


def _save_for_backward(ctx, inputs, output):
    x, residual, num_groups, weight, _, eps, relu = inputs
    y, mean, rstd = output
    ctx.num_groups, ctx.eps = num_groups, eps
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(mean, rstd)
    saved = (x, weight, mean, rstd)
    ctx.save_for_backward(*saved, y) if relu else ctx.save_for_backward(*saved)


def _backward(ctx, grad_y, _grad_mean, _grad_rstd):
    x, weight, mean, rstd, *y = ctx.saved_tensors
    # An expanded gradient, as that of a sum, is not dense; copy it to the layout of x.
    grad_y = grad_y.to(x.dtype).contiguous(memory_format=_layout(x))
    y = y[0] if y else None
    if torch.is_grad_enabled():  # create_graph=True
        grad_x, grad_residual, grad_weight, grad_bias = _gradients_with_graph(
            grad_y, x, y, ctx.num_groups, weight, ctx.eps, ctx.has_residual
        )
        return grad_x, grad_residual, None, grad_weight, grad_bias, None, None
    grad_x, grad_residual, grad_weight, grad_bias = group_norm_channels_last_backward(
        grad_y, x, y, ctx.num_groups, weight, mean, rstd, ctx.has_residual
    )
    if not ctx.has_residual:
        grad_residual = None
    return grad_x, grad_residual, None, grad_weight, grad_bias, None, None


group_norm_channels_last = Operator(
    "i3d_gn::group_norm_channels_last_cpu",
    _forward,
    fake=_fake_forward,
    setup_context=_save_for_backward,
    backward=_backward,
)
group_norm_channels_last_backward = Operator(
    "i3d_gn::group_norm_channels_last_cpu_backward",
    _gradients,
    fake=_fake_gradients,
    # With create_graph=True it is not called.
    **no_gradient("this operator has no derivative"),
)
