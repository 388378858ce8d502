"""The bottleneck block of all ResNets in this package, and stages of such blocks.

Blocks are those of He et al., arXiv:1512.03385, with a temporal kernel in the first convolution
([NL] `lib/models/resnet_helper.py`). Image networks use them without the time dimension.
"""

from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i3d_gn.models.conv3d import Conv3d, convolve3d
from i3d_gn.norm import GroupNorm, Recomputation, saved_as, uses_fused_kernels

StrideIn = Literal["3x3", "1x1"]
NormFactory = Callable[[int], nn.Module]
Kernel = tuple[int, int, int]
# in_channels, out_channels, kernel (T, H, W), stride (T, H, W)
ConvFactory = Callable[[int, int, Kernel, Kernel], nn.Conv3d | nn.Conv2d]

NORM_NAMES = ("norm1", "norm2", "norm3", "shortcut_norm")


def conv3d(in_channels: int, out_channels: int, kernel: Kernel, stride: Kernel) -> nn.Conv3d:
    """A convolution without bias, padded to preserve the size at stride 1."""
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return Conv3d(in_channels, out_channels, kernel, stride, padding, bias=False)


class Bottleneck(nn.Module):
    """Residual block of Kt x 1 x 1, 1 x 3 x 3 and 1 x 1 x 1 convolutions.

    Args:
        in_channels: channels of the input.
        width: channels of the inner convolutions.
        out_channels: channels of the result.
        temporal_kernel: Kt, odd.
        spatial_stride: of the block.
        stride_in: the convolution with the stride, `3x3` or the first `1x1`.
        norm: makes a normalization layer for a number of channels.
        recompute: see `I3D`.
        conv: makes a convolution, without the time dimension for image networks.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        *,
        temporal_kernel: int,
        spatial_stride: int,
        stride_in: StrideIn,
        norm: NormFactory,
        recompute: bool,
        conv: ConvFactory = conv3d,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        strides = (spatial_stride, 1) if stride_in == "1x1" else (1, spatial_stride)
        self.conv1 = conv(in_channels, width, (temporal_kernel, 1, 1), (1, strides[0], strides[0]))
        self.norm1 = norm(width)
        self.conv2 = conv(width, width, (1, 3, 3), (1, strides[1], strides[1]))
        self.norm2 = norm(width)
        self.conv3 = conv(width, out_channels, (1, 1, 1), (1, 1, 1))
        self.norm3 = norm(out_channels)
        if spatial_stride == 1 and in_channels == out_channels:
            self.shortcut_conv = self.shortcut_norm = None
        else:
            self.shortcut_conv = conv(
                in_channels, out_channels, (1, 1, 1), (1, spatial_stride, spatial_stride)
            )
            self.shortcut_norm = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, T, H, W) to (N, C_out, T, H / stride, W / stride)."""
        y = self.conv1(x)
        if self.recompute and can_recompute(self.norm1, y):
            return self._forward_with_recompute(x, y)
        y = norm_relu(self.norm1, y)
        y = norm_relu(self.norm2, self.conv2(y))
        y = self.conv3(y)
        if self.shortcut_conv is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut_conv(x))
        return norm_relu(self.norm3, y, residual=x)

    def _forward_with_recompute(self, x: Tensor, y: Tensor) -> Tensor:
        """`forward` from the output y of conv1 on: the same result, less saved for backward.

        Saves the outputs of conv1, conv2 and the block, as many bytes as a block with frozen batch
        norm. Backward recomputes norm1, norm2 and the 1 x 1 x 1 convolutions.
        """
        assert isinstance(self.norm1, GroupNorm)
        assert isinstance(self.norm2, GroupNorm)
        y, recompute_relu1 = self.norm1.relu_with_recompute(y)
        with saved_as(y, recompute_relu1):
            y = self.conv2(y)
        y, recompute_relu2 = self.norm2.relu_with_recompute(y)
        relu2 = Recomputation(recompute_relu2, num_uses=2)  # backward of conv3, recomputing conv3
        with saved_as(y, relu2):
            y = self.conv3(y)
        recompute_conv3 = _convolution_recompute(self.conv3, relu2)
        if self.shortcut_conv is not None and self.shortcut_norm is not None:
            shortcut = self.shortcut_conv(x)
            with saved_as(shortcut, _convolution_recompute(self.shortcut_conv, x.detach)):
                x = self.shortcut_norm(shortcut)
        with saved_as(y, recompute_conv3):
            return norm_relu(self.norm3, y, residual=x)


def make_stage(
    depth: int,
    in_channels: int,
    width: int,
    *,
    temporal_kernels: tuple[int, ...],
    spatial_stride: int,
    stride_in: StrideIn,
    norm: NormFactory,
    recompute: bool = True,
    conv: ConvFactory = conv3d,
) -> nn.Sequential:
    """`depth` blocks, the first with the stride; `temporal_kernels` repeat over the blocks."""
    out_channels = 4 * width
    return nn.Sequential(
        *(
            Bottleneck(
                in_channels if i == 0 else out_channels,
                width,
                out_channels,
                temporal_kernel=temporal_kernel,
                spatial_stride=spatial_stride if i == 0 else 1,
                stride_in=stride_in,
                norm=norm,
                conv=conv,
                recompute=recompute,
            )
            for i, temporal_kernel in enumerate(islice(cycle(temporal_kernels), depth))
        )
    )


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Normalize (N, C, *), add the residual and apply ReLU, in one operator if the layer can."""
    if isinstance(norm, GroupNorm):
        return norm(x, relu=True, residual=residual)
    y = norm(x)
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True)


def can_recompute(norm: nn.Module, x: Tensor) -> bool:
    """Whether backward can recompute `norm` and ReLU of x (N, C, *) instead of saving them."""
    return (
        isinstance(norm, GroupNorm)
        and norm.over != "causal"
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.numel() > 0
        and uses_fused_kernels(x)
    )


def _convolution_recompute(
    conv: nn.Conv2d | nn.Conv3d, input: Callable[[], Tensor]
) -> Callable[[], Tensor]:
    """A function that recomputes `conv` in backward, with the current weight."""
    weight = conv.weight.detach()
    return partial(_recompute_convolution, conv, weight, weight._version, input)


def _recompute_convolution(
    conv: nn.Conv2d | nn.Conv3d, weight: Tensor, version: int, input: Callable[[], Tensor]
) -> Tensor:
    # Autograd makes this check for tensors that it saves.
    if weight._version != version:
        raise RuntimeError(
            "the weight of a convolution was modified between forward and backward, which "
            "recomputes the convolution; use I3D(..., recompute=False) to allow this"
        )
    x = input()
    if isinstance(conv, Conv3d):
        assert isinstance(conv.padding, tuple)
        return convolve3d(x, weight.to(x.dtype), conv.stride, conv.padding)
    return F.conv2d(x, weight.to(x.dtype), None, conv.stride, conv.padding)
