"""Statistics per frame and over the frames so far, on the native operators and the kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from i3d_gn.models.blocks import make_stage
from i3d_gn.norm import GroupNorm, make_norm
from i3d_gn.norm.axes import to_clips, to_frames
from i3d_gn.norm.functional import group_norm

pytest.importorskip("triton")

pytestmark = [
    # The interpreter computes with NumPy, which warns of infinities even in masked elements.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    # That of Triton 3.6 (torch 2.11) fails with NumPy 2.4, and warns with earlier versions.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar"),
]

LAYOUTS = ("contiguous", "channels_last", "sliced_channels_last")


@pytest.fixture(params=["native", "triton"])
def kernel(request, monkeypatch):
    monkeypatch.setenv("I3D_GN_NORM_KERNEL", "auto" if request.param == "native" else "triton")
    return request.param


def lay_out(x, layout):
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last_3d)
    return F.pad(x, (1, 2)).contiguous(memory_format=torch.channels_last_3d)[..., 1:-2]


def by_loop(x, over, num_groups, weight, bias, eps=1e-5):
    """In float64, frame by frame, from the frames that each one may see."""
    x = x.double()
    frames = []
    for t in range(x.shape[2]):
        seen = x[:, :, t : t + 1] if over == "hw" else x[:, :, : t + 1]
        groups = seen.reshape(len(x), num_groups, -1)
        mean = groups.mean(2).repeat_interleave(x.shape[1] // num_groups, 1)[:, :, None, None]
        var = groups.var(2, correction=0).repeat_interleave(x.shape[1] // num_groups, 1)
        frames.append((x[:, :, t] - mean) / (var[:, :, None, None] + eps).sqrt())
    by_channel = (1, -1, 1, 1, 1)
    y = torch.stack(frames, 2)
    return y * weight.double().view(by_channel) + bias.double().view(by_channel)


ACTIVATIONS = {
    "plain": (lambda y, r: y, {}),
    "relu": (lambda y, r: y.relu(), {"relu": True}),
    "silu": (lambda y, r: F.silu(y), {"silu": True}),
    "residual": (lambda y, r: (y + r).relu(), {"relu": True}),
}


@pytest.mark.parametrize("over", ["hw", "causal"])
@pytest.mark.parametrize(
    ("layout", "fusion", "dtype"),
    [
        ("contiguous", "plain", torch.float32),
        ("contiguous", "residual", torch.float32),
        ("channels_last", "relu", torch.float32),
        ("channels_last", "residual", torch.bfloat16),
        ("sliced_channels_last", "residual", torch.float32),
        ("channels_last", "silu", torch.bfloat16),
        ("sliced_channels_last", "silu", torch.float32),
    ],
)
def test_equals_a_loop_over_frames(kernel, over, layout, fusion, dtype):
    shape, num_groups = (2, 6, 4, 3, 5), 2
    x, residual, grad = (lay_out(torch.randn(shape).to(dtype), layout) for _ in range(3))
    x = (x + 2 * torch.arange(4.0).view(4, 1, 1).to(dtype)).requires_grad_()
    weight = (torch.rand(6) + 0.5).requires_grad_()
    bias = torch.randn(6).requires_grad_()
    activate, options = ACTIVATIONS[fusion]
    inputs = [x, weight, bias]
    if fusion == "residual":
        residual.requires_grad_()
        options, inputs = {**options, "residual": residual}, [*inputs, residual]
    y = group_norm(x, num_groups, weight, bias, over=over, **options)
    expected = activate(by_loop(x, over, num_groups, weight, bias), residual.double())
    assert y.dtype == dtype
    assert y.is_contiguous(
        memory_format=torch.contiguous_format if layout == "contiguous" else torch.channels_last_3d
    )
    low = dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.04 if low else 5e-6)
    # Exclude elements so close to 0 that rounding decides the ReLU's gradient.
    grad = torch.where((expected.abs() < 1e-3) & (expected != 0), 0, grad)
    actual = torch.autograd.grad(y, inputs, grad)
    wanted = torch.autograd.grad(expected, inputs, grad.double())
    for a, b in zip(actual, wanted, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < (0.006 if low else 1e-5)


@pytest.mark.parametrize("over", ["hw", "causal"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean_over_std", [10, 1000])
def test_large_mean_keeps_the_variance(kernel, over, layout, mean_over_std):
    sign = torch.tensor([1.0, -1.0]).repeat_interleave(4).view(1, 8, 1, 1, 1)
    drift = torch.linspace(0.9, 1.1, 5).view(5, 1, 1) if over == "hw" else 1.0
    x = lay_out(torch.randn(1, 8, 5, 9, 11) + mean_over_std * sign * drift, layout)
    x.requires_grad_()
    weight, bias = torch.rand(8) + 0.5, torch.randn(8)
    grad = torch.randn(x.shape)
    y = group_norm(x, 2, weight, bias, over=over)
    expected = by_loop(x, over, 2, weight, bias)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=3e-6 + 3e-7 * mean_over_std)
    (actual,) = torch.autograd.grad(y, x, grad)
    (wanted,) = torch.autograd.grad(expected, x, grad.double())
    torch.testing.assert_close(actual, wanted, rtol=0, atol=2e-5 + 4e-7 * mean_over_std)


def test_causal_after_a_first_frame_unlike_the_others(kernel):
    """A black first frame: relative to it, the later ones have a large mean and a small std."""
    x = torch.randn(1, 4, 3, 9, 11) * 0.1 + 100
    x[:, :, 0] = 0
    x = lay_out(x, "channels_last")
    y = group_norm(x, 2, over="causal")
    expected = by_loop(x, "causal", 2, torch.ones(4), torch.zeros(4))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(y[:, :, 0], torch.zeros_like(y[:, :, 0]))


def test_per_frame_equals_torch_group_norm_of_each_frame(kernel):
    layer = GroupNorm(4, 8, over="hw")
    nn.init.normal_(layer.weight)
    clips = torch.randn(2, 8, 3, 4, 5)
    for layout in LAYOUTS:
        y = layer(lay_out(clips, layout))
        for t in range(3):
            frame = F.group_norm(clips[:, :, t], 4, layer.weight, layer.bias)
            torch.testing.assert_close(y[:, :, t], frame, rtol=1e-5, atol=1e-5)
    images = clips[:, :, 0]
    torch.testing.assert_close(layer(images), F.group_norm(images, 4, layer.weight, layer.bias))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_per_frame_is_the_same_for_any_chunks(kernel, layout):
    layer = GroupNorm(4, 8, over="hw")
    clips = lay_out(torch.randn(2, 8, 6, 4, 5), layout)
    whole = layer(clips)
    parts = torch.cat([layer(lay_out(part, layout)) for part in clips.split([1, 3, 2], 2)], 2)
    assert torch.equal(whole, parts)
    assert not torch.allclose(GroupNorm(4, 8)(clips)[:, :, :1], GroupNorm(4, 8)(clips[:, :, :1]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("over", ["thw", "hw", "causal"])
def test_only_group_norm_over_time_sees_later_frames(kernel, over, layout):
    layer = GroupNorm(4, 8, over=over)
    clips = lay_out(torch.randn(2, 8, 5, 4, 3), layout)
    before = layer(clips)
    changed = clips.clone()
    changed[:, :, 3:] = 100.0 * torch.randn(2, 8, 2, 4, 3)
    same = torch.equal(layer(changed)[:, :, :3], before[:, :, :3])
    assert same == (over != "thw")
    clips.requires_grad_()
    (grad,) = torch.autograd.grad(layer(clips)[:, :, 2].square().sum(), clips)
    sees = [bool(grad[:, :, t].any()) for t in range(5)]
    assert (
        sees
        == {
            "thw": [True] * 5,
            "hw": [False, False, True, False, False],
            "causal": [True, True, True, False, False],
        }[over]
    )


def test_causal_of_one_frame_is_per_frame_and_the_last_frame_sees_the_clip(kernel):
    clips = torch.randn(2, 8, 3, 4, 5)
    causal, whole = GroupNorm(4, 8, over="causal"), GroupNorm(4, 8)
    torch.testing.assert_close(causal(clips[:, :, :1]), whole(clips[:, :, :1]))
    torch.testing.assert_close(causal(clips)[:, :, -1], whole(clips)[:, :, -1])


def test_frames_of_channels_last_clips_are_a_view():
    clips = torch.randn(2, 8, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    frames = to_frames(clips)
    assert frames.data_ptr() == clips.data_ptr()
    assert frames.is_contiguous(memory_format=torch.channels_last)
    back = to_clips(frames, 2, torch.channels_last_3d)
    assert back.data_ptr() == clips.data_ptr()
    assert torch.equal(back, clips)


@pytest.mark.parametrize("over", ["hw", "causal"])
def test_autocast_has_no_effect(kernel, over):
    layer = GroupNorm(4, 8, over=over)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 8, 3, 5, 7).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, relu=True)
        assert y.dtype == dtype
        assert torch.equal(y, layer(x, relu=True))


class Network(nn.Module):
    def __init__(self, over):
        super().__init__()
        self.norm = GroupNorm(4, 8, over=over)
        self.conv = nn.Conv3d(8, 8, 1)

    def forward(self, x):
        return self.conv(self.norm(x, relu=True, residual=x))


@pytest.mark.parametrize(
    ("over", "layout"), [("hw", "contiguous"), ("hw", "channels_last"), ("causal", "channels_last")]
)
def test_compile_equals_eager(kernel, over, layout):
    network = Network(over)
    x = lay_out(torch.randn(2, 8, 3, 4, 5), layout).requires_grad_()
    inputs = [x, *network.parameters()]
    plain = torch.autograd.grad(network(x).square().sum(), inputs)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(x).square().sum(), inputs), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("over", ["hw", "causal"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_export_uses_native_operators(monkeypatch, over, layout):
    monkeypatch.setenv("I3D_GN_NORM_KERNEL", "triton")
    network = Network(over).eval()
    x = lay_out(torch.randn(2, 8, 3, 4, 5), layout)
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},))
    code = program.graph_module.print_readable(print_output=False)
    assert "torch.ops.aten." in code
    assert "torch.ops.i3d_gn" not in code
    x = torch.cat((x, 2 * x))[:3]
    torch.testing.assert_close(program.module()(x), network(x), rtol=1e-5, atol=1e-5)


# opcheck itself reads .grad of tensors that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_causal_operators_are_registered_correctly(monkeypatch):
    monkeypatch.setenv("I3D_GN_NORM_KERNEL", "triton")
    frames, residual, grad = torch.randn(3, 4, 4, 2, 2)
    weight, bias = torch.rand(2, 4).unbind()
    operators = torch.ops.i3d_gn
    leaves = [t.clone().requires_grad_() for t in (frames, residual, weight, bias)]
    forward = (*leaves[:2], 2, 2, *leaves[2:], 1e-5, True, False)
    torch.library.opcheck(operators.causal_group_norm_fused.default, forward)
    y, statistics = operators.causal_group_norm_fused(
        frames, residual, 2, 2, weight, bias, 1e-5, True, False
    )
    backward = (grad, frames, y, 2, 2, weight, bias, statistics, True, False)
    torch.library.opcheck(operators.causal_group_norm_fused_backward.default, backward)


def test_second_derivative():
    x = torch.randn(1, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    for over in ("hw", "causal"):
        assert torch.autograd.gradcheck(lambda t, o=over: group_norm(t, 2, over=o), (x,))
        assert torch.autograd.gradgradcheck(lambda t, o=over: group_norm(t, 2, over=o), (x,))


def test_second_derivative_of_the_kernels_is_an_error(monkeypatch):
    monkeypatch.setenv("I3D_GN_NORM_KERNEL", "triton")
    x = torch.randn(1, 4, 3, 2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(
        group_norm(x, 2, over="causal").pow(3).sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="I3D_GN_NORM_KERNEL=native"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("over", ["hw", "causal"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_blocks_that_recompute_activations(monkeypatch, over, layout):
    monkeypatch.setenv("I3D_GN_NORM_KERNEL", "triton")

    def stage(recompute):
        torch.manual_seed(0)
        return make_stage(
            1, 4, 2, temporal_kernels=(1,), spatial_stride=2, stride_in="3x3",
            norm=lambda c: GroupNorm(2, c, over=over), recompute=recompute,
        )  # fmt: skip

    x = lay_out(torch.randn(1, 4, 3, 4, 4), layout).requires_grad_()
    results = []
    for recompute in (False, True):
        network = stage(recompute)
        y = network(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *network.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_empty_and_meta_input():
    for over in ("hw", "causal"):
        layer = GroupNorm(4, 8, over=over)
        assert layer(torch.empty(0, 8, 3, 4, 5)).shape == (0, 8, 3, 4, 5)
        clips = torch.empty(2, 8, 3, 4, 5, device="meta")
        assert layer.to("meta")(clips).shape == clips.shape


def test_make_norm_and_errors():
    for name, num_groups in (("gn", 32), ("ln", 1), ("in", 64)):
        layer = make_norm(name, 64, over="hw")
        assert (layer.num_groups, layer.over) == (num_groups, "hw")
        assert "over=hw" in repr(layer)
    assert make_norm("gn", 64, channels_per_group=16, over="causal").over == "causal"
    with pytest.raises(ValueError, match=r"over='hw' is for norms 'gn', 'ln' and 'in'.*'bn'"):
        make_norm("bn", 64, over="hw")
    with pytest.raises(ValueError, match=r"over='wh' is unknown; choose one of thw, hw, causal"):
        GroupNorm(4, 8, over="wh")
    with pytest.raises(ValueError, match=r"\(2, 8, 4, 5\).*over='causal' needs clips"):
        GroupNorm(4, 8, over="causal")(torch.randn(2, 8, 4, 5))
    with pytest.raises(ValueError, match=r"\(2, 8, 4\).*over='hw'"):
        GroupNorm(4, 8, over="hw")(torch.randn(2, 8, 4))
    with pytest.raises(ValueError, match="relu=True and silu=True"):
        GroupNorm(4, 8)(torch.randn(2, 8), relu=True, silu=True)


@pytest.mark.parametrize("shape", [(2, 8, 7), (1, 6, 5, 9, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_over_the_whole_clip(kernel, shape, dtype):
    num_channels = shape[1]
    x = (torch.randn(shape) * 2).to(dtype).requires_grad_()
    weight = (torch.rand(num_channels) + 0.5).requires_grad_()
    bias = torch.randn(num_channels).requires_grad_()
    y = group_norm(x, 2, weight, bias, silu=True)
    expected = F.silu(F.group_norm(x.double(), 2, weight.double(), bias.double()))
    low = dtype == torch.bfloat16
    torch.testing.assert_close(
        y.double(), expected, rtol=0.01 if low else 0, atol=1e-2 if low else 5e-6
    )
    grad = torch.randn(shape).to(dtype)
    actual = torch.autograd.grad(y, (x, weight, bias), grad)
    wanted = torch.autograd.grad(expected, (x, weight, bias), grad.double())
    for a, b in zip(actual, wanted, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < (0.006 if low else 1e-5)
