import itertools

import numpy as np
import pytest

from i3d_gn.data.batches import Stream
from i3d_gn.data.samplers import EachItemOnce, ShuffledMicroBatches, micro_batches_per_rank


def batches(rank=0, world_size=1, first_step=0, last_step=6, seed=3, num_items=10):
    return list(
        ShuffledMicroBatches(
            num_items,
            seed=seed,
            global_batch_size=8,
            micro_batch_size=2,
            rank=rank,
            world_size=world_size,
            first_step=first_step,
            last_step=last_step,
        )
    )


def test_positions_are_consecutive_and_every_epoch_is_a_permutation():
    samples = list(itertools.chain(*batches(last_step=10)))
    assert [sample.position for sample in samples] == list(range(80))
    epochs = np.array([sample.item for sample in samples]).reshape(8, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_resuming_continues_the_sequence():
    assert batches(last_step=4) + batches(first_step=4) == batches()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_take_turns_at_the_micro_batches(world_size):
    per_rank = [batches(rank, world_size) for rank in range(world_size)]
    interleaved = list(itertools.chain(*zip(*per_rank, strict=True)))
    assert interleaved == batches()


def test_order_depends_on_the_seed():
    assert batches(seed=1) != batches(seed=2)


def test_global_batch_that_does_not_split_evenly_is_an_error():
    with pytest.raises(
        ValueError, match="global batch of 8 .* 3 ranks .* micro-batches of 2; .* multiple of 6"
    ):
        micro_batches_per_rank(global_batch_size=8, micro_batch_size=2, world_size=3)


@pytest.mark.parametrize(("num_items", "world_size"), [(7, 1), (7, 2), (7, 3), (2, 3)])
def test_each_item_once_over_all_ranks(num_items, world_size):
    seen = []
    for rank in range(world_size):
        order = EachItemOnce(num_items, batch_size=2, rank=rank, world_size=world_size)
        of_rank = list(order)
        assert len(of_rank) == len(order)
        seen += [sample.item for samples in of_rank for sample in samples]
    assert sorted(seen) == list(range(num_items))


def test_streams_keep_their_numbers():
    """Another number would change what a run draws, even one that resumes."""
    assert {stream.name: stream.value for stream in Stream} == {
        "SHUFFLE": 0,
        "TRAIN_CLIP": 1,
        "VALIDATION_CLIP": 2,
        "PRECISE_BN_CLIP": 3,
        "DROPOUT": 4,
        "TRAIN_IMAGE": 5,
    }
