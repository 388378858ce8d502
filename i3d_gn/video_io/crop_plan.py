"""Resize, crop and flip of a sample as plain numbers, shared by transforms and decoding."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CropPlan:
    """Resize a frame, crop a window, then optionally flip it left to right.

    ::

        frame --resize--> resize_height x resize_width --crop--> height x width --flip-->

                   left   left + width
                     v      v
              +---------------------+
              |                     |
        top > |      +------+       |   resize_height
              |      |      |       |
              |      +------+       |
              +---------------------+
                   resize_width

    One plan applies to all frames of a clip, so that the jitter is constant over time.

    Raises:
        ValueError: The window is empty or leaves the resized frame.
    """

    resize_height: int
    resize_width: int
    top: int
    left: int
    height: int
    width: int
    flip: bool = False

    def __post_init__(self) -> None:
        inside = (
            0 <= self.top < self.top + self.height <= self.resize_height
            and 0 <= self.left < self.left + self.width <= self.resize_width
        )
        if not inside:
            raise ValueError(
                f"the window {self.height}x{self.width} at ({self.top}, {self.left}) must lie "
                f"inside the resized frame of {self.resize_height}x{self.resize_width}"
            )
