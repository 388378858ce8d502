"""A cluster of two nodes on this machine does what one process does, also when it loses a node."""

import json
import os
import subprocess
import sys

import pytest

from data_tools import resize_videos

pytest.importorskip("ray", reason="needs Ray (pip install 'i3d_gn[ray]')")

# In a process of its own: Ray leaves threads and sockets behind.
ON_TWO_NODES = """
import subprocess, sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from data_tools import resize_videos
from data_tools.ray_engine import map_on_ray

source, output, kill = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "kill"
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
second = cluster.add_node(num_cpus=1)
ledger = output / ".resize.ledger.jsonl"

def lose_a_node():
    while not ledger.exists() or ledger.read_bytes().count(b"\\n") < 4:
        time.sleep(0.005)
    cluster.remove_node(second, allow_graceful=False)
    print("lost a node after", ledger.read_bytes().count(b"\\n"), flush=True)

# What a task raises is told as it is, not as a loss.
unsendable = map_on_ray(lambda item: item, [0], address=cluster.address, timeout_seconds=60)
print(list(unsendable), flush=True)
if kill:
    threading.Thread(target=lose_a_node).start()
arguments = [source, str(output), "--preset", "veryslow", "--engine", "ray"]
# As a script, whose functions are those of __main__.
command = [sys.executable, resize_videos.__file__, *arguments, "--ray-address", cluster.address]
status = subprocess.run(command).returncode
cluster.shutdown()
sys.exit(status)
"""


def on_two_nodes(source, output, mode):
    return subprocess.run(
        [sys.executable, "-c", ON_TWO_NODES, source, output, mode],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        check=True,
    ).stdout


@pytest.fixture(scope="module")
def source(motion_clips, tmp_path_factory):
    """40 videos, one of them broken."""
    folder = tmp_path_factory.mktemp("source")
    clip = next(motion_clips.rglob("*.mp4"))
    for i in range(39):
        os.link(clip, folder / f"{i}.mp4")
    (folder / "broken.mp4").write_text("no video " * 100)
    return folder


@pytest.mark.slow
def test_a_lost_node_costs_nothing(source, tmp_path):
    output, alone = tmp_path / "ray", tmp_path / "alone"
    text = on_two_nodes(source, output, "kill")
    assert "kind='error'" in text
    assert "Can't pickle" in text
    assert "lost a node after" in text
    assert "39 videos written, 0 there already, 1 failed" in text
    options = ["--preset", "veryslow", "--workers", "2"]
    assert resize_videos.main([str(source), str(alone), *options]) == 0
    names = sorted(path.name for path in alone.glob("*.mp4"))
    assert len(names) == 39
    assert sorted(path.name for path in output.glob("*.mp4")) == names
    for name in names:
        assert (output / name).read_bytes() == (alone / name).read_bytes()
    reports = [json.loads((o / "resize.report.json").read_text()) for o in (output, alone)]
    assert reports[0] == reports[1]
    # Each was recorded once: nothing was done twice, apart from what the lost node had in hand.
    lines = (output / ".resize.ledger.jsonl").read_text().splitlines()
    assert len({json.loads(line)[0] for line in lines}) == len(lines) == 39
    # What was done on a cluster is done here too.
    assert resize_videos.main([str(source), str(output), *options]) == 0
    assert json.loads((output / "resize.report.json").read_text())["num_kept"] == 39


def test_no_cluster(source, tmp_path, capsys):
    arguments = ["--engine", "ray", "--ray-address", "127.0.0.1:1"]
    assert resize_videos.main([str(source), str(tmp_path / "out"), *arguments]) == 2
    assert "there is no Ray cluster at 127.0.0.1:1" in capsys.readouterr().err
