import copy

import pytest
import torch
import torch.nn.functional as F

from i3d_gn.models.conv3d import Conv3d, convolve3d, convolve_phases

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}

# C_in, C_out, kernel, stride, (T, H, W). For the last four, 3-D convolutions of torch 2.14 or 2.15
# are wrong on some CPUs, in the weight gradient or, for the last one, in the result.
CASES = [
    (3, 16, (5, 7, 7), (2, 2, 2), (9, 20, 18)),
    (16, 32, (1, 1, 1), (1, 1, 1), (3, 5, 4)),
    (16, 32, (3, 1, 1), (1, 1, 1), (4, 6, 5)),
    (16, 32, (3, 1, 1), (1, 2, 2), (4, 7, 6)),
    (16, 32, (3, 1, 1), (2, 1, 1), (5, 3, 3)),
    (16, 16, (1, 3, 3), (1, 2, 2), (2, 9, 8)),
    (16, 16, (1, 3, 3), (2, 1, 1), (5, 4, 4)),
    (256, 512, (1, 1, 1), (1, 2, 2), (4, 55, 55)),
    (256, 128, (3, 1, 1), (1, 2, 2), (2, 28, 28)),
    (16, 16, (5, 3, 3), (1, 1, 1), (2, 9, 9)),
    (32, 32, (1, 3, 3), (1, 2, 2), (2, 2, 2)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bf16_equals_the_3d_convolution_in_fp32(case, layout):
    in_channels, out_channels, kernel, stride, size = case
    torch.manual_seed(0)
    padding = tuple(k // 2 for k in kernel)
    x = torch.randn(1, in_channels, *size).bfloat16().contiguous(memory_format=LAYOUTS[layout])
    weight = (0.1 * torch.randn(out_channels, in_channels, *kernel)).bfloat16()
    results = []
    for convolve, dtype in ((convolve3d, torch.bfloat16), (F.conv3d, torch.float32)):
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        if convolve is convolve3d:
            y = convolve(*leaves, stride, padding)
            assert y.is_contiguous(memory_format=LAYOUTS[layout])
        else:
            y = convolve(*leaves, None, stride, padding)
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        results.append([y, *torch.autograd.grad(y, leaves, grad_y.to(dtype))])
    for low, exact in zip(*results, strict=True):
        assert low.dtype == torch.bfloat16
        assert low.shape == exact.shape
        # Rounding to bfloat16 alone changes it by 0.0017 of its norm. On CPUs without bfloat16
        # instructions, torch sums the weight gradients of images in bfloat16: 0.005.
        assert (low.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((3, 1, 1), (1, 1, 1), (1, 1, 1)),
        ((3, 1, 1), (1, 2, 1), (1, 0, 0)),
        ((3, 3, 3), (1, 1, 1), (1, 0, 0)),
        ((1, 3, 3), (1, 1, 1), (2, 1, 0)),
        ((3, 3, 1), (2, 1, 2), (0, 1, 0)),
    ],
)
def test_uneven_stride_and_padding(kernel, stride, padding):
    x = torch.randn(2, 4, 6, 7, 8).bfloat16()
    weight = torch.randn(5, 4, *kernel).bfloat16()
    expected = F.conv3d(x.float(), weight.float(), None, stride, padding)
    torch.testing.assert_close(
        convolve3d(x, weight, stride, padding).float(), expected, rtol=0.01, atol=0.05
    )


def test_autocast_equals_bf16_and_fp32_equals_torch():
    torch.manual_seed(0)
    conv = Conv3d(8, 16, (3, 1, 1), (1, 1, 1), (1, 0, 0), bias=False)
    x = torch.randn(2, 8, 3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    assert torch.equal(y, copy.deepcopy(conv).bfloat16()(x.bfloat16()))
    assert torch.equal(conv(x), F.conv3d(x, conv.weight, None, 1, (1, 0, 0)))
    assert conv(x[:0]).shape == conv.bfloat16()(x[:0].bfloat16()).shape == (0, 16, 3, 4, 5)


@pytest.mark.parametrize("kernel", [(5, 7, 7), (1, 7, 7), (2, 3, 1)])
@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (3, 2, 1)])
@pytest.mark.parametrize("padding", [(2, 3, 3), (0, 0, 0), (1, 1, 0)])
@pytest.mark.parametrize("size", [(9, 20, 18), (8, 15, 17)])
def test_convolution_of_phases_is_the_strided_convolution(kernel, stride, padding, size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64)
    expected = F.conv3d(x, weight, bias, stride, padding)
    actual = convolve_phases(x, weight, stride, padding, bias)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert actual.is_contiguous()
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (x, weight), grad),
        torch.autograd.grad(expected, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stem_on_a_gpu_equals_the_convolution_in_float64(layout):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 16, 60, 58).contiguous(memory_format=LAYOUTS[layout])
    weight = 0.1 * torch.randn(32, 3, 5, 7, 7)
    expected = F.conv3d(x.double(), weight.double(), None, (2, 2, 2), (2, 3, 3)).float()
    with torch.autocast("cuda", torch.bfloat16):
        y = convolve3d(x.cuda(), weight.cuda(), (2, 2, 2), (2, 3, 3))
    assert y.dtype == torch.bfloat16
    assert (y.float().cpu() - expected).norm() < 0.01 * expected.norm()
