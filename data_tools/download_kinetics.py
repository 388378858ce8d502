"""Download Kinetics-400 from the CVDF: archives, replacements and annotations.

Layout below the base URL:
  annotations/SPLIT.csv                   official lists
  SPLIT/k400_SPLIT_path.txt               URLs of the archives of a split, one per line
  replacement_for_corrupted_k400.tgz      better copies of about 1,400 training videos
Files have the same layout below OUTPUT; replacements go to OUTPUT/replacement. The release has
242 (train) + 20 (val) + 39 (test) archives, about 450 GB.

Interrupted downloads resume where they stopped. A file gets its final name once it is complete and
matches the size and MD5 sent by the server. Files you already have, e.g. from wget, are checked and
completed if you put them in their place.

With another --base-url, archives listed under the official URL are downloaded from there instead.
OUTPUT/download.report.json lists every file with its size and how it was checked, or why it could
not be downloaded. Exit status: 0 if all files are complete, 1 if not, 2 for a user error.
"""

from __future__ import annotations

import tempfile
import urllib.parse
from contextlib import nullcontext
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.command_line import (
    add_run_options,
    new_parser,
    parse_options,
    positive_int,
    run_script,
    seconds,
)
from data_tools.file_status import has_size
from data_tools.http_download import download
from data_tools.printing import print_first
from data_tools.processes import ItemFailure
from data_tools.step import Item, RunOptions, StepResult, print_unfinished, run_step
from i3d_gn.files import print_line, write_json

OFFICIAL_BASE_URL = "https://s3.amazonaws.com/kinetics/400"
SPLITS = ("train", "val", "test")
REPLACEMENTS = "replacement_for_corrupted_k400.tgz"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = new_parser("download", __doc__)
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
        help="URL of the release (default: %(default)s)",
    )
    parser.add_argument(
        "--attempts",
        type=positive_int,
        default=8,
        metavar="N",
        help="give up on a file after N failures without progress (default: %(default)s)",
    )
    parser.add_argument(
        "--stall-seconds",
        type=seconds,
        default=60,
        metavar="S",
        help="drop a connection that sends nothing for S seconds (default: %(default)g)",
    )
    add_run_options(parser, timeout_seconds=24 * 3600)
    return download_kinetics(**parse_options(parser, argv))


def download_kinetics(
    output: Path,
    *,
    splits: list[str],
    base_url: str,
    attempts: int,
    stall_seconds: float,
    run_options: RunOptions,
) -> int:
    """Download the missing files of the release and return the exit status.

    Raises:
        ValueError: If the list of archives of a split cannot be downloaded.
    """
    output = output.absolute()
    base_url = base_url.rstrip("/")
    fetch = partial(_fetch, output, attempts=attempts, stall_seconds=stall_seconds)
    files = {f"annotations/{split}.csv": f"{base_url}/annotations/{split}.csv" for split in splits}
    if "train" in splits:
        files[f"replacement/{REPLACEMENTS}"] = f"{base_url}/{REPLACEMENTS}"
    # A dry run needs the lists too, but leaves no files.
    with tempfile.TemporaryDirectory() if run_options.dry_run else nullcontext(output) as lists:
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
        run_options=run_options,
        is_intact=lambda name, done: has_size(output / name, done["num_bytes"]),
        unit="file",
    )
    if run_options.dry_run or step.left:
        print_unfinished(step, run_options)
    if run_options.dry_run:
        return 0
    _report(output, files, step, run_options)
    return 1 if step.failures else 0


def archive_urls(path_list: Path, *, base_url: str) -> list[str]:
    """URLs of the archives in the list of a split, which holds URLs or names beside the list.

    Raises:
        ValueError: For a list without archives, such as an error page.
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
            f"{path_list} is not a list of archives; delete it, check --base-url and run again"
        )
    return urls


def _fetch(
    output: Path, file: tuple[str, str], *, attempts: int, stall_seconds: float
) -> dict[str, Any]:
    url, name = file
    done = download(url, output / name, attempts=attempts, stall_seconds=stall_seconds)
    return {"num_bytes": done.num_bytes, "checked": done.checked}


def _report(output: Path, files: dict[str, str], step: StepResult, run_options: RunOptions) -> None:
    gigabytes = sum(done["num_bytes"] for done in step.results.values()) / 1e9
    print_line(
        f"{output}: {len(step.results) - step.num_kept} files downloaded, {step.num_kept} already "
        f"there, {len(step.failures)} failed; {gigabytes:.2f} GB"
    )
    for how in ("md5", "size", "nothing"):
        count = sum(done["checked"] == how for done in step.results.values())
        if count:
            print(f"    checked by {how}: {count}")
    print_first([f"{name}: {reason}" for name, reason in sorted(step.failures.items())])
    part = "" if run_options.shard is None else f".{run_options.shard}"
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
    print_line(f"report: {report}")


if __name__ == "__main__":
    run_script(__file__)
