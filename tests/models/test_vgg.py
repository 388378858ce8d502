import pytest
import torch
import torchvision
from torch import nn

from i3d_gn.models.vgg import VGG16
from i3d_gn.norm import GroupNorm


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return VGG16("none", 5, dropout=0.25)


def test_parameter_count_equals_torchvision():
    with torch.device("meta"):
        ours = {norm: VGG16(norm) for norm in ("none", "bn", "gn")}
        theirs = {"none": torchvision.models.vgg16(), "bn": torchvision.models.vgg16_bn()}
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in ours.items()}
    assert count["none"] == 138_357_544
    for norm, model in theirs.items():
        assert count[norm] == sum(p.numel() for p in model.parameters())
    assert count["gn"] == count["bn"]
    assert {m.num_groups for m in ours["gn"].modules() if isinstance(m, GroupNorm)} == {32}
    assert type(ours["bn"].conv1_1.norm) is nn.BatchNorm2d


def test_initialization(network):
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            std = (2 / (9 * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(std, rel=0.06), name
        elif isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.02), name
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert torch.equal(module.bias, torch.zeros_like(module.bias))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_after_both_hidden_layers(network, training):
    inputs, hooks = [], []
    for layer, following in ((network.fc6, network.fc7), (network.fc7, network.fc8)):
        hooks.append(layer.register_forward_hook(lambda _m, _x, y: torch.ones_like(y)))
        hooks.append(following.register_forward_pre_hook(lambda _m, x: inputs.append(x[0])))
    with torch.no_grad():
        network.train(training)(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    for values in inputs:
        kept = values[values != 0]
        assert len(kept) / values.numel() == pytest.approx(0.75 if training else 1, abs=0.03)
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.75 if training else 1))
    assert len(inputs) == 2


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_image_sizes(network, size):
    assert network.eval()(torch.zeros(2, 3, *size)).shape == (2, 5)
