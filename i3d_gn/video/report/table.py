"""One row per run, for the terminal and for the page."""

from __future__ import annotations

from typing import Any

from i3d_gn.video.report.runs import Run

HEADER = [
    "run", "norm", "clip", "clips/GPU", "steps", "train loss", "1-clip top-1",
    "multi-clip top-1", "top-5", "videos", "skipped",
]  # fmt: skip


def rows(runs: list[Run]) -> list[list[str]]:
    """The cells below `HEADER`; `not run` for missing results."""
    return [_row(run) for run in runs]


def _row(run: Run) -> list[str]:
    steps, losses = run.curve("train", "loss")
    _, accuracies = run.curve("val", "top1")
    results = None if run.test is None else run.test.results
    return [
        run.name,
        run.config.model.norm,
        clip_name(run),
        str(run.config.train.clips_per_gpu),
        str(steps[-1]) if steps else "0",
        f"{losses[-1]:.3f}" if losses else "not run",
        f"{accuracies[-1]:.1f}" if accuracies else "not run",
        _multi_clip(results, steps[-1] if steps else 0),
        f"{results['top5']:.1f}" if results and "top5" in results else "not run",
        str(results.get("num_videos", "-")) if results else "-",
        str(results["num_skipped"]) if results else "-",
    ]


def clip_name(run: Run) -> str:
    """Frames and stride of a clip, for instance 32x2."""
    return f"{run.config.clip.num_frames}x{run.config.clip.stride}"


def _multi_clip(results: dict[str, Any] | None, last_step: int) -> str:
    if results is None or "top1" not in results:
        return "not run"
    at = "" if results["step"] == last_step else f", step {results['step']}"
    return f"{results['top1']:.1f} ({results['num_clips']} clips{at})"
