"""Which samples form which micro-batch, and in which order.

    positions   0 1 2 3 | 4 5 6 7 | 8 ...      endless, reshuffled every epoch
    step        0                 | 1          global_batch_size = 8
    micro-batch 0       | 1       | 2 ...      micro_batch_size = 4
    rank        0       | 1       | 0          two ranks take turns

The assignment depends on the seed and the two sizes alone, so that a run can stop at any step and
resume with another number of workers.
"""

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from i3d_gn.data.batches import Sample, Stream


def micro_batches_per_rank(
    *, global_batch_size: int, micro_batch_size: int, world_size: int
) -> int:
    """Micro-batches that one rank accumulates in an optimizer step.

    Raises:
        ValueError: The global batch does not split evenly.
    """
    samples_at_once = micro_batch_size * world_size
    if global_batch_size % samples_at_once:
        raise ValueError(
            f"a global batch of {global_batch_size} samples does not split evenly across "
            f"{world_size} ranks with micro-batches of {micro_batch_size}; use a global batch that "
            f"is a multiple of {samples_at_once}, or another number of ranks"
        )
    return global_batch_size // samples_at_once


class ShuffledMicroBatches(Sampler[list[Sample]]):
    """The micro-batches of one rank for steps `first_step` to `last_step` (excluded)."""

    def __init__(
        self,
        num_items: int,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
    ) -> None:
        self.num_items = num_items
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.first_step = first_step
        self.last_step = last_step
        self.micro_batches = micro_batches_per_rank(
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            world_size=world_size,
        )

    def __len__(self) -> int:
        """Number of micro-batches of this rank."""
        return (self.last_step - self.first_step) * self.micro_batches

    def __iter__(self) -> Iterator[list[Sample]]:
        """Yield lists of `micro_batch_size` samples."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first_step, self.last_step):
            for i in range(self.micro_batches):
                micro_batch = i * self.world_size + self.rank
                first = step * self.global_batch_size + micro_batch * self.micro_batch_size
                samples = []
                for position in range(first, first + self.micro_batch_size):
                    if position // self.num_items != epoch:
                        epoch = position // self.num_items
                        rng = np.random.default_rng((self.seed, Stream.SHUFFLE, epoch))
                        order = rng.permutation(self.num_items)
                    samples.append(Sample(position, int(order[position % self.num_items])))
                yield samples


class EachItemOnce(Sampler[list[Sample]]):
    """Every item once, split across ranks round-robin; a rank's last batch may be smaller."""

    def __init__(self, num_items: int, *, batch_size: int, rank: int, world_size: int) -> None:
        self.items = range(rank, num_items, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Number of batches of this rank."""
        return math.ceil(len(self.items) / self.batch_size)

    def __iter__(self) -> Iterator[list[Sample]]:
        """Yield lists of at most `batch_size` samples."""
        for first in range(0, len(self.items), self.batch_size):
            yield [Sample(item, item) for item in self.items[first : first + self.batch_size]]
