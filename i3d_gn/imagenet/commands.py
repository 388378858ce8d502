"""The commands of this room: their options, and what runs. Torch is imported when one runs."""

import argparse
from pathlib import Path

from i3d_gn.engine.command import config_parser
from i3d_gn.engine.train_command import train_command
from i3d_gn.files import check_output, print_line


def train(argv: list[str]) -> int:
    """`i3d-gn train-imagenet`."""
    parser = config_parser(
        "train-imagenet",
        "Train an image network from one YAML file, as [GN] section 4.1 does on ImageNet.",
        "configs/imagenet/gn.yaml",
    )
    return train_command(
        parser,
        argv,
        load_config="i3d_gn.imagenet.config:load_imagenet_config",
        train="i3d_gn.imagenet.train:train_imagenet",
    )


def table(argv: list[str]) -> int:
    """`i3d-gn table`."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn table",
        description="Print the paper's Tables 1 to 3 with the results of runs beside its own; "
        "`i3d-gn table coco` prints Tables 4 to 7.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run")
    parser.add_argument(
        "--curves", type=Path, help="also plot errors over epochs and batch size (Figs. 1 and 5)"
    )
    args = parser.parse_args(argv)
    from i3d_gn.engine.figures import FIGURE_SUFFIXES
    from i3d_gn.imagenet.tables import imagenet_tables, plot, read_image_run

    if args.curves is not None:
        check_output(args.curves, suffixes=FIGURE_SUFFIXES)
    runs = [read_image_run(path) for path in args.runs]
    print(imagenet_tables(runs))
    if args.curves is not None:
        plot(runs, args.curves)
        print()
        print_line(f"curves: {args.curves}")
    return 0
