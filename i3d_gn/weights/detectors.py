"""Read Mask R-CNNs of Detectron, torchvision and this package, or the backbone of an image network.

Names in this package are torchvision's, with those of `tensor_names` for the layers of the ResNet:
`backbone.body.res2.0.conv1.weight`, `backbone.fpn.inner_blocks.0.0.weight`, `rpn.head....`,
`roi_heads.{box,mask}_{head,predictor}....`.
"""

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from i3d_gn.weights.download import download_weights, is_published_name
from i3d_gn.weights.files import read_weight_file
from i3d_gn.weights.read import Weights, read_weights

BODY, RES5_HEADS = "backbone.body.", ("roi_heads.box_head.", "roi_heads.mask_head.")

# Blobs of Detectron whose names do not depend on a number.
_DETECTRON_LAYERS = {
    "conv_rpn": "rpn.head.conv.0.0",
    "rpn_cls_logits": "rpn.head.cls_logits",
    "rpn_bbox_pred": "rpn.head.bbox_pred",
    "cls_score": "roi_heads.box_predictor.cls_score",
    "bbox_pred": "roi_heads.box_predictor.bbox_pred",
    "conv5_mask": "roi_heads.mask_predictor.conv5_mask",
    "mask_fcn_logits": "roi_heads.mask_predictor.mask_fcn_logits",
}
_DETECTRON_BLOB = re.compile(r"(?P<layer>.+?)(?P<gn>_gn)?_(?P<tensor>[wbs])")
_DETECTRON_FPN = re.compile(r"fpn_(?P<inner>inner_)?res(?P<stage>[2-5])_\d+_sum(?:_lateral)?")
_DETECTRON_HEAD = re.compile(r"(?P<head>head_conv|_(?:\[mask\]|mask)_fcn)(?P<i>[1-4])")
_DETECTRON_BACKBONE = re.compile(r"(res_)?conv1_.+|res[2-5]_\d+_branch.+")

# torchvision's names before version 0.13, which its published files have.
_OLD_NAMES = (
    (re.compile(r"(rpn\.head\.conv)\.(weight|bias)"), r"\1.0.0.\2"),
    (re.compile(r"(backbone\.fpn\.\w+_blocks\.\d)\.(weight|bias)"), r"\1.0.\2"),
)
_OLD_MASK_LAYER = re.compile(r"(roi_heads\.mask_head)\.mask_fcn(\d)\.(weight|bias)")
# torchvision runs its published weights with an eps of 0 in batch norm.
_BN_EPS = 1e-5
_PREDICTORS = {"cls_score": 1, "bbox_pred": 4, "mask_fcn_logits": 1}  # rows per class


def read_detector(
    source: str | PathLike[str] | Mapping[str, Any], category_ids: Sequence[int] = ()
) -> tuple[Weights, bool]:
    """Read weights of a detector or of an image network.

    Args:
        source: A file, or what it contains: a Mask R-CNN of Detectron (Caffe2 pickle), torchvision
            or this package (also a checkpoint), or anything that `read_weights` reads.
        category_ids: COCO's ids of the classes of the network, in its order. torchvision predicts
            one class per id up to the highest; the others are dropped.

    Returns:
        The weights, and whether they are those of a whole detector. Those of an image network have
        the names of `read_weights`.

    Raises:
        ValueError: The file cannot be read, or its tensors are not those of a known network.
    """
    origin = "the given state dict" if isinstance(source, Mapping) else str(source)
    content: Any = source
    if not isinstance(source, Mapping):
        path = download_weights(origin) if is_published_name(origin) else source
        content, _ = read_weight_file(path)
    inputs = content.get("input") if isinstance(content, Mapping) else None
    found = content
    while isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
        found = found["model"]
    tensors = {
        name: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
        for name, value in (found.items() if isinstance(found, Mapping) else ())
        if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.ndim)
        if not str(name).endswith("_momentum")
    }
    if any(name.startswith("conv_rpn") for name in tensors):
        return _from_detectron(tensors, origin), True
    if not any(name.startswith(BODY) for name in tensors):
        return read_weights(source), False
    return _from_torchvision(tensors, category_ids, inputs), True


def _from_detectron(tensors: Mapping[str, Tensor], origin: str) -> Weights:
    body = {name: t for name, t in tensors.items() if _DETECTRON_BACKBONE.fullmatch(name)}
    backbone = read_weights(body)  # folds Detectron's BGR input in [0, 255] into conv1
    renamed = with_prefixes(backbone.tensors, has_fpn=any(n.startswith("fpn_") for n in tensors))
    with_convs = any(name.startswith("head_conv") for name in tensors)
    unknown = []
    for name, tensor in tensors.items():
        if name in body:
            continue
        own = detectron_name(name, has_convs=with_convs)
        if own is None:
            unknown.append(name)
        else:
            renamed[own] = tensor
    if unknown:
        raise ValueError(
            f"weights {origin}: unknown blobs {', '.join(sorted(unknown)[:6])}; supported are "
            "Detectron's Mask R-CNNs with GN (FPN or C4)"
        )
    return Weights(renamed, backbone.info)


