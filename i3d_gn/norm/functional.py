"""Group norm as a function, which chooses an implementation that is accurate for the input."""

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from i3d_gn.norm.axes import (
    Over,
    causal_group_norm,
    causal_group_norm_fused,
    to_clips,
    to_frames,
)
from i3d_gn.norm.channels_last_cpu import group_norm_channels_last
from i3d_gn.norm.fused import group_norm_fused, group_norm_fused_recompute

# Environment variable that forces an implementation: auto (the default), triton or native.
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
    over: Over = "thw",
    relu: bool = False,
    silu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalize each sample over groups of channels and all positions ([GN] Eqn. 7).

    y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and biased variance per sample and
    group, over the group's C / G channels and all of (T, H, W). Statistics are computed in at least
    float32, also under autocast. With the fused kernels (`uses_fused_kernels`), `relu`, `silu`
    and `residual` take no extra pass over memory.

    Args:
        x: (N, C, *), floating point, any number of spatial dimensions, any strides.
        num_groups: G, a divisor of C. 1 is layer norm, C is instance norm.
        weight: (C,); None means 1.
        bias: (C,); None means 0.
        eps: added to the variance.
        over: `thw` all positions; for clips (N, C, T, H, W) also `hw`, each frame by itself, or
            `causal`, each frame with those before it. For images (N, C, H, W), `hw` is `thw`.
        relu: whether to apply ReLU.
        silu: whether to apply SiLU instead.
        residual: of x's shape, added to the normalized x before the ReLU; requires `relu`.

    Returns:
        Tensor of the shape, dtype and memory format of `x`.

    Raises:
        ValueError: `x` is not floating point or has no channel dimension, G does not divide C,
            `weight` or `bias` has the wrong shape, `residual` has the wrong shape or is given
            without `relu`, both `relu` and `silu` are given, `x` has no time axis for `over`, or
            the environment forces kernels that cannot run.
    """
    weight, bias = _parameters(x, num_groups, weight, bias)
    check_axes(x, over)
    if relu and silu:
        raise ValueError("relu=True and silu=True; give one of them")
    if residual is not None and (not relu or residual.shape != x.shape):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)} with relu={relu}; pass relu=True and a "
            f"residual of x's shape {tuple(x.shape)}"
        )
    if x.numel() == 0:
        # There are no statistics, but gradients of an empty batch must be zeros, not None.
        by_channel = (1, -1, *(1,) * (x.dim() - 2))
        y = (x * weight.view(by_channel) + bias.view(by_channel)).to(x.dtype)
        return y if residual is None else y + residual.to(x.dtype)

    if over == "causal":
        return _causal(x, num_groups, weight, bias, eps, residual, relu, silu)
    if over == "hw" and x.dim() == 5:
        frames = None if residual is None else to_frames(residual)
        y = group_norm(
            to_frames(x), num_groups, weight, bias, eps, relu=relu, silu=silu, residual=frames
        )
        return to_clips(y, x.shape[0], _memory_format(x))
    layout = _memory_format(x)
    if uses_fused_kernels(x):
        x, residual = _dense(x, residual, layout)
        return group_norm_fused(x, residual, num_groups, weight, bias, eps, relu, silu)[0]
    if layout != torch.contiguous_format and x.device.type == "cpu" and not _must_be_native():
        x, residual = _dense(x, residual, layout)
        y = group_norm_channels_last(x, residual, num_groups, weight, bias, eps, relu)[0]
    else:
        y = _native_group_norm(x.contiguous(), num_groups, weight, bias, eps, residual, relu)
        y = y.contiguous(memory_format=layout)
    return F.silu(y) if silu else y


def group_norm_relu_with_recompute(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    over: Over = "thw",
) -> tuple[Tensor, Callable[[], Tensor]]:
    """`group_norm` with ReLU, and a function that recomputes the result.

    The function is meant for backward and is not differentiable. It keeps x, the statistics and the
    parameters alive, but not the result. It raises a RuntimeError if x or a parameter was modified
    in place in the meantime.

    Args:
        x: (N, C, *), dense, and `uses_fused_kernels(x)` is true.
        num_groups: see `group_norm`.
        weight: see `group_norm`.
        bias: see `group_norm`.
        eps: see `group_norm`.
        over: `thw` or `hw`, see `group_norm`.
    """
    if over == "hw" and x.dim() == 5:
        frames = to_frames(x)
        frames, _ = _dense(frames, None, _memory_format(frames))
        y, recompute = group_norm_relu_with_recompute(frames, num_groups, weight, bias, eps)
        as_clips = partial(to_clips, num_clips=x.shape[0], layout=_memory_format(x))
        return as_clips(y), lambda: as_clips(recompute())
    assert over != "causal"
    weight, bias = _parameters(x, num_groups, weight, bias)
    y, statistics = group_norm_fused(x, None, num_groups, weight, bias, eps, True, False)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    versions = (x._version, weight._version, bias._version)
    return y, partial(_recompute_relu, x, num_groups, weight, bias, statistics, versions)


def _recompute_relu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    versions: tuple[int, int, int],
) -> Tensor:
    # Autograd makes this check for tensors that it saves.
    if versions != (x._version, weight._version, bias._version):
        raise RuntimeError(
            "the input, weight or bias of a group norm was modified in place between forward and "
            "backward, which recomputes the result; modify a copy"
        )
    return group_norm_fused_recompute(x, num_groups, weight, bias, statistics, True)


def uses_fused_kernels(x: Tensor) -> bool:
    """Whether `group_norm` runs the fused Triton kernels on x, forward and backward.

    They support float32, bfloat16 and float16 in any layout on a CUDA device, and are the default
    there. The environment variable I3D_GN_NORM_KERNEL overrides the choice: `native` turns them
    off; `triton` makes it an error if they cannot run, and allows them on the CPU in Triton's
    interpreter (TRITON_INTERPRET=1). `torch.export` always uses the native operator, which every
    runtime supports, and so do the transforms of `torch.func`, which do not support our custom
    operator.

    Raises:
        ValueError: the variable has an unknown value, or is `triton` and the kernels cannot run.
    """
    choice = os.environ.get(KERNEL_VARIABLE, "auto")
    if choice not in ("auto", "triton", "native"):
        raise ValueError(f"{KERNEL_VARIABLE}={choice!r} is unknown; choose auto, triton or native")
    if choice == "native" or _must_be_native():
        return False
    if x.device.type == "cuda":
        # bfloat16 requires compute capability 8.0.
        able = _HAS_TRITON and torch.cuda.get_device_properties(x.device).major >= 8
    else:
        interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        able = _HAS_TRITON and choice == "triton" and (interpreted or x.device.type == "meta")
    able = able and x.dtype in _FUSED_DTYPES
    if choice == "triton" and not able:
        raise ValueError(
            f"{KERNEL_VARIABLE}=triton, but x is {x.dtype} on {x.device}. The kernels require "
            "Triton and float32, bfloat16 or float16 on a CUDA device of compute capability 8.0 or "
            "higher (or on the CPU with TRITON_INTERPRET=1); unset the variable otherwise"
        )
    return able


def check_axes(x: Tensor, over: str) -> None:
    """Raise a ValueError unless `x` has the axes of `over`."""
    if over not in get_args(Over):
        raise ValueError(f"over={over!r} is unknown; choose one of {', '.join(get_args(Over))}")
    if (over == "causal" and x.dim() != 5) or (over == "hw" and x.dim() not in (4, 5)):
        raise ValueError(f"x has shape {tuple(x.shape)}; over={over!r} needs clips (N, C, T, H, W)")


def _dense(
    x: Tensor, residual: Tensor | None, layout: torch.memory_format
) -> tuple[Tensor, Tensor | None]:
    x = x.contiguous(memory_format=layout)
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=layout)
    return x, residual


def _causal(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    silu: bool,
) -> Tensor:
    layout = _memory_format(x)
    if uses_fused_kernels(x):
        x, residual = _dense(x, residual, layout)
        frame_layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        frames, frame_residual = (
            None if t is None else to_frames(t).contiguous(memory_format=frame_layout)
            for t in (x, residual)
        )
        y, _ = causal_group_norm_fused(
            frames, frame_residual, x.shape[2], num_groups, weight, bias, eps, relu, silu
        )
        return to_clips(y, x.shape[0], layout)
    if x.is_meta:  # autocast does not support the meta device
        y = causal_group_norm(x, num_groups, weight, bias, eps)
    else:
        with torch.autocast(x.device.type, enabled=False):
            y = causal_group_norm(x, num_groups, weight, bias, eps)
    if residual is not None:
        y = y + residual.to(x.dtype)
    if relu or silu:
        y = y.relu() if relu else F.silu(y)
    return y.contiguous(memory_format=layout)


def _parameters(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check the arguments; return weight and bias (C,), dense because kernels index them.

    They are float32 for a low-precision x: torch's CPU kernel then saves the statistics for
    backward in float32, and would otherwise round the mean to x's precision.
    """
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (N, C, *)")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; convert it to floating point first")
    num_channels = x.shape[1]
    if num_groups < 1 or num_channels % num_groups:
        raise ValueError(
            f"{num_channels} channels do not split into num_groups={num_groups} equal groups; "
            f"choose a divisor of {num_channels}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (num_channels,):
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}; expected ({num_channels},) for x of "
                f"{num_channels} channels"
            )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = x.new_ones(num_channels, dtype=dtype) if weight is None else _cast(weight, dtype)
    bias = x.new_zeros(num_channels, dtype=dtype) if bias is None else _cast(bias, dtype)
    return weight.contiguous(), bias.contiguous()


