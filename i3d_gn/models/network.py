"""What training, testing and everything after them need of a video network."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class VideoNetwork(nn.Module, ABC):
    """A classifier of clips: I3D, or a network of another library in an adapter.

    Attributes:
        stage_names: Paths of the stages, from input to output, for `get_submodule`.
        has_window: Whether `forward` takes a `window`, for fully convolutional testing.
    """

    stage_names: tuple[str, ...]
    has_window: bool = False

    @abstractmethod
    def forward(self, clips: Tensor, *, window: tuple[int, int] | None = None) -> Tensor:
        """Clips (N, 3, T, H, W) to logits (N, K), or with a window (N, K, 1, H', W')."""

    @abstractmethod
    def pooled_features(self, clips: Tensor) -> Tensor:
        """Clips (N, 3, T, H, W) to what the classifier sees, (N, C), averaged over positions."""

    @abstractmethod
    def feature_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Size (T, H, W) of the last feature map for clips of this size.

        Raises:
            ValueError: The clip is too small for the network, or of an unsuitable size.
        """

    @abstractmethod
    def classifier(self) -> nn.Module:
        """The last layer, from features to logits."""


class AdaptedNetwork(VideoNetwork):
    """A network of another library; its own names are kept behind the prefix `net.`.

    Args:
        net: The network, from `pack`ed clips to logits.
        classifier: Path in `net` of its last linear layer or 1x1x1 convolution.
        channel_axis: Of that layer's input.
        stages: Paths in `net` of the stages, whose results are (N, C, T, H, W).
        frame_multiple: The number of frames must be a multiple of this.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        classifier: str,
        channel_axis: int,
        stages: tuple[str, ...],
        frame_multiple: int = 1,
    ) -> None:
        super().__init__()
        self.net = net
        self.stage_names = tuple(f"net.{stage}" for stage in stages)
        self.frame_multiple = frame_multiple
        self._classifier = classifier
        self._channel_axis = channel_axis

    def pack(self, clips: Tensor) -> Tensor | list[Tensor]:
        """Clips as the network takes them."""
        return clips

    def forward(self, clips: Tensor, *, window: tuple[int, int] | None = None) -> Tensor:
        """Clips (N, 3, T, H, W) to logits (N, K).

        Raises:
            ValueError: A window is given, or the clips have another shape or dtype.
        """
        if window is not None:
            raise ValueError(f"window={window}: this network is not fully convolutional")
        if clips.dim() != 5 or clips.shape[1] != 3:
            raise ValueError(f"clips have shape {tuple(clips.shape)}; expected (N, 3, T, H, W)")
        if not clips.is_floating_point():
            raise ValueError(f"clips are {clips.dtype}; convert and normalize them first")
        if clips.shape[2] % self.frame_multiple:
            raise ValueError(
                f"clips have {clips.shape[2]} frames; this network needs a multiple of "
                f"{self.frame_multiple}"
            )
        return self.net(self.pack(clips))

    def pooled_features(self, clips: Tensor) -> Tensor:
        """The input of the classifier, averaged over positions."""
        with self._classifier_inputs() as inputs:
            self(clips)
        features = inputs[0].movedim(self._channel_axis, 1)
        return features.flatten(2).mean(2) if features.dim() > 2 else features

    def classifier(self) -> nn.Module:
        """The last linear layer or 1x1x1 convolution."""
        return self.net.get_submodule(self._classifier)

    def feature_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Size (T, H, W) of the last stage's result, of the slow pathway if there are two."""
        maps: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, result: Tensor) -> None:
            maps.append(result)

        on_meta = {
            name: torch.empty_like(tensor, device="meta")
            for name, tensor in (*self.named_parameters(), *self.named_buffers())
        }
        training = self.training
        handle = self.get_submodule(self.stage_names[-1]).register_forward_hook(keep)
        try:
            clip = torch.empty(1, 3, num_frames, height, width, device="meta")
            with torch.no_grad():
                torch.func.functional_call(self.eval(), on_meta, (clip,))
        except RuntimeError as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"a clip of {num_frames} frames of {height}x{width} pixels does not fit this "
                f"network: {reason}"
            ) from error
        finally:
            handle.remove()
            self.train(training)
        size = maps[0].shape[2:]
        return size[0], size[1], size[2]

    @contextmanager
    def _classifier_inputs(self) -> Iterator[list[Tensor]]:
        inputs: list[Tensor] = []
        handle = self.classifier().register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        try:
            yield inputs
        finally:
            handle.remove()
