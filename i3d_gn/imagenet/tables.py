"""The paper's ImageNet tables with the results of runs beside its own.

Runs that differ in nothing but the seed share a cell: their mean, and how many there are.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from i3d_gn.engine.figures import save_figure
from i3d_gn.engine.markdown import markdown_table
from i3d_gn.engine.run_dir import config_of_run
from i3d_gn.engine.run_log import read_log
from i3d_gn.imagenet.config import ImagenetConfig, default_num_groups, load_imagenet_config

BATCH_SIZES = (32, 16, 8, 4, 2)
_COLORS = {"bn": "tab:red", "gn": "tab:blue", "ln": "tab:green", "in": "tab:orange"}

# Validation error of ResNet-50 in [GN], in percent.
_TABLE_1 = {"bn": 23.6, "ln": 25.3, "in": 28.4, "gn": 24.1}
_TABLE_2 = {
    "bn": dict(zip(BATCH_SIZES, (23.6, 23.7, 24.8, 27.3, 34.7), strict=True)),
    "gn": dict(zip(BATCH_SIZES, (24.1, 24.2, 24.0, 24.2, 24.1), strict=True)),
}
_TABLE_3_GROUPS = {64: 24.6, 32: 24.1, 16: 24.6, 8: 24.4, 4: 24.6, 2: 24.7, 1: 25.3}
_TABLE_3_CHANNELS = {64: 24.4, 32: 24.5, 16: 24.2, 8: 24.3, 4: 24.8, 2: 25.6, 1: 28.4}


@dataclass(frozen=True)
class ImageRun:
    """A run; `errors` and `train_errors` by epoch, in percent."""

    name: str
    config: ImagenetConfig
    errors: list[float]
    train_errors: list[float]
    median_error: float | None

    @property
    def groups(self) -> int | None:
        """Number of groups (1 for layer norm); None if the channels per group are fixed instead."""
        model = self.config.model
        if model.norm == "ln":
            return 1
        if model.norm != "gn" or model.channels_per_group is not None:
            return None
        return model.num_groups or default_num_groups(model.name)

    @property
    def channels_per_group(self) -> int | None:
        """Channels per group if they are fixed (1 for instance norm), else None."""
        model = self.config.model
        return 1 if model.norm == "in" else model.channels_per_group


def read_image_run(folder: Path) -> ImageRun:
    """Read a run's config, log and result.

    Raises:
        ValueError: `folder` is not the `output_dir` of an ImageNet run.
    """
    log = read_log(folder / "log.jsonl")
    validations = [line for line in log if line["kind"] == "val"]
    config = config_of_run(folder, load_imagenet_config, "train-imagenet")
    errors = [line["error"] for line in validations]
    finished = len(errors) == config.train.epochs
    return ImageRun(
        name=folder.name,
        config=config,
        errors=errors,
        train_errors=_by_epoch(
            [line for line in log if line["kind"] == "train"], [v["step"] for v in validations]
        ),
        median_error=(
            statistics.median(errors[-config.train.epochs_of_median :]) if finished else None
        ),
    )


def imagenet_tables(runs: list[ImageRun]) -> str:
    """Tables 1 to 3 as Markdown; `not run` for cells without a finished run."""
    main_network = runs[0].config.model.name
    same = [run for run in runs if run.config.model.name == main_network]

    def ours(condition: Callable[[ImageRun], bool]) -> str:
        values = [r.median_error for r in same if r.median_error is not None and condition(r)]
        if not values:
            return "not run"
        return f"{statistics.mean(values):.1f}" + (f" ({len(values)})" if len(values) > 1 else "")

    def at(norm: str, batch: int) -> Callable[[ImageRun], bool]:
        return lambda r: (
            r.config.model.norm == norm
            and r.config.train.images_per_gpu == batch
            and (norm != "gn" or r.groups == default_groups)
        )

    default_groups = default_num_groups(main_network)
    lines = [
        f"Validation error (%) of {main_network}, median of the last epochs "
        f"({runs[0].config.train.epochs_of_median}); the paper's is of ResNet-50 on ImageNet (5).",
        "",
        "Table 1: 32 images per GPU",
        "",
        markdown_table(
            [
                ["", "BN", "LN", "IN", "GN"],
                ["paper", *(f"{_TABLE_1[n]:.1f}" for n in ("bn", "ln", "in", "gn"))],
                ["ours", *(ours(at(n, 32)) for n in ("bn", "ln", "in", "gn"))],
            ]
        ),
        "",
        "Table 2: images per GPU",
        "",
        markdown_table(
            [
                ["", *(str(size) for size in BATCH_SIZES)],
                *(
                    row
                    for norm in ("bn", "gn")
                    for row in (
                        [f"{norm.upper()}, paper", *(f"{v:.1f}" for v in _TABLE_2[norm].values())],
                        [f"{norm.upper()}, ours", *(ours(at(norm, size)) for size in BATCH_SIZES)],
                    )
                ),
            ]
        ),
        "",
        "Table 3: number of groups (1 is LN)",
        "",
        markdown_table(
            [
                ["", *(str(groups) for groups in _TABLE_3_GROUPS)],
                ["paper", *(f"{v:.1f}" for v in _TABLE_3_GROUPS.values())],
                ["ours", *(ours(_groups_at_32(groups)) for groups in _TABLE_3_GROUPS)],
            ]
        ),
        "",
        "Table 3: channels per group (1 is IN)",
        "",
        markdown_table(
            [
                ["", *(str(channels) for channels in _TABLE_3_CHANNELS)],
                ["paper", *(f"{v:.1f}" for v in _TABLE_3_CHANNELS.values())],
                ["ours", *(ours(_channels_at_32(channels)) for channels in _TABLE_3_CHANNELS)],
            ]
        ),
    ]
    return "\n".join(lines)


def plot(runs: list[ImageRun], path: Path) -> None:
    """Plot training and validation error over epochs, and the error over the batch size."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 4), layout="constrained")
        axes = figure.subplots(1, 3)
        points: dict[str, dict[int, list[float]]] = {}

        def by_batch_size(item: ImageRun) -> tuple[str, int]:
            return item.config.model.norm, -item.config.train.images_per_gpu

        for item in sorted(runs, key=by_batch_size):
            norm, batch = item.config.model.norm, item.config.train.images_per_gpu
            style = {
                "color": _COLORS.get(norm, "tab:gray"),
                "alpha": 1 - 0.75 * BATCH_SIZES.index(batch) / 5 if batch in BATCH_SIZES else 1,
                # one label for all seeds
                "label": f"{norm.upper()}, {batch}" if batch not in points.get(norm, {}) else None,
            }
            epochs = range(1, len(item.errors) + 1)
            axes[0].plot(epochs, item.train_errors, **style)
            axes[1].plot(epochs, item.errors, **style)
            errors = points.setdefault(norm, {}).setdefault(batch, [])
            if item.median_error is not None:
                errors.append(item.median_error)
        for norm, by_batch in points.items():
            sizes = sorted((size for size, errors in by_batch.items() if errors), reverse=True)
            means = [statistics.mean(by_batch[size]) for size in sizes]
            color = _COLORS.get(norm, "tab:gray")
            axes[2].plot(sizes, means, "o-", color=color, label=norm.upper())
        axes[0].set(title="training error (%)", xlabel="epoch")
        axes[1].set(title="validation error (%)", xlabel="epoch")
        axes[2].set(title="validation error (%)", xlabel="images per worker")
        axes[2].set_xscale("log", base=2)
        axes[2].set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
        axes[2].invert_xaxis()
        for axis in axes:
            axis.grid(alpha=0.3)
        for axis in axes[:2]:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(
            handles, labels, frameon=False, title="images per worker", loc="outside right upper"
        )
        axes[2].legend(frameon=False)
        save_figure(figure, path)


def _by_epoch(train_lines: list[dict[str, float]], epoch_ends: list[int]) -> list[float]:
    """Mean training error per epoch; log lines count by the steps they share with the epoch."""
    errors = []
    for start, end in zip([0, *epoch_ends], epoch_ends, strict=False):
        images = hits = 0.0
        first = 0
        for line in train_lines:
            last = int(line["step"])
            shared = max(0, min(last, end) - max(first, start)) / (last - first)
            images += shared * line["samples"]
            hits += shared * line["samples"] * line["top1"]
            first = last
        errors.append(100 - hits / images if images else float("nan"))
    return errors


def _groups_at_32(groups: int) -> Callable[[ImageRun], bool]:
    return lambda item: item.groups == groups and item.config.train.images_per_gpu == 32


def _channels_at_32(channels: int) -> Callable[[ImageRun], bool]:
    return lambda item: (
        item.channels_per_group == channels and item.config.train.images_per_gpu == 32
    )
