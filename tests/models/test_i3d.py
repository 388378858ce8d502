import copy
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from i3d_gn.models import i3d_resnet50, i3d_resnet101, i3d_tiny
from i3d_gn.models.blocks import make_stage
from i3d_gn.norm import FrozenBatchNorm, GroupNorm, make_norm
from tests.models.conftest import assert_initialized

# Shapes (C, T, H, W) of [NL] `resnet_video_org` for clips of 32 x 224 x 224.
LAYER_TABLE = {
    "conv1": (64, 16, 112, 112),
    "pool1": (64, 8, 55, 55),
    "res2": (256, 8, 55, 55),
    "pool2": (256, 4, 55, 55),
    "res3": (512, 4, 28, 28),
    "res4": (1024, 4, 14, 14),
    "res5": (2048, 4, 7, 7),
}


def on_meta(make, *args, **kwargs):
    with torch.device("meta"):
        return make(*args, **kwargs)


def output_shapes(model, num_frames, height, width):
    shapes = {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda _m, _i, y, name=name: shapes.update({name: y.shape[1:]})
        )
    model(torch.empty(1, 3, num_frames, height, width, device="meta"))
    return shapes


def features_of(model, clips):
    outputs = []
    with model.res5.register_forward_hook(lambda _m, _i, y: outputs.append(y)):
        model(clips)
    return outputs[0]


@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_parameter_count(norm):
    model = on_meta(i3d_resnet50, norm)
    counts = {"conv": 0, "norm": 0, "head": 0}
    for name, parameter in model.named_parameters():
        kind = next(k for k in counts if k in name)
        counts[kind] += parameter.numel()
    assert counts == {"conv": 27_170_752, "norm": 53_120, "head": 819_600}
    assert sum(counts.values()) == 28_043_472


@pytest.mark.parametrize(
    ("num_frames", "side", "giga_multiply_adds"),
    [(32, 224, 32.83), (64, 224, 65.66), (32, 256, 42.93), (64, 256, 85.86)],
)
def test_multiply_adds(num_frames, side, giga_multiply_adds):
    model = on_meta(i3d_resnet50)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, num_frames, side, side, device="meta"))
    measured = counter.get_total_flops() / 2 / 1e9
    assert measured == pytest.approx(giga_multiply_adds, rel=0.005)


def test_layer_table():
    model = on_meta(i3d_resnet50)
    names = ["conv1", "norm1", "pool1", "res2", "pool2", "res3", "res4", "res5", "head"]
    assert [name for name, _ in model.named_children()] == names
    shapes = output_shapes(model, 32, 224, 224)
    assert shapes | LAYER_TABLE == shapes
    assert shapes["head"] == (400,)
    assert output_shapes(on_meta(i3d_resnet50), 64, 224, 224)["res5"] == (2048, 8, 7, 7)


def test_temporal_kernels():
    def kernels(model):
        return [
            [block.conv1.kernel_size[0] for block in stage]
            for stage in (model.res2, model.res3, model.res4, model.res5)
        ]

    inflated = on_meta(i3d_resnet50)
    assert inflated.conv1.kernel_size == (5, 7, 7)
    assert kernels(inflated) == [[3, 3, 3], [3, 1, 3, 1], [3, 1, 3, 1, 3, 1], [1, 3, 1]]
    deep = kernels(on_meta(i3d_resnet101))
    assert [len(stage) for stage in deep] == [3, 4, 23, 3]
    assert deep[2] == [3, 1] * 11 + [3]
    c2d = on_meta(i3d_resnet50, inflate=False)
    assert all(m.kernel_size[0] == 1 for m in c2d.modules() if isinstance(m, nn.Conv3d))
    assert (c2d.pool1.kernel_size, c2d.pool2.kernel_size) == ((2, 3, 3), (2, 1, 1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stem": "8x8"}, {"conv1": (64, 8, 112, 112), "pool1": (64, 8, 55, 55)}),
        ({"pool_padding": 1}, {"pool1": (64, 4, 56, 56), "res3": (512, 2, 28, 28)}),
        ({"stride_in": "1x1"}, {"res3": (512, 2, 28, 28), "res5": (2048, 2, 7, 7)}),
        ({"inflate": False}, {"conv1": (64, 8, 112, 112), "res5": (2048, 2, 7, 7)}),
    ],
)
def test_shapes_by_option(options, expected):
    num_frames = 8 if options.get("stem") == "8x8" else 16
    shapes = output_shapes(on_meta(i3d_resnet50, **options), num_frames, 224, 224)
    assert shapes | expected == shapes


def test_strided_block_with_equal_channels_has_a_convolution_in_the_shortcut():
    stage = make_stage(
        1,
        16,
        4,
        temporal_kernels=(1,),
        spatial_stride=2,
        stride_in="3x3",
        norm=partial(make_norm, "gn", num_groups=2),
    )
    assert stage(torch.randn(1, 16, 2, 8, 8)).shape == (1, 16, 2, 4, 4)


