import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch

from i3d_gn.engine.cores import limit_compute_threads, num_workers
from i3d_gn.engine.distributed import Process


def config(workers=None):
    return SimpleNamespace(data=SimpleNamespace(num_workers=workers))


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("device", "world_size", "expected"),
    [("cuda", 1, 8), ("cuda", 4, 2), ("cuda", 16, 1), ("cpu", 1, 4), ("cpu", 2, 2), ("cpu", 8, 1)],
)
def test_default_workers_share_the_cores_of_the_machine(device, world_size, expected):
    process = Process(0, world_size, torch.device(device))
    assert num_workers(config(), process) == expected
    assert num_workers(config(3), process) == 3


def test_process_that_may_have_no_children_loads_by_itself(monkeypatch, one_process):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert num_workers(config(), one_process) == 0


@pytest.mark.parametrize(
    ("device", "workers", "omp_num_threads", "expected"),
    [("cpu", 3, None, 5), ("cpu", 8, None, 1), ("cpu", 0, None, 6), ("cpu", 3, "6", 6),
     ("cuda", 3, None, 6)],
)  # fmt: skip
def test_compute_threads_leave_the_workers_their_cores(
    monkeypatch, device, workers, omp_num_threads, expected
):
    threads = [6]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    if omp_num_threads:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    limit_compute_threads(Process(0, 1, torch.device(device)), workers)
    assert threads[-1] == expected
