"""3-D convolution that is right in low precision on a CPU too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d` of one group, without bias and dilation, by `convolve3d`."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, T, H, W) to (N, C_out, T', H', W')."""
        assert isinstance(self.padding, tuple)
        return convolve3d(input, self.weight, self.stride, self.padding)


def convolve3d(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """`F.conv3d`, computed as a 2-D convolution where that alone is right.

    On a CPU, oneDNN's 3-D convolutions in bfloat16 go wrong in shapes that occur in I3D: with AMX
    the weight gradient is NaN or off by a tenth (torch 2.14; 256 to 512 channels, 1 x 1 x 1,
    stride 2, on 4 x 55 x 55), without it for fewer frames than the kernel is long (torch 2.15); the
    result of strided ones is wrong at width 1 (pytorch#188426). Its 2-D ones are right and as fast.

    Args:
        x: (N, C_in, T, H, W).
        weight: (C_out, C_in, Kt, Kh, Kw).
        stride: along (T, H, W).
        padding: along (T, H, W), with zeros.

    Returns:
        (N, C_out, T', H', W') in the memory format of x.
    """
    in_low_precision = x.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu")
    if x.device.type != "cpu" or not in_low_precision:
        return F.conv3d(x, weight, None, stride, padding)
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last_3d
    length, *size = weight.shape[2:]
    if length > 1 and size == [1, 1] and padding[1:] == (0, 0):
        # Along time alone: a clip is one image, T high and H * W wide.
        x = x[:, :, :, :: stride[1], :: stride[2]]
        y = F.conv2d(x.flatten(3), weight.flatten(3), None, (stride[0], 1), (padding[0], 0))
        return y.unflatten(3, x.shape[3:]).contiguous(memory_format=layout)
    # Every frame of the result is an image; the frames that it sees are its channels.
    if padding[0]:
        x = F.pad(x, (0, 0, 0, 0, padding[0], padding[0]))
    last = x.shape[2] - length
    seen = [x[:, :, tap : last + tap + 1 : stride[0]] for tap in range(length)]
    x = seen[0] if length == 1 else torch.cat(seen, dim=1)
    images, weight = x.transpose(1, 2).flatten(0, 1), weight.transpose(1, 2).flatten(1, 2)
    y = F.conv2d(images, weight, None, stride[1:], padding[1:])
    y = y.unflatten(0, (len(x), x.shape[2])).transpose(1, 2)
    return y.contiguous(memory_format=layout)
