"""Shards, on a disk or a web server, give the same clips as the original files."""

import gc
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from i3d_gn import cli
from i3d_gn.data.batches import Sample, Stream
from i3d_gn.data.loader import batch_loader
from i3d_gn.data.videos import RandomClips, TestVideos
from i3d_gn.engine.checkpoint import latest_checkpoint, load_checkpoint
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.typed_config import ConfigError
from i3d_gn.video import build
from i3d_gn.video.evaluate import evaluate
from i3d_gn.video.train import train
from i3d_gn.video_io.index import VideoIndex

ONE_PROCESS = Process(0, 1, torch.device("cpu"))

pytest.importorskip("webdataset", reason="packing needs webdataset (pip install 'i3d_gn[shards]')")


def run(*arguments):
    return cli.main(["pack", *map(str, arguments), "--workers", "1"])


@pytest.fixture(scope="module")
def packed(motion_set, tmp_path_factory):
    """The 12 training videos of the motion set, about five per shard."""
    folder = tmp_path_factory.mktemp("shards")
    assert run(motion_set.train_index, folder, "--shard-mib", "0.1") == 0
    return folder


def random_clips(index):
    return RandomClips(
        index,
        num_frames=4,
        stride=2,
        short_side=(40, 48),
        crop_size=36,
        flip_probability=0.5,
        backend="pyav",
        seed=1,
        stream=Stream.TRAIN_CLIP,
    )


def test_videos(index):
    return TestVideos(
        index,
        num_clips=3,
        num_frames=4,
        stride=2,
        spacing="nonlocal",
        align_starts=False,
        short_side=40,
        spatial="full",
        crop_size=36,
        backend="pyav",
    )


test_videos.__test__ = False


