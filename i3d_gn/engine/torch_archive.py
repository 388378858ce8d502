"""Checks of the zip archives that `torch.save` writes, which `torch.load` does not make."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

ResultT = TypeVar("ResultT")


class ArchiveError(ValueError):
    """An archive that must not be loaded; the message is the reason, without the path."""


def member_names(path: Path) -> list[str]:
    """Names of the members, without their folders.

    Raises:
        ArchiveError: The file is not a zip archive, or damaged.
    """
    return _read(path, lambda zip_file: [n.rpartition("/")[2] for n in zip_file.namelist()])


def check_archive(path: Path) -> None:
    """Verify size and checksum of every member.

    Raises:
        ArchiveError: The file is not a zip archive, is damaged, or unpacks to more than its size:
            `torch.save` does not compress, so that members are compressed or share their bytes.
    """
    file_bytes = path.stat().st_size
    members = _read(path, zipfile.ZipFile.infolist)
    unpacked_bytes = sum(member.file_size for member in members)
    is_stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    if not is_stored or unpacked_bytes > file_bytes:
        raise ArchiveError(
            f"{file_bytes} bytes unpack to {unpacked_bytes}, which is refused: torch.save does not "
            "compress"
        )
    # All are 0 if torch.serialization.set_crc32_options(False) was used.
    if any(member.CRC for member in members):
        damaged = _read(path, zipfile.ZipFile.testzip)
        if damaged is not None:
            raise ArchiveError(f"damaged: the checksum of {damaged} is wrong")


def _read(path: Path, function: Callable[[zipfile.ZipFile], ResultT]) -> ResultT:
    try:
        with zipfile.ZipFile(path) as archive:
            return function(archive)
    except Exception as error:  # zipfile raises whatever damaged bytes happen to mean
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArchiveError(f"damaged: {reason}") from error
