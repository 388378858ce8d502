"""Test a trained network with several clips per video.

Writes `results.json` and `scores.parquet` under `output_dir/test_<checkpoint>_<settings>_<hash>/`;
the hash is over everything else that can change a result: config, weights and videos. Under
torchrun the videos are split across the ranks. A test that was stopped resumes where it was.
"""

import hashlib
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from i3d_gn.data.to_device import ToDevice
from i3d_gn.engine.checkpoint import CheckpointError, given_or_latest
from i3d_gn.engine.cores import limit_compute_threads, num_workers
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.typed_config import config_hash, to_dict
from i3d_gn.files import file_sha256, print_line, write_json
from i3d_gn.models import VideoNetwork
from i3d_gn.video import build
from i3d_gn.video.config import Config
from i3d_gn.video.multi_clip import VideoScorer, score_videos
from i3d_gn.video.scores import TestOutcome
from i3d_gn.video.trained import load_trained
from i3d_gn.video_io.index import VideoIndex

logger = logging.getLogger(__name__)


def evaluate(config: Config, checkpoint: Path | None, process: Process) -> dict[str, Any] | None:
    """Test a checkpoint or weights (None: the newest checkpoint) as `config.test` says.

    Videos without a label are scored, but do not count.

    Returns:
        The results on rank 0, None elsewhere.

    Raises:
        CheckpointError: The checkpoint is missing, unreadable, or of another model.
        ValueError: The index does not match, or no video could be decoded.
    """
    limit_compute_threads(process, num_workers(config, process))
    checkpoint = given_or_latest(checkpoint, Path(config.output_dir))
    index = build.load_index(config.data.val_index, config, labeled=False)
    config = replace(config, model=config.model.completed(len(index.class_names)))
    network = load_trained(checkpoint, config, process.device)
    if network.class_names is not None:
        _check_same_classes(network.class_names, index, checkpoint)

    hashes = {
        "config_sha256": config_hash(config),
        "checkpoint_sha256": file_sha256(checkpoint),
        "index_sha256": file_sha256(config.data.val_index),
    }
    tag = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()[:8]
    test = config.test
    name = f"test_{checkpoint.stem}_{test.num_clips}x{test.spatial}_{test.spacing}_{tag}"
    folder = Path(config.output_dir) / name
    to_device = build.to_device(config, process, mean=network.mean, std=network.std)
    outcome = evaluate_model(
        network.model, index, config, to_device, process, folder=folder, tag=tag
    )
    if outcome is None:
        return None
    trained = {key: (network.config or {}).get(key) for key in ("seed", "model", "train")}
    results = {
        **outcome.summary(),
        "skipped": outcome.skipped,
        **to_dict(config.test),
        "num_frames": config.clip.num_frames,
        "stride": config.clip.stride,
        "step": network.step,
        **hashes,
        "checkpoint": str(checkpoint),
        "config": {**to_dict(config), **trained},  # of the test, and of what trained the network
        "precision": config.train.precision,
        "timing": outcome.timing,
    }
    write_json(folder / "results.json", results)
    _print_results(outcome, config, folder)
    return results


def evaluate_model(
    model: VideoNetwork,
    index: VideoIndex,
    config: Config,
    to_device: ToDevice,
    process: Process,
    *,
    folder: Path,
    tag: str,
) -> TestOutcome | None:
    """Test a network in memory on the videos of `index`; see `score_videos`."""
    return score_videos(
        video_scorer(model, config, to_device),
        build.test_videos(index, config),
        folder=folder,
        tag=tag,
        process=process,
        num_workers=num_workers(config, process),
        timeout_seconds=config.data.timeout_seconds,
    )


def video_scorer(model: VideoNetwork, config: Config, to_device: ToDevice) -> VideoScorer:
    """The scorer of test videos that `config.test` describes."""
    _, *window = build.training_map(model, config)
    return VideoScorer(
        model,
        to_device,
        window=(window[0], window[1]) if model.has_window else None,
        average=config.test.average,
        clips_per_forward=config.test.clips_per_forward,
    )


def _check_same_classes(trained: tuple[str, ...], index: VideoIndex, checkpoint: Path) -> None:
    for label, (there, here) in enumerate(zip(trained, index.class_names, strict=True)):
        if there != here:
            raise CheckpointError(
                f"{checkpoint} was trained on other classes than those of {index.index_path}: "
                f"class {label} is {there!r} there and {here!r} here; make the index again with "
                "--label-map and the index it was trained on"
            )


def _print_results(outcome: TestOutcome, config: Config, folder: Path) -> None:
    metrics, timing = outcome.metrics, outcome.timing
    if metrics is not None:
        print(
            f"{metrics.num_videos} videos, {config.test.num_clips} clips each: "
            f"top-1 {metrics.top1:.1f} %, top-5 {metrics.top5:.1f} %, "
            f"mean class accuracy {metrics.mean_class_accuracy:.1f} %"
        )
    if outcome.num_unlabeled:
        print_line(f"{outcome.num_unlabeled} videos without a label: scores only, in {folder}")
    if timing["videos"]:
        logger.info(
            "%.2f videos/s, waiting for data %.0f %%; %s",
            timing["videos"] / timing["seconds"], 100 * timing["data_wait_share"], folder,
        )  # fmt: skip
    if outcome.skipped:
        print_line(
            f'{len(outcome.skipped)} videos failed to decode and do not count; see "skipped" in '
            f"{folder / 'results.json'}",
            file=sys.stderr,
        )
