"""A trained network that says what happens in a video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from i3d_gn.data.loader import PartLoader, video_loader
from i3d_gn.data.windows import SlidingWindows, WindowPart
from i3d_gn.engine.cores import limit_compute_threads, num_workers
from i3d_gn.engine.distributed import Process
from i3d_gn.video import build
from i3d_gn.video.config import Config
from i3d_gn.video.evaluate import video_scorer
from i3d_gn.video.load import load_network
from i3d_gn.video.trained import TrainedNetwork
from i3d_gn.video_io.index import VideoIndex
from i3d_gn.video_io.video_files import VideoFiles


@dataclass(frozen=True)
class Prediction:
    """What a network says of one video.

    Attributes:
        video: Its path or URL, in an index relative to the root.
        class_names: By class id.
        scores: float32 (K,), as `i3d-gn evaluate` gives them; None if the video is broken.
        probabilities: float32 (K,), the scores, or the softmax of scores that are logits.
        broken: Why there are no scores, or None.
    """

    video: str
    class_names: tuple[str, ...]
    scores: npt.NDArray[np.float32] | None
    probabilities: npt.NDArray[np.float32] | None
    broken: str | None = None

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The `k` most probable classes with their probabilities, most probable first."""
        return (
            []
            if self.probabilities is None
            else top_classes(self.probabilities, self.class_names, k)
        )


class Recognizer:
    """A trained network, ready for videos.

    ::

        prediction = Recognizer.from_checkpoint("runs/demo")("clip.mp4")
        prediction.top(5)  # [("juggling balls", 0.93), ...]

    Attributes:
        network: The network, in eval mode.
        config: By which clips are taken and scores averaged.
        class_names: By class id; the ids themselves if the checkpoint has no names.
        device: Of the network.
    """

    def __init__(self, network: TrainedNetwork, config: Config, device: torch.device) -> None:
        self.network = network
        self.config = config
        self.device = device
        self.class_names = network.class_names or tuple(
            f"class {i}" for i in range(config.model.num_classes)
        )
        self._process = Process(0, 1, device)
        network.model.eval()
        self.to_device = build.to_device(config, self._process, mean=network.mean, std=network.std)
        self.score = video_scorer(network.model, config, self.to_device)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        overrides: Sequence[str] = (),
        device: torch.device | str | None = None,
    ) -> Recognizer:
        """Load a network from a checkpoint, a run or weights, see `load_network`.

        Args:
            path: The file or folder.
            overrides: Changes of the config, such as `test.num_clips=30`.
            device: Of the network; None: a GPU if there is one.

        Raises:
            ValueError: `path` is not a trained video network, or an override is wrong.
        """
        device = default_device() if device is None else torch.device(device)
        network, config = load_network(path, overrides=overrides, device=device)
        return cls(network, config, device)

    def __call__(self, video: str | Path) -> Prediction:
        """What happens in a video, a path or a URL.

        Raises:
            ValueError: It cannot be decoded.
        """
        return self.predict_one(VideoFiles([str(video)]))

    def predict_one(self, videos: VideoIndex | VideoFiles) -> Prediction:
        """What happens in the only video of `videos`.

        Raises:
            ValueError: It cannot be decoded.
        """
        (prediction,) = self.predict(videos)
        if prediction.broken is not None:
            raise ValueError(prediction.broken)
        return prediction

    def predict(self, videos: VideoIndex | VideoFiles) -> Iterator[Prediction]:
        """What happens in each of the videos, in order, with the scores of `i3d-gn evaluate`.

        Raises:
            ValueError: Scores are not finite.
        """
        workers = min(self._num_workers(), len(videos))
        if len(videos) > 1:  # else decoding is over when the network starts
            limit_compute_threads(self._process, workers)
        loader = video_loader(
            build.test_videos(videos, self.config),
            range(len(videos)),
            num_workers=workers,
            device=self.device,
            timeout_seconds=self.config.data.timeout_seconds,
        )
        for video in loader:
            name = videos.paths[video.video]
            if video.broken is not None:
                yield Prediction(name, self.class_names, None, None, video.broken)
                continue
            scores = self.score(video)
            yield Prediction(
                name,
                self.class_names,
                scores.float().cpu().numpy(),
                self.probabilities(scores, name).float().cpu().numpy(),
            )

    def decoded(self, windows: SlidingWindows) -> Iterator[WindowPart]:
        """The windows of a video as a worker process decodes them, which may crash or hang.

        Raises:
            VideoDecodeError: At the first frame that cannot be decoded.
        """
        loader = PartLoader(
            windows,
            num_workers=min(1, self._num_workers()),
            device=self.device,
            timeout_seconds=self.config.data.timeout_seconds,
        )
        for part in loader:
            if part.broken is not None:
                raise part.broken
            if len(part.clips):
                yield part

    def _num_workers(self) -> int:
        return num_workers(self.config, self._process)

    def probabilities(self, scores: torch.Tensor, name: str) -> torch.Tensor:
        """Probabilities (K,) from the scores of video `name`.

        Raises:
            ValueError: They are not finite.
        """
        if not scores.isfinite().all():
            raise ValueError(
                f"the scores of {name} are not finite: the network diverged, or its arithmetic "
                "overflowed; use an earlier checkpoint, or precision fp32"
            )
        return scores if self.config.test.average == "softmax" else scores.softmax(dim=0)


def top_classes(
    probabilities: npt.NDArray[np.float32], class_names: tuple[str, ...], k: int
) -> list[tuple[str, float]]:
    """The `k` most probable classes with their probabilities, most probable first."""
    order = np.argsort(-probabilities, kind="stable")[:k]
    return [(class_names[i], float(probabilities[i])) for i in order.tolist()]


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
