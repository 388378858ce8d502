"""Extract the videos of downloaded archives and replace corrupted ones.

Every .tar, .tar.gz and .tgz below ARCHIVES is extracted to the same folder below OUTPUT. Archives
called replacement* are extracted first; each of their videos takes the place and name of a video in
another archive with the same 11-character YouTube id.

Only video files are written, and only below OUTPUT: links, devices and paths that lead outside, or
through a link in OUTPUT that does, are refused and reported. An archive fails if it expands to more
than 100 times its size (and 1 GiB). A video appears only when complete. To resume, run the same
command again: finished archives are skipped, and so are existing videos of the others. From a
damaged archive the videos before the damage are extracted, and it is reported: delete it and
download it again.

OUTPUT/extract.report.json has the counts, refused members, failed archives and replaced videos.
Exit status: 0, or 1 if an archive failed, 2 for a user error.
"""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import tarfile
import zlib
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.command_line import (
    add_run_options,
    new_parser,
    parse_options,
    run_script,
)
from data_tools.file_status import file_fingerprint
from data_tools.listed_videos import split_segment_name
from data_tools.printing import print_first
from data_tools.processes import ItemFailure
from data_tools.safe_tar import check_expansion, open_tar, why_refused
from data_tools.step import Item, RunOptions, StepResult, print_unfinished, run_step
from i3d_gn.files import atomic_output, print_line, remove_unfinished, write_json
from i3d_gn.video_io.find_videos import is_video_name

_ENDINGS = (".tar", ".tar.gz", ".tgz")
# Errors of a file system that concern the name of one file: too long, not representable, or taken
# by a folder, or below a file.
_BAD_NAME = frozenset({errno.ENAMETOOLONG, errno.EILSEQ, errno.EEXIST, errno.ENOTDIR, errno.EISDIR})


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = new_parser("extract", __doc__)
    parser.add_argument("archives", type=Path, metavar="ARCHIVES", help="folder of archives")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the videos")
    add_run_options(parser, timeout_seconds=6 * 3600)
    return extract_archives(**parse_options(parser, argv))


def extract_archives(archives: Path, output: Path, *, run_options: RunOptions) -> int:
    """Extract the missing videos and return the exit status.

    Raises:
        ValueError: If there are no archives, or a replacement archive cannot be read.
    """
    archives, output = archives.resolve(), output.absolute()
    names = _find_archives(archives)
    if not names:
        raise ValueError(f"no archives ({', '.join(_ENDINGS)}) found below {archives}")
    replacing = [name for name in names if _is_replacement(name)]
    first = _extract_all(archives, output, replacing, {}, _unsharded(run_options))
    if first.failures:
        name, reason = next(iter(first.failures.items()))
        raise ValueError(f"{archives / name}: {reason}; archives of replacements must be complete")
    # By id. The release has one replacement per video; of several, the last by name is used.
    replacements = {
        split_segment_name(PurePosixPath(path).stem): path
        for name in replacing
        for path in first.results.get(name, {"videos": ()})["videos"]
    }
    others = [name for name in names if not _is_replacement(name)]
    step = _extract_all(archives, output, others, replacements, run_options)
    if run_options.dry_run or step.left:
        print_unfinished(step, run_options)
    if run_options.dry_run:
        return 0
    _report(output, first, step, replacements, run_options)
    return 1 if step.failures else 0


def _extract_all(
    archives: Path,
    output: Path,
    names: list[str],
    replacements: dict[str, str],
    run_options: RunOptions,
) -> StepResult:
    digest = zlib.crc32("\n".join(sorted(replacements.values())).encode())
    return run_step(
        partial(_extract_item, archives, output, replacements),
        [
            Item(
                key=name,
                fingerprint=[*file_fingerprint(archives / name), digest],
                argument=name,
            )
            for name in names
        ],
        name="extract",
        ledger_path=output / ".extract.ledger.jsonl",
        run_options=run_options,
        is_intact=lambda name, done: all((output / path).is_file() for path in done["videos"]),
        unit="archive",
    )


def _unsharded(run_options: RunOptions) -> RunOptions:
    """Every shard needs all replacements; the first to run extracts them."""
    return RunOptions(**{**vars(run_options), "shard": None})


