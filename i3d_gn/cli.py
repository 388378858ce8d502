"""The console script `i3d-gn`: one table of commands, imported when they run."""

import argparse
import importlib
import os
import pkgutil
import sys

from i3d_gn import __version__
from i3d_gn.engine.command import run_command

# command -> (module:function, one phrase). Each function takes the remaining arguments.
COMMANDS = {
    "download": ("data_tools.download_kinetics:main", "download Kinetics-400 from the CVDF"),
    "extract": ("data_tools.extract_archives:main", "extract downloaded archives"),
    "resize": ("data_tools.resize_videos:main", "re-encode videos to a short side for training"),
    "verify": ("data_tools.verify_videos:main", "decode every video and report broken ones"),
    "index": ("data_tools.index_videos:main", "list the videos of a data set in an index file"),
    "pack": ("data_tools.pack_shards:main", "pack the videos of an index into tar shards"),
    "export": ("data_tools.export_list:main", "write an index as a list for other programs"),
    "make-motion-clips": ("data_tools.make_motion_clips:main", "make the data set of the demo"),
    "convert": ("i3d_gn.weights.convert:main", "convert weights between codebases"),
    "train": ("i3d_gn.video.commands:train", "train a video network from a YAML config"),
    "evaluate": ("i3d_gn.video.commands:evaluate", "test it with 10 clips per video"),
    "predict": ("i3d_gn.video.commands:predict", "predict the classes of any video"),
    "features": ("i3d_gn.video.commands:features", "write features of windows of videos"),
    "explain": ("i3d_gn.video.commands:explain", "show where the network looks"),
    "grid": ("i3d_gn.engine.grid:main", "run every combination of a grid of overrides"),
    "compare": ("i3d_gn.video.commands:compare", "compare tests of runs video by video"),
    "report": ("i3d_gn.video.commands:report", "tabulate and plot runs"),
    "export-model": ("i3d_gn.video.commands:export_model", "export it to ONNX or torch.export"),
    "info": ("i3d_gn.video.commands:info", "print layers, multiply-adds, memory of a network"),
    "train-imagenet": ("i3d_gn.imagenet.commands:train", "train an image network"),
    "train-coco": ("i3d_gn.detection.commands:train", "train a detector"),
    "evaluate-coco": ("i3d_gn.detection.commands:evaluate", "average precision of a detector"),
    "table": ("i3d_gn.cli:table", "print the paper's tables on ImageNet or COCO beside runs"),
}


def table(argv: list[str]) -> int:
    """`i3d-gn table RUN ...` and `i3d-gn table coco RUN ...`."""
    task = "detection" if argv[:1] == ["coco"] else "imagenet"
    commands = importlib.import_module(f"i3d_gn.{task}.commands")
    return commands.table(argv[task == "detection" :])


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status, see `run_command`."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn",
        description="Video classification with 3-D group normalization.",
        epilog="\n".join(
            ["commands:", *(f"  {name:18} {phrase}" for name, (_, phrase) in COMMANDS.items())]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="see below")
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="`i3d-gn COMMAND --help` lists them",
    )
    args = parser.parse_args(argv)
    arguments = [_as_path(argument) for argument in args.arguments]
    # Importing a command takes time, in which a signal may arrive too.
    return run_command(lambda: pkgutil.resolve_name(COMMANDS[args.command][0])(arguments))


def _as_path(argument: str) -> str:
    """Video names may begin with `-`, as ids of YouTube do; argparse takes them for options."""
    is_file = argument.startswith("-") and len(argument) > 2 and os.path.lexists(argument)
    return f"./{argument}" if is_file else argument


if __name__ == "__main__":
    sys.exit(main())
