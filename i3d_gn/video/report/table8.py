"""[GN] Table 8, and which of its cells a run reproduces."""

from __future__ import annotations

from typing import NamedTuple

from i3d_gn.video.report.runs import Run

COLUMNS = ("32x2 (8)", "32x2 (4)", "64x1 (4)")  # frames x stride (clips per GPU)
NORMS = ("bn", "gn")

# Kinetics-400 validation, 10 clips: top-1 and top-5 accuracy, in percent.
PAPER = {
    ("bn", "32x2 (8)"): (73.3, 90.7),
    ("bn", "32x2 (4)"): (72.1, 90.0),
    ("bn", "64x1 (4)"): (73.3, 90.8),
    ("gn", "32x2 (8)"): (73.0, 90.6),
    ("gn", "32x2 (4)"): (72.8, 90.6),
    ("gn", "64x1 (4)"): (74.5, 91.7),
}


class Cell(NamedTuple):
    """Accuracy of a run that belongs into a cell of the table."""

    run: str
    top1: float
    top5: float
    num_videos: int


def cells(runs: list[Run]) -> dict[tuple[str, str], list[Cell]]:
    """(norm, column) -> the runs that reproduce it: trained and tested as in the paper."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for run in runs:
        config, results = run.config, None if run.test is None else run.test.results
        clip, model = config.clip, config.model
        column = f"{clip.num_frames}x{clip.stride} ({config.train.clips_per_gpu})"
        key = (model.norm, column)
        same = (
            key in PAPER
            and (model.name, model.num_classes, model.inflate) == ("i3d_resnet50", 400, True)
            and (model.stem, model.num_groups, model.channels_per_group) == ("strided", None, None)
            and (config.test.num_clips, config.test.spatial) == (10, "full")
        )
        if same and results is not None and "top1" in results:
            cell = Cell(run.name, results["top1"], results["top5"], results["num_videos"])
            found.setdefault(key, []).append(cell)
    return found
