"""Which curves of runs are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from i3d_gn.engine.run_log import PERCENTILES
from i3d_gn.video.report.charts import Chart, Line, line_chart
from i3d_gn.video.report.runs import Run

_MAX_ACTIVATION_CHARTS = 12
_KINDS = {(True, False): " (training)", (False, True): " (test)", (False, False): ""}


def training_charts(runs: list[Run]) -> list[Chart]:
    """Error in the manner of [GN] Fig. 7, then loss, learning rate and norm of the gradient."""
    chance = chance_error(runs)
    errors = [
        Line(steps, [100 - top1 for top1 in values], number, dashed=kind == "train",
             markers=kind == "val")
        for number, run in enumerate(runs)
        for kind in ("train", "val")
        for steps, values in [run.curve(kind, "top1")]
    ]  # fmt: skip
    stars = [
        Line([run.test.results["step"]], [100 - run.test.results["top1"]], number, star=True)
        for number, run in enumerate(runs)
        if run.test and "top1" in run.test.results and run.test.results["step"] is not None
    ]
    found = []
    if any(len(line.x) for line in errors):
        found.append(
            line_chart(
                "Top-1 error (%)",
                errors + stars,
                description=_description(
                    "Top-1 error during training and validation", "%", runs, errors
                ),
                reference=chance,
                has_wide=True,
            )
        )
    return found + _charts(
        runs,
        ("Training loss", "train", "loss", "", (0, None)),
        ("Validation loss", "val", "loss", "", (0, None)),
        ("Learning rate", "train", "lr", "", (0, None)),
        ("Norm of the gradient", "train", "grad_norm", "", (0, None)),
    )


def chance_error(runs: list[Run]) -> float | None:
    """Error (%) of a network that guesses; None if the runs differ, or it is nearly 100 %."""
    errors = {100 * (1 - 1 / run.config.model.num_classes) for run in runs}
    return min(errors) if len(errors) == 1 and max(errors) < 97 else None


def speed_charts(runs: list[Run]) -> list[Chart]:
    """Throughput, waiting for data, and memory."""
    return _charts(
        runs,
        ("Throughput (clips/s)", "train", "timing.samples_per_second", "clips/s", (0, None)),
        ("Time spent waiting for data (%)", "train", "timing.data_wait_share", "%", (0, 100)),
        ("Memory (GiB)", "train", "timing.memory_gib", "GiB", (0, None)),
    )


def activation_charts(runs: list[Run]) -> list[Chart]:
    """Percentiles of the outputs of layers, in the manner of [GN] Fig. 6."""
    found = []
    for number, run in enumerate(runs):
        lines = [line for line in run.log if isinstance(line.get("activations"), dict)]
        layers = {name: None for line in lines for name in line["activations"]}
        for layer in layers:
            points = [
                (line["step"], line["activations"][layer])
                for line in lines
                if len(line["activations"].get(layer, ())) == len(PERCENTILES)
            ]
            if not points:
                continue
            curves = [
                Line([step for step, _ in points], [values[i] for _, values in points], number)
                for i in range(len(PERCENTILES))
            ]
            last = ", ".join(
                f"{percent} %: {value:.3g}"
                for percent, value in zip(PERCENTILES, points[-1][1], strict=True)
            )
            found.append(
                line_chart(
                    f"{run.name}: {layer}",
                    curves,
                    description=f"Percentiles of the output of {layer} of {run.name}; at the end "
                    f"{last}.",
                    y_range=(None, None),
                )
            )
    return found[:_MAX_ACTIVATION_CHARTS]


def _charts(
    runs: list[Run], *wanted: tuple[str, str, str, str, tuple[float | None, float | None]]
) -> list[Chart]:
    """One chart for each (title, kind, value, unit, range) that a run has logged."""
    found = []
    for title, kind, value, unit, y_range in wanted:
        factor = 100 if unit == "%" else 1
        lines = [
            Line(steps, [factor * number for number in values], run_number, markers=kind == "val")
            for run_number, run in enumerate(runs)
            for steps, values in [run.curve(kind, value)]
        ]
        if any(len(line.x) for line in lines):
            description = _description(title, unit, runs, lines)
            found.append(line_chart(title, lines, description=description, y_range=y_range))
    return found


def _description(what: str, unit: str, runs: list[Run], lines: Sequence[Line]) -> str:
    """What a curve shows, for those who cannot see it: its last values."""
    ends = [
        f"{runs[line.run].name}{_KINDS[line.dashed, line.star]} {line.y[-1]:.3g} {unit}".strip()
        for line in lines
        if len(line.x)
    ]
    return f"{what} over steps. Last values: {', '.join(ends)}."
