"""I3D ResNet: the network and its variants, given by the number of blocks per stage.

The network is the 3-D ResNet of facebookresearch/video-nonlocal-net ([NL], `resnet_video_org`),
the Kinetics baseline of [GN] section 4.3: a 2-D ResNet whose kernels are inflated along time, with
temporal kernels that alternate between 3 and 1 over the blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from i3d_gn.models.blocks import (
    NORM_NAMES,
    Bottleneck,
    NormFactory,
    StrideIn,
    can_recompute,
    conv3d,
    make_stage,
    norm_relu,
)
from i3d_gn.models.network import VideoNetwork
from i3d_gn.norm import BatchRenorm, GroupNorm, make_norm, saved_as

STAGE_NAMES = ("res2", "res3", "res4", "res5")

# Temporal kernels of a stage's blocks, repeated over its depth ([NL] lib/models/resnet_video_org).
TEMPORAL_KERNELS = ((3,), (3, 1), (3, 1), (1, 3))


class Stem(NamedTuple):
    """Temporal kernel and strides that differ between stems."""

    conv1_stride: int
    pool1_kernel: int
    pool1_stride: int


STEMS = {
    "strided": Stem(conv1_stride=2, pool1_kernel=2, pool1_stride=2),  # 32 and 64 frames
    "8x8": Stem(conv1_stride=1, pool1_kernel=1, pool1_stride=1),  # 8 frames, 8 apart
    # 32 frames; pool1 drops every other position: mmaction2 models/backbones/resnet3d.py.
    "mmaction2": Stem(conv1_stride=2, pool1_kernel=1, pool1_stride=2),
}


class Head(nn.Module):
    """Average pooling, dropout and the linear classifier."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, features: Tensor, window: tuple[int, int] | None) -> Tensor:
        """Features (N, C, T, H, W) to logits (N, K), or with a window (N, K, 1, H', W')."""
        if window is None:
            return self.linear(self.dropout(features.mean((2, 3, 4))))
        map_height, map_width = features.shape[3:]
        if not (1 <= window[0] <= map_height and 1 <= window[1] <= map_width):
            raise ValueError(
                f"window={window} does not fit the {map_height}x{map_width} feature map; use the "
                "size of the map at the training crop (7x7 for 224 pixels) and clips at least as "
                "large as that crop"
            )
        pooled = F.avg_pool3d(features, (features.shape[2], *window), stride=1)
        # The linear layer at every position, as a 1x1x1 convolution.
        return self.linear(self.dropout(pooled).movedim(1, -1)).movedim(-1, 1)


