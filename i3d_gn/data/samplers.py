"""Which samples form which micro-batch, in which order.

    positions  0 1 2 3 | 4 5 6 7 | 8 ...      endless, shuffled anew each epoch
    step       0                 | 1          global_batch_size = 8
    micro-batch 0      | 1       | 2 ...      clips_per_gpu = 4
    rank       0       | 1       | 0          two processes take turns

The assignment depends on the seed and on the two sizes alone, so that a run can stop at any step
and go on with another number of workers.
"""

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from i3d_gn.data.batches import Sample, Stream


def micro_batches_per_process(
    *, global_batch_size: int, clips_per_gpu: int, world_size: int
) -> int:
    """Micro-batches that one process accumulates in a step.

    Raises:
        ValueError: the global batch does not divide evenly.
    """
    clips_at_once = clips_per_gpu * world_size
    if global_batch_size % clips_at_once:
        raise ValueError(
            f"a global batch of {global_batch_size} clips cannot be dealt out evenly to "
            f"{world_size} processes of {clips_per_gpu} clips; make train.global_batch_size a "
            f"multiple of {clips_at_once} or use another number of processes"
        )
    return global_batch_size // clips_at_once


class ShuffledMicroBatches(Sampler[list[Sample]]):
    """The micro-batches of one process from `first_step` up to, not including, `last_step`."""

    def __init__(
        self,
        num_videos: int,
        *,
        seed: int,
        global_batch_size: int,
        clips_per_gpu: int,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
    ) -> None:
        self.num_videos = num_videos
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.clips_per_gpu = clips_per_gpu
        self.rank = rank
        self.world_size = world_size
        self.first_step = first_step
        self.last_step = last_step
        self.micro_batches = micro_batches_per_process(
            global_batch_size=global_batch_size,
            clips_per_gpu=clips_per_gpu,
            world_size=world_size,
        )

    def __len__(self) -> int:
        """Micro-batches of this process."""
        return (self.last_step - self.first_step) * self.micro_batches

    def __iter__(self) -> Iterator[list[Sample]]:
        """Lists of `clips_per_gpu` samples."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first_step, self.last_step):
            for turn in range(self.micro_batches):
                micro_batch = turn * self.world_size + self.rank
                first = step * self.global_batch_size + micro_batch * self.clips_per_gpu
                samples = []
                for position in range(first, first + self.clips_per_gpu):
                    if position // self.num_videos != epoch:
                        epoch = position // self.num_videos
                        rng = np.random.default_rng((self.seed, Stream.SHUFFLE, epoch))
                        order = rng.permutation(self.num_videos)
                    samples.append(Sample(position, int(order[position % self.num_videos])))
                yield samples


class EachVideoOnce(Sampler[list[Sample]]):
    """One clip of every video, dealt to the processes in turn; the last batches may be smaller."""

    def __init__(self, num_videos: int, *, clips_per_gpu: int, rank: int, world_size: int) -> None:
        self.videos = range(rank, num_videos, world_size)
        self.clips_per_gpu = clips_per_gpu

    def __len__(self) -> int:
        """Micro-batches of this process."""
        return math.ceil(len(self.videos) / self.clips_per_gpu)

    def __iter__(self) -> Iterator[list[Sample]]:
        """Lists of at most `clips_per_gpu` samples."""
        for first in range(0, len(self.videos), self.clips_per_gpu):
            yield [Sample(v, v) for v in self.videos[first : first + self.clips_per_gpu]]
