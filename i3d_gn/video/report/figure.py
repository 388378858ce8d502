"""A figure of runs: loss, accuracy, and for few classes the confusion matrix of the first run."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i3d_gn.engine.figures import save_figure
from i3d_gn.video.report.classes import confusion_counts
from i3d_gn.video.report.runs import Run

MAX_CLASSES_IN_FIGURE = 30


def plot(runs: list[Run], path: Path) -> None:
    """Write the figure, atomically."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        first = runs[0]
        with_confusion = (
            first.test is not None and len(first.test.class_names) <= MAX_CLASSES_IN_FIGURE
        )
        widths = [1.6, 1] if with_confusion else [1]
        figure = Figure(figsize=(14 if with_confusion else 9, 4), layout="constrained")
        parts = figure.subfigures(1, len(widths), squeeze=False, width_ratios=widths)
        axes = parts[0, 0].subplots(1, 2)
        for run in runs:
            axes[0].plot(*run.curve("train", "loss"), label=run.name)
            (line,) = axes[1].plot(*run.curve("val", "top1"), marker="o", ms=3, label=run.name)
            results = None if run.test is None else run.test.results
            if results is not None and "top1" in results:
                axes[1].plot(
                    results["step"], results["top1"], marker="*", ms=12,
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
            assert first.test is not None
            counts = confusion_counts(first.test)
            shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            _draw_confusion(parts[0, 1].subplots(), shares, first.test.class_names, first.name)
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
