"""Cut the spoken digits out of GRID sentences: 24 frames around the middle of each digit.

    python benchmarks/make_digit_clips.py data/grid_digits data/digit_clips

INPUT has videos/, train.csv and val.csv (path,label), and words.csv with the frames of the digit
in each sentence (video_id, digit_start_frame, digit_end_frame). All clips have the same length, so
that it says nothing about the class; where the sentence ends within 12 frames of the middle of the
digit, the clip starts earlier. Writes OUTPUT/{train,val}/<digit>/<video_id>.mp4. Existing clips are
kept.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from data_tools.make_motion_clips import write_clip
from i3d_gn.video_io.decode import decode_frames, probe_video

NUM_FRAMES = 24  # about a second; a digit takes 6 to 9 frames


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()

    words = {row["video_id"]: row for row in _read(options.input / "words.csv")}
    for split in ("train", "val"):
        for row in _read(options.input / f"{split}.csv"):
            source = options.input / row["path"]
            destination = options.output / split / row["label"] / source.name
            if destination.exists():
                continue
            word = words[source.stem]
            middle = (int(word["digit_start_frame"]) + int(word["digit_end_frame"])) // 2
            last_start = probe_video(source).num_frames - NUM_FRAMES
            start = min(max(middle - NUM_FRAMES // 2, 0), last_start)
            frames = decode_frames(source, range(start, start + NUM_FRAMES))
            destination.parent.mkdir(parents=True, exist_ok=True)
            write_clip(destination, frames)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
