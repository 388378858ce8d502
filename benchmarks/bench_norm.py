"""Bandwidth of group norm with ReLU on the activations of I3D ResNet-50, compared with peers.

    python benchmarks/bench_norm.py [--device cpu] [--quick] [--json PATH] [--markdown PATH]

All run normalization and ReLU on the same channels_last_3d tensor, unless the name says contiguous.
`share of copy` is the bandwidth relative to a device copy of the same tensor, counting the bytes
that must be moved (forward: read x, write y; backward: read x and the gradient, write the
gradient). 1.0 is an upper bound as long as the tensor exceeds the cache. Times are medians of
interleaved repeats, on CUDA of ten calls each, launched as one CUDA graph. Inputs rotate, so that
they are not in the cache. `host` is the time to launch a call without a graph; a layer whose
kernels are faster is then bound by it.

The group norms of Liger-Kernel and Apex are included if installed. torch's own row is that of the
installed version, which the results name. torchnorm is no peer: group norm of 0.1.2 calls torch's.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import environment, median_launch_seconds, median_seconds
from report import markdown_table
from torch import Tensor, nn

from i3d_gn.norm import GroupNorm

SHAPES = [
    (64, 16, 112, 112),
    (256, 8, 55, 55),
    (512, 4, 28, 28),
    (1024, 4, 14, 14),
    (2048, 4, 7, 7),
]
NUM_GROUPS = 32
CACHE_BYTES = 120e6  # twice the L2 cache of an H200


class Formula(nn.GroupNorm):
    """[GN] Eqn. 7 written out, for `torch.compile`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, T, H, W)."""
        groups = input.float().unflatten(1, (self.num_groups, -1))
        variance, mean = torch.var_mean(groups, (2, 3, 4, 5), correction=0, keepdim=True)
        y = ((groups - mean) * (variance + self.eps).rsqrt()).flatten(1, 2)
        by_channel = (-1, 1, 1, 1)
        return (y * self.weight.view(by_channel) + self.bias.view(by_channel)).to(input.dtype)


def peers(num_channels: int, device: str) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Names of implementations, and functions of x."""
    ours = GroupNorm(NUM_GROUPS, num_channels).to(device)
    yield "ours", lambda x: ours(x, relu=True)
    yield "ours, contiguous", lambda x: ours(x, relu=True)
    # The CUDA kernel requires weights of x's dtype.
    torchs = nn.GroupNorm(NUM_GROUPS, num_channels).to(
        device, torch.bfloat16 if device == "cuda" else torch.float32
    )
    yield "torch.nn.GroupNorm", lambda x: F.relu(torchs(x), inplace=True)
    yield "torch.nn.GroupNorm, contiguous", lambda x: F.relu(torchs(x), inplace=True)
    batch_norm = nn.BatchNorm3d(num_channels).to(device)
    yield "BatchNorm3d", lambda x: F.relu(batch_norm(x), inplace=True)
    if device == "cuda":
        formula = Formula(NUM_GROUPS, num_channels).to(device)
        yield "formula, compiled", torch.compile(lambda x: F.relu(formula(x)), dynamic=False)
    with suppress(ImportError):
        from liger_kernel.transformers.group_norm import LigerGroupNorm

        liger = LigerGroupNorm(num_channels, NUM_GROUPS).to(device)
        yield "Liger-Kernel, contiguous", lambda x: F.relu(liger(x))
    with suppress(ImportError):
        from apex.contrib.group_norm import GroupNorm as ApexGroupNorm

        # Apex supports images; the frames of a clip become one tall image.
        apex = ApexGroupNorm(NUM_GROUPS, num_channels).to(device)
        yield (
            "Apex",
            lambda x: F.relu(
                apex(x.flatten(2, 3).contiguous(memory_format=torch.channels_last))
            ).view_as(x),
        )


def forward_runs(
    candidates: dict[str, Callable[[Tensor], Tensor]],
    inputs: dict[str, list[Tensor]],
    *,
    backward: bool,
) -> dict[str, Callable[[], object]]:
    """Functions that run forward, or forward and backward, on the next input."""

    def make(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        rotating = cycle(inputs["contiguous" if "contiguous" in name else "channels_last"])

        def forward() -> object:
            with torch.no_grad():
                return function(next(rotating))

        def forward_and_backward() -> None:
            x = next(rotating)
            x.grad = None
            function(x).backward(next(rotating).detach())

        return forward_and_backward if backward else forward

    return {name: make(name, function) for name, function in candidates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="4 clips only, few repeats")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    args = parser.parse_args()
    cuda = args.device == "cuda"

    rows, table = [], ""
    for num_clips in (4,) if args.quick else (4, 8) if cuda else (1,):
        for channels, *size in SHAPES:
            num_bytes = num_clips * channels * size[0] * size[1] * size[2] * 2
            copies = max(2, round(CACHE_BYTES / num_bytes)) if cuda else 2
            inputs = {
                layout: [
                    torch.randn(num_clips, channels, *size, device=args.device)
                    .to(torch.bfloat16)
                    .contiguous(memory_format=memory_format)
                    .requires_grad_()
                    for _ in range(copies)
                ]
                for layout, memory_format in (
                    ("channels_last", torch.channels_last_3d),
                    ("contiguous", torch.contiguous_format),
                )
            }
            target = torch.empty_like(inputs["channels_last"][0]).detach_()
            rotating = cycle(inputs["channels_last"])
            candidates = dict(peers(channels, args.device))
            repeats = (10 if args.quick else 20) if cuda else 3
            for backward, num_passes in ((False, 2), (True, 5)):
                runs = {"copy": lambda r=rotating, t=target: t.copy_(next(r).detach())}
                runs |= forward_runs(candidates, inputs, backward=backward)
                medians = median_seconds(
                    runs,
                    device=args.device,
                    repeats=repeats,
                    warm_up=3 if cuda else 1,
                    calls=10 if cuda else 1,
                    as_graphs=True,
                )
                launches = median_launch_seconds(runs, repeats=3, calls=10) if cuda else {}
                copy_rate = 2 * num_bytes / medians.pop("copy")
                for name, seconds in medians.items():
                    rate = num_passes * num_bytes / seconds
                    rows.append(
                        {
                            "shape": [num_clips, channels, *size],
                            "megabytes": num_bytes / 1e6,
                            "pass": "forward + backward" if backward else "forward",
                            "implementation": name,
                            "microseconds": seconds * 1e6,
                            "launch_microseconds": 1e6 * launches[name] if cuda else None,
                            "gigabytes_per_second": rate / 1e9,
                            "copy_gigabytes_per_second": copy_rate / 1e9,
                            "share": rate / copy_rate,
                        }
                    )
            del inputs, target, candidates, runs, rotating
            if cuda:
                torch.cuda.empty_cache()
            table = _report(rows, args)
    print(table)


def _report(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Write all results so far, in case the run is cut off, and return the table."""
    table = markdown_table(
        ["shape", "MB", "pass", "implementation", "µs", "host µs", "GB/s", "share of copy"],
        (
            (
                "×".join(map(str, row["shape"])), f"{row['megabytes']:.0f}", row["pass"],
                row["implementation"], f"{row['microseconds']:.0f}",
                f"{row['launch_microseconds']:.0f}" if row["launch_microseconds"] else "",
                f"{row['gigabytes_per_second']:.0f}", f"{row['share']:.2f}",
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
        args.markdown.write_text(f"# Group norm alone\n\n{protocol}\n\n{head}\n\n{table}\n")
    return table


if __name__ == "__main__":
    main()
