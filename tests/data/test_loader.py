import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing import resource_sharer

import pytest
import torch

from i3d_gn.data.batches import Stream
from i3d_gn.data.loader import (
    _ignore_interrupts,
    batch_loader,
    default_num_workers,
    limit_compute_threads,
)
from i3d_gn.data.samplers import ShuffledMicroBatches
from i3d_gn.data.videos import RandomClips
from i3d_gn.video_io.index import VideoIndex


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_yield_the_same_batches_as_the_main_process(motion_set, start_method):
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
        len(clips), seed=0, global_batch_size=4, micro_batch_size=2, rank=0, world_size=1,
        first_step=0, last_step=3,
    )  # fmt: skip
    loader = batch_loader(clips, order, num_workers=2, device=torch.device("cpu"))
    loader.multiprocessing_context = start_method
    expected = [clips[samples] for samples in order]
    for batch, reference in zip(loader, expected, strict=True):
        assert torch.equal(batch.inputs, reference.inputs)
        assert torch.equal(batch.labels, reference.labels)
        assert batch.broken == reference.broken


def _worker_whose_parent_disconnects(stderr_path, error):
    """A worker sends a tensor; the receiver connects and leaves, or the worker itself fails."""
    with open(stderr_path, "w") as stderr:
        os.dup2(stderr.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    _ignore_interrupts(0)
    os.kill(os.getpid(), signal.SIGINT)  # as a terminal does: to all processes of the group
    if error is not None:
        sys.excepthook(type(error), error, None)
    address, _ = resource_sharer._resource_sharer.register(lambda *_: None, lambda: None)
    with socket.socket(socket.AF_UNIX) as receiver:
        receiver.connect(address)
    resource_sharer.stop(timeout=30)  # the serving thread has answered all requests so far


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="workers share memory in another way")
@pytest.mark.parametrize("error", [None, ValueError("something else")])
def test_worker_hides_only_the_disconnect_of_its_parent(tmp_path, error):
    process = multiprocessing.get_context("spawn").Process(
        target=_worker_whose_parent_disconnects, args=(tmp_path / "stderr", error)
    )
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    assert (tmp_path / "stderr").read_text() == (f"ValueError: {error}\n" if error else "")


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("device", "world_size", "expected"),
    [("cuda", 1, 8), ("cuda", 4, 2), ("cuda", 16, 1), ("cpu", 1, 4), ("cpu", 2, 2), ("cpu", 8, 1)],
)
def test_default_workers_share_the_cores_of_the_machine(eight_cores, device, world_size, expected):
    assert default_num_workers(torch.device(device), world_size) == expected


@pytest.mark.parametrize(
    ("device", "num_workers", "omp_num_threads", "expected"),
    [("cpu", 3, None, 5), ("cpu", 8, None, 1), ("cpu", 0, None, 6), ("cpu", 3, "6", 6),
     ("cuda", 3, None, 6)],
)  # fmt: skip
def test_compute_threads_leave_the_workers_their_cores(
    eight_cores, monkeypatch, device, num_workers, omp_num_threads, expected
):
    threads = [6]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    if omp_num_threads:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    limit_compute_threads(torch.device(device), 1, num_workers=num_workers)
    assert threads[-1] == expected
