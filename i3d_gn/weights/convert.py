"""Convert weights between codebases, into safetensors that say what network they are for.

    i3d-gn convert SOURCE DEST.safetensors [--naming torchvision] [--stride-in 1x1] ...

SOURCE is a file of torchvision, timm, GroupNorm-reproduce, Detectron (GN), video-nonlocal-net,
PySlowFast, pytorchvideo or mmaction2, a checkpoint of training here, or a torchvision enum such as
ResNet50_Weights.IMAGENET1K_V2. The options state what a file does not tell.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from i3d_gn.engine.command import run_command
from i3d_gn.weights.files import STEM_NAMES
from i3d_gn.weights.read import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    WeightsInfo,
    read_weights,
    write_weights,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 on success."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn convert", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("source", help="weight file, or a torchvision enum's name")
    parser.add_argument("dest", type=Path, help="safetensors file to write")
    parser.add_argument(
        "--naming",
        choices=("i3d_gn", "torchvision", "pytorchvideo"),
        default="i3d_gn",
        help="names of the tensors written",
    )
    parser.add_argument(
        "--stride-in",
        choices=("3x3", "1x1"),
        help="convolution with a bottleneck's stride; 3x3 unless the source is known to differ",
    )
    parser.add_argument(
        "--stem",
        choices=STEM_NAMES,
        help="stem of a video network; strided unless the source is known to differ",
    )
    parser.add_argument(
        "--pool-padding",
        type=int,
        choices=(0, 1),
        help="spatial padding of a video network's first pool; 0 unless known to differ",
    )
    parser.add_argument(
        "--mean", type=float, nargs=3, help="RGB of 0..1 that the weights were trained with"
    )
    parser.add_argument("--std", type=float, nargs=3, help="likewise")
    args = parser.parse_args(argv)
    weights = read_weights(args.source)
    info = _complete(weights.info, args)
    write_weights(args.dest, dataclasses.replace(weights, info=info), naming=args.naming)
    facts = ", ".join(
        f"{key} {value}" for key, value in dataclasses.asdict(info).items() if value is not None
    )
    print(f"{args.dest}: {len(weights.tensors)} tensors under {args.naming} names; {facts}")
    return 0


def _complete(info: WeightsInfo, args: argparse.Namespace) -> WeightsInfo:
    """The options given first, then what the source tells, then what is usual."""
    usual: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "stride_in": "3x3"}
    if info.spatial_dims == 3:
        usual |= {"stem": "strided", "pool_padding": 0}
    elif args.stem is not None or args.pool_padding is not None:
        raise ValueError(
            f"{args.source} is an image network, and --stem and --pool-padding are of video "
            "networks; leave them out"
        )
    if args.std is not None and min(args.std) <= 0:
        raise ValueError(f"--std {args.std}: a deviation is more than 0")
    chosen = {
        key: next(v for v in (getattr(args, key), getattr(info, key), value) if v is not None)
        for key, value in usual.items()
    }
    return dataclasses.replace(info, **chosen)


if __name__ == "__main__":
    sys.exit(run_command(main))
