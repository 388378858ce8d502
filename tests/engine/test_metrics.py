import numpy as np
import pytest
import torch
import torch.nn.functional as F

from i3d_gn.engine.metrics import ClassificationMetrics, video_metrics


def test_video_metrics_against_hand_counts():
    scores = np.array(
        [
            [0.9, 0.1, 0, 0, 0, 0],
            [0.1, 0.9, 0, 0, 0, 0],
            [0.5, 0.4, 0.3, 0.2, 0.1, 0.0],
            [0.1, 0.9, 0, 0, 0, 0],
            [0.1, 0.9, 0, 0, 0, 0],
        ]
    )
    metrics = video_metrics(scores, np.array([0, 0, 5, 1, 1]))
    assert metrics.top1 == pytest.approx(100 * 3 / 5)
    assert metrics.top5 == pytest.approx(100 * 4 / 5)  # the last class of six is not among five
    assert metrics.mean_class_accuracy == pytest.approx((50 + 0 + 100) / 3)
    assert metrics.num_videos == 5


def test_ties_rank_by_class_id_and_top5_exists_for_few_classes():
    metrics = video_metrics(np.zeros((2, 3)), np.array([0, 2]))
    assert (metrics.top1, metrics.top5) == (50.0, 100.0)


def test_no_videos_is_an_error():
    with pytest.raises(ValueError, match="at least one video"):
        video_metrics(np.zeros((0, 3)), np.zeros(0, dtype=int))


def test_metrics_ignore_samples_of_weight_0_and_reset():
    torch.manual_seed(0)
    metrics = ClassificationMetrics(torch.device("cpu"))
    logits, labels = torch.randn(7, 9), torch.randint(0, 9, (7,))
    weights = torch.tensor([1.0, 1, 1, 0, 1, 1, 1])
    losses = F.cross_entropy(logits, labels, reduction="none")
    metrics.update(losses[:4], logits[:4], labels[:4], weights[:4], 2)
    metrics.update(losses[4:], logits[4:], labels[4:], weights[4:], 0)
    kept = weights.bool()
    values = metrics.read_and_reset()
    assert values["loss"] == pytest.approx(losses[kept].mean().item())
    hits = (logits.argmax(1) == labels)[kept]
    assert values["top1"] == pytest.approx(100 * hits.float().mean().item())
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)[kept]
    assert 0 < (ranks < 5).sum() < 6
    assert values["top5"] == pytest.approx(100 * (ranks < 5).float().mean().item())
    assert (values["samples"], values["broken"]) == (6, 2)
    assert metrics.read_and_reset()["samples"] == 0


def test_metrics_continue_from_saved_state():
    metrics, resumed = (ClassificationMetrics(torch.device("cpu")) for _ in range(2))
    logits, labels, ones = torch.randn(3, 9), torch.tensor([1, 2, 3]), torch.ones(3)
    losses = F.cross_entropy(logits, labels, reduction="none")
    metrics.update(losses, logits, labels, ones, 0)
    resumed.load_state(metrics.state())
    for each in (metrics, resumed):
        each.update(losses, logits, labels, ones, 1)
    assert metrics.read_and_reset() == resumed.read_and_reset()


def test_state_is_summed_over_ranks_without_changing_them(monkeypatch):
    def two_equal_ranks(tensor):
        return tensor.mul_(2)  # in place, like `torch.distributed.all_reduce`

    monkeypatch.setattr("i3d_gn.engine.metrics.all_reduce_sum", two_equal_ranks)
    metrics = ClassificationMetrics(torch.device("cpu"))
    metrics.update(torch.ones(3), torch.eye(3), torch.arange(3), torch.ones(3), 1)
    for _ in range(2):
        assert metrics.state() == [6, 6, 6, 6, 2]
    assert metrics.read_and_reset() == {
        "loss": 1, "top1": 100, "top5": 100, "samples": 6, "broken": 2
    }  # fmt: skip