def test_stride_placement():
    for stride_in, strides in (("3x3", (1, 2)), ("1x1", (2, 1))):
        block = on_meta(i3d_resnet50, stride_in=stride_in).res3[0]
        assert block.conv1.stride == (1, strides[0], strides[0])
        assert block.conv2.stride == (1, strides[1], strides[1])


@pytest.mark.parametrize("options", [{}, {"pool_padding": 1}, {"stem": "8x8"}])
@pytest.mark.parametrize(
    "size", [(32, 64, 64), (16, 56, 56), (17, 61, 83), (33, 40, 97), (7, 33, 32)]
)
def test_feature_size_equals_the_size_of_the_features(options, size):
    model = on_meta(i3d_tiny, **options)
    shapes = output_shapes(model, *size)
    assert model.feature_size(*size) == shapes["res5"][1:]


@pytest.mark.parametrize("options", [{}, {"stem": "8x8"}])
def test_clips_that_are_too_small(options):
    model = on_meta(i3d_tiny, **options)
    with pytest.raises(ValueError, match="too small") as error:
        model.feature_size(1, 1, 1)
    least = [int(n) for n in re.findall(r"\d+", str(error.value).split("at least")[1])]
    assert model.feature_size(*least) == (1, 1, 1)
    for axis in range(3):
        smaller = list(least)
        smaller[axis] -= 1
        if smaller[axis]:
            with pytest.raises(ValueError, match="too small"):
                model(torch.empty(1, 3, *smaller, device="meta"))


def test_initialization():
    torch.manual_seed(0)
    model = i3d_resnet50(num_classes=400)
    assert_initialized(model)
    assert model.head.dropout.p == 0.5
    ones = i3d_tiny(zero_init_last_norm=False)
    assert all(torch.equal(b.norm3.weight, torch.ones(64)) for b in ones.res2)
    # A frozen gamma of 0 could never change.
    assert i3d_tiny("frozen_bn").res2[0].norm3.weight.min() == 1


