"""The fused kernels, on a GPU if there is one, otherwise in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from i3d_gn.models import i3d_tiny
from i3d_gn.models.blocks import make_stage
from i3d_gn.norm import GroupNorm, Recomputation, saved_as, uses_fused_kernels
from i3d_gn.norm.functional import group_norm
from i3d_gn.norm.fused import group_norm_fused, group_norm_fused_recompute

pytest.importorskip("triton")

pytestmark = [
    # The interpreter computes with NumPy, which warns of infinities even in masked elements.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    # That of Triton 3.6 (torch 2.11) fails with NumPy 2.4, and warns with earlier versions.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar"),
    # Triton 3.9 announces another default for fusing multiply and add; both are correct here.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    monkeypatch.setenv("I3D_GN_NORM_KERNEL", "triton")


def formula(x, num_groups, weight, bias, eps=1e-5, *, relu=False, residual=None):
    """[GN] Eqn. 7 in float64, then residual sum and ReLU."""
    groups = x.double().reshape(x.shape[0], num_groups, -1)
    centered = groups - groups.mean(2, keepdim=True)
    variance = centered.square().mean(2, keepdim=True)
    by_channel = (1, -1, *(1,) * (x.dim() - 2))
    y = (centered / (variance + eps).sqrt()).reshape(x.shape)
    y = y * weight.double().view(by_channel) + bias.double().view(by_channel)
    if residual is not None:
        y = y + residual.double()
    return y.relu() if relu else y


def tensors(shape, layout, dtype, *, seed=0, mean=0.5):
    """x, residual, weight, bias and a gradient with respect to the result."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    x, residual, grad = draw(*shape) * 2 + mean, draw(*shape), draw(*shape)
    memory_format = CHANNELS_LAST[len(shape)] if layout == "channels_last" else None
    x, residual, grad = (
        t.to(DEVICE, dtype).contiguous(memory_format=memory_format or torch.contiguous_format)
        for t in (x, residual, grad)
    )
    weight, bias = (draw(shape[1]).abs() + 0.5).to(DEVICE), draw(shape[1]).to(DEVICE)
    for t in (x, residual, weight, bias):
        t.requires_grad_()
    return x, residual, weight, bias, grad


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = [
    ((3, 12), 4, "contiguous", "residual", F32),
    ((2, 12, 7), 1, "contiguous", "relu", F32),
    ((2, 12, 5, 7), 12, "contiguous", "relu", F32),
    ((2, 12, 5, 7), 12, "channels_last", "residual", F32),
    ((2, 6, 1, 1, 1), 6, "contiguous", "relu", F32),  # groups of one element
    ((1, 6, 5, 37, 41), 2, "contiguous", "relu", F32),  # chunks of several tiles, the last partial
    ((1, 6, 5, 37, 41), 2, "channels_last", "residual", F32),
    ((1, 160, 1, 3, 3), 5, "contiguous", "residual", F32),
    ((1, 160, 1, 3, 3), 5, "channels_last", "relu", F32),  # more channels than a tile
    ((2, 8, 3, 5, 7), 1, "contiguous", "plain", BF16),
    ((2, 8, 3, 5, 7), 4, "channels_last", "residual", F16),
    *(
        ((2, 12, 3, 5, 7), 4, layout, fusion, dtype)  # groups of three channels
        for layout, dtype in (("contiguous", F32), ("channels_last", F32), ("channels_last", BF16))
        for fusion in ("plain", "relu", "residual")
    ),
]


