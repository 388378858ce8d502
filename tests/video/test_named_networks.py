"""Networks of torchvision and pytorchvideo by name: built, trained, tested, loaded."""

from typing import get_args, get_type_hints

import pytest
import torch
from pytorchvideo.models import hub
from torch import nn
from torchvision.models import video as torchvision_video

from i3d_gn.engine.cuda_graphs import launch_as_graphs
from i3d_gn.engine.typed_config import ConfigError, load_typed, to_yaml
from i3d_gn.models.pytorchvideo_networks import PytorchvideoName, SlowFast
from i3d_gn.models.torchvision_video import TorchvisionName
from i3d_gn.norm import BatchRenorm, FrozenBatchNorm, GroupNorm
from i3d_gn.video import build
from i3d_gn.video.config import Config, ModelConfig, load_config
from i3d_gn.video.named_networks import is_adapted

CPU, META = torch.device("cpu"), torch.device("meta")
NAMES = (*get_args(TorchvisionName), *get_args(PytorchvideoName))
# Frames and pixels of a clip that is as small as the network allows.
SMALL = {"s3d": (8, 32), "slowfast_r50": (8, 32), "r3d_18": (4, 16), "x3d_xs": (2, 32)}


def config_of(tmp_path, *overrides) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(
        "output_dir: out\ndata: {train_index: a.parquet, val_index: b.parquet}\n"
        "train: {steps: 2, lr: 0.1, global_batch_size: 8}\nmodel: {num_classes: 5}\n"
    )
    return load_config(path, overrides)


def small(name):
    num_frames, size = SMALL.get(name, (4, 32))
    return (
        f"model.name={name}", f"clip.num_frames={num_frames}", "clip.stride=1",
        f"clip.crop_size={size}", f"clip.short_side_min={size}", f"clip.short_side_max={size}",
        f"test.short_side={size}",
    )  # fmt: skip


def test_the_config_names_the_networks_of_the_adapters():
    assert [
        name for name in get_args(get_type_hints(ModelConfig)["name"]) if is_adapted(name)
    ] == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_the_published_network(name, tmp_path):
    """Its clip and crop give logits, and group norm costs as many parameters as batch norm."""
    config = config_of(tmp_path, f"model.name={name}")
    with torch.device("meta"):
        model = build.build_model(config, META)
        clip = config.clip
        clips = torch.empty(2, 3, clip.num_frames, clip.crop_size, clip.crop_size)
        assert model.eval()(clips).shape == (2, 5)
        features = model.pooled_features(clips)
        assert features.shape == (2, model.classifier().weight.shape[1])
        library = torchvision_video if name in get_args(TorchvisionName) else hub
        theirs = getattr(library, name)(
            **{"num_classes" if library is torchvision_video else "model_num_class": 5}
        )
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    names = {f"net.{n}" for n, _ in theirs.named_parameters()}
    assert {n for n, _ in model.named_parameters()} == names
    assert any(isinstance(m, GroupNorm) for m in model.modules())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert config.test.spatial == "three_crop"
    assert config.data.mean == (
        (0.43216, 0.394666, 0.37645) if library is torchvision_video else (0.45, 0.45, 0.45)
    )


def test_values_that_the_config_sets_stay(tmp_path):
    config = config_of(tmp_path, "model.name=x3d_s", "clip.num_frames=7", "data.mean=[0.5,0.5,0.5]")
    assert (config.clip.num_frames, config.clip.stride, config.clip.crop_size) == (7, 6, 160)
    assert config.data.mean == (0.5, 0.5, 0.5)
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config))
    assert load_typed(path, (), Config, lambda *_: None) == config
    assert config_of(tmp_path).clip.num_frames == 32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.stem=8x8",), "model.stem is an option of i3d networks; remove it for x3d_xs"),
        (("model.checkpoint_stages=[res2]",), "model.checkpoint_stages is an option of i3d"),
        (("train.lr_multipliers=[0,1,1,1,1,1]",), "train.lr_multipliers are for the stages of i3d"),
        (("test.spatial=full",), "x3d_xs is not fully convolutional; use three_crop or center"),
        (("model.norm=bn", "model.norm_over=hw"), "model.norm_over hw is for model.norm gn, ln"),
    ],
)
def test_options_that_do_not_apply_are_errors(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, "model.name=x3d_xs", *overrides)


@pytest.mark.parametrize("name", ["r3d_18", "s3d", "slow_r50", "csn_r101", "slowfast_r50"])
def test_unsuitable_clips_are_errors(name, tmp_path):
    overrides = {"slowfast_r50": "clip.num_frames=6"}.get(name, "clip.num_frames=0")
    with pytest.raises(ValueError, match="frames"), torch.device("meta"):
        build.build_model(config_of(tmp_path, *small(name), overrides), META)


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("gn", GroupNorm), ("ln", GroupNorm), ("in", GroupNorm), ("frozen_bn", FrozenBatchNorm),
        ("bn", nn.BatchNorm3d), ("brn", BatchRenorm), ("sync_bn", nn.SyncBatchNorm),
        ("none", nn.Identity),
    ],
)  # fmt: skip
def test_every_norm(norm, kind, tmp_path):
    config = config_of(tmp_path, *small("mc3_18"), f"model.norm={norm}")
    with torch.device("meta"):
        model = build.build_model(config, META)
    norms = [
        m for n, m in model.named_modules()
        if isinstance(m, (GroupNorm, FrozenBatchNorm, nn.modules.batchnorm._NormBase))
    ]  # fmt: skip
    assert norms or norm == "none"
    assert all(type(m) is kind for m in norms)


