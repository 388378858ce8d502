import re

import pytest
import torch
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.ops.misc import FrozenBatchNorm2d

from i3d_gn.models.mask_rcnn import load_detector_weights, mask_rcnn_c4, mask_rcnn_fpn
from i3d_gn.models.resnet2d import ResNet2d, resnet50, resnet_tiny
from i3d_gn.norm import FrozenBatchNorm, GroupNorm

SHALLOW = (1, 1, 1, 1)
IMAGES = [torch.rand(3, 70, 90), torch.rand(3, 64, 64)]


def count(module):
    return sum(p.numel() for p in module.parameters())


def faster(network):
    """Fewer proposals and more detections among them."""
    network.rpn._post_nms_top_n["testing"] = 40
    network.roi_heads.score_thresh = 0.01
    network.roi_heads.detections_per_img = 20
    return network


@pytest.fixture(scope="module")
def theirs():
    """torchvision's detector with random weights, and its outputs on `IMAGES`."""
    torch.manual_seed(0)
    network = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=91, min_size=64, max_size=96
    )
    generator = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if tensor.dim() == 1 and "body" in name and not name.endswith("bias"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.5)
    return faster(network).eval()


def outputs(network):
    heads = {}

    def keep(name):
        return lambda _module, _inputs, output: heads.setdefault(name, output)

    hooks = [
        network.rpn.head.register_forward_hook(keep("rpn")),
        network.roi_heads.box_predictor.register_forward_hook(keep("boxes")),
        network.roi_heads.mask_predictor.register_forward_hook(keep("masks")),
    ]
    with torch.no_grad():
        detections = network(IMAGES)
    for hook in hooks:
        hook.remove()
    return heads, detections


def ours(num_classes=90):
    network = mask_rcnn_fpn(
        resnet50("frozen_bn"), num_classes, fpn_norm="none", box_head="2fc",
        mask_head_norm="none", min_size=64, max_size=96,
    )  # fmt: skip
    return faster(network).eval()


def test_fpn_with_frozen_bn_equals_torchvision(theirs):
    network = ours()
    load_detector_weights(network, theirs.state_dict())
    (heads, detections), (expected_heads, expected) = outputs(network), outputs(theirs)
    torch.testing.assert_close(heads, expected_heads, rtol=1e-4, atol=1e-4)
    assert all(len(image["boxes"]) > 5 for image in expected)
    torch.testing.assert_close(detections, expected, rtol=1e-3, atol=1e-3)


def old_name(name):
    name = re.sub(r"^(rpn\.head\.conv)\.0\.0", r"\1", name)
    name = re.sub(r"(_blocks\.\d)\.0\.", r"\1.", name)
    return re.sub(r"(mask_head)\.(\d)\.0\.", lambda m: f"{m[1]}.mask_fcn{int(m[2]) + 1}.", name)


def test_published_torchvision_names_and_eps(theirs, tmp_path):
    """Its published file has older names, and is used with an eps of 0."""
    old = {old_name(name): tensor for name, tensor in theirs.state_dict().items()}
    path = tmp_path / "maskrcnn.pth"
    torch.save(old, path)
    exact = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=91, min_size=64, max_size=96
    )
    exact.load_state_dict(old)
    for module in exact.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            module.eps = 1e-30  # torch 2.11 rejects 0; in float32 the sum is the same
    exact.eval()
    network = ours()
    load_detector_weights(network, path)
    image = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        images, _ = exact.transform(image)
        features = network.backbone(images.tensors)
        for level, expected in exact.backbone(images.tensors).items():
            torch.testing.assert_close(features[level], expected, rtol=1e-4, atol=1e-4)


def test_classes_of_torchvision_are_selected_by_category(theirs):
    ids = [1, 5, 90]
    network = ours(num_classes=3)
    load_detector_weights(network, theirs.state_dict(), ids)
    rows = [0, *ids]
    head, expected = network.roi_heads, theirs.roi_heads
    assert torch.equal(
        head.box_predictor.cls_score.weight, expected.box_predictor.cls_score.weight[rows]
    )
    boxes = expected.box_predictor.bbox_pred.bias.view(91, 4)[rows].flatten()
    assert torch.equal(head.box_predictor.bbox_pred.bias, boxes)
    masks = expected.mask_predictor.mask_fcn_logits.weight[rows]
    assert torch.equal(head.mask_predictor.mask_fcn_logits.weight, masks)