def assert_same_clips(loose, other):
    batches = [[Sample(i, i % 12) for i in range(k, k + 4)] for k in (0, 4, 8)]
    for batch in batches:
        a, b = random_clips(loose)[batch], random_clips(other)[batch]
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.labels, b.labels)
        assert a.broken == b.broken == ()
    for a, b in zip(test_videos(loose), test_videos(other), strict=False):
        assert torch.equal(a.frames, b.frames)
        assert (a.video, a.label, a.crops) == (b.video, b.label, b.crops)
        if a.video == 11:
            break


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_follow_the_webdataset_convention(motion_set, packed):
    """As read by webdataset itself."""
    import webdataset

    loose = VideoIndex.load(motion_set.train_index)
    shards = sorted(packed.glob("shard-*.tar"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 0.15 * 2**20 for shard in shards)
    samples = list(webdataset.WebDataset([str(s) for s in shards], shardshuffle=False))
    gc.collect()
    assert len(samples) == len(loose) == 12
    numbers = [int(sample["__key__"]) for sample in samples]
    assert sorted(numbers) == list(range(12))
    assert numbers != sorted(numbers)  # shuffled once
    for i, sample in zip(numbers, samples, strict=True):
        facts = json.loads(sample["json"])
        assert sample["mp4"] == loose.path_of(i).read_bytes()
        assert (facts["path"], facts["label"]) == (loose.paths[i], loose.labels[i])
        assert facts["num_frames"] == loose.num_frames[i]


def test_packed_clips_equal_original_clips(motion_set, packed):
    loose, other = (
        VideoIndex.load(motion_set.train_index),
        VideoIndex.load(packed / "index.parquet"),
    )
    assert other.paths == loose.paths
    assert other.class_names == loose.class_names
    np.testing.assert_array_equal(other.labels, loose.labels)
    assert_same_clips(loose, other)


def test_folder_can_be_moved_and_index_pickled(motion_set, packed, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(packed, moved)
    index = pickle.loads(pickle.dumps(VideoIndex.load(moved / "index.parquet")))
    assert index.root == moved
    assert_same_clips(VideoIndex.load(motion_set.train_index), index)
    first = sorted(moved.glob("shard-*.tar"))[0]
    first.write_bytes(first.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"shard-00000.tar has 5000 bytes, but the index expects"):
        VideoIndex.load(moved / "index.parquet")


@pytest.fixture
def served(motion_set, http_server, tmp_path):
    """The index of shards on a web server."""
    pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for HTTP")
    output = http_server.folder / "k"
    root = ["--root", f"{http_server.url}/k"]
    assert run(motion_set.train_index, output, "--shard-mib", "0.1", *root) == 0
    return Path(shutil.move(output / "index.parquet", tmp_path / "index.parquet"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_on_a_web_server(motion_set, served, http_server, num_workers):
    loose = VideoIndex.load(motion_set.train_index)
    other = VideoIndex.load(served, allowed_hosts=["127.0.0.1"])
    assert other.root == f"{http_server.url}/k"
    batches = [[Sample(i, i) for i in range(k, k + 4)] for k in (0, 4, 8)]
    loaders = (
        batch_loader(
            random_clips(index), batches, num_workers=num_workers, device=ONE_PROCESS.device
        )
        for index in (loose, other)
    )
    for a, b in zip(*loaders, strict=True):
        assert torch.equal(a.inputs, b.inputs)
    # Only the bytes of the videos are transferred.
    sizes = sorted(last - first + 1 for _, first, last in http_server.requests)
    assert sizes == sorted(loose.path_of(i).stat().st_size for i in range(12))


def test_network_faults(served, http_server, monkeypatch):
    monkeypatch.setattr("i3d_gn.video_io.packed.time.sleep", lambda seconds: None)
    index = VideoIndex.load(served, allowed_hosts=["127.0.0.1"])
    clips = random_clips(index)
    expected = clips[[Sample(0, 0)]]
    shard = next(name for name, *_ in http_server.requests)
    http_server.faults[shard] = [("status", 500), ("drop", 100), ("no_ranges", 0)]
    assert torch.equal(clips[[Sample(0, 0)]].inputs, expected.inputs)
    http_server.faults[shard] = [("status", 500)] * 5
    (line,) = clips[[Sample(0, 0)]].broken
    assert line.startswith(f"{Path(shard).name}: {index.paths[0]}: http://")
    assert "500" in line


@pytest.mark.parametrize("hosts", [(), ("example.org", "localhost", "127.0.0.2")])
def test_hosts_that_were_not_named_are_never_contacted(served, http_server, hosts):
    index = VideoIndex.load(served, allowed_hosts=hosts)
    assert index.refused_root == f"{http_server.url}/k"
    for refused in (index, pickle.loads(pickle.dumps(index))):
        with pytest.raises(ValueError, match="was not named"), refused.file_of(0):
            pass
    assert http_server.requests == []
    # A root that is passed was named.
    named = VideoIndex.load(served, http_server.url + "/k")
    assert named.refused_root is None
    with pickle.loads(pickle.dumps(named)).file_of(0) as file:
        assert file.stat().st_size == named.num_bytes[0]


def test_config_must_name_the_host(served, small_run, http_server):
    """From the file, as from the command line."""
    config = small_run(f"data.train_index={served}")
    message = r"its videos are at http://127.*; .* add data.allowed_hosts: \[127.0.0.1\]"
    with pytest.raises(ConfigError, match=message):
        build.load_index(str(served), config)
    assert http_server.requests == []
    for override in ("data.allowed_hosts=[127.0.0.1]", f"data.root={http_server.url}/k"):
        index = build.load_index(str(served), small_run(override))
        with index.file_of(0) as file:
            assert file.stat().st_size == index.num_bytes[0]


def test_broken_video_is_named(motion_set, tmp_path):
    folder = tmp_path / "motion"
    shutil.copytree(motion_set.folder, folder)
    index = VideoIndex.load(folder / "train.parquet")
    path = index.path_of(3)
    path.write_bytes(path.read_bytes()[:2000])
    assert run(folder / "train.parquet", tmp_path / "shards") == 0
    packed = VideoIndex.load(tmp_path / "shards" / "index.parquet")
    assert f"shard-00000.tar: {index.paths[3]}" in test_videos(packed)[3].broken


def test_only_changed_shards_are_written_again(motion_set, tmp_path, capsys):
    output = tmp_path / "shards"
    arguments = [motion_set.train_index, output, "--shard-mib", "0.1"]
    assert run(*arguments, "--dry-run") == 0
    assert not output.exists()
    for i in range(2):
        assert run(*arguments, "--shard", f"{i}/2") == 0
    capsys.readouterr()
    assert run(*arguments) == 0
    num_shards = len(list(output.glob("*.tar")))
    assert f"{num_shards} shards ({num_shards} already there)" in capsys.readouterr().out
    (output / "shard-00000.tar").unlink()
    assert run(*arguments) == 0
    assert f"({num_shards - 1} already there)" in capsys.readouterr().out
    assert run(*arguments[:2], "--shard-mib", "100") == 0
    assert [path.name for path in output.glob("*.tar")] == ["shard-00000.tar"]
    assert len(VideoIndex.load(output / "index.parquet")) == 12


def test_killed_run_resumes(motion_set, packed, tmp_path, kill_midway):
    """The shards equal those of an undisturbed run, and the first is not written again."""
    output = tmp_path / "shards"
    first, ledger = output / "shard-00000.tar", output / ".pack.ledger.jsonl"
    arguments = [motion_set.train_index, output, "--shard-mib", "0.1", "--workers", "1"]
    kill_midway(
        "pack_shards",
        "_write_shard",
        calls=1,
        arguments=arguments,
        is_midway=lambda: ledger.exists() and ledger.read_bytes().count(b"\n") == 1,
    )
    assert list(output.glob("[!.]*")) == [first]
    inode = first.stat().st_ino
    assert run(*arguments) == 0
    assert first.stat().st_ino == inode
    for shard in packed.glob("shard-*.tar"):
        assert (output / shard.name).read_bytes() == shard.read_bytes()
    with tarfile.open(first) as tar:
        assert {member.mtime for member in tar} == {0}


def test_without_webdataset(motion_set, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_tools.pack_shards.importlib.util.find_spec", lambda name: None)
    assert run(motion_set.folder / "train.parquet", tmp_path / "out") == 2
    assert "pip install 'i3d_gn[shards]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_invalid_indexes(motion_set, packed, tmp_path, capsys):
    assert run(packed / "index.parquet", tmp_path / "out") == 2
    assert "lists packed videos already" in capsys.readouterr().err
    folder = tmp_path / "motion"
    shutil.copytree(motion_set.folder, folder)
    VideoIndex.load(folder / "train.parquet").path_of(0).unlink()
    assert run(folder / "train.parquet", tmp_path / "out") == 2
    assert "no longer exists; index the videos again" in capsys.readouterr().err


@pytest.mark.slow
def test_training_from_shards_equals_training_from_files(motion_set, packed, small_run, tmp_path):
    """The weights after training and the scores of each video are equal."""
    val = tmp_path / "val"
    assert run(motion_set.val_index, val) == 0
    indexes = [f"data.train_index={packed}/index.parquet", f"data.val_index={val}/index.parquet"]
    states, scores = [], []
    for name, options in (("loose", []), ("shards", [*indexes, "data.num_workers=1"])):
        folder = tmp_path / name
        train(small_run(*options, output_dir=folder), ONE_PROCESS)
        evaluate(small_run(*options, output_dir=folder), None, ONE_PROCESS)
        checkpoint = latest_checkpoint(folder / "checkpoints")
        assert checkpoint is not None
        states.append(load_checkpoint(checkpoint)["model"])
        (table,) = folder.glob("test_*/scores.parquet")
        scores.append(pq.read_table(table))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert scores[0].equals(scores[1])
    assert scores[0].num_rows == 6


def test_index_of_the_videos_is_not_replaced(motion_set, tmp_path, capsys):
    index = tmp_path / "index.parquet"
    videos = motion_set.folder / "videos" / "train"
    assert cli.main(["index", str(videos), str(index), "--workers", "1"]) == 0
    before = index.read_bytes()
    assert run(index, tmp_path) == 2
    assert f"error: {index} cannot be written: it is also an input" in capsys.readouterr().err
    assert index.read_bytes() == before
    assert not list(tmp_path.glob("*.tar"))
