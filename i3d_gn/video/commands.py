"""The commands of this room: their options, and what runs. Torch is imported when one runs."""

import argparse
import glob
from pathlib import Path

from i3d_gn.engine.command import config_parser, start_logging
from i3d_gn.engine.train_command import train_command
from i3d_gn.files import check_output, print_line

_CHECKPOINT_HELP = "checkpoint, output_dir of a run, or weights of a video network"


def train(argv: list[str]) -> int:
    """`i3d-gn train`."""
    parser = config_parser(
        "train", "Train a video network from one YAML file.", "configs/demo.yaml or demo"
    )
    return train_command(
        parser,
        argv,
        load_config="i3d_gn.video.config:load_config",
        train="i3d_gn.video.train:train",
    )


def evaluate(argv: list[str]) -> int:
    """`i3d-gn evaluate`."""
    parser = config_parser(
        "evaluate", "Test a trained video network with 10 clips per video.", "configs/demo.yaml"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="checkpoint to test (default: the newest under output_dir)"
    )
    args = parser.parse_intermixed_args(argv)
    from i3d_gn.engine.distributed import init_process_group
    from i3d_gn.video.config import load_config
    from i3d_gn.video.evaluate import evaluate as evaluate_checkpoint

    config = load_config(args.config, args.overrides)
    start_logging()
    # Ranks wait longer for one another's last videos than for a gradient.
    with init_process_group(timeout_minutes=60) as process:
        evaluate_checkpoint(config, args.checkpoint, process)
    return 0


def export_model(argv: list[str]) -> int:
    """`i3d-gn export-model`."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn export-model",
        description="Export a trained network to ONNX (*.onnx) or torch.export (*.pt2), and "
        "compare its scores with the original's before the file is kept.",
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint, output_dir of a run, or weights")
    parser.add_argument("out", type=Path, help="file to write, *.onnx or *.pt2")
    parser.add_argument(
        "--input", choices=("uint8", "float"), default="uint8",
        help="pixels (N, T, H, W, 3), or normalized float32 clips (N, 3, T, H, W) "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--videos", nargs="+", default=(), metavar="VIDEO",
        help="compare on these (default: videos of the checkpoint's validation index, or noise)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    start_logging()
    from i3d_gn.video.export import export_model as export_network

    export_network(args.checkpoint, args.out, input=args.input, videos=args.videos)
    return 0


def info(argv: list[str]) -> int:
    """`i3d-gn info`."""
    parser = config_parser(
        "info",
        "Print a network's layers, parameters, multiply-adds, and the memory that training takes.",
        "demo, or a checkpoint",
    )
    args = parser.parse_intermixed_args(argv)
    from i3d_gn.video.info import config_of, describe

    print(describe(config_of(args.config, args.overrides)))
    return 0


def predict(argv: list[str]) -> int:
    """`i3d-gn predict`."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn predict", description="Predict the classes of videos with a trained network."
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="VIDEO",
        help="video, folder of videos, index (.parquet) or URL",
    )
    _add_network_options(parser)
    parser.add_argument(
        "--top-k", type=_positive_int, default=5, metavar="K",
        help="classes per video (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="also write a .csv, .json or .parquet file"
    )
    group = parser.add_argument_group("long videos")
    group.add_argument(
        "--window", type=_positive_float, metavar="SECONDS",
        help="predict each window of this length by itself: a timeline",
    )  # fmt: skip
    group.add_argument(
        "--every", type=_positive_float, metavar="SECONDS",
        help="from one window to the next (default: the window's length)",
    )  # fmt: skip
    group.add_argument(
        "--render", type=Path, metavar="FILE", help="write the video with its classes, .mp4"
    )
    group.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot the timeline, .png, .pdf or .svg"
    )
    args = parser.parse_args(argv)
    if args.window is None and (args.every or args.render or args.plot):
        parser.error("--every, --render and --plot need --window")
    start_logging()
    if args.window is not None:
        from i3d_gn.video.timeline import predict_timeline

        predict_timeline(
            args.inputs,
            args.checkpoint,
            window=args.window,
            every=args.every or args.window,
            top_k=args.top_k,
            out=args.out,
            render=args.render,
            plot=args.plot,
            overrides=args.overrides,
        )
        return 0
    from i3d_gn.video.predict import predict as predict_videos

    predict_videos(
        args.inputs, args.checkpoint, top_k=args.top_k, out=args.out, overrides=args.overrides
    )
    return 0


