import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from i3d_gn.norm import GroupNorm
from i3d_gn.norm.functional import group_norm

SHAPES = [
    (3, 12),
    (3, 12, 7),
    (2, 12, 5, 7),
    (2, 12, 3, 5, 7),
    (2, 12, 1, 1, 1),
    (1, 12, 16, 9, 11),
]
LAYOUTS = [
    "contiguous",
    "channels_last",
    "sliced",
    "sliced_channels_last",
    "transposed",
    "expanded",
]


def formula(x, num_groups, weight, bias, eps):
    """[GN] Eqn. 7 in float64, one sample and group at a time."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    group_size = x.shape[1] // num_groups
    rows = []
    for sample in x:
        groups = []
        for g in range(num_groups):
            channels = slice(g * group_size, (g + 1) * group_size)
            values = sample[channels]
            centered = values - values.sum() / values.numel()
            variance = (centered * centered).sum() / values.numel()
            by_channel = (-1,) + (1,) * (values.dim() - 1)
            groups.append(
                centered / (variance + eps).sqrt() * weight[channels].view(by_channel)
                + bias[channels].view(by_channel)
            )
        rows.append(torch.cat(groups))
    return torch.stack(rows)


def has_layout(shape, layout):
    return len(shape) >= {"channels_last": 4, "sliced_channels_last": 4, "sliced": 3}.get(layout, 2)


def lay_out(x, layout):
    """The same values with other strides."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=channels_last)
    if layout in ("sliced", "sliced_channels_last"):
        wide = F.pad(x, (1, 2))
        if layout == "sliced_channels_last":
            wide = wide.contiguous(memory_format=channels_last)
        return wide[..., 1:-2]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    assert layout == "expanded"
    return x[:1].expand_as(x)


def gradients(y, inputs, grad):
    return torch.autograd.grad(y, inputs, grad.to(y.dtype))


def parameters(num_channels, generator):
    weight = torch.rand(num_channels, generator=generator) + 0.5
    bias = torch.randn(num_channels, generator=generator)
    return weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize(
    ("shape", "layout"), [(s, la) for s in SHAPES for la in LAYOUTS if has_layout(s, la)]
)
@pytest.mark.parametrize("num_groups", [1, 3, 4, 12])
def test_formula_forward_and_backward(shape, layout, num_groups):
    generator = torch.Generator().manual_seed(0)
    x = lay_out(torch.randn(shape, generator=generator) * 2 + 0.5, layout)
    x.requires_grad_()
    weight, bias = parameters(12, generator)
    grad = torch.randn(shape, generator=generator)

    y = group_norm(x, num_groups, weight, bias, eps=1e-5)
    expected = formula(x, num_groups, weight, bias, 1e-5)

    assert y.dtype == x.dtype
    # A group of one element has variance 0, so rstd = 316 amplifies the rounding error of x.
    one_element = x[0].numel() == num_groups
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-4 if one_element else 5e-6)
    actual = gradients(y, (x, weight, bias), grad)
    wanted = gradients(expected, (x, weight, bias), grad)
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, None])
@pytest.mark.parametrize(
    ("shape", "group_size"), [((2, 16, 4, 9, 9), 4), ((1, 16, 16, 9, 9), 4), ((2, 64, 4, 9, 9), 32)]
)
def test_low_precision_equals_the_rounded_formula(
    layout, dtype, parameter_dtype, shape, group_size
):
    generator = torch.Generator().manual_seed(0)
    num_channels, num_groups = shape[1], shape[1] // group_size
    # The mean is 20 times the std: statistics rounded to bf16 would be off by 0.05.
    values = (torch.randn(shape, generator=generator) + 20).to(dtype)
    x = lay_out(values, layout).requires_grad_()
    weight = torch.ones(num_channels, dtype=parameter_dtype or dtype).requires_grad_()
    bias = torch.zeros(num_channels, dtype=parameter_dtype or dtype).requires_grad_()
    grad = torch.randn(x.shape, generator=generator).to(dtype)

    y = group_norm(x, num_groups, weight, bias, 1e-5)
    expected = formula(x, num_groups, weight, bias, 1e-5)

    assert y.dtype == dtype
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=ulp, atol=1e-4)
    grad_x, grad_weight, _ = gradients(y, (x, weight, bias), grad)
    wanted_x, wanted_weight, _ = gradients(expected, (x, weight, bias), grad)
    assert grad_x.dtype == dtype
    torch.testing.assert_close(grad_x.double(), wanted_x.double(), rtol=ulp, atol=ulp * 0.02)
    torch.testing.assert_close(
        grad_weight.double(), wanted_weight.double(), rtol=max(ulp, 1e-4), atol=1e-2
    )


