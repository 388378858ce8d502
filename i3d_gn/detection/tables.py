"""The paper's Tables 4 to 7 with the results of runs beside its own.

Finished runs with the norms, network, steps and start of a row are averaged, and counted if there
are several.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from i3d_gn.detection.config import DetectionConfig, load_detection_config
from i3d_gn.engine.markdown import markdown_table
from i3d_gn.engine.run_dir import config_of_run

_BN = ("frozen_bn", "none", "none", "none")  # BN*, which is frozen
_GN = ("gn", "gn", "gn", "gn")
_2X, _LONG, _C4 = 180_000, 270_000, 360_000


@dataclass(frozen=True)
class Row:
    """A row of a table of [GN]: its AP, and the config that it stands for.

    Attributes:
        label: As in the paper.
        paper: AP of boxes and of masks, in percent.
        norms: Of backbone, pyramid, box head and mask head.
        steps: Of the schedule.
        backbone: `model.backbone`.
        name: `model.name`.
        box_head: `model.box_head`, of pyramids only.
        from_scratch: Without ImageNet weights.
    """

    label: str
    paper: tuple[float, float]
    norms: tuple[str, str, str, str]
    steps: int = _2X
    backbone: str = "resnet50"
    name: str = "mask_rcnn_fpn"
    box_head: str = "4conv1fc"
    from_scratch: bool = False

    def matches(self, config: DetectionConfig) -> bool:
        """Whether a run is of this row."""
        model = config.model
        norms = (model.norm, model.fpn_norm, model.box_head_norm, model.mask_head_norm)
        is_fpn = model.name == "mask_rcnn_fpn"
        return (
            self.norms == norms
            and (self.name, self.backbone) == (model.name, model.backbone)
            and (self.box_head == model.box_head or not is_fpn)
            and self.steps == config.train.steps
            and self.from_scratch == (model.weights is None)
        )


_GN_HEAD, _GN_TABLE_5 = ("frozen_bn", "none", "gn", "none"), ("gn", "gn", "gn", "none")
_C4_GN = ("gn", "none", "none", "none")
TABLES = {
    "Table 4: ResNet-50 C4": (
        Row("BN*", (37.7, 32.8), _BN, _C4, name="mask_rcnn_c4"),
        Row("GN", (38.8, 33.6), _C4_GN, _C4, name="mask_rcnn_c4"),
    ),
    "Table 5: ResNet-50 FPN, box head 4conv1fc": (
        Row("BN*, no norm in the box head", (38.6, 34.2), _BN),
        Row("BN*, GN in the box head", (39.5, 34.4), _GN_HEAD),
        Row("GN, GN in the box head", (40.0, 34.8), _GN_TABLE_5),
    ),
    "Table 6: FPN": (
        Row("R50 BN*", (38.6, 34.5), _BN, box_head="2fc"),
        Row("R50 GN", (40.3, 35.7), _GN),
        Row("R50 GN, long", (40.8, 36.1), _GN, _LONG),
        Row("R101 BN*", (40.9, 36.4), _BN, backbone="resnet101", box_head="2fc"),
        Row("R101 GN", (41.8, 36.8), _GN, backbone="resnet101"),
        Row("R101 GN, long", (42.3, 37.2), _GN, _LONG, backbone="resnet101"),
    ),
    "Table 7: FPN from scratch": (
        Row("R50 GN", (39.5, 35.2), _GN, _LONG, from_scratch=True),
        Row("R101 GN", (41.0, 36.4), _GN, _LONG, backbone="resnet101", from_scratch=True),
    ),
}


@dataclass(frozen=True)
class DetectionRun:
    """A run; `results` is None if it is not finished."""

    name: str
    config: DetectionConfig
    results: dict[str, float] | None


def read_detection_run(folder: Path) -> DetectionRun:
    """Read a run's config and result.

    Raises:
        ValueError: `folder` is not the `output_dir` of a COCO run.
    """
    config = config_of_run(folder, load_detection_config, "train-coco")
    path = folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return DetectionRun(folder.name, config, results)


def coco_tables(runs: list[DetectionRun]) -> str:
    """All runs, then Tables 4 to 7 as Markdown; `not run` for rows without a finished run."""
    lines = ["AP (%) of boxes / masks.", "", "Runs", "", markdown_table(_all_runs(runs))]
    for title, rows in TABLES.items():
        cells = [["", "paper", "ours"]]
        for row in rows:
            of_row = [r for r in runs if row.matches(r.config)]
            cells.append([row.label, f"{row.paper[0]:.1f} / {row.paper[1]:.1f}", _mean(of_row)])
        lines += ["", title, "", markdown_table(cells)]
    return "\n".join(lines)


def _all_runs(runs: list[DetectionRun]) -> list[list[str]]:
    rows = [["run", "norm", "images/GPU", "box AP", "AP50", "mask AP", "AP50"]]
    for run in runs:
        values = run.results
        numbers = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")
        rows.append(
            [
                run.name,
                run.config.model.norm,
                str(run.config.train.images_per_gpu),
                *("not run" if values is None else f"{values[n]:.1f}" for n in numbers),
            ]
        )
    return rows


def _mean(runs: list[DetectionRun]) -> str:
    finished = [run.results for run in runs if run.results is not None]
    if not finished:
        return "not run"
    means = (statistics.mean(r[f"{kind}_ap"] for r in finished) for kind in ("box", "mask"))
    return " / ".join(f"{v:.1f}" for v in means) + (
        f" ({len(finished)})" if len(finished) > 1 else ""
    )
