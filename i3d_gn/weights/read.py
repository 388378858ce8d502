"""Read weights of any codebase into our tensor names, with what is known of the network."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from i3d_gn.norm.weight_norm import computed_kernels, kernel_name
from i3d_gn.weights.download import download_weights, is_published_name, is_torchvision_name
from i3d_gn.weights.files import read_weight_file, write_safetensors
from i3d_gn.weights.info import WeightsInfo
from i3d_gn.weights.state_dicts import Entry, UnknownNetworkError, find_entry
from i3d_gn.weights.tensor_names import (
    Naming,
    first_names,
    naming_of,
    own_name,
    pytorchvideo_name,
    torchvision_name,
    vgg16_names,
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Caffe2's Kinetics models and their ports: 114.75 / 255 and 57.375 / 255.
_KINETICS_MEAN, _KINETICS_STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
# PIXEL_MEANS in Detectron's config.py, as RGB.
_DETECTRON_MEAN = (122.7717 / 255, 115.9465 / 255, 102.9801 / 255)
_BN_EPS = 1e-5
# Layers of contrastive learning in place of the classifier (MoCo v2, SimSiam).
_PROJECTION_HEAD = re.compile(r"fc\.\d+\.\w+")


@dataclass(frozen=True)
class Weights:
    """Tensors of a network, and what is known of it.

    Attributes:
        tensors: By the names of this package.
        info: What is known of the network.
        source_names: Name in this package -> name in the source, for messages.
        unused: Names in the source of tensors that do not belong to the network.
        entry: Where the network is in the source, such as `state_dict.module`; empty if the source
            is a state dict of it.
        other_entries: Other networks in the source, such as an average of the weights.
    """

    tensors: dict[str, Tensor]
    info: WeightsInfo
    source_names: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    entry: str = ""
    other_entries: tuple[str, ...] = ()


def read_weights(
    source: str | PathLike[str] | Mapping[str, Any], *, entry: str | None = None
) -> Weights:
    """Read weights in any of the namings that docs/weights.md lists.

    Args:
        source: A file (safetensors, torch.save, Caffe2 pickle, checkpoint of this package), a state
            dict, or a published name, whose file is downloaded once: a torchvision enum
            (`ResNet50_Weights.IMAGENET1K_V2`), `pytorchvideo/i3d_r50` or `pytorchvideo/c2d_r50`.
            The state dict may be nested in dictionaries and in modules (`module.`, `backbone.`).
        entry: Which state dict to read if there are several, such as `state_dict`. By default an
            exponential moving average (`state_dict_ema`, `model_ema`) is preferred.

    Raises:
        ValueError: The file cannot be read, its tensors are not those of a known network or not
            finite, or it is not clear which ones are meant.
    """
    origin = "the given state dict" if isinstance(source, Mapping) else str(source)
    info: WeightsInfo | None = None
    if isinstance(source, Mapping):
        content: Any = source
    else:
        path = download_weights(origin) if is_published_name(origin) else source
        content, info = read_weight_file(path)
    found, others = find_entry(content, entry, origin)
    tensors, unused = _tensors_of(found)
    _check_tensors({k: v for k, v in tensors.items() if kernel_name(k) != k}, origin)
    tensors = computed_kernels(tensors)
    naming = naming_of(tensors)
    assert naming is not None
    source_names = _source_names(tensors, naming, origin)
    unused += [found.prefix + name for name in tensors if name not in source_names.values()]
    renamed = {own: tensors[theirs] for own, theirs in source_names.items()}
    _check_tensors({source_names[own]: tensor for own, tensor in renamed.items()}, origin)
    head = renamed.get("head.linear.weight")
    if head is not None and head.dim() > 2:  # a 1x1x1 convolution in fully convolutional testing
        renamed["head.linear.weight"] = head.flatten(1)
    conv1 = renamed.get("conv1.weight")
    if conv1 is not None and (conv1.dim() not in (4, 5) or conv1.shape[1] != 3):
        raise ValueError(
            f"weights {origin}: {source_names['conv1.weight']} has shape {tuple(conv1.shape)}; "
            "expected (O, 3, H, W) or (O, 3, T, H, W)"
        )
    if info is None and {"config", "input", "model"} <= content.keys():
        info = _info_of_checkpoint(content, renamed, origin)
    if info is None:
        if naming == "caffe2_bn":
            renamed = _complete_affine(renamed)
        info = _info_by_naming(naming, renamed)
        if naming == "caffe2_gn" and conv1 is not None:
            renamed["conv1.weight"] = _fold_input(conv1, info)
        if is_torchvision_name(origin):
            info = dataclasses.replace(info, mean=IMAGENET_MEAN, std=IMAGENET_STD, stride_in="3x3")
    return Weights(renamed, info, source_names, tuple(unused), found.name, others)


def write_weights(path: str | PathLike[str], weights: Weights, *, naming: Naming) -> None:
    """Write a safetensors file with `weights.info` as metadata.

    Args:
        path: Of the file.
        weights: What to write.
        naming: Names to write: `i3d_gn`, `torchvision` for image networks or `pytorchvideo` for
            video networks.

    Raises:
        ValueError: A tensor has no name in that naming, or the file cannot be written.
    """
    write_safetensors(path, export_names(weights.tensors, naming), weights.info)


def export_names(tensors: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """Rename tensors of this package to `torchvision`, `pytorchvideo` or `i3d_gn` (unchanged).

    Raises:
        ValueError: A tensor has no name in that naming.
    """
    if naming == "i3d_gn":
        return dict(tensors)
    is_video = _spatial_dims(tensors) == 3
    if naming != ("pytorchvideo" if is_video else "torchvision"):
        raise ValueError(
            f"naming {naming!r} is not for {'video' if is_video else 'image'} networks; use "
            f"{'pytorchvideo' if is_video else 'torchvision'} or i3d_gn"
        )
    if "conv1_1.conv.weight" in tensors:
        layers = vgg16_names(with_norm="conv1_1.norm.weight" in tensors)
        return {
            f"{layers[layer]}.{tensor}": value
            for (layer, _, tensor), value in ((k.rpartition("."), v) for k, v in tensors.items())
        }
    rename = pytorchvideo_name if is_video else torchvision_name
    renamed = {name: rename(name) for name in tensors}
    unnamed = [name for name, theirs in renamed.items() if theirs is None]
    if unnamed:
        raise ValueError(f"{naming} has no name for {first_names(unnamed)}; use naming i3d_gn")
    return {str(renamed[name]): tensor for name, tensor in tensors.items()}


def _tensors_of(entry: Entry) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors with the entry's prefix, by name without it, and names of the other tensors."""
    tensors, unused = {}, []
    for name, value in entry.content.items():
        if isinstance(value, np.ndarray):
            if value.ndim == 0 or name.endswith("_momentum"):
                continue  # state of Caffe2's solver
            tensor = torch.from_numpy(np.array(value))
        elif isinstance(value, Tensor):
            tensor = value
        else:
            continue
        if isinstance(name, str) and name.startswith(entry.prefix):
            tensors[name.removeprefix(entry.prefix)] = tensor
        else:
            unused.append(str(name))
    return tensors, unused


