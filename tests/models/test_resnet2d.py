from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from i3d_gn.models.resnet2d import ResNet2d, resnet50, resnet101, resnet_tiny
from i3d_gn.norm import GroupNorm, make_norm
from tests.models.conftest import assert_initialized


def on_meta(make, *args, **kwargs):
    with torch.device("meta"):
        return make(*args, **kwargs)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(resnet50, torchvision.models.resnet50), (resnet101, torchvision.models.resnet101)],
)
def test_parameter_shapes_equal_torchvision(ours, theirs):
    for norm in ("gn", "bn"):
        shapes = [tuple(p.shape) for p in on_meta(ours, norm).parameters()]
        assert sorted(shapes) == sorted(tuple(p.shape) for p in on_meta(theirs).parameters())
    assert sum(p.numel() for p in on_meta(resnet50).parameters()) == 25_557_032


def test_initialization():
    model = resnet50(num_classes=400)
    assert_initialized(model)
    ones = resnet_tiny(zero_init_last_norm=False)
    assert all(torch.equal(b.norm3.weight, torch.ones(64)) for b in ones.res2)
    # A frozen gamma of 0 could never change.
    assert resnet_tiny("frozen_bn").res2[0].norm3.weight.min() == 1


def test_stride_placement():
    for options, strides in (({}, (1, 2)), ({"stride_in": "1x1"}, (2, 1))):
        model = on_meta(resnet50, **options)
        for stage, spatial_stride in ((model.res2, 1), (model.res3, 2), (model.res5, 2)):
            expected = strides if spatial_stride == 2 else (1, 1)
            assert (stage[0].conv1.stride[0], stage[0].conv2.stride[0]) == expected
            assert stage[0].shortcut_conv.stride == (spatial_stride, spatial_stride)
            assert (stage[1].conv1.stride, stage[1].conv2.stride) == ((1, 1), (1, 1))


def test_norm_by_name_or_function():
    tiny = resnet_tiny()
    assert (tiny.norm1.num_groups, tiny.norm1.num_channels) == (8, 16)
    assert resnet_tiny("ln").norm1.num_groups == 1
    assert type(resnet_tiny("bn").res5[0].shortcut_norm) is nn.BatchNorm2d
    model = on_meta(resnet50, partial(make_norm, "gn", channels_per_group=16))
    norms = [m for m in model.modules() if isinstance(m, GroupNorm)]
    assert {m.num_channels // m.num_groups for m in norms} == {16}


def test_options():
    model = on_meta(ResNet2d, (1, 2, 3, 1), num_classes=7, width=32)
    assert [len(stage) for stage in (model.res2, model.res3, model.res4, model.res5)] == [
        1,
        2,
        3,
        1,
    ]
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)
    assert model.head.linear.in_features == 32 * 32
    assert all(block.recompute for block in model.res4)
