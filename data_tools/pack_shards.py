"""Pack the videos of an index into tar shards, for storage that is slow with many small files.

Writes shard-00000.tar, shard-00001.tar, ... and index.parquet to OUTPUT. index.parquet replaces
INDEX in training and testing: the same seed gives the same clips as from the original files. Shards
follow the WebDataset convention: NUMBER.mp4 beside NUMBER.json with the label and properties of the
video, in an order shuffled once, so that other programs can stream them too.

To read shards over the network, copy them to a web server that supports range requests, or to a
bucket, and pack with --root https://HOST/FOLDER or s3://BUCKET/FOLDER; keep index.parquet on a
local disk.

Run the same command again to resume; shards are rewritten only if their videos have changed.
Exit status: 0, or 1 if a shard failed, 2 for a user error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tarfile
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_tools.command_line import (
    add_run_options,
    new_parser,
    number_between,
    parse_options,
    run_script,
)
from data_tools.file_status import file_fingerprint, has_size
from data_tools.step import Item, RunOptions, print_unfinished, run_step
from i3d_gn.files import atomic_output, check_output, check_regular, print_line, remove_unfinished
from i3d_gn.video_io.index import VideoIndex, write_packed_index

_FACTS = (
    *("video_id", "path", "label", "class_name", "num_frames", "fps"),
    *("duration_seconds", "width", "height"),
)
_TAR_OVERHEAD = 2048  # headers and padding of a video and its JSON


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = new_parser("pack", __doc__)
    parser.add_argument("index", type=Path, metavar="INDEX", help="index of video files")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the shards")
    parser.add_argument(
        "--shard-mib",
        type=number_between(0.001, 1e6),
        default=256,
        metavar="MIB",
        help="size of a shard (default: %(default)g)",
    )
    parser.add_argument(
        "--root",
        metavar="URL",
        help="folder or URL that the shards will be read from (default: OUTPUT)",
    )
    add_run_options(parser, timeout_seconds=3600)
    return pack_shards(**parse_options(parser, argv))


def pack_shards(
    index: Path, output: Path, *, shard_mib: float, root: str | None, run_options: RunOptions
) -> int:
    """Write the missing shards, then their index, and return the exit status.

    Raises:
        ValueError: For an index that cannot be read or lists a missing file, if its place is that
            of the new one, and if webdataset is not installed.
    """
    if importlib.util.find_spec("webdataset") is None:
        raise ValueError("packing needs webdataset; run `pip install 'i3d_gn[shards]'`")
    videos = VideoIndex.load(index)
    if videos.is_packed:
        raise ValueError(f"{index} lists packed videos already")
    check_output(output / "index.parquet", [index])
    fingerprints = []
    for i in range(len(videos)):
        try:
            fingerprints.append(file_fingerprint(videos.path_of(i)))
        except FileNotFoundError:
            raise ValueError(
                f"{videos.path_of(i)} in {index} no longer exists; index the videos again"
            ) from None
    facts = pq.read_table(index, columns=list(_FACTS)).to_pylist()
    plan = plan_shards([size for size, _ in fingerprints], shard_bytes=int(shard_mib * 2**20))
    items = []
    for name, members in plan.items():
        entries = [(i, str(videos.path_of(i)), facts[i]) for i in members]
        described = json.dumps([[entry, fingerprints[entry[0]]] for entry in entries])
        digest = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
        items.append(Item(key=name, fingerprint=digest, argument=(name, entries)))
    step = run_step(
        partial(_write_shard, output),
        items,
        name="pack",
        ledger_path=output / ".pack.ledger.jsonl",
        run_options=run_options,
        is_intact=lambda name, done: has_size(output / name, done["num_bytes"]),
        before=lambda names: remove_unfinished(output, names),
        unit="shard",
    )
    for name, reason in sorted(step.failures.items()):
        print_line(f"{output / name}: {reason}")
    if run_options.dry_run or step.left or step.failures:
        print_unfinished(step, run_options)
        return 1 if step.failures else 0

    shards = [""] * len(videos)
    places = np.zeros((len(videos), 2), np.int64)
    for name, members in plan.items():
        for i, place in zip(members, step.results[name]["places"], strict=True):
            shards[i], places[i] = name, place
    # Shards of an earlier run with another size do not belong to this index.
    for path in output.glob("shard-*.tar"):
        if path.name not in plan:
            path.unlink()
    write_packed_index(
        output / "index.parquet",
        index,
        shards=shards,
        offsets=places[:, 0].tolist(),
        sizes=places[:, 1].tolist(),
        root=str(output.absolute()) if root is None else root,
    )
    gigabytes = sum(done["num_bytes"] for done in step.results.values()) / 1e9
    print(
        f"{len(videos)} videos in {len(plan)} shards ({step.num_kept} already there), "
        f"{gigabytes:.2f} GB"
    )
    print_line(f"index:  {output / 'index.parquet'}")
    return 0


def plan_shards(sizes: list[int], *, shard_bytes: int) -> dict[str, list[int]]:
    """Assign videos, by index, to shards, in order; equal sizes give an equal plan."""
    plan: dict[str, list[int]] = {}
    filled = shard_bytes
    for i in np.random.default_rng(0).permutation(len(sizes)).tolist():
        if filled + sizes[i] > shard_bytes or not plan:
            plan[f"shard-{len(plan):05d}.tar"] = []
            filled = 0
        plan[f"shard-{len(plan) - 1:05d}.tar"].append(i)
        filled += sizes[i] + _TAR_OVERHEAD
    return plan


def _write_shard(
    output: Path, shard: tuple[str, list[tuple[int, str, dict[str, Any]]]]
) -> dict[str, Any]:
    """Write one shard; `places` are (offset, number of bytes) of its videos, in order."""
    # Imported here because it imports torch, which no other step needs.
    from webdataset.writer import TarWriter  # noqa: PLC0415

    name, entries = shard
    with atomic_output(output / name) as temporary:
        # Times, owners and modes are fixed, so that the same videos give the same bytes.
        with (
            open(temporary, "wb") as stream,
            TarWriter(stream, encoder=False, mtime=0.0, compress=False) as writer,
        ):
            for i, path, facts in entries:
                check_regular(path)
                extension = PurePosixPath(path).suffix[1:].lower()
                writer.write(
                    {
                        "__key__": f"{i:08d}",
                        "json": json.dumps(facts, ensure_ascii=False).encode(),
                        extension: Path(path).read_bytes(),
                    }
                )
        with tarfile.open(temporary, "r:") as tar:
            places = [
                [member.offset_data, member.size]
                for member in tar
                if not member.name.endswith(".json")
            ]
        assert len(places) == len(entries)
        num_bytes = temporary.stat().st_size
    return {"num_bytes": num_bytes, "places": places}


if __name__ == "__main__":
    run_script(__file__)
