import itertools
import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing import resource_sharer

import numpy as np
import pytest
import torch

from i3d_gn.data.batches import Stream
from i3d_gn.data.loader import _leave_stopping_to_the_parent, clip_loader
from i3d_gn.data.samplers import EachVideoOnce, ShuffledMicroBatches, micro_batches_per_process
from i3d_gn.data.videos import RandomClips
from i3d_gn.video_io.index import VideoIndex


def batches(rank=0, world_size=1, first_step=0, last_step=6, seed=3, num_videos=10):
    return list(
        ShuffledMicroBatches(
            num_videos,
            seed=seed,
            global_batch_size=8,
            clips_per_gpu=2,
            rank=rank,
            world_size=world_size,
            first_step=first_step,
            last_step=last_step,
        )
    )


def test_positions_run_on_and_every_epoch_is_a_permutation():
    samples = list(itertools.chain(*batches(last_step=10)))
    assert [sample.position for sample in samples] == list(range(80))
    epochs = np.array([sample.video for sample in samples]).reshape(8, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_stopping_and_going_on_changes_nothing():
    assert batches(last_step=4) + batches(first_step=4) == batches()


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_take_turns_at_the_micro_batches_of_one(world_size):
    per_rank = [batches(rank, world_size) for rank in range(world_size)]
    interleaved = list(itertools.chain(*zip(*per_rank, strict=True)))
    assert interleaved == batches()


def test_seeds_give_different_orders():
    assert batches(seed=1) != batches(seed=2)


def test_a_batch_that_cannot_be_dealt_out_names_the_remedy():
    with pytest.raises(ValueError, match="global batch of 8 .* 3 processes of 2 .* multiple of 6"):
        micro_batches_per_process(global_batch_size=8, clips_per_gpu=2, world_size=3)


@pytest.mark.parametrize(("num_videos", "world_size"), [(7, 1), (7, 2), (7, 3), (2, 3)])
def test_validation_takes_each_video_once(num_videos, world_size):
    seen = []
    for rank in range(world_size):
        order = EachVideoOnce(num_videos, clips_per_gpu=2, rank=rank, world_size=world_size)
        of_rank = list(order)
        assert len(of_rank) == len(order)
        seen += [sample.video for samples in of_rank for sample in samples]
    assert sorted(seen) == list(range(num_videos))


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_bring_what_this_process_would(motion_set, start_method):
    clips = RandomClips(
        VideoIndex.load(motion_set.train_index),
        num_frames=4,
        stride=2,
        short_side=(40, 48),
        crop_size=32,
        flip_probability=0.5,
        backend="pyav",
        seed=0,
        stream=Stream.TRAIN_CLIP,
    )
    order = ShuffledMicroBatches(
        len(clips), seed=0, global_batch_size=4, clips_per_gpu=2, rank=0, world_size=1,
        first_step=0, last_step=3,
    )  # fmt: skip
    loader = clip_loader(clips, order, num_workers=2, pin_memory=False)
    loader.multiprocessing_context = start_method
    expected = [clips[samples] for samples in order]
    for batch, reference in zip(loader, expected, strict=True):
        assert torch.equal(batch.clips, reference.clips)
        assert torch.equal(batch.labels, reference.labels)
        assert batch.broken == reference.broken


def _worker_whose_parent_hangs_up(stderr_path, error):
    """A worker passes a tensor on; the taker connects and leaves, or the worker itself errs."""
    with open(stderr_path, "w") as stderr:
        os.dup2(stderr.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    _leave_stopping_to_the_parent(0)
    os.kill(os.getpid(), signal.SIGINT)  # as a terminal does: to all processes of the group
    if error is not None:
        sys.excepthook(type(error), error, None)
    address, _ = resource_sharer._resource_sharer.register(lambda *_: None, lambda: None)
    with socket.socket(socket.AF_UNIX) as taker:
        taker.connect(address)
    resource_sharer.stop(timeout=30)  # the serving thread has answered all that came before


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="workers share memory another way")
@pytest.mark.parametrize("error", [None, ValueError("something else")])
def test_a_worker_is_silent_about_a_parent_that_left_and_about_nothing_else(tmp_path, error):
    process = multiprocessing.get_context("spawn").Process(
        target=_worker_whose_parent_hangs_up, args=(tmp_path / "stderr", error)
    )
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    assert (tmp_path / "stderr").read_text() == (f"ValueError: {error}\n" if error else "")
