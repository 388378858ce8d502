"""Mask R-CNN with any norm in each of its parts: torchvision's detector around our ResNets.

The networks of [GN] section 4.2, with the options of Detectron: He et al., arXiv:1703.06870, with a
feature pyramid (Lin et al., arXiv:1612.03144) or on the features of res4 ("C4"). Anchors,
proposals, RoIAlign, losses, NMS and pasting of masks are torchvision's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from i3d_gn.models.blocks import NormFactory
from i3d_gn.models.resnet2d import ResNet2d
from i3d_gn.norm import make_norm
from i3d_gn.weights.detectors import BODY, RES5_HEADS, read_detector, with_prefixes
from i3d_gn.weights.info import WeightsInfo
from i3d_gn.weights.tensor_names import first_names

BoxHead = Literal["2fc", "4conv1fc"]
_STAGES = ("res2", "res3", "res4", "res5")
_NUM_CONVS = 4  # of the box head 4conv1fc and of the mask head


class ResNetStages(nn.Module):
    """Features of the stages of a ResNet, from images.

    Args:
        network: Whose layers are used, under the same names.
        num_stages: 4 for res2 to res5, 3 for res2 to res4.
        num_frozen: 0: nothing; 1: conv1; 2: conv1 and res2; ... Their parameters get no gradient,
            and batch norm in them uses its running statistics also in training.
    """

    def __init__(self, network: ResNet2d, *, num_stages: int, num_frozen: int) -> None:
        super().__init__()
        self.conv1, self.norm1, self.pool1 = network.conv1, network.norm1, network.pool1
        self.stage_names = _STAGES[:num_stages]
        for name in self.stage_names:
            self.add_module(name, getattr(network, name))
        frozen = ("norm1", "conv1", *self.stage_names)[: num_frozen and num_frozen + 1]
        self._frozen = [getattr(self, name) for name in frozen]
        for module in self._frozen:
            module.requires_grad_(False)
        self.train()

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Normalized images (N, 3, H, W) to features (N, C, H', W') by stage: `0` for res2, ..."""
        x = self.pool1(F.relu(self.norm1(self.conv1(images)), inplace=True))
        features = OrderedDict()
        for i, name in enumerate(self.stage_names):
            x = getattr(self, name)(x)
            features[str(i)] = x
        return features

    def train(self, mode: bool = True) -> ResNetStages:
        """Set training or evaluation mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self


class FpnBackbone(nn.Module):
    """ResNet and feature pyramid: five levels with strides 4 to 64."""

    def __init__(
        self, network: ResNet2d, channels: int, norm: NormFactory | None, num_frozen: int
    ) -> None:
        super().__init__()
        self.out_channels = channels
        self.body = ResNetStages(network, num_stages=4, num_frozen=num_frozen)
        self.fpn = FeaturePyramidNetwork(
            _stage_channels(network), channels, LastLevelMaxPool(), norm_layer=norm
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to features (N, channels, H', W') by level."""
        return self.fpn(self.body(images))


