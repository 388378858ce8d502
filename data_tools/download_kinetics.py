"""Download Kinetics-400 as the CVDF hosts it: archives, replacements and annotations.

Below the base URL lie
  annotations/SPLIT.csv                   the official lists
  SPLIT/k400_SPLIT_path.txt               the URLs of that split's archives, one a line
  replacement_for_corrupted_k400.tgz      better copies of some 1,400 training videos
Everything goes to the same place below OUTPUT, the replacements to OUTPUT/replacement. As released
these are 242 + 20 + 39 archives, some 450 GB in all.

A download that breaks off is continued where it stopped, by this run or the next; a file gets its
name once it is complete and agrees with the size and MD5 that the server tells. Files that you have
already, from wget for instance, are checked and completed if you put them in place.

With another --base-url, archives listed under the official one are taken from there.
OUTPUT/download.report.json lists every file with its size, how it was checked, or why it is not
there. Exit status: 0 if all files are there, 1 if some are not, 2 for wrong arguments.
"""

from __future__ import annotations

import tempfile
import urllib.parse
from contextlib import nullcontext
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.command_line import (
    add_execution_options,
    new_parser,
    positive_float,
    positive_int,
    run_command,
    run_script,
    take_execution,
)
from data_tools.files import write_json
from data_tools.http_download import download
from data_tools.processes import ItemFailure
from data_tools.step import Execution, Item, StepResult, print_unfinished, run_step

OFFICIAL_BASE_URL = "https://s3.amazonaws.com/kinetics/400"
SPLITS = ("train", "val", "test")
REPLACEMENTS = "replacement_for_corrupted_k400.tgz"
_MOST_SHOWN = 10


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = new_parser("download_kinetics", __doc__)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the archives")
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=SPLITS,
        default=["train", "val"],
        help="(default: train val)",
    )
    parser.add_argument(
        "--base-url",
        default=OFFICIAL_BASE_URL,
        metavar="URL",
        help="where the release lies (default: %(default)s)",
    )
    parser.add_argument(
        "--attempts",
        type=positive_int,
        default=8,
        metavar="N",
        help="give up a file after so many failures without progress (default: %(default)s)",
    )
    parser.add_argument(
        "--stall-seconds",
        type=positive_float,
        default=60,
        metavar="S",
        help="give up a connection that brings nothing for so long (default: %(default)g)",
    )
    add_execution_options(parser, timeout_seconds=24 * 3600)
    arguments = parser.parse_args(argv)
    execution = take_execution(arguments)
    return run_command(
        "download_kinetics", lambda: download_kinetics(**vars(arguments), execution=execution)
    )


def download_kinetics(
    output: Path,
    *,
    splits: list[str],
    base_url: str,
    attempts: int,
    stall_seconds: float,
    execution: Execution,
) -> int:
    """Download what is missing of the release; the exit status.

    Raises ``ValueError`` if a split's list of archives cannot be had.
    """
    output = output.absolute()
    base_url = base_url.rstrip("/")
    fetch = partial(_fetch, output, attempts=attempts, stall_seconds=stall_seconds)
    files = {f"annotations/{split}.csv": f"{base_url}/annotations/{split}.csv" for split in splits}
    if "train" in splits:
        files[f"replacement/{REPLACEMENTS}"] = f"{base_url}/{REPLACEMENTS}"
    # A dry run has to know the lists, but leaves nothing behind.
    with tempfile.TemporaryDirectory() if execution.dry_run else nullcontext(output) as lists:
        for split in splits:
            path_list = Path(lists, split, f"k400_{split}_path.txt")
            url = f"{base_url}/{split}/{path_list.name}"
            try:
                download(url, path_list, attempts=attempts, stall_seconds=stall_seconds)
            except ItemFailure as failure:
                raise ValueError(f"{url}: {failure}; check --base-url") from failure
            for archive in archive_urls(path_list, base_url=base_url):
                name = PurePosixPath(urllib.parse.urlsplit(archive).path).name
                files[f"{split}/{name}"] = archive
    step = run_step(
        fetch,
        [Item(key=name, fingerprint=url, argument=(url, name)) for name, url in files.items()],
        name="download",
        ledger_path=output / ".download.ledger.jsonl",
        execution=execution,
        is_intact=lambda name, done: _size_of(output / name) == done["num_bytes"],
        unit="file",
    )
    if execution.dry_run or step.left:
        print_unfinished(step, execution)
    if execution.dry_run:
        return 0
    _report(output, files, step, execution)
    return 1 if step.failures else 0


def archive_urls(path_list: Path, *, base_url: str) -> list[str]:
    """The archives of a split from its list: full URLs, or names beside the list.

    Raises ``ValueError`` for a list without archives, as an error page has none.
    """
    split = path_list.parent.name
    urls = []
    for line in path_list.read_text("utf-8", errors="replace").split():
        if line.startswith(f"{OFFICIAL_BASE_URL}/"):
            urls.append(base_url + line.removeprefix(OFFICIAL_BASE_URL))
        elif "://" in line:
            urls.append(line)
        else:
            urls.append(f"{base_url}/{split}/{line}")
    if not urls or not all(url.endswith((".tar.gz", ".tgz", ".tar")) for url in urls):
        raise ValueError(
            f"{path_list} is no list of archives; delete it, check --base-url and run again"
        )
    return urls


def _fetch(
    output: Path, file: tuple[str, str], *, attempts: int, stall_seconds: float
) -> dict[str, Any]:
    url, name = file
    done = download(url, output / name, attempts=attempts, stall_seconds=stall_seconds)
    return {"num_bytes": done.num_bytes, "checked": done.checked}


def _report(output: Path, files: dict[str, str], step: StepResult, execution: Execution) -> None:
    gigabytes = sum(done["num_bytes"] for done in step.results.values()) / 1e9
    print(
        f"{output}: {len(step.results) - step.num_kept} files downloaded, {step.num_kept} there "
        f"already, {len(step.failures)} failed; {gigabytes:.2f} GB"
    )
    for how in ("md5", "size", "nothing"):
        count = sum(done["checked"] == how for done in step.results.values())
        if count:
            print(f"    checked by {how}: {count}")
    for name, reason in sorted(step.failures.items())[:_MOST_SHOWN]:
        print(f"    {name}: {reason}")
    if len(step.failures) > _MOST_SHOWN:
        print(f"    ... and {len(step.failures) - _MOST_SHOWN} more")
    part = "" if execution.shard is None else f".{execution.shard}"
    report = output / f"download{part}.report.json"
    write_json(
        report,
        {
            "num_downloaded": len(step.results) - step.num_kept,
            "num_kept": step.num_kept,
            "num_failed": len(step.failures),
            "num_bytes": sum(done["num_bytes"] for done in step.results.values()),
            "failed": [
                {"path": name, "url": files[name], "reason": reason}
                for name, reason in sorted(step.failures.items())
            ],
            "files": [
                {"path": name, "url": files[name], **done}
                for name, done in sorted(step.results.items())
            ],
        },
    )
    print(f"report: {report}")


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    run_script(__file__)
