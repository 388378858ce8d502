"""Weights in every supported naming: logits equal those of the original network."""

import functools
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms.v2.functional import normalize

from i3d_gn import cli
from i3d_gn.models import I3D, i3d_resnet50
from i3d_gn.models.inflate import load_imagenet_weights
from i3d_gn.models.resnet2d import ResNet2d, resnet50, resnet101, resnet_tiny
from i3d_gn.models.vgg import VGG16
from i3d_gn.norm import make_norm, normalize_kernels
from i3d_gn.weights.info import WeightsInfo
from i3d_gn.weights.read import Weights, export_names, read_weights, write_weights
from i3d_gn.weights.tensor_names import first_names

SHALLOW = (1, 1, 1, 1)
KINETICS = ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def group_norm(channels):
    return nn.GroupNorm(32, channels)


def shallow_torchvision(norm):
    torch.manual_seed(0)
    return ResNet(
        Bottleneck, list(SHALLOW), norm_layer=group_norm if norm == "gn" else nn.BatchNorm2d
    )


def logits(network, x):
    with torch.no_grad():
        return network.eval()(x)


def filled(network, weights):
    network.load_state_dict(weights.tensors)
    return network


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.slow
def test_logits_equal_torchvision_and_timm(images, randomized, tmp_path):
    import timm

    makers = {
        "resnet50": (torchvision.models.resnet50, lambda: resnet50("bn"), "bn"),
        "vgg16_bn": (torchvision.models.vgg16_bn, lambda: VGG16("bn"), "bn"),
        "vgg16": (torchvision.models.vgg16, lambda: VGG16("none"), "none"),
        "resnet50_gn": (lambda: timm.create_model("resnet50_gn"), lambda: resnet50("gn"), "gn"),
    }
    for name, (theirs, ours, norm) in makers.items():
        torch.manual_seed(0)
        reference = theirs()
        if name != "vgg16":  # its only 1-D tensors are biases
            randomized(reference)
        path = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file(reference.state_dict(), path)
        weights = read_weights(path)
        assert (weights.info.norm, weights.info.spatial_dims) == (norm, 2)
        expected = logits(reference, images)
        assert expected.std() > 0.01
        assert torch.equal(logits(filled(ours(), weights), images), expected), name
        back = export_names(weights.tensors, "torchvision")
        assert back.keys() == reference.state_dict().keys()
        assert all(torch.equal(back[k], v) for k, v in reference.state_dict().items())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (torchvision.models.resnet101, lambda: resnet101("bn")),
        (torchvision.models.vgg16, lambda: VGG16("none")),
        (torchvision.models.vgg16_bn, lambda: VGG16("bn")),
    ],
)
def test_tensor_names_of_torchvision(theirs, ours):
    with torch.device("meta"):
        theirs, ours = theirs().state_dict(), ours().state_dict()

    def shapes(state):
        return {name: tensor.shape for name, tensor in state.items()}

    assert shapes(read_weights(theirs).tensors) == shapes(ours)
    assert shapes(export_names(ours, "torchvision")) == shapes(theirs)
    assert shapes(export_names(ours, "i3d_gn")) == shapes(ours)


def test_tensor_names_of_pytorchvideo():
    from pytorchvideo.models.hub import i3d_r50

    with torch.device("meta"):
        ours = export_names(i3d_resnet50("bn").state_dict(), "pytorchvideo")
        theirs = i3d_r50(pretrained=False).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_tensors_without_a_name_elsewhere():
    state = {"conv1.weight": torch.zeros(1, 3, 1, 1), "res6.0.conv1.weight": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"torchvision has no name for res6\.0\.conv1\.weight; use"
    ):
        export_names(state, "torchvision")
    with pytest.raises(ValueError, match="'torchvision' is not for video networks; use pytorchv"):
        export_names({"conv1.weight": torch.zeros(1, 3, 5, 1, 1)}, "torchvision")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "none"), (1, "0"), (6, "0, 1, 2, 3, 4, 5"), (8, "0, 1, 2, 3, 4, 5 and 2 more")],
)
def test_messages_list_six_names(number, text):
    assert first_names([str(i) for i in range(number)]) == text


