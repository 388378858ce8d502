"""Accuracy by class, and which classes are confused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from i3d_gn.video.report.runs import Test


@dataclass(frozen=True)
class Confusion:
    """Videos of one class that are taken for another."""

    true: int
    predicted: int
    count: int
    share: float  # of the videos of the true class, in [0, 1]


def confusion_counts(test: Test) -> npt.NDArray[np.int64]:
    """(K, K): videos by true class (row) and predicted class (column)."""
    num_classes = len(test.class_names)
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(counts, (test.labels, test.predictions), 1)
    return counts


def class_accuracy(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """(K,): share of each class's videos that are right, in [0, 1]; NaN for a class without any."""
    videos = counts.sum(axis=1)
    return np.divide(counts.diagonal(), videos, out=np.full(len(counts), np.nan), where=videos > 0)


def most_confused(counts: npt.NDArray[np.int64], limit: int) -> list[Confusion]:
    """The `limit` pairs with the most videos; among equals those with the larger share."""
    off = counts.copy()
    np.fill_diagonal(off, 0)
    shares = off / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    order = np.lexsort((-shares.ravel(), -off.ravel()))[:limit]
    pairs = (np.unravel_index(i, off.shape) for i in order)
    return [
        Confusion(int(true), int(predicted), int(off[true, predicted]), shares[true, predicted])
        for true, predicted in pairs
        if off[true, predicted]
    ]


def confused_classes(counts: npt.NDArray[np.int64], limit: int) -> list[int]:
    """At most `limit` classes, in the order of their ids: all, or the pairs confused most often."""
    if len(counts) <= limit:
        return list(range(len(counts)))
    chosen: list[int] = []
    for pair in most_confused(counts, limit * limit):
        new = [label for label in (pair.true, pair.predicted) if label not in chosen]
        if len(chosen) + len(new) <= limit:
            chosen += new
    return sorted(chosen)