def test_norm_by_name_or_function():
    assert i3d_tiny("gn").norm1.num_groups == 8
    assert i3d_tiny("ln").norm1.num_groups == 1
    model = on_meta(i3d_resnet50, partial(make_norm, "gn", channels_per_group=16))
    norms = [m for m in model.modules() if isinstance(m, GroupNorm)]
    assert len(norms) == 53
    assert {m.num_channels // m.num_groups for m in norms} == {16}
    for name, kind in (
        ("bn", nn.BatchNorm3d),
        ("frozen_bn", FrozenBatchNorm),
        ("none", nn.Identity),
    ):
        assert isinstance(i3d_tiny(name).res5[0].shortcut_norm, kind)


@pytest.mark.parametrize("size", [(32, 64, 64), (16, 56, 56)])
@pytest.mark.parametrize("norm", ["gn", "bn", "ln"])
def test_i3d_tiny_overfits(size, norm):
    torch.manual_seed(0)
    model = i3d_tiny(norm, num_classes=3, dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    clips, labels = torch.randn(3, 3, *size), torch.arange(3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(clips), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_window_as_large_as_the_map_equals_no_window():
    torch.manual_seed(0)
    model = i3d_tiny(num_classes=5).eval()
    clips = torch.randn(2, 3, 16, 70, 90)
    _, height, width = model.feature_size(16, 70, 90)
    local = model(clips, window=(height, width))
    assert local.shape == (2, 5, 1, 1, 1)
    torch.testing.assert_close(local.flatten(1), model(clips))


@pytest.mark.parametrize("num_frames", [16, 32, 40])
def test_window_equals_pooling_each_position(num_frames):
    torch.manual_seed(0)
    model = i3d_tiny(num_classes=5).eval()
    clips = torch.randn(2, 3, num_frames, 100, 140)
    features = features_of(model, clips)
    local = model(clips, window=(2, 3))
    _, _, _, map_height, map_width = features.shape
    assert local.shape == (2, 5, 1, map_height - 1, map_width - 2)
    for row in range(map_height - 1):
        for column in range(map_width - 2):
            pooled = features[:, :, :, row : row + 2, column : column + 3].mean((2, 3, 4))
            torch.testing.assert_close(local[:, :, 0, row, column], model.head.linear(pooled))


def test_interior_local_logits_are_translation_equivariant():
    """A local logit depends only on its receptive field if the norm acts on each position."""
    torch.manual_seed(0)
    model = i3d_tiny("frozen_bn", num_classes=5, inflate=False).eval()
    clips = torch.zeros(1, 3, 16, 352, 352)
    clips[..., 128:224, 128:224] = torch.randn(1, 3, 16, 96, 96)
    shifted = torch.zeros_like(clips)
    shifted[..., 96:192, 128:224] = clips[..., 128:224, 128:224]
    local, moved = model(clips, window=(1, 1)), model(shifted, window=(1, 1))
    # Away from the borders, shifting the clip by the stride of 32 shifts the logits by one.
    torch.testing.assert_close(local[..., 4:8, 3:8], moved[..., 3:7, 3:8])
    assert (local[..., 4:8, 3:8] - local[..., 3:7, 3:8]).abs().max() > 1e-3


def test_wrong_clips_are_an_error():
    model = i3d_tiny(num_classes=5).eval()
    with pytest.raises(ValueError, match=r"\(2, 1, 16, 56, 56\)"):
        model(torch.randn(2, 1, 16, 56, 56))
    with pytest.raises(ValueError, match=r"\(3, 16, 56, 56\)"):
        model(torch.randn(3, 16, 56, 56))
    with pytest.raises(ValueError, match="torch.uint8"):
        model(torch.zeros(2, 3, 16, 56, 56, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"window=\(7, 7\) does not fit the 2x2"):
        model(torch.randn(2, 3, 16, 56, 56), window=(7, 7))
    for window in ((0, 1), (1, 0), (1, 3), (3, 1)):
        with pytest.raises(ValueError, match=r"window=\(\d, \d\) does not fit"):
            model(torch.randn(2, 3, 16, 56, 56), window=window)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stem": "short"},
            r"stem 'short' is unknown; choose one of \('strided', '8x8', 'mmaction2'\)",
        ),
        ({"pool_padding": 2}, "pool_padding 2"),
        ({"stride_in": "7x7"}, "stride_in '7x7'"),
        ({"norm": "group"}, "norm 'group' is unknown"),
        ({"checkpoint_stages": ("res1",)}, "'res1' is unknown.*res5"),
    ],
)
def test_wrong_options_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        i3d_tiny(**options)


def train_step(model, clips, labels):
    torch.manual_seed(1)
    loss = F.cross_entropy(model.train()(clips), labels)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("norm", ["gn", "bn", "frozen_bn"])
@pytest.mark.parametrize("stages", [("res2",), ("res2", "res3", "res4", "res5")])
def test_checkpointing_is_bit_identical(norm, stages):
    torch.manual_seed(0)
    plain = i3d_tiny(norm, num_classes=3)
    recomputing = i3d_tiny(norm, num_classes=3, checkpoint_stages=stages)
    recomputing.load_state_dict(plain.state_dict())
    clips, labels = torch.randn(2, 3, 16, 56, 56), torch.arange(2)
    for _ in range(2):
        loss, grads = train_step(plain, clips, labels)
        other_loss, other_grads = train_step(recomputing, clips, labels)
        assert torch.equal(loss, other_loss)
        assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
    # Recomputation must not update running statistics and batch counts again.
    state, other_state = plain.state_dict(), recomputing.state_dict()
    assert all(torch.equal(state[key], other_state[key]) for key in state)
    if norm == "bn":
        assert recomputing.res2[0].norm1.num_batches_tracked == 2
        assert recomputing.res2[0].norm1.track_running_stats


@pytest.mark.slow
# Dynamo reads .grad when it resumes after a graph break, which checkpoints of batch norm cause.
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("norm", ["gn", "bn"])
@pytest.mark.parametrize("stages", [(), ("res2", "res4")])
def test_compiled_step_equals_eager(norm, stages):
    """Traced, differentiated and run as a graph; no code is generated."""
    torch.manual_seed(0)
    eager = i3d_tiny(norm, num_classes=3, checkpoint_stages=stages, zero_init_last_norm=False)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="aot_eager")
    clips, labels = torch.randn(2, 3, 16, 56, 56), torch.arange(2)
    loss, grads = train_step(eager, clips, labels)
    other_loss, other_grads = train_step(compiled, clips, labels)
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_grads, grads)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())


def test_checkpointing_saves_fewer_activations():
    def saved_bytes(model):
        saved = 0

        def pack(tensor):
            nonlocal saved
            saved += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(1, 3, 16, 56, 56))
        return saved

    names = ("res2", "res3", "res4", "res5")
    assert saved_bytes(i3d_tiny(checkpoint_stages=names)) < 0.6 * saved_bytes(i3d_tiny())


def test_channels_last_autocast_and_deepcopy():
    torch.manual_seed(0)
    model = i3d_tiny(num_classes=5).eval()
    nn.init.normal_(model.head.linear.weight)
    clips = torch.randn(2, 3, 16, 56, 56)
    expected = model(clips)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last_3d)
    output = last(clips.to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = last(clips)
    assert low.dtype == torch.bfloat16
    assert F.cosine_similarity(low.float().flatten(), expected.flatten(), dim=0) > 0.999


@pytest.mark.parametrize(("norm", "is_same"), [("gn", True), ("bn", False)])
def test_clip_in_training_alone_and_in_a_batch(norm, is_same):
    torch.manual_seed(0)
    model = i3d_tiny(norm=norm, num_classes=4, dropout=0.0, zero_init_last_norm=False)
    clips = torch.randn(3, 3, 8, 64, 64) + torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1, 1)
    with torch.no_grad():
        together = model.pooled_features(clips)
        alone = torch.cat([model.pooled_features(clip[None]) for clip in clips])
    assert torch.allclose(alone, together, rtol=1e-4, atol=1e-5) == is_same
