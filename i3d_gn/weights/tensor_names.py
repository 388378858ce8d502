"""Tensor names of ResNets and VGG-16 in other codebases, and their names in this package.

Names in this package, for image and video networks alike: `conv1`, `norm1`,
`res2.0.{conv1,norm1,conv2,norm2,conv3,norm3,shortcut_conv,shortcut_norm}` to `res5`, `head.linear`;
for VGG-16 `conv1_1.{conv,norm}` to `conv5_3`, `fc6`, `fc7`, `fc8`.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Literal

Naming = Literal[
    "i3d_gn", "torchvision", "pytorchvideo", "pyslowfast", "mmaction2", "caffe2_bn", "caffe2_gn"
]

_LAYER = r"(?P<layer>[\w.]+)\.(?P<tensor>\w+)"
_VGG16_CONVS = tuple(
    f"conv{stage}_{i}" for stage, n in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, n + 1)
)
_VGG16_LINEAR = {"fc6": "classifier.0", "fc7": "classifier.3", "fc8": "classifier.6"}

_OWN_BLOCK = re.compile(
    r"res([2-5])\.(\d+)\.(conv[123]|norm[123]|shortcut_conv|shortcut_norm)\.(\w+)"
)
_OWN_STEM = re.compile(r"(conv1|norm1)\.(\w+)")

# torchvision and timm; GroupNorm-reproduce names a group norm gn1 where they have bn1.
_TORCHVISION_BLOCK = re.compile(
    r"layer([1-4])\.(\d+)\.(conv[123]|[bg]n[123]|downsample\.[01])\.(\w+)"
)
_TORCHVISION_STEM = re.compile(r"(conv1|[bg]n1)\.(\w+)")
_TORCHVISION_SHORTCUT = {"downsample.0": "shortcut_conv", "downsample.1": "shortcut_norm"}

_PYTORCHVIDEO_PLAIN = {
    "blocks.0.conv": "conv1",
    "blocks.0.norm": "norm1",
    "blocks.6.proj": "head.linear",
}
# blocks.2 is pool2, which has no tensors.
_PYTORCHVIDEO_STAGES = {"1": "2", "3": "3", "4": "4", "5": "5"}
_PYTORCHVIDEO_LAYERS = {
    "branch2.conv_a": "conv1",
    "branch2.norm_a": "norm1",
    "branch2.conv_b": "conv2",
    "branch2.norm_b": "norm2",
    "branch2.conv_c": "conv3",
    "branch2.norm_c": "norm3",
    "branch1_conv": "shortcut_conv",
    "branch1_norm": "shortcut_norm",
}
_PYTORCHVIDEO_BLOCK = re.compile(rf"blocks\.([1345])\.res_blocks\.(\d+)\.{_LAYER}")

_PYSLOWFAST_PLAIN = {
    "s1.pathway0_stem.conv": "conv1",
    "s1.pathway0_stem.bn": "norm1",
    "head.projection": "head.linear",
}
_PYSLOWFAST_BLOCK = re.compile(rf"s([2-5])\.pathway0_res(\d+)\.{_LAYER}")
_PYSLOWFAST_LAYERS = {
    **{f"branch2.{letter}": f"conv{i}" for i, letter in enumerate("abc", 1)},
    **{f"branch2.{letter}_bn": f"norm{i}" for i, letter in enumerate("abc", 1)},
    "branch1": "shortcut_conv",
    "branch1_bn": "shortcut_norm",
}

_MMACTION2_PLAIN = {
    "backbone.conv1.conv": "conv1",
    "backbone.conv1.bn": "norm1",
    "cls_head.fc_cls": "head.linear",
}
_MMACTION2_BLOCK = re.compile(rf"backbone\.layer([1-4])\.(\d+)\.{_LAYER}")
_MMACTION2_LAYERS = {
    **{f"conv{i}.conv": f"conv{i}" for i in (1, 2, 3)},
    **{f"conv{i}.bn": f"norm{i}" for i in (1, 2, 3)},
    "downsample.conv": "shortcut_conv",
    "downsample.bn": "shortcut_norm",
}

# Detectron's group norm models and video-nonlocal-net; _riv is the variance, not its inverse.
_CAFFE2_TENSORS = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
_CAFFE2_STEM_NORM = re.compile(r"(?:res_conv1_bn|conv1_gn)_(s|b|rm|riv)")
_CAFFE2_BLOCK = re.compile(r"res([2-5])_(\d+)_branch(2[abc]|1)_(?:(w)|(?:bn|gn)_(s|b|rm|riv))")
_CAFFE2_HEAD = re.compile(r"pred_([wb])")


# A tensor by which a naming is recognized.
NAMING_SIGNS: tuple[tuple[Naming, str], ...] = (
    ("caffe2_gn", "conv1_gn_s"),
    ("caffe2_bn", "res_conv1_bn_s"),
    ("pytorchvideo", "blocks.0.conv.weight"),
    ("pyslowfast", "s1.pathway0_stem.conv.weight"),
    ("mmaction2", "backbone.conv1.conv.weight"),
    ("torchvision", "layer1.0.conv3.weight"),  # ResNet-18 and 34 have no conv3
    ("torchvision", "features.0.weight"),
    ("i3d_gn", "res2.0.conv1.weight"),
    ("i3d_gn", "conv1_1.conv.weight"),
)


def naming_of(names: Collection[str]) -> Naming | None:
    """The naming that these tensor names follow, None if unknown."""
    return next((naming for naming, sign in NAMING_SIGNS if sign in names), None)


def own_name(name: str, naming: Naming) -> str | None:
    """Name in this package of a tensor of another codebase's ResNet, None if it has none."""
    return _TO_OWN[naming](name)


