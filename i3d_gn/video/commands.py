"""The commands of this room: their options, and what runs. Torch is imported when one runs."""

import argparse
from pathlib import Path

from i3d_gn.engine.command import config_parser, start_logging


def train(argv: list[str]) -> int:
    """`i3d-gn train`."""
    parser = config_parser(
        "train", "Train a video network from one YAML file.", "configs/demo.yaml"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config and exit"
    )
    args = parser.parse_intermixed_args(argv)
    from i3d_gn.engine.typed_config import to_yaml
    from i3d_gn.video.config import load_config

    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    from i3d_gn.engine.distributed import init_process_group
    from i3d_gn.video.train import train as train_network

    start_logging()
    with init_process_group(timeout_minutes=config.train.rank_timeout_minutes) as process:
        train_network(config, process)
    return 0


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


def report(argv: list[str]) -> int:
    """`i3d-gn report`."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn report", description="Print a table of runs and plot their curves."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="figure to write")
    args = parser.parse_args(argv)
    from i3d_gn.video.report import plot, read_run, table

    runs = [read_run(path) for path in args.runs]
    print(table(runs))
    plot(runs, args.out)
    print(f"\ncurves: {args.out}")
    return 0
