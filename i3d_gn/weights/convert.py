"""Convert weights of other codebases to safetensors, with what is known of the network.

    i3d-gn convert SOURCE DEST.safetensors [--naming torchvision] [--stride-in 1x1] ...

SOURCE is a file of torchvision, timm, GroupNorm-reproduce, Detectron (GN), video-nonlocal-net,
PySlowFast, pytorchvideo or mmaction2, a checkpoint of this package, or a published name such as
ResNet50_Weights.IMAGENET1K_V2. The options state what a file does not contain.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i3d_gn.engine.command import start_logging
from i3d_gn.files import check_output, print_line
from i3d_gn.weights.info import STEM_NAMES
from i3d_gn.weights.tensor_names import first_names

if TYPE_CHECKING:
    from i3d_gn.weights.read import Weights


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 on success.

    Raises:
        ValueError: The source cannot be read, the options do not fit it, or the destination cannot
            be written.
    """
    args = _parser().parse_args(argv)
    if args.std is not None and min(args.std) <= 0:
        raise ValueError(f"--std {args.std}: every value must be positive")
    check_output(args.dest, [args.source])
    start_logging()
    # They import torch, without which --help takes a tenth of the time.
    from i3d_gn.weights.read import read_weights, write_weights  # noqa: PLC0415

    weights = _complete(read_weights(args.source, entry=args.entry), args)
    write_weights(args.dest, weights, naming=args.naming)
    facts = ", ".join(
        f"{key} {value}"
        for key, value in dataclasses.asdict(weights.info).items()
        if value is not None and key not in {"class_names", "settings"}
    )
    if weights.info.class_names is not None:
        facts += f", {len(weights.info.class_names)} class names"
    origin = ""
    if weights.other_entries:
        origin = f" of {weights.entry} (--entry selects {' or '.join(weights.other_entries)})"
    if weights.unused:
        print_line(f"not converted: {first_names(weights.unused)}")
    print_line(
        f"{args.dest}: {len(weights.tensors)} tensors{origin} with {args.naming} names; {facts}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="i3d-gn convert", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "source", help="weight file, or a published name such as ResNet50_Weights.IMAGENET1K_V2"
    )
    parser.add_argument("dest", type=Path, help="safetensors file to write")
    parser.add_argument(
        "--entry",
        metavar="NAME",
        help="which state dict of SOURCE to convert if it has several, such as state_dict "
        "(default: averaged weights, state_dict_ema or model_ema, else the usual names)",
    )
    parser.add_argument(
        "--naming",
        choices=("i3d_gn", "torchvision", "pytorchvideo"),
        default="i3d_gn",
        help="tensor names to write: torchvision for image networks, pytorchvideo for video "
        "networks (default: %(default)s)",
    )
    parser.add_argument(
        "--stride-in",
        choices=("3x3", "1x1"),
        help="which convolution of a bottleneck has the stride (default: known from the source, "
        "else 3x3)",
    )
    parser.add_argument(
        "--stem",
        choices=STEM_NAMES,
        help="stem of a video network (default: known from the source, else strided)",
    )
    parser.add_argument(
        "--pool-padding",
        type=int,
        choices=(0, 1),
        help="spatial padding of a video network's pool1 (default: known from the source, else 0)",
    )
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}",
            type=float,
            nargs=3,
            metavar=("R", "G", "B"),
            help=f"{name} that normalizes the input, RGB in [0, 1] (default: known from the "
            "source, else ImageNet's)",
        )
    return parser


def _complete(weights: Weights, args: argparse.Namespace) -> Weights:
    """Fill in what is unknown: the options first, then the source, then the defaults."""
    from i3d_gn.weights.read import IMAGENET_MEAN, IMAGENET_STD  # noqa: PLC0415 imports torch

    info = weights.info
    defaults: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "stride_in": "3x3"}
    if info.spatial_dims == 3:
        defaults |= {"stem": "strided", "pool_padding": 0}
    elif args.stem is not None or args.pool_padding is not None:
        raise ValueError(
            f"{args.source} is an image network; remove --stem and --pool-padding, which describe "
            "video networks"
        )
    chosen = {
        key: next(v for v in (getattr(args, key), getattr(info, key), default) if v is not None)
        for key, default in defaults.items()
    }
    return dataclasses.replace(weights, info=dataclasses.replace(info, **chosen))
