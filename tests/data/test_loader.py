import contextlib
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from multiprocessing import resource_sharer
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from i3d_gn.data.batches import Sample, Stream
from i3d_gn.data.loader import (
    Loader,
    PartLoader,
    VideosInParts,
    batch_loader,
)
from i3d_gn.data.samplers import ShuffledMicroBatches
from i3d_gn.data.videos import RandomClips
from i3d_gn.data.workers import _reset_signals
from i3d_gn.video_io.index import VideoIndex


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_yield_the_same_batches_as_the_main_process(motion_set, start_method, monkeypatch):
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
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context",
                        multiprocessing.get_context(start_method))  # fmt: skip
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
    _reset_signals(0)
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


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def workers_that_end_are_noticed_soon(monkeypatch, no_children_yet):
    monkeypatch.setattr("i3d_gn.data.workers._POLL_SECONDS", 0.3)


class Numbers(Dataset):
    """Item k is [k] for a key [k], [k, l] for [k, l]; some numbers break their worker."""

    def __init__(self, breaks, numbers=()):
        self.breaks, self.numbers, self.main = breaks, set(numbers), os.getpid()

    def __getitem__(self, key):
        for number in key:
            if number in self.numbers and os.getpid() != self.main:
                self.breaks()
        return torch.tensor(key)

    def split(self, key):
        return [[number] for number in key]

    def merge(self, items):
        return torch.cat([torch.as_tensor(item) for item in items])

    def skipped(self, key, reason):
        self.reason = reason
        return [-number for number in key]

    def describe(self, key):
        return f"number {key}"

    def num_bytes(self, key):
        return 8 * len(key)


KEYS = [[2 * i + 1, 2 * i + 2] for i in range(8)]


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def hang():
    time.sleep(1000)


def stop_while_handing_over():
    """Announce an item, but stop before its tensor is collected."""

    class Stops(resource_sharer._ResourceSharer):
        def _serve(self):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGSTOP)

    # Of this worker alone; the one of before may serve an earlier item already.
    resource_sharer._resource_sharer = Stops()


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [(crash, r"worker died \(SIGSEGV\)"), (hang, "longer than 8 s"),
     (stop_while_handing_over, "longer than 8 s")],
)  # fmt: skip
def test_sample_that_breaks_its_worker_is_skipped(breaks, reason, caplog):
    data = Numbers(breaks, {5, 12})
    loader = Loader(data, KEYS, num_workers=2, device=CPU, timeout_seconds=8)
    signal.signal(signal.SIGCHLD, handler := signal.SIG_DFL)
    got = torch.cat([torch.as_tensor(item) for item in loader]).tolist()
    assert got == [-n if n in (5, 12) else n for n in range(1, 17)]
    assert re.search(reason, data.reason)
    assert re.search(reason, caplog.text)
    assert signal.getsignal(signal.SIGCHLD) == handler
    assert not multiprocessing.active_children()


def test_killed_workers_leave_only_what_the_main_process_removes(temporary_folder):
    loader = Loader(Numbers(crash, {5, 12}), KEYS, num_workers=2, device=CPU, timeout_seconds=60)
    assert len(list(loader)) == 8
    assert list(temporary_folder.iterdir()) == [Path(get_temp_dir())]


