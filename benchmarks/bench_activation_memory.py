"""Activation memory that I3D ResNet-50 saves for backward, per clip, by normalization layer.

    python benchmarks/bench_activation_memory.py [--quick] [--json PATH] [--markdown PATH]

Memory is counted on the meta device, so that no GPU is needed: forward and backward run as under
bfloat16 autocast, in channels_last_3d, and every storage that an operator allocates is tracked
until it is freed. `saved` is alive between forward and backward, `peak` is the maximum at any time
of the step. Parameters, the clip, optimizer state and workspaces of convolutions are not counted;
gradients of parameters (56 MB) are part of `peak`. The memory of a batch is that of a clip times
the number of clips.
"""

import argparse
import json
import os
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import markdown_table
from torch import nn

from i3d_gn.engine.activation_memory import step_bytes
from i3d_gn.models import i3d_resnet50
from i3d_gn.norm import make_norm


class GroupNormUnderAutocast(nn.GroupNorm):
    """`torch.nn.GroupNorm` as under autocast on CUDA: float32 input and output."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize (N, C, *)."""
        return super().forward(input.float())


NORMS = {
    "ours, gn": partial(i3d_resnet50, "gn"),
    "ours, gn, recompute=False": partial(i3d_resnet50, "gn", recompute=False),
    "torch.nn.GroupNorm": partial(i3d_resnet50, partial(GroupNormUnderAutocast, 32)),
    "BatchNorm3d": partial(i3d_resnet50, "bn"),
    "frozen BN": partial(i3d_resnet50, partial(make_norm, "frozen_bn")),
}
CLIPS = {"32x2": 32, "64x1": 64}


def count(make, num_frames: int, *, size: int = 224) -> tuple[int, int]:
    """Bytes saved for the backward of one clip, and the peak of the step."""
    with torch.device("meta"):
        model = make().to(memory_format=torch.channels_last_3d).train()
    return step_bytes(model, (1, 3, num_frames, size, size), torch.bfloat16)


def _cells(row: dict[str, Any], batch_norm: dict[str, Any]) -> list[str]:
    cells = [f"{row['clip']}, 224²", row["norm"]]
    for key in ("saved_bytes", "peak_bytes"):
        cells += [f"{row[key] / 1e6:.1f}", f"{row[key] / batch_norm[key]:.2f}"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="32x2 only")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    args = parser.parse_args()
    os.environ["I3D_GN_NORM_KERNEL"] = "triton"  # as on a GPU

    rows = []
    for clip, num_frames in list(CLIPS.items())[: 1 if args.quick else None]:
        for norm, make in NORMS.items():
            saved, peak = count(make, num_frames)
            rows.append({"clip": clip, "norm": norm, "saved_bytes": saved, "peak_bytes": peak})
    batch_norm = {row["clip"]: row for row in rows if row["norm"] == "BatchNorm3d"}
    table = markdown_table(
        ["clip", "norm", "saved, MB", "of BatchNorm3d", "peak, MB", "of BatchNorm3d"],
        (_cells(row, batch_norm[row["clip"]]) for row in rows),
    )
    print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(
            "# Activation memory of I3D ResNet-50\n\n"
            f"{(__doc__ or '').partition('[--markdown PATH]')[2].strip()}\n\n"
            f"torch {torch.__version__}, Python {platform.python_version()}; one clip.\n\n{table}\n"
        )


if __name__ == "__main__":
    main()
