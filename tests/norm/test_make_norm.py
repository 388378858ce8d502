import pytest
import torch
import torch.nn.functional as F
from torch import nn

from i3d_gn.norm import BatchRenorm, FrozenBatchNorm, GroupNorm, make_norm


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gn", GroupNorm),
        ("bn", nn.BatchNorm3d),
        ("sync_bn", nn.SyncBatchNorm),
        ("frozen_bn", FrozenBatchNorm),
        ("ln", GroupNorm),
        ("in", GroupNorm),
        ("brn", BatchRenorm),
        ("none", nn.Identity),
    ],
)
def test_layer_types(name, kind):
    layer = make_norm(name, 64, eps=1e-3)
    assert type(layer) is kind
    if name != "none":
        assert layer.eps == 1e-3
    x = torch.randn(2, 64, 2, 3, 5)
    if name != "sync_bn":
        assert layer(x).shape == x.shape


def test_number_of_groups():
    assert make_norm("gn", 64).num_groups == 32
    assert make_norm("gn", 64, num_groups=4).num_groups == 4
    assert make_norm("gn", 64, channels_per_group=4).num_groups == 16
    assert make_norm("ln", 64).num_groups == 1
    assert make_norm("in", 64).num_groups == 64


def test_options_of_batch_renorm():
    def options(layer):
        return layer.r_max, layer.d_max, layer.schedule, layer.stats_batch_size

    assert (
        options(make_norm("brn", 4))
        == options(BatchRenorm(4))
        == (3, 5, (5000, 40_000, 25_000), None)
    )
    assert options(make_norm("brn", 4, r_max=1.5)) == (1.5, 5, None, None)
    assert options(make_norm("brn", 4, d_max=0.5, stats_batch_size=2)) == (3, 0.5, None, 2)
    assert options(make_norm("brn", 4, schedule=(1, 2, 3))) == (3, 5, (1, 2, 3), None)
    assert options(make_norm("brn", 4, stats_batch_size=2)) == (*options(BatchRenorm(4))[:3], 2)


def test_statistics_of_each_norm():
    x = torch.randn(3, 64, 2, 4, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    expected = {
        "gn": F.group_norm(x, 32),
        "bn": F.batch_norm(x, None, None, training=True),
        "ln": F.layer_norm(x, x.shape[1:]),
        "in": F.instance_norm(x),
        "frozen_bn": x / (1 + 1e-5) ** 0.5,
        "none": x,
    }
    for name, wanted in expected.items():
        torch.testing.assert_close(make_norm(name, 64)(x), wanted, rtol=1e-5, atol=1e-5)


def test_layers_for_images():
    x = torch.randn(2, 32, 3, 5)
    for name in ("gn", "bn", "frozen_bn", "ln", "in", "brn", "none"):
        assert make_norm(name, 32, spatial_dims=2)(x).shape == x.shape
    assert type(make_norm("bn", 32, spatial_dims=2)) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gm"}, r"'gm' is unknown.*gn, bn, sync_bn, frozen_bn, ln, in, brn, none"),
        ({"name": "GN", "num_groups": 4}, r"'GN' is unknown.*gn, bn"),
        ({"name": "gn", "num_groups": 7}, r"num_channels=64.*num_groups=7.*divisors"),
        ({"name": "gn", "num_groups": 0}, "num_groups=0"),
        ({"name": "gn", "channels_per_group": 48}, "channels_per_group=48"),
        ({"name": "gn", "num_groups": 4, "channels_per_group": 16}, "give one of them"),
        ({"name": "bn", "num_groups": 4}, "do not set them for 'bn'"),
        ({"name": "ln", "channels_per_group": 4}, "do not set them for 'ln'"),
        ({"name": "bn", "spatial_dims": 1}, "spatial_dims=1"),
        ({"name": "bn", "r_max": 2.0}, "do not set them for 'bn'"),
        ({"name": "gn", "d_max": 2.0}, "do not set them for 'gn'"),
        ({"name": "sync_bn", "schedule": (1, 2, 3)}, "do not set them for 'sync_bn'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_norm(num_channels=64, **arguments)


def test_default_groups_need_divisible_channels():
    with pytest.raises(ValueError, match=r"num_channels=48.*num_groups=32"):
        make_norm("gn", 48)