def _check_tensors(tensors: Mapping[str, Tensor], origin: str) -> None:
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"weights {origin}: {name} is sparse or quantized; not supported")
        # A small file can describe huge tensors, all of whose elements are the same.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"weights {origin}: {name} of shape {tuple(tensor.shape)} is larger than its data; "
                "save a contiguous tensor"
            )
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        is_finite = torch.isfinite(tensor.float())
        if not is_finite.all():
            raise ValueError(
                f"weights {origin}: {name} is NaN or infinite in {int((~is_finite).sum())} of "
                f"{tensor.numel()} values; the file is damaged, or the training that wrote it "
                "diverged"
            )


def _source_names(tensors: Mapping[str, Tensor], naming: Naming, origin: str) -> dict[str, str]:
    """Name in this package -> name in the source, for every tensor but those of projections."""
    if "features.0.weight" in tensors or "conv1_1.conv.weight" in tensors:
        return _vgg_source_names(tensors, origin)
    renamed = {
        name: own_name(name, naming) for name in tensors if not _PROJECTION_HEAD.fullmatch(name)
    }
    unknown = [name for name, own in renamed.items() if own is None]
    if unknown:
        raise UnknownNetworkError(
            f"weights {origin}: the names are those of {naming}, but the network is not a plain "
            f"ResNet: unknown tensors {first_names(unknown)} (non-local blocks, two pathways and "
            "Caffe's BGR batch norm models are not supported)"
        )
    source_names = {str(own): name for name, own in renamed.items()}
    if len(source_names) < len(renamed):
        twice = [name for name in renamed if list(renamed.values()).count(renamed[name]) > 1]
        raise ValueError(
            f"weights {origin}: {first_names(twice)} are two names of one tensor; remove one"
        )
    return source_names


def _vgg_source_names(tensors: Mapping[str, Tensor], origin: str) -> dict[str, str]:
    with_norm = "features.1.weight" in tensors or "conv1_1.norm.weight" in tensors
    theirs = {their: own for own, their in vgg16_names(with_norm=with_norm).items()}
    own_layers = set(theirs.values())
    source_names = {}
    for name in tensors:
        layer, _, kind = name.rpartition(".")
        own = layer if layer in own_layers else theirs.get(layer)
        if own is None:
            raise ValueError(f"weights {origin}: a VGG-16 has no tensor {name}")
        source_names[f"{own}.{kind}"] = name
    return source_names