def test_logits_equal_groupnorm_reproduce(images, randomized, tmp_path):
    reference = randomized(shallow_torchvision("gn"))
    for norm_name in ("gn", "bn"):  # its resnet_gn.py, and torchvision's own names
        state = {
            "module." + re.sub(r"\bbn(\d)", rf"{norm_name}\1", k): v
            for k, v in reference.state_dict().items()
        }
        torch.save({"epoch": 100, "best_acc1": 75.0, "state_dict": state}, tmp_path / "w.tar")
        weights = read_weights(tmp_path / "w.tar")
        assert weights.info.norm == "gn"
        network = filled(ResNet2d(SHALLOW, norm="gn"), weights)
        assert torch.equal(logits(network, images), logits(reference, images))


def test_detectron_bgr_input_becomes_rgb(randomized, caffe2_blobs, write_python2_pickle, tmp_path):
    detectron = randomized(ResNet2d(SHALLOW, norm="gn"))
    rgb = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    # PIXEL_MEANS in Detectron's config.py, BGR; std is 1.
    bgr_means = torch.tensor([102.9801, 115.9465, 122.7717]).view(1, 3, 1, 1)
    expected = logits(detectron, rgb.flip(1) - bgr_means)
    blobs = caffe2_blobs(detectron.state_dict(), "gn")
    for content in (blobs, {"blobs": blobs}):
        write_python2_pickle(tmp_path / "R-50-GN.pkl", content)
        weights = read_weights(tmp_path / "R-50-GN.pkl")
        info = weights.info
        assert (info.norm, info.num_groups, info.stride_in) == ("gn", 32, "3x3")
        assert info.std == IMAGENET[1]
        # Logits hardly depend on the scale, which group norm divides out.
        factors = 255 * torch.tensor(info.std).view(3, 1, 1)
        bgr_kernel = torch.from_numpy(blobs["conv1_w"])
        torch.testing.assert_close(
            weights.tensors["conv1.weight"], bgr_kernel[:, [2, 1, 0]] * factors, rtol=1e-6, atol=0
        )
        normalized = normalize(rgb / 255, list(info.mean), list(info.std))
        ours = filled(ResNet2d(SHALLOW, norm="gn"), weights)
        torch.testing.assert_close(logits(ours, normalized), expected, rtol=1e-4, atol=1e-3)
        # The order of the channels matters.
        error = (logits(ours, normalized) - expected).abs().max()
        assert (logits(ours, normalized.flip(1)) - expected).abs().max() > 100 * error


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_video_nonlocal_net(randomized, caffe2_blobs, write_python2_pickle, tmp_path, spatial_dims):
    make = ResNet2d if spatial_dims == 2 else I3D
    original = randomized(make(SHALLOW, norm="bn", num_classes=7))
    state = original.state_dict()
    blobs = caffe2_blobs(state, "bn")
    if spatial_dims == 3:  # as fully convolutional testing stores it
        blobs["pred_w"] = blobs["pred_w"].reshape(7, 2048, 1, 1, 1)
    path = tmp_path / "net.pkl"
    write_python2_pickle(path, {"blobs": blobs})
    weights = read_weights(path)
    assert weights.info.spatial_dims == spatial_dims
    assert (weights.info.mean, weights.info.std) == KINETICS
    # Unknown: models for 32 and 8 frames, and PySlowFast's, have the same names.
    assert (weights.info.stem, weights.info.pool_padding) == (None, None)
    if spatial_dims == 3:
        ours = I3D(SHALLOW, norm="bn", num_classes=7, stem="8x8", pool_padding=1)
        # Caffe2's batch norms have no num_batches_tracked, and none is needed.
        assert load_imagenet_weights(ours, path).left_at_init == ()
        assert torch.equal(ours.res4[0].norm1.running_var, original.res4[0].norm1.running_var)
    wanted = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert weights.tensors.keys() == wanted.keys()
    assert all(torch.equal(weights.tensors[k], v) for k, v in wanted.items())

    # Batch norm folded for fine-tuning: scale and shift only, no classifier, protocol 0.
    affine = {k: v for k, v in blobs.items() if not re.search("_rm|_riv|pred|momentum", k)}
    for name in [name for name in affine if name.endswith("bn_s")]:
        stem = name.removesuffix("s")
        scale = blobs[name] / (blobs[stem + "riv"] + 1e-5) ** 0.5
        affine[name], affine[stem + "b"] = scale, blobs[stem + "b"] - blobs[stem + "rm"] * scale
    write_python2_pickle(path, affine, protocol=0)
    folded = read_weights(path).tensors
    assert torch.equal(folded["norm1.running_mean"], torch.zeros(64))
    assert torch.equal(folded["norm1.running_var"] + 1e-5, torch.ones(64))
    frozen = make(SHALLOW, norm="frozen_bn", num_classes=7)
    missing = frozen.load_state_dict(read_weights(path).tensors, strict=False)
    assert missing.missing_keys == ["head.linear.weight", "head.linear.bias"]
    frozen.head.load_state_dict(original.head.state_dict())
    shape = (1, 3, 64, 64) if spatial_dims == 2 else (1, 3, 8, 64, 64)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(frozen, x), logits(original, x), rtol=1e-4, atol=1e-4)


