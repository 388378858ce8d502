import copy
import pickle

import pytest
import torch
from torch import nn

from i3d_gn.norm import FrozenBatchNorm


@pytest.fixture
def trained_batch_norm():
    generator = torch.Generator().manual_seed(0)
    layer = nn.BatchNorm3d(8)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, generator=generator))
        layer.bias.copy_(torch.randn(8, generator=generator))
    layer.running_mean.copy_(torch.randn(8, generator=generator))
    layer.running_var.copy_(torch.rand(8, generator=generator) + 0.1)
    return layer.eval()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_equals_batch_norm_in_eval_mode(trained_batch_norm, layout):
    frozen = FrozenBatchNorm(8)
    frozen.load_state_dict(trained_batch_norm.state_dict())
    x = torch.randn(2, 8, 3, 5, 7).to(memory_format=layout).requires_grad_()
    for mode in (True, False):
        y = frozen.train(mode)(x)
        expected = trained_batch_norm(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert y.is_contiguous(memory_format=layout)
        grad = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad)
        )


def test_has_no_parameters_and_updates_no_buffers(trained_batch_norm):
    frozen = FrozenBatchNorm(8)
    frozen.load_state_dict(trained_batch_norm.state_dict())
    before = copy.deepcopy(frozen.state_dict())
    frozen.train()(torch.randn(2, 8, 3, 5, 7))
    assert list(frozen.parameters()) == []
    assert set(before) == {"weight", "bias", "running_mean", "running_var"}
    assert all(torch.equal(before[key], value) for key, value in frozen.state_dict().items())


def test_saves_no_activation_for_backward():
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    x = torch.randn(2, 8, 3, 5, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        FrozenBatchNorm(8)(x)
    assert sum(sizes) <= 8


def test_low_precision_is_rounded_once(trained_batch_norm):
    frozen = FrozenBatchNorm(8)
    frozen.load_state_dict(trained_batch_norm.state_dict())
    x = torch.randn(2, 8, 3, 5, 7).bfloat16()
    y = frozen(x)
    assert y.dtype == torch.bfloat16
    exact = trained_batch_norm.double()(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)


def test_any_number_of_dimensions_deepcopy_and_pickle():
    frozen = FrozenBatchNorm(8)
    frozen.weight.uniform_()
    for shape in ((2, 8), (2, 8, 3), (2, 8, 3, 5)):
        x = torch.randn(shape)
        for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            assert torch.equal(other(x), frozen(x))


def test_wrong_number_of_channels():
    # One channel would broadcast to eight.
    with pytest.raises(ValueError, match=r"\(2, 1, 3, 3\).*C = 8"):
        FrozenBatchNorm(8)(torch.randn(2, 1, 3, 3))


def test_reset_parameters():
    frozen = FrozenBatchNorm(8)
    for buffer in frozen.buffers():
        buffer.uniform_()
    frozen.reset_parameters()
    fresh = FrozenBatchNorm(8).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in frozen.state_dict().items())