def _extract_item(
    archives: Path, output: Path, replacements: dict[str, str], name: str
) -> dict[str, Any]:
    folder = PurePosixPath(name).parent
    num_videos, num_bytes = 0, 0
    replaced: list[str] = []
    refused: list[dict[str, str]] = []
    written: set[str] = set()
    archive_bytes = (archives / name).stat().st_size
    try:
        with open_tar(archives / name) as tar:
            for member in tar:
                check_expansion(member, archive_bytes=archive_bytes)
                if member.isdir() or _is_skipped(member.name):
                    continue
                path = PurePosixPath(os.path.normpath(member.name))
                target = output / folder / path
                replacement = replacements.get(split_segment_name(path.stem))
                reason = why_refused(member, output / folder, output) or _extract_video(
                    tar, member, target, output / replacement if replacement else None
                )
                if reason is not None:
                    shown = member.name.encode(errors="backslashreplace").decode()
                    refused.append({"member": shown, "reason": reason})
                    continue
                if replacement is not None:
                    replaced.append((folder / path).as_posix())
                written.add(path.as_posix())
                num_videos += 1
                num_bytes += target.stat().st_size
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ItemFailure(
            f"damaged after {num_videos} videos ({error or type(error).__name__}); delete it and "
            "download it again"
        ) from error
    remove_unfinished(output / folder, written)
    # Not recorded for other archives: their videos may be deleted once they are resized.
    videos = sorted((folder / path).as_posix() for path in written) if _is_replacement(name) else []
    return {
        "videos": videos,
        "num_videos": num_videos,
        "num_bytes": num_bytes,
        "replaced": replaced,
        "refused": refused,
    }


def _extract_video(
    tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, replacement: Path | None
) -> str | None:
    """Write `member`, or its replacement, to `target`; return why its name is refused, if it is."""
    try:
        if replacement is not None:
            _place_copy(replacement, target)
        elif not _is_extracted(target, member):
            _write(tar, member, target)
    except OSError as error:
        if error.errno not in _BAD_NAME:
            raise
        return f"the file system refuses its name ({error.strerror})"
    return None


def _is_skipped(name: str) -> bool:
    """Whether a member is not a video, or hidden, such as the files copying programs leave."""
    base = PurePosixPath(name).name
    return base.startswith(".") or not is_video_name(base)


def _is_extracted(target: Path, member: tarfile.TarInfo) -> bool:
    """Whether an earlier run extracted the member, and the file has not changed since."""
    try:
        status = target.lstat()  # A link is not what was extracted.
    except FileNotFoundError:
        return False
    return (status.st_size, int(status.st_mtime)) == (member.size, _mtime(member))


def _mtime(member: tarfile.TarInfo) -> int:
    """Modification time in seconds; archives may hold any number."""
    return int(member.mtime) if 0 <= member.mtime < 2**33 else 0


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = tar.extractfile(member)
    assert source is not None
    with atomic_output(target) as temporary:
        with open(temporary, "wb") as file:
            shutil.copyfileobj(source, file)
        if temporary.stat().st_size != member.size:
            raise tarfile.ReadError(f"{member.name} is truncated")
        os.utime(temporary, (_mtime(member), _mtime(member)))


def _place_copy(replacement: Path, target: Path) -> None:
    """Place a replacement under the name of the replaced video, as a hard link if possible."""
    if target.exists() and os.path.samefile(replacement, target):
        return
    with atomic_output(target) as temporary:
        try:
            os.link(replacement, temporary)
        except OSError:  # Some file systems have no hard links.
            shutil.copy2(replacement, temporary)


def _find_archives(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.name.endswith(_ENDINGS) and not path.name.startswith(".") and path.is_file()
    )


def _is_replacement(name: str) -> bool:
    return PurePosixPath(name).name.startswith("replacement")


def _report(
    output: Path,
    first: StepResult,
    step: StepResult,
    replacements: dict[str, str],
    run_options: RunOptions,
) -> None:
    results = {**first.results, **step.results}
    replaced = [path for done in step.results.values() for path in done["replaced"]]
    refused = [
        {"archive": name, **member}
        for name, done in sorted(results.items())
        for member in done["refused"]
    ]
    replaced_ids = {split_segment_name(PurePosixPath(path).stem) for path in replaced}
    unused = sorted(path for key, path in replacements.items() if key not in replaced_ids)
    num_videos = sum(done["num_videos"] for done in step.results.values())
    num_bytes = sum(done["num_bytes"] for done in step.results.values())
    print_line(
        f"{output}: {num_videos} videos, {num_bytes / 1e9:.2f} GB from {len(step.results)} "
        f"archives ({step.num_kept} already done); {len(replaced)} videos replaced"
    )
    print_first([f"{name}: {reason}" for name, reason in sorted(step.failures.items())])
    print_first(
        [f"{entry['archive']}: refused {entry['member']!r}: {entry['reason']}" for entry in refused]
    )
    if unused and not (step.left or step.failures):
        print_line(
            f"    {len(unused)} replacements are for videos that are in no archive; they are in "
            f"{output / PurePosixPath(unused[0]).parent}"
        )
    part = "" if run_options.shard is None else f".{run_options.shard}"
    report = output / f"extract{part}.report.json"
    write_json(
        report,
        {
            "num_videos": num_videos,
            "num_bytes": num_bytes,
            "num_archives": len(step.results),
            "num_failed": len(step.failures),
            "failed": [
                {"archive": name, "reason": why} for name, why in sorted(step.failures.items())
            ],
            "refused": refused,
            "replaced": sorted(replaced),
            "unused_replacements": unused,
        },
    )
    print_line(f"report: {report}")


if __name__ == "__main__":
    run_script(__file__)