def _cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    # torch.export records a cast even if it does nothing.
    return parameter if parameter.dtype == dtype else parameter.to(dtype)


def _must_be_native() -> bool:
    # torch.func.jvp silently treats a custom operator as a constant.
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
    """`torch.group_norm` of a contiguous tensor, without the cases in which it is inaccurate.

    These are autocast's casts, CUDA's low-precision statistics and, on a CPU, the channels_last
    kernel. The latter also runs on contiguous tensors whose strides are channels_last too, those
    with a single channel or position, but not on tensors of shape (N, C, S).
    """
    if torch.compiler.is_exporting():
        # One operator that runtimes know: no casts, and no reshaping of dynamic shapes.
        y = torch.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
        y = y if residual is None else y + residual
        return y.relu() if relu else y
    shape, dtype = x.shape, x.dtype
    x = x.view(*shape[:2], -1)
    if x.device.type != "cpu":
        # The CUDA kernel saves mean and rstd in x's dtype: a mean of 8 bits in bf16.
        x = x.to(weight.dtype)
    if x.is_meta:  # autocast does not support the meta device
        # Without gradients a shape is enough, which torch takes milliseconds to find.
        has_graph = torch.is_grad_enabled()
        y = torch.group_norm(x, num_groups, weight, bias, eps) if has_graph else torch.empty_like(x)
    else:
        with torch.autocast(x.device.type, enabled=False):
            y = torch.group_norm(x, num_groups, weight, bias, eps)
    # In place before the view: writing to a view would make backward copy its gradient.
    y = y.to(dtype)
    if residual is not None:
        y += residual.reshape(x.shape)
    return (y.relu_() if relu else y).view(shape)


def _memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that format-preserving operators give to a result of `x`."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    # For a single channel or position the two formats are the same.
    if channels_last is None or x.is_contiguous() or 1 in (x.shape[1], x[0, 0].numel()):
        return torch.contiguous_format
    if torch._C._are_functorch_transforms_active():
        return torch.contiguous_format  # unknown under vmap
    if x.is_contiguous(memory_format=channels_last):
        return channels_last
    # empty_like ignores gaps in memory: a cropped channels_last tensor counts as channels_last.
    if torch.empty_like(x, device="meta").is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format
