"""The one error that everything which reads videos raises."""

from pathlib import Path


class VideoDecodeError(ValueError):
    """A video, or one of its frames, cannot be decoded.

    Attributes:
        path: the file.
        frame: index of the first frame that could not be had, in presentation order, or ``None``
            when the file as a whole is at fault. When a file breaks off midway, frames before
            this one are good.
        cause: one line, without path and frame.
    """

    def __init__(self, path: str | Path, cause: str, frame: int | None = None) -> None:
        self.path = str(path)
        self.cause = cause
        self.frame = frame
        where = self.path if frame is None else f"{self.path}, frame {frame}"
        super().__init__(f"{where}: {cause}")

    def __reduce__(self):
        # Errors cross from workers to the main process by pickle, which would call
        # __init__ with the finished message alone.
        return type(self), (self.path, self.cause, self.frame)
