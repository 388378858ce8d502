"""Video networks of pytorchvideo, with any norm of this package."""

import warnings
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from i3d_gn.models.network import AdaptedNetwork
from i3d_gn.norm import replace_norm

PytorchvideoName = Literal[
    "slow_r50", "c2d_r50", "i3d_r50", "csn_r101", "r2plus1d_r50", "x3d_xs", "x3d_s", "x3d_m",
    "slowfast_r50",
]  # fmt: skip

# Frames of the fast pathway per frame of the slow one.
_ALPHA = 4


class SlowFast(AdaptedNetwork):
    """Packs the two pathways from one clip: all frames, and every fourth."""

    def pack(self, clips: Tensor) -> list[Tensor]:
        """(N, 3, T, H, W) to [(N, 3, T / 4, H, W), (N, 3, T, H, W)].

        As in PySlowFast (`datasets/utils.py`, `pack_pathway_output`) the slow frames are spread
        evenly from the first to the last, which the published weights were trained on.
        """
        num_frames = clips.shape[2]
        slow = torch.linspace(0, num_frames - 1, num_frames // _ALPHA, device="cpu").long().tolist()
        # Not by an index tensor: copying that to the device cannot be part of a CUDA graph.
        return [torch.stack([clips[:, :, frame] for frame in slow], dim=2), clips]


def pytorchvideo_network(
    name: PytorchvideoName, *, num_classes: int, dropout: float, norm: str, **norm_options: Any
) -> AdaptedNetwork:
    """A network of pytorchvideo's hub, randomly initialized, from clips to logits.

    Its head averages the whole map, whatever its size: at the published clip size, that is what
    pytorchvideo's pooling of fixed size does. There is no softmax in it.

    Args:
        name: The function of `pytorchvideo.models.hub` that makes it.
        num_classes: K.
        dropout: Before the classifier.
        norm: A name for `replace_norm`.
        norm_options: For `replace_norm`.

    Raises:
        ValueError: pytorchvideo cannot be imported, or an option does not apply to the norm.
    """
    net = getattr(_hub(), name)(model_num_class=num_classes)
    head = net.blocks[-1]
    head.activation = None
    head.dropout = nn.Dropout(dropout)
    if name.startswith("x3d"):
        head.pool.pool = nn.AdaptiveAvgPool3d(1)
    elif name == "slowfast_r50":
        net.blocks[-2].pool = nn.ModuleList(nn.AdaptiveAvgPool3d(1) for _ in range(2))
    else:
        head.pool = nn.AdaptiveAvgPool3d(1)
    _use_silu_of_torch(net)
    replace_norm(net, norm, copy_affine=True, **norm_options)
    options = {
        "classifier": f"blocks.{len(net.blocks) - 1}.proj",
        "channel_axis": -1,
    }
    if name == "slowfast_r50":
        # The results of a block are those of both pathways; a stage is the slow one's.
        stages = tuple(f"blocks.{i}.multipathway_blocks.0" for i in range(len(net.blocks) - 2))
        return SlowFast(net, stages=stages, frame_multiple=_ALPHA, **options)
    stages = tuple(f"blocks.{i}" for i in range(len(net.blocks) - 1))
    return AdaptedNetwork(net, stages=stages, **options)


def _use_silu_of_torch(net: nn.Module) -> None:
    """Replace pytorchvideo's Swish, which uses deprecated attributes and cannot be exported."""
    for module in net.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "Swish":
                setattr(module, name, nn.SiLU())


def _hub() -> ModuleType:
    try:
        with warnings.catch_warnings():
            # fvcore scripts functions on import, which torch has deprecated.
            warnings.filterwarnings("ignore", message=r".torch\.jit\.")
            from pytorchvideo.models import hub  # noqa: PLC0415 slow import
    except ImportError as error:
        raise ValueError(
            f"pytorchvideo cannot be imported ({error}); its networks need pytorchvideo 0.1.5 with "
            "its dependencies"
        ) from error
    return hub
