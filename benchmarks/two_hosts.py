"""Train on two hosts, which are network namespaces of this machine, with torchrun.

The result must equal that of one process with the same global batch. If the link is cut or a rank
stops, the others must end within `train.rank_timeout_minutes` and the 15 seconds in which the lost
rank is identified, and name it. Needs Linux, root and iproute2.

    python benchmarks/two_hosts.py RECORD.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from reliability import FaultError, append, read_record, table
from soak_runs import Run, Soak, children, same_run

from i3d_gn.engine.checkpoint import list_checkpoints

HOSTS = ("i3d-gn-a", "i3d-gn-b")
LINKS = ("i3dgn-a", "i3dgn-b")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
TIMEOUT_SECONDS = 12 + 15 + 30  # the limit of the config, identification, and a slow machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    arguments = parser.parse_args()
    if os.geteuid() or shutil.which("ip") is None:
        sys.exit("skipped: network namespaces need root and iproute2")
    with tempfile.TemporaryDirectory() as folder, two_hosts():
        soak = Soak(Path(folder), time_limit=600.0)
        for kind, check in (
            ("two hosts, undisturbed", undisturbed),
            ("two hosts, link cut", link_cut),
            ("two hosts, rank stopped", rank_stopped),
        ):
            outcome, detail = "survived", ""
            try:
                detail = check(soak)
            except FaultError as error:
                outcome, detail = error.outcome, str(error)
            append(arguments.record, {"kind": kind, "outcome": outcome, "detail": detail})
    faults = read_record(arguments.record)
    print(table(faults))
    return int(any(fault["outcome"] != "survived" for fault in faults))


@contextlib.contextmanager
def two_hosts() -> Iterator[None]:
    """Two namespaces with a link between them."""
    for host in HOSTS:
        subprocess.run(["ip", "netns", "add", host], check=True)
    try:
        ip(f"link add {LINKS[0]} netns {HOSTS[0]} type veth peer name {LINKS[1]} netns {HOSTS[1]}")
        for host, link, address in zip(HOSTS, LINKS, ADDRESSES, strict=True):
            ip(f"-n {host} address add {address}/24 dev {link}")
            set_link(host, link, "up")
            set_link(host, "lo", "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], check=False)


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


def set_link(host: str, link: str, state: str) -> None:
    ip(f"-n {host} link set {link} {state}")


class Launch:
    """torchrun on both hosts, with one rank each."""

    def __init__(self, run: Run) -> None:
        self.logs = [run.folder / f"{host}.log" for host in HOSTS]
        self.processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run",
                 "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1",
                 f"--master-addr={ADDRESSES[0]}", "--master-port=29500",
                 "-m", "i3d_gn", "train", str(run.folder / "config.yaml")],
                env={**os.environ, "GLOO_SOCKET_IFNAME": link}, start_new_session=True,
                stdout=log.open("w"), stderr=subprocess.STDOUT,
            )
            for rank, (host, link, log) in enumerate(zip(HOSTS, LINKS, self.logs, strict=True))
        ]  # fmt: skip

    def output(self, host: int) -> str:
        """What the launcher and the rank of a host have printed."""
        return self.logs[host].read_text(errors="replace")

    def wait(self, seconds: float) -> list[int]:
        """The statuses, once both have ended; kills them if they do not in time."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(0.0, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            outputs = [self.output(host)[-300:] for host in range(2)]
            raise FaultError("hung", f"after {seconds:g} s: {outputs}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """End launchers and ranks, also stopped ones."""
        for process in self.processes:
            for pid in [*rank_processes(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def rank_processes(launcher: int) -> list[int]:
    """The ranks that a launcher has started: `ip netns exec` becomes torchrun."""
    return children(launcher)


def finish(run: Run) -> None:
    launch = Launch(run)
    if any(launch.wait(600)):
        raise FaultError("lost", f"{launch.output(0)[-400:]} {launch.output(1)[-400:]}")


def started(soak: Soak) -> tuple[Run, Launch]:
    """A run that has saved its first checkpoint, with many steps to come."""
    run = soak.run("round-gn")
    config = run.folder / "config.yaml"
    text = config.read_text().replace("  steps: 12\n", "  steps: 100000\n")
    config.write_text(text.replace("validate_every: 4", "validate_every: 100000"))
    launch = Launch(run)
    while not list_checkpoints(run.checkpoints):
        if launch.processes[0].poll() is not None:
            launch.kill()
            raise FaultError("lost", launch.output(0)[-600:])
        time.sleep(0.05)
    return run, launch


def undisturbed(soak: Soak) -> str:
    """Parameters and optimizer bit for bit as in one process.

    Means over the validation videos are sums over ranks, in another order.
    """
    run = soak.run("hosts-gn")
    finish(run)
    if difference := same_run(run, soak.reference("gn"), log_tolerance=1e-6):
        raise FaultError("silently wrong", difference)
    return "parameters and optimizer equal those of one process"


def link_cut(soak: Soak) -> str:
    """Each host can only know that it has lost the other."""
    run, launch = started(soak)
    set_link(HOSTS[1], LINKS[1], "down")
    begin = time.monotonic()
    try:
        launch.wait(TIMEOUT_SECONDS)
        seconds = time.monotonic() - begin
    finally:
        set_link(HOSTS[1], LINKS[1], "up")
    named = [f"lost contact with rank {1 - host}" in launch.output(host) for host in range(2)]
    return ended(run, launch, named, seconds)


def rank_stopped(soak: Soak) -> str:
    """A rank that no longer runs."""
    run, launch = started(soak)
    (rank,) = rank_processes(launch.processes[1].pid)
    os.kill(rank, signal.SIGSTOP)
    begin = time.monotonic()
    status = launch.processes[0].wait(TIMEOUT_SECONDS)
    seconds = time.monotonic() - begin
    os.kill(rank, signal.SIGKILL)
    launch.wait(60)
    named = "lost contact with rank 1" in launch.output(0)
    return ended(run, launch, [named and status != 0], seconds)


def ended(run: Run, launch: Launch, named: list[bool], seconds: float) -> str:
    if not all(named):
        outputs = [launch.output(host)[-500:] for host in range(2)]
        raise FaultError("lost", f"rank not named after {seconds:.0f} s: {named} {outputs}")
    return f"named after {seconds:.0f} s; newest: {list_checkpoints(run.checkpoints)[-1].name}"


if __name__ == "__main__":
    sys.exit(main())
