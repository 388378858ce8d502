"""Video networks: I3D, and those of other libraries with our norms."""

from i3d_gn.models.i3d import I3D, i3d_resnet50, i3d_resnet101, i3d_small, i3d_tiny
from i3d_gn.models.network import VideoNetwork

__all__ = ["I3D", "VideoNetwork", "i3d_resnet50", "i3d_resnet101", "i3d_small", "i3d_tiny"]