def renamed(state_dict, *rules):
    """Apply all (pattern, replacement) rules to every name."""
    result = {}
    for own, tensor in state_dict.items():
        name = own
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


# slowfast/models/{stem_helper,resnet_helper,head_helper}.py
TO_PYSLOWFAST = (
    (r"^(conv1|norm1)\.", r"s1.pathway0_stem.\1."),
    (r"^res(\d)\.(\d+)\.", r"s\1.pathway0_res\2."),
    (r"stem\.conv1", "stem.conv"), (r"stem\.norm1", "stem.bn"),
    (r"\.shortcut_conv\.", ".branch1."), (r"\.shortcut_norm\.", ".branch1_bn."),
    (r"\.conv1\.", ".branch2.a."), (r"\.norm1\.", ".branch2.a_bn."),
    (r"\.conv2\.", ".branch2.b."), (r"\.norm2\.", ".branch2.b_bn."),
    (r"\.conv3\.", ".branch2.c."), (r"\.norm3\.", ".branch2.c_bn."),
    (r"^head\.linear", "head.projection"),
)  # fmt: skip
# mmaction/models/backbones/resnet3d.py, whose ConvModule has .conv and .bn
TO_MMACTION2 = (
    (r"^conv1\.", "backbone.conv1.conv."), (r"^norm1\.", "backbone.conv1.bn."),
    (r"^res2\.", "backbone.layer1."), (r"^res3\.", "backbone.layer2."),
    (r"^res4\.", "backbone.layer3."), (r"^res5\.", "backbone.layer4."),
    (r"(layer.*)\.shortcut_conv\.", r"\1.downsample.conv."),
    (r"(layer.*)\.shortcut_norm\.", r"\1.downsample.bn."),
    (r"(layer.*)\.conv(\d)\.", r"\1.conv\2.conv."), (r"(layer.*)\.norm(\d)\.", r"\1.conv\2.bn."),
    (r"^head\.linear", "cls_head.fc_cls"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "wrapper", "stem", "mean_and_std"),
    [
        (TO_PYSLOWFAST, "model_state", "8x8", KINETICS),
        (TO_MMACTION2, "state_dict", "mmaction2", IMAGENET),
    ],
)
def test_pyslowfast_and_mmaction2(rules, wrapper, stem, mean_and_std, randomized, tmp_path):
    original = randomized(I3D(SHALLOW, norm="bn", num_classes=7, stem=stem, pool_padding=1))
    state = renamed(original.state_dict(), *rules)
    assert not any("norm" in name or "res2." in name for name in state)
    torch.save({wrapper: state, "meta": {"epoch": 1}}, tmp_path / "w.pth")
    weights = read_weights(tmp_path / "w.pth")
    assert (weights.info.mean, weights.info.std) == mean_and_std
    ours = I3D(SHALLOW, norm="bn", num_classes=7, stem=stem, pool_padding=1)
    report = load_imagenet_weights(ours, weights)
    assert not report.left_at_init
    assert str(report).startswith("loaded ")
    assert report.info.stem == stem
    assert all(torch.equal(a, b) for a, b in zip(
        ours.state_dict().values(), original.state_dict().values(), strict=True
    ))  # fmt: skip
    with pytest.raises(ValueError, match=f"stem=strided where the weights need {stem}"):
        load_imagenet_weights(I3D(SHALLOW, norm="bn", num_classes=7, pool_padding=1), weights)


