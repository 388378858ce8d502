import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from pytorchvideo.models import hub
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torchvision.models import video as torchvision_video
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.v2 import Normalize

from i3d_gn.models import i3d_tiny
from i3d_gn.norm import (
    BatchRenorm,
    FrozenBatchNorm,
    GroupNorm,
    SplitBatchNorm,
    fold_norm,
    make_norm,
    replace_norm,
)

timm = pytest.importorskip("timm")

TORCHVISION = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")
PYTORCHVIDEO = ("slow_r50", "x3d_xs", "slowfast_r50")
TIMM = ("resnet18", "efficientnet_lite0", "densenet121", "regnetx_002", "mobilenetv3_small_050")


def make_network(library, name):
    """A network of another library, and an input."""
    torch.manual_seed(0)
    if library == "torchvision":
        network = getattr(torchvision_video, name)(num_classes=5)
        if name == "s3d":  # its pooling has a fixed size, so compare what comes before
            network.avgpool = nn.AdaptiveAvgPool3d(1)
        return network, (
            torch.randn(1, 3, 16, 64, 64) if name == "s3d" else torch.randn(1, 3, 4, 32, 32),
        )
    if library == "timm":
        return timm.create_model(name, num_classes=5), (torch.randn(1, 3, 48, 48),)
    network = getattr(hub, name)(model_num_class=5)
    # The pooling of the heads has a fixed size, so compare what comes before.
    network.blocks[-1] = nn.Identity()
    if name == "slowfast_r50":
        network.blocks[-2] = nn.Identity()
        return network, ([torch.randn(1, 3, 2, 32, 32), torch.randn(1, 3, 8, 32, 32)],)
    return network, (torch.randn(1, 3, 4, 32, 32),)


def flat(outputs):
    return torch.cat([y.flatten() for y in (outputs if isinstance(outputs, list) else [outputs])])


def twin_with_torch_group_norm(network):
    """The same network, by a second way: the forward of every norm becomes F.group_norm."""
    twin = copy.deepcopy(network)

    def as_group_norm(layer):
        groups = max(g for g in range(1, 33) if layer.num_features % g == 0)

        def forward(x):
            y = F.group_norm(x.contiguous(), groups, layer.weight, layer.bias, layer.eps)
            return layer.act(layer.drop(y)) if hasattr(layer, "act") else y

        layer.forward = forward

    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            as_group_norm(module)
    return twin


