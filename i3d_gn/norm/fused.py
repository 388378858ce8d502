"""Group norm, residual sum and ReLU as one operator on Triton kernels, forward and backward.

Memory traffic in bytes per element in bf16: forward 6 (x read twice, y written), 8 with a residual;
backward 10, or 14 with a residual. The only activation that the forward saves is its input x, and
with a residual also the result, which the next convolution saves anyway.
"""

from functools import cache, lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from i3d_gn.norm.operators import Operator, no_gradient

# Elements of a program's tile (16 for each of 256 threads), the largest number of channels in it
# (rows of 256 bytes in bf16), and programs per multiprocessor (a few waves).
_TILE_ELEMENTS = 4096
_TILE_CHANNELS = 128
_PROGRAMS_PER_MULTIPROCESSOR = 8
_NUM_WARPS = 8
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


def _kernels() -> ModuleType:
    # Not at import: CPU builds of torch come without Triton.
    from i3d_gn.norm import triton_kernels  # noqa: PLC0415

    return triton_kernels


def _forward(
    x: Tensor,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Normalize, then optionally add `residual` and apply ReLU.

    Args:
        x: (N, C, *) in float32, bfloat16 or float16, contiguous or dense channels_last, not empty.
        residual: of x's shape, dtype and strides; requires `relu`.
        num_groups: G, a divisor of C.
        weight: (C,) in float32.
        bias: (C,) in float32.
        eps: added to the variance.
        relu: whether to apply ReLU.

    Returns:
        The result, in x's dtype and layout, and the statistics (2, N, G) in float32: mean and
        1 / sqrt(var + eps).
    """
    kernels, tiling = _kernels(), _tiling(x)
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
    return _normalize(x, residual, num_groups, weight, bias, mean, rstd, relu), statistics


def _recompute(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, statistics: Tensor, relu: bool
) -> Tensor:
    """The result of `group_norm_fused`, bit-identical, from its statistics."""
    mean, rstd = statistics.unbind()
    return _normalize(x, None, num_groups, weight, bias, mean, rstd, relu)


def _normalize(
    x: Tensor,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
) -> Tensor:
    tiling = _tiling(x)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _kernels().normalize[(tiling.num_programs,)](
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
            RESIDUAL=residual is not None,
            **tiling.options,
        )
    return y


def _gradients(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    relu: bool,
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

    Returns:
        The gradients. Without a residual, its gradient is an empty tensor.
    """
    kernels, tiling = _kernels(), _tiling(x)
    group_size = tiling.num_channels // num_groups
    has_residual = y is not None
    grad_residual = torch.empty_like(x) if has_residual else x.new_empty(0)
    partial_projection, partial_total = _per_chunk_and_channel(x, tiling)
    mean, rstd = statistics.unbind()
    slope, level = torch.empty_like(statistics).unbind()
    grad_x, grad_weight, grad_bias = map(torch.empty_like, (x, weight, bias))
    per_tile = (
        *tiling.shape,
        num_groups,
        group_size,
        tiling.num_chunks,
        tiling.iterations,
    )
    fused = {"RELU": relu, "RESIDUAL": has_residual}
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
            *per_tile,
            **fused,
            **tiling.options,
        )
        num_sums = -(-tiling.num_channels // _SUM_BLOCK_CHANNELS)
        kernels.combine_gradient_sums[(tiling.num_samples * num_groups + num_sums,)](
            partial_projection,
            partial_total,
            weight,
            slope,
            level,
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
        kernels.input_gradient[(tiling.num_programs,)](
            grad_residual if has_residual else grad_y,
            x,
            grad_x,
            mean,
            rstd,
            weight,
            bias,
            slope,
            level,
            *per_tile,
            **fused,
            **tiling.options,
        )
    return grad_x, grad_residual, grad_weight, grad_bias


def _per_chunk_and_channel(x: Tensor, tiling: _Tiling) -> tuple[Tensor, ...]:
    """Two tensors (N, chunks, C) in float32."""
    shape = (2, tiling.num_samples, tiling.num_chunks, tiling.num_channels)
    return x.new_empty(shape, dtype=torch.float32).unbind()


def _fake_forward(x, residual, num_groups, weight, bias, eps, relu):
    return torch.empty_like(x), x.new_empty((2, x.shape[0], num_groups), dtype=torch.float32)


def _fake_recompute(x, num_groups, weight, bias, statistics, relu):
    return torch.empty_like(x)


def _fake_gradients(grad_y, x, y, num_groups, weight, bias, statistics, relu):
    grad_residual = x.new_empty(0) if y is None else torch.empty_like(x)
    return torch.empty_like(x), grad_residual, torch.empty_like(weight), torch.empty_like(bias)


def _save_for_backward(ctx, inputs, output):
    x, residual, num_groups, weight, bias, _, relu = inputs
    y, statistics = output
    ctx.num_groups = num_groups
    ctx.relu = relu
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(statistics)
    saved = (x, weight, bias, statistics)
    ctx.save_for_backward(*saved, y) if ctx.has_residual else ctx.save_for_backward(*saved)


def _backward(ctx, grad_y, _grad_statistics):
    x, weight, bias, statistics, *y = ctx.saved_tensors
    # The gradient of a sum or a slice is not dense; copy it to the layout of x.
    grad_y = grad_y.to(x.dtype).contiguous(memory_format=_layout(x))
    grad_x, grad_residual, grad_weight, grad_bias = group_norm_fused_backward(
        grad_y, x, y[0] if y else None, ctx.num_groups, weight, bias, statistics, ctx.relu
    )
    return grad_x, grad_residual if y else None, None, grad_weight, grad_bias, None, None


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
