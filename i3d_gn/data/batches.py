"""Samples, batches, and the streams of random numbers that they are drawn from."""

import enum
from typing import NamedTuple, Protocol

import torch


class Stream(enum.IntEnum):
    """Stream of random numbers: draws for different purposes never share a seed."""

    SHUFFLE = 0
    TRAIN_CLIP = 1
    VALIDATION_CLIP = 2
    PRECISE_BN_CLIP = 3
    DROPOUT = 4
    TRAIN_IMAGE = 5


class Sample(NamedTuple):
    """One random sample to draw: its position in the stream, and which item (video, image)."""

    position: int
    item: int


class AnyBatch(Protocol):
    """What the training loop needs of a micro-batch, whatever it consists of."""

    @property
    def broken(self) -> tuple[str, ...]:
        """One line for each sample that failed to decode."""
        ...


class Batch(NamedTuple):
    """A micro-batch of clips or images, as a loader worker sends it.

    Attributes:
        inputs: RGB, uint8, clips (N, T, H, W, 3) or images (N, H, W, 3).
        labels: int64 (N,).
        weights: float32 (N,): 1 for a sample, 0 for the blank one that stands in when every sample
            of the batch failed to decode.
        broken: One line for each sample that failed to decode.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    broken: tuple[str, ...]