def test_parameter_counts_by_hand():
    with torch.device("meta"):
        fpn = mask_rcnn_fpn(resnet50("gn"), 80)
        plain = mask_rcnn_fpn(
            resnet50("frozen_bn"), 80, fpn_norm="none", box_head="2fc", mask_head_norm="none"
        )
        c4 = mask_rcnn_c4(resnet50("gn"), 80)
        res5 = count(resnet50("gn").res5)
        reference = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=81)
    # 1x1 and 3x3 convolutions without bias, gamma and beta of 256 channels.
    laterals, outputs_ = (256 + 512 + 1024 + 2048) * 256, 4 * 256 * 256 * 9
    assert count(fpn.backbone.fpn) == laterals + outputs_ + 8 * 2 * 256
    assert count(plain.backbone.fpn) == laterals + outputs_ + 8 * 256  # biases
    convs = 4 * (256 * 256 * 9 + 2 * 256)
    assert count(fpn.roi_heads.box_head) == convs + 256 * 49 * 1024 + 1024
    assert count(plain.roi_heads.box_head) == 256 * 49 * 1024 + 1024 + 1024 * 1024 + 1024
    assert count(fpn.roi_heads.mask_head) == convs
    assert count(plain.roi_heads.mask_head) == 4 * (256 * 256 * 9 + 256)
    predictors = 1024 * 81 * 5 + 81 * 5
    assert count(fpn.roi_heads.box_predictor) == predictors
    assert count(fpn.roi_heads.mask_predictor) == 256 * 256 * 4 + 256 + 256 * 81 + 81
    assert count(fpn.rpn) == 256 * 256 * 9 + 256 + 256 * 15 + 15
    assert count(fpn.backbone.body) == 25_557_032 - 2048 * 1000 - 1000
    # torchvision's second version has batch norm in the same places, and one more RPN convolution.
    assert count(fpn) == count(reference) - (256 * 256 * 9 + 256)
    assert count(c4.rpn) == 1024 * 1024 * 9 + 1024 + 1024 * 15 * 5 + 15 * 5
    assert count(c4.roi_heads.box_head) == res5
    c4_masks = 2048 * 256 * 4 + 256 + 256 * 81 + 81
    assert count(c4.roi_heads) == res5 + 2048 * 81 * 5 + 81 * 5 + c4_masks


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        # [GN] Table 5: normalization of the backbone (with the pyramid), box head, mask head.
        (("frozen_bn", "none", "none", "none"), {GroupNorm: 0, FrozenBatchNorm: 17}),
        (("frozen_bn", "none", "gn", "gn"), {GroupNorm: 8, FrozenBatchNorm: 17}),
        (("gn", "gn", "gn", "gn"), {GroupNorm: 17 + 8 + 8, FrozenBatchNorm: 0}),
    ],
)
def test_norm_of_each_part(parts, wanted):
    backbone, fpn, box, mask = parts
    with torch.device("meta"):
        network = mask_rcnn_fpn(
            ResNet2d(SHALLOW, norm=backbone),
            3,
            fpn_norm=fpn,
            box_head_norm=box,
            mask_head_norm=mask,
        )
    kinds = [type(module) for module in network.modules()]
    assert {kind: kinds.count(kind) for kind in wanted} == wanted


def targets(*num_objects):
    return [
        {
            "boxes": torch.tensor([[4.0, 6.0, 40.0, 50.0]] * n).reshape(n, 4),
            "labels": torch.ones(n, dtype=torch.int64),
            "masks": torch.ones(n, *image.shape[1:], dtype=torch.uint8),
        }
        for n, image in zip(num_objects, IMAGES, strict=True)
    ]


@pytest.mark.parametrize("norm", ["gn", "bn", "frozen_bn"])
@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_losses_have_gradients_in_all_that_is_not_frozen(kind, norm):
    network = resnet_tiny(norm)
    small = {"channels": 32, "num_frozen": 2, "min_size": 64, "regions_per_image": 16}
    if kind == "fpn":
        head_norm = "gn" if norm == "frozen_bn" else norm
        norms = {"box_head_norm": head_norm, "mask_head_norm": head_norm, "fpn_norm": head_norm}
        model = mask_rcnn_fpn(network, 2, fc_channels=32, **norms, **small)
    else:
        model = mask_rcnn_c4(network, 2, **small)
    assert model.backbone.body.training
    assert not model.backbone.body.res2.training
    losses = model(IMAGES, targets(1, 2))
    assert len(losses) == 5
    sum(losses.values()).backward()
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    assert frozen == {
        name
        for name, _ in model.named_parameters()
        if re.match(r"backbone\.body\.(conv1|norm1|res2)\.", name)
    }


@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_images_without_objects_have_finite_gradients_and_statistics(norm):
    model = mask_rcnn_fpn(
        resnet_tiny(norm), 2, channels=32, fc_channels=32, min_size=64, regions_per_image=16,
        fpn_norm=norm, box_head_norm=norm, mask_head_norm=norm,
    )  # fmt: skip
    losses = model(IMAGES, targets(0, 0))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(b.isfinite().all() for b in model.buffers())