def test_mmaction2_pool1():
    pool = I3D(SHALLOW, stem="mmaction2", pool_padding=1).pool1
    assert (pool.kernel_size, pool.stride, pool.padding) == ((1, 3, 3), (2, 2, 2), (0, 1, 1))


def test_export_to_pytorchvideo(randomized, tmp_path):
    from pytorchvideo.models.hub import i3d_r50

    torch.manual_seed(0)
    ours = randomized(i3d_resnet50("bn", stem="8x8", pool_padding=1))
    info = WeightsInfo("i3d_gn", 3, "bn", stem="8x8", pool_padding=1)
    path = tmp_path / "w.safetensors"
    write_weights(path, Weights(ours.state_dict(), info), naming="pytorchvideo")
    theirs = i3d_r50(pretrained=False).eval()
    theirs.load_state_dict(safetensors.torch.load_file(path))
    clips = torch.randn(1, 3, 8, 193, 193, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(theirs, clips), logits(ours, clips), rtol=1e-4, atol=1e-4)
    again = read_weights(path)
    assert again.info == info
    assert all(torch.equal(again.tensors[k], v) for k, v in ours.state_dict().items())


def test_metadata_round_trip(tmp_path):
    network = ResNet2d(SHALLOW, norm="gn")
    info = WeightsInfo(
        "torchvision", 2, "gn", num_groups=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6),
        stride_in="1x1",
    )  # fmt: skip
    for naming in ("i3d_gn", "torchvision"):
        write_weights(tmp_path / "w", Weights(network.state_dict(), info), naming=naming)
        weights = read_weights(tmp_path / "w")
        assert weights.info == info
        assert all(torch.equal(weights.tensors[k], v) for k, v in network.state_dict().items())
    with pytest.raises(ValueError, match="not for image networks; use torchvision"):
        write_weights(tmp_path / "w", Weights(network.state_dict(), info), naming="pytorchvideo")


VIDEO_MODEL = {
    "name": "i3d_resnet50", "norm": "bn", "num_groups": None, "channels_per_group": None,
    "stride_in": "1x1", "stem": "8x8", "inflate": False, "pool_padding": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({}, {"norm": "bn", "num_groups": None}),
        ({"norm": "sync_bn"}, {"norm": "bn", "num_groups": None}),
        ({"norm": "gn"}, {"norm": "gn", "num_groups": 32}),
        ({"norm": "gn", "name": "i3d_tiny"}, {"norm": "gn", "num_groups": 8}),
        ({"norm": "gn", "num_groups": 4}, {"norm": "gn", "num_groups": 4}),
        (
            {"norm": "gn", "channels_per_group": 16},
            {"norm": "gn", "num_groups": None, "channels_per_group": 16},
        ),
        ({"norm": "ln"}, {"norm": "ln", "num_groups": None}),
    ],
)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_checkpoints_describe_their_network(model, expected, spatial_dims):
    """Built by hand as training writes them; its tensors matter by their names only."""
    kernel = (1, 1, 1) if spatial_dims == 3 else (1, 1)
    state = {
        "conv1.weight": torch.zeros(1, 3, *kernel),
        "res2.0.conv1.weight": torch.zeros(1, 1, *kernel),
        "norm1.weight": torch.ones(1),
    }
    if expected["norm"] == "bn":
        state["norm1.running_mean"] = torch.zeros(1)
    config = {"model": {**VIDEO_MODEL, **model}, "clip": {"stride": 2}, "test": {"num_clips": 3}}
    content = {"config": {**config, "seed": 0}, "model": state}
    content["input"] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    if spatial_dims == 3:
        content["class_names"] = ["a", "b"]
    info = read_weights(content).info
    wanted = {
        "source": "i3d_gn", "spatial_dims": spatial_dims, "stride_in": "1x1",
        "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), **expected,
    }  # fmt: skip
    if spatial_dims == 3:
        wanted |= {"stem": "8x8", "inflate": False, "pool_padding": 1, "class_names": ("a", "b")}
        wanted["settings"] = {"clip": {"stride": 2}, "test": {"num_clips": 3}}
    assert info == WeightsInfo(**wanted)


