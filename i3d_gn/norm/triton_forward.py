"""Triton kernels of group norm; `i3d_gn.norm.fused` launches them.

A sample is a matrix of S = T*H*W rows and C channels with the strides of its layout, so that the
same code handles contiguous and channels_last tensors. A program processes BLOCK_C channels and a
chunk of `iterations * BLOCK_S` rows of one sample, one tile [BLOCK_S, BLOCK_C] at a time. Its sums
are per channel. Only the two `combine` kernels, which read a few numbers per channel and chunk,
work with groups; any group size is possible, without padding.

Row numbers and all indices computed from them are 64-bit: tensors may exceed 2^31 elements.
Everything is computed in float32, except that partial results are combined in float64.
"""

# ruff: noqa: N803 (constants of a kernel are in upper case)
# The type checker treats pointers and scalars of a kernel as plain Python values.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false

import triton
import triton.language as tl


@triton.jit
def locate(program, num_channels, num_chunks, BLOCK_C: tl.constexpr):
    """The sample, channels and chunk of a program; chunks of one sample are consecutive."""
    num_tiles = tl.cdiv(num_channels, BLOCK_C)
    chunk = (program % num_chunks).to(tl.int64)
    tile = (program // num_chunks) % num_tiles
    sample = (program // num_chunks // num_tiles).to(tl.int64)
    return sample, tile * BLOCK_C + tl.arange(0, BLOCK_C), chunk


@triton.jit
def partial_statistics(
    x_ptr,
    partial_mean_ptr,  # (N, chunks, C)
    partial_m2_ptr,  # (N, chunks, C), sums of (x - partial_mean)^2
    num_channels,
    num_rows,
    channel_stride,
    row_stride,
    num_chunks,
    iterations,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and M2 per channel of a chunk: Welford's in every element of the tile, then combined."""
    sample, channel, chunk = locate(tl.program_id(0), num_channels, num_chunks, BLOCK_C)
    row = tl.arange(0, BLOCK_S)
    first_row = chunk * iterations * BLOCK_S
    chunk_rows = tl.minimum(num_rows - first_row, iterations * BLOCK_S)
    in_channels = channel < num_channels
    x_ptr += sample * num_rows * num_channels + first_row * row_stride
    offset = row.to(tl.int64)[:, None] * row_stride + channel.to(tl.int64)[None, :] * channel_stride

    mean = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    for i in range(iterations):
        inside = (i * BLOCK_S + row < chunk_rows)[:, None] & in_channels[None, :]
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / (i + 1))
        m2 += delta * (x - mean)
        x_ptr += BLOCK_S * row_stride

    # Combine the rows of the tile. The second sum corrects the rounding error of the first, which
    # exceeds the std if that is small relative to the mean.
    count = tl.maximum((chunk_rows - row + BLOCK_S - 1) // BLOCK_S, 0).to(tl.float32)[:, None]
    share = count / chunk_rows.to(tl.float32)
    rough_mean = tl.sum(mean * share, axis=0)
    difference = (mean - rough_mean[None, :]) * count
    chunk_mean = rough_mean + tl.sum(difference, axis=0) / chunk_rows.to(tl.float32)
    deviation = mean - chunk_mean[None, :]
    chunk_m2 = tl.sum(m2 + count * deviation * deviation, axis=0)
    entry = (sample * num_chunks + chunk) * num_channels + channel
    tl.store(partial_mean_ptr + entry, chunk_mean, mask=in_channels)
    tl.store(partial_m2_ptr + entry, chunk_m2, mask=in_channels)


@triton.jit
def combine_statistics(
    partial_mean_ptr,
    partial_m2_ptr,
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    num_channels,
    num_rows,
    num_groups,
    group_size,
    num_chunks,
    chunk_size,
    eps,
    BLOCK: tl.constexpr,
):
    """Mean and 1 / sqrt(var + eps) of a group (Chan et al. 1979), one program per group."""
    sample = (tl.program_id(0) // num_groups).to(tl.int64)
    group = tl.program_id(0) % num_groups
    first_entry = sample * num_chunks * num_channels + group * group_size
    num_entries = num_chunks * group_size
    total_count = tl.cast(num_rows, tl.float64) * tl.cast(group_size, tl.float64)

    total = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, num_entries, BLOCK):
        number = first + tl.arange(0, BLOCK)
        chunk = number // group_size
        entry = first_entry + chunk.to(tl.int64) * num_channels + number % group_size
        inside = number < num_entries
        count = tl.minimum(num_rows - chunk.to(tl.int64) * chunk_size, chunk_size).to(tl.float64)
        mean = tl.load(partial_mean_ptr + entry, mask=inside, other=0.0).to(tl.float64)
        total += tl.where(inside, count * mean, 0.0)
    group_mean = tl.sum(total, axis=0) / total_count

    total = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, num_entries, BLOCK):
        number = first + tl.arange(0, BLOCK)
        chunk = number // group_size
        entry = first_entry + chunk.to(tl.int64) * num_channels + number % group_size
        inside = number < num_entries
        count = tl.minimum(num_rows - chunk.to(tl.int64) * chunk_size, chunk_size).to(tl.float64)
        mean = tl.load(partial_mean_ptr + entry, mask=inside, other=0.0).to(tl.float64)
        m2 = tl.load(partial_m2_ptr + entry, mask=inside, other=0.0).to(tl.float64)
        deviation = mean - group_mean
        total += tl.where(inside, m2 + count * deviation * deviation, 0.0)
    variance = tl.sum(total, axis=0) / total_count

    tl.store(mean_ptr + tl.program_id(0), group_mean.to(tl.float32))
    tl.store(rstd_ptr + tl.program_id(0), (1.0 / tl.sqrt(variance + eps)).to(tl.float32))


@triton.jit
def normalize(
    x_ptr,
    residual_ptr,  # like x, read if RESIDUAL
    y_ptr,
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
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
    """Compute y = (x - mean) * rstd * weight + bias, then + residual, then ReLU or SiLU."""
    # Last samples first: they were read last and may still be in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, channel, chunk = locate(program, num_channels, num_chunks, BLOCK_C)
    row = tl.arange(0, BLOCK_S)
    first_row = chunk * iterations * BLOCK_S
    chunk_rows = tl.minimum(num_rows - first_row, iterations * BLOCK_S)
    in_channels = channel < num_channels
    start = sample * num_rows * num_channels + first_row * row_stride
    offset = row.to(tl.int64)[:, None] * row_stride + channel.to(tl.int64)[None, :] * channel_stride
    x_ptr += start
    y_ptr += start
    if RESIDUAL:
        residual_ptr += start

    entry = sample * num_groups + channel // group_size
    mean = tl.load(mean_ptr + entry, mask=in_channels, other=0.0)
    rstd = tl.load(rstd_ptr + entry, mask=in_channels, other=0.0)
    scale = rstd * tl.load(weight_ptr + channel, mask=in_channels, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=in_channels, other=0.0)
    for i in range(iterations):
        inside = (i * BLOCK_S + row < chunk_rows)[:, None] & in_channels[None, :]
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if RESIDUAL:
            y += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            residual_ptr += BLOCK_S * row_stride
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)  # keeps NaN, unlike maximum
        if SILU:
            y *= tl.sigmoid(y)
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
        x_ptr += BLOCK_S * row_stride
        y_ptr += BLOCK_S * row_stride