def detectron_name(blob: str, *, has_convs: bool) -> str | None:
    """Name in this package of a blob of Detectron outside the ResNet, None if it has none.

    Args:
        blob: Its name.
        has_convs: Whether the box head is 4conv1fc, in which `fc6` is the only linear layer.
    """
    match = _DETECTRON_BLOB.fullmatch(blob)
    if match is None:
        return None
    layer, kind = match["layer"], "bias" if match["tensor"] == "b" else "weight"
    part = "1" if match["gn"] else "0"  # of torchvision's Conv2dNormActivation
    if fpn := _DETECTRON_FPN.fullmatch(layer):
        blocks = "inner_blocks" if fpn["inner"] else "layer_blocks"
        return f"backbone.fpn.{blocks}.{int(fpn['stage']) - 2}.{part}.{kind}"
    if head := _DETECTRON_HEAD.fullmatch(layer):
        where = "box_head" if head["head"] == "head_conv" else "mask_head"
        return f"roi_heads.{where}.{int(head['i']) - 1}.{part}.{kind}"
    if layer in ("fc6", "fc7"):
        if not has_convs:
            return f"roi_heads.box_head.{layer}.{kind}"
        return f"roi_heads.box_head.5.{kind}" if layer == "fc6" else None  # 4: nn.Flatten
    own = _DETECTRON_LAYERS.get(layer.removesuffix("_fpn2") if "rpn" in layer else layer)
    return None if own is None else f"{own}.{kind}"


def _from_torchvision(
    tensors: Mapping[str, Tensor], category_ids: Sequence[int], inputs: Any
) -> Weights:
    """Torchvision's names and those of this package, which differ in the ResNet."""
    body = {n.removeprefix(BODY): t for n, t in tensors.items() if n.startswith(BODY)}
    is_own = any(name.startswith("res2.") for name in body)
    backbone = read_weights(body)
    is_old = "rpn.head.conv.weight" in tensors
    renamed = {f"{BODY}{name}": tensor for name, tensor in backbone.tensors.items()}
    if is_old:
        for name in [name for name in renamed if name.endswith("running_var")]:
            renamed[name] = renamed[name] - _BN_EPS
    for name, tensor in tensors.items():
        if name.startswith(BODY):
            continue
        renamed[_current_name(name)] = tensor
    logits = renamed.get("roi_heads.box_predictor.cls_score.weight")
    if not is_own and category_ids and logits is not None:
        _select_classes(renamed, (0, *category_ids), len(logits))
    info = backbone.info
    if isinstance(inputs, Mapping):
        mean, std = tuple(inputs["mean"]), tuple(inputs["std"])
        info = type(info)(source="i3d_gn", spatial_dims=2, norm=info.norm, mean=mean, std=std)
    return Weights(renamed, info)


def _current_name(name: str) -> str:
    """Torchvision's name since version 0.13 of a tensor outside the ResNet."""
    for pattern, replacement in _OLD_NAMES:
        if pattern.fullmatch(name):
            return pattern.sub(replacement, name)
    if old := _OLD_MASK_LAYER.fullmatch(name):
        return f"{old[1]}.{int(old[2]) - 1}.0.{old[3]}"
    return name


def _select_classes(tensors: dict[str, Tensor], ids: Sequence[int], num_rows: int) -> None:
    """Keep the rows of the predictors for the categories `ids`, in place."""
    if num_rows == len(ids) or max(ids) >= num_rows:
        return
    for name, tensor in tensors.items():
        rows = _PREDICTORS.get(name.split(".")[-2]) if name.startswith("roi_heads.") else None
        if rows is not None:
            by_class = tensor.unflatten(0, (num_rows, rows))
            tensors[name] = by_class[torch.tensor(ids)].flatten(0, 1)


def with_prefixes(body: Mapping[str, Tensor], *, has_fpn: bool) -> dict[str, Tensor]:
    """Names of ResNet tensors in a detector; without a pyramid, res5 is the head of regions."""
    renamed = {}
    for name, tensor in body.items():
        at_head = not has_fpn and name.startswith("res5.")
        for prefix in RES5_HEADS if at_head else (BODY,):
            renamed[f"{prefix}{name}"] = tensor
    return renamed
