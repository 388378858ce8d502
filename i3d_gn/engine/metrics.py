"""Top-k accuracy, over clips in training and over videos in testing."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from i3d_gn.engine.distributed import sum_over_world


class RunningMetrics:
    """Loss, top-1 and top-5 over clips, summed on the device and read once in a while."""

    def __init__(self, device: torch.device) -> None:
        # loss sum, top-1 hits, top-5 hits, clips, clips left out. float64: counts stay exact.
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)

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
        self._sums[0] += (losses.detach().double() * weights).sum()
        self._sums[1] += (hits[:, 0] * weights).sum()
        self._sums[2] += (hits.any(dim=1) * weights).sum()
        self._sums[3] += weights.sum()
        self._sums[4] += num_broken

    def read_and_reset(self) -> dict[str, float]:
        """`loss`, `top1`, `top5` (percent), `clips`, `broken` over all processes."""
        loss, top1, top5, clips, broken = sum_over_world(self._sums.clone()).tolist()
        self._sums.zero_()
        count = max(clips, 1.0)
        return {
            "loss": loss / count,
            "top1": 100 * top1 / count,
            "top5": 100 * top5 / count,
            "clips": int(clips),
            "broken": int(broken),
        }

    def state(self) -> list[float]:
        """The sums over all processes since they were last read."""
        return sum_over_world(self._sums.clone()).tolist()

    def load_state(self, state: list[float]) -> None:
        """Go on from `state`."""
        self._sums.copy_(torch.tensor(state, dtype=torch.float64))


def topk_hits(scores: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """(N, k) booleans: whether the k-th best of scores (N, K) is the label (N,)."""
    return scores.topk(k, dim=1).indices == labels[:, None]


@dataclass(frozen=True)
class VideoMetrics:
    """Accuracy over videos, percent."""

    top1: float
    top5: float
    mean_class_accuracy: float
    num_videos: int


def video_metrics(
    scores: npt.NDArray[np.floating], labels: npt.NDArray[np.integer]
) -> VideoMetrics:
    """Accuracy of scores (V, K) against labels (V,).

    Of classes with equal scores the one with the smaller id ranks first. The mean class accuracy
    averages over the classes that occur in `labels`.

    Raises:
        ValueError: no videos, or numbers of rows that differ.
    """
    if len(scores) != len(labels) or not len(labels):
        raise ValueError(
            f"{len(scores)} rows of scores for {len(labels)} labels; "
            "metrics need one row a video, and a video at least"
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