@pytest.mark.parametrize(
    ("library", "name"),
    [
        (library, name)
        for library, names in (
            ("torchvision", TORCHVISION), ("pytorchvideo", PYTORCHVIDEO), ("timm", TIMM),
        )
        for name in names
    ],
)  # fmt: skip
def test_networks_of_other_libraries(library, name):
    network, inputs = make_network(library, name)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, _BatchNorm)}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.copy_(torch.rand(layer.num_features, generator=generator) + 0.5)
            layer.bias.copy_(torch.randn(layer.num_features, generator=generator) * 0.1)
    network.eval()
    num_parameters = sum(p.numel() for p in network.parameters())
    names = [n for n, _ in network.named_parameters()]
    with torch.no_grad():
        expected = flat(twin_with_torch_group_norm(network)(*copy.deepcopy(inputs)))

    report = replace_norm(network, "gn", copy_affine=True)

    assert [layer.name for layer in report.replaced] == list(layers)
    assert not report.skipped
    assert not any(isinstance(m, _BatchNorm) for m in network.modules())
    assert all(type(network.get_submodule(n)) is GroupNorm for n in layers)
    assert sum(p.numel() for p in network.parameters()) == num_parameters
    assert [n for n, _ in network.named_parameters()] == names
    indivisible = [n for n, m in layers.items() if m.num_features % 32]
    assert list(report.adjusted) == indivisible
    with torch.no_grad():
        actual = flat(network(*inputs))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.std().item())
    # A state dict of the replaced network fits one that is replaced afterwards.
    with torch.device("meta"):
        other, _ = make_network(library, name)
    replace_norm(other, "gn")
    other.load_state_dict(network.state_dict(), assign=True)
    for (key, a), b in zip(other.state_dict().items(), network.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize(
    ("library", "name"),
    [
        *((torchvision_video, n) for n in (
            "mvit_v1_b", "mvit_v2_s", "swin3d_t", "swin3d_s", "swin3d_b",
        )),
        *((hub, n) for n in (
            "c2d_r50", "i3d_r50", "csn_r101", "r2plus1d_r50", "x3d_s", "x3d_m", "x3d_l",
            "slow_r50_detection", "slowfast_r101", "slowfast_16x8_r101_50_50",
            "slowfast_r50_detection", "efficient_x3d_xs", "efficient_x3d_s",
        )),
    ],
)  # fmt: skip
def test_larger_networks_by_their_structure(library, name):
    """On the meta device: names, parameters and what is left, without any values."""
    with torch.device("meta"):
        network = getattr(library, name)()
    layers = [n for n, m in network.named_modules() if isinstance(m, _BatchNorm)]
    layer_norms = sum(isinstance(m, nn.LayerNorm) for m in network.modules())
    parameters = {n: p.shape for n, p in network.named_parameters()}
    report = replace_norm(network, "gn", channels_per_group=16)
    assert [layer.name for layer in report.replaced] == layers
    assert {n: p.shape for n, p in network.named_parameters()} == parameters
    assert sum(report.unchanged.values()) == layer_norms
    assert bool(layers) != name.startswith(("mvit", "swin"))
    assert not any(isinstance(m, _BatchNorm) for m in network.modules())


class Small(nn.Module):
    """A norm of each kind, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 48, 1)
        self.norms = nn.ModuleDict(
            {
                "batch": nn.BatchNorm3d(48, eps=1e-3, momentum=0.2),
                "sync": nn.SyncBatchNorm(48),
                "instance": nn.InstanceNorm3d(48),
                "affine_instance": nn.InstanceNorm3d(48, affine=True),
                "frozen": FrozenBatchNorm(48),
                "renorm": BatchRenorm(48),
                "split": SplitBatchNorm(48, 2),
            }
        )
        self.again = self.norms["batch"]
        self.image_norm = FrozenBatchNorm2d(48)
        self.layer_norm = nn.LayerNorm(48)

    def forward(self, x):
        x = self.again(self.conv(x))
        for name, norm in self.norms.items():
            if name != "sync":
                x = norm(x)
        x = self.image_norm(x.mean(2))
        return self.layer_norm(x.mean((2, 3)))


NORM_NAMES = ("batch", "sync", "instance", "affine_instance", "frozen", "renorm", "split")


def test_every_kind_of_norm_is_replaced_and_shared_layers_stay_shared():
    model = Small()
    report = replace_norm(model, "gn", num_groups=20)
    assert [layer.name for layer in report.replaced] == [
        *(f"norms.{name}" for name in NORM_NAMES), "again", "image_norm",
    ]  # fmt: skip
    assert model.again is model.norms["batch"]
    assert all(m.num_groups == 16 for m in model.norms.values())  # 20 does not divide 48
    assert len(report.adjusted) == 9
    assert model.norms["batch"].eps == 1e-3
    assert model.norms["instance"].weight is None
    assert model.norms["affine_instance"].weight is not None
    assert report.unchanged == {"LayerNorm": 1}
    text = str(report)
    assert "2 BatchNorm3d -> GroupNorm" in text
    assert "9 of them with 16 groups for their 48 channels" in text
    assert "1 LayerNorm unchanged" in text
    model(torch.randn(2, 3, 2, 4, 4)).sum().backward()
    assert str(replace_norm(model, "gn")).startswith("no layer replaced; 8 GroupNorm unchanged")


@pytest.mark.parametrize("norm", ["bn", "sync_bn", "frozen_bn", "brn", "ln", "in", "none"])
def test_every_norm_by_name(norm):
    kinds = {
        "bn": nn.BatchNorm3d, "sync_bn": nn.SyncBatchNorm, "frozen_bn": FrozenBatchNorm,
        "brn": BatchRenorm, "ln": GroupNorm, "in": GroupNorm, "none": nn.Identity,
    }  # fmt: skip
    model = Small()
    with torch.no_grad():
        for buffer in model.again.buffers():
            buffer.add_(1)
    statistics = [b.clone() for b in (model.again.running_mean, model.again.running_var)]
    keeps = norm in ("bn", "sync_bn", "frozen_bn", "brn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = replace_norm(model, norm)
    assert bool(caught) == (not keeps)
    skipped = {"norms.instance", "norms.affine_instance"} if norm == "frozen_bn" else set()
    assert set(report.skipped) == skipped
    for name in NORM_NAMES:
        if f"norms.{name}" not in skipped:
            assert type(model.norms[name]) is kinds[norm], name
    if keeps:
        assert torch.equal(model.again.running_mean, statistics[0])
        assert torch.equal(model.again.running_var, statistics[1])
    if norm in ("bn", "sync_bn"):
        assert model.norms["instance"].weight is None
        assert model.again.momentum == 0.2
    if norm != "sync_bn":
        model.train()(torch.randn(2, 3, 2, 4, 4))


def test_batch_norm_stays_the_same_function_in_evaluation():
    model = nn.Sequential(nn.Conv3d(3, 8, 1), nn.BatchNorm3d(8, eps=1e-2), nn.ReLU())
    x = torch.randn(4, 3, 2, 3, 3)
    nn.init.normal_(model[1].weight)
    model(x)  # updates running statistics
    expected = model.eval()(x)
    for options in (
        {"norm": "frozen_bn"}, {"norm": "bn"}, {"norm": "brn"}, {"norm": "sync_bn"},
        {"norm": "bn", "stats_batch_size": 2},
    ):  # fmt: skip
        replace_norm(model, **options)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert type(model[1]) is SplitBatchNorm
    assert model[1].num_batches_tracked == 0  # a frozen batch norm does not count


def test_warning_of_statistics_that_group_norm_cannot_use():
    model = nn.Sequential(nn.Conv3d(3, 8, 1), nn.BatchNorm3d(8))
    untrained = copy.deepcopy(model)
    model(torch.randn(2, 3, 2, 3, 3))
    with pytest.warns(UserWarning, match=r"1 batch norms had running statistics.*'gn' does not"):
        report = replace_norm(model, "gn")
    assert "must be trained further" in str(report)
    assert replace_norm(untrained, "gn").notes == ()


def test_affine_is_kept_on_request_as_the_same_parameter():
    for copy_affine in (False, True):
        model = nn.Sequential(nn.Conv3d(3, 8, 1), nn.BatchNorm3d(8))
        nn.init.constant_(model[1].weight, 0.0)
        model[1].bias.requires_grad_(False)
        old = model[1].weight
        replace_norm(model, "gn", copy_affine=copy_affine)
        assert (model[1].weight is old) == copy_affine
        assert model[1].weight.eq(0.0 if copy_affine else 1.0).all()
        assert not model[1].bias.requires_grad


def test_device_dtype_mode_and_hooks_are_kept():
    model = nn.Sequential(nn.BatchNorm3d(8), nn.BatchNorm3d(8)).to(torch.bfloat16)
    model[0].eval()
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    replace_norm(model, "gn")
    assert model[0].weight.dtype == torch.bfloat16
    assert (model[0].training, model[1].training) == (False, True)
    x = torch.randn(2, 8, 2, 3, 3)
    model(x.to(torch.bfloat16))
    assert calls == ["pre", "forward"]
    handle.remove()
    model(x.to(torch.bfloat16))
    assert calls == ["pre", "forward", "pre"]
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm3d(8))
    replace_norm(model, "frozen_bn")
    assert model[0].weight.is_meta


def test_activations_inside_timm_layers_survive_copies_and_a_second_swap():
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(BatchNormAct2d(8))
    x = torch.randn(2, 8, 5, 5)
    expected = F.group_norm(x, 8).relu()
    replace_norm(model, "frozen_bn")
    torch.testing.assert_close(model(x), (x / (1 + 1e-5) ** 0.5).relu())
    replace_norm(model, "gn")
    for network in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.compile(model, backend="aot_eager")(x), model(x))


class RmsNorm2d(nn.Module):
    """A norm that no class of torch is a base of, with an activation, as timm's RmsNormAct2d."""

    def __init__(self):
        super().__init__()
        self.weight, self.act = nn.Parameter(torch.ones(8)), nn.ReLU()

    def forward(self, x):
        return self.act(x * self.weight[:, None, None] / x.square().mean(1, True).sqrt())


class InplaceAbn(nn.Module):
    """Batch norm of another library by its buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_var", torch.ones(8))


class ConvNormAct(nn.Sequential):
    """A block: not itself a norm."""


def test_norms_of_other_libraries_are_named_in_the_report():
    model = nn.Sequential(
        ConvNormAct(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), RmsNorm2d(), InplaceAbn(),
        # These are no layers that normalize features.
        Normalize([0.5], [0.5]), parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        parametrizations.spectral_norm(nn.Linear(8, 8)),
    )  # fmt: skip
    report = replace_norm(model, "gn")
    assert [layer.name for layer in report.replaced] == ["0.1"]
    assert report.unchanged == {"RmsNorm2d": 1, "InplaceAbn": 1}


def test_axes_and_channels_per_group():
    model = nn.Sequential(nn.BatchNorm3d(24), nn.InstanceNorm3d(24))
    report = replace_norm(model, "gn", channels_per_group=16, over="hw")
    assert [(m.num_groups, m.over) for m in model] == [(2, "hw")] * 2  # 12 channels per group
    assert report.adjusted == ("0", "1")
    model = nn.Sequential(nn.BatchNorm3d(24), nn.BatchNorm2d(24))
    report = replace_norm(model, "ln", over="causal")
    assert model[0].over == "causal"
    assert "need (T, H, W)" in report.skipped["1"]


class WithSubmodule(nn.BatchNorm3d):
    def __init__(self):
        super().__init__(8)
        self.gate = nn.Linear(1, 1)


def test_layers_that_cannot_be_replaced_are_reported():
    model = nn.Sequential(WithSubmodule(), nn.BatchNorm3d(8), nn.SyncBatchNorm(8))
    nn.utils.parametrizations.weight_norm(model[1])
    report = replace_norm(model, "gn")
    assert set(report.skipped) == {"0", "1"}
    assert "gate" in report.skipped["0"]
    assert "skipped 1: its parameters are parametrized" in str(report)
    assert "unknown" in replace_norm(nn.Sequential(nn.SyncBatchNorm(8)), "bn").skipped["0"]


def test_errors_leave_the_network_unchanged():
    model = nn.Sequential(nn.BatchNorm3d(8))
    for arguments, message in (
        ({"norm": "gm"}, "'gm' is unknown"),
        ({"norm": "bn", "num_groups": 4}, "do not set them for 'bn'"),
        ({"norm": "gn", "num_groups": 4, "channels_per_group": 2}, "give one of them"),
        ({"norm": "gn", "num_groups": -1}, "num_groups=-1"),
        ({"norm": "bn", "over": "hw"}, "do not set it for 'bn'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace_norm(model, **arguments)
    assert type(model[0]) is nn.BatchNorm3d
    with pytest.raises(ValueError, match="itself a BatchNorm3d"):
        replace_norm(model[0], "gn")
    with pytest.raises(ValueError, match="run the network once"):
        replace_norm(nn.Sequential(nn.LazyBatchNorm3d()), "gn")
    with pytest.raises(ValueError, match="before wrapping"):
        replace_norm(nn.DataParallel(model), "gn")


@pytest.mark.parametrize("name", ["r3d_18", "s3d", "resnet18", "efficientnet_lite0", "densenet121"])
def test_fold_norm_computes_the_same(name):
    library = "timm" if name in TIMM else "torchvision"
    network, inputs = make_network(library, name)
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    network.double().eval()
    inputs = [x.double() for x in inputs]
    with torch.no_grad():
        expected = network(*inputs)
    num_norms = sum(isinstance(m, _BatchNorm) for m in network.modules())
    report = fold_norm(network, *inputs)
    with torch.no_grad():
        torch.testing.assert_close(network(*inputs), expected, rtol=1e-9, atol=1e-9)
    left = sum(isinstance(m, _BatchNorm) for m in network.modules())
    assert len(report.folded) == num_norms - left
    assert len(report.skipped) == left
    if name == "densenet121":  # norms there come before convolutions and read concatenations
        assert 0 < len(report.folded) < num_norms
    else:
        assert left == 0


def test_fold_norm_of_i3d_with_frozen_batch_norm():
    model = i3d_tiny("frozen_bn", num_classes=3).eval()
    for layer in model.modules():
        if isinstance(layer, FrozenBatchNorm):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    clips = torch.randn(2, 3, 8, 33, 33)
    with torch.no_grad():
        expected = model(clips)
        report = fold_norm(model, clips)
        torch.testing.assert_close(model(clips), expected, rtol=1e-4, atol=1e-5)
        low = model.to(torch.bfloat16)(clips.to(torch.bfloat16)).float()
    torch.testing.assert_close(low, expected, rtol=0.1, atol=0.05)
    assert len(report.folded) == 17
    assert not report.skipped
    assert str(report) == "17 batch norms folded into convolutions"


class Unfoldable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv3d(3, 3, 1), nn.BatchNorm3d(3)
        self.conv2, self.norm2 = nn.Conv3d(3, 3, 1), nn.BatchNorm3d(3)
        self.conv3, self.norm3 = nn.Conv3d(3, 3, 1), nn.BatchNorm3d(3)
        self.conv4, self.norm4 = nn.ConvTranspose3d(3, 3, 1), nn.BatchNorm3d(3)
        self.norm5, self.norm6 = nn.BatchNorm3d(3), nn.BatchNorm3d(3)
        self.conv7, self.norm7 = Standardized(3, 3, 1), nn.BatchNorm3d(3)

    def forward(self, x):
        y = self.conv1(x)
        x = self.norm1(y) + y  # read by a sum too
        x = self.norm2(self.conv2(self.conv2(x)))  # called twice
        y = self.conv3(x)
        y.relu_()  # modified in between
        x = self.norm5(self.norm4(self.conv4(self.norm3(y))))
        return self.norm7(self.conv7(x))


class Standardized(nn.Conv3d):
    def forward(self, input):
        return F.conv3d(input, self.weight / self.weight.norm(), self.bias)


def test_fold_norm_leaves_what_would_not_be_exact():
    torch.manual_seed(0)
    model = Unfoldable().double()
    clips = torch.randn(2, 3, 2, 4, 4).double()
    model(clips)
    assert "training mode" in fold_norm(model, clips).skipped["norm4"]
    expected = model.eval()(clips)
    report = fold_norm(model, clips)
    assert dict(report.folded) == {"norm4": "conv4"}
    reasons = {
        "norm1": "used elsewhere", "norm2": "called 2 times", "norm3": "used elsewhere",
        "norm5": "not the result of a convolution", "norm6": "called 0 times",
        "norm7": "does more than a convolution",
    }  # fmt: skip
    assert set(report.skipped) == set(reasons)
    for name, reason in reasons.items():
        assert reason in report.skipped[name]
    torch.testing.assert_close(model(clips), expected)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).bfloat16().eval()
    report = fold_norm(model, torch.randn(1, 3, 4, 4).bfloat16())
    assert "round the weights" in report.skipped["1"]


def test_number_of_groups_of_make_norm_equals_that_of_the_report():
    model = nn.Sequential(nn.BatchNorm3d(64), nn.BatchNorm3d(96))
    report = replace_norm(model, "gn")
    assert [layer.num_groups for layer in report.replaced] == [32, 32]
    assert make_norm("gn", 96).num_groups == 32
    assert report.adjusted == ()