def _complete_affine(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add running statistics that make a batch norm the affine map it was folded into.

    video-nonlocal-net's models for fine-tuning have `_bn_s` and `_bn_b` only.
    """
    complete = {}
    for name, tensor in tensors.items():
        complete[name] = tensor
        layer, _, kind = name.rpartition(".")
        if "norm" in layer and kind == "bias" and f"{layer}.running_mean" not in tensors:
            complete[f"{layer}.running_mean"] = torch.zeros_like(tensor)
            complete[f"{layer}.running_var"] = torch.full_like(tensor, 1 - _BN_EPS)
    return complete


def _info_by_naming(naming: Naming, tensors: Mapping[str, Tensor]) -> WeightsInfo:
    norm = _norm_of(tensors)
    known: dict[str, Any] = {}
    if naming == "caffe2_gn":
        known = {"mean": _DETECTRON_MEAN, "std": IMAGENET_STD, "stride_in": "3x3"}
    elif naming == "caffe2_bn":
        # Stem and pool padding are unknown: video-nonlocal-net names the tensors of both of its
        # stems alike, and so does PySlowFast's I3D_8x8_R50.pkl, whose pools are padded.
        known = {"mean": _KINETICS_MEAN, "std": _KINETICS_STD, "stride_in": "3x3"}
    elif naming in ("pytorchvideo", "pyslowfast"):
        known = {"mean": _KINETICS_MEAN, "std": _KINETICS_STD, "stride_in": "3x3"}
        known |= {"stem": "8x8", "pool_padding": 1}
    elif naming == "mmaction2":
        known = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "stride_in": "3x3"}
        known |= {"stem": "mmaction2", "pool_padding": 1}
    if _spatial_dims(tensors) == 3:
        known |= {"inflate": tensors["conv1.weight"].shape[2] > 1}
    return WeightsInfo(
        source=naming,
        spatial_dims=_spatial_dims(tensors),
        norm=norm,
        # All published GN models have 32 groups; a state dict of this package may have any.
        num_groups=32 if norm == "gn" and naming != "i3d_gn" else None,
        **known,
    )


def _info_of_checkpoint(
    content: Mapping[str, Any], tensors: Mapping[str, Tensor], origin: str
) -> WeightsInfo:
    """From the config in a checkpoint of this package, of a video or an image run."""
    try:
        return _info_of_config(content, tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"weights {origin}: its config was not written by this version of i3d_gn "
            f"({type(error).__name__}: {error}); save the state dict under 'model' by itself"
        ) from error


def _info_of_config(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> WeightsInfo:
    model = content["config"]["model"]
    norm = model["norm"]
    is_gn = norm == "gn"
    is_video = _spatial_dims(tensors) == 3
    default_groups = 8 if model["name"].endswith(("_small", "_tiny")) else 32
    per_group = model["channels_per_group"] if is_gn else None
    return WeightsInfo(
        source="i3d_gn",
        spatial_dims=3 if is_video else 2,
        norm="bn" if _norm_of(tensors) == "bn" else norm,
        num_groups=(model["num_groups"] or default_groups) if is_gn and per_group is None else None,
        channels_per_group=per_group,
        mean=tuple(content["input"]["mean"]),
        std=tuple(content["input"]["std"]),
        stride_in=model.get("stride_in", "3x3"),
        stem=model["stem"] if is_video else None,
        inflate=model["inflate"] if is_video else None,
        pool_padding=model["pool_padding"] if is_video else None,
        class_names=tuple(content["class_names"]) if "class_names" in content else None,
        settings={k: content["config"][k] for k in ("clip", "test")} if is_video else None,
    )


def _fold_input(conv1: Tensor, info: WeightsInfo) -> Tensor:
    """Fold Detectron's input, BGR in [0, 255] minus a mean, into the weights of conv1.

    The result takes RGB, x = (rgb / 255 - mean) / std, for which Detectron's input is
    255 * std * x. The mean must stay Detectron's: a convolution that pads with zeros and has no
    bias cannot absorb another one.
    """
    assert info.std is not None
    scale = 255 * torch.tensor(info.std, dtype=torch.float64)
    scale = scale.view(3, *(1 for _ in conv1.shape[2:]))
    return (conv1.flip(1).double() * scale).to(conv1.dtype)


def _norm_of(tensors: Mapping[str, Tensor]) -> str:
    if any(name.endswith(".running_mean") for name in tensors):
        return "bn"
    return "gn" if any("norm" in name for name in tensors) else "none"


def _spatial_dims(tensors: Mapping[str, Tensor]) -> int:
    first = tensors.get("conv1.weight")
    return 2 if first is None else first.dim() - 2