def test_weights_with_other_options_are_refused():
    state = ResNet2d(SHALLOW, norm="gn").state_dict()
    info = WeightsInfo("x", 2, "gn", num_groups=32, stride_in="1x1")
    with pytest.raises(ValueError, match=r"has stride_in=3x3 where the weights need 1x1"):
        load_imagenet_weights(I3D(SHALLOW, norm="gn"), Weights(state, info))
    for inflate in (False, True):
        weights = Weights(I3D(SHALLOW, norm="gn").state_dict(), WeightsInfo("x", 3, "gn"))
        weights = replace(weights, info=replace(weights.info, inflate=inflate))
        with pytest.raises(ValueError, match=f"inflate={not inflate} where the weights need"):
            load_imagenet_weights(I3D(SHALLOW, norm="gn", inflate=not inflate), weights)
    model = I3D(SHALLOW, norm="gn", stride_in="1x1")
    load_imagenet_weights(model, Weights(state, info))
    assert torch.equal(model.res5[0].conv2.weight[:, :, 0], state["res5.0.conv2.weight"])
    sixteen = WeightsInfo("x", 2, "gn", channels_per_group=16)
    with pytest.raises(ValueError, match="channels_per_group=2 where the weights need 16"):
        load_imagenet_weights(model, Weights(state, sixteen))


@pytest.mark.parametrize(
    ("groups", "norm"), [({"num_groups": 1}, "ln"), ({"channels_per_group": 1}, "in")]
)
def test_ln_and_in_equal_extreme_groups(groups, norm):
    """Layer norm and instance norm are the extremes of [GN] Table 3."""
    by_groups = functools.partial(make_norm, "gn", **groups)
    state = randomize_norms_of(ResNet2d(SHALLOW, norm=by_groups))
    for info in (WeightsInfo("i3d_gn", 2, "gn", **groups), WeightsInfo("i3d_gn", 2, norm)):
        for model_norm in (by_groups, norm):
            model = I3D(SHALLOW, norm=model_norm)
            load_imagenet_weights(model, Weights(state, info))
            assert torch.equal(model.res3[0].norm2.weight, state["res3.0.norm2.weight"])
        with pytest.raises(ValueError, match=r"where the weights need|convolutions_only=True"):
            load_imagenet_weights(I3D(SHALLOW, norm="gn"), Weights(state, info))


def randomize_norms_of(network):
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if "norm" in name:
                tensor.uniform_()
    return network.state_dict()


def test_groups_of_a_bare_state_dict_are_unknown():
    model = functools.partial(I3D, SHALLOW, norm=functools.partial(make_norm, "gn", num_groups=8))
    source = model()
    randomize_norms_of(source)
    target = model()
    info = load_imagenet_weights(target, source.state_dict()).info
    assert (info.norm, info.num_groups) == ("gn", None)
    assert torch.equal(target.norm1.weight, source.norm1.weight)
    from_timm = read_weights(shallow_torchvision("gn").state_dict())
    with pytest.raises(ValueError, match="num_groups=8 where the weights need 32"):
        load_imagenet_weights(model(), from_timm)


def test_messages_contain_the_path(tmp_path):
    path = tmp_path / "deep.pth"
    torch.save(ResNet2d((1, 1, 2, 1), norm="gn").state_dict(), path)
    with pytest.raises(ValueError, match=r"deep\.pth do not fit the model: .*res4\.1\.conv1"):
        load_imagenet_weights(I3D(SHALLOW, norm="gn"), path)
    with pytest.raises(ValueError, match=r"deep\.pth is 'gn' and the model's is 'bn'"):
        load_imagenet_weights(I3D((1, 1, 2, 1), norm="bn"), path)
    info = WeightsInfo("x", 2, "gn", stride_in="1x1")
    write_weights(path, Weights(ResNet2d(SHALLOW, norm="gn").state_dict(), info), naming="i3d_gn")
    with pytest.raises(ValueError, match=r"deep\.pth are for another network"):
        load_imagenet_weights(I3D(SHALLOW, norm="gn"), path)


