"""Multi-clip testing: every video decoded once, scored once, and never scored again.

Scores are written as parts while testing runs, so that a test that was stopped goes on where it
was, with any number of processes:

    <folder>/parts/<tag>/<first video>-<last video>-<rank>.parquet
    <folder>/scores.parquet      all parts, merged by rank 0 at the end
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from tqdm import tqdm

from i3d_gn.data.loader import TimedIterator, video_loader
from i3d_gn.data.to_device import DeviceClips
from i3d_gn.data.videos import TestVideo, TestVideos
from i3d_gn.engine.distributed import World, wait_for_all
from i3d_gn.engine.metrics import VideoMetrics, video_metrics
from i3d_gn.video_io.index import VideoIndex

VIDEOS_PER_PART = 64


@dataclass(frozen=True)
class VideoScore:
    """What testing found out about one video: its scores (K,), or why there are none."""

    video: int
    label: int
    scores: npt.NDArray[np.float32] | None
    broken: str | None


@dataclass(frozen=True)
class TestOutcome:
    """Accuracy over the videos that could be decoded, and why the others could not.

    `timing` is this process's: `videos`, those that it tested now, `seconds`, and
    `data_wait_share`, the part of them that the network waited for frames. Near 0 the network is
    the slower of the two, otherwise decoding is.
    """

    __test__ = False

    metrics: VideoMetrics
    skipped: dict[str, str]  # path below the index's root -> reason
    timing: dict[str, float]


@torch.no_grad()
def score_video(
    model: nn.Module,
    video: TestVideo,
    *,
    to_device: DeviceClips,
    window: tuple[int, int],
    average: Literal["softmax", "logits"],
    clips_per_forward: int,
) -> torch.Tensor:
    """Scores (K,) of a video: the mean over its clips, crops and, within a crop, locations.

    The network runs fully convolutionally ([NL] test_net_video.py): average pooling over the whole
    time and `window` (rows, columns of the last feature map, the size a training crop has there)
    with stride 1, the classifier at each location. `average` "softmax" is [NL]'s mean of
    probabilities, "logits" pytorchvideo's mean of logits.

    Args:
        model: In eval mode, `forward(clips, window=...) -> (N, K, 1, h, w)`.
        video: Its frames (U, H, W, 3) and clips (clips, T).
        to_device: Normalises clips on the network's device.
        window: Rows and columns of the sliding average.
        average: "softmax" or "logits".
        clips_per_forward: Bounds the network's memory.
    """
    frames = video.frames.to(to_device.device, non_blocking=True)
    indices = video.clips.to(to_device.device, non_blocking=True)
    total: torch.Tensor | None = None
    for top, left, height, width in video.crops:
        crop = frames[:, top : top + height, left : left + width]
        for rows in indices.split(clips_per_forward):
            clips = crop[rows.flatten()].unflatten(0, rows.shape)
            with to_device.autocast():
                logits = model(to_device(clips), window=window).float()
            per_location = logits.softmax(dim=1) if average == "softmax" else logits
            scores = per_location.double().mean(dim=(2, 3, 4)).sum(dim=0)
            total = scores if total is None else total + scores
    assert total is not None
    return total / (len(video.crops) * len(video.clips))


def evaluate_videos(
    model: nn.Module,
    videos: TestVideos,
    *,
    to_device: DeviceClips,
    world: World,
    folder: Path,
    tag: str,
    window: tuple[int, int],
    average: Literal["softmax", "logits"],
    clips_per_forward: int,
    num_workers: int,
) -> TestOutcome | None:
    """Score every video once over all processes; the outcome on rank 0, None elsewhere.

    Scores found under `folder`/parts/`tag` are taken over instead of computed again, so `tag` must
    stand for all that decides them: weights, videos and settings. Writes `folder`/scores.parquet.

    Raises:
        RuntimeError: the processes do not see the same `folder`.
        ValueError: not one video could be decoded, or scores are not finite.
    """
    parts = folder / "parts" / tag
    parts.mkdir(parents=True, exist_ok=True)
    done = {score.video for score in read_parts(parts)}
    wait_for_all()  # before anyone adds a part: all must leave out the same videos
    todo = [video for video in range(len(videos)) if video not in done]
    mine = todo[world.rank :: world.size]
    loader = video_loader(
        videos, mine, num_workers=num_workers, pin_memory=to_device.device.type == "cuda"
    )
    model.eval()
    pending: list[VideoScore] = []
    started = time.monotonic()
    timed = TimedIterator(iter(loader))
    quiet = None if world.is_main else True
    for video in tqdm(timed, total=len(mine), desc="test", unit="video", disable=quiet):
        scores = None
        if video.broken is None:
            scores = score_video(
                model,
                video,
                to_device=to_device,
                window=window,
                average=average,
                clips_per_forward=clips_per_forward,
            )
            scores = scores.float().cpu().numpy()
        pending.append(VideoScore(video.video, video.label, scores, video.broken))
        if len(pending) == VIDEOS_PER_PART:
            _write_part(parts, pending, world.rank)
            pending = []
    if pending:
        _write_part(parts, pending, world.rank)
    seconds = time.monotonic() - started
    wait_for_all()
    if not world.is_main:
        return None
    metrics, skipped = _merge(parts, videos.index, folder)
    timing = {
        "videos": len(mine),
        "seconds": seconds,
        "data_wait_share": timed.seconds_waited / seconds,
    }
    return TestOutcome(metrics, skipped, timing)


def _merge(parts: Path, index: VideoIndex, folder: Path) -> tuple[VideoMetrics, dict[str, str]]:
    scores = read_parts(parts)
    if len(scores) != len(index):
        raise RuntimeError(
            f"{parts} holds scores of {len(scores)} videos of {len(index)}: the processes do not "
            "write to one folder; put output_dir where all of them see it, and run again"
        )
    scored = [(s, s.scores) for s in scores if s.scores is not None]
    if not scored:
        raise ValueError(f"none of {len(scores)} videos could be decoded: {scores[0].broken}")
    matrix = np.stack([row for _, row in scored])
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(bad):
        first = scored[int(bad[0])][0].video
        raise ValueError(
            f"{len(bad)} of {len(matrix)} videos have scores that are not finite, the first "
            f"is {index.paths[first]}: the network diverged, or its arithmetic overflowed; test an "
            "earlier checkpoint, or with train.precision=fp32"
        )
    metrics = video_metrics(matrix, np.array([s.label for s, _ in scored]))
    table = pa.table(
        {
            "path": pa.array([index.paths[s.video] for s, _ in scored], pa.string()),
            "label": pa.array([s.label for s, _ in scored], pa.int64()),
            "scores": pa.array(list(matrix), pa.list_(pa.float32())),
        }
    ).replace_schema_metadata({"class_names": json.dumps(list(index.class_names))})
    _write_table_atomically(folder / "scores.parquet", table)
    shutil.rmtree(folder / "parts")
    skipped = {index.paths[s.video]: s.broken for s in scores if s.broken is not None}
    return metrics, skipped


def read_parts(parts: Path) -> list[VideoScore]:
    """All scores written so far, each video once, in the index's order."""
    found: dict[int, VideoScore] = {}
    for path in sorted(parts.glob("[0-9]*.parquet")):
        for row in pq.read_table(path).to_pylist():
            scores = None if row["scores"] is None else np.array(row["scores"], dtype=np.float32)
            score = VideoScore(row["video"], row["label"], scores, row["broken"])
            found.setdefault(score.video, score)
    return [found[video] for video in sorted(found)]


def _write_part(parts: Path, scores: Sequence[VideoScore], rank: int) -> None:
    table = pa.table(
        {
            "video": pa.array([s.video for s in scores], pa.int64()),
            "label": pa.array([s.label for s in scores], pa.int64()),
            "scores": pa.array([s.scores for s in scores], pa.list_(pa.float32())),
            "broken": pa.array([s.broken for s in scores], pa.string()),
        }
    )
    name = f"{scores[0].video:08d}-{scores[-1].video:08d}-{rank}.parquet"
    _write_table_atomically(parts / name, table)


def _write_table_atomically(path: Path, table: pa.Table) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(table, temporary)
    os.replace(temporary, path)