def torchvision_name(name: str) -> str | None:
    """Name in torchvision of a tensor of our image ResNet, None if it has none."""
    if match := _OWN_STEM.fullmatch(name):
        return f"{match[1].replace('norm', 'bn')}.{match[2]}"
    if match := _OWN_BLOCK.fullmatch(name):
        stage, block, layer, tensor = match.groups()
        back = {own: theirs for theirs, own in _TORCHVISION_SHORTCUT.items()}
        layer = back.get(layer) or layer.replace("norm", "bn")
        return f"layer{int(stage) - 1}.{block}.{layer}.{tensor}"
    return name.replace("head.linear", "fc") if name.startswith("head.linear.") else None


def pytorchvideo_name(name: str) -> str | None:
    """Name in pytorchvideo of a tensor of our video ResNet, None if it has none."""
    layer, _, tensor = name.rpartition(".")
    for theirs, own in _PYTORCHVIDEO_PLAIN.items():
        if layer == own:
            return f"{theirs}.{tensor}"
    if match := _OWN_BLOCK.fullmatch(name):
        stage = {own: theirs for theirs, own in _PYTORCHVIDEO_STAGES.items()}[match[1]]
        layer = {own: theirs for theirs, own in _PYTORCHVIDEO_LAYERS.items()}[match[3]]
        return f"blocks.{stage}.res_blocks.{match[2]}.{layer}.{match[4]}"
    return None


def vgg16_names(*, with_norm: bool) -> dict[str, str]:
    """Layers of VGG-16: name in this package -> name in torchvision.

    The numbers in torchvision's names count activations and pools too.
    """
    names: dict[str, str] = {}
    index = 0
    for layer, following in zip(_VGG16_CONVS, (*_VGG16_CONVS[1:], None), strict=True):
        names[f"{layer}.conv"] = f"features.{index}"
        if with_norm:
            names[f"{layer}.norm"] = f"features.{index + 1}"
        index += 3 if with_norm else 2
        if following is None or following[4] != layer[4]:
            index += 1  # the pool at the end of a stage
    return {**names, **_VGG16_LINEAR}


def first_names(names: Sequence[str]) -> str:
    """The first six names, for a one-line message."""
    if not names:
        return "none"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _same(name: str) -> str | None:
    known = _OWN_STEM.fullmatch(name) or _OWN_BLOCK.fullmatch(name)
    return name if known or name.startswith("head.linear.") else None


def _from_torchvision(name: str) -> str | None:
    if match := _TORCHVISION_STEM.fullmatch(name):
        return f"{'conv1' if match[1] == 'conv1' else 'norm1'}.{match[2]}"
    if match := _TORCHVISION_BLOCK.fullmatch(name):
        stage, block, layer, tensor = match.groups()
        layer = _TORCHVISION_SHORTCUT.get(layer) or re.sub("[bg]n", "norm", layer)
        return f"res{int(stage) + 1}.{block}.{layer}.{tensor}"
    return name.replace("fc.", "head.linear.") if name in {"fc.weight", "fc.bias"} else None


def _by_tables(
    plain: dict[str, str], block: re.Pattern[str], layers: dict[str, str], first_stage: int
) -> Callable[[str], str | None]:
    def rename(name: str) -> str | None:
        layer, _, tensor = name.rpartition(".")
        if layer in plain:
            return f"{plain[layer]}.{tensor}"
        if (match := block.fullmatch(name)) and match["layer"] in layers:
            stage = int(match[1]) + 2 - first_stage
            return f"res{stage}.{match[2]}.{layers[match['layer']]}.{match['tensor']}"
        return None

    return rename


def _from_pytorchvideo(name: str) -> str | None:
    layer, _, tensor = name.rpartition(".")
    if layer in _PYTORCHVIDEO_PLAIN:
        return f"{_PYTORCHVIDEO_PLAIN[layer]}.{tensor}"
    if (match := _PYTORCHVIDEO_BLOCK.fullmatch(name)) and match["layer"] in _PYTORCHVIDEO_LAYERS:
        layer = _PYTORCHVIDEO_LAYERS[match["layer"]]
        return f"res{_PYTORCHVIDEO_STAGES[match[1]]}.{match[2]}.{layer}.{match['tensor']}"
    return None


def _from_caffe2(name: str) -> str | None:
    if name == "conv1_w":
        return "conv1.weight"
    if match := _CAFFE2_STEM_NORM.fullmatch(name):
        return f"norm1.{_CAFFE2_TENSORS[match[1]]}"
    if match := _CAFFE2_HEAD.fullmatch(name):
        return f"head.linear.{'weight' if match[1] == 'w' else 'bias'}"
    if match := _CAFFE2_BLOCK.fullmatch(name):
        stage, block, branch, is_weight, norm_tensor = match.groups()
        kind = "conv" if is_weight else "norm"
        layer = f"shortcut_{kind}" if branch == "1" else f"{kind}{'abc'.index(branch[1]) + 1}"
        tensor = "weight" if is_weight else _CAFFE2_TENSORS[norm_tensor]
        return f"res{stage}.{block}.{layer}.{tensor}"
    return None


_TO_OWN: dict[Naming, Callable[[str], str | None]] = {
    "i3d_gn": _same,
    "torchvision": _from_torchvision,
    "pytorchvideo": _from_pytorchvideo,
    "pyslowfast": _by_tables(_PYSLOWFAST_PLAIN, _PYSLOWFAST_BLOCK, _PYSLOWFAST_LAYERS, 2),
    "mmaction2": _by_tables(_MMACTION2_PLAIN, _MMACTION2_BLOCK, _MMACTION2_LAYERS, 1),
    "caffe2_bn": _from_caffe2,
    "caffe2_gn": _from_caffe2,
}