@pytest.mark.parametrize(("shape", "num_groups", "layout", "fusion", "dtype"), CASES)
def test_formula_forward_and_backward(shape, num_groups, layout, fusion, dtype):
    x, residual, weight, bias, grad = tensors(shape, layout, dtype)
    options = {"relu": fusion != "plain", "residual": residual if fusion == "residual" else None}
    inputs = [x, weight, bias, *([residual] if fusion == "residual" else [])]

    y = group_norm(x, num_groups, weight, bias, **options)
    expected = formula(x, num_groups, weight, bias, **options)

    assert y.dtype == dtype
    assert y.stride() == x.stride()
    ulp = torch.finfo(dtype).eps
    one_element = x[0].numel() == num_groups
    atol = 2e-4 if one_element else 5e-6
    torch.testing.assert_close(y.double(), expected, rtol=ulp, atol=atol)
    # Exclude elements so close to 0 that rounding decides the ReLU's gradient.
    grad = torch.where((expected.abs() < 1e-5) & (expected != 0), 0, grad)
    actual = torch.autograd.grad(y, inputs, grad)
    wanted = torch.autograd.grad(expected, inputs, grad.double())
    for a, b, of in zip(actual, wanted, inputs, strict=True):
        assert a.dtype == of.dtype
        assert a.stride() == of.stride()
        torch.testing.assert_close(
            a.double(), b.double(), rtol=max(ulp, 1e-5), atol=3e-4 if one_element else 2e-5
        )


def test_strided_parameters_and_parameters_of_wrong_shape():
    x, _, weight, bias, grad = tensors((2, 8, 3, 5, 7), "channels_last", torch.float32)
    both = torch.stack((weight, bias), dim=1).detach()
    for strided in (both.unbind(1), both[:1].expand(8, 2).unbind(1)):
        assert not strided[0].is_contiguous()
        y = group_norm(x, 4, *strided)
        torch.testing.assert_close(y.double(), formula(x, 4, *strided), rtol=1e-6, atol=5e-6)
        (actual,) = torch.autograd.grad(y, x, grad)
        (wanted,) = torch.autograd.grad(formula(x, 4, *strided), x, grad.double())
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=2e-5)
    with pytest.raises(ValueError, match=r"weight has shape \(5,\).*\(8,\)"):
        group_norm(x, 4, weight[:5], bias)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mean_over_std", [10, 1000])
def test_large_mean_keeps_the_variance(layout, mean_over_std):
    sign = torch.tensor([1.0, -1.0], device=DEVICE).repeat_interleave(2).view(1, 4, 1, 1, 1)
    x, _, weight, bias, grad = tensors((1, 4, 3, 30, 31), layout, torch.float32, mean=0)
    x = (x.detach() / 2 + mean_over_std * sign).requires_grad_()
    y = group_norm(x, 2, weight, bias)
    expected = formula(x, 2, weight, bias)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=3e-6 + 2e-7 * mean_over_std)
    (actual,) = torch.autograd.grad(y, x, grad)
    (wanted,) = torch.autograd.grad(expected, x, grad.double())
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5 + 2e-7 * mean_over_std)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [0.0, 3.7, 3e38])
def test_constant_input_gives_the_bias_exactly(layout, value):
    x, _, weight, bias, _ = tensors((2, 8, 3, 25, 27), layout, torch.float32)
    x = torch.full_like(x, value)
    y = group_norm(x, 4, weight, bias)
    assert torch.equal(y, bias.view(1, -1, 1, 1, 1).expand_as(y))


