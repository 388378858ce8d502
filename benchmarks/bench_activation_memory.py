"""Bytes of activations that I3D ResNet-50 keeps for backward, per clip, by normalisation layer.

    python benchmarks/bench_activation_memory.py [--quick] [--json PATH] [--markdown PATH]

Counted, not measured, so that no GPU is needed: forward and backward run on the meta device, as
under bfloat16 autocast, in channels_last_3d, and every storage that an operator makes is followed
from its birth to its death. ``kept`` is what lives between forward and backward, ``peak`` the most
that lives at any time of the step. Parameters, the clip, optimiser state and workspaces of
convolutions are left out; gradients of parameters (56 MB) are part of ``peak``. The bytes of a
batch are those of a clip times the clips.
"""

import argparse
import json
import os
import platform
import weakref
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from i3d_gn.models import i3d_resnet50
from i3d_gn.norm import make_norm


class GroupNormUnderAutocast(nn.GroupNorm):
    """`torch.nn.GroupNorm` as CUDA's autocast runs it: float32 in and out."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise (N, C, *)."""
        return super().forward(input.float())


NORMS = {
    "ours, gn": partial(i3d_resnet50, "gn"),
    "ours, gn, recompute=False": partial(i3d_resnet50, "gn", recompute=False),
    "torch.nn.GroupNorm": partial(i3d_resnet50, partial(GroupNormUnderAutocast, 32)),
    "BatchNorm3d": partial(i3d_resnet50, "bn"),
    "frozen BN": partial(i3d_resnet50, partial(make_norm, "frozen_bn")),
}
CLIPS = {"32x2": 32, "64x1": 64}


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors made inside it that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Do not count what was there before."""
        self._sizes[tensor.untyped_storage()._cdata] = 0

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def count(make, num_frames: int, *, size: int = 224) -> tuple[int, int]:
    """Bytes kept for the backward of one clip, and the peak of the step."""
    with torch.device("meta"):
        model = make().to(memory_format=torch.channels_last_3d).train()
        clip = torch.empty(1, 3, num_frames, size, size, dtype=torch.bfloat16)
    for module in model.modules():  # as autocast: the rest stays in float32
        if isinstance(module, nn.Conv3d | nn.Linear):
            module.to(torch.bfloat16)
            module.register_forward_pre_hook(_to_bfloat16)
    clip = clip.contiguous(memory_format=torch.channels_last_3d)
    with LiveBytes() as live:
        for tensor in (clip, *model.parameters(), *model.buffers()):
            live.leave_out(tensor)
        loss = model(clip).sum()
        kept = live.now
        loss.backward()
        return kept, live.peak


def _to_bfloat16(_module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].to(torch.bfloat16),)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="32x2 alone")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    args = parser.parse_args()
    os.environ["I3D_GN_NORM_KERNEL"] = "triton"  # as on a GPU

    rows = []
    for clip, num_frames in list(CLIPS.items())[: 1 if args.quick else None]:
        for norm, make in NORMS.items():
            kept, peak = count(make, num_frames)
            rows.append({"clip": clip, "norm": norm, "kept_bytes": kept, "peak_bytes": peak})
    by_key = {(row["clip"], row["norm"]): row for row in rows}
    lines = [
        "| clip | norm | kept, MB | of BatchNorm3d | peak, MB | of BatchNorm3d |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        bn = by_key[row["clip"], "BatchNorm3d"]
        lines.append(
            f"| {row['clip']}, 224² | {row['norm']} | {row['kept_bytes'] / 1e6:.1f} "
            f"| {row['kept_bytes'] / bn['kept_bytes']:.2f} | {row['peak_bytes'] / 1e6:.1f} "
            f"| {row['peak_bytes'] / bn['peak_bytes']:.2f} |"
        )
    table = "\n".join(lines)
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
