"""What samples and batches are, and which random numbers belong to which draw."""

import enum
from typing import NamedTuple

import torch


class Stream(enum.IntEnum):
    """Which draw a random number belongs to: streams never share numbers."""

    SHUFFLE = 0
    TRAIN_CLIP = 1
    VALIDATION_CLIP = 2
    PRECISE_BN_CLIP = 3
    DROPOUT = 4
    TRAIN_IMAGE = 5


class Sample(NamedTuple):
    """One random clip to be cut: its position in the stream and its video's number."""

    position: int
    video: int


class ClipBatch(NamedTuple):
    """A micro-batch of clips as a worker sends it.

    clips: uint8 (N, T, H, W, 3), RGB. labels: int64 (N,). weights: float32 (N,), 1 for a clip and
    0 for the blank one that stands in when every clip of the batch was broken. broken: a line for
    each clip that was left out.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    broken: tuple[str, ...]