def test_outlier_does_not_affect_other_elements():
    # The outlier is the first element: statistics shifted by it would be off by 5e-4. NumPy's
    # sequential sum, in the interpreter, is off by 1e-5.
    x, _, weight, bias, _ = tensors((1, 4, 2, 30, 31), "channels_last", torch.float32)
    x = x.detach()
    x[0, :, 0, 0, 0] = 1e6
    torch.testing.assert_close(
        group_norm(x, 2, weight, bias).double(), formula(x, 2, weight, bias), rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("relu", [False, True])
def test_non_finite_values_affect_only_their_group_and_sample(layout, poison, relu):
    x, _, weight, bias, _ = tensors((3, 8, 2, 4, 4), layout, torch.float32)
    x = x.detach()
    clean = group_norm(x, 4, weight, bias, relu=relu)
    x[1, 2, 0, 1, 1] = poison
    y = group_norm(x, 4, weight, bias, relu=relu)
    assert torch.isnan(y[1, 2, 0, 1, 1])
    if poison != poison:
        assert torch.isnan(y[1, 2:4]).all()
    with torch.no_grad():
        y[1, 2:4] = clean[1, 2:4]
    assert torch.equal(y, clean)


def test_equals_the_native_operator_for_any_strides(monkeypatch):
    wide = torch.randn(2, 8, 3, 6, 10, device=DEVICE)
    for x in (wide[..., 1:-2], wide.transpose(1, 4)[:, :8], wide[:1].expand(3, -1, -1, -1, -1)):
        y = group_norm(x, 4, relu=True, residual=x)
        with monkeypatch.context() as patch:
            patch.setenv("I3D_GN_NORM_KERNEL", "native")
            expected = group_norm(x, 4, relu=True, residual=x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert y.stride() == expected.stride()


def test_index_arithmetic_is_64_bit():
    """Rows are 2^29 elements apart, so that the last one is beyond 2^31; few pages are touched."""
    from i3d_gn.norm import triton_forward

    row_stride = 2**29 + 8
    memory = torch.empty(5 * row_stride, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided((5, 2), (row_stride, 1))
    x.copy_(torch.arange(10.0).view(5, 2) ** 2)
    mean, m2 = torch.empty(2, 1, 1, 2, device=DEVICE)
    triton_forward.partial_statistics[(1,)](
        memory, mean, m2, 2, 5, 1, row_stride, 1, 1, BLOCK_S=8, BLOCK_C=2
    )
    torch.testing.assert_close(mean.view(2), x.float().mean(0))
    torch.testing.assert_close(m2.view(2), x.float().var(0, correction=0) * 5)


def test_gradient_sums_over_more_chunks_than_a_block():
    from i3d_gn.norm import triton_backward

    generator = torch.Generator().manual_seed(0)
    samples, chunks, channels, groups = 3, 100, 15, 5
    partial = torch.randn(2, samples, chunks, channels, generator=generator).to(DEVICE)
    weight = torch.rand(channels, generator=generator).to(DEVICE)
    averages = torch.empty(2, samples, groups, device=DEVICE)
    sums = torch.empty(2, channels, device=DEVICE)
    triton_backward.combine_gradient_sums[(samples * groups + 2,)](
        *partial, weight, *averages, *sums, samples, channels, 700, groups, 3, chunks,
        BLOCK=64, SUM_BLOCK_E=128, SUM_BLOCK_C=8,
    )  # fmt: skip
    torch.testing.assert_close(sums, partial.double().sum((1, 2)).float())
    by_group = (partial.double() * weight).sum(2).unflatten(-1, (groups, 3)).sum(-1) / (700 * 3)
    torch.testing.assert_close(averages, by_group.float(), rtol=1e-5, atol=1e-7)


# opcheck itself reads .grad of tensors that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_custom_operators_are_registered_correctly(layout):
    x, residual, weight, bias, grad = tensors((2, 4, 2, 3, 3), layout, torch.float32)
    ops = torch.ops.i3d_gn
    forward = ops.group_norm_fused.default
    torch.library.opcheck(forward, (x, residual, 2, weight, bias, 1e-5, True, False))
    torch.library.opcheck(forward, (x, None, 2, weight, bias, 1e-5, False, False))
    torch.library.opcheck(forward, (x, None, 2, weight, bias, 1e-5, False, True))
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    y, statistics = group_norm_fused(x, None, 2, weight, bias, 1e-5, True, False)
    recompute = (x, 2, weight, bias, statistics, True)
    torch.library.opcheck(ops.group_norm_fused_recompute.default, recompute)
    assert torch.equal(group_norm_fused_recompute(*recompute), y)
    for y_or_none in (y, None):
        arguments = (grad, x, y_or_none, 2, weight, bias, statistics, True, False)
        torch.library.opcheck(ops.group_norm_fused_backward.default, arguments)


def test_second_derivative_is_an_error():
    x, _, weight, bias, _ = tensors((2, 4, 2, 3, 3), "contiguous", torch.float32)
    (grad,) = torch.autograd.grad(group_norm(x, 2, weight, bias).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="I3D_GN_NORM_KERNEL=native"):
        torch.autograd.grad(grad.sum(), x)


def test_function_transforms_use_the_native_operator():
    x, tangent, weight, bias, _ = (t.detach() for t in tensors((2, 4, 3), "contiguous", F32))
    derivative = torch.func.jvp(lambda t: group_norm(t, 2, weight, bias), (x,), (tangent,))[1]
    wanted = torch.func.jvp(
        lambda t: formula(t, 2, weight, bias), (x.double(),), (tangent.double(),)
    )[1]
    torch.testing.assert_close(derivative.double(), wanted, rtol=1e-5, atol=1e-5)


def test_autocast_has_no_effect():
    layer = GroupNorm(4, 8).to(DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 8, 3, 5, 7, device=DEVICE).to(dtype)
        with torch.autocast(DEVICE, torch.bfloat16):
            y = layer(x, relu=True)
        assert y.dtype == dtype
        assert torch.equal(y, layer(x, relu=True))


def test_activation_checkpointing():
    layer = GroupNorm(4, 8).to(DEVICE)
    x = torch.randn(2, 8, 3, 5, 7, device=DEVICE, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    recomputed = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


class NormAndConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = GroupNorm(4, 8)
        self.conv = nn.Conv3d(8, 8, 1)

    def forward(self, x):
        return self.conv(self.norm(x, relu=True, residual=x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile_equals_eager(layout):
    torch.manual_seed(0)
    network = NormAndConvolution().to(DEVICE)
    x = tensors((2, 8, 3, 5, 7), layout, torch.float32)[0]
    plain = torch.autograd.grad(network(x).square().sum(), [x, *network.parameters()])
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert y.stride() == network(x).stride()
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), [x, *network.parameters()]), plain, strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_export_uses_the_native_operator(layout, kernel, monkeypatch):
    monkeypatch.setenv("I3D_GN_NORM_KERNEL", kernel)
    network = NormAndConvolution().to(DEVICE).eval()
    x = tensors((2, 8, 3, 5, 7), layout, torch.float32)[0].detach()
    program = torch.export.export(network, (x,))
    code = program.graph_module.print_readable(print_output=False)  # with its submodules
    assert "torch.ops.aten.group_norm" in code
    assert "torch.ops.i3d_gn" not in code
    torch.testing.assert_close(program.module()(x), network(x), rtol=1e-5, atol=1e-5)


def test_distributed_data_parallel(tmp_path):
    network = two_blocks(True)
    x = torch.randn(1, 12, 2, 5, 5, device=DEVICE)
    network(x).square().sum().backward()
    plain = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        nn.parallel.DistributedDataParallel(network)(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, grad in zip(network.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("shape", [(0, 8, 3, 5, 7), (2, 8, 0, 5, 7)])
def test_empty_input(shape):
    x = torch.empty(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    y = group_norm(x, 4, relu=True, residual=x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    y.sum().backward()
    assert x.grad.shape == shape


def test_residual_requires_relu_and_the_shape_of_x():
    x = torch.randn(2, 8, 3, device=DEVICE)
    with pytest.raises(ValueError, match="relu=True"):
        group_norm(x, 4, residual=x)
    with pytest.raises(ValueError, match=r"\(2, 8, 1\).*\(2, 8, 3\)"):
        group_norm(x, 4, relu=True, residual=x[..., :1])


def test_uses_fused_kernels(monkeypatch):
    x = torch.randn(2, 8, 3)
    assert uses_fused_kernels(x.to(DEVICE))
    with pytest.raises(ValueError, match=r"triton, but x is torch.float64 on cpu"):
        uses_fused_kernels(x.double())
    monkeypatch.setenv("I3D_GN_NORM_KERNEL", "native")
    assert not uses_fused_kernels(x.to(DEVICE))
    monkeypatch.setenv("I3D_GN_NORM_KERNEL", "auto")
    assert not uses_fused_kernels(x)
    monkeypatch.setenv("I3D_GN_NORM_KERNEL", "cuda")
    with pytest.raises(ValueError, match="'cuda' is unknown; choose auto, triton or native"):
        group_norm(x, 4)


def test_recomputation_caches_the_value_between_its_uses():
    calls = []

    def compute():
        calls.append(torch.is_grad_enabled())
        return torch.ones(2)

    recompute = Recomputation(compute, num_uses=2)
    first, second = recompute(), recompute()
    assert first is second
    assert calls == [False]
    assert recompute() is not first
    assert len(calls) == 2


def test_saved_as_replaces_only_this_tensor():
    x = torch.randn(3, requires_grad=True)
    y, calls = x * 2, []

    def recompute():
        calls.append(1)
        return x.detach() * 2

    with saved_as(y, recompute):
        z = y * x + y.square()
    (grad,) = torch.autograd.grad(z.sum(), x)
    assert len(calls) == 2
    torch.testing.assert_close(grad, 12 * x)


@pytest.mark.parametrize("modified", ["x", "weight", "bias"])
def test_recompute_from_a_modified_tensor_is_an_error(modified):
    layer = GroupNorm(2, 4).to(DEVICE).requires_grad_(False)
    x = torch.randn(1, 4, 2, 3, 3, device=DEVICE)
    y, recompute = layer.relu_with_recompute(x)
    assert torch.equal(recompute(), y)
    {"x": x, "weight": layer.weight, "bias": layer.bias}[modified].add_(1)
    with pytest.raises(RuntimeError, match="modified in place between forward and backward"):
        recompute()


def two_blocks(recompute):
    """The first block has a convolution in the shortcut, the second does not."""
    torch.manual_seed(0)
    stage = make_stage(
        2,
        12,
        4,
        temporal_kernels=(3, 1),
        spatial_stride=2,
        stride_in="3x3",
        norm=lambda channels: GroupNorm(2, channels),
        recompute=recompute,
    )
    return stage.to(DEVICE)


def gradients(network, x):
    y = network(x)
    inputs = [x, *network.parameters()] if x.requires_grad else list(network.parameters())
    return torch.autograd.grad(y, inputs, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y))


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_with_recompute_equal_those_without(autocast):
    # With fewer frames than the kernel's three, oneDNN's bfloat16 weight gradient is wrong.
    x = torch.randn(1, 12, 4, 7, 9, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        plain = gradients(two_blocks(False), x)
        recomputed = gradients(two_blocks(True), x)
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_recompute_of_an_empty_batch():
    stage = two_blocks(True)
    stage(torch.empty(0, 12, 2, 5, 5, device=DEVICE)).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in stage.parameters())


def test_network_with_recomputed_and_checkpointed_stages():
    clips = torch.randn(1, 3, 8, 33, 33, device=DEVICE)
    networks = [
        i3d_tiny(num_classes=3, dropout=0.0, recompute=False),
        i3d_tiny(num_classes=3, dropout=0.0, checkpoint_stages=("res3", "res5")),
    ]
    networks[1].load_state_dict(networks[0].state_dict())
    plain, recomputed = (gradients(network.to(DEVICE), clips) for network in networks)
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_recompute_with_a_modified_weight_is_an_error():
    stage = two_blocks(True)
    loss = stage(torch.randn(1, 12, 2, 5, 5, device=DEVICE)).sum()
    with torch.no_grad():
        stage[1].conv3.weight.mul_(2)
    with pytest.raises(RuntimeError, match="recompute=False"):
        loss.backward()


COMPILE_FOR_HOPPER = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from i3d_gn.norm import triton_backward, triton_forward

LOW = {"x_ptr", "y_ptr", "residual_ptr", "grad_y_ptr", "grad_ptr", "grad_x_ptr",
       "grad_residual_ptr"}

def compile(name, ones, **constants):
    kernel = getattr(triton_backward, name, None) or getattr(triton_forward, name)
    signature, values = {}, {}
    for argument in kernel.arg_names:
        if argument in constants or argument in ones:
            signature[argument] = "constexpr"
            values[(kernel.arg_names.index(argument),)] = constants.get(argument, 1)
        elif argument.endswith("_ptr"):
            signature[argument] = "*bf16" if argument in LOW else "*fp32"
        else:
            signature[argument] = "fp32" if argument == "eps" else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert "cubin" in compiled.asm

# Triton compiles arguments equal to 1 as constants.
for ones in ({"channel_stride"}, {"row_stride", "iterations", "group_size", "num_chunks"},
             {"num_channels", "num_rows", "num_groups", "channel_stride"}):
    compile("partial_statistics", ones, BLOCK_S=16, BLOCK_C=128)
    compile("combine_statistics", ones, BLOCK=256)
    for samples in (set(), {"num_samples"}):
        compile("combine_gradient_sums", ones | samples,
                BLOCK=256, SUM_BLOCK_E=128, SUM_BLOCK_C=8)
    for fusion in ({}, {"RELU"}, {"SILU"}, {"RELU", "RESIDUAL"}):
        options = {name: name in fusion for name in ("RELU", "SILU", "RESIDUAL")}
        for name in ("normalize", "partial_gradient_sums", "input_gradient"):
            compile(name, ones, **options, BLOCK_S=16, BLOCK_C=128)
"""


@pytest.mark.slow
def test_kernels_compile_for_hopper(tmp_path):
    """Compiling needs no GPU and finds what the interpreter accepts but the compiler rejects."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    script = tmp_path / "compile_for_hopper.py"
    script.write_text(COMPILE_FOR_HOPPER)
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
class TestOnGpu:
    """Real tile sizes, real activation sizes, and more than 2^31 elements."""

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize(
        "shape",
        [
            (2, 64, 16, 112, 112),
            (2, 256, 8, 55, 55),
            (2, 512, 4, 28, 28),
            (2, 1024, 4, 14, 14),
            (2, 2048, 4, 7, 7),
        ],
    )
    @pytest.mark.parametrize("fusion", ["plain", "relu", "residual"])
    def test_formula_on_activation_shapes(self, shape, layout, fusion):
        x, residual, weight, bias, grad = tensors(shape, layout, torch.bfloat16)
        options = {"relu": fusion != "plain"}
        options["residual"] = residual if fusion == "residual" else None
        y = group_norm(x, 32, weight, bias, **options)
        expected = formula(x, 32, weight, bias, **options)
        ulp = torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(y.double(), expected, rtol=ulp, atol=1e-5)
        grad = torch.where((expected.abs() < 1e-4) & (expected != 0), 0, grad)
        actual = torch.autograd.grad(y, (x, weight, bias), grad)
        wanted = torch.autograd.grad(expected, (x, weight, bias), grad.double())
        for a, b in zip(actual, wanted, strict=True):
            assert ((a.double() - b.double()).norm() / b.double().norm()).item() < 5e-3

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_more_than_2_to_the_31_elements(self, layout):
        x = torch.zeros(1, 64, 33, 1024, 1024, dtype=torch.bfloat16, device="cuda")
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last_3d)
        x[:, :, ::2] = 2.0
        x[:, :, -1] = 1.0
        y, _ = group_norm_fused(
            x, None, 32, torch.ones(64, device="cuda"), torch.zeros(64, device="cuda"), 1e-5,
            False, False,
        )  # fmt: skip
        expected = (32 / 33) ** -0.5
        for t, value in ((0, expected), (1, -expected), (31, -expected), (32, 0.0)):
            assert (y[:, :, t].float() - value).abs().max() < 0.01

    def test_no_host_synchronization(self):
        network = i3d_tiny(num_classes=3).cuda().to(memory_format=torch.channels_last_3d)
        clips = torch.randn(2, 3, 16, 64, 64, device="cuda")
        gradients(network, clips)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            network(clips).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
