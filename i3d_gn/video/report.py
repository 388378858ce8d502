"""Runs side by side: a table for the terminal, and a figure.

The figure shows the training loss, the validation accuracy (one clip per video, as in [GN] Fig. 7)
and, for up to 30 classes, the confusion matrix of the first run's multi-clip test.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i3d_gn.engine.figures import save_figure
from i3d_gn.engine.markdown import markdown_table
from i3d_gn.engine.run_log import read_log
from i3d_gn.engine.typed_config import differences, to_dict
from i3d_gn.video.config import ClipConfig, Config, TestConfig, load_config

MAX_CLASSES_IN_FIGURE = 30

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The contents of an `output_dir`; `results` and `confusion` (K, K) if it was tested."""

    name: str
    config: Config
    log: list[dict[str, Any]]
    results: dict[str, Any] | None
    confusion: npt.NDArray[np.float64] | None
    class_names: list[str]

    def curve(self, kind: str, value: str) -> tuple[list[int], list[float]]:
        """Steps and values from the log lines of one kind."""
        lines = [line for line in self.log if line["kind"] == kind]
        return [line["step"] for line in lines], [line[value] for line in lines]


def read_run(folder: Path) -> Run:
    """Read a run's config, log and newest multi-clip test.

    Raises:
        ValueError: `folder` is not the `output_dir` of a run.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} has no config.yaml; pass the output_dir of a training run")
    config = load_config(folder / "config.yaml")
    results, confusion, class_names = None, None, []
    found = find_test(folder, config)
    if found is not None:
        path, results = found
        scores = pq.read_table(path.with_name("scores.parquet"))
        class_names = json.loads((scores.schema.metadata or {})[b"class_names"])
        labels = scores["label"].to_numpy()
        matrix = np.array(scores["scores"].to_pylist())[labels >= 0]
        confusion = _confusion(matrix, labels[labels >= 0], len(class_names))
    return Run(
        name=folder.name,
        config=config,
        log=read_log(folder / "log.jsonl"),
        results=results,
        confusion=confusion,
        class_names=class_names,
    )


def find_test(folder: Path, config: Config) -> tuple[Path, dict[str, Any]] | None:
    """The test of a run's newest tested checkpoint, with the settings and videos of its config.

    Tests with other settings, clips or videos are not comparable with other runs; they are ignored,
    and named in a warning.

    Returns:
        Path and contents of its `results.json`, or None.
    """
    found, ignored = [], []
    for path in sorted(folder.glob("test_*/results.json")):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            tested = results["config"]
            differing = (
                differences(tested["test"], to_dict(config.test), TestConfig)
                + differences(tested["clip"], to_dict(config.clip), ClipConfig)
                + [key for key in ("val_index",) if tested["data"][key] != config.data.val_index]
            )
            step = -1 if results["step"] is None else int(results["step"])
        except (OSError, ValueError, KeyError, TypeError):
            differing, step, results = ["damaged"], -1, {}
        if differing:
            ignored.append(f"{path.parent.name} ({'; '.join(differing)})")
        else:
            found.append((step, path, results))
    if ignored:
        logger.warning("%s: ignored tests of another kind: %s", folder, ", ".join(ignored))
    if not found:
        return None
    _, path, results = max(found, key=lambda test: test[:2])
    return path, results


def table(runs: list[Run]) -> str:
    """A Markdown table with one row per run; `not run` for missing results."""
    rows = [
        ["run", "norm", "clip", "clips/GPU", "steps", "train loss", "1-clip top-1",
         "multi-clip top-1", "top-5", "videos", "skipped"]
    ]  # fmt: skip
    for run in runs:
        steps, losses = run.curve("train", "loss")
        _, accuracies = run.curve("val", "top1")
        results = run.results
        rows.append(
            [
                run.name,
                run.config.model.norm,
                f"{run.config.clip.num_frames}x{run.config.clip.stride}",
                str(run.config.train.clips_per_gpu),
                str(steps[-1]) if steps else "0",
                f"{losses[-1]:.3f}" if losses else "not run",
                f"{accuracies[-1]:.1f}" if accuracies else "not run",
                _multi_clip(results, steps[-1] if steps else 0),
                f"{results['top5']:.1f}" if results and "top5" in results else "not run",
                str(results.get("num_videos", "-")) if results else "-",
                str(results["num_skipped"]) if results else "-",
            ]
        )
    return markdown_table(rows)


def _multi_clip(results: dict[str, Any] | None, last_step: int) -> str:
    if results is None or "top1" not in results:
        return "not run"
    at = "" if results["step"] == last_step else f", step {results['step']}"
    return f"{results['top1']:.1f} ({results['num_clips']} clips{at})"


def plot(runs: list[Run], path: Path) -> None:
    """Write the figure, atomically."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        first = runs[0]
        with_confusion = (
            first.confusion is not None and len(first.class_names) <= MAX_CLASSES_IN_FIGURE
        )
        widths = [1.6, 1] if with_confusion else [1]
        figure = Figure(figsize=(14 if with_confusion else 9, 4), layout="constrained")
        parts = figure.subfigures(1, len(widths), squeeze=False, width_ratios=widths)
        axes = parts[0, 0].subplots(1, 2)
        for run in runs:
            axes[0].plot(*run.curve("train", "loss"), label=run.name)
            (line,) = axes[1].plot(*run.curve("val", "top1"), marker="o", ms=3, label=run.name)
            if run.results is not None and "top1" in run.results:
                axes[1].plot(
                    run.results["step"], run.results["top1"], marker="*", ms=12,
                    color=line.get_color(), clip_on=False, linestyle="none",
                )  # fmt: skip
        chance = 100 / first.config.model.num_classes
        axes[1].axhline(chance, color="0.6", lw=1, ls=":", label="chance")
        axes[0].set(title="training", xlabel="step", ylabel="cross-entropy")
        axes[1].set(
            title="validation: one clip per video, multi-clip test (star)",
            xlabel="step",
            ylabel="top-1 accuracy (%)",
            ylim=(0, 102),
        )
        for axis in axes[:2]:
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
        axes[1].legend(frameon=False)
        if with_confusion:
            assert first.confusion is not None
            _draw_confusion(parts[0, 1].subplots(), first.confusion, first.class_names, first.name)
        save_figure(figure, path)


def _draw_confusion(
    axis: Axes, confusion: npt.NDArray[np.float64], class_names: list[str], run_name: str
) -> None:
    axis.imshow(confusion, cmap="Blues", vmin=0, vmax=100)
    ticks = range(len(class_names))
    axis.set_xticks(ticks, class_names, rotation=45, ha="right")
    axis.set_yticks(ticks, class_names)
    axis.set(
        title=f"{run_name}: multi-clip test (% of true class)", xlabel="predicted", ylabel="true"
    )
    for row in ticks:
        for column in ticks:
            if confusion[row, column] >= 0.5:
                axis.text(
                    column, row, f"{confusion[row, column]:.0f}", ha="center", va="center",
                    color="white" if confusion[row, column] > 60 else "black",
                )  # fmt: skip


def _confusion(
    scores: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], num_classes: int
) -> npt.NDArray[np.float64]:
    """(K, K): percentage of each true class (row) by predicted class (column)."""
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (labels, scores.argmax(axis=1)), 1)
    return 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
