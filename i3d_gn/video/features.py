"""Pooled features of sliding windows, one array per video.

OUT/settings.json      what the features depend on; another run must have the same to resume
OUT/<video>.npy        float32 (number of windows, channels)
OUT/videos.jsonl       one line per video: file, its origin, windows, fps, length and every in
                       frames, or why it is broken; of several lines for a video the last one counts
"""

import contextlib
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from i3d_gn.data.loader import PartLoader
from i3d_gn.data.to_device import ToDevice
from i3d_gn.data.windows import Extent, OneClip, SlidingWindows, TestView, WindowPart
from i3d_gn.engine.cores import limit_compute_threads, num_workers
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.run_dir import DirLock
from i3d_gn.engine.typed_config import config_hash
from i3d_gn.files import atomic_output, file_sha256, write_json
from i3d_gn.video import build
from i3d_gn.video.load import load_network, load_weights, network_file
from i3d_gn.video.predict import check_some_decoded, report_broken, video_sources
from i3d_gn.video.recognizer import default_device
from i3d_gn.video_io.index import VideoIndex
from i3d_gn.video_io.packed import is_url
from i3d_gn.video_io.video_files import VideoFiles

_ORIGIN = ("video", "bytes", "modified")


def features(
    source: str,
    out: Path,
    *,
    checkpoint: str | None,
    weights: str | None,
    length: Extent | None,
    every: Extent | None,
    overrides: Sequence[str] = (),
) -> None:
    """Write the features of all windows of all videos; run again to resume.

    Args:
        source: An index, a folder, a video or a URL.
        out: Folder to write to.
        checkpoint: See `load_network`; or
        weights: see `load_weights`.
        length: Of a window; None: of a training clip.
        every: From one window to the next; None: `length`.
        overrides: Changes of the network's config, `key=value`.

    Raises:
        ValueError: The source or the network cannot be used, `out` holds features with other
            settings, or no video could be decoded.
    """
    videos = video_sources([source])[0]
    files = _output_names(videos, Path(source))
    device = default_device()
    if checkpoint is not None:
        used = network_file(checkpoint)
        network, config = load_network(used, overrides=overrides, device=device)
    else:
        assert weights is not None
        used = Path(weights)
        network, config = load_weights(weights, overrides=overrides, device=device)
    clip, test = config.clip, config.test
    length = length or Extent(clip.num_frames * max(1, clip.stride), in_seconds=False)
    every = every or length
    settings = {
        "network": file_sha256(used) if used.is_file() else str(used),
        "config_sha256": config_hash(config),
        "length": list(length),
        "every": list(every),
    }
    lock = DirLock(out, "the output folder")
    ledger = _Ledger(out / "videos.jsonl")
    _check_settings(out / "settings.json", settings, is_new=ledger.is_empty)
    origins = [_origin(videos, video) for video in range(len(videos))]
    todo = [v for v, file in enumerate(files) if not ledger.is_done(file, origins[v], out)]
    process = Process(0, 1, device)
    to_device = build.to_device(config, process, mean=network.mean, std=network.std)
    model = network.model.eval()
    workers = min(num_workers(config, process), len(todo))
    limit_compute_threads(process, workers)
    windows = SlidingWindows(
        videos,
        todo,
        length=length,
        every=every,
        partial=False,
        clips_of=OneClip(clip.stride),
        view=TestView(test.short_side, test.spatial, clip.crop_size),
        windows_per_part=test.clips_per_forward,
    )
    loader = PartLoader(
        windows,
        num_workers=workers,
        device=device,
        timeout_seconds=config.data.timeout_seconds,
    )
    broken: list[str] = []
    parts: dict[int, list[Tensor]] = {}
    check_size = functools.cache(model.feature_size)  # raises for clips that are too small
    with tqdm(total=len(todo), desc="features", unit="video") as bar:
        for item in loader:
            if len(item.clips):
                for _, _, height, width in item.crops:
                    check_size(item.clips.shape[1], height, width)
                parts.setdefault(item.video, []).append(_pooled(model, item, to_device))
            if not item.is_last:
                continue
            computed = parts.pop(item.video, [])
            file = files[item.video]
            if item.broken is None:
                pooled = torch.cat(computed)
                _check_finite(pooled, videos.paths[item.video])
                _save(out / file, pooled.numpy())
                ledger.add_done(file, origins[item.video], item, len(pooled))
            else:
                broken.append(str(item.broken))
                ledger.add_broken(file, str(item.broken))
            bar.update()
    check_some_decoded(broken, len(files))
    print(f"{out}: features of {len(files) - len(broken)} videos")
    report_broken(broken)
    lock.close()


