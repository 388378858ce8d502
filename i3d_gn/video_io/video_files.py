"""Videos without an index: files on disk and at URLs, probed when they are read."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from multiprocessing.util import get_temp_dir
from pathlib import Path, PurePosixPath

import numpy as np

from i3d_gn.video_io.decode import probe_video
from i3d_gn.video_io.errors import VideoDecodeError
from i3d_gn.video_io.find_videos import check_name, find_files
from i3d_gn.video_io.index import VideoSource
from i3d_gn.video_io.index_table import UNKNOWN_LABEL
from i3d_gn.video_io.packed import is_url

_TIMEOUT_SECONDS = 60.0


class VideoFiles:
    """Videos by path or URL; has what datasets use of a `VideoIndex`.

    Args:
        paths: Files, or http(s) URLs, which are downloaded to a temporary file when they are read.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self._downloaded: dict[int, Path] = {}
        self.labels = np.full(len(self.paths), UNKNOWN_LABEL)

    def __len__(self) -> int:
        return len(self.paths)

    @contextlib.contextmanager
    def file_of(self, i: int) -> Iterator[Path]:
        """Yield a path from which to read video `i` inside the block.

        Raises:
            VideoDecodeError: The URL cannot be downloaded.
        """
        name = self.paths[i]
        if not is_url(name):
            yield Path(name)
            return
        with contextlib.ExitStack() as stack:
            path = self._downloaded.get(i) or stack.enter_context(_downloaded(name))
            try:
                yield path
            except VideoDecodeError as error:
                raise VideoDecodeError(name, error.cause, error.frame) from error

    @contextlib.contextmanager
    def downloaded(self) -> Iterator[VideoFiles]:
        """Yield the same videos, those at URLs in files that exist inside the block.

        Raises:
            VideoDecodeError: A URL cannot be downloaded.
        """
        with contextlib.ExitStack() as stack:
            files = VideoFiles(self.paths)
            for i, name in enumerate(self.paths):
                if is_url(name):
                    files._downloaded[i] = stack.enter_context(_downloaded(name))
            yield files

    @contextlib.contextmanager
    def source_of(self, i: int) -> Iterator[VideoSource]:
        """Yield video `i` as it is now, to read inside the block.

        Raises:
            VideoDecodeError: It cannot be downloaded or read.
        """
        with self.file_of(i) as path:
            info = probe_video(path)
            yield VideoSource(path, info.num_frames, info.height, info.width)


def find_videos(source: str) -> list[str]:
    """The videos that `source` stands for: a file, a folder (all videos below it), or a URL.

    Raises:
        ValueError: There is no such file, no video in the folder, or a name is not UTF-8.
    """
    check_name(source)
    if is_url(source):
        return [source]
    path = Path(source)
    if not path.is_dir():
        if not path.exists():
            raise ValueError(
                f"{source}: no such file; give a video, a folder of videos, an index (.parquet) "
                "or a URL"
            )
        return [source]
    found = find_files(path).videos
    if not found:
        raise ValueError(f"{source}: no videos in this folder")
    return [str(path / video) for video in found]


@contextlib.contextmanager
def _downloaded(url: str) -> Iterator[Path]:
    # A folder of the main process, which removes it at its end: loader workers may be killed.
    with tempfile.TemporaryDirectory(dir=get_temp_dir()) as folder:
        path = Path(folder, PurePosixPath(urllib.parse.urlparse(url).path).name or "video")
        _download(url, path)
        yield path


def _download(url: str, path: Path) -> None:
    """Download `url` to `path`, and check the size that the server announced."""
    try:
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response,
            path.open("wb") as file,
        ):
            shutil.copyfileobj(response, file, 1 << 20)
            announced, received = response.headers.get("Content-Length"), file.tell()
    except urllib.error.HTTPError as error:
        with error:  # it is also the open connection
            reason = f"HTTP status {error.code}, {error.reason}"
        raise VideoDecodeError(url, f"could not be downloaded ({reason})") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", None) or error)
        raise VideoDecodeError(url, f"could not be downloaded ({reason})") from error
    if announced is not None and received != int(announced):
        raise VideoDecodeError(
            url, f"could not be downloaded (received {received} of {announced} bytes)"
        )
