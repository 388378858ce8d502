"""3-D convolution that is correct in low precision on a CPU too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d` with one group and no dilation, computed by `convolve3d`."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, T, H, W) to (N, C_out, T', H', W')."""
        assert isinstance(self.padding, tuple)
        return convolve3d(input, self.weight, self.stride, self.padding, self.bias)


def convolve3d(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    bias: Tensor | None = None,
) -> Tensor:
    """`F.conv3d`, computed as a 2-D convolution where only that is correct.

    On a CPU, oneDNN's 3-D convolutions in bfloat16 are wrong for shapes that occur in I3D. With AMX
    the weight gradient is NaN or off by 10% (torch 2.14; 256 to 512 channels, 1 x 1 x 1, stride 2,
    on 4 x 55 x 55); without AMX it is wrong for fewer frames than the temporal kernel (torch 2.15);
    the result of strided ones is wrong at width 1 (pytorch#188426). Its 2-D convolutions are
    correct and as fast.

    Args:
        x: (N, C_in, T, H, W).
        weight: (C_out, C_in, Kt, Kh, Kw).
        stride: (T, H, W).
        padding: (T, H, W), with zeros.
        bias: (C_out,), if any.

    Returns:
        (N, C_out, T', H', W') in the memory format of x.
    """
    in_low_precision = x.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu")
    if x.device.type != "cpu" or not in_low_precision:
        return F.conv3d(x, weight, bias, stride, padding)
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last_3d
    length, *size = weight.shape[2:]
    if length > 1 and size == [1, 1] and padding[1:] == (0, 0):
        # Along time only: a clip is one image of height T and width H * W.
        x = x[:, :, :, :: stride[1], :: stride[2]]
        y = F.conv2d(x.flatten(3), weight.flatten(3), bias, (stride[0], 1), (padding[0], 0))
        return y.unflatten(3, x.shape[3:]).contiguous(memory_format=layout)
    # Every frame of the result is an image, and the frames in its receptive field are channels.
    if padding[0]:
        x = F.pad(x, (0, 0, 0, 0, padding[0], padding[0]))
    last = x.shape[2] - length
    taps = [x[:, :, tap : last + tap + 1 : stride[0]] for tap in range(length)]
    x = taps[0] if length == 1 else torch.cat(taps, dim=1)
    images, weight = x.transpose(1, 2).flatten(0, 1), weight.transpose(1, 2).flatten(1, 2)
    y = F.conv2d(images, weight, bias, stride[1:], padding[1:])
    y = y.unflatten(0, (len(x), x.shape[2])).transpose(1, 2)
    return y.contiguous(memory_format=layout)
