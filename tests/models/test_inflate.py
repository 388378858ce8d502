import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from i3d_gn.models import I3D, i3d_resnet50, i3d_small, i3d_tiny
from i3d_gn.models.inflate import NormMismatchError, inflate_kernel, load_imagenet_weights
from i3d_gn.models.resnet2d import resnet_small, resnet_tiny
from i3d_gn.norm import GroupNorm, normalize_kernels
from i3d_gn.weights.files import write_safetensors
from i3d_gn.weights.info import WeightsInfo
from i3d_gn.weights.read import read_weights

SHALLOW = (1, 1, 1, 1)


def group_norm(channels):
    return nn.GroupNorm(32, channels)


def randomize_(network):
    """Random norm parameters and statistics, so that swapped tensors change results."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_mean") or (tensor.dim() == 1 and name.endswith("bias")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif name.endswith("running_var") or tensor.dim() == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(7)
    return network


def image_network(depths=SHALLOW, norm="bn", stride_in="3x3"):
    torch.manual_seed(0)
    network = ResNet(
        Bottleneck, list(depths), norm_layer=group_norm if norm == "gn" else nn.BatchNorm2d
    )
    if stride_in == "1x1":
        move_stride_(network)
    return randomize_(network).eval()


def move_stride_(network):
    for module in network.modules():
        if isinstance(module, Bottleneck) and module.stride > 1:
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride


def image_features(network, images):
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    return network.layer4(network.layer3(network.layer2(network.layer1(x))))


def clip_features(model, clips):
    outputs = []
    with model.res5.register_forward_hook(lambda _m, _i, y: outputs.append(y)), torch.no_grad():
        model.eval()(clips)
    return outputs[0]


def static_clip(images, num_frames):
    return images[:, :, None].repeat(1, 1, num_frames, 1, 1)


@pytest.fixture(scope="module")
def bn_source():
    return image_network().state_dict()


@pytest.fixture(scope="module")
def gn_source():
    return image_network(norm="gn").state_dict()


@pytest.mark.parametrize("temporal_kernel", [1, 3, 5])
def test_inflated_kernel_on_static_input(temporal_kernel):
    kernel = torch.randn(4, 3, 3, 3)
    inflated = inflate_kernel(kernel, temporal_kernel)
    assert inflated.shape == (4, 3, temporal_kernel, 3, 3)
    image = torch.randn(2, 3, 8, 8)
    expected = torch.conv2d(image, kernel)
    static = torch.conv3d(static_clip(image, temporal_kernel), inflated)
    torch.testing.assert_close(static[:, :, 0], expected, rtol=1e-5, atol=1e-5)


def test_inflate_kernel_errors():
    with pytest.raises(ValueError, match=r"\(4, 3, 3\)"):
        inflate_kernel(torch.zeros(4, 3, 3), 3)
    with pytest.raises(ValueError, match="temporal_kernel=0"):
        inflate_kernel(torch.zeros(4, 3, 3, 3), 0)


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("stride_in", ["3x3", "1x1"])
def test_static_clip_equals_image_features_in_c2d(norm, stride_in):
    """Without inflation there are no temporal borders: GN statistics equal those of the image."""
    network = image_network(norm=norm, stride_in=stride_in)
    model = I3D(SHALLOW, norm=norm, inflate=False, pool_padding=1, stride_in=stride_in)
    load_imagenet_weights(model, network.state_dict())
    images = torch.randn(2, 3, 65, 97, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = image_features(network, images)
    features = clip_features(model, static_clip(images, 8))
    scale = expected.abs().max().item()
    for frame in features.unbind(2):
        torch.testing.assert_close(frame, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(("stem", "num_frames"), [("strided", 112), ("8x8", 32)])
def test_static_clip_equals_image_features_away_from_temporal_borders(stem, num_frames):
    network = image_network()
    model = I3D(SHALLOW, norm="bn", stem=stem, pool_padding=1)
    load_imagenet_weights(model, network.state_dict())
    images = torch.randn(1, 3, 40, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = image_features(network, images)
    features = clip_features(model, static_clip(images, num_frames))
    scale = expected.abs().max().item()
    middle = features.shape[2] // 2
    torch.testing.assert_close(features[:, :, middle], expected, rtol=0, atol=1e-5 * scale)
    assert (features[:, :, 0] - expected).abs().max() > 1e-2 * scale  # at the border


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "num_frames"),
    [({}, 160), ({"stem": "8x8"}, 48), ({"inflate": False}, 8)],
)
def test_static_clip_with_random_weights_resnet50(options, num_frames):
    network = image_network(depths=(3, 4, 6, 3))
    model = i3d_resnet50("bn", pool_padding=1, **options)
    load_imagenet_weights(model, network.state_dict())
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = image_features(network, images)
    features = clip_features(model, static_clip(images, num_frames))
    middle = features.shape[2] // 2
    scale = expected.abs().max().item()
    torch.testing.assert_close(features[:, :, middle], expected, rtol=0, atol=2e-5 * scale)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(
    ("options", "num_frames"),
    [({}, 160), ({"stem": "8x8"}, 48), ({"inflate": False}, 8)],
)
def test_static_clip_with_imagenet_weights(shared_data, options, num_frames):
    path = shared_data / "resnet50_imagenet_msra.pth"
    network = torchvision.models.resnet50()
    move_stride_(network)
    network.load_state_dict(torch.load(path, weights_only=True))
    network.eval()
    model = i3d_resnet50("bn", pool_padding=1, stride_in="1x1", **options)
    report = load_imagenet_weights(model, path)
    assert report.unused == ("fc.weight", "fc.bias")
    assert report.left_at_init == ("head.linear.weight", "head.linear.bias")
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = image_features(network, images)
    features = clip_features(model, static_clip(images, num_frames))
    middle = features.shape[2] // 2
    scale = expected.abs().max().item()
    torch.testing.assert_close(features[:, :, middle], expected, rtol=0, atol=2e-5 * scale)


def test_report_covers_every_key(bn_source):
    model = I3D(SHALLOW, norm="bn")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = load_imagenet_weights(model, bn_source)
    assert set(report.loaded) | set(report.left_at_init) == set(model.state_dict())
    assert set(report.left_at_init) == {"head.linear.weight", "head.linear.bias"}
    assert set(report.unused) == {"fc.weight", "fc.bias"}
    assert len(report.loaded) + len(report.unused) == len(bn_source)
    after = model.state_dict()
    for key in report.loaded:
        assert not torch.equal(before[key], after[key]), key
    for key in report.left_at_init:
        assert torch.equal(before[key], after[key]), key
    assert "fc.weight" in str(report)


def test_report_names_the_averaged_weights(bn_source):
    zeros = {key: torch.zeros_like(value) for key, value in bn_source.items()}
    averaged = {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in bn_source.items()}}
    model = I3D(SHALLOW, norm="bn")
    report = load_imagenet_weights(model, {"model": zeros, "model_ema": averaged})
    assert torch.equal(model.norm1.weight, bn_source["bn1.weight"])
    assert f"{len(report.loaded)} tensors of model_ema.module (not of model); 2" in str(report)
    assert report.unused == ("fc.weight", "fc.bias", "n_averaged")
    weights = read_weights({"model": zeros, "model_ema": averaged}, entry="model")
    load_imagenet_weights(model, weights)
    assert not model.norm1.weight.any()


def test_half_precision_file_with_prefix(tmp_path, bn_source):
    plain = I3D(SHALLOW, norm="bn")
    load_imagenet_weights(plain, bn_source)
    half = {k: v.half() if v.dim() == 4 else v for k, v in bn_source.items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in half.items()}}, tmp_path / "w.pth")
    stored = I3D(SHALLOW, norm="bn")
    load_imagenet_weights(stored, tmp_path / "w.pth")
    for (name, a), b in zip(plain.named_parameters(), stored.parameters(), strict=True):
        assert b.dtype == torch.float32
        if "conv" in name:
            torch.testing.assert_close(a, b, rtol=2**-11, atol=1e-7)
        elif "norm" in name:
            assert torch.equal(a, b)
    # Rounded to half precision once; divided by Kt in float32.
    assert torch.equal(stored.conv1.weight, inflate_kernel(half["conv1.weight"].float(), 5))


@pytest.mark.parametrize("norm", ["sync_bn", "frozen_bn"])
def test_other_batch_norms(norm, bn_source):
    model = I3D(SHALLOW, norm=norm)
    report = load_imagenet_weights(model, bn_source)
    for name, value in model.res3[0].norm2.state_dict().items():
        assert torch.equal(value, bn_source[f"layer2.0.bn2.{name}"])
    counts = [k for k in bn_source if k.endswith("num_batches_tracked")]
    unused = {"fc.weight", "fc.bias"} | set(counts if norm == "frozen_bn" else ())
    assert set(report.unused) == unused
    assert len(report.loaded) + len(report.unused) == len(bn_source)


def test_image_classifier_is_never_loaded(bn_source):
    """Even if the numbers of classes agree: classes of images are not those of clips."""
    model = I3D(SHALLOW, norm="bn", num_classes=1000)
    before = model.head.linear.weight.clone()
    report = load_imagenet_weights(model, bn_source)
    assert torch.equal(model.head.linear.weight, before)
    assert report.left_at_init == ("head.linear.weight", "head.linear.bias")
    assert report.unused == ("fc.weight", "fc.bias")


def test_group_norm_into_group_norm(gn_source):
    model = I3D(SHALLOW, norm="gn")
    report = load_imagenet_weights(model, gn_source)
    assert torch.equal(model.res4[0].norm3.weight, gn_source["layer3.0.bn3.weight"])
    assert torch.equal(model.res4[0].shortcut_norm.bias, gn_source["layer3.0.downsample.1.bias"])
    assert set(report.left_at_init) == {"head.linear.weight", "head.linear.bias"}


@pytest.mark.parametrize("norm", ["gn", "bn", "ln", "in"])
@pytest.mark.parametrize(("image", "video"), [(resnet_tiny, i3d_tiny), (resnet_small, i3d_small)])
def test_own_image_networks_inflate_whole(image, video, norm):
    network = randomize_(image(norm, num_classes=3))
    config = {"name": image.__name__, "norm": norm, "num_groups": None, "channels_per_group": None}
    checkpoint = {
        "model": network.state_dict(),
        "config": {"model": config},
        "input": {"mean": [0.5] * 3, "std": [0.25] * 3},
    }
    model = video(norm, num_classes=5)
    report = load_imagenet_weights(model, checkpoint)
    assert report.left_at_init == ("head.linear.weight", "head.linear.bias")
    assert report.unused == ("head.linear.weight", "head.linear.bias")
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            kernel = network.state_dict()[name]
            torch.testing.assert_close(tensor.sum(2) if tensor.dim() == 5 else tensor, kernel)


@pytest.mark.parametrize("kernel_norm", [None, "weight_standardization"])
def test_standardized_image_network_inflates_to_the_same_features(kernel_norm):
    """Into plain kernels, and into standardized ones: of 3 equal frames, 3 times as large."""
    torch.manual_seed(0)
    network = resnet_tiny("gn", 3)
    normalize_kernels(network, "weight_standardization")
    randomize_(network)
    model = i3d_tiny("gn", num_classes=5, pool_padding=1)
    if kernel_norm is not None:
        normalize_kernels(model, kernel_norm)
    load_imagenet_weights(model, network.state_dict())
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    outputs = []
    with network.res5.register_forward_hook(lambda _m, _i, y: outputs.append(y)), torch.no_grad():
        network.eval()(images)
    features = clip_features(model, static_clip(images, 64))
    middle = features[:, :, features.shape[2] // 2]
    correlation = torch.corrcoef(torch.stack([middle.flatten(), outputs[0].flatten()]))[0, 1]
    assert correlation > 0.99  # the statistics of GN include the borders in time


@pytest.mark.parametrize(
    ("source_norm", "norm"),
    [("bn", n) for n in ("gn", "ln", "in", "none")]
    + [("gn", n) for n in ("bn", "sync_bn", "frozen_bn", "ln", "in", "none")],
)
def test_other_norm_is_refused(source_norm, norm, bn_source, gn_source):
    model = I3D(SHALLOW, norm=norm)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    source = bn_source if source_norm == "bn" else gn_source
    with pytest.raises(NormMismatchError, match=r"pass convolutions_only=True$"):
        load_imagenet_weights(model, source)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("norm", ["gn", "bn", "frozen_bn", "in", "none"])
@pytest.mark.parametrize("zero_init_last_norm", [True, False])
def test_convolutions_only(norm, zero_init_last_norm, bn_source):
    model = randomize_(I3D(SHALLOW, norm=norm, zero_init_last_norm=zero_init_last_norm))
    report = load_imagenet_weights(model, bn_source, convolutions_only=True)
    assert all("conv" in key for key in report.loaded)
    assert len(report.loaded) == sum("conv" in key for key in model.state_dict())
    assert set(report.loaded) | set(report.left_at_init) == set(model.state_dict())
    assert len(report.loaded) + len(report.unused) == len(bn_source)
    assert torch.equal(model.res2[0].conv2.weight[:, :, 0], bn_source["layer1.0.conv2.weight"])
    fresh = I3D(SHALLOW, norm=norm, zero_init_last_norm=zero_init_last_norm).state_dict()
    for key, value in model.state_dict().items():
        if "norm" in key:
            assert torch.equal(value, fresh[key]), key
    if norm == "gn":
        assert model.res2[0].norm3.weight.max() == (0 if zero_init_last_norm else 1)
        assert model.res2[0].norm2.weight.min() == 1


def test_depth_mismatch(bn_source):
    deeper = image_network(depths=(1, 1, 2, 1)).state_dict()
    shallow, deep = I3D(SHALLOW, norm="bn"), I3D((1, 1, 2, 1), norm="bn")
    before = shallow.conv1.weight.clone()
    with pytest.raises(ValueError, match=r"no place in it \(layer3\.1\.conv1.*depth"):
        load_imagenet_weights(shallow, deeper)
    with pytest.raises(ValueError, match=r"model\'s are missing \(res4\.1\.conv1"):
        load_imagenet_weights(deep, bn_source)
    assert torch.equal(shallow.conv1.weight, before)


def test_unknown_and_missing_keys(bn_source):
    model = I3D(SHALLOW, norm="bn")
    with pytest.raises(ValueError, match="backbone.stem"):
        load_imagenet_weights(model, {**bn_source, "backbone.stem": torch.zeros(1)})
    short = {k: v for k, v in bn_source.items() if k != "layer2.0.bn3.running_var"}
    with pytest.raises(ValueError, match=r"model\'s are missing \(res3\.0\.norm3\.running_var\)"):
        load_imagenet_weights(model, short)


def test_mixed_namings_are_refused(bn_source):
    twice = {**bn_source, "res3.0.norm1.weight": bn_source["layer2.0.bn1.weight"] + 1}
    with pytest.raises(ValueError, match=r"torchvision.*unknown tensors res3\.0\.norm1\.weight"):
        load_imagenet_weights(I3D(SHALLOW, norm="bn"), twice)


def test_metadata_of_converted_files_is_checked(tmp_path, bn_source, gn_source):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, bn_source, WeightsInfo("torchvision", 2, "bn", stride_in="1x1"))
    model = I3D(SHALLOW, norm="bn")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"w\.safetensors.*stride_in=3x3 where the weights need 1x1"
    ):
        load_imagenet_weights(model, path)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    load_imagenet_weights(I3D(SHALLOW, norm="bn", stride_in="1x1"), path)

    write_safetensors(path, gn_source, WeightsInfo("timm", 2, "gn", num_groups=16))
    model = I3D(SHALLOW, norm="gn")
    with pytest.raises(ValueError, match="num_groups=32 where the weights need 16"):
        load_imagenet_weights(model, path)
    load_imagenet_weights(model, path, convolutions_only=True)

    write_safetensors(path, gn_source, WeightsInfo("i3d_gn", 2, "ln"))
    model = I3D(SHALLOW, norm="ln")
    load_imagenet_weights(model, path)
    assert torch.equal(model.norm1.weight, gn_source["bn1.weight"])


def test_wrong_shape(bn_source):
    model = I3D(SHALLOW, norm="bn")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wide = {**bn_source, "layer4.0.conv2.weight": torch.zeros(512, 1024, 3, 3)}
    with pytest.raises(
        ValueError, match=r"layer4\.0\.conv2\.weight.*\(512, 1024, 3, 3\).*\(512, 512, 3, 3\)"
    ):
        load_imagenet_weights(model, wide)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_not_weights(tmp_path):
    model = I3D(SHALLOW, norm="bn")
    with pytest.raises(ValueError, match=r"absent\.pth: no such file"):
        load_imagenet_weights(model, tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 and no more")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    for name in ("text", "empty", "cut", "module"):
        with pytest.raises(ValueError, match=rf"{name}\.pth cannot be read") as error:
            load_imagenet_weights(model, tmp_path / f"{name}.pth")
        assert "\n" not in str(error.value)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "dict.pth")
    for name in ("list", "dict"):
        with pytest.raises(ValueError, match=rf"{name}\.pth: not a state dict"):
            load_imagenet_weights(model, tmp_path / f"{name}.pth")
    with pytest.raises(ValueError, match="not a state dict"):
        load_imagenet_weights(model, {})


def test_source_norm(bn_source, gn_source):
    model = I3D(SHALLOW, norm="ln")
    with pytest.raises(ValueError, match=r"source_norm='ln', but the norm of .* is 'bn'"):
        load_imagenet_weights(model, bn_source, source_norm="ln")
    with pytest.raises(ValueError, match=r"source_norm='l', but the norm of .* is 'gn'"):
        load_imagenet_weights(model, gn_source, source_norm="l")
    report = load_imagenet_weights(model, gn_source, source_norm="ln")
    assert (report.info.norm, report.info.num_groups) == ("ln", None)
    # Stating the norm that is known anyway does not disable the check of its groups.
    with pytest.raises(ValueError, match="num_groups=16 where the weights need 32"):
        load_imagenet_weights(
            I3D(SHALLOW, norm=lambda c: GroupNorm(16, c)), gn_source, source_norm="gn"
        )
