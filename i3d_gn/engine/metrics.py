"""Loss and top-k accuracy: over samples during training, over videos in testing."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from i3d_gn.engine.distributed import all_reduce_sum


class DeviceSums:
    """Sums over samples, kept on the device and read once per log line."""

    def __init__(self, num_sums: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_sums, dtype=torch.float64, device=device)  # counts are exact

    def read(self) -> list[float]:
        """The sums over all ranks, which start again at 0."""
        sums = self.state()
        self.sums.zero_()
        return sums

    def state(self) -> list[float]:
        """The sums over all ranks since they were last read."""
        return all_reduce_sum(self.sums.clone()).tolist()

    def load_state(self, state: list[float]) -> None:
        """Continue from `state`, on rank 0 if there are several."""
        self.sums.copy_(torch.tensor(state, dtype=torch.float64))


class ClassificationMetrics(DeviceSums):
    """Sums of losses, top-1 hits, top-5 hits, samples, and broken samples."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(5, device)

    def update(
        self,
        losses: torch.Tensor,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        num_broken: int,
    ) -> None:
        """Add a batch: losses (N,), logits (N, K), labels (N,), weights (N,) of 0 or 1."""
        hits = topk_hits(logits.detach(), labels, min(5, logits.shape[1]))
        weights = weights.double()
        self.sums[0] += (losses.detach().double() * weights).sum()
        self.sums[1] += (hits[:, 0] * weights).sum()
        self.sums[2] += (hits.any(dim=1) * weights).sum()
        self.sums[3] += weights.sum()
        self.sums[4] += num_broken

    def read_and_reset(self) -> dict[str, float]:
        """`loss`, `top1`, `top5` (percent), `samples` and `broken` over all ranks."""
        loss, top1, top5, samples, broken = self.read()
        count = max(samples, 1.0)
        return {
            "loss": loss / count,
            "top1": 100 * top1 / count,
            "top5": 100 * top5 / count,
            "samples": int(samples),
            "broken": int(broken),
        }


def topk_hits(scores: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """(N, k) booleans: whether the k-th best class of scores (N, K) is the label (N,)."""
    return scores.topk(k, dim=1).indices == labels[:, None]


@dataclass(frozen=True)
class VideoMetrics:
    """Accuracy over videos, in percent."""

    top1: float
    top5: float
    mean_class_accuracy: float
    num_videos: int


def video_metrics(
    scores: npt.NDArray[np.floating], labels: npt.NDArray[np.integer]
) -> VideoMetrics:
    """Accuracy of scores (V, K) against labels (V,).

    Among classes with equal scores the one with the smaller id ranks first. The mean class accuracy
    averages over the classes that occur in `labels`.

    Raises:
        ValueError: There are no videos, or not as many labels as rows of scores.
    """
    if len(scores) != len(labels) or not len(labels):
        raise ValueError(
            f"{len(scores)} rows of scores for {len(labels)} labels; expected one row per video, "
            "and at least one video"
        )
    ranked = np.argsort(-scores, axis=1, kind="stable")
    hits = ranked[:, :5] == np.asarray(labels)[:, None]
    per_class = [hits[labels == label, 0].mean() for label in np.unique(labels)]
    return VideoMetrics(
        top1=100 * float(hits[:, 0].mean()),
        top5=100 * float(hits.any(axis=1).mean()),
        mean_class_accuracy=100 * float(np.mean(per_class)),
        num_videos=len(labels),
    )
