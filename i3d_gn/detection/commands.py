"""The commands of this room: their options, and what runs. Torch is imported when one runs."""

import argparse
from pathlib import Path

from i3d_gn.engine.command import config_parser, start_logging
from i3d_gn.engine.train_command import train_command

_EXAMPLE = "configs/coco/fpn_r50_gn.yaml"


def train(argv: list[str]) -> int:
    """`i3d-gn train-coco`."""
    parser = config_parser(
        "train-coco", "Train Mask R-CNN from one YAML file, as [GN] section 4.2 does.", _EXAMPLE
    )
    return train_command(
        parser,
        argv,
        load_config="i3d_gn.detection.config:load_detection_config",
        train="i3d_gn.detection.train:train_coco",
    )


def evaluate(argv: list[str]) -> int:
    """`i3d-gn evaluate-coco`."""
    parser = config_parser("evaluate-coco", "Test Mask R-CNN on the validation images.", _EXAMPLE)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="of a run (default: the newest of output_dir), or weights of a Mask R-CNN of "
        "torchvision or Detectron",
    )
    args = parser.parse_intermixed_args(argv)
    from i3d_gn.detection.config import load_detection_config

    config = load_detection_config(args.config, tuple(args.overrides))
    from i3d_gn.detection.evaluate import evaluate_coco
    from i3d_gn.engine.distributed import init_process_group

    start_logging()
    with init_process_group(timeout_minutes=config.train.rank_timeout_minutes) as process:
        evaluate_coco(config, process, args.checkpoint)
    return 0


def table(argv: list[str]) -> int:
    """`i3d-gn table coco`."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn table coco",
        description="Print the paper's Tables 4 to 7 with the results of runs beside its own.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run")
    args = parser.parse_args(argv)
    from i3d_gn.detection.tables import coco_tables, read_detection_run

    print(coco_tables([read_detection_run(path) for path in args.runs]))
    return 0
