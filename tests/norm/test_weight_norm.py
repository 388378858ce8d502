import pytest
import torch
import torch.nn.functional as F
from torch import nn

from i3d_gn.models import i3d_tiny
from i3d_gn.models.resnet2d import ResNet2d
from i3d_gn.norm import normalize_kernels


def small(norm="gn"):
    torch.manual_seed(0)
    return ResNet2d((1, 1, 1, 1), norm=norm, num_classes=3, width=32)


def test_weight_norm_preserves_the_initial_network():
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    plain, normed = small("none"), small("none")
    normalize_kernels(normed, "weight_norm")
    torch.testing.assert_close(normed(x), plain(x))
    kernel = normed.res3[0].conv2
    kernel_norms = kernel.parametrizations.weight.original0
    with torch.no_grad():
        kernel_norms.fill_(3.0)
    torch.testing.assert_close(
        kernel.weight.flatten(1).norm(dim=1), torch.full((kernel.out_channels,), 3.0)
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_weight_standardization(dims):
    model = small() if dims == 2 else i3d_tiny("gn", 3)
    raw = model.res4[0].conv2.weight.detach().clone()
    normalize_kernels(model, "weight_standardization")
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    assert len(convolutions) == 17
    for conv in convolutions:
        flat = conv.weight.flatten(1).double()
        torch.testing.assert_close(flat.mean(1), torch.zeros(len(flat)).double(), atol=1e-5, rtol=0)
    double = raw.flatten(1).double()
    expected = F.layer_norm(double, double.shape[1:], eps=1e-5).view(raw.shape).float()
    torch.testing.assert_close(model.res4[0].conv2.weight, expected, rtol=1e-4, atol=1e-5)
    x = torch.randn((1, 3, 40, 40) if dims == 2 else (1, 3, 8, 40, 40))
    model(x).sum().backward()
    assert model.conv1.parametrizations.weight.original.grad.abs().sum() > 0


def test_weight_standardization_of_low_precision_is_rounded_once():
    conv = nn.Conv3d(4, 8, 3, bias=False).bfloat16()
    # Far from zero, where a mean computed in bfloat16 would be inaccurate.
    raw = conv.weight.detach() + 1
    conv.weight.data.copy_(raw)
    normalize_kernels(conv, "weight_standardization")
    exact = F.layer_norm(raw.double(), raw.shape[1:], eps=1e-5)
    assert conv.weight.dtype == torch.bfloat16
    torch.testing.assert_close(conv.weight.double(), exact, rtol=2**-8, atol=1e-5)


def test_unknown_kind():
    with pytest.raises(ValueError, match="'spectral' is unknown"):
        normalize_kernels(small(), "spectral")