class C4Backbone(nn.Module):
    """ResNet up to res4: one level with stride 16."""

    def __init__(self, network: ResNet2d, num_frozen: int) -> None:
        super().__init__()
        self.out_channels = _stage_channels(network)[2]
        self.body = ResNetStages(network, num_stages=3, num_frozen=num_frozen)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to features (N, C, H / 16, W / 16)."""
        return OrderedDict([("0", self.body(images)["2"])])


def mask_rcnn_fpn(
    network: ResNet2d,
    num_classes: int,
    *,
    fpn_norm: str | NormFactory = "gn",
    box_head: BoxHead = "4conv1fc",
    box_head_norm: str | NormFactory = "gn",
    mask_head_norm: str | NormFactory = "gn",
    channels: int = 256,
    fc_channels: int = 1024,
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512),
    num_frozen: int = 0,
    min_size: int = 800,
    max_size: int = 1333,
    regions_per_image: int = 512,
) -> MaskRCNN:
    """Mask R-CNN with a feature pyramid; takes lists of images (3, H, W), RGB in [0, 1].

    Args:
        network: The backbone, with its norm.
        num_classes: K, without the background, which is class 0 of K + 1.
        fpn_norm: Norm of the convolutions of the pyramid, a name for `i3d_gn.norm.make_norm` or a
            function from a number of channels to a layer. With a norm other than `none`,
            convolutions have no bias.
        box_head: Two linear layers, or four 3x3 convolutions and one linear layer.
        box_head_norm: Norm of its convolutions; of `4conv1fc` only.
        mask_head_norm: Norm of the four convolutions of the mask head.
        channels: Of the pyramid and of the convolutions of the heads.
        fc_channels: Of the linear layers of the box head.
        anchor_sizes: Square root of the area of anchors in pixels, by level.
        num_frozen: See `ResNetStages`.
        min_size: Short side of images, in pixels.
        max_size: Upper limit of their long side.
        regions_per_image: Proposals that the heads are trained on.
    """
    conv_channels = [channels] * _NUM_CONVS
    head: nn.Module
    if box_head == "2fc":
        head = TwoMLPHead(channels * 7**2, fc_channels)
    else:
        head = FastRCNNConvFCHead(
            (channels, 7, 7), conv_channels, [fc_channels], _norm_layer(box_head_norm)
        )
    model = MaskRCNN(
        FpnBackbone(network, channels, _norm_layer(fpn_norm), num_frozen),
        min_size=min_size,
        max_size=max_size,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in anchor_sizes), ((0.5, 1.0, 2.0),) * len(anchor_sizes)
        ),
        box_head=head,
        box_predictor=FastRCNNPredictor(fc_channels, num_classes + 1),
        box_batch_size_per_image=regions_per_image,
        mask_head=MaskRCNNHeads(channels, conv_channels, 1, _norm_layer(mask_head_norm)),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
    )
    _init_heads(model)
    return model


def mask_rcnn_c4(
    network: ResNet2d,
    num_classes: int,
    *,
    channels: int = 256,
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512),
    num_frozen: int = 0,
    min_size: int = 800,
    max_size: int = 1333,
    regions_per_image: int = 512,
) -> MaskRCNN:
    """Mask R-CNN on the features of res4; boxes and masks share res5, with the network's norm.

    Its mask head is a transposed convolution to `channels` and a 1x1 convolution, for masks of
    14x14. Arguments are those of `mask_rcnn_fpn`.
    """
    res5 = OrderedDict[str, nn.Module](res5=network.res5)  # (R, C, 14, 14) to (R, 2 C, 7, 7)
    out_channels = _stage_channels(network)[3]
    model = MaskRCNN(
        C4Backbone(network, num_frozen),
        min_size=min_size,
        max_size=max_size,
        rpn_anchor_generator=AnchorGenerator((anchor_sizes,), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=12_000,
        rpn_pre_nms_top_n_test=6_000,
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0),
        box_head=nn.Sequential(res5 | {"pool": nn.AdaptiveAvgPool2d(1)}),
        box_predictor=FastRCNNPredictor(out_channels, num_classes + 1),
        box_batch_size_per_image=regions_per_image,
        mask_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0),
        mask_head=nn.Sequential(res5),
        mask_predictor=MaskRCNNPredictor(out_channels, channels, num_classes + 1),
    )
    _init_heads(model)
    return model


def load_detector_weights(
    model: MaskRCNN,
    source: str | PathLike[str] | Mapping[str, Any],
    category_ids: Sequence[int] = (),
    *,
    whole: bool = False,
) -> WeightsInfo:
    """Load weights of a whole detector, or of an image network into its backbone; all or nothing.

    Mean and std of the input are set to those of the weights, if they are known.

    Args:
        model: Of `mask_rcnn_fpn` or `mask_rcnn_c4`.
        source: See `i3d_gn.weights.detectors.read_detector`.
        category_ids: COCO's ids of the classes, for weights of torchvision.
        whole: Refuse weights of an image network.

    Returns:
        What is known of the weights.

    Raises:
        ValueError: The source cannot be read, or its tensors do not fit the network.
    """
    weights, is_whole = read_detector(source, category_ids)
    origin = "of the given state dict" if isinstance(source, Mapping) else str(source)
    targets = {n: t for n, t in model.state_dict().items() if not n.endswith("batches_tracked")}
    tensors = {n: t for n, t in weights.tensors.items() if not n.endswith("batches_tracked")}
    if not is_whole:
        if whole:
            raise ValueError(
                f"weights {origin} are those of an image network; give those of a trained detector"
            )
        has_fpn = isinstance(model.backbone, FpnBackbone)
        tensors = {n: t for n, t in tensors.items() if not n.startswith("head.")}
        tensors = with_prefixes(tensors, has_fpn=has_fpn)
        backbone = (BODY, *(f"{head}res5." for head in RES5_HEADS))
        targets = {name: t for name, t in targets.items() if name.startswith(backbone)}
    norms = [any("running_mean" in name for name in names) for names in (tensors, targets)]
    if norms[0] != norms[1]:
        theirs, ours = ("batch norm", "another") if norms[0] else ("another", "batch norm")
        raise ValueError(
            f"weights {origin}: their norm is {theirs} and the network's is {ours}; use weights "
            "with the same norm"
        )
    missing = [name for name in targets if name not in tensors]
    unknown = [name for name in tensors if name not in targets]
    if missing or unknown:
        raise ValueError(
            f"weights {origin} do not fit the network: {len(unknown)} tensors have no place in it "
            f"({first_names(unknown)}) and {len(missing)} of its own are missing "
            f"({first_names(missing)}); use weights of the same backbone, heads and norms"
        )
    for name, target in targets.items():
        if tensors[name].shape != target.shape:
            raise ValueError(
                f"weights {origin}: {name} has shape {tuple(tensors[name].shape)}, but the network "
                f"needs {tuple(target.shape)}"
            )
    for name, target in targets.items():
        target.copy_(tensors[name])
    if weights.info.mean is not None and weights.info.std is not None:
        transform: Any = model.transform
        transform.image_mean, transform.image_std = list(weights.info.mean), list(weights.info.std)
    return weights.info


def _stage_channels(network: ResNet2d) -> list[int]:
    return [getattr(network, name)[-1].conv3.out_channels for name in _STAGES]


def _norm_layer(norm: str | NormFactory) -> NormFactory | None:
    """For torchvision, whose convolutions have a bias if this is None."""
    if norm == "none":
        return None
    return partial(make_norm, norm, spatial_dims=2) if isinstance(norm, str) else norm


def _init_heads(model: MaskRCNN) -> None:
    """Initialize linear layers and biases as Detectron does; torchvision did the convolutions."""
    heads: Any = model.roi_heads
    for layer in heads.box_head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    for layer, std in (
        (heads.box_predictor.cls_score, 0.01),
        (heads.box_predictor.bbox_pred, 0.001),
    ):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    for name, parameter in heads.mask_predictor.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