@pytest.mark.parametrize("shape", [(1, 32, 16, 9, 9), (2, 64, 4, 9, 9)])
def test_large_mean_and_small_std_in_float16(shape):
    """The mean is 800 times the std, but the product of both is small."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.03 + 25
    x = lay_out(values.half(), "channels_last")
    y = group_norm(x, 2)
    expected = formula(x, 2, torch.ones(shape[1]), torch.zeros(shape[1]), 1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [((2, 12, 3, 5, 7), 4), ((2, 8, 6, 16, 17), 4), ((1, 4, 25, 52, 53), 2), ((2, 64, 3, 5, 7), 2)],
)
@pytest.mark.parametrize("fusion", ["relu", "residual"])
def test_relu_and_residual(layout, dtype, shape, num_groups, fusion):
    generator = torch.Generator().manual_seed(0)
    x, residual = (
        lay_out(torch.randn(shape, generator=generator).to(dtype), layout).requires_grad_()
        for _ in range(2)
    )
    weight, bias = parameters(shape[1], generator)
    grad = torch.randn(shape, generator=generator)
    inputs = [x, weight, bias]
    if fusion == "residual":
        inputs.append(residual)

    y = group_norm(
        x, num_groups, weight, bias, relu=True, residual=residual if fusion == "residual" else None
    )
    expected = formula(x, num_groups, weight, bias, 1e-5)
    if fusion == "residual":
        expected = expected + residual.double()

    assert y.dtype == dtype
    # Two roundings, of values up to 10, in bfloat16.
    atol = 1e-5 if dtype == torch.float32 else 0.04
    torch.testing.assert_close(y.double(), expected.relu(), rtol=0, atol=atol)
    # Exclude elements so close to 0 that rounding decides the ReLU's gradient.
    grad = torch.where(expected.abs() < atol, 0, grad)
    actual = gradients(y, inputs, grad)
    wanted = gradients(expected.relu(), inputs, grad.to(dtype))
    for a, b in zip(actual, wanted, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.004)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_channels_last"])
@pytest.mark.parametrize("dims", [4, 5])
@pytest.mark.parametrize("mean_over_std", [10, 100, 1000])
def test_large_mean_keeps_the_variance(layout, dims, mean_over_std):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 64, 16, 30, 30)[:2] + (16, 30, 30)[5 - dims :]
    # Group means of alternating sign, so that one shift for the whole sample would not suffice.
    sign = torch.tensor([1.0, -1.0]).repeat_interleave(2).repeat(16).view(1, 64, *(1,) * (dims - 2))
    x = lay_out(torch.randn(shape, generator=generator) + mean_over_std * sign, layout)
    x.requires_grad_()
    weight, bias = parameters(64, generator)
    grad = torch.randn(shape, generator=generator)

    y = group_norm(x, 32, weight, bias, 1e-5)
    expected = formula(x, 32, weight, bias, 1e-5)

    # The resolution of fp32 input: half an ulp of x is 6e-8 * mean / std.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=3e-6 + 2e-7 * mean_over_std)
    grad_x, grad_weight, grad_bias = gradients(y, (x, weight, bias), grad)
    wanted_x, wanted_weight, wanted_bias = gradients(expected, (x, weight, bias), grad)
    torch.testing.assert_close(grad_x, wanted_x, rtol=0, atol=2e-5 + 2e-7 * mean_over_std)
    scale = wanted_weight.abs().max().item()
    torch.testing.assert_close(
        grad_weight, wanted_weight, rtol=0, atol=scale * (1e-5 + 5e-6 * mean_over_std)
    )
    torch.testing.assert_close(grad_bias, wanted_bias, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(4, 64, 1, 1), (4, 64, 1, 1, 1), (3, 1, 9, 9), (3, 1, 40, 5, 9)])
@pytest.mark.parametrize("sliced", [False, True])
def test_large_mean_where_contiguous_is_also_channels_last(shape, sliced):
    """With one channel or one position, torch treats the tensor as channels_last by its strides."""
    generator = torch.Generator().manual_seed(0)
    num_channels, *space = shape[1:]
    memory = torch.empty(shape[0], *space, num_channels + 2 * sliced)
    x = memory.movedim(-1, 1)[:, :num_channels]
    x.copy_(torch.randn(shape, generator=generator) + 1000)
    assert x.stride(1) == 1
    x.requires_grad_()
    weight, bias = parameters(num_channels, generator)
    grad = torch.randn(shape, generator=generator)
    num_groups = min(2, num_channels)
    y = group_norm(x, num_groups, weight, bias)
    expected = formula(x, num_groups, weight, bias, 1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=3e-6 + 2e-4)
    (actual,), (wanted,) = gradients(y, (x,), grad), gradients(expected, (x,), grad)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=2e-5 + 2e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("rest", ["random", "constant"])
@pytest.mark.parametrize("outlier", [1e4, 1e6, 1e10])
def test_outlier_does_not_affect_other_elements(layout, rest, outlier):
    """The outlier is the first element: statistics must not be shifted by that."""
    generator = torch.Generator().manual_seed(0)
    x = torch.full((1, 4, 9, 60, 61), 500.0)
    if rest == "random":
        x = torch.randn(x.shape, generator=generator)
    x[0, :, 0, 0, 0] = outlier
    y = group_norm(lay_out(x, layout), 2)
    expected = formula(x, 2, torch.ones(4), torch.zeros(4), 1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [0.0, 3.7, -1e4])
def test_constant_input_gives_the_bias(layout, value):
    x = lay_out(torch.full((2, 8, 3, 5, 7), value), layout)
    bias = torch.arange(8.0)
    y = group_norm(x, 4, torch.full((8,), 2.0), bias, 1e-5)
    expected = bias.view(1, -1, 1, 1, 1).expand_as(y)
    # The mean of equal numbers may be off by an ulp, which rstd = 316 amplifies.
    torch.testing.assert_close(y, expected, rtol=0, atol=abs(value) * 1.2e-7 * 640)


@pytest.mark.parametrize("num_groups", [1, 4, 32, 64])
@pytest.mark.parametrize("shape", [(2, 64, 9), (2, 64, 5, 7), (2, 64, 3, 5, 7)])
def test_equals_torch_group_norm(num_groups, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = GroupNorm(num_groups, 64)
    torch.testing.assert_close(ours(x), F.group_norm(x, num_groups), rtol=1e-5, atol=1e-5)


def test_one_group_is_layer_norm_and_one_channel_per_group_is_instance_norm():
    x = torch.randn(2, 12, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    for layout in ("contiguous", "channels_last"):
        x = lay_out(x, layout)
        torch.testing.assert_close(
            group_norm(x, 1), F.layer_norm(x, x.shape[1:]), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(group_norm(x, 12), F.instance_norm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (2, 8, 3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preserves_the_memory_format(shape, dtype):
    channels_last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    layer = GroupNorm(4, 8)
    contiguous = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(contiguous)
    assert y.is_contiguous()
    assert torch.autograd.grad(y.square().sum(), contiguous)[0].is_contiguous()
    last = contiguous.detach().contiguous(memory_format=channels_last).requires_grad_()
    for device in ("cpu", "meta"):
        y = layer.to(device)(last.to(device))
        assert y.is_contiguous(memory_format=channels_last)
        assert not y.is_contiguous()
    layer = GroupNorm(4, 8)
    grad = torch.autograd.grad(layer(last).square().sum(), last)[0]
    assert grad.is_contiguous(memory_format=channels_last)
    assert layer(last[..., 1:]).is_contiguous(memory_format=channels_last)
    for strided in (contiguous[..., 1:], lay_out(contiguous, "transposed")):
        assert layer(strided).is_contiguous()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sample_is_independent_of_its_batch_unlike_batch_norm(layout):
    batch = lay_out(torch.randn(4, 8, 3, 5, 7, generator=torch.Generator().manual_seed(0)), layout)
    layer = GroupNorm(4, 8)
    together = layer(batch)
    for i, sample in enumerate(batch.split(1)):
        assert torch.equal(layer(lay_out(sample.clone(), layout)), together[i : i + 1])
    batch_norm = nn.BatchNorm3d(8)
    assert (batch_norm(batch[:1]) - batch_norm(batch)[:1]).abs().max() > 0.1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_values_affect_only_their_group_and_sample(layout, poison):
    x = torch.randn(3, 8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    clean = group_norm(lay_out(x, layout), 4)
    x[1, 2, 0, 1, 1] = poison
    y = group_norm(lay_out(x, layout), 4)
    assert torch.isnan(y[1, 2:4]).any()
    y[1, 2:4] = clean[1, 2:4]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("num_groups", [2, 32])
def test_strides_of_dimensions_of_size_1_are_ignored(num_groups):
    x = torch.randn(1, 64, 1, 6, 5).bfloat16()
    standard = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    odd = standard.detach().as_strided(standard.shape, (7, 1, 3, 320, 64)).requires_grad_()
    y, expected = (group_norm(t, num_groups, relu=True) for t in (odd, standard))
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    assert torch.equal(
        *(torch.autograd.grad(a, b, grad)[0] for a, b in ((y, odd), (expected, standard)))
    )


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (s, la)
        for s in [(2, 4, 3), (2, 4, 2, 3), (2, 4, 2, 3, 2)]
        for la in ["contiguous", "channels_last", "sliced"]
        if has_layout(s, la)
    ],
)
def test_gradcheck(layout, shape):
    x = lay_out(torch.randn(shape, dtype=torch.float64), layout).detach()
    x.requires_grad_()
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: group_norm(a[0], 2, *a[1:]), (x, weight, bias))


@pytest.mark.parametrize("fusion", ["plain", "relu", "residual"])
@pytest.mark.parametrize(
    ("shape", "layout"), [((2, 4, 2, 3), "contiguous"), ((2, 4, 2, 3), "channels_last"),
                          ((2, 4, 2, 2, 2), "channels_last")],
)  # fmt: skip
def test_second_derivatives(shape, layout, fusion):
    x, residual = (
        lay_out(torch.randn(shape, dtype=torch.float64), layout).detach().requires_grad_()
        for _ in range(2)
    )
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def normalize(x, residual, weight, bias):
        residual = residual if fusion == "residual" else None
        return group_norm(x, 2, weight, bias, relu=fusion != "plain", residual=residual)

    inputs = (x, residual if fusion == "residual" else residual.detach(), weight, bias)
    assert torch.autograd.gradgradcheck(normalize, inputs)
    y = normalize(*inputs)
    grad = torch.randn_like(y)
    first, with_graph = (
        torch.autograd.grad(y, (x, weight, bias), grad, retain_graph=True, create_graph=graph)
        for graph in (False, True)
    )
    for a, b in zip(first, with_graph, strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_function_transforms(layout):
    generator = torch.Generator().manual_seed(0)
    x, tangent = (lay_out(torch.randn(3, 8, 2, 3, 4, generator=generator), layout) for _ in "xt")
    layer = GroupNorm(4, 8)
    value, derivative = torch.func.jvp(layer, (x,), (tangent,))
    wanted = torch.func.jvp(
        lambda t: formula(t, 4, torch.ones(8), torch.zeros(8), 1e-5),
        (x.double(),),
        (tangent.double(),),
    )
    torch.testing.assert_close(value.double(), wanted[0], rtol=0, atol=5e-6)
    torch.testing.assert_close(derivative.double(), wanted[1], rtol=0, atol=1e-5)
    each = torch.vmap(lambda sample: layer(sample[None])[0])(x)
    torch.testing.assert_close(each, layer(x))
    grad = torch.func.grad(lambda t: layer(t).pow(3).sum())(x)
    x.requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(layer(x).pow(3).sum(), x)[0])


# opcheck itself reads .grad of tensors that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("fusion", ["plain", "relu", "residual"])
@pytest.mark.parametrize("shape", [(2, 8, 3, 4, 5), (1, 8, 3, 16, 16)])
def test_custom_operators_are_registered_correctly(fusion, shape):
    for dtype in (torch.float32, torch.bfloat16):
        x, residual, grad = (
            lay_out(torch.randn(shape).to(dtype), "channels_last") for _ in range(3)
        )
        weight, bias = (torch.rand(8, requires_grad=True) for _ in range(2))
        forward = (
            x.requires_grad_(),
            residual.requires_grad_() if fusion == "residual" else None,
            *(4, weight, bias, 1e-5, fusion != "plain"),
        )
        tolerance = {"rtol": 1e-2, "atol": 1e-2}
        ops = torch.ops.i3d_gn
        torch.library.opcheck(ops.group_norm_channels_last_cpu.default, forward, **tolerance)
        with torch.no_grad():
            y, mean, rstd = ops.group_norm_channels_last_cpu(*forward)
            y = None if fusion == "plain" else y
            backward = (grad, x, y, 4, weight, mean, rstd, fusion == "residual")
            ops = torch.ops.i3d_gn.group_norm_channels_last_cpu_backward
            torch.library.opcheck(
                ops.default,
                tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in backward),
                **tolerance,
            )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_autocast_has_no_effect(layout):
    layer = GroupNorm(4, 8)
    for dtype in (torch.float32, torch.bfloat16):
        x = lay_out(torch.randn(2, 8, 3, 5, 7).to(dtype), layout)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_activation_checkpointing(layout):
    layer = GroupNorm(4, 8)
    x = lay_out(torch.randn(2, 8, 3, 5, 7), layout).requires_grad_()
    plain = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    recomputed = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("shape", [(0, 8, 3, 5, 7), (2, 8, 0, 5, 7)])
def test_empty_input(shape):
    layer = GroupNorm(4, 8)
    x = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    assert y.dtype == x.dtype
    residual = x.detach().float().requires_grad_()
    with_residual = layer(x, relu=True, residual=residual)
    assert with_residual.dtype == x.dtype
    (y.sum() + with_residual.sum()).backward()
    assert residual.grad is not None
    assert x.grad is not None
    assert x.grad.shape == shape
    assert torch.equal(layer.weight.grad, torch.zeros(8))


def test_state_dicts_are_interchangeable_with_torch():
    ours, torchs = GroupNorm(4, 8), nn.GroupNorm(4, 8)
    nn.init.normal_(torchs.weight)
    nn.init.normal_(torchs.bias)
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(2, 8, 3, 5, 7)
    torch.testing.assert_close(ours(x), torchs(x), rtol=1e-5, atol=1e-5)
    torchs.load_state_dict(ours.state_dict())
    assert list(GroupNorm(4, 8, affine=False).state_dict()) == []


def test_copy_pickle_and_save():
    layer = GroupNorm(4, 8, eps=1e-3)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 8, 3, 5, 7)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(x), layer(x))


def test_meta_device():
    with torch.device("meta"):
        layer = GroupNorm(4, 8)
        y = layer(torch.empty(2, 8, 3, 5, 7))
    assert y.is_meta
    assert y.shape == (2, 8, 3, 5, 7)


def test_without_affine_parameters():
    layer = GroupNorm(4, 8, affine=False)
    assert list(layer.parameters()) == []
    for layout in ("contiguous", "channels_last"):
        x = lay_out(torch.randn(2, 8, 3, 5, 7), layout)
        expected = formula(x, 4, torch.ones(8), torch.zeros(8), 1e-5)
        torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=5e-6)


def test_channels_per_group():
    layer = GroupNorm.from_channels_per_group(16, 64)
    assert (layer.num_groups, layer.eps, layer.affine) == (4, 1e-5, True)
    layer = GroupNorm.from_channels_per_group(1, 4, eps=0.1, affine=False)
    assert (layer.num_groups, layer.eps, layer.affine) == (4, 0.1, False)
    with pytest.raises(ValueError, match=r"num_channels=24.*channels_per_group=16.*divisors"):
        GroupNorm.from_channels_per_group(16, 24)


@pytest.mark.parametrize("num_groups", [0, -1, 5, 16])
def test_indivisible_channels_are_an_error(num_groups):
    with pytest.raises(ValueError, match=rf"num_channels=8.*num_groups={num_groups}.*divisors"):
        GroupNorm(num_groups, 8)
    with pytest.raises(ValueError, match="8 channels"):
        group_norm(torch.randn(2, 8, 3), num_groups)


def test_smallest_number_of_channels():
    assert GroupNorm(1, 1).num_channels == 1
    with pytest.raises(ValueError, match=r"num_channels=0"):
        GroupNorm(1, 0)


def test_wrong_input_is_an_error():
    with pytest.raises(ValueError, match=r"\(2, 6, 3\).*C = 8"):
        GroupNorm(4, 8)(torch.randn(2, 6, 3))
    with pytest.raises(ValueError, match=r"\(8,\)"):
        GroupNorm(4, 8)(torch.randn(8))
    with pytest.raises(ValueError, match=r"torch\.uint8.*convert"):
        GroupNorm(4, 8)(torch.zeros(2, 8, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"bias has shape \(4,\).*\(8,\)"):
        group_norm(torch.randn(2, 8, 3), 4, torch.ones(8), torch.ones(4))
