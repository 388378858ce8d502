"""Launches of the Triton kernels of group norm: tiles, statistics, normalization, gradients."""

from functools import cache, lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of a program's tile (16 for each of 128 threads), the largest number of channels in it
# (rows of 256 bytes in bf16), and programs per multiprocessor. Measured on an H200 over the layers
# of I3D ResNet-50 (benchmarks/results/gpu.md).
_TILE_ELEMENTS = 2048
_TILE_CHANNELS = 128
_PROGRAMS_PER_MULTIPROCESSOR = 8
_NUM_WARPS = 4
_COMBINE_BLOCK = 256

# For sums over chunks: few channels per program, so that there are enough programs.
_SUM_BLOCK_ENTRIES = 128
_SUM_BLOCK_CHANNELS = 8


class _Tiling(NamedTuple):
    """How a tensor (N, C, *) is split among programs."""

    num_samples: int
    num_channels: int
    num_rows: int  # S, the number of positions of a sample
    channel_stride: int
    row_stride: int
    block_s: int
    block_c: int
    num_chunks: int  # per sample and BLOCK_C channels
    iterations: int  # tiles per chunk

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.num_channels, self.num_rows, self.channel_stride, self.row_stride

    @property
    def num_programs(self) -> int:
        return self.num_samples * -(-self.num_channels // self.block_c) * self.num_chunks

    @property
    def options(self) -> dict[str, int]:
        return {"BLOCK_S": self.block_s, "BLOCK_C": self.block_c, "num_warps": _NUM_WARPS}


def _tiling(x: Tensor) -> _Tiling:
    return _tiling_of(x.shape, x.is_contiguous(), _target_programs(x.device))


@lru_cache(maxsize=1024)
def _tiling_of(shape: torch.Size, is_contiguous: bool, target_programs: int) -> _Tiling:
    num_samples, num_channels = shape[:2]
    num_rows = shape.numel() // (num_samples * num_channels)
    if is_contiguous and num_rows > 1:
        channel_stride, row_stride = num_rows, 1
        block_s = min(_TILE_ELEMENTS, _next_power_of_2(num_rows))
        block_c = min(_TILE_ELEMENTS // block_s, _next_power_of_2(num_channels))
    else:
        channel_stride, row_stride = 1, num_channels
        block_c = min(_TILE_CHANNELS, _next_power_of_2(num_channels))
        block_s = min(_TILE_ELEMENTS // block_c, _next_power_of_2(num_rows))
    # Split the rows of a sample until there are enough programs for the device.
    num_tiles = -(-num_rows // block_s)
    columns = num_samples * -(-num_channels // block_c)
    num_chunks = min(num_tiles, max(1, target_programs // columns))
    iterations = -(-num_tiles // num_chunks)
    return _Tiling(
        num_samples,
        num_channels,
        num_rows,
        channel_stride,
        row_stride,
        block_s,
        block_c,
        num_chunks=-(-num_tiles // iterations),
        iterations=iterations,
    )


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@cache
def _target_programs(device: torch.device) -> int:
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
        return count * _PROGRAMS_PER_MULTIPROCESSOR
    return 8  # Triton's interpreter: few, so that tests cover chunks of several tiles


# Not at import: CPU builds of torch come without Triton.
def _forward_kernels() -> ModuleType:
    from i3d_gn.norm import triton_forward  # noqa: PLC0415

    return triton_forward


def _backward_kernels() -> ModuleType:
    from i3d_gn.norm import triton_backward  # noqa: PLC0415

    return triton_backward


def compute_statistics(x: Tensor, num_groups: int, eps: float) -> Tensor:
    """Mean and 1 / sqrt(var + eps), (2, N, G) in float32; see `_forward`."""
    kernels, tiling = _forward_kernels(), _tiling(x)
    group_size = tiling.num_channels // num_groups
    partial_mean, partial_m2 = _per_chunk_and_channel(x, tiling)
    statistics = x.new_empty((2, tiling.num_samples, num_groups), dtype=torch.float32)
    mean, rstd = statistics.unbind()
    with torch.cuda.device_of(x):
        kernels.partial_statistics[(tiling.num_programs,)](
            x,
            partial_mean,
            partial_m2,
            *tiling.shape,
            tiling.num_chunks,
            tiling.iterations,
            **tiling.options,
        )
        kernels.combine_statistics[(tiling.num_samples * num_groups,)](
            partial_mean,
            partial_m2,
            mean,
            rstd,
            tiling.num_channels,
            tiling.num_rows,
            num_groups,
            group_size,
            tiling.num_chunks,
            tiling.iterations * tiling.block_s,
            eps,
            BLOCK=_COMBINE_BLOCK,
            num_warps=4,
        )
    return statistics


def normalize(
    x: Tensor,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    relu: bool,
    silu: bool,
) -> Tensor:
    """The result of `_forward` from given statistics."""
    tiling = _tiling(x)
    mean, rstd = statistics.unbind()
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _forward_kernels().normalize[(tiling.num_programs,)](
            x,
            x if residual is None else residual,
            y,
            mean,
            rstd,
            weight,
            bias,
            *tiling.shape,
            num_groups,
            tiling.num_channels // num_groups,
            tiling.num_chunks,
            tiling.iterations,
            RELU=relu,
            SILU=silu,
            RESIDUAL=residual is not None,
            **tiling.options,
        )
    return y


def gradient_averages(
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
    """What the gradient of x needs, and the other gradients; arguments as for `_gradients`.

    Returns:
        Means over each group of weight * grad * x_normalized and of weight * grad, (2, N, G) in
        float32, where grad is the gradient of the activation's input; the gradients for residual,
        weight and bias.
    """
    kernels, tiling = _backward_kernels(), _tiling(x)
    group_size = tiling.num_channels // num_groups
    has_residual = y is not None
    grad_residual = torch.empty_like(x) if has_residual else x.new_empty(0)
    partial_projection, partial_total = _per_chunk_and_channel(x, tiling)
    mean, rstd = statistics.unbind()
    averages = torch.empty_like(statistics)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    with torch.cuda.device_of(x):
        kernels.partial_gradient_sums[(tiling.num_programs,)](
            grad_y,
            x,
            y if has_residual else x,
            grad_residual,
            mean,
            rstd,
            weight,
            bias,
            partial_projection,
            partial_total,
            *tiling.shape,
            num_groups,
            group_size,
            tiling.num_chunks,
            tiling.iterations,
            RELU=relu,
            SILU=silu,
            RESIDUAL=has_residual,
            **tiling.options,
        )
        num_sums = -(-tiling.num_channels // _SUM_BLOCK_CHANNELS)
        kernels.combine_gradient_sums[(tiling.num_samples * num_groups + num_sums,)](
            partial_projection,
            partial_total,
            weight,
            *averages.unbind(),
            grad_weight,
            grad_bias,
            tiling.num_samples,
            tiling.num_channels,
            tiling.num_rows,
            num_groups,
            group_size,
            tiling.num_chunks,
            BLOCK=_COMBINE_BLOCK,
            SUM_BLOCK_E=_SUM_BLOCK_ENTRIES,
            SUM_BLOCK_C=_SUM_BLOCK_CHANNELS,
            num_warps=4,
        )
    return averages, grad_residual, grad_weight, grad_bias


def input_gradient(
    grad: Tensor,
    x: Tensor,
    has_residual: bool,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    averages: Tensor,
    relu: bool,
    silu: bool,
) -> Tensor:
    """The gradient of x from `averages`, see `gradient_averages`.

    `grad` is that of the activation's input if there was a residual, else that of its result.
    """
    tiling = _tiling(x)
    grad_x = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _backward_kernels().input_gradient[(tiling.num_programs,)](
            grad,
            x,
            grad_x,
            *statistics.unbind(),
            weight,
            bias,
            *averages.unbind(),
            *tiling.shape,
            num_groups,
            tiling.num_channels // num_groups,
            tiling.num_chunks,
            tiling.iterations,
            RELU=relu,
            SILU=silu,
            RESIDUAL=has_residual,
            **tiling.options,
        )
    return grad_x


def _per_chunk_and_channel(x: Tensor, tiling: _Tiling) -> tuple[Tensor, ...]:
    """Two tensors (N, chunks, C) in float32."""
    shape = (2, tiling.num_samples, tiling.num_chunks, tiling.num_channels)
    return x.new_empty(shape, dtype=torch.float32).unbind()