@torch.no_grad()
def _pooled(model: Any, item: WindowPart, to_device: ToDevice) -> Tensor:
    """Features (N, C) on the CPU, the mean over the crops."""
    crops = []
    frames = item.frames[item.clips.flatten()].unflatten(0, item.clips.shape)
    for top, left, height, width in item.crops:
        clips = frames[:, :, top : top + height, left : left + width]
        with to_device.autocast():
            crops.append(model.pooled_features(to_device(clips)).float())
    return torch.stack(crops).mean(dim=0).cpu()


def _check_finite(pooled: Tensor, video: str) -> None:
    if not pooled.isfinite().all():
        raise ValueError(
            f"the features of {video} are not finite: the network diverged, or its arithmetic "
            "overflowed; use an earlier checkpoint, or --set train.precision=fp32"
        )


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_output(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def _output_names(videos: VideoIndex | VideoFiles, source: Path) -> list[str]:
    """For each video its array's path below the output folder."""
    names = list(videos.paths)
    if isinstance(videos, VideoFiles):
        names = [
            os.path.relpath(name, source) if source.is_dir() else PurePosixPath(name).name
            for name in names
        ]
    files: dict[str, str] = {}
    for name in names:
        parts = [p for p in PurePosixPath(name).parts if p not in ("/", "..")]
        file = PurePosixPath(*parts).with_suffix(".npy").as_posix()
        if other := files.get(file):
            raise ValueError(
                f"{other} and {name} would both be written to {file}; rename one of them"
            )
        files[file] = name
    return list(files)


def _origin(videos: VideoIndex | VideoFiles, video: int) -> dict[str, Any]:
    """Which video an array is of: its path or URL, size in bytes and time of modification in ns."""
    name = videos.paths[video]
    if isinstance(videos, VideoIndex):
        if videos.is_packed:
            return {"video": f"{videos.root}/{name}", "bytes": int(videos.num_bytes[video])}
        name = str(videos.path_of(video))
    if is_url(name):
        return {"video": name}
    with contextlib.suppress(OSError):  # it will count as broken
        status = os.stat(name)
        return {
            "video": os.path.abspath(name),
            "bytes": status.st_size,
            "modified": status.st_mtime_ns,
        }
    return {"video": os.path.abspath(name)}


def _check_settings(path: Path, settings: dict[str, Any], *, is_new: bool) -> None:
    """Write the settings, or check that they are those of the features that are there."""
    if is_new or not path.is_file():
        write_json(path, settings)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in settings if before[key] != settings[key]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged; use another folder, or delete this one") from error
    if changed:
        raise ValueError(
            f"{path.parent} holds features with other settings ({', '.join(changed)}); use another "
            "folder, or delete this one"
        )


class _Ledger:
    """What is known of each video, appended while a command runs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._origins: dict[str, dict[str, Any]] = {}  # of the arrays that were written
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # a killed process left half a line
                continue
            if isinstance(entry, dict) and "error" not in entry:
                origin = {key: entry[key] for key in _ORIGIN if key in entry}
                self._origins[str(entry.get("file"))] = origin
        if text and not text.endswith("\n"):
            self._append("")

    @property
    def is_empty(self) -> bool:
        """Whether no array was written yet."""
        return not self._origins

    def is_done(self, file: str, origin: dict[str, Any], folder: Path) -> bool:
        """Whether the array of a video was written; broken and changed ones are done again.

        Raises:
            ValueError: The array is of another video, and not of this one before it was moved.
        """
        before = self._origins.get(file)
        if before is None or not (folder / file).is_file():
            return False
        if {**before, "video": ""} == {**origin, "video": ""} and "bytes" in origin:
            return True
        if before.get("video", origin["video"]) != origin["video"]:
            raise ValueError(
                f"{folder / file} holds the features of {before['video']}, not of "
                f"{origin['video']}; use another output folder, or delete this one"
            )
        return before == origin

    def add_done(
        self, file: str, origin: dict[str, Any], item: WindowPart, num_windows: int
    ) -> None:
        """Record a video whose array was written."""
        self._append(
            json.dumps(
                {
                    "file": file,
                    **origin,
                    "windows": num_windows,
                    "fps": item.fps,
                    "length_frames": item.length,
                    "every_frames": item.every,
                }
            )
        )

    def add_broken(self, file: str, reason: str) -> None:
        """Record a video that cannot be decoded."""
        self._append(json.dumps({"file": file, "error": reason}))

    def _append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
