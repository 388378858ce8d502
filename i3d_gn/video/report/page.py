"""The page: what it shows, section by section, and how it is written."""

from __future__ import annotations

import base64
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from i3d_gn import __version__
from i3d_gn.engine.typed_config import config_hash, to_flat_dict, to_yaml
from i3d_gn.files import write_text
from i3d_gn.video.report import classes, examples, table, table8
from i3d_gn.video.report.charts import NUM_COLORS
from i3d_gn.video.report.curves import (
    activation_charts,
    chance_error,
    speed_charts,
    training_charts,
)
from i3d_gn.video.report.examples import Example, TestFrames
from i3d_gn.video.report.runs import Run, Test
from i3d_gn.video_io.strips import Strip, encode_webp

# Bounds of what is shown, so that a page of any runs stays small.
_MAX_EXAMPLES = 36  # strips of test videos on the page
_MAX_CLASSES = 24  # in the table of classes, before it is folded
_MAX_PAIRS = 12
_MAX_MATRIX = 8
_MAX_TRAINING_CLIPS = 8
_MAX_CARDS = 6


@dataclass(frozen=True)
class Picture:
    """A picture inside the page."""

    source: str
    width: int
    height: int


def write_page(runs: list[Run], path: Path) -> None:
    """Write one HTML file that needs nothing else, atomically.

    Raises:
        OSError: It cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("i3d_gn.video", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    environment.filters["breakable"] = lambda name: escape(name).replace("_", Markup("_<wbr>"))
    template = environment.get_template("report.html.jinja")
    write_text(path, template.render(**page_context(runs)))


def page_context(runs: list[Run]) -> dict[str, Any]:
    """Everything that the template shows."""
    frames = TestFrames()
    tested = [(number, run, run.test) for number, run in enumerate(runs) if run.test is not None]
    return {
        "runs": [_run(number, run) for number, run in enumerate(runs)],
        "show_cards": len(runs) <= _MAX_CARDS,
        "subtitle": _subtitle(runs),
        "table_header": table.HEADER,
        "table_rows": table.rows(runs),
        "training_charts": training_charts(runs),
        "chance": chance_error(runs) is not None,
        "speed_charts": speed_charts(runs),
        "activation_charts": activation_charts(runs),
        "table8": _table8(runs),
        "clips": _training_clips(runs),
        "classes": _classes(tested),
        "confusions": [_confusions(number, run, test) for number, run, test in tested],
        "examples": _examples(tested, frames),
        "differences": _differences(runs),
        "version": __version__,
        "date": datetime.date.today().isoformat(),
        "svg": Markup,
    }


def _run(number: int, run: Run) -> dict[str, Any]:
    """What the header, the cards and the last section say of a run."""
    test = run.test
    results = {} if test is None else test.results
    hashes = {
        name: results[f"{name}_sha256"]
        for name in ("checkpoint", "index")
        if f"{name}_sha256" in results
    }
    _, accuracies = run.curve("val", "top1")
    return {
        "name": run.name,
        "color": number % NUM_COLORS,
        "description": describe(run),
        "top1": results.get("top1"),
        "top5": results.get("top5"),
        "mean_class_accuracy": results.get("mean_class_accuracy"),
        "num_clips": results.get("num_clips"),
        "num_videos": results.get("num_videos"),
        "step": results.get("step"),
        "num_steps": run.num_steps,
        "last_val": accuracies[-1] if accuracies else None,
        "skipped": results.get("skipped", {}),
        "config": to_yaml(run.config),
        "hashes": {"config": config_hash(run.config), **hashes},
        "environment": {k: v for k, v in run.environment.items() if v is not None},
    }


def describe(run: Run) -> str:
    """Network, norm and clips of a run in one line."""
    config, clip = run.config, run.config.clip
    model = config.model.name.replace("i3d_", "I3D ").replace("resnet", "ResNet-")
    frames = f"{clip.num_frames}×{clip.stride}" if clip.stride else "one repeated frame"
    return f"{model}, {config.model.norm.upper()}, {frames}, {config.train.clips_per_gpu} clips/GPU"


def _subtitle(runs: list[Run]) -> str:
    num_classes = sorted({run.config.model.num_classes for run in runs})
    parts = [f"{' and '.join(map(str, num_classes))} classes"]
    videos = sorted({run.test.results.get("num_videos", 0) for run in runs if run.test})
    if videos:
        parts.append(f"{' or '.join(f'{count:,}' for count in videos)} test videos")
    return " · ".join(parts)


def _table8(runs: list[Run]) -> dict[str, Any]:
    found = table8.cells(runs)
    return {
        "any": bool(found),
        "columns": table8.COLUMNS,
        "rows": [
            {
                "norm": norm.upper(),
                "paper": [table8.PAPER[norm, column] for column in table8.COLUMNS],
                "ours": [found.get((norm, column), []) for column in table8.COLUMNS],
            }
            for norm in table8.NORMS
        ],
    }


def _training_clips(runs: list[Run]) -> list[dict[str, Any]]:
    """The first clips of each run; runs that saw the same ones share them."""
    groups: dict[bytes, tuple[list[str], list[Strip]]] = {}
    for run in runs:
        if run.strips:
            seen = b"".join(strip.pixels.tobytes() for strip in run.strips[:2])
            groups.setdefault(seen, ([], run.strips))[0].append(run.name)
    limit = max(2, _MAX_TRAINING_CLIPS // max(1, len(groups)))
    return [
        {
            "runs": names,
            "strips": [(strip.caption, _picture(strip.pixels)) for strip in strips[:limit]],
        }
        for names, strips in list(groups.values())[:_MAX_TRAINING_CLIPS]
    ]


def _classes(tested: list[tuple[int, Run, Test]]) -> dict[str, Any] | None:
    """Accuracy by class of the runs with the classes of the first one, hardest classes first."""
    if not tested:
        return None
    names = tested[0][2].class_names
    same = [(number, run, test) for number, run, test in tested if test.class_names == names]
    accuracy = {
        number: classes.class_accuracy(classes.confusion_counts(test)) for number, _, test in same
    }
    videos = np.bincount(tested[0][2].labels, minlength=len(names))
    order = np.argsort(
        np.nan_to_num(np.mean(list(accuracy.values()), axis=0), nan=2.0), kind="stable"
    )
    rows = [
        {
            "name": names[label],
            "videos": int(videos[label]),
            "accuracy": [
                None if np.isnan(a[label]) else float(a[label]) for a in accuracy.values()
            ],
        }
        for label in order
    ]
    return {
        "runs": [(run.name, number % NUM_COLORS) for number, run, _ in same],
        "hardest": rows if len(rows) <= _MAX_CLASSES else rows[: _MAX_CLASSES // 2],
        "all": rows if len(rows) > _MAX_CLASSES else [],
        "histogram": _histogram(same, accuracy) if len(rows) > _MAX_CLASSES else [],
    }


def _histogram(
    same: list[tuple[int, Run, Test]], accuracy: dict[int, np.ndarray]
) -> list[dict[str, Any]]:
    """How many classes have which accuracy, in ten steps, for each run."""
    found = []
    for number, run, _ in same:
        values = accuracy[number][~np.isnan(accuracy[number])]
        counts, _ = np.histogram(values, bins=10, range=(0, 1))
        found.append(
            {
                "name": run.name,
                "color": number % NUM_COLORS,
                "median": float(np.median(values)),
                "counts": counts.tolist(),
                "largest": int(counts.max()),
            }
        )
    return found


def _confusions(number: int, run: Run, test: Test) -> dict[str, Any]:
    counts = classes.confusion_counts(test)
    shown = classes.confused_classes(counts, _MAX_MATRIX)
    videos = counts.sum(axis=1)
    shares = counts / np.maximum(videos[:, None], 1)
    names = test.class_names
    return {
        "run": run.name,
        "color": number % NUM_COLORS,
        "classes": [names[label] for label in shown],
        "rows": [
            {
                "name": names[true],
                "shares": [float(shares[true, predicted]) for predicted in shown],
                "others": float(1 - shares[true, shown].sum()) if videos[true] else 0.0,
            }
            for true in shown
        ],
        "all_classes": len(shown) == len(names),
        "pairs": [
            (names[p.true], names[p.predicted], p.count, int(videos[p.true]), p.share)
            for p in classes.most_confused(counts, _MAX_PAIRS)
        ],
        "num_mistakes": int((test.predictions != test.labels).sum()),
        "num_videos": len(test.labels),
    }


def _examples(tested: list[tuple[int, Run, Test]], frames: TestFrames) -> list[dict[str, Any]]:
    found = []
    limit = min(6, max(1, _MAX_EXAMPLES // (2 * max(1, len(tested)))))
    for number, run, test in tested[: _MAX_EXAMPLES // 2]:
        index = frames.index(run)
        found.append(
            {
                "run": run.name,
                "color": number % NUM_COLORS,
                "problem": index if isinstance(index, str) else None,
                "mistakes": [
                    _example(e, run, frames) for e in examples.confident_mistakes(test, limit)
                ],
                "hits": [_example(e, run, frames) for e in examples.best_hits(test, limit)],
            }
        )
    return found


def _example(example: Example, run: Run, frames: TestFrames) -> dict[str, Any]:
    strip = frames.strip(run, example.path)
    missing = isinstance(strip, str)
    return {
        "example": example,
        "picture": None if missing else _picture(strip),
        "problem": strip if missing and strip != frames.index(run) else None,
    }


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Keys of the configs in which the runs differ, with the values of each run."""
    flat = [to_flat_dict(run.config) for run in runs]
    return [
        (key, [str(values[key]) for values in flat])
        for key in flat[0]
        if key != "output_dir" and any(values[key] != flat[0][key] for values in flat)
    ]


def _picture(pixels: np.ndarray) -> Picture:
    encoded = base64.b64encode(encode_webp(pixels)).decode()
    height, width = pixels.shape[:2]
    return Picture(f"data:image/webp;base64,{encoded}", width, height)
