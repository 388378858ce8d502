"""3-D convolution that is correct in low precision on a CPU too, and fast on clips on a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Tensor cores process channels in multiples of 8, and would mostly multiply padding.
_FEW_CHANNELS = 4


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
    """`F.conv3d`, computed differently where that is wrong or slow.

    On a GPU, strided convolutions of few channels, such as the first one of a network, are computed
    by `convolve_phases`: a third of the training time of I3D ResNet-50 on an H200 otherwise.

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
        (N, C_out, T', H', W') in the memory format of x and weight.
    """
    if x.is_cuda and x.shape[1] <= _FEW_CHANNELS and max(stride) > 1:
        if torch.is_autocast_enabled("cuda"):  # as F.conv3d would, but before the copies
            x = x.to(torch.get_autocast_dtype("cuda"))
        return convolve_phases(x, weight, stride, padding, bias)
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


def convolve_phases(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    bias: Tensor | None = None,
) -> Tensor:
    """`F.conv3d` with a stride, computed with stride 1 on the phases of x as channels.

    With a stride of 2, even and odd positions become channels of their own (space to depth): the
    kernel has half the taps per axis, rounded up, and 8 times the channels in 3-D. The result is
    the same sum of products, in another order, plus products with zeros.

    Args:
        x: (N, C_in, T, H, W), not smaller than the kernel when padded.
        weight: (C_out, C_in, Kt, Kh, Kw).
        stride: (T, H, W).
        padding: (T, H, W), with zeros.
        bias: (C_out,), if any.

    Returns:
        (N, C_out, T', H', W') in the memory format of x and weight.
    """
    contiguous = x.is_contiguous() and weight.is_contiguous()
    pad_x: list[int] = []  # F.pad takes the last axis first
    pad_weight: list[int] = []
    for axis in (2, 1, 0):
        length, kernel = x.shape[2 + axis], weight.shape[2 + axis]
        s, p = stride[axis], padding[axis]
        # Tap k reads position s * i + k - p of the input for position i of the result. Its phase is
        # (k - p) mod s, and its block i + (k - p) // s.
        first_block = -p // s
        num_taps = (kernel - 1 - p) // s - first_block + 1
        num_blocks = (length + 2 * p - kernel) // s + num_taps
        before = -s * first_block
        pad_x += [before, s * num_blocks - length - before]
        pad_weight += [before - p, s * num_taps - kernel - (before - p)]
    x = _phases_as_channels(F.pad(x, pad_x), stride)
    weight = _phases_as_channels(F.pad(weight, pad_weight), stride)
    y = F.conv3d(x, weight, bias)  # of inputs in channels_last_3d
    return y.contiguous() if contiguous else y


def _phases_as_channels(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """(N, C, T * st, H * sh, W * sw) to (N, st * sh * sw * C, T, H, W) in channels_last_3d."""
    num, channels, *size = x.shape
    blocks = [length // s for length, s in zip(size, stride, strict=True)]
    split = [n for pair in zip(blocks, stride, strict=True) for n in pair]
    x = x.reshape(num, channels, *split).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return x.flatten(4).movedim(4, 1)
