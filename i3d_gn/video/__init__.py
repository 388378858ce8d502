"""Video classification: train, evaluate with 10 clips, predict, report."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from i3d_gn.video.recognizer import Recognizer

__all__ = ["Recognizer"]


def __getattr__(name: str) -> Any:
    """Import torch when `Recognizer` is used, so that help is quick."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from i3d_gn.video.recognizer import Recognizer  # noqa: PLC0415

    return Recognizer