def test_workers_are_killed_beside_another_loader_of_the_program(monkeypatch):
    """torch installs a handler, once, that raises in the main program when any worker dies."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    assert len(list(DataLoader(Numbers(crash), sampler=KEYS, batch_size=None, num_workers=1))) == 8
    assert signal.getsignal(signal.SIGCHLD) != signal.SIG_DFL
    loader = Loader(Numbers(hang, {5}), KEYS, num_workers=2, device=CPU, timeout_seconds=60)
    for _ in range(8):
        items = iter(loader)
        next(items)
        items.close()  # kills the workers
    assert not multiprocessing.active_children()


def test_worker_killed_once_costs_nothing(tmp_path, caplog):
    def dies_once():
        with contextlib.suppress(FileExistsError):
            (tmp_path / "died").touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does for want of memory

    data = Numbers(dies_once, {5})
    loader = Loader(data, KEYS, num_workers=2, device=CPU, timeout_seconds=60)
    assert torch.cat(list(loader)).tolist() == list(range(1, 17))
    assert "worker died (SIGKILL)" in caplog.text


@pytest.mark.parametrize("failure", [ConnectionResetError(104, "reset by peer"), EOFError()])
def test_worker_killed_while_it_hands_over_an_item_costs_nothing(monkeypatch, failure):
    loader = Loader(Numbers(crash), KEYS, num_workers=2, device=CPU, timeout_seconds=60)
    received = []
    failures = {4: failure}
    following = DataLoader.__iter__

    def fails_once(data_loader):
        for item in following(data_loader):
            if len(received) in failures:
                raise failures.pop(len(received))
            yield item

    monkeypatch.setattr(DataLoader, "__iter__", fails_once)
    for item in loader:
        received += item.tolist()
    assert received == list(range(1, 17))


def test_worker_that_dies_over_other_data_is_a_one_line_error():
    class Plain(Dataset):
        def __getitem__(self, key):
            crash()

    loader = Loader(Plain(), KEYS, num_workers=1, device=CPU, timeout_seconds=60)
    with pytest.raises(ValueError, match=r"worker died \(SIGSEGV\).*samples were among \[1, 2\]"):
        list(loader)


def test_errors_of_the_dataset_reach_the_caller():
    def fails():
        raise RuntimeError("of the dataset")

    loader = Loader(Numbers(fails, {5}), KEYS, num_workers=2, device=CPU, timeout_seconds=60)
    with pytest.raises(RuntimeError, match="of the dataset"):
        list(loader)
    assert not multiprocessing.active_children()


def test_user_errors_of_the_dataset_are_one_line():
    def fails():
        raise ValueError("install the package that reads these URLs")

    loader = Loader(Numbers(fails, {5}), KEYS, num_workers=1, device=CPU, timeout_seconds=60)
    with pytest.raises(ValueError, match="^install the package that reads these URLs$"):
        list(loader)


def test_stall_names_what_is_waited_for(monkeypatch, caplog):
    monkeypatch.setattr("i3d_gn.data.workers._STALL_SECONDS", 1.0)
    data = Numbers(lambda: time.sleep(3), {5})
    loader = Loader(data, KEYS, num_workers=1, device=CPU, timeout_seconds=60)
    assert len(list(loader)) == 8
    (line,) = [r.getMessage() for r in caplog.records if "waiting for data" in r.getMessage()]
    assert "number [5, 6]" in line


def test_small_shared_memory_is_an_error_before_anything_hangs(monkeypatch):
    class Large(Numbers):
        def num_bytes(self, key):
            return 10**15

    loader = Loader(Large(crash), KEYS, num_workers=2, device=CPU, timeout_seconds=60)
    with pytest.raises(ValueError, match=r"/dev/shm has .* MB free, and 2 loader workers need"):
        list(loader)
    loader.num_workers = 0
    assert len(list(loader)) == 8


class Part(NamedTuple):
    video: int
    values: torch.Tensor
    is_last: bool
    broken: str | None = None


class Counted(VideosInParts):
    """Video v has v + 1 parts; before part (v, i) `breaks` is called."""

    def __init__(self, wanted, breaks=lambda video, i: None):
        super().__init__(wanted)
        self.breaks = breaks

    def parts(self, video):
        for i in range(video + 1):
            self.breaks(video, i)
            yield Part(video, torch.tensor([video, i]), i == video)

    def skipped(self, video, reason):
        return Part(video, torch.empty(0), True, reason)

    def describe(self, video):
        return f"video {video}"

    def num_bytes(self, video):
        return 16


def parts_of(data, num_workers=2):
    loader = PartLoader(data, num_workers=num_workers, device=CPU, timeout_seconds=60)
    parts = list(loader)
    assert not multiprocessing.active_children()
    return {v: [p for p in parts if p.video == v] for v in data.wanted}


def test_worker_killed_amid_a_video_costs_and_repeats_nothing(tmp_path, caplog):
    def dies_once(video, i):
        if (video, i) == (4, 3):
            with contextlib.suppress(FileExistsError):
                (tmp_path / "died").touch(exist_ok=False)
                time.sleep(0.5)  # the parts before have arrived
                os.kill(os.getpid(), signal.SIGKILL)

    found = parts_of(Counted([5, 0, 4, 2, 3], dies_once))
    assert "worker died (SIGKILL)" in caplog.text
    for video, parts in found.items():
        assert [p.values.tolist() for p in parts] == [[video, i] for i in range(video + 1)]
        assert [p.is_last for p in parts] == [False] * video + [True]


def test_video_that_crashes_its_worker_is_skipped(caplog):
    def dies(video, i):
        if (video, i) in ((4, 2), (0, 0)):
            crash()

    found = parts_of(Counted([5, 0, 4, 2, 3], dies))
    for video, parts in found.items():
        assert bool(parts[-1].broken) == (video in (0, 4))
        whole = [p.values.tolist() for p in parts if not p.broken]
        expected = [[video, i] for i in range(video + 1)]
        assert whole == (expected[: len(whole)] if video in (0, 4) else expected)
        assert [p.is_last for p in parts] == [False] * (len(parts) - 1) + [True]
    assert "worker died (SIGSEGV)" in found[4][-1].broken
    assert parts_of(Counted([1, 2]), num_workers=0).keys() == {1, 2}


def test_broken_clips_are_merged_like_those_of_one_batch(motion_set):
    index = VideoIndex.load(motion_set.train_index)
    clips = RandomClips(
        index, num_frames=4, stride=2, short_side=(40, 48), crop_size=32, flip_probability=0.5,
        backend="pyav", seed=0, stream=Stream.TRAIN_CLIP,
    )  # fmt: skip
    samples = [Sample(position, 2 * position) for position in range(3)]
    whole = clips[samples]
    parts = [clips[key] for key in clips.split(samples)]
    for ours, expected in zip(clips.merge(parts), whole, strict=True):
        assert torch.equal(ours, expected) if isinstance(ours, torch.Tensor) else ours == expected
    parts[1] = clips.skipped([samples[1]], "crashed")
    merged = clips.merge(parts)
    assert torch.equal(merged.inputs, whole.inputs[[0, 2]])
    assert merged.labels.tolist() == whole.labels[[0, 2]].tolist()
    assert merged.broken == (f"{index.paths[2]}: crashed",)
    nothing = clips.merge([clips.skipped([sample], "crashed") for sample in samples])
    assert (nothing.weights.tolist(), len(nothing.broken)) == ([0.0], 3)
    assert clips.num_bytes(samples) == whole.inputs.numel()
