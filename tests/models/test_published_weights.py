import pytest
import torch
from torch import nn

from i3d_gn.models import i3d_resnet50
from i3d_gn.weights.read import read_weights


def randomized(network):
    """Random parameters and statistics of batch norms that keep the logits of order 1."""
    generator = torch.Generator().manual_seed(1)

    def uniform(like, low, high):
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.weight.copy_(uniform(module.weight, 0.4, 0.8))
                module.bias.copy_(uniform(module.bias, -0.2, 0.2))
                module.running_mean.copy_(uniform(module.bias, -0.2, 0.2))
                module.running_var.copy_(uniform(module.bias, 0.5, 1.5))
    return network.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["i3d_r50", "c2d_r50"])
def test_logits_equal_pytorchvideo(name):
    import pytorchvideo.models.hub as hub

    torch.manual_seed(0)
    reference = randomized(getattr(hub, name)(pretrained=False))
    ours = i3d_resnet50("bn", stem="8x8", pool_padding=1, inflate=name == "i3d_r50").eval()
    ours.load_state_dict(read_weights(reference.state_dict()).tensors)
    # 193 pixels give the 7 x 7 map of the head's pooling window. 260 pixels give 9 x 9, where the
    # head averages the logits of all windows.
    for height, width in ((193, 193), (193, 260)):
        clips = torch.randn(1, 3, 8, height, width)
        with torch.no_grad():
            expected = reference(clips)
            local = ours(clips, window=(7, 7))
        assert 0.1 < expected.std() < 10
        torch.testing.assert_close(local.mean((2, 3, 4)), expected, rtol=0, atol=1e-4)
        if height == width:
            with torch.no_grad():
                torch.testing.assert_close(ours(clips), expected, rtol=0, atol=1e-4)


def test_tensor_names():
    import pytorchvideo.models.hub as hub

    with torch.device("meta"):
        theirs = hub.i3d_r50(pretrained=False).state_dict()
        ours = i3d_resnet50("bn", stem="8x8").state_dict()
    renamed = read_weights(theirs).tensors
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in ours.items()}


@pytest.mark.parametrize("key", ["blocks.2.weight", "blocks.1.res_blocks.0.x.weight"])
def test_unknown_names(key):
    state = {"blocks.0.conv.weight": torch.zeros(1), key: torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"those of pytorchvideo.*: unknown tensors {key}"):
        read_weights(state)