def test_basic_blocks_are_refused():
    for make in (torchvision.models.resnet18, torchvision.models.resnet34):
        with torch.device("meta"):
            state = make().state_dict()
        with pytest.raises(ValueError, match=r"unknown network .*; supported are ResNet-50/101"):
            read_weights(state)


def test_duplicate_names():
    state = shallow_torchvision("gn").state_dict()
    state["layer2.0.gn1.weight"] = state["layer2.0.bn1.weight"] + 1
    with pytest.raises(ValueError, match=r"layer2\.0\.bn1\.weight, layer2\.0\.gn1\.weight are two"):
        read_weights(state)


def test_head_with_other_classes_is_not_loaded():
    state = I3D(SHALLOW, norm="gn", num_classes=7).state_dict()
    weights = Weights(state, WeightsInfo("x", 3, "gn"))
    report = load_imagenet_weights(I3D(SHALLOW, norm="gn", num_classes=5), weights)
    assert report.left_at_init == ("head.linear.weight", "head.linear.bias")
    assert report.unused == report.left_at_init


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ({"stem.weight": torch.zeros(1)}, "unknown network with tensors stem.weight"),
        ({}, "not a state dict"),
        (
            {"conv1_gn_s": torch.zeros(1), "nonlocal_conv3_1_theta_w": torch.zeros(1)},
            "unknown tensors nonlocal_conv3_1_theta_w",
        ),
        (
            {"features.0.weight": torch.zeros(1), "x.y": torch.zeros(1)},
            "a VGG-16 has no tensor x.y",
        ),
    ],
)
def test_unknown_tensors(state, line):
    with pytest.raises(ValueError, match=line):
        read_weights(state)


@pytest.mark.real_data
def test_real_weights_with_stride_in_1x1(shared_data, tmp_path, images):
    """The original MSRA ResNet-50: stride in the first 1x1, stored in half precision."""
    source = shared_data / "resnet50_imagenet_msra.pth"
    reference = torchvision.models.resnet50()
    for module in reference.modules():
        if isinstance(module, Bottleneck) and module.stride == 2:
            module.conv1.stride, module.conv2.stride = (2, 2), (1, 1)
    reference.load_state_dict(torch.load(source, weights_only=True))
    path = tmp_path / "w.safetensors"
    assert cli.main(["convert", str(source), str(path), "--stride-in", "1x1"]) == 0
    ours = filled(resnet50("bn", stride_in="1x1"), read_weights(path))
    assert torch.equal(logits(ours, images), logits(reference, images))
    with pytest.raises(ValueError, match=r"has stride_in=3x3 where the weights need 1x1"):
        load_imagenet_weights(i3d_resnet50("bn", 5), path)
    load_imagenet_weights(i3d_resnet50("bn", 5, stride_in="1x1"), path)


@pytest.mark.parametrize("kind", ["weight_standardization", "weight_norm"])
def test_reparametrized_kernels_are_read_as_what_the_network_computes_with(kind):
    torch.manual_seed(0)
    network = resnet_tiny("gn", 5)
    normalize_kernels(network, kind)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    weights = read_weights({"module." + k: v for k, v in network.state_dict().items()})
    plain = resnet_tiny("gn", 5)
    plain.load_state_dict(weights.tensors)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), network.eval()(images))


def test_reparametrized_kernels_that_are_incomplete_or_not_finite_are_refused():
    network = resnet_tiny("gn", 5)
    normalize_kernels(network, "weight_norm")
    state = network.state_dict()
    name = "res3.0.conv2.parametrizations.weight.original"
    with pytest.raises(ValueError, match=re.escape(f"{name}1 has no norms: {name}0 is missing")):
        read_weights({k: v for k, v in state.items() if k != f"{name}0"})
    state[f"{name}1"] = state[f"{name}1"] * torch.inf
    with pytest.raises(ValueError, match=re.escape(f"{name}1 is NaN or infinite")):
        read_weights(state)
