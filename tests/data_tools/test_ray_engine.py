"""A Ray cluster of two local nodes gives the result of one process, even if it loses a node."""

import json
import os
import subprocess
import sys

import pytest

from i3d_gn import cli

pytest.importorskip("ray", reason="needs Ray (pip install 'i3d_gn[ray]')")

# In a separate process, since Ray leaves threads and sockets open.
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

# An exception of a task is reported as such, not as a lost item.
unsendable = map_on_ray(lambda item: item, [0], address=cluster.address, timeout_seconds=60)
print(list(unsendable), flush=True)
if kill:
    threading.Thread(target=lose_a_node).start()
arguments = [source, str(output), "--preset", "veryslow", "--engine", "ray"]
# As a script, whose functions would otherwise belong to __main__.
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
def test_lost_node_loses_no_items(source, tmp_path):
    output, local = tmp_path / "ray", tmp_path / "local"
    text = on_two_nodes(source, output, "kill")
    assert "kind='error'" in text
    assert "Can't pickle" in text
    assert "lost a node after" in text
    assert "39 videos written, 0 already there, 1 failed" in text
    options = ["--preset", "veryslow", "--workers", "2"]
    assert cli.main(["resize", str(source), str(local), *options]) == 0
    names = sorted(path.name for path in local.glob("*.mp4"))
    assert len(names) == 39
    assert sorted(path.name for path in output.glob("*.mp4")) == names
    for name in names:
        assert (output / name).read_bytes() == (local / name).read_bytes()
    reports = [json.loads((o / "resize.report.json").read_text()) for o in (output, local)]
    assert reports[0] == reports[1]
    # Each was recorded once; only items in progress on the lost node ran twice.
    lines = (output / ".resize.ledger.jsonl").read_text().splitlines()
    assert len({json.loads(line)[0] for line in lines}) == len(lines) == 39
    # A local run accepts the results of the cluster.
    assert cli.main(["resize", str(source), str(output), *options]) == 0
    assert json.loads((output / "resize.report.json").read_text())["num_kept"] == 39


def test_no_cluster(source, tmp_path, capsys):
    arguments = ["--engine", "ray", "--ray-address", "127.0.0.1:1"]
    assert cli.main(["resize", str(source), str(tmp_path / "out"), *arguments]) == 2
    assert "no Ray cluster at 127.0.0.1:1" in capsys.readouterr().err
