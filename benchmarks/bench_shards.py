"""Time per training clip from tar shards compared with separate files, on one thread.

    python benchmarks/bench_shards.py INDEX [--clips 200]

Protocol: the videos of INDEX, separate files, are packed into shards in a temporary folder. The
same clips of 32 frames at stride 2, crop 224, are decoded from both in turn, after a warm-up with
each video. All files are then in the page cache: the comparison does not depend on the disk.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from data_tools import pack_shards
from i3d_gn.data.batches import Sample, Stream
from i3d_gn.data.videos import RandomClips
from i3d_gn.video_io.index import VideoIndex


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("index", type=Path)
    parser.add_argument("--clips", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        packed = ["--shard-mib", "256", "--workers", "1"]
        assert pack_shards.main([str(arguments.index), folder, *packed]) == 0
        separate = clips_of(arguments.index)
        shards = clips_of(Path(folder, "index.parquet"))
        seconds = {"separate files": [], "shards": []}
        for position in range(-len(separate), arguments.clips):
            sample = Sample(abs(position), position % len(separate))
            for name, clips in (("separate files", separate), ("shards", shards)):
                started = time.perf_counter()
                assert not clips[[sample]].broken
                if position >= 0:
                    seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        print(f"{name}: median {1000 * statistics.median(values):.2f} ms per clip")
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"shards / separate files: {statistics.median(ratios):.3f} (median over clips)")
    return 0


def clips_of(index: Path) -> RandomClips:
    return RandomClips(
        VideoIndex.load(index),
        num_frames=32,
        stride=2,
        short_side=(256, 320),
        crop_size=224,
        flip_probability=0.5,
        backend="pyav",
        seed=0,
        stream=Stream.TRAIN_CLIP,
    )


if __name__ == "__main__":
    sys.exit(main())