def report(argv: list[str]) -> int:
    """`i3d-gn report`."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn report",
        description="Print a table of runs, plot their curves, and write a page that shows "
        "curves, classes, confusions and test videos and opens from disk.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("curves.png"),
        help="figure to write, .png, .pdf or .svg (default: %(default)s)",
    )
    parser.add_argument(
        "--html",
        type=Path,
        default=Path("report.html"),
        help="page to write, .html (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    from i3d_gn.engine.figures import FIGURE_SUFFIXES
    from i3d_gn.engine.markdown import markdown_table
    from i3d_gn.video.report import table
    from i3d_gn.video.report.figure import plot
    from i3d_gn.video.report.page import write_page
    from i3d_gn.video.report.runs import read_runs

    check_output(args.out, suffixes=FIGURE_SUFFIXES)
    check_output(args.html, suffixes=(".html",))
    runs = read_runs(args.runs)
    print(markdown_table([table.HEADER, *table.rows(runs)]))
    plot(runs, args.out)
    write_page(runs, args.html)
    print()
    print_line(f"curves: {args.out}")
    print_line(f"page:   {args.html}")
    return 0


def compare(argv: list[str]) -> int:
    """`i3d-gn compare`."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn compare",
        description="Compare tested networks video by video, each with the first: difference with "
        "a 95 % bootstrap interval, and McNemar's test.",
    )
    parser.add_argument(
        "entries", nargs="+", metavar="NAME=RUNS",
        help="runs that belong together, such as folds: a pattern, e.g. 'gn=runs/grid/gn-*'",
    )  # fmt: skip
    parser.add_argument(
        "--groups", type=Path, metavar="CSV",
        help="file with columns path and the one below: videos that were cut from one recording",
    )  # fmt: skip
    parser.add_argument("--group-column", default="recording", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    from i3d_gn.video.compare import comparison, read_entry, read_groups

    entries = []
    for text in args.entries:
        name, equals, pattern = text.partition("=")
        folders = [Path(folder) for folder in sorted(glob.glob(pattern))]
        if not equals or not folders:
            raise ValueError(f"{text!r}: expected NAME=RUNS, where RUNS matches folders of runs")
        entries.append(read_entry(name, folders))
    groups = read_groups(args.groups, args.group_column) if args.groups else {}
    print(comparison(entries, groups))
    return 0


def features(argv: list[str]) -> int:
    """`i3d-gn features`."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn features",
        description="Write pooled features of sliding windows, one array (windows, channels) per "
        "video. Run the same command again to resume.",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="index (.parquet), folder of videos, video"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--checkpoint", metavar="FILE", help=_CHECKPOINT_HELP)
    network.add_argument(
        "--weights",
        metavar="FILE",
        help="weights of a video network without a classifier, or of images, which are inflated; "
        "a file or a published name",
    )
    parser.add_argument(
        "--length",
        type=_extent,
        metavar="N",
        help="length of a window in frames (16), or in seconds (0.64s) (default: num_frames times "
        "stride of the training clips); its frames 0, clip.stride, 2 clip.stride, ... are the clip",
    )
    parser.add_argument(
        "--every",
        type=_extent,
        metavar="N",
        help="from one window to the next, in frames or seconds (default: the length)",
    )
    _add_overrides(parser)
    args = parser.parse_args(argv)
    start_logging()
    from i3d_gn.data.windows import Extent
    from i3d_gn.video.features import features as write_features

    write_features(
        args.source,
        args.out,
        checkpoint=args.checkpoint,
        weights=args.weights,
        length=args.length and Extent(*args.length),
        every=args.every and Extent(*args.every),
        overrides=args.overrides,
    )
    return 0


def explain(argv: list[str]) -> int:
    """`i3d-gn explain`."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn explain",
        description="Show where and when a network sees a class in a video (Grad-CAM).",
    )
    parser.add_argument("video", metavar="VIDEO", help="video or URL")
    _add_network_options(parser)
    parser.add_argument(
        "--class", dest="class_name", metavar="NAME", help="class (default: the predicted one)"
    )
    parser.add_argument(
        "--stage", metavar="NAME", help="module of the network, such as res4 (default: the last)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("explain.png"), metavar="FILE",
        help="picture to write (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--render", type=Path, metavar="FILE", help="also write a video, .mp4")
    args = parser.parse_args(argv)
    start_logging()
    from i3d_gn.video.explain import explain as explain_video

    explain_video(
        args.video,
        args.checkpoint,
        class_name=args.class_name,
        stage=args.stage,
        out=args.out,
        render=args.render,
        overrides=args.overrides,
    )
    return 0


def _add_network_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help=_CHECKPOINT_HELP,
    )
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the config that trained the network, such as test.num_clips=30; "
        "may be repeated",
    )


def _extent(text: str) -> tuple[float, bool]:
    """A number of frames, or with `s` of seconds, and whether it is seconds."""
    in_seconds = text.endswith("s")
    number = _positive_float(text[:-1]) if in_seconds else float(_positive_int(text))
    return number, in_seconds


def _positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def _positive_int(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number
