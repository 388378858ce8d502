"""The error that every function which reads a video raises."""

from pathlib import Path


class VideoDecodeError(ValueError):
    """A video, or one of its frames, cannot be decoded.

    Attributes:
        path: The file.
        frame: Index of the first frame that cannot be decoded, in presentation order, or `None`
            if the file as a whole cannot be read. All frames before it are good.
        cause: One line, without path and frame.
    """

    def __init__(self, path: str | Path, cause: str, frame: int | None = None) -> None:
        self.path = str(path)
        self.cause = cause
        self.frame = frame
        where = self.path if frame is None else f"{self.path}, frame {frame}"
        super().__init__(f"{where}: {cause}")

    def __reduce__(self):
        # Loader workers send the error by pickle, whose default would call __init__ with the
        # formatted message as its only argument.
        return type(self), (self.path, self.cause, self.frame)
