"""Test a trained network with 10 clips a video.

    python -m i3d_gn.video.evaluate CONFIG --checkpoint PATH [key=value ...]

Writes `results.json` and `scores.parquet` under `output_dir/test_<checkpoint>_<settings>_<hash>/`,
a folder for whatever else can change a result: config, weights, videos. Under torchrun the videos
are dealt out to the processes. A test that was stopped goes on where it was.
"""

import argparse
import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

from i3d_gn.engine.checkpoint import (
    CheckpointError,
    file_sha256,
    latest_checkpoint,
    load_checkpoint,
    load_model_state,
)
from i3d_gn.engine.command import run_command
from i3d_gn.engine.distributed import World, join_world
from i3d_gn.engine.run_log import write_text_atomically
from i3d_gn.engine.typed_config import config_hash, differences, to_dict
from i3d_gn.models import I3D
from i3d_gn.video import build
from i3d_gn.video.config import Config, load_config
from i3d_gn.video.multi_clip import TestOutcome, evaluate_videos
from i3d_gn.video_io.index import VideoIndex

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 on success."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn evaluate", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("config", type=Path, help="the YAML file the network was trained with")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="checkpoint to test; default: the newest under output_dir",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change config values")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    with join_world() as world:
        evaluate(config, args.checkpoint, world)
    return 0


def evaluate(config: Config, checkpoint: Path | None, world: World) -> dict[str, Any] | None:
    """Test a checkpoint as `config.test` says; the results on rank 0, None elsewhere.

    Raises:
        CheckpointError: the checkpoint is missing, unreadable, or of another model.
        ValueError: the index does not fit, or no video could be decoded.
    """
    if checkpoint is None:
        folder = Path(config.output_dir) / "checkpoints"
        checkpoint = latest_checkpoint(folder)
        if checkpoint is None:
            raise CheckpointError(f"no checkpoint under {folder}; train first or give --checkpoint")
    saved = load_checkpoint(checkpoint)
    model = build.build_model(config)
    changed = [
        line
        for line in differences(saved["config"], config, section="model.")
        if not line.startswith(("model.weights", "model.dropout", "model.checkpoint_stages"))
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint}: was trained as another model than this config's: {'; '.join(changed)}"
        )
    load_model_state(model, saved["model"], path=checkpoint)
    model.to(world.device)
    index_path = config.data.val_index
    index = build.load_index(index_path, config)
    trained_on = saved.get("class_names", index.class_names)
    for label, (there, here) in enumerate(zip(trained_on, index.class_names, strict=True)):
        if there != here:
            raise CheckpointError(
                f"{checkpoint}: was trained on other classes than those of {index_path}: class "
                f"{label} is {there!r} there and {here!r} here; make the index again with "
                "--label-map and the index it was trained on"
            )
    identity = [config_hash(config), file_sha256(checkpoint), file_sha256(index_path)]
    tag = hashlib.sha256("".join(identity).encode()).hexdigest()[:8]
    settings = config.test
    folder = Path(config.output_dir) / (
        f"test_{checkpoint.stem}_{settings.num_clips}x{settings.spatial}_{settings.spacing}_{tag}"
    )
    outcome = evaluate_model(
        model,
        index,
        config,
        world,
        folder=folder,
        tag=tag,
        mean=tuple(saved["input"]["mean"]),
        std=tuple(saved["input"]["std"]),
    )
    if outcome is None:
        return None
    results = {
        **_summary(outcome, config),
        "step": saved["step"],
        "config_sha256": identity[0],
        "checkpoint_sha256": identity[1],
        "index_sha256": identity[2],
        "checkpoint": str(checkpoint),
        "config": to_dict(config),
        "timing": outcome.timing,
    }
    write_text_atomically(folder / "results.json", json.dumps(results, indent=1) + "\n")
    print(
        f"{results['num_videos']} videos, {settings.num_clips} clips each: "
        f"top-1 {results['top1']:.1f} %, top-5 {results['top5']:.1f} %, "
        f"mean class accuracy {results['mean_class_accuracy']:.1f} %"
    )
    timing = outcome.timing
    if timing["videos"]:
        logger.info(
            "%.2f videos/s, waiting for data %.0f %%; %s",
            timing["videos"] / timing["seconds"], 100 * timing["data_wait_share"], folder,
        )  # fmt: skip
    if outcome.skipped:
        print(
            f"{len(outcome.skipped)} videos could not be decoded and do not count; "
            f"they are listed in {folder / 'results.json'}",
            file=sys.stderr,
        )
    return results


def evaluate_model(
    model: I3D,
    index: VideoIndex,
    config: Config,
    world: World,
    *,
    folder: Path,
    tag: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> TestOutcome | None:
    """Multi-clip testing of the index's videos with the network as it is."""
    clip = config.clip
    _, *window = model.feature_size(clip.num_frames, clip.crop_size, clip.crop_size)
    return evaluate_videos(
        model,
        build.videos_to_test(index, config),
        to_device=build.device_clips(world, config, mean=mean, std=std),
        world=world,
        folder=folder,
        tag=tag,
        window=(window[0], window[1]),
        average=config.test.average,
        clips_per_forward=config.test.clips_per_forward,
        num_workers=build.num_workers(world, config),
    )


def _summary(outcome: TestOutcome, config: Config) -> dict[str, Any]:
    metrics, settings = outcome.metrics, config.test
    return {
        "top1": metrics.top1,
        "top5": metrics.top5,
        "mean_class_accuracy": metrics.mean_class_accuracy,
        "num_videos": metrics.num_videos,
        "num_skipped": len(outcome.skipped),
        "skipped": outcome.skipped,
        "num_clips": settings.num_clips,
        "num_frames": config.clip.num_frames,
        "stride": config.clip.stride,
        "spacing": settings.spacing,
        "align_starts": settings.align_starts,
        "spatial": settings.spatial,
        "short_side": settings.short_side,
        "average": settings.average,
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
