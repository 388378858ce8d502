"""Pack the videos of an index into tar shards, for storage that dislikes many small files.

OUTPUT gets shard-00000.tar, shard-00001.tar, ... and index.parquet, which takes the place of INDEX
in training and testing: the same seed gives the same clips as from loose files. Shards follow the
WebDataset convention, NUMBER.mp4 beside NUMBER.json with its label and facts, in an order shuffled
once, so that other programs can stream them too.

To read shards over the network, copy the folder to a web server that knows ranges, or to a bucket,
and pack with --root https://HOST/FOLDER or s3://BUCKET/FOLDER; keep index.parquet on a local disk.

After a stop the same command continues; shards are rewritten only if their videos have changed.
Exit status: 0, or 1 if a shard failed, 2 for wrong arguments.
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
    add_execution_options,
    new_parser,
    positive_float,
    run_command,
    run_script,
    take_execution,
)
from data_tools.files import atomic_output, remove_unfinished
from data_tools.ledger import file_fingerprint
from data_tools.step import Execution, Item, print_unfinished, run_step
from i3d_gn.video_io.index import VideoIndex, write_packed_index

_FACTS = (
    *("video_id", "path", "label", "class_name", "num_frames", "fps"),
    *("duration_seconds", "width", "height"),
)
_TAR_OVERHEAD = 2048  # headers and padding of a video and its JSON


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = new_parser("pack_shards", __doc__)
    parser.add_argument("index", type=Path, metavar="INDEX", help="the index of loose videos")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the shards")
    parser.add_argument(
        "--shard-mib",
        type=positive_float,
        default=256,
        metavar="MIB",
        help="size of a shard (default: %(default)g)",
    )
    parser.add_argument(
        "--root",
        metavar="URL",
        help="where the shards will be read from (default: OUTPUT)",
    )
    add_execution_options(parser, timeout_seconds=3600)
    arguments = parser.parse_args(argv)
    execution = take_execution(arguments)
    return run_command("pack_shards", lambda: pack_shards(**vars(arguments), execution=execution))


def pack_shards(
    index: Path, output: Path, *, shard_mib: float, root: str | None, execution: Execution
) -> int:
    """Write what is missing of the shards, then their index; the exit status.

    Raises ``ValueError`` for an index that cannot be read or names a file that is not there, and
    without webdataset.
    """
    if importlib.util.find_spec("webdataset") is None:
        raise ValueError("packing needs webdataset; install it by `pip install 'i3d_gn[shards]'`")
    videos = VideoIndex.load(index)
    if videos.is_packed:
        raise ValueError(f"{index} is of packed videos already")
    fingerprints = []
    for i in range(len(videos)):
        try:
            fingerprints.append(file_fingerprint(videos.path_of(i)))
        except FileNotFoundError:
            raise ValueError(
                f"{videos.path_of(i)} of {index} is not there any more; index the videos again"
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
        execution=execution,
        is_intact=lambda name, done: _size_of(output / name) == done["num_bytes"],
        before=lambda names: remove_unfinished(output, set(names)) if names else None,
        unit="shard",
    )
    for name, reason in sorted(step.failures.items()):
        print(f"{output / name}: {reason}")
    if execution.dry_run or step.left or step.failures:
        print_unfinished(step, execution)
        return 1 if step.failures else 0

    shards = [""] * len(videos)
    places = np.zeros((len(videos), 2), np.int64)
    for name, members in plan.items():
        for i, place in zip(members, step.results[name]["places"], strict=True):
            shards[i], places[i] = name, place
    # Those of an earlier packing into other sizes would be taken for part of this one.
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
        f"{len(videos)} videos in {len(plan)} shards ({step.num_kept} written before), "
        f"{gigabytes:.2f} GB\nindex:  {output / 'index.parquet'}"
    )
    return 0


def plan_shards(sizes: list[int], *, shard_bytes: int) -> dict[str, list[int]]:
    """Which videos, by number, go to which shard in which order: the same for the same sizes."""
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
    """Write one shard; ``places`` are (first byte, number of bytes) of its videos, in order."""
    # Late, since it imports torch, which the processes of no other step need.
    from webdataset.writer import TarWriter  # noqa: PLC0415

    name, entries = shard
    with atomic_output(output / name) as temporary:
        # Times, owners and modes are fixed, so that the same videos make the same bytes.
        with (
            open(temporary, "wb") as stream,
            TarWriter(stream, encoder=False, mtime=0.0, compress=False) as writer,
        ):
            for i, path, facts in entries:
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


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    run_script(__file__)