def test_groups_and_axes_reach_the_layers(tmp_path):
    overrides = ("model.name=x3d_xs", "model.channels_per_group=12", "model.norm_over=causal")
    with torch.device("meta"):
        model = build.build_model(config_of(tmp_path, *overrides), META)
    norms = [m for m in model.modules() if isinstance(m, GroupNorm)]
    assert {m.over for m in norms} == {"causal"}
    # 12 divides 24, 108, ..., and for 54 channels the largest smaller divisor is 9.
    assert {m.num_channels // m.num_groups for m in norms} == {9, 12}
    with torch.device("meta"):
        i3d = build.build_model(
            config_of(tmp_path, "model.name=i3d_tiny", "model.num_groups=4", "model.norm_over=hw"),
            META,
        )
    assert {m.over for m in i3d.modules() if isinstance(m, GroupNorm)} == {"hw"}


@pytest.mark.parametrize("name", ["r3d_18", "s3d", "x3d_xs", "slowfast_r50"])
def test_same_as_the_library_with_its_own_norm_and_weights(name, tmp_path):
    """The adapter changes nothing but norm, dropout and softmax; at S3D's size its pool too."""
    torch.manual_seed(0)
    if name in get_args(TorchvisionName):
        theirs = getattr(torchvision_video, name)(num_classes=5)
        size = (16, 224) if name == "s3d" else SMALL[name]
    else:
        size = {"x3d_xs": (4, 160), "slowfast_r50": (8, 32)}[name]
        theirs = getattr(hub, name)(model_num_class=5)
        theirs.blocks[-1].activation = None
        if name == "slowfast_r50":  # sizes of the pools at 8 frames of 32 pixels
            theirs.blocks[-2].pool = nn.ModuleList(
                nn.AvgPool3d(kernel) for kernel in ((2, 1, 1), (8, 1, 1))
            )
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm3d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    torch.save({"model_state": theirs.state_dict()}, tmp_path / "weights.pth")
    config = config_of(
        tmp_path, *small(name), "model.norm=frozen_bn", f"model.weights={tmp_path}/weights.pth"
    )
    model = build.build_model(config, CPU).eval()
    mean, _ = build.load_starting_weights(model, config)
    assert mean == config.data.mean
    clips = torch.randn(1, 3, size[0], size[1], size[1])
    inputs = clips
    if name == "slowfast_r50":
        inputs = [clips[:, :, [0, 7]], clips]
    with torch.no_grad():
        expected = theirs.eval()(inputs)
        actual = model(clips)
        features = model.pooled_features(clips)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    if name != "s3d":  # a convolution, over windows
        torch.testing.assert_close(model.classifier()(features), expected, rtol=1e-3, atol=1e-4)


def test_pathways_of_slowfast():
    packed = SlowFast(
        nn.Linear(1, 1), classifier="", channel_axis=1, stages=(), frame_multiple=4
    ).pack(torch.arange(32.0).view(1, 1, 32, 1, 1).expand(1, 3, 32, 1, 1))
    assert packed[0][0, 0].flatten().tolist() == [0, 4, 8, 13, 17, 22, 26, 31]  # as PySlowFast
    assert packed[1].shape[2] == 32


def test_weights_that_do_not_fit_are_errors(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision_video.r3d_18(num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "r3d.pth")
    weights = f"model.weights={tmp_path}/r3d.pth"

    def load(*overrides):
        config = config_of(tmp_path, weights, *overrides)
        model = build.build_model(config, CPU)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        try:
            build.load_starting_weights(model, config)
        except ValueError:
            after = model.state_dict()
            assert all(torch.equal(after[name], t) for name, t in before.items())
            raise
        return model

    with pytest.raises(ConfigError, match=r"batch norm.*model.weights_convolutions_only: true"):
        load(*small("r3d_18"))
    with pytest.raises(ValueError, match="do not fit the network.*model.name"):
        load(*small("mc3_18"), "model.name=x3d_xs", "model.norm=bn")
    model = load(*small("r3d_18"), "model.weights_convolutions_only=true")
    assert torch.equal(model.net.layer1[0].conv1[0].weight, theirs.layer1[0].conv1[0].weight)
    assert model.net.fc.weight.shape == (5, 512)
    assert all(torch.equal(p, torch.ones_like(p)) for n, p in model.named_parameters()
               if n.endswith("layer2.0.conv1.1.weight"))  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_network_trains_as_cuda_graphs(name, tmp_path):
    config = config_of(tmp_path, *small(name))
    device = torch.device("cuda")
    model = build.build_model(config, device).train()
    launch_as_graphs(model)
    clip = config.clip
    shape = (2, 3, clip.num_frames, clip.crop_size, clip.crop_size)
    for _ in range(2):
        model(torch.randn(shape, device=device)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
