"""An `Operator` computes the same when called directly and as a registered operator."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from i3d_gn.norm.functional import group_norm

NAME = "i3d_gn.group_norm_channels_last_cpu"


class Recorder(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last_3d)
    weight, bias = torch.rand(2, 8, generator=generator)
    return tuple(t.requires_grad_() for t in (x, weight.clone(), bias.clone()))


def norm(x, weight, bias):
    return group_norm(x, 4, weight, bias)


def test_dispatch_mode_sees_one_operator_with_the_same_result(inputs):
    direct = norm(*inputs)
    gradients = torch.autograd.grad(direct.square().sum(), inputs)
    with Recorder() as recorder:
        recorded = norm(*inputs)
        recorded_gradients = torch.autograd.grad(recorded.square().sum(), inputs)
    assert f"{NAME}.default" in recorder.names
    assert f"{NAME}_backward.default" in recorder.names
    assert torch.equal(recorded, direct)
    for a, b in zip(recorded_gradients, gradients, strict=True):
        assert torch.equal(a, b)


def test_direct_call_skips_the_registered_operator(inputs, monkeypatch):
    """Otherwise its overhead would be paid on every call."""

    def fail(*_arguments, **_keywords):
        raise AssertionError("the registered operator was called")

    monkeypatch.setattr(torch._library.custom_ops.CustomOpDef, "__call__", fail)
    torch.autograd.grad(norm(*inputs).square().sum(), inputs)


def test_traced_graph_depends_on_its_inputs(inputs):
    inputs = tuple(t.detach() for t in inputs)
    graph = make_fx(norm)(*inputs)
    assert NAME in graph.code
    others = (inputs[0] * 2 + 1, inputs[1] + 1, inputs[2] - 1)
    assert torch.equal(graph(*others), norm(*others))


def test_fake_tensors_meta_tensors_and_subclasses(inputs):
    with FakeTensorMode() as mode:
        y = norm(*(mode.from_tensor(t) for t in inputs))
        assert y.shape == inputs[0].shape
        assert y.stride() == inputs[0].stride()
    assert norm(*(t.to("meta") for t in inputs)).is_meta
    x, *parameters = inputs
    y = norm(x.detach().as_subclass(Subclass), *parameters)
    assert torch.equal(y.as_subclass(torch.Tensor), norm(*inputs))
