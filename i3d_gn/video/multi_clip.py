"""Multi-clip testing: every video is decoded once and scored once."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from i3d_gn.data.loader import TimedIterator, video_loader
from i3d_gn.data.to_device import ToDevice
from i3d_gn.data.videos import TestVideo, TestVideos
from i3d_gn.engine.distributed import Process, barrier
from i3d_gn.engine.run_dir import DirLock
from i3d_gn.video.scores import TestOutcome, VideoScore, merge_parts, read_parts, write_part
from i3d_gn.video_io.index import VideoIndex

VIDEOS_PER_PART = 64


@dataclass(frozen=True)
class VideoScorer:
    """Scores a video by the mean over its clips, crops and, within a crop, locations.

    The network runs fully convolutionally ([NL] test_net_video.py): average pooling over all of
    time and a sliding window of the last feature map, at stride 1, then the classifier at each
    location. Networks of other libraries have no window: they average the whole map of a crop.

    Attributes:
        model: The network, in eval mode: `forward(clips, window=...) -> (N, K, 1, h, w)`, or
            (N, K) without a window.
        to_device: Normalizes clips on the network's device.
        window: Rows and columns of the sliding window: the feature map of a training crop.
        average: "softmax" is [NL]'s mean of probabilities, "logits" pytorchvideo's mean of logits.
        clips_per_forward: Limits the network's memory.
    """

    model: nn.Module
    to_device: ToDevice
    window: tuple[int, int] | None
    average: Literal["softmax", "logits"]
    clips_per_forward: int

    @torch.no_grad()
    def __call__(self, video: TestVideo) -> Tensor:
        """Scores (K,), float64."""
        device = self.to_device.device
        frames = video.frames.to(device, non_blocking=True)
        indices = video.clips.to(device, non_blocking=True)
        total: Tensor | None = None
        for top, left, height, width in video.crops:
            crop = frames[:, top : top + height, left : left + width]
            for rows in indices.split(self.clips_per_forward):
                clips = crop[rows.flatten()].unflatten(0, rows.shape)
                with self.to_device.autocast():
                    logits = self.model(self.to_device(clips), window=self.window).float()
                per_location = logits.softmax(dim=1) if self.average == "softmax" else logits
                scores = per_location.double()
                if self.window is not None:
                    scores = scores.mean(dim=(2, 3, 4))
                scores = scores.sum(dim=0)
                total = scores if total is None else total + scores
        assert total is not None
        return total / (len(video.crops) * len(video.clips))


def score_videos(
    scorer: VideoScorer,
    videos: TestVideos,
    *,
    folder: Path,
    tag: str,
    process: Process,
    num_workers: int,
    timeout_seconds: float = 300.0,
) -> TestOutcome | None:
    """Score every video once, split across the ranks; the outcome on rank 0, None elsewhere.

    Scores found under `folder`/parts/`tag` are used instead of computed again, so `tag` must
    identify everything that determines them: weights, videos and settings. Videos that failed are
    tried again. Writes `folder`/scores.parquet.

    Raises:
        ConfigError: Another process is testing in `folder`.
        ValueError: No video could be decoded, scores are not finite, or the ranks do not share
            `folder`.
    """
    assert isinstance(videos.index, VideoIndex)
    lock = DirLock(folder) if process.is_main else None
    parts = folder / "parts" / tag
    parts.mkdir(parents=True, exist_ok=True)
    done = {score.video for score in read_parts(parts) if score.scores is not None}
    barrier()  # before any rank adds a part: all must skip the same videos
    todo = [video for video in range(len(videos)) if video not in done]
    mine = todo[process.rank :: process.world_size]
    loader = video_loader(
        videos,
        mine,
        num_workers=num_workers,
        device=process.device,
        timeout_seconds=timeout_seconds,
    )
    scorer.model.eval()
    pending: list[VideoScore] = []
    started = time.monotonic()
    timed = TimedIterator(iter(loader))
    quiet = None if process.is_main else True
    try:
        for video in tqdm(timed, total=len(mine), desc="test", unit="video", disable=quiet):
            scores = None if video.broken is not None else scorer(video).float().cpu().numpy()
            pending.append(VideoScore(video.video, video.label, scores, video.broken))
            if len(pending) == VIDEOS_PER_PART:
                write_part(parts, pending, process.rank)
                pending = []
    finally:  # at a signal too
        if pending:
            write_part(parts, pending, process.rank)
    seconds = time.monotonic() - started
    barrier()
    if lock is None:
        return None
    timing = {
        "videos": len(mine),
        "seconds": seconds,
        "data_wait_share": timed.seconds_waited / seconds,
    }
    outcome = merge_parts(parts, videos.index, folder, timing)
    lock.close()
    return outcome
