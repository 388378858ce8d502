"""Clips per second and peak memory of training I3D ResNet-50, by normalization layer.

    python benchmarks/bench_train_step.py [--device cpu] [--quick] [--json PATH] [--markdown PATH]

A step is what training does with a micro-batch: copy uint8 clips to the device, normalize, forward
and backward in bfloat16, SGD. Ours is compared with the same network built by pytorchvideo's
`create_resnet`, with batch norm and with `torch.nn.GroupNorm`, all with and without CUDA graphs
(`train.cuda_graphs`) on a GPU. Times are medians of interleaved
repeats, on a CPU of CPU time, which other processes hardly affect. Peak memory (CUDA only) is that
of training one network, parameters and optimizer included.

Networks and clips are in channels_last_3d, unless the name says contiguous.
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import environment, median_seconds
from report import markdown_table
from torch import nn

from i3d_gn.data.to_device import ToDevice
from i3d_gn.engine.cuda_graphs import launch_as_graphs
from i3d_gn.engine.optim import build_optimizer, set_lr
from i3d_gn.engine.recipe import Recipe
from i3d_gn.models import i3d_resnet50

# Name: frames, height and width, clips.
CUDA_CASES = {
    "32x2, 8 clips": (32, 224, 8),
    "64x1, 4 clips": (64, 224, 4),
    "32x2, 32 clips": (32, 224, 32),
}
CPU_CASES = {"16 frames of 112², 4 clips": (16, 112, 4)}


def pytorchvideo_i3d(num_frames: int, size: int, norm: Callable[..., nn.Module]) -> nn.Module:
    """I3D ResNet-50 with our `strided` stem, built as `i3d_r50` of pytorchvideo's hub."""
    from pytorchvideo.models.resnet import create_resnet

    return create_resnet(
        norm=norm,
        stem_conv_kernel_size=(5, 7, 7),
        stem_conv_stride=(2, 2, 2),
        stem_pool=nn.MaxPool3d,
        stem_pool_kernel_size=(2, 3, 3),
        stem_pool_stride=(2, 2, 2),
        stage1_pool=nn.MaxPool3d,
        stage_conv_a_kernel_size=(
            (3, 1, 1),
            [(3, 1, 1), (1, 1, 1)],
            [(3, 1, 1), (1, 1, 1)],
            [(1, 1, 1), (3, 1, 1)],
        ),
        head_pool_kernel_size=(num_frames // 8, math.ceil(size / 32), math.ceil(size / 32)),
    )


def torch_group_norm(num_features: int, eps: float, momentum: float) -> nn.GroupNorm:
    """`torch.nn.GroupNorm` with the signature that pytorchvideo expects."""
    return nn.GroupNorm(32, num_features, eps)


def networks(num_frames: int, size: int) -> dict[str, Callable[[], nn.Module]]:
    """Networks by name; those of pytorchvideo if it is installed."""
    candidates = {
        "ours, gn": partial(i3d_resnet50, "gn"),
        "ours, gn, recompute=False": partial(i3d_resnet50, "gn", recompute=False),
        "ours, bn": partial(i3d_resnet50, "bn"),
        "ours, frozen_bn": partial(i3d_resnet50, "frozen_bn"),
    }
    if find_spec("pytorchvideo") is not None:
        theirs = partial(pytorchvideo_i3d, num_frames, size)
        candidates["pytorchvideo, BatchNorm3d"] = partial(theirs, nn.BatchNorm3d)
        candidates["pytorchvideo, torch.nn.GroupNorm"] = partial(theirs, torch_group_norm)
    return candidates


def train_step(
    make: Callable[[], nn.Module],
    num_frames: int,
    size: int,
    num_clips: int,
    *,
    device: str,
    channels_last: bool,
    launch: str,
) -> Callable[[], None]:
    """A function that runs one training step; `launch` is "", "CUDA graphs" or "compiled"."""
    torch.manual_seed(0)
    model = make().to(device).train()
    if channels_last:
        model.to(memory_format=torch.channels_last_3d)
    optimizer = build_optimizer(model, Recipe())
    set_lr(optimizer, 0.01)
    to_device = ToDevice(
        device=torch.device(device), mean=(0.45,) * 3, std=(0.225,) * 3, precision="bf16"
    )
    clips = torch.randint(0, 256, (num_clips, num_frames, size, size, 3), dtype=torch.uint8)
    labels = torch.arange(num_clips)
    if device == "cuda":
        clips, labels = clips.pin_memory(), labels.pin_memory()
    if launch == "compiled":
        model.compile()
    if launch == "CUDA graphs":
        launch_as_graphs(model)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        inputs = to_device(clips)
        if not channels_last:
            inputs = inputs.contiguous()
        targets = labels.to(device, non_blocking=True)
        with to_device.autocast():
            logits = model(inputs)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one case, few repeats")
    parser.add_argument("--only", action="append", help="only networks whose names contain this")
    parser.add_argument(
        "--compile", action="store_true", help="also run all networks with torch.compile"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    torch.backends.cudnn.benchmark = True

    rows, table = [], ""
    cases = CUDA_CASES if cuda else CPU_CASES
    for case, (num_frames, size, num_clips) in list(cases.items())[: 1 if args.quick else None]:
        steps, peaks, layouts = {}, {}, {}
        for name, make in networks(num_frames, size).items():
            if args.only and not any(part in name for part in args.only):
                continue
            if not cuda and "recompute" in name:  # takes effect on CUDA only
                continue
            for channels_last in (True,) if cuda else (True, False):
                launches = ["", "CUDA graphs"] if cuda else [""]
                for launch in [*launches, "compiled"] if args.compile else launches:
                    key = f"{name}, {launch}" if launch else name
                    key += "" if channels_last else ", contiguous"
                    before = torch.cuda.memory_allocated() if cuda else 0
                    step = train_step(
                        make, num_frames, size, num_clips,
                        device=args.device, channels_last=channels_last, launch=launch,
                    )  # fmt: skip
                    if launch != "CUDA graphs":  # their memory is allocated in the first step
                        step()
                    if cuda:
                        torch.cuda.reset_peak_memory_stats()
                        step()
                        peaks[key] = torch.cuda.max_memory_allocated() - before
                        torch.cuda.empty_cache()
                    steps[key], layouts[key] = step, channels_last
        repeats = (5 if args.quick else 8) if cuda else (3 if args.quick else 5)
        for name, seconds in median_seconds(
            steps, device=args.device, repeats=repeats, warm_up=1
        ).items():
            rows.append(
                {
                    "case": case,
                    "network": name,
                    "channels_last": layouts[name],
                    "seconds": seconds,
                    "clips_per_second": num_clips / seconds,
                    "peak_bytes": peaks.get(name),
                }
            )
        del steps
        if cuda:
            torch.cuda.empty_cache()
        table = _report(rows, args)
    print(table)


def _report(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Write all results so far, in case the run is cut off, and return the table."""
    table = markdown_table(
        ["case", "network", "ms per step", "clips/s", "peak, GB"],
        (
            (
                row["case"], row["network"], f"{row['seconds'] * 1e3:.1f}",
                f"{row['clips_per_second']:.2f}",
                f"{row['peak_bytes'] / 1e9:.2f}" if row["peak_bytes"] else "",
            )
            for row in rows
        ),
    )  # fmt: skip
    facts = environment(args.device)
    if args.json:
        args.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")
    if args.markdown:
        protocol = (__doc__ or "").partition("[--markdown PATH]")[2].strip()
        head = ", ".join(f"{name} {value}" for name, value in facts.items())
        args.markdown.write_text(f"# Training step\n\n{protocol}\n\n{head}\n\n{table}\n")
    return table


if __name__ == "__main__":
    main()