class I3D(VideoNetwork):
    """Inflated 3-D ResNet with bottleneck blocks, from clips to logits.

    Shapes for 32 frames of 224 x 224 pixels, ResNet-50 ([NL] `resnet_video_org`)::

        conv1 64,16,112,112 -> pool1 64,8,55,55 -> res2 256,8,55,55 -> pool2 256,4,55,55
        -> res3 512,4,28,28 -> res4 1024,4,14,14 -> res5 2048,4,7,7 -> head

    Args:
        depths: number of blocks in res2 to res5.
        norm: a name for `i3d_gn.norm.make_norm`, or a function from a number of channels to a
            layer, for instance `functools.partial(make_norm, "gn", channels_per_group=16)`.
        num_classes: K.
        width: channels of conv1 and inner channels of res2; each stage doubles the latter.
        stem: `strided` in time, by 2 in conv1 and in pool1, for 32 and 64 frames; `8x8` ([NL]
            and pytorchvideo), no temporal stride in either, for 8 frames; or `mmaction2`, as
            `strided` with a temporal kernel of 1 in pool1.
        inflate: False for C2D: all convolutions have temporal kernel 1; pooling is unchanged.
        pool_padding: spatial padding of pool1: 0 as in [NL]'s code, for a 55 x 55 map at 224
            pixels, or 1 as in PySlowFast and pytorchvideo, for 56 x 56.
        stride_in: which convolution of a stage's first block has the stride: the `3x3`, as in
            torchvision, or the first `1x1`, as in the original MSRA ResNet.
        dropout: probability before the classifier.
        zero_init_last_norm: initialize the last gamma of each block to 0 ([GN] section 4.1).
        checkpoint_stages: stages, `res2` to `res5`, whose activations are recomputed in backward
            instead of saved (`torch.utils.checkpoint`).
        recompute: let blocks with group norm save no more for backward than blocks with frozen
            batch norm, about half of what batch norm saves; backward recomputes the rest. Takes
            effect where the fused kernels of group norm run (CUDA), except in `checkpoint_stages`
            and under `torch.compile`, which makes this choice itself.

    Raises:
        ValueError: an option is not one of its choices.
    """

    stage_names = STAGE_NAMES
    has_window = True

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        *,
        norm: str | NormFactory = "gn",
        num_classes: int = 400,
        width: int = 64,
        stem: str = "strided",
        inflate: bool = True,
        pool_padding: int = 0,
        stride_in: StrideIn = "3x3",
        dropout: float = 0.5,
        zero_init_last_norm: bool = True,
        checkpoint_stages: Collection[str] = (),
        recompute: bool = True,
    ) -> None:
        super().__init__()
        _check_choice("stem", stem, tuple(STEMS))
        _check_choice("pool_padding", pool_padding, (0, 1))
        _check_choice("stride_in", stride_in, ("3x3", "1x1"))
        for name in checkpoint_stages:
            _check_choice("checkpoint_stages entry", name, STAGE_NAMES)
        norm_factory = partial(make_norm, norm) if isinstance(norm, str) else norm
        conv1_stride, pool1_kernel, pool1_stride = STEMS[stem]

        self.zero_init_last_norm = zero_init_last_norm
        self.checkpoint_stages = frozenset(checkpoint_stages)
        self.recompute = recompute
        self.num_frozen = 0
        self.conv1 = conv3d(3, width, (5 if inflate else 1, 7, 7), (conv1_stride, 2, 2))
        self.norm1 = norm_factory(width)
        if checkpoint_stages and isinstance(self.norm1, BatchRenorm):
            raise ValueError(
                f"checkpoint_stages={tuple(checkpoint_stages)} with norm 'brn': the recomputation "
                "would use other running statistics; leave checkpoint_stages empty"
            )
        self.pool1 = nn.MaxPool3d(
            (pool1_kernel, 3, 3),
            (pool1_stride, 2, 2),
            (0, pool_padding, pool_padding),
        )
        stages = [
            make_stage(
                depth,
                width if i == 0 else 4 * width * 2 ** (i - 1),
                width * 2**i,
                temporal_kernels=temporal_kernels if inflate else (1,),
                spatial_stride=1 if i == 0 else 2,
                stride_in=stride_in,
                norm=norm_factory,
                # Inside a checkpoint these tensors would be saved, not dropped.
                recompute=recompute and STAGE_NAMES[i] not in self.checkpoint_stages,
            )
            for i, (depth, temporal_kernels) in enumerate(
                zip(depths, TEMPORAL_KERNELS, strict=True)
            )
        ]
        self.res2 = stages[0]
        self.pool2 = nn.MaxPool3d((2, 1, 1))
        self.res3, self.res4, self.res5 = stages[1:]
        self.head = Head(4 * width * 8, num_classes, dropout)
        self._init_weights()

    def forward(self, clips: Tensor, *, window: tuple[int, int] | None = None) -> Tensor:
        """Classify clips.

        Args:
            clips: (N, 3, T, H, W), floating point, normalized.
            window: None averages the whole res5 map. (h, w) is fully convolutional testing: the
                average over all of time and a sliding h x w window with stride 1, then the
                classifier at each position. Use the size of the map at the training crop, 7 x 7 at
                224 pixels; for clips of that size the results of both agree. Take the softmax per
                position.

        Returns:
            Logits (N, K), or with a window (N, K, 1, H', W').

        Raises:
            ValueError: the clips have another shape or dtype, or are too small for the network or
                the window.
        """
        return self.head(self.feature_map(clips), window)

    def pooled_features(self, clips: Tensor) -> Tensor:
        """What the linear classifier sees of clips: (N, C), the mean of the res5 map."""
        return self.feature_map(clips).mean((2, 3, 4))

    def classifier(self) -> nn.Module:
        """The linear layer of the head."""
        return self.head.linear

    def feature_map(self, clips: Tensor) -> Tensor:
        """The res5 map (N, C, T', H', W') of clips (N, 3, T, H, W), see `forward`."""
        if clips.dim() != 5 or clips.shape[1] != 3:
            raise ValueError(f"clips have shape {tuple(clips.shape)}; expected (N, 3, T, H, W)")
        if not clips.is_floating_point():
            raise ValueError(f"clips are {clips.dtype}; convert and normalize them first")
        if not torch.compiler.is_exporting():  # sizes may be symbols
            self.feature_size(*clips.shape[2:])
        if self.num_frozen:
            with torch.no_grad():
                x = self._run_stem(clips)
        else:
            x = self._run_stem(clips)
        x = self._run_stage("res2", x)
        x = self.pool2(x)
        for name in STAGE_NAMES[1:]:
            x = self._run_stage(name, x)
        return x

    def feature_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Size (T, H, W) of the res5 map for clips of this size, computed without running it.

        Raises:
            ValueError: the clip is too small; the message gives the smallest possible size.
        """
        layers = self._size_changing_layers()
        size = (
            _chain_length(layers, 0, num_frames),
            _chain_length(layers, 1, height),
            _chain_length(layers, 2, width),
        )
        if 0 in size:
            least = [
                next(n for n in count(1) if _chain_length(layers, axis, n)) for axis in range(3)
            ]
            raise ValueError(
                f"a clip of {num_frames} frames of {height}x{width} pixels is too small for this "
                f"network; use at least {least[0]} frames of {least[1]}x{least[2]} pixels"
            )
        return size

    def freeze(self, num_stages: int) -> None:
        """Keep the first stages as they are: conv1 (with norm1), res2, ...

        Their parameters get no gradient, and batch norm in them uses its running statistics also
        in training.
        """
        self.num_frozen = num_stages
        for module in self._frozen_modules():
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> I3D:
        """Set training or evaluation mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        names = ("norm1", "conv1", *STAGE_NAMES)
        return [getattr(self, name) for name in names[: self.num_frozen and self.num_frozen + 1]]

    def reset_norms(self) -> None:
        """Reset normalization layers to their initial values; last gammas as configured."""
        for name, module in self.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if name.rpartition(".")[2] in NORM_NAMES and callable(reset):
                reset()
        if self.zero_init_last_norm:
            for module in self.modules():
                # Only parameters: a frozen gamma of 0 could never change.
                if isinstance(module, Bottleneck) and isinstance(
                    gamma := getattr(module.norm3, "weight", None), nn.Parameter
                ):
                    nn.init.zeros_(gamma)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.head.linear.weight, std=0.01)
        nn.init.zeros_(self.head.linear.bias)
        self.reset_norms()

    def _run_stem(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.recompute and isinstance(self.norm1, GroupNorm) and can_recompute(self.norm1, x):
            x, recompute_relu1 = self.norm1.relu_with_recompute(x)
            with saved_as(x, recompute_relu1):
                return self.pool1(x)
        return self.pool1(norm_relu(self.norm1, x))

    def _run_stage(self, name: str, x: Tensor) -> Tensor:
        stage = self.get_submodule(name)
        if STAGE_NAMES.index(name) + 1 < self.num_frozen:
            with torch.no_grad():
                return stage(x)
        if name not in self.checkpoint_stages or not torch.is_grad_enabled():
            return stage(x)
        # Stages draw no random numbers, so generator states need not be saved.
        run = partial(checkpoint, stage, x, use_reentrant=False, preserve_rng_state=False)
        batch_norms = [m for m in stage.modules() if isinstance(m, _BatchNorm)]
        # torch.compile cannot trace a `context_fn`, so pass one only if it is needed.
        return run(context_fn=partial(_recompute_contexts, batch_norms)) if batch_norms else run()

    def _size_changing_layers(self) -> list[nn.Conv3d | nn.MaxPool3d]:
        layers: list[nn.Conv3d | nn.MaxPool3d] = [self.conv1, self.pool1]
        for stage, pool in (
            (self.res2, self.pool2),
            (self.res3, None),
            (self.res4, None),
            (self.res5, None),
        ):
            first = stage[0]
            assert isinstance(first, Bottleneck)
            for conv in (first.conv1, first.conv2):
                assert isinstance(conv, nn.Conv3d)
                layers.append(conv)
            if pool is not None:
                layers.append(pool)
        return layers


def i3d_resnet50(norm: str | NormFactory = "gn", num_classes: int = 400, **options: Any) -> I3D:
    """I3D ResNet-50; `options` are those of `I3D`. 28,043,472 parameters with 400 classes."""
    return I3D((3, 4, 6, 3), norm=norm, num_classes=num_classes, **options)


def i3d_resnet101(norm: str | NormFactory = "gn", num_classes: int = 400, **options: Any) -> I3D:
    """I3D ResNet-101; `options` are those of `I3D`."""
    return I3D((3, 4, 23, 3), norm=norm, num_classes=num_classes, **options)


def i3d_tiny(norm: str | NormFactory = "gn", num_classes: int = 400, **options: Any) -> I3D:
    """A narrow I3D with one block per stage, for demos and tests on a CPU.

    32 groups do not divide the 16 channels of conv1, so `gn` means 8 groups here.
    """
    norm = partial(make_norm, "gn", num_groups=8) if norm == "gn" else norm
    return I3D((1, 1, 1, 1), norm=norm, num_classes=num_classes, width=16, **options)


def i3d_small(norm: str | NormFactory = "gn", num_classes: int = 400, **options: Any) -> I3D:
    """An I3D that two CPU cores can train hundreds of times, for experiments on norms.

    24 channels in conv1; `gn` means 8 groups, as in `i3d_tiny`.
    """
    norm = partial(make_norm, "gn", num_groups=8) if norm == "gn" else norm
    return I3D((1, 2, 2, 1), norm=norm, num_classes=num_classes, width=24, **options)


def _check_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{option} {value!r} is unknown; choose one of {choices}")


def _chain_length(layers: list[nn.Conv3d | nn.MaxPool3d], axis: int, length: int) -> int:
    """Length along T, H or W (axis 0, 1, 2) after the layers; 0 if it is too short for one."""
    for layer in layers:
        kernel, stride, padding = (
            values[axis] if isinstance(values, tuple) else values
            for values in (layer.kernel_size, layer.stride, layer.padding)
        )
        assert isinstance(kernel, int)
        assert isinstance(stride, int)
        assert isinstance(padding, int)
        length = (length + 2 * padding - kernel) // stride + 1
        if length < 1:
            return 0
    return length


@contextmanager
def _running_statistics_fixed(batch_norms: list[_BatchNorm]) -> Iterator[None]:
    """Normalize by the batch, as in the first forward, and keep running statistics unchanged."""
    before = [(module, module.momentum, module.num_batches_tracked) for module in batch_norms]
    for module, _, num_batches_tracked in before:
        module.momentum = 0.0  # running = (1 - 0) * running + 0 * batch, exactly
        if num_batches_tracked is not None:
            module.num_batches_tracked = num_batches_tracked.clone()
    try:
        yield
    finally:
        for module, momentum, num_batches_tracked in before:
            module.momentum = momentum
            module.num_batches_tracked = num_batches_tracked


def _recompute_contexts(
    batch_norms: list[_BatchNorm],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _running_statistics_fixed(batch_norms)
