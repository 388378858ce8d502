"""Videos with damage that timestamps or streams show, and benchmarks/mutate_videos.py in short."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from i3d_gn.video_io.decode import decode_frames
from i3d_gn.video_io.decode_pyav import demux_video, open_video
from i3d_gn.video_io.frame_table import _goes_back

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("moved_to", [1, 3])
def test_packet_shown_before_an_earlier_keyframe_is_not_trusted(
    encode_video, decode_sequentially, tmp_path, moved_to
):
    """All frames from there on would be numbered one too high."""
    path = encode_video(tmp_path / "a.mkv", options={"g": "12", "bf": "0"})
    with av.open(str(path)) as reader:
        packet = [p for p in reader.demux(video=0) if p.size][30]
    content = bytearray(path.read_bytes())
    # Before the data of a block: its time relative to the cluster (int16, ms), and a byte of flags.
    end = content.index(bytes(packet)) - 1
    time = int.from_bytes(content[end - 2 : end], "big", signed=True) - (30 - moved_to) * 40 - 20
    content[end - 2 : end] = time.to_bytes(2, "big", signed=True)
    path.write_bytes(content)
    with open_video(path) as (container, stream):
        table, _ = demux_video(path, container, stream, keep=False)
    assert table.fallback_reason is not None
    frames = decode_sequentially(path)
    for index in (5, 20, 45):
        assert np.array_equal(decode_frames(path, [index])[0], frames[index])


@pytest.mark.parametrize(
    ("pts", "keys", "expected"),
    [
        ([0, 3, 1, 2, 6, 4, 5], [0], False),
        ([0, 1, 2, 5, 3, 4], [0, 3], False),  # leading pictures
        ([0, 1, 2, 5, 3, 4, 8, 6, 7], [0, 3, 6], False),
        ([0, 1, 2, 5, 3, 4, 9, 4.5, 7], [0, 3, 6], True),  # before the keyframe before
        ([0, *range(2, 18), 1], [0], False),  # as many frames wait as the buffer holds
        ([0, *range(2, 19), 1], [0], True),
        ([0, 1, 2], [], False),  # an edit list hides the keyframe
        ([*range(1, 19), 0], [], True),
    ],
)
def test_how_far_timestamps_may_go_back(pts, keys, expected):
    pts = np.array(pts)
    frame = np.argsort(np.argsort(pts))
    assert _goes_back(pts, frame, np.isin(np.arange(len(pts)), keys)) is expected


def test_stream_that_begins_in_the_middle_is_ignored(encode_video, monkeypatch, tmp_path):
    """PyAV lists the streams when it opens the file, and raises IndexError for later ones."""
    path = encode_video(tmp_path / "a.ts", num_frames=30)
    expected = decode_frames(path, [3, 25])
    demux, raised = av.container.InputContainer.demux, []

    class Interrupting:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def demux(self, stream):
            for number, packet in enumerate(demux(self.container, stream)):
                yield packet
                if number == 10 and len(raised) < 2:
                    raised.append(number)
                    raise IndexError("list index out of range")

    from i3d_gn.video_io import decode_pyav

    packets = decode_pyav._packets
    monkeypatch.setattr(
        decode_pyav,
        "_packets",
        lambda path, container, stream, **options: packets(
            path, Interrupting(container), stream, **options
        ),
    )
    assert np.array_equal(decode_frames(path, [3, 25]), expected)
    assert len(raised) == 2


@pytest.mark.slow
def test_mutated_videos(tmp_path):
    """Two files of each seed, with PyAV: no wrong frame, no frame lost, nothing hangs."""
    record = tmp_path / "record.jsonl"
    command = [sys.executable, REPOSITORY / "benchmarks" / "mutate_videos.py", record, "--files=60"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    faults = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(faults) == 180
    for fault in faults:
        assert fault["outcome"] == "survived", fault
    assert "| truncated, pyav | 30 | 30 | 0 | 0 | 0 |" in done.stdout
