import numpy as np
import pytest
import torch
from torch import nn

from i3d_gn.models.mask_rcnn import load_detector_weights, mask_rcnn_c4, mask_rcnn_fpn
from i3d_gn.models.resnet2d import ResNet2d, resnet50, resnet_tiny
from i3d_gn.weights.tensor_names import torchvision_name

SHALLOW = (1, 1, 1, 1)


def randomize(network, randomized):
    randomized(network)
    for parameter in network.parameters():
        if parameter.dim() > 1:  # so that activations neither vanish nor explode
            nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
    return network.eval()


def detectron_blobs(network, caffe2_blobs):
    """Blobs of a detector of ours under Detectron's names, written independently."""
    state = network.state_dict()
    body = {n.removeprefix("backbone.body."): t for n, t in state.items() if ".body." in n}
    head = "roi_heads.box_head."
    body |= {n.removeprefix(head): t for n, t in state.items() if n.startswith(f"{head}res5.")}
    blobs = caffe2_blobs(body, "gn")
    last = {2: 0, 3: 0, 4: 0, 5: 0}  # last block of each stage of `shallow`
    for stage, block in last.items():
        inner = f"fpn_inner_res{stage}_{block}_sum" + ("" if stage == 5 else "_lateral")
        for blob, part in ((inner, "inner"), (f"fpn_res{stage}_{block}_sum", "layer")):
            name = f"backbone.fpn.{part}_blocks.{stage - 2}"
            blobs[f"{blob}_w"] = state.get(f"{name}.0.weight")
            blobs[f"{blob}_gn_s"] = state.get(f"{name}.1.weight")
            blobs[f"{blob}_gn_b"] = state.get(f"{name}.1.bias")
    for i in range(4):
        for blob, part in ((f"head_conv{i + 1}", "box"), (f"_mask_fcn{i + 1}", "mask")):
            name = f"roi_heads.{part}_head.{i}"
            blobs[f"{blob}_w"] = state.get(f"{name}.0.weight")
            blobs[f"{blob}_gn_s"] = state.get(f"{name}.1.weight")
            blobs[f"{blob}_gn_b"] = state.get(f"{name}.1.bias")
    level = "_fpn2" if "backbone.fpn.layer_blocks.0.0.weight" in state else ""
    for blob, name in {
        f"conv_rpn{level}": "rpn.head.conv.0.0",
        f"rpn_cls_logits{level}": "rpn.head.cls_logits",
        f"rpn_bbox_pred{level}": "rpn.head.bbox_pred",
        "fc6": "roi_heads.box_head.5",
        "cls_score": "roi_heads.box_predictor.cls_score",
        "bbox_pred": "roi_heads.box_predictor.bbox_pred",
        "conv5_mask": "roi_heads.mask_predictor.conv5_mask",
        "mask_fcn_logits": "roi_heads.mask_predictor.mask_fcn_logits",
    }.items():
        blobs[f"{blob}_w"] = state.get(f"{name}.weight")
        blobs[f"{blob}_b"] = state.get(f"{name}.bias")
    return {n: np.asarray(b) for n, b in blobs.items() if b is not None}


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_detectron_pickle_gives_its_outputs(
    kind, tmp_path, randomized, caffe2_blobs, write_python2_pickle
):
    def make():
        if kind == "c4":
            return mask_rcnn_c4(ResNet2d(SHALLOW, norm="gn", width=32), 3, channels=32)
        network = ResNet2d(SHALLOW, norm="gn", width=32)
        return mask_rcnn_fpn(network, 3, channels=64, fc_channels=32)

    network = randomize(make(), randomized)
    path = tmp_path / "model_final.pkl"
    write_python2_pickle(path, {"blobs": detectron_blobs(network, caffe2_blobs), "cfg": "x"})
    loaded = make().eval()
    info = load_detector_weights(loaded, path)
    # Detectron's input is BGR in [0, 255] minus a mean, without division by a std.
    rgb = torch.rand(1, 3, 64, 64)
    bgr = (rgb * 255).flip(1) - torch.tensor([102.9801, 115.9465, 122.7717]).view(1, 3, 1, 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (info.mean, info.std))
    with torch.no_grad():
        for level, expected in network.backbone(bgr).items():
            actual = loaded.backbone((rgb - mean) / std)[level]
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert loaded.transform.image_mean == list(info.mean)
    expected = network.state_dict()
    for name, tensor in loaded.state_dict().items():
        if name != "backbone.body.conv1.weight":
            assert torch.equal(tensor, expected[name]), name


def test_backbone_from_an_image_network(randomized, tmp_path, caffe2_blobs, write_python2_pickle):
    image_network = randomized(ResNet2d(SHALLOW, norm="gn", width=32, num_classes=7))
    path = tmp_path / "R-50-GN.pkl"
    write_python2_pickle(path, caffe2_blobs(image_network.state_dict(), "gn"))
    plain = {torchvision_name(name): t for name, t in image_network.state_dict().items()}
    for source in (plain, image_network.state_dict(), path):
        for make in (mask_rcnn_fpn, mask_rcnn_c4):
            options = {"fc_channels": 32} if make is mask_rcnn_fpn else {}
            network = make(ResNet2d(SHALLOW, norm="gn", width=32), 3, channels=64, **options)
            load_detector_weights(network, source)
            res5 = (
                network.backbone.body.res5
                if make is mask_rcnn_fpn
                else network.roi_heads.mask_head.res5
            )
            for name, tensor in image_network.res5.state_dict().items():
                assert torch.equal(res5.state_dict()[name], tensor)
            res4 = network.backbone.body.res4[0].norm3.weight
            assert torch.equal(res4, image_network.res4[0].norm3.weight)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (lambda: resnet_tiny("bn").state_dict(), "norm is batch norm and the network's is another"),
        (lambda: resnet50("gn").state_dict(), "do not fit the network"),
        (lambda: ResNet2d(SHALLOW, norm="gn").state_dict(), "has shape .* but the network needs"),
        ("missing.pth", "no such file"),
        ("MaskRCNN_Nowhere", "no such file"),
    ],
)
def test_weights_that_do_not_fit_are_one_line_errors(source, line):
    network = mask_rcnn_fpn(resnet_tiny("gn"), 3, channels=32, fc_channels=32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    source = source if isinstance(source, str) else source()
    with pytest.raises(ValueError, match=line) as caught:
        load_detector_weights(network, source)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
