"""Triton kernels of the gradients of group norm; see `triton_forward` for tiles and chunks."""

# ruff: noqa: N803 (constants of a kernel are in upper case)
# The type checker treats pointers and scalars of a kernel as plain Python values.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false

import triton
import triton.language as tl

from i3d_gn.norm.triton_forward import locate


@triton.jit
def _through_activation(grad, x, RELU: tl.constexpr, SILU: tl.constexpr):
    """The gradient of an activation's input x from that of its result."""
    if RELU:
        grad = tl.where(x <= 0.0, 0.0, grad)
    if SILU:
        sigmoid = tl.sigmoid(x)
        grad *= sigmoid * (1.0 + x * (1.0 - sigmoid))
    return grad


@triton.jit
def partial_gradient_sums(
    grad_y_ptr,
    x_ptr,
    y_ptr,  # result of the forward, read if RESIDUAL
    grad_residual_ptr,  # written if RESIDUAL
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    partial_projection_ptr,  # (N, chunks, C): sums of grad * x_normalized
    partial_total_ptr,  # (N, chunks, C): sums of grad
    num_channels,
    num_rows,
    channel_stride,
    row_stride,
    num_groups,
    group_size,
    num_chunks,
    iterations,
    RELU: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The two sums that all gradients need; `grad` is the gradient of the activation's input.

    With RESIDUAL, the sign of the result is the ReLU's mask (the next convolution saves the result
    anyway). Without, the activation's input is recomputed from x.
    """
    sample, channel, chunk = locate(tl.program_id(0), num_channels, num_chunks, BLOCK_C)
    row = tl.arange(0, BLOCK_S)
    first_row = chunk * iterations * BLOCK_S
    chunk_rows = tl.minimum(num_rows - first_row, iterations * BLOCK_S)
    in_channels = channel < num_channels
    start = sample * num_rows * num_channels + first_row * row_stride
    offset = row.to(tl.int64)[:, None] * row_stride + channel.to(tl.int64)[None, :] * channel_stride
    grad_y_ptr += start
    x_ptr += start
    if RESIDUAL:
        y_ptr += start
        grad_residual_ptr += start

    group_entry = sample * num_groups + channel // group_size
    mean = tl.load(mean_ptr + group_entry, mask=in_channels, other=0.0)
    rstd = tl.load(rstd_ptr + group_entry, mask=in_channels, other=0.0)
    scale = rstd * tl.load(weight_ptr + channel, mask=in_channels, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=in_channels, other=0.0)
    projection = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    total = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    for i in range(iterations):
        inside = (i * BLOCK_S + row < chunk_rows)[:, None] & in_channels[None, :]
        grad = tl.load(grad_y_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        centered = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        if RESIDUAL:
            y = tl.load(y_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            grad = tl.where(y <= 0.0, 0.0, grad)
            grad_in_dtype = grad.to(grad_residual_ptr.dtype.element_ty)
            tl.store(grad_residual_ptr + offset, grad_in_dtype, mask=inside)
            y_ptr += BLOCK_S * row_stride
            grad_residual_ptr += BLOCK_S * row_stride
        else:
            grad = _through_activation(grad, centered * scale[None, :] + bias[None, :], RELU, SILU)
        projection += grad * centered
        total += grad
        grad_y_ptr += BLOCK_S * row_stride
        x_ptr += BLOCK_S * row_stride

    entry = (sample * num_chunks + chunk) * num_channels + channel
    projection_sum = tl.sum(projection, axis=0) * rstd
    tl.store(partial_projection_ptr + entry, projection_sum, mask=in_channels)
    tl.store(partial_total_ptr + entry, tl.sum(total, axis=0), mask=in_channels)


@triton.jit
def combine_gradient_sums(
    partial_projection_ptr,
    partial_total_ptr,
    weight_ptr,
    slope_ptr,  # (N, G): means over a group of weight * grad * x_normalized
    level_ptr,  # (N, G): means over a group of weight * grad
    grad_weight_ptr,  # (C,)
    grad_bias_ptr,  # (C,)
    num_samples,
    num_channels,
    num_rows,
    num_groups,
    group_size,
    num_chunks,
    BLOCK: tl.constexpr,
    SUM_BLOCK_E: tl.constexpr,
    SUM_BLOCK_C: tl.constexpr,
):
    """Two means per group, one program per group; two sums for SUM_BLOCK_C channels per program."""
    program = tl.program_id(0)
    if program < num_samples * num_groups:
        sample = (program // num_groups).to(tl.int64)
        group = program % num_groups
        first_entry = sample * num_chunks * num_channels + group * group_size
        num_entries = num_chunks * group_size

        slope = tl.zeros([BLOCK], dtype=tl.float64)
        level = tl.zeros([BLOCK], dtype=tl.float64)
        for first in range(0, num_entries, BLOCK):
            number = first + tl.arange(0, BLOCK)
            channel = number % group_size
            entry = first_entry + (number // group_size).to(tl.int64) * num_channels + channel
            inside = number < num_entries
            weight = tl.load(weight_ptr + group * group_size + channel, mask=inside, other=0.0)
            projection = tl.load(partial_projection_ptr + entry, mask=inside, other=0.0)
            total = tl.load(partial_total_ptr + entry, mask=inside, other=0.0)
            slope += weight.to(tl.float64) * projection.to(tl.float64)
            level += weight.to(tl.float64) * total.to(tl.float64)
        count = tl.cast(num_rows, tl.float64) * tl.cast(group_size, tl.float64)
        tl.store(slope_ptr + program, (tl.sum(slope, axis=0) / count).to(tl.float32))
        tl.store(level_ptr + program, (tl.sum(level, axis=0) / count).to(tl.float32))
    else:
        sum_channel = (program - num_samples * num_groups) * SUM_BLOCK_C + tl.arange(0, SUM_BLOCK_C)
        _sum_over_entries(
            partial_projection_ptr,
            grad_weight_ptr,
            sum_channel,
            num_samples * num_chunks,
            num_channels,
            SUM_BLOCK_E,
            SUM_BLOCK_C,
        )
        _sum_over_entries(
            partial_total_ptr,
            grad_bias_ptr,
            sum_channel,
            num_samples * num_chunks,
            num_channels,
            SUM_BLOCK_E,
            SUM_BLOCK_C,
        )


@triton.jit
def _sum_over_entries(
    partial_ptr,  # (entries, C)
    sum_ptr,  # (C,)
    channel,
    num_entries,
    num_channels,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    total = tl.zeros([BLOCK_E, BLOCK_C], dtype=tl.float64)
    in_channels = channel < num_channels
    for first in range(0, num_entries, BLOCK_E):
        entry = (first + tl.arange(0, BLOCK_E)).to(tl.int64)
        inside = (entry < num_entries)[:, None] & in_channels[None, :]
        offset = entry[:, None] * num_channels + channel[None, :]
        total += tl.load(partial_ptr + offset, mask=inside, other=0.0).to(tl.float64)
    tl.store(sum_ptr + channel, tl.sum(total, axis=0).to(tl.float32), mask=in_channels)


@triton.jit
def input_gradient(
    grad_ptr,  # gradient of the activation's input if RESIDUAL, otherwise of its output
    x_ptr,
    grad_x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    slope_ptr,
    level_ptr,
    num_channels,
    num_rows,
    channel_stride,
    row_stride,
    num_groups,
    group_size,
    num_chunks,
    iterations,
    RELU: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute grad_x = rstd * (weight * grad - level - x_normalized * slope)."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # as in `normalize`
    sample, channel, chunk = locate(program, num_channels, num_chunks, BLOCK_C)
    row = tl.arange(0, BLOCK_S)
    first_row = chunk * iterations * BLOCK_S
    chunk_rows = tl.minimum(num_rows - first_row, iterations * BLOCK_S)
    in_channels = channel < num_channels
    start = sample * num_rows * num_channels + first_row * row_stride
    offset = row.to(tl.int64)[:, None] * row_stride + channel.to(tl.int64)[None, :] * channel_stride
    grad_ptr += start
    x_ptr += start
    grad_x_ptr += start

    group_entry = sample * num_groups + channel // group_size
    mean = tl.load(mean_ptr + group_entry, mask=in_channels, other=0.0)
    rstd = tl.load(rstd_ptr + group_entry, mask=in_channels, other=0.0)
    scale = rstd * tl.load(weight_ptr + channel, mask=in_channels, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=in_channels, other=0.0)
    slope = tl.load(slope_ptr + group_entry, mask=in_channels, other=0.0) * rstd * rstd
    level = tl.load(level_ptr + group_entry, mask=in_channels, other=0.0) * rstd
    for i in range(iterations):
        inside = (i * BLOCK_S + row < chunk_rows)[:, None] & in_channels[None, :]
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        centered = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        if not RESIDUAL:
            before = centered * scale[None, :] + bias[None, :]
            grad = _through_activation(grad, before, RELU, SILU)
        grad_x = grad * scale[None, :] - level[None, :] - centered * slope[None, :]
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        grad_ptr += BLOCK_S * row_stride
        x_ptr += BLOCK_S * row_stride
        grad_x_ptr += BLOCK_S * row_stride
